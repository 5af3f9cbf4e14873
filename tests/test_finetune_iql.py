"""algorithms/finetune/iql.py: the losses are those of offline/iql.py, so the oracle tests of
tests/test_iql.py are made of them here too. What it does after the switch is in tests/test_finetune.py.
"""

import numpy as np
import pytest
import test_iql
import torch
from conftest import load_script
from oracles import ACT, assert_compiled_is_eager, policy, weights
from test_iql import (  # noqa: F401
    test_a_truncation_bootstraps_from_its_last_observation,
    test_actor_loss,
    test_acts_by_the_mean_in_the_environments_units,
    test_an_optimiser_moves_its_own_network_only,
    test_critic_loss,
    test_critic_loss_is_summed_over_the_two_critics,
    test_defaults_are_the_papers,
    test_drops_units_in_training_only,
    test_target_of_a_terminated_transition_is_its_reward,
    test_updates_value_then_actor_then_critic_then_target,
    test_value_loss,
    test_value_loss_of_the_facts,
    test_weight_of_an_advantage,
)

iql = load_script("finetune/iql.py")


@pytest.fixture(autouse=True)
def finetuned(monkeypatch):
    """From now on the imported tests test this script."""
    monkeypatch.setattr(test_iql, "iql", iql)


def test_the_imported_tests_test_this_script():
    assert type(test_iql.make()) is iql.OnlineIQL


@pytest.mark.equation(5)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    assert_compiled_is_eager(iql, [test_iql.make(tau=0.1), test_iql.make(tau=0.1)], batch)


def test_no_step_size_falls(batch):
    """That of offline/iql.py is 0 after the last of its updates, which here is the switch."""
    learner = test_iql.make(updates=10, actor_lr=0.01, value_lr=0.02, critic_lr=0.03)
    for _ in range(15):
        learner.update(batch)
    for name, size in {"actor": 0.01, "value": 0.02, "critic": 0.03}.items():
        optimizer = getattr(learner, f"{name}_optimizer")
        assert [group["lr"] for group in optimizer.param_groups] == [size]


def test_it_explores_by_its_gaussian_without_dropout(batch, rows):
    """Mean + deviation * noise, brought into [-1, 1]."""
    learner = test_iql.make(dropout=0.5)
    torch.manual_seed(3)
    noise = torch.randn(3, ACT).numpy()
    torch.manual_seed(3)
    layers = weights(learner.actor)
    mean, std = policy(layers[1:], rows["observations"]), np.exp(np.clip(layers[0], -5, 2))
    actions = learner.explore(batch["observations"]).detach().numpy()
    np.testing.assert_allclose(actions, np.clip(mean + std * noise, -1, 1), rtol=1e-4, atol=1e-5)
    assert (np.abs(actions) < 1).any()
    assert learner.actor.training
