"""Every loss term of FQL against NumPy calculations written from the paper's equations."""

from functools import partial

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
    assert_critic_bootstraps_from_truncations,
    assert_loss_and_gradient,
    bellman,
    fix_weights,
    gradients,
    moved,
    networks,
    slopes,
    weights,
)
from torch import nn

fql = load_script("offline/fql.py")


def make(**fields):
    """FQL with small networks of fixed weights; a target's differ from its source's."""
    fields = {"hidden_dim": 4, "hidden_layers": 2, "flow_steps": 3, **fields}
    learner = fix_weights(new_learner(fql, fql.Config(**fields), OBS, ACT))
    rng = np.random.default_rng(11)
    for weight in learner.flow.parameters():
        weight.data = torch.tensor(rng.normal(scale=0.5, size=weight.shape), dtype=torch.float32)
    return learner


# ------------------------------------- the networks again, in NumPy -------------------------------------


def gelu(x: np.ndarray) -> np.ndarray:
    """In the form with tanh, which the authors' framework takes by default."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dense(layers: list[np.ndarray], *inputs: np.ndarray) -> np.ndarray:
    """GELU between the layers, none after the last."""
    x = np.concatenate(inputs, axis=1)
    for number in range(0, len(layers), 2):
        x = x @ layers[number].T + layers[number + 1]
        if number < len(layers) - 2:
            x = gelu(x)
    return x


def q_values(layers: list[np.ndarray], observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Q_i [2, B] of critics whose hidden layers are normalised after the GELU."""
    results = []
    for member in range(2):
        x = np.concatenate([observations, actions], axis=1)
        for number in range(0, len(layers) - 2, 4):
            weight, bias, scale, shift = (layer[member] for layer in layers[number : number + 4])
            x = gelu(x @ weight + bias)
            x = x - x.mean(1, keepdims=True)
            x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * scale + shift
        results.append((x @ layers[-2][member] + layers[-1][member])[:, 0])
    return np.stack(results)


def clip(actions: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(actions, -1), 1)


def normal(seed: int) -> np.ndarray:
    """The noise [3, A] that a first draw gives after torch.manual_seed(seed), which is done again."""
    torch.manual_seed(seed)
    noise = torch.randn(3, ACT).numpy().astype(np.float64)
    torch.manual_seed(seed)
    return noise


def carried(layers: list[np.ndarray], observations: np.ndarray, noise: np.ndarray, steps: int) -> np.ndarray:
    """x_K of (2), before it is clipped."""
    x = noise
    for k in range(steps):
        x = x + dense(layers, observations, x, np.full((len(x), 1), k / steps)) / steps
    return x


# -------------------------------------------------- flow --------------------------------------------------


@pytest.mark.equation(1)
def test_flow_loss(batch, rows):
    learner = make()
    torch.manual_seed(3)
    noise, time = (torch.randn(3, ACT).numpy(), torch.rand(3, 1).numpy())
    x = rows["actions"] * time + noise * (1 - time)

    def oracle(layers):
        return np.mean((dense(layers, rows["observations"], x, time) - rows["actions"] + noise) ** 2)

    torch.manual_seed(3)
    loss, _ = learner.flow_loss(batch)
    others = [learner.actor, learner.critic, learner.target_critic]
    assert_loss_and_gradient(loss, learner.flow, oracle, others)


@pytest.mark.equation(1)
def test_flow_sees_the_facts_point_between_noise_and_action(batch, monkeypatch):
    """At t = 1/4, z = 0, a = 4 that is 1, and a flow that gives a - z has no loss."""
    learner, seen = make(), []
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, 0.25))
    learner.flow = lambda inputs: seen.append(inputs) or torch.full((3, ACT), 4.0)
    loss, _ = learner.flow_loss(batch | {"actions": torch.full((3, ACT), 4.0)})
    assert loss.item() == 0
    assert torch.equal(seen[0][:, :OBS], batch["observations"])
    assert seen[0][:, OBS:].tolist() == [[1.0, 1.0, 0.25]] * 3


@pytest.mark.equation(2)
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_following_the_flow(batch, rows, steps):
    learner, noise = make(flow_steps=steps), normal(4)
    wanted = carried(weights(learner.flow), rows["observations"], noise, steps)
    assert 0 < (np.abs(wanted) > 1).mean() < 1
    found = learner.follow_flow(batch["observations"], torch.tensor(noise, dtype=torch.float32))
    assert_close(found.numpy(), clip(wanted))


@pytest.mark.equation(2)
@pytest.mark.parametrize("steps", [1, 2, 7, 10])
def test_a_constant_flow_adds_its_velocity(batch, steps):
    """And a straight one, a - z, arrives in one step as in ten."""
    learner, noise = make(flow_steps=steps), torch.tensor([[0.5, -0.3]] * 3)
    learner.flow = Constant([[0.3, -0.4]] * 3)
    found = learner.follow_flow(batch["observations"], noise)
    np.testing.assert_allclose(found, [[0.8, -0.7]] * 3, atol=1e-6)
    learner.flow = lambda inputs: batch["actions"] - noise
    np.testing.assert_allclose(learner.follow_flow(batch["observations"], noise), batch["actions"], atol=1e-6)


