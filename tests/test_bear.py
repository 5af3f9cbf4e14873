"""BEAR: losses against NumPy, the discrepancy in closed form, its multiplier, an update's order, acting."""

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
    assert_close,
    assert_compiled_is_eager,
    assert_critic_bootstraps_from_truncations,
    assert_loss_and_gradient,
    bellman,
    fix_weights,
    gaussian,
    gradients,
    moved,
    perceptron,
    q_values,
    slopes,
    summed_errors,
    weights,
)
from runs import assert_same_run, at_update, place, stop

bear = load_script("offline/bear.py")
SMALL = {"hidden_dim": 4, "vae_hidden_dim": 5, "act_samples": 6, "warmup_updates": 0}
NAMES = ("vae", "actor", "critic", "target_actor", "target_critic")


def make(seed: int = 1057, act_dim: int = ACT, log: float = 0.4, **fields):
    """BEAR with small networks of fixed weights; a target's differ from its source's."""
    learner = fix_weights(new_learner(bear, bear.Config(**{**SMALL, **fields}), OBS, act_dim), seed)
    learner.multiplier["log"].data.fill_(log)
    return learner


def draw(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """The standard normal noise that draws of these shapes give after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    noise = [torch.randn(shape).numpy().astype(np.float64) for shape in shapes]
    torch.manual_seed(seed)
    return noise


# ------------------------------------------- the paper in NumPy -------------------------------------------


def halves(vae: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Layers of the encoder and of the decoder."""
    return vae[: len(vae) // 2], vae[len(vae) // 2 :]


def auto_encoding(vae, rows, noise, kl_weight: float = 0.5) -> float:
    code = perceptron(halves(vae)[0], np.concatenate([rows["observations"], rows["actions"]], axis=1))
    mean, log_std = code[:, : 2 * ACT], np.minimum(np.maximum(code[:, 2 * ACT :], -4), 15)
    variance = np.exp(log_std) ** 2
    divergence = -0.5 * (1 + np.log(variance) - mean**2 - variance)  # from the standard normal
    latents = mean + np.exp(log_std) * noise
    decoded = np.tanh(perceptron(halves(vae)[1], np.concatenate([rows["observations"], latents], axis=1)))
    return float(np.mean((decoded - rows["actions"]) ** 2) + kl_weight * np.mean(divergence))


def target(learner, rows, noise, ensemble_lambda: float, discount: float, count: int) -> np.ndarray:
    """y [B]: of `count` actions of each next state; noise [B count, A] in the order of the states."""
    actor, critic, best = weights(learner.target_actor), weights(learner.target_critic), []
    for number, state in enumerate(rows["next_observations"]):
        states = np.tile(state, (count, 1))
        mean, std = gaussian(actor, states)
        actions = np.tanh(mean + std * noise[number * count : (number + 1) * count])
        q1, q2 = q_values(critic, states, actions)
        best.append(max(ensemble_lambda * np.minimum(q1, q2) + (1 - ensemble_lambda) * np.maximum(q1, q2)))
    return bellman(rows, discount, np.array(best))


def kernel(one: np.ndarray, other: np.ndarray, sigma: float, is_gaussian: bool) -> float:
    difference = one - other
    distance = np.sum(difference**2) if is_gaussian else np.sum(np.abs(difference))
    return math.exp(-distance / (2 * sigma))


def discrepancy(xs: np.ndarray, data: np.ndarray, sigma: float, is_gaussian: bool) -> float:
    """MMD of two sets of samples [n, A] of one state, pair by pair; a sample is its own pair too."""
    pairs = {"xx": (xs, xs), "yy": (data, data), "xy": (xs, data)}
    means = {}
    for name, (left, right) in pairs.items():
        means[name] = np.mean([kernel(one, other, sigma, is_gaussian) for one in left for other in right])
    return math.sqrt(means["xx"] + means["yy"] - 2 * means["xy"] + 1e-6)


def samples(actor, vae, observations, noise, latents) -> tuple[np.ndarray, np.ndarray]:
    """Of the actor and of the data, both before the tanh: [n, B, A] with noise that is cut here."""
    mean, std = gaussian(actor, observations)
    x = mean + std * np.minimum(np.maximum(noise, -0.5), 0.5)
    latents = np.minimum(np.maximum(latents, -0.5), 0.5)
    inputs = [np.concatenate([observations, own], axis=1) for own in latents]
    return x, np.stack([perceptron(halves(vae)[1], own) for own in inputs])


def imitating(layers, vae, critic, rows, noise, latents, factor, sigma=10.0, is_gaussian=False, weight=1.0):
    """(6) as a function of the actor's layers; `factor` is m, `weight` that of Q."""
    x, data = samples(layers, vae, rows["observations"], noise, latents)
    apart = [discrepancy(x[:, state], data[:, state], sigma, is_gaussian) for state in range(3)]
    q = np.mean([q_values(critic, rows["observations"], np.tanh(own)) for own in x], axis=0)  # [2, B]
    return float(np.mean(factor * np.array(apart) - weight * np.min(q, axis=0)))


# -------------------------------------------- discrepancy --------------------------------------------


def apart(x: list, data: list, **fields) -> float:
    """MMD of samples of one state with one entry each."""
    learner = make(act_dim=1, **fields)
    return learner.mmd(torch.tensor(x).view(-1, 1, 1), torch.tensor(data).view(-1, 1, 1)).item()


@pytest.mark.equation(4, 5)
@pytest.mark.parametrize("gaussian_kernel", [False, True])
def test_identical_samples_are_a_thousandth_apart(gaussian_kernel):
    """(facts) The root of 1e-6, in every state."""
    learner, x = make(gaussian_kernel=gaussian_kernel), torch.randn(5, 7, ACT)
    np.testing.assert_allclose(learner.mmd(x, x), np.full(7, 1e-3), atol=2e-4)
    assert apart([0.3], [0.3], gaussian_kernel=gaussian_kernel) == pytest.approx(1e-3, abs=1e-9)


@pytest.mark.equation(4, 5)
@pytest.mark.parametrize(
    ("gaussian_kernel", "sigma", "distance", "wanted"),
    [(False, 10.0, 1.0, 0.312317), (False, 20.0, 1.0, 0.2222188), (True, 20.0, 2.0, 0.436264)],
)
def test_discrepancy_of_the_facts(gaussian_kernel, sigma, distance, wanted):
    fields = {"gaussian_kernel": gaussian_kernel, "kernel_sigma": sigma}
    assert apart([0.0], [distance], **fields) == pytest.approx(wanted, abs=2e-6)
    assert apart([0.0, 0.0], [distance, distance], **fields) == pytest.approx(wanted, abs=2e-6)


@pytest.mark.equation(4, 5)
@pytest.mark.parametrize("gaussian_kernel", [False, True])
@pytest.mark.parametrize("sigma", [0.5, 10.0])
def test_discrepancy_pair_by_pair(gaussian_kernel, sigma):
    rng = np.random.default_rng(0)
    x, data = rng.normal(size=(4, 6, 3)), rng.normal(loc=1.0, size=(4, 6, 3))
    wanted = [discrepancy(x[:, state], data[:, state], sigma, gaussian_kernel) for state in range(6)]
    found = make(gaussian_kernel=gaussian_kernel, kernel_sigma=sigma).mmd(torch.tensor(x), torch.tensor(data))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


# ------------------------------------------------- losses -------------------------------------------------


@pytest.mark.equation(1)
def test_vae_loss(batch, rows):
    learner, (noise,) = make(), draw(1, (3, 2 * ACT))
    loss, metrics = learner.vae_loss(batch)
    oracle = partial(auto_encoding, rows=rows, noise=noise)
    others = [learner.actor, learner.critic, learner.target_actor, learner.target_critic]
    assert_loss_and_gradient(loss, learner.vae, oracle, others)
    layers = weights(learner.vae)
    divergence = auto_encoding(layers, rows, noise, 1.0) - auto_encoding(layers, rows, noise, 0.0)
    assert metrics["vae/kl"].item() == pytest.approx(divergence, rel=1e-5)


@pytest.mark.equation(2, 3)
@pytest.mark.parametrize(("ensemble_lambda", "discount"), [(0.75, 0.9), (1.0, 0.99), (0.0, 0.5)])
def test_critic_loss(batch, rows, ensemble_lambda, discount):
    """Its noise is not cut; no gradient reaches another network."""
    learner = make(ensemble_lambda=ensemble_lambda, discount=discount, target_samples=4)
    (noise,) = draw(2, (12, ACT))
    y = target(learner, rows, noise, ensemble_lambda, discount, 4)
    wrong = [target(learner, rows, noise, 0.4, discount, 4)]
    wrong.append(target(learner, rows, np.clip(noise, -0.5, 0.5), ensemble_lambda, discount, 4))
    wrong.append(target(learner, rows, noise[::-1], ensemble_lambda, discount, 4))
    assert all(np.abs(y - other).max() > 1e-3 for other in wrong)
    assert y[1] == rows["rewards"][1]  # terminated
    loss, metrics = learner.critic_loss(batch)
    others = [getattr(learner, name) for name in NAMES if name != "critic"]
    assert_loss_and_gradient(loss, learner.critic, partial(summed_errors, rows=rows, target=y), others)
    q = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(np.mean(q), rel=1e-5)


@pytest.mark.equation(2)
@pytest.mark.parametrize(
    ("values", "wanted"),
    [([[2.0], [4.0]], 2.5), ([[4.0], [2.0]], 2.5), ([[0.0, 2.0], [4.0, 2.0]], 2.0)],
)
def test_the_best_action_is_chosen_after_its_two_values_are_mixed(batch, values, wanted):
    """In the last case mixed values are 1 and 2; the best of each critic, mixed, would be 2.5."""
    learner = make(discount=1.0, target_samples=len(values[0]))
    learner.target_critic, learner.critic = Constant(values), Constant([[0.0]] * 2)
    one = {key: column[:1] for key, column in batch.items()} | {"rewards": torch.zeros(1)}
    assert (learner.critic_loss(one)[0].item() / 2) ** 0.5 == pytest.approx(wanted)


@pytest.mark.equation(4, 5, 6)
@pytest.mark.parametrize("sees_q", [True, False])
@pytest.mark.parametrize(
    ("gaussian_kernel", "sigma", "count"), [(False, 10.0, 5), (True, 20.0, 3), (False, 0.7, 2)]
)
def test_actor_loss(batch, rows, sees_q, gaussian_kernel, sigma, count):
    """The gradient goes through the actor's samples alone; the warm-up has the discrepancy and no more."""
    learner = make(3, gaussian_kernel=gaussian_kernel, kernel_sigma=sigma, mmd_samples=count)
    noise, latents = draw(6, (count, 3, ACT), (count, 3, 2 * ACT))
    assert 0 < (np.abs(noise) > 0.5).mean() < 1
    vae, critic = weights(learner.vae), weights(learner.critic)
    oracle = partial(
        imitating, vae=vae, critic=critic, rows=rows, noise=noise, latents=latents, factor=math.exp(0.4),
        sigma=sigma, is_gaussian=gaussian_kernel,
    )  # fmt: skip
    loss, metrics = learner.actor_loss(batch, sees_q)
    others = [learner.vae, learner.target_actor, learner.target_critic, learner.multiplier]
    assert_loss_and_gradient(loss, learner.actor, partial(oracle, weight=float(sees_q)), others)
    distance = oracle(weights(learner.actor), factor=1.0, weight=0.0)
    assert metrics["actor/mmd"].item() == pytest.approx(distance, rel=1e-5)


@pytest.mark.equation(6)
def test_the_lesser_of_the_critics_means(batch):
    """Q_1 is 0 and 3 of two samples, Q_2 2 and 1.5: means are 1.5 and 1.75, the lesser of each 0 and 1.5."""
    learner = make(mmd_samples=2, log=-50.0)
    learner.critic = Constant([[0.0] * 3 + [3.0] * 3, [2.0] * 3 + [1.5] * 3])
    assert learner.actor_loss(batch, True)[0].item() == pytest.approx(-1.5)


# ------------------------------------------------- update -------------------------------------------------


@pytest.mark.equation(7)
@pytest.mark.parametrize(("above", "sign"), [(0.3, 1), (-0.04, -1), (0.0, 0)])
@pytest.mark.parametrize("warmup", [0, 5])
def test_multiplier_follows_the_discrepancy(batch, above, sign, warmup):
    """In the warm-up too. A discrepancy above epsilon makes it grow."""
    learner = make(mmd_threshold=0.05, warmup_updates=warmup)
    actor_loss, told = learner.actor_loss, {"actor/mmd": torch.tensor(0.05 + above)}
    learner.actor_loss = lambda batch, sees_q: (actor_loss(batch, sees_q)[0], told)
    metrics = learner.update(batch)
    assert learner.multiplier["log"].grad.item() == pytest.approx(-math.exp(0.4) * above, rel=1e-5, abs=1e-7)
    assert np.sign(round(metrics["actor/multiplier"].item() - math.exp(0.4), 6)) == sign


@pytest.mark.equation(7)
@pytest.mark.parametrize(("log", "threshold", "bound"), [(9.9999, 0.0, 10.0), (-4.9999, 1e3, -5.0)])
def test_log_multiplier_is_from_minus_5_to_10(batch, log, threshold, bound):
    learner = make(log=log, mmd_threshold=threshold, critic_lr=0.5)
    metrics = learner.update(batch)
    assert learner.multiplier["log"].item() == bound
    assert metrics["actor/multiplier"].item() == pytest.approx(math.exp(bound), rel=1e-5)


@pytest.mark.equation(7)
def test_log_multiplier_starts_at_random():
    torch.manual_seed(0)
    logs = [new_learner(bear, bear.Config(**SMALL), OBS, ACT).multiplier["log"].item() for _ in range(300)]
    assert np.mean(logs) == pytest.approx(0, abs=0.2)
    assert np.std(logs) == pytest.approx(1, abs=0.2)


@pytest.mark.equation(6)
def test_the_actor_sees_q_after_the_warm_up(batch):
    learner = make(warmup_updates=3)
    actor_loss, seen = learner.actor_loss, []
    learner.actor_loss = lambda batch, sees_q: seen.append(sees_q) or actor_loss(batch, sees_q)
    for _ in range(5):
        assert sorted(moved(learner, batch)) == sorted([*NAMES, "multiplier"])
    assert seen == [False] * 3 + [True] * 2


@pytest.mark.equation(1, 2, 3, 4, 5, 6, 8)
def test_updates_vae_then_critic_then_actor_then_both_targets(batch, rows):
    """Each step's gradient is that of its loss with the networks as the steps before it left them."""
    rates = {"vae_lr": 0.1, "critic_lr": 0.1, "actor_lr": 0.1}
    learner = make(**rates, discount=0.99, target_samples=3, mmd_samples=2, tau=0.005)
    old = {name: weights(getattr(learner, name)) for name in NAMES}
    first, second, noise, latents = draw(8, (3, 2 * ACT), (9, ACT), (2, 3, ACT), (2, 3, 2 * ACT))
    y = target(learner, rows, second, 0.75, 0.99, 3)
    learner.update(batch)
    new = {name: weights(getattr(learner, name)) for name in NAMES}
    oracle = partial(auto_encoding, rows=rows, noise=first)
    assert_close(gradients(learner.vae), slopes(oracle, old["vae"]), 1e-3)
    oracle = partial(summed_errors, rows=rows, target=y)
    assert_close(gradients(learner.critic), slopes(oracle, old["critic"]), 1e-3)

    wanted, by = {}, {"old": old, "new": new}
    for vae, critic in (("new", "new"), ("old", "new"), ("new", "old")):
        networks = {"vae": by[vae]["vae"], "critic": by[critic]["critic"]}
        oracle = partial(imitating, **networks, rows=rows, noise=noise, latents=latents, factor=math.exp(0.4))
        wanted[vae, critic] = slopes(oracle, old["actor"])
    assert_close(gradients(learner.actor), wanted["new", "new"], 1e-3)
    for others in (("old", "new"), ("new", "old")):
        pairs = zip(wanted[others], wanted["new", "new"])
        assert max(np.abs(left - right).max() for left, right in pairs) > 1e-3

    for name in ("actor", "critic"):
        averages = [0.995 * a + 0.005 * b for a, b in zip(old[f"target_{name}"], new[name])]
        assert_close(new[f"target_{name}"], averages, 1e-6)
        assert max(np.abs(a - b).max() for a, b in zip(old[f"target_{name}"], averages)) > 1e-3


@pytest.mark.parametrize("network", ["vae", "critic", "actor"])
def test_an_optimiser_moves_its_own_network_only(batch, network):
    """The multiplier goes at the critic's rate."""
    rates = {f"{name}_lr": 0.01 * (name == network) for name in ("vae", "critic", "actor")}
    wanted = ["critic", "multiplier"] if network == "critic" else [network]
    assert sorted(moved(make(tau=0.0, **rates), batch)) == wanted


@pytest.mark.equation(8)
def test_compiled_updates_equal_eager_ones_and_targets_are_exact_averages(batch):
    """With a warm-up of two updates, so in both forms of the actor's loss."""
    fields = {"tau": 0.1, "target_samples": 3, "mmd_samples": 2, "warmup_updates": 2}
    assert_compiled_is_eager(bear, [make(**fields), make(**fields)], batch)


# -------------------------------------------------- acting --------------------------------------------------


@pytest.mark.equation(9)
def test_acts_by_the_best_of_its_samples_for_the_first_critic(rows):
    learner, differ = make(1, act_samples=50), 0
    learner.scaler.low, learner.scaler.high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 4.0])
    noise, wanted = learner.noise.numpy().astype(np.float64), []
    assert np.abs(noise).max() > 1  # not cut
    for state in rows["observations"]:
        states = np.tile(state, (50, 1))
        mean, std = gaussian(weights(learner.actor), states)
        actions = np.tanh(mean + std * noise)
        q1, q2 = q_values(weights(learner.critic), states, actions)
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
    assert (actions.shape, actions.dtype) == ((10, ACT), np.float32)
    assert len(np.unique(actions[:, 0])) == 10
    assert np.array_equal(learner.act(observations[::-1]), actions[::-1])
    for number, observation in enumerate(observations):
        assert np.array_equal(learner.act(observation), actions[number])


