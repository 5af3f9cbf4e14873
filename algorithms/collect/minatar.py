"""MinAtar: small Atari games, and the log of a DQN learning them (Young and Tian, 2019, arXiv:1903.03176).

A screen is 10 x 10 cells with a plane of zeros and ones for each kind of thing on it. A DQN (Mnih et al.,
2015) plays and learns, and all that it saw is the dataset `mixed`: from random play to the last policy.
`expert` is that policy alone, with a little noise.

  (1)  a: with probability epsilon any choice, else argmax_a Q(s, a)        epsilon falls from 1, along a line
  (2)  y = r + gamma r' + gamma^2 r'' + gamma^3 (1 - d) Q'(s''', a*)        fewer steps where the episode ends
  (3)  a* = argmax_a Q(s''', a)                                             d: terminated, not truncated
  (4)  L = mean huber(Q(s, a) - y)                        huber: x^2 / 2 within 1, |x| - 1/2 beyond
  (5)  Q' <- Q                                                               every `target_every` updates
  (6)  x -> round(2^k x) / 2^k         weights, hidden units and errors, before they meet in a matrix product

The data are the same on every machine, although a network that learns as it plays makes them. Networks round
differently on different processors, since the order of a sum is theirs. By (6) every product is a sum of
multiples of one power of two, few enough that double precision holds all its digits: no order rounds. All
else is done entry by entry, by operations that IEEE 754 defines to the last bit.

Every step carries the probability with which its choice was made, infos["propensity"]. Score 0 is random
play, 100 the last policy without noise.

Differences from the papers: only choices that do something in the game (the package's "minimal" ones); an
episode ends after 1,000 steps; the action that a sticky one repeats is forgotten at an episode's start; to
learn in minutes and a fiftieth of the 5,000,000 steps, one hidden layer for a convolution, returns of three
steps, double Q-learning, Adam with a falling step size, and exploration that ends sooner and lower (at 0.05
for 0.1). What is logged is the choice, not the action that a sticky one puts in its place.

  python algorithms/collect/minatar.py --config_path configs/collect/minatar/breakout/mixed-v0.yaml
"""

import contextlib
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
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import NewType
from unittest import mock

import gymnasium as gym
import minari
import numpy as np
import pyrallis
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace
from minari.storage import get_dataset_path
from tqdm import tqdm

STICKY, TIME_LIMIT = 0.1, 1000  # how often the last action is repeated instead; steps of an episode
RETURN_STEPS = 3  # rewards in (2)
WEIGHT_BITS, HIDDEN_BITS, ERROR_BITS = 16, 10, 20  # k of (6)
LARGEST = 32.0  # of weights and hidden units: with the bits above no product needs more than 53 digits
POLICIES = ("mixed", "expert")

Count = NewType("Count", int)  # at least 1
Size = NewType("Size", float)  # at least 0
Positive = NewType("Positive", float)  # at least a millionth
Share = NewType("Share", float)  # from 0 to 1
Precision = NewType("Precision", str)
WandbMode = NewType("WandbMode", str)


@dataclasses.dataclass
class Config:
    """The log of a DQN that learns a game of MinAtar."""

    dataset: str = "reef/minatar/breakout/mixed-v0"  # Minari id of the dataset to write
    game: str = "breakout"  # a game of the package
    policy: str = "mixed"  # mixed: all that training saw; expert: the last policy
    steps: Count = 100_000  # of training, and of the expert
    seed: int = 0  # of the network, choices and games
    expert_noise: Share = 0.05  # epsilon of the expert
    reference_episodes: Count = 100  # of random play and of the last policy, for the scores 0 and 100
    random_steps: Count = 2000  # before the first update; epsilon falls in these, too
    exploration: Share = 0.1  # of training, over which a line falls from 1 to 0
    epsilon: Share = 0.05  # of (1), where the line is lower
    update_every: Count = 2  # steps of the game for each update
    target_every: Count = 500  # updates
    batch_size: Count = 32  # transitions in an update
    discount: Share = 0.99  # gamma
    critic_lr: Size = 3e-4  # Adam's step size, which falls to 0 along a line
    hidden_dim: Count = 256  # units in the hidden layer


