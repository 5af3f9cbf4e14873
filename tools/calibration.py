"""What the model of a mopo, combo or morel run has learned: its errors, its doubts, and whether they agree.

  python tools/calibration.py RUN                       tables, and a picture in RUN/calibration.png
  python tools/calibration.py RUN --output model.pdf    a .png, .pdf or .svg

RUN is the folder of a run whose model is fitted; its dataset has to be on this machine. Errors are those of
rows that were held out of the fit, rewards in the learner's units.

Errors, by dimension: the root of the mean squared error of the elites' mean after one step, and after five in
a row; and the share of the change that is left unexplained: 1 is what a model has that says "nothing changes,
and the reward is the mean". Doubts: MOPO's penalty u or MOReL's disagreement D, on the data and in the latest
rollouts. COMBO has none. And which share of the rollouts ended, or halted, before their time.

The picture, left: rows where the model expects to err so much, against how much it does; a thin line is a
dimension, in units of its own deviation, the thick one is all of them. On the diagonal the model knows what
it does not know; above, it is too sure of itself. Right: the doubts; where the rollouts' are far beyond the
data's, they have left the data.
"""

import argparse
import sys
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pandas as pd
import torch
from assess import names_of, open_run, translated
from common import UserError, escape, exit_status, markdown, write
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from report_figures import COLORS, STYLE, save
from torch import Tensor

SUFFIXES = (".png", ".pdf", ".svg")
BINS = 10  # of equally many rows


class Still:
    """The model that says: nothing changes, and the reward is the mean."""

    elites = slice(None)

    def __init__(self, data: dict[str, Tensor]):
        self.answer = torch.zeros(1, 1, data["observations"].shape[1] + 1)
        self.answer[:, :, -1] = data["rewards"].mean()

    def __call__(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, None]:
        return self.answer.expand(1, len(observations), -1), None


def open_model(folder: Path) -> tuple[ModuleType, object, dict[str, Tensor], list[str]]:
    """The run's script and learner, the data as they were given to it, and the names of what it predicts."""
    script, learner, info = open_run(folder)
    if not hasattr(script, "fit_model"):
        raise UserError(f"{folder} is a run of {Path(script.__file__).stem}, which has no model of the world")
    if learner.updates == 0:
        raise UserError(f"the model of {folder} is not fitted yet; the run's own command goes on with it")
    config = learner.config
    with translated(script):
        dataset = script.load_dataset(config.dataset)
        episodes, dataset_hash = script.read_episodes(dataset)
    if dataset_hash != info.get("dataset_hash"):
        raise UserError(f"{config.dataset} is not the data that {folder} was trained on: get these again")
    script.scale_rewards(episodes, config.reward_scale, config.reward_shift, config.normalize_rewards)
    metadata, size = dict(dataset.storage.metadata), learner.scaler.obs_dim
    names = names_of(metadata, "observation_columns", size, "observation")
    return script, learner, script.transitions(episodes, learner.scaler), [*names, "reward"]


# ------------------------------------------------ Measures ------------------------------------------------


def errors_of(script: ModuleType, model, data: dict[str, Tensor], names: list[str]) -> pd.DataFrame:
    """A row a dimension: roots of squared errors after one and five steps, and what they do not explain."""
    errors, changes = script.model_errors(model, data), script.model_errors(Still(data), data)
    table = pd.DataFrame(index=names)
    for steps, name in ((1, "1 step"), (5, "5 steps")):
        if f"error_{steps}" in errors:
            error, change = (np.array(found[f"error_{steps}"]) for found in (errors, changes))
            table[f"Error, {name}"] = np.sqrt(error)
            table[f"Unexplained, {name}"] = error / np.where(change > 0, change, np.nan)
    return table


