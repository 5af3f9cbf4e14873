"""The two commands work from nothing, and every place that repeats them or their needs says the same."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PYTHON, PACKAGES, COMMANDS = "3.11", {"make", "git", "g++"}, ["make test", "make demo"]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def text(path: str) -> str:
    return (ROOT / path).read_text()


def requirements() -> dict[str, str]:
    """name -> version; fails on a line that pins nothing."""
    lines = [line.split("#")[0].strip() for line in text("requirements.txt").splitlines()]
    pins = [re.fullmatch(r"([a-z0-9-]+)(?:\[[a-z0-9,]+\])?==(\d+(?:\.\d+)+)", line) for line in lines if line]
    assert all(pins)
    return {pin[1]: pin[2] for pin in pins}


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """`make`, with nothing inherited from the make that may be running these tests."""
    ours = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "TORCH_INDEX", "ID")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)


# ---------------------------------------- the places that repeat it -----------------------------------------


def test_dockerfile_makes_the_environment_and_runs_the_demo():
    """It runs no test: an image that is built says nothing of the machine it will run on."""
    lines = [line for line in text("Dockerfile").splitlines() if line and not line.startswith("#")]
    install = "RUN apt-get update && apt-get install --yes --no-install-recommends "
    packages = lines[1].removeprefix(install).split(" && ")[0]
    assert set(packages.split()) == PACKAGES
    assert lines == [
        f"FROM python:{PYTHON}-slim",
        f"{install}{packages} && rm -rf /var/lib/apt/lists/*",
        "WORKDIR /reef",
        "COPY . .",
        f"ARG TORCH_INDEX={CPU_INDEX}",
        "RUN make .venv/complete",
        f"CMD {json.dumps(COMMANDS[1].split())}",
    ]


def test_readme_names_commands_python_and_packages():
    readme = text("README.md")
    assert all(command in readme for command in COMMANDS)
    assert "TORCH_INDEX" in readme
    needs = [f"Python {PYTHON}", *PACKAGES, "python3-dev"]  # which the Dockerfile's image has
    paragraphs = re.split(r"\n\s*\n", readme)
    assert any(all(need in paragraph for need in needs) for paragraph in paragraphs), f"none names {needs}"


def test_workflow_and_ci_call_make_test():
    workflow = yaml.safe_load(text(".github/workflows/test.yml"))
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [f"make test TORCH_INDEX={CPU_INDEX}"]
    assert [step["with"]["python-version"] for step in steps if "with" in step] == [PYTHON]
    assert text(".ci/run").splitlines()[-1] == "make test"
    assert "set -euo pipefail" in text(".ci/run")
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_every_requirement_is_pinned_and_installed():
    pins = requirements()
    assert next(iter(pins)) == "torch"
    assert {name: version(name).split("+")[0] for name in pins} == pins


def test_every_import_is_required():
    """What our Python files import is in requirements.txt, not only brought along by something that is."""
    files = [path for folder in ("algorithms", "tools", "tests") for path in (ROOT / folder).rglob("*.py")]
    known = {*sys.stdlib_module_names, *(path.stem for path in files)}
    # of one program and of one family, which say where it is missing
    lines = (text("requirements-tune.txt") + text("requirements-language.txt")).splitlines()
    known |= {line.partition("==")[0] for line in lines if "==" in line}
    pins, missing = requirements(), set()
    distributions = {
        name: {distribution.lower().replace("_", "-") for distribution in found}
        for name, found in packages_distributions().items()
    }
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.split(".")[0] for name in names} - known:
                if not distributions.get(name, set()) & {*pins}:
                    missing.add(f"{path.relative_to(ROOT)}: {name}")
    assert missing == set()


def test_ruff_finds_nothing():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


# ----------------------------------------------- the Makefile -----------------------------------------------


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("test", "-m pytest --numprocesses 2 --dist loadfile"),
        ("demo", "tools/demo.py"),
        ("bench", "tools/bench.py"),
        ("scores", "tools/scores.py"),
        ("lint", "-m ruff check"),
    ],
)
def test_targets_run(target, command):
    stamps = [f"--old-file=.venv/{name}" for name in ("complete", "discrete", "transformers")]
    result = make("--dry-run", *stamps, target)
    assert result.stdout.splitlines()[-1] == f".venv/bin/python {command}", result.stderr
    for word in command.split():
        assert not word.endswith(".py") or (ROOT / word).is_file()


def test_demo_makes_its_dataset_first():
    lines = make("--dry-run", "--old-file=.venv/complete", "demo").stdout.splitlines()
    recipe = "--config_path configs/collect/pointmaze/umaze-v0.yaml"
    assert lines[-2:] == [
        f".venv/bin/python algorithms/collect/pointmaze.py {recipe}",
        ".venv/bin/python tools/demo.py",
    ]


def recipes() -> list[str]:
    folder = ROOT / "configs/collect"  # sac/ has no datasets but the settings of those who make them
    files = {*folder.rglob("*.yaml")} - {*folder.glob("sac/*")}
    return sorted(f"reef/{path.relative_to(folder).with_suffix('')}" for path in files)


def test_every_recipe_has_its_command():
    assert recipes()
    for dataset in recipes():
        result = make("--dry-run", "--old-file=.venv/complete", "dataset", f"ID={dataset}")
        script, _, recipe = result.stdout.splitlines()[-1].split()[1:]
        assert (ROOT / script).is_file()
        assert yaml.safe_load(text(recipe))["dataset"] == dataset


@pytest.mark.parametrize("arguments", [[], ["ID="], ["ID=reef/nothing-v0"], ["ID=pointmaze/umaze-v0"]])
def test_a_dataset_without_recipe_is_one_clear_line(arguments):
    result = make("dataset", *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert all(dataset in result.stderr for dataset in recipes())
    assert (arguments[0].removeprefix("ID=") if arguments else "make dataset ID=") in result.stderr


def test_make_alone_says_what_there_is():
    lines = make().stdout
    targets = re.search(r"^\.PHONY:(.*)", text("Makefile"), re.MULTILINE)[1].split()
    for target in {*targets} - {"help", "known-dataset"}:
        assert re.search(rf"^make {target}\b", lines, re.MULTILINE)
    assert "TORCH_INDEX=" in lines
    assert CPU_INDEX in lines


@pytest.fixture
def sandbox(tmp_path):
    """The Makefile beside a Python that only notes down what it is asked to do."""
    (tmp_path / "Makefile").write_text(text("Makefile"))
    (tmp_path / "requirements.txt").write_text("torch==1.2.3\nother==4.5\n")
    (tmp_path / "requirements-discrete.txt").write_text("more==6.7\n")
    (tmp_path / "requirements-language.txt").write_text("words==8.9\n")
    stub = f"""#!/bin/sh
