"""algorithms/offline/cql.py: every loss term against NumPy calculations written from the paper's equations,
numbers in closed form, what an update moves, and resuming.
"""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, load_script, new_learner, short
from oracles import (
    ACT,
    BATCH,
    OBS,
    assert_acts,
    assert_close,
    assert_compiled_is_eager,
    assert_loss_and_gradient,
    fix_weights,
    gradients,
    policy,
    q_values,
    slopes,
    squashed,
    weights,
)
from runs import at_update, equal, stop
from torch import nn

N = 2  # sampled actions of each kind
cql = load_script("offline/cql.py")


def make(**fields):
    """CQL with small networks of fixed weights; the target's differ from the critic's. alpha is 0.3."""
    fields = {"hidden_dim": 4, "hidden_layers": 2, "cql_actions": N, **fields}
    learner = fix_weights(new_learner(cql, cql.Config(**fields), OBS, ACT), 4)
    learner.temperature.log.data.fill_(math.log(0.3))
    return learner


@pytest.fixture
def draws(monkeypatch):
    """draws(normal, uniform): what the script draws next, one normal array after the other."""

    def give(normal: list[np.ndarray], uniform: np.ndarray | None = None) -> None:
        queue = iter(normal)

        def next_normal(like):
            numbers = torch.tensor(next(queue), dtype=torch.float32)
            assert numbers.shape == like.shape
            return numbers

        def next_uniform(like):
            assert uniform.shape == like.shape
            return torch.tensor(uniform, dtype=torch.float32)

        monkeypatch.setattr(torch, "randn_like", next_normal)
        monkeypatch.setattr(torch, "rand_like", next_uniform)

    return give


# ---------------------------------------- the critic's loss ----------------------------------------


class Draws:
    """The random numbers of a critic's loss, and what NumPy makes of them for fixed actor and target."""

    def __init__(self, learner, rows, target_actions: int, seed: int = 5):
        rng, self.rows = np.random.default_rng(seed), rows
        self.target = rng.normal(size=(target_actions, 3, ACT))
        self.policies = rng.normal(size=(N, 2, 3, ACT))  # those of s and of s'
        self.uniform = rng.uniform(size=(N, 1, 3, ACT))
        actor, target = weights(learner.actor), weights(learner.target_critic)

        table = []  # Q'_i(s', a') [target_actions, 2, B]
        for noise in self.target:
            actions = squashed(actor, rows["next_observations"], noise)[0]
            table.append(q_values(target, rows["next_observations"], actions))
        self.next_q = np.array(table)
        self.candidates = []  # (actions [B, A], their density [B]), 3N of them
        for number in range(N):
            self.candidates.append((2 * self.uniform[number, 0] - 1, np.full(3, 0.5**ACT)))
            for kind, key in enumerate(("observations", "next_observations")):
                self.candidates.append(squashed(actor, rows[key], self.policies[number, kind]))

    def errors(self, layers, discount: float) -> np.ndarray:
        """Mean squared errors of the two critics [2]; the value of s' is the best a' by the lesser critic."""
        best = self.next_q.min(axis=1).max(axis=0)
        target = self.rows["rewards"] + discount * np.where(self.rows["terminations"] == 1, 0, best)
        q = q_values(layers, self.rows["observations"], self.rows["actions"])
        return np.mean((q - target) ** 2, axis=1)

    def gaps(self, layers, temperature: float) -> np.ndarray:
        """G_i [2]: T log of the sum of (exp Q / density)^(1 / T), less Q of the data; all of it in s."""
        total = np.zeros((2, 3))
        for actions, density in self.candidates:
            q = q_values(layers, self.rows["observations"], actions)
            total += (np.exp(q) / density) ** (1 / temperature)
        data = q_values(layers, self.rows["observations"], self.rows["actions"])
        return np.mean(temperature * np.log(total) - data, axis=1)


