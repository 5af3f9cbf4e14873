"""algorithms/discrete/bcq.py: its losses and its mask against NumPy, and both ends of the threshold."""

import math

import numpy as np
import pytest
import torch
from choices import ACTIONS, assert_target_follows, batch, chosen, huber, learner, rows, softmax, target
from oracles import Constant, assert_loss_and_gradient, perceptron, weights


@pytest.mark.equation(1)
def test_imitation_loss_against_numpy():
    found = learner("bcq")

    def oracle(layers):
        logits = perceptron(layers, rows()["observations"])
        likelihood = np.mean([np.log(softmax(logits)[i, a]) for i, a in enumerate(ACTIONS)])
        return -likelihood + 0.01 * np.mean(logits**2)

    loss = found.actor_loss(batch())[0]
    assert_loss_and_gradient(loss, found.actor, oracle, [found.critic, found.target_critic])


@pytest.mark.equation(1)
def test_equal_logits_of_zero_cost_ln_4():
    found = learner("bcq")
    found.actor = Constant([[0.0] * 4] * 3)
    assert found.actor_loss(batch())[0].item() == pytest.approx(math.log(4), abs=1e-5)


@pytest.mark.equation(2, 3)
@pytest.mark.parametrize(("threshold", "best"), [(0.3, 1), (0.0, 2), (0.4, 0), (1.0, 0)])
def test_the_mask_by_hand(threshold, best):
    """pi (.7, .25, .05) is (1, .357, .071) of its largest; Q (0, 1, 9)."""
    found = learner("bcq", threshold=threshold)
    found.actor, found.critic = Constant([[math.log(p) for p in (0.7, 0.25, 0.05)]]), Constant([[0.0, 1, 9]])
    assert found.constrained_q(torch.zeros(1, 3)).argmax(1).tolist() == [best]


@pytest.mark.equation(2, 3, 4, 5)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_critic_loss_against_numpy(threshold):
    found = learner("bcq", threshold=threshold)
    pi = softmax(perceptron(weights(found.actor), rows()["next_observations"]))
    allowed = (pi > threshold * pi.max(1, keepdims=True)) | (pi == pi.max(1, keepdims=True))
    assert allowed.sum() == {0.0: 12, 1.0: 3}.get(threshold, allowed.sum())
    y = target(weights(found.critic), weights(found.target_critic), allowed)
    loss = found.critic_loss(batch())[0]
    others = [found.target_critic, found.actor]
    assert_loss_and_gradient(loss, found.critic, lambda q: huber(chosen(q) - y), others)


@pytest.mark.equation(6)
def test_the_target_follows_slowly():
    assert_target_follows(learner("bcq", tau=0.3))


def test_it_acts_within_the_mask():
    found, states = learner("bcq", threshold=1.0), batch()["observations"]
    likeliest = found.actor(states).argmax(1).tolist()
    assert found.act(states.numpy()).tolist() == likeliest
    assert likeliest != found.critic(states).argmax(1).tolist()
