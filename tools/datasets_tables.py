"""The numbers of a dataset card, and how they are written."""

import html
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from datasets_choices import SHOWN, ChoiceLog, choice_facts, observation_facts

MOVED = 0.5  # deviations: what drifts by more between a log's first and last third is in bold
MARGIN = 0.01  # of the range between its bounds: an action entry this near to one is saturated


@dataclass
class Data:
    """M episodes of N steps in all, so N + M observations."""

    returns: np.ndarray  # [M]
    lengths: np.ndarray  # [M] in steps
    terminated: np.ndarray  # [M]
    truncated: np.ndarray  # [M]
    rewards: np.ndarray  # [N]
    actions: np.ndarray  # [N, act_dim] float32, before they are clipped; empty where they are choices
    positions: np.ndarray  # [N + M, 2] the first two entries of every observation, where these are vectors
    sample: np.ndarray  # [at most SAMPLE, obs_dim] observations, drawn with a fixed seed; likewise
    entries: int  # of an observation
    constant: int  # of them: the same in all observations
    digest: str  # the content hash
    log: ChoiceLog | None  # of choices


def score(returns, limits: tuple[float, float]):
    """`limits` are the returns that score 0 and 100."""
    return 100 * (returns - limits[0]) / (limits[1] - limits[0])


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
    if data.log is None or data.log.kind != "states":
        facts |= {"Entries of an observation": f"{data.entries:,}, {data.constant:,} of them constant"}
    if data.log:
        facts |= observation_facts(data.log) | choice_facts(data.log)
    return facts


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


def drift(data: Data, names: list[str]) -> pd.DataFrame:
    """Means in each third of the log's episodes, in their order, and by how many deviations they moved.

    No rows where there are fewer than three episodes. The mean of a choice is its share; none is shown
    where there are more than SHOWN.
    """
    columns = ["", "first third", "middle third", "last third", "moved by"]
    if len(data.lengths) < 3:
        return pd.DataFrame(columns=columns)
    third = np.repeat(np.arange(3), [len(part) for part in np.array_split(data.lengths, 3)])  # of an episode
    step_third = np.repeat(third, data.lengths)
    measures = {"mean return": (data.returns, third), "mean length": (data.lengths, third)}
    measures["mean reward"] = data.rewards, step_third
    for name, entry in zip(names, action_entries(data)):
        measures[f"mean action {name}"] = entry, step_third
    likely = data.log.column("propensity") if data.log else []
    if len(likely) == len(step_third):
        measures["mean propensity"] = likely, step_third
    rows = []
    for name, (values, owner) in measures.items():
        values = values.astype(np.float64)
        means, deviation = [values[owner == i].mean() for i in range(3)], values.std()
        moved = (means[2] - means[0]) / deviation if deviation > 1e-9 * abs(means[1]) else 0.0
        shown = f"{moved:+.2f}"
        rows.append([name, *map(show, means), f"**{shown}**" if abs(moved) >= MOVED else shown])
    return pd.DataFrame(rows, columns=columns)


def action_entries(data: Data) -> Iterable[np.ndarray]:
    """Each entry [N] of the actions, or for each choice whether it was made."""
    if data.log is None:
        return data.actions.T
    made, choices = data.log.column("made"), data.log.choices
    return [made == choice for choice in range(choices)] if choices <= SHOWN else []


# ----------------------------------------------- As text -----------------------------------------------


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


def escape(name: str) -> str:
    """A name from the data as Markdown shows it, whatever is in it."""
    return re.sub(r"([\\`*_\[\]~#])", r"\\\1", html.escape(name))
