"""algorithms/collect/pointmaze.py: its planner, its data in both forms, and what it leaves on the disk."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import psutil
import pytest
from runs import sigint  # noqa: F401

SCRIPT = Path(__file__).resolve().parents[1] / "algorithms/collect/pointmaze.py"
PLAIN = ("--dataset", "reef/pointmaze/umaze-v0", "--steps", "2000")
GOALS = ("--dataset", "reef/pointmaze/medium-goals-v0", "--steps", "4000", "--maze", "medium", "--goals=true")
SMALL = ("--shards", "3", "--reference_episodes", "4", "--seed", "7")
STITCH = ("--dataset", "reef/pointmaze/large-stitch-v0", "--steps", "19200", "--maze", "large-stitch")
REACH = 0.45  # m from the goal that the environment rewards
FAR = range(1, 5)  # columns of the large maze in which the stitching form's evaluation starts


def load_script():
    spec = importlib.util.spec_from_file_location("collect_pointmaze", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pointmaze = load_script()


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory, monkeypatch) -> Path:
    """The folder for temporary files of a test and of what it starts: there mazes leave files."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *SMALL, *arguments]


def execute(root: Path, words: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "MINARI_DATASETS_PATH": str(root)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    return execute(root, command(*arguments))


def fresh_python(root: Path, code: str) -> dict:
    """What a new process prints, which has not registered the mazes."""
    done = execute(root, [sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def load(root: Path, dataset_id: str) -> minari.MinariDataset:
    return minari.MinariDataset(root / dataset_id / "data")


def arrays(dataset: minari.MinariDataset):
    """Every array of the dataset in the order of the content hash."""
    for episode in dataset.iterate_episodes():
        seen = episode.observations
        yield from [seen[key] for key in sorted(seen)] if isinstance(seen, dict) else [seen]
        yield from (episode.actions, episode.rewards, episode.terminations, episode.truncations)


def state(episode) -> np.ndarray:
    """Position and velocity [T + 1, 4] in either form."""
    seen = episode.observations
    return seen["observation"] if isinstance(seen, dict) else seen


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Two Minari roots with the same two datasets, made by one process and by two."""
    found = {}
    for processes in ("1", "2"):
        found[processes] = tmp_path_factory.mktemp(f"processes{processes}")
        for form in (PLAIN, GOALS):
            done = run(found[processes], *form, "--processes", processes)
            assert done.returncode == 0, done.stderr
            assert form[1] in done.stdout
            assert load(found[processes], form[1]).storage.metadata["content_hash"] in done.stdout
    return found


@pytest.fixture(scope="module")
def plain(roots):
    return load(roots["2"], PLAIN[1])


@pytest.fixture(scope="module")
def goals(roots):
    return load(roots["2"], GOALS[1])


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """Runs the script in this process with a Minari root of its own: (status, stdout, stderr)."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pointmaze.py", *SMALL, "--processes", "1", *arguments])
        status = 0
        try:
            pointmaze.main(pointmaze.make_dataset)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


# The planner


@pytest.mark.equation(1)
@pytest.mark.parametrize("maze", pointmaze.MAZES)
def test_every_cell_has_a_shortest_way_to_every_other(maze):
    world = pointmaze.make_environment(pointmaze.Config(maze=maze), evaluation=True).unwrapped
    planner = pointmaze.Planner(world.maze)
    free = {(i, j) for i, row in enumerate(world.maze.maze_map) for j, cell in enumerate(row) if cell != 1}
    for goal in free:
        assert set(planner.next[goal]) == free
        length = {goal: 0}
        for _ in free:  # relax until nothing changes: distances without a search
            for i, j in free:
                near = [length[n] for n in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)) if n in length]
                if near and (i, j) != goal:
                    length[i, j] = min(near) + 1
        for cell, following in planner.next[goal].items():
            assert length[following] == max(length[cell] - 1, 0)


