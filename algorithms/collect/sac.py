"""SAC: soft actor-critic (Haarnoja et al., 2018, arXiv:1812.05905), the learner behind our own datasets.

The actor earns reward and entropy at once; a learned temperature holds its entropy near a target. A policy
whose evaluation beats all before it becomes a rung of the run's ladder: ladder/<update>.safetensors, the
actor's weights in half precision. Evaluations sample from the policy, as collecting a dataset with it does.

  (1)  y = r + gamma (1 - d) (min_i Q'_i(s', a') - alpha log pi(a'|s')),  a' ~ pi(s')      d: not a truncation
  (2)  L_Q = sum_i mean (Q_i(s, a) - y)^2
  (3)  L_pi = mean (alpha log pi(a|s) - min_i Q_i(s, a)),  a ~ pi(s)
  (4)  L_alpha = log alpha (H + |A|),  H = -mean log pi(a|s)             after (3); |A|: entries of an action
  (5)  Q' <- Q' + tau (Q - Q')

Differences from the paper: an update follows a step in each of several environments, where the paper takes
one step in one; critics learn faster than the actor.

The same seed gives the same bits, unless the run was resumed: a checkpoint holds no replay buffer, and a
resumed run first fills a new one with refill_steps of the ladder's policies and its own. metrics.csv counts
all steps that went into a buffer (but those that a killed process made after its last checkpoint), and how
often the run was resumed.

  python algorithms/collect/sac.py --config_path configs/collect/sac/hopper.yaml
"""

import copy
import dataclasses
import difflib
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import get_args

import filelock
import gymnasium as gym
import numpy as np
import pandas as pd
import psutil
import pyrallis
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm


