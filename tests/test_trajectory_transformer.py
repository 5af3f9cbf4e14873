"""Trajectory Transformer: bins, what tokens see, what the loss counts, and plans, by plain calculations."""

import itertools
import json
import math

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, load_script, new_learner, short
from minari.data_collector import EpisodeBuffer
from oracles import ACTIONS, endings, read

tt = load_script("offline/trajectory_transformer.py")
OBS, ACT, KINDS, BINS = 2, 1, 5, 4  # tokens of a step: s s a r V


def small(seed: int = 4, obs_dim: int = OBS, act_dim: int = ACT, **fields):
    """A small learner with random weights large enough to show, without dropout; bins of rising numbers."""
    sizes = {"hidden_dim": 8, "hidden_layers": 2, "context": 4, "dropout": 0.0, "bins": BINS}
    plans = {"plan_horizon": 2, "act_beams": 2, "act_samples": 2}
    learner = new_learner(tt, tt.Config(**{**sizes, **plans, **fields}), obs_dim, act_dim)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in learner.actor.named_parameters():
            norm = "norm" in name
            weight.normal_(mean=float(norm and name.endswith("weight")), std=0.3 if norm else 0.8)
        kinds, bins = learner.bins.means.shape
        learner.bins.means.copy_(torch.randn(kinds, bins).sort(-1).values)
        learner.bins.edges.copy_((learner.bins.means[:, 1:] + learner.bins.means[:, :-1]) / 2)
    return learner


def draw_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.as_tensor(np.random.default_rng(seed).integers(BINS, size=(rows, length)))


def padded() -> dict[str, torch.Tensor]:
    """Three windows, of 3, 2 and 1 real steps."""
    tokens, real = draw_tokens(3, 3 * KINDS).view(3, 3, KINDS).int(), torch.ones(3, 3).tril().flip(0)
    tokens[real == 0] = 0
    return {"tokens": tokens, "real": real, "timesteps": torch.zeros(3, 3)}


# ------------------------------------------------- numbers ------------------------------------------------


def fitted(columns: np.ndarray, bins: int):
    found = tt.Bins(columns.shape[1], bins)
    found.fit(torch.as_tensor(columns, dtype=torch.float32))
    return found


@pytest.mark.equation(3, 7)
def test_a_hundred_numbers_have_a_hundred_tokens():
    numbers = np.arange(100.0)[:, None]
    bins, shuffled = fitted(numbers, 100), torch.randperm(100)
    tokens = bins.encode(torch.arange(100.0)[shuffled, None])
    assert tokens.flatten().tolist() == shuffled.tolist()
    assert (bins.decode(tokens, 0).flatten() == shuffled).all()
    beyond = bins.encode(torch.tensor([[-1e9], [1e9]]))
    assert beyond.flatten().tolist() == [0, 99]


@pytest.mark.equation(3, 7)
def test_bins_are_those_of_quantiles_and_decode_to_the_mean_of_their_data():
    """A kind that never changes, one that is nearly always 0, and two that are spread unevenly."""
    rng, bins = np.random.default_rng(0), 10
    columns = np.stack([np.full(500, 3.5), rng.random(500) < 0.03, rng.normal(size=500) ** 3,
                        rng.exponential(size=500)], 1).astype(np.float32)
    coder = fitted(columns, bins)
    tokens = coder.encode(torch.as_tensor(columns))
    for kind, column in enumerate(columns.T):
        edges = [np.quantile(column, n / bins) for n in range(1, bins)]
        wanted = np.array([sum(edge <= y for edge in edges) for y in column])
        np.testing.assert_array_equal(tokens[:, kind], wanted)
        means = np.array([column[wanted == token].mean() for token in wanted])
        np.testing.assert_allclose(coder.decode(tokens, 0)[:, kind], means, rtol=1e-5, atol=1e-6)
        if kind > 1:
            assert (np.bincount(wanted, minlength=bins) == 50).all()
            ends = np.array([column.min(), *edges, column.max()])
            gap = np.abs(coder.decode(tokens, 0)[:, kind].numpy() - column)
            assert (gap <= ends[wanted + 1] - ends[wanted] + 1e-6).all()
        assert wanted[column.argmax()] == bins - 1
    assert (coder.decode(tokens, 0)[:, 0] == 3.5).all()
    # a rare reward is in a bin with the many zeros that come before it: it is the mean that stays right
    assert coder.decode(tokens, 0)[:, 1].mean() == pytest.approx(columns[:, 1].mean(), rel=1e-5)
    middle = tokens[:, 2:3]
    np.testing.assert_array_equal(coder.decode(middle, 2), coder.decode(tokens, 0)[:, 2:3])
    np.testing.assert_array_equal(coder.encode(torch.as_tensor(columns[:, :2])), tokens[:, :2])
    assert coder.means.isfinite().all()


