"""tools/watch.py: whose policy it plays, where, what it says of the episodes, and what it draws."""

import ctypes.util
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import imageio.v3 as imageio
import minari
import numpy as np
import pandas as pd
import pytest
import watch
from conftest import ROOT, load_script, random_episodes

pytest.register_assert_rewrite("runs")
from runs import place, record, small  # noqa: E402

COLORS = np.arange(0, 240, 30)  # of the frames of an episode


class Drawn(gym.Env):
    """Eight steps of reward -1, -2, ...; an observation is the number of steps; frames get lighter."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012
    observation_space = gym.spaces.Box(-9, 9, (3,))
    action_space = gym.spaces.Box(-2, 2, (1,))
    seeds, drawn = [], 0

    def __init__(self, render_mode=None, picture=True):
        self.render_mode, self.picture = render_mode, picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        assert self.action_space.contains(action)
        observation = np.full(3, self.steps, np.float32)
        return observation, -float(self.steps), self.steps == 8, False, {"success": self.steps == 3}

    def render(self):
        Drawn.drawn += 1
        return np.full((16, 24, 3), COLORS[self.steps % 8], np.uint8) if self.picture else None


gym.register("test/Drawn-v0", Drawn, disable_env_checker=True)


@pytest.fixture(scope="module")
def scripts() -> dict:
    """The two that are trained here: to load all takes seconds."""
    return {name: load_script(f"offline/{name}.py") for name in ("bc", "dt")}


@pytest.fixture(scope="module")
def trained(scripts, pendulum, tmp_path_factory) -> Path:
    """An output folder with runs of BC and of DT, whose policy asks for rewards."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("bc", "dt"):
        scripts[name].train(scripts[name].parse_config(small(scripts[name], pendulum, folder, seed=3)))
    return folder


@pytest.fixture
def bc(trained, pendulum) -> Path:
    return place(trained, "bc", pendulum, seed=3)


@pytest.fixture
def run(capsys, monkeypatch):
    """run(FOLDER, "--seed", 1) is the command line: exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(watch, "choose_renderer", lambda: None)  # it is for a process of its own

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return watch.main([*map(str, arguments)]), *capsys.readouterr()

    return run


def values(out: str) -> dict[str, list[float]]:
    """{score: [mean, deviation, standard error]} of what was printed."""
    rows = [line.replace("±", "").replace(",", "").split() for line in out.splitlines()]
    return {row[0]: [float(row[1]), float(row[2]), float(row[-1])] for row in rows if "±" in out and row
            and row[0] in ("score", "return", "length", "success") and row[3:4] == ["over"]}


@pytest.mark.parametrize("name", ["bc", "dt"])
def test_an_evaluation_again_is_the_scripts_own(scripts, trained, pendulum, run, name):
    folder, script = place(trained, name, pendulum, seed=3), scripts[name]
    status, out, err = run(folder, "--episodes", 25, "--no_video")
    assert (status, err) == (0, "")
    learner, dataset = script.load(str(folder)), script.load_dataset(pendulum)
    environments, act = script.make_environments(dataset, None), learner.act
    if name == "dt":
        environments = script.LastRewards(environments)
        act = lambda observations: learner.act(observations, environments.rewards)  # noqa: E731
    table = script.evaluate(act, environments, 25, (3, 40, 2, 0))
    scores = 100 * (table["return"] + 1000) / 900  # the references of conftest.py
    found = values(out)
    for key, wanted in {"return": table["return"], "score": scores, "length": table["length"]}.items():
        error = wanted.std(ddof=1) / 5
        assert found[key] == pytest.approx([wanted.mean(), wanted.std(ddof=0), error], abs=0.006)
    final = f"the run's own final evaluation: score {record(folder)['score']:.2f}, 12 episodes\n"
    assert final in out
    assert not (folder / "policy.gif").exists()


def test_starts_are_new_but_the_same_every_time(bc, run):
    first, again, other = (values(run(bc, "--episodes", 3, "--no_video", "--seed", seed)[1])
                           for seed in (0, 0, 1))
    assert first == again
    assert first["return"] != other["return"]
    table = pd.read_csv(bc / "evaluations.csv")
    assert not {round(value, 2) for value in table["return"]} & {first["return"][0]}


@pytest.mark.parametrize("name", ["bc", "dt"])
def test_an_animation_of_another_environment(trained, pendulum, run, tmp_path, name):
    output, folder = tmp_path / "new/film.gif", place(trained, name, pendulum, seed=3)
    Drawn.drawn = 0
    status, out, err = run(folder, "--environment", "test/Drawn-v0", "--output", output, "--seconds", 0.6)
    assert (status, err) == (0, "")
    frames = imageio.imread(output)
    assert frames[..., 0].mean((1, 2)) == pytest.approx([*COLORS[1:], 0, *COLORS[1:5]], abs=3)  # 12 of 24
    assert imageio.immeta(output)["duration"] == 50
    assert values(out)["return"] == [-36, 0, 0]
    assert values(out)["length"] == [8, 0, 0]
    assert values(out)["success"] == [1, 0, 0]
    assert "no scores: the run's references are for Pendulum-v1\n" in out
    assert "score" not in values(out)
    assert out.endswith(f"Animation: {output}\n")
    assert len({*Drawn.seeds[-3:]}) == 3
    assert Drawn.drawn == 13  # one to see whether it can
    assert not list(tmp_path.rglob("*.new*"))


def test_dt_is_told_the_rewards(scripts, trained, pendulum):
    """None when an episode begins, then each step's."""
    learner, told = scripts["dt"].load(str(place(trained, "dt", pendulum, seed=3))), []
    act = learner.act

    def spy(observations, rewards):
        told.append(rewards)
        return act(observations, rewards)

    learner.act = spy
    for _ in range(2):
        list(watch.play(learner, Drawn(), 0))
    assert told == [None, -1, -2, -3, -4, -5, -6, -7] * 2


