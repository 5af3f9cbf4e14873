"""Cells of the record, and how algorithms are compared by them. No program: report.py is.

A cell is all runs, one a seed, of one variant of an algorithm on one dataset. Where its runs differ in
updates or in the hash of the data, it says so and is left out of every comparison.

Algorithms are compared suite by suite, on the datasets that all of them have at least 3 seeds of, by the same
hash. The statistics are those of Agarwal et al. (2021, arXiv:2108.13264), but for one thing: a dataset weighs
the same however many seeds it has.

  IQM            mean of the middle half of the scores of all runs
  profile        share of the runs that score more than a threshold
  P(X > Y)       chance that a run of X beats one of Y, ties half: Mann and Whitney's U / (N M), over datasets
  [low, high]    95 % of 5,000 bootstrap samples, in which the runs of each dataset are drawn anew

With 3 seeds such intervals are too narrow: on one dataset a fifth of them exclude 1/2 for equal algorithms.
So "better" also takes a permutation test: at most 5 % of the ways to deal the runs of each dataset out anew
give a P(X > Y) as far from 1/2. That many pairs are compared is not corrected for.
"""

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from common import KEY, UserError, config_file, learner_name
from scipy import stats
from scores import CLOCK, COLUMNS, ONLINE, RESULT

CELL = KEY[:-1]  # names all runs that differ by their seed alone
METRICS = {"score": "score", "return": "return_mean", "success": "success", "best": "best_score"}
CURVE = ["score", "return_mean", "success", "wall_seconds", "online_steps"]
NEEDED = ["seed", "update", "return_mean", "wall_seconds"]  # numbers that every row has
NUMBERS = ["seed", "update", *RESULT, "episodes", "best_score", *CLOCK, *ONLINE]
TOPICS = dict.fromkeys(["hopper", "halfcheetah", "walker2d"], "locomotion")
TOPICS |= dict.fromkeys(["pen", "door", "hammer", "relocate"], "adroit")
MIN_SEEDS = 3  # for a comparison
RESAMPLES = 5_000


# ------------------------------------------------ The record ------------------------------------------------


def read_scores(folder: Path) -> pd.DataFrame:
    """All rows under `folder`; UserError says where one is malformed."""
    tables = [read_file(file) for file in sorted(folder.glob("*.csv"))]
    if not any(map(len, tables)):
        raise UserError(f"no scores in {folder}: train, then make scores")
    table = pd.concat(tables, ignore_index=True)
    finals = (table["phase"] == "final").groupby([table[name] for name in KEY]).sum()
    for run, count in finals[finals != 1].items():
        raise UserError(f"{folder}: {'/'.join(map(str, run))} has {count} final evaluations; make scores")
    return table


def read_file(file: Path) -> pd.DataFrame:
    """The rows of one file: numbers as floats with nan for none, all else as text."""
    try:
        with file.open(newline="") as lines:
            rows = list(csv.reader(lines))
    except (ValueError, csv.Error) as error:
        raise UserError(f"cannot read {file}: {error}; make scores") from None
    if rows[:1] not in ([COLUMNS], [COLUMNS + ONLINE]):
        raise UserError(f"{file}, line 1 is not {','.join(COLUMNS)}; make scores")
    columns = rows[0]
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns):
            raise UserError(f"{file}, line {number} has {len(row)} of {len(columns)} fields; make scores")
    table = pd.DataFrame(rows[1:], columns=columns, dtype=str)
    table = table.reindex(columns=COLUMNS + ONLINE, fill_value="")
    numbers = table[NUMBERS].apply(pd.to_numeric, errors="coerce").astype(float)
    wrong = ~np.isfinite(numbers) & ((table[NUMBERS] != "") | [name in NEEDED for name in NUMBERS])
    wrong["phase"] = ~table["phase"].isin(["training", "offline", "online", "final"])
    for row, column in zip(*np.nonzero(wrong)):
        name = wrong.columns[column]
        raise UserError(f"{file}, line {row + 2}: {name} cannot be {table[name][row]!r}; make scores")
    table[NUMBERS] = numbers
    for row in np.flatnonzero(table.duplicated([*KEY, "update", "phase"])):
        raise UserError(f"{file}, line {row + 2} is an evaluation that an earlier line has; make scores")
    return table.astype({"seed": int, "update": int})


