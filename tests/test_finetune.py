"""What every script of algorithms/finetune/ does after the switch from the data to the environment."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import benchmark
import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import plot
import pytest
import scores
import test_learning
import torch
import yaml
from conftest import FINETUNE, ROOT, learner_class, load_script, random_episodes
from runs import assert_same_run, at_update, checkpoint, contents, equal, record, stop
from test_learning import strides  # noqa: F401

pytest_plugins = ["runs"]
SCRIPTS = {name: load_script(f"finetune/{name}.py") for name in FINETUNE}
OFFLINE_HALF = ["awac", "cql", "iql", "rebrac"]  # those that may start from a run of offline/
UPDATES, STEPS, RANDOM, PER_STEP = 20, 45, 6, 2
LATE = ["rlpd", "wsrl"]  # those that make some steps before the first update of the online phase
STEPS_OF = {name: STEPS - (RANDOM if name in LATE else 0) for name in FINETUNE}  # with updates after them
LAST = {name: UPDATES + PER_STEP * steps for name, steps in STEPS_OF.items()}


@pytest.fixture(scope="module")
def brief(minari_root) -> str:
    """Id of four random episodes of 10 steps of a pendulum, whose environment knows no success."""
    env, name = gym.make("Pendulum-v1", max_episode_steps=10), "test/finetune/pendulum-v0"
    references = {"ref_min_score": -100.0, "ref_max_score": 0.0}
    episodes = random_episodes(env, 4)
    minari.create_dataset_from_buffers(name, episodes, env=env, data_format="hdf5", **references)
    return name


def words(name: str, dataset: str, folder: Path, **fields) -> list[str]:
    """The command line of a run of a second."""
    sizes = {"hidden_dim": 8, "batch_size": 16, "updates": UPDATES, "online_steps": STEPS}
    sizes |= {"updates_per_step": PER_STEP, "eval_episodes": 2, "final_eval_episodes": 3, "buffer_size": 40}
    sizes |= {"vae_updates": 2, "vae_hidden_dim": 8, "decay_steps": STEPS, "warmup_steps": RANDOM}
    sizes |= {"random_steps": RANDOM, "critics": 3, "cql_actions": 2, "eval_every": 15, "log_every": 10}
    plain = {"checkpoint_every": 12, "compile": "false", "device": "cpu", "threads": 1}
    plain |= {"precision": "highest", "wandb_mode": "disabled", "output_dir": folder, "dataset": dataset}
    known = SCRIPTS[name].Config.__dataclass_fields__
    fields = {key: value for key, value in (sizes | plain).items() if key in known} | fields
    return [f"--{key}={value}" for key, value in fields.items()]


def place(folder: Path, name: str, dataset: str, seed: int = 0) -> Path:
    return folder / "finetune" / name / dataset / f"default/seed-{seed}"


@pytest.fixture
def tune(minari_root, monkeypatch, capsys):
    """tune("cql", "--seed", "1", ...) is the command line in this process: exit status, stdout, stderr."""

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
        capsys.readouterr()
        status = 0
        try:
            SCRIPTS[name].main(SCRIPTS[name].train)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def whole(brief, tmp_path_factory) -> Path:
    """An output folder with a finished run of every script."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    for name, script in SCRIPTS.items():
        script.train(script.parse_config(words(name, brief, folder)))
    torch.set_flush_denormal(False)
    return folder


# ------------------------------------------- killed and resumed -------------------------------------------


@pytest.mark.parametrize("name", FINETUNE)
def test_a_run_cut_short_again_and_again_ends_in_the_same_bits(
    tune, whole, brief, tmp_path, monkeypatch, name
):
    """Before, at and after the switch, in the middle of episodes; nothing is saved where it stops."""
    resumed = []
    for update in (13, 21, 37, 38, 61, 88):
        with monkeypatch.context() as patch:
            at_update(SCRIPTS[name], patch, update, stop)
            status, out, _ = tune(name, *words(name, brief, tmp_path))
        assert status == 130
        resumed += [line for line in out.splitlines() if line.startswith("resumed at update")]
    status, out, _ = tune(name, *words(name, brief, tmp_path))
    assert status == 0
    assert_same_run(place(tmp_path, name, brief), place(whole, name, brief))
    numbers = [int(line.split()[-1]) for line in resumed]
    assert numbers[:2] == [12, 20]
    assert numbers == sorted(numbers)
    assert numbers[-1] > UPDATES  # it went on from within the online phase


@pytest.mark.parametrize("moment", ["evaluate", "final", "step"])
def test_a_run_cut_short_elsewhere(tune, whole, brief, tmp_path, monkeypatch, moment):
    """In an evaluation after the switch, in the final one, in a step of the environment."""
    script, calls = SCRIPTS["cal_ql"], []
    evaluate, step = script.evaluate, script.OnlineExplorer.step

    def watched(act, environments, episodes, seed):
        if (moment, seed[1:]) in [("evaluate", (75, 0)), ("final", (LAST["cal_ql"], 1))]:
            stop()
        return evaluate(act, environments, episodes, seed)

    def stepped(explorer, policy):
        calls.append(explorer.steps)
        if moment == "step" and explorer.steps == 33:
            stop()
        return step(explorer, policy)

    with monkeypatch.context() as patch:
        patch.setattr(script, "evaluate", watched)
        patch.setattr(script.OnlineExplorer, "step", stepped)
        assert tune("cal_ql", *words("cal_ql", brief, tmp_path))[0] == 130
    assert tune("cal_ql", *words("cal_ql", brief, tmp_path))[0] == 0
    assert_same_run(place(tmp_path, "cal_ql", brief), place(whole, "cal_ql", brief))


