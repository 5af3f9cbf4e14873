"""The form of a script: same name, same code; imports nothing of ours; imported, does nothing; is short."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import same_code

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [str(path.relative_to(ROOT)) for path in same_code.scripts(ROOT)]
FAMILIES = ("algorithms/offline/", "algorithms/discrete/", "algorithms/finetune/", "algorithms/language/",
            "algorithms/context/")
LEARNERS = [path for path in SCRIPTS if path.startswith(FAMILIES)]
MAX_WIDTH = 110
LIMITS = {  # own part, train, first line of `update`, toolbox with its banner; the longest name counts
    "algorithms/": (330, 50, 150, 662),
    "algorithms/discrete/": (330, 50, 150, 772),  # states, vectors, planes, images of Dicts; masks
    "algorithms/discrete/dt.py": (383, 50, 150, 772),  # a transformer as well as convolutions
    "algorithms/finetune/": (370, 60, 161, 843),  # a second phase, in an environment
    "algorithms/finetune/wsrl.py": (370, 62, 161, 843),  # steps without updates between the phases
    "algorithms/offline/diffuser.py": (446, 50, 150, 662),  # a temporal U-Net and a network of returns
    "algorithms/offline/trajectory_transformer.py": (480, 50, 150, 662),  # tokens, a transformer and plans
    "algorithms/language/": (415, 50, 150, 662),  # layers of another library, LoRA, shares of a log
    "algorithms/language/dpo.py": (466, 50, 150, 662),  # texts, a reference, continuations
    "algorithms/context/": (380, 50, 150, 662),  # lives, and how they are lived
    "algorithms/context/multitask.py": (446, 50, 150, 662),  # several sets and environments
    "algorithms/context/retrieval.py": (480, 50, 170, 662),  # a memory as well
    "algorithms/offline/mopo.py": (474, 50, 150, 771),  # a model to fit, to check and to roll out
    "algorithms/offline/combo.py": (474, 50, 150, 771),
    "algorithms/offline/morel.py": (474, 50, 150, 771),
}
ASKING = r"\bhasattr\(|\bgetattr\(learner\b"  # a toolbox that asks a learner what it is


def test_there_are_scripts():
    assert {f"algorithms/offline/{name}.py" for name in ("bc", "td3_bc", "iql")} <= {*LEARNERS}


def test_same_name_same_code():
    assert same_code.differences(ROOT) == []


# ------------------------------------------- the form of a script -------------------------------------------


def repo_imports(tree: ast.Module) -> list[str]:
    """What a script imports from the repo: its folders, its scripts, anything relative."""
    ours = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for folder in ("algorithms", "tests", "tools"):
        ours |= {path.stem for path in (ROOT / folder).rglob("*.py")}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in ours]
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] in ours):
            found.append("." * node.level + (node.module or ""))
    return found


def effects(tree: ast.Module) -> list[int]:
    """Lines of the module-level statements that are more than definitions: calls, loops, branches."""
    found = []
    for node in tree.body:
        if isinstance(node, (*same_code.DEFINITIONS, ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        constant = isinstance(node, (ast.Assign, ast.AnnAssign))
        calls = [part for part in ast.walk(node) if isinstance(part, (ast.Call, ast.Await))]
        if not constant or len(calls) > same_code.is_new_type(node):
            found.append(node.lineno)
    return found


def dead_fields(tree: ast.Module) -> list[str]:
    """Config fields that no line outside Config reads as `<config>.field`."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    config = next((node for node in classes if node.name == "Config"), None)
    if config is None:
        return []
    inside = {*ast.walk(config)}
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node not in inside
        if re.fullmatch(r"c|(\w+\.)*config", ast.unparse(node.value))
    }
    fields = [node.target.id for node in config.body if isinstance(node, ast.AnnAssign)]
    return [field for field in fields if field not in read]


