"""OGBench's play data, made anew by its own scripted experts (Park et al., 2025, arXiv:2410.20092).

A robot's arm carries a cube to a random place, opens a drawer or a window, presses a button, then does the
next such thing; a point drives through a maze from one random goal to the next. What they are up to is not in
the observations, and the rewards count another thing: a fixed task of the package. So the data are many-sided
and as good as never do what is asked from its beginning to its end.

  (1)  u = (w - p) / |w - p|;  w: the centre of the next cell on a shortest way to the goal, p: the position
  (2)  a = clip(u + eps, -1, 1),  eps ~ N(0, noise^2)                  the arm's actions are the package's
  (3)  r = the task's parts that are done (its cube lies right, ...) - all of its parts, d = all are done

Both r and d of a step are about the state before it, and the package itself calculates them. An episode of
the task ends there; an episode of these data goes on, and has terminations on its way. Evaluation is in the
package's environment of the task, whose infos["success"] is what OGBench's tables count.

Differences from the package: seeds, of which its scripts set none; shards; the simulator gets the six
decimals of an action that are recorded; no data for validation.

  python algorithms/collect/ogbench.py --config_path configs/collect/ogbench/cube-single-play-v0.yaml
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.metadata
import importlib.util
import inspect
import math
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
import warnings
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
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace
from minari.storage import get_dataset_path
from tqdm import tqdm

EXPERTS = {  # the package's, by the name of the environment
    "pointmaze-medium": (),  # (1)
    "cube-single": ("cube",),
    "scene": ("cube", "button", "drawer", "window"),
    "puzzle-3x3": ("button",),
}
HORIZON = 1000  # steps of an episode
DECIMALS = 6  # of actions: far coarser than double precision, far finer than the experts' noise
PACKAGES = "ogbench", "dm_control", "mujoco", "numpy", "scipy"  # on which the data depend

Count = NewType("Count", int)  # at least 1
Size = NewType("Size", float)  # at least 0
Positive = NewType("Positive", float)  # at least a millionth
Share = NewType("Share", float)  # from 0 to 1
Precision = NewType("Precision", str)
WandbMode = NewType("WandbMode", str)


@dataclasses.dataclass
class Config:
    """OGBench's play data."""

    dataset: str = "reef/ogbench/cube-single-play-v0"  # Minari id of the dataset to write
    world: str = "cube-single"  # pointmaze-medium, cube-single, scene or puzzle-3x3
    steps: Count = 1_000_000  # transitions, rounded up to whole episodes of 1000
    seed: int = 0  # of starts, aims and noise
    noise: Size = 0.1  # deviation of the noise: on actions in the maze, else on the arm's planned path
    shards: Count = 40  # parts of the data, each with random numbers of its own
    processes: int = 0  # working side by side, 0: one per core; the data do not depend on it


# ------------------------------------- The package and its experts -------------------------------------


def find_package() -> None:
    """Imports the package ogbench; asked for by its name from here, Python would find this very script."""
    if "ogbench" in sys.modules:
        return
    try:
        file = importlib.metadata.distribution("ogbench").locate_file("ogbench/__init__.py")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("the experts are in the package ogbench, which is missing: make ogbench") from None
    spec = importlib.util.spec_from_file_location("ogbench", file)
    sys.modules["ogbench"] = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(action="ignore"):  # there may be no display
        spec.loader.exec_module(sys.modules["ogbench"])


