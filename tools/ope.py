"""Estimates of what a policy is worth, held against the truth. Each part writes results/ope/<part>.csv.

  python tools/ope.py coverage [--logs 200] [--episodes 1000] [--resamples 200]
  python tools/ope.py rankings [--logs 50] [--episodes 1000]
  python tools/ope.py learners [--runs results/runs] [--picture docs/img/blow-up.png]
  python tools/ope.py clicks [--folder FOLDER]
  python tools/ope.py locomotion [--updates 5000]

coverage: ICU-Sepsis, where values are known exactly. Each log has so many episodes of the clinicians' policy,
with its propensities. From it every estimator of algorithms/evaluate gives the value of four policies: the
clinicians', uniform doses, the best by a model of that very log (`learned`), and the optimum. A row of the
table: the mean exact value, bias, root mean squared error and coverage of the 95 % intervals over the logs,
the median effective sample size and mean weight.

Critics are tables there, not networks: the exact Q of the model that half of a log's episodes make
(transitions counted; a dose never seen in a state leads where that state's doses led on average). All
estimators take the other half. FQE's interval is over first states alone, with the critic kept: what it
covers is what such an interval is worth. An optimum that takes doses no log shows is beyond any estimator.

rankings: the same estimators and logs, twelve policies: how well do they order them (Spearman's correlation
with the exact values), and what is lost by taking the first (regret@1: the best value less the value of the
one that ranks first). A value that is unknown ranks last.

learners: the exact value of what every finished run of algorithms/discrete on a sepsis log has learnt (for
dt, which remembers, the mean of its final evaluation), the largest mean Q in its metrics, and a picture of
dqn's Q beside cql's and iql's. configs/benchmark/sepsis.yaml has runs.

clicks: a fashion shop's recommendations, 10,000 rows by uniform chance and 10,000 by Thompson sampling (BTS)
for each of three campaigns (Saito et al., 2020, arXiv:2008.07146), in the package obp: an item at a place, a
click or none, the propensity. The click rate of each policy from the other's log, beside its own log's. BTS
learnt all the week, so what is asked of the uniform log is its mean policy: how often it showed an item at
that place.

locomotion: Hopper and HalfCheetah, vectors of actions. The log is a few episodes of each of the twelve
policies in medium-replay; the truth is the mean discounted return of each policy's other episodes, or for
medium and expert, which are not in the log, of new ones. Policies draw their actions and their densities are
known exactly. FQE, DR and WDR are those of doubly_robust.py.
"""

import argparse
import importlib.util
import json
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib
import minari
import numpy as np
import pandas as pd
import scipy
import torch
from common import ROOT, exit_status, write
from tqdm import tqdm


def load(path: str):
    """A script of algorithms/ as a module."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / f"algorithms/{path}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sepsis, rollouts = load("collect/sepsis"), load("collect/rollouts")
sampling, robust = load("evaluate/importance_sampling"), load("evaluate/doubly_robust")


# ---------------------------------- Sepsis: coverage of the exact values ----------------------------------


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


def estimate(log: dict, policy: np.ndarray, q: np.ndarray) -> tuple[dict, dict]:
    """{estimator: (terms, weights)} of a policy by a log and Q [716, 25]; facts on its weights."""
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
    return found, weigh(log_ratios)


def weigh(log_ratios: np.ndarray) -> dict[str, float]:
    """Effective sample size and mean of the episodes' weights."""
    weights = sampling.cumulative_weights(log_ratios)[:, -1]
    return {"ess": sampling.effective_size(weights), "mean_weight": weights.mean()}


def intervals(found: dict, resamples: int, seed: int) -> list[dict]:
    """A row for each estimator: value, low and high."""
    rows = []
    for estimator, pair in found.items():
        value, low, high = sampling.bootstrap(*pair, resamples, seed)
        rows.append({"estimator": estimator, "value": value, "low": low, "high": high})
    return rows


def draw_log(seed: tuple, episodes: int) -> tuple[tuple, dict]:
    """A log of the clinicians' policy: the model of one half of its episodes, and the other half."""
    log = sepsis.simulate(sepsis.policy_table("clinician"), episodes, np.random.default_rng(seed))
    half = np.arange(episodes) < episodes // 2
    return fit_model(rows_of(log, half)), rows_of(log, ~half)


