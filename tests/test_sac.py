"""algorithms/collect/sac.py: losses against NumPy, data, runs; tools/behavior.py: what is published."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import behavior
import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import ROOT, load_script, new_learner
from oracles import ACT, BATCH, CPU, OBS, assert_loss_and_gradient, gaussian, q_values, squashed, weights
from test_runs import equal
from torch import nn

sac = load_script("collect/sac.py")


def make(**fields):
    """SAC with small networks of fixed weights; the target's differ from the critic's."""
    learner = new_learner(sac, sac.Config(hidden_dim=4, hidden_layers=2, **fields), OBS, ACT)
    rng = np.random.default_rng(7)  # so that each critic is the smaller one in some row
    for network in (learner.actor, learner.critic, learner.target_critic):
        for weight in network.parameters():
            weight.data = torch.tensor(rng.normal(scale=0.7, size=weight.shape), dtype=torch.float32)
    learner.temperature.log.data.fill_(math.log(0.3))
    return learner


# ------------------------------------------------ losses ------------------------------------------------


@pytest.mark.equation(1, 2)
def test_critic_loss(batch, rows):
    """The soft target, which neither a termination nor a gradient passes."""
    learner = make(discount=0.9)
    torch.manual_seed(5)
    noise = torch.randn(3, ACT).numpy().astype(np.float64)
    actions, density = squashed(weights(learner.actor), rows["next_observations"], noise)
    q = q_values(weights(learner.target_critic), rows["next_observations"], actions)
    assert len({*np.sign(q[0] - q[1])[[0, 2]]}) == 2  # each is the smaller one in a row that counts
    soft = np.minimum(*q) - 0.3 * np.log(density)
    target = rows["rewards"] + 0.9 * np.where(rows["terminations"] == 1, 0, soft)

    def oracle(layers):
        errors = (q_values(layers, rows["observations"], rows["actions"]) - target) ** 2
        return errors[0].mean() + errors[1].mean()

    torch.manual_seed(5)
    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.target_critic, learner.temperature]
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    q = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(q.mean(), rel=1e-5)


@pytest.mark.equation(3)
def test_actor_loss(batch, rows):
    """Its gradient goes through the actions into the critic's input."""
    learner = make()
    critic = weights(learner.critic)
    torch.manual_seed(6)
    noise = torch.randn(3, ACT).numpy().astype(np.float64)

    def oracle(layers):
        actions, density = squashed(layers, rows["observations"], noise)
        return np.mean(0.3 * np.log(density) - np.minimum(*q_values(critic, rows["observations"], actions)))

    actions, density = squashed(weights(learner.actor), rows["observations"], noise)
    q = q_values(critic, rows["observations"], actions)
    assert len({*np.sign(q[0] - q[1])}) == 2
    torch.manual_seed(6)
    loss, metrics = learner.actor_loss(batch)
    others = [learner.target_critic, learner.temperature]
    assert_loss_and_gradient(loss, learner.actor, oracle, others)
    assert metrics["actor/entropy"].item() == pytest.approx(-np.log(density).mean(), rel=1e-5)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.8, -1.5), (-1.2, 0.5), (0.3, -9.0), (0.0, 9.0)])
def test_the_density_of_the_actions_integrates_to_one(monkeypatch, mean, log_std):
    """Over (-1, 1), whatever the Gaussian; a deviation outside [e^-5, e^2] is brought there."""
    actor = sac.TanhGaussianActor(1, 1, 4, 1)
    actor.net = nn.Identity()  # the observation is the mean and the log of the deviation
    x = np.linspace(-18, 18, 200_001)
    std = math.exp(min(max(log_std, -5), 2))
    noise = torch.tensor((x - mean) / std, dtype=torch.float64)[:, None]
    monkeypatch.setattr(torch, "randn_like", lambda tensor: noise)
    inputs = torch.tensor([[mean, log_std]], dtype=torch.float64).expand(len(x), 2)
    actions, log_prob = actor.sample(inputs)
    np.testing.assert_allclose(actions[:, 0], np.tanh(x), atol=1e-12)
    inside = np.abs(x) < 17  # where tanh, in float64, is not yet 1
    area = np.trapezoid(np.exp(log_prob.numpy()[inside]), np.tanh(x[inside]))
    covered = 0.5 * (math.erf((17 - mean) / std / 2**0.5) + math.erf((17 + mean) / std / 2**0.5))
    assert area == pytest.approx(covered, rel=1e-3)
    assert np.isfinite(log_prob.numpy()).all()