@pytest.mark.equation(1, 2, 6, 7)
@pytest.mark.parametrize("max_target_backup", [False, True])
@pytest.mark.parametrize("fields", [
    {"cql_weight": 0.0},  # SAC without entropy in the target
    {"cql_weight": 3.0},
    {"cql_weight": 1.0, "cql_temperature": 0.4},
    {"cql_weight": 2.0, "lagrange_gap": 1.5},
])  # fmt: skip
def test_critic_loss(batch, rows, draws, fields, max_target_backup):
    """(1), (2), (6) and the first half of (7). The square is not halved; no gradient reaches the actor."""
    learner = make(discount=0.9, max_target_backup=max_target_backup, **fields)
    drawn = Draws(learner, rows, N if max_target_backup else 1)
    temperature, threshold = fields.get("cql_temperature", 1.0), fields.get("lagrange_gap", 0.0)
    weight = fields["cql_weight"] * (math.e if threshold else 1)

    def oracle(layers):
        return np.sum(drawn.errors(layers, 0.9) + weight * (drawn.gaps(layers, temperature) - threshold))

    draws([drawn.target, drawn.policies], drawn.uniform)
    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.target_critic, learner.temperature, learner.multiplier]
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    layers = weights(learner.critic)
    assert metrics["critic/gap"].item() == pytest.approx(drawn.gaps(layers, temperature).mean(), rel=1e-5)
    q = q_values(layers, rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(q.mean(), rel=1e-5)


@pytest.mark.equation(1)
def test_without_weight_there_is_no_entropy_in_the_target(batch):
    """(1) does not know alpha, as the target of SAC does."""
    losses = []
    for alpha in (0.01, 10.0):
        learner = make(cql_weight=0.0)
        learner.temperature.log.data.fill_(math.log(alpha))
        torch.manual_seed(0)
        losses.append(learner.critic_loss(batch)[0].item())
    assert losses[0] == losses[1]


class Table(nn.Module):
    """Stands in for a critic: Q_1 and Q_2 of an action are looked up by its first entry."""

    def __init__(self, values: dict[float, tuple[float, float]]):
        super().__init__()
        self.values = values

    def forward(self, observations, actions):
        return torch.tensor([self.values[round(float(action[0]), 1)] for action in actions]).T


@pytest.mark.equation(1, 2)
def test_max_target_backup_is_the_best_action_by_the_lesser_critic(batch, rows):
    """Q' is (5, 1) for one action and (2, 4) for the other: 2, not the lesser of the best, 4."""
    learner = make(cql_weight=0.0, max_target_backup=True, discount=0.5)
    learner.target_critic = Table({0.1: (5.0, 1.0), 0.2: (2.0, 4.0)})
    sample = learner.actor.sample

    def two_actions(observations, *count):
        if observations.ndim == 3:  # of (6)
            return sample(observations, *count)
        return torch.tensor([[[0.1] * ACT] * 3, [[0.2] * ACT] * 3]), torch.zeros(N, 3)

    learner.actor.sample = two_actions
    target = rows["rewards"] + 0.5 * 2.0 * (1 - rows["terminations"])
    q = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    loss = learner.critic_loss(batch)[0].item()
    assert loss == pytest.approx(np.mean((q - target) ** 2, axis=1).sum(), rel=1e-5)


# ---------------------------------------- numbers in closed form ----------------------------------------


class ConstantCritic(nn.Module):
    """Q(s, a) = c for all."""

    def __init__(self, c: float):
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c))

    def forward(self, observations, actions):
        return self.c.expand(2, len(actions))


@pytest.mark.equation(2, 6)
@pytest.mark.parametrize("c", [0.0, -7.0, 40.0])
def test_gap_of_equal_values(c):
    """Three action entries, ten actions of each kind, a policy as dense as the uniform: ln 30 + 3 ln 2."""
    learner = new_learner(cql, cql.Config(hidden_dim=4), OBS, 3)
    learner.critic = ConstantCritic(c)
    sample = learner.actor.sample
    learner.actor.sample = lambda observations, *count: (
        sample(observations, *count)[0],
        torch.full((*count, *observations.shape[:-1]), -3 * math.log(2)),
    )
    batch = {key: torch.zeros(5, 3) for key in ("observations", "next_observations", "actions")}
    batch |= {"rewards": torch.zeros(5), "terminations": torch.ones(5)}
    metrics = learner.critic_loss(batch)[1]
    assert metrics["critic/gap"].item() == pytest.approx(5.480639, abs=1e-5)
    assert metrics["critic/loss"].item() == pytest.approx(2 * (c**2 + 10 * 5.480639), rel=1e-5)


