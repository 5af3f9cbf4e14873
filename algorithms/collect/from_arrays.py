"""Your own log as a Minari dataset: an .npz, .csv or .parquet with one row per step.

  observations       what was seen before the step                           [N, obs_dim]
  actions            what was done: quantities, or one choice among a few    [N, act_dim]
  rewards            what the step earned                                    [N], none: see label_rewards.py
  terminations       1 where the episode ended for good in this step         [N]
  truncations        1 where it was only cut, by a time limit for example    [N], optional with episode_ids
  episode_ids        number or name of the row's episode                     [N], optional
  timestamps         numbers or dates: rows are put in their order           [N], optional
  next_observations  what was seen after the step                            [N, obs_dim], optional
  propensities       how likely the logged choice was, for evaluate/         [N], optional

In an .npz these are arrays; Dict observations are an array for each key, observations/<key>. In a table they
are columns: observation_0, observation_1, ..., action_0, ..., reward, termination, truncation, episode_id,
next_observation_0, ...; a column of a .parquet may also hold vectors. Singular and plural are the same, and
so are D4RL's terminals and timeouts and Gymnasium's terminated and truncated. What has other names is listed:
--observations "position velocity" --actions force; names with blanks in them stand in a YAML list,
--observations "[x, 'speed in m/s']". Columns that are not named are ignored. The names live on in the
dataset's metadata: observation_columns, action_columns and, for choices, action_names.

Without timestamps rows are in the order of time. With them and an episode_id rows may stand in any order:
episodes are sorted by their beginnings, steps within them by their times, and a step that takes more than
one and a half times the median one is a gap. `--gaps cut` makes it an end, a truncation. Where there are only
timestamps, time must not go back. `--timestamps none` ignores that column, as any that is optional.

A column of words is a choice. Observed, it becomes an entry of 0 and 1 for each word, `shift=night`. A
single column of actions that holds words, or a few whole numbers, makes a dataset of choices (discrete
actions), numbered by their sorted words. Several such columns need a word: `--choices joint` makes every
combination that occurs one choice, `--choices numbers` takes whole numbers as quantities.

`--like my/logs-v0` is for a later log of the same kind: words and choices get the numbers, actions the bounds
that they have in that earlier import, so that a policy of the one can be judged on the other.

A value may be missing: an empty cell, NA, nan. `--missing drop` leaves out the episodes where one is,
`--missing carry` repeats what was observed last in the episode, and leaves out what that cannot mend
(a first observation, an action, a reward, a flag). Otherwise they are counted and refused.

A Minari episode of T steps has T + 1 observations: the last is the next observation of its last row. Where
the log has no next observations

  (1)  a terminated episode gets its last observation a second time: no value is ever asked for there
  (2)  a truncated one loses its last step, whose observation becomes the last: that step cannot bootstrap

An episode that ends without a flag (the episode_id changes, or the log ends) counts as truncated. Action
bounds are the environment's, else --action_low and --action_high, else the data's extremes. Numbers keep
their type, float32 or float64; actions are float32, or what the environment takes.

`--heldout 0.2` puts a fifth of the episodes, drawn by `seed`, into a dataset of their own: beside my/logs-v0
it is my/logs-heldout-v0. No training sees them.

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
from gymnasium.spaces import Box, Discrete
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
    "timestamps": r"timestamps?",
    "next_observations": r"next_observations?(_\d+)?",
    "propensities": r"propensity|propensities",
}
MISSING = ["", "NA", "N/A", "n/a", "#N/A", "<NA>", "nan", "NaN", "NULL", "null"]  # None is a word
MAX_WORDS = 100  # different words, or whole numbers, of a column that is a choice
CSV = {"index_col": False, "skipinitialspace": True, "keep_default_na": False, "na_values": MISSING}
LONG_STEP = 1.5  # in median steps: what takes longer is a gap

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
    rewards: Optional[Words] = None  # a column; none: the log has no rewards, and zeros stand for them
    terminations: Optional[Words] = None  # a column; none: no episode ends for good
    truncations: Optional[Words] = None  # a column
    episode_ids: Optional[Words] = None  # a column
    timestamps: Optional[Words] = None  # a column
    next_observations: Optional[Words] = None  # list of columns, in the order of `observations`
    propensities: Optional[Words] = None  # a column
    missing: str = "refuse"  # missing values: refuse, drop their episodes, or carry the last observation on
    gaps: str = "keep"  # gaps in time: keep their steps, or cut the episode there
    choices: Optional[str] = None  # of several discrete columns of actions: joint or numbers
    like: Optional[str] = None  # id of an earlier import, whose words, choices and bounds hold here
    heldout: Share = 0.0  # share of the episodes that goes into a dataset of its own, <name>-heldout-v<n>
    seed: int = 0  # of the held-out episodes
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
        self.missing = {}  # {column: where it has no value, bool [N]}, of those that lack any
        self.order = None  # the row of the file that each row is, once they are sorted
        readers = {".npz": np.load, ".csv": read_csv, ".parquet": pd.read_parquet}
        if self.file.suffix not in readers:
            raise UserError(f"file: {file} does not end in {', '.join(readers)}")
        if not self.file.exists():
            raise UserError(f"file: there is no {file}")
        try:
            self.columns = readers[self.file.suffix](self.file)
            self.names = [str(name) for name in self.columns]
        except UnicodeDecodeError as error:
            advice = "save it as UTF-8, or: iconv -f WINDOWS-1252 -t UTF-8"
            raise self.fault(f"cannot be read as UTF-8 (byte {error.start:,}); {advice}") from None
        except Exception as error:  # each library raises its own
            raise self.fault(f"cannot be read: {error!r:.200}") from None

    def fault(self, problem: str, row: int | None = None) -> Exception:
        """What to raise; a row is counted from 0, its line in a .csv from 1, the header's."""
        if row is not None and self.order is not None:
            row = self.order[row]
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
            keyed = keyed if field in ("observations", "next_observations") else {}
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
        """A column as float32 or float64 [N, d]; what is missing is nan, and noted."""
        column = self.read(name)
        array = column if isinstance(column, np.ndarray) else self.cells(column)
        if array.dtype.kind not in "biuf" or array.itemsize > 8:
            raise self.fault(f"{name} holds {array.dtype}, not numbers")
        if array.ndim > 2 or not array.size:
            raise self.fault(f"{name} has shape {array.shape}; each row must be a number or a vector of them")
        array = array.reshape(len(array), -1).astype(np.result_type(array, np.float32), copy=False)
        with np.errstate(over="ignore"):
            bad = np.isinf(array.astype(np.float32, copy=False))  # as training will see it
        if bad.any():
            row, entry = np.unravel_index(bad.argmax(), bad.shape)
            cell = column.iloc[row] if isinstance(column, pd.Series) else array[row]
            cell, where = (cell, name) if np.ndim(cell) == 0 else (cell[entry], f"{name}[{entry}]")
            raise self.fault(f"{where} is {cell!s:.50}, not a finite float32 number", row)
        self.note_missing(name, np.isnan(array).any(1))
        return array

    def note_missing(self, name: str, absent: np.ndarray) -> None:
        if absent.any():
            self.missing[name] = absent

    def cells(self, column: pd.Series) -> np.ndarray:
        """A column of a table as an array [N] or, if it holds vectors, [N, d]; nan for an empty cell."""
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
        numbers = to_numbers(column)
        wrong = (numbers.isna() & column.notna()).to_numpy()
        if wrong.any():
            row = wrong.argmax()
            kind = "the formula" if str(column.iloc[row]).startswith("=") else ""
            problem = f"{column.name} is {kind} {column.iloc[row]!s:.50}, not a number".replace("  ", " ")
            raise self.fault(problem, row)
        return numbers.to_numpy(np.float64, na_value=np.nan)

    def words(self, name: str) -> pd.Series | None:
        """A column as text, nan where a value is missing; None if any cell is a number or a vector."""
        column = self.read(name)
        if isinstance(column, np.ndarray):
            if column.dtype.kind != "U" or column.ndim > 2 or column.size != len(column):
                return None
            column = pd.Series(column.ravel(), name=name)
        if column.dtype.kind != "O" or (column.dtype == object and column.map(np.ndim).any()):
            return None
        column = column.mask(column.astype(str).str.strip() == "")
        try:
            codes, found = pd.factorize(column)  # -1: missing
        except TypeError:
            raise self.fault(f"{name} holds neither numbers nor words but {column.iloc[0]!s:.50}") from None
        if not len(found) or to_numbers(pd.Series(found)).notna().any():
            return None
        words = pd.Series(found).astype(str).str.strip()
        formulas = words.str.startswith("=").to_numpy()
        if formulas.any():
            row = np.isin(codes, np.flatnonzero(formulas)).argmax()
            raise self.fault(f"{name} is the formula {column.iloc[row]!s:.50}; save what it amounts to", row)
        if words.nunique() > MAX_WORDS:
            few = f"{words.nunique():,} different words ({', '.join(words[:3]):.60}, ...)"
            raise self.fault(f"{name} has {few}: neither numbers nor a choice among at most {MAX_WORDS}")
        if to_numbers(words.str.replace(",", ".").str.rstrip("%")).notna().all():
            problem = f"{name} is {words[0]!s:.50}, a number with a comma or per cent"
            raise self.fault(f"{problem}; write it as 0.5", (codes == 0).argmax())
        self.note_missing(name, codes < 0)
        return pd.Series(np.append(words.to_numpy(object), np.nan)[codes], name=name)

    def ids(self, name: str):
        """A column as it is; of a .csv as text, since 1.1 and 1.10 or 01 and 1 are the same number."""
        column = self.read(name)
        if self.file.suffix == ".csv":
            column = pd.read_csv(self.file, **CSV, usecols=[name], dtype=str)[name].str.strip()
        return column

    def scalars(self, name: str) -> np.ndarray:
        """A column of one number per row, [N]."""
        array = self.numbers(name)
        if array.shape[1] != 1:
            raise self.fault(f"{name} has {array.shape[1]} entries in a row, not one")
        return array[:, 0]

    def shares(self, name: str) -> np.ndarray:
        """A column of probabilities above 0, [N]; nan where one is missing."""
        array = self.scalars(name)
        bad = (array <= 0) | (array > 1)
        if bad.any():
            raise self.fault(f"{name} is {array[bad.argmax()]:g}, no probability above 0", bad.argmax())
        return array

    def flags(self, name: str) -> np.ndarray:
        """A column of 0 and 1, [N]; nan where it is missing."""
        array = self.scalars(name)
        bad = (array != 0) & (array != 1) & ~np.isnan(array)
        if bad.any():
            raise self.fault(f"{name} is {array[bad.argmax()]:g}, neither 0 nor 1", bad.argmax())
        return array

    def times(self, name: str) -> np.ndarray:
        """A column of numbers or dates as float64 [N], dates in seconds since 1970."""
        column = self.read(name)
        is_date = column.dtype.kind == "M"
        if isinstance(column, pd.Series) and column.dtype.kind == "O":
            is_date = to_numbers(column).isna().all()
        if not is_date:
            array = self.scalars(name).astype(np.float64)
        else:
            dates = pd.to_datetime(pd.Series(column), errors="coerce", utc=True, format="ISO8601")
            array = (dates - pd.Timestamp(0, tz="UTC")).dt.total_seconds().to_numpy()
        if np.isnan(array).any():
            row = np.isnan(array).argmax()
            cell = column.iloc[row] if isinstance(column, pd.Series) else column[row]
            wanted = "neither a number nor a date such as 2026-03-31 14:05:00"
            raise self.fault(f"{name} is {cell!s:.50}, {wanted}", row)
        return array


