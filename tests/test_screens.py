"""algorithms/collect/screens.py: prepared frames are what the recorded environment shows, in real Atari."""

import dataclasses
import importlib.util

import gymnasium as gym
import minari
import numpy as np
import pytest
from conftest import load_script
from minari.data_collector import EpisodeBuffer

script = load_script("collect/screens.py")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ale_py") is None, reason="no ale-py: make discrete"),
    pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is None)"),  # Minari's advice
]
LENGTHS, LIVES = (9, 1, 4), 5


@pytest.fixture(scope="module")
def emulator() -> gym.Env:
    import ale_py

    gym.register_envs(ale_py)
    return gym.make("ALE/Breakout-v5", repeat_action_probability=0.0, max_episode_steps=9)


@pytest.fixture(scope="module")
def log(minari_root, emulator) -> minari.MinariDataset:
    """Three beginnings of games, as the hub's: whole frames, one at a time."""
    episodes, rng = [], np.random.default_rng(0)
    for seed, length in enumerate(LENGTHS):
        frames = [emulator.reset(seed=seed)[0]]
        actions = rng.integers(4, size=length)
        frames += [emulator.step(int(action))[0] for action in actions]
        ends = np.arange(length) == length - 1
        episodes.append(
            EpisodeBuffer(
                observations=np.stack(frames),
                actions=actions,
                rewards=np.arange(length, dtype=float),
                terminations=ends & (seed == 1),
                truncations=ends & (seed != 1),
                infos={"lives": np.full(length + 1, LIVES)},
            )
        )
    known = {"data_format": "hdf5", "jpeg_encoding": False, "ref_min_score": 1.7, "ref_max_score": 31.8}
    return minari.create_dataset_from_buffers("test/atari/breakout-v0", episodes, env=emulator, **known)


@pytest.fixture(scope="module")
def prepared(log) -> minari.MinariDataset:
    script.prepare(script.Config(dataset="test/screens/breakout-v0", source=log.id))
    return minari.load_dataset("test/screens/breakout-v0")


def shrunk(frames: np.ndarray) -> np.ndarray:
    """Luminance, then means over areas, in double precision; [..., 210, 160, 3] -> [..., 84, 84]."""
    grey = frames @ np.array([0.2125, 0.7154, 0.0721])
    return shares(84, 210) @ grey @ shares(84, 160).T


def shares(parts: int, whole: int) -> np.ndarray:
    """[parts, whole]: how much of each part, of equal ones, lies in each pixel."""
    edges = np.linspace(0, whole, parts + 1)
    pixels = np.arange(whole)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return overlap.clip(0) * parts / whole


@pytest.mark.equation(1)
def test_frames_are_grey_and_small(log, prepared):
    for before, after in zip(log.iterate_episodes(), prepared.iterate_episodes()):
        assert after.observations.dtype == np.uint8
        gap = after.observations[:, -1] - shrunk(before.observations)
        assert np.abs(gap).max() < 1.6  # grey and its mean are each rounded, grey by truncation


@pytest.mark.equation(2)
def test_an_observation_is_the_last_four_frames_of_its_episode(prepared):
    for episode, length in zip(prepared.iterate_episodes(), LENGTHS):
        frames = episode.observations[:, -1]
        assert episode.observations.shape == (length + 1, 4, 84, 84)
        for step, seen in enumerate(episode.observations):
            np.testing.assert_array_equal(seen, frames[np.maximum(np.arange(step - 3, step + 1), 0)])


def test_all_else_is_the_logs(log, prepared):
    for before, after in zip(log.iterate_episodes(), prepared.iterate_episodes()):
        for field in ("actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(after, field), getattr(before, field))
        np.testing.assert_array_equal(after.infos["lives"], before.infos["lives"])
    known = prepared.storage.metadata
    assert (known["ref_min_score"], known["ref_max_score"]) == (1.7, 31.8)
    assert known["recipe"]["source_hash"] == script.content_hash(log)


def test_scripts_play_in_an_environment_that_shows_the_same(prepared):
    """Replayed, the environment's screens are those of the data, byte for byte."""
    learner = load_script("discrete/cql.py")
    read = learner.image_alone(prepared)
    environments = learner.make_environments(read, None)
    assert environments.single_observation_space == prepared.observation_space
    env = gym.make(read.env_spec)
    for seed, episode in enumerate(prepared.iterate_episodes()):
        np.testing.assert_array_equal(env.reset(seed=seed)[0], episode.observations[0])
        for action, seen in zip(episode.actions, episode.observations[1:]):
            np.testing.assert_array_equal(env.step(int(action))[0], seen)
    environments.close()


def test_done_again_it_is_there_and_another_recipe_is_refused(log, prepared, capsys):
    config = script.Config(dataset=prepared.id, source=log.id)
    script.prepare(config)
    assert f"{prepared.id} is there: {sum(LENGTHS)} steps" in capsys.readouterr().out
    with pytest.raises(script.UserError, match="by another recipe: minari delete"):
        script.prepare(dataclasses.replace(config, frames=2))


def test_a_log_without_colours_is_refused(prepared):
    with pytest.raises(script.UserError, match="no images of red, green and blue bytes, but Box"):
        script.prepare(script.Config(dataset="test/screens/twice-v0", source=prepared.id))


def test_without_opencv_one_line_says_what_is_missing(log, monkeypatch):
    monkeypatch.setitem(script.sys.modules, "cv2", None)
    with pytest.raises(script.UserError, match=r"cannot prepare screens: .*make discrete"):
        script.prepare(script.Config(dataset="test/screens/other-v0", source=log.id))
