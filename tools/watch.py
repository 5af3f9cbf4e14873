"""Plays the policy of a run: episodes, returns, and an animation (GIF). It needs no display.

  python tools/watch.py RUN                                    three episodes, animated in RUN/policy.gif
  python tools/watch.py RUN --environment HalfCheetah-v4       in another environment
  python tools/watch.py RUN --episodes 1000 --no_video         evaluates the run again, on other starts

RUN is a run's folder, such as results/runs/offline/bc/<dataset id>/default/seed-0. The policy is what its
script's `load` makes of that. Scores are by the run's own references, which are known for its own environment
alone. The episodes depend on the run's seed, its updates and --seed, and are none of those that the run
itself was evaluated on.

MuJoCo draws through EGL or OSMesa, on Linux without a display: on a Debian without them,
apt-get install libegl1 libgl1-mesa-dri. MUJOCO_GL chooses another way. Pendulum and its like need pygame.
"""

import argparse
import ctypes.util
import importlib
import inspect
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pandas as pd
import torch
from common import DAMAGED, ROOT, UserError, exit_status, name_run, read_record, write

FPS = 20  # of the animation, or a little more or less
PACKAGES = "apt-get install libegl1 libgl1-mesa-dri"


# ------------------------------------------------- The run -------------------------------------------------


def open_run(folder: Path) -> tuple[ModuleType, dict]:
    """The script that made the run, and run.json."""
    try:
        info = read_record(folder)
    except DAMAGED as error:
        raise UserError(f"{folder} is no folder of a run: {error!r:.150}") from None
    try:
        name = name_run(folder, info)
    except DAMAGED as error:
        raise UserError(f"{folder} is not where a script puts its runs: {error}") from None
    algorithm = name["algorithm"]
    script = ROOT / "algorithms" / name["family"] / f"{algorithm}.py"
    if not script.is_file():
        raise UserError(f"{folder} is not where a script puts its runs: there is no {script}")
    if "dataset" not in info["config"]:
        kind = f"{name['family']}/{algorithm}"
        raise UserError(f"{folder} is a run of {kind}, which learns online and has no `load`")
    if "environment" not in info["config"]:
        kind = f"{name['family']}/{algorithm}"
        raise UserError(f"{folder} is a run of {kind}, which is of no one environment: its `load` plays it")
    if info["status"] != "finished":
        print(f"the run is not finished ({info['result']}): this is the policy of its last checkpoint")
    sys.path.append(str(script.parent))
    return importlib.import_module(algorithm), info


def find_references(script: ModuleType, config: dict, dataset, name: str | None) -> tuple:
    """Returns that score 0 and 100; None where unknown, as in an environment that is not the run's."""
    spec = dataset._eval_env_spec or dataset.env_spec
    own = config["environment"] or (spec.id if spec else None)
    if name not in (None, own):
        print(f"no scores: the run's references are for {own}")
        return None, None
    known = dataset.storage.metadata
    return known.get("ref_min_score", config["ref_min"]), known.get("ref_max_score", config["ref_max"])


# ------------------------------------------ Playing without video ------------------------------------------


def takes_rewards(act: Callable) -> bool:
    """Is the last step's reward asked for as well? Who counts down a wanted return needs it."""
    return len(inspect.signature(act).parameters) == 2


def evaluate(script: ModuleType, learner, environments, episodes: int, seed: tuple) -> pd.DataFrame:
    """A row an episode, by the script's own `evaluate`."""
    if not takes_rewards(learner.act):
        return script.evaluate(learner.act, environments, episodes, seed)
    environments = script.LastRewards(environments)

    def act(observations) -> np.ndarray:
        return learner.act(observations, environments.rewards)

    return script.evaluate(act, environments, episodes, seed)


# -------------------------------------------- Playing with video -------------------------------------------


def choose_renderer() -> None:
    """Tells MuJoCo, before it is imported, how to draw without a display."""
    libraries = {"egl": "EGL", "osmesa": "OSMesa"}
    found = [name for name, library in libraries.items() if ctypes.util.find_library(library)]
    if sys.platform == "linux" and found:
        os.environ.setdefault("MUJOCO_GL", found[0])
    try:
        importlib.import_module("mujoco")
    except Exception as error:  # of many kinds, where the library that is chosen is not there
        way = os.environ.get("MUJOCO_GL")
        raise UserError(f"MUJOCO_GL={way} cannot be used: {error!r:.150}; on Debian {PACKAGES}") from None


def open_renderer(played: gym.Env) -> gym.Env:
    """Such an environment that has drawn a frame. Raises UserError that says what is missing."""
    spec, model = played.spec, getattr(played.unwrapped, "model", None)
    cameras = [model.cam(number).name for number in range(model.ncam)] if model else []
    # MuJoCo's walkers run out of sight of the default camera
    view = {"camera_name": "track"} if "track" in cameras else {}
    try:
        warnings.filterwarnings("ignore", module="glfw")  # the error below says it
        env = gym.make(spec, render_mode="rgb_array", **view)
        env.reset(seed=0)
        frame = env.render()
        if not (isinstance(frame, np.ndarray) and frame.ndim == 3):
            raise TypeError(f"a frame is {type(frame).__name__}")
    except gym.error.DependencyNotInstalled as error:
        advice = f"{Path(sys.executable)} -m pip install pygame"
        raise UserError(f"{spec.id} cannot be drawn: {error}: {advice}, or --no_video") from None
    except Exception as error:  # OpenGL's are of many kinds
        sys.unraisablehook = lambda _: None  # what is half made complains when it goes
        way = f" (MUJOCO_GL={os.environ['MUJOCO_GL']})" if "MUJOCO_GL" in os.environ else ""
        advice = f"on Debian {PACKAGES}, or --no_video"
        raise UserError(f"{spec.id} cannot be drawn{way}: {error!r:.150}; {advice}") from None
    return env


