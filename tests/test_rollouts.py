"""algorithms/collect/rollouts.py: whose actions and what of the environment it records, what it leaves."""

import csv
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import minari
import numpy as np
import psutil
import pytest
import safetensors.numpy
from conftest import ROOT, load_script

rollouts = load_script("collect/rollouts.py")

ID = "reef/hopper/mix-v0"
POLICIES = ("medium", "replay-01", "replay-02", "random")
MIX = {"dataset": ID, "policies": "medium replay-* random", "steps": 1200, "shards": 6, "seed": 7}
PARTS, SHARDS = 2, 8  # 6 shards over 4 policies are 2 each
MEAN, STD = 0.3, 0.5  # of the stored policies before tanh, about


def write_actor(file: Path, obs_dim: int, act_dim: int, seed: int, std: float = STD, layers: int = 2) -> None:
    """An actor of 8 units a layer in half precision, its Gaussian near N(MEAN, std^2) in every state."""
    rng, tensors, sizes = np.random.default_rng(seed), {}, [obs_dim, *[8] * layers, 2 * act_dim]
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
        tensors[f"net.{2 * i}.weight"] = rng.normal(0, 0.2, (outputs, inputs)).astype(np.float16)
        tensors[f"net.{2 * i}.bias"] = rng.normal(0, 0.1, outputs).astype(np.float16)
    tensors[f"net.{2 * layers}.bias"] = np.repeat([MEAN, np.log(std)], act_dim).astype(np.float16)
    safetensors.numpy.save_file(tensors, file)


def gaussian(file: Path, observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [T, act_dim] of a stored policy before tanh, by NumPy from its tensors."""
    tensors = {name: t.astype(np.float64) for name, t in safetensors.numpy.load_file(file).items()}
    x, last = observations, max(int(name.split(".")[1]) for name in tensors)
    for i in range(0, last, 2):
        x = np.maximum(x @ tensors[f"net.{i}.weight"].T + tensors[f"net.{i}.bias"], 0)
    mean, log_std = np.split(x @ tensors[f"net.{last}.weight"].T + tensors[f"net.{last}.bias"], 2, axis=1)
    return mean, np.exp(np.clip(log_std, -5, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Policies of Hopper-v5 (observations [11], actions [3]), and what is known of two."""
    folder = tmp_path_factory.mktemp("hopper")
    for seed, name in enumerate(("medium", "expert", "replay-01", "replay-02")):
        write_actor(folder / f"{name}.safetensors", 11, 3, seed, layers=1 + seed % 2)
    (folder / "snapshots.csv").write_text("snapshot,return_mean\nmedium,1234.5\nexpert,3456.5\n")
    return folder


def words(**fields) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items()]


