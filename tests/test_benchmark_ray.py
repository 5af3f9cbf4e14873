"""tools/benchmark.py on Ray: one of two nodes is killed in the middle, and the results keep their bits."""

import argparse
import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from benchmark import UserError, connect
from conftest import load_script
from ray.cluster_utils import Cluster
from test_benchmark import (
    TOY,
    alive,
    assert_same_run,
    begin,
    launches,
    place,
    record,
    wait_for,
    write_config,
    write_matrix,
    write_real,
    write_toys,
)

SEEDS = 3  # a run for each core of both nodes
LENGTH = {"updates": 1000, "eval_every": 500, "checkpoint_every": 50, "log_every": 50}
SETTINGS = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000}  # a dead node is soon seen
FAR = 900  # seconds: what takes longer has failed, on a busy machine too


@pytest.fixture(scope="module")
def scripts() -> dict:
    """The one that is trained here: to load all takes seconds."""
    return {name: load_script(f"offline/{name}.py") for name in ("bc",)}


@pytest.fixture(scope="module")
def cluster(minari_root):
    """One node with two cores."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # runs as eager as we are
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": SETTINGS}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def run(tmp_path, cluster):
    """run(...) is the command line on the cluster, in a process; it ends with the test."""
    started = []

    def run(*arguments: str) -> subprocess.Popen:
        started.append(begin(tmp_path, "matrix.yaml", "--engine", "ray", *arguments))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
    wait_for(lambda: not alive(tmp_path))


def held_run(raylet: psutil.Process, root: Path, dataset: str) -> tuple[psutil.Process, Path] | None:
    """Stops a run of this node that has a checkpoint and is not finished, if there is one; its folder."""
    for process in raylet.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            seeds = [int(word.removeprefix("--seed=")) for word in words if word.startswith("--seed=")]
            if not seeds or words[1] == "-c":
                continue
            folder = place(root, Path(words[1]).stem, dataset, seeds[0])
            if (folder / "checkpoint.pt").exists():
                process.suspend()
                if record(folder)["status"] == "running":
                    return process, folder
                process.resume()
    return None


def test_a_node_dies(cluster, run, call, tmp_path, pendulum):
    write_real(tmp_path, **LENGTH)
    write_matrix(tmp_path, algorithms=["bc"], datasets=[pendulum], seeds=SEEDS)
    doomed = cluster.add_node(num_cpus=1)
    raylet = psutil.Process(doomed.all_processes["raylet"][0].process.pid)
    process = run("--address", cluster.address)
    held, folder = wait_for(lambda: held_run(raylet, tmp_path, pendulum), FAR)
    assert process.poll() is None
    cluster.remove_node(doomed, allow_graceful=False)
    assert process.wait(FAR) == 0
    assert (tmp_path / "output").read_text().endswith("3 of 3 runs are finished, 0 failed\n")
    assert not held.is_running()
    log = (folder / "log.txt").read_text()
    assert log.count("$ ") == 2
    assert "\nresumed at update " in log

    runs = {file.parent for file in (tmp_path / "results/runs").rglob("run.json")}
    assert len(runs) == SEEDS
    assert {record(one)["status"] for one in runs} == {"finished"}
    seed, name = folder.name.removeprefix("seed-"), folder.relative_to(tmp_path / "results/runs").parts[1]
    config = tmp_path / f"configs/offline/{name}/{pendulum}.yaml"
    more = f"--seed={seed}", f"--output_dir={tmp_path}/alone", "--threads=1"
    status, out, err = call(name, f"--config_path={config}", *more)
    assert status == 0, err
    assert "resumed" not in out
    assert_same_run(folder, tmp_path / "alone" / folder.relative_to(tmp_path / "results/runs"))


def test_failures(cluster, run, tmp_path, monkeypatch):
    """One of a script, and one of the worker itself, whichever node it is tried on."""
    write_toys(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    write_config(tmp_path, "offline/tot/test/one-v0", dataset="test/one-v0", fails=3)
    fatal = TOY.replace("    main()", "    main(); os.kill(os.getppid(), 9); time.sleep(60)")
    (tmp_path / "algorithms/finetune/toy.py").write_text(fatal)
    write_matrix(tmp_path, algorithms=["*", "finetune/toy"], datasets=["*"])
    assert run("--address", cluster.address, "--retries", "1").wait(FAR) == 1
    output = (tmp_path / "output").read_text()
    assert output.endswith("2 of 4 runs are finished, 2 failed\n")
    assert "FAILED, exit status 3: results/runs/offline/tot" in output
    assert "\n    one two three\n" in output
    assert "FAILED, given up after 1 retries: " in output
    assert len(launches(tmp_path / "results/runs/finetune/toy/test/two-v0/default/seed-0")) == 2
    (launch,) = launches(place(tmp_path))
    assert launch["CUDA_VISIBLE_DEVICES"] == ""  # without a share of one
    assert launch["OMP_NUM_THREADS"] == "1"


def test_interrupted_on_a_ray_of_its_own(run, tmp_path, monkeypatch):
    write_toys(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    write_matrix(tmp_path, algorithms=["toy"], seeds=4, overrides={"pause": 1000})
    process = run("--processes", "3")
    wait_for(lambda: len(list(tmp_path.rglob("launches"))) == 3, FAR)
    time.sleep(1)
    assert len(list(tmp_path.rglob("launches"))) == 3
    process.send_signal(signal.SIGTERM)  # which Ray wants for itself
    assert process.wait(FAR) == 130
    wait_for(lambda: not alive(tmp_path))
    ending = "\nbenchmark.py: interrupted; the same command goes on from what is saved\n"
    assert (tmp_path / "output").read_text().endswith(ending)
    write_matrix(tmp_path, algorithms=["toy"], seeds=4)
    assert begin(tmp_path, "matrix.yaml").wait(FAR) == 0


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "127.0.0.1:x", "nonsense"])
def test_no_cluster_at_the_address(address):
    with pytest.raises(UserError, match=f"no Ray cluster at {address}: "):
        connect(argparse.Namespace(address=address, processes=1))


def test_no_cluster_is_one_line(run, tmp_path, monkeypatch):
    address = "127.0.0.1:1"
    write_toys(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    write_matrix(tmp_path, algorithms=["toy"])
    assert run("--address", address).wait(FAR) == 2
    output = (tmp_path / "output").read_text()
    assert output.startswith(f"benchmark.py: no Ray cluster at {address}: ")
    assert output.count("\n") == 1
    assert not list(tmp_path.rglob("launches"))
