"""BCQ: losses against NumPy, bounds, the order of an update, evaluations that repeat, and a corridor."""

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import load_script, new_learner, short
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
from runs import assert_same_run, at_update, checkpoint, equal, place, stop
from test_learning import OPTIMUM, learn, mostly, store, walk

bcq = load_script("offline/bcq.py")
SMALL = {"hidden_dim": 4, "vae_hidden_dim": 5, "act_samples": 6}
NAMES = ("vae", "actor", "critic", "target_actor", "target_critic")



def make(weights_seed: int = 0, act_dim: int = ACT, **fields):
    """BCQ with small networks of fixed weights; a target's differ from its source's."""
    learner = new_learner(bcq, bcq.Config(**{**SMALL, **fields}), OBS, act_dim)
    return fix_weights(learner, weights_seed)


# ----------------------------------------- the networks in NumPy -----------------------------------------


def halves(vae: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Layers of the encoder and of the decoder."""
    return vae[: len(vae) // 2], vae[len(vae) // 2 :]


def decoded(vae: list[np.ndarray], observations: np.ndarray, latents: np.ndarray) -> np.ndarray:
    return np.tanh(perceptron(halves(vae)[1], np.concatenate([observations, latents], axis=1)))


def perturbed(xi: list[np.ndarray], observations: np.ndarray, actions: np.ndarray, phi: float) -> np.ndarray:
    change = phi * np.tanh(perceptron(xi, np.concatenate([observations, actions], axis=1)))
    return np.minimum(np.maximum(actions + change, -1), 1)


def proposed(vae, xi, observations, latents, phi: float = 0.05) -> np.ndarray:
    """(3) with latents that are brought into [-1/2, 1/2] here."""
    latents = np.minimum(np.maximum(latents, -0.5), 0.5)
    return perturbed(xi, observations, decoded(vae, observations, latents), phi)


def auto_encoding(vae, rows, noise, kl_weight: float = 0.5) -> float:
    code = perceptron(halves(vae)[0], np.concatenate([rows["observations"], rows["actions"]], axis=1))
    mean, log_std = code[:, : 2 * ACT], np.minimum(np.maximum(code[:, 2 * ACT :], -4), 15)
    variance = np.exp(log_std) ** 2
    divergence = -0.5 * (1 + np.log(variance) - mean**2 - variance)  # from the standard normal
    errors = (decoded(vae, rows["observations"], mean + np.exp(log_std) * noise) - rows["actions"]) ** 2
    return float(np.mean(errors) + kl_weight * np.mean(divergence))


def target(learner, rows, latents, ensemble_lambda: float, discount: float, count: int) -> np.ndarray:
    """y [B]: of `count` actions of each next state, latents [B count, 2A] in the order of the states."""
    layers, best = {name: weights(getattr(learner, name)) for name in NAMES}, []
    for number, state in enumerate(rows["next_observations"]):
        states, own = np.tile(state, (count, 1)), latents[number * count : (number + 1) * count]
        actions = proposed(layers["vae"], layers["target_actor"], states, own)
        q1, q2 = q_values(layers["target_critic"], states, actions)
        best.append(max(ensemble_lambda * np.minimum(q1, q2) + (1 - ensemble_lambda) * np.maximum(q1, q2)))
    return bellman(rows, discount, np.array(best))


def normal(seed: int, *counts: int) -> list[np.ndarray]:
    """The noise [count, 2A] that draws of these sizes give after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    noise = [torch.randn(count, 2 * ACT).numpy().astype(np.float64) for count in counts]
    torch.manual_seed(seed)
    return noise


# -------------------------------------------------- VAE --------------------------------------------------


@pytest.mark.equation(1, 2)
def test_vae_loss(batch, rows):
    learner, (noise,) = make(), normal(1, 3)
    loss, metrics = learner.vae_loss(batch)
    oracle = partial(auto_encoding, rows=rows, noise=noise)
    others = [learner.actor, learner.critic, learner.target_actor, learner.target_critic]
    assert_loss_and_gradient(loss, learner.vae, oracle, others)
    layers = weights(learner.vae)
    divergence = auto_encoding(layers, rows, noise, 1.0) - auto_encoding(layers, rows, noise, 0.0)
    assert metrics["vae/kl"].item() == pytest.approx(divergence, rel=1e-5)


@pytest.mark.equation(1, 2)
@pytest.mark.parametrize(
    ("mean", "log_std", "kl"),
    [(1.0, 0.0, 0.5), (0.0, 0.0, 0.0), (-2.0, 0.0, 2.0), (0.0, 1.0, (np.e**2 - 3) / 2), (0.0, -1.0, None)],
)
@pytest.mark.parametrize("act_dim", [1, 2, 5])
def test_kl_of_the_facts(mean, log_std, kl, act_dim):
    """A mean over the latents' entries, so whatever their number; its weight is a half."""
    learner = make(act_dim=act_dim)
    half = torch.ones(3, 2 * act_dim)
    learner.vae.encoder = Constant(torch.cat([mean * half, log_std * half], 1).tolist())
    kl = (np.exp(-2) + 1) / 2 if kl is None else kl
    actions = torch.zeros(3, act_dim)
    learner.vae.decode = lambda observations, latents: actions
    loss, metrics = learner.vae_loss({"observations": torch.ones(3, OBS), "actions": actions})
    assert metrics["vae/kl"].item() == pytest.approx(kl, abs=1e-6)
    assert loss.item() == pytest.approx(kl / 2, abs=1e-6)


@pytest.mark.equation(1)
@pytest.mark.parametrize(("log_std", "bounded"), [(-9.0, -4.0), (-3.0, -3.0), (14.0, 14.0), (20.0, 15.0)])
def test_log_deviation_of_the_latents_is_bounded(batch, log_std, bounded):
    vae = make().vae
    vae.encoder = Constant([[0.0] * 2 * ACT + [log_std] * 2 * ACT] * 3)
    seen, (noise,) = [], normal(3, 3)
    vae.decode = lambda observations, latents: seen.append(latents) or batch["actions"]
    _, mean, found = vae(batch["observations"], batch["actions"])
    assert found.unique().tolist() == [bounded]
    assert mean.unique().tolist() == [0]
    np.testing.assert_allclose(seen[0].detach(), np.exp(bounded) * noise, rtol=1e-5)


# ------------------------------------------------ actions ------------------------------------------------


@pytest.mark.equation(3)
def test_latents_are_normal_within_one_half():
    learner, seen = make(), []
    learner.vae.decode = lambda observations, latents: seen.append(latents) or latents[:, :ACT]
    (noise,) = normal(0, 5000)
    learner.propose(learner.actor, torch.zeros(5000, OBS))
    np.testing.assert_allclose(seen[0], np.clip(noise, -0.5, 0.5), rtol=1e-6)
    assert seen[0].abs().max() == 0.5
    inside = (seen[0].abs() < 0.5).float().mean().item()
    assert inside == pytest.approx(math.erf(0.5 / math.sqrt(2)), abs=0.01)
    assert learner.latents.abs().max() > 0.5  # those of `act` are brought there at the same place


@pytest.mark.equation(3)
def test_without_phi_the_actions_are_the_decoders(batch, rows):
    learner, (noise,) = make(phi=0.0), normal(4, 3)
    found = learner.propose(learner.actor, batch["observations"])
    wanted = decoded(weights(learner.vae), rows["observations"], np.clip(noise, -0.5, 0.5))
    assert_close(found.detach().numpy(), wanted)


@pytest.mark.equation(3)
@pytest.mark.parametrize("phi", [0.05, 0.4])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_action_is_moved_by_at_most_phi(batch, phi, sign):
    learner = make(phi=phi)
    learner.vae.decode = lambda observations, latents: torch.tensor([[0.0, 0.2], [0.9, -0.9], [1.0, -1.0]])
    learner.actor = Constant([[sign * 100.0] * ACT] * 3)  # far where tanh is 1
    found = learner.propose(learner.actor, batch["observations"])
    wanted = np.clip(np.array([[0.0, 0.2], [0.9, -0.9], [1.0, -1.0]]) + sign * phi, -1, 1)
    np.testing.assert_allclose(found.detach(), wanted, atol=1e-6)


# ------------------------------------------------ critic ------------------------------------------------


@pytest.mark.equation(3, 4, 5)
@pytest.mark.parametrize(("ensemble_lambda", "discount"), [(0.75, 0.9), (1.0, 0.99), (0.0, 0.5)])
def test_critic_loss(batch, rows, ensemble_lambda, discount):
    learner = make(ensemble_lambda=ensemble_lambda, discount=discount, target_samples=4)
    (noise,) = normal(2, 12)
    y = target(learner, rows, noise, ensemble_lambda, discount, 4)
    assert np.abs(y - target(learner, rows, noise, 0.4, discount, 4))[[0, 2]].min() > 1e-3
    assert np.abs(y - target(learner, rows, noise[::-1], ensemble_lambda, discount, 4)).max() > 1e-3
    assert y[1] == rows["rewards"][1]  # terminated
    loss, metrics = learner.critic_loss(batch)
    others = [getattr(learner, name) for name in NAMES if name != "critic"]
    assert_loss_and_gradient(loss, learner.critic, partial(summed_errors, rows=rows, target=y), others)
    q = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(np.mean(q), rel=1e-5)


def target_of(batch, answers: list[list[float]], ensemble_lambda: float) -> float:
    """y of one transition without reward or discount, whose sampled actions have these values [2, n]."""
    count = len(answers[0])
    learner = make(ensemble_lambda=ensemble_lambda, discount=1.0, target_samples=count)
    learner.target_critic, learner.critic = Constant(answers), Constant([[0.0]] * 2)
    one = {key: column[:1] for key, column in batch.items()} | {"rewards": torch.zeros(1)}
    return (learner.critic_loss(one)[0].item() / 2) ** 0.5  # two critics, each off by y


@pytest.mark.equation(4)
@pytest.mark.parametrize(("ensemble_lambda", "wanted"), [(0.75, 2.5), (1.0, 2.0), (0.0, 4.0), (0.5, 3.0)])
@pytest.mark.parametrize("answers", [[[2.0], [4.0]], [[4.0], [2.0]]])
def test_soft_clipped_double_q_of_the_facts(batch, answers, ensemble_lambda, wanted):
    assert target_of(batch, answers, ensemble_lambda) == pytest.approx(wanted)


@pytest.mark.equation(4)
def test_the_best_action_is_chosen_after_its_two_values_are_mixed(batch):
    """Mixed they are 1 and 2; the best of each critic, mixed, would be 2.5."""
    assert target_of(batch, [[0.0, 2.0], [4.0, 2.0]], 0.75) == pytest.approx(2)


# ------------------------------------------------- actor -------------------------------------------------


def climbing(layers, vae, critic, rows, noise, phi: float = 0.05) -> float:
    """-mean Q_1 of the actions by a perturbation of these layers."""
    actions = proposed(vae, layers, rows["observations"], noise, phi)
    return float(-np.mean(q_values(critic, rows["observations"], actions)[0]))


@pytest.mark.equation(3, 6)
def test_actor_loss(batch, rows):
    """The gradient reaches the perturbation through Q_1 alone, and nothing else of the policy."""
    learner, (noise,) = make(44, phi=0.4), normal(6, 3)
    vae, critic = weights(learner.vae), weights(learner.critic)
    oracle = partial(climbing, vae=vae, critic=critic, rows=rows, noise=noise, phi=0.4)
    others = [learner.vae, learner.target_actor, learner.target_critic]
    assert_loss_and_gradient(learner.actor_loss(batch)[0], learner.actor, oracle, others)
    actions = proposed(vae, weights(learner.actor), rows["observations"], noise, 0.4)
    q1, q2 = q_values(critic, rows["observations"], actions)
    assert (q2 < q1).any()  # the smaller one would show


# ------------------------------------------------- update -------------------------------------------------


@pytest.mark.equation(1, 2, 3, 4, 5, 6, 7)
def test_updates_vae_then_critic_then_perturbation_then_both_targets(batch, rows):
    """Each step's gradient is that of its loss with the networks as the steps before it left them."""
    rates = {"vae_lr": 0.1, "critic_lr": 0.1, "actor_lr": 0.1}
    learner = make(**rates, discount=0.99, target_samples=3, tau=0.005)
    old = {name: weights(getattr(learner, name)) for name in NAMES}
    first, second, third = normal(8, 3, 9, 3)
    learner.update(batch)
    new = {name: weights(getattr(learner, name)) for name in NAMES}
    oracle = partial(auto_encoding, rows=rows, noise=first)
    assert_close(gradients(learner.vae), slopes(oracle, old["vae"]), 1e-3)

    judge = make()  # its targets are the old ones, its auto-encoder the new one
    judge.vae.load_state_dict(learner.vae.state_dict())
    y = target(judge, rows, second, 0.75, 0.99, 3)
    assert np.abs(y - target(make(), rows, second, 0.75, 0.99, 3)).max() > 1e-2  # the old one would show
    oracle = partial(summed_errors, rows=rows, target=y)
    assert_close(gradients(learner.critic), slopes(oracle, old["critic"]), 1e-3)

    wanted = {}
    for vae, critic in (("new", "new"), ("old", "new"), ("new", "old")):
        by = {"old": old, "new": new}
        oracle = partial(climbing, vae=by[vae]["vae"], critic=by[critic]["critic"], rows=rows, noise=third)
        wanted[vae, critic] = slopes(oracle, old["actor"])
    assert_close(gradients(learner.actor), wanted["new", "new"], 1e-3)
    for others in (("old", "new"), ("new", "old")):
        pairs = zip(wanted[others], wanted["new", "new"])
        assert max(np.abs(left - right).max() for left, right in pairs) > 1e-3

    for name in ("actor", "critic"):
        mixed = [0.995 * a + 0.005 * b for a, b in zip(old[f"target_{name}"], new[name])]
        assert_close(new[f"target_{name}"], mixed, 1e-6)
        assert max(np.abs(a - b).max() for a, b in zip(old[f"target_{name}"], mixed)) > 1e-3


@pytest.mark.parametrize("network", ["vae", "critic", "actor"])
def test_an_optimiser_moves_its_own_network_only(batch, network):
    rates = {f"{name}_lr": 0.01 * (name == network) for name in ("vae", "critic", "actor")}
    assert moved(make(tau=0.0, **rates), batch) == [network]


@pytest.mark.equation(7)
def test_compiled_updates_equal_eager_ones_and_targets_are_exact_averages(batch):
    assert_compiled_is_eager(bcq, [make(tau=0.1, target_samples=3) for _ in range(2)], batch)


# -------------------------------------------------- acting --------------------------------------------------


@pytest.mark.equation(3, 8)
def test_acts_by_the_best_of_its_samples_for_the_first_critic(rows):
    learner, differ = make(44, act_samples=50, phi=0.3), 0
    learner.scaler.low, learner.scaler.high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 4.0])
    layers, wanted = {name: weights(getattr(learner, name)) for name in NAMES}, []
    latents = learner.latents.numpy().astype(np.float64)
    for state in rows["observations"]:
        states = np.tile(state, (50, 1))
        actions = proposed(layers["vae"], layers["actor"], states, latents, 0.3)
        q1, q2 = q_values(layers["critic"], states, actions)
        differ += q1.argmax() != np.minimum(q1, q2).argmax()
        wanted.append(actions[q1.argmax()])
    assert differ  # the best for the smaller one would show
    assert_close(learner.act(rows["observations"]), 2 * np.array(wanted) + [0.0, 2.0])


