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
WALKERS = [f"reef/{body}/{level}-v0" for body in BODIES for level in LEVELS]
ALGORITHMS = sorted(path.stem for path in (ROOT / "algorithms/offline").glob("*.py"))
MAX_LINES = 8


def references() -> dict[str, dict[str, str]]:
    with open(ROOT / "results/reference_scores.csv", newline="") as file:
        return {row["dataset"]: row for row in csv.DictReader(file)}


@cache
def script_of(file: str):
    """The script that configs/<family>/<algorithm>/... or configs/collect/<environment>/... belongs to."""
    family, algorithm = Path(file).parts[1:3]
    if family == "collect" and algorithm not in ("pointmaze", "sac"):
        algorithm = "rollouts"
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


def read(file: str) -> dict:
    return yaml.safe_load((ROOT / file).read_text())


def location(file: str) -> str:
    """<dataset id>[-<variant>] as the path has it; recipes leave out reef/."""
    family, *rest = Path(file).with_suffix("").parts[1:]
    return "/".join(["reef", *rest]) if family == "collect" else "/".join(rest[1:])


@pytest.mark.parametrize("file", FILES)
def test_loads_into_its_script(file):
    assert file.endswith(".yaml")
    values, script = read(file), script_of(file)
    config = script.parse_config(["--config_path", str(ROOT / file)])
    defaults = {field.name: field.default for field in dataclasses.fields(script.Config)}
    assert set(values) <= set(defaults)
    for name, value in values.items():
        loaded = getattr(config, name)
        assert loaded == value, f"{name}: YAML reads {value!r}, the script {loaded!r}"
        assert isinstance(loaded, bool) == isinstance(value, bool)
        if name not in ("dataset", "environment"):  # these are said even where they are the default
            assert loaded != defaults[name], f"{name}: {value} is the default"
    for name in set(defaults) - set(values):
        assert getattr(config, name) == defaults[name]


@pytest.mark.parametrize("file", RECIPES + LEARNERS)
def test_agrees_with_its_path(file):
    values = read(file)
    variant = f"-{values['variant']}" if "variant" in values else ""
    assert location(file) == values["dataset"] + variant


@pytest.mark.parametrize("file", FILES)
def test_is_short_and_names_a_field_once(file):
    lines = (ROOT / file).read_text().splitlines()
    assert len(lines) <= MAX_LINES
    assert len([line for line in lines if not line.startswith("#")]) == len(read(file))


def test_every_local_dataset_has_its_recipe():
    assert sorted(read(file)["dataset"] for file in RECIPES) == sorted(MAZES + WALKERS)


@pytest.mark.parametrize("dataset", WALKERS)
def test_recipes_of_walkers_take_their_own_environment_and_policies(dataset):
    _, body, level = dataset.removesuffix("-v0").split("/")
    file = f"configs/collect/{body}/{level}-v0.yaml"
    config = script_of(file).parse_config(["--config_path", str(ROOT / file)])
    policies = {"medium-replay": "replay-*", "medium-expert": "medium expert", "expert-narrow": "expert"}
    assert config.environment == BODIES[body]
    assert config.policies == policies.get(level, level)
    assert config.folder == f"results/behavior/{body}" or level == "random"
    assert config.episodes == (10 if level == "expert-narrow" else 0)
    assert (config.steps, config.seed) == (200_000, 0)


@pytest.mark.parametrize("file", LEARNERS)
def test_references_are_those_of_the_table(file):
    values, table = read(file), references()
    found = {name: values[name] for name in ("ref_min", "ref_max") if name in values}
    if values["dataset"].startswith("reef/"):  # these carry their references
        assert found == {}
        assert (ROOT / "configs/collect" / (values["dataset"].removeprefix("reef/") + ".yaml")).is_file()
    else:
        row = table[values["dataset"]]
        assert found == {"ref_min": float(row["ref_min"]), "ref_max": float(row["ref_max"])}


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


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_dataset_has_its_config(algorithm):
    here = [file for file in LEARNERS if file.startswith(f"configs/offline/{algorithm}/")]
    plain = [read(file)["dataset"] for file in here if "variant" not in read(file)]
    assert sorted(plain) == sorted([*references(), *MAZES, *WALKERS])


def test_every_maze_and_walker_has_its_ten_percent_imitation():
    files = [file for file in LEARNERS if file.startswith("configs/offline/bc/")]
    top10 = [read(file) for file in files if "variant" in read(file)]
    walkers = [name for name in references() if name.startswith("mujoco/")] + WALKERS
    assert sorted(values["dataset"] for values in top10) == sorted([*walkers, *MAZES])
    assert all((values["variant"], values["fraction"]) == ("top10", 0.1) for values in top10)


@pytest.mark.parametrize("file", [file for file in LEARNERS if "/reef/" in file])
def test_local_datasets_are_learnt_for_50_000_updates(file):
    slow = "/cql/" in file or "/dt/" in file
    assert read(file)["updates"] == (10_000 if slow else 50_000)


@pytest.mark.parametrize("file", LEARNERS)
def test_mazes_are_evaluated_over_100_episodes(file):
    assert (read(file).get("eval_episodes") == 100) == ("maze" in read(file)["dataset"])
