"""Every loss term of IDQL, its noise schedule and its sampler against NumPy calculations from the paper.

V and Q are IQL's: that they are is one test, and test_iql.py holds them to their equations.
"""

import ast
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script, new_learner
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
    perceptron,
    q_values,
    slopes,
    summed_errors,
    weights,
)
from torch import nn

idql = load_script("offline/idql.py")
BETA = [0.19587456, 0.45881819, 0.63578102, 0.75487819, 0.83503138]  # of the facts, for T = 5
ALPHA_BAR = [0.80412544, 0.43517806, 0.15850011, 0.03885183, 0.00640933]


class Linear(nn.Module):
    """Stands in for the actor: a linear function of state, noisy action and step."""

    def __init__(self, act_dim: int = ACT):
        super().__init__()
        self.layer = nn.Linear(OBS + act_dim + 1, act_dim)

    def forward(self, observations, actions, steps):
        steps = steps.expand(len(actions)).unsqueeze(-1)
        return self.layer(torch.cat([observations, actions, steps], -1))


def linear(layers: list[np.ndarray], observations, actions, steps) -> np.ndarray:
    """The same in NumPy."""
    steps = np.broadcast_to(np.asarray(steps, float).reshape(-1, 1), (len(actions), 1))
    return perceptron(layers, np.concatenate([observations, actions, steps], axis=1))


