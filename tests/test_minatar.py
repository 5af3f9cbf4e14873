"""algorithms/collect/minatar.py: its DQN beside plain calculations, arithmetic in which no order matters, the
games, and the logs."""

import copy
import importlib.metadata
import sys

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
from conftest import load_script, short
from gymnasium.utils.env_checker import check_env

minatar = load_script("collect/minatar.py")
sys.modules["reef_minatar"] = minatar  # the entry point of its environments
try:
    importlib.metadata.distribution("minatar")
    MISSING = False
except importlib.metadata.PackageNotFoundError:
    MISSING = True
needs_package = pytest.mark.skipif(MISSING, reason="the package minatar is missing: make discrete")
pytestmark = pytest.mark.filterwarnings("ignore:.*The environment reef/")  # Gymnasium's advice


class Signals:
    """A game as the package's: one of three lamps is lit, whose own action pays 1; five in an episode."""

    def __init__(self):
        self.random, self.acts = np.random.RandomState(), []
        self.reset()

    def reset(self):
        self.left, self.lamp = 5, self.random.randint(3)

    def act(self, action):
        self.acts.append(action)
        reward = int(action == (0, 2, 5)[self.lamp])
        self.left, self.lamp = self.left - 1, self.random.randint(3)
        return reward, self.left == 0

    def state(self):
        planes = np.zeros((3, 3, 2), bool)
        planes[self.lamp, 1, 0] = True
        return planes

    def state_shape(self):
        return [3, 3, 2]

    def minimal_action_set(self):
        return [0, 2, 5]


class Endless(Signals):
    """It never ends, and shows how long it lasted."""

    def act(self, action):
        self.left = 7
        return super().act(action)


@pytest.fixture
def signals(monkeypatch):
    """The id of the environment."""
    games = {"signals": Signals, "endless": Endless}
    monkeypatch.setattr(minatar, "read_game", lambda name: games[name])
    return minatar.register_game("signals")


def small(inputs: int = 18, choices: int = 3, seed: int = 0, scale: float = 1.0, **fields):
    """A learner with random weights, biases included, and another target."""
    fields = {"hidden_dim": 6, "target_every": 3} | fields
    rng = np.random.default_rng(seed)
    learner = minatar.DQN(minatar.Config(**fields), inputs, choices, rng)
    learner.weights = [rng.normal(scale=scale, size=weight.shape) for weight in learner.weights]
    learner.critic = [minatar.fix(weight, minatar.WEIGHT_BITS) for weight in learner.weights]
    other = [rng.normal(scale=scale, size=weight.shape) for weight in learner.weights]
    learner.target_critic = [minatar.fix(weight, minatar.WEIGHT_BITS) for weight in other]
    return learner


def rows(count: int = 8, inputs: int = 18, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "planes": rng.integers(2, size=(count, inputs)).astype(float),
        "actions": rng.integers(3, size=count),
        "returns": rng.normal(size=count) * 3,
        "next_planes": rng.integers(2, size=(count, inputs)).astype(float),
        "discounts": np.where(np.arange(count) % 3 == 0, 0, 0.97),
    }


# ----------------------------------------------- the learner ------------------------------------------------


def values(weights: list[np.ndarray], planes: np.ndarray) -> np.ndarray:
    """Q of one screen, unit by unit."""
    w1, b1, w2, b2 = weights
    hidden = [max(sum(planes * w1[:, unit]) + b1[unit], 0) for unit in range(len(b1))]
    return np.array([sum(hidden * w2[:, choice]) + b2[choice] for choice in range(len(b2))])


def loss(weights: list[np.ndarray], target: list[float], batch: dict[str, np.ndarray]) -> float:
    errors = []
    for planes, action, y in zip(batch["planes"], batch["actions"], target):
        x = values(weights, planes)[action] - y
        errors.append(x * x / 2 if abs(x) < 1 else abs(x) - 0.5)
    assert min(map(abs, errors)) < 0.5 < max(map(abs, errors))  # both sides of huber
    return float(np.mean(errors))


