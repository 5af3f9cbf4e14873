"""The report as text: tables, report.md, the blocks of docs/, and the page. No program: report.py is.

Tuning cost is what the record knows: updates, evaluation episodes in the simulator and hours of all runs of
all variants that became a config. Trials that never became one are not in the record.
"""

import itertools
import json
import math
import tomllib
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
from common import ROOT, UserError, escape, link, markdown, show, span
from report_figures import BASELINE, DASHES, OFFLINE, baseline_of, experience_of, looks, slug
from report_statistics import CELL, METRICS, MIN_SEEDS, Cell, Comparison, by_suite
from scores import RECORD

# ------------------------------------------------- Tables -------------------------------------------------


def aggregate_table(comparisons: Iterable[Comparison]) -> str:
    """A row a learner, the suites one after the other."""
    rows = []
    for one in comparisons:
        for name, cells in one.cells.items():
            runs = pd.concat([cell.runs for cell in cells])
            over = one.improvement.get((name, baseline_of(one)))
            beaten = ", ".join(escape(other) for other in one.cells if (name, other) in one.better)
            rows.append([escape(one.suite), len(one.datasets), escape(name), len(runs), span(runs["update"]),
                         one.iqm[name].show(1), over.show(2) if over else "", beaten])
    columns = ["Suite", "Datasets", "Algorithm", "Runs", "Updates", "IQM", f"P(> {BASELINE})", "Better than"]
    return markdown(columns, rows)


def improvement_table(one: Comparison) -> str:
    """P(row > column), bold where the row is better."""
    rows = []
    for x in one.cells:
        shown = {y: one.improvement[x, y].show(2) for y in one.cells if y != x} | {x: ""}
        values = [f"**{shown[y]}**" if (x, y) in one.better else shown[y] for y in one.cells]
        rows.append([escape(x), *values])
    return markdown(["P(row > column)", *map(escape, one.cells)], rows)


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
        name = link(cell.learner, f"../../{cell.config}")
        rows.append([escape(cell.dataset), name, *shown.values(), len(runs), span(runs["update"]),
                     f"{runs['wall_seconds'].mean() / 3600:.2f}", commits, data])
    columns = ["Dataset", "Algorithm", "Score", "Return", "Success", "Best on the way", "Seeds", "Updates",
               "Hours", "Commit", "Data"]
    return markdown(columns, rows)


def shorten(commit: str) -> str:
    """Seven digits, and the + that says that files differed from it."""
    return commit[:7] + "+" * commit.endswith("+")


def card_of(cell: Cell) -> str:
    """Where the dataset's card is, seen from results/report; empty where there is none."""
    card = Path("cards", f"{cell.dataset}.md")
    return quote(f"../{card}") if (ROOT / "results" / card).exists() else ""


def online_table(cells: list[Cell]) -> pd.DataFrame:
    """Offline, then online: what became of the score after the switch."""
    rows = []
    for cell in sorted(cells, key=attrgetter("dataset", "learner")):
        if not cell.goes_online:
            continue
        runs, columns = cell.runs, ["score_at_switch", "lowest_score_after_switch", "score"]
        shown = [show(runs[name]) if runs[name].notna().all() else "" for name in columns]
        regret = f"{runs['regret'].mean():.2f}" if runs["regret"].notna().all() else ""
        steps = span(runs["online_steps"].astype(int))
        counts = str(len(runs)), f"{cell.switch:,}", steps
        rows.append([cell.dataset, cell.learner, *counts, *shown, regret])
    columns = ["Dataset", "Algorithm", "Seeds", "Offline updates", "Online steps", "At the switch",
               "Lowest in the first tenth", "Last", "Regret"]
    return pd.DataFrame(rows, columns=columns)


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
    return Path(__file__).with_name("report.html").read_text().replace("@DATA@", text)


def numbers(values) -> list:
    """Numbers as JSON has them, to the six digits of results/scores: None for nan."""
    return [None if math.isnan(value) else float(f"{value:.6g}") for value in np.ravel(values).tolist()]


def cell_data(cell: Cell) -> dict:
    measured = {"seconds": "wall_seconds", **METRICS}
    runs = {name: numbers(cell.runs[column]) for name, column in measured.items()}
    if cell.goes_online:
        runs["steps"] = numbers(cell.runs["online_steps"])
    exact = {"updates": "update", **{name: name for name in ("seed", *RECORD)}}
    runs |= {name: cell.runs[column].tolist() for name, column in exact.items()}
    curve = {}
    if len(cell.curve):
        curve = {"updates": cell.curve.index.tolist(), "seconds": numbers(cell.curve["wall_seconds", "mean"])}
        for name in ("score", "return", "success"):
            curve[name] = {end: numbers(cell.curve[METRICS[name], end]) for end in ("mean", "min", "max")}
        if cell.goes_online:  # the offline phase from -1 to 0, then steps
            steps = cell.curve["online_steps", "mean"]
            curve["steps"] = numbers(np.where(steps > 0, steps, experience_of(cell, 1 / OFFLINE)))
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

