"""Cal-QL: calibrated pre-training for efficient online fine-tuning (Nakamoto et al., 2023, arXiv:2303.05479).

Q of CQL ends below what any policy earns: online everything new looks better, and what was learnt is lost.
Cal-QL is CQL (cql.py) with a floor: Q of the policy's actions is lowered no further than what the data's own
policy earned from there, (9). After `updates` on the data alone half of every batch is from the environment.

  (1)  y = r + gamma (1 - d) min_i Q'_i(s', a'),  a' ~ pi(s')                   d: terminated, not truncated
  (2)  L_Q = sum_i mean (Q_i(s, a) - y)^2 + w sum_i G_i
  (3)  L_pi = mean (alpha log pi(a|s) - min_i Q_i(s, a)),  a ~ pi(s)            after (2)
  (4)  L_alpha = log alpha (H + |A|),  H = -mean log pi(a|s)                    |A|: entries of an action
  (5)  Q' <- Q' + tau (Q - Q')
  (6)  G_i = mean (T log sum_b exp((Q_i(s, b) - log p(b)) / T) - Q_i(s, a))     b ~ p: uniform, pi(s), pi(s')
  (7)  with a gap g to keep: w lambda (G_i - g) for w G_i in (2),  L_lambda = -w lambda mean_i (G_i - g)
  (8)  V(s_t) = sum_k gamma^k r_(t+k)                                           to the end of the episode
  (9)  max(Q_i(s, b), V(s)) for Q_i(s, b) in (6),  b ~ pi(s), pi(s')            not for uniform b

Differences from the paper: updates follow each online step, so V of the episode under way is no floor yet. If
all rewards of an episode were the same and negative and it did not terminate, V is r / (1 - gamma), as in the
authors' code for sparse tasks. (2) keeps the whole square; (3) climbs the critic of (2) (theirs: that
before); log deviations end at -5 and 2, without learned scale and shift; first weights are torch's own; an
episode cut by a time limit keeps its last transition.

  python algorithms/finetune/cal_ql.py --config_path configs/finetune/cal_ql/reef/pointmaze/umaze-v0.yaml
"""

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import importlib.metadata
import inspect
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import NewType, Optional
from unittest import mock

import filelock
import gymnasium as gym
import huggingface_hub
import minari
import numpy as np
import pandas as pd
import psutil
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
    """Cal-QL. Write `null` for none and true or false for a switch."""

    dataset: str = "reef/pointmaze/umaze-v0"  # Minari id, on this machine or on the hub
    seed: int = 0  # of networks, batches, noise and evaluations
    variant: str = "default"  # names these settings in the run's folder and in the tables
    updates: Count = 1_000_000  # gradient updates on the data alone
    online_steps: Count = 1_000_000  # steps in the environment after these
    updates_per_step: Count = 1  # gradient updates after each of these steps
    online_fraction: Share = 0.5  # of a batch from the environment, then; the rest is from the data
    buffer_size: Count = 2_000_000  # transitions of the environment that are kept
    start_from: Optional[str] = None  # folder of a finished run of this algorithm, for the first `updates`
    batch_size: Count = 256  # transitions in an update
    discount: Share = 0.99  # gamma
    tau: Share = 0.005  # rate of the target network
    actor_lr: Size = 3e-5  # Adam's step size, the temperature's too
    critic_lr: Size = 3e-4  # Adam's step size, the multiplier's too
    hidden_dim: Count = 256  # units in a hidden layer
    hidden_layers: Count = 3  # hidden layers of every network
    cql_weight: Size = 10.0  # w of (2): 0 is SAC without entropy in the target
    cql_temperature: Positive = 1.0  # T of (6): near 0 a hard maximum
    cql_actions: Count = 10  # N: actions b of each of the three kinds in (6)
    lagrange_gap: Optional[float] = None  # g of (7); null: no multiplier
    max_target_backup: bool = False  # the best of N actions a' in (1), not one
    normalize_states: bool = True  # standardise observations by the dataset's mean and deviation
    normalize_rewards: bool = False  # first multiply by 1000 / (largest - smallest episode return)
    reward_scale: float = 1.0  # the learner sees reward_scale * r + reward_shift
    reward_shift: float = 0.0  # see reward_scale
    environment: Optional[str] = None  # Gymnasium id to learn and be evaluated in; null: the dataset's own
    ref_min: Optional[float] = None  # return that scores 0, if the dataset names none
    ref_max: Optional[float] = None  # return that scores 100, if the dataset names none
    eval_every: Count = 5000  # updates between evaluations
    eval_episodes: Count = 10  # episodes of an evaluation along the way
    final_eval_episodes: Count = 100  # episodes of the evaluation that is the score
    log_every: Count = 1000  # updates between rows of metrics.csv
    checkpoint_every: Count = 10_000  # updates between checkpoints
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    threads: int = 0  # CPU threads; 0: torch's choice
    compile: bool = True  # compile the losses
    precision: Precision = "auto"  # of float32 products; auto: as highest, or faster if nothing is rounded
    wandb_mode: WandbMode = "offline"  # mirror of the CSV files
    wandb_project: str = "reef"  # wandb project
    output_dir: str = "results/runs"  # where run folders go


# --------------------------------------------- Cal-QL ---------------------------------------------


