"""One transformer for several tasks: what it sees of each, what the loss counts, how each is played."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import by_task
import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, load_script, random_episodes, short
from runs import SPEED, at_update, contents, equal, stop
from test_dt import forward

multitask, dt = load_script("context/multitask.py"), load_script("offline/dt.py")
SIZES = [(2, 1), (3, 2)]  # observations and actions of two tasks


def random_weights(actor, layers: int) -> None:
    """Large enough to show, biases and norms included, the same ones for the same shapes."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in actor.named_parameters():
            norm = "norm" in name or name.startswith(f"blocks.{layers}")
            parameter.normal_(mean=float(norm and name.endswith("weight")), std=0.3 if norm else 1.0)
        actor.head.weight.mul_(0.3)  # tanh would hide what comes out
        actor.head.bias.mul_(0.1)


def new_task(obs_dim: int, act_dim: int, wide: list[tuple], prompt_steps: int, seed: int):
    """A task of these sizes in a network for the sizes of `wide`, all its numbers at random."""
    rng, count = np.random.default_rng(seed), prompt_steps
    observations, actions = (np.zeros((count, max(sizes))) for sizes in zip(*wide))
    observations[:, :obs_dim] = rng.normal(size=(count, obs_dim))
    actions[:, :act_dim] = rng.uniform(-1, 1, (count, act_dim))
    numbers = {"mean": rng.normal(size=obs_dim), "std": rng.uniform(0.5, 2, obs_dim)}
    numbers |= {"low": rng.uniform(-3, -1, act_dim), "high": rng.uniform(1, 2, act_dim), "unit": 20.0 + seed}
    numbers |= {"target": 0.5 + 0.1 * seed, "returns_to_go": rng.uniform(size=count)}
    return multitask.Task(**numbers, observations=observations, actions=actions)


def small(sizes: list[tuple] = SIZES, **fields):
    """A small Multitask without dropout for tasks of these sizes."""
    fields = {"hidden_dim": 8, "hidden_layers": 2, "context": 3, "prompt_steps": 2, "dropout": 0.0} | fields
    names = {"dataset": "first", "others": ["second"][: len(sizes) - 1]}
    config = multitask.Config(**{"timesteps": 8} | names | fields)
    tasks = [new_task(*each, sizes, config.prompt_steps, number) for number, each in enumerate(sizes)]
    learner = multitask.Multitask(config, tasks)
    random_weights(learner.actor, config.hidden_layers)
    return learner


def episodes_of(obs_dim: int, act_dim: int, lengths: list[int], seed: int = 0) -> list[dict]:
    """Episodes as `read_episodes` gives them, of random numbers."""
    rng, episodes = np.random.default_rng(seed), []
    for length in lengths:
        shapes = {"observations": (length + 1, obs_dim), "actions": (length, act_dim), "rewards": (length,)}
        episode = {name: rng.uniform(-1, 1, shape).astype(np.float32) for name, shape in shapes.items()}
        episodes.append(episode | {"terminations": np.zeros(length, np.float32)})
    return episodes


def identity(obs_dim: int, act_dim: int):
    return multitask.Scaler(np.zeros(obs_dim), np.ones(obs_dim), -np.ones(act_dim), np.ones(act_dim))


LENGTHS = [[4, 1, 6, 2], [5, 3, 5]]  # of the episodes of two tasks, with 13 steps each


def steps_of(sizes: list[tuple] = SIZES, lengths: list[list] = LENGTHS) -> list[dict]:
    """The steps of tasks of these sizes, as wide as the widest's, their returns as they were."""
    parts = []
    for number, (each, counts) in enumerate(zip(sizes, lengths)):
        parts.append(multitask.steps(episodes_of(*each, counts, number), identity(*each)))
    return multitask.same_width(parts)


def batch_of(learner, rows: list[int], shown: list[int], parts: list[dict]) -> dict[str, torch.Tensor]:
    """As `train` puts it together: windows that begin at `rows` behind prompts that begin at `shown`."""
    data = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    prompts = multitask.windows(data, torch.tensor(shown), learner.config.prompt_steps)
    window = multitask.windows(data, torch.tensor(rows), learner.config.context)
    return multitask.behind(prompts, window)


