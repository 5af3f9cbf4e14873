"""A copy of a maze's dataset whose episodes end at the goal, where AntMaze's go on.

  minari download D4RL/antmaze/umaze-v1
  python tools/end_at_goal.py D4RL/antmaze/umaze-v1 at-goal/antmaze/umaze-v1
  python algorithms/finetune/iql.py --config_path configs/finetune/iql/D4RL/antmaze/umaze-v1.yaml \\
      --dataset at-goal/antmaze/umaze-v1

On Minari an ant that has arrived stays, and every step at the goal earns 1: three quarters of the steps are
such, and a return counts them, not arrivals. In the copy an episode ends with its first reward, for good (a
termination), and what came after is left out. Its environment ends there too, in evaluations and online. So a
return is 1 or 0, and a score the share of episodes that arrive, as in D4RL's tables; but neither the data nor
the environment are D4RL's, and scores do not compare.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import gymnasium as gym
import minari
import numpy as np
from common import UserError, exit_status
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace
from minari.storage import get_dataset_path

with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice
    import gymnasium_robotics


def end_at_goal(source: str, target: str) -> None:
    """Makes dataset `target` of dataset `source`."""
    if not re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", target):
        raise UserError(f"{target!r} is no Minari id such as at-goal/antmaze/umaze-v1")
    if get_dataset_path(target).exists():
        raise UserError(f"{target} is there already; minari delete {target} to make it anew")
    dataset = load(source)
    spec, eval_spec = ending(dataset, dataset.env_spec), ending(dataset, dataset._eval_env_spec)
    episodes = [cut(episode, source) for episode in dataset.iterate_episodes()]
    about = f"{source}, whose episodes end here with their first reward"
    store(target, episodes, env=spec, eval_env=eval_spec, description=about)
    arrived, steps = sum(map(arrives, episodes)), sum(len(episode.rewards) for episode in episodes)
    print(f"{target}: {len(episodes):,} episodes, of which {arrived:,} reach the goal; "
          f"{steps:,} of {dataset.total_steps:,} steps are kept")


def load(name: str) -> minari.MinariDataset:
    if not (get_dataset_path(name) / "data").exists():
        raise UserError(f"{name} is not on this machine; minari download {name}")
    try:
        return minari.load_dataset(name)
    except Exception as error:  # KeyError, AssertionError, JSONDecodeError ...
        raise UserError(f"cannot load {name}: {error!r:.200}; get it anew: minari download {name}") from None


def ending(dataset: minari.MinariDataset, spec: EnvSpec | None) -> EnvSpec:
    """The environment, which ends its episodes at the goal; that of the data, where there is no other."""
    spec = spec or dataset.env_spec
    if spec is None:
        raise UserError(f"{dataset.id} names no environment: there is nothing that could end at a goal")
    gym.register_envs(gymnasium_robotics)
    changed = dataclasses.replace(spec, kwargs=spec.kwargs | {"continuing_task": False})
    try:
        with tempfile.TemporaryDirectory() as folder, mock.patch("tempfile.tempdir", folder):  # an XML file
            gym.make(changed).close()
    except Exception as error:
        raise UserError(f"{spec.id} cannot end at its goal (continuing_task): {error!r:.200}") from None
    return changed


def cut(episode: minari.EpisodeData, source: str) -> EpisodeBuffer:
    """The episode up to its first reward, which terminates it; all of it, if there is none."""
    if not np.isin(episode.rewards, (0, 1)).all():
        raise UserError(f"{source}, episode {episode.id}: rewards are not 0 or, at the goal, 1")
    arrived = np.flatnonzero(episode.rewards)
    steps = int(arrived[0]) + 1 if len(arrived) else len(episode.rewards)
    terminations, truncations = episode.terminations[:steps].copy(), episode.truncations[:steps].copy()
    if len(arrived):
        terminations[-1], truncations[-1] = True, False
    return EpisodeBuffer(
        observations=first(episode.observations, steps + 1),
        actions=first(episode.actions, steps),
        rewards=episode.rewards[:steps],
        terminations=terminations,
        truncations=truncations,
        infos={},
    )


def first(tree, count: int):
    """The first entries of an array, or of every array in a Dict, however deep."""
    if isinstance(tree, dict):
        return {key: first(entry, count) for key, entry in tree.items()}
    return tree[:count]


def arrives(episode: EpisodeBuffer) -> bool:
    return bool(episode.rewards[-1] > 0)


def store(name: str, episodes: list[EpisodeBuffer], **metadata) -> None:
    """Writes a dataset all at once: into a hidden folder of the Minari root, then renamed."""
    root = get_dataset_path()
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder  # a root of its own: a dataset cannot change its id
        try:  # the warnings are about an e-mail address and a link; mazes leave an XML file
            with warnings.catch_warnings(action="ignore"), mock.patch("tempfile.tempdir", folder):
                minari.create_dataset_from_buffers(
                    name, episodes, ref_min_score=0.0, ref_max_score=1.0, data_format="hdf5", **metadata)
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(root)
        with contextlib.suppress(ValueError):  # it is there, or the id has none
            create_namespace(name.rpartition("/")[0])
        os.rename(Path(folder, name), root / name)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("source", help="Minari id, on this machine")
    parser.add_argument("target", help="Minari id of the copy")
    options = parser.parse_args(arguments)
    return exit_status("end_at_goal.py", end_at_goal, options.source, options.target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
