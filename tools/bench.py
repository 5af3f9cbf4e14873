"""Updates per second of every offline script, and milliseconds per environment step of its evaluation.

For each script and thread count one process builds three learners on random data of Hopper's shapes: the
yardstick (`--compile false --precision highest`), compiled with that precision, and compiled with
`--precision medium`: which of the two is the default depends on the processor (docs/speed.md). They train in
turns, A B C A B C ..., so that a slow moment of the machine hits all three; a ratio is the median over the
rounds. Absolute numbers belong to the machine they were taken on, ratios travel better.

  python tools/bench.py        all scripts, with one and two threads (and a GPU, where there is one): an hour
  python tools/bench.py td3_bc --turns 3                        one script, quicker
  python tools/bench.py td3_bc --peer CORL/algorithms/offline   beside another folder's script of that name
  python tools/bench.py sac_n --sweep critics 2 10 50 500       what a field costs: time against work, memory
  python tools/bench.py fql idql --act                          what an action of ten environments costs

A peer is in the form of CORL's scripts and trains as it does by itself (tools/peers.py), by its own settings
but for the device and the batch size, which are ours; it takes its turns in the same process. Whether both do
the same work is seen in the last columns: the parameters that each trains.
A sweep measures the second alone. Its peak memory is on a GPU what tensors took, else the whole process's.
Actions are those of ten environments side by side. A planner, or an actor of chunks, thinks at one step and
carries out at the next: so the mean over steps is shown, and the longest.
"""

import argparse
import dataclasses
import importlib.util
import inspect
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import peers
import torch
from common import ROOT, UserError, exit_status
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