def test_the_log_density_is_finite_where_tanh_is_one(monkeypatch):
    actor = sac.TanhGaussianActor(1, 1, 4, 1)
    actor.net = nn.Identity()
    monkeypatch.setattr(torch, "randn_like", lambda tensor: torch.tensor([[40.0], [-40.0]]))
    inputs = torch.tensor([[0.0, 0.5]] * 2, requires_grad=True)
    actions, log_prob = actor.sample(inputs)
    assert actions.flatten().tolist() == [1, -1]
    x = 40 * math.exp(0.5)
    slope = math.log(4) - 2 * x  # log(1 - tanh(x)^2) for a large x
    np.testing.assert_allclose(log_prob.detach(), -800 - 0.5 - 0.5 * math.log(2 * math.pi) - slope, rtol=1e-5)
    assert torch.autograd.grad(log_prob.sum(), inputs)[0].isfinite().all()


@pytest.mark.equation(4)
@pytest.mark.parametrize(("entropy", "sign"), [(-ACT, 0), (-ACT + 0.5, 1), (-ACT - 0.5, -1), (3.0, 1)])
def test_temperature_gradient(batch, entropy, sign):
    """The surplus of entropy over -|A|. Too much entropy makes it cheaper, too little dearer."""
    learner = make()
    actor_loss, told = learner.actor_loss, {"actor/entropy": torch.tensor(float(entropy))}
    learner.actor_loss = lambda batch: (actor_loss(batch)[0], told)
    before = learner.temperature().item()
    metrics = learner.update(batch)
    assert learner.temperature.log.grad.item() == pytest.approx(entropy + ACT)
    assert np.sign(before - metrics["actor/temperature"].item()) == sign


@pytest.mark.parametrize("frozen", ["actor", "critic", "temperature"])
def test_each_optimizer_moves_its_own_network_only(batch, frozen):
    learner = make(**{f"{frozen}_lr": 0.0})
    before = {name: weights(getattr(learner, name)) for name in ("actor", "critic", "temperature")}
    learner.update(batch)
    for name, old in before.items():
        moved = any(np.any(a != b) for a, b in zip(weights(getattr(learner, name)), old))
        assert moved == (name != frozen), name


@pytest.mark.equation(5)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_target_is_the_exact_moving_average(batch, compiled):
    learner, eager = make(tau=0.1), make(tau=0.1)
    if compiled and not sac.compile_methods(learner, "critic_loss", "actor_loss"):
        pytest.skip("no C++ compiler")
    average = weights(learner.target_critic)
    for step in range(5):
        torch.manual_seed(step)
        learner.update(batch)
        torch.manual_seed(step)
        eager.update(batch)
        average = [0.9 * old + 0.1 * new for old, new in zip(average, weights(learner.critic))]
    for ours, oracle, other in zip(*map(weights, (learner.target_critic, learner.critic, eager.critic))):
        np.testing.assert_allclose(oracle, other, rtol=1e-4, atol=1e-5)
        assert ours.shape == oracle.shape
    for ours, oracle in zip(weights(learner.target_critic), average):
        np.testing.assert_allclose(ours, oracle, rtol=1e-5, atol=1e-6)


# ------------------------------------------ acting and collecting ------------------------------------------


class Clock(gym.Env):
    """Observations (t, episode, last action); ends for good at t = 3 in odd episodes, never in even ones."""

    def __init__(self, dicts: bool = False, bound: float = 6.0):
        self.episode, self.dicts = -1, dicts
        parts = {"time": 2, "action": 1}  # sorted: the action comes first
        spaces = {name: gym.spaces.Box(-np.inf, np.inf, (size,), np.float64) for name, size in parts.items()}
        vector = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.observation_space = gym.spaces.Dict(spaces) if dicts else vector
        self.action_space = gym.spaces.Box(-2.0, bound, (1,), np.float32)

    def observe(self, action: float):
        time = np.array([self.t, self.episode], float)
        both = {"time": time, "action": np.array([action])}
        return both if self.dicts else np.append(time, action)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.episode = 0, self.episode + 1
        return self.observe(0.0), {}

    def step(self, action):
        self.t += 1
        over = bool(self.episode % 2 and self.t == 3)
        return self.observe(float(action[0])), float(self.t), over, False, {}


class Picture(Clock):
    """Its observations are images."""

    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


