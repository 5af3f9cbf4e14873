"""Diffusion Policy: schedule, loss, sampler and average against NumPy, from the paper; chunks and plans."""

import math

import numpy as np
import pytest
import torch
from conftest import load_script, new_learner
from oracles import ACT, ACTIONS, OBS, assert_close, assert_loss_and_gradient, episode, read, weights
from test_diffusion_ql import noise_in

dp = load_script("offline/diffusion_policy.py")


def make(**fields):
    """A small one with To = 2, Tp = 4, Ta = 2 and fixed weights; the average's differ from the actor's."""
    small = {"hidden_dim": 4, "hidden_layers": 2, "horizon": 4, "act_horizon": 2, "diffusion_steps": 6}
    learner = new_learner(dp, dp.Config(**{**small, "act_stride": 2, **fields}), OBS, ACT)
    rng = np.random.default_rng(13)
    for network in (learner.actor, learner.ema_actor):
        for weight in network.parameters():
            weight.data = torch.tensor(rng.normal(scale=0.5, size=weight.shape), dtype=torch.float32)
    return learner


def chunk(rows: int = 3) -> dict[str, torch.Tensor]:
    """A batch for `make`."""
    rng = np.random.default_rng(5)
    draws = {"observations": rng.normal(size=(rows, 2, OBS)), "actions": rng.uniform(-1, 1, (rows, 4, ACT))}
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in draws.items()}


def alpha_bars(steps: int) -> list[float]:
    """abar_0 to abar_T as the paper on the squared cosine schedule has them, one after the other."""
    found = [1.0]
    for k in range(1, steps + 1):
        now, before = (math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in (k, k - 1))
        found.append(found[-1] * (1 - min(1 - now / before, 0.999)))
    return found


# ------------------------------------------- schedule and loss -------------------------------------------


@pytest.mark.equation(1)
def test_noise_schedule_of_the_facts():
    table = dp.squared_cosine_schedule(100).double().numpy()
    assert table.shape == (101,)
    assert table[0] == 1
    np.testing.assert_allclose(table[[1, 50]], [0.9993687, 0.4938436], rtol=0, atol=6e-8)  # as rounded there
    assert table[100] == pytest.approx(2.42857e-7, rel=3e-6)
    assert 1 - table[1] == pytest.approx(6.3128e-4, abs=6e-8)
    assert 1 - table[100] / table[99] == pytest.approx(0.999, abs=1e-8)
    np.testing.assert_allclose(table, alpha_bars(100), rtol=6e-8, atol=0)  # float32's next neighbours
    np.testing.assert_allclose(make().alpha_bar, alpha_bars(6), rtol=1e-7)


@pytest.mark.equation(2, 3)
def test_actor_loss():
    learner, batch = make(), chunk()
    seen, plans = (batch[name].double().numpy().reshape(3, -1) for name in ("observations", "actions"))
    torch.manual_seed(4)
    steps, noise = torch.randint(1, 7, (3,)).numpy(), torch.randn(3, 4 * ACT).double().numpy()
    assert len({*steps}) > 1
    alpha_bar = np.array(alpha_bars(6))[steps][:, None]
    noisy = np.sqrt(alpha_bar) * plans + np.sqrt(1 - alpha_bar) * noise

    def oracle(layers):
        return np.mean((noise - noise_in(layers, seen, noisy, steps)) ** 2)

    torch.manual_seed(4)
    loss, metrics = learner.actor_loss(batch)
    assert_loss_and_gradient(loss, learner.actor, oracle, [learner.ema_actor])
    assert metrics["actor/loss"].item() == loss.item()


@pytest.mark.equation(2)
def test_every_step_of_the_noise_is_drawn(monkeypatch):
    learner, seen = make(), []
    monkeypatch.setattr(learner.actor, "forward", lambda o, x, steps: seen.extend(steps.tolist()) or x)
    learner.actor_loss(chunk(6000))
    counts = np.bincount(seen, minlength=7)
    assert len(counts) == 7
    assert counts[0] == 0
    assert (np.abs(counts[1:] - 1000) < 150).all()


# ------------------------------------------------ sampling ------------------------------------------------


def predictions(layers, seen, x, k: int, clip: bool = True) -> np.ndarray:
    """x_0 as the predicted noise has it."""
    now = alpha_bars(6)[k]
    clean = (x - np.sqrt(1 - now) * noise_in(layers, seen, x, [k])) / np.sqrt(now)
    return np.clip(clean, -1, 1) if clip else clean


def draws(count: int, steps: int) -> list[np.ndarray]:
    """What the sampler draws next: x_T, then z in each of the steps."""
    return [torch.randn(count, 4 * ACT).double().numpy() for _ in range(steps + 1)]


