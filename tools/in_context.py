"""What was learnt in context: returns by episode on goals that no training saw, one picture for all runs.

  python tools/in_context.py results/runs/context             every run below a folder
  python tools/in_context.py RUNS/context/dpt RUNS/context/retrieval

A line is a script or a variant of it: thick the mean over seeds, thin every seed. An agent's weights stay as
they are; what grows from one episode to the next is its context. Beside them are the learners whose lives are
the data, on the goals of the data (their episodes are learning by updates, and they need many), and the most
that can be earned. Episodes are on a logarithmic scale, for the learners live longer.

It writes a table, a row an episode of a run, and the picture; runs that are not finished are named and left
out.
"""

import argparse
import sys
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import matplotlib
import pandas as pd
from common import DAMAGED, KEY, ROOT, UserError, exit_status, learner_name, name_run, read_record, write
from matplotlib.figure import Figure
from report_figures import LOOKS, STYLE, save

COLUMNS = ["episode", "return_mean", "return_std", "best"]  # of a run's file
SUFFIXES = (".png", ".pdf", ".svg")


def find_runs(folders: Iterable[Path]) -> pd.DataFrame:
    """A row an episode of every finished run below `folders`."""
    tables, seen = [], set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder")
        for record in sorted(folder.rglob("run.json")):
            if record.resolve() in seen:
                continue
            seen.add(record.resolve())
            try:
                table = read_run(record.parent)
            except DAMAGED as error:  # named, and the others are drawn
                print(f"skipped {record.parent}: {error!s:.150}", file=sys.stderr)
                continue
            tables.append(table)
    if not tables:
        raise UserError(f"no finished run of algorithms/context in {', '.join(map(str, folders))}")
    table = pd.concat(tables, ignore_index=True)
    if table.duplicated([*KEY, "episode"]).any():
        raise UserError("the same run is in two folders: give one of them")
    if table["dataset"].nunique() > 1:
        raise UserError(f"runs on several datasets: {', '.join(sorted(table['dataset'].unique()))}")
    return table


def read_run(folder: Path) -> pd.DataFrame:
    """The final evaluation of one run; ValueError where there is none."""
    info = read_record(folder)
    files = sorted(folder.glob("in-context-final-*.csv"))
    if info["status"] != "finished" or not files:
        raise ValueError(f"it is {info['status']}, with {len(files)} final evaluations in context")
    table = pd.read_csv(files[-1])[COLUMNS]
    return table.assign(**name_run(folder, info))[[*KEY, *COLUMNS]]


def source_returns(dataset: str) -> list[float]:
    """What the learners of the data earned by episode, on average."""
    import minari  # takes a second

    try:
        return minari.load_dataset(dataset).storage.metadata["source_returns"]
    except DAMAGED as error:
        raise UserError(f"cannot read {dataset} ({error!r:.80}): make dataset ID={dataset}") from None


def draw(table: pd.DataFrame, source: list[float]) -> Figure:
    """Returns against episodes in context."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.subplots()
        for (name, runs), (style, color) in zip(table.groupby("learner"), cycle(LOOKS)):
            for _, run in runs.groupby("seed"):
                axes.plot(run["episode"], run["return_mean"], ls=style, color=color, lw=0.6, alpha=0.5)
            mean = runs.groupby("episode")["return_mean"].mean()
            seeds = runs["seed"].nunique()
            label = f"{name} ({seeds} seed{'s' * (seeds > 1)})"
            axes.plot(mean, ls=style, color=color, lw=2, label=label)
        axes.plot(range(1, len(source) + 1), source, color="#808080", lw=1, label="learners of the data")
        axes.axhline(table["best"].mean(), color="#808080", lw=1, ls=":", label="optimum")
        axes.set(xscale="log", xlabel="episode", ylabel="return")
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_title("Goals that no training saw, without a gradient step")
        axes.legend(loc="upper left", fontsize=8)
    return figure


def report(arguments: argparse.Namespace) -> None:
    if arguments.picture.suffix not in SUFFIXES:
        raise UserError(f"--picture: {arguments.picture} is not {' or '.join(SUFFIXES)}")
    table = find_runs(arguments.runs)
    source = source_returns(table["dataset"][0])
    write(arguments.out, table.round(4).to_csv(index=False))
    names = zip(table["family"], table["algorithm"], table["variant"])
    table["learner"] = [learner_name(*name).removeprefix("context ") for name in names]
    write(arguments.picture, save(draw(table, source), arguments.picture.suffix[1:]))
    for name, runs in table.groupby("learner"):
        last = runs["episode"] > runs["episode"].max() * 4 / 5
        by_seed = runs[last].groupby("seed")["return_mean"].mean()
        first = runs[runs["episode"] == 1]["return_mean"].mean()
        print(f"{name}: {first:.1f} in the first episode, {by_seed.mean():.1f} in the last fifth "
              f"({', '.join(f'{value:.1f}' for value in by_seed)}) of {runs['best'].mean():.1f}")
    print(f"{arguments.out} and {arguments.picture}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, default=[ROOT / "results/runs/context"])
    parser.add_argument("--out", type=Path, default=ROOT / "results/context/returns.csv")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/img/in-context.png")
    return exit_status("in_context.py", report, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
