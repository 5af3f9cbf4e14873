"""tools/datasets.py: a card's numbers against hand-made data, hashes, odd kinds of datasets, errors."""

import hashlib
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import datasets_picture
import gymnasium as gym
import h5py
import matplotlib.image
import minari
import numpy as np
import pytest
from conftest import load_script
from matplotlib.figure import Figure
from minari.data_collector import EpisodeBuffer

ROOT = Path(__file__).resolve().parents[1]
ID = "test/hand/made-v0"
QUICK = pytest.mark.usefixtures("blank")
BOX = gym.spaces.Box(-1, 3, (2,), np.float32)


@pytest.fixture(scope="module")
def script():
    """tools/datasets.py."""
    spec = importlib.util.spec_from_file_location("reef_datasets", ROOT / "tools/datasets.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(script, tmp_path, monkeypatch, capsys):
    """call(*arguments) is the command line, its cards in tmp_path/cards: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        words = [*map(str, arguments), "--output", str(tmp_path / "cards")]
        monkeypatch.setattr(sys, "argv", ["datasets.py", *words])
        capsys.readouterr()
        return script.main(), *capsys.readouterr()

    return run


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A Minari root of the test's own."""
    (tmp_path / "minari").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.fixture
def store(root):
    """store(episodes, ...) is a dataset in that root; observations and actions are Boxes unless given."""

    def write(episodes: list, observations=None, actions=BOX, name: str = ID):
        width = np.shape(episodes[0].observations)[-1] if observations is None else 0
        free = gym.spaces.Box(-np.inf, np.inf, (width,), np.float64)
        spaces = {"observation_space": observations or free, "action_space": actions}
        with warnings.catch_warnings(action="ignore"):  # Minari's advice on datasets to publish
            return minari.create_dataset_from_buffers(name, episodes, **spaces, data_format="hdf5")

    return write


@pytest.fixture
def blank(script, monkeypatch):
    """No picture, where it is not the point: drawing takes most of the time."""
    monkeypatch.setattr(script, "draw", lambda *arguments: Figure())


def episode(observations, actions, rewards, ended=(), cut=()) -> EpisodeBuffer:
    """`ended` and `cut` are the steps with a flag."""
    steps = np.arange(len(rewards))
    return EpisodeBuffer(
        observations=observations if isinstance(observations, dict) else np.array(observations, np.float64),
        actions=np.array(actions),
        rewards=np.array(rewards, np.float64),
        terminations=np.isin(steps, ended),
        truncations=np.isin(steps, cut),
        infos={},
    )


def tables(folder: Path, name: str = ID) -> dict[str, list[str]]:
    """The cells after the first of each row of a card's tables."""
    lines = (folder / f"cards/{name}.md").read_text().splitlines()
    rows = [line[2:-2].split(" | ") for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def numbers(cells: list[str]) -> list[float]:
    return [float(cell.replace(",", "")) for cell in cells]


def picture(folder: Path, name: str = ID) -> np.ndarray:
    return matplotlib.image.imread(folder / f"cards/{name}.png")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers_whatever_ran_before():
    RANDOM.bit_generator.state = np.random.default_rng(0).bit_generator.state


def walk(steps: int, width: int = 3, actions: int = 2, scale: float = 1.0) -> EpisodeBuffer:
    """A random episode that is cut at its end; actions are normal and clipped to the Box."""
    seen, rewards = RANDOM.normal(size=(steps + 1, width)), RANDOM.normal(size=steps)
    done = (scale * RANDOM.normal(size=(steps, actions))).clip(-1, 3).astype(np.float32)
    return episode(seen, done, rewards, cut=[steps - 1])


# ---------------------------------------- numbers of a small dataset ----------------------------------------

# Bounds are -1 and 3, so 1 % of their distance is 0.04: saturated are values from 2.96 and up to -0.96.
FOUR = [
    episode([[0, 5], [1, 5], [2, 5]], [[-1, 0], [3, 1]], [1, 2], ended=[1]),
    episode([[3, 5], [4, 5]], [[-1.5, 2.97]], [5], ended=[0]),
    episode([[0, 5]] * 4, [[-0.97, 2.95], [0, 2], [4, 0]], [0, 0, -8], ended=[2], cut=[2]),
    episode([[9, 5], [8, 5]], [[-0.95, 3]], [0.5]),
]


def test_numbers_by_hand(store, call, tmp_path):
    store(FOUR).storage.update_metadata({"ref_min_score": -12.0, "ref_max_score": 8.0})
    status, out, _ = call(ID)
    assert status == 0
    card = tables(tmp_path)
    assert card["Episodes"] == ["4"]
    assert card["Steps"] == ["7"]
    assert card["Episodes terminated"] == ["3 (75.0%)"]
    assert card["Episodes truncated"] == ["1 (25.0%)"]
    assert card["Episodes with both"] == ["1 (25.0%)"]
    assert card["Episodes with neither"] == ["1 (25.0%)"]
    # Returns 3 5 -8 0.5, so sorted -8 0.5 3 5, with quartiles 3/4, 3/2 and 9/4 places from the first.
    deviation = np.sqrt((2.875**2 + 4.875**2 + 8.125**2 + 0.375**2) / 4)
    spread = [0.125, deviation, -8, -1.625, 1.75, 3.5, 5]
    assert card["Mean return"] == ["0.125"]
    assert numbers(card["return"]) == pytest.approx(spread, abs=1e-3)
    # A score is 5 (return + 12).
    assert card["Mean return as a score"] == ["60.62"]
    scores = [60.625, 5 * deviation, 20, 51.875, 68.75, 77.5, 85]
    assert numbers(card["score"]) == pytest.approx(scores, abs=0.01)
    lengths = [1.75, np.sqrt(0.6875), 1, 1, 1.5, 2.25, 3]  # of 2 1 3 1
    assert numbers(card["length (steps)"]) == pytest.approx(lengths, abs=1e-3)
    deviation = np.sqrt((64 + 0.25 + 1 + 4 + 25) / 7 - (0.5 / 7) ** 2)  # of -8 0 0 0.5 1 2 5
    rewards = [0.5 / 7, deviation, -8, 0, 0.5, 1.5, 5]
    assert numbers(card["reward of a step"]) == pytest.approx(rewards, abs=1e-3)
    assert card["Steps with a reward other than 0"] == [f"{5 / 7:.2%}"]
    assert card["Action entries clipped"] == [f"{2 / 14:.2%}"]
    assert card["Action entries saturated"] == [f"{(5 + 2) / 14:.2%}"]
    assert card["Entries of an observation"] == ["2, 1 of them constant"]
    first = np.array([-1, 3, -1.5, -0.97, 0, 4, -0.95])
    assert numbers(card["0"][:6]) == pytest.approx([-1, 3, -1.5, 4, first.mean(), first.std()], abs=1e-3)
    assert card["0"][6:] == [f"{share / 7:.2%}" for share in (2, 5, 3, 2)]
    assert card["1"][6:] == [f"{share / 7:.2%}" for share in (0, 2, 0, 2)]
    assert card["ref_min"] == ["-12", "the dataset's metadata"]
    assert card["Environment"] == ["none recorded"]
    for number in ("60.62", f"{7 / 14:.2%}", "77.5", "made-v0.md"):  # the terminal says it too
        assert number in out
    assert picture(tmp_path).std() > 0
    assert files(tmp_path / "cards") == {f"{ID}.md", f"{ID}.png"}
    assert "](made-v0.png)" in (tmp_path / f"cards/{ID}.md").read_text()


@QUICK
def test_the_hash_is_an_independent_calculation(store, call, tmp_path, script):
    inner = gym.spaces.Dict({"z": gym.spaces.Box(-9, 9, (1,)), "c": gym.spaces.Box(-9, 9, (2,))})
    space = gym.spaces.Dict({"m": gym.spaces.Box(-9, 9, (1,), np.float64), "b": inner})
    m, z, c = np.array([[1.0], [2.0]]), np.float32([[3], [4]]), np.float32([[5, 6], [7, 8]])
    actions = np.float32([[0.5, 0.25]])
    store([episode({"m": m, "b": {"z": z, "c": c}}, actions, [2.5], ended=[0])], space)
    assert call(ID)[0] == 0
    digest = hashlib.sha256()
    rest = (actions, np.array([2.5]), np.array([True]), np.array([False]))
    assert script.leaves({"m": 3, "b": {"z": 2, "c": 1}}) == [1, 2, 3]  # HDF5 happens to sort its keys too
    for array in (c, z, m, *rest):
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    assert tables(tmp_path)["sha256"] == [f"{digest.hexdigest()} (none recorded)"]
    wanted = "{b: {c: [2] float32, z: [1] float32}, m: [1] float64}"
    assert tables(tmp_path)["Observations"] == [wanted]
    assert tables(tmp_path)["Entries of an observation"] == ["4, 0 of them constant"]


@QUICK
def test_the_recorded_hash_is_compared(store, call, tmp_path):
    dataset = store([walk(30)])
    wanted = load_script("collect/pointmaze.py").content_hash(dataset)
    dataset.storage.update_metadata({"content_hash": wanted})
    assert call(ID)[0] == 0
    assert tables(tmp_path)["sha256"] == [f"{wanted} (as recorded)"]
    dataset.storage.update_metadata({"content_hash": "0" * 64})
    status, out, _ = call(ID)
    assert status == 1
    assert f"NOT AS RECORDED: {'0' * 64}" in out
    assert "NOT AS RECORDED" in tables(tmp_path)["sha256"][0]


@QUICK
def test_bounds_are_those_of_the_environment(root, call, tmp_path):
    """The dataset's own bounds are infinite; the environment's are -2 and 2."""
    env, free = gym.make("Pendulum-v1"), gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    actions = np.float32([[-2], [2], [2.5], [-7], [1.97], [-1.95], [0], [0]])
    made = [episode(np.float32(RANDOM.normal(size=(9, 3))), actions, np.ones(8))]
    minari.create_dataset_from_buffers(ID, made, env=env, action_space=free, data_format="hdf5")
    assert call(ID)[0] == 0
    card = tables(tmp_path)
    assert card["Environment"] == ["Pendulum-v1"]
    assert card["Action entries clipped"] == [f"{2 / 8:.2%}"]
    assert card["Action entries saturated"] == [f"{5 / 8:.2%}"]
    assert card["0"][:2] == ["-2", "2"]
    assert "at most 200 steps" in (tmp_path / f"cards/{ID}.md").read_text()

    file = root / ID / "data/metadata.json"  # an environment that is not installed: the dataset's bounds
    text = file.read_text().replace("Pendulum-v1", "Nowhere-v1")
    file.write_text(text.replace("gymnasium.envs.classic_control.pendulum:PendulumEnv", "nowhere:Nowhere"))
    assert call(ID)[0] == 0
    card = tables(tmp_path)
    assert card["Environment"][0].startswith("Nowhere-v1, which cannot be made here (")
    assert card["Action entries clipped"] == card["Action entries saturated"] == ["no bounds"]
    assert card["0"][:2] == ["-inf", "inf"]
    assert card["0"][6:] == ["", "", "", ""]


@QUICK
def test_references_of_our_own_table(store, call, tmp_path):
    name = "mujoco/hopper/medium-v0"
    store([episode(np.zeros((2, 2)), [[0, 0]], [3234.3])], name=name)
    assert call(name)[0] == 0
    card = tables(tmp_path, name)
    assert card["Mean return as a score"] == ["100"]
    assert card["ref_max"][0] == "3,234"
    assert "not comparable with D4RL" in card["ref_min"][1]


@QUICK
def test_the_source_of_references_in_the_metadata(store, call, tmp_path):
    known = {"ref_min_score": 5, "ref_max_score": 5, "reference_source": "a | paper"}
    store([walk(5)]).storage.update_metadata(known)
    assert call(ID)[0] == 0
    card = tables(tmp_path)
    assert card["ref_max"] == ["5", r"a \| paper"]
    assert card["Mean return as a score"] == ["no references"]  # the two are equal: nothing to divide by


# ----------------------------------------------- odd datasets -----------------------------------------------


def test_principal_components():
    """x and y = 2 x + small noise, in other units, and a constant."""
    x, noise = RANDOM.normal(size=(2, 4000))
    sample = np.stack([5 + x, np.full(4000, 0.1), 1000 * (x + 0.1 * noise)], 1)
    places, shares = datasets_picture.project(sample)
    correlation = np.corrcoef(sample[:, 0], sample[:, 2])[0, 1]  # of two: variances 1 + r and 1 - r
    assert shares == pytest.approx([(1 + correlation) / 2, (1 - correlation) / 2], abs=1e-9)
    a, b = ((sample[:, i] - sample[:, i].mean()) / sample[:, i].std() for i in (0, 2))
    for column, wanted in enumerate((a + b, a - b)):
        np.testing.assert_allclose(np.abs(places[:, column]), np.abs(wanted) / np.sqrt(2), atol=1e-9)
    kept = [datasets_picture.project(sample[:, columns])[1].size for columns in ([1], [0, 1], [0, 0], [0, 2])]
    assert kept == [0, 1, 1, 2]


A, B = [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]
assert sum(A) != sum(B)
ODD = {
    "one step": [episode([[1, 2], [3, 4]], [[0, 0]], [1])],
    "one entry": [walk(30, width=1)],
    "constant observations": [episode(np.full((9, 3), 0.1), np.zeros((8, 2)), np.ones(8))] * 3,
    "on a line": [episode(np.arange(9)[:, None] * [1, -2], np.zeros((8, 2)), np.arange(8))],
    "equal returns but for rounding": [episode(np.eye(4), np.ones((3, 2)), rewards) for rewards in (A, B)],
    "large returns": [episode(np.eye(4), np.ones((3, 2)), [r, 1e9, 0]) for r in (1e7, -1e8, 0.5)],
    "many lengths": [walk(steps) for steps in range(1, 90)],
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("error")
def test_odd_data(kind, store, call, tmp_path, script):
    dataset = store(ODD[kind])
    status, _, err = call(ID)
    assert (status, err) == (0, "")
    assert tables(tmp_path)["Steps"] == [f"{dataset.total_steps:,}"]
    assert picture(tmp_path).shape[1] == 1700


BOUNDS = {
    "none": ([-np.inf, -np.inf], [np.inf, np.inf]),
    "of one entry": ([-np.inf, -1], [np.inf, 3]),
    "on one side": ([-1, -np.inf], [np.inf, 3]),
}


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.filterwarnings("error")
def test_bounds_that_are_missing(kind, store, call, tmp_path):
    """Actions -1.5, -1, 0 and 3 in both entries."""
    actions = np.float32([[-1.5, -1.5], [-1, -1], [0, 0], [3, 3]])
    low, high = map(np.float32, BOUNDS[kind])
    store([episode(np.eye(5), actions, np.ones(4))], actions=gym.spaces.Box(low, high))
    assert call(ID)[0] == 0
    card = tables(tmp_path)
    wanted = ["no bounds", "no bounds"] if kind == "none" else ["12.50%", "37.50%"]
    assert card["Action entries clipped"] + card["Action entries saturated"] == wanted
    by_entry = {"none": ["", ""], "of one entry": ["", "75.00%"], "on one side": ["50.00%", "25.00%"]}
    assert [card["0"][7], card["1"][7]] == by_entry[kind]


def test_memory_of_observations_is_bounded(script, store, monkeypatch):
    """Of more observations than SAMPLE that many are drawn, without any twice, and the same each time."""
    monkeypatch.setattr(script, "SAMPLE", 50)
    places = np.arange(303).reshape(3, 101, 1)
    dataset = store([episode(rows, np.zeros((100, 2)), np.ones(100)) for rows in places])
    data, again = script.read(dataset), script.read(dataset)
    assert data.sample.shape == (50, 1)
    assert len({*data.sample[:, 0]}) == 50
    assert {*data.sample[:, 0]} <= {*range(303)}
    assert (data.sample == again.sample).all()
    assert np.ptp(data.sample) > 200  # from all episodes
    assert data.positions[:, 0].tolist() == [*range(303)]
    monkeypatch.setattr(script, "SAMPLE", 1000)
    assert script.read(dataset).sample[:, 0].tolist() == [*range(303)]  # all of them, in their order


def test_bins():
    """Equal values are one bar; every bin of whole numbers has equally many of them."""

    def bars(values) -> list[tuple[float, float]]:
        axis = Figure().subplots()
        datasets_picture.draw_histogram(axis, np.array(values), "return")
        return [(bar.get_width(), bar.get_height()) for bar in axis.patches]

    assert bars([sum(A), sum(B)]) == [(1, 2)]
    assert bars([7.0]) == [(1, 1)]
    assert bars(np.arange(900)) == [(23, 23)] * 39 + [(23, 3)]
    assert sum(height for _, height in bars(RANDOM.normal(size=100))) == 100


def test_positions_outside_of_the_maze():
    figure, bins = Figure(), [np.arange(3), np.arange(3)]
    datasets_picture.draw_density(figure.subplots(), np.full((3, 2), 9.0), bins, "none")
    figure.canvas.draw()


@pytest.mark.parametrize("goals", [False, True])
def test_mazes(goals, root, script, tmp_path, capsys, monkeypatch):
    """The heat map counts the positions of all observations; the stars stand on the environment's goals."""
    pointmaze = load_script("collect/pointmaze.py")
    sizes = {"steps": 900, "shards": 1, "reference_episodes": 2, "processes": 1}
    pointmaze.make_dataset(pointmaze.Config(dataset=ID, goals=goals, **sizes))
    dataset, figures, draw = minari.load_dataset(ID), [], script.draw
    monkeypatch.setattr(script, "draw", lambda *arguments: figures.append(draw(*arguments)) or figures[-1])
    assert script.make_card(dataset, tmp_path / "cards")
    (maze,) = [axis for axis in figures[0].axes if axis.get_title("left") == "Positions"]
    (heat,) = maze.collections
    assert heat.get_array().sum() == dataset.total_steps + dataset.total_episodes
    key = (lambda seen: seen["achieved_goal"]) if goals else (lambda seen: seen[:, :2])
    seen = np.concatenate([key(row.observations) for row in dataset.iterate_episodes()])
    counts = np.zeros((100, 100))  # in squares of 0.05 m [y, x] from -2.5 m, for the middle of the maze is 0
    np.add.at(counts, tuple(np.floor((seen[:, ::-1] + 2.5) / 0.05).astype(int).T), 1)
    assert (heat.get_array().filled(0) == counts).mean() > 0.999  # but for rounding at edges
    stars = {tuple(place) for place in np.transpose(maze.lines[0].get_data())}
    cells = {(-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)}
    assert stars == (cells if goals else {(-1, 1)})
    assert len(maze.patches) == 25 - 7  # walls
    card = tables(tmp_path)
    assert card["ref_min"][1] == "the dataset's metadata: random, mean of 2 episodes"
    assert card["ref_max"][1] == "the dataset's metadata: planner, mean of 2 episodes"
    # an episode that ends at its goal earns 1, and one of an evaluation stays there and earns on
    assert card["Mean return as a score"][0].startswith("none: ") == goals
    assert ("score" in card) == (not goals)
    assert "mujoco" in card["Versions at its making"][0]
    assert card["Processor here"][0].startswith(platform.machine())
    assert "any machine" in card["Made again"][0]
    assert card["sha256"][0].endswith("(as recorded)")
    words = (tmp_path / f"cards/{ID}.md").read_text()
    assert "\n\nA planner with Gaussian noise" in words


# ------------------------------------------------- --check -------------------------------------------------


def edit(folder: Path, old: str, new: str) -> None:
    """Replaces what a regular expression finds once in the card."""
    file = folder / f"cards/{ID}.md"
    text, count = re.subn(old, new, file.read_text())
    assert count == 1
    file.write_text(text)


@QUICK
def test_check(store, root, call, tmp_path):
    store([walk(20)])
    store([walk(20)], name="test/hand/other-v0")
    assert call(ID, "test/hand/other-v0")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cards").rglob("*")}
    assert call("--check")[:2] == (0, f"{ID}: equal\ntest/hand/other-v0: equal\n")
    assert call("--check", ID)[:2] == (0, f"{ID}: equal\n")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cards").rglob("*")}

    with h5py.File(root / ID / "data/main_data.hdf5", "a") as file:
        file["episode_0/rewards"][7] += 1e-12
    status, out, _ = call("--check")
    assert status == 1
    assert out.startswith(f"{ID}: DIFFERS: sha256 ")
    assert tables(tmp_path)["sha256"][0].split()[0] in out
    assert out.endswith("test/hand/other-v0: equal\n")  # the first does not hide the second

    shutil.rmtree(root / ID)
    status, out, _ = call("--check", ID)
    assert (status, out) == (0, f"{ID}: skipped, it is not on this machine\n")


@QUICK
@pytest.mark.parametrize("row", ["Processor here", "Versions here", "Versions at its making"])
def test_check_skips_what_other_machines_made(row, store, call, tmp_path, root):
    """The data differ from the card's; told from nothing but the row is that this means nothing."""
    store([walk(20)]).storage.update_metadata({"versions": {"mujoco": "3.3.7"}})
    assert call(ID)[0] == 0
    edit(tmp_path, r"\| sha256 \| \w{8}", "| sha256 | 00000000")
    assert call("--check")[0] == 1
    edit(tmp_path, rf"\| {row} \| .*", f"| {row} | another 1.2 |")
    status, out, _ = call("--check")
    assert status == 0
    assert out.startswith(f"{ID}: skipped, {row}: ")
    assert "another 1.2" in out
    assert len(out.splitlines()) == 1


# -------------------------------------------------- errors --------------------------------------------------


def refused(call, *arguments: str, folder: Path) -> str:
    """The one line of an error that leaves nothing behind."""
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert not (folder / "cards").exists()
    return err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a dataset"),
        (["nowhere/at-all-v0"], "minari download nowhere/at-all-v0"),
        (["reef/pointmaze/umaze-v0"], "make dataset ID=reef/pointmaze/umaze-v0"),
        (["../outside-v0"], "no Minari id"),
        ([ID, "nowhere/at-all-v0"], "nowhere/at-all-v0 is not on this machine"),  # and no card of the first
        (["--check"], "has no cards"),
        (["--check", ID], f"has no card of {ID}"),
    ],
)
def test_what_is_not_there(words, said, store, call, tmp_path):
    store([walk(5)])
    assert said in refused(call, *words, folder=tmp_path)


SEEN, DONE = np.zeros((3, 4)), np.zeros((2, 2), np.float32)
SQUARE = gym.spaces.Box(0, 1, (2, 2), np.float32)
DOUBLE = np.array([[0, 2], [1, 1]])
BITS = gym.spaces.MultiBinary(4)
SPACES = {
    "actions in MultiDiscrete([3 3])": (None, gym.spaces.MultiDiscrete([3, 3]), SEEN, DOUBLE),
    "actions in Box(0.0, 1.0, (2, 2)": (None, SQUARE, SEEN, np.zeros((2, 2, 2), np.float32)),
    "observations in Box(0.0, 1.0, (2, 2)": (SQUARE, BOX, np.zeros((3, 2, 2), np.float32), DONE),
    "observations in Discrete(3)": (gym.spaces.Discrete(3), BOX, np.zeros(3, np.int64), DONE),
    "observations in MultiBinary(4)": (BITS, gym.spaces.Discrete(2), SEEN.astype(np.int8), np.zeros(2, int)),
}


@pytest.mark.parametrize("said", SPACES)
def test_what_is_no_vector(said, store, call, tmp_path):
    space, action_space, seen, done = SPACES[said]
    store([replace(episode(SEEN, done, [0, 0]), observations=seen)], space, action_space)
    assert said in refused(call, ID, folder=tmp_path)


def damage(root: Path, kind: str) -> None:
    folder = root / ID / "data"
    if kind == "metadata":
        (folder / "metadata.json").write_text("{")
    elif kind == "file":
        (folder / "main_data.hdf5").write_bytes(b"nothing of HDF5")
    elif kind in ("steps", "name"):
        known = json.loads((folder / "metadata.json").read_text())
        known |= {"steps": {"total_steps": 99}, "name": {"dataset_id": "another/name-v0"}}[kind]
        (folder / "metadata.json").write_text(json.dumps(known))
    else:
        with h5py.File(folder / "main_data.hdf5", "a") as file:
            if kind == "episode":
                del file["episode_1"]
            elif kind == "length":
                file["episode_1/rewards"].resize((4,))
            else:
                file["episode_1/actions"][3] = np.nan


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("metadata", f"minari delete {ID}"),
        ("file", f"minari delete {ID}"),
        ("name", "call it another/name-v0"),
        ("steps", "it has 10 steps, its metadata say 99"),
        ("episode", f"cannot read {ID}"),
        ("length", "episode 1 is malformed: 4 steps"),
        ("nan", "episode 1: actions are not all finite"),
    ],
)
@QUICK
def test_what_is_damaged(kind, said, store, root, call, tmp_path):
    store([walk(5), walk(5)])
    assert call(ID)[0] == 0
    damage(root, kind)
    status, _, err = call("--check")  # says so too
    assert (status, len(err.splitlines())) == (2, 1)
    shutil.rmtree(tmp_path / "cards")
    assert said in refused(call, ID, folder=tmp_path)


