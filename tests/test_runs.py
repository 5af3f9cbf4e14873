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
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import OFFLINE, ROOT, learner_class, load_script, random_episodes, short

pytest.register_assert_rewrite("runs")
from runs import (  # noqa: E402
    SPEED,
    assert_same_run,
    at_update,
    checkpoint,
    equal,
    place,
    record,
    rewrite,
    small,
    stop,
)

pytest_plugins = ["runs"]
NEVER = ("never", 0)
INTERRUPTED = "interrupted; the same command goes on from what is saved, or begins anew"
# A script for each form of `train` and of batch; Ctrl-C and a resume are tested for all.
KILLED = ["diffuser", "dt", "idql", "iql", "mopo", "q_chunking", "rebrac", "td3_bc"]


@pytest.fixture(scope="module")
def brief(minari_root) -> list[str]:
    """Ids of two datasets of a pendulum with episodes of 10 steps and no reference scores."""
    env, ids = gym.make("Pendulum-v1", max_episode_steps=10), ["test/brief/random-v0", "test/brief/random-v1"]
    for number, name in enumerate(ids):
        episodes = random_episodes(env, 4, seed=10 * number)
        minari.create_dataset_from_buffers(name, episodes, env=env, data_format="hdf5")
    return ids


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
    final = lambda act, environments, episodes, seed: "final" if seed[-1] else "training"  # noqa: E731
    Path.write_bytes = mortal(write, lambda path, content: path.name.removesuffix(".new"))
    Path.replace = mortal(Path.replace, lambda path, target: "rename")
    script.evaluate = mortal(script.evaluate, final)
    learner = learner_class(script)
    learner.update = mortal(learner.update, lambda learner, batch: "update")
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
def killed(scripts, brief, tmp_path_factory) -> Path:
    """An output folder with two runs of each of KILLED: `whole`, and `killed` three times and then ended.

    Evaluations and checkpoints keep different time, so that both happen between two of the other. TD3+BC
    dies at more moments, and IQL's logs and checkpoints come at other updates after its second death.
    """
    folder, whole, torn = tmp_path_factory.mktemp("killed"), [], []
    for name in KILLED:
        draw = random.Random(name).randint
        deaths = [("rename", draw(1, 6)), ("update", draw(21, 45)), ("final", 1), NEVER]
        if name == "td3_bc":
            half = ("metrics.csv", "evaluations.csv", "run.json")[draw(0, 2)]
            deaths[2:2] = [("step", draw(1, 10)), ("checkpoint.pt", draw(1, 2)), (half, 1)]
        fields = {"updates": 80, "eval_every": 15}
        for number, death in enumerate(deaths):
            other = {"log_every": 7, "checkpoint_every": 33} if name == "iql" and number > 1 else {}
            arguments = small(scripts[name], brief[0], folder, variant="killed", **fields | other)
            torn.append((name, arguments, death))
        whole.append((name, small(scripts[name], brief[0], folder, variant="whole", **fields)))
    expected = [0 if death is NEVER else -signal.SIGKILL for *_, death in torn]
    assert codes(whole, torn, folder) == expected, (folder / "log").read_text()
    return folder


@pytest.mark.parametrize("name", KILLED)
def test_a_run_killed_again_and_again_ends_in_the_same_bits(killed, brief, name):
    whole, torn = [place(killed, name, brief[0], variant) for variant in ("whole", "killed")]
    assert checkpoint(whole)["updates"] == 80
    if name == "iql":  # its rows are of other updates
        shutil.copy(whole / "metrics.csv", torn / "metrics.csv")
    assert_same_run(whole, torn)


def test_the_killed_runs_went_on_from_their_checkpoints(killed):
    """Not from the start: that would end in the same bits too."""
    lines = (killed / "log").read_text().splitlines()
    resumed = [int(line.split()[-1]) for line in lines if line.startswith("resumed at update")]
    assert len(resumed) == 2 * len(KILLED) + 3
    assert resumed.count(80) == len(KILLED)  # after the death in the final evaluation
    assert {*resumed} >= {20, 80}
    assert not [line for line in lines if "maybe other bits" in line]


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


