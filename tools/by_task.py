"""What one policy for several tasks scores in each, beside the policies that learnt one of them alone.

  python tools/by_task.py                       runs of context/multitask below results/runs
  python tools/by_task.py RUNS --alone results/scores/dt.csv --variant small

Those alone are taken from a file of recorded scores, of one variant, on the same datasets: at the end, and
where they were evaluated then, after as many windows of the task as one of n tasks has seen: an n-th of the
updates. It prints a table, a row a task, means and deviations over seeds, and writes every score to a file.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from common import (
    DAMAGED,
    ROOT,
    UserError,
    escape,
    exit_status,
    learner_name,
    markdown,
    name_run,
    read_record,
    show,
    write,
)


def scores_together(folder: Path) -> Iterator[dict]:
    """A row a task of every finished run below `folder` that has several."""
    for record in sorted(folder.rglob("run.json")):
        try:
            info = read_record(record.parent)
            names = name_run(record.parent, info)
            config = info["config"]
            if info["status"] != "finished" or "others" not in config:
                continue
            learner = learner_name(names["family"], names["algorithm"], names["variant"])
            tasks = [config["dataset"], *config["others"]]
            for task in tasks:
                yield {"task": task, "learner": learner.removeprefix("context "), "seed": config["seed"],
                       "updates": config["updates"], "score": info[f"{task}/score"],
                       "share": config["updates"] // len(tasks)}  # of the updates, a task's
        except DAMAGED as error:  # named, and the others are shown
            print(f"skipped {record.parent}: {error!s:.150}", file=sys.stderr)


def scores_alone(file: Path, variant: str, share: int) -> pd.DataFrame:
    """The same columns of recorded runs, at the end and after that many updates."""
    try:
        table = pd.read_csv(file)
        final, early = table["phase"] == "final", (table["phase"] == "training") & (table["update"] == share)
        table = table[(final | early) & (table["variant"] == variant)]
        names = table[["family", "algorithm", "variant"]].to_numpy()
        learners = [learner_name(*name) for name in names]
        learners = [f"{name} at {share:,}" if phase == "training" else name
                    for name, phase in zip(learners, table["phase"])]
        table = table.assign(task=table["dataset"], learner=learners)
        return table.rename(columns={"update": "updates"})[["task", "learner", "seed", "updates", "score"]]
    except DAMAGED as error:
        raise UserError(f"--alone: {file} is no file of recorded scores ({error!s:.80})") from None


def compare(options: argparse.Namespace) -> None:
    together = pd.DataFrame(scores_together(options.runs))
    if together.empty:
        raise UserError(f"no finished run of several tasks in {options.runs}")
    alone = scores_alone(options.alone, options.variant, together.pop("share").max())
    alone = alone[alone["task"].isin(together["task"])]
    table = pd.concat([together, alone]).sort_values(["task", "learner", "seed"])
    write(options.out, table.to_csv(index=False))
    learners = sorted(table["learner"].unique())
    cells = {place: show(scores) for place, scores in table.groupby(["task", "learner"])["score"]}
    rows = [[escape(task), *(cells.get((task, learner), "") for learner in learners)]
            for task in together["task"].unique()]
    print(markdown(["Task", *map(escape, learners)], rows))
    seeds = table.groupby("learner")["seed"].nunique().items()
    print(f"\nSeeds: {', '.join(f'{learner} {count}' for learner, count in seeds)}. Rows: {options.out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="?", type=Path, default=ROOT / "results/runs")
    parser.add_argument("--alone", type=Path, default=ROOT / "results/scores/dt.csv", help="recorded scores")
    parser.add_argument("--variant", default="small", help="of those alone")
    parser.add_argument("--out", type=Path, default=ROOT / "results/multitask.csv")
    return exit_status("by_task.py", compare, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
