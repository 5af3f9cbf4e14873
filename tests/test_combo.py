"""algorithms/offline/combo.py: every loss term against NumPy calculations written from the paper's equations,
and resuming. tests/test_mopo.py has more on the model, which is the same.
"""

import copy
import math

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, load_script, new_learner
from oracles import (
    ACT,
    OBS,
    assert_acts,
    assert_close,
    assert_compiled_is_eager,
    assert_loss_and_gradient,
    bellman,
    fix_weights,
    gradients,
    policy,
    q_values,
    slopes,
    squashed,
    summed_errors,
    weights,
)
from runs import place

pytest.register_assert_rewrite("dynamics")
import dynamics  # noqa: E402

combo = load_script("offline/combo.py")
N = 2  # sampled actions of each kind


def make(**fields):
    """COMBO with small networks of fixed weights; the target's differ from the critic's. alpha is 0.3."""
    config = combo.Config(**{**dynamics.SMALL, "cql_actions": N, **fields})
    learner = fix_weights(new_learner(combo, config, OBS, ACT), 4)
    learner.temperature.log.data.fill_(math.log(0.3))
    return dynamics.fix_model(learner) if config.ensemble == 3 else learner


@pytest.fixture
def draw(monkeypatch):
    """draw(noise): the next normal numbers."""

    def give(*noise: np.ndarray) -> None:
        queue = iter(noise)
        monkeypatch.setattr(torch, "randn_like", lambda like: torch.tensor(next(queue), dtype=torch.float32))

    return give


# ------------------------------------------------ the model ------------------------------------------------


@pytest.mark.equation(1)
def test_the_model_predicts(rows):
    dynamics.check_predictions(make(), rows)


@pytest.mark.equation(2)
def test_model_loss(rows):
    dynamics.check_model_loss(make(), rows)


@pytest.mark.equation(3)
def test_a_step_in_the_model(rows, monkeypatch):
    dynamics.check_step(make(), rows, monkeypatch)


def test_where_imagined_episodes_end():
    """Also the difference from a published code: -101 is as far as 101."""
    dynamics.check_ends(combo)


def test_imagined_rewards_are_the_models(batch):
    """No penalty; and an episode ends where the rule says so."""
    learner = make()
    ahead = torch.tensor([[0.0] * OBS, [1.0] * OBS, [0.0] * OBS])
    learner.model.step = lambda *_: (ahead, torch.arange(3.0), None, None)
    rows = learner.imagine(batch["observations"], batch["actions"], lambda s: s[:, 0] > 0.5)
    assert rows["rewards"].tolist() == [0.0, 1.0, 2.0]
    assert rows["terminations"].tolist() == [0.0, 1.0, 0.0]
    assert torch.equal(rows["observations"], batch["observations"])
    assert torch.equal(rows["actions"], batch["actions"])
    assert torch.equal(rows["next_observations"], ahead)


# ------------------------------------------ the policy's losses ------------------------------------------


class Draws:
    """The random numbers of a critic's loss on three rows, of which the first `real` are the data's."""

    def __init__(self, learner, rows, real: int, seed: int = 13):
        rng, self.rows, self.real = np.random.default_rng(seed), rows, real
        self.target, self.policies = rng.normal(size=(3, ACT)), rng.normal(size=(N, 2, 3 - real, ACT))
        self.uniform, actor = rng.uniform(size=(N, 1, 3 - real, ACT)), weights(learner.actor)
        actions, _ = squashed(actor, rows["next_observations"], self.target)
        q = q_values(weights(learner.target_critic), rows["next_observations"], actions)
        assert len({*q.argmin(axis=0)[[0, 2]]}) == 2  # another in each row that goes on
        self.next_q = q.min(axis=0)
        self.candidates = []  # (actions, density) of the imagined rows
        for number in range(N):
            self.candidates.append((2 * self.uniform[number, 0] - 1, np.full(3 - real, 0.5**ACT)))
            for kind, key in enumerate(("observations", "next_observations")):
                self.candidates.append(squashed(actor, rows[key][real:], self.policies[number, kind]))

    def gaps(self, layers) -> np.ndarray:
        """G_i [2]: pushed down in imagined states, up at the data's own actions."""
        states, total = self.rows["observations"][self.real :], 0
        for actions, density in self.candidates:
            total = total + np.exp(q_values(layers, states, actions)) / density
        own = q_values(layers, self.rows["observations"], self.rows["actions"])[:, : self.real]
        return np.mean(np.log(total), axis=1) - np.mean(own, axis=1)


