"""Searches ranges of an algorithm's fields with Optuna, and records every trial.

  python tools/tune.py td3_bc reef/pointmaze/umaze-v0 --search alpha=0.5:10:log policy_delay=1,2,4 \\
      --trials 20 --updates 20000

A range is name=low:high, name=low:high:log, or name=value,value,... A trial is a run of --updates with the
config of the dataset, --seeds times; its score is the mean of their final evaluations, or returns where
there is no score. Optuna's TPE proposes trials, and they run as tools/benchmark.py runs them, with variants
such as tune-20000-alpha-2.53. The same command goes on with what is missing, and with more --trials from
there.

THIS IS NOT OFFLINE. Scores come from the simulator, which an offline learner does not have: who reports a
value that was found here says so, and how much was tried. All trials are on record for that, in a table
below --output_dir: tune/<family>/<algorithm>/<dataset>.csv. The best of many trials is also a lucky one, so
its score is no result: train it anew with other seeds.

It needs Optuna: python -m pip install -r requirements-tune.txt
"""

import argparse
import contextlib
import csv
import io
import math
import signal
import statistics
import sys
from pathlib import Path

import filelock
import yaml
from benchmark import (
    GO_ON,
    Run,
    check_datasets,
    expand,
    is_finished,
    list_cores,
    read_script,
    record_of,
    run_local,
)
from common import ROOT, UserError, exit_status, write

Range = dict  # {"low", "high", "log"} or {"choices"}
RESULT = ["score", "spread", "state", "seeds", "updates", "episodes", "seconds", "variant", "search"]


# ----------------------------------------------- The ranges -----------------------------------------------


def read_search(words: list[str]) -> dict[str, Range]:
    """{field: its range}. Raises UserError that names a malformed one."""
    ranges = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            ranges[name] = read_range(text)
        except (ValueError, yaml.YAMLError):
            forms = "name=low:high, name=low:high:log (above 0) or name=value,value"
            raise UserError(f"--search: {word} is none of {forms}") from None
    return ranges


def read_range(text: str) -> Range:
    """Of low:high, low:high:log or value,value,...; ValueError where it is none of them."""
    low, *rest = text.split(":")
    if not text:
        raise ValueError(text)
    if not rest:
        return {"choices": [yaml.safe_load(value) for value in text.split(",")]}
    high, *scale = rest
    space = {"low": float(low), "high": float(high), "log": scale == ["log"]}
    if scale not in ([], ["log"]) or not space["low"] < space["high"] < math.inf:
        raise ValueError(text)
    if space["log"] and space["low"] <= 0:
        raise ValueError(text)
    return space


def ends(space: Range) -> list:
    return space.get("choices") or [space["low"], space["high"]]


def distributions(optuna, ranges: dict[str, Range], whole: set[str]) -> dict:
    """Optuna's form of them."""
    found = {}
    for name, space in ranges.items():
        if "choices" in space:
            found[name] = optuna.distributions.CategoricalDistribution(space["choices"])
        elif name in whole:
            found[name] = optuna.distributions.IntDistribution(
                int(space["low"]), int(space["high"]), log=space["log"])
        else:
            found[name] = optuna.distributions.FloatDistribution(**space)
    return found


def shorten(value, space: Range):
    """Three digits of a number are enough to search, and to name a variant."""
    if not isinstance(value, float) or "choices" in space:
        return value
    return min(max(float(f"{value:.3g}"), space["low"]), space["high"])


# ----------------------------------------------- The trials -----------------------------------------------


def make_runs(options: argparse.Namespace, fields: dict) -> list[Run]:
    """The runs of one trial, one a seed."""
    own = {"variant": f"tune-{options.updates}", "updates": options.updates, **options.set}
    own |= {name: [value] for name, value in fields.items()}  # lists: they name the variant
    matrix = {"algorithms": [(options.algorithm, own)], "datasets": [options.dataset], "overrides": {}}
    return expand(matrix | {"seeds": list(range(options.seeds))}, options.output_dir)


