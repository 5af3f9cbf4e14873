"""PointMaze data by a planner that wanders: D4RL's maze2d recipe (Fu et al., 2020, arXiv:2004.07219).

A planner drives a ball through a maze from one random goal to the next. The learner sees position and
velocity, never these goals, and its rewards count another: the fixed goal cell of the evaluation environment.
So imitation wanders, and value learning can stitch pieces of many walks into one that goes there and stays.

  (1)  next[g][c]: the cell after c on a shortest way to cell g, by breadth-first search from g
  (2)  u = 10 (w - position) - velocity;  w: the goal if it is in the next cell, else that cell's centre
  (3)  a = clip(u + eps, -1, 1),  eps ~ N(0, noise^2)
  (4)  a goal is a random free cell's centre, shifted by at most 0.25 m; within 0.1 m of it comes the next
  (5)  r = 1 within 0.45 m of the environment's goal, else 0; an episode lasts until its time limit

The goal-conditioned form (`goals: true`, as Minari's D4RL/pointmaze) shows the planner's goal in a Dict
observation and rewards it. Reaching it truncates the episode; the next goes on from there to another goal.

The stitching form (`maze: large-stitch`) parts the large maze in two halves that share one corridor. Every
episode starts and stays in one half, by turns. Evaluation starts in the half without the goal, off the
corridor: no episode leads from there to the goal, only pieces of two do.

Differences from D4RL: (1) is looked up in every step, where D4RL's planner visits waypoints one by one, so
the ball cuts corners and recovers from any push; (4) shifts by at most 0.1 m there; in (5) the radius is
0.5 m there and the goal's place never changes (here the environment shifts it by at most 0.25 m in each
episode); each episode starts in a random free cell, where D4RL's walk never starts anew.

  python algorithms/collect/pointmaze.py --config_path configs/collect/pointmaze/umaze-v0.yaml
"""

import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import io
import math
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import NewType
from unittest import mock

import gymnasium as gym
import minari
import numpy as np
import pyrallis
from gymnasium.wrappers import FilterObservation, FlattenObservation
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace
from minari.storage import get_dataset_path
from tqdm import tqdm

MAZES = {  # Gymnasium id and the goal that D4RL rewards, a free cell (row, column)
    "umaze": ("PointMaze_UMaze-v3", (1, 1)),
    "medium": ("PointMaze_Medium-v3", (6, 6)),
    "large": ("PointMaze_Large-v3", (7, 9)),
    "large-stitch": ("PointMaze_Large-v3", (7, 9)),
}
# Columns of the stitching form. Shortest ways between cells of a half stay in it, and so does the planner.
HALVES = (1, 2, 3, 4, 5, 6), (6, 7, 8, 9, 10)
FAR = (1, 2, 3, 4)  # where evaluation starts

Count = NewType("Count", int)  # at least 1
Size = NewType("Size", float)  # at least 0
Positive = NewType("Positive", float)  # at least a millionth
Share = NewType("Share", float)  # from 0 to 1
Precision = NewType("Precision", str)
WandbMode = NewType("WandbMode", str)


@dataclasses.dataclass
class Config:
    """PointMaze data by a planner that wanders."""

    dataset: str = "reef/pointmaze/umaze-v0"  # Minari id of the dataset to write
    maze: str = "umaze"  # umaze, medium, large or large-stitch
    goals: bool = False  # true: the goal-conditioned form (not of large-stitch)
    steps: Count = 200_000  # transitions, rounded up to whole episodes
    seed: int = 0  # of starts, goals and noise
    noise: Size = 0.5  # deviation of the noise on actions, (3)
    shards: Count = 20  # parts of the data, each with random numbers of its own
    reference_episodes: Count = 100  # episodes behind each reference score
    processes: int = 0  # working side by side, 0: one per core; the data do not depend on it


# ---------------------------------------------- The planner -----------------------------------------------


