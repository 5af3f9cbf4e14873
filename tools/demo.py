"""What learning from rewards adds to imitation: trains BC, TD3+BC and IQL on one dataset, and draws them.

  make demo                           makes the dataset first
  python tools/demo.py [--updates 10000] [--dataset ID] [--any_field_of_all_three value]

Called again, it trains only what is not finished and draws only what is not drawn.
"""

import argparse
import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from common import ROOT, read_record, write
from matplotlib.patches import Circle, Rectangle
from matplotlib.ticker import MaxNLocator, MultipleLocator, StrMethodFormatter

NAMES = {"bc": "BC", "td3_bc": "TD3+BC", "iql": "IQL"}
COLORS = {  # for all eyes
    "BC": "#D55E00", "TD3+BC": "#0072B2", "IQL": "#CC79A7", "The data": "#444444", "goal": "#009E73"}
ROUNDS = 2  # that every environment plays for the picture
REACH = 0.45  # m from the goal that PointMaze rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--dataset", default="reef/pointmaze/umaze-v0", help="Minari id")
    parser.add_argument("--updates", default="10000", help="gradient updates of each")
    parser.add_argument("--seed", default="0", help="training seed")
    parser.add_argument("--variant", default="demo", help="names the run folders")
    parser.add_argument("--output_dir", default="results/runs", help="where they go, and the picture")
    fields, others = parser.parse_known_args()
    folders = {name: train(algorithm, vars(fields), others) for algorithm, name in NAMES.items()}
    runs = {name: read_record(folder) for name, folder in folders.items()}
    if "score" not in runs["BC"]:
        sys.exit(f"{fields.dataset} has no environment to evaluate in: name one with --environment")

    sys.path.append(str(ROOT / "algorithms/offline"))
    script = importlib.import_module("bc")
    with contextlib.redirect_stdout(io.StringIO()):  # the training has said it
        dataset = script.load_dataset(fields.dataset)
        environments = script.make_environments(dataset, runs["BC"]["config"]["environment"])
    explain(runs, dataset.storage.metadata)
    picture = Path(fields.output_dir, "demo", f"{fields.dataset}.png")
    finished = max((folder / "run.json").stat().st_mtime for folder in folders.values())
    if not picture.exists() or picture.stat().st_mtime < finished:
        matplotlib.use("Agg")
        draw(picture, folders, runs, dataset, environments)
    print(f"\nPicture: {picture}")


def train(algorithm: str, fields: dict[str, str], others: list[str]) -> Path:
    """Folder of the finished run; the script itself goes on with what is there, or leaves it alone."""
    path = f"{algorithm}/{fields['dataset']}"
    print(f"\n{NAMES[algorithm]}:", flush=True)
    config = ROOT / f"configs/offline/{path}.yaml"
    words = ["--config_path", str(config)] if config.exists() else []
    words += ["--eval_every", "1000", "--eval_episodes", "50", "--checkpoint_every", "1000"]
    words += ["--threads", "2", "--wandb_mode", "disabled"]
    words += [word for name, value in fields.items() for word in (f"--{name}", value)]
    command = [sys.executable, str(ROOT / f"algorithms/offline/{algorithm}.py"), *words, *others]
    environ = os.environ | {"TQDM_DESC": NAMES[algorithm]}  # stands before the progress bar
    with subprocess.Popen(command, env=environ) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it hears Ctrl-C too, and saves first
            raise
    if status:
        sys.exit(status)  # the script has said why
    return Path(fields["output_dir"], "offline", path, fields["variant"], f"seed-{fields['seed']}")


def references(runs: dict, known: dict) -> tuple[float | None, float | None]:
    """Returns that score 0 and 100, as the scripts find them, given the dataset's metadata."""
    config = runs["BC"]["config"]
    return known.get("ref_min_score", config["ref_min"]), known.get("ref_max_score", config["ref_max"])


def explain(runs: dict, known: dict) -> None:
    """The scores, and what they mean."""
    columns = {"score": "score", "return_mean": "return", "success": "success"}
    rows = [[run[column] for column in columns] for run in runs.values()]
    table = pd.DataFrame(rows, list(runs), list(columns.values()), dtype=float)
    print("\n" + table.to_string(float_format="{:.2f}".format, na_rep="unknown", col_space=9))
    episodes, (low, high) = runs["BC"]["config"]["final_eval_episodes"], references(runs, known)
    print(f"\nMeans over {episodes} episodes after the last update, of one training seed.")
    recipe = known.get("recipe") or {}
    maze = "goals" in recipe  # that Reef has filled
    least, most = (" (a random policy)", " (the planner, told the goal)") if maze else ("", "")
    if None not in (low, high):
        print(f"Score 0 is a return of {low:.1f}{least}, score 100 one of {high:.1f}{most}.")
    if maze and not recipe["goals"]:
        print(
            "The data: a planner on its way from one random place to the next; where to, they don't say.\n"
            "BC imitates it, and so goes nowhere in particular. TD3+BC and IQL also read the rewards in the\n"
            "same data, learn which pieces of those walks lead to the goal, and join them: TD3+BC near all\n"
            "actions of the data, IQL near the better ones. Imitation cannot."
        )


