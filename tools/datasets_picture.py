"""The picture of a dataset card: returns, lengths, observations and actions side by side."""

import math
from functools import partial

import matplotlib
import numpy as np
import pandas as pd
from datasets_choices import ChoiceLog
from datasets_tables import Data, score, share, show
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, MultipleLocator

COLORS = {"data": "#0072B2", "mean": "#D55E00", "goal": "#009E73", "wall": "#E0E0E0"}  # for all eyes
SHADES = LinearSegmentedColormap.from_list("shades", ["#CFE4F1", COLORS["data"], "#00121F"])
CHANNELS = 16  # of planes that are shown, at most


def draw(title: str, data: Data, actions: pd.DataFrame, limits: tuple[float, float] | None, maze) -> Figure:
    """Returns, lengths, observations and actions side by side."""
    style = {"axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(17, 4.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1)  # inches
        widths = [1, 1, 1.4, 1.2]
        if data.log and data.log.kind == "states":
            widths = [0.8, 0.8, 2.3, 0.8]  # a column of pixels for each of some hundred states
        returns, lengths, states, entries = figure.subplots(1, 4, width_ratios=widths)
        draw_histogram(returns, data.returns, "return")
        if limits:
            low, high = limits
            functions = partial(score, limits=limits), lambda value: low + value / 100 * (high - low)
            scale = returns.secondary_xaxis(-0.2, functions=functions)
            scale.set_xlabel("score")
            scale.xaxis.set_major_locator(MaxNLocator(4))
        draw_histogram(lengths, data.lengths, "length (steps)")
        if maze:
            draw_maze(states, data.positions, maze)
        elif data.log and data.log.kind == "states":
            draw_pairs(states, data.log)
        elif data.log and data.log.kind == "planes":
            draw_planes(states, data.log.sums / (data.lengths + 1).sum())
        else:
            draw_projection(states, data.sample)
        if data.log:
            draw_choices(entries, actions)
        else:
            draw_actions(entries, data.actions, actions)
        figure.suptitle(f"{title}: {len(data.lengths):,} episodes, {data.lengths.sum():,} steps", fontsize=13)
    return figure


def draw_histogram(axis, values: np.ndarray, name: str) -> None:
    """Of a number per episode; bins of whole numbers hold equally many of them."""
    low, high, bins = values.min(), values.max(), min(40, 2 * math.isqrt(len(values)))
    whole = bool((values == np.round(values)).all())
    if whole:
        step = math.ceil((high - low + 1) / bins)
        edges = np.arange(low - 0.5, high + step, step)
    elif high - low > 1e-6 * max(abs(low), abs(high)):
        edges = np.linspace(low, high, bins + 1)
    else:  # equal but for rounding
        edges = (low + high) / 2 + np.array([-0.5, 0.5])
    axis.hist(values, edges, color=COLORS["data"])
    axis.axvline(values.mean(), color=COLORS["mean"], lw=2)
    axis.set_title(f"Mean {name.partition(' ')[0]} {show(values.mean())}", color=COLORS["mean"])
    axis.set(xlabel=name, ylabel="episodes")
    axis.margins(x=1 if len(edges) == 2 else 0.05)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def draw_density(axis, places: np.ndarray, bins, label: str) -> None:
    """How many of the places [n, 2] lie in each bin, on a log scale; an empty bin stays empty."""
    counts, *edges = np.histogram2d(*places.T, bins)
    norm = LogNorm(1, max(counts.max(), 2))  # also where all lie outside
    mesh = axis.pcolormesh(*edges, np.ma.masked_equal(counts.T, 0), norm=norm, cmap=SHADES)
    axis.figure.colorbar(mesh, ax=axis, label=label)


def draw_maze(axis, positions: np.ndarray, maze) -> None:
    """Where the ball was, the walls, and the goal of the evaluation environment."""
    size, right, top = maze.maze_size_scaling, maze.x_map_center, maze.y_map_center
    for i, row in enumerate(maze.maze_map):
        for j, cell in enumerate(row):
            if cell == 1:
                corner = maze.cell_rowcol_to_xy(np.array([i, j])) - size / 2
                axis.add_patch(Rectangle(corner, size, size, color=COLORS["wall"], lw=0))
    bins = [np.linspace(-edge, edge, 20 * cells + 1)
            for edge, cells in ((right, maze.map_width), (top, maze.map_length))]
    draw_density(axis, positions, bins, f"observations in a square of {size / 20:g} m")
    goals = np.array(maze.unique_goal_locations)
    stars, text = (17, "goal of the evaluation") if len(goals) == 1 else (10, "goals of the evaluation")
    axis.plot(*goals.T, "*", color=COLORS["goal"], ms=stars, mec="white", label=text)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    axis.set(xlim=(-right, right), ylim=(-top, top), aspect="equal", xlabel="x (m)", ylabel="y (m)")
    axis.set_title("Positions")
    axis.xaxis.set_major_locator(MultipleLocator(size))
    axis.yaxis.set_major_locator(MultipleLocator(size))


def draw_projection(axis, sample: np.ndarray) -> None:
    """The observations seen along the two directions in which they vary most."""
    places, shares = project(sample)
    names = [f"component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares)]
    axis.set_title("Observations, standardised, by PCA")
    if len(shares) == 2:
        draw_density(axis, places, 100, f"observations in a bin, of {len(sample):,}")
        axis.set(xlabel=names[0], ylabel=names[1])
    elif len(shares) == 1:
        axis.hist(places[:, 0], 40, color=COLORS["data"])
        axis.set(xlabel=names[0], ylabel=f"observations, of {len(sample):,}")
    else:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "all observations are equal", ha="center", transform=axis.transAxes)


def project(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places [n, K] on the first K principal components, and their shares [K] of the variance.

    K is 2, or less where all observations lie on a line or a point.
    """
    varying = sample[:, np.ptp(sample, axis=0) > 0].astype(np.float64)
    if not varying.size:
        return np.zeros((len(sample), 0)), np.zeros(0)
    varying = (varying - varying.mean(0)) / varying.std(0)
    _, variances, components = np.linalg.svd(varying.T @ varying / len(varying))
    shares = variances / variances.sum()
    kept = (shares[:2] > 1e-9).sum()
    return varying @ components[:kept].T, shares[:kept]


def draw_pairs(axis, log: ChoiceLog) -> None:
    """How often each choice was made in each state, these in the order of their frequency."""
    _, places, counts = np.unique(log.column("before"), return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(-counts, kind="stable"))  # [states seen]
    pairs = np.stack([rank[places], log.first_choice + log.column("made")], 1)
    columns = min(len(counts), 800)  # a column is several states where there are more
    edges = np.linspace(-0.5, len(counts) - 0.5, columns + 1)
    rows = log.first_choice - 0.5 + np.arange(log.choices + 1)
    draw_density(axis, pairs, [edges, rows], "steps (white: none)")
    axis.set_title(f"{len(np.unique(pairs, axis=0)) / (log.states * log.choices):.1%} of all pairs seen")
    axis.set(xlabel=f"states in which a choice was made, by frequency ({len(counts):,})", ylabel="choice")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axis.yaxis.set_major_locator(MaxNLocator(15, integer=True, min_n_ticks=1))
    axis.invert_yaxis()


def draw_planes(axis, means: np.ndarray) -> None:
    """The mean [height, width, channels] of each channel, from 0 (white) to its own largest."""
    height, width, channels = means.shape
    shown = min(channels, CHANNELS)
    columns = math.ceil(math.sqrt(shown))
    size = 9 if columns < 3 else 7
    for channel in range(shown):
        row, column = divmod(channel, columns)
        left, top = 1.1 * width * column, 1.25 * height * row
        plane = np.ma.masked_equal(means[..., channel], 0)
        largest, extent = means[..., channel].max(), (left, left + width, top + height, top)
        axis.imshow(plane, SHADES, vmin=0, vmax=max(largest, 1e-9), extent=extent)
        axis.add_patch(Rectangle((left, top), width, height, fill=False, color="#808080", lw=0.8))
        axis.text(left, top - 0.03 * height, f"{channel}: ≤ {largest:.2g}", va="bottom", fontsize=size)
    rows = math.ceil(shown / columns)
    axis.set(xlim=(0, 1.1 * width * columns), ylim=(1.25 * height * (rows - 0.19), -0.2 * height))
    axis.set_axis_off()
    name = "each channel" if shown == channels else f"channels 0 to {shown - 1} of {channels}"
    axis.set_title(f"Mean of {name}, white: 0")


def draw_choices(axis, table: pd.DataFrame) -> None:
    """How often each choice was made."""
    axis.barh(table.index, table["share"], color=COLORS["data"])
    axis.set_title(f"{(table['share'] > 0).sum()} of {len(table)} choices made", color=COLORS["mean"])
    axis.set(xlabel="share of the steps", ylabel="choice")
    axis.yaxis.set_major_locator(MaxNLocator(15, integer=True, min_n_ticks=1))
    axis.invert_yaxis()


def draw_actions(axis, actions: np.ndarray, table: pd.DataFrame) -> None:
    """How each entry spreads between its bounds (extremes, where it has none), and its saturated share."""
    bounded = np.isfinite(table[["low", "high"]])
    low = table["low"].where(bounded["low"], table["min"])
    high = table["high"].where(bounded["high"], table["max"])
    edges, shares = np.linspace(-1, 1, 51), []
    for column, least, most in zip(actions.T, low, high):
        places = 2 * (column - least) / max(most - least, 1e-6) - 1
        shares.append(np.histogram(places.clip(-1, 1), edges)[0] / len(places))
    rows, shares = np.arange(len(table) + 1) - 0.5, np.ma.masked_equal(shares, 0)
    mesh = axis.pcolormesh(edges, rows, shares, norm=LogNorm(1e-3, 1), cmap=SHADES)
    label = "share of an entry's values in a bin"
    axis.figure.colorbar(mesh, ax=axis, label=label, extend="min", pad=0.1)
    if len(table) <= 40:
        for entry, value in table["saturated"].dropna().items():
            axis.text(1.03, entry, f"{value:.0%}", va="center", fontsize=8, color=COLORS["mean"])
    axis.set_title(f"Actions saturated: {share(table['saturated'])}", color=COLORS["mean"])
    some, every = bounded.any(axis=None), bounded.all(axis=None)
    ends = "bounds" if every else "bounds or extremes" if some else "extremes"
    axis.set(xlabel=f"{ends} mapped to -1 and 1", ylabel="entry of the action")
    axis.xaxis.set_major_locator(MultipleLocator(0.5))
    axis.yaxis.set_major_locator(MaxNLocator(15, integer=True))
    axis.invert_yaxis()
