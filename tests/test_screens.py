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
    gym.register_envs(importlib.import_module("ale_py"))
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
                infos={"lives": np.full(length + 1, LIVES), "action_mask": np.ones((length + 1, 4), np.int8)},
                seed=seed,
            )
        )
    known = {"data_format": "hdf5", "jpeg_encoding": False, "ref_min_score": 1.7, "ref_max_score": 31.8}
    return minari.create_dataset_from_buffers("test/atari/breakout-v0", episodes, env=emulator, **known)


@pytest.fixture(scope="module")
def prepared(log) -> minari.MinariDataset:
    script.prepare(script.Config(dataset="test/screens/breakout-v0", source=log.id))
    return minari.load_dataset("test/screens/breakout-v0")


def shrunk(frames: np.ndarray) -> np.ndarray:
    """Luminance in whole numbers, then means over areas; [..., 210, 160, 3] -> [..., 84, 84]."""
    grey = np.floor((frames * [0.2125, 0.7154, 0.0721]).sum(-1))
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
        assert np.abs(gap).max() < 0.51  # rounded once more; small first, then grey: up to 1.5


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
        assert set(after.infos) == {"lives", "action_mask"}
        for name, values in before.infos.items():
            np.testing.assert_array_equal(after.infos[name], values)
    facts = prepared.storage.get_episode_metadata(prepared.episode_indices)
    assert [episode["seed"] for episode in facts] == [*range(len(LENGTHS))]
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


def test_the_hubs_frames_went_through_jpeg(log, prepared):
    """Minari's default, as its Atari logs were written: near the emulator's, but not the same."""
    frames = log[0].observations
    source = write("test/jpeg/log-v0", frames, observation_space=log.observation_space, jpeg_encoding=True)
    gaps = np.abs(prepare(source, "test/jpeg/new-v0")[0].observations - prepared[0].observations.astype(int))
    assert 0 < gaps.max() < 32
    assert gaps.mean() < 1


def write(dataset_id: str, frames: np.ndarray, **metadata) -> str:
    """A log of one episode with these observations [T + 1, ...] and no environment."""
    length = len(frames) - 1
    nothing = np.zeros(length, bool)
    episode = EpisodeBuffer(
        observations=frames, actions=np.zeros(length, int), rewards=np.zeros(length),
        terminations=nothing, truncations=nothing, infos={},
    )  # fmt: skip
    known = {"action_space": gym.spaces.Discrete(4), "data_format": "hdf5", "jpeg_encoding": False}
    minari.create_dataset_from_buffers(dataset_id, [episode], **known | metadata)
    return dataset_id


def images(*shape: int) -> tuple[np.ndarray, gym.spaces.Box]:
    drawn = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    return drawn, gym.spaces.Box(0, 255, shape[1:], np.uint8)


def prepare(source: str, dataset_id: str, **settings) -> minari.MinariDataset:
    script.prepare(script.Config(dataset=dataset_id, source=source, **settings))
    return minari.load_dataset(dataset_id)


def test_grey_images_and_colours_of_any_size(minari_root):
    """What is grey already is only made small; colours that stay are those of one frame."""
    drawn, space = images(6, 40, 50)
    source = write("test/grey/log-v0", drawn, observation_space=space)
    seen = prepare(source, "test/grey/small-v0", size=10, frames=3)[0].observations
    assert seen.shape == (6, 3, 10, 10)
    means = drawn.reshape(6, 10, 4, 10, 5).mean((2, 4))
    assert np.abs(seen[:, -1] - means).max() <= 0.51  # rounded
    np.testing.assert_array_equal(seen[5], seen[[3, 4, 5], -1])

    drawn, space = images(3, 64, 96, 3)
    source = write("test/colours/log-v0", drawn, observation_space=space)
    small = prepare(source, "test/colours/small-v0", size=32, frames=1, grey=False)
    assert small.observation_space == gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)
    means = drawn.reshape(3, 32, 2, 32, 3, 3).mean((2, 4))
    assert np.abs(small[0].observations - means).max() <= 0.51


@pytest.mark.parametrize(
    ("shape", "settings", "problem"),
    [
        ((40, 40), {"grey": False, "frames": 1}, "grey: .* has no colours to keep; --grey true"),
        ((40, 40, 3), {"grey": False}, "grey: of colours an observation is one frame; --frames 1, or"),
        ((40, 40, 4), {}, r"source: .* has no images of bytes \[height, width\] or"),
        ((40,), {}, "source: .* has no images of bytes"),
    ],
)
def test_other_images_are_refused(minari_root, shape, settings, problem):
    drawn, space = images(2, *shape)
    name = f"test/refused/{'-'.join(map(str, shape))}"
    source = write(f"{name}-v0", drawn, observation_space=space)
    with pytest.raises(script.UserError, match=problem):
        prepare(source, f"{name}-new-v0", **settings)
    assert not (minari_root / f"{name}-new-v0").exists()


def test_vectors_are_refused(minari_root):
    space = gym.spaces.Box(-1, 1, (3,))
    source = write("test/vectors/log-v0", np.zeros((2, 3), np.float32), observation_space=space)
    with pytest.raises(script.UserError, match=r"has no images of bytes .*, but Box"):
        prepare(source, "test/vectors/new-v0")


def test_what_is_interrupted_leaves_nothing(log, minari_root, monkeypatch):
    def interrupt(env, frames):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "see_again", interrupt)
    before = sorted(minari_root.iterdir())
    with pytest.raises(KeyboardInterrupt):
        prepare(log.id, "test/interrupted/breakout-v0")
    assert sorted(minari_root.iterdir()) == before
    assert not (minari_root / "test/interrupted").exists()


def test_done_again_it_is_there_and_another_recipe_is_refused(log, prepared, capsys):
    config = script.Config(dataset=prepared.id, source=log.id)
    script.prepare(config)
    assert f"{prepared.id} is there: {sum(LENGTHS)} steps" in capsys.readouterr().out
    with pytest.raises(script.UserError, match="by another recipe: minari delete"):
        script.prepare(dataclasses.replace(config, frames=2))


def test_a_log_without_colours_is_refused(prepared):
    with pytest.raises(script.UserError, match=r"has no images of bytes .*, but Box"):
        script.prepare(script.Config(dataset="test/screens/twice-v0", source=prepared.id))


def test_without_opencv_one_line_says_what_is_missing(log, monkeypatch):
    monkeypatch.setitem(script.sys.modules, "cv2", None)
    with pytest.raises(script.UserError, match=r"cannot prepare screens: .*make discrete"):
        script.prepare(script.Config(dataset="test/screens/other-v0", source=log.id))
