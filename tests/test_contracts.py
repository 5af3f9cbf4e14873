"""What every script's optimisers and first weights are, what it compiles, and what a termination does to
values."""

import inspect
import re

import pytest
import torch
from conftest import FINETUNE, OFFLINE, ROOT, learner_class, load_script, new_learner
from torch import nn

OBS, ACT = 3, 2


def fresh(script, **fields):
    """A new learner, large enough that the largest of a layer's weights is near its bound."""
    torch.manual_seed(0)
    sizes = {name: 64 for name in ("hidden_dim", "vae_hidden_dim") if hasattr(script.Config, name)}
    return new_learner(script, script.Config(**sizes, **fields), OBS, ACT)


def parts(learner, kind: type) -> dict:
    """What a learner holds of a kind, by name."""
    return {name: part for name, part in vars(learner).items() if isinstance(part, kind)}


ONLINE = [f"finetune/{name}" for name in FINETUNE]  # as the learners of these are named here
VALUES = [name for name in OFFLINE if hasattr(fresh(load_script(f"offline/{name}.py")), "critic")] + ONLINE


@pytest.fixture(scope="session")
def scripts(scripts) -> dict:
    return scripts | {name: load_script(f"{name}.py") for name in ONLINE}


def test_there_are_scripts_that_learn_values():
    assert {"awac", "bcq", "cql", "iql", "td3_bc"} <= {*VALUES}
    assert not {"bc", "dt"} & {*VALUES}


# ---------------------------------------------- optimisers ----------------------------------------------

# Whose step size an optimiser takes where the Config has none of its name; the Config's comments say so.
STEP_SIZES = {"temperature": "actor_lr", "multiplier": "critic_lr", "flow": "actor_lr"}
UNSCALED = {"lb_sac": {"batch_size": 256}}  # its step sizes are those of such a batch
DEFAULTS = {"weight_decay": 0, "betas": (0.9, 0.999), "eps": 1e-8}  # but where the Config has such a field
OTHERS = {"DiffusionPolicy": {"betas": (0.95, 0.999)}, "TrajectoryTransformer": {"betas": (0.9, 0.95)}}


def optimizer_faults(learner) -> list[str]:
    """Where an optimiser is not Adam as the Config has it, for the weights that it is named for."""
    config, faults = learner.config, []
    for name, optimizer in parts(learner, torch.optim.Optimizer).items():
        part = name.removesuffix("_optimizer")
        size = f"{part}_lr" if hasattr(config, f"{part}_lr") else STEP_SIZES[part]
        usual = DEFAULTS | OTHERS.get(type(learner).__name__, {})
        wanted = {key: getattr(config, key, value) for key, value in usual.items()}
        wanted |= {"first lr": getattr(config, size), "fused": True}
        moved, owned = set(), {id(weight) for weight in getattr(learner, part).parameters()}
        for group in optimizer.param_groups:
            found = {**group, "first lr": group.get("initial_lr", group["lr"])}  # a schedule may warm up
            if type(learner).__name__ == "TrajectoryTransformer" and group["weight_decay"] == 0:
                found.pop("weight_decay")  # of what is no matrix; its own test says what is one
                wanted.pop("weight_decay")
            faults += [f"{name}: {key} {found.get(key)}" for key in wanted if found.get(key) != wanted[key]]
            moved |= {id(weight) for weight in group["params"]}
        if moved != owned:
            faults.append(f"{name}: not the weights of {part}")
    return faults


def distinct_steps(script) -> dict[str, float]:
    """Every step size of a Config, each another."""
    names = [field for field in script.Config.__dataclass_fields__ if field.endswith("_lr")]
    return {name: 1e-3 * number for number, name in enumerate(names, 1)}


@pytest.mark.parametrize("name", [*OFFLINE, *ONLINE])
def test_optimisers_take_the_configs_step_sizes_and_torchs_defaults(scripts, name):
    learner = fresh(scripts[name], **distinct_steps(scripts[name]), **UNSCALED.get(name, {}))
    assert parts(learner, torch.optim.Optimizer)
    assert optimizer_faults(learner) == []


@pytest.mark.parametrize(
    "change", [{"lr": 0.5}, {"weight_decay": 0.01}, {"betas": (0.5, 0.999)}, {"eps": 1e-5}, {"fused": False}]
)
def test_other_optimisers_are_noticed(scripts, change):
    learner = fresh(scripts["td3_bc"])
    settings = {"lr": learner.config.critic_lr, "fused": True}
    learner.critic_optimizer = torch.optim.Adam(learner.critic.parameters(), **(settings | change))
    assert len(optimizer_faults(learner)) == 1
    learner.critic_optimizer = torch.optim.Adam(learner.actor.parameters(), **settings)
    assert optimizer_faults(learner) == ["critic_optimizer: not the weights of critic"]


# --------------------------------------------- first weights ---------------------------------------------


def first_weight_faults(script, learner) -> list[str]:
    """Layers whose weights and biases are not uniform within +-inputs**-0.5, which is torch's own way."""
    kinds, faults = (nn.Linear, getattr(script, "EnsembleLinear", nn.Linear)), []
    for name, network in parts(learner, nn.Module).items():
        for path, layer in network.named_modules():
            if isinstance(layer, kinds):
                bound = layer.weight.shape[1] ** -0.5  # of [outputs, inputs] or [E, inputs, outputs]
                weight = layer.weight.detach().abs().max() / bound
                bias = layer.bias.detach().abs().max() / bound
                if not 0.9 < weight < 1.0001 or bias > 1.0001:
                    faults.append(f"{name}.{path}: weights to {weight:.2f}, biases to {bias:.2f}, bound 1")
    return faults