def to_numbers(column: pd.Series) -> pd.Series:
    """Cells as numbers, true and false as 1 and 0; nan for any other."""
    numbers = pd.to_numeric(column, errors="coerce").astype(np.float64)
    others = numbers.isna() & column.notna()
    if others.any():
        numbers[others] = column[others].astype(str).str.lower().map({"true": 1.0, "false": 0.0})
    return numbers


def read_csv(file: Path) -> pd.DataFrame:
    """Every column of a .csv; a row of another length than the header is an error."""
    header = pd.read_csv(file, header=None, nrows=1, skipinitialspace=True).iloc[0].dropna()
    if header.duplicated().any():
        raise ValueError(f"its first line, the header, has {header[header.duplicated()].iloc[0]} twice")
    if len(header) == 1 and ";" in str(header.iloc[0]):
        raise ValueError("its columns are parted by semicolons; save it with commas, and points in numbers")
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.reader(lines, skipinitialspace=True)
        for cells in reader:
            if "".join(cells).strip() and len(cells) < len(header):
                raise ValueError(f"line {reader.line_num} has {len(cells)} cells, the header {len(header)}")
    with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
        return pd.read_csv(file, **CSV, low_memory=False)


# ----------------------------------------------- The fields -----------------------------------------------


def read_log(config: Config, env: gym.Env | None) -> tuple[Log, dict]:
    """The log and its fields, rows as in the file: observations and next_observations {key: [N, d]},
    actions [N, act_dim] or numbers of choices [N, 1], rewards, terminations, truncations, timestamps and
    propensities [N], episode_ids [N] as they are; None for what it lacks, nan for a missing value. With them
    come "columns", the names for the metadata.
    """
    log, like = Log(config.file), read_like(config)
    given = {
        "observations": config.observations,
        "actions": config.actions,
        "rewards": config.rewards,
        "terminations": config.terminations,
        "truncations": config.truncations,
        "episode_ids": config.episode_ids,
        "timestamps": config.timestamps,
        "next_observations": config.next_observations,
        "propensities": config.propensities,
    }
    without = {field for field in given if given[field] == ["none"]} - {"observations", "actions"}
    names = {field: {} if field in without else log.find(field, given[field]) for field in NAMES}
    optional = {"next_observations", "episode_ids", "timestamps", "propensities", *without}
    if names["episode_ids"]:
        optional.add("truncations")
    if missing := [field for field in NAMES if not names[field] and field not in optional]:
        advice = f"give the name, --{missing[0]} ..., or add it"
        raise log.fault(f"no {' and no '.join(missing)} among {', '.join(log.names):.300}; {advice}")

    fields, columns = dict.fromkeys(NAMES), {"observation_columns": []}
    seen, following = names["observations"], names["next_observations"]
    if following and {key: len(seen[key]) for key in seen} != {key: len(following[key]) for key in following}:
        raise log.fault(f"observations are {seen}, but next_observations {following}: one for each")
    for key in sorted(seen):
        others = following.get(key, seen[key])
        matrix, titles = encode(log, seen[key], others, like)
        fields["observations"] = {**(fields["observations"] or {}), key: matrix}
        columns["observation_columns"] += titles
        if following:
            matrix, _ = encode(log, others, seen[key], like)
            fields["next_observations"] = {**(fields["next_observations"] or {}), key: matrix}
    fields["actions"], known = read_actions(config, log, names["actions"][""], env, like)
    columns |= known
    if like:
        for name in ("observation_columns", "action_columns"):
            if columns[name] != like.get(name):
                raise log.fault(f"its {name} are {columns[name]}, those of {config.like} {like.get(name)}")

    readers = {"rewards": log.scalars, "propensities": log.shares, "episode_ids": log.ids}
    readers |= {"timestamps": log.times, "terminations": log.flags, "truncations": log.flags}
    for field, read in readers.items():
        if names[field]:
            if len(names[field][""]) > 1:
                raise UserError(f"{field}: one column, not {', '.join(names[field][''])}")
            fields[field] = read(names[field][""][0])
    log.columns = None  # memory
    rows = len(fields["actions"])
    if "rewards" in without:
        fields["rewards"] = np.zeros(rows)
    for field in ("terminations", "truncations"):
        if fields[field] is None:
            fields[field] = np.zeros(rows)
    before, after = (
        {key: array.shape for key, array in (fields[field] or {}).items()}
        for field in ("observations", "next_observations")
    )
    if after and before != after:
        raise log.fault(f"observations have shapes {before}, next_observations {after}")
    return log, {**fields, "columns": columns}


