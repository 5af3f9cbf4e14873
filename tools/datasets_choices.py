"""What a log of choices shows: which were made, where, how likely they were, and which were allowed."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
from common import UserError

SHOWN = 25  # choices in a table, at most: those that were made most
OFTEN = (1, 2, 5, 10, 100)  # times that a pair of state and choice was seen
CHOICE_WORDS = """\
The effective number is that of equally likely choices which would be as hard to foretell: the exponential of
the entropy. By shares it is of the table above; given what is observed, which takes propensities, of the mean
of -log propensity."""
PAIR_WORDS = """\
Of a pair that was never seen a log says nothing: what a learner holds of it is a guess. States that end an
episode have no pairs."""


def image_of(tree):
    """The image of a Dict that has one, or of its space; anything else is itself. As the scripts read it."""
    has_one = isinstance(tree, Mapping) and "image" in {*tree}
    return tree["image"] if has_one else tree


def observation_kind(space: gym.Space) -> str:
    """states, planes (images too), vectors (or Dicts of them), or "" for what has no card."""
    if isinstance(space, gym.spaces.Discrete):
        return "states"
    if isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3:
        return "planes"
    if isinstance(space, Mapping):
        return "vectors" if {observation_kind(part) for part in space.values()} == {"vectors"} else ""
    return "vectors" if isinstance(space, gym.spaces.Box) and len(space.shape) == 1 else ""


class ChoiceLog:
    """M episodes of N steps in all, each a choice among A; filled by `add`, read by `column`.

    made [N]           choices, from 0
    before [N]         numbers of what was observed then: a state's own from 0, of others 8 bytes of a hash
    seen [N + M]       such a number for every observation
    same [N]           whether the next observation is equal
    propensity [<= N]  of the episodes that have them: how likely the choice was
    allowed [<= N]     of the episodes that have an action_mask: how many choices were allowed
    forbidden [<= N]   and whether the one made was not
    """

    def __init__(self, dataset: minari.MinariDataset):
        space = image_of(dataset.observation_space)
        self.kind, self.choices = observation_kind(space), int(dataset.action_space.n)
        self.first_choice = int(dataset.action_space.start)
        self.states, self.first_state = 0, 0
        if self.kind == "states":
            self.states, self.first_state = int(space.n), int(space.start)
        self.parts, self.sums = defaultdict(list), 0  # sums over all observations, where they are planes

    def add(self, observations: np.ndarray, episode: minari.EpisodeData, where: str) -> None:
        """An episode with observations [T + 1, ...]. Raises UserError where its infos are malformed."""
        made, infos = np.asarray(episode.actions, np.int64) - self.first_choice, episode.infos or {}
        seen = self.number(observations)
        found = {"made": made, "before": seen[:-1], "seen": seen, "same": seen[1:] == seen[:-1]}
        if "propensity" in infos:
            found["propensity"] = likely = np.asarray(infos["propensity"], np.float64)
            if likely.shape != made.shape or not ((likely > 0) & (likely <= 1)).all():
                raise UserError(f"{where}: propensities of its {len(made)} steps are not all in (0, 1]")
        if "action_mask" in infos:
            mask = np.asarray(infos["action_mask"]).astype(bool)
            if mask.shape != (len(made) + 1, self.choices):
                wanted = (len(made) + 1, self.choices)
                raise UserError(f"{where}: action_mask of shape {mask.shape}, not {wanted}")
            found["allowed"] = mask[:-1].sum(1)
            found["forbidden"] = ~mask[np.arange(len(made)), made]
        if self.kind == "planes":
            self.sums = self.sums + observations.sum(0, dtype=np.float64)
        for name, values in found.items():
            self.parts[name].append(values)

    def number(self, observations: np.ndarray) -> np.ndarray:
        """int64 [T + 1], equal for equal observations."""
        if self.kind == "states":
            return observations.astype(np.int64) - self.first_state
        sums = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in observations]
        return np.frombuffer(b"".join(sums), np.int64)

    def column(self, name: str) -> np.ndarray:
        return np.concatenate(self.parts[name]) if self.parts[name] else np.zeros(0)

    def coverage(self, name: str) -> str:
        """Which episodes have it, where not all do."""
        having, every = len(self.parts[name]), len(self.parts["made"])
        return "" if having == every else f", in {having:,} of {every:,} episodes alone"


# ----------------------------------------------- The numbers -----------------------------------------------


def effective_number(counts: np.ndarray) -> float:
    """exp of the entropy."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def choice_facts(log: ChoiceLog) -> dict[str, str]:
    """How the choices were made, and from what."""
    counts = np.bincount(log.column("made"), minlength=log.choices)
    likely, allowed = log.column("propensity"), log.column("allowed")
    number = f"{effective_number(counts):.1f} by shares"
    facts = {"Choices made": f"{(counts > 0).sum():,} of {log.choices:,}", "Propensities": "none"}
    if len(likely):
        number += f", {np.exp(-np.log(likely).mean()):.1f} given what is observed"
        spread = f"{likely.min():.4g} at least, {likely.mean():.4g} on average"
        facts["Propensities"] = spread + log.coverage("propensity")
    facts |= {"Effective number of choices": number, "Choices allowed": "all, there is no action_mask"}
    if len(allowed):
        spread = f"{allowed.min()} at least, {allowed.mean():.1f} on average"
        facts["Choices allowed"] = spread + log.coverage("allowed")
        facts["Steps with a forbidden choice"] = f"{log.column('forbidden').mean():.2%}"
    return facts


