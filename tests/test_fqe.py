"""algorithms/evaluate/fqe.py: its loss and target against NumPy, known values, the command line."""

import math
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import load_script
from logs import course, gated, store

script = load_script("evaluate/fqe.py")
pytestmark = pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is None)")  # Minari's advice
SMALL = {"hidden_dim": 16, "hidden_layers": 1, "members": 3, "critic_lr": 1e-2, "tau": 0.2, "log_every": 100}


def critics(choices: bool, limits=(-math.inf, math.inf), **fields):
    """Three critics of vectors [2] and three choices or actions [2], with fixed weights."""
    config = script.Config(**{"hidden_dim": 4, "hidden_layers": 1, "members": 3, "discount": 0.9} | fields)
    space, seen = gym.spaces.Box(-1, 1, (2,), np.float32), np.zeros((1, 2, 2), np.float32)
    features = script.Features(space, {"observations": seen, "mask": np.ones((1, 1), bool)})
    features.mean, features.std = torch.tensor([0.1, -0.2]), torch.tensor([0.5, 2.0])
    found = script.FQE(config, features, 3 if choices else 2, choices, limits)
    rng = np.random.default_rng(3)
    for network in (found.critic, found.target_critic):
        for weight in network.parameters():
            weight.data = torch.tensor(rng.normal(size=weight.shape), dtype=torch.float32)
    return found


def batch(choices: bool) -> dict[str, torch.Tensor]:
    """Four transitions, of which the second terminated."""
    rng = np.random.default_rng(4)
    policy = rng.dirichlet(np.ones(3), size=4) if choices else rng.uniform(-1, 1, (4, 2))
    rows = {
        "observations": rng.normal(size=(4, 2)),
        "actions": np.array([2, 0, 1, 1]) if choices else rng.uniform(-1, 1, (4, 2)),
        "rewards": rng.normal(size=4),
        "next_observations": rng.normal(size=(4, 2)),
        "next_policy": policy,
        "terminations": np.array([0.0, 1, 0, 0]),
        "counts": np.array([[0, 1, 2], [1, 1, 1], [3, 0, 0], [0, 2, 1]]),
    }
    return {key: torch.as_tensor(x if x.dtype == int else x.astype(np.float32)) for key, x in rows.items()}


def network(layers: list[np.ndarray], member: int, x: np.ndarray) -> np.ndarray:
    first, bias, last, offset = (layer[member] for layer in layers)
    return np.maximum(x @ first + bias, 0) @ last + offset


def q_of(layers, member, observations, actions, choices) -> np.ndarray:
    x = (observations - [0.1, -0.2]) / [0.5, 2.0]
    if choices:
        return network(layers, member, x)[np.arange(len(x)), actions.astype(int)]
    return network(layers, member, np.hstack([x, actions]))[:, 0]


def arrays(net) -> list[np.ndarray]:
    return [weight.detach().numpy().astype(np.float64) for weight in net.parameters()]


@pytest.mark.equation(1, 2, 3, 7)
@pytest.mark.parametrize("choices", [True, False])
@pytest.mark.parametrize("limits", [(-math.inf, math.inf), (-0.5, 0.7)])
def test_loss_against_numpy(choices, limits):
    found, rows = critics(choices, limits), batch(choices)
    x = {key: value.numpy().astype(np.float64) for key, value in rows.items()}
    critic, target, loss = arrays(found.critic), arrays(found.target_critic), 0.0
    for member in range(3):
        for i in range(4):
            after, given = x["next_observations"][i : i + 1], x["next_policy"][i]
            if choices:
                ahead = sum(given[a] * q_of(target, member, after, np.array([a]), True)[0] for a in range(3))
            else:
                ahead = q_of(target, member, after, given[None], False)[0]
            y = x["rewards"][i] + (0.0 if i == 1 else 0.9 * ahead)
            y = min(max(y, limits[0]), limits[1])
            q = q_of(critic, member, x["observations"][i : i + 1], x["actions"][i : i + 1], choices)[0]
            loss += x["counts"][i, member] * (q - y) ** 2 / 4
    assert found.critic_loss(rows)[0].item() == pytest.approx(loss, rel=1e-4)


@pytest.mark.equation(4)
def test_the_target_follows_slowly():
    found = critics(True, tau=0.3)
    before = arrays(found.target_critic)
    found.update(batch(True))
    for old, new, now in zip(before, arrays(found.critic), arrays(found.target_critic)):
        assert now == pytest.approx(0.7 * old + 0.3 * new, abs=1e-6)


@pytest.mark.equation(5, 6)
def test_value_and_interval_over_resamples():
    found, rows = critics(True), batch(True)
    starts, policy, counts = rows["observations"], rows["next_policy"], rows["counts"].float()
    layers, values = arrays(found.critic), []
    for member in range(3):
        total = 0.0
        for i in range(4):
            for a in range(3):
                q = q_of(layers, member, starts[i : i + 1].numpy(), np.array([a]), True)[0]
                total += counts[i, member].item() * policy[i, a].item() * q / 4
        values.append(total)
    assert found.estimate(starts, policy, counts).numpy() == pytest.approx(values, rel=1e-4)
    result = script.value_and_interval(torch.tensor([1.0, 2.0, 6.0]))
    spread = 1.96 * np.std([1, 2, 6], ddof=1)
    assert [*result.values()] == pytest.approx([3, 3 - spread, 3 + spread])