def test_control_c_saves_at_the_end_of_the_episode(tune, whole, brief, tmp_path, monkeypatch, sigint):
    """An environment in the middle of an episode can't be saved."""
    with monkeypatch.context() as patch:
        at_update(SCRIPTS["cql"], patch, 25, lambda: os.kill(os.getpid(), signal.SIGINT))
        status, _, err = tune("cql", *words("cql", brief, tmp_path))
    said = "interrupted; the same command goes on from what is saved, or begins anew"
    assert (status, err) == (130, f"cql.py: {said}\n")
    saved = checkpoint(place(tmp_path, "cql", brief))
    assert saved["updates"] == UPDATES + 10 * PER_STEP - 1  # after the tenth step's first update
    assert saved["state"]["explorer"]["steps"] == 10
    assert tune("cql", *words("cql", brief, tmp_path))[0] == 0
    assert_same_run(place(tmp_path, "cql", brief), place(whole, "cql", brief))


@pytest.mark.parametrize("name", FINETUNE)
def test_checkpoints_of_the_online_phase_fall_on_episode_ends(tune, brief, tmp_path, monkeypatch, name):
    """But for the last: after it there is no step any more."""
    script, saved = SCRIPTS[name], []
    save = script.Run.save
    record_steps = lambda run, it: (saved.append((it.updates, it.explorer.steps)), save(run, it))  # noqa: E731
    monkeypatch.setattr(script.Run, "save", record_steps)
    assert tune(name, *words(name, brief, tmp_path))[0] == 0
    assert saved[-1] == (LAST[name], STEPS)
    online = [steps for update, steps in saved[:-1] if update > UPDATES]
    assert len(online) >= 2
    assert all(steps % 10 == 0 for steps in online)
    assert [update for update, _ in saved][:2] == [12, 20]


@pytest.mark.parametrize("name", FINETUNE)
def test_how_often_it_is_saved_makes_no_difference(tune, whole, brief, tmp_path, name):
    other = {"checkpoint_every": 5, "log_every": 10}
    assert tune(name, *words(name, brief, tmp_path, **other))[0] == 0
    assert_same_run(place(tmp_path, name, brief), place(whole, name, brief))


# ----------------------------------------------- the record -----------------------------------------------


