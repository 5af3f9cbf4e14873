"""Decision Transformer: what tokens see, what the loss counts, how it acts, beside plain calculations."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, load_script, new_learner, short
from minari.data_collector import EpisodeBuffer
from runs import SPEED, at_update, equal, stop

dt = load_script("offline/dt.py")


def small(obs_dim: int = 2, act_dim: int = 2, seed: int = 4, **fields):
    """A small DT with random weights large enough to show, biases and norms included, without dropout."""
    fields = {"hidden_dim": 8, "hidden_layers": 2, "context": 3, "dropout": 0.0, "timesteps": 6} | fields
    learner = new_learner(dt, dt.Config(**fields), obs_dim, act_dim)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in learner.actor.named_parameters():
            norm = "norm" in name or name.startswith(f"blocks.{learner.config.hidden_layers}")
            parameter.normal_(mean=float(norm and name.endswith("weight")), std=0.3 if norm else 1.0)
        learner.actor.head.bias.mul_(0.1)
    return learner


def window(rows: int, steps: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    draws = {
        "returns_to_go": rng.normal(size=(rows, steps)) * 1000,
        "observations": rng.normal(size=(rows, steps, 2)),
        "actions": rng.uniform(-1, 1, size=(rows, steps, 2)),
        "timesteps": rng.integers(3, size=(rows, 1)) + np.arange(steps),
        "real": np.ones((rows, steps)),
    }
    return {key: torch.as_tensor(value, dtype=torch.float32) for key, value in draws.items()}


# -------------------------------------------- the transformer ---------------------------------------------


def forward(weights: dict[str, np.ndarray], step_lists: dict, scale: float, layers: int = 2) -> np.ndarray:
    """Actions [K, A] of one window, token by token: (2) and (3) as the paper and GPT-2 have them."""

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def norm(name, x):
        z = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return weights[f"{name}.weight"] * z + weights[f"{name}.bias"]

    tokens = []
    for to_go, observation, action, t in zip(*step_lists.values(), strict=True):
        time = weights["embed_timestep.weight"][min(int(t), len(weights["embed_timestep.weight"]) - 1)]
        tokens.append(linear("embed_return", np.array([to_go / scale])) + time)
        tokens.append(linear("embed_observation", observation) + time)
        tokens.append(linear("embed_action", action) + time)
    x = [norm("norm", token) for token in tokens]
    for layer in range(layers):
        block = f"blocks.{layer}"
        parts = [np.split(linear(f"{block}.qkv", norm(f"{block}.norm1", token)), 3) for token in x]
        mixed = []
        for i, (query, _, _) in enumerate(parts):
            scores = np.array([query @ key / math.sqrt(len(key)) for _, key, _ in parts[: i + 1]])  # the past
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            mixed.append(sum(share * value for share, (_, _, value) in zip(shares, parts)))
        x = [token + linear(f"{block}.out", entry) for token, entry in zip(x, mixed)]
        for i, token in enumerate(x):
            hidden = np.maximum(linear(f"{block}.mlp.0", norm(f"{block}.norm2", token)), 0)
            x[i] = token + linear(f"{block}.mlp.2", hidden)
    outputs = [norm(f"blocks.{layers}", token) for token in x]
    return np.array([np.tanh(linear("head", output)) for output in outputs[1::3]])  # at the observations


def by_hand(learner, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """The same for a batch: [B, K, A]."""
    weights = {key: value.double().numpy() for key, value in learner.actor.state_dict().items()}
    keys = ("returns_to_go", "observations", "actions", "timesteps")
    rows = [{key: batch[key][i].double().numpy() for key in keys} for i in range(len(batch["timesteps"]))]
    return np.stack([forward(weights, row, learner.config.return_scale) for row in rows])


@pytest.mark.equation(2, 3)
def test_outputs_are_those_of_interleaved_tokens_one_after_the_other():
    """Order, embeddings, norms, attention, head; steps 6 and 7 have no embedding and share that of 5."""
    learner, batch = small(), window(3, 3)
    batch["timesteps"][2] += 5
    assert batch["timesteps"].max() >= 6
    found = learner.actor(batch).detach().numpy()
    np.testing.assert_allclose(found, by_hand(learner, batch), atol=2e-5)
    assert np.ptp(found, axis=0).min() > 0.05  # the weights matter
    assert (np.abs(found) < 1).all()


@pytest.mark.parametrize(
    ("key", "steps_after"), [("returns_to_go", 0), ("observations", 0), ("actions", 1), ("timesteps", 0)]
)
def test_a_change_at_t_changes_no_output_before_it(key, steps_after):
    """And it does change those from t on, if maybe not in both rows; an action only those after its own."""
    learner = small(context=5, timesteps=20)
    for t in range(5):
        batch = window(2, 5)
        before = learner.actor(batch)
        batch[key][:, t] += 500 if key == "returns_to_go" else 1
        after = learner.actor(batch)
        first = t + steps_after
        assert torch.equal(before[:, :first], after[:, :first])
        assert ((before[:, first:] - after[:, first:]).abs().amax((0, 2)) > 1e-6).all()


def test_weights_start_as_those_of_the_authors():
    """In the blocks as GPT-2's, elsewhere as torch makes them: uniform, and normal for the timesteps."""
    torch.manual_seed(0)
    actor = new_learner(dt, dt.Config(), 11, 3).actor
    assert len(actor.blocks) == 3 + 1
    for name, parameter in actor.blocks.named_parameters():
        if parameter.ndim == 2:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.05), name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
    assert float(actor.embed_timestep.weight.detach().std()) == pytest.approx(1, rel=0.05)
    for layer in (actor.embed_return, actor.embed_observation, actor.embed_action, actor.head):
        entries = torch.cat([parameter.detach().flatten() for parameter in layer.parameters()])
        assert float(entries.abs().max()) == pytest.approx(layer.in_features**-0.5, rel=0.05)