def judge(runs: list[Run], failed: set[Path]) -> dict:
    """What a trial came to; its score is None where a run failed."""
    records = [record_of(run) for run in runs]
    kind = "return_mean" if any(record.get("score") is None for record in records) else "score"
    values = [record.get(kind) for record in records]
    failed = any(run.folder in failed for run in runs)
    if not failed and None in values:
        raise UserError(f"{runs[0]} was not evaluated, for want of an environment: --set environment=ID")
    config = runs[0].config
    count = math.ceil(config["updates"] / config["eval_every"]) * config["eval_episodes"]
    return {
        "score": None if failed else statistics.mean(values),
        "spread": statistics.stdev(values) if not failed and len(values) > 1 else None,
        "state": "failed" if failed else "finished",
        "seeds": len(runs),
        "updates": config["updates"],
        "episodes": len(runs) * (count + config["final_eval_episodes"]),
        "seconds": round(sum(record.get("wall_seconds", 0) for record in records), 1),
        "variant": config["variant"],
    }


def read_trials(file: Path, search: str, options: argparse.Namespace) -> list[dict]:
    """The trials of earlier calls. Raises UserError where they are of another search."""
    if not file.exists():
        return []
    with open(file, newline="") as lines:
        trials = list(csv.DictReader(lines))
    wanted = {"search": search, "seeds": str(options.seeds), "updates": str(options.updates)}
    for trial in trials:
        for name, value in wanted.items():
            if trial.get(name) != value:
                advice = "another --output_dir starts another one"
                problem = f"{file} is of another search, {name} {trial.get(name)}, not {value}"
                raise UserError(f"{problem}; {advice}")
    return trials


def write_trials(file: Path, trials: list[dict], names: list[str]) -> None:
    """All of it or nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["trial", *names, *RESULT])
    writer.writeheader()
    writer.writerows(trials)
    write(file, text.getvalue())


def start_study(optuna, spaces: dict, ranges: dict[str, Range], trials: list[dict]):
    """A study that knows the earlier trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=len(trials))  # else it would propose the first ones again
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        if trial["score"]:
            values = {name: yaml.safe_load(trial[name]) for name in ranges}
            values |= {name: float(trial[name]) for name in ranges if "choices" not in ranges[name]}
            study.add_trial(optuna.trial.create_trial(
                params=values, distributions=spaces, value=float(trial["score"])))
    return study


def propose(study, spaces: dict, ranges: dict[str, Range], count: int) -> list[tuple]:
    """So many of Optuna's trials, with the fields of each."""
    asked = [study.ask(spaces) for _ in range(count)]
    return [(trial, {name: shorten(trial.params[name], ranges[name]) for name in ranges}) for trial in asked]


def run_all(runs: list[Run], options: argparse.Namespace) -> dict[Run, str]:
    """Runs them; what went wrong with each that failed."""
    problems = {}
    with contextlib.closing(run_local(runs, options)) as events:
        for event in filter(None, events):
            problems |= {event[0]: event[1]} if event[1] else {}
    return problems


def search(optuna, options: argparse.Namespace, ranges: dict[str, Range], file: Path) -> list[dict]:
    """All trials, those of earlier calls first; each is written down when it ends."""
    defaults, _ = read_script(ROOT / "algorithms" / f"{options.algorithm}.py")
    spaces = distributions(optuna, ranges, {name for name in ranges if type(defaults[name]) is int})
    words = [*options.search, *(f"{name}={value}" for name, value in options.set.items())]
    trials = read_trials(file, " ".join(words), options)
    study = start_study(optuna, spaces, ranges, trials)
    at_once = max(1, options.processes // options.seeds)
    while len(trials) < options.trials:
        proposed = propose(study, spaces, ranges, min(at_once, options.trials - len(trials)))
        runs = [make_runs(options, fields) for _, fields in proposed]
        distinct = {run.folder: run for several in runs for run in several}  # it may propose the same again
        missing = [run for run in distinct.values() if not is_finished(run, record_of(run))]
        failed = {run.folder for run in run_all(missing, options)}
        for (trial, fields), several in zip(proposed, runs):
            result = judge(several, failed)
            if result["score"] is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, result["score"])
            trials.append({"trial": len(trials), **fields, **result, "search": " ".join(words)})
            write_trials(file, trials, list(ranges))
            shown = f"failed, see {several[0]}/log.txt"
            if result["score"] is not None:
                shown = f"{result['score']:.2f}"
            print(f"trial {len(trials)} of {options.trials}: {result['variant']}: {shown}", flush=True)
    return trials


