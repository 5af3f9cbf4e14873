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


def gated(copies: int, known: bool = True) -> list[EpisodeBuffer]:
    """Nine courses, so many times: 0 to 1 (reward 1) to the end (reward 2 for choice 2, else 0).

    Who took choice 1 first may take all three then, others only choice 2, though the state is the same: the
    masks alone say so. Choices are uniform over the allowed; `known` adds their propensities.
    """
    everything, only = [1, 1, 1], [0, 0, 1]
    plans = [(0, 2)] * 3 + [(1, 0), (1, 1), (1, 2)] + [(2, 2)] * 3
    episodes = []
    for first, second in plans * copies:
        then = everything if first == 1 else only
        infos = {"propensity": [1 / 3, 1 / sum(then)]} if known else {}
        infos["action_mask"] = [everything, then, [0, 0, 0]]  # an end leaves nothing to choose
        episodes.append(course([0, 1, 3], [first, second], [1, 2 * (second == 2)], **infos))
    return episodes
