"""algorithms/collect/label_rewards.py: equations beside linear programs and logarithms, datasets, errors."""

import dataclasses
import re
import sys

import gymnasium as gym
import minari
import numpy as np
import pytest
from conftest import ROOT, load_script
from minari.data_collector import EpisodeBuffer
from scipy.optimize import linear_sum_assignment, linprog
from scipy.special import logsumexp

script = load_script("collect/label_rewards.py")
RNG = np.random.default_rng(0)


# Optimal transport


def exact_plan(costs: np.ndarray) -> np.ndarray:
    """The plan of least cost with rows of 1/T and columns of 1/S, as a linear program."""
    steps, others = costs.shape
    rows = np.kron(np.eye(steps), np.ones(others))
    columns = np.kron(np.ones(steps), np.eye(others))
    sums = np.append(np.full(steps, 1 / steps), np.full(others, 1 / others))
    found = linprog(costs.ravel(), A_eq=np.vstack([rows, columns]), b_eq=sums)
    return found.x.reshape(costs.shape)


@pytest.mark.equation(3)
@pytest.mark.parametrize("seed", range(3))
def test_a_plan_is_the_best_assignment(seed):
    costs = np.random.default_rng(seed).uniform(0, 2, (6, 6))
    rows, columns = linear_sum_assignment(costs)
    plan = script.transport(costs, iterations=20_000)
    assert (plan * costs).sum() == pytest.approx(costs[rows, columns].mean(), abs=script.EPSILON * np.log(36))
    wanted = np.zeros((6, 6))
    wanted[rows, columns] = 1 / 6
    np.testing.assert_allclose(plan, exact_plan(costs), atol=0.05)
    np.testing.assert_allclose(plan, wanted, atol=0.05)


@pytest.mark.equation(3)
def test_a_plan_between_episodes_of_other_lengths_is_the_linear_programs():
    costs = np.random.default_rng(7).uniform(0, 2, (4, 7))
    plan = script.transport(costs, iterations=20_000)
    np.testing.assert_allclose(plan.sum(1), 1 / 4, rtol=1e-9)
    np.testing.assert_allclose(plan.sum(0), 1 / 7, rtol=1e-6)
    assert (plan * costs).sum() == pytest.approx((exact_plan(costs) * costs).sum(), abs=0.01 * np.log(28))


@pytest.mark.equation(4)
@pytest.mark.parametrize("shape", [(5, 8), (40, 40)])
def test_iterations_are_those_in_logarithms(shape):
    """f and g are potentials; the row sums are made right last, so each step moves just its share."""
    costs = np.random.default_rng(1).uniform(0, 2, shape)
    costs[0], costs[:, 0] = 2, 0  # the extremes
    f = np.zeros(shape[0])
    for _ in range(100):
        g = -np.log(shape[1]) - logsumexp(f[:, None] - costs / 0.01, axis=0)
        f = -np.log(shape[0]) - logsumexp(g - costs / 0.01, axis=1)
    plan = script.transport(costs)
    np.testing.assert_allclose(plan, np.exp(f[:, None] - costs / 0.01 + g), rtol=1e-8, atol=1e-300)
    np.testing.assert_allclose(plan.sum(1), 1 / shape[0], rtol=1e-12)


def test_the_worst_costs_stay_in_double_precision():
    """Half of the steps cost all there is, the other half nothing, and masses cannot be matched so."""
    costs = np.zeros((30, 10))
    costs[:, 1:] = 2
    with np.errstate(all="raise"):
        plan = script.transport(costs, iterations=1000)
    assert np.isfinite(plan).all()
    np.testing.assert_allclose(plan, 1 / 300, rtol=1e-6)


@pytest.mark.equation(2)
def test_costs():
    seen = np.array([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]])
    shown = np.array([[6.0, 8.0], [0.0, 5.0]])
    wanted = [[0, 1 - 4 / 5], [1 + 4 / 5, 2], [1, 1]]
    np.testing.assert_allclose(script.cosine_costs(seen, shown), wanted, atol=1e-12)


