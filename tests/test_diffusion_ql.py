"""Every loss term of Diffusion-QL, its noise schedule and its sampler against NumPy, from the paper.

That the score is that of the last weights, test_runs.py holds for every script.
"""

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, load_script, new_learner
from oracles import (
    ACT,
    OBS,
    Constant,
    assert_close,
    assert_compiled_is_eager,
    assert_loss_and_gradient,
    bellman,
    fix_weights,
    moved,
    weights,
)

dql = load_script("offline/diffusion_ql.py")
BETA = [0.19587456, 0.45881819, 0.63578102, 0.75487819, 0.83503138]  # of the facts, for T = 5
ALPHA_BAR = [0.80412544, 0.43517806, 0.15850011, 0.03885183, 0.00640933]


def make(**fields):
    """Diffusion-QL with small networks of fixed weights; targets and averages differ from their sources."""
    fields = {"hidden_dim": 4, "hidden_layers": 2, "gradient_norm": 1e9, **fields}
    learner = fix_weights(new_learner(dql, dql.Config(**fields), OBS, ACT))
    rng = np.random.default_rng(13)
    for actor in (learner.actor, learner.ema_actor):
        for weight in actor.parameters():
            weight.data = torch.tensor(rng.normal(scale=0.5, size=weight.shape), dtype=torch.float32)
    return learner


# ------------------------------------- the networks again, in NumPy -------------------------------------


def mish(x: np.ndarray) -> np.ndarray:
    return x * np.tanh(np.log1p(np.exp(x)))


