"""DQN for choices: double Q-learning, which fails offline (van Hasselt et al., 2015, arXiv:1509.06461).

Online, a choice that the critic overrates is tried, and the critic learns better. A dataset never answers
back: (1) seeks out what is overrated, (2) hands it on, and Q can grow beyond any return. It is here as the
naive learner beside which the others are to be seen: cql, bcq and iql are what can be done against that.

  (1)  a* = argmax_a Q(s', a)
  (2)  y = r + gamma (1 - d) Q'(s', a*)                            d: terminated, not truncated
  (3)  L = mean huber(Q(s, a) - y)                                 huber: x^2 / 2 within 1, |x| - 1/2 beyond
  (4)  Q' <- Q' + tau (Q - Q')

Choices that infos["action_mask"] forbids, in the data or in the environment, are left out everywhere.

Differences from the paper: nothing is ever tried; Q' follows slowly, where that copies Q at times; Adam;
images go through a convolution of its own.

  python algorithms/discrete/dqn.py --config_path configs/discrete/dqn/reef/sepsis/clinician-v0.yaml
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
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
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
from gymnasium.envs.registration import WrapperSpec
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
    """DQN. Write `null` for none and true or false for a switch."""

    dataset: str = "reef/sepsis/clinician-v0"  # Minari id, on this machine or on the hub
    seed: int = 0  # of networks, batches, noise and evaluations
    variant: str = "default"  # names these settings in the run's folder and in the tables
    updates: Count = 1_000_000  # gradient updates
    batch_size: Count = 256  # transitions in an update
    discount: Share = 0.99  # gamma
    tau: Share = 0.005  # rate of the target network
    critic_lr: Size = 3e-4  # Adam's step size
    hidden_dim: Count = 256  # units in a hidden layer
    hidden_layers: Count = 2  # hidden layers of every network
    normalize_states: bool = True  # standardise vectors by the dataset's mean and deviation
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


# ------------------------------------------ DiscreteDQN -------------------------------------------


class DiscreteDQN:
    """Critic, target and optimiser, and the update that trains them on batches of the data."""

    def __init__(self, config: Config, encoder: "Encoder"):
        self.config, self.encoder, self.updates = config, encoder, 0
        choices, device = int(encoder.choices), encoder.mean.device
        size = (encoder.shape, config.hidden_dim, config.hidden_layers)
        self.critic = make_network(*size, choices).to(device)
        self.target_critic = copy.deepcopy(self.critic)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), config.critic_lr, fused=True)

    def critic_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        q = self.critic(batch["observations"])  # [B, A]
        with torch.no_grad():
            after = only_allowed(self.critic(batch["next_observations"]), batch.get("next_allowed"))
            best = after.argmax(-1, keepdim=True)  # (1) [B, 1]
            next_q = self.target_critic(batch["next_observations"]).gather(-1, best).squeeze(-1)  # [B]
            target = batch["rewards"] + self.config.discount * (1 - batch["terminations"]) * next_q  # (2)
        chosen = q.gather(-1, batch["actions"].unsqueeze(-1)).squeeze(-1)  # [B]
        loss = nn.functional.smooth_l1_loss(chosen, target)  # (3)
        return loss, {"critic/loss": loss.detach(), "critic/q_mean": chosen.detach().mean()}

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.updates += 1
        return self.learn(batch)

    def learn(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every step of an update; on a GPU one CUDA graph: what `updates` decides comes as an argument."""
        loss, metrics = self.critic_loss(self.encoder.encode_batch(batch))
        descend(self.critic_optimizer, loss)
        polyak(self.target_critic, self.critic, self.config.tau)  # (4)
        return metrics

    @torch.inference_mode()
    def probabilities(self, observations, allowed=None) -> np.ndarray:
        """Raw observations [...] -> probabilities [..., A] of choices (`allowed` [..., A]): one is sure."""
        best = only_allowed(self.critic(self.encoder.encode(observations)), allowed).argmax(-1)
        return nn.functional.one_hot(best, int(self.encoder.choices)).cpu().numpy()

    def choose(self, observations, allowed=None) -> np.ndarray:
        """Raw observations, one or a batch -> the best choices (`allowed`), in the environment's numbers."""
        return self.probabilities(observations, allowed).argmax(-1) + int(self.encoder.first_choice)

    def act(self, observations) -> np.ndarray:
        """As `choose`, of all choices."""
        return self.choose(observations)


# -------------------------------------------- Networks --------------------------------------------


def mlp(inputs: int, hidden_dim: int, hidden_layers: int, outputs: int) -> nn.Sequential:
    """ReLU network [..., inputs] -> [..., outputs]."""
    sizes = [inputs] + [hidden_dim] * hidden_layers
    hidden = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


