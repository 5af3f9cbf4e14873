"""algorithms/offline/lb_sac.py: SAC-N's losses, with a mean over the critics, against NumPy calculations
written from the paper's equations, and step sizes that grow with the root of the batch.
"""

import math

import numpy as np
import pytest
import torch
from conftest import load_script, new_learner
from oracles import (
    ACT,
    OBS,
    Constant,
    assert_close,
    assert_compiled_is_eager,
    assert_loss_and_gradient,
    gradients,
    q_values,
    weights,
)
from runs import equal
from test_sac_n import (
    ALPHA,
    actor_oracle,
    assert_first_weights_are_torchs,
    assert_order_of_an_update,
    assert_papers_defaults,
    configs,
    draw,
    entropy_oracle,
    small,
    squared_errors,
    target_oracle,
)
from torch import nn

lb_sac, sac_n = load_script("offline/lb_sac.py"), load_script("offline/sac_n.py")


def make(**fields):
    return small(lb_sac, **{"batch_size": 256, **fields})


# ------------------------------------------------ losses ------------------------------------------------


@pytest.mark.equation(1, 2)
def test_temperature_and_actor_loss(batch, rows):
    learner = make()
    noise = draw(6)
    loss, _ = learner.temperature_loss(batch)
    assert_close(loss.item(), math.log(ALPHA) * (entropy_oracle(learner, rows, noise) + ACT))
    draw(6)
    loss, _ = learner.actor_loss(batch)
    others = [learner.target_critic, learner.temperature]
    assert_loss_and_gradient(loss, learner.actor, actor_oracle(learner, rows, noise), others)


@pytest.mark.equation(3, 4)
@pytest.mark.parametrize("critics", [1, 3, 4])
def test_critic_loss(batch, rows, critics):
    """A mean over the critics, where SAC-N and EDAC have a sum."""
    learner = make(critics=critics, discount=0.9)
    noise = draw(7)
    target = target_oracle(learner, rows, noise)
    draw(7)
    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.target_critic, learner.temperature]
    oracle = lambda layers: np.mean(squared_errors(layers, rows, target))  # noqa: E731
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    q = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(q.mean(), rel=1e-5)


@pytest.mark.equation(4)
def test_errors_are_averaged_over_the_critics(batch):
    """Four critics, each at an error of 1: 1, where SAC-N has 4."""
    batch["rewards"], batch["terminations"] = torch.zeros(3), torch.ones(3)  # y = 0
    for script, wanted in ((lb_sac, 1), (sac_n, 4)):
        learner = small(script, critics=4)
        learner.critic = Constant([[1.0, -1.0, 1.0]] * 4)
        assert learner.critic_loss(batch)[0].item() == wanted


@pytest.mark.equation(3, 4)
def test_target_in_closed_form(batch):
    """1 + .99 (5 + .2 * 1) = 6.148; every Q is 0 here."""
    learner = make()
    learner.temperature.log.data.fill_(math.log(0.2))
    learner.actor.sample = lambda observations: (torch.zeros(3, ACT), torch.full((3,), -1.0))
    learner.target_critic = Constant([[7.0] * 3, [5.0] * 3, [9.0] * 3])
    learner.critic = Constant([[0.0] * 3] * 3)
    batch |= {"rewards": torch.ones(3), "terminations": torch.zeros(3)}
    assert learner.critic_loss(batch)[0].item() == pytest.approx(6.148**2, rel=1e-6)


# ------------------------------------------------ step sizes ------------------------------------------------

PARTS = ("actor", "critic", "temperature")


@pytest.mark.equation(6)
@pytest.mark.parametrize(("batch_size", "wanted"), [(10_000, 0.001875), (256, 3e-4), (64, 1.5e-4)])
def test_step_sizes_grow_with_the_root_of_the_batch(batch_size, wanted):
    """3e-4 is that of 256 transitions."""
    learner = make(batch_size=batch_size)
    for part in PARTS:
        (group,) = getattr(learner, f"{part}_optimizer").param_groups
        assert group["lr"] == pytest.approx(wanted, rel=1e-9), part


