"""DT: the Decision Transformer (Chen et al., 2021, arXiv:2106.01345).

Imitation by a causal transformer that is told the return which each episode in the data still had to come.
Asked for a high return, it acts as episodes with high returns did. No values, nothing is bootstrapped.

  (1)  R_t = r_t + r_{t+1} + ... to the episode's end                       R_t: return-to-go
  (2)  x = R_1, s_1, a_1, R_2, s_2, a_2, ...                                K steps as tokens, each with its t
  (3)  p_t = tanh(W h(s_t))                                                 h: the transformer's outputs
  (4)  L = mean (p_t - a_t)^2                                               over real steps and action entries
  (5)  R_1 = target, R_{t+1} = R_t - r_t                                    acting

Differences from the paper: windows that an episode's end cuts short are padded on the right, where causality
hides the padding from every real token; the target is one quantile of the dataset's returns, not the better
of two given ones; steps past `timesteps` share the last embedding.

  python algorithms/offline/dt.py --config_path configs/offline/dt/reef/pointmaze/umaze-v0.yaml
"""

import collections
import contextlib
import dataclasses
import difflib
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Optional, get_args

import filelock
import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import psutil
import pyrallis
import torch
import yaml
from minari.storage import get_dataset_path
from torch import Tensor, nn
from tqdm import tqdm


