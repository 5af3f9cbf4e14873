"""Runs a matrix of algorithms, datasets and seeds: what is missing or was cut off, and nothing else.

  python tools/benchmark.py configs/benchmark/quick.yaml             on this machine, a process a core
  python tools/benchmark.py MATRIX --list                            what would run, and its cost
  python tools/benchmark.py MATRIX --engine ray                      on a Ray started here
  python tools/benchmark.py MATRIX --engine ray --address HOST:PORT  on the Ray cluster of this machine
  python tools/benchmark.py MATRIX --sweep FILE                      writes the same runs as a wandb sweep

A matrix is a YAML file with these fields, of which only `overrides` may be left out:

  algorithms:                   # scripts of algorithms/offline, or family/script; * stands for anything
    - "*"
    - cql: {updates: 10000}     # with fields of its own; these runs replace those of a line above
    - bc: {variant: top10}      # the config files that end in -top10
  datasets: [reef/pointmaze/umaze-v0, "reef/hopper/*"]  # those that have a config; * as above
  seeds: 3                      # 0, 1 and 2; or a list
  overrides: {updates: 50000}   # fields of every run

A list of values is a sweep: `overrides: {alpha: [1.0, 2.5]}`, or the same for one algorithm, makes the
variants alpha-1.0 and alpha-2.5, several lists all their combinations. Their scores are shown at the end.

A run is the script's own command line with its config file, in a process with one thread. So a finished run
is skipped, also one of more updates, and one that was cut off or failed goes on from its checkpoint. A folder
with a run of another config is left to the script, which refuses it: this is shown as a failure. Fields that
change what is learned need a `variant`, which names the run's folder; tools/scores.py counts such runs once
configs/ has a file of that name. A run prints into log.txt in its folder. Where there are GPUs, the processes
of this machine share them evenly; of its cores each takes one that no other benchmark's run has.

On a cluster every machine needs this repository, its Python, the datasets and --output_dir at the same paths,
as shared storage gives them. The runs of a machine that died go on elsewhere.

Costs and the time left come from seconds per update, evaluations included: the median of the matrix's own
runs in --output_dir, else of those in results/scores; of the same algorithm and dataset, else of the
algorithm.

Exit status 0: all runs are finished; 1: some failed; 2: something has to be mended first; 130: interrupted.
After each of them the same command goes on.
"""

import argparse
import ast
import contextlib
import csv
import dataclasses
import difflib
import fnmatch
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import filelock
import psutil
import yaml
from common import ROOT, UserError, all_updates, exit_status, read_record, show, write
from minari.storage import get_dataset_path
from tqdm import tqdm

FORM = {  # of a matrix
    "algorithms": "a list of names, or of `name: {field: value}`",
    "datasets": "a list of ids",
    "seeds": "a count, or a list of whole numbers",
    "overrides": "`field: value` pairs",
}
OURS = {"dataset", "seed", "threads", "output_dir"}  # fields that follow from the lists and the command line
UNNAMED = {"updates", "eval_every", "eval_episodes"}  # fields that tools/scores.py leaves to a run
RESERVE = 200e6  # bytes: with less left on the disk nothing goes on; a run writes some 10 MB
PATIENCE = 60  # seconds that a run on Ray waits for its folder's lock, which a dying machine may still hold
GRACE = 20  # seconds that a run has to end after Ctrl-C
GO_ON = "; the same command goes on from what is saved"
# A run dies with its parent, however that ends, so that its folder is free for the next (1 is Linux's
# PR_SET_PDEATHSIG). It obeys Ctrl-C even where a shell's background job ignores it.
LAUNCH = """\
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


# ----------------------------------------------- The matrix -----------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run of the matrix."""

    script: Path
    file: Path  # its config
    fields: dict  # what the command line adds to that, but for the seed
    seed: int
    config: dict  # all fields, as the script will see them
    folder: Path
    swept: bool  # is it of a sweep?

    def __str__(self) -> str:
        return os.path.relpath(self.folder)

    @property
    def kind(self) -> tuple[str, str]:
        """Algorithm, with its family, and dataset: runs of one kind take about as long."""
        return f"{self.script.parent.name}/{self.script.stem}", self.config["dataset"]

    def command(self, **more) -> list[str]:
        """The script and its arguments, for the root of the repository."""
        fields = {"config_path": str(self.file.relative_to(ROOT)), **self.fields, **more}
        texts = {name: v if isinstance(v, str) else json.dumps(v) for name, v in fields.items()}
        return [str(self.script.relative_to(ROOT)), *(f"--{name}={text}" for name, text in texts.items())]


