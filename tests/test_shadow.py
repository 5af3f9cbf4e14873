"""algorithms/evaluate/shadow.py: every bound by hand, both promises by counting all courses, the folder; and
tools/shadow_study.py, small and as recorded."""

import dataclasses
import importlib.util
import itertools
import math
import sys

import minari
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, load_script
from logs import course, gated, ragged, store

script = load_script("evaluate/shadow.py")
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("icu_sepsis") is None, reason="the package icu-sepsis is missing: make discrete"
)


def deployment(phase: str = "canary", **fields):
    """A deployment with no limits but those given; in its first share, unless it has to watch."""
    loose = {"min_episodes": 1, "min_ess": 0.0, "max_gap": 1.0, "stage_episodes": 1}
    made = script.Deployment(script.Config(**loose | fields))
    if phase == "canary":
        made.raise_share()
    return made


def watch(made, differences, weight: float = 1.0, gap: float = 0.0) -> dict:
    for difference in differences:
        row = made.watch(0.0, difference, weight, 0.5, gap)
    return row


# ------------------------------------------------- watching -------------------------------------------------


@pytest.mark.equation(1)
def test_one_step_by_hand():
    """r 1, V(s_0) .5, Q .4, ratio 2, the end: DR 1.7, of which the episode's own return 1 is taken."""
    log = {"log_ratios": np.log([[2.0]]), "rewards": np.array([[1.0]]), "terminations": np.array([[1.0]])}
    log["mask"] = np.array([[True]])
    q, v, next_v = np.array([[0.4]]), np.array([[0.5]]), np.array([[7.0]])
    difference, weight = script.robust_differences(log, q, v, next_v, 0.9)
    assert difference == pytest.approx([0.7])
    assert weight == pytest.approx([2.0])


@pytest.mark.equation(1)
def test_ragged_episodes_against_loops():
    log, discount = ragged(), 0.8
    v = np.column_stack([log["first"], np.full((5, 3), 9.0)])  # V of later states has no place in it
    difference, weights = script.robust_differences(log, log["q"], v, log["next_v"], discount)
    for i, length in enumerate(log["lengths"]):
        robust, weight, value = log["first"][i], 1.0, 0.0
        for t in range(length):
            weight *= np.exp(log["log_ratios"][i, t])
            ahead = 0.0 if log["terminations"][i, t] else log["next_v"][i, t]
            delta = log["rewards"][i, t] + discount * ahead - log["q"][i, t]
            robust += discount**t * weight * delta
            value += discount**t * log["rewards"][i, t]
        assert difference[i] == pytest.approx(robust - value)
        assert weights[i] == pytest.approx(weight)


def test_the_loggers_own_policy_differs_by_nothing_but_chance():
    """Weights of 1 and values that fit the episode: D is 0, whatever its return; so the gain has no noise."""
    log = ragged()
    log["log_ratios"][:] = 0
    returns = np.zeros((5, 5))
    for t in reversed(range(4)):
        returns[:, t] = log["rewards"][:, t] + 0.8 * returns[:, t + 1]
    log["terminations"][:, :] = np.arange(4) == log["lengths"][:, None] - 1
    difference, _ = script.robust_differences(log, returns[:, :4], returns[:, :4], returns[:, 1:], 0.8)
    assert difference == pytest.approx(np.zeros(5), abs=1e-6)


@pytest.mark.equation(2)
def test_the_width_by_hand():
    """n = n* = 100, a = .05: q = (5.99146 + ln 6.99146) / 100 = .0793616; n q + 1 = 8.93616; sqrt 2.98934;
    2 * 8.93616 / (100^2 * .0793616) = .0225201; ln(2.98934 / .05) = 4.09078; sqrt(.0921248) = .303521."""
    assert script.width(100, 0.05, 100) == pytest.approx(0.303521, abs=2e-6)


@pytest.mark.equation(2)
def test_the_bound_is_the_mean_less_so_many_deviations():
    row = watch(deployment("shadow", tight_at=3, margin=0.0), [1.0, 2.0, 6.0])
    assert row["gain"] == pytest.approx(3)
    assert row["lower"] == pytest.approx(3 - math.sqrt(14 / 3) * script.width(3, 0.05, 3))


