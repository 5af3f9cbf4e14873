"""Episodes of stored policies: D4RL's recipe for locomotion (Fu et al., 2020, arXiv:2004.07219).

Policies from several stages of an online learner (sac.py) act in an environment, each for an equal share of
the steps. Which of them do decides what can be learnt from the data:

  random         uniformly random actions
  medium         one policy of middling return
  medium-replay  a dozen policies, from nearly random to medium: what the learner saw on its way
  medium-expert  half medium, half expert
  expert         the best policy
  expert-narrow  ten episodes of it

  (1)  a = tanh(mu(s) + sigma(s) eps),  eps ~ N(0, I), stretched from [-1, 1] to the bounds of actions

The data are the same on any x86-64 machine with FMA (processors since 2013). Networks round differently on
different processors, and a simulator lets such differences grow along an episode. So policies act in double
precision, and the simulator gets, and the dataset records, six decimals of an action, which those differences
do not reach. Without FMA or on another architecture the simulator's own sines and cosines differ.

Differences from D4RL: medium-replay is the learner's own buffer there, here its policies act once more;
Gymnasium's v5 environments, which are not the v2 of D4RL's time; fewer steps.

  python algorithms/collect/rollouts.py --config_path configs/collect/hopper/medium-v1.yaml
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import inspect
import io
import math
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from glob import glob
from importlib.metadata import version
from pathlib import Path
from typing import NewType
from unittest import mock

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pyrallis
import safetensors.torch
import torch
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace
from minari.storage import get_dataset_path
from torch import Tensor, nn
from tqdm import tqdm

REFERENCES = {  # D4RL's returns of a random policy and of an expert, from its d4rl/infos.py
    "Hopper-v5": (-20.272305, 3234.3),
    "HalfCheetah-v5": (-280.178953, 12135.0),
    "Walker2d-v5": (1.629008, 4592.3),
}
DECIMALS = 6  # of actions: far coarser than double precision, far finer than the policies' noise

Count = NewType("Count", int)  # at least 1
Size = NewType("Size", float)  # at least 0
Positive = NewType("Positive", float)  # at least a millionth
Share = NewType("Share", float)  # from 0 to 1
Precision = NewType("Precision", str)
WandbMode = NewType("WandbMode", str)


@dataclasses.dataclass
class Config:
    """Episodes of stored policies."""

    dataset: str = "reef/hopper/medium-v1"  # Minari id of the dataset to write
    environment: str = "Hopper-v5"  # Gymnasium id
    folder: str = "results/behavior/hopper"  # where the policies are, each in <name>.safetensors
    policies: str = "medium"  # names, or patterns such as replay-*; random: uniformly random actions
    steps: Count = 200_000  # transitions, rounded up to whole episodes
    episodes: int = 0  # of each policy, in place of `steps`; 0: what `steps` need
    seed: int = 0  # of starts and actions
    shards: Count = 10  # parts of the data, at least one a policy, each with random numbers of its own
    processes: int = 0  # working side by side, 0: one per core; the data do not depend on it


# ---------------------------------------- Policies and episodes ----------------------------------------


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


def load_actor(file: Path, env: gym.Env) -> TanhGaussianActor:
    """The stored actor, in double precision; its sizes follow from its tensors."""
    try:
        tensors = safetensors.torch.load_file(file)
        hidden_dim, hidden_layers = len(tensors["net.0.bias"]), len(tensors) // 2 - 1
        (obs_dim,), (act_dim,) = env.observation_space.shape, env.action_space.shape
        actor = TanhGaussianActor(obs_dim, act_dim, hidden_dim, hidden_layers).double()
        actor.load_state_dict(tensors)
    except Exception as error:  # it may be no such file, or have other names or shapes
        raise UserError(f"{file} is no actor for {env.spec.id}: {error!r:.300}") from None
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{file} is no actor for {env.spec.id}: its weights are not finite")
    return actor


def find_policies(config: Config) -> dict[str, Path | None]:
    """{name: its file, none for "random"}, in the order of `policies`."""
    found, folder = {}, Path(config.folder)
    for pattern in re.split(r"\s+", config.policies.strip()):
        if pattern == "random":
            found[pattern] = None
            continue
        files = sorted(folder / name for name in glob(f"{pattern}.safetensors", root_dir=folder))
        if not files:
            missing = folder / f"{pattern}.safetensors"
            makers = "algorithms/collect/sac.py learns policies, tools/behavior.py publishes them"
            raise UserError(f"{config.dataset} needs {missing}: {makers}")
        found |= {file.stem: file for file in files}
    return found


def read_returns(folder: str) -> dict[str, float]:
    """{policy: mean return when it was stored}, as far as snapshots.csv in the folder knows."""
    file = Path(folder, "snapshots.csv")
    try:
        return pd.read_csv(file, index_col="snapshot")["return_mean"].to_dict() if file.exists() else {}
    except (KeyError, ValueError) as error:
        raise UserError(f"{file} has not the columns snapshot and return_mean: {error!r:.200}") from None


def open_environment(name: str) -> gym.Env:
    """The environment, if its observations are vectors and its actions bounded vectors."""
    with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):  # it prints a notice
        gym.register_envs(importlib.import_module("gymnasium_robotics"))  # mazes, hands and kitchen
    try:
        env = make_clean(name)
    except Exception as error:  # environments raise whatever they like
        raise UserError(f"environment: cannot make {name}: {error!r:.200}") from None
    spaces = env.observation_space, env.action_space
    vectors = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces)
    if not vectors or not env.action_space.is_bounded():
        raise UserError(f"environment: {name} has not vectors (Box) as observations and bounded actions")
    return env


def make_clean(environment: str | gym.envs.registration.EnvSpec, **kwargs) -> gym.Env:
    """gym.make in a temporary folder of its own, where gymnasium-robotics leaves a file of each maze."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("tempfile.tempdir", folder):
        return gym.make(environment, **kwargs)


