"""Gathers finished runs into results/scores/<algorithm>.csv and writes README.md's tables: `make scores`.

  python tools/scores.py [results/runs]     gather that folder, then write the tables
  python tools/scores.py --check            only compare: status 1 where the README's tables are stale

A row is one evaluation of a run, so results/scores alone draws every learning curve, against updates or wall
time. The last row of a run, of phase `final`, is its score and holds what is known of the run as a whole.
Of runs in context `episodes` are those of one agent; their returns have a table of tools/in_context.py.
A run that goes on online has phases `offline` and `online` for `training`, and columns of its own: the steps
of experience, the score at the switch, the lowest after it and the regret.
A run counts if its settings are those of a file under configs/, which the README links. It may take its model
or its offline half from another run that has the same seed, so that seeds stay independent, and the same
settings of the model. Gathered again, a run replaces its own rows; those of other runs stay.
"""

import argparse
import re
import runpy
import sys
from functools import cache
from pathlib import Path
from statistics import mode

import pandas as pd
from common import (
    DAMAGED,
    KEY,
    ROOT,
    config_file,
    escape,
    exit_status,
    learner_name,
    link,
    markdown,
    name_run,
    read_record,
    show,
    write,
)

RESULT = ["score", "return_mean", "return_std", "length_mean", "success"]
CLOCK = ["wall_seconds", "updates_per_second"]
RECORD = ["commit", "config_hash", "dataset_hash", "device", "precision", "versions"]
COLUMNS = [*KEY, "update", "phase", *RESULT, "episodes", "best_score", *CLOCK, *RECORD]
SWITCH = ["score_at_switch", "lowest_score_after_switch", "regret"]
ONLINE = ["online_steps", *SWITCH]  # only in files that have runs which went on online
FREE = {"seed", "eval_every", "eval_episodes"}  # a run may take these from the command line
TAKEN = {"model_from", "start_from"}  # and these, which name another run: see `unlike`
ELSEWHERE = {"variant", "environment", "final_eval_episodes", "compile", "precision"}  # not a learner's
YARDSTICKS = {  # columns of the table of algorithms
    "umaze: stitching": "reef/pointmaze/umaze-v0",
    "halfcheetah: mixed": "reef/halfcheetah/medium-replay-v1",
    "hopper: two policies": "reef/hopper/medium-expert-v1",
}
ROUTES = {  # groups its rows
    "Imitation": ["bc"],
    "Behaviour constraint": ["td3_bc", "rebrac", "bcq", "bear", "brac"],
    "Advantage-weighted": ["awac"],
    "Implicit values": ["iql", "xql"],
    "Conservative values": ["cql"],
    "Ensembles": ["sac_n", "edac", "lb_sac"],
    "Sequence models": ["dt", "trajectory_transformer"],
    "Generative policies": ["diffusion_policy", "diffusion_ql", "idql", "fql", "q_chunking", "diffuser"],
    "Model-based": ["mopo", "morel", "combo"],
}
FAMILIES = {  # rows of the table of families: what they are for, and the page about them
    "finetune": ("Offline, then online", "docs/online.md"),
    "discrete": ("Choices instead of vectors", "docs/values.md"),
    "evaluate": ("What a policy is worth, by logs", "docs/values.md"),
    "language": ("Language models", "docs/language.md"),
    "context": ("Learning in context; many tasks", "docs/context.md"),
    "collect": ("Online, to make data", "docs/data.md"),
}


@cache
def script(family: str, algorithm: str) -> dict:
    """The names that a script defines."""
    return runpy.run_path(str(ROOT / "algorithms" / family / f"{algorithm}.py"))


def objection(family: str, algorithm: str, info: dict) -> str:
    """Why a run does not count; empty if it does."""
    if info["status"] != "finished":
        return info["status"].replace("running", "not finished")
    config = info["config"]
    if "dataset" not in config:
        return "it learned online, from no dataset"
    if "return_mean" not in info:
        return "it was not evaluated, for want of an environment"
    file = config_file(family, algorithm, config["dataset"], config["variant"])
    if not (ROOT / file).exists():
        return f"there is no {file}"
    names = script(family, algorithm)
    wanted = vars(names["parse_config"]([f"--config_path={ROOT / file}"]))
    fields = config.keys() & wanted.keys() - FREE - TAKEN - {*names["Run"].FREE}
    changed = sorted(name for name in fields if config[name] != wanted[name])
    problems = [f"{name} is {config[name]}, and {wanted[name]} in {file}" for name in changed]
    for taken in sorted(TAKEN & {name for name, value in config.items() if value}):
        half = fields - ELSEWHERE if taken == "start_from" else set()  # learned by the same algorithm
        problems += unlike(config, Path(config[taken]), half)
    return ", ".join(problems)


