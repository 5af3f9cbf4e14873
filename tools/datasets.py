"""Dataset cards: what a Minari dataset on this machine holds, in tables and one picture.

  python tools/datasets.py reef/pointmaze/umaze-v0 [...]   write <id>.md and <id>.png under results/cards
  python tools/datasets.py --check [id ...]                do the data still have the hashes of their cards?

Exit status 1: data and hash disagree (with --check the card's hash, else the one recorded with the data).
"""

import argparse
import contextlib
import hashlib
import html
import importlib
import importlib.util
import io
import math
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
from common import UserError, exit_status, write
from datasets_choices import (
    CHOICE_WORDS,
    PAIR_WORDS,
    SHOWN,
    ChoiceLog,
    choice_table,
    image_of,
    observation_kind,
    pair_table,
)
from datasets_picture import draw
from datasets_tables import (
    MARGIN,
    MOVED,
    Data,
    action_table,
    drift,
    escape,
    markdown,
    pairs,
    show,
    statistics,
    summarise,
)
from minari.storage import get_dataset_path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = 50_000  # observations that are projected, at most
PACKAGES = ("gymnasium", "gymnasium-robotics", "minari", "mujoco", "numpy")  # what data may depend on
NO_SCALE = "none: an episode ends at its goal here, and earns on at it in an evaluation"
ACTION_WORDS = f"""\
The bounds `low` and `high` are {{owner}}. Clipped: outside of them. Saturated: outside, or nearer to one of
them than {MARGIN:.0%} of their distance."""

DRIFT_WORDS = f"""\
Means over the episodes as they are stored, a log's in the order of time. Moved by: the last third less the
first, in deviations; in bold from {MOVED:g} on. A log that drifts is several logs."""


# ------------------------------------------------ The data ------------------------------------------------


def load_dataset(dataset_id: str) -> minari.MinariDataset:
    """The dataset on this machine, if it has vectors (or Dicts of them); choices also by states or planes."""
    if not re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", dataset_id):
        raise UserError(f"{dataset_id!r} is no Minari id such as reef/pointmaze/umaze-v0")
    if not is_here(dataset_id):
        advice = "make dataset ID=" if dataset_id.startswith("reef/") else "minari download "
        raise UserError(f"{dataset_id} is not on this machine; {advice}{dataset_id}")
    try:
        dataset = minari.load_dataset(dataset_id)
    except Exception as error:  # KeyError, AssertionError, JSONDecodeError ...
        raise unreadable(dataset_id, repr(error)) from None
    if dataset.id != dataset_id:
        raise unreadable(dataset_id, f"its metadata call it {dataset.id}")
    seen, done = dataset.observation_space, dataset.action_space
    if isinstance(done, gym.spaces.Discrete):
        if not observation_kind(image_of(seen)):
            known = "states (Discrete), planes of uint8 and vectors (Box)"
            raise UserError(f"{dataset_id} has observations in {seen}; cards of choices are for {known}")
        return dataset
    for name, space in (("observations", seen), ("actions", done)):
        if observation_kind(space) != "vectors":
            known = "vectors (Box), or for choices"
            raise UserError(f"{dataset_id} has {name} in {space}; cards are for {known}")
    return dataset


def is_here(dataset_id: str) -> bool:
    return (get_dataset_path(dataset_id) / "data").exists()


def unreadable(dataset_id: str, problem: str) -> UserError:
    return UserError(f"cannot read {dataset_id} ({problem:.200}); minari delete {dataset_id}, get it anew")


