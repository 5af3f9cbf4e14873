"""Every loss term of QC against NumPy calculations written from the paper's equations."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load_script, new_learner
from oracles import (
    ACT,
    ACTIONS,
    OBS,
    Constant,
    assert_close,
    assert_compiled_is_eager,
    assert_loss_and_gradient,
    bellman,
    endings,
    episode,
    fix_weights,
    gradients,
    moved,
    networks,
    read,
    slopes,
    weights,
)
from test_fql import carried, clip, dense, mean_errors, q_values
from torch import nn

qc = load_script("offline/q_chunking.py")
CHUNK = 2
WIDE = CHUNK * ACT  # entries of a chunk
MORE = [[0.2, 0.9], [-0.5, 0.1], [-0.8, 0.7]]  # each chunk's second action


def make(**fields):
    """QC with small networks of fixed weights; a target's differ from its source's."""
    fields = {"hidden_dim": 4, "hidden_layers": 2, "chunk": CHUNK, "flow_steps": 3, "samples": 3} | fields
    return fix_weights(new_learner(qc, qc.Config(**fields), OBS, ACT), 7)


@pytest.fixture
def batch(batch) -> dict[str, torch.Tensor]:
    """The shared batch, whose actions are the first of chunks of two."""
    return batch | {"actions": torch.cat([batch["actions"], torch.tensor(MORE)], 1)}


@pytest.fixture
def rows(rows) -> dict[str, np.ndarray]:
    return rows | {"actions": np.concatenate([rows["actions"], MORE], 1)}


def normal(seed: int, samples: int = 3, count: int = 3) -> np.ndarray:
    """Noise [count, samples, C] of a first draw after torch.manual_seed(seed), which is done again."""
    torch.manual_seed(seed)
    noise = torch.randn(count * samples, WIDE).numpy().astype(np.float64).reshape(count, samples, WIDE)
    torch.manual_seed(seed)
    return noise


def chosen(actor: list, critic: list, observations: np.ndarray, noise: np.ndarray, steps: int) -> np.ndarray:
    """pi(s) [B, C]: state by state, chunk by chunk."""
    result, picks = [], []
    for s, several in zip(observations, noise):
        drawn = [clip(carried(actor, s[None], z[None], steps)) for z in several]
        values = [q_values(critic, s[None], a).mean() for a in drawn]
        picks.append(int(np.argmax(values)))
        result.append(drawn[picks[-1]][0])
    assert len({*picks}) > 1 or len(picks) < 3  # not always the same of them
    return np.array(result)


# -------------------------------------------------- chunks --------------------------------------------------


def long_episodes() -> list:
    """Seven steps that terminate, one step, three that a time limit cuts; rewards tell the steps apart."""
    rng = np.random.default_rng(3)
    lengths = {7: True, 1: True, 3: False}
    return [
        episode(rng.normal(size=(count + 1, OBS)), 10.0 ** np.arange(count) / 1000, ended)
        for count, ended in lengths.items()
    ]


def chunked(name: str, episodes: list, size: int, discount: float) -> tuple[dict, dict, list]:
    """Chunks as arrays, the same episodes' transitions as arrays, and the episodes as read."""
    recorded = read(qc, f"test/q_chunking/{name}-v0", episodes)
    scaler = qc.fit_scaler(recorded, ACTIONS, False)
    steps = qc.transitions(recorded, scaler)
    data = qc.joined(steps, [len(one["rewards"]) for one in recorded], size, discount)
    arrays = [{key: column.numpy() for key, column in table.items()} for table in (data, steps)]
    return *arrays, recorded


@pytest.mark.equation(1)
@pytest.mark.parametrize(("size", "count"), [(2, 8), (3, 6), (5, 3)])
def test_chunks_lie_within_episodes(minari_root, size, count):
    """The second of the differences from the paper: none crosses an end, none is missing."""
    data, _, recorded = chunked(f"within{size}", long_episodes(), size, 0.5)
    found = 0
    for one in recorded:
        for t in range(len(one["rewards"]) - size + 1):
            np.testing.assert_allclose(data["observations"][found], one["observations"][t])
            np.testing.assert_allclose(data["next_observations"][found], one["observations"][t + size])
            actions = one["actions"][t : t + size].reshape(-1) / 2  # their bounds are -2 and 2
            np.testing.assert_allclose(data["actions"][found], actions)
            wanted = sum(0.5**i * one["rewards"][t + i] for i in range(size))
            assert data["rewards"][found] == pytest.approx(wanted, rel=1e-5)
            assert data["terminations"][found] == one["terminations"][t + size - 1]
            found += 1
    assert found == count == len(data["rewards"])
    assert {*data["terminations"].tolist()} == {0.0, 1.0}


