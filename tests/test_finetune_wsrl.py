"""algorithms/finetune/wsrl.py: both phases' losses against NumPy, written from the paper's equations."""

import math
from pathlib import Path

import numpy as np
import pytest
import test_finetune_cal_ql
import test_finetune_rlpd
import torch
from conftest import load_script, new_learner
from oracles import (
    ACT,
    OBS,
    assert_acts,
    assert_compiled_is_eager,
    assert_loss_and_gradient,
    fix_weights,
    policy,
    same,
    snapshot,
    squashed,
    weights,
)
from test_finetune_rlpd import critics

wsrl = load_script("finetune/wsrl.py")
RETURNS = [-3.0, 0.5, 40.0]  # V: below all Q, among them, above all


@pytest.fixture
def batch(batch):
    return batch | {"returns_to_go": torch.tensor(RETURNS)}


def make(**fields):
    """WSRL with small networks of fixed weights; the target's differ from the critic's. alpha is 0.3."""
    fields = {"hidden_dim": 6, "hidden_layers": 2, "critics": 5, "updates_per_step": 1} | fields
    learner = fix_weights(new_learner(wsrl, wsrl.Config(**fields), OBS, ACT), 4)
    learner.temperature.log.data.fill_(math.log(0.3))
    return learner


def order_members(monkeypatch, members: list[int]) -> None:
    """From now on Z of (1) is these."""
    order = members + [member for member in range(5) if member not in members]
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.tensor(order))


def normal(*shape: int) -> np.ndarray:
    """The next of torch's draws."""
    return torch.randn(*shape).numpy().astype(np.float64)


def target(learner, rows, noise: np.ndarray, members: list[int], discount: float) -> np.ndarray:
    """y [B]: the least of these members, no entropy."""
    actions, _ = squashed(weights(learner.actor), rows["next_observations"], noise)
    q = critics(weights(learner.target_critic), rows["next_observations"], actions)[members].min(axis=0)
    return rows["rewards"] + discount * np.where(rows["terminations"] == 1, 0, q)


@pytest.mark.equation(1, 3)
@pytest.mark.parametrize("members", [[3, 1], [0, 4], [2]])
def test_online_loss(batch, rows, monkeypatch, members):
    learner = make(discount=0.9, target_critics=len(members))
    order_members(monkeypatch, members)
    torch.manual_seed(5)
    y = target(learner, rows, normal(3, ACT), members, 0.9)
    torch.manual_seed(5)

    def oracle(layers):
        return np.sum(np.mean((critics(layers, rows["observations"], rows["actions"]) - y) ** 2, axis=1))

    del batch["returns_to_go"]  # online nobody knows them
    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.target_critic, learner.temperature]
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    mean = critics(weights(learner.critic), rows["observations"], rows["actions"]).mean()
    assert metrics["critic/q_mean"].item() == pytest.approx(mean, rel=1e-4)


@pytest.mark.equation(1, 2, 7)
@pytest.mark.parametrize("weight", [0.0, 1.7])
def test_offline_loss(batch, rows, monkeypatch, weight):
    """The floor under Q of the policy's actions in s and s', and none under that of uniform ones."""
    small = {"hidden_dim": 3, "hidden_layers": 1}
    learner = make(discount=0.9, cql_weight=weight, cql_actions=2, **small)
    count, members = 2, [3, 1]
    order_members(monkeypatch, members)
    torch.manual_seed(8)
    states = [rows["observations"], rows["next_observations"]]
    noise = normal(count, 2, 3, ACT)
    uniform = (torch.rand(count, 1, 3, ACT) * 2 - 1).numpy().astype(np.float64)[:, 0]
    y = target(learner, rows, normal(3, ACT), members, 0.9)
    torch.manual_seed(8)
    actor = weights(learner.actor)
    known = [[squashed(actor, states[kind], noise[n, kind]) for kind in range(2)] for n in range(count)]

    def gaps(layers) -> np.ndarray:
        """G_i [E], one action after the other."""
        data, total = critics(layers, rows["observations"], rows["actions"]), 0.0
        for n in range(count):
            total = total + np.exp(critics(layers, rows["observations"], uniform[n])) / 0.5**ACT
            for actions, density in known[n]:
                q = np.maximum(critics(layers, rows["observations"], actions), RETURNS)
                total = total + np.exp(q) / density
        return np.mean(np.log(total) - data, axis=1)

    def oracle(layers):
        errors = np.mean((critics(layers, rows["observations"], rows["actions"]) - y) ** 2, axis=1)
        return np.sum(errors + weight * gaps(layers))

    loss, metrics = learner.calibrated_loss(batch)
    others = [learner.actor, learner.target_critic, learner.temperature]
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    assert metrics["critic/gap"].item() == pytest.approx(gaps(weights(learner.critic)).mean(), rel=1e-4)
    free = batch | {"returns_to_go": torch.full((3,), -1e30)}
    torch.manual_seed(8)
    lower = learner.calibrated_loss(free)[1]["critic/gap"].item()
    assert lower < metrics["critic/gap"].item()  # a floor lifts the sum


