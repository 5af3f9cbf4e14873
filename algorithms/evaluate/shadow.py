"""Shadow: a policy's way into use, step by step (Waudby-Smith and Ramdas, 2020, arXiv:2010.09686).

By rules that are fixed beforehand. First the policy only watches: beside every logged episode it says what it
would have done. Where the log supports it, it may act in a small share of the new episodes, drawn by lot (the
canary), while the logger's way goes on in the others. The share rises on proof that the policy is not worse,
and falls to nothing on proof that it is. The bounds hold at every moment, so one may look after each episode
and act at once; with a 95 % interval looked at again and again some alarm is certain.

Watching, n episodes so far, episode i with return G_i:
  (1)  X_i = V(s_0) + sum_t gamma^t w_t delta_t,  D_i = X_i - G_i    V, w, delta: as in doubly_robust.py, but
                                                                     a time limit, too, is an end
  (2)  L_n = mean D - s sqrt(2 (n q + 1) / (n^2 q) log(sqrt(n q + 1) / a))   s: deviation of D, a: `alpha`,
       q = (-2 log a + log(1 - 2 log a)) / n*                                tightest after n* episodes
  (3)  ESS = (sum_i w_T)^2 / sum_i w_T^2
  (4)  the canary is allowed if L_n >= -margin, ESS >= min_ess, n >= min_episodes and gaps <= max_gap
Acting, episode k, which was the policy's (A = 1) with chance p, else the logger's (A = 0); G in [0, 1]:
  (5)  U_k = A (G - m) / p - (1 - A) (G - m) / (1 - p)     E U is the gain; m: (1/2 + sum of G before k) / k
  (6)  H = mean_f prod_k (1 - f U_k / u_k)                 u_k: the largest U that could have been
  (7)  S = mean_f prod_k (1 + f (U_k + margin) / l_k)      -l_k: the smallest; f: 1/2, 1/4, ..., 1/64
  (8)  stop if H >= 1/a;  the next share if S >= 1/a

(2) is the lower end of a two-sided confidence sequence (Waudby-Smith et al., 2021, arXiv:2103.06476): it
holds for all n at once, if n is large. (6) and (7) are wealths of bets, exact for any n and under drift
(Waudby-Smith and Ramdas, 2020, arXiv:2010.09686, and with lots as in (5) Waudby-Smith et al., 2022,
arXiv:2210.10768): who bets on what is false multiplies a stake by 1/a, ever, with a chance of at most a. So
a policy that is not worse than the logger is stopped as harmful with a chance of at most a, and one that is
worse by the margin leaves the canary's share with a chance of at most a, however long it takes and however
often one looks.

Differences from the papers: the mean of six fixed bets, not one that is tuned on the way; D is a difference
from the same episodes' returns; the other limits of (4) are ours. At a share of 1 nothing is compared any
more.

`decisions.csv` has a row for each episode: what was seen, the bounds, the rule that fired. Called again
with a longer log or with more `live` episodes, the script goes on from there; a past that has changed is
refused.

  python algorithms/evaluate/shadow.py --dataset reef/sepsis/clinician-v0 --policy uniform
"""

import contextlib
import copy
import csv
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import math
import os
import re
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from glob import glob
from pathlib import Path
from typing import NewType
from unittest import mock

import gymnasium as gym
import huggingface_hub
import minari
import numpy as np
import pandas as pd
import pyrallis
import torch
import yaml
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace
from minari.storage import get_dataset_path
from torch import Tensor, nn
from tqdm import tqdm

Count = NewType("Count", int)  # at least 1
Size = NewType("Size", float)  # at least 0
Positive = NewType("Positive", float)  # at least a millionth
Share = NewType("Share", float)  # from 0 to 1
Precision = NewType("Precision", str)
WandbMode = NewType("WandbMode", str)


@dataclasses.dataclass
class Config:
    """Deployment in steps."""

    dataset: str = "reef/sepsis/clinician-v0"  # Minari id of the log, in the order of time
    policy: str = "behavior"  # folder of a run, uniform, or behavior: a clone of the logger
    live: str = ""  # Minari id of the episodes since the canary was allowed; empty: none yet
    handover: str = ""  # Minari id that log and live episodes get together when it is time to learn anew
    seed: int = 0  # of networks, batches and the clone
    variant: str = "default"  # names these settings in the folder
    alpha: Positive = 0.05  # chance of each mistake of (8), and of (2)
    margin: Size = 0.05  # loss of return that is borne where no more can be proved
    return_min: float = 0.0  # no live episode has a smaller return
    return_max: float = 1.0  # and none a larger one
    shares: str = "0.1 0.25 0.5 1"  # of the episodes: the canary's, then those that follow, parted by spaces
    stage_episodes: Count = 500  # fewest episodes at a share before the next
    patience: Count = 20_000  # most episodes at a share that is not the last: without a verdict it ends there
    handover_episodes: Count = 2000  # of the policy's own, after which it is time to learn anew
    min_episodes: Count = 500  # watched before a canary
    min_ess: Size = 100.0  # effective sample size before a canary
    max_gap: Share = 0.2  # largest share of decisions that the log hardly ever shows
    rare: Share = 0.01  # a choice that the logger takes less often is hardly ever shown
    tight_at: Count = 2000  # n* of (2)
    fit_episodes: Count = 1000  # the first ones of the log: critic and clone are fitted to them, not watched
    updates: Count = 20_000  # gradient updates of the critic
    batch_size: Count = 256  # transitions in an update
    discount: Share = 1.0  # gamma
    tau: Share = 0.05  # rate of the target network: values reach updates x tau steps back
    critic_lr: Size = 3e-4  # Adam's step size
    hidden_dim: Count = 64  # units in a hidden layer
    hidden_layers: Count = 2  # hidden layers of the critics
    members: Count = 5  # critics, each with a resample of the episodes: Q and V are their means
    policy_std: Positive = 0.1  # deviation of vectors of actions, which are in [-1, 1]
    clone_updates: Count = 5000  # gradient updates of the logger's policy
    log_every: Count = 1000  # updates between looks at the critics
    output_dir: str = "results/runs"  # where decisions.csv goes: a folder evaluate/shadow/... in it


# ---------------------------------------- Bounds for every moment ----------------------------------------


FRACTIONS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)  # of all that can be staked: f of (6) and (7)