def numbered(rewards: list, terminated: bool, discount: float = 0.5, termination_reward=None) -> torch.Tensor:
    """Rewards and V [T, 2] of an episode, after another one."""
    last = np.arange(len(rewards)) == len(rewards) - 1
    shapes = {"observations": (len(rewards) + 1, OBS), "actions": (len(rewards), ACT)}
    episode = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    episode["rewards"] = np.array(rewards, np.float32)
    episode["terminations"] = (last & terminated).astype(np.float32)
    found = tt.numbered_steps([episode, episode], small().scaler, discount, termination_reward)
    count = len(rewards)
    assert found["timesteps"].tolist() == [*range(count)] * 2
    assert torch.equal(found["numbers"][:count], found["numbers"][count:])
    return found["numbers"][:count, -2:]


@pytest.mark.equation(1, 2)
def test_values_are_the_discounted_returns_from_the_next_step_on():
    assert numbered([1, 1, 1], terminated=False).tolist() == [[1, 1.5], [1, 1], [1, 0]]
    assert numbered([4, -2, 8], terminated=True).tolist() == [[4, 2], [-2, 8], [8, 0]]
    long = numbered([1.0] * 3000, terminated=False, discount=0.99)[:, 1]
    assert float(long[0]) == pytest.approx((1 - 0.99**2999) / 0.01, rel=1e-6)


@pytest.mark.equation(1)
def test_a_termination_has_its_own_reward_and_a_truncation_has_not():
    ended = numbered([1, 1, 1], terminated=True, termination_reward=-100.0)
    assert ended.tolist() == [[1, 1 - 50], [1, -100], [-100, 0]]
    assert numbered([1, 1, 1], terminated=False, termination_reward=-100.0)[:, 0].tolist() == [1, 1, 1]


@pytest.mark.equation(2)
def test_steps_are_states_actions_rewards_and_values(minari_root):
    episodes = read(tt, "test/tt/endings-v0", endings())
    scaler = tt.fit_scaler(episodes, ACTIONS, False)
    found = tt.numbered_steps(episodes, scaler, 0.5, None)["numbers"]
    wanted = [  # actions of [-2, 2] in [-1, 1]
        [0.1, 0.2, 0.3, 0.25, -0.5, 1, 0],
        [1.0, -1.1, 1.2, 0.25, -0.5, 2, 4],
        [1.3, 1.4, -1.5, -1.0, 1.0, 4, 0],
    ]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


# -------------------------------------------- the transformer ---------------------------------------------


def forward(learner, tokens: np.ndarray) -> np.ndarray:
    """Logits [L, N] of the token after each of one window, head by head and query by query."""
    weights = {name: value.detach().double().numpy() for name, value in learner.actor.named_parameters()}
    heads, layers = max(learner.config.hidden_dim // 32, 1), learner.config.hidden_layers
    bins = learner.config.bins
    kinds = learner.bins.means.shape[0]

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def norm(name, x):
        z = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return weights[f"{name}.weight"] * z + weights[f"{name}.bias"]

    x = [weights["embed_token.weight"][i % kinds * bins + token] + weights["embed_position.weight"][i]
         for i, token in enumerate(tokens)]
    for layer in range(layers):
        block = f"blocks.{layer}"
        parts = [np.split(linear(f"{block}.qkv", norm(f"{block}.norm1", token)), 3 * heads) for token in x]
        mixed = []
        for i, part in enumerate(parts):
            shown = [j for j in range(i + 1) if j % kinds != kinds - 1]  # the past and itself, but no V
            of_heads = []
            for head in range(heads):
                query, width = part[head], len(part[head])
                scores = np.array([query @ parts[j][heads + head] / math.sqrt(width) for j in shown])
                shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
                of_heads.append(sum(s * parts[j][2 * heads + head] for s, j in zip(shares, shown)))
            mixed.append(np.concatenate(of_heads))
        x = [token + linear(f"{block}.out", entry) for token, entry in zip(x, mixed)]
        for i, token in enumerate(x):
            h = linear(f"{block}.mlp.0", norm(f"{block}.norm2", token))
            gelu = h / 2 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in h]))
            x[i] = token + linear(f"{block}.mlp.2", gelu)
    return np.array([norm("norm", h) @ weights["head"][i % kinds] for i, h in enumerate(x)])


