"""tools/ope_coverage.py: its tables of values against the exact process, and a small share of the study."""

import importlib.util
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("icu_sepsis") is None, reason="the package icu-sepsis is missing: make discrete"
)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("reef_ope_coverage", ROOT / "tools/ope_coverage.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_values_in_the_true_model_are_the_exact_ones(tool):
    process = tool.sepsis.read_dynamics()["transitions"][:713].astype(np.float32)
    model = process[..., :713], process[..., 714]
    for name in ("clinician", "random"):
        policy = tool.sepsis.policy_table(name)
        wanted = tool.sepsis.action_values(policy)
        assert tool.model_values(model, policy)[:713] == pytest.approx(wanted, abs=1e-4)
    assert tool.sepsis.value(tool.learn(model)) > 0.87


def test_the_summary_by_hand(tool):
    rows = [{"policy": "a", "estimator": "IS", "truth": 1.0, "ess": 5.0, "mean_weight": 1.0}] * 4
    values = [(1.0, 0.5, 1.5), (3.0, 2.0, 4.0), (0.0, -1.0, 1.0), (np.nan, np.nan, np.nan)]
    names = ("value", "low", "high")
    found = [row | dict(zip(names, entry)) for row, entry in zip(rows, values)]
    (line,) = tool.summarize(pd.DataFrame(found)).to_dict("records")
    assert (line["logs"], line["coverage"], line["truth"]) == (4, 0.5, 1.0)
    assert line["bias"] == pytest.approx(1 / 3)
    assert line["rmse"] == pytest.approx((5 / 3) ** 0.5)


def test_a_small_share_of_the_study(tmp_path):
    out = tmp_path / "table.csv"
    words = ["--logs=4", "--episodes=200", "--resamples=50", f"--out={out}"]
    command = [sys.executable, ROOT / "tools/ope_coverage.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(out).set_index(["policy", "estimator"])
    assert len(table) == 4 * 7
    clinicians = table.loc["clinician"]
    assert clinicians.loc["IS", "coverage"] >= 0.5
    assert clinicians["mean_weight"].to_numpy() == pytest.approx(1)
    assert clinicians.loc[["IS", "WIS", "DR", "WDR"], "bias"].abs().max() < 0.15
    assert table.loc[("optimum", "IS"), "mean_weight"] < 0.9  # it fails, and this says so beforehand
    assert table.loc[("optimum", "IS"), "ess"] < 50
    assert table.loc[("optimum", "IS"), "bias"] < -0.1