@pytest.mark.equation(5)
def test_rewards_of_an_episode_beside_a_demonstration():
    """Five steps and two: each step has mass 1/5, so one is shared between the two."""
    seen = np.array([[1.0, 0.2, 0.0], [0.3, 1.0, -0.4], [-1.0, 0.5, 2.0], [2.0, 1.0, 1.0], [0.1, -1.0, 1.0]])
    shown = np.array([[0.0, 1.0, 0.1], [1.0, 0.0, 1.0]])
    norms = np.linalg.norm(seen, axis=1)[:, None] * np.linalg.norm(shown, axis=1)
    costs = 1 - seen @ shown.T / norms
    f = np.zeros(5)
    for _ in range(100):
        g = -np.log(2) - logsumexp(f[:, None] - costs / 0.01, axis=0)
        f = -np.log(5) - logsumexp(g - costs / 0.01, axis=1)
    plan = np.exp(f[:, None] + g - costs / 0.01)
    wanted = 5 * np.exp(-5 * 5 / 3 * (plan * costs).sum(1))
    np.testing.assert_allclose(script.transport_rewards(seen, shown), wanted, rtol=1e-9)


@pytest.mark.parametrize("steps", [30, 45])
def test_steps_of_the_authors_mass_earn_the_same(steps):
    """A difference that is none: 1/1000 for each step of both, however many there are, and 1000 for T."""
    rng = np.random.default_rng(8)
    seen, shown = rng.normal(size=(steps, 4)).cumsum(0), rng.normal(size=(40, 4)).cumsum(0)
    norms = np.linalg.norm(seen, axis=1)[:, None] * np.linalg.norm(shown, axis=1)
    costs = 1 - seen @ shown.T / norms
    f = np.zeros(steps)
    for _ in range(100):
        g = -np.log(1000) - logsumexp(f[:, None] - costs / 0.01, axis=0)
        f = -np.log(1000) - logsumexp(g - costs / 0.01, axis=1)
    plan = np.exp(f[:, None] + g - costs / 0.01)
    wanted = 5 * np.exp(-5 * 1000 / 4 * (plan * costs).sum(1))
    np.testing.assert_allclose(script.transport_rewards(seen, shown), wanted, rtol=1e-7)


def test_an_episode_that_is_its_demonstration_earns_all_there_is():
    walk = RNG.normal(size=(50, 4)).cumsum(0)
    np.testing.assert_allclose(script.transport_rewards(walk, walk[::-1]), 5, atol=0.2)
    assert script.transport_rewards(walk, -walk).max() < script.transport_rewards(walk, walk).min()


@pytest.mark.equation(6)
def test_the_demonstration_under_which_an_episode_earns_most_counts():
    rng = np.random.default_rng(6)
    seen = rng.normal(size=(20, 3))
    shown = [rng.normal(size=(20, 3)), rng.normal(size=(15, 3)), rng.normal(size=(20, 3))]
    rewards = [script.transport_rewards(seen, one) for one in shown]
    best = np.argmax([row.sum() for row in rewards])
    assert best == 1  # neither the first nor the last
    np.testing.assert_array_equal(script.best_rewards(seen, shown), rewards[best])
    assert (rewards[best] < np.max(rewards, axis=0)).any()  # step by step another would have been chosen


@pytest.mark.equation(1)
def test_what_a_step_without_a_reward_gets():
    labelled = [np.array([3.0, -0.5]), np.array([2.0, -1.5, 7.0])]
    assert script.unlabelled_reward("zero", labelled) == 0
    assert script.unlabelled_reward("minimum", labelled) == -1.5


# Datasets


def episode(observations, rewards, ended=False) -> EpisodeBuffer:
    steps = len(rewards)
    last = np.arange(steps) == steps - 1
    return EpisodeBuffer(
        observations=np.array(observations, np.float64),
        actions=RNG.uniform(-1, 1, (steps, 2)).astype(np.float32),
        rewards=np.array(rewards, np.float64),
        terminations=last & ended,
        truncations=last & (not ended),
        infos={"propensity": RNG.random(steps)},
    )


def walk(steps: int, level: float) -> EpisodeBuffer:
    """An episode that earns about `level` a step."""
    return episode(RNG.normal(size=(steps + 1, 3)), level + RNG.normal(size=steps) / 100, ended=steps < 10)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """store(name, episodes) writes a dataset in a Minari root of the test's own."""
    (tmp_path / "minari").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def write(name: str, episodes: list, width: int = 3):
        spaces = {
            "observation_space": gym.spaces.Box(-np.inf, np.inf, (width,), np.float64),
            "action_space": gym.spaces.Box(-1, 1, (2,), np.float32),
        }
        dataset = minari.create_dataset_from_buffers(name, episodes, **spaces, data_format="hdf5")
        columns = ["x", "y", "w" if "other" in name else "z"]
        names = {"observation_columns": columns, "ref_min_score": 1.0, "content_hash": "of another"}
        dataset.storage.update_metadata(names)
        return dataset

    return write