def unlike(config: dict, folder: Path, half: set[str]) -> list[str]:
    """Why the run in `folder` does not stand for a run's own beginning; OSError, ValueError: unreadable.

    It has the same seed and settings of a model; those of a first half that it learned, `half`, too.
    """
    theirs = read_record(folder)["config"]
    fields = half | {"seed", "ensemble", "elites"} | {name for name in config if name.startswith("model_")}
    ours = config | {"model_from": None}  # it has fitted the model itself
    changed = sorted(name for name in fields & theirs.keys() & ours.keys() if theirs[name] != ours[name])
    return [f"{name} is {ours[name]}, and {theirs[name]} in {folder}" for name in changed]


def read_run(folder: Path, name: dict, info: dict) -> pd.DataFrame:
    """The rows of one finished run."""
    config = info["config"]
    metrics = pd.read_csv(folder / "metrics.csv").dropna(subset="eval/return_mean")
    metrics = metrics.rename(columns=lambda column: re.sub("^(eval|time)/", "", column))
    metrics = metrics.assign(phase="training")
    in_context = "return_first" in info  # then returns by episode stand in files of their own
    result = RESULT[:2] if in_context else RESULT
    info = {"precision": config.get("precision"), **info}  # earlier runs did not note what auto came to
    final = {column: info[column] for column in [*result, "best_score", *CLOCK, *RECORD]}
    final["versions"] = " ".join(f"{each}=={version}" for each, version in sorted(info["versions"].items()))
    if in_context:
        sizes = {"training": config["eval_episodes"], "final": config["final_eval_episodes"]}
        episodes, last = pd.DataFrame(sizes.items(), columns=["phase", "episodes"]), config["updates"]
    else:
        evaluations = pd.read_csv(folder / "evaluations.csv")
        (last,) = evaluations.loc[evaluations["phase"] == "final", "update"].unique()
        episodes = evaluations.groupby(["update", "phase"]).size().reset_index(name="episodes")
    final |= {"update": last, "phase": "final"}
    if "online_steps" in config:
        before = metrics["update"] <= config["updates"]
        metrics["phase"] = before.map({True: "offline", False: "online"})
        metrics["online_steps"] = metrics.get("online/steps", 0.0)
        metrics.loc[before, "online_steps"] = 0.0
        final |= {column: info[column] for column in SWITCH} | {"online_steps": config["online_steps"]}
    rows = pd.concat([metrics, pd.DataFrame([final])]).merge(episodes)
    return rows.assign(**name).reindex(columns=COLUMNS + ONLINE)


def read_scores() -> pd.DataFrame:
    """All rows under results/scores."""
    text = dict.fromkeys(["family", "algorithm", "dataset", "variant", "phase", *RECORD], str)
    files = sorted((ROOT / "results/scores").glob("*.csv"))
    read = [pd.read_csv(file, dtype=text, keep_default_na=False, na_values="") for file in files]
    return pd.concat(read) if read else pd.DataFrame(columns=COLUMNS)


def gather(runs: Path) -> None:
    """Merges the finished runs under `runs` into results/scores, and names the others."""
    gathered = {}
    for file in sorted(runs.rglob("seed-*/run.json")):
        try:
            info = read_record(file.parent)
            name = name_run(file.parent, info)
            problem = objection(name["family"], name["algorithm"], info)
            if not problem:
                gathered[tuple(name.values())] = read_run(file.parent, name, info)
        except DAMAGED as error:
            problem = f"its record cannot be read: {error!r:.150}"
        if problem:
            print(f"skipped {file.parent}: {problem}")
    if not gathered:
        print(f"no finished run of a config in {runs}: nothing is gathered")
    everything = dict(list(read_scores().groupby(KEY))) | gathered
    for algorithm in sorted({key[1] for key in gathered}):
        ours = sorted(key for key in everything if key[1] == algorithm)
        table = pd.concat([everything[key].dropna(axis=1, how="all") for key in ours])
        if "online_steps" in table:
            table = table.reindex(columns=COLUMNS + ONLINE).astype({"online_steps": "Int64"})
        else:
            table = table.reindex(columns=COLUMNS)
        file = ROOT / f"results/scores/{algorithm}.csv"
        write(file, table.to_csv(index=False, float_format="%.6g"))
        print(f"{file.relative_to(ROOT)}: {len(gathered.keys() & {*ours})} of {len(ours)} runs gathered")


def scores_tables(finals: pd.DataFrame) -> str:
    """A table a family, with a row a learner and a column a dataset."""
    parts = ["Final scores, mean ± standard deviation over training seeds."]
    for family in sorted({*finals["family"]}, key=lambda name: (name != "offline", name)):
        parts += family_table(family, finals[finals["family"] == family])
    return "\n\n".join(parts) if len(parts) > 1 else "No run is recorded yet."


