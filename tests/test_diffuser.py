"""Diffuser: schedule, losses, guide, sampler and averages against NumPy, from the paper; data and plans."""

import math

import numpy as np
import pytest
import torch
from conftest import load_script, new_learner
from oracles import ACT, ACTIONS, OBS, assert_close, episode, read, snapshot

diffuser = load_script("offline/diffuser.py")
WIDTH, HORIZON, DIFFUSION_STEPS = ACT + OBS, 4, 6


def make(**fields):
    """A small one with fixed weights; the averages' differ from the networks'."""
    small = {"hidden_dim": 4, "levels": 2, "horizon": HORIZON, "diffusion_steps": DIFFUSION_STEPS}
    small |= {"act_samples": 3, "act_horizon": 2}
    learner = new_learner(diffuser, diffuser.Config(**{**small, **fields}), OBS, ACT)
    rng = np.random.default_rng(13)
    for network in (learner.actor, learner.ema_actor, learner.value, learner.ema_value):
        for weight in network.parameters():
            weight.data = torch.tensor(rng.normal(scale=0.4, size=weight.shape), dtype=torch.float32)
    return learner


def batch_of(rows: int = 3) -> dict[str, torch.Tensor]:
    """Actions, observations and returns for `make`, and as `plans` the former side by side."""
    rng = np.random.default_rng(5)
    plans = torch.tensor(rng.normal(size=(rows, HORIZON, WIDTH)), dtype=torch.float32)
    returns = torch.tensor(rng.normal(size=rows), dtype=torch.float32)
    return {"plans": plans, "actions": plans[..., :ACT], "observations": plans[..., ACT:], "returns": returns}


# --------------------------------------- the networks, in NumPy ---------------------------------------


def mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def convolved(weights, name, x, stride=1):
    """[B, inputs, L] -> [B, outputs, L / stride], zeros beyond the ends."""
    kernel = weights[f"{name}.weight"]  # [outputs, inputs, K]
    half = kernel.shape[2] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (half, half)))
    starts = range(0, x.shape[2], stride)
    columns = [np.einsum("bik,oik->bo", padded[:, :, s : s + kernel.shape[2]], kernel) for s in starts]
    return np.stack(columns, 2) + weights[f"{name}.bias"][:, None]


def doubled(weights, name, x):
    """The transposed convolution with kernel 4, stride 2: each input adds to four outputs."""
    kernel = weights[f"{name}.weight"]  # [inputs, outputs, 4]
    full = np.zeros((len(x), kernel.shape[1], 2 * x.shape[2] + 2))
    for start in range(x.shape[2]):
        full[:, :, 2 * start : 2 * start + 4] += np.einsum("bi,iok->bok", x[:, :, start], kernel)
    return full[:, :, 1:-1] + weights[f"{name}.bias"][:, None]


def convolution(weights, name, x):
    """Kernel 5, GroupNorm, Mish."""
    x = convolved(weights, f"{name}.0", x)
    groups = x.reshape(len(x), math.gcd(8, x.shape[1]), -1)
    scaled = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-5)
    scaled = scaled.reshape(x.shape) * weights[f"{name}.1.weight"][:, None]
    return mish(scaled + weights[f"{name}.1.bias"][:, None])


def level(weights, name, x, step):
    for block in (f"{name}.first", f"{name}.second"):
        skip = convolved(weights, f"{block}.skip", x) if f"{block}.skip.weight" in weights else x
        between = linear(weights, f"{block}.embed", step)[:, :, None]
        inner = convolution(weights, f"{block}.first", x) + between
        x = convolution(weights, f"{block}.second", inner) + skip
    return x


def embedded(weights, steps):
    angles = np.asarray(steps)[:, None] * 10_000 ** (-np.arange(8) / 7)
    x = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    return mish(linear(weights, "embed_step.net.2", mish(linear(weights, "embed_step.net.0", x))))


def numbers(network) -> dict[str, np.ndarray]:
    return {name: weight.double().numpy() for name, weight in network.state_dict().items()}


def predicted(network, plans, steps) -> np.ndarray:
    """tau_theta of two levels."""
    weights = numbers(network)
    step, x = embedded(weights, steps), plans.swapaxes(1, 2)
    x = convolved(weights, "shrink.0", level(weights, "down.0", x, step), 2)
    skip = level(weights, "down.1", x, step)
    x = np.concatenate([level(weights, "middle", skip, step), skip], 1)
    x = doubled(weights, "grow.0", level(weights, "up.0", x, step))
    return convolved(weights, "head.1", convolution(weights, "head.0", x)).swapaxes(1, 2)


