"""Deployment in steps, tried where the truth is known: four policies, ICU-Sepsis, 20 courses of each.

  python tools/shadow_study.py [--seeds 20] [--out results/shadow] [--picture docs/img/shadow.png]

A course is algorithms/evaluate/shadow.py's `Deployment` with its default rules. It watches a log of 5,000
episodes of the clinicians' (the first 1,000 make the critic), and then has new episodes, each by lot the
policy's or the clinicians', until it is stopped or handed over. The policies differ only in what they do with
the clinicians' doses (those that clinicians give with at least 1 %), so that all look alike beside a log:

  good        doses more often, the better they are           (by the exact Q, see `lean`)
  harmful     the same with the sign of the reward flipped    the log says so
  flattered   the same harmful policy, but its log has lost most of the deaths in courses like its own:
              off-policy values are wrong, as with hidden causes, and only the canary can tell
  clinicians  the clinicians' own policy: neither; how often is it stopped?

Every rule that fired is in decisions.csv, a row a course in courses.csv, with the exact values beside.
The critic is a table: the exact Q of the model that the first 1,000 episodes make.
"""

import argparse
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from common import ROOT, exit_status, write
from matplotlib.figure import Figure
from ope import fit_model, load, model_values, rows_of, sepsis, steps_of
from tqdm import tqdm

shadow = load("evaluate/shadow")

LOGGED, BLOCK = 5000, 500  # episodes of a log, and of each arm that are simulated at a time
LOST = 0.9  # share of the deaths after courses like the harmful policy's that the flattering log has lost
FACTS = ("gain", "lower", "ess", "mean_agreement", "mean_gap")
LOOKS = {"good": "#0072b2", "clinicians": "#999999", "flattered": "#e69f00", "harmful": "#d55e00"}


# ---------------------------------------------- The policies ----------------------------------------------


def lean(sign: float, temperature: float, rounds: int = 5) -> np.ndarray:
    """[716, 25]: b(a|s) exp(sign (Q - V) / temperature) over the doses that clinicians give.

    Q and V are those of the round before, exactly.
    """
    doctors = sepsis.policy_table("clinician")
    policy, given = doctors, np.where(doctors >= 0.01, doctors, 0)
    for _ in range(rounds):
        q = np.zeros((sepsis.STATES, sepsis.ACTIONS))
        q[: sepsis.DEATH] = sepsis.action_values(policy)
        advantage = q - (policy * q).sum(1, keepdims=True)
        leaning = given * np.exp((sign * advantage / temperature).clip(-50, 50))
        policy = leaning / np.maximum(leaning.sum(1, keepdims=True), 1e-300)  # no doses after an end: zeros
    return policy


def make_policies() -> dict[str, np.ndarray]:
    harmful = lean(-1, 0.015)
    doctors = sepsis.policy_table("clinician")
    return {"good": lean(1, 0.02), "clinicians": doctors, "flattered": harmful, "harmful": harmful}


# ----------------------------------------------- The episodes -----------------------------------------------