class CalQL:
    """Networks, target and optimisers, and the update that trains them on batches in the learner's units."""

    def __init__(self, config: Config, scaler: "Scaler"):
        self.config, self.scaler, self.updates = config, scaler, 0
        obs_dim, act_dim, device = scaler.obs_dim, scaler.act_dim, scaler.mean.device
        self.actor = TanhGaussianActor(obs_dim, act_dim, config.hidden_dim, config.hidden_layers).to(device)
        self.critic = EnsembleCritic(obs_dim, act_dim, config.hidden_dim, config.hidden_layers).to(device)
        self.target_critic = copy.deepcopy(self.critic)
        self.temperature, self.multiplier = PositiveScalar().to(device), PositiveScalar().to(device)
        if config.lagrange_gap is not None:
            nn.init.ones_(self.multiplier.log)  # lambda of (7) starts at e
        adam = partial(torch.optim.Adam, fused=True)
        self.actor_optimizer = adam(self.actor.parameters(), config.actor_lr)
        self.critic_optimizer = adam(self.critic.parameters(), config.critic_lr)
        self.temperature_optimizer = adam(self.temperature.parameters(), config.actor_lr)
        self.multiplier_optimizer = adam(self.multiplier.parameters(), config.critic_lr)

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.updates += 1
        return self.learn(batch)

    def learn(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every step of an update; on a GPU one CUDA graph: what `updates` decides comes as an argument."""
        loss, metrics = self.critic_loss(batch)
        descend(self.critic_optimizer, loss)
        if self.config.lagrange_gap is not None:
            excess = self.config.cql_weight * (metrics["critic/gap"] - self.config.lagrange_gap)
            descend(self.multiplier_optimizer, -self.multiplier().clamp(max=1e6) * excess)  # (7)
        loss, actor_metrics = self.actor_loss(batch)
        descend(self.actor_optimizer, loss)
        surplus = actor_metrics["actor/entropy"] + batch["actions"].shape[-1]
        descend(self.temperature_optimizer, self.temperature.log * surplus)  # (4)
        polyak(self.target_critic, self.critic, self.config.tau)  # (5)
        return metrics | actor_metrics | {"actor/temperature": self.temperature().detach()}

    def critic_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        c, s, next_s = self.config, batch["observations"], batch["next_observations"]
        with torch.no_grad():
            n = c.cql_actions if c.max_target_backup else 1
            next_actions = self.actor.sample(next_s, n)[0].flatten(0, 1)  # [n B, A]
            next_q = self.target_critic(next_s.repeat(n, 1), next_actions).amin(0).view(n, -1).amax(0)  # [B]
            target = batch["rewards"] + c.discount * (1 - batch["terminations"]) * next_q  # (1) [B]
            b, log_p = self.actor.sample(torch.stack([s, next_s]), c.cql_actions)  # [N, 2, B, A], [N, 2, B]
            b = torch.cat([torch.rand_like(b[:, :1]) * 2 - 1, b], 1)  # [N, 3, B, A]
            log_p = torch.cat([torch.full_like(log_p[:, :1], b.shape[-1] * math.log(0.5)), log_p], 1)
        q = self.critic(s, batch["actions"])  # [2, B]
        q_b = self.critic(s.repeat(3 * c.cql_actions, 1), b.flatten(0, 2)).view(2, *log_p.shape)  # all in s
        floored = torch.maximum(q_b[:, :, 1:], batch["returns_to_go"])  # (9) [2, N, 2, B]
        gap = self.gap(q, torch.cat([q_b[:, :, :1], floored], 2), log_p)  # [2]
        penalty = c.cql_weight * self.multiplier().detach().clamp(max=1e6) * (gap - (c.lagrange_gap or 0))
        loss = ((q - target).square().mean(1) + penalty).sum()  # (2), with a gap (7)
        metrics = {"critic/q_mean": q.detach().mean(), "critic/gap": gap.detach().mean()}
        metrics["critic/floored"] = (floored > q_b[:, :, 1:]).float().mean()
        return loss, metrics | {"critic/loss": loss.detach(), "critic/multiplier": self.multiplier().detach()}

    def actor_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        actions, log_prob = self.actor.sample(batch["observations"])  # [B, A], [B]
        q = self.critic(batch["observations"], actions).amin(0)  # [B]
        loss = (self.temperature().detach() * log_prob - q).mean()  # (3)
        return loss, {"actor/loss": loss.detach(), "actor/entropy": -log_prob.detach().mean()}

    def gap(self, q: Tensor, q_b: Tensor, log_p: Tensor) -> Tensor:
        """G_i [E] of Q_i(s, a) [E, B], and of Q_i(s, b) [E, N, K, B] and log p(b) [N, K, B], K kinds of b."""
        soft_maximum = torch.logsumexp((q_b - log_p) / self.config.cql_temperature, (1, 2))  # [E, B]
        return (self.config.cql_temperature * soft_maximum - q).mean(1)  # (6)

    @torch.inference_mode()
    def act(self, observations) -> np.ndarray:
        """Raw observations [..., obs_dim], or Dicts -> mean actions [..., act_dim] in environment units."""
        mean, _ = self.actor(self.scaler.scale_observations(observations))
        return self.scaler.unscale_actions(torch.tanh(mean))


# -------------------------------------------- Networks --------------------------------------------


def mlp(inputs: int, hidden_dim: int, hidden_layers: int, outputs: int) -> nn.Sequential:
    """ReLU network [..., inputs] -> [..., outputs]."""
    sizes = [inputs] + [hidden_dim] * hidden_layers
    hidden = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


class TanhGaussianActor(nn.Module):
    """pi(a|s): the tanh of a Gaussian whose mean and deviation are both the network's."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int, hidden_layers: int):
        super().__init__()
        self.net = mlp(obs_dim, hidden_dim, hidden_layers, 2 * act_dim)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log deviation [..., act_dim] of the Gaussian."""
        mean, log_std = self.net(observations).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)

    def sample(self, observations: Tensor, *count: int) -> tuple[Tensor, Tensor]:
        """Actions [*count, ..., act_dim] in [-1, 1], with gradients, and log densities [*count, ...]."""
        mean, log_std = self(observations)
        noise = torch.randn_like(mean.expand(*count, *mean.shape))
        x = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - x - nn.functional.softplus(-2 * x))  # of tanh: log(1 - tanh(x)^2)
        return torch.tanh(x), (log_prob - log_slope).sum(-1)


class PositiveScalar(nn.Module):
    """A number above 0, learned through its logarithm; 1 at first."""

    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        return self.log.exp()


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


class EnsembleCritic(nn.Module):
    """E independent Q(s, a): [B, obs_dim], [B, act_dim] -> [E, B], or of the first `members` alone."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int, hidden_layers: int, ensemble: int = 2):
        super().__init__()
        sizes = [obs_dim + act_dim] + [hidden_dim] * hidden_layers + [1]
        self.layers = nn.ModuleList(EnsembleLinear(ensemble, i, o) for i, o in zip(sizes, sizes[1:]))
        self.ensemble = ensemble

    def forward(self, observations: Tensor, actions: Tensor, members: int | None = None) -> Tensor:
        x = torch.cat([observations, actions], -1).expand(members or self.ensemble, -1, -1)  # [E, B, inputs]
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x).squeeze(-1)


# ------------------------------- From the data to the score, in two phases -------------------------------


UNKNOWN = -1e30  # V of an episode under way: below every Q


def returns_to_go(rewards: np.ndarray, terminated: bool, discount: float) -> np.ndarray:
    """V [T] of an episode's states by its rewards [T], in the learner's units."""
    always_the_same = rewards[0] < 0 and np.ptp(rewards) == 0 and not terminated
    if always_the_same and discount < 1:  # and so it would have gone on
        return np.full(len(rewards), rewards[0] / (1 - discount), np.float32)
    values, value = np.zeros(len(rewards), np.float32), 0.0
    for step in reversed(range(len(rewards))):
        value = float(rewards[step]) + discount * value  # (8)
        values[step] = value
    return values