def study(logs: int, episodes: int, resamples: int) -> pd.DataFrame:
    """A row for each log, target policy and estimator."""
    fixed = {"clinician": sepsis.policy_table("clinician"), "uniform": sepsis.policy_table("random")}
    fixed["optimum"] = sepsis.policy_table("optimum")
    truths, rows = {name: sepsis.value(policy) for name, policy in fixed.items()}, []
    for number in tqdm(range(logs), disable=None):
        model, kept = draw_log((0, number), episodes)
        learned = learn(model)
        truths["learned"] = sepsis.value(learned)
        for name, policy in (fixed | {"learned": learned}).items():
            found, facts = estimate(kept, policy, model_values(model, policy))
            known = {"log": number, "policy": name, "truth": truths[name], **facts}
            rows += [known | row for row in intervals(found, resamples, number)]
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


# --------------------------------- Sepsis: rankings, and learners by value ---------------------------------


def find_worst() -> np.ndarray:
    """The policy [716, 25] of the lowest value, by policy iteration as `sepsis.find_optimum`."""
    policy = sepsis.policy_table("random")
    for _ in range(10):
        doses = sepsis.action_values(policy).argmin(1)
        policy = np.eye(sepsis.ACTIONS)[np.append(doses, [0, 0, 0])]
    return policy


def candidates() -> dict[str, np.ndarray]:
    """Twelve policies [716, 25]: two known ones, steps from one to the best and the worst, four learned."""
    doctors = sepsis.policy_table("clinician")
    found = {"clinician": doctors, "uniform": sepsis.policy_table("random")}
    for name, end in (("optimum", sepsis.policy_table("optimum")), ("worst", find_worst())):
        for share in (0.25, 0.5, 1.0):
            found[f"{name} {share}"] = (1 - share) * doctors + share * end
    found["learned 125"], found["learned 500"], found["learned 2000"], found["learned 8000"] = (
        learn(draw_log((1, episodes), 2 * episodes)[0]) for episodes in (125, 500, 2000, 8000)
    )
    return found


def compare(logs: int, episodes: int) -> pd.DataFrame:
    """A row for each log, candidate and estimator: value and truth."""
    policies, rows = candidates(), []
    truths = {name: sepsis.value(policy) for name, policy in policies.items()}
    for number in tqdm(range(logs), disable=None):
        model, kept = draw_log((2, number), episodes)
        once = np.ones((1, len(kept["lengths"])))
        for name, policy in policies.items():
            found, _ = estimate(kept, policy, model_values(model, policy))
            known = {"log": number, "policy": name, "truth": truths[name]}
            for estimator, pair in found.items():
                rows.append(known | {"estimator": estimator, "value": sampling.combine(*pair, once)[0]})
    return pd.DataFrame(rows)


