"""What holds for every script of algorithms/discrete: observations of three kinds, choices, runs, errors; and
on sepsis, what their policies are worth exactly."""

import importlib.util
import json
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
import torch
from choices import (
    ACTIONS,
    Grid,
    Screens,
    Walk,
    batch,
    chosen,
    dt_windows,
    huber,
    learner,
    make_images,
    target,
)
from conftest import ROOT, load_script, short
from logs import course, store
from oracles import BATCH, Constant, assert_compiled_is_eager, perceptron, weights
from runs import assert_same_run
from test_contracts import distinct_steps, optimizer_faults, parts
from test_learning import mostly

NAMES = sorted(path.stem for path in (ROOT / "algorithms/discrete").glob("*.py"))
CRITICS = [name for name in NAMES if name not in ("bc", "dt")]
pytestmark = pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is None)")  # Minari's advice
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("icu_sepsis") is None, reason="the package icu-sepsis is missing: make discrete"
)


def test_there_are_scripts():
    assert {"bc", "bcq", "cql", "dqn", "dt", "iql"} <= {*NAMES}


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
    "stacked frames": (
        gym.spaces.Box(0, 255, (4, 20, 18), np.uint8),
        [np.random.default_rng(0).integers(2, size=(3, 4, 20, 18), dtype=np.uint8)],
    ),
}
NETWORK_INPUTS = {
    "states": lambda seen: np.eye(5)[[0, 4]],
    "vectors": lambda seen: (seen - [2, 3]) / 1.001,
    "planes": lambda seen: seen.astype(float),  # the largest value is 1
    "stacked frames": lambda seen: seen.transpose(0, 2, 3, 1).astype(float),  # channels last
}


@pytest.mark.parametrize("kind", KINDS)
def test_observations_reach_the_networks(minari_root, kind):
    script, (space, seen) = load_script("discrete/cql.py"), KINDS[kind]
    name = f"test/kinds/{kind.replace(' ', '-')}-v0"
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
    dtypes = {"states": torch.int64, "vectors": torch.float32}
    assert data["observations"].dtype == dtypes.get(kind, torch.uint8)
    rows = encoder.encode_batch(data)
    wanted = NETWORK_INPUTS[kind](seen[0][:2])
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
    rows, asked = (dt_windows(rows), (None,)) if name == "dt" else (rows, ())
    assert all(np.isfinite(float(value)) for value in found.update(rows).values())
    assert found.probabilities(planes[0].numpy(), *asked).shape == (3, 4)


@pytest.fixture(scope="module")
def grids(minari_root) -> str:
    return make_images(Grid, "test/grids-v0")


@pytest.mark.parametrize("name", NAMES)
def test_of_minigrids_dicts_the_image_is_read_and_played_by(grids, tmp_path, capsys, name):
    """A space of missions, which cannot be flattened, and texts among the observations do no harm."""
    train(name, *short(grids, tmp_path, updates=4, eval_every=2, log_every=2))
    assert "of the observations' direction, image, mission only image is read" in capsys.readouterr().out
    folder = tmp_path / f"discrete/{name}/{grids}/default/seed-0"
    run = json.loads((folder / "run.json").read_text())
    assert (run["status"], run["length_mean"]) == ("finished", 4)
    policy = load_script(f"discrete/{name}.py").load(folder)
    more = (None,) if name == "dt" else ()
    image = np.full((7, 7, 3), 2, np.uint8)
    given = policy.probabilities({"direction": 1, "image": image, "mission": "?"}, *more)
    assert given == pytest.approx(policy.probabilities(image, *more))
    assert given.shape == (7,)


def test_what_is_read_of_minigrids_dicts(grids):
    script, dataset = load_script("discrete/bc.py"), minari.load_dataset(grids)
    episodes, _ = script.read_choices(dataset)
    for episode, recorded in zip(episodes, dataset.iterate_episodes()):
        assert episode["observations"].dtype == np.uint8
        assert episode["observations"].tolist() == recorded.observations["image"].tolist()
    other = script.image_alone(dataset)
    assert other.observation_space.shape == (7, 7, 3)
    assert (other.id, other.action_space.n) == (grids, 7)
    assert dataset.env_spec.additional_wrappers == ()  # as it was


