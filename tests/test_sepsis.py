"""algorithms/collect/sepsis.py: exact values, the environment, the logs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
from conftest import ROOT, load_script
from gymnasium.utils.env_checker import check_env

sepsis = load_script("collect/sepsis.py")
MISSING = importlib.util.find_spec("icu_sepsis") is None
needs_package = pytest.mark.skipif(MISSING, reason="the package icu-sepsis is missing: make discrete")
DOCTORS, UNIFORM, OPTIMUM = 0.7818, 0.7801, 0.8751  # shared facts: dynamic programming, discount 1


def run(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(ROOT / "algorithms/collect/sepsis.py"), *arguments]
    variables = {**os.environ, "MINARI_DATASETS_PATH": str(root), **environment}
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def chain(monkeypatch):
    """Three living states in a row for the process: dose 1 moves on (then to survival), others to death."""
    transitions = np.zeros((716, 25, 716))
    transitions[..., sepsis.DEATH] = 1
    transitions[[0, 1, 2], 1] = 0
    transitions[0, 1, 1] = transitions[1, 1, 2] = 1
    transitions[2, 1, [sepsis.SURVIVAL, 0]] = 0.75, 0.25
    starts = np.zeros(716)
    starts[0] = 1
    process = {"transitions": transitions, "starts": starts, "clinician": np.full((716, 25), 0.04)}
    monkeypatch.setattr(sepsis, "read_dynamics", lambda: process)
    yield process
    sepsis.find_optimum.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    sepsis.find_optimum.cache_clear()


# --------------------------------------- values of a known chain ----------------------------------------


@pytest.mark.equation(2)
def test_values_solve_the_linear_system(chain):
    """With half of the doses right: V2 = .5 (.75 + .25 V0), V1 = .5 V2, V0 = .5 V1, so V0 = 3/31."""
    policy = np.zeros((716, 25))
    policy[:, 1] = policy[:, 3] = 0.5
    assert sepsis.value(policy) == pytest.approx(3 / 31)
    assert sepsis.state_values(policy)[:3] == pytest.approx([3 / 31, 6 / 31, 12 / 31])
    assert sepsis.action_values(policy)[2, :3] == pytest.approx([0, 0.75 + 0.25 * 3 / 31, 0])


@pytest.mark.equation(3)
def test_the_optimum_takes_the_way(chain):
    """Dose 1 throughout comes back to the start until it survives: 1."""
    policy = sepsis.policy_table("optimum")
    assert (policy[:3].argmax(1) == 1).all()
    assert ((policy == 1).sum(1) == 1).all()
    assert sepsis.value(policy) == pytest.approx(1)


@pytest.mark.equation(1)
def test_survival_alone_is_rewarded(chain):
    policy = sepsis.policy_table("optimum")
    courses = sepsis.simulate(policy, 50, np.random.default_rng(0))
    assert (courses["lengths"] % 3 == 0).all()
    assert courses["lengths"].max() > 3
    assert (courses["rewards"].sum(1) == 1).all()
    last = courses["lengths"] - 1
    assert (courses["rewards"][np.arange(50), last] == 1).all()
    courses = sepsis.simulate(np.full((716, 25), 0.04), 50, np.random.default_rng(0))
    ends = courses["states"][np.arange(50), courses["lengths"]]
    assert (courses["rewards"].sum(1) == (ends == sepsis.SURVIVAL)).all()
    assert (ends == sepsis.DEATH).mean() > 0.8


def test_the_course_does_not_depend_on_the_number_that_drew_the_dose(chain):
    """The chain's value by simulation; one random number for both would make it .067."""
    policy = np.zeros((716, 25))
    policy[:, 1] = policy[:, 3] = 0.5
    survived = sepsis.simulate(policy, 8000, np.random.default_rng(1))["rewards"].sum(1)
    assert abs(survived.mean() - 3 / 31) < 4 * survived.std() / 8000**0.5


def test_choices_follow_their_probabilities():
    probabilities = np.array([[0.2, 0.0, 0.8], [0.0, 1.0, 0.0]])
    assert sepsis.draw_choices(probabilities, np.array([0.0, 0.0])).tolist() == [0, 1]
    assert sepsis.draw_choices(probabilities, np.array([0.2, 0.999])).tolist() == [2, 1]
    uniform = np.random.default_rng(0).random(10_000)
    choices = sepsis.draw_choices(np.tile(probabilities[0], (10_000, 1)), uniform)
    assert np.bincount(choices) / 10_000 == pytest.approx([0.2, 0.0, 0.8], abs=0.015)


