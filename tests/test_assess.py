"""tools/assess.py: its rules, departures, drift and losses by their formulas, and the whole page."""

import base64
import copy
import dataclasses
import html
import importlib
import inspect
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, learner_class, load_script, random_episodes, short
from logs import course, gated, store
from minari.data_collector import EpisodeBuffer
from test_report_page import browser  # noqa: F401

sys.path.insert(0, str(ROOT / "tools"))
assess = importlib.import_module("assess")
sys.path.pop(0)

GOOD = assess.Facts(
    rare=0.01,
    values=dict.fromkeys(assess.TRUSTED, (5.0, 4.5, 5.5)),
    logged=4.0,
    ess=200.0,
    mean_weight=1.0,
    heldout=True,
    ratio=1.1,
    drift=[],
    finite=True,
    calibrated=True,
)
ODD = "<script>alert(1)</script> | `x` &\n\x07*b*"


# ----------------------------------------------- The verdict -----------------------------------------------


def ends(**changed) -> dict:
    return GOOD.values | changed


@pytest.mark.parametrize(
    ("changes", "verdict", "rules"),
    [
        ({}, "canary", ""),
        ({"rare": 0.11}, "not supported", "a"),
        ({"rare": 0.10}, "shadow", "d"),
        ({"rare": 0.03}, "canary", ""),
        ({"values": ends(FQE=(3.0, 2.0, 3.9))}, "not supported", "b"),
        ({"values": ends(FQE=(3.0, 2.0, 3.9)), "calibrated": False}, "shadow", "fj"),
        ({"values": ends(WDR=(3.0, 2.0, 3.9))}, "not supported", "b"),
        ({"values": ends(WDR=(3.0, 2.0, 3.9)), "ess": 49.0}, "shadow", "ef"),
        ({"values": ends(WIS=(math.nan,) * 3), "ess": 0.0}, "shadow", "ef"),
        ({"values": ends(FQE=(5.0, -math.inf, 6.0))}, "not supported", "c"),
        ({"finite": False}, "not supported", "c"),
        ({"ess": 50.0}, "canary", ""),
        ({"ess": math.nan}, "shadow", "e"),
        ({"mean_weight": 2.1}, "shadow", "e"),
        ({"mean_weight": 0.4}, "shadow", "e"),
        ({"values": ends(WIS=(5.0, 4.0, 6.0))}, "shadow", "f"),
        ({"heldout": False}, "shadow", "g"),
        ({"ratio": 2.1}, "shadow", "h"),
        ({"ratio": math.nan}, "shadow", "h"),
        ({"drift": ["dose"]}, "shadow", "i"),
        ({"calibrated": False}, "shadow", "j"),
    ],
)
def test_the_verdict_follows_the_rules(changes, verdict, rules):
    found, reasons = assess.judge_policy(dataclasses.replace(GOOD, **changes))
    assert (found, "".join(re.findall(r"^\((\w)\)", "\n".join(reasons), re.MULTILINE))) == (verdict, rules)


def test_every_rule_stands_on_the_page_with_its_number():
    text = " ".join(" ".join(assess.RULES).split())
    assert re.findall(r"^\((\w)\)", "\n".join(assess.RULES), re.MULTILINE) == list("abcdefghij")
    for number in ("10%", "3%", "50 episodes", "0.5 and 2", "more than 2 times", "more than 0.5 of"):
        assert number in text


# ------------------------------------------------ Departures ------------------------------------------------


def log_of(observations, actions, rewards=None, metadata=None, choices: int = 0, episode=None):
    """What `measure_departures` and the like see of a log, one step an episode."""
    log = object.__new__(assess.Log)
    log.observations, log.actions = np.asarray(observations, np.float32), np.asarray(actions)
    log.episode = np.arange(len(log.actions)) if episode is None else np.asarray(episode)
    log.choices, log.states, log.planes = choices, log.observations.ndim == 1, False
    log.allowed = None
    act_dim = choices or log.actions.shape[1]
    log.columns = {"bounds": np.array([[-2.0] * act_dim, [2.0] * act_dim])}
    word = "choice" if choices else "action"
    log.action_names = [f"{word} {i}" for i in range(act_dim)]
    size = 1 if log.states else log.observations.shape[1]
    log.observation_names = [f"observation {i}" for i in range(size)]
    return log