@pytest.mark.parametrize("name", NAMES)
def test_choices_that_do_not_fit_into_memory(grids, tmp_path, monkeypatch, name):
    """Three copies: of images, alone of a Dict, in bytes; of choices and two more numbers in 4 bytes each."""
    script, steps = load_script(f"discrete/{name}.py"), minari.load_dataset(grids).total_steps
    free = SimpleNamespace(available=3 * steps * (7 * 7 * 3 + 4 + 8) - 1)
    monkeypatch.setattr(script.psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(script, "read_choices", lambda *_: pytest.fail("it has read the data"))
    config = script.parse_config(short(grids, tmp_path))
    with pytest.raises(script.UserError, match=rf"{grids} needs 0\.0 GB of memory; 0\.0 GB are free"):
        script.train(config)
    free.available += 1
    with pytest.raises(pytest.fail.Exception, match="it has read the data"):
        script.train(config)


def test_a_dataset_without_images_is_what_it_was(walk):
    script, dataset = load_script("discrete/bc.py"), minari.load_dataset(walk)
    same = script.image_alone(dataset)
    assert (same.observation_space, same.env_spec) == (dataset.observation_space, dataset.env_spec)
    vectors = {"b": np.ones(2), "a": np.zeros(1)}
    assert script.image_of(vectors) is vectors


def test_frames_in_the_form_of_atari_are_read_learnt_from_and_played_by(minari_root):
    """210 x 160 x 3, out of JPEG."""
    script = load_script("discrete/cql.py")
    dataset = minari.load_dataset(make_images(Screens, "test/screens-v0"))
    episodes, _ = script.read_choices(dataset)
    wanted = np.arange(5)[:, None, None, None] * np.full((210, 160, 3), 60)
    assert episodes[0]["observations"].dtype == np.uint8
    assert np.abs(episodes[0]["observations"] - wanted).max() <= 2  # JPEG's loss
    encoder = script.fit_encoder(episodes, dataset, True)
    data = script.choice_transitions(episodes, encoder)
    learner = script.DiscreteCQL(script.Config(hidden_dim=8), encoder)
    metrics = learner.update({name: column[:4] for name, column in data.items()})
    assert all(np.isfinite(float(value)) for value in metrics.values())
    environments = script.make_environments(script.image_alone(dataset), None)
    table = script.evaluate_choices(learner.choose, environments, 1, (0, 0, 0))
    assert table["length"].tolist() == [4]


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


@pytest.mark.parametrize("name", NAMES)
def test_optimisers_take_the_configs_step_sizes(name):
    found = learner(name, **distinct_steps(load_script(f"discrete/{name}.py")))
    assert parts(found, torch.optim.Optimizer)
    assert optimizer_faults(found) == []


@pytest.mark.parametrize("name", ["cql"])
def test_compiled_is_eager(name):
    script = load_script(f"discrete/{name}.py")
    assert_compiled_is_eager(script, [learner(name), learner(name)], batch())


# ------------------------------------------- runs and errors --------------------------------------------


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

    def scores():
        for seed in range(3):
            train(name, *short(walk, tmp_path, **known, eval_every=400, log_every=200, seed=seed))
            folder = tmp_path / f"discrete/{name}/{walk}/default/seed-{seed}"
            run = json.loads((folder / "run.json").read_text())
            assert run["status"] == "finished"
            policy = script.load(folder)
            if run["score"] >= 90:
                assert int(policy.act(2)) == 1
            assert policy.act(np.array([1, 2, 3])).shape == (3,)
            assert pd.read_csv(folder / "metrics.csv")["actor/agreement"].between(0, 1).all()
            yield run["score"]

    assert mostly(scores(), 90, 100)


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

# -------------------------------------------- choices forbidden ---------------------------------------------

ALLOWED = np.array([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])  # of the batch's states, and of its choices
NEXT_ALLOWED = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]])  # the second is an end


def masked() -> dict[str, torch.Tensor]:
    return batch() | {"allowed": torch.tensor(ALLOWED) == 1, "next_allowed": torch.tensor(NEXT_ALLOWED) == 1}


def log_softmax_of_allowed(logits: np.ndarray, row: int) -> float:
    """log pi(a|s) of the batch's choice, where pi sums to 1 over the allowed."""
    possible = logits[row][ALLOWED[row] == 1]
    return logits[row, ACTIONS[row]] - np.log(np.exp(possible).sum())


