"""algorithms/evaluate/doubly_robust.py: the correction against loops, what it mends, and the command line."""

import importlib.util

import numpy as np
import pandas as pd
import pytest
from conftest import load_script
from logs import course, gated, ragged, store

script = load_script("evaluate/doubly_robust.py")
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("icu_sepsis") is None, reason="the package icu-sepsis is missing: make discrete"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is None)")  # Minari's advice


def values(log: dict, discount: float) -> dict[str, float]:
    """{estimator: value}, each episode taken once."""
    errors = script.temporal_errors(log, log["q"], log["next_v"], discount)
    found = script.corrected(log["log_ratios"], log["first"], errors, discount)
    return {name: script.combine(*pair, np.ones((1, len(errors))))[0] for name, pair in found.items()}


@pytest.mark.equation(1, 2, 3)
def test_one_step_by_hand():
    """r 1, V(s_0) .5, Q .4, ratio 2, the end: .5 + 2 (1 - .4); whatever V is said to be after the end."""
    log = {"log_ratios": np.log([[2.0]]), "rewards": np.array([[1.0]]), "terminations": np.array([[1.0]])}
    log |= {"mask": np.array([[True]]), "first": np.array([0.5]), "q": np.array([[0.4]])}
    found = values(log | {"next_v": np.array([[7.0]])}, 0.9)
    assert found["DR"] == pytest.approx(1.7)
    assert found["FQE"] == pytest.approx(0.5)
    assert found["WDR"] == pytest.approx(0.5 + 0.6)


@pytest.mark.equation(1, 2, 3, 4)
def test_ragged_episodes_against_loops():
    """The third episode was cut by a time limit, and V of its last observation counts."""
    log, discount = ragged(), 0.8
    plain, numerators, denominators = 0.0, np.zeros(4), np.zeros(4)
    for i, length in enumerate(log["lengths"]):
        plain += log["first"][i] / 5
        weight = 1.0
        for t in range(4):
            if t < length:
                weight *= np.exp(log["log_ratios"][i, t])
                ended = t == length - 1 and i != 2
                ahead = 0.0 if ended else log["next_v"][i, t]
                delta = log["rewards"][i, t] + discount * ahead - log["q"][i, t]
                plain += discount**t * weight * delta / 5
                numerators[t] += discount**t * weight * delta
            denominators[t] += weight
    found = values(log, discount)
    assert found["DR"] == pytest.approx(plain)
    assert found["WDR"] == pytest.approx(log["first"].mean() + (numerators / denominators).sum())
    assert found["FQE"] == pytest.approx(log["first"].mean())


def test_without_a_critic_it_is_importance_sampling_per_decision():
    importance = load_script("evaluate/importance_sampling.py")
    log = ragged()
    log |= {"first": np.zeros(5), "q": np.zeros((5, 4)), "next_v": np.zeros((5, 4))}
    found = values(log, 0.8)
    others = importance.estimators(log["log_ratios"], log["rewards"], 0.8)
    assert found["DR"] == pytest.approx(importance.combine(*others["PDIS"], np.ones((1, 5)))[0])
    assert found["WDR"] == pytest.approx(importance.combine(*others["WPDIS"], np.ones((1, 5)))[0])


def test_an_exact_critic_leaves_nothing_to_correct():
    """A chain with rewards 1 and 2, discount .9: V is 2.8 in every episode, whatever the weights."""
    log = {"log_ratios": np.log([[2.0, 0.5], [0.3, 0.1]]), "rewards": np.array([[1.0, 2], [1, 2]])}
    log |= {"terminations": np.array([[0.0, 1], [0, 1]]), "mask": np.ones((2, 2), bool)}
    log |= {"first": np.full(2, 2.8), "q": np.array([[2.8, 2]] * 2), "next_v": np.array([[2.0, 0]] * 2)}
    assert [*values(log, 0.9).values()] == pytest.approx([2.8] * 3)


@pytest.mark.equation(6)
def test_effective_sample_size():
    assert script.effective_size(np.array([1.0, 3.0])) == pytest.approx(16 / 10)


@pytest.mark.equation(7)
def test_the_interval_is_that_of_resampled_episodes():
    rng, ones = np.random.default_rng(0), np.ones((400, 1))
    terms = rng.normal(size=(400, 1))
    value, low, high = script.bootstrap(terms, ones, 4000, 0)
    error = 1.96 * terms.std() / 20
    assert (value - low, high - value) == pytest.approx((error, error), rel=0.12)


@pytest.mark.equation(5)
def test_halves_share_no_episode_and_lose_none():
    log = {"rewards": np.arange(7)[:, None] * np.ones((7, 2)), "mask": np.ones((7, 2), bool)}
    log["bounds"] = np.array([[-1.0], [1]])
    first, second = script.halves(log, 3)
    assert sorted([*first["rewards"][:, 0], *second["rewards"][:, 0]]) == [*range(7)]
    assert (len(first["mask"]), len(second["mask"])) == (4, 3)
    assert first["bounds"].tolist() == second["bounds"].tolist() == [[-1], [1]]
    again, _ = script.halves(log, 3)
    other, _ = script.halves(log, 4)
    assert again["rewards"].tolist() == first["rewards"].tolist() != other["rewards"].tolist()


def one_steps(name: str) -> dict:
    """Fields of a short fit to twelve steps, of rewards 0 to 11, each taken with probability .5."""
    episodes = [course([0, 3], [i % 3], [i], propensity=[0.5]) for i in range(12)]
    fields = {"dataset": store(name, episodes).id, "policies": "uniform", "resamples": 10}
    return fields | {"hidden_dim": 4, "members": 2, "updates": 1}