@pytest.mark.parametrize("name", FINETUNE)
def test_the_record_of_both_phases(whole, brief, name):
    folder = place(whole, name, brief)
    info, evaluations = record(folder), pd.read_csv(folder / "evaluations.csv")
    metrics = pd.read_csv(folder / "metrics.csv").set_index("update")
    phases = evaluations.groupby("phase")["update"].unique().map(list).to_dict()
    online = [update for update in range(15, LAST[name], 15) if update > UPDATES] + [LAST[name]]
    assert phases == {"offline": [15, 20], "online": online, "final": [LAST[name]]}
    assert metrics.index.tolist() == sorted({*range(10, LAST[name], 10), *phases["offline"], *online})
    assert metrics.loc[:20, "online/steps"].isna().all()
    after = metrics.loc[21:]
    random = STEPS - STEPS_OF[name]
    steps = [random + int(np.ceil((update - UPDATES) / PER_STEP)) for update in after.index]
    assert after["online/steps"].tolist() == steps
    assert after["online/episodes"].tolist() == [step // 10 for step in steps]
    ended = after["online/episodes"].diff().fillna(after["online/episodes"]) > 0
    assert (after["online/return"].notna() == ended).all()
    assert "online/success" not in metrics  # the pendulum knows none
    state = checkpoint(folder)["state"]["explorer"]
    assert len(state["returns"]) == STEPS // 10
    assert info["regret"] == pytest.approx(np.mean([-value / 100 for value in state["returns"]]))
    assert info["score_at_switch"] == pytest.approx(metrics.loc[20, "eval/score"])
    assert info["score"] == pytest.approx(
        100 + evaluations.query("phase == 'final'")["return"].mean()
    )
    tenth = [update for update in online if update <= UPDATES + (LAST[name] - UPDATES) / 10]
    lowest = min(metrics.loc[tenth, "eval/score"]) if tenth else None
    assert info["lowest_score_after_switch"] == lowest


@pytest.mark.parametrize("name", FINETUNE)
def test_the_final_evaluation_is_in_the_table_of_scores(whole, brief, name):
    """Also of those that make some steps without updates: it is at the last update that there was."""
    folder = place(whole, name, brief)
    info = record(folder)
    rows = scores.read_run(folder, scores.name_run(folder, info), info)
    assert [*rows.loc[rows["phase"] == "final", "update"]] == [LAST[name]]
    final = rows.iloc[-1]
    assert (final["episodes"], final["online_steps"], final["score"]) == (3, STEPS, info["score"])
    assert [final[column] for column in ("score_at_switch", "regret")] == [
        info["score_at_switch"], info["regret"]]
    assert {*rows["phase"]} == {"offline", "online", "final"}
    assert plot.read_run(folder)[0]["updates"] == LAST[name]


@pytest.mark.parametrize("name", FINETUNE)
def test_every_training_episode_is_in_the_means_of_one_row(whole, brief, name):
    folder = place(whole, name, brief)
    table = pd.read_csv(folder / "metrics.csv").dropna(subset=["online/episodes"])
    counts = table["online/episodes"].diff().fillna(table["online/episodes"])
    total = (table["online/return"] * counts).dropna().sum()
    assert total == pytest.approx(sum(checkpoint(folder)["state"]["explorer"]["returns"]))


def explorer_of(successes: list, returns: list):
    explorer = SCRIPTS["cql"].OnlineExplorer.__new__(SCRIPTS["cql"].OnlineExplorer)
    explorer.successes, explorer.returns = successes, returns
    return explorer


class Recorded:
    """A run with some evaluations in its table."""

    def __init__(self, scores: dict[int, float], updates: int):
        self.metrics = {update: {"eval/score": score} for update, score in scores.items()}
        self.config = type("Config", (), {"updates": updates})


def test_numbers_of_the_online_phase():
    """Regret of the facts: 0.25. The lowest score is sought in the first tenth, the switch not counted."""
    record_of, scores = SCRIPTS["cql"].online_record, {90: 1.0, 100: 50.0, 105: 30.0, 110: 40.0, 115: 5.0}
    explorer = explorer_of([1.0, 0.0, 1.0, 1.0], [5.0, 6.0, 7.0, 8.0])
    found = record_of(Recorded(scores, 100), explorer, (0.0, 10.0), 200)
    wanted = {"score_at_switch": 50.0, "lowest_score_after_switch": 30.0, "regret": 0.25}
    episodes = {"online_returns": [5.0, 6.0, 7.0, 8.0], "online_successes": [1.0, 0.0, 1.0, 1.0]}
    assert found == wanted | episodes
    explorer = explorer_of([None, None], [5.0, 6.0])
    assert record_of(Recorded(scores, 100), explorer, (0.0, 10.0), 200)["regret"] == pytest.approx(0.45)
    found = record_of(Recorded({}, 100), explorer, (None, None), 200)
    episodes = {"online_returns": [5.0, 6.0], "online_successes": [None, None]}
    assert found == dict.fromkeys(wanted) | episodes
    assert record_of(Recorded({}, 100), explorer_of([], []), (0.0, 10.0), 200)["regret"] is None


@pytest.mark.parametrize("name", FINETUNE)
def test_a_finished_policy_is_the_evaluated_one(whole, brief, name):
    script, folder = SCRIPTS[name], place(whole, name, brief)
    policy = script.load(str(folder))
    environments = script.make_environments(minari.load_dataset(brief), None)
    table = script.evaluate(policy.act, environments, 3, (0, LAST[name], 1))
    rows = pd.read_csv(folder / "evaluations.csv").query("phase == 'final'").reset_index(drop=True)
    pd.testing.assert_frame_equal(table, rows[["return", "length", "success"]], check_exact=True)


@pytest.mark.parametrize("name", FINETUNE)
def test_a_finished_run_prints_its_score_and_does_nothing(tune, whole, brief, tmp_path, name):
    shutil.copytree(whole, tmp_path / "runs")
    before = contents(tmp_path / "runs")
    status, out, _ = tune(name, *words(name, brief, tmp_path / "runs"))
    assert status == 0
    assert " is finished: score " in out
    assert contents(tmp_path / "runs") == before


@pytest.mark.parametrize("name", FINETUNE)
def test_optimisers_keep_their_state_at_the_switch(whole, brief, name):
    """Adam has counted the updates of both phases; the actors of RLPD and, online, of WSRL make one a step,
    those of TD3's kind one in two updates. SPOT begins anew at the switch.
    """
    state = checkpoint(place(whole, name, brief))["state"]
    critic = LAST[name] - (UPDATES if name == "spot" else 0)
    actor = {"rebrac": critic // 2, "spot": critic // 2, "rlpd": UPDATES // PER_STEP + STEPS_OF[name]}
    actor["wsrl"] = UPDATES + STEPS_OF[name]
    wanted = {"critic_optimizer": critic, "actor_optimizer": actor.get(name, critic)}
    for optimizer, count in wanted.items():
        assert {int(entry["step"]) for entry in state[optimizer]["state"].values()} == {count}


@pytest.mark.parametrize("name", FINETUNE)
def test_no_step_size_falls(whole, brief, name):
    state = checkpoint(place(whole, name, brief))["state"]
    optimizers = [part for key, part in state.items() if key.endswith("_optimizer")]
    sizes = {value for key, value in vars(SCRIPTS[name].Config()).items() if key.endswith("_lr")}
    assert {group["lr"] for part in optimizers for group in part["param_groups"]} == sizes


# ---------------------------------- the environment and its transitions -----------------------------------


class Scripted(gym.Env):
    """Observations count on, rewards are given; the last step terminates or truncates."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self, rewards: list[float], terminates: bool, successes: list | None = None):
        self.rewards, self.terminates, self.successes = rewards, terminates, successes
        self.seeds, self.actions = [], []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.steps = 0
        return np.array([100.0], np.float32), {}

    def step(self, action):
        self.actions.append(float(action[0]))
        self.steps += 1
        last = self.steps == len(self.rewards)
        info = {"success": self.successes[self.steps - 1]} if self.successes else {}
        reward = self.rewards[self.steps - 1]
        ended = last and self.terminates, last and not self.terminates
        return np.array([100.0 + self.steps], np.float32), reward, *ended, info


def explore(name: str, environment: gym.Env, steps: int, factor: float = 1.0, shift: float = 0.0):
    """An explorer that has made so many steps with action 0.5, and their rows."""
    script = SCRIPTS[name]
    scaler = script.Scaler([100.0], [2.0], [-2.0], [2.0])
    explorer = script.OnlineExplorer(environment, scaler, 3, factor, shift)
    return explorer, [explorer.step(lambda s: torch.full((1, 1), 0.5)) for _ in range(steps)]


@pytest.mark.parametrize("name", FINETUNE)
@pytest.mark.parametrize("terminates", [False, True])
def test_a_time_limit_is_no_termination(name, terminates):
    """And the next observation of an episode's last step is its own, not the next episode's first."""
    environment = Scripted([1.0, 2.0, 3.0], terminates)
    explorer, rows = explore(name, environment, 4)
    assert [row["terminations"] for row in rows] == [0.0, 0.0, float(terminates), 0.0]
    assert [row["observations"].tolist() for row in rows] == [[0.0], [0.5], [1.0], [0.0]]
    assert [row["next_observations"].tolist() for row in rows] == [[0.5], [1.0], [1.5], [0.5]]
    assert [row["actions"].tolist() for row in rows] == [[0.5]] * 4  # in the learner's units
    assert environment.actions == [1.0] * 4  # in the environment's
    assert explorer.returns == [6.0]
    assert not explorer.between_episodes


def test_rewards_online_are_transformed_as_the_datas():
    explorer, rows = explore("cql", Scripted([1.0, -2.0], True), 2, factor=10.0, shift=-5.0)
    assert [row["rewards"] for row in rows] == [5.0, -25.0]
    assert explorer.returns == [-1.0]  # what is recorded is not


@pytest.mark.parametrize("name", FINETUNE)
def test_rewards_in_the_buffer_of_a_run_are_transformed_as_the_datas(tune, brief, tmp_path, name):
    """Scaled by the returns of the data, and shifted: what the environment gave is told by the returns."""
    fields = {"normalize_rewards": "true", "reward_scale": 3.0, "reward_shift": -0.5}
    assert tune(name, *words(name, brief, tmp_path, buffer_size=100, **fields))[0] == 0
    state = checkpoint(place(tmp_path, name, brief))["state"]
    episodes = [episode.rewards for episode in minari.load_dataset(brief)]
    returns = [rewards.sum() for rewards in episodes]
    factor = 3 * 1000 / (max(returns) - min(returns))
    raw = (state["buffer"]["columns"]["rewards"].numpy() + 0.5) / factor
    assert len(raw) == STEPS
    sums = raw[:40].reshape(4, 10).sum(1)
    np.testing.assert_allclose(sums, state["explorer"]["returns"], rtol=1e-4)
    assert not state["buffer"]["columns"]["terminations"].any()
    script = SCRIPTS[name]
    same = [{"rewards": np.float32(rewards)} for rewards in episodes]
    script.scale_rewards(same, 3.0, -0.5, True)
    config = script.Config(normalize_rewards=True, reward_scale=3.0)
    ours = script.reward_factor([{"rewards": np.float32(rewards)} for rewards in episodes], config)
    np.testing.assert_allclose(same[0]["rewards"], ours * episodes[0] - 0.5, rtol=1e-5)


@pytest.mark.parametrize(("successes", "known"), [([0, 1, 0], 1.0), ([0, 0, 0], 0.0), (None, None)])
def test_success_is_that_of_any_step(successes, known):
    explorer, _ = explore("cql", Scripted([0.0] * 3, False, successes), 7)
    assert explorer.successes == [known, known]
    report = explorer.report({5: {}, 6: {"online/episodes": 1}})
    assert report.get("online/success") == known
    assert (report["online/steps"], report["online/episodes"], report["online/return"]) == (7, 2, 0.0)
    report = explorer.report({6: {"online/episodes": 2.0}, 7: {}})
    assert report == {"online/steps": 7, "online/episodes": 2}


def test_an_episodes_start_depends_on_the_seed_and_its_number_alone():
    environment = Scripted([0.0], True)
    explore("cql", environment, 3)
    assert len({*environment.seeds}) == 3
    other = Scripted([0.0], True)
    resumed, _ = explore("cql", other, 0)
    resumed.load_state_dict({"steps": 2, "returns": [0.0, 0.0], "successes": [None, None]})
    resumed.step(lambda s: torch.zeros(1, 1))
    assert other.seeds == environment.seeds[2:]


# ------------------------------------------- buffer and batches -------------------------------------------


def columns(count: int) -> dict[str, torch.Tensor]:
    """Data whose rewards are negative."""
    return {"observations": torch.zeros(count, 2), "rewards": -1.0 - torch.arange(count)}


def filled(size: int, added: int):
    buffer = SCRIPTS["cql"].OnlineBuffer(columns(3), size)
    for number in range(added):
        buffer.add({"observations": torch.ones(2), "rewards": float(number), "other": 0})
    return buffer


def test_a_full_buffer_forgets_the_oldest():
    buffer = filled(4, 6)
    assert sorted(buffer.columns["rewards"].tolist()) == [2.0, 3.0, 4.0, 5.0]
    drawn = buffer.draw(200)["rewards"]
    assert {*drawn.tolist()} == {2.0, 3.0, 4.0, 5.0}
    assert {*filled(4, 2).draw(100)["rewards"].tolist()} == {0.0, 1.0}  # nothing that was never added


@pytest.mark.parametrize("added", [0, 3, 4, 6])
def test_a_restored_buffer_is_the_same(added):
    """A checkpoint holds what is filled, and no more."""
    buffer, other = filled(4, added), filled(4, 0)
    state = buffer.state_dict()
    assert len(state["columns"]["rewards"]) == min(added, 4)
    assert state["columns"]["rewards"].untyped_storage().nbytes() == 4 * min(added, 4)
    other.load_state_dict(state)
    for one in (buffer, other):
        one.add({"observations": torch.zeros(2), "rewards": 9.0})
    assert equal(buffer.state_dict(), other.state_dict())


@pytest.mark.parametrize(("fraction", "online"), [(0.5, 128), (0.25, 64), (1.0, 256), (0.0, 0)])
@pytest.mark.parametrize("name", [name for name in FINETUNE if name != "wsrl"])  # which keeps no data
def test_the_shares_of_a_batch(name, fraction, online):
    """128 of 256 from either side: rewards of the buffer are 0 or more, those of the data are not."""
    script = SCRIPTS[name]
    config = script.Config(online_fraction=fraction, batch_size=256)
    batches = script.mix_batches(columns(50), filled(40, 30), config, 7)
    for _ in range(3):
        batch = next(batches)
        assert batch["observations"].shape == (256, 2)
        assert int((batch["rewards"] >= 0).sum()) == online
        assert torch.equal(batch["observations"][:, 0] == 1, batch["rewards"] >= 0)  # rows stay together


def test_the_datas_part_of_a_batch_depends_on_seed_and_update_alone():
    script, draws = SCRIPTS["cql"], []
    config = script.Config(batch_size=16, seed=4)
    for update, skip in ((7, 3), (10, 0)):
        batches = script.mix_batches(columns(50), filled(40, 30), config, update)
        for _ in range(skip):
            next(batches)
        draws.append(next(batches)["rewards"][:8])
    assert torch.equal(*draws)


# -------------------------------------------- from another run --------------------------------------------


@pytest.fixture(scope="module")
def first(brief, tmp_path_factory) -> dict[str, Path]:
    """{name: folder} of finished offline runs."""
    folder, found = tmp_path_factory.mktemp("first"), {}
    torch.set_num_threads(1)
    for name in OFFLINE_HALF:
        script = load_script(f"offline/{name}.py")
        known = script.Config.__dataclass_fields__
        arguments = [word for word in words(name, brief, folder) if word[2:].split("=")[0] in known]
        script.train(script.parse_config(arguments))
        found[name] = folder / "offline" / name / brief / "default/seed-0"
    torch.set_flush_denormal(False)
    return found


@pytest.mark.parametrize("name", OFFLINE_HALF)
def test_a_start_takes_over_networks_and_moments_and_no_step_size(first, brief, name):
    """IQL's actor has ended with a step size of 0 there: it would stand still here."""
    script, theirs = SCRIPTS[name], checkpoint(first[name])["state"]
    config = script.parse_config(words(name, brief, "unused", start_from=first[name]))
    episodes, _ = script.read_episodes(minari.load_dataset(brief))
    space = gym.make("Pendulum-v1").action_space
    learner = learner_class(script)(config, script.fit_scaler(episodes, space, config.normalize_states))
    script.take_over(learner, config)
    assert learner.updates == UPDATES
    optimizers = [part for part in vars(learner) if part.endswith("_optimizer")]
    networks = [part for part in theirs if part not in optimizers and part != "actor_schedule"]
    assert {"actor", "critic", "target_critic", "scaler"} <= {*networks}
    for part in networks:
        assert equal(dict(vars(learner)[part].state_dict()), dict(theirs[part])), part
    assert "actor_optimizer" in optimizers
    for part in optimizers:
        state = vars(learner)[part].state_dict()
        assert equal(state["state"], theirs[part]["state"]), part
        assert state["param_groups"][0]["lr"] > 0, part
    assert learner.actor_optimizer.param_groups[0]["lr"] == config.actor_lr
    if name == "iql":
        assert theirs["actor_optimizer"]["param_groups"][0]["lr"] < 1e-8


@pytest.mark.parametrize("name", OFFLINE_HALF)
def test_a_run_that_starts_from_an_offline_run(tune, first, whole, brief, tmp_path, name):
    """It makes no update of its own before the switch."""
    status, out, _ = tune(name, *words(name, brief, tmp_path, start_from=first[name]))
    assert status == 0
    assert "update 15, " not in out
    ours, folder = place(tmp_path, name, brief), place(whole, name, brief)
    tables = [pd.read_csv(run / "evaluations.csv").query("update == 20") for run in (ours, folder)]
    assert len(tables[0]) == 2
    assert checkpoint(ours)["updates"] == LAST[name]
    assert record(ours)["score_at_switch"] is not None
    if name not in ("iql", "rebrac"):  # whose step sizes are others in offline/, and so their first phases
        assert tables[0]["return"].tolist() == tables[1]["return"].tolist()


def test_a_run_that_starts_from_an_offline_run_resumes(tune, first, brief, tmp_path, monkeypatch):
    """In the end without that run: what it gave is in the checkpoint."""
    start = shutil.copytree(first["cql"], tmp_path / "start/cql" / brief / "default/seed-0")
    arguments = words("cql", brief, tmp_path / "one", start_from=start)
    assert tune("cql", *arguments)[0] == 0
    arguments = words("cql", brief, tmp_path / "two", start_from=start)
    for update in (21, 66):
        with monkeypatch.context() as patch:
            at_update(SCRIPTS["cql"], patch, update, stop)
            assert tune("cql", *arguments)[0] == 130
    shutil.rmtree(start)
    assert tune("cql", *arguments)[0] == 0
    assert_same_run(place(tmp_path / "one", "cql", brief), place(tmp_path / "two", "cql", brief))


def test_a_run_that_starts_from_a_run_of_this_folder(tune, whole, brief, tmp_path):
    start = place(whole, "cal_ql", brief)
    arguments = words("cal_ql", brief, tmp_path, start_from=start, updates=LAST["cal_ql"])
    assert tune("cal_ql", *arguments)[0] == 0
    assert checkpoint(place(tmp_path, "cal_ql", brief))["updates"] == LAST["cal_ql"] + PER_STEP * STEPS


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"start_from": "/nowhere"}, "there is no run with a checkpoint in /nowhere"),
        ({"updates": 30}, "has updates 20: this config has to agree"),
        ({"hidden_dim": 9, "reward_shift": -1.0}, "has hidden_dim 8, reward_shift 0.0"),
        ({"start_from": "iql"}, "is no finished run of cql"),
        ({"start_from": "unfinished"}, "is no finished run of cql"),
        ({"start_from": "other shapes"}, "does not fit this script"),
    ],
)
def test_a_start_that_does_not_fit(tune, first, brief, tmp_path, change, wanted):
    folder = tmp_path / "start" / "cql" / brief / "default/seed-0"
    start = {"start_from": folder} | change
    shutil.copytree(first["cql"], folder)
    if change.get("start_from") == "iql":
        start["start_from"] = first["iql"]
    if change.get("start_from") == "unfinished":
        start["start_from"] = folder
        (folder / "run.json").write_text(json.dumps(record(folder) | {"status": "running"}))
    if change.get("start_from") == "other shapes":
        start["start_from"], content = folder, torch.load(folder / "checkpoint.pt")
        content["state"]["actor"]["net.0.weight"] = torch.zeros(3, 3)
        torch.save(content, folder / "checkpoint.pt")
    status, _, err = tune("cql", *words("cql", brief, tmp_path / "runs", **start))
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("cql.py: start_from: ")
    assert wanted in err
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------- errors -------------------------------------------------


