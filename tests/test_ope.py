"""tools/ope.py: its values against the exact process, a small share of the study of coverage, and the other
parts by hand."""

import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from scipy.stats import norm

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("icu_sepsis") is None, reason="the package icu-sepsis is missing: make discrete"
)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("reef_ope", ROOT / "tools/ope.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(tool, monkeypatch, *words) -> int:
    """The exit status of a command line."""
    monkeypatch.setattr(sys, "argv", ["ope.py", *map(str, words)])
    return tool.main()


@needs_package
def test_values_in_the_true_model_are_the_exact_ones(tool):
    process = tool.sepsis.read_dynamics()["transitions"][:713].astype(np.float32)
    model = process[..., :713], process[..., 714]
    for name in ("clinician", "random"):
        policy = tool.sepsis.policy_table(name)
        wanted = tool.sepsis.action_values(policy)
        assert tool.model_values(model, policy)[:713] == pytest.approx(wanted, abs=1e-4)
    assert tool.sepsis.value(tool.learn(model)) > 0.87


def test_the_summary_by_hand(tool):
    rows = [{"policy": "a", "estimator": "IS", "truth": 1.0, "ess": 5.0, "mean_weight": 1.0}] * 4
    values = [(1.0, 0.5, 1.5), (3.0, 2.0, 4.0), (0.0, -1.0, 1.0), (np.nan, np.nan, np.nan)]
    names = ("value", "low", "high")
    found = [row | dict(zip(names, entry)) for row, entry in zip(rows, values)]
    (line,) = tool.summarize(pd.DataFrame(found)).to_dict("records")
    assert (line["logs"], line["coverage"], line["truth"]) == (4, 0.5, 1.0)
    assert line["bias"] == pytest.approx(1 / 3)
    assert line["rmse"] == pytest.approx((5 / 3) ** 0.5)


@needs_package
def test_a_small_share_of_the_study(tool, monkeypatch, tmp_path):
    small = ["--logs=4", "--episodes=200", "--resamples=50"]
    assert call(tool, monkeypatch, "coverage", *small, "--out", tmp_path) == 0
    table = pd.read_csv(tmp_path / "coverage.csv").set_index(["policy", "estimator"])
    assert len(table) == 4 * 7
    clinicians = table.loc["clinician"]
    assert clinicians.loc["IS", "coverage"] >= 0.5
    assert clinicians["mean_weight"].to_numpy() == pytest.approx(1)
    assert clinicians.loc[["IS", "WIS", "DR", "WDR"], "bias"].abs().max() < 0.15
    assert table.loc[("optimum", "IS"), "mean_weight"] < 0.9  # it fails, and this says so beforehand
    assert table.loc[("optimum", "IS"), "ess"] < 50
    assert table.loc[("optimum", "IS"), "bias"] < -0.1


# ------------------------------------------ rankings and learners ------------------------------------------


def test_rankings_by_hand(tool):
    """The first estimator orders three policies as they are; the second takes the worst for the best, and of
    one policy it knows nothing: that ranks last."""
    truths, rows = {"a": 1.0, "b": 3.0, "c": 2.0}, []
    given = {"good": {"a": 10.0, "b": 30.0, "c": 20.0}, "bad": {"a": 5.0, "b": np.nan, "c": 1.0}}
    for estimator, values in given.items():
        rows += [
            {"log": 0, "policy": name, "truth": truths[name], "estimator": estimator, "value": value}
            for name, value in values.items()
        ]
    table = tool.judge(pd.DataFrame(rows)).set_index("estimator")
    assert table.loc["good"].to_list() == pytest.approx([1, 0, 1, 0, 1])
    assert table.loc["bad"].to_list() == pytest.approx([-1, 2, 0, 1 / 3, 1])


@needs_package
def test_no_dose_is_worse_than_the_worst_policys(tool):
    worst = tool.find_worst()
    values = tool.sepsis.state_values(worst)
    assert tool.sepsis.action_values(worst).min(1) == pytest.approx(values, abs=1e-6)
    assert tool.sepsis.value(worst) < tool.sepsis.value(tool.sepsis.policy_table("random")) - 0.05


def fake_run(runs, name: str, status: str, q_mean: list):
    folder = runs / f"discrete/{name}/reef/sepsis/mixed-v0/default/seed-3"
    folder.mkdir(parents=True)
    config = {"dataset": "reef/sepsis/mixed-v0", "variant": "default", "seed": 3, "updates": 20}
    record = {"status": status, "config": config, "commit": "c0ffee", "return_mean": 0.5}
    (folder / "run.json").write_text(json.dumps(record))
    pd.DataFrame({"update": [10, 20], "critic/q_mean": q_mean}).to_csv(folder / "metrics.csv", index=False)


@needs_package
def test_learners_have_their_exact_value(tool, monkeypatch, tmp_path):
    fake_run(tmp_path, "dqn", "finished", [5.0, 2.0])
    fake_run(tmp_path, "cql", "running", [0.5, 0.6])
    fake_run(tmp_path, "dt", "finished", [0.0, 0.0])
    optimum = tool.sepsis.policy_table("optimum")
    monkeypatch.setattr(tool.robust, "load_policy", lambda folder, choices: lambda states: optimum[states])
    words = ["--runs", tmp_path, "--out", tmp_path, "--picture", tmp_path / "picture.png"]
    assert call(tool, monkeypatch, "learners", *words) == 0
    row, remembers = pd.read_csv(tmp_path / "learners.csv").to_dict("records")
    assert (row["exact"], remembers["exact"]) == (True, False)
    assert (remembers["algorithm"], remembers["value"]) == ("dt", 0.5)
    assert (row["algorithm"], row["seed"], row["updates"], row["largest_q_mean"]) == ("dqn", 3, 20, 5.0)
    assert (row["value"], row["clinicians"], row["score"]) == pytest.approx((0.8751, 0.7818, 100), abs=1e-4)
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_without_runs_it_says_how_to_make_them(tool, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool.sepsis, "value", lambda policy: 0.0)
    monkeypatch.setattr(tool.sepsis, "policy_table", lambda name: None)
    assert call(tool, monkeypatch, "learners", "--runs", tmp_path, "--out", tmp_path / "out") == 2
    line = capsys.readouterr().err
    assert "benchmark.py" in line
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --------------------------------------------- clicks of a shop ---------------------------------------------


def shop(rows: list) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["item", "place", "click", "propensity"])


