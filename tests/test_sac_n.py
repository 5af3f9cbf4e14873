"""algorithms/offline/sac_n.py: every loss term against NumPy calculations written from the paper's equations,
numbers in closed form, the order of an update, and what the docstring says of memory.
"""

import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, load_script, new_learner
from oracles import (
    ACT,
    OBS,
    Constant,
    assert_acts,
    assert_close,
    assert_compiled_is_eager,
    assert_critic_bootstraps_from_truncations,
    assert_loss_and_gradient,
    bellman,
    fix_weights,
    gradients,
    moved,
    policy,
    q_values,
    slopes,
    snapshot,
    squashed,
    weights,
)

ALPHA = 0.3
sac_n = load_script("offline/sac_n.py")


def small(script, **fields):
    """A learner with small networks of fixed weights; the target's differ from the critic's. alpha is 0.3."""
    fields = {"hidden_dim": 4, "hidden_layers": 2, "critics": 3, **fields}
    learner = fix_weights(new_learner(script, script.Config(**fields), OBS, ACT), 89)
    learner.temperature.log.data.fill_(math.log(ALPHA))
    return learner


def make(**fields):
    return small(sac_n, **fields)


def draw(seed: int) -> np.ndarray:
    """The standard normal noise [B, A] that an actor's sample draws first; torch is seeded for it."""
    torch.manual_seed(seed)
    noise = torch.randn(3, ACT).numpy().astype(np.float64)
    torch.manual_seed(seed)
    return noise


# ------------------------------------------------ losses ------------------------------------------------


def entropy_oracle(learner, rows, noise: np.ndarray) -> float:
    """H of (1) in a batch whose actions are made of this noise."""
    _, density = squashed(weights(learner.actor), rows["observations"], noise)
    return float(-np.mean(np.log(density)))


def actor_oracle(learner, rows, noise: np.ndarray):
    """(2) as a function of the actor's layers, with the critics and the temperature as they are now."""
    critic, alpha = weights(learner.critic), math.exp(learner.temperature.log.item())

    def oracle(layers):
        actions, density = squashed(layers, rows["observations"], noise)
        least = np.min(q_values(critic, rows["observations"], actions), axis=0)
        return np.mean(alpha * np.log(density) - least)

    return oracle


def target_oracle(learner, rows, noise: np.ndarray) -> np.ndarray:
    """y of (3) [B]."""
    alpha = math.exp(learner.temperature.log.item())
    actions, density = squashed(weights(learner.actor), rows["next_observations"], noise)
    q = q_values(weights(learner.target_critic), rows["next_observations"], actions)
    return bellman(rows, learner.config.discount, np.min(q, axis=0) - alpha * np.log(density))


def squared_errors(layers, rows, target: np.ndarray) -> np.ndarray:
    """Mean squared error over the batch of every critic [N]."""
    return np.mean((q_values(layers, rows["observations"], rows["actions"]) - target) ** 2, axis=1)


@pytest.mark.equation(1)
def test_temperature_loss(batch, rows):
    learner = make()
    noise = draw(4)
    surplus = entropy_oracle(learner, rows, noise) + ACT
    assert abs(surplus) > 0.1
    loss, metrics = learner.temperature_loss(batch)
    assert_close(loss.item(), math.log(ALPHA) * surplus)
    assert_close(torch.autograd.grad(loss, learner.temperature.log, retain_graph=True)[0].item(), surplus)
    for other in (learner.actor, learner.critic, learner.target_critic):
        found = torch.autograd.grad(loss, [*other.parameters()], retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in found)
    assert metrics["actor/entropy"].item() == pytest.approx(surplus - ACT, rel=1e-5)


@pytest.mark.equation(1)
@pytest.mark.parametrize(("log_prob", "sign"), [(ACT, 0), (ACT - 0.5, -1), (ACT + 0.5, 1), (-3.0, -1)])
def test_the_temperature_stays_where_log_pi_is_the_number_of_action_entries(batch, log_prob, sign):
    """Too much entropy makes it cheaper, too little dearer."""
    learner = make()
    sample = learner.actor.sample
    learner.actor.sample = lambda observations: (sample(observations)[0], torch.full((3,), float(log_prob)))
    loss, _ = learner.temperature_loss(batch)
    assert loss.item() == pytest.approx(math.log(ALPHA) * (ACT - log_prob))
    sac_n.descend(learner.temperature_optimizer, loss)
    assert np.sign(learner.temperature().item() - torch.tensor(math.log(ALPHA)).exp().item()) == sign