@pytest.mark.equation(6)
@pytest.mark.parametrize(
    ("count", "density", "gap"),
    [
        (30, 0.5**3, 5.480639),  # importance-sampled: 30 entries of |A| = 3
        (10, 0.5**3, 4.382027),  # its uniform part alone
        (31, 1.0, 3.433987),  # the plain form: no densities, and Q of the data's own among the entries
    ],
)
def test_gap_of_equal_values_by_form(count, density, gap):
    learner = make()
    q, q_b = torch.full((2, 4), 2.5), torch.full((2, count, 1, 4), 2.5)
    log_p = torch.full((count, 1, 4), math.log(density))
    assert learner.gap(q, q_b, log_p).tolist() == pytest.approx([gap, gap], abs=1e-5)


@pytest.mark.equation(6)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_inside_and_outside_of_the_sum(temperature):
    """T log (n exp(c / T)) = c + T ln n; densities are divided by T too."""
    learner = make(cql_temperature=temperature)
    q, q_b = torch.zeros(2, 4), torch.full((2, 6, 5, 4), 1.7)
    log_p = torch.full((6, 5, 4), 0.9)
    expected = 1.7 - 0.9 + temperature * math.log(30)
    assert learner.gap(q, q_b, log_p).tolist() == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.equation(6)
def test_the_gradients_of_the_gap_over_all_values_sum_to_zero():
    """What the data's action is raised by, the others are lowered by: by their shares of the soft maximum."""
    learner, rng = make(cql_temperature=0.6), np.random.default_rng(0)
    values = [rng.normal(size=shape) for shape in ((2, 4), (2, 5, 3, 4), (5, 3, 4))]
    q, q_b, log_p = (torch.tensor(value, requires_grad=True) for value in values)
    own, others = torch.autograd.grad(learner.gap(q, q_b, log_p).sum(), (q, q_b))
    np.testing.assert_allclose(own, -1 / 4, rtol=1e-6)  # a mean over four states
    np.testing.assert_allclose(own + others.sum((1, 2)), 0, atol=1e-12)
    shares = np.exp((values[1] - values[2]) / 0.6)
    np.testing.assert_allclose(others, shares / shares.sum((1, 2), keepdims=True) / 4, rtol=1e-6)


@pytest.mark.equation(6)
def test_the_gradients_of_the_plain_form_sum_to_zero_too():
    """There the data's own value is among the others: it is raised by 1 less its share."""
    learner = make()
    q = torch.tensor([[0.3, -1.0]], requires_grad=True)
    q_b = torch.tensor([[[[1.0, 0.0]], [[-2.0, 0.5]]]], requires_grad=True)  # [1, 2, 1, 2]
    both = torch.cat([q_b, q[:, None, None]], 1)
    own, others = torch.autograd.grad(learner.gap(q, both, torch.zeros(3, 1, 2)).sum(), (q, q_b))
    np.testing.assert_allclose(own + others.sum((1, 2)), 0, atol=1e-6)
    share = np.exp(0.3) / (np.exp(0.3) + np.exp(1.0) + np.exp(-2.0))
    assert own[0, 0].item() == pytest.approx((share - 1) / 2, rel=1e-5)


# ---------------------------------------- Lagrange multiplier ----------------------------------------


