"""tools/report.py: statistics against published definitions, tables and figures against sums by hand."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import report
import report_figures as figures
import report_page
import report_statistics as statistics
from conftest import ROOT
from scipy import stats
from scores import COLUMNS, KEY, ONLINE

MAZES = [f"reef/pointmaze/{size}-v0" for size in ("large", "medium", "umaze")]
README = """# Title
<!-- report:begin -->
stale
<!-- report:end -->
The end, with a \\1 in it.
"""
VERSIONS = "numpy==2.4.6 python==3.11.7 torch==2.13.0+cpu"
RECORD = {"commit": "a" * 40, "config_hash": "c" * 64, "dataset_hash": "d" * 64, "device": "cpu: X"}
RECORD |= {"precision": "highest"}


def run(algorithm="bc", dataset=MAZES[2], seed=0, score=10.0, curve=(), **fields) -> list[dict]:
    """The rows of one run, with the scores `curve` at updates 100, 200, ... before the final one."""
    key = {
        "family": "offline",
        "algorithm": algorithm,
        "dataset": dataset,
        "variant": "default",
        "seed": seed,
    }
    final = {
        "phase": "final",
        "update": 100 * max(1, len(curve)),
        "score": score,
        "return_mean": 20.0,
        "success": 0.5,
        "episodes": 100,
        "best_score": 90.0,
        "wall_seconds": 600.0,
        **RECORD,
        "versions": VERSIONS,
        "return_std": 1.0,
        "length_mean": 9.0,
        "updates_per_second": 1.0,
    }
    rows = [
        final
        | {
            "phase": "training",
            "update": 100 * i,
            "score": value,
            "return_mean": 2 * value,
            "episodes": 10,
            "best_score": None,
            "wall_seconds": 60.0 * i,
        }
        | dict.fromkeys(RECORD)
        for i, value in enumerate(curve, 1)
    ]
    names = {name: fields.pop(name) for name in list(fields) if name in KEY}
    return [key | row | names for row in (*rows, final | fields)]


def runs(scores: dict[str, list[list[float]]], datasets=MAZES, **fields) -> list[dict]:
    """Rows of {algorithm: scores of its seeds on each dataset}."""
    return [
        row
        for algorithm, table in scores.items()
        for dataset, values in zip(datasets, table)
        for seed, score in enumerate(values)
        for row in run(algorithm, dataset, seed, score, **fields)
    ]


def two_phases(algorithm="iql", dataset=MAZES[0], seeds=3, score=70.0) -> list[dict]:
    """Rows of runs that go on online at update 400, 10 steps of experience an update."""
    rows = []
    for seed in range(seeds):
        several = run(algorithm, dataset, seed, score, [*range(40, 48)], family="finetune", online_steps=4000,
                      score_at_switch=49.0 + seed, lowest_score_after_switch=20.0, regret=0.4)
        for row in several[:-1]:
            row |= {"phase": "online" if row["update"] > 400 else "offline"}
            row |= {"online_steps": 10 * max(0, row["update"] - 400)}
        rows += several
    return rows


def write(folder: Path, rows: list[dict]) -> None:
    """A folder like results/scores."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.csv"):
        file.unlink()
    columns = COLUMNS + ONLINE if any("online_steps" in row for row in rows) else COLUMNS
    for algorithm, table in pd.DataFrame(rows, columns=columns).groupby("algorithm"):
        table.to_csv(folder / f"{algorithm}.csv", index=False, float_format="%.6g")


def make_root(folder: Path) -> Path:
    """A repository that has nothing but what the report reads."""
    (folder / "docs").mkdir(exist_ok=True)
    for name in ("scores", "online"):
        (folder / f"docs/{name}.md").write_text(README)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def place(monkeypatch, root: Path) -> None:
    """From now on the report is that of this repository."""
    monkeypatch.setattr(report, "ROOT", root)
    monkeypatch.setattr(report_page, "ROOT", root)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    place(monkeypatch, make_root(tmp_path))
    monkeypatch.setattr(statistics, "RESAMPLES", 500)  # what is written is the same of many
    return tmp_path


@pytest.fixture
def record(root):
    """record(rows) writes them; cells and comparisons as the report makes them."""

    def record(rows: list[dict]):
        write(root / "results/scores", rows)
        cells = statistics.gather_cells(statistics.read_scores(root / "results/scores"))
        return cells, [statistics.compare_suite(*group) for group in statistics.by_suite(cells)]

    return record


@pytest.fixture
def without_figures(monkeypatch):
    monkeypatch.setattr(report, "draw_figures", lambda *_: iter(()))


CLEAR = {"iql": [[50, 51, 52], [60, 61, 62], [70, 71, 72]], "bc": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}


def lines_of(text: str, *words: str) -> list[list[str]]:
    """Cells of the lines of tables that begin with these cells."""
    tables = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"
    ]
    return [cells for cells in tables if tuple(cells[: len(words)]) == words]


def report_md(root: Path) -> str:
    return (root / "results/report/report.md").read_text()


# ---------------------------------------------- Statistics ----------------------------------------------


def arrays(*lists) -> list[np.ndarray]:
    return [np.array(values, float) for values in lists]


def iqm(*samples) -> float:
    return statistics.interquartile_mean(*arrays(*samples))


def p(x, y) -> float:
    return statistics.probability_of_improvement(*arrays(*x), *arrays(*y))


