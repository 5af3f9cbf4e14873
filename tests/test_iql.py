"""Every loss term of IQL against NumPy calculations written from the paper's equations.

The networks' weights are fixed, their forward passes are written again here and in oracles.py, and a gradient
is what finite differences of the NumPy loss say, with everything that an equation treats as a number held
constant.
"""

import math
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
    perceptron,
    policy,
    q_values,
    same,
    slopes,
    snapshot,
    summed_errors,
    weights,
)
from torch import nn

iql = load_script("offline/iql.py")


def make(act_dim: int = ACT, **fields):
    """IQL with small networks of fixed weights; the target's differ from the critic's."""
    return fix_weights(new_learner(iql, iql.Config(hidden_dim=4, **fields), OBS, act_dim))


# ------------------------------------- the networks again, in NumPy -------------------------------------


def values(layers: list[np.ndarray], observations: np.ndarray) -> np.ndarray:
    """V [B]."""
    return perceptron(layers, observations)[:, 0]


def log_density(layers: list[np.ndarray], observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Log of the normal density around the tanh mean [B]; its deviation is the same in every state."""
    log_std = np.clip(layers[0], -5, 2)
    mean, density = policy(layers[1:], observations), np.ones(len(actions))
    for entry in range(actions.shape[1]):
        variance = np.exp(log_std[entry]) ** 2
        exponent = -((actions[:, entry] - mean[:, entry]) ** 2) / (2 * variance)
        density *= np.exp(exponent) / np.sqrt(2 * np.pi * variance)
    return np.log(density)


def expectile_loss(u: np.ndarray, expectile: float) -> float:
    """Squares weighted by `expectile` where u is positive and by 1 - expectile where it is negative."""
    return float(np.mean(np.where(u > 0, expectile, 1 - expectile) * u**2))


# ------------------------------------------------ losses ------------------------------------------------


def td_errors(learner, rows) -> np.ndarray:
    """u = min_i Q'_i(s, a) - V(s), with the target critics."""
    q1, q2 = q_values(weights(learner.target_critic), rows["observations"], rows["actions"])
    assert len({*np.sign(q1 - q2)}) == 2
    return np.minimum(q1, q2) - values(weights(learner.value), rows["observations"])


@pytest.mark.equation(1)
@pytest.mark.parametrize("expectile", [0.7, 0.9, 0.2])
def test_value_loss(batch, rows, expectile):
    learner = make(expectile=expectile)
    u = td_errors(learner, rows)
    assert len({*np.sign(u)}) == 2
    q = u + values(weights(learner.value), rows["observations"])
    others = [learner.actor, learner.critic, learner.target_critic]
    oracle = lambda layers: expectile_loss(q - values(layers, rows["observations"]), expectile)  # noqa: E731
    loss, _ = learner.value_loss(batch, learner.target_q(batch))
    assert_loss_and_gradient(loss, learner.value, oracle, others)


@pytest.mark.equation(1)
def test_value_loss_at_expectile_one_half_is_half_the_squared_error(batch, rows):
    learner = make(expectile=0.5)
    loss, _ = learner.value_loss(batch, learner.target_q(batch))
    assert_close(loss.item(), 0.5 * np.mean(td_errors(learner, rows) ** 2))


def value_loss_at(value: float, q: list[float], expectile: float) -> tuple[float, float]:
    """The loss and dL/dV where V(s) = value and Q' takes the values q over the batch."""
    learner = make(expectile=expectile)
    learner.value = Constant([[value]] * len(q))
    learner.target_critic = Constant([q, [entry + 1 for entry in q]])
    batch = {"observations": torch.zeros(len(q), OBS), "actions": torch.zeros(len(q), ACT)}
    loss = learner.value_loss(batch, learner.target_q(batch))[0]
    return loss.item(), torch.autograd.grad(loss, learner.value.answer)[0].sum().item()


@pytest.mark.equation(1)
def test_value_loss_of_the_facts():
    assert value_loss_at(0.0, [1.0], 0.7) == pytest.approx((0.7, -1.4))
    assert value_loss_at(0.0, [-1.0], 0.7) == pytest.approx((0.3, 0.6))


@pytest.mark.equation(1)
@pytest.mark.parametrize(("q", "minimiser"), [([0.0, 1.0], 0.9), ([0.0, 10.0], 9.0), ([-2.0, 3.0], 2.5)])
def test_value_that_minimises_the_loss_is_the_expectile(q, minimiser):
    """Between two values that is expectile * larger + (1 - expectile) * smaller."""
    around = [value_loss_at(minimiser + shift, q, 0.9) for shift in (-0.1, 0.0, 0.1)]
    assert around[1][1] == pytest.approx(0, abs=1e-5)
    assert around[0][1] < -1e-3 < 1e-3 < around[2][1]
    assert around[1][0] < min(around[0][0], around[2][0])


def iql_target(learner, rows, discount: float) -> np.ndarray:
    """y = r + gamma (1 - d) V(s')."""
    return bellman(rows, discount, values(weights(learner.value), rows["next_observations"]))


@pytest.mark.equation(4)
@pytest.mark.parametrize("discount", [0.99, 0.5])
def test_critic_loss(batch, rows, discount):
    learner = make(discount=discount)
    target = iql_target(learner, rows, discount)
    others = [learner.actor, learner.value, learner.target_critic]
    loss, metrics = learner.critic_loss(batch)
    oracle = partial(summed_errors, rows=rows, target=target)
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    q1, q2 = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx((q1.mean() + q2.mean()) / 2, rel=1e-5)


@pytest.mark.equation(4)
def test_target_of_a_terminated_transition_is_its_reward(batch, rows):
    batch["terminations"] = torch.ones(3)
    for discount in (0.5, 0.99):
        learner = make(discount=discount)
        oracle = summed_errors(weights(learner.critic), rows, rows["rewards"])
        assert_close(learner.critic_loss(batch)[0].item(), oracle)


@pytest.mark.equation(4)
def test_critic_loss_is_summed_over_the_two_critics(batch):
    learner = make()
    batch["rewards"], batch["terminations"] = torch.zeros(3), torch.ones(3)  # y = 0
    learner.critic = Constant([[1.0] * 3, [2.0] * 3])
    assert learner.critic_loss(batch)[0].item() == 1 + 4


@pytest.mark.equation(2, 3)
@pytest.mark.parametrize("beta", [3.0, 0.5])
def test_actor_loss(batch, rows, beta):
    learner = make(beta=beta)
    weight = np.minimum(np.exp(beta * td_errors(learner, rows)), 100)
    others = [learner.critic, learner.value, learner.target_critic]

    def oracle(layers):
        return -np.mean(weight * log_density(layers, rows["observations"], rows["actions"]))

    loss, metrics = learner.actor_loss(batch, learner.target_q(batch))
    assert_loss_and_gradient(loss, learner.actor, oracle, others)
    assert metrics["actor/weight"].item() == pytest.approx(weight.mean(), rel=1e-4)
    effective = weight.sum() ** 2 / (len(weight) * (weight**2).sum())
    assert metrics["actor/effective_share"].item() == pytest.approx(effective, rel=1e-3)
    assert metrics["actor/capped_share"].item() == pytest.approx((weight >= 100).mean())


@pytest.mark.equation(2, 3)
@pytest.mark.parametrize(
    ("advantage", "beta", "weight"),
    [
        (0.0, 3.0, 1.0),
        (1.0, 3.0, math.exp(3)),
        (-1.0, 3.0, math.exp(-3)),
        (1.5, 3.0, math.exp(4.5)),  # just below the cap, which is reached at log(100) / 3 = 1.535
        (1.6, 3.0, 100.0),
        (5.0, 3.0, 100.0),
        (500.0, 10.0, 100.0),  # exp overflows
        (5.0, 0.0, 1.0),  # beta = 0: imitation
    ],
)
def test_weight_of_an_advantage(batch, advantage, beta, weight):
    learner = make(beta=beta)
    learner.value = Constant([[2.0]] * 3)
    learner.target_critic = Constant([[2.0 + advantage] * 3, [9999.0] * 3])
    log_prob = learner.actor.log_prob(batch["observations"], batch["actions"]).mean().item()
    loss, metrics = learner.actor_loss(batch, learner.target_q(batch))
    assert loss.item() == pytest.approx(-weight * log_prob, rel=1e-4)
    assert metrics["actor/weight"].item() == pytest.approx(weight, rel=1e-4)


def test_log_prob_depends_on_the_action(batch):
    actor = make(act_dim=3).actor
    actor.log_std.data = torch.zeros(3)
    observations = batch["observations"]
    mean = actor(observations).detach()
    at_mean = actor.log_prob(observations, mean)
    assert at_mean.tolist() == pytest.approx([-2.756816] * 3, abs=1e-5)  # -3/2 log(2 pi)
    beside = actor.log_prob(observations, mean + torch.tensor([1.0, 0.0, 2.0]))
    assert (at_mean - beside).tolist() == pytest.approx([0.5 + 2.0] * 3, rel=1e-4)


@pytest.mark.parametrize(("beyond", "limit"), [(7.0, 2.0), (-9.0, -5.0)])
def test_log_std_is_clipped(batch, beyond, limit):
    actor = make().actor
    observations, mean = batch["observations"], actor(batch["observations"]).detach()
    for log_std in (beyond, limit, limit - math.copysign(1, limit)):  # the last is within the bounds
        actor.log_std.data.fill_(log_std)
        inside = math.copysign(min(abs(log_std), abs(limit)), limit)
        wanted = -ACT * (inside + 0.5 * math.log(2 * math.pi))  # at the mean
        assert actor.log_prob(observations, mean).tolist() == pytest.approx([wanted] * 3, rel=1e-5)


@pytest.mark.equation(3)
def test_log_prob_is_the_normal_density(batch, rows):
    actor = make().actor
    oracle = log_density(weights(actor), rows["observations"], rows["actions"])
    assert_close(actor.log_prob(batch["observations"], batch["actions"]).detach().numpy(), oracle)


@pytest.mark.equation(1, 2, 3, 4, 5)
def test_updates_value_then_actor_then_critic_then_target(batch, rows):
    """Each step's gradient is that of its loss with the networks as the steps before it left them."""
    fields = {"expectile": 0.7, "beta": 3.0, "discount": 0.99, "tau": 0.005}
    learner = make(**fields, value_lr=0.1, actor_lr=0.1, critic_lr=0.1)
    value, actor, critic, target = (
        weights(getattr(learner, name)) for name in ("value", "actor", "critic", "target_critic")
    )
    q = np.minimum(*q_values(target, rows["observations"], rows["actions"]))
    learner.update(batch)
    new_value, new_critic = weights(learner.value), weights(learner.critic)

    def value_oracle(layers):
        return expectile_loss(q - values(layers, rows["observations"]), 0.7)

    def actor_oracle(v):
        weight = np.minimum(np.exp(3 * (q - values(v, rows["observations"]))), 100)
        return lambda layers: -np.mean(weight * log_density(layers, rows["observations"], rows["actions"]))

    def critic_oracle(v):
        y = bellman(rows, 0.99, values(v, rows["next_observations"]))
        return lambda layers: summed_errors(layers, rows, y)

    assert_close(gradients(learner.value), slopes(value_oracle, value), 1e-4)
    assert_close(gradients(learner.actor), slopes(actor_oracle(new_value), actor), 1e-4)
    assert_close(gradients(learner.critic), slopes(critic_oracle(new_value), critic), 1e-4)
    mixed = [0.995 * old + 0.005 * new for old, new in zip(target, new_critic)]
    assert_close(weights(learner.target_critic), mixed, 1e-6)
    # The old V would show:
    for oracle, start in ((actor_oracle, actor), (critic_oracle, critic)):
        pairs = zip(slopes(oracle(value), start), slopes(oracle(new_value), start))
        assert max(np.abs(old - new).max() for old, new in pairs) > 1e-2


def test_actor_learning_rate_falls_along_a_cosine(batch):
    learner, used = make(updates=10, actor_lr=0.01, value_lr=0.02, critic_lr=0.03), []
    for _ in range(10):
        used.append(learner.actor_optimizer.param_groups[0]["lr"])
        learner.update(batch)
    assert used == pytest.approx([0.01 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)])
    assert learner.actor_optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert learner.value_optimizer.param_groups[0]["lr"] == 0.02
    assert learner.critic_optimizer.param_groups[0]["lr"] == 0.03
    actor = snapshot(learner.actor)
    learner.actor_optimizer.param_groups[0]["lr"] = 0.0
    learner.update(batch)
    assert same(learner.actor, actor)  # the rate above is the one that the actor steps with