@pytest.mark.equation(7)
def test_limits_are_what_no_return_leaves():
    """Rewards in [0, 1] and discount .9: y in [0, 10]; a termination leaves nothing, so 0 is inside too."""
    assert script.return_limits(np.array([0.0, 1.0]), 0.9) == pytest.approx((0, 10))
    assert script.return_limits(np.array([2.0, 3.0]), 0.9) == pytest.approx((0, 30))
    assert script.return_limits(np.array([-1.0, -2.0]), 0.5) == pytest.approx((-4, 0))
    assert script.return_limits(np.array([1.0]), 1.0) == (-math.inf, math.inf)


def fit(dataset, updates: int, discount: float, policy=None):
    log = script.side_by_side(dataset)
    config = script.Config(updates=updates, discount=discount, **SMALL)
    policy = policy or (lambda observations: np.full((len(observations), 3), 1 / 3))
    found, curve = script.fit_critics(config, dataset, log, policy, "test")
    return found, curve, log


def test_a_chain_is_worth_2_8(minari_root):
    """0 to 1 (reward 1) to the end (reward 2), discount .9: 1 + .9 * 2, and no more: the end terminates."""
    episodes = [course([0, 1, 3], [a, b], [1, 2]) for a in range(3) for b in range(3)] * 4
    _, curve, _ = fit(store("test/logs/chain-v0", episodes), 1500, 0.9)
    assert curve["value"].iloc[-1] == pytest.approx(2.8, abs=0.05)
    assert curve["update"].tolist() == [*range(100, 1501, 100)]


def test_the_last_reward_of_a_long_episode_reaches_its_first_state(minari_root):
    """20 steps: 1,000 updates reach 50 of them back, those of a target ten times as slow 5."""
    episodes = [course([*range(21)], [i % 3 for i in range(20)], [1] * 20)]
    log = script.side_by_side(dataset := store("test/logs/long-v0", episodes, gym.spaces.Discrete(21)))
    config = script.Config(updates=1000, hidden_dim=16, members=2, critic_lr=5e-3)
    uniform = partial(script.uniform_policy, 3)
    _, curve = script.fit_critics(config, dataset, log, uniform, "test")
    assert curve["value"].iloc[-1] == pytest.approx(20, abs=5)


def test_states_are_counted_from_the_spaces_first(minari_root):
    """Of 5 to 8 the last is one of four inputs, as 3 is of 0 to 3."""
    space = gym.spaces.Discrete(4, start=5)
    log = script.side_by_side(store("test/logs/from-5-v0", [course([5, 6, 8], [2, 0], [1, 2])], space))
    seen = script.Features(space, log)(torch.tensor([5, 6, 8]))
    assert seen.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


def test_a_loop_that_only_truncates_is_worth_10(minari_root):
    episodes = [course([0, 0, 0], [a, b], [1, 1], ended=False) for a in range(3) for b in range(3)] * 4
    _, curve, _ = fit(store("test/logs/loop-v0", episodes), 2500, 0.9)
    assert curve["value"].iloc[-1] == pytest.approx(10, abs=0.2)


def test_the_value_is_the_policys_not_the_logs(minari_root):
    """Choice 2 earns 3, others nothing: 1 for the uniform policy, 3 for the one that takes it."""
    episodes = [course([0, 3], [a], [3.0 * (a == 2)]) for a in range(3)] * 10
    dataset = store("test/logs/choice-v0", episodes)
    _, curve, _ = fit(dataset, 800, 1.0)
    assert curve["value"].iloc[-1] == pytest.approx(1, abs=0.05)
    _, curve, _ = fit(dataset, 800, 1.0, lambda observations: np.tile([0.0, 0, 1], (len(observations), 1)))
    assert curve["value"].iloc[-1] == pytest.approx(3, abs=0.05)


def test_the_value_ahead_is_that_of_the_allowed(minari_root):
    """Of choice 2 at the second step 2, of others nothing. Whoever took choice 1 first has a third of that
    ahead, others all: (2 * 2.8 + 1.6) / 3 is 2.4. Were all allowed, it would be 1 + .9 * 2 / 3."""
    dataset = store("test/logs/gated-chain-v0", gated(3))
    _, curve, _ = fit(dataset, 600, 0.9, partial(script.uniform_policy, 3))
    assert curve["value"].iloc[-1] == pytest.approx(2.4, abs=0.15)