def test_the_bound_holds_at_all_moments_where_an_interval_does_not():
    """2000 skewed courses of 2000 episodes: is the lower end ever above the truth, from the 100th on?"""
    rng = np.random.default_rng(0)
    draws, n = rng.exponential(size=(2000, 2000)) - 1, np.arange(1, 2001)
    means = draws.cumsum(1) / n
    deviations = np.sqrt((draws**2).cumsum(1) / n - means**2)
    widths = np.array([script.width(int(k), 0.05, 500) for k in n])
    sequence = (means > widths * deviations)[:, 99:].any(1).mean()
    repeated = (means > 1.645 / np.sqrt(n) * deviations)[:, 99:].any(1).mean()
    assert sequence < 0.05
    assert repeated > 0.15


@pytest.mark.equation(3)
def test_effective_sample_size():
    made = deployment("shadow", margin=0.0)
    watch(made, [-1.0], weight=1.0)
    assert watch(made, [-1.0], weight=3.0)["ess"] == pytest.approx(16 / 10)


SUPPORTED = {"min_episodes": 20, "min_ess": 20.0, "max_gap": 0.125, "margin": 0.5, "tight_at": 20}


@pytest.mark.equation(4)
@pytest.mark.parametrize(
    ("what", "opens"),
    [
        ({}, True),
        ({"min_episodes": 21}, False),
        ({"min_ess": 20.5}, False),
        ({"max_gap": 0.12}, False),
        ({"margin": 0.3}, False),  # the bound is at -.34
    ],
)
def test_each_limit_alone_holds_the_canary_back(what, opens):
    made = deployment("shadow", **SUPPORTED | what)
    row = watch(made, [-0.5, 0.5] * 10, gap=0.125)
    assert row["lower"] == pytest.approx(-0.5 * script.width(20, 0.05, 20))
    assert -0.5 < row["lower"] < -0.3
    assert (made.phase, made.share) == (("canary", 0.1) if opens else ("shadow", 0.0))
    assert row["rule"] == ("supported: canary" if opens else "")
    assert [entry["rule"] for entry in made.rows[:-1]] == [""] * 19  # nor did any episode before


def test_agreements_and_gaps_of_choices():
    """The policy wants choices 1, 0, 1 in the states seen; the logger took 1, 1 and 1, and never takes 0."""
    log = {"actions": np.array([[1, 1], [1, 0]]), "mask": np.array([[True, True], [True, False]])}
    given, clone = np.array([[0.4, 0.6], [0.9, 0.1], [0.2, 0.8]]), np.array([[0.005, 0.995]] * 3)
    agreement, gap = script.agreements(given, clone, log, 0.1, 0.01)
    assert agreement.tolist() == [0.5, 1]
    assert gap.tolist() == [0.5, 0]


def test_agreements_and_gaps_of_vectors():
    """Same: within .2 in every entry. A gap: farther than 3 * .1 from the clone's mean in any."""
    log = {"actions": np.zeros((1, 2, 2)), "mask": np.ones((1, 2), bool), "clone_std": np.full(2, 0.1)}
    given = np.array([[0.19, -0.19], [0.0, 0.31]])
    agreement, gap = script.agreements(given, np.zeros((2, 2)), log, 0.1, 0.01)
    assert (agreement.tolist(), gap.tolist()) == ([0.5], [0.5])


# -------------------------------------------------- acting --------------------------------------------------


@pytest.mark.equation(5)
def test_the_contrast_by_hand():
    """Share .1, level .75: a canary that lives counts 2.5, one that dies -7.5; others -.25/.9 and .75/.9."""
    assert script.contrast(True, 0.1, 1.0, 0.75) == pytest.approx((2.5, 2.5, 7.5))
    assert script.contrast(True, 0.1, 0.0, 0.75) == pytest.approx((-7.5, 2.5, 7.5))
    assert script.contrast(False, 0.1, 1.0, 0.75) == pytest.approx((-0.25 / 0.9, 2.5, 7.5))
    assert script.contrast(False, 0.1, 0.0, 0.75) == pytest.approx((0.75 / 0.9, 2.5, 7.5))
    assert script.contrast(True, 0.9, 1.0, 0.75)[1:] == pytest.approx((7.5, 2.5))


