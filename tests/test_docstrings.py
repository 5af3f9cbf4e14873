"""The equations of a script's docstring and the lines that carry their numbers belong together."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.glob("algorithms/*/*.py"))}
FAMILIES = ("algorithms/offline/", "algorithms/discrete/", "algorithms/finetune/", "algorithms/language/",
            "algorithms/context/")
LEARNERS = [name for name in SOURCES if name.startswith(FAMILIES)]
BANNER = "\n# -------------------- Toolbox"  # above it is the script's own part, below what others have too


def numbered(source: str) -> list[int]:
    """Numbers of the docstring's equations, each at the beginning of an indented line."""
    docstring = ast.get_docstring(ast.parse(source), clean=False)
    return [int(number) for number in re.findall(r"\n +\((\d+)\)  ", docstring)]


def cited(source: str) -> set[int]:
    """Numbers in comments and strings of the part that is the script's own."""
    code = source.split(BANNER)[0].split('"""', 2)[2]
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    texts = [token.string for token in tokens if token.type in (tokenize.COMMENT, tokenize.STRING)]
    return {int(number) for number in re.findall(r"\((\d+)\)", " ".join(texts))}


def test_there_are_learners():
    assert {f"algorithms/offline/{name}.py" for name in ("bc", "td3_bc", "iql")} <= {*LEARNERS}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_equation_has_its_line_and_every_cited_number_its_equation(name):
    assert SOURCES[name].count(BANNER) == 1
    numbers = numbered(SOURCES[name])
    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers
    assert cited(SOURCES[name]) == {*numbers}


@pytest.mark.parametrize("name", LEARNERS)
def test_docstring_says_what_differs_from_the_paper(name):
    assert "\n\nDifferences from the paper: " in SOURCES[name]


def test_a_line_without_its_number_is_noticed():
    own = '"""Title.\n\n  (1)  a = b\n  (2)  c = d\n"""\na = 1  # (1)\nf(2)\n'
    source = f"{own}{BANNER} ----\n# (2)\n"
    assert numbered(source) == [1, 2]
    assert cited(source) == {1}
