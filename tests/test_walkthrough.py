"""docs/walkthrough.md: its commands are run with few batches and updates; the plant is what it says it is."""

import importlib
import json
import re
import shlex
import sys

import minari
import numpy as np
import onnxruntime
import pandas as pd
import plant
import pytest
from conftest import ROOT, load_script

PAGE = ROOT / "docs/walkthrough.md"
SMALL = {  # what the page says -> what the test does
    "--updates": "30",
    "--clone_updates": "30",
    "--fit_episodes": "20",
}
ADDED = {  # to the commands of a script
    "log": ["--batches", "240"],
    "truth": ["--batches", "50"],
    "live": ["--batches", "60"],
    "shadow": [
        "--min_episodes=10",
        "--min_ess=1",
        "--margin=5",
        "--clone_updates=30",
        "--max_gap=1",
        "--stage_episodes=60",
        "--hidden_dim=8",
        "--handover_episodes=100",
    ],
    "assess": ["--resamples", "20"],
}


def commands() -> list[list[str]]:
    """The page's commands, in order, as lists of words."""
    text = PAGE.read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^    \.venv/bin/python (.+)$", text, re.MULTILINE)]


def shorten(words: list[str]) -> list[str]:
    """The same with small numbers."""
    words = [SMALL.get(before, word) for before, word in zip(["", *words], words)]
    name = words[1] if words[0] == "tools/plant.py" else re.sub(r".*/|\.py", "", words[0])
    return [*words, *ADDED.get(name, [])]


@pytest.fixture
def execute(tmp_path, minari_root, monkeypatch, capsys):
    """execute(words) runs a command in this process, in a folder like the repository's root: what it says."""
    for name in ("algorithms", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", words)
        if words[0].startswith("tools/"):
            module = importlib.import_module(words[0][len("tools/") : -len(".py")])
            takes_none = not module.main.__code__.co_argcount
            status = module.main() if takes_none else module.main(words[1:])
        else:
            script = load_script(words[0].removeprefix("algorithms/"))
            action = next(name for name in ("import_log", "deploy", "train") if hasattr(script, name))
            status = script.main(getattr(script, action))
        out, err = capsys.readouterr()
        assert not status, err
        return out

    return run


def test_the_whole_path(execute, tmp_path):
    """Every command of the page, in order; what each leaves is what the next one takes."""
    said = [execute(shorten(words)) for words in commands()]
    log, heldout = (minari.load_dataset(f"plant/{name}-v0") for name in ("log", "log-heldout"))
    names = ["temperature", "water", "conversion", "shift=day", "shift=night"]
    assert [*log.storage.metadata["observation_columns"]] == names
    assert log.action_space.n == 6
    total = log.total_episodes + heldout.total_episodes
    assert heldout.total_episodes == pytest.approx(0.2 * total, abs=1)

    page = (tmp_path / "assessment/assessment.md").read_text()
    assert all(f"{name}, default, seed 0" in page for name in ("bc", "cql", "iql"))
    known = onnxruntime.InferenceSession("gentle.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(known["action_names"]) == [*log.storage.metadata["action_names"]]
    assert any("gentle.onnx: 0." in text for text in said)

    file = tmp_path / "results/runs/evaluate/shadow/plant/later-v0/default/seed-0/decisions.csv"
    decisions = pd.read_csv(file)
    live = minari.load_dataset("plant/live-v0")
    drawn = [int(episode.infos["canary"][0]) for episode in live.iterate_episodes()]
    returns = [episode.rewards.sum() for episode in live.iterate_episodes()]
    seen = decisions[decisions["phase"] != "shadow"]
    assert live.total_episodes == len(seen) == 60
    assert seen["canary"].tolist() == drawn
    assert seen["value"].to_numpy() == pytest.approx(returns)
    assert set(seen["lot"]) == {0.1}

    again = [words for words in map(shorten, commands()) if "live" in words or "--live" in words]
    for words in again:
        execute(words)
    assert minari.load_dataset("plant/live-v0").total_episodes == 120
    assert pd.read_csv(file)["lot"].iloc[-1] == decisions["next_share"].iloc[-1]


def steps_of(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The steps that another one follows in their batch, and those that follow them."""
    rows = rows.sort_values(["batch", "time"], ignore_index=True)
    inside = rows.index[rows["batch"].eq(rows["batch"].shift(-1))]
    return rows.loc[inside].reset_index(drop=True), rows.loc[inside + 1].reset_index(drop=True)


def test_the_plant_does_what_its_equations_say():
    rows = plant.run_batches(plant.operator, 300, np.random.default_rng(3))
    now, after = steps_of(rows)
    k = 0.02 + 0.04 * np.exp(-(((now["temperature"] - 80) / 12) ** 2))
    assert (after["conversion"] - now["conversion"]).to_numpy() == pytest.approx(k.to_numpy())  # (1)
    v, f = now["valve"].map({"shut": 0, "half": 0.5, "open": 1}), now["fan"].eq("on")
    cooled = (0.02 + 0.12 * v + 0.04 * f) * (now["temperature"] - now["water"])
    noise = after["temperature"] - (now["temperature"] + 120 * k + 2 - cooled)
    assert abs(noise.mean()) < 4 * 0.8 / np.sqrt(len(noise))  # (2)
    assert noise.std() == pytest.approx(0.8, rel=0.05)
    sold = k / (1 + np.exp((now["temperature"] - 88) / 2))
    assert now["margin"].to_numpy() == pytest.approx((sold - 0.004 - 0.006 * (v + f)).to_numpy())  # (3)
    assert not now["finished"].any()
    last = rows.groupby("batch").tail(1)
    assert len(last) == 300
    assert last["finished"].all()  # (4)


def test_a_batch_that_gets_too_hot_is_lost():
    never = plant.run_batches(
        lambda seen, rng: (np.zeros(50, int), np.zeros(50, int)), 50, np.random.default_rng(0)
    )
    last = never.groupby("batch").tail(1)
    assert last["finished"].all()
    assert last["conversion"].max() < 0.9


def test_the_log_has_what_logs_have(tmp_path):
    plant.write_log(tmp_path / "log.csv", 2000, seed=1)
    log = pd.read_csv(tmp_path / "log.csv", parse_dates=["time"])
    assert log["time"].is_monotonic_decreasing
    assert set(log["shift"]) == {"day", "night"}
    for column, share in plant.LOST_CELLS.items():
        assert log[column].isna().mean() == pytest.approx(share, abs=4 * np.sqrt(share / len(log)))
    gaps = -log.groupby("batch")["time"].diff().dt.total_seconds()
    assert set(gaps.dropna()) == {900, 3600}
    assert (gaps == 3600).sum() == pytest.approx(2000 * plant.GAPS, rel=0.5)


def test_no_share_no_live_batches(tmp_path):
    (tmp_path / "decisions.csv").write_text("next_share\n0.1\n0.0\n")
    with pytest.raises(plant.UserError, match="allows no share"):
        plant.go_live("plant/none-v0", "none.onnx", tmp_path / "decisions.csv", 5, 0)
