"""The report's figures, whose style tools/plot.py has too. No program: report.py is."""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Iterator
from operator import attrgetter

import matplotlib
import numpy as np
from common import span
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from report_statistics import Cell, Comparison, by_suite

BASELINE = "bc"  # the data's own worth
OFFLINE = 0.25  # as wide as this share of the online phase
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8B6FD6", "#9A7D0A", "#808080"]  # on light and dark
DASHES = ["-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (9, 2)), (0, (1, 4))]
LOOKS = [  # some eyes take one of the last three colors for one of the first four: they differ in dashes, too
    (DASHES[(turn + i // 4) % 7], color) for turn in range(7) for i, color in enumerate(COLORS)]
BEHIND = {"color": "#DDDDDD", "lw": 1, "zorder": 0.5}  # what other panels show
STYLE = {"axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False, "font.size": 9,
         "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6", "axes.axisbelow": True,
         "legend.frameon": False, "pdf.fonttype": 42}


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


def baseline_of(one: Comparison) -> str:
    """The one that imitates, whose name begins with its family's outside algorithms/offline."""
    return next((name for name in one.cells if name.split()[-1] == BASELINE), BASELINE)


def draw_aggregates(comparisons: list[Comparison], look: dict) -> Figure:
    """IQM and P(> baseline) of every learner with their intervals, a row a suite."""
    heights = [len(one.cells) + 1.5 for one in comparisons]
    figure = Figure(figsize=(8, 0.32 * sum(heights) + 0.3), layout="constrained")
    rows = figure.subplots(len(comparisons), 2, squeeze=False, height_ratios=heights, sharey="row")
    for (left, right), one in zip(rows, comparisons):
        baseline = baseline_of(one)
        for place, name in enumerate(one.cells):
            pairs = {left: one.iqm[name], right: one.improvement.get((name, baseline))}
            for axis, estimate in pairs.items():
                if estimate:
                    axis.plot(estimate[1:], [place] * 2, color=look[name][1], lw=5, alpha=0.35,
                              solid_capstyle="butt")
                    axis.plot(estimate.value, place, "o", color=look[name][1], ms=6)
        left.set_yticks(range(len(one.cells)), one.cells)
        left.set_ylim(len(one.cells) - 0.4, -0.6)
        left.set_title(f"{one.suite}\nIQM (datasets: {len(one.datasets)})")
        right.set_visible(any((name, baseline) in one.improvement for name in one.cells))
        right.set_title(f"P(better than {baseline})")
        right.set_xlim(-0.03, 1.03)
        right.axvline(0.5, color="#888888", lw=1, ls="--", zorder=0)
        for axis in (left, right):
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="y", visible=False)
    return figure


def add_legend(figure: Figure, names: Iterable[str], look: dict) -> None:
    lines = [Line2D([], [], ls=look[name][0], color=look[name][1], lw=2, label=name) for name in names]
    inches = max(1.2, 0.8 + 0.07 * max(len(line.get_label()) for line in lines))  # of an entry
    columns = max(1, int(figure.get_figwidth() / inches))
    figure.set_figheight(figure.get_figheight() + 0.19 * (len(lines) / columns - 1))  # the panels keep theirs
    figure.legend(handles=lines, loc="outside upper left", ncols=columns, handlelength=4)  # whole dashes


def panels(count: int) -> tuple[Figure, list]:
    """A figure of that many axes, at most three in a row."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(3.4 * columns, 6), 2.5 * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def portions(ranked: list) -> list[list]:
    """A panel each, of at most as many lines as there are colors: they could not be told apart otherwise."""
    size = math.ceil(len(ranked) / math.ceil(len(ranked) / len(COLORS)))
    return [ranked[start:start + size] for start in range(0, len(ranked), size)]


def titles(name: str, count: int) -> list[str]:
    """Of the panels, where one cannot show them all."""
    places = range(1, count + 1)
    return [name] if count == 1 else [f"{name}\n{place} of {count}, best first" for place in places]


def draw_profiles(comparisons: list[Comparison], look: dict) -> Figure:
    """Share of the runs above each score, a panel a suite; many learners take several, each panel with some
    of them before the others in gray.
    """
    parts = [portions(list(one.profiles)) for one in comparisons]  # profiles are sorted by their IQM
    figure, axes = panels(sum(map(len, parts)))
    remaining = iter(axes)
    for one, shares in zip(comparisons, parts):
        for title, names in zip(titles(one.suite, len(shares)), shares):
            axis = next(remaining)
            for name, profile in one.profiles.items():
                style, color = look[name]
                if name not in names:
                    axis.plot(one.thresholds, profile.value, **BEHIND)
                    continue
                axis.plot(one.thresholds, profile.value, color=color, ls=style, lw=1.8)
                axis.fill_between(one.thresholds, *profile[1:], color=color, alpha=0.15, lw=0)
            axis.set(title=title, xlabel="score τ", ylabel="share of runs above τ", ylim=(-0.02, 1.02))
    add_legend(figure, sorted({name for one in comparisons for name in one.cells}), look)
    return figure


def note_runs(counts: dict[str, int], updates: Iterable[int]) -> list[str]:
    """What must be known to compare lines, given the seeds of each learner and the updates of all runs."""
    single, notes = sorted(name for name, count in counts.items() if count == 1), []
    if single and len(single) == len(counts):
        notes.append("one seed each: no spread is known")
    elif single:
        notes.append(f"one seed: {', '.join(single)}")
    if len({*updates}) > 1:
        notes.append(f"unequal updates: {span(updates)}")
    return notes


def entitle(axis, title: str, notes: Iterable[str]) -> None:
    """Notes stand below the title, in lines that a panel has room for; so is a long id in two."""
    lines = [textwrap.fill(line, 34) for line in title.splitlines()]
    axis.set_title("\n".join([*lines, *(textwrap.fill(note, 46) for note in notes)]))


def label_updates(axis) -> None:
    axis.set(xlabel="gradient updates", xlim=(0, None))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def time_unit(longest: float) -> tuple[str, int]:
    """In what to show times up to so many seconds, and how many seconds that is."""
    return ("hours", 3600) if longest > 3 * 3600 else ("minutes", 60)


def label_time(axis, unit: str) -> None:
    axis.set(xlabel=f"{unit} of training and evaluation", xlim=(0, None))


def label_switch(axis, longest: float) -> None:
    """Steps of experience from 0, the switch; left of it is the offline phase, on a scale of its own."""
    axis.axvline(0, color="#888888", lw=1, ls="--", zorder=0)
    axis.set(xlabel="offline  |  steps of experience", xlim=(-OFFLINE * longest, None))
    ticks = [tick for tick in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, longest) if tick >= 0]
    axis.set_xticks(ticks)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def experience(updates: np.ndarray, steps: np.ndarray, switch: int, longest: float) -> np.ndarray:
    """Where evaluations stand on that axis: the offline phase takes OFFLINE of the online one's room.

    Who learns online alone is first evaluated at the switch, after no update.
    """
    share = np.minimum(updates / switch, 1) if switch else 1
    return np.where(steps > 0, steps, OFFLINE * longest * (share - 1))


def draw_curves(cells: list[Cell], look: dict, time: bool) -> Figure:
    """Mean and range over seeds and the final score, a panel a dataset: against time, else against updates,
    or steps of experience where runs go on online. Many learners take several panels, as in `draw_profiles`.
    """
    datasets = {name: list(group) for name, group in itertools.groupby(cells, attrgetter("dataset"))}
    parts = {name: portions(ranked(group)) for name, group in datasets.items()}
    figure, axes = panels(sum(map(len, parts.values())))
    remaining = iter(axes)
    unit, seconds = time_unit(max(cell.runs["wall_seconds"].mean() for cell in cells))
    for dataset, group in datasets.items():
        column = column_of(group)
        longest_steps = max(cell.runs["online_steps"].max() for cell in group)
        shown = list(itertools.islice(remaining, len(parts[dataset])))
        for axis, title, part in zip(shown, titles(dataset, len(shown)), parts[dataset]):
            counts = {cell.learner: len(cell.runs) for cell in part}
            for cell in group:
                x, end = abscissa(cell, longest_steps, seconds if time else None)
                draw_cell(axis, cell, column, x, end, look[cell.learner] if cell.learner in counts else None)
            updates = [count for cell in part for count in cell.runs["update"]]
            entitle(axis, title, note_runs(counts, updates))
            axis.set_ylabel("score" if column == "score" else "return")
            axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            if time:
                label_time(axis, unit)
            elif group[0].goes_online:
                label_switch(axis, longest_steps)
            else:
                label_updates(axis)
        align(shown)
    add_legend(figure, sorted({cell.learner for cell in cells}), look)
    return figure


def align(axes: list) -> None:
    """The same scales in all of them, that of the widest."""
    lows, highs = zip(*(axis.get_ylim() for axis in axes))
    ends = [axis.get_xlim()[1] for axis in axes]
    for axis in axes:
        axis.set_ylim(min(lows), max(highs))
        axis.set_xlim(right=max(ends))


def column_of(cells: list[Cell]) -> str:
    """What all of them have: a score, or else only a return."""
    return "score" if all(cell.runs["score"].notna().all() for cell in cells) else "return_mean"


def ranked(cells: list[Cell]) -> list[Cell]:
    """The best final mean first."""
    column = column_of(cells)
    return sorted(cells, key=lambda cell: -cell.runs[column].mean())


def abscissa(cell: Cell, longest_steps: float, seconds: int | None) -> tuple[np.ndarray, float]:
    """Where its evaluations and its end stand: in units of so many seconds, else in updates or steps."""
    if seconds:
        curve = cell.curve["wall_seconds", "mean"] / seconds if len(cell.curve) else np.array([])
        return curve, cell.runs["wall_seconds"].mean() / seconds
    if cell.goes_online:
        curve = experience_of(cell, longest_steps) if len(cell.curve) else np.array([])
        return curve, cell.runs["online_steps"].max()
    return cell.curve.index, cell.runs["update"].max()


def draw_cell(axis, cell: Cell, column: str, x, end: float, look: tuple[str, str] | None) -> None:
    """Its curve, the range of its seeds and its final mean; without a look the curve, behind the others."""
    curve = cell.curve[column] if len(cell.curve) else None
    if look is None:
        if curve is not None:
            axis.plot(x, curve["mean"], **BEHIND)
        return
    style, color = look
    axis.plot(end, cell.runs[column].mean(), "D", color=color, ms=6, mec="white", zorder=3)
    if curve is not None:
        axis.plot(x, curve["mean"], color=color, ls=style, lw=1.5)
        axis.fill_between(x, curve["min"], curve["max"], color=color, alpha=0.15, lw=0)


def experience_of(cell: Cell, longest: float) -> np.ndarray:
    """`experience` of a cell's curve."""
    steps = cell.curve["online_steps", "mean"].to_numpy()
    return experience(cell.curve.index.to_numpy(), steps, cell.switch, longest)


def save(figure: Figure, suffix: str) -> bytes:
    """The same bytes every time."""
    file = io.BytesIO()
    figure.savefig(file, format=suffix, dpi=150, metadata={"CreationDate": None} if suffix == "pdf" else {})
    return file.getvalue()
