"""Publishes the ladder of a SAC run as behaviour policies, *.safetensors, and their returns, snapshots.csv.

  python tools/behavior.py RUN [--medium RETURN]

RUN is a run folder of algorithms/collect/sac.py, finished or not. All goes into results/behavior/<name>/; the
name of Hopper-v5 is hopper. The rungs of a ladder are the policies that set a record in an evaluation on
the way. Published are:

  expert       the highest rung
  medium       the first rung that earned RETURN (a third of expert's), else the one that came nearest
  replay-01..  a dozen of the rungs before medium, or all if they are fewer, evenly spaced in updates

A record is partly luck. So snapshots.csv does not repeat it: each published policy, in half precision, is
measured in 20 new episodes (of its own seeds, sampled actions): mean and deviation of their returns. `commit`
is that of the training, `versions` are those of the measurement.
"""

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from common import ROOT, exit_status, write
from tqdm import tqdm

REPLAY = 12  # snapshots on the way to medium
EPISODES = 20  # of a measurement
PHASE = 3  # in a measurement's seed; sac.py has 0, 1 and 2

sys.path.append(str(ROOT / "algorithms/collect"))
sac = importlib.import_module("sac")


def read_ladder(folder: Path) -> pd.DataFrame:
    """A row a rung, the lowest first: update, return_mean (its record), environment_steps, resumed, path.

    A rung that metrics.csv does not know yet does not count.
    """
    try:
        table = pd.read_csv(folder / "metrics.csv").rename(columns={"eval/return_mean": "return_mean"})
    except (OSError, ValueError) as error:
        raise sac.UserError(f"{folder} is no run folder of sac.py: {error}") from None
    files = {int(path.stem): path for path in folder.glob("ladder/*.safetensors")}
    table["path"] = table["update"].map(files)
    table = table.dropna(subset="path").reset_index(drop=True)
    if table.empty:
        raise sac.UserError(f"{folder} has no ladder yet: the first evaluation makes its first rung")
    return table[["update", "return_mean", "environment_steps", "resumed", "path"]]


def spread(values: np.ndarray, count: int) -> list[int]:
    """Indices of `count` of the ascending `values`, or of all if they are fewer, as even as they allow."""
    count, chosen = min(count, len(values)), [-1]
    for number, target in enumerate(np.linspace(values[0], values[-1], count) if count else []):
        first, end = chosen[-1] + 1, len(values) - count + number + 1  # enough of them must remain
        chosen.append(first + int(np.abs(values[first:end] - target).argmin()))
    return chosen[1:]


def select(updates: np.ndarray, returns: np.ndarray, level: float | None) -> dict[str, int]:
    """{snapshot: index of its rung}, given the rungs' updates and records in ascending order."""
    level = returns[-1] / 3 if level is None else level
    medium = int(np.argmax(returns >= level) if returns[-1] >= level else np.abs(returns - level).argmin())
    replay = {f"replay-{n:02}": rung for n, rung in enumerate(spread(updates[:medium], REPLAY), 1)}
    return {**replay, "medium": medium, "expert": len(returns) - 1}


def measure(config, tensors: dict[str, torch.Tensor], update: int) -> dict[str, float]:
    """Returns of the sampled policy in episodes that no one has selected it by."""
    environments = sac.make_simulators(config.environment, 10)
    space = environments.single_action_space
    obs_dim = sac.gym.spaces.flatdim(environments.single_observation_space)
    policy = sac.SAC(config, sac.Scaler(np.zeros(obs_dim), np.ones(obs_dim), space.low, space.high))
    policy.actor.load_state_dict(tensors)
    returns = sac.evaluate(policy.explore, environments, EPISODES, (config.seed, update, PHASE))["return"]
    return {"return_mean": returns.mean(), "return_std": returns.std(ddof=0), "episodes": len(returns)}


def publish(folder: Path, info: dict, target: Path, level: float | None) -> None:
    """Replaces the snapshots in `target` and their table."""
    rungs, config = read_ladder(folder), sac.Config(**info["config"])
    chosen = select(rungs["update"].to_numpy(), rungs["return_mean"].to_numpy(), level)
    if (count := len(chosen) - 2) < REPLAY:
        print(f"{folder} has only {count} rungs before medium, so there are only {count} replay snapshots")
    versions = sac.provenance(torch.device("cpu"))["versions"]
    facts = {"commit": info["commit"], "environment": config.environment, "seed": config.seed,
             "config_hash": info["config_hash"],
             "versions": " ".join(f"{name}=={version}" for name, version in sorted(versions.items()))}
    files, rows = {}, []
    for name, index in tqdm(chosen.items(), config.environment, unit="snapshot", disable=None):
        rung = rungs.iloc[index]
        tensors, update = safetensors.torch.load_file(rung["path"]), int(rung["update"])
        files[f"{name}.safetensors"] = safetensors.torch.save(tensors)
        numbers = {"environment_steps": int(rung["environment_steps"]), "updates": update}
        numbers |= {"resumed": int(rung["resumed"])}
        rows.append({"snapshot": name, **measure(config, tensors, update), **numbers, **facts})
    table = pd.DataFrame(rows)
    for path in {*target.glob("*.safetensors")} - {target / name for name in files}:
        path.unlink()  # of a time when the ladder had more rungs before medium
    size, files["snapshots.csv"] = sum(map(len, files.values())), table.to_csv(index=False).encode()
    for name, content in files.items():
        write(target / name, content)
    print(table.iloc[:, : list(table).index("resumed")].to_string(index=False))
    print(f"{target}: {len(table)} snapshots, {size / 1e6:.1f} MB")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    argument = parser.add_argument
    argument("run", type=Path, help="run folder of algorithms/collect/sac.py")
    argument("--medium", type=float, metavar="RETURN", help="that medium reaches (a third of expert's)")
    argument("--output_dir", type=Path, default=ROOT / "results/behavior", help="where <name>/ goes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    return exit_status("behavior.py", publish_run, options, errors=(sac.UserError,))


def publish_run(options: argparse.Namespace) -> None:
    if not (options.run / "run.json").is_file():
        raise sac.UserError(f"{options.run} is no folder of a run")
    info = sac.read_saved(options.run / "run.json")
    if info["config"].keys() != {field.name for field in dataclasses.fields(sac.Config)}:
        raise sac.UserError(f"{options.run} is no run of algorithms/collect/sac.py")
    target = options.output_dir / info["config"]["environment"].partition("-")[0].lower()
    publish(options.run, info, target, options.medium)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
