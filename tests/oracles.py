"""What the tests of losses share: a batch, the networks' forward passes in NumPy, finite differences."""

import numpy as np
import torch
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


def networks(algorithm) -> dict[str, nn.Module]:
    """The algorithm's networks by name."""
    parts = vars(algorithm).items()
    return {name: part for name, part in parts if isinstance(part, nn.Module) and name != "units"}


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


def q_values(layers: list[np.ndarray], observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Q_1 and Q_2 [2, B]."""
    inputs, results = np.concatenate([observations, actions], axis=1), []
    for member in range(2):
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
