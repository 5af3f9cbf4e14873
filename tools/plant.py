"""A small plant whose truth is known, for docs/walkthrough.md: it writes a log and plays any exported policy.

  python tools/plant.py log plant.csv                      a log as plants have it, by the operator
  python tools/plant.py truth operator policy.onnx         what policies are really worth: they run the plant
  python tools/plant.py live ours/live-v0 policy.onnx --decisions decisions.csv
                                                           new batches by lot, with the share it allows

A batch heats itself while it converts. Every 15 minutes somebody sets the cooling: a valve (shut, half, open)
and a fan (off, on). Hot batches convert faster, above 85 degrees they spoil, above 100 they are lost.

  (1)  k = 0.02 + 0.04 exp(-((T - 80) / 12)^2)             converted in a step; T: temperature
  (2)  T <- T + 120 k + 2 - (0.02 + 0.12 v + 0.04 f) (T - W) + noise     v: valve 0, 1/2, 1; f: fan 0, 1
  (3)  r = k / (1 + exp((T - 88) / 2)) - 0.004 - 0.006 v - 0.006 f       W: water; sold, less costs
  (4)  a batch ends when 95 % are converted, or at T > 100

The operator sees what the log has, so nothing is confounded: the valve follows the temperature, with a slip
now and then; at night the fan is always on, by day only when it is hot. The log has what logs have: the
newest row comes first, cells are empty, and for some minutes nothing was written.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import minari
import numpy as np
import onnxruntime
import pandas as pd
from common import UserError, exit_status
from gymnasium.spaces import Box, Discrete
from minari.data_collector import EpisodeBuffer

VALVES, FANS = ["shut", "half", "open"], ["off", "on"]
SLIPS = 0.3  # share of steps in which the operator's valve is any
FAN_SLIPS = 0.15  # the same of the fan
LOST_CELLS = {"temperature": 0.002, "water": 0.001}
GAPS = 0.02  # share of batches of which three rows are lost
STEPS = 60  # more than any batch takes: (1) is at least 0.02


# ----------------------------------------------- The process -----------------------------------------------


def operator(seen: dict[str, np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Valve and fan [B], as numbers, for what is seen now."""
    hot, number = seen["temperature"], len(seen["temperature"])
    valve = np.digitize(hot, [76, 84])
    fan = (seen["shift"] == "night") | (hot > 86)
    valve = np.where(rng.random(number) < SLIPS, rng.integers(3, size=number), valve)
    fan = np.where(rng.random(number) < FAN_SLIPS, rng.integers(2, size=number), fan)
    return valve, fan.astype(int)


