"""algorithms/context/algorithm_distillation.py: tokens, loss, windows, context and lives by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import load_script

pytest.register_assert_rewrite("lives")
from lives import (  # noqa: E402
    NAME,
    arguments,
    assert_resumes,
    block,
    cross_entropy,
    embedded,
    fixed,
    folder,
    linear,
    normed,
    softmax,
    train,
)
from oracles import Constant  # noqa: E402

pytest_plugins = ["lives"]
ad = load_script("context/algorithm_distillation.py")
SIZES = {"hidden_dim": 8, "hidden_layers": 2, "context": 6, "columns": 4}


def small(**fields):
    """A small AD of 12 cells and 5 actions, with weights large enough to show, without dropout."""
    learner = ad.AD(ad.Config(**SIZES | {"dropout": 0.0} | fields), 12, 5, torch.device("cpu"))
    fixed(learner.actor).train()
    return learner


def window(rows: int = 3, steps: int = 6) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(1)
    found = {name: rng.integers(5, size=(rows, steps)) for name in ("actions", "last_actions")}
    found["last_actions"][:, 0] = 5  # none
    found |= {"states": rng.integers(12, size=(rows, steps))}
    found = {name: torch.as_tensor(column) for name, column in found.items()}
    return found | {"last_rewards": torch.as_tensor(rng.integers(2, size=(rows, steps))).float()}


def logits_by_hand(actor, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """(2), then the blocks, then the head: [B, L, 5]."""
    states, last, rewards = (batch[name].numpy() for name in ("states", "last_actions", "last_rewards"))
    x = embedded(actor.embed_state.rows, states // 4) + embedded(actor.embed_state.columns, states % 4)
    x = x + embedded(actor.embed_action, last) + linear(rewards[..., None].astype(float), actor.embed_reward)
    x = normed(x + embedded(actor.embed_place, np.arange(states.shape[1])), actor.norm)
    for layer in actor.blocks[:-1]:
        x = block(x, layer)
    return linear(normed(x, actor.blocks[-1]), actor.head)


# -------------------------------------------- tokens and loss ---------------------------------------------


@pytest.mark.equation(1, 2)
def test_outputs_are_those_of_one_token_a_step():
    learner = small()
    found = learner.actor(window()).detach().numpy()
    np.testing.assert_allclose(found, logits_by_hand(learner.actor, window()), atol=2e-5)
    assert found.shape == (3, 6, 5)
    assert np.ptp(found, axis=0).min() > 0.02  # the weights matter


@pytest.mark.equation(3)
def test_loss_is_the_mean_log_likelihood_of_every_step():
    learner = small()
    loss, metrics = learner.actor_loss(window())
    logits, labels = logits_by_hand(learner.actor, window()), window()["actions"].numpy()
    assert loss.item() == pytest.approx(cross_entropy(logits, labels).mean(), rel=1e-5)
    assert metrics["actor/agreement"].item() == pytest.approx((logits.argmax(-1) == labels).mean())
    assert loss.item() == metrics["actor/loss"].item()
    assert not metrics["actor/loss"].requires_grad


@pytest.mark.equation(3)
def test_equal_logits_cost_ln_5():
    learner = small()
    learner.actor = Constant([[[7.0] * 5] * 6] * 3)
    assert learner.actor_loss(window())[0].item() == pytest.approx(math.log(5), abs=1e-6)


@pytest.mark.equation(2, 3)
@pytest.mark.parametrize("name", ["states", "last_actions", "last_rewards"])
def test_a_change_at_t_changes_no_output_before_it(name):
    learner = small()
    before = learner.actor(window())
    for t in range(6):
        batch = window()
        batch[name][:, t] = (batch[name][:, t] + 1) % 5
        after = learner.actor(batch)
        assert torch.equal(before[:, :t], after[:, :t])
        assert ((before[:, t:] - after[:, t:]).abs().amax((0, 2)) > 1e-6).all()


def test_cells_of_a_row_share_what_is_known_of_it():
    """And with one column every state is a thing of its own."""
    cells = small().actor.embed_state
    five, six, nine, ten = cells(torch.tensor([5, 6, 9, 10]))
    torch.testing.assert_close(five - six, nine - ten)  # columns 1 and 2
    torch.testing.assert_close(five - nine, six - ten)  # rows 1 and 2
    assert (five - six).abs().max() > 0.01
    alone = small(columns=1).actor.embed_state
    assert (len(alone.rows.weight), len(alone.columns.weight)) == (12, 1)


def test_the_step_size_warms_up_and_gradients_are_cut():
    learner, rates = small(actor_lr=1e-3, warmup_updates=4, gradient_norm=0.01), []
    for _ in range(6):
        rates.append(learner.actor_optimizer.param_groups[0]["lr"])
        metrics = learner.update(window())
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    assert metrics["actor/gradient_norm"] > 0.01
    length = sum(float(parameter.grad.square().sum()) for parameter in learner.actor.parameters()) ** 0.5
    assert length == pytest.approx(0.01, rel=1e-3)


def test_a_batch_is_learned():
    """Down the slope of the loss, not up: by a quarter at least."""
    learner = small(actor_lr=3e-3, warmup_updates=1)
    losses = [learner.update(window())["actor/loss"].item() for _ in range(40)]
    assert losses[-1] < 0.75 * losses[0]


# ------------------------------------------------- windows ------------------------------------------------


def lives(episodes: int, steps: int = 4) -> list[dict]:
    """Two lives whose numbers tell whose they are: life, episode and step as digits."""
    numbers = np.array([10 * e + s for e in range(episodes) for s in range(steps)])
    episode, rewards = np.repeat(np.arange(episodes), steps), (numbers % 3).astype(np.float32)
    return [{"states": base + numbers, "actions": (base + numbers) % 5, "rewards": rewards,
             "episode": episode, "goal": 0} for base in (100, 200)]  # fmt: skip


@pytest.mark.equation(1)
def test_every_other_episode_is_seen_and_no_window_leaves_its_life():
    """A life with stride 2 is two: episodes 0, 2, 4 and 1, 3; the action before is known."""
    data = ad.life_steps(lives(6), 5, ad.Config(context=5, stride=2), torch.device("cpu"))
    halves = [[10 * e + s for e in episodes for s in range(4)] for episodes in ((0, 2, 4), (1, 3, 5))]
    wanted = [[base + number for number in half] for base in (100, 200) for half in halves]
    assert data["states"].tolist() == [state for part in wanted for state in part]
    assert data["starts"].tolist() == [12 * life + start for life in range(4) for start in range(8)]
    columns = {name: column for name, column in data.items() if name != "starts"}
    batch = ad.life_windows(columns, data["starts"], 5)
    assert {name: column.shape for name, column in batch.items()} == dict.fromkeys(columns, (32, 5))
    for row, (life, start) in enumerate((life, start) for life in range(4) for start in range(8)):
        states = wanted[life][start : start + 5]
        before = wanted[life][max(start - 1, 0) : start + 4]
        assert batch["states"][row].tolist() == states
        assert batch["actions"][row].tolist() == [state % 5 for state in states]  # the life's own
        actions, rewards = [state % 5 for state in before], [state % 100 % 3 for state in before]
        if start == 0:
            actions, rewards = [5, *actions], [0, *rewards]
        assert batch["last_actions"][row].tolist() == actions[:5]
        assert batch["last_rewards"][row].tolist() == rewards[:5]


def test_a_context_longer_than_a_life_is_refused():
    with pytest.raises(ad.UserError, match="context: 9 is longer than a life of 8: see stride"):
        ad.life_steps(lives(5), 5, ad.Config(context=9, stride=2), torch.device("cpu"))
    ad.life_steps(lives(5), 5, ad.Config(context=8, stride=2), torch.device("cpu"))


def test_lives_are_read_as_they_were_lived(rooms):
    found = ad.read_lives(rooms)
    assert len(found) == 160
    for life, recorded in zip(found[::40], list(rooms.iterate_episodes())[::40], strict=True):
        assert life["states"].tolist() == recorded.observations[:240].tolist()
        assert life["actions"].tolist() == recorded.actions.tolist()
        assert life["rewards"].tolist() == recorded.rewards.tolist()
        assert life["episode"].tolist() == np.repeat(np.arange(12), 20).tolist()
        assert life["goal"] == recorded.infos["goal"][0]


# -------------------------------------------------- acting ------------------------------------------------


def step(number: int, ended: bool = False) -> dict[str, np.ndarray]:
    return {"actions": np.array([number % 5] * 2), "rewards": np.array([number % 2] * 2),
            "ended": np.array([ended] * 2)}  # fmt: skip


@pytest.mark.equation(4)
def test_the_context_is_the_last_steps_across_episodes(monkeypatch):
    """Seven into five: 2 to 6 are left, though an episode ended after 4; a new life begins with nothing."""
    learner, seen = small(context=5, dropout=0.5), []
    plain = learner.actor.forward

    def noted(batch):
        seen.append(batch | {"trains": learner.actor.training})
        return plain(batch)

    monkeypatch.setattr(learner.actor, "forward", noted)
    for number in range(7):
        learner.choose(np.array([number, number + 1]), None if number == 0 else step(number, number == 4))
    assert seen[-1]["states"].tolist() == [[2, 3, 4, 5, 6], [3, 4, 5, 6, 7]]
    assert seen[-1]["last_actions"].tolist() == [[2, 3, 4, 0, 1]] * 2
    assert seen[-1]["last_rewards"].tolist() == [[0, 1, 0, 1, 0]] * 2
    assert seen[0]["last_actions"].tolist() == [[5], [5]]  # none, as in training
    assert not any(batch["trains"] for batch in seen)
    assert learner.actor.training
    learner.choose(np.array([3, 4]), None)
    assert seen[-1]["states"].tolist() == [[3], [4]]


@pytest.mark.equation(4)
def test_it_draws_by_probability():
    learner, states = small(), np.full(20_000, 7)
    batch = {"states": torch.tensor([[7]]), "last_actions": torch.tensor([[5]])}
    wanted = softmax(logits_by_hand(learner.actor, batch | {"last_rewards": torch.zeros(1, 1)}))[0, 0]
    torch.manual_seed(0)
    drawn = learner.choose(states, None)
    assert np.bincount(drawn, minlength=5) / 20_000 == pytest.approx(wanted, abs=0.015)


def test_returns_are_counted_by_episode_and_room(rooms):
    """Agents that go up once and stay earn on one goal; from the third episode on they stay at the start."""
    environments, calls = ad.make_rooms(rooms, [45, 55, 0]), []

    def choose(states, last):
        calls.append(states.tolist())
        begins = len(calls) % 20 == 1
        assert (last is None) == (len(calls) == 1)
        if last is not None:
            assert last["states"].tolist() == calls[-2]
            assert last["ended"].all() == begins
        return np.full(3, int(begins and len(calls) <= 40))

    returns = ad.live_in_context(choose, environments, 4, (0, 0, 0))
    assert returns.tolist() == [[20, 0, 0], [20, 0, 0], [0, 20, 0], [0, 20, 0]]
    assert len(calls) == 80
    assert calls[0] == calls[20] == [55] * 3


def test_an_evaluation_changes_nothing_in_training(rooms):
    learner = ad.AD(ad.Config(**SIZES), 100, 5, torch.device("cpu"))
    environments = ad.make_rooms(rooms, [7, 9])
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    first = ad.live_in_context(learner.choose, environments, 2, (0, 1, 0))
    assert torch.equal(torch.rand(1), wanted)
    assert (ad.live_in_context(learner.choose, environments, 2, (0, 1, 0)) == first).all()


# -------------------------------------------------- runs --------------------------------------------------

FIELDS = {"context": 20, "stride": 2}


def test_a_run_resumes_bit_for_bit(rooms, tmp_path, monkeypatch):
    assert_resumes(ad, "algorithm_distillation", tmp_path, monkeypatch, **FIELDS, dropout=0.2)


def test_a_run_writes_its_curve_and_loads(rooms, tmp_path, capsys):
    train(ad, tmp_path, **FIELDS, final_eval_episodes=5)
    run = folder(tmp_path, "algorithm_distillation")
    curve = pd.read_csv(run / "in-context-final-00000006.csv")
    info = json.loads((run / "run.json").read_text())
    assert [*curve] == ["episode", "return_mean", "return_std", "best"]
    assert curve["episode"].tolist() == [1, 2, 3, 4, 5]
    known = rooms.storage.metadata
    best = np.mean([known["best_returns"][goal] for goal in known["held_out_goals"]])
    assert curve["best"].tolist() == pytest.approx([best] * 5)
    assert info["return_first"] == pytest.approx(curve["return_mean"][0])
    assert info["score"] == pytest.approx(100 * curve["return_mean"][4] / best)  # the last fifth
    assert {"eval/score", "eval/return_first", "actor/loss"} <= {*pd.read_csv(run / "metrics.csv")}
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["state"]["actor"]
    loaded = ad.load(str(run)).actor.state_dict()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    train(ad, tmp_path, **FIELDS, final_eval_episodes=5)
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["algorithm_distillation", "dpt"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "test/walk-v0"}, "test/walk-v0 has no lives of learners: make dataset ID=" + NAME),
        ({"dataset": "test/pendulum/random-v0"}, "it takes numbers (Discrete)"),
        ({"dataset": "reef/dark-rom/histories-v0"}, "reef/dark-rom/histories-v0"),
        ({"hiden_dim": 3}, "did you mean hidden_dim"),
        ({"columns": 0}, "columns"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    walk, pendulum, tmp_path, monkeypatch, capsys, name, fields, message
):
    script = load_script(f"context/{name}.py")
    monkeypatch.setattr("sys.argv", ["script.py", *arguments(tmp_path, **fields)])
    with pytest.raises(SystemExit) as end:
        script.main(script.train)
    lines = capsys.readouterr().err.strip().splitlines()
    assert (end.value.code, len(lines)) == (2, 1)
    assert message in lines[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]
