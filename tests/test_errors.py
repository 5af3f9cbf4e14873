"""What bad input gets: one line that says what is wrong and what to do, exit status 2, nothing half-written.

Most cases run `main` in this process (`call`); each kind is proved once more by a process of its own
(`run_script`), where what other libraries print would show.
"""

import errno
import json
import math
import random
import resource
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import gymnasium as gym
import h5py
import huggingface_hub
import minari
import numpy as np
import pytest
import torch
from conftest import OFFLINE, learner_class, random_episodes, short
from huggingface_hub import constants

pytest.register_assert_rewrite("runs")
from runs import contents, equal, place, record, rewrite, small  # noqa: E402

pytest_plugins = ["runs"]


def assert_one_line(status: int, err: str, *wanted: str, script: str = "td3_bc", code: int = 2) -> None:
    assert (status, err.count("\n"), err[-1:]) == (code, 1, "\n"), err
    assert err.startswith(f"{script}.py: ")
    for text in wanted:
        assert text in err


# ------------------------------------------- the command line -------------------------------------------

ARGUMENTS = {
    "--sede 3": ["unknown field sede: did you mean seed?"],
    "--see 3": ["unknown field see: did you mean seed?"],
    "--see=3": ["unknown field see: did you mean seed?"],
    "--learning_rate 3e-4": ["unknown field learning_rate"],
    "--zzz 3": ["unknown field zzz", "--help"],
    "seed 3": ["seed"],
    "--seed": ["--seed: expected one argument", "--help"],
    "--seed 1 --compile": ["--compile: expected one argument", "--help"],
    "--seed 1 2": ["unknown field 2", "--help"],
    "environment=Hopper-v5": ["unknown field environment=Hopper-v5: did you mean environment?"],
    "-seed=3": ["unknown field -seed=3: did you mean seed?"],
    "--seed 2.5": ["seed: 2.5 is not int"],
    "--seed -1": ["seed: -1", "[0, "],
    "--seed 4294967296": ["seed:", "[0, 4294967295]"],
    "--seed 1e30": ["seed:", "[0, 4294967295]"],
    "--seed true": ["seed: True is not int"],
    "--seed=3=4": ["seed:", "'3=4'"],
    "--seed=": ["seed:", "NoneType"],
    "--seed [1": ["cannot read the config", "[1", "--help"],
    "--updates 0": ["updates: 0 is not int in [1, "],
    "--updates inf": ["updates: 'inf'"],
    "--updates .inf": ["updates: inf"],
    "--batch_size 2.5": ["batch_size: 2.5 is not int"],
    "--compile maybe": ["compile: 'maybe' is not True or False"],
    "--discount text": ["discount:", "'text'"],
    "--discount nan": ["discount: 'nan'"],
    "--discount -0.1": ["discount: -0.1"],
    "--discount 1.01": ["discount: 1.01 is not float in [0, 1]"],
    "--actor_lr inf": ["actor_lr: 'inf'"],
    "--actor_lr=-1e-4": ["actor_lr: '-1e-4' is not float in [0, "],
    "--reward_scale nan": ["reward_scale: 'nan'"],
    "--ref_min low": ["ref_min:", "low"],
    "--precision low": ["precision: 'low' is not highest or high or medium or auto"],
    "--wandb_mode online?": ["wandb_mode: 'online?' is not offline or online or disabled"],
    "--config_path": ["--config_path: expected one argument"],
}


@pytest.mark.parametrize("words", ARGUMENTS)
def test_a_bad_argument(call, tmp_path, words):
    status, out, err = call("td3_bc", "--output_dir", f"{tmp_path}/runs", *words.split(" "))
    assert_one_line(status, err, *ARGUMENTS[words])
    assert out == ""
    assert not (tmp_path / "runs").exists()