def test_spot_needs_updates_beside_those_of_its_auto_encoder(tune, brief, tmp_path):
    """Else no policy would have learned by the switch."""
    status, _, err = tune("spot", *words("spot", brief, tmp_path, vae_updates=UPDATES))
    assert (status, err) == (2, "spot.py: vae_updates: there have to be fewer of them than updates\n")


@pytest.mark.parametrize("name", FINETUNE)
@pytest.mark.parametrize("where", ["step", "reset"])
def test_an_environment_that_raises_after_the_switch(tune, whole, brief, tmp_path, monkeypatch, name, where):
    """One line, the checkpoint intact; mended, the same command ends in the same bits."""
    script, make = SCRIPTS[name], SCRIPTS[name].make_online_environment

    def broken(environments):
        environment, calls = make(environments), []
        right = getattr(environment, where)

        def fail(*arguments, **options):
            calls.append(1)
            if len(calls) == {"step": 34, "reset": 4}[where]:
                raise OSError("the motor is out of order")
            return right(*arguments, **options)

        setattr(environment, where, fail)
        return environment

    monkeypatch.setattr(script, "make_online_environment", broken)
    status, _, err = tune(name, *words(name, brief, tmp_path))
    folder = place(tmp_path, name, brief)
    assert (status, err.count("\n")) == (2, 1)
    step = {"step": "at online step 34", "reset": "before online step 31"}[where]
    assert f"the environment failed {step}: OSError('the motor is out of order')" in err
    assert record(folder)["status"] == "failed"
    assert "out of order" in record(folder)["result"]
    assert checkpoint(folder)["updates"] > UPDATES
    assert not list(folder.glob("*.new"))
    monkeypatch.setattr(script, "make_online_environment", make)
    status, out, _ = tune(name, *words(name, brief, tmp_path))
    assert (status, "resumed at update" in out) == (0, True)
    assert_same_run(folder, place(whole, name, brief))


