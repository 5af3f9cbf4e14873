"""RA-DT against NumPy: keys, neighbours by brute force, cross attention; what a memory holds."""

import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load_script
from lives import (
    assert_resumes,
    block,
    cross_entropy,
    embedded,
    fixed,
    folder,
    linear,
    normed,
    rooms,  # noqa: F401
    softmax,
)

retrieval = load_script("context/retrieval.py")
STATES, ACTIONS, STEPS, CPU = 12, 3, 4, torch.device("cpu")


def make(**fields):
    """RA-DT with small networks of fixed weights."""
    small = {"hidden_dim": 6, "hidden_layers": 2, "key_dim": 5, "found": 4, "kept": 2, "dropout": 0.0}
    small["columns"] = 4
    fields = small | fields
    learner = retrieval.RADT(retrieval.Config(**fields), STATES, ACTIONS, STEPS, CPU)
    fixed(learner.actor)
    return learner


def batch_of(memories: int = 6, rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    batch = {}
    for name, shape in (("", (rows, STEPS)), ("memory_", (rows, memories, STEPS))):
        batch[f"{name}states"] = torch.as_tensor(rng.integers(STATES, size=shape))
        batch[f"{name}actions"] = torch.as_tensor(rng.integers(ACTIONS, size=shape))
        batch[f"{name}rewards"] = torch.as_tensor(rng.integers(2, size=shape)).float()
    batch["memory_real"] = torch.ones(rows, memories)
    batch["past"] = torch.tensor([0, 2, 3])[:rows]
    return batch


def key(learner, states, actions, count: int) -> np.ndarray:
    """(2) of the first `count` steps."""
    numbers = learner.actor.projection.numpy().astype(float)
    total = sum((numbers[s, a] for s, a in zip(states[:count], actions[:count])), np.zeros(numbers.shape[-1]))
    return total / max(np.linalg.norm(total), 1e-12)


def by_brute_force(learner, batch: dict, row: int) -> list[tuple[int, float]]:
    """(2) to (5) of one row: places of the kept episodes and their weights, the most useful first."""
    c = learner.config
    ours = key(learner, batch["states"][row].numpy(), batch["actions"][row].numpy(), int(batch["past"][row]))
    states, actions = batch["memory_states"][row].numpy(), batch["memory_actions"][row].numpy()
    theirs = [key(learner, s, a, STEPS) for s, a in zip(states, actions)]
    earned = batch["memory_rewards"][row].sum(-1).numpy()
    alike = {}
    for place, other in enumerate(theirs):
        twin = any(np.dot(other, before) > 1 - 1e-6 for before in theirs[:place])
        if batch["memory_real"][row, place] and not twin and ours @ other <= c.too_alike:
            alike[place] = ours @ other  # (3)
    earned = earned / max(earned.max(), 1)  # G_max: at least 1
    found = sorted(alike, key=lambda place: -alike[place] - 1e-6 * earned[place])[: c.found]
    useful = {place: alike[place] + earned[place] for place in found}  # (4)
    kept = sorted(useful, key=lambda place: -useful[place])[: c.kept]
    weights = softmax(np.array([useful[place] for place in kept])) if kept else []  # (5)
    return [*zip(kept, weights)]


def found_by(learner, batch: dict) -> tuple[dict, torch.Tensor]:
    seen = torch.arange(STEPS) < batch["past"][:, None]
    return learner.retrieve(batch, seen.float())


@pytest.mark.equation(2, 3, 4, 5)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [1, 0.01])  # of rewards: what earned most earned more than 1, or less
def test_neighbours_and_weights_are_those_of_brute_force(seed, scale):
    learner, batch = make(), batch_of(memories=9, seed=seed)
    batch["past"], batch["memory_rewards"] = batch["past"] + 1, torch.rand(3, 9, STEPS) * scale  # all differ
    most = batch["memory_rewards"].sum(-1).amax(1)
    assert ((most > 1) == (scale == 1)).all()
    kept, weights = found_by(learner, batch)
    for row in range(3):
        for rank, (place, weight) in enumerate(by_brute_force(learner, batch, row)):
            assert torch.equal(kept["states"][row, rank], batch["memory_states"][row, place])
            assert torch.equal(kept["rewards"][row, rank], batch["memory_rewards"][row, place])
            assert float(weights[row, rank]) == pytest.approx(weight, rel=1e-4)
    assert weights.sum(1).tolist() == pytest.approx([1, 1, 1])


