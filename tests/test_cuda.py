"""A GPU computes what the CPU does, and a CUDA graph what eager code does; without a GPU all is skipped."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FINETUNE, OFFLINE, learner_class, load_script
from runs import checkpoint, equal, place, small

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DISCRETE = ("bc", "bcq", "cql", "dqn", "dt", "iql")
OBS, ACT, ROWS = 5, 2, 64
SETTINGS = {  # so that every branch of `learn` is taken more than three times in 40 updates
    "hidden_dim": 32, "warmup_updates": 10, "behavior_updates": 8, "ema_every": 2, "vae_updates": 6,
    "online_steps": 20, "updates_per_step": 2, "context": 4, "embedding_dim": 32, "decay_steps": 15,
    "chunk": 1, "plan_horizon": 2,
}


def new_learner(script, device: str, **fields):
    """A learner of vectors [5] and actions [2], or four choices."""
    known = {name: value for name, value in (SETTINGS | fields).items() if hasattr(script.Config, name)}
    config = script.Config(**known)
    if hasattr(script, "Encoder"):
        scaler = script.Encoder(np.zeros((OBS,)), np.ones((OBS,)), 0, 0, 4, 0)
    else:
        scaler = script.Scaler(np.zeros(OBS), np.ones(OBS), -np.ones(ACT), np.ones(ACT))
    torch.manual_seed(0)
    return learner_class(script)(config, scaler.to(device))


def new_batch(script, number: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(number)
    normal = lambda *shape: torch.as_tensor(rng.normal(size=shape), dtype=torch.float32, device="cuda")  # noqa: E731
    name = Path(script.__file__).stem
    if name == "diffusion_policy":
        return {"observations": normal(ROWS, 4, OBS), "actions": normal(ROWS, 16, ACT).clamp(-1, 1)}
    if name == "diffuser":
        trajectories = {"observations": normal(ROWS, 32, OBS), "actions": normal(ROWS, 32, ACT).clamp(-1, 1)}
        return trajectories | {"returns": normal(ROWS)}
    if name == "trajectory_transformer":
        tokens = torch.as_tensor(rng.integers(100, size=(ROWS, 4, OBS + ACT + 2)), device="cuda").int()
        return {"tokens": tokens, "real": torch.ones(ROWS, 4, device="cuda")}
    if name == "dt":
        steps = {"observations": normal(ROWS, 4, OBS), "actions": normal(ROWS, 4, ACT).clamp(-1, 1)}
        if hasattr(script, "Encoder"):
            steps["actions"] = torch.as_tensor(rng.integers(4, size=(ROWS, 4)), device="cuda")
        numbers = torch.arange(4.0, device="cuda").repeat(ROWS, 1)
        steps |= {"returns_to_go": normal(ROWS, 4), "timesteps": numbers}
        return steps | {"real": torch.ones_like(numbers)}
    rows = {"observations": normal(ROWS, OBS), "next_observations": normal(ROWS, OBS)}
    rows |= {"actions": normal(ROWS, ACT).clamp(-1, 1), "rewards": normal(ROWS)}
    rows |= {"terminations": (normal(ROWS) > 1).float()}
    if hasattr(script, "Encoder"):
        rows["actions"] = torch.as_tensor(rng.integers(4, size=ROWS), device="cuda")
    more = {"next_actions": normal(ROWS, ACT).clamp(-1, 1), "has_next": torch.ones(ROWS, device="cuda")}
    return rows | more | {"returns_to_go": normal(ROWS)}


def states(learner) -> dict[str, torch.Tensor]:
    """Weights of all networks by name."""
    parts = {name: part for name, part in vars(learner).items() if isinstance(part, torch.nn.Module)}
    named = [(f"{name}.{key}", value) for name in parts for key, value in parts[name].state_dict().items()]
    return dict(named)


PATHS = [f"offline/{name}.py" for name in OFFLINE] + [f"finetune/{name}.py" for name in FINETUNE]
PATHS += [f"discrete/{name}.py" for name in DISCRETE]


@pytest.mark.parametrize("path", PATHS)
def test_a_graph_computes_what_eager_code_does(path):
    script = load_script(path)
    eager, graphed = (new_learner(script, "cuda", updates=16) for _ in range(2))
    assert script.compile_methods(graphed)
    for learner in (eager, graphed):
        torch.manual_seed(1)
        for number in range(40):
            metrics = learner.update(new_batch(script, number))
    assert graphed.learn.graphs  # it has replayed
    assert graphed.updates == 40
    theirs = states(graphed)
    for name, value in states(eager).items():
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(theirs[name], value, rtol=2e-3, atol=2e-4, msg=message)
    assert all(torch.isfinite(torch.as_tensor(value)) for value in metrics.values())


@pytest.mark.parametrize("name", ["td3_bc", "iql", "cql", "awac"])
def test_the_gpu_computes_what_the_cpu_does(name):
    script = load_script(f"offline/{name}.py")
    ours, theirs = new_learner(script, "cpu"), new_learner(script, "cuda")
    batch = new_batch(script, 0)
    for part, state in states(ours).items():
        torch.testing.assert_close(states(theirs)[part].cpu(), state)
    q, rows = ours.critic, {key: value.cpu() for key, value in batch.items()}
    found = theirs.critic(batch["observations"], batch["actions"]).cpu()
    torch.testing.assert_close(found, q(rows["observations"], rows["actions"]), rtol=1e-4, atol=1e-5)


class Killed(BaseException):
    """What no script catches."""


@pytest.mark.parametrize("name", OFFLINE)
def test_a_run_on_a_gpu_goes_on_to_the_same_bits(scripts, pendulum, tmp_path, monkeypatch, name):
    script, found = scripts[name], {}
    if name != "td3_bc":  # the others' losses are not compiled: it takes long
        monkeypatch.setattr(torch, "compile", lambda method, **options: method)
    for variant in ("whole", "torn"):
        fields = {"variant": variant, "device": "cuda", "compile": "true", "updates": 60}
        arguments = small(script, pendulum, tmp_path, **fields)
        if variant == "torn":
            learner = learner_class(script)
            update = learner.update

            def mortal(self, batch, update=update):
                if self.updates == 33:
                    raise Killed
                return update(self, batch)

            with monkeypatch.context() as patch:
                patch.setattr(learner, "update", mortal)
                with pytest.raises(Killed):
                    script.train(script.parse_config(arguments))
        script.train(script.parse_config(arguments))
        found[variant] = checkpoint(place(tmp_path, name, pendulum, variant))
        assert found[variant]["updates"] == 60
    assert equal(found["whole"]["state"], found["torn"]["state"])