@pytest.mark.equation(2, 3, 4)
def test_the_gradient_is_that_of_the_loss(monkeypatch):
    """By central differences, with digits enough that (6) does not show."""
    for name in ("WEIGHT_BITS", "HIDDEN_BITS", "ERROR_BITS"):
        monkeypatch.setattr(minatar, name, 44)
    learner, batch, target = small(), rows(), []
    for i in range(8):
        after = batch["next_planes"][i]
        best = max(range(3), key=lambda a: values(learner.critic, after)[a])
        ahead = values(learner.target_critic, after)[best]
        target.append(batch["returns"][i] + batch["discounts"][i] * ahead)
    for layer, slopes in zip(learner.critic, learner.gradient(batch), strict=True):
        for index in np.ndindex(layer.shape):
            kept, found = layer[index], []
            for step in (1e-6, -1e-6):
                layer[index] = kept + step
                found.append(loss(learner.critic, target, batch))
            layer[index] = kept
            assert slopes[index] == pytest.approx((found[0] - found[1]) / 2e-6, abs=1e-5)
    own, theirs = (np.array([values(w, x).argmax() for x in batch["next_planes"]])
                   for w in (learner.critic, learner.target_critic))
    assert (own != theirs).any()  # (3) matters


@pytest.mark.equation(5)
def test_an_update_is_a_step_of_adam_and_every_third_renews_the_target():
    learner, batch = small(), rows()
    before, target = copy.deepcopy(learner.weights), learner.target_critic
    slopes = learner.gradient(batch)
    learner.update(batch, 0.01)
    for old, slope, new, used in zip(before, slopes, learner.weights, learner.critic):
        np.testing.assert_allclose(new, old - 0.01 * slope / (np.abs(slope) + 1e-8), atol=1e-9)
        assert np.abs(used - new).max() <= 2.0**-17
        assert (used * 2.0**16 % 1 == 0).all()
    first, second = slopes, learner.gradient(batch)
    before = copy.deepcopy(learner.weights)
    learner.update(batch, 0.01)
    for old, one, two, new in zip(before, first, second, learner.weights):
        mean = (0.09 * one + 0.1 * two) / (1 - 0.81)
        square = (0.000999 * one**2 + 0.001 * two**2) / (1 - 0.998001)
        np.testing.assert_allclose(new, old - 0.01 * mean / (np.sqrt(square) + 1e-8), atol=1e-9)
    assert learner.target_critic is target
    learner.update(batch, 0.01)
    assert learner.target_critic is learner.critic


def shuffled(learner, order: np.ndarray, units: np.ndarray):
    """The same learner with inputs and hidden units in another order."""
    twin = copy.deepcopy(learner)
    for part in (twin.weights, twin.critic, twin.target_critic):
        part[0], part[1], part[2] = part[0][order][:, units], part[1][units], part[2][units]
    twin.means = [np.zeros_like(weight) for weight in twin.weights]
    twin.squares = [np.zeros_like(weight) for weight in twin.weights]
    return twin


def same_bits_in_any_order() -> bool:
    rng, learner = np.random.default_rng(3), small(400, scale=0.05, hidden_dim=64)  # errors within 1, too
    order, units, places = rng.permutation(400), rng.permutation(64), rng.permutation(32)
    twin = shuffled(learner, order, units)
    for number in range(40):
        batch = rows(32, 400, number)
        learner.update(batch, 1e-3)
        other = {name: column[places] for name, column in batch.items()}
        other |= {name: other[name][:, order] for name in ("planes", "next_planes")}
        twin.update(other, 1e-3)
    wanted = shuffled(learner, order, units).weights
    return all(np.array_equal(*pair) for pair in zip(wanted, twin.weights))


@pytest.mark.equation(6)
def test_the_order_of_a_sum_changes_no_bit():
    """As if another processor had added up: inputs, hidden units and rows in another order."""
    assert same_bits_in_any_order()


def test_without_fixed_points_it_does(monkeypatch):
    monkeypatch.setattr(minatar, "fix", lambda x, bits, largest=0: x)
    assert not same_bits_in_any_order()


@pytest.mark.equation(6)
def test_hidden_units_have_few_digits():
    hidden, _ = small().forward(small().critic, rows()["planes"])
    assert (hidden > 0).any()
    assert (hidden * 2.0**10 % 1 == 0).all()


