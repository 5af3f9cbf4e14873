"""algorithms/discrete/dt.py: what tokens see, what the loss counts, how it acts, by plain calculations."""

import json
import math

import minari
import numpy as np
import pandas as pd
import pytest
import torch
from choices import dt_windows
from conftest import load_script, short
from oracles import Constant

dt = load_script("discrete/dt.py")
KEYS = ("returns_to_go", "observations", "actions", "timesteps")


def small(shape: tuple = (2,), states: int = 0, choices: int = 4, **fields):
    """A small DT with random weights large enough to show, biases and norms included, without dropout."""
    sizes = {"hidden_dim": 8, "hidden_layers": 2, "context": 3, "dropout": 0.0, "timesteps": 6}
    mean = np.zeros(0) if states else np.zeros(shape)
    encoder = dt.Encoder(mean, np.ones_like(mean), states, 5 if states else 0, choices, 10)
    learner = dt.DiscreteDT(dt.Config(**{"return_scale": 2.0} | sizes | fields), encoder)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in learner.actor.named_parameters():
            norm = "norm" in name or name.startswith("blocks.2")
            parameter.normal_(mean=float(norm and name.endswith("weight")), std=0.3 if norm else 1.0)
    return learner


def window(rows: int, steps: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    found = {
        "returns_to_go": rng.normal(size=(rows, steps)),
        "observations": rng.normal(size=(rows, steps, 2)),
        "timesteps": rng.integers(3, size=(rows, 1)) + np.arange(steps),
        "real": np.ones((rows, steps)),
    }
    found = {key: torch.as_tensor(value, dtype=torch.float32) for key, value in found.items()}
    return found | {"actions": torch.as_tensor(rng.integers(4, size=(rows, steps)))}


# -------------------------------------------- the transformer ---------------------------------------------


def forward(weights: dict[str, np.ndarray], steps: dict[str, np.ndarray], scale: float) -> np.ndarray:
    """Logits [K, A] of one window, token by token: (2), and (3) before its softmax, as GPT-2 has them."""

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def norm(name, x):
        z = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return weights[f"{name}.weight"] * z + weights[f"{name}.bias"]

    x = []
    for to_go, observation, action, t in zip(*(steps[key] for key in KEYS), strict=True):
        time = weights["embed_timestep.weight"][min(int(t), len(weights["embed_timestep.weight"]) - 1)]
        x.append(norm("norm", linear("embed_return", np.array([to_go / scale])) + time))
        x.append(norm("norm", linear("embed_observation.0", observation) + time))
        x.append(norm("norm", weights["embed_action.weight"][int(action)] + time))
    for block in ("blocks.0", "blocks.1"):
        parts = [np.split(linear(f"{block}.qkv", norm(f"{block}.norm1", token)), 3) for token in x]
        for i, (query, _, _) in enumerate(parts):
            scores = np.array([query @ key / math.sqrt(len(key)) for _, key, _ in parts[: i + 1]])  # the past
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            x[i] = x[i] + linear(f"{block}.out", sum(s * value for s, (_, _, value) in zip(shares, parts)))
        for i, token in enumerate(x):
            hidden = np.maximum(linear(f"{block}.mlp.0", norm(f"{block}.norm2", token)), 0)
            x[i] = token + linear(f"{block}.mlp.2", hidden)
    return np.array([linear("head", norm("blocks.2", token)) for token in x[1::3]])  # at the observations


def by_hand(learner, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """The same for a batch: [B, K, A]."""
    weights = {key: value.double().numpy() for key, value in learner.actor.state_dict().items()}
    rows = [{key: batch[key][i].double().numpy() for key in KEYS} for i in range(len(batch["timesteps"]))]
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


@pytest.mark.equation(2)
@pytest.mark.parametrize("key", KEYS)
def test_a_change_at_t_changes_no_output_before_it(key):
    """And it does change those from t on; an action only those after its own."""
    learner = small(context=5, timesteps=20)
    for t in range(5):
        batch = window(2, 5)
        before = learner.actor(batch)
        batch[key][:, t] = (batch[key][:, t] + 1) % 4 if key == "actions" else batch[key][:, t] + 1
        after = learner.actor(batch)
        first = t + (key == "actions")
        assert torch.equal(before[:, :first], after[:, :first])
        assert ((before[:, first:] - after[:, first:]).abs().amax((0, 2)) > 1e-6).all()


# ------------------------------------------------ the loss ------------------------------------------------


def padded() -> dict[str, torch.Tensor]:
    """Three windows, of 3, 2 and 1 real steps."""
    batch = window(3, 3)
    batch["real"] = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 0]])
    return batch