def test_the_norm_leaves_the_size_of_a_return():
    """At every timestep alike. With biases of 0 a larger return is but a longer vector."""
    torch.manual_seed(0)
    actor, timesteps = new_learner(dt, dt.Config(), 11, 3).actor, torch.arange(1000)
    times = actor.embed_timestep(timesteps)
    low, high = (actor.norm(actor.embed_return(torch.tensor([r])) + times) for r in (3.5, 8.5))
    assert float((high - low).mean(0).square().mean().sqrt()) > 0.1


def test_dropout_is_at_work_in_training_alone(monkeypatch):
    """On the embeddings, in attention and on the branches."""
    learner, batch, rates = small(dropout=0.5), window(2, 3), []
    plain = torch.nn.functional.scaled_dot_product_attention
    noted = lambda *qkv, dropout_p, **options: rates.append(dropout_p) or plain(*qkv, **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    embeddings, *branches = [m for m in learner.actor.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(branches) == 2
    calls = []
    for module in branches:
        module.register_forward_hook(lambda *_: calls.append(1))
    learner.actor(batch)
    assert rates == [0.5, 0.5]
    assert len(calls) == 4  # each block's attention and MLP
    for module in branches:
        module.eval()
    assert not torch.equal(learner.actor(batch), learner.actor(batch))
    embeddings.eval()
    assert torch.equal(learner.actor(batch), learner.actor(batch))  # attention's is off by `noted`
    branches[1].train()
    assert not torch.equal(learner.actor(batch), learner.actor(batch))
    learner.actor.eval()
    np.testing.assert_allclose(learner.actor(batch).detach(), by_hand(learner, batch), atol=2e-5)
    assert rates[-2:] == [0, 0]


# ------------------------------------------------ the loss ------------------------------------------------


def padded() -> dict[str, torch.Tensor]:
    """Three windows, of 3, 2 and 1 real steps."""
    batch = window(3, 3)
    for row, length in enumerate((3, 2, 1)):
        for column in batch.values():
            column[row, length:] = 0
    return batch


@pytest.mark.equation(2, 3, 4)
def test_loss_is_the_mean_over_real_steps():
    learner, batch = small(), padded()
    loss, metrics = learner.actor_loss(batch)
    error = (by_hand(learner, batch) - batch["actions"].double().numpy()) ** 2
    real = [error[0, 0], error[0, 1], error[0, 2], error[1, 0], error[1, 1], error[2, 0]]
    assert loss.item() == pytest.approx(np.mean(real), rel=1e-4)
    assert loss.item() == metrics["actor/loss"].item()
    assert not metrics["actor/loss"].requires_grad


def gradients(learner, batch) -> list[torch.Tensor]:
    parameters = learner.actor.parameters()
    return torch.autograd.grad(learner.actor_loss(batch)[0], list(parameters))


@pytest.mark.equation(4)
def test_padding_changes_nothing():
    """Neither what stands in it nor that it is there; a row of nothing else adds nothing."""
    learner, batch = small(), padded()
    other = {key: torch.where(batch["real"].bool().view(3, 3, *[1] * (column.ndim - 2)), column, 3.0)
             for key, column in batch.items() if key != "real"} | {"real": batch["real"]}
    assert not torch.equal(other["actions"], batch["actions"])
    loss = learner.actor_loss(batch)[0]
    assert torch.equal(loss, learner.actor_loss(other)[0])
    assert all(map(torch.equal, gradients(learner, batch), gradients(learner, other)))
    alone = {key: column[1:2, :2] for key, column in batch.items()}  # the second window without its padding
    np.testing.assert_allclose(
        learner.actor(batch)[1, :2].detach(), learner.actor(alone)[0].detach(), atol=1e-6
    )
    empty = {key: torch.cat([column, torch.zeros_like(column[:1])]) for key, column in batch.items()}
    assert learner.actor_loss(empty)[0].item() == pytest.approx(loss.item(), rel=1e-6)


def test_no_gradient_at_what_follows_the_last_real_observation():
    learner, batch = small(), padded()
    for key in ("returns_to_go", "observations", "actions"):
        batch[key].requires_grad_()
    target = batch["actions"].detach()
    error = (learner.actor(batch) - target).square().mean(-1) * batch["real"]
    error.sum().backward()
    for row, length in enumerate((3, 2, 1)):
        assert (batch["observations"].grad[row, :length] != 0).any(-1).all()
        assert (batch["observations"].grad[row, length:] == 0).all()
        assert (batch["returns_to_go"].grad[row, length:] == 0).all()
        assert (batch["actions"].grad[row, length - 1 :] == 0).all()


def test_first_update_by_hand():
    """Warm-up, clipping, AdamW: the weights decay by lr * decay, and move by lr where a gradient is."""
    fields = {"actor_lr": 0.1, "warmup_updates": 4, "weight_decay": 0.5, "gradient_norm": 0.01}
    learner, batch = small(**fields), padded()
    before = [parameter.detach().clone() for parameter in learner.actor.parameters()]
    slopes = gradients(learner, batch)
    norm = math.sqrt(sum(float(slope.square().sum()) for slope in slopes))
    assert norm > 0.01
    metrics = learner.update(batch)
    assert float(metrics["actor/gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    rate = 0.1 / 4
    for old, slope, new in zip(before, slopes, learner.actor.parameters(), strict=True):
        slope = slope * 0.01 / norm
        expected = old * (1 - rate * 0.5) - rate * slope / (slope.abs() + 1e-8)
        np.testing.assert_allclose(new.detach(), expected, atol=1e-4)  # the clip divides by norm + 1e-6
    moments = [learner.actor_optimizer.state[p]["exp_avg"] for p in learner.actor.parameters()]
    length = math.sqrt(sum(float(moment.square().sum()) for moment in moments))
    assert length == pytest.approx(0.1 * 0.01, rel=1e-3)  # 1 - beta_1 of the gradient as it was cut
    assert learner.updates == 1


def test_small_gradients_are_not_cut():
    learner = small(gradient_norm=1000.0)
    slopes = gradients(learner, padded())
    learner.update(padded())
    moment = learner.actor_optimizer.state[learner.actor.head.weight]["exp_avg"]
    names = [name for name, _ in learner.actor.named_parameters()]
    np.testing.assert_allclose(moment, 0.1 * slopes[names.index("head.weight")], rtol=1e-4, atol=1e-9)


def test_the_step_size_warms_up_along_a_line_and_stays():
    learner, rates = small(actor_lr=1e-3, warmup_updates=4), []
    for _ in range(7):
        rates.append(learner.actor_optimizer.param_groups[0]["lr"])
        learner.update(padded())
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3, 1e-3])


def test_compiled_is_eager():
    learner, batch = small(), padded()
    eager, slopes = learner.actor_loss(batch)[0], gradients(learner, batch)
    assert dt.compile_methods(learner, "actor_loss")
    assert learner.actor_loss(batch)[0].item() == pytest.approx(eager.item(), rel=1e-5)
    for found, expected in zip(gradients(learner, batch), slopes, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


# ---------------------------------------- windows of the episodes -----------------------------------------


def counted(rewards) -> dict[str, torch.Tensor]:
    """What `steps` makes of an episode with these rewards."""
    zeros = np.zeros((len(rewards), 2), np.float32)
    episode = {"observations": np.zeros((len(rewards) + 1, 2), np.float32), "actions": zeros}
    episode |= {"rewards": np.array(rewards, np.float32), "terminations": zeros[:, 0]}
    return dt.steps([episode], small().scaler)


@pytest.mark.equation(1)
def test_returns_to_go():
    ones = counted(np.ones(3))
    assert ones["returns_to_go"].tolist() == [3, 2, 1]
    assert ones["timesteps"].tolist() == [0, 1, 2]
    assert counted([1.0, 2.0, 3.0])["returns_to_go"].tolist() == [6, 5, 3]
    assert counted([0.0, -2.0])["returns_to_go"].tolist() == [-2, -2]
    long = counted(np.full(100_000, 0.1))["returns_to_go"]
    exact = 100_000 * float(np.float32(0.1))
    assert float(long[0]) == pytest.approx(exact, rel=1e-7)  # summed in double precision


LENGTHS = (4, 1, 1, 7, 2, 3)


@pytest.fixture(scope="module")
def pieces(minari_root) -> str:
    """Id of one walk cut into six episodes: each begins where the one before was cut, without any flag."""
    rng, walk, episodes = np.random.default_rng(0), np.cumsum(np.ones((19, 2), np.float32), 0), []
    for first, length in zip(np.cumsum((0, *LENGTHS)), LENGTHS):
        steps = slice(first, first + length)
        flags = {"terminations": np.zeros(length, bool), "truncations": np.zeros(length, bool)}
        episodes.append(
            EpisodeBuffer(
                observations=walk[first : first + length + 1],
                actions=rng.uniform(-1, 1, (length, 2)).astype(np.float32),
                rewards=np.arange(1.0, 19)[steps] if length > 1 else np.array([-5.0]),
                infos={},
                **flags,
            )
        )
    space = gym.spaces.Box(-1, 1, (2,), np.float32)
    spaces = {"observation_space": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), "action_space": space}
    if "test/dt/pieces-v0" not in minari.list_local_datasets():  # test_lamo.py has made it
        minari.create_dataset_from_buffers("test/dt/pieces-v0", episodes, data_format="hdf5", **spaces)
    return "test/dt/pieces-v0"


def loaded(name: str, normalize_states: bool = True) -> tuple:
    """The scaler and the steps of a dataset."""
    dataset = minari.load_dataset(name)
    episodes, _ = dt.read_episodes(dataset)
    scaler = dt.fit_scaler(episodes, dataset.action_space, normalize_states)
    return scaler, dt.steps(episodes, scaler)


def draw(data: dict, batch_size: int, seed: int, update: int, context: int = 3):
    """Windows `update`, `update` + 1, ... as `train` draws them."""
    for batch in dt.draw_batches({"starts": torch.arange(len(data["timesteps"]))}, batch_size, seed, update):
        yield dt.windows(data, batch["starts"], context)


@pytest.mark.equation(1)
def test_a_window_never_crosses_an_episode(pieces):
    _, data = loaded(pieces, normalize_states=False)
    batch = dt.windows(data, torch.arange(18), 3)
    row = 0
    for episode in minari.load_dataset(pieces).iterate_episodes():
        rewards = episode.rewards
        for t in range(len(rewards)):
            inside = range(t, min(t + 3, len(rewards)))
            count = len(inside)
            assert batch["real"][row].tolist() == [1.0] * count + [0.0] * (3 - count)
            assert batch["timesteps"][row].tolist() == [*inside] + [0] * (3 - count)
            returns = [sum(rewards[i:]) for i in inside]
            assert batch["returns_to_go"][row].tolist() == pytest.approx(returns + [0] * (3 - count))
            for key in ("observations", "actions"):
                expected = getattr(episode, key)[t : t + count]
                np.testing.assert_allclose(batch[key][row, :count], expected, atol=1e-6)
                assert (batch[key][row, count:] == 0).all()
            row += 1
    assert row == 18


def test_every_row_begins_as_many_windows(pieces, tmp_path, monkeypatch):
    """So an episode is drawn in proportion to its length, and its windows begin anywhere in it."""
    rows, windows = [], dt.windows

    def noted(data, starts, context):
        if len(starts) == 45:  # a batch of training
            rows.extend(starts.tolist())
        return windows(data, starts, context)

    monkeypatch.setattr(dt, "windows", noted)
    run(pieces, tmp_path, batch_size=45)
    counts = np.bincount(rows, minlength=18)
    assert (len(counts), counts.sum()) == (18, 40 * 45)
    assert (np.abs(counts - 100) < 5 * math.sqrt(100)).all()


def test_windows_depend_on_seed_and_update_alone(pieces):
    _, data = loaded(pieces)
    whole, later = draw(data, 5, 1, 998), draw(data, 5, 1, 1000)
    found = [next(whole) for _ in range(4)]
    torch.manual_seed(7)
    for expected in found[2:]:
        batch = next(later)
        assert batch.keys() == {"returns_to_go", "observations", "actions", "timesteps", "real"}
        assert all(torch.equal(batch[key], expected[key]) for key in batch)
    other = next(draw(data, 5, 2, 1000))
    assert not torch.equal(other["actions"], found[2]["actions"])


def test_drawing_leaves_the_data_alone(pieces):
    learner, (_, data) = small(), loaded(pieces)
    copy = {key: column.clone() for key, column in data.items()}
    next(draw(data, 50, 0, 0))
    learner.act_in_data(data, torch.arange(18))
    assert all(torch.equal(data[key], copy[key]) for key in data)


@pytest.mark.parametrize(("quantile", "target"), [(1.0, 70.0), (0.5, 19.5), (0.0, -5.0)])
def test_the_target_is_a_quantile_of_the_datas_returns(pieces, tmp_path, quantile, target):
    """Returns 10, -5, -5, 7 + ... + 13 = 70, 14 + 15 = 29 and 16 + 17 + 18 = 51; and no environment."""
    found = run(pieces, tmp_path, target_quantile=quantile)
    returns = [10, -5, -5, 70, 29, 51]
    assert float(found.state["state"]["actor"]["target"]) == pytest.approx(np.quantile(returns, quantile))
    assert np.quantile(returns, quantile) == target
    assert found.info["result"] == "not evaluated"
    assert found.evaluations.empty


# ------------------------------------------------- acting -------------------------------------------------


def plain_loop(learner, environment, seed: int) -> tuple[list, list]:
    """One episode alone, its history in lists: (actions, rewards). Weights and scaler are the learner's."""
    scaler, context = learner.scaler, learner.config.context
    observation, _ = environment.reset(seed=seed)
    to_go, over = float(learner.actor.target), False
    steps, rewards, taken = [], [], []
    learner.actor.eval()
    while not over:
        standard = (np.asarray(observation, np.float32) - scaler.mean.numpy()) / scaler.std.numpy()
        steps.append({"returns_to_go": to_go, "observations": standard, "timesteps": len(steps)})
        recent = [dict(step) for step in steps[-context:]]
        recent[-1]["actions"] = np.full(len(scaler.low), 9.0)  # unknown: anything will do
        keys = ("returns_to_go", "observations", "actions", "timesteps")
        batch = {key: np.array([[step[key] for step in recent]], np.float32) for key in keys}
        with torch.no_grad():
            window = {key: torch.as_tensor(column) for key, column in batch.items()}
            steps[-1]["actions"] = learner.actor(window)[0, -1].numpy()
        low, high = scaler.low.numpy(), scaler.high.numpy()
        taken.append(low + (steps[-1]["actions"] + 1) / 2 * (high - low))
        observation, reward, terminated, truncated, _ = environment.step(taken[-1])
        to_go, over = to_go - reward, terminated or truncated
        rewards.append(reward)
    learner.actor.train()
    return taken, rewards


def vector(make, count: int = 10) -> gym.vector.SyncVectorEnv:
    mode = gym.vector.AutoresetMode.SAME_STEP
    return gym.vector.SyncVectorEnv([make] * count, copy=False, autoreset_mode=mode)


def evaluate(learner, make, episodes: int, seed: tuple, count: int = 10) -> pd.DataFrame:
    """The evaluation of `train`: the policy is told the rewards of the step before."""
    environments = dt.LastRewards(vector(make, count))
    act = lambda observations: learner.act(observations, environments.rewards)  # noqa: E731
    return dt.evaluate(act, environments, episodes, seed)


class Walk(gym.Env):
    """5 + seed % 11 steps on a plane; the reward falls with the distance from the origin."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(np.float32([-1, -0.5]), np.float32([0.5, 1]))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.position = 5 + (seed or 0) % 11, self.np_random.normal(size=2)
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.left -= 1
        self.position = self.position + action
        reward = -float(np.abs(self.position).sum())
        return self.position.astype(np.float32), reward, self.left == 0, False, {}


def pendulum_of_15_steps() -> gym.Env:
    return gym.make("Pendulum-v1", max_episode_steps=15)


@pytest.mark.equation(2, 5)
@pytest.mark.parametrize("make", [Walk, pendulum_of_15_steps])
def test_evaluation_is_one_environment_played_with_its_own_history(make):
    """Episodes of many lengths, longer than context and timestep table, and more than environments."""
    alone = make()
    sizes = alone.observation_space.shape[0], alone.action_space.shape[0]
    learner = small(*sizes, context=4, timesteps=8, dropout=0.5, return_scale=10.0)
    learner.actor.target.fill_(-30.0)
    bounds = {"low": alone.action_space.low, "high": alone.action_space.high}
    numbers = {"mean": np.full(sizes[0], 0.1), "std": np.full(sizes[0], 0.5)}
    learner.scaler = dt.Scaler(**bounds, **numbers)
    table = evaluate(learner, make, 13, (0, 5, 1))
    seeds = np.random.SeedSequence((0, 5, 1)).generate_state(23).tolist()
    spread = set()
    for row in table.itertuples():
        actions, rewards = plain_loop(learner, alone, seeds[row.Index])
        assert row.length == len(rewards)
        assert row._1 == pytest.approx(sum(rewards), abs=1e-3)
        spread |= {round(float(action[0]), 2) for action in actions}
    assert len(spread) > 20
    assert make is not Walk or table["length"].nunique() > 5


class Recorder(gym.Env):
    """Rewards 1, 2, ...; an episode of 2 + seed % 3 steps; it shows its seed and step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        self.seed, self.step_number = seed or 0, 0
        return np.array([self.seed % 10, 0.0]), {}

    def step(self, action):
        self.step_number += 1
        observation = np.array([self.seed % 10, float(self.step_number)])
        return observation, float(self.step_number), self.step_number == 2 + self.seed % 3, False, {}


@pytest.mark.equation(5)
def test_the_return_to_go_falls_by_the_rewards_received(monkeypatch):
    """The environment's rewards, in the dataset's units: the network alone divides."""
    learner, seen = small(context=4, return_scale=7.0), []
    learner.actor.target.fill_(50.0)
    monkeypatch.setattr(learner.actor, "forward", lambda batch: (
        seen.append({key: column.clone() for key, column in batch.items()})
        or torch.zeros_like(batch["actions"])))
    evaluate(learner, Recorder, 6, (0, 0, 0), 3)
    starts = [i for i, batch in enumerate(seen) if batch["timesteps"].shape[1] == 1]
    assert starts[0] == 0
    assert len(starts) == 2  # rounds; each begins with nothing remembered
    assert (seen[starts[1]]["returns_to_go"] == 50).all()
    seeds = np.random.SeedSequence((0, 0, 0)).generate_state(9).tolist()
    for row, seed in enumerate(seeds[:3]):
        for t in range(min(2 + seed % 3, starts[1])):
            assert seen[t]["returns_to_go"][row].tolist() == [50 - n * (n + 1) / 2 for n in range(t + 1)]
            assert seen[t]["timesteps"][row].tolist() == [*range(t + 1)]
            assert seen[t]["observations"][row].tolist() == [[seed % 10, n] for n in range(t + 1)]


def test_the_return_scale_is_the_same_in_training_and_in_acting(pieces):
    """Rewards and scale ten times as large: the same loss, the same actions."""
    found = []
    for factor in (1, 10):
        learner = small(return_scale=20.0 * factor)
        learner.scaler, data = loaded(pieces)
        data["returns_to_go"] *= factor
        learner.actor.target.fill_(77.0 * factor)
        loss = float(learner.actor_loss(next(draw(data, 16, 0, 0)))[0])
        rewards = [None, 3.0 * factor, 20.0 * factor]
        acted = [learner.act(np.array([0.1, 0.3]), reward) for reward in rewards]
        in_data = learner.act_in_data(data, torch.arange(18))
        found.append(np.concatenate([[loss], np.ravel(acted), np.ravel(in_data)]))
    np.testing.assert_allclose(*found, rtol=1e-4)
    learner.actor.return_scale /= 10
    acted = [learner.act(np.array([0.1, 0.3]), reward) for reward in rewards]
    assert np.abs(np.ravel(acted) - found[1][1:7]).max() > 1e-3


def test_one_observation_or_a_batch():
    learner, rng = small(context=2), np.random.default_rng(0)
    observations, rewards = rng.normal(size=(4, 3, 2)), [None, *rng.normal(size=(3, 3))]
    batch = [learner.act(o, r) for o, r in zip(observations, rewards)]
    for i in range(3):
        for t in range(4):
            alone = learner.act(observations[t, i], None if t == 0 else rewards[t][i])
            assert alone.shape == (2,)
            np.testing.assert_allclose(alone, batch[t][i], atol=1e-5)
    assert len(learner.history) == 2


def test_evaluation_leaves_no_trace():
    learner = small(3, 1, dropout=0.5)
    make = lambda: gym.make("Pendulum-v1", max_episode_steps=5)  # noqa: E731
    state = torch.get_rng_state()
    first = evaluate(learner, make, 12, (0, 100, 0))
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in learner.actor.modules())
    again = evaluate(learner, make, 12, (0, 100, 0))
    pd.testing.assert_frame_equal(first, again, check_exact=True)


def test_actions_in_the_data_follow_the_datas_own_steps(pieces):
    """Played: the target is asked for at an episode's first step; then rewards and actions are the data's."""
    learner = small(context=3, dropout=0.5, return_scale=20.0)
    learner.scaler, data = loaded(pieces)
    learner.actor.target.fill_(77.0)
    recorded = np.concatenate([episode.rewards for episode in minari.load_dataset(pieces).iterate_episodes()])
    found = learner.act_in_data(data, torch.arange(18))
    played, raw = [], data["observations"] * learner.scaler.std + learner.scaler.mean
    for row in range(18):
        t = int(data["timesteps"][row])
        for step in range(row - t, row + 1):
            reward = None if step == row - t else float(recorded[step - 1])
            action = learner.act(raw[step].numpy(), reward)
            learner.history[-1]["actions"] = data["actions"][step]
        played.append(learner.scaler.scale_actions(action).numpy())
    np.testing.assert_allclose(found, played, atol=1e-5)
    assert learner.actor.training


# -------------------------------------------------- runs --------------------------------------------------


def run(dataset: str, folder, script=dt, **fields) -> SimpleNamespace:
    if script is dt:
        fields = {"context": 4, "actor_lr": 1e-3, "warmup_updates": 30, "dropout": 0.2} | fields
    script.train(script.parse_config(short(dataset, folder, **fields)))
    place = folder / f"offline/{Path(script.__file__).stem}/{dataset}/default/seed-0"
    tables = {name: pd.read_csv(place / f"{name}.csv") for name in ("metrics", "evaluations")}
    info, state = json.loads((place / "run.json").read_text()), torch.load(place / "checkpoint.pt")
    return SimpleNamespace(place=place, info=info, state=state, **tables)


@pytest.fixture(scope="module")
def whole(pendulum, tmp_path_factory) -> SimpleNamespace:
    """A run of 40 updates."""
    return run(pendulum, tmp_path_factory.mktemp("whole"))


def test_an_interrupted_run_ends_in_the_same_bits(pendulum, whole, tmp_path, capsys, monkeypatch):
    """Saved after 20 of 40 updates, with dropout, in the middle of warming up; other evaluations."""
    with monkeypatch.context() as patch:
        at_update(dt, patch, 27, stop)
        with pytest.raises(KeyboardInterrupt):
            run(pendulum, tmp_path)
    resumed = run(pendulum, tmp_path)
    assert "resumed at update 20" in capsys.readouterr().out
    for key in ("updates", "state", "rng"):
        assert equal(whole.state[key], resumed.state[key]), key
    pd.testing.assert_frame_equal(whole.evaluations, resumed.evaluations, check_exact=True)
    pd.testing.assert_frame_equal(whole.metrics.drop(columns=SPEED), resumed.metrics.drop(columns=SPEED))
    assert whole.info["score"] == resumed.info["score"]
    often = run(pendulum, tmp_path / "often", eval_every=10)
    assert equal(whole.state["state"], often.state["state"])


def test_a_finished_policy_plays_as_it_was_evaluated(pendulum, whole):
    """In a loop of five lines: `act` takes an observation and the last reward, None at the beginning."""
    policy, env = dt.load(whole.place), gym.make("Pendulum-v1", max_episode_steps=100)
    assert float(policy.actor.target) == float(whole.state["state"]["actor"]["target"])
    returns = [episode.rewards.sum() for episode in minari.load_dataset(pendulum).iterate_episodes()]
    assert float(policy.actor.target) == pytest.approx(max(returns), rel=1e-6)
    final = whole.evaluations.query("phase == 'final'")
    for number, seed in enumerate(np.random.SeedSequence((0, 40, 1)).generate_state(22).tolist()[:2]):
        (observation, _), reward, over, total = env.reset(seed=seed), None, False, 0.0
        while not over:
            action = policy.act(observation, reward)
            observation, reward, _, over, _ = env.step(action)
            total += reward
        assert total == pytest.approx(final["return"].iloc[number], abs=0.05)
    with pytest.raises(TypeError, match="rewards"):
        policy.act(observation)  # forgetting them is no silent beginning


def test_support_gap_is_that_of_the_policy_after_the_datas_own_steps(pendulum, whole):
    policy, (scaler, data) = dt.load(whole.place), loaded(pendulum)
    assert all(map(torch.equal, scaler.buffers(), policy.scaler.buffers()))
    rows = torch.as_tensor(np.random.default_rng(0).integers(1000, size=1024))
    gaps = (policy.act_in_data(data, rows) - data["actions"][rows]).norm(dim=1)
    assert whole.metrics["actor/support_gap"].iloc[-1] == pytest.approx(float(gaps.mean()), rel=1e-4)


# ------------------------------------------------ learning ------------------------------------------------


class Blind(gym.Env):
    """Eight steps whose reward is the action; the observation is noise and tells nothing."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.np_random.normal(size=2).astype(np.float32), {}

    def step(self, action):
        self.count += 1
        observation = self.np_random.normal(size=2).astype(np.float32)
        return observation, float(np.clip(action[0], -1, 1)), self.count == 8, False, {}


@pytest.fixture(scope="module")
def mixed(minari_root) -> str:
    """A good and a bad policy, 100 episodes each: actions from 0.8 to 0.9, and from -0.9 to -0.8."""
    if "test/Blind-v0" not in gym.registry:
        gym.register("test/Blind-v0", f"{__name__}:Blind", max_episode_steps=8)
    rng, episodes = np.random.default_rng(0), []
    for number in range(200):
        actions = ((-1) ** number * rng.uniform(0.8, 0.9, (8, 1))).astype(np.float32)
        last = np.arange(8) == 7
        episodes.append(
            EpisodeBuffer(
                observations=rng.normal(size=(9, 2)).astype(np.float32),
                actions=actions,
                rewards=actions[:, 0].astype(float),
                terminations=last,
                truncations=np.zeros(8, bool),
                infos={},
            )
        )
    env = gym.make("test/Blind-v0")
    if "test/dt/mixed-v0" not in minari.list_local_datasets():
        minari.create_dataset_from_buffers("test/dt/mixed-v0", episodes, env=env, data_format="hdf5")
    return "test/dt/mixed-v0"


def learn(dataset: str, folder: Path, script=dt, **fields) -> float:
    """Mean return of what the script learns from `dataset` with small networks."""
    small = {"hidden_dim": 32, "batch_size": 64, "actor_lr": 3e-3, "eval_every": 1000}
    return run(dataset, folder, script, **{**small, **fields}).info["return_mean"]


def test_who_is_asked_for_a_high_return_gets_one_where_imitation_gets_the_mean(mixed, tmp_path):
    """And who is asked for a low return gets that: it is the target that steers."""
    assert abs(learn(mixed, tmp_path, load_script("offline/bc.py"), updates=200)) < 1.5
    fields = {"hidden_layers": 1, "warmup_updates": 10, "return_scale": 8.0, "dropout": 0.1, "updates": 150}
    best = learn(mixed, tmp_path / "best", **fields)
    worst = learn(mixed, tmp_path / "worst", **fields, target_quantile=0.0)
    assert best > 8 * 0.8 - 0.3
    assert worst < -8 * 0.8 + 0.3


# ------------------------------------------------ configs -------------------------------------------------


def test_configs_are_those_of_its_sibling_with_the_warm_up_scaled_to_the_updates():
    """A tenth of the updates in both: 1,000 of 10,000, as the published 10,000 of 100,000."""
    folder = ROOT / "configs/offline"
    files = {path.relative_to(folder / "dt") for path in (folder / "dt").rglob("*.yaml")}
    siblings = {path.relative_to(folder / "td3_bc") for path in (folder / "td3_bc").rglob("*.yaml")}
    assert {file for file in files if not file.stem.endswith("-small")} == siblings  # those: for multitask
    for file in files:
        values = yaml.safe_load((folder / "dt" / file).read_text())
        config = dt.Config(**values)
        assert config.updates == (10_000 if values["dataset"].startswith("reef/") else 100_000)
        assert config.warmup_updates == config.updates // 10
        assert config.return_scale == (100 if "maze" in values["dataset"] else 1000)
