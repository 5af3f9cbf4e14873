"""algorithms/finetune/spot.py: every loss term against NumPy, written from the paper's equations, and the
weights of its online phase."""

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
    assert_loss_and_gradient,
    bellman,
    fix_weights,
    moved,
    perceptron,
    policy,
    q_values,
    same,
    snapshot,
    summed_errors,
    weights,
)
from torch import nn

spot = load_script("finetune/spot.py")


def make(**fields):
    """SPOT with small networks of fixed weights, past its auto-encoder's updates; Q has both signs."""
    fields = {"hidden_dim": 5, "vae_hidden_dim": 4, "hidden_layers": 1, "vae_updates": 0, **fields}
    return fix_weights(new_learner(spot, spot.Config(**fields), OBS, ACT), 2)


def bounds(layers: list, observations, actions, noise: np.ndarray, kl_weight: float) -> np.ndarray:
    """E [B] of (1) by the weights of encoder and decoder, one draw of the latents from `noise` [B, 2A]."""
    encoder, decoder = layers[: len(layers) // 2], layers[len(layers) // 2 :]
    code = perceptron(encoder, np.concatenate([observations, actions], axis=1))
    mean, log_std = code[:, : 2 * ACT], np.clip(code[:, 2 * ACT :], -4, 15)
    latents = mean + np.exp(log_std) * noise
    decoded = np.tanh(perceptron(decoder, np.concatenate([observations, latents], axis=1)))
    divergence = -0.5 * (1 + 2 * log_std - mean**2 - np.exp(log_std) ** 2)  # from the standard normal
    return ((decoded - actions) ** 2).mean(axis=1) + kl_weight * divergence.mean(axis=1)


def drawn(*shape: int) -> np.ndarray:
    """Standard normal noise; what torch draws next is the same."""
    torch.manual_seed(4)
    noise = torch.randn(*shape).numpy().astype(np.float64)
    torch.manual_seed(4)
    return noise


@pytest.mark.equation(1, 2)
@pytest.mark.parametrize("kl_weight", [0.5, 2.0])
def test_vae_loss(batch, rows, kl_weight):
    learner, noise = make(kl_weight=kl_weight), drawn(3, 2 * ACT)
    loss, _ = learner.vae_loss(batch)

    def oracle(layers):
        return np.mean(bounds(layers, rows["observations"], rows["actions"], noise, kl_weight))

    assert_loss_and_gradient(loss, learner.vae, oracle, [learner.actor, learner.critic])


class Coded(nn.Module):
    """Stands in for the auto-encoder: decodes without error, and its code is N(mean, std^2)."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.mean, self.log_std = mean, float(np.log(std))

    def forward(self, observations, actions):
        code = torch.ones(len(actions), 2 * ACT)
        return actions, self.mean * code, self.log_std * code


@pytest.mark.equation(1)
@pytest.mark.parametrize(("mean", "std", "wanted"), [(0.0, 1.0, 0.0), (1.0, 1.0, 0.25), (-1.0, 1.0, 0.25)])
def test_bound_of_the_facts(batch, mean, std, wanted):
    learner = make(kl_weight=0.5)
    learner.vae = Coded(mean, std)
    found = learner.bound(batch["observations"], batch["actions"])
    np.testing.assert_allclose(found, np.full(3, wanted), atol=1e-6)


@pytest.mark.equation(3, 4, 5)
def test_critic_loss(batch, rows):
    """As TD3's: the noise is cut, so is the action, and the lesser of both critics counts."""
    learner, draws = make(discount=0.9, policy_noise=0.6, noise_clip=0.5), 0.6 * drawn(3, ACT)
    noise = np.clip(draws, -0.5, 0.5)
    actions = policy(weights(learner.target_actor), rows["next_observations"]) + noise
    assert (noise != draws).any()
    assert (np.abs(actions) > 1).any()
    next_q = q_values(
        weights(learner.target_critic), rows["next_observations"], np.clip(actions, -1, 1)
    ).min(axis=0)
    target = bellman(rows, 0.9, next_q)
    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.target_actor, learner.target_critic, learner.vae]
    assert_loss_and_gradient(loss, learner.critic, lambda q: summed_errors(q, rows, target), others)
    q = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(q.mean(), rel=1e-4)


@pytest.mark.equation(1, 6)
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_actor_loss(batch, rows, weight):
    """The gradient goes through the auto-encoder and Q_1 into the actor, and stays out of both; with weight 0
    it is TD3's, of Q divided by its size.
    """
    learner, noise = make(kl_weight=0.5), drawn(3, 2 * ACT)
    critic, vae = weights(learner.critic), weights(learner.vae)
    states = rows["observations"]
    size = np.mean(np.abs(q_values(critic, states, policy(weights(learner.actor), states))[0]))

    def oracle(layers):
        actions = policy(layers, states)
        bound = bounds(vae, states, actions, noise, 0.5)
        return np.mean(-q_values(critic, states, actions)[0] / size + weight * bound)

    loss, metrics = learner.actor_loss(batch, torch.tensor(weight))
    assert_loss_and_gradient(loss, learner.actor, oracle, [learner.target_actor, learner.target_critic])
    bound = bounds(vae, states, policy(weights(learner.actor), states), noise, 0.5).mean()
    assert metrics["actor/bound"].item() == pytest.approx(bound, rel=1e-4)


