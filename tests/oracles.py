"""What oracle tests share: a batch, the networks' forward passes in NumPy, finite differences, episodes."""

import inspect
import re
from pathlib import Path
from unittest import mock

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from torch import nn

OBS, ACT = 3, 2
CPU = torch.device("cpu")

# Three transitions: an ordinary one, a terminated one, and one cut by a time limit, which is not terminated.
BATCH = {
    "observations": [[0.5, -1.0, 0.3], [-0.7, 0.2, 1.1], [1.4, 0.6, -0.9]],
    "actions": [[0.4, -0.6], [-0.9, 0.8], [0.1, 0.3]],
    "rewards": [1.5, -2.0, 0.25],
    "next_observations": [[0.9, 1.2, -0.4], [0.3, -0.8, 0.6], [-1.1, 0.7, 1.3]],
    "terminations": [0.0, 1.0, 0.0],
}


# ----------------------------------------------- networks -----------------------------------------------


NETWORKS = ("vae", "actor", "critic", "value", "target_actor", "target_critic")


def fix_weights(learner, seed: int = 1057):
    """The learner with random weights that are the same everywhere; a target's differ from its source's."""
    rng = np.random.default_rng(seed)
    for name in NETWORKS:
        if hasattr(learner, name):
            for weight in getattr(learner, name).parameters():
                weight.data = torch.tensor(rng.normal(scale=0.7, size=weight.shape), dtype=torch.float32)
    return learner


def networks(learner) -> dict[str, nn.Module]:
    """The learner's networks by name: what has weights."""
    parts = {name: part for name, part in vars(learner).items() if isinstance(part, nn.Module)}
    return {name: part for name, part in parts.items() if name != "scaler" and [*part.parameters()]}


def weights(network: nn.Module) -> list[np.ndarray]:
    """Float64 copies: W [out, in] and b [out] of each MLP layer; W [E, in, out] and b [E, 1, out] of an
    ensemble's; before them the log of a Gaussian actor's deviation [act_dim]."""
    return [weight.detach().numpy().astype(np.float64) for weight in network.parameters()]


