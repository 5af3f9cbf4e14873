"""tools/export.py: every script's policy as ONNX answers as `act` does, or is refused in one line."""

import importlib
import json
import re
import runpy
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import OFFLINE, ROOT, learner_class, load_script, new_learner, short

sys.path.insert(0, str(ROOT / "tools"))
export = importlib.import_module("export")
sys.path.pop(0)

REFUSED = {"fql": "noise", "idql": "noise", "diffusion_ql": "noise"}
REFUSED |= dict.fromkeys(
    ("dt", "diffuser", "diffusion_policy", "q_chunking", "trajectory_transformer"), "remembers")
CHOICES = sorted(path.stem for path in (ROOT / "algorithms/discrete").glob("*.py"))


def learner_of(name: str):
    """A learner of vectors [3] and actions [2] with scales of its own, and its script."""
    script = load_script(f"offline/{name}.py")
    known = vars(script.Config())
    sizes = {"hidden_dim": 8, "vae_hidden_dim": 8, "model_hidden_dim": 8, "context": 4, "plan_horizon": 2}
    learner = new_learner(script, script.Config(**{key: sizes[key] for key in sizes if key in known}), 3, 2)
    scaler = script.Scaler([1, -2, 30], [2, 1, 10], [-2, 0], [2, 50])
    learner.scaler.load_state_dict(scaler.state_dict())
    return script, learner


def choosing(name: str, mean, states: int = 0):
    script = load_script(f"discrete/{name}.py")
    encoder = script.Encoder(mean, np.ones_like(mean), states, 5 if states else 0, 4, 10)
    return script, learner_class(script)(script.Config(hidden_dim=8), encoder)


@pytest.fixture(scope="module")
def finished(pendulum, tmp_path_factory):
    """The folder of a short run."""
    script, runs = load_script("offline/iql.py"), tmp_path_factory.mktemp("runs")
    script.train(script.parse_config(short(pendulum, runs)))
    return runs / f"offline/iql/{pendulum}/default/seed-0"


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """exported(script, learner, metadata) writes a file as `export` does of a run without its dataset."""

    def write(script, learner):
        info = {"config": {"dataset": "test/none-v0", "variant": "<b>", "seed": 3}, "dataset_hash": "abc"}
        monkeypatch.setattr(export, "open_run", lambda folder: (script, learner, info))
        file = tmp_path / "policy.onnx"
        return file, export.export(tmp_path, file)

    return write


def run(file, observations) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(file)).run(None, {"observations": observations})


@pytest.mark.parametrize("name", OFFLINE)
def test_a_policy_of_vectors_answers_as_act_or_is_refused(name, exported, tmp_path):
    script, learner = learner_of(name)
    if name in REFUSED:
        with pytest.raises(export.UserError, match=f"{name} cannot be exported: .*{REFUSED[name]}"):
            exported(script, learner)
        assert list(tmp_path.iterdir()) == []
        return
    file, checked = exported(script, learner)
    assert checked.startswith("1,000 observations drawn by the run's scales")
    rows = np.random.default_rng(7).normal(size=(5, 3), scale=20).astype(np.float32)
    parts = np.split(rows, 5) if name in export.ONE_BY_ONE else [rows]
    given = np.concatenate([run(file, part)[0] for part in parts])
    np.testing.assert_allclose(given, learner.act(rows), atol=1e-4)  # the ranges are 4 and 50
    assert np.ptp(given[:, 1]) > 0


def test_a_policy_whose_bits_depend_on_the_batch_is_none_that_draws(exported, monkeypatch):
    """As a product with few columns may: a thousand rows at once differ from fifty in the last place."""
    script, learner = learner_of("td3_bc")
    act = learner.act
    monkeypatch.setattr(learner, "act", lambda rows: act(rows) + np.float32(1e-6) * (len(rows) > 50))
    exported(script, learner)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("kind", ["vectors", "states", "planes"])