@pytest.mark.equation(4, 5, 6)
@pytest.mark.parametrize(("ratio", "real"), [(0.34, 1), (0.67, 2)])
@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_critic_loss(batch, rows, draw, monkeypatch, ratio, real, weight):
    """With weight 0 this is model-based SAC without entropy in its target. A gradient passes through (6)."""
    learner = make(discount=0.9, real_ratio=ratio, cql_weight=weight)
    drawn = Draws(learner, rows, real)
    target = bellman(rows, 0.9, drawn.next_q)

    def oracle(layers):
        return summed_errors(layers, rows, target) + weight * np.sum(drawn.gaps(layers))

    draw(drawn.target, drawn.policies)
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.tensor(drawn.uniform, dtype=torch.float32))
    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.target_critic, learner.temperature, learner.model]
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    layers = weights(learner.critic)
    assert metrics["critic/gap"].item() == pytest.approx(drawn.gaps(layers).mean(), rel=1e-5)
    mean = q_values(layers, rows["observations"], rows["actions"]).mean()
    assert metrics["critic/q_mean"].item() == pytest.approx(mean, rel=1e-5)


@pytest.mark.equation(5, 6)
@pytest.mark.parametrize("c", [0.0, -7.0])
def test_gap_of_equal_values(c):
    """Three entries of an action, ten actions of each kind, a policy as dense as the uniform."""
    learner = new_learner(combo, combo.Config(hidden_dim=4, model_hidden_dim=4), OBS, 3)
    learner.critic = lambda observations, actions: torch.full((2, len(actions)), c)
    sample = learner.actor.sample
    learner.actor.sample = lambda observations, *count: (
        sample(observations, *count)[0],
        torch.full((*count, *observations.shape[:-1]), -3 * math.log(2)),
    )
    batch = {key: torch.zeros(6, 3) for key in ("observations", "next_observations", "actions")}
    batch |= {"rewards": torch.zeros(6), "terminations": torch.ones(6)}
    metrics = learner.critic_loss(batch)[1]
    assert metrics["critic/gap"].item() == pytest.approx(5.480639, abs=1e-5)
    assert metrics["critic/loss"].item() == pytest.approx(2 * (c**2 + 5 * 5.480639), rel=1e-5)


def test_without_weight_there_is_no_entropy_in_the_target(batch):
    losses = []
    for alpha in (0.01, 10.0):
        learner = make(cql_weight=0.0)
        learner.temperature.log.data.fill_(math.log(alpha))
        torch.manual_seed(0)
        losses.append(learner.critic_loss(batch)[0].item())
    assert losses[0] == losses[1]


def actor_oracle(learner, rows, noise):
    """(7) as a function of the actor's weights, with the critic as it is now."""
    critic, alpha = weights(learner.critic), learner.temperature().item()

    def oracle(layers):
        actions, density = squashed(layers, rows["observations"], noise)
        return np.mean(alpha * np.log(density) - q_values(critic, rows["observations"], actions).min(axis=0))

    return oracle


@pytest.mark.equation(7)
def test_actor_loss(batch, rows, draw):
    learner, noise = make(), np.random.default_rng(6).normal(size=(3, ACT))
    draw(noise)
    loss, metrics = learner.actor_loss(batch)
    others = [learner.target_critic, learner.temperature, learner.model]
    assert_loss_and_gradient(loss, learner.actor, actor_oracle(learner, rows, noise), others)
    density = squashed(weights(learner.actor), rows["observations"], noise)[1]
    assert metrics["actor/entropy"].item() == pytest.approx(-np.log(density).mean(), rel=1e-5)