# ------------------------------------------------- policy -------------------------------------------------


@pytest.mark.equation(2, 3, 4)
@pytest.mark.parametrize("alpha", [0.0, 10.0])
@pytest.mark.parametrize("normalize_q", [False, True])
def test_actor_loss(batch, rows, alpha, normalize_q):
    """Its gradient is mu's alone: the flow that is distilled has none, and at alpha = 0 only Q counts."""
    learner, noise = make(alpha=alpha, normalize_q=normalize_q), normal(5)
    observations, critic = rows["observations"], weights(learner.critic)
    wanted = clip(carried(weights(learner.flow), observations, noise, 3))
    drawn = dense(weights(learner.actor), observations, noise)
    assert 0 < (np.abs(drawn) > 1).mean() < 1  # Q is asked about the clipped one, the distance is not
    weight = 1.0
    if normalize_q:
        weight = 1 / np.mean(np.abs(np.mean(q_values(critic, observations, clip(drawn)), axis=0)))

    def oracle(layers):
        actions = dense(layers, observations, noise)
        q1, q2 = q_values(critic, observations, clip(actions))
        return alpha * np.mean((actions - wanted) ** 2) - weight * np.mean((q1 + q2) / 2)

    loss, metrics = learner.actor_loss(batch)
    flows = torch.autograd.grad(loss, [*learner.flow.parameters()], retain_graph=True, allow_unused=True)
    assert flows == (None,) * len(flows)
    assert_loss_and_gradient(loss, learner.actor, oracle, [learner.flow, learner.target_critic])
    assert_close(metrics["actor/distance"].item(), np.mean((drawn - wanted) ** 2))


@pytest.mark.equation(4)
@pytest.mark.parametrize("scale", [1.0, 7.0, -300.0])
def test_a_normalised_q_weighs_the_same_whatever_its_scale(batch, scale):
    learner = make(alpha=0.0, normalize_q=True)
    learner.critic = Constant([[scale] * 3, [3 * scale] * 3])
    assert learner.actor_loss(batch)[0].item() == pytest.approx(-np.sign(scale))


@pytest.mark.equation(8)
def test_acts_by_the_one_step_policy_in_the_environments_units(rows):
    learner, noise = make(), normal(6)
    learner.scaler.low, learner.scaler.high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])
    learner.scaler.mean, learner.scaler.std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 0.5])
    standard = (rows["observations"] - [0.1, 0.2, 0.3]) / [1.0, 2.0, 0.5]
    actions = dense(weights(learner.actor), standard, noise)
    assert 0 < (np.abs(actions) > 1).mean() < 1
    wanted = np.array([-2.0, 0.0]) + (clip(actions) + 1) / 2 * np.array([4.0, 10.0])
    assert_close(learner.act(rows["observations"]), wanted)
    torch.manual_seed(6)
    assert_close(learner.act(rows["observations"][0]), wanted[0])


# ------------------------------------------------- critic -------------------------------------------------


def target(learner, rows, noise: np.ndarray, together) -> np.ndarray:
    """y, where together(Q'_1, Q'_2) is the mean of two or the smaller of two."""
    actions = dense(weights(learner.actor), rows["next_observations"], noise)
    assert 0 < (np.abs(actions) > 1).mean() < 1
    q1, q2 = q_values(weights(learner.target_critic), rows["next_observations"], clip(actions))
    return bellman(rows, learner.config.discount, together(q1, q2))


def mean_errors(layers: list[np.ndarray], rows, y: np.ndarray) -> float:
    q1, q2 = q_values(layers, rows["observations"], rows["actions"])
    return float(np.mean([(q1 - y) ** 2, (q2 - y) ** 2]))


@pytest.mark.equation(5, 6)
@pytest.mark.parametrize("min_target", [False, True])
def test_critic_loss(batch, rows, min_target):
    learner, noise = make(discount=0.9, min_target=min_target), normal(12)
    y = target(learner, rows, noise, np.minimum if min_target else lambda q1, q2: (q1 + q2) / 2)
    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.flow, learner.target_critic]
    assert_loss_and_gradient(loss, learner.critic, partial(mean_errors, rows=rows, y=y), others)
    q = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(q.mean(), rel=1e-4)


@pytest.mark.equation(5, 6)
@pytest.mark.parametrize(("min_target", "wanted"), [(False, 3.0), (True, 2.0)])
def test_targets_of_the_facts(batch, min_target, wanted):
    """Of 2 and 4 the mean is 3 and the minimum 2."""
    learner = make(discount=1.0, min_target=min_target)
    learner.target_critic = Constant([[2.0] * 3, [4.0] * 3])
    learner.critic = Constant([[0.0] * 3, [1.0] * 3])
    batch |= {"rewards": torch.zeros(3), "terminations": torch.zeros(3)}
    assert learner.critic_loss(batch)[0].item() == (wanted**2 + (wanted - 1) ** 2) / 2


