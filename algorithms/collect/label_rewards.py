"""Rewards for a log that has none, from a few episodes that are known to be good: UDS and OTR.

  uds  (Yu et al., 2022, arXiv:2202.01741): some episodes have rewards, and all others get one that cannot
       flatter them. The dataset has both.
  otr  (Luo et al., 2023, arXiv:2303.13971): an episode earns by how near it comes to a demonstration. Optimal
       transport says which of its steps belongs to which of the demonstration's. The rewards of these are
       not used, nor are actions.

Equations, of an episode's observations o_1 ... o_T, a demonstration's e_1 ... e_S and their mass 1 each:

  (1)  uds: r_t = 0 (`fill` is zero), or the smallest reward of the labelled episodes (minimum)
  (2)  C_tj = 1 - cos(o_t, e_j)
  (3)  P = argmin <P, C> + epsilon sum P log P  over P >= 0 with row sums 1/T and column sums 1/S
  (4)  K = exp(-C / epsilon), v = 1 / (S K'u), u = 1 / (T K v), in turn from u = 1;  P_tj = u_t K_tj v_j
  (5)  r_t = alpha exp(-beta T / obs_dim sum_j P_tj C_tj)       T times the sum: the mean cost of step t
  (6)  of several demonstrations the one counts under which the episode earns most

(4) is Sinkhorn's algorithm. It needs no logarithms: C lies in [0, 2] and the logarithms of u and of v spread
no wider than C / epsilon, 200, so no product of the three leaves the range of double precision.

Demonstrations (for uds: the labelled episodes) are those of the dataset `demonstrations`, else the best of
the log itself by their returns: then all other rewards are hidden, to see what a method can do without them.

Differences from the papers: uds knows rewards in [0, 1], where 0 is the smallest; here they are any, which
is why there is `minimum`. The authors of OTR take beta = 1 in AntMaze, here it is 5 everywhere, and scale the
rewards to returns that span 1,000, which is left to the learner (IQL's `normalize_rewards`); the mass 1/1,000
that a step has in their code comes to the same rewards. `normalize_states` is ours, for logs whose columns
have units of their own.

  python algorithms/collect/label_rewards.py --source my/logs-v0 --demonstrations my/good-v0 --count 0 \\
      --dataset my/a-v0
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
from pathlib import Path
from typing import NewType, Optional
from unittest import mock

import gymnasium as gym
import huggingface_hub
import minari
import numpy as np
import pyrallis
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace
from minari.storage import get_dataset_path
from tqdm import tqdm

ALPHA, BETA = 5.0, 5.0  # of (5)
EPSILON = 0.01  # of (3), far smaller than costs
ITERATIONS = 100  # of (4)
KEPT = (  # what the log's metadata say that is true of the labelled log as well
    "env_spec",
    "eval_env_spec",
    "requirements",
    "ref_min_score",
    "ref_max_score",
    "num_episodes_average_score",
    "reference_source",
    "observation_columns",
    "action_columns",
    "action_names",
)
METHODS = {  # what was done, for the dataset's description
    "uds": "Unlabelled steps have the reward {fill} (UDS); {count} labelled episodes keep theirs",
    "otr": "Rewards say how near an episode comes to one of {count} demonstrations (optimal transport, OTR)",
}

Count = NewType("Count", int)  # at least 1
Size = NewType("Size", float)  # at least 0
Positive = NewType("Positive", float)  # at least a millionth
Share = NewType("Share", float)  # from 0 to 1
Precision = NewType("Precision", str)
WandbMode = NewType("WandbMode", str)


@dataclasses.dataclass
class Config:
    """Rewards for a log that has none."""

    dataset: str = "reef/halfcheetah/medium-replay-otr-v1"  # Minari id of the dataset to write
    source: str = "reef/halfcheetah/medium-replay-v1"  # Minari id of the log
    method: str = "otr"  # uds or otr
    demonstrations: Optional[str] = None  # Minari id of good (uds: labelled) episodes; null: the log's own
    count: int = 10  # how many of them, the best by their returns; 0: all
    fill: str = "zero"  # uds: the reward of unlabelled steps, zero or minimum (the smallest labelled one)
    normalize_states: bool = False  # otr: standardise observations by the log's mean and deviation


# ------------------------------------------------ Rewards ------------------------------------------------


def unlabelled_reward(fill: str, labelled: list[np.ndarray]) -> float:
    """What every step without a reward gets, from the rewards [T] of the labelled episodes."""
    if fill == "zero":
        return 0.0  # (1)
    return float(min(rewards.min() for rewards in labelled))  # (1)


def cosine_costs(observations: np.ndarray, demonstration: np.ndarray) -> np.ndarray:
    """C [T, S] of observations [T, obs_dim] and a demonstration's [S, obs_dim]; a null vector costs 1."""
    directions = []
    for vectors in (observations, demonstration):
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        directions.append(vectors / np.maximum(lengths, 1e-12))
    return (1 - directions[0] @ directions[1].T).clip(0, 2)  # (2)


