"""tools/scores.py: runs become rows, rows are merged, and the README's tables are made of them."""

import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import scores as program
import yaml
from conftest import load_script, short

ROOT = Path(__file__).resolve().parents[1]
ID = "test/pendulum/random-v0"
SETTINGS = {  # of `short`
    "updates": 40, "hidden_dim": 8, "batch_size": 16, "final_eval_episodes": 12, "compile": False,
    "precision": "highest"}
README = """# Title
<!-- algorithms:begin -->
<!-- algorithms:end -->
<!-- families:begin -->
<!-- families:end -->
In between, with a \\ in it.
<!-- scores:begin -->
stale
<!-- scores:end -->
The end.
"""


@pytest.fixture(scope="module")
def scripts() -> dict:
    """The two that are trained here: to load all takes seconds."""
    return {name: load_script(f"offline/{name}.py") for name in ("bc", "td3_bc")}


@pytest.fixture
def root(tmp_path) -> Path:
    """A repository with our scripts and configs of its own."""
    (tmp_path / "algorithms").symlink_to(ROOT / "algorithms")
    (tmp_path / "docs").mkdir()
    for file in ("README.md", "docs/scores.md"):
        (tmp_path / file).write_text(README)
    for algorithm, variant in [("bc", ""), ("td3_bc", ""), ("bc", "-top10")]:
        file = tmp_path / f"configs/offline/{algorithm}/{ID}{variant}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        extra = {"variant": "top10", "fraction": 0.1, "updates": 60} if variant else {}
        file.write_text(yaml.safe_dump({"dataset": ID, **SETTINGS, **extra}))
    return tmp_path


@pytest.fixture
def scores(root, monkeypatch):
    """tools/scores.py for that repository."""
    monkeypatch.setattr(program, "ROOT", root)
    return program


@pytest.fixture
def run(call, pendulum, root):
    """run("bc", seed=1, ...) trains for a moment; its folder."""

    def run(algorithm: str, seed: int = 0, variant: str = "default", **fields) -> Path:
        arguments = short(pendulum, root / "results/runs", seed=seed, variant=variant, **fields)
        status, _, err = call(algorithm, *arguments)
        assert status == 0, err
        return root / f"results/runs/offline/{algorithm}/{ID}/{variant}/seed-{seed}"

    return run


def cells(line: str) -> list[str]:
    """Those of a line of a table."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def change(folder: Path, **values) -> None:
    info = json.loads((folder / "run.json").read_text())
    info["config"] |= {name: value for name, value in values.items() if name in info["config"]}
    info |= {name: value for name, value in values.items() if name not in info["config"]}
    (folder / "run.json").write_text(json.dumps(info))


def again(folder: Path, seed: int) -> Path:
    """The same run under another seed's name."""
    copy = shutil.copytree(folder, folder.with_name(f"seed-{seed}"))
    change(copy, seed=seed)
    return copy


def read(root: Path, algorithm: str = "bc") -> pd.DataFrame:
    return pd.read_csv(root / f"results/scores/{algorithm}.csv")


def test_a_run_becomes_a_row_per_evaluation(root, scores, run, capsys):
    folder = run("td3_bc", seed=3)
    assert scores.main([]) == 0
    assert "results/scores/td3_bc.csv: 1 of 1 runs gathered" in capsys.readouterr().out
    rows, info = read(root, "td3_bc"), json.loads((folder / "run.json").read_text())
    columns = (
        "family algorithm dataset variant seed update phase score return_mean return_std length_mean success"
        " episodes best_score wall_seconds updates_per_second commit config_hash dataset_hash device"
        " precision versions"
    )
    assert list(rows) == columns.split()
    assert list(zip(rows["update"], rows["phase"], rows["episodes"])) == [
        (20, "training", 3), (40, "training", 3), (40, "final", 12)]
    assert (rows[scores.KEY] == ["offline", "td3_bc", ID, "default", 3]).to_numpy().all()
    *training, final = rows.to_dict("records")
    for name in (*scores.RESULT[:-1], "best_score", *scores.CLOCK):
        assert final[name] == pytest.approx(info[name], rel=1e-5)
    assert info["precision"] == "highest"
    for name in ("config_hash", "dataset_hash", "device", "precision"):
        assert final[name] == info[name]
        assert all(pd.isna(row[name]) for row in training)
    assert f"torch=={info['versions']['torch']}" in final["versions"].split()
    assert pd.isna(final["success"])  # Pendulum knows none
    metrics = pd.read_csv(folder / "metrics.csv").dropna(subset="eval/score")
    for name, column in {"score": "eval/score", "wall_seconds": "time/wall_seconds"}.items():
        assert [row[name] for row in training] == pytest.approx(list(metrics[column]), rel=1e-5)