def width(episodes: int, alpha: float, tight_at: int) -> float:
    """How far, in deviations, the mean of so many episodes is from the truth at most, at every moment (2)."""
    q = (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / tight_at
    spread = episodes * q + 1
    return math.sqrt(2 * spread / (episodes**2 * q) * math.log(math.sqrt(spread) / alpha))


def contrast(canary: bool, p: float, value: float, level: float) -> tuple[float, float, float]:
    """U of an episode whose return, from 0 to 1, is `value`; and u and l, between which it had to be."""
    if canary:
        u = (value - level) / p  # (5)
    else:
        u = -(value - level) / (1 - p)
    largest = max((1 - level) / p, level / (1 - p))
    smallest = max(level / p, (1 - level) / (1 - p))
    return u, largest, smallest


def log_mean_exp(logarithms: np.ndarray) -> float:
    """Logarithm of the mean of so many wealths."""
    top = logarithms.max()
    return float(top + np.log(np.exp(logarithms - top).mean()))


class Deployment:
    """Which phase it is, which share is allowed, and all that was decided: each episode adds a row.

    shadow -> canary (the first share) -> ramp -> full (the last share) -> handover; or stopped.
    """

    def __init__(self, config: Config):
        self.config, self.shares = config, read_shares(config.shares)
        self.phase, self.share, self.rows = "shadow", 0.0, []
        self.watched, self.sums = 0, np.zeros(6)
        self.compared, self.returns = 0, 0.0  # live episodes, and the sum of their returns
        self.drawn, self.contrasts = 0, 0.0  # those that either could have had, and the sum of their U
        self.at_share, self.own = 0, 0  # episodes since the share last rose; episodes of the policy
        self.log_harm, self.log_safe = np.zeros(len(FRACTIONS)), np.zeros(len(FRACTIONS))

    def watch(self, value: float, difference: float, weight: float, agreement: float, gap: float) -> dict:
        """One logged episode: its return, D and w_T; shares of its decisions that agree, that are gaps."""
        self.watched += 1
        self.sums += difference, difference**2, weight, weight**2, agreement, gap
        gain, square, _, _, agreed, gaps = self.sums / self.watched
        deviation = math.sqrt(max(square - gain**2, 0.0))
        bound = gain - deviation * width(self.watched, self.config.alpha, self.config.tight_at)  # (2)
        ess = self.sums[2] ** 2 / max(self.sums[3], 1e-300)  # (3)
        row = {"value": value, "difference": difference, "weight": weight, "agreement": agreement, "gap": gap}
        found = {"gain": gain, "lower": bound, "ess": ess, "mean_agreement": agreed, "mean_gap": gaps}

        config, rule, before = self.config, "", (self.phase, self.share)
        enough = self.watched >= config.min_episodes and ess >= config.min_ess
        if enough and gaps <= config.max_gap and bound >= -config.margin:  # (4)
            rule = "supported: canary"
            self.raise_share()
        return self.note(before, rule, row | found)

    def compare(self, canary: bool, lot: float, value: float) -> dict:
        """One live episode: whether it was the policy's, the share with which that was drawn, its return."""
        config, before = self.config, (self.phase, self.share)
        low, high = config.return_min, config.return_max
        level = (0.5 + self.returns) / (1 + self.compared)  # m: of earlier episodes alone
        scaled = (value - low) / (high - low)
        self.compared += 1
        self.at_share += 1
        self.own += canary
        self.returns += scaled
        if lot < 1:
            u, largest, smallest = contrast(canary, lot, scaled, level)
            self.drawn += 1
            self.contrasts += u
            f = np.array(FRACTIONS)
            self.log_harm += np.log1p(-f * u / largest)  # (6)
            self.log_safe += np.log1p(f * (u + config.margin / (high - low)) / smallest)  # (7)
        harm, safe = log_mean_exp(self.log_harm), log_mean_exp(self.log_safe)
        row = {"canary": int(canary), "lot": lot, "value": value}
        gain = (high - low) * self.contrasts / max(self.drawn, 1)
        row |= {"gain": gain, "log_harm": harm, "log_safe": safe}
        return self.note(before, self.judge(harm, safe), row)

    def judge(self, harm: float, safe: float) -> str:
        """The first rule that fires, which is carried out; else an empty text."""
        config, needed = self.config, -math.log(self.config.alpha)
        last = self.share == self.shares[-1]
        if harm >= needed:  # (8)
            self.phase, self.share = "stopped", 0.0
            return "harm: stop"
        if not last and safe >= needed and self.at_share >= config.stage_episodes:  # (8)
            self.raise_share()
            return "not worse: next share"
        if not last and self.at_share >= config.patience:
            self.phase, self.share = "stopped", 0.0
            return "no verdict: stop"
        if last and self.own >= config.handover_episodes and self.at_share >= config.stage_episodes:
            self.phase = "handover"
            return "enough new data: hand over"
        return ""

    def raise_share(self) -> None:
        """The next share, and the phase that it belongs to."""
        self.share = next(share for share in self.shares if share > self.share)
        self.at_share = 0
        if self.share == self.shares[-1]:
            self.phase = "full"
        elif self.share == self.shares[0]:
            self.phase = "canary"
        else:
            self.phase = "ramp"

    def note(self, before: tuple[str, float], rule: str, row: dict) -> dict:
        """A row of decisions.csv: phase and share in which the episode came, and what followed from it."""
        phase, share = before
        row = {"episode": len(self.rows) + 1, "phase": phase, "share": share} | row
        row |= {"rule": rule, "next_phase": self.phase, "next_share": self.share}
        self.rows.append(row)
        return row

    @property
    def is_over(self) -> bool:
        return self.phase in ("stopped", "handover")


def read_shares(text: str) -> list[float]:
    """Shares of a text, the canary's and more, which have to rise."""
    try:
        shares = [float(word) for word in text.split()]
    except ValueError:
        shares = []
    if len(shares) < 2 or not all(low < high for low, high in zip([0.0, *shares], [*shares, math.inf])):
        raise UserError(f"shares: {text!r} are no rising numbers such as 0.1 0.25 0.5 1")
    if shares[-1] > 1:
        raise UserError(f"shares: {shares[-1]} is more than 1, all episodes")
    return shares


# ------------------------------------- What the policy says to the log -------------------------------------


def robust_differences(log: dict, q: np.ndarray, v: np.ndarray, next_v: np.ndarray, discount: float) -> tuple:
    """D [N] and w_T [N] from Q(s_t, a_t), V(s_t) and V(s_{t+1}) [N, T], and log pi/b [N, T] of the log."""
    powers = discount ** np.arange(log["rewards"].shape[1])
    weights = cumulative_weights(log["log_ratios"])
    errors = temporal_errors(log, q, next_v, discount)
    robust = v[:, 0] + (powers * weights * errors).sum(1)  # (1)
    returns = (powers * log["rewards"]).sum(1)
    return robust - returns, weights[:, -1]  # (1)


def agreements(given: np.ndarray, clone: np.ndarray, log: dict, policy_std: float, rare: float) -> tuple:
    """Shares [N] of the decisions of each episode: the policy would have done the same; the log hardly shows
    what it would have done.

    By the policy's and the clone's answers at the M steps of the log. A choice is the same if it is the
    policy's likeliest one, a vector if no entry is farther away than two `policy_std`; a vector is hardly
    shown if an entry is farther from the clone's mean than three deviations of it (`log["clone_std"]`).
    """
    actions, mask = log["actions"][log["mask"]], log["mask"]
    if actions.ndim == 1:
        wanted = given.argmax(1)
        same = wanted == actions
        unshown = clone[np.arange(len(wanted)), wanted] < rare
    else:
        same = (np.abs(given - actions) <= 2 * policy_std).all(1)
        unshown = (np.abs(given - clone) > 3 * log["clone_std"]).any(1)
    shares = np.zeros((2, *mask.shape))
    shares[:, mask] = same, unshown
    return tuple(shares.sum(2) / mask.sum(1))


def watch_log(config: Config, dataset: minari.MinariDataset, done: int) -> pd.DataFrame:
    """What `Deployment.watch` takes: a row an episode of the log, but for those to fit and `done` more."""
    log = side_by_side(dataset)
    ends = log["mask"].sum(1) - 1
    log["terminations"][np.arange(len(ends)), ends] = 1  # a time limit's too: G_i ends there as well
    first = rows_of(log, slice(config.fit_episodes))
    later = rows_of(log, slice(config.fit_episodes + done, None))
    choices = int(dataset.action_space.n) if log["actions"].ndim == 2 else 0
    named = gather_policies(config.policy, choices)
    if len(named) != 1:
        raise UserError(f"policy: {config.policy} are {len(named)} policies; name one")
    ((name, policy),) = named.items()

    clone = clone_behavior(dataset, first, config.clone_updates, config.seed)
    target = policy or clone_policy(dataset, first, config.clone_updates, config.seed)
    critics, _ = fit_critics(config, dataset, first, target, name)
    mask = later["mask"]
    before, after = around_steps(later, "observations")
    allowed, next_allowed = around_steps(later, "allowed")
    given = ask(target, name, before, dataset, later, allowed)
    next_given = ask(target, name, after, dataset, later, next_allowed)
    q, v, next_v, log_b = (np.zeros(mask.shape) for _ in range(4))
    q[mask] = values_at(critics, before, later["actions"][mask], of_actions=True)
    v[mask] = values_at(critics, before, given, of_actions=False)
    next_v[mask] = values_at(critics, after, next_given, of_actions=False)
    with torch.no_grad():
        shown = clone(torch.as_tensor(before), allowed).double().numpy()
        actions = torch.as_tensor(later["actions"][mask])
        likelihoods = clone.log_likelihood(torch.as_tensor(before), actions, allowed)
    log_b[mask] = np.log(later["propensities"][mask]) if "propensities" in later else likelihoods
    later["log_ratios"] = log_likelihoods(given, later, config.policy_std) - log_b
    if not choices:
        later["clone_std"] = clone.log_std.detach().clamp(-5, 2).exp().numpy()
    difference, weight = robust_differences(later, q, v, next_v, config.discount)
    agreement, gap = agreements(given, shown, later, config.policy_std, config.rare)
    value = episode_returns(dataset, config.discount)[config.fit_episodes + done :]
    columns = {"value": value, "difference": difference, "weight": weight}
    return pd.DataFrame(columns | {"agreement": agreement, "gap": gap})


def episode_returns(dataset: minari.MinariDataset, discount: float) -> list[float]:
    """Of every episode, discounted."""
    episodes = dataset.iterate_episodes()
    return [float(discount ** np.arange(len(episode.rewards)) @ episode.rewards) for episode in episodes]


def rows_of(log: dict[str, np.ndarray], rows: slice) -> dict[str, np.ndarray]:
    """Some of the log's episodes; the bounds of actions are for all."""
    return {name: column if name == "bounds" else column[rows] for name, column in log.items()}


# ------------------------------------- The live episodes, and the end -------------------------------------


def read_live(config: Config) -> pd.DataFrame:
    """What `Deployment.compare` takes: a row an episode of `live`, whose infos have canary and share."""
    dataset, rows = load_dataset(config.live), []
    returns = episode_returns(dataset, config.discount)
    for episode, value in zip(dataset.iterate_episodes(), returns):
        where, infos = f"{dataset.id}, episode {episode.id}", episode.infos or {}
        if not {"canary", "share"} <= {*infos}:
            raise UserError(f"{where}: its infos lack canary (1: the policy's) or share (its chance to be)")
        canary, lot = float(np.ravel(infos["canary"])[0]), float(np.ravel(infos["share"])[0])
        if canary not in (0, 1) or not 0 < lot <= 1:
            raise UserError(f"{where}: canary {canary:g} is not 0 or 1, or share {lot:g} not in (0, 1]")
        if not canary and lot == 1:
            raise UserError(f"{where}: it was the logger's, at a share of 1")
        if not config.return_min <= value <= config.return_max:
            limits = f"[{config.return_min:g}, {config.return_max:g}], see --return_min and --return_max"
            raise UserError(f"{where}: its return {value:g} is not in {limits}")
        rows.append((bool(canary), lot, value))
    return pd.DataFrame(rows, columns=["canary", "lot", "value"])


def compare_live(deployment: Deployment, live: pd.DataFrame) -> None:
    """Lets the deployment have the live episodes that it has not seen; those that it has must be the same."""
    old = [row for row in deployment.rows if "canary" in row]
    for number, (canary, lot, value) in enumerate(live.itertuples(index=False), 1):
        if number <= len(old):
            row = old[number - 1]
            if (row["canary"], row["lot"], row["value"]) != (canary, lot, value):
                raise UserError(f"live episode {number} is another than when it was decided on: restore it")
            continue
        if deployment.is_over:
            return
        if lot > deployment.share:
            allowed = f"{deployment.share:g} was allowed: mend the lot"
            raise UserError(f"live episode {number} was drawn with a share of {lot:g}; {allowed}")
        deployment.compare(canary, lot, value)
    if len(live) < len(old):
        raise UserError(f"live has {len(live)} episodes; {len(old)} were decided on: restore them")


def hand_over(config: Config, dataset: minari.MinariDataset) -> None:
    """Log and live episodes as one dataset to learn from, unless it is there; says how to go on."""
    if get_dataset_path(config.handover).exists():
        print(f"{config.handover} is there")
    else:
        sources = [dataset, load_dataset(config.live)]
        episodes = [episode for source in sources for episode in source.iterate_episodes()]
        shared = set.intersection(*({*(episode.infos or {})} for episode in episodes))
        kept = shared & {"propensity", "action_mask"}
        written = write_dataset(
            config.handover,
            [without_lots(episode, kept) for episode in episodes],
            {"parts": [source.id for source in sources]},
            env=dataset.env_spec,
            observation_space=dataset.observation_space,
            action_space=dataset.action_space,
            algorithm_name=f"the logger and, by lot, {config.policy}",
            description=f"Episodes of {dataset.id}, then those of {config.live}, some by {config.policy}.",
        )
        print(f"{config.handover}: {written['total_episodes']:,} episodes, {written['total_steps']:,} steps")
    print(f"to learn anew: {next_command(config, dataset)}")


def without_lots(episode: minari.EpisodeData, kept: set[str]) -> EpisodeBuffer:
    """An episode to write; of its infos only what is `kept`: propensities and masks that all have."""
    infos = {name: np.asarray(episode.infos[name], float) for name in kept}
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    return EpisodeBuffer(**{name: getattr(episode, name) for name in names}, infos=infos)


def next_command(config: Config, dataset: minari.MinariDataset) -> str:
    """The command that goes on: online where there are an environment and a script for it, else offline."""
    here, parts = Path(__file__).resolve().parents[1], Path(config.policy).resolve().parts
    scripts = [f"{family}/{name}.py" for family, name in zip(parts, parts[1:])]
    family = "discrete" if isinstance(dataset.action_space, gym.spaces.Discrete) else "offline"
    known = [script for script in scripts if (here / script).exists()] or [f"{family}/iql.py"]
    online = known[0].replace("offline/", "finetune/")
    goes_on = dataset.env_spec is not None and (here / online).exists()
    return f"python algorithms/{online if goes_on else known[0]} --dataset {config.handover}"


# --------------------------------------- From the log to decisions ---------------------------------------


def deploy(config: Config) -> None:
    """Goes on from the decisions that are recorded: watches, compares, records; and says what is allowed."""
    folder = Path(config.output_dir, "evaluate/shadow", config.dataset, config.variant, f"seed-{config.seed}")
    check_rules(config, folder)
    deployment = replay(config, folder / "decisions.csv")
    dataset = load_dataset(config.dataset)
    check_log(config, dataset, deployment.rows)
    if config.live and deployment.phase == "shadow":
        raise UserError(f"live: the policy is not allowed to act; watch a log first, without {config.live}")
    if config.live:
        compare_live(deployment, read_live(config))
    elif deployment.phase == "shadow" and dataset.total_episodes > config.fit_episodes + deployment.watched:
        for episode in watch_log(config, dataset, deployment.watched).itertuples(index=False):
            deployment.watch(*episode)
            if deployment.phase != "shadow":
                break

    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "policy.sha256", policy_hash(config.policy))
    write_whole(folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    write_whole(folder / "decisions.csv", as_csv(deployment.rows))
    for row in deployment.rows:
        if row["rule"]:
            shares = f"{row['share']:g} -> {row['next_share']:g}"
            print(f"episode {row['episode']:,}: {row['rule']} (share {shares})")
    print(f"phase {deployment.phase}, share {deployment.share:g}: {in_words(deployment.rows[-1])}")
    print(f"written to {folder / 'decisions.csv'}")
    if deployment.phase == "handover" and config.handover:
        hand_over(config, dataset)


def check_rules(config: Config, folder: Path) -> None:
    """Settings that make sense, and are those of the folder: its rules stay as they were fixed."""
    if config.return_min >= config.return_max:
        raise UserError(f"return_min {config.return_min:g} is not below return_max {config.return_max:g}")
    if config.handover and not re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", config.handover):
        raise UserError(f"handover: {config.handover!r} is no Minari id such as ours/second-v0")
    if config.handover and get_dataset_path(config.handover).exists():
        parts = minari.load_dataset(config.handover).storage.metadata.get("parts")
        if parts != [config.dataset, config.live]:
            raise UserError(f"handover: {config.handover} is there, of other parts; take another id")
    if ".." in folder.parts or "/" in config.variant or config.variant in ("", "."):
        raise UserError(f"{folder} would lead out of its place: mend the variant or the dataset")
    if not (folder / "config.yaml").exists():
        return
    with explain(f"cannot read {folder}", "take another --variant"):
        found = yaml.safe_load((folder / "config.yaml").read_text())
        old = {name: found[name] for name in vars(config)}
        hash_then = (folder / "policy.sha256").read_text()
    free = ["live", "handover", "output_dir"]
    changed = [name for name, value in vars(config).items() if name not in free and old[name] != value]
    if changed:
        fields = ", ".join(f"{name} {old[name]} -> {getattr(config, name)}" for name in changed)
        raise UserError(f"{folder} has decisions under other rules: {fields}; take another --variant")
    if policy_hash(config.policy) != hash_then:
        raise UserError(f"{config.policy} was trained anew since {folder} began: take another --variant")


def policy_hash(name: str) -> str:
    """Of the checkpoint of a run; the name of what is no run."""
    file = Path(name, "checkpoint.pt")
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else name


def check_log(config: Config, dataset: minari.MinariDataset, rows: list[dict]) -> None:
    """Enough episodes to fit to and to watch; those that were watched have the returns that they had."""
    returns = episode_returns(dataset, config.discount)[config.fit_episodes :]
    if not returns:
        raise UserError(f"{dataset.id} has {dataset.total_episodes} episodes: lower fit_episodes or log more")
    then = [row["value"] for row in rows if "difference" in row]
    if returns[: len(then)] != then:
        raise UserError(f"{dataset.id} has another past than when it was watched: restore it")


def replay(config: Config, file: Path) -> Deployment:
    """A deployment that has seen what is recorded; its decisions have to follow from it once more."""
    deployment = Deployment(config)
    if not file.exists():
        return deployment
    with explain(f"cannot read {file}", "take another --variant"):
        for row in csv.DictReader(file.read_text().splitlines()):
            if row["phase"] == "shadow":
                names = ("value", "difference", "weight", "agreement", "gap")
                deployment.watch(*(float(row[name]) for name in names))
            else:
                deployment.compare(row["canary"] == "1", float(row["lot"]), float(row["value"]))
    if as_csv(deployment.rows) != file.read_text():
        raise UserError(f"{file} was changed: its decisions do not follow from its episodes; restore it")
    return deployment


def as_csv(rows: list[dict]) -> str:
    """The rows of a deployment; every number with all its digits."""
    head, measured = ["episode", "phase", "share"], ["value", "difference", "weight", "agreement", "gap"]
    live, tail = ["canary", "lot"], ["rule", "next_phase", "next_share"]
    found = ["gain", "lower", "ess", "mean_agreement", "mean_gap", "log_harm", "log_safe"]
    table = pd.DataFrame(rows, columns=[*head, *live, *measured, *found, *tail])
    return table.astype({"canary": "Int64"}).to_csv(index=False)


def write_whole(file: Path, content: str) -> None:
    """All of it or nothing."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(content)
    os.replace(new, file)


def in_words(row: dict) -> str:
    """The statistics after the last episode, in words."""
    names = ("gain", "lower", "ess", "mean_agreement", "mean_gap", "log_harm", "log_safe")
    return ", ".join(f"{name} {row[name]:.4g}" for name in names if name in row)


# ------------------------- Errors and values of the critic, as in doubly_robust.py -------------------------


def temporal_errors(log: dict, q: np.ndarray, next_v: np.ndarray, discount: float) -> np.ndarray:
    """delta [N, T] from Q(s_t, a_t) and V(s_{t+1}) [N, T]; zero beyond an episode's end."""
    errors = log["rewards"] + discount * (1 - log["terminations"]) * next_v - q  # (2)
    return errors * log["mask"]


@torch.no_grad()
def values_at(critics: "FQE", observations: np.ndarray, given: np.ndarray, of_actions: bool) -> np.ndarray:
    """[M], the mean of the critics: Q of actions, or V by the policy's answers."""
    answer = critics.action_values if of_actions else critics.state_values
    given = torch.as_tensor(given)
    given = given if of_actions else given.float()
    parts = zip(torch.as_tensor(observations).split(4096), given.split(4096))
    return torch.cat([answer(critics.critic, s, g).mean(0) for s, g in parts]).double().numpy()


# ----------------------------- The critic, as in fqe.py -----------------------------


class FQE:
    """E critics of one policy with their targets, and the update that fits them to batches of the log."""

    def __init__(self, config: Config, features: "Features", outputs: int, choices: bool, limits: tuple):
        self.config, self.features, self.choices, self.limits = config, features, choices, limits
        inputs = features.inputs if choices else features.inputs + outputs
        size = (config.hidden_dim, config.hidden_layers, outputs if choices else 1, config.members)
        self.critic = EnsembleNetwork(inputs, *size)
        self.target_critic = copy.deepcopy(self.critic)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), config.critic_lr, fused=True)

    def action_values(self, critic: nn.Module, observations: Tensor, actions: Tensor) -> Tensor:
        """Q_e(s, a) [E, B] of choices [B], or of actions [B, act_dim]."""
        if self.choices:
            q = critic(self.features(observations))  # [E, B, A]
            return q.gather(2, actions.expand(len(q), -1).unsqueeze(2)).squeeze(2)
        return critic(torch.cat([self.features(observations), actions], 1)).squeeze(2)

    def state_values(self, critic: nn.Module, observations: Tensor, policy: Tensor) -> Tensor:
        """V_e(s) [E, B] by the policy's probabilities [B, A], or its actions [B, act_dim]."""
        if self.choices:
            return (policy * critic(self.features(observations))).sum(2)  # (2)
        return self.action_values(critic, observations, policy)  # (2)

    def critic_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            next_v = self.state_values(self.target_critic, batch["next_observations"], batch["next_policy"])
            target = batch["rewards"] + self.config.discount * (1 - batch["terminations"]) * next_v  # (1)
            target = target.clamp(*self.limits)  # [E, B]
        q = self.action_values(self.critic, batch["observations"], batch["actions"])  # [E, B]
        loss = (batch["counts"].T * (q - target).square()).mean(1).sum()  # (3)
        return loss, {"critic/loss": loss.detach(), "critic/q_mean": q.detach().mean()}

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss, metrics = self.critic_loss(batch)
        descend(self.critic_optimizer, loss)
        polyak(self.target_critic, self.critic, self.config.tau)  # (4)
        return metrics

    @torch.no_grad()
    def estimate(self, starts: Tensor, policy: Tensor, counts: Tensor) -> Tensor:
        """J_e [E] from first observations [N, ...], the policy there, and counts [N, E] of the episodes."""
        return (counts.T * self.state_values(self.critic, starts, policy)).mean(1)  # (5)