def set_returns(buffer: "OnlineBuffer", steps: int, discount: float) -> None:
    """V of the last `steps` rows, an episode that has just ended."""
    rows = torch.arange(buffer.added - min(steps, buffer.size), buffer.added) % buffer.size
    rewards = buffer.columns["rewards"][rows].cpu().numpy()
    values = returns_to_go(rewards, buffer.columns["terminations"][rows[-1]] == 1, discount)
    buffer.columns["returns_to_go"][rows] = torch.as_tensor(values, device=buffer.columns["rewards"].device)


def train(config: Config) -> None:
    """All that this script does, in order; what the run's folder already holds is not done again."""
    run = Run(config, config.dataset)
    if run.info.get("status") == "finished":
        print(f"{run.folder} is finished: {run.info['result']}")
        return

    device = set_up_torch(config)
    dataset = load_dataset(config.dataset)
    environments = make_environments(dataset, config.environment)
    if environments is None:
        raise UserError("this script also learns online: name an environment with --environment")
    check_memory(dataset, device)
    episodes, dataset_hash = read_episodes(dataset)
    factor, shift = reward_factor(episodes, config), config.reward_shift
    scale_rewards(episodes, factor, shift, normalize=False)
    scaler = fit_scaler(episodes, environments.single_action_space, config.normalize_states).to(device)
    learner = CalQL(config, scaler)
    if config.start_from and not Path(run.folder, "checkpoint.pt").exists():  # else it is in there
        take_over(learner, config)
    data = transitions(episodes, scaler)
    values = [returns_to_go(e["rewards"], e["terminations"][-1] == 1, config.discount) for e in episodes]
    data["returns_to_go"] = torch.as_tensor(np.concatenate(values), device=device)  # [N]
    known = dataset.storage.metadata
    references = known.get("ref_min_score", config.ref_min), known.get("ref_max_score", config.ref_max)

    explorer = OnlineExplorer(make_online_environment(environments), scaler, config.seed, factor, shift)
    buffer = OnlineBuffer(data, min(config.buffer_size, config.online_steps))
    learner.explorer, learner.buffer = explorer, buffer  # parts of the checkpoint
    last = config.updates + config.online_steps * config.updates_per_step
    compiled = config.compile and compile_methods(learner, "critic_loss", "actor_loss")
    with run.start(learner, dataset_hash=dataset_hash, compiled=compiled, **provenance(device)):
        batches = draw_batches(data, config.batch_size, config.seed, learner.updates)
        for update in tqdm(range(learner.updates + 1, config.updates + 1), desc="offline", disable=None):
            metrics = learner.update(next(batches))
            if run.is_due(update, config.log_every):
                run.log(update, metrics | {"actor/support_gap": support_gap(learner.act, data, scaler)})
            if run.is_due(update, config.eval_every):
                assess(run, learner, environments, "offline", references)
            run.save_when_due(learner)
        if "eval/return_mean" not in run.metrics.get(config.updates, {}):  # another run made these updates
            assess(run, learner, environments, "offline", references)

        due, batches = False, mix_batches(data, buffer, config, learner.updates)
        for update in tqdm(range(learner.updates + 1, last + 1), desc="online", disable=None):
            if (update - config.updates - 1) % config.updates_per_step == 0:
                buffer.add(explorer.step(lambda s: learner.actor.sample(s)[0]) | {"returns_to_go": UNKNOWN})
                if explorer.between_episodes:
                    set_returns(buffer, len(explorer.rewards), config.discount)
            metrics = learner.update(next(batches))
            evaluated = update == last or run.is_due(update, config.eval_every)
            if evaluated or run.is_due(update, config.log_every):
                run.log(update, metrics | explorer.report(run.metrics))
            if evaluated:
                assess(run, learner, environments, "online", references)
            due = save_between_episodes(run, learner, due)
        run.save(learner)
        assess(run, learner, environments, "final", references)
        run.note(**online_record(run, explorer, references, last))
        run.finish()


def load(folder: str, device: str = "cpu") -> CalQL:
    """The policy of a run: `load(folder).act(observation)` takes raw observations, one or a batch."""
    config = parse_config([f"--config_path={folder}/config.yaml"])
    checkpoint = read_saved(Path(folder, "checkpoint.pt"))
    del checkpoint["state"]["buffer"], checkpoint["state"]["explorer"]  # a policy has no need of them
    learner = CalQL(config, Scaler(**checkpoint["state"]["scaler"]).to(device))
    restore(learner, checkpoint)
    return learner


# -------------------- Toolbox: the same in every script that has it, word for word --------------------


# --------------- Online: one environment, and what is learnt from it (scripts of finetune/) ---------------


def make_online_environment(environments: gym.vector.VectorEnv) -> gym.Env:
    """One more environment like those of the evaluation, to learn in."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("tempfile.tempdir", folder):  # as they are made
        return gym.make(environments.envs[0].spec)


def reward_factor(episodes: list, config: Config) -> float:
    """What rewards are multiplied by, online as in the data: normalised by the returns of the data."""
    if not config.normalize_rewards:
        return config.reward_scale
    returns = [episode["rewards"].sum(dtype=np.float64) for episode in episodes]
    return config.reward_scale * 1000 / max(np.ptp(returns), 1e-6)


class OnlineBuffer:
    """The last `size` online transitions in the learner's units: the columns of `data`, on its device."""

    def __init__(self, data: dict[str, Tensor], size: int):
        row, device = sum(column[0].nbytes for column in data.values()), data["rewards"].device
        cuda = device.type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
        if size * row > free:
            needed = f"{size:,} transitions need {size * row / 1e9:,.1f} GB of memory"
            raise UserError(f"buffer_size: {needed}; {free / 1e9:,.1f} GB are free")
        self.columns = {name: column.new_zeros(size, *column.shape[1:]) for name, column in data.items()}
        self.size, self.added = size, 0

    def add(self, row: dict) -> None:
        """One transition; where the buffer is full the oldest gives way."""
        for name, column in self.columns.items():
            column[self.added % self.size] = torch.as_tensor(row[name])
        self.added += 1

    def draw(self, count: int) -> dict[str, Tensor]:
        """`count` transitions, drawn with replacement."""
        rows = torch.randint(min(self.added, self.size), (count,), device=self.columns["rewards"].device)
        return {name: column.index_select(0, rows) for name, column in self.columns.items()}

    def state_dict(self) -> dict:
        """For the checkpoint: only what is filled."""
        filled = {name: column[: self.added].clone() for name, column in self.columns.items()}
        return {"added": self.added, "columns": filled}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for name, filled in state["columns"].items():
            self.columns[name][: len(filled)] = filled