@pytest.mark.equation(7)
def test_the_actor_follows_the_new_critic(batch, rows, draw, monkeypatch):
    learner, rng = make(critic_lr=0.1, real_ratio=0.34), np.random.default_rng(6)
    before, noise = weights(learner.actor), rng.normal(size=(3, ACT))
    drawn = Draws(learner, rows, 1)
    draw(drawn.target, drawn.policies, noise)
    alpha = learner.temperature.log.data.clone()
    learner.update(batch)
    learner.temperature.log.data = alpha
    assert_close(gradients(learner.actor), slopes(actor_oracle(learner, rows, noise), before), 1e-4)


@pytest.mark.equation(8)
@pytest.mark.parametrize(("entropy", "sign"), [(-ACT, 0), (-ACT + 0.5, 1), (-ACT - 0.5, -1), (3.0, 1)])
def test_temperature_gradient(batch, entropy, sign):
    """Too much entropy makes it cheaper, too little dearer."""
    learner = make()
    actor_loss, told = learner.actor_loss, {"actor/entropy": torch.tensor(float(entropy))}
    learner.actor_loss = lambda batch: (actor_loss(batch)[0], told)
    before = learner.temperature().item()
    metrics = learner.update(batch)
    assert learner.temperature.log.grad.item() == pytest.approx(entropy + ACT)
    assert np.sign(before - metrics["actor/temperature"].item()) == sign


@pytest.mark.equation(9)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    assert_compiled_is_eager(combo, [make(tau=0.1), make(tau=0.1)], batch)


def test_the_policys_updates_leave_the_model_alone(batch):
    learner = make()
    before = copy.deepcopy(learner.model.state_dict())
    learner.update(batch)
    assert all(torch.equal(before[name], value) for name, value in learner.model.state_dict().items())


def test_the_mean_acts(rows):
    learner = make()
    assert_acts(learner, rows, lambda observations: policy(weights(learner.actor), observations)[:, :ACT])


# -------------------------------------------------- runs --------------------------------------------------


def test_a_run_torn_in_the_fit_and_in_training_ends_in_the_same_bits(call, pendulum, tmp_path, monkeypatch):
    dynamics.check_resume(combo, "combo", call, pendulum, tmp_path, monkeypatch, cql_actions=2)
    folder = place(tmp_path / "torn", "combo", pendulum)
    shown = {*(folder / "metrics.csv").read_text().splitlines()[0].split(",")}
    assert {"model/error_1", "model/error_5", "critic/gap"} <= shown


def test_defaults_are_the_differences_that_the_docstring_names():
    assert (combo.Config().rollout_batch, combo.Config().cql_actions) == (10_000, 10)


PUBLISHED = {  # h and w of OfflineRL-Kit
    "halfcheetah": {"medium": (5, 0.5), "medium-replay": (5, 0.5), "medium-expert": (5, 5.0)},
    "hopper": {"medium": (5, 5.0), "medium-replay": (5, 0.5), "medium-expert": (5, 5.0)},
    "walker2d": {"medium": (1, 5.0), "medium-replay": (1, 0.5), "medium-expert": (1, 5.0)},
}
NEAREST = {"simple": "medium", "random": "medium-replay", "expert": "medium-expert"}
NEAREST |= {"expert-narrow": "medium-expert"}


def test_configs_have_the_published_settings():
    for body, levels in PUBLISHED.items():
        files = [*(ROOT / "configs/offline/combo").glob(f"*/{body}/*.yaml")]
        assert len(files) == 9
        for file in files:
            config = combo.Config(**yaml.safe_load(file.read_text()))
            level = config.dataset.split("/")[2].rpartition("-")[0]
            wanted = levels[NEAREST.get(level, level)]
            assert (config.rollout_length, config.cql_weight) == wanted, file