# -------------------------------------- the process of the package --------------------------------------


@needs_package
@pytest.mark.parametrize(
    ("name", "known"), [("clinician", DOCTORS), ("random", UNIFORM), ("optimum", OPTIMUM)]
)
def test_values_are_the_published_ones(name, known):
    assert sepsis.value(sepsis.policy_table(name)) == pytest.approx(known, abs=5e-5)


@needs_package
def test_no_dose_of_any_state_betters_the_optimum():
    """Bellman's equation, written anew: V*(s) = max_a sum_s' P (r + V*(s'))."""
    process, values = sepsis.read_dynamics(), sepsis.state_values(sepsis.policy_table("optimum"))
    beyond = np.concatenate([values, [0, 1, 0]])  # what an end is worth, with its reward
    best = (process["transitions"][: sepsis.DEATH] * beyond).sum(-1).max(1)
    assert values == pytest.approx(best, abs=1e-9)


@needs_package
@pytest.mark.parametrize("name", ["clinician", "random", "optimum"])
def test_simulation_agrees_with_the_exact_value(name):
    policy, count = sepsis.policy_table(name), 4000
    courses = sepsis.simulate(policy, count, np.random.default_rng(3))
    survived = courses["rewards"].sum(1)
    assert abs(survived.mean() - sepsis.value(policy)) < 4 * survived.std() / count**0.5
    for i in range(5):
        for t in range(courses["lengths"][i]):
            state, dose = courses["states"][i, t], courses["actions"][i, t]
            assert courses["propensities"][i, t] == policy[state, dose] > 0


@needs_package
def test_doses_seen_less_often_do_what_the_mean_of_the_others_does():
    """By the package's list of the others; an eighth of the clinicians' choices are such doses."""
    folder = Path(importlib.util.find_spec("icu_sepsis").origin).parent / "envs/assets"
    assert json.loads((folder / "metadata.json").read_text())["threshold"] == 20
    lines = (folder / "admissible_actions.txt").read_text().splitlines()[1:]
    process, rare = sepsis.read_dynamics(), np.zeros(sepsis.DEATH)
    for state in range(sepsis.DEATH):
        shown = [int(dose) for dose in lines[state].split()]
        rest = np.setdiff1d(np.arange(25), shown)
        effects, rare[state] = process["transitions"][state], process["clinician"][state, rest].sum()
        assert np.abs(effects[rest] - effects[shown].mean(0)).max(initial=0) < 1e-12
    ways = np.einsum("sa,sat->st", process["clinician"][:713], process["transitions"][:713, :, :713])
    visits = np.linalg.solve(np.eye(713) - ways.T, process["starts"][:713])
    assert visits @ rare / visits.sum() == pytest.approx(1 / 8, abs=0.01)


@needs_package
def test_the_package_rewards_survival_alone_and_ends_there():
    """Its table of rewards, and its ends: death and survival lead to 715 by any dose, for no reward."""
    file = Path(importlib.util.find_spec("icu_sepsis").origin).parent / "envs/assets/dynamics.npz"
    with np.load(file) as found:
        rewards = found["r_mat"]
    assert (rewards[: sepsis.DEATH, :, sepsis.SURVIVAL] == 1).all()
    assert (np.delete(rewards[: sepsis.DEATH], sepsis.SURVIVAL, 2) == 0).all()
    assert (sepsis.read_dynamics()["transitions"][sepsis.DEATH :, :, 715] == 1).all()


@needs_package
def test_the_environment_is_the_same_process():
    env = gym.make(sepsis.register())
    check_env(env.unwrapped, skip_render_check=True)
    survived, rng, policy = [], np.random.default_rng(0), sepsis.policy_table("random")
    for number in range(600):
        _, _ = env.reset(seed=number)
        ended = False
        while not ended:
            state, reward, ended, truncated, info = env.step(int(rng.integers(25)))
            assert not truncated
            assert ended == (state >= sepsis.DEATH)
            assert reward == info["success"] == (state == sepsis.SURVIVAL)
        survived.append(reward)
    assert abs(np.mean(survived) - sepsis.value(policy)) < 4 * np.std(survived) / 600**0.5


