"""AntMaze as the hub has it, where episodes go on after the goal, and as tools/end_at_goal.py copies it.

The environment is the real one, but for a hand that puts the ant on its goal in the middle of every second
episode: no policy of a few seconds would come there.
"""

import json
from pathlib import Path

import end_at_goal
import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import load_script, random_episodes
from gymnasium_robotics.envs.maze.ant_maze_v5 import AntMazeEnv

STEPS, ARRIVAL = 6, 3  # of an episode until its time is up; the step at which the hand intervenes
AT_GOAL = STEPS - ARRIVAL + 1  # steps of such an episode that earn 1
SOURCE, COPY = "test/antmaze/umaze-v1", "at-goal/antmaze/umaze-v1"
iql = load_script("finetune/iql.py")


class LedAntMaze(AntMazeEnv):
    """AntMaze in which every second episode, by its seed, is led to the goal."""

    def reset(self, *, seed=None, **options):
        observation, info = super().reset(seed=seed, **options)
        self.steps, self.led = 0, self.np_random.random() < 0.5
        return observation, info

    def step(self, action):
        self.steps += 1
        if self.led and self.steps == ARRIVAL:
            position = np.concatenate([self.goal, self.data.qpos[2:]])
            self.ant_env.set_state(position, np.zeros_like(self.data.qvel))
        return super().step(action)


@pytest.fixture(scope="module")
def source(minari_root) -> minari.MinariDataset:
    """Eight episodes of random actions, as on the hub: at the goal they go on, until the time limit."""
    gym.register("test/LedAntMaze-v0", f"{__name__}:LedAntMaze", max_episode_steps=STEPS)
    env = gym.make("test/LedAntMaze-v0", continuing_task=True, reset_target=False)
    episodes = random_episodes(env, 8)
    return minari.create_dataset_from_buffers(SOURCE, episodes, env=env, data_format="hdf5")


@pytest.fixture(scope="module")
def copy(source) -> minari.MinariDataset:
    assert end_at_goal.main([SOURCE, COPY]) == 0
    return minari.load_dataset(COPY)


def arrivals(dataset: minari.MinariDataset) -> list[bool]:
    return [bool(episode.rewards.any()) for episode in dataset.iterate_episodes()]


def finetune(dataset: str, folder: Path) -> tuple[dict, pd.DataFrame, dict]:
    """A run of a second: run.json, evaluations, and the parts of its checkpoint."""
    config = iql.Config(
        dataset=dataset, output_dir=str(folder), updates=4, online_steps=40, hidden_dim=8, batch_size=8,
        reward_shift=-1.0, expectile=0.9, eval_every=1000, eval_episodes=10, final_eval_episodes=20,
        compile=False, device="cpu", wandb_mode="disabled",
    )  # fmt: skip
    iql.train(config)
    torch.set_flush_denormal(False)
    place = folder / "finetune/iql" / dataset / "default/seed-0"
    state = torch.load(place / "checkpoint.pt", weights_only=True)["state"]
    return json.loads((place / "run.json").read_text()), pd.read_csv(place / "evaluations.csv"), state


# -------------------------------------------- as the hub has it --------------------------------------------


def test_its_dicts_are_loaded_side_by_side(source):
    """In the order of their sorted keys; no step ends for good, though ants arrive."""
    episodes, _ = iql.read_episodes(source)
    assert 2 <= sum(arrivals(source)) <= 6
    for ours, theirs in zip(episodes, source.iterate_episodes(), strict=True):
        parts = [theirs.observations[key] for key in ("achieved_goal", "desired_goal", "observation")]
        np.testing.assert_array_equal(ours["observations"], np.concatenate(parts, 1).astype(np.float32))
        assert ours["rewards"].tolist() in ([0.0] * STEPS, [0.0] * (ARRIVAL - 1) + [1.0] * AT_GOAL)
        assert not ours["terminations"].any()


def test_success_is_told_apart_from_the_return(source, tmp_path):
    """Who arrives earns on: success is 1, the return more. Regret counts successes; there is no score."""
    info, evaluations, state = finetune(SOURCE, tmp_path)
    assert (evaluations["length"] == STEPS).all()
    arrived = evaluations["success"] == 1
    assert 0 < arrived.mean() < 1
    assert (evaluations["return"] == np.where(arrived, AT_GOAL, 0)).all()
    assert (evaluations["success"] == arrived).all()
    assert info["success"] == evaluations.query("phase == 'final'")["success"].mean()
    explorer = state["explorer"]
    assert explorer["returns"] == [success * AT_GOAL for success in explorer["successes"]]
    assert 0 < info["regret"] < 1
    assert info["regret"] == pytest.approx(1 - np.mean(explorer["successes"]))
    assert info["score"] is None
    assert not state["buffer"]["columns"]["terminations"].any()  # nor does the learner see an end


