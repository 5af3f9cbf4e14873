"""Screens as the field learns from them: grey, 84 x 84, the last four at once, as in DQN (Mnih et al., 2015,
doi:10.1038/nature14236, Methods).

The hub's Atari logs (atari/breakout/expert-v0 and others) are frames of 210 x 160 x 3 bytes, one at a time:
far more numbers than it takes to play, and none that tells which way a ball flies. This makes another dataset
of such a log:

  (1)  g_t = .2125 red + .7154 green + .0721 blue of frame t, made size x size by means over areas
  (2)  o_t = (g_{t-frames+1}, ..., g_t); before its first frame, an episode repeats it

Both are done by Gymnasium's own wrappers around an episode that is played back, and the same wrappers are
recorded in the dataset: so the screens of an evaluation are made as the data's are. But the hub keeps frames
as JPEG, which moves them by some levels of grey, and the emulator's are as drawn. All else is the log's:
choices, rewards, ends, seeds, infos, reference returns. Any log of images will do, of colours
[height, width, 3] or grey [height, width].

  python algorithms/collect/screens.py --config_path configs/collect/atari/breakout-expert-v0.yaml

Differences from the paper: a step stays what it is in the log (the hub's: four frames of the emulator, the
last one seen); none are skipped or laid on one another, which takes an emulator; rewards are not cut to their
signs (a script's `reward_scale` can make them smaller).
"""

import contextlib
import dataclasses
import difflib
import hashlib
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
from pathlib import Path
from typing import NewType
from unittest import mock

import gymnasium as gym
import huggingface_hub
import minari
import numpy as np
import pyrallis
from gymnasium.envs.registration import EnvSpec, WrapperSpec, load_env_creator
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace
from minari.storage import get_dataset_path
from tqdm import tqdm

KEPT = (  # what the log's metadata say that is true of the new dataset as well
    "author",
    "code_permalink",
    "requirements",
    "ref_min_score",
    "ref_max_score",
    "num_episodes_average_score",
    "reference_source",
    "action_names",
)

Count = NewType("Count", int)  # at least 1
Size = NewType("Size", float)  # at least 0
Positive = NewType("Positive", float)  # at least a millionth
Share = NewType("Share", float)  # from 0 to 1
Precision = NewType("Precision", str)
WandbMode = NewType("WandbMode", str)


@dataclasses.dataclass
class Config:
    """Screens as the field learns from them."""

    dataset: str = "reef/atari/breakout-expert-v0"  # Minari id of the dataset to write
    source: str = "atari/breakout/expert-v0"  # Minari id of the log
    size: Count = 84  # height and width of a prepared frame
    frames: Count = 4  # how many an observation has
    grey: bool = True  # false: colours stay, and an observation is one frame


# ------------------------------------------------ Screens ------------------------------------------------


class Playback(gym.Env):
    """An episode of the log as an environment: whatever is done in it, it shows what was seen."""

    def __init__(self, log: minari.MinariDataset):
        self.observation_space, self.action_space = log.observation_space, log.action_space

    def reset(self, *, seed=None, options=None):
        self.frames = iter(options["frames"])
        return next(self.frames), {}

    def step(self, action):
        return next(self.frames), 0.0, False, False, {}


def wrappers(config: Config, coloured: bool) -> tuple[WrapperSpec, ...]:
    """(1) and (2) as Gymnasium records wrappers: name, place, arguments."""
    steps = {}
    if config.grey and coloured:
        steps["GrayscaleObservation"] = {"keep_dim": False}  # (1)
    steps["ResizeObservation"] = {"shape": (config.size, config.size)}  # (1)
    if config.grey:
        steps["FrameStackObservation"] = {"stack_size": config.frames}  # (2)
    return tuple(WrapperSpec(name, f"gymnasium.wrappers:{name}", kwargs) for name, kwargs in steps.items())


def wrap(env: gym.Env, added: tuple[WrapperSpec, ...]) -> gym.Env:
    for wrapper in added:
        env = load_env_creator(wrapper.entry_point)(env=env, **wrapper.kwargs)
    return env


def see_again(env: gym.Env, frames: np.ndarray) -> np.ndarray:
    """What `env`, a wrapped Playback, shows of an episode's frames: [T + 1, frames, size, size]."""
    seen = np.empty((len(frames), *env.observation_space.shape), np.uint8)
    seen[0], _ = env.reset(options={"frames": frames})
    for step in range(1, len(frames)):
        seen[step] = env.step(None)[0]
    return seen


# ---------------------------------------------- The dataset -----------------------------------------------


def prepare(config: Config) -> None:
    """Writes the log with prepared screens as the dataset, unless it is there."""
    log = load_dataset(config.source)
    check_images(config, log)
    added = wrappers(config, coloured=len(log.observation_space.shape) == 3)
    with explain("cannot prepare screens", "`make discrete` brings what it takes (opencv-python-headless)"):
        env = wrap(Playback(log), added)
    recipe = {name: value for name, value in vars(config).items() if name != "dataset"}
    recipe["source_hash"] = content_hash(log)
    if is_there(config.dataset, recipe):
        return

    start, found = time.perf_counter(), log.storage.metadata
    known = {key: value for key, value in found.items() if key in KEPT}
    for key in ("env_spec", "eval_env_spec"):
        if found.get(key):
            spec = EnvSpec.from_json(found[key])
            both = (*spec.additional_wrappers, *added)
            known[key] = dataclasses.replace(spec, additional_wrappers=both).to_json()
    recorded = tqdm(log.iterate_episodes(), config.dataset, log.total_episodes, unit="episode", disable=None)
    form = f"{'grey' if config.grey else 'colours'}, {config.size} x {config.size}"
    written = write_dataset(
        config.dataset,
        (with_observations(log, episode, see_again(env, episode.observations)) for episode in recorded),
        observation_space=env.observation_space,
        action_space=log.action_space,
        algorithm_name=found.get("algorithm_name"),
        description=f"{config.source}, {form}, {config.frames} frames at once.",
        data_format="hdf5",
        jpeg_encoding=False,  # it would take the frames for colours
        extra={**known, "recipe": recipe},
    )
    print(
        f"{config.dataset}: {written['total_steps']:,} steps in {written['total_episodes']:,} episodes"
        f" ({time.perf_counter() - start:.0f} s); sha256 {written['content_hash']}"
    )


def check_images(config: Config, log: minari.MinariDataset) -> None:
    """An error where observations are no images, or the images no such as the config asks for."""
    space = log.observation_space
    images = isinstance(space, gym.spaces.Box) and space == gym.spaces.Box(0, 255, space.shape, np.uint8)
    if not images or len(space.shape) not in (2, 3) or space.shape[2:] not in ((), (3,)):
        raise UserError(f"source: {log.id} has no images of bytes [height, width] or [..., 3], but {space}")
    if not config.grey and len(space.shape) == 2:
        raise UserError(f"grey: {log.id} has no colours to keep; --grey true")
    if not config.grey and config.frames != 1:
        raise UserError("grey: of colours an observation is one frame; --frames 1, or --grey true")


def with_observations(log: minari.MinariDataset, episode: minari.EpisodeData, observations) -> EpisodeBuffer:
    """The log's episode with these observations [T + 1, ...]; all else is as it was."""
    (known,) = log.storage.get_episode_metadata([episode.id])
    return EpisodeBuffer(
        seed=known.get("seed"),
        options=known.get("options"),
        observations=observations,
        actions=episode.actions,
        rewards=episode.rewards,
        terminations=episode.terminations,
        truncations=episode.truncations,
        infos=episode.infos or {},  # without, Minari cannot print the episode
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
    main(prepare)