def dense(layers: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """Mish between the layers, none after the last."""
    for number in range(0, len(layers), 2):
        x = x @ layers[number].T + layers[number + 1]
        if number < len(layers) - 2:
            x = mish(x)
    return x


def noise_in(layers: list[np.ndarray], observations, actions, steps) -> np.ndarray:
    """eps_theta, whose steps count from 0: sines and cosines of t at eight rates from 1 to 1 / 10,000."""
    steps = np.broadcast_to(np.asarray(steps, float).reshape(-1, 1), (len(actions), 1))
    angles = steps * np.exp(-np.log(10_000) * np.arange(8) / 7)
    embedded = dense(layers[:4], np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
    return dense(layers[4:], np.concatenate([actions, embedded, observations], axis=1))


def q_values(layers: list[np.ndarray], observations, actions) -> np.ndarray:
    inputs = np.concatenate([observations, actions], axis=1)
    members = [[layer[i].T if layer.shape[1] > 1 else layer[i][0] for layer in layers] for i in range(2)]
    return np.stack([dense(own, inputs)[:, 0] for own in members])


def denoised(layers, observations, noises: list[np.ndarray], alpha_bars: list[float]) -> np.ndarray:
    """x_0 from the sampler's normal draws: by the mean and variance of q(x_{t-1} | x_t, x), clipped x."""
    x, shares = noises[0], []
    for t in range(len(alpha_bars), 0, -1):
        now, before = alpha_bars[t - 1], alpha_bars[t - 2] if t > 1 else 1.0
        alpha = now / before
        clean = (x - np.sqrt(1 - now) * noise_in(layers, observations, x, [t - 1])) / np.sqrt(now)
        shares.append((np.abs(clean) > 1).mean())
        clean = np.minimum(np.maximum(clean, -1), 1)
        if t == 1:
            assert 0 < np.mean(shares) < 1
            return clean
        precision = alpha / (1 - alpha) + 1 / (1 - before)  # Bayes: a likelihood and a prior, both normal
        mean = (np.sqrt(alpha) * x / (1 - alpha) + np.sqrt(before) * clean / (1 - before)) / precision
        x = mean + np.sqrt(1 / precision) * noises[len(alpha_bars) - t + 1]
    raise AssertionError


def draws(count: int, steps: int = 5) -> list[np.ndarray]:
    """What the sampler draws next: x_T, then z in each of the steps, unused in the last."""
    return [torch.randn(count, ACT).numpy().astype(np.float64) for _ in range(steps + 1)]


# ----------------------------------------------- diffusion -----------------------------------------------


@pytest.mark.equation(3)
def test_noise_schedule_of_the_facts():
    beta, alpha_bar = dql.vp_schedule(5)
    np.testing.assert_allclose(beta.double(), BETA, rtol=0, atol=3e-8)  # float32's next neighbours
    np.testing.assert_allclose(alpha_bar.double(), ALPHA_BAR, rtol=0, atol=3e-8)
    learner = make()
    assert torch.equal(learner.beta, beta)
    assert torch.equal(learner.alpha_bar, alpha_bar)


@pytest.mark.equation(6, 7)
@pytest.mark.parametrize("steps", [2, 5])
def test_sampling(rows, steps):
    learner = make(diffusion_steps=steps)
    observations = np.tile(rows["observations"], (4, 1))
    times = np.arange(1, steps + 1) / steps
    alpha_bars = np.exp(-0.1 * times - 4.95 * times**2)
    torch.manual_seed(6)
    wanted = denoised(weights(learner.actor), observations, draws(12, steps), alpha_bars)
    torch.manual_seed(6)
    with torch.no_grad():
        found = learner.sample(learner.actor, torch.tensor(observations, dtype=torch.float32))
    assert_close(found.numpy(), wanted, 1e-4)


@pytest.mark.equation(4, 6, 7)
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_an_actor_that_knows_the_noise_gives_the_action_back(steps):
    """And nothing is clipped on the way, nor drawn in the last step."""
    learner, action = make(diffusion_steps=steps), torch.tensor([[0.3, -0.8]])

    def perfect(observations, noisy, number):
        alpha_bar = learner.alpha_bar[number].unsqueeze(-1)
        return (noisy - alpha_bar.sqrt() * action) / (1 - alpha_bar).sqrt()

    found = learner.sample(perfect, torch.zeros(50, OBS))
    np.testing.assert_allclose(found, action.expand(50, -1), atol=1e-5)


# ------------------------------------------------ losses ------------------------------------------------


@pytest.mark.equation(4, 5, 8)
@pytest.mark.parametrize("eta", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("seed", [4, 5])
def test_actor_loss(batch, rows, eta, seed):
    """At eta = 0 it is imitation. The gradient of Q goes through all of the sampler."""
    learner, observations = make(eta=eta, diffusion_steps=3), rows["observations"]
    alpha_bars = np.exp(-0.1 * np.arange(1, 4) / 3 - 4.95 * (np.arange(1, 4) / 3) ** 2)
    torch.manual_seed(seed)
    steps, noise = torch.randint(3, (3,)).numpy(), torch.randn(3, ACT).numpy().astype(np.float64)
    noises, climbed = draws(3, 3), int(torch.randint(2, ()))
    order = [climbed, 1 - climbed]
    alpha_bar, critic = alpha_bars[steps][:, None], weights(learner.critic)
    noisy = np.sqrt(alpha_bar) * rows["actions"] + np.sqrt(1 - alpha_bar) * noise
    sampled = denoised(weights(learner.actor), observations, noises, alpha_bars)
    size = np.mean(np.abs(q_values(critic, observations, sampled)[order[1]]))

    def oracle(layers):
        imitation = np.mean((noise - noise_in(layers, observations, noisy, steps)) ** 2)
        q = q_values(critic, observations, denoised(layers, observations, noises, alpha_bars))
        return imitation - eta * np.mean(q[order[0]]) / size

    torch.manual_seed(seed)
    loss, metrics = learner.actor_loss(batch)
    assert_loss_and_gradient(loss, learner.actor, oracle, [learner.ema_actor, learner.target_critic])
    if eta == 0:
        assert loss.item() == metrics["actor/imitation"].item()


@pytest.mark.equation(8)
def test_either_critic_guides_and_the_other_gives_the_scale(batch):
    learner, seen = make(), set()
    learner.critic = Constant([[2.0] * 3, [-8.0] * 3])
    for seed in range(20):
        torch.manual_seed(seed)
        loss, metrics = learner.actor_loss(batch)
        seen.add(round((loss - metrics["actor/imitation"]).item(), 4))
    assert seen == {-0.25, 4.0}


@pytest.mark.equation(8)
@pytest.mark.parametrize("scale", [0.5, 3.0, 400.0])
def test_a_constant_q_of_any_size_weighs_one(batch, scale):
    learner = make(eta=1.0)
    learner.critic = Constant([[scale] * 3] * 2)
    loss, metrics = learner.actor_loss(batch)
    assert (loss - metrics["actor/imitation"]).item() == pytest.approx(-1, rel=1e-4)


@pytest.mark.equation(8)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_q_moves_the_actor_through_the_sampler(batch, steps):
    """Where little is clipped; what imitation gives is taken off."""
    learner, found = make(diffusion_steps=steps, eta=1.0), []
    for weight in learner.actor.parameters():
        weight.data.mul_(0.01)
    learner.actor.net[-1].bias.data.zero_()
    learner.alpha_bar = torch.linspace(0.99, 0.9, steps)  # a signal that noise does not drown
    learner.beta = 1 - learner.alpha_bar / torch.cat([torch.ones(1), learner.alpha_bar[:-1]])
    for eta in (0.0, 1.0):
        learner.config.eta = eta
        torch.manual_seed(1)
        loss, _ = learner.actor_loss(batch)
        found.append(torch.autograd.grad(loss, learner.actor.net[-1].weight)[0])
    assert (found[1] - found[0]).abs().max() > 1e-5


@pytest.mark.equation(1, 2)
@pytest.mark.parametrize("samples", [1, 4])
def test_critic_loss(batch, rows, samples):
    """Each critic's largest of the samples, then the smaller of the two: by the average of the actor."""
    learner = make(discount=0.9, target_samples=samples)
    states = np.repeat(rows["next_observations"], samples, axis=0)
    torch.manual_seed(7)
    drawn = denoised(weights(learner.ema_actor), states, draws(3 * samples), ALPHA_BAR)
    q = q_values(weights(learner.target_critic), states, drawn).reshape(2, 3, samples)
    y = bellman(rows, 0.9, np.minimum(*q.max(2)))
    if samples > 1:
        assert np.abs(np.minimum(*q.max(2)) - np.minimum(*q).max(1)).max() > 1e-3

    def oracle(layers):
        q1, q2 = q_values(layers, rows["observations"], rows["actions"])
        return np.mean((q1 - y) ** 2) + np.mean((q2 - y) ** 2)

    torch.manual_seed(7)
    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.ema_actor, learner.target_critic]
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    q = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(q.mean(), rel=1e-4)


def test_a_truncation_bootstraps_and_a_termination_does_not(batch):
    """The last row of the batch was cut by a time limit, the second terminated."""
    learner = make(discount=1.0)
    learner.critic, learner.target_critic = Constant([[0.0] * 3] * 2), Constant([[5.0] * 3] * 2)
    rewards = np.array([1.5 + 5, -2.0, 0.25 + 5])
    assert learner.critic_loss(batch)[0].item() == pytest.approx(2 * np.mean(rewards**2))


# -------------------------------------------------- acting --------------------------------------------------


@pytest.mark.equation(10)
def test_acts_by_a_sample_of_the_actor_in_proportion_to_exp_q(rows):
    """Not of the actor's average; with the smaller of the target critics, in the environment's units."""
    learner = make(act_samples=3)
    learner.scaler.low, learner.scaler.high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])
    learner.scaler.mean, learner.scaler.std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 0.5])
    torch.manual_seed(3)
    standard = (rows["observations"][0] - [0.1, 0.2, 0.3]) / [1.0, 2.0, 0.5]
    drawn = denoised(weights(learner.actor), np.tile(standard, (3, 1)), draws(3), ALPHA_BAR)
    wanted = np.array([-2.0, 0.0]) + (drawn + 1) / 2 * np.array([4.0, 10.0])
    torch.manual_seed(3)
    found = learner.act(rows["observations"][0])
    assert np.abs(wanted - found).max(1).min() < 1e-3

    learner = make(act_samples=3)
    learner.target_critic = Constant([[0.0, np.log(2.0), 9.0] * 1000, [9.0, 9.0, 0.0] * 1000])
    marked = torch.tensor([[0.0], [0.5], [1.0]]).expand(-1, ACT).repeat(1000, 1)
    learner.sample = lambda actor, observations: marked
    counts = np.unique(learner.act(np.zeros((1000, OBS), np.float32))[:, 0], return_counts=True)
    assert counts[0].tolist() == [0.0, 0.5, 1.0]
    np.testing.assert_allclose(counts[1] / 1000, [0.25, 0.5, 0.25], atol=0.06)