class OnlineExplorer:
    """One environment through which a policy steps. Where episode n starts depends on the seed and n alone.

    An environment in the middle of an episode cannot be saved: checkpoints are made `between_episodes`.
    """

    def __init__(self, environment: gym.Env, scaler: "Scaler", seed: int, factor: float, shift: float):
        self.environment, self.scaler, self.seed = environment, scaler, seed
        self.factor, self.shift = factor, shift  # of the rewards that the learner sees
        self.steps, self.between_episodes = 0, True
        self.returns, self.successes = [], []  # of finished episodes; a success is None where none is known

    def step(self, policy: Callable[[Tensor], Tensor]) -> dict:
        """One step of `policy`, [1, obs_dim] -> [1, act_dim] in the learner's units; the row of a buffer."""
        advice = "mend it; the same command goes on from the last checkpoint"
        with explain(f"the environment failed before online step {self.steps + 1:,}", advice):
            if self.between_episodes:
                seed = np.random.SeedSequence((self.seed, len(self.returns), 2)).generate_state(1)
                self.observation, _ = self.environment.reset(seed=int(seed[0]))
                self.between_episodes, self.rewards, self.success = False, [], None
        before = self.scaler.scale_observations(self.observation)
        with torch.no_grad():
            action = policy(before[None])[0]
        if not action.isfinite().all():  # the environment would answer with nan, and get the blame
            raise Diverged("diverged: the policy's actions are not finite; lower a learning rate")
        with explain(f"the environment failed at online step {self.steps + 1:,}", advice):
            outcome = self.environment.step(self.scaler.unscale_actions(action))
        self.observation, reward, terminated, truncated, info = outcome
        self.steps += 1
        self.rewards.append(float(reward))
        if "success" in info:
            self.success = max(self.success or 0.0, float(info["success"]))
        if terminated or truncated:
            self.between_episodes = True
            self.returns.append(sum(self.rewards))
            self.successes.append(self.success)
        return {
            "observations": before,  # [obs_dim]
            "actions": action,  # [act_dim]
            "rewards": self.factor * float(reward) + self.shift,
            "next_observations": self.scaler.scale_observations(self.observation),  # of the same episode
            "terminations": float(terminated),  # a time limit is none
        }

    def report(self, metrics: dict[int, dict]) -> dict[str, float]:
        """For metrics.csv: steps and episodes so far; means of the episodes since the row before."""
        reported = int(max((row.get("online/episodes", 0) for row in metrics.values()), default=0))
        known = [success for success in self.successes[reported:] if success is not None]
        row = {"online/steps": self.steps, "online/episodes": len(self.returns)}
        if self.returns[reported:]:
            row["online/return"] = np.mean(self.returns[reported:])
        if known:
            row["online/success"] = np.mean(known)
        return row

    def state_dict(self) -> dict:
        return {"steps": self.steps, "returns": [*self.returns], "successes": [*self.successes]}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        self.returns, self.successes = [*state["returns"]], [*state["successes"]]


def mix_batches(data: dict[str, Tensor], buffer: OnlineBuffer, config: Config, update: int) -> Iterator[dict]:
    """Batches of which `online_fraction` is from the buffer, and the rest from the data."""
    online = round(config.online_fraction * config.batch_size)
    for rows in draw_batches(data, config.batch_size - online, config.seed, update):
        own = buffer.draw(online)
        yield {name: torch.cat([rows[name], own[name]]) for name in data}


def take_over(learner, config: Config) -> None:
    """Networks and optimisers of `start_from`, a finished run of this algorithm on the same data.

    Step sizes stay those of the config: a schedule may have brought the other run's to 0.
    """
    folder = Path(config.start_from).resolve()
    if not (folder / "checkpoint.pt").exists():
        raise UserError(f"start_from: there is no run with a checkpoint in {folder}")
    info, checkpoint = read_saved(folder / "run.json"), read_saved(folder / "checkpoint.pt")
    theirs = info["config"] | {"updates": checkpoint["updates"]}
    if f"/{Path(__file__).stem}/{theirs['dataset']}/" not in f"{folder}" or info["status"] != "finished":
        raise UserError(f"start_from: {folder} is no finished run of {Path(__file__).stem}")
    same = ("dataset", "updates", "hidden_dim", "hidden_layers", "normalize_states", "normalize_rewards",
            "reward_scale", "reward_shift")
    other = [f"{name} {theirs.get(name)}" for name in same if theirs.get(name) != getattr(config, name)]
    if other:
        raise UserError(f"start_from: {folder} has {', '.join(other)}: this config has to agree")
    parts = vars(learner)
    with explain("start_from: the checkpoint does not fit this script", "take one of the same commit"):
        for name, state in checkpoint["state"].items():
            if isinstance(parts.get(name), torch.optim.Optimizer):
                state["param_groups"] = parts[name].state_dict()["param_groups"]
            if name in parts:
                parts[name].load_state_dict(state)
    learner.updates = checkpoint["updates"]


def assess(run: "Run", learner, environments: gym.vector.VectorEnv, phase: str, references: tuple) -> None:
    """An evaluation for the record: offline, online or final, which has seeds of its own."""
    config, final = run.config, phase == "final"
    episodes = config.final_eval_episodes if final else config.eval_episodes
    with explain(f"the environment failed in an evaluation ({phase})", "mend it; the same command goes on"):
        table = evaluate(learner.act, environments, episodes, (config.seed, learner.updates, int(final)))
    run.log_episodes(learner.updates, phase, table, references)


def save_between_episodes(run: "Run", learner, due: bool) -> bool:
    """Saves where a checkpoint is due and no episode is under way; whether one stays due."""
    due = due or run.is_due(learner.updates, run.config.checkpoint_every)
    if not learner.explorer.between_episodes:
        return due
    if due and not run.interrupted:
        run.save(learner)
    else:
        run.save_when_due(learner)
    return False


def online_record(run: "Run", explorer: OnlineExplorer, references: tuple, last: int) -> dict:
    """For run.json, null where unknown: the score at the switch, the lowest in the first tenth of the updates
    after it, and the regret: the mean over training episodes of 1 - success, or else of 1 - score / 100. With
    them what each of these episodes came to.
    """
    switch = run.config.updates
    scores = {update: row["eval/score"] for update, row in run.metrics.items() if "eval/score" in row}
    early = [scores[update] for update in scores if switch < update <= switch + (last - switch) / 10]
    regrets = [1 - success for success in explorer.successes if success is not None]
    if not regrets and None not in references:
        low, high = references
        regrets = [1 - (value - low) / (high - low) for value in explorer.returns]
    return {
        "score_at_switch": scores.get(switch),
        "lowest_score_after_switch": min(early, default=None),
        "regret": float(np.mean(regrets)) if regrets else None,
        "online_returns": [*explorer.returns],
        "online_successes": [*explorer.successes],
    }


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