def test_interrupted_and_killed_processes_of_their_own(pendulum, tmp_path, sigint):
    """The status stays running; what there is, is whole; Ctrl-C saves first and says how to go on."""
    folder, saved = place(tmp_path, "td3_bc", pendulum), [0]
    script = [sys.executable, ROOT / "algorithms/offline/td3_bc.py"]
    rhythm = {"eval_every": 50, "checkpoint_every": 1000}
    command = [*script, *short(pendulum, tmp_path, updates=1_000_000, **rhythm)]
    for signal_number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, **pipes)
        before, deadline, seen = saved[-1], time.monotonic() + 300, 0
        while seen <= before + 20:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
            with contextlib.suppress(OSError, KeyError):
                seen = max(pd.read_csv(folder / "metrics.csv")["update"], default=0)
        process.send_signal(signal_number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert out.count("resumed at update") == bool(before)
        saved.append(checkpoint(folder)["updates"])
        table = pd.read_csv(folder / "metrics.csv")
        if signal_number == signal.SIGINT:
            assert err == f"td3_bc.py: {INTERRUPTED}\n"
            assert saved[-1] >= table["update"].max()
        else:
            assert f"resumed at update {before:,}\n" in out
            assert saved[-1] % 1000 == 0 or saved[-1] == before
        assert record(folder)["status"] == "running"
        assert table["update"].is_monotonic_increasing
        assert (pd.read_csv(folder / "evaluations.csv").groupby("update").size() == 3).all()


@pytest.mark.parametrize("name", OFFLINE)
def test_control_c_saves_the_update_under_way(
    call, scripts, pendulum, finished, tmp_path, monkeypatch, sigint, name
):
    folder, arguments = place(tmp_path, name, pendulum), small(scripts[name], pendulum, tmp_path)
    with monkeypatch.context() as patch:
        at_update(scripts[name], patch, 13, lambda: os.kill(os.getpid(), signal.SIGINT))
        status, _, err = call(name, *arguments)
    assert (status, err) == (130, f"{name}.py: {INTERRUPTED}\n")
    assert checkpoint(folder)["updates"] == 13
    assert record(folder)["status"] == "running"
    status, out, _ = call(name, *arguments)
    assert status == 0
    assert "resumed at update 13\n" in out
    assert_same_run(folder, place(finished, name, pendulum))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_control_c_does_not_wait(call, scripts, pendulum, tmp_path, monkeypatch, sigint):
    """Within the same update: nothing is saved after it."""

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_update(scripts["td3_bc"], monkeypatch, 33, twice)
    status, _, err = call("td3_bc", *short(pendulum, tmp_path))
    assert (status, err.count("\n")) == (130, 1)
    assert checkpoint(place(tmp_path, "td3_bc", pendulum))["updates"] == 20


# ------------------------------------------------- clocks -------------------------------------------------


class Clock:
    """A clock that stands, but for what is added to it."""

    def __init__(self, script, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def advance(self, seconds: float) -> None:
        self.now += seconds


def test_a_checkpoint_every_ten_minutes(call, scripts, pendulum, finished, tmp_path, monkeypatch):
    """However far `checkpoint_every` is: at updates 7 and 25 here, and not a second before."""
    script, folder, saved = scripts["td3_bc"], place(tmp_path, "td3_bc", pendulum), []
    save, arguments = script.Run.save, short(pendulum, tmp_path, checkpoint_every=1000)
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "save", lambda run, it: (saved.append(it.updates), save(run, it)))
        clock = Clock(script, patch)
        for update, seconds in {3: 300, 5: 300, 7: 1, 20: 600, 25: 1}.items():
            at_update(script, patch, update, lambda seconds=seconds: clock.advance(seconds))
        at_update(script, patch, 33, stop)
        assert call("td3_bc", *arguments)[0] == 130
    assert saved == [7, 25]
    status, out, _ = call("td3_bc", *arguments)
    assert status == 0
    assert "resumed at update 25\n" in out
    assert_same_run(folder, place(finished, "td3_bc", pendulum))


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_printed_every_minute_without_a_terminal(
    call, scripts, pendulum, tmp_path, monkeypatch, terminal
):
    script = scripts["td3_bc"]
    clock = Clock(script, monkeypatch)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(script, "tqdm", Quiet)
    for update, seconds in {5: 59, 15: 2, 25: 59, 38: 3}.items():
        at_update(script, monkeypatch, update, lambda seconds=seconds: clock.advance(seconds))
    status, out, _ = call("td3_bc", *short(pendulum, tmp_path))
    shown = [line for line in out.splitlines() if line in ("update 20", "update 40")]
    assert status == 0
    assert shown == ([] if terminal else ["update 20", "update 40"])


class Quiet(list):
    """tqdm without its bar."""

    def __init__(self, numbers, **_):
        super().__init__(numbers)

    @staticmethod
    def write(text: str) -> None:
        print(text)


# ----------------------------------------- finished and resumed -----------------------------------------


@pytest.mark.parametrize("name", OFFLINE)
def test_a_finished_run_prints_its_score_and_does_nothing(call, scripts, pendulum, runs, monkeypatch, name):
    monkeypatch.setattr(scripts[name], "load_dataset", None)  # not even the data are read
    folder = place(runs, name, pendulum)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    other = {"log_every": 1, "checkpoint_every": 1, "device": "cpu", "threads": 2, "wandb_project": "other"}
    status, out, err = call(name, *small(scripts[name], pendulum, runs, **other))
    assert (status, err) == (0, "")
    assert out == f"{folder} is finished: {record(folder)['result']}\n"
    assert f"score {record(folder)['score']:.1f} (" in out
    assert f"chosen with the simulator: {record(folder)['best_score']:.1f})" in out
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_clocks_go_on_from_where_they_stood(call, scripts, pendulum, tmp_path, monkeypatch):
    folder, clock = place(tmp_path, "td3_bc", pendulum), "time/wall_seconds"
    with monkeypatch.context() as patch:
        at_update(scripts["td3_bc"], patch, 25, stop)
        assert call("td3_bc", *short(pendulum, tmp_path))[0] == 130
    content = torch.load(folder / "checkpoint.pt")
    assert content["seconds"] >= content["metrics"][20][clock] > 0
    content["metrics"][20][clock] += 1000
    content["seconds"] += 1000
    torch.save(content, folder / "checkpoint.pt")
    assert call("td3_bc", *short(pendulum, tmp_path))[0] == 0
    table = pd.read_csv(folder / "metrics.csv")
    assert table["update"].tolist() == [10, 20, 30, 40]
    assert table[clock].is_monotonic_increasing
    assert 1000 < record(folder)["wall_seconds"] < 1100
    assert 0 < record(folder)["updates_per_second"] < 100_000


def test_a_resume_under_other_circumstances_says_so(call, pendulum, runs):
    folder = place(runs, "bc", pendulum)
    versions = record(folder)["versions"] | {"torch": "1.0"}
    rewrite(folder, versions=versions, status="running")
    status, out, _ = call("bc", *short(pendulum, runs, threads=2))
    said = [line for line in out.splitlines() if line.startswith("resumed with")]
    assert status == 0
    assert len(said) == 2
    assert "resumed with threads 2, begun with 1: maybe other bits" in said
    assert any("versions" in line and "1.0" in line for line in said)
    assert record(folder)["threads"] == 2


def test_no_run_goes_on_with_other_data(call, pendulum, runs):
    """Of the same id, made anew in between."""
    folder = place(runs, "bc", pendulum)
    rewrite(folder, dataset_hash="abc", status="running")
    status, _, err = call("bc", *short(pendulum, runs))
    assert status == 2
    assert err == f"bc.py: {folder} learned from other data of this name: take another --variant\n"
    assert record(folder)["dataset_hash"] == "abc"


def test_a_run_under_two_commits_keeps_both(call, pendulum, runs, finished):
    """And one that goes on under one of those it had is said to have no other."""
    folder, now = place(runs, "bc", pendulum), record(place(finished, "bc", pendulum))["commit"]
    rewrite(folder, commit="abc", status="running")
    status, out, _ = call("bc", *short(pendulum, runs))
    assert status == 0
    assert f"resumed with commit {now}, begun with abc: maybe other bits\n" in out
    assert record(folder)["commit"] == f"abc {now}"
    rewrite(folder, status="running")
    assert call("bc", *short(pendulum, runs))[0] == 0
    assert record(folder)["commit"] == f"abc {now}"
    assert_same_run(folder, place(finished, "bc", pendulum))


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


@pytest.mark.parametrize("name", OFFLINE)
def test_what_a_run_folder_holds(scripts, finished, pendulum, name):
    folder = place(finished, name, pendulum)
    files = {"config.yaml", "run.json", "metrics.csv", "evaluations.csv", "checkpoint.pt", "lock"}
    assert {path.name for path in folder.iterdir()} == files
    config = scripts[name].parse_config(small(scripts[name], pendulum, finished))
    assert scripts[name].parse_config([f"--config_path={folder}/config.yaml"]) == config
    info = record(folder)
    assert info["config"] == vars(config)
    assert info["status"] == "finished"
    assert len(info["dataset_hash"]) == len(info["config_hash"]) == 64
    assert (info["threads"], info["compiled"], info["precision"]) == (1, False, "highest")
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
    expected |= {f"eval/{key}" for key in ("score", "return_mean", "return_std", "length_mean")}
    if name not in {"bc", "dt", "diffusion_policy", "diffuser", "trajectory_transformer"}:
        expected |= {"critic/loss", "critic/q_mean", "critic/data_return"}
    assert expected <= {*metrics}


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


Q = {"critic", "critic_optimizer", "target_critic"}
SAC = Q | {"temperature", "temperature_optimizer"}
MODEL = SAC | {"model", "model_optimizer", "best_layers", "rollouts"}
PARTS = {
    "awac": Q,
    "bc": set(),
    "bcq": Q | {"target_actor", "vae", "vae_optimizer"},
    "bear": Q | {"target_actor", "vae", "vae_optimizer", "multiplier", "multiplier_optimizer"},
    "brac": Q | {"behavior", "behavior_optimizer", "multiplier", "multiplier_optimizer"},
    "combo": MODEL,
    "cql": SAC | {"multiplier", "multiplier_optimizer"},
    "diffusion_ql": Q | {"ema_actor"},
    "dt": {"actor_schedule"},
    "fql": Q | {"flow", "flow_optimizer"},
    "idql": Q | {"value", "value_optimizer", "actor_schedule", "ema_actor"},
    "iql": Q | {"value", "value_optimizer", "actor_schedule"},
    "mopo": MODEL,
    "morel": MODEL,
    "q_chunking": Q,
    "td3_bc": Q | {"target_actor"},
}


@pytest.mark.parametrize("name", OFFLINE)
def test_a_checkpoint_holds_everything(finished, pendulum, name):
    content = torch.load(place(finished, name, pendulum) / "checkpoint.pt", weights_only=True)
    more = PARTS.get(name, set(content["state"]))  # of a script that is not listed: any
    assert set(content["state"]) == {"scaler", "actor", "actor_optimizer"} | more
    assert set(content) == {"updates", "state", "metrics", "evaluations", "rng", "cuda_rng", "seconds"}
    assert content["updates"] == 40
    steps = {int(entry["step"]) for entry in content["state"]["actor_optimizer"]["state"].values()}
    assert steps == {{"td3_bc": 20, "rebrac": 20, "brac": 36, "idql": 80}.get(name, 40)}  # of 40


# ------------------------------------------- every field counts -------------------------------------------

OTHER = {  # another value of a field, where `other_value` would be none or not be seen in 20 updates
    "variant": "other",
    "updates": 24,
    "batch_size": 17,
    "hidden_layers": 1,
    "hidden_dim": 9,
    "policy_delay": 1,
    "noise_clip": 0.01,
    "max_z": 0.01,
    "warmup_updates": 5,
    "lagrange_gap": 5.0,
    "target_kl": 0.5,
    "real_ratio": 0.75,
    "gradient_norm": 0.01,
    "act_samples": 1,
    "environment": "Pendulum-v1",
    "ref_min": -200.0,
    "ref_max": 1.0,
    "eval_every": 5,
    "log_every": 3,
    "checkpoint_every": 6,
    "device": "auto",
    "threads": 2,
    "precision": "medium",
    "wandb_mode": "online",
    "wandb_project": "other",
}
FREE = {"device", "threads", "log_every", "checkpoint_every", "wandb_mode", "wandb_project", "output_dir"}
ACTING = {"act_samples", "act_horizon", "act_stride", "act_noise"}  # by what a trained policy acts
ACTING |= {"act_beams", "act_cutoff", "plan_horizon", "guide_scale", "guide_steps", "guide_stop"}
EVALUATION = {"environment", "eval_every", "eval_episodes", "final_eval_episodes", *ACTING}
RECORD = {"ref_min", "ref_max", "variant", "threads", "precision", "compile"}
RECORD |= {"termination_penalty", "termination_reward"}  # a pendulum never terminates; its own test sees it
EVERY_FIELD = {"td3_bc", "dt", "mopo"}  # what others do with the fields of these sets is td3_bc's code


def other_value(value: bool | float) -> bool | int | float:
    """Within the limits of any field."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2 + 0.25


@pytest.mark.parametrize("name", OFFLINE)
def test_every_field_changes_something(scripts, brief, tmp_path, monkeypatch, name):
    """Weights, evaluations, score or what is recorded; and the hash, unless the field is free."""
    script = scripts[name]
    brisk = {"updates": 20, "eval_every": 20, "eval_episodes": 2, "final_eval_episodes": 3}
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    monkeypatch.setattr(script, "compile_methods", lambda *_: True)
    monkeypatch.setattr(  # half of the time that so short a run takes
        script, "provenance", lambda _: {"commit": "", "threads": torch.get_num_threads()}
    )
    if hasattr(script, "support_gap"):  # a metric, of 1,024 states
        monkeypatch.setattr(script, "support_gap", lambda *_: 0.0)
    base = script.parse_config(small(script, brief[0], tmp_path / "base", **brisk, ref_min=-100, ref_max=0))
    others = {**OTHER, "dataset": brief[1], "output_dir": str(tmp_path / "elsewhere")}
    others["model_from"] = str(place(tmp_path / "seed", name, brief[0], seed=1))  # of an outcome before it

    save, saved = script.Run.save, []
    monkeypatch.setattr(script.Run, "save", lambda run, it: (saved.append(it.updates), save(run, it)))
    make_environments = script.make_environments

    def outcome(field: str | None = None, played: bool = True) -> dict:
        saved.clear()
        make = make_environments if played else lambda *_: None  # half of the time, too
        monkeypatch.setattr(script, "make_environments", make)
        changed = {"output_dir": str(tmp_path / str(field))}
        if field:
            changed[field] = others[field] if field in others else other_value(getattr(base, field))
        config = dataclasses.replace(base, **changed)
        script.train(dataclasses.replace(config))  # a copy: where wandb fails, it is changed
        folder = place(Path(config.output_dir), name, config.dataset, config.variant, config.seed)
        found = {key: record(folder).get(key) for key in ("config_hash", "score", "compiled", "threads")}
        return found | {
            "weights": checkpoint(folder)["state"],
            "evaluations": (folder / "evaluations.csv").read_text(),
            "rows": len(pd.read_csv(folder / "metrics.csv")),
            "saved": [*saved],
            "precision": torch.get_float32_matmul_precision(),
        }

    plain = {True: outcome(played=True), False: outcome(played=False)}
    shared = set() if name in EVERY_FIELD else FREE | RECORD | EVALUATION - ACTING
    for field in [field for field in vars(base) if field not in shared]:
        played = name in EVERY_FIELD or field in ACTING
        found = outcome(field, played)
        same = {key for key, value in plain[played].items() if equal(found[key], value)}
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
            assert {"log_every": "rows", "checkpoint_every": "saved"}[field] not in same
            assert len(result) == 3, field
        elif field in FREE | {"variant"}:
            assert len(result) == 3 or (field == "device" and torch.cuda.is_available()), field
        else:
            assert "weights" not in result, field
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("known", [{}, *({"avx512_bw": True, "amx_bf16": amx} for amx in (False, True))])
def test_precision_auto_is_medium_where_that_rounds_nothing(scripts, monkeypatch, known):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script, quick = scripts["td3_bc"], known.get("avx512_bw") and not known["amx_bf16"]
    names = ("highest", "high", "medium")
    wanted = {name: name for name in names} | {"auto": "medium" if quick else "highest"}
    for asked, found in wanted.items():
        device = script.set_up_torch(script.Config(precision=asked, device="cpu", threads=1))
        assert torch.get_float32_matmul_precision() == found
        assert script.provenance(device)["precision"] == found
    torch.set_float32_matmul_precision("highest")


def test_products_of_precision_auto_are_of_float32_on_this_processor(scripts):
    """Sums of 256 products: off by some 1e-7 of their size, where bfloat16's would be by 1e-3."""
    scripts["td3_bc"].set_up_torch(scripts["td3_bc"].Config(precision="auto", device="cpu", threads=1))
    for shape in ((256, 256), (2, 256, 256)):
        a, b = torch.randn(shape), torch.randn(shape)
        exact = a.double() @ b.double()
        assert float((a @ b - exact).abs().max() / exact.abs().max()) < 1e-5
    torch.set_float32_matmul_precision("highest")


def test_denormals_are_flushed(call, scripts, pendulum, tmp_path, monkeypatch):
    """Adam's first moment of an idle weight ends at 1e-45 and stays there; BCQ took 1.5 times as long."""
    learner, products = scripts["td3_bc"].TD3BC, []
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
        self.fail_at, self.fail_from, self.calls = fail_at, fail_from, 0
        self.runs, self.rows = [], []

    def count(self, name: str) -> None:
        self.calls += name == self.fail_at
        if name == self.fail_at and self.calls >= self.fail_from:
            raise OSError(f"no {name} today")

    def Settings(self, **settings):
        return settings

    def init(self, **options):
        self.count("init")
        self.runs.append(options)
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
    *rows, last = fake.rows  # metrics, evaluations, and the final one; wandb puts those of a step together
    rows = pd.DataFrame(rows)
    assert (rows["step"] == rows["update"]).all()
    assert rows["step"].tolist() == [10, 20, 20, 30, 40, 40]
    rows = rows.groupby("step").last().reset_index(drop=True)
    pd.testing.assert_frame_equal(rows, pd.read_csv(folder / "metrics.csv"), check_like=True)
    assert last["step"] == last["update"] == record(folder)["config"]["updates"]
    assert last["final/score"] == record(folder)["score"]
    assert last["final/return_mean"] == record(folder)["return_mean"]
    (run,) = fake.runs
    options = {key: run[key] for key in ("project", "group", "name", "mode")}
    group = f"td3_bc/{pendulum}/default"
    assert options == {"project": "pearls", "group": group, "name": "seed-3", "mode": "offline"}
    assert run["config"] == record(folder)["config"]
    assert Path(run["dir"]) == folder


def test_a_resumed_run_is_the_same_in_wandb(call, scripts, pendulum, tmp_path, monkeypatch):
    """And that of another seed is not."""
    fake, script = FakeWandb(), scripts["td3_bc"]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    arguments = short(pendulum, tmp_path, wandb_mode="offline")
    with monkeypatch.context() as patch:
        at_update(script, patch, 25, stop)
        assert call("td3_bc", *arguments)[0] == 130
    assert call("td3_bc", *arguments)[0] == 0
    assert call("td3_bc", *short(pendulum, tmp_path, wandb_mode="offline", seed=1))[0] == 0
    first, resumed, other = fake.runs
    assert first["id"] == resumed["id"] != other["id"]
    assert first["resume"] == resumed["resume"] == "allow"
    assert record(place(tmp_path, "td3_bc", pendulum))["wandb_id"] == first["id"]


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


@pytest.mark.parametrize("missing", ["g++", "python3-dev"])
def test_without_a_compiler_it_runs_eagerly_and_says_so_once(
    call, pendulum, tmp_path, finished, monkeypatch, missing
):
    if missing == "g++":
        monkeypatch.setenv("CXX", "/nonexistent/g++")
    else:  # Python.h, which what torch compiles includes
        monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "no python"))
    status, _, err = call("td3_bc", *short(pendulum, tmp_path, compile="true"))
    assert status == 0
    assert err.count("\n") == err.count("no g++ or no python3-dev here") == 1
    folder, eager = place(tmp_path, "td3_bc", pendulum), place(finished, "td3_bc", pendulum)
    assert record(folder)["compiled"] is False
    assert equal(checkpoint(folder)["state"], checkpoint(eager)["state"])


