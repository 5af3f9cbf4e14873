"""What the oracle tests of model-based scripts share: the ensemble in NumPy, and what holds for each."""

import numpy as np
import pytest
import torch
from conftest import learner_class, short
from oracles import ACT, OBS, assert_close, assert_loss_and_gradient, perceptron, weights
from runs import assert_same_run, place

SMALL = {"hidden_dim": 4, "hidden_layers": 2, "model_hidden_dim": 3, "ensemble": 3, "elites": 2}
SHORT = {"model_hidden_dim": 8, "model_epochs": 4, "rollout_every": 10, "rollout_batch": 20}
RATES = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # decay of the layers' weights


def fix_model(learner, seed: int = 7):
    """The learner with weights of the model that are the same everywhere, and inputs to be standardised."""
    rng, model = np.random.default_rng(seed), learner.model
    for weight in model.parameters():
        weight.data = torch.tensor(rng.normal(scale=0.7, size=weight.shape), dtype=torch.float32)
    learner.best_layers.load_state_dict(model.layers.state_dict())
    model.max_log_var.data += 0.5
    model.min_log_var.data -= 3
    model.mean.copy_(torch.tensor(rng.normal(size=OBS + ACT)))
    model.std.copy_(torch.tensor(rng.uniform(0.5, 2, size=OBS + ACT)))
    return learner


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def predictions(layers: list, scale: tuple, observations: np.ndarray, actions: np.ndarray) -> tuple:
    """Means and log variances [E, B, OBS + 1] of the weights of a model, for rows [B, .] or [E, B, .]."""
    high, low, *net = layers[:12]
    x = (np.concatenate([observations, actions], axis=-1) - scale[0]) / scale[1]
    for number in range(0, 10, 2):
        x = x @ net[number] + net[number + 1]
        if number < 8:
            x = x / (1 + np.exp(-x))
    mean, log_var = x[..., : OBS + 1], x[..., OBS + 1 :]
    log_var = high - softplus(high - log_var)
    return mean, low + softplus(log_var - low)


def scale_of(model) -> tuple[np.ndarray, np.ndarray]:
    return model.mean.numpy().astype(np.float64), model.std.numpy().astype(np.float64)


def check_predictions(learner, rows: dict) -> None:
    """(1): means and bounded log variances, of shared rows and of each member's own."""
    model = learner.model
    own = {key: np.stack([rows[key], -rows[key], rows[key] * 2]) for key in ("observations", "actions")}
    for inputs in (rows, own):
        states = torch.tensor(inputs["observations"], dtype=torch.float32)
        actions = torch.tensor(inputs["actions"], dtype=torch.float32)
        mean, log_var = model(states, actions)
        wanted = predictions(weights(model), scale_of(model), inputs["observations"], inputs["actions"])
        assert_close([mean.detach().numpy(), log_var.detach().numpy()], [*wanted])


def check_model_loss(learner, rows: dict) -> None:
    """(2) and its gradients, on rows of its own for each member; with the classifier's cross entropy."""
    model = learner.model
    own = {key: np.stack([values, values[::-1], values[[1, 2, 0]] * 0.5]) for key, values in rows.items()}
    own["terminations"] = (own["terminations"] > 0) * 1.0
    scale = scale_of(model)

    def oracle(layers):
        mean, log_var = predictions(layers, scale, own["observations"], own["actions"])
        change = own["next_observations"] - own["observations"]
        y = np.concatenate([change, own["rewards"][..., None]], axis=-1)
        total = 0.01 * np.sum(layers[0] - layers[1])
        for member in range(3):
            variance = np.exp(log_var[member])
            total += np.mean((mean[member] - y[member]) ** 2 / variance + np.log(variance))
        for rate, layer in zip(RATES, layers[2:12:2]):
            total += rate / 2 * np.sum(layer**2)
        ends = (own["next_observations"].reshape(9, OBS) - scale[0][:OBS]) / scale[1][:OBS]
        share = 1 / (1 + np.exp(-perceptron(layers[12:], ends)[:, 0]))
        flags = own["terminations"].reshape(9)
        return total - np.mean(np.log(np.where(flags == 1, share, 1 - share)))

    batch = {key: torch.tensor(values, dtype=torch.float32) for key, values in own.items()}
    loss, metrics = learner.model_loss(batch)
    assert metrics["model/loss"].item() == loss.item()
    assert_loss_and_gradient(loss, model, oracle, [learner.actor, learner.critic])


