"""BCQ: losses against NumPy, bounds, the order of an update, evaluations that repeat, and a corridor."""

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import short
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
from test_learning import OPTIMUM, TRAPPED, learn, walk
from test_learning import store as store_corridor
from test_losses import ACTIONS as ENVIRONMENT_ACTIONS
from test_losses import episode, store
from test_runs import assert_same_run, checkpoint, equal, place

SMALL = {"hidden_dim": 4, "vae_hidden_dim": 5, "act_samples": 6}
NAMES = ("vae", "actor", "critic", "target_actor", "target_critic")


@pytest.fixture
def bcq(scripts):
    return scripts["bcq"]


def make(script, weights_seed: int = 0, **fields):
    """BCQ with small networks of fixed weights; a target's differ from its source's."""
    algorithm = script.Algorithm(script.Config(**{**SMALL, **fields}), OBS, ACT, CPU)
    rng = np.random.default_rng(weights_seed)
    for name in NAMES:
        for weight in getattr(algorithm, name).parameters():
            weight.data = torch.tensor(rng.normal(scale=0.7, size=weight.shape), dtype=torch.float32)
    return algorithm


# ----------------------------------------- the networks in NumPy -----------------------------------------


def halves(vae: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Layers of the encoder and of the decoder."""
    return vae[: len(vae) // 2], vae[len(vae) // 2 :]


def decoded(vae: list[np.ndarray], observations: np.ndarray, latents: np.ndarray) -> np.ndarray:
    return np.tanh(perceptron(halves(vae)[1], np.concatenate([observations, latents], axis=1)))


def moved(xi: list[np.ndarray], observations: np.ndarray, actions: np.ndarray, phi: float) -> np.ndarray:
    change = phi * np.tanh(perceptron(xi, np.concatenate([observations, actions], axis=1)))
    return np.minimum(np.maximum(actions + change, -1), 1)


def proposed(vae, xi, observations, latents, phi: float = 0.05) -> np.ndarray:
    """(3) with latents that are brought into [-1/2, 1/2] here."""
    latents = np.minimum(np.maximum(latents, -0.5), 0.5)
    return moved(xi, observations, decoded(vae, observations, latents), phi)


def auto_encoding(vae, rows, noise, kl_weight: float = 0.5) -> float:
    code = perceptron(halves(vae)[0], np.concatenate([rows["observations"], rows["actions"]], axis=1))
    mean, log_std = code[:, : 2 * ACT], np.minimum(np.maximum(code[:, 2 * ACT :], -4), 15)
    variance = np.exp(log_std) ** 2
    divergence = -0.5 * (1 + np.log(variance) - mean**2 - variance)  # from the standard normal
    errors = (decoded(vae, rows["observations"], mean + np.exp(log_std) * noise) - rows["actions"]) ** 2
    return float(np.mean(errors) + kl_weight * np.mean(divergence))


def target(algorithm, rows, latents, bcq_lambda: float, discount: float, count: int) -> np.ndarray:
    """y [B]: of `count` actions of each next state, latents [B count, 2A] in the order of the states."""
    layers, best = {name: weights(getattr(algorithm, name)) for name in NAMES}, []
    for number, state in enumerate(rows["next_observations"]):
        states, own = np.tile(state, (count, 1)), latents[number * count : (number + 1) * count]
        actions = proposed(layers["vae"], layers["target_actor"], states, own)
        q1, q2 = q_values(layers["target_critic"], states, actions)
        best.append(max(bcq_lambda * np.minimum(q1, q2) + (1 - bcq_lambda) * np.maximum(q1, q2)))
    return bellman(rows, discount, np.array(best))


def normal(seed: int, *counts: int) -> list[np.ndarray]:
    """The noise [count, 2A] that draws of these sizes give after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    noise = [torch.randn(count, 2 * ACT).numpy().astype(np.float64) for count in counts]
    torch.manual_seed(seed)
    return noise


# -------------------------------------------------- VAE --------------------------------------------------


def test_vae_loss(bcq, batch, rows):
    algorithm, (noise,) = make(bcq), normal(1, 3)
    loss, metrics = algorithm.vae_loss(batch)
    oracle = partial(auto_encoding, rows=rows, noise=noise)
    others = [algorithm.actor, algorithm.critic, algorithm.target_actor, algorithm.target_critic]
    assert_loss_and_gradient(loss, algorithm.vae, oracle, others)
    layers = weights(algorithm.vae)
    divergence = auto_encoding(layers, rows, noise, 1.0) - auto_encoding(layers, rows, noise, 0.0)
    assert metrics["vae/kl"].item() == pytest.approx(divergence, rel=1e-5)


@pytest.mark.parametrize(
    ("mean", "log_std", "kl"),
    [(1.0, 0.0, 0.5), (0.0, 0.0, 0.0), (-2.0, 0.0, 2.0), (0.0, 1.0, (np.e**2 - 3) / 2), (0.0, -1.0, None)],
)
@pytest.mark.parametrize("act_dim", [1, 2, 5])
def test_kl_of_the_facts(bcq, mean, log_std, kl, act_dim):
    """A mean over the latents' entries, so whatever their number; its weight is a half."""
    algorithm = bcq.Algorithm(bcq.Config(**SMALL), OBS, act_dim, CPU)
    half = torch.ones(3, 2 * act_dim)
    algorithm.vae.encoder = Constant(torch.cat([mean * half, log_std * half], 1).tolist())
    kl = (np.exp(-2) + 1) / 2 if kl is None else kl
    actions = torch.zeros(3, act_dim)
    algorithm.vae.decode = lambda observations, latents: actions
    loss, metrics = algorithm.vae_loss({"observations": torch.ones(3, OBS), "actions": actions})
    assert metrics["vae/kl"].item() == pytest.approx(kl, abs=1e-6)
    assert loss.item() == pytest.approx(kl / 2, abs=1e-6)


@pytest.mark.parametrize(("log_std", "bounded"), [(-9.0, -4.0), (-3.0, -3.0), (14.0, 14.0), (20.0, 15.0)])
def test_log_deviation_of_the_latents_is_bounded(bcq, batch, log_std, bounded):
    vae = make(bcq).vae
    vae.encoder = Constant([[0.0] * 2 * ACT + [log_std] * 2 * ACT] * 3)
    seen, (noise,) = [], normal(3, 3)
    vae.decode = lambda observations, latents: seen.append(latents) or batch["actions"]
    _, mean, found = vae(batch["observations"], batch["actions"])
    assert found.unique().tolist() == [bounded]
    assert mean.unique().tolist() == [0]
    np.testing.assert_allclose(seen[0].detach(), np.exp(bounded) * noise, rtol=1e-5)


# ------------------------------------------------ actions ------------------------------------------------


def test_latents_are_normal_within_one_half(bcq):
    algorithm, seen = make(bcq), []
    algorithm.vae.decode = lambda observations, latents: seen.append(latents) or latents[:, :ACT]
    (noise,) = normal(0, 5000)
    algorithm.propose(algorithm.actor, torch.zeros(5000, OBS))
    np.testing.assert_allclose(seen[0], np.clip(noise, -0.5, 0.5), rtol=1e-6)
    assert seen[0].abs().max() == 0.5
    inside = (seen[0].abs() < 0.5).float().mean().item()
    assert inside == pytest.approx(math.erf(0.5 / math.sqrt(2)), abs=0.01)
    assert algorithm.latents.abs().max() > 0.5  # those of `act` are brought there at the same place


def test_without_phi_the_actions_are_the_decoders(bcq, batch, rows):
    algorithm, (noise,) = make(bcq, phi=0.0), normal(4, 3)
    found = algorithm.propose(algorithm.actor, batch["observations"])
    wanted = decoded(weights(algorithm.vae), rows["observations"], np.clip(noise, -0.5, 0.5))
    assert_close(found.detach().numpy(), wanted)


@pytest.mark.parametrize("phi", [0.05, 0.4])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_action_is_moved_by_at_most_phi(bcq, batch, phi, sign):
    algorithm = make(bcq, phi=phi)
    algorithm.vae.decode = lambda observations, latents: torch.tensor([[0.0, 0.2], [0.9, -0.9], [1.0, -1.0]])
    algorithm.actor = Constant([[sign * 100.0] * ACT] * 3)  # far where tanh is 1
    found = algorithm.propose(algorithm.actor, batch["observations"])
    wanted = np.clip(np.array([[0.0, 0.2], [0.9, -0.9], [1.0, -1.0]]) + sign * phi, -1, 1)
    np.testing.assert_allclose(found.detach(), wanted, atol=1e-6)


# ------------------------------------------------ critic ------------------------------------------------


@pytest.mark.parametrize(("bcq_lambda", "discount"), [(0.75, 0.9), (1.0, 0.99), (0.0, 0.5)])
def test_critic_loss(bcq, batch, rows, bcq_lambda, discount):
    algorithm = make(bcq, bcq_lambda=bcq_lambda, discount=discount, target_samples=4)
    (noise,) = normal(2, 12)
    y = target(algorithm, rows, noise, bcq_lambda, discount, 4)
    assert np.abs(y - target(algorithm, rows, noise, 0.4, discount, 4))[[0, 2]].min() > 1e-3
    assert np.abs(y - target(algorithm, rows, noise[::-1], bcq_lambda, discount, 4)).max() > 1e-3
    assert y[1] == rows["rewards"][1]  # terminated
    loss, metrics = algorithm.critic_loss(batch)
    others = [getattr(algorithm, name) for name in NAMES if name != "critic"]
    assert_loss_and_gradient(loss, algorithm.critic, partial(summed_errors, rows=rows, target=y), others)
    q = q_values(weights(algorithm.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(np.mean(q), rel=1e-5)


def target_of(bcq, batch, answers: list[list[float]], bcq_lambda: float) -> float:
    """y of one transition without reward or discount, whose sampled actions have these values [2, n]."""
    count = len(answers[0])
    algorithm = make(bcq, bcq_lambda=bcq_lambda, discount=1.0, target_samples=count)
    algorithm.target_critic, algorithm.critic = Constant(answers), Constant([[0.0]] * 2)
    one = {key: column[:1] for key, column in batch.items()} | {"rewards": torch.zeros(1)}
    return (algorithm.critic_loss(one)[0].item() / 2) ** 0.5  # two critics, each off by y


@pytest.mark.parametrize(("bcq_lambda", "wanted"), [(0.75, 2.5), (1.0, 2.0), (0.0, 4.0), (0.5, 3.0)])
@pytest.mark.parametrize("answers", [[[2.0], [4.0]], [[4.0], [2.0]]])
def test_soft_clipped_double_q_of_the_facts(bcq, batch, answers, bcq_lambda, wanted):
    assert target_of(bcq, batch, answers, bcq_lambda) == pytest.approx(wanted)


def test_the_best_action_is_chosen_after_its_two_values_are_mixed(bcq, batch):
    """Mixed they are 1 and 2; the best of each critic, mixed, would be 2.5."""
    assert target_of(bcq, batch, [[0.0, 2.0], [4.0, 2.0]], 0.75) == pytest.approx(2)


# ------------------------------------------------- actor -------------------------------------------------


def climbing(layers, vae, critic, rows, noise, phi: float = 0.05) -> float:
    """-mean Q_1 of the actions by a perturbation of these layers."""
    actions = proposed(vae, layers, rows["observations"], noise, phi)
    return float(-np.mean(q_values(critic, rows["observations"], actions)[0]))


def test_actor_loss(bcq, batch, rows):
    """The gradient reaches the perturbation through Q_1 alone, and nothing else of the policy."""
    algorithm, (noise,) = make(bcq, 44, phi=0.4), normal(6, 3)
    vae, critic = weights(algorithm.vae), weights(algorithm.critic)
    oracle = partial(climbing, vae=vae, critic=critic, rows=rows, noise=noise, phi=0.4)
    others = [algorithm.vae, algorithm.target_actor, algorithm.target_critic]
    assert_loss_and_gradient(algorithm.actor_loss(batch)[0], algorithm.actor, oracle, others)
    actions = proposed(vae, weights(algorithm.actor), rows["observations"], noise, 0.4)
    q1, q2 = q_values(critic, rows["observations"], actions)
    assert (q2 < q1).any()  # the smaller one would show


# ------------------------------------------------- update -------------------------------------------------


def test_updates_vae_then_critic_then_perturbation_then_both_targets(bcq, batch, rows):
    """Each step's gradient is that of its loss with the networks as the steps before it left them."""
    rates = {"vae_lr": 0.1, "critic_lr": 0.1, "actor_lr": 0.1}
    algorithm = make(bcq, **rates, discount=0.99, target_samples=3, tau=0.005)
    old = {name: weights(getattr(algorithm, name)) for name in NAMES}
    first, second, third = normal(8, 3, 9, 3)
    algorithm.update(batch)
    new = {name: weights(getattr(algorithm, name)) for name in NAMES}
    oracle = partial(auto_encoding, rows=rows, noise=first)
    assert_close(gradients(algorithm.vae), slopes(oracle, old["vae"]), 1e-3)

    judge = make(bcq)  # its targets are the old ones, its auto-encoder the new one
    judge.vae.load_state_dict(algorithm.vae.state_dict())
    y = target(judge, rows, second, 0.75, 0.99, 3)
    assert np.abs(y - target(make(bcq), rows, second, 0.75, 0.99, 3)).max() > 1e-2  # the old one would show
    oracle = partial(summed_errors, rows=rows, target=y)
    assert_close(gradients(algorithm.critic), slopes(oracle, old["critic"]), 1e-3)

    wanted = {}
    for vae, critic in (("new", "new"), ("old", "new"), ("new", "old")):
        by = {"old": old, "new": new}
        oracle = partial(climbing, vae=by[vae]["vae"], critic=by[critic]["critic"], rows=rows, noise=third)
        wanted[vae, critic] = slopes(oracle, old["actor"])
    assert_close(gradients(algorithm.actor), wanted["new", "new"], 1e-3)
    for others in (("old", "new"), ("new", "old")):
        pairs = zip(wanted[others], wanted["new", "new"])
        assert max(np.abs(left - right).max() for left, right in pairs) > 1e-3

    for name in ("actor", "critic"):
        mixed = [0.995 * a + 0.005 * b for a, b in zip(old[f"target_{name}"], new[name])]
        assert_close(new[f"target_{name}"], mixed, 1e-6)
        assert max(np.abs(a - b).max() for a, b in zip(old[f"target_{name}"], mixed)) > 1e-3


@pytest.mark.parametrize("mover", ["vae", "critic", "actor"])
def test_an_optimiser_moves_its_own_network_only(bcq, batch, mover):
    rates = {f"{name}_lr": 0.01 * (name == mover) for name in ("vae", "critic", "actor")}
    algorithm = make(bcq, tau=0.0, **rates)
    before = {name: snapshot(network) for name, network in networks(algorithm).items()}
    algorithm.update(batch)
    after = networks(algorithm).items()
    assert [name for name, network in after if not same(network, before[name])] == [mover]


def test_compiled_updates_equal_eager_ones_and_targets_are_exact_averages(bcq, batch):
    twins, histories = [make(bcq, tau=0.1, target_samples=3) for _ in range(2)], []
    assert bcq.compile_losses(twins[1], CPU)
    for algorithm in twins:
        wanted, history = {name: weights(getattr(algorithm, name)) for name in NAMES[3:]}, []
        for update in range(5):
            torch.manual_seed(update)
            history += [float(value) for value in algorithm.update(batch).values()]
            for name, old in wanted.items():
                new = weights(getattr(algorithm, name.removeprefix("target_")))
                wanted[name] = [0.9 * a + 0.1 * b for a, b in zip(old, new)]
        for name, layers in wanted.items():
            assert_close(weights(getattr(algorithm, name)), layers, 1e-6)
        histories.append(history)
    assert histories[1] == pytest.approx(histories[0], rel=1e-4, abs=1e-5)


# -------------------------------------------------- acting --------------------------------------------------


def test_acts_by_the_best_of_its_samples_for_the_first_critic(bcq, rows):
    algorithm, differ = make(bcq, 44, act_samples=50, phi=0.3), 0
    algorithm.units.low, algorithm.units.high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 4.0])
    layers, wanted = {name: weights(getattr(algorithm, name)) for name in NAMES}, []
    latents = algorithm.latents.numpy().astype(np.float64)
    for state in rows["observations"]:
        states = np.tile(state, (50, 1))
        actions = proposed(layers["vae"], layers["actor"], states, latents, 0.3)
        q1, q2 = q_values(layers["critic"], states, actions)
        differ += q1.argmax() != np.minimum(q1, q2).argmax()
        wanted.append(actions[q1.argmax()])
    assert differ  # the best for the smaller one would show
    assert_close(algorithm.act(rows["observations"]), 2 * np.array(wanted) + [0.0, 2.0])


def test_a_states_action_depends_on_nothing_but_the_state(bcq):
    """Bit for bit: not on the rows beside it, on earlier calls or on torch's random numbers, which stay."""
    algorithm = make(bcq)
    observations = np.random.default_rng(0).normal(size=(10, OBS)).astype(np.float32)
    before = torch.get_rng_state()
    actions = algorithm.act(observations)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert actions.shape == (10, ACT)
    assert actions.dtype == np.float32
    assert len(np.unique(actions[:, 0])) == 10
    assert np.array_equal(algorithm.act(observations[::-1]), actions[::-1])
    for number, observation in enumerate(observations):
        assert np.array_equal(algorithm.act(observation), actions[number])


def test_latents_of_act_are_the_seeds_and_no_others(bcq):
    """Not those of the random numbers that networks and training take, which they leave as they are."""
    states, latents = [], []
    for seed, before in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(before)
        algorithm = make(bcq, seed=seed, act_samples=1000)
        states.append(torch.get_rng_state())
        latents.append(algorithm.latents)
    torch.manual_seed(0)
    make(bcq, act_samples=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])
    assert latents[0].shape == (1000, 2 * ACT)
    assert latents[0].std().item() == pytest.approx(1, abs=0.05)


