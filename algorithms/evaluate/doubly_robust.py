"""DR: doubly robust evaluation, a corrected critic (Jiang and Li, 2016, arXiv:1511.03722).

FQE is wrong where its critic is; importance sampling has too much variance. Here the critic gives the value,
and weighted episodes only correct what it got wrong: right on average if the propensities are, whatever the
critic, and with little variance if the critic is good.

  (1)  w_t = prod_{k <= t} pi(a_k|s_k) / b(a_k|s_k)                  b: the logger's policy, its propensities
  (2)  delta_t = r_t + gamma (1 - d) V(s_{t+1}) - Q(s_t, a_t)        V, Q of the policy: FQE, see fqe.py
  (3)  DR = mean_i [V(s_0) + sum_t gamma^t w_t delta_t]
  (4)  WDR = mean_i V(s_0) + sum_t gamma^t sum_i w_t delta_t / sum_i w_t         (Thomas and Brunskill, 2016)
  (5)  the critic is fitted on one half of the episodes, and (3) and (4) are taken over the other half
  (6)  ESS = (sum_i w_T)^2 / sum_i w_T^2                             so many episodes of its own say as much
  (7)  interval: the 2.5 % and 97.5 % quantiles of an estimate over resamples of the episodes

FQE beside them is the same critic's V(s_0) over the other half. Propensities, vectors of actions and masks of
choices are as in importance_sampling.py. Where a time limit cut an episode, V(s_T) stands for what would have
come after. Of vectors V is Q at pi's own action, without the noise that gives pi its density.

Differences from the paper: (5), without which the critic has seen the episodes that are to correct it; V is
a gradient fit, and stays as it is in (7); (6) and (7) are not the paper's.

  python algorithms/evaluate/doubly_robust.py --dataset reef/sepsis/clinician-v0
"""

import contextlib
import copy
import dataclasses
import difflib
import importlib.util
import inspect
import math
import sys
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
    """Doubly robust evaluation."""

    dataset: str = "reef/sepsis/clinician-v0"  # Minari id of the log
    policies: str = "behavior uniform"  # run folders or globs of them, behavior, uniform; parted by spaces
    seed: int = 0  # of networks, batches, the clone, the halves and the resamples
    variant: str = "default"  # names these settings in the folder
    updates: Count = 20_000  # gradient updates of the critic of each policy
    batch_size: Count = 256  # transitions in an update
    discount: Share = 1.0  # gamma
    tau: Share = 0.05  # rate of the target network: values reach updates x tau steps back
    critic_lr: Size = 3e-4  # Adam's step size
    hidden_dim: Count = 64  # units in a hidden layer
    hidden_layers: Count = 2  # hidden layers of the critics
    members: Count = 5  # critics, each with a resample of the episodes: Q and V are their means
    resamples: Count = 1000  # of the episodes, (7)
    policy_std: Positive = 0.1  # deviation of vectors of actions, which are in [-1, 1]
    clone_updates: Count = 5000  # gradient updates of the logger's policy, where it has to be cloned
    log_every: Count = 1000  # updates between looks at the critics
    output_dir: str = "results/runs"  # where values.csv goes: a folder evaluate/doubly_robust/... in it


# -------------------------------------------- The estimators --------------------------------------------


def corrected(log_ratios, first, errors, discount: float) -> dict[str, tuple]:
    """{name: (terms, weights)}, both [N, 1 + T], from log pi/b [N, T], V(s_0) [N] and delta [N, T].

    An estimate is sum_k (sum_i terms) / (sum_i weights), see `combine`.
    """
    weights = cumulative_weights(log_ratios)
    errors = discount ** np.arange(errors.shape[1]) * weights * errors
    first, even = first[:, None], np.ones((len(first), 1))
    return {
        "FQE": (first, even),
        "DR": (np.hstack([first, errors]), np.hstack([even, np.ones_like(weights)])),  # (3)
        "WDR": (np.hstack([first, errors]), np.hstack([even, weights])),  # (4)
    }


def temporal_errors(log: dict, q: np.ndarray, next_v: np.ndarray, discount: float) -> np.ndarray:
    """delta [N, T] from Q(s_t, a_t) and V(s_{t+1}) [N, T]; zero beyond an episode's end."""
    errors = log["rewards"] + discount * (1 - log["terminations"]) * next_v - q  # (2)
    return errors * log["mask"]


def halves(log: dict[str, np.ndarray], seed: int) -> list[dict[str, np.ndarray]]:
    """The log's episodes in two halves, by lot (5)."""
    if len(log["rewards"]) < 2:
        raise UserError("the log has one episode, of which no halves can be made: see fqe.py")
    order = np.random.default_rng(seed).permutation(len(log["rewards"]))
    columns = {name: column for name, column in log.items() if name != "bounds"}
    return [log | {name: columns[name][rows] for name in columns} for rows in np.array_split(order, 2)]


@torch.no_grad()
def values_at(critics: "FQE", observations: np.ndarray, given: np.ndarray, of_actions: bool) -> np.ndarray:
    """[M], the mean of the critics: Q of actions, or V by the policy's answers."""
    answer = critics.action_values if of_actions else critics.state_values
    given = torch.as_tensor(given)
    given = given if of_actions else given.float()
    parts = zip(torch.as_tensor(observations).split(4096), given.split(4096))
    return torch.cat([answer(critics.critic, s, g).mean(0) for s, g in parts]).double().numpy()