@pytest.mark.equation(2)
@pytest.mark.parametrize("critics", [1, 2, 3])
def test_actor_loss(batch, rows, critics):
    """The least of all N critics counts; two of them are the critics of SAC."""
    learner = make(critics=critics)
    noise = draw(6)
    actions, _ = squashed(weights(learner.actor), rows["observations"], noise)
    q = q_values(weights(learner.critic), rows["observations"], actions)
    assert len({*q.argmin(axis=0)}) >= min(critics, 2)  # not the same one is the least in every row
    draw(6)
    loss, metrics = learner.actor_loss(batch)
    others = [learner.target_critic, learner.temperature]
    assert_loss_and_gradient(loss, learner.actor, actor_oracle(learner, rows, noise), others)
    assert metrics["actor/temperature"].item() == pytest.approx(ALPHA)


@pytest.mark.equation(2)
@pytest.mark.parametrize("values", [*permutations([5.0, 7.0, 9.0])])
def test_actor_loss_in_closed_form(batch, values):
    """.3 * 2 - 5, wherever the least of the critics stands."""
    learner = make()
    learner.actor.sample = lambda observations: (torch.zeros(3, ACT), torch.full((3,), 2.0))
    learner.critic = Constant([[value] * 3 for value in values])
    assert learner.actor_loss(batch)[0].item() == pytest.approx(-4.4)


@pytest.mark.equation(3, 4)
@pytest.mark.parametrize("critics", [1, 2, 3])
def test_critic_loss(batch, rows, critics):
    """The soft target, which neither a termination nor a gradient passes; two critics are those of SAC."""
    learner = make(critics=critics, discount=0.9)
    noise = draw(7)
    actions, _ = squashed(weights(learner.actor), rows["next_observations"], noise)
    q = q_values(weights(learner.target_critic), rows["next_observations"], actions)
    assert len({*q.argmin(axis=0)[[0, 2]]}) == min(critics, 2)  # another in each row that goes on
    target = target_oracle(learner, rows, noise)
    draw(7)
    loss, metrics = learner.critic_loss(batch)
    others = [learner.actor, learner.target_critic, learner.temperature]
    oracle = lambda layers: np.sum(squared_errors(layers, rows, target))  # noqa: E731
    assert_loss_and_gradient(loss, learner.critic, oracle, others)
    q = q_values(weights(learner.critic), rows["observations"], rows["actions"])
    assert metrics["critic/q_mean"].item() == pytest.approx(q.mean(), rel=1e-5)
    assert metrics["critic/q_std"].item() == pytest.approx(np.sqrt(np.var(q, axis=0)).mean(), abs=1e-5)


@pytest.mark.equation(3, 4)
@pytest.mark.parametrize("values", [*permutations([5.0, 7.0, 9.0])])
def test_target_in_closed_form(batch, values):
    """1 + .99 (5 + .2 * 1) = 6.148, wherever the least of the targets stands; every Q is 0 here."""
    learner = make()
    learner.temperature.log.data.fill_(math.log(0.2))
    learner.actor.sample = lambda observations: (torch.zeros(3, ACT), torch.full((3,), -1.0))
    learner.target_critic = Constant([[value] * 3 for value in values])
    learner.critic = Constant([[0.0] * 3] * 3)
    batch |= {"rewards": torch.ones(3), "terminations": torch.zeros(3)}
    assert learner.critic_loss(batch)[0].item() == pytest.approx(3 * 6.148**2, rel=1e-6)
    batch["terminations"] = torch.ones(3)
    assert learner.critic_loss(batch)[0].item() == pytest.approx(3)


@pytest.mark.equation(4)
@pytest.mark.parametrize("critics", [1, 4, 10])
def test_errors_are_summed_over_the_critics(batch, critics):
    """N critics, each at an error of 1: N."""
    learner = make(critics=critics)
    batch["rewards"], batch["terminations"] = torch.zeros(3), torch.ones(3)  # y = 0
    learner.critic = Constant([[1.0, -1.0, 1.0]] * critics)
    assert learner.critic_loss(batch)[0].item() == critics


def test_the_deviation_is_that_of_the_critics_not_of_the_rows(batch):
    """Critics at 1, 2 and 6 deviate by sqrt(14 / 3) in every row; a single one doesn't."""
    learner = make()
    learner.critic = Constant([[1.0, 11.0, 101.0], [2.0, 12.0, 102.0], [6.0, 16.0, 106.0]])
    deviation = learner.critic_loss(batch)[1]["critic/q_std"].item()
    assert deviation == pytest.approx(math.sqrt(14 / 3), rel=1e-5)
    assert make(critics=1).critic_loss(batch)[1]["critic/q_std"].item() == 0