# ------------------------------------------- differences and data -------------------------------------------


def test_sizes_and_numbers(bcq):
    config, algorithm = bcq.Config(), bcq.Algorithm(bcq.Config(), OBS, ACT, CPU)
    wanted = {"phi": 0.05, "bcq_lambda": 0.75, "target_samples": 10, "act_samples": 100, "batch_size": 100}
    wanted |= {"actor_lr": 1e-3, "critic_lr": 1e-3, "vae_lr": 1e-3, "discount": 0.99, "tau": 0.005}
    wanted |= {"updates": 1_000_000, "normalize_states": False, "normalize_rewards": False}
    assert {name: getattr(config, name) for name in wanted} == wanted
    sizes = {
        name: [weight.shape[1] for weight in network.parameters() if weight.dim() == 2]
        for name, network in {
            "encoder": algorithm.vae.encoder, "decoder": algorithm.vae.decoder, "xi": algorithm.actor
        }.items()
    }
    assert sizes == {
        "encoder": [OBS + ACT, 750, 750], "decoder": [OBS + 2 * ACT, 750, 750], "xi": [OBS + ACT, 400, 400]
    }
    shapes = [layer.weight.shape for layer in algorithm.critic.layers]
    assert shapes == [(2, OBS + ACT, 400), (2, 400, 400), (2, 400, 1)]
    assert algorithm.latents.shape == (100, 2 * ACT)


