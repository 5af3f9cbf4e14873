"""tools/bench.py: every script is measured on batches such as its own `train` makes."""

import dataclasses
import importlib
import sys

import pytest
import torch
from conftest import OFFLINE, ROOT
from runs import SMALL

sys.path.insert(0, str(ROOT / "tools"))
bench = importlib.import_module("bench")
sys.path.pop(0)


@pytest.mark.parametrize("name", OFFLINE)
def test_every_script_updates_on_what_is_drawn_for_it(name):
    script = bench.load_script(name)
    sizes = {"hidden_dim": 8, "batch_size": 16, **SMALL}
    known = {field: value for field, value in sizes.items() if hasattr(script.Config, field)}
    config = dataclasses.replace(script.Config(), **known)
    learner = bench.new_learner(script, config, torch.device("cpu"))
    episodes = bench.random_episodes(count=3, length=40)
    speed = bench.run_updates(learner, bench.draw(script, learner, episodes, config), 3, torch.device("cpu"))
    assert learner.updates == 3
    assert speed > 0
    losses = {method for method in dir(learner) if method.endswith("_loss") or method == "target_q"}
    assert {*bench.compiled_methods(script)} == losses
