"""One page on which somebody who does not program can decide: which policy do the logs support, and how far?

  python tools/assess.py DATASET RUN... [--heldout DATASET] [--output FOLDER]

DATASET is the log that the runs learned from, RUN the folder of a finished run. The page, assessment.md
and assessment.html, says of every policy

  values       what it is worth by each estimator of algorithms/evaluate, beside the log's own policy and BC's
  departures   where it decides what the log hardly ever shows: in which observations, by which actions
  losses       on episodes that nothing has learned from (--heldout), beside those of its own log
  drift        whether the log's returns and actions changed over its time
  a verdict    not supported, shadow or canary, by RULES, which stand on the page

With --heldout the values are by those episodes too; without, no policy gets further than shadow. BC is a run
of bc among the RUNs, else a clone of the log's policy that is fitted here. The estimators are those scripts
themselves, called as functions. docs/deciding.md tells how to read the page. The same arguments give the
same page.

  (1)  d_i = min_k |a_i - b_ik|        a_i: the policy's action in state i, b_i1 ...: the log's actions in its
                                       NEIGHBOURS nearest states of other episodes, all in [-1, 1]
  (2)  rare_i: d_i > the NEAR quantile of the log's own d      so of 1 % of its actions
  (3)  rare_i = sum_a pi(a|s_i) [b(a|s_i) < RARE_CHOICE]       of choices; b: the clone of the log's policy
"""

import argparse
import contextlib
import dataclasses
import hashlib
import html
import importlib.util
import inspect
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pandas as pd
import torch
from common import ROOT, UserError, write

ESTIMATORS = {  # script: its function
    "importance_sampling": "weigh_episodes",
    "fqe": "ask_critics",
    "doubly_robust": "correct_critics",
}
TRUSTED = ["FQE", "WIS", "WDR"]  # judge: the others are unbiased, but for long episodes only noise
LOGGED = "the log's own policy"
CLONE = "BC, cloned from the log here"

# The rules, stated before any value is known. Whoever changes one does so before looking at a page.
MOST_RARE = 0.10  # share of rare decisions beyond the log's own: above, its course is nobody's experience
FEW_RARE = 0.03  # up to here, three in a hundred more than the log's own, a policy stays within the log
LEAST_EPISODES = 50  # effective sample size: below, a mean is not known to a seventh of the outcomes' spread
WEIGHTS = (0.5, 2.0)  # mean weight: it is 1 where the log shows all that the policy does
WORST_RATIO = 2.0  # critic's held-out loss to its own: above, it knows its log by heart
MOST_DRIFT = 0.5  # deviations from the log's first third to its last: above, the past is not the present

NEIGHBOURS = 50  # states like it
NEAR = 0.99  # quantile of the log's own distances
LEAST_DISTANCE = 0.05  # of actions in [-1, 1]: nearer is the same, however exactly a log repeats itself
RARE_CHOICE = 0.01  # once in a hundred such states
MOST_SHARED = 0.05  # of held-out episodes: short ones of coarse numbers may repeat by chance
ROWS = 2_000  # decisions looked at
LOOKED_UP = 20_000  # steps of the log among which neighbours are sought
LOSS_ROWS = 4_096  # transitions of a loss


def paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


@contextlib.contextmanager
def translated(script: ModuleType):
    """What a script's user can mend becomes what ours can."""
    try:
        yield
    except script.UserError as error:
        raise UserError(str(error)) from None


# ----------------------------------------- Scripts, runs and logs -----------------------------------------


def load_script(file: Path) -> ModuleType:
    """A script of algorithms/ as a module, loaded once: two families may have the same names."""
    name = f"reef_{file.parent.name}_{file.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def evaluator(name: str) -> ModuleType:
    return load_script(ROOT / f"algorithms/evaluate/{name}.py")


def open_run(folder: Path) -> tuple[ModuleType, object, dict]:
    """The script that made the run, as its path says; the learner that its `load` gives; and run.json."""
    parts = folder.resolve().parts
    paths = [ROOT / "algorithms" / family / f"{name}.py" for family, name in zip(parts, parts[1:])]
    known = [path for path in paths if path.is_file()]
    if not known:
        raise UserError(
            f"{folder} is not where a script puts its runs: .../<family>/<script>/<dataset id>/..."
        )
    try:
        info = json.loads((folder / "run.json").read_text())
        status = info["status"]
        _ = info["config"]["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no folder of a run: {error!r:.150}") from None
    if status != "finished":
        print(f"{folder}: the run is {status}; this is the policy of its last checkpoint", file=sys.stderr)
    script = load_script(known[0])
    if not hasattr(script, "load"):
        raise UserError(f"{folder} is a run of {known[0].stem}, which has no `load`")
    if not (folder / "checkpoint.pt").is_file():
        raise UserError(f"{folder} has no checkpoint.pt, where the policy is")
    with translated(script):
        return script, script.load(str(folder)), info


def names_of(metadata: dict, key: str, count: int, word: str) -> list[str]:
    """The names of `count` columns or choices by a dataset's metadata; where it has none, `word` 0, 1, ..."""
    known = metadata.get(key)
    if isinstance(known, str):
        try:
            known = json.loads(known)
        except ValueError:
            known = None
    if known is None or len(known) != count:
        return [f"{word} {number}" for number in range(count)]
    return [str(name) for name in known]