@pytest.mark.equation(1)
def test_a_termination_inside_a_chunk_ends_its_reward(minari_root):
    """The third difference. OGBench's data go on after the goal, which ends an episode of the task."""
    one = long_episodes()[0]
    one.terminations[2] = True  # of seven steps, whose rewards are 0.001, 0.01, ...
    data, _, _ = chunked("inside", [one], 3, 0.5)
    wanted = [0.001 + 0.005 + 0.025, 0.01 + 0.05, 0.1, 1 + 5 + 25, 10 + 50 + 250]
    np.testing.assert_allclose(data["rewards"], wanted, rtol=1e-5)
    assert data["terminations"].tolist() == [1, 1, 1, 0, 1]


@pytest.mark.equation(1)
def test_a_chunk_of_one_is_a_transition(minari_root):
    data, steps, _ = chunked("one", endings(), 1, 0.9)
    assert data.keys() == steps.keys()
    for key, column in data.items():
        np.testing.assert_array_equal(column, steps[key])


def test_episodes_that_are_all_too_short_are_an_error(minari_root):
    with pytest.raises(qc.UserError, match="chunk: no episode has 8 steps"):
        chunked("short", long_episodes(), 8, 0.9)


# --------------------------------------------------- flow ---------------------------------------------------


@pytest.mark.equation(2)
def test_actor_loss(batch, rows):
    learner = make()
    torch.manual_seed(3)
    noise, time = (torch.randn(3, WIDE).numpy(), torch.rand(3, 1).numpy())
    x = rows["actions"] * time + noise * (1 - time)

    def oracle(layers):
        return np.mean((dense(layers, rows["observations"], x, time) - rows["actions"] + noise) ** 2)

    torch.manual_seed(3)
    loss, _ = learner.actor_loss(batch)
    assert_loss_and_gradient(loss, learner.actor, oracle, [learner.critic, learner.target_critic])


@pytest.mark.equation(3)
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_following_the_flow(batch, rows, steps):
    learner, noise = make(flow_steps=steps), normal(4, samples=1)[:, 0]
    wanted = carried(weights(learner.actor), rows["observations"], noise, steps)
    assert 0 < (np.abs(wanted) > 1).mean() < 1
    found = learner.follow_flow(batch["observations"], torch.tensor(noise, dtype=torch.float32))
    assert_close(found.detach().numpy(), clip(wanted))


@pytest.mark.equation(3)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_constant_flow_adds_its_velocity(batch, steps):
    learner, noise = make(flow_steps=steps), torch.tensor([[0.5, -0.3, 0.0, 0.2]] * 3)
    learner.actor = Constant([[0.3, -0.4, 0.9, -3.0]] * 3)
    found = learner.follow_flow(batch["observations"], noise).detach()
    np.testing.assert_allclose(found, [[0.8, -0.7, 0.9, -1.0]] * 3, atol=1e-6)


# -------------------------------------------------- policy --------------------------------------------------


@pytest.mark.equation(4)
def test_the_best_of_the_drawn_chunks_is_chosen(batch, rows):
    learner, noise = make(samples=5), normal(9, 5)
    wanted = chosen(weights(learner.actor), weights(learner.critic), rows["observations"], noise, 3)
    assert_close(learner.choose(batch["observations"]).numpy(), wanted)


@pytest.mark.equation(4)
def test_both_critics_have_their_say(batch):
    """Of (9, -9), (1, 1) and (-9, 3) the mean takes the second, where the first critic alone and the larger
    one take the first; of (2, 2) and (5, 0) the mean takes the second, where the smaller one takes the first.
    """
    learner = make(samples=3)
    drawn = torch.arange(9.0).view(9, 1).expand(9, WIDE) / 9
    learner.follow_flow = lambda observations, noise: drawn
    learner.critic = Constant([[9.0, 1, -9] * 3, [-9.0, 1, 3] * 3])
    assert learner.choose(batch["observations"])[:, 0].tolist() == pytest.approx([1 / 9, 4 / 9, 7 / 9])
    learner.critic = Constant([[2.0, 5, -9] * 3, [2.0, 0, 3] * 3])
    assert learner.choose(batch["observations"])[:, 0].tolist() == pytest.approx([1 / 9, 4 / 9, 7 / 9])


