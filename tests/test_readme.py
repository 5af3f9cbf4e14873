"""README.md and docs/: their Python runs, their commands and files exist, their tables are not stale."""

import itertools
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import minari
import pandas as pd
import pytest
from conftest import load_script, random_episodes, short

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
JOINED = re.sub(r" *\\\n +", " ", README)  # a command that goes on in the next line is one
COMMANDS = re.findall(r"^    \.venv/bin/python algorithms/(\w+/\w+\.py)(.*)$", JOINED, re.MULTILINE)
COMMANDS += re.findall(r"`\.venv/bin/python algorithms/(\w+/\w+\.py)([^`]*)`", JOINED)  # within a sentence
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
SHELL = ["".join(pair) for pair in re.findall(r"`([^`\n]+)`|^    (.+)$", PROSE, re.MULTILINE)]  # or indented


def block(word: str) -> str:
    """The one block of Python with `word` in it."""
    (found,) = [text for text in BLOCKS if word in text]
    return found


def execute(text: str) -> dict:
    """What a block defines, run in a file of its own."""
    Path("block.py").write_text(text)
    return runpy.run_path("block.py")


@pytest.fixture
def here(tmp_path, monkeypatch, minari_root) -> Path:
    """A folder like the repository's root, to work in."""
    (tmp_path / "algorithms").symlink_to(ROOT / "algorithms")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_every_block_of_python_is_run():
    assert len(BLOCKS) == 6  # two of them by tests/test_dpo.py and tests/test_dpt.py


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_your_own_data_in_15_lines(here, call):
    text = block("create_dataset_from_buffers")
    assert len(text.strip().splitlines()) <= 15
    execute(text)
    dataset = minari.load_dataset("mine/pendulum-v0")
    assert (dataset.total_episodes, dataset.total_steps) == (20, 4000)
    path, arguments = next(pair for pair in COMMANDS if "mine/pendulum-v0" in pair[1])
    small = [argument for argument in short("mine/pendulum-v0", here) if "dataset" not in argument]
    status, out, err = call(Path(path).stem, *arguments.split(), *small)
    assert status == 0, err
    assert "20 episodes, 4,000 steps" in out


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_a_finished_policy_in_five_lines(here, call):
    text = block("policy.act")
    assert len(text.strip().splitlines()) <= 5
    env = gym.make("InvertedPendulum-v5")  # like the maze it shows 4 numbers
    minari.create_dataset_from_buffers("test/four-v0", random_episodes(env, 5), env=env)
    status, _, err = call("td3_bc", *short("test/four-v0", here / "made"))
    assert status == 0, err
    folder = here / re.search(r'"(results/runs/.+?)"', text)[1]
    folder.parent.mkdir(parents=True)
    (here / "made/offline/td3_bc/test/four-v0/default/seed-0").rename(folder)
    names = execute(text)
    assert names["action"].shape == (1,)
    names["policy"].act([[0.0, 0.0, 0.0, 0.0]] * 7)
    files = {path.name + "/" * path.is_dir() for path in folder.iterdir()} - {"lock"}
    told = re.findall(r"^\| `(\S+)` \|", (ROOT / "docs/runs.md").read_text(), re.MULTILINE)
    assert files | {"wandb/"} == {*told}
    assert str(folder.relative_to(here)) + "/" in README.replace("`\n", "`")


def test_curves_without_wandb(here):
    rows = [("reef/pointmaze/umaze-v0", algorithm, "default", seed, update, "training", seed + update)
            for algorithm, seed, update in itertools.product(("bc", "iql"), (0, 2), (10, 20))]
    columns = ["dataset", "algorithm", "variant", "seed", "update", "phase", "score"]
    (here / "results/scores").mkdir(parents=True)
    for name, table in pd.DataFrame(rows, columns=columns).groupby("algorithm"):
        table.to_csv(here / f"results/scores/{name}.csv", index=False)
    names = execute(block("groupby"))
    assert names["curves"]["bc"].to_dict() == names["curves"]["iql"].to_dict() == {10: 11, 20: 21}
    assert (here / "curves.png").exists()


@pytest.mark.parametrize(("path", "arguments"), sorted({*COMMANDS}))
def test_commands_are_real(monkeypatch, path, arguments):
    """Scripts read what stands behind their names: fields, values and the configs' files."""
    monkeypatch.chdir(ROOT)
    script, words = load_script(path), shlex.split(arguments)
    if hasattr(script, "parse_config"):
        given = dict(zip(words[::2], words[1::2], strict=True))
        config = script.parse_config(words)
        assert "--dataset" not in given or given["--dataset"] == config.dataset
    else:
        assert not words  # a tutorial


def test_every_command_of_a_script_is_seen():
    assert len(COMMANDS) == README.count("python algorithms/")
    assert {path.split("/")[0] for path, _ in COMMANDS} >= {"offline", "finetune", "discrete", "evaluate"}


def test_targets_of_make_are_told_and_real():
    targets = re.search(r"^\.PHONY:(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    called = {found[1] for text in SHELL if (found := re.match(r"make ([a-z-]+)", text))}
    assert called == {*targets} - {"help", "known-dataset", "lint"}


LINKED = [str(page.relative_to(ROOT)) for page in [*PAGES, ROOT / "results/scores/README.md"]]


def test_a_readme_of_two_screens():
    """Of what a reader has to read: tables of algorithms grow with them."""
    lines = PAGES[0].read_text().splitlines()
    assert len([line for line in lines if not line.startswith("|")]) <= 110


@pytest.mark.parametrize("file", LINKED)
def test_links_lead_somewhere(file):
    """To a file, and to a heading where they name one."""
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / file).read_text())
    for link in links:
        path, _, heading = link.partition("#")
        target = ROOT / Path(file).parent / path
        assert link.startswith("https://") or target.exists(), link
        headings = [line.strip("# ").lower().replace(" ", "-") for line in target.read_text().splitlines()
                    if line.startswith("#")] if heading else []
        assert not heading or heading in headings, link


def test_files_named_in_commands_exist():
    for text in SHELL:
        for word in re.findall(r"(?:algorithms|configs)/[\w./-]+", text):
            assert (ROOT / word).exists(), word


def test_datasets_have_configs():
    """Every id that the README names, with what stands in braces written out."""
    section = README.partition("## Datasets")[2].partition("\n## ")[0]
    patterns = re.findall(r"((?:reef|mujoco|D4RL)/[\w{},/-]+-v\d)", section)
    assert len(patterns) > 4
    for pattern in patterns:
        parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
        for words in itertools.product(*parts):
            assert [*ROOT.glob(f"configs/*/bc/{''.join(words)}.yaml")]


def test_tables_are_not_stale():
    command = [sys.executable, "tools/scores.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