@pytest.mark.equation(2, 4)
@pytest.mark.parametrize("dim", [8, 64])
def test_logits_are_those_of_tokens_one_after_the_other(dim):
    """With one head and with two."""
    learner, tokens = small(hidden_dim=dim), draw_tokens(2, 3 * KINDS)
    assert learner.actor.blocks[0].heads == max(dim // 32, 1)
    assert new_learner(tt, tt.Config(), 11, 3).actor.blocks[0].heads == 4
    with torch.no_grad():
        for weight in learner.actor.parameters():
            weight *= (8 / dim) ** 0.5 if weight.ndim > 1 else 1  # inputs as large in both
    found = learner.actor(tokens).detach().numpy()
    np.testing.assert_allclose(found, [forward(learner, row) for row in tokens.numpy()], atol=2e-5)
    assert np.ptp(found, axis=0).max() > 0.5


@pytest.mark.equation(4)
def test_a_change_at_a_token_changes_nothing_before_it_and_that_of_a_value_nothing_after_it():
    """A value changes what is said at its own place, of the next step's first number, and nothing else."""
    learner, tokens = small(), draw_tokens(1, 4 * KINDS)
    for weight in learner.actor.parameters():
        weight.data *= 0.5  # attention to everything
    before = learner.actor(tokens)
    for place in range(4 * KINDS):
        other = tokens.clone()
        other[:, place] = (tokens[:, place] + 1) % BINS
        changed = (learner.actor(other) - before).abs().amax(-1)[0] > 1e-6
        is_value = place % KINDS == KINDS - 1
        later = range(place, place + 1) if is_value else range(place, 4 * KINDS)
        assert changed.nonzero().flatten().tolist() == [*later]


@pytest.mark.equation(4)
@torch.no_grad()
def test_what_is_read_token_by_token_is_what_is_read_at_once():
    learner, tokens = small(), draw_tokens(3, 4 * KINDS)
    learner.actor.double()  # in which the order of sums does not show
    whole = learner.actor(tokens)
    for first in (1, 7, KINDS, 3 * KINDS - 1):
        memory = learner.actor.new_memory(3)
        found = [learner.actor.read(tokens[:, :first], memory, 0)]
        found += [learner.actor.read(tokens[:, i : i + 1], memory, i) for i in range(first, 4 * KINDS)]
        torch.testing.assert_close(torch.stack(found, 1), whole[:, first - 1 :], atol=1e-9, rtol=1e-9)


def test_weights_start_as_gpt_2s_and_matrices_alone_decay():
    learner = new_learner(tt, tt.Config(), 11, 3)
    for name, weight in learner.actor.named_parameters():
        if weight.ndim > 1:
            assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1), name
        else:
            assert (weight == (0 if name.endswith("bias") else 1)).all(), name
    groups = learner.actor_optimizer.param_groups
    decay = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    for name, weight in learner.actor.named_parameters():
        of_block = name.startswith("blocks") and name.endswith("weight") and "norm" not in name
        matrix = name == "head" or of_block
        assert decay[id(weight)] == (0.1 if matrix else 0.0), name
    assert all(group["betas"] == (0.9, 0.95) for group in groups)


def test_dropout_is_at_work_in_training_alone():
    learner, tokens = small(dropout=0.5), draw_tokens(2, 2 * KINDS)
    assert not torch.equal(learner.actor(tokens), learner.actor(tokens))
    learner.plan(tokens[:, :OBS])
    assert all(module.training for module in learner.actor.modules())
    learner.actor.eval()
    found = learner.actor(tokens).detach()
    np.testing.assert_allclose(found, [forward(learner, row) for row in tokens.numpy()], atol=2e-5)


# ------------------------------------------------ the loss ------------------------------------------------