@pytest.mark.equation(3, 4)
def test_loss_is_the_mean_log_likelihood_of_real_steps():
    learner, batch = small(), padded()
    loss, metrics = learner.actor_loss(batch)
    logits, logs = by_hand(learner, batch), []
    for row, step in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)):
        pi = np.exp(logits[row, step]) / np.exp(logits[row, step]).sum()
        logs.append(np.log(pi[int(batch["actions"][row, step])]))
    assert loss.item() == pytest.approx(-np.mean(logs), rel=1e-4)
    assert loss.item() == metrics["actor/loss"].item()
    assert not metrics["actor/loss"].requires_grad


@pytest.mark.equation(4)
def test_equal_logits_cost_ln_4_however_much_is_padding():
    learner = small()
    learner.actor = Constant([[[7.0] * 4] * 3] * 3)
    loss, _ = learner.actor_loss(padded())
    assert loss.item() == pytest.approx(math.log(4), abs=1e-6)
    (slope,) = torch.autograd.grad(loss, learner.actor.parameters())
    wanted = np.full(4, 0.25) - np.eye(4)[int(padded()["actions"][0, 1])]
    assert slope[0, 1].tolist() == pytest.approx(wanted / 6, abs=1e-6)
    assert (slope[2, 1:] == 0).all()


def test_what_stands_in_the_padding_changes_nothing():
    learner, batch = small(), padded()
    loss = learner.actor_loss(batch)[0]
    gone = batch["real"] == 0
    for key in KEYS:
        batch[key][gone] = 3
    assert torch.equal(loss, learner.actor_loss(batch)[0])


def test_the_step_size_warms_up_and_gradients_are_cut():
    learner, rates = small(actor_lr=1e-3, warmup_updates=4, gradient_norm=0.01), []
    for _ in range(6):
        rates.append(learner.actor_optimizer.param_groups[0]["lr"])
        metrics = learner.update(padded())
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    assert metrics["actor/gradient_norm"] > 0.01
    length = sum(float(parameter.grad.square().sum()) for parameter in learner.actor.parameters()) ** 0.5
    assert length == pytest.approx(0.01, rel=1e-3)


# ---------------------------------------- windows of the episodes -----------------------------------------


def episode(rewards: list, first: float = 0.0) -> dict[str, np.ndarray]:
    numbers = first + np.arange(len(rewards) + 1, dtype=np.float32)
    actions = 10 + np.arange(len(rewards)) % 4
    flags = np.zeros(len(rewards), np.float32)
    observations = np.stack([numbers, -numbers], 1)
    steps = {"rewards": np.float32(rewards), "terminations": flags, "actions": actions}
    return {"observations": observations} | steps


@pytest.mark.equation(1)
def test_returns_to_go():
    for rewards, wanted in (([1, 1, 1], [3, 2, 1]), ([1, 2, 3], [6, 5, 3]), ([0, -2], [-2, -2])):
        data = dt.choice_steps([episode(rewards)], small().encoder)
        assert data["returns_to_go"].tolist() == wanted
        assert data["timesteps"].tolist() == [*range(len(rewards))]
    long = dt.choice_steps([episode([0.1] * 50_000)], small().encoder)["returns_to_go"]
    assert float(long[0]) == pytest.approx(50_000 * float(np.float32(0.1)), rel=1e-7)  # in double precision


