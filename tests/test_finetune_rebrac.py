"""algorithms/finetune/rebrac.py: offline its critic is that of offline/rebrac.py, so the oracle tests of
tests/test_rebrac.py are made of it here too; what changes after the switch is tested below.
"""

from functools import partial

import numpy as np
import pytest
import test_rebrac
import torch
from conftest import load_script
from oracles import (
    ACT,
    assert_close,
    assert_compiled_is_eager,
    assert_loss_and_gradient,
    bellman,
    policy,
    snapshot,
    weights,
)
from test_rebrac import (  # noqa: F401
    batch,
    rows,
    test_critic_loss,
    test_critic_loss_is_summed_over_the_two_critics,
    test_critic_normalises_after_the_relu_each_member_by_itself,
    test_penalty_of_the_facts,
    test_target_of_a_terminated_transition_is_its_reward,
)

rebrac = load_script("finetune/rebrac.py")


@pytest.fixture(autouse=True)
def finetuned(monkeypatch):
    """From now on the imported tests test this script."""
    monkeypatch.setattr(test_rebrac, "rebrac", rebrac)


def online(batch):  # noqa: F811
    """As an online batch is: nobody knows what the data would have done next."""
    return {name: column for name, column in batch.items() if name not in ("next_actions", "has_next")}


def test_the_imported_tests_test_this_script():
    assert type(test_rebrac.make()) is rebrac.OnlineReBRAC


@pytest.mark.equation(4, 5)
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_actor_loss(batch, rows, beta):  # noqa: F811
    learner = test_rebrac.make()
    others = [learner.target_actor, learner.target_critic]
    oracle = test_rebrac.actor_oracle(learner, rows, beta)
    loss, metrics = learner.actor_loss(batch, torch.tensor(beta))
    assert_loss_and_gradient(loss, learner.actor, oracle, others)
    assert metrics["actor/beta"].item() == pytest.approx(beta)


@pytest.mark.equation(7)
def test_online_there_is_no_penalty_in_the_target(batch, rows):  # noqa: F811
    learner = test_rebrac.make(discount=0.9, policy_noise=0.0, critic_beta=3.0)
    actions = policy(weights(learner.target_actor), rows["next_observations"])
    next_q = test_rebrac.least_q(weights(learner.target_critic), rows["next_observations"], actions)
    oracle = partial(test_rebrac.critic_errors, rows=rows, target=bellman(rows, 0.9, next_q))
    loss, _ = learner.critic_loss(online(batch))
    assert_loss_and_gradient(loss, learner.critic, oracle, [learner.actor, learner.target_critic])
    assert abs(learner.critic_loss(batch)[0].item() - loss.item()) > 0.1


@pytest.mark.equation(7)
@pytest.mark.parametrize(
    ("updates", "share"),
    [(0, 1.0), (100, 1.0), (120, 0.9), (160, 0.7), (200, 0.5), (300, 0.5)],  # 200 online ones from 100 on
)
def test_the_actors_weight_falls_online_to_its_floor(updates, share):
    learner = test_rebrac.make(actor_beta=0.02, updates=100, online_steps=100, updates_per_step=2)
    learner.updates = updates
    assert learner.annealed_beta().item() == pytest.approx(0.02 * share)


@pytest.mark.equation(5, 7)
def test_an_update_uses_the_weight_of_its_own_number(batch):  # noqa: F811
    learner = test_rebrac.make(actor_beta=0.02, updates=2, online_steps=10, policy_delay=1)
    told = [learner.update(online(batch))["actor/beta"].item() for _ in range(12)]
    wanted = [0.02 * max(0.5, 1 - max(number - 2, 0) / 10) for number in range(1, 13)]
    assert told == pytest.approx(wanted)


@pytest.mark.equation(5, 6)
def test_actor_and_targets_move_every_other_update(batch):  # noqa: F811
    learner = test_rebrac.make(policy_delay=2, tau=0.3)
    for number in range(1, 5):
        before = {name: snapshot(getattr(learner, name)) for name in ("actor", "target_actor", "critic")}
        learner.update(batch)
        still = {
            name: all(torch.equal(a, b) for a, b in zip(old, snapshot(getattr(learner, name))))
            for name, old in before.items()
        }
        assert still == {"actor": number % 2 == 1, "target_actor": number % 2 == 1, "critic": False}


@pytest.mark.equation(6)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):  # noqa: F811
    fields = {"tau": 0.1, "updates": 3, "online_steps": 10}
    assert_compiled_is_eager(rebrac, [test_rebrac.make(**fields), test_rebrac.make(**fields)], online(batch))


def test_it_explores_with_noise_of_the_said_size(batch, rows):  # noqa: F811
    learner = test_rebrac.make(exploration_noise=0.3)
    torch.manual_seed(3)
    noise = 0.3 * torch.randn(3, ACT).numpy()
    torch.manual_seed(3)
    wanted = np.clip(policy(weights(learner.actor), rows["observations"]) + noise, -1, 1)
    assert_close(learner.explore(batch["observations"]).detach().numpy(), wanted, 1e-4)


def test_defaults():
    """CORL's runs on Adroit: without noise, and at least half of the actor's weight is kept."""
    config = rebrac.Config()
    wanted = {"decay_to": 0.5, "exploration_noise": 0.0, "online_fraction": 0.5, "updates_per_step": 1}
    wanted |= {"batch_size": 256, "actor_lr": 3e-4, "critic_lr": 3e-4, "hidden_layers": 3}
    assert {field: getattr(config, field) for field in wanted} == wanted