def limit(default, low: float = -math.inf, high: float = math.inf, choices: tuple = ()):
    """A Config field with its own limits; without one an int is at least 1 and a float at least 0."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "choices": choices})


@dataclasses.dataclass
class Config:
    """DT. Write `null` for none and true or false for a switch."""

    dataset: str = "reef/pointmaze/umaze-v0"  # Minari id, on this machine or on the hub
    seed: int = limit(0, 0, 2**32 - 1)  # of networks, batches, noise and evaluations
    variant: str = "default"  # names these settings in the run's folder and in the tables
    updates: int = 100_000  # gradient updates
    batch_size: int = 64  # windows in an update
    context: int = 20  # K of (2): steps in a window, and the steps that the policy remembers
    actor_lr: float = 1e-4  # AdamW's step size once it is warm
    warmup_updates: int = 10_000  # updates over which the step size rises from 0, along a line
    weight_decay: float = 1e-4  # AdamW's
    gradient_norm: float = 0.25  # longer gradients are cut to this length
    dropout: float = limit(0.1, 0, 1)  # of embeddings, attention and residual branches, in training
    hidden_dim: int = 128  # size of a token
    hidden_layers: int = 3  # blocks of the transformer, one attention head each
    timesteps: int = 1000  # steps of an episode with an embedding of their own
    return_scale: float = limit(1000.0, 1e-6)  # the network sees returns-to-go divided by it
    target_quantile: float = limit(1.0, 0, 1)  # of the data's returns, to ask for: 1 is the best
    normalize_states: bool = True  # standardise observations by the dataset's mean and deviation
    environment: Optional[str] = None  # Gymnasium id to evaluate in; null: the dataset's own
    ref_min: Optional[float] = None  # return that scores 0; null: the dataset's own
    ref_max: Optional[float] = None  # return that scores 100; null: the dataset's own
    eval_every: int = 5000  # updates between evaluations
    eval_episodes: int = 10  # episodes of an evaluation along the way
    final_eval_episodes: int = 100  # episodes of the evaluation that is the score
    log_every: int = 1000  # updates between rows of metrics.csv
    checkpoint_every: int = 10_000  # updates between checkpoints
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    threads: int = limit(0, low=0)  # CPU threads; 0: torch's choice
    compile: bool = True  # compile the losses
    precision: str = limit("highest", choices=("highest", "high", "medium"))  # of float32 matrix products
    wandb_mode: str = limit("offline", choices=("offline", "online", "disabled"))  # mirror of the CSV files
    wandb_project: str = "reef"  # wandb project
    output_dir: str = "results/runs"  # where run folders go


# ----------------------------------------------- DT -----------------------------------------------


class DT:
    """Transformer, optimiser and history, and the update that trains it on windows in the learner's units.

    A window is a dict of returns_to_go [B, K], observations [B, K, obs_dim], actions [B, K, act_dim],
    timesteps [B, K] and, in training, real [B, K]: 1 within the episode, 0 beyond its end.
    """

    remembers = True  # `act` takes the rewards of the step before, too

    def __init__(self, config: Config, obs_dim: int, act_dim: int, device: torch.device):
        self.config, self.updates = config, 0
        self.units = Units(obs_dim, act_dim).to(device)
        self.actor = DecisionTransformer(config, obs_dim, act_dim).to(device)
        self.actor_optimizer = torch.optim.AdamW(
            self.actor.parameters(), config.actor_lr, weight_decay=config.weight_decay, fused=True)
        self.actor_schedule = torch.optim.lr_scheduler.LambdaLR(
            self.actor_optimizer, lambda update: min((update + 1) / config.warmup_updates, 1))
        self.history = collections.deque(maxlen=config.context)  # of an episode's steps, for `act`

    def keep_episodes(self, returns: np.ndarray) -> np.ndarray:
        """Numbers of the episodes to learn from, all; their returns [episodes] set the target of (5)."""
        self.actor.target.fill_(np.quantile(returns, self.config.target_quantile))
        return np.arange(len(returns))

    def episode_columns(self, rewards: np.ndarray) -> dict[str, np.ndarray]:
        """What is loaded besides transitions, given the rewards [T] of an episode: columns [T]."""
        returns_to_go = np.cumsum(rewards[::-1], dtype=np.float64)[::-1]  # (1)
        return {"returns_to_go": returns_to_go, "timesteps": np.arange(len(rewards))}

    def actor_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        error = (self.actor(batch) - batch["actions"]).square().mean(-1)  # (2), (3) [B, K]
        loss = (error * batch["real"]).sum() / batch["real"].sum()  # (4)
        return loss, {"actor/loss": loss.detach()}

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.updates += 1
        loss, metrics = self.actor_loss(batch)
        self.actor_optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.actor.parameters(), self.config.gradient_norm)
        self.actor_optimizer.step()
        self.actor_schedule.step()
        return metrics | {"actor/gradient_norm": norm}

    @torch.inference_mode()
    def act(self, observations, rewards) -> np.ndarray:
        """Raw observations [..., obs_dim], or Dicts -> actions [..., act_dim] in environment units.

        `rewards` [...] are the last step's; with None an episode begins, and the one before is forgotten.
        """
        observations = self.units.to_learner(observations)
        shape = observations.shape[:-1]
        step = {"observations": observations, "timesteps": observations.new_zeros(shape)}
        step["actions"] = observations.new_zeros(*shape, len(self.units.low))  # unknown, and not looked at
        step["returns_to_go"] = self.actor.target.expand(shape)
        if rewards is None:
            self.history.clear()
        else:
            rewards = torch.as_tensor(rewards).to(observations)
            step["returns_to_go"] = self.history[-1]["returns_to_go"] - rewards  # (5)
            step["timesteps"] = self.history[-1]["timesteps"] + 1
        self.history.append(step)
        window = {key: torch.stack([past[key] for past in self.history], len(shape)) for key in step}
        self.actor.eval()  # without dropout
        step["actions"] = self.actor(window)[..., -1, :]
        self.actor.train()
        return self.units.to_environment(step["actions"])

    def windows(self, data: dict[str, Tensor], starts: Tensor) -> dict[str, Tensor]:
        """The windows that begin at the rows `starts` [B], zero beyond the episode's end."""
        offsets = torch.arange(self.config.context, device=starts.device)
        rows = (starts[:, None] + offsets).clamp(max=len(data["timesteps"]) - 1)  # [B, K]
        # the next episode counts from 0 again: its steps are never as far on as their rows
        real = data["timesteps"][rows] == data["timesteps"][starts][:, None] + offsets
        batch = {key: data[key][rows] for key in ("returns_to_go", "observations", "actions", "timesteps")}
        for column in batch.values():
            column[~real] = 0
        return batch | {"real": real.float()}

    def draw_windows(self, data: dict, batch_size: int, seed: int, update: int) -> Iterator[dict]:
        """As `draw_batches`: any row begins a window, so an episode is drawn in proportion to its length."""
        starts = torch.arange(len(data["timesteps"]), device=data["timesteps"].device)
        for batch in draw_batches({"starts": starts}, batch_size, seed, update):
            yield self.windows(data, batch["starts"])

    @torch.inference_mode()
    def act_in_data(self, data: dict[str, Tensor], rows: np.ndarray) -> np.ndarray:
        """What `act` returns at `rows` [B] after the data's own steps, had it been asked for the target."""
        rows = torch.as_tensor(rows, device=data["timesteps"].device)
        timesteps = data["timesteps"][rows].long()
        past = timesteps.clamp(max=self.config.context - 1)
        window = self.windows(data, rows - past)
        window["returns_to_go"] += (self.actor.target - data["returns_to_go"][rows - timesteps])[:, None]
        self.actor.eval()
        actions = self.actor(window)[torch.arange(len(rows), device=rows.device), past]
        self.actor.train()
        return self.units.to_environment(actions)


Algorithm = DT  # the name by which the plumbing below knows it


# -------------------------------------------- Networks --------------------------------------------