def read_episodes(dataset: minari.MinariDataset, digest) -> Iterator[tuple[np.ndarray, minari.EpisodeData]]:
    """Observations [T + 1, ...] and episode, one by one; adds to `digest` what the content hash is of.

    That is dtype, shape and bytes of every array, as in algorithms/collect/pointmaze.py; where actions are
    choices and an observation has an image, of that alone. Raises UserError where an episode is malformed,
    not finite or outside of its spaces, or the file is damaged or lacks steps.
    """
    choices = isinstance(dataset.action_space, gym.spaces.Discrete)
    look = image_of if choices else lambda tree: tree
    space, total = look(dataset.observation_space), 0
    shapes = {"observations": [part.shape for part in leaves(space)], "actions": [dataset.action_space.shape]}
    try:
        for episode in dataset.iterate_episodes():
            where, steps = f"{dataset.id}, episode {episode.id}", len(episode.rewards)
            seen = leaves(look(episode.observations))
            fields = {"observations": seen, "actions": [episode.actions], "rewards": [episode.rewards]}
            fields |= {"terminations": [episode.terminations], "truncations": [episode.truncations]}
            for field, arrays in fields.items():
                for array, shape in zip(arrays, shapes.get(field, [()]), strict=True):
                    if array.shape != (steps + (field == "observations"), *shape) or not steps:
                        found = f"{steps} steps, {field} of shape {array.shape}"
                        raise UserError(f"{where} is malformed: {found}")
                    if not is_finite(array):
                        raise UserError(f"{where}: {field} are not all finite")
                    digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
            for field, inside in (("observations", space), ("actions", dataset.action_space)):
                if isinstance(inside, gym.spaces.Discrete):
                    numbers = fields[field][0] - inside.start
                    if not ((numbers >= 0) & (numbers < inside.n)).all():
                        raise UserError(f"{where}: {field} are not all in {inside}")
            total += steps
            yield seen[0] if len(seen) == 1 else np.concatenate(seen, axis=-1), episode
    except UserError:
        raise
    except Exception as error:  # h5py and minari raise whatever their parts do
        raise unreadable(dataset.id, repr(error)) from None
    if not total or total != dataset.total_steps:
        raise unreadable(dataset.id, f"it has {total:,} steps, its metadata say {dataset.total_steps:,}")


def is_finite(array: np.ndarray) -> bool:
    """As float32, which is what learners take: larger numbers are not finite either."""
    if array.dtype.kind != "f":
        return True
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(np.float32)).all())


def read(dataset: minari.MinariDataset) -> Data:
    """All that a card needs, in one pass that never holds all observations."""
    count = dataset.total_steps + dataset.total_episodes
    chosen = np.sort(np.random.default_rng(0).choice(count, min(count, SAMPLE), replace=False))
    digest, start, low, high, parts = hashlib.sha256(), 0, np.inf, -np.inf, []
    log = ChoiceLog(dataset) if isinstance(dataset.action_space, gym.spaces.Discrete) else None
    vectors = log is None or log.kind == "vectors"
    nothing = np.zeros((0, 0), np.float32)
    for observations, episode in read_episodes(dataset, digest):
        flags = episode.terminations.any(), episode.truncations.any()
        actions, positions, sample = nothing, nothing, nothing
        if vectors:
            begin, end = np.searchsorted(chosen, [start, start + len(observations)])
            positions, sample = observations[:, :2].copy(), observations[chosen[begin:end] - start]
        if log:
            log.add(observations, episode, f"{dataset.id}, episode {episode.id}")
        else:
            actions = episode.actions.astype(np.float32)
        parts.append((*flags, episode.rewards, actions, positions, sample))
        low, high = np.minimum(low, observations.min(0)), np.maximum(high, observations.max(0))
        start += len(observations)
    terminated, truncated, rewards, *columns = zip(*parts)
    actions, positions, sample = map(np.concatenate, columns)
    return Data(
        returns=np.array([row.sum(dtype=np.float64) for row in rewards]),
        lengths=np.array([len(row) for row in rewards]),
        terminated=np.array(terminated),
        truncated=np.array(truncated),
        rewards=np.concatenate(rewards),
        actions=actions,
        positions=positions,
        sample=sample,
        entries=low.size,
        constant=int((low == high).sum()),
        digest=digest.hexdigest(),
        log=log,
    )


def leaves(tree) -> list:
    """The entries of a Dict in the order of its sorted keys, however deep; anything else is its own leaf."""
    mapping = isinstance(tree, Mapping)
    return [leaf for key in sorted(tree) for leaf in leaves(tree[key])] if mapping else [tree]


# ---------------------------------------- What else is known of them ----------------------------------------