def test_a_states_action_depends_on_nothing_but_the_state():
    """Bit for bit: not on the rows beside it, on earlier calls or on torch's random numbers, which stay."""
    learner = make()
    observations = np.random.default_rng(0).normal(size=(10, OBS)).astype(np.float32)
    before = torch.get_rng_state()
    actions = learner.act(observations)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert actions.shape == (10, ACT)
    assert actions.dtype == np.float32
    assert len(np.unique(actions[:, 0])) == 10
    assert np.array_equal(learner.act(observations[::-1]), actions[::-1])
    for number, observation in enumerate(observations):
        assert np.array_equal(learner.act(observation), actions[number])


def test_latents_of_act_are_the_seeds_and_no_others():
    """Not those of the random numbers that networks and training take, which they leave as they are."""
    states, latents = [], []
    for seed, before in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(before)
        learner = make(seed=seed, act_samples=1000)
        states.append(torch.get_rng_state())
        latents.append(learner.latents)
    torch.manual_seed(0)
    make(act_samples=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])
    assert latents[0].shape == (1000, 2 * ACT)
    assert latents[0].std().item() == pytest.approx(1, abs=0.05)


# ------------------------------------------- differences and data -------------------------------------------


def test_sizes_and_numbers():
    config, learner = bcq.Config(), new_learner(bcq, bcq.Config(), OBS, ACT)
    wanted = {"phi": 0.05, "ensemble_lambda": 0.75, "target_samples": 10, "act_samples": 100}
    wanted |= {"actor_lr": 1e-3, "critic_lr": 1e-3, "vae_lr": 1e-3, "discount": 0.99, "tau": 0.005}
    wanted |= {"batch_size": 100, "updates": 1_000_000, "normalize_states": False, "normalize_rewards": False}
    assert {name: getattr(config, name) for name in wanted} == wanted
    sizes = {
        name: [weight.shape[1] for weight in network.parameters() if weight.dim() == 2]
        for name, network in {
            "encoder": learner.vae.encoder, "decoder": learner.vae.decoder, "xi": learner.actor
        }.items()
    }
    assert sizes == {
        "encoder": [OBS + ACT, 750, 750], "decoder": [OBS + 2 * ACT, 750, 750], "xi": [OBS + ACT, 400, 400]
    }
    shapes = [layer.weight.shape for layer in learner.critic.layers]
    assert shapes == [(2, OBS + ACT, 400), (2, 400, 400), (2, 400, 1)]
    assert learner.latents.shape == (100, 2 * ACT)