def family_table(family: str, finals: pd.DataFrame) -> tuple[str, str]:
    """A family's heading and table: scores, or returns where no reference is known."""
    cells, lengths = {}, {}
    for (algorithm, dataset, variant), rows in finals.groupby(KEY[1:-1]):
        place = learner_name(family, algorithm, variant), dataset
        value = show(rows["score"]) if rows["score"].notna().all() else f"return {show(rows['return_mean'])}"
        cells[place] = link(value, Path("..", config_file(family, algorithm, dataset, variant)))
        seeds = f"{len(rows)} seed" + "s" * (len(rows) > 1)
        lengths[place] = seeds, f"{rows['update'].max():,} updates"
    usual = [mode(column) for column in zip(*lengths.values())]
    for place, length in lengths.items():
        unusual = ", ".join(text for text, often in zip(length, usual) if text != often)
        cells[place] += f" ({unusual})" * bool(unusual)
    learners, datasets = (sorted({*names}) for names in zip(*cells))
    rows = [[escape(name), *(cells.get((name, dataset), "") for dataset in datasets)] for name in learners]
    heading = f"`algorithms/{family}` ({', '.join(usual)} if not stated):"
    return heading, markdown(["Algorithm", *map(escape, datasets)], rows)


def is_learner(text: str) -> bool:
    """Has a script a class with an `update`?"""
    return "\n    def update(self" in text


def describe(path: Path) -> dict:
    """A script's name and paper as links, its own lines and those of its toolbox."""
    text = path.read_text()
    name = re.match(r'"""([^:,]+)', text)[1]
    paper, number = re.match(r".*\((.+?, \d{4})(?:, arXiv:([\d.]+))?", text).groups()
    lines = text.splitlines()
    banners = [index for index, line in enumerate(lines) if re.match("# -+ Toolbox", line)]
    own = banners[0] if banners else len(lines)  # one without a toolbox is all its own
    return {
        "name": link(name, path.relative_to(ROOT)),
        "paper": f"[{paper}](https://arxiv.org/abs/{number})" if number else paper,
        "own": own,
        "toolbox": len(lines) - own,
    }


def algorithms_table(finals: pd.DataFrame) -> str:
    """A row a script of algorithms/offline, by route: its paper, lines (own + toolbox) and scores."""
    rows, finals = [], finals[(finals["family"] == "offline") & (finals["variant"] == "default")]
    for route, members in ROUTES.items():
        for algorithm in sorted(members):
            found = describe(ROOT / "algorithms/offline" / f"{algorithm}.py")
            row = {"Route": route if algorithm == min(members) else "", "Algorithm": found["name"]}
            row |= {"Paper": found["paper"], "Lines": f"{found['own']} + {found['toolbox']}"}
            ours = finals[finals["algorithm"] == algorithm]
            for column, dataset in YARDSTICKS.items():
                scores = ours[ours["dataset"] == dataset]["score"]
                few = f" ({len(scores)})" if 0 < len(scores) < 3 else ""
                row[column] = show(scores) + few if len(scores) else ""
            updates = ours[ours["dataset"].isin(YARDSTICKS.values())]["update"].unique()
            row["Updates"] = " to ".join(f"{count:,}" for count in sorted({*updates.tolist()}))
            rows.append(row)
    table = pd.DataFrame(rows)
    return markdown(table.columns, table.to_numpy())


def families_table() -> str:
    """A row a family of other scripts, each with its paper and its own lines."""
    rows = []
    for family, (purpose, page) in FAMILIES.items():
        paths = sorted((ROOT / "algorithms" / family).glob("*.py"))
        learners = [path for path in paths if family != "collect" or is_learner(path.read_text())]
        found = [describe(path) for path in learners]
        scripts = [f"{script['name']} ({script['paper']}; {script['own']} lines)" for script in found]
        rows.append([purpose, ", ".join(scripts), link(Path(page).stem, page)])
    return markdown(["What for", "Scripts", "Page"], rows)


def pages() -> dict[str, str]:
    """README.md and docs/scores.md with their tables made anew from results/scores and the scripts."""
    finals, texts = read_scores().query("phase == 'final'"), {}
    tables = {"algorithms": algorithms_table(finals), "families": families_table()}
    tables["scores"] = scores_tables(finals)
    for file in ("README.md", "docs/scores.md"):
        texts[file] = (ROOT / file).read_text()
        for name, table in tables.items():
            place = re.compile(f"(?<=<!-- {name}:begin -->\n).*?(?=<!-- {name}:end -->)", re.DOTALL)
            texts[file] = place.sub(f"{table}\n".replace("\\", r"\\"), texts[file])
    return texts


def run(options: argparse.Namespace) -> int:
    if options.check:
        stale = [file for file, text in pages().items() if text != (ROOT / file).read_text()]
        print(f"{', '.join(stale)}: stale, make scores" if stale else "the pages are up to date")
        return int(bool(stale))
    gather(options.runs)
    for file, text in pages().items():
        write(ROOT / file, text)
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Gathers finished runs and writes the tables of the pages.")
    parser.add_argument("runs", nargs="?", type=Path, default=ROOT / "results/runs", help="their folder")
    parser.add_argument("--check", action="store_true", help="only tell whether a page is stale")
    options = parser.parse_args(arguments)
    if not options.runs.is_dir() and options.runs != parser.get_default("runs"):  # comes with a first run
        parser.error(f"there is no folder {options.runs}")
    return exit_status("scores.py", run, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
