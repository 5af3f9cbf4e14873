"""Every numbered equation of a script's docstring has an oracle test, which says so.

`@pytest.mark.equation(1, 2)` on a test of tests/test_NAME.py claims the equations (1) and (2) of the script
NAME.py; tests/test_finetune_NAME.py is for algorithms/finetune/NAME.py, as discrete/ has its own, and claims
what those tests claim that it imports. A claim is only as good as the test that makes it, but none is
forgotten.
"""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT


def equations(script: Path) -> set[int]:
    """Numbers at the beginning of the lines of the docstring."""
    docstring = ast.get_docstring(ast.parse(script.read_text()))
    return {int(number) for number in re.findall(r"^ *\((\d+)\)", docstring, re.MULTILINE)}


def oracles_of(script: Path) -> str:
    family, name = script.parent.name, script.stem
    return f"tests/test_{family}_{name}.py" if family in ("discrete", "finetune") else f"tests/test_{name}.py"


SCRIPTS = [script for script in sorted(ROOT.glob("algorithms/*/*.py")) if equations(script)]
PAIRS = {f"{script.parent.name}/{script.name}": oracles_of(script) for script in SCRIPTS}


def claims(tests: Path) -> dict[str, set[int]]:
    """Numbers in the markers of the tests, as their syntax tree has them, also of those that are imported."""
    found = {}
    for node in ast.parse(tests.read_text()).body:
        if isinstance(node, ast.ImportFrom) and f"{node.module}".startswith("test_"):
            theirs = claims(tests.with_name(f"{node.module}.py"))
            found |= {name.name: theirs[name.name] for name in node.names if name.name in theirs}
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = [mark for mark in node.decorator_list if isinstance(mark, ast.Call)]
            marks = [mark for mark in marks if ast.unparse(mark.func) == "pytest.mark.equation"]
            found[node.name] = {ast.literal_eval(number) for mark in marks for number in mark.args}
    return found


def claimed(tests: Path) -> set[int]:
    return set().union(*claims(tests).values())


def check(script: Path, tests: Path) -> None:
    """Fails where an equation of the script has no test, or a test claims one that there is not."""
    assert tests.exists(), f"{script.name} has no {tests.name} with oracle tests"
    found, tested = equations(script), claimed(tests)
    assert found, f"{script.name} has no numbered equations"
    assert not found - tested, f"no oracle test of {sorted(found - tested)} of {script.name} in {tests.name}"
    assert not tested - found, f"{tests.name} tests {sorted(tested - found)}, which {script.name} lacks"


@pytest.mark.parametrize("script", PAIRS)
def test_every_equation_has_an_oracle_test(script):
    check(ROOT / "algorithms" / script, ROOT / PAIRS[script])


def test_scripts_of_all_families_have_tests_of_their_own():
    families = {path.name for path in (ROOT / "algorithms").iterdir() if [*path.glob("*.py")]}
    assert {script.split("/")[0] for script in PAIRS} == families
    assert len({*PAIRS.values()}) == len(PAIRS)


def test_the_check_reads_docstrings():
    assert equations(ROOT / "algorithms/offline/td3_bc.py") == {1, 2, 3, 4, 5, 6}
    assert equations(ROOT / "algorithms/offline/bcq.py") == {1, 2, 3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize("script", PAIRS)
def test_one_equation_more_or_fewer_fails(tmp_path, script):
    source = (ROOT / "algorithms" / script).read_text()
    tests, copy = ROOT / PAIRS[script], tmp_path / "script.py"
    copy.write_text(source)
    check(copy, tests)
    last = max(equations(copy))
    copy.write_text(source.replace(f"\n  ({last})  ", f"\n  ({last + 1})  x = y\n  ({last})  ", 1))
    with pytest.raises(AssertionError, match=rf"no oracle test of \[{last + 1}\]"):
        check(copy, tests)
    copy.write_text(source.replace(f"\n  ({last})  ", "\n  ", 1))
    with pytest.raises(AssertionError, match=rf"tests \[{last}\], which|no numbered equations"):  # of one
        check(copy, tests)
    copy.write_text('"""Nothing (1) here."""\n')
    with pytest.raises(AssertionError, match="no numbered equations"):
        check(copy, tests)


def test_a_script_without_tests_fails(tmp_path):
    with pytest.raises(AssertionError, match=r"bc\.py has no test_new\.py"):
        check(ROOT / "algorithms/offline/bc.py", tmp_path / "test_new.py")


def test_what_is_no_marker_of_a_test_does_not_count(tmp_path):
    file = tmp_path / "test_one.py"
    file.write_text(
        "# @pytest.mark.equation(1)\n"
        "@pytest.mark.equation(2)\ndef helper(): ...\n"
        "@pytest.mark.parametrize('x', [3])\ndef test_a(x): ...\n"
        "@pytest.mark.equation(4, 5)\n@pytest.mark.parametrize('x', [6])\ndef test_b(x): ...\n"
    )
    assert claimed(file) == {4, 5}
    (tmp_path / "test_two.py").write_text(
        "from test_one import helper, test_a\nfrom elsewhere import test_c\n"
        "@pytest.mark.equation(7)\ndef test_c(x): ...\n"
    )
    assert claimed(tmp_path / "test_two.py") == {7}
    (tmp_path / "test_two.py").write_text("from test_one import test_b\n")
    assert claimed(tmp_path / "test_two.py") == {4, 5}
