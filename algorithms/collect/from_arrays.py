"""Your own log as a Minari dataset: an .npz, .csv or .parquet with one row per step, in the order of time.

  observations       what was seen before the step                           [N, obs_dim]
  actions            what was done: quantities, not a choice among a few     [N, act_dim]
  rewards            what the step earned                                    [N]
  terminations       1 where the episode ended for good in this step         [N]
  truncations        1 where it was only cut, by a time limit for example    [N], optional with episode_ids
  episode_ids        number or name of the row's episode                     [N], optional
  next_observations  what was seen after the step                            [N, obs_dim], optional

In an .npz these are arrays; Dict observations are an array for each key, observations/<key>. In a table they
are columns: observation_0, observation_1, ..., action_0, ..., reward, termination, truncation, episode_id,
next_observation_0, ...; a column of a .parquet may also hold vectors. Singular and plural are the same, and
so are D4RL's terminals and timeouts and Gymnasium's terminated and truncated. What has other names is listed:
--observations "position velocity" --actions force; names with blanks in them stand in a YAML list,
--observations "[x, 'speed in m/s']". Columns that are not named are ignored.

A Minari episode of T steps has T + 1 observations: the last is the next observation of its last row. Where
the log has no next observations

  (1)  a terminated episode gets its last observation a second time: no value is ever asked for there
  (2)  a truncated one loses its last step, whose observation becomes the last: that step cannot bootstrap

An episode that ends without a flag (the episode_id changes, or the log ends) counts as truncated. Action
bounds are the environment's, else --action_low and --action_high, else the data's extremes. A single column
of whole numbers may be a choice (discrete actions), so it is taken only with an environment or with bounds.
Numbers keep their type, float32 or float64; actions are float32, or what the environment takes.

  python algorithms/collect/from_arrays.py --file log.csv --dataset my/logs-v0
"""

import contextlib
import csv
import dataclasses
import difflib
import hashlib
import importlib
import inspect
import io
import itertools
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import NewType, Optional
from unittest import mock

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pyrallis
from gymnasium.spaces import Box
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.namespace import create_namespace
from minari.storage import get_dataset_path

NAMES = {  # what the columns of each field are called
    "observations": r"observations?(_\d+)?",
    "actions": r"actions?(_\d+)?",
    "rewards": r"rewards?",
    "terminations": r"terminations?|terminals?|terminated",
    "truncations": r"truncations?|timeouts?|truncated",
    "episode_ids": r"episode_ids?",
    "next_observations": r"next_observations?(_\d+)?",
}
Count = NewType("Count", int)  # at least 1
Size = NewType("Size", float)  # at least 0
Positive = NewType("Positive", float)  # at least a millionth
Share = NewType("Share", float)  # from 0 to 1
Precision = NewType("Precision", str)
WandbMode = NewType("WandbMode", str)
Words = NewType("Words", list)  # of text


@dataclasses.dataclass
class Config:
    """Your own log as a Minari dataset. The words of a list stand between blanks: "position velocity"."""

    dataset: str = "my/logs-v0"  # Minari id of the dataset to write
    file: str = "log.npz"  # .npz, .csv or .parquet
    observations: Optional[Words] = None  # list of columns, side by side; null: by their names
    actions: Optional[Words] = None  # list of columns
    rewards: Optional[Words] = None  # a column
    terminations: Optional[Words] = None  # a column
    truncations: Optional[Words] = None  # a column
    episode_ids: Optional[Words] = None  # a column
    next_observations: Optional[Words] = None  # list of columns, in the order of `observations`
    environment: Optional[str] = None  # Gymnasium id: policies are evaluated there; null: nowhere
    action_low: Optional[Words] = None  # lower bounds of the actions: a list, or one number for all
    action_high: Optional[Words] = None  # upper bounds of the actions
    ref_min: Optional[float] = None  # return that scores 0
    ref_max: Optional[float] = None  # return that scores 100


@partial(pyrallis.decode.register, Words)
def split_words(value) -> list[str]:
    """The entries of a list, or the words between the blanks of a text."""
    return [str(entry) for entry in value] if isinstance(value, list) else str(value).split()


# ------------------------------------------------ The file ------------------------------------------------