@pytest.mark.equation(5)
@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_the_contrast_is_the_gain_on_average_whatever_the_level(level):
    for p, own, loggers in itertools.product((0.1, 0.5, 0.8), (0.2, 1.0), (0.0, 0.7)):
        if_own, _, _ = script.contrast(True, p, own, level)
        if_not, _, _ = script.contrast(False, p, loggers, level)
        assert p * if_own + (1 - p) * if_not == pytest.approx(own - loggers)


LIVE = [(True, 0.1, 3.0), (False, 0.1, 1.0), (False, 0.05, 2.5)]
LIVE += [(True, 0.1, 1.0), (True, 1.0, 2.0), (False, 0.1, 3.0)]


@pytest.mark.equation(5, 6, 7)
def test_the_wealths_against_loops():
    """Returns from 1 to 3, so a margin of .2 is .1 on a scale from 0 to 1; a share of 1 says nothing."""
    made = deployment(alpha=1e-6, margin=0.2, return_min=1.0, return_max=3.0)
    for episode in LIVE:
        row = made.compare(*episode)
    harm, safe, total = np.ones(6), np.ones(6), 0.0
    seen = []
    for canary, p, value in LIVE:
        g, m = (value - 1) / 2, (0.5 + sum(seen)) / (1 + len(seen))
        seen.append(g)
        if p == 1:
            continue
        u = (g - m) / p if canary else (m - g) / (1 - p)
        total += u
        for j in range(6):
            f = 2.0 ** -(j + 1)
            harm[j] *= 1 - f * u / max((1 - m) / p, m / (1 - p))
            safe[j] *= 1 + f * (u + 0.1) / max(m / p, (1 - m) / (1 - p))
    assert row["log_harm"] == pytest.approx(math.log(harm.mean()))
    assert row["log_safe"] == pytest.approx(math.log(safe.mean()))
    assert row["gain"] == pytest.approx(2 * total / 5)  # the fifth was no lot


def all_courses(gain: float, alpha: float, steps: int = 5) -> tuple[float, ...]:
    """Of all 4^steps courses of lots and outcomes: E H, E S, the chance of a stop, and of a larger share.

    The logger's chance of a return of 1 drifts from episode to episode, and so does the lot.
    """
    means, stopped, raised = np.zeros(2), 0.0, 0.0
    for outcomes in itertools.product([(False, 0), (False, 1), (True, 0), (True, 1)], repeat=steps):
        made = deployment(alpha=alpha, shares="0.6 0.9", margin=0.2)
        chance, fired = 1.0, ""
        for k, (canary, value) in enumerate(outcomes):
            p, base = (0.2, 0.5, 0.6)[k % 3], 0.4 + 0.1 * (k % 4)
            good = base + gain * canary
            chance *= (p if canary else 1 - p) * (good if value else 1 - good)
            row = made.compare(canary, p, float(value))
            fired = fired or row["rule"]  # the first one that does
        stopped += chance * (fired == "harm: stop")
        raised += chance * (fired == "not worse: next share")
        means += chance * np.exp([row["log_harm"], row["log_safe"]])
    return *means, stopped, raised


@pytest.mark.equation(6, 8)
def test_a_policy_as_good_as_the_loggers_makes_no_wealth_of_harm():
    """Exactly: the mean of H is 1, and H ever reaches 1/a with a chance of at most a; but not of zero."""
    harm, safe, stopped, _ = all_courses(0.0, 0.7)
    assert harm == pytest.approx(1)
    assert safe > 1
    assert 0.02 < stopped <= 0.7
    assert all_courses(0.1, 0.7)[0] < 1


@pytest.mark.equation(7, 8)
def test_a_policy_that_is_worse_by_the_margin_makes_no_wealth_of_safety():
    harm, safe, _, raised = all_courses(-0.2, 0.7)
    assert safe == pytest.approx(1)
    assert harm > 1
    assert 0.02 < raised <= 0.7
    assert all_courses(-0.3, 0.7)[1] < 1