def run_batches(policy, batches: int, rng: np.random.Generator, first: int = 0) -> pd.DataFrame:
    """A row a step: what was seen, what was done, the reward, the end. `policy` as `operator`."""
    number = first + np.arange(batches)
    starts = (number // 2 * 13 + number % 2 * 6 + rng.random(batches)) * 60  # minutes
    temperature, conversion = rng.normal(72, 5, batches), np.zeros(batches)
    source = rng.normal(15, 2, batches)
    running, rows = np.full(batches, True), []
    for step in range(STEPS):
        minute = starts + 15 * step
        hour = minute / 60 % 24
        water = source + 4 * np.sin((hour - 9) * np.pi / 12)
        shift = np.where((hour < 6) | (hour >= 22), "night", "day")
        seen = {"temperature": temperature, "water": water, "conversion": conversion, "shift": shift}
        valve, fan = policy(seen, rng)
        v, f = valve / 2, fan
        k = 0.02 + 0.04 * np.exp(-(((temperature - 80) / 12) ** 2))  # (1)
        reward = k / (1 + np.exp((temperature - 88) / 2)) - 0.004 - 0.006 * v - 0.006 * f  # (3)
        cooling = (0.02 + 0.12 * v + 0.04 * f) * (temperature - water)
        temperature = temperature + 120 * k + 2 - cooling + rng.normal(0, 0.8, batches)  # (2)
        conversion = conversion + k
        ended = (conversion >= 0.95) | (temperature > 100)  # (4)
        done = {"valve": np.take(VALVES, valve), "fan": np.take(FANS, fan)}
        row = {"batch": number, "time": minute.round(), **seen, **done, "margin": reward, "finished": ended}
        row = pd.DataFrame(row)
        rows.append(row[running])
        running = running & ~ended
        if not running.any():
            break
    return pd.concat(rows)


# ----------------------------------------------- Its policies ----------------------------------------------


class Exported:
    """A policy.onnx of tools/export.py as a policy of the plant: by the names that are in the file."""

    def __init__(self, file: str):
        if not Path(file).is_file():
            raise UserError(f"{file}: no such file; tools/export.py writes it")
        self.session = onnxruntime.InferenceSession(file)
        known = self.session.get_modelmeta().custom_metadata_map
        self.columns = json.loads(known["observation_names"])
        self.choices = [
            dict(part.split("=") for part in name.split(", ")) for name in json.loads(known["action_names"])
        ]

    def observe(self, seen) -> np.ndarray:
        """What is seen as the file wants it [B, obs_dim]; an entry of 0 and 1 for each word."""
        entries = []
        for column in self.columns:
            name, _, word = column.partition("=")
            entries.append(seen[name] == word if word else seen[name])
        return np.stack(entries, axis=1).astype(np.float32)

    def __call__(self, seen, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        (probabilities,) = self.session.run(["probabilities"], {"observations": self.observe(seen)})
        running = probabilities.cumsum(1)
        drawn = (running < rng.random((len(running), 1)) * running[:, -1:]).sum(1)
        valves = np.array([VALVES.index(choice["valve"]) for choice in self.choices])
        fans = np.array([FANS.index(choice["fan"]) for choice in self.choices])
        return valves[drawn], fans[drawn]

    def numbers(self, rows: pd.DataFrame) -> list[int]:
        """The choices of a batch by their numbers."""
        return [self.choices.index(choice) for choice in rows[["valve", "fan"]].to_dict("records")]


# --------------------------------------------- What is written ---------------------------------------------


def write_log(file: Path, batches: int, seed: int) -> None:
    """The operator's batches, the newest row first, without what got lost."""
    rng = np.random.default_rng(seed)
    table = run_batches(operator, batches, rng).sort_values(["time", "batch"], ignore_index=True)
    for column, share in LOST_CELLS.items():
        table.loc[rng.random(len(table)) < share, column] = np.nan
    step = table.groupby("batch").cumcount()
    hit = table["batch"].isin(np.flatnonzero(rng.random(batches) < GAPS))
    table = table[~(hit & step.between(8, 10))].copy()
    table["time"] = pd.Timestamp("2025-01-06") + pd.to_timedelta(table["time"], unit="min")
    table["finished"] = table["finished"].astype(int)
    numbers = table.select_dtypes("float").columns
    table[numbers] = table[numbers].round(4)
    table[::-1].to_csv(file, index=False)
    print(f"{file}: {batches:,} batches, {len(table):,} rows")


def tell_truth(names: list[str], batches: int, seed: int) -> None:
    """The mean return of each policy over new batches, with two standard errors."""
    for name in names:
        policy = operator if name == "operator" else Exported(name)
        rows = run_batches(policy, batches, np.random.default_rng((seed, 1)))
        returns = rows.groupby("batch")["margin"].sum()
        error = 2 * returns.std() / np.sqrt(batches)
        print(f"{name}: {returns.mean():.4f} +- {error:.4f}, from {returns.min():.2f} to {returns.max():.2f}")


def go_live(dataset: str, file: str, decisions: Path, batches: int, seed: int) -> None:
    """New batches, each by lot the policy's or the operator's, added to a Minari dataset for shadow.py."""
    share = float(pd.read_csv(decisions)["next_share"].iloc[-1])
    if not share:
        raise UserError(f"{decisions} allows no share")
    policy = Exported(file)
    warnings.filterwarnings("ignore", category=UserWarning, module="minari")  # no author, no environment
    known = dataset in minari.list_local_datasets()
    done = minari.load_dataset(dataset).total_episodes if known else 0
    rng = np.random.default_rng((seed, 2, done))
    canary = rng.random(batches) < share

    def either(seen, rng):
        own, theirs = policy(seen, rng), operator(seen, rng)
        return tuple(np.where(canary, mine, other) for mine, other in zip(own, theirs))

    buffers = []
    for number, rows in run_batches(either, batches, rng, first=100_000 + done).groupby("batch"):
        observations = policy.observe({name: rows[name].to_numpy() for name in rows})
        drawn = {"canary": float(canary[number - 100_000 - done]), "share": share}
        buffers.append(
            EpisodeBuffer(
                observations=np.concatenate([observations, observations[-1:]]),
                actions=np.array(policy.numbers(rows)),
                rewards=rows["margin"].to_numpy(),
                terminations=rows["finished"].to_numpy(),
                truncations=np.zeros(len(rows), bool),
                infos={name: np.full(len(rows) + 1, value) for name, value in drawn.items()},
            )
        )
    if known:
        minari.load_dataset(dataset).update_dataset_from_buffer(buffers)
    else:
        seen = Box(-np.inf, np.inf, (len(policy.columns),), np.float32)
        spaces = {"observation_space": seen, "action_space": Discrete(len(policy.choices))}
        minari.create_dataset_from_buffers(dataset, buffers, **spaces)
    print(f"{dataset}: {batches:,} batches more, {canary.sum():,} of them the policy's (share {share:g})")


def run(options: argparse.Namespace) -> None:
    if options.part == "log":
        write_log(options.file, options.batches, options.seed)
    elif options.part == "truth":
        tell_truth(options.policies, options.batches, options.seed)
    else:
        go_live(options.dataset, options.policy, options.decisions, options.batches, options.seed)


def main(arguments: list[str]) -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parts = parser.add_subparsers(dest="part", required=True)
    log, truth, live = (parts.add_parser(name) for name in ("log", "truth", "live"))
    log.add_argument("file", type=Path)
    truth.add_argument("policies", nargs="+", help="operator, or an .onnx of tools/export.py")
    live.add_argument("dataset", help="Minari id")
    live.add_argument("policy", help="an .onnx of tools/export.py")
    live.add_argument("--decisions", type=Path, required=True, help="shadow.py's decisions.csv")
    for part, batches in ((log, 6000), (truth, 2000), (live, 500)):
        part.add_argument("--batches", type=int, default=batches)
        part.add_argument("--seed", type=int, default=0)
    return exit_status("plant.py", run, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