def set_up_torch(config: Config) -> torch.device:
    """Seeds torch, sets its threads and precision, and finds the device."""
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.set_flush_denormal(True)  # Adam's moments of idle weights end in denormals: slow to compute with
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    cpu = torch.cpu.get_capabilities()  # medium is oneDNN's products there; AMX alone rounds them
    best = "medium" if auto == "cpu" and cpu.get("avx512_bw") and not cpu.get("amx_bf16") else "highest"
    torch.set_float32_matmul_precision(best if config.precision == "auto" else config.precision)
    with explain(f"device: cannot use {config.device}", "see --device"):
        return torch.zeros(1, device=auto if config.device == "auto" else config.device).device


class CudaGraph:
    """`learn` of a learner on a GPU: what its Python launched one by one is launched again at a stroke.

    A graph serves inputs of one shape, one choice of the other arguments and the optimisers of its time,
    after three eager calls that set up what must exist before. The next call overwrites what one returns.
    """

    def __init__(self, learner):
        torch.cuda.set_device(optimizers(learner)[0].param_groups[0]["params"][0].device)  # graphs go there
        self.learner, self.learn, self.stream = learner, learner.learn, torch.cuda.Stream()
        self.calls, self.graphs = {}, {}

    def __call__(self, *inputs) -> dict[str, Tensor]:
        entries, steppers = [leaf for each in inputs for leaf in leaves(each)], optimizers(self.learner)
        kind = *steppers, *(entry.shape if isinstance(entry, Tensor) else entry for entry in entries)
        self.calls[kind] = self.calls.get(kind, 0) + 1
        if self.calls[kind] <= 3:
            return self.set_up(steppers, *inputs)
        if kind not in self.graphs:
            self.graphs[kind] = self.capture(*inputs)
        graph, read, result = self.graphs[kind]
        torch._foreach_copy_(read, [entry for entry in entries if isinstance(entry, Tensor)])
        graph.replay()
        return result

    def set_up(self, steppers: list[torch.optim.Optimizer], *inputs) -> dict[str, Tensor]:
        for group in [group for optimizer in steppers for group in optimizer.param_groups]:
            lr = torch.as_tensor(group["lr"], device=group["params"][0].device)  # schedules write there
            group |= {"capturable": True, "lr": lr}
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.learn(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, *inputs) -> tuple[torch.cuda.CUDAGraph, list[Tensor], dict[str, Tensor]]:
        """The graph, the tensors that it reads, and those that it writes its result to."""
        read, graph = copy.deepcopy(inputs), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            result = self.learn(*read)
        return graph, [leaf for each in read for leaf in leaves(each) if isinstance(leaf, Tensor)], result


def optimizers(learner) -> list[torch.optim.Optimizer]:
    return [part for part in vars(learner).values() if isinstance(part, torch.optim.Optimizer)]


def compile_methods(learner, *names: str) -> bool:
    """Compiles these methods, on a GPU `learn` becomes a CUDA graph; all stays where there is no compiler."""
    headers = Path(sys.base_prefix).glob(f"include/python3.{sys.version_info.minor}*/Python.h")
    if not (shutil.which(os.environ.get("CXX", "g++")) and any(headers)):
        print("no g++ or no python3-dev here: the losses are not compiled, which is slower", file=sys.stderr)
        return False
    options = {"fallback_random": True}  # eager's numbers are faster here, and the same as uncompiled
    for name in names:
        setattr(learner, name, torch.compile(getattr(learner, name), dynamic=False, options=options))
    if optimizers(learner)[0].param_groups[0]["params"][0].is_cuda:
        learner.learn = CudaGraph(learner)
    return True


# ---------------------------------- Data: from episodes to batches ----------------------------------


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


def read_episodes(dataset: minari.MinariDataset) -> tuple[list[dict[str, np.ndarray]], str]:
    """The episodes as float32 arrays, each checked, and the hash of all that was recorded.

    An episode of T steps has observations [T + 1, obs_dim], actions [T, act_dim], rewards and terminations
    [T]. A truncation is no termination.
    """
    shapes = {"observations": vector_shapes(dataset.observation_space)}
    shapes |= {"actions": vector_shapes(dataset.action_space), "rewards": [()], "terminations": [()]}
    episodes, digest = [], hashlib.sha256()
    for recorded in dataset.iterate_episodes():
        where, steps = f"{dataset.id}, episode {recorded.id}", len(recorded.rewards)
        for field in (*shapes, "truncations"):
            length = steps + 1 if field == "observations" else steps
            for array, shape in zip(leaves(getattr(recorded, field)), shapes.get(field, [()]), strict=True):
                if steps == 0 or array.shape != (length, *shape):
                    raise UserError(f"{where} is malformed: {steps} steps, {field} of shape {array.shape}")
                if not np.isfinite(array.astype(np.float32)).all():
                    raise UserError(f"{where}: {field} are not all finite")
                digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        episodes.append({field: flatten(getattr(recorded, field)) for field in shapes})
    steps = sum(len(episode["rewards"]) for episode in episodes)
    if steps == 0 or steps != dataset.total_steps:
        raise UserError(f"{dataset.id} lacks steps: {steps:,} of {dataset.total_steps:,}; get it anew")
    return episodes, digest.hexdigest()


def check_memory(dataset: minari.MinariDataset, device: torch.device, copies: int = 6) -> None:
    """An error where data do not fit: `copies` of observations (two a transition), three of all else."""
    spaces = leaves(dataset.observation_space) * copies + leaves(dataset.action_space) * 3
    sizes = [math.prod(space.shape or ()) * min(np.dtype(space.dtype).itemsize, 4) for space in spaces]
    needed = dataset.total_steps * (sum(sizes) + 24)  # with two float32 of every step
    free, limit = psutil.virtual_memory().available, Path("/sys/fs/cgroup/memory.max")  # a container's
    if limit.exists() and limit.read_text() != "max\n":
        usage = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
        free = min(free, int(limit.read_text()) - int(usage["anon"]))
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    if needed > free:
        raise UserError(f"{dataset.id} needs {needed / 1e9:,.1f} GB of memory; {free / 1e9:,.1f} GB are free")


def leaves(tree) -> list:
    """The entries of a Dict in the order of its sorted keys, however deep; anything else is its own leaf."""
    if isinstance(tree, Mapping):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [tree]


def flatten(tree) -> np.ndarray:
    """An array as float32; the leaves of a Dict side by side: [..., obs_dim]."""
    return np.concatenate([np.asarray(leaf, np.float32) for leaf in leaves(tree)], axis=-1)