class Block(nn.Module):
    """Causal attention with one head, then an MLP, both added to their input [..., L, dim]."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.dropout, self.kept = nn.Dropout(dropout), slice(None)  # kept: which of the L tokens come out

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unsqueeze(-3).chunk(3, -1)  # three of [..., 1 head, L, dim]
        dropout = self.dropout.p if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(*qkv, dropout_p=dropout, is_causal=True)
        x = x[..., self.kept, :] + self.dropout(self.out(mixed.squeeze(-3)[..., self.kept, :]))
        return x + self.dropout(self.mlp(self.norm2(x).flatten(0, -2)).view_as(x))  # flat: faster compiled


class DecisionTransformer(nn.Module):
    """Window -> actions [..., K, act_dim] in [-1, 1], each from its step's observation and the past."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        super().__init__()
        dim, self.return_scale = config.hidden_dim, config.return_scale
        self.register_buffer("target", torch.zeros(()))  # return to ask for
        self.embed_return, self.embed_timestep = nn.Linear(1, dim), nn.Embedding(config.timesteps, dim)
        self.embed_observation, self.embed_action = nn.Linear(obs_dim, dim), nn.Linear(act_dim, dim)
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(config.dropout)
        blocks = [Block(dim, config.dropout) for _ in range(config.hidden_layers)]
        blocks[-1].kept = slice(1, None, 3)  # the observations' alone: actions are read from them
        self.blocks, self.head = nn.Sequential(*blocks, nn.LayerNorm(dim)), nn.Linear(dim, act_dim)
        # as GPT-2's; embeddings and head are as torch makes them, which is what the paper's code does
        for layer in (part for part in self.blocks.modules() if isinstance(part, nn.Linear)):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, window: dict[str, Tensor]) -> Tensor:
        timesteps = window["timesteps"].long().clamp(max=self.embed_timestep.num_embeddings - 1)
        returns_to_go = self.embed_return(window["returns_to_go"].unsqueeze(-1) / self.return_scale)
        observations = self.embed_observation(window["observations"])
        steps = returns_to_go, observations, self.embed_action(window["actions"])
        tokens = torch.stack(steps, -2) + self.embed_timestep(timesteps).unsqueeze(-2)  # [..., K, 3, dim]
        tokens = self.dropout(self.norm(tokens.flatten(-3, -2)))  # [..., 3 K, dim]
        return torch.tanh(self.head(self.blocks(tokens)))


# ------------------------ Plumbing: the same in every script, word for word ------------------------


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient of `loss` for the parameters of `optimizer` and no others."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        parameter.grad = gradient
    optimizer.step()


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- target + tau (source - target)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


class UserError(Exception):
    """What the user can mend: `main` prints one line and exits with status 2, or the second argument."""


def parse_config(arguments: list[str]) -> Config:
    """Config from `--field value` pairs on top of the YAML file of `--config_path`.

    Pyrallis writes --help and no more: its parser takes `--see 3` for the seed, and 2.5 for 2.
    """
    if {"-h", "--help"} & set(arguments):
        pyrallis.parse(Config, args=["--help"])
    words = [word for text in arguments for word in text.split("=", text.startswith("--"))]  # --a=b is --a b
    values = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}
    if len(words) % 2:
        raise UserError("arguments come in pairs, --field value (see --help)")
    if path := values.pop("config_path", None):
        try:
            values = {**(yaml.safe_load(Path(path).read_text()) or {}), **values}
        except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"cannot read {path} as lines of `field: value`: {error}") from None
    fields = [field.name for field in dataclasses.fields(Config)]
    for name in values.keys() - fields:
        near = difflib.get_close_matches(str(name), fields, 1)
        raise UserError(f"unknown field {name}" + (f": did you mean {near[0]}?" if near else " (see --help)"))
    return check_config(Config(**values))