class DictActions(Clock):
    """Its actions are Dicts."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Dict({"force": self.action_space})


gym.register("ReefClock-v0", Clock, max_episode_steps=5)
gym.register("ReefDictClock-v0", Clock, max_episode_steps=5, kwargs={"dicts": True})
gym.register("ReefBoundless-v0", Clock, max_episode_steps=5, kwargs={"bound": np.inf})
gym.register("ReefDictActions-v0", DictActions, max_episode_steps=5)
gym.register("ReefPicture-v0", Picture, max_episode_steps=5)


@pytest.mark.parametrize("name", ["ReefClock-v0", "ReefDictClock-v0"])
@pytest.mark.parametrize("random", [True, False])
def test_what_the_explorer_stores(name, random):
    """The last observation of an episode is its own, and only what ended for good is terminated."""
    environments = sac.make_simulators(name, 2)
    learner = sac.SAC(sac.Config(hidden_dim=4), sac.Scaler(np.zeros(3), np.ones(3), [-2.0], [6.0]))
    buffer = sac.ReplayBuffer(100, 3, 1, CPU)
    explorer = sac.Explorer(environments, learner, buffer, (0,))
    for _ in range(17):
        explorer.step(random)
    assert buffer.added == 34
    stored = {key: column[:34].numpy() for key, column in buffer.columns.items()}
    order = [1, 2, 0] if "Dict" in name else [0, 1, 2]
    t, episode, _ = stored["observations"][:, order].T
    following, following_episode, action = stored["next_observations"][:, order].T
    # Episodes of 5 steps (cut) and 3 (ended for good) in turns: 5 + 3 + 5 + 3 + the first step of another.
    assert t.tolist() == np.repeat([*range(5), *range(3), *range(5), *range(3), 0], 2).tolist()
    assert episode.tolist() == np.repeat([0, 1, 2, 3, 4], [10, 6, 10, 6, 2]).tolist()
    np.testing.assert_array_equal(following, t + 1)
    np.testing.assert_array_equal(following_episode, episode)
    np.testing.assert_array_equal(stored["rewards"], t + 1)
    np.testing.assert_array_equal(stored["terminations"], (episode % 2 == 1) & (following == 3))
    np.testing.assert_allclose(stored["actions"][:, 0], (action + 2) / 4 - 1, atol=1e-6)
    assert len(np.unique(action)) == 34
    assert np.abs(stored["actions"]).max() <= 1
    assert (np.abs(stored["actions"]).max() > 0.9) >= random


@pytest.mark.parametrize("name", ["AdroitHandPen-v1", "PointMaze_UMaze-v3"])
def test_environments_of_gymnasium_robotics_are_known(name, tmp_path):
    """In a process of its own, where nobody else has registered them; a maze leaves no temporary file."""
    make = f"import sac; environments = sac.make_simulators({name!r}, 2); print(environments.num_envs)"
    environ = {**os.environ, "PYTHONPATH": "algorithms/collect", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", make]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
    assert list(tmp_path.iterdir()) == []


def test_buffer_keeps_the_newest_rows_as_given():
    buffer, seen = sac.ReplayBuffer(5, 2, 1, CPU), []
    rng = np.random.default_rng(0)
    for _ in range(4):
        rows = {"observations": rng.normal(size=(2, 2)), "actions": rng.normal(size=(2, 1)),
                "rewards": rng.normal(size=2), "next_observations": rng.normal(size=(2, 2)),
                "terminations": np.array([True, False])}
        buffer.add(**rows)
        seen += [[float(value) for key in sorted(rows) for value in np.ravel(rows[key][i])] for i in range(2)]
        drawn = buffer.draw(300)
        assert {key: tuple(column.shape) for key, column in drawn.items()} == {
            "observations": (300, 2), "actions": (300, 1), "rewards": (300,), "next_observations": (300, 2),
            "terminations": (300,)}
        assert all(column.dtype == torch.float32 for column in drawn.values())
        table = torch.cat([drawn[key].view(300, -1) for key in sorted(drawn)], 1).numpy()
        expected = np.unique(np.float32(seen[-5:]), axis=0)
        np.testing.assert_array_equal(np.unique(table, axis=0), expected)  # all of them, and nothing else
    assert buffer.added == 8


def test_act_and_explore_speak_the_environments_units():
    learner = make()
    learner.scaler = sac.Scaler(np.zeros(OBS), np.ones(OBS), [-2.0, 0.0], [6.0, 1.0])
    observations = np.array(BATCH["observations"])
    mean, std = gaussian(weights(learner.actor), observations)
    scale = lambda actions: np.array([-2, 0]) + (actions + 1) / 2 * np.array([8, 1])  # noqa: E731
    np.testing.assert_allclose(learner.act(observations), scale(np.tanh(mean)), rtol=1e-4, atol=1e-5)
    assert learner.act(observations[0]).shape == (ACT,)
    torch.manual_seed(1)
    noise = torch.randn(3, ACT).numpy()
    torch.manual_seed(1)
    sampled = learner.explore(observations)
    np.testing.assert_allclose(sampled, scale(np.tanh(mean + std * noise)), rtol=1e-4, atol=1e-5)


# ------------------------------------------------- runs -------------------------------------------------


def tiny(output_dir: Path, **fields) -> list[str]:
    """Command line of a run of a second: 40 updates of small networks, evaluated in episodes of 5 steps."""
    sizes = {"hidden_dim": 8, "batch_size": 16, "updates": 40, "eval_episodes": 3, "final_eval_episodes": 12,
             "environments": 3, "random_steps": 32, "refill_steps": 50, "buffer_size": 1000}
    rhythm = {"eval_every": 10, "log_every": 10, "checkpoint_every": 20}
    plain = {"compile": "false", "device": "cpu", "threads": 1, "wandb_mode": "disabled"}
    plain |= {"precision": "highest"}
    fields = {"environment": "ReefClock-v0", "output_dir": output_dir, **sizes, **rhythm, **plain, **fields}
    return [f"--{name}={value}" for name, value in fields.items()]


def train(output_dir: Path, **fields) -> Path:
    """Runs to the end; its folder."""
    config = sac.parse_config(tiny(output_dir, **fields))
    sac.train(config)
    return folder_of(output_dir, config.environment, config.seed)


def folder_of(output_dir: Path, environment: str = "ReefClock-v0", seed: int = 0) -> Path:
    return output_dir / f"collect/sac/{environment}/default/seed-{seed}"


def rungs_of(folder: Path) -> list[int]:
    """The updates of a ladder's rungs."""
    return sorted(int(path.stem) for path in (folder / "ladder").iterdir())


