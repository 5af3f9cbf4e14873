"""BC: its loss against NumPy, calculated from the paper's equation, and which episodes it keeps."""

import numpy as np
import pytest
import torch
from conftest import load_script, new_learner, short
from oracles import (
    ACT,
    OBS,
    Constant,
    assert_acts,
    assert_compiled_is_eager,
    assert_loss_and_gradient,
    episode,
    fix_weights,
    moved,
    policy,
    read,
    weights,
)
from runs import place

bc = load_script("offline/bc.py")


def make(**fields):
    """BC with a small network of fixed weights."""
    return fix_weights(new_learner(bc, bc.Config(hidden_dim=4, **fields), OBS, ACT))


# ------------------------------------------------- loss -------------------------------------------------


@pytest.mark.equation(2)
def test_loss_is_the_mean_squared_error_over_batch_and_entries(batch, rows):
    learner = make()

    def oracle(layers):
        return np.sum((policy(layers, rows["observations"]) - rows["actions"]) ** 2) / (3 * ACT)

    assert_loss_and_gradient(learner.actor_loss(batch)[0], learner.actor, oracle, [])


@pytest.mark.equation(2)
def test_loss_of_the_facts(batch):
    learner = make()
    learner.actor = Constant([[1.0, -1.0]] * 3)
    batch["actions"] = torch.zeros(3, 2)
    assert learner.actor_loss(batch)[0].item() == 1  # a mean over entries: their sum would be 2
    batch["actions"] = torch.tensor([[1.0, -1.0]] * 3)
    assert learner.actor_loss(batch)[0].item() == 0


@pytest.mark.equation(2)
def test_update_descends_its_loss(batch, rows):
    learner = make(actor_lr=1e-3)
    before = learner.update(batch)["actor/loss"].item()
    assert before == pytest.approx(
        np.mean((policy(weights(make().actor), rows["observations"]) - rows["actions"]) ** 2), rel=1e-5
    )
    for _ in range(20):
        after = learner.update(batch)["actor/loss"].item()
    assert after < before
    assert learner.updates == 21


def test_an_update_moves_the_actor(batch):
    assert moved(make(actor_lr=0.01), batch) == ["actor"]
    assert moved(make(actor_lr=0.0), batch) == []


def test_compiled_updates_equal_eager_ones(batch):
    assert_compiled_is_eager(bc, [make(), make()], batch)


def test_acts_in_the_environments_units(rows):
    learner = make()
    assert_acts(learner, rows, lambda observations: policy(weights(learner.actor), observations))


def test_defaults_are_the_papers():
    config = bc.Config()
    wanted = {"updates": 1_000_000, "batch_size": 256, "hidden_dim": 256, "hidden_layers": 2}
    wanted |= {"actor_lr": 3e-4, "fraction": 1.0, "normalize_states": True}  # CORL's
    assert {field: getattr(config, field) for field in wanted} == wanted


# ----------------------------------------- the best trajectories -----------------------------------------


@pytest.mark.equation(1)
@pytest.mark.parametrize(
    ("fraction", "kept"), [(0.5, [1, 3]), (0.25, [3]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3]), (0.001, [3])]
)
def test_keeps_the_best_fraction_of_trajectories_and_at_least_one(fraction, kept):
    episodes = [{"number": i, "rewards": np.array([value])} for i, value in enumerate([1.0, 5.0, 3.0, 9.0])]
    assert [episode["number"] for episode in bc.keep_best(episodes, fraction)] == kept


def uneven() -> list:
    """Returns 1, 5, 3, 9 and lengths 1, 2, 3, 4: the best half by return is six of the ten steps."""
    return [
        episode(np.full((length + 1, OBS), number), [total / length] * length, terminated=False)
        for number, (total, length) in enumerate([(1.0, 1), (5.0, 2), (3.0, 3), (9.0, 4)])
    ]


@pytest.mark.equation(1)
def test_fraction_counts_trajectories_not_steps(minari_root):
    episodes = read(bc, "test/bc/fraction-v0", uneven())
    scaler = bc.Scaler(np.zeros(OBS), np.ones(OBS), -np.ones(ACT), np.ones(ACT))
    for fraction, kept in {0.25: [3] * 4, 0.5: [1, 1] + [3] * 4, 1.0: [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]}.items():
        data = bc.transitions(bc.keep_best(episodes, fraction), scaler)
        assert data["observations"][:, 0].tolist() == kept
        assert {len(column) for column in data.values()} == {len(kept)}


@pytest.mark.equation(1)
def test_a_run_learns_from_the_best_fraction_alone(call, minari_root, tmp_path):
    """All that it standardises observations by, too."""
    read(bc, "test/bc/run-v0", uneven())
    for fraction, mean in ((0.25, 3.0), (0.5, 14 / 6), (1.0, 2.0)):
        path = tmp_path / str(fraction)
        status, _, err = call("bc", *short("test/bc/run-v0", path, fraction=fraction))
        assert status == 0, err
        scaler = bc.load(place(path, "bc", "test/bc/run-v0")).scaler
        assert scaler.mean.tolist() == pytest.approx([mean] * OBS)