def test_the_noise_of_act_is_the_seeds_and_no_other():
    noises = []
    for seed, before in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(before)
        config = bear.Config(**{**SMALL, "seed": seed, "act_samples": 1000})
        noises.append(new_learner(bear, config, OBS, ACT).noise)
    assert torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2])
    assert noises[0].shape == (1000, ACT)
    assert noises[0].std().item() == pytest.approx(1, abs=0.05)


# ------------------------------------------- differences and data -------------------------------------------


def test_sizes_and_numbers():
    config, learner = bear.Config(), new_learner(bear, bear.Config(), OBS, ACT)
    wanted = {"ensemble_lambda": 0.75, "target_samples": 10, "act_samples": 10, "batch_size": 100}
    wanted |= {"mmd_samples": 5, "gaussian_kernel": False, "kernel_sigma": 10.0, "mmd_threshold": 0.05}
    wanted |= {"actor_lr": 1e-3, "critic_lr": 1e-3, "vae_lr": 1e-3, "discount": 0.99, "tau": 0.005}
    wanted |= {"updates": 1_000_000, "warmup_updates": 100_000, "normalize_states": False}
    assert {name: getattr(config, name) for name in wanted} == wanted
    networks = {"encoder": learner.vae.encoder, "decoder": learner.vae.decoder, "actor": learner.actor}
    inputs = {
        name: [weight.shape[1] for weight in network.parameters() if weight.dim() == 2]
        for name, network in networks.items()
    }
    wanted = {"encoder": [OBS + ACT, 750, 750], "decoder": [OBS + 2 * ACT, 750, 750]}
    assert inputs == wanted | {"actor": [OBS, 400, 400]}
    shapes = [layer.weight.shape for layer in learner.critic.layers]
    assert shapes == [(2, OBS + ACT, 400), (2, 400, 400), (2, 400, 1)]
    assert learner.noise.shape == (10, ACT)