OBS_DIM, ACT_DIM = 11, 3  # Hopper-v5
ENVIRONMENTS = 10  # that a policy acts in side by side, as evaluations have them
AT_LEAST, WARM_UP = 2, 20  # updates: in a turn, whatever its length, and before the first, or 5 seconds
MINUTES = 1.2  # that a script takes at one place, about: half a minute goes into compiling
MINUTES_OF_ACTIONS = 0.3  # which are not compiled
PLACES = ["cpu:1", "cpu:2"] + ["cuda:1"] * torch.cuda.is_available()  # device:threads
VARIANTS = {
    "eager": {"compile": False, "precision": "highest"},
    "compiled": {"compile": True, "precision": "highest"},
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


class Entrant:
    """A learner of one of the variants, compiled and warmed up, with its batches."""

    def __init__(self, script, config, device: torch.device, episodes: list):
        self.device, self.precision = device, config.precision
        torch.set_float32_matmul_precision(config.precision)
        torch.manual_seed(0)
        self.learner = new_learner(script, config, device)
        if config.compile:
            script.compile_methods(self.learner, *compiled_methods(script))
        self.batches = draw(script, self.learner, episodes, config)
        run_updates(self.learner, self.batches, AT_LEAST, device)  # compiles
        speed = run_updates(self.learner, self.batches, AT_LEAST, device)
        warm_up = max(AT_LEAST, min(WARM_UP, int(5 * speed)))
        self.speed = run_updates(self.learner, self.batches, warm_up, device)

    def take_turn(self, seconds: float) -> float:
        """Updates per second over about so many: the whole loop but for evaluation and records."""
        torch.set_float32_matmul_precision(self.precision)
        count = max(AT_LEAST, int(seconds * self.speed))
        self.speed = run_updates(self.learner, self.batches, count, self.device)
        return self.speed


def measure(script, configs: dict, device: torch.device, turns: int, seconds: float) -> dict[str, list]:
    """{variant: updates per second of each turn}."""
    episodes = random_episodes()
    entrants = {variant: Entrant(script, config, device, episodes) for variant, config in configs.items()}
    speeds = {variant: [] for variant in entrants}
    for _ in range(turns):
        for variant, entrant in entrants.items():
            speeds[variant].append(entrant.take_turn(seconds))
    return speeds


def measure_beside(
    file: Path, script, configs: dict, device: torch.device, turns: int, seconds: float
) -> tuple[dict[str, list], dict[str, float]]:
    """`measure`, the script in `file` first in each round, and what both train: millions of parameters."""
    episodes, batch_size = random_episodes(), next(iter(configs.values())).batch_size
    peer = peers.Peer(file, batch_size, device, episodes)
    entrants = {variant: Entrant(script, config, device, episodes) for variant, config in configs.items()}
    speeds = {variant: [] for variant in ("peer", *entrants)}

    def course() -> Iterator[None]:
        """All that happens while the peer trains; it makes an update at every `yield`."""
        count, began = 0, time.perf_counter()
        while count < AT_LEAST or (count < WARM_UP and time.perf_counter() - began < 5):
            yield
            count += 1
        for _ in range(turns):
            count, began = 0, now(device)
            while count < AT_LEAST or time.perf_counter() - began < seconds:
                yield
                count += 1
            speeds["peer"].append(count / (now(device) - began))
            precision = torch.get_float32_matmul_precision()
            for variant, entrant in entrants.items():
                speeds[variant].append(entrant.take_turn(seconds))
            torch.set_float32_matmul_precision(precision)
        raise peers.Measured

    torch.set_float32_matmul_precision("highest")  # as torch begins
    theirs = peer.run(course())
    learner = next(iter(entrants.values())).learner
    trained = [group["params"] for each in script.optimizers(learner) for group in each.param_groups]
    ours = sum(parameter.numel() for parameters in trained for parameter in parameters)
    return speeds, {"M parameters": ours / 1e6, "peer's": theirs / 1e6}


def measure_actions(script, config, device: torch.device, turns: int, seconds: float) -> dict[str, float]:
    """Milliseconds of a step of ENVIRONMENTS episodes, none of them the first: medians over turns."""
    learner, generator = new_learner(script, config, device), np.random.default_rng(0)
    draw(script, learner, random_episodes(), config)  # fits what is read from data
    remembers = "rewards" in inspect.signature(learner.act).parameters
    period = getattr(config, "act_horizon", getattr(config, "chunk", 1))  # steps from plan to plan

    def step(rewards: np.ndarray | None) -> float:
        memory = [rewards] if remembers else []
        observations, began = generator.normal(size=(ENVIRONMENTS, OBS_DIM)), now(device)
        learner.act(observations, *memory)
        return 1000 * (now(device) - began)

    def cycle() -> list[float]:
        return [step(np.zeros(ENVIRONMENTS)) for _ in range(period)]

    step(None)
    cycle()  # warm up
    means, longest = [], []
    for _ in range(turns):
        cycles = []
        while len(cycles) < AT_LEAST or np.sum(cycles) < 1000 * seconds:
            cycles.append(cycle())  # begins where the last one began: each has a plan in it
        means.append(np.mean(cycles))
        longest.append(np.max(cycles, axis=1).mean())
    return {"ms a step": float(np.median(means)), "ms where it plans": float(np.median(longest))}


def multiply_adds(script, config, device: torch.device) -> float:
    """Of an update, in millions: its products of matrices, in both directions, as torch counts them."""
    config = dataclasses.replace(config, compile=False)
    learner = new_learner(script, config, device)
    batches = draw(script, learner, random_episodes(), config)
    period = getattr(config, "policy_delay", 1)  # updates differ
    with FlopCounterMode(display=False) as counter:
        for _ in range(period):
            learner.update(next(batches))
    return counter.get_total_flops() / 2 / period / 1e6


def peak_memory(device: torch.device) -> float:
    """Mebibytes: on a GPU what tensors took of it, else the process with all that it imported."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in kibibytes


def run_updates(learner, batches, count: int, device: torch.device) -> float:
    """Updates per second over `count` updates."""
    began = now(device)
    for _ in range(count):
        learner.update(next(batches))
    return count / (now(device) - began)


def now(device: torch.device) -> float:
    """The time, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_evaluation(turns: int) -> float:
    """Milliseconds per environment step in 10 Hopper-v5, the median over turns of 200 episodes."""
    script = load_script("td3_bc")
    same_step = gym.vector.AutoresetMode.SAME_STEP
    makers = [lambda: gym.make("Hopper-v5")] * ENVIRONMENTS
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


# -------------------------------------------- The command line --------------------------------------------


def measure_here(arguments: argparse.Namespace) -> None:
    """One script at one place in this process; prints {"speeds": {variant: [...]}, "columns": {...}}."""
    (name,), (kind, threads) = arguments.scripts, arguments.child.split(":")
    device = torch.device(kind)
    torch.set_num_threads(int(threads))
    script = load_script(name)
    # BRAC and BEAR begin with updates of another kind
    early = ("behavior_updates", "warmup_updates") if name in ("brac", "bear") else ()
    fields = {field: 0 for field in early if field in script.Config.__dataclass_fields__}
    if arguments.sweep:
        field, value = arguments.sweep
        fields[field] = json.loads(value)
    variants = {"compiled": VARIANTS["compiled"]} if arguments.sweep else VARIANTS
    configs = {each: dataclasses.replace(script.Config(), **variants[each], **fields) for each in variants}
    how = configs, device, arguments.turns, arguments.seconds
    if arguments.act:
        speeds, columns = {}, measure_actions(script, configs["compiled"], *how[1:])
    elif arguments.peer:
        speeds, columns = measure_beside(peers.find_script(arguments.peer, name), script, *how)
    else:
        speeds, columns = measure(script, *how), {}
    if arguments.sweep:
        columns["peak MiB"] = peak_memory(device)  # before the count, which has a learner of its own
        columns["M multiply-adds"] = multiply_adds(script, configs["compiled"], device)
    print(json.dumps({"speeds": speeds, "columns": columns}))


def measure_in_child(name: str, place: str, value: str | None, arguments: argparse.Namespace) -> dict | None:
    """What `measure_here` prints; None where it failed, of which stderr has the reason."""
    command = [sys.executable, __file__, name, "--child", place]
    command += ["--turns", str(arguments.turns), "--seconds", str(arguments.seconds)]
    command += ["--peer", str(arguments.peer)] if arguments.peer else []
    command += ["--sweep", arguments.sweep[0], value] if arguments.sweep else []
    command += ["--act"] if arguments.act else []
    # Compiled code holds the number of threads it was made for: a cache of its own for each.
    cache = Path(tempfile.gettempdir(), f"reef-bench-{place.replace(':', '-')}")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, check=False, env=environment, stdout=subprocess.PIPE, text=True)
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def choose(arguments: argparse.Namespace) -> list[str]:
    """The scripts to measure: those named, else all that can be. UserError where one that is named cannot."""
    known = sorted(path.stem for path in (ROOT / "algorithms/offline").glob("*.py"))
    names, able, lack = arguments.scripts or known, known, ""
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
    if arguments.peer:
        if not arguments.peer.is_dir():
            raise UserError(f"--peer {arguments.peer}: no such folder")
        able = [name for name in known if peers.find_script(arguments.peer, name)]
        lack = f"no script of this name in {arguments.peer}"
    if arguments.sweep:
        field, *values = arguments.sweep
        numbers = [value for value in values if re.fullmatch(r"\d+(\.\d+)?", value) and float(value) > 0]
        if not values or values != numbers:
            raise UserError(f"--sweep {' '.join(arguments.sweep)}: a field and numbers above 0 are wanted")
        able = [name for name in names if field in load_script(name).Config.__dataclass_fields__]
        lack = f"no {field} among its settings"
    unable = sorted(set(names) - set(able))
    if unable and (arguments.scripts or not able):
        raise UserError(f"{', '.join(unable)}: {lack}")
    return [name for name in names if name in able]