@pytest.mark.equation(2)
def test_the_planner_pushes_along_the_corridor_and_brakes():
    world = pointmaze.make_environment(pointmaze.Config(), evaluation=True).unwrapped
    planner, centre = pointmaze.Planner(world.maze), world.maze.cell_rowcol_to_xy
    goal = centre((1, 1)) + np.array([0.2, -0.1])
    at_rest = planner.act(centre((3, 1)), np.zeros(2), goal)
    np.testing.assert_allclose(at_rest, [10, 0])  # the goal is above, behind a wall: go right first
    np.testing.assert_allclose(planner.act(centre((3, 3)), np.zeros(2), goal), [0, 10])  # y points up
    moving = planner.act(goal + np.array([0.05, 0.1]), np.array([1.0, -2.0]), goal)
    np.testing.assert_allclose(moving, [-0.5 - 1, -1 + 2])


@pytest.mark.parametrize(
    ("maze", "goal_conditioned"),
    [*((maze, False) for maze in pointmaze.MAZES), *((maze, True) for maze in ("umaze", "medium", "large"))],
)
def test_without_noise_it_always_gets_there(maze, goal_conditioned):
    config = pointmaze.Config(maze=maze, goals=goal_conditioned, reference_episodes=10)
    planner = pointmaze.measure(config, np.random.SeedSequence(1), "planner")
    random = pointmaze.measure(config, np.random.SeedSequence(1), "random")
    horizon = pointmaze.stock_spec(maze).max_episode_steps
    assert planner["success"] == 1
    assert 0.5 * horizon < planner["return_mean"] <= horizon
    assert random["return_mean"] < 0.3 * horizon


@pytest.mark.equation(3)
def test_noise_comes_on_actions_before_they_are_cut(monkeypatch):
    """A planner that wants (0, 1): of the second entry half would be above 1."""
    monkeypatch.setattr(pointmaze.Planner, "act", lambda *_: np.array([0.0, 1.0]))
    (episode,) = pointmaze.collect(pointmaze.Config(noise=0.1), np.random.SeedSequence(0), 300)
    free, cut = episode.actions.T
    assert free.mean() == pytest.approx(0, abs=0.02)
    assert free.std() == pytest.approx(0.1, rel=0.15)
    assert cut.max() == 1
    assert (cut == 1).mean() == pytest.approx(0.5, abs=0.1)
    below = 1 - cut[cut < 1]
    assert np.sqrt(np.mean(below**2)) == pytest.approx(0.1, rel=0.2)
    assert abs(np.corrcoef(free[1:], free[:-1])[0, 1]) < 0.2  # drawn anew in every step
    assert abs(np.corrcoef(free, cut)[0, 1]) < 0.2


@pytest.mark.equation(4)
@pytest.mark.parametrize("maze", ["umaze", "medium"])
def test_goals_are_near_the_centres_of_all_cells(maze):
    world = pointmaze.make_environment(pointmaze.Config(maze=maze), evaluation=True).unwrapped
    planner, rng = pointmaze.Planner(world.maze), np.random.default_rng(0)
    free = {(i, j) for i, row in enumerate(world.maze.maze_map) for j, cell in enumerate(row) if cell != 1}
    count = 200 * len(free)
    goals = np.array([planner.draw_goal(rng, range(world.maze.map_width)) for _ in range(count)])
    middle = np.array(np.shape(world.maze.maze_map)) / 2  # (0, 0); cells are 1 m wide, and y points up
    cells = np.floor([middle[0] - goals[:, 1], middle[1] + goals[:, 0]]).astype(int)
    shifts = goals - np.stack([cells[1] + 0.5 - middle[1], middle[0] - cells[0] - 0.5], 1)
    found, counts = np.unique(cells, axis=1, return_counts=True)
    assert {*map(tuple, found.T.tolist())} == free
    assert counts / 200 == pytest.approx(np.ones(len(free)), abs=0.3)  # all of them as often
    assert 0.24 < np.abs(shifts).max() <= 0.25
    assert shifts.std(0) == pytest.approx([0.5 / 12**0.5] * 2, rel=0.1)  # uniform
    assert np.abs(shifts.mean(0)).max() < 0.02
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.1


@pytest.mark.equation(4)
def test_the_next_goal_comes_within_a_tenth_of_a_metre(monkeypatch):
    """Where the planner stands and what it heads for, step by step, in one episode of each of three seeds."""
    changes, act = 0, pointmaze.Planner.act
    for seed in range(3):
        seen = []

        def noted(planner, position, velocity, goal, seen=seen):
            seen.append((position.copy(), goal.copy()))
            return act(planner, position, velocity, goal)

        monkeypatch.setattr(pointmaze.Planner, "act", noted)
        pointmaze.collect(pointmaze.Config(), np.random.SeedSequence(seed), 300)
        positions, goals = map(np.array, zip(*seen))
        reached = np.linalg.norm(positions[1:] - goals[:-1], axis=1) < 0.1
        changed = (goals[1:] != goals[:-1]).any(1)
        assert changed.tolist() == reached.tolist()
        changes += changed.sum()
    assert changes >= 3


