"""Runs: killed or not, they end in the same bits; and what their folders say of them."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, load_script, random_episodes, short

SCRIPTS = ("bc", "td3_bc", "iql")
NEVER = ("never", 0)
SPEED = ["time/updates_per_second", "time/wall_seconds"]


def place(runs: Path, name: str, dataset: str, variant: str = "default", seed: int = 0) -> Path:
    return runs / "offline" / name / dataset / variant / f"seed-{seed}"


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def equal(one, other) -> bool:
    """Trees of Dicts, lists and tensors, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def checkpoint(folder: Path) -> dict:
    """All but the history: metrics have clocks in them, and evaluations.csv is compared as it is."""
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    del content["history"]
    return content


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "evaluations.csv").read_bytes() == (other / "evaluations.csv").read_bytes()
    assert equal(checkpoint(one), checkpoint(other))
    tables = [pd.read_csv(folder / "metrics.csv") for folder in (one, other)]
    assert all((np.diff(table["update"]) > 0).all() for table in tables)
    pd.testing.assert_frame_equal(*[table.drop(columns=SPEED) for table in tables])
    for key in ("score", "return_mean", "return_std", "config_hash", "dataset_hash", "status"):
        assert record(one)[key] == record(other)[key]


@pytest.fixture(scope="module")
def brief(minari_root) -> list[str]:
    """Ids of two datasets of a pendulum with episodes of 10 steps and no reference scores."""
    env, ids = gym.make("Pendulum-v1", max_episode_steps=10), ["test/brief/random-v0", "test/brief/random-v1"]
    for number, name in enumerate(ids):
        episodes = random_episodes(env, 4, seed=10 * number)
        minari.create_dataset_from_buffers(name, episodes, env=env, data_format="hdf5")
    return ids


@pytest.fixture(scope="module")
def finished(scripts, pendulum, tmp_path_factory) -> Path:
    """An output folder with a finished run of each of SCRIPTS."""
    folder = tmp_path_factory.mktemp("finished")
    for script in map(scripts.get, SCRIPTS):
        script.train(script.parse_config(short(pendulum, folder)))
    return folder


@pytest.fixture
def runs(finished, tmp_path) -> Path:
    """A copy of `finished` to go on with."""
    return shutil.copytree(finished, tmp_path / "runs")


# ---------------------------------------------- killed runs ----------------------------------------------


