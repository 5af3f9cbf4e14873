"""AWAC: losses against NumPy, what they reduce to, the order of an update."""

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
    q_values,
    slopes,
    summed_errors,
    weights,
)
from test_learning import OPTIMUM, learn, mostly, store, walk

awac = load_script("offline/awac.py")


def make(**fields):
    """AWAC with small networks of fixed weights; the target's differ from the critic's."""
    fields = {"hidden_dim": 4, "hidden_layers": 2, **fields}
    return fix_weights(new_learner(awac, awac.Config(**fields), OBS, ACT))


# ------------------------------------------- the actor in NumPy -------------------------------------------


def drawn(layers: list[np.ndarray], observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Mean + deviation * noise, brought into [-1, 1]; the mean is the network's own, without a tanh."""
    deviation = np.exp(np.minimum(np.maximum(layers[0], -20), 2))
    return np.minimum(np.maximum(perceptron(layers[1:], observations) + deviation * noise, -1), 1)


def log_density(layers: list[np.ndarray], observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Log of the product of the entries' normal densities [B]."""
    variance = np.exp(np.minimum(np.maximum(layers[0], -20), 2)) ** 2
    errors = (actions - perceptron(layers[1:], observations)) ** 2
    return np.log(np.prod(np.exp(-errors / (2 * variance)) / np.sqrt(2 * np.pi * variance), axis=1))


def normal(seed: int, count: int = 1) -> list[np.ndarray]:
    """The noise [B, A] that the next `count` samples take after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    noise = [torch.randn(3, ACT).numpy().astype(np.float64) for _ in range(count)]
    torch.manual_seed(seed)
    return noise


def smaller(critic: list[np.ndarray], observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    return np.minimum(*q_values(critic, observations, actions))


def advantages(critic: list[np.ndarray], actor: list[np.ndarray], rows, noise) -> np.ndarray:
    """min_i Q_i(s, a) - min_i Q_i(s, b) [B]; b is the actor's, drawn with `noise`."""
    s = rows["observations"]
    return smaller(critic, s, rows["actions"]) - smaller(critic, s, drawn(actor, s, noise))


def weighted_likelihood(layers, rows, weight) -> float:
    return float(-np.mean(weight * log_density(layers, rows["observations"], rows["actions"])))


# ------------------------------------------------- losses -------------------------------------------------


@pytest.mark.equation(1, 2)
def test_critic_loss(batch, rows):
    """The target's action is the actor's and drawn; the target critics judge it, the smaller one counts."""
    learner, (noise,) = make(discount=0.9), normal(72)
    actions = drawn(weights(learner.actor), rows["next_observations"], noise)
    assert 0 < (np.abs(actions) == 1).mean() < 1  # some entries are clipped
    q = q_values(weights(learner.target_critic), rows["next_observations"], actions)
    assert len({*np.sign(q[0] - q[1])[[0, 2]]}) == 2  # each is the smaller one in a row that counts
    target = bellman(rows, 0.9, np.minimum(*q))
    loss, metrics = learner.critic_loss(batch)
    oracle = partial(summed_errors, rows=rows, target=target)
    assert_loss_and_gradient(loss, learner.critic, oracle, [learner.actor, learner.target_critic])
    q = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(np.mean(q), rel=1e-5)


@pytest.mark.equation(3, 4)
@pytest.mark.parametrize("awac_lambda", [0.1, 0.3333, 2.0])
def test_actor_loss(batch, rows, awac_lambda):
    """The weight is a number, of the critics that are trained and not of their targets."""
    learner, (noise,) = make(awac_lambda=awac_lambda), normal(0)
    critic, actor = weights(learner.critic), weights(learner.actor)
    advantage = advantages(critic, actor, rows, noise)
    assert len({*np.sign(advantage)}) == 2
    assert len({*np.sign(np.subtract(*q_values(critic, rows["observations"], rows["actions"])))}) == 2
    weight = np.minimum(np.exp(advantage / awac_lambda), 100)
    assert (weight == 100).any() == (awac_lambda == 0.1)
    loss, metrics = learner.actor_loss(batch)
    oracle = partial(weighted_likelihood, rows=rows, weight=weight)
    assert_loss_and_gradient(loss, learner.actor, oracle, [learner.critic, learner.target_critic])
    assert metrics["actor/weight"].item() == pytest.approx(weight.mean(), rel=1e-5)
    effective = weight.sum() ** 2 / (len(weight) * (weight**2).sum())
    assert metrics["actor/effective_share"].item() == pytest.approx(effective, rel=1e-3)
    assert metrics["actor/capped_share"].item() == pytest.approx((weight >= 100).mean())


class OfActions(torch.nn.Module):
    """Q_1(s, a) = Q_2(s, a) = gain where a is the data's action, and 0 elsewhere."""

    def __init__(self, actions, gain):
        super().__init__()
        self.actions, self.gain = actions, gain

    def forward(self, observations, actions):
        return (self.gain * (actions == self.actions).all(-1)).expand(2, -1)


@pytest.mark.equation(3, 4)
@pytest.mark.parametrize(
    ("advantage", "awac_lambda", "weight"),
    [
        (10.0, 0.1, 100.0),
        (0.4600, 0.1, math.exp(4.6)),  # the weight is cut from lambda ln 100 = 0.4605 on
        (0.4610, 0.1, 100.0),
        (1.5340, 1 / 3, math.exp(4.602)),  # 1.5351
        (1.5360, 1 / 3, 100.0),
        (1.0, 1.0, math.e),
        (-2.0, 1.0, math.exp(-2)),
        (1e4, 0.001, 100.0),  # exp of it is infinite
        (-1e4, 0.001, 0.0),
    ],
)
def test_weights_of_the_facts(batch, advantage, awac_lambda, weight):
    learner = make(awac_lambda=awac_lambda)
    learner.critic = OfActions(batch["actions"], advantage)
    loss, metrics = learner.actor_loss(batch)
    assert metrics["actor/weight"].item() == pytest.approx(weight, rel=1e-4)
    log_prob = learner.actor.log_prob(batch["observations"], batch["actions"]).mean().item()
    assert loss.item() == pytest.approx(-weight * log_prob, rel=1e-4)


@pytest.mark.equation(4)
def test_without_advantages_the_actor_imitates(batch, rows):
    """Every weight is 1: maximum likelihood, whatever lambda."""
    for awac_lambda in (0.1, 10.0):
        learner = make(awac_lambda=awac_lambda)
        learner.critic = Constant([[7.0] * 3, [9.0] * 3])
        oracle = partial(weighted_likelihood, rows=rows, weight=np.ones(3))
        assert_loss_and_gradient(learner.actor_loss(batch)[0], learner.actor, oracle, [])


@pytest.mark.equation(4)
def test_log_prob_of_the_facts():
    """At the mean, with deviation 1 and three entries, -log pi is 1.5 log(2 pi)."""
    actor = awac.UnboundedGaussianActor(OBS, 3, 4, 2)
    observations = torch.ones(1, OBS)
    mean = actor(observations)
    assert -actor.log_prob(observations, mean).item() == pytest.approx(1.5 * math.log(2 * math.pi), rel=1e-5)
    assert 1.5 * math.log(2 * math.pi) == pytest.approx(2.7568, abs=1e-4)
    shifted = actor.log_prob(observations, mean + torch.tensor([1.0, -2.0, 0.0]))
    assert -shifted.item() == pytest.approx(2.7568 + 0.5 + 2, abs=1e-3)


@pytest.mark.parametrize(("log_std", "bounded"), [(9.0, 2.0), (2.0, 2.0), (-30.0, -20.0), (-19.0, -19.0)])
def test_log_deviation_is_bounded(batch, log_std, bounded):
    actor, observations = make().actor, batch["observations"]
    actor.log_std.data.fill_(log_std)
    mean = actor(observations).detach()
    wanted = -ACT * (bounded + 0.5 * math.log(2 * math.pi))
    assert actor.log_prob(observations, mean).tolist() == pytest.approx([wanted] * 3, rel=1e-5)


@pytest.mark.equation(4)
def test_samples_are_normal_and_clipped():
    actor = awac.UnboundedGaussianActor(OBS, ACT, 4, 2)
    for weight in actor.net.parameters():
        weight.data.zero_()
    actor.net[-1].bias.data = torch.tensor([0.5, -3.0])  # the second mean is out of bounds
    torch.manual_seed(0)
    for log_std in (-2.0, 9.0):  # the latter is 2
        actor.log_std.data.fill_(log_std)
        first, second = actor.sample(torch.zeros(20_000, OBS)).T
        deviation = math.exp(min(log_std, 2))
        above = 0.5 * math.erfc((0.7 - 0.5) / deviation / math.sqrt(2))
        assert (first > 0.7).float().mean().item() == pytest.approx(above, abs=0.01)
        assert first.abs().max() <= 1
        assert second.abs().max() <= 1
        assert second.median() == -1
    assert actor(torch.zeros(1, OBS)).tolist() == [[0.5, -3.0]]  # the mean is not squashed


# ------------------------------------------------- update -------------------------------------------------


@pytest.mark.equation(1, 2, 3, 4, 5)
def test_updates_critic_then_actor_then_target(batch, rows):
    """Each step's gradient is that of its loss with the networks as the steps before it left them."""
    learner = make(awac_lambda=0.3333, discount=0.99, tau=0.005, actor_lr=0.1, critic_lr=0.1)
    critic, actor, target = (weights(getattr(learner, n)) for n in ("critic", "actor", "target_critic"))
    first, second = normal(0, 2)
    learner.update(batch)
    new = weights(learner.critic)
    ahead = smaller(target, rows["next_observations"], drawn(actor, rows["next_observations"], first))
    y = bellman(rows, 0.99, ahead)
    errors = partial(summed_errors, rows=rows, target=y)
    assert_close(gradients(learner.critic), slopes(errors, critic), 1e-4)
    assert_close(weights(learner.target_critic), [0.995 * a + 0.005 * b for a, b in zip(target, new)], 1e-6)

    def wanted(by):
        weight = np.minimum(np.exp(advantages(by, actor, rows, second) / 0.3333), 100)
        return slopes(partial(weighted_likelihood, rows=rows, weight=weight), actor)

    assert_close(gradients(learner.actor), wanted(new), 1e-3)
    assert max(np.abs(a - b).max() for a, b in zip(wanted(critic), wanted(new))) > 1e-2  # the old would show


@pytest.mark.parametrize("network", ["critic", "actor"])
def test_an_optimiser_moves_its_own_network_only(batch, network):
    rates = {f"{name}_lr": 0.01 * (name == network) for name in ("critic", "actor")}
    assert moved(make(tau=0.0, **rates), batch) == [network]


@pytest.mark.equation(5)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    assert_compiled_is_eager(awac, [make(tau=0.1), make(tau=0.1)], batch)


# ------------------------------------------- differences and data -------------------------------------------


def test_form_and_numbers_are_corls():
    config, layers = awac.Config(), new_learner(awac, awac.Config(), OBS, ACT)
    wanted = {"hidden_dim": 256, "hidden_layers": 3, "batch_size": 256, "awac_lambda": 0.3333}
    wanted |= {"actor_lr": 3e-4, "critic_lr": 3e-4, "discount": 0.99, "tau": 0.005, "normalize_states": True}
    wanted |= {"updates": 1_000_000, "normalize_rewards": False, "reward_scale": 1.0, "reward_shift": 0.0}
    assert {name: getattr(config, name) for name in wanted} == wanted
    shapes = [list(weight.shape) for weight in layers.actor.parameters()]
    inner = [[256, OBS], [256], [256, 256], [256], [256, 256], [256]]
    assert shapes == [[ACT], *inner, [ACT, 256], [ACT]]
    assert layers.actor.log_std.tolist() == [0, 0]
    shapes = [layer.weight.shape for layer in layers.critic.layers]
    assert shapes == [(2, OBS + ACT, 256), (2, 256, 256), (2, 256, 256), (2, 256, 1)]
    optimizers = layers.actor_optimizer, layers.critic_optimizer
    assert [optimizer.param_groups[0]["weight_decay"] for optimizer in optimizers] == [0, 0]


def test_a_truncation_bootstraps_from_its_last_observation(minari_root):
    learner = make(discount=0.9)
    learner.actor.log_std.data.fill_(-20.0)  # no noise to speak of

    def next_values(observations):
        actions = drawn(weights(learner.actor), observations, np.zeros((len(observations), ACT)))
        return smaller(weights(learner.target_critic), observations, actions)

    assert_critic_bootstraps_from_truncations(awac, learner, next_values)


def test_acts_by_the_clipped_mean_in_the_environments_units(rows):
    learner = make()

    def mean(observations):
        found = drawn(weights(learner.actor), observations, np.zeros((len(observations), ACT)))
        assert 0 < (np.abs(found) == 1).mean() < 1
        return found

    assert_acts(learner, rows, mean)


# ------------------------------------------------ learning ------------------------------------------------


def test_with_a_large_lambda_it_imitates(minari_root):
    """In the corridor that it crosses the shortest way otherwise (tests/test_learning.py)."""
    wanderings = store("test/corridor/awac-v0", [walk(seed) for seed in range(400)])
    assert mostly(learn(awac, wanderings, awac_lambda=1e6), -math.inf, 2 * OPTIMUM)
