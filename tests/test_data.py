"""From a Minari dataset to batches: hand-made datasets whose transitions are known number by number."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import load_script, random_episodes, short
from minari.data_collector import EpisodeBuffer

CPU = torch.device("cpu")
FREE = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
BOX = gym.spaces.Box(-3, 3, (1,), np.float32)


@pytest.fixture
def td3_bc(scripts):
    return scripts["td3_bc"]


def episode(observations, actions, ending: str = "truncation", rewards=None) -> EpisodeBuffer:
    """An episode that ends in a "termination", a "truncation" or nothing; rewards 1, 2, ... unless given."""
    last = np.arange(len(actions)) == len(actions) - 1
    return EpisodeBuffer(
        observations=observations if isinstance(observations, dict) else np.array(observations, np.float64),
        actions=np.array(actions, np.float32),
        rewards=np.arange(1.0, len(actions) + 1) if rewards is None else np.array(rewards),
        terminations=last & (ending == "termination"),
        truncations=last & (ending == "truncation"),
        infos={},
    )


@pytest.fixture
def store(tmp_path, monkeypatch):
    """store(episodes, observation space, action space) is a dataset in a Minari root of the test's own."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()

    def write(episodes: list, observations=FREE, actions=BOX, name: str = "test/hand/made-v0", **metadata):
        spaces = {"observation_space": observations, "action_space": actions}
        return minari.create_dataset_from_buffers(name, episodes, **spaces, data_format="hdf5", **metadata)

    return write


def load(script, dataset, actions: gym.Space | None = None, normalize_states: bool = False) -> tuple:
    """Scaler and transitions, as `train` makes them."""
    episodes, _ = script.read_episodes(dataset)
    scaler = script.fit_scaler(episodes, actions or dataset.action_space, normalize_states)
    return scaler, script.transitions(episodes, scaler)


# ---------------------------------------------- transitions ----------------------------------------------

ENDED = episode([[1, 10], [2, 20], [3, 30], [4, 40]], [[0.0], [3.0], [-3.0]], "termination")
CUT = episode([[5, 50], [6, 60], [7, 70]], [[1.5], [-1.5]], "truncation")
LEFT = episode([[8, 80], [9, 90]], [[0.3]], "")


def test_three_episodes_that_end_in_different_ways(td3_bc, store):
    """Terminated, truncated and left: six transitions, and none from one episode to the next."""
    scaler, data = load(td3_bc, store([ENDED, CUT, LEFT]))
    wanted = {
        "observations": [[1, 10], [2, 20], [3, 30], [5, 50], [6, 60], [8, 80]],
        "actions": [[0], [1], [-1], [0.5], [-0.5], [0.1]],
        "rewards": [1, 2, 3, 1, 2, 1],
        "next_observations": [[2, 20], [3, 30], [4, 40], [6, 60], [7, 70], [9, 90]],
        "terminations": [0, 0, 1, 0, 0, 0],
    }
    assert {*data} == {*wanted}
    for key, column in wanted.items():
        assert (data[key].dtype, data[key].device) == (torch.float32, CPU), key
        np.testing.assert_allclose(data[key], column, rtol=1e-6, err_msg=key)
    assert scaler.mean.tolist() == [0, 0]
    assert scaler.std.tolist() == [1, 1]


def test_many_episodes_keep_to_themselves(scripts, store):
    """Random lengths and endings; observations are (episode, step): every row says where it is from."""
    rng = np.random.default_rng(0)
    endings = rng.choice(["termination", "truncation", ""], 50)
    lengths = rng.integers(1, 9, 50)
    places = [np.stack([np.full(n + 1, i), np.arange(n + 1)], 1) for i, n in enumerate(lengths)]
    episodes = [episode(p, np.zeros((n, 1)), e) for p, n, e in zip(places, lengths, endings)]
    dataset = store(episodes)
    for script in scripts.values():
        _, data = load(script, dataset)
        assert len(data["rewards"]) == lengths.sum()
        step = data["next_observations"] - data["observations"]
        assert (step == torch.tensor([0, 1])).all()
        numbers = data["observations"][:, 0].int().numpy()
        assert numbers.tolist() == np.repeat(np.arange(50), lengths).tolist()
        last = data["observations"][:, 1].numpy() == lengths[numbers] - 1
        assert (data["terminations"].numpy() == (last & (endings[numbers] == "termination"))).all()


