"""tools/calibration.py: what it measures, against formulas; what it says of runs, and what it draws."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import calibration
import minari
import numpy as np
import pytest
import torch
from conftest import load_script

pytest.register_assert_rewrite("runs")
from runs import place, record, rewrite, small  # noqa: E402

NAMES = ("mopo", "combo", "morel")
mopo = load_script("offline/mopo.py")


@pytest.fixture(scope="module")
def scripts() -> dict:
    """Those that are trained here: to load all takes seconds."""
    return {name: load_script(f"offline/{name}.py") for name in (*NAMES, "bc")}


@pytest.fixture(scope="module")
def trained(scripts, pendulum, tmp_path_factory) -> Path:
    """An output folder with a run of each."""
    folder = tmp_path_factory.mktemp("trained")
    for script in scripts.values():
        script.train(script.parse_config(small(script, pendulum, folder)))
    return folder


@pytest.fixture
def run(capsys):
    """run(FOLDER, "--output", FILE) is the command line: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return calibration.main([*map(str, arguments)]), *capsys.readouterr()

    return run


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    """5,000 steps of a state that moves at random, twice as far where it is positive; rewards are 3."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=5000)
    after = states + rng.normal(size=5000) * np.where(states > 0, 2, 1)
    columns = {"observations": states[:, None], "next_observations": after[:, None]}
    columns |= {"actions": np.zeros((5000, 1)), "rewards": np.full(5000, 3.0)}
    return {name: torch.tensor(column, dtype=torch.float32) for name, column in columns.items()}


def model_of(means: list[float], sizes: list[float], elites: list[int]):
    """Members that say `means` of the change, and deviations that are `sizes` times the true ones."""

    def answer(observations, actions):
        true = torch.where(observations > 0, 2.0, 1.0).expand(-1, 2)
        mean = torch.tensor(means)[:, None, None].expand(-1, *true.shape)
        return mean, 2 * (torch.tensor(sizes)[:, None, None] * true).log()

    class Model:
        def __call__(self, observations, actions):
            return answer(observations, actions)

        def targets(self, batch):
            return mopo.DynamicsEnsemble.targets(self, batch)

    model = Model()
    model.elites = torch.tensor(elites)
    return model


def test_expected_errors_are_those_of_the_elites_mixture(rows):
    """Variances, and how far the means are apart; the third member is no elite. A constant has no scale."""
    model = model_of([0.0, 4.0, 100.0], [1.0, 3.0, 50.0], [0, 1])
    expected, actual = calibration.expectations(mopo, model, rows)
    held_out = mopo.split_rows(5000)[0]
    states = rows["observations"].numpy()[held_out, 0]
    change = (rows["next_observations"] - rows["observations"]).numpy()[:, 0]
    true = np.where(states > 0, 2, 1)
    scale = change.std(ddof=1)
    assert expected.shape == actual.shape == (1000, 1)  # the reward is always 3
    np.testing.assert_allclose(expected[:, 0] * scale, np.sqrt((1 + 9) / 2 * true**2 + 4), rtol=1e-4)
    np.testing.assert_allclose(actual[:, 0] * scale, np.abs(change[held_out] - 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "low", "high"), [(1.0, 0.9, 1.1), (0.5, 1.8, 2.2), (2.0, 0.45, 0.55)])
def test_a_model_that_is_too_sure_of_itself_lies_above_the_diagonal(rows, size, low, high):
    expected, actual = calibration.binned(*(
        values.ravel() for values in calibration.expectations(mopo, model_of([0.0], [size], [0]), rows)
    ))
    assert len(expected) == calibration.BINS
    assert expected == sorted(expected)
    assert expected[-1] == pytest.approx(2 * expected[0], rel=1e-4)
    ratios = np.array(actual) / expected
    assert low < ratios.mean() < high


def test_bins_hold_roots_of_mean_squares():
    """The rows of the least expectations first; fewer rows than bins are one each."""
    expected, actual = np.array([3.0, 1.0, 2.0]), np.array([5.0, 7.0, 6.0])
    assert calibration.binned(expected, actual) == ([1.0, 2.0, 3.0], [7.0, 6.0, 5.0])
    many = np.repeat([1.0, 2.0], 50)
    found = calibration.binned(many, np.tile([3.0, 4.0], 50))
    np.testing.assert_allclose(found, [[1] * 5 + [2] * 5, [12.5**0.5] * 10])


def test_what_is_unexplained_is_measured_against_standing_still(rows):
    """Half of each change is known, which leaves a quarter of its square. A constant reward has none."""
    rows["next_observations"] = -rows["observations"]

    class Model:
        elites = slice(None)

        def __call__(self, observations, actions):
            return torch.cat([-observations, torch.full_like(observations, 2.5)], 1)[None], None

    table = calibration.errors_of(mopo, Model(), rows, ["place", "reward"])
    states = rows["observations"][mopo.split_rows(5000)[0]].numpy()
    assert list(table.columns) == ["Error, 1 step", "Unexplained, 1 step"]  # no segment has five steps
    assert table.loc["place"].tolist() == pytest.approx([np.sqrt(np.mean(states**2)), 0.25], rel=1e-4)
    assert table.loc["reward", "Error, 1 step"] == pytest.approx(0.5)
    assert np.isnan(table.loc["reward", "Unexplained, 1 step"])


def test_shares_of_rollouts_that_ended_and_halted():
    """Of two renewals of four; a step within one deviation counts as such, one within two as well."""
    ended, halted = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    rollouts = SimpleNamespace(rows={"terminations": ended, "halted": halted}, blocks=[{}, {}])
    config = SimpleNamespace(rollout_batch=4, rollout_length=7)
    learner = SimpleNamespace(rollouts=rollouts, config=config)
    expected, actual = np.ones((4, 1)), np.array([[0.5], [1.5], [1.9], [3.0]])
    said = calibration.describe(learner, expected, actual, {"data": np.arange(101.0)})
    assert "within the expected deviation: 25%, within two: 75%" in said
    assert "Rollouts that ended within 7 steps: 25.0%" in said
    assert "Rollouts that halted within 7 steps: 12.5%" in said
    assert "| data | 50 | 5 | 50 | 95 |" in said


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_measured_and_drawn(scripts, trained, pendulum, run, tmp_path, name):
    """Its errors are those of its record; doubts are on the record's scale; COMBO has none."""
    folder, output = place(trained, name, pendulum), tmp_path / "out/model.png"
    status, out, err = run(folder, "--output", output)
    assert (status, err) == (0, "")
    assert output.read_bytes().startswith(b"\x89PNG")
    table = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in out.splitlines() if "|" in line}
    errors = record(folder)["model_errors"]
    for number, row in enumerate(("observation 0", "observation 1", "observation 2", "reward")):
        one, five = (errors[f"error_{steps}"][number] ** 0.5 for steps in (1, 5))
        assert [float(table[row][0]), float(table[row][2])] == pytest.approx([one, five], rel=6e-3)
    doubted = {"mopo": "penalty", "morel": "disagreement"}.get(name)
    assert ("data" in table) == ("rollouts" in table) == (doubted is not None)
    assert ("halted" in out) == (name == "morel")
    assert "Rollouts that ended within 5 steps" in out
    if doubted:
        metrics = scripts[name].pd.read_csv(folder / "metrics.csv").iloc[-1]
        for source in ("data", "rollouts"):
            wanted = [metrics[f"model/{doubted}_{source}"], metrics[f"model/{doubted}_{source}_p95"]]
            assert [float(table[source][0]), float(table[source][3])] == pytest.approx(wanted, rel=2e-2)
    assert not list(output.parent.glob("*.new"))


def test_what_cannot_be_measured_is_one_line(trained, pendulum, run, tmp_path):
    runs = shutil.copytree(trained, tmp_path / "runs")
    folder = place(runs, "mopo", pendulum)

    def refused(*arguments) -> str:
        status, _, err = run(*arguments)
        assert (status, err.count("\n")) == (2, 1)
        assert not list(runs.rglob("calibration*"))
        return err

    assert "ends in none of" in refused(folder, "--output", folder / "calibration.gif")
    assert "has no model of the world" in refused(place(runs, "bc", pendulum))
    assert "is not where a script puts its runs" in refused(tmp_path)
    rewrite(folder, dataset_hash="another")
    assert "is not the data that" in refused(folder)
    checkpoint = torch.load(folder / "checkpoint.pt")
    torch.save(checkpoint | {"updates": 0}, folder / "checkpoint.pt")
    assert "is not fitted yet" in refused(folder)
    (folder / "checkpoint.pt").write_bytes(b"?")
    assert "cannot read" in refused(folder)
    assert minari.load_dataset(pendulum).total_episodes == 10  # untouched
