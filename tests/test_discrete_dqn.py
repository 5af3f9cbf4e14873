"""algorithms/discrete/dqn.py: its loss against NumPy, and that it fails offline."""

import numpy as np
import pytest
from choices import assert_target_follows, batch, chosen, huber, learner, target
from oracles import assert_loss_and_gradient, weights

EVERY = np.ones((3, 4), bool)


@pytest.mark.equation(1, 2, 3)
def test_loss_against_numpy():
    """The target's choice is the online network's as it was: its gradient counts for Q(s, a) alone."""
    found = learner("dqn")
    y = target(weights(found.critic), weights(found.target_critic), EVERY)
    loss = found.critic_loss(batch())[0]
    assert_loss_and_gradient(loss, found.critic, lambda q: huber(chosen(q) - y), [found.target_critic])
    greedy = target(weights(found.target_critic), weights(found.target_critic), EVERY)
    assert np.abs(greedy - y).max() > 0.1  # the two networks disagree about the best


@pytest.mark.equation(4)
def test_the_target_follows_slowly():
    assert_target_follows(learner("dqn", tau=0.3))


def test_it_takes_the_best_choice():
    found = learner("dqn")
    states = batch()["observations"].numpy()
    q = found.critic(batch()["observations"]).detach().numpy()
    assert found.act(states).tolist() == q.argmax(1).tolist()
    assert found.probabilities(states).tolist() == np.eye(4)[q.argmax(1)].tolist()