@pytest.mark.equation(8)
@pytest.mark.parametrize(("value", "rule"), [(0.0, "harm: stop"), (1.0, "not worse: next share")])
def test_a_rule_fires_at_its_bound_and_not_before(value, rule):
    """Canaries that all die, or all live, while half of the others do."""
    made, name = deployment(), "log_harm" if value == 0 else "log_safe"
    for k in range(400):
        canary = k % 3 == 0
        row = made.compare(canary, 0.1, value if canary else float(k % 2))
        if row["rule"]:
            break
    assert row["rule"] == rule
    assert [entry["rule"] for entry in made.rows[:-1]] == [""] * k
    assert made.rows[-2][name] < math.log(20) <= row[name]
    assert (made.phase, made.share) == (("stopped", 0.0) if value == 0 else ("ramp", 0.25))
    assert (row["phase"], row["share"], row["next_share"]) == ("canary", 0.1, made.share)


def test_all_the_way_to_the_full_share_and_over():
    """Each share has its fewest episodes; the last one none to compare, and enough of the policy's."""
    made = deployment(stage_episodes=40, handover_episodes=150)
    rng, fired = np.random.default_rng(0), []
    while not made.is_over:
        canary = bool(rng.random() < made.share)
        row = made.compare(canary, made.share, float(rng.random() < (0.99 if canary else 0.4)))
        if row["rule"]:
            fired.append((row["phase"], row["share"], row["next_phase"], row["next_share"]))
    assert fired == [
        ("canary", 0.1, "ramp", 0.25),
        ("ramp", 0.25, "ramp", 0.5),
        ("ramp", 0.5, "full", 1.0),
        ("full", 1.0, "handover", 1.0),
    ]
    table = pd.DataFrame(made.rows)
    assert table.groupby("share")["episode"].count().min() >= 40
    assert table["canary"].sum() >= 150
    full = table[table["share"] == 1]
    assert full["log_harm"].nunique() == full["log_safe"].nunique() == 1  # of what came before


def test_without_a_verdict_it_ends():
    made = deployment(patience=30)
    for k in range(30):
        row = made.compare(k % 2 == 0, 0.1, 0.5)
    assert (row["rule"], made.phase, made.share) == ("no verdict: stop", "stopped", 0.0)
    assert [entry["rule"] for entry in made.rows[:-1]] == [""] * 29


def test_where_no_share_is_of_all_the_last_one_is_still_compared():
    made = deployment(shares="0.4 0.8")
    made.raise_share()
    assert made.phase == "full"
    for k in range(200):
        canary = k % 5 > 0
        row = made.compare(canary, 0.8, 0.0 if canary else 1.0)
        if row["rule"]:
            break
    assert row["rule"] == "harm: stop"


@pytest.mark.parametrize("text", ["", "1", "0.1 0.1", "0.5 0.2", "0 1", "0.1 1.5", "-0.1 1", "x", "0.1 nan"])
def test_shares_have_to_rise(text):
    with pytest.raises(script.UserError, match="shares: "):
        script.read_shares(text)


# --------------------------------------- the command and its folder ---------------------------------------

LOG, TARGET = "test/shadow/log-v0", "test/shadow/second-v0"
FIELDS = {"dataset": LOG, "policy": "uniform", "fit_episodes": 40, "min_episodes": 30, "min_ess": 10}
FIELDS |= {"stage_episodes": 10, "margin": 0.4, "handover_episodes": 10}
FIELDS |= {"updates": 5, "clone_updates": 5, "members": 2, "hidden_dim": 8}