# -------------------------------------------------- update --------------------------------------------------


@pytest.mark.equation(9)
def test_averages(batch):
    """The target in every update, the actor's average in every other one here, from the first on."""
    learner = make(ema_every=2, actor_tau=0.2, tau=0.1, actor_lr=0.1, critic_lr=0.1)
    target, average = weights(learner.target_critic), weights(learner.ema_actor)
    for update in range(1, 5):
        learner.update(batch)
        target = [0.9 * old + 0.1 * new for old, new in zip(target, weights(learner.critic))]
        if update % 2 == 0:
            average = [0.8 * old + 0.2 * new for old, new in zip(average, weights(learner.actor))]
        assert_close(weights(learner.target_critic), target, 1e-5)
        assert_close(weights(learner.ema_actor), average, 1e-5)


@pytest.mark.parametrize("longest", [1e-3, 1e6])
def test_longer_gradients_are_cut(batch, longest):
    learner = make(gradient_norm=longest)
    free = make(gradient_norm=1e9)
    for each in (learner, free):
        torch.manual_seed(1)
        each.update(batch)
    for name in ("actor", "critic"):
        lengths = []
        for each in (learner, free):
            parts = [weight.grad.square().sum() for weight in getattr(each, name).parameters()]
            lengths.append(float(sum(parts)) ** 0.5)
        if name == "critic" or longest > 1:  # the actor's is that of another critic
            assert lengths[0] == pytest.approx(min(longest, lengths[1]), rel=1e-3)
        assert lengths[0] <= longest * 1.001


