"""algorithms/tutorial/ood_bandit.py: its learners, their losses against NumPy, its table and picture."""

import re
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import load_script

bandit = load_script("tutorial/ood_bandit.py")
ACTIONS = np.array([[0.2, 0.3, 0.4], [-0.5, 0.1, 0.6]])  # two seeds, three rows
REWARDS = np.array([[1.0, -1.0, 0.5], [0.0, 2.0, 0.25]])
CHOSEN = np.array([[0.7], [-0.2]])
A, B = np.array([[3.0], [-2.0]]), np.array([[-0.5], [1.0]])  # Q(a) = A a + B of either seed


def expected_reward(actions: np.ndarray) -> np.ndarray:
    """The reward as the docstring has it: a bell with its peak at 0.5; 0.3 from there it is exp(-1)."""
    return np.exp(-(((actions - 0.5) / 0.3) ** 2))


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(-1)


@pytest.fixture
def line():
    """The critic Q(a) = A a + B."""
    critic = bandit.EnsembleLinear(2, 1, 1)
    with torch.no_grad():
        critic.weight.copy_(tensor(A))
        critic.bias.copy_(tensor(B))
    return critic


@pytest.fixture(scope="module")
def learned() -> tuple[dict, torch.Tensor]:
    """Three learners on the data of 6 seeds, and the actions of these data."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    actions, rewards = bandit.log_data(6)
    found = {n: bandit.train_learner(losses, actions, rewards, 1000) for n, losses in bandit.LEARNERS.items()}
    return found, actions


@pytest.fixture
def call(monkeypatch, capsys):
    """call("--seeds", 2, ...) is the command line in this process: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ood_bandit.py", *map(str, arguments)])
        status = 0
        try:
            bandit.run()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


# The problem


def test_the_reward_and_its_best_action():
    grid = np.linspace(-1, 1, 20_001)
    rewards = bandit.true_reward(torch.tensor(grid)).numpy()
    np.testing.assert_allclose(rewards, expected_reward(grid), atol=1e-12)
    assert grid[rewards.argmax()] == pytest.approx(bandit.BEST, abs=1e-4)


def test_data_are_the_behaviour_policys_with_noise():
    torch.manual_seed(0)
    actions, rewards = (x.numpy() for x in bandit.log_data(500))
    assert actions.shape == rewards.shape == (500, 100, 1)
    assert np.abs(actions).max() <= 1
    assert actions.mean() == pytest.approx(0.3, abs=0.002)
    assert actions.std() == pytest.approx(0.07, abs=0.001)
    noise = rewards - expected_reward(actions)
    assert noise.mean() == pytest.approx(0, abs=0.002)
    assert noise.std() == pytest.approx(0.1, abs=0.002)
    assert abs(np.corrcoef(noise.ravel(), actions.ravel())[0, 1]) < 0.02
    assert len({row.tobytes() for row in actions}) == 500  # each seed has its own


def test_actions_stay_in_bounds(monkeypatch):
    monkeypatch.setattr(bandit, "SPREAD", 5.0)
    actions, _ = bandit.log_data(3)
    assert (actions.min(), actions.max()) == (-1, 1)


def test_support_gap_is_the_mean_distance_to_the_data():
    np.testing.assert_allclose(bandit.gap_to_data(tensor(CHOSEN), tensor(ACTIONS)), [0.4, 1.4 / 3], rtol=1e-5)
    between = [np.abs(row[:, None] - row).mean() for row in ACTIONS]
    np.testing.assert_allclose(bandit.gap_to_data(tensor(ACTIONS), tensor(ACTIONS)), between, rtol=1e-5)


# Losses


@pytest.mark.equation(1)
def test_1_fits_the_rewards(line):
    loss = bandit.critic_loss(line, tensor(ACTIONS), tensor(REWARDS))
    np.testing.assert_allclose(loss.detach(), ((A * ACTIONS + B - REWARDS) ** 2).mean(1), rtol=1e-5)


@pytest.mark.equation(2)
def test_2_adds_the_push(line, monkeypatch):
    monkeypatch.setattr(bandit, "CQL_WEIGHT", 0.7)
    torch.manual_seed(3)
    loss = bandit.cql_critic_loss(line, tensor(ACTIONS), tensor(REWARDS))
    torch.manual_seed(3)
    unseen = 2 * torch.rand(2, 32).double().numpy() - 1
    q, fit = A * ACTIONS + B, ((A * ACTIONS + B - REWARDS) ** 2).mean(1)
    push = np.log(np.exp(A * unseen + B).sum(1)) - q.mean(1)
    np.testing.assert_allclose(loss.detach(), fit + 0.7 * push, rtol=1e-5)