def limit(default, low: float = -math.inf, high: float = math.inf, choices: tuple = ()):
    """A Config field with its own limits; without one an int is at least 1 and a float at least 0."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "choices": choices})


@dataclasses.dataclass
class Config:
    """SAC. Write `null` for none and true or false for a switch."""

    environment: str = "Hopper-v5"  # Gymnasium id
    seed: int = limit(0, 0, 2**32 - 1)  # of networks, batches, exploration and evaluations
    variant: str = "default"  # names these settings in the run's folder
    updates: int = 1_000_000  # gradient updates
    environments: int = 4  # side by side; each makes a step before every update
    buffer_size: int = 1_000_000  # transitions; the oldest give way
    random_steps: int = 10_000  # transitions of uniformly random actions before the first update
    refill_steps: int = 100_000  # of the ladder's policies and its own, before a resumed run goes on
    batch_size: int = 256  # transitions in an update
    discount: float = limit(0.99, 0, 1)  # gamma
    tau: float = limit(0.005, 0, 1)  # rate of the target network
    actor_lr: float = 3e-4  # Adam's step size
    critic_lr: float = 1e-3  # Adam's step size
    temperature_lr: float = 3e-4  # Adam's step size
    hidden_dim: int = 256  # units in a hidden layer
    hidden_layers: int = 2  # hidden layers of every network
    eval_every: int = 5000  # updates between evaluations
    eval_episodes: int = 20  # episodes of an evaluation along the way
    final_eval_episodes: int = 100  # episodes of the evaluation after the last update
    log_every: int = 1000  # updates between rows of metrics.csv
    checkpoint_every: int = 10_000  # updates between checkpoints
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    threads: int = limit(0, low=0)  # CPU threads; 0: torch's choice
    compile: bool = True  # compile the losses
    precision: str = limit("highest", choices=("highest", "high", "medium"))  # of float32 matrix products
    wandb_mode: str = limit("offline", choices=("offline", "online", "disabled"))  # mirror of the CSV files
    wandb_project: str = "reef"  # wandb project
    output_dir: str = "results/runs"  # where run folders go


# ---------------------------------------------- SAC -----------------------------------------------


class SAC:
    """Networks, target, temperature and optimisers, and the update that trains them."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int, device: torch.device):
        self.config, self.updates = config, 0
        size = (obs_dim, act_dim, config.hidden_dim, config.hidden_layers)
        self.units = Units(obs_dim, act_dim).to(device)
        self.actor = TanhGaussianActor(*size).to(device)
        self.critic = EnsembleCritic(*size).to(device)
        self.target_critic = copy.deepcopy(self.critic)
        self.temperature = Temperature().to(device)
        adam = partial(torch.optim.Adam, fused=True)
        self.actor_optimizer = adam(self.actor.parameters(), config.actor_lr)
        self.critic_optimizer = adam(self.critic.parameters(), config.critic_lr)
        self.temperature_optimizer = adam(self.temperature.parameters(), config.temperature_lr)

    def critic_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            next_actions, log_prob = self.actor.sample(batch["next_observations"])  # [B, A], [B]
            next_q = self.target_critic(batch["next_observations"], next_actions).amin(0)  # [B]
            soft = next_q - self.temperature() * log_prob
            target = batch["rewards"] + self.config.discount * (1 - batch["terminations"]) * soft  # (1) [B]
        q = self.critic(batch["observations"], batch["actions"])  # [2, B]
        loss = (q - target).square().mean(1).sum()  # (2)
        return loss, {"critic/loss": loss.detach(), "critic/q_mean": q.detach().mean()}

    def actor_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        actions, log_prob = self.actor.sample(batch["observations"])  # [B, A], [B]
        q = self.critic(batch["observations"], actions).amin(0)  # [B]
        loss = (self.temperature().detach() * log_prob - q).mean()  # (3)
        return loss, {"actor/loss": loss.detach(), "actor/entropy": -log_prob.detach().mean()}

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.updates += 1
        loss, metrics = self.critic_loss(batch)
        descend(self.critic_optimizer, loss)
        loss, actor_metrics = self.actor_loss(batch)
        descend(self.actor_optimizer, loss)
        surplus = actor_metrics["actor/entropy"] + batch["actions"].shape[-1]
        descend(self.temperature_optimizer, self.temperature.log * surplus)  # (4)
        polyak(self.target_critic, self.critic, self.config.tau)  # (5)
        return metrics | actor_metrics | {"actor/temperature": self.temperature().detach()}

    @torch.inference_mode()
    def act(self, observations) -> np.ndarray:
        """Raw observations [..., obs_dim], or Dicts -> mean actions [..., act_dim] in environment units."""
        mean, _ = self.actor(self.units.to_learner(observations))
        return self.units.to_environment(torch.tanh(mean))

    @torch.inference_mode()
    def explore(self, observations) -> np.ndarray:
        """As `act`, but drawn from the policy."""
        return self.units.to_environment(self.actor.sample(self.units.to_learner(observations))[0])


Algorithm = SAC  # the name by which the plumbing below knows it


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


class Temperature(nn.Module):
    """alpha > 0, learned through its logarithm."""

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


# ------------------------------ Online: in place of a dataset and `train` ------------------------------


def make_simulators(name: str, count: int) -> gym.vector.VectorEnv:
    """`count` environments side by side, of vectors (or Dicts of them) and bounded vectors as actions."""
    try:
        mode = gym.vector.AutoresetMode.SAME_STEP
        makers = [partial(gym.make, name)] * count
        simulators = gym.vector.SyncVectorEnv(makers, copy=False, autoreset_mode=mode)
    except Exception as error:  # environments raise whatever they like
        raise UserError(f"environment: cannot make {name}: {error!r:.200}") from None
    space = simulators.single_action_space
    flat_dim(simulators.single_observation_space)
    flat_dim(space, dicts=False)
    if not np.isfinite([space.low, space.high]).all():
        raise UserError(f"environment: the actions of {name} have no bounds: {space}")
    return simulators


