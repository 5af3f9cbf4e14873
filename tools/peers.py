"""Another folder's training script, run as it is and timed from outside: what `bench.py --peer` stands on.

The script has to be in the form of CORL's: a function `train` of one dataclass of settings (pyrallis may be
wrapped around it), which takes its data from d4rl, its environment from gym and its record to wandb, and
learns by torch's optimisers. In place of these three modules, dead or not wanted in a measurement, it imports
harmless ones (`stand_ins`); all else is its own: networks, loop, how it draws batches, what it reads for its
log. The loop is not touched: torch tells when an optimiser has stepped, and an update is what lies between
two steps of the optimiser that stepped first.
"""

import dataclasses
import importlib.util
import inspect
import io
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import UserError
from gymnasium.spaces import Box
from torch.optim.optimizer import register_optimizer_step_post_hook

OTHER_NAMES = {"bc": "any_percent_bc"}  # of CORL's scripts


def find_script(folder: Path, name: str) -> Path | None:
    """The peer's script of that name, if it has one."""
    files = [folder / f"{each}.py" for each in (name, OTHER_NAMES.get(name, name))]
    return next((file for file in files if file.is_file()), None)


# -------------------------------- In place of the modules that it imports --------------------------------


def d4rl_columns(episodes: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """A row for each step, as d4rl gives them."""
    last = [np.arange(len(episode["rewards"])) == len(episode["rewards"]) - 1 for episode in episodes]
    return {
        "observations": np.concatenate([episode["observations"][:-1] for episode in episodes]),
        "next_observations": np.concatenate([episode["observations"][1:] for episode in episodes]),
        "actions": np.concatenate([episode["actions"] for episode in episodes]),
        "rewards": np.concatenate([episode["rewards"] for episode in episodes]),
        "terminals": np.concatenate([episode["terminations"] for episode in episodes]).astype(bool),
        "timeouts": np.concatenate(last),
    }


class Environment:
    """By gym's old interface. Every episode is over at its first step: evaluation takes next to no time."""

    def __init__(self, episodes: list[dict[str, np.ndarray]]):
        self.episodes = episodes
        obs_dim, act_dim = episodes[0]["observations"].shape[1], episodes[0]["actions"].shape[1]
        self.observation_space = Box(-np.inf, np.inf, (obs_dim,))
        self.action_space = Box(-1, 1, (act_dim,))

    def seed(self, seed: int) -> None:
        pass

    def reset(self) -> np.ndarray:
        return np.zeros(self.observation_space.shape, np.float32)

    def step(self, action) -> tuple[np.ndarray, float, bool, dict]:
        return self.reset(), 0.0, True, {}

    def get_dataset(self) -> dict[str, np.ndarray]:
        return d4rl_columns(self.episodes)

    def get_normalized_score(self, value):
        return value


def stand_ins(episodes: list[dict[str, np.ndarray]]) -> dict[str, SimpleNamespace]:
    """{module: what stands in for it}."""

    def make(*arguments, **options) -> Environment:
        return Environment(episodes)

    def unchanged(environment: Environment, *arguments) -> Environment:
        return environment

    def data(*arguments, **options) -> dict[str, np.ndarray]:
        return d4rl_columns(episodes)

    def ignore(*arguments, **options) -> None:
        pass

    wrappers = SimpleNamespace(TransformObservation=unchanged, TransformReward=unchanged)
    return {
        "d4rl": SimpleNamespace(qlearning_dataset=data),
        "gym": SimpleNamespace(Env=Environment, make=make, wrappers=wrappers),
        "wandb": SimpleNamespace(init=ignore, log=ignore, finish=ignore, run=SimpleNamespace(save=ignore)),
    }


# --------------------------------------------- Its training ---------------------------------------------


class Measured(BaseException):
    """Ends the peer's training; no `except Exception` of its own holds it up."""


class Clock:
    """Torch calls it after each step of an optimiser; it takes `course` one on at each update of the peer."""

    def __init__(self, course: Iterator):
        self.course, self.waiting = course, False
        self.sizes = {}  # parameters of each optimiser of the peer, in the order of their first steps

    def __call__(self, optimizer: torch.optim.Optimizer, *arguments) -> None:
        if self.waiting:  # in the course of `course` others may take a step
            return
        if optimizer not in self.sizes:
            parameters = [each for group in optimizer.param_groups for each in group["params"]]
            self.sizes[optimizer] = sum(each.numel() for each in parameters)
        if optimizer is next(iter(self.sizes)):
            self.waiting = True
            next(self.course)
            self.waiting = False


class Peer:
    """The training of the script in `file`, ready to run; a UserError says in one line why it cannot."""

    def __init__(self, file: Path, batch_size: int, device: torch.device, episodes: list):
        self.file, self.modules = file, stand_ins(episodes)
        with self.surroundings():
            self.train, config_class = read_script(file)
            self.config = settings(config_class, batch_size, device)

    def run(self, course: Iterator) -> int:
        """Trains until `course` raises Measured; the number of parameters that were trained."""
        clock = Clock(course)
        hook = register_optimizer_step_post_hook(clock)
        try:
            with self.surroundings():
                self.train(self.config)
                raise UserError("training ended before it was measured; does it step optimisers of torch?")
        except Measured:
            return sum(clock.sizes.values())
        finally:
            hook.remove()

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """What it imports is found, what it prints is not seen, its errors are ours to tell."""
        before = {name: sys.modules[name] for name in self.modules if name in sys.modules}
        sys.modules.update(self.modules)
        silence = io.StringIO()
        try:
            with redirect_stdout(silence), redirect_stderr(silence):
                yield
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from error
        except (Exception, SystemExit) as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({line.filename}, line {line.lineno})"
            raise UserError(f"{self.file}: {what}") from error
        finally:
            for name in self.modules:
                del sys.modules[name]
            sys.modules.update(before)


def read_script(file: Path) -> tuple[Callable, type]:
    """Its `train`, without pyrallis around it, and the class of its settings."""
    spec = importlib.util.spec_from_file_location("peer", file)
    sys.modules["peer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["peer"])
    train = inspect.unwrap(getattr(sys.modules["peer"], "train", None))
    hints = typing.get_type_hints(train) if callable(train) else {}
    config_classes = [each for name, each in hints.items() if name != "return"]
    if len(config_classes) != 1 or not dataclasses.is_dataclass(config_classes[0]):
        raise UserError("it has no function `train` of one dataclass of settings, as CORL's scripts have")
    return train, config_classes[0]


def settings(config_class: type, batch_size: int, device: torch.device):
    """The script's own, but for device and batch; on a CPU no processes that load batches on other cores."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    if missing := {"device", "batch_size"} - fields:
        raise UserError(f"its settings have no {' and no '.join(sorted(missing))}")
    chosen = {"device": str(device), "batch_size": batch_size}
    if device.type == "cpu" and "num_workers" in fields:
        chosen["num_workers"] = 0
    return config_class(**chosen)
