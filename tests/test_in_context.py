"""tools/in_context.py: which runs it finds, what its table and its picture have of them."""

import json

import in_context
import numpy as np
import pandas as pd
import pytest

ROOM = "reef/dark-room/histories-v0"


@pytest.fixture
def make(tmp_path):
    """make("dpt", returns=[1.0, 3.0], seed=1) writes a finished run; the optimum is 16."""

    def make(algorithm: str, returns=(), seed: int = 0, status: str = "finished", dataset: str = ROOM):
        folder = tmp_path / "runs/context" / algorithm / dataset / "default" / f"seed-{seed}"
        folder.mkdir(parents=True)
        config = {"dataset": dataset, "variant": "default", "seed": seed}
        (folder / "run.json").write_text(json.dumps({"status": status, "config": config}))
        if returns:
            episodes = np.arange(1, len(returns) + 1)
            table = pd.DataFrame({"episode": episodes, "return_mean": returns})
            table = table.assign(return_std=2.0, best=16.0)
            table.to_csv(folder / "in-context-final-00000006.csv", index=False)
            table.assign(return_mean=0.0).to_csv(folder / "in-context-training-00000009.csv", index=False)
        return folder

    return make


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command line on tmp_path/runs: exit status, table, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(in_context, "source_returns", lambda dataset: [0.5, 1.0, 9.0])
        out, picture = tmp_path / "returns.csv", tmp_path / "curves.png"
        given = [*(arguments or [tmp_path / "runs"]), "--out", out, "--picture", picture]
        status = in_context.main([*map(str, given)])
        return status, pd.read_csv(out) if out.exists() else None, *capsys.readouterr()

    return run


def test_a_row_an_episode_of_every_finished_run(make, run, tmp_path):
    make("dpt", [1.0, 2.0, 2.0, 4.0, 6.0], seed=0)
    make("dpt", [3.0, 4.0, 5.0, 6.0, 8.0], seed=1)
    make("retrieval", [1.0] * 5)
    unfinished = make("dpt", [9.0], seed=2, status="running")
    status, table, out, err = run()
    assert status == 0
    assert len(table) == 15
    assert table.query("algorithm == 'dpt' and seed == 1")["return_mean"].tolist() == [3, 4, 5, 6, 8]
    assert table.columns.tolist() == [*in_context.KEY, "episode", "return_mean", "return_std", "best"]
    assert "dpt: 2.0 in the first episode, 7.0 in the last fifth (6.0, 8.0) of 16.0" in out
    assert err.startswith(f"skipped {unfinished}: it is running")
    assert len(err.strip().splitlines()) == 1
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_lines_are_means_over_seeds(make, run):
    make("dpt", [1.0, 2.0], seed=0)
    make("dpt", [3.0, 4.0], seed=1)
    run()
    table = in_context.find_runs([in_context.Path(make("x").parents[5])]).assign(learner="dpt")
    (axes,) = in_context.draw(table, [0.5, 1.0, 9.0]).axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert [*lines["dpt (2 seeds)"]] == [2, 3]
    assert [*lines["learners of the data"]] == [0.5, 1, 9]
    assert [*lines["optimum"]] == [16, 16]


@pytest.mark.parametrize(
    ("others", "arguments", "message"),
    [
        ([], ["nowhere"], "nowhere is no folder"),
        ([{"algorithm": "dpt"}], [], "no finished run of algorithms/context"),
        ([{"algorithm": "dpt", "returns": [1.0], "dataset": "a/b-v0"},
          {"algorithm": "dpt", "returns": [1.0]}], [], "runs on several datasets: a/b-v0, " + ROOM),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(make, run, tmp_path, others, arguments, message):
    for other in others:
        make(**other)
    status, table, out, err = run(*arguments)
    assert (status, table, out) == (2, None, "")
    assert message in err.strip().splitlines()[-1]