def judge(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each estimator, over the logs: mean rank correlation, mean regret@1, how often the best is first."""
    found = []
    for (estimator, _), part in rows.groupby(["estimator", "log"], sort=False):
        values = part["value"].fillna(-np.inf)  # unknown: last
        best, chosen = part["truth"].max(), part["truth"].loc[values.idxmax()]
        correlation = scipy.stats.spearmanr(values.rank(), part["truth"]).statistic
        found.append((estimator, correlation, best - chosen, chosen == best, part["value"].isna().mean()))
    columns = ["estimator", "rank_correlation", "regret_at_1", "best_first", "unknown"]
    table = pd.DataFrame(found, columns=columns)
    return table.groupby("estimator", sort=False).mean().assign(logs=rows["log"].nunique()).reset_index()


def exact_values(runs: Path) -> pd.DataFrame:
    """A row for each finished run on a sepsis log: the learned policy's exact value, and its Q.

    That of dt, which remembers and so has no table of choices, is the mean of its final evaluation.
    """
    doctors, best = (sepsis.value(sepsis.policy_table(name)) for name in ("clinician", "optimum"))
    rows = []
    for file in sorted(runs.glob("discrete/*/reef/sepsis/*/*/seed-*/run.json")):
        info = json.loads(file.read_text())
        if info["status"] != "finished":
            continue
        algorithm, config = file.relative_to(runs).parts[1], info["config"]
        if algorithm == "dt":
            value = info["return_mean"]
        else:
            policy = sepsis.policy_table("random")  # for the three states that are ends
            learned = robust.load_policy(str(file.parent), sepsis.ACTIONS)
            policy[: sepsis.DEATH] = learned(np.arange(sepsis.DEATH))
            value = sepsis.value(policy)
        row = {"algorithm": algorithm}
        row |= {name: config[name] for name in ("dataset", "variant", "seed", "updates")}
        row |= {"value": value, "exact": algorithm != "dt", "clinicians": doctors, "optimum": best}
        row["score"] = 100 * (value - doctors) / (best - doctors)
        metrics = pd.read_csv(file.parent / "metrics.csv")
        q_mean = metrics.get("critic/q_mean", pd.Series([np.nan]))
        rows.append(row | {"largest_q_mean": q_mean.max(), "commit": info["commit"]})
    if not rows:
        raise sepsis.UserError(f"no finished run in {runs}: tools/benchmark.py configs/benchmark/sepsis.yaml")
    return pd.DataFrame(rows)


def draw(runs: Path, picture: Path) -> None:
    """dqn's mean Q beside cql's and iql's, a line for each run, and what no return exceeds."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for color, name in (("tab:red", "dqn"), ("tab:blue", "cql"), ("tab:green", "iql")):
        label = name
        for file in sorted(runs.glob(f"discrete/{name}/reef/sepsis/*/default/seed-*/metrics.csv")):
            metrics = pd.read_csv(file).dropna(subset="critic/q_mean")
            axes.plot(metrics["update"], metrics["critic/q_mean"], color=color, label=label, lw=1)
            label = None  # once in the legend
    axes.axhline(1, color="black", lw=1, ls="--", label="the most a return can be")
    axes.set(xlabel="updates", ylabel="mean Q of the log's doses", yscale="log")
    axes.legend()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


# ------------------------------------------ Clicks of a real shop ------------------------------------------


def find_clicks() -> Path:
    """The folder of the tables in the package obp, which is not imported: it needs much."""
    package = importlib.util.find_spec("obp")
    if package is None:
        raise sepsis.UserError("the logs are in the package obp, which is missing: pip install --no-deps obp")
    return Path(package.origin).parent / "dataset/obd"


def read_clicks(file: Path) -> pd.DataFrame:
    """A row for each recommendation: item from 0, place from 1, click, propensity."""
    names = {"item_id": "item", "position": "place", "propensity_score": "propensity"}
    return pd.read_csv(file, usecols=[*names, "click"]).rename(columns=names)


def click_rates(uniform: pd.DataFrame, bts: pd.DataFrame, resamples: int = 1000) -> pd.DataFrame:
    """The click rate of each of two policies from the other's log, beside that of its own log."""
    items = int(max(uniform["item"].max(), bts["item"].max())) + 1
    shown = bts.groupby(["place", "item"]).size() / bts.groupby("place").size()  # the mean policy of BTS
    chances = shown.reindex(pd.MultiIndex.from_frame(uniform[["place", "item"]]), fill_value=0.0)
    cases = {
        "uniform": (bts, np.full(len(bts), 1 / items), uniform),
        "bts": (uniform, chances.to_numpy(), bts),
    }
    rows = []
    for name, (log, probabilities, own) in cases.items():
        with np.errstate(divide="ignore"):  # an item that BTS never shows at a place: log 0
            log_ratios = np.log(probabilities) - np.log(log["propensity"].to_numpy())
        log_ratios = log_ratios[:, None]  # an episode is one step
        found = sampling.estimators(log_ratios, log[["click"]].to_numpy(float), 1.0)
        clicks, even = own[["click"]].to_numpy(float), np.ones((len(own), 1))
        own_rate, own_low, own_high = sampling.bootstrap(clicks, even, resamples, 0)
        known = {"policy": name, "rows": len(log), **weigh(log_ratios)}
        known |= {"own_rate": own_rate, "own_low": own_low, "own_high": own_high}
        once = {estimator: found[estimator] for estimator in ("IS", "WIS")}  # per decision is the same
        rows += [known | row for row in intervals(once, resamples, 0)]
    return pd.DataFrame(rows)


def study_clicks(folder: Path) -> pd.DataFrame:
    """`click_rates` of the three campaigns."""
    tables = []
    for campaign in ("men", "women", "all"):
        logs = [read_clicks(folder / policy / campaign / f"{campaign}.csv") for policy in ("random", "bts")]
        tables.append(click_rates(*logs).assign(campaign=campaign))
    return pd.concat(tables)


# -------------------------------------- Locomotion: vectors of actions --------------------------------------

ROBOTS = {"hopper": ("Hopper-v5", 6), "halfcheetah": ("HalfCheetah-v5", 3)}  # episodes of a policy in the log
TARGETS = [*(f"replay-{n:02}" for n in (2, 4, 6, 8, 10, 12)), "medium", "expert"]


def discounted(rewards: np.ndarray, discount: float) -> float:
    return float((discount ** np.arange(len(rewards)) * rewards).sum())


@torch.no_grad()
def sample_actions(actor, bounds: np.ndarray, observations: np.ndarray) -> np.ndarray:
    """Actions [M, act_dim] of a stored policy, in the environment's units; the same draws each time."""
    torch.manual_seed(0)
    actions, _ = actor.sample(torch.as_tensor(observations, dtype=torch.float64))
    return bounds[0] + (actions.numpy() + 1) / 2 * (bounds[1] - bounds[0])


@torch.no_grad()
def log_densities(actor, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Log densities [M] of actions in [-1, 1], before their tanh: what that adds cancels in a ratio."""
    mean, log_std = actor(torch.as_tensor(observations, dtype=torch.float64))
    x = torch.atanh(torch.as_tensor(actions, dtype=torch.float64).clamp(-1 + 1e-6, 1 - 1e-6))
    return (-0.5 * ((x - mean) / log_std.exp()).square() - log_std).sum(-1).numpy()


def assign(counts: dict[str, int], share: int) -> tuple[np.ndarray, np.ndarray]:
    """Whose each episode is, and whether it is in the log: the first `share` of each policy are."""
    owners = np.repeat([*counts], [*counts.values()])
    return owners, np.concatenate([np.arange(count) for count in counts.values()]) < share


def read_locomotion(robot: str, discount: float) -> tuple:
    """The dataset, the log's episodes side by side with `log_b`, the stored actors, the true values."""
    environment, share = ROBOTS[robot]
    dataset = robust.load_dataset(f"reef/{robot}/medium-replay-v1")
    counts = {name: facts["episodes"] for name, facts in dataset.storage.metadata["policies"].items()}
    owners, chosen = assign(counts, share)
    log = robust.side_by_side(minari.MinariDataset(dataset.storage, np.flatnonzero(chosen)))

    env, folder = rollouts.open_environment(environment), ROOT / "results/behavior" / robot
    names = sorted({*counts, *TARGETS})
    actors = {name: rollouts.load_actor(folder / f"{name}.safetensors", env) for name in names}
    log["log_b"] = np.zeros(log["mask"].shape)
    for owner in counts:
        steps = log["mask"] & (owners[chosen] == owner)[:, None]
        seen = log["observations"][:, :-1][steps]
        log["log_b"][steps] = log_densities(actors[owner], seen, log["actions"][steps])

    returns = {name: [] for name in names}
    others = minari.MinariDataset(dataset.storage, np.flatnonzero(~chosen))
    for owner, episode in zip(owners[~chosen], others.iterate_episodes()):
        returns[owner].append(discounted(episode.rewards, discount))
    for name in ("medium", "expert"):
        seed = np.random.SeedSequence(0)
        for episode in rollouts.play(environment, folder / f"{name}.safetensors", seed, 0, 10):
            returns[name].append(discounted(episode.rewards, discount))
    return dataset, log, actors, {name: float(np.mean(entries)) for name, entries in returns.items()}


def study_locomotion(robot: str, updates: int) -> pd.DataFrame:
    """A row for each target policy and estimator."""
    config = robust.Config(discount=0.99, tau=0.1, critic_lr=1e-3, updates=updates)
    dataset, log, actors, truths = read_locomotion(robot, config.discount)
    fitted, kept = robust.halves(log, 0)
    mask, rows = kept["mask"], []
    before, after = kept["observations"][:, :-1][mask], kept["observations"][:, 1:][mask]
    for name in TARGETS:
        policy = partial(sample_actions, actors[name], log["bounds"])
        critics, _ = robust.fit_critics(config, dataset, fitted, policy, name)
        given, next_given = (robust.ask(policy, name, seen, dataset, kept) for seen in (before, after))
        q, v, next_v, log_ratios = (np.zeros(mask.shape) for _ in range(4))
        q[mask] = robust.values_at(critics, before, kept["actions"][mask], of_actions=True)
        v[mask] = robust.values_at(critics, before, given, of_actions=False)
        next_v[mask] = robust.values_at(critics, after, next_given, of_actions=False)
        log_pi = log_densities(actors[name], before, kept["actions"][mask])
        log_ratios[mask] = log_pi - kept["log_b"][mask]
        errors = robust.temporal_errors(kept, q, next_v, config.discount)
        found = robust.corrected(log_ratios, v[:, 0], errors, config.discount)
        known = {"robot": robot, "policy": name, "truth": truths[name], **weigh(log_ratios)}
        known |= {"episodes": len(log["mask"]), "steps": int(log["mask"].sum())}
        rows += [known | row for row in intervals(found, 200, 0)]
    return pd.DataFrame(rows)


# -------------------------------------------- The command line --------------------------------------------


def write_table(table: pd.DataFrame, out: Path) -> None:
    """The table as CSV, at once or not at all; and printed."""
    write(out, table.to_csv(index=False, float_format="%.6g"))
    print(table.to_string(index=False, float_format="{:.4f}".format))
    print(f"written to {out}")


def run(options: argparse.Namespace) -> None:
    """One part of the study."""
    out = options.out / f"{options.part}.csv"
    if options.part == "coverage":
        write_table(summarize(study(options.logs, options.episodes, options.resamples)), out)
    elif options.part == "rankings":
        write_table(judge(compare(options.logs, options.episodes)), out)
    elif options.part == "learners":
        write_table(exact_values(options.runs), out)
        if options.picture:
            draw(options.runs, options.picture)
    elif options.part == "clicks":
        write_table(study_clicks(options.folder or find_clicks()), out)
    else:
        write_table(pd.concat([study_locomotion(robot, options.updates) for robot in ROBOTS]), out)


def main() -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parts = parser.add_subparsers(dest="part", required=True)
    coverage, rankings, learners, clicks, locomotion = (
        parts.add_parser(name) for name in ("coverage", "rankings", "learners", "clicks", "locomotion")
    )
    coverage.add_argument("--logs", type=int, default=200)
    rankings.add_argument("--logs", type=int, default=50)
    for part in (coverage, rankings):
        part.add_argument("--episodes", type=int, default=1000, help="of a log")
    coverage.add_argument("--resamples", type=int, default=200, help="of a log's episodes, for an interval")
    learners.add_argument("--runs", type=Path, default=ROOT / "results/runs")
    learners.add_argument("--picture", type=Path, help="of the mean Q of dqn, cql and iql")
    clicks.add_argument("--folder", type=Path, help="with random/ and bts/; the package's own")
    locomotion.add_argument("--updates", type=int, default=5000, help="of each policy's critics")
    for part in parts.choices.values():
        part.add_argument("--out", type=Path, default=ROOT / "results/ope", help="where <part>.csv goes")
    options, start = parser.parse_args(), time.perf_counter()
    torch.set_num_threads(1)
    errors = sepsis.UserError, rollouts.UserError, robust.UserError
    status = exit_status("ope.py", run, options, errors=errors)
    print(f"{time.perf_counter() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
