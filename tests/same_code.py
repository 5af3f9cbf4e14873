"""Same name, same code: a top-level function or class that two scripts share is the same in both.

  python tests/same_code.py                  say where scripts disagree (exit status 1)
  python tests/same_code.py --write SCRIPT   copy the functions and classes that SCRIPT shares into the others

Code is compared as syntax trees, so comments and line breaks may differ. `Config`, `train` and `load` are
each script's own: they are exempt. Kinds of numbers (`Share = NewType("Share", float)`) must agree too. A
copy takes along the decorators and the comment lines directly above, and leaves every other byte as it was.
It copies no kinds of numbers and no imports: `make lint` names imports that are missing or no longer used.
"""

import argparse
import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
EXEMPT = {"Config", "train", "load"}


class Fault(Exception):
    """A script that cannot be compared, in one line."""


def scripts(root: Path) -> list[Path]:
    """Every script under `root`/algorithms."""
    return sorted(path for path in (root / "algorithms").rglob("*.py") if path.name != "__init__.py")


def read(path: Path) -> str:
    return path.read_bytes().decode()  # line ends as they are


def definitions(path: Path, source: str) -> dict[str, ast.stmt]:
    """The top-level functions and classes of a script by name."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise Fault(f"{path}:{error.lineno}: {error.msg}") from None
    found = {}
    for node in tree.body:
        if isinstance(node, DEFINITIONS) and node.name not in EXEMPT:
            if node.name in found:
                raise Fault(f"{path}:{node.lineno}: {node.name} is defined twice")
            found[node.name] = node
    return found


def is_new_type(node: ast.stmt) -> bool:
    """Whether a statement is `Name = NewType(...)`."""
    call = getattr(node, "value", None)
    return isinstance(node, ast.Assign) and isinstance(call, ast.Call) and ast.unparse(call.func) == "NewType"


def new_types(source: str) -> dict[str, ast.stmt]:
    """The module-level assignments `Name = NewType(...)` by name."""
    return {ast.unparse(node.targets[0]): node for node in ast.parse(source).body if is_new_type(node)}


def differences(root: Path) -> list[str]:
    """One line for each name whose code is not the same in all the scripts that have it."""
    versions = {}  # name -> syntax tree as text -> places
    for path in scripts(root):
        source = read(path)
        for name, node in (definitions(path, source) | new_types(source)).items():
            place = f"{path.relative_to(root)}:{node.lineno}"
            versions.setdefault(name, {}).setdefault(ast.dump(node), []).append(place)
    return [
        f"{name} differs: " + " / ".join(", ".join(places) for places in trees.values())
        for name, trees in sorted(versions.items())
        if len(trees) > 1
    ]


def segments(source: str, nodes: dict[str, ast.stmt]) -> dict[str, tuple[int, int]]:
    """name -> (first, last): its lines with the comments directly above; counted from 0, `last` excluded."""
    tokens = tokenize.generate_tokens(io.StringIO(source, newline="").readline)
    comments = {t.start[0] - 1 for t in tokens if t.type == tokenize.COMMENT and t.start[1] == 0}
    found = {}
    for name, node in nodes.items():
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        while first - 1 in comments:
            first -= 1
        found[name] = (first, node.end_lineno)
    return found


def write(root: Path, script: Path) -> list[Path]:
    """Copy what `script` shares into the other scripts; the scripts that changed."""
    source = read(script)
    ours, lines = definitions(script, source), source.split("\n")
    code = {name: lines[first:last] for name, (first, last) in segments(source, ours).items()}
    changed = {}
    for path in scripts(root):
        if path.samefile(script):
            continue
        old = read(path)
        theirs = definitions(path, old)
        shared = segments(old, {name: theirs[name] for name in theirs if name in ours})
        new = old.split("\n")
        for name, (first, last) in sorted(shared.items(), key=lambda item: -item[1][0]):  # from the end up
            new[first:last] = code[name]
        if (text := "\n".join(new)) != old:
            definitions(path, text)
            changed[path] = text
    for path, text in changed.items():
        path.write_bytes(text.encode())
    return list(changed)


def main() -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--write", metavar="SCRIPT", type=Path, help="the script to copy from")
    parser.add_argument("--root", type=Path, default=ROOT, help="what holds algorithms/ (this repository)")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    try:
        if arguments.write:
            if not arguments.write.is_file() or arguments.write.resolve() not in scripts(root):
                raise Fault(f"{arguments.write} is not a script under {root / 'algorithms'}")
            for path in write(root, arguments.write):
                print(f"wrote {path.relative_to(root)}")
        found = differences(root)
    except Fault as fault:
        print(fault, file=sys.stderr)
        return 2
    print("\n".join([*found, f"{len(found)} differences in {len(scripts(root))} scripts"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