def test_a_truncation_bootstraps_from_its_last_observation(minari_root):
    learner, (noise,) = make(discount=0.9, target_samples=2), normal(9, 6)

    def next_values(observations):
        none = {"rewards": np.zeros(3), "terminations": np.zeros(3), "next_observations": observations}
        torch.manual_seed(9)
        return target(learner, none, noise, 0.75, 1.0, 2)

    assert_critic_bootstraps_from_truncations(bcq, learner, next_values)


# --------------------------------------------- runs, learning ---------------------------------------------


def brief(dataset, folder, **fields) -> list[str]:
    return short(dataset, folder, vae_hidden_dim=8, act_samples=5, target_samples=2, **fields)


def test_runs_resume_and_repeat_their_evaluations(call, pendulum, tmp_path, monkeypatch):
    """To the same bits, however often it was evaluated; a finished policy plays its final episodes again."""
    with monkeypatch.context() as patch:
        at_update(bcq, patch, 33, stop)
        assert call("bcq", *brief(pendulum, tmp_path / "one"))[0] == 130
    for folder, fields in {"one": {}, "other": {}, "rare": {"eval_every": 40}}.items():
        status, out, err = call("bcq", *brief(pendulum, tmp_path / folder, **fields))
        assert status == 0, err
        assert ("resumed at update 20" in out) == (folder == "one")
    one, other, rare = (place(tmp_path / name, "bcq", pendulum) for name in ("one", "other", "rare"))
    assert_same_run(one, other)
    often, seldom = (checkpoint(folder) for folder in (one, rare))
    assert equal(often, seldom)

    policy, dataset = bcq.load(one), bcq.load_dataset(pendulum)
    table = pd.read_csv(one / "evaluations.csv").query("phase == 'final'").reset_index(drop=True)
    for _ in range(2):
        environments = bcq.make_environments(dataset, None)
        again = bcq.evaluate(policy.act, environments, 12, (0, 40, 1))
        assert again["return"].tolist() == table["return"].tolist()


def test_with_a_small_phi_it_takes_no_longer_steps_than_its_samples(minari_root):
    """Latents within one half are decoded to the shorter steps alone of the corridor in tests/test_learning.

    A step to the door is at most the largest sample and phi: it cannot be reached in OPTIMUM.
    """
    wanderings = store("test/corridor/bcq-v0", [walk(seed, shortest=0.0) for seed in range(400)])
    fields = {"vae_hidden_dim": 32, "vae_lr": 3e-3, "act_samples": 20}
    assert mostly(learn(bcq, wanderings, **fields, phi=0.05), -math.inf, OPTIMUM - 2)
