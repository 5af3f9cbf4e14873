"""algorithms/collect/dark_room.py: the room, its optimum by search, learners that reach it."""

import itertools

import gymnasium as gym
import minari
import numpy as np
import pytest
from conftest import load_script
from gymnasium.utils.env_checker import check_env

room = load_script("collect/dark_room.py")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A small one: two learners a goal, twelve episodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("rooms")))
        room.collect_lives(room.Config(learners=2, episodes=12))
        yield minari.load_dataset("reef/dark-room/histories-v0")


@pytest.mark.equation(1)
def test_moves_stay_within_the_room():
    following = room.next_cells()
    assert following[55].tolist() == [55, 45, 65, 54, 56]
    assert following[0].tolist() == [0, 0, 10, 0, 1]
    assert following[99].tolist() == [99, 89, 99, 98, 99]


@pytest.mark.equation(2, 3)
@pytest.mark.parametrize("goal", [55, 54, 0, 9, 90, 99])
def test_the_most_that_can_be_earned_is_found_by_search(goal):
    """The best sum of rewards from each cell, step by step backwards, with no thought of distances."""
    value = np.zeros(100)
    for _ in range(room.STEPS):
        rewards = (room.next_cells() == goal).astype(float)
        value = (rewards + value[room.next_cells()]).max(1)
    assert room.best_returns()[goal] == value[room.START]
    assert value[room.START] > 0  # every goal is within reach


@pytest.mark.equation(4)
def test_a_learner_updates_its_table_as_q_learning_does(monkeypatch):
    """One learner, one episode: its actions again, from a table kept here."""
    config, rng = room.Config(episodes=1, exploration=0.0), np.random.default_rng(3)
    lives = room.live(np.array([54]), config, np.random.default_rng(3))
    q = 1 + 1e-3 * rng.normal(size=(1, 100, 5))[0]
    cell = room.START
    for step in range(room.STEPS):
        action = q[cell].argmax()
        assert (lives["cells"][0, step], lives["actions"][0, step]) == (cell, action)
        reached = room.next_cells()[cell, action]
        reward = float(reached == 54)
        assert lives["rewards"][0, step] == reward
        q[cell, action] += 0.5 * (reward + 0.9 * q[reached].max() - q[cell, action])
        cell = reached


@pytest.mark.equation(5)
@pytest.mark.parametrize("goal", [0, 7, 54, 55, 90])
def test_best_actions_are_those_on_a_shortest_way(goal):
    """By breadth-first search backwards from the goal, cell by cell; there is at least one everywhere."""
    following, steps, reached = room.next_cells(), np.full(100, -1), [goal]
    steps[goal] = 0
    for cell in reached:
        for before in range(100):
            if cell in following[before] and steps[before] < 0:
                steps[before] = steps[cell] + 1
                reached.append(before)
    best = room.best_actions()[goal]
    for cell in range(100):
        wanted = [steps[after] == max(steps[cell] - 1, 0) for after in following[cell]]
        assert best[cell].tolist() == wanted
    assert best.any(1).all()


@pytest.mark.equation(3, 5)
def test_any_of_the_best_actions_earns_the_most():
    rng, best = np.random.default_rng(0), room.best_actions()
    for goal in range(100):
        cell, earned = room.START, 0
        for _ in range(room.STEPS):
            cell = room.next_cells()[cell, rng.choice(np.flatnonzero(best[goal, cell]))]
            earned += cell == goal
        assert earned == room.best_returns()[goal]


def test_learners_come_to_the_optimum():
    goals = np.array([0, 33, 54, 99])
    lives = room.live(goals, room.Config(), np.random.default_rng(0))
    returns = lives["rewards"].reshape(4, 300, 20).sum(2)
    assert returns[:, :10].mean() < 0.5 * room.best_returns()[goals].mean()
    assert returns[:, -20:].mean(1) == pytest.approx(room.best_returns()[goals], rel=0.02)


def test_no_goal_to_test_on_is_in_the_data(dataset):
    known = dataset.storage.metadata
    told, held_out = set(known["training_goals"]), set(known["held_out_goals"])
    assert (len(told), len(held_out), told & held_out) == (80, 20, set())
    assert {int(episode.infos["goal"][0]) for episode in dataset.iterate_episodes()} == told


def test_a_life_is_many_episodes_of_the_room(dataset):
    for life in itertools.islice(dataset.iterate_episodes(), 3):
        assert np.flatnonzero(life.truncations).tolist() == [19 + 20 * i for i in range(12)]
        assert (life.observations[:-1].reshape(12, 20)[:, 0] == room.START).all()
        inner = life.observations[:-1].reshape(12, 20)
        moved = room.next_cells()[inner, life.actions.reshape(12, 20)]
        assert (moved[:, :-1] == inner[:, 1:]).all()
        assert (life.rewards.reshape(12, 20) == (moved == life.infos["goal"][0])).all()


def test_the_same_recipe_makes_the_same_data(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    room.collect_lives(room.Config(learners=2, episodes=12))
    again = minari.load_dataset("reef/dark-room/histories-v0").storage.metadata["content_hash"]
    assert again == dataset.storage.metadata["content_hash"]
    room.collect_lives(room.Config(learners=2, episodes=12))
    assert "is there" in capsys.readouterr().out
    with pytest.raises(room.UserError, match="by another recipe"):
        room.collect_lives(room.Config(learners=3, episodes=12))


def test_the_environment_is_gymnasiums(dataset):
    environment = gym.make(room.register_room(), goal=54)
    check_env(environment.unwrapped, skip_render_check=True)
    environment.reset(seed=0)
    steps = [environment.step(action) for action in (3, *[0] * 19)]
    assert [step[1] for step in steps] == [1.0] * 20
    assert [step[3] for step in steps] == [False] * 19 + [True]