@pytest.mark.equation(6)
def test_the_largest_numbers_keep_all_their_digits():
    """1,024 hidden units and rows at the limits, beside sums of whole numbers."""
    rng, largest = np.random.default_rng(0), minatar.LARGEST
    hidden = minatar.fix(rng.uniform(0.9, 1.1, 1024) * largest, minatar.HIDDEN_BITS, largest)
    weight = minatar.fix(-rng.uniform(0.9, 1.1, 1024) * largest, minatar.WEIGHT_BITS, largest)
    errors = minatar.fix(rng.uniform(0.9, 1, 1024), minatar.ERROR_BITS)
    assert hidden.max() == largest == -weight.min()
    for one, other in ((hidden, weight), (hidden, errors), (errors, weight)):
        a, b = ([int(x * 2**30) for x in part] for part in (one, other))
        exact = sum(x * y for x, y in zip(a, b))
        assert int(one @ other) * 2**60 + round((one @ other - int(one @ other)) * 2**60) == exact
    assert minatar.fix(np.array([0.3, -0.3, 9.0]), 2, 8.0).tolist() == [0.25, -0.25, 8.0]


# ------------------------------------------- steps, returns, logs -------------------------------------------


@pytest.mark.equation(1)
def test_choices_are_the_best_but_for_epsilon(signals):
    log, learner = minatar.GameLog(signals, 3000, np.random.SeedSequence(0)), small(seed=5)
    for _ in range(3000):
        log.step(learner, 0.3)
    best = [values(learner.critic, screen.ravel().astype(float)).argmax() for screen in log.observations]
    agree = log.actions == best
    assert len({*best}) > 1
    assert agree.mean() == pytest.approx(0.8, abs=0.03)
    assert log.propensities == pytest.approx(np.where(agree, 0.8, 0.1))


@pytest.mark.equation(2)
def test_returns_of_three_steps_end_with_their_episode(signals):
    """Rewards 1, 2, 4, ...; row 3 terminates, row 6 is cut."""
    log = minatar.GameLog(signals, 10, np.random.SeedSequence(0))
    log.filled, log.rewards = 10, 2.0 ** np.arange(10)
    log.terminations[3], log.truncations[6] = True, True
    log.next_observations[:, 0, 0, 0] = np.arange(10)
    log.observations[:, 0, 0, 0] = np.arange(10)
    batch, wanted = log.draw(500, 0.5), {}
    for first in range(8):
        last = min(first + 2, next((end for end in (3, 6) if end >= first), 9))
        steps = range(first, last + 1)
        total = sum(0.5 ** (t - first) * 2.0**t for t in steps)
        wanted[first] = (total, last, 0 if last == 3 else 0.5 ** len(steps))
    assert wanted[2] == (8.0, 3, 0)
    assert wanted[5] == (64.0, 6, 0.25)
    drawn = batch["planes"][:, 0].astype(int)
    assert {*drawn} == {*range(8)}
    found = zip(batch["returns"], batch["next_planes"][:, 0], batch["discounts"])
    assert all(row == wanted[first] for first, row in zip(drawn, found))


def test_it_learns_which_choice_pays(signals):
    fields = {"steps": 2500, "random_steps": 100, "update_every": 1, "hidden_dim": 32, "critic_lr": 3e-3}
    config = minatar.Config(game="signals", target_every=50, **fields)
    seeds = np.random.SeedSequence(0).spawn(4)
    learner, log = minatar.learn(config, signals, seeds[:2])
    low = minatar.mean_return(signals, learner, 1.0, 50, seeds[2])
    high = minatar.mean_return(signals, learner, 0.0, 50, seeds[3])
    assert low < 2.5
    assert high > 4  # of 5, of which 1 in 10 choices is the last one's
    assert log.propensities[0] == pytest.approx(1 / 3)  # epsilon falls from 1
    assert {*log.propensities[250:].round(6)} == {round(0.05 / 3, 6), round(0.95 + 0.05 / 3, 6)}


# ------------------------------------------------ the games -------------------------------------------------


def test_a_tenth_of_the_actions_are_the_last_one(signals):
    env = gym.make(signals).unwrapped
    asked = []
    for episode in range(2000):
        env.reset(seed=episode)
        for step in range(5):
            asked.append((2, 5)[step % 2])
            env.step(1 + step % 2)
    played = np.array(env.game.acts)
    assert (played != asked).mean() == pytest.approx(0.1, abs=0.01)
    first = played.reshape(-1, 5)[:, 0]
    assert {*first} == {0, 2}  # nothing is remembered of the episode before


def test_an_episode_ends_after_1000_steps(signals):
    env = gym.make(minatar.register_game("endless"))
    env.reset(seed=0)
    for step in range(1, 1001):
        _, _, terminated, truncated, _ = env.step(0)
        assert (terminated, truncated) == (False, step == 1000)


