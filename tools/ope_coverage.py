"""How often intervals of off-policy estimates cover the truth: ICU-Sepsis, whose values are known exactly.

  python tools/ope_coverage.py [--logs 200] [--episodes 1000] [--resamples 200] [--out FILE]

Each log has so many episodes of the clinicians' policy, with its propensities. From it every estimator of
algorithms/evaluate gives the value of four policies: the clinicians', uniform doses, the best by a model of
that very log (`learned`), and the optimum. A row of the table: the mean exact value, bias, root mean squared
error and coverage of the 95 % intervals over the logs, the median effective sample size and mean weight.

Critics are tables here, not networks: the exact Q of the model that half of a log's episodes make
(transitions counted; a dose never seen in a state leads where that state's doses led on average). All
estimators take the other half. FQE's interval is over first states alone, with the critic kept: what it
covers is what such an interval is worth. An optimum that takes doses no log shows is beyond any estimator.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


def load(path: str):
    """A script of algorithms/ as a module."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / f"algorithms/{path}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sepsis, sampling = load("collect/sepsis"), load("evaluate/importance_sampling")
robust = load("evaluate/doubly_robust")


def fit_model(log: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Counted dynamics: P [713, 25, 713] among the living, r [713, 25] the chance to survive at once."""
    mask = steps_of(log)
    states, actions = log["states"][:, :-1][mask], log["actions"][mask]
    counts = np.zeros((sepsis.DEATH, sepsis.ACTIONS, sepsis.DEATH + 2), np.float32)
    np.add.at(counts, (states, actions, log["states"][:, 1:][mask]), 1)
    of_state = counts.sum(1, keepdims=True)
    counts = np.where(counts.sum(2, keepdims=True) > 0, counts, of_state)  # never seen: the mean
    chances = counts / np.maximum(counts.sum(2, keepdims=True), 1)  # states never seen lead nowhere: worth 0
    return chances[..., : sepsis.DEATH], chances[..., sepsis.SURVIVAL]


def model_values(model: tuple, policy: np.ndarray) -> np.ndarray:
    """Q [716, 25] of the policy in the model; 0 beyond an end."""
    chances, survival = model
    step = np.matmul(policy[: sepsis.DEATH, None].astype(np.float32), chances)[:, 0].astype(np.float64)
    reward = (policy[: sepsis.DEATH] * survival).sum(1)
    values = np.linalg.solve((1 + 1e-6) * np.eye(sepsis.DEATH) - step, reward)
    q = np.zeros((sepsis.STATES, sepsis.ACTIONS))
    q[: sepsis.DEATH] = survival + chances @ values.astype(np.float32)
    return q


def learn(model: tuple) -> np.ndarray:
    """The best policy of the model, by three rounds of policy iteration."""
    policy = sepsis.policy_table("random")
    for _ in range(3):
        policy = np.eye(sepsis.ACTIONS)[model_values(model, policy).argmax(1)]
    return policy


def steps_of(log: dict[str, np.ndarray]) -> np.ndarray:
    """Which of [N, T] are steps of an episode."""
    return np.arange(log["actions"].shape[1]) < log["lengths"][:, None]


def rows_of(log: dict[str, np.ndarray], rows) -> dict[str, np.ndarray]:
    return {name: column[rows] for name, column in log.items()}


def estimate(log: dict, policy: np.ndarray, q: np.ndarray, resamples: int, seed: int) -> tuple[dict, dict]:
    """{estimator: (value, low, high)} of a policy by a log and Q [716, 25]; facts on its weights."""
    mask, states = steps_of(log), log["states"]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratios = np.log(policy[states[:, :-1], log["actions"]]) - np.log(log["propensities"])
    log_ratios = np.where(mask, log_ratios, 0.0)
    v = (policy * q).sum(1)
    ends = np.arange(mask.shape[1]) == log["lengths"][:, None] - 1
    data = {"rewards": log["rewards"], "terminations": ends, "mask": mask}
    errors = robust.temporal_errors(data, q[states[:, :-1], log["actions"]], v[states[:, 1:]], 1.0)
    found = sampling.estimators(log_ratios, log["rewards"], 1.0)
    found |= robust.corrected(log_ratios, v[states[:, 0]], errors, 1.0)
    weights = sampling.cumulative_weights(log_ratios)[:, -1]
    facts = {"ess": sampling.effective_size(weights), "mean_weight": weights.mean()}
    return {name: sampling.bootstrap(*pair, resamples, seed) for name, pair in found.items()}, facts


def study(logs: int, episodes: int, resamples: int) -> pd.DataFrame:
    """A row for each log, target policy and estimator."""
    doctors, rows = sepsis.policy_table("clinician"), []
    fixed = {"clinician": doctors, "uniform": sepsis.policy_table("random")}
    fixed["optimum"] = sepsis.policy_table("optimum")
    truths = {name: sepsis.value(policy) for name, policy in fixed.items()}
    for number in tqdm(range(logs), disable=None):
        log = sepsis.simulate(doctors, episodes, np.random.default_rng((0, number)))
        half = np.arange(episodes) < episodes // 2
        model, kept = fit_model(rows_of(log, half)), rows_of(log, ~half)
        learned = learn(model)
        targets = fixed | {"learned": learned}
        truths["learned"] = sepsis.value(learned)
        for name, policy in targets.items():
            found, facts = estimate(kept, policy, model_values(model, policy), resamples, number)
            for estimator, (value, low, high) in found.items():
                row = {"log": number, "policy": name, "estimator": estimator, "truth": truths[name]}
                rows.append(row | {"value": value, "low": low, "high": high} | facts)
    return pd.DataFrame(rows)


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Bias, root mean squared error and coverage over the logs; an unknown value (nan) covers nothing."""
    error = rows["value"] - rows["truth"]
    covers = (rows["low"] <= rows["truth"]) & (rows["truth"] <= rows["high"])
    rows = rows.assign(bias=error, square=error**2, coverage=covers.astype(float), logs=1)
    table = rows.groupby(["policy", "estimator"], sort=False).agg(
        logs=("logs", "sum"),
        truth=("truth", "mean"),
        bias=("bias", "mean"),
        rmse=("square", "mean"),
        coverage=("coverage", "mean"),
        ess=("ess", "median"),
        mean_weight=("mean_weight", "median"),
    )
    return table.assign(rmse=table["rmse"] ** 0.5).reset_index()


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--logs", type=int, default=200)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "tools/ope_coverage.csv")
    arguments = parser.parse_args()
    start = time.perf_counter()
    table = summarize(study(arguments.logs, arguments.episodes, arguments.resamples))
    table.to_csv(arguments.out, index=False, float_format="%.4f")
    print(table.to_string(index=False, float_format="{:.4f}".format))
    print(f"{time.perf_counter() - start:.0f} s; written to {arguments.out}")


if __name__ == "__main__":
    main()
