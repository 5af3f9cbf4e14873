"""algorithms/offline/mopo.py: every loss term against NumPy calculations written from the paper's equations,
numbers in closed form, the model's fit and its rollouts, and resuming in the middle of either.
"""

import copy
import math
import shutil

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, load_script, new_learner, random_episodes, short
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
from runs import at_update, place, record, stop

pytest.register_assert_rewrite("dynamics")
import dynamics  # noqa: E402

mopo = load_script("offline/mopo.py")


def make(**fields):
    """MOPO with small networks of fixed weights; the target's differ from the critic's. alpha is 0.3."""
    config = mopo.Config(**{**dynamics.SMALL, **fields})
    learner = fix_weights(new_learner(mopo, config, OBS, ACT), 4)
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


@pytest.mark.equation(1)
@pytest.mark.parametrize(
    ("raw", "bounded"), [(0, -0.4740041), (-5, -4.9973357), (10, 0.4999527), (-30, -9.9999999979)]
)
def test_the_soft_bounds(raw, bounded):
    """Between -10 and 0.5 as they are at first."""
    model = mopo.DynamicsEnsemble(1, 1, 4, 2, 1)
    with torch.no_grad():
        model.layers[-1].weight.zero_()
        model.layers[-1].bias.fill_(raw)
        _, log_var = model(torch.zeros(3, 1), torch.zeros(3, 1))
    assert log_var.shape == (2, 3, 2)
    np.testing.assert_allclose(log_var, bounded, atol=2e-6)


@pytest.mark.equation(2)
def test_model_loss(rows):
    dynamics.check_model_loss(make(), rows)


@pytest.mark.equation(2)
@pytest.mark.parametrize(("error", "log_var", "loss"), [(0, 0.0, 0.0), (1, 0.0, 1.0), (2, 1.0, 2.471518)])
def test_likelihood_in_closed_form(error, log_var, loss):
    """e^2 exp(-v) + v, and its slope in v is 0 where v = ln e^2."""
    model = mopo.DynamicsEnsemble(1, 1, 4, 1, 1)
    rows = {name: torch.zeros(1, 5, 1) for name in ("observations", "actions", "next_observations")}
    rows |= {"rewards": torch.zeros(1, 5), "terminations": torch.zeros(1, 5)}

    def loss_of(error: float, log_var: torch.Tensor) -> torch.Tensor:
        model.forward = lambda *_: (torch.full((1, 5, 2), float(error)), log_var.expand(1, 5, 2))
        return model.loss(rows)

    for part in model.parameters():
        part.data.zero_()  # no decay, no distance of the bounds, and a classifier that knows nothing
    found = loss_of(error, torch.tensor(log_var)).item() - math.log(2)
    assert found == pytest.approx(loss, abs=1e-6)
    if error:
        best = torch.tensor(math.log(error**2), requires_grad=True)
        assert torch.autograd.grad(loss_of(error, best), best)[0].item() == pytest.approx(0, abs=1e-6)
        for other in (best + 0.1, best - 0.1):
            assert loss_of(error, other) > loss_of(error, best)


@pytest.mark.equation(3)
def test_a_step_in_the_model(rows, monkeypatch):
    dynamics.check_step(make(), rows, monkeypatch)


def test_the_elites_are_those_of_the_least_held_out_error(batch):
    learner = make(ensemble=7, elites=5, model_epochs=3)
    learner.model.error.copy_(torch.tensor([0.3, 0.1, 0.5, 0.2, 0.4, 0.7, 0.6]))
    learner.model.epoch.fill_(3)
    assert list(mopo.fit_model(learner, batch)) == []
    assert learner.model.elites.tolist() == [1, 3, 0, 4, 2]


@pytest.fixture(scope="module")
def pendulum_data(scripts, pendulum):
    """Of 1,000 random steps."""
    episodes, _ = mopo.read_episodes(minari.load_dataset(pendulum))
    scaler = mopo.fit_scaler(episodes, gym.spaces.Box(-2, 2, (1,)), False)
    return mopo.transitions(episodes, scaler), scaler


