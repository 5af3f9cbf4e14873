"""Every loss term of XQL against NumPy calculations written from the paper's equations.

The networks' weights are fixed, their forward passes are written again here and in oracles.py, and a gradient
is what finite differences of the NumPy loss say, with everything that an equation treats as a number held
constant.
"""

import math
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
    fix_weights,
    gradients,
    moved,
    policy,
    q_values,
    read,
    same,
    slopes,
    snapshot,
    weights,
)

SEED = 894  # each target critic is the smaller one in some row, and u has both signs
xql = load_script("offline/xql.py")


def make(act_dim: int = ACT, **fields):
    """XQL with small networks of fixed weights; the target's differ from the critic's."""
    return fix_weights(new_learner(xql, xql.Config(hidden_dim=4, **fields), OBS, act_dim), SEED)


# ------------------------------------- the networks again, in NumPy -------------------------------------


def values(layers: list[np.ndarray], observations: np.ndarray) -> np.ndarray:
    """V [B]; a hidden layer has four arrays: weight, bias, scale and shift of its normalisation."""
    x = observations
    for number in range(0, len(layers) - 2, 4):
        weight, bias, scale, shift = layers[number : number + 4]
        x = x @ weight.T + bias
        centred = x - x.mean(axis=1, keepdims=True)
        x = centred / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + 1e-5)
        x = np.maximum(x * scale + shift, 0)
    return (x @ layers[-2].T + layers[-1])[:, 0]