def perceptron(layers: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """ReLU between the layers, none after the last: [B, in] -> [B, out]."""
    for number in range(0, len(layers), 2):
        x = x @ layers[number].T + layers[number + 1]
        if number < len(layers) - 2:
            x = np.maximum(x, 0)
    return x


def policy(layers: list[np.ndarray], observations: np.ndarray) -> np.ndarray:
    """Actions of a deterministic actor, or the mean actions of a Gaussian one around a tanh mean."""
    return np.tanh(perceptron(layers, observations))


def q_values(layers: list[np.ndarray], observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Q_i of every member of an ensemble [E, B]."""
    inputs, results = np.concatenate([observations, actions], axis=1), []
    for member in range(len(layers[0])):
        own = [layer[member].T if layer.shape[1] > 1 else layer[member][0] for layer in layers]
        results.append(perceptron(own, inputs)[:, 0])
    return np.stack(results)


def gaussian(layers: list[np.ndarray], observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [B, A] of a Gaussian actor whose network gives both."""
    outputs = perceptron(layers, observations)
    return outputs[:, :ACT], np.exp(np.minimum(np.maximum(outputs[:, ACT:], -5), 2))


def squashed(layers: list[np.ndarray], observations: np.ndarray, noise: np.ndarray):
    """Actions [B, A] that this actor and a tanh make of standard normal `noise`, and their density [B].

    The density of a = tanh(x) is that of x divided by da/dx = 1 - a^2.
    """
    mean, std = gaussian(layers, observations)
    x = mean + std * noise
    density = np.exp(-((x - mean) ** 2) / (2 * std**2)) / np.sqrt(2 * np.pi * std**2)
    return np.tanh(x), np.prod(density / (1 - np.tanh(x) ** 2), axis=1)


# ------------------------------------------- losses and gradients -------------------------------------------


def bellman(rows: dict[str, np.ndarray], discount: float, next_values: np.ndarray) -> np.ndarray:
    """r in a row that terminated, else r + discount * (value of the next state)."""
    bootstrapped = rows["rewards"] + discount * next_values
    return np.where(rows["terminations"] == 1, rows["rewards"], bootstrapped)


def summed_errors(layers: list[np.ndarray], rows: dict[str, np.ndarray], target: np.ndarray) -> float:
    """The squared error of each critic, mean over the batch, summed over the two."""
    q1, q2 = q_values(layers, rows["observations"], rows["actions"])
    return float(np.mean((q1 - target) ** 2) + np.mean((q2 - target) ** 2))


def slopes(loss, layers: list[np.ndarray], step: float = 1e-6) -> list[np.ndarray]:
    """Central differences of loss(layers) in every weight."""
    results = []
    for layer in layers:
        result = np.empty_like(layer)
        for index in np.ndindex(layer.shape):
            kept = layer[index]
            layer[index] = kept + step
            above = loss(layers)
            layer[index] = kept - step
            below = loss(layers)
            layer[index] = kept
            result[index] = (above - below) / (2 * step)
        results.append(result)
    return results


def gradients(network: nn.Module) -> list[np.ndarray]:
    """What the last step on the network's own loss left in .grad."""
    return [weight.grad.numpy().copy() for weight in network.parameters()]


def assert_close(ours, oracle, tolerance: float = 1e-5) -> None:
    """All arrays of two lists, or two numbers, agree; the oracle is not trivially zero."""
    ours, oracle = (x if isinstance(x, list) else [np.asarray(x)] for x in (ours, oracle))
    assert len(ours) == len(oracle)
    assert any(np.abs(array).max() > 1e-3 for array in oracle)
    for left, right in zip(ours, oracle):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)


def assert_loss_and_gradient(loss: torch.Tensor, network: nn.Module, oracle, others: list[nn.Module]) -> None:
    """`loss` is oracle(weights of network), and so is its gradient; it has none for the other networks."""
    layers = weights(network)
    assert_close(loss.item(), oracle(layers))
    ours = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    assert_close([gradient.numpy() for gradient in ours], slopes(oracle, layers), 1e-4)
    for other in others:
        leaked = torch.autograd.grad(loss, list(other.parameters()), retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in leaked)


class Constant(nn.Module):
    """Stands in for a network: answers every input with the same tensor, which is its only weight."""

    def __init__(self, answer):
        super().__init__()
        self.answer = nn.Parameter(torch.tensor(answer))

    def forward(self, *inputs):
        return self.answer


def snapshot(network: nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in network.parameters()]


def same(network: nn.Module, earlier: list[torch.Tensor]) -> bool:
    return all(torch.equal(weight, old) for weight, old in zip(network.parameters(), earlier))


# ------------------------------------- what holds for every learner -------------------------------------


def moved(learner, batch: dict[str, torch.Tensor], updates: int = 1) -> list[str]:
    """Names of the networks that so many updates move."""
    before = {name: snapshot(network) for name, network in networks(learner).items()}
    for _ in range(updates):
        learner.update(batch)
    return [name for name, network in networks(learner).items() if not same(network, before[name])]


# The losses of these are compiled to the end; those of the others are traced and split from their gradients,
# then run by torch: what g++ makes of them would take most of their test's time.
IN_MACHINE_CODE = ("td3_bc", "iql", "cql", "edac", "fql")


def assert_compiled_is_eager(script, twins: list, batch: dict[str, torch.Tensor]) -> None:
    """Five updates of twins, the second with the losses compiled as in `train`, give the same numbers;
    and the targets are what (1 - tau) theta' + tau theta makes, in float64, of the weights after each update
    (each delayed one).
    """
    names = re.findall(r'"(target_q|\w+_loss)"', inspect.getsource(script.train))
    assert {*names} == {name for name in dir(twins[0]) if name.endswith("_loss") or name == "target_q"}
    whole = Path(script.__file__).stem in IN_MACHINE_CODE
    traced = lambda method, **_: trace(method, dynamic=False, backend="aot_eager")  # noqa: E731
    trace = torch.compile
    with mock.patch.object(torch, "compile", trace if whole else traced):
        assert script.compile_methods(twins[1], *names)
    assert vars(twins[1]).keys() - vars(twins[0]).keys() == {*names}
    histories = []
    for learner in twins:
        targets = [name for name in networks(learner) if name.startswith("target_")]
        wanted, history = {name: weights(getattr(learner, name)) for name in targets}, []
        for update in range(1, 6):
            torch.manual_seed(update)
            history.append({key: float(value) for key, value in learner.update(batch).items()})
            if update % getattr(learner.config, "policy_delay", 1) == 0:
                for name, old in wanted.items():
                    tau, new = learner.config.tau, weights(getattr(learner, name.removeprefix("target_")))
                    wanted[name] = [(1 - tau) * a + tau * b for a, b in zip(old, new)]
        for name, layers in wanted.items():
            assert_close(weights(getattr(learner, name)), layers, 1e-6)
        histories.append(history)
    for eager, compiled in zip(*histories):
        assert eager.keys() == compiled.keys()
        assert list(compiled.values()) == pytest.approx(list(eager.values()), rel=1e-4, abs=1e-5)
    for left, right in zip(networks(twins[0]).values(), networks(twins[1]).values()):
        assert_close(weights(right), weights(left), 1e-4)


def assert_acts(learner, rows: dict[str, np.ndarray], mean) -> None:
    """`act` takes raw observations and answers mean(standardised ones) in the environment's units."""
    scaler = learner.scaler
    scaler.low, scaler.high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])
    scaler.mean, scaler.std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 0.5])
    wanted = mean((rows["observations"] - [0.1, 0.2, 0.3]) / [1.0, 2.0, 0.5])
    wanted = np.array([-2.0, 0.0]) + (wanted + 1) / 2 * np.array([4.0, 10.0])
    for _ in range(2):
        assert_close(learner.act(rows["observations"]), wanted)
        assert_close(learner.act(rows["observations"][0]), wanted[0])


