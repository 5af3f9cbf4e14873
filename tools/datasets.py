"""Dataset cards: what a Minari dataset on this machine holds, in tables and one picture.

  python tools/datasets.py reef/pointmaze/umaze-v0 [...]   write <id>.md and <id>.png under results/cards
  python tools/datasets.py --check [id ...]                do the data still have the hashes of their cards?

Exit status 1: data and hash disagree (with --check the card's hash, else the one recorded with the data).
"""

import argparse
import contextlib
import hashlib
import html
import importlib
import io
import math
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

import gymnasium as gym
import matplotlib
import minari
import numpy as np
import pandas as pd
from common import UserError, write
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, MultipleLocator
from minari.storage import get_dataset_path

ROOT = Path(__file__).resolve().parents[1]
COLORS = {"data": "#0072B2", "mean": "#D55E00", "goal": "#009E73", "wall": "#E0E0E0"}  # for all eyes
SHADES = LinearSegmentedColormap.from_list("shades", ["#CFE4F1", COLORS["data"], "#00121F"])
SAMPLE = 50_000  # observations that are projected, at most
MOVED = 0.5  # deviations: what drifts by more between a log's first and last third is in bold
MARGIN = 0.01  # of the range between its bounds: an action entry this near to one is saturated
PACKAGES = ("gymnasium", "gymnasium-robotics", "minari", "mujoco", "numpy")  # what data may depend on
NO_SCALE = "none: an episode ends at its goal here, and earns on at it in an evaluation"
ACTION_WORDS = f"""\
The bounds `low` and `high` are {{owner}}. Clipped: outside of them. Saturated: outside, or nearer to one of
them than {MARGIN:.0%} of their distance."""

DRIFT_WORDS = f"""\
Means over the episodes as they are stored, a log's in the order of time. Moved by: the last third less the
first, in deviations; in bold from {MOVED:g} on. A log that drifts is several logs."""


# ------------------------------------------------ The data ------------------------------------------------


@dataclass
class Data:
    """M episodes of N steps in all, so N + M observations."""

    returns: np.ndarray  # [M]
    lengths: np.ndarray  # [M] in steps
    terminated: np.ndarray  # [M]
    truncated: np.ndarray  # [M]
    rewards: np.ndarray  # [N]
    actions: np.ndarray  # [N, act_dim] float32, before they are clipped; choices as entries of 0 and 1
    positions: np.ndarray  # [N + M, 2] the first two entries of every observation
    sample: np.ndarray  # [at most SAMPLE, obs_dim] observations, drawn with a fixed seed
    constant: int  # entries that are the same in all observations
    digest: str  # the content hash


def load_dataset(dataset_id: str) -> minari.MinariDataset:
    """The dataset on this machine, if it has vectors (or Dicts of them); actions may be choices."""
    if not re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", dataset_id):
        raise UserError(f"{dataset_id!r} is no Minari id such as reef/pointmaze/umaze-v0")
    if not is_here(dataset_id):
        advice = "make dataset ID=" if dataset_id.startswith("reef/") else "minari download "
        raise UserError(f"{dataset_id} is not on this machine; {advice}{dataset_id}")
    try:
        dataset = minari.load_dataset(dataset_id)
    except Exception as error:  # KeyError, AssertionError, JSONDecodeError ...
        raise unreadable(dataset_id, repr(error)) from None
    if dataset.id != dataset_id:
        raise unreadable(dataset_id, f"its metadata call it {dataset.id}")
    for space in (*leaves(dataset.observation_space), dataset.action_space):
        if space is dataset.action_space and isinstance(space, gym.spaces.Discrete):
            continue
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            name = "actions" if space is dataset.action_space else "observations"
            raise UserError(f"{dataset_id} has {name} in {space}; cards are for vectors (Box)")
    return dataset


def is_here(dataset_id: str) -> bool:
    return (get_dataset_path(dataset_id) / "data").exists()


def unreadable(dataset_id: str, problem: str) -> UserError:
    return UserError(f"cannot read {dataset_id} ({problem:.200}); minari delete {dataset_id}, get it anew")