def check_config(config: Config) -> Config:
    """`config` with values of its fields' types and limits: 1e6 is an int, 2.5 is not, "maybe" is no bool."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), (get_args(field.type) or (field.type,))[0]
        low = field.metadata.get("low", {int: 1, float: 0}.get(field.type, -math.inf))
        high, choices = field.metadata.get("high", math.inf), field.metadata.get("choices", ())
        number = float(pd.to_numeric(str(value).replace("_", ""), errors="coerce"))  # nan for what is none
        fits = low <= number <= high and abs(number) < math.inf
        if kind is not field.type and value in (None, "null"):
            value = None
        elif kind is bool and str(value).lower() in ("true", "false"):
            value = str(value).lower() == "true"
        elif kind in (int, float) and fits and number == kind(number):
            value = kind(number)
        elif kind is not str or not (isinstance(value, str) and value) or (choices and value not in choices):
            wanted = {bool: "true or false", str: " or ".join(choices) or "text"}
            wanted = wanted.get(kind, f"{kind.__name__} in [{low}, {high}]")
            raise UserError(f"{field.name}: {value!r} is not {wanted}")
        setattr(config, field.name, value)
    return config


def load_dataset(dataset_id: str) -> minari.MinariDataset:
    """The dataset on this machine, else from the Minari hub; says which."""
    local, ours = (get_dataset_path(dataset_id) / "data").exists(), dataset_id.startswith("reef/")
    try:
        dataset = minari.load_dataset(dataset_id, download=not (local or ours))
        list(dataset.storage.get_episode_metadata(dataset.episode_indices[-1:]))  # is the file whole?
    except Exception as error:  # the hub's client raises whatever its transport does
        advice = "make it: make dataset ID=" if ours else "see `minari list remote`, or try minari download "
        advice = f"minari delete {dataset_id}, then " * local + advice + dataset_id
        problem = f"{error!r:.200}" if local or not ours else "it is not on this machine"
        raise UserError(f"cannot load {dataset_id} ({problem}); {advice}") from None
    size = f"{dataset.total_episodes:,} episodes, {dataset.total_steps:,} steps"
    print(f"{dataset_id}, {'on this machine' if local else 'from the Minari hub'}: {size}")
    return dataset


def make_environments(dataset: minari.MinariDataset, name: str | None, count: int):
    """Vector of `count` environments: `name`, else the dataset's, bare if its wrappers fail; None without."""
    with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):  # it prints a notice
        gym.register_envs(importlib.import_module("gymnasium_robotics"))  # mazes, hands and kitchen
    spec = None if name else dataset._eval_env_spec or dataset.env_spec
    makers = {name: partial(gym.make, name)} if name else {}
    if spec:
        makers[f"{spec.id}, as recorded"] = partial(dataset.recover_environment, eval_env=True)
        limited = partial(gym.make, spec.id, max_episode_steps=spec.max_episode_steps)
        makers[f"{spec.id}, without its recorded wrappers"] = partial(limited, **spec.kwargs)
    if not makers:
        return print("no environment to evaluate in: every tenth episode is held out, and measured instead")
    for title, make in makers.items():
        try:
            mode = gym.vector.AutoresetMode.SAME_STEP
            environments = gym.vector.SyncVectorEnv([make] * count, copy=False, autoreset_mode=mode)
            print(f"evaluated in {title}")
            return environments
        except Exception as error:  # environments raise whatever they like
            problem = f"cannot make {title}: {error!r:.200}"
    raise UserError(f"{problem}; name one to evaluate in with --environment")


def leaves(tree) -> list:
    """The entries of a Dict in the order of its sorted keys, however deep; anything else is its own leaf."""
    mapping = isinstance(tree, Mapping)
    return [leaf for key in sorted(tree) for leaf in leaves(tree[key])] if mapping else [tree]


def flatten(observations) -> np.ndarray:
    """Observations as float32 [..., obs_dim], the leaves of a Dict side by side."""
    return np.concatenate([np.asarray(leaf, np.float32) for leaf in leaves(observations)], axis=-1)


def flat_dim(space: gym.Space, dicts: bool = True) -> int:
    """Length of the vector that `flatten` makes of an element of `space`."""
    for leaf in leaves(space) if dicts else [space]:
        if not isinstance(leaf, gym.spaces.Box) or len(leaf.shape) != 1:
            advice = "; none here takes choices yet" * isinstance(leaf, gym.spaces.Discrete)
            raise UserError(f"this script is not for {leaf}: it takes vectors (Box){advice}")
    return sum(leaf.shape[0] for leaf in leaves(space))


class Units(nn.Module):
    """Between the environment's units and the learner's: standardised observations, actions in [-1, 1]."""

    def __init__(self, obs_dim: int, act_dim: int):
        super().__init__()
        for name, size in {"mean": obs_dim, "std": obs_dim, "low": act_dim, "high": act_dim}.items():
            self.register_buffer(name, torch.full((size,), {"mean": 0.0, "low": -1.0}.get(name, 1.0)))

    def to_learner(self, observations) -> Tensor:
        return (torch.as_tensor(flatten(observations), device=self.mean.device) - self.mean) / self.std

    def scale_actions(self, actions) -> Tensor:
        actions = torch.as_tensor(actions, device=self.low.device)
        return 2 * (actions - self.low) / (self.high - self.low).clamp(min=1e-6) - 1

    def to_environment(self, actions: Tensor) -> np.ndarray:
        return (self.low + (actions + 1) / 2 * (self.high - self.low)).cpu().numpy()