@pytest.mark.parametrize("name", ["bc", "bcq", "iql", "dt"])
def test_actors_are_learnt_over_the_allowed(name):
    found, weight = learner(name, threshold=0.0, beta=1.0), np.ones(3)
    if name == "dt":
        found.actor = Constant(np.random.default_rng(0).normal(size=(3, 1, 4)).tolist())
        logits = found.actor.answer.detach().numpy()[:, 0]
        rows = dt_windows(batch()) | {"allowed": masked()["allowed"][:, None]}
        loss = found.actor_loss(rows)[0]
    else:
        logits = perceptron(weights(found.actor), np.array(BATCH["observations"]))
        if name == "iql":
            q = found.target_q(batch())
            advantage = q.numpy() - perceptron(weights(found.value), np.array(BATCH["observations"]))[:, 0]
            weight = np.minimum(np.exp(advantage), 100)
        loss = found.actor_loss(masked(), *([q] if name == "iql" else []))[0]
    wanted = -np.mean([weight[i] * log_softmax_of_allowed(logits, i) for i in range(3)])
    wanted += 0.01 * np.mean(logits**2) if name == "bcq" else 0
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    slopes = torch.autograd.grad(loss, list(found.actor.parameters()))
    assert all(slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("name", ["bcq", "cql", "dqn"])
def test_targets_take_the_best_of_the_allowed(name):
    found = learner(name, threshold=0.0, cql_weight=0.7)
    y = target(weights(found.critic), weights(found.target_critic), np.maximum(NEXT_ALLOWED, [[0], [1], [0]]))
    free = target(weights(found.critic), weights(found.target_critic), np.ones((3, 4)))
    assert np.abs(y - free).max() > 0.01  # the mask matters
    wanted = huber(chosen(weights(found.critic)) - y)
    if name == "cql":
        q = perceptron(weights(found.critic), np.array(BATCH["observations"]))
        wanted -= 0.7 * np.mean([log_softmax_of_allowed(q, i) for i in range(3)])
    loss = found.critic_loss(masked())[0]
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert torch.isfinite(torch.autograd.grad(loss, list(found.critic.parameters()))[0]).all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_forbidden_is_ever_chosen(name):
    found, states, more = learner(name), np.tile(BATCH["observations"], (200, 1)), ()
    if name == "dt":
        more = (None,)
    allowed = np.tile(ALLOWED.astype(np.int8), (200, 1))
    given = found.probabilities(states, *more, allowed)
    assert given.sum(1) == pytest.approx(1, abs=1e-6)
    assert (given[allowed == 0] == 0).all()
    assert allowed[np.arange(600), found.choose(states, *more, allowed)].all()
    assert not allowed[np.arange(600), found.act(states, *more)].all()
    with mock.patch.object(torch, "rand", torch.zeros):  # the lowest number there is
        assert allowed[np.arange(600), found.choose(states, *more, allowed)].all()


class Gated(Walk):
    """A walk to and fro: even places let go right only, odd ones left; it minds."""

    def allowed(self):
        return np.array([self.place % 2, 1 - self.place % 2], np.int8)

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], {"action_mask": self.allowed()}

    def step(self, action):
        assert self.allowed()[action], "forbidden"
        state, reward, ended, truncated, info = super().step(action)
        return state, reward, ended, truncated, info | {"action_mask": self.allowed()}


def gated_walks() -> list:
    env, episodes = gym.make("test/Gated-v0"), []
    for _ in range(10):
        state, info = env.reset()
        states, actions, rewards, masks, ended = [state], [], [], [info["action_mask"]], False
        while not ended:
            actions.append(int(masks[-1].argmax()))
            state, reward, ended, truncated, info = env.step(actions[-1])
            states.append(state)
            rewards.append(reward)
            masks.append(info["action_mask"])
            ended |= truncated
        episodes.append(course(states, actions, rewards, action_mask=masks))
    return episodes


@pytest.fixture(scope="module")
def gated(minari_root) -> str:
    gym.register("test/Gated-v0", f"{__name__}:Gated", max_episode_steps=29)  # ends elsewhere than it starts
    env = gym.make("test/Gated-v0")
    minari.create_dataset_from_buffers("test/gated-v0", gated_walks(), env=env, data_format="hdf5")
    return "test/gated-v0"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_keeps_to_the_masks_of_data_and_environment(gated, tmp_path, name):
    """The environment fails at the first forbidden choice; untrained learners would make one."""
    train(name, *short(gated, tmp_path, updates=4, eval_every=2, log_every=2))
    run = json.loads((tmp_path / f"discrete/{name}/{gated}/default/seed-0/run.json").read_text())
    assert run["status"] == "finished"


def test_masks_reach_the_batches(gated):
    script, dataset = load_script("discrete/cql.py"), minari.load_dataset(gated)
    episodes, _ = script.read_choices(dataset)
    data = script.choice_transitions(episodes, script.fit_encoder(episodes, dataset, True))
    for states, masks in (("observations", "allowed"), ("next_observations", "next_allowed")):
        assert data[masks].dtype == torch.bool
        assert data[masks].tolist() == [[place % 2 == 1, place % 2 == 0] for place in data[states].tolist()]


WRONG_MASKS = {
    "episode 1: action_mask forbids what was chosen at step 1": [[1, 1], [0, 1], [1, 1]],
    "episode 1: action_mask allows nothing at step 1": [[1, 1], [0, 0], [1, 1]],
    r"episode 1: action_mask of shape \(2, 2\), not \(3, 2\)": [[1, 1], [1, 1]],
    "infos have an action_mask in some episodes only": None,
}


@pytest.mark.parametrize("said", WRONG_MASKS)
def test_a_mask_at_fault_is_one_line(minari_root, said):
    script = load_script("discrete/bc.py")
    wrong = {} if WRONG_MASKS[said] is None else {"action_mask": WRONG_MASKS[said]}
    good = course([0, 1, 2], [0, 0], [1.0, 0.0], action_mask=[[1, 0], [1, 0], [0, 0]])  # an end needs none
    name = f"test/masks{[*WRONG_MASKS].index(said)}-v0"
    episodes = [good, course([0, 1, 2], [0, 0], [1.0, 0.0], **wrong)]
    dataset = store(name, episodes, actions=gym.spaces.Discrete(2))
    with pytest.raises(script.UserError, match=said):
        script.read_choices(dataset)


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
