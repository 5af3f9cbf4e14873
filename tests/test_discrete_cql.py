"""algorithms/discrete/cql.py: its losses against NumPy, numbers known by hand, and its reduction to DQN."""

import math

import numpy as np
import pytest
import torch
from choices import ACTIONS, assert_target_follows, batch, chosen, huber, learner, rows, target
from oracles import Constant, assert_loss_and_gradient, perceptron, weights


@pytest.mark.equation(1, 2, 3, 4)
def test_loss_against_numpy():
    found = learner("cql", cql_weight=0.7)
    y = target(weights(found.critic), weights(found.target_critic), np.ones((3, 4), bool))

    def oracle(layers):
        q = perceptron(layers, rows()["observations"])
        gaps = [np.log(np.exp(q[i]).sum()) - q[i, a] for i, a in enumerate(ACTIONS)]
        return huber(chosen(layers) - y) + 0.7 * np.mean(gaps)

    loss = found.critic_loss(batch())[0]
    assert_loss_and_gradient(loss, found.critic, oracle, [found.target_critic])


@pytest.mark.equation(4)
def test_of_four_equal_choices_the_gap_is_ln_4_and_its_gradient_known():
    """softmax(0) less one for the data's choice: (-.75, .25, .25, .25); a constant added changes nothing."""
    found = learner("cql", cql_weight=1.0)
    for level in (0.0, 5.0):
        found.critic, found.target_critic = Constant([[level] * 4]), Constant([[level] * 4])
        one = {key: column[:1] for key, column in batch().items()} | {"actions": torch.tensor([0])}
        one |= {"rewards": torch.tensor([level]), "terminations": torch.ones(1)}  # nothing to learn in (3)
        loss, metrics = found.critic_loss(one)
        assert metrics["critic/gap"].item() == pytest.approx(math.log(4), abs=1e-5)
        (slope,) = torch.autograd.grad(loss, found.critic.parameters())
        assert slope[0].tolist() == pytest.approx([-0.75, 0.25, 0.25, 0.25], abs=1e-5)


def test_a_weight_of_the_papers_loss_is_a_hundredth_here():
    """Its loss sums over 200 quantiles; where those of Q are equal, and of y, that is 100 times Huber's."""
    found = learner("cql", cql_weight=0.04)
    y = target(weights(found.critic), weights(found.target_critic), np.ones((3, 4), bool))
    q, regression = chosen(weights(found.critic)), 0.0
    for error in y - q:
        for quantile in (np.arange(200) + 0.5) / 200:
            regression += abs(quantile - (error < 0)) * huber(np.array([error])) / 3
    loss, metrics = found.critic_loss(batch())
    assert 100 * loss.item() == pytest.approx(regression + 4 * metrics["critic/gap"].item(), rel=1e-5)


@pytest.mark.equation(5)
def test_the_target_follows_slowly():
    assert_target_follows(learner("cql", tau=0.3))


def test_without_weight_it_is_dqn():
    ours, theirs = learner("cql", cql_weight=0.0), learner("dqn")
    for _ in range(3):
        ours.update(batch())
        theirs.update(batch())
    for left, right in zip(ours.critic.parameters(), theirs.critic.parameters()):
        assert torch.allclose(left, right, atol=1e-6)