@pytest.mark.equation(7)
def test_at_its_threshold_the_penalty_is_zero_and_the_multiplier_stays(batch):
    """It starts at e = 2.7183 and is there after updates in which the gap is the one to keep."""
    losses, learner = [], make()
    torch.manual_seed(0)
    gap = learner.critic_loss(batch)[1]["critic/gap"].item()
    for fields in ({"cql_weight": 0.0}, {"cql_weight": 5.0, "lagrange_gap": gap}):
        learner = make(**fields)
        torch.manual_seed(0)
        losses.append(learner.critic_loss(batch)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    critic_loss = learner.critic_loss
    told = {"critic/gap": torch.tensor(gap)}
    learner.critic_loss = lambda batch: (critic_loss(batch)[0], critic_loss(batch)[1] | told)
    for _ in range(3):
        learner.update(batch)
    assert learner.multiplier().item() == pytest.approx(math.e, rel=1e-6)


@pytest.mark.equation(7)
@pytest.mark.parametrize(("above", "sign"), [(0.5, 1), (-2.0, -1)])
def test_multiplier_gradient(batch, above, sign):
    """(7): -e w (G - g) on its logarithm; a gap too large makes it grow, one too small makes it shrink."""
    learner = make(cql_weight=3.0, lagrange_gap=1.5)
    critic_loss, told = learner.critic_loss, {"critic/gap": torch.tensor(1.5 + above)}
    learner.critic_loss = lambda batch: (critic_loss(batch)[0], critic_loss(batch)[1] | told)
    learner.update(batch)
    assert learner.multiplier.log.grad.item() == pytest.approx(-math.e * 3 * above, rel=1e-5)
    assert np.sign(learner.multiplier().item() - math.e) == sign


def test_the_multiplier_is_at_most_a_million(batch):
    penalties = []
    for log in (math.log(1e6), 20.0):
        learner = make(cql_weight=1.0, lagrange_gap=-1.0)
        learner.multiplier.log.data.fill_(log)
        torch.manual_seed(0)
        penalties.append(learner.critic_loss(batch)[0].item())
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-5)
    assert penalties[0] > 1e6


def test_without_a_gap_the_multiplier_is_one_for_good(batch):
    learner = make()
    assert [learner.update(batch)["critic/multiplier"].item() for _ in range(3)] == [1, 1, 1]
    assert learner.multiplier_optimizer.state_dict()["state"] == {}


# ---------------------------------------- actor and temperature ----------------------------------------


def actor_oracle(learner, rows, noise: np.ndarray):
    """(3) as a function of the actor's layers, with the critic as it is now."""
    critic, alpha = weights(learner.critic), learner.temperature().item()

    def oracle(layers):
        actions, density = squashed(layers, rows["observations"], noise)
        return np.mean(alpha * np.log(density) - np.minimum(*q_values(critic, rows["observations"], actions)))

    return oracle


@pytest.mark.equation(3)
def test_actor_loss(batch, rows, draws):
    learner, noise = make(), np.random.default_rng(6).normal(size=(3, ACT))
    actions, density = squashed(weights(learner.actor), rows["observations"], noise)
    q = q_values(weights(learner.critic), rows["observations"], actions)
    assert len({*np.sign(q[0] - q[1])}) == 2  # each is the smaller one in some row
    draws([noise])
    loss, metrics = learner.actor_loss(batch)
    others = [learner.target_critic, learner.temperature, learner.multiplier]
    assert_loss_and_gradient(loss, learner.actor, actor_oracle(learner, rows, noise), others)
    assert metrics["actor/entropy"].item() == pytest.approx(-np.log(density).mean(), rel=1e-5)


@pytest.mark.equation(3)
def test_the_first_update_already_descends_the_actors_loss_on_the_new_critic(batch, rows, draws):
    """(3) comes after (2), and no imitation before it."""
    learner, noise = make(critic_lr=0.1), np.random.default_rng(6).normal(size=(3, ACT))
    before, drawn = weights(learner.actor), Draws(learner, rows, 1)
    draws([drawn.target, drawn.policies, noise], drawn.uniform)
    alpha = learner.temperature.log.data.clone()
    learner.update(batch)
    learner.temperature.log.data = alpha  # as it was for the actor
    assert_close(gradients(learner.actor), slopes(actor_oracle(learner, rows, noise), before), 1e-4)


