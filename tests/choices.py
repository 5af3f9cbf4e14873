"""What the tests of algorithms/discrete share: learners with fixed weights, three rows, targets in NumPy."""

import gymnasium as gym
import minari
import numpy as np
import torch
from conftest import learner_class, load_script
from logs import course
from minari.data_collector import EpisodeBuffer
from oracles import BATCH, fix_weights, perceptron, weights

CHOICES = 4
ACTIONS = [2, 0, 3]
SEED = 1  # of weights by which critic and target disagree about the best next choice


def learner(name: str, shape: tuple = (3,), weight_seed: int = SEED, **fields):
    """A learner of vectors [3] and four choices, whose encoder changes nothing, with fixed weights."""
    script = load_script(f"discrete/{name}.py")
    encoder = script.Encoder(np.zeros(shape), np.ones(shape), 0, 0, CHOICES, 0)
    fields = {"hidden_dim": 5, "hidden_layers": 1, "discount": 0.9} | fields
    known = {key: value for key, value in fields.items() if hasattr(script.Config, key)}
    return fix_weights(learner_class(script)(script.Config(**known), encoder), weight_seed)


def batch() -> dict[str, torch.Tensor]:
    """An ordinary transition, one that terminated, and one that a time limit cut."""
    return {key: torch.tensor(rows) for key, rows in (BATCH | {"actions": ACTIONS}).items()}


def dt_windows(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Transitions as the Decision Transformer takes them: each a window of one step."""
    zeros = torch.zeros(len(rows["actions"]), 1)
    steps = {name: rows[name][:, None] for name in ("observations", "actions")}
    return steps | {"returns_to_go": rows["rewards"][:, None], "timesteps": zeros, "real": zeros + 1}


def rows() -> dict[str, np.ndarray]:
    return {key: np.array(values) for key, values in BATCH.items()}


def chosen(layers: list[np.ndarray]) -> np.ndarray:
    """Q(s, a) [3] of the batch's choices."""
    return perceptron(layers, rows()["observations"])[np.arange(3), ACTIONS]


def target(q: list[np.ndarray], target_q: list[np.ndarray], allowed: np.ndarray) -> np.ndarray:
    """y [3]: the online network takes the best of the allowed choices [3, 4], the target values it."""
    data, result = rows(), []
    for i in range(3):
        after = data["next_observations"][i : i + 1]
        best = max(np.flatnonzero(allowed[i]), key=lambda a: perceptron(q, after)[0, a])
        ahead = 0.0 if data["terminations"][i] else 0.9 * perceptron(target_q, after)[0, best]
        result.append(data["rewards"][i] + ahead)
    return np.array(result)


def huber(errors: np.ndarray) -> float:
    """Mean of x^2 / 2 within 1, |x| - 1/2 beyond."""
    return float(np.mean([x**2 / 2 if abs(x) < 1 else abs(x) - 0.5 for x in errors]))


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def assert_target_follows(found) -> None:
    """After an update the target is (1 - tau) of itself and tau of the critic."""
    before = weights(found.target_critic)
    found.update(batch())
    for old, new, now in zip(before, weights(found.critic), weights(found.target_critic)):
        np.testing.assert_allclose(now, (1 - found.config.tau) * old + found.config.tau * new, atol=1e-6)


class Walk(gym.Env):
    """States 0 to 4, from the middle; choice 1 goes right, 0 left; the right end pays 1."""

    observation_space, action_space = gym.spaces.Discrete(5), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 2
        return self.place, {}

    def step(self, action):
        self.place += 2 * int(action) - 1
        return self.place, float(self.place == 4), self.place in (0, 4), False, {"success": self.place == 4}


def make_walks() -> str:
    """Id of 150 random walks; two of three go left."""
    if "test/Walk-v0" not in gym.registry:
        gym.register("test/Walk-v0", "choices:Walk", max_episode_steps=30)
    env, episodes, rng = gym.make("test/Walk-v0"), [], np.random.default_rng(0)
    for _ in range(150):
        states, actions, rewards, ended = [env.reset()[0]], [], [], False
        while not ended:
            actions.append(int(rng.random() < 0.35))
            state, reward, ended, truncated, _ = env.step(actions[-1])
            states.append(state)
            rewards.append(reward)
            ended |= truncated
        episodes.append(course(states, actions, rewards))
    references = {"ref_min_score": 0.0, "ref_max_score": 1.0}
    minari.create_dataset_from_buffers("test/walk-v0", episodes, env=env, data_format="hdf5", **references)
    return "test/walk-v0"


class Mission(gym.Space):
    """As minigrid's MissionSpace: a space of its own kind, which Gymnasium cannot flatten."""

    def __init__(self):
        super().__init__(dtype=str)

    def sample(self, *_):
        return "go to the red ball"

    def contains(self, x):
        return isinstance(x, str)


class Grid(gym.Env):
    """Four steps in the form of minigrid's: Dicts of direction, image and mission; choice 2 pays."""

    image = gym.spaces.Box(0, 255, (7, 7, 3), np.uint8)
    observation_space = gym.spaces.Dict(direction=gym.spaces.Discrete(4), image=image, mission=Mission())
    action_space = gym.spaces.Discrete(7)

    def look(self) -> dict:
        image = np.full((7, 7, 3), self.steps, np.uint8)
        return {"direction": self.steps % 4, "image": image, "mission": "go to the red ball"}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.look(), {}

    def step(self, action):
        self.steps += 1
        return self.look(), float(action == 2), self.steps == 4, False, {}


class Screens(Grid):
    """The same in the form of the Atari environments: frames of 210 x 160, four choices."""

    observation_space = gym.spaces.Box(0, 255, (210, 160, 3), np.uint8)
    action_space = gym.spaces.Discrete(4)

    def look(self) -> np.ndarray:
        return np.full((210, 160, 3), 60 * self.steps, np.uint8)


def together(observations: list):
    """As Minari keeps them: arrays of an observation's entries, texts in lists."""
    if not isinstance(observations[0], dict):
        return np.array(observations)
    columns = {name: [seen[name] for seen in observations] for name in observations[0]}
    return {name: column if name == "mission" else np.array(column) for name, column in columns.items()}


def make_images(kind: type, name: str) -> str:
    """Id of eight random episodes in `Grid` or `Screens`, kept as the hub's: Text, frames in JPEG."""
    if f"test/{kind.__name__}-v0" not in gym.registry:
        gym.register(f"test/{kind.__name__}-v0", f"choices:{kind.__name__}")
    env, episodes, rng = gym.make(f"test/{kind.__name__}-v0"), [], np.random.default_rng(0)
    for _ in range(8):
        seen, actions, rewards = [env.reset()[0]], rng.integers(int(env.action_space.n), size=4), []
        for action in actions:
            observation, reward, *_ = env.step(action)
            seen.append(observation)
            rewards.append(reward)
        ends = np.arange(4) == 3
        parts = {"rewards": np.array(rewards), "terminations": ends, "truncations": ends & False, "infos": {}}
        episodes.append(EpisodeBuffer(observations=together(seen), actions=actions, **parts))
    space = env.observation_space
    if isinstance(space, gym.spaces.Dict):
        space = gym.spaces.Dict({**space.spaces, "mission": gym.spaces.Text(256)})
    spaces = {"observation_space": space, "action_space": env.action_space}
    minari.create_dataset_from_buffers(name, episodes, env=env, data_format="hdf5", **spaces)
    return name