@pytest.mark.equation(9)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    twins = [make(tau=0.1, diffusion_steps=2, hidden_layers=1) for _ in range(2)]
    assert_compiled_is_eager(dql, twins, batch)


@pytest.mark.parametrize("network", ["actor", "critic"])
def test_an_optimiser_moves_its_own_network_only(batch, network):
    rates = {f"{name}_lr": 0.01 * (name == network) for name in ("actor", "critic")}
    assert moved(make(tau=0.0, actor_tau=0.0, **rates), batch, 2) == [network]


def test_defaults_are_the_papers():
    """But for N, which is smaller; the length of gradients differs by dataset."""
    config = dql.Config()
    wanted = {"updates": 2_000_000, "batch_size": 256, "hidden_dim": 256, "hidden_layers": 3, "tau": 0.005}
    wanted |= {"actor_lr": 3e-4, "critic_lr": 3e-4, "discount": 0.99, "eta": 1.0, "diffusion_steps": 5}
    wanted |= {"actor_tau": 0.005, "ema_every": 5, "target_samples": 1, "act_samples": 32}
    assert {field: getattr(config, field) for field in wanted} == wanted


def test_configs_have_the_papers_step_sizes_and_lengths():
    """A smaller step size is the actor's alone; each body's data have their own longest gradient."""
    folder = ROOT / "configs/offline/diffusion_ql"
    files = folder.rglob("*.yaml")
    values = {str(path.relative_to(folder)): yaml.safe_load(path.read_text()) for path in files}
    adroit = [name for name in values if name.startswith("D4RL/") and "pointmaze" not in name]
    assert {(values[name]["actor_lr"], values[name]["updates"]) for name in adroit} == {(3e-5, 1_000_000)}
    assert not [name for name in values if "critic_lr" in values[name]]
    wanted = {"halfcheetah": (9, 2, 7), "hopper": (9, 4, 5), "walker2d": (1, 4, 5)}
    for body, lengths in wanted.items():
        for kind, length in zip(("medium", "medium-replay", "medium-expert"), lengths):
            assert dql.Config(**values[f"reef/{body}/{kind}-v1.yaml"]).gradient_norm == length
