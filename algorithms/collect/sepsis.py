"""Sepsis treatment with exact values: ICU-Sepsis (Choudhary et al., 2024, arXiv:2406.05646).

A patient is in one of 713 states until death or survival; a decision is one of 25 doses (five levels of
fluids by five of vasopressors). The dynamics, estimated from intensive-care records, come with the package
icu-sepsis. As they are known, so is the worth of every policy, and what is learnt or estimated from logs can
be held against it.

  (1)  r = 1 on survival, else 0; both ends terminate; nothing is discounted
  (2)  V = r_pi + P_pi V,  J = d0 . V                    a linear system: the share who survive under pi
  (3)  pi*(s) = argmax_a r(s, a) + sum_s' P(s'|s, a) V(s')       policy iteration, until (2) rises no more

A dataset is a log: `clinician` has the doctors' own policy, as it was estimated with the dynamics, `random`
one dose as likely as another, `mixed` half of the episodes of each. Every step carries the probability with
which the policy that acted chose its dose, infos["propensity"]. Score 0 is the clinicians' value, 100 the
optimum.

A dose that the records show in a state fewer than 20 times does there what the mean of the others does (the
package's default). So does an eighth of what the clinicians choose: their policy has rare doses, too.

Differences from the package: none in states, doses, rewards and ends, and a seed gives the same course; but
it cuts an episode after 500 steps, which no patient ever sees, and tells the state's features beside it.

  python algorithms/collect/sepsis.py --config_path configs/collect/sepsis/clinician-v0.yaml
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
from importlib.metadata import version
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

STATES, ACTIONS = 716, 25
DEATH, SURVIVAL = 713, 714  # 715 comes after both, and no episode sees it
ENVIRONMENT = "reef/Sepsis-v0"
POLICIES = {"clinician": ("clinician",), "random": ("random",), "mixed": ("clinician", "random")}

Count = NewType("Count", int)  # at least 1
Size = NewType("Size", float)  # at least 0
Positive = NewType("Positive", float)  # at least a millionth
Share = NewType("Share", float)  # from 0 to 1
Precision = NewType("Precision", str)
WandbMode = NewType("WandbMode", str)


@dataclasses.dataclass
class Config:
    """Logs of sepsis treatment."""

    dataset: str = "reef/sepsis/clinician-v0"  # Minari id of the dataset to write
    policy: str = "clinician"  # clinician, random or mixed
    episodes: Count = 5000  # patients; mixed: half of them by each policy
    seed: int = 0  # of patients, doses and courses


# --------------------------------------------- The process ---------------------------------------------


@cache
def read_dynamics() -> dict[str, np.ndarray]:
    """Of the package, which is not imported: it needs an older Gym.

    transitions [716, 25, 716], starts [716], clinician [716, 25] (how often doctors chose a dose in a state).
    """
    package = importlib.util.find_spec("icu_sepsis")
    if package is None:
        raise UserError("the dynamics are in the package icu-sepsis, which is missing: make discrete")
    with np.load(Path(package.origin).parent / "envs/assets/dynamics.npz") as file:
        return {
            "transitions": file["tx_mat"],
            "starts": file["d_0"],
            "clinician": file["expert_policy"],
        }


def policy_table(name: str) -> np.ndarray:
    """Probabilities [716, 25] of the doses of "clinician", "random" or the "optimum"."""
    if name == "clinician":
        return read_dynamics()["clinician"]
    return find_optimum() if name == "optimum" else np.full((STATES, ACTIONS), 1 / ACTIONS)


def state_values(policy: np.ndarray) -> np.ndarray:
    """V [713] of the states in which a patient lives, exactly, for dose probabilities [716, 25]."""
    transitions = read_dynamics()["transitions"][:DEATH]
    step = np.einsum("sa,sat->st", policy[:DEATH], transitions)  # P_pi [713, 716]
    return np.linalg.solve(np.eye(DEATH) - step[:, :DEATH], step[:, SURVIVAL])  # (2)


def value(policy: np.ndarray) -> float:
    """The share of patients who survive under dose probabilities [716, 25]."""
    return float(read_dynamics()["starts"][:DEATH] @ state_values(policy))  # (2)


def action_values(policy: np.ndarray) -> np.ndarray:
    """Q [713, 25]: one dose, then the policy."""
    transitions = read_dynamics()["transitions"][:DEATH]
    return transitions[..., SURVIVAL] + transitions[..., :DEATH] @ state_values(policy)


@cache
def find_optimum() -> np.ndarray:
    """The best policy [716, 25], one dose a state, by policy iteration from uniform doses."""
    policy, best = policy_table("random"), 0.0
    while value(policy) > best + 1e-9:
        best = value(policy)
        doses = action_values(policy).argmax(1)  # (3)
        policy = np.eye(ACTIONS)[np.append(doses, [0, 0, 0])]
    return policy


def draw_choices(probabilities: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Choices [...] from probabilities [..., K]: where their running sum passes uniform numbers [...]."""
    running = probabilities.cumsum(-1)
    return (running <= uniform[..., None] * running[..., -1:]).sum(-1)