def test_a_policy_of_choices_answers_as_act(name, kind, exported):
    mean = {"vectors": np.arange(3.0), "states": np.zeros(0), "planes": np.zeros((6, 6, 2))}[kind]
    script, learner = choosing(name, mean, states=6 if kind == "states" else 0)
    if name in REFUSED:
        with pytest.raises(export.UserError, match=f"{name} cannot be exported: .*{REFUSED[name]}"):
            exported(script, learner)
        return
    file, _ = exported(script, learner)
    rng = np.random.default_rng(7)
    rows = {
        "vectors": rng.normal(size=(9, 3)).astype(np.float32),
        "states": rng.integers(5, 11, 9),
        "planes": rng.integers(256, size=(9, 6, 6, 2), dtype=np.uint8),
    }[kind]
    *actions, probabilities = run(file, rows)
    np.testing.assert_allclose(probabilities, learner.probabilities(rows), atol=1e-6)
    if name in ("bc", "iql"):  # they draw
        assert actions == []
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    else:
        np.testing.assert_array_equal(actions[0], learner.act(rows))
        assert actions[0].min() >= 10


def test_names_bounds_and_origin_are_in_the_file(finished, pendulum, tmp_path, monkeypatch, capsys):
    """Of a run whose dataset is here: by its names, checked on its observations."""
    loaded = export.local_dataset(pendulum)
    named = {"observation_columns": ["cos", "<b>sin", "speed"], "action_columns": '["torque in N m"]'}
    monkeypatch.setattr(type(loaded.storage), "metadata", {**loaded.storage.metadata, **named})
    file = tmp_path / "sub/p.onnx"
    assert export.main([str(finished), "--output", str(file)]) == 0
    assert f"1,000 observations of {pendulum}" in capsys.readouterr().out
    assert [path.name for path in file.parent.iterdir()] == ["p.onnx"]
    known = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    info = json.loads((finished / "run.json").read_text())
    assert json.loads(known["observation_names"]) == ["cos", "<b>sin", "speed"]
    assert json.loads(known["action_names"]) == ["torque in N m"]
    assert (json.loads(known["action_low"]), json.loads(known["action_high"])) == ([-2.0], [2.0])
    assert known["algorithm"] == "offline/iql"
    assert known["updates"] == "40"
    assert {name: known[name] for name in ("dataset_hash", "commit")} == {
        name: info[name] for name in ("dataset_hash", "commit")
    }


def test_the_snippet_of_the_docs(exported, tmp_path, monkeypatch):
    exported(*learner_of("bc"))
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/deciding.md").read_text(), re.DOTALL)
    (tmp_path / "snippet.py").write_text(text)
    assert runpy.run_path("snippet.py")["actions"].shape == (1, 2)


def test_a_file_that_answers_differently_is_not_put_in_place(exported, tmp_path, monkeypatch):
    script, learner = learner_of("bc")
    act = learner.act
    monkeypatch.setattr(learner, "act", lambda observations: act(observations) + 0.01)
    with pytest.raises(export.UserError, match="answers differently on 100"):
        exported(script, learner)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_answers_that_are_no_numbers_differ(exported, value, monkeypatch, tmp_path):
    script, learner = learner_of("bc")
    monkeypatch.setattr(learner, "act", lambda observations: np.full((len(observations), 2), value))
    with pytest.raises(export.UserError):
        exported(script, learner)
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_line(tmp_path, capsys, finished):
    folder = tmp_path / "offline/bc/x"
    folder.mkdir(parents=True)
    for arguments, words in {
        (tmp_path,): "is not where a script puts its runs",
        (folder,): "is no folder of a run",
        (finished, "--output", "/proc/none/p.onnx"): "/proc/none",
    }.items():
        assert export.main([str(word) for word in arguments]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("export.py: ")
        assert words in err
    with pytest.raises(SystemExit):
        export.main([str(finished), "--output", "policy.txt"])


@pytest.mark.parametrize(
    ("known", "names"),
    [
        (None, ["action 0", "action 1"]),
        (["one"], ["action 0", "action 1"]),
        (np.array(["a", "b"]), ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ("not json", ["action 0", "action 1"]),
    ],
)
def test_names_are_those_of_the_metadata(known, names):
    assert export.names_of({"action_columns": known}, "action_columns", 2, "action") == names
