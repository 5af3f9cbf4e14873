"""Learning curves and a table of any runs, your own data, variants and sweeps among them.

  python tools/plot.py results/runs                          every run below a folder
  python tools/plot.py RUNS/offline/td3_bc RUNS/offline/bc   or below several
  python tools/plot.py RUNS --output curves.pdf              a .png, .pdf or .svg

A panel is a dataset, a line an algorithm or a variant of it: thick the mean over seeds, at the updates at
which all of them were evaluated; thin every seed; a diamond the mean of the final evaluations. The title of a
panel says where lines have one seed, where runs had different updates or data, and how many are not finished.
It shows scores, or returns where a run has no score.

The table has the final evaluations, mean and standard deviation over seeds. The best on the way was chosen
with the simulator, which offline learning does not have.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from report import LOOKS, STYLE, UserError, add_legend, panels, save, span, write
from scores import DAMAGED, KEY, markdown, show

SUFFIXES = (".png", ".pdf", ".svg")
FINAL = ["score", "return_mean", "best_score"]


# ------------------------------------------------ The runs ------------------------------------------------


def find_runs(folders: Iterable[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a run, and a row an evaluation on its way; `run` numbers the runs in both."""
    runs, curves, seen = [], [], set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder")
        for file in sorted(folder.rglob("run.json")):
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            try:
                run, curve = read_run(file.parent)
            except DAMAGED as error:  # named, and the others are drawn
                print(f"skipped {file.parent}: its record cannot be read: {error!r:.150}", file=sys.stderr)
                continue
            curves.append(curve.assign(run=len(runs)))
            runs.append({"folder": str(folder), "run": len(runs), **run})
    if not runs:
        raise UserError(f"no runs (run.json) in {', '.join(map(str, folders))}")
    runs = pd.DataFrame(runs)
    runs["learner"] = [name_learner(row) for row in runs.to_dict("records")]
    if runs.duplicated(KEY).any():  # the same seed in two folders
        runs["learner"] += " in " + runs["folder"]
    return runs, pd.concat(curves, ignore_index=True)


def read_run(folder: Path) -> tuple[dict, pd.DataFrame]:
    """What is known of one run, and its evaluations: update, score, return_mean."""
    info = json.loads((folder / "run.json").read_text())
    config, finished = info["config"], info["status"] == "finished"
    dataset = config.get("dataset") or config["environment"]  # online learners have no dataset
    family, algorithm, *rest = folder.resolve().parts[-4 - dataset.count("/") - 1 :]
    if rest != [*dataset.split("/"), config["variant"], f"seed-{config['seed']}"]:
        raise ValueError(f"it is not in .../{dataset}/{config['variant']}/seed-{config['seed']}")
    run = {"family": family, "algorithm": algorithm, "dataset": dataset, "variant": config["variant"]}
    run |= {"seed": config["seed"], "finished": finished, "dataset_hash": info.get("dataset_hash", "")}
    run |= {"updates": config["updates"], **{name: info.get(name) if finished else None for name in FINAL}}
    curve = pd.DataFrame(columns=["update", "eval/score", "eval/return_mean"], dtype=float)
    if (folder / "metrics.csv").exists():
        metrics = pd.read_csv(folder / "metrics.csv")
        curve = metrics.reindex(columns=curve.columns).dropna(subset="eval/return_mean")
    return run, curve.rename(columns=lambda name: name.removeprefix("eval/"))


def name_learner(run: dict) -> str:
    """Algorithm and variant, as the report names them."""
    names = (run["family"], run["algorithm"], run["variant"])
    return " ".join(name for name in names if name not in ("offline", "default"))


# ------------------------------------------------ The table ------------------------------------------------