def draw(picture: Path, folders: dict, runs: dict, dataset, environments) -> None:
    """One PNG: the learning curves and, of a maze, where the data and the policies go."""
    script, world = importlib.import_module("bc"), environments.envs[0].unwrapped
    maze = world.maze if getattr(world, "reward_type", "") == "sparse" else None  # 1 at the goal, else 0
    data = [(script.flatten(e.observations)[:, :2], e.rewards) for e in dataset.iterate_episodes()]
    widths = [1.3, 1, 1, 1, 1] if maze else [1.5]
    plt.rcParams |= {"axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    figure = plt.figure(figsize=(3.6 * sum(widths), 4.4), layout="constrained")
    curves, *panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    data_return = np.mean([rewards.sum() for _, rewards in data])
    draw_curves(curves, folders, runs, dataset.storage.metadata, data_return)
    if maze:
        shown = np.random.default_rng(0).integers(len(data), size=ROUNDS * environments.num_envs)
        walks = {"The data": [data[i] for i in shown]}
        for algorithm, name in NAMES.items():
            walks[name] = play(importlib.import_module(algorithm), folders[name], environments)
        for axis, (name, episodes) in zip(panels, walks.items()):
            draw_maze(axis, maze)
            draw_walks(axis, name, episodes)
        panels[0].set_ylabel("y (m)")
        key = panels[0].get_legend_handles_labels()
        title = f"{len(shown)} episodes each; all policies from the same starts"
        figure.legend(*key, loc="outside lower right", ncols=4, frameon=False, title=title)
    content = io.BytesIO()
    figure.savefig(content, dpi=150)
    write(picture, content.getvalue())


def draw_curves(axis, folders: dict, runs: dict, known: dict, data_return: float) -> None:
    """Score against updates; return, where there are no references to score it by."""
    low, high = references(runs, known)
    scored = None not in (low, high)
    what, column = ("score", "score") if scored else ("return", "return_mean")
    level = 100 * (data_return - low) / (high - low) if scored else data_return
    for height, style in {0: "-", 100: "-", level: "--"}.items() if scored else {level: "--"}.items():
        axis.axhline(height, color="#AAAAAA", lw=1, ls=style, zorder=0)
    axis.annotate("the data", (1.02, level), xycoords=("axes fraction", "data"), color="#666666", va="center")
    for name, folder in folders.items():
        curve = pd.read_csv(folder / "metrics.csv").dropna(subset="eval/return_mean")
        final, color = runs[name][column], COLORS[name]
        line = {"color": color, "label": f"{name}: final {what} {final:.0f}"}
        axis.plot(curve["update"], curve[f"eval/{column}"], "o-", lw=2, ms=4, **line)
        axis.plot(curve["update"].iloc[-1], final, "D", color=color, ms=9, mec="white", zorder=3)
    axis.set_title(f"{what.capitalize()} while training (◆ final)")
    axis.set_xlim(left=0)
    axis.set_xlabel("gradient updates")
    axis.set_ylabel(what + " (0: random policy, 100: planner)" * ("goals" in (known.get("recipe") or {})))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.legend(loc="upper left", bbox_to_anchor=(0, 0.95), frameon=False, labelcolor="linecolor")
    axis.spines[["top", "right"]].set_visible(False)


def play(script, folder: Path, environments) -> list[tuple[np.ndarray, np.ndarray]]:
    """(positions, rewards) of ROUNDS episodes in each environment, from the same starts for every policy."""
    policy, count, episodes = script.load(folder), environments.num_envs, []
    for first in range(0, ROUNDS * count, count):
        running, lengths, seen, earned = np.ones(count, bool), np.zeros(count, int), [], []
        observations, _ = environments.reset(seed=list(range(first, first + count)))
        while running.any():
            seen.append(script.flatten(observations)[:, :2])
            actions = policy.act(observations)
            observations, rewards, terminations, truncations, _ = environments.step(actions)
            earned.append(rewards)
            lengths += running
            running &= ~(terminations | truncations)
        walks = zip(np.stack(seen, 1), np.stack(earned, 1), lengths)
        episodes += [(positions[:length], rewards[:length]) for positions, rewards, length in walks]
    return episodes


def draw_maze(axis, maze) -> None:
    """Walls and goal, in metres."""
    size = maze.maze_size_scaling
    cells = {(i, j): cell for i, row in enumerate(maze.maze_map) for j, cell in enumerate(row)}
    for place, cell in cells.items():
        if cell == 1:
            corner = maze.cell_rowcol_to_xy(np.array(place)) - size / 2
            axis.add_patch(Rectangle(corner, size, size, color="#E0E0E0", lw=0))
    for goal in maze.unique_goal_locations:
        axis.add_patch(Circle(goal, REACH, color=COLORS["goal"], alpha=0.25, lw=0))
        star = {"color": COLORS["goal"], "ms": 15, "mec": "white", "ls": "", "zorder": 4}
        axis.plot(*goal, "*", **star, label="goal; within the circle a step earns 1")
    free = np.array([maze.cell_rowcol_to_xy(np.array(place)) for place, cell in cells.items() if cell != 1])
    (left, bottom), (right, top) = free.min(0) - 0.75 * size, free.max(0) + 0.75 * size
    axis.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xlabel="x (m)")
    axis.xaxis.set_major_locator(MultipleLocator(size))
    axis.yaxis.set_major_locator(MultipleLocator(size))


def draw_walks(axis, name: str, episodes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for positions, _ in episodes:
        axis.plot(*positions.T, color=COLORS[name], lw=1, alpha=0.5)
    starts, ends = (np.array([positions[i] for positions, _ in episodes]) for i in (0, -1))
    axis.plot(*starts.T, "o", color="white", mec="black", ms=4.5, zorder=3, label="start of an episode")
    axis.plot(*ends.T, "o", color="black", ms=4.5, zorder=3, label="its end")
    share = np.concatenate([rewards for _, rewards in episodes]).mean()
    axis.set_title(f"{name}: at goal {share:.0%} of the time", color=COLORS[name])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint")