def log_density(layers: list[np.ndarray], observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Log of the normal density around the tanh mean [B]; its deviation is the same in every state."""
    log_std = np.clip(layers[0], -5, 2)
    mean, density = policy(layers[1:], observations), np.ones(len(actions))
    for entry in range(actions.shape[1]):
        variance = np.exp(log_std[entry]) ** 2
        exponent = -((actions[:, entry] - mean[:, entry]) ** 2) / (2 * variance)
        density *= np.exp(exponent) / np.sqrt(2 * np.pi * variance)
    return np.log(density)


def gumbel_loss(q: np.ndarray, v: np.ndarray, beta: float, largest: float, shift: float) -> float:
    """mean(e^z - z - 1) divided by e^shift, which counts as a number."""
    z = np.minimum((q - v) / beta, largest)
    return float(np.mean(np.exp(z) - z - 1) * np.exp(-shift))


def huber(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 20, x**2 / 2, 20 * (np.abs(x) - 10))


def huber_errors(layers: list[np.ndarray], rows: dict[str, np.ndarray], target: np.ndarray) -> float:
    """(5)."""
    q1, q2 = q_values(layers, rows["observations"], rows["actions"])
    return float(np.mean(huber(q1 - target)) + np.mean(huber(q2 - target)))


# ------------------------------------------------ losses ------------------------------------------------


def td_errors(learner, rows) -> np.ndarray:
    """u = min_i Q'_i(s, a) - V(s), with the target critics."""
    q1, q2 = q_values(weights(learner.target_critic), rows["observations"], rows["actions"])
    assert len({*np.sign(q1 - q2)}) == 2
    return np.minimum(q1, q2) - values(weights(learner.value), rows["observations"])


@pytest.mark.equation(1, 2)
@pytest.mark.parametrize(("beta", "max_z"), [(1.0, 7.0), (2.0, 7.0), (0.8, 0.5), (0.3, 5.0)])
def test_value_loss(batch, rows, beta, max_z):
    learner = make(beta=beta, max_z=max_z)
    u = td_errors(learner, rows)
    assert len({*np.sign(u)}) == 2
    assert (u / beta > max_z).any() == (max_z == 0.5)  # there some z is cut
    q = u + values(weights(learner.value), rows["observations"])
    shift = max(min(u.max() / beta, max_z), -1)  # a number: the same whatever the layers below
    others = [learner.actor, learner.critic, learner.target_critic]

    def oracle(layers):
        return gumbel_loss(q, values(layers, rows["observations"]), beta, max_z, shift)

    loss, _ = learner.value_loss(batch, learner.target_q(batch))
    assert_loss_and_gradient(loss, learner.value, oracle, others)


def value_loss_at(value: float, q: list[float], beta: float = 1.0, max_z: float = 7.0) -> tuple[float, float]:
    """The loss and dL/dV where V(s) = value and Q' takes the values q over the batch."""
    learner = make(beta=beta, max_z=max_z)
    learner.value = Constant([[value]] * len(q))
    learner.target_critic = Constant([q, [entry + 1 for entry in q]])
    batch = {"observations": torch.zeros(len(q), OBS), "actions": torch.zeros(len(q), ACT)}
    loss = learner.value_loss(batch, learner.target_q(batch))[0]
    return loss.item(), torch.autograd.grad(loss, learner.value.answer)[0].sum().item()


@pytest.mark.equation(1, 2)
@pytest.mark.parametrize(
    ("z", "loss", "slope"),  # of e^z - z - 1 in z
    [(0.0, 0.0, 0.0), (1.0, 0.718282, 1.718282), (-1.0, 0.367879, -0.632121)],
)
@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_value_loss_of_the_facts(z, loss, slope, beta):
    """V lies z beta below Q', and the loss is divided by e^max(z, -1)."""
    scale = math.exp(-max(z, -1))
    wanted = (loss * scale, -slope / beta * scale)
    assert value_loss_at(2.0, [2.0 + z * beta], beta) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.equation(2)
def test_value_loss_is_divided_by_the_largest_exponential():
    assert value_loss_at(0.0, [1.0])[0] == pytest.approx(0.264241, abs=1e-5)  # (e - 2) / e
    two = ((math.exp(1) - 2) + (math.exp(-1) - 0)) / 2 / math.e
    assert value_loss_at(0.0, [1.0, -1.0])[0] == pytest.approx(two, abs=1e-5)
    far_below = (math.exp(-5) + 5 - 1) * math.e  # by e^-1, not by e^-5
    assert value_loss_at(0.0, [-5.0])[0] == pytest.approx(far_below, rel=1e-5)


@pytest.mark.equation(1, 2)
def test_a_z_beyond_the_largest_counts_as_the_largest_and_has_no_gradient():
    wanted = (math.exp(7) - 7 - 1) / math.exp(7)
    assert value_loss_at(0.0, [9.0]) == pytest.approx((wanted, 0.0), abs=1e-6)
    assert value_loss_at(0.0, [9.0], max_z=10.0)[1] == pytest.approx(math.exp(-9) - 1, abs=1e-6)
    assert value_loss_at(0.0, [-9.0])[1] == pytest.approx((1 - math.exp(-9)) * math.e, rel=1e-5)


@pytest.mark.equation(2)
def test_a_huge_z_does_not_overflow():
    loss, slope = value_loss_at(0.0, [500.0, 0.0], beta=1.0, max_z=1000.0)
    assert (loss, slope) == pytest.approx((0.5, -0.5))


@pytest.mark.equation(1, 2)
@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_value_that_minimises_the_loss_is_the_soft_maximum(beta):
    """Over {0, beta ln 3} that is beta ln(mean e^(q / beta)) = beta ln 2; the mean of the two lies below."""
    q, minimiser = [0.0, beta * math.log(3)], beta * math.log(2)
    slopes_around = [value_loss_at(minimiser + shift, q, beta)[1] for shift in (-0.1, 0.0, 0.1)]
    assert slopes_around[1] == pytest.approx(0, abs=1e-5)
    assert slopes_around[0] < -1e-3 < 1e-3 < slopes_around[2]


@pytest.mark.equation(1, 2)
def test_a_large_beta_gives_the_mean_and_a_small_one_the_maximum():
    """As the loss tends to z^2 / 2 and, over {0, 1}, V to 1/2; or V to 1 - beta ln 2."""
    assert value_loss_at(0.5, [0.0, 1.0], beta=1000.0)[1] * 1000**2 == pytest.approx(0, abs=0.6)
    assert value_loss_at(0.6, [0.0, 1.0], beta=1000.0)[1] > 0 > value_loss_at(0.4, [0.0, 1.0], beta=1000.0)[1]
    small = 1 - 0.01 * math.log(2)
    assert value_loss_at(small, [0.0, 1.0], beta=0.01, max_z=1000.0)[1] == pytest.approx(0, abs=1e-3)


def test_a_step_of_the_value_asks_for_the_datas_actions_alone(batch):
    """No noise on them, none drawn beside them, and once in an update: the authors' options are not here."""
    learner, asked, steps = make(), [], []
    answer = learner.target_critic.forward
    learner.target_critic.forward = lambda *inputs: (asked.append(inputs[1]), answer(*inputs))[1]
    learner.value_optimizer.register_step_post_hook(lambda *_: steps.append(1))
    learner.update(batch)
    assert [actions.equal(batch["actions"]) for actions in asked] == [True]  # of (1) and (3) both
    assert len(steps) == 1


def xql_target(learner, rows, discount: float) -> np.ndarray:
    """y = r + gamma (1 - d) V(s')."""
    return bellman(rows, discount, values(weights(learner.value), rows["next_observations"]))


@pytest.mark.equation(5)
@pytest.mark.parametrize("discount", [0.99, 0.5])
def test_critic_loss(batch, rows, discount):
    learner = make(discount=discount)
    target = xql_target(learner, rows, discount)
    others = [learner.actor, learner.value, learner.target_critic]
    loss, metrics = learner.critic_loss(batch)
    oracle = partial(huber_errors, rows=rows, target=target)
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    q1, q2 = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx((q1.mean() + q2.mean()) / 2, rel=1e-5)


@pytest.mark.equation(5)
def test_target_of_a_terminated_transition_is_its_reward(batch, rows):
    batch["terminations"] = torch.ones(3)
    for discount in (0.5, 0.99):
        learner = make(discount=discount)
        oracle = huber_errors(weights(learner.critic), rows, rows["rewards"])
        assert_close(learner.critic_loss(batch)[0].item(), oracle)


@pytest.mark.equation(5)
@pytest.mark.parametrize(
    ("x", "loss", "slope"), [(5.0, 12.5, 5.0), (-5.0, 12.5, -5.0), (30.0, 400.0, 20.0), (-30.0, 400.0, -20.0)]
)
def test_critic_loss_is_hubers_summed_over_the_two_critics(batch, x, loss, slope):
    learner = make()
    batch["rewards"], batch["terminations"] = torch.zeros(3), torch.ones(3)  # y = 0
    learner.critic = Constant([[x] * 3, [1.0] * 3])
    found = learner.critic_loss(batch)[0]
    assert found.item() == pytest.approx(loss + 0.5)
    gradient = torch.autograd.grad(found, learner.critic.answer)[0]
    assert gradient.sum(1).tolist() == pytest.approx([slope, 1.0])


@pytest.mark.equation(3, 4)
@pytest.mark.parametrize("temperature", [3.0, 0.5])
def test_actor_loss(batch, rows, temperature):
    """Here beta, the value's own temperature, has no part."""
    learner = make(inverse_temperature=temperature, beta=0.1)
    weight = np.minimum(np.exp(temperature * td_errors(learner, rows)), 100)
    others = [learner.critic, learner.value, learner.target_critic]

    def oracle(layers):
        return -np.mean(weight * log_density(layers, rows["observations"], rows["actions"]))

    loss, metrics = learner.actor_loss(batch, learner.target_q(batch))
    assert_loss_and_gradient(loss, learner.actor, oracle, others)
    assert metrics["actor/weight"].item() == pytest.approx(weight.mean(), rel=1e-4)


@pytest.mark.equation(3, 4)
@pytest.mark.parametrize(
    ("advantage", "temperature", "weight"),
    [
        (0.0, 3.0, 1.0),
        (1.0, 3.0, math.exp(3)),
        (-1.0, 3.0, math.exp(-3)),
        (1.5, 3.0, math.exp(4.5)),  # just below the cap, which is reached at log(100) / 3 = 1.535
        (1.6, 3.0, 100.0),
        (5.0, 3.0, 100.0),
        (500.0, 10.0, 100.0),  # exp overflows
        (5.0, 0.0, 1.0),  # imitation
    ],
)
def test_weight_of_an_advantage(batch, advantage, temperature, weight):
    learner = make(inverse_temperature=temperature)
    learner.value = Constant([[2.0]] * 3)
    learner.target_critic = Constant([[2.0 + advantage] * 3, [9999.0] * 3])
    log_prob = learner.actor.log_prob(batch["observations"], batch["actions"]).mean().item()
    loss, metrics = learner.actor_loss(batch, learner.target_q(batch))
    assert loss.item() == pytest.approx(-weight * log_prob, rel=1e-4)
    assert metrics["actor/weight"].item() == pytest.approx(weight, rel=1e-4)


@pytest.mark.parametrize(
    ("weights_of", "effective", "capped"),
    [
        ([2.0, 2.0, 2.0], 1.0, 0.0),
        ([1.0, 2.0, 3.0], 36 / (3 * 14), 0.0),
        ([1e-9, 50.0, 1e-9], 1 / 3, 0.0),  # one row has all the say
        ([100.0, 100.0, 1e-9], 2 / 3, 2 / 3),
        ([1e4, 1e9, 200.0], 1.0, 1.0),  # all are cut at 100
        ([1e-40, 1e-42, 1e-41], 0.0, 0.0),  # too small for their squares: no NaN, which would end the run
    ],
)
def test_shares_of_the_weights(batch, weights_of, effective, capped):
    """Effective: (sum w)^2 / (n sum w^2); capped: those at 100."""
    learner = make(inverse_temperature=2.0)
    learner.value = Constant([[0.0]] * 3)
    learner.target_critic = Constant([[math.log(weight) / 2 for weight in weights_of], [9999.0] * 3])
    metrics = learner.actor_loss(batch, learner.target_q(batch))[1]
    assert metrics["actor/effective_share"].item() == pytest.approx(effective, abs=1e-4)
    assert metrics["actor/capped_share"].item() == pytest.approx(capped)


@pytest.mark.equation(4)
def test_log_prob_is_the_normal_density(batch, rows):
    actor = make().actor
    oracle = log_density(weights(actor), rows["observations"], rows["actions"])
    assert_close(actor.log_prob(batch["observations"], batch["actions"]).detach().numpy(), oracle)


@pytest.mark.equation(1, 2, 3, 4, 5, 6)
def test_updates_value_then_actor_then_critic_then_target(batch, rows):
    """Each step's gradient is that of its loss with the networks as the steps before it left them."""
    fields = {"beta": 1.5, "inverse_temperature": 3.0, "discount": 0.99, "tau": 0.005}
    learner = make(**fields, value_lr=0.1, actor_lr=0.1, critic_lr=0.1)
    value, actor, critic, target = (
        weights(getattr(learner, name)) for name in ("value", "actor", "critic", "target_critic")
    )
    q = np.minimum(*q_values(target, rows["observations"], rows["actions"]))
    learner.update(batch)
    new_value, new_critic = weights(learner.value), weights(learner.critic)

    shift = max(((q - values(value, rows["observations"])) / 1.5).max(), -1)

    def value_oracle(layers):
        return gumbel_loss(q, values(layers, rows["observations"]), 1.5, 7.0, shift)

    def actor_oracle(v):
        weight = np.minimum(np.exp(3 * (q - values(v, rows["observations"]))), 100)
        return lambda layers: -np.mean(weight * log_density(layers, rows["observations"], rows["actions"]))

    def critic_oracle(v):
        y = bellman(rows, 0.99, values(v, rows["next_observations"]))
        return lambda layers: huber_errors(layers, rows, y)

    assert_close(gradients(learner.value), slopes(value_oracle, value), 1e-4)
    assert_close(gradients(learner.actor), slopes(actor_oracle(new_value), actor), 1e-4)
    assert_close(gradients(learner.critic), slopes(critic_oracle(new_value), critic), 1e-4)
    mixed = [0.995 * old + 0.005 * new for old, new in zip(target, new_critic)]
    assert_close(weights(learner.target_critic), mixed, 1e-6)
    # The old V would show:
    for oracle, start in ((actor_oracle, actor), (critic_oracle, critic)):
        pairs = zip(slopes(oracle(value), start), slopes(oracle(new_value), start))
        assert max(np.abs(old - new).max() for old, new in pairs) > 1e-2


def test_actor_learning_rate_falls_along_a_cosine(batch):
    learner, used = make(updates=10, actor_lr=0.01, value_lr=0.02, critic_lr=0.03), []
    for _ in range(10):
        used.append(learner.actor_optimizer.param_groups[0]["lr"])
        learner.update(batch)
    assert used == pytest.approx([0.01 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)])
    assert learner.actor_optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert learner.value_optimizer.param_groups[0]["lr"] == 0.02
    assert learner.critic_optimizer.param_groups[0]["lr"] == 0.03
    actor = snapshot(learner.actor)
    learner.actor_optimizer.param_groups[0]["lr"] = 0.0
    learner.update(batch)
    assert same(learner.actor, actor)  # the rate above is the one that the actor steps with


