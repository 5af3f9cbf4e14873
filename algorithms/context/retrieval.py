"""RA-DT: a decision transformer that looks things up in a memory (Schmied et al., 2024, arXiv:2410.07071).

AD and DPT carry all that they have seen in their context. Here the context is the episode under way, and what
came before is in a memory of episodes: those that are like the present one are found by similarity, weighed
by what they earned, and read by cross attention. So a life may be long and the context stays short.

  (1)  x_t = E_s(s_t) + E_a(a_{t-1}) + E_r(r_{t-1}) + E_R(R_t) + e_t   t: step of the episode; R_t: to go
  (2)  k = u / |u|,  u = sum_t P[s_t, a_t]                key of steps; P: fixed numbers, drawn once
  (3)  c_j = k . k_j                                      the `found` largest but for those above `too_alike`
  (4)  u_j = c_j + G_j / G_max, the `kept` largest        G_j: the return of episode j; G_max: at least 1
  (5)  w = softmax(u)                                     weights of the kept, which sum to 1
  (6)  y = x + sum_j softmax(x Wq (z Wk)^T / sqrt(d) + log w) z Wv       cross attention to their steps z
  (7)  L = mean -log pi(a_t | x_1, ..., x_t, memory)      steps after those that the key is of
  (8)  R_t = min(target - r_1 - ... - r_{t-1}, M_t)       acting; M_t: the largest R_t in the data

Differences from the paper: keys are sums of fixed random vectors (its own: a language model); episodes of the
room are the memory, in training those of another learner with the same goal up to some moment, so that they
show the goal, not habits; (4) also in training, where the paper's u_j counts the task, and of plain
similarities (its code scales both terms to [0, 1]); two episodes and a learned row are read (its code: one),
by w, without their R_t; in training most keys are of no step, and (7) skips theirs; M_t; `too_alike` when
acting too; any action may be drawn, where its code has a top half.

  make dataset ID=reef/dark-room/histories-v0
  python algorithms/context/retrieval.py --dataset reef/dark-room/histories-v0
"""

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import NewType
from unittest import mock

import filelock
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
    """RA-DT. Write `null` for none and true or false for a switch."""

    dataset: str = "reef/dark-room/histories-v0"  # Minari id of lives of learners
    seed: int = 0  # of networks, batches, actions and evaluations
    variant: str = "default"  # names these settings in the run's folder and in the tables
    updates: Count = 12_000  # gradient updates
    batch_size: Count = 64  # episodes in an update
    columns: Count = 10  # cells in a row of the room; 1: states are no cells, each is a thing of its own
    retrieve: bool = True  # false: without the memory, a decision transformer
    memory: Count = 64  # episodes in a memory, in training
    found: Count = 50  # episodes of (3)
    too_alike: Share = 0.98  # similarity of (3) above which an episode says nothing new
    kept: Count = 2  # episodes of (4)
    key_dim: Count = 64  # size of a key
    query_dropout: Share = 0.8  # of keys that are nothing, in training: then (4) is what they earned
    target: float = 15.0  # return to ask for, (8)
    actor_lr: Size = 1e-3  # AdamW's step size once it is warm
    warmup_updates: Count = 500  # updates over which the step size rises from 0, along a line
    weight_decay: Size = 1e-4  # AdamW's
    gradient_norm: Size = 1.0  # longer gradients are cut to this length
    dropout: Share = 0.0  # of embeddings, attention and residual branches, in training
    hidden_dim: Count = 64  # size of a token
    hidden_layers: Count = 4  # blocks of the transformer, one attention head each
    eval_every: Count = 2000  # updates between evaluations
    eval_episodes: Count = 20  # episodes in context, on every goal
    final_eval_episodes: Count = 40  # episodes in context of the evaluation that is the score
    final_eval_rounds: Count = 5  # agents on every goal in that evaluation, each with a context of its own
    log_every: Count = 500  # updates between rows of metrics.csv
    checkpoint_every: Count = 2000  # updates between checkpoints
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    threads: int = 0  # CPU threads; 0: torch's choice
    compile: bool = True  # compile the losses
    precision: Precision = "auto"  # of float32 products; auto: as highest, or faster if nothing is rounded
    wandb_mode: WandbMode = "offline"  # mirror of the CSV files
    wandb_project: str = "reef"  # wandb project
    output_dir: str = "results/runs"  # where run folders go