def make(stand_in: bool = True, **fields):
    """IDQL with small networks of fixed weights; targets and averages differ from their sources."""
    learner = new_learner(idql, idql.Config(**{"hidden_dim": 4, **fields}), OBS, ACT)
    if stand_in:
        rate = learner.config.actor_lr
        learner.actor, learner.ema_actor = Linear(), Linear()
        learner.actor_optimizer = torch.optim.Adam(learner.actor.parameters(), rate, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR
        learner.actor_schedule = schedule(learner.actor_optimizer, learner.config.updates)
    fix_weights(learner)
    rng = np.random.default_rng(7)
    for weight in learner.ema_actor.parameters():
        weight.data = torch.tensor(rng.normal(scale=0.4, size=weight.shape), dtype=torch.float32)
    return learner


def values(layers: list[np.ndarray], observations: np.ndarray) -> np.ndarray:
    return perceptron(layers, observations)[:, 0]


# ----------------------------------------- V and Q, which are IQL's -----------------------------------------


def method(script: str, name: str) -> str:
    """The syntax tree of a learner's method."""
    tree = ast.parse((ROOT / f"algorithms/offline/{script}.py").read_text())
    (found,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    return ast.dump(found)


@pytest.mark.parametrize("name", ["value_loss", "critic_loss"])
def test_value_and_critic_are_iqls(name):
    assert method("idql", name) == method("iql", name)


@pytest.mark.equation(1)
@pytest.mark.parametrize("expectile", [0.7, 0.9])
def test_value_loss(batch, rows, expectile):
    learner = make(expectile=expectile)
    q = np.minimum(*q_values(weights(learner.target_critic), rows["observations"], rows["actions"]))

    def oracle(layers):
        u = q - values(layers, rows["observations"])
        return np.mean(np.where(u > 0, expectile, 1 - expectile) * u**2)

    others = [learner.actor, learner.ema_actor, learner.critic, learner.target_critic]
    loss, _ = learner.value_loss(batch, learner.target_q(batch))
    assert_loss_and_gradient(loss, learner.value, oracle, others)


@pytest.mark.equation(1)
@pytest.mark.parametrize(("q", "loss"), [(1.0, 0.7), (-1.0, 0.3)])
def test_value_loss_of_the_facts(batch, q, loss):
    learner = make(expectile=0.7)
    learner.value, learner.target_critic = Constant([[0.0]] * 3), Constant([[q] * 3, [q + 1] * 3])
    assert learner.value_loss(batch, learner.target_q(batch))[0].item() == pytest.approx(loss)


@pytest.mark.equation(2)
def test_critic_loss(batch, rows):
    learner = make(discount=0.9)
    target = bellman(rows, 0.9, values(weights(learner.value), rows["next_observations"]))
    oracle = partial(summed_errors, rows=rows, target=target)
    others = [learner.actor, learner.value, learner.target_critic]
    assert_loss_and_gradient(learner.critic_loss(batch)[0], learner.critic, oracle, others)


def test_a_truncation_bootstraps_from_its_last_observation(minari_root):
    learner = make(discount=0.9)
    assert_critic_bootstraps_from_truncations(idql, learner, partial(values, weights(learner.value)))


# ------------------------------------------------ diffusion ------------------------------------------------


@pytest.mark.equation(3)
def test_noise_schedule_of_the_facts():
    beta, alpha_bar = idql.vp_schedule(5)
    np.testing.assert_allclose(beta.double(), BETA, rtol=0, atol=3e-8)  # float32's next neighbours
    np.testing.assert_allclose(alpha_bar.double(), ALPHA_BAR, rtol=0, atol=3e-8)
    learner = make()
    assert torch.equal(learner.beta, beta)
    assert torch.equal(learner.alpha_bar, alpha_bar)


@pytest.mark.equation(3)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_noise_schedule_is_the_paths_of_a_line(steps):
    """beta_t leaves exp(-integral) of the signal's variance, where the rate rises from 0.1 to 10 in one."""
    ends = np.arange(steps + 1) / steps
    integral = 0.1 * ends + 0.5 * 9.9 * ends**2
    beta, alpha_bar = idql.vp_schedule(steps)
    np.testing.assert_allclose(beta, 1 - np.exp(-np.diff(integral)), rtol=1e-6)
    np.testing.assert_allclose(alpha_bar, np.exp(-integral[1:]), rtol=1e-6)


@pytest.mark.equation(4, 5)
def test_actor_loss(batch, rows):
    learner = make()
    torch.manual_seed(4)
    steps = torch.randint(5, (3,)).numpy()
    assert len({*steps}) > 1
    noise = torch.randn(3, ACT).numpy().astype(np.float64)
    alpha_bar = np.array(ALPHA_BAR)[steps][:, None]
    noisy = np.sqrt(alpha_bar) * rows["actions"] + np.sqrt(1 - alpha_bar) * noise

    def oracle(layers):
        error = noise - linear(layers, rows["observations"], noisy, steps)
        return np.mean(error[:, 0] ** 2 + error[:, 1] ** 2)

    torch.manual_seed(4)
    loss, metrics = learner.actor_loss(batch)
    others = [learner.ema_actor, learner.critic, learner.target_critic, learner.value]
    assert_loss_and_gradient(loss, learner.actor, oracle, others)
    assert metrics["actor/loss"].item() == loss.item()


@pytest.mark.equation(4)
def test_every_step_is_learnt_and_an_action_comes_back_from_its_noise():
    """a = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t) for all T steps."""
    learner, seen = make(), []
    learner.actor = lambda observations, noisy, steps: seen.append((noisy, steps)) or torch.zeros_like(noisy)
    actions = torch.rand(400, ACT) * 2 - 1
    torch.manual_seed(5)
    learner.actor_loss({"observations": torch.zeros(400, OBS), "actions": actions})
    torch.manual_seed(5)
    torch.randint(5, (400,))
    noise = torch.randn(400, ACT).double()
    (noisy, steps), alpha_bar = seen[0], np.array(ALPHA_BAR)
    assert steps.bincount().min() > 50
    scale = torch.tensor(alpha_bar)[steps].unsqueeze(-1)
    found = (noisy.double() - (1 - scale).sqrt() * noise) / scale.sqrt()
    np.testing.assert_allclose(found, actions, atol=1e-5)


def denoised(layers, observations, noises: list[np.ndarray], steps: int = 5) -> np.ndarray:
    """The sampler's x_0 from its normal draws: x_T and then the z of the steps T to 2."""
    integral = lambda t: 0.1 * t / steps + 0.5 * 9.9 * (t / steps) ** 2  # noqa: E731
    x, clipped = noises[0], 0
    for t in range(steps, 0, -1):
        alpha = np.exp(integral(t - 1) - integral(t))
        predicted = linear(layers, observations, x, [t - 1])
        x = (x - (1 - alpha) / np.sqrt(1 - np.exp(-integral(t))) * predicted) / np.sqrt(alpha)
        if t > 1:
            x = x + np.sqrt(1 - alpha) * noises[steps - t + 1]
        clipped += (np.abs(x) > 1).mean()
        x = np.minimum(np.maximum(x, -1), 1)
    assert 0 < clipped < steps
    return x


def draws(seed: int, count: int, steps: int = 5) -> list[np.ndarray]:
    """What the sampler draws after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    return [torch.randn(count, ACT).numpy().astype(np.float64) for _ in range(steps)]


@pytest.mark.equation(7)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sampling(rows, steps):
    learner = make(diffusion_steps=steps)
    observations = np.tile(rows["observations"], (4, 1))
    wanted = denoised(weights(learner.ema_actor), observations, draws(6, 12, steps), steps)
    torch.manual_seed(6)
    with torch.no_grad():
        found = learner.sample(torch.tensor(observations, dtype=torch.float32))
    assert np.abs(wanted).min() < 0.99
    assert_close(found.numpy(), wanted, 1e-4)


@pytest.mark.equation(7, 8)
@pytest.mark.parametrize("samples", [1, 7])
def test_acts_by_the_sample_with_the_largest_q_in_the_environments_units(rows, samples):
    """With one sample that is imitation, whatever Q says."""
    learner = make(act_samples=samples)
    learner.scaler.low, learner.scaler.high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])
    learner.scaler.mean, learner.scaler.std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 0.5])
    observations = np.repeat((rows["observations"] - [0.1, 0.2, 0.3]) / [1.0, 2.0, 0.5], samples, axis=0)
    drawn = denoised(weights(learner.ema_actor), observations, draws(8, 3 * samples))
    q = np.minimum(*q_values(weights(learner.target_critic), observations, drawn)).reshape(3, samples)
    best = q.argmax(1)
    assert samples == 1 or len({*best}) > 1
    wanted = drawn.reshape(3, samples, ACT)[np.arange(3), best]
    wanted = np.array([-2.0, 0.0]) + (wanted + 1) / 2 * np.array([4.0, 10.0])
    torch.manual_seed(8)
    assert_close(learner.act(rows["observations"]), wanted, 1e-4)
    torch.manual_seed(9)
    alone = learner.act(rows["observations"][0])
    torch.manual_seed(9)
    assert_close(learner.act(rows["observations"][:1])[0], alone)
    assert alone.shape == (ACT,)


@pytest.mark.equation(8)
def test_the_largest_of_the_facts_three_is_the_second(rows):
    learner, seen = make(act_samples=3), []
    learner.target_critic = Constant([[1.0, 3.0, 2.0], [9.0, 3.5, 9.0]])
    sample = learner.sample
    learner.sample = lambda observations: seen.append(sample(observations)) or seen[-1]
    np.testing.assert_array_equal(learner.act(rows["observations"][0]), seen[0][1])


# ------------------------------------------------- network -------------------------------------------------


def mish(x: np.ndarray) -> np.ndarray:
    return x * np.tanh(np.log1p(np.exp(x)))


def test_the_actors_network(batch, rows):
    """Fourier features of the step with learned frequencies; blocks that are added to their input."""
    actor = make(stand_in=False, actor_blocks=2).actor.eval()
    for weight in actor.parameters():
        weight.data *= 0.2
    layers, steps = weights(actor), np.array([0, 3, 4])
    dense = lambda x, number: x @ layers[number].T + layers[number + 1]  # noqa: E731
    angles = 2 * np.pi * steps[:, None] * layers[0]
    step = dense(mish(dense(np.concatenate([np.cos(angles), np.sin(angles)], axis=1), 1)), 3)
    x = dense(np.concatenate([rows["observations"], rows["actions"], step], axis=1), 5)
    for first in (7, 13):
        centred = x - x.mean(1, keepdims=True)
        normal = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        normal = normal * layers[first] + layers[first + 1]
        x = x + dense(mish(dense(normal, first + 2)), first + 4)
    wanted = dense(mish(x), 19)
    assert len(layers) == 21
    found = actor(batch["observations"], batch["actions"], torch.tensor(steps))
    assert_close(found.detach().numpy(), wanted, 1e-4)
    together = actor(batch["observations"], batch["actions"], torch.tensor([3]))
    each = actor(batch["observations"], batch["actions"], torch.tensor([3, 3, 3]))
    assert_close(together.detach().numpy(), each.detach().numpy())


def test_drops_units_in_training_only(batch, rows):
    learner = make(stand_in=False, dropout=0.5)
    losses = []
    for _ in range(8):
        torch.manual_seed(1)  # the same steps and noise
        learner.actor.train(len(losses) < 4)
        torch.rand(len(losses))
        losses.append(learner.actor(batch["observations"], batch["actions"], torch.tensor([2])).sum().item())
    assert len({*losses[:4]}) > 1
    assert len({*losses[4:]}) == 1
    modes = [module.training for module in learner.ema_actor.modules()]
    assert not any(modes)
    learner.act(rows["observations"])
    assert not any(module.training for module in learner.ema_actor.modules())


def test_blocks_are_no_wider_than_hidden_dim_the_value_is_not_normalised_and_weights_do_not_decay():
    """Three of the differences from the paper."""
    learner = make(stand_in=False, hidden_dim=6)
    widths = {layer.out_features for layer in learner.actor.blocks.modules() if isinstance(layer, nn.Linear)}
    assert widths == {6}
    assert not [layer for layer in learner.value.modules() if isinstance(layer, nn.LayerNorm)]
    assert learner.actor_optimizer.param_groups[0]["weight_decay"] == 0


# -------------------------------------------------- update --------------------------------------------------


@pytest.mark.equation(1, 2, 5, 6)
def test_updates_value_then_actor_twice_then_critic_then_target(batch, rows):
    """The actor's steps take the rows 0 and 2, and 1: halves, as near as three rows can be halved."""
    fields = {"expectile": 0.7, "discount": 0.99, "tau": 0.1, "actor_tau": 0.2, "updates": 100}
    learner = make(**fields, value_lr=0.1, actor_lr=0.1, critic_lr=0.1)
    value, critic, target = (weights(getattr(learner, name)) for name in ("value", "critic", "target_critic"))
    q = np.minimum(*q_values(target, rows["observations"], rows["actions"]))
    seen, loss = [], learner.actor_loss
    learner.actor_loss = lambda half: seen.append((half, weights(learner.actor))) or loss(half)
    average = weights(learner.ema_actor)
    learner.update(batch)

    def value_oracle(layers):
        u = q - values(layers, rows["observations"])
        return np.mean(np.where(u > 0, 0.7, 0.3) * u**2)

    y = bellman(rows, 0.99, values(weights(learner.value), rows["next_observations"]))
    assert_close(gradients(learner.value), slopes(value_oracle, value), 1e-4)
    assert_close(gradients(learner.critic), slopes(partial(summed_errors, rows=rows, target=y), critic), 1e-4)
    mixed = [0.9 * old + 0.1 * new for old, new in zip(target, weights(learner.critic))]
    assert_close(weights(learner.target_critic), mixed, 1e-6)
    (first, _), (second, between) = seen
    for name, column in batch.items():
        assert torch.equal(first[name], column[[0, 2]])
        assert torch.equal(second[name], column[[1]])
    for new in (between, weights(learner.actor)):
        average = [0.8 * old + 0.2 * now for old, now in zip(average, new)]
    assert_close(weights(learner.ema_actor), average, 1e-6)
    assert np.abs(between[0] - weights(learner.actor)[0]).max() > 1e-2


@pytest.mark.equation(6)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    batch = {name: torch.cat([column, column[:1]]) for name, column in batch.items()}  # halves of one size
    twins = [make(stand_in=False, tau=0.1, actor_blocks=1, dropout=0.0) for _ in range(2)]
    for learner in twins:
        for weight in learner.actor.parameters():
            weight.data *= 0.2
    assert_compiled_is_eager(idql, twins, batch)


def test_actor_learning_rate_falls_along_a_cosine(batch):
    learner, used = make(updates=10, actor_lr=0.01), []
    for _ in range(10):
        used.append(learner.actor_optimizer.param_groups[0]["lr"])
        learner.update(batch)
    assert used == pytest.approx([0.01 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)])


@pytest.mark.parametrize("network", ["value", "actor", "critic"])
def test_an_optimiser_moves_its_own_network_only(batch, network):
    rates = {f"{name}_lr": 0.01 * (name == network) for name in ("value", "actor", "critic")}
    average = {"actor_tau": 0.0, "tau": 0.0}
    assert moved(make(**average, **rates), batch, 2) == [network]


def test_logging_the_gap_leaves_training_alone():
    """`act` draws; `train` gives it a copy of the generator, as an evaluation does."""
    source = (ROOT / "algorithms/offline/idql.py").read_text()
    before, _, after = source.partition("support_gap(learner.act")
    assert after
    assert before.rstrip().splitlines()[-2].strip().startswith("with torch.random.fork_rng()")


def test_defaults_are_the_papers():
    """But for N, which is the smallest that they tried."""
    config = idql.Config()
    wanted = {"updates": 3_000_000, "batch_size": 512, "hidden_dim": 256, "hidden_layers": 2, "tau": 0.005}
    wanted |= {"actor_lr": 3e-4, "critic_lr": 3e-4, "value_lr": 3e-4, "discount": 0.99, "expectile": 0.7}
    wanted |= {"actor_tau": 0.001, "actor_blocks": 3, "diffusion_steps": 5, "dropout": 0.1}
    wanted |= {"act_samples": 16, "normalize_states": False, "normalize_rewards": False}
    assert {field: getattr(config, field) for field in wanted} == wanted
