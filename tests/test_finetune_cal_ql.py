"""algorithms/finetune/cal_ql.py: CQL where V is low; its floor where it is not; the data's returns."""

import inspect
import math

import gymnasium as gym
import minari
import numpy as np
import pytest
import test_cql
import torch
from conftest import load_script, new_learner, random_episodes
from oracles import ACT, OBS, assert_compiled_is_eager, assert_loss_and_gradient, q_values, weights
from test_cql import (  # noqa: F401
    Draws,
    N,
    draws,
    test_actor_loss,
    test_at_its_threshold_the_penalty_is_zero_and_the_multiplier_stays,
    test_critic_loss,
    test_gap_of_equal_values_by_form,
    test_max_target_backup_is_the_best_action_by_the_lesser_critic,
    test_multiplier_gradient,
    test_temperature_gradient,
    test_the_first_update_already_descends_the_actors_loss_on_the_new_critic,
    test_the_mean_acts,
)
from torch import nn

cal_ql, cql = load_script("finetune/cal_ql.py"), load_script("finetune/cql.py")


@pytest.fixture(autouse=True)
def finetuned(monkeypatch):
    """From now on the imported tests test this script."""
    monkeypatch.setattr(test_cql, "cql", cal_ql)


@pytest.fixture
def batch(batch) -> dict[str, torch.Tensor]:
    """V is below every Q: so the imported tests, which are CQL's, say that Cal-QL is CQL then."""
    return batch | {"returns_to_go": torch.full((3,), cal_ql.UNKNOWN)}


def test_the_imported_tests_test_this_script():
    assert type(test_cql.make()) is cal_ql.CalQL


# ----------------------------------------------- the floor ------------------------------------------------


@pytest.mark.equation(6, 9)
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_the_floor_lies_under_the_policys_actions_and_not_under_the_uniform_ones(
    batch, rows, draws, temperature  # noqa: F811
):
    """max(Q, V) before the density is taken off, in NumPy; V is above some values and below others."""
    learner = test_cql.make(discount=0.9, cql_weight=3.0, cql_temperature=temperature)
    floor = [0.4, -0.7, 1.1]
    drawn = Draws(learner, rows, 1)
    sides = set()

    def oracle(layers):
        total = np.zeros((2, 3))
        for number, (actions, density) in enumerate(drawn.candidates):
            q = q_values(layers, rows["observations"], actions)
            if number % 3:  # the first of three is uniform
                sides.update((q > np.array(floor)).ravel().tolist())
                q = np.maximum(q, floor)
            total += (np.exp(q) / density) ** (1 / temperature)
        data = q_values(layers, rows["observations"], rows["actions"])
        gaps = np.mean(temperature * np.log(total) - data, axis=1)
        return np.sum(drawn.errors(layers, 0.9) + 3.0 * gaps)

    draws([drawn.target, drawn.policies], drawn.uniform)
    batch["returns_to_go"] = torch.tensor(floor)
    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.target_critic, learner.temperature, learner.multiplier]
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    assert sides == {True, False}
    assert 0 < metrics["critic/floored"].item() < 1


class Recorder(nn.Module):
    """Keeps the values that a critic gives, with their gradients."""

    def __init__(self, critic: nn.Module):
        super().__init__()
        self.critic, self.seen = critic, []

    def forward(self, *inputs):
        q = self.critic(*inputs)
        q.retain_grad()
        self.seen.append(q)
        return q


def pushes(batch, floor: float) -> np.ndarray:
    """Slopes of the loss in Q of the sampled actions, by their kind: uniform, pi(s), pi(s')."""
    learner = test_cql.make(cql_weight=1.0)
    learner.critic = Recorder(learner.critic)
    torch.manual_seed(0)
    learner.critic_loss(batch | {"returns_to_go": torch.full((3,), floor)})[0].backward()
    return learner.critic.seen[1].grad.view(2, N, 3, 3).abs().sum((0, 1, 3)).numpy()