def record_log(name: str, policy: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """A log of the clinicians; the flattering one has lost deaths, where courses were like the policy's."""
    doctors, rng = sepsis.policy_table("clinician"), np.random.default_rng((seed, 0))
    if name != "flattered":
        return sepsis.simulate(doctors, LOGGED, rng)
    log = sepsis.simulate(doctors, 2 * LOGGED, rng)
    states, actions, mask = log["states"][:, :-1], log["actions"], steps_of(log)
    ratios = np.ones(mask.shape)
    ratios[mask] = policy[states, actions][mask] / log["propensities"][mask]
    lost = (log["rewards"].sum(1) == 0) & (ratios.prod(1) > 1)  # deaths, likelier under the policy
    kept = ~(lost & (rng.random(len(lost)) < LOST))
    return rows_of(log, np.nonzero(kept)[0][:LOGGED])


def watched_rows(config, log: dict[str, np.ndarray], policy: np.ndarray) -> list[tuple]:
    """What `Deployment.watch` takes for every episode but the first, which make the critic."""
    first, later = rows_of(log, slice(config.fit_episodes)), rows_of(log, slice(config.fit_episodes, None))
    q = model_values(fit_model(first), policy)
    v, mask = (policy * q).sum(1), steps_of(later)
    states, actions = later["states"], later["actions"]
    now = states[:, :-1]
    ends = np.arange(mask.shape[1]) == later["lengths"][:, None] - 1
    ratios = np.ones(mask.shape)
    ratios[mask] = policy[now, actions][mask] / later["propensities"][mask]
    with np.errstate(divide="ignore"):
        data = {"rewards": later["rewards"], "terminations": ends, "mask": mask, "log_ratios": np.log(ratios)}
    difference, weight = shadow.robust_differences(data, q[now, actions], v[now], v[states[:, 1:]], 1.0)
    data["actions"] = actions
    doctors = sepsis.policy_table("clinician")
    shares = shadow.agreements(policy[now][mask], doctors[now][mask], data, 0.1, config.rare)
    columns = (later["rewards"].sum(1), difference, weight, *shares)
    return list(zip(*(column.tolist() for column in columns)))


def new_returns(policy: np.ndarray, rng: np.random.Generator):
    """Returns of new patients under a policy, one after the other, without end."""
    while True:
        yield from sepsis.simulate(policy, BLOCK, rng)["rewards"].sum(1).tolist()


def run_course(name: str, policy: np.ndarray, seed: int):
    """A deployment, from its first watched episode to its end."""
    config = shadow.Config()
    deployment = shadow.Deployment(config)
    for row in watched_rows(config, record_log(name, policy, seed), policy):
        deployment.watch(*row)
        if deployment.phase != "shadow":
            break
    lots = np.random.default_rng((seed, 1))
    control = new_returns(sepsis.policy_table("clinician"), np.random.default_rng((seed, 2)))
    own = new_returns(policy, np.random.default_rng((seed, 3)))
    while deployment.phase != "shadow" and not deployment.is_over:
        share = deployment.share
        canary = bool(lots.random() < share)
        deployment.compare(canary, share, next(own if canary else control))
    return deployment


def study(seeds: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a course; and a row for each rule that fired and for the last episode of a phase without end."""
    courses, decisions, policies = [], [], make_policies()
    truth = sepsis.value(sepsis.policy_table("clinician"))
    for name, seed in tqdm([(name, seed) for name in policies for seed in range(seeds)], disable=None):
        deployment = run_course(name, policies[name], seed)
        rows = deployment.rows
        key = {"policy": name, "seed": seed}
        decisions += [key | row for row in rows if row["rule"] or row is rows[-1]]
        gate = [row for row in rows if row["phase"] == "shadow"][-1]
        course = key | {"exact_gain": sepsis.value(policies[name]) - truth, "end": deployment.phase}
        course |= {"largest_share": max(row["next_share"] for row in rows), "watched": deployment.watched}
        course |= {f"shadow_{fact}": gate[fact] for fact in FACTS}
        course |= {"live": deployment.compared, "acted": deployment.own}
        courses.append(course | {"live_gain": rows[-1]["gain"] if deployment.compared else np.nan})
    return pd.DataFrame(courses), pd.DataFrame(decisions)


# -------------------------------------------- What is written --------------------------------------------


def table_lines(courses: pd.DataFrame) -> list[str]:
    """The table of docs/deploying.md, a line a policy: how many of its courses came how far, and medians."""
    head = ["Policy", "Exact gain", "Gain by the log", "Canary allowed", "Beyond the canary", "Full share"]
    head += ["Stopped", "Live episodes", "of these its own"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, group in courses.groupby("policy", sort=False):
        largest, number = group["largest_share"], len(group)
        counts = [largest > 0, largest > 0.1, largest == 1, group["end"] == "stopped"]
        cells = [name, f"{group['exact_gain'].iloc[0]:+.3f}", f"{group['shadow_gain'].median():+.3f}"]
        cells += [f"{count.sum()} of {number}" for count in counts]
        cells += [f"{group[column].median():,.0f}" for column in ("live", "acted")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(courses: pd.DataFrame, decisions: pd.DataFrame, file: Path) -> None:
    """Shares over live episodes, a line a course; those that never act lie at 0."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 5.2), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True, sharey=True).flat
        end = courses["live"].max()
        for axis, (name, group) in zip(axes, courses.groupby("policy", sort=False)):
            for seed in group["seed"]:
                steps = decisions[(decisions["policy"] == name) & (decisions["seed"] == seed)]
                x, y = share_line(steps, end)
                axis.step(x, y, where="post", color=LOOKS[name], alpha=0.5, linewidth=1.2)
            full, acted = (group["largest_share"] == 1).sum(), (group["largest_share"] > 0).sum()
            gain = 100 * group["exact_gain"].iloc[0]
            title = f"{name}, {gain:+.1f} survivors in 100: {acted} of {len(group)} canaries, {full} full"
            axis.set_title(title, fontsize=9, loc="left")
        figure.supxlabel("episodes since the canary was allowed", fontsize=9)
        figure.supylabel("share of the episodes that are the policy's", fontsize=9)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=110)


def share_line(steps: pd.DataFrame, end: int) -> tuple[list, list]:
    """Episodes since the canary and shares from there on: of one course, from the rules that fired."""
    begun = steps[steps["phase"] == "shadow"]["episode"].max()
    fired = steps[steps["next_share"] > 0] if steps["next_share"].max() > 0 else steps.iloc[:0]
    stopped = steps[steps["next_phase"] == "stopped"]
    fired = pd.concat([fired, stopped])
    x = [0, *(fired["episode"] - begun), end]
    y = [0.0, *fired["next_share"]]
    return x, [*y, y[-1]]


def main() -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "results/shadow")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/img/shadow.png")
    arguments = parser.parse_args()
    return exit_status("shadow_study.py", publish, arguments, errors=(sepsis.UserError,))


def publish(arguments: argparse.Namespace) -> None:
    """Writes the tables and the picture, and prints one."""
    start = time.perf_counter()
    courses, decisions = study(arguments.seeds)
    for name, table in {"courses": courses, "decisions": decisions}.items():
        write(arguments.out / f"{name}.csv", table.to_csv(index=False, float_format="%.4f"))
    draw(courses, decisions, arguments.picture)
    print("\n".join(table_lines(courses)))
    print(f"{time.perf_counter() - start:.0f} s; written to {arguments.out} and {arguments.picture}")


if __name__ == "__main__":
    sys.exit(main())