def play(learner, env: gym.Env, seed: int) -> Iterator[tuple[float, float]]:
    """One episode: after each step the reward, and success (nan where unknown)."""
    observation, _ = env.reset(seed=seed)
    reward, ended, remembers = None, False, takes_rewards(learner.act)
    while not ended:
        arguments = (observation, reward) if remembers else (observation,)
        observation, reward, terminated, truncated, info = env.step(learner.act(*arguments))
        ended = terminated or truncated
        yield reward, float(info.get("success", np.nan))


def film(learner, env: gym.Env, episodes: int, seed: tuple, seconds: float, output: Path) -> pd.DataFrame:
    """A row an episode; the first `seconds` of them all are written to `output`."""
    fps = env.metadata.get("render_fps", FPS)  # of simulated time
    every = max(1, round(fps / FPS))  # steps to a frame
    most = max(1, round(seconds * fps / every))
    frames, rows = [], []
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
    for start in np.random.SeedSequence(seed).generate_state(episodes).tolist():
        rewards, success = [], np.nan
        for reward, reached in play(learner, env, start):
            rewards.append(reward)
            success = np.fmax(success, reached)
            if len(rewards) % every == 0 and len(frames) < most:  # a frame takes a hundred steps' time
                frames.append(env.render())
        rows.append({"return": sum(rewards), "length": len(rewards), "success": success})
    pictures = np.stack(frames or [env.render()])
    write(output, imageio.imwrite("<bytes>", pictures, extension=".gif", duration=1000 * every / fps, loop=0))
    return pd.DataFrame(rows)


# ------------------------------------------------ The result ------------------------------------------------


def add_scores(table: pd.DataFrame, references: tuple) -> pd.DataFrame:
    low, high = references
    if None in references:
        return table
    return table.assign(score=100 * (table["return"] - low) / (high - low))


def describe(table: pd.DataFrame) -> str:
    """Mean, deviation over episodes, and the standard error of the mean."""
    lines = []
    for name in ("score", "return", "length", "success"):
        if name in table and table[name].notna().all():
            values = table[name]
            line = f"{name:8} {values.mean():10.2f} ± {values.std(ddof=0):.2f} over episodes"
            if len(values) > 1:
                line += f", the mean ± {values.sem():.2f}"
            lines.append(line)
    return "\n".join(lines)


def watch(options: argparse.Namespace) -> None:
    output = options.output or options.run / "policy.gif"
    if output.suffix != ".gif":
        raise UserError(f"--output: {output} does not end in .gif")
    if not options.no_video:
        choose_renderer()
    script, info = open_run(options.run)
    if not (options.run / "checkpoint.pt").is_file():
        raise UserError(f"{options.run} has no checkpoint.pt, where the policy is")
    config = info["config"]
    began = time.perf_counter()
    torch.set_num_threads(1)  # a policy's products are small
    try:
        learner = script.load(str(options.run))
        dataset = script.load_dataset(config["dataset"])
        environments = script.make_environments(dataset, options.environment or config["environment"])
    except script.UserError as error:
        raise UserError(str(error)) from None
    if environments is None:
        raise UserError("name an environment to play in with --environment")
    references = find_references(script, config, dataset, options.environment)
    seed = (config["seed"], config["updates"], 2, options.seed)  # training has 0, the final evaluation 1
    if options.no_video:
        table = evaluate(script, learner, environments, options.episodes, seed)
    else:
        env = open_renderer(environments.envs[0])
        table = film(learner, env, options.episodes, seed, options.seconds, output)
        env.close()
    environments.close()
    table = add_scores(table, references)
    if len(table) <= 10:
        print(table.rename_axis("episode").dropna(axis=1).round(2).to_string())
    print(f"{len(table):,} episodes in {time.perf_counter() - began:.0f} s:")
    print(describe(table))
    if "score" in table and info.get("score") is not None:
        count = config["final_eval_episodes"]
        print(f"the run's own final evaluation: score {info['score']:.2f}, {count} episodes")
    if not options.no_video:
        print(f"Animation: {output}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--environment", help="Gymnasium id of another environment")
    parser.add_argument("--episodes", type=int, default=3, help="how many (3)")
    parser.add_argument("--seed", type=int, default=0, help="another one: other starts (0)")
    parser.add_argument("--no_video", action="store_true", help="only play: ten environments side by side")
    parser.add_argument("--seconds", type=float, default=10, help="length of the animation (10)")
    parser.add_argument("--output", type=Path, help="the animation, a .gif (RUN/policy.gif)")
    options = parser.parse_args(arguments)
    for name in ("episodes", "seconds"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} has to be more than 0")
    if options.seed < 0:
        parser.error("--seed has to be at least 0")
    return exit_status("watch.py", watch, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