@pytest.mark.equation(4)
@pytest.mark.parametrize(("entropy", "sign"), [(-ACT, 0), (-ACT + 0.5, 1), (-ACT - 0.5, -1), (3.0, 1)])
def test_temperature_gradient(batch, entropy, sign):
    """(4): the surplus of entropy over -|A|. Too much entropy makes it cheaper, too little dearer."""
    learner = make()
    actor_loss, told = learner.actor_loss, {"actor/entropy": torch.tensor(float(entropy))}
    learner.actor_loss = lambda batch: (actor_loss(batch)[0], told)
    before = learner.temperature().item()
    metrics = learner.update(batch)
    assert learner.temperature.log.grad.item() == pytest.approx(entropy + ACT)
    assert np.sign(before - metrics["actor/temperature"].item()) == sign


@pytest.mark.parametrize("count", [(), (2,), (2, 3)])
@pytest.mark.parametrize(("mean", "log_std"), [(0.8, -1.5), (-1.2, 0.5), (0.3, -9.0), (0.0, 9.0)])
def test_the_density_of_the_actions_integrates_to_one(monkeypatch, mean, log_std, count):
    """Over (-1, 1), whatever the Gaussian; a deviation outside [e^-5, e^2] is brought there."""
    actor = cql.TanhGaussianActor(1, 1, 4, 1)
    actor.net = nn.Identity()  # the observation is the mean and the log of the deviation
    x, std = np.linspace(-16, 16, 50_001), math.exp(min(max(log_std, -5), 2))
    noise = torch.tensor((x - mean) / std, dtype=torch.float64)[:, None].expand(*count, -1, -1)
    monkeypatch.setattr(torch, "randn_like", lambda tensor: noise)
    inputs = torch.tensor([[mean, log_std]], dtype=torch.float64).expand(len(x), 2)
    actions, log_prob = actor.sample(inputs, *count)
    assert (actions.shape, log_prob.shape) == ((*count, len(x), 1), (*count, len(x)))
    np.testing.assert_allclose(actions[..., 0], np.broadcast_to(np.tanh(x), log_prob.shape), atol=1e-12)
    areas = np.trapezoid(np.exp(log_prob.numpy()), np.tanh(x))
    covered = 0.5 * (math.erf((16 - mean) / std / 2**0.5) + math.erf((16 + mean) / std / 2**0.5))
    np.testing.assert_allclose(areas, covered, rtol=2e-3)
    assert np.ptp(log_prob.numpy()) > 1  # it depends on the action


def test_many_samples_of_one_pass():
    """Independent ones, of the same Gaussians; without a count the numbers are those of one normal draw."""
    actor, observations = make().actor, torch.tensor(BATCH["observations"])
    torch.manual_seed(3)
    actions, log_prob = actor.sample(observations)
    mean, log_std = actor(observations)
    torch.manual_seed(3)
    assert torch.equal(actions, torch.tanh(mean + log_std.exp() * torch.randn_like(mean)))
    many, log_probs = actor.sample(observations, 20_000)
    x = torch.atanh(many.double().clamp(-1 + 1e-7, 1 - 1e-7))
    spread = log_std.exp().detach()
    narrow = (mean.abs() + 4 * spread < 7).detach()  # where float32's tanh is not yet 1
    assert narrow.any()
    np.testing.assert_allclose(((x.mean(0) - mean) / spread)[narrow].detach(), 0, atol=0.05)
    np.testing.assert_allclose((x.std(0) / spread)[narrow].detach(), 1, atol=0.05)
    assert log_probs.shape == (20_000, 3)
    assert log_prob.shape == (3,)


def test_the_mean_acts(rows):
    learner = make()
    assert_acts(learner, rows, lambda observations: policy(weights(learner.actor), observations)[:, :ACT])


# ---------------------------------------- updates and runs ----------------------------------------