def play(
    environment: str, file: Path | None, seed: np.random.SeedSequence, steps: int, count: int
) -> list[EpisodeBuffer]:
    """One shard: whole episodes of a stored policy, or random ones; `count` of them and `steps` in all."""
    torch.set_num_threads(1)  # other shards have the other cores
    rng, env, episodes = np.random.default_rng(seed), open_environment(environment), []
    low, high = env.action_space.low, env.action_space.high
    actor = load_actor(file, env) if file else None
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    while len(episodes) < count or sum(map(len, episodes)) < steps:
        observations, actions, rewards, terminated, truncated = [observation], [], [], False, False
        while not (terminated or truncated):
            action = draw(actor, observation, rng) if actor else rng.uniform(-1, 1, low.shape)
            action = low + (action + 1) / 2 * (high - low)
            action = action.round(DECIMALS).astype(np.float32).clip(low, high)  # as it is recorded
            observation, reward, terminated, truncated, _ = env.step(action)
            observations.append(observation)
            actions.append(action)
            rewards.append(reward)
        episodes.append(make_episode(observations, actions, rewards, terminated, truncated))
        observation, _ = env.reset()
    return episodes


@torch.inference_mode()
def draw(actor: TanhGaussianActor, observation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Action [act_dim] in [-1, 1] from the policy at an observation [obs_dim]."""
    mean, log_std = actor(torch.as_tensor(observation, dtype=torch.float64))
    noise = torch.from_numpy(rng.standard_normal(len(mean)))
    return torch.tanh(mean + log_std.exp() * noise).numpy()  # (1)


def make_episode(
    observations: list, actions: list, rewards: list, terminated: bool, truncated: bool
) -> EpisodeBuffer:
    """An episode of T + 1 observations (arrays or dicts of them), T actions, T rewards, and how it ended."""
    if isinstance(observations[0], dict):
        observations = {key: np.stack([entry[key] for entry in observations]) for key in observations[0]}
    else:
        observations = np.stack(observations)
    last = np.arange(len(rewards)) == len(rewards) - 1
    return EpisodeBuffer(
        observations=observations,
        actions=np.stack(actions),
        rewards=np.array(rewards),
        terminations=last & terminated,
        truncations=last & truncated,
        infos={},  # without, Minari cannot print the episode
    )


# ---------------------------------------------- The dataset -----------------------------------------------


def roll_out(config: Config) -> None:
    """Writes the dataset that `config` describes, unless it is there."""
    env, policies = open_environment(config.environment), find_policies(config)
    files, stored = {name: file for name, file in policies.items() if file}, read_returns(config.folder)
    for file in files.values():
        load_actor(file, env)  # a bad one is said before the work begins
    free = ("dataset", "folder", "processes")
    recipe = {name: value for name, value in vars(config).items() if name not in free}
    recipe["files"] = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    if is_there(config.dataset, recipe):
        return

    start, parts = time.perf_counter(), math.ceil(config.shards / len(policies))
    owners = [name for name in policies for _ in range(parts)]
    seeds = np.random.SeedSequence(config.seed).spawn(len(owners))
    steps = 0 if config.episodes else math.ceil(config.steps / len(owners))
    counts = [len(part) for part in np.array_split(range(config.episodes), parts)] * len(policies)
    jobs = [
        (play, config.environment, policies[name], seed, steps, count)
        for name, seed, count in zip(owners, seeds, counts)
    ]
    processes = min(config.processes or os.cpu_count(), len(jobs))
    shards = list(tqdm(run_jobs(jobs, processes), config.dataset, len(jobs), unit="job", disable=None))
    summary = summarize(owners, shards, stored)
    written = write_dataset(
        config.dataset,
        [episode for shard in shards for episode in shard],
        env=env,
        algorithm_name="soft actor-critic" if files else "uniformly random actions",
        description=describe_policies(config.environment, summary),
        data_format="hdf5",
        extra={
            "recipe": recipe,
            "policies": summary,
            **references(config.environment),
            "versions": {name: version(name) for name in ("gymnasium", "mujoco", "numpy", "torch")},
        },
    )
    print(
        f"{config.dataset}: {written['total_steps']:,} steps in {written['total_episodes']:,} episodes"
        f" ({time.perf_counter() - start:.0f} s); mean return "
        + ", ".join(f"{row['return_mean']:.1f} ({name})" for name, row in summary.items())
        + f"; sha256 {written['content_hash']}"
    )


def summarize(owners: list[str], shards: list[list[EpisodeBuffer]], stored: dict) -> dict[str, dict]:
    """{policy: its episodes, steps, mean and deviation of returns, and mean return when it was stored}."""
    rows = [(owner, len(e), e.rewards.sum()) for owner, shard in zip(owners, shards) for e in shard]
    policies = pd.DataFrame(rows, columns=["policy", "steps", "return"]).groupby("policy", sort=False)
    summary = pd.DataFrame(
        {
            "episodes": policies.size(),
            "steps": policies["steps"].sum(),
            "return_mean": policies["return"].mean(),
            "return_std": policies["return"].std(ddof=0),
        }
    ).to_dict("index")
    for name in stored.keys() & summary.keys():
        summary[name]["stored_return_mean"] = stored[name]
    return summary


def references(environment: str) -> dict:
    """The metadata about reference scores; none where there are none."""
    if environment not in REFERENCES:
        return {}
    low, high = REFERENCES[environment]
    source = f"D4RL's pair for {environment.removesuffix('-v5')} (random policy, expert; d4rl/infos.py)"
    warning = "a common scale only: v5 is not the v2 of D4RL, and scores cannot be compared with its tables"
    return {"ref_min_score": low, "ref_max_score": high, "reference_source": f"{source}; {warning}"}


def describe_policies(environment: str, summary: dict[str, dict]) -> str:
    """The dataset in words, for its metadata."""
    policies = []
    for name, row in summary.items():
        text = f"{name} ({row['episodes']} episodes, mean return {row['return_mean']:.1f}"
        if "stored_return_mean" in row:
            text += f", when it was stored {row['stored_return_mean']:.1f}"
        policies.append(text + ")")
    source = references(environment).get("reference_source")
    return (
        f"Whole episodes of {environment} by {', '.join(policies)}, each for an equal share. Stored"
        " policies are a soft actor-critic's, and actions are drawn from them; random is uniform."
        + (f" Reference scores: {source}." if source else "")
    )


def is_there(dataset_id: str, recipe: dict) -> bool:
    """Whether this machine has the dataset, which is then said; one by another recipe is an error."""
    if not re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", dataset_id):
        raise UserError(f"dataset: {dataset_id!r} is no Minari id such as reef/pointmaze/umaze-v0")
    if not get_dataset_path(dataset_id).exists():
        return False
    found = minari.load_dataset(dataset_id).storage.metadata
    if found.get("recipe") != recipe:
        raise UserError(f"{dataset_id} is there, by another recipe: minari delete {dataset_id}")
    print(f"{dataset_id} is there: {found['total_steps']:,} steps, sha256 {found['content_hash']}")
    return True


def run_jobs(jobs: list[tuple], processes: int):
    """The results of jobs (function, *arguments), in their order whatever the number of processes."""
    if processes == 1:
        yield from (function(*arguments) for function, *arguments in jobs)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), watch_parent) as pool:
        futures = [pool.submit(*job) for job in jobs]
        try:
            yield from (future.result() for future in futures)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C or a failure the others need not start


def watch_parent() -> None:
    """Ends this worker when its parent is killed; it would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


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


# -------------------- Toolbox: the same in every script that has it, word for word --------------------


def leaves(tree) -> list:
    """The entries of a Dict in the order of its sorted keys, however deep; anything else is its own leaf."""
    if isinstance(tree, Mapping):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [tree]


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
    main(roll_out)