def vector_shapes(space: gym.Space) -> list[tuple]:
    """Shapes of the vectors that an element of `space` consists of."""
    for leaf in leaves(space):
        if not isinstance(leaf, gym.spaces.Box) or len(leaf.shape) != 1:
            raise UserError(f"this script is not for {leaf}: it takes vectors (Box)")
    return [leaf.shape for leaf in leaves(space)]


class Scaler(nn.Module):
    """From the environment's units to the learner's: observations standardised, actions in [-1, 1]."""

    def __init__(self, mean, std, low, high):
        super().__init__()
        self.obs_dim, self.act_dim = len(mean), len(low)
        for name, value in {"mean": mean, "std": std, "low": low, "high": high}.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32))

    def scale_observations(self, observations) -> Tensor:
        raw = flatten(observations)
        if raw.shape[-1:] != self.mean.shape or not np.isfinite(raw).all():
            raise UserError(f"observations {raw.shape}: not all are finite numbers [..., {self.obs_dim}]")
        return (torch.as_tensor(raw, device=self.mean.device) - self.mean) / self.std

    def scale_actions(self, actions) -> Tensor:
        actions = torch.as_tensor(actions, device=self.low.device)
        return 2 * (actions - self.low) / (self.high - self.low).clamp(min=1e-6) - 1

    def unscale_actions(self, actions: Tensor) -> np.ndarray:
        return (self.low + (actions + 1) / 2 * (self.high - self.low)).cpu().numpy()


def fit_scaler(episodes: list, space: gym.spaces.Box, normalize_states: bool) -> Scaler:
    """Actions by the bounds of their space, else by the data's extremes; states by mean and deviation."""
    if not isinstance(space, gym.spaces.Box):
        raise UserError(f"this script is not for {space}: it takes vectors (Box)")
    observations = np.concatenate([episode["observations"][:-1] for episode in episodes])
    actions = np.concatenate([episode["actions"] for episode in episodes])
    low = np.where(np.isfinite(space.low), space.low, actions.min(0)).astype(np.float32)
    high = np.where(np.isfinite(space.high), space.high, actions.max(0)).astype(np.float32)
    print(f"{((actions < low) | (actions > high)).mean():.2%} of the action entries are clipped to bounds")
    mean, std = np.zeros(observations.shape[1]), np.ones(observations.shape[1])
    if normalize_states:
        mean, std = observations.mean(0, np.float64), observations.std(0, np.float64) + 1e-3
    return Scaler(mean, std, low, high)


def transitions(episodes: list, scaler: Scaler) -> dict[str, Tensor]:
    """All N steps in the learner's units, on the scaler's device; none leads from one episode to another."""
    steps = {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}
    before = np.concatenate([episode["observations"][:-1] for episode in episodes])
    after = np.concatenate([episode["observations"][1:] for episode in episodes])
    return {
        "observations": scaler.scale_observations(before),  # [N, obs_dim]
        "actions": scaler.scale_actions(steps["actions"]).clamp(-1, 1),  # [N, act_dim]
        "rewards": torch.as_tensor(steps["rewards"], device=scaler.mean.device),  # [N]
        "next_observations": scaler.scale_observations(after),  # [N, obs_dim]
        "terminations": torch.as_tensor(steps["terminations"], device=scaler.mean.device),  # [N]
    }


def scale_rewards(episodes: list, scale: float, shift: float, normalize: bool) -> None:
    """r <- scale r + shift in every step; `normalize` first multiplies by 1000 / (best - worst return)."""
    if normalize:
        returns = [episode["rewards"].sum(dtype=np.float64) for episode in episodes]
        scale *= 1000 / max(np.ptp(returns), 1e-6)
    for episode in episodes:
        episode["rewards"] = np.float32(scale * episode["rewards"] + shift)


def draw_batches(data: dict[str, Tensor], batch_size: int, seed: int, update: int) -> Iterator[dict]:
    """Batches `update`, `update` + 1, ...: rows drawn with replacement, by seed and batch number alone."""
    first = next(iter(data.values()))
    while True:
        block, start = divmod(update, 1000)  # the rows of 1000 batches are drawn at a time
        rows = np.random.default_rng((seed, block)).integers(len(first), size=(1000, batch_size))
        for batch_rows in torch.as_tensor(rows, device=first.device)[start:]:
            yield {name: column.index_select(0, batch_rows) for name, column in data.items()}
        update += 1000 - start


# ------------------------------- Evaluation: what the policy earns -------------------------------


def make_environments(dataset: minari.MinariDataset, name: str | None) -> gym.vector.VectorEnv | None:
    """Ten environments side by side: `name`, else the dataset's own, bare if its wrappers fail; or None."""
    with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):  # it prints a notice
        gym.register_envs(importlib.import_module("gymnasium_robotics"))  # mazes, hands and kitchen
    spec = name or dataset._eval_env_spec or dataset.env_spec
    if spec is None:
        print("no environment to evaluate in (see --environment)")
        return None
    kwargs = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP, "copy": False}
    make = partial(gym.make_vec, num_envs=10, vectorization_mode="sync", vector_kwargs=kwargs)
    said = f"evaluated in {name or spec.id}"
    with (
        explain(f"cannot make {name or spec.id}", "name one to evaluate in with --environment"),
        tempfile.TemporaryDirectory() as folder,
        mock.patch("tempfile.tempdir", folder),  # where mazes leave an XML file each
    ):
        try:
            environments = make(spec)
        except Exception as error:
            if name or not spec.additional_wrappers:
                raise
            environments = make(dataclasses.replace(spec, additional_wrappers=()))
            said += f", without its recorded wrappers: {error!r:.100}"
    print(said)
    theirs = environments.single_observation_space, environments.single_action_space
    ours = dataset.observation_space, dataset.action_space
    ours, theirs = tuple(map(gym.spaces.flatdim, ours)), tuple(map(gym.spaces.flatdim, theirs))
    if ours != theirs:
        problem = f"observations and actions are of sizes {ours} in {dataset.id}, {theirs} in the environment"
        raise UserError(f"{problem}: name one that fits with --environment")
    return environments