def read_episodes(dataset: minari.MinariDataset, digest) -> Iterator[tuple[np.ndarray, minari.EpisodeData]]:
    """Observations [T + 1, obs_dim] and episode, one by one; adds to `digest` what the content hash is of.

    That is dtype, shape and bytes of every array, as in algorithms/collect/pointmaze.py. Raises UserError
    where an episode is malformed or not finite, or the file is damaged or lacks steps.
    """
    shapes = {"observations": [space.shape for space in leaves(dataset.observation_space)]}
    shapes["actions"], total = [dataset.action_space.shape], 0
    try:
        for episode in dataset.iterate_episodes():
            where, steps = f"{dataset.id}, episode {episode.id}", len(episode.rewards)
            for field in ("observations", "actions", "rewards", "terminations", "truncations"):
                arrays, wanted = leaves(getattr(episode, field)), shapes.get(field, [()])
                for array, shape in zip(arrays, wanted, strict=True):
                    if array.shape != (steps + (field == "observations"), *shape) or not steps:
                        found = f"{steps} steps, {field} of shape {array.shape}"
                        raise UserError(f"{where} is malformed: {found}")
                    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite for learners
                        if not np.isfinite(array.astype(np.float32)).all():
                            raise UserError(f"{where}: {field} are not all finite")
                    digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
            total += steps
            yield np.concatenate(leaves(episode.observations), axis=-1), episode
    except UserError:
        raise
    except Exception as error:  # h5py and minari raise whatever their parts do
        raise unreadable(dataset.id, repr(error)) from None
    if not total or total != dataset.total_steps:
        raise unreadable(dataset.id, f"it has {total:,} steps, its metadata say {dataset.total_steps:,}")


def read(dataset: minari.MinariDataset) -> Data:
    """All that a card needs, in one pass that never holds all observations."""
    count = dataset.total_steps + dataset.total_episodes
    chosen = np.sort(np.random.default_rng(0).choice(count, min(count, SAMPLE), replace=False))
    digest, start, low, high, parts = hashlib.sha256(), 0, np.inf, -np.inf, []
    choices = isinstance(dataset.action_space, gym.spaces.Discrete)
    for observations, episode in read_episodes(dataset, digest):
        begin, end = np.searchsorted(chosen, [start, start + len(observations)])
        flags = episode.terminations.any(), episode.truncations.any()
        positions, sample = observations[:, :2].copy(), observations[chosen[begin:end] - start]
        done = episode.actions
        if choices:
            known = dataset.action_space.start + np.arange(dataset.action_space.n)
            done = done[:, None] == known
        parts.append((*flags, episode.rewards, done.astype(np.float32), positions, sample))
        low, high = np.minimum(low, observations.min(0)), np.maximum(high, observations.max(0))
        start += len(observations)
    terminated, truncated, rewards, *columns = zip(*parts)
    actions, positions, sample = map(np.concatenate, columns)
    return Data(
        returns=np.array([row.sum(dtype=np.float64) for row in rewards]),
        lengths=np.array([len(row) for row in rewards]),
        terminated=np.array(terminated),
        truncated=np.array(truncated),
        rewards=np.concatenate(rewards),
        actions=actions,
        positions=positions,
        sample=sample,
        constant=int((low == high).sum()),
        digest=digest.hexdigest(),
    )


def leaves(tree) -> list:
    """The entries of a Dict in the order of its sorted keys, however deep; anything else is its own leaf."""
    mapping = isinstance(tree, Mapping)
    return [leaf for key in sorted(tree) for leaf in leaves(tree[key])] if mapping else [tree]


# ---------------------------------------- What else is known of them ----------------------------------------


def make_environment(dataset: minari.MinariDataset) -> tuple[gym.Env | None, str]:
    """The environment to evaluate in and its name; None and the reason, where there is none."""
    spec = dataset._eval_env_spec or dataset.env_spec
    if spec is None:
        return None, "none recorded"
    bare = partial(gym.make, spec.id, max_episode_steps=spec.max_episode_steps, **spec.kwargs)
    with contextlib.redirect_stderr(io.StringIO()):  # gymnasium-robotics prints a notice
        with contextlib.suppress(ImportError):
            gym.register_envs(importlib.import_module("gymnasium_robotics"))
        for make in (partial(dataset.recover_environment, eval_env=True), bare):
            try:
                return make(), spec.id
            except Exception as error:  # environments raise whatever they like
                problem = repr(error)
    return None, f"{spec.id}, which cannot be made here ({problem:.100})"