def checkpoint(folder: Path) -> dict:
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {key: content[key] for key in ("updates", "state", "rng")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Folder of a finished run."""
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """The command line in this process, with an output folder of its own: exit status, stdout, stderr."""

    def call(**fields) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sac.py", *tiny(tmp_path / "runs", **fields)])
        capsys.readouterr()
        status = 0
        try:
            sac.main(sac.train)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


def test_what_a_run_leaves(finished):
    info = json.loads((finished / "run.json").read_text())
    metrics, evaluations = (pd.read_csv(finished / f"{name}.csv") for name in ("metrics", "evaluations"))
    assert info["status"] == "finished"
    assert metrics["update"].tolist() == [10, 20, 30, 40]
    assert metrics["environment_steps"].tolist() == [63, 93, 123, 153]  # 33 random ones, then 3 an update
    assert (metrics["resumed"] == 0).all()
    assert metrics.notna().all().all()
    assert evaluations.groupby(["update", "phase"]).size().to_dict() == {
        (10, "training"): 3, (20, "training"): 3, (30, "training"): 3, (40, "training"): 3, (40, "final"): 12}
    final = evaluations.query("phase == 'final'")
    assert info["return_mean"] == pytest.approx(final["return"].mean())
    assert info["return_std"] == pytest.approx(final["return"].std(ddof=0))
    assert (info["environment_steps"], info["resumed"], info["score"]) == (153, 0, None)
    best = metrics["eval/return_mean"].max()
    assert f"return_mean {info['return_mean']:.1f} (best on the way, chosen with the sim" in info["result"]
    assert f": {best:.1f})" in info["result"]
    for _, row in metrics.iterrows():
        returns = evaluations.query("phase == 'training' and update == @row['update']")["return"]
        assert row["eval/return_mean"] == pytest.approx(returns.mean())


def test_denormals_are_flushed(tmp_path):
    train(tmp_path)
    assert float(torch.tensor(1e-30) * torch.tensor(1e-10)) == 0


def test_load_gives_the_policy(finished):
    policy = sac.load(finished)
    one, many = policy.act([1.0, 0.0, 0.5]), policy.act(np.zeros((7, 3)))
    assert (one.shape, many.shape) == ((1,), (7, 1))
    assert np.all((many >= -2) & (many <= 6))
    assert policy.scaler.high.item() == 6
    np.testing.assert_array_equal(one, sac.load(finished).act([1.0, 0.0, 0.5]))


def test_same_seed_same_bits(finished, tmp_path):
    again, other = train(tmp_path), train(tmp_path, seed=1)
    assert equal(checkpoint(again), checkpoint(finished))
    assert (again / "evaluations.csv").read_bytes() == (finished / "evaluations.csv").read_bytes()
    for rung in (finished / "ladder").iterdir():
        assert (again / "ladder" / rung.name).read_bytes() == rung.read_bytes()
    assert not equal(checkpoint(other)["state"], checkpoint(finished)["state"])


def test_evaluations_do_not_change_training(finished, tmp_path):
    """Neither their number nor their episodes do, and their noise comes from seed and update."""
    rarely = train(tmp_path, eval_every=20, eval_episodes=11)
    assert equal(checkpoint(rarely), checkpoint(finished))
    ours, theirs = (pd.read_csv(folder / "evaluations.csv") for folder in (rarely, finished))
    pick = "phase == 'training' and update == 40 and episode < 3"
    pd.testing.assert_frame_equal(*[table.query(pick).reset_index(drop=True) for table in (ours, theirs)])


def test_the_noise_of_an_evaluation_comes_from_seed_update_and_phase(tmp_path, monkeypatch):
    drawn, runs = {}, ({"eval_every": 10}, {"eval_every": 20}, {"seed": 1})
    evaluate = sac.evaluate

    def watched(act, environments, episodes, seed):
        assert act.__name__ == "explore"  # sampled actions, as in a dataset
        noise = []

        def noisy(observations):
            noise.append(torch.rand(2).tolist())
            return act(observations)

        table = evaluate(noisy, environments, episodes, seed)
        drawn.setdefault(seed, []).append(noise[0])
        return table

    monkeypatch.setattr(sac, "evaluate", watched)
    for number, fields in enumerate(runs):
        train(tmp_path / str(number), **fields)
    assert [len(drawn[0, update, 0]) for update in (10, 20, 30, 40)] == [1, 2, 1, 2]
    assert all(numbers == [numbers[0]] * len(numbers) for numbers in drawn.values())
    assert len({tuple(numbers[0]) for numbers in drawn.values()}) == len(drawn) == 10


def scripted(monkeypatch, returns: dict[int, float]) -> dict[int, dict]:
    """Evaluations say what `returns` has for the update; the actor's weights at each, once it came."""
    seen = {}

    def evaluate(act, environments, episodes, seed):
        actor = act.__self__.actor
        seen[seed[1]] = {key: value.clone() for key, value in actor.state_dict().items()}
        one = {"return": returns[seed[1]], "length": 5, "success": math.nan}
        return pd.DataFrame([one] * episodes)

    monkeypatch.setattr(sac, "evaluate", evaluate)
    return seen


def test_ladder_holds_the_records(tmp_path, monkeypatch):
    seen = scripted(monkeypatch, {10: -5.0, 20: 3.0, 30: 3.0, 40: 2.0, 50: 7.0, 60: 8.0})
    folder = train(tmp_path, updates=60)
    rungs = sorted((folder / "ladder").iterdir())
    assert [rung.name for rung in rungs] == [f"{update:09}.safetensors" for update in (10, 20, 50, 60)]
    for rung in rungs:
        tensors = safetensors.torch.load_file(rung)
        actor = seen[int(rung.stem)]
        assert tensors.keys() == actor.keys()
        assert all(torch.equal(tensors[key], actor[key].half()) for key in actor)
        assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    last = checkpoint(folder)["state"]["actor"]
    assert all(torch.equal(tensors[key], last[key].half()) for key in last)


def test_resumed_run(tmp_path, monkeypatch, capsys):
    """It goes on from the checkpoint with a new buffer, and forgets what was recorded after it."""
    returns = {10: 1.0, 20: 2.0, 30: 9.0, 40: 3.0}
    scripted(monkeypatch, returns)
    update, folder = sac.SAC.update, folder_of(tmp_path)

    def mortal(learner, batch):
        if learner.updates == 37:
            raise KeyboardInterrupt
        return update(learner, batch)

    monkeypatch.setattr(sac.SAC, "update", mortal)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    assert pd.read_csv(folder / "metrics.csv")["update"].tolist() == [10, 20, 30]
    assert rungs_of(folder) == [10, 20, 30]
    assert checkpoint(folder)["updates"] == 20

    first, randoms, started = pd.read_csv(folder / "metrics.csv"), [], []
    step, ladder = sac.Explorer.step, [folder / f"ladder/{update:09d}.safetensors" for update in (10, 20)]
    rungs = map(safetensors.torch.load_file, ladder)
    policies = [{key: value.float() for key, value in rung.items()} for rung in rungs]
    policies.append(checkpoint(folder)["state"]["actor"])

    def watched(explorer, random):
        actor = explorer.learner.actor.state_dict()
        if len(started) < 17:
            started.append([equal(actor, policy) for policy in policies].index(True))
        randoms.append(random)
        step(explorer, random)

    monkeypatch.setattr(sac.SAC, "update", update)
    monkeypatch.setattr(sac.Explorer, "step", watched)
    returns[30] = 1.5  # this time no record
    train(tmp_path)
    assert "resumed at update 20\nfirst 50 steps fill a new buffer\n" in capsys.readouterr().out
    assert randoms == [False] * (17 + 20)  # 17 * 3 >= 50
    assert started == [0] * 6 + [1] * 5 + [2] * 6  # a third of the 50 each, three at a time
    metrics = pd.read_csv(folder / "metrics.csv")
    pd.testing.assert_frame_equal(metrics[:2], first[:2])
    assert metrics["update"].tolist() == [10, 20, 21, 30, 40]
    assert metrics["resumed"].tolist() == [0, 0, 1, 1, 1]
    assert metrics["environment_steps"].tolist() == [63, 93, 93 + 51 + 3, 93 + 51 + 30, 93 + 51 + 60]
    assert (metrics["time/wall_seconds"].diff()[1:] > 0).all()
    assert len(pd.read_csv(folder / "evaluations.csv")) == 4 * 3 + 12
    assert rungs_of(folder) == [10, 20, 40]
    losses = [table.query("update == 30")["critic/loss"].item() for table in (metrics, first)]
    assert losses[0] != losses[1]  # another buffer


def test_a_finished_run_is_left_alone(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, folder_of(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    train(tmp_path)
    assert "is finished: return_mean" in capsys.readouterr().out
    with pytest.raises(sac.UserError, match="another config: updates 40 -> 60"):
        train(tmp_path, updates=60)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_interrupted_runs_count_every_step_and_explore_other_episodes(tmp_path, capsys, monkeypatch):
    """Ctrl-C saves between two rows of metrics.csv, here before there is any, and in the first update."""
    begin, update, seeds, ends = sac.Explorer.__init__, sac.SAC.update, [], [7, 8, 35, 99]

    def watched(explorer, environments, learner, buffer, seed):
        seeds.append(seed)
        begin(explorer, environments, learner, buffer, seed)

    def interrupted(learner, batch):
        if learner.updates == ends[0]:
            os.kill(os.getpid(), signal.SIGINT)
        return update(learner, batch)

    monkeypatch.setattr(sac.Explorer, "__init__", watched)
    monkeypatch.setattr(sac.SAC, "update", interrupted)
    for saved in (8, 9, 36):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
        assert checkpoint(folder_of(tmp_path))["updates"] == saved
        del ends[0]
    folder = train(tmp_path)
    metrics = pd.read_csv(folder / "metrics.csv")
    assert metrics["update"].tolist() == [9, 10, 20, 30, 37, 40]
    assert metrics["resumed"].tolist() == [1, 2, 2, 2, 3, 3]
    steps = [33 + 3 * update + 51 * resumed for update, resumed in zip(metrics["update"], metrics["resumed"])]
    assert metrics["environment_steps"].tolist() == steps
    info = json.loads((folder / "run.json").read_text())
    assert (info["environment_steps"], info["resumed"]) == (steps[-1], 3)
    train(tmp_path, seed=1)
    assert seeds == [(0, 0, 2), (0, 1, 2), (0, 2, 2), (0, 3, 2), (1, 0, 2)]  # evaluations end in 0 or 1


def test_a_loss_that_is_nan_stops_the_run(main, tmp_path, monkeypatch):
    critic_loss = sac.SAC.critic_loss

    def broken(learner, batch):
        loss, metrics = critic_loss(learner, batch)
        factor = math.nan if learner.updates > 22 else 1
        return loss * factor, {**metrics, "critic/loss": metrics["critic/loss"] * factor}

    monkeypatch.setattr(sac.SAC, "critic_loss", broken)
    status, _, stderr = main()
    assert status == 3
    assert stderr == "sac.py: diverged: the policy's actions are not finite; lower a learning rate\n"
    folder = folder_of(tmp_path / "runs")
    assert json.loads((folder / "run.json").read_text())["status"] == "diverged"
    kept = checkpoint(folder)
    assert kept["updates"] == 20
    assert all(x.isfinite().all() for x in sac.leaves(kept["state"]) if isinstance(x, torch.Tensor))
    status, _, stderr = main()
    assert (status, len(stderr.splitlines())) == (3, 1)


def test_a_failure_is_noted(main, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("the environment broke")

    monkeypatch.setattr(sac.Explorer, "step", broken)
    with pytest.raises(RuntimeError):
        main()
    info = json.loads((folder_of(tmp_path / "runs") / "run.json").read_text())
    assert (info["status"], info["result"]) == ("failed", "the environment broke")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"environment": "Hoper-v5"}, "cannot make Hoper-v5"),
        ({"environment": "CartPole-v1"}, "not for Discrete(2): it takes vectors (Box)"),
        ({"environment": "ReefPicture-v0"}, "it takes vectors"),
        ({"environment": "ReefBoundless-v0"}, "are no vectors with bounds: Box(-2.0, inf"),
        ({"environment": "ReefDictActions-v0"}, "are no vectors with bounds: Dict("),
        ({"buffer_size": 10**13}, "GB are free"),
        ({"device": "warp:3"}, "cannot use warp:3"),
        ({"updates": 0}, "updates"),
        ({"discount": 1.5}, "discount"),
        ({"environmentz": 3}, "did you mean environment"),
    ],
)
def test_bad_arguments_end_in_one_line(main, tmp_path, fields, words):
    status, stdout, stderr = main(**fields)
    assert (status, stdout) == (2, "")
    assert len(stderr.splitlines()) == 1
    assert words in stderr
    assert list(tmp_path.iterdir()) == []