def test_precision_is_what_auto_came_to_and_before_that_was_noted_what_was_asked_for(root, scores, run):
    folder = run("bc", seed=3)
    info = json.loads((folder / "run.json").read_text())
    for noted, recorded in ({"precision": "medium"}, "medium"), ({}, "highest"):
        info.pop("precision", None)
        (folder / "run.json").write_text(json.dumps(info | noted))
        assert scores.main([]) == 0
        assert read(root)["precision"].dropna().tolist() == [recorded]


def test_runs_are_merged_by_name(root, scores, run, capsys):
    first = run("bc", seed=0)
    scores.main([])
    file = root / "results/scores/bc.csv"
    before = file.read_text()
    scores.main([])
    assert file.read_text() == before  # gathered again, nothing changes

    shutil.rmtree(root / "results/runs")  # what is committed stays, though its run is gone
    run("bc", seed=10)
    run("bc", seed=2)
    capsys.readouterr()
    scores.main([str(root / "results/runs")])
    assert "2 of 3 runs gathered" in capsys.readouterr().out
    assert file.read_text().startswith(before)
    assert list(read(root)["seed"].unique()) == [0, 2, 10]

    shutil.rmtree(root / "results/runs")
    run("bc", seed=0, updates=60)
    capsys.readouterr()
    scores.main([])
    reason = f"updates is 60, and 40 in configs/offline/bc/{ID}.yaml"
    assert f"skipped {first}: {reason}\n" in capsys.readouterr().out  # a trial does not spoil the record
    assert file.read_text().startswith(before)

    longer = root / f"configs/offline/bc/{ID}.yaml"
    longer.write_text(longer.read_text().replace("updates: 40", "updates: 60"))
    change(first, score=12.345678)  # a run of the same name replaces the rows of the other
    scores.main([])
    rows = read(root).query("seed == 0")
    assert list(rows["update"]) == [20, 40, 60, 60]
    assert rows["score"].iloc[-1] == 12.3457
    assert list(read(root)["seed"].unique()) == [0, 2, 10]
    assert not list(root.rglob("*.new"))


def test_what_does_not_count_is_named(root, scores, run, capsys):
    folder, other = run("bc"), run("bc", variant="alone")
    for status, word in {"running": "not finished", "failed": "failed", "diverged": "diverged"}.items():
        change(folder, status=status)
        assert scores.main([]) == 0
        out = capsys.readouterr().out.splitlines()
        assert f"skipped {folder}: {word}" in out
        assert f"skipped {other}: there is no configs/offline/bc/{ID}-alone.yaml" in out
    change(folder, status="finished", hidden_dim=9, eval_every=7, device="cuda")
    scores.main([])
    reason = f"hidden_dim is 9, and 8 in configs/offline/bc/{ID}.yaml"
    assert f"skipped {folder}: {reason}\n" in capsys.readouterr().out
    info = json.loads((folder / "run.json").read_text())
    del info["return_mean"]
    (folder / "run.json").write_text(json.dumps(info))
    assert scores.main([]) == 0
    assert "want of an environment" in capsys.readouterr().out
    del info["config"]["dataset"]
    assert "learned online" in scores.objection("offline", "bc", info)
    assert not (root / "results/scores").exists()