def transport(costs: np.ndarray, iterations: int = ITERATIONS) -> np.ndarray:
    """P [T, S] of (3) for costs [T, S] in [0, 2]: its rows sum to 1/T, its columns nearly to 1/S."""
    steps, others = costs.shape
    kernel = np.exp(-costs / EPSILON)  # (4)
    u = np.ones(steps)
    for _ in range(iterations):
        v = 1 / (others * (u @ kernel))  # (4)
        u = 1 / (steps * (kernel @ v))  # (4)
    return u[:, None] * kernel * v  # (4)


def transport_rewards(observations: np.ndarray, demonstration: np.ndarray) -> np.ndarray:
    """Rewards [T] in (0, ALPHA] of an episode beside one demonstration."""
    costs = cosine_costs(observations, demonstration)
    step_costs = (transport(costs) * costs).sum(1)  # [T]
    steps, obs_dim = observations.shape
    return ALPHA * np.exp(-BETA * steps / obs_dim * step_costs)  # (5)


def best_rewards(observations: np.ndarray, demonstrations: list[np.ndarray]) -> np.ndarray:
    """Rewards [T] of an episode beside the demonstration [S, obs_dim] under which it earns most."""
    candidates = [transport_rewards(observations, demonstration) for demonstration in demonstrations]
    return max(candidates, key=np.sum)  # (6)


# ---------------------------------------------- The dataset -----------------------------------------------


def label(config: Config) -> None:
    """Writes the log with rewards as the dataset, unless it is there."""
    if config.method not in METHODS:
        raise UserError(f"method: {config.method!r} is not {' or '.join(METHODS)}")
    if config.fill not in ("zero", "minimum"):
        raise UserError(f"fill: {config.fill!r} is not zero or minimum")
    log = load_dataset(config.source)
    good = load_dataset(config.demonstrations) if config.demonstrations else log
    check_kinds(config, log, good)
    demonstrations = choose_best(config, list(good.iterate_episodes()))
    recipe = {name: value for name, value in vars(config).items() if name != "dataset"}
    recipe["source_hash"] = content_hash(log)
    recipe["demonstrations_hash"] = content_hash(good) if config.demonstrations else recipe["source_hash"]
    recipe["demonstration_episodes"] = [int(episode.id) for episode in demonstrations]
    if is_there(config.dataset, recipe):
        return

    start = time.perf_counter()
    episodes = list(log.iterate_episodes())
    if config.method == "uds":
        labelled = label_uds(config, episodes, demonstrations)
    else:
        labelled = label_otr(config, episodes, demonstrations)
    words = METHODS[config.method].format(fill=config.fill, count=len(demonstrations))
    known = {key: value for key, value in log.storage.metadata.items() if key in KEPT}
    written = write_dataset(
        config.dataset,
        labelled,
        observation_space=log.observation_space,
        action_space=log.action_space,
        algorithm_name=config.method.upper(),
        description=f"{config.source} without its rewards. {words}. Returns here are not the environment's.",
        data_format="hdf5",
        extra={**known, "recipe": recipe},
    )
    returns = [episode.rewards.sum() for episode in labelled]
    print(
        f"{config.dataset}: {written['total_steps']:,} steps in {written['total_episodes']:,} episodes"
        f" ({time.perf_counter() - start:.0f} s), returns from {min(returns):.1f} to {max(returns):.1f};"
        f" sha256 {written['content_hash']}"
    )
    print(words)


def check_kinds(config: Config, log: minari.MinariDataset, good: minari.MinariDataset) -> None:
    """An error where demonstrations are of another kind than the log, or otr has no vectors to compare."""
    kinds = [vector_shapes(dataset.observation_space) for dataset in (log, good) if config.method == "otr"]
    if config.method == "uds":
        kinds = [(dataset.observation_space, dataset.action_space) for dataset in (log, good)]
    if kinds[0] != kinds[1]:
        advice = "bounds are the data's unless an import names them, --action_low and --action_high"
        raise UserError(f"demonstrations: {good.id} has {kinds[1]}, but {log.id} has {kinds[0]}; {advice}")
    for field in ("observation_columns", "action_names"):
        ours, theirs = (dataset.storage.metadata.get(field) for dataset in (log, good))
        if ours and theirs and ours != theirs:
            raise UserError(f"demonstrations: {field} of {good.id} are {theirs}, of {log.id} {ours}")