@pytest.mark.parametrize("name", FINETUNE)
def test_an_environment_that_raises_in_an_evaluation(tune, brief, tmp_path, monkeypatch, name):
    def fail(*_):
        raise OSError("the motor is out of order")

    monkeypatch.setattr(SCRIPTS[name], "evaluate", fail)
    status, _, err = tune(name, *words(name, brief, tmp_path))
    assert (status, err.count("\n")) == (2, 1)
    assert "the environment failed in an evaluation (offline): OSError('the motor is out of order')" in err
    assert record(place(tmp_path, name, brief))["status"] == "failed"


@pytest.mark.parametrize("name", FINETUNE)
def test_without_an_environment(tune, minari_root, tmp_path, name):
    dataset = "test/finetune/no-environment-v0"
    if not (minari_root / dataset).exists():
        env = gym.make("Pendulum-v1", max_episode_steps=10)
        spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
        episodes = random_episodes(env, 3)
        minari.create_dataset_from_buffers(dataset, episodes, **spaces, data_format="hdf5")
    status, _, err = tune(name, *words(name, dataset, tmp_path / "runs"))
    assert (status, err.count("\n")) == (2, 1)
    assert "also learns online: name an environment with --environment" in err
    assert not (tmp_path / "runs").exists()
    named = {"environment": "Pendulum-v1", "online_steps": 12, "updates": 4}
    assert tune(name, *words(name, dataset, tmp_path / "runs", **named))[0] == 0
    assert record(place(tmp_path / "runs", name, dataset))["regret"] is None  # no reference, no success