def simulate(policy: np.ndarray, episodes: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Courses of so many patients under dose probabilities [716, 25], all at once; T steps in the longest.

    states [N, T + 1], actions [N, T], rewards [N, T], propensities [N, T], lengths [N]; what lies beyond an
    episode's length has no meaning.
    """
    process = read_dynamics()
    states = [draw_choices(np.tile(process["starts"], (episodes, 1)), rng.random(episodes))]
    actions, lengths = [], np.zeros(episodes, int)
    while (states[-1] < DEATH).any():
        alive = states[-1] < DEATH
        numbers = rng.random((2, episodes))
        doses, following = np.zeros(episodes, int), states[-1].copy()
        doses[alive] = draw_choices(policy[states[-1][alive]], numbers[0, alive])
        chances = process["transitions"][states[-1][alive], doses[alive]]  # [alive, 716]
        following[alive] = draw_choices(chances, numbers[1, alive])
        actions.append(doses)
        states.append(following)
        lengths += alive
    states, actions = np.stack(states, 1), np.stack(actions, 1)
    ends = np.arange(actions.shape[1]) == lengths[:, None] - 1
    return {
        "states": states,
        "actions": actions,
        "rewards": (ends & (states[:, 1:] == SURVIVAL)).astype(float),  # (1)
        "propensities": policy[states[:, :-1], actions],
        "lengths": lengths,
    }


class Sepsis(gym.Env):
    """One patient: observations are states 0 to 714, actions doses 0 to 24 (fluids 5 x vasopressors)."""

    observation_space = gym.spaces.Discrete(STATES)
    action_space = gym.spaces.Discrete(ACTIONS)

    def __init__(self):
        self.process = read_dynamics()
        self.state = DEATH

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(draw_choices(self.process["starts"], np.array(self.np_random.random())))
        return self.state, {}

    def step(self, action):
        chances = self.process["transitions"][self.state, int(action)]
        self.state = int(draw_choices(chances, np.array(self.np_random.random())))
        survived = self.state == SURVIVAL
        return self.state, float(survived), self.state >= DEATH, False, {"success": survived}  # (1)


def register() -> str:
    """The environment's id, known to Gymnasium. Its entry point, reef_sepsis, is this file."""
    sys.modules.setdefault("reef_sepsis", sys.modules[__name__])
    if ENVIRONMENT not in gym.registry:
        gym.register(ENVIRONMENT, "reef_sepsis:Sepsis", max_episode_steps=1000)  # none is near as long
    return ENVIRONMENT


# ---------------------------------------------- The dataset -----------------------------------------------


def make_logs(config: Config) -> None:
    """Writes the dataset that `config` describes, with its reference scores, unless it is there."""
    if config.policy not in POLICIES:
        raise UserError(f"policy: {config.policy!r} is not {' or '.join(POLICIES)}")
    recipe = {name: value for name, value in vars(config).items() if name != "dataset"}
    if is_there(config.dataset, recipe):
        return

    start, names = time.perf_counter(), POLICIES[config.policy]
    if config.episodes < len(names):
        raise UserError(f"episodes: {config.episodes} is less than one by each of {', '.join(names)}")
    values = {name: round(value(policy_table(name)), 6) for name in ("random", "clinician", "optimum")}
    seeds = np.random.SeedSequence(config.seed).spawn(len(names))
    shares = [len(part) for part in np.array_split(np.arange(config.episodes), len(names))]
    episodes = []
    for name, count, seed in zip(names, shares, seeds):
        episodes += split(simulate(policy_table(name), count, np.random.default_rng(seed)))
    written = write_dataset(
        config.dataset,
        episodes,
        env=gym.make(register()),
        eval_env=register(),
        algorithm_name="policies of known value in a known decision process",
        description=describe_logs(config),
        ref_min_score=values["clinician"],
        ref_max_score=values["optimum"],
        num_episodes_average_score=1,  # exact values, no averages
        data_format="hdf5",
        requirements=["icu-sepsis"],
        extra={
            "recipe": recipe,
            "exact_values": values,
            "versions": {name: version(name) for name in ("icu-sepsis", "gymnasium", "numpy")},
        },
    )
    print(
        f"{config.dataset}: {written['total_steps']:,} steps in {written['total_episodes']:,} episodes"
        f" ({time.perf_counter() - start:.0f} s); exact values: {values['random']:.4f} (random),"
        f" {values['clinician']:.4f} (clinician), {values['optimum']:.4f} (optimum);"
        f" sha256 {written['content_hash']}"
    )


def split(courses: dict[str, np.ndarray]) -> list[EpisodeBuffer]:
    """Minari's episodes, each of its own length, from courses side by side."""
    episodes = []
    for i, length in enumerate(courses["lengths"]):
        episodes.append(
            EpisodeBuffer(
                observations=courses["states"][i, : length + 1],
                actions=courses["actions"][i, :length],
                rewards=courses["rewards"][i, :length],
                terminations=np.arange(length) == length - 1,
                truncations=np.zeros(length, bool),
                infos={"propensity": courses["propensities"][i, :length]},
            )
        )
    return episodes


def describe_logs(config: Config) -> str:
    """The dataset in words, for its metadata."""
    who = {
        "clinician": "the clinicians' policy, as estimated from the records",
        "random": "uniformly random doses",
        "mixed": "the clinicians' policy (the first half) and uniformly random doses (the second)",
    }
    return (
        f"Courses of sepsis patients in the ICU-Sepsis process under {who[config.policy]}. The return is 1"
        " for a patient who survives, else 0; infos['propensity'][t] is the probability with which the policy"
        " that acted chose actions[t]. ref_min_score is the exact value of the clinicians' policy and"
        " ref_max_score that of the optimum, undiscounted."
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
    main(make_logs)