def make_clean(environment: str | gym.envs.registration.EnvSpec, **kwargs) -> gym.Env:
    """gym.make in a temporary folder of its own, where gymnasium-robotics leaves a file of each maze."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("tempfile.tempdir", folder):
        return gym.make(environment, **kwargs)


def make_world(config: Config) -> gym.Env:
    """Where the experts play: episodes of HORIZON steps that no goal ends."""
    find_package()
    kwargs = {"terminate_at_goal": False, "max_episode_steps": HORIZON, "disable_env_checker": True}
    if config.world != "pointmaze-medium":
        kwargs["mode"] = "data_collection"  # things lie anywhere, and it says what to do next
    return make_clean(f"{config.world}-v0", **kwargs)


class Navigator:
    """Drives the point through the maze, from one goal to the next."""

    def __init__(self, env: gym.Env, noise: float, rng: np.random.Generator):
        self.env, self.noise, self.rng = env, noise, rng
        maze = env.unwrapped.maze_map
        self.cells = [(int(i), int(j)) for i, j in np.argwhere(maze == 0)]
        self.goals = [cell for cell in self.cells if not self.is_hallway(maze, *cell)]

    @staticmethod
    def is_hallway(maze: np.ndarray, i: int, j: int) -> bool:
        """Whether the cell is free on two opposite sides and walled on the others: no goal lies there."""
        upright, across = (maze[i - 1, j], maze[i + 1, j]), (maze[i, j - 1], maze[i, j + 1])
        return (upright, across) in (((0, 0), (1, 1)), ((1, 1), (0, 0)))

    def begin(self) -> np.ndarray:
        """An episode from any cell; its first observation."""
        start = self.cells[self.rng.integers(len(self.cells))]
        task = {"init_ij": start, "goal_ij": self.draw_goal()}
        return self.env.reset(options={"task_info": task})[0]

    def draw_goal(self) -> tuple[int, int]:
        return self.goals[self.rng.integers(len(self.goals))]

    def act(self) -> np.ndarray:
        world = self.env.unwrapped
        position = world.get_xy()
        way = world.get_oracle_subgoal(position, world.cur_goal_xy)[0] - position
        direction = way / (np.linalg.norm(way) + 1e-6)  # (1)
        return direction + self.noise * self.rng.standard_normal(2)  # (2)

    def notice(self, observation: np.ndarray, info: dict) -> None:
        """What came of the action: at its goal the point gets another."""
        if info["success"]:
            world = self.env.unwrapped
            world.set_goal(goal_xy=world.add_noise(world.ij_to_xy(self.draw_goal())))


class Manipulator:
    """Has the package's expert of the moment move the arm; each follows a path planned beforehand."""

    def __init__(self, env: gym.Env, noise: float, kinds: tuple[str, ...]):
        self.env, self.experts = env, {}
        for kind in kinds:
            module = importlib.import_module(f"ogbench.manipspace.oracles.plan.{kind}_plan")
            options = {"gripper_always_closed": True} if kinds == ("button",) else {}  # the puzzle's finger
            expert = getattr(module, f"{kind.capitalize()}PlanOracle")
            self.experts[kind] = expert(env=env, noise=noise, **options)

    def begin(self) -> np.ndarray:
        """An episode, in which things lie anywhere; its first observation."""
        observation, info = self.env.reset()
        self.take_up(observation, info)
        return observation

    def take_up(self, observation: np.ndarray, info: dict) -> None:
        """Plans the path to what `info` asks for."""
        self.state = observation, info
        self.expert = self.experts[info["privileged/target_task"]]
        self.expert.reset(*self.state)

    def act(self) -> np.ndarray:
        return np.asarray(self.expert.select_action(*self.state))

    def notice(self, observation: np.ndarray, info: dict) -> None:
        """What came of the action: at its path's end the arm is given something else to do."""
        self.state = observation, info
        if self.expert.done:
            self.take_up(*self.env.unwrapped.set_new_target(p_stack=0))


def play_shard(config: Config, seed: np.random.SeedSequence, count: int) -> list[EpisodeBuffer]:
    """So many episodes, with the task's rewards."""
    rng, env = np.random.default_rng(seed), make_world(config)
    np.random.seed(rng.integers(2**32))  # noqa: NPY002  the package's own generator
    env.reset(seed=int(rng.integers(2**31)))
    judge = make_clean(f"{config.world}-singletask-v0", disable_env_checker=True)
    if EXPERTS[config.world]:
        player = Manipulator(env, config.noise, EXPERTS[config.world])
    else:
        player = Navigator(env, config.noise, rng)
    episodes = []
    while len(episodes) < count:
        observations, actions, states = [player.begin()], [], []
        for _ in range(HORIZON):
            action = np.round(player.act().clip(-1, 1), DECIMALS).astype(np.float32)  # (2)
            observation, _, _, _, info = env.step(action)
            player.notice(observation, info)
            observations.append(observation)
            actions.append(action)
            states.append({"qpos": info["prev_qpos"], "button_states": info.get("prev_button_states", ())})
        if config.world != "scene" or is_in_sight(states):
            episodes.append(label_play(judge, observations, actions, states))
    return episodes