def test_the_interquartile_mean_by_hand():
    assert iqm([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx((3 + 4 + 5 + 6) / 4)
    assert iqm([-1e9, 2, 3, 4], [5, 6, 7, 1e9]) == pytest.approx(4.5)
    assert iqm([9, 1, 8], [2, 7, 3], [6, 4, 5]) == pytest.approx(5)  # two of nine are cut off at each end
    assert iqm([9, 1, 8], [2, 7, 3], [60, 40, 50]) == pytest.approx((3 + 7 + 8 + 9 + 40) / 5)
    assert iqm([5]) == 5


def test_the_interquartile_mean_of_equal_seeds_is_scipys():
    rng = np.random.default_rng(0)
    for tasks, seeds in itertools.product(range(1, 6), range(1, 8)):
        samples = list(rng.normal(size=(tasks, seeds)))
        assert iqm(*samples) == pytest.approx(stats.trim_mean(np.concatenate(samples), 0.25))


def test_with_unequal_seeds_every_dataset_weighs_the_same():
    # Weights 1/4 for 0 and 10, 1/8 for the others; floor(6 / 4) / 6 = 1/6 is cut off at each end, which
    # leaves 1/12 of 0, 1/8 of 1, 2, 3 and 4, and 1/12 of 10, of 2/3 in all.
    assert iqm([0, 10], [1, 2, 3, 4]) == pytest.approx((10 / 8 + 10 / 12) / (2 / 3))
    assert iqm([0, 0, 8, 8], [1, 1, 2, 2]) == pytest.approx(iqm([0, 8], [1, 2]))
    thresholds, samples = np.array([-1.0, 0, 5, 10]), arrays([0, 10], [1, 2, 3, 4])
    profile = statistics.profile(samples, thresholds, np.random.default_rng(0)).value
    assert profile == pytest.approx([1, 0.75, 0.25, 0])  # above, not at


def test_the_probability_of_improvement_by_hand():
    assert p([[1, 2, 3]], [[2, 2, 4]]) == pytest.approx((0 + 1 + 2) / 9)
    assert p([[1, 2, 3], [5, 6]], [[2, 2, 4], [1]]) == pytest.approx((3 / 9 + 1) / 2)
    rng = np.random.default_rng(1)
    x, y = ([rng.integers(9, size=n) for n in sizes] for sizes in ((3, 5, 2), (4, 1, 6)))
    shares = [stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(x, y)]
    assert p(x, y) == pytest.approx(np.mean(shares))
    assert p(x, y) + p(y, x) == pytest.approx(1)


def test_the_numbers_of_rliable(monkeypatch):
    """What rliable 1.2.0 gives (arch 5.6, pandas 2.0; 50,000 samples, 2,000 for P, 5,000 for the profile)."""
    monkeypatch.setattr(statistics, "RESAMPLES", 50_000)
    x = arrays(
        [20, 17.7, 17.5, 20.5, 13.3],
        [53, 40.1, 43.8, 40.7, 45.4],
        [77.8, 80.5, 83.9, 79.8, 64.8],
        [7.3, 14, 11.1, 12.1, 6.1],
    )
    y = arrays(
        [8.8, 18.8, 17.8, 13.1, 17.8],
        [41.6, 42.1, 45.1, 35.9, 52.8],
        [71.9, 61.9, 69.8, 90.5, 77.3],
        [9.8, 7.4, 7.6, 6.6, 8.7],
    )
    rng = np.random.default_rng(0)
    for samples, value, low, high in ((x, 31.27, 29.09, 33.64), (y, 29.48, 26.59, 32.39)):
        found = statistics.interval(statistics.interquartile_mean, samples, rng)
        assert found.value == pytest.approx(value)
        assert found[1:] == pytest.approx((low, high), abs=0.1)
    found = statistics.interval(statistics.probability_of_improvement, [*x, *y], rng)
    assert found.value == pytest.approx(0.63)
    assert found[1:] == pytest.approx((0.44, 0.82), abs=0.015)
    found = statistics.profile(x, np.array([0, 10, 20, 40, 60, 80.0]), rng)
    assert found.value == pytest.approx([1, 0.9, 0.55, 0.5, 0.25, 0.1])
    assert found.low == pytest.approx([1, 0.8, 0.5, 0.5, 0.25, 0])
    assert found.high == pytest.approx([1, 1, 0.65, 0.5, 0.25, 0.2])


def test_the_bootstrap_draws_runs_anew_within_their_dataset():
    """Were runs drawn from all datasets, means of tens and of hundreds would mix."""
    seen = []

    def spy(*samples, axis):
        seen.append(samples)
        return sum(one.mean(axis) for one in samples)

    statistics.interval(spy, arrays([1, 2, 3, 4], [500, 600]), np.random.default_rng(0))
    (few, many) = next(samples for samples in seen if samples[0].ndim > 1)
    assert few.shape == (statistics.RESAMPLES, 4)
    assert many.shape == (statistics.RESAMPLES, 2)
    assert {*few.ravel()} == {1, 2, 3, 4}
    assert {*many.ravel()} == {500, 600}
    assert few.mean(1).var() == pytest.approx(1.25 / 4, rel=0.1)  # with replacement
    assert abs(np.corrcoef(few.mean(1), many.mean(1))[0, 1]) < 0.05


def test_an_interval_is_95_percent_of_the_samples():
    def sorted_means(scores, axis):
        return np.linspace(0, 1, len(scores)) if scores.ndim > 1 else scores.mean()

    found = statistics.interval(sorted_means, arrays([0.1 + 0.2, 0.1 + 0.2]), np.random.default_rng(0))
    assert found == (0.3, 0.025, 0.975)  # rounded: equal on every machine
    assert statistics.Interval(1.234, -0.04, 5).show(1) == "1.2 [0.0, 5.0]"  # no -0.0


def test_the_permutation_test():
    rng = np.random.default_rng(0)
    x, y = [4, 5, 6], [1, 2, 3]
    assert statistics.permutation_test(arrays(x), arrays(y), rng) == pytest.approx(2 / 20, abs=0.02)
    assert statistics.permutation_test(arrays(y), arrays(x), rng) == pytest.approx(2 / 20, abs=0.02)
    assert statistics.permutation_test(arrays(x, x), arrays(y, y), rng) == pytest.approx(2 / 400, abs=0.004)
    assert statistics.permutation_test(arrays(x, y), arrays(y, x), rng) == 1  # one won, one lost
    a, b = [1, 5, 6, 9, 12], [2, 3, 4, 8]
    exact = stats.permutation_test((a, b), lambda a, b: stats.mannwhitneyu(a, b).statistic, n_resamples=1e6)
    assert statistics.permutation_test(arrays(a), arrays(b), rng) == pytest.approx(exact.pvalue, abs=0.03)


@pytest.mark.parametrize(
    ("p", "scores", "better"),
    [(0.0, CLEAR["iql"], True), (0.0, [[1, 9, 8]] * 3, False), (1.0, CLEAR["iql"], False)],
)
def test_better_takes_both_the_interval_and_the_permutation_test(record, monkeypatch, p, scores, better):
    monkeypatch.setattr(statistics, "permutation_test", lambda *_: p)
    (one,) = record(runs({"iql": scores, "bc": [[2, 3, 10]] * 3 if scores != CLEAR["iql"] else CLEAR["bc"]}))[
        1
    ]
    low, high = one.improvement["iql", "bc"][1:]
    assert (low > 0.5) == (scores == CLEAR["iql"])
    assert high > 0.5
    assert one.better == ({("iql", "bc")} if better else set())


def test_equal_algorithms_are_seldom_called_better(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    rng = np.random.default_rng(0)

    def trial(datasets: int) -> tuple[bool, bool]:
        """Whether one is called better; whether the interval alone would have said so."""
        x, y = ([rng.normal(50, 5, 3) for _ in range(datasets)] for _ in "xy")
        _, low, high = statistics.interval(statistics.probability_of_improvement, [*x, *y], rng)
        alone = low > 0.5 or high < 0.5
        return alone and statistics.permutation_test(x, y, rng) <= 0.05, alone

    better, alone = np.mean([trial(1) for _ in range(100)], axis=0)
    assert better == 0  # with 3 seeds of one dataset nothing can be beyond chance
    assert 0.1 < alone < 0.3  # as the docstring says
    assert np.mean([trial(3)[0] for _ in range(100)]) <= 0.08


def test_differences_have_welchs_interval():
    rng = np.random.default_rng(0)
    for sizes in ((3, 3), (3, 5), (10, 4)):
        before, after = (rng.normal(size=n) * scale for n, scale in zip(sizes, (1, 4)))
        ends = stats.ttest_ind(after, before, equal_var=False).confidence_interval()
        assert statistics.difference(before, after) == pytest.approx((after.mean() - before.mean(), *ends))
    assert statistics.difference(np.ones(3), np.full(3, 2.5)) == (1.5, 1.5, 1.5)


# ------------------------------------------- Who is compared --------------------------------------------


def test_what_is_compared(record):
    scores = CLEAR | {"awac": [[9, 9, 9]], "dt": [[1, 1], [1, 1], [1, 1]]}
    variant = runs({"iql": CLEAR["iql"]}, variant="wide") + runs({"bc": [[0, 0, 0]] * 2}, variant="top10")
    (one,) = record(runs(scores) + variant)[1]
    assert one.suite == "reef/pointmaze"
    assert one.datasets == MAZES
    assert [*one.cells] == ["iql", "iql wide", "bc"]  # the best IQM first
    assert one.left_out == ["awac", "bc top10", "dt"]  # one dataset, two datasets, two seeds
    assert one.iqm["iql"].value == pytest.approx(stats.trim_mean(np.ravel(CLEAR["iql"]), 0.25))
    assert one.improvement["iql", "bc"].value == 1
    assert one.improvement["bc", "iql"].value == 0
    assert one.better == {("iql", "bc"), ("iql wide", "bc")}


def test_the_largest_table_without_a_gap(record):
    many = {name: [[1, 2, 3]] for name in ("awac", "bcq", "cql")}
    (one,) = record(runs(CLEAR | many))[1]
    assert [*one.cells] == ["iql", "bc"]  # 2 algorithms x 3 datasets rather than 5 x 1
    (one,) = record(runs(CLEAR | many | {"dt": [[1, 2, 3]], "edac": [[1, 2, 3]]}))[1]
    assert len(one.cells) == 7
    assert one.datasets == MAZES[:1]
    (one,) = record(
        runs(CLEAR)
        + runs({"iql": [[1, 2, 3]]}, variant="a")
        + runs({name: [[1, 2, 3]] for name in ("bc",)}, variant="b")
        + [row for name in "cdefgh" for row in runs({"iql": [[1, 2, 3]]}, variant=name)]
    )[1]
    assert one.datasets == MAZES  # variants do not take part in the choice


@pytest.mark.parametrize("fields", [{"score": None}, {"dataset_hash": "e" * 64}])
def test_cells_without_score_or_with_other_data_are_not_compared(record, fields):
    rows = runs(CLEAR)
    for row in rows:
        if row["algorithm"] == "iql" and row["dataset"] == MAZES[0]:
            row |= fields
    (one,) = record(rows)[1]
    assert one.datasets == MAZES[1:]


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"update": 40_000}, "mixed: updates 100 and 40,000"),
        ({"dataset_hash": "e" * 64}, "mixed: 2 versions of the data"),
    ],
)
def test_mixed_cells_say_so_and_are_not_compared(root, record, fields, note, without_figures):
    rows = runs(CLEAR)
    next(row for row in rows if row["algorithm"] == "iql" and row["dataset"] == MAZES[0]).update(fields)
    (one,) = record(rows)[1]
    assert one.datasets == MAZES[1:]
    assert report.main([]) == 0
    (mixed,) = [cells for cells in lines_of(report_md(root), MAZES[0]) if "[iql]" in cells[1]]
    assert mixed[2] == f"51.0 ± 1.0 ({note})"
    page = (root / "results/report/index.html").read_text()
    assert page.count(f'"mixed":"{note}"') == 1
    assert report_md(root).count("mixed") == 1