def test_the_critics_are_compared_at_the_policys_actions_too(batch):
    """On the data's own they must agree: what the minimum of (2) can do is seen where the policy goes."""
    learner = make()
    spread = Constant([[1.0, 11.0, 101.0], [2.0, 12.0, 102.0], [6.0, 16.0, 106.0]])
    learner.critic = lambda observations, actions: (
        torch.zeros(3, 3) if actions is batch["actions"] else spread(observations, actions)
    )
    assert learner.critic_loss(batch)[1]["critic/q_std"].item() == 0
    assert learner.actor_loss(batch)[1]["actor/q_std"].item() == pytest.approx(math.sqrt(14 / 3), rel=1e-5)


def test_two_critics_are_sac(batch):
    """The losses are those of algorithms/collect/sac.py, bit for bit."""
    sac = load_script("collect/sac.py")
    ours = make(critics=2)
    theirs = new_learner(sac, sac.Config(hidden_dim=4, hidden_layers=2), OBS, ACT)
    for name in ("actor", "critic", "target_critic", "temperature"):
        getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
    for name in ("actor_loss", "critic_loss"):
        found = []
        for learner in (ours, theirs):
            torch.manual_seed(8)
            found.append(getattr(learner, name)(batch)[0].item())
        assert found[0] == found[1]


# ------------------------------------------------ updates ------------------------------------------------


def assert_order_of_an_update(learner, batch) -> None:
    """Temperature, actor, critics, target: each step sees what those before it have made."""
    seen, names = {}, ("temperature", "actor", "critic", "target_critic")

    def watch(loss_name: str) -> None:
        loss = getattr(learner, f"{loss_name}_loss")

        def watched(rows):
            seen[loss_name] = {name: snapshot(getattr(learner, name)) for name in names}
            return loss(rows)

        setattr(learner, f"{loss_name}_loss", watched)

    for name in names[:3]:
        watch(name)
    start = {name: snapshot(getattr(learner, name)) for name in names}
    learner.update(batch)
    end = {name: snapshot(getattr(learner, name)) for name in names}
    assert [*seen] == ["temperature", "actor", "critic"]
    for number, loss_name in enumerate(seen):
        for position, name in enumerate(names):
            wanted = end[name] if position < number else start[name]
            assert all(map(torch.equal, seen[loss_name][name], wanted)), (loss_name, name)
    for name in names:
        assert not all(map(torch.equal, start[name], end[name])), name


def test_order_of_an_update(batch):
    assert_order_of_an_update(make(tau=0.1), batch)


@pytest.mark.equation(1, 2)
def test_the_actor_descends_its_loss_at_the_new_temperature(batch, rows):
    """The critics are those before their own step."""
    learner = make(actor_lr=0.1, critic_lr=0.1)
    torch.manual_seed(9)
    noises = [torch.randn(3, ACT).numpy().astype(np.float64) for _ in range(2)]
    surplus = entropy_oracle(learner, rows, noises[0]) + ACT
    twin = make()  # Adam's first step is the step size, against the sign of the gradient
    twin.temperature.log.data.fill_(math.log(ALPHA) - 0.1 * np.sign(surplus))
    wanted = slopes(actor_oracle(twin, rows, noises[1]), weights(learner.actor))
    torch.manual_seed(9)
    learner.update(batch)
    assert_close(learner.temperature.log.item(), twin.temperature.log.item())
    assert_close(gradients(learner.actor), wanted, 1e-4)


@pytest.mark.parametrize(("network", "others"), [("critic", []), ("actor", ["temperature"])])
def test_an_optimiser_moves_its_own_network_only(batch, network, others):
    """The temperature goes at the actor's rate."""
    rates = {f"{name}_lr": 0.01 * (name == network) for name in ("critic", "actor")}
    assert sorted(moved(make(tau=0.0, **rates), batch, 2)) == sorted([network, *others])


@pytest.mark.equation(5)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    assert_compiled_is_eager(sac_n, [make(tau=0.1), make(tau=0.1)], batch)


