"""The dark room: lives of learners, from which to learn how to learn (Laskin et al., 2022, arXiv:2210.14215).

A room of 10 x 10 cells with one goal, which the agent cannot see: it knows its cell alone. An episode of 20
steps begins in the middle; each step that ends on the goal earns 1. Only who remembers earlier episodes can
do well.

  (1)  s' = s + (0, 0), (-1, 0), (1, 0), (0, -1) or (0, 1), within the room
  (2)  r = 1 if s' is the goal, else 0
  (3)  the most that an episode can earn is min(20, 21 - d), d: steps from the start to the goal
  (4)  Q(s, a) <- Q(s, a) + lr (r + gamma max_a' Q(s', a') - Q(s, a)), from Q = 1: it looks around
  (5)  an action is best if it leads nearer to the goal, or stays there; often two are

The dataset has the whole life of such learners, from their first episode to the optimum: several of them for
each of 80 goals. The other 20 goals are in no life: they are there to test on. An episode of the dataset is a
learner's life, 300 episodes of the room one after the other; `truncations` mark their ends, where the next
observation is already the start again. infos["goal"] names the goal. The metadata have (5) for every goal and
cell.

Differences from the paper: Q-learning in a table, not a deep actor-critic.

  python algorithms/collect/dark_room.py --config_path configs/collect/dark-room/histories-v0.yaml
"""

import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import math
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import NewType
from unittest import mock

import gymnasium as gym
import minari
import numpy as np
import pyrallis
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace
from minari.storage import get_dataset_path

SIZE, STEPS = 10, 20
START = SIZE // 2 * SIZE + SIZE // 2
MOVES = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
ENVIRONMENT = "reef/DarkRoom-v0"

Count = NewType("Count", int)  # at least 1
Size = NewType("Size", float)  # at least 0
Positive = NewType("Positive", float)  # at least a millionth
Share = NewType("Share", float)  # from 0 to 1
Precision = NewType("Precision", str)
WandbMode = NewType("WandbMode", str)


@dataclasses.dataclass
class Config:
    """Histories of learners in the dark room."""

    dataset: str = "reef/dark-room/histories-v0"  # Minari id of the dataset to write
    learners: Count = 5  # for each goal
    episodes: Count = 300  # in the life of a learner
    step_size: Share = 0.5  # lr of (4)
    discount: Share = 0.9  # gamma of (4)
    exploration: Share = 0.3  # share of random moves at first; it falls to 0 by 4/5 of the life
    seed: int = 0  # of the learners; the goals to test on are always the same


# ----------------------------------------------- The room -----------------------------------------------


def next_cells() -> np.ndarray:
    """Where each move leads from each cell, [100, 5]: cell number 10 row + column."""
    rows, columns = np.divmod(np.arange(SIZE * SIZE), SIZE)
    following = []
    for down, right in MOVES:
        row, column = np.clip(rows + down, 0, SIZE - 1), np.clip(columns + right, 0, SIZE - 1)
        following.append(SIZE * row + column)  # (1)
    return np.stack(following, 1)


def best_returns() -> np.ndarray:
    """The most that an episode can earn, for each goal: [100]."""
    return np.minimum(STEPS, STEPS + 1 - distances()[START])  # (3)


def distances() -> np.ndarray:
    """Steps from each cell to each goal, [100, 100]."""
    rows, columns = np.divmod(np.arange(SIZE * SIZE), SIZE)
    return abs(rows[:, None] - rows) + abs(columns[:, None] - columns)


def best_actions() -> np.ndarray:
    """Whether an action is best, [goals, cells, actions]."""
    now, after = distances(), distances()[next_cells()]  # [cells, goals], [cells, actions, goals]
    best = (after < now[:, None]) | (after == 0)  # (5)
    return best.transpose(2, 0, 1)


def split_goals() -> tuple[np.ndarray, np.ndarray]:
    """80 goals to learn from and 20 to test on, always the same."""
    goals = np.random.default_rng(0).permutation(SIZE * SIZE)
    return np.sort(goals[:80]), np.sort(goals[80:])


class DarkRoom(gym.Env):
    """Observations are cells 0 to 99, actions stay, up, down, left, right; reset draws a goal not given."""

    observation_space = gym.spaces.Discrete(SIZE * SIZE)
    action_space = gym.spaces.Discrete(len(MOVES))

    def __init__(self, goal: int | None = None):
        self.given, self.goal, self.cell, self.following = goal, goal, START, next_cells()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.given is None:
            self.goal = int(self.np_random.integers(SIZE * SIZE))
        self.cell = START
        return self.cell, {}

    def step(self, action):
        self.cell = int(self.following[self.cell, int(action)])
        found = self.cell == self.goal
        return self.cell, float(found), False, False, {"success": found}  # (2)


def register_room() -> str:
    """The environment's id, known to Gymnasium. Its entry point, reef_dark_room, is this file."""
    sys.modules.setdefault("reef_dark_room", sys.modules[__name__])
    if ENVIRONMENT not in gym.registry:
        gym.register(ENVIRONMENT, "reef_dark_room:DarkRoom", max_episode_steps=STEPS)
    return ENVIRONMENT