def test_a_buffer_that_does_not_fit_into_memory(tune, brief, tmp_path):
    sizes = {"online_steps": 10**12, "buffer_size": 10**12}
    status, _, err = tune("cql", *words("cql", brief, tmp_path / "runs", **sizes))
    assert (status, err.count("\n")) == (2, 1)
    assert "buffer_size: 1,000,000,000,000 transitions need 36,000.0 GB of memory" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", FINETUNE)
def test_a_loss_that_turns_nan_after_the_switch(tune, brief, tmp_path, monkeypatch, name):
    """The run stops at the next row, here the same update's, and keeps the checkpoint before it."""
    cls, folder = learner_class(SCRIPTS[name]), place(tmp_path, name, brief)
    update = cls.update

    def spoiled(learner, batch):
        factor = float("nan") if learner.updates == 65 else 1.0
        return update(learner, batch | {"rewards": batch["rewards"] * factor})

    monkeypatch.setattr(cls, "update", spoiled)
    status, _, err = tune(name, *words(name, brief, tmp_path, log_every=1))
    assert (status, err.count("\n")) == (3, 1)
    assert "diverged by update 66: critic/loss" in err
    saved = checkpoint(folder)
    assert UPDATES < saved["updates"] <= 65
    assert all(weight.isfinite().all() for weight in saved["state"]["critic"].values())
    assert record(folder)["status"] == "diverged"


