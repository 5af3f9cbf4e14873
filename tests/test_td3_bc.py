"""Every loss term of TD3+BC against NumPy calculations written from the paper's equations.

The networks' weights are fixed, their forward passes are written again in oracles.py, and a gradient is what
finite differences of the NumPy loss say, with everything that an equation treats as a number held constant.
"""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import load_script, new_learner
from oracles import (
    ACT,
    OBS,
    Constant,
    assert_acts,
    assert_close,
    assert_compiled_is_eager,
    assert_critic_bootstraps_from_truncations,
    assert_loss_and_gradient,
    bellman,
    fix_weights,
    gradients,
    moved,
    networks,
    policy,
    q_values,
    same,
    slopes,
    snapshot,
    summed_errors,
    weights,
)
from torch import nn

td3_bc = load_script("offline/td3_bc.py")


def make(act_dim: int = ACT, **fields):
    """TD3+BC with small networks of fixed weights; a target's differ from its source's."""
    return fix_weights(new_learner(td3_bc, td3_bc.Config(hidden_dim=4, **fields), OBS, act_dim))


# ------------------------------------------------ losses ------------------------------------------------


def td3_target(learner, rows, noise: np.ndarray, discount: float) -> np.ndarray:
    """y = r + gamma (1 - d) min_i Q'_i(s', clip(pi'(s') + noise, -1, 1))."""
    actions = policy(weights(learner.target_actor), rows["next_observations"]) + noise
    actions = np.minimum(np.maximum(actions, -1), 1)
    q1, q2 = q_values(weights(learner.target_critic), rows["next_observations"], actions)
    assert len({*np.sign(q1 - q2)[[0, 2]]}) == 2  # each is the smaller one in a row that is not terminated
    return bellman(rows, discount, np.minimum(q1, q2))


@pytest.mark.equation(1, 2, 3)
def test_critic_loss(batch, rows):
    learner = make(discount=0.9, policy_noise=0.6, noise_clip=0.5)
    torch.manual_seed(2)
    draws = 0.6 * torch.randn(3, ACT).numpy().astype(np.float64)
    noise = np.minimum(np.maximum(draws, -0.5), 0.5)
    smoothed = policy(weights(learner.target_actor), rows["next_observations"]) + noise
    assert 0 < (noise != draws).mean() < 1  # some of the noise is clipped,
    assert 0 < (np.abs(smoothed) > 1).mean() < 1  # and so are some of the smoothed actions
    target = td3_target(learner, rows, noise, 0.9)

    torch.manual_seed(2)
    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.target_actor, learner.target_critic]
    oracle = partial(summed_errors, rows=rows, target=target)
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    q1, q2 = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx((q1.mean() + q2.mean()) / 2, rel=1e-5)


@pytest.mark.equation(2, 3)
def test_critic_loss_without_noise(batch, rows):
    learner = make(policy_noise=0.0, discount=0.99)
    target = td3_target(learner, rows, np.zeros((3, ACT)), 0.99)
    oracle = summed_errors(weights(learner.critic), rows, target)
    for seed in (0, 1):
        torch.manual_seed(seed)
        assert_close(learner.critic_loss(batch)[0].item(), oracle)


@pytest.mark.equation(2)
def test_target_of_a_terminated_transition_is_its_reward(batch, rows):
    batch["terminations"] = torch.ones(3)
    for discount in (0.5, 0.99):
        learner = make(discount=discount)
        oracle = summed_errors(weights(learner.critic), rows, rows["rewards"])
        assert_close(learner.critic_loss(batch)[0].item(), oracle)


@pytest.mark.equation(3)
def test_critic_loss_is_summed_over_the_two_critics(batch):
    learner = make()
    batch["rewards"], batch["terminations"] = torch.zeros(3), torch.ones(3)  # y = 0
    learner.critic = Constant([[1.0] * 3, [2.0] * 3])
    assert learner.critic_loss(batch)[0].item() == 1 + 4


@pytest.mark.equation(4, 5)
def test_actor_loss(batch, rows):
    learner = make(alpha=1.7)
    actor, critic = weights(learner.actor), weights(learner.critic)

    def first_q(layers):
        return q_values(critic, rows["observations"], policy(layers, rows["observations"]))[0]

    assert len({*np.sign(first_q(actor))}) == 2  # mean |Q| is not |mean Q| here
    scale = 1.7 / np.mean(np.abs(first_q(actor)))  # a number: the same whatever the layers below

    def oracle(layers):
        imitation = np.mean((policy(layers, rows["observations"]) - rows["actions"]) ** 2)
        return -scale * np.mean(first_q(layers)) + imitation

    loss = learner.actor_loss(batch)[0]
    others = [learner.target_actor, learner.target_critic]
    assert_loss_and_gradient(loss, learner.actor, oracle, others)


class LinearCritic(nn.Module):
    """Q_1(s, a) = slope * a + offset, and Q_2 much smaller, so that a minimum in place of Q_1 shows."""

    def __init__(self, slope: float, offset: float):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.tensor(slope)), offset

    def forward(self, observations, actions, **options):
        q = self.weight * actions.sum(-1) + self.offset
        return torch.stack([q, q - 1000])