@pytest.mark.parametrize("taken", ["model_from", "start_from"])
def test_what_another_run_began_has_its_seed_and_settings(root, scores, run, taken):
    """Seeds that share a model are not independent: their deviation would be too small."""
    folder = run("bc")
    fit = {"seed": 0, "model_epochs": 15, "model_from": None, "ensemble": 7}
    other = folder.with_name("seed-8")
    other.mkdir()
    info = json.loads((folder / "run.json").read_text())
    info["config"] |= fit | {taken: str(other)}

    def objection(**theirs) -> str:
        (other / "run.json").write_text(json.dumps({"status": "finished", "config": fit | theirs}))
        return scores.objection("offline", "bc", info)

    assert objection() == ""
    if taken == "model_from":
        assert objection(updates=5, hidden_dim=9) == ""  # another algorithm's may be others
    else:
        assert objection(hidden_dim=9) == f"hidden_dim is 8, and 9 in {other}"  # its own first half
        assert objection(variant="wide") == ""
    assert objection(seed=1) == f"seed is 0, and 1 in {other}"
    assert objection(model_epochs=3) == f"model_epochs is 15, and 3 in {other}"
    assert objection(ensemble=5) == f"ensemble is 7, and 5 in {other}"
    assert objection(model_from="third") == f"model_from is None, and third in {other}"
    shutil.rmtree(other)
    with pytest.raises(OSError):  # `gather` names it
        scores.objection("offline", "bc", info)


def test_another_environment_does_not_count(root, scores, run, capsys):
    """Its returns are of another task, though the config file leaves the environment to the dataset."""
    folder, file = run("bc", environment="Pendulum-v1"), f"configs/offline/bc/{ID}.yaml"
    assert scores.main([]) == 0
    assert f"skipped {folder}: environment is Pendulum-v1, and None in {file}\n" in capsys.readouterr().out
    (root / file).write_text(yaml.safe_dump({"dataset": ID, **SETTINGS, "environment": "Pendulum-v0"}))
    assert scores.main([]) == 0
    reason = f"environment is Pendulum-v1, and Pendulum-v0 in {file}"
    assert f"skipped {folder}: {reason}\n" in capsys.readouterr().out
    assert not (root / "results/scores").exists()
    (root / file).write_text(yaml.safe_dump({"dataset": ID, **SETTINGS, "environment": "Pendulum-v1"}))
    assert scores.main([]) == 0
    assert "1 of 1 runs gathered" in capsys.readouterr().out