def test_a_truncation_bootstraps_from_its_last_observation(minari_root, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    learner = make(critics=2, discount=0.9)

    def next_values(observations):
        actions, density = squashed(weights(learner.actor), observations, np.zeros((3, ACT)))
        q = q_values(weights(learner.target_critic), observations, actions)
        return np.min(q, axis=0) - ALPHA * np.log(density)

    assert_critic_bootstraps_from_truncations(sac_n, learner, next_values)


def test_the_mean_acts(rows):
    learner = make()
    assert_acts(learner, rows, lambda observations: policy(weights(learner.actor), observations)[:, :ACT])


# -------------------------------- what the docstring says, settings --------------------------------


def assert_first_weights_are_torchs(script) -> None:
    """And not its authors': biases of 0.1 in hidden layers, last layers within 1e-3 (actor) or 3e-3."""
    torch.manual_seed(0)
    learner = new_learner(script, script.Config(), OBS, ACT)
    for last in (learner.actor.net[-1], learner.critic.layers[-1]):
        assert 0.9 * 256**-0.5 < last.weight.abs().max() < 256**-0.5
    for first in (learner.actor.net[0].bias, learner.critic.layers[1].bias):
        assert first.std() > 0.03
    spread = learner.critic.layers[0].weight.std(0)  # every critic has its own
    assert spread.min() > 0.01


def test_first_weights_are_torchs():
    assert_first_weights_are_torchs(sac_n)


@pytest.mark.parametrize("critics", [1, 3])
def test_memory_is_what_the_docstring_says(critics):
    """20 bytes a weight, 135,681 of Hopper's weights to a critic; 1.36 GB and 0.13 GB for 500."""
    learner = new_learner(sac_n, sac_n.Config(critics=critics), 11, 3)
    batch = {"observations": torch.zeros(256, 11), "actions": torch.zeros(256, 3)}
    batch |= {"next_observations": torch.zeros(256, 11)}
    learner.update(batch | {"rewards": torch.zeros(256), "terminations": torch.zeros(256)})
    held = [*learner.critic.parameters(), *learner.target_critic.parameters()]
    held += [weight.grad for weight in learner.critic.parameters()]
    for state in learner.critic_optimizer.state.values():
        held += [state["exp_avg"], state["exp_avg_sq"]]
    assert sum(tensor.nbytes for tensor in held) == critics * 135_681 * 20
    assert round(500 * 135_681 * 20 / 1e9, 2) == 1.36
    assert round(500 * 256 * 256 * 4 / 1e9, 2) == 0.13
    for number in ("20 bytes", "135,681", "1.36 GB", "0.13 GB"):
        assert number in sac_n.__doc__


def configs(script) -> dict[str, object]:
    """{dataset: Config} of a script's folder under configs/offline, which has the files of its siblings."""
    name = Path(script.__file__).stem
    folder, sibling = ROOT / f"configs/offline/{name}", ROOT / "configs/offline/td3_bc"
    files = sorted(folder.rglob("*.yaml"))
    wanted = sorted(path.relative_to(sibling) for path in sibling.rglob("*.yaml"))
    assert [path.relative_to(folder) for path in files] == wanted
    found = [script.Config(**yaml.safe_load(path.read_text())) for path in files]
    return {config.dataset: config for config in found}


def assert_papers_defaults(config, **others) -> None:
    wanted = {"hidden_dim": 256, "hidden_layers": 3, "discount": 0.99, "tau": 0.005}
    wanted |= {"actor_lr": 3e-4, "critic_lr": 3e-4, "normalize_states": False, "normalize_rewards": False}
    wanted |= {"reward_scale": 1.0, "reward_shift": 0.0} | others
    assert {field: getattr(config, field) for field in wanted} == wanted


def test_defaults_are_the_papers():
    assert_papers_defaults(sac_n.Config(), updates=3_000_000, batch_size=256, critics=10)


def test_configs_have_the_published_numbers_of_critics():
    """Of the paper in locomotion, its steps on the hands (with rewards as they are), CORL's in the mazes.

    Minari's simple data take what D4RL's medium data have.
    """
    published = {"hopper": (500, 500), "halfcheetah": (10, 10), "walker2d": (20, 100)}
    for dataset, config in configs(sac_n).items():
        source, domain, level = dataset.split("/")
        critics, actor_lr, updates = 10, 3e-4, 3_000_000
        if source == "mujoco":
            critics = published[domain][level == "expert-v0"]
        elif source == "reef":
            updates = 50_000
        elif domain == "pointmaze":
            critics = 25
        else:
            critics, actor_lr, updates = 100, 3e-5, 200_000
        found = config.critics, config.actor_lr, config.updates
        assert found == (critics, actor_lr, updates), dataset
        assert (config.reward_scale, config.reward_shift, config.normalize_rewards) == (1, 0, False), dataset
