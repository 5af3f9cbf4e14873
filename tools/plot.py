"""Learning curves and a table of any runs, your own data, variants and sweeps among them.

  python tools/plot.py results/runs                          every run below a folder
  python tools/plot.py RUNS/offline/td3_bc RUNS/offline/bc   or below several
  python tools/plot.py RUNS --output curves.pdf              a .png, .pdf or .svg
  python tools/plot.py RUNS --time                           against time, which depends on the machine
  python tools/plot.py RUNS --columns critic/q_mean actor/support_gap     of metrics.csv, for scores

A panel is a dataset, a line an algorithm or a variant of it: thick the mean over seeds, at the updates at
which all of them were evaluated; thin every seed; a diamond the mean of the final evaluations. The title of a
panel says where lines have one seed, where runs had different updates or data, and how many are not finished.
It shows scores, or returns where a run has no score. Runs that go on online have panels of their own, against
steps of experience from the switch on; the offline phase is left of it, on a scale of its own. With --time
all have minutes or hours of training and evaluation instead. With --columns a panel is a dataset and a column
of metrics.csv; a run without it has no line there.

The table has the final evaluations, mean and standard deviation over seeds. The best on the way was chosen
with the simulator, which offline learning does not have. A second table tells what became of the score of
runs that went on online, with the regret: the mean over online episodes of 1 - success, or of 1 - score / 100
where an environment knows no success.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import chain, cycle, product
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from common import (
    DAMAGED,
    KEY,
    UserError,
    all_updates,
    escape,
    exit_status,
    learner_name,
    markdown,
    name_run,
    read_record,
    show,
    span,
    write,
)
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from report_figures import (
    LOOKS,
    STYLE,
    add_legend,
    entitle,
    experience,
    label_switch,
    label_time,
    label_updates,
    note_runs,
    panels,
    save,
    time_unit,
)

SUFFIXES = (".png", ".pdf", ".svg")
FINAL = ["score", "return_mean", "best_score"]
SWITCH = ["score_at_switch", "lowest_score_after_switch", "score", "regret"]


# ------------------------------------------------ The runs ------------------------------------------------


def find_runs(folders: Iterable[Path], columns: Sequence[str] = ()) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a run, and a row an evaluation on its way or a value of `columns`; `run` numbers runs in both."""
    runs, curves, seen = [], [], set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder")
        for file in sorted(folder.rglob("run.json")):
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            try:
                run, curve = read_run(file.parent, columns)
            except DAMAGED as error:  # named, and the others are drawn
                print(f"skipped {file.parent}: its record cannot be read: {error!r:.150}", file=sys.stderr)
                continue
            curves.append(curve.assign(run=len(runs)))
            runs.append({"folder": str(folder), "run": len(runs), **run})
    if not runs:
        raise UserError(f"no runs (run.json) in {', '.join(map(str, folders))}")
    runs = pd.DataFrame(runs)
    names = zip(runs["family"], runs["algorithm"], runs["variant"])
    runs["learner"] = [learner_name(*name) for name in names]
    if runs.duplicated([*KEY, "folder"]).any():
        raise UserError("a run is twice below one folder: name the folders that have it one by one")
    if runs.duplicated(KEY).any():  # the same seed in two folders
        runs["learner"] += " in " + runs["folder"]
    return runs, pd.concat(curves, ignore_index=True)