@pytest.mark.equation(9)
def test_above_every_q_the_floor_takes_all_push_down_from_the_policys_actions(batch):
    """Every Q here is below 10: only those of uniform actions are pushed, if less than beside lower ones."""
    uniform, *policies = pushes(batch, 10.0)
    assert policies == [0.0, 0.0]
    assert uniform > 1e-6
    assert (pushes(batch, cal_ql.UNKNOWN) > 1e-3).all()


@pytest.mark.equation(9)
def test_without_a_floor_it_is_cql_to_the_bit(batch):
    """After five updates as well: all networks, and the multiplier."""
    twins = []
    for script in (cal_ql, cql):
        torch.manual_seed(1)
        config = script.Config(hidden_dim=8, cql_actions=3, lagrange_gap=1.0)
        learner = new_learner(script, config, OBS, ACT)
        for _ in range(5):
            learner.update(batch)
        twins.append(learner)
    for name in ("actor", "critic", "target_critic", "temperature", "multiplier"):
        for one, other in zip(*(weights(getattr(learner, name)) for learner in twins)):
            np.testing.assert_array_equal(one, other)


def test_it_differs_from_cql_by_the_calibration_alone():
    """All other methods and fields are the same, and of the critic's loss so are all lines but three."""
    assert inspect.getsource(cal_ql.Config).splitlines()[3:] == inspect.getsource(cql.Config).splitlines()[3:]
    methods = [name for name in vars(cql.CQL) if callable(getattr(cql.CQL, name)) and name != "critic_loss"]
    assert {"update", "actor_loss", "gap", "act"} <= {*methods}
    for name in ("update", "actor_loss", "gap", "__init__"):
        ours, theirs = (inspect.getsource(getattr(cls, name)) for cls in (cal_ql.CalQL, cql.CQL))
        assert ours == theirs
    ours, theirs = (inspect.getsource(cls.critic_loss).splitlines() for cls in (cal_ql.CalQL, cql.CQL))
    assert len([line for line in theirs if line not in ours]) == 1
    assert len([line for line in ours if line not in theirs]) == 3


@pytest.mark.equation(5)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    fields = {"tau": 0.1, "lagrange_gap": 1.0}
    batch["returns_to_go"] = torch.tensor([0.4, -0.7, 1.1])
    assert_compiled_is_eager(cal_ql, [test_cql.make(**fields), test_cql.make(**fields)], batch)


# ------------------------------------------ what the data earned ------------------------------------------


@pytest.mark.equation(8)
@pytest.mark.parametrize(
    ("rewards", "terminated", "discount", "wanted"),
    [
        ([1.0, 1.0, 1.0], False, 0.5, [1.75, 1.5, 1.0]),  # of the facts; the episode is cut there
        ([1.0, 1.0, 1.0], True, 0.5, [1.75, 1.5, 1.0]),
        ([-5.0] * 4, False, 0.99, [-500.0] * 4),  # no success: it would have gone on so
        ([-5.0] * 3, True, 0.5, [-8.75, -7.5, -5.0]),  # it would not
        ([-5.0, -5.0, 5.0], False, 0.5, [-6.25, -2.5, 5.0]),  # a success at the end: no -500
        ([-5.0, 5.0, -5.0], False, 0.5, [-3.75, 2.5, -5.0]),  # nor where it comes before
        ([0.0, 0.0], False, 0.9, [0.0, 0.0]),
        ([-1.0, -1.0], False, 1.0, [-2.0, -1.0]),  # without a discount there is no sum of all that follows
        ([2.0], False, 0.99, [2.0]),
    ],
)
def test_returns_to_go(rewards, terminated, discount, wanted):
    found = cal_ql.returns_to_go(np.array(rewards, np.float32), terminated, discount)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.equation(8)
def test_returns_to_go_of_a_long_episode():
    """Of 500 steps: by the definition, with powers of gamma."""
    rewards = np.random.default_rng(0).normal(size=500).astype(np.float32)
    found = cal_ql.returns_to_go(rewards, False, 0.99)
    for step in (0, 250, 499):
        rest = rewards[step:].astype(np.float64)
        assert found[step] == pytest.approx(np.sum(rest * 0.99 ** np.arange(len(rest))), abs=1e-4)