def test_the_exit_status_reaches_the_shell(run_script, tmp_path):
    done = run_script("collect/sac.py", *tiny(tmp_path, environment="Hoper-v5"))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_it_learns_to_swing_the_pendulum_up(tmp_path):
    """Random actions return -1200 on average, and the best policies -150."""
    rates = {"actor_lr": 1e-3, "critic_lr": 2e-3, "temperature_lr": 1e-3, "tau": 0.01, "discount": 0.95}
    sizes = {"hidden_dim": 64, "batch_size": 64, "environments": 2, "random_steps": 500}
    rhythm = dict.fromkeys(("updates", "eval_every", "log_every", "checkpoint_every"), 3500)
    folder = train(tmp_path, environment="Pendulum-v1", final_eval_episodes=20, **rates, **sizes, **rhythm)
    assert json.loads((folder / "run.json").read_text())["return_mean"] > -500


# ------------------------------------------ tools/behavior.py ------------------------------------------


@pytest.mark.parametrize(
    ("values", "count", "chosen"),
    [
        ([0, 1, 2, 3, 4], 3, [0, 2, 4]),
        ([0, 1, 2, 3, 100], 3, [0, 3, 4]),
        ([0, 50, 98, 99, 100], 4, [0, 1, 2, 4]),
        ([5, 6], 3, [0, 1]),
        ([5, 6], 1, [0]),
        ([], 3, []),
    ],
)
def test_spread(values, count, chosen):
    assert behavior.spread(np.array(values), count) == chosen