def read_yaml(path: Path) -> dict:
    try:
        with open(path) as file:
            values = yaml.safe_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no list of `field: value`")
    return values


def read_matrix(path: Path) -> dict:
    """Its fields, each in its longest form. Raises UserError that names a malformed one."""
    given = {"overrides": {}} | read_yaml(path)
    for name in given.keys() - FORM.keys():
        raise UserError(f"unknown field {name}{nearest(name, FORM)}")
    matrix = {name: given.get(name) for name in FORM}
    if isinstance(matrix["algorithms"], list):
        pairs = [[*line.items()] if isinstance(line, dict) else [(line, {})] for line in matrix["algorithms"]]
        matrix["algorithms"] = [pair for line in pairs for pair in line]
    if type(matrix["seeds"]) is int:
        matrix["seeds"] = list(range(matrix["seeds"]))
    fits = {
        "algorithms": list_of(tuple, matrix["algorithms"])
        and all(isinstance(name, str) and isinstance(fields, dict) for name, fields in matrix["algorithms"]),
        "datasets": list_of(str, matrix["datasets"]),
        "seeds": list_of(int, matrix["seeds"]) and min(matrix["seeds"]) >= 0,
        "overrides": isinstance(matrix["overrides"], dict),
    }
    for name, form in FORM.items():
        if not fits[name]:
            raise UserError(f"{name}: {given.get(name)!r} is not {form}")
    return matrix


def list_of(kind: type, value) -> bool:
    return isinstance(value, list) and value != [] and all(type(entry) is kind for entry in value)