def make_network(shape: tuple, hidden_dim: int, hidden_layers: int, outputs: int) -> nn.Module:
    """[..., *shape] -> [..., outputs]: an MLP of vectors, convolutions and an MLP of planes."""
    if len(shape) == 1:
        return mlp(shape[0], hidden_dim, hidden_layers, outputs)
    return PlaneNetwork(shape, hidden_dim, hidden_layers, outputs)


class PlaneNetwork(nn.Module):
    """Planes [..., height, width, channels] -> [..., outputs]: halved until 16 wide, then one 3 x 3 layer."""

    def __init__(self, shape: tuple, hidden_dim: int, hidden_layers: int, outputs: int):
        super().__init__()
        (height, width, channels), layers = shape, []
        while max(height, width) > 16:
            layers += [nn.Conv2d(channels, 32, 4, stride=2, padding=1), nn.ReLU()]
            height, width, channels = height // 2, width // 2, 32
        self.convolutions = nn.Sequential(*layers, nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.Flatten())
        self.head = mlp(32 * (height - 2) * (width - 2), hidden_dim, hidden_layers, outputs)

    def forward(self, planes: Tensor) -> Tensor:
        x = planes.reshape(-1, *planes.shape[-3:])
        outputs = self.head(self.convolutions(x.permute(0, 3, 1, 2)))
        return outputs.view(*planes.shape[:-3], -1)


# ------------------------------------ From the dataset to the score ------------------------------------


def train(config: Config) -> None:
    """All that this script does, in order; what the run's folder already holds is not done again."""
    run = Run(config, config.dataset)
    if run.info.get("status") == "finished":
        print(f"{run.folder} is finished: {run.info['result']}")
        return

    device = set_up_torch(config)
    find_local_environments()
    dataset = load_dataset(config.dataset)
    read = image_alone(dataset)
    check_memory(read, device, copies=3)
    environments = make_environments(read, config.environment)
    episodes, dataset_hash = read_choices(dataset)
    scale_rewards(episodes, config.reward_scale, config.reward_shift, config.normalize_rewards)
    encoder = fit_encoder(episodes, dataset, config.normalize_states).to(device)
    data = choice_transitions(episodes, encoder)
    known = dataset.storage.metadata
    references = known.get("ref_min_score", config.ref_min), known.get("ref_max_score", config.ref_max)

    learner = DiscreteDQN(config, encoder)
    compiled = config.compile and compile_methods(learner, "critic_loss")
    with run.start(learner, dataset_hash=dataset_hash, compiled=compiled, **provenance(device)):
        batches = draw_batches(data, config.batch_size, config.seed, learner.updates)
        numbers = range(learner.updates + 1, config.updates + 1)
        for update in tqdm(numbers, initial=learner.updates, total=config.updates, disable=None):
            metrics = learner.update(next(batches))
            if run.is_due(update, config.log_every):
                run.log(update, metrics | {"actor/agreement": agreement(learner.probabilities, data)})
            if run.is_due(update, config.eval_every) and environments:
                seed = (config.seed, update, 0)
                table = evaluate_choices(learner.choose, environments, config.eval_episodes, seed)
                run.log_episodes(update, "training", table, references)
            run.save_when_due(learner)
        if environments:
            seed = (config.seed, config.updates, 1)
            table = evaluate_choices(learner.choose, environments, config.final_eval_episodes, seed)
            run.log_episodes(config.updates, "final", table, references)
        run.finish()


def load(folder: str, device: str = "cpu") -> DiscreteDQN:
    """The policy of a run: `load(folder).act(observation)` takes raw observations, one or a batch."""
    config = parse_config([f"--config_path={folder}/config.yaml"])
    checkpoint = read_saved(Path(folder, "checkpoint.pt"))
    learner = DiscreteDQN(config, Encoder(**checkpoint["state"]["encoder"]).to(device))
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


# ------------------------ Data of choices: states, vectors or planes, and numbers ------------------------


