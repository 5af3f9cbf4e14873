"""Updates per second of every offline script, and milliseconds per environment step of its evaluation.

For each script and thread count one process builds three learners on random data of Hopper's shapes: the
yardstick (`--compile false --precision highest`), the default (compiled), and compiled with `--precision
medium`. They train in turns, A B C A B C ..., so that a slow moment of the machine hits all three; ratios are
of medians over the turns. Absolute numbers belong to the machine they were taken on, ratios travel better.

  python tools/bench.py                    all scripts, one and two threads (and a GPU, where there is one)
  python tools/bench.py td3_bc --turns 3   one script, quicker
  python tools/bench.py sac_n --sweep critics 2 10 50   what a field costs: milliseconds by its values
"""

import argparse
import dataclasses
import importlib.util
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
OBS_DIM, ACT_DIM = 11, 3  # Hopper-v5
VARIANTS = {
    "eager": {"compile": False, "precision": "highest"},
    "default": {"compile": True, "precision": "highest"},
    "medium": {"compile": True, "precision": "medium"},
}


def load_script(name: str):
    """algorithms/offline/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "algorithms/offline" / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def new_learner(script, config, device: torch.device):
    """Of the one class in a script that has an `update`; its scaler changes nothing."""
    classes = [value for value in vars(script).values() if isinstance(value, type)]
    (learner,) = [each for each in classes if each.__module__ == script.__name__ and hasattr(each, "update")]
    scaler = script.Scaler(np.zeros(OBS_DIM), np.ones(OBS_DIM), -np.ones(ACT_DIM), np.ones(ACT_DIM))
    return learner(config, scaler.to(device))


def compiled_methods(script) -> list[str]:
    """Names of the learner's methods that the script's `train` compiles."""
    return re.findall(r'"(target_q|\w+_loss)"', inspect.getsource(script.train))


def random_episodes(count: int = 100, length: int = 1000) -> list[dict[str, np.ndarray]]:
    """As `read_episodes` gives them."""
    generator = np.random.default_rng(0)
    episodes = []
    for _ in range(count):
        episode = {
            "observations": generator.normal(size=(length + 1, OBS_DIM)),
            "actions": generator.uniform(-1, 1, size=(length, ACT_DIM)),
            "rewards": generator.normal(size=length),
            "terminations": np.arange(length) == length - 1,
        }
        episodes.append({name: column.astype(np.float32) for name, column in episode.items()})
    return episodes


def draw(script, learner, episodes: list, config) -> Iterator[dict[str, torch.Tensor]]:
    """Batches as the script's own `train` makes them: transitions, these and a model's, chunks or windows."""
    if hasattr(script, "bounded_steps"):
        data = script.bounded_steps(episodes, learner.scaler)
        rows = {"rows": torch.arange(len(data["actions"]), device=learner.scaler.mean.device)}
        batches = script.draw_batches(rows, config.batch_size, seed=0, update=0)
        return (script.chunks(data, batch["rows"], config) for batch in batches)
    if hasattr(script, "trajectories"):
        data = script.valued_steps(episodes, learner.scaler, config)
        rows = {"rows": torch.arange(len(data["actions"]), device=learner.scaler.mean.device)}
        batches = script.draw_batches(rows, config.batch_size, seed=0, update=0)
        return (script.trajectories(data, batch["rows"], config.horizon) for batch in batches)
    if not hasattr(script, "windows"):
        data = script.transitions(episodes, learner.scaler)
        if hasattr(script, "next_actions"):
            data |= script.next_actions(episodes, learner.scaler)
        if hasattr(script, "joined"):
            lengths = [len(episode["rewards"]) for episode in episodes]
            data = script.joined(data, lengths, config.chunk, config.discount)
        batches = script.draw_batches(data, config.batch_size, seed=0, update=0)
        if not hasattr(script, "renew_rollouts"):
            return batches
        script.renew_rollouts(learner, data, None)  # once: what it costs is not in an update
        return (script.mix(batch, learner.rollouts.rows, config.real_ratio) for batch in batches)
    if hasattr(script, "numbered_steps"):
        data = script.numbered_steps(episodes, learner.scaler, config.discount, None)
        learner.bins.fit(data["numbers"])
        data = {"tokens": learner.bins.encode(data["numbers"]), "timesteps": data["timesteps"]}
    else:
        data = script.steps(episodes, learner.scaler)
    rows = {"starts": torch.arange(len(data["timesteps"]), device=learner.scaler.mean.device)}
    batches = script.draw_batches(rows, config.batch_size, seed=0, update=0)
    return (script.windows(data, batch["starts"], config.context) for batch in batches)


def measure(name: str, device: torch.device, turns: int, seconds: float, fields: dict) -> dict[str, list]:
    """{variant: updates per second of each turn}; the whole loop but for evaluation and records."""
    script, episodes = load_script(name), random_episodes()
    learners, speeds = {}, {variant: [] for variant in VARIANTS}
    for variant, settings in VARIANTS.items():
        config = dataclasses.replace(script.Config(), **settings, **fields)
        torch.set_float32_matmul_precision(config.precision)
        torch.manual_seed(0)
        learner = new_learner(script, config, device)
        if config.compile:
            script.compile_methods(learner, *compiled_methods(script))
        batches = draw(script, learner, episodes, config)
        learners[variant] = config.precision, learner, batches
        run_updates(learner, batches, 20, device)  # compile and warm up
    for _ in range(turns):
        for variant, (precision, learner, batches) in learners.items():
            torch.set_float32_matmul_precision(precision)
            count = max(5, int(seconds * run_updates(learner, batches, 5, device)))
            speeds[variant].append(run_updates(learner, batches, count, device))
    return speeds


def run_updates(learner, batches, count: int, device: torch.device) -> float:
    """Updates per second over `count` updates."""
    began = time.perf_counter()
    for _ in range(count):
        learner.update(next(batches))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


def measure_evaluation(turns: int) -> float:
    """Milliseconds per environment step in 10 Hopper-v5, the median over turns of 200 episodes."""
    script = load_script("td3_bc")
    same_step = gym.vector.AutoresetMode.SAME_STEP
    makers = [lambda: gym.make("Hopper-v5")] * 10
    environments = gym.vector.SyncVectorEnv(makers, copy=False, autoreset_mode=same_step)
    learner = new_learner(script, script.Config(), torch.device("cpu"))
    script.evaluate(learner.act, environments, 10, (0,))  # warm up
    figures = []
    for turn in range(turns):
        steps, began = 0, time.perf_counter()
        for lap in range(20):  # ten episodes a lap: all ten environments step until the last one has ended
            steps += 10 * script.evaluate(learner.act, environments, 10, (turn, lap))["length"].max()
        figures.append(1000 * (time.perf_counter() - began) / steps)
    return float(np.median(figures))


def main() -> None:
    names = sorted(path.stem for path in (ROOT / "algorithms/offline").glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scripts", nargs="*", default=names, help=f"some of {', '.join(names)}; else all")
    parser.add_argument("--turns", type=int, default=9, help="turns of each variant")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--sweep", nargs="+", default=[], metavar="FIELD VALUE", help="a field, and numbers")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # device:threads, to measure in this process
    arguments = parser.parse_args()
    if arguments.child:
        kind, threads = arguments.child.split(":")
        torch.set_num_threads(int(threads))
        fields = {arguments.sweep[0]: json.loads(arguments.sweep[1])} if arguments.sweep else {}
        # BRAC and BEAR begin with updates of another kind
        early = ("behavior_updates", "warmup_updates") if arguments.scripts[0] in ("brac", "bear") else ()
        config = load_script(arguments.scripts[0]).Config
        fields |= {name: 0 for name in early if name in config.__dataclass_fields__}
        place = torch.device(kind), arguments.turns, arguments.seconds
        return print(json.dumps(measure(arguments.scripts[0], *place, fields)))

    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    places = ["cpu:1", "cpu:2"] + ["cuda:1"] * torch.cuda.is_available()
    field, *values = arguments.sweep or [None, None]
    names = arguments.scripts
    rows, jobs = [], [(name, place, value) for name in names for place in places for value in values]
    for name, place, value in tqdm(jobs, disable=None):
        command = [sys.executable, __file__, name, "--child", place]
        command += ["--sweep", field, value] if field else []
        command += ["--turns", str(arguments.turns), "--seconds", str(arguments.seconds)]
        # Compiled code holds the number of threads it was made for: a cache of its own for each.
        cache = Path(tempfile.gettempdir(), f"reef-bench-{place.replace(':', '-')}")
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        speeds = json.loads(done.stdout.splitlines()[-1])
        median = {variant: float(np.median(turns)) for variant, turns in speeds.items()}
        ratios = {f"{variant}/eager": median[variant] / median["eager"] for variant in ("default", "medium")}
        each = 1000 / median["default"] / float(value or 1)
        swept = {field: float(value), f"ms by {field}": each} if field else {}
        rows.append({"script": name, "device:threads": place, **swept, **median, **ratios})
    print("Updates per second (median) and ratios to eager, batch and networks as by default:")
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format=lambda x: f"{x:.2f}" if x < 20 else f"{x:.0f}"))
    torch.set_num_threads(1)
    step = measure_evaluation(arguments.turns)
    print(f"Evaluation in 10 Hopper-v5 environments, one thread: {step:.3f} ms per environment step")


if __name__ == "__main__":
    main()