def update_line(tree: ast.Module) -> int | None:
    """Where the algorithm's `update` starts."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    methods = [node for cls in classes for node in cls.body if isinstance(node, ast.FunctionDef)]
    return min((node.lineno for node in methods if node.name == "update"), default=None)


def asks(source: str) -> list[int]:
    """Lines that ask what a learner has, but for those that collect its states or compile its methods."""
    found = []
    for number, line in enumerate(source.splitlines(), 1):
        if re.search(ASKING, line) and "state_dict" not in line and "torch.compile" not in line:
            found.append(number)
    return found


def tree_of(script: str) -> ast.Module:
    return ast.parse((ROOT / script).read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_nothing_from_the_repo(script):
    assert repo_imports(tree_of(script)) == []
    assert "sys.path" not in (ROOT / script).read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_module_level_only_defines(script):
    assert effects(tree_of(script)) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_config_field_is_read(script):
    assert dead_fields(tree_of(script)) == []


@pytest.mark.parametrize("script", LEARNERS)
def test_short_narrow_and_update_early(script):
    source, tree = (ROOT / script).read_text(), tree_of(script)
    lines = source.splitlines()
    (banner,) = [number for number, line in enumerate(lines) if re.match("# -+ Toolbox", line)]
    name = max((name for name in LIMITS if script.startswith(name)), key=len)
    own, of_train, first, toolbox = LIMITS[name]
    assert banner <= own
    assert len(lines) - banner <= toolbox
    assert [number for number, line in enumerate(lines, 1) if len(line) > MAX_WIDTH] == []
    (train,) = [node for node in tree.body if getattr(node, "name", "") == "train"]
    assert train.end_lineno - train.lineno < of_train
    assert train.end_lineno <= banner
    line = update_line(tree)
    assert line is not None
    assert line <= first


@pytest.mark.parametrize("script", LEARNERS)
def test_asks_no_learner_what_it_has(script):
    assert asks((ROOT / script).read_text()) == []


@pytest.mark.parametrize("script", LEARNERS)
def test_docstring_says_what_and_how(script):
    docstring = ast.get_docstring(tree_of(script))
    assert f"python {script}" in docstring  # the command that runs it
    assert re.search(r"arXiv:\d{4}\.\d{5}", docstring) or script.endswith("/bc.py")


def test_importing_scripts_does_nothing(tmp_path):
    """All scripts in one process: nothing printed, written, seeded or set."""
    program = """
import contextlib, importlib.util, io, os, random, sys, warnings
import gymnasium, gymnasium_robotics, matplotlib, minari, numpy, torch, wandb  # these may do as they like

def state():
    return (dict(os.environ), sys.argv[:], sys.path[:], random.getstate(), str(numpy.random.get_state()),
            torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),
            torch.get_float32_matmul_precision(), torch.is_grad_enabled(), warnings.filters[:])

before, printed = state(), io.StringIO()
for path in sys.argv[1:]:
    name = "imported_" + path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        spec.loader.exec_module(sys.modules[name])
    assert state() == before, path
    assert printed.getvalue() == "", (path, printed.getvalue())
"""
    scripts = [str(ROOT / script) for script in SCRIPTS]
    command = [sys.executable, "-W", "ignore", "-B", "-c", program, *scripts]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------- the checks above, checked -----------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "import tests",
        "import td3_bc",
        "import tools.scores as scores",
        "from algorithms.offline import bc",
        "from . import bc",
        "from .bc import act",
    ],
)
def test_repo_imports_are_seen(source):
    assert repo_imports(ast.parse(source))
    assert repo_imports(ast.parse(f"def f():\n    {source}"))


def test_other_imports_are_not():
    assert repo_imports(ast.parse("import torch.nn as nn\nfrom dataclasses import dataclass")) == []


@pytest.mark.parametrize(
    "source",
    [
        "print(1)",
        "x = f(1)",
        "x: int = f(1)",
        "X = NewType('X', f(1))",
        "X = NewType('X', int)(1)",
        "x += 1",
        "for x in y:\n    z = x",
        "if a:\n    b = 1",
        "with a:\n    b = 1",
    ],
)
def test_effects_are_seen(source):
    assert effects(ast.parse(source)) == [1]


def test_definitions_are_no_effects():
    source = """
'''Docstring.'''
import os
LIMIT = 10 * (2 + 3)
NAMES: tuple = ("a", "b")
Count = NewType("Count", int)
@decorator(1)
class A(f(2)):
    x: int = field(3)
def g(): print(4)
if __name__ == "__main__":
    g()
"""
    assert effects(ast.parse(source)) == []


def test_dead_fields_are_seen():
    source = """
class Config:
    used: int = 1
    also: int = 1
    dead: int = 1
    written: int = 1
    other: int = 1
    inside: int = 1
    def check(self): return self.inside + config.inside
def f(self, config, thing):
    config.written = self.config.used + config.also
    return thing.other, "dead"