# ---------------------------------------------- The games ----------------------------------------------


@cache
def read_game(name: str) -> type:
    """A game of the package, of which only this file is read: the rest asks for tools of drawing."""
    try:
        folder = Path(distribution("minatar").locate_file("minatar/environments"))
    except PackageNotFoundError:
        raise UserError("the games are in the package minatar, which is missing: make discrete") from None
    games = sorted(file.stem for file in folder.glob("[a-z]*.py"))
    if name not in games:
        raise UserError(f"game: {name!r} is not {' or '.join(games)}")
    spec = importlib.util.spec_from_file_location(f"minatar_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Env


class Game(gym.Env):
    """Observations are planes [10, 10, kinds] of 0 and 1, choices those that do something in the game."""

    def __init__(self, game: str):
        self.game = read_game(game)()
        self.choices, self.last = self.game.minimal_action_set(), 0
        self.observation_space = gym.spaces.Box(0, 1, tuple(self.game.state_shape()), np.uint8)
        self.action_space = gym.spaces.Discrete(len(self.choices))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.game.random = np.random.RandomState(int(self.np_random.integers(2**31)))
        self.game.reset()
        self.last = 0  # to do nothing
        return self.game.state().astype(np.uint8), {}

    def step(self, action):
        if self.np_random.random() >= STICKY:
            self.last = self.choices[int(action)]
        reward, ended = self.game.act(self.last)
        return self.game.state().astype(np.uint8), float(reward), bool(ended), False, {}


def register_game(game: str) -> str:
    """The environment's id, known to Gymnasium. Its entry point, reef_minatar, is this file."""
    read_game(game)
    sys.modules.setdefault("reef_minatar", sys.modules[__name__])
    name = f"reef/{game.title().replace('_', '')}-v0"
    if name not in gym.registry:
        kwargs = {"game": game}
        gym.register(name, "reef_minatar:Game", max_episode_steps=TIME_LIMIT, kwargs=kwargs)
    return name


# ------------------------------------------------- DQN -------------------------------------------------


def fix(x: np.ndarray, bits: int, largest: float = math.inf) -> np.ndarray:
    """The nearest multiples of 2^-bits, none beyond `largest`."""
    return np.rint(x.clip(-largest, largest) * 2.0**bits) / 2.0**bits  # (6)


class DQN:
    """Q(s, a) = W2 relu(W1 s + b1) + b2 in NumPy, its target, and the update that trains it by Adam.

    `weights` are the learnt W1, b1, W2 and b2, `critic` and `target_critic` what products take for them.
    """

    def __init__(self, config: Config, inputs: int, choices: int, rng: np.random.Generator):
        self.config, self.updates, self.weights = config, 0, []
        for rows, columns in ((inputs, config.hidden_dim), (config.hidden_dim, choices)):
            self.weights += [(2 * rng.random((rows, columns)) - 1) / math.sqrt(rows), np.zeros(columns)]
        self.critic = [fix(weight, WEIGHT_BITS, LARGEST) for weight in self.weights]
        self.target_critic = self.critic
        self.means = [np.zeros_like(weight) for weight in self.weights]  # Adam's, of gradients
        self.squares = [np.zeros_like(weight) for weight in self.weights]  # and of their squares
        self.shares = [1.0, 1.0]  # of the zeros that both began with

    def forward(self, critic: list[np.ndarray], planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Planes [B, inputs] -> hidden units [B, H] and Q [B, A]."""
        w1, b1, w2, b2 = critic
        hidden = fix((planes @ w1 + b1).clip(min=0), HIDDEN_BITS, LARGEST)
        return hidden, hidden @ w2 + b2

    def gradient(self, batch: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Of (4), by each of the four weights."""
        count = np.arange(len(batch["actions"]))
        best = self.forward(self.critic, batch["next_planes"])[1].argmax(1)  # (3)
        next_q = self.forward(self.target_critic, batch["next_planes"])[1][count, best]
        target = batch["returns"] + batch["discounts"] * next_q  # (2) [B]
        hidden, q = self.forward(self.critic, batch["planes"])
        errors = np.zeros_like(q)  # slopes of huber by Q(s, .) [B, A]
        errors[count, batch["actions"]] = (q[count, batch["actions"]] - target).clip(-1, 1)  # (4)
        errors = fix(errors, ERROR_BITS)
        hidden_errors = fix(errors @ self.critic[2].T * (hidden > 0), ERROR_BITS)  # [B, H]
        sums = [batch["planes"].T @ hidden_errors, hidden_errors.sum(0), hidden.T @ errors, errors.sum(0)]
        return [each / len(count) for each in sums]

    def update(self, batch: dict[str, np.ndarray], rate: float) -> None:
        """One step of Adam, `rate` long."""
        self.updates += 1
        self.shares = [0.9 * self.shares[0], 0.999 * self.shares[1]]
        for weight, mean, square, slope in zip(self.weights, self.means, self.squares, self.gradient(batch)):
            mean += 0.1 * (slope - mean)
            square += 0.001 * (slope * slope - square)
            size = np.sqrt(square / (1 - self.shares[1])) + 1e-8
            weight -= rate * (mean / (1 - self.shares[0])) / size
        self.critic = [fix(weight, WEIGHT_BITS, LARGEST) for weight in self.weights]
        if self.updates % self.config.target_every == 0:
            self.target_critic = self.critic  # (5)


class GameLog:
    """Steps of a game, as many as there is room for: what the policy saw, chose and got."""

    def __init__(self, environment: str, room: int, seed: np.random.SeedSequence):
        self.env, self.filled = gym.make(environment, disable_env_checker=True), 0
        self.rng = np.random.default_rng(seed)
        shape, self.choices = self.env.observation_space.shape, int(self.env.action_space.n)
        self.observations = np.zeros((room, *shape), np.uint8)
        self.next_observations = np.zeros((room, *shape), np.uint8)
        self.actions, self.rewards, self.propensities = np.zeros(room, int), np.zeros(room), np.zeros(room)
        self.terminations, self.truncations = np.zeros(room, bool), np.zeros(room, bool)
        self.seen, _ = self.env.reset(seed=int(self.rng.integers(2**31)))

    def step(self, learner: DQN, epsilon: float) -> None:
        """One more step of the game by (1)."""
        q = learner.forward(learner.critic, self.seen.reshape(1, -1).astype(float))[1]
        best = action = int(q.argmax())
        if self.rng.random() < epsilon:  # (1)
            action = int(self.rng.integers(self.choices))
        following, reward, terminated, truncated, _ = self.env.step(action)
        row, self.filled = self.filled, self.filled + 1
        self.observations[row], self.next_observations[row] = self.seen, following
        self.actions[row], self.rewards[row] = action, reward
        self.terminations[row], self.truncations[row] = terminated, truncated
        self.propensities[row] = epsilon / self.choices + (1 - epsilon) * (action == best)
        self.seen = following
        if terminated or truncated:
            self.seen, _ = self.env.reset()

    def draw(self, batch_size: int, discount: float) -> dict[str, np.ndarray]:
        """Steps drawn with replacement, each with the rewards of up to three and what is seen after them."""
        first = self.rng.integers(self.filled - RETURN_STEPS + 1, size=batch_size)
        last, returns, discounts = first, self.rewards[first], np.full(batch_size, discount)
        for _ in range(RETURN_STEPS - 1):
            goes_on = ~(self.terminations[last] | self.truncations[last])
            last = last + goes_on
            returns = returns + np.where(goes_on, discounts * self.rewards[last], 0)  # (2)
            discounts = np.where(goes_on, discounts * discount, discounts)
        return {
            "planes": self.observations[first].reshape(batch_size, -1).astype(float),
            "actions": self.actions[first],
            "returns": returns,
            "next_planes": self.next_observations[last].reshape(batch_size, -1).astype(float),
            "discounts": discounts * ~self.terminations[last],  # of Q', 0 where there is no more
        }

    def episodes(self) -> list[EpisodeBuffer]:
        """The episodes, the last cut where the log ends."""
        ends = np.flatnonzero(self.terminations[: self.filled] | self.truncations[: self.filled]) + 1
        parts = [part for part in np.split(np.arange(self.filled), ends) if len(part)]
        return [self.episode(part) for part in parts]

    def episode(self, rows: np.ndarray) -> EpisodeBuffer:
        cut = np.arange(len(rows)) == len(rows) - 1  # where it did not terminate
        return EpisodeBuffer(
            observations=np.concatenate([self.observations[rows], self.next_observations[rows[-1:]]]),
            actions=self.actions[rows],
            rewards=self.rewards[rows],
            terminations=self.terminations[rows],
            truncations=cut & ~self.terminations[rows],
            infos={"propensity": self.propensities[rows]},
        )


def learn(config: Config, environment: str, seeds: list[np.random.SeedSequence]) -> tuple[DQN, GameLog]:
    """The DQN after so many steps of the game, and the log of all."""
    log = GameLog(environment, config.steps, seeds[0])
    inputs = math.prod(log.seen.shape)
    learner = DQN(config, inputs, log.choices, np.random.default_rng(seeds[1]))
    for step in tqdm(range(config.steps), config.dataset, disable=None):
        done = step / config.steps
        fallen = done / config.exploration if config.exploration else 1.0
        log.step(learner, max(1 - fallen, config.epsilon))
        if step >= max(config.random_steps, RETURN_STEPS) and step % config.update_every == 0:
            learner.update(log.draw(config.batch_size, config.discount), config.critic_lr * (1 - done))
    return learner, log


def mean_return(
    environment: str, learner: DQN, epsilon: float, episodes: int, seed: np.random.SeedSequence
) -> float:
    """Mean return of so many episodes."""
    log = GameLog(environment, episodes * TIME_LIMIT, seed)
    while (log.terminations | log.truncations).sum() < episodes:
        log.step(learner, epsilon)
    return float(log.rewards.sum() / episodes)


# ---------------------------------------------- The dataset -----------------------------------------------


def make_log(config: Config) -> None:
    """Writes the dataset that `config` describes, with its reference scores, unless it is there."""
    if config.policy not in POLICIES:
        raise UserError(f"policy: {config.policy!r} is not {' or '.join(POLICIES)}")
    environment = register_game(config.game)
    recipe = {name: value for name, value in vars(config).items() if name != "dataset"}
    if is_there(config.dataset, recipe):
        return

    start, seeds = time.perf_counter(), np.random.SeedSequence(config.seed).spawn(5)
    learner, log = learn(config, environment, seeds[:2])
    returns = {
        "random": mean_return(environment, learner, 1.0, config.reference_episodes, seeds[2]),
        "expert": mean_return(environment, learner, 0.0, config.reference_episodes, seeds[3]),
    }
    if config.policy == "expert":
        log = GameLog(environment, config.steps, seeds[4])
        for _ in range(config.steps):
            log.step(learner, config.expert_noise)
    written = write_dataset(
        config.dataset,
        log.episodes(),
        env=gym.make(environment),
        eval_env=environment,
        algorithm_name="DQN",
        description=describe_log(config),
        ref_min_score=returns["random"],
        ref_max_score=returns["expert"],
        num_episodes_average_score=config.reference_episodes,
        data_format="hdf5",
        jpeg_encoding=False,
        requirements=["minatar"],
        extra={
            "recipe": recipe,
            "versions": {name: version(name) for name in ("minatar", "gymnasium", "numpy")},
        },
    )
    print(
        f"{config.dataset}: {written['total_steps']:,} steps in {written['total_episodes']:,} episodes"
        f" ({time.perf_counter() - start:.0f} s); mean return {returns['random']:.2f} (random),"
        f" {returns['expert']:.2f} (expert); sha256 {written['content_hash']}"
    )


def describe_log(config: Config) -> str:
    """The dataset in words, for its metadata."""
    who = {
        "mixed": "all steps of a DQN's training, from random play to its last policy",
        "expert": f"the last policy of a DQN, with any choice in {config.expert_noise:.0%} of the steps",
    }
    return (
        f"{config.game} of MinAtar: {who[config.policy]}. infos['propensity'][t] is the probability with"
        " which actions[t] was chosen. ref_min_score is the mean return of random play and ref_max_score that"
        " of the last policy without noise; an episode ends after 1,000 steps."
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
    main(make_log)