@dataclasses.dataclass
class Policy:
    """What the page is about."""

    label: str
    ask: object  # observations [M, ...] -> probabilities [M, A], or actions [M, act_dim] in environment units
    script: ModuleType | None = None  # None: the clone
    learner: object = None
    info: dict = dataclasses.field(default_factory=dict)
    metrics: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)

    @property
    def is_bc(self) -> bool:
        return self.script is None or Path(self.script.__file__).stem == "bc"


def open_policy(folder: Path, choices: bool) -> Policy:
    script, learner, info = open_run(folder)
    config, name = info["config"], Path(script.__file__).stem
    if choices != hasattr(learner, "probabilities"):
        kind = "choices" if choices else "vectors of actions"
        raise UserError(
            f"{folder}: {script.__name__.split('_')[1]}/{name} is not for this log, which has {kind}"
        )
    if len(inspect.signature(learner.act).parameters) == 2:
        raise UserError(f"{folder}: {name} remembers its last steps, so a log's states are no question to it")
    try:
        metrics = pd.read_csv(folder / "metrics.csv")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / 'metrics.csv'}: {error!r:.150}") from None
    label = f"{name}, {config.get('variant')}, seed {config.get('seed')}"
    return Policy(label, learner.probabilities if choices else learner.act, script, learner, info, metrics)


class Log:
    """A dataset, its episodes side by side as the evaluators have them, and what its columns are called."""

    def __init__(self, name: str):
        importance = evaluator("importance_sampling")
        with translated(importance), contextlib.redirect_stdout(sys.stderr):
            self.dataset = importance.load_dataset(name)
            self.columns = importance.side_by_side(self.dataset)
        self.name, self.mask = name, self.columns["mask"]
        self.metadata = dict(self.dataset.storage.metadata)
        self.choices = int(self.dataset.action_space.n) if self.columns["actions"].ndim == 2 else 0
        self.episode = np.nonzero(self.mask)[0]  # of each of M steps
        self.observations = self.columns["observations"][:, :-1][self.mask]  # [M, ...]
        self.actions = self.columns["actions"][self.mask]  # [M], or [M, act_dim] in [-1, 1]
        masks = self.columns.get("allowed")
        self.allowed = None if masks is None else masks[:, :-1][self.mask]  # [M, A]
        self.states = self.observations.ndim == 1
        self.planes = self.observations.ndim == 4
        self.returns = self.columns["rewards"].sum(1)
        self.lengths = self.mask.sum(1)
        if self.choices:
            self.action_names = names_of(self.metadata, "action_names", self.choices, "choice")
        else:
            count = self.actions.shape[1]
            self.action_names = names_of(self.metadata, "action_columns", count, "action")
        count = 1 if self.states or self.planes else self.observations.shape[1]
        self.observation_names = names_of(self.metadata, "observation_columns", count, "observation")

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Observations [M, obs_dim], standardised by all of the log's."""
        seen = self.observations.reshape(len(self.observations), -1).astype(np.float64)
        return (seen[rows] - seen.mean(0)) / (seen.std(0) + 1e-9)

    def fingerprints(self) -> set[bytes]:
        rows = zip(self.columns["observations"], self.columns["rewards"], self.lengths)
        return {
            hashlib.sha256(seen[: steps + 1].tobytes() + rewards[:steps].tobytes()).digest()
            for seen, rewards, steps in rows
        }


def check_heldout(log: Log, heldout: Log) -> None:
    """An error unless both are of the same kind, and their episodes are others."""
    kinds = [(one.observations.shape[1:], one.actions.shape[1:], one.choices) for one in (log, heldout)]
    if kinds[0] != kinds[1]:
        raise UserError(f"--heldout: {heldout.name} has other observations or actions than {log.name}")
    if log.states:
        return  # courses through numbered states repeat by themselves
    found = heldout.fingerprints()
    shared = len(log.fingerprints() & found)
    if shared > MOST_SHARED * len(found):
        raise UserError(
            f"--heldout: {shared} episodes of {heldout.name} are in {log.name} as well, so they are "
            "not held out"
        )


# ------------------------------------------------- Values -------------------------------------------------


def estimate_values(log: Log, policies: list[Policy], discount: float, options) -> pd.DataFrame:
    """A row for each policy and estimator: value, low, high, ess, mean_weight. The scripts' own tables."""
    asked = {LOGGED: None} | {policy.label: policy.ask for policy in policies}
    frames = []
    for name, function in ESTIMATORS.items():
        script, tables = evaluator(name), {}
        known = {field.name for field in dataclasses.fields(script.Config)}
        given = {"updates": options.updates, "resamples": options.resamples, "seed": options.seed}
        given |= {"clone_updates": options.clone_updates, "discount": discount, "dataset": log.name}
        config = script.Config(**{key: value for key, value in given.items() if key in known})

        def keep(config, table, name="values", tables=tables):
            tables[name] = table

        with (
            mock.patch.object(script, "gather_policies", return_value=asked),
            mock.patch.object(script, "record", keep),
            contextlib.redirect_stdout(sys.stderr),
            translated(script),
        ):
            getattr(script, function)(config)
        frames.append(tables["values"])
    table = pd.concat(frames, ignore_index=True)
    return table.drop_duplicates(["policy", "estimator"])  # doubly_robust has FQE again, by half of the log


# ----------------------------------------------- Departures -----------------------------------------------


@dataclasses.dataclass
class Departure:
    """Of a policy from the log, in `rows` of the log that judges."""

    rows: np.ndarray
    rare: np.ndarray  # [Q] in [0, 1]: how much of each decision the log hardly ever shows
    own: float  # share of the log's own decisions that would be called so
    actions: pd.DataFrame  # a row a column or choice

    @property
    def share(self) -> float:
        return float(self.rare.mean())