@pytest.mark.equation(4)
def test_actor_loss(batch, rows):
    """The least of all members, not the mean, nor of those in Z alone."""
    learner = make()
    torch.manual_seed(6)
    noise = normal(3, ACT)
    torch.manual_seed(6)
    critic = weights(learner.critic)

    def oracle(layers):
        actions, density = squashed(layers, rows["observations"], noise)
        return np.mean(0.3 * np.log(density) - critics(critic, rows["observations"], actions).min(axis=0))

    loss, _ = learner.actor_loss(batch)
    assert_loss_and_gradient(loss, learner.actor, oracle, [learner.target_critic, learner.temperature])


@pytest.mark.equation(5)
@pytest.mark.parametrize("entropy", [-ACT + 0.0, -ACT + 0.5, -ACT - 0.5])
def test_temperature_gradient(batch, entropy):
    learner = make()
    actor_loss, told = learner.actor_loss, {"actor/entropy": torch.tensor(float(entropy))}
    learner.actor_loss = lambda batch: (actor_loss(batch)[0], told)
    learner.update(batch)
    assert learner.temperature.log.grad.item() == pytest.approx(entropy + ACT)


@pytest.mark.equation(2, 3)
def test_each_phase_has_its_own_loss(batch):
    learner, called = make(updates=2), []
    for name in ("critic_loss", "calibrated_loss"):
        loss = getattr(learner, name)
        setattr(learner, name, lambda batch, name=name, loss=loss: (called.append(name), loss(batch))[1])
    for _ in range(4):
        learner.update(batch)
    assert called == ["calibrated_loss"] * 2 + ["critic_loss"] * 2


@pytest.mark.equation(4)
def test_online_the_actor_moves_once_a_step(batch):
    """With the last of the updates that follow a step; offline with each."""
    learner = make(updates_per_step=4, updates=3)
    for number in range(1, 12):
        actor, critic = snapshot(learner.actor), snapshot(learner.critic)
        learner.update(batch)
        assert same(learner.actor, actor) == (number > 3 and (number - 3) % 4 != 0)
        assert not same(learner.critic, critic)


@pytest.mark.equation(8)
@pytest.mark.parametrize(
    ("rewards", "terminated", "discount", "wanted"),
    [
        ([1.0, 1.0, 1.0], True, 0.5, [1.75, 1.5, 1.0]),
        ([-5.0, -5.0, -5.0], False, 0.99, [-500.0] * 3),  # sparse: it would have gone on
        ([-5.0, 5.0], True, 0.5, [-2.5, 5.0]),
    ],
)
def test_returns_of_the_facts(rewards, terminated, discount, wanted):
    found = wsrl.returns_to_go(np.float32(rewards), terminated, discount)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.equation(6)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    fields = {"tau": 0.1, "updates": 3, "cql_actions": 2}
    assert_compiled_is_eager(wsrl, [make(**fields), make(**fields)], batch)


def test_the_mean_acts(rows):
    learner = make()
    assert_acts(learner, rows, lambda observations: policy(weights(learner.actor), observations)[:, :ACT])


def test_networks_and_returns_are_those_of_rlpd_and_cal_ql():
    for name in ("LayerNormCritic", "TanhGaussianActor"):
        assert getattr(wsrl, name).__doc__ == getattr(test_finetune_rlpd.rlpd, name).__doc__
    assert wsrl.returns_to_go.__doc__ == test_finetune_cal_ql.cal_ql.returns_to_go.__doc__


def test_defaults():
    config = wsrl.Config()
    wanted = {"critics": 10, "target_critics": 2, "updates_per_step": 4, "warmup_steps": 5_000}
    wanted |= {"cql_weight": 5.0, "cql_actions": 10, "actor_lr": 1e-4, "critic_lr": 3e-4}
    assert {field: getattr(config, field) for field in wanted} == wanted
    assert not hasattr(config, "online_fraction")  # no batch has data of the first phase


def test_an_update_is_of_256_transitions_in_antmaze_too():
    """The authors' batch of 1024 is shared out among the four updates of a step."""
    files = [*Path(__file__).parents[1].glob("configs/finetune/wsrl/D4RL/antmaze/*.yaml")]
    assert {wsrl.parse_config([f"--config_path={file}"]).batch_size for file in files} == {256}
