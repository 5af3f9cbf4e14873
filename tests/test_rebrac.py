"""Every loss term of ReBRAC against NumPy calculations written from the paper's equations.

The networks' weights are fixed, their forward passes are written again here and in oracles.py, and a gradient
is what finite differences of the NumPy loss say, with everything that an equation treats as a number held
constant.
"""

from functools import partial

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, load_script, new_learner
from oracles import (
    ACT,
    ACTIONS,
    OBS,
    Constant,
    assert_acts,
    assert_close,
    assert_compiled_is_eager,
    assert_loss_and_gradient,
    bellman,
    endings,
    episode,
    fix_weights,
    gradients,
    moved,
    networks,
    policy,
    read,
    same,
    slopes,
    snapshot,
    weights,
)
from torch import nn

SEED = 304  # each critic is the smaller one in some row, and Q has both signs
rebrac = load_script("offline/rebrac.py")
td3_bc = load_script("offline/td3_bc.py")

# What was done in the next states: nothing in that of the terminated row, nor in that of the one cut short.
NEXT = {"next_actions": [[-0.3, 0.5], [0.2, -0.7], [0.6, 0.1]], "has_next": [1.0, 0.0, 0.0]}


@pytest.fixture
def batch(batch):
    return batch | {key: torch.tensor(column) for key, column in NEXT.items()}


@pytest.fixture
def rows(rows):
    return rows | {key: np.array(column) for key, column in NEXT.items()}


def make(act_dim: int = ACT, **fields):
    """ReBRAC with small networks of fixed weights; a target's differ from its source's."""
    fields = {"hidden_dim": 6, "hidden_layers": 2, **fields}
    return fix_weights(new_learner(rebrac, rebrac.Config(**fields), OBS, act_dim), SEED)


# ------------------------------------- the networks again, in NumPy -------------------------------------


def normalised(x: np.ndarray) -> np.ndarray:
    """Rows of mean 0 and variance 1."""
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + 1e-5)