def test_a_broken_record_is_named_and_skipped(root, scores, run, capsys):
    whole, broken = run("bc"), run("bc", seed=1)
    text = (broken / "run.json").read_text()
    info = json.loads(text)
    shapes = [{**info, "config": None}, {"status": "finished"}, {**info, "versions": 3}, []]
    lacking = {name: value for name, value in info.items() if name != "dataset_hash"}
    for content in (text[: len(text) // 2], "", "\0" * 9, *map(json.dumps, [*shapes, lacking])):
        (broken / "run.json").write_text(content)
        assert scores.main([]) == 0
        out = capsys.readouterr().out
        assert f"skipped {broken}: its record cannot be read: " in out
        assert "1 of 1 runs gathered" in out
        assert list(read(root)["seed"].unique()) == [0]
    (broken / "run.json").write_text(text)
    (broken / "metrics.csv").write_text("")
    assert scores.main([]) == 0
    assert f"skipped {broken}: its record cannot be read: " in capsys.readouterr().out
    assert whole.exists()


def test_a_run_that_was_moved_is_named_and_skipped(root, scores, run, capsys):
    folder = run("bc")
    moved = folder.rename(folder.with_name("seed-7"))
    assert scores.main([]) == 0
    assert f"skipped {moved}: its record cannot be read: " in capsys.readouterr().out
    assert not (root / "results/scores").exists()


def test_a_run_in_two_phases(root, scores, run, capsys, monkeypatch):
    """Made of one of BC's: evaluations at 20 and 40 are offline, those at 60 and 80 after 10 and 20 steps."""
    run("bc")
    scores.main([])
    folder = root / f"results/runs/finetune/bc/{ID}/default/seed-0"
    shutil.copytree(run("bc", seed=1).parent / "seed-1", folder)
    change(folder, seed=0, score_at_switch=3.0, lowest_score_after_switch=1.0, regret=0.5)
    info = json.loads((folder / "run.json").read_text())
    info["config"] |= {"online_steps": 20, "updates_per_step": 2}
    (folder / "run.json").write_text(json.dumps(info))
    metrics = pd.read_csv(folder / "metrics.csv")
    more = metrics.assign(update=metrics["update"] + 40, **{"online/steps": metrics["update"] // 2})
    pd.concat([metrics, more]).to_csv(folder / "metrics.csv", index=False)
    episodes = pd.read_csv(folder / "evaluations.csv")
    training, final = (episodes[episodes["phase"] == phase] for phase in ("training", "final"))
    online = training.assign(phase="online", update=training["update"] + 40)
    parts = training.assign(phase="offline"), online, final.assign(update=80)
    pd.concat(parts).to_csv(folder / "evaluations.csv", index=False)
    monkeypatch.setattr(scores, "objection", lambda *_: "")  # there is no such script
    assert scores.main([str(folder.parents[5])]) == 0
    assert list(read(root))[-4:] == ["online_steps", *scores.SWITCH]
    rows = read(root).query("family == 'finetune'")
    assert list(zip(rows["update"], rows["phase"], rows["episodes"], rows["online_steps"])) == [
        (20, "offline", 3, 0), (40, "offline", 3, 0), (60, "online", 3, 10), (80, "online", 3, 20),
        (80, "final", 12, 20)]
    assert rows[scores.SWITCH].iloc[-1].tolist() == [3.0, 1.0, 0.5]
    assert rows[scores.SWITCH].iloc[:-1].isna().all(axis=None)
    assert read(root).query("family == 'offline'")["online_steps"].isna().all()
    page = (root / "docs/scores.md").read_text()
    places = [page.index(text) for text in ("s/offline` (", "| bc |", "s/finetune` (", "| finetune bc |")]
    assert places == sorted(places)


def test_a_run_in_context(root, scores, run):
    """Its record has a summary alone: the returns by episode are in files of their own."""
    folder = run("bc")
    info = json.loads((folder / "run.json").read_text())
    for name in ("return_std", "length_mean", "success"):
        del info[name]
    (folder / "run.json").write_text(json.dumps(info | {"return_first": 1.5}))
    (folder / "evaluations.csv").write_text("update\n")
    assert scores.main([]) == 0
    rows = read(root)
    assert list(zip(rows["update"], rows["phase"], rows["episodes"])) == [
        (20, "training", 3), (40, "training", 3), (40, "final", 12)]
    assert rows["return_mean"].iloc[-1] == pytest.approx(info["return_mean"], rel=1e-5)
    assert rows[["return_std", "length_mean", "success"]].iloc[-1].isna().all()


def test_tables(root, scores, run):
    plain, unscored = run("bc"), run("td3_bc")
    for seed, score in [(1, 20.0), (2, 60.0)]:
        change(again(plain, seed), score=score)
        change(again(unscored, seed), score=None)
    change(plain, score=10.0)
    change(unscored, score=None)
    change(run("bc", variant="top10", fraction=0.1, updates=60), score=-0.04)
    scores.main([])
    text = (root / "README.md").read_text()
    block = text.partition("scores:begin -->\n")[2].partition("\n<!-- scores:end")[0].splitlines()
    _, heading, *table = [line for line in block if line]
    assert heading == "`algorithms/offline` (3 seeds, 40 updates if not stated):"
    assert cells(table[0]) == ["Algorithm", ID]
    plain, top10, unscored = map(cells, table[2:])
    assert plain == ["bc", f"[30.0 ± 26.5](../configs/offline/bc/{ID}.yaml)"]
    assert top10 == ["bc top10", f"[0.0](../configs/offline/bc/{ID}-top10.yaml) (1 seed, 60 updates)"]
    assert unscored[0] == "td3_bc"
    assert unscored[1].startswith("[return -")
    assert " ± " in unscored[1]
    before, after = README.partition("stale\n")[::2]
    assert text.endswith(after)
    assert "In between, with a \\ in it." in text
    assert before.splitlines()[0] == text.splitlines()[0]


def test_the_table_of_algorithms(root, scores, run):
    column, dataset = next(iter(scores.YARDSTICKS.items()))
    file = root / f"configs/offline/bc/{dataset}.yaml"
    folder = run("bc")
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump({"dataset": dataset, **SETTINGS}))
    change(folder, dataset=dataset, score=8.25)
    moved = root / f"results/runs/offline/bc/{dataset}/default"
    moved.mkdir(parents=True)
    folder.rename(moved / "seed-0")
    scores.main([])
    lines = (root / "README.md").read_text().splitlines()
    (head,) = [cells(line) for line in lines if line.startswith("| Route |")]
    for path in (ROOT / "algorithms/offline").glob("*.py"):
        (line,) = [line for line in lines if f"(algorithms/offline/{path.name})" in line]
        row = dict(zip(head, cells(line), strict=True))
        name = re.match(r"\[(.+)\]\((.+)\)", row["Algorithm"])
        assert path.read_text().startswith(f'"""{name[1]}: ')
        assert name[2] == f"algorithms/offline/{path.name}"
        assert "](https://arxiv.org/abs/" in row["Paper"]
        own, shared = map(int, row["Lines"].split(" + "))
        text = path.read_text().splitlines()
        assert own + shared == len(text)
        assert "Toolbox" in text[own]
        assert row[column] == ("8.2 (1)" if path.stem == "bc" else "")
        assert row["Updates"] == ("40" if path.stem == "bc" else "")
    begin, end = (lines.index(f"<!-- families:{end} -->") for end in ("begin", "end"))
    others = "\n".join(lines[begin:end])
    for path in (ROOT / "algorithms").glob("*/*.py"):
        named = f"](algorithms/{path.parent.name}/{path.name})" in others
        only_makes_data = path.parent.name == "collect" and "def update(self" not in path.read_text()
        assert named == (path.parent.name not in {"offline", "tutorial"} and not only_makes_data)
    assert "[docs" not in others
    assert all((ROOT / page).exists() for page in re.findall(r"\((docs/\w+\.md)\)", others))


def test_every_script_of_offline_has_a_route(scores):
    """So that a new one is not put at the table's end, under the bare name of its folder."""
    named = {name for members in scores.ROUTES.values() for name in members}
    assert {path.stem for path in (ROOT / "algorithms/offline").glob("*.py")} <= named


def test_check_tells_whether_the_readme_is_stale(root, scores, run, capsys):
    run("bc")
    assert scores.main(["--check"]) == 1
    assert capsys.readouterr().out == "README.md, docs/scores.md: stale, make scores\n"
    assert (root / "README.md").read_text() == README
    assert scores.main([]) == 0
    assert scores.main(["--check"]) == 0
    assert capsys.readouterr().out.endswith("the pages are up to date\n")
    (root / "results/scores/bc.csv").unlink()
    assert scores.main(["--check"]) == 1


def test_a_folder_that_is_not_there(scores, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        scores.main([str(tmp_path / "rnus")])
    assert f"there is no folder {tmp_path / 'rnus'}" in capsys.readouterr().err


def test_nothing_half_written(root, scores, run, monkeypatch):
    run("bc")
    scores.main([])
    before = (root / "results/scores/bc.csv").read_text()
    run("bc", seed=1)
    monkeypatch.setattr(Path, "replace", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
        scores.main([])
    assert (root / "results/scores/bc.csv").read_text() == before