@dataclass
class Cell:
    """All runs of one variant of an algorithm on one dataset."""

    family: str
    algorithm: str
    dataset: str
    variant: str
    runs: pd.DataFrame  # their final evaluations, by seed
    curve: pd.DataFrame  # by update: mean, min, max over seeds of what CURVE names

    @cached_property
    def name(self) -> str:
        return f"{self.family}/{self.algorithm}/{self.dataset}/{self.variant}"

    @cached_property
    def learner(self) -> str:
        """Algorithm and variant, as in the README."""
        return learner_name(self.family, self.algorithm, self.variant)

    @cached_property
    def suite(self) -> str:
        """The datasets that it is averaged with."""
        name = "/".join(TOPICS.get(part, part) for part in self.dataset.split("/")[:-1]) or self.dataset
        return name if self.family == "offline" else f"{self.family}: {name}"

    @cached_property
    def config(self) -> str:
        return str(config_file(self.family, self.algorithm, self.dataset, self.variant))

    @cached_property
    def goes_online(self) -> bool:
        """Do its runs go on in an environment?"""
        return bool(self.runs["online_steps"].notna().all())

    @cached_property
    def switch(self) -> int:
        """The update after which they do: that of the last evaluation without a step of experience."""
        return int(self.curve.index[self.curve["online_steps", "mean"] == 0].max()) if len(self.curve) else 0

    @cached_property
    def mixed(self) -> str:
        """What its runs do not share, although they should."""
        updates, hashes = (sorted(self.runs[name].unique()) for name in ("update", "dataset_hash"))
        parts = [f"updates {' and '.join(f'{count:,}' for count in updates)}"] * (len(updates) > 1)
        parts += [f"{len(hashes)} versions of the data"] * (len(hashes) > 1)
        return "mixed: " * bool(parts) + ", ".join(parts)

    @cached_property
    def task(self) -> tuple[str, str]:
        """What another algorithm must have learned as well, to be compared with."""
        return self.dataset, self.runs["dataset_hash"].iloc[0]

    @cached_property
    def comparable(self) -> bool:
        return len(self.runs) >= MIN_SEEDS and self.runs["score"].notna().all() and not self.mixed


def gather_cells(table: pd.DataFrame) -> list[Cell]:
    """Curves have the updates at which all runs of a cell were evaluated."""
    table = table.sort_values("seed").assign(seeds=table.groupby(CELL)["seed"].transform("nunique"))
    finals, training = table[table["phase"] == "final"], table[table["phase"] != "final"]
    training = training[training.groupby([*CELL, "update"])["seed"].transform("size") == training["seeds"]]
    curves = training.groupby([*CELL, "update"])[CURVE].agg(["mean", "min", "max"])
    curves = {key: curve.droplevel(CELL) for key, curve in curves.groupby(CELL)}
    return [Cell(*key, runs, curves.get(key, pd.DataFrame())) for key, runs in finals.groupby(CELL)]


# ---------------------------------------------- The statistics ----------------------------------------------

Samples = list[np.ndarray]  # the scores [..., N] of N runs on each task; N may differ


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    value: float | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray

    def show(self, digits: int) -> str:
        return "{:.{n}f} [{:.{n}f}, {:.{n}f}]".format(*(round(x, digits) + 0 for x in self), n=digits)


def interval(statistic: Callable, samples: Samples, rng: np.random.Generator) -> Interval:
    """Of statistic(*samples), by SciPy's percentile bootstrap, which draws anew within each of the samples.

    Rounded, for the last bits of a sum are not the same on every machine.
    """
    found = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, vectorized=True, axis=-1, method="percentile", rng=rng)
    return Interval(*np.round([statistic(*samples, axis=-1), *found.confidence_interval], 9))