def test_dicts_are_put_together_by_sorted_keys(td3_bc, store):
    inner = gym.spaces.Dict({"z": gym.spaces.Box(-1, 1, (1,)), "c": gym.spaces.Box(-1, 1, (2,))})
    space = gym.spaces.Dict({"m": gym.spaces.Box(-9, 9, (1,)), "b": inner, "a": gym.spaces.Box(-1, 1, (1,))})
    seen = {
        "m": np.array([[1.0], [2.0]]),
        "b": {"z": np.array([[0.3], [0.4]]), "c": np.array([[0.5, 0.6], [0.7, 0.8]])},
        "a": np.array([[-0.1], [-0.2]]),
    }
    dataset = store([episode(seen, [[0.0]])], space)
    _, data = load(td3_bc, dataset)
    np.testing.assert_allclose(data["observations"], [[-0.1, 0.5, 0.6, 0.3, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(data["next_observations"], [[-0.2, 0.7, 0.8, 0.4, 2.0]], rtol=1e-6)


def test_whole_numbers_become_float32(td3_bc, store):
    space = gym.spaces.Box(0, 255, (2,), np.uint8)
    whole = episode([[0, 0]], [[1], [2]], rewards=[3, -4])
    whole = replace(whole, observations=np.eye(3, 2, dtype=np.uint8))
    dataset = store([whole], space, gym.spaces.Box(0, 4, (1,), np.float32))
    assert dataset[0].rewards.dtype.kind == "i"
    _, data = load(td3_bc, dataset)
    assert {column.dtype for column in data.values()} == {torch.float32}
    assert data["rewards"].tolist() == [3, -4]
    assert data["next_observations"].tolist() == [[0, 1], [0, 0]]
    assert data["actions"].tolist() == [[-0.5], [0]]


# ------------------------------------------------ actions ------------------------------------------------


def actions_of(td3_bc, store, capsys, rows, space: gym.Space, bounds: gym.Space) -> tuple:
    """Actions as learnt, scaler, and the clipped share as it is printed."""
    dataset = store([episode(np.zeros((len(rows) + 1, 2)), rows)], actions=space)
    scaler, data = load(td3_bc, dataset, bounds)
    return data["actions"].numpy(), scaler, capsys.readouterr().out.partition(" of the action entries")[0]


def test_actions_are_mapped_by_the_environments_bounds_and_clipped_to_them(td3_bc, store, capsys):
    """Bounds of the environment [-3, 3] and [0, 10], not the dataset's, whatever its data."""
    rows = [[-3.0, 0.0], [1.5, 10.0], [4.0, 5.0], [-9.0, -1.0], [0.0, 2.5]]
    wide, bounds = gym.spaces.Box(-20, 20, (2,)), gym.spaces.Box(np.float32([-3, 0]), np.float32([3, 10]))
    actions, scaler, clipped = actions_of(td3_bc, store, capsys, rows, wide, bounds)
    wanted = [[-1, -1], [0.5, 1], [1, 0], [-1, -1], [0, -0.5]]
    np.testing.assert_allclose(actions, wanted, atol=1e-6)
    assert clipped == "30.00%"
    assert (scaler.low.tolist(), scaler.high.tolist()) == ([-3, 0], [3, 10])
    back = scaler.unscale_actions(torch.tensor(wanted, dtype=torch.float32))
    np.testing.assert_allclose(back, np.clip(rows, [-3, 0], [3, 10]), atol=1e-6)
    learner = td3_bc.TD3BC(td3_bc.Config(hidden_dim=4), scaler)
    learner.actor = torch.sign  # a policy that goes to the bounds
    np.testing.assert_allclose(learner.act(np.array([[5.0, -5.0], [-5.0, 5.0]])), [[3, 0], [-3, 10]])


def test_infinite_bounds_give_way_to_the_datas_extremes(td3_bc, store, capsys):
    """Where only one bound is infinite, only that one; an action that never changes is no number at all."""
    rows = [[-4.0, 1.0, 7.0], [2.0, 3.0, 7.0], [-1.0, 5.0, 7.0]]
    bounds = gym.spaces.Box(np.float32([-np.inf, -5, -np.inf]), np.float32([np.inf, np.inf, np.inf]))
    actions, scaler, clipped = actions_of(td3_bc, store, capsys, rows, bounds, bounds)
    np.testing.assert_allclose(actions[:, :2], [[-1, 0.2], [1, 0.6], [0, 1]], atol=1e-6)
    assert np.isfinite(actions).all()
    assert clipped == "0.00%"
    assert scaler.low.tolist() == [-4, -5, 7]
    assert scaler.high.tolist() == [2, 5, 7]
    np.testing.assert_allclose(scaler.unscale_actions(torch.ones(3)), [2, 5, 7])


def test_training_takes_the_bounds_of_the_environment(call, scripts, store, tmp_path):
    """The dataset says [-1, 1], the pendulum's are [-2, 2]: a policy may use them."""
    env = gym.make("Pendulum-v1", max_episode_steps=10)
    narrow = gym.spaces.Box(-1, 1, (1,), np.float32)
    dataset = store(random_episodes(env, 2), env.observation_space, narrow, name="test/hand/narrow-v0")
    status, out, _ = call("bc", *short(dataset.id, tmp_path, environment="Pendulum-v1"))
    assert status == 0
    assert "0.00% of the action entries" in out
    policy = scripts["bc"].load(tmp_path / f"offline/bc/{dataset.id}/default/seed-0")
    assert (policy.scaler.low.tolist(), policy.scaler.high.tolist()) == ([-2], [2])


# -------------------------------------------- states and rewards --------------------------------------------


def test_states_are_standardised_by_the_observations(td3_bc, store):
    """Of the rows learnt from, not the last ones of episodes; what never changes becomes 0 and not nan."""
    rows = np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0], [100.0, 6.0]])
    dataset = store([episode(rows, [[0], [1], [2]])])
    scaler, data = load(td3_bc, dataset, normalize_states=True)
    mean, std = rows[:3].mean(0), rows[:3].std(0) + 1e-3
    np.testing.assert_allclose(scaler.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(scaler.std, std, rtol=1e-6)
    np.testing.assert_allclose(data["observations"], (rows[:3] - mean) / std, rtol=1e-5)
    np.testing.assert_allclose(data["next_observations"], (rows[1:] - mean) / std, rtol=1e-5)
    assert (data["observations"][:, 1] == 0).all()
    np.testing.assert_allclose(scaler.scale_observations(rows[:3]), data["observations"], rtol=1e-6)


def test_rewards(td3_bc, store):
    """Returns 3 and 8: normalising multiplies by 200, then comes the scale, then the shift."""
    ends = [episode(np.zeros((3, 2)), [[0], [0]], rewards=r) for r in ([1.0, 2.0], [3.0, 5.0])]
    dataset, rewards = store(ends), np.array([1, 2, 3, 5])
    for scale, shift, normalize in ((1, 0, False), (1, 0, True), (0.5, -1, False), (-2, 3, True)):
        episodes, _ = td3_bc.read_episodes(dataset)
        td3_bc.scale_rewards(episodes, scale, shift, normalize)
        data = td3_bc.transitions(episodes, td3_bc.fit_scaler(episodes, BOX, False))
        wanted = scale * rewards * (200 if normalize else 1) + shift
        np.testing.assert_allclose(data["rewards"], wanted, rtol=1e-6)


def test_imitation_of_the_best_keeps_whole_episodes(scripts, store):
    """Three episodes of 2, 3 and 1 steps, which their observations show, with returns 2, 27 and 8."""
    shape = {2: 1.0, 3: 9.0, 1: 8.0}
    episodes = [episode(np.full((n + 1, 2), n), np.zeros((n, 1)), rewards=[r] * n) for n, r in shape.items()]
    dataset = store(episodes)
    for fraction, lengths in ((1.0, [2, 3, 1]), (0.67, [3, 1]), (0.01, [3])):
        kept = scripts["bc"].keep_best(scripts["bc"].read_episodes(dataset)[0], fraction)
        assert [len(episode["rewards"]) for episode in kept] == lengths
        assert all((episode["observations"] == len(episode["rewards"])).all() for episode in kept)


# --------------------------------------------- the content hash ---------------------------------------------


def test_the_content_hash(td3_bc, store):
    """Equal data have equal hashes under any name; one bit, dtype, or order of episodes changes it."""
    collector, names = load_script("collect/pointmaze.py"), iter(range(1000))

    def content(*episodes, **spaces) -> str:
        dataset = store(episodes, **spaces, name=f"test/hash/number{next(names)}-v0")
        found = td3_bc.read_episodes(dataset)[1]
        assert found == collector.content_hash(dataset)
        return found

    def flip(field: str) -> EpisodeBuffer:
        """ENDED with the last bit of the last entry of a field changed."""
        array = getattr(ENDED, field).copy()
        array.view(np.uint8).reshape(-1)[-array.itemsize] ^= 1
        return replace(ENDED, **{field: array})

    fields = ("observations", "actions", "rewards", "terminations", "truncations")
    hashes = [content(ENDED, CUT), content(CUT, ENDED), content(ENDED)]
    hashes += [content(flip(field), CUT) for field in fields]
    hashes += [content(replace(ENDED, rewards=ENDED.rewards.astype(np.float32)), CUT)]
    assert len({*hashes}) == len(hashes)
    assert content(ENDED, CUT) == hashes[0]
    assert all(len(digest) == 64 for digest in hashes)

    box = gym.spaces.Box(-99, 99, (2,), np.float64)
    tree = {"b": ENDED.observations, "a": CUT.observations[[0, 0, 0, 0]]}
    swapped = {"a": tree["b"], "b": tree["a"]}
    space = gym.spaces.Dict(a=box, b=box)
    dicts = [content(replace(ENDED, observations=entry), observations=space) for entry in (tree, swapped)]
    assert len({*hashes, *dicts}) == len(hashes) + 2


# --------------------------------------- where datasets come from ---------------------------------------


def test_a_dataset_from_the_hub(call, pendulum, minari_root, tmp_path, monkeypatch):
    """Fetched once, then it is on this machine; what is made here is never asked for."""
    asked = []

    def download(dataset_id: str) -> None:
        asked.append(dataset_id)
        shutil.copytree(minari_root / pendulum, tmp_path / "minari" / dataset_id)
        path = tmp_path / "minari" / dataset_id / "data/metadata.json"
        path.write_text(path.read_text().replace(pendulum, dataset_id))

    session = SimpleNamespace(head=lambda *_, **__: None)  # the hub can be reached
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    monkeypatch.setattr("minari.storage.hosting.download_dataset", download)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    for seed, source in enumerate(["from the Minari hub", "on this machine"]):
        status, out, _ = call("bc", *short("mujoco/pendulum/medium-v0", tmp_path, seed=seed))
        assert status == 0
        assert out.startswith(f"mujoco/pendulum/medium-v0, {source}: 10 episodes, 1,000 steps\n")
    assert call("bc", *short("reef/pendulum/medium-v0", tmp_path))[0] == 2
    assert asked == ["mujoco/pendulum/medium-v0"]


def test_a_download_that_leaves_nothing_behind(call, tmp_path, monkeypatch):
    monkeypatch.setattr("minari.storage.hosting.download_dataset", lambda dataset_id: None)
    status, _, err = call("bc", *short("mujoco/pendulum/medium-v0", tmp_path / "runs"))
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot load mujoco/pendulum/medium-v0" in err
    assert not (tmp_path / "runs").exists()


# --------------------------------------------- environments ---------------------------------------------


def rewrite(dataset: minari.MinariDataset, root: Path, **changes) -> minari.MinariDataset:
    """The dataset with other entries in its recorded environment."""
    path = root / dataset.id / "data/metadata.json"
    metadata = json.loads(path.read_text())
    metadata["env_spec"] = json.dumps({**json.loads(metadata["env_spec"]), **changes})
    path.write_text(json.dumps(metadata))
    return minari.load_dataset(dataset.id)


def test_the_recorded_environment(td3_bc, store, tmp_path, capsys):
    """As recorded; without its wrappers where these cannot be had; another by name; that of evaluations."""
    env = gym.make("Pendulum-v1", max_episode_steps=7, g=5.0)
    evaluated = gym.make("Pendulum-v1", max_episode_steps=9, g=6.0)
    episodes, spaces = random_episodes(env, 1), (env.observation_space, env.action_space)
    dataset = store(episodes, *spaces, env=env)

    def look(dataset, name: str | None = None) -> tuple:
        environments = td3_bc.make_environments(dataset, name)
        assert environments.num_envs == 10
        assert environments.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
        first = environments.envs[0]
        return first.spec.max_episode_steps, first.unwrapped.g, capsys.readouterr().out

    assert look(dataset) == (7, 5.0, "evaluated in Pendulum-v1\n")
    monitor = {"name": "Monitor", "entry_point": "nowhere.at_all:Monitor", "kwargs": {}}
    broken = rewrite(dataset, tmp_path / "minari", additional_wrappers=[monitor])
    steps, g, out = look(broken)
    assert (steps, g) == (7, 5.0)
    assert out.startswith("evaluated in Pendulum-v1, without its recorded wrappers: ")
    assert look(broken, "Pendulum-v1") == (200, 10.0, "evaluated in Pendulum-v1\n")
    both = store(episodes, *spaces, name="test/hand/both-v0", env=env, eval_env=evaluated)
    assert look(both) == (9, 6.0, "evaluated in Pendulum-v1\n")


def test_another_environment_may_be_named(call, pendulum, tmp_path):
    """200 steps are the registered limit; those of the dataset's environment are 100."""
    arguments = short(pendulum, tmp_path, environment="Pendulum-v1", updates=1, final_eval_episodes=1)
    status, out, _ = call("bc", *arguments)
    assert status == 0
    assert "evaluated in Pendulum-v1\n" in out
    assert "length_mean 200.00" in out


# ------------------------------------------------ batches ------------------------------------------------


def table(rows: int) -> dict[str, torch.Tensor]:
    """Columns from which a row can be told: its number, and multiples of it."""
    number = torch.arange(rows, dtype=torch.float32)
    pairs = {"observations": torch.stack([number, 2 * number], 1), "actions": (3 * number)[:, None]}
    return {**pairs, "rewards": 4 * number, "terminations": number % 2}


def test_a_batch_is_whole_rows(td3_bc):
    batch = next(td3_bc.draw_batches(table(50), 16, 0, 0))
    number = batch["rewards"] / 4
    assert number.unique().numel() > 5
    for key, column in table(50).items():
        assert batch[key].shape == (16, *column.shape[1:])
        assert batch[key].dtype == torch.float32
        assert torch.equal(batch[key], column[number.long()])


def test_a_batch_depends_on_seed_and_update_alone(td3_bc):
    """Wherever the drawing starts, before and behind the blocks in which it is done."""
    data, whole = table(1000), {}
    for update, batch in zip(range(2100), td3_bc.draw_batches(data, 4, 7, 0)):
        whole[update] = batch["rewards"].tolist()
    for start in (1, 998, 999, 1000, 1001, 1999, 2000, 2050):
        for update, batch in zip(range(start, start + 5), td3_bc.draw_batches(data, 4, 7, start)):
            assert batch["rewards"].tolist() == whole[update]
    assert len({tuple(rows) for rows in whole.values()}) == len(whole)
    assert next(td3_bc.draw_batches(data, 4, 8, 0))["rewards"].tolist() != whole[0]
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert next(td3_bc.draw_batches(data, 4, 7, 0))["rewards"].tolist() == whole[0]


def test_rows_are_drawn_with_replacement_and_all_alike(td3_bc):
    """100 rows, 64,000 draws, 640 of each expected with a deviation of 25; and one row twice in a batch."""
    draws = td3_bc.draw_batches(table(100), 32, 0, 0)
    batches = [next(draws)["rewards"].long() // 4 for _ in range(2000)]
    counts = torch.bincount(torch.cat(batches), minlength=100)
    assert counts.min() > 640 - 5 * 25
    assert counts.max() < 640 + 5 * 25
    assert sum(len(batch.unique()) < 32 for batch in batches) > 1900  # without replacement: never


def test_actions_at_a_bound_are_not_clipped(scripts, minari_root, capsys):
    """0.1 as float32 is more than 0.1 as float64: bounds are compared in the actions' type."""
    space = gym.spaces.Box(-0.1, 0.1, (1,), np.float64)
    episode = EpisodeBuffer(
        observations=np.zeros((3, 1)), actions=np.array([[-0.1], [0.1]]), rewards=np.zeros(2),
        terminations=np.zeros(2, bool), truncations=np.zeros(2, bool), infos={},
    )
    spaces = {"observation_space": gym.spaces.Box(-1, 1, (1,)), "action_space": space}
    minari.create_dataset_from_buffers("test/bounds-v0", [episode], data_format="hdf5", **spaces)
    script, dataset = scripts["bc"], minari.load_dataset("test/bounds-v0")
    _, data = load(script, dataset)
    assert capsys.readouterr().out.startswith("0.00% of the action entries")
    assert data["actions"].flatten().tolist() == [-1, 1]


def test_the_mean_return_to_go_is_that_of_every_step(td3_bc):
    """And nothing that follows a termination counts, where an episode goes on after one."""
    rewards, flags = ([1, 0, 4], [2]), ([0, 0, 0], [1])
    episodes = [{"rewards": np.float32(r), "terminations": np.float32(d)} for r, d in zip(rewards, flags)]
    assert td3_bc.mean_return_to_go(episodes, 0.5) == pytest.approx((2 + 2 + 4 + 2) / 4)
    assert td3_bc.mean_return_to_go(episodes, 0.0) == pytest.approx(7 / 4)
    episodes[0]["terminations"][1] = 1
    assert td3_bc.mean_return_to_go(episodes, 0.5) == pytest.approx((1 + 0 + 4 + 2) / 4)