def choose_best(config: Config, episodes: list) -> list:
    """Of the episodes the `count` with the highest returns, in their order; all of them for 0."""
    returns = np.array([episode.rewards.sum(dtype=np.float64) for episode in episodes])
    if not config.demonstrations and np.ptp(returns) == 0:
        problem = f"all episodes of {config.source} have the same return, so none is known to be good"
        raise UserError(f"{problem}; name a dataset of good ones, --demonstrations")
    if config.count > len(episodes):
        problem = f"count: there are {len(episodes)} episodes to choose from, not {config.count}"
        raise UserError(f"{problem}; --count 0 takes all")
    best = np.argsort(-returns, kind="stable")[: config.count or len(episodes)]
    return [episodes[i] for i in np.sort(best)]


def label_uds(config: Config, episodes: list, demonstrations: list) -> list[EpisodeBuffer]:
    """Labelled episodes as they are, all others with one reward; those of another dataset come first."""
    fill = unlabelled_reward(config.fill, [episode.rewards for episode in demonstrations])
    own = set() if config.demonstrations else {episode.id for episode in demonstrations}
    labelled = []
    if config.demonstrations:
        labelled += [with_rewards(episode, episode.rewards) for episode in demonstrations]
    for episode in episodes:
        hidden = np.full(len(episode.rewards), fill)
        labelled.append(with_rewards(episode, episode.rewards if episode.id in own else hidden))
    return labelled


def label_otr(config: Config, episodes: list, demonstrations: list) -> list[EpisodeBuffer]:
    """Each episode with the rewards of the demonstration that it comes nearest to."""
    mean, std = 0.0, 1.0
    if config.normalize_states:
        seen = np.concatenate([vectors(episode) for episode in episodes])
        mean, std = seen.mean(0), seen.std(0)
        std[std == 0] = 1.0
    targets = [(vectors(episode) - mean) / std for episode in demonstrations]
    labelled = []
    for episode in tqdm(episodes, config.dataset, unit="episode", disable=None):
        rewards = best_rewards((vectors(episode) - mean) / std, targets)
        labelled.append(with_rewards(episode, rewards))
    return labelled


def vectors(episode: minari.EpisodeData) -> np.ndarray:
    """What was seen before each step, [T, obs_dim], of a Dict all entries side by side."""
    seen = np.concatenate(leaves(episode.observations), axis=-1)
    return seen[:-1].astype(np.float64)


def with_rewards(episode: minari.EpisodeData, rewards: np.ndarray) -> EpisodeBuffer:
    """The episode with these rewards [T]; all else, what was logged beside it too, is as it was."""
    return EpisodeBuffer(
        observations=episode.observations,
        actions=episode.actions,
        rewards=np.asarray(rewards, np.float64),
        terminations=episode.terminations,
        truncations=episode.truncations,
        infos=episode.infos or {},  # without, Minari cannot print the episode
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


def load_dataset(name: str) -> minari.MinariDataset:
    """The dataset on this machine, else from the Minari hub; says which."""
    local, ours = (minari.storage.get_dataset_path(name) / "data").exists(), name.startswith("reef/")
    advice = f"make it: make dataset ID={name}" if ours else f"see minari list remote, minari download {name}"
    configs = Path(__file__).resolve().parent / "../../configs"
    known = {"/".join(file.with_suffix("").parts[-3:]) for file in configs.glob("*/*/*/*/*-v[0-9].yaml")}
    root = minari.storage.get_dataset_path()
    known |= {data.parent.relative_to(root).as_posix() for data in root.glob("*/**/data")}
    near = difflib.get_close_matches(name, known - {name}, 2)
    if local:
        advice = f"if its files are damaged, minari delete {name}, then {advice}"
    elif near:
        advice = f"did you mean {' or '.join(near)}? Else {advice}"
    with explain(f"cannot load {name}", advice):
        if not local and not ours:  # ask once: the hub's client would ask for half a minute
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=4)
        dataset = minari.load_dataset(name, download=not ours)
        list(dataset.storage.get_episode_metadata(dataset.episode_indices[-1:]))  # is the file whole?
    source = "on this machine" if local else "from the Minari hub"
    print(f"{name}, {source}: {dataset.total_episodes:,} episodes, {dataset.total_steps:,} steps")
    return dataset


def leaves(tree) -> list:
    """The entries of a Dict in the order of its sorted keys, however deep; anything else is its own leaf."""
    if isinstance(tree, Mapping):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [tree]


def vector_shapes(space: gym.Space) -> list[tuple]:
    """Shapes of the vectors that an element of `space` consists of."""
    for leaf in leaves(space):
        if not isinstance(leaf, gym.spaces.Box) or len(leaf.shape) != 1:
            raise UserError(f"this script is not for {leaf}: it takes vectors (Box)")
    return [leaf.shape for leaf in leaves(space)]


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
    main(label)