# The data


@pytest.mark.parametrize("form", [PLAIN, GOALS])
def test_the_data_do_not_depend_on_the_number_of_processes(roots, form):
    one, two = (load(roots[processes], form[1]) for processes in ("1", "2"))
    digest = hashlib.sha256()
    for a, b in zip(arrays(one), arrays(two), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.array_equal(a, b)
        digest.update(f"{a.dtype}{a.shape}".encode() + a.tobytes())
    assert digest.hexdigest() == one.storage.metadata["content_hash"] == two.storage.metadata["content_hash"]
    for key in ("ref_min_score", "ref_max_score", "reference_scores"):
        assert one.storage.metadata[key] == two.storage.metadata[key]


@pytest.mark.equation(5)
def test_plain_episodes(plain):
    episodes = list(plain.iterate_episodes())
    assert plain.total_steps == sum(map(len, episodes)) == 2100  # 7 episodes: 2,000 steps rounded up
    assert plain.observation_space == gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    for episode in episodes:
        assert episode.observations.shape == (301, 4)
        assert episode.actions.shape == (300, 2)
        assert not episode.terminations.any()
        assert np.flatnonzero(episode.truncations).tolist() == [299]
        assert "EpisodeData" in repr(episode)
    starts = {tuple(cell_of(episode.observations[0])) for episode in episodes}
    assert len(starts) > 2
    assert (1, 1) not in starts
    assert len({episode.observations.tobytes() for episode in episodes}) == len(episodes)


def cell_of(observation: np.ndarray) -> np.ndarray:
    """Cell (row, column) of the 5 x 5 umaze, whose cells are 1 m wide and whose middle is (0, 0)."""
    return np.floor([2.5 - observation[1], 2.5 + observation[0]]).astype(int)


@pytest.mark.equation(5)
def test_one_goal_per_episode_explains_its_rewards(plain):
    """The goal isn't in the data, so try all within 0.25 m of the cell's centre (-1, 1)."""
    axis = np.linspace(-0.25, 0.25, 51)
    candidates = np.stack(np.meshgrid(-1 + axis, 1 + axis), -1).reshape(-1, 1, 2)
    rewards = np.concatenate([episode.rewards for episode in plain.iterate_episodes()])
    assert set(rewards) == {0.0, 1.0}
    for episode in plain.iterate_episodes():
        position = episode.observations[1:, :2]
        assert np.abs(position[episode.rewards == 1] - [-1, 1]).max(initial=0) <= 0.25 + REACH
        inside = np.linalg.norm(position - candidates, axis=-1) <= REACH
        assert (inside != episode.rewards.astype(bool)).sum(1).min() <= 2  # the lattice's coarseness


def test_the_planner_wanders(plain):
    """Not one episode heads for the rewarded goal and stays; together they visit every cell."""
    returns = [episode.rewards.sum() for episode in plain.iterate_episodes()]
    assert max(returns) < 0.6 * plain.storage.metadata["ref_max_score"]
    cells = {tuple(cell_of(row)) for episode in plain.iterate_episodes() for row in episode.observations}
    assert cells == {(1, 1), (1, 2), (1, 3), (2, 3), (3, 1), (3, 2), (3, 3)}


@pytest.mark.parametrize("form", ["plain", "goals"])
def test_actions_and_observations_belong_together(form, request):
    """Replayed from each observation, the recorded action gives the next; the noise is in the action."""
    dataset = request.getfixturevalue(form)
    world = dataset.recover_environment().unwrapped
    world.reset(seed=0)
    for episode in list(dataset.iterate_episodes())[:3]:
        assert episode.actions.dtype == np.float32
        assert np.abs(episode.actions).max() <= 1
        assert (np.abs(episode.actions) == 1).any()  # clipped
        before, after = state(episode)[:-1], state(episode)[1:]
        np.testing.assert_allclose(after[:, :2], before[:, :2] + 0.01 * after[:, 2:], atol=1e-9)
        for row, action, following in zip(before, episode.actions, after):
            world.point_env.set_state(row[:2], row[2:])
            np.testing.assert_allclose(world.step(action)[0]["observation"], following, atol=1e-5)


def test_goal_conditioned_episodes_end_at_their_goal_and_go_on_from_there(goals):
    episodes, breaks = list(goals.iterate_episodes()), 0
    assert list(goals.observation_space) == ["achieved_goal", "desired_goal", "observation"]
    assert 4200 <= goals.total_steps == sum(map(len, episodes)) < 4200 + 3 * 400
    for episode, following in zip(episodes, [*episodes[1:], None]):
        seen, last = episode.observations, len(episode) - 1
        assert {key: value.shape[1:] for key, value in seen.items()} == {
            "achieved_goal": (2,), "desired_goal": (2,), "observation": (4,)
        }
        assert (seen["achieved_goal"] == seen["observation"][:, :2]).all()
        assert (seen["desired_goal"] == seen["desired_goal"][0]).all()
        distance = np.linalg.norm(seen["achieved_goal"] - seen["desired_goal"], axis=1)[1:]
        np.testing.assert_array_equal(episode.rewards, distance <= REACH)
        assert np.flatnonzero(episode.rewards).tolist() == [last]
        assert np.flatnonzero(episode.truncations).tolist() == [last]
        assert not episode.terminations.any()
        if following:
            breaks += not np.array_equal(seen["observation"][-1], following.observations["observation"][0])
            assert not np.array_equal(seen["desired_goal"][-1], following.observations["desired_goal"][0])
    assert breaks == 2  # between the three shards


# The stitching form: no episode leads from where evaluation starts to the goal, though pieces of two do


@pytest.fixture(scope="module")
def stitch(tmp_path_factory):
    root = tmp_path_factory.mktemp("stitch")
    done = run(root, *STITCH, "--processes", "2")
    assert done.returncode == 0, done.stderr
    return load(root, STITCH[1])


def large_cells(observations: np.ndarray) -> np.ndarray:
    """Cells (row, column) [T, 2] of the 9 x 12 large maze, whose cells are 1 m wide, middle at (0, 0)."""
    return np.stack([np.floor(4.5 - observations[:, 1]), np.floor(observations[:, 0] + 6)], 1).astype(int)


def far_cells() -> set[tuple[int, int]]:
    """Where evaluation starts, from the stock maze."""
    plan = pointmaze.stock_spec("large").kwargs["maze_map"]
    return {(i, j) for i, row in enumerate(plan) for j in FAR if row[j] == 0}


def test_no_episode_has_both_a_far_start_and_the_goals_surroundings(stitch):
    goal, far, near, columns = np.array([3.5, -3.0]), [], [], set()
    episodes = list(stitch.iterate_episodes())
    for episode in episodes:
        cells = large_cells(episode.observations)
        far.append(np.isin(cells[:, 1], FAR).any())
        near.append((np.linalg.norm(episode.observations[:, :2] - goal, axis=1) <= 2).any())
        columns.add((cells[:, 1].min() >= 6, cells[:, 1].max() <= 6))
    assert len(episodes) == 24
    assert not (np.array(far) & np.array(near)).any()
    assert sum(far) >= 8
    assert sum(near) >= 6
    assert columns <= {(True, False), (False, True)}  # each keeps to its half


def test_pieces_of_two_episodes_lead_from_every_far_start_to_the_goal(stitch):
    """Steps from cell to cell, over all episodes, join the halves; both walk the corridor between them."""
    steps, halves = set(), {True: set(), False: set()}
    for episode in stitch.iterate_episodes():
        cells = [tuple(cell) for cell in large_cells(episode.observations).tolist()]
        steps |= set(zip(cells, cells[1:]))
        halves[any(column < 6 for _, column in cells)] |= {cell for cell in cells if cell[1] == 6}
    assert len(halves[True] & halves[False]) >= 5
    reached, before = {(7, 9)}, set()
    while reached != before:
        before, reached = reached, reached | {a for a, b in steps if b in reached}
    assert far_cells() <= reached


def test_its_evaluation_starts_far_from_the_goal(stitch):
    env, starts, goals = stitch.recover_environment(eval_env=True), [], []
    for seed in range(200):
        starts.append(env.reset(seed=seed)[0])
        goals.append(env.unwrapped.goal.copy())
    assert {tuple(cell) for cell in large_cells(np.array(starts)).tolist()} == far_cells()
    assert np.abs(np.array(goals) - [3.5, -3.0]).max() <= 0.25
    assert env.spec.max_episode_steps == 800
    assert stitch.storage.metadata["ref_min_score"] == 0  # random actions get nowhere


# The environments and scores that a dataset carries

RECOVER = """
import json, minari, numpy
dataset = minari.load_dataset("{id}")
report = {{}}
for name in ("eval", "data"):
    env = dataset.recover_environment(eval_env=name == "eval")
    world, goals = env.unwrapped, []
    for seed in range(20):
        observation, info = env.reset(seed=seed)
        goals.append(world.goal.tolist())
    world.point_env.set_state(world.goal + [0.3, 0.0], numpy.zeros(2))
    _, reward, terminated, truncated, info = env.step(numpy.zeros(2, numpy.float32))
    report[name] = dict(space=str(env.observation_space), horizon=env.spec.max_episode_steps, goals=goals,
        kept=world.goal.tolist() == goals[-1], step=[reward, terminated, truncated, info["success"]],
        inside=env.observation_space.contains(observation), kwargs=env.spec.kwargs)
print(json.dumps(report))
"""


def test_recovered_evaluation_of_the_plain_form(roots):
    """A fresh process gets the 4 numbers and the one goal cell, from the dataset alone."""
    for found in fresh_python(roots["2"], RECOVER.format(id=PLAIN[1])).values():
        goals = np.array(found["goals"])
        assert found["space"] == "Box(-inf, inf, (4,), float64)"
        assert found["inside"]
        assert found["horizon"] == 300
        assert np.abs(goals - [-1, 1]).max() <= 0.25
        assert len(np.unique(goals, axis=0)) == 20
        assert found["step"] == [1.0, False, False, True]
        assert found["kept"]


def test_recovered_evaluation_of_the_goal_conditioned_form(roots):
    """The stock environment, which keeps its goal; the data's own draws another."""
    found = fresh_python(roots["2"], RECOVER.format(id=GOALS[1]))
    stock = pointmaze.stock_spec("medium")
    assert found["eval"]["kwargs"] == stock.kwargs
    assert (found["eval"]["horizon"], found["eval"]["kept"]) == (stock.max_episode_steps, True) == (600, True)
    assert (found["data"]["horizon"], found["data"]["kept"]) == (None, False)
    for env in found.values():
        assert "desired_goal" in env["space"]
        assert len({tuple(cell) for cell in np.floor(env["goals"]).tolist()}) > 5
        assert env["step"] == [1.0, False, False, True]


# m from the middle
GOAL_POSITIONS = {"umaze": (-1, 1), "medium": (2.5, -2.5), "large": (3.5, -3), "large-stitch": (3.5, -3)}


@pytest.mark.parametrize("maze", GOAL_POSITIONS)
def test_the_rewarded_cell_is_d4rls(maze):
    env = pointmaze.make_environment(pointmaze.Config(maze=maze), evaluation=True)
    env.reset(seed=0)
    (cell,) = env.unwrapped.maze.unique_goal_locations
    np.testing.assert_allclose(cell, GOAL_POSITIONS[maze])
    assert env.spec.max_episode_steps == {"umaze": 300, "medium": 600}.get(maze, 800)


@pytest.mark.parametrize("form", ["plain", "goals"])
def test_metadata(form, request):
    metadata = request.getfixturevalue(form).storage.metadata
    scores = metadata["reference_scores"]
    assert metadata["ref_min_score"] == scores["random"]["return_mean"] < metadata["ref_max_score"]
    assert metadata["ref_max_score"] == scores["planner"]["return_mean"]
    assert metadata["num_episodes_average_score"] == metadata["recipe"]["reference_episodes"] == 4
    assert "processes" not in metadata["recipe"]
    assert "mean returns of 4 episodes in the evaluation environment" in metadata["description"]
    assert ("shifts by at most 0.25 m" in metadata["description"]) == (form == "plain")


# What it leaves on the disk


def test_a_second_call_does_nothing(roots):
    folder = roots["2"] / PLAIN[1]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = run(roots["2"], *PLAIN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "is there" in done.stdout
    other = run(roots["2"], *PLAIN, "--noise", "0.1")
    assert (other.returncode, other.stdout) == (2, "")
    assert "another recipe" in other.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_it_leaves_only_the_dataset(roots):
    for root in roots.values():
        assert {path.name for path in root.iterdir()} == {"reef"}
        assert {path.name for path in (root / "reef/pointmaze").iterdir()} == {
            "namespace_metadata.json", "umaze-v0", "medium-goals-v0"
        }


@pytest.mark.parametrize("processes", ["1", "2"])
def test_it_leaves_no_temporary_files(tmp_path, scratch, processes):
    """Gymnasium-robotics alone leaves a file of every maze."""
    pointmaze.gym.make(pointmaze.stock_spec("umaze"))
    (left,) = scratch.iterdir()
    left.unlink()
    done = run(tmp_path, *PLAIN, "--processes", processes)
    assert done.returncode == 0, done.stderr
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("moment", ["collecting", "writing"])
def test_a_killed_run_leaves_no_dataset_and_no_process(tmp_path, monkeypatch, moment):
    arguments = ("--dataset", "reef/pointmaze/umaze-goals-v0", "--goals", "true", "--steps", "20000")
    environment = {**os.environ, "MINARI_DATASETS_PATH": str(tmp_path)}
    words = command(*arguments, "--processes", "2")
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    deadline, workers, written = time.monotonic() + 60, [], []
    while time.monotonic() < deadline and process.poll() is None:
        workers = max(workers, psutil.Process(process.pid).children(), key=len)
        written = list(tmp_path.glob(".partial-*/reef/**/main_data.hdf5"))
        if written if moment == "writing" else len(workers) > 2:  # two, and Python's resource tracker
            break
        time.sleep(0.005)
    if moment == "collecting":
        time.sleep(0.7)  # the workers are on their way
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(workers) == 3
    assert bool(written) == (moment == "writing")
    assert not psutil.wait_procs(workers, timeout=10)[1]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert minari.list_local_datasets() == {}
    assert not (tmp_path / "reef").exists()
    with pytest.raises(FileNotFoundError):
        minari.load_dataset("reef/pointmaze/umaze-goals-v0")


def test_ctrl_c_ends_at_once_and_leaves_nothing(tmp_path, sigint):  # noqa: F811
    environment = {**os.environ, "MINARI_DATASETS_PATH": str(tmp_path)}
    words = command("--processes", "2", "--steps", "400000", "--shards", "50")
    settings = {"env": environment, "start_new_session": True, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, **settings)
    while len(psutil.Process(process.pid).children()) < 3 and process.poll() is None:
        time.sleep(0.05)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    said = process.communicate(timeout=20)[1].splitlines()[-1]
    assert said == "pointmaze.py: interrupted; the same command goes on from what is saved, or begins anew"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(main, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(minari, "create_dataset_from_buffers", full)
    status, _, stderr = main("--steps", "300", "--reference_episodes", "1")
    assert status == 2
    assert "No space left on device" in stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
    assert os.environ["MINARI_DATASETS_PATH"] == str(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--maze", "big"), "maze: 'big' is not umaze or medium or large or large-stitch"),
        (("--steps", "299"), "one episode (300"),
        (("--steps", "0"), "steps"),
        (("--stepz", "300"), "did you mean steps?"),
        (("--noise", "loud"), "noise"),
        (("--noise", "nan"), "noise"),
        (("--goals", "maybe"), "goals"),
        (("--goals=true", "--maze=large-stitch", "--steps=800"), "no goal-conditioned form"),
        (("--shards", "0"), "shards"),
        (("--dataset", "reef/pointmaze/umaze"), "reef/pointmaze/umaze-v0"),
        (("--dataset", "../umaze-v0"), "Minari id"),
        (("--config_path", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_bad_arguments_end_in_one_line(main, tmp_path, arguments, words):
    status, stdout, stderr = main(*arguments)
    assert (status, stdout) == (2, "")
    assert len(stderr.splitlines()) == 1
    assert words in stderr
    assert list(tmp_path.iterdir()) == []


def test_the_exit_status_and_the_line_reach_the_shell(tmp_path):
    done = run(tmp_path, "--maze", "big")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