def interquartile_mean(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """[...]. Where all N are equal it is scipy.stats.trim_mean(all scores, 0.25), which cuts off whole runs.

    A run weighs 1 / N of its task, and every task the same.
    """
    scores = np.concatenate(samples, axis)
    order = np.argsort(scores, axis)
    weights = np.concatenate([np.full(one.shape[-1], 1 / one.shape[-1]) for one in samples])[order]
    count = scores.shape[-1]
    cut = count // 4 / count
    kept = np.diff(np.cumsum(weights / len(samples), axis).clip(cut, 1 - cut), prepend=cut)
    return (kept * np.take_along_axis(scores, order, axis)).sum(axis) / (1 - 2 * cut)


def mean_share(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """[...]: mean over tasks of the share of their runs for which something is true."""
    return sum(one.mean(axis) for one in samples) / len(samples)


def profile(samples: Samples, thresholds: np.ndarray, rng: np.random.Generator) -> Interval:
    """[thresholds]: share of the runs with more than the threshold."""
    above = [(scores > thresholds[:, None]).astype(float) for scores in samples]
    return interval(mean_share, above, rng)


def probability_of_improvement(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """[...]: P(X > Y), that a run of X has more than a run of Y on the same task; ties count half.

    The first half of `samples` are X's, the others Y's on the same tasks.
    """
    middle = len(samples) // 2
    pairs = zip(samples[:middle], samples[middle:])
    wins = [np.heaviside(x[..., :, None] - y[..., None, :], 0.5).mean((-2, -1)) for x, y in pairs]
    return sum(wins) / middle


def permutation_test(x: Samples, y: Samples, rng: np.random.Generator) -> float:
    """Two-sided p-value of P(X > Y) = 1/2: runs are dealt out anew between X and Y within each task.

    scipy.stats.permutation_test deals out over all tasks, or within pairs: not within tasks.
    """
    mine, others = [], []
    for a, b in zip(x, y):
        pooled = np.concatenate([a, b])
        dealt = pooled[rng.random((RESAMPLES, len(pooled))).argsort(1)]
        dealt = np.vstack([pooled, dealt])  # row 0 is the actual one
        mine.append(dealt[:, : len(a)])
        others.append(dealt[:, len(a) :])
    distance = abs(probability_of_improvement(*mine, *others) - 0.5)
    return np.mean(distance >= distance[0] - 1e-9)


def difference(before: np.ndarray, after: np.ndarray) -> Interval:
    """Of the means of two samples, with Welch's 95 % interval."""
    value = after.mean() - before.mean()
    if np.ptp(before) == np.ptp(after) == 0:  # no spread, of which Welch can make nothing
        return Interval(value, value, value)
    return Interval(value, *stats.ttest_ind(after, before, equal_var=False).confidence_interval())


# --------------------------------------------- The comparisons ---------------------------------------------


@dataclass
class Comparison:
    """Of the learners that have MIN_SEEDS runs of each of `datasets`; none where no two share a dataset."""

    suite: str
    datasets: list[str]
    cells: dict[str, list[Cell]]  # of each learner, in the order of datasets; the best IQM first
    left_out: list[str]  # learners of the suite that are not compared
    iqm: dict[str, Interval]
    thresholds: np.ndarray  # [101] scores
    profiles: dict[str, Interval]  # of arrays [101]
    improvement: dict[tuple[str, str], Interval]  # P(X > Y) by (X, Y)
    better: set[tuple[str, str]]  # (X, Y) where X is better beyond chance


def choose(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """The learners to compare, each with its cells, of the same tasks in the same order.

    Of the tasks that two default variants share, those that make the largest table without a gap.
    """
    have: dict[str, dict] = {}
    for cell in cells:
        if cell.comparable:
            have.setdefault(cell.learner, {})[cell.task] = cell
    plain = [set(tasks) for tasks in have.values() if next(iter(tasks.values())).variant == "default"]

    def size(tasks: set) -> tuple:
        return len(tasks) * sum(tasks <= others for others in plain), len(tasks), sorted(tasks)

    shared = (a & b for a, b in itertools.combinations(plain, 2))
    tasks = sorted(max(shared, key=size, default=set()))
    chosen = {name: mine for name, mine in have.items() if tasks and mine.keys() >= {*tasks}}
    return {name: [mine[task] for task in tasks] for name, mine in chosen.items()}


def compare_suite(suite: str, cells: list[Cell]) -> Comparison:
    chosen, rng = choose(cells), np.random.default_rng(0)
    samples = {name: [cell.runs["score"].to_numpy() for cell in mine] for name, mine in chosen.items()}
    iqm = {name: interval(interquartile_mean, scores, rng) for name, scores in samples.items()}
    order = sorted(samples, key=lambda name: -iqm[name].value)
    everything = np.concatenate([scores for name in order for scores in samples[name]] or [np.zeros(1)])
    thresholds = np.linspace(math.floor(everything.min()), math.ceil(everything.max()), 101)
    improvement, better = {}, set()
    for x, y in itertools.combinations(order, 2):
        found = interval(probability_of_improvement, [*samples[x], *samples[y]], rng)
        improvement |= {(x, y): found, (y, x): Interval(1 - found.value, 1 - found.high, 1 - found.low)}
        if permutation_test(samples[x], samples[y], rng) <= 0.05:
            better |= {names for names in ((x, y), (y, x)) if improvement[names].low > 0.5}
    return Comparison(
        suite=suite,
        datasets=[cell.dataset for cell in chosen[order[0]]] if order else [],
        cells={name: chosen[name] for name in order},
        left_out=sorted({cell.learner for cell in cells} - {*order}),
        iqm={name: iqm[name] for name in order},
        thresholds=thresholds,
        profiles={name: profile(samples[name], thresholds, rng) for name in order},
        improvement=improvement,
        better=better,
    )


def by_suite(cells: Iterable[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """Suites and their cells, by dataset."""
    cells = sorted(cells, key=attrgetter("suite", "dataset"))
    return ((suite, list(group)) for suite, group in itertools.groupby(cells, attrgetter("suite")))
