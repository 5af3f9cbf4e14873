"""tools/plot.py: which runs it finds, what it draws of them, and what its table says."""

import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import plot
import pytest
from common import escape
from conftest import load_script, short
from matplotlib.backends.backend_agg import FigureCanvasAgg

MAZE, CHEETAH = "own/maze-v0", "own/cheetah/mixed-v1"
ONLINE = {"online_steps": 1000, "updates_per_step": 2}


@pytest.fixture(scope="module")
def scripts() -> dict:
    """The one that is trained here: to load all takes seconds."""
    return {name: load_script(f"offline/{name}.py") for name in ("bc",)}


@pytest.fixture
def make(tmp_path):
    """make("bc", seed=1, curve={100: 3.0}, score=5.0) writes a run; returns are ten times the scores."""

    def make(algorithm: str, seed: int = 0, curve: dict | None = None, score: float = 5.0, **fields) -> Path:
        config = {"dataset": MAZE, "variant": "default", "updates": 400, "seed": seed}
        known = {*config, *ONLINE, "random_steps"}
        config |= {name: fields.pop(name) for name in list(fields) if name in known}
        root, family = fields.pop("root", tmp_path), fields.pop("family", "offline")
        scored = fields.pop("scored", True)
        folder = root / family / algorithm / config["dataset"] / config["variant"] / f"seed-{config['seed']}"
        folder.mkdir(parents=True)
        curve = {100: 1.0, 200: 3.0, 400: 4.0} if curve is None else curve
        info = {"status": "finished", "config": config, "dataset_hash": "d", "return_mean": 10 * score}
        info |= {"score": score if scored else None, "best_score": 9.0 if scored else None}
        (folder / "run.json").write_text(json.dumps(info | fields))
        rows = [{"update": update, "actor/loss": 0.5} for update in range(50, 401, 50) if update not in curve]
        for update, value in curve.items():
            rows.append({"update": update, "actor/loss": 0.5, "eval/return_mean": 10 * value})
            rows[-1]["time/wall_seconds"] = (seed + 1) * 60.0 * update
            if "updates_per_step" in config and update > config["updates"]:
                rows[-1]["online/steps"] = (update - config["updates"]) // config["updates_per_step"]
            if scored:
                rows[-1]["eval/score"] = value
        pd.DataFrame(rows).sort_values("update").to_csv(folder / "metrics.csv", index=False)
        return folder

    return make