def correct_critics(config: Config) -> None:
    """Prints and records the value of every policy by every estimator."""
    dataset = load_dataset(config.dataset)
    log = side_by_side(dataset)
    choices = int(dataset.action_space.n) if log["actions"].ndim == 2 else 0
    policies = gather_policies(config.policies, choices)
    known, source = log_propensities(dataset, log, config.clone_updates, config.seed)
    fitted, kept = halves(log | {"log_b": known}, config.seed)
    before, after = around_steps(kept, "observations")
    allowed, next_allowed = around_steps(kept, "allowed")
    mask, rows = kept["mask"], []
    for name, policy in policies.items():
        target = policy or clone_policy(dataset, log, config.clone_updates, config.seed)
        critics, _ = fit_critics(config, dataset, fitted, target, name)
        given = ask(target, name, before, dataset, kept, allowed)
        next_given = ask(target, name, after, dataset, kept, next_allowed)
        q, next_v, v = np.zeros(mask.shape), np.zeros(mask.shape), np.zeros(mask.shape)
        q[mask] = values_at(critics, before, kept["actions"][mask], of_actions=True)
        v[mask] = values_at(critics, before, given, of_actions=False)
        next_v[mask] = values_at(critics, after, next_given, of_actions=False)
        if not policy:  # the logger's own actions stand for its policy: its clone's errors would not cancel
            v, next_v[:, :-1] = q, np.where(mask[:, 1:], q[:, 1:], next_v[:, :-1])
        log_pi = log_likelihoods(given, kept, config.policy_std) if policy else kept["log_b"]
        log_ratios = log_pi - kept["log_b"]
        errors = temporal_errors(kept, q, next_v, config.discount)
        weights = cumulative_weights(log_ratios)[:, -1]
        facts = {"ess": effective_size(weights), "mean_weight": weights.mean(), "propensities": source}
        for estimator, (terms, shares) in corrected(log_ratios, v[:, 0], errors, config.discount).items():
            value, low, high = bootstrap(terms, shares, config.resamples, config.seed)
            row = {"policy": name, "estimator": estimator, "value": value, "low": low, "high": high}
            rows.append(row | facts | {"episodes": len(terms)})
    record(config, rank(pd.DataFrame(rows)))


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


def log_propensities(dataset: minari.MinariDataset, log: dict, updates: int, seed: int) -> tuple:
    """log b(a|s) [N, T] of the log's actions, zero beyond an end; and whence it is: "log" or "cloned"."""
    result = np.zeros(log["mask"].shape)
    if "propensities" in log:
        result[log["mask"]] = np.log(log["propensities"][log["mask"]])
        return result, "log"
    clone = clone_behavior(dataset, log, updates, seed)
    observations = torch.as_tensor(around_steps(log, "observations")[0])
    actions = torch.as_tensor(log["actions"][log["mask"]])
    allowed, _ = around_steps(log, "allowed")
    with torch.no_grad():
        result[log["mask"]] = clone.log_likelihood(observations, actions, allowed)
    return result, "cloned"


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


def effective_size(weights: np.ndarray) -> float:
    """Of episodes with weights [N]; 0 where none has any."""
    return float(weights.sum() ** 2 / max((weights**2).sum(), 1e-300))  # (6)


def combine(terms: np.ndarray, weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Estimates [R] from terms and weights [N, K], each episode taken as often as counts [R, N] say."""
    with np.errstate(invalid="ignore"):  # nan where no episode has a weight: the value is unknown
        return ((counts @ terms) / (counts @ weights)).sum(1)


def bootstrap(terms: np.ndarray, weights: np.ndarray, resamples: int, seed: int) -> tuple:
    """An estimate and its 95 % interval: over resamples of the episodes, with replacement."""
    episodes = len(terms)
    counts = np.random.default_rng(seed).multinomial(episodes, np.full(episodes, 1 / episodes), resamples)
    found = combine(terms, weights, counts.astype(float))
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [0.025, 0.975]) if len(found) else (math.nan, math.nan)  # (7)
    return float(combine(terms, weights, np.ones((1, episodes)))[0]), float(low), float(high)


# ------------------------------------------ The table of values ------------------------------------------


def rank(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the rank of each policy by its estimator: 1 is the highest value."""
    ranks = table.groupby("estimator")["value"].rank(ascending=False, method="min")
    return table.assign(rank=ranks.astype("Int64"))


def record(config: Config, table: pd.DataFrame, name: str = "values") -> None:
    """Writes <name>.csv and the config into the folder of these settings, and prints the table."""
    script = Path(__file__).resolve()
    folder = Path(config.output_dir, script.parent.name, script.stem, config.dataset, config.variant)
    folder = folder / f"seed-{config.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    table.to_csv(folder / f"{name}.csv", index=False)
    print(table.to_string(index=False, float_format="{:.4f}".format))
    print(f"written to {folder / name}.csv")


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
    main(correct_critics)