@pytest.mark.equation(2)
def test_2_draws_actions_from_all_of_the_range(line):
    seen = []

    def critic(actions):
        seen.append(actions)
        return line(actions)

    for _ in range(100):
        bandit.cql_critic_loss(critic, tensor(ACTIONS), tensor(REWARDS))
    unseen = torch.cat([actions for actions in seen if actions.shape[1] == 32])
    assert len(unseen) == 200
    assert -1 <= unseen.min() < -0.99
    assert 0.99 < unseen.max() <= 1
    assert float(unseen.mean()) == pytest.approx(0, abs=0.03)
    assert float(unseen.std()) == pytest.approx(3**-0.5, abs=0.02)


@pytest.mark.equation(1, 2)
def test_2_without_weight_is_1(line, monkeypatch):
    monkeypatch.setattr(bandit, "CQL_WEIGHT", 0.0)
    data = tensor(ACTIONS), tensor(REWARDS)
    assert torch.equal(bandit.cql_critic_loss(line, *data), bandit.critic_loss(line, *data))


@pytest.mark.equation(3)
def test_3_climbs_q(line):
    loss = bandit.actor_loss(line, tensor(CHOSEN), tensor(ACTIONS))
    np.testing.assert_allclose(loss.detach(), -(A * CHOSEN + B)[:, 0], rtol=1e-5)


@pytest.mark.equation(4)
def test_4_climbs_q_by_its_own_size_and_stays(line, monkeypatch):
    monkeypatch.setattr(bandit, "ALPHA", 0.3)
    chosen = tensor(CHOSEN).requires_grad_()
    loss = bandit.td3_bc_actor_loss(line, chosen, tensor(ACTIONS))
    q = A * CHOSEN + B
    imitation = ((CHOSEN - ACTIONS) ** 2).mean(1)
    np.testing.assert_allclose(loss.detach(), -0.3 * np.sign(q)[:, 0] + imitation, rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), chosen)  # |Q| is a number: without gradient
    slope = -0.3 * A / np.abs(q) + 2 * (CHOSEN - ACTIONS.mean(1, keepdims=True))
    np.testing.assert_allclose(gradient.squeeze(-1), slope, rtol=1e-5)


def test_who_learns_by_which_losses():
    fits = {name: losses[0] for name, losses in bandit.LEARNERS.items()}
    climbs = {name: losses[1] for name, losses in bandit.LEARNERS.items()}
    assert [*fits] == [*bandit.COLORS] == [*bandit.WHY] == ["naive", "CQL-style", "TD3+BC-style"]
    assert [*fits.values()] == [bandit.critic_loss, bandit.cql_critic_loss, bandit.critic_loss]
    assert [*climbs.values()] == [bandit.actor_loss, bandit.actor_loss, bandit.td3_bc_actor_loss]


def test_equations_of_the_docstring_are_named_in_the_code():
    source = Path(bandit.__file__).read_text()
    assert re.findall(r"\n  \((\d)\)  ", bandit.__doc__) == ["1", "2", "3", "4"]
    assert set(re.findall(r"# \((\d)\)", source)) == {"1", "2", "3", "4"}


def test_seeds_do_not_touch_each_other():
    """The first of two seeds learns the same beside another's data."""
    outcomes = []
    for other in (ACTIONS[1], ACTIONS[1] - 0.4):
        torch.manual_seed(0)
        actions, rewards = tensor(np.stack([ACTIONS[0], other])), tensor(REWARDS)
        _, chosen = bandit.train_learner(bandit.LEARNERS["TD3+BC-style"], actions, rewards, 100)
        outcomes.append(chosen.flatten().tolist())
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], abs=1e-6)
    assert outcomes[0][1] != pytest.approx(outcomes[1][1], abs=1e-2)


# What becomes of the learners


def test_the_naive_actor_leaves_and_loses_and_the_others_stay_and_win(learned):
    found, actions = learned
    table = bandit.tabulate(found, actions).groupby("policy").mean()
    returns, gaps, promises = (table[column] for column in ("return", "support gap", "Q promises"))
    assert returns["naive"] < returns["behaviour"] - 0.3
    assert min(returns["CQL-style"], returns["TD3+BC-style"]) > returns["behaviour"] + 0.05
    assert returns.max() == returns["oracle"] == pytest.approx(1)
    assert gaps["naive"] > 0.5
    assert max(gaps["CQL-style"], gaps["TD3+BC-style"]) < 0.1
    assert promises["naive"] > returns["naive"] + 1
    assert abs(promises - returns)[["CQL-style", "TD3+BC-style"]].max() < 0.3