@pytest.mark.parametrize("frozen", ["actor", "critic"])
def test_each_optimizer_moves_its_own_networks_only(batch, frozen):
    """The temperature goes at the actor's rate, the multiplier at the critic's."""
    learner, partner = make(lagrange_gap=1.0, **{f"{frozen}_lr": 0.0}), {"actor": "temperature"}
    still = {frozen, partner.get(frozen, "multiplier")}
    names = ("actor", "critic", "temperature", "multiplier")
    before = {name: weights(getattr(learner, name)) for name in names}
    learner.update(batch)
    for name, old in before.items():
        moved = any(np.any(a != b) for a, b in zip(weights(getattr(learner, name)), old))
        assert moved == (name not in still), name


@pytest.mark.equation(5)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    fields = {"tau": 0.1, "lagrange_gap": 1.0, "max_target_backup": True}
    assert_compiled_is_eager(cql, [make(**fields), make(**fields)], batch)


def test_an_interrupted_run_ends_in_the_same_bits(call, pendulum, tmp_path, monkeypatch):
    """With a multiplier, which is in the checkpoint and is not what it was at first."""
    fields = {"lagrange_gap": 2.0, "cql_actions": 3, "critic_lr": 0.01}
    folders = [tmp_path / name / f"offline/cql/{pendulum}/default/seed-0" for name in ("whole", "torn")]
    assert call("cql", *short(pendulum, tmp_path / "whole", **fields))[0] == 0
    with monkeypatch.context() as patch:
        at_update(cql, patch, 33, stop)
        assert call("cql", *short(pendulum, tmp_path / "torn", **fields))[0] == 130
    status, out, _ = call("cql", *short(pendulum, tmp_path / "torn", **fields))
    assert (status, "resumed at update 20" in out) == (0, True)
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in folders)
    assert equal(one["state"], other["state"])
    assert equal(one["rng"], other["rng"])
    assert len({(folder / "evaluations.csv").read_bytes() for folder in folders}) == 1
    trained = ("actor", "critic", "temperature", "multiplier")
    optimizers = {f"{name}_optimizer" for name in trained}
    assert set(one["state"]) == {"scaler", "target_critic", *trained} | optimizers
    assert abs(one["state"]["multiplier"]["log"].item() - 1) > 0.01
    assert json.loads((folders[0] / "run.json").read_text())["status"] == "finished"
    policy = cql.load(str(folders[1]))
    assert policy.multiplier.log.item() == one["state"]["multiplier"]["log"].item()
    assert policy.act([1.0, 0.0, 0.5]).shape == (1,)


# ---------------------------------------- configs ----------------------------------------


def test_configs_have_the_published_settings_of_their_domain():
    """CORL's: w 10 and small steps of the actor, but for the hands; a Lagrange multiplier in the mazes.

    Reef's own datasets get larger steps of the actor, because they are learnt for 10,000 updates, and its own
    mazes a smaller weight on larger rewards: with CORL's settings Q fell below 0 there, which no return is.
    """
    files = sorted((ROOT / "configs/offline/cql").rglob("*.yaml"))
    sibling = ROOT / "configs/offline/td3_bc"
    assert [f.relative_to(ROOT / "configs/offline/cql") for f in files] == [
        f.relative_to(sibling) for f in sorted(sibling.rglob("*.yaml"))
    ]
    for file in files:
        config = cql.Config(**yaml.safe_load(file.read_text()))
        dataset = config.dataset
        hand = dataset.startswith("D4RL/") and "pointmaze" not in dataset
        expected = (1.0, 1e-4) if hand else (10.0, 3e-4 if dataset.startswith("reef/") else 3e-5)
        expected = (1.0, 3e-4) if dataset.startswith("reef/pointmaze") else expected
        assert (config.cql_weight, config.actor_lr, config.critic_lr) == (*expected, 3e-4), file
        assert config.reward_scale == (10.0 if dataset.startswith("reef/pointmaze") else 1.0), file
        assert config.lagrange_gap == (5.0 if dataset.startswith("D4RL/pointmaze") else None), file
        assert config.normalize_rewards == ("/hopper/medium-v" in dataset), file
        assert (config.hidden_layers, config.hidden_dim, config.cql_actions) == (3, 256, 10)
        assert (config.normalize_states, config.max_target_backup) == (True, False)
