"""Every loss term of BC, TD3+BC and IQL against NumPy calculations written from the papers' equations.

The networks' weights are fixed, their forward passes are written again below, and a gradient is what finite
differences of the NumPy loss say, with everything that an equation treats as a number held constant.
"""

import math
from functools import partial

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from oracles import (
    ACT,
    CPU,
    OBS,
    Constant,
    assert_close,
    assert_loss_and_gradient,
    bellman,
    gradients,
    networks,
    perceptron,
    q_values,
    same,
    slopes,
    snapshot,
    summed_errors,
    weights,
)
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is None)")  # Minari's advice


@pytest.fixture
def bc(scripts):
    return scripts["bc"]


@pytest.fixture
def td3_bc(scripts):
    return scripts["td3_bc"]


@pytest.fixture
def iql(scripts):
    return scripts["iql"]


def make(script, act_dim: int = ACT, **fields):
    """The script's algorithm with small networks of fixed weights; a target's differ from its source's."""
    algorithm = script.Algorithm(script.Config(hidden_dim=4, hidden_layers=2, **fields), OBS, act_dim, CPU)
    rng = np.random.default_rng(1057)  # minima, signs and caps differ from row to row
    for name in ("actor", "critic", "value", "target_actor", "target_critic"):
        if hasattr(algorithm, name):
            for weight in getattr(algorithm, name).parameters():
                weight.data = torch.tensor(rng.normal(scale=0.7, size=weight.shape), dtype=torch.float32)
    return algorithm


# ------------------------------------- the networks again, in NumPy -------------------------------------


def policy(layers: list[np.ndarray], observations: np.ndarray) -> np.ndarray:
    """Actions of a deterministic actor, or the mean actions of a Gaussian one."""
    return np.tanh(perceptron(layers, observations))


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


# ------------------------------------------------- BC -------------------------------------------------


def test_bc_loss_is_the_mean_squared_error_over_batch_and_entries(bc, batch, rows):
    algorithm = make(bc)

    def oracle(layers):
        return np.sum((policy(layers, rows["observations"]) - rows["actions"]) ** 2) / (3 * ACT)

    assert_loss_and_gradient(algorithm.actor_loss(batch)[0], algorithm.actor, oracle, [])


def test_bc_loss_of_the_facts(bc, batch):
    algorithm = make(bc)
    algorithm.actor = Constant([[1.0, -1.0]] * 3)
    batch["actions"] = torch.zeros(3, 2)
    assert algorithm.actor_loss(batch)[0].item() == 1  # a mean over entries: their sum would be 2
    batch["actions"] = torch.tensor([[1.0, -1.0]] * 3)
    assert algorithm.actor_loss(batch)[0].item() == 0


def test_bc_update_descends_its_loss(bc, batch, rows):
    algorithm = make(bc, actor_lr=1e-3)
    before = algorithm.update(batch)["actor/loss"].item()
    assert before == pytest.approx(
        np.mean((policy(weights(make(bc).actor), rows["observations"]) - rows["actions"]) ** 2), rel=1e-5
    )
    for _ in range(20):
        after = algorithm.update(batch)["actor/loss"].item()
    assert after < before
    assert algorithm.updates == 21


@pytest.mark.parametrize(
    ("fraction", "kept"), [(0.5, [1, 3]), (0.25, [3]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3]), (0.001, [3])]
)
def test_bc_keeps_the_best_fraction_of_trajectories_and_at_least_one(bc, fraction, kept):
    algorithm = make(bc, fraction=fraction)
    assert sorted(algorithm.keep_episodes(np.array([1.0, 5.0, 3.0, 9.0]))) == kept


# ------------------------------------------------ TD3+BC ------------------------------------------------


def td3_target(algorithm, rows, noise: np.ndarray, discount: float) -> np.ndarray:
    """y = r + gamma (1 - d) min_i Q'_i(s', clip(pi'(s') + noise, -1, 1))."""
    actions = policy(weights(algorithm.target_actor), rows["next_observations"]) + noise
    actions = np.minimum(np.maximum(actions, -1), 1)
    q1, q2 = q_values(weights(algorithm.target_critic), rows["next_observations"], actions)
    assert len({*np.sign(q1 - q2)[[0, 2]]}) == 2  # each is the smaller one in a row that is not terminated
    return bellman(rows, discount, np.minimum(q1, q2))