def make_environment(dataset: minari.MinariDataset) -> tuple[gym.Env | None, str]:
    """The environment to evaluate in and its name; None and the reason, where there is none."""
    spec = dataset._eval_env_spec or dataset.env_spec
    if spec is None:
        return None, "none recorded"
    with contextlib.suppress(Exception):  # what is missing then, making it says
        find_local_environment(spec.entry_point)
    bare = partial(gym.make, spec.id, max_episode_steps=spec.max_episode_steps, **spec.kwargs)
    with contextlib.redirect_stderr(io.StringIO()):  # gymnasium-robotics prints a notice
        with contextlib.suppress(ImportError):
            gym.register_envs(importlib.import_module("gymnasium_robotics"))
        for make in (partial(dataset.recover_environment, eval_env=True), bare):
            try:
                return make(), spec.id
            except Exception as error:  # environments raise whatever they like
                problem = repr(error)
    return None, f"{spec.id}, which cannot be made here ({problem:.100})"


def find_local_environment(entry_point) -> None:
    """Makes importable what a script of algorithms/collect has, as reef_sepsis:Sepsis."""
    module = str(entry_point).partition(":")[0]
    path = ROOT / f"algorithms/collect/{module.removeprefix('reef_')}.py"
    if module.startswith("reef_") and module not in sys.modules and path.exists():
        spec = importlib.util.spec_from_file_location(module, path)
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])


def action_names(dataset: minari.MinariDataset) -> list[str]:
    """What the metadata call the choices, or the entries of an action; their numbers where they do not."""
    space, known = dataset.action_space, dataset.storage.metadata
    if isinstance(space, gym.spaces.Discrete):
        names = known.get("action_names", [])
        numbers = range(int(space.start), int(space.start + space.n))
    else:
        names, numbers = known.get("action_columns", []), range(space.shape[0])
    return [escape(f"{name}") for name in (names if len(names) == len(numbers) else numbers)]


