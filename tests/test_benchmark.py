"""tools/benchmark.py: what a matrix means, what is run and what is not, engines, errors, costs."""

import csv
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import benchmark as program
import filelock
import psutil
import pytest
import yaml
from conftest import ROOT, short
from scores import FREE

pytest.register_assert_rewrite("runs")
from runs import assert_same_run, record  # noqa: E402

# A learner that counts, with what a script promises: Config, Run.FREE, run folder, resuming, exit statuses.
TOY = '''\
import dataclasses, json, os, sys, time
from pathlib import Path
from typing import Optional

Count = int

@dataclasses.dataclass
class Config:
    """Toy."""

    dataset: str = "test/one-v0"  # id
    seed: int = 0
    variant: str = "default"
    updates: Count = 3
    eval_every: int = 5000
    pause: float = 0.0  # seconds of an update
    fails: int = 0  # exit status in the second update
    flag: bool = True
    note: Optional[float] = None
    threads: int = 0
    output_dir: str = "results/runs"
    wandb_mode: str = "offline"

class Learner:
    FREE = ()

class Run:
    """Its folder."""

    FREE = ("pause", "threads", "output_dir", "wandb_mode")

def read(text):
    values = dict(line.split(": ", 1) for line in text.splitlines())
    for name, value in values.items():
        try:
            values[name] = json.loads(value)
        except ValueError:
            pass
    return values

def main():
    arguments = dict(text.removeprefix("--").split("=", 1) for text in sys.argv[1:])
    file = read(Path(arguments.pop("config_path")).read_text())
    config = vars(Config()) | file | read("\\n".join(f"{k}: {v}" for k, v in arguments.items()))
    script = Path(__file__).resolve()
    folder = Path(config["output_dir"], script.parent.name, script.stem, config["dataset"], config["variant"])
    folder = folder / f"seed-{config['seed']}"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"argv": sys.argv[1:], "begin": time.time(), "session": os.getsid(0)}
    facts |= {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    with open(folder / "launches", "a") as file:
        print(json.dumps(facts), file=file)
    info, record = {"status": "running", "config": config}, folder / "run.json"
    if record.exists():
        old = json.loads(record.read_text())["config"]
        changed = [name for name in config if name not in Run.FREE and old.get(name) != config[name]]
        if changed:
            print("a run of another config:", *changed, file=sys.stderr)
            sys.exit(2)
    def note(**more):
        info.update(more)
        (folder / "run.json.new").write_text(json.dumps(info))
        (folder / "run.json.new").rename(folder / "run.json")
    note()
    saved = folder / "checkpoint"
    done = int(saved.read_text()) if saved.exists() else 0
    print("begins at", done)
    while done < config["updates"]:
        time.sleep(config["pause"])
        done += 1
        (folder / "checkpoint.new").write_text(str(done))
        (folder / "checkpoint.new").rename(saved)  # an interrupt leaves none half-written
        rows = "".join(f"{n},0.5,{2 * n}\\n" for n in range(1, done + 1))
        (folder / "metrics.csv").write_text("update,actor/loss,time/wall_seconds\\n" + rows)
        if config["fails"] and done == 2:
            note(status="failed")
            print("so many words", "of an error", "in lines", "that end in", "one two three", sep="\\n")
            sys.exit(config["fails"])
    end = {"end": time.time(), "cores": sorted(os.sched_getaffinity(0))}
    end |= {"score": None if config["note"] == 0 else 10 * (config["note"] or 1) + config["seed"]}
    end |= {"return_mean": 100.0 + config["seed"], "wall_seconds": 2.0 * done}
    note(status="finished", result=f"score {config['seed']}.5", **end)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
'''


def copy_benchmark(root: Path) -> None:
    (root / "tools").mkdir(parents=True, exist_ok=True)
    for name in ("benchmark.py", "common.py"):
        shutil.copy(ROOT / "tools" / name, root / "tools")


def write_toys(root: Path) -> None:
    """A repository with toys for learners, their configs, and their datasets' folders."""
    copy_benchmark(root)
    for name in ("offline/toy", "offline/tot", "finetune/toy", "collect/toy"):
        script = root / "algorithms" / f"{name}.py"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(TOY)
    (root / "algorithms/offline/bare.py").write_text("Config = Run = None")  # it has no configs
    for name, dataset in [("offline/toy", "one"), ("offline/toy", "two"), ("offline/tot", "one"),
                          ("finetune/toy", "two"), ("collect/toy", "one")]:
        write_config(root, f"{name}/test/{dataset}-v0", dataset=f"test/{dataset}-v0")
        (root / f"minari/test/{dataset}-v0/data").mkdir(parents=True, exist_ok=True)
    write_config(root, "offline/toy/test/two-v0-fast", dataset="test/two-v0", variant="fast")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """That repository, to work in."""
    write_toys(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for process in psutil.process_iter(["cmdline"]):  # of tests that failed
        if any(str(tmp_path) in word for word in process.info["cmdline"] or []):
            process.kill()


def write_config(root: Path, name: str, **fields) -> None:
    file = root / "configs" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))


