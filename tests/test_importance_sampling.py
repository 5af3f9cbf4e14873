"""algorithms/evaluate/importance_sampling.py: every estimator against sums written from the equations, its
coverage of an exact value on sepsis, the log as it is read, and the command line."""

import importlib.util
import math

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
import torch
from choices import Grid, make_images
from conftest import ROOT, load_script, short
from logs import course, gated, ragged, store

script = load_script("evaluate/importance_sampling.py")
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("icu_sepsis") is None, reason="the package icu-sepsis is missing: make discrete"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is None)")  # Minari's advice


def values(log_ratios, rewards, discount: float) -> dict[str, float]:
    """{estimator: value}, each episode taken once."""
    found = script.estimators(np.array(log_ratios), np.array(rewards, float), discount)
    once = np.ones((1, len(rewards)))
    return {name: script.combine(*pair, once)[0] for name, pair in found.items()}


# --------------------------------------------- the estimators ---------------------------------------------


@pytest.mark.equation(1, 2, 3)
def test_one_episode_by_hand():
    """Ratios 2 and .5, rewards 1 and 1, discount .9: IS 2 * .5 * 1.9; PDIS 2 * 1 + .9 * 1 * 1."""
    found = values(np.log([[2, 0.5]]), [[1, 1]], 0.9)
    assert found["IS"] == pytest.approx(1.9)
    assert found["PDIS"] == pytest.approx(2.9)
    assert found["WIS"] == found["WPDIS"] == pytest.approx(1.9)  # one episode: its return, unweighted


@pytest.mark.equation(2, 4)
def test_two_episodes_by_hand():
    """Weights 1 and 3, returns 0 and 4: IS mean(0, 12), WIS 12 / 4."""
    found = values(np.log([[1], [3]]), [[0], [4]], 0.9)
    assert (found["IS"], found["WIS"]) == pytest.approx((6, 3))


@pytest.mark.equation(1, 2, 3, 4, 5)
def test_ragged_episodes_against_loops():
    log, discount = ragged(), 0.8
    plain, decision, weighted, total = 0.0, 0.0, 0.0, 0.0
    numerators, denominators = np.zeros(4), np.zeros(4)
    for i, length in enumerate(log["lengths"]):
        weight, gain = 1.0, 0.0
        for t in range(4):
            if t < length:
                weight *= np.exp(log["log_ratios"][i, t])
                gain += discount**t * log["rewards"][i, t]
                decision += discount**t * weight * log["rewards"][i, t] / 5
                numerators[t] += discount**t * weight * log["rewards"][i, t]
            denominators[t] += weight  # an ended episode keeps its last weight
        plain += weight * gain / 5
        weighted += weight * gain
        total += weight
    found = values(log["log_ratios"], log["rewards"], discount)
    assert found["IS"] == pytest.approx(plain)
    assert found["PDIS"] == pytest.approx(decision)
    assert found["WIS"] == pytest.approx(weighted / total)
    assert found["WPDIS"] == pytest.approx((numerators / denominators).sum())


def test_the_logger_itself_is_worth_its_mean_return():
    log = ragged()
    found = values(np.zeros((5, 4)), log["rewards"], 1.0)
    assert [*found.values()] == pytest.approx([log["rewards"].sum(1).mean()] * 4)


@pytest.mark.equation(6)
def test_effective_sample_size():
    assert script.effective_size(np.array([1.0, 3.0])) == pytest.approx(16 / 10)
    assert script.effective_size(np.full(7, 0.3)) == pytest.approx(7)
    assert script.effective_size(np.array([0.0, 5.0, 0.0])) == pytest.approx(1)
    assert script.effective_size(np.zeros(3)) == 0


@pytest.mark.equation(7)
def test_the_interval_is_that_of_resampled_episodes():
    """Of a mean it is near mean +- 1.96 s / sqrt(N); a weighted one against resamples drawn anew."""
    rng, ones = np.random.default_rng(0), np.ones((400, 1))
    terms = rng.exponential(size=(400, 1))
    value, low, high = script.bootstrap(terms, ones, 4000, 0)
    assert value == pytest.approx(terms.mean())
    error = 1.96 * terms.std() / 20
    assert (value - low, high - value) == pytest.approx((error, error), rel=0.12)
    weights = rng.exponential(size=(400, 1)) ** 2
    _, low, high = script.bootstrap(weights * terms, weights, 4000, 0)
    rows = np.random.default_rng(1).integers(400, size=(4000, 400))
    anew = (weights * terms)[rows, 0].sum(1) / weights[rows, 0].sum(1)
    wanted = np.quantile(anew, [0.025, 0.975])
    assert (low, high) == pytest.approx(wanted, abs=0.1 * (high - low))