def test_what_a_run_is_not_finished_with_is_said(bc, run, tmp_path, pendulum):
    folder = shutil.copytree(bc, place(tmp_path, "bc", pendulum, seed=3))
    info = record(folder) | {"status": "running", "result": "not finished"}
    (folder / "run.json").write_text(json.dumps(info))
    status, out, _ = run(folder, "--no_video")
    assert status == 0
    assert out.startswith("the run is not finished (not finished): this is the policy of its last checkpoint")


def assert_refused(result: tuple, *words: str) -> None:
    status, _, err = result
    assert status == 2, err
    assert err.startswith("watch.py: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_what_cannot_be_drawn_is_one_line(bc, run, monkeypatch):
    if importlib.util.find_spec("pygame") is None:
        assert_refused(run(bc), "Pendulum-v1 cannot be drawn: ", "-m pip install pygame, or --no_video")
    gym.register("test/Blank-v0", Drawn, disable_env_checker=True, kwargs={"picture": False})
    monkeypatch.setenv("MUJOCO_GL", "egl")
    result = run(bc, "--environment", "test/Blank-v0")
    assert_refused(result, "test/Blank-v0 cannot be drawn (MUJOCO_GL=egl)", watch.PACKAGES, "--no_video")
    assert not (bc / "policy.gif").exists()


def test_errors_are_one_line(bc, run, tmp_path, pendulum):
    assert_refused(run(tmp_path), f"{tmp_path} is no folder of a run")
    assert_refused(run(bc, "--no_video", "--environment", "Nowhere-v0"), "cannot make Nowhere-v0")
    assert_refused(run(bc, "--no_video", "--environment", "MountainCarContinuous-v0"), "sizes")
    assert_refused(run(bc, "--output", "film.doc"), "film.doc does not end in .gif")
    moved = shutil.copytree(bc, tmp_path / "moved")
    assert_refused(run(moved), "moved is not where a script puts its runs")
    other = shutil.copytree(bc, place(tmp_path, "bc", pendulum, seed=3))
    (other / "checkpoint.pt").unlink()
    assert_refused(run(other, "--no_video"), "has no checkpoint.pt")
    for arguments in (["--episodes", 0], ["--seconds", -1], ["--seed", -1]):
        with pytest.raises(SystemExit) as end:
            run(bc, *arguments)
        assert end.value.code == 2


def test_a_run_of_no_one_environment_is_refused(run, tmp_path):
    """Of several tasks, of lives in many rooms: their own `load` plays them."""
    folder = tmp_path / "context/dpt/reef/dark-room/histories-v0/default/seed-0"
    folder.mkdir(parents=True)
    config = {"dataset": "reef/dark-room/histories-v0", "variant": "default", "seed": 0}
    info = {"status": "finished", "result": "score 1", "config": config}
    (folder / "run.json").write_text(json.dumps(info))
    assert_refused(run(folder), "context/dpt, which is of no one environment")


@pytest.mark.parametrize(
    ("given", "libraries", "wanted"),
    [(None, ["EGL", "OSMesa"], "egl"), (None, ["OSMesa"], "osmesa"), (None, [], None), ("x", ["EGL"], "x")],
)
def test_the_renderer_is_one_that_is_there(monkeypatch, given, libraries, wanted):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: name if name in libraries else None)
    monkeypatch.setenv("MUJOCO_GL", "")  # put back afterwards
    del os.environ["MUJOCO_GL"]
    if given:
        os.environ["MUJOCO_GL"] = given
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    watch.choose_renderer()
    assert os.environ.get("MUJOCO_GL") == wanted


def test_a_renderer_that_is_not_there_is_one_line(bc):
    """MuJoCo, once imported, doesn't look again: so in a process of its own."""
    command = [sys.executable, ROOT / "tools/watch.py", bc]
    environ = os.environ | {"MUJOCO_GL": "nonsense"}
    done = subprocess.run(command, env=environ, check=False, capture_output=True, text=True)
    assert_refused((done.returncode, done.stdout, done.stderr), "MUJOCO_GL=nonsense cannot", watch.PACKAGES)


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason=f"EGL is missing: {watch.PACKAGES}")
def test_mujoco_without_a_display(scripts, minari_root, tmp_path):
    """As a user would, in a process of its own."""
    env = gym.make("HalfCheetah-v5", max_episode_steps=40)
    minari.create_dataset_from_buffers(
        "test/cheetah/random-v0", random_episodes(env, 2), env=env, data_format="hdf5")
    script = scripts["bc"]
    script.train(script.parse_config(small(script, "test/cheetah/random-v0", tmp_path)))
    folder = place(tmp_path, "bc", "test/cheetah/random-v0")
    command = [sys.executable, ROOT / "tools/watch.py", folder, "--episodes", "1", "--seconds", "0.4"]
    environ = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MUJOCO_GL")}
    done = subprocess.run(command, env=environ, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    frames = imageio.imread(folder / "policy.gif")
    assert frames.shape == (8, 480, 480, 3)
    assert frames[0].std() > 10
    assert (frames[0] != frames[-1]).mean() > 0.01