def read_like(config: Config) -> dict:
    """The metadata of the earlier import that this one is like; empty without one."""
    if config.like is None:
        return {}
    with explain(f"like: cannot load {config.like}", "name a dataset of this script on this machine"):
        metadata = minari.load_dataset(config.like).storage.metadata
    if "observation_columns" not in metadata:
        raise UserError(f"like: {config.like} was not imported by this script, so it names no columns")
    return metadata


def encode(log: Log, names: list[str], others: list[str], like: dict) -> tuple[np.ndarray, list[str]]:
    """Columns side by side [N, sum of d], and a title for each; words become an entry of 0 and 1 each.

    `others` are the columns before or after a step that have the same meaning, and maybe further words; with
    `like`, metadata of an earlier import, the words are that one's.
    """
    parts, titles = [], []
    for name, other in zip(names, others):
        words = log.words(name)
        if words is None:
            parts.append(log.numbers(name))
            titles += column_titles(name, parts[-1])
            continue
        beside = words if other == name else log.words(other)
        if beside is None:
            raise log.fault(f"{name} holds words, {other} does not")
        known = sorted({*words.dropna(), *beside.dropna()})
        if like:
            known = words_before(like, name) or words_before(like, other)
            new = ~words.isin(known) & words.notna()
            if new.any():
                problem = f"{name} is {words[new.argmax()]}, which the earlier import has not"
                raise log.fault(problem, new.argmax())
        entries = np.stack([(words == word).to_numpy(np.float32) for word in known], axis=1)
        entries[words.isna().to_numpy()] = np.nan
        parts.append(entries)
        titles += [f"{name}={word}" for word in known]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1), titles