@pytest.mark.parametrize(("log_std", "bounded"), [(-9.0, -5.0), (-2.0, -2.0), (1.5, 1.5), (9.0, 2.0)])
def test_deviations_are_bounded(log_std, bounded):
    mean, std = bear.gaussian(Constant([[0.4, -30.0, log_std, log_std]]), torch.zeros(1, OBS))
    np.testing.assert_allclose(mean.detach(), [[0.4, -30.0]])
    np.testing.assert_allclose(std.detach(), np.exp([[bounded] * 2]), rtol=1e-6)


def test_the_noise_of_the_discrepancy_is_cut_and_both_samples_are_before_the_tanh(batch):
    """Where a tanh would be within [-1, 1] they are 30 apart, give or take half a deviation."""
    learner, seen = make(mmd_samples=500), []
    learner.actor = Constant([[[30.0, 30.0, 0.0, 0.0]] * 3] * 500)
    learner.vae.decoder.forward = lambda inputs: seen.append(inputs[..., OBS:]) or torch.zeros(500, 3, ACT)
    learner.mmd = lambda x, data: seen.extend([x, data]) or torch.zeros(3)
    learner.actor_loss(batch, False)
    latents, x, data = seen
    assert latents.shape == (500, 3, 2 * ACT)
    assert (latents.abs().max().item(), (x - 30).abs().max().item()) == (0.5, 0.5)
    assert (data == 0).all()
    share = math.erf(0.5 / math.sqrt(2))  # of what is drawn, within one half
    for noise in (latents, x - 30):
        assert (noise.abs() < 0.5).float().mean().item() == pytest.approx(share, abs=0.03)