def action_bounds(dataset: minari.MinariDataset, env: gym.Env | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Lowest and highest action, float32 [act_dim] each, and whose bounds they are."""
    space, owner = dataset.action_space, "the dataset's"
    if env and isinstance(env.action_space, gym.spaces.Box) and env.action_space.shape == space.shape:
        space, owner = env.action_space, f"those of {env.spec.id}"
    return space.low.astype(np.float32), space.high.astype(np.float32), owner


def references(dataset_id: str, known: Mapping) -> dict[str, tuple[float, str]]:
    """{"ref_min": (return, source), "ref_max": ...}: of the metadata, else of our own table, else empty."""
    names = ("ref_min", "ref_max")
    values = [known.get(f"{name}_score") for name in names]
    if None not in values:
        measured = known.get("reference_scores", {})  # {policy: its episodes}, where Reef's recipes made it
        policies = {entry.get("return_mean"): policy for policy, entry in measured.items()}
        note = f", mean of {known.get('num_episodes_average_score')} episodes"
        sources = [f": {policies[value]}{note}" if value in policies else "" for value in values]
        origin = known.get("reference_source", "the dataset's metadata")
        sources = [f"{origin}{source}" for source in sources]
    else:
        table = pd.read_csv(ROOT / "results/reference_scores.csv", index_col="dataset")
        if dataset_id not in table.index:
            return {}
        values = [table.loc[dataset_id, name] for name in names]
        sources = [f"reference_scores.csv: {table.loc[dataset_id, 'source']}"] * 2
    return dict(zip(names, zip(map(float, values), sources)))


def machine(known: Mapping) -> dict[str, str]:
    """What the data's last digits depend on: processor and packages here, and packages at their making.

    Of a processor its kind: the sines of a simulator are the C library's, which has other code for FMA.
    """
    processor, cpuinfo = platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists() and re.search(r"^flags\b.* fma\b", cpuinfo.read_text(), re.MULTILINE):
        processor += " with FMA"
    here = {package.name: package.version for package in distributions() if package.name in PACKAGES}
    versions = {"Versions here": {"python": platform.python_version(), **here}}
    versions |= {"Versions at its making": known["versions"]} if "versions" in known else {}
    texts = {name: ", ".join(map(" ".join, sorted(entry.items()))) for name, entry in versions.items()}
    return {"Processor here": processor, **texts}


def describe(dataset: minari.MinariDataset) -> dict[str, str]:
    """What the data are made of and by whom, as far as the metadata say it."""
    known, names = dataset.storage.metadata, {"algorithm_name": "Made by", "code_permalink": "Code"}
    space, choices = dataset.observation_space, isinstance(dataset.action_space, gym.spaces.Discrete)
    read = image_of(space) if choices else space
    facts = {"Observations": describe_space(read, "states"), "Actions": describe_space(dataset.action_space)}
    if read is not space:
        facts["Observations"] += f", the image alone of {escape(', '.join(sorted(space)))}"
    for name, key in (("Observed", "observation_columns"), ("Acted on", "action_columns")):
        facts |= {name: ", ".join(map(escape, known[key]))} if key in known else {}
    facts |= {"Authors": ", ".join(sorted(known["author"]))} if "author" in known else {}
    return facts | {name: known[key] for key, name in names.items() if key in known}


def describe_space(space: gym.Space, numbers: str = "choices") -> str:
    """`[4] float32`, a Dict of such, or `25 choices`."""
    if isinstance(space, gym.spaces.Discrete):
        return f"{space.n} {numbers}"
    if isinstance(space, Mapping):
        return "{" + ", ".join(f"{key}: {describe_space(space[key])}" for key in sorted(space)) + "}"
    return f"{[*space.shape]} {space.dtype}"


# ------------------------------------------------ The cards ------------------------------------------------


def make_card(dataset: minari.MinariDataset, folder: Path) -> bool:
    """Writes a card and prints its numbers; false if the data do not have the hash recorded with them."""
    known, data = dataset.storage.metadata, read(dataset)
    env, environment = make_environment(dataset)
    names = action_names(dataset)
    if data.log:
        actions = choice_table(data.log)
        sections = describe_choices(data.log, actions, names)
    else:
        low, high, owner = action_bounds(dataset, env)
        actions = action_table(data.actions, low, high)
        shown = show_actions(actions, names if "action_columns" in known else actions.index)
        sections = ["## Actions", markdown(shown), ACTION_WORDS.format(owner=owner)]
    reference = references(dataset.id, known)
    limits = tuple(value for value, _ in reference.values())
    space = dataset.observation_space
    conditioned = isinstance(space, gym.spaces.Dict) and "desired_goal" in space.spaces
    limits = limits if limits and limits[0] < limits[1] and not conditioned else None
    maze = env.unwrapped.maze if env and hasattr(env.unwrapped, "point_env") else None
    picture = io.BytesIO()
    draw(dataset.id, data, actions, limits, maze).savefig(picture, dpi=100)
    limit = env.spec.max_episode_steps if env else None
    if env:
        env.close()

    card, recorded = folder / f"{dataset.id}.md", known.get("content_hash")
    note = {None: "none recorded", data.digest: "as recorded"}.get(recorded, f"NOT AS RECORDED: {recorded}")
    facts, spread = summarise(data, actions, limits), statistics(data, limits).map(show)
    if conditioned and reference:
        facts["Mean return as a score"] = NO_SCALE
    origin = {"Environment": environment, **describe(dataset), "sha256": f"{data.digest} ({note})"}
    if "recipe" in known:
        origin["Made again"] = "the same on any machine with such a processor and the versions at its making"
    sources = [[name, show(value), source] for name, (value, source) in reference.items()]
    moved = drift(data, names)
    blocks = [
        f"# {dataset.id}",
        html.escape(known.get("description", "").strip(), quote=False),
        f"![Returns, lengths, states and actions]({card.stem}.png)",
        pairs(facts),
        "## Episodes",
        markdown(spread.reset_index(names="")),
        *sections,
        "## Drift" if len(moved) else "",
        markdown(moved) if len(moved) else "",
        DRIFT_WORDS if len(moved) else "",
        "## Reference scores",
        markdown(pd.DataFrame(sources, columns=["", "return", "source"])) if sources else "None is known.",
        f"Episodes of the evaluation last at most {limit} steps." if limit else "",
        "## Origin",
        pairs(origin | machine(known)),
    ]
    write(card.with_suffix(".png"), picture.getvalue())
    write(card, ("\n\n".join(filter(None, blocks)) + "\n").encode())
    print(f"\n{dataset.id}", *(f"  {name:<34}{value}" for name, value in facts.items()), sep="\n")
    print(f"\n{spread.to_string()}\n\nsha256 {origin['sha256']}\nCard: {card}")
    return recorded in (None, data.digest)


def show_actions(actions: pd.DataFrame, names) -> pd.DataFrame:
    """`actions` as text, an entry without bounds as nothing."""
    shares = actions[["clipped", "saturated", "at low", "at high"]]
    shown = shares.map(lambda value: "" if math.isnan(value) else f"{value:.2%}")
    shown = actions.map(show).assign(**shown)
    shown.insert(0, "entry", names)
    return shown


def describe_choices(log: ChoiceLog, actions: pd.DataFrame, names: list[str]) -> list[str]:
    """The blocks of a card that tell how often each choice was made, and of states in which."""
    columns = {"steps": actions["steps"].map("{:,}".format), "share": actions["share"].map("{:.2%}".format)}
    shown = pd.DataFrame({"choice": names, **columns})
    if len(names) > SHOWN:
        shown = shown.loc[actions["steps"].nlargest(SHOWN).index]
    blocks = ["## Choices", markdown(shown)]
    if len(names) > SHOWN:
        blocks.append(f"The {SHOWN} of {len(names):,} choices that were made most.")
    blocks.append(CHOICE_WORDS)
    if log.kind == "states":
        blocks += ["## Pairs of state and choice", markdown(pair_table(log)), PAIR_WORDS]
    return blocks


def check_card(dataset_id: str, card: Path) -> bool:
    """Prints whether the data have the hash of their card, or why that is skipped; false if they do not."""
    said = dict(re.findall(r"^\| (.+?) \| (.+) \|$", card.read_text(), re.MULTILINE))
    if "sha256" not in said:
        raise UserError(f"{card} is no card of a dataset: it names no sha256")
    if not is_here(dataset_id):
        print(f"{dataset_id}: skipped, it is not on this machine")
        return True
    dataset = load_dataset(dataset_id)
    now = machine(dataset.storage.metadata)
    for name in ("Processor here", "Versions here", "Versions at its making"):
        if said.get(name) != now.get(name):
            print(f"{dataset_id}: skipped, {name}: {now.get(name)}; in its card: {said.get(name)}")
            return True
    digest = hashlib.sha256()
    for _ in read_episodes(dataset, digest):
        pass
    found, wanted = digest.hexdigest(), said["sha256"].split()[0]
    print(f"{dataset_id}: {'equal' if found == wanted else f'DIFFERS: sha256 {found}, in its card {wanted}'}")
    return found == wanted


def run(arguments: list[str]) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("ids", nargs="*", metavar="id", help="Minari id; --check takes all cards without one")
    parser.add_argument("--check", action="store_true", help="compare data and cards, write nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "results/cards", help="folder of the cards")
    options = parser.parse_args(arguments)
    if options.check:
        cards = {card.relative_to(options.output).with_suffix("").as_posix(): card
                 for card in sorted(options.output.rglob("*.md"))}
        if missing := {*options.ids} - {*cards}:
            raise UserError(f"{options.output} has no card of {', '.join(sorted(missing))}")
        if not cards:
            raise UserError(f"{options.output} has no cards")
        results = [check_card(name, cards[name]) for name in options.ids or cards]
    elif options.ids:
        datasets = [load_dataset(name) for name in options.ids]  # a typo is found before any work
        results = [make_card(dataset, options.output) for dataset in datasets]
    else:
        raise UserError("name a dataset; `minari list local` lists those on this machine")
    return 0 if all(results) else 1


def main() -> int:
    return exit_status("datasets.py", run, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