def test_a_truncation_bootstraps_from_its_last_observation(bcq, minari_root):
    """One episode terminates after a step, one is cut after two: three transitions."""
    ended = episode([[0.1, 0.2, 0.3], [0.4, -0.5, 0.6]], [1.0], terminated=True)
    cut = episode([[1.0, -1.1, 1.2], [1.3, 1.4, -1.5], [-1.6, 1.7, 1.8]], [2.0, 4.0], terminated=False)
    algorithm = make(bcq, discount=0.9, target_samples=2)
    dataset = store("test/bcq/endings-v0", [ended, cut])
    data, _, _ = bcq.load_transitions(dataset, ENVIRONMENT_ACTIONS, algorithm)
    rows = {key: column.numpy().astype(np.float64) for key, column in data.items()}
    after = np.array([[0.4, -0.5, 0.6], [1.3, 1.4, -1.5], [-1.6, 1.7, 1.8]])
    known = {"rewards": [1.0, 2.0, 4.0], "terminations": [1.0, 0.0, 0.0], "next_observations": after}
    (noise,) = normal(9, 6)
    y = target(algorithm, {key: np.array(column) for key, column in known.items()}, noise, 0.75, 0.9, 2)
    assert np.abs(y - rows["rewards"])[1:].min() > 0.05
    assert_close(algorithm.critic_loss(data)[0].item(), summed_errors(weights(algorithm.critic), rows, y))