class Log:
    """The columns of a file by name: arrays of an .npz, or columns of a table."""

    def __init__(self, file: str):
        self.file, self.first = Path(file), None  # (name, number of rows) of the column read first
        readers = {".npz": np.load, ".csv": read_csv, ".parquet": pd.read_parquet}
        if self.file.suffix not in readers:
            raise UserError(f"file: {file} does not end in {', '.join(readers)}")
        if not self.file.exists():
            raise UserError(f"file: there is no {file}")
        try:
            self.columns = readers[self.file.suffix](self.file)
            self.names = [str(name) for name in self.columns]
        except Exception as error:  # each library raises its own
            raise self.fault(f"cannot be read: {error!r:.200}") from None

    def fault(self, problem: str, row: int | None = None) -> Exception:
        """What to raise; a row is counted from 0, its line in a .csv from 1, the header's."""
        place = "" if row is None else f", row {row}"
        if row is not None and self.file.suffix == ".csv":
            with self.file.open(newline="", encoding="utf-8-sig") as lines:
                reader = csv.reader(lines, skipinitialspace=True)
                filled = (reader.line_num for cells in reader if len(cells) > 1 or "".join(cells).strip())
                place += f" (line {next(itertools.islice(filled, row + 1, None))})"
        return UserError(f"{self.file}{place}: {problem}")

    def find(self, field: str, given: list[str] | None) -> dict[str, list[str]]:
        """{key: its columns} of Dict observations, {"": columns} of anything else; {} if there are none."""
        if given:
            found, keyed = given, {}
            for name in {*found}.difference(self.names):
                raise self.fault(f"--{field}: no column {name} among {', '.join(self.names):.300}")
        else:
            found = [name for name in self.names if re.fullmatch(NAMES[field], name)]
            keyed = {name.partition("/")[2]: [name] for name in self.names if name.startswith(f"{field}/")}
            found.sort(key=lambda name: int(re.sub(r"\D", "", name) or -1))  # _10 comes after _9
            numbers = [int(name.rpartition("_")[2]) for name in found if name[-1].isdigit()]
            alone = len(found) == 1 and not numbers
            clear = alone or numbers in ([*range(len(found))], [*range(1, len(found) + 1)])
            if not clear or (found and keyed) or any(not key or "/" in key for key in keyed):
                names = [*found, *(f"{field}/{key}" for key in keyed)]
                raise self.fault(f"choose the {field} among {', '.join(names):.300}: --{field} ...")
        return keyed or ({"": found} if found else {})

    def read(self, name: str):
        """A column as it is, an array or of a table, with as many rows as those read before."""
        try:
            column = self.columns[name]
            rows = len(column)
        except Exception as error:  # pickled, cut short, a single number, ...
            raise self.fault(f"{name} cannot be read: {error!r:.200}") from None
        if not rows:
            raise self.fault("there are no rows")
        self.first = self.first or (name, rows)
        if rows != self.first[1]:
            raise self.fault(f"{name} has {rows:,} rows, but {self.first[0]} has {self.first[1]:,}")
        return column

    def numbers(self, name: str) -> np.ndarray:
        """A column as finite numbers, float32 or float64 [N, d]."""
        column = self.read(name)
        array = column if isinstance(column, np.ndarray) else self.cells(column)
        if array.dtype.kind not in "biuf" or array.itemsize > 8:
            raise self.fault(f"{name} holds {array.dtype}, not numbers")
        if array.ndim > 2 or not array.size:
            raise self.fault(f"{name} has shape {array.shape}; each row must be a number or a vector of them")
        array = array.reshape(len(array), -1).astype(np.result_type(array, np.float32), copy=False)
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(array.astype(np.float32, copy=False))  # as training will see it
        if bad.any():
            row, entry = np.unravel_index(bad.argmax(), bad.shape)
            cell = column.iloc[row] if isinstance(column, pd.Series) else array[row]
            cell, where = (cell, name) if np.ndim(cell) == 0 else (cell[entry], f"{name}[{entry}]")
            raise self.fault(f"{where} is {cell!s:.50}, not a finite float32 number", row)
        return array

    def cells(self, column: pd.Series) -> np.ndarray:
        """A column of a table as an array [N] or, if it holds vectors, [N, d]; nan for what is no number."""
        if column.dtype.kind not in "biufO":
            raise self.fault(f"{column.name} holds {column.dtype}, not numbers")
        if isinstance(column.dtype, np.dtype) and column.dtype != object:
            return column.to_numpy()
        if column.map(np.ndim).any():
            sizes = column.map(lambda cell: np.ndim(cell) and np.size(cell)).to_numpy()
            if (sizes != sizes[0]).any():
                row = (sizes != sizes[0]).argmax()
                raise self.fault(f"{column.name} has {sizes[row]} entries, row 0 has {sizes[0]}", row)
            return np.stack(column.to_numpy())
        column = column.map(lambda cell: {"true": 1, "false": 0}.get(str(cell).lower(), cell))
        return pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)

    def scalars(self, name: str) -> np.ndarray:
        """A column of one finite number per row, [N]."""
        array = self.numbers(name)
        if array.shape[1] != 1:
            raise self.fault(f"{name} has {array.shape[1]} entries in a row, not one")
        return array[:, 0]

    def flags(self, name: str) -> np.ndarray:
        """A column of 0 and 1, bool [N]."""
        array = self.scalars(name)
        bad = (array != 0) & (array != 1)
        if bad.any():
            raise self.fault(f"{name} is {array[bad.argmax()]:g}, neither 0 nor 1", bad.argmax())
        return array.astype(bool)

    def matrix(self, names: list[str]) -> np.ndarray:
        """Columns side by side, [N, sum of d]."""
        columns = [self.numbers(name) for name in names]
        return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)


