"""algorithms/offline/morel.py: every loss term against NumPy calculations written from the paper's equations,
where the pessimistic model halts, and resuming. tests/test_mopo.py has more on the model, which is the same.
"""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import load_script, new_learner
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

morel = load_script("offline/morel.py")


def make(**fields):
    """MOReL with small networks of fixed weights; the target's differ from the critic's. alpha is 0.3."""
    config = morel.Config(**{**dynamics.SMALL, **fields})
    learner = fix_weights(new_learner(morel, config, OBS, ACT), 4)
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
    dynamics.check_ends(morel)


# ------------------------------------------------- halting -------------------------------------------------


@pytest.mark.equation(4)
def test_the_disagreement_is_the_largest_distance_of_two_means():
    learner = make()
    means = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]], [[1.0, 1.0]]])
    assert learner.disagreement(means).tolist() == [5.0]
    assert learner.disagreement(means[[2, 0, 1]]).tolist() == [5.0]
    assert learner.disagreement(means[:1]).tolist() == [0.0]


@pytest.mark.equation(4)
def test_members_are_compared_in_the_same_step():
    """A difference from a published code: rows that lie far apart are no disagreement."""
    learner = make()
    means = torch.tensor([[[0.0, 0.0], [900.0, 0.0]], [[3.0, 4.0], [900.0, 1.0]]])
    assert learner.disagreement(means).tolist() == [5.0, 1.0]


@pytest.mark.equation(5)
@pytest.mark.parametrize(("threshold", "halted"), [(4.99, True), (5.0, False), (5.01, False)])
def test_where_members_disagree_the_episode_halts(batch, threshold, halted):
    """At the halt reward, for good; elsewhere it ends as the environment's do."""
    learner = make()
    learner.threshold, learner.halt_reward = threshold, -32.0
    means = torch.tensor([[[0.0] * 4] * 3, [[3.0, 4.0, 0.0, 0.0]] * 3])
    ahead = torch.tensor([[0.0] * OBS, [1.0] * OBS, [0.0] * OBS])
    learner.model.step = lambda *_: (ahead, torch.ones(3), means, means)
    rows = learner.imagine(batch["observations"], batch["actions"], lambda s: s[:, 0] > 0.5)
    assert rows["rewards"].tolist() == [-32.0 if halted else 1.0] * 3
    assert rows["terminations"].tolist() == ([1.0] * 3 if halted else [0.0, 1.0, 0.0])
    assert rows["halted"].tolist() == [float(halted)] * 3
    assert rows["disagreement"].tolist() == [5.0] * 3
    assert torch.equal(rows["observations"], batch["observations"])
    assert torch.equal(rows["actions"], batch["actions"])
    assert torch.equal(rows["next_observations"], ahead)


@pytest.mark.equation(5)
def test_threshold_and_halt_reward_follow_from_the_data(rows, batch):
    learner = make(halt_deviations=2.0, halt_penalty=7.0)
    means, _ = dynamics.predictions(
        weights(learner.model), dynamics.scale_of(learner.model), rows["observations"], rows["actions"]
    )
    pairs = [means[j] - means[k] for j in range(3) for k in range(3)]
    drawn = np.max(np.linalg.norm(pairs, axis=-1), axis=0)[np.random.default_rng(0).integers(3, size=10_000)]
    np.testing.assert_allclose(learner.calibrate(batch), drawn, rtol=1e-4)
    assert learner.threshold == pytest.approx(drawn.mean() + 2 * drawn.std(), rel=1e-4)
    assert learner.halt_reward == -2.0 - 7.0  # the data's lowest is -2


@pytest.mark.equation(5)
@pytest.mark.parametrize("deviations", [0.0, 10.0])
def test_identical_members_never_halt(batch, deviations):
    learner = make(halt_deviations=deviations, rollout_batch=50, rollout_length=3)
    for layer in learner.model.layers:
        layer.weight.data[:] = layer.weight.data[:1].clone()
        layer.bias.data[:] = layer.bias.data[:1].clone()
    assert learner.calibrate(batch).eq(0).all()
    torch.manual_seed(0)
    morel.renew_rollouts(learner, batch, lambda s: torch.zeros(len(s), dtype=torch.bool))
    assert len(learner.rollouts.rows["rewards"]) == 150
    assert {name: value.item() for name, value in learner.rollout_metrics().items()} == {
        "model/disagreement_rollouts": 0.0, "model/disagreement_rollouts_p95": 0.0, "model/halted": 0.0
    }