@pytest.mark.equation(2, 4, 5)
def test_loss_weighs_actions_and_counts_real_tokens():
    learner, batch = small(action_weight=5.0), padded()
    loss, metrics = learner.actor_loss(batch)
    total, count = 0.0, 0
    for row, length in enumerate((3, 2, 1)):
        tokens = batch["tokens"][row].flatten().numpy()
        logits = forward(learner, tokens)
        for i in range(1, length * KINDS):
            p = np.exp(logits[i - 1]) / np.exp(logits[i - 1]).sum()
            total -= (5.0 if i % KINDS == OBS else 1.0) * math.log(p[tokens[i]])
        count += length * KINDS
    # every window's first token is predicted by nothing
    assert loss.item() == pytest.approx(total / (count - 3), rel=1e-5)
    assert loss.item() == metrics["actor/loss"].item()
    assert not metrics["actor/loss"].requires_grad


@pytest.mark.equation(5)
def test_the_loss_of_who_knows_nothing():
    learner = small(bins=100, action_weight=1.0)
    torch.nn.init.zeros_(learner.actor.head)
    assert learner.actor_loss(padded())[0].item() == pytest.approx(4.60517, abs=1e-5)  # ln 100
    weighed = small(bins=100, action_weight=6.0)
    torch.nn.init.zeros_(weighed.actor.head)
    wanted = math.log(100) * (21 + 6 * 6) / 27  # 30 real tokens, 3 of them first, 6 of them actions
    assert weighed.actor_loss(padded())[0].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.equation(5)
def test_padding_changes_nothing():
    learner, batch = small(), padded()
    other = {**batch, "tokens": torch.where(batch["real"].bool()[..., None], batch["tokens"], 3)}
    assert not torch.equal(other["tokens"], batch["tokens"])
    assert torch.equal(learner.actor_loss(batch)[0], learner.actor_loss(other)[0])
    empty = {key: torch.cat([column, torch.zeros_like(column[:1])]) for key, column in batch.items()}
    assert learner.actor_loss(empty)[0].item() == pytest.approx(learner.actor_loss(batch)[0].item(), rel=1e-6)


@pytest.mark.equation(6)
def test_the_step_size_warms_up_along_a_line_and_falls_along_a_cosine():
    learner, rates = small(actor_lr=1e-3, warmup_updates=4, updates=12), []
    for _ in range(14):
        rates.append(learner.actor_optimizer.param_groups[0]["lr"] / 1e-3)
        learner.update(padded())
    falling = [max(0.1, (1 + math.cos(math.pi * u / 8)) / 2) for u in range(1, 10)]
    falling[-1] = 0.1  # after the last update, too
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, *falling], abs=1e-9)
    assert learner.updates == 14