@pytest.fixture(scope="module")
def log(minari_root):
    """80 courses of a logger who takes three choices alike; 150 live ones, in which the policy does well."""
    rng = np.random.default_rng(0)

    def some(count: int, live: bool) -> list:
        episodes = []
        for _ in range(count):
            infos = {"propensity": [1 / 3] * 2}
            canary = live and rng.random() < 0.1
            if live:
                infos |= {"canary": [canary] * 2, "share": [0.1] * 2}
            reward = float(canary or rng.random() < 0.4)
            episodes.append(course([0, 1, 3], rng.integers(3, size=2), [0, reward], **infos))
        return episodes

    store(LOG, some(80, live=False))
    episodes = some(150, live=True)
    store("test/shadow/live-v0", episodes)
    store("test/shadow/early-v0", episodes[:25])
    store("test/shadow/other-v0", episodes[1:60])
    store("test/shadow/plain-v0", some(3, live=False))
    odd = {"greedy": (1, 0.5, [0, 1]), "large": (1, 0.1, [1, 1]), "odd": (2, 0.1, [0, 1])}
    for name, (canary, share, rewards) in odd.items():
        infos = {"propensity": [1 / 3] * 2, "canary": [canary] * 2, "share": [share] * 2}
        store(f"test/shadow/{name}-v0", [course([0, 1, 3], [0, 1], rewards, **infos)])


@pytest.fixture
def call(log, tmp_path, monkeypatch, capsys):
    """call(live=...) is the command line in this process: exit status, stdout, stderr."""

    def run(**fields) -> tuple[int, str, str]:
        words = [f"--{name}={value}" for name, value in {**FIELDS, "output_dir": tmp_path, **fields}.items()]
        monkeypatch.setattr(sys, "argv", ["shadow.py", *words])
        capsys.readouterr()
        status = 0
        try:
            script.main(script.deploy)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def folder(tmp_path):
    return tmp_path / "evaluate/shadow" / LOG / "default/seed-0"


def contents(tmp_path) -> dict:
    return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_from_the_log_to_the_handover_in_steps_as_at_once(call, tmp_path):
    status, out, err = call()
    assert status == 0, err
    watched = pd.read_csv(folder(tmp_path) / "decisions.csv")
    assert watched["phase"].tolist() == ["shadow"] * len(watched)
    assert 30 <= len(watched) <= 40
    assert watched["rule"].dropna().tolist() == ["supported: canary"]
    assert watched["weight"].to_numpy() == pytest.approx(1)
    assert "phase canary, share 0.1" in out

    before = contents(tmp_path)
    assert call()[0] == 0  # nothing new: nothing changes, and nothing is fitted
    assert contents(tmp_path) == before

    assert call(live="test/shadow/early-v0")[0] == 0
    status, out, err = call(live="test/shadow/live-v0", handover=TARGET)
    assert status == 0, err
    table = pd.read_csv(folder(tmp_path) / "decisions.csv")
    assert len(table) > len(watched) + 25
    rules = ["supported: canary", *["not worse: next share"] * 3, "enough new data: hand over"]
    assert table["rule"].dropna().tolist() == rules
    assert f"to learn anew: python algorithms/discrete/iql.py --dataset {TARGET}" in out
    assert f"episode {len(table)}: enough new data: hand over (share 1 -> 1)" in out

    together = minari.load_dataset(TARGET)
    assert together.total_episodes == 230
    last = list(together.iterate_episodes())[-1]
    assert {*last.infos} == {"propensity"}
    assert together.storage.metadata["parts"] == [LOG, "test/shadow/live-v0"]

    in_steps = (folder(tmp_path) / "decisions.csv").read_bytes()
    status, out, _ = call(live="test/shadow/live-v0", handover=TARGET)  # over: no episode more
    assert (status, f"{TARGET} is there" in out) == (0, True)
    assert (folder(tmp_path) / "decisions.csv").read_bytes() == in_steps
    other = tmp_path / "other"
    assert call(output_dir=other)[0] == call(output_dir=other, live="test/shadow/live-v0")[0] == 0
    assert (folder(other) / "decisions.csv").read_bytes() == in_steps