@needs_package
def test_a_seed_gives_the_packages_course():
    """The package draws each state by Generator.choice, first of the starts."""
    process, env = sepsis.read_dynamics(), sepsis.Sepsis()
    for seed in range(40):
        rng, ended = gym.utils.seeding.np_random(seed)[0], False
        state, _ = env.reset(seed=seed)
        assert state == rng.choice(716, p=process["starts"])
        while not ended:
            wanted = rng.choice(716, p=process["transitions"][state, seed % 25])
            state, _, ended, _, _ = env.step(seed % 25)
            assert state == wanted


# ----------------------------------------------- the logs -----------------------------------------------


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> list[Path]:
    """Two Minari roots, each with a small mixed log."""
    if MISSING:
        pytest.skip("the package icu-sepsis is missing: make discrete")
    found = [tmp_path_factory.mktemp(f"root{number}") for number in range(2)]
    for root in found:
        done = run(root, "--dataset=reef/sepsis/mixed-v0", "--policy=mixed", "--episodes=41", "--seed=2")
        assert done.returncode == 0, done.stderr
        assert "0.7801 (random), 0.7818 (clinician), 0.8751 (optimum)" in done.stdout
    return found


def test_a_log_is_the_same_wherever_it_is_made(roots):
    logs = [minari.MinariDataset(root / "reef/sepsis/mixed-v0/data") for root in roots]
    hashes = [log.storage.metadata["content_hash"] for log in logs]
    assert hashes[0] == hashes[1] == sepsis.content_hash(logs[0])


def test_a_log_has_episodes_propensities_and_references(roots):
    log = minari.MinariDataset(roots[0] / "reef/sepsis/mixed-v0/data")
    known = log.storage.metadata
    assert (known["ref_min_score"], known["ref_max_score"]) == pytest.approx((DOCTORS, OPTIMUM), abs=5e-5)
    assert known["recipe"] == {"policy": "mixed", "episodes": 41, "seed": 2}
    assert log.observation_space == gym.spaces.Discrete(716)
    assert log.action_space == gym.spaces.Discrete(25)
    doctors, uniform = sepsis.policy_table("clinician"), sepsis.policy_table("random")
    assert log.total_episodes == 41
    for episode in log.iterate_episodes():
        steps, policy = len(episode.rewards), doctors if episode.id < 21 else uniform
        assert episode.observations.shape == (steps + 1,)
        assert (episode.observations[:-1] < sepsis.DEATH).all()
        assert episode.observations[-1] in (sepsis.DEATH, sepsis.SURVIVAL)
        assert episode.terminations.tolist() == [False] * (steps - 1) + [True]
        assert not episode.truncations.any()
        assert episode.rewards.sum() == (episode.observations[-1] == sepsis.SURVIVAL)
        wanted = policy[episode.observations[:-1], episode.actions]
        assert (episode.infos["propensity"] == wanted).all()


def test_a_log_that_is_there_stays_and_another_recipe_is_an_error(roots):
    done = run(roots[0], "--dataset=reef/sepsis/mixed-v0", "--policy=mixed", "--episodes=41", "--seed=2")
    assert (done.returncode, "is there" in done.stdout) == (0, True)
    done = run(roots[0], "--dataset=reef/sepsis/mixed-v0", "--policy=mixed", "--episodes=40", "--seed=2")
    assert done.returncode == 2
    assert "by another recipe" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy=doctor"], "policy: 'doctor' is not clinician or random or mixed"),
        (["--episodes=0"], "episodes: "),
        (["--policy=mixed", "--episodes=1"], "episodes: 1 is less than one by each of clinician, random"),
        (["--polcy=mixed"], "did you mean policy?"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, said):
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_without_the_package_the_error_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sepsis.read_dynamics.cache_clear()
    with pytest.raises(sepsis.UserError, match="make discrete"):
        sepsis.read_dynamics()
    sepsis.read_dynamics.cache_clear()


@needs_package
def test_a_new_process_makes_the_environment_from_the_log_through_the_file(roots):
    """As scripts of other families do it: they put this file in under the entry point's name."""
    code = (
        "import importlib.util, json, sys, minari\n"
        f"spec = importlib.util.spec_from_file_location('reef_sepsis', {str(Path(sepsis.__file__))!r})\n"
        "sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "env = minari.load_dataset('reef/sepsis/mixed-v0').recover_environment()\n"
        "print(json.dumps(int(env.reset(seed=0)[0])))\n"
    )
    variables = {**os.environ, "MINARI_DATASETS_PATH": str(roots[0])}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 <= json.loads(done.stdout.splitlines()[-1]) < sepsis.DEATH
