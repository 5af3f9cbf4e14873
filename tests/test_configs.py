"""Every YAML file under configs/ loads into its script and says nothing twice; references equal the table."""

import csv
import dataclasses
import importlib.util
import sys
from functools import cache
from pathlib import Path

import gymnasium
import gymnasium_robotics
import pytest
import yaml
from conftest import FINETUNE, OFFLINE

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*") if path.is_file())
FILES = [file for file in FILES if not file.startswith("configs/benchmark/")]  # those name runs, not settings
RECIPES = [file for file in FILES if file.startswith("configs/collect/") and Path(file).parts[2] != "sac"]
LEARNERS = [file for file in FILES if not file.startswith("configs/collect/")]
SIZES = ("umaze", "medium", "large")
MAZES = [f"reef/pointmaze/{size}{form}-v0" for size in SIZES for form in ("", "-goals")]
MAZES.append("reef/pointmaze/large-stitch-v0")
LEVELS = ("random", "medium", "medium-replay", "medium-expert", "expert", "expert-narrow")
BODIES = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}
SEPSIS = [f"reef/sepsis/{who}-v0" for who in ("clinician", "random", "mixed")]
GAMES = ("breakout", "space-invaders")
MINATAR = [f"reef/minatar/{game}/{policy}-v0" for game in GAMES for policy in ("mixed", "expert")]
ATARI = [f"atari/{game}/expert-v0" for game in ("breakout", "pong")]
SCREENS = [f"reef/atari/{game}-expert-v0" for game in ("breakout", "pong")]
MINIGRID = [f"minigrid/BabyAI-GoToRedBall/{view}-v0" for view in ("optimal", "optimal-fullobs")]
MINIGRID += [f"D4RL/minigrid/{name}-v0" for name in ("fourrooms", "fourrooms-random")]
WALKERS = [f"reef/{body}/{level}-v1" for body in BODIES for level in LEVELS]
PLAYS = ("cube-single-play", "scene-play", "puzzle-3x3-play", "pointmaze-medium-navigate")
OGBENCH = [f"reef/ogbench/{play}-v0" for play in PLAYS]
LABELLED = [f"reef/halfcheetah/medium-replay-{method}-v1" for method in ("otr", "uds")]
MAX_LINES = 11


def references() -> dict[str, dict[str, str]]:
    with open(ROOT / "results/reference_scores.csv", newline="") as file:
        return {row["dataset"]: row for row in csv.DictReader(file)}


@cache
def script_of(file: str):
    """The script that configs/<family>/<algorithm>/... or configs/collect/<environment>/... belongs to."""
    family, algorithm = Path(file).parts[1:3]
    if family == "collect" and algorithm not in ("minatar", "ogbench", "pointmaze", "sac", "sepsis"):
        algorithm = {"atari": "screens"}.get(algorithm, "rollouts")
        algorithm = "label_rewards" if Path(file).stem.endswith(("-uds-v1", "-otr-v1")) else algorithm
    path = ROOT / "algorithms" / family / f"{algorithm}.py"
    assert path.is_file(), f"{file} has no script {path}"
    return load(path)


@cache
def load(path: Path):
    name = f"config_test_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@cache
def read(file: str) -> dict:
    return yaml.safe_load((ROOT / file).read_text())


def location(file: str) -> str:
    """<dataset id>[-<variant>] as the path has it; recipes leave out reef/."""
    family, *rest = Path(file).with_suffix("").parts[1:]
    return "/".join(["reef", *rest]) if family == "collect" else "/".join(rest[1:])


@cache
def parse_nothing(script) -> None:
    script.parse_config([])


def loading_faults(file: str) -> list[str]:
    """What the script makes of a file that the file doesn't say, and what the file says for nothing."""
    script, faults = script_of(file), []
    try:
        parse_nothing(script)  # once: the parser takes ten times as long as the decoders, which it registers
        config = script.decode_config(read(file))
    except script.UserError as error:
        return [f"{file}: {error}"]
    values = read(file)
    for field in dataclasses.fields(script.Config):
        name, loaded = field.name, getattr(config, field.name)
        wanted = values.get(name, field.default)
        if loaded != wanted or isinstance(loaded, bool) != isinstance(wanted, bool):
            faults.append(f"{file}: {name} should be {wanted!r}, the script has {loaded!r}")
        said_anyway = name in ("dataset", "environment")  # even where they are the default
        if name in values and loaded == field.default and not said_anyway:
            faults.append(f"{file}: {name}: {loaded!r} is the default")
    return faults