"""
    assert dead_fields(ast.parse(source)) == ["dead", "written", "other", "inside"]


def test_asking_is_seen():
    fine = [
        "if hasattr(part, 'state_dict'):",
        "method = torch.compile(getattr(learner, name))",
        "array = getattr(episode, field)",
    ]
    bad = ["if hasattr(learner, 'start'):", "if not hasattr(c, 'tau'):", "hook = getattr(learner, name, 0)"]
    assert asks("\n".join(fine)) == []
    assert asks("\n".join([*fine, *bad])) == [4, 5, 6]


def test_update_line():
    assert update_line(ast.parse("def update(): pass\nclass A:\n    x = 1\n    def update(self): pass")) == 4
    assert update_line(ast.parse("def update(): pass")) is None


# -------------------------------------------- the command, tried --------------------------------------------


@pytest.fixture
def repo(tmp_path):
    """Writes scripts under tmp_path/algorithms and returns their folder."""

    def make(**sources: str) -> Path:
        for name, source in sources.items():
            path = tmp_path / "algorithms" / "offline" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.encode())
        return tmp_path / "algorithms" / "offline"

    return make


def command(root: Path, *arguments) -> subprocess.CompletedProcess:
    program = [sys.executable, same_code.__file__, "--root", root, *arguments]
    return subprocess.run([str(word) for word in program], capture_output=True, text=True, check=False)


def test_equal_trees_are_equal_whatever_the_layout(repo, tmp_path):
    repo(
        a="def f(x):\n    return x + 1\n",
        b="# a comment\ndef f( x ):\n\n    # another\n    return (x +\n            1)\n",
    )
    assert same_code.differences(tmp_path) == []
    result = command(tmp_path)
    assert (result.returncode, result.stdout) == (0, "0 differences in 2 scripts\n")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("def f(x): return 1", "def f(x): return 2"),
        ("def f(x): return x", "def f(x=1): return x"),
        ("def f(x): return x", "def f(x: int): return x"),
        ("def f(x): return x", "async def f(x): return x"),
        ("def f(): pass", "class f: pass"),
        ("def f(): 'Doc.'", "def f(): 'Other.'"),
        ("@g\ndef f(): pass", "def f(): pass"),
        ("@g(1)\nclass F: pass", "@g(2)\nclass F: pass"),
        ("class F(A): pass", "class F(B): pass"),
        ("class F:\n    def m(self): return 1", "class F:\n    def m(self): return 2"),
        ("def f():\n    def g(): return 1\n    return g", "def f():\n    def g(): return 2\n    return g"),
    ],
)
def test_a_difference_is_found_and_repaired(repo, tmp_path, ours, theirs):
    folder = repo(a=f"A = 1\n{ours}\n", b=f"B = 1\n\n\n{theirs}\n\n\nB = 2\n")
    name = "F" if "F" in ours else "f"
    line = 1 + ours.startswith("@")  # of the name, below its decorator
    other = 3 + theirs.startswith("@")
    report = f"{name} differs: algorithms/offline/a.py:{line + 1} / algorithms/offline/b.py:{other + 1}"
    assert same_code.differences(tmp_path) == [report]
    result = command(tmp_path)
    assert (result.returncode, result.stdout) == (1, f"{report}\n1 differences in 2 scripts\n")

    result = command(tmp_path, "--write", folder / "a.py")
    assert result.stdout == "wrote algorithms/offline/b.py\n0 differences in 2 scripts\n"
    assert result.returncode == 0
    assert (folder / "a.py").read_text() == f"A = 1\n{ours}\n"
    assert (folder / "b.py").read_text() == f"B = 1\n\n\n{ours}\n\n\nB = 2\n"


def test_three_versions_and_the_places_of_each(repo, tmp_path):
    repo(a="def f(): return 1", b="\ndef f(): return 2", c="def f(): return 1", d="def f(): return 3")
    places = "{0}a.py:1, {0}c.py:1 / {0}b.py:2 / {0}d.py:1".format("algorithms/offline/")
    assert same_code.differences(tmp_path) == [f"f differs: {places}"]


def test_what_is_each_scripts_own_and_nested_names_are_exempt(repo, tmp_path):
    own = "class Config: x = {0}\ndef train(): return {0}\ndef load(): return {0}\n"
    nested = "def {1}():\n    def helper(): return {0}\nclass {2}:\n    def m(self): return {0}\n"
    a, b = (own + nested).format(1, "f", "A"), (own + nested).format(2, "g", "B")
    folder = repo(a=a, b=b)
    assert same_code.differences(tmp_path) == []
    assert same_code.write(tmp_path, folder / "a.py") == []
    assert (folder / "b.py").read_text() == b


def test_new_types_must_agree_and_are_not_copied(repo, tmp_path):
    """Their comments may differ; other assignments too."""
    a = 'Size = NewType("Size", float)  # at least 0\nShare = NewType("Share", float)\nLIMIT = 1\n'
    b = 'Share = NewType("Share", float)  # 0 to 1\nLIMIT = 2\nSize = NewType("Size", int)\n'
    folder = repo(a=a, b=b, c="Count = NewType('Count', int)\nLIMIT = f(1)\n")
    places = "algorithms/offline/a.py:1 / algorithms/offline/b.py:3"
    assert same_code.differences(tmp_path) == [f"Size differs: {places}"]
    assert command(tmp_path).returncode == 1
    assert same_code.write(tmp_path, folder / "a.py") == []
    assert (folder / "b.py").read_text() == b
    repo(b=b.replace("int", "float"))
    assert same_code.differences(tmp_path) == []


def test_write_takes_comments_and_decorators_along_and_nothing_else(repo, tmp_path):
    ours = '''"""A."""
import torch

LIMIT = 1


# -------------------- Toolbox: the same in every script that has it, word for word --------------------

# why this is so,
# in two lines
@outer
@inner(
    1,
)
def shared(x):  # on the line
    """# no comment"""
    return x  # (1)