def column_titles(name: str, array: np.ndarray) -> list[str]:
    """The name of a column [N, 1], or one with a number for each entry of a column of vectors [N, d]."""
    width = array.shape[1]
    return [name] if width == 1 else [f"{name}[{entry}]" for entry in range(width)]


def words_before(like: dict, name: str) -> list[str]:
    """The words of a column that an earlier import has entries for, in their order."""
    titles = [title for title in like["observation_columns"] if title.startswith(f"{name}=")]
    return [title.removeprefix(f"{name}=") for title in titles]


def read_actions(
    config: Config, log: Log, names: list[str], env: gym.Env | None, like: dict
) -> tuple[np.ndarray, dict]:
    """Quantities [N, act_dim] or numbers of choices [N, 1], nan where missing, and names for the metadata."""
    columns, few, wordy = {}, [], None
    for name in names:
        columns[name] = log.words(name)
        if columns[name] is None:
            columns[name] = log.numbers(name)
        else:
            wordy = wordy or name
        if is_few(columns[name]):
            few.append(name)
    if env:
        is_choice = isinstance(env.action_space, Discrete)
    elif like:
        is_choice = "action_names" in like
    elif config.action_low or config.action_high or config.choices == "numbers":
        is_choice = False
    else:
        is_choice = len(few) == len(names)
    if config.choices == "joint" and not is_choice:
        rest = ", ".join(name for name in names if name not in few) or "the environment's or the bounds given"
        raise log.fault(f"--choices joint: {rest:.200} are no choices but quantities")
    if wordy and (env or not is_choice):
        raise log.fault(f"{wordy} holds words, where actions should be numbers")
    if not is_choice:
        titles = [title for name in names for title in column_titles(name, columns[name])]
        return np.concatenate(list(columns.values()), axis=1), {"action_columns": titles}

    if env:
        actions = np.concatenate(list(columns.values()), axis=1)
        choices = check_choices(log, actions, env.action_space)
    elif len(names) == 1 or config.choices == "joint" or like:
        actions, choices = number_choices(log, columns, like)
    else:
        advice = "--choices joint makes each combination that occurs one choice"
        if not wordy:
            advice += ", --choices numbers takes them as quantities"
        raise log.fault(f"actions are choices in several columns, {', '.join(names):.200}; {advice}")
    return actions, {"action_columns": names, "action_names": choices}


def is_few(column: pd.Series | np.ndarray) -> bool:
    """Whether a column is of words, or has one of a few whole numbers in each row, as choices are."""
    if isinstance(column, pd.Series):
        return True
    values = column[~np.isnan(column)]
    if column.shape[1] > 1 or (values != values.round()).any():
        return False
    return 0 < len(np.unique(values)) <= MAX_WORDS


def check_choices(log: Log, array: np.ndarray, space: Discrete) -> list[str]:
    """The numbers of an environment's choices as their names, if the actions [N, 1] are such numbers."""
    known = range(int(space.start), int(space.start + space.n))
    bad = ~np.isin(array, known) & ~np.isnan(array)
    if array.shape[1] != 1 or bad.any():
        row = bad.any(1).argmax()
        raise log.fault(f"actions are {array[row]}, where the environment's are {space}", row)
    return [str(choice) for choice in known]