@QUICK
def test_a_full_disk_leaves_nothing(store, call, tmp_path, monkeypatch):
    def full(path, content):
        path.touch()
        raise OSError(28, "No space left on device")

    store([walk(5)])
    monkeypatch.setattr(Path, "write_bytes", full)
    status, _, err = call(ID)
    assert status == 2
    assert "No space left on device" in err
    assert files(tmp_path / "cards") == set()


def test_the_status_and_the_line_reach_the_shell(root, tmp_path):
    words = [sys.executable, ROOT / "tools/datasets.py", "nowhere-v0", "--output", tmp_path / "cards"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("datasets.py: nowhere-v0 is not on this machine")


# ------------------------------------- logs: names, choices, drift -------------------------------------


def choosing(numbers: list[int], rewards: list[float], observations=None, **infos) -> EpisodeBuffer:
    steps = len(numbers)
    return EpisodeBuffer(
        observations=np.arange(2.0 * steps + 2).reshape(-1, 2) if observations is None else observations,
        actions=np.array(numbers, np.int64),
        rewards=np.array(rewards, np.float64),
        terminations=np.arange(steps) == steps - 1,
        truncations=np.zeros(steps, bool),
        infos={name: np.array(values) for name, values in infos.items()},
    )


def drifting() -> list[EpisodeBuffer]:
    """Six episodes: two pairs choose 1 and earn 1 a step, the last pair chooses 2 and earns 4."""
    early = [choosing([1, 1, 0], [1, 1, 1]), choosing([1, 1], [1, 1])]
    return [*early, *early, choosing([2, 2, 2, 2], [4, 4, 4, 4]), choosing([2, 2, 2, 2], [4, 4, 4, 4])]


@QUICK
def test_a_card_of_choices_with_their_names_and_drift(store, call, tmp_path):
    dataset = store(drifting(), actions=gym.spaces.Discrete(3))
    names = {"action_names": ["<b>shut|off</b>", "half_open", "[x](y)"], "action_columns": ["valve"]}
    dataset.storage.update_metadata({**names, "observation_columns": ["temperature", "shift=night"]})
    assert call(ID)[0] == 0
    text = (tmp_path / f"cards/{ID}.md").read_text()
    found = tables(tmp_path)
    assert "<b>" not in text
    assert found["&lt;b&gt;shut\\|off&lt;/b&gt;"] == ["2", "11.11%"]
    assert found["half\\_open"] == ["8", "44.44%"]
    assert found["\\[x\\](y)"] == ["8", "44.44%"]
    assert found["Actions"] == ["3 choices"]
    assert found["Observed"] == ["temperature, shift=night"]
    assert found["Acted on"] == ["valve"]
    returns = np.array([3, 2, 3, 2, 16, 16])
    first, middle, last, moved = found["mean return"]
    assert [float(first), float(middle), float(last)] == [2.5, 2.5, 16]
    assert moved == f"**{(16 - 2.5) / returns.std():+.2f}**"
    rewards = np.repeat([1, 4], [10, 8])
    assert found["mean reward"] == ["1", "1", "4", f"**{3 / rewards.std():+.2f}**"]
    share = np.repeat([0, 1], [10, 8])
    assert found["mean action \\[x\\](y)"] == ["0", "0", "1", f"**{1 / share.std():+.2f}**"]
    assert found["mean length"][:3] == ["2.5", "2.5", "4"]


@QUICK
def test_what_does_not_drift_is_not_in_bold(store, call, tmp_path):
    store([walk(30) for _ in range(30)])
    assert call(ID)[0] == 0
    found = tables(tmp_path)
    assert {"mean return", "mean action 0", "mean action 1"} <= {*found}
    assert "**" not in (tmp_path / f"cards/{ID}.md").read_text()


@QUICK
def test_two_episodes_have_no_drift(store, call, tmp_path):
    store([walk(5), walk(5)])
    assert call(ID)[0] == 0
    assert "Drift" not in (tmp_path / f"cards/{ID}.md").read_text()


@QUICK
def test_entries_of_actions_have_the_names_of_their_columns(store, call, tmp_path):
    store([walk(5)]).storage.update_metadata({"action_columns": ["force", "torque"]})
    assert call(ID)[0] == 0
    assert {"force", "torque"} <= {*tables(tmp_path)}


def test_choices_are_drawn(store, call, tmp_path):
    store(drifting(), actions=gym.spaces.Discrete(3))
    assert call(ID)[0] == 0
    assert np.ptp(picture(tmp_path)) > 0


def content(*arrays: np.ndarray) -> str:
    """The hash of arrays in the order of an episode's."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


# States are 2 to 5, choices 1 to 3, of which 3 is never made. State and choice, with propensity:
# 2 1 (1/2), 3 2 (1/4), 2 1 (1/2); 2 1 (1/2); 3 2 (1/4), 2 2 (1/8). All episodes end in 5.
STATES = [np.array(states) for states in ([2, 3, 2, 5], [2, 5], [3, 2, 5])]
MADE = [[1, 2, 1], [1], [2, 2]]
LIKELY = [[0.5, 0.25, 0.5], [0.5], [0.25, 0.125]]
SPACES_OF_STATES = gym.spaces.Discrete(4, start=2), gym.spaces.Discrete(3, start=1)


def patients(*parts: int) -> list[EpisodeBuffer]:
    """Those episodes, with propensities in `parts` only."""
    log = []
    for number, (states, made, likely) in enumerate(zip(STATES, MADE, LIKELY)):
        infos = {"propensity": likely} if number in parts else {}
        log.append(choosing(made, [0] * (len(made) - 1) + [number], states, **infos))
    return log


@QUICK
def test_states_by_hand(store, call, tmp_path):
    dataset = store(patients(0, 1, 2), *SPACES_OF_STATES)
    dataset.storage.update_metadata({"action_names": ["wait_here_", "<i>|give", "$x"]})
    status, out, _ = call(ID)
    card = tables(tmp_path)
    assert status == 0
    assert card["Observations"] == ["4 states"]
    assert card["States seen"] == ["3 of 4, 2 of them with a choice"]
    places = np.exp(-(2 / 3) * np.log(2 / 3) - (1 / 3) * np.log(1 / 3))
    assert card["Effective number of states"] == [f"{places:.1f} of those with a choice"]
    assert card["Steps in the 10 most frequent"] == ["100.0%"]
    assert card["Pairs of state and choice seen"] == ["3 of 12 (25.0%)"]
    assert card["Choices tried in a state"] == ["1.5 on average, where any was"]
    assert card["Choices made"] == ["2 of 3"]
    given = 2 ** ((3 * 1 + 2 * 2 + 1 * 3) / 6)  # -log2 of 1/2 three times, 1/4 twice, 1/8 once
    assert card["Effective number of choices"] == [f"2.0 by shares, {given:.1f} given what is observed"]
    assert card["Propensities"] == [f"0.125 at least, {2.125 / 6:.4g} on average"]
    assert card["Choices allowed"] == ["all, there is no action_mask"]
    assert "Entries of an observation" not in card
    # names are escaped
    assert card["wait\\_here\\_"] == card["&lt;i&gt;\\|give"] == ["3", "50.00%"]
    assert card["$x"] == ["0", "0.00%"]
    # pairs 2 1 three times, 3 2 twice, 2 2 once
    assert [card[times] for times in "125"] == [
        ["3", "25.0%", "100.0%"],
        ["2", "16.7%", "83.3%"],
        ["0", "0.0%", "0.0%"],
    ]
    assert card["mean action &lt;i&gt;\\|give"][:3] == ["0.3333", "0", "1"]
    assert card["mean propensity"][:3] == ["0.4167", "0.5", "0.1875"]
    arrays = []
    for states, made, last in zip(STATES, MADE, range(3)):
        ends = np.arange(len(made)) == len(made) - 1
        arrays += [states, np.array(made), ends * float(last), ends, ends & False]
    assert card["sha256"] == [f"{content(*arrays)} (none recorded)"]
    assert "3 of 12 (25.0%)" in out
    assert call("--check")[:2] == (0, f"{ID}: equal\n")


@QUICK
def test_propensities_and_masks_of_some_episodes(store, call, tmp_path):
    """Of the masks' three steps two allow two choices and one allows one, which is not the one made."""
    log = patients(0, 2)
    log[0].infos["action_mask"] = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]])
    store(log, *SPACES_OF_STATES)
    assert call(ID)[0] == 0
    card = tables(tmp_path)
    assert card["Propensities"] == ["0.125 at least, 0.325 on average, in 2 of 3 episodes alone"]
    assert "mean propensity" not in card
    assert card["Choices allowed"] == ["1 at least, 1.7 on average, in 1 of 3 episodes alone"]
    assert card["Steps with a forbidden choice"] == ["33.33%"]