# --------------------------------------------- The learners ---------------------------------------------


def live(goals: np.ndarray, config: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The lives of learners, one for each goal [G], side by side: cells, actions and rewards [G, steps]."""
    following, everyone, count = next_cells(), np.arange(len(goals)), len(goals)
    q = np.ones((count, SIZE * SIZE, len(MOVES))) + 1e-3 * rng.normal(size=(count, SIZE * SIZE, len(MOVES)))
    record = {"cells": [], "actions": [], "rewards": []}
    for episode in range(config.episodes):
        cells = np.full(count, START)
        random_share = config.exploration * max(0, 1 - episode / (0.8 * config.episodes))
        for _ in range(STEPS):
            actions = q[everyone, cells].argmax(1)
            drawn = rng.integers(len(MOVES), size=count)
            actions = np.where(rng.random(count) < random_share, drawn, actions)
            reached = following[cells, actions]  # (1)
            rewards = (reached == goals).astype(float)  # (2)
            target = rewards + config.discount * q[everyone, reached].max(1)
            q[everyone, cells, actions] += config.step_size * (target - q[everyone, cells, actions])  # (4)
            for name, column in {"cells": cells, "actions": actions, "rewards": rewards}.items():
                record[name].append(column)
            cells = reached
    return {name: np.stack(columns, 1) for name, columns in record.items()}


def collect_lives(config: Config) -> None:
    """Writes the dataset that `config` describes, unless it is there."""
    recipe = {name: value for name, value in vars(config).items() if name != "dataset"}
    if is_there(config.dataset, recipe):
        return

    start, (told, held_out) = time.perf_counter(), split_goals()
    goals = np.repeat(told, config.learners)
    lives = live(goals, config, np.random.default_rng(config.seed))
    returns = lives["rewards"].reshape(len(goals), config.episodes, STEPS).sum(2)  # [lives, episodes]
    last = returns[:, -config.episodes // 10 :].mean(1) / best_returns()[goals]
    written = write_dataset(
        config.dataset,
        as_episodes(lives, goals),
        env=gym.make(register_room()),
        eval_env=register_room(),
        algorithm_name="Q-learning in a table",
        description=describe_lives(config),
        data_format="hdf5",
        extra={
            "recipe": recipe,
            "held_out_goals": held_out.tolist(),
            "training_goals": told.tolist(),
            "best_returns": best_returns().tolist(),
            "best_actions": best_actions().astype(int).tolist(),  # 1 for the best: [goals, cells, actions]
            "source_returns": returns.mean(0).round(4).tolist(),
            "versions": {name: version(name) for name in ("gymnasium", "numpy")},
        },
    )
    print(
        f"{config.dataset}: {written['total_steps']:,} steps in {len(goals)} lives"
        f" ({time.perf_counter() - start:.0f} s); in the last tenth {last.mean():.0%} of the optimum;"
        f" sha256 {written['content_hash']}"
    )


def as_episodes(lives: dict[str, np.ndarray], goals: np.ndarray) -> list[EpisodeBuffer]:
    """Minari's episodes, a life each."""
    episodes, length = [], lives["cells"].shape[1]
    for i, goal in enumerate(goals):
        episodes.append(
            EpisodeBuffer(
                observations=np.append(lives["cells"][i], START),
                actions=lives["actions"][i],
                rewards=lives["rewards"][i],
                terminations=np.zeros(length, bool),
                truncations=np.arange(length) % STEPS == STEPS - 1,
                infos={"goal": np.full(length, goal)},
            )
        )
    return episodes


def describe_lives(config: Config) -> str:
    """The dataset in words, for its metadata."""
    return (
        f"Lives of {config.learners} learners for each of 80 goals in a dark room of 10 x 10 cells, each of"
        f" {config.episodes} episodes of {STEPS} steps from its first to its last, one after the other in one"
        " episode of this dataset; truncations mark the ends of the room's episodes. held_out_goals are in"
        " none of them."
    )


def is_there(dataset_id: str, recipe: dict) -> bool:
    """Whether this machine has the dataset, which is then said; one by another recipe is an error."""
    if not re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", dataset_id):
        raise UserError(f"dataset: {dataset_id!r} is no Minari id such as reef/pointmaze/umaze-v0")
    if not get_dataset_path(dataset_id).exists():
        return False
    found = minari.load_dataset(dataset_id).storage.metadata
    if found.get("recipe") != recipe:
        raise UserError(f"{dataset_id} is there, by another recipe: minari delete {dataset_id}")
    print(f"{dataset_id} is there: {found['total_steps']:,} steps, sha256 {found['content_hash']}")
    return True


def write_dataset(dataset_id: str, episodes: list[EpisodeBuffer], extra: dict, **metadata) -> dict:
    """Writes a dataset all at once (into a hidden folder of the Minari root, then renamed); its metadata.

    `metadata` are Minari's own fields, as its `create_dataset_from_buffers` takes them; `extra` joins them.
    """
    root, namespace = get_dataset_path(), dataset_id.rpartition("/")[0]
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder  # a root of its own: a dataset cannot change its id
        try:
            # The warnings are about an e-mail address and a link; mazes leave a file in the temporary folder.
            with warnings.catch_warnings(action="ignore"), mock.patch("tempfile.tempdir", folder):
                dataset = minari.create_dataset_from_buffers(dataset_id, episodes, **metadata)
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(root)
        dataset.storage.update_metadata({**extra, "content_hash": content_hash(dataset)})
        with contextlib.suppress(ValueError):  # it is there, or the id has none
            create_namespace(namespace)
        os.rename(Path(folder, dataset_id), root / dataset_id)
    return minari.load_dataset(dataset_id).storage.metadata


def content_hash(dataset: minari.MinariDataset) -> str:
    """sha256, as hexadecimal digits, of dtype, shape and bytes of every array, episode by episode."""
    digest = hashlib.sha256()
    for e in dataset.iterate_episodes():
        for array in (e.observations, e.actions, e.rewards, e.terminations, e.truncations):
            for leaf in leaves(array):
                digest.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return digest.hexdigest()


# -------------------- Toolbox: the same in every script that has it, word for word --------------------


def leaves(tree) -> list:
    """The entries of a Dict in the order of its sorted keys, however deep; anything else is its own leaf."""
    if isinstance(tree, Mapping):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [tree]


# ------------------------------ The command line and its errors ------------------------------


class UserError(Exception):
    """What the user can mend: `main` prints it in one line."""


class Diverged(UserError):
    """A loss or weight that is not finite any more."""


@contextlib.contextmanager
def explain(problem: str, advice: str) -> Iterator[None]:
    """Whatever is raised inside becomes an error of one line: the problem, what was raised, what to do."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{problem}: {error!r:.200}; {advice}") from None


def parse_config(arguments: list[str]) -> Config:
    """Config from the YAML file of `--config_path`, then from `--field value`: pyrallis reads both."""
    register = pyrallis.decode.register
    register(int, partial(number, int, 0, 2**32 - 1))
    register(Count, partial(number, int, 1, math.inf))
    register(float, partial(number, float, -math.inf, math.inf))
    register(Size, partial(number, float, 0, math.inf))
    register(Positive, partial(number, float, 1e-6, math.inf))
    register(Share, partial(number, float, 0, 1))
    register(bool, partial(choice, (True, False)))
    register(Precision, partial(choice, ("highest", "high", "medium", "auto")))
    register(WandbMode, partial(choice, ("offline", "online", "disabled")))
    register(str, text)
    register(Config, decode_config)
    with mock.patch("inspect.getsource", cache(inspect.getsource)):  # pyrallis asks field by field
        parser = pyrallis.argparsing.ArgumentParser(Config, allow_abbrev=False, exit_on_error=False)
    try:
        config, unknown = parser.parse_known_args(arguments)
        decode_config({word[2:].partition("=")[0] if word[:2] == "--" else word: None for word in unknown})
    except UserError:
        raise
    except Exception as error:  # argparse, yaml and the disk have no error in common
        raise UserError(f"cannot read the config, {' '.join(arguments)}: {error}; see --help") from None
    return config


def decode_config(values: dict) -> Config:
    """A Config of what pyrallis has read; an error that names the field, or the nearest one."""
    kinds, decoded = {field.name: field.type for field in dataclasses.fields(Config)}, {}
    for name, value in values.items():
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, 1)
            advice = f"did you mean {near[0]}?" if near else "see --help"
            raise UserError(f"unknown field {name}: {advice}")
        try:
            decoded[name] = pyrallis.decode(kinds[name], value)
        except Exception as error:
            raise UserError(f"{name}: {error}") from None
    return Config(**decoded)


def number(kind: type, low: float, high: float, value) -> int | float:
    """`value` as an int or a float within limits: 1e6 is an int, 2.5 and true are none."""
    found = math.nan if isinstance(value, bool) else float(value)
    if not (math.isfinite(found) and low <= found <= high) or found != kind(found):
        raise ValueError(f"{value!r} is not {kind.__name__} in [{low}, {high}]")
    return kind(found)


def text(value) -> str:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not text")
    return str(value)


def choice(choices: tuple, value):
    if type(value) is not type(choices[0]) or value not in choices:
        raise ValueError(f"{value!r} is not {' or '.join(map(str, choices))}")
    return value


def main(action: Callable[[Config], None]) -> None:
    """The command line of `action`: what the user can mend ends in one line on stderr."""
    try:
        return action(parse_config(sys.argv[1:]))
    except (UserError, OSError) as error:
        message, status = f"{error}", 3 if isinstance(error, Diverged) else 2
    except KeyboardInterrupt:
        message, status = "interrupted; the same command goes on from what is saved, or begins anew", 130
    print(f"{Path(__file__).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main(collect_lives)