def number_choices(log: Log, columns: dict, like: dict) -> tuple[np.ndarray, list[str]]:
    """Numbers [N, 1] of the combinations that occur in columns of words or numbers, and their names.

    With `like`, metadata of an earlier import, they are numbered as there.
    """
    codes, words = [], {}
    for name, values in columns.items():
        numbers, found = pd.factorize(np.ravel(values), sort=True)  # -1: missing
        words[name] = [value if isinstance(value, str) else f"{value:.0f}" for value in found]
        codes.append(numbers)
    codes = np.stack(codes, axis=1)
    absent = (codes < 0).any(1)
    combinations, numbers = np.unique(codes[~absent], axis=0, return_inverse=True)
    if len(combinations) > MAX_WORDS:
        raise log.fault(f"actions are {len(combinations):,} combinations; at most {MAX_WORDS} are a choice")
    names = []
    for combination in combinations:
        parts = {name: words[name][code] for name, code in zip(words, combination)}
        named = [f"{name}={word}" for name, word in parts.items()]
        names.append(", ".join(named if len(parts) > 1 else parts.values()))
    actions = np.full((len(absent), 1), np.nan)
    if like:
        known = {name: number for number, name in enumerate(like["action_names"])}
        if new := [name for name in names if name not in known]:
            row = np.flatnonzero(~absent)[np.argmax(numbers == names.index(new[0]))]
            raise log.fault(f"the action is {new[0]}, which the earlier import has not", row)
        numbers, names = np.array([known[name] for name in names])[numbers], list(known)
    actions[~absent, 0] = numbers
    return actions, names


# ---------------------------------------------- The episodes ----------------------------------------------


def sort_rows(log: Log, fields: dict) -> None:
    """Puts rows in the order of time: episodes by their beginnings, steps within them by their times."""
    times, ids = fields["timestamps"], fields["episode_ids"]
    if times is None:
        return
    begins = np.zeros(len(times))
    codes, back = begins, np.diff(times) < 0
    if ids is None and back.any():
        problem = "time goes back in the next row, and no episode_ids tell which rows belong together"
        raise log.fault(f"{problem}; name them, or --timestamps none keeps the rows' order", back.argmax())
    if ids is not None:
        codes = episode_codes(log, ids)
        begins = pd.Series(times).groupby(codes).transform("min").to_numpy()
    order = np.lexsort((times, codes, begins))
    if (order == np.arange(len(order))).all():
        return
    log.order = order
    log.missing = {name: absent[order] for name, absent in log.missing.items()}
    for field in NAMES:
        if isinstance(fields[field], dict):
            fields[field] = {key: array[order] for key, array in fields[field].items()}
        elif fields[field] is not None:
            fields[field] = np.asarray(fields[field])[order]


def episode_codes(log: Log, ids) -> np.ndarray:
    """0, 1, 2, ... [N] for the episodes in the order in which they first appear."""
    if np.ndim(ids) != 1:
        raise log.fault(f"episode_ids have shape {np.shape(ids)}; each row must have one")
    codes, _ = pd.factorize(ids)  # -1 is an empty cell
    if (codes < 0).any():
        raise log.fault("it has no episode_id", (codes < 0).argmax())
    return codes


def find_ends(log: Log, fields: dict) -> np.ndarray:
    """The last row of each episode, in order."""
    flagged, ids = (fields["terminations"] == 1) | (fields["truncations"] == 1), fields["episode_ids"]
    if ids is None:
        last = flagged.copy()
        last[-1] = True
        return np.flatnonzero(last)
    codes, ids = episode_codes(log, ids), np.asarray(ids)
    last = np.append(codes[1:] != codes[:-1], True)
    first = np.flatnonzero(np.append(True, last[:-1]))
    again = codes[first] != np.arange(len(first))
    if again.any():
        row = first[again.argmax()]
        advice = "are rows shuffled? --timestamps puts them in order"
        raise log.fault(f"episode_id {ids[row]} comes back after another; {advice}", row)
    if (flagged & ~last).any():
        row = (flagged & ~last).argmax()
        raise log.fault(f"flagged as an end, but episode {ids[row]} goes on in the next row", row)
    return np.flatnonzero(last)