def test_it_leaves_although_its_q_is_right_in_the_data(learned):
    found, actions = learned
    for name in ("naive", "TD3+BC-style"):
        error = found[name][0](actions).detach().numpy() - expected_reward(actions.numpy())
        assert np.abs(error).mean() < 0.06
    chosen = found["naive"][1].flatten(1)
    assert (chosen > actions.amax(1)).all()


def test_where_the_data_show_the_best_action_the_naive_learner_finds_it(monkeypatch):
    monkeypatch.setattr(bandit, "SPREAD", 0.3)
    torch.manual_seed(2)
    actions, rewards = bandit.log_data(4)
    _, chosen = bandit.train_learner(bandit.LEARNERS["naive"], actions, rewards, 1000)
    assert bandit.true_reward(chosen).mean() > 0.95


def test_table_against_an_independent_calculation(learned):
    found, actions = learned
    table = bandit.tabulate(found, actions).set_index("policy")
    data = actions.numpy()[:, :, 0].astype(float)
    policies = {name: chosen.numpy()[:, :, 0].astype(float) for name, (_, chosen) in found.items()}
    policies |= {"behaviour": data, "oracle": np.full((6, 1), 0.5)}
    assert set(table.index) == set(policies)
    for name, chosen in policies.items():
        rows = table.loc[name]
        np.testing.assert_allclose(rows["return"], expected_reward(chosen).mean(1), rtol=1e-4)
        gaps = [np.mean([abs(c - a) for c in mine for a in theirs]) for mine, theirs in zip(chosen, data)]
        np.testing.assert_allclose(rows["support gap"], gaps, rtol=1e-4)
        if name in found:
            q = found[name][0](tensor(chosen)).detach().flatten()
            np.testing.assert_allclose(rows["Q promises"], q, rtol=1e-3)
        else:
            assert rows["Q promises"].isna().all()


# The command


def test_prints_the_table_and_draws(call, tmp_path):
    picture = tmp_path / "deep/er/picture.png"
    status, out, err = call("--seeds", 3, "--updates", 5, "--picture", picture)
    assert (status, err) == (0, "")
    rows = [line.split()[0] for line in out.splitlines() if "±" in line]
    assert rows == ["Mean", "behaviour", "naive", "CQL-style", "TD3+BC-style", "oracle"]
    assert "over 3 seeds" in out
    assert out.endswith(f"Picture: {picture}\n")
    height, width, _ = matplotlib.image.imread(picture).shape
    assert width > 2 * height
    assert list(picture.parent.iterdir()) == [picture]

    torch.manual_seed(0)  # the same numbers once more, from their own source
    actions, _ = bandit.log_data(3)
    returns = expected_reward(actions.numpy()).mean((1, 2))
    assert f"{returns.mean():.2f} ± {returns.std(ddof=1):.2f}" in out
    assert call("--seeds", 3, "--updates", 5, "--picture", picture)[1] == out


def test_one_seed_has_no_deviation(call, tmp_path):
    status, out, _ = call("--seeds", 1, "--updates", 1, "--picture", tmp_path / "one.png")
    assert status == 0
    assert out.count("±") == 1  # of the heading
    assert "nan" not in out.lower()


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--seeds", "0"), "at least 1"),
        (("--updates", "-5"), "at least 1"),
        (("--seeds", "few"), "few"),
        (("--updates", "2.5"), "2.5"),
        (("--see", "3"), "--see"),
        (("--sedes", "3"), "--sedes"),
        (("--picture", "picture.jpeg"), "picture.jpeg is not the name of a .png file"),
        (("--picture", "folder.png"), "folder.png is not the name of a .png file"),
        (("--picture", "file/picture.png", "--updates", "1"), "cannot write"),
    ],
)
def test_errors_are_one_line(call, tmp_path, monkeypatch, arguments, cause):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    status, _, err = call("--picture", "out.png", *arguments)
    assert status == 2
    assert err.count("\n") == 1
    assert cause in err
    assert sorted(tmp_path.rglob("*")) == before


def test_help_names_every_field(call):
    status, out, _ = call("--help")
    assert status == 0
    assert {"--seeds", "--updates", "--picture"} <= {*out.split()}