def test_selection_from_a_long_ladder():
    updates = np.arange(1, 61) * 10
    returns = np.linspace(5, 300, 60)  # 5 a rung: a third of 300 is reached by rung 19, counted from 0
    chosen = behavior.select(updates, returns, None)
    assert list(chosen) == [*(f"replay-{n:02}" for n in range(1, 13)), "medium", "expert"]
    assert (chosen["medium"], chosen["expert"]) == (19, 59)
    replay = [chosen[f"replay-{n:02}"] for n in range(1, 13)]
    assert (replay[0], replay[-1]) == (0, 18)
    assert {*np.diff(replay)} == {1, 2}
    assert behavior.select(updates, returns, 290.0)["medium"] == 57
    assert behavior.select(updates, returns, 288.0)["medium"] == 57  # the first that reaches it


def test_selection_from_a_short_ladder():
    updates, returns = np.array([10, 20, 70]), np.array([-30.0, 20.0, 90.0])
    third = {"replay-01": 0, "replay-02": 1, "medium": 2, "expert": 2}  # 30 and more
    assert behavior.select(updates, returns, None) == third
    assert behavior.select(updates, returns, 15.0) == {"replay-01": 0, "medium": 1, "expert": 2}
    assert behavior.select(updates, returns, -100.0) == {"medium": 0, "expert": 2}
    assert behavior.select(updates, returns, 500.0)["medium"] == 2  # none reaches it: the nearest
    assert behavior.select(updates[:1], returns[:1], None) == {"medium": 0, "expert": 0}