class Planner:
    """Drives the ball from anywhere to anywhere in a maze whose cells are 1 m wide."""

    def __init__(self, maze):
        self.maze = maze
        rows = enumerate(maze.maze_map)
        self.cells = [(i, j) for i, row in rows for j, cell in enumerate(row) if cell != 1]  # 1 is a wall
        self.next = {goal: self.search(goal) for goal in self.cells}  # (1)

    def search(self, goal: tuple[int, int]) -> dict[tuple[int, int], tuple[int, int]]:
        """{cell: the cell after it on a shortest way to `goal`}, breadth first from the goal."""
        following, queue = {goal: goal}, deque([goal])
        while queue:
            i, j = cell = queue.popleft()
            for neighbour in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                if neighbour in self.cells and neighbour not in following:
                    following[neighbour] = cell
                    queue.append(neighbour)
        return following

    def act(self, position: np.ndarray, velocity: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Action [2], not clipped yet; position and goal [2] in m, velocity [2] in m/s."""
        goal_cell = tuple(self.maze.cell_xy_to_rowcol(goal))
        next_cell = self.next[goal_cell][tuple(self.maze.cell_xy_to_rowcol(position))]
        waypoint = goal if next_cell == goal_cell else self.maze.cell_rowcol_to_xy(next_cell)
        return 10 * (waypoint - position) - velocity  # (2)

    def draw_cell(self, rng: np.random.Generator, columns: range) -> tuple[int, int]:
        """A random free cell of these columns."""
        cells = [cell for cell in self.cells if cell[1] in columns]
        return cells[rng.integers(len(cells))]

    def draw_goal(self, rng: np.random.Generator, columns: range) -> np.ndarray:
        """Position [2] in m near the centre of a random free cell of these columns."""
        cell = self.draw_cell(rng, columns)
        return self.maze.cell_rowcol_to_xy(cell) + rng.uniform(-0.25, 0.25, 2)  # (4)


# -------------------------------------- Environments and episodes --------------------------------------


def stock_spec(maze: str) -> gym.envs.registration.EnvSpec:
    """The maze as gymnasium-robotics registers it."""
    with contextlib.redirect_stderr(io.StringIO()):  # the import prints a notice about robot hands
        import gymnasium_robotics
    gym.register_envs(gymnasium_robotics)
    return gym.spec(MAZES[maze][0])


def make_environment(config: Config, evaluation: bool) -> gym.Env:
    """Where policies are scored (`evaluation`) or data collected; one and the same in the plain form.

    Plain form: observations [4], position in m and velocity in m/s; one goal cell, starts in all the others.
    Stitching form: the same, but it starts in the columns `FAR`, unless told a cell.
    Goal-conditioned form: the stock environment; in collection it has no time limit, and a goal that is
    reached gives way to another.
    """
    spec = stock_spec(config.maze)
    if config.goals:
        return make_clean(spec) if evaluation else make_clean(spec, reset_target=True, max_episode_steps=-1)
    maze_map, (i, j) = [list(row) for row in spec.kwargs["maze_map"]], MAZES[config.maze][1]
    maze_map[i][j] = "g"
    if config.maze == "large-stitch":
        for row in maze_map:
            row[:] = ["r" if cell == 0 and column in FAR else cell for column, cell in enumerate(row)]
    env = make_clean(spec, maze_map=maze_map, continuing_task=True, reset_target=False)
    return FlattenObservation(FilterObservation(env, ["observation"]))


def make_clean(environment: str | gym.envs.registration.EnvSpec, **kwargs) -> gym.Env:
    """gym.make in a temporary folder of its own, where gymnasium-robotics leaves a file of each maze."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("tempfile.tempdir", folder):
        return gym.make(environment, **kwargs)


def collect(config: Config, seed: np.random.SeedSequence, steps: int) -> list[EpisodeBuffer]:
    """One shard: whole episodes of the noisy planner until they have `steps` transitions."""
    rng, env = np.random.default_rng(seed), make_environment(config, evaluation=False)
    world, episodes = env.unwrapped, []
    planner, columns = Planner(world.maze), range(world.maze.map_width)
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    while sum(map(len, episodes)) < steps:
        if config.maze == "large-stitch":
            columns = HALVES[len(episodes) % 2]
            observation, _ = env.reset(options={"reset_cell": planner.draw_cell(rng, columns)})
        goal = world.goal if config.goals else planner.draw_goal(rng, columns)
        observations, actions, rewards, truncated = [observation], [], [], False
        while not truncated:
            action = planner.act(world.data.qpos, world.data.qvel, goal)
            action = (action + config.noise * rng.standard_normal(2)).clip(-1, 1).astype(np.float32)  # (3)
            observation, reward, _, truncated, info = env.step(action)
            observations.append(observation)
            actions.append(action)
            rewards.append(reward)  # (5)
            if config.goals:
                truncated = info["success"]
            elif np.linalg.norm(world.data.qpos - goal) < 0.1:
                goal = planner.draw_goal(rng, columns)
        episodes.append(make_episode(observations, actions, rewards, terminated=False, truncated=True))
        if config.goals:  # the same place, now with the goal that the environment has just drawn
            observation = {**observation, "desired_goal": world.goal.copy()}
        else:
            observation, _ = env.reset()
    return episodes


def make_episode(
    observations: list, actions: list, rewards: list, terminated: bool, truncated: bool
) -> EpisodeBuffer:
    """An episode of T + 1 observations (arrays or dicts of them), T actions, T rewards, and how it ended."""
    if isinstance(observations[0], dict):
        observations = {key: np.stack([entry[key] for entry in observations]) for key in observations[0]}
    else:
        observations = np.stack(observations)
    last = np.arange(len(rewards)) == len(rewards) - 1
    return EpisodeBuffer(
        observations=observations,
        actions=np.stack(actions),
        rewards=np.array(rewards),
        terminations=last & terminated,
        truncations=last & truncated,
        infos={},  # without, Minari cannot print the episode
    )


def measure(config: Config, seed: np.random.SeedSequence, policy: str) -> dict[str, float]:
    """Return and success of "random" actions or the noiseless "planner", told the goal, in the evaluation."""
    rng, env = np.random.default_rng(seed), make_environment(config, evaluation=True)
    world, returns, successes = env.unwrapped, np.zeros(config.reference_episodes), 0
    planner = Planner(world.maze)
    for episode in range(config.reference_episodes):
        env.reset(seed=int(rng.integers(2**31)))
        truncated = success = False
        while not truncated:
            if policy == "random":
                action = rng.uniform(-1, 1, 2)
            else:
                action = planner.act(world.data.qpos, world.data.qvel, world.goal).clip(-1, 1)
            _, reward, _, truncated, info = env.step(action.astype(np.float32))
            returns[episode] += reward
            success |= info["success"]
        successes += success
    return {"return_mean": returns.mean(), "return_std": returns.std(), "success": successes / len(returns)}


# ---------------------------------------------- The dataset -----------------------------------------------


def make_dataset(config: Config) -> None:
    """Writes the dataset that `config` describes, with its reference scores, unless it is there."""
    if config.maze not in MAZES:
        raise UserError(f"maze: {config.maze!r} is not {' or '.join(MAZES)}")
    if config.goals and config.maze == "large-stitch":
        raise UserError("goals: large-stitch has no goal-conditioned form")
    horizon = stock_spec(config.maze).max_episode_steps
    if config.steps < horizon:
        raise UserError(f"steps: {config.steps} is less than one episode ({horizon} in {config.maze})")
    recipe = {name: value for name, value in vars(config).items() if name not in ("dataset", "processes")}
    if is_there(config.dataset, recipe):
        return

    start, policies = time.perf_counter(), ("random", "planner")
    seeds = np.random.SeedSequence(config.seed).spawn(config.shards + len(policies))
    shares = np.array_split(np.full(math.ceil(config.steps / horizon), horizon), config.shards)
    jobs = [(measure, config, seed, policy) for seed, policy in zip(seeds[config.shards :], policies)]
    jobs += [(collect, config, seed, share.sum()) for seed, share in zip(seeds, shares)]
    processes = min(config.processes or os.cpu_count(), len(jobs))
    results = tqdm(run_jobs(jobs, processes), config.dataset, len(jobs), unit="job", disable=None)
    low, high, *shards = results
    written = write_dataset(
        config.dataset,
        [episode for shard in shards for episode in shard],
        env=make_environment(config, evaluation=False),
        eval_env=make_environment(config, evaluation=True),
        algorithm_name="breadth-first search and a noisy PD controller",
        description=describe_dataset(config),
        ref_min_score=low["return_mean"],
        ref_max_score=high["return_mean"],
        num_episodes_average_score=config.reference_episodes,
        data_format="hdf5",
        extra={
            "recipe": recipe,
            "reference_scores": dict(zip(policies, (low, high))),
            "versions": {name: version(name) for name in ("gymnasium-robotics", "mujoco", "numpy")},
        },
    )
    print(
        f"{config.dataset}: {written['total_steps']:,} steps in {written['total_episodes']:,} episodes"
        f" ({time.perf_counter() - start:.0f} s); mean return {low['return_mean']:.1f} (random),"
        f" {high['return_mean']:.1f} (planner); sha256 {written['content_hash']}"
    )


def describe_dataset(config: Config) -> str:
    """The dataset in words, for its metadata."""
    environment, goal_cell = MAZES[config.maze]
    if config.goals:
        form = (
            "Observations show the goal of the moment and rewards count it. An episode is truncated within"
            " 0.45 m of its goal, and the next goes on from there. In the evaluation environment an episode"
            " keeps its goal."
        )
    else:
        form = (
            f"Rewards count the steps within 0.45 m of a goal in cell {goal_cell} (row, column), which the"
            " environment shifts by at most 0.25 m along each axis in each episode. It is not the planner's,"
            " and observations (position, velocity) show neither."
        )
    if config.maze == "large-stitch":
        form += (
            f" An episode starts and stays in columns {HALVES[0][0]} to {HALVES[0][-1]}, or in columns"
            f" {HALVES[1][0]} to {HALVES[1][-1]}; evaluation starts in columns {FAR[0]} to {FAR[-1]}, from"
            " where no episode leads near the goal."
        )
    return (
        f"A planner with Gaussian noise of deviation {config.noise} on its actions drives the ball of"
        f" {environment} from one random goal to the next. {form} Reference scores are mean returns of"
        f" {config.reference_episodes} episodes in the evaluation environment: ref_min_score of uniformly"
        " random actions, ref_max_score of the planner without noise, told the goal."
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


def run_jobs(jobs: list[tuple], processes: int):
    """The results of jobs (function, *arguments), in their order whatever the number of processes."""
    if processes == 1:
        yield from (function(*arguments) for function, *arguments in jobs)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), watch_parent) as pool:
        futures = [pool.submit(*job) for job in jobs]
        try:
            yield from (future.result() for future in futures)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C or a failure the others need not start


def watch_parent() -> None:
    """Ends this worker when its parent is killed; it would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


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
    main(make_dataset)
