"""tools/common.py: what the programs of tools/ share."""

import json
import re
import shutil
import statistics
from pathlib import Path

import common
import pytest


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of a run on own/maze-v0."""
    folder = tmp_path / "offline/bc/own/maze-v0/default/seed-3"
    folder.mkdir(parents=True)
    config = {"dataset": "own/maze-v0", "variant": "default", "seed": 3}
    (folder / "run.json").write_text(json.dumps({"status": "finished", "config": config}))
    return folder


def test_a_run_is_named_by_its_place_and_its_record(folder):
    name = {"family": "offline", "algorithm": "bc", "dataset": "own/maze-v0", "variant": "default", "seed": 3}
    info = common.read_record(folder)
    assert common.name_run(folder, info) == name
    online = {"status": "running", "config": {"environment": "own", "variant": "default", "seed": 3}}
    assert common.name_run(Path("/runs/collect/sac/own/default/seed-3"), online)["dataset"] == "own"
    for other in ({"seed": 4}, {"variant": "wide"}, {"dataset": "own/maze-v1"}, {"dataset": "maze-v0/own"}):
        with pytest.raises(ValueError, match=r"it is not in \.\.\./"):
            common.name_run(folder, {"config": info["config"] | other})
    with pytest.raises(ValueError, match="it is not in"):
        common.name_run(Path("/"), info)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"status": "x"}', '{"status": 1, "config": {}}', '{"status": "x", "config": 1}'],
)
def test_what_is_no_record_is_an_error(folder, text):
    (folder / "run.json").write_text(text)
    with pytest.raises(ValueError):
        common.read_record(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        common.read_record(folder)


def test_names():
    assert common.learner_name("offline", "bc", "default") == "bc"
    assert common.learner_name("finetune", "iql", "wide") == "finetune iql wide"
    assert common.learner_name("finetune", "iql", "offline") == "finetune iql offline"  # a variant's name
    assert common.config_file("offline", "bc", "x/y-v0", "default") == Path("configs/offline/bc/x/y-v0.yaml")
    assert common.config_file("offline", "bc", "x-v0", "top10") == Path("configs/offline/bc/x-v0-top10.yaml")


def test_numbers():
    assert common.show([4.0]) == "4.0"
    assert common.show(iter([4, 6, 11])) == f"7.0 ± {statistics.stdev([4, 6, 11]):.1f}"
    assert common.show([-0.01, 0.0]) == "0.0 ± 0.0"
    assert common.span([50_000, 10_000, 20_000]) == "10,000 to 50,000"
    assert common.span([7, 7]) == "7"


def test_markdown_shows_names_as_they_are():
    """A reader of Markdown takes the backslashes away again."""
    for name in ("td3_bc", "a|b", "<b>x</b>", "*x*", "_x_", "[x](y)", "`x`", r"a\b", "&lt;", "__init__"):
        shown = common.escape(name)
        assert re.sub(r"\\(\W|_)", r"\1", shown) == name
        marks = re.sub(r"\\.", "", shown)
        assert not re.search(r"[|<>*\[\]`&\\]|\b_|_\b", marks), name
    assert common.escape("td3_bc") == "td3_bc"
    assert common.escape("two\nlines") == "two lines"
    assert common.link("a]b", "x y|z.yaml") == r"[a\]b](x%20y%7Cz.yaml)"
    assert common.markdown(["A", "B"], [[1, "x"]]) == "| A | B |\n| --- | --- |\n| 1 | x |"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "new/file.txt"
    common.write(file, "before")
    common.write(file, b"after")
    assert file.read_text() == "after"
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        common.write(file, "half")
    assert [path.read_text() for path in file.parent.iterdir()] == ["after"]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (common.UserError("mend\nthis"), 2, "x.py: mend this\n"),
        (OSError(28, "No space left"), 2, "x.py: [Errno 28] No space left\n"),
        (KeyboardInterrupt(), 130, "x.py: interrupted; go on\n"),
    ],
)
def test_what_went_wrong_is_one_line(capsys, error, status, line):
    def fail(*_):
        raise error

    assert common.exit_status("x.py", fail, 1, 2, advice="; go on") == status
    assert capsys.readouterr() == ("", line)


def test_exit_statuses():
    assert common.exit_status("x.py", lambda: None) == 0
    assert common.exit_status("x.py", lambda status: status, 1) == 1
    with pytest.raises(KeyError):  # no user's mistake: its traceback is wanted
        common.exit_status("x.py", lambda: {}["x"])


def test_a_scripts_own_errors_are_a_users_mistakes_too(capsys):
    def fail():
        raise IndexError("mend this")

    assert common.exit_status("x.py", fail, errors=(IndexError,)) == 2
    assert capsys.readouterr() == ("", "x.py: mend this\n")


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"updates": 70}, 70),
        ({"updates": 70, "online_steps": 20}, 90),
        ({"updates": 0, "online_steps": 20, "random_steps": 5, "updates_per_step": 4}, 60),
        ({"updates": 70, "online_steps": 20, "warmup_steps": 5, "updates_per_step": 2}, 100),
        ({"updates": 70, "random_steps": 1000}, 70),
    ],
)
def test_updates_of_both_phases(config, count):
    assert common.all_updates(config) == count