@pytest.mark.parametrize("name", FINETUNE)
def test_lost_weights_never_reach_the_environment(name):
    """Between two rows of metrics nobody looks at a loss."""
    environment = Scripted([1.0, 2.0, 3.0], True)
    explorer, _ = explore(name, environment, 1)
    with pytest.raises(SCRIPTS[name].Diverged, match="actions are not finite; lower a learning rate"):
        explorer.step(lambda s: torch.full((1, 1), float("nan")))
    assert len(environment.actions) == 1


@pytest.mark.parametrize("name", FINETUNE)
def test_help_names_every_field(tune, name):
    status, out, _ = tune(name, "--help")
    assert status == 0
    assert all(f"--{field}" in out for field in vars(SCRIPTS[name].Config()))


@pytest.mark.parametrize("name", FINETUNE)
def test_a_folder_of_another_config_names_the_fields(tune, whole, brief, name):
    status, _, err = tune(name, *words(name, brief, whole, online_steps=50, discount=0.5))
    assert (status, err.count("\n")) == (2, 1)
    assert f"online_steps {STEPS} -> 50" in err
    assert "discount 0.99 -> 0.5" in err


# ------------------------------------------- every field counts -------------------------------------------

FREE = {"device", "threads", "log_every", "checkpoint_every", "wandb_mode", "wandb_project", "output_dir"}
LEFT = FREE | {"variant", "compile", "precision", "environment", "start_from", "dataset"}  # of the toolbox
EVALUATION = {"ref_min", "ref_max", "eval_every", "eval_episodes", "final_eval_episodes"}
OTHER = {"hidden_layers": 1, "lagrange_gap": 5.0, "random_steps": 3, "target_critics": 1, "buffer_size": 5}
OTHER |= {"warmup_steps": 3, "decay_to": 0.9}