# Two windows of each task and their prompts, by first row in the task and steps until the episode's end: the
# second window, the third and the last prompt are cut short by one.
WINDOWS, PROMPTS = [(5, 3), (3, 1), (4, 1), (5, 3)], [(0, 2), (6, 2), (1, 2), (7, 1)]
ROWS, SHOWN = ([first + 13 * (n // 2) for n, (first, _) in enumerate(each)] for each in (WINDOWS, PROMPTS))


def example(learner) -> dict[str, torch.Tensor]:
    return batch_of(learner, ROWS, SHOWN, steps_of())


def cut_by_hand(number: int) -> tuple[dict, dict]:
    """Prompt and window of a row of the example: a prompt's missing steps are zeros, a window's left out."""
    steps = {key: column.double().numpy() for key, column in steps_of()[number // 2].items()}
    row, length = WINDOWS[number]
    window = {key: column[row : row + length] for key, column in steps.items()}
    row, length = PROMPTS[number]
    prompt = {key: column[row : row + 2].copy() for key, column in steps.items()}
    for column in prompt.values():
        column[length:] = 0
    return prompt, window


def by_hand(learner, prompt: dict, window: dict) -> np.ndarray:
    """Actions at the steps of one window behind one prompt, from lists of their steps: (2), (3)."""
    weights = {key: value.double().numpy() for key, value in learner.actor.state_dict().items()}
    keys, count = ("returns_to_go", "observations", "actions"), len(prompt["observations"])
    row = {key: [*prompt[key], *window[key]] for key in keys}
    row["timesteps"] = [*range(count), *(count + int(t) for t in window["timesteps"])]
    return forward(weights, row, learner.config.return_scale)[count:]


# -------------------------------------------- what a task's own -------------------------------------------


@pytest.mark.equation(1)
def test_returns_are_shares_of_the_tasks_largest_and_the_target_is_a_quantile_of_them():
    """Negative returns too; the prompt is how the best episode begins, as far as it goes."""
    config = multitask.Config(prompt_steps=3, target_quantile=0.5)
    episodes = episodes_of(2, 1, [2, 4, 2])
    for episode, rewards in zip(episodes, ([-3.0, -5.0], [1.0, -2.0, 0.0, -1.0], [-1.0, -2.0])):
        episode["rewards"] = np.float32(rewards)
    data = multitask.same_width([multitask.steps(episodes, identity(2, 1))])[0]
    task = multitask.fit_task(data, identity(2, 1), config)
    wanted = np.array([-8, -5, -2, -3, -1, -1, -3, -2]) / 8
    np.testing.assert_allclose(data["returns_to_go"], wanted, rtol=1e-6)
    assert float(task.unit) == 8
    assert float(task.target) == pytest.approx(-3 / 8)
    assert task.returns_to_go.tolist() == [-0.25, -0.375, -0.125]
    np.testing.assert_array_equal(task.observations, episodes[1]["observations"][:3])
    np.testing.assert_allclose(task.actions, episodes[1]["actions"][:3], atol=1e-6)
    nothing = data | {"returns_to_go": torch.zeros(8)}  # an environment that never rewards
    assert float(multitask.fit_task(nothing, identity(2, 1), config).target) == 0
    assert torch.isfinite(nothing["returns_to_go"]).all()


def test_a_prompt_longer_than_the_best_episode_ends_with_it():
    config = multitask.Config(prompt_steps=5)
    data = multitask.same_width([multitask.steps(episodes_of(2, 1, [3, 1]), identity(2, 1))])[0]
    data["returns_to_go"] = torch.tensor([1.0, 1, 1, 9])
    task = multitask.fit_task(data, identity(2, 1), config)
    assert torch.equal(task.observations[0], data["observations"][3])
    assert not task.observations[1:].any()
    assert not task.actions[1:].any()


def test_narrower_tasks_are_padded_with_zeros():
    parts = steps_of()
    assert [tuple(part["observations"].shape) for part in parts] == [(13, 3), (13, 3)]
    assert [tuple(part["actions"].shape) for part in parts] == [(13, 2), (13, 2)]
    assert not parts[0]["observations"][:, 2:].any()
    assert not parts[0]["actions"][:, 1:].any()
    assert parts[0]["observations"][:, :2].all()
    assert parts[0]["entries"].tolist() == [[1, 0]] * 13
    assert parts[1]["entries"].tolist() == [[1, 1]] * 13


# -------------------------------------------- the transformer ---------------------------------------------


@pytest.mark.equation(2, 3)
def test_outputs_are_those_of_the_prompts_tokens_then_the_windows():
    """The prompt's steps are numbered from 0, an episode's from P on."""
    learner = small()
    found = learner.actor(example(learner))[:, 2:].detach().numpy()
    for number, row in enumerate(found):
        wanted = by_hand(learner, *cut_by_hand(number))
        np.testing.assert_allclose(row[: len(wanted)], wanted, atol=2e-5)
    assert np.ptp(found, axis=0).min() > 0.01


def test_an_observation_an_action_and_a_return_are_a_token_each():
    learner, seen = small(), []
    learner.actor.blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    learner.actor(example(learner))
    assert seen == [(4, 3 * (2 + 3), 8)]


@pytest.mark.parametrize(("key", "after"), [("returns_to_go", 0), ("observations", 0), ("actions", 1)])
def test_a_change_at_a_step_changes_no_output_before_it_and_those_after_it(key, after):
    """In the prompt too: it conditions all of the window."""
    learner = small()
    for t in range(5):
        batch = example(learner)
        before = learner.actor(batch)
        batch[key][:, t] += 1
        now = learner.actor(batch)
        assert torch.equal(before[:, : t + after], now[:, : t + after])
        assert ((before - now)[:, t + after :].abs().amax((0, 2)) > 1e-6).all()


# ------------------------------------------------ the loss ------------------------------------------------


@pytest.mark.equation(2, 3, 4)
def test_the_loss_is_the_mean_over_tasks_of_the_mean_over_their_own_entries():
    learner = small()
    errors = {0: [], 1: []}
    for number in range(4):
        prompt, window = cut_by_hand(number)
        error = (by_hand(learner, prompt, window) - window["actions"]) ** 2
        errors[number // 2] += error[:, : SIZES[number // 2][1]].ravel().tolist()
    assert [len(each) for each in errors.values()] == [4, 8]
    loss, metrics = learner.actor_loss(example(learner))
    means = [np.mean(each) for each in errors.values()]
    assert float(loss.detach()) == pytest.approx(np.mean(means), rel=1e-4)
    assert float(metrics["actor/loss"]) == float(loss.detach())
    assert float(metrics["actor/first/loss"]) == pytest.approx(means[0], rel=1e-4)
    assert float(metrics["actor/second/loss"]) == pytest.approx(means[1], rel=1e-4)
    assert not any(value.requires_grad for value in metrics.values())


def test_another_tasks_windows_and_padding_change_nothing_of_a_task():
    """Bit for bit: neither its actions, nor its loss, nor where the loss does not look."""
    learner = small()
    batch, other = example(learner), example(learner)
    for key in ("returns_to_go", "observations", "actions"):
        other[key][2:] += 3
    assert torch.equal(learner.actor(batch)[:2], learner.actor(other)[:2])
    losses = [learner.actor_loss(each)[1]["actor/first/loss"] for each in (batch, other)]
    assert torch.equal(*losses)
    gradients, head = [], learner.actor.head
    for size in (1.0, 1e3):  # what the network says beyond a task's own action
        with torch.no_grad():
            head.weight[1] *= size
        alone = {key: column[:2].repeat(2, *[1] * (column.ndim - 1)) for key, column in batch.items()}
        loss = learner.actor_loss(alone)[0]
        gradients.append([loss, *torch.autograd.grad(loss, [*learner.actor.parameters()])])
    assert all(map(torch.equal, *gradients))
    names = ["loss", *(name for name, _ in learner.actor.named_parameters())]
    assert not gradients[0][names.index("head.weight")][1].any()


def test_beside_a_wider_task_a_task_has_the_outputs_it_has_alone():
    """Where the weights of its own entries are the same."""
    wide, alone = small(), small(SIZES[:1])
    state = wide.actor.state_dict()
    state["embed_observation.weight"] = state["embed_observation.weight"][:, :2]
    state["embed_action.weight"] = state["embed_action.weight"][:, :1]
    state |= {f"head.{name}": state[f"head.{name}"][:1] for name in ("weight", "bias")}
    alone.actor.load_state_dict(state)
    batch = example(wide)
    narrow = {key: column[:2] for key, column in batch.items()}
    narrow |= {"observations": narrow["observations"][..., :2], "actions": narrow["actions"][..., :1]}
    found = wide.actor(batch)[:2, :, :1].detach()
    np.testing.assert_allclose(found, alone.actor(narrow).detach(), atol=1e-6)


def test_nothing_is_learned_of_prompts_and_behind_an_episodes_end():
    learner = small()
    entries = example(learner)["entries"].sum(-1)
    assert entries.tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [0, 0, 2, 2, 2]]


def test_one_task_without_a_prompt_is_dt():
    """Loss, gradients, two updates and actions of the same weights."""
    fields = {"hidden_dim": 8, "hidden_layers": 2, "context": 3, "dropout": 0.0, "timesteps": 6}
    fields |= {"warmup_updates": 4, "actor_lr": 1e-2}
    learner = small(SIZES[1:], **fields, prompt_steps=0)
    task, parts = learner.tasks[0], steps_of(SIZES[1:], LENGTHS[1:])
    data = {key: column.clone() for key, column in parts[0].items() if key != "entries"}
    parts[0]["returns_to_go"] /= task.unit
    scale = float(task.unit) * learner.config.return_scale
    theirs = dt.DT(dt.Config(**fields, return_scale=scale), task.scaler)
    theirs.actor.load_state_dict(learner.actor.state_dict())
    theirs.actor.target.fill_(task.target * task.unit)
    for rows in ([0, 4, 9], [1, 2, 11]):
        ours = batch_of(learner, rows, rows, parts)
        batch = dt.windows(data, torch.tensor(rows), 3)
        loss = theirs.actor_loss(batch)[0].detach()
        assert float(learner.actor_loss(ours)[0].detach()) == pytest.approx(float(loss), rel=1e-6)
        found, wanted = learner.update(ours), theirs.update(batch)
        norms = [float(each["actor/gradient_norm"]) for each in (found, wanted)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for (name, ours), wanted in zip(learner.actor.named_parameters(), theirs.actor.parameters()):
        np.testing.assert_allclose(ours.detach(), wanted.detach(), atol=2e-5, err_msg=name)
    for reward in (None, 3.0, -7.0, 2.0, 1.0):
        acted = [each.act(np.array([0.3, -1.0, 0.2]), reward) for each in (learner, theirs)]
        np.testing.assert_allclose(*acted, atol=1e-4)


# -------------------------------------------- batches and tasks -------------------------------------------


def test_every_task_has_an_equal_share_of_windows_and_of_prompts_from_anywhere_in_its_data():
    parts, config = steps_of(lengths=[[13], [4, 3]]), multitask.Config(batch_size=5, seed=3)
    draws, counts = multitask.draw_starts(parts, config, 0), np.zeros((2, 20), int)
    for _ in range(400):
        starts = next(draws)
        assert starts.shape == (2, 10)
        assert ((starts < 13).tolist()) == [[True] * 5 + [False] * 5] * 2
        for kind in range(2):
            counts[kind] += np.bincount(starts[kind], minlength=20)
    for first, last in ((0, 13), (13, 20)):
        wanted = 400 * 5 / (last - first)
        assert (np.abs(counts[:, first:last] - wanted) < 5 * math.sqrt(wanted)).all()


def test_rows_depend_on_seed_and_update_alone_and_differ_from_task_to_task():
    parts, config = steps_of(), multitask.Config(batch_size=4, seed=1)
    whole, later = multitask.draw_starts(parts, config, 998), multitask.draw_starts(parts, config, 1000)
    found = [next(whole) for _ in range(4)]
    torch.manual_seed(7)
    assert all(torch.equal(next(later), wanted) for wanted in found[2:])
    together = torch.stack(found)
    assert not torch.equal(together[..., :4], together[..., 4:] - 13)
    assert not torch.equal(together[:, 0], together[:, 1])
    other = next(multitask.draw_starts(parts, multitask.Config(batch_size=4, seed=2), 998))
    assert not torch.equal(other, found[0])


# ------------------------------------------------- acting -------------------------------------------------


@pytest.mark.equation(2, 5)
@pytest.mark.parametrize("number", [0, 1])
def test_acting_goes_on_behind_the_prompt_in_the_tasks_own_units(number):
    """By hand: scaled observations, returns-to-go that fall by r / u, the last K steps with their actions."""
    learner, rng = small(timesteps=20), np.random.default_rng(5)
    learner.play(["first", "second"][number])
    task, (obs_dim, act_dim) = learner.tasks[number], SIZES[number]
    scaler = {name: value.double().numpy() for name, value in task.scaler.named_buffers()}
    prompt = {key: column.double().numpy() for key, column in task.prompt(()).items()}
    steps, to_go = [], float(task.target)
    for t, reward in enumerate([None, 4.0, -3.0, 10.0, 0.5]):
        observation = rng.normal(size=obs_dim)
        to_go -= 0 if reward is None else reward / float(task.unit)
        wide = np.zeros(3)
        wide[:obs_dim] = (observation - scaler["mean"]) / scaler["std"]
        steps.append({"returns_to_go": to_go, "observations": wide, "actions": np.zeros(2), "timesteps": t})
        window = {key: [step[key] for step in steps[-3:]] for key in steps[0]}
        wanted = by_hand(learner, prompt, window)[-1][:act_dim]
        steps[-1]["actions"][:act_dim] = wanted
        found = learner.act(observation, reward)
        assert found.shape == (act_dim,)
        middle = scaler["low"] + (wanted + 1) / 2 * (scaler["high"] - scaler["low"])
        np.testing.assert_allclose(found, middle, atol=1e-4)
    assert len(learner.history) == 3
    assert learner.actor.training


def test_one_observation_or_a_batch():
    learner, rng = small(), np.random.default_rng(0)
    observations, rewards = rng.normal(size=(3, 4, 3)), [None, *rng.normal(size=(2, 4))]
    learner.play("second")
    batch = [learner.act(each, reward) for each, reward in zip(observations, rewards)]
    for i in range(4):
        for t in range(3):
            alone = learner.act(observations[t, i], None if t == 0 else rewards[t][i])
            np.testing.assert_allclose(alone, batch[t][i], atol=1e-5)


def test_prompt_and_return_steer_the_actions():
    learner, observation = small(), np.array([0.3, -0.2])
    before = learner.act(observation, None)
    learner.tasks[0].observations += 1
    after = learner.act(observation, None)
    learner.tasks[0].target -= 1.5
    assert abs(before - after) > 1e-4
    assert abs(learner.act(observation, None) - after) > 1e-4


def test_a_task_is_named_by_its_dataset():
    learner = small()
    learner.act(np.zeros(2), None)
    assert learner.play("second") is learner
    assert not learner.history
    assert learner.act(np.zeros(3), None).shape == (2,)
    with pytest.raises(multitask.UserError, match="there is no task third: take first or second"):
        learner.play("third")
    with pytest.raises(multitask.UserError, match=r"observations \(2,\)"):
        learner.act(np.zeros(2), None)


# ------------------------------------------------ learning ------------------------------------------------


def opposite_tasks() -> list[dict]:
    """Two tasks that differ in nothing but the sign of their actions."""
    parts = []
    for sign in (1, -1):
        episodes = episodes_of(2, 1, [20] * 5)
        for episode in episodes:
            episode["actions"] = np.full((20, 1), 0.8 * sign, np.float32)
        parts.append(multitask.steps(episodes, identity(2, 1)))
    return multitask.same_width(parts)


@pytest.mark.parametrize(("prompt_steps", "low", "high"), [(2, 0.0, 0.05), (0, 0.55, 0.75)])
def test_the_prompt_alone_tells_two_tasks_apart(prompt_steps, low, high):
    """A window of one step shows no past actions, nor anything else; without a prompt 0.64 is the least."""
    parts, fields = opposite_tasks(), {"dataset": "first", "others": ["second"], "context": 1}
    fields |= {"hidden_dim": 16, "hidden_layers": 1, "actor_lr": 3e-3, "warmup_updates": 5, "dropout": 0.0}
    config = multitask.Config(**fields, prompt_steps=prompt_steps, batch_size=16)
    torch.manual_seed(0)
    tasks = [multitask.fit_task(part, identity(2, 1), config) for part in parts]
    learner = multitask.Multitask(config, tasks)
    draws = multitask.draw_starts(parts, config, 0)
    for _ in range(150):
        starts, shown = next(draws).tolist()
        loss = learner.update(batch_of(learner, starts, shown, parts))["actor/loss"]
    assert low <= float(loss) < high
    if prompt_steps:
        acts = [float(learner.play(name).act(np.zeros(2), None)[0]) for name in ("first", "second")]
        assert acts == pytest.approx([0.8, -0.8], abs=0.2)


# -------------------------------------------------- runs --------------------------------------------------


class Plane(gym.Env):
    """Six steps on a plane; the reward falls with the distance from the origin, which is no success."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(np.float32([-1, -0.5]), np.float32([0.5, 1]))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=2)
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.position = self.position + action
        return self.position.astype(np.float32), -float(np.abs(self.position).sum()), False, False, {}


@pytest.fixture(scope="module")
def plane(minari_root) -> str:
    """Id of 20 random episodes of 6 steps on the plane."""
    if "test/Plane-v0" not in gym.registry:
        gym.register("test/Plane-v0", f"{__name__}:Plane", max_episode_steps=6)
    env, name = gym.make("test/Plane-v0"), "test/multitask/plane-v0"
    options = {"ref_min_score": -20.0, "ref_max_score": 0.0, "data_format": "hdf5"}
    minari.create_dataset_from_buffers(name, random_episodes(env, 20), env=env, **options)
    return name


def arguments(pendulum: str, plane: str, folder, **fields) -> list[str]:
    small = {"others": f"[{plane}]", "context": 4, "prompt_steps": 2, "dropout": 0.2, "warmup_updates": 30}
    small |= {"batch_size": 4, "eval_episodes": 1, "final_eval_episodes": 4}
    return short(pendulum, folder, **small | fields)


def run(pendulum: str, plane: str, folder, **fields) -> SimpleNamespace:
    multitask.train(multitask.parse_config(arguments(pendulum, plane, folder, **fields)))
    place = folder / "context/multitask" / pendulum / "default/seed-0"
    tables = {name: pd.read_csv(place / f"{name}.csv") for name in ("metrics", "evaluations")}
    info, state = json.loads((place / "run.json").read_text()), torch.load(place / "checkpoint.pt")
    return SimpleNamespace(place=place, info=info, state=state, **tables)


@pytest.fixture(scope="module")
def whole(pendulum, plane, tmp_path_factory) -> SimpleNamespace:
    """A run of 40 updates, with the batches that it learned from."""
    batches, update = [], multitask.Multitask.update
    noted = lambda learner, batch: batches.append(batch) or update(learner, batch)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask.Multitask, "update", noted)
        found = run(pendulum, plane, tmp_path_factory.mktemp("whole"))
    found.batches = batches
    return found


def test_a_run_learns_from_windows_of_both_tasks_in_their_own_units(whole):
    """Four of each; returns of -1,000 and of -20 are shares; actions within [-1, 1]."""
    together = {key: torch.stack([batch[key] for batch in whole.batches]) for key in whole.batches[0]}
    assert together["observations"].shape == (40, 8, 2 + 4, 3)
    assert not together["entries"][:, :, :2].any()
    assert not together["entries"][:, :4, :, 1].any()
    assert not together["observations"][:, 4:, :, 2].any()
    assert together["observations"][:, :4, :, 2].any()
    assert together["entries"].sum((2, 3)).amax(0).tolist() == [4] * 4 + [8] * 4
    for rows in (slice(4), slice(4, 8)):
        assert -1 <= together["returns_to_go"][:, rows].min() < -0.5
        assert 0.9 < together["actions"][:, rows].abs().max() <= 1
        assert 0.5 < together["observations"][:, rows].std() < 1.5
    prompts, windows = together["observations"].split((2, 4), 2)
    assert len(prompts[:, :, 0].flatten(0, 1).unique(dim=0)) > 200  # from anywhere
    alike = (prompts == windows[:, :, :2]).all(3).all(2)  # [updates, rows]
    assert alike.float().mean() < 0.1  # a prompt does not show what is asked for


def test_a_run_is_scored_by_the_mean_of_its_tasks_each_on_its_own_scale(pendulum, plane, whole):
    final = whole.evaluations.query("phase == 'final'")
    assert final["task"].tolist() == [pendulum] * 4 + [plane] * 4
    assert final["episode"].tolist() == [0, 1, 2, 3] * 2
    assert final["length"].tolist() == [100] * 4 + [6] * 4
    returns = final.groupby("task")["return"].mean()
    scores = {pendulum: 100 * (returns[pendulum] + 1000) / 900, plane: 100 * (returns[plane] + 20) / 20}
    for task, score in scores.items():
        assert whole.info[f"{task}/score"] == pytest.approx(score)
        assert whole.info[f"{task}/return_mean"] == pytest.approx(returns[task])
    assert whole.info["score"] == pytest.approx(np.mean([*scores.values()]))
    assert whole.info["return_mean"] == pytest.approx(returns.mean())
    assert whole.info["length_mean"] == 53
    assert whole.info["success"] is None
    assert whole.info["dataset_hash"].count(" ") == 1
    rows = whole.metrics.dropna(subset="eval/score")
    assert rows["update"].tolist() == [20, 40]
    tasks = [rows[f"eval/{task}/score"] for task in scores]
    np.testing.assert_allclose(rows["eval/score"], np.mean(tasks, 0))
    assert whole.info["best_score"] == pytest.approx(rows["eval/score"].max())
    assert {f"actor/{task}/loss" for task in scores} < {*whole.metrics}


def test_an_interrupted_run_ends_in_the_same_bits(pendulum, plane, whole, tmp_path, capsys, monkeypatch):
    """Saved after 20 of 40 updates, while warming up, with dropout; other evaluations change nothing."""
    with monkeypatch.context() as patch:
        at_update(multitask, patch, 27, stop)
        with pytest.raises(KeyboardInterrupt):
            run(pendulum, plane, tmp_path)
    resumed = run(pendulum, plane, tmp_path)
    assert "resumed at update 20" in capsys.readouterr().out
    for key in ("updates", "state", "rng"):
        assert equal(whole.state[key], resumed.state[key]), key
    pd.testing.assert_frame_equal(whole.evaluations, resumed.evaluations, check_exact=True)
    pd.testing.assert_frame_equal(whole.metrics.drop(columns=SPEED), resumed.metrics.drop(columns=SPEED))
    assert whole.info["score"] == resumed.info["score"]
    often = run(pendulum, plane, tmp_path / "often", eval_every=10)
    assert equal(whole.state["state"], often.state["state"])


@pytest.mark.parametrize("number", [0, 1])
def test_a_finished_policy_plays_each_task_as_it_was_evaluated(pendulum, plane, whole, number):
    if number == 0:
        policy, env = multitask.load(whole.place), gym.make("Pendulum-v1", max_episode_steps=100)
    else:
        policy, env = multitask.load(whole.place, plane), gym.make("test/Plane-v0")
    final = whole.evaluations.query("phase == 'final'")["return"].iloc[4 * number : 4 * number + 2]
    for played, seed in zip(final, np.random.SeedSequence((0, 40, 1)).generate_state(14).tolist()):
        (observation, _), reward, over, total = env.reset(seed=seed), None, False, 0.0
        while not over:
            observation, reward, _, over, _ = env.step(policy.act(observation, reward))
            total += reward
        assert total == pytest.approx(played, abs=0.05)
    with pytest.raises(multitask.UserError, match=f"no task pond: take {pendulum} or {plane}"):
        multitask.load(whole.place, "pond")


def test_without_references_there_is_no_score_for_the_whole(pendulum, plane, minari_root, tmp_path):
    dataset = minari.load_dataset(plane)
    minari.create_dataset_from_buffers(
        "test/multitask/unscored-v0", random_episodes(gym.make("test/Plane-v0"), 3),
        env=dataset.recover_environment(), data_format="hdf5")
    found = run(pendulum, "test/multitask/unscored-v0", tmp_path, updates=2, final_eval_episodes=1).info
    assert found["score"] is None
    assert found[f"{pendulum}/score"] is not None
    assert found["test/multitask/unscored-v0/score"] is None
    assert "return_mean" in found["result"]


# ------------------------------------------------- errors -------------------------------------------------


def fail(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    """Exit status and stderr of the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["multitask.py", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        multitask.main(multitask.train)
    return end.value.code, capsys.readouterr().err


@pytest.fixture(scope="module")
def unfit(minari_root, pendulum) -> dict[str, tuple[str, str]]:
    """{kind: id of a further set, what the error says}."""
    env = gym.make("CartPole-v1", max_episode_steps=5)
    minari.create_dataset_from_buffers(
        "test/multitask/choices-v0", random_episodes(env, 2), env=env, data_format="hdf5")
    plane = gym.make("test/Plane-v0") if "test/Plane-v0" in gym.registry else Plane()
    spaces = {"observation_space": plane.observation_space, "action_space": plane.action_space}
    minari.create_dataset_from_buffers(
        "test/multitask/nowhere-v0", random_episodes(Plane(), 2, steps=4), data_format="hdf5", **spaces)
    env = gym.make("Pendulum-v1", max_episode_steps=5)
    minari.create_dataset_from_buffers(
        "test/multitask/again-v0", random_episodes(env, 2), env=env, data_format="hdf5")
    return {
        "the same set twice": (pendulum, f"{pendulum} is a second set of Pendulum-v1"),
        "of the same environment": ("test/multitask/again-v0", "again-v0 is a second set of Pendulum-v1"),
        "choices": ("test/multitask/choices-v0", "Discrete(2): it takes vectors (Box)"),
        "no environment": ("test/multitask/nowhere-v0", "nowhere-v0 names no environment"),
        "unknown": ("reef/pointmaze/nowhere-v0", "make dataset ID=reef/pointmaze/nowhere-v0"),
    }


@pytest.mark.parametrize(
    "kind", ["the same set twice", "of the same environment", "choices", "no environment", "unknown"])
def test_a_further_set_that_does_not_fit(unfit, pendulum, tmp_path, monkeypatch, capsys, kind):
    other, wanted = unfit[kind]
    status, err = fail(monkeypatch, capsys, *arguments(pendulum, other, tmp_path / "runs"))
    assert (status, err.count("\n")) == (2, 1), err
    assert err.startswith("multitask.py: ")
    assert wanted in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("words", "wanted"), [
    (["--others", "reef/a"], "others: "),
    (["--others", "[3.5, [x]]"], "others: "),
    (["--prompt_steps", "-1"], "prompt_steps: -1"),
    (["--other", "[reef/a]"], "unknown field other: did you mean others?"),
])
def test_a_bad_argument(tmp_path, monkeypatch, capsys, words, wanted):
    status, err = fail(monkeypatch, capsys, "--output_dir", f"{tmp_path}/runs", *words)
    assert (status, err.count("\n")) == (2, 1), err
    assert wanted in err
    assert not (tmp_path / "runs").exists()


def test_other_tasks_are_another_run(pendulum, plane, whole, monkeypatch, capsys):
    before = contents(whole.place)
    words = arguments(pendulum, plane, whole.place.parents[6], others="null")
    status, err = fail(monkeypatch, capsys, *words)
    assert (status, err.count("\n")) == (2, 1)
    assert f"others ['{plane}'] -> None" in err
    assert contents(whole.place) == before


def test_a_loss_that_turns_nan(pendulum, plane, tmp_path, monkeypatch, capsys):
    update = multitask.Multitask.update

    def spoiled(learner, batch):
        factor = math.nan if learner.updates == 24 else 1.0
        return update(learner, batch | {"actions": batch["actions"] * factor})

    monkeypatch.setattr(multitask.Multitask, "update", spoiled)
    status, err = fail(monkeypatch, capsys, *arguments(pendulum, plane, tmp_path, updates=100))
    assert (status, err.count("\n")) == (3, 1)
    assert "diverged by update 30: " in err
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    assert torch.load(checkpoint)["updates"] == 20


# --------------------------------------- the page, the config, a GPU --------------------------------------


def test_tasks_stand_beside_dt_alone(pendulum, plane, whole, tmp_path, capsys):
    """tools/by_task.py on the run of these tests and a score of dt's on one of the two tasks."""
    shutil.copytree(whole.place, tmp_path / "context/multitask" / pendulum / "default/seed-0")
    row = {"family": "offline", "algorithm": "dt", "dataset": pendulum, "variant": "small", "seed": 1,
           "update": 20, "phase": "final", "score": 12.5}
    pd.DataFrame([row]).to_csv(tmp_path / "dt.csv")
    alone, out = tmp_path / "dt.csv", tmp_path / "rows.csv"
    assert by_task.main([str(tmp_path), "--alone", str(alone), "--out", str(out)]) == 0
    table = pd.read_csv(out).set_index(["task", "learner"])["score"].to_dict()
    assert table == pytest.approx({
        (pendulum, "dt small"): 12.5,
        (pendulum, "multitask"): whole.info[f"{pendulum}/score"],
        (plane, "multitask"): whole.info[f"{plane}/score"],
    })
    assert "12.5" in capsys.readouterr().out


def test_the_page_counts_the_weights_that_there_are():
    def count(learner) -> int:
        return sum(weight.numel() for weight in learner.actor.parameters())

    sizes = [(11, 3), (17, 6), (17, 6), (4, 2)]  # of hopper, halfcheetah, walker2d and the maze
    config = multitask.Config(dataset="a", others=["b", "c", "d"])
    together = multitask.Multitask(config, [new_task(*each, sizes, 5, 0) for each in sizes])
    alone = [count(dt.DT(dt.Config(), identity(*each))) for each in sizes]
    counts = " + ".join(f"{each:,}" for each in alone)
    row = f"| weights | {count(together):,} | {counts} = {sum(alone):,} |"
    assert row in (ROOT / "docs/multitask.md").read_text()


@pytest.mark.parametrize("variant", ["", "-unprompted"])
def test_the_config_takes_as_many_windows_in_an_update_as_dt(variant):
    file = ROOT / f"configs/context/multitask/reef/hopper/medium-expert-v1{variant}.yaml"
    values = multitask.parse_config(["--config_path", str(file)])
    same = ("updates", "warmup_updates", "context", "actor_lr", "hidden_dim", "hidden_layers", "dropout")
    for dataset in (values.dataset, *values.others):
        alone = dt.parse_config(["--config_path", str(ROOT / "configs/offline/dt" / f"{dataset}-small.yaml")])
        assert values.batch_size * (1 + len(values.others)) == alone.batch_size
        assert all(getattr(values, name) == getattr(alone, name) for name in (*same, "precision"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_graph_computes_what_eager_code_does(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda method, **options: method)
    learners = [small(warmup_updates=10) for _ in range(2)]
    for learner in learners:
        for name in ("actor", "tasks"):
            getattr(learner, name).cuda()
    assert multitask.compile_methods(learners[1], "actor_loss")
    for learner in learners:
        for number in range(12):
            rows = [(row + number) % 11 + 13 * (row > 12) for row in ROWS]
            batch = batch_of(learner, rows, SHOWN, steps_of())
            metrics = learner.update({key: column.cuda() for key, column in batch.items()})
    assert learners[1].learn.graphs
    for ours, theirs in zip(*(learner.actor.parameters() for learner in learners)):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)
    assert all(torch.isfinite(value) for value in metrics.values())