def valued(network, plans, steps) -> np.ndarray:
    """J_phi of two levels."""
    weights = numbers(network)
    step, x = embedded(weights, steps), plans.swapaxes(1, 2)
    for number in range(2):
        x = convolved(weights, f"shrink.{number}", level(weights, f"down.{number}", x, step), 2)
    x = np.concatenate([x.reshape(len(x), -1), step], 1)
    return linear(weights, "head.2", mish(linear(weights, "head.0", x)))[:, 0]


def climbed(network, plans, steps) -> np.ndarray:
    """The gradient of J_phi in each entry of the plans, by central differences."""
    slope = np.empty_like(plans)
    for index in np.ndindex(plans.shape[1:]):
        change = np.zeros(plans.shape[1:])
        change[index] = 1e-5
        ahead, behind = (valued(network, plans + sign * change, steps) for sign in (1, -1))
        slope[:, *index] = (ahead - behind) / 2e-5
    return slope


# ------------------------------------------ schedule and losses ------------------------------------------


def alpha_bars(steps: int) -> np.ndarray:
    """abar_0 to abar_T as in the authors' table: T + 1 points of [0, T + 1], which are no integers."""
    points = np.linspace(0, steps + 1, steps + 1)
    signal = np.cos((points / (steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.clip(1 - signal[1:] / signal[:-1], 0, 0.999)
    return np.concatenate([[1], np.cumprod(1 - beta)])


@pytest.mark.equation(1)
def test_noise_schedule_of_the_facts():
    table = diffuser.squared_cosine_schedule(20).double().numpy()
    assert table.shape == (21,)
    assert (table[0], table[1]) == (1, pytest.approx(0.99200728, abs=6e-8))
    assert table[20] == pytest.approx(6.05964e-6, rel=1e-6)
    assert 1 - table[1] == pytest.approx(0.00799272, abs=6e-8)
    assert 1 - table[20] / table[19] == pytest.approx(0.999, abs=1e-7)
    np.testing.assert_allclose(table, alpha_bars(20), rtol=1e-7)
    np.testing.assert_allclose(make().alpha_bar, alpha_bars(DIFFUSION_STEPS), rtol=1e-7)


def drawn(plans: np.ndarray, seed: int):
    """tau^i as `add_noise` draws it after this seed, and i."""
    torch.manual_seed(seed)
    steps = torch.randint(1, DIFFUSION_STEPS + 1, (len(plans),)).numpy()
    noise = torch.randn(plans.shape).double().numpy()
    bars = alpha_bars(DIFFUSION_STEPS)[steps][:, None, None]
    noisy = np.sqrt(bars) * plans + np.sqrt(1 - bars) * noise
    noisy[:, 0, ACT:] = plans[:, 0, ACT:]
    torch.manual_seed(seed)
    return noisy, steps


@pytest.mark.equation(2, 3)
def test_actor_loss():
    learner, batch = make(), batch_of()
    plans = batch["plans"].double().numpy()
    noisy, steps = drawn(plans, 4)
    assert len({*steps}) > 1
    errors = (predicted(learner.actor, noisy, steps) - plans) ** 2
    weight = np.ones((HORIZON, WIDTH))
    weight[0] = [10, 10, 0, 0, 0]  # a_t's two entries, then s_t's, which are given
    loss, metrics = learner.actor_loss(batch)
    assert_close(loss.item(), np.mean(weight * errors), 1e-5)
    assert metrics["actor/loss"].item() == loss.item()


@pytest.mark.equation(2, 5)
def test_value_loss():
    learner, batch = make(), batch_of()
    noisy, steps = drawn(batch["plans"].double().numpy(), 8)
    errors = valued(learner.value, noisy, steps) - batch["returns"].double().numpy()
    loss, metrics = learner.value_loss(batch)
    assert_close(loss.item(), np.mean(errors**2), 1e-5)
    assert metrics["value/loss"].item() == loss.item()


@pytest.mark.equation(2)
def test_without_noise_a_plan_shrinks_and_every_step_is_drawn(monkeypatch):
    learner, batch = make(), batch_of(6000)
    plans = batch["plans"].clone()
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    noisy, steps = learner.add_noise(batch["plans"])
    counts = np.bincount(steps, minlength=DIFFUSION_STEPS + 1)
    assert counts[0] == 0
    assert len(counts) == DIFFUSION_STEPS + 1
    assert (np.abs(counts[1:] - 1000) < 150).all()
    shrunk = np.sqrt(alpha_bars(DIFFUSION_STEPS))[steps][:, None, None] * plans.numpy()
    shrunk[:, 0, ACT:] = plans[:, 0, ACT:]
    np.testing.assert_allclose(noisy, shrunk, atol=1e-6)
    assert torch.equal(batch["plans"], plans)  # the batch itself stays as it is


@pytest.mark.equation(6)
def test_the_averages_move_every_ten_updates_from_the_first_on():
    learner, batch = make(), batch_of()
    pairs = [(learner.ema_actor, learner.actor), (learner.ema_value, learner.value)]
    old = [snapshot(average) for average, _ in pairs]
    for update in range(1, 11):
        before = [snapshot(network) for _, network in pairs]
        learner.update(batch)
        assert not any(torch.equal(a[0], snapshot(network)[0]) for a, (_, network) in zip(before, pairs))
        for (average, network), kept in zip(pairs, old):
            wanted = kept
            if update == 10:
                wanted = [0.995 * a + 0.005 * b for a, b in zip(kept, snapshot(network))]
            for found, each in zip(snapshot(average), wanted):
                torch.testing.assert_close(found, each, atol=1e-7, rtol=1e-6)
    assert learner.updates == 10


# ------------------------------------------------ sampling ------------------------------------------------


@pytest.mark.equation(7)
def test_slope_of_the_value():
    learner, batch, steps = make(), batch_of(), np.array([1, 4, 6])
    with torch.no_grad():
        found = learner.slope(batch["plans"], torch.tensor(steps))
    assert_close(found.numpy(), climbed(learner.ema_value, batch["plans"].double().numpy(), steps), 1e-4)


@pytest.mark.equation(7, 8)
def test_sampling():
    """Mean and variance of q(tau^{i-1} | tau^i, x) by Bayes: a likelihood and a prior, both normal."""
    learner, states = make(guide_stop=3, guide_scale=2.0), batch_of(2)["plans"][:, 0, ACT:]
    start, bars = states.double().numpy(), alpha_bars(DIFFUSION_STEPS)

    def begin(plans):
        plans[:, 0, ACT:] = start
        return plans

    torch.manual_seed(6)
    size = (2, HORIZON, WIDTH)
    x, *noises = (torch.randn(size).double().numpy() for _ in range(DIFFUSION_STEPS + 1))
    x = begin(x)
    for i, z in zip(range(DIFFUSION_STEPS, 0, -1), noises):
        alpha, steps = bars[i] / bars[i - 1], [i, i]
        # with i = 1 nothing is left of the noise
        variance = 0 if i == 1 else 1 / (alpha / (1 - alpha) + 1 / (1 - bars[i - 1]))
        for _ in range(2 if i > 3 else 0):
            x = begin(x + 2.0 * variance * climbed(learner.ema_value, x, steps))
        clean = predicted(learner.ema_actor, x, steps)
        mean = clean
        if i > 1:
            pull = np.sqrt(alpha) * x / (1 - alpha) + np.sqrt(bars[i - 1]) * clean / (1 - bars[i - 1])
            mean = variance * pull
        x = begin(mean + np.sqrt(variance) * z)
    torch.manual_seed(6)
    with torch.no_grad():
        found = learner.sample(states).numpy()
    assert_close(found, x, 1e-3)
    np.testing.assert_array_equal(found[:, 0, ACT:], states)


def test_perfect_predictions_come_out_exactly_and_each_step_begins_at_the_state(monkeypatch):
    learner, batch, seen = make(guide_steps=0), batch_of(1), []

    def perfect(plans, steps):
        seen.append(plans[:, 0, ACT:].clone())
        return batch["plans"].expand(len(plans), -1, -1)

    monkeypatch.setattr(learner.ema_actor, "forward", perfect)
    states = batch["plans"][:, 0, ACT:].repeat(20, 1)
    found = learner.sample(states)
    np.testing.assert_allclose(found, batch["plans"].expand(20, -1, -1), atol=1e-6)
    assert len(seen) == DIFFUSION_STEPS
    assert all(torch.equal(each, states) for each in seen)


def test_a_guide_that_is_constant_does_not_guide():
    constant, unguided, guided = make(guide_scale=5.0), make(guide_steps=0), make(guide_scale=5.0)
    for weight in constant.ema_value.head[2].parameters():
        weight.data.zero_()
    plans = []
    for learner in (constant, unguided, guided):
        torch.manual_seed(0)
        plans.append(learner.sample(torch.zeros(2, OBS)))
    assert torch.equal(plans[0], plans[1])
    assert not torch.allclose(plans[1], plans[2], atol=1e-3)


def test_the_averages_plan():
    """The networks in training have no part in it; nor does planning leave gradients."""
    learner, states = make(), torch.ones(2, OBS)
    torch.manual_seed(0)
    before = learner.plan(states)
    for network in (learner.actor, learner.value):
        for weight in network.parameters():
            weight.data.zero_()
    torch.manual_seed(0)
    assert torch.equal(learner.plan(states), before)


@pytest.mark.equation(9)
def test_the_best_of_each_states_plans():
    learner, states = make(act_samples=5), batch_of(3)["plans"][:, 0, ACT:]
    torch.manual_seed(1)
    with torch.no_grad():
        plans = learner.sample(states.repeat_interleave(5, 0))
    values = valued(learner.ema_value, plans.double().numpy(), [1] * 15).reshape(3, 5)
    torch.manual_seed(1)
    with torch.no_grad():
        found = learner.plan(states)
    best = values.argmax(1)
    assert {*best} != {0}
    for row in range(3):
        assert torch.equal(found[row], plans[5 * row + best[row]])


# ------------------------------------------------- data -------------------------------------------------


@pytest.fixture(scope="module")
def recorded(minari_root) -> list[dict[str, np.ndarray]]:
    """Two episodes of (episode, step, 7): one of three steps that terminates, one of two that is cut."""
    parts = []
    for number, length in enumerate((3, 2)):
        observations = [[number, step, 7.0] for step in range(length + 1)]
        parts.append(episode(observations, [1.0, 2.0, 4.0][:length], terminated=number == 0))
    return read(diffuser, "test/diffuser/pieces-v0", parts)


@pytest.mark.equation(2, 4, 5)
@pytest.mark.parametrize("penalty", [0.0, 100.0])
def test_trajectories_and_their_returns(recorded, penalty):
    scaler = diffuser.Scaler(np.zeros(OBS), np.ones(OBS), ACTIONS.low, ACTIONS.high)
    config = diffuser.Config(discount=0.5, termination_penalty=penalty)
    batch = diffuser.trajectories(
        diffuser.valued_steps(recorded, scaler, config), torch.arange(5), horizon=3)
    steps = [[0, 1, 2], [1, 2, 2], [2, 2, 2], [0, 1, 1], [1, 1, 1]]
    assert batch["observations"][:, :, 1].tolist() == steps
    assert batch["observations"][:, :, 0].tolist() == [[0] * 3] * 3 + [[1] * 3] * 2
    actions = np.array([[0.25, -0.5], [-1, 1]])  # by bounds of 2; they alternate
    np.testing.assert_allclose(batch["actions"], actions[np.array(steps) % 2])
    # 1 + 2 / 2 + (4 - penalty) / 4 and so on; what a limit of time cuts has no penalty
    returns = np.array([3 - penalty / 4, 4 - penalty / 2, 4 - penalty, 2, 2])
    np.testing.assert_allclose(batch["returns"], (returns - returns.mean()) / returns.std(), rtol=1e-5)


def test_returns_that_are_all_the_same_are_zero(recorded):
    scaler = diffuser.Scaler(np.zeros(OBS), np.ones(OBS), ACTIONS.low, ACTIONS.high)
    silent = [part | {"rewards": np.zeros_like(part["rewards"])} for part in recorded]
    assert diffuser.valued_steps(silent, scaler, diffuser.Config())["returns"].tolist() == [0] * 5


# ------------------------------------------------ acting ------------------------------------------------


def numbered(learner) -> list[torch.Tensor]:
    """Lets the actions of plan n be n / 10 + 0, 0.01, 0.02, 0.03; returns the states asked for."""
    asked = []

    def plan(states):
        asked.append(states.clone())
        actions = len(asked) / 10 + torch.arange(HORIZON) / 100
        return actions[:, None].expand(len(states), -1, WIDTH)

    learner.plan = plan
    return asked


@pytest.mark.equation(9)
def test_each_environment_has_its_own_plan_and_its_own_beginning():
    learner, nan, found = make(), math.nan, []
    asked = numbered(learner)
    rewards = [None, [1, nan], [1, 1], [1, 1], [nan, nan]]
    for step, reward in enumerate(rewards):
        found.append(learner.act(np.array([[step] * OBS, [100 + step] * OBS]), reward)[:, 0].tolist())
    wanted = [(0.1, 0.1), (0.11, 0.2), (0.3, 0.21), (0.31, 0.4), (0.5, 0.5)]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    states = [[row[0].item() for row in each] for each in asked]
    assert states == [[0, 100], [101], [2], [103], [4, 104]]


def test_one_observation_or_a_batch_in_the_environments_units_within_bounds():
    learner, observations = make(), np.random.default_rng(0).normal(size=(4, OBS))
    learner.scaler = diffuser.Scaler([0.1, 0.2, 0.3], [1, 2, 0.5], [-2, 0], [2, 10])
    learner.plan = lambda states: 3 * torch.sin(states[:, :1, None]).expand(-1, HORIZON, WIDTH)
    found = learner.act(observations, None)
    wanted = np.clip(3 * np.sin(observations[:, :1] - 0.1), -1, 1)
    assert 0 < np.mean(np.abs(wanted) == 1) < 1
    np.testing.assert_allclose(found, [-2, 0] + (wanted + 1) / 2 * [4, 10], atol=1e-5)
    np.testing.assert_allclose(learner.act(observations[1], None), found[1], atol=1e-6)


@pytest.mark.parametrize("fields", [{"horizon": 6, "levels": 3}, {"horizon": 4, "act_horizon": 5}])
def test_horizons_that_do_not_fit(fields):
    with pytest.raises(diffuser.UserError, match=r"horizon: [64] does not fit"):
        make(**fields)


def test_defaults_are_the_papers_but_for_those_of_one_core():
    """The discount is that of the J that the authors plan with."""
    config = diffuser.Config()
    wanted = {"horizon": 32, "hidden_dim": 32, "levels": 2, "diffusion_steps": 20, "batch_size": 32}
    wanted |= {"actor_lr": 2e-4, "value_lr": 2e-4, "action_weight": 10, "actor_tau": 0.005, "ema_every": 10}
    wanted |= {"guide_steps": 2, "guide_stop": 2, "act_samples": 4, "act_horizon": 1, "discount": 0.997}
    wanted |= {"updates": 1_000_000}
    assert {field: getattr(config, field) for field in wanted} == wanted


# ------------------------------------------------ learning ------------------------------------------------


def test_the_guide_chooses_between_two_ways():
    """From 0 the data go left or right, and earn more on the right, where guided plans go."""
    rng = np.random.default_rng(0)
    ways = rng.choice([-1.0, 1.0], size=512)
    plans = torch.zeros(512, 2, 2)
    plans[:, :, 0] = torch.tensor(0.5 * ways[:, None])
    plans[:, 1, 1] = torch.tensor(0.5 * ways)
    fields = {"hidden_dim": 16, "levels": 1, "horizon": 2, "diffusion_steps": 10, "act_samples": 4}
    config = diffuser.Config(**fields, actor_lr=3e-3, value_lr=3e-3, ema_every=1, actor_tau=0.05)
    torch.manual_seed(0)
    learner = new_learner(diffuser, config, 1, 1)
    for _ in range(200):
        rows = torch.as_tensor(rng.integers(512, size=64))
        batch = {"actions": plans[rows, :, :1], "observations": plans[rows, :, 1:]}
        learner.update(batch | {"returns": torch.as_tensor(ways, dtype=torch.float32)[rows]})
    states = torch.zeros(100, 1)
    with torch.no_grad():
        chosen = learner.plan(states)[:, 0, 0]
        guided = learner.sample(states)[:, 0, 0]
        config.guide_scale = 0.0
        unguided = learner.sample(states)[:, 0, 0]
    shares = [(actions > 0).float().mean().item() for actions in (unguided, guided, chosen)]
    print(shares, unguided.abs().mean(), guided.abs().mean())
    assert 0.3 < shares[0] < 0.7
    assert shares[1] > shares[0] + 0.1
    assert shares[2] > 0.95
    assert ((chosen - 0.5).abs() < 0.25).float().mean() > 0.9
