"""What the programs of this folder share: records of runs, names, errors, files, Markdown.

It imports nothing that takes long, so that `benchmark.py --list` answers at once.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
KEY = ["family", "algorithm", "dataset", "variant", "seed"]  # names a run
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what a broken record of a run raises


class UserError(Exception):
    """What the user can mend: one line on stderr and exit status 2."""


def exit_status(
    program: str, action: Callable[..., int | None], *arguments, advice: str = "", errors: tuple = ()
) -> int:
    """That of `action(*arguments)`, which may give one; what went wrong is one line on stderr.

    `errors` are what else a user can mend: the UserErrors of scripts.
    """
    try:
        return action(*arguments) or 0
    except (UserError, OSError, *errors) as error:
        message, status = str(error), 2
    except KeyboardInterrupt:
        message, status = f"interrupted{advice}", 130
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return status


def write(file: Path, content: str | bytes) -> None:
    """All of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    try:
        new.write_bytes(content.encode() if isinstance(content, str) else content)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


# ------------------------------------------------- Runs -------------------------------------------------


def read_record(folder: Path) -> dict:
    """run.json of a run, which has `config` and `status` at least. Raises OSError or ValueError."""
    info = json.loads((folder / "run.json").read_text())
    kinds = {"config": dict, "status": str}
    if not isinstance(info, dict) or not all(isinstance(info.get(key), kinds[key]) for key in kinds):
        raise ValueError("run.json has no config or no status")
    return info


def name_run(folder: Path, info: dict) -> dict:
    """{name of KEY: value} by where the run is and its run.json; ValueError where these disagree.

    What learns online has no dataset: its environment stands for one.
    """
    config = info["config"]
    dataset = config.get("dataset") or config["environment"]
    place = [*dataset.split("/"), config["variant"], f"seed-{config['seed']}"]
    family, algorithm, *rest = ["", "", *folder.resolve().parts][-len(place) - 2 :]
    if rest != place:
        raise ValueError(f"it is not in .../{'/'.join(place)}")
    return dict(zip(KEY, (family, algorithm, dataset, config["variant"], config["seed"])))


def config_file(family: str, algorithm: str, dataset: str, variant: str) -> Path:
    """Where the settings of a variant are, from the root."""
    suffix = "" if variant == "default" else f"-{variant}"
    return Path("configs", family, algorithm, f"{dataset}{suffix}.yaml")


def learner_name(family: str, algorithm: str, variant: str) -> str:
    """Algorithm and variant, without what goes without saying."""
    return " ".join([family] * (family != "offline") + [algorithm] + [variant] * (variant != "default"))


# --------------------------------------------- Numbers and text ---------------------------------------------


def show(values: Iterable[float]) -> str:
    """Mean and, of several, standard deviation."""
    values = [float(value) for value in values]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):z.1f}{spread}"


def span(counts: Iterable[int]) -> str:
    """`50,000`, or `10,000 to 50,000`."""
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def all_updates(config: Mapping) -> int:
    """Gradient updates of a run by its config: those on the data, and where it goes on online those there."""
    learning = config.get("online_steps", 0) - config.get("random_steps", 0) - config.get("warmup_steps", 0)
    return config["updates"] + max(0, learning) * config.get("updates_per_step", 1)


def escape(text: str) -> str:
    """A name as Markdown shows it, whatever is in it; the _ within a word is none of Markdown's marks."""
    marks = r"[\\`*\[\]<>&|]|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(marks, r"\\\g<0>", " ".join(text.split()))


def link(text: str, target: str | Path) -> str:
    return f"[{escape(text)}]({quote(str(target))})"


def markdown(columns: Iterable[str], rows: Iterable[Iterable]) -> str:
    """A table. Cells are Markdown: names that come from data have to be escaped."""
    lines = [columns, ["---" for _ in columns], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
