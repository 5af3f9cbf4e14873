"""Updates per second of every offline script, and milliseconds per environment step of its evaluation.

For each script and thread count one process builds three learners on random data of Hopper's shapes: the
yardstick (`--compile false --precision highest`), the default (compiled), and compiled with `--precision
medium`. They train in turns, A B C A B C ..., so that a slow moment of the machine hits all three; ratios are
of medians over the turns. Absolute numbers belong to the machine they were taken on, ratios travel better.

  python results/bench.py                    all scripts, one and two threads (and a GPU, where there is one)
  python results/bench.py td3_bc --turns 3   one script, quicker
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
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


def random_data(device: torch.device, rows: int = 100_000) -> dict[str, torch.Tensor]:
    """Transitions in the learner's units, as `load_transitions` gives them."""
    generator = torch.Generator().manual_seed(0)
    columns = {
        "observations": torch.randn(rows, OBS_DIM, generator=generator),
        "actions": torch.rand(rows, ACT_DIM, generator=generator) * 2 - 1,
        "rewards": torch.randn(rows, generator=generator),
        "next_observations": torch.randn(rows, OBS_DIM, generator=generator),
        "terminations": (torch.rand(rows, generator=generator) < 0.01).float(),
    }
    return {name: column.to(device) for name, column in columns.items()}


def measure(name: str, device: torch.device, turns: int, seconds: float) -> dict[str, list[float]]:
    """{variant: updates per second of each turn}; the whole loop but for evaluation and records."""
    script, data, learners, speeds = load_script(name), random_data(device), {}, {key: [] for key in VARIANTS}
    for variant, settings in VARIANTS.items():
        config = dataclasses.replace(script.Config(), **settings)
        torch.set_float32_matmul_precision(config.precision)
        torch.manual_seed(0)
        algorithm = script.Algorithm(config, OBS_DIM, ACT_DIM, device)
        if config.compile:
            script.compile_losses(algorithm, device)
        draw = script.draw_batches
        if hasattr(algorithm, "draw_windows"):  # of episodes of 1000 steps
            draw, rows = algorithm.draw_windows, torch.arange(len(data["rewards"]), device=device)
            data |= {"timesteps": (rows % 1000).float(), "returns_to_go": data["rewards"]}
        batches = draw(data, config.batch_size, seed=0, update=0)
        learners[variant] = config.precision, algorithm, batches
        run_updates(algorithm, batches, 20, device)  # compile and warm up
    for _ in range(turns):
        for variant, (precision, algorithm, batches) in learners.items():
            torch.set_float32_matmul_precision(precision)
            count = max(5, int(seconds * run_updates(algorithm, batches, 5, device)))
            speeds[variant].append(run_updates(algorithm, batches, count, device))
    return speeds


def run_updates(algorithm, batches, count: int, device: torch.device) -> float:
    """Updates per second over `count` updates."""
    began = time.perf_counter()
    for _ in range(count):
        algorithm.update(next(batches))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


def measure_evaluation(turns: int) -> float:
    """Milliseconds per environment step in 10 Hopper-v5, the median over turns of 200 episodes."""
    script = load_script("td3_bc")
    same_step = gym.vector.AutoresetMode.SAME_STEP
    makers = [lambda: gym.make("Hopper-v5")] * 10
    environments = gym.vector.SyncVectorEnv(makers, copy=False, autoreset_mode=same_step)
    algorithm = script.Algorithm(script.Config(), OBS_DIM, ACT_DIM, torch.device("cpu"))
    script.evaluate(algorithm.act, environments, 10, (0,))  # warm up
    figures = []
    for turn in range(turns):
        steps, began = 0, time.perf_counter()
        for lap in range(20):  # ten episodes a lap: all ten environments step until the last one has ended
            steps += 10 * script.evaluate(algorithm.act, environments, 10, (turn, lap))["length"].max()
        figures.append(1000 * (time.perf_counter() - began) / steps)
    return float(np.median(figures))


def main() -> None:
    names = sorted(path.stem for path in (ROOT / "algorithms/offline").glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scripts", nargs="*", default=names, help=f"some of {', '.join(names)}; else all")
    parser.add_argument("--turns", type=int, default=9, help="turns of each variant")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # device:threads, to measure in this process
    arguments = parser.parse_args()
    if arguments.child:
        kind, threads = arguments.child.split(":")
        torch.set_num_threads(int(threads))
        speeds = measure(arguments.scripts[0], torch.device(kind), arguments.turns, arguments.seconds)
        return print(json.dumps(speeds))

    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    places = ["cpu:1", "cpu:2"] + ["cuda:1"] * torch.cuda.is_available()
    rows, jobs = [], [(name, place) for name in arguments.scripts for place in places]
    for name, place in tqdm(jobs, disable=None):
        command = [sys.executable, __file__, name, "--child", place]
        command += ["--turns", str(arguments.turns), "--seconds", str(arguments.seconds)]
        # Compiled code holds the number of threads it was made for: a cache of its own for each.
        cache = Path(tempfile.gettempdir(), f"reef-bench-{place.replace(':', '-')}")
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        speeds = json.loads(done.stdout.splitlines()[-1])
        median = {variant: float(np.median(turns)) for variant, turns in speeds.items()}
        ratios = {f"{variant}/eager": median[variant] / median["eager"] for variant in ("default", "medium")}
        rows.append({"script": name, "device:threads": place, **median, **ratios})
    print("Updates per second (median) and ratios to eager, batch and networks as by default:")
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format=lambda x: f"{x:.2f}" if x < 20 else f"{x:.0f}"))
    torch.set_num_threads(1)
    step = measure_evaluation(arguments.turns)
    print(f"Evaluation in 10 Hopper-v5 environments, one thread: {step:.3f} ms per environment step")


if __name__ == "__main__":
    main()
