"""algorithms/collect/from_arrays.py: a log's episodes as worked out by hand, and what it refuses."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
from conftest import load_script

SCRIPT = Path(__file__).resolve().parents[1] / "algorithms/collect/from_arrays.py"
FORMS = ("npz", "csv", "parquet")
from_arrays = load_script("collect/from_arrays.py")


def make_log() -> dict[str, np.ndarray]:
    """Eight rows: 0 to 2 end in a termination, 3 to 5 in a truncation, 6 and 7 in nothing."""
    rows = np.arange(8)
    return {
        "observations": np.stack([rows + 0.1, -rows - 0.2], 1),
        "actions": np.stack([rows / 10, 0.5 - rows / 7, rows / 3], 1),
        "rewards": rows + 0.5,
        "terminations": rows == 2,
        "truncations": rows == 5,
    }


def write(folder: Path, log: dict, form: str) -> Path:
    """The log as a file; in a table a field of width d is d columns with numbers."""
    path = folder / f"log.{form}"
    if form == "npz":
        np.savez(path, **log)
        return path
    columns = {}
    for name, array in log.items():
        name = name.removesuffix("s")
        wide = np.ndim(array) == 2
        columns |= {f"{name}_{i}": column for i, column in enumerate(array.T)} if wide else {name: array}
    table = pd.DataFrame(columns)
    table.to_parquet(path) if form == "parquet" else table.to_csv(path, index=False)
    return path


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """An empty Minari root."""
    (tmp_path / "minari").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.fixture
def call(root, monkeypatch, capsys):
    """call(file, "--field", ...) is the command line in this process: exit status, stdout, stderr."""

    def run(file: Path, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["from_arrays.py", "--file", str(file), *arguments])
        capsys.readouterr()
        status = 0
        try:
            from_arrays.main(from_arrays.import_log)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def imported(call, tmp_path):
    """imported(log, "csv", ...): the dataset, its episodes and what was printed."""

    def run(log: dict, form: str = "npz", *arguments: str):
        status, out, err = call(write(tmp_path, log, form), *arguments)
        assert (status, err) == (0, "")
        dataset = minari.load_dataset("my/logs-v0")
        episodes = list(dataset.iterate_episodes())
        for episode in episodes:  # what every dataset has to be
            steps = len(episode.rewards)
            assert len(episode.actions) == len(episode.terminations) == len(episode.truncations) == steps
            assert not episode.terminations[:-1].any()
            assert not episode.truncations[:-1].any()
        return dataset, episodes, out

    return run


@pytest.fixture
def refused(call, root, tmp_path):
    """refused(log, "csv", ...) or refused(file, ...): the one line, with nothing written."""

    def run(log, form: str = "npz", *arguments: str) -> str:
        file = write(tmp_path, log, form) if isinstance(log, dict) else log
        status, out, err = call(file, *arguments)
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert list(root.iterdir()) == []
        return err

    return run


def assert_steps(episode, log: dict, rows: list[int], seen: list[int]) -> None:
    """The episode is these rows of the log, and its observations those of the rows `seen`."""
    np.testing.assert_array_equal(episode.observations, log["observations"][seen])
    np.testing.assert_array_equal(episode.actions, log["actions"][rows].astype(np.float32))
    np.testing.assert_array_equal(episode.rewards, log["rewards"][rows])


# Episodes


@pytest.mark.equation(1, 2)
@pytest.mark.parametrize("form", FORMS)
def test_without_next_observations(imported, form):
    log = make_log()
    dataset, episodes, out = imported(log, form)
    assert_steps(episodes[0], log, [0, 1, 2], [0, 1, 2, 2])  # terminated: the last observation again
    assert_steps(episodes[1], log, [3, 4], [3, 4, 5])  # truncated: the last step is lost
    assert_steps(episodes[2], log, [6], [6, 7])  # the log ends
    assert [e.terminations[-1] for e in episodes] == [True, False, False]
    assert [e.truncations[-1] for e in episodes] == [False, True, True]
    assert (dataset.total_episodes, dataset.total_steps) == (3, 6)
    assert "my/logs-v0: 6 steps in 3 episodes, 1 of them terminated" in out
    assert "episodes without a flag at their end, taken as truncated: 1\n" in out
    assert "terminated episodes whose last observation stands twice at the end: 1\n" in out
    assert "steps lost, each the last of a truncated episode: its next observation is unknown: 2\n" in out
    assert "lost, truncated after a single step" not in out
    assert all(line in dataset.storage.metadata["description"] for line in out.splitlines()[1:])


@pytest.mark.parametrize("form", FORMS)
def test_with_next_observations_no_step_is_lost(imported, form):
    log = make_log()
    log["next_observations"] = np.append(log["observations"][1:], [[80.0, 81.0]], 0)
    log["next_observations"][[2, 5]] = [[20.0, 21.0], [50.0, 51.0]]
    _, episodes, out = imported(log, form)
    for episode, rows in zip(episodes, ([0, 1, 2], [3, 4, 5], [6, 7]), strict=True):
        assert_steps(episode, {**log, "observations": episode.observations}, rows, [*range(len(rows) + 1)])
        np.testing.assert_array_equal(episode.observations[:-1], log["observations"][rows])
        np.testing.assert_array_equal(episode.observations[-1], log["next_observations"][rows[-1]])
    assert [e.truncations[-1] for e in episodes] == [False, True, True]
    assert "taken as truncated: 1\n" in out
    assert "lost" not in out
    assert "twice" not in out
    assert "reset" not in out


def test_a_next_observation_after_a_reset_is_pointed_out(imported):
    log = make_log()
    log["next_observations"] = np.append(log["observations"][1:], [[80.0, 81.0]], 0)
    _, _, out = imported(log)  # row 2, terminated, does no harm; row 5, truncated, does
    assert "(wrong if a reset lies between): 1\n" in out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ids", [[7, 7, 7, 3, 3, 3, 3, 4], list("bbbaaaac")])
def test_episode_ids(imported, form, ids):
    log = {**make_log(), "episode_ids": np.array(ids)}
    log["truncations"][:] = False
    log["truncations"][6] = True
    _, episodes, out = imported(log, form)
    assert_steps(episodes[0], log, [0, 1, 2], [0, 1, 2, 2])
    assert_steps(episodes[1], log, [3, 4, 5], [3, 4, 5, 6])
    assert len(episodes) == 2  # the third was a single step, and truncated
    assert "episodes lost, truncated after a single step: 1\n" in out
    assert "without a flag at their end, taken as truncated: 1\n" in out


def test_where_ids_change_without_a_flag_is_a_truncation(imported):
    log = {**make_log(), "episode_ids": np.array([0, 0, 0, 1, 1, 2, 2, 2])}
    del log["truncations"]
    _, episodes, out = imported(log)
    assert_steps(episodes[1], log, [3], [3, 4])
    assert_steps(episodes[2], log, [5, 6], [5, 6, 7])
    assert [e.terminations[-1] for e in episodes] == [True, False, False]
    assert [e.truncations[-1] for e in episodes] == [False, True, True]
    assert "taken as truncated: 2\n" in out


def test_both_flags_are_a_termination_at_the_time_limit(imported):
    log = make_log()
    log["truncations"][2] = True
    _, episodes, _ = imported(log)
    assert_steps(episodes[0], log, [0, 1, 2], [0, 1, 2, 2])
    assert (episodes[0].terminations[-1], episodes[0].truncations[-1]) == (True, True)


# Names and layouts


@pytest.mark.parametrize(
    ("termination", "truncation"),
    [("terminals", "timeouts"), ("terminated", "truncated"), ("terminal", "timeout")],
)
@pytest.mark.parametrize("form", FORMS)
def test_other_names_of_the_flags(imported, form, termination, truncation):
    log = make_log()
    log[termination], log[truncation] = log.pop("terminations"), log.pop("truncations")
    assert [len(e.rewards) for e in imported(log, form)[1]] == [3, 2, 1]


def test_numbered_columns_stand_in_any_order(call, tmp_path):
    log = {**make_log(), "observations": np.arange(88.0).reshape(8, 11)}  # _10 comes after _9
    table = pd.read_csv(write(tmp_path, log, "csv"))
    table[sorted(table, reverse=True)].to_csv(tmp_path / "log.csv")
    assert call(tmp_path / "log.csv")[0] == 0
    assert_steps(minari.load_dataset("my/logs-v0")[0], log, [0, 1, 2], [0, 1, 2, 2])


def test_names_of_the_users_own(imported, call, tmp_path):
    log, path = make_log(), tmp_path / "own.csv"
    x, speed = log["observations"].T
    columns = {"time": list("abcdefgh"), "speed [m/s]": speed, "x": x}
    columns |= {name: log["actions"][:, i] for i, name in enumerate("uvw")}
    columns |= {"r": log["rewards"], "end": log["terminations"], "cut": log["truncations"]}
    pd.DataFrame(columns).to_csv(path)
    names = ("--observations", "[x, 'speed [m/s]']", "--actions", "u v w", "--rewards", "r")
    status, _, err = call(path, *names, "--terminations", "end", "--truncations", "cut")
    assert (status, err) == (0, "")
    episode = minari.load_dataset("my/logs-v0")[0]
    assert_steps(episode, log, [0, 1, 2], [0, 1, 2, 2])


def test_vectors_in_the_columns_of_a_parquet(call, tmp_path):
    log = make_log()
    table = pd.DataFrame({name: [*array] for name, array in log.items()})
    table.to_parquet(tmp_path / "log.parquet")
    assert call(tmp_path / "log.parquet")[0] == 0
    assert_steps(minari.load_dataset("my/logs-v0")[0], log, [0, 1, 2], [0, 1, 2, 2])


def test_dict_observations(imported):
    log = make_log()
    log["observations/b"], log["observations/a"] = log["observations"][:, :1], log.pop("observations")
    log["next_observations/b"] = log["observations/b"] + 1
    log["next_observations/a"] = log["observations/a"] + [1, -1]
    dataset, episodes, _ = imported(log)
    for key in "ab":
        expected = np.append(log[f"observations/{key}"][3:6], log[f"next_observations/{key}"][5:6], 0)
        np.testing.assert_array_equal(episodes[1].observations[key], expected)
    assert {key: space.shape for key, space in dataset.observation_space.items()} == {"a": (2,), "b": (1,)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int8])
def test_types_of_an_npz_stay_if_they_are_float32_or_float64(imported, dtype):
    log = make_log()
    log["observations"] = log["observations"].astype(dtype)
    dataset, episodes, _ = imported(log)
    expected = np.float64 if dtype == np.float64 else np.float32
    assert episodes[0].observations.dtype == dataset.observation_space.dtype == expected
    assert_steps(episodes[0], log, [0, 1, 2], [0, 1, 2, 2])


def test_a_csv_with_blank_lines_a_byte_order_mark_and_words_for_flags(call, tmp_path):
    log = make_log()
    text = write(tmp_path, log, "csv").read_text().replace(",", ", ").replace("True", "TRUE")
    text = text.replace("\n", "\n\n")
    (tmp_path / "log.csv").write_text(text, encoding="utf-8-sig")
    assert call(tmp_path / "log.csv")[0] == 0
    assert_steps(minari.load_dataset("my/logs-v0")[0], log, [0, 1, 2], [0, 1, 2, 2])


# Spaces and metadata


def test_action_bounds(imported, root):
    log = make_log()
    dataset, episodes, out = imported(log)
    assert dataset.action_space.low.tolist() == [0, -0.5, 0]
    assert dataset.action_space.high.tolist() == np.array([0.7, 0.5, 7 / 3], np.float32).tolist()
    assert all(dataset.action_space.contains(action) for e in episodes for action in e.actions)
    assert dataset.env_spec is None
    assert out.endswith("action bounds: the data's extremes\n")
    minari.delete_dataset("my/logs-v0")
    dataset, _, out = imported(log, "npz", "--action_low", "-1", "--action_high", "1 1 2")
    bounds = dataset.action_space.low.tolist(), dataset.action_space.high.tolist()
    assert bounds == ([-1, -1, -1], [1, 1, 2])
    assert "action bounds: action_low and action_high\n" in out
    assert out.endswith("outside, which training clips: 4.17%\n")  # 7 / 3 > 2, one of 24


def pendulum_log(form: str) -> dict:
    """Two steps of Pendulum-v1, cut."""
    observations = np.array([[1.0, 0.0, 0.5], [0.6, 0.8, 1.5]])
    flags = {"terminations": np.zeros(2, int), "truncations": np.array([0, 1])}
    return {"observations": observations, "actions": np.array([[0.1], [3]]), "rewards": np.array([-1, -2.5]),
            "next_observations": observations[[1, 0]], **flags}


@pytest.mark.parametrize("form", FORMS)
def test_an_environment_gives_spaces_and_types(imported, form):
    dataset, (episode,), out = imported(pendulum_log(form), form, "--environment", "Pendulum-v1")
    env = gym.make("Pendulum-v1")
    assert dataset.env_spec.id == "Pendulum-v1"
    assert (dataset.observation_space, dataset.action_space) == (env.observation_space, env.action_space)
    assert (episode.observations.dtype, episode.actions.dtype) == (np.float32, np.float32)
    assert all(map(env.observation_space.contains, episode.observations))
    assert "action bounds: those of Pendulum-v1\n" in out
    assert "outside, which training clips: 50.00%\n" in out


def test_metadata(imported, tmp_path):
    dataset, episodes, out = imported(make_log(), "csv", "--ref_min", "0", "--ref_max", "20.5")
    metadata, digest = dataset.storage.metadata, hashlib.sha256()
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (0, 20.5)
    content = (tmp_path / "log.csv").read_bytes()
    assert metadata["source"] == {"file": "log.csv", "sha256": hashlib.sha256(content).hexdigest()}
    for e in episodes:
        for array in (e.observations, e.actions, e.rewards, e.terminations, e.truncations):
            digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    assert metadata["content_hash"] == digest.hexdigest()
    assert digest.hexdigest() in out


def test_whole_numbers_are_quantities_if_there_are_bounds_or_vectors(imported):
    log = make_log()
    log["actions"] = np.arange(8)[:, None]
    dataset, _, _ = imported(log, "npz", "--action_low", "0", "--action_high", "9")
    assert dataset.action_space.high == [9]
    minari.delete_dataset("my/logs-v0")
    assert imported(log, "npz", "--choices", "numbers")[0].action_space.high == [7]
    minari.delete_dataset("my/logs-v0")
    log["actions"] = np.repeat(log["actions"], 2, 1)
    assert imported(log)[0].action_space.shape == (2,)


# Choices


def make_table(**columns) -> pd.DataFrame:
    """The log of make_log as a table of one observation, with these columns in place of its own."""
    log = make_log()
    own = {"observation_0": log["observations"][:, 0], "action_0": log["actions"][:, 0]}
    own |= {name: log[f"{name}s"] for name in ("reward", "termination", "truncation")}
    return pd.DataFrame({**own, **columns})


@pytest.fixture
def tabled(call, tmp_path):
    """tabled(table, ...): the table as a .csv, imported: dataset, episodes and what was printed."""

    def run(table: pd.DataFrame, *arguments: str):
        table.to_csv(tmp_path / "log.csv", index=False)
        status, out, err = call(tmp_path / "log.csv", *arguments)
        assert (status, err) == (0, "")
        dataset = minari.load_dataset("my/logs-v0")
        return dataset, list(dataset.iterate_episodes()), out

    return run


def reads(episodes: list, field: str) -> list:
    return np.concatenate([getattr(episode, field) for episode in episodes]).tolist()


@pytest.mark.parametrize(
    ("cells", "names", "numbers"),
    [
        ([*"bbaccbab"], ["a", "b", "c"], [1, 1, 0, 2, 2, 0]),
        ([10, 10, 2, 33, 33, 10, 2, 10], ["2", "10", "33"], [1, 1, 0, 2, 2, 0]),
        ([True, True, False, True, True, True, False, True], ["0", "1"], [1, 1, 0, 1, 1, 0]),
    ],
)
def test_one_column_of_words_or_whole_numbers_is_a_choice(tabled, cells, names, numbers):
    dataset, episodes, out = tabled(make_table(action_0=cells))
    assert dataset.action_space == gym.spaces.Discrete(len(names))
    assert reads(episodes, "actions") == numbers  # rows 5 and 7 are lost
    assert episodes[0].actions.dtype == np.int64
    assert dataset.storage.metadata["action_names"] == names
    assert dataset.storage.metadata["action_columns"] == ["action_0"]
    assert f"{len(names)} choices: {'; '.join(names)}" in out


def test_choices_in_several_columns_are_asked_for(tabled, refused, tmp_path):
    table = make_table(action_0=[*"bbaabbab"]).assign(action_1=[10, 9, 9, 9, 10, 10, 9, 10])
    table.to_csv(tmp_path / "log.csv", index=False)
    line = refused(tmp_path / "log.csv")
    assert "choices in several columns, action_0, action_1; --choices joint" in line
    assert "--choices numbers" not in line  # words are no numbers
    dataset, episodes, _ = tabled(table, "--choices", "joint")
    names = ["action_0=a, action_1=9", "action_0=b, action_1=9", "action_0=b, action_1=10"]
    assert dataset.storage.metadata["action_names"] == names
    assert dataset.storage.metadata["action_columns"] == ["action_0", "action_1"]
    assert reads(episodes, "actions") == [2, 1, 0, 0, 2, 0]
    minari.delete_dataset("my/logs-v0")
    whole = table.assign(action_0=[1, 1, 0, 0, 1, 1, 0, 1])
    dataset, episodes, _ = tabled(whole, "--choices", "numbers")
    assert dataset.action_space.high.tolist() == [1, 10]


def test_combinations_of_many_columns(tabled):
    """70 columns of two choices are 2^70 combinations, more than an int64 tells apart; three occur."""
    rows = np.arange(40)
    bits = {f"action_{i}": (rows % 3 == i % 3).astype(int) for i in range(70)}
    table = pd.DataFrame({"observation_0": rows, **bits, "reward": 1.0, "termination": True})
    table = table.assign(truncation=False)
    dataset, episodes, _ = tabled(table, "--choices", "joint")
    assert dataset.action_space == gym.spaces.Discrete(3)
    assert reads(episodes, "actions") == [2 - row % 3 for row in range(40)]  # sorted: action_2 comes first
    first = dataset.storage.metadata["action_names"][0].split(", ")
    assert first == [f"action_{i}={int(i % 3 == 2)}" for i in range(70)]


def test_too_many_combinations_of_many_columns(refused, tmp_path):
    wide = np.random.default_rng(0).integers(2, size=(101, 70))
    table = pd.DataFrame({"observation_0": np.arange(101), "reward": 1.0, "termination": True})
    table = table.assign(truncation=False, **{f"action_{i}": column for i, column in enumerate(wide.T)})
    table.to_csv(tmp_path / "log.csv", index=False)
    assert "actions are 101 combinations" in refused(tmp_path / "log.csv", "csv", "--choices", "joint")


def test_choices_and_quantities_do_not_mix(refused, tmp_path):
    table = make_table().assign(action_1=[*"bbaabbab"])
    table.to_csv(tmp_path / "log.csv", index=False)
    assert "action_1 holds words, where actions should be numbers" in refused(tmp_path / "log.csv")


def test_a_hundred_combinations_are_a_choice_and_one_more_is_none(tabled, refused, tmp_path):
    rows = np.arange(101)
    table = pd.DataFrame({"observation_0": rows, "action_0": rows // 2, "action_1": rows % 2, "reward": 1.0})
    table = table.assign(termination=True, truncation=False)
    table.to_csv(tmp_path / "log.csv", index=False)
    line = refused(tmp_path / "log.csv", "csv", "--choices", "joint")
    assert "actions are 101 combinations; at most 100 are a choice" in line
    table["action_1"] = table["action_1"].astype(object)
    table.loc[100, "action_1"] = None  # which is no combination
    dataset, _, _ = tabled(table, "--choices", "joint", "--missing", "drop")
    assert dataset.action_space.n == 100


def test_observed_words_become_entries(tabled):
    words = ["night", "day", "day", "late", "late", "night", "day", "night"]
    table = make_table(shift=words).assign(next_shift=[*words[1:], "closed"])
    names = ("--observations", "shift observation_0")
    dataset, episodes, _ = tabled(table, *names)
    titles = ["shift=day", "shift=late", "shift=night", "observation_0"]
    assert dataset.storage.metadata["observation_columns"] == titles
    assert episodes[1].observations[:, :3].tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1]]
    np.testing.assert_array_equal(episodes[1].observations[:, 3], table["observation_0"][3:6])
    minari.delete_dataset("my/logs-v0")
    names = ("--observations", "shift", "--next_observations", "next_shift")  # a word that comes last
    dataset, episodes, _ = tabled(table, *names)
    titles = [f"shift={word}" for word in ("closed", "day", "late", "night")]
    assert dataset.storage.metadata["observation_columns"] == titles
    assert episodes[2].observations.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]


def test_an_environment_with_choices(imported, refused):
    log = make_log()
    log["observations"] = np.ones((8, 4))
    log["actions"] = np.array([0, 1, 1, 0, 1, 0, 0, 2])
    assert "row 7: actions are [2.], where the environment's are Discrete(2)" in refused(
        log, "npz", "--environment", "CartPole-v1"
    )
    log["actions"][:] = 1
    dataset, episodes, _ = imported(log, "npz", "--environment", "CartPole-v1")
    assert (dataset.env_spec.id, dataset.action_space) == ("CartPole-v1", gym.spaces.Discrete(2))
    assert reads(episodes, "actions") == [1] * 6  # the number that it has there, though it is alone
    assert dataset.storage.metadata["action_names"] == ["0", "1"]


@pytest.mark.parametrize("form", FORMS)
def test_names_of_columns_are_in_the_metadata(imported, form):
    metadata = imported(make_log(), form)[0].storage.metadata
    marks = ("[{}]" if form == "npz" else "_{}").format
    observed, done = ("observations", "actions") if form == "npz" else ("observation", "action")
    assert metadata["observation_columns"] == [f"{observed}{marks(i)}" for i in range(2)]
    assert metadata["action_columns"] == [f"{done}{marks(i)}" for i in range(3)]
    assert "action_names" not in metadata


def test_propensities_are_where_the_evaluations_look(tabled):
    likely = np.linspace(0.2, 0.9, 8)
    _, episodes, _ = tabled(make_table(action_0=[*"bbaabbab"], propensity=likely))
    for episode, rows in zip(episodes, ([0, 1, 2], [3, 4], [6]), strict=True):
        np.testing.assert_allclose(episode.infos["propensity"], likely[rows])


# Missing values


def gappy(*holes: tuple[int, str]) -> pd.DataFrame:
    table = make_table().assign(observation_1=np.arange(8.0) * 10)
    for row, name in holes:
        table[name] = table[name].astype(object)
        table.loc[row, name] = None
    return table


def test_missing_values_are_counted_by_column_and_refused(refused, tmp_path):
    holes = [(4, "observation_1"), (7, "observation_1"), (7, "reward"), (6, "truncation")]
    gappy(*holes).to_csv(tmp_path / "log.csv", index=False)
    line = refused(tmp_path / "log.csv")
    assert "row 4 (line 6): observation_1 is missing" in line
    assert "observation_1 2, reward 1, truncation 1" in line
    assert "--missing drop leaves out their episodes, 2 of 3" in line


def test_missing_values_may_leave_out_their_episodes(tabled):
    table = gappy((4, "observation_1"), (6, "reward"))
    _, (episode,), out = tabled(table, "--missing", "drop")
    np.testing.assert_array_equal(episode.rewards, table["reward"][:3].astype(float))
    assert "missing values by column: observation_1 1, reward 1\n" in out
    assert "episodes left out, as a value is missing in them: 2\n" in out


def test_without_a_flag_both_episodes_that_it_may_part_are_left_out(tabled):
    _, (episode,), _ = tabled(gappy((2, "termination")), "--missing", "drop")
    np.testing.assert_array_equal(episode.observations[:, 1], [60, 70])


def test_missing_observations_may_be_carried_on(tabled):
    """Not across episodes, and neither actions nor rewards: rows 3 and 6 have nothing to stand for them."""
    table = gappy((1, "observation_1"), (2, "observation_1"), (3, "observation_1"), (6, "action_0"))
    _, (episode,), out = tabled(table, "--missing", "carry")
    assert episode.observations[:, 1].tolist() == [0, 0, 0, 0]
    assert "rows mended by what was last observed in their episodes: 2\n" in out
    assert "episodes left out, as a value is missing in them: 2\n" in out


def test_what_was_seen_after_a_step_stands_for_what_is_seen_before_the_next(imported):
    log = make_log()
    log["next_observations"] = np.append(log["observations"][1:], [[80.0, 81.0]], 0)
    whole = log["observations"].copy(), log["next_observations"].copy()
    log["observations"][1] = log["next_observations"][3] = np.nan  # the other one is known
    log["observations"][7] = log["next_observations"][6] = np.nan  # neither is
    log["next_observations"][7] = np.nan  # of a truncated row, which is lost
    _, episodes, _ = imported(log, "npz", "--missing", "carry")
    np.testing.assert_array_equal(episodes[0].observations[:3], whole[0][:3])
    np.testing.assert_array_equal(episodes[1].observations[:3], whole[0][3:6])
    np.testing.assert_array_equal(episodes[2].observations, whole[0][[6, 6]])


def test_what_another_episode_saw_last_stands_for_nothing(imported):
    log = make_log()
    log["next_observations"] = np.append(log["observations"][1:], [[80.0, 81.0]], 0)
    log["observations"][3] = np.nan  # the first of the second episode
    _, episodes, out = imported(log, "npz", "--missing", "carry")
    assert [len(episode.rewards) for episode in episodes] == [3, 2]
    assert "episodes left out, as a value is missing in them: 1\n" in out


@pytest.mark.parametrize("missing", ["drop", "carry"])
@pytest.mark.parametrize("column", ["observation_1", "action_0", "reward"])
def test_where_every_row_lacks_a_value_no_episode_is_left(refused, tmp_path, column, missing):
    gappy(*((row, column) for row in range(8))).to_csv(tmp_path / "log.csv", index=False)
    line = refused(tmp_path / "log.csv", "csv", "--missing", missing)
    assert f"no episode is left: a value is missing in every row ({column} 8)" in line


def test_the_last_row_of_an_episode_may_hold_what_was_observed_alone(tabled):
    """(2): a truncated one loses that step anyway, and nothing else; one that terminated lacks its action."""
    table = gappy((5, "action_0"), (5, "reward"), (7, "action_0"))
    _, episodes, out = tabled(table)
    seen = [episode.observations[:, 1].tolist() for episode in episodes]
    assert seen == [[0, 10, 20, 20], [30, 40, 50], [60, 70]]
    assert "missing" not in out
    minari.delete_dataset("my/logs-v0")
    _, episodes, _ = tabled(gappy((2, "action_0")), "--missing", "drop")
    assert [episode.observations[0, 1] for episode in episodes] == [30, 60]


def test_what_was_seen_after_a_truncation_is_not_made_up(imported):
    """As a table shifted within its episodes lacks it: the step is lost, as without next observations."""
    log = make_log()
    following = log["observations"][[1, 2, 2, 4, 5, 5, 7, 7]]
    following[[2, 5, 7]] = np.nan
    log["next_observations"] = following
    _, episodes, out = imported(log, "csv", "--missing", "carry")
    assert_steps(episodes[0], log, [0, 1, 2], [0, 1, 2, 2])
    assert_steps(episodes[1], log, [3, 4], [3, 4, 5])
    assert_steps(episodes[2], log, [6], [6, 7])
    assert "its next observation is unknown: 2\n" in out


def test_none_is_a_word_and_an_empty_one_is_missing(tabled, refused, tmp_path):
    """No treatment is a treatment; a cell of blanks is an empty cell, in a .parquet too."""
    table = make_table(action_0=[*"aa", "None", *"aaa", "None", "a"])
    dataset, episodes, _ = tabled(table)
    assert dataset.storage.metadata["action_names"] == ["None", "a"]
    assert reads(episodes, "actions") == [1, 1, 0, 1, 1, 0]
    minari.delete_dataset("my/logs-v0")
    minari.namespace.delete_namespace("my")
    make_table(action_0=[*"aab", " ", *"bbab"]).to_parquet(tmp_path / "log.parquet")
    assert "row 3: action_0 is missing" in refused(tmp_path / "log.parquet")


@pytest.mark.parametrize("cells", [("0,5", "0,25"), ("5%", "7.5%")])
def test_numbers_as_other_countries_write_them_are_no_words(refused, tmp_path, cells):
    make_table(observation_1=[*cells] * 4).to_csv(tmp_path / "log.csv", index=False)
    problem = f"row 0 (line 2): observation_1 is {cells[0]}, a number with a comma or per cent"
    assert problem in refused(tmp_path / "log.csv")


def test_joint_choices_must_be_choices(refused, tmp_path):
    make_table(action_1=[0, 1] * 4).to_csv(tmp_path / "log.csv", index=False)
    problem = "--choices joint: action_0 are no choices but quantities"
    assert problem in refused(tmp_path / "log.csv", "csv", "--choices", "joint")


def test_ids_of_a_table_are_its_text(tabled):
    """As numbers 1.1 and 1.10 are the same."""
    ids = ["1.1"] * 3 + ["1.10"] * 3 + ["01"] + ["1 "]
    table = make_table(episode_id=ids, termination=0, truncation=0)
    _, episodes, _ = tabled(table)
    assert [len(episode.rewards) for episode in episodes] == [2, 2]  # the last two lost their only step


def test_a_likelihood_is_a_probability(refused, tmp_path):
    for wrong in (0.0, -1.0, 2.0):
        log = make_log() | {"propensities": np.where(np.arange(8) == 4, wrong, 0.5)}
        assert f"row 4: propensities is {wrong:g}, no probability above 0" in refused(log)


def test_time_alone_does_not_go_back(tabled, refused, tmp_path):
    """A clock that begins anew with every episode says nothing of how episodes follow each other."""
    table = make_table(timestamp=[0, 1, 2, 0, 1, 2, 0, 1])
    table.to_csv(tmp_path / "log.csv", index=False)
    assert "row 2 (line 4): time goes back in the next row" in refused(tmp_path / "log.csv")
    _, episodes, _ = tabled(table, "--timestamps", "none")
    assert [len(episode.rewards) for episode in episodes] == [3, 2, 1]


def test_a_later_log_has_the_numbers_of_an_earlier_one(tabled, call, tmp_path):
    """Words that it lacks keep their entries, choices that it lacks their numbers; nothing is new."""
    first = make_table(observation_1=[*"abcabcab"], action_0=["left", "right", "up", "left"] * 2)
    earlier, _, _ = tabled(first)
    later = make_table(observation_1=[*"ccbbccbb"], action_0=["up", "right"] * 4)
    later.to_csv(tmp_path / "log.csv", index=False)
    words = (tmp_path / "log.csv", "--dataset", "my/later-v0", "--like", "my/logs-v0")
    assert call(*words)[0] == 0
    dataset = minari.load_dataset("my/later-v0")
    for name in ("observation_columns", "action_names"):
        assert dataset.storage.metadata[name] == earlier.storage.metadata[name]
    episodes = list(dataset.iterate_episodes())
    assert episodes[0].observations[:, 1:].tolist() == [[0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 1, 0]]
    assert episodes[0].actions.tolist() == [2, 1, 2]
    assert dataset.action_space == earlier.action_space
    minari.delete_dataset("my/later-v0")
    for change, said in (
        ({"action_0": [*["up"] * 4, "down", *["up"] * 3]}, "row 4 (line 6): the action is down, which the"),
        ({"observation_1": [*"cccccdcc"]}, "row 5 (line 7): observation_1 is d, which the"),
        ({"observation_1": 0.5}, "columns are ['observation_0', 'observation_1'], those of my/logs-v0"),
    ):
        later.assign(**change).to_csv(tmp_path / "log.csv", index=False)
        status, _, err = call(*words)
        assert (status, err.count("\n")) == (2, 1)
        assert said in err


def test_next_observations_of_a_later_log_have_its_words_too(tabled, call, tmp_path):
    """They go by another name, and mean the same."""
    names = ("--observations", "shift", "--next_observations", "next_shift")
    shifts = {"shift": [*"xyzxyzxy"], "next_shift": [*"yzzyzzyy"]}
    tabled(make_table(**shifts), *names)
    later = make_table(shift=["z"] * 8, next_shift=["z"] * 8, action_0=np.linspace(0.2, 0.9, 8))
    later.to_csv(tmp_path / "log.csv", index=False)
    words = (tmp_path / "log.csv", *names, "--dataset", "my/later-v0", "--like", "my/logs-v0")
    assert call(*words)[0] == 0
    dataset = minari.load_dataset("my/later-v0")
    assert dataset.storage.metadata["observation_columns"] == ["shift=x", "shift=y", "shift=z"]
    assert {tuple(row) for row in next(dataset.iterate_episodes()).observations.tolist()} == {(0, 0, 1)}
    minari.delete_dataset("my/later-v0")
    later.assign(next_shift=[*"zzzzwzzz"]).to_csv(tmp_path / "log.csv", index=False)
    assert "row 4 (line 6): next_shift is w, which the earlier import has not" in call(*words)[2]


def test_what_this_script_did_not_import_names_no_columns(pendulum, tmp_path):
    make_table().to_csv(tmp_path / "log.csv", index=False)
    words = [f"--file={tmp_path / 'log.csv'}", f"--like={pendulum}", "--dataset=my/later-v0"]
    with pytest.raises(from_arrays.UserError, match=f"like: {pendulum} was not imported by this script"):
        from_arrays.import_log(from_arrays.parse_config(words))


def test_a_later_log_has_the_bounds_of_an_earlier_one(tabled, call, tmp_path):
    earlier, _, _ = tabled(make_table())
    make_table(action_0=np.linspace(0.2, 0.9, 8)).to_csv(tmp_path / "log.csv", index=False)
    words = (tmp_path / "log.csv", "--dataset", "my/later-v0", "--like")
    status, out, _ = call(*words, "my/logs-v0")
    assert status == 0
    assert "action bounds: those of my/logs-v0" in out
    assert "action entries outside, which training clips: 25.00%" in out
    assert minari.load_dataset("my/later-v0").action_space == earlier.action_space
    minari.delete_dataset("my/later-v0")
    assert "like: cannot load my/none-v0" in call(*words, "my/none-v0")[2]
    assert "like: the earlier import settles" in call(*words, "my/logs-v0", "--action_low", "0")[2]


def test_missing_words_and_choices(tabled):
    table = make_table(action_0=[*"bbaabb", None, "a"], shift=["x", None, "y", "x", "y", "x", "y", "y"])
    names = ("--observations", "shift", "--missing", "carry")
    dataset, episodes, _ = tabled(table, *names)
    assert len(episodes) == 2  # row 6 has no action
    assert episodes[0].observations.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert dataset.storage.metadata["action_names"] == ["a", "b"]
    minari.delete_dataset("my/logs-v0")
    _, episodes, _ = tabled(table, "--observations", "shift", "--missing", "drop")
    assert reads(episodes, "actions") == [0, 1]  # a and b keep their numbers


# Time


def timed() -> pd.DataFrame:
    """Episode 1 begins before episode 0 and lies between its rows; rows are shuffled."""
    table = make_table(episode_id=[0, 0, 0, 1, 1, 1, 1, 1], timestamp=[50, 60, 70, 0, 10, 20, 60, 65])
    table["truncation"] = False
    return table.iloc[[6, 0, 3, 2, 7, 1, 5, 4]]


def test_times_and_ids_put_rows_in_order(tabled):
    for table in (timed(), timed().iloc[[*range(1, 8), 0]]):  # first a row of episode 1, or of episode 0
        _, episodes, out = tabled(table)
        minari.delete_dataset("my/logs-v0")
        assert [episode.rewards.tolist() for episode in episodes] == [[3.5, 4.5, 5.5, 6.5], [0.5, 1.5, 2.5]]
        assert [episode.terminations[-1] for episode in episodes] == [False, True]
    assert "gaps in time, steps of up to 40 where 10 is usual, kept as they are" in out


def test_gaps_may_cut_episodes(tabled):
    _, episodes, out = tabled(timed(), "--gaps", "cut")
    assert [episode.rewards.tolist() for episode in episodes] == [[3.5, 4.5], [6.5], [0.5, 1.5, 2.5]]
    assert "each the end of an episode now: 1\n" in out
    assert [episode.truncations[-1] for episode in episodes] == [True, True, False]


def test_a_cut_is_no_lost_termination(tabled):
    """Its row has the flag of a truncation, and is not counted as an end without one."""
    table = make_table(observation_0=np.arange(8), timestamp=[0, 10, 20, 0, 10, 90, 100, 110])
    table = table.assign(episode_id=[0, 0, 0, 1, 1, 1, 1, 1], truncation=[False] * 7 + [True])
    _, episodes, out = tabled(table, "--gaps", "cut")
    assert [len(episode.rewards) for episode in episodes] == [3, 1, 2]
    assert "each the end of an episode now: 1\n" in out
    assert "WARNING" not in out
    assert "without a flag" not in out


def test_a_cut_does_not_make_up_a_flag_that_is_missing(refused, tmp_path):
    table = make_table(timestamp=[0, 10, 20, 0, 10, 90, 100, 110], episode_id=[0, 0, 0, 1, 1, 1, 1, 1])
    table = table.assign(truncation=[False] * 4 + [None] + [False] * 3)
    table.to_csv(tmp_path / "log.csv", index=False)
    assert "truncation is missing" in refused(tmp_path / "log.csv", "csv", "--gaps", "cut")


def test_times_may_be_dates(tabled):
    table = timed()
    dates = pd.Timestamp("2026-03-28 23:00:00+01:00") + pd.to_timedelta(table["timestamp"], "min")
    table["timestamp"] = dates.map(lambda date: date.isoformat())
    _, episodes, out = tabled(table)
    assert [episode.rewards.tolist() for episode in episodes] == [[3.5, 4.5, 5.5, 6.5], [0.5, 1.5, 2.5]]
    assert "steps of up to 2400 where 600 is usual" in out  # seconds


def test_times_without_gaps_are_said_so(tabled):
    table = make_table(timestamp=np.arange(8) * 2)
    assert "time of a step: 2, and no gaps\n" in tabled(table)[2]


@pytest.mark.parametrize(
    ("time", "words"),
    [
        (60, "row 0 (line 2): the next row of its episode has the same time"),
        ("soon", "row 3 (line 5): timestamp is soon, not a number"),
        ("", "row 3 (line 5): timestamp is nan, neither a number nor a date"),
    ],
)
def test_times_that_do_not_fit(refused, tmp_path, time, words):
    """The last row of episode 0, which is row 3 of the file, the one before it row 0."""
    table = make_table(episode_id=[0, 0, 0, 1, 1, 1, 1, 1], timestamp=[50, 60, 70, 0, 10, 20, 60, 65])
    table = table.assign(truncation=False, timestamp=table["timestamp"].astype(object))
    table.loc[2, "timestamp"] = time
    table.iloc[[1, 0, 3, 2, 4, 5, 6, 7]].to_csv(tmp_path / "log.csv", index=False)
    assert words in refused(tmp_path / "log.csv")


# Ends, rewards, a part held out


def test_a_lost_termination_is_warned_of(tabled):
    table = make_table(termination=False, episode_id=[0, 0, 0, 1, 1, 2, 2, 2]).assign(truncation=False)
    assert "WARNING: no episode terminates" in tabled(table)[2]
    minari.delete_dataset("my/logs-v0")
    table.loc[2, "termination"] = True
    assert "WARNING: 1 of 3 episodes end without a flag and before the longest one" in tabled(table)[2]
    minari.delete_dataset("my/logs-v0")
    table.loc[4, "truncation"] = True
    assert "WARNING" not in tabled(table)[2]


def test_a_log_without_rewards_or_terminations(tabled):
    table = make_table().drop(columns=["reward", "termination"])
    _, episodes, out = tabled(table, "--rewards", "none", "--terminations", "none")
    assert reads(episodes, "rewards") == [0] * 6
    assert not any(reads(episodes, "terminations"))
    assert "WARNING: no episode terminates" in out


def many() -> pd.DataFrame:
    rows = np.arange(60)
    table = pd.DataFrame({"observation_0": rows, "action_0": rows / 7, "reward": rows})
    return table.assign(termination=rows % 3 == 2, truncation=False)


def test_a_share_of_the_episodes_is_held_out(tabled):
    dataset, episodes, out = tabled(many(), "--heldout", "0.25", "--seed", "3")
    other = minari.load_dataset("my/logs-heldout-v0")
    held = list(other.iterate_episodes())
    assert (len(episodes), len(held)) == (15, 5)
    assert sorted(reads(episodes, "rewards") + reads(held, "rewards")) == list(range(60))
    for part in (episodes, held):
        assert reads(part, "rewards") == sorted(reads(part, "rewards"))  # in the order of the log
    assert reads(held, "rewards") != list(range(45, 60))  # drawn, not the last
    assert dataset.action_space == other.action_space
    assert "my/logs-heldout-v0: 15 steps in 5 episodes" in out
    for metadata in (dataset.storage.metadata, other.storage.metadata):
        wanted = {"share": 0.25, "seed": 3, "datasets": ["my/logs-v0", "my/logs-heldout-v0"]}
        assert metadata["heldout"] == wanted
        assert metadata["observation_columns"] == ["observation_0"]
    first = reads(held, "rewards")
    for seed, same in ((3, True), (4, False)):
        minari.delete_dataset("my/logs-v0")
        minari.delete_dataset("my/logs-heldout-v0")
        tabled(many(), "--heldout", "0.25", "--seed", f"{seed}")
        held = list(minari.load_dataset("my/logs-heldout-v0").iterate_episodes())
        assert (reads(held, "rewards") == first) == same


def test_both_parts_are_written_or_none(call, root, tmp_path, monkeypatch):
    many().to_csv(tmp_path / "log.csv", index=False)
    true, calls = from_arrays.content_hash, []

    def full(dataset):
        calls.append(dataset)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return true(dataset)

    monkeypatch.setattr(from_arrays, "content_hash", full)
    status, _, err = call(tmp_path / "log.csv", "--heldout", "0.25")
    assert (status, "No space left" in err) == (2, True)
    assert list(root.rglob("*.hdf5")) == []


# What it refuses


def change(field: str, row, value, dtype=None):
    """A fault: this entry of this field is something else."""

    def apply(log):
        log[field] = log[field].astype(dtype or log[field].dtype)
        log[field][row] = value

    return apply


def ids(*values):
    return lambda log: log.update(episode_ids=np.array(values))


def follow(row, value):
    """A fault: next_observations that fit, but for this one."""

    def apply(log):
        log["next_observations"] = np.append(log["observations"][1:], [[80.0, 81.0]], 0)
        log["next_observations"][row] = value

    return apply


ROWS = {  # fault, row, words
    "nan": (change("observations", (4, 1), np.nan), 4, "is missing (in all rows: "),
    "inf": (change("rewards", 7, np.inf), 7, "reward"),
    "too large for float32": (change("actions", (3, 2), 1e39), 3, "1e+39"),
    "flag": (change("terminations", 6, 2, int), 6, "2, neither 0 nor 1"),
    "fraction": (change("truncations", 1, 0.5, float), 1, "0.5, neither 0 nor 1"),
    "id comes back": (ids(0, 0, 0, 1, 1, 1, 0, 0), 6, "episode_id 0 comes back"),
    "id goes on": (ids(0, 0, 0, 0, 1, 1, 2, 2), 2, "episode 0 goes on in the next row"),
    "no id": (ids(0, 0, 0, 1, 1, 1, np.nan, 2), 6, "no episode_id"),
    "shuffled": (follow((3, 1), 9.0), 3, "9.0, but the next row of the episode observes -4.2"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_named(refused, form, name):
    fault, row, words = ROWS[name]
    log = make_log()
    fault(log)
    line = refused(log, form)
    assert f"log.{form}, row {row}" + f" (line {row + 2})" * (form == "csv") + ": " in line
    assert words in line


@pytest.mark.parametrize(
    ("column", "cell", "words"),
    [
        ("observation_1", "abc", "observation_1 is abc"),
        ("observation_1", "", "observation_1 is missing"),
        ("observation_1", "=SUM(B2:B4)", "observation_1 is the formula =SUM(B2:B4), not a number"),
        ("action_2", "1;5", "action_2 is 1;5"),
        ("reward", "inf", "reward is inf"),
        ("termination", "maybe", "termination is maybe"),
        ("truncation", "", "truncation is missing"),
    ],
)
def test_a_bad_cell_of_a_csv_is_named(refused, tmp_path, column, cell, words):
    table = pd.read_csv(write(tmp_path, make_log(), "csv"), dtype=str)
    table.loc[5, column] = cell
    text = table.to_csv(index=False).replace("\n", "\n\n", 3)  # rows 3 and later are three lines further down
    (tmp_path / "log.csv").write_text(text)
    line = refused(tmp_path / "log.csv")
    assert f"log.csv, row 5 (line 10): {words}" in line


def test_the_entry_of_an_array_is_named(refused):
    log = make_log()
    log["observations"][6, 1] = -np.inf
    assert "row 6: observations[1] is -inf" in refused(log)


def test_vectors_of_unequal_length_in_a_parquet(refused, tmp_path):
    log = {name: [*array] for name, array in make_log().items()}
    log["observations"][4] = np.zeros(3)
    pd.DataFrame(log).to_parquet(tmp_path / "log.parquet")
    assert "row 4: observations has 3 entries, row 0 has 2" in refused(tmp_path / "log.parquet")
    log["observations"] = [*np.ones((7, 1)), None]
    pd.DataFrame(log).to_parquet(tmp_path / "log.parquet")
    assert "row 7: observations has 0 entries, row 0 has 1" in refused(tmp_path / "log.parquet")


def put(**arrays):
    """A fault: these fields are functions of what they were, or of the observations if there were none."""
    return lambda log: log.update(
        {name: new(log.get(name, log["observations"])) for name, new in arrays.items()}
    )


def rename(old: str, new: str):
    return lambda log: log.update({new: log.pop(old)})


def add(new: str, old: str):
    return lambda log: log.update({new: log[old]})


ARRAYS = {  # fault, words
    "short observations": (put(observations=lambda x: x[:7]), "actions has 8 rows, but observations has 7"),
    "short rewards": (put(rewards=lambda x: x[:7]), "rewards has 7 rows"),
    "images": (put(observations=lambda x: x.reshape(8, 2, 1)), "observations has shape (8, 2, 1)"),
    "no entries": (put(actions=lambda x: x[:, :0]), "actions has shape (8, 0)"),
    "words": (put(rewards=lambda _: np.array(["a"] * 8)), "rewards holds <U1, not numbers"),
    "complex": (put(rewards=lambda x: x + 1j), "rewards holds complex128"),
    "pickled": (put(rewards=lambda _: np.array([{}] * 8)), "rewards cannot be read"),
    "one number": (put(rewards=lambda x: x[0]), "rewards cannot be read"),
    "two rewards": (put(rewards=lambda x: np.stack([x, x], 1)), "rewards has 2 entries in a row, not one"),
    "wide ids": (put(episode_ids=lambda x: x), "episode_ids have shape (8, 2)"),
    "no terminations": (lambda log: log.pop("terminations"), "no terminations among observations, actions"),
    "no end at all": (lambda log: log.pop("truncations"), "no truncations among"),
    "two names": (add("timeouts", "truncations"), "choose the truncations among truncations, timeouts"),
    "Dict and vector": (add("observations/a", "observations"), "choose the observations among"),
    "deep Dict": (rename("observations", "observations/a/b"), "observations/a/b"),
    "next shapes": (put(next_observations=lambda x: x[:, :1]), "next_observations {'': (8, 1)}"),
    "no rows": (lambda log: log.update({name: array[:0] for name, array in log.items()}), "no rows"),
    "nothing left": (put(terminations=np.zeros_like, truncations=np.ones_like), "no step is left"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_do_not_fit(refused, name):
    fault, words = ARRAYS[name]
    log = make_log()
    fault(log)
    assert words in refused(log)


HEADER = "observation_0,action_0,reward,termination,truncation\n"
TEXTS = {
    "empty file": ("", "No columns"),
    "header alone": (HEADER, "no rows"),
    "long row": (HEADER + "0.5,0.5,1,0,0\n0.5,0.5,1,0,0,7\n", "line 3"),
    "long rows": (HEADER + "0,5,0.5,1,0,0\n", "Length of header"),
    "short row": (HEADER + "0.5,0.5,1,0,0\n0.5,0.5,1,0\n", "line 3 has 4 cells, the header 5"),
    "no header": ("0.5,0.4,1,0,2\n", "no observations"),
    "twice": (HEADER.replace("action_0", "reward") + "0.5,0.5,1,0,0\n", "the header, has reward twice"),
    "gap": ("observation_2," + HEADER + "1,1,.5,1,0,0\n", "choose the observations"),
    "late": (HEADER.replace("n_0", "n_5", 1) + "1,.5,1,0,0\n", "choose the observations"),
    "not text": (b"\xff\xfe\x00", "cannot be read as UTF-8"),
    "another encoding": (HEADER.replace("n_0", "n_\xe4", 1).encode("latin-1"), "save it as UTF-8, or: iconv"),
    "semicolons": (HEADER.replace(",", ";"), "parted by semicolons"),
    "formulas": (HEADER + "1,=cmd|a,1,0,0\n1,b,1,0,0\n", "row 0 (line 2): action_0 is the formula =cmd|a"),
    "decimal commas": (HEADER + "".join(f'1,"{i},5",1,0,0\n' for i in range(101)), "101 different words"),
    "a date": (HEADER + "2026-01-01,1,1,0,0\n2,1,1,0,0\n", "observation_0 is 2026-01-01, not a number"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_tables_that_do_not_fit(refused, tmp_path, name):
    text, words = TEXTS[name]
    (tmp_path / "log.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert words in refused(tmp_path / "log.csv")


@pytest.mark.parametrize("form", FORMS)
def test_files_that_cannot_be_read(refused, tmp_path, form):
    assert f"there is no {tmp_path}/none.{form}" in refused(tmp_path / f"none.{form}")
    whole = write(tmp_path, make_log(), form).read_bytes()
    (tmp_path / f"log.{form}").write_bytes(whole[: len(whole) // 2] if form != "csv" else b"\x00\x80" * 9)
    assert f"log.{form}: cannot be read" in refused(tmp_path / f"log.{form}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dataset", "logs-v0"), "my/logs-v0"),
        (("--dataset", "m/logs-v0"), "at least two letters"),
        (("--dataset", "my/logs"), "and a version"),
        (("--dataset", "../logs-v0"), "namespace"),
        (("--file", "log.mat"), ".npz, .csv, .parquet"),
        (("--observation", "x"), "did you mean observations?"),
        (("--observations", "x y"), "no column"),
        (("--observations", "'x"), "cannot read the config"),
        (("--observations", "['x y', z]"), "no column"),
        (("--rewards", "rewards observations"), "rewards: one column"),
        (("--action_low", "0"), "None"),
        (("--action_low", "0 0", "--action_high", "1"), "one number each or 3"),
        (("--action_low", "0", "--action_high", "0"), "the low below the high"),
        (("--action_low", "a", "--action_high", "inf"), "one number each or 3"),
        (("--ref_min", "0"), "give both"),
        (("--ref_min", "1", "--ref_max", "0"), "the smaller first"),
        (("--environment", "Pendulum-v1", "--action_low", "0"), "leave them out"),
        (("--environment", "Pendulum-v1"), "(2,) and actions (3,), but Pendulum-v1 has observations (3,)"),
        (("--environment", "CartPole-v1"), "the environment's are Discrete(2)"),
        (("--missing", "mend"), "missing: 'mend' is not refuse or drop or carry"),
        (("--gaps", "fill"), "gaps: 'fill' is not keep or cut"),
        (("--choices", "all"), "choices: 'all' is not joint or numbers"),
        (("--heldout", "0.1"), "0.1 of 3 episodes leaves one part empty"),
        (("--heldout", "1.5"), "heldout"),
        (("--environment", "Nowhere-v1"), "cannot make Nowhere-v1"),
    ],
)
def test_bad_arguments(refused, arguments, words):
    assert words in refused(make_log(), "npz", *arguments)


# What it leaves on the disk


def test_a_maze_leaves_no_temporary_files(imported, tmp_path, monkeypatch):
    """Gymnasium-robotics writes one in the folder for temporary files, and leaves it there."""
    log = {name: array for name, array in make_log().items() if name != "observations"}
    log["actions"] = log["actions"][:, :2]
    keys = {"achieved_goal": 2, "desired_goal": 2, "observation": 4}
    log |= {f"observations/{key}": np.zeros((8, size)) for key, size in keys.items()}
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    dataset, _, _ = imported(log, "npz", "--environment", "PointMaze_UMaze-v3")
    assert list((tmp_path / "scratch").iterdir()) == []
    dataset.recover_environment()
    assert len(list((tmp_path / "scratch").iterdir())) == 1


def test_an_id_that_is_there_is_refused_with_the_way_out(imported, call, tmp_path):
    before = imported(make_log())[0].storage.metadata
    status, out, err = call(tmp_path / "log.npz")
    assert (status, out) == (2, "")
    assert "my/logs-v0 is there: minari delete my/logs-v0" in err
    assert minari.load_dataset("my/logs-v0").storage.metadata == before


def test_a_full_disk_leaves_nothing(refused, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(from_arrays, "content_hash", full)  # by then the data are written
    assert "No space left on device" in refused(make_log())


def test_the_command_line(root, tmp_path):
    write(tmp_path, make_log(), "csv")
    words = [sys.executable, str(SCRIPT), "--file", "log.csv", "--dataset", "my/nested/logs-v0"]
    options = {"cwd": tmp_path, "env": os.environ, "capture_output": True, "text": True}
    done = subprocess.run(words, check=False, **options)
    assert (done.returncode, done.stderr) == (0, "")
    assert minari.load_dataset("my/nested/logs-v0").total_steps == 6
    assert {path.name for path in root.iterdir()} == {"my"}
    done = subprocess.run(words, check=False, **options)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