@pytest.mark.equation(5, 6)
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sampling(stride, eta):
    """DDIM's steps with its sigma; the noise that is left is what the clipped x_0 leaves."""
    learner, observations = make(act_stride=stride, act_noise=eta), chunk(5)["observations"]
    seen, bars, clipped = observations.double().numpy().reshape(5, -1), alpha_bars(6), []
    steps = {1: [6, 5, 4, 3, 2, 1], 2: [5, 3, 1], 4: [5, 1]}[stride]
    torch.manual_seed(6)
    x, *noises = draws(5, len(steps))
    for k, j, z in zip(steps, [*steps[1:], 0], noises):
        now, after = bars[k], bars[j]
        clean = predictions(weights(learner.ema_actor), seen, x, k)
        clipped.append((np.abs(clean) == 1).mean())
        sigma = eta * np.sqrt((1 - after) / (1 - now)) * np.sqrt(1 - now / after)
        left = (x - np.sqrt(now) * clean) / np.sqrt(1 - now)
        x = np.sqrt(after) * clean + np.sqrt(1 - after - sigma**2) * left + sigma * z
    assert 0 < np.mean(clipped) < 1
    torch.manual_seed(6)
    with torch.no_grad():
        found = learner.sample(observations)
    assert found.shape == (5, 4, ACT)
    assert_close(found.reshape(5, -1).numpy(), x, 1e-4)


@pytest.mark.equation(6)
def test_with_all_steps_and_noise_it_is_ddpm():
    """Mean and variance of q(x_{k-1} | x_k, x_0) by Bayes: a likelihood and a prior, both normal."""
    learner, observations = make(act_stride=1, act_noise=1.0), chunk(5)["observations"]
    seen, bars = observations.double().numpy().reshape(5, -1), alpha_bars(6)
    torch.manual_seed(6)
    x, *noises = draws(5, 6)
    for k, z in zip(range(6, 0, -1), noises):
        clean, alpha = predictions(weights(learner.ema_actor), seen, x, k), bars[k] / bars[k - 1]
        if k > 1:
            precision = alpha / (1 - alpha) + 1 / (1 - bars[k - 1])
            pull = np.sqrt(alpha) * x / (1 - alpha) + np.sqrt(bars[k - 1]) * clean / (1 - bars[k - 1])
            x = (pull + np.sqrt(precision) * z) / precision
    torch.manual_seed(6)
    with torch.no_grad():
        assert_close(learner.sample(observations).reshape(5, -1).numpy(), clean, 1e-4)


@pytest.mark.equation(2, 5, 6)
@pytest.mark.parametrize(("stride", "eta"), [(1, 1.0), (1, 0.0), (10, 0.0), (7, 0.5), (200, 0.0)])
def test_an_actor_that_knows_the_noise_gives_the_plan_back(stride, eta):
    learner = make(diffusion_steps=100, act_stride=stride, act_noise=eta)
    plan = torch.linspace(-0.9, 0.9, 4 * ACT)

    def perfect(observations, noisy, step):
        alpha_bar = learner.alpha_bar[step].unsqueeze(-1)
        return (noisy - alpha_bar.sqrt() * plan) / (1 - alpha_bar).sqrt()

    learner.ema_actor.forward = perfect
    found = learner.sample(torch.zeros(50, 2, OBS)).flatten(1)
    np.testing.assert_allclose(found, plan.expand(50, -1), atol=2e-4)


# ------------------------------------------------ updates ------------------------------------------------


@pytest.mark.equation(4)
def test_the_average_warms_up():
    """In the first update it becomes the actor, in the second it keeps 1 - 2^-0.75; at last 0.9999."""
    learner, batch = make(actor_lr=0.1, warmup_updates=1, updates=10**7), chunk()
    wanted = weights(learner.ema_actor)
    for decay in (0.0, 0.40539644, 0.56130873, 0.64644661):  # the facts' 1 - (1 + s)^-0.75
        learner.update(batch)
        wanted = [decay * old + (1 - decay) * new for old, new in zip(wanted, weights(learner.actor))]
        assert_close(weights(learner.ema_actor), wanted, 1e-5)
    learner.updates = 10**6
    learner.update(batch)
    wanted = [0.9999 * old + 0.0001 * new for old, new in zip(wanted, weights(learner.actor))]
    assert_close(weights(learner.ema_actor), wanted, 1e-5)
    assert learner.updates == 10**6 + 1


def test_the_average_acts_and_the_actor_is_trained():
    learner, batch = make(), chunk()
    torch.manual_seed(0)
    before = learner.sample(batch["observations"])
    for weight in learner.actor.parameters():
        weight.data.zero_()
    torch.manual_seed(0)
    assert torch.equal(learner.sample(batch["observations"]), before)
    assert learner.actor_loss(batch)[0].item() == pytest.approx(1, abs=0.5)  # the noise's own square