IMAGES = np.zeros((5, 2, 3, 2), np.uint8)  # of two rows, three columns and two channels
IMAGES[:, 0, 1, 0] = [3, 0, 0, 3, 3]
IMAGES[1:3, 1, 2, 1] = [200, 100]  # by which alone those two differ


@QUICK
def test_of_a_dict_with_an_image_that_alone_is_read(store, call, tmp_path, script):
    image, around = gym.spaces.Box(0, 255, (2, 3, 2), np.uint8), gym.spaces.Discrete(4)
    space = gym.spaces.Dict({"mission": gym.spaces.Text(20), "image": image, "direction": around})
    seen = {"mission": ["go to the red ball"] * 5, "image": IMAGES, "direction": np.arange(5) % 4}
    dataset = store([choosing([0, 1, 1, 0], [0, 0, 0, 1], seen)], space, gym.spaces.Discrete(2))
    assert call(ID)[0] == 0
    card = tables(tmp_path)
    assert card["Observations"] == ["[2, 3, 2] uint8, the image alone of direction, image, mission"]
    assert card["Entries of an observation"] == ["12, 10 of them constant"]
    assert card["Different observations"] == ["3 of 5 (60.0%)"]
    assert card["Steps after which it is the same"] == ["25.00%"]
    assert card["Different pairs with a choice"] == ["3"]
    assert card["Choices tried at an observation"] == ["1.0 on average, where any was"]
    rewards, ends = np.array([0.0, 0, 0, 1]), np.array([False, False, False, True])
    wanted = content(IMAGES, np.array([0, 1, 1, 0]), rewards, ends, ends & False)
    assert card["sha256"] == [f"{wanted} (none recorded)"]

    log, axis = script.read(dataset).log, Figure().subplots()
    datasets_picture.draw_planes(axis, log.sums / 5)
    first, second = (image.get_array().filled(0) for image in axis.images)
    assert first.tolist() == [[0, 9 / 5, 0], [0, 0, 0]]
    assert second.tolist() == [[0, 0, 0], [0, 0, 60]]
    assert [text.get_text() for text in axis.texts] == ["0: ≤ 1.8", "1: ≤ 60"]