def test_suites(record):
    datasets = [
        "reef/hopper/medium-v1",
        "reef/walker2d/expert-v1",
        "D4RL/pen/human-v2",
        "D4RL/pointmaze/umaze-v2",
        "mine/logs-v0",
        "alone-v0",
    ]
    cells, _ = record(runs({"bc": [[1]] * 6}, datasets) + runs({"iql": [[1]]}, datasets, family="finetune"))
    assert {cell.dataset: cell.suite for cell in cells if cell.algorithm == "bc"} == dict(
        zip(
            datasets,
            ["reef/locomotion", "reef/locomotion", "D4RL/adroit", "D4RL/pointmaze", "mine", "alone-v0"],
        )
    )
    (other,) = [cell for cell in cells if cell.algorithm == "iql"]
    assert other.suite == "finetune: reef/locomotion"  # which saw more than the data
    assert other.learner == "finetune iql"


# ------------------------------------------- What is written --------------------------------------------


def test_the_readme_claims_what_the_intervals_support(root, record, without_figures):
    rows = runs(CLEAR | {"awac": [[3, 2, 1], [5, 6, 4], [8, 9, 7]]})
    record(rows + runs({"bc": [[1, 2, 3]]}, ["reef/hopper/medium-v1"]))
    assert report.main([]) == 0
    text = (root / "docs/scores.md").read_text()
    block = text.partition("<!-- report:begin -->\n")[2].partition("<!-- report:end -->")[0]
    assert text == README.replace("stale\n", block)
    best, *equals = lines_of(block, "reef/pointmaze")
    assert best[:5] == ["reef/pointmaze", "3", "iql", "9", "100"]
    assert re.fullmatch(r"61\.0 \[6\d\.\d, 6\d\.\d\]", best[5])
    assert best[6] == "1.00 [1.00, 1.00]"
    assert sorted(best[7].split(", ")) == ["awac", "bc"]
    assert {cells[2]: cells[7] for cells in equals} == {"awac": "", "bc": ""}
    assert {cells[2]: cells[6][:4] for cells in equals} == {"awac": "0.50", "bc": ""}
    assert "Not compared, for want of seeds, scores or a second algorithm: reef/locomotion." in block
    assert "at least 3 seeds" in block
    for link in re.findall(r"\]\((results/[^)]+)\)", block):
        assert (root / link).exists() or link.endswith(".png")  # figures are left out here