@torch.no_grad()
def expectations(script: ModuleType, model, data: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Expected and actual errors [H, dimensions] of held-out steps, in units of each target's deviation.

    Expected is the deviation of what a step in the model draws: one of the elites, then of its Gaussian.
    """
    rows = script.split_rows(len(data["rewards"]))[0]
    held_out = {name: column[rows] for name, column in data.items()}
    mean, log_var = model(held_out["observations"], held_out["actions"])
    mean, variance = mean[model.elites], log_var[model.elites].exp()
    expected = (variance.mean(0) + mean.var(0, correction=0)).sqrt()
    actual = (mean.mean(0) - model.targets(held_out)).abs()
    scale = model.targets(data).std(0)
    varies = scale > 0
    return (expected / scale)[:, varies].numpy(), (actual / scale)[:, varies].numpy()


def binned(expected: np.ndarray, actual: np.ndarray) -> tuple[list[float], list[float]]:
    """Roots of the mean squares of both, of bins of rows with like expectations."""
    order = np.argsort(expected)
    bins = [rows for rows in np.array_split(order, BINS) if len(rows)]
    means = [[np.sqrt(np.mean(values[rows] ** 2)) for rows in bins] for values in (expected, actual)]
    return means[0], means[1]


def doubts_of(learner, data: dict[str, Tensor]) -> tuple[str, dict[str, np.ndarray]]:
    """What the doubts are called, and theirs on the data and in the rollouts; empty where there are none."""
    rows = learner.rollouts.rows
    if "penalty" in rows:
        name, on_data, imagined = "penalty u", learner.penalty_on(data), rows["penalty"]
    elif "disagreement" in rows:
        name, on_data, imagined = "disagreement D", learner.calibrate(data), rows["disagreement"]
    else:
        return "", {}
    return name, {"data": on_data.numpy(), "rollouts": imagined.numpy()}


def describe(learner, expected: np.ndarray, actual: np.ndarray, doubts: dict[str, np.ndarray]) -> str:
    """What is said below the table of errors."""
    once, twice = (np.mean(actual <= times * expected) for times in (1, 2))
    normal = "of a right model with normal errors 68% and 95%"
    lines = [f"Errors within the expected deviation: {once:.0%}, within two: {twice:.0%} ({normal})"]
    rows, config = learner.rollouts.rows, learner.config
    started = config.rollout_batch * len(learner.rollouts.blocks)
    counts = {"ended": rows["terminations"].sum()}
    if "halted" in rows:  # a halt is a termination too
        counts = {"ended": counts["ended"] - rows["halted"].sum(), "halted": rows["halted"].sum()}
    for verb, count in counts.items():
        share = float(count) / started
        lines.append(f"Rollouts that {verb} within {config.rollout_length} steps: {share:.1%}")
    if doubts:
        marks = (0.05, 0.5, 0.95)
        table = [[name, f"{values.mean():.3g}", *(f"{value:.3g}" for value in np.quantile(values, marks))]
                 for name, values in doubts.items()]
        lines += ["", markdown(["", "Mean", "5%", "Median", "95%"], table)]
    return "\n".join(lines)


# ----------------------------------------------- The picture -----------------------------------------------


def draw(expected: np.ndarray, actual: np.ndarray, name: str, doubts: dict[str, np.ndarray], limit) -> Figure:
    """Expected against actual errors; beside it the doubts, if there are any, and where a rollout halts."""
    figure = Figure(figsize=(8 if doubts else 4.2, 3.6), layout="constrained")
    axes = figure.subplots(1, 1 + bool(doubts), squeeze=False)[0]
    for dimension in range(expected.shape[1]):
        line = binned(expected[:, dimension], actual[:, dimension])
        axes[0].plot(*line, color=COLORS[0], lw=0.8, alpha=0.5, label=None if dimension else "one dimension")
    pooled = binned(expected.ravel(), actual.ravel())
    axes[0].plot(*pooled, "o-", color=COLORS[1], lw=2, ms=4, label="all dimensions")
    ends = [min(map(min, pooled)), max(map(max, pooled))]
    axes[0].plot(ends, ends, color="#888888", lw=1, ls="--", label="as expected")
    axes[0].set(xscale="log", yscale="log", xlabel="expected error, in deviations of the target",
                ylabel="actual error", title="Does the model know where it errs?")
    for axis in (axes[0].xaxis, axes[0].yaxis):
        axis.set_major_locator(LogLocator(subs=(1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes[0].legend()
    if doubts:
        draw_doubts(axes[1], doubts)
        axes[1].set(xlabel=f"{name} (last bar: all beyond)", ylabel="share of steps", title="Doubts")
        if limit is not None:
            axes[1].axvline(limit, color="#888888", lw=1, ls="--", label="halts beyond")
        axes[1].legend()
    return figure


def draw_doubts(axis, doubts: dict[str, np.ndarray]) -> None:
    """Shares of steps; what is beyond the 99th percentile of both is in the last bin."""
    highest = max(np.quantile(values, 0.99) for values in doubts.values())
    edges = np.linspace(0, highest or 1, 50)
    for color, (name, values) in zip(COLORS, doubts.items()):
        shares = np.histogram(np.minimum(values, edges[-1]), edges)[0] / len(values)
        axis.stairs(shares, edges, color=color, fill=True, alpha=0.5, label=name)


# ----------------------------------------------- Command line -----------------------------------------------


def calibrate(folder: Path, output: Path) -> None:
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output: {output} ends in none of {', '.join(SUFFIXES)}")
    script, learner, data, names = open_model(folder)
    table = errors_of(script, learner.model, data, names)
    cells = [[escape(name), *(f"{value:.3g}" for value in row)] for name, row in zip(names, table.to_numpy())]
    print(markdown(["", *table.columns], cells))
    expected, actual = expectations(script, learner.model, data)
    name, doubts = doubts_of(learner, data)
    print(f"\n{describe(learner, expected, actual, doubts)}")
    limit = getattr(learner, "threshold", None)
    with matplotlib.rc_context(STYLE):
        write(output, save(draw(expected, actual, name, doubts, limit), output.suffix.removeprefix(".")))
    print(f"\nPicture: {output}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--output", type=Path, help="the picture (RUN/calibration.png)")
    options = parser.parse_args(arguments)
    output = options.output or options.run / "calibration.png"
    return exit_status("calibration.py", calibrate, options.run, output)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
