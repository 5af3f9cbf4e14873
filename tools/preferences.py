"""What preferences have taught a language model: sentiment against KL to the reference (DPO's figure 2).

  python tools/preferences.py [--runs results/runs/language/dpo/sentiment/train]
                              [--out results/language/dpo.csv] [--picture docs/img/dpo.png]

Reads the continuations that runs of algorithms/language/dpo.py left at each evaluation (samples-*.jsonl), has
them scored by the judge that labelled the pairs, VADER, and writes a row for each run and evaluation:

  reward, reward_low, reward_high    mean compound score, from -1 to 1, of prompts with their continuations
  kl, kl_low, kl_high                mean log ratio of policy and reference
  accuracy, held_out_loss            on held-out pairs

The intervals hold 95 %: prompts, not texts, are drawn anew 2,000 times, as texts with one prompt are alike.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from common import DAMAGED, ROOT, UserError, exit_status, read_record, write

COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999")
RESAMPLES = 2000


def load_judge():
    """The compound score of a text, as algorithms/collect/sentiment.py has it."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("vaderSentiment is missing: make language brings it") from None
    polarity = SentimentIntensityAnalyzer().polarity_scores
    return lambda text: polarity(text)["compound"]


def interval(groups: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean of all values, and where 95 % of the means lie when the groups (the prompts') are drawn anew."""
    sums, sizes = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    drawn = np.random.default_rng(0).integers(len(groups), size=(RESAMPLES, len(groups)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return float(sums.sum() / sizes.sum()), *map(float, np.quantile(means, (0.025, 0.975)))


def read_samples(file: Path, score) -> dict[str, float]:
    """The row of an evaluation, but for the run's name."""
    try:
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        table = pd.DataFrame(samples)[["prompt", "response", "log_ratio"]]
    except DAMAGED as error:
        raise UserError(f"cannot read {file}: {error!r:.100}; remove its run and train again") from None
    table["reward"] = [score(text) for text in table["prompt"] + table["response"]]
    row = {"samples": len(table), "prompts": table["prompt"].nunique()}
    for name, column in (("reward", "reward"), ("kl", "log_ratio")):
        groups = [group.to_numpy() for _, group in table.groupby("prompt", sort=True)[column]]
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), interval(groups)))
    return row


def read_runs(folder: Path) -> pd.DataFrame:
    """A row for each run below `folder` and each of its evaluations."""
    score, rows = load_judge(), []
    for record in sorted(folder.rglob("run.json")):
        try:
            config = read_record(record.parent)["config"]
            known = {name: config[name] for name in ("variant", "seed", "loss", "beta")}
        except DAMAGED as error:  # or it is of another script
            print(f"skipped {record.parent}: {error!r:.100}", file=sys.stderr)
            continue
        metrics = pd.read_csv(record.parent / "metrics.csv").set_index("update").filter(like="eval/")
        for file in sorted(record.parent.glob("samples-*.jsonl")):
            update = int(file.stem.removeprefix("samples-"))
            row = known | {"update": update} | read_samples(file, score)
            if update in metrics.index:  # else the run was stopped between the two files
                found = metrics.loc[update]
                row |= {"accuracy": found.get("eval/accuracy"), "held_out_loss": found.get("eval/loss")}
            rows.append(row)
    if not rows:
        raise UserError(f"{folder} has no run with samples: train with --prompts (docs/language.md)")
    return pd.DataFrame(rows)


def label_of(row: pd.Series) -> str:
    """A run as the figure names it."""
    if row["loss"] == "sft":
        return "SFT on preferred"
    return f"{row['loss'].upper()}, β = {row['beta']:g}"


def errors(run: pd.DataFrame, name: str) -> np.ndarray:
    """How far the interval goes below and above: [2, evaluations]."""
    return np.stack([run[name] - run[f"{name}_low"], run[f"{name}_high"] - run[name]]).clip(min=0)


def draw(table: pd.DataFrame, picture: Path) -> None:
    """Reward against KL: a line a run, a point an evaluation."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["font.size"] = 9
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    table = table.assign(order=[(loss == "sft", beta) for loss, beta in zip(table["loss"], table["beta"])])
    for number, (_, run) in enumerate(table.groupby(["order", "variant", "seed"])):
        run, color = run.sort_values("update"), COLORS[number % len(COLORS)]
        across, up = errors(run, "kl"), errors(run, "reward")
        axes.errorbar(run["kl"], run["reward"], up, across, color=color, marker="o", markersize=4,
                      linewidth=1.2, elinewidth=0.6, label=label_of(run.iloc[0]))
    start = table[table["update"] == 0]
    if len(start):
        axes.axhline(start["reward"].mean(), color="#888888", linewidth=0.8, linestyle=":", label="reference")
    axes.set(xlabel="KL to the reference", ylabel="sentiment of continuations, -1 to 1")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


def report(arguments: argparse.Namespace) -> None:
    table = read_runs(arguments.runs)
    write(arguments.out, table.round(4).to_csv(index=False))
    draw(table, arguments.picture)
    last = table.sort_values("update").groupby(["variant", "seed"]).tail(1)
    for _, row in last.iterrows():
        print(f"{label_of(row)}, seed {row['seed']}, update {row['update']:,}: reward {row['reward']:.3f} "
              f"({row['reward_low']:.3f} to {row['reward_high']:.3f}), KL {row['kl']:.2f}")
    print(f"{arguments.out} and {arguments.picture}: {len(table)} evaluations")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "results/runs/language/dpo/sentiment/train")
    parser.add_argument("--out", type=Path, default=ROOT / "results/language/dpo.csv")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/img/dpo.png")
    return exit_status("preferences.py", report, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