@pytest.mark.equation(3)
def test_what_is_too_alike_is_left_out_and_a_twin_is_shown_once():
    learner, batch = make(kept=6, found=6), batch_of()
    batch["past"] = torch.full((3,), STEPS)
    for name in ("states", "actions"):
        batch[f"memory_{name}"][:, 2] = batch[name]  # the present episode: similarity 1
        batch[f"memory_{name}"][:, 4] = batch[f"memory_{name}"][:, 1]  # the same as another
    kept, weights = found_by(learner, batch)
    for row in range(3):
        shown = kept["states"][row][weights[row] > 0].tolist()
        assert batch["states"][row].tolist() not in shown
        assert shown.count(batch["memory_states"][row, 1].tolist()) == 1
        assert len(shown) == 4


@pytest.mark.equation(4)
def test_without_a_key_what_earned_most_is_kept():
    learner, batch = make(kept=1, found=6), batch_of()
    batch["past"] = torch.zeros(3, dtype=torch.int64)
    kept, _ = found_by(learner, batch)
    assert kept["rewards"].sum(-1)[:, 0].tolist() == batch["memory_rewards"].sum(-1).amax(1).tolist()


def logits_of(learner, batch: dict, to_go: np.ndarray, kept: dict, weights: np.ndarray) -> np.ndarray:
    """(1) and (6), [B, T, actions]."""
    actor = learner.actor

    def tokens(states, actions, rewards):
        before = np.concatenate([np.full((*actions.shape[:-1], 1), ACTIONS), actions[..., :-1]], -1)
        earned = np.concatenate([np.zeros((*rewards.shape[:-1], 1)), rewards[..., :-1]], -1)
        rows, columns = np.divmod(states, 4)
        x = embedded(actor.embed_state.rows, rows) + embedded(actor.embed_state.columns, columns)
        x = x + embedded(actor.embed_action, before)
        x = x + linear(earned[..., None], actor.embed_reward)
        return x + embedded(actor.embed_step, np.arange(STEPS))

    present = [batch[name].numpy() for name in ("states", "actions", "rewards")]
    x = tokens(*present) + linear(to_go[..., None], actor.embed_return)  # (1)
    x = normed(x, actor.norm)
    past = [kept[name].numpy() for name in ("states", "actions", "rewards")]
    shown = tokens(*past) + embedded(actor.embed_taken, past[1])
    shown = shown + linear(past[2][..., None], actor.embed_earned)
    memory = normed(shown, actor.norm).reshape(len(x), -1, x.shape[-1])
    nothing = np.broadcast_to(actor.nothing.detach().numpy(), (len(x), 1, x.shape[-1]))
    memory = np.concatenate([nothing, memory], 1)
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.repeat(weights, STEPS, 1))
    log_weights = np.concatenate([np.zeros((len(x), 1)), log_weights], 1)
    for layer, reader in zip(actor.blocks, actor.readers):
        x = block(x, layer)
        if learner.config.retrieve:
            k, v = np.split(linear(memory, reader.key_value), 2, -1)
            scores = linear(normed(x, reader.norm), reader.query) @ k.swapaxes(1, 2) / np.sqrt(x.shape[-1])
            x = x + linear(softmax(scores + log_weights[:, None]) @ v, reader.out)  # (6)
    return linear(normed(x, actor.head[0]), actor.head[1])


