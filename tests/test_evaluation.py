"""Evaluation measures what one environment stepped alone would show, and leaves training alone."""

import csv
import itertools
import json
import math
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import OFFLINE, ROOT, load_script, new_learner, random_episodes, short
from runs import SMALL_OF


@pytest.fixture
def evaluate(scripts):
    return scripts["td3_bc"].evaluate


def vector(make, count: int = 10) -> gym.vector.SyncVectorEnv:
    """As `make_environments` does it, and it notes the seeds of every reset in `.seeds`."""
    mode = gym.vector.AutoresetMode.SAME_STEP
    environments = gym.vector.SyncVectorEnv([make] * count, copy=False, autoreset_mode=mode)
    environments.seeds, reset = [], environments.reset

    def noted(seed):
        environments.seeds += seed
        return reset(seed=seed)

    environments.reset = noted
    return environments


# ------------------------------------------ beside one environment ------------------------------------------


@pytest.mark.parametrize("name", ["Hopper-v5", "InvertedPendulum-v5"])
def test_it_equals_one_environment_stepped_alone(scripts, name):
    """To the last bit, episode for episode, if the policy's batch has the same size; 13 fill no two rounds.

    The policy is random and large enough for its last bits to depend on the batch's size.
    """
    td3_bc, alone = scripts["td3_bc"], gym.make(name)
    torch.manual_seed(3)
    sizes = alone.observation_space.shape[0], alone.action_space.shape[0]
    space = alone.action_space
    scaler = td3_bc.Scaler(np.zeros(sizes[0]), np.ones(sizes[0]), space.low, space.high)
    policy = td3_bc.TD3BC(td3_bc.Config(), scaler)
    environments = vector(lambda: gym.make(name))
    table = td3_bc.evaluate(policy.act, environments, 13, (0, 5, 1))
    assert len(table) == 13
    assert len({*environments.seeds}) == len(environments.seeds) == 20
    assert table["length"].nunique() > 1
    for row, seed in zip(table.itertuples(), environments.seeds):
        observation, _ = alone.reset(seed=seed)
        total, length, over = 0.0, 0, False
        while not over:
            batch = np.random.default_rng(length).standard_normal((10, sizes[0]))
            batch[row.Index % 10] = observation
            action = policy.act(batch)[row.Index % 10]
            observation, reward, terminated, truncated, _ = alone.step(action)
            total, length, over = total + reward, length + 1, terminated or truncated
        assert (row._1, row.length) == (total, length), f"episode {row.Index}"


# ---------------------------------------- a counting environment ----------------------------------------