def read_run(folder: Path, columns: Sequence[str] = ()) -> tuple[dict, pd.DataFrame]:
    """What is known of one run, and its evaluations: update, online_steps, wall_seconds, score, return_mean.

    `updates` are all of them, `online_steps` of a run the steps that it takes in the end. Where `columns` of
    metrics.csv are asked for the rows are theirs.
    """
    info = read_record(folder)
    config, finished = info["config"], info["status"] == "finished"
    steps = config.get("online_steps", 0)
    run = name_run(folder, info) | {"finished": finished, "dataset_hash": info.get("dataset_hash", "")}
    run |= {"switch": config["updates"], "online_steps": steps}
    run |= {"updates": all_updates(config)}
    run |= {name: info.get(name) if finished else None for name in [*FINAL, *SWITCH, "wall_seconds"]}
    names = {"update": "update", "online/steps": "online_steps", "time/wall_seconds": "wall_seconds",
             "eval/score": "score", "eval/return_mean": "return_mean"}
    run["columns"], curve = [], pd.DataFrame(columns=[*names, *columns], dtype=float)
    if (folder / "metrics.csv").exists():
        metrics = pd.read_csv(folder / "metrics.csv")
        run["columns"] = [*metrics]
        curve = metrics.reindex(columns=[*names, *columns])
        curve["online/steps"] = curve["online/steps"].ffill().fillna(0.0)
        curve = curve.dropna(subset=[*columns] or ["eval/return_mean"], how="all")
    return run, curve.rename(columns=names)


# ------------------------------------------------ The table ------------------------------------------------


def final_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a line of the picture: its finished runs."""
    rows = []
    for (dataset, learner), group in runs.groupby(["dataset", "learner"]):
        done, waiting = group[group["finished"]], int((~group["finished"]).sum())
        shown = {name: show_final(done[name]) for name in FINAL}
        seeds = f"{len(done)}" + f" (and {waiting} not finished)" * (waiting > 0)
        rows.append([escape(dataset), escape(learner), *shown.values(), seeds, span(group["updates"])])
    columns = ["Dataset", "Algorithm", "Score", "Return", "Best on the way", "Seeds", "Updates"]
    return pd.DataFrame(rows, columns=columns)


def switch_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a line of the picture that goes on online: its finished runs before, at and after the switch."""
    rows, done = [], runs[runs["finished"] & (runs["online_steps"] > 0)]
    for (dataset, learner), group in done.groupby(["dataset", "learner"]):
        counts = len(group), span(group["switch"]), span(group["online_steps"])
        shown = [show_final(group[name]) for name in SWITCH[:3]]
        regret = f"{group['regret'].mean():.2f}" if group["regret"].notna().all() else ""
        rows.append([escape(dataset), escape(learner), *counts, *shown, regret])
    columns = ["Dataset", "Algorithm", "Seeds", "Offline updates", "Online steps", "At the switch",
               "Lowest in the first tenth", "Last", "Regret"]
    return pd.DataFrame(rows, columns=columns)


def show_final(values: pd.Series) -> str:
    """Mean and spread, where all runs have the number."""
    values = values.astype(float)
    return show(values) if len(values) and values.notna().all() else ""


# ----------------------------------------------- The picture -----------------------------------------------


def mean_curve(curve: pd.DataFrame, column: str) -> pd.DataFrame:
    """x and y: means over runs at the updates at which each of them was evaluated."""
    tables = {name: curve.pivot(index="update", columns="run", values=name) for name in ("x", column)}
    shared = tables[column].notna().all(axis=1)
    return pd.DataFrame({name: table[shared].mean(axis=1) for name, table in tables.items()})


def describe(runs: pd.DataFrame) -> list[str]:
    """What must be known to compare the lines of one panel; empty if nothing is amiss."""
    notes = note_runs(runs.groupby("learner")["seed"].nunique().to_dict(), runs["updates"])
    if runs["dataset_hash"].nunique() > 1:
        notes.append(f"{runs['dataset_hash'].nunique()} versions of the data")
    waiting = int((~runs["finished"]).sum())
    if waiting:
        notes.append(f"not finished: {waiting} of {len(runs)} runs")
    return notes