def test_who_imitates_among_choices_is_beaten_too(root, record, without_figures):
    """Outside algorithms/offline its name begins with the family's."""
    cells = {"bc": [[1, 2, 3]] * 3, "cql": [[7, 8, 9]] * 3}
    _, (one,) = record(runs(cells, family="discrete"))
    assert figures.baseline_of(one) == "discrete bc"
    assert report.main([]) == 0
    rows = lines_of((root / "docs/scores.md").read_text(), one.suite)
    assert {row[2]: row[6] for row in rows} == {"discrete cql": "1.00 [1.00, 1.00]", "discrete bc": ""}


def test_nothing_is_claimed_of_few_seeds(root, record, without_figures):
    record(runs({"bc": [[1, 2]] * 3, "iql": [[50, 51]] * 3}))
    assert report.main([]) == 0
    text = (root / "docs/scores.md").read_text()
    assert "No two algorithms have 3 seeds with scores of the same dataset: none is compared." in text
    assert "Better" not in text
    assert "aggregates" not in text + report_md(root)
    assert "IQM" not in report_md(root)


def test_a_row_has_all_of_a_cell(root, record, without_figures):
    rows = run(
        seed=0, score=10.0, curve=[1, 2], best_score=30.0, success=0.5, return_mean=7.0, wall_seconds=3600.0
    )
    rows += run(
        seed=1,
        score=20.0,
        curve=[1, 2],
        best_score=40.0,
        success=0.7,
        return_mean=9.0,
        wall_seconds=7200.0,
        commit="a" * 40 + " " + "b" * 40 + "+",  # begun under one, ended under the other
    )
    record(rows + run("iql", score=None, success=None, best_score=None, return_mean=-12.34))
    card = root / f"results/cards/{MAZES[2]}.md"
    card.parent.mkdir(parents=True)
    card.touch()
    assert report.main([]) == 0
    (cells,) = lines_of(report_md(root), MAZES[2], f"[bc](../../configs/offline/bc/{MAZES[2]}.yaml)")
    assert cells[2:] == [
        "15.0 ± 7.1",
        "8.0 ± 1.4",
        "60.0 ± 14.1 %",
        "35.0 ± 7.1",
        "2",
        "200",
        "1.50",
        "`aaaaaaa` `bbbbbbb+`",
        f"[`dddddddd`](../cards/{MAZES[2]}.md)",
    ]
    (header,) = lines_of(report_md(root), "Dataset", "Algorithm", "Score")
    assert header[5] == "Best on the way"
    assert "The best score on the way was chosen with the simulator" in report_md(root)
    (cells,) = lines_of(report_md(root), MAZES[2], f"[iql](../../configs/offline/iql/{MAZES[2]}.yaml)")
    assert cells[2:7] == ["", "-12.3", "", "", "1"]