def read_choices(dataset: minari.MinariDataset) -> tuple[list[dict[str, np.ndarray]], str]:
    """The episodes, each checked, and the hash of all that was recorded and is read.

    An episode of T steps has observations [T + 1] (int64 states), [T + 1, obs_dim] (float32) or [T + 1,
    height, width, channels] (uint8 planes), actions [T] (int64), rewards and terminations [T] (float32), and
    allowed [T + 1, A] (bool) where infos have an action_mask.
    """
    if not isinstance(dataset.action_space, gym.spaces.Discrete):
        raise UserError(f"this script is not for {dataset.action_space}: see algorithms/offline for vectors")
    kind, episodes, digest = choose_kind(image_of(dataset.observation_space)), [], hashlib.sha256()
    for recorded in dataset.iterate_episodes():
        where, steps = f"{dataset.id}, episode {recorded.id}", len(recorded.rewards)
        for field in ("observations", "actions", "rewards", "terminations", "truncations"):
            length = steps + 1 if field == "observations" else steps
            for array in map(np.asarray, leaves(image_of(getattr(recorded, field)))):
                if steps == 0 or len(array) != length:
                    raise UserError(f"{where} is malformed: {steps} steps, {field} of shape {array.shape}")
                if not np.isfinite(array).all():
                    raise UserError(f"{where}: {field} are not all finite")
                digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        if not all(map(dataset.action_space.contains, np.unique(recorded.actions))):
            raise UserError(f"{where}: actions are not all in {dataset.action_space}")
        seen = image_of(recorded.observations)
        episodes.append({
            "observations": flatten(seen) if kind is np.float32 else np.asarray(seen, kind),
            "actions": np.asarray(recorded.actions, np.int64),
            "rewards": np.float32(recorded.rewards),
            "terminations": np.float32(recorded.terminations),
        })
        if "action_mask" in (recorded.infos or {}):
            episodes[-1]["allowed"] = read_mask(recorded, dataset.action_space, where)
    if len({"allowed" in episode for episode in episodes}) > 1:
        raise UserError(f"{dataset.id}: infos have an action_mask in some episodes only")
    if not episodes or sum(len(episode["rewards"]) for episode in episodes) != dataset.total_steps:
        raise UserError(f"{dataset.id} lacks steps: {dataset.total_steps:,} are announced; get it anew")
    return episodes, digest.hexdigest()


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


def image_of(tree):
    """The image of a Dict that has one, or of its space (minigrid's); anything else is itself."""
    has_one = isinstance(tree, Mapping) and "image" in {*tree}  # `in` a space asks for elements, not for keys
    return tree["image"] if has_one else tree


def choose_kind(space: gym.Space) -> type:
    """How observations are kept: int64 states, uint8 planes, or float32 vectors."""
    if isinstance(space, gym.spaces.Discrete):
        return np.int64
    if isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3:
        return np.uint8
    vector_shapes(space)  # an error where they are no vectors
    return np.float32


class Encoder(nn.Module):
    """From observations to the networks' input: states one-hot, vectors standardised, planes in [0, 1]."""

    def __init__(self, mean, std, states, first_state, choices, first_choice):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32))
        counts = {"states": states, "first_state": first_state}  # states: 0 where observations are no states
        counts |= {"choices": choices, "first_choice": first_choice}
        for name, value in counts.items():
            self.register_buffer(name, torch.as_tensor(int(value)))
        shape = tuple(self.mean.shape)
        self.channels_first = len(shape) == 3 and shape[0] < min(shape[1:])  # frames one upon another
        channels_last = (*shape[1:], shape[0]) if self.channels_first else shape
        self.shape = (int(states),) if states else channels_last  # of the networks' input

    def forward(self, observations: Tensor) -> Tensor:
        """Observations as they are kept -> [..., *shape]."""
        if len(self.mean) == 0:
            return nn.functional.one_hot(observations - self.first_state, self.shape[0]).float()
        scaled = (observations - self.mean) / self.std
        return scaled.movedim(-3, -1) if self.channels_first else scaled

    def encode(self, observations) -> Tensor:
        """Raw observations of an environment, or Dicts -> [..., *shape]."""
        observations = image_of(observations)
        if len(self.mean) and len(self.shape) == 1:
            observations = flatten(observations)
        raw, shape = np.asarray(observations), tuple(self.mean.shape) if len(self.mean) else ()
        if raw.shape[raw.ndim - len(shape) :] != shape or not np.isfinite(raw).all():
            raise UserError(f"observations {raw.shape}: not all are finite numbers [..., *{shape}]")
        return self(torch.as_tensor(raw, device=self.mean.device))

    def encode_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with observations as the networks take them."""
        names = "observations", "next_observations"
        return batch | {name: self(batch[name]) for name in names}


def fit_encoder(episodes: list, dataset: minari.MinariDataset, normalize_states: bool) -> Encoder:
    """States by their number, planes by their largest value, vectors by mean and deviation."""
    space, mean, std, states = dataset.observation_space, np.zeros(0), np.ones(0), (0, 0)
    seen = np.concatenate([episode["observations"][:-1] for episode in episodes])
    if isinstance(space, gym.spaces.Discrete):
        states = space.n, space.start
    elif seen.dtype == np.uint8:
        mean, std = np.zeros(seen.shape[1:]), np.full(seen.shape[1:], max(int(seen.max()), 1))
    elif normalize_states:
        mean, std = seen.mean(0, np.float64), seen.std(0, np.float64) + 1e-3
    else:
        mean, std = np.zeros(seen.shape[1]), np.ones(seen.shape[1])
    return Encoder(mean, std, *states, dataset.action_space.n, dataset.action_space.start)


def choice_transitions(episodes: list, encoder: Encoder) -> dict[str, Tensor]:
    """All N steps on the encoder's device, observations as kept, choices from 0; none crosses an episode."""
    names = "actions", "rewards", "terminations"
    steps = {name: np.concatenate([episode[name] for episode in episodes]) for name in names}
    columns = {
        "observations": np.concatenate([episode["observations"][:-1] for episode in episodes]),
        "actions": steps["actions"] - int(encoder.first_choice),  # [N]
        "rewards": steps["rewards"],  # [N]
        "next_observations": np.concatenate([episode["observations"][1:] for episode in episodes]),
        "terminations": steps["terminations"],  # [N]
    }
    if "allowed" in episodes[0]:
        columns["allowed"] = np.concatenate([episode["allowed"][:-1] for episode in episodes])  # [N, A]
        columns["next_allowed"] = np.concatenate([episode["allowed"][1:] for episode in episodes])
    return {name: torch.as_tensor(column, device=encoder.mean.device) for name, column in columns.items()}