@pytest.mark.equation(1, 6, 7)
@pytest.mark.parametrize("retrieve", [True, False])
def test_the_loss(retrieve):
    learner, batch = make(retrieve=retrieve), batch_of()
    batch["memory_real"][0] = 0  # nothing to look up: `nothing` alone is read
    loss, metrics = learner.actor_loss(batch)
    to_go = batch["rewards"].numpy()[:, ::-1].cumsum(1)[:, ::-1]
    kept, weights = found_by(learner, batch)
    assert weights[0].tolist() == [0, 0]
    logits = logits_of(learner, batch, to_go, kept, weights.numpy())
    counted = np.arange(STEPS) >= batch["past"].numpy()[:, None]
    losses = cross_entropy(logits, batch["actions"].numpy())
    assert loss.item() == pytest.approx(losses[counted].mean(), rel=1e-4)  # (7)
    hits = logits.argmax(-1) == batch["actions"].numpy()
    assert metrics["actor/agreement"].item() == pytest.approx(hits[counted].mean())


def test_uniform_logits_cost_ln_of_the_actions():
    learner = make()
    torch.nn.init.zeros_(learner.actor.head[1].weight)
    torch.nn.init.zeros_(learner.actor.head[1].bias)
    assert learner.actor_loss(batch_of())[0].item() == pytest.approx(np.log(ACTIONS))


def test_the_step_size_warms_up_and_gradients_are_cut():
    learner, rates = make(actor_lr=1e-3, warmup_updates=4, gradient_norm=0.01), []
    for _ in range(6):
        rates.append(learner.actor_optimizer.param_groups[0]["lr"])
        metrics = learner.update(batch_of())
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    assert metrics["actor/gradient_norm"] > 0.01
    length = sum(float(parameter.grad.square().sum()) for parameter in learner.actor.parameters()) ** 0.5
    assert length == pytest.approx(0.01, rel=1e-3)


def test_a_batch_is_learned():
    """Down the slope of the loss, not up: by a quarter at least."""
    learner = make(actor_lr=3e-3, warmup_updates=1)
    losses = [learner.update(batch_of())["actor/loss"].item() for _ in range(40)]
    assert losses[-1] < 0.75 * losses[0]


def test_what_comes_later_changes_nothing_before():
    learner, batch = make(), batch_of()
    kept, weights = found_by(learner, batch)
    to_go = torch.ones(3, STEPS)
    before = learner.actor(batch, to_go, kept, weights)
    batch["states"][:, 3] = (batch["states"][:, 3] + 1) % STATES
    batch["actions"][:, 2] = (batch["actions"][:, 2] + 1) % ACTIONS
    after = learner.actor(batch, to_go, kept, weights)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])


def test_without_the_memory_what_is_in_it_does_not_matter():
    for retrieve, same in ((False, True), (True, False)):
        learner, batch = make(retrieve=retrieve), batch_of()
        one = learner.actor_loss(batch)[0]
        other = learner.actor_loss(batch | {"memory_rewards": 1 - batch["memory_rewards"]})[0]
        assert torch.equal(one, other) == same


@pytest.mark.equation(8)
def test_acting_asks_for_what_is_left_of_the_target(monkeypatch):
    learner, asked, memories, keyed = make(target=7.0), [], [], []
    learner.actor.most.copy_(torch.tensor([9, 8, 6, 2]))
    forward, retrieve = learner.actor.forward, learner.retrieve

    def spied(episodes, to_go, kept, weights):
        assert not learner.actor.training  # no dropout
        asked.append(to_go.clone())
        memories.append(float(weights.sum()))
        return forward(episodes, to_go, kept, weights)

    def spied_retrieve(batch, seen):
        keyed.append(seen.sum(1).tolist())
        return retrieve(batch, seen)

    monkeypatch.setattr(learner.actor, "forward", spied)
    monkeypatch.setattr(learner, "retrieve", spied_retrieve)
    states, last = np.array([1, 2]), None
    for step in range(STEPS + 1):
        actions = learner.choose(states, last)
        assert set(actions.tolist()) <= {0, 1, 2}
        ended = np.full(2, step == STEPS - 1)
        last = {"states": states, "actions": actions, "rewards": np.array([1.0, 0.0]), "ended": ended}
    assert asked[STEPS - 1].tolist() == [[7, 6, 5, 2], [7, 7, 6, 2]]  # the data's largest bound it
    assert asked[STEPS][:, 0].tolist() == [7, 7]  # another episode
    assert memories[:STEPS] == [0] * STEPS  # there was none before
    assert memories[STEPS] == pytest.approx(2)
    assert keyed == [[step, step] for step in (*range(STEPS), 0)]  # a key is of steps whose action is known
    with pytest.raises(retrieval.UserError, match="end together"):
        learner.choose(states, last | {"ended": np.array([True, False])})
    learner.choose(states, None)
    assert memories[-1] == 0  # another life, which knows nothing of the one before
    assert learner.actor.training