def find_gaps(config: Config, log: Log, fields: dict, ends: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The last rows of episodes, with `gaps: cut` also those before a gap in time; and what was found.

    Rows where it cuts get the flag of a truncation.
    """
    times = fields["timestamps"]
    if times is None or len(ends) == len(times):
        return ends, []
    inside = np.setdiff1d(np.arange(len(times) - 1), ends)  # rows that another follows in their episode
    steps = times[inside + 1] - times[inside]
    if (steps == 0).any():
        raise log.fault("the next row of its episode has the same time", inside[(steps == 0).argmax()])
    usual = np.median(steps)
    gaps = inside[steps > LONG_STEP * usual]
    if not len(gaps):
        return ends, [f"time of a step: {usual:g}, and no gaps"]
    found = f"gaps in time, steps of up to {steps.max():g} where {usual:g} is usual"
    if config.gaps == "keep":
        return ends, [f"{found}, kept as they are (--gaps cut ends episodes there): {len(gaps):,}"]
    truncations = fields["truncations"].copy()  # the file's own may be read-only
    truncations[gaps] = np.maximum(truncations[gaps], 1)  # nan, a missing flag, stays
    fields["truncations"] = truncations
    return np.union1d(ends, gaps), [f"{found}, each the end of an episode now: {len(gaps):,}"]


def lost_rows(fields: dict, ends: np.ndarray) -> np.ndarray:
    """The last rows of truncated episodes whose next observation is unknown: (2) needs what they observed."""
    unknown = np.ones(len(ends), bool)
    if fields["next_observations"]:
        parts = [np.isnan(array[ends]).any(1) for array in fields["next_observations"].values()]
        unknown = np.any(parts, axis=0)
    return ends[unknown & (fields["terminations"][ends] == 0)]


def lacks_value(fields: dict, lost: np.ndarray) -> np.ndarray:
    """Rows in which a value is missing, bool [N]; of `lost` rows only what they observed counts."""
    lacking = np.zeros(len(fields["rewards"]), bool)
    for field in NAMES:
        if fields[field] is not None and field not in ("episode_ids", "timestamps"):
            for array in leaves(fields[field]):
                absent = np.isnan(array).reshape(len(array), -1).any(1)
                if field in ("actions", "rewards", "next_observations", "propensities"):
                    absent[lost] = False
                lacking |= absent
    return lacking


def mend_missing(
    config: Config, log: Log, fields: dict, ends: np.ndarray, lost: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Rows whose episodes have to be left out, bool [N], and what was done about missing values, in words."""
    lacking = lacks_value(fields, lost)
    if not lacking.any():
        return lacking, []
    counts = ", ".join(f"{name} {absent.sum():,}" for name, absent in log.missing.items())
    notes = [f"missing values by column: {counts}"]
    if config.missing == "refuse":
        row = lacking.argmax()
        first = next(name for name, absent in log.missing.items() if absent[row])
        hit = len(np.unique(np.searchsorted(ends, np.flatnonzero(lacking))))
        advice = f"--missing drop leaves out their episodes, {hit:,} of {len(ends):,}"
        advice += ", --missing carry repeats what was last observed"
        raise log.fault(f"{first} is missing (in all rows: {counts:.400}); {advice}", row)
    if config.missing == "carry":
        before = lacking.sum()
        carry_observations(fields, ends)
        lacking = lacks_value(fields, lost)
        notes.append(f"rows mended by what was last observed in their episodes: {before - lacking.sum():,}")
    if np.delete(lacking, lost).all():
        raise log.fault(f"no episode is left: a value is missing in every row ({counts:.400})")
    return lacking, notes


def carry_observations(fields: dict, ends: np.ndarray) -> None:
    """Fills in what was observed last in the episode, or after the step before, where that is known."""
    starts = np.append(0, ends[:-1] + 1)
    episodes = np.repeat(np.arange(len(ends)), ends - starts + 1)
    for key, seen in fields["observations"].items():
        following = fields["next_observations"] and fields["next_observations"][key]
        if following is not None:
            before = np.roll(following, 1, axis=0)
            before[starts] = np.nan
            seen = np.where(np.isnan(seen), before, seen)
        seen = pd.DataFrame(seen).groupby(episodes).ffill().to_numpy(seen.dtype)
        fields["observations"][key] = seen
        if following is not None:
            after = np.roll(seen, -1, axis=0)
            after[ends] = seen[ends]
            fields["next_observations"][key] = np.where(np.isnan(following), after, following)


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


def cut_episodes(
    log: Log, fields: dict, ends: np.ndarray, lacking: np.ndarray, lost: np.ndarray
) -> tuple[list, list[str]]:
    """The log as episodes of T steps and T + 1 observations, and what had to be made up for it, in words.

    `ends` are the last rows of the episodes; those with a row that is `lacking` [N] are left out.
    """
    observations, following = fields["observations"], fields["next_observations"]
    terminations, truncations = fields["terminations"] == 1, fields["truncations"] == 1
    starts = np.append(0, ends[:-1] + 1)
    whole = ~np.logical_or.reduceat(lacking, starts)
    dropped, starts, ends = (~whole).sum(), starts[whole], ends[whole]
    cut, episodes, without = ~terminations[ends], [], np.isin(ends, lost)
    for first, end, is_lost in zip(starts, ends, without):
        stop, final = end + 1, following or observations  # (1)
        if following:
            check_order(log, observations, following, first, end)
        if is_lost:
            stop, final = end, {key: array[1:] for key, array in observations.items()}  # (2)
        if stop == first:
            continue
        steps, last = slice(first, stop), slice(stop - 1, stop)
        seen = {key: np.append(array[steps], final[key][last], axis=0) for key, array in observations.items()}
        flags = terminations[steps], truncations[steps].copy()
        flags[1][-1] |= not flags[0][-1]
        infos = {}  # without, Minari cannot print the episode
        if fields["propensities"] is not None:
            infos = {"propensity": fields["propensities"][steps]}
        episodes.append(
            EpisodeBuffer(
                observations=seen.get("", seen),
                actions=fields["actions"][steps],
                rewards=fields["rewards"][steps],
                terminations=flags[0],
                truncations=flags[1],
                infos=infos,
            )
        )
    if not episodes and dropped:
        raise log.fault(f"no episode is left: a value is missing in each of the {dropped:,}")
    if not episodes:
        raise log.fault("no step is left: every episode is one truncated step without next_observations")

    notes, unflagged = {}, cut & ~truncations[ends]
    notes["episodes left out, as a value is missing in them"] = dropped
    notes["episodes without a flag at their end, taken as truncated"] = unflagged.sum()
    notes["steps lost, each the last of a truncated episode: its next observation is unknown"] = without.sum()
    notes["episodes lost, truncated after a single step"] = len(ends) - len(episodes)
    if not following:
        notes["terminated episodes whose last observation stands twice at the end"] = (~cut).sum()
    else:
        inner = ends[:-1][cut[:-1]]  # truncated, and another episode follows
        same = [(following[key][inner] == array[inner + 1]).all(1) for key, array in observations.items()]
        what = "truncated episodes whose last next observation is the first of the next episode"
        notes[f"{what} (wrong if a reset lies between)"] = np.all(same, axis=0).sum()
    texts = [f"{what}: {count:,}" for what, count in notes.items() if count]
    return episodes, texts + doubt_ends(terminations[ends], unflagged, ends - starts + 1)


def doubt_ends(terminated: np.ndarray, unflagged: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Signs of a lost termination, by episode [M]; the last episode may well end with the log."""
    early = unflagged[:-1] & (lengths[:-1] < lengths.max())
    harm = "learners would make up values beyond that"
    if not terminated.any():
        return [f"WARNING: no episode terminates; if any ends for good, flag it, or {harm}"]
    if early.any():
        doubt = "end without a flag and before the longest one; if they end for good"
        return [f"WARNING: {early.sum():,} of {len(lengths):,} episodes {doubt}, flag it, or {harm}"]
    return []


# ---------------------------------------------- The dataset -----------------------------------------------


def describe(observations: dict, actions) -> str:
    """Shapes of observations {key: array or space} and actions, in words."""
    keys = [f"{key} {values.shape}".strip() for key, values in sorted(observations.items())]
    return f"observations {', '.join(keys)} and actions {actions.shape}"


def named_environment(config: Config) -> gym.Env | None:
    """The environment that the log is from, if one is named."""
    if not config.environment:
        return None
    with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):  # it prints a notice
        gym.register_envs(importlib.import_module("gymnasium_robotics"))  # mazes, hands and kitchen
    try:
        env = make_clean(config.environment)
    except Exception as error:  # environments raise whatever they like
        raise UserError(f"environment: cannot make {config.environment}: {error!r:.200}") from None
    if not isinstance(env.action_space, (Box, Discrete)):
        raise UserError(f"environment: {config.environment} has neither quantities nor choices as actions")
    return env


def check_spaces(config: Config, log: Log, fields: dict, env: gym.Env) -> None:
    """An error where the log has other shapes than the environment."""
    space = env.observation_space
    theirs = describe(space if isinstance(space, Mapping) else {"": space}, env.action_space)
    first_row = {key: array[0] for key, array in fields["observations"].items()}
    ours = describe(first_row, fields["actions"][0])
    if theirs != ours:
        raise log.fault(f"it has {ours}, but {config.environment} has {theirs}")


def make_clean(environment: str | gym.envs.registration.EnvSpec, **kwargs) -> gym.Env:
    """gym.make in a temporary folder of its own, where gymnasium-robotics leaves a file of each maze."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("tempfile.tempdir", folder):
        return gym.make(environment, **kwargs)


def cast(array: np.ndarray, space: Box) -> np.ndarray:
    """The array in the floating-point type of the space, which a .csv does not tell."""
    return array.astype(np.result_type(space.dtype, np.float32), copy=False)


def action_bounds(config: Config, log: Log, actions: np.ndarray) -> tuple[Box, str]:
    """The space of quantities without an environment, and where its bounds are from."""
    given = {"action_low": config.action_low, "action_high": config.action_high}
    if config.like:
        return minari.load_dataset(config.like).action_space, f"those of {config.like}"
    if not any(given.values()):
        if actions.shape[1] == 1 and (actions == actions.round()).all() and not config.choices:
            problem = "the only column of actions holds whole numbers, too many to be choices"
            raise log.fault(f"{problem}; if they are quantities, say --choices numbers")
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


def choose_spaces(config: Config, log: Log, fields: dict, env: gym.Env | None, lacking: np.ndarray) -> tuple:
    """Spaces of observations and actions, and a note on these; casts the fields to them.

    Rows that are `lacking` [N] a value have no part in the bounds of actions.
    """
    choices = fields["columns"].get("action_names")
    if choices:  # rows without a choice are in no episode any more
        fields["actions"] = np.nan_to_num(fields["actions"][:, 0]).astype(np.int64)
        note = f"{len(choices)} choices: {'; '.join(choices):.200}"
    else:
        fields["actions"] = fields["actions"].astype(np.float32, copy=False)  # as training will see them
    if env:
        check_spaces(config, log, fields, env)
        seen = env.observation_space
        seen = seen if isinstance(seen, Mapping) else {"": seen}
        for field in ("observations", "next_observations"):
            fields[field] = {key: cast(array, seen[key]) for key, array in (fields[field] or {}).items()}
        if choices:
            return env.observation_space, env.action_space, note
        fields["actions"] = cast(fields["actions"], env.action_space)
        return env.observation_space, env.action_space, f"action bounds: those of {config.environment}"
    boxes = {
        key: Box(-math.inf, math.inf, array.shape[1:], array.dtype)
        for key, array in fields["observations"].items()
    }
    observation_space = boxes.get("") or gym.spaces.Dict(boxes)
    if choices:
        return observation_space, Discrete(len(choices)), note
    actions, origin = action_bounds(config, log, fields["actions"][~lacking])
    return observation_space, actions, f"action bounds: {origin}"


def heldout_id(config: Config) -> str:
    """my/logs-heldout-v0 of my/logs-v0."""
    name, _, version = config.dataset.rpartition("-v")
    return f"{name}-heldout-v{version}"


def check_config(config: Config) -> None:
    """An error for what cannot be done with any log."""
    try:
        namespace, *_ = parse_dataset_id(config.dataset)
    except (TypeError, ValueError):
        namespace = None
    if not namespace:
        wanted = "an id such as my/logs-v0, with a namespace of at least two letters and a version"
        raise UserError(f"dataset: {config.dataset!r} is not {wanted}")
    for name in [config.dataset, heldout_id(config)] if config.heldout else [config.dataset]:
        if get_dataset_path(name).exists():
            raise UserError(f"{name} is there: minari delete {name}, or another --dataset")
    options = {"missing": ("refuse", "drop", "carry"), "gaps": ("keep", "cut")}
    options["choices"] = (None, "joint", "numbers")
    for field, known in options.items():
        if vars(config)[field] not in known:
            wanted = " or ".join(filter(None, known))
            raise UserError(f"{field}: {vars(config)[field]!r} is not {wanted}")
    references = config.ref_min, config.ref_max
    if references != (None, None) and (None in references or references[0] >= references[1]):
        raise UserError("ref_min and ref_max: give both, the smaller first, or neither")
    if config.like and (config.choices or config.action_low or config.action_high):
        raise UserError("like: the earlier import settles choices and bounds; leave them out")
    if config.environment and (config.action_low or config.action_high):
        raise UserError("action_low, action_high: the environment has bounds of its own; leave them out")


def import_log(config: Config) -> None:
    """Writes the log as the dataset, and says what it had to make up."""
    check_config(config)
    env = named_environment(config)
    log, fields = read_log(config, env)
    sort_rows(log, fields)
    ends = find_ends(log, fields)
    ends, notes = find_gaps(config, log, fields, ends)
    lost = lost_rows(fields, ends)
    lacking, mended = mend_missing(config, log, fields, ends, lost)
    unused = lacking | np.isnan(fields["actions"]).any(1)  # a lost row may well have none
    observation_space, action_space, origin = choose_spaces(config, log, fields, env, unused)
    episodes, made_up = cut_episodes(log, fields, ends, lacking, lost)
    notes += [*mended, *made_up, origin]
    if isinstance(action_space, Box):
        actions = fields["actions"][~unused]
        outside = np.mean((actions < action_space.low) | (actions > action_space.high))
        if outside:
            notes.append(f"action entries outside, which training clips: {outside:.2%}")

    parts = split_episodes(config, episodes)
    with log.file.open("rb") as file:
        source = {"file": log.file.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    known = {"source": source, **fields["columns"]}
    if config.ref_min is not None:
        known |= {"ref_min_score": config.ref_min, "ref_max_score": config.ref_max}
    if config.heldout:
        known["heldout"] = {"share": config.heldout, "seed": config.seed, "datasets": list(parts)}
    written = {}
    try:
        for name, part in reversed(parts.items()):  # where the dataset is, its held-out part is too
            written[name] = write_dataset(
                name,
                part,
                env=env,
                observation_space=observation_space,
                action_space=action_space,
                description="; ".join([f"imported from {log.file.name}", *notes]),
                data_format="hdf5",
                extra=known,
            )
    except BaseException:
        for name in written:  # both or none
            minari.delete_dataset(name)
        raise
    for name, metadata in reversed(written.items()):
        terminated = sum(episode.terminations[-1] for episode in parts[name])
        print(
            f"{name}: {metadata['total_steps']:,} steps in {metadata['total_episodes']:,} episodes,"
            f" {terminated:,} of them terminated; sha256 {metadata['content_hash']}"
        )
    print(*notes, sep="\n")


def split_episodes(config: Config, episodes: list) -> dict[str, list]:
    """{id: its episodes, in order}: all of them, or two parts."""
    if not config.heldout:
        return {config.dataset: episodes}
    count = round(config.heldout * len(episodes))
    if not 0 < count < len(episodes):
        raise UserError(f"heldout: {config.heldout:g} of {len(episodes)} episodes leaves one part empty")
    drawn = np.random.default_rng(config.seed).permutation(len(episodes))[:count]
    drawn = set(drawn.tolist())
    parts = {config.dataset: [], heldout_id(config): []}
    for i, episode in enumerate(episodes):
        parts[heldout_id(config) if i in drawn else config.dataset].append(episode)
    return parts


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
    main(import_log)