def action_names(dataset: minari.MinariDataset) -> list[str]:
    """What the metadata call the choices, or the entries of an action; their numbers where they do not."""
    space, known = dataset.action_space, dataset.storage.metadata
    if isinstance(space, gym.spaces.Discrete):
        names = known.get("action_names", [])
        numbers = range(int(space.start), int(space.start + space.n))
    else:
        names, numbers = known.get("action_columns", []), range(space.shape[0])
    return [escape(f"{name}") for name in (names if len(names) == len(numbers) else numbers)]


def escape(name: str) -> str:
    """A name from the data as Markdown shows it, whatever is in it."""
    return re.sub(r"([\\`*_\[\]~#])", r"\\\1", html.escape(name))


def action_bounds(dataset: minari.MinariDataset, env: gym.Env | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Lowest and highest action, float32 [act_dim] each, and whose bounds they are."""
    space, owner = dataset.action_space, "the dataset's"
    if isinstance(space, gym.spaces.Discrete):
        return np.zeros(space.n, np.float32), np.ones(space.n, np.float32), "of choices"
    if env and isinstance(env.action_space, gym.spaces.Box) and env.action_space.shape == space.shape:
        space, owner = env.action_space, f"those of {env.spec.id}"
    return space.low.astype(np.float32), space.high.astype(np.float32), owner


def references(dataset_id: str, known: Mapping) -> dict[str, tuple[float, str]]:
    """{"ref_min": (return, source), "ref_max": ...}: of the metadata, else of our own table, else empty."""
    names = ("ref_min", "ref_max")
    values = [known.get(f"{name}_score") for name in names]
    if None not in values:
        measured = known.get("reference_scores", {})  # {policy: its episodes}, where Reef's recipes made it
        policies = {entry.get("return_mean"): policy for policy, entry in measured.items()}
        note = f", mean of {known.get('num_episodes_average_score')} episodes"
        sources = [f": {policies[value]}{note}" if value in policies else "" for value in values]
        origin = known.get("reference_source", "the dataset's metadata")
        sources = [f"{origin}{source}" for source in sources]
    else:
        table = pd.read_csv(ROOT / "results/reference_scores.csv", index_col="dataset")
        if dataset_id not in table.index:
            return {}
        values = [table.loc[dataset_id, name] for name in names]
        sources = [f"reference_scores.csv: {table.loc[dataset_id, 'source']}"] * 2
    return dict(zip(names, zip(map(float, values), sources)))


def score(returns, limits: tuple[float, float]):
    """`limits` are the returns that score 0 and 100."""
    return 100 * (returns - limits[0]) / (limits[1] - limits[0])


def machine(known: Mapping) -> dict[str, str]:
    """What the data's last digits depend on: processor and packages here, and packages at their making.

    Of a processor its kind: the sines of a simulator are the C library's, which has other code for FMA.
    """
    processor, cpuinfo = platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists() and re.search(r"^flags\b.* fma\b", cpuinfo.read_text(), re.MULTILINE):
        processor += " with FMA"
    here = {package.name: package.version for package in distributions() if package.name in PACKAGES}
    versions = {"Versions here": {"python": platform.python_version(), **here}}
    versions |= {"Versions at its making": known["versions"]} if "versions" in known else {}
    texts = {name: ", ".join(map(" ".join, sorted(entry.items()))) for name, entry in versions.items()}
    return {"Processor here": processor, **texts}


# ----------------------------------------------- The tables -----------------------------------------------


def summarise(data: Data, actions: pd.DataFrame, limits: tuple[float, float] | None) -> dict[str, str]:
    """What a reader wants to know first."""
    ended, cut, mean = data.terminated, data.truncated, data.returns.mean()
    facts = {"Episodes": f"{len(data.lengths):,}", "Steps": f"{data.lengths.sum():,}"}
    ends = {"terminated": ended, "truncated": cut, "with both": ended & cut, "with neither": ~(ended | cut)}
    facts |= {f"Episodes {name}": f"{flags.sum():,} ({flags.mean():.1%})" for name, flags in ends.items()}
    facts |= {"Mean return": show(mean)}
    facts |= {"Mean return as a score": show(score(mean, limits)) if limits else "no references"}
    facts |= {"Steps with a reward other than 0": f"{(data.rewards != 0).mean():.2%}"}
    if "clipped" in actions:
        facts |= {f"Action entries {name}": share(actions[name]) for name in ("clipped", "saturated")}
    return facts | {"Entries of an observation": f"{data.sample.shape[1]}, {data.constant} of them constant"}


def share(column: pd.Series) -> str:
    """Of all values of an action's entries, given the share in each; entries without bounds have none."""
    return "no bounds" if column.isna().all() else f"{column.fillna(0).mean():.2%}"


def statistics(data: Data, limits: tuple[float, float] | None) -> pd.DataFrame:
    """Returns, their scores, lengths and rewards, a row each; deviations with ddof 0."""
    rows = {"return": data.returns, "length (steps)": data.lengths, "reward of a step": data.rewards}
    rows = {name: row.astype(np.float64) for name, row in rows.items()}
    numbers = [[row.mean(), row.std(), *np.quantile(row, np.arange(5) / 4)] for row in rows.values()]
    table = pd.DataFrame(numbers, list(rows), ["mean", "deviation", "min", "25%", "median", "75%", "max"])
    if limits:
        table.loc["score"] = score(table.loc["return"], limits)
        table.loc["score", "deviation"] = 100 * table.loc["return", "deviation"] / (limits[1] - limits[0])
        table = table.loc[["return", "score", *list(rows)[1:]]]
    return table


def action_table(actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> pd.DataFrame:
    """A row for each entry of an action; a share of its values is nan where it has no such bound."""
    width = high.astype(np.float64) - low
    margin = np.where(np.isfinite(width), MARGIN * width, 0)
    at_low = actions <= (low + margin).astype(np.float32)
    at_high = actions >= (high - margin).astype(np.float32)
    below, above = np.isfinite(low), np.isfinite(high)
    hits = {
        "clipped": ((actions < low) | (actions > high), below | above),
        "saturated": (at_low | at_high, below | above),
        "at low": (at_low, below),
        "at high": (at_high, above),
    }
    table = {"low": low, "high": high, "min": actions.min(0), "max": actions.max(0)}
    table |= {"mean": actions.mean(0, dtype=np.float64), "deviation": actions.std(0, dtype=np.float64)}
    table |= {name: np.where(bounded, hit.mean(0), np.nan) for name, (hit, bounded) in hits.items()}
    return pd.DataFrame(table)


def choice_table(actions: np.ndarray) -> pd.DataFrame:
    """A row for each choice: how often it was made."""
    return pd.DataFrame({"steps": actions.sum(0, dtype=np.int64), "share": actions.mean(0, dtype=np.float64)})


def drift(data: Data, names: list[str]) -> pd.DataFrame:
    """Means in each third of the log's episodes, in their order, and by how many deviations they moved.

    No rows where there are fewer than three episodes. The mean of a choice is its share.
    """
    columns = ["", "first third", "middle third", "last third", "moved by"]
    if len(data.lengths) < 3:
        return pd.DataFrame(columns=columns)
    third = np.repeat(np.arange(3), [len(part) for part in np.array_split(data.lengths, 3)])  # of an episode
    step_third = np.repeat(third, data.lengths)
    measures = {"mean return": (data.returns, third), "mean length": (data.lengths, third)}
    measures["mean reward"] = data.rewards, step_third
    for name, entry in zip(names, data.actions.T):
        measures[f"mean action {name}"] = entry, step_third
    rows = []
    for name, (values, owner) in measures.items():
        values = values.astype(np.float64)
        means, deviation = [values[owner == i].mean() for i in range(3)], values.std()
        moved = (means[2] - means[0]) / deviation if deviation > 1e-9 * abs(means[1]) else 0.0
        shown = f"{moved:+.2f}"
        rows.append([name, *map(show, means), f"**{shown}**" if abs(moved) >= MOVED else shown])
    return pd.DataFrame(rows, columns=columns)


def describe(dataset: minari.MinariDataset) -> dict[str, str]:
    """What the data are made of and by whom, as far as the metadata say it."""
    known, names = dataset.storage.metadata, {"algorithm_name": "Made by", "code_permalink": "Code"}
    spaces = {"Observations": dataset.observation_space, "Actions": dataset.action_space}
    facts = {name: describe_space(space) for name, space in spaces.items()}
    for name, key in (("Observed", "observation_columns"), ("Acted on", "action_columns")):
        facts |= {name: ", ".join(map(escape, known[key]))} if key in known else {}
    facts |= {"Authors": ", ".join(sorted(known["author"]))} if "author" in known else {}
    return facts | {name: known[key] for key, name in names.items() if key in known}


def describe_space(space: gym.Space) -> str:
    """`[4] float32`, a Dict of such, or `25 choices`."""
    if isinstance(space, gym.spaces.Discrete):
        return f"{space.n} choices"
    if isinstance(space, Mapping):
        return "{" + ", ".join(f"{key}: {describe_space(space[key])}" for key in sorted(space)) + "}"
    return f"{[*space.shape]} {space.dtype}"


def show(value: float) -> str:
    """Four digits; nothing for nan."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"
    return "" if math.isnan(value) else text


def markdown(table: pd.DataFrame) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    cells = [[" ".join(str(cell).split()).replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def pairs(facts: Mapping[str, str]) -> str:
    """Names and values as a table without a header."""
    return markdown(pd.DataFrame(facts.items(), columns=["", ""]))


# ----------------------------------------------- The picture -----------------------------------------------


def draw(title: str, data: Data, actions: pd.DataFrame, limits: tuple[float, float] | None, maze) -> Figure:
    """Returns, lengths, states and actions side by side."""
    style = {"axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(17, 4.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1)  # inches
        returns, lengths, states, entries = figure.subplots(1, 4, width_ratios=[1, 1, 1.4, 1.2])
        draw_histogram(returns, data.returns, "return")
        if limits:
            low, high = limits
            functions = partial(score, limits=limits), lambda value: low + value / 100 * (high - low)
            returns.secondary_xaxis(-0.2, functions=functions).set_xlabel("score")
        draw_histogram(lengths, data.lengths, "length (steps)")
        if maze:
            draw_maze(states, data.positions, maze)
        else:
            draw_projection(states, data.sample)
        if "share" in actions:
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


def draw_choices(axis, table: pd.DataFrame) -> None:
    """How often each choice was made."""
    axis.barh(table.index, table["share"], color=COLORS["data"])
    axis.set_title(f"{(table['share'] > 0).sum()} of {len(table)} choices made", color=COLORS["mean"])
    axis.set(xlabel="share of the steps", ylabel="choice")
    axis.yaxis.set_major_locator(MaxNLocator(15, integer=True))
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


# ------------------------------------------------ The cards ------------------------------------------------


def make_card(dataset: minari.MinariDataset, folder: Path) -> bool:
    """Writes a card and prints its numbers; false if the data do not have the hash recorded with them."""
    known, data = dataset.storage.metadata, read(dataset)
    env, environment = make_environment(dataset)
    low, high, owner = action_bounds(dataset, env)
    choices, names = isinstance(dataset.action_space, gym.spaces.Discrete), action_names(dataset)
    actions = choice_table(data.actions) if choices else action_table(data.actions, low, high)
    reference = references(dataset.id, known)
    limits = tuple(value for value, _ in reference.values())
    space = dataset.observation_space
    conditioned = isinstance(space, gym.spaces.Dict) and "desired_goal" in space.spaces
    limits = limits if limits and limits[0] < limits[1] and not conditioned else None
    maze = env.unwrapped.maze if env and hasattr(env.unwrapped, "point_env") else None
    picture = io.BytesIO()
    draw(dataset.id, data, actions, limits, maze).savefig(picture, dpi=100)
    limit = env.spec.max_episode_steps if env else None
    if env:
        env.close()

    card, recorded = folder / f"{dataset.id}.md", known.get("content_hash")
    note = {None: "none recorded", data.digest: "as recorded"}.get(recorded, f"NOT AS RECORDED: {recorded}")
    facts, spread = summarise(data, actions, limits), statistics(data, limits).map(show)
    if conditioned and reference:
        facts["Mean return as a score"] = NO_SCALE
    origin = {"Environment": environment, **describe(dataset), "sha256": f"{data.digest} ({note})"}
    if "recipe" in known:
        origin["Made again"] = "the same on any machine with such a processor and the versions at its making"
    sources = [[name, show(value), source] for name, (value, source) in reference.items()]
    shown, words = actions.map(show), ACTION_WORDS.format(owner=owner)
    if choices:
        shown, words = actions.assign(share=actions["share"].map("{:.2%}".format)), ""
    else:
        shares = actions[["clipped", "saturated", "at low", "at high"]]
        shown = shown.assign(**shares.map(lambda value: "" if math.isnan(value) else f"{value:.2%}"))
    named = "action_columns" in known or choices
    shown.insert(0, "choice" if choices else "entry", names if named else shown.index)
    moved = drift(data, names)
    blocks = [
        f"# {dataset.id}",
        html.escape(known.get("description", "").strip(), quote=False),
        f"![Returns, lengths, states and actions]({card.stem}.png)",
        pairs(facts),
        "## Episodes",
        markdown(spread.reset_index(names="")),
        "## Actions",
        markdown(shown),
        words,
        "## Drift" if len(moved) else "",
        markdown(moved) if len(moved) else "",
        DRIFT_WORDS if len(moved) else "",
        "## Reference scores",
        markdown(pd.DataFrame(sources, columns=["", "return", "source"])) if sources else "None is known.",
        f"Episodes of the evaluation last at most {limit} steps." if limit else "",
        "## Origin",
        pairs(origin | machine(known)),
    ]
    write(card.with_suffix(".png"), picture.getvalue())
    write(card, ("\n\n".join(filter(None, blocks)) + "\n").encode())
    print(f"\n{dataset.id}", *(f"  {name:<34}{value}" for name, value in facts.items()), sep="\n")
    print(f"\n{spread.to_string()}\n\nsha256 {origin['sha256']}\nCard: {card}")
    return recorded in (None, data.digest)


def check_card(dataset_id: str, card: Path) -> bool:
    """Prints whether the data have the hash of their card, or why that is skipped; false if they do not."""
    said = dict(re.findall(r"^\| (.+?) \| (.+) \|$", card.read_text(), re.MULTILINE))
    if "sha256" not in said:
        raise UserError(f"{card} is no card of a dataset: it names no sha256")
    if not is_here(dataset_id):
        print(f"{dataset_id}: skipped, it is not on this machine")
        return True
    dataset = load_dataset(dataset_id)
    now = machine(dataset.storage.metadata)
    for name in ("Processor here", "Versions here", "Versions at its making"):
        if said.get(name) != now.get(name):
            print(f"{dataset_id}: skipped, {name}: {now.get(name)}; in its card: {said.get(name)}")
            return True
    digest = hashlib.sha256()
    for _ in read_episodes(dataset, digest):
        pass
    found, wanted = digest.hexdigest(), said["sha256"].split()[0]
    print(f"{dataset_id}: {'equal' if found == wanted else f'DIFFERS: sha256 {found}, in its card {wanted}'}")
    return found == wanted


def run(arguments: list[str]) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("ids", nargs="*", metavar="id", help="Minari id; --check takes all cards without one")
    parser.add_argument("--check", action="store_true", help="compare data and cards, write nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "results/cards", help="folder of the cards")
    options = parser.parse_args(arguments)
    if options.check:
        cards = {card.relative_to(options.output).with_suffix("").as_posix(): card
                 for card in sorted(options.output.rglob("*.md"))}
        if missing := {*options.ids} - {*cards}:
            raise UserError(f"{options.output} has no card of {', '.join(sorted(missing))}")
        if not cards:
            raise UserError(f"{options.output} has no cards")
        results = [check_card(name, cards[name]) for name in options.ids or cards]
    elif options.ids:
        datasets = [load_dataset(name) for name in options.ids]  # a typo is found before any work
        results = [make_card(dataset, options.output) for dataset in datasets]
    else:
        raise UserError("name a dataset; `minari list local` lists those on this machine")
    return 0 if all(results) else 1


def main() -> int:
    try:
        return run(sys.argv[1:])
    except (UserError, OSError) as error:
        print(f"{Path(__file__).name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