def load_transitions(dataset: minari.MinariDataset, space: gym.Space, algorithm, hold_out=False) -> tuple:
    """Transitions to learn from, those of held-out episodes, and what to record of them; sets the units.

    Both are in the learner's units on its device: observations and next_observations [N, obs_dim], actions
    [N, act_dim] in [-1, 1], rewards and terminations [N]. A truncation is no termination, and a next
    observation is always its own episode's.
    """
    config, units, device = algorithm.config, algorithm.units, algorithm.units.mean.device
    width = 2 * len(units.mean) + len(units.low) + 2 + 2 * hasattr(algorithm, "episode_columns")
    needed = 12 * dataset.total_steps * width  # float32, and two copies
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise UserError(f"{dataset.id} needs {needed / 1e9:,.1f} GB of memory; {free / 1e9:,.1f} GB are free")
    parts, digest = collections.defaultdict(list), hashlib.sha256()
    shapes = {"observations": [space.shape for space in leaves(dataset.observation_space)],
              "actions": [(len(units.low),)]}
    for episode in dataset.iterate_episodes():
        where, steps = f"{dataset.id}, episode {episode.id}", len(episode.rewards)
        for field in ("observations", "actions", "rewards", "terminations", "truncations"):
            for array, shape in zip(leaves(getattr(episode, field)), shapes.get(field, [()]), strict=True):
                if array.shape != (steps + (field == "observations"), *shape) or not steps:
                    raise UserError(f"{where} is malformed: {steps} steps, {field} of shape {array.shape}")
                if not np.isfinite(array.astype(np.float32)).all():
                    raise UserError(f"{where}: {field} are not all finite")
                digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        observations = flatten(episode.observations)
        columns = {"observations": observations[:-1], "actions": episode.actions, "rewards": episode.rewards,
                   "next_observations": observations[1:], "terminations": episode.terminations}
        if hasattr(algorithm, "episode_columns"):
            columns |= algorithm.episode_columns(episode.rewards)
        for key, column in columns.items():
            parts[key].append(np.asarray(column, np.float32))
    returns = np.array([rewards.sum(dtype=np.float64) for rewards in parts["rewards"]])
    if not len(returns) or sum(map(len, parts["rewards"])) != dataset.total_steps:
        raise UserError(f"{dataset.id} lacks steps: its metadata name {dataset.total_steps:,}; get it anew")
    held = np.arange(len(returns)) % 10 == 9 if hold_out else np.zeros(len(returns), bool)
    if hold_out and not held.any():
        raise UserError(f"{dataset.id} has no environment, and too few episodes to hold out every tenth: "
                        "name an environment with --environment")
    kept = np.flatnonzero(~held)
    if hasattr(algorithm, "keep_episodes"):
        kept = kept[algorithm.keep_episodes(returns[kept])]
    order, count = [*kept, *np.flatnonzero(held)], sum(len(parts["rewards"][i]) for i in kept)
    data = {key: np.concatenate([column[i] for i in order]) for key, column in parts.items()}

    extremes = data["actions"][:count].min(0), data["actions"][:count].max(0)
    low, high = (np.where(np.isfinite(bound), bound, extreme).astype(np.float32)
                 for bound, extreme in zip((space.low, space.high), extremes))
    clipped = float(((data["actions"] < low) | (data["actions"] > high)).mean())
    print(f"{clipped:.2%} of the action entries lie outside the action bounds and are clipped to them")
    data["actions"] = data["actions"].clip(low, high)
    if hasattr(config, "reward_scale"):  # bc has no use for rewards
        scale = 1000 / max(np.ptp(returns), 1e-6) if config.normalize_rewards else 1
        data["rewards"] = config.reward_scale * scale * data["rewards"] + config.reward_shift
    buffers = {"low": low, "high": high}
    if config.normalize_states:
        buffers["mean"] = data["observations"][:count].mean(0, dtype=np.float64)
        buffers["std"] = data["observations"][:count].std(0, dtype=np.float64) + 1e-3
    units.load_state_dict({key: torch.as_tensor(value) for key, value in buffers.items()}, strict=False)
    data = {key: torch.as_tensor(column, dtype=torch.float32, device=device) for key, column in data.items()}
    data["actions"] = units.scale_actions(data["actions"])
    for key in ("observations", "next_observations"):
        data[key] = (data[key] - units.mean) / units.std
    facts = {"dataset_hash": digest.hexdigest(), "transitions": count, "clipped_actions": clipped}
    both = slice(count), slice(count, None)
    return *({key: column[rows] for key, column in data.items()} for rows in both), facts


def draw_batches(data: dict[str, Tensor], batch_size: int, seed: int, update: int) -> Iterator[dict]:
    """Batches `update`, `update` + 1, ...: rows drawn with replacement, by seed and batch number alone."""
    table = torch.cat([column.view(len(column), -1) for column in data.values()], 1)  # one look-up for all
    widths = [column[0].numel() for column in data.values()]
    while True:
        block, start = divmod(update, 1000)  # the rows of 1000 batches are drawn at a time
        rows = np.random.default_rng((seed, block)).integers(len(table), size=(1000, batch_size))
        for batch_rows in torch.as_tensor(rows, device=table.device)[start:]:
            columns = table.index_select(0, batch_rows).split(widths, 1)
            yield {key: column.view(-1, *data[key].shape[1:]) for key, column in zip(data, columns)}
        update += 1000 - start