def test_a_window_never_crosses_an_episode():
    """Where the episode has no more steps, the window's first stands, and is not real."""
    lengths, data = (4, 1, 1, 7, 2), [episode([1.0] * n, 10.0 * i) for i, n in enumerate((4, 1, 1, 7, 2))]
    data, row = dt.choice_steps(data, small().encoder), 0
    batch = dt.choice_windows(data, torch.arange(15), 3)
    for number, length in enumerate(lengths):
        for t in range(length):
            count = min(3, length - t)
            assert batch["real"][row].tolist() == [1.0] * count + [0.0] * (3 - count)
            steps = [*range(t, t + count), *[t] * (3 - count)]
            assert batch["timesteps"][row].tolist() == steps
            assert batch["observations"][row, :, 0].tolist() == [10.0 * number + step for step in steps]
            assert batch["actions"][row].tolist() == [step % 4 for step in steps]
            assert batch["returns_to_go"][row].tolist() == [length - step for step in steps]
            row += 1


# ------------------------------------------------- acting -------------------------------------------------


@pytest.mark.equation(5, 6)
def test_it_asks_for_what_is_left_and_remembers_what_it_chose(monkeypatch):
    learner, seen = small(context=3, dropout=0.5), []
    learner.actor.target.fill_(9.0)
    plain = learner.actor.forward

    def noted(batch):
        kept = {key: column.clone() for key, column in batch.items()}
        seen.append(kept | {"trains": learner.actor.training})
        return plain(batch)

    monkeypatch.setattr(learner.actor, "forward", noted)
    rng, taken = np.random.default_rng(0), []
    observations = rng.normal(size=(4, 2, 2)).astype(np.float32)
    for t, rewards in enumerate((None, [1.0, 2.0], [0.5, 0.0], [3.0, 3.0])):
        taken.append(learner.act(observations[t], rewards) - 10)
    to_go = np.array([[9, 8, 7.5, 4.5], [9, 7, 7, 4]])
    for t, batch in enumerate(seen):
        past = range(max(t - 2, 0), t + 1)
        assert batch["returns_to_go"].tolist() == to_go[:, past].tolist()
        assert batch["timesteps"].tolist() == [[*past]] * 2
        np.testing.assert_array_equal(batch["observations"], observations[past].swapaxes(0, 1))
        assert batch["actions"][:, :-1].tolist() == np.array(taken)[past].T[:, :-1].tolist()
        assert not batch["trains"]
    assert learner.actor.training
    learner.act(observations[0], None)
    assert seen[-1]["returns_to_go"].tolist() == [[9], [9]]  # nothing is remembered


@pytest.mark.equation(6)
def test_it_draws_by_probability():
    learner = small()
    state = np.array([0.3, -0.2], np.float32)
    found = learner.probabilities(state, None)
    batch = {key: column[:1, :1] for key, column in window(1, 1).items()}
    batch |= {"returns_to_go": torch.zeros(1, 1), "timesteps": torch.zeros(1, 1)}
    logits = by_hand(learner, batch | {"observations": torch.tensor(state)[None, None]})[0, 0]
    wanted = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    torch.manual_seed(0)
    drawn = learner.act(np.tile(state, (20_000, 1)), None)
    assert np.bincount(drawn - 10, minlength=4) / 20_000 == pytest.approx(wanted, abs=0.015)


def test_one_observation_or_a_batch():
    learner, rng = small(context=2), np.random.default_rng(0)
    observations, rewards = rng.normal(size=(4, 3, 2)), [None, *rng.normal(size=(3, 3))]
    learner.actor.head.weight.data *= 20  # it is sure of its choices, so that drawing does not matter
    learner.actor.head.bias.data *= 20
    batch = [learner.act(o, r) for o, r in zip(observations, rewards)]
    for i in range(3):
        for t in range(4):
            alone = learner.act(observations[t, i], None if t == 0 else rewards[t][i])
            assert alone.shape == ()
            assert alone == batch[t][i]