def test_masks_are_heeded_and_handed_over(minari_root):
    """Weights by hand: of uniform choices over the allowed, by a clone that knows what is allowed."""
    names = {key: f"test/shadow/gated-{key}-v0" for key in ("dataset", "live", "handover")}
    config = script.Config(**FIELDS | names | {"fit_episodes": 9})
    dataset = store(config.dataset, gated(2, known=False))
    store(config.live, gated(1, known=False))
    log = script.side_by_side(dataset)
    clone = script.clone_behavior(dataset, script.rows_of(log, slice(9)), config.clone_updates, config.seed)
    with torch.no_grad():
        first, second = clone(torch.tensor([0, 1])).double().numpy()
    wanted = []
    for a, b in log["actions"][9:]:
        ahead = 1 / 3 / second[b] if a == 1 else 1
        wanted.append(1 / 3 / first[a] * ahead)
    watched = script.watch_log(config, dataset, 0)
    assert watched["weight"].to_numpy() == pytest.approx(np.array(wanted), rel=1e-5)

    script.hand_over(config, dataset)
    together = script.side_by_side(minari.load_dataset(config.handover))
    assert together["allowed"].tolist() == [*log["allowed"].tolist(), *log["allowed"][:9].tolist()]


def test_a_cut_is_an_end(minari_root, monkeypatch):
    """What might have come after a time limit is in no return: the logger's own policy gains nothing by it.

    V and Q are 5 everywhere, weights 1: in two steps X = 5 + (r + 5 - 5) + (r' - 5) = G, so D is 0.
    """
    plans = [(0, 1), (1, 2), (2, 0)] * 4
    dataset = store("test/shadow/cut-v0", [course([0, 1, 3], plan, [1, 2], ended=False) for plan in plans])
    fitted = []

    def fit_critics(config, dataset, log, *_):
        fitted.append(log["terminations"].tolist())
        return None, None

    monkeypatch.setattr(script, "fit_critics", fit_critics)
    monkeypatch.setattr(script, "values_at", lambda critics, before, *_, **__: np.full(len(before), 5.0))
    config = script.Config(**FIELDS | {"fit_episodes": 6, "policy": "behavior"})
    watched = script.watch_log(config, dataset, 0)
    assert watched["difference"].to_numpy() == pytest.approx(np.zeros(6), abs=1e-5)
    assert fitted == [[[0, 1]] * 6]  # nor has the critic a value beyond a cut


REFUSED = {
    "other rules": ({"alpha": 0.1, "margin": 0.5}, "under other rules: alpha 0.05 -> 0.1, margin 0.4 -> 0.5"),
    "other past": ({"live": "test/shadow/other-v0"}, "is another than when it was decided on: restore it"),
    "shorter": ({"live": "test/shadow/early-v0"}, "live has 25 episodes; "),
    "taken": ({"live": "test/shadow/live-v0", "handover": LOG}, f"handover: {LOG} is there, of other parts"),
    "no infos": ({"live": "test/shadow/plain-v0"}, "episode 0: its infos lack canary"),
    "return": ({"live": "test/shadow/large-v0"}, "its return 2 is not in [0, 1], see --return_min"),
    "no arm": ({"live": "test/shadow/odd-v0"}, "episode 0: canary 2 is not 0 or 1"),
    "no id": ({"handover": "second"}, "handover: 'second' is no Minari id"),
    "no range": ({"return_max": 0}, "return_min 0 is not below return_max 0"),
    "out": ({"variant": "../x"}, "mend the variant"),
    "typo": ({"polcy": "uniform"}, "did you mean policy?"),
}


def assert_refused(called: tuple[int, str, str], said: str) -> None:
    status, _, err = called
    assert (status, err.count("\n")) == (2, 1), err
    assert err.startswith("shadow.py: ")
    assert said in err


def test_what_is_refused_changes_nothing(call, tmp_path):
    for _ in range(2):
        assert call()[0] == 0
    assert_refused(call(live="test/shadow/greedy-v0"), "was drawn with a share of 0.5; 0.1 was allowed")
    assert call(live="test/shadow/live-v0")[0] == 0
    before = contents(tmp_path)
    for fields, said in REFUSED.values():
        assert_refused(call(**fields), said)
    assert contents(tmp_path) == before

    file = folder(tmp_path) / "decisions.csv"
    text = file.read_text()
    file.write_text(text.replace("not worse: next share", "", 1))
    assert_refused(call(), "was changed: its decisions do not follow from its episodes")
    cells = text.splitlines()[1].split(",")
    changed = [*cells[:5], str(1 - float(cells[5])), *cells[6:]]  # the return of the first watched episode
    file.write_text(text.replace(",".join(cells), ",".join(changed), 1))
    assert_refused(call(), "has another past than when it was watched")
    file.write_text("phase\nshadow\n")
    assert_refused(call(), "cannot read")