def evaluate(act: Callable, environments: gym.vector.VectorEnv, episodes: int, seed: tuple) -> pd.DataFrame:
    """A row an episode: return, length, success (nan if the environment knows none); by `seed` alone.

    Every environment plays one episode a round; one that ends early plays on, uncounted, so that the policy's
    batch keeps its size, on which the last bits of an action depend.
    """
    count, rounds = environments.num_envs, []
    seeds = np.random.SeedSequence(seed).generate_state(episodes + count).tolist()
    numpy_state = np.random.get_state()  # noqa: NPY002  of its global generator: OGBench's mazes draw from it
    with torch.random.fork_rng():  # training goes on as if nothing had been evaluated
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
        np.random.seed(seeds[-1])  # noqa: NPY002
        for first in range(0, episodes, count):
            observations, _ = environments.reset(seed=seeds[first : first + count])
            returns, lengths = np.zeros(count), np.zeros(count, int)
            running, success = np.ones(count, bool), np.full(count, math.nan)
            while running.any():
                observations, rewards, terminations, truncations, infos = environments.step(act(observations))
                ended = terminations | truncations
                last = infos.get("final_info", {})  # of an episode's last step; `infos` is the next one's
                reported = np.where(ended, last.get("success", math.nan), infos.get("success", math.nan))
                success = np.where(running, np.fmax(success, reported.astype(float)), success)  # of any step
                returns += running * rewards
                lengths += running
                running &= ~ended
            rounds.append(pd.DataFrame({"return": returns, "length": lengths, "success": success}))
    np.random.set_state(numpy_state)  # noqa: NPY002
    table = pd.concat(rounds, ignore_index=True)[:episodes]
    return table.fillna({"success": 0.0}) if table["success"].notna().any() else table  # told none: had none


def support_gap(act: Callable, data: dict[str, Tensor], scaler: Scaler) -> float:
    """Mean distance, in [-1, 1] units, of the policy's actions from the data's on 1,024 fixed rows."""
    rows = np.random.default_rng(0).integers(len(data["actions"]), size=1024)
    observations = data["observations"][rows] * scaler.std + scaler.mean
    gap = scaler.scale_actions(act(observations.cpu())) - data["actions"][rows]
    return float(gap.norm(dim=1).mean())


# ------------------------- The run: its folder, its record and its checkpoint -------------------------