def held_out_errors(model, data) -> np.ndarray:
    """Mean squared error of each member, in NumPy."""
    rows, rest = mopo.split_rows(len(data["rewards"]))
    assert (len(rows), len(rest), len({*rows, *rest})) == (200, 800, 1000)
    own = {name: column.numpy()[rows].astype(np.float64) for name, column in data.items()}
    mean, _ = model(torch.tensor(own["observations"]).float(), torch.tensor(own["actions"]).float())
    change = own["next_observations"] - own["observations"]
    y = np.concatenate([change, own["rewards"][:, None]], axis=1)
    return np.mean((mean.detach().numpy() - y) ** 2, axis=(1, 2))


def test_every_member_ends_with_its_best_layers(pendulum_data):
    """In large steps errors go up and down."""
    data, scaler = pendulum_data
    fields = {"model_hidden_dim": 8, "model_lr": 0.03, "batch_size": 64, "ensemble": 4, "elites": 2}
    torch.manual_seed(0)
    learner = mopo.MOPO(mopo.Config(**fields, model_epochs=15, seed=3), scaler)
    found = [held_out_errors(learner.model, data) for _ in mopo.fit_model(learner, data)]
    best = np.full(4, np.inf)
    for errors in found:
        best = np.where(errors < 0.99 * best, errors, best)
    assert len(found) == 15
    assert np.any(found[-1] > 1.001 * best)  # the last epoch was not each one's best
    np.testing.assert_allclose(held_out_errors(learner.model, data), best, rtol=1e-4)
    np.testing.assert_allclose(learner.model.error, best, rtol=1e-4)
    assert learner.model.elites.tolist() == np.argsort(best)[:2].tolist()
    inputs = torch.cat([data["observations"], data["actions"]], 1)
    np.testing.assert_allclose(learner.model.mean, inputs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(learner.model.std, inputs.std(0), rtol=1e-5)


@pytest.mark.parametrize(("batch_size", "patience"), [(2, 5), (80, 200)])
def test_the_fit_ends_when_no_member_gets_better(pendulum_data, monkeypatch, batch_size, patience):
    """Five epochs long, and 2,000 batches: here of 400 batches, and of 10. The first is better than none."""
    data, scaler = pendulum_data
    fields = {"model_hidden_dim": 2, "batch_size": batch_size, "ensemble": 2, "elites": 1}
    learner = mopo.MOPO(mopo.Config(**fields), scaler)
    monkeypatch.setattr(mopo, "descend", lambda *_: None)
    learner.model_loss = lambda rows: (None, {})
    assert len(list(mopo.fit_model(learner, data))) == 1 + patience
    learner.model.idle.fill_(0)
    fit = mopo.fit_model(learner, data)
    next(fit)
    learner.model.error[1] /= 0.98  # now it gets better, by 2 %
    next(fit)
    assert learner.model.idle == 0
    learner.model.error[1] /= 0.995  # by half of a per cent
    next(fit)
    assert learner.model.idle == 1


def test_members_see_rows_of_their_own_and_never_the_held_out(batch, pendulum_data):
    """Each its own draw with replacement, of the same rows in every epoch, in another order."""
    data, scaler = pendulum_data
    fields = {"model_hidden_dim": 3, "model_epochs": 2, "batch_size": 100, "ensemble": 2, "elites": 1}
    learner = mopo.MOPO(mopo.Config(**fields, seed=3), scaler)
    numbers = torch.arange(1000.0)
    marked, seen, loss = data | {"rewards": numbers}, [], learner.model_loss
    learner.model_loss = lambda rows: (seen.append(rows["rewards"].clone()), loss(rows))[1]
    assert len(list(mopo.fit_model(learner, marked))) == 2
    assert len(seen) == 16  # 8 batches of 100 rows an epoch
    epochs = [torch.cat(seen[:8], 1).numpy(), torch.cat(seen[8:], 1).numpy()]  # [E, 800]
    _, rest = mopo.split_rows(1000)
    assert {*epochs[0].flat} <= {*rest.astype(float)}
    assert 0.55 < len({*epochs[0][0]}) / 800 < 0.71  # 1 - 1/e
    assert {*epochs[0][0]} != {*epochs[0][1]}
    assert not np.array_equal(*epochs)
    np.testing.assert_array_equal(np.sort(epochs[0]), np.sort(epochs[1]))


def test_the_model_learns_a_pendulum(pendulum_data):
    """Its error is below 2 % of the variance, after five steps too; in far states it is less certain."""
    data, scaler = pendulum_data
    data = data | {"rewards": data["rewards"] / 10}  # as large as the changes of the state
    torch.manual_seed(0)
    fields = {"model_hidden_dim": 32, "model_epochs": 40, "batch_size": 32, "model_lr": 3e-3}
    learner = mopo.MOPO(mopo.Config(**fields, ensemble=4, elites=3), scaler)
    assert list(mopo.fit_model(learner, data))
    y = learner.model.targets(data)
    errors = mopo.model_errors(learner.model, data)
    assert (torch.tensor(errors["error_1"]) < 0.02 * y.var(0)).all()
    assert np.mean(errors["error_5"][:3]) < 0.02 * data["observations"].var(0).mean()
    far = {"observations": data["observations"] * 4, "actions": data["actions"]}
    usual, unusual = learner.penalty_on(data).mean(), learner.penalty_on(far).mean()
    assert unusual > 2 * usual > 0


def test_errors_by_dimension_are_those_of_unbroken_segments(pendulum_data):
    """Of a model that says 'nothing changes and the reward is 2': how far one to five steps lead."""
    data, scaler = pendulum_data
    learner = mopo.MOPO(mopo.Config(ensemble=2, elites=1, model_hidden_dim=3), scaler)
    with torch.no_grad():
        learner.model.layers[-1].weight.zero_()
        learner.model.layers[-1].bias.zero_()
        learner.model.layers[-1].bias[:, :, 3] = 2.0
    rows = {name: column.numpy() for name, column in data.items()}
    found = mopo.model_errors(learner.model, data)
    assert found.keys() == {f"error_{step}" for step in range(1, 6)}
    for step in range(1, 6):
        squares = []
        for row in mopo.split_rows(1000)[0]:
            if row % 100 <= 100 - step:  # episodes have 100 steps
                change = rows["next_observations"][row + step - 1] - rows["observations"][row]
                squares.append([*change**2, (rows["rewards"][row + step - 1] - 2) ** 2])
        np.testing.assert_allclose(found[f"error_{step}"], np.mean(squares, axis=0), rtol=1e-4)
    short = {name: column[::2] for name, column in data.items()}  # no row leads to the next
    assert mopo.model_errors(learner.model, short).keys() == {"error_1"}


def test_the_elites_mean_is_what_errs(pendulum_data):
    """Members say 1, 2 and 30 of the reward, the last of which is no elite."""
    data, scaler = pendulum_data
    learner = mopo.MOPO(mopo.Config(ensemble=3, elites=2, model_hidden_dim=3), scaler)
    with torch.no_grad():
        learner.model.layers[-1].weight.zero_()
        learner.model.layers[-1].bias[:, 0, 3] = torch.tensor([1.0, 2.0, 30.0])
    held_out = data["rewards"][mopo.split_rows(1000)[0]]
    found = mopo.model_errors(learner.model, data)["error_1"][3]
    assert found == pytest.approx((held_out - 1.5).square().mean().item(), rel=1e-4)


def test_what_is_logged_of_penalties():
    """Mean and 95th percentile, in any order; of one value it is that."""
    values = torch.arange(1.0, 101.0)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    found = mopo.spread("model/penalty_data", values)
    assert {name: value.item() for name, value in found.items()} == {
        "model/penalty_data": 50.5, "model/penalty_data_p95": 95.0
    }
    assert mopo.spread("u", torch.tensor([3.0]))["u_p95"] == 3.0


def test_where_imagined_episodes_end():
    """Also the difference from the authors' code: -101 is as far as 101."""
    dynamics.check_ends(mopo)


def test_the_classifier_learns_ends():
    """Of a line beyond 1, and says so in the model's units."""
    rng = np.random.default_rng(0)
    states = torch.tensor(rng.normal(3, 2, size=(2000, 1)), dtype=torch.float32)
    after = states + 0.1
    data = {"observations": states, "next_observations": after, "actions": torch.zeros(2000, 1)}
    data |= {"rewards": torch.zeros(2000), "terminations": (after[:, 0] > 4).float()}
    torch.manual_seed(0)
    config = mopo.Config(ensemble=2, elites=1, model_hidden_dim=8, model_epochs=15, batch_size=64)
    learner = new_learner(mopo, config, 1, 1)
    list(mopo.fit_model(learner, data))
    asked = torch.tensor([[-2.0], [3.0], [3.8], [4.2], [6.0]])
    assert learner.model.ends(asked).tolist() == [False, False, False, True, True]


# ---------------------------------------------- the penalty ----------------------------------------------


@pytest.mark.equation(4)
def test_the_penalty_is_the_largest_norm_of_all_members():
    learner = make(penalty_weight=0.5)
    std = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])
    assert learner.penalty(std).tolist() == [5.0]
    more = torch.cat([std, torch.tensor([[[2.0, 4.0]]])])
    assert learner.penalty(more).tolist() == [5.0]
    two = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]])  # every row has its own
    assert learner.penalty(two).tolist() == [5.0, 2.0]


