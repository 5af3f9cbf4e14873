"""Small logs for the tests of algorithms/evaluate: courses through numbered states."""

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

STATES, CHOICES = gym.spaces.Discrete(4), gym.spaces.Discrete(3)


def course(states: list, actions: list, rewards: list, ended: bool = True, **infos: list) -> EpisodeBuffer:
    """An episode of T + 1 states, T choices and rewards, which terminates or is cut; infos by step."""
    last = np.arange(len(rewards)) == len(rewards) - 1
    return EpisodeBuffer(
        observations=np.array(states),
        actions=np.array(actions),
        rewards=np.array(rewards, float),
        terminations=last & ended,
        truncations=last & (not ended),
        infos={name: np.array(values, float) for name, values in infos.items()},
    )


def store(name: str, episodes: list[EpisodeBuffer], observations=STATES, actions=CHOICES):
    spaces = {"observation_space": observations, "action_space": actions}
    return minari.create_dataset_from_buffers(name, episodes, data_format="hdf5", **spaces)


def ragged() -> dict[str, np.ndarray]:
    """Five episodes of 1 to 4 steps, side by side, as random numbers: what the estimators take."""
    rng, lengths = np.random.default_rng(5), np.array([4, 1, 3, 2, 4])
    mask = np.arange(4) < lengths[:, None]
    return {
        "lengths": lengths,
        "mask": mask,
        "log_ratios": rng.normal(scale=0.5, size=(5, 4)) * mask,
        "rewards": rng.normal(size=(5, 4)) * mask,
        "terminations": ((np.arange(4) == lengths[:, None] - 1) & (lengths != 3)[:, None]).astype(np.float32),
        "first": rng.normal(size=5),
        "q": rng.normal(size=(5, 4)) * mask,
        "next_v": rng.normal(size=(5, 4)) * mask,
    }
