"""tools/tune.py: what is tried, what is recorded of it, how it goes on, and what it says."""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest.register_assert_rewrite("test_benchmark")
from test_benchmark import folders, write_config, write_toys  # noqa: E402

# What the search needs of Optuna, with proposals in order instead of clever ones: 1/4, 2/4, 3/4 of a range.
STUB = '''\
import json, os
from types import SimpleNamespace

WARNING = 0
def note(*facts):
    with open(os.environ["NOTES"], "a") as file:
        print(json.dumps(facts), file=file)
class Number:
    def __init__(self, low, high, log=False):
        self.low, self.high, self.log = low, high, log
        note(type(self).__name__, low, high, log)
    def at(self, number):
        return self.kind(self.low + (number % 3 + 1) / 4 * (self.high - self.low))
class Float(Number):
    kind = float
class Int(Number):
    kind = int
class Categorical:
    def __init__(self, choices):
        self.choices = choices
    def at(self, number):
        return self.choices[number % len(self.choices)]
distributions = SimpleNamespace(
    FloatDistribution=Float, IntDistribution=Int, CategoricalDistribution=Categorical)
logging = SimpleNamespace(set_verbosity=lambda level: None, WARNING=0)
samplers = SimpleNamespace(TPESampler=lambda seed: note("seed", seed))
trial = SimpleNamespace(TrialState=SimpleNamespace(FAIL="fail"),
                        create_trial=lambda params, distributions, value: (params, value))
class Study:
    count = 0
    def add_trial(self, known):
        self.count += 1
        note("add", *known)
    def ask(self, spaces):
        self.count += 1
        return SimpleNamespace(params={name: space.at(self.count - 1) for name, space in spaces.items()})
    def tell(self, trial, value=None, state=None):
        note("tell", trial.params, value, state)
def create_study(direction, sampler):
    note(direction)
    return Study()
'''


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A repository of toys, whose score is ten times their note, plus the seed."""
    write_toys(tmp_path)
    shutil.copy(ROOT / "tools/tune.py", tmp_path / "tools")
    shutil.copy(ROOT / "requirements-tune.txt", tmp_path)
    for algorithm in ("toy", "tot"):
        write_config(tmp_path, f"offline/{algorithm}/test/one-v0", dataset="test/one-v0")
        script = tmp_path / f"algorithms/offline/{algorithm}.py"
        text = script.read_text().replace("eval_every: int = 5000", "eval_every: int = 2")
        text = text.replace("    flag:", "    eval_episodes: int = 10\n    flag:")
        text = text.replace("flag: bool = True", "flag: bool = True\n    final_eval_episodes: int = 100")
        script.write_text(text)
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/optuna.py").write_text(STUB)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    return tmp_path


@pytest.fixture
def tune(root):
    """tune("--trials", 3, ...) searches `note` for toy: a CompletedProcess."""

    def tune(*arguments: object, path: str = "stub", search=("note=1:3",), algorithm="toy", **options):
        command = [sys.executable, root / "tools/tune.py", algorithm, "test/one-v0", "--search", *search]
        command += ["--updates", 3, "--output_dir", root / "results/runs", *arguments]
        environ = os.environ | {"PYTHONPATH": str(root / path)}
        return subprocess.run([*map(str, command)], cwd=root, env=environ, text=True, capture_output=True,
                              check=False, timeout=100)

    return tune


def table(root: Path) -> list[dict]:
    with open(root / "results/runs/tune/offline/toy/test/one-v0.csv", newline="") as lines:
        return list(csv.DictReader(lines))


def notes(root: Path, kind: str) -> list[list]:
    rows = [json.loads(line) for line in (root / "notes").read_text().splitlines()]
    return [row[1:] for row in rows if row[0] == kind]


def test_every_trial_is_recorded_with_its_budget(root, tune):
    done = tune("--trials", 3, "--seeds", 2)
    assert (done.returncode, done.stderr) == (0, "")
    rows = table(root)
    assert [(row["trial"], row["note"], float(row["score"])) for row in rows] == [
        ("0", "1.5", 15.5), ("1", "2.0", 20.5), ("2", "2.5", 25.5)]  # the mean of seeds 0 and 1
    for row in rows:
        assert float(row["spread"]) == pytest.approx(0.5**0.5)
        assert (row["state"], row["seeds"], row["updates"]) == ("finished", "2", "3")
        assert row["search"] == "note=1:3"
        assert row["episodes"] == str(2 * (2 * 10 + 100))  # after updates 2 and 3, and the final one
        assert float(row["seconds"]) == 2 * 2 * 3
        assert row["variant"] == f"tune-3-note-{row['note']}"
    assert folders(root) == {f"offline/toy/test/one-v0/tune-3-note-{note}/seed-{seed}"
                             for note in ("1.5", "2.0", "2.5") for seed in (0, 1)}
    assert [values[1:] for values in notes(root, "tell")] == [[15.5, None], [20.5, None], [25.5, None]]
    assert "maximize" in (root / "notes").read_text()
    best = done.stdout.split("the best:\n")[1].splitlines()
    assert [line.split() for line in best[:3]] == [
        ["25.50", "tune-3-note-2.5"], ["20.50", "tune-3-note-2.0"], ["15.50", "tune-3-note-1.5"]]
    assert "They took 18 updates, 0.0 hours of training and evaluation, and 720 episodes" in done.stdout
    assert "Choosing with the simulator is not offline learning" in done.stdout


def test_more_trials_go_on_from_the_table(root, tune):
    assert tune("--trials", 1).returncode == 0
    first = table(root)
    (root / "notes").unlink()
    assert tune("--trials", 3).returncode == 0
    assert table(root)[:1] == first
    assert [row["note"] for row in table(root)] == ["1.5", "2.0", "2.5"]
    assert notes(root, "add") == [[{"note": 1.5}, 15.0]]
    assert notes(root, "seed") == [[1]]
    launched = [len(file.read_text().splitlines()) for file in root.rglob("launches")]
    assert launched == [1, 1, 1]
    assert tune("--trials", 3).stdout.startswith("3 trials, 0 of which failed")  # nothing to do


def test_ranges(root, tune):
    search = ["note=0.1:10:log", "fails=0:8", "flag=true,false"]
    done = tune("--trials", 2, "--set", "wandb_mode=disabled", search=search)
    assert done.returncode == 0, done.stderr
    assert notes(root, "Float") == [[0.1, 10.0, True]]
    assert notes(root, "Int") == [[0, 8, False]]
    rows = table(root)
    assert [(row["fails"], row["flag"], row["note"]) for row in rows] == [
        ("2", "True", "2.58"), ("4", "False", "5.05")]  # three digits of 2.575
    info = json.loads(next(root.rglob("run.json")).read_text())
    assert info["config"]["wandb_mode"] == "disabled"


def test_a_failed_trial_is_recorded_and_costs_its_turn(root, tune):
    """And Optuna hears that it failed."""
    done = tune("--trials", 2, search=["fails=0,3"])
    assert done.returncode == 0, done.stderr
    assert [(row["state"], row["score"]) for row in table(root)] == [("finished", "10"), ("failed", "")]
    assert [values[1:] for values in notes(root, "tell")] == [[10.0, None], [None, "fail"]]
    assert "2 trials, 1 of which failed" in done.stdout
    assert "tune-3-fails-3/seed-0/log.txt" in done.stdout


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2
    assert done.stderr.startswith("tune.py: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_errors_are_one_line(root, tune):
    (root / "blocked").mkdir()
    (root / "blocked/optuna.py").write_text("raise ImportError")
    assert_refused(tune(path="blocked"), "not installed", "pip install -r", "requirements-tune.txt")
    unclear = ["note", "note=", "note=3:1", "note=1:inf", "note=0:1:log", "note=1:2:linear", "note=a:b"]
    for word in [*unclear, "note=1:2:log:3"]:
        assert_refused(tune(search=[word]), f"--search: {word} is none of")
    assert_refused(tune(search=["nose=1:2"]), "unknown field nose: did you mean note?")
    assert_refused(tune(search=["fails=0.5:2"]), "fails: 0.5 is no int")
    assert_refused(tune(algorithm="tox"), "there is no offline/tox")
    assert not (root / "results").exists()
    assert tune("--trials", 1).returncode == 0
    assert_refused(tune("--trials", 2, search=["note=1:4"]), "another search", "note=1:3", "--output_dir")
    assert_refused(tune("--trials", 2, "--seeds", 2), "another search, seeds 1, not 2")


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="Optuna is optional")
def test_optuna_itself(root, tune):
    path = os.environ.get("PYTHONPATH", "")
    search = ["note=1:3:log", "fails=0,0", "flag=true,false"]
    for trials in (4, 7):
        done = tune("--trials", trials, search=search, path=path)
        assert done.returncode == 0, done.stderr
        assert len(table(root)) == trials
    assert len({row["note"] for row in table(root)}) == 7
