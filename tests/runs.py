"""What tests/test_runs.py and tests/test_errors.py share: finished runs, and what their folders hold."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import OFFLINE, learner_class, short

SPEED = ["time/updates_per_second", "time/wall_seconds"]
SMALL = {"context": 4, "vae_hidden_dim": 8, "target_samples": 2, "act_samples": 4, "cql_actions": 2}
SMALL |= {"plan_horizon": 2, "act_beams": 2, "bins": 10}
SMALL |= {"behavior_updates": 4}  # of 20 or more
SMALL |= {"model_hidden_dim": 8, "model_epochs": 2}
SMALL_OF = {  # these alone
    "diffuser": {"diffusion_steps": 3, "act_horizon": 8, "levels": 1},
    "trajectory_transformer": {"hidden_layers": 2, "plan_horizon": 1},
}
SMALL |= {"rollout_every": 5, "rollout_batch": 20, "rollouts_kept": 2, "halt_deviations": 1.0}


def small(script, dataset: str, output_dir: Path, **fields) -> list[str]:
    """`short`, and smaller still in the fields that only some scripts have."""
    known = vars(script.Config())
    smaller = {name: SMALL[name] for name in SMALL if name in known}
    return short(dataset, output_dir, **smaller | SMALL_OF.get(Path(script.__file__).stem, {}) | fields)


def place(runs: Path, name: str, dataset: str, variant: str = "default", seed: int = 0) -> Path:
    return runs / "offline" / name / dataset / variant / f"seed-{seed}"


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def rewrite(folder: Path, **info) -> None:
    """Puts other values into run.json."""
    (folder / "run.json").write_text(json.dumps(record(folder) | info))


def contents(folder: Path) -> dict[str, bytes]:
    """All files below `folder` by name, but for the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


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
    """All but clocks and the tables, which have some: evaluations.csv is compared as it is."""
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    del content["metrics"], content["evaluations"], content["seconds"]
    return content


def assert_same_run(one: Path, other: Path) -> None:
    """Two finished runs are the same bits, but for clocks."""
    assert (one / "evaluations.csv").read_bytes() == (other / "evaluations.csv").read_bytes()
    assert equal(checkpoint(one), checkpoint(other))
    tables = [pd.read_csv(folder / "metrics.csv").drop(columns=SPEED) for folder in (one, other)]
    assert all((np.diff(table["update"]) > 0).all() for table in tables)
    pd.testing.assert_frame_equal(*tables)
    for folder in (one, other):
        assert record(folder)["status"] == "finished"
        assert not list(folder.glob("*.new"))
    for key in ("score", "return_mean", "return_std", "best_score", "dataset_hash"):
        assert record(one)[key] == record(other)[key]


def at_update(script, monkeypatch, number: int, action) -> None:
    """From now on `action()` is called within update `number` of a run of `script`."""
    cls = learner_class(script)
    update = cls.update

    def called(learner, batch):
        metrics = update(learner, batch)
        if learner.updates == number:
            action()
        return metrics

    monkeypatch.setattr(cls, "update", called)


def stop() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def sigint():
    """Ctrl-C as in a terminal, wherever the tests run: a shell starts processes in the background without."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="session")
def finished(scripts, pendulum, tmp_path_factory) -> Path:
    """An output folder with a finished run of every script."""
    folder = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    for name in OFFLINE:
        scripts[name].train(scripts[name].parse_config(small(scripts[name], pendulum, folder)))
    torch.set_flush_denormal(False)
    return folder


@pytest.fixture
def runs(finished, tmp_path) -> Path:
    """A copy of `finished` to play with."""
    return shutil.copytree(finished, tmp_path / "runs")