class ReplayBuffer:
    """The last `size` transitions in the learner's units, on its device."""

    def __init__(self, size: int, obs_dim: int, act_dim: int, device: torch.device):
        shapes = {"observations": (obs_dim,), "actions": (act_dim,), "rewards": (), "terminations": (),
                  "next_observations": (obs_dim,)}
        needed, cuda = 4 * size * (2 * obs_dim + act_dim + 2), device.type == "cuda"  # float32
        free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
        if needed > free:
            raise UserError(f"buffer_size: {size:,} transitions need {needed / 1e9:,.1f} GB of memory; "
                            f"{free / 1e9:,.1f} GB are free")
        self.columns = {key: torch.zeros(size, *shape, device=device) for key, shape in shapes.items()}
        self.size, self.added = size, 0

    def add(self, **rows) -> None:
        """One transition of every environment: [E, obs_dim], [E, act_dim] or [E]; the oldest give way."""
        places = torch.arange(self.added, self.added + len(rows["rewards"])) % self.size
        for key, column in self.columns.items():
            column[places] = torch.as_tensor(rows[key], dtype=torch.float32, device=column.device)
        self.added += len(places)

    def draw(self, batch_size: int) -> dict[str, Tensor]:
        """A batch drawn with replacement."""
        rows = torch.randint(min(self.added, self.size), (batch_size,), device=self.columns["rewards"].device)
        return {key: column.index_select(0, rows) for key, column in self.columns.items()}


class Explorer:
    """A policy that steps through environments side by side; every transition goes into the buffer."""

    def __init__(self, environments: gym.vector.VectorEnv, algorithm: SAC, buffer: ReplayBuffer, seed: tuple):
        self.environments, self.algorithm, self.buffer = environments, algorithm, buffer
        *seeds, last = np.random.SeedSequence(seed).generate_state(environments.num_envs + 1).tolist()
        environments.action_space.seed(last)
        self.observations = flatten(environments.reset(seed=seeds)[0])

    def step(self, random: bool) -> None:
        """One step in each environment, of the policy or of uniformly random actions."""
        before, space = self.observations, self.environments.action_space
        actions = space.sample() if random else self.algorithm.explore(before)
        observations, rewards, terminations, truncations, infos = self.environments.step(actions)
        self.observations = flatten(observations)
        following = self.observations.copy()
        for i in np.flatnonzero(terminations | truncations):
            following[i] = flatten(infos["final_obs"][i])  # its last observation, not the next one's first
        self.buffer.add(observations=before, actions=self.algorithm.units.scale_actions(actions),
                        rewards=rewards, next_observations=following, terminations=terminations)