@pytest.mark.equation(4)
def test_with_one_sample_it_is_imitation(batch, rows):
    learner, noise = make(samples=1), normal(5, 1)
    wanted = clip(carried(weights(learner.actor), rows["observations"], noise[:, 0], 3))
    assert_close(learner.choose(batch["observations"]).numpy(), wanted)


@pytest.mark.equation(8)
def test_acts_chunk_by_chunk_in_the_environments_units(rows):
    """Four steps of two chunks, then a new episode: what is left of the third chunk is dropped."""
    learner, noise = make(), normal(6)
    learner.scaler.low, learner.scaler.high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])
    learner.scaler.mean, learner.scaler.std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 0.5])
    actor, critic = weights(learner.actor), weights(learner.critic)
    standard = (rows["observations"] - [0.1, 0.2, 0.3]) / [1.0, 2.0, 0.5]
    plan = chosen(actor, critic, standard, noise, 3).reshape(3, CHUNK, ACT)
    stretch = lambda actions: np.array([-2.0, 0.0]) + (actions + 1) / 2 * np.array([4.0, 10.0])  # noqa: E731
    elsewhere = rows["observations"] + 1
    assert_close(learner.act(rows["observations"], None), stretch(plan[:, 0]))
    assert_close(learner.act(elsewhere, np.ones(3)), stretch(plan[:, 1]))  # without a look at them

    following = chosen(actor, critic, (elsewhere - [0.1, 0.2, 0.3]) / [1.0, 2.0, 0.5], normal(8), 3)
    assert_close(learner.act(elsewhere, np.ones(3)), stretch(following.reshape(3, CHUNK, ACT)[:, 0]))
    normal(6)
    assert_close(learner.act(rows["observations"], None), stretch(plan[:, 0]))  # a new chunk's first
    one = learner.act(rows["observations"][0], None)
    assert one.shape == (ACT,)


