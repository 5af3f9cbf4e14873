"""A run's policy as an ONNX file, which any ONNX runtime plays, without torch and without Reef.

  python tools/export.py RUN                       writes RUN/policy.onnx
  python tools/export.py RUN --output file.onnx    writes it there

RUN is a run's folder, such as results/runs/offline/iql/<dataset id>/default/seed-0. What goes in and out:

  observations   raw: [batch, obs_dim] float32 (a Dict's entries side by side, by sorted key), [batch] int64
                 states, or [batch, height, width, channels] uint8 planes
  actions        [batch, act_dim] float32 in the environment's units, or [batch] int64 choices in its numbers
  probabilities  [batch, choices] of choices; a policy that draws has these alone: whoever plays it draws

Names, bounds and origin are in the file's metadata (docs/deciding.md lists them). The batch is 1 where a
policy ponders each observation for itself (bcq, bear). A policy that draws vectors (idql, fql, diffusion_ql)
or remembers its past (dt, diffusion_policy, q_chunking, diffuser, trajectory_transformer) is no
function of an observation: it is refused.

What is traced is the script's own `act`. Before the file is put in place onnxruntime has to answer as `act`
does on 1,000 observations: of the dataset if it is on this machine, else drawn by the run's own scales.
"""

import argparse
import inspect
import json
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from unittest import mock

import minari
import numpy as np
import onnx
import onnxruntime
import torch
from assess import UserError, names_of, open_run
from common import exit_status
from datasets_choices import image_of
from torch import Tensor, nn

CHECKED = 1000  # observations
TOLERANCE = 1e-5  # of an action's range, or of a probability: float32 sums in another order differ by 1e-6
TIES = 0.002  # share of observations where rounding may turn a choice between two that are as good
ONE_BY_ONE = {"bcq", "bear"}  # they go through a batch row by row
DRAWS = "draws its actions from noise at each call, so that no single network gives them"
REMEMBERS = "remembers its last steps and rewards: its action is no function of the observation alone"


def local_dataset(name: str) -> minari.MinariDataset | None:
    """The dataset, if it is on this machine."""
    if not (minari.storage.get_dataset_path(name) / "data").exists():
        return None
    try:
        return minari.load_dataset(name)
    except Exception as error:  # h5py, pyarrow and json have no error in common
        raise UserError(f"cannot load {name}: {error!r:.150}") from None


# ------------------------------------------------ The policy ------------------------------------------------


class Traced(nn.Module):
    """`act` of a learner from tensors to tensors: actions; or actions and probabilities of choices."""

    def __init__(self, learner, choices: bool):
        super().__init__()
        self.learner, self.choices = learner, choices

    def forward(self, observations: Tensor):
        learner = self.learner
        if not self.choices:
            return type(learner).act.__wrapped__(learner, observations)  # without inference_mode
        probabilities = type(learner).probabilities.__wrapped__(learner, observations)
        return probabilities.argmax(-1) + int(learner.encoder.first_choice), probabilities.float()


def write_onnx(
    learner, choices: bool, example: np.ndarray, drawn: bool, one_by_one: bool, file: Path
) -> None:
    """Traces the learner's `act`; where it goes through NumPy on the way, tensors go on as tensors."""
    for module in vars(learner).values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False)
    outputs = ["actions", "probabilities"] if choices else ["actions"]
    axes = {} if one_by_one else {name: {0: "batch"} for name in ("observations", *outputs)}
    scaler = learner.encoder if choices else learner.scaler
    if choices:
        instead = {"encode": scaler.forward}
    else:
        instead = {
            "scale_observations": lambda observations: (observations - scaler.mean) / scaler.std,
            "unscale_actions": lambda actions: scaler.low + (actions + 1) / 2 * (scaler.high - scaler.low),
        }
    with (
        mock.patch.multiple(scaler, **instead),
        mock.patch.object(torch.Tensor, "numpy", lambda tensor: tensor),
        warnings.catch_warnings(action="ignore"),  # of what becomes a constant; the check below tells
    ):
        torch.onnx.export(
            Traced(learner, choices).eval(),
            (torch.as_tensor(example),),
            str(file),
            input_names=["observations"],
            output_names=outputs,
            dynamic_axes=axes,
            dynamo=False,  # by tracing: it needs no further package, and takes a third of a second
        )
    if drawn:  # the most probable choice is not what this policy does
        model = onnx.load(str(file))
        (unused,) = [output for output in model.graph.output if output.name == "actions"]
        model.graph.output.remove(unused)
        onnx.save(model, str(file))


def gather_observations(learner, choices: bool, dataset, flatten) -> tuple[np.ndarray, str]:
    """CHECKED raw observations, and where they are from."""
    rng = np.random.default_rng(0)
    scaler = learner.encoder if choices else learner.scaler
    states = choices and len(scaler.mean) == 0
    planes = choices and scaler.mean.ndim == 3
    if dataset is not None:
        raw = states or planes
        seen = [
            np.asarray(image_of(episode.observations)) if raw else flatten(episode.observations)
            for episode in dataset.iterate_episodes()
        ]
        seen = np.concatenate(seen)
        seen = seen.astype(np.int64) if states else seen
        return seen[rng.integers(len(seen), size=CHECKED)], f"of {dataset.id}"
    if states:
        first = int(scaler.first_state)
        return rng.integers(first, first + scaler.shape[0], size=CHECKED), "drawn among the states"
    if planes:
        return rng.integers(256, size=(CHECKED, *scaler.shape), dtype=np.uint8), "drawn at random"
    mean, std = scaler.mean.numpy(), scaler.std.numpy()
    drawn = mean + std * rng.normal(size=(CHECKED, len(mean)))
    return drawn.astype(np.float32), "drawn by the run's scales, as its dataset is not on this machine"


