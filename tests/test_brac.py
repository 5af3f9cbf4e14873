"""BRAC: every loss term against NumPy calculations written from the paper's equations, the course of its
three phases, resuming within each, numbers in closed form and reductions.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import load_script, new_learner, short
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
    gaussian,
    gradients,
    moved,
    policy,
    q_values,
    slopes,
    summed_errors,
    weights,
)
from runs import assert_same_run, at_update, place, stop

brac = load_script("offline/brac.py")
NAMES = ("behavior", "actor", "critic", "target_critic")
LATER = {"behavior_updates": 0, "warmup_updates": 0}  # actor and critic learn from the first update on


def make(seed: int = 1057, act_dim: int = ACT, **fields):
    """BRAC with small networks of fixed weights, b's too; the target's differ from the critic's."""
    config = brac.Config(**{"hidden_dim": 4, "alpha": 0.3, **LATER, **fields})
    learner, rng = fix_weights(new_learner(brac, config, OBS, act_dim), seed), np.random.default_rng(seed + 1)
    for weight in learner.behavior.parameters():
        weight.data = torch.tensor(rng.normal(scale=0.7, size=weight.shape), dtype=torch.float32)
    return learner


def normal(seed: int, *counts: int) -> list[np.ndarray]:
    """The noise [count, 3, ACT] that draws of these sizes give after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    noise = [torch.randn(count, 3, ACT).numpy().astype(np.float64) for count in counts]
    torch.manual_seed(seed)
    return noise


# ------------------------------------------- the paper in NumPy -------------------------------------------


def log_prob(layers: list[np.ndarray], observations: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log density [B] of the action tanh(x): that of x divided by the slope of tanh, entry by entry."""
    mean, std = gaussian(layers, observations)
    density = np.exp(-(((x - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
    return np.log(np.prod(density / (1 / np.cosh(x) ** 2), axis=1))


def divergence(actor, behavior, observations, noise) -> tuple[np.ndarray, np.ndarray]:
    """The first action [B, A] and D [B], of as many samples as there are rows of noise."""
    mean, std = gaussian(actor, observations)
    ratios = []
    for own in noise:
        x = mean + std * own
        ratios.append(log_prob(actor, observations, x) - log_prob(behavior, observations, x))
    return np.tanh(mean + std * noise[0]), np.mean(ratios, axis=0)


def mixed(layers, observations, actions, ensemble_lambda: float) -> np.ndarray:
    q1, q2 = q_values(layers, observations, actions)
    return ensemble_lambda * np.minimum(q1, q2) + (1 - ensemble_lambda) * np.maximum(q1, q2)


def values(learner, observations, noise, penalty: float, ensemble_lambda: float = 1.0) -> np.ndarray:
    """The value of the states: Q' of an action, less the price of the divergence."""
    layers = {name: weights(getattr(learner, name)) for name in NAMES}
    actions, kl = divergence(layers["actor"], layers["behavior"], observations, noise)
    return mixed(layers["target_critic"], observations, actions, ensemble_lambda) - penalty * kl


def climbing(layers, behavior, critic, rows, noise, alpha=0.3, ensemble_lambda=1.0, weight=1.0) -> float:
    """(5) as a function of the actor's layers."""
    actions, kl = divergence(layers, behavior, rows["observations"], noise)
    return float(np.mean(alpha * kl - weight * mixed(critic, rows["observations"], actions, ensemble_lambda)))


# ------------------------------------------------- losses -------------------------------------------------


def cloning(layers, rows) -> float:
    actions = np.minimum(np.maximum(rows["actions"], -0.999), 0.999)
    return float(-np.mean(log_prob(layers, rows["observations"], np.arctanh(actions))))


@pytest.mark.equation(1)
def test_behavior_loss(batch, rows):
    learner = make()
    others = [learner.actor, learner.critic, learner.target_critic]
    oracle = partial(cloning, rows=rows)
    assert_loss_and_gradient(learner.behavior_loss(batch)[0], learner.behavior, oracle, others)


@pytest.mark.equation(1)
def test_actions_at_their_bounds_are_cloned_from_within(batch, rows):
    """Their density would be infinite."""
    rows["actions"] = np.array([[1.0, -1.0], [0.9995, 0.2], [-1.0, -0.9992]])
    batch["actions"] = torch.tensor(rows["actions"], dtype=torch.float32)
    learner = make()
    oracle = cloning(weights(learner.behavior), rows)
    assert learner.behavior_loss(batch)[0].item() == pytest.approx(oracle, abs=1e-4)  # float32 near a pole


@pytest.mark.equation(2, 3, 4, 8)
@pytest.mark.parametrize("value_penalty", [True, False])
@pytest.mark.parametrize(
    ("ensemble_lambda", "discount", "count"), [(1.0, 0.9, 4), (0.75, 0.99, 2), (0.0, 0.5, 1)]
)
def test_critic_loss(batch, rows, value_penalty, ensemble_lambda, discount, count):
    fields = {"value_penalty": value_penalty, "ensemble_lambda": ensemble_lambda, "discount": discount}
    learner, (noise,) = make(alpha=0.7, kl_samples=count, **fields), normal(2, count)
    penalty = 0.7 * value_penalty
    ahead = values(learner, rows["next_observations"], noise, penalty, ensemble_lambda)
    others = [values(learner, rows["next_observations"], noise, 0.7 - penalty, ensemble_lambda)]
    others.append(values(learner, rows["next_observations"], noise, penalty, 0.5))
    others.append(values(learner, rows["next_observations"], noise[:, ::-1], penalty, ensemble_lambda))
    assert all(np.abs(ahead - other)[[0, 2]].min() > 1e-3 for other in others)  # any of them would show
    target = bellman(rows, discount, ahead)
    assert target[1] == rows["rewards"][1]  # terminated: neither value nor penalty
    loss, metrics = learner.critic_loss(batch)
    networks = [learner.behavior, learner.actor, learner.target_critic, learner.multiplier]
    assert_loss_and_gradient(loss, learner.critic, partial(summed_errors, rows=rows, target=target), networks)
    q = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(q.mean(), rel=1e-5)


@pytest.mark.equation(2, 5, 8)
@pytest.mark.parametrize("sees_q", [True, False])
@pytest.mark.parametrize(("ensemble_lambda", "count"), [(1.0, 4), (0.75, 2), (0.0, 1)])
def test_actor_loss(batch, rows, sees_q, ensemble_lambda, count):
    """The gradient goes through the samples, and through nothing of b, Q or alpha."""
    learner = make(3, alpha=0.7, kl_samples=count, ensemble_lambda=ensemble_lambda)
    (noise,) = normal(6, count)
    behavior, critic, actor = (weights(getattr(learner, name)) for name in ("behavior", "critic", "actor"))
    actions, kl = divergence(actor, behavior, rows["observations"], noise)
    q = q_values(critic, rows["observations"], actions)
    assert np.abs(q[0] - q[1]).min() > 1e-2
    oracle = partial(
        climbing, behavior=behavior, critic=critic, rows=rows, noise=noise, alpha=0.7,
        ensemble_lambda=ensemble_lambda, weight=float(sees_q),
    )  # fmt: skip
    loss, metrics = learner.actor_loss(batch, sees_q)
    others = [learner.behavior, learner.target_critic, learner.multiplier]
    assert_loss_and_gradient(loss, learner.actor, oracle, others)
    assert metrics["actor/kl"].item() == pytest.approx(kl.mean(), rel=1e-5)


# ----------------------------------------- numbers and reductions -----------------------------------------


@pytest.mark.equation(8)
@pytest.mark.parametrize(("ensemble_lambda", "wanted"), [(0.75, 2.5), (1.0, 2.0), (0.0, 4.0)])
@pytest.mark.parametrize("q", [[[2.0], [4.0]], [[4.0], [2.0]]])
def test_mixture_of_the_critics(ensemble_lambda, wanted, q):
    assert make(ensemble_lambda=ensemble_lambda).mix(torch.tensor(q)).item() == pytest.approx(wanted)


@pytest.mark.equation(2)
@pytest.mark.parametrize("shift", [0.0, 2.0, 8.0])
def test_two_unit_gaussians_one_apart_diverge_by_one_half(shift):
    """(facts) However far in the tails of tanh they are: its slope is in both densities."""
    learner = make(act_dim=1, kl_samples=200_000)
    learner.actor, learner.behavior = Constant([[shift, 0.0]]), Constant([[shift + 1, 0.0]])
    torch.manual_seed(0)
    _, kl = learner.actions_and_kl(torch.zeros(1, OBS))
    assert kl.item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.equation(2, 3, 5)
@pytest.mark.parametrize("alpha", [0.1, 400.0])
def test_where_the_policy_is_the_clone_brac_p_and_v_are_both_sac_without_entropy(batch, rows, alpha):
    """Its divergence is 0 to the last bit, so neither alpha nor value_penalty changes anything."""
    learner, (noise,) = make(alpha=alpha), normal(1, 4)
    learner.behavior.load_state_dict(learner.actor.state_dict())
    _, kl = learner.actions_and_kl(torch.randn(500, OBS))
    assert (kl == 0).all()
    for value_penalty in (True, False):
        learner.config.value_penalty = value_penalty
        target = bellman(rows, 0.99, values(learner, rows["next_observations"], noise, 0.0))
        torch.manual_seed(1)
        oracle = summed_errors(weights(learner.critic), rows, target)
        assert learner.critic_loss(batch)[0].item() == pytest.approx(oracle, rel=1e-5)
    torch.manual_seed(1)
    mean, std = gaussian(weights(learner.actor), rows["observations"])
    q = q_values(weights(learner.critic), rows["observations"], np.tanh(mean + std * noise[0]))
    assert learner.actor_loss(batch, True)[0].item() == pytest.approx(-np.min(q, axis=0).mean(), rel=1e-5)


@pytest.mark.equation(3)
@pytest.mark.parametrize("value_penalty", [True, False])
def test_alpha_is_in_the_target_of_brac_v_alone(batch, value_penalty):
    losses = []
    for alpha in (0.0, 0.1, 5.0):
        torch.manual_seed(0)
        losses.append(make(alpha=alpha, value_penalty=value_penalty).critic_loss(batch)[0].item())
    assert len({*losses}) == (3 if value_penalty else 1)


# ------------------------------------------------- update -------------------------------------------------


@pytest.mark.parametrize(("behavior", "warmup"), [(3, 2), (0, 2), (2, 0), (0, 0)])
def test_phases(batch, behavior, warmup):
    """b alone; then all but b, the actor without Q; then with it."""
    learner = make(behavior_updates=behavior, warmup_updates=warmup)
    actor_loss, seen = learner.actor_loss, []
    learner.actor_loss = lambda batch, sees_q: seen.append(sees_q) or actor_loss(batch, sees_q)
    for update in range(1, behavior + warmup + 3):
        names = moved(learner, batch)
        assert learner.updates == update
        if update <= behavior:
            assert names == ["behavior"]
            assert seen == []
        else:
            assert sorted(names) == ["actor", "critic", "target_critic"]
    assert seen == [False] * warmup + [True] * 2


@pytest.mark.equation(2, 3, 4, 5, 7)
def test_updates_critic_then_actor_then_target(batch, rows):
    """Each step's gradient is that of its loss with the networks as the steps before it left them."""
    learner = make(actor_lr=0.1, critic_lr=0.1, tau=0.005)
    old = {name: weights(getattr(learner, name)) for name in NAMES}
    first, second = normal(8, 4, 4)
    target = bellman(rows, 0.99, values(learner, rows["next_observations"], first, 0.3))
    learner.update(batch)
    new = {name: weights(getattr(learner, name)) for name in NAMES}
    oracle = partial(summed_errors, rows=rows, target=target)
    assert_close(gradients(learner.critic), slopes(oracle, old["critic"]), 1e-3)
    oracle = partial(climbing, behavior=old["behavior"], rows=rows, noise=second)
    by_new, by_old = (slopes(partial(oracle, critic=c["critic"]), old["actor"]) for c in (new, old))
    assert_close(gradients(learner.actor), by_new, 1e-3)
    assert max(np.abs(a - b).max() for a, b in zip(by_new, by_old)) > 1e-2  # the old critic would show
    averages = [0.995 * a + 0.005 * b for a, b in zip(old["target_critic"], new["critic"])]
    assert_close(new["target_critic"], averages, 1e-6)


@pytest.mark.equation(6)
@pytest.mark.parametrize(("above", "sign"), [(0.5, 1), (-2.0, -1), (0.0, 0)])
def test_alpha_follows_the_divergence(batch, above, sign):
    """One that is larger than kappa makes it grow."""
    learner = make(target_kl=1.5, alpha=3.0)
    actor_loss = learner.actor_loss
    told = {"actor/kl": torch.tensor(1.5 + above)}
    learner.actor_loss = lambda batch, sees_q: (actor_loss(batch, sees_q)[0], told)
    metrics = learner.update(batch)
    assert learner.multiplier["alpha"].grad.item() == pytest.approx(-above)
    assert np.sign(metrics["actor/multiplier"].item() - 3.0) == sign


@pytest.mark.parametrize(("alpha", "kappa", "bound"), [(499.9, 0.0, 500.0), (0.1, 1000.0, 0.0)])
def test_alpha_is_from_0_to_500(batch, alpha, kappa, bound):
    learner = make(target_kl=kappa, alpha=alpha, critic_lr=1.0)
    assert learner.update(batch)["actor/kl"] > 0
    assert learner.multiplier["alpha"].item() == bound


def test_without_kappa_alpha_stays(batch):
    learner = make(alpha=0.7)
    assert [round(learner.update(batch)["actor/multiplier"].item(), 6) for _ in range(3)] == [0.7] * 3
    assert learner.multiplier_optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("network", ["behavior", "critic", "actor", "multiplier"])
def test_an_optimiser_moves_its_own_network_only(batch, network):
    rates = {f"{name}_lr": 0.01 * (name == network) for name in ("behavior", "critic", "actor")}
    if network in ("critic", "multiplier"):  # alpha is learned at the critic's rate
        rates["critic_lr"] = 0.01
    learner = make(tau=0.0, behavior_updates=1, target_kl=0.5 if network == "multiplier" else None, **rates)
    wanted = ["critic", "multiplier"] if network == "multiplier" else [network]
    assert sorted(moved(learner, batch, 2)) == wanted


@pytest.mark.equation(7)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    """With a warm-up of two updates, so in both forms of the actor's loss."""
    fields = {"tau": 0.1, "warmup_updates": 2, "target_kl": 0.5}
    assert_compiled_is_eager(brac, [make(**fields), make(**fields)], batch)


@pytest.mark.equation(1)
def test_compiled_cloning_is_eager_cloning(batch):
    eager, compiled = make(behavior_updates=3), make(behavior_updates=3)
    assert brac.compile_methods(compiled, "behavior_loss")
    for _ in range(3):
        losses = [float(learner.update(batch)["behavior/loss"]) for learner in (eager, compiled)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_close(weights(compiled.behavior), weights(eager.behavior), 1e-5)


# ------------------------------------------- differences and data -------------------------------------------


def test_sizes_and_numbers():
    config, learner = brac.Config(), new_learner(brac, brac.Config(), OBS, ACT)
    wanted = {"alpha": 0.1, "target_kl": None, "value_penalty": True, "kl_samples": 4, "ensemble_lambda": 1.0}
    wanted |= {"actor_lr": 3e-4, "critic_lr": 1e-3, "discount": 0.99, "tau": 0.005, "batch_size": 256}
    wanted |= {"warmup_updates": 20_000, "normalize_states": False, "normalize_rewards": False}
    wanted |= {"behavior_updates": 100_000, "behavior_lr": 1e-3}
    assert {name: getattr(config, name) for name in wanted} == wanted
    for network in (learner.actor, learner.behavior):
        shapes = [weight.shape for weight in network.parameters()][::2]
        assert shapes == [(300, OBS), (300, 300), (2 * ACT, 300)]
    shapes = [layer.weight.shape for layer in learner.critic.layers]
    assert shapes == [(2, OBS + ACT, 300), (2, 300, 300), (2, 300, 1)]


@pytest.mark.parametrize(("log_std", "bounded"), [(-9.0, -5.0), (-2.0, -2.0), (1.5, 1.5), (9.0, 2.0)])
def test_deviations_are_bounded(log_std, bounded):
    mean, std = brac.gaussian(Constant([[0.4, -30.0, log_std, log_std]]), torch.zeros(1, OBS))
    np.testing.assert_allclose(mean.detach(), [[0.4, -30.0]])
    np.testing.assert_allclose(std.detach(), np.exp([[bounded] * 2]), rtol=1e-6)


def test_value_and_divergence_share_their_first_sample(batch, rows):
    """And no entropy: with b as wide as anything and alpha 0 the actor's loss is -Q of that sample."""
    learner, (noise,) = make(alpha=0.0), normal(5, 4)
    mean, std = gaussian(weights(learner.actor), rows["observations"])
    q = q_values(weights(learner.critic), rows["observations"], np.tanh(mean + std * noise[0]))
    assert learner.actor_loss(batch, True)[0].item() == pytest.approx(-np.min(q, axis=0).mean(), rel=1e-5)


def test_a_truncation_bootstraps_from_its_last_observation(minari_root):
    learner, (noise,) = make(discount=0.9), normal(9, 4)
    assert_critic_bootstraps_from_truncations(
        brac, learner, lambda observations: values(learner, observations, noise, 0.3)
    )


def test_the_mean_acts(rows):
    learner = make()
    assert_acts(learner, rows, lambda observations: policy(weights(learner.actor), observations)[:, :ACT])


def test_cloning_finds_the_gaussian_of_the_data():
    """x is normal around 0.5 with deviation 0.8 in every state: so is b's, after some updates."""
    torch.manual_seed(0)
    learner = brac.BRAC(
        brac.Config(hidden_dim=16, behavior_updates=400, behavior_lr=1e-2),
        brac.Scaler(np.zeros(OBS), np.ones(OBS), -np.ones(ACT), np.ones(ACT)),
    )
    for _ in range(400):
        x = 0.5 + 0.8 * torch.randn(256, ACT)
        learner.update({"observations": torch.randn(256, OBS), "actions": torch.tanh(x)})
    mean, std = gaussian(weights(learner.behavior), np.random.default_rng(0).normal(size=(200, OBS)))
    np.testing.assert_allclose(mean.mean(0), 0.5, atol=0.1)
    np.testing.assert_allclose(std.mean(0), 0.8, atol=0.1)


# ------------------------------------------------- runs -------------------------------------------------


@pytest.mark.parametrize("death", [13, 23, 33])
def test_a_run_stopped_in_any_phase_ends_in_the_same_bits(call, pendulum, tmp_path, monkeypatch, death):
    """It clones for 15 updates and warms up for 10: checkpoints are of 10, 20 and 30."""
    fields = {"behavior_updates": 15, "warmup_updates": 10, "checkpoint_every": 10, "target_kl": 0.5}
    assert call("brac", *short(pendulum, tmp_path / "whole", **fields))[0] == 0
    with monkeypatch.context() as patch:
        at_update(brac, patch, death, stop)
        assert call("brac", *short(pendulum, tmp_path / "torn", **fields))[0] == 130
    status, out, _ = call("brac", *short(pendulum, tmp_path / "torn", **fields))
    assert (status, f"resumed at update {death // 10 * 10}" in out) == (0, True)
    whole, torn = (place(tmp_path / name, "brac", pendulum) for name in ("whole", "torn"))
    assert_same_run(whole, torn)
    state = torch.load(whole / "checkpoint.pt", weights_only=True)["state"]
    assert {int(entry["step"]) for entry in state["behavior_optimizer"]["state"].values()} == {15}
    assert {int(entry["step"]) for entry in state["actor_optimizer"]["state"].values()} == {25}
    assert state["multiplier"]["alpha"].item() != pytest.approx(0.1, abs=1e-4)
    assert math.isfinite(state["multiplier"]["alpha"].item())
