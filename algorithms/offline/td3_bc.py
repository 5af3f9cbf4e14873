"""TD3+BC: a minimalist approach to offline reinforcement learning (Fujimoto and Gu, 2021, arXiv:2106.06860).

A critic trained on logged data overrates actions that the data never show, and an actor trained on that
critic finds them. TD3+BC keeps TD3 and adds one term to the actor's loss: stay near the action in the data.
Dividing Q by its own mean size lets one weight, alpha, serve rewards of any scale.

  (1)  a' = clip(pi'(s') + clip(eps, -c, c), -1, 1),  eps ~ N(0, sigma^2)     smoothed target action
  (2)  y = r + gamma (1 - d) min_i Q'_i(s', a')                               d: terminated, not truncated
  (3)  L_Q = sum_i mean (Q_i(s, a) - y)^2
  (4)  lambda = alpha / mean |Q_1(s, pi(s))|                                  a number: no gradient
  (5)  L_pi = -lambda mean Q_1(s, pi(s)) + mean (pi(s) - a)^2                 every policy_delay updates
  (6)  theta' <- theta' + tau (theta - theta')                                both targets, after (5)

Differences from the paper: (4) averages over pi(s), as the authors' code does, not over the data's actions;
an episode cut by a time limit keeps its last transition, which bootstraps (the authors' loader drops it).

  python algorithms/offline/td3_bc.py --config_path configs/offline/td3_bc/reef/pointmaze/umaze-v0.yaml
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
    """TD3+BC. Write `null` for none and true or false for a switch."""

    dataset: str = "reef/pointmaze/umaze-v0"  # Minari id, on this machine or on the hub
    seed: int = 0  # of networks, batches, noise and evaluations
    variant: str = "default"  # names these settings in the run's folder and in the tables
    updates: Count = 1_000_000  # gradient updates
    batch_size: Count = 256  # transitions in an update
    discount: Share = 0.99  # gamma
    tau: Share = 0.005  # rate of the target networks
    actor_lr: Size = 3e-4  # Adam's step size
    critic_lr: Size = 3e-4  # Adam's step size
    hidden_dim: Count = 256  # units in a hidden layer
    hidden_layers: Count = 2  # hidden layers of every network
    alpha: Size = 2.5  # weight of Q against imitation, (4)
    policy_noise: Size = 0.2  # sigma of (1)
    noise_clip: Size = 0.5  # c of (1)
    policy_delay: Count = 2  # critic updates to one of the actor and the targets
    normalize_states: bool = True  # standardise observations by the dataset's mean and deviation
    normalize_rewards: bool = False  # first multiply by 1000 / (largest - smallest episode return)
    reward_scale: float = 1.0  # the learner sees reward_scale * r + reward_shift
    reward_shift: float = 0.0  # see reward_scale
    environment: Optional[str] = None  # Gymnasium id to evaluate in; null: the dataset's own
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


# --------------------------------------------- TD3+BC ---------------------------------------------


class TD3BC:
    """Networks, targets and optimisers, and the update that trains them on batches in the learner's units."""

    def __init__(self, config: Config, scaler: "Scaler"):
        self.config, self.scaler, self.updates = config, scaler, 0
        obs_dim, act_dim, device = scaler.obs_dim, scaler.act_dim, scaler.mean.device
        size = (obs_dim, act_dim, config.hidden_dim, config.hidden_layers)
        self.actor = DeterministicActor(*size).to(device)
        self.critic = EnsembleCritic(*size).to(device)
        self.target_actor, self.target_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), config.actor_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), config.critic_lr, fused=True)
        self.metrics = {}  # of the latest update, and of the actor's latest

    def critic_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        with torch.no_grad():
            noise = (torch.randn_like(batch["actions"]) * c.policy_noise).clamp(-c.noise_clip, c.noise_clip)
            next_actions = (self.target_actor(batch["next_observations"]) + noise).clamp(-1, 1)  # (1) [B, A]
            next_q = self.target_critic(batch["next_observations"], next_actions).amin(0)  # [B]
            target = batch["rewards"] + c.discount * (1 - batch["terminations"]) * next_q  # (2) [B]
        q = self.critic(batch["observations"], batch["actions"])  # [2, B]
        loss = (q - target).square().mean(1).sum()  # (3)
        return loss, {"critic/loss": loss.detach(), "critic/q_mean": q.detach().mean()}

    def actor_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        actions = self.actor(batch["observations"])  # [B, A]
        q = self.critic(batch["observations"], actions, members=1)[0]  # [B]
        weight = self.config.alpha / q.detach().abs().mean()  # (4)
        loss = -weight * q.mean() + (actions - batch["actions"]).square().mean()  # (5)
        return loss, {"actor/loss": loss.detach()}

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.updates += 1
        self.metrics |= self.learn(batch, self.updates % self.config.policy_delay == 0)
        return self.metrics

    def learn(self, batch: dict[str, Tensor], moves_actor: bool) -> dict[str, Tensor]:
        """Every step of an update; on a GPU one CUDA graph: what `updates` decides comes as an argument."""
        loss, metrics = self.critic_loss(batch)
        descend(self.critic_optimizer, loss)
        if moves_actor:
            loss, actor_metrics = self.actor_loss(batch)
            descend(self.actor_optimizer, loss)
            polyak(self.target_actor, self.actor, self.config.tau)  # (6)
            polyak(self.target_critic, self.critic, self.config.tau)  # (6)
            metrics |= actor_metrics
        return metrics

    @torch.inference_mode()
    def act(self, observations) -> np.ndarray:
        """Raw observations [..., obs_dim], or Dicts -> actions [..., act_dim] in the environment's units."""
        return self.scaler.unscale_actions(self.actor(self.scaler.scale_observations(observations)))