def die_at(script, kind: str, number: int) -> None:
    """From now on the `number`-th moment of a kind is this process's last.

    Kinds: "update"; "step" of an evaluation; "final" evaluation; "rename" of a file that is written whole;
    and a file's name: half of it is written.
    """
    moments = itertools.count(1)

    def mortal(function, kind_of):
        def call(first, *others):
            if kind_of(first, *others) == kind and next(moments) == number:
                if function is write:
                    function(first, others[0][: len(others[0]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(first, *others)

        return call

    write = Path.write_bytes
    final = lambda algorithm, environments, episodes, seed: "final" if seed[-1] else "training"  # noqa: E731
    Path.write_bytes = mortal(write, lambda path, content: path.name.removesuffix(".new"))
    Path.replace = mortal(Path.replace, lambda path, target: "rename")
    script.evaluate = mortal(script.evaluate, final)
    script.Algorithm.update = mortal(script.Algorithm.update, lambda algorithm, batch: "update")
    step = gym.vector.SyncVectorEnv.step
    gym.vector.SyncVectorEnv.step = mortal(step, lambda environments, actions: "step")


def play(whole: list[tuple], torn: list[tuple], folder: Path) -> None:
    """Runs (name of a script, arguments) in this process, then (name, arguments, death) each in a fork of it.

    So the forks have what the first runs imported and compiled.
    """
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # forks lose both
    torch.set_num_threads(1)
    codes = []
    with open(folder / "log", "w", buffering=1) as log:
        sys.stdout = sys.stderr = log
        for name, arguments, *death in [*whole, *torn]:
            script, sys.argv = load_script(f"offline/{name}.py"), [f"{name}.py", *arguments]
            if not death:
                script.main(script.train)
            elif pid := os.fork():
                codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            else:
                with contextlib.suppress(SystemExit):
                    die_at(script, *death[0])
                    script.main(script.train)
                    os._exit(0)
                os._exit(2)
    (folder / "codes").write_text(json.dumps(codes))


def codes(whole: list[tuple], torn: list[tuple], folder: Path) -> list[int]:
    """Exit codes of the torn runs, played by a process of its own, which has no threads."""
    spawn = multiprocessing.get_context("spawn")
    stage = spawn.Process(target=play, args=(whole, torn, folder), daemon=True)
    stage.start()
    stage.join(500)
    assert stage.exitcode == 0, (folder / "log").read_text()
    return json.loads((folder / "codes").read_text())


@pytest.fixture(scope="module")
def killed(brief, tmp_path_factory) -> Path:
    """An output folder with two runs of every script: `whole`, and `killed` six times and then left to end.

    Evaluations and checkpoints keep different time, so that both happen between two of the other. From the
    fourth death on IQL's logs and checkpoints come at other updates than before.
    """
    folder, whole, torn = tmp_path_factory.mktemp("killed"), [], []
    for name in SCRIPTS:
        draw = random.Random(name).randint
        deaths = [
            ("rename", draw(1, 6)),
            ("update", draw(21, 45)),
            ("step", draw(1, 10)),
            ("checkpoint.pt", draw(1, 2)),
            (("metrics.csv", "evaluations.csv", "run.json")[draw(0, 2)], 1),
            ("final", 1),
            NEVER,
        ]
        for number, death in enumerate(deaths):
            other = {"log_every": 7, "checkpoint_every": 33} if name == "iql" and number > 3 else {}
            fields = {"updates": 100, "eval_every": 15} | other
            torn.append((name, short(brief[0], folder, variant="killed", **fields), death))
        whole.append((name, short(brief[0], folder, variant="whole", updates=100, eval_every=15)))
    expected = [0 if death is NEVER else -signal.SIGKILL for *_, death in torn]
    assert codes(whole, torn, folder) == expected, (folder / "log").read_text()
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_killed_again_and_again_ends_in_the_same_bits(killed, brief, name):
    whole, torn = [place(killed, name, brief[0], variant) for variant in ("whole", "killed")]
    assert (whole / "evaluations.csv").read_bytes() == (torn / "evaluations.csv").read_bytes()
    assert equal(checkpoint(whole), checkpoint(torn))
    assert checkpoint(whole)["updates"] == 100
    tables = [pd.read_csv(folder / "metrics.csv").drop(columns=SPEED) for folder in (whole, torn)]
    assert all((np.diff(table["update"]) > 0).all() for table in tables)
    if name != "iql":
        pd.testing.assert_frame_equal(*tables)
    for folder in (whole, torn):
        assert record(folder)["status"] == "finished"
        assert not list(folder.glob("*.new"))
    for key in ("score", "return_mean", "return_std", "best_score", "dataset_hash"):
        assert record(whole)[key] == record(torn)[key]


def test_the_killed_runs_went_on_from_their_checkpoints(killed):
    """Not from the start: that would end in the same bits too."""
    lines = (killed / "log").read_text().splitlines()
    resumed = [int(line.split()[-1]) for line in lines if line.startswith("resumed at update")]
    assert len(resumed) >= 3 * 4
    assert resumed.count(100) == 3  # after the death in the final evaluation
    assert {*resumed} >= {20, 100}
    assert not [line for line in lines if "not the same bits" in line]


def test_a_compiled_run_killed_ends_in_the_same_bits(brief, tmp_path):
    fields = {"updates": 60, "eval_every": 15, "compile": "true"}
    whole = [("td3_bc", short(brief[0], tmp_path, **fields, variant="whole"))]
    arguments = short(brief[0], tmp_path, **fields, variant="killed")
    torn = [("td3_bc", arguments, ("update", random.Random(0).randint(21, 59))), ("td3_bc", arguments, NEVER)]
    assert codes(whole, torn, tmp_path) == [-signal.SIGKILL, 0], (tmp_path / "log").read_text()
    whole, torn = [place(tmp_path, "td3_bc", brief[0], variant) for variant in ("whole", "killed")]
    assert record(whole)["compiled"]
    assert record(torn)["compiled"]
    assert (whole / "evaluations.csv").read_bytes() == (torn / "evaluations.csv").read_bytes()
    assert equal(checkpoint(whole), checkpoint(torn))


def test_interrupted_and_killed_processes_of_their_own(pendulum, tmp_path):
    """The status stays running; what there is, is whole; Ctrl-C says how to go on."""
    folder, updates = place(tmp_path, "td3_bc", pendulum), [0]
    script = [sys.executable, ROOT / "algorithms/offline/td3_bc.py"]
    command = [*script, *short(pendulum, tmp_path, updates=1_000_000, eval_every=50)]
    for signal_number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        before, deadline = updates[-1], time.monotonic() + 300
        while updates[-1] <= before + 20:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
            updates.append(checkpoint(folder)["updates"] if (folder / "checkpoint.pt").exists() else 0)
        process.send_signal(signal_number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert out.count("resumed at update") == bool(before)
        if signal_number == signal.SIGINT:
            assert err == "td3_bc.py: interrupted; the same command goes on from what is saved\n"
        assert record(folder)["status"] == "running"
        assert checkpoint(folder)["updates"] >= updates[-1]
        assert pd.read_csv(folder / "metrics.csv")["update"].is_monotonic_increasing
        assert (pd.read_csv(folder / "evaluations.csv").groupby("update").size() == 3).all()


# ---------------------------------------- finished and longer runs ----------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_finished_run_prints_its_score_and_does_nothing(call, scripts, pendulum, runs, monkeypatch, name):
    monkeypatch.setattr(scripts[name], "load_dataset", None)  # not even the data are read
    folder = place(runs, name, pendulum)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    other = {"log_every": 1, "checkpoint_every": 1, "device": "cpu", "threads": 2, "wandb_project": "other"}
    status, out, err = call(name, *short(pendulum, runs, **other))
    assert (status, err) == (0, "")
    assert out == f"{folder} is finished: {record(folder)['result']}\n"
    assert f"score {record(folder)['score']:.1f}, return {record(folder)['return_mean']:.1f}" in out
    assert f"chosen with the simulator: {record(folder)['best_score']:.1f})" in out
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["bc", "td3_bc"])
def test_more_updates_continue_a_finished_run(call, pendulum, runs, tmp_path, name):
    """From 40 to 80: the bits of a run of 80. Clocks go on from where they stood."""
    folder, clock = place(runs, name, pendulum), "time/wall_seconds"
    content = torch.load(folder / "checkpoint.pt")
    content["history"]["metrics"][-1][clock] += 1000
    torch.save(content, folder / "checkpoint.pt")
    status, out, _ = call(name, *short(pendulum, runs, updates=80))
    assert status == 0
    assert "resumed at update 40\n" in out
    assert "not the same bits" not in out
    assert call(name, *short(pendulum, tmp_path / "long", updates=80))[0] == 0
    assert_same_run(folder, place(tmp_path / "long", name, pendulum))
    assert yaml.safe_load((folder / "config.yaml").read_text())["updates"] == 80
    assert record(folder)["config"]["updates"] == 80
    assert pd.read_csv(folder / "metrics.csv")[clock].is_monotonic_increasing
    assert 1000 < record(folder)["wall_seconds"] < 1100
    assert 0 < record(folder)["updates_per_second"] < 100_000


def test_a_resume_under_other_circumstances_says_so(call, pendulum, runs):
    folder = place(runs, "bc", pendulum)
    info = record(folder)
    info["versions"]["torch"], info["dataset_hash"] = "1.0", "abc"
    (folder / "run.json").write_text(json.dumps(info))
    status, out, _ = call("bc", *short(pendulum, runs, updates=60, threads=2))
    said = [line for line in out.splitlines() if line.startswith("resumed with")]
    assert status == 0
    assert len(said) == 3
    assert "resumed with threads 2, begun with 1: not the same bits" in said
    assert any("versions" in line and "1.0" in line for line in said)
    assert any("dataset_hash" in line and "begun with abc" in line for line in said)
    assert record(folder)["threads"] == 2


def test_a_run_that_fails_says_so_and_goes_on_later(call, scripts, pendulum, finished, tmp_path, monkeypatch):
    evaluate, folder = scripts["bc"].evaluate, place(tmp_path, "bc", pendulum)

    def fail(act, environments, episodes, seed):
        if seed[1] == 40:
            raise ValueError("the simulator is out of order")
        return evaluate(act, environments, episodes, seed)

    monkeypatch.setattr(scripts["bc"], "evaluate", fail)
    with pytest.raises(ValueError, match="out of order"):
        call("bc", *short(pendulum, tmp_path))
    assert (record(folder)["status"], record(folder)["result"]) == ("failed", "the simulator is out of order")
    monkeypatch.setattr(scripts["bc"], "evaluate", evaluate)
    assert call("bc", *short(pendulum, tmp_path))[0] == 0
    assert_same_run(folder, place(finished, "bc", pendulum))


# ------------------------------------------------ the record ------------------------------------------------


def test_tables_without_a_row_can_be_read(call, scripts, pendulum, tmp_path, monkeypatch):
    """As they are until the first logs, for whoever looks at a run under way."""

    def interrupt(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(scripts["bc"], "draw_batches", interrupt)
    assert call("bc", *short(pendulum, tmp_path))[0] == 130
    folder = place(tmp_path, "bc", pendulum)
    assert record(folder)["status"] == "running"
    for name in ("metrics", "evaluations"):
        table = pd.read_csv(folder / f"{name}.csv")
        assert (len(table), table.columns[0]) == (0, "update")


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_run_folder_holds(scripts, finished, pendulum, name):
    folder = place(finished, name, pendulum)
    files = {"config.yaml", "run.json", "metrics.csv", "evaluations.csv", "checkpoint.pt", "lock"}
    assert {path.name for path in folder.iterdir()} == files
    config = scripts[name].parse_config(short(pendulum, finished))
    assert scripts[name].parse_config([f"--config_path={folder}/config.yaml"]) == config
    info = record(folder)
    assert info["config"] == vars(config)
    assert info["status"] == "finished"
    assert (info["transitions"], info["clipped_actions"]) == (1000, 0.0)
    assert (info["threads"], info["compiled"]) == (1, False)
    assert info["device"].startswith("cpu: ")
    assert len(info["device"]) > len("cpu: ")
    assert info["versions"]["torch"] == torch.__version__
    packages = {"python", "torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari"}
    assert set(info["versions"]) == packages
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    assert info["commit"].removesuffix("+") == head

    evaluations, metrics = pd.read_csv(folder / "evaluations.csv"), pd.read_csv(folder / "metrics.csv")
    assert [*evaluations] == ["update", "phase", "episode", "return", "length", "success"]
    counts = evaluations.groupby(["update", "phase"]).size()
    assert counts.to_dict() == {(20, "training"): 3, (40, "training"): 3, (40, "final"): 12}
    assert metrics.columns[0] == "update"
    assert metrics["update"].tolist() == [10, 20, 30, 40]
    means = evaluations[evaluations["phase"] == "training"].groupby("update")["return"].mean()
    shown = metrics.set_index("update")["eval/return_mean"].dropna()
    assert shown.to_dict() == pytest.approx(means.to_dict())
    final = evaluations[evaluations["phase"] == "final"]["return"]
    assert info["return_mean"] == pytest.approx(final.mean())
    assert info["return_std"] == pytest.approx(final.std(ddof=0))
    assert info["length_mean"] == 100
    assert info["success"] is None  # the pendulum knows none
    assert info["score"] == pytest.approx(100 * (final.mean() + 1000) / 900)  # of the dataset's references
    assert info["best_score"] == pytest.approx(100 * (means.max() + 1000) / 900)
    assert 0 < info["wall_seconds"] < 100
    assert info["updates_per_second"] == pytest.approx(metrics["time/updates_per_second"].median())
    expected = {"actor/loss", "actor/support_gap", *SPEED}
    expected |= {f"eval/{key}" for key in ("score", "return_mean", "return_std", "length_mean", "success")}
    assert expected | ({"critic/loss", "critic/q_mean"} if name != "bc" else set()) <= {*metrics}


def test_the_commit_of_the_script(tmp_path):
    """None outside of any repository; where files differ from it there is a mark."""
    path = tmp_path / "algorithms/bc.py"
    path.parent.mkdir()
    shutil.copy(ROOT / "algorithms/offline/bc.py", path)
    spec = importlib.util.spec_from_file_location("reef_copy_of_bc", path)
    copy = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    commit = lambda: copy.provenance(torch.device("cpu"))["commit"]  # noqa: E731
    assert commit() == ""

    def git(*words: str) -> str:
        identity = ["-c", "user.name=Reef", "-c", "user.email=reef@localhost"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    git("add", "algorithms")
    git("commit", "--message", "one")
    git("tag", "--annotate", "v1", "--message", "v1")  # does not hide the commit
    assert commit() == git("rev-parse", "HEAD")
    path.write_text(path.read_text() + "\n# a change\n")
    assert commit() == git("rev-parse", "HEAD") + "+"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_checkpoint_holds_everything(scripts, finished, pendulum, name):
    content = torch.load(place(finished, name, pendulum) / "checkpoint.pt", weights_only=True)
    parts = {
        "bc": {"units", "actor", "actor_optimizer"},
        "td3_bc": {"units", "actor", "critic", "target_actor", "target_critic"},
        "iql": {"units", "actor", "critic", "value", "target_critic", "actor_schedule", "value_optimizer"},
    }
    optimizers = {"actor_optimizer"} | ({"critic_optimizer"} if name != "bc" else set())
    assert set(content["state"]) == parts[name] | optimizers
    assert set(content) == {"updates", "state", "history", "rng"}
    assert content["updates"] == 40
    steps = {int(entry["step"]) for entry in content["state"]["actor_optimizer"]["state"].values()}
    assert steps == {20 if name == "td3_bc" else 40}


# ------------------------------------------- every field counts -------------------------------------------

OTHER = {  # another value of every field that is not a switch
    "seed": 1,
    "variant": "other",
    "updates": 24,
    "batch_size": 17,
    "discount": 0.5,
    "tau": 0.5,
    "actor_lr": 0.01,
    "critic_lr": 0.01,
    "value_lr": 0.01,
    "hidden_dim": 9,
    "hidden_layers": 1,
    "alpha": 1.0,
    "policy_noise": 0.9,
    "noise_clip": 0.01,
    "policy_delay": 1,
    "fraction": 0.5,
    "expectile": 0.9,
    "beta": 0.5,
    "dropout": 0.5,
    "reward_scale": 2.0,
    "reward_shift": 1.0,
    "environment": "Pendulum-v1",
    "ref_min": -200.0,
    "ref_max": 1.0,
    "eval_every": 5,
    "eval_episodes": 4,
    "final_eval_episodes": 5,
    "log_every": 3,
    "checkpoint_every": 6,
    "device": "auto",
    "threads": 2,
    "precision": "medium",
    "wandb_mode": "online",
    "wandb_project": "other",
}
FREE = {"device", "threads", "log_every", "checkpoint_every", "wandb_mode", "wandb_project", "output_dir"}
EVALUATION = {"environment", "eval_every", "eval_episodes", "final_eval_episodes"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_field_changes_something(scripts, brief, tmp_path, monkeypatch, name):
    """Weights, evaluations, score or what is recorded; and the hash, unless the field is free."""
    script = scripts[name]
    small = {"updates": 20, "eval_every": 10, "eval_episodes": 2, "final_eval_episodes": 3}
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    monkeypatch.setattr(script, "compile_losses", lambda *_: True)
    base = script.parse_config(short(brief[0], tmp_path / "base", **small, ref_min=-100, ref_max=0))
    others = {**OTHER, "dataset": brief[1], "output_dir": str(tmp_path / "elsewhere")}
    assert {field for field in vars(base) if type(getattr(base, field)) is not bool} <= {*others}

    def outcome(field: str | None = None) -> dict:
        changed = {"output_dir": str(tmp_path / str(field))}
        changed |= {field: others.get(field, not getattr(base, field))} if field else {}
        config = dataclasses.replace(base, **changed)
        script.train(config)
        folder = place(Path(config.output_dir), name, config.dataset, config.variant, config.seed)
        found = {key: record(folder)[key] for key in ("config_hash", "score", "compiled", "threads")}
        return found | {
            "weights": checkpoint(folder)["state"],
            "evaluations": (folder / "evaluations.csv").read_text(),
            "rows": len(pd.read_csv(folder / "metrics.csv")),
            "precision": torch.get_float32_matmul_precision(),
        }

    plain = outcome()
    for field in vars(base):
        found = outcome(field)
        same = {key for key in plain if equal(found[key], plain[key])}
        result = same & {"weights", "evaluations", "score"}
        assert ("config_hash" in same) == (field in FREE), field
        if field in {"ref_min", "ref_max"}:
            assert result == {"weights", "evaluations"}, field
        elif field in EVALUATION:
            assert "weights" in result, field
            assert "evaluations" not in result, field
        elif field in {"threads", "precision", "compile"}:
            assert {"threads": "threads", "compile": "compiled"}.get(field, field) not in same
            torch.set_num_threads(1)
        elif field in {"log_every", "checkpoint_every"}:
            assert "rows" not in same, field
            assert len(result) == 3, field
        elif field in FREE | {"variant"}:
            assert len(result) == 3 or (field == "device" and torch.cuda.is_available()), field
        else:
            assert "weights" not in result, field
    torch.set_float32_matmul_precision("highest")


def test_denormals_are_flushed(call, scripts, pendulum, tmp_path, monkeypatch):
    """Adam's first moment of an idle weight ends at 1e-45 and stays there; BCQ took 1.5 times as long."""
    learner, products = scripts["td3_bc"].Algorithm, []
    update = learner.update

    def observed(algorithm, batch):
        products.append(float(torch.tensor(1e-30) * torch.tensor(1e-10)))
        return update(algorithm, batch)

    monkeypatch.setattr(learner, "update", observed)
    assert call("td3_bc", *short(pendulum, tmp_path))[0] == 0
    assert products == [0.0] * 40


def test_the_config_hash_is_that_of_the_identity(finished, pendulum):
    info = record(place(finished, "td3_bc", pendulum))
    identity = {name: value for name, value in info["config"].items() if name not in FREE}
    assert info["config_hash"] == hashlib.sha256(json.dumps(identity).encode()).hexdigest()


# ------------------------------------------------- wandb -------------------------------------------------


class FakeWandb(ModuleType):
    """Notes what it is told; fails where it is told to."""

    def __init__(self, fail_at: str = "", fail_from: int = 1):
        super().__init__("wandb")
        self.fail_at, self.fail_from, self.options, self.calls, self.rows = fail_at, fail_from, None, 0, []

    def count(self, name: str) -> None:
        self.calls += name == self.fail_at
        if name == self.fail_at and self.calls >= self.fail_from:
            raise OSError(f"no {name} today")

    def Settings(self, **settings):
        return settings

    def init(self, **options):
        self.count("init")
        self.options = options
        return self

    def log(self, row: dict, step: int) -> None:
        self.count("log")
        self.rows.append({"step": step, **row})


def test_wandb_mirrors_the_metrics(call, pendulum, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    arguments = short(pendulum, tmp_path, wandb_mode="offline", wandb_project="pearls", seed=3)
    assert call("td3_bc", *arguments)[0] == 0
    folder = place(tmp_path, "td3_bc", pendulum, seed=3)
    *rows, last = fake.rows  # one for each row of the table, and the final evaluation
    rows = pd.DataFrame(rows)
    assert (rows.pop("step") == rows["update"]).all()
    pd.testing.assert_frame_equal(rows, pd.read_csv(folder / "metrics.csv"))
    assert last["step"] == last["update"] == record(folder)["config"]["updates"]
    assert last["final/score"] == record(folder)["score"]
    assert last["final/return_mean"] == record(folder)["return_mean"]
    options = {key: fake.options[key] for key in ("project", "group", "name", "mode")}
    group = f"td3_bc/{pendulum}/default"
    assert options == {"project": "pearls", "group": group, "name": "seed-3", "mode": "offline"}
    assert fake.options["config"] == record(folder)["config"]
    assert Path(fake.options["dir"]) == folder


@pytest.mark.parametrize(("fail_at", "fail_from", "rows"), [("init", 1, 0), ("log", 1, 0), ("log", 3, 2)])
def test_a_broken_wandb_stops_nothing(
    call, pendulum, finished, tmp_path, monkeypatch, fail_at, fail_from, rows
):
    fake = FakeWandb(fail_at, fail_from)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    status, _, err = call("bc", *short(pendulum, tmp_path, wandb_mode="offline"))
    assert status == 0
    assert err.count("\n") == 1
    assert f"no {fail_at} today" in err
    assert len(fake.rows) == rows
    assert_same_run(place(tmp_path, "bc", pendulum), place(finished, "bc", pendulum))


def test_wandb_offline_in_a_process_of_its_own(run_script, pendulum, finished, tmp_path):
    """The real one, as it is by default: without an account, into the run's folder, and silent."""
    done = run_script("offline/bc.py", *short(pendulum, tmp_path, wandb_mode="offline"), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    folder = place(tmp_path, "bc", pendulum)
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert all(name.encode() in content for name in ("actor/support_gap", "eval/return_mean", "seed-0"))
    assert {path.name for path in tmp_path.iterdir()} == {"offline"}
    assert_same_run(folder, place(finished, "bc", pendulum))


# ------------------------------------ a compiler, and a finished policy ------------------------------------


def test_without_a_compiler_it_runs_eagerly_and_says_so_once(call, pendulum, tmp_path, finished, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    status, _, err = call("td3_bc", *short(pendulum, tmp_path, compile="true"))
    assert status == 0
    assert err.count("\n") == err.count("no C++ compiler") == 1
    folder, eager = place(tmp_path, "td3_bc", pendulum), place(finished, "td3_bc", pendulum)
    assert record(folder)["compiled"] is False
    assert equal(checkpoint(folder)["state"], checkpoint(eager)["state"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_finished_policy_is_the_evaluated_one(scripts, finished, pendulum, name):
    script, folder = scripts[name], place(finished, name, pendulum)
    torch.manual_seed(7)
    policy = script.load(str(folder))
    env = gym.make("Pendulum-v1")
    observation, _ = env.reset(seed=0)
    action = policy.act(observation)
    assert env.action_space.contains(action)
    batch = np.stack([observation, *(env.observation_space.sample() for _ in range(4))])
    actions = policy.act(batch)
    assert actions.shape == (5, 1)
    np.testing.assert_allclose(actions[0], action, rtol=1e-5)
    assert np.ptp(actions) > 1e-3  # it looks at the observation

    environments = script.make_environments(minari.load_dataset(pendulum), None, 10)
    table = script.evaluate(policy.act, environments, 12, (0, 40, 1))
    rows = pd.read_csv(folder / "evaluations.csv").query("phase == 'final'").reset_index(drop=True)
    pd.testing.assert_frame_equal(table, rows[["return", "length", "success"]], check_exact=True)


class Compass(gym.Env):
    """Five steps towards the east, which a Dict of Dicts shows."""

    tree = gym.spaces.Dict(wind=gym.spaces.Box(-1, 1, (2,)), place=gym.spaces.Box(-9, 9, (1,)))
    observation_space = gym.spaces.Dict(b=tree, a=gym.spaces.Box(-1, 1, (3,)))
    action_space = gym.spaces.Box(-5, 3, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), float(action[0]), False, self.steps == 5, {}


def test_a_finished_policy_takes_dicts(call, scripts, minari_root, tmp_path, monkeypatch):
    """Entries in the order of sorted keys: a, b.place, b.wind; in another order it is not the same policy."""
    spec = gym.envs.registration.EnvSpec("test/Compass-v0", entry_point=Compass)
    monkeypatch.setitem(gym.registry, spec.id, spec)
    env, dataset = Compass(), "test/compass/random-v0"
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    minari.create_dataset_from_buffers(dataset, random_episodes(env, 4), **spaces, data_format="hdf5")
    assert call("bc", *short(dataset, tmp_path, environment=spec.id, hidden_dim=32))[0] == 0
    policy = scripts["bc"].load(place(tmp_path, "bc", dataset))
    observation, _ = env.reset(seed=1)
    flat = np.concatenate([observation["a"], observation["b"]["place"], observation["b"]["wind"]])
    action = policy.act(observation)
    assert action.shape == (2,)
    np.testing.assert_array_equal(policy.act(flat), action)
    assert not np.allclose(policy.act(flat[::-1].copy()), action)
    assert ((action >= -5) & (action <= 3)).all()
