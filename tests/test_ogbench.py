"""algorithms/collect/ogbench.py: the experts' data, the task's rewards, a script on them."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import minari
import numpy as np
import pytest
import yaml
from conftest import ROOT, load_script, short

ogbench = load_script("collect/ogbench.py")
MISSING = importlib.util.find_spec("ogbench") is None
needs_package = pytest.mark.skipif(MISSING, reason="the package ogbench is missing: make ogbench")
STEPS = 60  # of the tests' episodes
MAZE = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(ROOT / "algorithms/collect/ogbench.py"), *arguments]
    variables = {**os.environ, "MINARI_DATASETS_PATH": str(root)}
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=300, check=False)


# ------------------------------------------- without the package -------------------------------------------


@pytest.mark.skipif(not MISSING, reason="the package is here")
def test_without_the_package_the_error_says_what_brings_it(tmp_path):
    done = run(tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "make ogbench" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--world", "cube"), "world: 'cube' is not pointmaze-medium or cube-single or scene or puzzle-3x3"),
        (("--wurld", "scene"), "did you mean world?"),
        (("--steps", "0"), "steps"),
        (("--noise", "-1"), "noise"),
    ],
)
def test_bad_arguments_end_in_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["ogbench.py", *arguments])
    with pytest.raises(SystemExit) as end:
        ogbench.main(ogbench.make_play_data)
    stdout, stderr = capsys.readouterr()
    assert (end.value.code, stdout, stderr.count("\n")) == (2, "", 1)
    assert words in stderr
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_the_packages():
    """Its data_gen_scripts/commands.sh: 1000 episodes of 1000 steps, noise 0.5 in mazes, 0.1 for the arm."""
    found = {}
    for file in (ROOT / "configs/collect/ogbench").glob("*.yaml"):
        config = ogbench.decode_config(yaml.safe_load(file.read_text()))
        assert config.dataset == f"reef/ogbench/{file.stem}"
        assert (config.steps, config.seed) == (1_000_000, 0)
        found[file.stem] = config.world, config.noise
    plays = {f"{world}-play-v0": (world, 0.1) for world in ("cube-single", "scene", "puzzle-3x3")}
    assert found == plays | {"pointmaze-medium-navigate-v0": ("pointmaze-medium", 0.5)}
    assert {world for world, _ in found.values()} == {*ogbench.EXPERTS}


def test_goals_lie_in_corners_and_ends_of_the_maze():
    """Of an S: not where it goes straight on."""
    env = types.SimpleNamespace(unwrapped=types.SimpleNamespace(maze_map=np.array(MAZE)))
    navigator = ogbench.Navigator(env, 0.5, np.random.default_rng(0))
    assert navigator.cells == [(1, 1), (1, 2), (1, 3), (2, 3), (3, 1), (3, 2), (3, 3)]
    assert navigator.goals == [(1, 1), (1, 3), (3, 1), (3, 3)]
    assert {navigator.draw_goal() for _ in range(50)} == {*navigator.goals}


@pytest.mark.equation(1, 2)
def test_the_point_drives_to_the_next_cell():
    """3 m to the east and 4 m to the south: (0.6, -0.8), and the noise."""
    world = types.SimpleNamespace(maze_map=np.array(MAZE), cur_goal_xy="goal")
    world.get_xy = lambda: np.array([1.0, 2.0])
    world.get_oracle_subgoal = lambda position, goal: (np.array([4.0, -2.0]), None)
    env = types.SimpleNamespace(unwrapped=world)
    for noise in (0.0, 0.5):
        navigator = ogbench.Navigator(env, noise, np.random.default_rng(7))
        eps = np.random.default_rng(7).standard_normal(2)
        np.testing.assert_allclose(navigator.act(), [0.6 + noise * eps[0], -0.8 + noise * eps[1]], atol=1e-6)


@pytest.mark.equation(2)
def test_actions_are_cut_before_the_simulator_gets_them(monkeypatch):
    wanted, taken = iter([[0.5, -3.0], [1.25, 0.1234567], [-1.0, 1.0]]), []

    def step(action):
        taken.append(action)
        return np.zeros(2), 0.0, False, False, {"prev_qpos": np.zeros(2), "success": False}

    world = types.SimpleNamespace(maze_map=np.array(MAZE))
    env = types.SimpleNamespace(unwrapped=world, reset=lambda **_: (np.zeros(2), {}), step=step)
    monkeypatch.setattr(ogbench, "make_world", lambda config: env)
    monkeypatch.setattr(ogbench, "make_clean", lambda *_, **__: None)
    monkeypatch.setattr(ogbench, "label_play", lambda judge, observations, actions, states: actions)
    monkeypatch.setattr(ogbench, "HORIZON", 3)
    monkeypatch.setattr(ogbench.Navigator, "act", lambda _: np.array(next(wanted)))
    (actions,) = ogbench.play_shard(ogbench.Config(world="pointmaze-medium"), np.random.SeedSequence(0), 1)
    np.testing.assert_array_equal(actions, np.float32([[0.5, -1], [1, 0.123457], [-1, 1]]))
    np.testing.assert_array_equal(taken, actions)


@pytest.mark.parametrize(
    ("y", "z", "seen"),
    [(0.0, 0.02, True), (0.28, 0.3, True), (0.29, 0.02, False), (-0.3, 0.02, False), (-0.35, 0.066, True),
     (-0.35, 0.09, False)],
)
def test_scenes_whose_cube_left_the_table_are_noticed(y, z, seen):
    states = [{"qpos": np.zeros(20)} for _ in range(3)]
    states[1]["qpos"][14:17] = 0.4, y, z
    assert ogbench.is_in_sight(states) is seen


@pytest.mark.equation(3)
def test_the_package_labels_the_states_before_the_steps(monkeypatch):
    def relabel(name, judge, columns):
        assert name == judge.spec.id == "cube-single-singletask-v0"
        assert columns["qpos"].tolist() == [[0.0], [1.0], [2.0]]
        columns |= {"rewards": np.array([-1.0, 0, -1]), "masks": np.array([1.0, 0, 1])}

    package = types.SimpleNamespace(relabel_utils=types.SimpleNamespace(relabel_dataset=relabel))
    monkeypatch.setitem(sys.modules, "ogbench", package)
    judge = types.SimpleNamespace(spec=types.SimpleNamespace(id="cube-single-singletask-v0"))
    states = [{"qpos": [number], "button_states": ()} for number in range(3)]
    one = ogbench.label_play(judge, [np.full(2, i) for i in range(4)], [np.zeros(2, np.float32)] * 3, states)
    assert one.rewards.tolist() == [-1, 0, -1]
    assert one.terminations.tolist() == [False, True, False]
    assert one.truncations.tolist() == [False, False, True]
    assert (one.observations.shape, one.observations.dtype) == ((4, 2), np.float32)


# --------------------------------------------- with the package ---------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory, minari_root):
    """made(world): the dataset of two short episodes in one shard."""
    found = {}

    def make(world: str) -> minari.MinariDataset:
        if world not in found:
            config = ogbench.Config(f"test/ogbench/{world}-v0", world, 2 * STEPS, shards=1, processes=1)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ogbench, "HORIZON", STEPS)
                ogbench.make_play_data(config)
            found[world] = minari.load_dataset(config.dataset)
        return found[world]

    return make


@needs_package
@pytest.mark.parametrize("world", ogbench.EXPERTS)
def test_episodes(made, world):
    sizes = {"pointmaze-medium": 2, "cube-single": 28, "scene": 40, "puzzle-3x3": 55}
    dataset, size = made(world), sizes[world]
    episodes = list(dataset.iterate_episodes())
    assert (len(episodes), dataset.total_steps) == (2, 2 * STEPS)
    for one in episodes:
        assert one.observations.shape == (STEPS + 1, size)
        assert {one.observations.dtype, one.actions.dtype} == {np.dtype(np.float32)}
        assert np.abs(one.actions).max() <= 1
        np.testing.assert_array_equal(one.actions, one.actions.astype(float).round(6).astype(np.float32))
        assert np.flatnonzero(one.truncations).tolist() == [STEPS - 1]
        assert len(np.unique(one.observations, axis=0)) > STEPS / 2  # it moves
    assert len({one.observations[0].tobytes() for one in episodes}) == 2
    assert "ref_max_score" not in dataset.storage.metadata


@needs_package
def test_a_shard_depends_on_its_seed_alone(made):
    """Not on what was drawn before it."""
    (first, *_) = made("cube-single").iterate_episodes()
    config, seeds = ogbench.Config(world="cube-single"), np.random.SeedSequence(0).spawn(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ogbench, "HORIZON", STEPS)
        (other,) = ogbench.play_shard(config, seeds[1], 1)
        (again,) = ogbench.play_shard(config, seeds[0], 1)
    np.testing.assert_array_equal(again.observations, first.observations)
    np.testing.assert_array_equal(again.actions, first.actions)
    assert not np.array_equal(other.observations, first.observations)


@needs_package
@pytest.mark.equation(3)
def test_rewards_are_the_tasks(made):
    """From what observations show: the cube within 4 cm of its place, the point within 1 m of the goal."""
    for world, goal, near in (("cube-single", [0.5, 0, 0.02], 0.04), ("pointmaze-medium", [20, 20], 1)):
        for one in made(world).iterate_episodes():
            place = one.observations[:-1]
            if world == "cube-single":
                place = place[:, 19:22] / 10 + [0.425, 0, 0]
            done = np.linalg.norm(place - goal, axis=1) <= near
            np.testing.assert_array_equal(one.rewards, np.where(done, 0, -1))
            np.testing.assert_array_equal(one.terminations, done)


@needs_package
def test_a_script_learns_from_them_and_is_evaluated_in_the_task(made, run_script, tmp_path):
    fields = {"updates": 50, "eval_every": 50, "eval_episodes": 1, "final_eval_episodes": 1}
    done = run_script("offline/fql.py", *short(made("pointmaze-medium").id, tmp_path, **fields))
    assert done.returncode == 0, done.stderr
    assert "evaluated in pointmaze-medium-singletask-v0" in done.stdout
    (record,) = tmp_path.rglob("run.json")
    info = json.loads(record.read_text())
    assert info["status"] == "finished"
    assert info["score"] is None
    assert info["success"] in (0.0, 1.0)
    assert -1000 <= info["return_mean"] <= 0


@needs_package
def test_an_evaluation_in_the_maze_is_by_its_seed_alone(made):
    """Its beginnings come from numpy's global generator."""
    script = load_script("offline/fql.py")
    environments = script.make_environments(made("pointmaze-medium"), None)
    begun = []

    def act(observations) -> np.ndarray:
        begun.append(observations.copy())
        return np.zeros((10, 2), np.float32)

    for seed in (1, 1, 2):
        begun.append(None)
        script.evaluate(act, environments, 10, (seed,))
    first, again, other = (begun[i + 1] for i, each in enumerate(begun) if each is None)
    np.testing.assert_array_equal(again, first)
    assert not np.array_equal(other, first)


@needs_package
def test_scripts_find_the_arms_task_too(made):
    environments = load_script("offline/fql.py").make_environments(made("cube-single"), None)
    first, _ = environments.reset(seed=3)
    again, _ = environments.reset(seed=3)
    np.testing.assert_array_equal(first, again)
    _, rewards, *_ = environments.step(environments.action_space.sample())
    assert rewards.tolist() == [-1] * 10