def answers(policy: Policy, log: Log, rows: np.ndarray) -> np.ndarray:
    """Of a policy at `rows` of a log, with torch's noise seeded; an error where they are not finite."""
    masks = {} if log.allowed is None else {"allowed": log.allowed[rows]}
    torch.manual_seed(0)
    try:
        given = np.asarray(policy.ask(log.observations[rows], **masks), np.float64)
    except Exception as error:  # of a log with other observations
        raise UserError(f"{policy.label} does not fit this log: {error!r:.150}") from None
    if not np.isfinite(given).all():
        raise UserError(f"{policy.label}: its actions are not all finite; train it again")
    return given


def choose_rows(log: Log, count: int, seed: int) -> np.ndarray:
    """Steps of the log, in order; all where there are no more than `count`."""
    total = len(log.actions)
    return np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))


def nearest_actions(log: Log, judge: Log, rows: np.ndarray, seed: int) -> np.ndarray:
    """The log's actions [Q, K, act_dim] in the K states nearest to those of `rows` [Q], of other episodes."""
    known = choose_rows(log, LOOKED_UP, seed + 1)
    mean = log.observations.mean(0, np.float64)
    std = log.observations.std(0, np.float64) + 1e-9
    there = torch.as_tensor((log.observations[known] - mean) / std)
    here = torch.as_tensor((judge.observations[rows] - mean) / std)
    count = min(NEIGHBOURS, len(known))
    chosen = []
    for part, episodes in zip(here.split(250), torch.as_tensor(judge.episode[rows]).split(250)):
        distances = torch.cdist(part, there)
        if judge is log:
            distances[episodes[:, None] == torch.as_tensor(log.episode[known])] = math.inf
        chosen.append(distances.topk(count, largest=False).indices)
    return log.actions[known][torch.cat(chosen).numpy()]


def departure_of_vectors(
    policy: Policy, log: Log, judge: Log, rows: np.ndarray, near: np.ndarray
) -> Departure:
    low, high = log.columns["bounds"]
    span = np.maximum(high - low, 1e-9)
    given = 2 * (answers(policy, judge, rows) - low) / span - 1  # [Q, act_dim]
    logged_low, logged_high = judge.columns["bounds"]
    logged = logged_low + (judge.actions[rows] + 1) / 2 * (logged_high - logged_low)
    logged = 2 * (logged - low) / span - 1  # by the same bounds
    distance = np.linalg.norm(given[:, None] - near, axis=2).min(1)  # (1)
    own = np.linalg.norm(logged[:, None] - near, axis=2).min(1)
    limit = max(np.quantile(own, NEAR), LEAST_DISTANCE)
    rare = distance > limit  # (2)
    ends = np.quantile(log.actions, [0.01, 0.99], axis=0)
    outside = ((given < ends[0] - 1e-6) | (given > ends[1] + 1e-6)).mean(0)
    units = low + (np.stack([logged.mean(0), given.mean(0)]) + 1) / 2 * span
    table = pd.DataFrame(
        {
            "action": log.action_names,
            "mean in the log": units[0],
            "mean of the policy": units[1],
            "mean distance": np.abs(given - logged).mean(0) / 2 * span,
            "beyond 98 % of the log": outside,
            "gap": np.abs(given - logged).mean(0),
        }
    )
    return Departure(rows, rare.astype(float), float((own > limit).mean()), table)


def departure_of_choices(
    policy: Policy, log: Log, judge: Log, rows: np.ndarray, shown: np.ndarray
) -> Departure:
    given = answers(policy, judge, rows)  # [Q, A]
    seldom = shown < RARE_CHOICE  # [Q, A]
    rare = (given * seldom).sum(1)  # (3)
    logged = judge.actions[rows]
    own = float(np.take_along_axis(seldom, logged[:, None], 1).mean())
    shares = np.bincount(logged, minlength=log.choices) / len(rows)
    table = pd.DataFrame(
        {
            "choice": log.action_names,
            "share in the log": shares,
            "share of the policy": given.mean(0),
            "of these hardly ever shown": (given * seldom).sum(0) / np.maximum(given.sum(0), 1e-9),
            "gap": np.abs(given.mean(0) - shares),
        }
    )
    return Departure(rows, rare, own, table)


def measure_departures(
    policies: list[Policy], log: Log, judge: Log, clone, seed: int
) -> dict[str, Departure]:
    rows = choose_rows(judge, ROWS, seed)
    if log.choices:
        shown = answers(Policy(CLONE, clone), judge, rows)
        return {p.label: departure_of_choices(p, log, judge, rows, shown) for p in policies}
    near = nearest_actions(log, judge, rows, seed)
    return {p.label: departure_of_vectors(p, log, judge, rows, near) for p in policies}