# ----------------------------------------------- RA-DT -----------------------------------------------


class RADT:
    """Transformer, optimiser and memory, and the update that trains it on episodes with a memory of others.

    A batch is a dict of states, actions, rewards [B, T] of episodes, the same of memories, [B, M, T], with
    memory_ before the name, memory_real [B, M]: 1 where there is an episode, and past [B]: of how many steps
    the key is; the loss begins after them.
    """

    def __init__(self, config: Config, states: int, actions: int, steps: int, device: torch.device):
        self.config, self.updates = config, 0
        self.actor = MemoryTransformer(config, states, actions, steps).to(device)
        self.actor_optimizer = torch.optim.AdamW(
            self.actor.parameters(), config.actor_lr, weight_decay=config.weight_decay, fused=True)
        self.actor_schedule = torch.optim.lr_scheduler.LambdaLR(
            self.actor_optimizer, lambda update: min((update + 1) / config.warmup_updates, 1))
        self.memory = []  # episodes that are over

    def actor_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        steps = torch.arange(batch["states"].shape[1], device=batch["states"].device)
        to_go = batch["rewards"].flip(1).cumsum(1).flip(1)  # [B, T]
        counted = (steps >= batch["past"].unsqueeze(1)).float()  # [B, T]
        kept, weights = self.retrieve(batch, 1 - counted)
        logits = self.actor(batch, to_go, kept, weights)  # (1), (6) [B, T, actions]
        losses = nn.functional.cross_entropy(logits.mT, batch["actions"], reduction="none")  # [B, T]
        loss = (losses * counted).sum() / counted.sum()  # (7)
        hits = ((logits.argmax(-1) == batch["actions"]) * counted).sum() / counted.sum()
        return loss, {"actor/loss": loss.detach(), "actor/agreement": hits}

    @torch.no_grad()
    def retrieve(self, batch: dict[str, Tensor], seen: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The kept episodes of each memory, [B, kept, T], and the weights [B, kept]: 0 for what is none.

        `seen` [B, T] is 1 at the steps of the present episode that the key is of.
        """
        c, real = self.config, batch["memory_real"] > 0
        key = self.actor.key(batch["states"], batch["actions"], seen)  # (2) [B, key_dim]
        keys = self.actor.key(batch["memory_states"], batch["memory_actions"])  # (2) [B, M, key_dim]
        alike = (keys @ key.unsqueeze(-1)).squeeze(-1)  # (3) [B, M]
        twins = (keys @ keys.mT > 1 - 1e-6).tril(-1) & real.unsqueeze(1)  # an earlier one is the same
        real = real & ~twins.any(-1) & (alike <= c.too_alike)
        alike = alike.masked_fill(~real, -torch.inf)
        earned = batch["memory_rewards"].sum(-1)  # [B, M]
        earned = earned / earned.amax(-1, keepdim=True).clamp(min=1)
        ranked = alike + 1e-6 * earned  # of equals, as without a key all are, what earned more
        found = ranked.topk(min(c.found, alike.shape[1])).indices  # (3) [B, found]
        useful, order = (alike + earned).gather(1, found).topk(min(c.kept, found.shape[1]))  # (4)
        weights = useful.softmax(-1).nan_to_num()  # (5) [B, kept]; 0 where all are none
        rows = found.gather(1, order).unsqueeze(-1).expand(-1, -1, batch["states"].shape[1])
        names = ("states", "actions", "rewards")
        return {name: batch[f"memory_{name}"].gather(1, rows) for name in names}, weights

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.updates += 1
        metrics = self.learn(batch)
        self.actor_schedule.step()
        return metrics

    def learn(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every step of an update; on a GPU one CUDA graph: what `updates` decides comes as an argument."""
        loss, metrics = self.actor_loss(batch)
        self.actor_optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.actor.parameters(), self.config.gradient_norm)
        self.actor_optimizer.step()
        return metrics | {"actor/gradient_norm": norm}

    @torch.inference_mode()
    def choose(self, states: np.ndarray, last: dict | None) -> np.ndarray:
        """States [G] of agents and what their last step was -> actions [G]; with None their lives begin.

        `last` has actions, rewards and ended [G]: whether the step was the last of its episode, which all
        agents must reach at the same time.
        """
        if last is None:
            self.memory.clear()
            self.begin_episode(len(states))
        else:
            self.remember(last)
        self.episode["states"][:, self.step] = states
        batch = self.recollect()
        earned = batch["rewards"].cumsum(1) - batch["rewards"]  # before each step
        to_go = torch.minimum(self.config.target - earned, self.actor.most)  # (8) [G, T]
        seen = torch.arange(self.actor.steps, device=earned.device) < self.step  # their actions are known
        kept, weights = self.retrieve(batch, seen.float().expand_as(earned))
        self.actor.eval()  # without dropout
        logits = self.actor(batch, to_go, kept, weights)[:, self.step]  # which sees no later step
        self.actor.train()
        return torch.distributions.Categorical(logits=logits).sample().cpu().numpy()

    def begin_episode(self, agents: int) -> None:
        self.step, empty = 0, np.zeros((agents, self.actor.steps), int)
        self.episode = {"states": empty, "actions": empty.copy(), "rewards": empty.astype(np.float32)}

    def remember(self, last: dict) -> None:
        """Notes what the step came to; an episode that is over goes into the memory."""
        for name in ("actions", "rewards"):
            self.episode[name][:, self.step] = last[name]
        self.step += 1
        if last["ended"].any():
            if not last["ended"].all():
                raise UserError("RA-DT takes agents whose episodes end together")
            self.memory.append(self.episode)
            self.begin_episode(len(last["ended"]))

    def recollect(self) -> dict[str, Tensor]:
        """The episode so far [G, T], zeros after it, and those that are over [G, M, T]: as in a batch."""
        over, batch = self.memory or [self.episode], dict(self.episode)
        for name in self.episode:
            batch[f"memory_{name}"] = np.stack([episode[name] for episode in over], 1)
        real = np.float32(bool(self.memory))  # at first what stands there for a memory is none
        batch["memory_real"] = np.full(batch["memory_states"].shape[:2], real)
        device = next(self.actor.parameters()).device
        return {name: torch.as_tensor(column, device=device) for name, column in batch.items()}


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