@pytest.mark.equation(4)
@pytest.mark.parametrize(("weight", "reward"), [(0.5, -1.5), (0.0, 1.0)])
def test_imagined_rewards_are_lowered(batch, weight, reward):
    learner = make(penalty_weight=weight)
    std = torch.tensor([[[3.0, 4.0]] * 3, [[1.0, 0.0]] * 3])
    ahead = torch.tensor([[0.0] * OBS, [1.0] * OBS, [2.0] * OBS])
    learner.model.step = lambda *_: (ahead, torch.ones(3), std, std)
    rows = learner.imagine(batch["observations"], batch["actions"], lambda s: s[:, 0] > 0.5)
    assert rows["rewards"].tolist() == [reward] * 3
    assert rows["penalty"].tolist() == [5.0] * 3
    assert rows["terminations"].tolist() == [0.0, 1.0, 1.0]
    assert torch.equal(rows["next_observations"], ahead)
    assert torch.equal(rows["observations"], batch["observations"])
    assert torch.equal(rows["actions"], batch["actions"])


def test_the_penalty_of_the_data(rows, batch):
    """Of drawn rows; every member counts, elite or not."""
    learner = make()
    data = {name: column[:1].repeat(5, *[1] * (column.ndim - 1)) for name, column in batch.items()}
    layers, scale = weights(learner.model), dynamics.scale_of(learner.model)
    _, log_var = dynamics.predictions(layers, scale, rows["observations"][:1], rows["actions"][:1])
    wanted = max(math.sqrt(np.exp(log_var[k, 0]).sum()) for k in range(3))
    np.testing.assert_allclose(learner.penalty_on(data), [wanted] * 1024, rtol=1e-5)