def test_the_rows_of_an_ended_episode_get_their_returns():
    """Also where the buffer has wrapped around, and where the episode is longer than the buffer."""
    for size, wanted in [
        (6, {2: 1 + 0.5 * 4 + 0.25 * 2, 3: 4 + 0.5 * 2, 4: 2.0}),
        (4, {2: 1 + 0.5 * 4 + 0.25 * 2, 3: 4 + 0.5 * 2, 0: 2.0}),
        (2, {1: 4 + 0.5 * 2, 0: 2.0}),
    ]:
        data = {name: torch.zeros(1) for name in ("rewards", "returns_to_go", "terminations")}
        buffer = cal_ql.OnlineBuffer(data, size)
        for reward in (9.0, 9.0, 1.0, 4.0, 2.0):
            buffer.add({"rewards": reward, "returns_to_go": cal_ql.UNKNOWN, "terminations": 0.0})
        cal_ql.set_returns(buffer, 3, 0.5)
        column = buffer.columns["returns_to_go"].tolist()
        assert {row: column[row] for row in wanted} == wanted
        others = [value for row, value in enumerate(column[:5]) if row not in wanted]
        assert others == pytest.approx([cal_ql.UNKNOWN] * len(others), rel=1e-6)


@pytest.mark.parametrize(("termination", "wanted"), [(0.0, [-10.0, -10.0]), (1.0, [-7.5, -5.0])])
def test_an_episode_that_fails_is_valued_by_how_it_ended(termination, wanted):
    """Cut by a time limit it would have gone on; terminated it would not."""
    data = {name: torch.zeros(1) for name in ("rewards", "returns_to_go", "terminations")}
    buffer = cal_ql.OnlineBuffer(data, 4)
    for ended in (0.0, termination):
        buffer.add({"rewards": -5.0, "returns_to_go": cal_ql.UNKNOWN, "terminations": ended})
    cal_ql.set_returns(buffer, 2, 0.5)
    assert buffer.columns["returns_to_go"][:2].tolist() == wanted


@pytest.mark.parametrize("discount", [0.9, 1.0])
def test_a_runs_data_and_buffer_hold_the_returns_of_the_transformed_rewards(
    minari_root, tmp_path, monkeypatch, discount
):
    """The episode under way has none yet: UNKNOWN, below every Q."""
    env, dataset = gym.make("Pendulum-v1", max_episode_steps=10), f"test/calql/pendulum-v{int(discount * 10)}"
    minari.create_dataset_from_buffers(dataset, random_episodes(env, 3), env=env, data_format="hdf5")
    kept = {}

    def mix(data, buffer, config, update):
        kept.update(data=data, buffer=buffer)
        return cal_ql_mix(data, buffer, config, update)

    cal_ql_mix = cal_ql.mix_batches
    monkeypatch.setattr(cal_ql, "mix_batches", mix)
    config = cal_ql.Config(
        dataset=dataset, output_dir=str(tmp_path), updates=2, online_steps=25, hidden_dim=8, batch_size=8,
        cql_actions=2, eval_episodes=1, final_eval_episodes=1, compile=False, device="cpu",
        wandb_mode="disabled", discount=discount, reward_scale=10.0, reward_shift=-5.0,
    )
    cal_ql.train(config)
    torch.set_flush_denormal(False)
    columns = kept["buffer"].columns
    for rewards, values in [
        (kept["data"]["rewards"].numpy(), kept["data"]["returns_to_go"].numpy()),
        (columns["rewards"].numpy()[:20], columns["returns_to_go"].numpy()[:20]),
    ]:
        assert rewards.max() < -5
        for first in range(0, len(rewards), 10):
            own = rewards[first : first + 10].astype(np.float64)
            wanted = [np.sum(own[t:] * discount ** np.arange(10 - t)) for t in range(10)]
            np.testing.assert_allclose(values[first : first + 10], wanted, rtol=1e-4)
    np.testing.assert_allclose(columns["returns_to_go"].numpy()[20:], cal_ql.UNKNOWN)
    assert math.isfinite(float(np.float32(cal_ql.UNKNOWN)))  # a checkpoint takes it