@pytest.mark.equation(4)
@pytest.mark.parametrize("c", [0.01, 1.0, 500.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_actor_loss_does_not_depend_on_the_size_of_q(batch, c, sign):
    learner = make(alpha=2.5)
    learner.critic = LinearCritic(0.0, sign * c)
    imitation = (learner.actor(batch["observations"]) - batch["actions"]).square().mean().item()
    assert learner.actor_loss(batch)[0].item() == pytest.approx(-2.5 * sign + imitation, rel=1e-5)


@pytest.mark.equation(4)
@pytest.mark.parametrize("action", [1.0, -1.0, 0.25])
def test_takes_no_gradient_through_lambda(batch, action):
    """Q = 10 a, pi = a: dL/dpi = -2.5 * 10 / |10 a|; through lambda it would be 0, as Q / |Q| is constant."""
    learner = make(act_dim=1, alpha=2.5)
    learner.actor, learner.critic = Constant([[action]]), LinearCritic(10.0, 0.0)
    one = {key: rows[:1] for key, rows in batch.items()} | {"actions": torch.tensor([[action]])}
    gradient = torch.autograd.grad(learner.actor_loss(one)[0], learner.actor.answer)[0]
    assert gradient.item() == pytest.approx(-2.5 / abs(action))


@pytest.mark.equation(5, 6)
@pytest.mark.parametrize("delay", [1, 2, 3])
def test_moves_actor_and_targets_only_in_delayed_updates(batch, delay):
    learner = make(policy_delay=delay, tau=0.005, actor_lr=0.01, critic_lr=0.01)
    still = {name: snapshot(network) for name, network in networks(learner).items() if name != "critic"}
    assert len(still) == 3
    for _ in range(delay - 1):
        critic = snapshot(learner.critic)
        learner.update(batch)
        assert not same(learner.critic, critic)
        assert all(same(getattr(learner, name), weights) for name, weights in still.items())
    learner.update(batch)
    assert not same(learner.actor, still["actor"])
    for name in ("actor", "critic"):  # from the source as this update left it
        source, target = weights(getattr(learner, name)), weights(getattr(learner, f"target_{name}"))
        first = [weight.numpy() for weight in still[f"target_{name}"]]
        assert_close(target, [0.995 * old + 0.005 * new for old, new in zip(first, source)], 1e-6)
        assert max(np.abs(new - old).max() for new, old in zip(target, first)) > 1e-3  # it did move


@pytest.mark.equation(5)
def test_actor_step_gets_its_gradient_through_the_critic(batch, rows):
    """In `update`, which must not train the critic on (5), the actor's gradient is that of all of (5)."""
    learner = make(policy_delay=1, critic_lr=0.0, alpha=2.5)
    actor, critic = weights(learner.actor), weights(learner.critic)

    def first_q(layers):
        return q_values(critic, rows["observations"], policy(layers, rows["observations"]))[0]

    def imitation(layers):
        return np.mean((policy(layers, rows["observations"]) - rows["actions"]) ** 2)

    scale = 2.5 / np.mean(np.abs(first_q(actor)))
    wanted = slopes(lambda layers: -scale * np.mean(first_q(layers)) + imitation(layers), actor)
    learner.update(batch)
    assert_close(gradients(learner.actor), wanted, 1e-4)
    assert any(np.abs(all_of - part).max() > 1e-2 for all_of, part in zip(wanted, slopes(imitation, actor)))


def test_actor_loss_leaves_the_critic_alone(batch):
    """Its gradients and values after an update with an actor step are those of the critic's own step."""
    with_actor, without = (make(policy_noise=0.0, policy_delay=delay) for delay in (1, 2))
    with_actor.update(batch)
    without.update(batch)
    assert "actor/loss" in with_actor.metrics
    assert "actor/loss" not in without.metrics
    assert same(with_actor.critic, snapshot(without.critic))
    assert_close(gradients(with_actor.critic), gradients(without.critic), 0)
    for network in networks(with_actor).values():
        assert all(weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize("network", ["critic", "actor"])
def test_an_optimiser_moves_its_own_network_only(batch, network):
    """With the other learning rate at zero (and the targets' too) nothing else moves in two updates."""
    rates = {f"{name}_lr": 0.01 * (name == network) for name in ("critic", "actor")}
    assert moved(make(tau=0.0, **rates), batch, 2) == [network]


@pytest.mark.equation(6)
def test_compiled_updates_equal_eager_ones_and_targets_are_exact_averages(batch):
    assert_compiled_is_eager(td3_bc, [make(tau=0.1), make(tau=0.1)], batch)


def test_a_truncation_bootstraps_from_its_last_observation(minari_root):
    learner = make(discount=0.9, policy_noise=0.0)

    def next_values(observations):
        actions = policy(weights(learner.target_actor), observations)
        return np.minimum(*q_values(weights(learner.target_critic), observations, actions))

    assert_critic_bootstraps_from_truncations(td3_bc, learner, next_values)


def test_acts_in_the_environments_units(rows):
    learner = make()
    assert_acts(learner, rows, lambda observations: policy(weights(learner.actor), observations))


def test_defaults_are_the_papers():
    config = td3_bc.Config()
    wanted = {"updates": 1_000_000, "batch_size": 256, "hidden_dim": 256, "hidden_layers": 2}
    wanted |= {"actor_lr": 3e-4, "critic_lr": 3e-4, "discount": 0.99, "tau": 0.005}
    wanted |= {"alpha": 2.5, "policy_noise": 0.2, "noise_clip": 0.5, "policy_delay": 2}
    wanted |= {"normalize_states": True, "normalize_rewards": False, "reward_scale": 1.0, "reward_shift": 0.0}
    assert {field: getattr(config, field) for field in wanted} == wanted