class Cells(nn.Module):
    """Numbers of cells [...] -> [..., dim]: what is known of their row, and of their column."""

    def __init__(self, states: int, columns: int, dim: int):
        super().__init__()
        self.rows, self.columns = nn.Embedding(-(-states // columns), dim), nn.Embedding(columns, dim)

    def forward(self, cells: Tensor) -> Tensor:
        width = self.columns.num_embeddings
        return self.rows(cells // width) + self.columns(cells % width)


class MemoryTransformer(nn.Module):
    """Episodes [B, T], returns to go [B, T] and what was retrieved -> logits [B, T, actions]."""

    def __init__(self, config: Config, states: int, actions: int, steps: int):
        super().__init__()
        dim, self.none, self.steps = config.hidden_dim, actions, steps  # none: the action before the first
        self.retrieve = config.retrieve
        self.embed_state = Cells(states, config.columns, dim)
        self.embed_action = nn.Embedding(actions + 1, dim)
        self.embed_reward, self.embed_return = nn.Linear(1, dim), nn.Linear(1, dim)
        self.embed_step, self.norm = nn.Embedding(steps, dim), nn.LayerNorm(dim)
        self.dropout, layers = nn.Dropout(config.dropout), range(config.hidden_layers)
        self.blocks = nn.ModuleList(Block(dim, config.dropout) for _ in layers)
        self.readers = nn.ModuleList(Reader(dim, config.dropout) for _ in layers)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, actions))
        self.embed_taken, self.embed_earned = nn.Embedding(actions, dim), nn.Linear(1, dim)  # in a memory
        self.nothing = nn.Parameter(torch.zeros(1, dim))  # always there to be read
        self.register_buffer("most", torch.full((steps,), 1e9))  # M of (8), by step
        numbers = torch.Generator().manual_seed(0)
        self.register_buffer("projection", torch.randn(states, actions, config.key_dim, generator=numbers))

    def key(self, states: Tensor, actions: Tensor, seen: Tensor | None = None) -> Tensor:
        """(2) of the steps [..., T] that are `seen`: [..., key_dim]; of none 0."""
        vectors = self.projection[states, actions]  # [..., T, key_dim]
        total = vectors.sum(-2) if seen is None else (vectors * seen.unsqueeze(-1)).sum(-2)
        return nn.functional.normalize(total, dim=-1)

    def tokens(self, episodes: dict[str, Tensor]) -> Tensor:
        """(1) without the returns to go: [..., T, dim]."""
        shifted = nn.functional.pad(episodes["actions"], (1, 0), value=self.none)[..., :-1]
        earned = nn.functional.pad(episodes["rewards"].float(), (1, 0))[..., :-1].unsqueeze(-1)
        steps = torch.arange(episodes["states"].shape[-1], device=shifted.device)
        x = self.embed_state(episodes["states"]) + self.embed_action(shifted)
        return x + self.embed_reward(earned) + self.embed_step(steps)

    def forward(self, episodes: dict, to_go: Tensor, kept: dict, weights: Tensor) -> Tensor:
        x = self.tokens(episodes) + self.embed_return(to_go.float().unsqueeze(-1))  # (1) [B, T, dim]
        x = self.dropout(self.norm(x))
        memory = self.tokens(kept) + self.embed_taken(kept["actions"])  # a step's own, and those before it
        memory = self.norm(memory + self.embed_earned(kept["rewards"].float().unsqueeze(-1))).flatten(1, 2)
        bias = weights.log().repeat_interleave(kept["states"].shape[-1], 1)  # log w of (6) [B, kept T]
        memory = torch.cat([self.nothing.expand(len(x), 1, -1), memory], 1)
        bias = nn.functional.pad(bias, (1, 0))  # [B, 1 + kept T]
        for block, reader in zip(self.blocks, self.readers):
            x = block(x)
            if self.retrieve:
                x = reader(x, memory, bias)
        return self.head(x)


class Reader(nn.Module):
    """(6): cross attention of x [B, T, dim] to a memory [B, S, dim] whose rows have log weights [B, S]."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        key, value = self.key_value(memory).chunk(2, -1)
        query = self.query(self.norm(x))
        mask = bias[:, None, None, :].expand(-1, 1, x.shape[1], -1)  # [B, 1, T, S]
        found = nn.functional.scaled_dot_product_attention(
            query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), attn_mask=mask)
        return x + self.dropout(self.out(found.squeeze(1)))  # (6)


# ------------------------------------ From the dataset to the score ------------------------------------


def train(config: Config) -> None:
    """All that this script does, in order; what the run's folder already holds is not done again."""
    run = Run(config, config.dataset)
    if run.info.get("status") == "finished":
        print(f"{run.folder} is finished: {run.info['result']}")
        return

    device = set_up_torch(config)
    dataset = load_dataset(config.dataset)
    lives = read_lives(dataset)
    data = life_episodes(lives, device)  # [lives, episodes, steps]
    steps, shape = data["states"].shape[2], data["states"].shape[:2]
    held_out = dataset.storage.metadata["held_out_goals"]
    rooms = make_rooms(dataset, held_out)
    final_rooms = make_rooms(dataset, held_out * config.final_eval_rounds)

    learner = RADT(config, dataset.observation_space.n, dataset.action_space.n, steps, device)
    compiled = config.compile and compile_methods(learner, "actor_loss")
    facts = {"dataset_hash": dataset.storage.metadata["content_hash"], "compiled": compiled}
    learner.actor.most.copy_(data["rewards"].flip(2).cumsum(2).flip(2).amax((0, 1)))  # M of (8)
    with run.start(learner, **facts, **provenance(device)):
        rows = {"rows": torch.arange(math.prod(shape), device=device)}
        batches = draw_batches(rows, config.batch_size, config.seed, learner.updates)
        numbers = range(learner.updates + 1, config.updates + 1)
        for update in tqdm(numbers, initial=learner.updates, total=config.updates, disable=None):
            metrics = learner.update(with_memories(data, next(batches)["rows"], config))
            if run.is_due(update, config.log_every):
                run.log(update, metrics)
            if run.is_due(update, config.eval_every):
                seed = (config.seed, update, 0)
                returns = live_in_context(learner.choose, rooms, config.eval_episodes, seed)
                log_lives(run, update, "training", returns, dataset, held_out)
            run.save_when_due(learner)
        seed = (config.seed, config.updates, 1)
        returns = live_in_context(learner.choose, final_rooms, config.final_eval_episodes, seed)
        log_lives(run, config.updates, "final", returns, dataset, held_out)
        run.finish()


def load(folder: str, device: str = "cpu") -> RADT:
    """The agent of a run: `load(folder).choose(states, last)`, None for `last` where a life begins."""
    config = parse_config([f"--config_path={folder}/config.yaml"])
    checkpoint = read_saved(Path(folder, "checkpoint.pt"))
    weights = checkpoint["state"]["actor"]
    sizes = weights["projection"].shape[0], weights["projection"].shape[1], len(weights["embed_step.weight"])
    learner = RADT(config, *sizes, torch.device(device))
    restore(learner, checkpoint)
    return learner


def life_episodes(lives: list[dict], device: torch.device) -> dict[str, Tensor]:
    """States, actions and rewards of all lives by episode: [lives, episodes, steps]; and goals [lives]."""
    counts = {tuple(np.unique(life["episode"], return_counts=True)[1]) for life in lives}
    if len(counts) > 1 or len(set(*counts)) > 1:
        raise UserError("episodes or lives of different lengths: RA-DT takes equal ones")
    columns = {"goals": np.array([life["goal"] for life in lives])}
    for name in ("states", "actions", "rewards"):
        columns[name] = np.stack([life[name].reshape(len(*counts), -1) for life in lives])
    return {name: torch.as_tensor(column, device=device) for name, column in columns.items()}


def with_memories(data: dict[str, Tensor], rows: Tensor, config: Config) -> dict[str, Tensor]:
    """The episodes `rows` [B] as the learner takes them, each with a memory of another with its goal."""
    episodes, steps = data["states"].shape[1:]
    life, number = rows // episodes, rows % episodes  # [B]
    device, size, batch = rows.device, (len(rows), config.memory), {}
    same = (data["goals"] == data["goals"][life].unsqueeze(1)).float()  # [B, lives]
    other = torch.multinomial(same.scatter(1, life.unsqueeze(1), 1e-9), 1)  # [B, 1]: itself if there is none
    until = (torch.rand(len(rows), device=device) * (number + 1)).long()  # [B]: the memory is of those before
    drawn = (torch.rand(size, device=device) * until.unsqueeze(1)).long()  # [B, M]
    for name in ("states", "actions", "rewards"):
        batch[name], batch[f"memory_{name}"] = data[name][life, number], data[name][other, drawn]
    batch["memory_real"] = (until > 0).float().unsqueeze(1).expand(size).contiguous()
    past = (torch.rand(len(rows), device=device) * steps).long()  # [B]
    return batch | {"past": past * (torch.rand(len(rows), device=device) >= config.query_dropout)}


# --------------------------------- Lives, and what is learnt in context ---------------------------------


def read_lives(dataset: minari.MinariDataset) -> list[dict[str, np.ndarray]]:
    """Each life as states, actions, rewards and episode (its number), all [steps], and its goal."""
    spaces = dataset.observation_space, dataset.action_space
    if not all(isinstance(space, gym.spaces.Discrete) for space in spaces):
        raise UserError(f"this script is not for {spaces[0]} and {spaces[1]}: it takes numbers (Discrete)")
    if "held_out_goals" not in dataset.storage.metadata:
        raise UserError(f"{dataset.id} has no lives of learners: make dataset ID=reef/dark-room/histories-v0")
    lives = []
    for recorded in dataset.iterate_episodes():
        ended = np.asarray(recorded.truncations) | np.asarray(recorded.terminations)
        lives.append({
            "states": np.asarray(recorded.observations[:-1], np.int64),
            "actions": np.asarray(recorded.actions, np.int64),
            "goal": int(recorded.infos["goal"][0]),
            "rewards": np.asarray(recorded.rewards, np.float32),
            "episode": np.append(0, ended[:-1].cumsum()),
        })  # fmt: skip
    return lives


def make_rooms(dataset: minari.MinariDataset, goals: list[int]) -> gym.vector.VectorEnv:
    """An environment for each goal, side by side; the one in this repository is found by itself."""
    spec, path = dataset._eval_env_spec, Path(__file__).resolve().parent / "../collect/dark_room.py"
    module = str(spec.entry_point).partition(":")[0]
    if path.exists() and module == "reef_dark_room" and module not in sys.modules:
        found = importlib.util.spec_from_file_location(module, path)
        sys.modules[module] = importlib.util.module_from_spec(found)
        found.loader.exec_module(sys.modules[module])
    same_step = gym.vector.AutoresetMode.SAME_STEP
    with explain(f"cannot make {spec.id}", "it is in algorithms/collect/dark_room.py"):
        makers = [partial(gym.make, spec, goal=goal) for goal in goals]
        return gym.vector.SyncVectorEnv(makers, autoreset_mode=same_step, copy=False)


def live_in_context(choose: Callable, rooms: gym.vector.VectorEnv, episodes: int, seed: tuple) -> np.ndarray:
    """Returns [episodes, G] of one life in each room: nothing is forgotten between its episodes."""
    count, last = rooms.num_envs, None
    returns, number = np.zeros((episodes + 1, count)), np.zeros(count, int)
    with torch.random.fork_rng():  # training goes on as if nothing had been evaluated
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
        states, _ = rooms.reset(seed=np.random.SeedSequence(seed).generate_state(count).tolist())
        while number.min() < episodes:
            last_states, actions = states.copy(), choose(states.copy(), last)
            states, rewards, terminations, truncations, _ = rooms.step(actions)
            ended = terminations | truncations
            returns[number, np.arange(count)] += rewards
            number = np.minimum(number + ended, episodes)  # what comes after is counted in a row of its own
            last = {"states": last_states, "actions": actions, "rewards": rewards.copy(), "ended": ended}
    return returns[:-1]


def log_lives(run: "Run", update: int, phase: str, returns: np.ndarray, dataset, goals: list[int]) -> None:
    """A file of returns by episode in context, and their summary: the score is that of the last fifth."""
    known = dataset.storage.metadata
    best = np.mean([known["best_returns"][goal] for goal in goals])
    table = pd.DataFrame({"episode": np.arange(1, len(returns) + 1), "return_mean": returns.mean(1)})
    table["return_std"], table["best"] = returns.std(1), best
    run.write(f"in-context-{phase}-{update:08d}.csv", table.to_csv(index=False).encode())
    last = returns[-max(len(returns) // 5, 1) :].mean()
    result = {"score": 100 * last / best, "return_mean": last, "return_first": returns[0].mean()}
    tqdm.write(f"update {update:,}, {phase}: first episode {result['return_first']:.1f}, last {last:.1f}"
               f" of {best:.1f}")
    if phase == "final":
        run.note(**{name: float(value) for name, value in result.items()})
    elif phase == "training":
        run.log(update, {f"eval/{name}": value for name, value in result.items()})


# -------------------- Toolbox: the same in every script that has it, word for word --------------------


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


def leaves(tree) -> list:
    """The entries of a Dict in the order of its sorted keys, however deep; anything else is its own leaf."""
    if isinstance(tree, Mapping):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [tree]


def draw_batches(data: dict[str, Tensor], batch_size: int, seed: int, update: int) -> Iterator[dict]:
    """Batches `update`, `update` + 1, ...: rows drawn with replacement, by seed and batch number alone."""
    first = next(iter(data.values()))
    while True:
        block, start = divmod(update, 1000)  # the rows of 1000 batches are drawn at a time
        rows = np.random.default_rng((seed, block)).integers(len(first), size=(1000, batch_size))
        for batch_rows in torch.as_tensor(rows, device=first.device)[start:]:
            yield {name: column.index_select(0, batch_rows) for name, column in data.items()}
        update += 1000 - start


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