def test_tuning_cost(root, record, without_figures):
    rows = runs({"iql": [[10, 20], [5]]}, curve=[1, 2])
    rows += runs({"iql": [[40]]}, variant="wide", curve=[1, 2]) + runs(
        {"iql": [[2]]}, variant="thin", curve=[1, 2]
    )
    rows += runs({"bc": [[1]]})
    record(rows)
    assert report.main([]) == 0
    (cells,) = lines_of(report_md(root), "offline/iql")
    # Five runs of 200 updates, 10 minutes, 100 final episodes and two evaluations of 10
    assert cells == ["offline/iql", "3", "2", "5", "1,000", "600", "0.8"]
    (cells,) = lines_of(report_md(root), MAZES[0], "offline/iql")
    assert cells == [MAZES[0], "offline/iql", "3", "4", "2.0 (thin)", "40.0 (wide)", "25.0", "0.7"]
    assert not lines_of(report_md(root), MAZES[1], "offline/iql")


def test_curves_have_the_updates_that_all_seeds_were_evaluated_at(record):
    rows = run(seed=0, curve=[1, 2, 3, 4]) + run(seed=1, curve=[5, 6, 10, 8])
    rows = [row for row in rows if (row["seed"], row["update"]) != (1, 200)]
    (cell,), _ = record(rows)
    assert list(cell.curve.index) == [100, 300, 400]
    assert cell.curve["score"].to_dict("list") == {"mean": [3, 6.5, 6], "min": [1, 3, 4], "max": [5, 10, 8]}
    assert list(cell.curve["wall_seconds", "mean"]) == [60, 180, 240]
    rows += run(seed=2)  # never evaluated on the way
    (cell,), _ = record(rows)
    assert cell.curve.empty


def test_figures(record):
    rows = [
        row
        for name, table in CLEAR.items()
        for dataset, scores in zip(MAZES, table)
        for seed, score in enumerate(scores)
        for row in run(name, dataset, seed, score, curve=[seed, 2, 4])
    ]
    drawn = dict(figures.draw_figures(*record(rows)))
    assert [*drawn] == ["aggregates", "profiles", "curves-reef-pointmaze", "time-reef-pointmaze"]
    for kind, x, end, label in (
        ("curves", [100, 200, 300], 300, "gradient updates"),
        ("time", [1, 2, 3], 10, "minutes of training and evaluation"),
    ):
        figure = drawn[f"{kind}-reef-pointmaze"]
        assert [axis.get_title(loc="left") for axis in figure.axes] == MAZES
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["bc", "iql"]
        colors = {line.get_label(): line.get_color() for line in legend.get_lines()}
        axis = figure.axes[0]
        assert axis.get_xlabel() == label
        assert axis.get_ylabel() == "score"
        curves = {line.get_color(): line for line in axis.lines if len(line.get_xdata()) == 3}
        ends = {line.get_color(): line for line in axis.lines if len(line.get_xdata()) == 1}
        assert list(curves[colors["iql"]].get_xdata()) == x
        assert list(curves[colors["iql"]].get_ydata()) == [1, 2, 4]
        assert ends[colors["iql"]].get_xydata().tolist() == [[end, 51]]
        assert ends[colors["bc"]].get_xydata().tolist() == [[end, 2]]
        low, high = axis.collections[0].get_datalim(axis.transData).intervaly
        assert (low, high) == (0, 4)  # from the lowest seed to the highest
    left, right = drawn["aggregates"].axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["iql", "bc"]
    points = [line.get_xydata().tolist() for line in left.lines if len(line.get_xdata()) == 1]
    assert points == [[pytest.approx([61, 0])], [pytest.approx([5, 1])]]
    (point,) = [line.get_xydata().tolist() for line in right.lines if line.get_marker() == "o"]
    assert point == [[1, 0]]
    (axis,) = drawn["profiles"].axes
    assert [line.get_ydata()[0] for line in axis.lines] == pytest.approx([1, 8 / 9])  # bc's lowest is at 1


def test_offline_then_online(root, record, without_figures):
    cells, comparisons = record(two_phases() + runs({"iql": [[1, 2, 3]]}, curve=[1, 2]))
    assert [one.suite for one in comparisons] == ["finetune: reef/pointmaze", "reef/pointmaze"]
    figure = dict(figures.draw_figures(cells, comparisons))["curves-finetune-reef-pointmaze"]
    (axis,) = figure.axes
    curve, end = [line for line in axis.lines if line.get_color() != "#888888"][::-1]
    assert list(curve.get_xdata()) == [-750, -500, -250, 0, 1000, 2000, 3000, 4000]  # a quarter is offline
    assert list(curve.get_ydata()) == [*range(40, 48)]
    assert end.get_xydata().tolist() == [[4000, 70]]
    assert [line.get_xdata() for line in axis.lines if line.get_color() == "#888888"] == [[0, 0]]
    assert axis.get_xlabel() == "offline  |  steps of experience"
    assert min(axis.get_xticks()) == 0
    assert report.main([]) == 0
    (cells,) = [cells for cells in lines_of(report_md(root), MAZES[0], "finetune iql") if len(cells) == 9]
    assert cells[2:] == ["3", "400", "4,000", "50.0 ± 1.0", "20.0 ± 0.0", "70.0 ± 0.0", "0.40"]
    assert cells in lines_of((root / "docs/online.md").read_text(), MAZES[0], "finetune iql")