def test_actions_that_the_policy_never_takes_make_the_value_unknown():
    log_ratios = np.array([[-math.inf], [-math.inf]])
    found = values(log_ratios, [[1], [2]], 1.0)
    assert found["IS"] == found["PDIS"] == 0
    assert math.isnan(found["WIS"])
    assert all(map(math.isnan, script.bootstrap(np.zeros((2, 1)), np.zeros((2, 1)), 10, 0)))


def test_likelihoods_of_choices_and_of_vectors():
    given = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8]])
    mask = np.array([[True, True], [True, False]])
    log = {"mask": mask, "actions": np.array([[2, 1], [0, 0]])}
    found = script.log_likelihoods(given, log, 0.1)
    assert found == pytest.approx(np.array([[math.log(0.5), -math.inf], [math.log(0.1), 0]]))
    means = np.array([[0.0, 0.5], [0.1, 0.2], [-0.3, 0.4]])
    log = {"mask": mask, "actions": np.array([[[0.1, 0.4], [0.1, 0.2]], [[0.0, 0.0], [9, 9]]])}
    found = script.log_likelihoods(means, log, 0.2)
    density = np.exp(-0.5 * (0.1 / 0.2) ** 2) / (0.2 * np.sqrt(2 * np.pi))
    assert found[0, 0] == pytest.approx(2 * math.log(density))
    assert found[0, 1] == pytest.approx(-2 * math.log(0.2 * np.sqrt(2 * np.pi)))
    assert found[1, 1] == 0


# ---------------------------------------- against the exact truth ----------------------------------------


@needs_package
def test_intervals_cover_the_exact_value_of_the_clinicians():
    """20 logs of 200 episodes: of 95 % intervals fewer than 16 cover with a chance of .0003."""
    sepsis = load_script("collect/sepsis.py")
    policy = sepsis.policy_table("clinician")
    truth, covered = sepsis.value(policy), 0
    for seed in range(20):
        log = sepsis.simulate(policy, 200, np.random.default_rng((1, seed)))
        terms, weights = script.estimators(np.zeros(log["rewards"].shape), log["rewards"], 1.0)["WIS"]
        _, low, high = script.bootstrap(terms, weights, 400, seed)
        covered += low <= truth <= high
    assert covered >= 16


@needs_package
def test_weighting_estimates_another_policy_and_the_mean_weight_tells_where_it_cannot():
    """Uniform doses show all others (mean weight near 1); the clinicians never show most uniform ones."""
    sepsis = load_script("collect/sepsis.py")
    doctors, uniform = (sepsis.policy_table(name) for name in ("clinician", "random"))
    target = 0.9 * uniform + 0.1 * doctors
    log = sepsis.simulate(uniform, 4000, np.random.default_rng(0))
    found, means = {}, {}
    for name, data, policy in (("shown", log, target), ("hidden", None, uniform)):
        data = data or sepsis.simulate(doctors, 2000, np.random.default_rng(1))
        mask = np.arange(data["actions"].shape[1]) < data["lengths"][:, None]
        ratios = np.where(mask, policy[data["states"][:, :-1], data["actions"]] / data["propensities"], 1)
        means[name] = np.exp(np.log(ratios).sum(1)).mean()
        terms, weights = script.estimators(np.log(ratios), data["rewards"], 1.0)["WIS"]
        found[name] = script.bootstrap(terms, weights, 400, 0)
    _, low, high = found["shown"]
    assert means["shown"] == pytest.approx(1, abs=0.1)
    assert low - 0.01 <= sepsis.value(target) <= high + 0.01
    assert means["hidden"] < 0.5


# ---------------------------------------------- logs as read ----------------------------------------------


def two_courses(**infos) -> list:
    first = course([0, 1, 3], [2, 0], [1, 2], **{name: value[:2] for name, value in infos.items()})
    rest = {name: value[2:] for name, value in infos.items()}
    return [first, course([1, 2], [1], [-1], ended=False, **rest)]


def test_a_log_is_read_side_by_side(minari_root):
    dataset = store("test/logs/two-v0", two_courses(propensity=[0.5, 0.25, 0.1]))
    log = script.side_by_side(dataset)
    assert log["observations"].tolist() == [[0, 1, 3], [1, 2, 0]]
    assert log["actions"].tolist() == [[2, 0], [1, 0]]
    assert log["rewards"].tolist() == [[1, 2], [-1, 0]]
    assert log["terminations"].tolist() == [[0, 1], [0, 0]]
    assert log["mask"].tolist() == [[True, True], [True, False]]
    assert log["propensities"].tolist() == [[0.5, 0.25], [0.1, 0]]
    found, source = script.log_propensities(dataset, log, 0, 0)
    assert source == "log"
    assert found == pytest.approx(np.array([[math.log(0.5), math.log(0.25)], [math.log(0.1), 0]]))