def test_the_share_of_halted_rollouts():
    """Of rollouts, not of their steps: 9 of 2 renewals of 10."""
    learner = make(rollout_batch=10)
    for halted in ([1.0, 1.0, 0.0, 0.0] * 4, [1.0] + [0.0] * 29):
        learner.rollouts.add({"halted": torch.tensor(halted), "disagreement": torch.ones(len(halted))})
    assert learner.rollout_metrics()["model/halted"].item() == pytest.approx(9 / 20)


# ------------------------------------------ the policy's losses ------------------------------------------


@pytest.mark.equation(6)
def test_a_halted_step_is_worth_the_halt_reward(batch):
    """Nothing after it: y = r."""
    learner = make()
    batch |= {"rewards": torch.full((3,), -32.0), "terminations": torch.ones(3)}
    q = learner.critic(batch["observations"], batch["actions"])
    assert learner.critic_loss(batch)[0].item() == pytest.approx((q + 32).square().mean(1).sum().item())


@pytest.mark.equation(6, 7)
def test_critic_loss(batch, rows, draw):
    """With entropy in the target; the squares are not halved."""
    learner, noise = make(discount=0.9), np.random.default_rng(13).normal(size=(3, ACT))
    actions, density = squashed(weights(learner.actor), rows["next_observations"], noise)
    q = q_values(weights(learner.target_critic), rows["next_observations"], actions)
    assert len({*q.argmin(axis=0)[[0, 2]]}) == 2  # another in each row that goes on
    target = bellman(rows, 0.9, q.min(axis=0) - 0.3 * np.log(density))
    draw(noise)
    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.target_critic, learner.temperature, learner.model]
    oracle = lambda layers: summed_errors(layers, rows, target)  # noqa: E731
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    mean = q_values(weights(learner.critic), rows["observations"], rows["actions"]).mean()
    assert metrics["critic/q_mean"].item() == pytest.approx(mean, rel=1e-5)


def actor_oracle(learner, rows, noise):
    """(8) as a function of the actor's weights, with the critic as it is now."""
    critic, alpha = weights(learner.critic), learner.temperature().item()

    def oracle(layers):
        actions, density = squashed(layers, rows["observations"], noise)
        return np.mean(alpha * np.log(density) - q_values(critic, rows["observations"], actions).min(axis=0))

    return oracle


@pytest.mark.equation(8)
def test_actor_loss(batch, rows, draw):
    learner, noise = make(), np.random.default_rng(6).normal(size=(3, ACT))
    draw(noise)
    loss, metrics = learner.actor_loss(batch)
    others = [learner.target_critic, learner.temperature, learner.model]
    assert_loss_and_gradient(loss, learner.actor, actor_oracle(learner, rows, noise), others)
    density = squashed(weights(learner.actor), rows["observations"], noise)[1]
    assert metrics["actor/entropy"].item() == pytest.approx(-np.log(density).mean(), rel=1e-5)


@pytest.mark.equation(8)
def test_the_actor_follows_the_new_critic(batch, rows, draw):
    learner, rng = make(critic_lr=0.1), np.random.default_rng(6)
    before, noise = weights(learner.actor), [rng.normal(size=(3, ACT)) for _ in range(2)]
    draw(*noise)
    alpha = learner.temperature.log.data.clone()
    learner.update(batch)
    learner.temperature.log.data = alpha
    assert_close(gradients(learner.actor), slopes(actor_oracle(learner, rows, noise[1]), before), 1e-4)


@pytest.mark.equation(9)
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


@pytest.mark.equation(10)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    assert_compiled_is_eager(morel, [make(tau=0.1), make(tau=0.1)], batch)


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
    dynamics.check_resume(morel, "morel", call, pendulum, tmp_path, monkeypatch, halt_deviations=1.0)
    folder = place(tmp_path / "torn", "morel", pendulum)
    shown = {*(folder / "metrics.csv").read_text().splitlines()[0].split(",")}
    assert {"model/error_1", "model/disagreement_data", "model/disagreement_rollouts"} <= shown
    assert {"model/halted", "model/disagreement_data_p95", "model/disagreement_rollouts_p95"} <= shown


def test_defaults_are_the_differences_that_the_docstring_names():
    """Rollouts are short, from any state of the data; members are seven; some rows are real."""
    config = morel.Config()
    assert (config.rollout_length, config.ensemble, config.real_ratio) == (5, 7, 0.01)
