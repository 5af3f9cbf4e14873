"""What holds for every script of algorithms/discrete: observations of three kinds, choices, runs, errors; and
on sepsis, what their policies are worth exactly."""

import importlib.util
import json

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
import torch
from choices import batch, learner
from conftest import ROOT, load_script, short
from logs import course, store
from oracles import assert_compiled_is_eager
from runs import assert_same_run

NAMES = sorted(path.stem for path in (ROOT / "algorithms/discrete").glob("*.py"))
CRITICS = [name for name in NAMES if name != "bc"]
pytestmark = pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is None)")  # Minari's advice
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("icu_sepsis") is None, reason="the package icu-sepsis is missing: make discrete"
)


def test_there_are_scripts():
    assert {"bc", "bcq", "cql", "dqn", "iql"} <= {*NAMES}


# --------------------------------------- observations and choices ---------------------------------------


def episodes_of(observations: list[np.ndarray], start: int = 0) -> list:
    return [course(seen, [start + 2, start], [0.5, 1.0]) for seen in observations]


KINDS = {
    "states": (gym.spaces.Discrete(5, start=3), [np.array([3, 7, 4])]),
    "vectors": (gym.spaces.Box(-9, 9, (2,), np.float64), [np.array([[1.0, 2], [3, 4], [5, 6]])]),
    "planes": (
        gym.spaces.Box(0, 255, (20, 18, 2), np.uint8),
        [np.random.default_rng(0).integers(2, size=(3, 20, 18, 2), dtype=np.uint8)],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_observations_reach_the_networks(minari_root, kind):
    script, (space, seen) = load_script("discrete/cql.py"), KINDS[kind]
    name = f"test/kinds/{kind}-v0"
    spaces = {"observation_space": space, "action_space": gym.spaces.Discrete(4, start=10)}
    episodes = episodes_of(seen, start=10)
    minari.create_dataset_from_buffers(name, episodes, data_format="hdf5", jpeg_encoding=False, **spaces)
    dataset = minari.load_dataset(name)
    episodes, _ = script.read_choices(dataset)
    encoder = script.fit_encoder(episodes, dataset, True)
    data = script.choice_transitions(episodes, encoder)
    assert data["actions"].tolist() == [2, 0]
    assert data["rewards"].tolist() == [0.5, 1.0]
    assert data["terminations"].tolist() == [0, 1]
    dtypes = {"states": torch.int64, "vectors": torch.float32, "planes": torch.uint8}
    assert data["observations"].dtype == dtypes[kind]
    rows = encoder.encode_batch(data)
    wanted = {
        "states": np.eye(5)[[0, 4]],
        "vectors": (seen[0][:2] - [2, 3]) / 1.001,
        "planes": seen[0][:2].astype(float),  # the largest value is 1
    }[kind]
    assert rows["observations"].numpy() == pytest.approx(wanted, abs=1e-6)
    learner = script.DiscreteCQL(script.Config(hidden_dim=8), encoder)
    assert all(np.isfinite(float(value)) for value in learner.update(data).values())
    for first in (seen[0][0], seen[0]):
        given, acts = learner.probabilities(first), learner.act(first)
        assert given.sum(-1) == pytest.approx(1)
        assert np.all((np.asarray(acts) >= 10) & (np.asarray(acts) < 14))
        assert given.shape[:-1] == np.shape(acts)
    again = script.Encoder(**encoder.state_dict())
    assert torch.equal(again.encode(seen[0]), encoder.encode(seen[0]))


@pytest.mark.parametrize("name", NAMES)
def test_every_script_learns_from_planes(name):
    found = learner(name, shape=(10, 10, 3))
    rng = torch.Generator().manual_seed(0)
    planes = torch.randint(2, (2, 3, 10, 10, 3), generator=rng, dtype=torch.uint8)
    rows = batch() | {"observations": planes[0], "next_observations": planes[1]}
    assert all(np.isfinite(float(value)) for value in found.update(rows).values())
    assert found.probabilities(planes[0].numpy()).shape == (3, 4)


@pytest.mark.parametrize("name", CRITICS)
def test_a_termination_ends_the_value_and_nothing_else_does(name):
    losses = {}
    for terminated in (0.0, 1.0):
        for scale in (1.0, 5.0):
            rows = batch() | {"terminations": torch.full((3,), terminated)}
            rows["next_observations"] = scale * rows["next_observations"]
            losses[terminated, scale] = float(learner(name).update(rows)["critic/loss"])
    assert losses[1.0, 1.0] == losses[1.0, 5.0]
    assert losses[0.0, 1.0] != pytest.approx(losses[0.0, 5.0], rel=1e-3)


@pytest.mark.parametrize("name", ["cql"])
def test_compiled_is_eager(name):
    script = load_script(f"discrete/{name}.py")
    assert_compiled_is_eager(script, [learner(name), learner(name)], batch())


# ------------------------------------------- runs and errors --------------------------------------------


class Walk(gym.Env):
    """States 0 to 4, from the middle; choice 1 goes right, 0 left; the right end pays 1."""

    observation_space, action_space = gym.spaces.Discrete(5), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 2
        return self.place, {}

    def step(self, action):
        self.place += 2 * int(action) - 1
        return self.place, float(self.place == 4), self.place in (0, 4), False, {"success": self.place == 4}


@pytest.fixture(scope="module")
def walk(minari_root) -> str:
    """Random walks; two of three go left."""
    if "test/Walk-v0" not in gym.registry:
        gym.register("test/Walk-v0", f"{__name__}:Walk", max_episode_steps=30)
    env, episodes, rng = gym.make("test/Walk-v0"), [], np.random.default_rng(0)
    for _ in range(150):
        states, actions, rewards, ended = [env.reset()[0]], [], [], False
        while not ended:
            actions.append(int(rng.random() < 0.35))
            state, reward, ended, truncated, _ = env.step(actions[-1])
            states.append(state)
            rewards.append(reward)
            ended |= truncated
        episodes.append(course(states, actions, rewards))
    references = {"ref_min_score": 0.0, "ref_max_score": 1.0}
    minari.create_dataset_from_buffers("test/walk-v0", episodes, env=env, data_format="hdf5", **references)
    return "test/walk-v0"


def train(name: str, *arguments: str):
    script = load_script(f"discrete/{name}.py")
    script.train(script.parse_config([*arguments]))


@pytest.mark.parametrize("name", CRITICS)
def test_who_learns_values_goes_where_the_pay_is(walk, tmp_path, name):
    """Imitation ends left two times of three and more; a run, its record, and its policy loaded."""
    speed = {"actor_lr": 1e-2, "critic_lr": 1e-2, "value_lr": 1e-2, "tau": 0.1, "threshold": 0.1}
    speed |= {"beta": 20.0, "cql_weight": 0.05, "expectile": 0.9, "updates": 400, "batch_size": 64}
    script = load_script(f"discrete/{name}.py")
    known = {key: value for key, value in speed.items() if hasattr(script.Config, key)}
    train(name, *short(walk, tmp_path, **known, eval_every=400, log_every=200))
    folder = tmp_path / f"discrete/{name}/{walk}/default/seed-0"
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["score"] >= 90
    policy = script.load(folder)
    assert int(policy.act(2)) == 1
    assert policy.act(np.array([1, 2, 3])).shape == (3,)
    assert pd.read_csv(folder / "metrics.csv")["actor/agreement"].between(0, 1).all()


def test_imitation_goes_where_the_data_go(walk, tmp_path):
    train("bc", *short(walk, tmp_path, updates=200, actor_lr=1e-2, final_eval_episodes=200))
    folder = tmp_path / f"discrete/bc/{walk}/default/seed-0"
    policy = load_script("discrete/bc.py").load(folder)
    assert policy.probabilities(np.array([1, 2, 3]))[:, 1] == pytest.approx(0.35, abs=0.12)
    assert json.loads((folder / "run.json").read_text())["score"] < 50


@pytest.mark.parametrize("name", NAMES)
def test_resuming_gives_the_same_bits(walk, tmp_path, monkeypatch, name):
    train(name, *short(walk, tmp_path / "whole"))
    script = load_script(f"discrete/{name}.py")
    save = script.Run.save

    def save_and_die(run, learner):
        save(run, learner)
        if learner.updates == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(name, *short(walk, tmp_path / "torn"))
    train(name, *short(walk, tmp_path / "torn"))
    place = f"discrete/{name}/{walk}/default/seed-0"
    folders = [tmp_path / where / place for where in ("whole", "torn")]
    assert_same_run(*folders)


def test_vectors_of_actions_are_refused_with_the_place_to_look(minari_root, run_script, pendulum, tmp_path):
    done = run_script("discrete/cql.py", *short(pendulum, tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "see algorithms/offline" in done.stderr


def test_numbers_that_are_not_finite_are_named(minari_root):
    script = load_script("discrete/dqn.py")
    dataset = store("test/kinds/bad-v0", [course([0, 1], [0], [1.0]), course([0, 1], [0], [np.nan])])
    with pytest.raises(script.UserError, match="episode 1: rewards are not all finite"):
        script.read_choices(dataset)


@pytest.mark.parametrize("wrong", [[0.1, 0.2], [0.1, float("nan"), 0.3]])
def test_an_encoder_refuses_what_is_no_observation(wrong):
    script = load_script("discrete/bc.py")
    encoder = script.Encoder([0.0] * 3, [1.0] * 3, 0, 0, 4, 0)
    assert encoder.encode([0.1, 0.2, 0.3]).shape == (3,)
    with pytest.raises(script.UserError, match="not all are finite"):
        encoder.encode(wrong)


# ------------------------------------------- sepsis, exactly --------------------------------------------


@pytest.fixture(scope="module")
def sepsis_log(minari_root):
    if importlib.util.find_spec("icu_sepsis") is None:
        pytest.skip("the package icu-sepsis is missing: make discrete")
    sepsis = load_script("collect/sepsis.py")
    sepsis.make_logs(sepsis.Config(dataset="reef/sepsis/clinician-v0", episodes=300))
    return "reef/sepsis/clinician-v0"


def test_a_run_on_sepsis_and_its_value_from_the_log(sepsis_log, run_script, tmp_path):
    """The whole way of a user: train, evaluate in the environment, and from the log alone."""
    fields = {"updates": 200, "actor_lr": 1e-2, "final_eval_episodes": 20, "eval_every": 200}
    arguments = short(sepsis_log, tmp_path, **fields)
    done = run_script("discrete/bc.py", *arguments)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / f"discrete/bc/{sepsis_log}/default/seed-0"
    policies = f"--policies=behavior {folder}"
    options = [f"--dataset={sepsis_log}", policies, "--resamples=100", f"--output_dir={tmp_path}"]
    done = run_script("evaluate/importance_sampling.py", *options)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / f"evaluate/importance_sampling/{sepsis_log}/default/seed-0/values.csv")
    assert table["policy"].tolist() == ["behavior"] * 4 + [str(folder)] * 4
    assert table["value"].between(0, 2).all()
    assert table.query("policy == 'behavior'")["ess"].to_numpy() == pytest.approx(300)
    assert (table.query("policy != 'behavior'")["ess"] < 300).all()