# -------------------------------------------- Networks --------------------------------------------


def mlp(inputs: int, hidden_dim: int, hidden_layers: int, outputs: int) -> nn.Sequential:
    """ReLU network [..., inputs] -> [..., outputs]."""
    sizes = [inputs] + [hidden_dim] * hidden_layers
    hidden = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


class DeterministicActor(nn.Module):
    """pi(s): observations [B, obs_dim] -> actions [B, act_dim] in [-1, 1]."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int, hidden_layers: int):
        super().__init__()
        self.net = mlp(obs_dim, hidden_dim, hidden_layers, act_dim)

    def forward(self, observations: Tensor) -> Tensor:
        return torch.tanh(self.net(observations))


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


# ------------------------------------ From the dataset to the score ------------------------------------


def train(config: Config) -> None:
    """All that this script does, in order; what the run's folder already holds is not done again."""
    run = Run(config, config.dataset)
    if run.info.get("status") == "finished":
        print(f"{run.folder} is finished: {run.info['result']}")
        return

    device = set_up_torch(config)
    dataset = load_dataset(config.dataset)
    environments = make_environments(dataset, config.environment)
    check_memory(dataset, device)
    episodes, dataset_hash = read_episodes(dataset)
    scale_rewards(episodes, config.reward_scale, config.reward_shift, config.normalize_rewards)
    action_space = environments.single_action_space if environments else dataset.action_space
    scaler = fit_scaler(episodes, action_space, config.normalize_states).to(device)
    data = transitions(episodes, scaler)
    seen = {"critic/data_return": mean_return_to_go(episodes, config.discount)}  # beside critic/q_mean
    known = dataset.storage.metadata
    references = known.get("ref_min_score", config.ref_min), known.get("ref_max_score", config.ref_max)

    learner = TD3BC(config, scaler)
    compiled = config.compile and compile_methods(learner, "critic_loss", "actor_loss")
    with run.start(learner, dataset_hash=dataset_hash, compiled=compiled, **provenance(device)):
        batches = draw_batches(data, config.batch_size, config.seed, learner.updates)
        numbers = range(learner.updates + 1, config.updates + 1)
        for update in tqdm(numbers, initial=learner.updates, total=config.updates, disable=None):
            metrics = learner.update(next(batches))
            if run.is_due(update, config.log_every):
                gap = {"actor/support_gap": support_gap(learner.act, data, scaler)}
                run.log(update, metrics | gap | seen)
            if run.is_due(update, config.eval_every) and environments:
                table = evaluate(learner.act, environments, config.eval_episodes, (config.seed, update, 0))
                run.log_episodes(update, "training", table, references)
            run.save_when_due(learner)
        if environments:
            seed = (config.seed, config.updates, 1)
            table = evaluate(learner.act, environments, config.final_eval_episodes, seed)
            run.log_episodes(config.updates, "final", table, references)
        run.finish()


def load(folder: str, device: str = "cpu") -> TD3BC:
    """The policy of a run: `load(folder).act(observation)` takes raw observations, one or a batch."""
    config = parse_config([f"--config_path={folder}/config.yaml"])
    checkpoint = read_saved(Path(folder, "checkpoint.pt"))
    learner = TD3BC(config, Scaler(**checkpoint["state"]["scaler"]).to(device))
    restore(learner, checkpoint)
    return learner


# -------------------- Toolbox: the same in every script that has it, word for word --------------------


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


def vector_shapes(space: gym.Space) -> list[tuple]:
    """Shapes of the vectors that an element of `space` consists of."""
    for leaf in leaves(space):
        if not isinstance(leaf, gym.spaces.Box) or len(leaf.shape) != 1:
            raise UserError(f"this script is not for {leaf}: it takes vectors (Box)")
    return [leaf.shape for leaf in leaves(space)]


def leaves(tree) -> list:
    """The entries of a Dict in the order of its sorted keys, however deep; anything else is its own leaf."""
    if isinstance(tree, Mapping):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [tree]


def flatten(tree) -> np.ndarray:
    """An array as float32; the leaves of a Dict side by side: [..., obs_dim]."""
    return np.concatenate([np.asarray(leaf, np.float32) for leaf in leaves(tree)], axis=-1)


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


def mean_return_to_go(episodes: list, discount: float) -> float:
    """Mean over all steps of the discounted return from there to a termination, or the record's end."""
    to_go = []
    for episode in episodes:
        following, steps = 0.0, zip(episode["rewards"].tolist(), episode["terminations"].tolist())
        for reward, ended in reversed([*steps]):
            following = reward + discount * (1 - ended) * following
            to_go.append(following)
    return float(np.mean(to_go))


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