# ------------------------------------- from the dataset to the loss -------------------------------------


ACTIONS = gym.spaces.Box(-2, 2, (ACT,), np.float32)


def episode(observations: list, rewards: list, terminated: bool) -> EpisodeBuffer:
    """Actions alternate between two values; the last step terminates or truncates the episode."""
    last = np.arange(len(rewards)) == len(rewards) - 1
    return EpisodeBuffer(
        observations=np.array(observations, np.float32),
        actions=np.resize(np.array([[0.5, -1.0], [-2.0, 2.0]], np.float32), (len(rewards), ACT)),
        rewards=np.array(rewards),
        terminations=last & terminated,
        truncations=last & (not terminated),
        infos={},
    )


def endings() -> list[EpisodeBuffer]:
    """One episode of a step that terminates, one of two steps that a time limit cuts: three transitions."""
    return [
        episode([[0.1, 0.2, 0.3], [0.4, -0.5, 0.6]], [1.0], terminated=True),
        episode([[1.0, -1.1, 1.2], [1.3, 1.4, -1.5], [-1.6, 1.7, 1.8]], [2.0, 4.0], terminated=False),
    ]


def read(script, name: str, episodes: list[EpisodeBuffer]) -> list[dict[str, np.ndarray]]:
    """What the script reads of a Minari dataset that has these episodes."""
    observations = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    spaces = {"observation_space": observations, "action_space": ACTIONS}
    dataset = minari.create_dataset_from_buffers(name, episodes, data_format="hdf5", **spaces)
    return script.read_episodes(dataset)[0]


def assert_critic_bootstraps_from_truncations(script, learner, next_values) -> None:
    """The critic's loss on the transitions of `endings`: a row more or a target without V(s') would show.

    `next_values` [3, OBS] -> [3] is the value of the next states.
    """
    episodes = read(script, f"test/{script.__name__}/endings-v0", endings())
    data = script.transitions(episodes, script.fit_scaler(episodes, ACTIONS, False))
    ahead = next_values(np.array([[0.4, -0.5, 0.6], [1.3, 1.4, -1.5], [-1.6, 1.7, 1.8]]))
    assert np.abs(ahead[1:]).min() > 0.1
    target = np.array([1.0, 2.0, 4.0]) + learner.config.discount * ahead * [0, 1, 1]  # the first terminated
    rows = {key: column.numpy().astype(np.float64) for key, column in data.items()}
    oracle = summed_errors(weights(learner.critic), rows, target)
    assert_close(learner.critic_loss(data)[0].item(), oracle)