def test_a_vector_is_rare_beyond_the_logs_own_distances():
    """By hand: two states with actions around -0.5 and 0.5; the policy plays 0.5 in both."""
    rng = np.random.default_rng(0)
    states = np.repeat([[-1.0, 7.0], [1.0, 7.0]], 100, axis=0)
    actions = np.repeat([[-0.5], [0.5]], 100, axis=0) + rng.uniform(-0.01, 0.01, (200, 1))
    log = log_of(states, actions)
    policy = assess.Policy("always", lambda seen: np.full((len(seen), 1), 1.0))  # 0.5 of [-2, 2]
    rows = np.arange(200)
    near = assess.nearest_actions(log, log, rows, seed=0)
    assert near.shape == (200, assess.NEIGHBOURS, 1)
    assert (np.sign(near[:100]) == -1).all()
    assert (np.sign(near[100:]) == 1).all()
    found = assess.departure_of_vectors(policy, log, log, rows, near)
    assert found.share == 0.5
    np.testing.assert_array_equal(found.rare, np.repeat([1, 0], 100))
    row = found.actions.iloc[0]
    assert row["mean of the policy"] == pytest.approx(1.0)
    assert row["mean distance"] == pytest.approx(1.0, abs=0.02)  # 2 in one half, 0 in the other
    where = assess.where_rare(log, found).set_index("observation")
    assert where.index[0] == "observation 0"
    assert tuple(where.loc["observation 0"][["median there", "median elsewhere"]]) == (-1, 1)
    assert where.loc["observation 1", "difference in deviations"] == 0


