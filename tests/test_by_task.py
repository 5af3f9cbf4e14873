"""tools/by_task.py: scores of a policy for several tasks, beside recorded ones of those that learnt one."""

import json

import by_task
import pandas as pd
import pytest

MAZE, WALKER = "reef/pointmaze/umaze-v0", "reef/walker2d/medium-replay-v1"


@pytest.fixture
def make(tmp_path):
    """make(seed, {task: score}) writes a finished run of the tasks."""

    def make(seed: int, scores: dict, variant: str = "default", status: str = "finished"):
        first, *others = scores
        folder = tmp_path / "runs/context/multitask" / first / variant / f"seed-{seed}"
        folder.mkdir(parents=True)
        config = {"dataset": first, "others": others, "variant": variant, "seed": seed, "updates": 100}
        info = {"status": status, "config": config, "score": 0.0}
        info |= {f"{task}/score": score for task, score in scores.items()}
        (folder / "run.json").write_text(json.dumps(info))
        return folder

    return make


@pytest.fixture
def run(tmp_path, capsys):
    """The command line on tmp_path/runs beside recorded runs of dt: exit status, rows, stdout, stderr."""
    finals = [(MAZE, "small", 0, "final", 7.0), (MAZE, "small", 1, "final", 9.0)]
    finals += [(MAZE, "small", 0, "training", 6.0), (MAZE, "default", 0, "final", 99.0)]
    finals += [("reef/hopper/medium-expert-v1", "small", 0, "final", 99.0)]
    table = pd.DataFrame(finals, columns=["dataset", "variant", "seed", "phase", "score"])
    table["update"] = [100, 100, 50, 100, 100]
    table.assign(family="offline", algorithm="dt").to_csv(tmp_path / "dt.csv", index=False)

    def run(*arguments):
        out = tmp_path / "rows.csv"
        given = [tmp_path / "runs", "--alone", tmp_path / "dt.csv", "--out", out, *arguments]
        status = by_task.main([*map(str, given)])
        return status, pd.read_csv(out) if out.exists() else None, *capsys.readouterr()

    return run


def test_a_row_a_task_and_a_column_a_learner(make, run):
    make(0, {MAZE: 1.0, WALKER: 10.0})
    make(1, {MAZE: 3.0, WALKER: 20.0})
    make(0, {MAZE: 5.0, WALKER: 30.0}, variant="unprompted")
    make(2, {MAZE: 99.0, WALKER: 99.0}, status="running")
    status, rows, out, err = run()
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "| Task | dt small | dt small at 50 | multitask | multitask unprompted |"
    assert lines[2] == f"| {MAZE} | 8.0 ± 1.4 | 6.0 | 2.0 ± 1.4 | 5.0 |"  # 50 of 100 updates are a task's
    assert lines[3] == f"| {WALKER} |  |  | 15.0 ± 7.1 | 30.0 |"
    assert "Seeds: dt small 2, dt small at 50 1, multitask 2, multitask unprompted 1." in out
    assert len(rows) == 9
    assert rows.query("learner == 'multitask' and seed == 1")["score"].tolist() == [3, 20]
    assert sorted(rows["updates"]) == [50] + [100] * 8


def test_a_broken_run_is_named_and_left_out(make, run):
    make(0, {MAZE: 1.0, WALKER: 10.0})
    broken = make(1, {MAZE: 3.0, WALKER: 20.0})
    (broken / "run.json").write_text("{")
    status, rows, _, err = run()
    assert status == 0
    assert (rows["learner"] == "multitask").sum() == 2
    assert err.startswith(f"skipped {broken}")
    assert len(err.splitlines()) == 1


def test_errors_are_one_line(make, run, tmp_path):
    status, rows, _, err = run()
    assert (status, rows) == (2, None)
    assert err == f"by_task.py: no finished run of several tasks in {tmp_path / 'runs'}\n"
    make(0, {MAZE: 1.0, WALKER: 10.0})
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    status, _, _, err = run("--alone", tmp_path / "other.csv")
    assert status == 2
    assert err.startswith(f"by_task.py: --alone: {tmp_path / 'other.csv'} is no file of recorded scores")