def test_first_update_by_hand():
    """Clipping, AdamW: matrices decay by lr * decay, and all move by lr where a gradient is."""
    fields = {"actor_lr": 0.1, "warmup_updates": 4, "weight_decay": 0.5, "gradient_norm": 0.01}
    learner, batch = small(**fields), padded()
    before = {name: weight.detach().clone() for name, weight in learner.actor.named_parameters()}
    slopes = torch.autograd.grad(learner.actor_loss(batch)[0], [*learner.actor.parameters()])
    norm = math.sqrt(sum(float(slope.square().sum()) for slope in slopes))
    assert norm > 0.01
    metrics = learner.update(batch)
    assert float(metrics["actor/gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    rate = 0.1 / 4
    for (name, old), slope, new in zip(before.items(), slopes, learner.actor.parameters(), strict=True):
        slope = slope * 0.01 / norm
        decay = 0.5 if old.ndim > 1 and "embed" not in name else 0.0
        expected = old * (1 - rate * decay) - rate * slope / (slope.abs() + 1e-8)
        np.testing.assert_allclose(new.detach(), expected, atol=2e-4, err_msg=name)


# ------------------------------------------------- planning -----------------------------------------------


def promise(learner, seen: list, plan: list, horizon: int) -> float:
    """(8) of a plan of one-number actions by whole passes: r, V and s the likeliest, r and V expected."""
    means, gamma = learner.bins.means.double().numpy(), learner.config.discount
    tokens, total = [*seen], 0.0
    for step in range(horizon):
        while len(tokens) % KINDS != OBS:
            tokens.append(int(forward(learner, tokens)[-1].argmax()))
        tokens.append(plan[step])
        expected = []
        for kind in (KINDS - 2, KINDS - 1):
            logits = forward(learner, tokens)[-1]
            p = np.exp(logits) / np.exp(logits).sum()
            expected.append(p @ means[kind])
            tokens.append(int(logits.argmax()))
        total += gamma**step * expected[0]
    return total + gamma**horizon * expected[1]


PAST = [3, 1, 2, 0, 3]  # a step


@pytest.mark.equation(7, 8, 9)
@pytest.mark.parametrize(("seed", "discount", "size"), [(1, 0.8, 1), (2, 0.8, 1), (2, 0.1, 30), (8, 0.1, 30)])
def test_a_wide_beam_finds_the_best_of_all_plans(seed, discount, size):
    """Of 4 x 4 action sequences, each of which so many draws find; after a past and as an episode begins.

    Large values and a small discount: its power decides what they are worth beside rewards.
    """
    learner = small(seed, discount=discount, act_beams=240, act_samples=1, act_cutoff=0.0)
    learner.actor.head.data[OBS - 1] *= 0.2  # no action is rare
    learner.bins.means[-1] *= size
    for seen in ([1, 2], [*PAST, 2, 2]):
        plans = [*itertools.product(range(BINS), repeat=2)]
        promised = {plan: promise(learner, seen, plan, 2) for plan in plans}
        best = max(promised, key=promised.get)
        found = learner.plan(torch.tensor([seen, seen], dtype=torch.int32))
        wanted = float(learner.bins.means[OBS, best[0]])
        assert found.flatten().tolist() == [wanted, wanted]


@pytest.mark.equation(8, 9)
def test_plans_are_kept_by_what_they_promise_from_one_step_to_the_next(monkeypatch):
    """One beam: of the drawn actions the one that promises most after its step, whatever came later."""
    learner = small(2, act_beams=1, act_samples=100, act_cutoff=0.0)
    learner.actor.head.data[OBS - 1] *= 0.2
    first = max(range(BINS), key=lambda action: promise(learner, [1, 2], [action], 1))
    found = learner.plan(torch.tensor([[1, 2]], dtype=torch.int32))
    assert float(found) == float(learner.bins.means[OBS, first])
    plans, kept = [*itertools.product(range(BINS), repeat=2)], []
    monkeypatch.setattr(tt, "Plans", lambda *args, make=tt.Plans: kept.append(make(*args)) or kept[-1])
    learner.plan(torch.tensor([[1, 2]], dtype=torch.int32))
    going_on = [plan for plan in plans if plan[0] == first]
    second = max(going_on, key=lambda plan: promise(learner, [1, 2], plan, 2))
    assert kept[0].tokens[0, [OBS, KINDS + OBS]].tolist() == [*second]


@pytest.mark.equation(9)
def test_one_beam_of_the_likeliest_is_greedy():
    learner = small(3, act_beams=1, act_samples=1, act_cutoff=1.0)
    for seen in ([0, 3], [*PAST, 1, 0]):
        likeliest = forward(learner, seen)[-1].argmax()
        found = learner.plan(torch.tensor([seen], dtype=torch.int32))
        assert float(found) == float(learner.bins.means[OBS, likeliest])


@pytest.mark.equation(9)
def test_draws_leave_the_tail_out():
    """0.05 + 0.15 + 0.3 = 0.5: below 0.6 these three are the tail; below 0.5 two of them."""
    p = torch.tensor([[0.3, 0.05, 0.5, 0.15]]).expand(4000, 4)
    torch.manual_seed(0)
    for cutoff, kept in ((0.0, [0, 1, 2, 3]), (0.1, [0, 2, 3]), (0.4, [0, 2]), (0.6, [2]), (1.0, [2])):
        counts = np.bincount(tt.draw_likely(p, cutoff), minlength=4)
        wanted = np.where(np.isin(range(4), kept), p[0], 0)
        np.testing.assert_allclose(counts / 4000, wanted / wanted.sum(), atol=0.03)
        assert counts.nonzero()[0].tolist() == kept
    rows = torch.eye(3)[[2, 0, 1]]
    assert tt.draw_likely(rows, 0.6).tolist() == [2, 0, 1]


def test_a_plan_fits_into_the_window():
    with pytest.raises(tt.UserError, match="plan_horizon: 5 is more than context = 4"):
        small(plan_horizon=5)
    learner = small(context=4, plan_horizon=4)
    for reward in (None, 0.0, 0.0):
        learner.act(np.zeros(OBS), reward)
    assert len(learner.history) == 0  # all of the window is the plan's


def test_acting_remembers_steps_as_the_data_have_them(monkeypatch):
    """States, actions and rewards of the last two; V's token is anything. Then an episode begins."""
    learner, seen, rng = small(), [], np.random.default_rng(0)
    plan = learner.plan
    monkeypatch.setattr(learner, "plan", lambda tokens: seen.append(tokens) or plan(tokens))
    observations, rewards = rng.normal(size=(4, 3, OBS)), [None, *rng.normal(size=(3, 3))]
    actions = [learner.act(*step) for step in zip(observations, rewards)]
    assert [tokens.shape for tokens in seen] == [(3, OBS + KINDS * past) for past in (0, 1, 2, 2)]
    steps = []
    for t in (1, 2):
        step = observations[t], actions[t], rewards[t + 1][:, None], 0 * actions[t]
        steps.append(learner.bins.encode(torch.as_tensor(np.concatenate(step, -1)).float()))
    wanted = torch.cat([*steps, learner.bins.encode(torch.as_tensor(observations[3]).float())], -1)
    shown = np.arange(wanted.shape[1]) % KINDS != KINDS - 1
    assert torch.equal(seen[-1][:, shown], wanted[:, shown])
    alone = learner.act(observations[0, 0], None)
    assert alone.shape == (ACT,)
    assert seen[-1].shape == (1, OBS)


# ------------------------------------------------ learning ------------------------------------------------


class Blind(gym.Env):
    """Four steps whose reward is the action; the observation is noise and tells nothing."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.np_random.normal(size=1).astype(np.float32), {}

    def step(self, action):
        self.count += 1
        observation = self.np_random.normal(size=1).astype(np.float32)
        return observation, float(np.clip(action[0], -1, 1)), self.count == 4, False, {}


@pytest.fixture(scope="module")
def mixed(minari_root) -> str:
    """A good and a bad policy, 100 episodes each: actions from 0.8 to 0.9, and from -0.9 to -0.8."""
    if "test/BlindPlan-v0" not in gym.registry:
        gym.register("test/BlindPlan-v0", f"{__name__}:Blind", max_episode_steps=4)
    rng, episodes, last = np.random.default_rng(0), [], np.arange(4) == 3
    for number in range(200):
        actions = ((-1) ** number * rng.uniform(0.8, 0.9, (4, 1))).astype(np.float32)
        episodes.append(
            EpisodeBuffer(
                observations=rng.normal(size=(5, 1)).astype(np.float32),
                actions=actions,
                rewards=actions[:, 0].astype(float),
                terminations=last,
                truncations=np.zeros(4, bool),
                infos={},
            )
        )
    env = gym.make("test/BlindPlan-v0")
    minari.create_dataset_from_buffers("test/tt/mixed-v0", episodes, env=env, data_format="hdf5")
    return "test/tt/mixed-v0"


def learn(dataset: str, folder, **fields) -> float:
    sizes = {"hidden_dim": 32, "hidden_layers": 1, "bins": 10, "context": 3, "batch_size": 64}
    sizes |= {"plan_horizon": 2, "act_beams": 4, "act_samples": 4, "act_cutoff": 0.0, "dropout": 0.0}
    rhythm = {"updates": 80, "warmup_updates": 10, "actor_lr": 5e-3, "eval_every": 1000, "log_every": 1000}
    arguments = short(dataset, folder, **{**sizes, **rhythm, **fields})
    tt.train(tt.parse_config(arguments))
    return json.loads(next(folder.rglob("run.json")).read_text())["return_mean"]


def test_who_plans_chooses_the_good_half_where_the_likeliest_gets_the_mean(mixed, tmp_path):
    assert learn(mixed, tmp_path / "plans") > 4 * 0.8 - 0.2
    imitates = {"act_beams": 1, "act_samples": 1}  # one plan, drawn: there is nothing to choose from
    assert learn(mixed, tmp_path / "imitates", **imitates) < 2.5


# ------------------------------------------------- configs -----------------------------------------------


def test_configs_are_those_of_its_sibling():
    folder = ROOT / "configs/offline"
    files = {path.relative_to(folder / "trajectory_transformer")
             for path in (folder / "trajectory_transformer").rglob("*.yaml")}
    assert files == {path.relative_to(folder / "td3_bc") for path in (folder / "td3_bc").rglob("*.yaml")}
    for file in files:
        values = yaml.safe_load((folder / "trajectory_transformer" / file).read_text())
        config = tt.Config(**values)
        assert config.plan_horizon <= config.context
        ours, name = values["dataset"].startswith("reef/"), values["dataset"]
        assert config.updates == (5000 if ours else 200_000)
        # only bodies that fall end badly; a maze ends at its goal
        falls = "hopper" in name or "walker2d" in name
        assert (config.termination_reward == -100) == falls, file