def test_every_file_loads_into_its_script():
    assert [file for file in FILES if not file.endswith(".yaml")] == []
    assert [fault for file in FILES for fault in loading_faults(file)] == []
    for script, file in {script_of(file): file for file in FILES}.items():  # one of each as the user does it
        assert script.parse_config(["--config_path", str(ROOT / file)]) == script.decode_config(read(file))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("alpha: 2.5", "alpha: 2.5 is the default"),
        ("alhpa: 2.0", "did you mean alpha"),
        ("updates: 0", "updates"),
        ("normalize_states: 1", "normalize_states"),
        ("seed: 3", ""),
    ],
)
def test_a_file_at_fault_is_noticed(tmp_path, monkeypatch, line, fault):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    script = load(Path(__file__).resolve().parents[1] / "algorithms/offline/td3_bc.py")
    monkeypatch.setattr(sys.modules[__name__], "script_of", lambda file: script)
    (tmp_path / "a.yaml").write_text(f"dataset: reef/pointmaze/umaze-v0\n{line}\n")
    read.cache_clear()
    found = loading_faults("a.yaml")
    read.cache_clear()
    assert len(found) == bool(fault)
    assert all(fault in line for line in found)


def test_every_file_agrees_with_its_path():
    faults = []
    for file in RECIPES + LEARNERS:
        values = read(file)
        variant = f"-{values['variant']}" if "variant" in values else ""
        if location(file) != values["dataset"] + variant:
            faults.append(f"{file}: {values['dataset']}{variant}")
    assert faults == []


def test_every_file_is_short_and_names_a_field_once():
    faults = []
    for file in FILES:
        lines = (ROOT / file).read_text().splitlines()
        fields = [line for line in lines if not line.startswith("#")]
        if len(lines) > MAX_LINES or len(fields) != len(read(file)):
            faults.append(f"{file}: {len(lines)} lines, {len(fields)} of fields, {len(read(file))} fields")
    assert faults == []


def test_every_local_dataset_has_its_recipe():
    wanted = [*MAZES, *WALKERS, *SEPSIS, *MINATAR, *SCREENS, *LABELLED, *OGBENCH]
    wanted.append("reef/dark-room/histories-v0")
    assert sorted(read(file)["dataset"] for file in RECIPES) == sorted(wanted)


def test_recipes_of_walkers_take_their_own_environment_and_policies():
    policies = {"medium-replay": "replay-*", "medium-expert": "medium expert", "expert-narrow": "expert"}
    faults = []
    for dataset in WALKERS:
        _, body, level = dataset.removesuffix("-v1").split("/")
        file = f"configs/collect/{body}/{level}-v1.yaml"
        config = script_of(file).parse_config(["--config_path", str(ROOT / file)])
        wanted = {"environment": BODIES[body], "policies": policies.get(level, level)}
        wanted |= {"steps": 200_000, "seed": 0, "episodes": 10 if level == "expert-narrow" else 0}
        if level != "random":
            wanted["folder"] = f"results/behavior/{body}"
        for name, value in wanted.items():
            if getattr(config, name) != value:
                faults.append(f"{file}: {name} is {getattr(config, name)!r}, not {value!r}")
    assert faults == []


def test_references_are_those_of_the_table():
    table, faults = references(), []
    for file in LEARNERS:
        values = read(file)
        found = {name: values[name] for name in ("ref_min", "ref_max") if name in values}
        if values["dataset"].startswith("reef/"):  # these carry their references
            recipe = ROOT / "configs/collect" / (values["dataset"].removeprefix("reef/") + ".yaml")
            if found or not recipe.is_file():
                faults.append(f"{file}: {found}, recipe {recipe}")
        else:
            row = table.get(values["dataset"], {})  # of AntMaze there is none: only returns are reported
            if found != {name: float(row[name]) for name in ("ref_min", "ref_max") if name in row}:
                faults.append(f"{file}: {found}, the table has {row}")
    assert faults == []