def observation_facts(log: ChoiceLog) -> dict[str, str]:
    """How far observations repeat, and how many choices were tried at one."""
    different, seen = len(np.unique(log.column("seen"))), len(log.column("seen"))
    _, counts = np.unique(log.column("before"), return_counts=True)
    pairs = pair_counts(log)
    if log.kind == "states":
        every = log.states * log.choices
        facts = {
            "States seen": f"{different:,} of {log.states:,}, {len(counts):,} of them with a choice",
            "Effective number of states": f"{effective_number(counts):.1f} of those with a choice",
            "Steps in the 10 most frequent": f"{np.sort(counts)[-10:].sum() / counts.sum():.1%}",
            "Pairs of state and choice seen": f"{len(pairs):,} of {every:,} ({len(pairs) / every:.1%})",
        }
    else:
        facts = {
            "Different observations": f"{different:,} of {seen:,} ({different / seen:.1%})",
            "Steps after which it is the same": f"{log.column('same').mean():.2%}",
            "Different pairs with a choice": f"{len(pairs):,}",
        }
    name = "Choices tried in a state" if log.kind == "states" else "Choices tried at an observation"
    return facts | {name: f"{len(pairs) / len(counts):.1f} on average, where any was"}


def pair_counts(log: ChoiceLog) -> np.ndarray:
    """How often each pair of observation and choice was seen, for those that were at all."""
    _, places = np.unique(log.column("before"), return_inverse=True)
    _, counts = np.unique(places * log.choices + log.column("made"), return_counts=True)
    return counts


def pair_table(log: ChoiceLog) -> pd.DataFrame:
    """Of states alone: how many pairs were seen how often, and the share of the steps that is in them."""
    counts, rows = pair_counts(log), []
    for times in OFTEN:
        kept = counts[counts >= times]
        of_all = len(kept) / (log.states * log.choices)
        rows.append([f"{times:,}", f"{len(kept):,}", f"{of_all:.1%}", f"{kept.sum() / counts.sum():.1%}"])
    return pd.DataFrame(rows, columns=["seen at least", "pairs", "of all", "of the steps"])


def choice_table(log: ChoiceLog) -> pd.DataFrame:
    """A row for each choice: how often it was made. Its index is the environment's numbers."""
    counts = np.bincount(log.column("made"), minlength=log.choices)
    index = log.first_choice + np.arange(log.choices)
    return pd.DataFrame({"steps": counts, "share": counts / counts.sum()}, index)