@pytest.fixture
def call(monkeypatch, capsys):
    """call("--field", ...) is the command line in this process: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        words = ["--source", "my/log-v0", "--dataset", "my/labelled-v0", *arguments]
        monkeypatch.setattr(sys, "argv", ["label_rewards.py", *words])
        capsys.readouterr()
        try:
            script.main(script.label)
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def read(name: str = "my/labelled-v0") -> list:
    return list(minari.load_dataset(name).iterate_episodes())


def assert_same_but_rewards(found, wanted) -> None:
    for field in ("observations", "actions", "terminations", "truncations"):
        np.testing.assert_array_equal(getattr(found, field), getattr(wanted, field))
    np.testing.assert_array_equal(found.infos["propensity"], wanted.infos["propensity"])


@pytest.mark.parametrize("fill", ["zero", "minimum"])
def test_uds_of_one_log_keeps_the_best_and_hides_the_rest(store, call, fill):
    episodes = [walk(12, level) for level in (1, 5, 2, 4)]
    store("my/log-v0", episodes)
    status, out, err = call("--method", "uds", "--count", "2", "--fill", fill)
    assert (status, err) == (0, "")
    found = read()
    hidden = 0.0 if fill == "zero" else min(episodes[1].rewards.min(), episodes[3].rewards.min())
    for i, one in enumerate(found):
        assert_same_but_rewards(one, episodes[i])
        wanted = episodes[i].rewards if i in (1, 3) else np.full(12, hidden)
        np.testing.assert_array_equal(one.rewards, wanted)
    assert "Unlabelled steps have the reward" in out


def test_uds_of_two_logs_has_the_labelled_first(store, call):
    bare, labelled = [walk(12, 0), walk(5, 0)], [walk(8, 1), walk(12, 3), walk(12, 2)]
    store("my/log-v0", bare)
    store("my/good-v0", labelled)
    assert call("--method", "uds", "--demonstrations", "my/good-v0", "--count", "0")[0] == 0
    found = read()
    assert len(found) == 5
    for one, wanted in zip(found, [*labelled, *bare], strict=True):
        assert_same_but_rewards(one, wanted)
    np.testing.assert_array_equal(found[1].rewards, labelled[1].rewards)
    assert not np.any(np.concatenate([found[3].rewards, found[4].rewards]))
    minari.delete_dataset("my/labelled-v0")
    assert call("--method", "uds", "--demonstrations", "my/good-v0", "--count", "2")[0] == 0
    assert [round(one.rewards.mean()) for one in read()] == [3, 2, 0, 0]


def test_the_commands_take_demonstrations_whole(store, call):
    """Four of them are fewer than the ten that are the best of a log of many."""
    store("my/log-v0", [walk(12, 1), walk(12, 2)])
    store("my/good-v0", [walk(12, level) for level in range(4)])
    for text in (script.__doc__, (ROOT / "docs/data.md").read_text()):
        command = re.search(r"label_rewards\.py (--source .* --demonstrations .*\\\n.*)", text)[1]
        words = command.replace("\\\n", " ").replace("mine/", "my/").split()
        options = dict(zip(words[::2], words[1::2]))
        assert options["--count"] == "0"
        options |= {"--source": "my/log-v0", "--dataset": "my/labelled-v0"}
        status, out, _ = call(*(word for option in options.items() for word in option))
        assert status == 0
        assert "one of 4 demonstrations" in out
        minari.delete_dataset("my/labelled-v0")


def test_otr_labels_every_episode_by_its_nearest_demonstration(store, call):
    bare, shown = [walk(12, 0), walk(5, 0)], [walk(8, 1), walk(12, 3), walk(12, 2)]
    store("my/log-v0", bare)
    store("my/good-v0", shown)
    assert call("--demonstrations", "my/good-v0", "--count", "2")[0] == 0
    targets = [shown[1].observations[:-1], shown[2].observations[:-1]]  # the best two
    for one, wanted in zip(read(), bare, strict=True):
        assert_same_but_rewards(one, wanted)
        np.testing.assert_array_equal(one.rewards, script.best_rewards(wanted.observations[:-1], targets))
    minari.delete_dataset("my/labelled-v0")
    assert call("--demonstrations", "my/good-v0", "--count", "2", "--normalize_states", "true")[0] == 0
    seen = np.concatenate([one.observations[:-1] for one in bare])
    scaled = [(x - seen.mean(0)) / seen.std(0) for x in (bare[1].observations[:-1], *targets)]
    np.testing.assert_allclose(read()[1].rewards, script.best_rewards(scaled[0], scaled[1:]), rtol=1e-9)


def test_with_normalize_states_units_of_columns_do_not_matter(store, call):
    """A column in other units, and one that never changes."""
    rewards = []
    for version, factors in enumerate(([1, 1, 0], [1000, 1, 0])):
        RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state
        episodes = [walk(12, level) for level in (1, 2, 3)]
        for one in episodes:
            one.observations[:] = one.observations * factors + [0, 0, 7]
        store(f"my/log{version}-v0", episodes)
        arguments = ("--source", f"my/log{version}-v0", "--count", "1", "--normalize_states", "true")
        assert call(*arguments, "--dataset", f"my/labelled{version}-v0")[0] == 0
        rewards.append(np.concatenate([one.rewards for one in read(f"my/labelled{version}-v0")]))
    np.testing.assert_allclose(*rewards, rtol=1e-6)


def test_where_labels_are_from_is_in_the_metadata(store, call):
    log = store("my/log-v0", [walk(12, level) for level in (1, 5, 2, 4)])
    assert call("--method", "uds", "--count", "2")[0] == 0
    dataset = minari.load_dataset("my/labelled-v0")
    known, digest = dataset.storage.metadata, script.content_hash(log)
    recipe = known["recipe"]
    wanted = {"source": "my/log-v0", "method": "uds", "count": 2, "fill": "zero"}
    wanted |= {"source_hash": digest, "demonstrations_hash": digest, "demonstration_episodes": [1, 3]}
    assert {name: recipe[name] for name in wanted} == wanted
    assert "my/log-v0 without its rewards" in known["description"]
    assert known["content_hash"] == script.content_hash(dataset)
    assert (known["observation_columns"], known["ref_min_score"]) == (["x", "y", "z"], 1.0)
    status, out, _ = call("--method", "uds", "--count", "2")
    assert (status, "is there" in out) == (0, True)
    status, out, err = call("--method", "uds", "--count", "3")
    assert (status, "by another recipe: minari delete my/labelled-v0" in err) == (2, True)


@pytest.mark.usefixtures("store")
def test_the_environment_goes_along(call):
    rows = RNG.normal(size=(5, 3)).astype(np.float32)
    episodes = [episode(rows, np.full(4, level)) for level in (1.0, 2.0)]
    episodes = [dataclasses.replace(one, actions=one.actions[:, :1]) for one in episodes]
    env = gym.make("Pendulum-v1")
    minari.create_dataset_from_buffers("my/log-v0", episodes, env=env, data_format="hdf5")
    assert call("--method", "uds", "--count", "1")[0] == 0
    assert minari.load_dataset("my/labelled-v0").env_spec.id == "Pendulum-v1"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "best"], "method: 'best' is not uds or otr"),
        (["--method", "uds", "--fill", "mean"], "fill: 'mean' is not zero or minimum"),
        (["--count", "9"], "count: there are 2 episodes to choose from, not 9; --count 0 takes all"),
        (["--source", "my/none-v0"], "cannot load my/none-v0"),
        (["--demonstrations", "my/wide-v0", "--count", "1"], "has [(4,)], but my/log-v0 has [(3,)]"),
        (["--method", "uds", "--demonstrations", "my/wide-v0", "--count", "1"], "my/wide-v0 has (Box"),
        (["--demonstrations", "my/other-v0", "--count", "1"], "of my/other-v0 are ['x', 'y', 'w']"),
        (["--source", "my/flat-v0", "--count", "1"], "same return, so none is known to be good"),
        (["--dataset", "labelled", "--count", "1"], "no Minari id"),
    ],
)
def test_what_it_refuses(store, call, tmp_path, arguments, words):
    store("my/log-v0", [walk(12, 1), walk(12, 2)])
    store("my/flat-v0", [episode(RNG.normal(size=(4, 3)), [0, 0, 0]) for _ in range(2)])
    store("my/other-v0", [walk(12, 1)])
    store("my/wide-v0", [episode(RNG.normal(size=(4, 4)), [0, 1, 0])], width=4)
    before = sorted(path.name for path in (tmp_path / "minari").rglob("*"))
    status, _, err = call(*arguments)
    assert (status, len(err.splitlines())) == (2, 1)
    assert words in err
    assert sorted(path.name for path in (tmp_path / "minari").rglob("*")) == before