def test_the_step_size_warms_up_and_falls_along_a_cosine():
    learner, rates = make(actor_lr=1e-3, warmup_updates=4, updates=12), []
    for _ in range(12):
        rates.append(learner.actor_optimizer.param_groups[0]["lr"])
        learner.update(chunk())
    cosine = [(1 + math.cos(math.pi * update / 12)) / 2 for update in range(12)]
    warm = [0.25, 0.5, 0.75, *[1.0] * 9]
    assert rates == pytest.approx([1e-3 * share * factor for share, factor in zip(warm, cosine)])
    assert learner.actor_optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_defaults_are_the_papers():
    """But for the network, an MLP, and the steps of a plan, which DDIM makes in 10."""
    config = dp.Config()
    wanted = {"context": 2, "horizon": 16, "act_horizon": 8, "diffusion_steps": 100, "batch_size": 256}
    wanted |= {"actor_lr": 1e-4, "weight_decay": 1e-6, "warmup_updates": 500}
    wanted |= {"act_stride": 10, "act_noise": 0.0}
    assert {field: getattr(config, field) for field in wanted} == wanted
    learner = new_learner(dp, config, OBS, ACT)
    assert learner.actor_optimizer.param_groups[0]["betas"] == (0.95, 0.999)
    kinds = {type(part) for part in learner.actor.net}
    assert kinds == {torch.nn.Linear, torch.nn.Mish}


# ------------------------------------------------- chunks -------------------------------------------------

LENGTHS = (3, 1, 6)


@pytest.fixture(scope="module")
def recorded(minari_root) -> list[dict[str, np.ndarray]]:
    """Three episodes whose observations are (episode, step, 7) and whose actions alternate."""
    parts = []
    for number, length in enumerate(LENGTHS):
        observations = [[number, step, 7.0] for step in range(length + 1)]
        parts.append(episode(observations, [0.0] * length, terminated=number == 0))
    return read(dp, "test/diffusion_policy/pieces-v0", parts)


@pytest.mark.equation(2)
def test_chunks_repeat_the_ends_of_their_episode(recorded):
    """Each of the ten steps may be t, the last ones too."""
    scaler = dp.Scaler(np.zeros(OBS), np.ones(OBS), ACTIONS.low, ACTIONS.high)
    data = dp.bounded_steps(recorded, scaler)
    batch = dp.chunks(data, torch.arange(10), dp.Config(context=3, horizon=5, act_horizon=3))
    row = 0
    for number, length in enumerate(LENGTHS):
        for t in range(length):
            steps = [min(max(step, 0), length - 1) for step in (t - 2, t - 1, t, t + 1, t + 2)]
            assert batch["observations"][row].tolist() == [[number, step, 7] for step in steps[:3]]
            actions = np.clip(recorded[number]["actions"][steps] / 2, -1, 1)
            np.testing.assert_allclose(batch["actions"][row], actions, atol=1e-6)
            row += 1
    assert row == len(data["actions"]) == 10


def test_observations_are_scaled_by_their_extremes_and_actions_by_their_bounds(recorded):
    scaler = dp.fit_extremes(recorded, ACTIONS)
    raw = np.concatenate([part["observations"][:-1] for part in recorded])
    scaled = scaler.scale_observations(raw).numpy()
    assert scaled.min(0).tolist() == [-1, -1, 0]  # the third never changes
    assert scaled.max(0).tolist() == [1, 1, 0]
    np.testing.assert_allclose(scaled[:, 0], raw[:, 0] - 1)
    np.testing.assert_allclose(scaled * scaler.std.numpy() + scaler.mean.numpy(), raw, atol=1e-6)
    assert (scaler.low.tolist(), scaler.high.tolist()) == ([-2, -2], [2, 2])  # though the data begin at -1


# ------------------------------------------------- acting -------------------------------------------------


def numbered(learner) -> list[torch.Tensor]:
    """Lets plan number n of the learner consist of n + 0, 0.01, ..., 0.15; the observations asked for."""
    asked = []

    def sample(observations):
        asked.append(observations.clone())
        plan = len(asked) + torch.arange(learner.config.horizon) / 100
        return plan[:, None].expand(len(observations), -1, ACT)

    learner.sample = sample
    return asked


@pytest.mark.equation(7)
def test_of_a_plan_the_facts_slice_is_executed():
    """Entries 1 to 8 of 16, then those of the next plan; in an episode's first plan o_1 stands for o_0."""
    learner = new_learner(dp, dp.Config(hidden_dim=4), OBS, ACT)
    asked, observation = numbered(learner), np.zeros((2, OBS), np.float32)
    rewards = [None] + [np.zeros(2)] * 19
    found = [learner.act(observation + step, reward)[:, 0] for step, reward in enumerate(rewards)]
    plans = np.repeat([1, 2, 3], 8)[:20] + (1 + np.arange(20) % 8) / 100
    np.testing.assert_allclose(found, np.stack([plans, plans], 1), atol=1e-6)
    seen = [asked_for[0, :, 0].tolist() for asked_for in asked]
    assert seen == [[0, 0], [7, 8], [15, 16]]