def test_agreement_in_the_data_follows_the_datas_own_steps():
    """Played: the target is asked for at an episode's first step; then rewards and choices are the data's."""
    learner = small(context=3, dropout=0.5)
    learner.actor.target.fill_(7.0)
    learner.encoder.std.fill_(2.0)
    episodes, found = [episode([1.0, 0.5, 2.0, 1.0, 1.0], 3.0), episode([2.0], -1.0)], []
    data = dt.choice_steps(episodes, learner.encoder)
    for each in episodes:
        for t, action in enumerate(each["actions"]):
            reward = None if t == 0 else each["rewards"][t - 1]
            found.append(learner.probabilities(each["observations"][t], reward)[action - 10])
            learner.history[-1]["actions"] = torch.tensor(action - 10)
    rows = np.random.default_rng(0).integers(6, size=1024)
    assert float(learner.agreement_in_data(data)) == pytest.approx(np.mean(np.array(found)[rows]), abs=1e-5)
    assert learner.actor.training


@pytest.mark.parametrize("kind", ["states", "planes"])
def test_states_and_planes_are_embedded_as_the_siblings_do(kind):
    """States from 5 on by a column of the weights; planes through the convolutions."""
    rng = np.random.default_rng(0)
    if kind == "states":
        learner, seen = small(states=3), rng.integers(5, 8, size=4)
        weight, bias = learner.actor.embed_observation.parameters()
        wanted = [weight[:, state - 5] + bias for state in seen]
    else:
        learner, seen = small((5, 5, 2)), rng.integers(2, size=(4, 5, 5, 2), dtype=np.uint8)
        network = learner.actor.embed_observation
        assert isinstance(network, dt.PlaneNetwork)
        wanted = [network(torch.as_tensor(planes, dtype=torch.float32)) for planes in seen]
    embedded = learner.actor.embed_observation(learner.encoder.encode(seen))
    torch.testing.assert_close(embedded, torch.stack(wanted))
    rows = {"observations": torch.as_tensor(seen), "actions": torch.tensor([0, 1, 2, 3])}
    rows |= {"rewards": torch.ones(4)}
    assert math.isfinite(learner.update(dt_windows(rows))["actor/loss"])
    assert learner.act(seen, None).shape == (4,)


# -------------------------------------------------- runs --------------------------------------------------


@pytest.mark.parametrize(("quantile", "low", "high"), [(1.0, 0.8, 1.0), (0.0, 0.0, 0.1)])
def test_it_goes_where_episodes_of_the_asked_return_went(walk, tmp_path, quantile, low, high):
    """Two of three walks end left, for 0, the others right, for 1: asked for either it goes there."""
    fields = {"updates": 400, "actor_lr": 3e-3, "warmup_updates": 50, "context": 4, "hidden_dim": 16}
    fields |= {"hidden_layers": 1, "batch_size": 64, "target_quantile": quantile, "eval_every": 400}
    dt.train(dt.parse_config(short(walk, tmp_path, **fields, final_eval_episodes=60, log_every=200)))
    folder = tmp_path / f"discrete/dt/{walk}/default/seed-0"
    run = json.loads((folder / "run.json").read_text())
    assert low <= run["return_mean"] <= high
    policy = dt.load(folder)
    assert float(policy.actor.target) == quantile
    table = pd.read_csv(folder / "metrics.csv")
    assert table["actor/agreement"].between(0, 1).all()


def test_a_loaded_policy_plays_as_it_was_evaluated(walk, tmp_path):
    """Episode by episode, choices drawn by the evaluation's seed."""
    dt.train(dt.parse_config(short(walk, tmp_path, context=4)))
    folder = tmp_path / f"discrete/dt/{walk}/default/seed-0"
    policy = dt.load(folder)
    environments = dt.LastRewards(dt.make_environments(minari.load_dataset(walk), None))
    act = lambda observations: policy.act(observations, environments.rewards)  # noqa: E731
    table = dt.evaluate(act, environments, 12, (0, 40, 1))
    final = pd.read_csv(folder / "evaluations.csv").query("phase == 'final'")
    assert table["length"].tolist() == final["length"].tolist()
    assert table["return"].tolist() == final["return"].tolist()
    assert table["length"].nunique() > 1