# --------------------------------------------- runs, learning ---------------------------------------------


def brief(dataset, folder, **fields) -> list[str]:
    return short(dataset, folder, vae_hidden_dim=8, act_samples=5, target_samples=2, **fields)


def test_runs_resume_and_repeat_their_evaluations(bcq, call, pendulum, tmp_path):
    """To the same bits, however often it was evaluated; a finished policy plays its final episodes again."""
    for folder, fields in {"one": {}, "one ": {"updates": 80}, "other": {"updates": 80}}.items():
        status, out, err = call("bcq", *brief(pendulum, tmp_path / folder.strip(), **fields))
        assert status == 0, err
        assert ("resumed at update 40" in out) == (folder == "one ")
    status, _, err = call("bcq", *brief(pendulum, tmp_path / "rare", updates=80, eval_every=80))
    assert status == 0, err
    one, other, rare = (place(tmp_path / name, "bcq", pendulum) for name in ("one", "other", "rare"))
    assert_same_run(one, other)
    often, seldom = (checkpoint(folder) for folder in (one, rare))
    assert equal(often, seldom)

    policy, dataset = bcq.load(one), bcq.load_dataset(pendulum)
    table = pd.read_csv(one / "evaluations.csv").query("phase == 'final'").reset_index(drop=True)
    for _ in range(2):
        environments = bcq.make_environments(dataset, None, 10)
        again = bcq.evaluate(policy.act, environments, 12, (0, 80, 1))
        assert again["return"].tolist() == table["return"].tolist()