def test_a_truncation_bootstraps_from_its_last_observation(minari_root):
    learner, (noise,) = make(discount=0.9, target_samples=2), draw(9, (6, ACT))

    def next_values(observations):
        none = {"rewards": np.zeros(3), "terminations": np.zeros(3), "next_observations": observations}
        torch.manual_seed(9)
        return target(learner, none, noise, 0.75, 1.0, 2)

    assert_critic_bootstraps_from_truncations(bear, learner, next_values)


# ------------------------------------------------- runs -------------------------------------------------


@pytest.mark.parametrize("death", [13, 33])
def test_a_run_stopped_in_or_after_the_warm_up_ends_in_the_same_bits(
    call, pendulum, tmp_path, monkeypatch, death
):
    fields = {"warmup_updates": 15, "vae_hidden_dim": 8, "target_samples": 2, "checkpoint_every": 10}
    assert call("bear", *short(pendulum, tmp_path / "whole", **fields))[0] == 0
    with monkeypatch.context() as patch:
        at_update(bear, patch, death, stop)
        assert call("bear", *short(pendulum, tmp_path / "torn", **fields))[0] == 130
    status, out, _ = call("bear", *short(pendulum, tmp_path / "torn", **fields))
    assert (status, f"resumed at update {death // 10 * 10}" in out) == (0, True)
    whole, torn = (place(tmp_path / name, "bear", pendulum) for name in ("whole", "torn"))
    assert_same_run(whole, torn)
    policy = bear.load(str(whole))
    state = torch.load(whole / "checkpoint.pt", weights_only=True)["state"]
    assert policy.multiplier["log"].item() == state["multiplier"]["log"].item()
    assert policy.act([1.0, 0.0, 0.5]).shape == (1,)