# ------------------------------------------ what the penalty is for -----------------------------------------

# A corridor: a step moves by a quarter of the action and earns y |y| where it leads to y: the right is good.
# At PIT it ends with FALL. The data are steps around -0.3 that never go beyond 1: none shows the pit,
# and the model believes that rewards go on growing there.
PIT, FALL = 1.5, -10.0


def walks(seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    x, actions = rng.normal(-0.3, 0.5, size=800), rng.uniform(-1, 1, size=800)
    y = x + 0.25 * actions
    rewards = y * np.abs(y) + rng.normal(scale=0.02, size=800)
    seen = (np.abs(x) < 1) & (np.abs(y) < 1)
    columns = {"observations": x[:, None], "actions": actions[:, None], "rewards": rewards}
    columns |= {"next_observations": y[:, None], "terminations": np.zeros(800)}
    return {name: torch.tensor(column[seen], dtype=torch.float32) for name, column in columns.items()}


def walk(act) -> tuple[float, float]:
    """Mean return of 20 steps in the corridor itself, from all over the data, and the share that fell."""
    x, fallen, returns = np.linspace(-1, 1, 21), np.zeros(21, bool), np.zeros(21)
    for _ in range(20):
        x = np.maximum(x + 0.25 * act(x[:, None])[:, 0], -1)
        falls = (x > PIT) & ~fallen
        returns += np.where(falls, FALL, np.where(fallen, 0, x * np.abs(x)))
        fallen |= falls
    return returns.mean(), fallen.mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_penalty_keeps_the_policy_from_where_nobody_was(seed):
    """The model is right on the data, and less sure of itself off them; without penalty the policy falls."""
    data, scaler = walks(seed), mopo.Scaler(np.zeros(1), np.ones(1), -np.ones(1), np.ones(1))
    fields = {"ensemble": 5, "elites": 3, "model_hidden_dim": 32, "model_lr": 3e-3, "model_epochs": 30}
    fields |= {"hidden_dim": 32, "actor_lr": 3e-3, "critic_lr": 3e-3, "tau": 0.05, "discount": 0.8}
    fields |= {"batch_size": 64, "rollout_batch": 200, "updates": 300, "seed": seed}
    torch.manual_seed(seed)
    fitted = mopo.MOPO(mopo.Config(**fields), scaler)
    assert list(mopo.fit_model(fitted, data))
    assert fitted.model.error[fitted.model.elites].mean() < 0.02 * fitted.model.targets(data).var(0).mean()
    beyond = {"observations": torch.linspace(PIT, 2, 50)[:, None], "actions": torch.zeros(50, 1)}
    assert fitted.penalty_on(beyond).min() > 4 * fitted.penalty_on(data).mean()
    returns = []
    for weight in (10.0, 0.0):
        torch.manual_seed(seed)
        learner = mopo.MOPO(mopo.Config(**fields, penalty_weight=weight), scaler)
        learner.model.load_state_dict(fitted.model.state_dict())
        batches = mopo.draw_batches(data, 64, seed, 0)
        for update in range(300):
            if update % 50 == 0:
                mopo.renew_rollouts(learner, data, mopo.far_ends)
            learner.update(mopo.mix(next(batches), learner.rollouts.rows, 0.05))
        mean, fallen = walk(learner.act)
        returns.append(mean)
        assert (fallen < 0.1) if weight else (fallen > 0.9)
    assert returns[0] > returns[1] + 2.5


# ------------------------------------------------- rollouts -------------------------------------------------


def imagined(learner, data, ends) -> list[dict]:
    """The blocks of one renewal, step by step."""
    steps, imagine = [], learner.imagine
    learner.imagine = lambda *inputs: (steps.append(imagine(*inputs)), steps[-1])[1]
    mopo.renew_rollouts(learner, data, ends)
    return steps


def test_rollouts_start_in_the_data_go_on_and_end(batch):
    learner = make(rollout_batch=50, rollout_length=4)
    steps = imagined(learner, batch, lambda s: s[:, 0] > 1.0)
    assert len(steps) == 4
    starts = {tuple(row) for row in batch["observations"].tolist()}
    assert {tuple(row) for row in steps[0]["observations"].tolist()} == starts
    for before, after in zip(steps, steps[1:]):
        going_on = before["next_observations"][before["next_observations"][:, 0] <= 1.0]
        assert torch.equal(going_on, after["observations"])
    assert 0 < len(steps[-1]["rewards"]) < len(steps[0]["rewards"])  # some have ended
    rows = learner.rollouts.rows
    assert len(rows["rewards"]) == sum(len(step["rewards"]) for step in steps)
    assert rows["actions"].abs().max() <= 1


def test_rollouts_that_have_all_ended():
    learner = make(rollout_batch=5, rollout_length=4)
    states = {"observations": torch.zeros(3, OBS), "rewards": torch.zeros(3)}
    assert len(imagined(learner, states, lambda s: torch.ones(len(s), dtype=torch.bool))) == 1
    assert len(learner.rollouts.rows["rewards"]) == 5


def test_without_a_rule_the_classifier_ends_them(batch):
    learner = make(rollout_batch=5, rollout_length=3)
    learner.model.ends = lambda s: torch.ones(len(s), dtype=torch.bool)
    assert len(imagined(learner, batch, None)) == 1


@pytest.mark.parametrize("kept", [1, 3])
def test_the_latest_renewals_are_kept(kept):
    rollouts = mopo.Rollouts(kept, torch.device("cpu"))
    for number in range(5):
        rollouts.add({"rewards": torch.tensor([float(number)])})
    assert rollouts.rows["rewards"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0][-kept:]
    other = mopo.Rollouts(kept, torch.device("cpu"))
    other.add({"rewards": torch.tensor([9.0])})
    other.load_state_dict(rollouts.state_dict())
    assert torch.equal(other.rows["rewards"], rollouts.rows["rewards"])


@pytest.mark.parametrize(("ratio", "real"), [(0.05, 1), (0.5, 10), (0.0, 1), (1.0, 19)])
def test_a_mixed_batch(ratio, real):
    """The data's rows first; at least one of each kind. What only imagined rows have stays out."""
    batch = {"rewards": torch.arange(20.0), "actions": torch.arange(40.0).view(20, 2)}
    other = {"rewards": -1 - torch.arange(3.0), "actions": -torch.ones(3, 2), "penalty": torch.zeros(3)}
    found = mopo.mix(batch, other, ratio)
    assert found.keys() == batch.keys()
    assert {name: len(column) for name, column in found.items()} == {"rewards": 20, "actions": 20}
    assert torch.equal(found["rewards"][:real], batch["rewards"][:real])
    assert torch.equal(found["actions"][:real], batch["actions"][:real])
    assert {*found["rewards"][real:].tolist()} <= {-1.0, -2.0, -3.0}
    assert (found["actions"][real:] == -1).all()
    assert mopo.real_rows(20, ratio) == real


# ------------------------------------------ the policy's losses ------------------------------------------


@pytest.mark.equation(5, 6)
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
def test_the_actor_follows_the_new_critic(batch, rows, draw):
    learner, rng = make(critic_lr=0.1), np.random.default_rng(6)
    before, noise = weights(learner.actor), [rng.normal(size=(3, ACT)) for _ in range(2)]
    draw(*noise)
    alpha = learner.temperature.log.data.clone()
    learner.update(batch)
    learner.temperature.log.data = alpha
    assert_close(gradients(learner.actor), slopes(actor_oracle(learner, rows, noise[1]), before), 1e-4)


@pytest.mark.equation(8)
@pytest.mark.parametrize(("entropy", "sign"), [(-ACT, 0), (-ACT + 0.5, 1), (-ACT - 0.5, -1), (3.0, 1)])
def test_temperature_gradient(batch, entropy, sign):
    """Also a difference from the paper: the aim is -|A|."""
    learner = make()
    actor_loss, told = learner.actor_loss, {"actor/entropy": torch.tensor(float(entropy))}
    learner.actor_loss = lambda batch: (actor_loss(batch)[0], told)
    before = learner.temperature().item()
    metrics = learner.update(batch)
    assert learner.temperature.log.grad.item() == pytest.approx(entropy + ACT)
    assert np.sign(before - metrics["actor/temperature"].item()) == sign


@pytest.mark.equation(9)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    assert_compiled_is_eager(mopo, [make(tau=0.1), make(tau=0.1)], batch)


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
    dynamics.check_resume(mopo, "mopo", call, pendulum, tmp_path, monkeypatch)
    folder = place(tmp_path / "torn", "mopo", pendulum)
    row = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    shown = {"model/error_1", "model/error_5", "model/penalty_data", "model/penalty_data_p95"}
    assert shown | {"model/penalty_rollouts", "model/penalty_rollouts_p95"} <= {*row}
    assert {name: len(values) for name, values in record(folder)["model_errors"].items()} == {
        f"error_{step}": 4 for step in range(1, 6)
    }


def test_defaults_are_the_differences_that_the_docstring_names():
    assert (mopo.Config().rollout_batch, mopo.Config().rollouts_kept) == (10_000, 5)


def test_a_fitted_model_is_taken_over(call, pendulum, tmp_path, monkeypatch):
    """With its elites, whatever algorithm fitted it; then nothing is fitted."""
    fields = dynamics.SHORT | {"rollouts_kept": 2}
    assert call("mopo", *short(pendulum, tmp_path, **fields))[0] == 0
    source = place(tmp_path, "mopo", pendulum)
    for name in ("mopo", "combo"):
        more = {"variant": "second", "seed": 5, "model_from": source}
        status, out, _ = call(name, *short(pendulum, tmp_path, **fields | more))
        assert status == 0
        assert "epoch" not in out
        folder = place(tmp_path, name, pendulum, "second", 5)
        first, second = (torch.load(path / "checkpoint.pt")["state"] for path in (source, folder))
        for part, value in first["model"].items():
            assert part == "epoch" or torch.equal(value, second["model"][part]), part
        assert not torch.equal(first["actor"]["net.0.weight"], second["actor"]["net.0.weight"])
    torn = short(pendulum, tmp_path, **fields | {"variant": "torn", "model_from": source})
    with monkeypatch.context() as patch:
        at_update(mopo, patch, 30, stop)
        assert call("mopo", *torn)[0] == 130
    shutil.rmtree(source)  # it is not asked for again
    status, out, _ = call("mopo", *torn)
    assert (status, "resumed at update 20\n" in out) == (0, True)


def test_a_model_that_does_not_fit_is_refused(call, pendulum, tmp_path):
    """Other data, other units, another size, or not fitted yet; nothing is written."""
    env = gym.make("Pendulum-v1", max_episode_steps=20)
    other = "test/pendulum/other-v0"
    episodes = random_episodes(env, 5, seed=50)
    minari.create_dataset_from_buffers(other, episodes, env=env, data_format="hdf5")
    fields = dynamics.SHORT | {"rollouts_kept": 2}
    assert call("mopo", *short(other, tmp_path, **fields))[0] == 0
    source, new = place(tmp_path, "mopo", other), tmp_path / "new"
    taken = fields | {"model_from": source}

    def refused(dataset: str, **more) -> str:
        status, _, err = call("mopo", *short(dataset, new, **taken | more))
        assert (status, err.count("\n"), new.exists()) == (2, 1, False)
        return err

    assert "differs in dataset" in refused(pendulum)
    assert "differs in reward_scale" in refused(other, reward_scale=2.0)
    assert "differs in environment" in refused(other, environment="Pendulum-v1")
    assert "differs in ensemble, model_hidden_dim" in refused(other, ensemble=6, model_hidden_dim=9)
    assert "there is no model in" in refused(other, model_from=tmp_path / "nowhere")
    checkpoint = torch.load(source / "checkpoint.pt")
    torch.save(checkpoint | {"updates": 0}, source / "checkpoint.pt")
    assert "is not fitted yet" in refused(other)
    del checkpoint["state"]["model"]["max_log_var"]  # another commit's
    torch.save(checkpoint, source / "checkpoint.pt")
    assert "does not fit this script" in refused(other)
    assert record(source)["status"] == "finished"


# ------------------------------------------------- configs -------------------------------------------------

PUBLISHED = {  # h and lambda of OfflineRL-Kit
    "halfcheetah": {"medium": (5, 0.5), "medium-replay": (5, 0.5), "medium-expert": (5, 2.5)},
    "hopper": {"medium": (5, 5.0), "medium-replay": (5, 2.5), "medium-expert": (5, 5.0)},
    "walker2d": {"medium": (5, 0.5), "medium-replay": (1, 2.5), "medium-expert": (1, 2.5)},
}
PUBLISHED["halfcheetah"]["random"] = (5, 0.5)  # these of the authors' own code
PUBLISHED["hopper"]["random"], PUBLISHED["walker2d"]["random"] = (5, 1.0), (1, 1.0)
NEAREST = {"simple": "medium", "expert": "medium-expert"}
NEAREST |= {"expert-narrow": "medium-expert"}


def test_configs_have_the_published_settings():
    for body, levels in PUBLISHED.items():
        files = (ROOT / "configs/offline/mopo").glob(f"*/{body}/*.yaml")
        configs = [mopo.Config(**yaml.safe_load(file.read_text())) for file in files]
        assert len({config.dataset for config in configs}) == 9
        for config in configs:
            level = config.dataset.split("/")[2].rpartition("-")[0]
            wanted = levels[NEAREST.get(level, level)]
            assert (config.rollout_length, config.penalty_weight) == wanted, config