def test_drops_units_in_training_only(batch, rows):
    learner = make(dropout=0.5)
    losses = [learner.actor_loss(batch, learner.target_q(batch))[0].item() for _ in range(8)]
    assert len({*losses}) > 1
    layers = weights(learner.actor)[1:]
    for _ in range(2):
        assert_close(learner.act(rows["observations"]), policy(layers, rows["observations"]))
    assert learner.actor.training
    without = make(dropout=0.0)
    losses = [without.actor_loss(batch, without.target_q(batch))[0].item() for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_drops_the_said_share_of_the_units_of_every_hidden_layer(share):
    config = iql.Config(hidden_dim=1000, hidden_layers=2, dropout=share)
    actor = new_learner(iql, config, OBS, ACT).actor
    linears = [layer for layer in actor.net if isinstance(layer, nn.Linear)]
    seen = []
    for layer in linears:
        layer.weight.data.zero_()
        layer.bias.data.fill_(1.0)  # every unit is 1 before dropout
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    actor(torch.ones(50, OBS))
    assert torch.equal(seen[0], torch.ones(50, OBS))  # observations are never dropped
    for hidden in seen[1:]:
        assert (hidden == 0).float().mean().item() == pytest.approx(share, abs=0.01)
        assert hidden.mean().item() == pytest.approx(1, abs=0.02)  # what remains makes up for it


@pytest.mark.parametrize("network", ["value", "actor", "critic"])
def test_an_optimiser_moves_its_own_network_only(batch, network):
    """With the other learning rates at zero (and the target's too) nothing else moves in two updates."""
    rates = {f"{name}_lr": 0.01 * (name == network) for name in ("value", "actor", "critic")}
    assert moved(make(tau=0.0, **rates), batch, 2) == [network]


@pytest.mark.equation(5)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    assert_compiled_is_eager(iql, [make(tau=0.1), make(tau=0.1)], batch)


def test_a_truncation_bootstraps_from_its_last_observation(minari_root):
    learner = make(discount=0.9)
    next_values = partial(values, weights(learner.value))
    assert_critic_bootstraps_from_truncations(iql, learner, next_values)


def test_acts_by_the_mean_in_the_environments_units(rows):
    learner = make()
    assert_acts(learner, rows, lambda observations: policy(weights(learner.actor)[1:], observations))


def test_defaults_are_the_papers():
    """But for how rewards are scaled, which differs by domain."""
    config = iql.Config()
    wanted = {"updates": 1_000_000, "batch_size": 256, "hidden_dim": 256, "hidden_layers": 2}
    wanted |= {"actor_lr": 3e-4, "critic_lr": 3e-4, "value_lr": 3e-4, "discount": 0.99, "tau": 0.005}
    wanted |= {"expectile": 0.7, "beta": 3.0, "dropout": 0.0, "normalize_states": False}
    wanted |= {"normalize_rewards": False, "reward_scale": 1.0, "reward_shift": 0.0}
    assert {field: getattr(config, field) for field in wanted} == wanted