def evaluate(act: Callable, environments: gym.vector.VectorEnv, episodes: int, seed: tuple) -> pd.DataFrame:
    """A row an episode: return, length, success (nan if the environment knows none); `seed` sets the starts.

    Every environment plays one episode a round; one that ends early plays on, uncounted, so that the policy's
    batch keeps its size, on which the last bits of an action depend.
    """
    count, rounds = environments.num_envs, []
    seeds = np.random.SeedSequence(seed).generate_state(episodes + count).tolist()
    for first in range(0, episodes, count):
        observations, rewards = environments.reset(seed=seeds[first : first + count])[0], None
        returns, lengths = np.zeros(count), np.zeros(count, int)
        running, success = np.ones(count, bool), np.full(count, math.nan)
        while running.any():
            action = act(observations, rewards) if hasattr(Algorithm, "remembers") else act(observations)
            observations, rewards, terminations, truncations, infos = environments.step(action)
            returns, lengths = returns + running * rewards, lengths + running
            ended, last = terminations | truncations, infos.get("final_info", {})  # of an episode's last step
            now = np.where(ended, last.get("success", math.nan), infos.get("success", math.nan))
            success = np.where(running, np.fmax(success, now), success)
            running = running & ~ended
        rounds.append(pd.DataFrame({"return": returns, "length": lengths, "success": success}))
    return pd.concat(rounds, ignore_index=True)[:episodes]


def support_gap(algorithm, data: dict[str, Tensor]) -> float:
    """Mean distance, in [-1, 1] units, of the policy's actions from the data's on 1,024 fixed rows."""
    rows, units = np.random.default_rng(0).integers(len(data["actions"]), size=1024), algorithm.units
    observations = data["observations"][rows] * units.std + units.mean
    in_data = hasattr(algorithm, "act_in_data")  # an action may depend on what came before
    actions = algorithm.act_in_data(data, rows) if in_data else algorithm.act(observations.cpu())
    gap = units.scale_actions(actions) - data["actions"][rows]
    return float(gap.norm(dim=1).mean())


def measure_heldout(algorithm, data: dict[str, Tensor]) -> dict[str, float]:
    """Metrics of the losses on held-out transitions, means over 20 fixed batches; support gap."""
    losses = [getattr(algorithm, name) for name in dir(algorithm) if name.endswith("_loss")]
    networks = nn.ModuleList(part for part in vars(algorithm).values() if isinstance(part, nn.Module))
    draw = getattr(algorithm, "draw_windows", draw_batches)
    batches = itertools.islice(draw(data, algorithm.config.batch_size, seed=0, update=0), 20)
    networks.eval()  # without dropout
    with torch.random.fork_rng():  # training goes on as if nothing had been measured
        table = pd.DataFrame({k: float(v) for loss in losses for k, v in loss(b)[1].items()} for b in batches)
    networks.train()
    means = {**table.mean(), "actor/support_gap": support_gap(algorithm, data)}
    return {f"heldout/{key}": float(value) for key, value in means.items()}