class Counter(gym.Env):
    """An episode of 1 + seed % 5 steps (then of 2) with rewards 1, 2, ...; it shows its seed and its step.

    `success(step, length, first)` is what its info says of it; None: the info does not have it.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, success=lambda step, length, first: None):
        self.success = success

    def reset(self, seed=None, options=None):
        self.first, self.seed = seed is not None, seed or 0
        self.length, self.step_number = (1 + seed % 5) if self.first else 2, 0
        return np.array([self.seed, 0.0]), {}

    def step(self, action):
        self.step_number += 1
        over = self.step_number == self.length
        found = self.success(self.step_number, self.length, self.first)
        info = {} if found is None else {"success": found}
        terminated = over and self.seed % 2 == 0
        observation = np.array([self.seed, float(self.step_number)])
        return observation, float(self.step_number), terminated, over and not terminated, info


class Still:
    """A policy that notes what it sees."""

    def __init__(self):
        self.seen, self.updates = [], 0

    def act(self, observations):
        self.seen.append(observations.copy())
        return np.zeros((len(observations), 1), np.float32)


@pytest.mark.parametrize(("episodes", "rounds"), [(1, 1), (3, 1), (10, 1), (11, 2), (25, 3)])
def test_every_episode_counts_once_and_to_its_end(evaluate, episodes, rounds):
    """Those that end early play on uncounted, so that the policy always sees ten rows."""
    environments, policy = vector(Counter), Still()
    table = evaluate(policy.act, environments, episodes, (0, 0, 0))
    assert list(table) == ["return", "length", "success"]
    assert list(table.index) == list(range(episodes))
    assert len(environments.seeds) == 10 * rounds
    lengths = [1 + seed % 5 for seed in environments.seeds]
    assert table["length"].tolist() == lengths[:episodes]
    assert table["return"].tolist() == [n * (n + 1) / 2 for n in lengths[:episodes]]
    assert {seen.shape for seen in policy.seen} == {(10, 2)}
    assert len(policy.seen) == sum(max(lengths[first : first + 10]) for first in range(0, 10 * rounds, 10))
    assert policy.seen[0][:, 0].tolist() == environments.seeds[:10]


SUCCESS = {
    "unknown": (lambda step, length, first: None, lambda length: math.nan),
    "never": (lambda step, length, first: False, lambda length: 0.0),
    "always": (lambda step, length, first: True, lambda length: 1.0),
    "only at the last step": (lambda step, length, first: step == length, lambda length: 1.0),
    "only at the second step": (lambda step, length, first: step == 2, lambda length: float(length >= 2)),
    "never at the last step": (lambda step, length, first: step < length, lambda length: float(length > 1)),
    "only in what is not counted": (lambda step, length, first: not first, lambda length: 0.0),
    "a numpy bool": (lambda step, length, first: np.bool_(step == length), lambda length: 1.0),
    "told only where there is one": (
        lambda step, length, first: np.bool_(True) if step == length == 3 else None,
        lambda length: float(length == 3),
    ),
    "a number": (lambda step, length, first: 0.5 * (step == length), lambda length: 0.5),
}


@pytest.mark.parametrize("kind", SUCCESS)
def test_success_is_that_of_any_step(evaluate, kind):
    success, wanted = SUCCESS[kind]
    environments = vector(lambda: Counter(success))
    table = evaluate(Still().act, environments, 25, (0, 0, 0))
    lengths = [1 + seed % 5 for seed in environments.seeds]
    assert {*lengths} == {1, 2, 3, 4, 5}
    np.testing.assert_array_equal(table["success"], [wanted(length) for length in lengths[:25]])


# ----------------------------------------- seeds and generators -----------------------------------------


def test_starts_depend_on_seed_and_update_alone(evaluate):
    def starts(*seed: int) -> list[int]:
        environments = vector(Counter)
        evaluate(Still().act, environments, 12, seed)
        return environments.seeds

    cases = {seed: starts(*seed) for seed in itertools.product((0, 1), (0, 5000, 10_000), (0, 1))}
    assert len({number for seeds in cases.values() for number in seeds}) == 12 * 20  # all different
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    random.seed(1)
    assert all(starts(*seed) == seeds for seed, seeds in cases.items())


@pytest.mark.parametrize("name", OFFLINE)
def test_evaluation_leaves_every_generator_alone(scripts, name):
    """And the networks: their weights, and the mode in which dropout works."""
    script = scripts[name]
    dropout = {"dropout": 0.5} if hasattr(script.Config, "dropout") else {}
    config = script.Config(hidden_dim=8, **dropout, **SMALL_OF.get(name, {}))
    learner = new_learner(script, config, 3, 1)
    remembers = hasattr(script, "LastRewards")
    act = partial(learner.act, rewards=None) if remembers else learner.act  # None: an episode begins
    environments = vector(lambda: gym.make("Pendulum-v1", max_episode_steps=5))

    def state() -> str:
        generators = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()  # noqa: NPY002
        weights = [weight.tolist() for weight in learner.actor.parameters()]
        return repr((generators, weights, [module.training for module in learner.actor.modules()]))

    before = state()
    first = script.evaluate(act, environments, 12, (0, 100, 0))
    assert state() == before
    again = script.evaluate(act, environments, 12, (0, 100, 0))
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    other = script.evaluate(act, environments, 12, (0, 200, 0))
    assert not first.equals(other)


# ------------------------------------------------ scores ------------------------------------------------


class Fortune(gym.Env):
    """One step, whose reward is `fortune`."""

    observation_space = action_space = gym.spaces.Box(-1, 1, (1,))
    fortune = 1.0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), self.fortune, True, False, {}


@pytest.fixture
def fortune(minari_root, monkeypatch):
    """fortune(3000, **metadata) is a dataset id; policies get 3000 in its environment, test/Fortune-v0."""
    spec = gym.envs.registration.EnvSpec("test/Fortune-v0", entry_point=Fortune)
    monkeypatch.setitem(gym.registry, spec.id, spec)
    spaces = {"observation_space": Fortune.observation_space, "action_space": Fortune.action_space}
    used = []

    def make(reward: float, **metadata) -> str:
        monkeypatch.setattr(Fortune, "fortune", reward)
        used.append(f"test/fortune/number{len(used)}-v0")
        episodes = random_episodes(Fortune(), 3)
        dataset = minari.create_dataset_from_buffers(used[-1], episodes, **spaces, data_format="hdf5")
        dataset.storage.update_metadata(metadata)
        return used[-1]

    yield make
    for name in used:
        minari.delete_dataset(name)


def outcome(call, dataset: str, folder: Path, **fields) -> SimpleNamespace:
    """Record, tables and output of a run of td3_bc in the environment Fortune."""
    status, out, _ = call("td3_bc", *short(dataset, folder, environment="test/Fortune-v0", **fields))
    assert status == 0
    folder = folder / f"offline/td3_bc/{dataset}/default/seed-0"
    info = json.loads((folder / "run.json").read_text())
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("metrics", "evaluations")}
    return SimpleNamespace(info=info, out=out, **tables)


def references(dataset: str) -> dict[str, float]:
    with open(ROOT / "results/reference_scores.csv", newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["dataset"] == dataset]
    return {"ref_min": float(row["ref_min"]), "ref_max": float(row["ref_max"])}


@pytest.mark.parametrize(
    ("name", "reward", "score"),
    [("hopper", 3000, 92.8009), ("halfcheetah", 5000, 42.5300), ("walker2d", 4000, 87.0977)],
)
def test_known_scores(call, fortune, tmp_path, name, reward, score):
    """The learner sees other rewards, evaluations do not."""
    learner = {"reward_scale": 0.001, "reward_shift": -5, "normalize_rewards": "false"}
    pair = references(f"mujoco/{name}/medium-v0")
    found = outcome(call, fortune(float(reward)), tmp_path, **pair, **learner)
    assert found.info["score"] == pytest.approx(score, abs=5e-5)
    assert found.info["best_score"] == pytest.approx(score, abs=5e-5)
    assert (found.info["return_mean"], found.info["return_std"], found.info["length_mean"]) == (reward, 0, 1)
    assert (found.evaluations["return"] == reward).all()
    assert found.metrics["eval/score"].dropna().tolist() == pytest.approx([score] * 2, abs=5e-5)
    assert f"final evaluation: score {score:.2f}, return_mean {reward:.2f}" in found.out
    assert f"score {score:.1f} (best on the way, chosen with the simulator: {score:.1f})" in found.out


def test_references_of_the_dataset_come_first(call, fortune, tmp_path):
    dataset = fortune(30.0, ref_min_score=10.0, ref_max_score=50.0)
    assert outcome(call, dataset, tmp_path, ref_min=0, ref_max=100).info["score"] == 50


@pytest.mark.parametrize("pair", [{}, {"ref_min": 0}, {"ref_max": 100}])
def test_without_references_there_is_no_score(call, fortune, tmp_path, pair):
    """Never an invented one: empty in the tables, null in the record, not printed."""
    found = outcome(call, fortune(30.0), tmp_path, **pair)
    assert (found.info["score"], found.info["best_score"], found.info["return_mean"]) == (None, None, 30)
    assert "eval/score" not in found.metrics
    assert "score" not in found.out.replace("seed-0", "")
    assert "return_mean 30.0 (best on the way" in found.out


WRONG = [[0.1, 0.2], [0.1, 0.2, 0.3, 0.4], [0.1, float("nan"), 0.3], [0.1, 0.2, 1e39]]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("batched", [False, True])
def test_act_refuses_what_is_no_observation(wrong, batched):
    """Of the wrong size, or not finite as float32: a clear error instead of an action that means nothing."""
    script = load_script("offline/td3_bc.py")
    learner = new_learner(script, script.Config(hidden_dim=4), 3, 2)
    observations = [wrong, wrong] if batched else wrong
    with np.errstate(over="ignore"), pytest.raises(script.UserError, match="not all are finite"):
        learner.act(observations)
