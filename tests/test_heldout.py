"""Without an environment: every tenth episode is held out, measured, and never learned from."""

import json

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_episodes, short

SCRIPTS = ("bc", "td3_bc", "iql")


@pytest.fixture(scope="session")
def logs(minari_root) -> str:
    """Id of 25 random episodes of Pendulum-v1, 20 to 44 steps long, in a dataset without an environment."""
    env = gym.make("Pendulum-v1")
    episodes = [random_episodes(env, 1, seed=i, steps=20 + i)[0] for i in range(25)]
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    minari.create_dataset_from_buffers("test/logs/pendulum-v0", episodes, data_format="hdf5", **spaces)
    return "test/logs/pendulum-v0"


def learner(script, dataset: str, **fields):
    """The algorithm on `dataset`, what it learns from, what is held out, and the facts."""
    config = script.Config(dataset=dataset, hidden_dim=16, batch_size=8, **fields)
    algorithm = script.Algorithm(config, 3, 1, torch.device("cpu"))
    data = minari.load_dataset(dataset)
    return algorithm, *script.load_transitions(data, data.action_space, algorithm, hold_out=True)


def test_every_tenth_episode_is_held_out(scripts, logs):
    _, learned, held_out, facts = learner(scripts["bc"], logs, normalize_states=False)
    dataset = minari.load_dataset(logs)
    expected = [e for i, e in enumerate(dataset.iterate_episodes()) if i in (9, 19)]
    assert len(held_out["rewards"]) == sum(len(e.rewards) for e in expected) == 29 + 39
    assert len(learned["rewards"]) == facts["transitions"] == dataset.total_steps - 68
    actions = np.concatenate([e.actions for e in expected])
    np.testing.assert_allclose(held_out["actions"], actions / 2, atol=1e-6)
    following = np.concatenate([e.observations[1:] for e in expected])
    np.testing.assert_allclose(held_out["next_observations"], following, atol=1e-6)


def test_units_are_those_of_the_other_episodes(scripts, logs):
    algorithm, learned, _, _ = learner(scripts["td3_bc"], logs, normalize_states=True)
    assert learned["observations"].mean(0).abs().max() < 1e-4
    rest = [e for i, e in enumerate(minari.load_dataset(logs).iterate_episodes()) if i % 10 != 9]
    observations = np.concatenate([e.observations[:-1] for e in rest])
    np.testing.assert_allclose(algorithm.units.mean, observations.mean(0), atol=1e-5)
    np.testing.assert_allclose(algorithm.units.std, observations.std(0) + 1e-3, rtol=1e-4)


def test_the_best_episodes_are_of_those_to_learn_from(scripts, logs):
    _, learned, held_out, _ = learner(scripts["bc"], logs, fraction=0.1)
    returns = [e.rewards.sum() if i % 10 != 9 else -np.inf
               for i, e in enumerate(minari.load_dataset(logs).iterate_episodes())]
    best = np.argsort(returns)[::-1][:2]  # a tenth of 23, rounded
    lengths = [20 + i for i in best]
    assert len(learned["rewards"]) in (sum(lengths), sum(lengths[:1]))
    assert len(held_out["rewards"]) == 68


def test_metrics_are_means_over_held_out_batches(scripts, logs):
    script = scripts["bc"]
    algorithm, _, held_out, _ = learner(script, logs)
    found = script.measure_heldout(algorithm, held_out)
    batches = script.draw_batches(held_out, 8, 0, 0)
    with torch.no_grad():
        batches = [next(batches) for _ in range(20)]
        errors = [(algorithm.actor(b["observations"]) - b["actions"]).square().mean() for b in batches]
    assert found["heldout/actor/loss"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    assert set(found) == {"heldout/actor/loss", "heldout/actor/support_gap"}
    with torch.no_grad():
        rows = np.random.default_rng(0).integers(68, size=1024)
        distance = (algorithm.actor(held_out["observations"]) - held_out["actions"])[rows].norm(dim=1).mean()
    assert found["heldout/actor/support_gap"] == pytest.approx(float(distance), rel=1e-5)


def test_measured_without_dropout_and_leaving_no_trace(scripts, logs):
    script = scripts["iql"]
    algorithm, _, held_out, _ = learner(script, logs, dropout=0.5)
    state, weights = torch.get_rng_state(), [p.clone() for p in algorithm.actor.parameters()]
    first = script.measure_heldout(algorithm, held_out)
    assert torch.equal(state, torch.get_rng_state())
    assert algorithm.actor.training
    assert algorithm.critic.training
    torch.manual_seed(1)
    assert script.measure_heldout(algorithm, held_out) == first  # other units would be dropped
    assert all(map(torch.equal, weights, algorithm.actor.parameters()))
    noisy = scripts["td3_bc"]
    algorithm, _, held_out, _ = learner(noisy, logs)
    state = torch.get_rng_state()
    noisy.measure_heldout(algorithm, held_out)  # its critic's loss draws noise
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_without_an_environment(name, call, scripts, logs, tmp_path):
    status, out, err = call(name, *short(logs, tmp_path))
    assert status == 0, err
    folder = tmp_path / "offline" / name / logs / "default/seed-0"
    record = json.loads((folder / "run.json").read_text())
    metrics = pd.read_csv(folder / "metrics.csv")
    assert "no environment to evaluate in: every tenth episode is held out" in out
    assert record["result"].startswith("no environment: heldout/")
    assert record["result"] in out
    assert record["heldout/actor/loss"] == pytest.approx(metrics["heldout/actor/loss"].iloc[-1])
    script, policy = scripts[name], scripts[name].load(folder)
    data = minari.load_dataset(logs)
    _, held_out, facts = script.load_transitions(data, data.action_space, policy, hold_out=True)
    assert record["transitions"] == facts["transitions"] == data.total_steps - 68
    again = script.measure_heldout(policy, held_out)
    assert again["heldout/actor/support_gap"] == pytest.approx(record["heldout/actor/support_gap"])
    assert again["heldout/actor/loss"] == pytest.approx(record["heldout/actor/loss"], rel=0.2)  # noise
    assert metrics.set_index("update")["heldout/actor/support_gap"].notna().to_dict() == {
        10: False, 20: True, 30: False, 40: True
    }
    assert not {"score", "return_mean"} & {key for key, value in record.items() if value is not None}
    assert pd.read_csv(folder / "evaluations.csv").empty


def test_how_often_it_is_measured_never_changes_training(call, scripts, logs, tmp_path):
    for every in (20, 40):
        assert call("td3_bc", *short(logs, tmp_path / str(every), eval_every=every))[0] == 0
    states = [
        torch.load(next((tmp_path / every).rglob("checkpoint.pt")), weights_only=True)["state"]["actor"]
        for every in ("20", "40")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_an_environment_on_the_command_line_is_evaluated_in(call, logs, tmp_path):
    status, out, _ = call("bc", *short(logs, tmp_path, environment="Pendulum-v1"))
    assert status == 0
    assert "evaluated in Pendulum-v1" in out
    assert "held out" not in out
    record = json.loads(next(tmp_path.rglob("run.json")).read_text())
    assert record["transitions"] == minari.load_dataset(logs).total_steps


def test_too_few_episodes_to_hold_one_out(call, minari_root, tmp_path):
    env = gym.make("Pendulum-v1")
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    minari.create_dataset_from_buffers(
        "test/logs/few-v0", random_episodes(env, 9, steps=5), data_format="hdf5", **spaces
    )
    status, _, err = call("bc", *short("test/logs/few-v0", tmp_path))
    assert status == 2
    assert "too few episodes" in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