class Run:
    """The folder of one run: its lock, config, record and checkpoint (README: What a run folder holds)."""

    # These do not change the outcome: a run goes on although they differ.
    FREE = ("device", "threads", "log_every", "checkpoint_every", "wandb_mode", "wandb_project", "output_dir")

    def __init__(self, config: Config):
        script = Path(__file__).resolve()
        self.config, source = config, getattr(config, "dataset", None) or config.environment
        self.group = f"{script.stem}/{source}/{config.variant}"
        self.folder = Path(config.output_dir, script.parent.name, self.group, f"seed-{config.seed}")
        self.lock, self.wandb = filelock.FileLock(self.folder / "lock", timeout=0), None
        self.info, self.checkpoint, self.history = {}, None, {"metrics": [], "evaluations": []}
        if not (self.folder / "run.json").exists():
            return
        self.hold()
        self.info = json.loads((self.folder / "run.json").read_text())
        old, new = self.info["config"], dataclasses.asdict(config)
        changed = [name for name in new if name not in self.FREE and old.get(name) != new[name]]
        longer = changed == ["updates"] and new["updates"] > old["updates"]
        if changed and (not longer or hasattr(Algorithm, "scheduled")):
            fields = ", ".join(f"{name} {old.get(name)} -> {new[name]}" for name in changed)
            fields += " (a learning rate is scheduled over them)" * longer
            raise UserError(f"{self.folder} holds a run of another config: {fields}; take another --variant")
        self.info["status"] = "running" if longer else self.info["status"]
        if (self.folder / "checkpoint.pt").exists():
            self.checkpoint = read_checkpoint(self.folder)
            self.history = self.checkpoint["history"]

    def hold(self) -> None:
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise UserError(f"another process is at work in {self.folder}") from None

    def start(self, **info) -> None:
        """Opens the folder; what a killed process recorded after its last checkpoint goes."""
        self.hold()
        for key in ("dataset_hash", "device", "threads", "compiled", "versions"):
            if self.checkpoint and self.info.get(key) != info[key]:
                print(f"resumed with {key} {info[key]}, begun with {self.info.get(key)}: not the same bits")
        config = dataclasses.asdict(self.config)
        self.write("config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
        identity = json.dumps({name: value for name, value in config.items() if name not in self.FREE})
        config_hash = hashlib.sha256(identity.encode()).hexdigest()
        self.note(status="running", config=config, config_hash=config_hash, **info)
        for name in self.history:
            self.record(name, [])

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
        self.info |= info
        self.write("run.json", json.dumps(self.info, indent=1).encode())

    def record(self, name: str, rows: list[dict]) -> None:
        self.history[name] += rows
        table = pd.DataFrame(self.history[name], columns=None if self.history[name] else ["update"])
        self.write(f"{name}.csv", table.to_csv(index=False).encode())

    def mirror(self, row: dict) -> None:
        """To wandb, which is no record: where it fails, the run goes on without it."""
        if self.config.wandb_mode == "disabled":
            return
        try:
            import wandb  # takes seconds

            self.wandb = self.wandb or wandb.init(
                project=self.config.wandb_project, group=self.group, name=f"seed-{self.config.seed}",
                config=self.info["config"], mode=self.config.wandb_mode, dir=self.folder,
                settings=wandb.Settings(silent=True))
            self.wandb.log(row, step=row["update"])
        except Exception as error:
            print(f"wandb failed, and the run goes on without it: {error!r:.200}", file=sys.stderr)
            self.config.wandb_mode = "disabled"

    def save(self, algorithm) -> None:
        """Everything from which the run goes on to the same bits, if it is finite."""
        parts = {name: part for name, part in vars(algorithm).items() if hasattr(part, "state_dict")}
        state = {name: part.state_dict() for name, part in parts.items()}
        if not all(leaf.isfinite().all() for leaf in leaves(state) if isinstance(leaf, Tensor)):
            raise UserError("diverged: weights not finite; lower a learning rate", 3)
        rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        checkpoint = {"updates": algorithm.updates, "state": state, "history": self.history, "rng": rng}
        torch.save(checkpoint, buffer := io.BytesIO())
        self.write("checkpoint.pt", buffer.getvalue())


def read_checkpoint(folder: Path) -> dict:
    try:
        return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        problem = f"cannot read {folder}/checkpoint.pt: {error!r:.100}"
        raise UserError(f"{problem}; remove {folder} to start anew") from None


def restore(algorithm, checkpoint: dict) -> None:
    algorithm.updates = checkpoint["updates"]
    for name, state in checkpoint["state"].items():
        getattr(algorithm, name).load_state_dict(state)


def load(folder: str, device: str = "cpu") -> Algorithm:
    """The policy of a run: `load(folder).act(observation)` takes raw observations, one or a batch."""
    config, checkpoint = parse_config([f"--config_path={folder}/config.yaml"]), read_checkpoint(Path(folder))
    units = checkpoint["state"]["units"]
    algorithm = Algorithm(config, len(units["mean"]), len(units["low"]), torch.device(device))
    restore(algorithm, checkpoint)
    return algorithm


def compile_losses(algorithm, device: torch.device) -> bool:
    """Compiles each method whose name ends in _loss; where there is no C++ compiler, they stay eager."""
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        print("no C++ compiler (g++) here: the losses are not compiled, which is slower", file=sys.stderr)
        return False
    options = {"fallback_random": True}  # eager's random numbers: faster here, and the same as uncompiled
    for name in dir(algorithm):
        if name.endswith("_loss"):
            setattr(algorithm, name, torch.compile(getattr(algorithm, name), dynamic=False, options=options))
    return True


def provenance(device: torch.device) -> dict:
    """Commit (with a + where files differ from it), versions and hardware, as far as they are known here."""
    git = partial(subprocess.run, cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    commit = git(describe).stdout.strip() if shutil.which("git") else ""
    names = ("torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari")
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in names}
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = cpuinfo.partition("model name\t: ")[2].partition("\n")[0] or platform.processor()
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {"commit": commit, "device": f"{device.type}: {hardware}",
            "threads": torch.get_num_threads(), "versions": {"python": platform.python_version(), **versions}}


def train(config: Config) -> None:
    """Trains, evaluates and records as `config` says; what the run's folder already holds is not redone."""
    clock, config = time.perf_counter, check_config(config)
    began, run = clock(), Run(config)
    if run.info.get("status") == "finished":
        return print(f"{run.folder} is finished: {run.info['result']}")
    if run.info.get("status") == "diverged":
        raise UserError(f"{run.folder} has {run.info['result']}, under another --variant", 3)
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.zeros(1, device=auto if config.device == "auto" else config.device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: cannot use {config.device}: {error!r:.100}") from None
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.set_flush_denormal(True)  # Adam's moments of idle weights end in denormals, slow to compute with
    torch.set_float32_matmul_precision(config.precision)
    torch.manual_seed(config.seed)

    dataset = load_dataset(config.dataset)
    sizes = flat_dim(dataset.observation_space), flat_dim(dataset.action_space, dicts=False)
    environments, action_space = make_environments(dataset, config.environment, 10), dataset.action_space
    if environments:
        action_space = environments.single_action_space
        theirs = flat_dim(environments.single_observation_space), flat_dim(action_space)
        if sizes != theirs:
            raise UserError(f"observations and actions are of sizes {sizes} in {dataset.id}, and {theirs} in "
                            "the environment: name one that fits with --environment")
    algorithm = Algorithm(config, *sizes, device)
    data, held_out, facts = load_transitions(dataset, action_space, algorithm, hold_out=not environments)
    compiled = config.compile and compile_losses(algorithm, device)
    run.start(compiled=compiled, **facts, **provenance(device))
    if run.checkpoint:
        restore(algorithm, run.checkpoint)
        print(f"resumed at update {algorithm.updates:,}")
        torch.set_rng_state(run.checkpoint["rng"]["cpu"])
        torch.cuda.set_rng_state_all(run.checkpoint["rng"]["cuda"])
    known = dataset.storage.metadata
    ref_min, ref_max = known.get("ref_min_score", config.ref_min), known.get("ref_max_score", config.ref_max)
    scored = None not in (ref_min, ref_max)

    def evaluation(phase: str, episodes: int) -> dict[str, float]:
        if not environments:
            return measure_heldout(algorithm, held_out)
        seed = config.seed, algorithm.updates, int(phase == "final")
        table = evaluate(algorithm.act, environments, episodes, seed)
        stamped = table.reset_index(names="episode").assign(update=algorithm.updates, phase=phase)
        run.record("evaluations", stamped[["update", "phase", "episode", *table]].to_dict("records"))
        mean = table["return"].mean()
        result = {"score": 100 * (mean - ref_min) / (ref_max - ref_min) if scored else math.nan,
                  "return_mean": mean, "return_std": table["return"].std(ddof=0),
                  "length_mean": table["length"].mean(), "success": table["success"].mean()}
        shown = ", ".join(f"{key} {value:.2f}" for key, value in result.items() if not math.isnan(value))
        progress.write(f"update {algorithm.updates:,}, {phase} evaluation: {shown}")
        return {f"eval/{key}": float(value) for key, value in result.items()}

    draw = getattr(algorithm, "draw_windows", draw_batches)
    batches = draw(data, config.batch_size, config.seed, algorithm.updates)
    history = run.history["metrics"]
    earlier = history[-1]["time/wall_seconds"] if history else 0
    progress = tqdm(total=config.updates, initial=algorithm.updates, unit=" updates", disable=None)
    try:
        mark, marked = clock(), algorithm.updates
        while algorithm.updates < config.updates:
            metrics, update = algorithm.update(next(batches)), algorithm.updates
            every = config.log_every, config.eval_every, config.checkpoint_every
            due = [update % interval == 0 or update == config.updates for interval in every]
            if not any(due):
                continue
            row = {"update": update, **{key: float(value) for key, value in metrics.items()}}
            row["actor/support_gap"] = support_gap(algorithm, data)
            if lost := ", ".join(key for key, value in row.items() if not math.isfinite(value)):
                raise UserError(f"diverged by update {update}: {lost} not finite; lower a learning rate", 3)
            row["time/updates_per_second"] = (update - marked) / (clock() - mark)
            progress.update(update - marked)
            row |= evaluation("training", config.eval_episodes) if due[1] else {}
            row["time/wall_seconds"] = earlier + clock() - began
            run.record("metrics", [row])
            run.mirror(row)
            if due[2]:
                run.save(algorithm)
            mark, marked = clock(), update
        progress.close()
        final, table = evaluation("final", config.final_eval_episodes), pd.DataFrame(history)
        run.mirror({"update": config.updates} | {key.replace("eval", "final"): final[key] for key in final})
        numbers = {key.removeprefix("eval/"): value for key, value in final.items()}
        numbers |= {"best_score": table.get("eval/score", table["update"] * math.nan).max()}
        numbers |= {"wall_seconds": earlier + clock() - began}
        numbers["updates_per_second"] = table["time/updates_per_second"].median()
        result = "score {score:.1f}, " * scored + "return {return_mean:.1f} +- {return_std:.1f}"
        result += " (best score on the way, chosen with the simulator: {best_score:.1f})" * scored
        if not environments:
            result = "no environment: " + ", ".join(f"{key} {value:.3g}" for key, value in final.items())
        result = result.format(**numbers)
        numbers = {key: None if math.isnan(value) else value for key, value in numbers.items()}
        run.note(status="finished", result=result, **numbers)
        print(f"{run.folder}: {result}")
    except Exception as error:  # after Ctrl-C the status is still running
        status = "diverged" if error.args[1:] == (3,) else "failed"
        run.note(status=status, result=str(error.args[0] if error.args else error)[:300])
        raise
    finally:
        run.lock.release()


def main(action: Callable[[Config], None]) -> None:
    """The command line of `action`: what the user can mend ends in one line on stderr."""
    try:
        return action(parse_config(sys.argv[1:]))
    except UserError as error:
        message, status = (*error.args, 2)[:2]
    except OSError as error:
        message, status = str(error), 2
    except KeyboardInterrupt:
        message, status = "interrupted; the same command goes on from what is saved", 130
    print(f"{Path(__file__).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main(train)