def test_held_out_measurement_leaves_no_trace(bcq, batch):
    algorithm = make(bcq)
    before, state = snapshot(algorithm.vae), torch.get_rng_state()
    found = bcq.measure_heldout(algorithm, batch)
    names = {"vae/loss", "vae/kl", "critic/loss", "critic/q_mean", "actor/loss", "actor/support_gap"}
    assert found.keys() == {f"heldout/{name}" for name in names}
    assert torch.equal(state, torch.get_rng_state())
    assert same(algorithm.vae, before)


@pytest.fixture(scope="module")
def corridor(minari_root):
    """Wanders in steps of all lengths; latents within one half are decoded to the shorter ones alone."""
    return store_corridor("test/corridor/bcq-v0", [walk(seed, shortest=0.0) for seed in range(400)])


CORRIDOR = {"vae_hidden_dim": 32, "vae_lr": 3e-3, "act_samples": 20}


def test_reaches_the_optimum_where_imitation_goes_nowhere(scripts, corridor):
    """The optimum takes steps of full length, so phi is wide here. Two seeds of three reach it; xi climbs to
    the nearest peak, which for one is the trapdoor."""
    assert learn(scripts["bc"], corridor, 0, 500) < 4 * OPTIMUM
    found = sorted(learn(scripts["bcq"], corridor, seed, 600, **CORRIDOR, phi=1.0) for seed in range(3))
    assert found[1] >= OPTIMUM - 0.5
    assert found[0] >= TRAPPED - 1.5


def test_with_a_small_phi_it_takes_no_longer_steps_than_its_samples(scripts, corridor):
    """A step to the door is at most the largest sample and phi: it cannot be reached in OPTIMUM."""
    assert learn(scripts["bcq"], corridor, 0, 600, **CORRIDOR, phi=0.05) < OPTIMUM - 2