@pytest.mark.equation(5)
def test_the_critic_is_fitted_to_the_half_that_it_does_not_correct(minari_root, tmp_path, monkeypatch):
    seen, fit, correct = {}, script.fit_critics, script.temporal_errors

    def fit_critics(config, dataset, log, *rest):
        seen["fitted"] = log["rewards"][:, 0]
        return fit(config, dataset, log, *rest)

    def temporal_errors(log, *rest):
        seen["corrected"] = log["rewards"][:, 0]
        return correct(log, *rest)

    monkeypatch.setattr(script, "fit_critics", fit_critics)
    monkeypatch.setattr(script, "temporal_errors", temporal_errors)
    fields = one_steps("test/logs/crossed-v0")
    script.correct_critics(script.Config(output_dir=str(tmp_path), **fields))
    assert (len(seen["fitted"]), len(seen["corrected"])) == (6, 6)
    assert sorted([*seen["fitted"], *seen["corrected"]]) == [*range(12)]


@pytest.mark.equation(1)
def test_what_the_policy_would_rather_do_counts_for_more(minari_root, tmp_path):
    """Ratios (1/3) / .5; upside down they would be 1.5."""
    fields = one_steps("test/logs/unlikely-v0")
    script.correct_critics(script.Config(output_dir=str(tmp_path), **fields))
    (file,) = tmp_path.rglob("values.csv")
    assert pd.read_csv(file)["mean_weight"].to_numpy() == pytest.approx(2 / 3)


def test_one_episode_has_no_halves():
    with pytest.raises(script.UserError, match="one episode"):
        script.halves({"rewards": np.ones((1, 2)), "mask": np.ones((1, 2), bool)}, 0)


@needs_package
def test_it_mends_a_wrong_critic():
    """Uniform doses show a policy; a critic says .5 of everything, and is corrected."""
    sepsis = load_script("collect/sepsis.py")
    uniform = sepsis.policy_table("random")
    target = 0.9 * uniform + 0.1 * sepsis.policy_table("optimum")
    data = sepsis.simulate(uniform, 4000, np.random.default_rng(0))
    mask = np.arange(data["actions"].shape[1]) < data["lengths"][:, None]
    ratios = np.where(mask, target[data["states"][:, :-1], data["actions"]] / data["propensities"], 1)
    ends = np.arange(mask.shape[1]) == data["lengths"][:, None] - 1
    log = {"log_ratios": np.log(ratios), "rewards": data["rewards"], "terminations": ends, "mask": mask}
    log |= {"first": np.full(4000, 0.5), "q": 0.5 * mask, "next_v": 0.5 * mask}
    errors = script.temporal_errors(log, log["q"], log["next_v"], 1.0)
    found = script.corrected(log["log_ratios"], log["first"], errors, 1.0)
    truth = sepsis.value(target)
    for name in ("DR", "WDR"):
        value, low, high = script.bootstrap(*found[name], 400, 0)
        assert low - 0.01 <= truth <= high + 0.01
        assert abs(value - truth) < 0.05 < abs(0.5 - truth)


def test_the_command_line(minari_root, run_script, tmp_path):
    """A chain that is worth 2.8: FQE, hardly fitted, is far from it, and both DRs are near."""
    chances = {"propensity": [1 / 3, 1 / 3]}
    courses = [course([0, 1, 3], [a, b], [1, 2], **chances) for a in range(3) for b in range(3)]
    store("test/logs/robust-v0", courses * 10)
    small = ["--hidden_dim=8", "--updates=20", "--members=2", "--resamples=50", "--clone_updates=20"]
    arguments = ["--dataset=test/logs/robust-v0", "--discount=0.9", *small, f"--output_dir={tmp_path}"]
    done = run_script("evaluate/doubly_robust.py", *arguments)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "evaluate/doubly_robust/test/logs/robust-v0/default/seed-0"
    table = pd.read_csv(folder / "values.csv").set_index(["policy", "estimator"])
    assert (table["episodes"] == 45).all()
    assert abs(table.loc[("uniform", "FQE"), "value"] - 2.8) > 1
    for estimator in ("DR", "WDR"):
        assert table.loc[("uniform", estimator), "value"] == pytest.approx(2.8, abs=0.25)
        # the logger's own: what its episodes earned, whatever critic and clone say
        assert table.loc[("behavior", estimator), "value"] == pytest.approx(2.8, abs=1e-5)
    assert {*table["propensities"]} == {"log"}


def test_masks_are_heeded_by_weights_and_values(minari_root, tmp_path):
    """As in importance sampling uniform choices are the logger's, worth 2.4, with weights of 1; without
    masks they would be worth 1.6."""
    store("test/logs/gated-robust-v0", gated(12))
    fields = {"hidden_dim": 8, "members": 2, "updates": 200, "critic_lr": 1e-2, "tau": 0.2, "resamples": 50}
    fields |= {"dataset": "test/logs/gated-robust-v0", "discount": 0.9, "clone_updates": 20}
    script.correct_critics(script.Config(output_dir=str(tmp_path), **fields))
    (file,) = tmp_path.rglob("values.csv")
    table = pd.read_csv(file).set_index(["policy", "estimator"]).loc["uniform"]
    assert table["mean_weight"].to_numpy() == pytest.approx(1)
    assert table["value"].to_numpy() == pytest.approx(2.4, abs=0.2)