def test_of_minigrids_dicts_the_image_is_read(minari_root):
    dataset = minari.load_dataset(make_images(Grid, "test/logs/grids-v0"))
    log = script.side_by_side(dataset)
    assert log["observations"].dtype == np.uint8
    assert log["observations"][:, :, 3, 3, 0].tolist() == [[0, 1, 2, 3, 4]] * 8
    found, source = script.log_propensities(dataset, log, 2, 0)
    assert (found.shape, source) == ((8, 4), "cloned")


def test_without_propensities_the_logger_is_cloned(minari_root):
    """In state 0 it takes choices with .7, .2, .1; in state 1 always the last."""
    rng = np.random.default_rng(0)
    episodes = [course([0, 1, 2], [rng.choice(3, p=[0.7, 0.2, 0.1]), 2], [0, 1]) for _ in range(600)]
    dataset = store("test/logs/cloned-v0", episodes)
    log = script.side_by_side(dataset)
    assert "propensities" not in log
    found, source = script.log_propensities(dataset, log, 400, 0)
    assert source == "cloned"
    for choice, chance in enumerate((0.7, 0.2, 0.1)):
        rows = log["actions"][:, 0] == choice
        assert np.exp(found[rows, 0]) == pytest.approx(chance, abs=0.06)
    assert np.exp(found[:, 1]) == pytest.approx(1, abs=0.05)


def test_vectors_of_actions_are_scaled_and_their_logger_is_a_gaussian(minari_root):
    rng, box = np.random.default_rng(0), gym.spaces.Box(np.array([0.0, -4]), np.array([10.0, 4]), dtype=float)
    episodes, see = [], gym.spaces.Box(-9, 9, (1,), np.float64)
    for _ in range(300):
        states, noise = rng.normal(size=(3, 1)), rng.normal(size=(2, 2))
        actions = np.array([5.0, 0]) + (0.5 * np.tanh(states[:-1]) + 0.1 * noise) * np.array([5.0, 4])
        episodes.append(course(states, actions, [0, 1]))
    dataset = store("test/logs/vectors-v0", episodes, see, box)
    log = script.side_by_side(dataset)
    assert log["actions"][0] == pytest.approx((episodes[0].actions - [5, 0]) / [5, 4], abs=1e-6)
    clone = script.clone_behavior(dataset, log, 3500, 0)
    assert clone.log_std.exp().tolist() == pytest.approx([0.1, 0.1], abs=0.03)
    with torch.no_grad():
        means = clone(torch.tensor([[0.0], [1.0]]))
    assert means.numpy() == pytest.approx(np.array([[0, 0], [0.38, 0.38]]), abs=0.05)


# -------------------------------------------- choices forbidden ---------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_by_the_masks_the_logger_is_uniform(minari_root, tmp_path, known):
    """Two of three courses earn 1 + .9 * 2, the others on average 1 + .9 * 2 / 3: 2.4. Without masks uniform
    choices would take choice 2 at the second step one time of three always: 1.6."""
    name = f"test/logs/gated-{known}-v0"
    store(name, gated(10, known))
    fields = {"dataset": name, "discount": 0.9, "resamples": 50, "clone_updates": 300}
    script.weigh_episodes(script.Config(output_dir=str(tmp_path), **fields))
    (file,) = tmp_path.rglob("values.csv")
    table = pd.read_csv(file)
    assert {*table["propensities"]} == {"log" if known else "cloned"}
    tolerance = 1e-6 if known else 0.1
    assert table["value"].to_numpy() == pytest.approx(2.4, abs=tolerance)
    assert table["mean_weight"].to_numpy() == pytest.approx(1, abs=tolerance)


def test_masks_are_read_and_an_end_leaves_all(minari_root):
    dataset = store("test/logs/gated-read-v0", gated(1))
    log = script.side_by_side(dataset)
    assert log["allowed"].shape == (9, 3, 3)
    assert log["allowed"][:, [0, 2]].all()
    assert log["allowed"][:, 1].tolist() == [[first == 1, first == 1, True] for first in log["actions"][:, 0]]
    before, after = script.around_steps(log, "allowed")
    assert before.tolist() == log["allowed"][:, :-1].reshape(18, 3).tolist()
    assert after.tolist() == log["allowed"][:, 1:].reshape(18, 3).tolist()
    assert script.around_steps(log, "propensity") == (None, None)