def learn(config: Config) -> None:
    """Learns in the environment, keeps the ladder and records; what the run's folder holds is not redone."""
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

    evaluated, explored = (make_simulators(config.environment, n) for n in (10, config.environments))
    space = explored.single_action_space
    sizes = flat_dim(explored.single_observation_space), flat_dim(space, dicts=False)
    algorithm, buffer = Algorithm(config, *sizes, device), ReplayBuffer(config.buffer_size, *sizes, device)
    bounds = {"low": torch.as_tensor(space.low), "high": torch.as_tensor(space.high)}
    algorithm.units.load_state_dict(bounds, strict=False)
    compiled = config.compile and compile_losses(algorithm, device)
    run.start(compiled=compiled, dataset_hash=None, **provenance(device))
    history, fill = run.history["metrics"], config.random_steps
    last = history[-1] if history else {"environment_steps": 0, "resumed": 0, "time/wall_seconds": 0}
    steps, resumed, earlier = (last[key] for key in ("environment_steps", "resumed", "time/wall_seconds"))
    if run.checkpoint:
        restore(algorithm, run.checkpoint)
        fill, resumed = config.refill_steps, resumed + 1
        print(f"resumed at update {algorithm.updates:,}: first {fill:,} steps fill a new buffer")
        torch.set_rng_state(run.checkpoint["rng"]["cpu"])
        torch.cuda.set_rng_state_all(run.checkpoint["rng"]["cuda"])
    for rung in (run.folder / "ladder").glob("[0-9]*"):
        if int(rung.name.partition(".")[0]) > algorithm.updates:  # a killed process left it
            rung.unlink()

    def evaluation(phase: str, episodes: int) -> dict[str, float]:
        seed = config.seed, algorithm.updates, int(phase == "final")
        with torch.random.fork_rng([device] * (device.type == "cuda")):  # training's own stays as it was
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
            table = evaluate(algorithm.explore, evaluated, episodes, seed)
        stamped = table.reset_index(names="episode").assign(update=algorithm.updates, phase=phase)
        run.record("evaluations", stamped[["update", "phase", "episode", *table]].to_dict("records"))
        result = {"return_mean": table["return"].mean(), "return_std": table["return"].std(ddof=0),
                  "length_mean": table["length"].mean(), "success": table["success"].mean()}
        shown = ", ".join(f"{key} {value:.2f}" for key, value in result.items() if not math.isnan(value))
        progress.write(f"update {algorithm.updates:,}, {phase} evaluation: {shown}")
        return {f"eval/{key}": float(value) for key, value in result.items()}

    def keep(mean: float) -> None:
        """The policy as a rung of the ladder, if `mean` beats the return of every evaluation before."""
        if all(mean > row.get("eval/return_mean", -math.inf) for row in history):
            tensors = {key: value.half().cpu() for key, value in algorithm.actor.state_dict().items()}
            (run.folder / "ladder").mkdir(exist_ok=True)
            run.write(f"ladder/{algorithm.updates:09d}.safetensors", safetensors.torch.save(tensors))

    explorer = Explorer(explored, algorithm, buffer, (config.seed, resumed, 2))  # 0 and 1: evaluations
    progress = tqdm(total=config.updates, initial=algorithm.updates, unit=" updates", disable=None)
    try:
        newest = copy.deepcopy(algorithm.actor.state_dict())
        rungs = [*map(safetensors.torch.load_file, sorted(run.folder.glob("ladder/*.safetensors")))]
        for number, policy in enumerate([*rungs, newest], 1):  # the lost buffer had steps of older ones
            algorithm.actor.load_state_dict(policy)
            while buffer.added < fill * number // (len(rungs) + 1) and algorithm.updates < config.updates:
                explorer.step(random=not resumed)
        mark, marked = clock(), algorithm.updates
        while algorithm.updates < config.updates:
            explorer.step(random=False)
            metrics, update = algorithm.update(buffer.draw(config.batch_size)), algorithm.updates
            every = config.log_every, config.eval_every, config.checkpoint_every
            due = [update % interval == 0 or update == config.updates for interval in every]
            if not any(due):
                continue
            row = {"update": update, "environment_steps": steps + buffer.added, "resumed": resumed}
            row |= {key: float(value) for key, value in metrics.items()}
            if lost := ", ".join(key for key, value in row.items() if not math.isfinite(value)):
                raise UserError(f"diverged by update {update}: {lost} not finite; lower a learning rate", 3)
            row["time/updates_per_second"] = (update - marked) / (clock() - mark)
            progress.update(update - marked)
            if due[1]:
                row |= evaluation("training", config.eval_episodes)
                keep(row["eval/return_mean"])
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
        numbers |= {"best_return": table["eval/return_mean"].max(), "wall_seconds": earlier + clock() - began}
        numbers["updates_per_second"] = table["time/updates_per_second"].median()
        numbers |= {"environment_steps": int(table["environment_steps"].iloc[-1]), "resumed": resumed}
        result = "return {return_mean:.1f} +- {return_std:.1f} after {environment_steps:,} environment steps"
        result += " (best on the way, chosen with the simulator: {best_return:.1f})"
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
    main(learn)