def test_long_runs_are_drawn_in_hours_and_returns_where_there_is_no_score(record):
    rows = run("bc", MAZES[0], score=None, return_mean=7.0, wall_seconds=4 * 3600.0)
    (axis,) = dict(figures.draw_figures(*record(rows)))["time-reef-pointmaze"].axes
    assert axis.get_xlabel().startswith("hours")
    assert axis.get_ylabel() == "return"
    assert axis.lines[0].get_xydata().tolist() == [[4, 7]]


def test_names_are_no_markdown(root, record, without_figures):
    record(run("bc", "mine/a|b_<i>*x*-v0", variant="[big]_") + run("bc", MAZES[0]))
    assert report.main([]) == 0
    name = r"mine/a\|b\_\<i\>\*x\*-v0"
    link = r"[bc \[big\]\_](../../configs/offline/bc/mine/a%7Cb_%3Ci%3E%2Ax%2A-v0-%5Bbig%5D_.yaml)"
    assert f"| {name} | {link} |" in report_md(root)
    assert f"| {MAZES[0]} | [bc](" in report_md(root)


def test_a_long_id_stands_in_lines_that_a_panel_has_room_for(record):
    name = "reef/ogbench/pointmaze-medium-navigate-v0"
    (axis,) = dict(figures.draw_figures(*record(run("bc", name, curve=[1, 2]))))["curves-reef-ogbench"].axes
    lines = axis.get_title("left").splitlines()
    assert "".join(lines[:2]) == name
    assert max(map(len, lines[:2])) <= 34


def test_panels_say_what_is_not_alike(record):
    rows = run("bc", MAZES[0], curve=[1, 2]) + run("iql", MAZES[0], 0) + run("iql", MAZES[0], 1)
    (axis,) = dict(figures.draw_figures(*record(rows)))["curves-reef-pointmaze"].axes
    assert axis.get_title("left") == f"{MAZES[0]}\none seed: bc\nunequal updates: 100 to 200"


def test_many_algorithms_look_different(record):
    cells, _ = record([row for i in range(16) for row in run(f"a{i:02}")])
    assert len(set(figures.looks(cells).values())) == 16


def test_many_algorithms_take_several_panels(record):
    """The best first, each panel before the others' curves, all with one scale."""
    rows = [row for i in range(9) for seed in range(3)
            for row in run(f"a{i}", MAZES[0], seed, score=10 * i + seed, curve=[i, 10 * i + 5])]
    drawn = dict(figures.draw_figures(*record(rows)))
    for name in ("profiles", "curves-reef-pointmaze"):
        first, second = drawn[name].axes
        titles = [axis.get_title("left").splitlines()[1] for axis in (first, second)]
        assert titles == ["1 of 2, best first", "2 of 2, best first"]
        colors = [[line.get_color() for line in axis.lines] for axis in (first, second)]
        assert [shown.count(figures.BEHIND["color"]) for shown in colors] == [4, 5]
        assert first.get_ylim() == second.get_ylim()
    for axis, means in ((first, {81, 71, 61, 51, 41}), (second, {31, 21, 11, 1})):
        assert {line.get_ydata()[0] for line in axis.lines if line.get_marker() == "D"} == means


def test_panels_keep_their_height_under_a_long_legend():
    heights = []
    for count in (2, 14):
        figure, (axis,) = figures.panels(1)
        names = [f"finetune learner {number}" for number in range(count)]
        figures.add_legend(figure, names, dict(zip(names, figures.LOOKS)))
        figure.draw_without_rendering()
        heights.append(axis.get_position().height * figure.get_figheight())
    assert heights[1] > 0.8 * heights[0]