def where_rare(judge: Log, departure: Departure) -> pd.DataFrame:
    """The observations that tell rare decisions from the others: five columns, or five states."""
    rare, seen = departure.rare > 0.5, judge.observations[departure.rows]
    if judge.planes or not rare.any():
        return pd.DataFrame()
    if judge.states:
        table = pd.DataFrame({"state": seen, "rare": departure.rare}).groupby("state")["rare"]
        table = table.agg(decisions="size", rarely="mean", most="sum").reset_index()
        table = table.sort_values(["most", "state"], ascending=[False, True]).head(5).drop(columns="most")
        return table.rename(
            columns={"state": judge.observation_names[0].removesuffix(" 0"), "rarely": "hardly ever shown"}
        )
    if rare.all():
        return pd.DataFrame()
    seen = seen.astype(np.float64)
    gap = (seen[rare].mean(0) - seen[~rare].mean(0)) / (seen.std(0) + 1e-9)
    first = np.argsort(-np.abs(gap), kind="stable")[:5]
    return pd.DataFrame(
        {
            "observation": [judge.observation_names[column] for column in first],
            "median there": np.median(seen[rare], 0)[first],
            "median elsewhere": np.median(seen[~rare], 0)[first],
            "difference in deviations": gap[first],
        }
    )


# --------------------------------------------- Held-out losses ---------------------------------------------


def imitation_error(policy: Policy, log: Log, seed: int) -> float:
    """Mean squared distance to the log's actions in [-1, 1]; of choices, the share of other ones."""
    rows = choose_rows(log, LOSS_ROWS, seed)
    given, logged = answers(policy, log, rows), log.actions[rows]
    if log.choices:
        return float(1 - np.take_along_axis(given, logged[:, None], 1).mean())
    low, high = log.columns["bounds"]
    return float(np.square(2 * (given - low) / np.maximum(high - low, 1e-6) - 1 - logged).mean())


def learner_losses(policy: Policy, log: Log, judge: Log, seed: int) -> dict[str, float]:
    """The learner's own critic and value losses on transitions of `judge`, rewards scaled as `log`'s."""
    script, learner, config = policy.script, policy.learner, policy.info["config"]
    names = [name for name in ("critic_loss", "value_loss") if hasattr(learner, name)]
    if not names:
        return {}
    scale = config.get("reward_scale", 1.0)
    if config.get("normalize_rewards"):
        scale *= 1000 / max(np.ptp(log.returns), 1e-6)
    with translated(script):
        if log.choices:
            episodes, _ = script.read_choices(judge.dataset)
        else:
            episodes, _ = script.read_episodes(judge.dataset)
        script.scale_rewards(episodes, scale, config.get("reward_shift", 0.0), False)
        if log.choices:
            data = script.choice_transitions(episodes, learner.encoder)
        else:
            data = script.transitions(episodes, learner.scaler)
        if hasattr(script, "next_actions"):  # ReBRAC
            data |= script.next_actions(episodes, learner.scaler)
        if hasattr(script, "returns_to_go"):  # Cal-QL
            gamma = config["discount"]
            values = [script.returns_to_go(e["rewards"], e["terminations"][-1] == 1, gamma) for e in episodes]
            data["returns_to_go"] = torch.as_tensor(np.concatenate(values))
    rows = torch.as_tensor(choose_rows(judge, LOSS_ROWS, seed))
    batch = {name: column[rows] for name, column in data.items()}
    if log.choices:
        batch = learner.encoder.encode_batch(batch)
    torch.manual_seed(seed)
    return {name: float(own_loss(learner, name, batch).detach()) for name in names}