# Whose actions are drawn: by torch's generator, the same ones for the same state of it.
DRAWN = {"diffuser", "diffusion_policy", "diffusion_ql", "fql", "idql", "q_chunking"}
DRAWN |= {"trajectory_transformer"}


@pytest.mark.parametrize("name", OFFLINE)
def test_a_finished_policy_is_the_evaluated_one(scripts, finished, pendulum, name):
    script, folder = scripts[name], place(finished, name, pendulum)
    torch.manual_seed(7)
    policy = script.load(str(folder))
    env = gym.make("Pendulum-v1")
    observation, _ = env.reset(seed=0)
    begins = [None] if hasattr(script, "LastRewards") else []  # the rewards before an episode's first step
    action = policy.act(observation, *begins)
    assert env.action_space.contains(action)
    batch = np.stack([observation, *(env.observation_space.sample() for _ in range(4))])
    actions = policy.act(batch, *begins)
    assert actions.shape == (5, 1)
    if name in DRAWN:
        torch.manual_seed(7)
        action = policy.act(observation, *begins)
        torch.manual_seed(7)
        np.testing.assert_array_equal(policy.act(observation, *begins), action)
    else:
        np.testing.assert_allclose(actions[0], action, rtol=1e-5)
    assert np.ptp(actions) > 1e-3  # it looks at the observation

    environments, act = script.make_environments(minari.load_dataset(pendulum), None), policy.act
    if hasattr(script, "LastRewards"):
        environments = script.LastRewards(environments)
        act = lambda observations: policy.act(observations, environments.rewards)  # noqa: E731
    table = script.evaluate(act, environments, 12, (0, 40, 1))
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