if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
echo "$*" >> log
if [ -e broken ] && [ "$2" = pip ]; then exit 1; fi
if [ "$2" = venv ]; then rm -rf .venv; mkdir -p .venv/bin; cp python .venv/bin/python; fi
"""
    (tmp_path / "python").write_text(stub)
    (tmp_path / "python").chmod(0o755)

    def run(*arguments: str) -> tuple[int, list[str]]:
        """`make test` and what it asked Python to do since the last time."""
        (tmp_path / "log").write_text("")
        result = make("test", "PYTHON=./python", *arguments, cwd=tmp_path)
        return result.returncode, (tmp_path / "log").read_text().splitlines()

    return tmp_path, run


MADE = [
    "-m venv --clear .venv",
    "-m pip install torch==1.2.3",
    "-m pip install -r requirements.txt",
    "-m pip install --no-deps -r requirements-discrete.txt",
    "-m pip install -r requirements-language.txt",
    "-m pytest --numprocesses 2 --dist loadfile",
]


def test_the_environment_is_made_once_and_again_when_requirements_change(sandbox):
    folder, run = sandbox
    assert run() == (0, MADE)
    assert run() == (0, MADE[-1:])
    assert run("TORCH_INDEX=https://elsewhere") == (0, MADE[-1:])
    later = (folder / ".venv/complete").stat().st_mtime + 10
    os.utime(folder / "requirements.txt", (later, later))
    assert run() == (0, MADE)


def test_torch_index_is_for_torch_alone(sandbox):
    _, run = sandbox
    torch = "-m pip install --index-url https://elsewhere/cpu torch==1.2.3"
    assert run("TORCH_INDEX=https://elsewhere/cpu") == (0, [MADE[0], torch, *MADE[2:]])


def test_a_half_made_environment_does_not_count(sandbox):
    folder, run = sandbox
    (folder / "broken").touch()
    assert run() == (2, MADE[:2])
    assert (folder / ".venv/bin/python").exists()
    (folder / "broken").unlink()
    assert run() == (0, MADE)


@pytest.mark.parametrize("python", ["./old", "./missing"])
def test_an_old_or_missing_python_is_one_clear_line(sandbox, python):
    folder, _ = sandbox
    (folder / "old").write_text("#!/bin/sh\nexit 1\n")  # how the version check ends
    (folder / "old").chmod(0o755)
    result = make("test", f"PYTHON={python}", cwd=folder)
    assert result.returncode == 2
    assert result.stdout == ""
    first, *rest = result.stderr.splitlines()
    assert first.startswith(f"Reef needs Python {PYTHON} or newer, and {python} is not")
    assert [line.split(":")[0] for line in rest] == ["make"]  # make's own word that the recipe failed
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize("there", [True, False])
def test_without_pythons_headers_there_is_a_warning(sandbox, there):
    """A run would compile its losses, and end in Inductor's traceback."""
    folder, _ = sandbox
    if there:
        (folder / "include").mkdir()
        (folder / "include/Python.h").touch()
    elsewhere = f"import sys, sysconfig; sysconfig.get_path = '{folder}/{{}}'.format; exec(sys.argv[1])"
    stub = (folder / "python").read_text()
    assert f'exec {sys.executable} "$@"' in stub
    stub = stub.replace(f'exec {sys.executable} "$@"', f'exec {sys.executable} -c "{elsewhere}" "$2"')
    (folder / "python").write_text(stub)
    result = make("test", "PYTHON=./python", cwd=folder)
    warning = "no Python.h: install python3-dev, or give every run --compile false\n"
    assert (result.returncode, result.stderr) == (0, "" if there else warning)
    assert (folder / "log").read_text().splitlines() == MADE