class FirstOf(Constant):
    """A constant that may be asked for one member alone."""

    def forward(self, observations, actions, members):
        return self.answer[:members]


@pytest.mark.equation(6)
@pytest.mark.parametrize("q", [-4.0, 0.01, 500.0])
def test_actor_loss_does_not_depend_on_the_size_of_q(batch, q):
    learner = make()
    learner.critic = FirstOf([[q] * 3, [-9.0] * 3])
    assert learner.actor_loss(batch, torch.tensor(0.0))[0].item() == pytest.approx(-np.sign(q))


@pytest.mark.equation(7)
@pytest.mark.parametrize(("steps", "share"), [(0, 1.0), (500_000, 0.5), (900_000, 0.2), (1_000_000, 0.2)])
def test_weight_of_the_facts(steps, share):
    """It counts steps of the environment, whatever the updates after each."""
    learner = make(density_weight=0.1, updates=50, updates_per_step=2)
    learner.updates = 50 + 2 * steps
    assert learner.annealed_weight().item() == pytest.approx(0.1 * share)
    learner.updates = 7  # offline
    assert learner.annealed_weight().item() == pytest.approx(0.1)


@pytest.mark.equation(6, 7)
def test_an_update_uses_the_weight_of_its_own_number(batch):
    learner = make(density_weight=0.1, updates=2, decay_steps=10, decay_to=0.5, policy_delay=1)
    told = [learner.update(batch)["actor/lambda"].item() for _ in range(9)]
    assert told == pytest.approx([0.1 * max(0.5, 1 - max(number - 2, 0) / 10) for number in range(1, 10)])


@pytest.mark.equation(2)
def test_first_the_auto_encoder_alone_learns_and_then_never_again(batch):
    learner = make(vae_updates=3, policy_delay=1)
    for number in range(1, 7):
        told = moved(learner, batch)
        if number <= 3:
            assert told == ["vae"]
        else:
            assert told == ["actor", "critic", "target_actor", "target_critic"]


@pytest.mark.equation(6, 8)
def test_actor_and_targets_move_every_other_update(batch):
    learner = make(policy_delay=2)
    for number in range(1, 5):
        still = ["critic"] if number % 2 else ["actor", "critic", "target_actor", "target_critic"]
        assert moved(learner, batch) == still


def test_at_the_switch_adam_begins_anew(batch):
    learner = make(policy_delay=1)
    for _ in range(3):
        learner.update(batch)
    actor = snapshot(learner.actor)
    learner.renew_optimizers()
    assert learner.actor_optimizer.state_dict()["state"] == {}
    assert learner.critic_optimizer.state_dict()["state"] == {}
    assert same(learner.actor, actor)
    learner.update(batch)
    assert not same(learner.actor, actor)


@pytest.mark.equation(8)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    fields = {"tau": 0.1, "vae_updates": 1, "updates": 3, "decay_steps": 10}
    assert_compiled_is_eager(spot, [make(**fields), make(**fields)], batch)


def test_units_drop_out_in_training_alone(batch, rows):
    learner = make(dropout=0.5)
    drawn_actions = [learner.actor(batch["observations"]).sum().item() for _ in range(8)]
    assert len({*drawn_actions}) > 1
    layers = weights(learner.actor)
    for _ in range(2):
        assert_close(learner.act(rows["observations"]), policy(layers, rows["observations"]))
    assert learner.actor.training
    targets = [learner.target_actor(batch["next_observations"]) for _ in range(4)]
    assert all(torch.equal(targets[0], other) for other in targets[1:])


def test_it_explores_with_noise_of_the_said_size(batch, rows):
    learner, noise = make(exploration_noise=0.3, dropout=0.5), 0.3 * drawn(3, ACT)
    wanted = np.clip(policy(weights(learner.actor), rows["observations"]) + noise, -1, 1)
    assert_close(learner.explore(batch["observations"]).detach().numpy(), wanted, 1e-4)


def test_acts_in_the_environments_units(rows):
    learner = make()
    assert_acts(learner, rows, lambda observations: policy(weights(learner.actor), observations))


def test_defaults():
    config = spot.Config()
    wanted = {"vae_updates": 100_000, "vae_hidden_dim": 750, "vae_lr": 1e-3, "kl_weight": 0.5}
    wanted |= {"decay_to": 0.2, "decay_steps": 1_000_000, "exploration_noise": 0.1, "policy_delay": 2}
    assert {field: getattr(config, field) for field in wanted} == wanted