def execute(root: Path, arguments: list[str], **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "algorithms/collect/rollouts.py"), *arguments]
    environment = {**os.environ, "MINARI_DATASETS_PATH": str(root), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def roots(tmp_path_factory, folder):
    """Two Minari roots with the same dataset, made by one process and by two."""
    found = {}
    for processes in (1, 2):
        found[processes] = tmp_path_factory.mktemp(f"processes{processes}")
        done = execute(found[processes], words(**MIX, folder=folder, processes=processes))
        assert done.returncode == 0, done.stderr
        assert load(found[processes]).storage.metadata["content_hash"] in done.stdout
    return found


def load(root: Path, dataset_id: str = ID) -> minari.MinariDataset:
    return minari.MinariDataset(root / dataset_id / "data")


@pytest.fixture(scope="module")
def mix(roots) -> minari.MinariDataset:
    return load(roots[2])


@pytest.fixture(scope="module")
def shards(mix) -> list[list]:
    """The episodes of each shard: a new one begins once 1,200 / 8 steps are there."""
    found = [[]]
    for episode in mix.iterate_episodes():
        if sum(map(len, found[-1])) >= 1200 / SHARDS:
            found.append([])
        found[-1].append(episode)
    return found


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The script in this process with a Minari root of its own: (status, stdout, stderr)."""
    root = tmp_path / "minari"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))

    def run(**fields):
        monkeypatch.setattr(sys, "argv", ["rollouts.py", *words(**{"processes": 1, "steps": 100} | fields)])
        status = 0
        try:
            rollouts.main(rollouts.roll_out)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    run.root = root
    return run


# The data


def test_the_data_do_not_depend_on_the_number_of_processes(roots):
    digests = set()
    for root in roots.values():
        digest = hashlib.sha256()
        for episode in load(root).iterate_episodes():
            flags = episode.terminations, episode.truncations
            for array in (episode.observations, episode.actions, episode.rewards, *flags):
                digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        assert load(root).storage.metadata["content_hash"] == digest.hexdigest()
        digests.add(digest.hexdigest())
    assert len(digests) == 1


def test_policies_have_equal_shares_up_to_whole_episodes(mix, shards):
    summary = mix.storage.metadata["policies"]
    assert tuple(summary) == POLICIES
    assert len(shards) == SHARDS
    for i, (name, row) in enumerate(summary.items()):
        theirs = [episode for shard in shards[PARTS * i : PARTS * (i + 1)] for episode in shard]
        assert row["episodes"] == len(theirs)
        assert row["steps"] == sum(map(len, theirs))
        assert 300 <= row["steps"] < 300 + PARTS * max(map(len, theirs))
        returns = [episode.rewards.sum() for episode in theirs]
        assert row["return_mean"] == pytest.approx(np.mean(returns))
        assert row["return_std"] == pytest.approx(np.std(returns))
        assert ("stored_return_mean" in row) == (name == "medium")
    assert mix.total_steps == sum(row["steps"] for row in summary.values())


def test_played_again_the_environment_says_the_same(mix, shards):
    """With a shard's seed and its actions: every observation, reward and flag, and where episodes begin."""
    env = mix.recover_environment(eval_env=True)
    assert (env.spec.id, env.spec.max_episode_steps) == ("Hopper-v5", 1000)
    for seed, shard in zip(np.random.SeedSequence(7).spawn(SHARDS), shards):
        observation, _ = env.reset(seed=int(np.random.default_rng(seed).integers(2**31)))
        for episode in shard:
            assert episode.observations.dtype == np.float64
            assert len(episode.observations) == len(episode) + 1
            assert (episode.observations[0] == observation).all()
            for t, action in enumerate(episode.actions):
                observation, reward, terminated, truncated, _ = env.step(action)
                assert (episode.observations[t + 1] == observation).all()
                assert episode.rewards[t] == reward
                assert (episode.terminations[t], episode.truncations[t]) == (terminated, truncated)
                assert (terminated or truncated) == (t == len(episode) - 1)
            observation, _ = env.reset()


@pytest.mark.equation(1)
def test_actions_are_drawn_from_the_policy(folder, shards):
    noise = []
    for name, first in zip(POLICIES[:3], range(0, SHARDS, PARTS)):
        for shard in shards[first : first + PARTS]:
            for episode in shard:
                mean, std = gaussian(folder / f"{name}.safetensors", episode.observations[:-1])
                noise.append((np.arctanh(episode.actions.astype(np.float64)) - mean) / std)
    noise = np.concatenate(noise)
    assert len(noise) > 900
    assert np.abs(noise.mean(0)).max() < 4 / np.sqrt(len(noise))  # N(0, 1) in each of three entries
    assert np.abs(noise.std(0) - 1).max() < 4 / np.sqrt(2 * len(noise))
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 4 / np.sqrt(len(noise))
    assert np.abs((noise[1:] * noise[:-1]).mean(0)).max() < 4 / np.sqrt(len(noise))
    assert len(np.unique(noise[:, 0].round(6))) > 0.99 * len(noise)  # no shard repeats another's


@pytest.mark.equation(1)
def test_actions_are_of_double_precision_and_have_six_decimals(folder, shards):
    """With a shard's random numbers NumPy finds the very actions: what is rounded hides the last bits."""
    seeds = np.random.SeedSequence(7).spawn(SHARDS)
    for name, first in zip(POLICIES[:3], range(0, SHARDS, PARTS)):
        for seed, shard in zip(seeds[first : first + PARTS], shards[first : first + PARTS]):
            rng = np.random.default_rng(seed)
            rng.integers(2**31)  # the environment's
            for episode in shard:
                mean, std = gaussian(folder / f"{name}.safetensors", episode.observations[:-1])
                wanted = np.tanh(mean + std * rng.standard_normal(mean.shape)).round(6).astype(np.float32)
                assert (episode.actions == wanted).all()
    for seed, shard in zip(seeds[-PARTS:], shards[-PARTS:]):
        rng = np.random.default_rng(seed)
        rng.integers(2**31)
        for episode in shard:
            wanted = rng.uniform(-1, 1, episode.actions.shape).round(6).astype(np.float32)
            assert (episode.actions == wanted).all()


# What NumPy, its OpenBLAS, torch and its MKL make of a processor is theirs to choose by these variables.
PROCESSORS = {
    "this one": {},
    "of 2013": {
        "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
        "OPENBLAS_CORETYPE": "Haswell",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "of 2008": {
        "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
        "OPENBLAS_CORETYPE": "Nehalem",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}


def test_the_data_do_not_depend_on_the_processor(tmp_path):
    """Of the published policies: wide enough that a product is summed in another order."""
    fields = {"policies": "medium expert", "steps": 2000, "shards": 2, "processes": 1}
    hashes = {}
    for number, (name, variables) in enumerate(PROCESSORS.items()):
        root = tmp_path / str(number)
        root.mkdir()
        arguments = words(dataset=ID, folder=ROOT / "results/behavior/hopper", **fields)
        done = execute(root, arguments, **variables)
        assert done.returncode == 0, done.stderr
        hashes[name] = load(root).storage.metadata["content_hash"]
    assert len(set(hashes.values())) == 1, hashes


def test_random_actions_are_uniform(shards):
    actions = np.concatenate([episode.actions for shard in shards[-PARTS:] for episode in shard])
    assert actions.dtype == np.float32
    ranks = np.sort(actions, axis=0) / 2 + 0.5
    assert np.abs(ranks - np.linspace(0, 1, len(actions))[:, None]).max() < 1.63 / np.sqrt(len(actions))


@pytest.mark.equation(1)
def test_actions_fill_the_bounds_and_time_limits_truncate(call, tmp_path):
    """Pendulum's actions lie in [-2, 2]; its episodes are cut after 200 steps and never end for good."""
    write_actor(tmp_path / "steady.safetensors", 3, 1, seed=0)
    write_actor(tmp_path / "wide.safetensors", 3, 1, seed=0, std=3.0)
    fields = {"dataset": "mine/pendulum-v0", "environment": "Pendulum-v1", "folder": tmp_path}
    assert call(**fields, policies="steady wide random", steps=1300, shards=1)[0] == 0
    dataset = load(call.root, "mine/pendulum-v0")
    episodes = list(dataset.iterate_episodes())
    assert [len(episode) for episode in episodes] == [200] * 9  # 434 steps each, rounded up
    for episode in episodes:
        assert not episode.terminations.any()
        assert np.flatnonzero(episode.truncations).tolist() == [199]
    steady, *others = (np.concatenate([e.actions for e in episodes[i : i + 3]]) for i in (0, 3, 6))
    mean, std = gaussian(
        tmp_path / "steady.safetensors", np.concatenate([e.observations[:-1] for e in episodes[:3]])
    )
    noise = (np.arctanh(steady.astype(np.float64) / 2) - mean) / std
    assert np.abs([noise.mean(), noise.std() - 1]).max() < 4 / np.sqrt(600)
    for actions in others:
        assert np.abs(actions).max() <= 2
        assert actions.min() < -1.9
        assert actions.max() > 1.9
    metadata = dataset.storage.metadata
    assert not {"ref_min_score", "ref_max_score", "reference_source"} & metadata.keys()
    assert "Reference" not in metadata["description"]


def test_episodes_in_place_of_steps(call, folder):
    fields = {"dataset": "mine/narrow-v0", "folder": folder, "policies": "medium expert"}
    assert call(**fields, episodes=7, shards=6)[0] == 0
    dataset = load(call.root, "mine/narrow-v0")
    assert dataset.total_episodes == 14
    assert [row["episodes"] for row in dataset.storage.metadata["policies"].values()] == [7, 7]


def test_metadata(mix, folder):
    metadata, description = mix.storage.metadata, mix.storage.metadata["description"]
    with open(ROOT / "results/reference_scores.csv", newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["dataset"] == "mujoco/hopper/medium-v0"]
    assert metadata["ref_min_score"] == float(row["ref_min"])
    assert metadata["ref_max_score"] == float(row["ref_max"])
    assert "D4RL" in metadata["reference_source"]
    assert "v5 is not the v2" in description
    assert "when it was stored 1234.5" in description
    assert all(f"{name} (" in description for name in POLICIES)
    recipe, digests = metadata["recipe"], metadata["recipe"]["files"]
    assert list(digests) == list(POLICIES[:3])
    for name, digest in digests.items():
        assert digest == hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest()
    assert not {"folder", "processes"} & recipe.keys()
    assert metadata["versions"].keys() == {"gymnasium", "mujoco", "numpy", "torch"}


def test_references_are_those_of_the_table():
    with open(ROOT / "results/reference_scores.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["environment"] in rollouts.REFERENCES]
    assert {row["environment"] for row in rows} == set(rollouts.REFERENCES)
    for row in rows:
        assert rollouts.REFERENCES[row["environment"]] == (float(row["ref_min"]), float(row["ref_max"]))


# What it leaves on the disk


@pytest.mark.parametrize("name", ["AdroitHandPen-v1", "PointMaze_UMaze-v3"])
def test_environments_of_gymnasium_robotics_are_known(name, tmp_path):
    """In a process of its own, where nobody else has registered them; a maze leaves no temporary file."""
    make = f"import rollouts; env = rollouts.open_environment({name!r}); print(env.spec.id)"
    environ = {**os.environ, "PYTHONPATH": "algorithms/collect", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", make]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if name.startswith("PointMaze"):  # whose observations are a Dict
        assert f"environment: {name} has not vectors (Box) as observations" in done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{name}\n", "")
    assert list(tmp_path.iterdir()) == []


def test_a_second_call_does_nothing_and_another_recipe_is_refused(call, folder, tmp_path, roots, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(roots[1]))
    before = {path: path.stat().st_mtime_ns for path in roots[1].rglob("*")}
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    status, stdout, stderr = call(**MIX | {"folder": elsewhere})
    assert (status, stdout.partition(":")[0], stderr) == (0, f"{ID} is there", "")
    write_actor(elsewhere / "medium.safetensors", 11, 3, seed=9)
    for fields in ({"folder": elsewhere}, {"folder": folder, "steps": 1300}):
        status, stdout, stderr = call(**MIX | fields)
        assert (status, stdout, len(stderr.splitlines())) == (2, "", 1)
        assert f"minari delete {ID}" in stderr
    assert before == {path: path.stat().st_mtime_ns for path in roots[1].rglob("*")}


def test_a_killed_run_leaves_no_dataset_and_no_process(tmp_path, folder):
    arguments = words(**MIX | {"steps": 10**7}, folder=folder, processes=2)
    command = [sys.executable, str(ROOT / "algorithms/collect/rollouts.py"), *arguments]
    environment = {**os.environ, "MINARI_DATASETS_PATH": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline, workers = time.monotonic() + 60, []
    while time.monotonic() < deadline and len(workers) < 3:  # two, and Python's resource tracker
        workers = psutil.Process(process.pid).children()
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(workers) == 3
    assert not psutil.wait_procs(workers, timeout=20)[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["play", "minari"])
def test_a_full_disk_ends_in_one_line_and_leaves_nothing(call, folder, monkeypatch, place):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    module, name = (rollouts, "play") if place == "play" else (minari, "create_dataset_from_buffers")
    monkeypatch.setattr(module, name, full)
    status, stdout, stderr = call(folder=folder)
    assert (status, stdout) == (2, "")
    assert "No space left on device" in stderr.splitlines()[-1]
    assert list(call.root.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"policies": "best"}, ("reef/hopper/medium-v1 needs ", "best.safetensors", "sac.py")),
        ({"policies": "medium ladder-*"}, ("ladder-*.safetensors", "sac.py")),
        ({"policies": " "}, ("policies: None is not text",)),
        ({"folder": "nowhere"}, ("nowhere/medium.safetensors",)),
        ({"environment": "Hoper-v5"}, ("environment", "Hoper-v5")),
        ({"environment": "CartPole-v1"}, ("environment", "CartPole-v1")),
        ({"environment": "HalfCheetah-v5"}, ("medium.safetensors is no actor for HalfCheetah-v5", "shape")),
        ({"dataset": "reef/hopper/medium"}, ("Minari id",)),
        ({"steps": 0}, ("steps",)),
        ({"policy": "medium"}, ("did you mean policies?",)),
    ],
)
def test_bad_arguments_end_in_one_line(call, folder, fields, said):
    status, stdout, stderr = call(**{"folder": folder} | fields)
    assert (status, stdout, len(stderr.splitlines())) == (2, "", 1)
    assert all(text in stderr for text in said)
    assert list(call.root.iterdir()) == []


@pytest.mark.parametrize("fault", ["not safetensors", "empty", "one too few", "another name", "not finite"])
def test_a_damaged_policy_ends_in_one_line(call, folder, tmp_path, fault):
    tensors = safetensors.numpy.load_file(folder / "medium.safetensors")
    if fault == "one too few":
        del tensors["net.0.weight"]
    elif fault == "another name":
        tensors["net.4.weights"] = tensors.pop("net.2.weight")
    elif fault == "not finite":
        tensors["net.0.bias"][3] = np.inf
    file = tmp_path / "medium.safetensors"
    safetensors.numpy.save_file(tensors, file)
    if fault in ("not safetensors", "empty"):
        file.write_bytes(b"not a policy at all" if fault == "not safetensors" else b"")
    status, stdout, stderr = call(folder=tmp_path)
    assert (status, stdout, len(stderr.splitlines())) == (2, "", 1)
    assert f"{file} is no actor for Hopper-v5" in stderr
    assert list(call.root.iterdir()) == []


def test_a_damaged_table_of_snapshots_ends_in_one_line(call, folder, tmp_path):
    shutil.copy(folder / "medium.safetensors", tmp_path)
    (tmp_path / "snapshots.csv").write_text("name,score\nmedium,3\n")
    status, stdout, stderr = call(folder=tmp_path)
    assert (status, stdout, len(stderr.splitlines())) == (2, "", 1)
    assert "snapshots.csv" in stderr
    assert list(call.root.iterdir()) == []