def test_drops_units_in_training_only(batch, rows):
    learner = make(dropout=0.5)
    losses = [learner.actor_loss(batch, learner.target_q(batch))[0].item() for _ in range(8)]
    assert len({*losses}) > 1
    layers = weights(learner.actor)[1:]
    for _ in range(2):
        assert_close(learner.act(rows["observations"]), policy(layers, rows["observations"]))
    assert learner.actor.training
    without = make(dropout=0.0)
    losses = [without.actor_loss(batch, without.target_q(batch))[0].item() for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("network", ["value", "actor", "critic"])
def test_an_optimiser_moves_its_own_network_only(batch, network):
    """With the other learning rates at zero (and the target's too) nothing else moves in two updates."""
    rates = {f"{name}_lr": 0.01 * (name == network) for name in ("value", "actor", "critic")}
    assert moved(make(tau=0.0, **rates), batch, 2) == [network]


@pytest.mark.equation(6)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    assert_compiled_is_eager(xql, [make(tau=0.1), make(tau=0.1)], batch)


@pytest.mark.equation(5)
def test_a_truncation_bootstraps_from_its_last_observation(minari_root):
    """Three transitions: one terminated, two of an episode that a time limit cuts."""
    learner = make(discount=0.9)
    episodes = read(xql, "test/xql/endings-v0", endings())
    data = xql.transitions(episodes, xql.fit_scaler(episodes, ACTIONS, False))
    ahead = values(weights(learner.value), np.array([[0.4, -0.5, 0.6], [1.3, 1.4, -1.5], [-1.6, 1.7, 1.8]]))
    assert np.abs(ahead[1:]).min() > 0.1
    rows = {key: column.numpy().astype(np.float64) for key, column in data.items()}
    oracle = huber_errors(weights(learner.critic), rows, np.array([1.0, 2.0, 4.0]) + 0.9 * ahead * [0, 1, 1])
    assert_close(learner.critic_loss(data)[0].item(), oracle)


@pytest.mark.parametrize("hidden_layers", [1, 3])
def test_value_normalises_before_each_relu(batch, rows, hidden_layers):
    value = make(hidden_layers=hidden_layers).value
    assert len(weights(value)) == 4 * hidden_layers + 2
    v = value(batch["observations"]).squeeze(-1).detach().numpy()
    assert_close(v, values(weights(value), rows["observations"]), 1e-4)


def test_acts_by_the_mean_in_the_environments_units(rows):
    learner = make()
    assert_acts(learner, rows, lambda observations: policy(weights(learner.actor)[1:], observations))


def test_first_weights_are_not_the_authors():
    """Theirs are orthogonal, with biases of 0, and their LayerNorm adds 1e-6 to the variance."""
    torch.manual_seed(0)
    learner = new_learner(xql, xql.Config(hidden_dim=64), OBS, ACT)
    for network in (learner.actor, learner.value):
        linears = [part for part in network.modules() if isinstance(part, torch.nn.Linear)]
        assert 0.9 / 8 < linears[-1].weight.abs().max() <= 1 / 8  # 64 ** -0.5
        assert all(layer.bias.std() > 0.01 for layer in linears[:-1])
    assert 0.9 / 8 < learner.critic.layers[-1].weight.abs().max() <= 1 / 8
    norms = [part for part in learner.value.modules() if isinstance(part, torch.nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-5, 1e-5]


@pytest.mark.parametrize(
    ("dataset", "beta", "max_z", "batch_size"),
    [
        ("mujoco/halfcheetah/medium-v0", 1.0, 7.0, 1024),
        ("mujoco/hopper/medium-v0", 5.0, 7.0, 1024),
        ("mujoco/walker2d/medium-v0", 10.0, 7.0, 1024),
        ("D4RL/pen/human-v2", 8.0, 5.0, 1024),  # offline/README.md
        ("D4RL/pen/cloned-v2", 5.0, 7.0, 256),  # androit_consistent.sh
        ("D4RL/relocate/expert-v2", 5.0, 7.0, 256),
        ("D4RL/antmaze/umaze-v1", 2.0, 7.0, 256),
        ("D4RL/antmaze/umaze-diverse-v1", 5.0, 7.0, 256),
        ("D4RL/antmaze/medium-play-v1", 0.8, 5.0, 256),
        ("D4RL/antmaze/medium-diverse-v1", 0.6, 7.0, 256),
        ("D4RL/antmaze/large-play-v1", 0.6, 5.0, 1024),
        ("D4RL/antmaze/large-diverse-v1", 0.55, 5.0, 1024),
    ],
)
def test_sets_of_the_hub_are_learnt_with_the_authors_temperatures(dataset, beta, max_z, batch_size):
    """Those of their commands."""
    config = xql.Config(**yaml.safe_load((ROOT / f"configs/offline/xql/{dataset}.yaml").read_text()))
    assert (config.beta, config.max_z, config.batch_size) == (beta, max_z, batch_size)


def test_defaults_are_the_papers_for_locomotion():
    """Those of all its tasks alike; but for how rewards are scaled, which a config says."""
    config = xql.Config()
    wanted = {"updates": 1_000_000, "batch_size": 256, "hidden_dim": 256, "hidden_layers": 2}
    wanted |= {"actor_lr": 3e-4, "critic_lr": 3e-4, "value_lr": 3e-4, "discount": 0.99, "tau": 0.005}
    wanted |= {"beta": 2.0, "max_z": 7.0, "inverse_temperature": 3.0, "dropout": 0.0}
    wanted |= {"normalize_states": False}
    wanted |= {"normalize_rewards": False, "reward_scale": 1.0, "reward_shift": 0.0}
    assert {field: getattr(config, field) for field in wanted} == wanted