@pytest.mark.parametrize("name", FINETUNE)
def test_every_field_changes_something(brief, tmp_path, monkeypatch, name):
    """The weights or Adam's moments, if it is not one of the evaluation's."""
    fixed = {"commit": "", "threads": 1}  # asking takes half of the time of so short a run
    monkeypatch.setattr(SCRIPTS[name], "provenance", lambda _: fixed)
    brisk = {"updates": 4, "online_steps": 12, "eval_every": 1000, "eval_episodes": 1}
    config = SCRIPTS[name].parse_config(words(name, brief, tmp_path, **brisk, final_eval_episodes=1))

    def outcome(number: int, **change) -> dict:
        folder = tmp_path / str(number)
        SCRIPTS[name].train(dataclasses.replace(config, output_dir=str(folder), **change))
        state = checkpoint(place(folder, name, brief, change.get("seed", 0)))["state"]
        del state["buffer"], state["explorer"]
        return {key: part.get("state", part) for key, part in state.items()}  # of optimisers the moments

    plain = outcome(0)
    for number, (field, value) in enumerate(vars(config).items(), 1):
        if field in LEFT | EVALUATION:
            continue
        other = not value if isinstance(value, bool) else (value or 0) + 1
        if isinstance(value, float):
            other = value / 2 + 0.2
        changed = outcome(number, **{field: OTHER.get(field, other)})
        assert not equal(changed, plain), field


# ---------------------------------------- the runs of docs/online.md ----------------------------------------


def test_the_matrix_compares_all_scripts_on_equal_terms():
    """The same steps for all, and the same offline updates but for RLPD; beside it SAC from scratch."""
    runs = benchmark.expand(benchmark.read_matrix(ROOT / "configs/benchmark/online.yaml"), Path("unused"))
    settings = {(run.script.stem, run.config["variant"]): run.config for run in runs}
    assert {*settings} == {*((name, "default") for name in FINETUNE), ("rlpd", "scratch")}
    datasets = {"reef/pointmaze/umaze-v0", "reef/halfcheetah/medium-replay-v1"}
    assert len(runs) == len({run.folder for run in runs}) == len(settings) * len(datasets) * 3
    assert {run.config["dataset"] for run in runs} == datasets
    assert {run.seed for run in runs} == {0, 1, 2}
    assert {run.config["online_steps"] for run in runs} == {20_000}
    for run in runs:
        assert run.config["updates"] == (0 if run.script.stem == "rlpd" else 10_000)
        last = 10_000 + 20_000 * run.config["updates_per_step"]
        assert run.config["eval_every"] < last / 10  # so that there is a lowest score after the switch
        assert (run.config.get("online_fraction") == 1) == (run.config["variant"] == "scratch")


# ------------------------------------ a problem with a known answer ------------------------------------

# The corridor of tests/test_learning.py: half of the updates on the data alone, with RLPD none of them. Those
# whose learner is a script's of offline/, word for word, are tried there.
LEARNING = {
    "cal_ql": {"updates": 200, "online_steps": 200, "cql_weight": 0.1, "cql_actions": 2},
    "iql": {"expectile": 0.9},
    "spot": {"vae_updates": 100},
    "wsrl": {"online_steps": 200, "warmup_steps": 50, "updates_per_step": 2, "critics": 4, "cql_weight": 0.1},
    "rlpd": {"updates": 0, "online_steps": 600, "random_steps": 200, "updates_per_step": 2, "critics": 4},
}


@pytest.mark.parametrize("name", LEARNING)
def test_the_policy_comes_near_the_optimum(tune, strides, tmp_path, name):  # noqa: F811
    """Within 2 steps of it; the trap costs 4 steps more, and imitation never arrives."""
    known = SCRIPTS[name].Config.__dataclass_fields__
    fields = {key: value for key, value in test_learning.SMALL.items() if key in known}
    fields |= {"updates": 300, "online_steps": 300, "eval_every": 300, "eval_episodes": 1}
    fields |= {"final_eval_episodes": 10, "wandb_mode": "disabled", "device": "cpu", "threads": 1}
    fields |= {"precision": "highest", "dataset": strides.id, "output_dir": str(tmp_path)} | LEARNING[name]

    def returns():
        for seed in range(3):
            arguments = [f"--{key}={yaml.safe_dump(value).split()[0]}" for key, value in fields.items()]
            assert tune(name, *arguments, f"--seed={seed}")[0] == 0
            yield record(place(tmp_path, name, strides.id, seed))["return_mean"]

    assert test_learning.mostly(returns(), test_learning.OPTIMUM - 2)