def test_the_table_of_references():
    """`episodes` and `versions` are empty where the source doesn't say what it measured."""
    with open(ROOT / "results/reference_scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["dataset", "environment", "ref_min", "ref_max", "source", "episodes", "versions"]
    gymnasium.register_envs(gymnasium_robotics)
    assert all(list(row) == columns for row in rows)
    assert len({row["dataset"] for row in rows}) == len(rows)
    for row in rows:
        assert float(row["ref_min"]) < float(row["ref_max"])
        assert row["source"]
        gymnasium.spec(row["environment"])  # raises where there is none
        assert not row["dataset"].startswith("reef/")
        assert row["dataset"].startswith("D4RL/pointmaze/") == ("unchecked" in row["source"])


@pytest.mark.parametrize("algorithm", OFFLINE)
def test_every_dataset_has_its_config(algorithm):
    here = [file for file in LEARNERS if file.startswith(f"configs/offline/{algorithm}/")]
    plain = [read(file)["dataset"] for file in here if "variant" not in read(file)]
    plain = [dataset for dataset in plain if not dataset.startswith("D4RL/antmaze/")]  # some have these too
    labelled = LABELLED if algorithm == "iql" else []  # its experiment with hidden rewards
    plays = OGBENCH if algorithm in ("bc", "iql", "fql", "q_chunking") else []
    assert sorted(plain) == sorted([*references(), *MAZES, *WALKERS, *labelled, *plays])


@pytest.mark.parametrize("algorithm", ["bc", "bcq", "cql", "dqn", "dt", "iql"])
def test_every_dataset_of_choices_has_its_config(algorithm):
    here = [read(file) for file in LEARNERS if file.startswith(f"configs/discrete/{algorithm}/")]
    wanted = [*SEPSIS, *MINATAR, *ATARI, *SCREENS, *MINIGRID]
    assert sorted(values["dataset"] for values in here if "variant" not in values) == sorted(wanted)


@pytest.mark.parametrize("dataset", [*ATARI, *SCREENS])
def test_atari_is_learnt_as_published(dataset):
    """Kumar et al. (2020), Fujimoto et al. (2019): the numbers of their code."""
    cql, bcq = (read(f"configs/discrete/{algorithm}/{dataset}.yaml") for algorithm in ("cql", "bcq"))
    assert (cql["batch_size"], cql["critic_lr"], cql["cql_weight"]) == (32, 5e-5, 4 / 100)
    assert (bcq["batch_size"], bcq["critic_lr"], bcq["actor_lr"]) == (32, 6.25e-5, 6.25e-5)
    assert (cql["tau"], bcq["tau"]) == (1 / 2000, 1 / 8000)


@pytest.mark.parametrize("algorithm", ["bc", "bcq", "cql", "dqn", "dt", "iql"])
def test_prepared_screens_are_learnt_as_the_log_that_they_are_made_of(algorithm):
    for log, dataset in zip(ATARI, SCREENS):
        ours, theirs = (read(f"configs/discrete/{algorithm}/{name}.yaml") for name in (dataset, log))
        assert ours == theirs | {"dataset": dataset}
        assert read(f"configs/collect/{dataset.removeprefix('reef/')}.yaml").get("source", ATARI[0]) == log


@pytest.mark.parametrize("algorithm", FINETUNE)
def test_every_algorithm_that_goes_on_online_has_its_configs(algorithm):
    """Local ones, 20,000 steps with an evaluation every 1,000 of them; AntMaze, pen and door of the hub."""
    here = [file for file in LEARNERS if file.startswith(f"configs/finetune/{algorithm}/")]
    local = [read(file) for file in here if "/reef/" in file]
    wanted = [f"reef/pointmaze/{maze}-v0" for maze in ("medium", "umaze")]
    plain = [values["dataset"] for values in local if "variant" not in values]
    assert sorted(plain) == ["reef/halfcheetah/medium-replay-v1", *wanted]
    usual = script_of(here[0]).Config().updates_per_step
    steps = {values["eval_every"] / values.get("updates_per_step", usual) for values in local}
    assert ({values["online_steps"] for values in local}, steps) == ({20_000}, {1000})
    hub = sorted(read(file)["dataset"] for file in here if "/reef/" not in file)
    hands = [name for name in references() if name.startswith(("D4RL/pen/", "D4RL/door/"))]
    antmazes = [file for file in LEARNERS if file.startswith("configs/offline/rebrac/D4RL/antmaze/")]
    assert hub == sorted([*hands, *(read(file)["dataset"] for file in antmazes)])


def test_every_maze_and_walker_has_its_ten_percent_imitation():
    files = [file for file in LEARNERS if file.startswith("configs/offline/bc/")]
    top10 = [read(file) for file in files if "variant" in read(file)]
    walkers = [name for name in references() if name.startswith("mujoco/")] + WALKERS
    assert sorted(values["dataset"] for values in top10) == sorted([*walkers, *MAZES])
    assert all((values["variant"], values["fraction"]) == ("top10", 0.1) for values in top10)


def test_local_datasets_are_learnt_for_50_000_updates():
    fewer = {"cql": 10_000, "dt": 10_000, "lb_sac": 12_500, "trajectory_transformer": 5000,
             "diffuser": 20_000, "lamo": 3000}
    wanted = {file: fewer.get(file.split("/")[2], 50_000) for file in LEARNERS}
    wanted |= {file: 10_000 for file in LEARNERS if "/finetune/" in file}
    for name, updates in {"iql": 20_000, "dt": 4000}.items():  # both stand still before that
        wanted |= {file: updates for file in LEARNERS if f"discrete/{name}/reef/sepsis/" in file}
    for dataset in ("pointmaze/umaze-v0", "halfcheetah/medium-replay-v1"):  # a quarter of an hour
        wanted[f"configs/offline/bear/reef/{dataset}.yaml"] = 20_000
    for name in ("mopo", "morel"):  # still rising
        wanted[f"configs/offline/{name}/reef/halfcheetah/medium-replay-v1.yaml"] = 100_000
    # one makes none offline; lives, tasks and screens have updates of their own
    others = ("/rlpd/", "/context/", "/reef/atari/")
    ours = [file for file in LEARNERS if "/reef/" in file and not any(name in file for name in others)]
    found = {file: read(file)["updates"] for file in ours if read(file).get("variant") != "published"}
    assert [f"{file}: {updates}" for file, updates in found.items() if updates != wanted[file]] == []


def test_mazes_are_evaluated_over_100_episodes():
    """And nothing else is, but where every step is planned: that would take longer than learning."""
    mazes = [file for file in LEARNERS if "maze" in read(file)["dataset"]]
    mazes = [file for file in mazes if "/trajectory_transformer/" not in file]
    assert [file for file in LEARNERS if read(file).get("eval_episodes") == 100] == mazes