def critics(layers: list[np.ndarray], observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Q_1 and Q_2 [2, B]; a hidden layer has four arrays: weight, bias, scale, shift."""
    results = []
    for member in range(2):
        own, x = [layer[member] for layer in layers], np.concatenate([observations, actions], axis=1)
        for number in range(0, len(own) - 2, 4):
            weight, bias, scale, shift = own[number : number + 4]
            x = normalised(np.maximum(x @ weight + bias, 0)) * scale + shift
        results.append((x @ own[-2] + own[-1])[:, 0])
    return np.stack(results)


def least_q(layers: list[np.ndarray], observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The smaller of Q_1 and Q_2 [B]; each is in some row."""
    q1, q2 = critics(layers, observations, actions)
    assert len({*np.sign(q1 - q2)}) == 2
    return np.minimum(q1, q2)


def critic_errors(layers: list[np.ndarray], rows: dict[str, np.ndarray], target: np.ndarray) -> float:
    """(3)."""
    q1, q2 = critics(layers, rows["observations"], rows["actions"])
    return float(np.mean((q1 - target) ** 2) + np.mean((q2 - target) ** 2))


def squares(difference: np.ndarray) -> np.ndarray:
    """Squared Euclidean length of every row: the sum over action entries, not their mean."""
    return np.array([row @ row for row in difference])


@pytest.mark.parametrize("hidden_layers", [1, 3])
def test_critic_normalises_after_the_relu_each_member_by_itself(batch, rows, hidden_layers):
    learner = make(hidden_layers=hidden_layers)
    assert len(weights(learner.critic)) == 4 * hidden_layers + 2
    q = learner.critic(batch["observations"], batch["actions"]).detach().numpy()
    assert_close(q, critics(weights(learner.critic), rows["observations"], rows["actions"]), 1e-4)
    norms = [part for part in learner.actor.modules() if "Norm" in type(part).__name__]
    assert norms == []  # the actor has none


# ------------------------------------------------ losses ------------------------------------------------


def rebrac_target(learner, rows, noise: np.ndarray, discount: float, beta: float) -> np.ndarray:
    """y, where the penalty is beta |a' - b|^2 in the rows that have a b."""
    actions = policy(weights(learner.target_actor), rows["next_observations"]) + noise
    actions = np.minimum(np.maximum(actions, -1), 1)
    next_q = least_q(weights(learner.target_critic), rows["next_observations"], actions)
    penalty = np.where(rows["has_next"] == 1, beta * squares(actions - rows["next_actions"]), 0)
    assert penalty.max() > 0.1 or beta == 0
    return bellman(rows, discount, next_q - penalty)


@pytest.mark.equation(1, 2, 3)
@pytest.mark.parametrize("has_next", [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
def test_critic_loss(batch, rows, has_next):
    learner = make(discount=0.9, policy_noise=0.6, noise_clip=0.5, critic_beta=0.7)
    batch["has_next"], rows["has_next"] = torch.tensor(has_next), np.array(has_next)
    torch.manual_seed(2)
    draws = 0.6 * torch.randn(3, ACT).numpy().astype(np.float64)
    noise = np.minimum(np.maximum(draws, -0.5), 0.5)
    smoothed = policy(weights(learner.target_actor), rows["next_observations"]) + noise
    assert 0 < (noise != draws).mean() < 1  # some of the noise is clipped,
    assert 0 < (np.abs(smoothed) > 1).mean() < 1  # and so are some of the smoothed actions
    target = rebrac_target(learner, rows, noise, 0.9, 0.7)

    torch.manual_seed(2)
    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.target_actor, learner.target_critic]
    oracle = partial(critic_errors, rows=rows, target=target)
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    q = critics(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(q.mean(), rel=1e-4)


@pytest.mark.equation(2)
@pytest.mark.parametrize("has_next", [0.0, 1.0])
def test_target_of_a_terminated_transition_is_its_reward(batch, rows, has_next):
    batch["terminations"], batch["has_next"] = torch.ones(3), torch.full((3,), has_next)
    for discount in (0.5, 0.99):
        learner = make(discount=discount, critic_beta=3.0)
        oracle = critic_errors(weights(learner.critic), rows, rows["rewards"])
        assert_close(learner.critic_loss(batch)[0].item(), oracle)


def critic_loss_of(batch, difference: list[float], beta: float) -> float:
    """Where Q_i(s, a) = 1, Q'_i(s', a') = 0, r = 0, gamma = 1 and a' - b = difference in the one row."""
    learner = make(act_dim=len(difference), critic_beta=beta, discount=1.0, policy_noise=0.0)
    learner.critic, learner.target_critic = Constant([[1.0], [1.0]]), Constant([[0.0], [0.0]])
    learner.target_actor = Constant([[0.3] * len(difference)])
    one = {key: column[:1] for key, column in batch.items()} | {"rewards": torch.zeros(1)}
    one["next_actions"] = torch.tensor([[0.3 - entry for entry in difference]])
    one["actions"] = torch.zeros(1, len(difference))
    return learner.critic_loss(one)[0].item()


@pytest.mark.equation(2)
@pytest.mark.parametrize(
    ("difference", "beta", "penalty"),
    [
        ([0.1, 0.2], 0.5, 0.025),
        ([0.0, 0.0], 0.5, 0.0),  # a' = b
        ([0.1, 0.2], 0.0, 0.0),
        ([0.3], 0.5, 0.045),
        ([0.3, 0.3], 0.5, 0.09),  # a sum over entries: twice as many, twice as much
    ],
)
def test_penalty_of_the_facts(batch, difference, beta, penalty):
    assert critic_loss_of(batch, difference, beta) == pytest.approx(2 * (1 + penalty) ** 2, rel=1e-6)


@pytest.mark.equation(3)
def test_critic_loss_is_summed_over_the_two_critics(batch):
    learner = make()
    batch["rewards"], batch["terminations"] = torch.zeros(3), torch.ones(3)  # y = 0
    learner.critic = Constant([[1.0] * 3, [2.0] * 3])
    assert learner.critic_loss(batch)[0].item() == 1 + 4


def actor_oracle(learner, rows, beta: float):
    """(5) as a function of the actor's layers, with lambda and the critic as they are now."""
    critic, actor = weights(learner.critic), weights(learner.actor)

    def q_of(layers):
        return least_q(critic, rows["observations"], policy(layers, rows["observations"]))

    assert len({*np.sign(q_of(actor))}) == 2  # mean |Q| is not |mean Q| here
    scale = 1 / np.mean(np.abs(q_of(actor)))  # a number: the same whatever the layers below

    def oracle(layers):
        distance = squares(policy(layers, rows["observations"]) - rows["actions"])
        return np.mean(beta * distance) - scale * np.mean(q_of(layers))

    return oracle


@pytest.mark.equation(4, 5)
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_actor_loss(batch, rows, beta):
    learner = make(actor_beta=beta)
    others = [learner.target_actor, learner.target_critic]
    oracle = actor_oracle(learner, rows, beta)
    assert_loss_and_gradient(learner.actor_loss(batch)[0], learner.actor, oracle, others)


class LinearCritic(nn.Module):
    """Q_2(s, a) = slope * a + offset is the smaller one: Q_1 in place of the minimum would show."""

    def __init__(self, slope: float, offset: float):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.tensor(slope)), offset

    def forward(self, observations, actions):
        q = self.weight * actions.sum(-1) + self.offset
        return torch.stack([q + 1000, q])


@pytest.mark.equation(4, 5)
@pytest.mark.parametrize(("q", "term"), [(-4.0, 1.0), (-0.01, 1.0), (4.0, -1.0), (500.0, -1.0)])
def test_actor_loss_does_not_depend_on_the_size_of_q(batch, q, term):
    """Of Q = -4 lambda is 0.25, and lambda Q is -1."""
    learner = make(actor_beta=0.4)
    learner.critic = LinearCritic(0.0, q)
    distance = (learner.actor(batch["observations"]) - batch["actions"]).square().sum(1).mean().item()
    assert learner.actor_loss(batch)[0].item() == pytest.approx(term + 0.4 * distance, rel=1e-5)


@pytest.mark.equation(4)
@pytest.mark.parametrize("action", [1.0, -1.0, 0.25])
def test_takes_no_gradient_through_lambda(batch, action):
    """Q = 10 a, pi = a: dL/dpi = -10 / |10 a|; through lambda it would be 0, as Q / |Q| is constant."""
    learner = make(act_dim=1, actor_beta=1.0)
    learner.actor, learner.critic = Constant([[action]]), LinearCritic(10.0, 0.0)
    one = {key: column[:1] for key, column in batch.items()} | {"actions": torch.tensor([[action]])}
    gradient = torch.autograd.grad(learner.actor_loss(one)[0], learner.actor.answer)[0]
    assert gradient.item() == pytest.approx(-1 / abs(action))


# ---------------------------------------------- reductions ----------------------------------------------


@pytest.mark.equation(1, 2, 3)
def test_without_its_weight_the_critic_is_that_of_td3(batch):
    """TD3+BC's own loss of these networks, and what was done next is not looked at."""
    learner = make(critic_beta=0.0)
    td3 = new_learner(td3_bc, td3_bc.Config(hidden_dim=6), OBS, ACT)
    for name in ("critic", "target_critic", "target_actor"):
        setattr(td3, name, getattr(learner, name))
    losses = []
    for next_actions in (batch["next_actions"], -batch["next_actions"]):
        for loss in (learner.critic_loss, td3.critic_loss):
            torch.manual_seed(3)
            losses.append(loss(batch | {"next_actions": next_actions})[0].item())
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-6)


@pytest.mark.equation(4, 5)
def test_without_its_weight_the_actor_climbs_the_normalised_q_alone(batch, rows):
    learner = make(actor_beta=0.0)
    q = least_q(
        weights(learner.critic), rows["observations"], policy(weights(learner.actor), rows["observations"])
    )
    loss = learner.actor_loss(batch | {"actions": -batch["actions"]})[0].item()
    assert_close(loss, -np.mean(q) / np.mean(np.abs(q)))


# ------------------------------------------------ update ------------------------------------------------


@pytest.mark.equation(5, 6)
@pytest.mark.parametrize("delay", [1, 2, 3])
def test_moves_actor_and_targets_only_in_delayed_updates(batch, delay):
    """Both targets move towards the networks as this update left them."""
    learner = make(policy_delay=delay, tau=0.005, actor_lr=0.01, critic_lr=0.01)
    still = {name: snapshot(network) for name, network in networks(learner).items() if name != "critic"}
    assert len(still) == 3
    for _ in range(delay - 1):
        critic = snapshot(learner.critic)
        learner.update(batch)
        assert not same(learner.critic, critic)
        assert all(same(getattr(learner, name), weights) for name, weights in still.items())
    learner.update(batch)
    assert not same(learner.actor, still["actor"])
    for name in ("actor", "critic"):
        source, target = weights(getattr(learner, name)), weights(getattr(learner, f"target_{name}"))
        first = [weight.numpy() for weight in still[f"target_{name}"]]
        assert_close(target, [0.995 * old + 0.005 * new for old, new in zip(first, source)], 1e-6)
        assert max(np.abs(new - old).max() for new, old in zip(target, first)) > 1e-3  # it did move


@pytest.mark.equation(5)
def test_actor_step_gets_its_gradient_through_the_critic(batch, rows):
    """In `update`, which must not train the critic on (5), the actor's gradient is that of all of (5)."""
    learner = make(policy_delay=1, critic_lr=0.0, actor_beta=0.4)
    actor = weights(learner.actor)
    wanted = slopes(actor_oracle(learner, rows, 0.4), actor)

    def distance(layers):
        return 0.4 * np.mean(squares(policy(layers, rows["observations"]) - rows["actions"]))

    without = slopes(distance, actor)
    learner.update(batch)
    assert_close(gradients(learner.actor), wanted, 1e-4)
    assert any(np.abs(all_of - part).max() > 1e-2 for all_of, part in zip(wanted, without))


def test_actor_loss_leaves_the_critic_alone(batch):
    """Its gradients and values after an update with an actor step are those of the critic's own step."""
    with_actor, without = (make(policy_noise=0.0, policy_delay=delay) for delay in (1, 2))
    with_actor.update(batch)
    without.update(batch)
    assert "actor/loss" in with_actor.metrics
    assert "actor/loss" not in without.metrics
    assert same(with_actor.critic, snapshot(without.critic))
    assert_close(gradients(with_actor.critic), gradients(without.critic), 0)


@pytest.mark.parametrize("network", ["critic", "actor"])
def test_an_optimiser_moves_its_own_network_only(batch, network):
    """With the other learning rate at zero (and the targets' too) nothing else moves in two updates."""
    rates = {f"{name}_lr": 0.01 * (name == network) for name in ("critic", "actor")}
    assert moved(make(tau=0.0, **rates), batch, 2) == [network]


@pytest.mark.equation(6)
def test_compiled_updates_equal_eager_ones_and_targets_are_exact_averages(batch):
    assert_compiled_is_eager(rebrac, [make(tau=0.1), make(tau=0.1)], batch)


# ------------------------------------- from the dataset to the loss -------------------------------------


def columns_of(name: str, episodes: list) -> dict[str, torch.Tensor]:
    """The data that `train` makes of these episodes."""
    recorded = read(rebrac, name, episodes)
    scaler = rebrac.fit_scaler(recorded, ACTIONS, False)
    return rebrac.transitions(recorded, scaler) | rebrac.next_actions(recorded, scaler)


def test_next_actions_are_those_of_the_same_episode(minari_root):
    """In [-1, 1]; there is none after the last step, whether it terminated or was cut."""
    observations = np.zeros((4, OBS))
    long, short = episode(observations, [0.0] * 3, False), episode(observations[:3], [0.0] * 2, True)
    long.actions[2] = [0.0, 9.0]  # beyond the bounds, which are -2 and 2
    data = columns_of("test/rebrac/next-v0", [long, short])
    assert data["has_next"].tolist() == [1, 1, 0, 1, 0]
    known = data["next_actions"][[0, 1, 3]]
    assert known.tolist() == [[-1.0, 1.0], [0.0, 1.0], [-1.0, 1.0]]
    assert data["actions"][[1, 2, 4]].equal(known)
    assert {column.dtype for column in data.values()} == {torch.float32}
    assert {len(column) for column in data.values()} == {5}


@pytest.mark.equation(2)
def test_a_truncation_bootstraps_without_a_penalty(minari_root):
    """Three transitions: one terminated, one with a next action, and one that a time limit cut."""
    learner = make(discount=0.9, policy_noise=0.0, critic_beta=0.7)
    data = columns_of("test/rebrac/endings-v0", endings())
    ahead = np.array([[0.4, -0.5, 0.6], [1.3, 1.4, -1.5], [-1.6, 1.7, 1.8]])
    actions = policy(weights(learner.target_actor), ahead)
    next_q = critics(weights(learner.target_critic), ahead, actions).min(axis=0)
    penalty = 0.7 * squares(actions - np.array([-1.0, 1.0]))  # the second row's b
    assert penalty.min() > 0.1
    assert np.abs(next_q).min() > 0.1
    target = np.array([1.0, 2 + 0.9 * (next_q[1] - penalty[1]), 4 + 0.9 * next_q[2]])
    rows = {key: column.numpy().astype(np.float64) for key, column in data.items()}
    assert_close(learner.critic_loss(data)[0].item(), critic_errors(weights(learner.critic), rows, target))


def test_train_gives_the_learner_the_next_actions(scripts, pendulum, tmp_path, monkeypatch):
    """The columns of the batches in `train`, which builds them itself."""
    seen = []
    update = rebrac.ReBRAC.update
    monkeypatch.setattr(
        rebrac.ReBRAC, "update", lambda learner, batch: (seen.append(batch), update(learner, batch))[1]
    )
    fields = {"dataset": pendulum, "output_dir": str(tmp_path), "updates": 2, "batch_size": 500}
    fields |= {"hidden_dim": 8, "compile": False, "wandb_mode": "disabled", "final_eval_episodes": 1}
    rebrac.train(rebrac.Config(**fields))
    assert len(seen) == 2
    assert seen[0]["next_actions"].shape == seen[0]["actions"].shape == (500, 1)
    assert 0.9 < seen[0]["has_next"].mean().item() < 1  # 99 of 100 steps


# ----------------------------------------------- the rest -----------------------------------------------


def test_acts_in_the_environments_units(rows):
    learner = make()
    assert_acts(learner, rows, lambda observations: policy(weights(learner.actor), observations))


def test_first_weights_are_not_the_authors():
    """Theirs: hidden biases of 0.1, last layers within 1e-3 (actor) and 3e-3 (critic); 1e-6 in LayerNorm."""
    torch.manual_seed(0)
    learner = new_learner(rebrac, rebrac.Config(hidden_dim=64), OBS, ACT)
    linears = [part for part in learner.actor.modules() if isinstance(part, nn.Linear)]
    ensembles = [part for part in learner.critic.modules() if isinstance(part, rebrac.EnsembleLinear)]
    for layers in (linears, ensembles):
        assert 0.9 / 8 < layers[-1].weight.abs().max() <= 1 / 8  # 64 ** -0.5
        assert all(layer.bias.std() > 0.01 for layer in layers[:-1])
    for norm in learner.critic.modules():
        if isinstance(norm, rebrac.EnsembleLayerNorm):
            assert (norm.weight == 1).all()
            assert (norm.bias == 0).all()
    tiny = rebrac.EnsembleLayerNorm(2, 4)(torch.tensor([1e-3, -1e-3, 1e-3, -1e-3]))  # variance 1e-6
    assert tiny.abs().detach().numpy() == pytest.approx(1e-3 / (1e-6 + 1e-5) ** 0.5)


AUTHORS = {  # beta_1 and beta_2 of their configs, by the body and its data
    "halfcheetah": {"medium": (0.001, 0.01), "expert": (0.01, 0.01), "random": (0.001, 0.1),
                    "medium-replay": (0.01, 0.001), "medium-expert": (0.01, 0.1)},
    "hopper": {"medium": (0.01, 0.01), "expert": (0.1, 0.1), "random": (0.001, 0.01),
               "medium-replay": (0.05, 0.5), "medium-expert": (0.1, 0.01)},
    "walker2d": {"medium": (0.05, 0.1), "expert": (0.01, 0.5), "random": (0.01, 0.0),
                 "medium-replay": (0.05, 0.01), "medium-expert": (0.01, 0.01)},
}  # fmt: skip


@pytest.mark.parametrize("body", AUTHORS)
def test_locomotion_is_learnt_with_the_authors_weights(body):
    """Sets of the hub and ours."""
    files = [f"mujoco/{body}/{level}-v0" for level in ("medium", "expert")]
    files += [f"reef/{body}/{level}-v1" for level in AUTHORS[body]]
    for file in files:
        config = rebrac.Config(**yaml.safe_load((ROOT / f"configs/offline/rebrac/{file}.yaml").read_text()))
        level = file.split("/")[2][:-3]
        assert (config.actor_beta, config.critic_beta) == AUTHORS[body][level], file


def test_defaults_are_the_papers_for_locomotion():
    config = rebrac.Config()
    wanted = {"updates": 1_000_000, "batch_size": 1024, "hidden_dim": 256, "hidden_layers": 3}
    wanted |= {"actor_lr": 1e-3, "critic_lr": 1e-3, "discount": 0.99, "tau": 0.005}
    wanted |= {"policy_noise": 0.2, "noise_clip": 0.5, "policy_delay": 2}
    wanted |= {"normalize_states": False, "normalize_rewards": False}
    wanted |= {"reward_scale": 1.0, "reward_shift": 0.0}
    assert {field: getattr(config, field) for field in wanted} == wanted