class EnsembleNetwork(nn.Module):
    """E ReLU networks side by side: [B, inputs] -> [E, B, outputs]."""

    def __init__(self, inputs: int, hidden_dim: int, hidden_layers: int, outputs: int, ensemble: int):
        super().__init__()
        sizes = [inputs] + [hidden_dim] * hidden_layers + [outputs]
        self.layers = nn.ModuleList(EnsembleLinear(ensemble, i, o) for i, o in zip(sizes, sizes[1:]))
        self.ensemble = ensemble

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(self.ensemble, -1, -1)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


class EnsembleLinear(nn.Module):
    """E linear layers side by side, or the first len(x) of them: [E, B, inputs] -> [E, B, outputs]."""

    def __init__(self, ensemble: int, inputs: int, outputs: int):
        super().__init__()
        bound = inputs**-0.5  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(ensemble, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(ensemble, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight[: len(x)], self.bias[: len(x)]
        if weight.shape[-1] == 1:  # a sum of products is faster than a product with one column
            return (x * weight.mT).sum(-1, keepdim=True) + bias
        return torch.bmm(x, weight) + bias


# -------------------- Toolbox: the same in every script that has it, word for word --------------------


def return_limits(rewards: np.ndarray, discount: float) -> tuple[float, float]:
    """What no discounted return of such rewards can leave; infinite where nothing is discounted."""
    if discount == 1:
        return -math.inf, math.inf
    horizon = 1 / (1 - discount)
    return horizon * min(float(rewards.min()), 0.0), horizon * max(float(rewards.max()), 0.0)


def value_and_interval(values: Tensor) -> dict[str, float]:
    """Of the values [E] that the critics give; no interval of one critic (nan)."""
    value, spread = float(values.mean()), 1.96 * float(values.std())  # (6)
    return {"value": value, "low": value - spread, "high": value + spread}


def fit_critics(config: Config, dataset, log: dict, policy: Callable, name: str) -> tuple:
    """FQE of one policy, fitted to the log; and its curve, columns update, value, low and high."""
    torch.manual_seed(config.seed)
    rng, episodes, mask = np.random.default_rng(config.seed), len(log["rewards"]), log["mask"]
    shares = np.full(episodes, 1 / episodes)
    counts = torch.as_tensor(rng.multinomial(episodes, shares, config.members).T).float()  # [N, E]
    before, after = around_steps(log, "observations")
    _, next_allowed = around_steps(log, "allowed")
    data = {
        "observations": torch.as_tensor(before),
        "actions": torch.as_tensor(log["actions"][mask]),
        "rewards": torch.as_tensor(log["rewards"][mask]).float(),
        "next_observations": torch.as_tensor(after),
        "next_policy": torch.as_tensor(ask(policy, name, after, dataset, log, next_allowed)).float(),
        "terminations": torch.as_tensor(log["terminations"][mask]),
        "counts": counts[np.nonzero(mask)[0]],
    }
    starts = log["observations"][:, 0]
    allowed = log["allowed"][:, 0] if "allowed" in log else None
    first = torch.as_tensor(ask(policy, name, starts, dataset, log, allowed)).float()
    limits = return_limits(log["rewards"][mask], config.discount)
    features = Features(dataset.observation_space, log)
    critics = FQE(config, features, first.shape[1], log["actions"].ndim == 2, limits)
    batches, curve = draw_batches(data, config.batch_size, config.seed, 0), []
    for update in tqdm(range(1, config.updates + 1), name, disable=None):
        critics.update(next(batches))
        if update % config.log_every == 0 or update == config.updates:
            values = critics.estimate(torch.as_tensor(starts), first, counts).double()
            if not values.isfinite().all():
                raise Diverged(f"{name}: diverged by update {update}; lower --discount or --critic_lr")
            curve.append({"update": update, **value_and_interval(values)})
    return critics, pd.DataFrame(curve)


def clone_policy(dataset: minari.MinariDataset, log: dict, updates: int, seed: int) -> Callable:
    """The log's own policy, cloned, in the form of `gather_policies`."""
    clone = clone_behavior(dataset, log, updates, seed)

    @torch.no_grad()
    def policy(observations: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
        given = clone(torch.as_tensor(observations), allowed).numpy()
        if clone.choices:
            return given
        low, high = log["bounds"]
        return low + (given + 1) / 2 * (high - low)

    return policy


# --------------------------- Weights of episodes, estimates and their intervals ---------------------------


def log_likelihoods(given: np.ndarray, log: dict, policy_std: float) -> np.ndarray:
    """log pi(a|s) [N, T] of the log's actions, by a policy's answers to the M steps of the log."""
    result, actions = np.zeros(log["mask"].shape), log["actions"][log["mask"]]
    if actions.ndim == 1:
        with np.errstate(divide="ignore"):  # an action that the policy never takes: log 0
            result[log["mask"]] = np.log(np.take_along_axis(given, actions[:, None], 1)[:, 0])
    else:
        z = (actions - given) / policy_std
        densities = -0.5 * z**2 - math.log(policy_std) - 0.5 * math.log(2 * math.pi)
        result[log["mask"]] = densities.sum(1)
    return result


def cumulative_weights(log_ratios: np.ndarray) -> np.ndarray:
    """w_t [N, T] of log ratios [N, T]: sums of logarithms, as a product of many would leave float64."""
    return np.exp(log_ratios.cumsum(1).clip(max=300))  # (1)


# -------------------------- The log: episodes side by side, and policies --------------------------


def side_by_side(dataset: minari.MinariDataset) -> dict[str, np.ndarray]:
    """N episodes side by side, T steps in the longest; zeros beyond an end, where `mask` is False.

    observations [N, T + 1, ...] (states as numbers, planes as they are, else float32 vectors), actions [N, T]
    (choices from 0) or [N, T, act_dim] in [-1, 1], rewards, terminations and mask [N, T], and propensities
    [N, T] where every step's infos have a "propensity": how likely its choice was. Vectors of actions come
    with their bounds [2, act_dim]; choices, where infos have an "action_mask", with those that are allowed
    [N, T + 1, A], which are all where nothing is left to choose.
    """
    space, columns = dataset.action_space, defaultdict(list)
    is_vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
    if not is_vector and not isinstance(space, gym.spaces.Discrete):
        raise UserError(f"this script is not for {space}: it takes choices (Discrete) or vectors (Box)")
    numbered = isinstance(dataset.observation_space, gym.spaces.Discrete)
    raw = numbered or image_of(dataset.observation_space).dtype == np.uint8
    for episode in dataset.iterate_episodes():
        seen = image_of(episode.observations)
        columns["observations"].append(seen if raw else flatten(seen))
        columns["actions"].append(episode.actions if is_vector else episode.actions - space.start)
        columns["rewards"].append(np.asarray(episode.rewards, np.float64))
        columns["terminations"].append(np.asarray(episode.terminations, np.float32))
        columns["mask"].append(np.ones(len(episode.rewards), bool))
        if not is_vector and "propensity" in (episode.infos or {}):
            likely = read_propensities(episode, f"{dataset.id}, episode {episode.id}")
            columns["propensities"].append(likely)
        if not is_vector and "action_mask" in (episode.infos or {}):
            allowed = read_mask(episode, space, f"{dataset.id}, episode {episode.id}")
            columns["allowed"].append(allowed)
        for name in ("observations", "actions", "rewards"):
            if not np.isfinite(columns[name][-1]).all():
                raise UserError(f"{dataset.id}, episode {episode.id}: {name} are not all finite")
    if len(columns["propensities"]) < len(columns["rewards"]):
        del columns["propensities"]  # unknown in some episodes: no use
    if len(columns["allowed"]) not in (0, len(columns["rewards"])):
        raise UserError(f"{dataset.id}: infos have an action_mask in some episodes only")
    log = {name: pad(arrays) for name, arrays in columns.items() if arrays}
    if "allowed" in log:
        log["allowed"] |= ~log["allowed"].any(2, keepdims=True)
    if is_vector:
        low, high = log["bounds"] = bounds_of_actions(space, log["actions"][log["mask"]])
        scaled = 2 * (log["actions"].clip(low, high) - low) / np.maximum(high - low, 1e-6) - 1
        log["actions"] = scaled.astype(np.float32)
    return log


def pad(arrays: list[np.ndarray]) -> np.ndarray:
    """Arrays [T_i, ...] side by side [N, T, ...], zeros beyond those that are shorter than the longest."""
    padded = np.zeros((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(padded, arrays):
        row[: len(array)] = array
    return padded


def image_of(tree):
    """The image of a Dict that has one, or of its space (minigrid's); anything else is itself."""
    has_one = isinstance(tree, Mapping) and "image" in {*tree}  # `in` a space asks for elements, not for keys
    return tree["image"] if has_one else tree


def read_propensities(recorded: minari.EpisodeData, where: str) -> np.ndarray:
    """infos["propensity"]: how likely the logger's choice was at every step [T]."""
    likely, steps = np.asarray(recorded.infos["propensity"], np.float64), len(recorded.rewards)
    if likely.shape != (steps,) or not ((likely > 0) & (likely <= 1)).all():
        raise UserError(f"{where}: propensities of its {steps} steps are not all in (0, 1]")
    return likely


def read_mask(recorded: minari.EpisodeData, space: gym.spaces.Discrete, where: str) -> np.ndarray:
    """infos["action_mask"]: the choices that are allowed at every observation [T + 1, A]."""
    allowed, steps = np.asarray(recorded.infos["action_mask"]).astype(bool), len(recorded.rewards)
    if allowed.shape != (steps + 1, space.n):
        raise UserError(f"{where}: action_mask of shape {allowed.shape}, not {(steps + 1, int(space.n))}")
    needed = steps + 1 - bool(recorded.terminations[-1])  # after the end there is nothing to choose
    if not allowed[:needed].any(1).all():
        raise UserError(f"{where}: action_mask allows nothing at step {allowed.any(1).argmin()}")
    chosen = allowed[np.arange(steps), recorded.actions - space.start]
    if not chosen.all():
        raise UserError(f"{where}: action_mask forbids what was chosen at step {chosen.argmin()}")
    return allowed


def only_allowed(values: Tensor, allowed) -> Tensor:
    """Values [..., A] of choices, minus infinity where `allowed` [..., A] forbids one; None: all are."""
    if allowed is None:
        return values
    return values.masked_fill(~torch.as_tensor(allowed, device=values.device).bool(), -math.inf)


def around_steps(log: dict[str, np.ndarray], name: str) -> tuple:
    """Column `name` [N, T + 1, ...] before and after each of M steps [M, ...]; None where there is none."""
    if name not in log:
        return None, None
    return log[name][:, :-1][log["mask"]], log[name][:, 1:][log["mask"]]


def bounds_of_actions(space: gym.spaces.Box, actions: np.ndarray) -> np.ndarray:
    """Lower and upper [2, act_dim] of actions [M, act_dim]; where there are none, the log's extremes."""
    low = np.where(np.isfinite(space.low), space.low, actions.min(0))
    return np.stack([low, np.where(np.isfinite(space.high), space.high, actions.max(0))])


class Features(nn.Module):
    """Observations [B, ...] -> vectors [B, inputs]: states one-hot, numbers standardised as in the log."""

    def __init__(self, space: gym.Space, log: dict[str, np.ndarray]):
        super().__init__()
        self.one_hot = isinstance(space, gym.spaces.Discrete)
        if self.one_hot:
            self.inputs, self.first_state = int(space.n), int(space.start)
            return
        seen = log["observations"][:, :-1][log["mask"]]
        seen = seen.reshape(len(seen), -1)
        self.inputs = seen.shape[1]
        self.register_buffer("mean", torch.as_tensor(seen.mean(0, np.float64)).float())
        self.register_buffer("std", torch.as_tensor(seen.std(0, np.float64) + 1e-3).float())

    def forward(self, observations: Tensor) -> Tensor:
        if self.one_hot:
            return nn.functional.one_hot(observations.long() - self.first_state, self.inputs).float()
        return (observations.flatten(1) - self.mean) / self.std


class Clone(nn.Module):
    """The policy behind a log: a softmax over choices, or a Gaussian around a tanh mean."""

    def __init__(self, features: Features, outputs: int, choices: bool):
        super().__init__()
        self.features, self.choices = features, choices
        self.net = mlp(features.inputs, 64, 2, outputs)
        if not choices:
            self.log_std = nn.Parameter(torch.zeros(outputs))

    def forward(self, observations: Tensor, allowed=None) -> Tensor:
        """Probabilities [B, A] of choices (`allowed` [B, A]), or mean actions [B, act_dim] in [-1, 1]."""
        outputs = self.net(self.features(observations))
        return only_allowed(outputs, allowed).softmax(-1) if self.choices else torch.tanh(outputs)

    def log_likelihood(self, observations: Tensor, actions: Tensor, allowed=None) -> Tensor:
        """Log probability or density [B] of the log's actions."""
        if self.choices:
            logits = only_allowed(self.net(self.features(observations)), allowed)
            return logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
        log_std = self.log_std.clamp(-5, 2)
        z = (actions - self(observations)) / log_std.exp()
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def clone_behavior(dataset: minari.MinariDataset, log: dict, updates: int, seed: int) -> Clone:
    """Fits a policy to the log by maximum likelihood."""
    torch.manual_seed(seed)
    choices = log["actions"].ndim == 2
    outputs = int(dataset.action_space.n) if choices else log["actions"].shape[-1]
    clone = Clone(Features(dataset.observation_space, log), outputs, choices)
    optimizer = torch.optim.Adam(clone.parameters(), 1e-3, fused=True)
    observations = torch.as_tensor(around_steps(log, "observations")[0])
    actions = torch.as_tensor(log["actions"][log["mask"]])
    allowed, _ = around_steps(log, "allowed")
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(updates), "cloning the log's policy", disable=None):
        rows = rng.integers(len(actions), size=256)
        possible = None if allowed is None else allowed[rows]
        descend(optimizer, -clone.log_likelihood(observations[rows], actions[rows], possible).mean())
    return clone


def gather_policies(names: str, choices: int) -> dict[str, Callable | None]:
    """{name: policy} of "behavior" (None), "uniform", and run folders or globs of them, parted by spaces.

    A policy takes observations [M, ...], and the choices `allowed` [M, A] where the log has masks; it gives
    probabilities [M, A] of choices, or actions [M, act_dim] in the environment's units.
    """
    found = {}
    for name in names.split():
        folders = [folder for folder in sorted(glob(name)) if Path(folder, "checkpoint.pt").exists()]
        if name == "behavior":
            found[name] = None
        elif name == "uniform" and choices:
            found[name] = partial(uniform_policy, choices)
        elif folders:
            found |= {folder: load_policy(folder, choices) for folder in folders}
        else:
            raise UserError(f"policies: {name} is no folder of a run with a checkpoint")
    return found


def uniform_policy(choices: int, observations: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """Probabilities [M, A], the same for all that is `allowed` [M, A]."""
    shares = np.ones((len(observations), choices)) if allowed is None else allowed.astype(float)
    return shares / shares.sum(1, keepdims=True)


def load_policy(folder: str, choices: int) -> Callable:
    """The policy of a run, by `load` of the script that the folder's path names: .../<family>/<script>/..."""
    here, parts = Path(__file__).resolve().parents[1], Path(folder).resolve().parts
    paths = [here / family / f"{name}.py" for family, name in zip(parts, parts[1:])]
    known = [path for path in paths if path.exists()]
    if not known:
        raise UserError(f"policies: the path {folder} names no script of {here}")
    with explain(f"cannot load {folder}", f"is it a run of {known[0]}?"):
        name = f"reef_{known[0].parent.name}_{known[0].stem}"
        spec = importlib.util.spec_from_file_location(name, known[0])
        script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        learner = script.load(folder)
    if "rewards" in inspect.signature(learner.act).parameters:
        raise UserError(f"policies: {folder} acts by what it remembers of an episode: not asked here")
    return learner.probabilities if choices else learner.act


def check_names(policy: str, dataset: minari.MinariDataset) -> None:
    """An error where a run learned from data whose choices or columns have other names than this log's."""
    file = Path(policy, "config.yaml")
    source = yaml.safe_load(file.read_text())["dataset"] if file.exists() else dataset.id
    if (minari.storage.get_dataset_path(source) / "data").exists():
        known, ours = minari.load_dataset(source).storage.metadata, dataset.storage.metadata
        for field in ("action_names", "observation_columns"):
            if field in known and field in ours and known[field] != ours[field]:
                where = f"{known[field]} where it learned, {ours[field]} here"
                raise ValueError(f"{field} are {where}; import this log --like {source}")


def ask(policy: Callable, name: str, observations, dataset, log: dict, allowed=None) -> np.ndarray:
    """Probabilities [M, A], or mean actions [M, act_dim] in [-1, 1], for observations [M, ...].

    `allowed` [M, A] are the choices that the log's masks allow there, None where it has none.
    """
    with explain(f"{name} does not fit {dataset.id}", "evaluate it on a log of its own environment"):
        check_names(name, dataset)
        parts, given = np.array_split(np.arange(len(observations)), len(observations) // 4096 + 1), []
        for rows in parts:
            masks = {} if allowed is None else {"allowed": allowed[rows]}
            given.append(np.asarray(policy(observations[rows], **masks)))
        given = np.concatenate(given).astype(np.float64)
        if log["actions"].ndim == 3:
            low, high = log["bounds"]
            given = 2 * (given - low) / np.maximum(high - low, 1e-6) - 1
        wanted = len(observations), gym.spaces.flatdim(dataset.action_space)
        if given.shape != wanted:
            raise ValueError(f"its answers are of shape {given.shape}, not {wanted}")
        if allowed is not None and given[~allowed].any():
            raise ValueError("it makes choices that the log's action_mask forbids")
    return given


def mlp(inputs: int, hidden_dim: int, hidden_layers: int, outputs: int) -> nn.Sequential:
    """ReLU network [..., inputs] -> [..., outputs]."""
    sizes = [inputs] + [hidden_dim] * hidden_layers
    hidden = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient of `loss` for the parameters of `optimizer` and no others."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        parameter.grad = gradient.contiguous()  # fused Adam takes no account of strides
    optimizer.step()


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- target + tau (source - target)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def load_dataset(name: str) -> minari.MinariDataset:
    """The dataset on this machine, else from the Minari hub; says which."""
    local, ours = (minari.storage.get_dataset_path(name) / "data").exists(), name.startswith("reef/")
    advice = f"make it: make dataset ID={name}" if ours else f"see minari list remote, minari download {name}"
    configs = Path(__file__).resolve().parent / "../../configs"
    known = {"/".join(file.with_suffix("").parts[-3:]) for file in configs.glob("*/*/*/*/*-v[0-9].yaml")}
    root = minari.storage.get_dataset_path()
    known |= {data.parent.relative_to(root).as_posix() for data in root.glob("*/**/data")}
    near = difflib.get_close_matches(name, known - {name}, 2)
    if local:
        advice = f"if its files are damaged, minari delete {name}, then {advice}"
    elif near:
        advice = f"did you mean {' or '.join(near)}? Else {advice}"
    with explain(f"cannot load {name}", advice):
        if not local and not ours:  # ask once: the hub's client would ask for half a minute
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=4)
        dataset = minari.load_dataset(name, download=not ours)
        list(dataset.storage.get_episode_metadata(dataset.episode_indices[-1:]))  # is the file whole?
    source = "on this machine" if local else "from the Minari hub"
    print(f"{name}, {source}: {dataset.total_episodes:,} episodes, {dataset.total_steps:,} steps")
    return dataset


def leaves(tree) -> list:
    """The entries of a Dict in the order of its sorted keys, however deep; anything else is its own leaf."""
    if isinstance(tree, Mapping):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [tree]


def flatten(tree) -> np.ndarray:
    """An array as float32; the leaves of a Dict side by side: [..., obs_dim]."""
    return np.concatenate([np.asarray(leaf, np.float32) for leaf in leaves(tree)], axis=-1)


def draw_batches(data: dict[str, Tensor], batch_size: int, seed: int, update: int) -> Iterator[dict]:
    """Batches `update`, `update` + 1, ...: rows drawn with replacement, by seed and batch number alone."""
    first = next(iter(data.values()))
    while True:
        block, start = divmod(update, 1000)  # the rows of 1000 batches are drawn at a time
        rows = np.random.default_rng((seed, block)).integers(len(first), size=(1000, batch_size))
        for batch_rows in torch.as_tensor(rows, device=first.device)[start:]:
            yield {name: column.index_select(0, batch_rows) for name, column in data.items()}
        update += 1000 - start


# --------------------------- Writing a dataset ---------------------------


def write_dataset(dataset_id: str, episodes: list[EpisodeBuffer], extra: dict, **metadata) -> dict:
    """Writes a dataset all at once (into a hidden folder of the Minari root, then renamed); its metadata.

    `metadata` are Minari's own fields, as its `create_dataset_from_buffers` takes them; `extra` joins them.
    """
    root, namespace = get_dataset_path(), dataset_id.rpartition("/")[0]
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder  # a root of its own: a dataset cannot change its id
        try:
            # The warnings are about an e-mail address and a link; mazes leave a file in the temporary folder.
            with warnings.catch_warnings(action="ignore"), mock.patch("tempfile.tempdir", folder):
                dataset = minari.create_dataset_from_buffers(dataset_id, episodes, **metadata)
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(root)
        dataset.storage.update_metadata({**extra, "content_hash": content_hash(dataset)})
        with contextlib.suppress(ValueError):  # it is there, or the id has none
            create_namespace(namespace)
        os.rename(Path(folder, dataset_id), root / dataset_id)
    return minari.load_dataset(dataset_id).storage.metadata


def content_hash(dataset: minari.MinariDataset) -> str:
    """sha256, as hexadecimal digits, of dtype, shape and bytes of every array, episode by episode."""
    digest = hashlib.sha256()
    for e in dataset.iterate_episodes():
        for array in (e.observations, e.actions, e.rewards, e.terminations, e.truncations):
            for leaf in leaves(array):
                digest.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return digest.hexdigest()


# ------------------------------ The command line and its errors ------------------------------


class UserError(Exception):
    """What the user can mend: `main` prints it in one line."""


class Diverged(UserError):
    """A loss or weight that is not finite any more."""


@contextlib.contextmanager
def explain(problem: str, advice: str) -> Iterator[None]:
    """Whatever is raised inside becomes an error of one line: the problem, what was raised, what to do."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{problem}: {error!r:.200}; {advice}") from None


def parse_config(arguments: list[str]) -> Config:
    """Config from the YAML file of `--config_path`, then from `--field value`: pyrallis reads both."""
    register = pyrallis.decode.register
    register(int, partial(number, int, 0, 2**32 - 1))
    register(Count, partial(number, int, 1, math.inf))
    register(float, partial(number, float, -math.inf, math.inf))
    register(Size, partial(number, float, 0, math.inf))
    register(Positive, partial(number, float, 1e-6, math.inf))
    register(Share, partial(number, float, 0, 1))
    register(bool, partial(choice, (True, False)))
    register(Precision, partial(choice, ("highest", "high", "medium", "auto")))
    register(WandbMode, partial(choice, ("offline", "online", "disabled")))
    register(str, text)
    register(Config, decode_config)
    with mock.patch("inspect.getsource", cache(inspect.getsource)):  # pyrallis asks field by field
        parser = pyrallis.argparsing.ArgumentParser(Config, allow_abbrev=False, exit_on_error=False)
    try:
        config, unknown = parser.parse_known_args(arguments)
        decode_config({word[2:].partition("=")[0] if word[:2] == "--" else word: None for word in unknown})
    except UserError:
        raise
    except Exception as error:  # argparse, yaml and the disk have no error in common
        raise UserError(f"cannot read the config, {' '.join(arguments)}: {error}; see --help") from None
    return config


def decode_config(values: dict) -> Config:
    """A Config of what pyrallis has read; an error that names the field, or the nearest one."""
    kinds, decoded = {field.name: field.type for field in dataclasses.fields(Config)}, {}
    for name, value in values.items():
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, 1)
            advice = f"did you mean {near[0]}?" if near else "see --help"
            raise UserError(f"unknown field {name}: {advice}")
        try:
            decoded[name] = pyrallis.decode(kinds[name], value)
        except Exception as error:
            raise UserError(f"{name}: {error}") from None
    return Config(**decoded)


def number(kind: type, low: float, high: float, value) -> int | float:
    """`value` as an int or a float within limits: 1e6 is an int, 2.5 and true are none."""
    found = math.nan if isinstance(value, bool) else float(value)
    if not (math.isfinite(found) and low <= found <= high) or found != kind(found):
        raise ValueError(f"{value!r} is not {kind.__name__} in [{low}, {high}]")
    return kind(found)


def text(value) -> str:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not text")
    return str(value)


def choice(choices: tuple, value):
    if type(value) is not type(choices[0]) or value not in choices:
        raise ValueError(f"{value!r} is not {' or '.join(map(str, choices))}")
    return value


def main(action: Callable[[Config], None]) -> None:
    """The command line of `action`: what the user can mend ends in one line on stderr."""
    try:
        return action(parse_config(sys.argv[1:]))
    except (UserError, OSError) as error:
        message, status = f"{error}", 3 if isinstance(error, Diverged) else 2
    except KeyboardInterrupt:
        message, status = "interrupted; the same command goes on from what is saved, or begins anew", 130
    print(f"{Path(__file__).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main(deploy)