def test_the_same_files_every_time(root, record):
    record(runs(CLEAR, MAZES[:1], curve=[1, 2]))
    folder = root / "results/report"
    folder.mkdir(parents=True)
    (folder / "curves-gone.png").touch()  # of a suite that is no longer there
    (folder / "notes.txt").touch()
    assert report.main([]) == 0
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    names = ["aggregates", "profiles", "curves-reef-pointmaze", "time-reef-pointmaze"]
    pictures = {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert {*first} == pictures | {"report.md", "index.html", "notes.txt"}
    for name in pictures:
        assert first[name].startswith(b"\x89PNG" if name.endswith("png") else b"%PDF")
        assert b"CreationDate" not in first[name]
    assert report.main([]) == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first
    links = re.findall(r"\]\(([^)]+)\)", first["report.md"].decode())
    assert {*links} >= pictures | {"index.html"}
    for link in {*links} - pictures - {"index.html"}:
        assert Path(os.path.normpath(ROOT / "results/report" / link)).exists()  # configs and report.py


def test_check_tells_what_is_stale(root, record, capsys, without_figures):
    record(runs(CLEAR))
    assert report.main(["--check"]) == 1
    files = "results/report/report.md", "results/report/index.html", "docs/scores.md", "docs/online.md"
    expected = f"stale: {', '.join(files)}: make report\n"
    assert capsys.readouterr().out == expected
    assert (root / "docs/scores.md").read_text() == README
    assert not (root / "results/report").exists()
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    for name in ("docs/scores.md", "results/report/report.md", "results/report/index.html"):
        text = (root / name).read_text()
        (root / name).write_text(
            text.replace("51.0" if "report/" in name else "61.0", "99.0").replace('"iql"', '"ibl"')
        )
        capsys.readouterr()
        assert report.main(["--check"]) == 1, name
        assert capsys.readouterr().out == f"stale: {name}: make report\n"
        (root / name).write_text(text)
    write(root / "results/scores", runs(CLEAR | {"iql": [[1, 1, 1]] * 3}))
    assert report.main(["--check"]) == 1


def test_the_committed_report_is_not_stale():
    command = [sys.executable, "tools/report.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_half_written(root, record, monkeypatch, without_figures):
    record(runs(CLEAR))
    assert report.main([]) == 0
    before = {
        file: file.read_bytes() for file in root.rglob("*.*") if file.is_file() and file.suffix != ".csv"
    }
    write(root / "results/scores", runs(CLEAR | {"iql": [[1, 1, 1]] * 3}))
    monkeypatch.setattr(Path, "replace", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
        report.main([])
    after = {
        file: file.read_bytes() for file in root.rglob("*.*") if file.is_file() and file.suffix != ".csv"
    }
    assert after == before


def test_the_page_has_its_data_inside(root, record, without_figures):
    record(runs(CLEAR, datasets=["mine/</script><b>-v0", *MAZES[1:]], curve=[1, 2], update=1_234_567))
    assert report.main([]) == 0
    page = (root / "results/report/index.html").read_text()
    assert not re.findall(r"<link|<img|<script[^>]+src|@import|url\(|fetch\(|XMLHttp", page)
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    (cell,) = [cell for cell in data["cells"] if cell["name"] == f"offline/iql/{MAZES[1]}/default"]
    assert cell["config"] == f"configs/offline/iql/{MAZES[1]}.yaml"
    assert cell["runs"]["score"] == [60, 61, 62]
    assert cell["runs"]["best"] == [90, 90, 90]
    assert cell["runs"]["seed"] == [0, 1, 2]
    assert cell["runs"]["updates"] == [1_234_567] * 3  # every digit
    for name, value in RECORD.items():
        assert cell["runs"][name] == [value] * 3
    assert cell["curve"]["updates"] == [100, 200]
    assert cell["curve"]["seconds"] == [60, 120]
    assert cell["curve"]["score"] == {"mean": [1, 2], "min": [1, 2], "max": [1, 2]}
    assert data["cells"][0]["dataset"] == "mine/</script><b>-v0"


def test_the_page_links_the_repository_where_it_is_known(root, record, without_figures):
    record(runs(CLEAR))
    with (root / "pyproject.toml").open("a") as file:
        file.write('\n[project.urls]\nRepository = "https://example.org/reef/"\n')
    assert report.main([]) == 0
    assert '"repository":"https://example.org/reef"' in (root / "results/report/index.html").read_text()


# ------------------------------------------ Comparing versions ------------------------------------------


def compare(capsys, a, b) -> dict[tuple[str, str], list[str]]:
    """Lines of the table by dataset and algorithm; the rest of the text under None."""
    assert report.main(["--compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line[:1] == "|"]
    return {tuple(cells[:2]): cells[2:] for cells in lines} | {None: out}


def test_two_folders_are_compared(root, tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    same = [[7, 8, 9]]
    before = {
        "bc": [[10, 11, 12]],
        "iql": [[10, 11, 12]],
        "awac": [[10, 20, 30]],
        "dt": same,
        "cql": same,
        "xql": same,
        "edac": [[1]],
        "bcq": [[1, 2]],
        "gone": same,
        "spot": [[0, 0, 0]],
        "bear": [[0, 0, 0]],
    }
    after = {
        "bc": [[20, 21, 22]],
        "iql": [[0, 1, 2]],
        "awac": [[12, 25, 28]],
        "dt": same,
        "cql": same,
        "xql": same,
        "edac": [[100]],
        "bcq": [[100, 101, 102]],
        "new": same,
        "spot": [[1, 1, 1]],
        "bear": [[0, 0, 0]],
    }
    write(a, runs(before))
    rows = runs(after)
    for row in rows:
        row |= {"cql": {"update": 40_000}, "xql": {"dataset_hash": "e" * 64}}.get(row["algorithm"], {})
        row["seed"] += 3 * (row["algorithm"] == "bear")  # other seeds, the same scores
    write(b, rows)
    found = compare(capsys, a, b)
    verdicts = {name: cells[-1] for (_, name), cells in list(found.items())[2:-1]}
    assert verdicts == {
        "bc": "rose",
        "iql": "fell",
        "spot": "rose",
        "awac": "no move",
        "dt": "same scores",
        "bear": "no move",
        "edac": "undecidable: fewer than 3 seeds",
        "bcq": "undecidable: fewer than 3 seeds",
        "cql": "not comparable: other updates",
        "xql": "not comparable: other data",
    }
    low, high = stats.ttest_ind([20, 21, 22], [10, 11, 12], equal_var=False).confidence_interval()
    assert found[MAZES[0], "bc"][:3] == [
        "11.0 ± 1.0 (seeds: 3)",
        "21.0 ± 1.0 (seeds: 3)",
        f"10.0 [{low:.1f}, {high:.1f}]",
    ]
    assert found[MAZES[0], "edac"][:3] == ["1.0 (seeds: 1)", "100.0 (seeds: 1)", "99.0"]
    assert "3 of 5 decidable cells moved; of as many unchanged ones 0.2 would seem to." in found[None]
    assert f"Only in A: offline/gone/{MAZES[0]}/default." in found[None]
    assert f"Only in B: offline/new/{MAZES[0]}/default." in found[None]


def test_returns_are_compared_where_there_is_no_score(root, tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, level in ((a, 0), (b, 1000)):
        rows = runs({"bc": [[1, 2, 3]]})
        for row in rows:
            row |= {"return_mean": row["score"] + level, "score": None}
        write(folder, rows)
    found = compare(capsys, a, b)
    assert found[MAZES[0], "bc"][-1] == "rose"
    assert "1 of 1 decidable" in found[None]
    assert "Nothing is decidable." in compare(capsys, a, a)[None]


def test_the_records_of_two_commits_are_compared(root, capsys):
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", *words], cwd=root, check=True)

    git("init", "-q")
    for name, scores in (("before", [10, 11, 12]), ("after", [30, 31, 32])):
        write(root / "results/scores", runs({"bc": [scores]}))
        git("add", "results/scores")
        git("commit", "-qm", name)
        git("tag", name)
    found = compare(capsys, "before", "after")
    assert found[MAZES[0], "bc"] == [
        "11.0 ± 1.0 (seeds: 3)",
        "31.0 ± 1.0 (seeds: 3)",
        "20.0 [17.7, 22.3]",
        "rose",
    ]
    assert report.main(["--compare", "before", "nowhere"]) == 2
    problem = "nowhere is neither a folder of scores nor a commit that has results/scores"
    assert capsys.readouterr() == ("", f"report.py: {problem}\n")


# ------------------------------------------- What goes wrong --------------------------------------------


def change(old: str, new: str):
    return lambda text: text.replace(old, new, 1)


BAD = {
    "empty": (lambda _: "", "line 1 is not family,algorithm,dataset"),
    "header": (change("dataset,", "data,"), "line 1 is not family,algorithm,dataset"),
    "short": (lambda text: text + "offline,bc\n", "line 11 has 2 of 22 fields"),
    "long": (lambda text: text.rstrip() + ",1\n", "line 10 has 23 of 22 fields"),
    "word": (change(",training,1,", ",training,high,"), "line 2: score cannot be 'high'"),
    "infinite": (change(",training,1,", ",training,inf,"), "line 2: score cannot be 'inf'"),
    "missing": (change("default,0,100,", "default,0,,"), "line 2: update cannot be ''"),
    "phase": (change(",training,1,", ",trial,1,"), "line 2: phase cannot be 'trial'"),
    "twice": (change("default,0,200,", "default,0,100,"), "line 3 is an evaluation that an earlier line has"),
    "unfinished": (change("default,1,200,final", "default,2,200,final"), "has 0 final evaluations"),
    "finished twice": (change("default,1,100,training", "default,1,100,final"), "has 2 final evaluations"),
    "binary": (lambda _: "\0\n1", "line 1 is not"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("arguments", [[], ["--check"], ["--compare", "SCORES", "SCORES"]])
def test_a_malformed_file_is_named(root, capsys, case, arguments):
    mistake, problem = BAD[case]
    write(root / "results/scores", [row for seed in range(3) for row in run(seed=seed, curve=[1, 2])][:9])
    file = root / "results/scores/bc.csv"
    if case == "unfinished":
        write(root / "results/scores", run(seed=0, curve=[1, 2]) + run(seed=1, curve=[1, 2])[:2])
        mistake = str
    text = file.read_text()
    file.write_text(mistake(text))
    assert file.read_text() != text or case == "unfinished"
    folder = str(root / "results/scores")
    assert report.main([folder if word == "SCORES" else word for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("report.py: ")
    assert err.count("\n") == 1
    assert problem in err
    assert str(root / "results/scores") in err
    assert (root / "docs/scores.md").read_text() == README
    assert not (root / "results/report").exists()


def test_what_is_not_text_is_named(root, capsys):
    write(root / "results/scores", run())
    (root / "results/scores/bc.csv").write_bytes(b"\xff\xfe\x00")
    assert report.main([]) == 2
    assert re.match(r"report.py: cannot read .*bc\.csv: .*\n$", capsys.readouterr().err)


def test_without_scores_or_a_place_in_the_readme_nothing_is_written(root, capsys):
    assert report.main([]) == 2
    assert (
        capsys.readouterr().err == f"report.py: no scores in {root}/results/scores: train, then make scores\n"
    )
    write(root / "results/scores", run())
    file = root / "results/scores/bc.csv"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    assert report.main([]) == 2
    assert "no scores in" in capsys.readouterr().err
    write(root / "results/scores", runs(CLEAR))
    broken = README.replace("<!-- report:begin -->\n", ""), README.replace("<!-- report:end -->", "")
    for name, text in itertools.product(("online", "scores"), broken):
        (root / f"docs/{name}.md").write_text(text)
        assert report.main([]) == 2
        assert re.match(rf"report.py: docs/{name}.md has no place .*\n$", capsys.readouterr().err)
        assert (root / f"docs/{name}.md").read_text() == text
        assert not (root / "results/report").exists()
        (root / f"docs/{name}.md").write_text(README)


def test_no_disk_is_one_line(root, monkeypatch, capsys, without_figures):
    write(root / "results/scores", runs(CLEAR))
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert report.main([]) == 2
    assert "No space left" in capsys.readouterr().err
    assert (root / "docs/scores.md").read_text() == README


def test_many_learners_in_a_process_of_its_own(tmp_path):
    root, rng = make_root(tmp_path), np.random.default_rng(0)
    rows = [row for name, seed in itertools.product("abcdefghij", range(3))
            for row in run(name, "mine/logs-v0", seed, rng.normal(50, 20), curve=rng.normal(50, 20, 5))]
    write(root / "results/scores", rows)
    (root / "tools").mkdir()
    for name in ("common.py", "scores.py", "report.html"):
        shutil.copy(ROOT / "tools" / name, root / "tools")
    for file in (ROOT / "tools").glob("report*.py"):
        shutil.copy(file, root / "tools")
    command = [sys.executable, "tools/report.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("results/report: 10 cells, ")
    assert (root / "results/report/index.html").exists()