def test_actions_are_drawn():
    learner = make()
    torch.nn.init.zeros_(learner.actor.head[1].weight)
    learner.actor.head[1].bias.data = torch.tensor([1, 2, 0]).log()  # shares of 1/3, 2/3 and nothing
    torch.manual_seed(0)
    actions = learner.choose(np.zeros(3000, int), None)
    assert np.bincount(actions, minlength=3) / 3000 == pytest.approx([1 / 3, 2 / 3, 0], abs=0.03)


def test_a_memory_is_of_another_life_with_the_same_goal_up_to_some_moment():
    """A difference from the paper. Of a goal's only life it is of that life itself."""
    shape = (4, 5, STEPS)  # lives, episodes, steps; a state tells which life and episode it is of
    data = {"states": torch.arange(20).view(4, 5, 1).expand(shape), "actions": torch.zeros(shape).long()}
    data |= {"rewards": torch.zeros(shape), "goals": torch.tensor([8, 3, 8, 8])}
    config, rows = retrieval.Config(memory=6), torch.arange(20).repeat(40)
    torch.manual_seed(0)
    batch = retrieval.with_memories(data, rows, config)
    now, past = batch["states"][:, 0], batch["memory_states"][..., 0]
    assert torch.equal(now, rows)
    real = batch["memory_real"] > 0
    assert not real[rows % 5 == 0].any()  # the first episode of a life has none before it
    tellers = {life: {*(past // 5)[rows // 5 == life].flatten().tolist()} for life in range(4)}
    assert tellers == {0: {2, 3}, 1: {1}, 2: {0, 3}, 3: {0, 2}}
    assert ((past // 5).amax(1) == (past // 5).amin(1)).all()  # one life's
    assert (past % 5 < now[:, None] % 5)[real].all()
    shares = np.bincount(batch["past"], minlength=STEPS) / len(rows)
    assert shares == pytest.approx([0.8 + 0.2 / 4, 0.05, 0.05, 0.05], abs=0.03)  # four fifths are forgotten


def test_a_run_goes_on_to_the_same_bits(rooms, tmp_path, monkeypatch):  # noqa: F811
    small, made = {"memory": 8, "key_dim": 8, "kept": 2}, set()
    make_rooms = retrieval.make_rooms

    def spied(dataset, goals):
        made.update(goals)
        return make_rooms(dataset, goals)

    monkeypatch.setattr(retrieval, "make_rooms", spied)
    assert_resumes(retrieval, "retrieval", tmp_path, monkeypatch, **small)
    assert made == {*rooms.storage.metadata["held_out_goals"]}
    assert not made & {life["goal"] for life in retrieval.read_lives(rooms)}  # none that was trained on
    learner = retrieval.load(str(folder(tmp_path / "whole", "retrieval")))
    assert learner.choose(np.array([55, 55]), None).shape == (2,)
    rewards = np.stack([life["rewards"].reshape(12, -1) for life in retrieval.read_lives(rooms)])
    to_go = [rewards[..., step:].sum(-1).max() for step in range(20)]
    assert learner.actor.most.tolist() == to_go  # M of (8)


def test_lives_of_unequal_episodes_are_refused():
    life = {"states": np.arange(5), "actions": np.arange(5), "rewards": np.arange(5.0), "goal": 3}
    with pytest.raises(retrieval.UserError, match="different lengths"):
        retrieval.life_episodes([life | {"episode": np.array([0, 0, 0, 1, 1])}], CPU)


def test_a_dataset_of_another_kind_is_refused():
    box = gym.spaces.Box(-1, 1, (3,))
    with pytest.raises(retrieval.UserError, match="this script is not for"):
        retrieval.read_lives(types.SimpleNamespace(observation_space=box, action_space=box))