def place(runs: pd.DataFrame, curves: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs and evaluations of one panel with their `x`: updates, or steps of experience."""
    longest = runs["online_steps"].max()
    if not longest:
        return runs.assign(x=runs["updates"]), curves.assign(x=curves["update"])
    switches = curves["run"].map(runs.set_index("run")["switch"])
    places = [experience(*row, longest) for row in zip(curves["update"], curves["online_steps"], switches)]
    return runs.assign(x=runs["online_steps"]), curves.assign(x=np.array(places, float))


def draw(runs: pd.DataFrame, curves: pd.DataFrame, time: bool = False, columns: Sequence[str] = ()) -> Figure:
    """A panel a dataset and column, another one for what goes on online there; on request against time."""
    learners = sorted({*runs["learner"]})
    look = dict(zip(learners, cycle(LOOKS)))
    unit, seconds = time_unit(curves["wall_seconds"].max())
    groups = list(product(runs.groupby(["dataset", runs["online_steps"] > 0]), columns or [""]))
    figure, axes = panels(len(groups))
    for axis, (((dataset, online), group), column) in zip(axes, groups):
        evaluated = curves[curves["run"].isin(group["run"])]
        if time:
            group, evaluated = (each.assign(x=each["wall_seconds"] / seconds) for each in (group, evaluated))
        else:
            group, evaluated = place(group, evaluated)
        if column:
            evaluated = evaluated.dropna(subset=column)
        else:
            finals = group[group["finished"] & group["return_mean"].notna()]
            scored = evaluated["score"].notna().all() and finals["score"].notna().all()
            column = "score" if scored else "return_mean"
        for learner, members in group.groupby("learner"):
            draw_line(axis, members, evaluated, column, look[learner])
        entitle(axis, f"{dataset}, then online" if online else dataset, describe(group))
        axis.set_ylabel("return" if column == "return_mean" else column)
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if time:
            label_time(axis, unit)
        elif online:
            label_switch(axis, group["online_steps"].max())
        else:
            label_updates(axis)
    add_legend(figure, learners, look)
    return figure


def draw_line(axis, members: pd.DataFrame, curves: pd.DataFrame, column: str, look: tuple[str, str]) -> None:
    """One algorithm or variant: every seed, their mean, and the mean of the final evaluations."""
    style, color = look
    curves = curves[curves["run"].isin(members["run"])]
    for _, curve in curves.groupby("run"):
        axis.plot(curve["x"], curve[column], color=color, lw=0.8, alpha=0.45)
    mean = mean_curve(curves, column)
    axis.plot(mean["x"], mean[column], color=color, ls=style, lw=2)
    finals = members[members["finished"] & members["return_mean"].notna()]
    if len(finals) and column in finals:
        value = np.mean(finals[column].astype(float))
        axis.plot(finals["x"].mean(), value, "D", color=color, ms=6, mec="white", zorder=3)


# ----------------------------------------------- Command line -----------------------------------------------


def plot(folders: list[Path], output: Path, time: bool, columns: list[str]) -> None:
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output: {output} ends in none of {', '.join(SUFFIXES)}")
    runs, curves = find_runs(folders, columns)
    known = {*chain.from_iterable(runs["columns"])}
    for column in columns:
        if column not in known:
            near = " or ".join(get_close_matches(column, known))
            advice = f"did you mean {near}?" if near else "docs/runs.md tells what there is"
            raise UserError(f"--columns: no run has {column} in its metrics.csv; {advice}")
    table = final_table(runs)
    print(markdown(table.columns, table.to_numpy()))
    if len(switched := switch_table(runs)):
        print("\n" + markdown(switched.columns, switched.to_numpy()))
    if curves.empty and (columns or runs["return_mean"].isna().all()):
        raise UserError("no run has been evaluated yet, so there is nothing to draw")
    with matplotlib.rc_context(STYLE):
        write(output, save(draw(runs, curves, time, columns), output.suffix.removeprefix(".")))
    print(f"\nPicture: {output}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="where to look for runs")
    parser.add_argument("--output", type=Path, help="the picture (curves.png in the first folder)")
    parser.add_argument("--time", action="store_true", help="against time instead of updates")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME", help="of metrics.csv, for scores")
    options = parser.parse_args(arguments)
    output = options.output or options.folders[0] / "curves.png"
    return exit_status("plot.py", plot, options.folders, output, options.time, options.columns)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