def is_in_sight(states: list[dict]) -> bool:
    """Whether the cube has not left the scene's table, but for its drawer: such episodes are played anew."""
    _, y, z = np.array([state["qpos"][14:17] for state in states]).T
    in_drawer = (z >= 0.06) & (z <= 0.08)
    return bool(((y < 0.29) & ((y > -0.3) | in_drawer)).all())


def label_play(judge: gym.Env, observations: list, actions: list, states: list[dict]) -> EpisodeBuffer:
    """An episode with the rewards and terminations of the task of the environment `judge`."""
    columns = {key: np.array([state[key] for state in states], kind)
               for key, kind in (("qpos", np.float32), ("button_states", np.int64))}
    sys.modules["ogbench"].relabel_utils.relabel_dataset(judge.spec.id, judge, columns)  # (3)
    return EpisodeBuffer(
        observations=np.array(observations, np.float32),
        actions=np.array(actions),
        rewards=columns["rewards"],
        terminations=columns["masks"] == 0,  # (3)
        truncations=np.arange(len(actions)) == len(actions) - 1,
        infos={},  # without, Minari cannot print the episode
    )


# ---------------------------------------------- The dataset -----------------------------------------------


def make_play_data(config: Config) -> None:
    """Writes the dataset that `config` describes, unless it is there."""
    if config.world not in EXPERTS:
        raise UserError(f"world: {config.world!r} is not {' or '.join(EXPERTS)}")
    recipe = {name: value for name, value in vars(config).items() if name not in ("dataset", "processes")}
    if is_there(config.dataset, recipe):
        return

    start, env = time.perf_counter(), make_world(config)
    seeds = np.random.SeedSequence(config.seed).spawn(config.shards)
    parts = np.array_split(np.arange(math.ceil(config.steps / HORIZON)), config.shards)
    jobs = [(play_shard, config, seed, len(part)) for seed, part in zip(seeds, parts) if len(part)]
    processes = min(config.processes or os.cpu_count(), len(jobs))
    shards = list(tqdm(run_jobs(jobs, processes), config.dataset, len(jobs), unit="job", disable=None))
    episodes = [episode for shard in shards for episode in shard]
    reached = {"episodes": sum(bool(one.terminations.any()) for one in episodes)}
    reached["steps"] = sum(int(one.terminations.sum()) for one in episodes)
    written = write_dataset(
        config.dataset,
        episodes,
        env=env,
        eval_env=gym.spec(f"{config.world}-singletask-v0"),
        observation_space=gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32),
        algorithm_name="the package's scripted experts",
        description=describe_play(config),
        requirements=[f"ogbench=={version('ogbench')}"],
        data_format="hdf5",
        extra={
            "recipe": recipe,
            "goal_reached": reached,
            "versions": {name: version(name) for name in PACKAGES},
        },
    )
    print(
        f"{config.dataset}: {written['total_steps']:,} steps in {written['total_episodes']:,} episodes"
        f" ({time.perf_counter() - start:.0f} s); the task is done in {reached['steps']:,} of these steps, of"
        f" {reached['episodes']:,} episodes; sha256 {written['content_hash']}"
    )


def describe_play(config: Config) -> str:
    """The dataset in words, for its metadata."""
    who = "A point that drives from one random goal to the next"
    if EXPERTS[config.world]:
        who = f"An arm that does one random thing after another ({', '.join(EXPERTS[config.world])})"
    return (
        f"{who}, by OGBench's scripted experts with noise of deviation {config.noise}. Rewards are those of"
        f" the package's task {config.world}-singletask-v0: how many of its parts are done less the number of"
        " all; they and the terminations (all are done) are about the state before the step. An episode goes"
        f" on after a termination, for {HORIZON} steps. There are no reference scores: success is counted."
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
    main(make_play_data)
