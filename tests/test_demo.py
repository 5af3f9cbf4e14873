"""tools/demo.py at a small scale: three runs, their scores and a picture; called again, nothing is redone."""

import importlib.util
import re
import sys
from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
MAZE = "reef/pointmaze/umaze-v0"
SMALL = {"updates": 60, "eval_every": 20, "log_every": 20, "eval_episodes": 3, "final_eval_episodes": 10,
         "hidden_dim": 8, "compile": "false", "threads": 1}


@pytest.fixture
def demo(monkeypatch, capfd):
    """demo(*arguments): its `main` here and the scripts in their own processes; exit status, output."""
    spec = importlib.util.spec_from_file_location("reef_demo", ROOT / "tools/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments: object) -> tuple[int, str]:
        words = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, words), *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            module.main()
        except SystemExit as end:
            status = end.code
        return status, "".join(capfd.readouterr())

    return run


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock"}


def test_the_maze(demo, run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    small = ["--steps=2100", "--shards=2", "--reference_episodes=3", "--processes=1"]
    made = run_script("collect/pointmaze.py", "--dataset", MAZE, *small)
    assert made.returncode == 0, made.stderr

    status, out = demo("--output_dir", tmp_path / "runs")
    assert status == 0, out
    picture = tmp_path / "runs/demo" / f"{MAZE}.png"
    assert out.endswith(f"Picture: {picture}\n")
    assert "Means over 10 episodes" in out
    assert "100 one of" in out
    assert "Imitation cannot" in out
    for algorithm, name in {"bc": "BC", "td3_bc": "TD3+BC", "iql": "IQL"}.items():
        table = pd.read_csv(tmp_path / f"runs/offline/{algorithm}/{MAZE}/demo/seed-0/evaluations.csv")
        mean = table.query("phase == 'final'")["return"].mean()
        number = re.search(rf"^{re.escape(name)} +[-.\d]+ +([-.\d]+) ", out, re.MULTILINE)[1]
        assert float(number) == pytest.approx(mean, abs=0.01)
    height, width, _ = matplotlib.image.imread(picture).shape
    assert width > 4 * height  # the curves and four mazes
    assert list((tmp_path / "runs/demo").rglob("*.png")) == [picture]

    before = times(tmp_path / "runs")
    status, again = demo("--output_dir", tmp_path / "runs")
    assert status == 0
    assert again.count("is finished") == 3
    assert again[again.index("\n\n  ") :] == out[out.index("\n\n  ") :]  # the same scores and words
    assert times(tmp_path / "runs") == before


def test_another_dataset_has_curves_alone(demo, pendulum, tmp_path):
    status, out = demo("--dataset", pendulum, "--output_dir", tmp_path)
    assert status == 0, out
    assert "Score 0 is a return of -1000.0, score 100 one of -100.0." in out
    assert "planner" not in out
    height, width, _ = matplotlib.image.imread(tmp_path / "demo" / f"{pendulum}.png").shape
    assert height < width < 2 * height


def test_what_stops_a_script_stops_the_demo(demo, tmp_path):
    status, out = demo("--output_dir", tmp_path, "--alpha", 3)
    assert status == 2
    assert "bc.py: unknown field alpha" in out
    assert "TD3+BC" not in out
