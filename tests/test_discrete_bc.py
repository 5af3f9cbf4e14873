"""algorithms/discrete/bc.py: its loss against NumPy, and that it acts as the data do."""

import numpy as np
import pytest
import torch
from choices import ACTIONS, batch, learner, rows, softmax
from oracles import assert_loss_and_gradient, perceptron, weights


@pytest.mark.equation(1)
def test_loss_is_the_mean_log_likelihood():
    found = learner("bc")

    def oracle(layers):
        pi = softmax(perceptron(layers, rows()["observations"]))
        return -np.mean([np.log(pi[i, a]) for i, a in enumerate(ACTIONS)])

    assert_loss_and_gradient(found.actor_loss(batch())[0], found.actor, oracle, [])


@pytest.mark.equation(2)
def test_it_draws_by_probability_not_the_likeliest():
    found = learner("bc")
    state = rows()["observations"][0]
    wanted = softmax(perceptron(weights(found.actor), state[None]))[0]
    torch.manual_seed(0)
    drawn = found.act(np.tile(state, (20_000, 1)))
    assert np.bincount(drawn, minlength=4) / 20_000 == pytest.approx(wanted, abs=0.015)
    assert (np.sort(wanted)[1:] > 0.01).all()