def final_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a line of the picture: its finished runs."""
    rows = []
    for (dataset, learner), group in runs.groupby(["dataset", "learner"]):
        done, waiting = group[group["finished"]], int((~group["finished"]).sum())
        shown = {name: show_final(done[name]) for name in FINAL}
        seeds = f"{len(done)}" + f" (and {waiting} not finished)" * (waiting > 0)
        rows.append([dataset, learner, *shown.values(), seeds, span(group["updates"])])
    columns = ["Dataset", "Algorithm", "Score", "Return", "Best on the way", "Seeds", "Updates"]
    return pd.DataFrame(rows, columns=columns)


def show_final(values: pd.Series) -> str:
    """Mean and spread, where all runs have the number."""
    values = values.astype(float)
    return show(values) if len(values) and values.notna().all() else ""


# ----------------------------------------------- The picture -----------------------------------------------


def mean_curve(curve: pd.DataFrame, column: str) -> pd.Series:
    """Mean over runs by update, at the updates at which each of them was evaluated."""
    table = curve.pivot(index="update", columns="run", values=column)
    return table.dropna().mean(axis=1)


def describe(runs: pd.DataFrame) -> str:
    """What must be known to compare the lines of one panel; empty if nothing is amiss."""
    seeds, notes = runs.groupby("learner")["seed"].nunique(), []
    single = sorted(seeds[seeds == 1].index)
    if len(single) == len(seeds):
        notes.append("one seed each: no spread is known")
    elif single:
        notes.append(f"one seed: {', '.join(single)}")
    if runs["updates"].nunique() > 1:
        notes.append(f"unequal updates: {span(runs['updates'])}")
    if runs["dataset_hash"].nunique() > 1:
        notes.append(f"{runs['dataset_hash'].nunique()} versions of the data")
    waiting = int((~runs["finished"]).sum())
    if waiting:
        notes.append(f"not finished: {waiting} of {len(runs)} runs")
    return "\n".join(textwrap.fill(note, 46) for note in notes)  # characters that a panel has room for


def draw(runs: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """A panel a dataset."""
    learners = sorted({*runs["learner"]})
    look = dict(zip(learners, cycle(LOOKS)))
    groups = list(runs.groupby("dataset"))
    figure, axes = panels(len(groups))
    for axis, (dataset, group) in zip(axes, groups):
        evaluated = curves[curves["run"].isin(group["run"])]
        finals = group[group["finished"] & group["return_mean"].notna()]
        scored = evaluated["score"].notna().all() and finals["score"].notna().all()
        column = "score" if scored else "return_mean"
        for learner, members in group.groupby("learner"):
            draw_line(axis, members, evaluated, column, look[learner])
        axis.set_title("\n".join(filter(None, [dataset, describe(group)])))
        axis.set(xlabel="gradient updates", ylabel="score" if scored else "return")
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    add_legend(figure, learners, look)
    return figure


def draw_line(axis, members: pd.DataFrame, curves: pd.DataFrame, column: str, look: tuple[str, str]) -> None:
    """One algorithm or variant: every seed, their mean, and the mean of the final evaluations."""
    style, color = look
    curves = curves[curves["run"].isin(members["run"])]
    for _, curve in curves.groupby("run"):
        axis.plot(curve["update"], curve[column], color=color, lw=0.8, alpha=0.45)
    mean = mean_curve(curves, column)
    axis.plot(mean.index, mean, color=color, ls=style, lw=2)
    finals = members[members["finished"] & members["return_mean"].notna()]
    if len(finals):
        value = np.mean(finals[column].astype(float))
        axis.plot(finals["updates"].max(), value, "D", color=color, ms=6, mec="white", zorder=3)


# ----------------------------------------------- Command line -----------------------------------------------


def plot(folders: list[Path], output: Path) -> None:
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output: {output} ends in none of {', '.join(SUFFIXES)}")
    runs, curves = find_runs(folders)
    print(markdown(final_table(runs)))
    if curves.empty and runs["return_mean"].isna().all():
        raise UserError("no run has been evaluated yet, so there is nothing to draw")
    with matplotlib.rc_context(STYLE):
        write(output, save(draw(runs, curves), output.suffix.removeprefix(".")))
    print(f"\nPicture: {output}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="where to look for runs")
    parser.add_argument("--output", type=Path, help="the picture (curves.png in the first folder)")
    options = parser.parse_args(arguments)
    try:
        plot(options.folders, options.output or options.folders[0] / "curves.png")
    except (UserError, OSError) as error:
        print(f"plot.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