@pytest.fixture
def ladder(tmp_path, monkeypatch) -> Path:
    """Folder of a run with rungs at 10, 20, 40, 50 and 60 of 60 updates, and scripted evaluations no more."""
    with monkeypatch.context() as patch:
        scripted(patch, {10: -5.0, 20: 3.0, 30: 2.0, 40: 6.0, 50: 7.0, 60: 16.0})
        return train(tmp_path / "runs", updates=60)


def test_publishing(ladder, tmp_path, capsys):
    target = tmp_path / "behavior/reefclock"
    target.mkdir(parents=True)
    (target / "replay-09.safetensors").write_bytes(b"of a longer ladder")
    assert behavior.main([str(ladder), f"--output_dir={tmp_path / 'behavior'}"]) == 0
    said = capsys.readouterr().out
    assert "only 2 rungs before medium" in said
    names = {"replay-01": 10, "replay-02": 20, "medium": 40, "expert": 60}
    assert {path.stem for path in target.glob("*.safetensors")} == {*names}
    assert len([*target.iterdir()]) == 5
    for name, update in names.items():
        rung = ladder / "ladder" / f"{update:09}.safetensors"
        assert (target / f"{name}.safetensors").read_bytes() == rung.read_bytes()
    table = pd.read_csv(target / "snapshots.csv")
    numbers = ["return_mean", "return_std", "episodes", "environment_steps", "updates", "resumed"]
    assert list(table) == ["snapshot", *numbers, "commit", "environment", "seed", "config_hash", "versions"]
    assert dict(zip(table["snapshot"], table["updates"])) == names
    assert table["environment_steps"].tolist() == [63, 93, 153, 213]
    assert (table["episodes"] == 20).all()
    info = json.loads((ladder / "run.json").read_text())
    assert {*table["config_hash"]} == {info["config_hash"]}
    assert f"torch=={torch.__version__}" in table["versions"][0]
    assert (table["return_mean"] == 1 + 2 + 3 + 4 + 5).all()  # of Clock's even episodes, and no record above
    assert (table["return_std"] == 0).all()
    before = (target / "snapshots.csv").read_bytes()
    assert behavior.main([str(ladder), f"--output_dir={tmp_path / 'behavior'}"]) == 0
    assert (target / "snapshots.csv").read_bytes() == before

    assert behavior.main([str(ladder), f"--output_dir={tmp_path / 'behavior'}", "--medium=2.5"]) == 0
    table = pd.read_csv(target / "snapshots.csv")
    assert dict(zip(table["snapshot"], table["updates"])) == {"replay-01": 10, "medium": 20, "expert": 60}
    assert not (target / "replay-02.safetensors").exists()