def read_csv(file: Path) -> pd.DataFrame:
    """Every column of a .csv; a row of another length than the header is an error."""
    header = pd.read_csv(file, header=None, nrows=1, skipinitialspace=True).iloc[0].dropna()
    if header.duplicated().any():
        raise ValueError(f"its first line, the header, has {header[header.duplicated()].iloc[0]} twice")
    with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
        return pd.read_csv(file, index_col=False, skipinitialspace=True, low_memory=False)


def read_log(config: Config) -> tuple[Log, dict]:
    """The log and its fields: observations and next_observations {key: [N, d]}, actions [N, act_dim],
    rewards [N], terminations and truncations bool [N], episode_ids [N] as they are; None for what it lacks.
    """
    log = Log(config.file)
    given = {
        "observations": config.observations,
        "actions": config.actions,
        "rewards": config.rewards,
        "terminations": config.terminations,
        "truncations": config.truncations,
        "episode_ids": config.episode_ids,
        "next_observations": config.next_observations,
    }
    names = {field: log.find(field, given[field]) for field in NAMES}
    optional = ("next_observations", "episode_ids", *["truncations"] * bool(names["episode_ids"]))
    if missing := [field for field in NAMES if not names[field] and field not in optional]:
        advice = f"give the name, --{missing[0]} ..., or add it"
        raise log.fault(f"no {' and no '.join(missing)} among {', '.join(log.names):.300}; {advice}")
    fields = dict.fromkeys(NAMES)
    for field, columns in names.items():
        if field in ("observations", "next_observations"):
            fields[field] = {key: log.matrix(columns[key]) for key in columns} or None
        elif field == "actions":
            fields[field] = log.matrix(columns[""])
        elif columns:
            if len(columns[""]) > 1:
                raise UserError(f"{field}: one column, not {', '.join(columns[''])}")
            read = {"rewards": log.scalars, "episode_ids": log.read}.get(field, log.flags)
            fields[field] = read(columns[""][0])
    log.columns = None  # memory
    before, after = (
        {key: array.shape for key, array in (fields[field] or {}).items()}
        for field in ("observations", "next_observations")
    )
    if after and before != after:
        raise log.fault(f"observations have shapes {before}, next_observations {after}")
    if fields["truncations"] is None:
        fields["truncations"] = np.zeros_like(fields["terminations"])
    return log, fields


# ---------------------------------------------- The episodes ----------------------------------------------


def find_ends(log: Log, flagged: np.ndarray, ids) -> np.ndarray:
    """The last row of each episode, in order; flagged [N]: terminated or truncated; ids [N] or None."""
    if ids is None:
        last = flagged.copy()
        last[-1] = True
        return np.flatnonzero(last)
    if np.ndim(ids) != 1:
        raise log.fault(f"episode_ids have shape {np.shape(ids)}; each row must have one")
    codes, names = pd.factorize(ids)  # 0, 1, 2, ... as they first appear; -1 is an empty cell
    if (codes < 0).any():
        raise log.fault("it has no episode_id", (codes < 0).argmax())
    last = np.append(codes[1:] != codes[:-1], True)
    first = np.flatnonzero(np.append(True, last[:-1]))
    again = codes[first] != np.arange(len(first))
    if again.any():
        row = first[again.argmax()]
        problem = f"episode_id {names[codes[row]]} comes back after another; are rows shuffled?"
        raise log.fault(problem, row)
    if (flagged & ~last).any():
        row = (flagged & ~last).argmax()
        raise log.fault(f"flagged as an end, but episode {names[codes[row]]} goes on in the next row", row)
    return np.flatnonzero(last)