def check_step(learner, rows: dict, monkeypatch) -> None:
    """(3): the drawn elite of every row, its mean, and so many of its deviations as are drawn."""
    model = learner.model
    model.elites.copy_(torch.tensor([2, 0]))
    noise = np.random.default_rng(3).normal(size=(3, OBS + 1))
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.tensor([1, 0, 1]) % high)
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.tensor(noise, dtype=torch.float32))
    states, actions = (torch.tensor(rows[key], dtype=torch.float32) for key in ("observations", "actions"))
    next_states, rewards, mean, std = model.step(states, actions)
    means, log_vars = predictions(weights(model), scale_of(model), rows["observations"], rows["actions"])
    y = np.stack([means[k, i] + np.sqrt(np.exp(log_vars[k, i])) * noise[i] for i, k in enumerate([0, 2, 0])])
    assert_close(next_states.detach().numpy(), rows["observations"] + y[:, :OBS])
    assert_close(rewards.detach().numpy(), y[:, OBS])
    assert_close([mean.detach().numpy(), std.detach().numpy()], [means, np.exp(log_vars / 2)])


def check_resume(script, name: str, call, pendulum: str, tmp_path, monkeypatch, **fields) -> None:
    """Torn in the model's fit, and between two renewals of the rollouts, a run ends in the same bits."""
    fields = {**SHORT, "checkpoint_every": 13, "rollouts_kept": 2, **fields}
    folders = [place(tmp_path / part, name, pendulum) for part in ("whole", "torn")]
    assert call(name, *short(pendulum, tmp_path / "whole", **fields))[0] == 0
    epochs, save, update = [], script.Run.save, learner_class(script).update

    def stop_in_fit(run, learner):
        save(run, learner)
        epochs.append((learner.updates, int(learner.model.epoch)))
        if epochs[-1] == (0, 2):
            raise KeyboardInterrupt

    def stop_in_training(learner, batch):
        if learner.updates == 32:
            raise KeyboardInterrupt
        return update(learner, batch)

    said = []
    for owner, method, action in (
        (script.Run, "save", stop_in_fit), (learner_class(script), "update", stop_in_training)
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, action)
            status, out, _ = call(name, *short(pendulum, tmp_path / "torn", **fields))
            assert status == 130
            said.append(out)
    status, out, _ = call(name, *short(pendulum, tmp_path / "torn", **fields))
    said.append(out)
    assert status == 0
    assert "resumed" not in said[0]
    assert "resumed at update 0\n" in said[1]
    assert "resumed at update 26\n" in said[2]
    shown = [[line.split(":")[0] for line in out.splitlines() if "epoch" in line] for out in said]
    assert shown == [["model, epoch 1", "model, epoch 2"], ["model, epoch 3", "model, epoch 4"], []]
    assert_same_run(*folders)


def check_ends(script) -> None:
    """Where imagined episodes end, by the environments' own definitions; both signs count."""
    hopper = torch.zeros(6, 11)
    hopper[:, 0] = torch.tensor([1.2, 0.69, 1.2, 1.2, 1.2, 1.2])
    hopper[:, 1] = torch.tensor([0.1, 0.1, 0.21, -0.21, 0.1, 0.1])
    hopper[4, 7], hopper[5, 7] = 101.0, -101.0
    assert script.hopper_ends(hopper).tolist() == [False, True, True, True, True, True]
    walker = torch.zeros(6, 17)
    walker[:, 0] = torch.tensor([1.2, 0.79, 2.01, 1.2, 1.2, 1.2])
    walker[:, 1] = torch.tensor([0.9, 0.0, 0.0, 1.01, -1.01, 0.0])
    walker[5, 9] = -101.0
    assert script.walker2d_ends(walker).tolist() == [False, True, True, True, True, True]
    states = torch.zeros(3, 17)
    states[1, 4], states[2, 4] = 100.5, -100.5
    assert script.far_ends(states).tolist() == [False, True, True]

    def recorded(states, flags):
        return {"observations": states, "next_observations": states, "terminations": torch.tensor(flags)}

    flags = [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert script.known_ends("Hopper-v5", recorded(hopper, flags)) is script.hopper_ends
    assert script.known_ends("Pendulum-v1", recorded(hopper, flags)) is None
    assert script.known_ends("", recorded(hopper, flags)) is None
    balls = torch.zeros(2, 4)
    assert script.known_ends("PointMaze_UMaze-v3", recorded(balls, [0.0, 0.0])) is script.far_ends
    assert script.known_ends("PointMaze_UMaze-v3", recorded(balls, [0.0, 1.0])) is None  # at its goal
    for name, states, wrong in (
        ("Hopper-v5", hopper, [0.0] * 6),  # other flags
        ("Walker2d-v5", hopper, flags),  # another size
        ("HalfCheetah-v5", walker, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
    ):
        with pytest.raises(script.UserError, match="do not end as episodes of"):
            script.known_ends(name, recorded(states, wrong))