def test_a_measurement_is_of_the_sampled_policy_in_new_episodes(monkeypatch):
    """In the environment's units, in half precision, from starts that no evaluation had."""
    config = sac.parse_config(tiny(Path("unused"), environment="Pendulum-v1"))
    torch.manual_seed(0)
    actor = sac.TanhGaussianActor(3, 1, 8, 2)
    tensors = {key: value.half() for key, value in actor.state_dict().items()}
    calls, evaluate = [], behavior.sac.evaluate

    def short(act, environments, episodes, seed):
        calls.append((act.__name__, act.__self__, episodes, seed))
        return evaluate(act, environments, 1, seed)

    monkeypatch.setattr(behavior.sac, "evaluate", short)
    first, again, other = (behavior.measure(config, tensors, update) for update in (40, 40, 50))
    name, policy, episodes, seed = calls[0]
    assert (name, episodes) == ("explore", 20)
    assert policy.scaler.high.item() == 2
    assert all(torch.equal(policy.actor.state_dict()[key], tensors[key].float()) for key in tensors)
    assert first == again
    assert first["return_mean"] != other["return_mean"]
    starts = lambda seed: {*np.random.SeedSequence(seed).generate_state(200).tolist()}  # noqa: E731
    assert not starts(seed) & (starts((0, 40, 0)) | starts((0, 40, 1)) | starts((0, 40, 2)))


def test_what_cannot_be_published_ends_in_one_line(ladder, tmp_path, capsys):
    shutil.rmtree(ladder / "ladder")
    for folder, words in ((tmp_path / "nowhere", "is no folder of a run"), (ladder, "has no ladder yet")):
        assert behavior.main([str(folder), f"--output_dir={tmp_path / 'behavior'}"]) == 2
        stdout, stderr = capsys.readouterr()
        assert (stdout, len(stderr.splitlines())) == ("", 1)
        assert words in stderr
    assert not (tmp_path / "behavior").exists()
