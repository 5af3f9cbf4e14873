"""algorithms/finetune/rlpd.py: every loss term against NumPy, written from the paper's equations."""

import math

import numpy as np
import pytest
import test_rebrac
import torch
from conftest import load_script, new_learner
from oracles import (
    ACT,
    OBS,
    Constant,
    assert_acts,
    assert_compiled_is_eager,
    assert_loss_and_gradient,
    fix_weights,
    moved,
    policy,
    snapshot,
    squashed,
    weights,
)

rlpd = load_script("finetune/rlpd.py")


def make(**fields):
    """RLPD with small networks of fixed weights; the target's differ from the critic's. alpha is 0.3."""
    fields = {"hidden_dim": 6, "hidden_layers": 2, "critics": 5, "updates_per_step": 1} | fields
    learner = fix_weights(new_learner(rlpd, rlpd.Config(**fields), OBS, ACT), 4)
    learner.temperature.log.data.fill_(math.log(0.3))
    return learner


def critics(layers: list[np.ndarray], observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Q_i [E, B]: each member alone, normalised after the ReLU of every hidden layer."""
    table = []
    for member in range(len(layers[0])):
        own, x = [layer[member] for layer in layers], np.concatenate([observations, actions], axis=1)
        while len(own) > 2:
            weight, bias, scale, shift, *own = own
            hidden = np.maximum(x @ weight + bias, 0)
            deviation = np.sqrt(hidden.var(axis=1, keepdims=True) + 1e-5)
            x = (hidden - hidden.mean(axis=1, keepdims=True)) / deviation * scale + shift
        table.append((x @ own[0] + own[1])[:, 0])
    return np.array(table)


def test_the_critics_layers_are_as_these_tests_read_them(batch, rows):
    learner = make()
    ours = learner.critic(batch["observations"], batch["actions"]).detach().numpy()
    assert ours.shape == (5, 3)
    np.testing.assert_allclose(
        ours, critics(weights(learner.critic), rows["observations"], rows["actions"]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.equation(1, 2)
@pytest.mark.parametrize("members", [[3, 1], [0, 4], [2]])
@pytest.mark.parametrize("entropy", [True, False])
def test_critic_loss(batch, rows, monkeypatch, members, entropy):
    """The least of the drawn members alone, entropy taken off or not; all members are fitted to it."""
    learner = make(discount=0.9, target_critics=len(members), entropy_backup=entropy)
    order = members + [member for member in range(5) if member not in members]
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.tensor(order))
    torch.manual_seed(5)
    noise = torch.randn(3, ACT).numpy().astype(np.float64)
    torch.manual_seed(5)
    actions, density = squashed(weights(learner.actor), rows["next_observations"], noise)
    q = critics(weights(learner.target_critic), rows["next_observations"], actions)
    least = q[members].min(axis=0)
    assert (np.abs(q.min(axis=0) - least)[[0, 2]] > 1e-3).any() or members != [2]
    value = least - 0.3 * np.log(density) * entropy
    target = rows["rewards"] + 0.9 * np.where(rows["terminations"] == 1, 0, value)

    def oracle(layers):
        errors = critics(layers, rows["observations"], rows["actions"]) - target
        return np.sum(np.mean(errors**2, axis=1))

    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.target_critic, learner.temperature]
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    mean = critics(weights(learner.critic), rows["observations"], rows["actions"]).mean()
    assert metrics["critic/q_mean"].item() == pytest.approx(mean, rel=1e-4)


@pytest.mark.equation(1)
def test_two_of_ten_are_drawn_anew_for_every_update(batch, monkeypatch):
    """Each as often as the others, never one twice; the target is the least of these two and of no others."""
    learner = make(critics=10, discount=1.0, entropy_backup=False)
    learner.target_critic = Constant([[2.0**member] * 3 for member in range(10)])  # its value tells a member
    learner.critic = Constant([[0.0] * 3] * 10)
    batch |= {"rewards": torch.zeros(3), "terminations": torch.zeros(3)}
    randperm, orders = torch.randperm, []

    def noted(*words, **options):
        orders.append(randperm(*words, **options))
        return orders[-1]

    monkeypatch.setattr(torch, "randperm", noted)
    torch.manual_seed(0)
    losses = [learner.critic_loss(batch)[0].item() for _ in range(300)]
    drawn = np.stack([order[:2].numpy() for order in orders])
    assert drawn.shape == (300, 2)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert np.bincount(drawn.ravel(), minlength=10).min() > 30  # of 60
    missed = 2.0 ** drawn.min(axis=1)  # the target, by each of the ten
    assert losses == pytest.approx(10 * missed**2)


@pytest.mark.equation(3)
def test_actor_loss(batch, rows):
    """The mean over all members, not the least."""
    learner = make()
    torch.manual_seed(6)
    noise = torch.randn(3, ACT).numpy().astype(np.float64)
    torch.manual_seed(6)
    critic = weights(learner.critic)

    def oracle(layers):
        actions, density = squashed(layers, rows["observations"], noise)
        q = critics(critic, rows["observations"], actions)
        return np.mean(0.3 * np.log(density) - q.mean(axis=0))

    loss, metrics = learner.actor_loss(batch)
    others = [learner.target_critic, learner.temperature]
    assert_loss_and_gradient(loss, learner.actor, oracle, others)
    density = squashed(weights(learner.actor), rows["observations"], noise)[1]
    assert metrics["actor/entropy"].item() == pytest.approx(-np.log(density).mean(), rel=1e-4)


@pytest.mark.equation(4)
@pytest.mark.parametrize("entropy", [-ACT / 2, -ACT / 2 + 0.5, -ACT / 2 - 0.5])
def test_temperature_gradient(batch, entropy):
    """Entropy is held at half of what SAC holds it at, taken below 0."""
    learner = make()
    actor_loss, told = learner.actor_loss, {"actor/entropy": torch.tensor(float(entropy))}
    learner.actor_loss = lambda batch: (actor_loss(batch)[0], told)
    learner.update(batch)
    assert learner.temperature.log.grad.item() == pytest.approx(entropy + ACT / 2)


@pytest.mark.equation(3, 4)
def test_the_actor_moves_once_a_step(batch):
    """With the last of the updates that follow a step; the critics move with each."""
    learner = make(updates_per_step=4, updates=3)
    learner.updates = 3  # all of the first phase
    for number in range(1, 9):
        actor, temperature = snapshot(learner.actor), learner.temperature.log.item()
        critic = snapshot(learner.critic)
        learner.update(batch)
        still = all(torch.equal(a, b) for a, b in zip(actor, snapshot(learner.actor)))
        assert still == (number % 4 != 0)
        assert (learner.temperature.log.item() == temperature) == still
        assert not all(torch.equal(a, b) for a, b in zip(critic, snapshot(learner.critic)))


@pytest.mark.parametrize("network", ["critic", "actor"])
def test_an_optimiser_moves_its_own_network_only(batch, network):
    rates = {f"{name}_lr": 0.01 * (name == network) for name in ("actor", "critic")}
    wanted = [network] + ["temperature"] * (network == "actor")
    assert moved(make(tau=0.0, **rates), batch, 2) == wanted


@pytest.mark.equation(5)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    assert_compiled_is_eager(rlpd, [make(tau=0.1), make(tau=0.1)], batch)


def test_the_mean_acts(rows):
    learner = make()
    assert_acts(learner, rows, lambda observations: policy(weights(learner.actor), observations)[:, :ACT])


def test_critics_are_rebracs():
    """Normalised after the ReLU; the actor is not normalised at all."""
    assert rlpd.LayerNormCritic.__doc__ == test_rebrac.rebrac.LayerNormCritic.__doc__
    actor = new_learner(rlpd, rlpd.Config(), OBS, ACT).actor
    assert [part for part in actor.modules() if "Norm" in type(part).__name__] == []


def test_defaults():
    """Ten critics, two in the target, twenty updates a step, half of a batch from each side."""
    config = rlpd.Config()
    wanted = {"critics": 10, "target_critics": 2, "updates_per_step": 20, "online_fraction": 0.5}
    wanted |= {"updates": 0, "entropy_backup": True, "batch_size": 256, "actor_lr": 3e-4, "critic_lr": 3e-4}
    assert {field: getattr(config, field) for field in wanted} == wanted