def test_the_clone_learns_among_the_allowed_and_never_leaves_them(minari_root):
    """At the second state choice 2 was taken 7 times of 9, but where there was a choice one time of three."""
    dataset = store("test/logs/gated-clone-v0", gated(10, known=False))
    clone = script.clone_behavior(dataset, script.side_by_side(dataset), 300, 0)
    with torch.no_grad():
        given = clone(torch.tensor([1, 1, 1]), np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0]])).numpy()
        sure = clone.log_likelihood(torch.tensor([1]), torch.tensor([2]), np.array([[0, 0, 1]]))
    assert given == pytest.approx(np.array([[1 / 3] * 3, [0.5, 0, 0.5], [0, 1, 0]]), abs=0.06)
    assert (given[1, 1], given[2, 1], float(sure)) == (0, 1, 0)


def test_a_run_is_asked_as_its_script_answers_with_the_mask(minari_root, tmp_path):
    dataset, bc = store("test/logs/gated-run-v0", gated(2)), load_script("discrete/bc.py")
    bc.train(bc.parse_config(short(dataset.id, tmp_path, updates=4)))
    folder = tmp_path / f"discrete/bc/{dataset.id}/default/seed-0"
    ((name, policy),) = script.gather_policies(str(folder), 3).items()
    log = script.side_by_side(dataset)
    seen, allowed = script.around_steps(log, "observations")[0], script.around_steps(log, "allowed")[0]
    found = script.ask(policy, name, seen, dataset, log, allowed)
    assert found == pytest.approx(bc.load(str(folder)).probabilities(seen, allowed))
    assert (found[~allowed] == 0).all()
    assert (script.ask(policy, name, seen, dataset, log)[~allowed] > 0).all()


@pytest.mark.parametrize("field", ["action_names", "observation_columns"])
def test_a_run_that_calls_choices_or_columns_otherwise_is_refused(minari_root, tmp_path, field):
    """Two imports number their words each by itself: 1 is right in the one and up in the other."""
    learned, bc = store("test/logs/march-v0", gated(2)), load_script("discrete/bc.py")
    dataset = store("test/logs/april-v0", gated(2))
    bc.train(bc.parse_config(short(learned.id, tmp_path, updates=2)))
    folder = str(tmp_path / f"discrete/bc/{learned.id}/default/seed-0")
    log, policy = script.side_by_side(dataset), script.load_policy(folder, 3)
    seen, allowed = script.around_steps(log, "observations")[0], script.around_steps(log, "allowed")[0]
    for each, words in ((learned, ["left", "right", "wait"]), (dataset, ["right", "up", "wait"])):
        script.ask(policy, folder, seen, dataset, log, allowed)  # as long as not both have names
        each.storage.update_metadata({field: words})
    with pytest.raises(script.UserError, match=rf"{field} are \['left', .* where it learned, \['right'"):
        script.ask(policy, folder, seen, dataset, log, allowed)
    minari.delete_dataset(learned.id)
    script.ask(policy, folder, seen, dataset, log, allowed)  # what it learned from is not here any more
    minari.delete_dataset(dataset.id)


def test_a_policy_with_a_memory_is_refused(minari_root, tmp_path):
    """It would be asked about steps without those before them."""
    dataset, dt = store("test/logs/gated-memory-v0", gated(2)), load_script("discrete/dt.py")
    dt.train(dt.parse_config(short(dataset.id, tmp_path, updates=2)))
    with pytest.raises(script.UserError, match="acts by what it remembers of an episode"):
        script.gather_policies(str(tmp_path / f"discrete/dt/{dataset.id}/default/seed-0"), 3)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (lambda seen, allowed: np.full((len(seen), 3), 1 / 3), "choices that the log's action_mask forbids"),
        (lambda seen: np.full((len(seen), 3), 1 / 3), "unexpected keyword argument 'allowed'"),
    ],
)
def test_a_policy_that_does_not_heed_the_masks_is_refused(minari_root, policy, said):
    dataset = store("test/logs/gated-heedless-v0", gated(1))
    log = script.side_by_side(dataset)
    seen, allowed = script.around_steps(log, "observations")[0], script.around_steps(log, "allowed")[0]
    with pytest.raises(script.UserError, match=f"p does not fit {dataset.id}: .*{said}"):
        script.ask(policy, "p", seen, dataset, log, allowed)
    minari.delete_dataset(dataset.id)