@needs_package
@pytest.mark.parametrize(("game", "kinds", "choices"), [("breakout", 4, 3), ("space_invaders", 6, 4)])
def test_the_packages_games(game, kinds, choices):
    env = gym.make(minatar.register_game(game))
    check_env(env.unwrapped, skip_render_check=True)
    assert env.observation_space == gym.spaces.Box(0, 1, (10, 10, kinds), np.uint8)
    assert env.action_space.n == choices
    courses = []
    for seed in (3, 3, 4):
        env.reset(seed=seed)
        courses.append([env.step(i % choices) for i in range(25)])
    same = [all(np.array_equal(a[0], b[0]) for a, b in zip(courses[0], other)) for other in courses[1:]]
    assert same == [True, False]
    assert {"seaborn", "minatar"}.isdisjoint(sys.modules)


# ------------------------------------------------- the data -------------------------------------------------


def make(name: str, **fields) -> minari.MinariDataset:
    fields = {"game": "signals", "steps": 203, "random_steps": 50, "hidden_dim": 8} | fields
    minatar.make_log(minatar.Config(dataset=name, reference_episodes=20, **fields))
    return minari.load_dataset(name)


@pytest.mark.parametrize("policy", ["mixed", "expert"])
def test_a_log_has_episodes_propensities_and_references(minari_root, signals, policy):
    log = make(f"test/signals/{policy}-v0", policy=policy, expert_noise=0.3)
    known = log.storage.metadata
    assert known["recipe"]["policy"] == policy
    assert 0.5 < known["ref_min_score"] < 3  # 5 / 3 by chance
    assert log.total_steps == 203
    lengths = []
    for episode in log.iterate_episodes():
        steps = len(episode.rewards)
        lengths.append(steps)
        assert episode.observations.shape == (steps + 1, 3, 3, 2)
        assert episode.observations.dtype == np.uint8
        assert (episode.observations.sum((1, 2, 3)) == 1).all()
        assert not (episode.terminations | episode.truncations)[:-1].any()
        assert episode.terminations[-1] == (steps == 5) != episode.truncations[-1]
    assert lengths == [5] * 40 + [3]  # the last is cut where the log ends
    propensities = np.concatenate([episode.infos["propensity"] for episode in log.iterate_episodes()])
    if policy == "expert":
        assert {*propensities.round(6)} == {0.1, 0.8}
    else:
        assert propensities[0] == pytest.approx(1 / 3)


def test_the_same_recipe_gives_the_same_data_and_another_is_an_error(minari_root, signals, capsys):
    logs = [make(f"test/signals/again{number}-v0", seed=number // 2) for number in range(3)]
    hashes = [log.storage.metadata["content_hash"] for log in logs]
    assert hashes[0] == hashes[1] != hashes[2]
    make("test/signals/again0-v0")
    assert "is there" in capsys.readouterr().out
    with pytest.raises(minatar.UserError, match="by another recipe"):
        make("test/signals/again0-v0", steps=204)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epsilon=2"], "epsilon: "),
        (["--gane=x"], "did you mean game"),
        pytest.param(["--game=pong"], "game: 'pong' is not asterix or breakout", marks=needs_package),
    ],
)
def test_what_is_wrong_is_said(minari_root, arguments, said):
    with pytest.raises(minatar.UserError, match=said):
        minatar.make_log(minatar.parse_config(arguments))


def test_errors_are_one_line(minari_root, run_script):
    done = run_script("collect/minatar.py", "--policy=best")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "minatar.py: policy: 'best' is not mixed or expert\n"


def test_without_the_package_the_error_names_the_command(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(minatar, "distribution", missing)
    minatar.read_game.cache_clear()
    with pytest.raises(minatar.UserError, match="make discrete"):
        minatar.read_game("breakout")
    minatar.read_game.cache_clear()


@needs_package
def test_a_script_learns_from_a_log_and_plays_in_its_game(minari_root, tmp_path, monkeypatch, capsys):
    name = "reef/minatar/breakout/mixed-v0"
    minatar.make_log(minatar.Config(dataset=name, steps=300, random_steps=100, reference_episodes=3))
    monkeypatch.delitem(sys.modules, "reef_minatar")  # as in a process that has not made the data
    script = load_script("discrete/bc.py")
    fields = {"updates": 4, "eval_every": 4, "log_every": 4, "final_eval_episodes": 10}
    script.train(script.parse_config(short(name, tmp_path, **fields)))
    assert "evaluated in reef/Breakout-v0" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / f"discrete/bc/{name}/default/seed-0/evaluations.csv")
    assert table["length"].max() > 5