# -------------------------------------------- ended at the goal --------------------------------------------


def test_the_copys_episodes_end_with_their_first_reward(source, copy):
    for ours, theirs, arrived in zip(copy, source, arrivals(source), strict=True):
        steps = ARRIVAL if arrived else STEPS
        assert ours.rewards.tolist() == [0.0] * (steps - 1) + [float(arrived)]
        assert ours.terminations.tolist() == [False] * (steps - 1) + [arrived]
        assert ours.truncations.tolist() == [False] * (steps - 1) + [not arrived]
        np.testing.assert_array_equal(ours.actions, theirs.actions[:steps])
        for key, entries in theirs.observations.items():
            np.testing.assert_array_equal(ours.observations[key], entries[: steps + 1])
    assert copy.total_steps == sum(ARRIVAL if arrived else STEPS for arrived in arrivals(source))
    assert (copy.storage.metadata["ref_min_score"], copy.storage.metadata["ref_max_score"]) == (0, 1)


def test_its_environment_ends_there_and_is_the_same_otherwise(source, copy):
    for ours in (copy.env_spec, copy._eval_env_spec):
        kwargs = source.env_spec.kwargs | {"continuing_task": False}
        assert (ours.id, ours.kwargs) == (source.env_spec.id, kwargs)
        assert ours.max_episode_steps == STEPS


def test_the_goal_is_a_termination_for_the_learner_and_success_the_score(copy, tmp_path):
    """In the data, in evaluations and online; the learner sees rewards of -1, and 0 at the goal."""
    info, evaluations, state = finetune(COPY, tmp_path)
    arrived = evaluations["success"] == 1
    assert 0 < arrived.mean() < 1
    assert (evaluations["return"] == arrived).all()
    assert (evaluations["length"] == np.where(arrived, ARRIVAL, STEPS)).all()
    final = evaluations.query("phase == 'final'")
    assert info["score"] == pytest.approx(100 * final["success"].mean())
    assert info["regret"] == pytest.approx(1 - np.mean(state["explorer"]["successes"]))
    columns = state["buffer"]["columns"]
    ends = columns["terminations"].numpy() == 1
    assert ends.sum() == sum(state["explorer"]["returns"]) > 0
    np.testing.assert_array_equal(columns["rewards"].numpy(), np.where(ends, 0.0, -1.0))
    starts = np.flatnonzero(ends)[:-1] + 1  # the step after an arrival is another episode's
    moved = columns["observations"][starts, :2] - columns["next_observations"][starts - 1, :2]
    assert (moved.norm(dim=1) > 1).all()


# ------------------------------------------------- errors -------------------------------------------------


def no_maze() -> str:
    env = gym.make("Pendulum-v1", max_episode_steps=3)
    episodes, name = random_episodes(env, 1), "test/no/maze-v0"
    minari.create_dataset_from_buffers(name, episodes, env=env, data_format="hdf5")
    return name


def test_what_has_no_goal_is_refused(source, minari_root, capsys):
    """In one line; nothing is written."""
    before = sorted(minari_root.rglob("*"))
    cases = [
        ((SOURCE, SOURCE), "is there already"),
        ((SOURCE, "../elsewhere"), "'../elsewhere' is no Minari id"),
        (("test/none-v0", "at-goal/none-v0"), "none-v0 is not on this machine; minari download test/none-v0"),
    ]
    for arguments, wanted in cases:
        capsys.readouterr()
        assert end_at_goal.main([*arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("end_at_goal.py: ")
        assert err.count("\n") == 1
        assert wanted in err
    assert sorted(minari_root.rglob("*")) == before
    assert end_at_goal.main([no_maze(), "at-goal/no/maze-v0"]) == 2
    assert "Pendulum-v1 cannot end at its goal (continuing_task)" in capsys.readouterr().err
    assert not (minari_root / "at-goal/no").exists()


def test_rewards_that_tell_no_goal_are_refused(source):
    (episode, *_) = source.iterate_episodes()
    episode.rewards[1] = 0.3
    with pytest.raises(end_at_goal.UserError, match="episode 0: rewards are not 0 or, at the goal, 1"):
        end_at_goal.cut(episode, SOURCE)
