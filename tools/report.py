"""Tables, figures and a page of every recorded score, from results/scores alone: `make report`.

  python tools/report.py                 write results/report/ and the block of docs/scores.md
  python tools/report.py --check         only compare: status 1 where one of them is stale
  python tools/report.py --compare A B   did scores move from A to B? Two commits, or two folders of scores

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
give a P(X > Y) as far from 1/2. That many pairs are compared is not corrected for. --compare takes Welch's
t interval: by a bootstrap interval a fifth of all unchanged cells of 3 seeds would seem to have moved.

Tuning cost is what the record knows: updates, evaluation episodes in the simulator and hours of all runs of
all variants that became a config. Trials that never became one are not in the record.
"""

import argparse
import csv
import io
import itertools
import json
import math
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from scipy.special import stdtrit
from scores import CLOCK, COLUMNS, KEY, RECORD, RESULT, config_file, markdown, show

ROOT = Path(__file__).resolve().parents[1]
CELL = KEY[:-1]  # names all runs that differ by their seed alone
METRICS = {"score": "score", "return": "return_mean", "success": "success", "best": "best_score"}
NEEDED = ["seed", "update", "return_mean", "wall_seconds"]  # numbers that every row has
NUMBERS = ["seed", "update", *RESULT, "episodes", "best_score", *CLOCK]
TOPICS = dict.fromkeys(["hopper", "halfcheetah", "walker2d"], "locomotion")
TOPICS |= dict.fromkeys(["pen", "door", "hammer", "relocate"], "adroit")
BASELINE = "bc"  # the data's own worth
MOVED = ["rose", "fell"]
MIN_SEEDS = 3  # for a comparison
RESAMPLES = 5_000
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8B6FD6", "#9A7D0A", "#808080"]  # on light and dark
DASHES = ["-", "--", ":", "-."]
LOOKS = [  # some eyes take one of the last three colors for one of the first four: they differ in dashes, too
    (DASHES[(turn + i // 4) % 4], color) for turn in range(4) for i, color in enumerate(COLORS)]
STYLE = {"axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False, "font.size": 9,
         "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6", "axes.axisbelow": True,
         "legend.frameon": False, "pdf.fonttype": 42}


class UserError(Exception):
    """What the user can mend: one line on stderr and exit status 2."""


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
    if rows[:1] != [COLUMNS]:
        raise UserError(f"{file}, line 1 is not {','.join(COLUMNS)}; make scores")
    for number, row in enumerate(rows, 1):
        if len(row) != len(COLUMNS):
            raise UserError(f"{file}, line {number} has {len(row)} of {len(COLUMNS)} fields; make scores")
    table = pd.DataFrame(rows[1:], columns=COLUMNS, dtype=str)
    numbers = table[NUMBERS].apply(pd.to_numeric, errors="coerce").astype(float)
    wrong = ~np.isfinite(numbers) & ((table[NUMBERS] != "") | [name in NEEDED for name in NUMBERS])
    wrong["phase"] = ~table["phase"].isin(["training", "final"])
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
    curve: pd.DataFrame  # by update: mean, min, max over seeds of score, return_mean, success, wall_seconds

    @cached_property
    def name(self) -> str:
        return f"{self.family}/{self.algorithm}/{self.dataset}/{self.variant}"

    @cached_property
    def learner(self) -> str:
        """Algorithm and variant, as in the README."""
        names = (self.family, self.algorithm, self.variant)
        return " ".join(name for name in names if name not in ("offline", "default"))

    @cached_property
    def suite(self) -> str:
        """The datasets that it is averaged with."""
        name = "/".join(TOPICS.get(part, part) for part in self.dataset.split("/")[:-1]) or self.dataset
        return name if self.family == "offline" else f"{self.family}: {name}"

    @cached_property
    def config(self) -> str:
        return str(config_file(self.family, self.algorithm, self.dataset, self.variant))

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
    finals, training = table[table["phase"] == "final"], table[table["phase"] == "training"]
    training = training[training.groupby([*CELL, "update"])["seed"].transform("size") == training["seeds"]]
    columns = ["score", "return_mean", "success", "wall_seconds"]
    curves = training.groupby([*CELL, "update"])[columns].agg(["mean", "min", "max"])
    curves = {key: curve.droplevel(CELL) for key, curve in curves.groupby(CELL)}
    return [Cell(*key, runs, curves.get(key, pd.DataFrame())) for key, runs in finals.groupby(CELL)]


# ---------------------------------------------- The statistics ----------------------------------------------


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    value: float | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray

    def show(self, digits: int) -> str:
        return "{:.{n}f} [{:.{n}f}, {:.{n}f}]".format(*(round(x, digits) + 0 for x in self), n=digits)


Samples = list[np.ndarray]  # the scores [N] of N runs on each task; N may differ
Weights = list[np.ndarray]  # of these runs, [B, N] on each task: a row an estimate, which adds up to 1


def resample(samples: Samples, rng: np.random.Generator) -> Weights:
    """The sample itself, then RESAMPLES bootstrap samples, in which runs are drawn anew within each task."""
    evens = [np.full(len(scores), 1 / len(scores)) for scores in samples]
    drawn = [rng.multinomial(len(even), even, RESAMPLES) / len(even) for even in evens]
    return [np.vstack(pair) for pair in zip(evens, drawn)]


def interval(estimates: np.ndarray) -> Interval:
    """Of estimates [B, ...], the first of the sample itself, the others of bootstrap samples.

    Rounded, for the last bits of a sum are not the same on every machine.
    """
    ends = np.percentile(estimates[1:], [2.5, 97.5], axis=0)
    return Interval(*np.round([estimates[0], *ends], 9))


def interquartile_mean(samples: Samples, weights: Weights) -> np.ndarray:
    """[B]. Where all N are equal it is scipy.stats.trim_mean(all scores, 0.25), which cuts off whole runs."""
    scores = np.concatenate(samples)
    order = np.argsort(scores)
    weights = np.hstack(weights)[:, order] / len(samples)
    cut = len(scores) // 4 / len(scores)
    kept = np.diff(np.cumsum(weights, axis=1).clip(cut, 1 - cut), prepend=cut)
    return kept @ scores[order] / (1 - 2 * cut)


def performance_profile(samples: Samples, weights: Weights, thresholds: np.ndarray) -> np.ndarray:
    """[B, thresholds]: share of the runs with more than the threshold."""
    shares = (w @ (scores[:, None] > thresholds) for scores, w in zip(samples, weights))
    return sum(shares) / len(samples)


def probability_of_improvement(x: Samples, y: Samples, x_weights: Weights, y_weights: Weights) -> np.ndarray:
    """[B]: P(X > Y), that a run of X has more than a run of Y on the same task; ties count half."""
    wins = (np.heaviside(a[:, None] - b, 0.5) for a, b in zip(x, y))
    shares = (np.einsum("bm,bm->b", v @ win, w) for win, v, w in zip(wins, x_weights, y_weights))
    return sum(shares) / len(x)


def permutation_test(x: Samples, y: Samples, rng: np.random.Generator) -> float:
    """Two-sided p-value of P(X > Y) = 1/2: runs are dealt out anew between X and Y within each task."""
    pooled = [np.concatenate(pair) for pair in zip(x, y)]
    dealt = [rng.random((RESAMPLES, len(scores))).argsort(1) for scores in pooled]
    mine = [np.vstack([np.arange(deal.shape[1]), deal]) < len(a) for a, deal in zip(x, dealt)]
    x_weights = [chosen / len(a) for a, chosen in zip(x, mine)]
    y_weights = [~chosen / len(b) for b, chosen in zip(y, mine)]
    distance = abs(probability_of_improvement(pooled, pooled, x_weights, y_weights) - 0.5)
    return np.mean(distance >= distance[0] - 1e-9)  # row 0 is the actual one


def difference(before: np.ndarray, after: np.ndarray) -> Interval:
    """Of the means of two samples, with Welch's 95 % interval."""
    value, counts = after.mean() - before.mean(), np.array([len(before), len(after)])
    errors = np.array([before.var(ddof=1), after.var(ddof=1)]) / counts
    freedom = errors.sum() ** 2 / (errors**2 / (counts - 1)).sum() if errors.any() else 1
    reach = stdtrit(freedom, 0.975) * math.sqrt(errors.sum())
    return Interval(value, value - reach, value + reach)


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
    weights = {name: resample(scores, rng) for name, scores in samples.items()}
    iqm = {name: interval(interquartile_mean(scores, weights[name])) for name, scores in samples.items()}
    order = sorted(samples, key=lambda name: -iqm[name].value)
    everything = np.concatenate([scores for name in order for scores in samples[name]] or [np.zeros(1)])
    thresholds = np.linspace(math.floor(everything.min()), math.ceil(everything.max()), 101)
    improvement, better = {}, set()
    for x, y in itertools.combinations(order, 2):
        pair = samples[x], samples[y]
        estimates = probability_of_improvement(*pair, weights[x], weights[y])
        improvement |= {(x, y): interval(estimates), (y, x): interval(1 - estimates)}
        if permutation_test(*pair, rng) <= 0.05:
            better |= {names for names in ((x, y), (y, x)) if improvement[names].low > 0.5}
    return Comparison(
        suite=suite,
        datasets=[cell.dataset for cell in chosen[order[0]]] if order else [],
        cells={name: chosen[name] for name in order},
        left_out=sorted({cell.learner for cell in cells} - {*order}),
        iqm={name: iqm[name] for name in order},
        thresholds=thresholds,
        profiles={name: interval(performance_profile(samples[name], weights[name], thresholds))
                  for name in order},
        improvement=improvement,
        better=better,
    )


def by_suite(cells: Iterable[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """Suites and their cells, by dataset."""
    cells = sorted(cells, key=attrgetter("suite", "dataset"))
    return ((suite, list(group)) for suite, group in itertools.groupby(cells, attrgetter("suite")))


# ------------------------------------------------- Tables -------------------------------------------------


def span(counts: Iterable[int]) -> str:
    """`50,000`, or `10,000 to 50,000`."""
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def aggregate_table(comparisons: Iterable[Comparison]) -> str:
    """A row a learner, the suites one after the other."""
    rows = []
    for one in comparisons:
        for name, cells in one.cells.items():
            runs = pd.concat([cell.runs for cell in cells])
            over = one.improvement.get((name, BASELINE))
            beaten = ", ".join(other for other in one.cells if (name, other) in one.better)
            rows.append([one.suite, len(one.datasets), name, len(runs), span(runs["update"]),
                         one.iqm[name].show(1), over.show(2) if over else "", beaten])
    columns = ["Suite", "Datasets", "Algorithm", "Runs", "Updates", "IQM", f"P(> {BASELINE})", "Better than"]
    return markdown(pd.DataFrame(rows, columns=columns))


def improvement_table(one: Comparison) -> str:
    """P(row > column), bold where the row is better."""
    rows = []
    for x in one.cells:
        shown = {y: one.improvement[x, y].show(2) for y in one.cells if y != x} | {x: ""}
        rows.append([x, *(f"**{shown[y]}**" if (x, y) in one.better else shown[y] for y in one.cells)])
    return markdown(pd.DataFrame(rows, columns=["P(row > column)", *one.cells]))


def cells_table(cells: Iterable[Cell]) -> str:
    """A row a cell: all its results, how they came about, and where that is written down."""
    rows = []
    for cell in cells:
        runs = cell.runs
        shown = {name: show(runs[column]) if runs[column].notna().all() else ""
                 for name, column in METRICS.items()}
        shown["success"] = show(100 * runs["success"]) + " %" if shown["success"] else ""
        shown["score"] += f" ({cell.mixed})" * bool(cell.mixed)
        known = [commit for several in runs["commit"] for commit in several.split() or [""]]
        commits = " ".join(sorted({f"`{shorten(commit)}`" for commit in known}))
        hashes = " ".join(sorted({f"`{value[:8]}`" for value in runs["dataset_hash"]}))
        data = f"[{hashes}]({card})" if (card := card_of(cell)) else hashes
        rows.append([cell.dataset, f"[{cell.learner}](../../{cell.config})", *shown.values(), len(runs),
                     span(runs["update"]), f"{runs['wall_seconds'].mean() / 3600:.2f}", commits, data])
    columns = ["Dataset", "Algorithm", "Score", "Return", "Success", "Best on the way", "Seeds", "Updates",
               "Hours", "Commit", "Data"]
    return markdown(pd.DataFrame(rows, columns=columns))


def shorten(commit: str) -> str:
    """Seven digits, and the + that says that files differed from it."""
    return commit[:7] + "+" * commit.endswith("+")


def card_of(cell: Cell) -> str:
    """Where the dataset's card is, seen from results/report; empty where there is none."""
    card = Path("cards", f"{cell.dataset}.md")
    return f"../{card}" if (ROOT / "results" / card).exists() else ""


def costs_table(cells: list[Cell], episodes: pd.Series) -> pd.DataFrame:
    """What each algorithm's scores took in all, given the evaluation episodes by (family, algorithm)."""
    rows = []
    for (family, algorithm), group in itertools.groupby(cells, attrgetter("family", "algorithm")):
        group = list(group)
        runs = pd.concat([cell.runs for cell in group])
        counts = len({cell.variant for cell in group}), len({cell.dataset for cell in group}), len(runs)
        sums = runs["update"].sum(), int(episodes[family, algorithm])
        hours = f"{runs['wall_seconds'].sum() / 3600:,.1f}"
        rows.append([f"{family}/{algorithm}", *(f"{count:,}" for count in counts + sums), hours])
    columns = ["Algorithm", "Variants", "Datasets", "Runs", "Updates", "Evaluation episodes", "Hours"]
    return pd.DataFrame(rows, columns=columns)


def variants_table(cells: list[Cell]) -> pd.DataFrame:
    """Mean scores of the worst and the best variant, wherever several were run."""
    rows = []
    for (family, algorithm, dataset), group in itertools.groupby(cells, attrgetter(*CELL[:-1])):
        group = [cell for cell in group if cell.runs["score"].notna().all()]
        if len(group) > 1:
            means = {cell.variant: cell.runs["score"].mean() for cell in group}
            best, worst = max(means, key=means.get), min(means, key=means.get)
            runs = pd.concat([cell.runs for cell in group])
            shown = [f"{means[name]:.1f} ({name})" for name in (worst, best)]
            shown += [f"{means[best] - means['default']:.1f}" if "default" in means else ""]
            hours = f"{runs['wall_seconds'].sum() / 3600:.1f}"
            rows.append([dataset, f"{family}/{algorithm}", str(len(means)), str(len(runs)), *shown, hours])
    columns = ["Dataset", "Algorithm", "Variants", "Runs", "Worst", "Best", "Best - default", "Hours"]
    return pd.DataFrame(rows, columns=columns)


# ------------------------------------------------- Figures -------------------------------------------------


def looks(cells: Iterable[Cell]) -> dict[str, tuple[str, str]]:
    """Line style and color of every learner, the same everywhere."""
    return dict(zip(sorted({cell.learner for cell in cells}), itertools.cycle(LOOKS)))


def draw_figures(cells: list[Cell], comparisons: list[Comparison]) -> Iterator[tuple[str, Figure]]:
    """All figures with their names, one at a time: together they would take much memory."""
    look, compared = looks(cells), [one for one in comparisons if one.cells]
    with matplotlib.rc_context(STYLE):
        if compared:
            yield "aggregates", draw_aggregates(compared, look)
            yield "profiles", draw_profiles(compared, look)
        for suite, group in by_suite(cells):
            yield f"curves-{slug(suite)}", draw_curves(group, look, time=False)
            yield f"time-{slug(suite)}", draw_curves(group, look, time=True)


def slug(suite: str) -> str:
    """A suite's name as a part of file names."""
    return re.sub(r"[^\w.-]+", "-", suite)


def draw_aggregates(comparisons: list[Comparison], look: dict) -> Figure:
    """IQM and P(> baseline) of every learner with their intervals, a row a suite."""
    heights = [len(one.cells) + 1.5 for one in comparisons]
    figure = Figure(figsize=(8, 0.32 * sum(heights) + 0.3), layout="constrained")
    rows = figure.subplots(len(comparisons), 2, squeeze=False, height_ratios=heights, sharey="row")
    for (left, right), one in zip(rows, comparisons):
        for place, name in enumerate(one.cells):
            pairs = {left: one.iqm[name], right: one.improvement.get((name, BASELINE))}
            for axis, estimate in pairs.items():
                if estimate:
                    axis.plot(estimate[1:], [place] * 2, color=look[name][1], lw=5, alpha=0.35,
                              solid_capstyle="butt")
                    axis.plot(estimate.value, place, "o", color=look[name][1], ms=6)
        left.set_yticks(range(len(one.cells)), one.cells)
        left.set_ylim(len(one.cells) - 0.4, -0.6)
        left.set_title(f"{one.suite}: IQM of the score (datasets: {len(one.datasets)})")
        right.set_title(f"P(better than {BASELINE})")
        right.set_xlim(-0.03, 1.03)
        right.axvline(0.5, color="#888888", lw=1, ls="--", zorder=0)
        for axis in (left, right):
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="y", visible=False)
    return figure


def add_legend(figure: Figure, names: Iterable[str], look: dict) -> None:
    lines = [Line2D([], [], ls=look[name][0], color=look[name][1], lw=2, label=name) for name in names]
    figure.legend(handles=lines, loc="outside upper left", ncols=int(figure.get_figwidth() / 1.2))  # inches


def panels(count: int) -> tuple[Figure, list]:
    """A figure of that many axes, at most three in a row."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(3.4 * columns, 4.5), 2.5 * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def draw_profiles(comparisons: list[Comparison], look: dict) -> Figure:
    """Share of the runs above each score, a panel a suite."""
    figure, axes = panels(len(comparisons))
    for axis, one in zip(axes, comparisons):
        for name, profile in one.profiles.items():
            style, color = look[name]
            axis.plot(one.thresholds, profile.value, color=color, ls=style, lw=1.8)
            axis.fill_between(one.thresholds, *profile[1:], color=color, alpha=0.15, lw=0)
        axis.set(title=one.suite, xlabel="score τ", ylabel="share of runs above τ", ylim=(-0.02, 1.02))
    add_legend(figure, sorted({name for one in comparisons for name in one.cells}), look)
    return figure


def draw_curves(cells: list[Cell], look: dict, time: bool) -> Figure:
    """Mean and range over seeds and the final score against updates or time, a panel a dataset."""
    datasets = {name: list(group) for name, group in itertools.groupby(cells, attrgetter("dataset"))}
    figure, axes = panels(len(datasets))
    longest = max(cell.runs["wall_seconds"].mean() for cell in cells)
    unit, seconds = ("hours", 3600) if longest > 3 * 3600 else ("minutes", 60)
    for axis, (dataset, group) in zip(axes, datasets.items()):
        scored = all(cell.runs["score"].notna().all() for cell in group)
        column = "score" if scored else "return_mean"
        for cell in group:
            style, color = look[cell.learner]
            last = cell.runs["wall_seconds"].mean() / seconds if time else cell.runs["update"].max()
            axis.plot(last, cell.runs[column].mean(), "D", color=color, ms=6, mec="white", zorder=3)
            if len(cell.curve):
                x = cell.curve["wall_seconds", "mean"] / seconds if time else cell.curve.index
                axis.plot(x, cell.curve[column, "mean"], color=color, ls=style, lw=1.5)
                axis.fill_between(x, cell.curve[column, "min"], cell.curve[column, "max"], color=color,
                                  alpha=0.15, lw=0)
        axis.set_title(dataset)
        axis.set_xlabel(f"{unit} of training and evaluation" if time else "gradient updates")
        axis.set_ylabel("score" if scored else "return")
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if not time:
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    add_legend(figure, sorted({cell.learner for cell in cells}), look)
    return figure


def save(figure: Figure, suffix: str) -> bytes:
    """The same bytes every time."""
    file = io.BytesIO()
    figure.savefig(file, format=suffix, dpi=150, metadata={"CreationDate": None} if suffix == "pdf" else {})
    return file.getvalue()


# ------------------------------------------------- The page -------------------------------------------------


def page(cells: list[Cell], comparisons: list[Comparison], tables: dict[str, pd.DataFrame]) -> str:
    """report.html with everything that it shows inside it."""
    look, project = looks(cells), tomllib.loads((ROOT / "pyproject.toml").read_text()).get("project", {})
    data = {
        "repository": project.get("urls", {}).get("Repository", "").rstrip("/"),
        "minSeeds": MIN_SEEDS,
        "learners": {name: {"dash": DASHES.index(look[name][0]), "color": look[name][1]}
                     for name in look},
        "cells": [cell_data(cell) for cell in cells],
        "suites": [suite_data(one) for one in comparisons if one.cells],
        "tables": {name: table.to_dict("split", index=False) for name, table in tables.items()},
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", r"\u003c")
    return Path(__file__).with_suffix(".html").read_text().replace("@DATA@", text)


def numbers(values) -> list:
    """Numbers as JSON has them, to the six digits of results/scores: None for nan."""
    return [None if math.isnan(value) else float(f"{value:.6g}") for value in np.ravel(values).tolist()]


def cell_data(cell: Cell) -> dict:
    measured = {"seconds": "wall_seconds", **METRICS}
    runs = {name: numbers(cell.runs[column]) for name, column in measured.items()}
    exact = {"updates": "update", **{name: name for name in ("seed", *RECORD)}}
    runs |= {name: cell.runs[column].tolist() for name, column in exact.items()}
    curve = {}
    if len(cell.curve):
        curve = {"updates": cell.curve.index.tolist(), "seconds": numbers(cell.curve["wall_seconds", "mean"])}
        for name in ("score", "return", "success"):
            curve[name] = {end: numbers(cell.curve[METRICS[name], end]) for end in ("mean", "min", "max")}
    texts = {name: getattr(cell, name) for name in ("name", "learner", "dataset", "config", "mixed")}
    return {**texts, "card": card_of(cell), "runs": runs, "curve": curve}


def suite_data(one: Comparison) -> dict:
    return {
        "name": one.suite,
        "datasets": one.datasets,
        "leftOut": one.left_out,
        "runs": {name: sum(len(cell.runs) for cell in mine) for name, mine in one.cells.items()},
        "iqm": {name: numbers(value) for name, value in one.iqm.items()},
        "improvement": {x: {y: [*numbers(one.improvement[x, y]), (x, y) in one.better]
                            for y in one.cells if y != x} for x in one.cells},
        "thresholds": numbers(one.thresholds),
        "profiles": {name: dict(zip(("mean", "min", "max"), map(numbers, profile)))
                     for name, profile in one.profiles.items()},
    }


# ------------------------------------------------ The report ------------------------------------------------

REPORT = """\
# Report

{runs:,} runs: {learners} algorithms and their variants on {datasets} datasets. [As a page](index.html),
to sort and to switch: open it in a browser. [report.py](../../tools/report.py) tells how all is computed.

## Algorithms compared

{comparisons}

## Learning curves

Mean over seeds, with their lowest and highest; a diamond is the final evaluation. Time depends on the
machine and on what else ran there.

{curves}

## Scores

Mean ± standard deviation over training seeds. The best score on the way was chosen with the simulator, which
offline learning does not have. Hours are the mean of a run's.

{scores}

## Tuning cost

All runs of all variants in the record, with the evaluations on the way. Trials that never became a config are
not in the record.

{costs}

Where several variants were run, the best of them was chosen with the simulator:

{variants}
"""

BLOCK = """\
Algorithms compared on the datasets that all of them have at least {seeds} seeds of: interquartile mean
(IQM) of the final scores, and the probability that a run beats one of {baseline}, with 95 % intervals
(stratified bootstrap, [Agarwal et al., 2021](https://arxiv.org/abs/2108.13264)). Better than: beyond
chance, by the interval and by a permutation test.

{table}

![IQM and probability of improvement](../results/report/aggregates.png)
"""

LINKS = """\
[The report](../results/report/report.md) has all scores, curves against updates and time, performance
profiles and tuning cost; [its page](../results/report/index.html) sorts and switches them (open it in a
browser).
"""


def report(cells: list[Cell], comparisons: list[Comparison], tables: dict[str, pd.DataFrame]) -> str:
    """report.md."""
    suites = dict(by_suite(cells))
    compared = [f"### {one.suite}\n\n{comparison_text(one)}" for one in comparisons]
    if any(one.cells for one in comparisons):
        compared += [picture("aggregates", "IQM and probability of improvement"),
                     picture("profiles", "Performance profiles")]
    curves = [picture(f"{kind}-{slug(suite)}", f"{suite}: score against {axis}")
              for suite in suites for kind, axis in {"curves": "updates", "time": "time"}.items()]
    return REPORT.format(
        runs=sum(len(cell.runs) for cell in cells),
        learners=len({cell.learner for cell in cells}),
        datasets=len({cell.dataset for cell in cells}),
        comparisons="\n\n".join(compared),
        curves="\n\n".join(curves),
        scores="\n\n".join(f"### Scores: {suite}\n\n{cells_table(group)}" for suite, group in suites.items()),
        **{name: markdown(table) if len(table) else "None." for name, table in tables.items()},
    )


def comparison_text(one: Comparison) -> str:
    """Of one suite: what is compared, both tables, what is not compared."""
    if not one.cells:
        return f"No two algorithms have {MIN_SEEDS} seeds of the same dataset."
    verdict = "Bold: better beyond chance." if one.better else "No difference is beyond chance."
    rest = f"Not compared, for want of seeds or datasets: {', '.join(one.left_out)}." if one.left_out else ""
    parts = [f"On {', '.join(one.datasets)}.", aggregate_table([one]), improvement_table(one), verdict, rest]
    return "\n\n".join(filter(None, parts))


def scores_block(comparisons: list[Comparison]) -> str:
    """What docs/scores.md says of them: no more than the intervals support."""
    compared, rest = ([one for one in comparisons if bool(one.cells) == wanted] for wanted in (True, False))
    block = f"No two algorithms have {MIN_SEEDS} seeds of the same dataset yet, so nothing is compared.\n"
    if compared:
        block = BLOCK.format(seeds=MIN_SEEDS, baseline=BASELINE, table=aggregate_table(compared))
        names = ", ".join(one.suite for one in rest)
        block += f"\nNot compared yet, for want of seeds: {names}.\n" * bool(rest)
    return f"{block}\n{LINKS}"


def picture(name: str, text: str) -> str:
    return f"![{text}]({name}.png) [PDF]({name}.pdf)"


def scores_page(block: str) -> str:
    """docs/scores.md with its block made anew."""
    before, begin, rest = (ROOT / "docs/scores.md").read_text().partition("<!-- report:begin -->\n")
    _, end, after = rest.partition("<!-- report:end -->")
    if not (begin and end):
        raise UserError("docs/scores.md has no place for the report: a line <!-- report:begin -->, then one "
                        "<!-- report:end -->")
    return f"{before}{begin}{block}{end}{after}"


def write(file: Path, content: bytes) -> None:
    """All of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    try:
        new.write_bytes(content)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


# ----------------------------------------------- Two versions -----------------------------------------------


def read_version(name: str) -> dict[str, Cell]:
    """Cells by name, of a folder of scores, or of the commit in results/scores that begins so."""
    if Path(name).is_dir():
        return {cell.name: cell for cell in gather_cells(read_scores(Path(name)))}
    table = read_scores(ROOT / "results/scores")
    known = sorted({*table["commit"]} - {""})
    known = [commit for commit in known if " " not in commit]  # a run of several tells nothing of one
    found = [commit for commit in known if commit == name] or [c for c in known if c.startswith(name)]
    if len(found) != 1:
        problem = "is several commits" if found else "is neither a folder nor a commit"
        names = ", ".join(map(shorten, known))
        raise UserError(f"{name} {problem} of results/scores, which has runs of {names}")
    return {cell.name: cell for cell in gather_cells(table[table["commit"] == found[0]])}


VERSIONS = """\
A is {a}, B is {b}. Final scores, mean ± standard deviation over seeds; 95 % interval of their difference
(Welch).

{table}

{summary}
"""


def compare_versions(a: str, b: str) -> str:
    """A table of all cells that both have, and whether their scores moved; then what only one has."""
    before, after = read_version(a), read_version(b)
    rows = [[cell.dataset, cell.learner, *judge(cell.runs, after[name].runs)]
            for name, cell in before.items() if name in after]
    table = pd.DataFrame(rows, columns=["Dataset", "Algorithm", "A", "B", "B - A", "Verdict"])
    decided, moved = (int(table["Verdict"].isin(words).sum()) for words in ([*MOVED, "no move"], MOVED))
    summary = "Nothing is decidable."
    if decided:
        chance = f"of as many unchanged ones {decided / 20:.1f} would seem to"
        summary = f"{moved} of {decided} decidable cells moved; {chance}."
    text = VERSIONS.format(a=a, b=b, table=markdown(table), summary=summary)
    for version, names in {"A": before.keys() - after.keys(), "B": after.keys() - before.keys()}.items():
        text += f"\nOnly in {version}: {', '.join(sorted(names))}.\n" * bool(names)
    return text


def judge(before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    """Both means, their difference, and what can be said of it."""
    column = "score" if before["score"].notna().all() and after["score"].notna().all() else "return_mean"
    shown = [f"{show(runs[column])} (seeds: {len(runs)})" for runs in (before, after)]
    for name, word in {"update": "updates", "dataset_hash": "data"}.items():
        if len({*before[name], *after[name]}) > 1:
            return [*shown, "", f"not comparable: other {word}"]
    x, y = (runs.set_index("seed")[column] for runs in (before, after))
    if x.equals(y):
        return [*shown, "0", "same scores"]
    if min(len(x), len(y)) < MIN_SEEDS:
        return [*shown, f"{y.mean() - x.mean():.1f}", f"undecidable: fewer than {MIN_SEEDS} seeds"]
    change = difference(x.to_numpy(), y.to_numpy())
    verdict = "rose" if change.low > 0 else "fell" if change.high < 0 else "no move"
    return [*shown, change.show(1), verdict]


# ----------------------------------------------- Command line -----------------------------------------------


def make_report(check: bool) -> int:
    """Writes everything, or only tells whether it is stale (then 1)."""
    table = read_scores(ROOT / "results/scores")
    cells, folder = gather_cells(table), ROOT / "results/report"
    comparisons = [compare_suite(*group) for group in by_suite(cells)]
    costs = costs_table(cells, table.groupby(["family", "algorithm"])["episodes"].sum())
    content = cells, comparisons, {"costs": costs, "variants": variants_table(cells)}
    texts = {folder / "report.md": report(*content), folder / "index.html": page(*content),
             ROOT / "docs/scores.md": scores_page(scores_block(comparisons))}
    if check:
        stale = [str(file.relative_to(ROOT)) for file, text in texts.items()
                 if not file.exists() or file.read_text() != text]
        print(f"stale: {', '.join(stale)}: make report" if stale else "the report is up to date")
        return int(bool(stale))
    files = {folder / f"{name}.{kind}": save(figure, kind)
             for name, figure in draw_figures(cells, comparisons) for kind in ("png", "pdf")}
    for file, picture in files.items():
        write(file, picture)
    for file in {*folder.glob("*.png"), *folder.glob("*.pdf")} - {*files}:
        file.unlink()
    for file, text in texts.items():
        write(file, text.encode())
    count = len(files) + 2
    print(f"{folder.relative_to(ROOT)}: {len(cells)} cells, {count} files; docs/scores.md is new too")
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Writes tables, figures and a page of all recorded scores.")
    parser.add_argument("--check", action="store_true", help="only tell whether they are stale")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="commits, or folders of scores")
    options = parser.parse_args(arguments)
    try:
        if not options.compare:
            return make_report(options.check)
        print(compare_versions(*options.compare), end="")
        return 0
    except (UserError, OSError) as error:
        print(f"report.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