# below


def only_a(): pass


@dataclass
class Both:
    x: int = 1

    # inside
    async def m(self):
        return 1
'''
    theirs = '''"""B."""
import numpy
x = """
# not a comment"""
class Both: pass
# old comment
def shared(x): return -x

# kept: a blank line lies between

def only_b(): pass\t
'''
    folder = repo(a=ours, b=theirs)
    assert same_code.write(tmp_path, folder / "a.py") == [folder / "b.py"]
    assert (folder / "a.py").read_text() == ours
    assert (folder / "b.py").read_text() == '''"""B."""
import numpy
x = """
# not a comment"""
@dataclass
class Both:
    x: int = 1

    # inside
    async def m(self):
        return 1
# why this is so,
# in two lines
@outer
@inner(
    1,
)
def shared(x):  # on the line
    """# no comment"""
    return x  # (1)

# kept: a blank line lies between

def only_b(): pass\t
'''
    assert same_code.write(tmp_path, folder / "a.py") == []  # a second time changes nothing


def test_comments_alone_are_copied_too(repo, tmp_path):
    folder = repo(a="# new\ndef f(): pass\n", b="# old\ndef f(): pass\n")
    assert same_code.write(tmp_path, folder / "a.py") == [folder / "b.py"]
    assert (folder / "b.py").read_text() == "# new\ndef f(): pass\n"


def test_a_comment_line_inside_a_string_is_no_comment(repo, tmp_path):
    folder = repo(a="def f(): return 1\n", b="x = '''\n# text'''\ndef f(): return 2\n")
    same_code.write(tmp_path, folder / "a.py")
    assert (folder / "b.py").read_text() == "x = '''\n# text'''\ndef f(): return 1\n"


def test_bytes_survive(repo, tmp_path):
    """Line ends, a form feed, a missing last newline, letters beyond ASCII."""
    before, after = "x = 'é\u2028'\r\n\x0c\r\n", "y = 1  # no newline"
    folder = repo(a="def f(): return 1\n", b=f"{before}def f(): return 2\r\n{after}")
    same_code.write(tmp_path, folder / "a.py")
    assert (folder / "b.py").read_bytes() == f"{before}def f(): return 1\n{after}".encode()
    folder = repo(a="def f():\n    return 1", b="x = 1\ndef f():\n    return 2")
    same_code.write(tmp_path, folder / "a.py")
    assert (folder / "b.py").read_bytes() == b"x = 1\ndef f():\n    return 1"


def test_write_reaches_every_family_and_reports_what_is_left(repo, tmp_path):
    folder = repo(a="def f(): return 1\n", b="def f(): return 2\ndef g(): return 1\n")
    other = tmp_path / "algorithms" / "collect" / "c.py"
    other.parent.mkdir()
    other.write_text("def f(): return 3\ndef g(): return 2\n")
    result = command(tmp_path, "--write", folder / "a.py")
    assert result.returncode == 1
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["wrote", "algorithms/collect/c.py"],
        ["wrote", "algorithms/offline/b.py"],
        ["g", "differs:"],
        ["1", "differences"],
    ]
    assert other.read_text() == "def f(): return 1\ndef g(): return 2\n"
    assert (folder / "b.py").read_text() == "def f(): return 1\ndef g(): return 1\n"


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("def f(): return 1\n", "def f(:\n", "b.py:1: "),
        ("def f(): return 1\n", "def f(): return 2\ndef f(): return 3\n", "b.py:2: f is defined twice"),
    ],
)
def test_faults_are_one_line_and_nothing_is_written(repo, tmp_path, a, b, message):
    folder = repo(a=a, b=b, aa="def f(): return 4\n")
    for arguments in ([], ["--write", folder / "a.py"]):
        result = command(tmp_path, *arguments)
        assert result.returncode == 2
        assert result.stdout == ""
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert (folder / "b.py").read_text() == b
    assert (folder / "aa.py").read_text() == "def f(): return 4\n"


def test_write_wants_a_script(repo, tmp_path):
    repo(a="def f(): return 1\n")
    (tmp_path / "other.py").write_text("def f(): return 2\n")
    for path in (tmp_path / "other.py", tmp_path / "missing.py"):
        result = command(tmp_path, "--write", path)
        assert result.returncode == 2
        assert "is not a script under" in result.stderr