def summary(trials: list[dict], file: Path) -> str:
    """The best, and what they took."""
    done = [trial for trial in trials if trial["score"] not in (None, "")]
    lines = [f"{len(trials)} trials, {len(trials) - len(done)} of which failed; the best:"]
    best = sorted(done, key=lambda trial: -float(trial["score"]))[:5]
    lines += [f"  {float(trial['score']):10.2f}  {trial['variant']}" for trial in best]
    runs = {trial["variant"]: trial for trial in trials}.values()  # one proposed again is not run again
    sums = {name: sum(float(trial[name]) for trial in runs) for name in ("episodes", "seconds")}
    updates = sum(int(trial["updates"]) * int(trial["seeds"]) for trial in runs)
    hours = f"{sums['seconds'] / 3600:.1f} hours of training and evaluation"
    lines += [
        f"They took {updates:,} updates, {hours}, and {sums['episodes']:,.0f} episodes in the simulator.",
        "Choosing with the simulator is not offline learning: where you report the best, say what was tried.",
        "It is the luckiest of many, too: train it anew with other seeds before you compare it.",
        f"All trials: {file}",
    ]
    return "\n".join(lines)


# ----------------------------------------------- Command line -----------------------------------------------


def tune(options: argparse.Namespace) -> None:
    try:
        import optuna  # for this program alone
    except ImportError:
        command = f"{sys.executable} -m pip install -r {ROOT / 'requirements-tune.txt'}"
        raise UserError(f"the search is Optuna's, which is not installed: {command}") from None
    file = options.output_dir / "tune" / options.algorithm / f"{options.dataset}.csv"
    ranges = read_search(options.search)
    for end in (0, -1):  # values that the script would not take are refused before anything is run
        check_datasets(make_runs(options, {name: ends(space)[end] for name, space in ranges.items()}))
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(file.with_suffix(".lock"), timeout=0):
            trials = search(optuna, options, ranges, file)
    except filelock.Timeout:
        raise UserError(f"another search is at work on {file}") from None
    print(summary(trials, file))


def setting(word: str) -> tuple:
    """(name, value) of NAME=VALUE."""
    name, equals, value = word.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{word} is not NAME=VALUE")
    return name, yaml.safe_load(value)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("algorithm", help="a script of algorithms/offline, or family/script")
    add("dataset", help="Minari id, with a config of that algorithm")
    add("--search", nargs="+", required=True, metavar="RANGE", help="name=low:high[:log] or name=a,b")
    add("--trials", type=int, default=20, help="the budget, earlier calls included (20)")
    add("--seeds", type=int, default=1, help="of each trial (1)")
    add("--updates", type=int, required=True, help="of each run")
    add("--set", nargs="+", default=[], type=setting, metavar="NAME=VALUE", help="other fields")
    add("--processes", type=int, default=len(list_cores()), help="runs at once (one a core)")
    add("--output_dir", type=Path, default=ROOT / "results/runs", help="for the runs and the table")
    options = parser.parse_args(arguments)
    for name in ("trials", "seeds", "updates", "processes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} has to be at least 1")
    options.set, options.output_dir = dict(options.set), options.output_dir.absolute()
    if "/" not in options.algorithm:
        options.algorithm = f"offline/{options.algorithm}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    return exit_status("tune.py", tune, options, advice=GO_ON)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