def agreement(probabilities: Callable, data: dict[str, Tensor]) -> float:
    """How likely the policy makes the data's choices, on average over 1,024 fixed rows."""
    drawn, found = np.random.default_rng(0).integers(len(data["actions"]), size=1024), []
    for rows in np.split(drawn, 16):  # of whole screens more would fill the memory
        chosen = data["actions"][rows].cpu().numpy()
        allowed = data["allowed"][rows] if "allowed" in data else None
        given = probabilities(data["observations"][rows].cpu().numpy(), allowed)
        found.append(np.take_along_axis(given, chosen[:, None], 1))
    return float(np.mean(found))


def find_local_environments() -> None:
    """Environments that are scripts of collect/ (sepsis, MinAtar), for datasets that name them."""
    for name in ("sepsis", "minatar"):
        path = Path(__file__).resolve().parents[1] / f"collect/{name}.py"
        if path.exists() and f"reef_{name}" not in sys.modules:
            spec = importlib.util.spec_from_file_location(f"reef_{name}", path)
            sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[spec.name])


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


def image_alone(dataset: minari.MinariDataset) -> SimpleNamespace:
    """What scripts read of a dataset and of its environment: of observations with an image, this alone."""
    space, spec = image_of(dataset.observation_space), dataset._eval_env_spec or dataset.env_spec
    wrappers = [as_made(wrapper) for wrapper in spec.additional_wrappers] if spec else []
    if space is not dataset.observation_space:
        print(f"of the observations' {', '.join(dataset.observation_space)} only image is read")
        name, looking = "TransformObservation", {"func": image_of, "observation_space": space}
        wrappers.append(WrapperSpec(name, f"gymnasium.wrappers:{name}", looking))
    spec = spec and dataclasses.replace(spec, additional_wrappers=tuple(wrappers))
    facts = {"id": dataset.id, "total_steps": dataset.total_steps, "action_space": dataset.action_space}
    return SimpleNamespace(**facts, observation_space=space, _eval_env_spec=None, env_spec=spec)


def as_made(wrapper: WrapperSpec) -> WrapperSpec:
    """A recorded wrapper with tuples again where JSON, in which it was kept, has lists."""
    items = (wrapper.kwargs or {}).items()
    kwargs = {name: tuple(value) if isinstance(value, list) else value for name, value in items}
    return dataclasses.replace(wrapper, kwargs=kwargs)


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


class LastMasks(gym.vector.VectorWrapper):
    """Keeps infos["action_mask"], which choices the environments allow now; None where they do not say."""

    def reset(self, **options):
        observations, infos = super().reset(**options)
        self.allowed = infos.get("action_mask")
        return observations, infos

    def step(self, actions):
        result = super().step(actions)
        self.allowed = result[-1].get("action_mask")
        return result


def evaluate_choices(choose: Callable, environments, episodes: int, seed: tuple) -> pd.DataFrame:
    """As `evaluate`, where `choose` also takes the mask of the choices that are allowed."""
    masked = LastMasks(environments)
    return evaluate(lambda observations: choose(observations, masked.allowed), masked, episodes, seed)


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