def test_the_first_value_and_the_clone_are_of_the_allowed(minari_root, monkeypatch):
    masks, asked = [[1, 1, 0], [0, 1, 0], [1, 1, 1]], []
    episodes = [course([0, 3], [1], [1], action_mask=[mask, [0] * 3]) for mask in masks]
    dataset = store("test/logs/gated-first-v0", episodes)

    def estimate(critics, starts, policy, counts):
        asked.append(policy.numpy())
        return torch.zeros(3)

    monkeypatch.setattr(script.FQE, "estimate", estimate)
    fit(dataset, 1, 1.0, partial(script.uniform_policy, 3))
    fit(dataset, 1, 1.0, script.clone_policy(dataset, script.side_by_side(dataset), 1, 0))
    assert asked[0] == pytest.approx(np.array([[1 / 2, 1 / 2, 0], [0, 1, 0], [1 / 3] * 3]))
    assert ((asked[1] > 0) == np.array(masks)).all()


def test_the_interval_widens_with_the_spread_of_episodes(minari_root):
    wide = [course([0, 3], [0], [r]) for r in (0.0, 4.0)] * 10
    narrow = [course([0, 3], [0], [r]) for r in (1.9, 2.1)] * 10
    one = np.tile([1.0, 0, 0], (1, 1))
    widths = []
    for name, episodes in (("wide", wide), ("narrow", narrow)):
        dataset = store(f"test/logs/{name}-v0", episodes)
        _, curve, _ = fit(dataset, 600, 1.0, lambda seen: np.repeat(one, len(seen), 0))
        widths.append(curve["high"].iloc[-1] - curve["low"].iloc[-1])
    assert widths[0] > 5 * widths[1]


def test_the_same_seed_gives_the_same_value(minari_root):
    dataset = store("test/logs/seeded-v0", [course([0, 1, 3], [0, 2], [1, 2]), course([1, 3], [1], [5])] * 5)
    curves = [fit(dataset, 60, 0.9)[1] for _ in range(2)]
    pd.testing.assert_frame_equal(*curves)


def test_a_critic_that_runs_away_ends_the_run(minari_root, monkeypatch):
    dataset = store("test/logs/away-v0", [course([0, 1, 3], [0, 2], [1, 2])] * 3)
    monkeypatch.setattr(script, "Features", broken_features)
    with pytest.raises(script.Diverged, match="diverged by update"):
        fit(dataset, 100, 0.9)


def broken_features(space, log):
    """Not finite."""
    return Broken()


class Broken(torch.nn.Module):
    inputs = 2

    def forward(self, observations):
        return torch.full((len(observations), 2), math.nan)


def test_the_command_line(minari_root, run_script, tmp_path):
    courses = [course([0, 1, 3], [a, b], [1, 2]) for a in range(3) for b in range(3)]
    store("test/logs/command-v0", courses * 4)
    arguments = [f"--{name}={value}" for name, value in SMALL.items()]
    arguments += ["--dataset=test/logs/command-v0", "--discount=0.9", "--updates=1000", "--clone_updates=50"]
    done = run_script("evaluate/fqe.py", *arguments, f"--output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "evaluate/fqe/test/logs/command-v0/default/seed-0"
    table, curve = pd.read_csv(folder / "values.csv"), pd.read_csv(folder / "curve.csv")
    assert table["policy"].tolist() == ["behavior", "uniform"]
    assert table["value"].to_numpy() == pytest.approx(2.8, abs=0.15)
    assert curve.groupby("policy").size().tolist() == [10, 10]


def test_a_policy_of_other_sizes_is_refused(minari_root):
    dataset = store("test/logs/sizes-v0", [course([0, 3], [0], [1])])
    log, policy = script.side_by_side(dataset), lambda seen: np.ones((len(seen), 2))
    with pytest.raises(script.UserError, match=r"two does not fit .*\(1, 2\), not \(1, 3\)"):
        script.ask(policy, "two", log["observations"][:, 0], dataset, log)


def test_continuous_policies_are_asked_in_the_environments_units():
    box = gym.spaces.Box(np.array([0.0, -4]), np.array([10.0, 4]), dtype=float)
    log = {"actions": np.zeros((1, 1, 2)), "bounds": np.array([box.low, box.high])}
    dataset = SimpleNamespace(id="test", action_space=box)
    policy = lambda seen: np.tile([7.5, -4.0], (len(seen), 1))  # noqa: E731
    given = script.ask(policy, "p", np.zeros((3, 2)), dataset, log)
    assert given == pytest.approx(np.tile([0.5, -1], (3, 1)))


def test_an_entry_of_the_actions_that_never_changes_has_no_scale():
    """As in training: an import's bounds are the data's extremes, which are the same there."""
    box = gym.spaces.Box(np.array([0.0, 0.5]), np.array([10.0, 0.5]), dtype=float)
    log = {"actions": np.zeros((1, 1, 2)), "bounds": np.array([box.low, box.high])}
    dataset, rows = SimpleNamespace(id="test", action_space=box), np.zeros((3, 2))
    given = script.ask(lambda seen: np.tile([7.5, 0.5], (len(seen), 1)), "p", rows, dataset, log)
    assert given == pytest.approx(np.tile([0.5, -1], (3, 1)))
