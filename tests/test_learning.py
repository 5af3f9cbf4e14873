"""On a problem whose answer is known TD3+BC and IQL find it where imitation fails, all on the scripts' own
path from a Minari dataset to an evaluation in its environment.

The problem is a corridor. A step costs 1 and moves by the action, at most STEP to the left or right. At the
door on the right the episode ends; at the trapdoor on the left, which is nearer, it ends too, and costs TRAP.
The data wander: wherever they are, half of their steps go left and half go right. So the mean action, which
imitation learns, goes nowhere; no episode shows the way; and for such a wanderer the trapdoor is the better
end, as it is over sooner: only who values a state by the best of its actions sees that the door is.
"""

import math

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

STEP = 0.1
DOOR, TRAPDOOR, TRAP = 5.25 * STEP, -1.5 * STEP, 8  # the start is at 0, give or take a tenth of a step
STEPS = 40  # until an evaluation's patience ends
OPTIMUM = -math.ceil(DOOR / STEP)  # straight to the door: the closed form
TRAPPED = -math.ceil(-TRAPDOOR / STEP) - TRAP  # straight to the trapdoor
assert (OPTIMUM, TRAPPED) == (-6, -10)

pytestmark = pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is None)")  # Minari's advice


class Corridor(gym.Env):
    """Observation: the position; action: how far to move."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-STEP, STEP, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        low, high = (options or {}).get("between", (-0.1 * STEP, 0.1 * STEP))
        self.position = self.np_random.uniform(low, high)
        return np.array([self.position], np.float32), {}

    def step(self, action):
        self.position += float(np.clip(action[0], -STEP, STEP))
        trapped = self.position < TRAPDOOR
        ended = trapped or self.position > DOOR
        return np.array([self.position], np.float32), -1.0 - TRAP * trapped, ended, False, {}


def walk(seed: int, rightwards: float = 0.5, shortest: float = 0.9, anywhere: bool = True) -> EpisodeBuffer:
    """At most 20 steps of `shortest` to 1 times STEP, each to the right with the given probability."""
    env, rng = Corridor(), np.random.default_rng(seed)
    start, _ = env.reset(seed=seed, options={"between": (TRAPDOOR, DOOR)} if anywhere else None)
    observations, actions, rewards, ended = [start], [], [], False
    while not ended and len(actions) < 20:
        direction = 1 if rng.random() < rightwards else -1
        actions.append(np.array([direction * rng.uniform(shortest, 1) * STEP], np.float32))
        observation, reward, ended, _, _ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
    last = np.arange(len(actions)) == len(actions) - 1
    return EpisodeBuffer(
        observations=np.stack(observations),
        actions=np.stack(actions),
        rewards=np.array(rewards),
        terminations=last & ended,
        truncations=last & (not ended),
        infos={},
    )


def store(name: str, episodes: list[EpisodeBuffer]) -> minari.MinariDataset:
    if "test/Corridor-v0" not in gym.registry:
        gym.register("test/Corridor-v0", f"{__name__}:Corridor", max_episode_steps=STEPS)
    env = gym.make("test/Corridor-v0")
    return minari.create_dataset_from_buffers(name, episodes, env=env, data_format="hdf5")


@pytest.fixture(scope="module")
def strides(minari_root) -> minari.MinariDataset:
    """Wanders in steps of nearly full length: IQL never asks its critic about the actions between."""
    return store("test/corridor/strides-v0", [walk(seed) for seed in range(400)])


@pytest.fixture(scope="module")
def steps(minari_root) -> minari.MinariDataset:
    """Wanders in steps of all lengths: TD3+BC follows its critic's slope, from the mean action on."""
    return store("test/corridor/steps-v0", [walk(seed, shortest=0.0) for seed in range(400)])


@pytest.fixture(scope="module")
def mixed(minari_root) -> minari.MinariDataset:
    """From the start; one episode in five walks straight to the door, the others wander."""
    episodes = [walk(seed, 0.5 if seed % 5 else 1.0, anywhere=False) for seed in range(200)]
    return store("test/corridor/mixed-v0", episodes)


def learn(script, dataset: minari.MinariDataset, seed: int, updates: int, **fields) -> float:
    """The mean return of the policy that the script learns with small networks and large steps."""
    small = {"hidden_dim": 32, "batch_size": 128, "normalize_states": True, "compile": False}
    small |= {"actor_lr": 3e-3, "critic_lr": 3e-3, "value_lr": 3e-3, "tau": 0.05, "discount": 0.95}
    small = {name: value for name, value in small.items() if name in script.Config.__dataclass_fields__}
    config = script.Config(seed=seed, updates=updates, **{**small, **fields})
    torch.manual_seed(seed)
    algorithm = script.Algorithm(config, 1, 1, torch.device("cpu"))
    data, _, _ = script.load_transitions(dataset, Corridor.action_space, algorithm)
    batches = script.draw_batches(data, config.batch_size, seed, 0)
    for _ in range(updates):
        algorithm.update(next(batches))
    environments = script.make_environments(dataset, None, 10)
    return float(script.evaluate(algorithm.act, environments, 10, (seed, updates))["return"].mean())


three_seeds = pytest.mark.parametrize("seed", range(3))


@three_seeds
def test_td3_bc_reaches_the_optimum_where_imitation_goes_nowhere(scripts, steps, seed):
    assert learn(scripts["bc"], steps, seed, 500) < 4 * OPTIMUM
    assert learn(scripts["td3_bc"], steps, seed, 1000, alpha=10.0) >= OPTIMUM - 0.5


@three_seeds
def test_iql_reaches_the_optimum_where_imitation_goes_nowhere(scripts, strides, seed):
    assert learn(scripts["bc"], strides, seed, 500) < 4 * OPTIMUM
    assert learn(scripts["iql"], strides, seed, 1000, expectile=0.9) >= OPTIMUM - 0.5


def test_iql_at_expectile_one_half_follows_the_wanderers_value_into_the_trap(scripts, strides):
    """Half is the mean over the data's actions: one step better than the data, and no more."""
    assert learn(scripts["iql"], strides, 0, 1000, expectile=0.5) == pytest.approx(TRAPPED, abs=1)


@three_seeds
def test_imitating_the_best_fifth_reaches_the_optimum_where_imitating_all_does_not(scripts, mixed, seed):
    assert learn(scripts["bc"], mixed, seed, 500) < 2 * OPTIMUM
    assert learn(scripts["bc"], mixed, seed, 500, fraction=0.2) >= OPTIMUM - 0.5