@pytest.mark.parametrize(
    ("number", "masks", "said"),
    [
        (1, {}, "test/logs/gated-1-v0: infos have an action_mask in some episodes only"),
        (2, {"action_mask": [[1, 0, 1], [1] * 3, [1] * 3]}, "episode 1: action_mask forbids what was chosen"),
        (3, {"action_mask": [[1, 1], [1, 1], [1, 1]]}, "episode 1: action_mask of shape"),
    ],
)
def test_a_mask_at_fault_is_named(minari_root, number, masks, said):
    episodes = [gated(1)[3], course([0, 1, 3], [1, 0], [1, 0], **masks)]
    dataset = store(f"test/logs/gated-{number}-v0", episodes)
    with pytest.raises(script.UserError, match=said):
        script.side_by_side(dataset)


@pytest.mark.parametrize("propensity", [[0.5, 0.0], [0.5, 1.5], [0.5, math.nan], [0.5, 0.5, 0.5]])
def test_propensities_at_fault_are_named(minari_root, propensity):
    """One of 0 would give its episode a weight without end; of nan there is no weight at all."""
    name = f"test/logs/unlikely-{len(propensity)}-{propensity[1] * 10:.0f}-v0"
    dataset = store(name, [course([0, 1, 3], [1, 0], [1, 0], propensity=propensity)])
    with pytest.raises(script.UserError, match="episode 0: propensities of its 2 steps are not all in"):
        script.side_by_side(dataset)


# --------------------------------------------- the command line ---------------------------------------------


def run(run_script, folder, *arguments):
    return run_script("evaluate/importance_sampling.py", f"--output_dir={folder}", *arguments)


def test_the_table(minari_root, run_script, tmp_path):
    store("test/logs/table-v0", two_courses(propensity=[1 / 3] * 3) * 10)
    done = run(run_script, tmp_path, "--dataset=test/logs/table-v0", "--resamples=50")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "evaluate/importance_sampling/test/logs/table-v0/default/seed-0"
    table = pd.read_csv(folder / "values.csv")
    assert table["policy"].tolist() == ["behavior"] * 4 + ["uniform"] * 4
    assert table["value"].to_numpy() == pytest.approx(1.0)  # mean of 3 and -1: uniform is the logger here
    assert table["ess"].to_numpy() == pytest.approx(20)
    assert table["mean_weight"].to_numpy() == pytest.approx(1)
    assert {*table["propensities"]} == {"log"}
    assert (table["low"] < table["value"]).all()
    assert (table["value"] < table["high"]).all()
    assert (folder / "config.yaml").exists()


@pytest.mark.equation(1)
def test_what_the_policy_would_rather_do_counts_for_more(minari_root, tmp_path):
    """Ratios (1/3) / .5 and (1/3) / .25, rewards 1 and 0; upside down they would be 1.5 and .75."""
    episodes = [course([0, 3], [0], [1], propensity=[0.5]), course([0, 3], [1], [0], propensity=[0.25])]
    store("test/logs/unlike-v0", episodes)
    fields = {"dataset": "test/logs/unlike-v0", "policies": "uniform", "resamples": 10}
    script.weigh_episodes(script.Config(output_dir=str(tmp_path), **fields))
    (file,) = tmp_path.rglob("values.csv")
    table = pd.read_csv(file)
    assert table["mean_weight"].to_numpy() == pytest.approx(1)
    assert table["value"].to_numpy() == pytest.approx(1 / 3)  # the mean weight is 1: weighted or not


def test_ranks():
    names = {"policy": list("abab"), "estimator": ["IS", "IS", "WIS", "WIS"]}
    table = pd.DataFrame(names | {"value": [1, 2, 4, 3]})
    assert script.rank(table)["rank"].tolist() == [2, 1, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policies=nowhere"], "policies: nowhere is no folder of a run"),
        (["--dataset=reef/sepsis/nowhere-v0"], "make dataset ID=reef/sepsis/nowhere-v0"),
        (["--resamples=0"], "resamples: "),
        (["--polices=uniform"], "did you mean policies?"),
    ],
)
def test_errors_are_one_line(minari_root, run_script, tmp_path, arguments, said):
    if not (minari_root / "test/logs/errors-v0").exists():
        store("test/logs/errors-v0", two_courses())
    done = run(run_script, tmp_path, "--dataset=test/logs/errors-v0", *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not [*tmp_path.iterdir()]


def test_the_numbers_that_are_not_finite_are_named(minari_root):
    dataset = store("test/logs/bad-v0", [course([0, 1], [0], [math.nan])])
    with pytest.raises(script.UserError, match="episode 0: rewards are not all finite"):
        script.side_by_side(dataset)


def test_the_docstring_names_the_script():
    assert "algorithms/evaluate/importance_sampling.py" in script.__doc__
    assert (ROOT / "algorithms/evaluate/importance_sampling.py").exists()