def test_td3_bc_critic_loss(td3_bc, batch, rows):
    algorithm = make(td3_bc, discount=0.9, policy_noise=0.6, noise_clip=0.5)
    torch.manual_seed(2)
    draws = 0.6 * torch.randn(3, ACT).numpy().astype(np.float64)
    noise = np.minimum(np.maximum(draws, -0.5), 0.5)
    smoothed = policy(weights(algorithm.target_actor), rows["next_observations"]) + noise
    assert 0 < (noise != draws).mean() < 1  # some of the noise is clipped,
    assert 0 < (np.abs(smoothed) > 1).mean() < 1  # and so are some of the smoothed actions
    target = td3_target(algorithm, rows, noise, 0.9)

    torch.manual_seed(2)
    loss, metrics = algorithm.critic_loss(batch)
    others = [algorithm.actor, algorithm.target_actor, algorithm.target_critic]
    oracle = partial(summed_errors, rows=rows, target=target)
    assert_loss_and_gradient(loss, algorithm.critic, oracle, others)
    q1, q2 = q_values(weights(algorithm.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx((q1.mean() + q2.mean()) / 2, rel=1e-5)


def test_td3_bc_critic_loss_without_noise(td3_bc, batch, rows):
    algorithm = make(td3_bc, policy_noise=0.0, discount=0.99)
    target = td3_target(algorithm, rows, np.zeros((3, ACT)), 0.99)
    oracle = summed_errors(weights(algorithm.critic), rows, target)
    for seed in (0, 1):
        torch.manual_seed(seed)
        assert_close(algorithm.critic_loss(batch)[0].item(), oracle)


def test_td3_bc_target_of_a_terminated_transition_is_its_reward(td3_bc, batch, rows):
    batch["terminations"] = torch.ones(3)
    for discount in (0.5, 0.99):
        algorithm = make(td3_bc, discount=discount)
        oracle = summed_errors(weights(algorithm.critic), rows, rows["rewards"])
        assert_close(algorithm.critic_loss(batch)[0].item(), oracle)


def test_td3_bc_critic_loss_is_summed_over_the_two_critics(td3_bc, batch):
    algorithm = make(td3_bc)
    batch["rewards"], batch["terminations"] = torch.zeros(3), torch.ones(3)  # y = 0
    algorithm.critic = Constant([[1.0] * 3, [2.0] * 3])
    assert algorithm.critic_loss(batch)[0].item() == 1 + 4


def test_td3_bc_actor_loss(td3_bc, batch, rows):
    algorithm = make(td3_bc, alpha=1.7)
    actor, critic = weights(algorithm.actor), weights(algorithm.critic)

    def first_q(layers):
        return q_values(critic, rows["observations"], policy(layers, rows["observations"]))[0]

    assert len({*np.sign(first_q(actor))}) == 2  # mean |Q| is not |mean Q| here
    scale = 1.7 / np.mean(np.abs(first_q(actor)))  # a number: the same whatever the layers below

    def oracle(layers):
        imitation = np.mean((policy(layers, rows["observations"]) - rows["actions"]) ** 2)
        return -scale * np.mean(first_q(layers)) + imitation

    loss = algorithm.actor_loss(batch)[0]
    others = [algorithm.target_actor, algorithm.target_critic]
    assert_loss_and_gradient(loss, algorithm.actor, oracle, others)


class LinearCritic(nn.Module):
    """Q_1(s, a) = slope * a + offset, and Q_2 much smaller, so that a minimum in place of Q_1 shows."""

    def __init__(self, slope: float, offset: float):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.tensor(slope)), offset

    def forward(self, observations, actions, **options):
        q = self.weight * actions.sum(-1) + self.offset
        return torch.stack([q, q - 1000])


@pytest.mark.parametrize("c", [0.01, 1.0, 500.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_td3_bc_actor_loss_does_not_depend_on_the_size_of_q(td3_bc, batch, c, sign):
    algorithm = make(td3_bc, alpha=2.5)
    algorithm.critic = LinearCritic(0.0, sign * c)
    imitation = (algorithm.actor(batch["observations"]) - batch["actions"]).square().mean().item()
    assert algorithm.actor_loss(batch)[0].item() == pytest.approx(-2.5 * sign + imitation, rel=1e-5)


@pytest.mark.parametrize("action", [1.0, -1.0, 0.25])
def test_td3_bc_takes_no_gradient_through_lambda(td3_bc, batch, action):
    """Q = 10 a, pi = a: dL/dpi = -2.5 * 10 / |10 a|; through lambda it would be 0, as Q / |Q| is constant."""
    algorithm = make(td3_bc, act_dim=1, alpha=2.5)
    algorithm.actor, algorithm.critic = Constant([[action]]), LinearCritic(10.0, 0.0)
    one = {key: rows[:1] for key, rows in batch.items()} | {"actions": torch.tensor([[action]])}
    gradient = torch.autograd.grad(algorithm.actor_loss(one)[0], algorithm.actor.answer)[0]
    assert gradient.item() == pytest.approx(-2.5 / abs(action))


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_td3_bc_moves_actor_and_targets_only_in_delayed_updates(td3_bc, batch, delay):
    algorithm = make(td3_bc, policy_delay=delay, tau=0.005, actor_lr=0.01, critic_lr=0.01)
    still = {name: snapshot(network) for name, network in networks(algorithm).items() if name != "critic"}
    assert len(still) == 3
    for _ in range(delay - 1):
        critic = snapshot(algorithm.critic)
        algorithm.update(batch)
        assert not same(algorithm.critic, critic)
        assert all(same(getattr(algorithm, name), weights) for name, weights in still.items())
    algorithm.update(batch)
    assert not same(algorithm.actor, still["actor"])
    for name in ("actor", "critic"):  # from the source as this update left it
        source, target = weights(getattr(algorithm, name)), weights(getattr(algorithm, f"target_{name}"))
        first = [weight.numpy() for weight in still[f"target_{name}"]]
        assert_close(target, [0.995 * old + 0.005 * new for old, new in zip(first, source)], 1e-6)
        assert max(np.abs(new - old).max() for new, old in zip(target, first)) > 1e-3  # it did move


def test_td3_bc_actor_step_gets_its_gradient_through_the_critic(td3_bc, batch, rows):
    """In `update`, which must not train the critic on (5), the actor's gradient is that of all of (5)."""
    algorithm = make(td3_bc, policy_delay=1, critic_lr=0.0, alpha=2.5)
    actor, critic = weights(algorithm.actor), weights(algorithm.critic)

    def first_q(layers):
        return q_values(critic, rows["observations"], policy(layers, rows["observations"]))[0]

    def imitation(layers):
        return np.mean((policy(layers, rows["observations"]) - rows["actions"]) ** 2)

    scale = 2.5 / np.mean(np.abs(first_q(actor)))
    wanted = slopes(lambda layers: -scale * np.mean(first_q(layers)) + imitation(layers), actor)
    algorithm.update(batch)
    assert_close(gradients(algorithm.actor), wanted, 1e-4)
    assert any(np.abs(all_of - part).max() > 1e-2 for all_of, part in zip(wanted, slopes(imitation, actor)))


def test_td3_bc_actor_loss_leaves_the_critic_alone(td3_bc, batch):
    """Its gradients and values after an update with an actor step are those of the critic's own step."""
    with_actor, without = (make(td3_bc, policy_noise=0.0, policy_delay=delay) for delay in (1, 2))
    with_actor.update(batch)
    without.update(batch)
    assert with_actor.actor_metrics
    assert not without.actor_metrics
    assert same(with_actor.critic, snapshot(without.critic))
    assert_close(gradients(with_actor.critic), gradients(without.critic), 0)
    for network in networks(with_actor).values():
        assert all(weight.requires_grad for weight in network.parameters())


# ------------------------------------------------- IQL -------------------------------------------------


def td_errors(algorithm, rows) -> np.ndarray:
    """u = min_i Q'_i(s, a) - V(s), with the target critics."""
    q1, q2 = q_values(weights(algorithm.target_critic), rows["observations"], rows["actions"])
    assert len({*np.sign(q1 - q2)}) == 2
    return np.minimum(q1, q2) - values(weights(algorithm.value), rows["observations"])


@pytest.mark.parametrize("expectile", [0.7, 0.9, 0.2])
def test_iql_value_loss(iql, batch, rows, expectile):
    algorithm = make(iql, expectile=expectile)
    u = td_errors(algorithm, rows)
    assert len({*np.sign(u)}) == 2
    q = u + values(weights(algorithm.value), rows["observations"])
    others = [algorithm.actor, algorithm.critic, algorithm.target_critic]
    oracle = lambda layers: expectile_loss(q - values(layers, rows["observations"]), expectile)  # noqa: E731
    assert_loss_and_gradient(algorithm.value_loss(batch)[0], algorithm.value, oracle, others)


def test_iql_value_loss_at_expectile_one_half_is_half_the_squared_error(iql, batch, rows):
    algorithm = make(iql, expectile=0.5)
    assert_close(algorithm.value_loss(batch)[0].item(), 0.5 * np.mean(td_errors(algorithm, rows) ** 2))


def value_loss_at(iql, value: float, q: list[float], expectile: float) -> tuple[float, float]:
    """The loss and dL/dV where V(s) = value and Q' takes the values q over the batch."""
    algorithm = make(iql, expectile=expectile)
    algorithm.value = Constant([[value]] * len(q))
    algorithm.target_critic = Constant([q, [entry + 1 for entry in q]])
    batch = {"observations": torch.zeros(len(q), OBS), "actions": torch.zeros(len(q), ACT)}
    loss = algorithm.value_loss(batch)[0]
    return loss.item(), torch.autograd.grad(loss, algorithm.value.answer)[0].sum().item()


def test_iql_value_loss_of_the_facts(iql):
    assert value_loss_at(iql, 0.0, [1.0], 0.7) == pytest.approx((0.7, -1.4))
    assert value_loss_at(iql, 0.0, [-1.0], 0.7) == pytest.approx((0.3, 0.6))


@pytest.mark.parametrize(("q", "minimiser"), [([0.0, 1.0], 0.9), ([0.0, 10.0], 9.0), ([-2.0, 3.0], 2.5)])
def test_iql_value_that_minimises_the_loss_is_the_expectile(iql, q, minimiser):
    """Between two values that is expectile * larger + (1 - expectile) * smaller."""
    around = [value_loss_at(iql, minimiser + shift, q, 0.9) for shift in (-0.1, 0.0, 0.1)]
    assert around[1][1] == pytest.approx(0, abs=1e-5)
    assert around[0][1] < -1e-3 < 1e-3 < around[2][1]
    assert around[1][0] < min(around[0][0], around[2][0])


def iql_target(algorithm, rows, discount: float) -> np.ndarray:
    """y = r + gamma (1 - d) V(s')."""
    return bellman(rows, discount, values(weights(algorithm.value), rows["next_observations"]))


@pytest.mark.parametrize("discount", [0.99, 0.5])
def test_iql_critic_loss(iql, batch, rows, discount):
    algorithm = make(iql, discount=discount)
    target = iql_target(algorithm, rows, discount)
    others = [algorithm.actor, algorithm.value, algorithm.target_critic]
    loss, metrics = algorithm.critic_loss(batch)
    oracle = partial(summed_errors, rows=rows, target=target)
    assert_loss_and_gradient(loss, algorithm.critic, oracle, others)
    q1, q2 = q_values(weights(algorithm.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx((q1.mean() + q2.mean()) / 2, rel=1e-5)


def test_iql_target_of_a_terminated_transition_is_its_reward(iql, batch, rows):
    batch["terminations"] = torch.ones(3)
    for discount in (0.5, 0.99):
        algorithm = make(iql, discount=discount)
        oracle = summed_errors(weights(algorithm.critic), rows, rows["rewards"])
        assert_close(algorithm.critic_loss(batch)[0].item(), oracle)


def test_iql_critic_loss_is_summed_over_the_two_critics(iql, batch):
    algorithm = make(iql)
    batch["rewards"], batch["terminations"] = torch.zeros(3), torch.ones(3)  # y = 0
    algorithm.critic = Constant([[1.0] * 3, [2.0] * 3])
    assert algorithm.critic_loss(batch)[0].item() == 1 + 4


@pytest.mark.parametrize("beta", [3.0, 0.5])
def test_iql_actor_loss(iql, batch, rows, beta):
    algorithm = make(iql, beta=beta)
    weight = np.minimum(np.exp(beta * td_errors(algorithm, rows)), 100)
    others = [algorithm.critic, algorithm.value, algorithm.target_critic]

    def oracle(layers):
        return -np.mean(weight * log_density(layers, rows["observations"], rows["actions"]))

    loss, metrics = algorithm.actor_loss(batch)
    assert_loss_and_gradient(loss, algorithm.actor, oracle, others)
    assert metrics["actor/weight"].item() == pytest.approx(weight.mean(), rel=1e-4)


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
def test_iql_weight_of_an_advantage(iql, batch, advantage, beta, weight):
    algorithm = make(iql, beta=beta)
    algorithm.value = Constant([[2.0]] * 3)
    algorithm.target_critic = Constant([[2.0 + advantage] * 3, [9999.0] * 3])
    log_prob = algorithm.actor.log_prob(batch["observations"], batch["actions"]).mean().item()
    loss, metrics = algorithm.actor_loss(batch)
    assert loss.item() == pytest.approx(-weight * log_prob, rel=1e-4)
    assert metrics["actor/weight"].item() == pytest.approx(weight, rel=1e-4)


def test_iql_log_prob_depends_on_the_action(iql, batch):
    actor = make(iql, act_dim=3).actor
    actor.log_std.data = torch.zeros(3)
    observations = batch["observations"]
    mean = actor(observations).detach()
    at_mean = actor.log_prob(observations, mean)
    assert at_mean.tolist() == pytest.approx([-2.756816] * 3, abs=1e-5)  # -3/2 log(2 pi)
    beside = actor.log_prob(observations, mean + torch.tensor([1.0, 0.0, 2.0]))
    assert (at_mean - beside).tolist() == pytest.approx([0.5 + 2.0] * 3, rel=1e-4)


@pytest.mark.parametrize(("beyond", "limit"), [(7.0, 2.0), (-9.0, -5.0)])
def test_iql_log_std_is_clipped(iql, batch, beyond, limit):
    actor = make(iql).actor
    observations, mean = batch["observations"], actor(batch["observations"]).detach()
    for log_std in (beyond, limit, limit - math.copysign(1, limit)):  # the last is within the bounds
        actor.log_std.data.fill_(log_std)
        inside = math.copysign(min(abs(log_std), abs(limit)), limit)
        wanted = -ACT * (inside + 0.5 * math.log(2 * math.pi))  # at the mean
        assert actor.log_prob(observations, mean).tolist() == pytest.approx([wanted] * 3, rel=1e-5)


def test_iql_log_prob_is_the_normal_density(iql, batch, rows):
    actor = make(iql).actor
    oracle = log_density(weights(actor), rows["observations"], rows["actions"])
    assert_close(actor.log_prob(batch["observations"], batch["actions"]).detach().numpy(), oracle)


def test_iql_updates_value_then_actor_then_critic_then_target(iql, batch, rows):
    """Each step's gradient is that of its loss with the networks as the steps before it left them."""
    fields = {"expectile": 0.7, "beta": 3.0, "discount": 0.99, "tau": 0.005}
    algorithm = make(iql, **fields, value_lr=0.1, actor_lr=0.1, critic_lr=0.1)
    value, actor, critic, target = (
        weights(getattr(algorithm, name)) for name in ("value", "actor", "critic", "target_critic")
    )
    q = np.minimum(*q_values(target, rows["observations"], rows["actions"]))
    algorithm.update(batch)
    new_value, new_critic = weights(algorithm.value), weights(algorithm.critic)

    def value_oracle(layers):
        return expectile_loss(q - values(layers, rows["observations"]), 0.7)

    def actor_oracle(v):
        weight = np.minimum(np.exp(3 * (q - values(v, rows["observations"]))), 100)
        return lambda layers: -np.mean(weight * log_density(layers, rows["observations"], rows["actions"]))

    def critic_oracle(v):
        y = bellman(rows, 0.99, values(v, rows["next_observations"]))
        return lambda layers: summed_errors(layers, rows, y)

    assert_close(gradients(algorithm.value), slopes(value_oracle, value), 1e-4)
    assert_close(gradients(algorithm.actor), slopes(actor_oracle(new_value), actor), 1e-4)
    assert_close(gradients(algorithm.critic), slopes(critic_oracle(new_value), critic), 1e-4)
    mixed = [0.995 * old + 0.005 * new for old, new in zip(target, new_critic)]
    assert_close(weights(algorithm.target_critic), mixed, 1e-6)
    # The old V would show:
    for oracle, start in ((actor_oracle, actor), (critic_oracle, critic)):
        pairs = zip(slopes(oracle(value), start), slopes(oracle(new_value), start))
        assert max(np.abs(old - new).max() for old, new in pairs) > 1e-2


def test_iql_actor_learning_rate_falls_along_a_cosine(iql, batch):
    algorithm, used = make(iql, updates=10, actor_lr=0.01, value_lr=0.02, critic_lr=0.03), []
    for _ in range(10):
        used.append(algorithm.actor_optimizer.param_groups[0]["lr"])
        algorithm.update(batch)
    assert used == pytest.approx([0.01 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)])
    assert algorithm.actor_optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert algorithm.value_optimizer.param_groups[0]["lr"] == 0.02
    assert algorithm.critic_optimizer.param_groups[0]["lr"] == 0.03
    actor = snapshot(algorithm.actor)
    algorithm.actor_optimizer.param_groups[0]["lr"] = 0.0
    algorithm.update(batch)
    assert same(algorithm.actor, actor)  # the rate above is the one that the actor steps with


def test_iql_drops_units_in_training_only(iql, batch, rows):
    algorithm = make(iql, dropout=0.5)
    losses = [algorithm.actor_loss(batch)[0].item() for _ in range(8)]
    assert len({*losses}) > 1
    layers = weights(algorithm.actor)[1:]
    for _ in range(2):
        assert_close(algorithm.act(rows["observations"]), policy(layers, rows["observations"]))
    assert algorithm.actor.training
    losses = [make(iql, dropout=0.0).actor_loss(batch)[0].item() for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_iql_drops_the_said_share_of_the_units_of_every_hidden_layer(iql, share):
    config = iql.Config(hidden_dim=1000, hidden_layers=2, dropout=share)
    actor = iql.Algorithm(config, OBS, ACT, CPU).actor
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


# ------------------------------------- what holds for several of them -------------------------------------


COMMON = {"updates": 1_000_000, "batch_size": 256, "hidden_dim": 256, "hidden_layers": 2, "actor_lr": 3e-4}
CRITIC = {"critic_lr": 3e-4, "discount": 0.99, "tau": 0.005, "reward_scale": 1.0, "reward_shift": 0.0}
PAPERS = {
    "bc": {"fraction": 1.0, "normalize_states": True},  # CORL's: the paper has none for vectors
    "td3_bc": CRITIC
    | {"alpha": 2.5, "policy_noise": 0.2, "noise_clip": 0.5, "policy_delay": 2}
    | {"normalize_states": True, "normalize_rewards": False},
    "iql": CRITIC
    | {"value_lr": 3e-4, "expectile": 0.7, "beta": 3.0, "dropout": 0.0}
    | {"normalize_states": False, "normalize_rewards": False},  # how rewards are scaled differs by domain
}


@pytest.mark.parametrize("name", PAPERS)
def test_defaults_are_the_papers(scripts, name):
    config, wanted = scripts[name].Config(), {**COMMON, **PAPERS[name]}
    assert {field: getattr(config, field) for field in wanted} == wanted


OWN = {"bc": ["actor"], "td3_bc": ["critic", "actor"], "iql": ["value", "actor", "critic"]}


@pytest.mark.parametrize(("name", "moved"), [(name, one) for name, all_of in OWN.items() for one in all_of])
def test_an_optimiser_moves_its_own_network_only(scripts, batch, name, moved):
    """With the other learning rates at zero (and the targets' too) nothing else moves in two updates."""
    rates = {f"{network}_lr": 0.01 if network == moved else 0.0 for network in OWN[name]}
    algorithm = make(scripts[name], **rates, **({} if name == "bc" else {"tau": 0.0}))
    before = {key: snapshot(network) for key, network in networks(algorithm).items()}
    algorithm.update(batch)
    algorithm.update(batch)
    assert [key for key, network in networks(algorithm).items() if not same(network, before[key])] == [moved]


@pytest.mark.parametrize("name", OWN)
def test_compiled_updates_equal_eager_ones_and_targets_are_exact_averages(scripts, batch, name):
    """Five updates of two twins, one with compiled losses, give the same numbers; and the targets are what
    (1 - tau) theta' + tau theta makes, in float64, of the weights after each update (TD3+BC: each second).
    """
    script, tau = scripts[name], 0.1
    twins = [make(script, **({} if name == "bc" else {"tau": tau})) for _ in range(2)]
    assert script.compile_losses(twins[1], CPU)
    assert vars(twins[1]).keys() - vars(twins[0]).keys() == {f"{network}_loss" for network in OWN[name]}
    histories = []
    for algorithm in twins:
        targets = {"bc": [], "td3_bc": ["target_actor", "target_critic"], "iql": ["target_critic"]}[name]
        expected, history = {target: weights(getattr(algorithm, target)) for target in targets}, []
        for update in range(1, 6):
            torch.manual_seed(update)
            history.append({key: float(value) for key, value in algorithm.update(batch).items()})
            for target, old in expected.items():
                if name != "td3_bc" or update % 2 == 0:
                    new = weights(getattr(algorithm, target.removeprefix("target_")))
                    expected[target] = [(1 - tau) * a + tau * b for a, b in zip(old, new)]
        for target, wanted in expected.items():
            assert_close(weights(getattr(algorithm, target)), wanted, 1e-6)
        histories.append(history)
    for eager, compiled in zip(*histories):
        assert eager.keys() == compiled.keys()
        assert list(compiled.values()) == pytest.approx(list(eager.values()), rel=1e-4, abs=1e-5)
    for left, right in zip(networks(twins[0]).values(), networks(twins[1]).values()):
        assert_close(weights(right), weights(left), 1e-4)


# ------------------------------------- from the dataset to the loss -------------------------------------


def episode(observations: list, rewards: list, terminated: bool) -> EpisodeBuffer:
    """Actions alternate between two values; the last step terminates or truncates the episode."""
    last = np.arange(len(rewards)) == len(rewards) - 1
    return EpisodeBuffer(
        observations=np.array(observations, np.float32),
        actions=np.resize(np.array([[0.5, -1.0], [-2.0, 2.0]], np.float32), (len(rewards), ACT)),
        rewards=np.array(rewards),
        terminations=last & terminated,
        truncations=last & (not terminated),
        infos={},
    )


ACTIONS = gym.spaces.Box(-2, 2, (ACT,), np.float32)


def store(name: str, episodes: list[EpisodeBuffer]) -> minari.MinariDataset:
    space = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    return minari.create_dataset_from_buffers(
        name, episodes, observation_space=space, action_space=ACTIONS, data_format="hdf5"
    )


@pytest.fixture(scope="module")
def two_endings(minari_root) -> minari.MinariDataset:
    """One episode of a step that terminates, one of two steps that a time limit cuts: three transitions."""
    ended = episode([[0.1, 0.2, 0.3], [0.4, -0.5, 0.6]], [1.0], terminated=True)
    cut = episode([[1.0, -1.1, 1.2], [1.3, 1.4, -1.5], [-1.6, 1.7, 1.8]], [2.0, 4.0], terminated=False)
    return store("test/losses/endings-v0", [ended, cut])


def load(script, dataset, **fields) -> tuple:
    algorithm = make(script, **fields)
    return algorithm, script.load_transitions(dataset, ACTIONS, algorithm)[0]


@pytest.mark.parametrize("name", OWN)
def test_transitions_are_the_datas(scripts, two_endings, name):
    _, data = load(scripts[name], two_endings, normalize_states=False)
    wanted = {
        "observations": [[0.1, 0.2, 0.3], [1.0, -1.1, 1.2], [1.3, 1.4, -1.5]],
        "actions": [[0.25, -0.5], [0.25, -0.5], [-1.0, 1.0]],  # in [-1, 1]
        "rewards": [1.0, 2.0, 4.0],
        "next_observations": [[0.4, -0.5, 0.6], [1.3, 1.4, -1.5], [-1.6, 1.7, 1.8]],
        "terminations": [1.0, 0.0, 0.0],  # the last one was cut
    }
    assert data.keys() == wanted.keys()
    for key, column in wanted.items():
        assert data[key].dtype == torch.float32
        np.testing.assert_allclose(data[key], column, rtol=1e-6)


@pytest.mark.parametrize("name", ["td3_bc", "iql"])
def test_truncations_bootstrap_from_their_last_observation_terminations_do_not(scripts, two_endings, name):
    """The critic's loss on the loaded data: a row more or a target without V(s') would show."""
    noiseless = {"policy_noise": 0.0} if name == "td3_bc" else {}
    algorithm, data = load(scripts[name], two_endings, discount=0.9, normalize_states=False, **noiseless)
    after = np.array([[1.3, 1.4, -1.5], [-1.6, 1.7, 1.8]])  # the truncated episode's own
    if name == "iql":
        ahead = values(weights(algorithm.value), after)
    else:
        actions = policy(weights(algorithm.target_actor), after)
        ahead = np.minimum(*q_values(weights(algorithm.target_critic), after, actions))
    assert np.abs(ahead).min() > 0.1
    target = np.array([1.0, 2.0 + 0.9 * ahead[0], 4.0 + 0.9 * ahead[1]])
    rows = {key: column.numpy().astype(np.float64) for key, column in data.items()}
    oracle = summed_errors(weights(algorithm.critic), rows, target)
    assert_close(algorithm.critic_loss(data)[0].item(), oracle)


@pytest.mark.parametrize("name", ["td3_bc", "iql"])
def test_rewards_are_scaled_and_shifted(scripts, two_endings, name):
    """Returns are 1 and 6: normalize_rewards multiplies by 1000 / 5; then comes the scale, then the shift."""
    cases = {
        (1.0, 0.0, False): [1.0, 2.0, 4.0],
        (0.5, -1.0, False): [-0.5, 0.0, 1.0],
        (0.5, -1.0, True): [99.0, 199.0, 399.0],
    }
    for (scale, shift, normalize), wanted in cases.items():
        fields = {"reward_scale": scale, "reward_shift": shift, "normalize_rewards": normalize}
        data = load(scripts[name], two_endings, **fields)[1]
        np.testing.assert_allclose(data["rewards"], wanted, rtol=1e-6)


@pytest.fixture(scope="module")
def one_constant(minari_root) -> minari.MinariDataset:
    """Two transitions; the first entry of their observations never changes."""
    observations = [[5.0, 1.0, 0.0], [5.0, 3.0, 2.0], [5.0, 8.0, 4.0]]
    return store("test/losses/constant-v0", [episode(observations, [0.0, 1.0], terminated=True)])


@pytest.mark.parametrize("name", OWN)
def test_states_are_standardised_only_if_asked_and_constants_become_zero(scripts, one_constant, name):
    algorithm, data = load(scripts[name], one_constant, normalize_states=True)
    observations = one_constant[0].observations
    mean, std = np.array([5.0, 2.0, 1.0]), np.array([0.0, 1.0, 1.0]) + 1e-3  # of the first two rows
    standard = (observations - mean) / std
    np.testing.assert_allclose(data["observations"], standard[:2], atol=1e-5)
    np.testing.assert_allclose(data["next_observations"], standard[1:], atol=1e-5)
    assert (data["observations"][:, 0] == 0).all()
    # `act` does the same to the raw observations that it gets, and answers in the environment's units.
    layers = weights(algorithm.actor)[1 if name == "iql" else 0 :]
    assert_close(algorithm.act(observations), 2 * policy(layers, standard))
    raw = load(scripts[name], one_constant, normalize_states=False)[1]
    np.testing.assert_allclose(raw["observations"], observations[:2])


def test_bc_fraction_counts_trajectories_not_steps(bc, minari_root):
    """Returns 1, 5, 3, 9 and lengths 1, 2, 3, 4: the best half by return is six of the ten steps."""
    episodes = [
        episode(np.full((length + 1, OBS), number), [total / length] * length, terminated=False)
        for number, (total, length) in enumerate([(1.0, 1), (5.0, 2), (3.0, 3), (9.0, 4)])
    ]
    dataset = store("test/losses/fraction-v0", episodes)
    for fraction, kept in {0.25: [3] * 4, 0.5: [1, 1] + [3] * 4, 1.0: [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]}.items():
        data = load(bc, dataset, fraction=fraction, normalize_states=False)[1]
        assert data["observations"][:, 0].tolist() == kept
        assert {len(column) for column in data.values()} == {len(kept)}