def test_click_rates_by_hand(tool):
    """Two items at one place. BTS showed item 0 three times of four; uniform chance is a half."""
    uniform = shop([(0, 1, 1, 0.5), (1, 1, 0, 0.5), (1, 1, 1, 0.5), (0, 1, 0, 0.5)])
    bts = shop([(0, 1, 1, 0.8), (0, 1, 0, 0.8), (0, 1, 1, 0.5), (1, 1, 1, 0.2)])
    table = tool.click_rates(uniform, bts, resamples=50).set_index(["policy", "estimator"])
    weights = [0.5 / 0.8, 0.5 / 0.8, 1, 0.5 / 0.2]
    clicked = weights[0] + weights[2] + weights[3]
    assert table.loc[("uniform", "IS"), "value"] == pytest.approx(clicked / 4)
    assert table.loc[("uniform", "WIS"), "value"] == pytest.approx(clicked / sum(weights))
    assert table.loc[("uniform", "IS"), "mean_weight"] == pytest.approx(sum(weights) / 4)
    assert table.loc[("bts", "IS"), "value"] == pytest.approx((0.75 / 0.5 + 0.25 / 0.5) / 4)
    assert table.loc[("uniform", "IS"), "own_rate"] == pytest.approx(2 / 4)  # of its own log
    assert table.loc[("bts", "IS"), "own_rate"] == pytest.approx(3 / 4)