def test_neighbours_are_of_other_episodes():
    log = log_of(np.zeros((120, 1)), np.arange(120.0)[:, None] / 120, episode=np.arange(120) // 60)
    near = assess.nearest_actions(log, log, np.array([0, 119]), seed=0)
    assert (near[0] >= 0.5).all()
    assert (near[1] < 0.5).all()


def test_a_choice_is_rare_where_the_log_hardly_makes_it():
    shown = np.array([[0.995, 0.005, 0.0], [0.3, 0.3, 0.4]])
    given = np.array([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    log = log_of([3, 4], [0, 1], choices=3)
    policy = assess.Policy("p", lambda observations: given)
    found = assess.departure_of_choices(policy, log, log, np.array([0, 1]), shown)
    np.testing.assert_allclose(found.rare, [0.5, 0.0])
    assert found.own == 0
    np.testing.assert_allclose(found.actions["share of the policy"], [0.25, 0.125, 0.625])
    np.testing.assert_allclose(found.actions["of these hardly ever shown"], [0, 1, 0.2])


def test_answers_that_are_not_finite_are_an_error():
    policy = assess.Policy("p", lambda observations: np.full((2, 1), np.nan))
    with pytest.raises(assess.UserError, match="p: its actions are not all finite"):
        assess.answers(policy, log_of(np.zeros((2, 1)), [[0.0], [0.0]]), np.arange(2))


def test_policies_are_asked_with_the_logs_masks(minari_root):
    """Of 18 choices of `gated`, 12 are of three and 6 of one: evenly, 12 / 3 + 6 are the log's."""
    log = assess.Log(store("test/logs/gated-assess-v0", gated(1)).id)
    evenly = assess.Policy("evenly", lambda observations, allowed: allowed / allowed.sum(1, keepdims=True))
    assert assess.imitation_error(evenly, log, 0) == pytest.approx(1 - 10 / 18)
    found = assess.measure_departures([evenly], log, log, evenly.ask, 0)["evenly"]
    np.testing.assert_allclose(found.actions["share of the policy"], [12 / 54, 12 / 54, 30 / 54])


# -------------------------------------------------- Drift --------------------------------------------------


def drifting(returns) -> pd.DataFrame:
    log = log_of(np.zeros(len(returns)), np.zeros(len(returns), int), choices=2)
    log.returns, log.lengths = np.asarray(returns, float), np.ones(len(returns), int)
    log.columns = {"rewards": log.returns[:, None], "actions": np.zeros((len(returns), 1), int)}
    return assess.measure_drift(log)


def test_drift_is_the_change_from_the_first_third_to_the_last():
    returns = np.concatenate([np.tile([0.0, 1.0], 15), np.tile([1.0, 2.0], 15), np.tile([2.0, 3.0], 15)])
    table = drifting(returns).set_index("what")
    row = table.loc["return of an episode"]
    np.testing.assert_allclose(row[["first third", "middle", "last third"]].astype(float), [0.5, 1.5, 2.5])
    assert row["change"] == pytest.approx(2 / returns.std())
    assert row["errors"] == pytest.approx(2 / math.sqrt(2 * returns[:30].var(ddof=1) / 30))
    assert assess.drifted(table.reset_index()) == ["return of an episode", "reward of a step"]
    assert table.loc["share of choice 0", "change"] == 0


@pytest.mark.parametrize("returns", [np.tile([0.0, 1.0], 45), [0.0, 1.0, 5.0], [1.0], np.zeros(9)])
def test_no_drift_where_there_is_none_or_too_little_to_tell(returns):
    assert assess.drifted(drifting(returns)) == []


# ------------------------------------------------- Numbers -------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234567, "1,234,567"), (0.12345, "0.1235"), (5.0, "5"), (1e300, "1.00e+300"), (-2e-9, "-2.00e-09"),
     (math.nan, "unknown"), (math.inf, "unknown"), (0.0, "0"), ("text", "text"), (np.int64(3), "3")],
)  # fmt: skip
def test_numbers_are_shown_with_four_digits(value, shown):
    assert assess.show(value) == shown


class Reader(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_odd_names_are_text_on_both_pages():
    columns = ["policy", "estimator", "value", "low", "high"]
    values = pd.DataFrame([[ODD, "FQE", 1.0, 0.0, 2.0]], columns=columns)
    blocks = [("heading", 1, ODD), ("text", ODD), ("list", [ODD]), ("table", [ODD, "n"], [[ODD, "1"]]),
              ("figure", values)]  # fmt: skip
    page = assess.html_page(blocks)
    read = Reader(page)
    assert "script" not in read.tags
    assert read.text.count("<script>alert(1)</script> | `x` & *b*") == 7  # twice in the head and the table
    assert "@BODY@" not in page
    text = assess.markdown_page(blocks)
    assert "<" not in text
    assert "\x07" not in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [3, 3, 3]


def test_the_figure_keeps_huge_intervals_within_its_margins():
    rows = [["a", "FQE", 1.0, 0.0, 2.0], ["a", "WIS", 1.5, 1.0, 2.0], ["a", "IS", 0.0, -1e300, 1e300],
            ["a", "DR", math.nan, math.nan, math.nan]]  # fmt: skip
    drawn = assess.html_figure(pd.DataFrame(rows, columns=["policy", "estimator", "value", "low", "high"]))
    places = [float(x) for x in re.findall(r'(?:x1|x2|cx)="([^"]*)"', drawn)]
    assert len(places) == 9
    assert min(places) >= 150
    assert max(places) <= 620


# ---------------------------------------------- The whole page ----------------------------------------------


def options(dataset, *runs, **changes) -> list[str]:
    given = {"updates": 20, "clone_updates": 50, "resamples": 50} | changes
    return [str(word) for word in (dataset, *runs, *(f"--{key}={value}" for key, value in given.items()))]


def table_under(text: str, title: str) -> list[list[str]]:
    """The first table below a heading of the Markdown page."""
    rest = text.split(f"\n## {title}\n")[1] if title else text
    lines = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if "---" not in line]


@pytest.fixture(scope="module")
def choices(minari_root, tmp_path_factory):
    """A log of two choices, which earn 0 and 1, its held-out part, and short runs of bc and dqn."""
    rng = np.random.default_rng(0)

    def episodes(count: int) -> list:
        steps = [rng.integers(2, size=3) for _ in range(count)]
        return [course([0, 1, 2, 3], a, a, propensity=[0.5] * 3) for a in steps]

    name = "test/assess/choices-v0"
    spaces = {"observations": gym.spaces.Discrete(4), "actions": gym.spaces.Discrete(2)}
    dataset = store(name, episodes(120), **spaces)
    dataset.storage.update_metadata({"action_names": ["wait", ODD], "observation_columns": ["stage"]})
    store("test/assess/choices-heldout-v0", episodes(80), **spaces)
    runs = tmp_path_factory.mktemp("runs")
    for script in ("bc", "dqn"):
        module = load_script(f"discrete/{script}.py")
        module.train(module.parse_config(short(name, runs, updates=60, discount=1.0, critic_lr=0.01)
                                         if script == "dqn" else short(name, runs, updates=60)))  # fmt: skip
    return name, [runs / f"discrete/{script}/{name}/default/seed-0" for script in ("bc", "dqn")]


@pytest.fixture(scope="module")
def assessed(choices, tmp_path_factory):
    """A folder in which these runs are assessed twice, in one/ and in two/."""
    (name, runs), root = choices, tmp_path_factory.mktemp("assessed")
    command = options(name, *runs, discount=1, heldout="test/assess/choices-heldout-v0")
    for folder in ("one", "two"):
        assert assess.main([*command, f"--output={root / folder}"]) == 0
    return root


@pytest.mark.parametrize("width", [1440, 360])
def test_the_page_fits_a_screen_a_phone_and_paper(browser, assessed, width):  # noqa: F811
    metrics = {"width": width, "height": 800, "mobile": width < 500, "deviceScaleFactor": 1}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get((assessed / "one/assessment.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert "Values" in browser.page_source
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    paper = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    pages = len(re.findall(rb"/Type\s*/Page\b", paper))
    assert 1 <= pages <= 12


def test_the_page_of_choices(choices, assessed):
    pages = [(assessed / folder / f"assessment.{kind}").read_bytes() for kind in ("md", "html")
             for folder in ("one", "two")]  # fmt: skip
    assert (pages[0], pages[2]) == (pages[1], pages[3])
    text = pages[0].decode()
    labels = ["bc, default, seed 0", "dqn, default, seed 0"]
    assert [row[0] for row in table_under(text, "")[1:]] == labels
    assert {row[1] for row in table_under(text, "")[1:]} <= {"not supported", "shadow", "canary"}
    columns, *rows = table_under(text, "Values")
    assert columns[:8] == ["policy", "IS", "PDIS", "WIS", "WPDIS", "FQE", "DR", "WDR"]
    assert [row[0] for row in rows] == [assess.LOGGED, *labels]
    heldout = assess.Log("test/assess/choices-heldout-v0")
    assert rows[0][1].startswith(f"{assess.show(heldout.returns.mean())} ")
    losses = table_under(text, "Losses on held-out episodes")
    names = ["imitation error", "imitation error", "critic loss"]
    assert [row[:2] for row in losses[1:]] == [[labels[i > 0], name] for i, name in enumerate(names)]
    assert "script" not in Reader(pages[2].decode()).tags
    assert html.escape("<script>alert(1)</script>") in pages[2].decode()


def test_held_out_episodes_have_to_be_others(vectors, choices, capsys, tmp_path):
    name, _, run = vectors
    env, first = gym.make("Pendulum-v1"), next(minari.load_dataset(name).iterate_episodes())
    copied = EpisodeBuffer(
        observations=first.observations, actions=first.actions, rewards=first.rewards,
        terminations=first.terminations, truncations=first.truncations)  # fmt: skip
    minari.create_dataset_from_buffers("test/assess/copied-v0", [copied], env=env, data_format="hdf5")
    for heldout, words in {
        name: "is the log itself",
        "test/assess/copied-v0": "1 episodes of test/assess/copied-v0 are in",
        choices[0]: "has other observations or actions",
        "test/assess/none-v0": "cannot load test/assess/none-v0",
    }.items():
        capsys.readouterr()
        assert assess.main(options(name, run, heldout=heldout, output=tmp_path / "page")) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("assess.py: ")
        assert words in err
        assert not (tmp_path / "page").exists()


def test_runs_that_cannot_be_assessed_are_one_line(choices, pendulum, capsys, tmp_path):
    name, runs = choices
    broken = tmp_path / "discrete/bc/x"
    shutil.copytree(runs[0], broken)
    (broken / "run.json").write_text("{")
    for dataset, run, words in (
        (name, tmp_path, "is not where a script puts its runs"),
        (name, broken, "is no folder of a run"),
        (pendulum, runs[0], "is not for this log"),
    ):
        capsys.readouterr()
        assert assess.main(options(dataset, run, output=tmp_path / "page")) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "page").exists()


def test_lost_metrics_are_not_supported(choices):
    """An infinite number in the last row; a loss of an earlier phase has no number there."""
    policy = assess.Policy("p", None, info={"status": "finished"})
    columns = ["policy", "estimator", "value", "low", "high", "ess", "mean_weight"]
    rows = [[who, name, 1.0, 0.5, 1.5, 100.0, 1.0] for who in ("p", assess.LOGGED)
            for name in ("IS", *assess.TRUSTED)]  # fmt: skip
    values = pd.DataFrame(rows, columns=columns)
    departure = SimpleNamespace(share=0.05, own=0.02)
    for row, finite in (
        ({"critic/loss": 1.0, "eval/score": math.nan}, True),
        ({"critic/loss": 1.0, "vae/loss": math.nan}, True),
        ({"critic/loss": 1.0, "critic/q_mean": math.inf}, False),
    ):
        policy.metrics = pd.DataFrame([{"critic/loss": 2.0}, row])
        facts = assess.gather_facts(policy, values, departure, None, [])
        assert facts.finite == finite
        assert (facts.logged, facts.ess, facts.calibrated) == (1.0, 100.0, True)
        assert facts.rare == pytest.approx(0.03)


@pytest.fixture(scope="module")
def vectors(minari_root, pendulum, tmp_path_factory):
    env = gym.make("Pendulum-v1", max_episode_steps=100)
    heldout = random_episodes(env, 4, seed=50)
    minari.create_dataset_from_buffers("test/assess/vectors-v0", heldout, env=env, data_format="hdf5")
    script, runs = load_script("offline/td3_bc.py"), tmp_path_factory.mktemp("vectors")
    script.train(script.parse_config(short(pendulum, runs, normalize_rewards="true", reward_shift=-1)))
    return pendulum, "test/assess/vectors-v0", runs / f"offline/td3_bc/{pendulum}/default/seed-0"


def test_the_page_of_vectors(vectors, tmp_path, capsys):
    name, heldout, run = vectors
    assert assess.main(options(name, run, heldout=heldout, output=tmp_path)) == 0, capsys.readouterr().err
    text = (tmp_path / "assessment.md").read_text()
    labels = ["td3\\_bc, default, seed 0", assess.CLONE]
    assert [row[0] for row in table_under(text, "")[1:]] == labels
    assert "canary" not in [row[1] for row in table_under(text, "")]
    assert "action 0" in text
    assert "Propensities: of a clone" in text
    own = table_under(text, "Where a policy departs from the log")[-1]
    assert own[0] == assess.LOGGED


def test_losses_are_the_learners_on_rewards_scaled_as_its_log(vectors):
    """TD3+BC's critic loss on the held-out rows, with the reward scale of the log that it learned from."""
    name, heldout, run = vectors
    log, judge = assess.Log(name), assess.Log(heldout)
    policy = assess.open_policy(run, False)
    script = policy.script
    episodes, _ = script.read_episodes(judge.dataset)
    scale = 1000 / np.ptp(log.returns)
    for episode in episodes:
        episode["rewards"] = np.float32(scale * episode["rewards"] - 1)
    data = script.transitions(episodes, policy.learner.scaler)
    losses = []

    def critic_loss(batch):
        losses.append({key: column.numpy() for key, column in batch.items()})
        return [torch.tensor(7.0)]

    spied = copy.copy(policy.learner)
    spied.critic_loss = critic_loss
    found = assess.learner_losses(dataclasses.replace(policy, learner=spied), log, judge, seed=0)
    assert found == {"critic_loss": 7.0}
    np.testing.assert_allclose(losses[0]["rewards"], data["rewards"].numpy(), rtol=1e-5)
    np.testing.assert_array_equal(losses[0]["observations"], data["observations"].numpy())
    given = policy.learner.act(judge.observations) / 2  # of [-2, 2]
    error = assess.imitation_error(policy, judge, seed=0)
    assert error == pytest.approx(float(((given - judge.actions) ** 2).mean()), rel=1e-4)


def test_discounts_of_the_runs_have_to_agree():
    policies = [assess.Policy("p", None, info={"config": {"discount": value}}) for value in (0.9, 0.99)]
    assert assess.choose_discount(policies[:1], None) == 0.9
    assert assess.choose_discount(policies, 1.0) == 1.0
    with pytest.raises(assess.UserError, match=r"0\.9, 0\.99: choose one"):
        assess.choose_discount(policies, None)
    assert assess.choose_discount([assess.Policy("p", None, info={"config": {}})], None) == 1.0


LOSSES = [  # (family, script, loss) of every learner that has one
    (path.parent.name, path.stem, loss)
    for family in ("offline", "discrete")
    for path in sorted((ROOT / "algorithms" / family).glob("*.py"))
    for loss in ("critic_loss", "value_loss")
    if f"def {loss}(self" in path.read_text()
]


@pytest.mark.parametrize(("family", "name", "loss"), LOSSES)
def test_every_loss_can_be_asked_for(family, name, loss):
    """Of a batch alone, or with what `target_q` says of it, as `update` asks."""
    script = load_script(f"{family}/{name}.py")
    function = getattr(learner_class(script), loss)
    parameters = [*inspect.signature(function).parameters.values()][1:]
    needed = [each.name for each in parameters if each.default is each.empty]
    assert needed in (["batch"], ["batch", "q"])
    assert "q" not in needed or hasattr(learner_class(script), "target_q")


def test_a_value_loss_is_given_the_targets_q():
    """IQL's expectile loss of Q'(s, a), the target critic's, in the data's choices."""
    script = load_script("discrete/iql.py")
    torch.manual_seed(0)
    encoder = script.Encoder(np.zeros(3), np.ones(3), 0, 0, 4, 0)
    learner = script.DiscreteIQL(script.Config(hidden_dim=8, expectile=0.9), encoder)
    for parameter in learner.target_critic.parameters():
        parameter.data.mul_(3)  # another than the critic
    actions = torch.tensor([2, 0, 3])
    batch = {"observations": torch.randn(3, 3), "actions": actions}
    q = learner.target_critic(batch["observations"]).detach().numpy()[np.arange(3), actions]
    u = q - learner.value(batch["observations"]).detach().numpy()[:, 0]
    wanted = np.mean(np.where(u < 0, 0.1, 0.9) * u**2)
    assert assess.own_loss(learner, "value_loss", batch).item() == pytest.approx(wanted, rel=1e-5)