def test_a_policy_that_was_trained_anew_is_another(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint.pt").write_bytes(b"1")
    config = script.Config(policy=str(run))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    (tmp_path / "policy.sha256").write_text(script.policy_hash(str(run)))
    script.check_rules(config, tmp_path)
    (run / "checkpoint.pt").write_bytes(b"2")
    with pytest.raises(script.UserError, match="was trained anew"):
        script.check_rules(config, tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"fit_episodes": 80}, "has 80 episodes: lower fit_episodes"),
        ({"policy": "nowhere"}, "policies: nowhere is no folder of a run"),
        ({"policy": "behavior uniform"}, "are 2 policies; name one"),
        ({"live": "test/shadow/live-v0"}, "the policy is not allowed to act"),
        ({"shares": "1 0.5"}, "are no rising numbers"),
        ({"alpha": 0}, "alpha: "),
        ({"dataset": "reef/sepsis/nowhere-v0"}, "make dataset ID=reef/sepsis/nowhere-v0"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(call, tmp_path, fields, said):
    assert_refused(call(**fields), said)
    assert not [*tmp_path.iterdir()]


def test_next_command(log):
    dataset = minari.load_dataset(LOG)
    config = script.Config(policy="results/runs/discrete/cql/x/default/seed-0", handover="a/b-v0")
    assert script.next_command(config, dataset) == "python algorithms/discrete/cql.py --dataset a/b-v0"
    config = script.Config(policy="uniform", handover="a/b-v0")
    assert script.next_command(config, dataset) == "python algorithms/discrete/iql.py --dataset a/b-v0"


# -------------------------------------------- against the truth --------------------------------------------


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools/shadow_study.py"
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("reef_shadow_study", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(path.parent))
    return module


@needs_package
def test_the_policies_are_what_they_are_called(tool):
    clinicians = tool.sepsis.value(tool.sepsis.policy_table("clinician"))
    gains = {name: tool.sepsis.value(policy) - clinicians for name, policy in tool.make_policies().items()}
    assert gains["good"] > 0.03
    assert gains["clinicians"] == 0
    assert gains["flattered"] == gains["harmful"] < -0.07 < -script.Config().margin


@needs_package
def test_a_few_courses(tool, monkeypatch):
    monkeypatch.setattr(tool, "LOGGED", 2500)
    policies = tool.make_policies()
    ends = {name: tool.run_course(name, policies[name], 0) for name in ("good", "harmful", "flattered")}
    assert ends["good"].phase == "handover"
    assert max(row["next_share"] for name in ("harmful", "flattered") for row in ends[name].rows) <= 0.1


def test_the_recorded_study():
    """The harmful policy stays a canary at most, though a flattering log lets it in; the good one is full."""
    courses = pd.read_csv(ROOT / "results/shadow/courses.csv").set_index("policy")
    decisions = pd.read_csv(ROOT / "results/shadow/decisions.csv")
    assert courses.groupby("policy")["seed"].nunique().to_dict() == dict.fromkeys(courses.index.unique(), 20)
    assert courses.loc[["harmful", "flattered"], "largest_share"].max() <= 0.1
    assert (courses.loc["good", "largest_share"] == 1).all()
    fired = decisions.dropna(subset="rule").groupby("policy")["rule"].unique()
    assert "harm: stop" in fired["flattered"]
    assert "harm: stop" not in fired["good"]


@needs_package
def test_the_table_of_the_docs_is_the_recorded_one(tool):
    lines = tool.table_lines(pd.read_csv(ROOT / "results/shadow/courses.csv"))
    assert "\n".join(lines) in (ROOT / "docs/deploying.md").read_text()