def test_the_mean_policy_of_bts_is_counted_place_by_place(tool):
    """At place 2 it showed item 1 alone: there item 0 counts for nothing, and item 1 for twice."""
    uniform = shop([(0, 1, 1, 0.5), (1, 1, 1, 0.5), (0, 2, 1, 0.5), (1, 2, 0, 0.5)])
    bts = shop([(0, 1, 0, 0.5), (1, 1, 0, 0.5), (1, 2, 0, 0.9), (1, 2, 0, 0.9)])
    table = tool.click_rates(uniform, bts, resamples=50).set_index(["policy", "estimator"])
    assert table.loc[("bts", "IS"), "value"] == pytest.approx((1 + 1 + 0 + 0) / 4)


def test_a_log_of_clicks_is_read(tool, tmp_path):
    """Columns as in the package, among others that are of no use here."""
    text = ",timestamp,item_id,position,click,propensity_score,user_feature_0\n0,2019,7,3,1,0.25,x\n"
    (tmp_path / "men.csv").write_text(text)
    (row,) = tool.read_clicks(tmp_path / "men.csv").to_dict("records")
    assert row == {"item": 7, "place": 3, "click": 1, "propensity": 0.25}


def test_without_the_package_the_error_names_it(tool, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    assert call(tool, monkeypatch, "clicks", "--out", tmp_path / "out") == 2
    assert "package obp" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------ locomotion ------------------------------------------------


def actor_of(tool, seed: int):
    torch.manual_seed(seed)
    return tool.rollouts.TanhGaussianActor(2, 1, 4, 1).double()


def test_ratios_of_densities_are_those_of_tanh_gaussians(tool):
    """The chance of a small interval around an action, by the normal distribution, in either policy."""
    seen, actions = np.array([[0.3, -1.0], [2.0, 0.5]]), np.array([[0.4], [-0.8]])
    chances, found, width = [], [], 1e-4
    for seed in (1, 2):
        actor = actor_of(tool, seed)
        mean, log_std = (x.detach().numpy() for x in actor(torch.as_tensor(seen)))
        edges = [norm.cdf(np.arctanh(actions + side), mean, np.exp(log_std)) for side in (-width, width)]
        chances.append((edges[1] - edges[0])[:, 0])
        found.append(tool.log_densities(actor, seen, actions))
    assert found[0] - found[1] == pytest.approx(np.log(chances[0] / chances[1]), abs=1e-6)


def test_actions_are_drawn_in_the_environments_units(tool):
    actor, bounds = actor_of(tool, 1), np.array([[0.0], [10.0]])
    drawn = tool.sample_actions(actor, bounds, np.zeros((4000, 2)))
    mean, log_std = (float(x.detach()[0]) for x in actor(torch.zeros(2, dtype=torch.float64)))
    middle = 5 + 5 * math.tanh(mean)  # half of the draws lie beyond
    assert np.mean(drawn > middle) == pytest.approx(0.5, abs=0.03)
    upper = 5 + 5 * math.tanh(mean + math.exp(log_std))  # one deviation up
    assert np.mean(drawn > upper) == pytest.approx(norm.sf(1), abs=0.03)


def test_discounted_returns(tool):
    assert tool.discounted(np.array([1.0, 2.0, 4.0]), 0.5) == 3.0


def test_the_log_has_the_first_episodes_of_each_policy(tool):
    owners, chosen = tool.assign({"a": 3, "b": 2, "c": 4}, share=2)
    assert "".join(owners) == "aaabbcccc"
    assert chosen.tolist() == [True, True, False, True, True, True, True, False, False]


def test_the_table_of_locomotion(tool, monkeypatch):
    """Of the log's own policy every weight is 1; another's are products of densities, episode by episode."""
    rng, box = np.random.default_rng(0), gym.spaces.Box
    actors = {"own": actor_of(tool, 1), "other": actor_of(tool, 2)}
    log = {
        "observations": rng.normal(size=(6, 4, 2)).astype(np.float32),
        "actions": rng.uniform(-0.9, 0.9, size=(6, 3, 1)).astype(np.float32),
        "rewards": rng.normal(size=(6, 3)),
        "terminations": np.tile([0, 0, 1], (6, 1)).astype(np.float32),
        "mask": np.ones((6, 3), bool),
        "bounds": np.array([[-1.0], [1.0]]),
    }
    seen = log["observations"][:, :-1]
    log["log_b"] = tool.log_densities(actors["own"], seen, log["actions"])
    dataset = SimpleNamespace(id="toy", observation_space=box(-9, 9, (2,)), action_space=box(-1, 1, (1,)))
    truths = {"own": 1.0, "other": 2.0}
    monkeypatch.setattr(tool, "read_locomotion", lambda robot, discount: (dataset, log, actors, truths))
    monkeypatch.setattr(tool, "TARGETS", ["own", "other"])
    table = tool.study_locomotion("toy", updates=3).set_index(["policy", "estimator"])
    assert table.loc["own", "mean_weight"].to_list() == pytest.approx([1] * 3)
    assert table.loc[("own", "DR"), "value"] == pytest.approx(table.loc[("own", "WDR"), "value"])
    assert table.loc["other", "truth"].to_list() == [2.0] * 3
    densities = {name: tool.log_densities(actor, seen, log["actions"]) for name, actor in actors.items()}
    weights = np.exp((densities["other"] - densities["own"]).sum(1))
    kept = np.random.default_rng(0).permutation(6)[3:]  # the half that corrects the critic
    assert table.loc[("other", "DR"), "mean_weight"] == pytest.approx(weights[kept].mean())


# ------------------------------------------ the tables of the page ------------------------------------------


def test_the_page_has_the_recorded_numbers():
    """docs/values.md: bias, root mean squared error and coverage of each estimator, from results/ope."""
    page = (ROOT / "docs/values.md").read_text()
    table = pd.read_csv(ROOT / "results/ope/coverage.csv")
    assert set(table["logs"]) == {200}
    for policy, rows in table.groupby("policy"):
        rows = rows.set_index("estimator")
        first = rows.iloc[0]
        cells = [policy, f"{first['truth']:.3f}", f"{first['ess']:.0f}", f"{first['mean_weight']:.2f}"]
        for name in ("IS", "WIS", "WPDIS", "FQE", "DR", "WDR"):
            bias, rmse, coverage = rows.loc[name, ["bias", "rmse", "coverage"]]
            cells.append(f"{bias:+.3f}, {rmse:.3f}, {100 * coverage:.0f} %")
        assert f"| {' | '.join(cells)} |" in page, policy
        assert rows.loc["IS"].equals(rows.loc["PDIS"])  # as the page says: the only reward is the last


def test_the_page_has_the_recorded_rankings():
    page = (ROOT / "docs/values.md").read_text()
    for row in pd.read_csv(ROOT / "results/ope/rankings.csv").to_dict("records"):
        cells = f"{row['rank_correlation']:.2f} | {row['regret_at_1']:.3f} | {100 * row['best_first']:.0f} %"
        assert f"| {row['estimator']} | {cells} |" in page, row


def test_the_page_has_the_recorded_clicks():
    page = (ROOT / "docs/values.md").read_text()
    for row in pd.read_csv(ROOT / "results/ope/clicks.csv").query("estimator == 'WIS'").to_dict("records"):
        found = f"{1000 * row['value']:.1f} ({1000 * row['low']:.1f} to {1000 * row['high']:.1f})"
        own = f"{1000 * row['own_rate']:.1f} ({1000 * row['own_low']:.1f} to {1000 * row['own_high']:.1f})"
        facts = f"{row['ess']:,.0f} | {row['mean_weight']:.2f}"
        assert f"| {row['campaign']} | {row['policy']} | {found} | {own} | {facts} |" in page, row