Bars that do not overlap are no proof: with a few seeds these intervals are too narrow, and exclude equality
too often. "Better" is said where a permutation test agrees; of 3 seeds on a single dataset it says 0.1 at
best. That many pairs are compared is not corrected for.

{comparisons}

## Learning curves

Mean over seeds, with their lowest and highest; a diamond is the final evaluation. Time depends on the
machine and on what else ran there.

{curves}

## Scores

Mean ± standard deviation over training seeds. The best score on the way was chosen with the simulator, which
offline learning does not have. Hours are the mean of a run's.

{scores}

## Offline, then online

Scores at the switch, the lowest in the first tenth of the online phase, and the last; mean ± standard
deviation over seeds. Regret is the mean over online episodes of 1 - success, or of 1 - score / 100 where an
environment knows no success.

{online}

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
chance, by the interval and by a permutation test: with 3 seeds intervals are too narrow, so bars that do
not overlap are no proof. Of 3 seeds on a single dataset that test says 0.1 at best: nothing there can be
better, however far apart, and the IQM is their mean. That many pairs are compared is not corrected for.

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
    compared = [f"### {escape(one.suite)}\n\n{comparison_text(one)}" for one in comparisons]
    if any(one.cells for one in comparisons):
        compared += [picture("aggregates", "IQM and probability of improvement"),
                     picture("profiles", "Performance profiles")]
    curves = [picture(f"{kind}-{slug(suite)}", f"{escape(suite)}: score against {axis}")
              for suite in suites for kind, axis in {"curves": "updates", "time": "time"}.items()]
    return REPORT.format(
        runs=sum(len(cell.runs) for cell in cells),
        learners=len({cell.learner for cell in cells}),
        datasets=len({cell.dataset for cell in cells}),
        comparisons="\n\n".join(compared),
        curves="\n\n".join(curves),
        scores="\n\n".join(
            f"### Scores: {escape(suite)}\n\n{cells_table(group)}" for suite, group in suites.items()),
        **{name: markdown_of(table) for name, table in tables.items()},
    )


def markdown_of(table: pd.DataFrame) -> str:
    """Of a table whose cells are plain text."""
    return markdown(table.columns, table.map(escape).to_numpy()) if len(table) else "None."


def least_p(ours: list[Cell], theirs: list[Cell]) -> float:
    """The smallest two-sided p that a permutation of seeds within each dataset can have."""
    sizes = [(len(a.runs), len(b.runs)) for a, b in zip(ours, theirs)]
    return 2 / math.prod(math.comb(a + b, a) for a, b in sizes)


def comparison_text(one: Comparison) -> str:
    """Of one suite: what is compared, both tables, what is not compared."""
    if not one.cells:
        return f"No two algorithms have {MIN_SEEDS} seeds with scores, by default, of the same dataset."
    verdict = "Bold: better beyond chance." if one.better else "No difference is beyond chance."
    least = min(least_p(*pair) for pair in itertools.combinations(one.cells.values(), 2))
    if least > 0.05:
        verdict = f"So few runs cannot show a difference beyond chance (p is {least:.2g} at best)."
    left_out, datasets = (", ".join(map(escape, names)) for names in (one.left_out, one.datasets))
    rest = f"Not compared, for want of seeds or datasets: {left_out}." if left_out else ""
    parts = [f"On {datasets}.", aggregate_table([one]), improvement_table(one), verdict, rest]
    return "\n\n".join(filter(None, parts))


def scores_block(comparisons: list[Comparison]) -> str:
    """What docs/scores.md says of them: no more than the intervals support."""
    compared, rest = ([one for one in comparisons if bool(one.cells) == wanted] for wanted in (True, False))
    block = f"No two algorithms have {MIN_SEEDS} seeds with scores of the same dataset: none is compared.\n"
    if compared:
        block = BLOCK.format(seeds=MIN_SEEDS, baseline=BASELINE, table=aggregate_table(compared))
        names = ", ".join(escape(one.suite) for one in rest)
        block += f"\nNot compared, for want of seeds, scores or a second algorithm: {names}.\n" * bool(rest)
    return f"{block}\n{LINKS}"


def picture(name: str, text: str) -> str:
    return f"![{text}]({name}.png) [PDF]({name}.pdf)"


def with_block(file: str, block: str) -> str:
    """A page of docs/ with its block made anew."""
    before, begin, rest = (ROOT / file).read_text().partition("<!-- report:begin -->\n")
    _, end, after = rest.partition("<!-- report:end -->")
    if not (begin and end):
        raise UserError(f"{file} has no place for the report: a line <!-- report:begin -->, then one "
                        "<!-- report:end -->")
    return f"{before}{begin}{block}{end}{after}"