def check_order(log: Log, observations: dict, following: dict, first: int, end: int) -> None:
    """In an episode (rows `first` to `end`) a row's next observation has to be what the next row observes."""
    for key, array in observations.items():
        wrong = ~np.isclose(following[key][first:end], array[first + 1 : end + 1])
        if wrong.any():
            row, entry = np.argwhere(wrong)[0] + (first, 0)
            seen, came = following[key][row, entry], array[row + 1, entry]
            where = "/".join(filter(None, ("next_observations", key))) + f"[{entry}]"
            problem = f"{where} is {seen}, but the next row of the episode observes {came}"
            raise log.fault(f"{problem}: are rows shuffled, or is a flag missing?", row)


def cut_episodes(log: Log, fields: dict) -> tuple[list[EpisodeBuffer], list[str]]:
    """The log as episodes of T steps and T + 1 observations, and what had to be made up for it, in words."""
    observations, following = fields["observations"], fields["next_observations"]
    terminations, truncations = fields["terminations"], fields["truncations"]
    ends = find_ends(log, terminations | truncations, fields["episode_ids"])
    starts, cut, episodes = np.append(0, ends[:-1] + 1), ~terminations[ends], []
    for first, end in zip(starts, ends):
        stop, final = end + 1, following or observations  # (1)
        if following:
            check_order(log, observations, following, first, end)
        elif not terminations[end]:
            stop, final = end, {key: array[1:] for key, array in observations.items()}  # (2)
        if stop == first:
            continue
        steps, last = slice(first, stop), slice(stop - 1, stop)
        seen = {key: np.append(array[steps], final[key][last], axis=0) for key, array in observations.items()}
        flags = terminations[steps], truncations[steps].copy()
        flags[1][-1] |= not flags[0][-1]
        episodes.append(
            EpisodeBuffer(
                observations=seen.get("", seen),
                actions=fields["actions"][steps],
                rewards=fields["rewards"][steps],
                terminations=flags[0],
                truncations=flags[1],
                infos={},  # without, Minari cannot print the episode
            )
        )
    if not episodes:
        raise log.fault("no step is left: every episode is one truncated step without next_observations")

    notes, unflagged = {}, ends[cut & ~truncations[ends]]
    notes["episodes without a flag at their end, taken as truncated"] = len(unflagged)
    if not following:
        notes["terminated episodes whose last observation stands twice at the end"] = (~cut).sum()
        notes["steps lost, each the last of a truncated episode: its next observation is unknown"] = cut.sum()
        notes["episodes lost, truncated after a single step"] = len(ends) - len(episodes)
    else:
        inner = ends[:-1][cut[:-1]]  # truncated, and another episode follows
        same = [(following[key][inner] == array[inner + 1]).all(1) for key, array in observations.items()]
        what = "truncated episodes whose last next observation is the first of the next episode"
        notes[f"{what} (wrong if a reset lies between)"] = np.all(same, axis=0).sum()
    return episodes, [f"{what}: {count:,}" for what, count in notes.items() if count]


# ---------------------------------------------- The dataset -----------------------------------------------


def describe(observations: dict, actions) -> str:
    """Shapes of observations {key: array or space} and actions, in words."""
    keys = [f"{key} {values.shape}".strip() for key, values in sorted(observations.items())]
    return f"observations {', '.join(keys)} and actions {actions.shape}"


def recorded_environment(config: Config, log: Log, fields: dict) -> gym.Env | None:
    """The environment that the log is from, if one is named and its spaces fit."""
    if not config.environment:
        return None
    with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):  # it prints a notice
        gym.register_envs(importlib.import_module("gymnasium_robotics"))  # mazes, hands and kitchen
    try:
        env = make_clean(config.environment)
    except Exception as error:  # environments raise whatever they like
        raise UserError(f"environment: cannot make {config.environment}: {error!r:.200}") from None
    if not isinstance(env.action_space, Box):
        raise UserError(f"environment: {config.environment} has no continuous actions but {env.action_space}")
    space = env.observation_space
    theirs = describe(space if isinstance(space, Mapping) else {"": space}, env.action_space)
    first_row = {key: array[0] for key, array in fields["observations"].items()}
    ours = describe(first_row, fields["actions"][0])
    if theirs != ours:
        raise log.fault(f"it has {ours}, but {config.environment} has {theirs}")
    return env