def machine() -> str:
    """Its processor and cards by name."""
    cpuinfo = Path("/proc/cpuinfo")
    processors = re.findall("model name\t: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join([*processors[:1], platform.machine(), f"{os.cpu_count()} cores", *cards])


def ratios(speeds: dict[str, list], base: str) -> dict[str, float]:
    """Of the others to that variant: medians over the rounds, in each of which every variant takes a turn."""
    others = {variant: turns for variant, turns in speeds.items() if variant != base}
    return {f"{each}/{base}": float(np.median(np.divide(others[each], speeds[base]))) for each in others}


def show_speeds(rows: list[dict], base: str) -> None:
    """Prints them: medians over the turns, and ratios to the variant `base`."""
    lines = []
    for row in rows:
        speeds, columns = row.pop("speeds"), row.pop("columns")
        medians = {variant: float(np.median(turns)) for variant, turns in speeds.items()}
        lines.append(row | medians | ratios(speeds, base) | columns)
    print(f"Updates per second (medians) and ratios to {base}, batch and networks as by default:")
    print(pd.DataFrame(lines).to_string(index=False, float_format=number))


def show_costs(rows: list[dict], field: str) -> None:
    """Prints them: time of an update against its work, each also as a multiple of the first value's."""
    lines = []
    for row in rows:
        speeds, columns = row.pop("speeds"), row.pop("columns")
        milliseconds = 1000 / float(np.median(speeds["compiled"]))
        rate = columns["M multiply-adds"] / milliseconds
        lines.append(row | {"ms": milliseconds, "G multiply-adds/s": rate} | columns)
    table = pd.DataFrame(lines)
    first = table.groupby(["script", "device:threads"]).transform("first")
    for name, column in ((f"{field} x", field), ("work x", "M multiply-adds"), ("ms x", "ms")):
        table[name] = table[column] / first[column]
    print(f"What an update costs by {field}, compiled (medians), and multiples of the first value's:")
    print(table.to_string(index=False, float_format=number))


def show_actions(rows: list[dict]) -> None:
    """Prints what `measure_actions` gave."""
    lines = [row | row.pop("columns") for row in rows]
    print(f"What an action of {ENVIRONMENTS} environments costs, networks as by default (medians):")
    print(pd.DataFrame(lines).drop(columns="speeds").to_string(index=False, float_format=number))


def number(value: float) -> str:
    return f"{value:.2f}" if value < 20 else f"{value:,.0f}"


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scripts", nargs="*", help="names of algorithms/offline; else all that can be")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES, help="devices with threads")
    parser.add_argument("--turns", type=int, default=5, help="turns of each variant")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--peer", type=Path, metavar="FOLDER", help="of scripts like CORL's, to time beside")
    asked.add_argument("--sweep", nargs="+", metavar="FIELD VALUE", help="a field of Config, and numbers")
    asked.add_argument("--act", action="store_true", help="time actions, not updates")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # device:threads, to measure in this process
    arguments = parser.parse_args()
    if arguments.child:
        return measure_here(arguments)

    names, began = choose(arguments), time.perf_counter()
    field, *values = arguments.sweep or [None, None]
    jobs = [(name, place, value) for name in names for place in arguments.places for value in values]
    minutes = MINUTES_OF_ACTIONS if arguments.act else MINUTES
    print(f"torch {torch.__version__} on {machine()}; about {len(jobs) * minutes:.0f} min")
    rows = []
    for name, place, value in tqdm(jobs, disable=None):
        measured = measure_in_child(name, place, value, arguments)
        if measured:
            swept = {field: float(value)} if field else {}
            rows.append({"script": name, "device:threads": place} | swept | measured)
    if rows and arguments.act:
        show_actions(rows)
    elif rows and arguments.sweep:
        show_costs(rows, field)
    elif rows:
        show_speeds(rows, "peer" if arguments.peer else "eager")
    if not (arguments.act or arguments.peer or arguments.sweep):
        torch.set_num_threads(1)
        step = measure_evaluation(arguments.turns)
        print(f"Evaluation in 10 Hopper-v5 environments, one thread: {step:.3f} ms per environment step")
    print(f"{(time.perf_counter() - began) / 60:.1f} min")
    return 0 if len(rows) == len(jobs) else 2


if __name__ == "__main__":
    sys.exit(exit_status("bench.py", main))
