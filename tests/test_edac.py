"""algorithms/offline/edac.py: SAC-N's losses and the term that EDAC adds, against NumPy calculations written
from the paper's equations; the written-out gradient against autograd; with weight 0 it is SAC-N bit for bit.
"""

import math

import numpy as np
import pytest
import torch
from conftest import load_script, new_learner
from oracles import (
    ACT,
    OBS,
    Constant,
    assert_close,
    assert_compiled_is_eager,
    assert_critic_bootstraps_from_truncations,
    assert_loss_and_gradient,
    fix_weights,
    networks,
    q_values,
    squashed,
    weights,
)
from runs import equal
from test_sac_n import (
    ALPHA,
    actor_oracle,
    assert_first_weights_are_torchs,
    assert_order_of_an_update,
    assert_papers_defaults,
    configs,
    draw,
    entropy_oracle,
    small,
    squared_errors,
    target_oracle,
)

edac, sac_n = load_script("offline/edac.py"), load_script("offline/sac_n.py")


def make(**fields):
    return small(edac, **fields)


# ------------------------------------- the term that EDAC adds -------------------------------------


def action_gradients(layers: list[np.ndarray], observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Central differences dQ_i/da [N, B, A]: exact but for rounding, as Q is linear near an action."""
    columns, step = [], 1e-4
    for entry in range(ACT):
        shift = step * np.eye(ACT)[entry]
        above, below = (q_values(layers, observations, actions + sign * shift) for sign in (1, -1))
        columns.append((above - below) / (2 * step))
    return np.stack(columns, axis=-1)


def similarity_oracle(layers, rows) -> float:
    """D of (6), pair by pair."""
    gradients = action_gradients(layers, rows["observations"], rows["actions"])
    directions = gradients / np.linalg.norm(gradients, axis=-1, keepdims=True)
    total, critics = 0.0, len(directions)
    for i in range(critics):
        for j in range(critics):
            if i != j:
                total += np.mean(np.sum(directions[i] * directions[j], axis=-1))
    return total / (critics - 1)


@pytest.mark.equation(6)
@pytest.mark.parametrize("critics", [2, 3, 4])
def test_similarity(batch, rows, critics):
    """Its value, and its gradient in every weight of the critics: the second order is kept."""
    learner = fix_weights(make(critics=critics), 13)
    gradients = action_gradients(weights(learner.critic), rows["observations"], rows["actions"])
    assert np.linalg.norm(gradients, axis=-1).min() > 0.05  # far from a direction that is none
    assert abs(similarity_oracle(weights(learner.critic), rows)) > 0.1

    def oracle(layers):
        return similarity_oracle(layers, rows)

    loss = learner.similarity(batch)
    layers = weights(learner.critic)
    assert_close(loss.item(), oracle(layers))
    options = {"allow_unused": True, "materialize_grads": True}  # biases do not count
    found = torch.autograd.grad(loss, [*learner.critic.parameters()], **options)
    assert_close([gradient.numpy() for gradient in found], slopes_of(oracle, layers), 1e-4)


def slopes_of(loss, layers: list[np.ndarray]) -> list[np.ndarray]:
    """Central differences, with a step that is large beside the rounding of those of `action_gradients`."""
    results = []
    for layer in layers:
        result = np.empty_like(layer)
        for index in np.ndindex(layer.shape):
            kept = layer[index]
            layer[index] = kept + 1e-5
            above = loss(layers)
            layer[index] = kept - 1e-5
            below = loss(layers)
            layer[index] = kept
            result[index] = (above - below) / 2e-5
        results.append(result)
    return results


@pytest.mark.equation(6)
@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
@pytest.mark.parametrize("critics", [1, 2, 5])
def test_the_written_out_gradient_is_autograds(batch, hidden_layers, critics):
    """Values, and second-order gradients, in networks of any depth."""
    learner = make(critics=critics, hidden_layers=hidden_layers, hidden_dim=16)
    ours = learner.action_gradients(batch["observations"], batch["actions"])
    actions = batch["actions"].requires_grad_()
    q = learner.critic(batch["observations"], actions)
    autograds = [torch.autograd.grad(own.sum(), actions, create_graph=True)[0] for own in q]  # a Q at a time
    assert ours.shape == (critics, 3, ACT)
    assert_close(ours.detach().numpy(), torch.stack(autograds).detach().numpy())

    coefficients = torch.tensor(np.random.default_rng(3).normal(size=ours.shape), dtype=torch.float32)
    found = []
    for gradients in (ours, torch.stack(autograds)):
        value = (coefficients * gradients.square()).sum()
        layers = [layer.weight for layer in learner.critic.layers]
        found.append([gradient.numpy() for gradient in torch.autograd.grad(value, layers)])
    assert all(np.abs(gradient).max() > 1e-3 for gradient in found[1])
    assert_close(found[0], found[1])


def linear(learner, directions: np.ndarray) -> None:
    """Makes every Q_i(s, a) = direction_i . a + a constant: all its units are active, and hand on."""
    with torch.no_grad():
        for layer in learner.critic.layers:
            layer.weight.zero_()
            layer.bias.zero_()
        first, last = learner.critic.layers[0], learner.critic.layers[-1]
        for entry in range(ACT):
            first.weight[:, OBS + entry, entry] = 1
            for layer in learner.critic.layers[1:-1]:
                layer.weight[:, entry, entry] = 1
        first.bias += 10
        last.weight[:, :ACT, 0] = torch.tensor(directions, dtype=torch.float32)


@pytest.mark.equation(6)
@pytest.mark.parametrize(
    ("directions", "wanted"),
    [
        ([[1, 0], [0, 1]], 0),
        ([[1, 0], [-1, 0]], -2),
        ([[1, 0], [5, 0]], 2),  # its length doesn't count
        ([[3, 4]] * 3, 3),
        ([[3, 4]] * 10, 10),
        ([[1, 0], [0, 2], [-3, 0]], -1),  # one pair of three, in both orders, over 2
        ([[1, 0], [0.6, 0.8]], 1.2),
        ([[2, 1]], 0),  # a single critic has no pair
        ([[0, 0], [1, 0], [1, 0]], 1),  # a gradient of 0 has no direction
    ],
)
def test_similarity_in_closed_form(batch, directions, wanted):
    learner = make(critics=len(directions))
    linear(learner, np.array(directions))
    assert_close(action_gradients(weights(learner.critic), np.zeros((1, OBS)), np.zeros((1, ACT)))[:, 0],
                 np.array(directions, float))  # fmt: skip
    loss = learner.similarity(batch)
    assert loss.item() == pytest.approx(wanted, abs=1e-5)
    found = torch.autograd.grad(loss, [layer.weight for layer in learner.critic.layers])
    assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.equation(6)
@pytest.mark.parametrize("critics", [3, 10])
def test_similarity_of_identical_critics_is_their_number(batch, critics):
    learner = make(critics=critics)
    for weight in learner.critic.parameters():
        weight.data[:] = weight.data[:1].clone()
    metrics = learner.critic_loss(batch)[1]
    assert metrics["critic/similarity"].item() == pytest.approx(critics, rel=1e-5)
    assert metrics["critic/q_std"].item() == pytest.approx(0, abs=1e-6)


def test_descending_it_turns_the_gradients_apart(batch):
    """Four directions can't be further apart than at a mean of -4 / 3, where they cancel."""
    torch.manual_seed(0)
    learner = new_learner(edac, edac.Config(hidden_dim=32, critics=4, eta=1000.0, critic_lr=1e-3), OBS, ACT)
    first = learner.similarity(batch).item()
    for _ in range(100):
        learner.update(batch)
    last = learner.similarity(batch).item()
    assert -4 / 3 - 1e-5 < last < -1.15
    assert last < first - 0.5


# ------------------------------------------------ losses ------------------------------------------------


@pytest.mark.equation(1, 2)
def test_temperature_and_actor_loss(batch, rows):
    learner = make()
    noise = draw(6)
    loss, _ = learner.temperature_loss(batch)
    assert_close(loss.item(), math.log(ALPHA) * (entropy_oracle(learner, rows, noise) + ACT))
    draw(6)
    loss, _ = learner.actor_loss(batch)
    others = [learner.target_critic, learner.temperature]
    assert_loss_and_gradient(loss, learner.actor, actor_oracle(learner, rows, noise), others)


@pytest.mark.equation(3, 4, 6)
@pytest.mark.parametrize("eta", [0.0, 1.0, 7.0])
def test_critic_loss(batch, rows, eta):
    learner = make(discount=0.9, eta=eta)
    noise = draw(7)
    target = target_oracle(learner, rows, noise)
    draw(7)
    loss, metrics = learner.critic_loss(batch)

    def oracle(layers):
        return np.sum(squared_errors(layers, rows, target)) + eta * similarity_oracle(layers, rows)

    layers = weights(learner.critic)
    assert_close(loss.item(), oracle(layers))
    found = torch.autograd.grad(loss, [*learner.critic.parameters()], retain_graph=True)
    assert_close([gradient.numpy() for gradient in found], slopes_of(oracle, layers), 1e-3)
    for other in (learner.actor, learner.target_critic, learner.temperature):
        leaked = torch.autograd.grad(loss, [*other.parameters()], retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in leaked)
    assert metrics["critic/similarity"].item() == pytest.approx(similarity_oracle(layers, rows), rel=1e-4)
    q = q_values(layers, rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(q.mean(), rel=1e-5)


@pytest.mark.equation(3, 4)
def test_target_in_closed_form(batch):
    """1 + .99 (5 + .2 * 1) = 6.148; every Q is 0 here, and the similarity is left out."""
    learner = make(eta=0.0)
    learner.temperature.log.data.fill_(math.log(0.2))
    learner.actor.sample = lambda observations: (torch.zeros(3, ACT), torch.full((3,), -1.0))
    learner.target_critic = Constant([[7.0] * 3, [9.0] * 3, [5.0] * 3])
    for weight in learner.critic.parameters():
        weight.data.zero_()
    batch |= {"rewards": torch.ones(3), "terminations": torch.zeros(3)}
    assert learner.critic_loss(batch)[0].item() == pytest.approx(3 * 6.148**2, rel=1e-6)


# ------------------------------------------------ updates ------------------------------------------------


def test_without_weight_it_is_sac_n_bit_for_bit(batch):
    """Weights, targets, optimisers and metrics, after ten updates."""
    learners, histories = [make(eta=0.0), small(sac_n)], []
    for learner in learners:
        torch.manual_seed(1)
        metrics = [learner.update(batch) for _ in range(10)]
        histories.append([{key: row[key] for key in row if key != "critic/similarity"} for row in metrics])
    assert equal(*histories)
    for name in networks(learners[0]):
        assert equal(*(getattr(learner, name).state_dict() for learner in learners)), name
        if not name.startswith("target"):
            states = [getattr(learner, f"{name}_optimizer").state_dict() for learner in learners]
            assert equal(*states), name


def assert_gradients_lie_as_their_weights(learner) -> None:
    """In memory: torch's fused Adam goes through both side by side, and is silently wrong if they don't."""
    for name in ("actor", "critic"):
        for weight in getattr(learner, name).parameters():
            assert weight.is_contiguous()
            assert weight.grad.is_contiguous()


def test_gradients_lie_as_their_weights(batch):
    learner = make()
    learner.update(batch)
    assert_gradients_lie_as_their_weights(learner)


def test_with_weight_it_is_not(batch):
    learners = [make(eta=1.0), small(sac_n)]
    for learner in learners:
        torch.manual_seed(1)
        learner.update(batch)
    assert not equal(*(learner.critic.state_dict() for learner in learners))


def test_a_single_critic_stays_finite(batch):
    learner = make(critics=1)
    for _ in range(3):
        metrics = learner.update(batch)
    assert metrics["critic/similarity"].item() == 0
    assert all(value.isfinite() for value in metrics.values())


def test_order_of_an_update(batch):
    assert_order_of_an_update(make(tau=0.1), batch)


@pytest.mark.equation(5)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    twins = [make(tau=0.1), make(tau=0.1)]
    assert_compiled_is_eager(edac, twins, batch)
    for learner in twins:
        assert_gradients_lie_as_their_weights(learner)


def test_a_truncation_bootstraps_from_its_last_observation(minari_root, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    learner = make(critics=2, eta=0.0, discount=0.9)

    def next_values(observations):
        actions, density = squashed(weights(learner.actor), observations, np.zeros((3, ACT)))
        q = q_values(weights(learner.target_critic), observations, actions)
        return np.min(q, axis=0) - ALPHA * np.log(density)

    assert_critic_bootstraps_from_truncations(edac, learner, next_values)


# ---------------------------------------- settings ----------------------------------------


def test_first_weights_are_torchs():
    assert_first_weights_are_torchs(edac)


def test_defaults_are_the_papers():
    assert_papers_defaults(edac.Config(), updates=3_000_000, batch_size=256, critics=10, eta=1.0)


def test_configs_have_the_published_settings():
    """N and eta: the paper's in locomotion and on the hands (with rewards as they are), CORL's in the mazes.

    Minari's simple data take what D4RL's medium data have. Reef's own sets have the paper's eta, with 10
    critics.
    """
    others = {"halfcheetah/medium-expert": 5, "halfcheetah/random": 0, "hopper/random": 0}
    others |= {f"walker2d/{level}": 5 for level in ("expert", "expert-narrow", "medium-expert")}
    hands = {"human-v2": (20, 1000.0), "cloned-v2": (20, 10.0), "expert-v2": (20, 10.0)}
    for dataset, config in configs(edac).items():
        source, domain, level = dataset.split("/")
        critics, eta, actor_lr, updates = 10, 1.0, 3e-4, 3_000_000
        if source == "reef":
            updates = 50_000
        if domain == "pointmaze":
            eta = 0.1
        elif source == "mujoco":
            critics = 50 if domain == "hopper" else 10
        elif source == "D4RL":
            critics, eta = hands[level] if domain == "pen" else (50, 200.0)
            actor_lr, updates = 3e-5, 200_000
        eta = others.get(f"{domain}/{level[:-3]}", eta)  # without -v0 or -v1
        found = config.critics, config.eta, config.actor_lr, config.updates
        assert found == (critics, eta, actor_lr, updates), dataset
        assert (config.reward_scale, config.reward_shift, config.normalize_rewards) == (1, 0, False), dataset