class Run:
    """The folder of one run, its lock, record and checkpoint (docs/runs.md)."""

    # These do not change the outcome: a run goes on although they differ.
    FREE = ("device", "threads", "log_every", "checkpoint_every", "wandb_mode", "wandb_project", "output_dir")

    def __init__(self, config: Config, source: str):
        script = Path(__file__).resolve()
        self.config, self.group = config, f"{script.stem}/{source}/{config.variant}"
        if ".." in Path(self.group).parts or "/" in config.variant or config.variant in ("", "."):
            raise UserError(f"{self.group} would lead out of its folder: mend the variant or the dataset")
        self.folder = Path(config.output_dir, script.parent.name, self.group, f"seed-{config.seed}")
        self.lock = filelock.FileLock(self.folder / "lock", timeout=0)
        self.metrics, self.evaluations = {}, []  # rows of the CSV files, those of metrics by their update
        self.wandb, self.interrupted = None, False
        self.info = self.read_info()

    def read_info(self) -> dict:
        """run.json of earlier starts, if this run may go on from them; empty before the first."""
        if not (self.folder / "run.json").exists():
            return {}
        info, new = read_saved(self.folder / "run.json"), dataclasses.asdict(self.config)
        old = info["config"]
        changed = [name for name in new if name not in self.FREE and old.get(name) != new[name]]
        if changed:
            fields = ", ".join(f"{name} {old.get(name)} -> {new[name]}" for name in changed)
            raise UserError(f"{self.folder} is a run of another config: {fields}; take another --variant")
        if info["status"] == "diverged":
            raise Diverged(f"{self.folder} has {info['result']}, under another --variant")
        return info

    @contextlib.contextmanager
    def start(self, learner, **facts):
        """Around the training loop: what was saved is restored first, and how it ended is noted."""
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise UserError(f"another process is at work in {self.folder}") from None
        self.info, seconds = self.read_info(), 0.0
        if (self.folder / "checkpoint.pt").exists():
            saved = read_saved(self.folder / "checkpoint.pt")
            restore(learner, saved)
            self.metrics, self.evaluations, seconds = map(saved.get, ("metrics", "evaluations", "seconds"))
            torch.set_rng_state(saved["rng"])
            torch.cuda.set_rng_state_all(saved["cuda_rng"])
            if self.info.get("dataset_hash") != facts.get("dataset_hash"):
                raise UserError(f"{self.folder} learned from other data of this name: take another --variant")
            print(f"resumed at update {learner.updates:,}")
            for key in [key for key in facts if self.info.get(key) != facts[key]]:
                print(f"resumed with {key} {facts[key]}, begun with {self.info.get(key)}: maybe other bits")
            facts["commit"] = " ".join(dict.fromkeys([*self.info.get("commit", "").split(), facts["commit"]]))
        self.saved = self.printed = self.mark = time.perf_counter()
        self.began, self.marked = self.mark - seconds, learner.updates
        config = dataclasses.asdict(self.config)
        identity = json.dumps({name: value for name, value in config.items() if name not in self.FREE})
        facts["config_hash"] = hashlib.sha256(identity.encode()).hexdigest()
        self.write("config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
        self.note(status="running", result="not finished", config=config, **facts)
        self.write_tables()
        handler = signal.signal(signal.SIGINT, self.interrupt)
        try:
            yield
        except Exception as error:  # after Ctrl-C the status is still running
            self.note(status="diverged" if isinstance(error, Diverged) else "failed", result=f"{error}"[:300])
            raise
        finally:
            signal.signal(signal.SIGINT, handler)
            self.lock.release()

    def interrupt(self, *_) -> None:
        """Ctrl-C: the run ends when the update under way is done and saved; a second one ends it at once."""
        print("\nends after the update under way (online: the episode), which is saved", flush=True)
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def write(self, name: str, content: bytes) -> None:
        """All of it or nothing, whenever the process is killed or the disk is full."""
        new = self.folder / f"{name}.new"
        try:
            new.write_bytes(content)
            new.replace(self.folder / name)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise UserError(f"cannot write {new}: {error.strerror}; mend it and run the same again") from None

    def note(self, **info) -> None:
        """Writes into run.json what is known of the run."""
        self.info |= info
        self.write("run.json", json.dumps(self.info, indent=1).encode())

    def write_tables(self) -> None:
        """metrics.csv, a row an update, and evaluations.csv, a row an episode."""
        for name, rows in {"metrics": [*self.metrics.values()], "evaluations": self.evaluations}.items():
            table = pd.DataFrame(rows, columns=None if rows else ["update"])
            self.write(f"{name}.csv", table.to_csv(index=False).encode())

    def is_due(self, update: int, every: int) -> bool:
        return update % every == 0 or update == self.config.updates

    def log(self, update: int, metrics: Mapping[str, Tensor | float]) -> None:
        """More of this update's row in metrics.csv; where a value is not finite, the run ends."""
        row = {"update": update, **{name: float(value) for name, value in metrics.items()}}
        lost = ", ".join(name for name, value in row.items() if not math.isfinite(value))
        if lost:
            raise Diverged(f"diverged by update {update}: {lost} not finite; lower a learning rate")
        now = time.perf_counter()
        if now - self.printed > 60 and not sys.stderr.isatty():  # there is no progress bar
            print(f"update {update:,}", flush=True)
            self.printed = now
        if update > self.marked:  # evaluations do not count
            row["time/updates_per_second"] = (update - self.marked) / (now - self.mark)
        row["time/wall_seconds"] = now - self.began
        self.metrics[update] = self.metrics.get(update, {}) | row
        self.write_tables()
        self.mirror(row)
        self.mark, self.marked = time.perf_counter(), update

    def log_episodes(self, update: int, phase: str, episodes: pd.DataFrame, references: tuple) -> None:
        """An evaluation; `references` are the returns that score 0 and 100, None where unknown."""
        table = episodes.reset_index(names="episode").assign(update=update, phase=phase)
        self.evaluations += table[["update", "phase", "episode", *episodes]].to_dict("records")
        (low, high), mean = references, episodes.mean().tolist()
        score = math.nan if None in references else 100 * (mean[0] - low) / (high - low)
        result = {"score": score, "return_mean": mean[0], "return_std": episodes["return"].std(ddof=0)}
        result |= {"length_mean": mean[1], "success": mean[2]}
        known = {name: float(value) for name, value in result.items() if not math.isnan(value)}
        shown = ", ".join(f"{name} {value:.2f}" for name, value in known.items())
        tqdm.write(f"update {update:,}, {phase} evaluation: {shown}")
        if phase == "final":
            self.info |= dict.fromkeys(result) | known  # null where unknown
            self.write_tables()
            self.mirror({"update": update, **{f"final/{name}": value for name, value in known.items()}})
        else:
            self.log(update, {f"eval/{name}": value for name, value in known.items()})

    def mirror(self, row: dict) -> None:
        """To wandb, which is no record: where it fails, the run goes on without it."""
        if self.config.wandb_mode == "disabled":
            return
        try:
            import wandb  # takes seconds

            if self.wandb is None:
                self.note(wandb_id=self.info.get("wandb_id", os.urandom(4).hex()))
                self.wandb = wandb.init(
                    project=self.config.wandb_project, group=self.group, name=f"seed-{self.config.seed}",
                    config=self.info["config"], mode=self.config.wandb_mode, dir=self.folder,
                    id=self.info["wandb_id"], resume="allow", settings=wandb.Settings(silent=True))
            self.wandb.log(row, step=row["update"])
        except Exception as error:
            print(f"wandb failed, and the run goes on without it: {error!r:.200}", file=sys.stderr)
            self.config.wandb_mode = "disabled"

    def save_when_due(self, learner) -> None:
        """A checkpoint every `checkpoint_every` updates, every ten minutes and before Ctrl-C ends the run."""
        late = time.perf_counter() - self.saved > 600
        if self.is_due(learner.updates, self.config.checkpoint_every) or late or self.interrupted:
            self.save(learner)
        if self.interrupted:
            raise KeyboardInterrupt

    def save(self, learner) -> None:
        """Everything from which the run goes on to the same bits, if it is finite."""
        parts = {name: part for name, part in vars(learner).items() if hasattr(part, "state_dict")}
        state = {name: part.state_dict() for name, part in parts.items()}
        if not all(leaf.isfinite().all() for leaf in leaves(state) if isinstance(leaf, Tensor)):
            raise Diverged("diverged: weights not finite; lower a learning rate")
        self.saved = time.perf_counter()
        rng = {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
        tables = {"metrics": self.metrics, "evaluations": self.evaluations}
        checkpoint = {"updates": learner.updates, "state": state, "seconds": self.saved - self.began}
        buffer = io.BytesIO()
        torch.save(checkpoint | rng | tables, buffer)
        self.write("checkpoint.pt", buffer.getvalue())

    def finish(self) -> None:
        """Notes what the run came to: its final evaluation, if there was one, and the best on the way."""
        table, result = pd.DataFrame(self.metrics.values()), "not evaluated"
        if "score" in self.info:
            kind = "return_mean" if self.info["score"] is None else "score"
            best = table[f"eval/{kind}"].max()
            self.info["best_score"] = best if kind == "score" else None
            result = f"{kind} {self.info[kind]:.1f} (best on the way, chosen with the simulator: {best:.1f})"
        speed, seconds = table["time/updates_per_second"].median(), time.perf_counter() - self.began
        self.note(status="finished", result=result, wall_seconds=seconds, updates_per_second=speed)
        print(f"{self.folder}: {result}")


def read_saved(file: Path) -> dict:
    """run.json or checkpoint.pt of a run; an error where it is damaged."""
    with explain(f"cannot read {file}", f"remove {file.parent} to start anew"):
        if file.suffix == ".json":
            saved, kinds = json.loads(file.read_text()), {"config": dict, "status": str, "result": str}
        else:
            damaged = zipfile.ZipFile(file).testzip()  # torch.load does not look at the sums
            if damaged:
                raise ValueError(f"{damaged} is damaged")
            saved = torch.load(file, map_location="cpu", weights_only=True)
            kinds = {"updates": int, "state": dict, "metrics": dict, "evaluations": list, "seconds": float}
        wrong = [name for name, kind in kinds.items() if not isinstance(saved.get(name), kind)]
        if wrong:
            raise ValueError(f"no {' and no '.join(wrong)}")
    return saved


def restore(learner, checkpoint: dict) -> None:
    """Puts the states of a checkpoint into the parts of `learner` that they are named for."""
    with explain("the checkpoint does not fit this script", "take the commit that run.json names"):
        for name, state in checkpoint["state"].items():
            vars(learner)[name].load_state_dict(state)
        learner.updates = checkpoint["updates"]


def provenance(device: torch.device) -> dict:
    """Commit (with a + where files differ from it), versions and hardware, as far as they are known here."""
    here, commit = Path(__file__).resolve().parent, ""
    if shutil.which("git"):
        query = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        commit = subprocess.run(query, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    names = ("torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari")
    versions = {"python": sys.version.partition(" ")[0]}
    versions |= {each.name: each.version for each in importlib.metadata.distributions() if each.name in names}
    cpu = torch.cpu.get_capabilities().get("cpu_name", "")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    facts = {"commit": commit, "device": f"{device.type}: {hardware}", "versions": versions}
    return facts | {"threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision()}


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
    main(train)