def nearest(name, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(str(name), known, 1)
    return f": did you mean {found[0]}?" if found else ""


def match(pattern: str, known: Iterable[str], problem: str) -> list[str]:
    """Those of `known` that `pattern` stands for. Raises UserError if there is none."""
    found = fnmatch.filter(known, pattern)
    if not found:
        raise UserError(f"{problem} {pattern}{nearest(pattern, known)}")
    return found


@cache
def read_script(path: Path) -> tuple[dict, set]:
    """Config's fields with their defaults, and Run.FREE. It is parsed, not run: torch takes seconds."""
    bodies = {node.name: node.body for node in ast.parse(path.read_text()).body if hasattr(node, "name")}
    values = {node.target.id: node.value for node in bodies["Config"] if isinstance(node, ast.AnnAssign)}
    (free,) = [node.value for node in bodies["Run"] if ast.unparse(node).startswith("FREE = ")]
    return {name: ast.literal_eval(value) for name, value in values.items()}, {*ast.literal_eval(free)}


def read_configs(folder: Path) -> dict[str, dict[str, Path]]:
    """{variant: {dataset: file}} of an algorithm's configs."""
    files = defaultdict(dict)
    for file in sorted(folder.rglob("*.yaml")):
        if parts := re.fullmatch(r"(.+?-v\d+)(?:-(.+))?\.yaml", file.relative_to(folder).as_posix()):
            dataset, variant = parts.groups("default")
            files[variant][dataset] = file
    return files


def read_field(name: str, value, defaults: dict):
    """`value` as the script would read it. Raises UserError if it would not; limits are the script's."""
    if name in OURS:
        raise UserError(f"{name} is no field for a matrix: its lists or the command line set it")
    if name not in defaults:
        raise UserError(f"unknown field {name}{nearest(name, defaults)}")
    kind, given = type(defaults[name]), type(value)
    with contextlib.suppress(ValueError, OverflowError):
        if kind in (int, float) and given in (str, int, float) and float(value) == kind(float(value)):
            return kind(float(value))  # YAML takes 1e6 for a text
    if value is not None and given is not kind and (defaults[name] is not None or given in (list, dict)):
        raise UserError(f"{name}: {value!r} is no {kind.__name__}")
    return value


def read_config(file: Path, defaults: dict) -> dict:
    """All fields by a config file, each as the script would read it."""
    config = dict(defaults)
    for name, value in read_yaml(file).items():
        as_it_is = name in OURS or isinstance(value, list)
        config[name] = value if as_it_is else read_field(name, value, defaults)
    return config


def read_fields(given: dict, defaults: dict) -> Iterator[tuple[dict, str]]:
    """Each combination of listed values, with what its variant's name ends in; "" without lists."""
    swept, values = [name for name in given if isinstance(given[name], list)], {}
    for name, value in given.items():
        if name in swept and (name == "variant" or not value):
            raise UserError(f"{name}: a sweep needs one value or more, and names its variants itself")
        several = value if name in swept else [value]
        values[name] = [read_field(name, one, defaults) for one in several]
    for combination in itertools.product(*values.values()):
        fields = dict(zip(values, combination))
        texts = {name: v if isinstance(v, str) else json.dumps(v) for name, v in fields.items()}
        yield fields, "-".join(f"{name}-{texts[name]}" for name in swept).replace("/", "-")


def runs_of(name: str, own: dict, known: dict, matrix: dict, output: Path) -> Iterator[Run]:
    """Those of one algorithm, given its fields and configs."""
    defaults, _ = read_script(ROOT / "algorithms" / f"{name}.py")
    for fields, ending in read_fields(matrix["overrides"] | own, defaults):
        yield from runs_with(name, fields, ending, known, matrix, output)


def runs_with(
    name: str, fields: dict, ending: str, known: dict, matrix: dict, output: Path
) -> Iterator[Run]:
    """Those of one algorithm with these fields; in a sweep the variant's name ends in `ending`."""
    script = ROOT / "algorithms" / f"{name}.py"
    defaults, free = read_script(script)
    variant, settings = fields.get("variant", "default"), fields.keys() - free - UNNAMED - {"variant"}
    files = known[variant]
    if ending:
        variant = ending if variant == "default" else f"{variant}-{ending}"
        fields, files = fields | {"variant": variant}, {**files, **known[variant]}
    elif settings and variant == "default":
        raise UserError(f"{', '.join(sorted(settings))}: what changes the learner needs a name, variant: ...")
    files = {**(known["default"] if settings else {}), **files}
    datasets = []
    for pattern in matrix["datasets"]:
        found = fnmatch.filter(files, pattern)
        if not found and "*" not in pattern:
            suffix = f"-{variant}" * (variant != "default")
            raise UserError(f"there is no configs/{name}/{pattern}{suffix}.yaml")
        datasets += found
    if not datasets:
        raise UserError(f"none of the datasets has a config of variant {variant}")
    fields |= {"threads": 1, "output_dir": str(output)}
    for dataset in datasets:
        config, place = {**read_config(files[dataset], defaults), **fields}, output / name / dataset / variant
        for seed in matrix["seeds"]:
            folder = place / f"seed-{seed}"
            yield Run(script, files[dataset], fields, seed, config | {"seed": seed}, folder, bool(ending))


def expand(matrix: dict, output: Path) -> list[Run]:
    """The runs of a matrix. Raises UserError that names what there is not."""
    names = [f"{path.parent.name}/{path.stem}" for path in sorted((ROOT / "algorithms").glob("*/*.py"))]
    known = {name: read_configs(ROOT / "configs" / name) for name in names if not name.startswith("collect/")}
    known = {name: files for name, files in known.items() if files}
    datasets = {dataset for files in known.values() for part in files.values() for dataset in part}
    for pattern in matrix["datasets"]:
        match(pattern, datasets, "datasets: there is no config for")
    runs = {}
    for pattern, own in matrix["algorithms"]:
        pattern = pattern if "/" in pattern else f"offline/{pattern}"
        for name in match(pattern, known, "algorithms: there is no"):
            try:
                runs |= {run.folder: run for run in runs_of(name, own, known[name], matrix, output)}
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
    return list(runs.values())


# ------------------------------------- What is done, and what it costs -------------------------------------


def record_of(run: Run) -> dict:
    """Its run.json; empty where there is none yet, or a damaged one: the script will say so."""
    try:
        return read_record(run.folder)
    except (FileNotFoundError, ValueError):
        return {}


def is_finished(run: Run, record: dict) -> bool:
    """Is there nothing to do? More updates than asked for are enough."""
    fields, config = run.config.keys() - read_script(run.script)[1] - {"updates"}, record.get("config", {})
    same = all(config.get(name) == run.config[name] for name in fields)
    return record.get("status") == "finished" and same and config["updates"] >= run.config["updates"]


def position(run: Run, record: dict) -> tuple[int, float]:
    """Updates that are done, and the seconds they took."""
    if record.get("status") == "finished":
        return all_updates(record["config"]), record["wall_seconds"]
    try:
        with open(run.folder / "metrics.csv", newline="") as file:
            *_, row = csv.DictReader(file)
        return int(row["update"]), float(row["time/wall_seconds"])
    except (FileNotFoundError, KeyError, ValueError):  # before its first row
        return 0, 0.0


def paces(measured: Iterable[tuple[tuple[str, str], int, float]]) -> dict:
    """Median seconds per update of each kind and each algorithm, given kind, updates and seconds of runs."""
    values = defaultdict(list)
    for kind, updates, seconds in measured:
        for key in (kind, kind[0]) if updates else ():
            values[key].append(seconds / updates)
    return {key: statistics.median(several) for key, several in values.items()}


def recorded_paces() -> dict:
    """Those of the runs in results/scores that a processor's core made."""
    rows = []
    for path in (ROOT / "results/scores").glob("*.csv"):
        with open(path, newline="") as file:
            finals = [row for row in csv.DictReader(file) if row["phase"] == "final"]
        rows += [row for row in finals if not row["device"].startswith("cuda")]
    kinds = [(f"{row['family']}/{row['algorithm']}", row["dataset"]) for row in rows]
    return paces((kind, int(row["update"]), float(row["wall_seconds"])) for kind, row in zip(kinds, rows))


class Costs:
    """What runs still need, by what was measured."""

    def __init__(self, records: dict[Run, dict]):
        self.positions, self.recorded = {}, recorded_paces()
        self.measure(records)

    def measure(self, records: dict[Run, dict]) -> None:
        """Looks where these runs are now."""
        self.positions |= {run: position(run, record) for run, record in records.items()}
        self.here = paces((run.kind, *place) for run, place in self.positions.items())

    def updates_left(self, run: Run) -> int:
        return max(0, all_updates(run.config) - self.positions[run][0])

    def of(self, run: Run) -> tuple[float, str]:
        """Seconds that it still needs, and the source; inf where its algorithm was never measured."""
        updates = self.updates_left(run)
        for source, table in {"measured here": self.here, "by results/scores": self.recorded}.items():
            for key in (run.kind, run.kind[0]):
                if key in table:
                    return updates * table[key], source
        return math.inf, ""

    def total(self, runs: Iterable[Run]) -> tuple[float | None, str]:
        """Seconds that they still need, one after the other, and the sources; None if all are unknown."""
        parts = {run: self.of(run) for run in runs}
        known = {run: seconds for run, (seconds, source) in parts.items() if source}
        unknown = sorted({run.kind[0] for run in parts.keys() - known.keys()})
        words = sorted({source for _, source in parts.values() if source})
        words += [f"without {', '.join(unknown)}: never measured"] * bool(unknown)
        return None if unknown and not known else sum(known.values()), "; ".join(words)


def show_costs(runs: list[Run], todo: dict[Run, dict], costs: Costs) -> None:
    """A line a run that is not finished, then a line an algorithm."""
    for run, record in todo.items():
        print(f"{'started' if record else 'missing'} {run}")
    names = [*sorted({run.kind[0] for run in runs}), "all"]
    line = f"{{:{max(18, *map(len, names)) + 2}}}{{:>7}}{{:>7}}{{:>16}}{{:>12}}  {{}}".format
    print(line("algorithm", "runs", "to do", "updates", "core-hours", "").rstrip())
    for name in names:
        ours, left = ([run for run in several if name in ("all", run.kind[0])] for several in (runs, todo))
        updates = sum(map(costs.updates_left, left))
        seconds, source = costs.total(left)
        hours = "?" if seconds is None else f"{seconds / 3600:,.1f}"
        print(line(name, f"{len(ours):,}", f"{len(left):,}", f"{updates:,}", hours, source).rstrip())


def show_sweep(runs: list[Run]) -> None:
    """A line a swept variant: its final scores, or returns where there is no score."""
    groups = defaultdict(list)
    for run in runs:
        record = record_of(run)
        if run.swept and is_finished(run, record):
            groups[*run.kind, run.config["variant"]].append(record)
    if not groups:
        return
    rows = [("algorithm", "dataset", "variant", "seeds", "updates", "score")]
    for key, records in groups.items():
        kind = "return_mean" if any(record.get("score") is None for record in records) else "score"
        values = [record[kind] for record in records if record.get(kind) is not None]
        counts = sorted({record["config"]["updates"] for record in records})
        shown = show(values) if values else "not evaluated"
        shown += " (return)" * (kind == "return_mean" and values != [])
        rows.append((*key, str(len(records)), " and ".join(f"{count:,}" for count in counts), shown))
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    print("Final evaluations, mean and deviation over seeds. A value that is chosen by them is chosen with\n"
          "the simulator, which offline learning does not have: say so, and how many values were tried.")


# ----------------------------------------------- Running them -----------------------------------------------


def launch(run: Run, **environment: str) -> psutil.Popen:
    """The process of a run: it prints into log.txt, in a session of its own, which Ctrl-C does not reach."""
    run.folder.mkdir(parents=True, exist_ok=True)
    command = run.command(seed=run.seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    with open(run.folder / "log.txt", "a") as log:
        print("$", shlex.join([sys.executable, *command]), file=log, flush=True)
        return psutil.Popen([sys.executable, "-c", LAUNCH, *command], cwd=ROOT, env=environment,
                            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def stop(children: Iterable[psutil.Popen]) -> None:
    """Ctrl-C for each; what is still there after GRACE is killed."""
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGINT)
    for child in psutil.wait_procs(children, GRACE)[1]:
        child.kill()


def list_cores() -> list[int]:
    """Those that this process may use."""
    process = psutil.Process()
    return process.cpu_affinity() if hasattr(process, "cpu_affinity") else list(range(os.cpu_count()))


def take_core() -> tuple[int, filelock.FileLock] | None:
    """A core that no other benchmark's run is pinned to, and the lock that keeps it, if there is one."""
    folder = Path(tempfile.gettempdir(), f"reef-cores-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    for core in list_cores():
        lock = filelock.FileLock(folder / f"{core}.lock", timeout=0)
        with contextlib.suppress(filelock.Timeout):
            lock.acquire()
            return core, lock
    return None


def list_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return re.findall(r"[^, ]+", os.environ["CUDA_VISIBLE_DEVICES"])
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)


def run_local(runs: list[Run], options: argparse.Namespace) -> Iterator[tuple[Run, str] | None]:
    """Yields each run that ended with what went wrong, empty if nothing did; and None now and then."""
    gpus, waiting, running = list_gpus(), deque(runs), {}
    places = list(range(options.processes or len(list_cores())))
    try:
        while waiting or running:
            while waiting and places:
                run, place = waiting.popleft(), places.pop()
                child = launch(run, **({"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {}))
                core = take_core()
                running[child] = run, place, core
                with contextlib.suppress(AttributeError, psutil.NoSuchProcess):  # macOS; it ended already
                    if core:
                        child.cpu_affinity([core[0]])
            for child in psutil.wait_procs(running, timeout=0.5)[0]:
                run, place, core = running.pop(child)
                places.append(place)
                if core:
                    core[1].release()
                yield run, f"exit status {child.returncode}" if child.returncode else ""
            yield None
    finally:
        stop(running)
        for _, _, core in running.values():
            if core:
                core[1].release()


def connect(options: argparse.Namespace) -> None:
    """To the Ray cluster at the address, else to one started here. Raises UserError where there is none."""
    address, processes = options.address, options.processes or len(list_cores())
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to its makers
    if address:
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # half a minute each, where nobody answers
    import ray  # takes seconds, and reads these

    try:
        if address and ":" in address:  # nobody listens: seen at once
            host, port = address.rsplit(":", 1)
            socket.create_connection((host, int(port)), timeout=10).close()
        here = {} if address else {"num_cpus": processes, "include_dashboard": False}
        ray.init(address or "local", logging_level="ERROR", log_to_driver=False, **here)
    except Exception as error:  # of many kinds
        problem = f"no Ray cluster at {address}" if address else "cannot start Ray"
        raise UserError(f"{problem}: {error!r:.200}") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ray has set its own


def execute(run: Run, environment: dict[str, str]) -> int:
    """A run in a Ray task; its exit status."""
    with contextlib.suppress(filelock.Timeout), filelock.FileLock(run.folder / "lock", timeout=PATIENCE):
        pass  # whoever held it has died with its machine
    return launch(run, **environment).wait()


def run_ray(runs: list[Run], options: argparse.Namespace) -> Iterator[tuple[Run, str] | None]:
    """As `run_local`, on the cluster."""
    import ray

    share = {"num_cpus": options.cpus, "num_gpus": options.gpus, "max_retries": options.retries}
    task, hidden = ray.remote(**share)(execute), {} if options.gpus else {"CUDA_VISIBLE_DEVICES": ""}
    try:
        waiting = {task.remote(run, hidden): run for run in runs}
        while waiting:
            for result in ray.wait([*waiting], timeout=0.5)[0]:
                try:
                    status = ray.get(result)
                    problem = f"exit status {status}" if status else ""
                except ray.exceptions.RayError as error:
                    problem = f"given up after {options.retries} retries: {error!r:.200}"
                yield waiting.pop(result), problem
            yield None
    finally:
        ray.shutdown()  # ends its workers, and the runs die with these


class Display:
    """One line: done, running, failed, time left. Above it a line a run that ended."""

    def __init__(self, count: int, todo: list[Run], costs: Costs):
        self.pending, self.costs, self.failed = {run: log_size(run) for run in todo}, costs, 0
        self.period, self.due = 5 if sys.stderr.isatty() else 60, 0.0  # seconds
        form = "{n_fmt}/{total_fmt} done |{bar:10}| {desc}"
        self.bar = tqdm(total=count, initial=count - len(todo), bar_format=form)

    def end(self, run: Run, problem: str) -> None:
        """Says how a run ended."""
        begin = self.pending.pop(run)
        if not problem:
            self.bar.write(f"{run}: {record_of(run)['result']}")
            self.bar.update()
        else:
            self.failed, log = self.failed + 1, run.folder / "log.txt"
            lines = log.read_bytes()[begin:].decode(errors="replace").splitlines() if log.exists() else []
            self.bar.write("\n    ".join([f"FAILED, {problem}: {run}/log.txt ends in", *lines[-5:]]))
        self.due = 0.0

    def refresh(self) -> None:
        """Looks where the running ones are, if it is time to."""
        if time.monotonic() >= self.due:
            running = [run for run, size in self.pending.items() if log_size(run) != size]
            self.costs.measure({run: {} for run in running})
            seconds, source = self.costs.total(self.pending)
            left = "?" if seconds is None else tqdm.format_interval(seconds / max(1, len(running)))
            left += f" ({source})" * bool(source)
            self.bar.set_description_str(f"running {len(running)}, failed {self.failed}, left {left}")
            self.due = time.monotonic() + self.period


def log_size(run: Run) -> int:
    """In bytes: it grows once the run is started, on whichever machine."""
    log = run.folder / "log.txt"
    return log.stat().st_size if log.exists() else 0


def check_datasets(runs: list[Run]) -> None:
    """Raises UserError with the commands that bring what is not on this machine."""
    ids = sorted({run.config["dataset"] for run in runs})
    missing = [name for name in ids if not (get_dataset_path(name) / "data").exists()]
    makers = {True: "make dataset ID=", False: "minari download "}
    commands = [makers[name.startswith("reef/")] + name for name in missing]
    if missing:
        raise UserError(f"{len(missing)} datasets are not on this machine: {'; '.join(commands)}")


def check_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < RESERVE:
        room = f"{free / 1e6:.0f} MB are free in {folder}, and {RESERVE / 1e6:.0f} have to be"
        raise UserError(f"{room}; make room, and the same command goes on")


def benchmark(runs: list[Run], todo: list[Run], costs: Costs, options: argparse.Namespace) -> int:
    """Runs what is to do; the exit status."""
    check_disk(options.output_dir)
    if options.engine == "ray":
        connect(options)
    engine, display = {"local": run_local, "ray": run_ray}[options.engine], Display(len(runs), todo, costs)
    with contextlib.closing(display.bar), contextlib.closing(engine(todo, options)) as events:
        for event in events:
            if event:
                display.end(*event)
            display.refresh()
            check_disk(options.output_dir)
    print(f"{len(runs) - display.failed:,} of {len(runs):,} runs are finished, {display.failed:,} failed")
    show_sweep(runs)
    return int(display.failed > 0)


# ----------------------------------------------- Command line -----------------------------------------------


def sweep(name: str, runs: list[Run]) -> dict:
    """A wandb sweep of these runs, for agents that are started in the root of the repository."""
    commands = [shlex.join(run.command(wandb_mode=run.fields.get("wandb_mode", "online"))) for run in runs]
    values = {"run": commands, "seed": [run.seed for run in runs]}
    return {
        "name": name,
        "method": "grid",
        "parameters": {key: {"values": list(dict.fromkeys(column))} for key, column in values.items()},
        "program": "sh",  # its command is: env run=... seed=... sh -c ...
        "command": ["${env}", "${args_no_hyphens}", "${program}", "-c",
                    f'eval "exec {shlex.quote(sys.executable)} $run --seed=$seed"'],
    }


def run(arguments: list[str]) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("matrix", type=Path, help="YAML file, such as configs/benchmark/quick.yaml")
    parser.add_argument("--list", action="store_true", help="what would run, and its cost in core-hours")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="write the same runs as a wandb sweep")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--processes", type=int, metavar="N", help="at once on this machine (one a core)")
    parser.add_argument("--address", help="Ray: a cluster's, HOST:PORT or auto (start one here)")
    parser.add_argument("--cpus", type=float, default=1, help="Ray: cores that a run takes (1)")
    parser.add_argument("--gpus", type=float, default=0, help="Ray: GPUs that a run takes, such as 0.25 (0)")
    parser.add_argument("--retries", type=int, default=5, help="Ray: of a run whose machine died (5)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results/runs", help="where run folders go")
    options = parser.parse_args(arguments)
    theirs = options.address, options.cpus, options.gpus, options.retries
    if options.engine != "ray" and theirs != (None, 1, 0, 5):
        parser.error("--address, --cpus, --gpus and --retries are for --engine ray")
    if options.processes is not None and options.processes < 1:
        parser.error("--processes has to be at least 1")
    options.output_dir = options.output_dir.absolute()
    try:
        runs = expand(read_matrix(options.matrix), options.output_dir)
    except UserError as error:
        raise UserError(f"{options.matrix}: {error}") from None
    if options.sweep:
        content = sweep(options.matrix.stem, runs)
        write(options.sweep, yaml.safe_dump(content, sort_keys=False, width=1000))
        print(f"{options.sweep} is written: wandb sweep {options.sweep}, then wandb agent ID in {ROOT}")
        return 0
    records = {run: record_of(run) for run in runs}
    todo = {run: record for run, record in records.items() if not is_finished(run, record)}
    costs = Costs(records)
    if options.list:
        show_costs(runs, todo, costs)
        return 0
    if not todo:
        print(f"all {len(runs):,} runs are finished")
        show_sweep(runs)
        return 0
    check_datasets([*todo])
    options.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(options.output_dir / "benchmark.lock", timeout=0):
            longest_first = sorted(todo, key=lambda run: costs.of(run)[0], reverse=True)
            return benchmark(runs, longest_first, costs, options)
    except filelock.Timeout:
        advice = "wait for it, or take another --output_dir"
        raise UserError(f"another benchmark is at work in {options.output_dir}: {advice}") from None


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    return exit_status(Path(__file__).name, run, sys.argv[1:], advice=GO_ON)


if __name__ == "__main__":
    sys.exit(main())