def answers(ask, observations: np.ndarray, seed: int) -> np.ndarray:
    """What a method of a learner says, with torch's noise seeded."""
    torch.manual_seed(seed)
    return np.asarray(ask(observations))


def compare(file: Path, observations: np.ndarray, one_by_one: bool, wanted: dict, scale: np.ndarray) -> tuple:
    """Of onnxruntime's answers and `wanted`: the largest difference within TOLERANCE, in parts of `scale`;
    and the share of observations that differ by more."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    rows = np.split(observations, len(observations)) if one_by_one else [observations]
    given = [session.run(list(wanted), {"observations": row}) for row in rows]
    largest, differs = 0.0, np.zeros(len(observations), bool)
    for found, (name, expected) in zip(zip(*given), wanted.items()):
        unit = scale if name == "actions" else 1.0
        difference = np.abs(np.concatenate(found) - expected.astype(np.float64)) / unit
        difference = difference.reshape(len(observations), -1).max(1)
        bad = ~(difference <= TOLERANCE)  # nan is bad
        differs |= bad
        largest = max(largest, float(difference[~bad].max(initial=0)))
    return largest, float(differs.mean())


def describe(script: ModuleType, info: dict, metadata: dict, learner, choices: bool, checked: str) -> dict:
    """The file's metadata: texts, and lists as JSON."""
    if choices:
        encoder, count = learner.encoder, int(learner.encoder.choices)
        size = 1 if len(encoder.mean) == 0 else int(encoder.mean.numel())
        first = int(encoder.first_choice)
        actions = names_of(metadata, "action_names", count, "choice")
        bounds = {"first_choice": str(first)}
        unit = "a choice is a number, from first_choice on; action_names are their meanings in this order"
    else:
        size = learner.scaler.obs_dim
        actions = names_of(metadata, "action_columns", learner.scaler.act_dim, "action")
        bounds = {"action_low": json.dumps(learner.scaler.low.tolist())}
        bounds["action_high"] = json.dumps(learner.scaler.high.tolist())
        unit = "the environment's: each action lies between action_low and action_high"
    config = info["config"]
    return {
        "observation_names": json.dumps(names_of(metadata, "observation_columns", size, "observation")),
        "observation_units": "the dataset's: raw, as they were logged",
        "action_names": json.dumps(actions),
        "action_units": unit,
        **bounds,
        "algorithm": script.__name__.removeprefix("reef_").replace("_", "/", 1),
        "dataset": config["dataset"],
        "dataset_hash": str(info.get("dataset_hash", "")),
        "variant": str(config.get("variant", "")),
        "seed": str(config.get("seed", "")),
        "updates": str(learner.updates),
        "commit": str(info.get("commit", "")),
        "checked": checked,
    }


def export(folder: Path, output: Path) -> str:
    """Writes the file and says what was checked."""
    script, learner, info = open_run(folder)
    name = Path(script.__file__).stem
    if len(inspect.signature(learner.act).parameters) == 2:
        raise UserError(f"{name} cannot be exported: it {REMEMBERS}")
    choices = hasattr(learner, "probabilities")
    dataset = local_dataset(info["config"]["dataset"])
    metadata = dict(dataset.storage.metadata) if dataset is not None else {}
    observations, source = gather_observations(learner, choices, dataset, script.flatten)
    wanted = {"actions": answers(learner.act, observations, seed=0)}
    once, again = (answers(learner.act, observations[:50], seed) for seed in (0, 1))  # not of all: bits vary
    drawn = not np.array_equal(once, again)
    if drawn and not choices:
        raise UserError(f"{name} cannot be exported: it {DRAWS}; td3_bc, iql or cql can be")
    scale = 1.0
    if choices:
        wanted["probabilities"] = np.asarray(learner.probabilities(observations))
        if drawn:
            del wanted["actions"]
    else:
        scale = (learner.scaler.high - learner.scaler.low).clamp(min=1e-6).numpy()
    one_by_one = name in ONE_BY_ONE and not choices  # discrete/bcq takes a batch at once
    picks = one_by_one or (choices and not drawn)  # the best of several
    new = output.with_name(f"{output.name}.new")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_onnx(learner, choices, observations[: 1 if one_by_one else 2], drawn, one_by_one, new)
        largest, differ = compare(new, observations, one_by_one, wanted, scale)
        if differ > (TIES if picks else 0):
            raise UserError(
                f"{name} was not exported: onnxruntime answers differently on {differ:.1%} of "
                f"{CHECKED:,} observations {source}; please report it"
            )
        checked = f"{CHECKED:,} observations {source}: largest difference {largest:.1e}"
        checked += f", other choices on {differ:.1%}" if differ else ""
        model = onnx.load(str(new))
        onnx.helper.set_model_props(model, describe(script, info, metadata, learner, choices, checked))
        onnx.checker.check_model(model)
        onnx.save(model, str(new))
        os.replace(new, output)
    finally:
        new.unlink(missing_ok=True)
    return checked


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--output", type=Path, help="the file, an .onnx (RUN/policy.onnx)")
    options = parser.parse_args(arguments)
    output = options.output or options.run / "policy.onnx"
    if output.suffix != ".onnx":
        parser.error(f"--output: {output} does not end in .onnx")
    return exit_status("export.py", lambda: print(f"{output}: as `act` on {export(options.run, output)}"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