def test_pairs_are_drawn_by_frequency(store, script):
    log, axis = script.read(store(patients(), *SPACES_OF_STATES)).log, Figure().subplots()
    datasets_picture.draw_pairs(axis, log)
    (mesh,) = axis.collections
    assert mesh.get_array().filled(0).tolist() == [[3, 0], [1, 2], [0, 0]]  # choices 1 to 3 in states 2 and 3
    titles = {axis.get_title(place) for place in ("left", "center")}  # which, a style loaded before decides
    assert titles == {"25.0% of all pairs seen", ""}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["one state", "many choices", "black planes"])
def test_odd_logs(kind, store, call, tmp_path):
    """One state and choice; more choices than a table holds; planes that never change, of many channels."""
    planes = gym.spaces.Box(0, 1, (3, 2, 17), np.uint8)
    logs = {
        "one state": ([choosing([0], [1], np.zeros(2, int))], gym.spaces.Discrete(1), 1),
        "many choices": ([choosing([*range(29), 28], [1] * 30)] * 3, None, 40),
        "black planes": ([choosing([1, 1], [0, 1], np.zeros((3, 3, 2, 17), np.uint8))], planes, 2),
    }
    log, space, choices = logs[kind]
    store(log, space, gym.spaces.Discrete(choices))
    assert call(ID)[::2] == (0, "")
    assert picture(tmp_path).shape[1] == 1700
    made = {"one state": "1 of 1", "many choices": "29 of 40", "black planes": "1 of 2"}
    card = tables(tmp_path)
    assert card["Choices made"] == [made[kind]]
    if kind == "many choices":  # 28 was made most, and 25 comes after 24 others
        assert card["28"] == ["6", "6.67%"]
        assert "25" not in card
        assert "mean action 28" not in card