YAML = {
    "sede: 3": ["unknown field sede: did you mean seed?"],
    "see: 3": ["unknown field see: did you mean seed?"],
    "config_path: other.yaml": ["unknown field config_path"],
    "seed: 2.5": ["seed: 2.5 is not int"],
    "seed: true": ["seed: True is not int"],
    "seed: null": ["seed:", "NoneType"],
    "seed: [1, 2]": ["seed:", "list"],
    "seed:\n  x: 3": ["seed:", "dict"],
    "compile: maybe": ["compile: 'maybe' is not True or False"],
    "discount: .nan": ["discount: nan"],
    "discount: .inf": ["discount: inf"],
    "actor_lr: fast": ["actor_lr:", "'fast'"],
    "precision: [high]": ["precision: ['high'] is not highest or high or medium or auto"],
    "wandb_mode: off": ["wandb_mode: False is not offline or online or disabled"],
    "- seed\n- 3": ["cannot read the config"],
    "3": ["cannot read the config"],
    "3: seed": ["cannot read the config"],
    "seed: [1\nupdates: }": ["cannot read the config", "config.yaml", "line 2"],
    "\t": ["cannot read the config", "config.yaml"],
}


@pytest.mark.parametrize("text", YAML)
def test_a_bad_yaml_file(call, tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    status, out, err = call(
        "td3_bc", "--config_path", f"{tmp_path}/config.yaml", "--output_dir", f"{tmp_path}/runs"
    )
    assert_one_line(status, err, *YAML[text])
    assert out == ""
    assert not (tmp_path / "runs").exists()


UNREADABLE = [(None, "No such file"), (b"\xff\xfe", "decode"), ("folder", "Is a directory")]


@pytest.mark.parametrize(("content", "wanted"), UNREADABLE)
def test_an_unreadable_yaml_file(call, tmp_path, content, wanted):
    path = tmp_path / "config.yaml"
    if content == "folder":
        path.mkdir()
    elif content:
        path.write_bytes(content)
    status, _, err = call("td3_bc", "--config_path", str(path), "--output_dir", f"{tmp_path}/runs")
    assert_one_line(status, err, "cannot read the config", wanted)
    assert not (tmp_path / "runs").exists()


def test_what_looks_odd_and_is_right(scripts, tmp_path):
    parse, path = scripts["td3_bc"].parse_config, tmp_path / "config.yaml"
    config = parse(["--updates", "1e6", "--batch_size=1_024", "--seed", "3.0", "--compile", "False"])
    assert (config.updates, config.batch_size, config.seed, config.compile) == (1_000_000, 1024, 3, False)
    assert all(type(getattr(config, name)) is int for name in ("updates", "batch_size", "seed"))
    path.write_text("updates: 2e5\nactor_lr: 1e-3\nenvironment: null\nref_min: ~\nref_max: 3\ndiscount: 1\n")
    config = parse(["--config_path", str(path), "--seed", "7"])
    assert (config.updates, config.actor_lr) == (200_000, 1e-3)
    assert (config.environment, config.ref_min) == (None, None)
    assert (config.ref_max, config.discount, config.seed) == (3.0, 1.0, 7)
    assert type(config.updates) is int
    assert all(type(value) is float for value in (config.actor_lr, config.ref_max, config.discount))
    above = ["--ref_max", "null", "--environment", "Hopper-v5", "--updates", "9"]
    config = parse(["--config_path", str(path), *above])
    assert (config.ref_max, config.environment, config.updates) == (None, "Hopper-v5", 9)
    assert parse([]) == scripts["td3_bc"].Config()


@pytest.mark.parametrize("name", OFFLINE)
def test_help_names_every_field(call, scripts, name):
    status, out, _ = call(name, "--help")
    assert status == 0
    assert all(f"--{field}" in out for field in vars(scripts[name].Config()))


def test_a_bad_argument_in_a_process_of_its_own(run_script, tmp_path):
    done = run_script("offline/bc.py", "--see", "3", cwd=tmp_path)
    assert_one_line(done.returncode, done.stderr, "unknown field see: did you mean seed?", script="bc")
    assert (done.stdout, contents(tmp_path)) == ("", {})


@pytest.mark.parametrize("variant", ["../x", "a/b", "..", "/tmp/x"])
def test_a_variant_that_leads_out_of_its_folder(call, pendulum, tmp_path, variant):
    status, _, err = call("td3_bc", *short(pendulum, tmp_path / "runs", variant=variant))
    assert_one_line(status, err, f"td3_bc/{pendulum}/{variant} would lead out of ")
    assert contents(tmp_path) == {}


# ---------------------------------------- datasets and environments ----------------------------------------


class Strange(gym.Env):
    """Five random observations and no reward, in whatever spaces."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space):
        self.observation_space, self.action_space, self.steps = observation_space, action_space, 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 0.0, False, self.steps == 5, {}


BOX = gym.spaces.Box(-1, 1, (2,))
TREE = gym.spaces.Dict(a=BOX, b=gym.spaces.Dict(c=BOX))
SPACES = {
    "discrete-actions": (BOX, gym.spaces.Discrete(3)),
    "images": (gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), BOX),
    "bits": (gym.spaces.MultiBinary(3), BOX),
    "dict-actions": (BOX, gym.spaces.Dict(x=BOX)),
    "plain": (TREE, BOX),  # which fits
}
WANTED = {
    "discrete-actions": ["Discrete(3)", "vectors (Box)"],
    "images": ["(8, 8, 3)", "vectors (Box)"],
    "bits": ["MultiBinary(3)", "vectors (Box)"],
    "dict-actions": ["Dict('x'", "vectors (Box)"],
    }


@pytest.fixture(scope="module")
def strange(minari_root) -> dict[str, str]:
    """{kind: id} of datasets without an environment, in the spaces of SPACES."""
    ids = {}
    for kind, (observations, actions) in SPACES.items():
        ids[kind] = f"test/errors/{kind}-v0"
        episodes = random_episodes(Strange(observations, actions), 3)
        spaces = {"observation_space": observations, "action_space": actions}
        minari.create_dataset_from_buffers(ids[kind], episodes, **spaces, data_format="hdf5")
    return ids


@pytest.mark.parametrize("kind", WANTED)
def test_a_dataset_that_does_not_fit_the_script(call, strange, tmp_path, kind):
    status, _, err = call("td3_bc", *short(strange[kind], tmp_path / "runs"))
    assert_one_line(status, err, *WANTED[kind])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("dataset", "wanted"),
    [
        ("reef/pointmaze/nowhere-v0", "make dataset ID=reef/pointmaze/nowhere-v0"),
        ("mujoco/hopper/nowhere-v0", "minari download mujoco/hopper/nowhere-v0"),
        ("hopper", "minari list remote"),
        ("hopper/", "cannot load hopper/"),
    ],
)
def test_an_unknown_dataset(call, tmp_path, dataset, wanted):
    status, _, err = call("td3_bc", *short(dataset, tmp_path / "runs"))
    assert_one_line(status, err, f"cannot load {dataset}", wanted)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("dataset", ["../x", "reef/../../x"])
def test_a_dataset_that_leads_out_of_its_folder(call, tmp_path, dataset):
    status, _, err = call("td3_bc", *short(dataset, tmp_path / "runs"))
    assert_one_line(status, err, f"td3_bc/{dataset}/default would lead out of ")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("dataset", "near"),
    [
        ("halfcheetah-medium-v2", "mujoco/halfcheetah/medium-v0"),
        ("mujoco/hopper/medium-v2", "mujoco/hopper/medium-v0"),
        ("reef/pointmaze/umase-v0", "reef/pointmaze/umaze-v0"),
    ],
)
def test_a_near_dataset_is_suggested(call, tmp_path, dataset, near):
    status, _, err = call("td3_bc", *short(dataset, tmp_path / "runs"))
    assert_one_line(status, err, f"cannot load {dataset}", "did you mean ")
    assert near in err.partition("did you mean ")[2].partition("?")[0].split(" or ")


def test_one_on_this_machine_is_suggested_too(call, pendulum, tmp_path):
    status, _, err = call("td3_bc", *short(pendulum.replace("-v", "s-v"), tmp_path / "runs"))
    assert_one_line(status, err, f"did you mean {pendulum}")


def test_a_hub_that_cannot_be_reached_is_asked_once(call, tmp_path, monkeypatch):
    """The hub's own client would try again and again, half a minute long."""

    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_session", fail)
    monkeypatch.setattr(minari, "load_dataset", lambda *_, **__: pytest.fail("it was asked again"))
    status, _, err = call("td3_bc", *short("mujoco/hopper/medium-v0", tmp_path / "runs"))
    assert_one_line(status, err, "cannot load mujoco/hopper/medium-v0", "no route to host", "minari download")
    assert contents(tmp_path) == {}


def test_a_hub_that_never_answers(call, tmp_path, monkeypatch):
    """A network that swallows what is sent: one line within five seconds."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        monkeypatch.setattr(minari, "load_dataset", lambda *_, **__: pytest.fail("it was asked again"))
        start = time.monotonic()
        status, _, err = call("td3_bc", *short("mujoco/hopper/medium-v0", tmp_path / "runs"))
        seconds = time.monotonic() - start
    assert_one_line(status, err, "cannot load mujoco/hopper/medium-v0", "minari download")
    assert "OfflineMode" not in err
    assert seconds < 6  # one of them for all that is not waiting


def test_an_unknown_dataset_in_a_process_of_its_own(run_script, tmp_path):
    done = run_script("offline/iql.py", "--dataset", "reef/pointmaze/nowhere-v0", cwd=tmp_path)
    assert_one_line(done.returncode, done.stderr, "make dataset ID=reef/pointmaze/nowhere-v0", script="iql")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ("Nowhere-v0", ["cannot make Nowhere-v0", "--environment"]),
        ("MountainCarContinuous-v0", ["sizes (3, 1)", "(2, 1)", "--environment"]),
        ("CartPole-v1", ["sizes (3, 1)", "(4, 2)"]),
    ],
)
def test_an_environment_that_does_not_fit(call, pendulum, tmp_path, environment, wanted):
    status, _, err = call("td3_bc", *short(pendulum, tmp_path / "runs", environment=environment))
    assert_one_line(status, err, *wanted)
    assert not (tmp_path / "runs").exists()


def test_a_recorded_environment_that_cannot_be_made(call, pendulum, tmp_path, damaged):
    metadata = json.loads((damaged / "metadata.json").read_text())
    metadata["env_spec"] = metadata["env_spec"].replace("Pendulum-v1", "Gone-v1").replace("pendulum", "gone")
    (damaged / "metadata.json").write_text(json.dumps(metadata))
    status, _, err = call("td3_bc", *short(pendulum, tmp_path / "runs"))
    assert_one_line(status, err, "cannot make Gone-v1", "--environment")


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_an_unusable_device(call, pendulum, tmp_path, device):
    status, _, err = call("td3_bc", *short(pendulum, tmp_path / "runs", device=device))
    assert_one_line(status, err, f"cannot use {device}")
    assert not (tmp_path / "runs").exists()


NEEDED = 108_000  # 1,000 transitions of 3 + 3 + 1 + 2 numbers of 4 bytes, in up to three copies


@pytest.mark.parametrize("name", OFFLINE)
def test_data_that_do_not_fit_into_memory(call, scripts, pendulum, tmp_path, monkeypatch, name):
    free, read = SimpleNamespace(available=NEEDED - 1), scripts[name].read_episodes
    monkeypatch.setattr(scripts[name].psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(scripts[name], "read_episodes", lambda *_: pytest.fail("it has read the data"))
    arguments = small(scripts[name], pendulum, tmp_path / "runs", updates=2, final_eval_episodes=1)
    status, _, err = call(name, *arguments)
    assert_one_line(status, err, pendulum, "needs 0.0 GB of memory", "0.0 GB are free", script=name)
    assert not (tmp_path / "runs").exists()
    free.available = NEEDED
    monkeypatch.setattr(scripts[name], "read_episodes", read)
    assert call(name, *arguments)[0] == 0


def test_data_that_do_not_fit_into_a_container(scripts, pendulum, tmp_path, monkeypatch):
    """A container's limit, less what its processes use: files that it caches are not in the way."""
    script, dataset, device = scripts["td3_bc"], minari.load_dataset(pendulum), torch.device("cpu")
    monkeypatch.setattr(script.psutil, "virtual_memory", lambda: SimpleNamespace(available=10 * NEEDED))
    path = lambda *parts: tmp_path / "memory.max" if parts == ("/sys/fs/cgroup/memory.max",) else Path(*parts)  # noqa: E731
    monkeypatch.setattr(script, "Path", path)
    script.check_memory(dataset, device)  # no container
    (tmp_path / "memory.stat").write_text("anon 4000\nfile 800000\nkernel 1\n")
    (tmp_path / "memory.max").write_text("max\n")
    script.check_memory(dataset, device)
    (tmp_path / "memory.max").write_text(f"{NEEDED + 4000}\n")
    script.check_memory(dataset, device)
    (tmp_path / "memory.max").write_text(f"{NEEDED + 3999}\n")
    with pytest.raises(script.UserError, match=r"needs 0\.0 GB of memory; 0\.0 GB are free"):
        script.check_memory(dataset, device)
    (tmp_path / "memory.max").write_text(f"{100 * NEEDED}\n")  # more than the machine has
    script.check_memory(dataset, device)
    monkeypatch.setattr(script.psutil, "virtual_memory", lambda: SimpleNamespace(available=NEEDED - 1))
    with pytest.raises(script.UserError, match="GB are free"):
        script.check_memory(dataset, device)


# ------------------------------------------- damaged datasets -------------------------------------------


@pytest.fixture
def damaged(pendulum, minari_root, tmp_path, monkeypatch) -> Path:
    """The data folder of a copy of the dataset `pendulum`, in a Minari root of its own from now on."""
    shutil.copytree(minari_root / pendulum, tmp_path / "minari" / pendulum)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari" / pendulum / "data"


def put(name: str, place, value: float):
    return lambda file: file[name].__setitem__(place, value)


def shorten(name: str, length: int):
    return lambda file: file[name].resize(length, axis=0)


def empty(file) -> None:
    for name in ("actions", "rewards", "terminations", "truncations"):
        file[f"episode_6/{name}"].resize(0, axis=0)
    file["episode_6/observations"].resize(1, axis=0)


def widen(file) -> None:
    observations = file["episode_4/observations"][:]
    del file["episode_4/observations"]
    file["episode_4/observations"] = np.tile(observations, 2)


def halve(file) -> None:
    for name in ("observations", "actions", "rewards", "terminations", "truncations"):
        file[f"episode_9/{name}"].resize(50 + (name == "observations"), axis=0)


DAMAGE = {
    "a nan in observations": (put("episode_3/observations", (7, 1), math.nan), "episode 3: observations"),
    "an infinite last observation": (put("episode_0/observations", (100, 0), math.inf), "episode 0: obs"),
    "a nan in actions": (put("episode_8/actions", (0, 0), math.nan), "episode 8: actions are not all finite"),
    "an infinite reward": (put("episode_9/rewards", 99, math.inf), "episode 9: rewards are not all finite"),
    "a reward beyond float32": (put("episode_9/rewards", 99, 1e300), "episode 9: rewards are not all finite"),
    "an observation short": (shorten("episode_1/observations", 100), "episode 1 is malformed: 100 steps"),
    "an action short": (shorten("episode_2/actions", 99), "episode 2 is malformed: 100 steps, actions"),
    "a reward short": (shorten("episode_2/rewards", 99), "episode 2 is malformed: 99 steps"),
    "a termination short": (shorten("episode_5/terminations", 99), "episode 5 is malformed"),
    "a truncation short": (shorten("episode_5/truncations", 99), "episode 5 is malformed"),
    "no step at all": (empty, "episode 6 is malformed: 0 steps"),
    "wider observations": (widen, "episode 4 is malformed: 100 steps, observations of shape (101, 6)"),
    "half an episode": (halve, "lacks steps: 950 of 1,000"),
    "a lost episode": (lambda file: file.__delitem__("episode_9"), "minari delete test/pendulum/random-v0"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_data(call, pendulum, damaged, tmp_path, kind):
    damage, wanted = DAMAGE[kind]
    with h5py.File(damaged / "main_data.hdf5", "r+") as file:
        damage(file)
    status, _, err = call("td3_bc", *short(pendulum, tmp_path / "runs"))
    assert_one_line(status, err, pendulum, wanted)
    assert not (tmp_path / "runs").exists()


def test_a_dict_with_one_short_entry(call, strange, minari_root, tmp_path, monkeypatch):
    dataset = strange["plain"]
    shutil.copytree(minari_root / dataset, tmp_path / "minari" / dataset)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    with h5py.File(tmp_path / "minari" / dataset / "data/main_data.hdf5", "r+") as file:
        file["episode_2/observations/b/c"].resize(5, axis=0)
    spaces = {"id": "test/Strange-v0", "entry_point": lambda: Strange(TREE, BOX)}
    monkeypatch.setitem(gym.registry, spaces["id"], gym.envs.registration.EnvSpec(**spaces))
    status, _, err = call("td3_bc", *short(dataset, tmp_path / "runs", environment=spaces["id"]))
    assert_one_line(status, err, "episode 2 is malformed: 5 steps, observations of shape (5, 2)")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("promise", "wanted"),
    [
        ({"total_steps": 1001}, "lacks steps: 1,000 of 1,001"),
        ({"total_steps": 900, "total_episodes": 10}, "lacks steps: 1,000 of 900"),
        ({"total_episodes": 9}, "lacks steps: 900 of 1,000"),
        ({"total_episodes": 11}, "minari delete test/pendulum/random-v0"),
        ({"total_episodes": 0, "total_steps": 0}, "lacks steps: 0 of 0"),
        ({"minari_version": "0.1.0"}, "does not support"),
    ],
)
def test_metadata_that_promise_something_else(call, pendulum, damaged, tmp_path, promise, wanted):
    metadata = json.loads((damaged / "metadata.json").read_text())
    (damaged / "metadata.json").write_text(json.dumps({**metadata, **promise}))
    status, _, err = call("td3_bc", *short(pendulum, tmp_path / "runs"))
    assert_one_line(status, err, pendulum, wanted)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", ["main_data.hdf5", "metadata.json"])
@pytest.mark.parametrize("share", [None, 0.0, 0.5])
def test_half_a_download(call, pendulum, damaged, tmp_path, file, share):
    content = (damaged / file).read_bytes()
    (damaged / file).unlink()
    if share is not None:
        (damaged / file).write_bytes(content[: int(share * len(content))])
    status, _, err = call("td3_bc", *short(pendulum, tmp_path / "runs"))
    assert_one_line(status, err, f"cannot load {pendulum}", f"minari delete {pendulum}")
    assert not (tmp_path / "runs").exists()


def test_damaged_data_in_a_process_of_its_own(run_script, pendulum, damaged, tmp_path):
    """Minari itself would warn of a misconfigured dataset when it lists them."""
    (damaged / "metadata.json").write_text("{")
    done = run_script("offline/td3_bc.py", *short(pendulum, tmp_path / "runs"))
    assert_one_line(done.returncode, done.stderr, f"cannot load {pendulum}", f"minari delete {pendulum}")
    assert not (tmp_path / "runs").exists()


# --------------------------------------------- run folders ---------------------------------------------


@pytest.mark.parametrize("name", OFFLINE)
def test_a_folder_of_another_config_names_the_fields(call, scripts, pendulum, runs, name):
    before = contents(runs)
    other = small(scripts[name], pendulum, runs, actor_lr=0.5, eval_every=10, batch_size=32)
    status, _, err = call(name, *other)
    lr = scripts[name].Config().actor_lr
    changes = [f"actor_lr {lr} -> 0.5", "eval_every 20 -> 10", "batch_size 16 -> 32", "--variant"]
    assert_one_line(status, err, str(place(runs, name, pendulum)), *changes, script=name)
    assert "seed" not in err.replace("seed-0", "")
    assert contents(runs) == before


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("updates", [39, 60])
def test_a_finished_run_has_the_updates_it_has(call, scripts, pendulum, runs, name, updates):
    before = contents(runs)
    status, _, err = call(name, *small(scripts[name], pendulum, runs, updates=updates))
    assert_one_line(status, err, f"another config: updates 40 -> {updates};", "--variant", script=name)
    assert contents(runs) == before


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def without(*names: str):
    def remove(content: bytes) -> bytes:
        info = json.loads(content)
        return json.dumps({name: info[name] for name in info if name not in names}).encode()

    return remove


RECORDS = {
    "empty": lambda content: b"",
    "half": cut,
    "a list": lambda content: b"[]",
    "without config": without("config"),
    "without status": without("status"),
    "bytes": lambda content: b"\xff" + content,
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_damaged_record(call, pendulum, runs, kind):
    folder = place(runs, "td3_bc", pendulum)
    (folder / "run.json").write_bytes(RECORDS[kind]((folder / "run.json").read_bytes()))
    before = contents(runs)
    status, _, err = call("td3_bc", *short(pendulum, runs))
    assert_one_line(status, err, f"cannot read {folder}/run.json", f"remove {folder}")
    assert contents(runs) == before


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


CHECKPOINTS = {
    "empty": lambda content: b"",
    "text": lambda content: b"no checkpoint",
    "half": cut,
    "a byte": lambda content: flip(content, len(content) // 2),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_damaged_checkpoint(call, pendulum, runs, kind):
    folder = place(runs, "td3_bc", pendulum)
    (folder / "checkpoint.pt").write_bytes(CHECKPOINTS[kind]((folder / "checkpoint.pt").read_bytes()))
    rewrite(folder, status="running")
    before = contents(runs)
    status, _, err = call("td3_bc", *short(pendulum, runs))
    assert_one_line(status, err, f"cannot read {folder}/checkpoint.pt", f"remove {folder}")
    assert contents(runs) == before


def test_no_flipped_byte_goes_unseen(scripts, finished, pendulum, tmp_path):
    """Wherever it is, it is an error, or it changes nothing that is read."""
    script, file = scripts["td3_bc"], tmp_path / "checkpoint.pt"
    whole = (place(finished, "td3_bc", pendulum) / "checkpoint.pt").read_bytes()
    file.write_bytes(whole)
    kept, errors = script.read_saved(file), []
    evaluations = repr(kept.pop("evaluations"))  # in which there are nans, equal to nothing
    for at in random.Random(0).sample(range(len(whole)), 200):
        file.write_bytes(flip(whole, at))
        try:
            found = script.read_saved(file)
        except script.UserError as error:
            errors.append(f"{error}")
        else:
            assert repr(found.pop("evaluations")) == evaluations
            assert equal(found, kept), at
    assert len(errors) > 20
    assert all(f"cannot read {file}" in error for error in errors)


def reshape(content: dict) -> None:
    name, weight = next(iter(content["state"]["actor"].items()))
    content["state"]["actor"][name] = torch.cat([weight, weight])


FOREIGN = {
    "without state": (lambda content: content.pop("state"), "no state"),
    "without anything": (lambda content: content.clear(), "no updates and no state and no metrics"),
    "without a weight": (lambda content: content["state"]["actor"].popitem(), "does not fit this script"),
    "another part": (lambda content: content["state"].update(oracle={}), "does not fit this script"),
    "other shapes": (reshape, "does not fit this script"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_of_other_code(call, pendulum, runs, kind):
    folder, (change, wanted) = place(runs, "td3_bc", pendulum), FOREIGN[kind]
    content = torch.load(folder / "checkpoint.pt")
    change(content)
    torch.save(content, folder / "checkpoint.pt")
    rewrite(folder, status="running")
    before = contents(runs)
    status, _, err = call("td3_bc", *short(pendulum, runs))
    assert_one_line(status, err, "checkpoint", wanted)
    assert contents(runs) == before


def test_a_folder_that_another_process_holds(call, run_script, pendulum, runs):
    """With a run in it, and before the first file is in it; in a process of its own once."""
    rewrite(place(runs, "bc", pendulum), status="running")
    for variant in ("default", "new"):
        folder, arguments = place(runs, "bc", pendulum, variant), short(pendulum, runs, variant=variant)
        with filelock.FileLock(folder / "lock"):
            before = contents(runs)
            status, _, err = call("bc", *arguments)
            assert_one_line(status, err, f"another process is at work in {folder}", script="bc")
            if variant == "default":
                done = run_script("offline/bc.py", *arguments)
                assert_one_line(done.returncode, done.stderr, f"at work in {folder}", script="bc")
            assert contents(runs) == before
        assert call("bc", *arguments)[0] == 0


@pytest.mark.parametrize("output_dir", ["/dev/null", "/proc/nowhere"])
def test_an_output_folder_that_cannot_be(call, pendulum, output_dir):
    status, _, err = call("td3_bc", *short(pendulum, output_dir))
    assert_one_line(status, err, output_dir)


def test_no_disk(run_script, call, pendulum, finished, tmp_path):
    """No file may grow beyond 20,000 bytes, which holds all but the checkpoint; then the limit goes."""
    runs = tmp_path / "runs"
    folder, whole = place(runs, "td3_bc", pendulum), place(finished, "td3_bc", pendulum)
    assert (whole / "checkpoint.pt").stat().st_size > 20_000
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    done = run_script("offline/td3_bc.py", *short(pendulum, runs), preexec_fn=limit)
    problem = f"cannot write {folder}/checkpoint.pt.new"
    assert_one_line(done.returncode, done.stderr, problem, "File too large")
    assert set(contents(folder)) == {"config.yaml", "run.json", "metrics.csv", "evaluations.csv"}
    assert record(folder)["status"] == "failed"
    assert "File too large" in record(folder)["result"]
    assert call("td3_bc", *short(pendulum, runs))[0] == 0
    assert (folder / "evaluations.csv").read_bytes() == (whole / "evaluations.csv").read_bytes()


def test_a_disk_that_fills_up_later(call, pendulum, finished, tmp_path, monkeypatch):
    """Not even run.json can be written: the checkpoint before counts, and the same command goes on."""
    runs, write, checkpoints = tmp_path / "runs", Path.write_bytes, []
    folder, whole = place(runs, "td3_bc", pendulum), place(finished, "td3_bc", pendulum)

    def fill(path: Path, content: bytes) -> int:
        checkpoints.extend([path] * (path.name == "checkpoint.pt.new"))
        if len(checkpoints) < 2:
            return write(path, content)
        write(path, content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    status, _, err = call("td3_bc", *short(pendulum, runs))
    assert_one_line(status, err, f"cannot write {folder}/", "No space left on device")
    assert not list(folder.glob("*.new"))
    assert torch.load(folder / "checkpoint.pt")["updates"] == 20
    monkeypatch.setattr(Path, "write_bytes", write)
    status, out, _ = call("td3_bc", *short(pendulum, runs))
    assert status == 0
    assert "resumed at update 20\n" in out
    assert (folder / "evaluations.csv").read_bytes() == (whole / "evaluations.csv").read_bytes()


# ---------------------------------------------- divergence ----------------------------------------------


@pytest.mark.parametrize("name", OFFLINE)
def test_a_loss_that_turns_nan(call, scripts, pendulum, tmp_path, monkeypatch, name):
    """At update 25 of 100: the run stops at 30, the next row, and keeps the checkpoint of 20."""
    runs, cls = tmp_path / "runs", learner_class(scripts[name])
    update, folder = cls.update, place(runs, name, pendulum)

    def spoiled(learner, batch):
        factor = math.nan if learner.updates == 24 else 1.0
        spoilt = {key: batch[key] * factor for key in ("actions", "real") if key in batch}
        return update(learner, batch | spoilt)

    monkeypatch.setattr(cls, "update", spoiled)
    arguments = small(scripts[name], pendulum, runs, updates=100)
    status, _, err = call(name, *arguments)
    wanted = ["diverged by update 30: ", "/loss", "not finite", "lower a learning rate"]
    assert_one_line(status, err, *wanted, script=name, code=3)
    checkpoint = torch.load(folder / "checkpoint.pt")
    assert record(folder)["status"] == "diverged"
    assert record(folder)["result"].startswith("diverged by update 30")
    assert checkpoint["updates"] == 20
    leaves = scripts[name].leaves(checkpoint["state"])
    assert all(leaf.isfinite().all() for leaf in leaves if isinstance(leaf, torch.Tensor))
    assert all(weight.isfinite().all() for weight in checkpoint["state"]["actor"].values())
    assert (folder / "metrics.csv").read_text().splitlines()[-1].startswith("20,")

    before = contents(folder)
    status, _, err = call(name, *arguments)
    assert_one_line(status, err, f"{folder} has diverged by update 30", "--variant", script=name, code=3)
    assert contents(folder) == before


def test_weights_that_overflow_before_a_loss_shows_it(call, pendulum, tmp_path):
    """The first loss is finite and the step that follows is not: no checkpoint of it is written."""
    steps = {"critic_lr": 1e39, "log_every": 1, "checkpoint_every": 1}
    status, _, err = call("td3_bc", *short(pendulum, tmp_path, **steps))
    assert_one_line(status, err, "diverged", "weights not finite", code=3)
    folder = place(tmp_path, "td3_bc", pendulum)
    assert not (folder / "checkpoint.pt").exists()
    assert (folder / "metrics.csv").read_text().splitlines()[-1].startswith("1,")
    assert record(folder)["status"] == "diverged"


def test_divergence_in_a_process_of_its_own(run_script, call, pendulum, tmp_path):
    arguments = short(pendulum, tmp_path, reward_scale=1e30)
    done = run_script("offline/iql.py", *arguments)
    assert_one_line(done.returncode, done.stderr, "diverged by update 10: critic/loss", script="iql", code=3)
    status, _, err = call("iql", *arguments)
    assert_one_line(status, err, "seed-0 has diverged by update 10", script="iql", code=3)
