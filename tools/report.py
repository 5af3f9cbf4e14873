"""Tables, figures and a page of every recorded score, from results/scores alone: `make report`.

  python tools/report.py                 write results/report/ and the blocks of docs/{scores,online}.md
  python tools/report.py --check         only compare: status 1 where one of them is stale
  python tools/report.py --compare A B   did scores move from A to B? Commits, or folders of scores

report_statistics.py tells what is compared and how, report_figures.py draws, and report_page.py writes.

--compare takes Welch's t interval: by a bootstrap interval a fifth of all unchanged cells of 3 seeds would
seem to have moved.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pandas as pd
from common import ROOT, UserError, escape, exit_status, markdown, show, write
from report_figures import draw_figures, save
from report_page import (
    costs_table,
    markdown_of,
    online_table,
    page,
    report,
    scores_block,
    variants_table,
    with_block,
)
from report_statistics import MIN_SEEDS, Cell, by_suite, compare_suite, difference, gather_cells, read_scores

MOVED = ["rose", "fell"]


# ----------------------------------------------- Two versions -----------------------------------------------


def read_version(name: str) -> dict[str, Cell]:
    """Cells by name, of a folder of scores, or of results/scores as a commit has them."""
    if Path(name).is_dir():
        return cells_by_name(Path(name))
    archive = ["git", "archive", "--format=zip", name, "--", "results/scores"]
    packed = subprocess.run(archive, cwd=ROOT, capture_output=True, check=False)
    if packed.returncode:
        raise UserError(f"{name} is neither a folder of scores nor a commit that has results/scores")
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(io.BytesIO(packed.stdout)).extractall(folder)
        return cells_by_name(Path(folder, "results/scores"))


def cells_by_name(scores: Path) -> dict[str, Cell]:
    return {cell.name: cell for cell in gather_cells(read_scores(scores))}


VERSIONS = """\
A is {a}, B is {b}. Final scores, mean ± standard deviation over seeds; 95 % interval of their difference
(Welch).

{table}

{summary}
"""


def compare_versions(a: str, b: str) -> str:
    """A table of all cells that both have, and whether their scores moved; then what only one has."""
    before, after = read_version(a), read_version(b)
    rows = [[escape(cell.dataset), escape(cell.learner), *judge(cell.runs, after[name].runs)]
            for name, cell in before.items() if name in after]
    table = pd.DataFrame(rows, columns=["Dataset", "Algorithm", "A", "B", "B - A", "Verdict"])
    decided, moved = (int(table["Verdict"].isin(words).sum()) for words in ([*MOVED, "no move"], MOVED))
    summary = "Nothing is decidable."
    if decided:
        chance = f"of as many unchanged ones {decided / 20:.1f} would seem to"
        summary = f"{moved} of {decided} decidable cells moved; {chance}."
    text = VERSIONS.format(a=a, b=b, table=markdown(table.columns, table.to_numpy()), summary=summary)
    for version, names in {"A": before.keys() - after.keys(), "B": after.keys() - before.keys()}.items():
        text += f"\nOnly in {version}: {', '.join(sorted(names))}.\n" * bool(names)
    return text


def judge(before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    """Both means, their difference, and what can be said of it."""
    column = "score" if before["score"].notna().all() and after["score"].notna().all() else "return_mean"
    shown = [f"{show(runs[column])} (seeds: {len(runs)})" for runs in (before, after)]
    for name, word in {"update": "updates", "dataset_hash": "data"}.items():
        if len({*before[name], *after[name]}) > 1:
            return [*shown, "", f"not comparable: other {word}"]
    x, y = (runs.set_index("seed")[column] for runs in (before, after))
    if x.equals(y):
        return [*shown, "0", "same scores"]
    if min(len(x), len(y)) < MIN_SEEDS:
        return [*shown, f"{y.mean() - x.mean():.1f}", f"undecidable: fewer than {MIN_SEEDS} seeds"]
    change = difference(x.to_numpy(), y.to_numpy())
    verdict = "rose" if change.low > 0 else "fell" if change.high < 0 else "no move"
    return [*shown, change.show(1), verdict]


# ----------------------------------------------- Command line -----------------------------------------------


def make_report(check: bool) -> int:
    """Writes everything, or only tells whether it is stale (then 1)."""
    table = read_scores(ROOT / "results/scores")
    cells, folder = gather_cells(table), ROOT / "results/report"
    comparisons = [compare_suite(*group) for group in by_suite(cells)]
    costs = costs_table(cells, table.groupby(["family", "algorithm"])["episodes"].sum())
    tables = {"online": online_table(cells), "costs": costs, "variants": variants_table(cells)}
    content = cells, comparisons, tables
    blocks = {"docs/scores.md": scores_block(comparisons),
              "docs/online.md": f"{markdown_of(tables['online'])}\n"}
    texts = {folder / "report.md": report(*content), folder / "index.html": page(*content)}
    texts |= {ROOT / file: with_block(file, block) for file, block in blocks.items()}
    if check:
        stale = [str(file.relative_to(ROOT)) for file, text in texts.items()
                 if not file.exists() or file.read_text() != text]
        print(f"stale: {', '.join(stale)}: make report" if stale else "the report is up to date")
        return int(bool(stale))
    files = {folder / f"{name}.{kind}": save(figure, kind)
             for name, figure in draw_figures(cells, comparisons) for kind in ("png", "pdf")}
    for file, picture in files.items():
        write(file, picture)
    for file in {*folder.glob("*.png"), *folder.glob("*.pdf")} - {*files}:
        file.unlink()
    for file, text in texts.items():
        write(file, text)
    count = len(files) + 2
    changed = " and ".join(blocks)
    print(f"{folder.relative_to(ROOT)}: {len(cells)} cells, {count} files; {changed} are new too")
    return 0


def run(options: argparse.Namespace) -> int:
    if not options.compare:
        return make_report(options.check)
    print(compare_versions(*options.compare), end="")
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Writes tables, figures and a page of all recorded scores.")
    parser.add_argument("--check", action="store_true", help="only tell whether they are stale")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="commits, or folders of scores")
    options = parser.parse_args(arguments)
    return exit_status("report.py", run, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