BROKEN = {
    "propensities of its 2 steps": {"infos": {"propensity": np.array([0.5, 0.0])}},
    "propensities of its 2 steps are": {"infos": {"propensity": np.array([0.5, 0.5, 0.5])}},
    "action_mask of shape (2, 3), not (3, 3)": {"infos": {"action_mask": np.ones((2, 3))}},
    "actions are not all in Discrete(3, start=1)": {"actions": np.array([0, 1])},
    "observations are not all in Discrete(4, start=2)": {"observations": np.array([2, 6, 5])},
}


@pytest.mark.parametrize("said", BROKEN)
def test_logs_that_are_damaged(said, store, call, tmp_path):
    fine = choosing([1, 2], [0, 1], np.array([2, 3, 5]))
    store([fine, replace(fine, **BROKEN[said])], *SPACES_OF_STATES)
    err = refused(call, ID, folder=tmp_path)
    assert f"episode 1: {said}" in err


@QUICK
def test_environments_that_are_scripts_of_collect(store, script, call, tmp_path, monkeypatch):
    scripts = tmp_path / "algorithms/collect"
    scripts.mkdir(parents=True)
    (scripts / "tiny.py").write_text("from choices import Walk\n")
    gym.register("reef/Tiny-v0", "reef_tiny:Walk", max_episode_steps=30)
    try:
        dataset = store(patients(), *SPACES_OF_STATES)
        dataset.storage.update_metadata({"env_spec": gym.spec("reef/Tiny-v0").to_json()})
        monkeypatch.setattr(script, "ROOT", tmp_path)
        monkeypatch.setattr(script, "references", lambda *arguments: {})
        assert call(ID)[0] == 0
    finally:
        del gym.registry["reef/Tiny-v0"]
        sys.modules.pop("reef_tiny", None)
    assert tables(tmp_path)["Environment"] == ["reef/Tiny-v0"]
    assert "at most 30 steps" in (tmp_path / f"cards/{ID}.md").read_text()
