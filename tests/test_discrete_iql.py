"""algorithms/discrete/iql.py: every loss against NumPy, and the order of its updates."""

import numpy as np
import pytest
import torch
from choices import ACTIONS, assert_target_follows, batch, chosen, rows, softmax
from choices import learner as any_learner
from oracles import assert_loss_and_gradient, perceptron, weights


def learner(name: str, **fields):
    """One with advantages of both signs."""
    return any_learner(name, weight_seed=1057, **fields)


def state_values(layers) -> np.ndarray:
    return perceptron(layers, rows()["observations"])[:, 0]


@pytest.mark.equation(1)
def test_value_loss_against_numpy():
    found = learner("iql", expectile=0.8)
    q = chosen(weights(found.target_critic))

    def oracle(layers):
        u = q - state_values(layers)
        return np.mean([(0.8 if x > 0 else 0.2) * x**2 for x in u])

    loss, _ = found.value_loss(batch(), found.target_q(batch()))
    assert_loss_and_gradient(loss, found.value, oracle, [found.critic])
    u = q - state_values(weights(found.value))
    assert (u > 0).any()
    assert (u < 0).any()


@pytest.mark.equation(2, 3)
@pytest.mark.parametrize("beta", [1.0, 50.0])
def test_actor_loss_against_numpy(beta):
    found = learner("iql", beta=beta)
    advantage = chosen(weights(found.target_critic)) - state_values(weights(found.value))
    weight = np.minimum(np.exp(beta * advantage), 100)

    def oracle(layers):
        pi = softmax(perceptron(layers, rows()["observations"]))
        return -np.mean([weight[i] * np.log(pi[i, a]) for i, a in enumerate(ACTIONS)])

    others = [found.value, found.target_critic]
    loss, _ = found.actor_loss(batch(), found.target_q(batch()))
    assert_loss_and_gradient(loss, found.actor, oracle, others)
    assert (weight == 100).any() == (beta == 50)


@pytest.mark.equation(4)
def test_critic_loss_against_numpy():
    found, data = learner("iql"), rows()
    ahead = perceptron(weights(found.value), data["next_observations"])[:, 0]
    y = data["rewards"] + 0.9 * ahead * [1, 0, 1]
    loss = found.critic_loss(batch())[0]
    assert_loss_and_gradient(loss, found.critic, lambda q: np.mean((chosen(q) - y) ** 2), [found.value])


@pytest.mark.equation(2)
def test_the_actor_sees_the_value_as_updated():
    found, twin = learner("iql", value_lr=0.1), learner("iql", value_lr=0.1)
    metrics = found.update(batch())
    q = twin.target_q(batch())
    before = twin.actor_loss(batch(), q)[0].item()
    loss, _ = twin.value_loss(batch(), q)
    gradients = torch.autograd.grad(loss, list(twin.value.parameters()))
    for weight, gradient in zip(twin.value.parameters(), gradients):
        weight.grad = gradient
    twin.value_optimizer.step()
    assert metrics["actor/loss"].item() == pytest.approx(twin.actor_loss(batch(), q)[0].item(), rel=1e-5)
    assert metrics["actor/loss"].item() != pytest.approx(before, rel=1e-3)


@pytest.mark.equation(5)
def test_the_target_follows_slowly():
    assert_target_follows(learner("iql", tau=0.3))


def test_it_draws_by_probability():
    """Where a Gaussian's mean would be the likeliest choice alone."""
    found, state = learner("iql"), rows()["observations"][:1]
    wanted = softmax(perceptron(weights(found.actor), state))[0]
    torch.manual_seed(0)
    drawn = found.act(np.tile(state, (20_000, 1)))
    assert np.bincount(drawn, minlength=4) / 20_000 == pytest.approx(wanted, abs=0.015)
    assert wanted.max() < 0.9