class Recorder(gym.Env):
    """Keeps the actions of its episode of five steps; its observation is the number of the step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start, self.step_number = float(self.np_random.uniform(-1, 1)), 0
        return np.array([self.start], np.float32), {}

    def step(self, action):
        self.step_number += 1
        shown = np.array([self.start + self.step_number], np.float32)
        return shown, float(action[0]), False, self.step_number == 5, {}


@pytest.mark.equation(8)
def test_each_environment_carries_out_its_own_chunks(minari_root):
    """What is evaluated: in episodes of five steps, chunks of three, chosen at steps 0 and 3 from there."""
    config = qc.Config(hidden_dim=4, hidden_layers=1, chunk=3, samples=2, flow_steps=2)
    learner, seen = new_learner(qc, config, 1, 1), []

    def choose(observations):
        seen.append(observations[:, 0].numpy().copy())
        return observations + torch.tensor([[0.0, 0.01, 0.02]])  # by which each of them is known

    learner.choose = choose
    kwargs = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    environments = qc.LastRewards(gym.vector.SyncVectorEnv([Recorder] * 10, **kwargs))

    def act(observations):
        return learner.act(observations, environments.rewards)

    table = qc.evaluate(act, environments, 20, (0, 1, 2))
    assert len(seen) == 4  # two in each of two rounds: none goes on with the former round's
    starts = np.concatenate([seen[0], seen[2]])
    np.testing.assert_allclose(np.concatenate([seen[1], seen[3]]), starts + 3, rtol=1e-5)
    assert len({*starts.tolist()}) == 20
    np.testing.assert_allclose(table["return"], 3 * starts + 0.03 + 2 * (starts + 3) + 0.01, rtol=1e-4)


# -------------------------------------------------- critic --------------------------------------------------


def target(learner, rows, noise: np.ndarray) -> np.ndarray:
    """y [B]; the chunk is chosen by the online critics and valued by their targets."""
    following, steps = rows["next_observations"], learner.config.flow_steps
    actions = chosen(weights(learner.actor), weights(learner.critic), following, noise, steps)
    q1, q2 = q_values(weights(learner.target_critic), following, actions)
    return bellman(rows, learner.config.discount**learner.config.chunk, (q1 + q2) / 2)


@pytest.mark.equation(4, 5, 6)
def test_critic_loss(batch, rows):
    learner = make(discount=0.8)
    y = target(learner, rows, normal(14))
    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.target_critic]
    assert_loss_and_gradient(loss, learner.critic, partial(mean_errors, rows=rows, y=y), others)
    q = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(q.mean(), rel=1e-4)


@pytest.mark.equation(5, 6)
@pytest.mark.parametrize(("chunk", "wanted"), [(1, 2.7), (2, 2.43), (5, 3 * 0.59049)])
def test_targets_are_discounted_by_the_chunks_steps(batch, chunk, wanted):
    """Of 2 and 4 the mean is 3; 0.9^5 is 0.59049."""
    learner = make(discount=0.9, chunk=chunk)
    learner.choose = lambda observations: torch.zeros(3, chunk * ACT)
    learner.target_critic = Constant([[2.0] * 3, [4.0] * 3])
    learner.critic = Constant([[0.0] * 3, [1.0] * 3])
    batch |= {"rewards": torch.zeros(3), "terminations": torch.zeros(3)}
    assert learner.critic_loss(batch)[0].item() == pytest.approx((wanted**2 + (wanted - 1) ** 2) / 2)


# -------------------------------------------------- update --------------------------------------------------


@pytest.mark.equation(2, 6, 7)
def test_all_gradients_are_of_the_networks_before_the_update(batch, rows):
    learner = make(tau=0.1, actor_lr=0.1, critic_lr=0.1)
    before = {name: weights(network) for name, network in networks(learner).items()}
    torch.manual_seed(7)
    z, time = torch.randn(3, WIDE).numpy().astype(float), torch.rand(3, 1).numpy().astype(float)
    noise = torch.randn(9, WIDE).numpy().astype(float).reshape(3, 3, WIDE)
    x, y = time * rows["actions"] + (1 - time) * z, target(learner, rows, noise)

    def actor_oracle(layers):
        return np.mean((dense(layers, rows["observations"], x, time) - (rows["actions"] - z)) ** 2)

    torch.manual_seed(7)
    learner.update(batch)
    assert_close(gradients(learner.actor), slopes(actor_oracle, before["actor"]), 1e-4)
    critic_oracle = partial(mean_errors, rows=rows, y=y)
    assert_close(gradients(learner.critic), slopes(critic_oracle, before["critic"]), 1e-4)
    mixed = [0.9 * a + 0.1 * b for a, b in zip(before["target_critic"], weights(learner.critic))]
    assert_close(weights(learner.target_critic), mixed, 1e-6)


@pytest.mark.equation(7)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    twins = [make(tau=0.1, flow_steps=2, hidden_layers=1) for _ in range(2)]
    assert_compiled_is_eager(qc, twins, batch)


@pytest.mark.parametrize(("rate", "moving"), [("actor_lr", ["actor"]), ("critic_lr", ["critic"])])
def test_an_optimiser_moves_its_own_network_only(batch, rate, moving):
    rates = {name: 0.01 * (name == rate) for name in ("actor_lr", "critic_lr")}
    assert moved(make(tau=0.0, **rates), batch, 2) == moving


def test_only_the_critic_is_normalised():
    learner = make()
    kinds = {name: {type(layer) for layer in net.modules()} for name, net in networks(learner).items()}
    assert qc.EnsembleLayerNorm in kinds["critic"]
    assert not {qc.EnsembleLayerNorm, nn.LayerNorm} & kinds["actor"]


def test_defaults_are_the_papers():
    config = qc.Config()
    wanted = {"updates": 1_000_000, "batch_size": 256, "hidden_dim": 512, "hidden_layers": 4, "tau": 0.005}
    wanted |= {"actor_lr": 3e-4, "critic_lr": 3e-4, "discount": 0.99, "chunk": 5, "samples": 32}
    wanted |= {"flow_steps": 10, "normalize_states": False}
    assert {field: getattr(config, field) for field in wanted} == wanted