def make_clean(environment: str | gym.envs.registration.EnvSpec, **kwargs) -> gym.Env:
    """gym.make in a temporary folder of its own, where gymnasium-robotics leaves a file of each maze."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("tempfile.tempdir", folder):
        return gym.make(environment, **kwargs)


def cast(array: np.ndarray, space: Box) -> np.ndarray:
    """The array in the floating-point type of the space, which a .csv does not tell."""
    return array.astype(np.result_type(space.dtype, np.float32), copy=False)


def action_bounds(config: Config, log: Log, actions: np.ndarray) -> tuple[Box, str]:
    """The space of actions without an environment, and where its bounds are from."""
    given = {"action_low": config.action_low, "action_high": config.action_high}
    if not any(given.values()):
        if actions.shape[1] == 1 and (actions == actions.round()).all():
            problem = "the only column of actions holds whole numbers, as discrete actions do"
            raise log.fault(f"{problem}; if they are quantities, give --action_low and --action_high")
        return Box(actions.min(0), actions.max(0), dtype=actions.dtype), "the data's extremes"
    try:
        low, high = (np.array(words or [], actions.dtype) for words in given.values())
        low, high = (np.broadcast_to(bound, actions.shape[1:]) for bound in (low, high))
    except ValueError:
        low = high = np.array(np.nan)
    if not (np.isfinite([low, high]).all() and (low < high).all()):
        wanted = f"one number each or {actions.shape[1]}, the low below the high"
        raise UserError(f"action_low and action_high: {', '.join(map(str, given.values()))}: {wanted}")
    return Box(low, high, dtype=actions.dtype), "action_low and action_high"


def import_log(config: Config) -> None:
    """Writes the log as the dataset, and says what it had to make up."""
    try:
        namespace, *_ = parse_dataset_id(config.dataset)
    except (TypeError, ValueError):
        namespace = None
    if not namespace:
        wanted = "an id such as my/logs-v0, with a namespace of at least two letters and a version"
        raise UserError(f"dataset: {config.dataset!r} is not {wanted}")
    if get_dataset_path(config.dataset).exists():
        raise UserError(f"{config.dataset} is there: minari delete {config.dataset}, or another --dataset")
    references = config.ref_min, config.ref_max
    if references != (None, None) and (None in references or references[0] >= references[1]):
        raise UserError("ref_min and ref_max: give both, the smaller first, or neither")
    if config.environment and (config.action_low or config.action_high):
        raise UserError("action_low, action_high: the environment has bounds of its own; leave them out")

    log, fields = read_log(config)
    env = recorded_environment(config, log, fields)
    if env:
        spaces, origin = (env.observation_space, env.action_space), f"those of {config.environment}"
        seen = spaces[0] if isinstance(spaces[0], Mapping) else {"": spaces[0]}
        fields["actions"] = cast(fields["actions"], env.action_space)
        for field in ("observations", "next_observations"):
            fields[field] = {key: cast(array, seen[key]) for key, array in (fields[field] or {}).items()}
    else:
        boxes = {key: Box(-math.inf, math.inf, array.shape[1:], array.dtype)
                 for key, array in fields["observations"].items()}
        fields["actions"] = fields["actions"].astype(np.float32, copy=False)  # as training will see them
        actions, origin = action_bounds(config, log, fields["actions"])
        spaces = boxes.get("") or gym.spaces.Dict(boxes), actions
    episodes, notes = cut_episodes(log, fields)
    notes.append(f"action bounds: {origin}")
    outside = np.mean((fields["actions"] < spaces[1].low) | (fields["actions"] > spaces[1].high))
    if outside:
        notes.append(f"action entries outside, which training clips: {outside:.2%}")
    with log.file.open("rb") as file:
        source = {"file": log.file.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    scores = {} if None in references else dict(zip(("ref_min_score", "ref_max_score"), references))
    written = write_dataset(
        config.dataset,
        episodes,
        env=env,
        observation_space=spaces[0],
        action_space=spaces[1],
        description="; ".join([f"imported from {log.file.name}", *notes]),
        data_format="hdf5",
        extra={"source": source, **scores},
    )
    terminated = sum(episode.terminations[-1] for episode in episodes)
    print(
        f"{config.dataset}: {written['total_steps']:,} steps in {written['total_episodes']:,} episodes,"
        f" {terminated:,} of them terminated; sha256 {written['content_hash']}"
    )
    print(*notes, sep="\n")


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
    register(Precision, partial(choice, ("highest", "high", "medium")))
    register(WandbMode, partial(choice, ("offline", "online", "disabled")))
    register(str, text)
    register(Config, decode_config)
    with mock.patch("inspect.getsource", cache(inspect.getsource)):  # pyrallis asks field by field
        parser = pyrallis.argparsing.ArgumentParser(Config, allow_abbrev=False, exit_on_error=False)
    try:
        config, unknown = parser.parse_known_args(arguments)
        decode_config({word.lstrip("-").partition("=")[0]: None for word in unknown})
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
        message, status = "interrupted; the same command goes on from what is saved", 130
    print(f"{Path(__file__).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main(import_log)