@pytest.mark.equation(7)
def test_each_environment_has_its_own_plan_and_its_own_beginning():
    learner, nan = make(context=3, horizon=6, act_horizon=3), math.nan
    asked, found = numbered(learner), []
    rewards = [None, [1, nan], [1, 1], [1, 1], [nan, 1], [1, 1], [1, 1], [nan, nan]]
    for step, reward in enumerate(rewards):
        observations = np.array([[step] * OBS, [100 + step] * OBS])
        found.append(learner.act(observations, reward)[:, 0].tolist())
    wanted = [(1.02, 1.02), (1.03, 2.02), (1.04, 2.03), (3.02, 2.04), (4.02, 4.02), (4.03, 4.03)]
    np.testing.assert_allclose(found, [*wanted, (4.04, 4.04), (5.02, 5.02)], atol=1e-6)
    seen = [[row[:, 0].tolist() for row in observations] for observations in asked]
    assert seen[0] == [[0, 0, 0], [100, 100, 100]]
    assert seen[1] == [[101, 101, 101]]
    assert seen[2] == [[1, 2, 3]]
    assert seen[3] == [[4, 4, 4], [102, 103, 104]]  # one begins, the other's plan is done
    assert seen[4] == [[7, 7, 7], [107, 107, 107]]


def test_one_observation_or_a_batch_and_in_the_environments_units():
    learner, observations = make(), np.random.default_rng(0).normal(size=(5, 3, OBS))
    learner.scaler = dp.Scaler([0.1, 0.2, 0.3], [1, 2, 0.5], [-2, 0], [2, 10])
    learner.sample = lambda seen: torch.tanh(seen.flatten(1)[:, :1, None] + torch.arange(8).view(4, 2))
    batch = [learner.act(rows, np.zeros(3) if step else None) for step, rows in enumerate(observations)]
    for row in range(3):
        for step in range(5):
            alone = learner.act(observations[step, row], 0.0 if step else None)
            assert alone.shape == (ACT,)
            np.testing.assert_allclose(alone, batch[step][row], atol=1e-6)
    first = np.tanh((observations[0, :, :1] - 0.1) + [2, 3])
    np.testing.assert_allclose(batch[0], [-2, 0] + (first + 1) / 2 * [4, 10], atol=1e-5)


def test_a_plan_takes_ten_steps(monkeypatch):
    """However many environments wait for one."""
    learner, calls = new_learner(dp, dp.Config(), 17, 6), []
    forward = learner.ema_actor.forward
    monkeypatch.setattr(learner.ema_actor, "forward", lambda *inputs: calls.append(1) or forward(*inputs))
    for _ in range(5):
        learner.act(np.ones((10, 17), np.float32), None)
    assert len(calls) == 5 * 10


def test_a_horizon_too_short_is_one_line():
    with pytest.raises(dp.UserError, match="horizon: 8 is less than context - 1 \\+ act_horizon = 9"):
        new_learner(dp, dp.Config(horizon=8), OBS, ACT)
    new_learner(dp, dp.Config(horizon=9, hidden_dim=4), OBS, ACT)


# ------------------------------------------------ learning ------------------------------------------------


def test_a_plan_keeps_to_one_of_two_ways_and_plans_take_both():
    """Episodes that go left or right all along: the mean, which imitation by squares learns, is to stand."""
    config = dp.Config(hidden_dim=64, hidden_layers=2, batch_size=128, actor_lr=3e-3, warmup_updates=10,
                       updates=400, horizon=4, act_horizon=3, diffusion_steps=20, act_stride=2)
    torch.manual_seed(0)
    learner, rng = new_learner(dp, config, OBS, ACT), np.random.default_rng(0)
    for _ in range(config.updates):
        way = rng.choice([-0.7, 0.7], size=(128, 1, 1)) + rng.normal(scale=0.03, size=(128, 1, ACT))
        chunk = {"observations": rng.normal(size=(128, 2, OBS)), "actions": np.tile(way, (1, 4, 1))}
        learner.update({name: torch.tensor(x, dtype=torch.float32) for name, x in chunk.items()})
    rewards = [None, np.zeros(300), np.zeros(300)]
    actions = [learner.act(rng.normal(size=(300, OBS)), reward) for reward in rewards]
    right = np.stack(actions) > 0  # [3, 300, A]
    assert (right == right[:1, :, :1]).all((0, 2)).mean() > 0.75  # one way in all entries of a plan
    assert 0.3 < right.mean() < 0.7
    assert np.median(np.abs(actions)) > 0.4