def write_matrix(root: Path, **fields) -> str:
    """Its path."""
    content = {"datasets": ["test/one-v0"], "seeds": 1, **fields}
    (root / "matrix.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return "matrix.yaml"


@pytest.fixture
def module(root, monkeypatch):
    """tools/benchmark.py for that repository."""
    monkeypatch.setattr(program, "ROOT", root)
    program.read_script.cache_clear()
    return program


@pytest.fixture
def benchmark(module, monkeypatch, capsys):
    """benchmark("matrix.yaml", "--list", ...) is the command line in this process: status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
        capsys.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        try:
            status = module.main()
        finally:
            signal.signal(signal.SIGTERM, before)
        return status, *capsys.readouterr()

    return run


def begin(root: Path, *arguments: str) -> subprocess.Popen:
    """The command line in a process of its own, that hears Ctrl-C; both outputs are in the file output."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    command = [sys.executable, str(root / "tools/benchmark.py"), *arguments]
    with open(root / "output", "w") as output:
        return subprocess.Popen(command, cwd=root, stdout=output, stderr=output)


def wait_for(condition, seconds: float = 120):
    """What `condition` gives once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


def place(root: Path, name: str = "toy", dataset: str = "test/one-v0", seed: int = 0) -> Path:
    return root / "results/runs/offline" / name / dataset / f"default/seed-{seed}"


def launches(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "launches").read_text().splitlines()]


def folders(root: Path) -> set[str]:
    runs = root / "results/runs"
    return {file.parent.relative_to(runs).as_posix() for file in runs.rglob("run.json")}


def assert_refused(result: tuple, *words: str) -> None:
    """One line on stderr, with these words, and nothing else."""
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.startswith("benchmark.py: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


# ------------------------------------------- What a matrix means -------------------------------------------


def test_runs_are_the_scripts_own_command_lines(root, benchmark):
    lines, overrides = ["toy", {"tot": {"updates": 2}}], {"updates": "4", "wandb_mode": "disabled"}
    matrix = write_matrix(root, algorithms=lines, seeds=[3, 5], overrides=overrides)
    status, out, _ = benchmark(matrix)
    assert status == 0
    assert folders(root) == {f"offline/{name}/test/one-v0/default/seed-{seed}"
                             for name in ("toy", "tot") for seed in (3, 5)}
    folder = place(root, seed=5)
    (launch,) = launches(folder)
    file = "configs/offline/toy/test/one-v0.yaml"
    wanted = [f"--config_path={file}", "--updates=4", "--wandb_mode=disabled", "--threads=1", "--seed=5"]
    assert sorted(launch["argv"]) == sorted([*wanted, f"--output_dir={root / 'results/runs'}"])
    assert launch["OMP_NUM_THREADS"] == "1"
    assert launch["session"] != os.getsid(0)  # a terminal's Ctrl-C does not reach it twice
    assert record(folder)["config"]["updates"] == 4
    assert record(place(root, "tot", seed=3))["config"]["updates"] == 2
    log = (folder / "log.txt").read_text().splitlines()
    assert log[0].startswith(f"$ {sys.executable} algorithms/offline/toy.py --config_path={file} ")
    assert log[1:] == ["begins at 0"]
    assert "results/runs/offline/toy/test/one-v0/default/seed-5: score 5.5\n" in out
    assert out.endswith("4 of 4 runs are finished, 0 failed\n")


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"algorithms": ["*"]}, ["offline/toy/test/one-v0", "offline/tot/test/one-v0"]),
        ({"algorithms": ["*/toy"], "datasets": ["*two*", "test/one-v*"]},
         ["finetune/toy/test/two-v0", "offline/toy/test/one-v0", "offline/toy/test/two-v0"]),
        ({"algorithms": ["finetune/toy"], "datasets": ["*"]}, ["finetune/toy/test/two-v0"]),
        ({"algorithms": ["t?t"]}, ["offline/tot/test/one-v0"]),
    ],
)
def test_patterns(root, module, fields, wanted):
    folders = [folder for folder, _ in expand(root, module, **fields)]
    assert sorted(folders) == sorted(f"{name}/default/seed-0" for name in wanted)


def expand(root: Path, module, **fields) -> list[tuple[str, list[str]]]:
    """Folders and added arguments of a matrix's runs, but for those that all have."""
    runs = module.expand(module.read_matrix(Path(write_matrix(root, **fields))), root)
    kept = [[word for word in run.command() if not re.search("threads|output_dir", word)] for run in runs]
    return [(str(run.folder.relative_to(root)), words[1:]) for run, words in zip(runs, kept)]


def test_a_variant_is_a_config_file(root, module):
    runs = expand(root, module, algorithms=[{"toy": {"variant": "fast"}}], datasets=["*"])
    file = "--config_path=configs/offline/toy/test/two-v0-fast.yaml"
    assert runs == [("offline/toy/test/two-v0/fast/seed-0", [file, "--variant=fast"])]


def test_a_config_is_read_as_the_script_reads_it(root, module):
    """YAML takes 2e1 for a text: the run would never count as finished."""
    write_config(root, "offline/toy/test/two-v0-fast", dataset="test/two-v0", variant="fast", updates="2e1")
    matrix = write_matrix(root, algorithms=[{"toy": {"variant": "fast"}}], datasets=["*"])
    (one,) = module.expand(module.read_matrix(Path(matrix)), root)
    assert one.config["updates"] == 20


def test_a_variant_names_other_settings(root, module):
    fields = {"variant": "noted", "note": 2.5, "flag": False}
    runs = expand(root, module, algorithms=["toy"], datasets=["*"], overrides=fields)
    words = ["--variant=noted", "--note=2.5", "--flag=false"]
    assert [folder for folder, _ in runs] == [f"offline/toy/test/{d}-v0/noted/seed-0" for d in ("one", "two")]
    for (_, arguments), dataset in zip(runs, ("one", "two")):
        assert arguments == [f"--config_path=configs/offline/toy/test/{dataset}-v0.yaml", *words]
    fast = {"variant": "fast", "note": None}
    runs = dict(expand(root, module, algorithms=["toy"], datasets=["*"], overrides=fast))
    assert runs["offline/toy/test/two-v0/fast/seed-0"][0].endswith("two-v0-fast.yaml")  # where there is one
    assert runs["offline/toy/test/one-v0/fast/seed-0"][0].endswith("one-v0.yaml")
    assert all("--note=null" in words for words in runs.values())


def test_a_list_of_values_is_a_sweep(root, module):
    runs = dict(expand(root, module, algorithms=["toy"], overrides={"note": [1, 2.5], "updates": 4}))
    assert runs == {
        f"offline/toy/test/one-v0/note-{value}/seed-0": [
            "--config_path=configs/offline/toy/test/one-v0.yaml", f"--note={value}", "--updates=4",
            f"--variant=note-{value}"] for value in ("1", "2.5")}
    lines = ["tot", {"toy": {"variant": "fast", "pause": [0, 1], "flag": [True, False]}}]
    runs = dict(expand(root, module, algorithms=lines, datasets=["*"]))
    names = [f"fast-pause-{pause}-flag-{flag}" for pause in ("0.0", "1.0") for flag in ("true", "false")]
    wanted = {f"offline/toy/test/{dataset}-v0/{name}/seed-0" for dataset in ("one", "two") for name in names}
    assert runs.keys() == wanted | {"offline/tot/test/one-v0/default/seed-0"}
    for folder, words in runs.items():
        if "/two-v0/" in folder:  # it varies the settings of that file
            assert words[0] == "--config_path=configs/offline/toy/test/two-v0-fast.yaml"
            assert f"--variant={folder.split('/')[4]}" in words
    write_config(root, "offline/toy/test/one-v0-updates-5", dataset="test/one-v0", variant="updates-5")
    runs = dict(expand(root, module, algorithms=["toy"], overrides={"updates": [5, 6]}))
    files = [words[0].rpartition("/")[2] for words in runs.values()]
    assert files == ["one-v0-updates-5.yaml", "one-v0.yaml"]  # a value that has become a config


def test_a_sweep_ends_with_its_table(root, benchmark):
    sweep = {"toy": {"note": [1, 3, 0], "updates": 2}}
    matrix = write_matrix(root, algorithms=["tot", sweep], seeds=2)
    status, out, _ = benchmark(matrix)
    assert status == 0
    _, table = out.split("8 of 8 runs are finished, 0 failed\n\n")
    rows = [re.split(r"\s{2,}", line) for line in table.splitlines()[:4]]
    assert rows == [
        ["algorithm", "dataset", "variant", "seeds", "updates", "score"],
        ["offline/toy", "test/one-v0", "note-1", "2", "2", "10.5 ± 0.7"],
        ["offline/toy", "test/one-v0", "note-3", "2", "2", "30.5 ± 0.7"],
        ["offline/toy", "test/one-v0", "note-0", "2", "2", "100.5 ± 0.7 (return)"],
    ]
    assert "chosen with\nthe simulator" in table
    assert benchmark(matrix)[1] == f"all 8 runs are finished\n\n{table}"
    assert "variant" not in benchmark(write_matrix(root, algorithms=["tot"], seeds=2))[1]


def test_a_later_line_replaces_the_same_runs(root, module):
    lines = ["*", {"tot": {"updates": 1e6}}, {"toy": {"variant": "x", "flag": False}}]
    runs = dict(expand(root, module, algorithms=lines, overrides={"updates": 9, "pause": 1}))
    assert len(runs) == 3
    assert runs["offline/tot/test/one-v0/default/seed-0"][1:] == ["--updates=1000000", "--pause=1.0"]
    assert runs["offline/toy/test/one-v0/default/seed-0"][1:] == ["--updates=9", "--pause=1.0"]
    assert "--flag=false" in runs["offline/toy/test/one-v0/x/seed-0"]


MALFORMED = {
    "cannot be read": (None, "No such file"),
    "YAML": ("algorithms: [toy\nseeds: 3", "line 2"),
    "no mapping": ("- toy", "no list of `field: value`"),
    "empty": ("", "algorithms: None is not a list of names"),
    "unknown field": ({"seed": 3}, "unknown field seed", "did you mean seeds?"),
    "no algorithms": ({"algorithms": []}, "algorithms: [] is not a list of names"),
    "algorithms in one word": ({"algorithms": "toy"}, "algorithms: 'toy' is not a list of names"),
    "fields that are none": ({"algorithms": [{"toy": 3}]}, "algorithms: [{'toy': 3}] is not"),
    "no name": ({"algorithms": [3]}, "algorithms: [3] is not"),
    "a list in a list": ({"algorithms": [["toy"]]}, "algorithms: [['toy']] is not"),
    "no datasets": ({"datasets": []}, "datasets: [] is not a list of ids"),
    "dataset of a number": ({"datasets": [1]}, "datasets: [1] is not"),
    "no seeds": ({"seeds": 0}, "seeds: 0 is not a count, or a list of whole numbers"),
    "empty seeds": ({"seeds": []}, "seeds: [] is not"),
    "seeds below zero": ({"seeds": [0, -1]}, "seeds: [0, -1] is not"),
    "half a seed": ({"seeds": [0.5]}, "seeds: [0.5] is not"),
    "true seeds": ({"seeds": [True]}, "seeds: [True] is not"),
    "seeds in words": ({"seeds": "three"}, "seeds: 'three' is not"),
    "overrides": ({"overrides": ["updates"]}, "overrides: ['updates'] is not `field: value` pairs"),
    "algorithm": ({"algorithms": ["tox"]}, "algorithms: there is no offline/tox: did you mean offline/to"),
    "collector": ({"algorithms": ["collect/toy"]}, "there is no collect/toy"),
    "script without configs": ({"algorithms": ["bare"]}, "there is no offline/bare"),
    "dataset": ({"datasets": ["test/one-v1"]}, "no config for test/one-v1: did you mean test/one-v0?"),
    "pattern": ({"datasets": ["real/*"]}, "no config for real/*"),
    "combination": ({"algorithms": ["tot"], "datasets": ["test/two-v0"]},
                    "offline/tot: there is no configs/offline/tot/test/two-v0.yaml"),
    "variant": ({"algorithms": [{"toy": {"variant": "fast"}}]},
                "offline/toy: there is no configs/offline/toy/test/one-v0-fast.yaml"),
    "variant of none": ({"algorithms": [{"toy": {"variant": "slow"}}], "datasets": ["*"]},
                        "offline/toy: none of the datasets has a config of variant slow"),
    "field": ({"overrides": {"update": 3}}, "offline/toy: unknown field update: did you mean updates?"),
    "field of one": ({"algorithms": ["tot", {"toy": {"nose": 3}}]}, "offline/toy: unknown field nose: did"),
    "seed as a field": ({"overrides": {"seed": 3}}, "seed is no field for a matrix"),
    "output as a field": ({"overrides": {"output_dir": "x"}}, "output_dir is no field for a matrix"),
    "words for an int": ({"overrides": {"updates": "many"}}, "updates: 'many' is no int"),
    "half an int": ({"overrides": {"updates": 2.5}}, "updates: 2.5 is no int"),
    "infinity for an int": ({"overrides": {"updates": math.inf}}, "updates: inf is no int"),
    "true for an int": ({"overrides": {"updates": True}}, "updates: True is no int"),
    "a number for a switch": ({"overrides": {"flag": 1}}, "flag: 1 is no bool"),
    "a number for text": ({"overrides": {"wandb_mode": 1}}, "wandb_mode: 1 is no str"),
    "a list in a sweep": ({"overrides": {"note": [1, [2]]}}, "note: [2] is no"),
    "a sweep of nothing": ({"overrides": {"note": []}}, "note: a sweep needs one value or more"),
    "a sweep of names": ({"overrides": {"variant": ["a", "b"]}}, "variant: ", "names its variants itself"),
    "a word in a sweep": ({"algorithms": [{"toy": {"pause": [1, "x"]}}]}, "toy: pause: 'x' is no float"),
    "settings without a name": ({"overrides": {"flag": False, "note": 1}}, "flag, note: ", "variant: ..."),
    "default is no name": ({"overrides": {"flag": False, "variant": "default"}}, "flag: ", "variant: ..."),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_matrix_is_one_line(root, benchmark, case):
    content, *words = MALFORMED[case]
    if isinstance(content, dict):
        write_matrix(root, **{"algorithms": ["toy"], **content})
    elif content is not None:
        (root / "matrix.yaml").write_text(content)
    assert_refused(benchmark("matrix.yaml"), "matrix.yaml: ", *words)
    assert not (root / "results/runs").exists()


def test_a_broken_config_is_one_line(root, benchmark):
    (root / "configs/offline/toy/test/one-v0.yaml").write_text("dataset: [")
    assert_refused(benchmark(write_matrix(root, algorithms=["toy"])), "configs/offline/toy/test/one-v0.yaml")


def test_datasets_that_are_not_here(root, benchmark):
    for dataset in ("reef/maze-v0", "mujoco/ant/far-v2"):
        write_config(root, f"offline/toy/{dataset}", dataset=dataset)
    matrix = write_matrix(root, algorithms=["toy"], datasets=["*"])
    commands = "minari download mujoco/ant/far-v2; make dataset ID=reef/maze-v0\n"
    assert_refused(benchmark(matrix), "2 datasets are not on this machine", commands)
    assert not (root / "results/runs").exists()
    assert benchmark(matrix, "--list")[0] == 0  # plans may be made before
    for dataset in ("reef/maze-v0", "mujoco/ant/far-v2"):
        (root / f"minari/{dataset}/data").mkdir(parents=True)
    assert benchmark(matrix)[0] == 0
    shutil.rmtree(root / "minari/reef")
    (place(root) / "run.json").unlink()
    assert benchmark(matrix)[0] == 0  # what is finished needs none
    assert len(launches(place(root))) == 2


# ----------------------------------------------- What is run -----------------------------------------------


def test_what_is_finished_is_skipped(root, benchmark):
    assert benchmark(write_matrix(root, algorithms=["toy"], seeds=2))[0] == 0
    logs = [(place(root, seed=seed) / "log.txt").read_text() for seed in (0, 1)]
    status, out, _ = benchmark(write_matrix(root, algorithms=["toy"], seeds=3, overrides={"pause": 0.01}))
    assert status == 0  # pause changes nothing in what comes out
    assert out.endswith("3 of 3 runs are finished, 0 failed\n")
    assert [(place(root, seed=seed) / "log.txt").read_text() for seed in (0, 1)] == logs
    assert benchmark("matrix.yaml") == (0, "all 3 runs are finished\n", "")
    assert len(launches(place(root, seed=2))) == 1


def test_other_settings_are_left_to_the_script(root, benchmark):
    """It says what differs, and its refusal is shown."""
    matrix, folder = write_matrix(root, algorithms=["toy"]), place(root)
    assert benchmark(matrix)[0] == 0
    finished = record(folder)
    for count, changed in enumerate(({"updates": 5}, {"eval_every": 3}), start=2):
        write_config(root, "offline/toy/test/one-v0", dataset="test/one-v0", **changed)
        status, out, _ = benchmark(matrix)
        assert status == 1
        assert "FAILED, exit status 2" in out
        assert f"    a run of another config: {next(iter(changed))}\n" in out
        assert len(launches(folder)) == count
    assert record(folder) == finished
    write_config(root, "offline/toy/test/one-v0", dataset="test/one-v0")
    assert benchmark(matrix) == (0, "all 1 runs are finished\n", "")
    script = root / "algorithms/offline/toy.py"
    script.write_text(TOY.replace("flag: bool = True", "flag: bool = False"))  # a default counts as well
    shutil.copy(root / "tools/benchmark.py", root / "tools/again.py")
    command = [sys.executable, "tools/again.py", matrix]
    done = subprocess.run(command, cwd=root, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "    a run of another config: flag\n" in done.stdout


def test_a_finished_longer_run_is_finished(root, benchmark):
    """And leaves no work, less than none in particular."""
    assert benchmark(write_matrix(root, algorithms=["toy"], overrides={"updates": 9}))[0] == 0
    matrix = write_matrix(root, algorithms=["toy"], seeds=2, overrides={"updates": 4})
    _, out, _ = benchmark(matrix, "--list")
    assert out.startswith(f"missing {os.path.relpath(place(root, seed=1))}\n")
    assert re.split(r"\s{2,}", out.splitlines()[-1])[:4] == ["all", "2", "1", "4"]
    rewritten = record(place(root)) | {"config": record(place(root))["config"] | {"eval_every": 7}}
    (place(root) / "run.json").write_text(json.dumps(rewritten))  # another run, which did more
    _, out, _ = benchmark(matrix, "--list")
    assert re.split(r"\s{2,}", out.splitlines()[-1])[:4] == ["all", "2", "2", "4"]


@pytest.mark.parametrize("content", ["{", "", "[]", '{"status": "finished"}'])
def test_a_damaged_record_is_left_to_the_script(root, benchmark, content):
    matrix, folder = write_matrix(root, algorithms=["toy"]), place(root)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(content)
    status, out, _ = benchmark(matrix, "--list")
    assert status == 0
    assert out.startswith(f"missing {os.path.relpath(folder)}\n")
    status, out, _ = benchmark(matrix)
    assert status == 1
    assert "FAILED, exit status " in out
    assert len(launches(folder)) == 1


def test_what_was_cut_off_goes_on(root, benchmark):
    folder, matrix = place(root), write_matrix(root, algorithms=["toy"], overrides={"updates": 8})
    benchmark(matrix)
    finished = record(folder)
    for status in ("running", "failed", "diverged"):
        (folder / "run.json").write_text(json.dumps(finished | {"status": status}))
        (folder / "checkpoint").write_text("6")
        assert benchmark(matrix)[0] == 0
        assert (folder / "log.txt").read_text().endswith("begins at 6\n")
        assert record(folder)["status"] == "finished"


def test_a_failure_is_shown_and_stops_nothing(root, benchmark):
    write_config(root, "offline/tot/test/one-v0", dataset="test/one-v0", fails=3)
    matrix = write_matrix(root, algorithms=["toy", "tot"], seeds=2)
    for count in (1, 2):
        status, out, err = benchmark(matrix)
        assert status == 1
        assert {record(place(root, seed=seed))["status"] for seed in (0, 1)} == {"finished"}
        for seed in (0, 1):
            shown = f"results/runs/offline/tot/test/one-v0/default/seed-{seed}/log.txt"
            ending = ["so many words", "of an error", "in lines", "that end in", "one two three"]
            lines = "\n    ".join([f"FAILED, exit status 3: {shown} ends in", *ending])
            assert lines in out
            assert (root / shown).is_file()
            assert len(launches(place(root, seed=seed))) == 1
            assert len(launches(place(root, "tot", seed=seed))) == count
            (place(root, "tot", seed=seed) / "checkpoint").unlink()
        assert out.endswith("2 of 4 runs are finished, 2 failed\n")
        assert "2/4 done" in err


def test_a_killed_run_is_a_failure(root, benchmark):
    (root / "algorithms/offline/toy.py").write_text(TOY.replace("    main()", "    os.kill(os.getpid(), 9)"))
    place(root).mkdir(parents=True)
    (place(root) / "log.txt").write_text("earlier\n")
    status, out, _ = benchmark(write_matrix(root, algorithms=["toy"]))
    assert status == 1
    assert "FAILED, exit status -9" in out
    assert "    $ " in out
    assert "earlier" not in out  # that was another attempt's


def times(root: Path, seeds: int) -> list[tuple[float, float]]:
    """(begin, end) of the runs of toy."""
    runs = [place(root, seed=seed) for seed in range(seeds)]
    return sorted((launches(folder)[-1]["begin"], record(folder)["end"]) for folder in runs)


def test_one_process_a_core_and_one_core_a_process(root, benchmark, module):
    cores = module.list_cores()
    assert cores == sorted(os.sched_getaffinity(0))
    matrix = write_matrix(root, algorithms=["toy"], seeds=2 * len(cores), overrides={"pause": 0.4})
    assert benchmark(matrix)[0] == 0
    used = [record(place(root, seed=seed))["cores"] for seed in range(2 * len(cores))]
    assert sorted({core for several in used for core in several}) == cores
    assert all(len(several) == 1 for several in used)
    assert sorted(os.sched_getaffinity(0)) == cores  # our own stay
    spans = times(root, 2 * len(cores))
    at_once = max(sum(b <= begin < e for b, e in spans) for begin, _ in spans)
    assert at_once == len(cores)


def test_two_benchmarks_do_not_pin_to_the_same_core(root, benchmark, module):
    """What another one has taken is left alone; where none is left, a run may use all."""
    cores, taken = module.list_cores(), module.take_core()
    assert taken[0] == cores[0]
    overrides = {"pause": 0.2, "updates": 2}
    matrix = write_matrix(root, algorithms=["toy"], seeds=len(cores), overrides=overrides)
    assert benchmark(matrix)[0] == 0
    used = sorted(record(place(root, seed=seed))["cores"] for seed in range(len(cores)))
    assert used == sorted([*([core] for core in cores[1:]), cores])
    taken[1].release()
    again = module.take_core()
    assert again[0] == cores[0]  # all are free again
    again[1].release()


def test_processes_at_once(root, benchmark):
    matrix = write_matrix(root, algorithms=["toy"], seeds=3, overrides={"pause": 0.05})
    assert benchmark(matrix, "--processes", "1")[0] == 0
    spans = times(root, 3)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    shutil.rmtree(root / "results/runs")
    matrix = write_matrix(root, algorithms=["toy"], seeds=3, overrides={"pause": 1.0, "updates": 6})
    assert benchmark(matrix, "--processes", "3")[0] == 0
    spans = times(root, 3)
    assert max(begin for begin, _ in spans) < min(end for _, end in spans)


@pytest.mark.parametrize(
    ("visible", "listed", "wanted"),
    [
        ("4,5", "", ["4", "5"]),
        ("GPU-ab1, GPU-cd2", "", ["GPU-ab1", "GPU-cd2"]),
        ("", "GPU 0: X (UUID: GPU-1)", []),
        (None, "GPU 0: X (UUID: GPU-1)\n  MIG 1g.5gb Device 0: (M)\nGPU 1: X (UUID: GPU-2)", ["0", "1"]),
        (None, "", []),
        (None, None, []),
    ],
)
def test_gpus_are_found(root, module, monkeypatch, visible, listed, wanted):
    if listed is not None:
        (root / "nvidia-smi").write_text(f"#!/bin/sh\n[ $1 = --list-gpus ] && echo '{listed}'\n")
        (root / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{root}:/usr/bin:/bin" if listed is not None else str(root / "empty"))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert module.list_gpus() == wanted


@pytest.mark.parametrize("visible", ["4,5", ""])
def test_gpus_are_shared(root, benchmark, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    matrix = write_matrix(root, algorithms=["toy"], seeds=2, overrides={"pause": 0.2})
    assert benchmark(matrix, "--processes", "2")[0] == 0
    seen = {launches(place(root, seed=seed))[0]["CUDA_VISIBLE_DEVICES"] for seed in (0, 1)}
    assert seen == {*visible.split(",")}


# ---------------------------------------------- Interruptions ----------------------------------------------


def alive(root: Path) -> list[psutil.Process]:
    """Processes of scripts that were started in `root`."""
    return [process for process in psutil.process_iter(["cmdline"])
            if any(word.startswith(f"--output_dir={root}") for word in process.info["cmdline"] or [])]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(root, benchmark, number):
    matrix = write_matrix(root, algorithms=["toy"], seeds=6, overrides={"pause": 0.1, "updates": 30})
    process = begin(root, matrix, "--processes", "2")
    wait_for(lambda: len(list(root.rglob("checkpoint"))) == 2)
    process.send_signal(number)
    assert process.wait(60) == 130
    assert alive(root) == []
    output = (root / "output").read_text()
    assert output.endswith("\nbenchmark.py: interrupted; the same command goes on from what is saved\n")
    assert "Traceback" not in output
    assert "FAILED" not in output
    logs = [log.read_text() for log in root.rglob("log.txt")]
    assert len(logs) == 2
    assert all(log.endswith("interrupted\n") for log in logs)  # they had time to end
    begun = {file.parent: int(file.read_text()) for file in root.rglob("checkpoint")}
    assert 0 < min(begun.values()) <= max(begun.values()) < 30
    write_matrix(root, algorithms=["toy"], seeds=6, overrides={"updates": 30})
    assert benchmark(matrix)[0] == 0
    assert len(folders(root)) == 6
    for folder, count in begun.items():
        assert (folder / "log.txt").read_text().endswith(f"begins at {count}\n")


def test_runs_die_with_a_killed_benchmark(root, benchmark):
    """Else the second call would find their folders locked."""
    if sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent died")
    matrix = write_matrix(root, algorithms=["toy"], seeds=2, overrides={"pause": 1000})
    process = begin(root, matrix, "--processes", "2")
    wait_for(lambda: len(folders(root)) == 2)
    process.kill()
    process.wait()
    wait_for(lambda: not alive(root), 20)
    write_matrix(root, algorithms=["toy"], seeds=2)
    assert benchmark(matrix)[0] == 0


def test_what_does_not_end_is_killed(module, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.5)
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    quick = "import signal, time; signal.signal(2, signal.SIG_DFL); print(flush=True); time.sleep(600)"
    codes = [deaf, quick, "print()"]
    children = [psutil.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for code in codes]
    for child in children:
        child.stdout.readline()
    children[2].wait()
    module.stop(children)
    assert [child.wait(30) for child in children] == [-signal.SIGKILL, -signal.SIGINT, 0]


def test_runs_hear_ctrl_c_though_a_shell_ignores_it(root):
    """As it does for what it starts in the background."""
    write_matrix(root, algorithms=["toy"], overrides={"pause": 0.1, "updates": 500})
    command = f"trap '' INT; exec {sys.executable} tools/benchmark.py matrix.yaml 2> output"
    process = subprocess.Popen(["sh", "-c", command], cwd=root)
    wait_for((place(root) / "checkpoint").exists)
    process.terminate()
    assert process.wait(60) == 130
    assert (place(root) / "log.txt").read_text().endswith("interrupted\n")


def test_a_moved_run_waits_for_the_lock_of_the_dead_one(root, module, monkeypatch):
    matrix = write_matrix(root, algorithms=["toy"], overrides={"updates": 1})
    (run,) = module.expand(module.read_matrix(Path(matrix)), root / "results/runs")
    assert module.execute(run, {}) == 0
    lock = filelock.FileLock(run.folder / "lock", thread_local=False).acquire().lock
    threading.Timer(1, lock.release).start()
    began = time.time()
    assert module.execute(run, {}) == 0
    assert launches(run.folder)[1]["begin"] > began + 0.9
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    with lock:
        assert module.execute(run, {}) == 0  # the script will say what it thinks of that
    assert len(launches(run.folder)) == 3


def test_a_second_benchmark_is_refused(root, benchmark):
    matrix = write_matrix(root, algorithms=["toy"], seeds=1, overrides={"pause": 0.2, "updates": 30})
    process = begin(root, matrix)
    wait_for(lambda: folders(root))
    began = time.monotonic()
    result = benchmark(matrix)
    assert time.monotonic() - began < 10  # it does not wait
    assert_refused(result, "another benchmark is at work in", str(root / "results/runs"), "--output_dir")
    assert process.poll() is None
    assert benchmark(matrix, "--list")[0] == 0
    elsewhere = write_matrix(root, algorithms=["toy"])
    assert benchmark(elsewhere, "--output_dir", "elsewhere")[0] == 0
    assert (root / "elsewhere/offline/toy/test/one-v0/default/seed-0/run.json").exists()
    assert process.wait(120) == 0
    assert len(launches(place(root))) == 1


def test_no_disk_at_the_start(root, benchmark, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 199_000_000))
    result = benchmark(write_matrix(root, algorithms=["toy"]))
    assert_refused(result, "199 MB are free in", str(root / "results/runs"), "200 have to be", "make room")
    assert folders(root) == set()


def test_a_disk_that_fills_up(root, benchmark, module, monkeypatch):
    usage = lambda _: shutil._ntuple_diskusage(0, 0, 0 if list(root.rglob("checkpoint")) else 10**12)  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", usage)
        matrix = write_matrix(root, algorithms=["toy"], seeds=4, overrides={"pause": 0.2, "updates": 30})
        status, _, err = benchmark(matrix, "--processes", "1")
    assert status == 2
    assert err.splitlines()[-1].startswith("benchmark.py: 0 MB are free in ")
    assert err.count("MB are free") == 1
    assert alive(root) == []
    core, lock = module.take_core()
    assert core == module.list_cores()[0]  # what was running has given its core back
    lock.release()
    assert len(folders(root)) == 1
    count = int((place(root) / "checkpoint").read_text())
    write_matrix(root, algorithms=["toy"], seeds=4, overrides={"updates": 30})
    assert benchmark(matrix)[0] == 0
    assert (place(root) / "log.txt").read_text().endswith(f"begins at {count}\n")


def test_a_folder_that_cannot_be_written(root, benchmark):
    (root / "file").touch()
    result = benchmark(write_matrix(root, algorithms=["toy"]), "--output_dir", "file/runs")
    assert_refused(result, str(root / "file"))


# ---------------------------------------------- What it costs ----------------------------------------------


def write_scores(root: Path, *rows: tuple) -> None:
    """Rows of (family, algorithm, dataset, update, phase, wall_seconds, device)."""
    file = root / "results/scores/some.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="") as stream:
        columns = ["family", "algorithm", "dataset", "update", "phase", "wall_seconds", "device"]
        csv.writer(stream).writerows([columns, *rows])


@pytest.fixture
def scores(root) -> None:
    """By results/scores an update takes offline/toy 7.2 seconds on one, and 36 over all datasets."""
    one = [(100, 360), (100, 720), (200, 7200)]
    rows = [("offline", "toy", "test/one-v0", updates, "final", seconds) for updates, seconds in one]
    rows += [("offline", "toy", "test/three-v0", updates, "final", 36 * updates) for updates in (1, 100)]
    rows += [("offline", "toy", "test/one-v0", 10, "training", 10**9)] * 9
    rows = [(*row, "cpu: some") for row in [*rows, ("finetune", "tot", "test/one-v0", 1, "final", 1)]]
    write_scores(root, *rows, *[("offline", "toy", "test/one-v0", 100, "final", 1, "cuda: some")] * 9)


def test_list_says_what_would_run_and_its_cost(root, benchmark, scores):
    fields = {"algorithms": ["toy", "tot"], "datasets": ["test/*"], "overrides": {"updates": 1800}}
    started = place(root, seed=1)
    started.mkdir(parents=True)
    (started / "run.json").write_text(json.dumps({"status": "running", "config": {}}))
    status, out, err = benchmark(write_matrix(root, seeds=2, **fields), "--list")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    runs = [("toy", "one"), ("toy", "two"), ("tot", "one")]
    wanted = {f"missing results/runs/offline/{name}/test/{dataset}-v0/default/seed-{seed}"
              for name, dataset in runs for seed in (0, 1)}
    assert {*lines[:6]} ^ wanted == {f"{word} {os.path.relpath(started)}" for word in ("missing", "started")}
    table = [re.split(r"\s{2,}", line) for line in lines[6:]]
    assert table == [
        ["algorithm", "runs", "to do", "updates", "core-hours"],
        ["offline/tot", "2", "2", "3,600", "?", "without offline/tot: never measured"],
        ["offline/toy", "4", "4", "7,200", "43.2", "by results/scores"],  # 2 x 1800 (7.2 + 36) / 3600
        ["all", "6", "6", "10,800", "43.2", "by results/scores; without offline/tot: never measured"],
    ]
    assert folders(root) == {"offline/toy/test/one-v0/default/seed-1"}
    assert not (root / "results/runs/benchmark.lock").exists()


def test_costs_come_from_this_machine_where_they_can(root, benchmark, scores):
    fields = {"algorithms": ["toy"], "datasets": ["test/*"], "seeds": 3, "overrides": {"updates": 1800}}
    finished, started = place(root, seed=0), place(root, seed=1)
    for folder in (finished, started):
        folder.mkdir(parents=True)
    config = {"dataset": "test/one-v0", "seed": 0, "variant": "default", "updates": 1800}
    config |= {"eval_every": 5000, "fails": 0, "flag": True, "note": None}
    info = {"status": "finished", "config": config, "wall_seconds": 3600}
    (finished / "run.json").write_text(json.dumps(info))
    (started / "run.json").write_text(json.dumps(info | {"status": "running"}))
    (started / "metrics.csv").write_text("update,time/wall_seconds,last\n100,1,2\n900,3600,2\n")
    _, out, _ = benchmark(write_matrix(root, **fields), "--list")
    # 2 and 4 seconds per update, so 3: half a run and a whole one on one, three on two
    row = re.split(r"\s{2,}", out.splitlines()[-2])
    assert row == ["offline/toy", "6", "5", "8,100", "6.8", "measured here"]
    assert f"missing {os.path.relpath(finished)}" not in out
    assert f"started {os.path.relpath(started)}" in out


def show(module, root: Path, running: int, count: int, **fields) -> str:
    """What the display says of `running` runs and the others waiting, once it looked."""
    matrix = {"algorithms": ["toy"], "seeds": count, "overrides": {"updates": 100}, **fields}
    runs = module.expand(module.read_matrix(Path(write_matrix(root, **matrix))), root / "results/runs")
    for run in runs[:2]:  # printed in an earlier attempt
        run.folder.mkdir(parents=True)
        (run.folder / "log.txt").write_text("earlier")
    display = module.Display(count, runs, module.Costs({run: {} for run in runs}))
    for run in runs[:running]:
        (run.folder / "log.txt").write_text("earlier and now")
    if running:
        (runs[0].folder / "metrics.csv").write_text("update,time/wall_seconds\n50,100\n")
    display.refresh()
    text = display.bar.desc
    display.bar.close()
    return text


def test_time_left(root, module):
    """2 seconds per update, 50 + 300 updates, two at once."""
    assert show(module, root, 2, 4) == "running 2, failed 0, left 05:50 (measured here)"


def test_time_left_by_scores(root, module, scores):
    assert show(module, root, 0, 4) == "running 0, failed 0, left 48:00 (by results/scores)"


def test_time_left_unknown(root, module):
    assert show(module, root, 0, 4) == "running 0, failed 0, left ? (without offline/toy: never measured)"


def test_the_display_counts(root, benchmark):
    write_config(root, "offline/tot/test/one-v0", dataset="test/one-v0", fails=3)
    write_config(root, "offline/toy/test/one-v0", dataset="test/one-v0")
    assert benchmark(write_matrix(root, algorithms=["toy"]))[0] == 0
    _, _, err = benchmark(write_matrix(root, algorithms=["toy", "tot"], seeds=2))
    last = re.split("[\r\n]+", err.strip())[-1]
    assert last.startswith("2/4 done |")
    assert last.endswith("| running 0, failed 2, left 00:00")
    assert "1/4 done" in err  # it begins with what was finished before
    assert "0/4 done" not in err


def test_long_runs_come_first(root, benchmark, scores):
    """And of what is unknown nobody knows that it is short."""
    fields = {"algorithms": ["toy", "tot"], "datasets": ["test/*"], "overrides": {"updates": 2}}
    assert benchmark(write_matrix(root, **fields), "--processes", "1")[0] == 0
    runs = [place(root), place(root, dataset="test/two-v0"), place(root, "tot")]
    assert sorted(runs, key=lambda folder: launches(folder)[0]["begin"]) == [runs[2], runs[1], runs[0]]


def test_records_of_real_scripts_are_understood(root, benchmark, scripts):
    """86 finished ones and 10 that were cut off, made by hand; 4 are missing."""
    for name in ("bc", "td3_bc"):
        shutil.copy(ROOT / f"algorithms/offline/{name}.py", root / "algorithms/offline")
        for number in range(5):
            dataset = f"many/set-v{number}"
            write_config(root, f"offline/{name}/{dataset}", dataset=dataset, eval_episodes=100)
            for seed in range(8 if number == 4 else 10):
                folder = place(root, name, dataset, seed)
                config = scripts[name].Config(dataset=dataset, seed=seed, eval_episodes=100)
                info = {"config": dataclasses.asdict(config), "wall_seconds": 100.0}
                info |= {"status": "running" if number == seed else "finished"}
                folder.mkdir(parents=True)
                (folder / "run.json").write_text(json.dumps(info, indent=1))
    matrix = write_matrix(root, algorithms=["bc", "td3_bc"], datasets=["many/*"], seeds=10)
    status, out, _ = benchmark(matrix, "--list")
    assert status == 0
    assert out.count("missing ") == 4
    assert out.count("started ") == 10


# --------------------------------------------- The real scripts --------------------------------------------


@pytest.fixture
def real(root, minari_root, monkeypatch):
    """The same repository with BC and TD3+BC instead of toys, on a pendulum, for a moment."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(minari_root))
    write_real(root, updates=600, eval_every=300, checkpoint_every=50, log_every=50)
    return root


def write_real(root: Path, **fields) -> None:
    """A repository with BC and TD3+BC, and configs for the pendulum of conftest.py."""
    copy_benchmark(root)
    (root / "algorithms/offline").mkdir(parents=True, exist_ok=True)
    arguments = short("test/pendulum/random-v0", root, **fields)
    values = dict(word.removeprefix("--").split("=", 1) for word in arguments)
    values = {name: value for name, value in values.items() if name not in ("output_dir", "threads")}
    for name in ("bc", "td3_bc"):
        shutil.copy(ROOT / f"algorithms/offline/{name}.py", root / "algorithms/offline")
        write_config(root, f"offline/{name}/test/pendulum/random-v0", **values)


def test_interrupted_runs_end_in_the_same_bits(real, pendulum, call, benchmark):
    matrix = write_matrix(real, algorithms=["bc", "td3_bc"], datasets=[pendulum])
    process = begin(real, matrix, "--processes", "2")
    wait_for(lambda: len(list(real.rglob("checkpoint.pt"))) == 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert alive(real) == []
    cut = [name for name in ("bc", "td3_bc") if record(place(real, name, pendulum))["status"] == "running"]
    assert cut
    assert "lock" not in (real / "output").read_text()
    status, _, err = benchmark(matrix)
    assert status == 0, err
    for name in ("bc", "td3_bc"):
        folder = place(real, name, pendulum)
        assert ("resumed at update" in (folder / "log.txt").read_text()) == (name in cut)
        file = real / f"configs/offline/{name}/{pendulum}.yaml"
        assert call(name, f"--config_path={file}", f"--output_dir={real}/alone", "--threads=1")[0] == 0
        assert_same_run(folder, real / "alone" / folder.relative_to(real / "results/runs"))
    info = record(place(real, "bc", pendulum))
    assert info["threads"] == 1


def test_a_config_that_a_script_refuses(real, pendulum, benchmark):
    write_config(real, f"offline/bc/{pendulum}", dataset=pendulum, fraction=3)
    status, out, _ = benchmark(write_matrix(real, algorithms=["bc"], datasets=[pendulum]))
    assert status == 1
    assert "FAILED, exit status 2" in out
    assert "bc.py: fraction: 3 is not float in [0, 1]" in out


def test_scripts_are_read_as_they_are(module, scripts):
    """Their fields, defaults and free fields, without importing torch."""
    for name, script in scripts.items():
        defaults, free = module.read_script(ROOT / f"algorithms/offline/{name}.py")
        assert defaults == dataclasses.asdict(script.Config())
        assert free == {*script.Run.FREE}
    assert FREE | {"updates"} == module.UNNAMED | {"seed"}
    command = [sys.executable, "-X", "importtime", "tools/benchmark.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not {"torch", "ray", "wandb", "pandas"} & imported


# ------------------------------------------- Sweeps, our matrices ------------------------------------------


def test_a_sweep_is_the_same_runs(root, benchmark, monkeypatch):
    """As `wandb agent` expands and starts them."""
    from wandb.wandb_agent import Agent

    lines = ["toy", {"tot": {"variant": "a b", "note": 2}}]
    matrix = write_matrix(root, algorithms=lines, seeds=[4, 6], overrides={"updates": 2})
    status, out, err = benchmark(matrix, "--sweep", "sweep.yaml")
    assert (status, err) == (0, "")
    assert "wandb sweep sweep.yaml" in out
    assert not (root / "results/runs").exists()
    assert not list(root.glob("*.new"))
    sweep = yaml.safe_load((root / "sweep.yaml").read_text())
    assert (sweep["method"], sweep["name"]) == ("grid", "matrix")
    columns = [entry["values"] for entry in sweep["parameters"].values()]
    for variable in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_SWEEP_ID"):
        monkeypatch.setenv(variable, "x")
    agent = object.__new__(Agent)
    vars(agent).update(_sweep_command=sweep["command"], _run_processes={}, _in_jupyter=False)
    vars(agent).update(_function=None, _forward_signals=False)
    for number, values in enumerate(itertools.product(*columns)):
        arguments = {name: {"value": value} for name, value in zip(sweep["parameters"], values)}
        agent._command_run({"run_id": f"r{number}", "program": sweep["program"], "args": arguments})
        assert agent._run_processes[f"r{number}"].wait() == 0
    swept = {folder: record(root / "results/runs" / folder)["config"] for folder in folders(root)}
    assert {config["wandb_mode"] for config in swept.values()} == {"online"}  # or nobody would see it
    shutil.rmtree(root / "results/runs")
    assert benchmark(matrix)[0] == 0
    ours = {folder: record(root / "results/runs" / folder)["config"] for folder in folders(root)}
    assert swept == {folder: config | {"wandb_mode": "online"} for folder, config in ours.items()}
    assert len(ours) == 4
    matrix = write_matrix(root, algorithms=["toy"], overrides={"wandb_mode": "disabled"})
    assert benchmark(matrix, "--sweep", "sweep.yaml")[0] == 0
    assert "--wandb_mode=disabled" in (root / "sweep.yaml").read_text()


def runs_of(name: str) -> list:
    return program.expand(program.read_matrix(ROOT / f"configs/benchmark/{name}.yaml"), Path("/nowhere"))


def test_the_quick_matrix_ends_within_two_hours_on_two_cores():
    runs = runs_of("quick")
    algorithms, datasets, seeds = zip(*[(*run.kind, run.seed) for run in runs])
    assert len(runs) == len({*algorithms}) * len({*datasets}) * len({*seeds})
    assert len({*seeds}) >= 3
    speeds = {"bc": 650, "td3_bc": 227, "iql": 140, "awac": 114}  # README, one thread
    seconds = sum(run.config["updates"] / speeds[run.script.stem] + 60 for run in runs)  # and evaluations
    assert seconds < 2 * 7200 * 0.95
    for run in runs:
        assert (ROOT / f"configs/collect/{run.config['dataset'].removeprefix('reef/')}.yaml").exists()
        assert run.fields.keys() <= {"updates", "threads", "output_dir", "wandb_mode"}  # the configs' own


def test_the_full_matrix_is_everything():
    runs = runs_of("full")
    files = {*ROOT.glob("configs/offline/*/**/*.yaml")}
    default = {file for file in files if re.fullmatch(r".*-v\d+", file.stem)}
    assert {run.file for run in runs} == default
    assert {*(ROOT / "algorithms/offline").glob("*.py")} == {run.script for run in runs}
    assert len(runs) == 5 * len(default)
    assert {run.config["updates"] for run in runs if run.script.stem != "dt"} == {1_000_000}
    assert {run.config["updates"] for run in runs if run.script.stem == "dt"} == {100_000}