def test_a_truncation_bootstraps_from_its_last_observation(minari_root, monkeypatch):
    """The shared check sums over the critics, where FQL takes the mean."""
    learner = make(discount=0.9)
    learner.draw = lambda observations: torch.zeros(len(observations), ACT)
    layers, loss = weights(learner.target_critic), learner.critic_loss
    learner.critic_loss = lambda data: (2 * loss(data)[0], {})
    monkeypatch.setattr("oracles.q_values", q_values)

    def next_values(observations):
        return q_values(layers, observations, np.zeros((len(observations), ACT))).mean(0)

    assert_critic_bootstraps_from_truncations(fql, learner, next_values)


# -------------------------------------------------- update --------------------------------------------------


@pytest.mark.equation(1, 3, 6, 7)
def test_all_gradients_are_of_the_networks_before_the_update(batch, rows):
    """As one optimiser over all weights has it: the first of the differences from the paper."""
    learner = make(tau=0.1, actor_lr=0.1, critic_lr=0.1, alpha=3.0)
    before = {name: weights(network) for name, network in networks(learner).items()}
    torch.manual_seed(7)
    noises = [torch.randn(3, ACT), torch.rand(3, 1), torch.randn(3, ACT), torch.randn(3, ACT)]
    z, time, policy_z, next_z = (noise.numpy().astype(np.float64) for noise in noises)
    observations, x = rows["observations"], time * rows["actions"] + (1 - time) * z
    wanted = clip(carried(before["flow"], observations, policy_z, 3))
    y = target(learner, rows, next_z, lambda q1, q2: (q1 + q2) / 2)

    def flow_oracle(layers):
        return np.mean((dense(layers, observations, x, time) - (rows["actions"] - z)) ** 2)

    def actor_oracle(layers):
        actions = dense(layers, observations, policy_z)
        q = q_values(before["critic"], observations, clip(actions)).mean()
        return 3 * np.mean((actions - wanted) ** 2) - q

    torch.manual_seed(7)
    learner.update(batch)
    assert_close(gradients(learner.flow), slopes(flow_oracle, before["flow"]), 1e-4)
    assert_close(gradients(learner.actor), slopes(actor_oracle, before["actor"]), 1e-4)
    critic_oracle = partial(mean_errors, rows=rows, y=y)
    assert_close(gradients(learner.critic), slopes(critic_oracle, before["critic"]), 1e-4)
    mixed = [0.9 * a + 0.1 * b for a, b in zip(before["target_critic"], weights(learner.critic))]
    assert_close(weights(learner.target_critic), mixed, 1e-6)


def test_three_optimisers_are_one_over_all_weights(batch):
    """Adam takes every weight for itself: its step size is all that the groups could differ in."""
    learner, one = make(actor_lr=0.01, critic_lr=0.01), make(actor_lr=0.01, critic_lr=0.01)
    parts = {"flow": one.flow, "actor": one.actor, "critic": one.critic}
    parameters = [weight for part in parts.values() for weight in part.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.01, fused=True)
    for update in range(3):
        torch.manual_seed(update)
        learner.update(batch)
        torch.manual_seed(update)
        for name, part in parts.items():
            loss = getattr(one, f"{name}_loss")(batch)[0]
            for weight, gradient in zip(part.parameters(), torch.autograd.grad(loss, part.parameters())):
                weight.grad = gradient.contiguous()
        optimizer.step()
        fql.polyak(one.target_critic, one.critic, one.config.tau)
    for ours, theirs in zip(networks(learner).values(), networks(one).values()):
        assert_close(weights(ours), weights(theirs), 1e-6)


@pytest.mark.equation(7)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    twins = [make(tau=0.1, flow_steps=2, hidden_layers=1) for _ in range(2)]
    assert_compiled_is_eager(fql, twins, batch)


@pytest.mark.parametrize(("rate", "networks"), [("actor_lr", ["flow", "actor"]), ("critic_lr", ["critic"])])
def test_an_optimiser_moves_its_own_networks_only(batch, rate, networks):
    rates = {name: 0.01 * (name == rate) for name in ("actor_lr", "critic_lr")}
    assert moved(make(tau=0.0, **rates), batch, 2) == networks


def test_only_the_critic_is_normalised():
    learner = make()
    kinds = {name: {type(layer) for layer in net.modules()} for name, net in networks(learner).items()}
    assert fql.EnsembleLayerNorm in kinds["critic"]
    assert not {fql.EnsembleLayerNorm, nn.LayerNorm} & (kinds["actor"] | kinds["flow"])


def test_defaults_are_the_papers():
    config = fql.Config()
    wanted = {"updates": 1_000_000, "batch_size": 256, "hidden_dim": 512, "hidden_layers": 4, "tau": 0.005}
    wanted |= {"actor_lr": 3e-4, "critic_lr": 3e-4, "discount": 0.99, "alpha": 10.0, "flow_steps": 10}
    wanted |= {"normalize_q": False, "min_target": False, "normalize_states": False}
    assert {field: getattr(config, field) for field in wanted} == wanted