@pytest.mark.equation(6)
def test_every_step_size_is_scaled_from_its_own_field():
    learner = make(batch_size=4 * 256, actor_lr=0.01, critic_lr=0.03)
    found = [getattr(learner, f"{part}_optimizer").param_groups[0]["lr"] for part in PARTS]
    assert found == pytest.approx([0.02, 0.06, 0.02])


@pytest.mark.equation(6)
def test_the_first_step_of_the_temperature_is_the_scaled_one(batch):
    """Adam's first step is its step size, whatever the gradient; the batch at hand need not be a full one."""
    learner = make(batch_size=10_000)
    before = learner.temperature.log.item()
    learner.update(batch)
    assert abs(learner.temperature.log.item() - before) == pytest.approx(0.001875, rel=1e-4)


# ------------------------------------------------ updates ------------------------------------------------


def test_it_is_sac_n_but_for_the_size_of_the_critics_loss(batch):
    """At 256 transitions: the same actor, the same temperature, and an N-th of the critics' gradients."""
    ours, theirs = make(critics=4), small(sac_n, critics=4)
    for learner in (ours, theirs):
        torch.manual_seed(1)
        learner.update(batch)
    for name in ("actor", "temperature"):
        assert equal(getattr(ours, name).state_dict(), getattr(theirs, name).state_dict())
    assert_close([4 * gradient for gradient in gradients(ours.critic)], gradients(theirs.critic))


def test_order_of_an_update(batch):
    assert_order_of_an_update(make(tau=0.1), batch)


@pytest.mark.equation(5)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    assert_compiled_is_eager(lb_sac, [make(tau=0.1), make(tau=0.1)], batch)


# ---------------------------------------- settings ----------------------------------------


def test_first_weights_are_torchs():
    assert_first_weights_are_torchs(lb_sac)


def test_critics_have_no_layer_normalisation():
    """Nothing but linear layers: a scaled observation scales the answer of a critic without biases."""
    learner = make()
    kinds = {type(module) for module in learner.critic.modules()}
    assert kinds == {lb_sac.EnsembleCritic, nn.ModuleList, lb_sac.EnsembleLinear}
    for layer in learner.critic.layers:
        layer.bias.data.zero_()
    rows, actions = torch.randn(5, OBS), torch.randn(5, ACT)
    assert_close(learner.critic(3 * rows, 3 * actions).detach().numpy(),
                 3 * learner.critic(rows, actions).detach().numpy())  # fmt: skip


def test_defaults_are_the_papers():
    assert_papers_defaults(lb_sac.Config(), updates=300_000, batch_size=10_000, critics=4)
    learner = new_learner(lb_sac, lb_sac.Config(), OBS, ACT)
    assert learner.critic_optimizer.param_groups[0]["lr"] == pytest.approx(0.001875)


def test_configs_have_the_published_numbers_of_critics_and_updates():
    """Reef's own datasets get a tenth of the batch, because they are learnt on CPUs.

    Minari's simple data take what D4RL's medium data have.
    """
    published = {
        "hopper": ((25, 200_000), (50, 450_000)),
        "halfcheetah": ((4, 300_000), (6, 350_000)),
        "walker2d": ((10, 150_000), (30, 350_000)),
    }
    for dataset, config in configs(lb_sac).items():
        source, domain, level = dataset.split("/")
        critics, updates = 4, 300_000
        if source == "mujoco":
            critics, updates = published[domain][level == "expert-v0"]
        if source == "reef":
            updates = 12_500
        assert (config.critics, config.updates) == (critics, updates), dataset
        assert config.batch_size == (1024 if source == "reef" else 10_000), dataset
        assert (config.actor_lr, config.critic_lr) == (3e-4, 3e-4), dataset