def own_loss(learner, name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss of the learner; those of IQL and its kind are given Q'(s, a), which their update shares."""
    loss = getattr(learner, name)
    if "q" in inspect.signature(loss).parameters:
        return loss(batch, learner.target_q(batch))[0]
    return loss(batch)[0]


def measure_losses(policies: list[Policy], log: Log, heldout: Log, seed: int) -> pd.DataFrame:
    """A row for each policy and loss: on its own log and on the held-out episodes."""
    rows = []
    for policy in policies:
        own, other = {}, {}
        for losses, judge in ((own, log), (other, heldout)):
            losses["imitation error"] = imitation_error(policy, judge, seed)
            if policy.script:
                losses |= learner_losses(policy, log, judge, seed)
        rows += [[policy.label, name.replace("_", " "), own[name], other[name]] for name in own]
    table = pd.DataFrame(rows, columns=["policy", "loss", "own", "heldout"])
    return table.assign(ratio=(table["heldout"] / table["own"]).where(table["own"] > 0))


# -------------------------------------------------- Drift --------------------------------------------------


def measure_drift(log: Log) -> pd.DataFrame:
    """Means by thirds of the log's episodes, in its order; and the change from the first to the last, in
    deviations and in standard errors."""
    episodes = len(log.returns)
    third = np.arange(episodes) * 3 // max(episodes, 3)
    sums = log.columns["rewards"].sum(1) / log.lengths
    columns = {
        "return of an episode": log.returns,
        "steps of an episode": log.lengths,
        "reward of a step": sums,
    }
    of_episode = [log.columns["actions"][i, :steps] for i, steps in enumerate(log.lengths)]
    if log.choices:
        shares = np.stack([np.bincount(a, minlength=log.choices) / len(a) for a in of_episode])
        columns |= {f"share of {name}": shares[:, i] for i, name in enumerate(log.action_names)}
    else:
        low, high = log.columns["bounds"]
        means = low + (np.stack([a.mean(0) for a in of_episode]) + 1) / 2 * (high - low)
        columns |= {name: means[:, i] for i, name in enumerate(log.action_names)}
    rows = []
    for name, values in columns.items():
        parts = [values[third == number].astype(np.float64) for number in range(3)]
        means = [part.mean() if len(part) else math.nan for part in parts]
        change, errors = means[2] - means[0], math.nan
        if min(len(parts[0]), len(parts[2])) > 1:
            errors = math.sqrt(parts[0].var(ddof=1) / len(parts[0]) + parts[2].var(ddof=1) / len(parts[2]))
        spread = values.std()
        sure = abs(change) / errors if errors > 0 else math.inf if errors == 0 and change else 0.0
        rows.append([name, *means, change / spread if spread > 0 else 0.0, sure])
    return pd.DataFrame(rows, columns=["what", "first third", "middle", "last third", "change", "errors"])


def most_moved(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of returns, steps and rewards, then eight actions: those that moved most."""
    actions = table[3:].assign(size=table["change"].abs()).sort_values("size", ascending=False, kind="stable")
    return pd.concat([table[:3], actions.head(8)])[["what", "first third", "middle", "last third", "change"]]


def drifted(table: pd.DataFrame) -> list[str]:
    """What changed by more than MOST_DRIFT deviations, and beyond chance (three standard errors)."""
    moved = table[(table["change"].abs() > MOST_DRIFT) & (table["errors"] > 3)]
    return moved["what"].tolist()


# ----------------------------------------------- The verdict -----------------------------------------------


RULES = paragraphs(f"""\
Not supported: leave it. One of these is enough:

(a) more than {MOST_RARE:.0%} of its decisions, beyond the share among the log's own, are such as the log
hardly ever shows in such states: what they lead to is nobody's experience, and any value is a guess;

(b) it is worse than {LOGGED}: the upper end of its interval is below that one's value, by FQE where (j)
holds, or by WIS or WDR where (e) holds;

(c) its training, or its value by FQE, is not finite.

Canary: a small, watched share of real decisions, with a rule to stop. All of these are needed:

(d) at most {FEW_RARE:.0%} of its decisions, beyond the share among the log's own, are such;

(e) the effective sample size is at least {LEAST_EPISODES} episodes, and the mean weight within {WEIGHTS[0]:g}
and {WEIGHTS[1]:g}: the log shows what the policy does;

(f) the lower ends of its intervals by {", ".join(TRUSTED)} are all above the value of {LOGGED};

(g) the values are by held-out episodes, from which nothing has learned;

(h) no loss of its critic is more than {WORST_RATIO:g} times as large on held-out episodes as on its own;

(i) over the log's time neither returns nor actions moved by more than {MOST_DRIFT:g} of their deviations and
beyond chance;

(j) FQE can be trusted on this log: its interval for {LOGGED} meets what the log really earned.

Shadow: everything else. The policy runs beside the present one and decides nothing; what it would have
done is compared.""")


@dataclasses.dataclass
class Facts:
    """All that the rules ask of a policy."""

    rare: float  # share of decisions that the log hardly ever shows, beyond that of its own
    values: dict[str, tuple[float, float, float]]  # of TRUSTED: value, low, high
    logged: float  # value of the log's own policy
    ess: float
    mean_weight: float
    heldout: bool
    ratio: float  # the largest of its critic; 0 where it has none, nan where its own is not above 0
    drift: list[str]
    finite: bool  # its training
    calibrated: bool  # FQE's interval of the log's own policy meets the log's


def judge_policy(facts: Facts) -> tuple[str, list[str]]:
    """The verdict, and why not more: the rules that speak against it."""
    shown = facts.ess >= LEAST_EPISODES and WEIGHTS[0] <= facts.mean_weight <= WEIGHTS[1]
    counts = {"FQE": facts.calibrated, "WIS": shown, "WDR": shown}
    against = []
    if facts.rare > MOST_RARE:
        against.append(f"(a) hardly ever shown: {facts.rare:.0%} of its decisions beyond the log's share")
    below = [name for name, (_, _, high) in facts.values.items() if counts[name] and high < facts.logged]
    if below:
        against.append(f"(b) worse than {LOGGED} by {', '.join(below)}")
    if not (facts.finite and np.isfinite(facts.values["FQE"]).all()):
        against.append("(c) its training, or its value by FQE, is not finite")
    if against:
        return "not supported", against
    if facts.rare > FEW_RARE:
        against.append(f"(d) hardly ever shown: {facts.rare:.1%} of its decisions beyond the log's share")
    if not shown:
        against.append(f"(e) effective sample size {show(facts.ess)}, mean weight {show(facts.mean_weight)}")
    short = [name for name, (_, low, _) in facts.values.items() if not low > facts.logged]  # nan is not
    if short:
        against.append(f"(f) not surely better than {LOGGED} by {', '.join(short)}")
    if not facts.heldout:
        against.append("(g) no held-out episodes")
    if not facts.ratio <= WORST_RATIO:  # nan cannot be judged
        against.append(f"(h) a loss of its critic is {show(facts.ratio)} times as large on held-out episodes")
    if facts.drift:
        against.append(f"(i) over the log's time moved: {', '.join(facts.drift)}")
    if not facts.calibrated:
        against.append(f"(j) FQE misses what the log earned, of {LOGGED}")
    return ("shadow", against) if against else ("canary", ["nothing in the rules speaks against it"])


def gather_facts(policy: Policy, values: pd.DataFrame, departure: Departure, losses, drift: list) -> Facts:
    mine = values[values["policy"] == policy.label].set_index("estimator")
    present = (
        values[values["policy"] == LOGGED].set_index("estimator")[["value", "low", "high"]].astype(float)
    )
    logged, cloned = present.loc["IS"], present.loc["FQE"]
    calibrated = bool(cloned["low"] <= logged["high"] and logged["low"] <= cloned["high"])
    trusted = {name: tuple(mine.loc[name, ["value", "low", "high"]].astype(float)) for name in TRUSTED}
    ratio = 0.0
    if losses is not None:
        ratios = losses[(losses["policy"] == policy.label) & (losses["loss"] != "imitation error")]["ratio"]
        ratio = ratios.max(skipna=False) if len(ratios) else 0.0
    last = policy.metrics.tail(1).select_dtypes("number")
    finite = policy.info.get("status") != "diverged" and not np.isinf(last.to_numpy()).any()
    weights = mine.loc["WIS", ["ess", "mean_weight"]].astype(float)
    return Facts(
        rare=departure.share - departure.own,
        values=trusted,
        logged=float(logged["value"]),
        ess=weights["ess"],
        mean_weight=weights["mean_weight"],
        heldout=losses is not None,
        ratio=ratio,
        drift=drift,
        finite=finite,
        calibrated=calibrated,
    )


# ------------------------------------------------- The page -------------------------------------------------

CAUTION = paragraphs("""\
A verdict makes a candidate, not a licence. People who know the process decide, and look at single cases
first.

If something that is not among the observations drove both the decisions and the outcome (confounding: doctors
who saw what the table does not hold), every value here is wrong, and no number on this page shows it.

The intervals are over the episodes drawn anew. They assume that episodes are independent, that the world
stays as it was in the log, and, where the log has no propensities, that a clone of its policy is right. They
say nothing of what the log never shows.

Departures are seen in the log's states only: where a policy would lead beyond them, this page is blind.\
""")

VALUES = """\
What an episode earns, by {judged}, each reward discounted by {discount:g} a step; with a 95 % interval.
{of_whom} The row of the log's own policy is what the log itself earned (for FQE: what a clone of its policy
would earn). Estimators that disagree say that the log cannot tell. The effective sample size is how many
episodes of its own would say as much of a policy. Propensities: {sources}."""

PROPENSITIES = {"log": "as logged", "cloned": "of a clone"}
FROM_TRAINING = "These are the episodes that the policies learned from, so that values may flatter them."
FROM_ELSEWHERE = "Nothing has learned from these."

RARE_CHOICES = f"""\
A choice is such if the log makes it in less than {RARE_CHOICE:.0%} of such states, by its clone."""
RARE_VECTORS = f"""\
An action is such if it is farther from all actions in the {NEIGHBOURS} most similar states of the log than
{NEAR:.0%} of the log's own are."""

LOSSES = """\
The imitation error is the mean squared distance to the logged action in [-1, 1], or the share of other
choices; a learner that improves on the log has a larger one than BC. Critics' losses compare only with
themselves: a ratio far above 1 says that it knows its own log by heart."""


def show(value) -> str:
    """Any cell as text: four digits of a number, unknown where it is not finite."""
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if not math.isfinite(value):
        return "unknown"
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.2e}"
    return f"{round(float(f'{value:.4g}'), 6):,}".removesuffix(".0")


def percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %") if math.isfinite(share) else "unknown"


def with_ends(row) -> str:
    return f"{show(row['value'])} [{show(row['low'])}, {show(row['high'])}]"


def table_block(frame: pd.DataFrame, shares: tuple = ()) -> tuple:
    """The block of a frame; columns in `shares` are shown in per cent."""
    rows = []
    for _, row in frame.iterrows():
        rows.append([percent(row[name]) if name in shares else show(row[name]) for name in frame])
    return "table", list(frame), rows


def value_blocks(values: pd.DataFrame) -> list[tuple]:
    names = list(dict.fromkeys(values["policy"]))
    estimators = list(dict.fromkeys(values["estimator"]))
    cells = {(row["policy"], row["estimator"]): row for _, row in values.iterrows()}
    rows = []
    for name in names:
        found = [cells.get((name, estimator)) for estimator in estimators]
        weights = cells[name, "WIS"]
        rows.append(
            [
                name,
                *("" if row is None else with_ends(row) for row in found),
                show(float(weights["ess"])),
                show(float(weights["mean_weight"])),
            ]
        )
    columns = ["policy", *estimators, "effective sample size", "mean weight"]
    return [("table", columns, rows), ("figure", values)]


def departure_blocks(policy: Policy, departure: Departure, judge: Log) -> list[tuple]:
    shares = (
        "beyond 98 % of the log",
        "share in the log",
        "share of the policy",
        "of these hardly ever shown",
        "hardly ever shown",
    )
    actions = departure.actions.sort_values("gap", ascending=False, kind="stable").head(8).drop(columns="gap")
    blocks = [("heading", 3, policy.label), table_block(actions, shares)]
    where = where_rare(judge, departure)
    if len(where):
        blocks += [("text", "Where it decides what the log hardly ever shows:"), table_block(where, shares)]
    elif judge.planes and departure.share > 0:
        blocks.append(("text", "Observations are images, so that no column tells where."))
    return blocks


def compose(
    log: Log, judge: Log, discount: float, policies, values, departures, losses, drift, options
) -> list:
    """The page as blocks: (kind, content...). One list makes both files."""
    moved = drifted(drift)
    rows = []
    for policy in policies:
        departure = departures[policy.label]
        facts = gather_facts(policy, values, departure, losses, moved)
        verdict, reasons = judge_policy(facts)
        rows.append([policy.label, verdict, "; ".join(reasons)])
    sources = " and ".join(sorted({PROPENSITIES[name] for name in values["propensities"].dropna()}))
    judged = f"{len(judge.returns):,} episodes, {int(judge.mask.sum()):,} steps of {judge.name}"
    of_whom = FROM_ELSEWHERE if judge is not log else FROM_TRAINING
    rare = RARE_CHOICES if log.choices else RARE_VECTORS
    decisions = len(departures[policies[0].label].rows)
    moved_text = f"It moved: {', '.join(moved)}." if moved else "Nothing moved by rule (i)."
    share_rows = [[policy.label, percent(departures[policy.label].share)] for policy in policies]
    share_rows.append([LOGGED, percent(departures[policies[0].label].own)])
    blocks = [
        ("heading", 1, f"Assessment: {log.name}"),
        ("table", ["policy", "verdict", "what speaks against more"], rows),
        ("heading", 2, "Before anything else"),
        ("list", CAUTION),
        ("heading", 2, "The rules, stated beforehand"),
        ("list", RULES),
        ("heading", 2, "Values"),
        ("text", VALUES.format(judged=judged, discount=discount, of_whom=of_whom, sources=sources)),
        *value_blocks(values),
        ("heading", 2, "Where a policy departs from the log"),
        ("text", f"Share of {decisions:,} decisions that the log hardly ever shows. {rare}"),
        ("table", ["policy", "hardly ever shown"], share_rows),
    ]
    for policy in policies:
        blocks += departure_blocks(policy, departures[policy.label], judge)
    blocks.append(("heading", 2, "Losses on held-out episodes"))
    if losses is None:
        blocks.append(("text", "No episodes were held out (--heldout)."))
    else:
        blocks.append(("text", LOSSES))
        names = {"own": "its own log", "heldout": "held-out episodes"}
        blocks.append(table_block(losses.rename(columns=names)))
    episodes = f"{len(log.returns):,} episodes"
    made_by = f"{options.updates:,} updates of a critic, {options.clone_updates:,} of a clone"
    blocks += [
        ("heading", 2, "Drift over the log's time"),
        ("text", f"Means by thirds of the {episodes}, in the order that they have in the log. {moved_text}"),
        table_block(most_moved(drift).rename(columns={"change": "change in deviations"})),
        ("heading", 2, "How this page was made"),
        (
            "table",
            ["policy", "learned from", "updates", "commit", "its log's sha256"],
            [[policy.label, *origin(policy)] for policy in policies],
        ),
        ("text", f"tools/assess.py, seed {options.seed}: {made_by}, {options.resamples:,} resamples."),
    ]
    return blocks


def origin(policy: Policy) -> list[str]:
    if policy.script is None:
        return ["this log", "", "", ""]
    config = policy.info["config"]
    facts = (
        config["dataset"],
        policy.learner.updates,
        policy.info.get("commit"),
        policy.info.get("dataset_hash"),
    )
    return [show(facts[0]), show(facts[1]), str(facts[2])[:8], str(facts[3])[:8]]


# ---------------------------------------- Markdown, HTML, a figure ----------------------------------------


def plain(text: str) -> str:
    """One line without control characters: names may be anything."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def as_markdown(text: str) -> str:
    text = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\`*_[]|#~!":
        text = text.replace(sign, f"\\{sign}")
    return text


def markdown_page(blocks: list[tuple]) -> str:
    parts = []
    for kind, *content in blocks:
        if kind == "heading":
            parts.append(f"{'#' * content[0]} {as_markdown(content[1])}")
        elif kind == "text":
            parts.append(as_markdown(content[0]))
        elif kind == "list":
            parts.append("\n".join(f"- {as_markdown(line)}" for line in content[0]))
        elif kind == "table":
            columns, rows = content
            lines = [columns, ["---"] * len(columns), *rows]
            lines = [cells if i == 1 else map(as_markdown, cells) for i, cells in enumerate(lines)]
            parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(parts) + "\n"


def html_table(columns: list[str], rows: list[list[str]]) -> str:
    def cell(tag: str, text: str, first: bool) -> str:
        words = {"not supported": "no", "shadow": "wait", "canary": "yes"}
        number = plain(text)[:1].isdigit() or plain(text)[:2].lstrip("-")[:1].isdigit()
        style = words.get(text) or ("number" if number and not first else "")
        return f'<{tag} class="{style}">{html.escape(plain(text))}</{tag}>'

    head = "".join(f"<th>{html.escape(plain(name))}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(cell("th" if i == 0 else "td", text, i == 0) for i, text in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def html_figure(values: pd.DataFrame) -> str:
    """Every value with its interval as one drawing; what is far beyond the others ends at the margin."""
    rows = values[np.isfinite(values[["value", "low", "high"]].astype(float)).all(axis=1)]
    if rows.empty:
        return ""
    width = (rows["high"] - rows["low"]).astype(float)
    usual = rows[width <= 10 * width.median() + 1e-12]
    low, high = float(usual["low"].min()), float(usual["high"].max())
    span = (high - low) or 1.0
    left, right, step = 150, 620, 18

    def place(x: float) -> float:
        return round(left + (min(max((x - low) / span, 0), 1)) * (right - left), 1)

    logged = rows[(rows["policy"] == LOGGED) & (rows["estimator"] == "IS")]
    parts, y = [], 4
    for policy, group in rows.groupby("policy", sort=False):
        y += step + 4
        parts.append(f'<text x="0" y="{y}" class="name">{html.escape(plain(policy))}</text>')
        for _, row in group.iterrows():
            y += step
            ends = place(row["low"]), place(row["high"])
            parts.append(
                f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{html.escape(row["estimator"])}</text>'
                f'<line x1="{ends[0]}" x2="{ends[1]}" y1="{y}" y2="{y}" class="interval"/>'
                f'<circle cx="{place(row["value"])}" cy="{y}" r="4"/>'
            )
    y += step
    for x, anchor in ((low, "start"), (high, "end")):
        parts.append(f'<text x="{place(x)}" y="{y + 8}" text-anchor="{anchor}">{show(x)}</text>')
    line = ""
    if len(logged):
        x = place(float(logged["value"].iloc[0]))
        line = f'<line x1="{x}" x2="{x}" y1="10" y2="{y - 8}" class="logged"/>'
    label = "Values with their intervals; the dashed line is what the log earned"
    return (
        f'<figure><svg viewBox="0 0 640 {y + 14}" role="img" aria-label="{label}">'
        f"{line}{''.join(parts)}</svg>"
        f"<figcaption>{label}. An interval that is far longer than the others ends at the margin."
        "</figcaption></figure>"
    )


def html_page(blocks: list[tuple]) -> str:
    parts = []
    for kind, *content in blocks:
        if kind == "heading":
            parts.append(f"<h{content[0]}>{html.escape(plain(content[1]))}</h{content[0]}>")
        elif kind == "text":
            parts.append(f"<p>{html.escape(plain(content[0]))}</p>")
        elif kind == "list":
            items = "".join(f"<li>{html.escape(plain(line))}</li>" for line in content[0])
            parts.append(f"<ul>{items}</ul>")
        elif kind == "table":
            parts.append(html_table(*content))
        else:
            parts.append(html_figure(content[0]))
    title = html.escape(plain(blocks[0][2]))
    template = Path(__file__).with_suffix(".html").read_text()
    return template.replace("@TITLE@", title).replace("@BODY@", "\n".join(parts))


# ------------------------------------------------ All of it ------------------------------------------------


def choose_discount(policies: list[Policy], given: float | None) -> float:
    """That of the runs, unless it is given."""
    if given is not None:
        return given
    found = {policy.info["config"]["discount"] for policy in policies if "discount" in policy.info["config"]}
    if len(found) > 1:
        raise UserError(
            f"the runs have discounts {', '.join(map(str, sorted(found)))}: choose one, --discount"
        )
    return found.pop() if found else 1.0


def assess(options: argparse.Namespace) -> Path:
    """Writes the page and says where."""
    log = Log(options.dataset)
    if options.heldout == options.dataset:
        raise UserError("--heldout is the log itself: name a dataset of other episodes")
    heldout = Log(options.heldout) if options.heldout else None
    if heldout:
        check_heldout(log, heldout)
    judge = heldout or log
    policies = [open_policy(folder, bool(log.choices)) for folder in dict.fromkeys(options.runs)]
    for policy in policies:
        learned = policy.info["config"]["dataset"]
        if learned != options.dataset:
            raise UserError(
                f"{policy.label} learned from {learned}, not from {options.dataset}: DATASET is what runs"
                " learned from, --heldout what none has seen"
            )
    for number, policy in enumerate(policies):
        if policy.label in {other.label for other in policies[:number]} | {LOGGED, CLONE}:
            policy.label += f" ({number + 1})"
    fqe = evaluator("fqe")
    with translated(fqe):
        clone = fqe.clone_policy(log.dataset, log.columns, options.clone_updates, options.seed)
    if not any(policy.is_bc for policy in policies):
        policies.append(Policy(CLONE, clone))
    discount = choose_discount([policy for policy in policies if policy.script], options.discount)
    departures = measure_departures(policies, log, judge, clone, options.seed)
    losses = measure_losses(policies, log, heldout, options.seed) if heldout else None
    values = estimate_values(judge, policies, discount, options)
    drift = measure_drift(log)
    blocks = compose(log, judge, discount, policies, values, departures, losses, drift, options)
    folder = options.output or ROOT / "results/runs/assess" / options.dataset
    write(folder / "assessment.md", markdown_page(blocks))
    write(folder / "assessment.html", html_page(blocks))
    return folder


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("dataset", metavar="DATASET", help="Minari id of the log that the runs learned from")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument("--heldout", help="Minari id of episodes that nothing has learned from")
    parser.add_argument("--output", type=Path, help="folder of the page (results/runs/assess/DATASET)")
    parser.add_argument("--discount", type=float, help="gamma of the values (that of the runs)")
    parser.add_argument("--seed", type=int, default=0, help="of networks, rows and resamples (0)")
    parser.add_argument("--updates", type=int, default=20_000, help="of each critic (20,000)")
    parser.add_argument(
        "--clone_updates", type=int, default=5_000, help="of each clone of the log's policy (5,000)"
    )
    parser.add_argument("--resamples", type=int, default=1_000, help="of the episodes (1,000)")
    options = parser.parse_args(arguments)
    if options.discount is not None and not 0 <= options.discount <= 1:
        parser.error("--discount has to be in [0, 1]")
    if min(options.updates, options.clone_updates, options.resamples) < 1 or options.seed < 0:
        parser.error("--updates, --clone_updates and --resamples have to be at least 1, --seed at least 0")
    torch.set_num_threads(1)  # small products
    try:
        folder = assess(options)
    except (UserError, OSError) as error:
        print(f"assess.py: {plain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("assess.py: interrupted", file=sys.stderr)
        return 130
    print(f"written to {folder / 'assessment.html'} and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