@pytest.mark.parametrize("name", ["bc", *VALUES])
def test_first_weights_are_torchs(scripts, name):
    learner = fresh(scripts[name])
    layers = [module for part in parts(learner, nn.Module).values() for module in part.modules()]
    kinds = (nn.Linear, getattr(scripts[name], "EnsembleLinear", nn.Linear))
    assert sum(isinstance(layer, kinds) for layer in layers) >= 3
    assert first_weight_faults(scripts[name], learner) == []


@pytest.mark.parametrize("factor", [0.5, 0.85, 1.15, 2.0])
def test_other_first_weights_are_noticed(scripts, factor):
    learner = fresh(scripts["td3_bc"])
    with torch.no_grad():
        learner.critic.layers[1].weight.mul_(factor)
        learner.actor.net[0].weight.mul_(factor)
    faults = [fault.split(":")[0] for fault in first_weight_faults(scripts["td3_bc"], learner)]
    assert faults == ["actor.net.0", "critic.layers.1"]


# ----------------------------------------------- compiling -----------------------------------------------

COMPILING = sorted(
    str(path.relative_to(ROOT / "algorithms"))
    for path in (ROOT / "algorithms").glob("*/*.py")
    if "def compile_methods(" in path.read_text()
)
AS_THEY_ARE = {"language/lamo.py": {"actor_loss"}}  # its update as one CUDA graph, or eager


def compiled_methods(script) -> list[str]:
    """Names, however spelt, that `train` gives to `compile_methods`, itself or by a tuple of methods."""
    lines = re.findall(r"(?:compile_methods\(learner|methods =)(.*)", inspect.getsource(script.train))
    return re.findall(r'"(.*?)"', " ".join(lines))


def test_there_are_scripts_that_compile():
    assert {"context/dpt.py", "discrete/dqn.py", "finetune/wsrl.py", "offline/iql.py"} <= {*COMPILING}


@pytest.mark.parametrize("path", COMPILING)
def test_train_compiles_every_loss_by_its_name(path):
    script = load_script(path)
    losses = {name for name in dir(learner_class(script)) if name.endswith("_loss") or name == "target_q"}
    assert losses
    assert sorted(compiled_methods(script)) == sorted(losses - AS_THEY_ARE.get(path, set()))


# ------------------------------------------------ endings ------------------------------------------------

# CQL's penalty draws actions at next observations too, however the step ended: without it the loss is (1)'s.
# So do COMBO's, Cal-QL's and WSRL's. BRAC's and SPOT's first updates have no critic.
PENALISED = ("combo", "cql", "finetune/cql", "finetune/cal_ql", "finetune/wsrl")
WITHOUT_PENALTY = {name: {"cql_weight": 0.0} for name in PENALISED}
WITHOUT_PENALTY |= {"brac": {"behavior_updates": 0}, "finetune/spot": {"vae_updates": 0}}
WITHOUT_PENALTY |= {"q_chunking": {"chunk": 1}}  # whose transitions are of one step


def critic_losses(learner_of, terminated: float) -> tuple[float, float]:
    """Losses of a first update, with these next observations and with others."""
    torch.manual_seed(1)
    rows = {"observations": torch.randn(64, OBS), "actions": torch.rand(64, ACT) * 2 - 1}
    rows |= {"rewards": torch.randn(64), "terminations": torch.full((64,), terminated)}
    rows |= {"next_actions": torch.rand(64, ACT) * 2 - 1, "has_next": 1 - rows["terminations"]}  # ReBRAC's
    rows |= {"returns_to_go": torch.randn(64)}  # Cal-QL's
    losses = []
    for next_observations in (torch.randn(64, OBS), 5 * torch.randn(64, OBS)):
        learner = learner_of()
        torch.manual_seed(2)  # the same noise
        metrics = learner.update({**rows, "next_observations": next_observations})
        losses.append(float(metrics["critic/loss"]))
    return losses[0], losses[1]


@pytest.mark.parametrize("name", VALUES)
def test_a_termination_ends_the_value_and_nothing_else_does(scripts, name):
    def learner_of():
        return fresh(scripts[name], **WITHOUT_PENALTY.get(name, {}))

    first, second = critic_losses(learner_of, 1.0)
    assert first == second
    first, second = critic_losses(learner_of, 0.0)
    assert abs(first - second) > 1e-3 * first


@pytest.mark.parametrize("seen", [0.0, 0.5, 1.0])
def test_endings_that_are_not_looked_at_are_noticed(scripts, seen):
    """The critic's loss sees the same terminations in every step, whatever the data say."""

    def learner_of():
        learner = fresh(scripts["td3_bc"])
        loss = learner.critic_loss
        learner.critic_loss = lambda rows: loss({**rows, "terminations": torch.full((64,), seen)})
        return learner

    ended, going_on = critic_losses(learner_of, 1.0), critic_losses(learner_of, 0.0)
    assert ended[0] != ended[1] or going_on[0] == going_on[1]
