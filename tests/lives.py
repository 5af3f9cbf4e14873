"""What tests of algorithms/context share: a small dataset of lives, runs on it, a transformer in NumPy."""

import minari
import numpy as np
import pytest
import torch
from conftest import learner_class, load_script

NAME = "reef/dark-room/histories-v0"
SHORT = {"hidden_dim": 8, "hidden_layers": 2, "batch_size": 4, "updates": 6, "log_every": 2, "eval_every": 6}
SHORT |= {"eval_episodes": 2, "final_eval_episodes": 2, "final_eval_rounds": 1}
SHORT |= {"checkpoint_every": 3, "threads": 1, "compile": "false", "wandb_mode": "disabled", "device": "cpu"}
SHORT |= {"precision": "highest"}


@pytest.fixture(scope="module")
def rooms(minari_root):
    """A dark room of two learners a goal, twelve episodes each, beside the session's other datasets."""
    room = load_script("collect/dark_room.py")
    room.collect_lives(room.Config(learners=2, episodes=12))
    return minari.load_dataset(NAME)


def arguments(output_dir, **fields) -> list[str]:
    return [f"--{name}={value}" for name, value in (SHORT | {"output_dir": output_dir} | fields).items()]


def folder(output_dir, script: str, variant: str = "default"):
    return output_dir / "context" / script / NAME / variant / "seed-0"


def train(script, output_dir, **fields):
    script.train(script.parse_config(arguments(output_dir, **fields)))


def fixed(network: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """The network with random weights that are the same everywhere, without dropout."""
    rng = np.random.default_rng(seed)
    for weight in network.parameters():
        weight.data = torch.tensor(rng.normal(scale=0.4, size=weight.shape), dtype=torch.float32)
    return network.eval()


def normed(x: np.ndarray, norm: torch.nn.LayerNorm) -> np.ndarray:
    weight, bias = norm.weight.detach().numpy().astype(float), norm.bias.detach().numpy().astype(float)
    deviation = np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    return (x - x.mean(-1, keepdims=True)) / deviation * weight + bias


def linear(x: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
    return x @ layer.weight.detach().numpy().T.astype(float) + layer.bias.detach().numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def block(x: np.ndarray, layer) -> np.ndarray:
    """A block of the transformer [B, L, dim] in NumPy: causal attention with one head, then an MLP."""
    query, key, value = np.split(linear(normed(x, layer.norm1), layer.qkv), 3, -1)
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(x.shape[-1])
    scores = np.where(np.tri(x.shape[-2], dtype=bool), scores, -np.inf)
    x = x + linear(softmax(scores) @ value, layer.out)
    hidden = np.maximum(linear(normed(x, layer.norm2), layer.mlp[0]), 0)
    return x + linear(hidden, layer.mlp[2])


def embedded(layer, rows: np.ndarray) -> np.ndarray:
    return layer.weight.detach().numpy().astype(float)[rows]


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(np.take_along_axis(softmax(logits), labels[..., None], -1))[..., 0]


def assert_resumes(script, name: str, tmp_path, monkeypatch, **fields) -> None:
    """A run that is cut off after its first checkpoint goes on to the bits of one left alone."""
    train(script, tmp_path / "whole", **fields)
    learner = learner_class(script)
    update = learner.update

    def cut(self, batch):
        if self.updates == 4:
            raise KeyboardInterrupt
        return update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(learner, "update", cut)
        with pytest.raises(KeyboardInterrupt):
            train(script, tmp_path / "cut", **fields)
    train(script, tmp_path / "cut", **fields)
    states = []
    for part in ("whole", "cut"):
        saved = torch.load(folder(tmp_path / part, name) / "checkpoint.pt", weights_only=True)
        states.append(saved["state"])
    for one, other in zip(*(state["actor"].values() for state in states), strict=True):
        assert torch.equal(one, other)
    csvs = [folder(tmp_path / part, name) / "in-context-final-00000006.csv" for part in ("whole", "cut")]
    assert csvs[0].read_bytes() == csvs[1].read_bytes()