@pytest.fixture
def run(capsys):
    """run(FOLDER, "--output", FILE) is the command line: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return plot.main([*map(str, arguments)]), *capsys.readouterr()

    return run


def table(out: str) -> dict[tuple[str, str], list[str]]:
    """Rows of the first printed table by dataset and algorithm."""
    lines = [line for line in out.partition("\n\n")[0].splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {(dataset, learner): rest for dataset, learner, *rest in rows[2:]}


def drawn(folder: Path, time: bool = False):
    """Panels of the picture by dataset: its lines, as (x, y, width), and its axis."""
    with matplotlib.rc_context(plot.STYLE):
        axes = plot.draw(*plot.find_runs([folder]), time).axes
    panels = {axis.get_title("left").partition("\n")[0]: axis for axis in axes if axis.lines}
    lines = {name: [(*map(np.asarray, line.get_data()), line.get_linewidth()) for line in axis.lines
                    if line.get_marker() != "D"] for name, axis in panels.items()}
    return lines, panels


def test_the_table_is_the_final_evaluations(make, run, tmp_path):
    for seed, score in enumerate((4.0, 6.0, 11.0)):
        make("td3_bc", seed, score=score)
    make("td3_bc", 0, variant="alpha-10.0", score=2.0, updates=300)
    make("bc", 0, dataset=CHEETAH, scored=False)
    make("iql", 0, family="finetune")
    status, out, err = run(tmp_path)
    assert (status, err) == (0, "")
    spread = np.std([4, 6, 11], ddof=1)
    assert table(out) == {
        (MAZE, "td3_bc"): [f"7.0 ± {spread:.1f}", f"70.0 ± {10 * spread:.1f}", "9.0 ± 0.0", "3", "400"],
        (MAZE, "td3_bc alpha-10.0"): ["2.0", "20.0", "9.0", "1", "300"],
        (MAZE, "finetune iql"): ["5.0", "50.0", "9.0", "1", "400"],
        (CHEETAH, "bc"): ["", "50.0", "", "1", "400"],
    }
    assert out.endswith(f"\nPicture: {tmp_path / 'curves.png'}\n")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_finished_has_a_curve_but_no_score(make, run, tmp_path):
    make("bc", 0, score=4.0)
    make("bc", 1, curve={100: 7.0}, score=100.0, status="running")
    make("cql", 0, curve={}, score=100.0, status="failed")
    _, out, _ = run(tmp_path)
    assert table(out)[MAZE, "bc"] == ["4.0", "40.0", "9.0", "1 (and 1 not finished)", "400"]
    assert table(out)[MAZE, "cql"] == ["", "", "", "0 (and 1 not finished)", "400"]
    lines, panels = drawn(tmp_path)
    assert [list(x) for x, _, _ in lines[MAZE]][:3] == [[100, 200, 400], [100], [100]]
    assert "not finished: 2 of 3 runs" in panels[MAZE].get_title("left")


def test_lines_have_no_holes_where_others_were_evaluated_at_other_updates(make, tmp_path):
    make("bc", 0, {100: 1.0, 200: 3.0, 400: 4.0})
    make("bc", 1, {100: 2.0, 300: 9.0, 400: 8.0})
    make("iql", 0, {50: 1.0, 150: 2.0, 250: 5.0})
    lines, _ = drawn(tmp_path)
    seeds = [(list(x), list(y)) for x, y, width in lines[MAZE] if width < 1]
    means = [(list(x), list(y)) for x, y, width in lines[MAZE] if width > 1]
    assert seeds == [([100, 200, 400], [1, 3, 4]), ([100, 300, 400], [2, 9, 8]), ([50, 150, 250], [1, 2, 5])]
    assert means == [([100, 400], [1.5, 6]), ([50, 150, 250], [1, 2, 5])]


def test_a_diamond_is_the_mean_of_the_final_evaluations(make, tmp_path):
    make("bc", 0, score=4.0)
    make("bc", 1, score=8.0)
    _, panels = drawn(tmp_path)
    (diamond,) = [line for line in panels[MAZE].lines if line.get_marker() == "D"]
    assert diamond.get_xydata().tolist() == [[400, 6]]


def test_against_time(make, run, tmp_path):
    """Seed 1 takes twice as long; what goes on online has no switch to show."""
    make("bc", 0, {100: 1.0, 150: 3.0}, score=4.0, wall_seconds=3600.0 * 3)
    make("bc", 1, {100: 2.0, 150: 5.0}, score=8.0, wall_seconds=3600.0 * 6)
    make("iql", 0, {100: 2.0}, family="finetune", **ONLINE)
    lines, panels = drawn(tmp_path, time=True)
    assert [(list(x), list(y)) for x, y, width in lines[MAZE] if width > 1] == [([2.5, 3.75], [1.5, 4])]
    (diamond,) = [line for line in panels[MAZE].lines if line.get_marker() == "D"]
    assert diamond.get_xydata().tolist() == [[4.5, 6]]
    assert {axis.get_xlabel() for axis in panels.values()} == {"hours of training and evaluation"}
    assert [list(x) for x, _, width in lines[f"{MAZE}, then online"] if width == 2] == [[100 / 60]]
    assert run(tmp_path, "--time")[0] == 0


def test_columns_of_metrics_are_drawn_at_every_row_that_has_them(make, run, tmp_path):
    """A panel a column; who has no such column has no line, and diamonds are of scores alone."""
    for seed in (0, 1):
        file = make("iql", seed, {100: 1.0, 400: 2.0}) / "metrics.csv"
        table = pd.read_csv(file)
        table.assign(q=table["update"] / 100 + seed).to_csv(file, index=False)
    make("bc", curve={})
    found = plot.draw(*plot.find_runs([tmp_path], ["q", "actor/loss"]), columns=["q", "actor/loss"])
    values, losses = [axis for axis in found.axes if axis.lines]
    assert (values.get_ylabel(), losses.get_ylabel()) == ("q", "actor/loss")
    every = [50, 100, 150, 200, 250, 300, 350, 400]
    lines = [line for line in values.lines if len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in lines] == [every] * 3  # two seeds and their mean, no diamond
    assert sorted(line.get_ydata()[-1] for line in lines) == [4, 4.5, 5]
    assert len([line for line in losses.lines if len(line.get_xdata())]) == 5
    assert run(tmp_path, "--columns", "q", "actor/loss")[0] == 0


def test_online_columns_are_drawn_against_experience_where_a_row_tells_none(make, tmp_path):
    """Rows of metrics.csv between two that tell the steps of experience take those of the last."""
    make("iql", 0, {400: 1.0, 1400: 2.0, 2400: 3.0}, family="finetune", **ONLINE)
    _, curves = plot.find_runs([tmp_path], ["actor/loss"])
    assert curves["online_steps"].tolist() == sorted(curves["online_steps"])
    assert curves.iloc[-1]["online_steps"] == 1000


@pytest.mark.parametrize(("curve", "status"), [({100: 3.0, 400: 4.0}, "running"), ({}, "finished")])
def test_returns_are_drawn_where_one_has_no_score(make, tmp_path, curve, status):
    make("bc", 0, {100: 1.0, 400: 2.0}, dataset=MAZE)
    make("iql", 0, curve, dataset=MAZE, scored=False, status=status)
    make("bc", 0, {100: 1.0, 400: 2.0}, dataset=CHEETAH)
    lines, panels = drawn(tmp_path)
    means = [list(y) for _, y, width in lines[MAZE] if width > 1]
    assert means == [[10, 20], [10 * value for value in curve.values()]]
    assert [list(y) for _, y, width in lines[CHEETAH] if width > 1] == [[1, 2]]
    assert (panels[MAZE].get_ylabel(), panels[CHEETAH].get_ylabel()) == ("return", "score")


def test_a_panel_says_what_is_not_alike(make, tmp_path):
    for seed in (0, 1):
        make("bc", seed)
        make("iql", seed, dataset=CHEETAH)
    make("bc", 0, dataset="one-v0")
    _, panels = drawn(tmp_path)
    assert panels[MAZE].get_title("left") == MAZE
    assert panels["one-v0"].get_title("left") == "one-v0\none seed each: no spread is known"
    make("awac", 0, updates=10_000, dataset_hash="other")
    title = drawn(tmp_path)[1][MAZE].get_title("left")
    notes = ["one seed: awac", "unequal updates: 400 to 10,000", "2 versions of the data"]
    assert title.splitlines() == [MAZE, *notes]


def test_what_goes_on_online_is_drawn_against_experience(make, run, tmp_path):
    """Right of a line at the switch; the offline phase is left of it, a quarter as wide as the online one."""
    make("iql", 0, {200: 1.0, 400: 2.0, 1400: 3.0, 2400: 4.0}, family="finetune", **ONLINE)
    make("iql", 1, {200: 3.0, 400: 4.0, 1400: 5.0}, family="finetune", status="running", **ONLINE)
    make("iql", 0)
    lines, panels = drawn(tmp_path)
    assert [*panels] == [MAZE, f"{MAZE}, then online"]
    axis = panels[f"{MAZE}, then online"]
    assert [(list(x), list(y)) for x, y, width in lines[f"{MAZE}, then online"] if width == 2] == [
        ([-125, 0, 500], [2, 3, 4])]
    (diamond,) = [line for line in axis.lines if line.get_marker() == "D"]
    assert diamond.get_xydata().tolist() == [[1000, 5]]
    assert [line.get_xdata() for line in axis.lines if line.get_color() == "#888888"] == [[0, 0]]
    assert axis.get_xlabel() == "offline  |  steps of experience"
    assert panels[MAZE].get_xlabel() == "gradient updates"
    _, out, _ = run(tmp_path)
    assert table(out)[MAZE, "finetune iql"] == ["5.0", "50.0", "9.0", "1 (and 1 not finished)", "2,400"]


def test_who_makes_no_offline_update_starts_at_the_switch(make, tmp_path):
    """Its first evaluation is before any step; it makes 100 steps without updates."""
    fields = ONLINE | {"updates": 0, "random_steps": 100}
    folder = make("rlpd", 0, {0: 1.0, 1800: 4.0}, family="finetune", **fields)
    metrics = pd.read_csv(folder / "metrics.csv")
    metrics.assign(**{"online/steps": [np.nan, *[1000.0] * (len(metrics) - 1)]}).to_csv(
        folder / "metrics.csv", index=False)
    lines, _ = drawn(tmp_path)
    assert [list(x) for x, _, width in lines[f"{MAZE}, then online"] if width == 2] == [[0, 1000]]
    assert plot.find_runs([tmp_path])[0]["updates"].tolist() == [1800]


def test_a_second_table_tells_what_became_of_the_score_after_the_switch(make, run, tmp_path):
    """Of finished runs alone; empty where one does not know a number."""
    make("bc")
    _, out, _ = run(tmp_path)
    assert "Regret" not in out
    for seed, (switch, lowest, regret) in enumerate([(30.0, 10.0, 0.5), (40.0, 20.0, 0.25)]):
        known = {"score_at_switch": switch, "lowest_score_after_switch": lowest, "regret": regret}
        make("cql", seed, family="finetune", score=60.0 + seed, **known, **ONLINE)
        make("iql", seed, family="finetune", score=1.0, **(known if seed else {}), **ONLINE)
    make("cql", 2, family="finetune", status="running", **ONLINE)
    _, out, _ = run(tmp_path)
    second = out.partition("\n\n")[2]
    assert "| At the switch | Lowest in the first tenth | Last | Regret |" in second
    assert table(second) == {
        (MAZE, "finetune cql"): ["2", "400", "1,000", "35.0 ± 7.1", "15.0 ± 7.1", "60.5 ± 0.7", "0.38"],
        (MAZE, "finetune iql"): ["2", "400", "1,000", "", "", "1.0 ± 0.0", ""],
    }


def test_no_name_is_cut_off_in_the_legend(make, tmp_path):
    for name in ("cal_ql", "cql", "rlpd"):
        make(name, 0, family="finetune", **ONLINE)
    make("rlpd", 0, family="finetune", variant="scratch", **ONLINE)
    with matplotlib.rc_context(plot.STYLE):
        figure = plot.draw(*plot.find_runs([tmp_path]))
        FigureCanvasAgg(figure).draw()
        (legend,) = figure.legends
        ends = [text.get_window_extent().x1 for text in legend.get_texts()]
    assert max(ends) <= figure.bbox.x1


def test_the_same_seed_in_two_folders_is_two_lines(make, run, tmp_path):
    make("bc", 0, root=tmp_path / "before", score=1.0)
    make("bc", 0, root=tmp_path / "after", score=2.0)
    _, out, _ = run(tmp_path / "before", tmp_path / "after", tmp_path / "before/offline")
    assert table(out) == {
        (MAZE, escape(f"bc in {tmp_path / 'before'}")): ["1.0", "10.0", "9.0", "1", "400"],
        (MAZE, escape(f"bc in {tmp_path / 'after'}")): ["2.0", "20.0", "9.0", "1", "400"],
    }
    folder = tmp_path / "before/offline/bc" / MAZE / "default/seed-0"
    assert [*table(run(folder)[1])] == [(MAZE, "bc")]  # the folder of a run itself
    status, _, err = run(tmp_path)
    assert (status, err) == (
        2, "plot.py: a run is twice below one folder: name the folders that have it one by one\n")


def test_what_is_damaged_is_named_and_skipped(make, run, tmp_path):
    make("bc", 0)
    broken, moved = make("bc", 1), make("bc", 2)
    (broken / "run.json").write_text("{")
    shutil.move(moved, tmp_path / "elsewhere")
    status, out, err = run(tmp_path)
    assert status == 0
    assert table(out)[MAZE, "bc"][3] == "1"
    assert [line.partition(": its record")[0] for line in err.splitlines()] == [
        f"skipped {tmp_path / 'elsewhere'}", f"skipped {broken}"]


@pytest.mark.parametrize(("suffix", "begin"), [(".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_other_kinds_of_pictures(make, run, tmp_path, suffix, begin):
    make("bc")
    assert run(tmp_path, "--output", tmp_path / f"new/picture{suffix}")[0] == 0
    assert (tmp_path / f"new/picture{suffix}").read_bytes().startswith(begin)


def test_errors_are_one_line(make, run, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = [((tmp_path / "none",), "none is no folder"), ((tmp_path / "empty",), "no runs (run.json) in")]
    make("bc", curve={}, status="running")
    cases += [((tmp_path,), "no run has been evaluated yet")]
    cases += [((tmp_path, "--columns", "actor/los"), "no run has actor/los in its metrics.csv; did you mean")]
    cases += [((tmp_path, "--output", tmp_path / "picture.doc"), "ends in none of .png, .pdf, .svg")]
    for arguments, words in cases:
        status, _, err = run(*arguments)
        assert status == 2
        assert err.startswith("plot.py: ")
        assert err.count("\n") == 1
        assert words in err
    assert not list(tmp_path.rglob("*.png"))


def test_runs_of_a_real_script(call, pendulum, run, tmp_path):
    for seed in (0, 1):
        assert call("bc", *short(pendulum, tmp_path, seed=seed))[0] == 0
    status, out, _ = run(tmp_path)
    assert status == 0
    scores = [json.loads(file.read_text())["score"] for file in tmp_path.rglob("run.json")]
    assert table(out)[pendulum, "bc"][0] == f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}"
    assert [list(x) for x, _, _ in drawn(tmp_path)[0][pendulum]] == [[20, 40]] * 3
