"""algorithms/context/dpt.py: tokens without places, labels, tasks, context and acting by hand."""

import math
import re
import runpy
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, load_script

pytest.register_assert_rewrite("lives")
from lives import (  # noqa: E402
    assert_resumes,
    block,
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
dpt = load_script("context/dpt.py")
NAMES = ("states", "actions", "rewards", "next_states")


def small(**fields):
    """A small DPT of 12 cells and 5 actions, with weights large enough to show, without dropout."""
    sizes = {"hidden_dim": 8, "hidden_layers": 2, "context": 6, "columns": 4, "dropout": 0.0}
    learner = dpt.DPT(dpt.Config(**sizes | fields), 12, 5, torch.device("cpu"))
    fixed(learner.actor).train()
    return learner


def batch(rows: int = 3, count: int = 6) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(1)
    size = rows, count
    found = {"states": rng.integers(12, size=size), "next_states": rng.integers(12, size=size)}
    found |= {"actions": rng.integers(5, size=(rows, count)), "query": rng.integers(12, size=rows)}
    found |= {"rewards": rng.integers(2, size=(rows, count))}
    found["best_actions"] = np.float32([[0, 1, 0, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 0, 0]][:rows])
    return {name: torch.as_tensor(column) for name, column in found.items()}


def cells(layer, numbers: np.ndarray) -> np.ndarray:
    return embedded(layer.rows, numbers // 4) + embedded(layer.columns, numbers % 4)


def logits_by_hand(actor, given: dict[str, torch.Tensor]) -> np.ndarray:
    """(2), then the blocks, then the head: [B, n + 1, 5]."""
    given = {name: column.numpy() for name, column in given.items()}
    x = cells(actor.embed_state, given["states"]) + embedded(actor.embed_action, given["actions"])
    x = x + cells(actor.embed_next, given["next_states"])
    x = x + linear(given["rewards"][..., None].astype(float), actor.embed_reward)
    x = normed(np.concatenate([cells(actor.embed_query, given["query"])[:, None], x], 1), actor.norm)
    for layer in actor.blocks[:-1]:
        x = block(x, layer)
    return linear(normed(x, actor.blocks[-1]), actor.head)


# -------------------------------------------- tokens and loss ---------------------------------------------


@pytest.mark.equation(2)
def test_outputs_are_those_of_a_state_and_one_token_a_transition():
    learner = small()
    found = learner.actor(batch()).detach().numpy()
    np.testing.assert_allclose(found, logits_by_hand(learner.actor, batch()), atol=2e-5)
    assert found.shape == (3, 7, 5)
    assert np.ptp(found, axis=0).min() > 0.02  # the weights matter


@pytest.mark.equation(1, 2)
def test_transitions_have_no_places():
    """The last output of one block is the same whatever the order of those before it."""
    learner, given = small(hidden_layers=1), batch()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = given | {name: given[name][:, order] for name in NAMES}
    one, other = learner.actor(given), learner.actor(shuffled)
    assert (one[:, 1:6] - other[:, 1:6]).abs().max() > 1e-3
    last = []
    for first in (order[:5], order[:5].flip(0)):
        rows = torch.cat([first, order[5:]])
        last.append(given | {name: given[name][:, rows] for name in NAMES})
    one, other = (learner.actor(each)[:, -1] for each in last)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.equation(2, 3)
@pytest.mark.parametrize("name", NAMES)
def test_a_transition_changes_no_output_before_it(name):
    learner = small()
    before = learner.actor(batch())
    for i in range(6):
        given = batch()
        given[name][:, i] = (given[name][:, i] + 1) % 5
        after = learner.actor(given)
        assert torch.equal(before[:, : i + 1], after[:, : i + 1])
        assert ((before[:, i + 1 :] - after[:, i + 1 :]).abs().amax((0, 2)) > 1e-6).all()


@pytest.mark.equation(3)
def test_loss_is_the_cross_entropy_to_the_best_actions_each_as_likely():
    learner = small()
    loss, metrics = learner.actor_loss(batch())
    logs = np.log(softmax(logits_by_hand(learner.actor, batch())))  # [3, 7, 5]
    wanted = [logs[0, :, 1].mean(), (logs[1, :, 1].mean() + logs[1, :, 3].mean()) / 2, logs[2, :, 0].mean()]
    assert loss.item() == pytest.approx(-np.mean(wanted), rel=1e-5)
    guesses = logs[:, -1].argmax(-1)
    hits = [guesses[0] == 1, guesses[1] in (1, 3), guesses[2] == 0]
    assert metrics["actor/agreement"].item() == pytest.approx(np.mean(hits))
    assert not metrics["actor/loss"].requires_grad


@pytest.mark.equation(3)
def test_equal_logits_cost_ln_5():
    learner = small()
    learner.actor = Constant([[[7.0] * 5] * 7] * 3)
    assert learner.actor_loss(batch())[0].item() == pytest.approx(math.log(5), abs=1e-6)


def test_the_step_size_warms_up_and_gradients_are_cut():
    learner, rates = small(actor_lr=1e-3, warmup_updates=4, gradient_norm=0.01), []
    for _ in range(6):
        rates.append(learner.actor_optimizer.param_groups[0]["lr"])
        metrics = learner.update(batch())
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    assert metrics["actor/gradient_norm"] > 0.01
    length = sum(float(parameter.grad.square().sum()) for parameter in learner.actor.parameters()) ** 0.5
    assert length == pytest.approx(0.01, rel=1e-3)


def test_a_batch_is_learned():
    """Down the slope of the loss, not up: by a quarter at least."""
    learner = small(actor_lr=3e-3, warmup_updates=1)
    losses = [learner.update(batch())["actor/loss"].item() for _ in range(40)]
    assert losses[-1] < 0.75 * losses[0]


# ------------------------------------------------- tasks --------------------------------------------------


def test_moves_are_those_of_the_lives_but_for_the_last_of_an_episode():
    """After the last comes another episode's start; what was done twice is there once."""
    states, actions = np.array([3, 4, 4, 3, 4, 5]), np.array([1, 0, 2, 1, 1, 0])
    lives = [{"states": states, "actions": actions, "episode": np.array([0, 0, 0, 1, 1, 1])}]
    moves = dpt.find_moves(lives * 2, torch.device("cpu"))
    found = sorted(zip(*(moves[name].tolist() for name in ("states", "actions", "next_states")), strict=True))
    assert found == [(3, 1, 4), (4, 0, 4), (4, 1, 5)]


@pytest.mark.equation(1)
def test_tasks_are_random_moves_with_what_they_earn_on_the_goal(rooms):
    room, lives = load_script("collect/dark_room.py"), dpt.read_lives(rooms)
    best = torch.as_tensor(np.array(rooms.storage.metadata["best_actions"]), dtype=torch.float32)
    goals = torch.arange(3, 83)
    torch.manual_seed(0)
    moves = dpt.find_moves(lives, torch.device("cpu"))
    found = dpt.tasks(moves, best, goals, dpt.Config(context=200, found=0.0))
    assert found["states"].shape == (80, 200)
    following = torch.as_tensor(room.next_cells())[found["states"], found["actions"]]
    assert torch.equal(found["next_states"], following)
    assert torch.equal(found["rewards"] > 0, following == goals[:, None])
    assert torch.equal(found["best_actions"], best[goals, found["query"]])
    assert len(found["query"].unique()) > 40  # of any state, seen or not
    assert np.bincount(found["actions"].flatten(), minlength=5).min() > 2000  # of 16,000
    assert found["rewards"].float().mean() == pytest.approx(0.01, abs=0.005)


def test_in_a_share_of_tasks_the_goal_is_found():
    """There up to 90 % of moves end on it (acting, 80 %); one that no known move ends on changes nothing."""
    cells = torch.arange(100)
    moves, best = {"states": cells, "actions": cells % 5, "next_states": cells}, torch.ones(101, 100, 5)
    torch.manual_seed(0)
    goals, config = torch.arange(100).repeat(4), dpt.Config(context=300, found=0.6)
    shares = dpt.tasks(moves, best, goals, config)["rewards"].float().mean(1)
    assert (shares > 0.04).float().mean() == pytest.approx(0.6 * 0.86 / 0.9, abs=0.08)
    assert 0.8 < shares.max() < 0.97
    none = dpt.tasks(moves, best, torch.full((50,), 100), config)
    assert none["rewards"].sum() == 0
    assert len(none["states"].unique()) == 100


@pytest.mark.equation(3)
def test_labels_are_the_known_best_actions_of_the_lifes_goal(rooms):
    """By search: from the query's state one of the labels comes nearer, any other action does not."""
    room, known = load_script("collect/dark_room.py"), rooms.storage.metadata
    following = room.next_cells()
    for goal in (0, 37, 99):
        steps, frontier = {goal: 0}, [goal]
        for cell in frontier:
            for before in np.flatnonzero((following == cell).any(1)).tolist():
                if before not in steps:
                    steps[before] = steps[cell] + 1
                    frontier.append(before)
        for cell in range(100):
            nearer = [steps[after] < steps[cell] or steps[after] == 0 for after in following[cell].tolist()]
            assert known["best_actions"][goal][cell] == nearer


# -------------------------------------------------- acting ------------------------------------------------


@pytest.mark.equation(4)
def test_the_context_is_what_episodes_that_are_over_have_shown(monkeypatch):
    """Three steps an episode, of which the last says nothing; the last five transitions stay."""
    learner, seen = small(context=5, dropout=0.5), []
    plain = learner.actor.forward

    def noted(given):
        shown = {name: given[name].tolist() for name in (*NAMES, "query")}
        seen.append(shown | {"trains": learner.actor.training})
        return plain(given)

    monkeypatch.setattr(learner.actor, "forward", noted)
    learner.choose(np.array([0, 6]), None)
    for number in range(1, 10):
        ended = number % 3 == 0
        last = {"states": np.array([number - 1, number + 5]) % 12, "actions": np.array([number % 5] * 2)}
        last |= {"rewards": np.array([number % 2] * 2), "ended": np.array([ended] * 2)}
        learner.choose(np.array([number, number + 6]) % 12, last)
    assert seen[2]["states"] == [[], []]  # the first episode is not over
    assert seen[3]["states"] == seen[5]["states"] == [[0, 1], [6, 7]]
    assert seen[3]["next_states"] == [[1, 2], [7, 8]]
    assert seen[3]["actions"] == [[1, 2], [1, 2]]
    assert seen[3]["rewards"] == [[1, 0], [1, 0]]
    assert seen[3]["query"] == [3, 9]
    assert seen[9]["states"] == [[1, 3, 4, 6, 7], [7, 9, 10, 0, 1]]
    assert not any(each["trains"] for each in seen)
    assert learner.actor.training
    learner.choose(np.array([3, 4]), None)
    assert seen[-1]["states"] == [[], []]
    with pytest.raises(dpt.UserError, match="episodes of different lengths"):
        learner.choose(np.array([3, 4]), last | {"ended": np.array([True, False])})


@pytest.mark.equation(4, 5)
@pytest.mark.parametrize("redraw", [0.0, 0.4, 1.0])
def test_it_draws_by_probability(redraw):
    """In every step; and with the noise of the step before but for a share of the agents."""
    learner, agents = small(redraw=redraw), 20_000
    empty = {name: torch.zeros(1, 0, dtype=torch.int64) for name in NAMES}
    queries = ({"query": torch.tensor([state])} for state in (7, 2))
    logits = [logits_by_hand(learner.actor, empty | query)[0, 0] for query in queries]
    torch.manual_seed(0)
    first, noise = learner.choose(np.full(agents, 7), None), learner.noise.numpy()
    assert np.array_equal(first, (logits[0] + noise).argmax(1))
    last = {"states": np.full(agents, 7), "actions": first, "rewards": first, "ended": np.zeros(agents, bool)}
    later = learner.choose(np.full(agents, 2), last)
    for drawn, wanted in zip((first, later), map(softmax, logits)):
        assert np.bincount(drawn, minlength=5) / agents == pytest.approx(wanted, abs=0.015)
    anew = (learner.noise.numpy() != noise).all(1)
    assert anew.mean() == pytest.approx(redraw, abs=0.015)
    assert np.array_equal(later[~anew], (logits[1] + noise).argmax(1)[~anew])
    noise = learner.noise.numpy()
    learner.choose(np.full(agents, 7), last | {"ended": np.ones(agents, bool)})
    assert (learner.noise.numpy() != noise).all()  # an episode begins


# -------------------------------------------------- runs --------------------------------------------------


def test_a_run_resumes_bit_for_bit(rooms, tmp_path, monkeypatch):
    assert_resumes(dpt, "dpt", tmp_path, monkeypatch, context=20, dropout=0.2)


def test_a_run_is_trained_on_goals_of_the_lives_alone_and_loads(rooms, tmp_path, monkeypatch):
    """And evaluated on the others, and on those for comparison."""
    drawn, seen, plain, make = [], [], dpt.tasks, dpt.make_rooms

    def noted(moves, best, goals, config):
        drawn.extend(goals.tolist())
        return plain(moves, best, goals, config)

    def noted_rooms(dataset, goals):
        seen.append(goals)
        return make(dataset, goals)

    monkeypatch.setattr(dpt, "tasks", noted)
    monkeypatch.setattr(dpt, "make_rooms", noted_rooms)
    train(dpt, tmp_path, context=20, final_eval_rounds=2)
    known = rooms.storage.metadata
    assert {*drawn} <= {*known["training_goals"]}
    assert len({*drawn}) > 15  # of 24
    assert seen == [known["held_out_goals"], known["held_out_goals"] * 2, known["training_goals"]]
    curve = pd.read_csv(folder(tmp_path, "dpt") / "in-context-known-00000006.csv")
    best = np.mean([known["best_returns"][goal] for goal in known["training_goals"]])
    assert curve["best"][0] == pytest.approx(best)
    run = folder(tmp_path, "dpt")
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["state"]["actor"]
    loaded = dpt.load(str(run)).actor.state_dict()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_the_pages_block_acts(rooms, tmp_path, monkeypatch):
    train(dpt, tmp_path)
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/context.md").read_text(), re.DOTALL)
    text, count = re.subn(r'load\("results/runs/.+?"\)', f"load({str(folder(tmp_path, 'dpt'))!r})", text)
    assert count == 1
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    states = {"states": np.array([55, 55]), "next_states": np.array([54, 56])}
    given = states | {"rewards": np.zeros(2), "ended": np.zeros(2, bool)}
    (tmp_path / "block.py").write_text(text)
    found = runpy.run_path(str(tmp_path / "block.py"), given)
    assert found["actions"].shape == (2,)
