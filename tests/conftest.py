"""What the tests share: scripts as modules, datasets in a Minari root of their own, the command line."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

pytest.register_assert_rewrite("oracles", "runs")
from oracles import BATCH  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))  # whose programs import each other, and are imported by their tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests do not ask the hub: it would retry for half a minute


def load_script(path: str):
    """algorithms/<path> as a module of its own, imported once."""
    name = "reef_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "algorithms" / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def learner_class(script) -> type:
    """The one class of a script that has an `update`."""
    classes = [value for value in vars(script).values() if isinstance(value, type)]
    (found,) = [cls for cls in classes if cls.__module__ == script.__name__ and hasattr(cls, "update")]
    return found


def new_learner(script, config, obs_dim: int, act_dim: int):
    """A learner on the CPU whose scaler changes nothing."""
    scaler = script.Scaler(np.zeros(obs_dim), np.ones(obs_dim), -np.ones(act_dim), np.ones(act_dim))
    return learner_class(script)(config, scaler)


OFFLINE = sorted(path.stem for path in (ROOT / "algorithms/offline").glob("*.py"))
FINETUNE = sorted(path.stem for path in (ROOT / "algorithms/finetune").glob("*.py"))


@pytest.fixture(scope="session")
def scripts() -> dict:
    """{name: module} of the offline scripts."""
    return {name: load_script(f"offline/{name}.py") for name in OFFLINE}


@pytest.fixture(scope="session")
def minari_root(tmp_path_factory) -> Path:
    """A Minari root for the whole session, which the scripts started by tests see too."""
    root = tmp_path_factory.mktemp("minari")
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    return root


def random_episodes(env: gym.Env, count: int, seed: int = 0, steps: int | None = None) -> list[EpisodeBuffer]:
    """Episodes of uniformly random actions in `env`, each cut after `steps` (then neither flag is set)."""
    episodes = []
    env.action_space.seed(seed)
    for number in range(count):
        observation, _ = env.reset(seed=seed + number)
        episode = EpisodeBuffer(observations=[observation], actions=[])
        while True:
            action = env.action_space.sample()
            observation, reward, terminated, truncated, _ = env.step(action)
            episode.observations.append(observation)
            episode.actions.append(action)
            episode.rewards.append(float(reward))
            episode.terminations.append(terminated)
            episode.truncations.append(truncated)
            if terminated or truncated or len(episode.rewards) == steps:
                break
        episodes.append(as_arrays(episode))
    return episodes


def stack(entries: list):
    """Arrays, or Dicts of them however deep, one after the other along a new first axis."""
    if isinstance(entries[0], dict):
        return {key: stack([entry[key] for entry in entries]) for key in entries[0]}
    return np.stack(entries)


def as_arrays(episode: EpisodeBuffer) -> EpisodeBuffer:
    """The episode with arrays for lists."""
    return EpisodeBuffer(
        observations=stack(episode.observations),
        actions=stack(episode.actions),
        rewards=np.array(episode.rewards),
        terminations=np.array(episode.terminations),
        truncations=np.array(episode.truncations),
        infos={},
    )


@pytest.fixture(scope="session")
def pendulum(minari_root) -> str:
    """Id of 10 random episodes of 100 steps in Pendulum-v1 (observations [3], actions [1] in [-2, 2])."""
    env = gym.make("Pendulum-v1", max_episode_steps=100)
    episodes = random_episodes(env, 10)
    references = {"ref_min_score": -1000.0, "ref_max_score": -100.0}
    minari.create_dataset_from_buffers(
        "test/pendulum/random-v0", episodes, env=env, data_format="hdf5", **references
    )
    return "test/pendulum/random-v0"


@pytest.fixture(scope="session")
def walk(minari_root) -> str:
    """Id of random walks through five states, for the tests of choices."""
    return importlib.import_module("choices").make_walks()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three transitions (tests/oracles.py) as tensors."""
    return {key: torch.tensor(rows) for key, rows in BATCH.items()}


@pytest.fixture
def rows() -> dict[str, np.ndarray]:
    """The same transitions in NumPy."""
    return {key: np.array(rows) for key, rows in BATCH.items()}


@pytest.fixture
def run_script(minari_root):
    """run_script("offline/bc.py", "--seed", "1", ...) runs the command line: a CompletedProcess, as text."""

    def run(path: str, *arguments: object, check=False, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "algorithms" / path), *map(str, arguments)]
        options = {"capture_output": True, "text": True, "timeout": 300} | options
        return subprocess.run(command, check=check, **options)

    return run


def short(dataset: str, output_dir: Path, **fields) -> list[str]:
    """Command line of a run of a fraction of a second: 40 updates of small networks, nothing compiled."""
    sizes = {"hidden_dim": 8, "batch_size": 16, "updates": 40, "eval_episodes": 3, "final_eval_episodes": 12}
    rhythm = {"eval_every": 20, "log_every": 10, "checkpoint_every": 20}
    plain = {"compile": "false", "device": "cpu", "threads": 1, "wandb_mode": "disabled"}
    plain |= {"precision": "highest"}  # the same on any processor
    fields = {"dataset": dataset, "output_dir": output_dir, **sizes, **rhythm, **plain, **fields}
    return [f"--{name}={value}" for name, value in fields.items()]


@pytest.fixture
def call(scripts, minari_root, monkeypatch, capsys):
    """call("bc", "--seed", "1", ...) is the command line in this process: exit status, stdout, stderr."""

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        capsys.readouterr()
        status = 0
        try:
            scripts[name].main(scripts[name].train)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session", autouse=True)
def scratch():
    """What mazes and started scripts leave behind in the folder for temporary files goes with the tests."""
    with tempfile.TemporaryDirectory(prefix="reef-") as folder:  # a short path: Ray's sockets lie in it
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        yield


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run on two cores beside others: one thread each, and the same bits everywhere, in any order."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
