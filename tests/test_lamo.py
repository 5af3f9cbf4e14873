"""LaMo on a tiny random Llama: what its tokens, layers and additions compute, what is trained and what not.

What it shares with dt.py word for word (windows, the loop of an evaluation) is tested in test_dt.py.
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import load_script, new_learner, short
from runs import SPEED, at_update, equal, stop
from test_dt import Recorder, mixed, padded, pieces, vector, window  # noqa: F401 (two are fixtures)
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")
lamo = load_script("language/lamo.py")
DIM, HEADS, GROUPS, LAYERS, THETA, EPS = 16, 4, 2, 3, 100.0, 1e-3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A folder with a language model of three layers and eleven words, its norms' gains not 1."""
    torch.manual_seed(3)
    shape = transformers.LlamaConfig(
        vocab_size=11, hidden_size=DIM, intermediate_size=24, num_hidden_layers=LAYERS, rms_norm_eps=EPS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, bos_token_id=1, eos_token_id=2)
    model = transformers.LlamaForCausalLM(shape)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    return str(folder)


def plain(tiny: str, obs_dim: int = 2, act_dim: int = 2, **fields):
    """A LaMo as it begins, without dropout."""
    known = {"model": tiny, "backbone_layers": 2, "lora_rank": 3, "lora_alpha": 6.0, "context": 3}
    config = lamo.Config(**known | {"dropout": 0.0, "timesteps": 6} | fields)
    torch.manual_seed(0)
    return new_learner(lamo, config, obs_dim, act_dim)


def small(tiny: str, *sizes: int, **fields):
    """The same, what is trained large enough to show."""
    learner = plain(tiny, *sizes, **fields)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, weight in learner.actor.named_parameters():
            if weight.requires_grad:
                norm = name == "norm.weight"
                weight.normal_(mean=float(norm), std=0.3)
    return learner


# ---------------------------------------------- the network ----------------------------------------------


def rotated(vector: np.ndarray, position: int) -> np.ndarray:
    """A head's query or key: its entries i and i + half turn by position * THETA^(-2 i / size)."""
    half = len(vector) // 2
    angles = position * THETA ** (-2 * np.arange(half) / len(vector))
    first, second = vector[:half], vector[half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin])


def forward(w: dict[str, np.ndarray], row: dict, scale: float, layers: int = 2) -> np.ndarray:
    """Outputs [K, A] of one window, token by token: (2) to (5), and Llama's layer from its paper."""

    def linear(name, x):
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)

    def gelu(x):
        return x * np.array([0.5 * (1 + math.erf(entry / math.sqrt(2))) for entry in x])

    def mlp(name, x):  # (2)
        y = linear(f"{name}.first", x)
        return y + linear(f"{name}.second", gelu(y))

    def norm(x):
        z = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return w["norm.weight"] * z + w["norm.bias"]

    def rms(name, x):
        return w[f"{name}.weight"] * x / np.sqrt(np.mean(x**2) + EPS)

    def lora(name, x):  # (4): alpha / r = 6 / 3
        return (w[f"{name}.base.weight"] + 2 * w[f"{name}.lora_b"] @ w[f"{name}.lora_a"]) @ x

    x = []
    keys = ("returns_to_go", "observations", "actions", "timesteps")
    for to_go, observation, action, t in zip(*(row[key] for key in keys), strict=True):
        time = w["embed_timestep.weight"][min(int(t), 5)]
        x.append(norm(mlp("embed_return", np.array([to_go / scale]))) + time)  # (3)
        x.append(norm(mlp("embed_observation", observation)) + time)
        x.append(norm(mlp("embed_action", action)) + time)
    size = DIM // HEADS
    for layer in range(layers):
        block = f"backbone.layers.{layer}"
        seen = [rms(f"{block}.input_layernorm", token) for token in x]
        query, key, value = (
            [lora(f"{block}.self_attn.{name}_proj", token).reshape(-1, size) for token in seen]
            for name in "qkv"
        )
        for i in range(len(x)):
            heads = []
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                asked = rotated(query[i][head], i)
                scores = [asked @ rotated(key[j][group], j) / math.sqrt(size) for j in range(i + 1)]
                shares = np.exp(scores - np.max(scores))
                shares /= shares.sum()
                heads.append(sum(share * value[j][group] for j, share in enumerate(shares)))
            x[i] = x[i] + linear(f"{block}.self_attn.o_proj", np.concatenate(heads))
        for i, token in enumerate(x):
            token = rms(f"{block}.post_attention_layernorm", token)
            gate = linear(f"{block}.mlp.gate_proj", token)
            hidden = gate / (1 + np.exp(-gate)) * linear(f"{block}.mlp.up_proj", token)
            x[i] = x[i] + linear(f"{block}.mlp.down_proj", hidden)
    outputs = [rms("backbone.norm", token) for token in x[1::3]]  # (5): at observations
    return np.array([linear("head.2", gelu(linear("head.0", output))) for output in outputs])


def by_hand(learner, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """The same for a batch: [B, K, A]."""
    weights = {name: w.detach().double().numpy() for name, w in learner.actor.named_parameters()}
    rows = [{key: column[i].double().numpy() for key, column in batch.items()} for i in range(3)]
    return np.stack([forward(weights, row, learner.config.return_scale) for row in rows])


@pytest.mark.equation(2, 3, 4, 5)
def test_outputs_are_those_of_tokens_one_after_the_other(tiny):
    """Embeddings, norm before the timestep, rotary heads in groups, LoRA, head; steps 6 and 7 share 5's."""
    learner, batch = small(tiny), window(3, 3)
    batch["timesteps"][2] += 5
    assert batch["timesteps"].max() >= 6
    found = learner.actor(batch).detach().numpy()
    np.testing.assert_allclose(found, by_hand(learner, batch), atol=2e-5)
    assert np.ptp(found, axis=0).min() > 0.05
    alone = {key: column[0] for key, column in batch.items()}  # one window without a batch
    np.testing.assert_allclose(learner.actor(alone).detach(), found[0], atol=1e-5)


def test_the_head_has_no_bound(tiny):
    learner = small(tiny)
    with torch.no_grad():
        learner.actor.head[-1].bias.fill_(7.0)
    assert learner.actor(window(3, 3)).min() > 1


@pytest.mark.parametrize("key", ["returns_to_go", "observations", "actions", "timesteps"])
def test_a_change_at_t_changes_no_output_before_it(tiny, key):
    """And it does change those from t on; an action only those after its own."""
    learner = small(tiny, context=4, timesteps=20)
    for t in range(4):
        batch = window(2, 4)
        before = learner.actor(batch)
        batch[key][:, t] += 500 if key == "returns_to_go" else 1
        after = learner.actor(batch)
        first = t + (key == "actions")
        assert torch.equal(before[:, :first], after[:, :first])
        assert ((before[:, first:] - after[:, first:]).abs().amax((0, 2)) > 1e-6).all()


def test_dropout_is_on_the_tokens_in_training_alone(tiny):
    """Once: Llama's layers have none, and LoRA's goes without."""
    learner, batch = small(tiny, dropout=0.5), window(2, 3)
    (module,) = [m for m in learner.actor.modules() if isinstance(m, torch.nn.Dropout)]
    assert not torch.equal(learner.actor(batch), learner.actor(batch))
    module.eval()
    assert torch.equal(learner.actor(batch), learner.actor(batch))  # all others are in training
    module.train()
    learner.actor.eval()
    assert torch.equal(learner.actor(batch), learner.actor(batch))


def test_medium_precision_is_bfloat16_in_the_layers_alone(tiny):
    learner, batch, kinds = small(tiny), window(2, 3), []
    exact = learner.actor(batch)
    projection = learner.actor.backbone.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda module, _, output: kinds.append(output.dtype))
    learner.actor.bfloat16 = small(tiny, precision="medium").actor.bfloat16
    rough = learner.actor(batch)
    assert kinds == [torch.bfloat16]
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().mean() < 0.05
    assert not small(tiny, precision="high").actor.bfloat16


# ------------------------------------------------- LoRA --------------------------------------------------


@pytest.mark.equation(4)
def test_lora_is_the_merged_weight_and_begins_at_zero():
    torch.manual_seed(0)
    base = torch.nn.Linear(5, 4)
    layer, x = lamo.LoRALinear(base, 3, 6.0), torch.randn(7, 5)
    assert torch.equal(layer(x), base(x))
    assert layer.lora_a.abs().max() > 0.1
    with torch.no_grad():
        layer.lora_b.normal_()
    a, b = layer.lora_a.detach().numpy(), layer.lora_b.detach().numpy()
    merged = base.weight.detach().numpy() + 2 * b @ a  # alpha / r = 6 / 3
    expected = x.numpy() @ merged.T + base.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach(), expected, atol=1e-5)


def sizes(*layers: tuple[int, int]) -> int:
    """Trained entries of LoRA layers with r = 16 from and to these sizes."""
    made = [lamo.LoRALinear(torch.nn.Linear(*size, device="meta"), 16, 32.0) for size in layers]
    return sum(p.numel() for layer in made for p in layer.parameters() if p.requires_grad)


def test_counts_are_the_papers_and_those_of_this_backbone(tiny):
    """GPT-2's c_attn as q, k and v: 73,728; as one layer: 49,152. SmolLM2's q, k and v: 43,008."""
    assert sizes(*[(768, 768)] * 3) == 48 * 768 + 2304 * 16 == 73_728
    assert sizes((768, 2304)) == 49_152
    assert sizes((576, 576), (576, 192), (576, 192)) == 16 * (1152 + 768 + 768) == 43_008
    assert (lamo.Config().lora_rank, lamo.Config().lora_alpha, lamo.Config().backbone_layers) == (16, 32, 4)
    trained = {name for name, p in plain(tiny).actor.named_parameters() if "lora" in name and p.requires_grad}
    places = [f"backbone.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qkv"]
    assert trained == {f"{place}.lora_{half}" for place in places for half in "ab"}


def test_the_first_layers_with_lora_at_zero_are_exactly_the_models(tiny):
    """Those of the folder: transformers' own model with one layer fewer, bit for bit."""
    model = transformers.AutoModel.from_pretrained(tiny, num_hidden_layers=2)
    past = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    tokens, backbone = torch.randn(2, 9, DIM), plain(tiny).actor.backbone
    with torch.no_grad():
        ours = backbone(inputs_embeds=tokens, attention_mask=past).last_hidden_state
        theirs = model(inputs_embeds=tokens, attention_mask=past).last_hidden_state
        causal = model(inputs_embeds=tokens).last_hidden_state
    assert len(backbone.layers) == 2
    assert torch.equal(ours, theirs)
    np.testing.assert_allclose(ours, causal, atol=1e-5)
    assert 11 not in {size for weight in backbone.parameters() for size in weight.shape}  # no words


def test_random_weights_are_others_and_the_rest_begins_alike(tiny):
    """So that the two differ in what text has taught alone: the same entries in an order of the seed's."""
    state = torch.get_rng_state()
    lamo.language_layers(plain(tiny, pretrained=False).config)
    torch.set_rng_state(state)
    learners = [plain(tiny), plain(tiny, pretrained=False), plain(tiny, pretrained=False, seed=1)]
    weights = [dict(learner.actor.named_parameters()) for learner in learners]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        gains = "layernorm" in name or name == "backbone.norm.weight"
        assert torch.equal(weight, weights[1][name]) == (weight.requires_grad or gains), name
        assert torch.equal(weight.flatten().sort()[0], weights[1][name].flatten().sort()[0]), name
        assert torch.equal(weights[1][name], weights[2][name]) == (weight.requires_grad or gains), name
        assert weight.requires_grad == weights[1][name].requires_grad
    again = dict(plain(tiny, pretrained=False).actor.named_parameters())
    assert all(torch.equal(weight, again[name]) for name, weight in weights[1].items())
    batch = window(2, 3)
    assert (learners[0].actor(batch) - learners[1].actor(batch)).abs().max() > 1e-3


# ------------------------------------------- loss and its updates -----------------------------------------


@pytest.mark.equation(6)
def test_loss_is_the_mean_over_real_steps(tiny):
    learner, batch = small(tiny), padded()
    loss, metrics = learner.actor_loss(batch)
    error = (by_hand(learner, batch) - batch["actions"].double().numpy()) ** 2
    real = [error[0, 0], error[0, 1], error[0, 2], error[1, 0], error[1, 1], error[2, 0]]
    assert loss.item() == pytest.approx(np.mean(real), rel=1e-4)
    assert loss.item() == metrics["actor/loss"].item()
    assert not metrics["actor/loss"].requires_grad


def test_padding_changes_nothing(tiny):
    """Neither what stands in it nor that it is there."""
    learner, batch = small(tiny), padded()
    other = {key: torch.where(batch["real"].bool().view(3, 3, *[1] * (column.ndim - 2)), column, 3.0)
             for key, column in batch.items() if key != "real"} | {"real": batch["real"]}
    assert not torch.equal(other["actions"], batch["actions"])
    assert torch.equal(learner.actor_loss(batch)[0], learner.actor_loss(other)[0])
    alone = {key: column[1:2, :2] for key, column in batch.items()}  # the second window without its padding
    with torch.no_grad():
        np.testing.assert_allclose(learner.actor(batch)[1, :2], learner.actor(alone)[0], atol=1e-5)


def test_what_is_frozen_has_no_gradient_and_never_moves(tiny):
    """And all else has one and moves, A of LoRA from the second update on."""
    learner, batch = plain(tiny, warmup_updates=1, actor_lr=1e-2), window(3, 3)
    weights = dict(learner.actor.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    batch["timesteps"][:, :] = torch.tensor([[0.0, 1, 2], [3, 4, 5], [3, 4, 5]])
    for _ in range(2):
        learner.update(batch)
    for name, weight in weights.items():
        ours = not name.startswith("backbone.") or "lora" in name
        assert weight.requires_grad == ours, name
        assert (weight.grad is not None) == ours, name
        assert torch.equal(weight, before[name]) != ours, name
    owned = [p for group in learner.actor_optimizer.param_groups for p in group["params"]]
    assert {*map(id, owned)} == {id(weight) for weight in weights.values() if weight.requires_grad}


def test_first_update_by_hand(tiny):
    """Warm-up, clipping, AdamW, for LoRA as for the rest."""
    fields = {"actor_lr": 0.1, "warmup_updates": 4, "weight_decay": 0.5}
    learner, batch = small(tiny, **fields, gradient_norm=0.01), padded()
    weights = {name: p for name, p in learner.actor.named_parameters() if p.requires_grad}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    found = torch.autograd.grad(learner.actor_loss(batch)[0], list(weights.values()))
    slopes = dict(zip(weights, found, strict=True))
    norm = math.sqrt(sum(float(slope.square().sum()) for slope in found))
    assert norm > 0.01
    metrics = learner.update(batch)
    assert float(metrics["actor/gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    for name, weight in weights.items():
        rate, slope = 0.1 / 4, slopes[name] * 0.01 / norm
        expected = before[name] * (1 - rate * 0.5) - rate * slope / (slope.abs() + 1e-6)
        np.testing.assert_allclose(weight.detach(), expected, atol=1e-4)  # the clip divides by norm + 1e-6
    (group,) = learner.actor_optimizer.param_groups
    rates = [group["lr"]]
    for _ in range(4):
        learner.update(batch)
        rates.append(group["lr"])
    assert rates == pytest.approx([0.05, 0.075, 0.1, 0.1, 0.1])


class NoNumbers(TorchDispatchMode):
    """Fails where a number is read from a tensor: on a GPU that waits, and a CUDA graph forbids it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "a number is asked for"
        return function(*args, **kwargs or {})


def test_the_loss_asks_for_no_number(tiny):
    learner, batch = small(tiny), padded()
    with NoNumbers():
        learner.actor_loss(batch)[0].backward()
    with NoNumbers(), pytest.raises(AssertionError, match="asked for"):
        learner.actor.backbone(inputs_embeds=torch.zeros(2, 9, DIM))  # transformers' own mask: it looks


# ------------------------------------------------- data --------------------------------------------------


@pytest.mark.equation(1)
def test_returns_to_go(tiny):
    episode = {"observations": np.zeros((4, 2), np.float32), "actions": np.zeros((3, 2), np.float32)}
    episode |= {"rewards": np.array([1.0, 2, 3], np.float32), "terminations": np.zeros(3, np.float32)}
    data = lamo.steps([episode, episode], plain(tiny).scaler)
    assert data["returns_to_go"].tolist() == [6, 5, 3] * 2
    assert data["timesteps"].tolist() == [0, 1, 2] * 2
    assert lamo.windows(data, torch.tensor([1]), 3)["real"].tolist() == [[1, 1, 0]]


def test_a_share_is_that_of_the_episodes_by_the_seed():
    """At least one; in the data's order; what a smaller share has is in a larger one."""
    episodes = [{"rewards": np.full(1, number)} for number in range(204)]

    def kept(share, seed):
        return [int(episode["rewards"][0]) for episode in lamo.keep_share(episodes, share, seed)]

    assert [len(kept(share, 0)) for share in (0.0, 0.001, 0.01, 0.1, 1.0)] == [1, 1, 2, 20, 204]
    assert kept(1.0, 5) == [*range(204)]
    assert len(lamo.keep_share(episodes[:7], 0.4, 0)) == 3  # the nearest to 2.8
    for seed in range(3):
        assert kept(0.1, seed) == kept(0.1, seed) == sorted(kept(0.1, seed))
        assert {*kept(0.01, seed)} < {*kept(0.1, seed)}
    assert len({tuple(kept(0.1, seed)) for seed in range(3)}) == 3
    drawn = np.bincount(np.concatenate([kept(0.1, seed) for seed in range(200)]), minlength=204)
    assert 2 < drawn.min() < 20 < drawn.max() < 45  # 19.6 times each, give or take


def run(dataset: str, folder: Path, model: str, **fields) -> SimpleNamespace:
    known = {"model": model, "backbone_layers": 1, "lora_rank": 3, "context": 4, "actor_lr": 1e-3}
    known |= {"warmup_updates": 30, "dropout": 0.2}
    known |= {"log_every": 20, "final_eval_episodes": 2} | fields
    arguments = [word for word in short(dataset, folder, **known) if not word.startswith("--hidden_dim")]
    lamo.train(lamo.parse_config(arguments))
    place = folder / f"language/lamo/{dataset}/default/seed-0"
    tables = {name: pd.read_csv(place / f"{name}.csv") for name in ("metrics", "evaluations")}
    info, state = json.loads((place / "run.json").read_text()), torch.load(place / "checkpoint.pt")
    return SimpleNamespace(place=place, info=info, state=state, **tables)


def test_what_is_not_kept_is_not_learned_from(pieces, tiny, tmp_path, monkeypatch):  # noqa: F811
    """Target, scaler and windows: of two of six episodes, whose returns are 10, -5, -5, 70, 29 and 51."""
    seen, steps = [], lamo.steps
    monkeypatch.setattr(lamo, "steps", lambda *both: seen.append(both[0]) or steps(*both))
    found = run(pieces, tmp_path, tiny, share=0.34, updates=2)
    wanted = sorted(np.random.default_rng(0).permutation(6)[:2])
    assert max(np.array([10, -5, -5, 70, 29, 51])[wanted]) == found.state["state"]["actor"]["target"]
    episodes = [*minari.load_dataset(pieces).iterate_episodes()]
    observations = np.concatenate([episodes[number].observations[:-1] for number in wanted])
    np.testing.assert_allclose(found.state["state"]["scaler"]["mean"], observations.mean(0), rtol=1e-6)
    (kept,) = seen
    assert [episode["rewards"].sum() for episode in kept] == [episodes[n].rewards.sum() for n in wanted]


# ------------------------------------------------ acting -------------------------------------------------


@pytest.mark.equation(7)
def test_the_return_to_go_falls_by_the_rewards_received_and_actions_are_cut(tiny, monkeypatch):
    """What the policy remembers is the action that was taken: the one that was cut."""
    learner, seen = small(tiny, context=4, return_scale=7.0), []
    learner.actor.target.fill_(50.0)
    monkeypatch.setattr(learner.actor, "forward", lambda batch: (
        seen.append({key: column.clone() for key, column in batch.items()})
        or torch.tensor([3.0, -0.4]).expand(batch["actions"].shape)))
    environments = lamo.LastRewards(vector(Recorder, 3))
    act = lambda observations: learner.act(observations, environments.rewards)  # noqa: E731
    lamo.evaluate(act, environments, 3, (0, 0, 0))
    seeds = np.random.SeedSequence((0, 0, 0)).generate_state(6).tolist()
    for row, seed in enumerate(seeds[:3]):
        for t in range(min(2 + seed % 3, len(seen))):
            assert seen[t]["returns_to_go"][row].tolist() == [50 - n * (n + 1) / 2 for n in range(t + 1)]
            assert seen[t]["timesteps"][row].tolist() == [*range(t + 1)]
            taken = np.array([[1.0, -0.4]] * t + [[0.0, 0.0]])
            np.testing.assert_allclose(seen[t]["actions"][row], taken, atol=1e-6)
    action = learner.act(np.zeros(2), None)
    np.testing.assert_allclose(action, [1.0, -0.4], atol=1e-6)


def test_actions_in_the_data_follow_the_datas_own_steps(pieces, tiny):  # noqa: F811
    """Played: the target is asked for at an episode's first step; then rewards and actions are the data's."""
    learner = small(tiny, context=3, dropout=0.5, return_scale=20.0)
    episodes, _ = lamo.read_episodes(minari.load_dataset(pieces))
    data = lamo.steps(episodes, learner.scaler)
    learner.actor.target.fill_(77.0)
    rewards = np.concatenate([episode["rewards"] for episode in episodes])
    found, played = learner.act_in_data(data, torch.arange(18)), []
    for row in range(18):
        t = int(data["timesteps"][row])
        for step in range(row - t, row + 1):
            reward = None if step == row - t else float(rewards[step - 1])
            action = learner.act(data["observations"][step].numpy(), reward)
            learner.history[-1]["actions"] = data["actions"][step]
        played.append(action)
    np.testing.assert_allclose(found, played, atol=1e-5)
    assert found.abs().max() == 1  # cut, some of them
    assert learner.actor.training


# -------------------------------------------------- runs --------------------------------------------------


@pytest.fixture(scope="module")
def whole(pendulum, tiny, tmp_path_factory) -> SimpleNamespace:
    """A run of 40 updates with shuffled weights, which no folder holds."""
    return run(pendulum, tmp_path_factory.mktemp("whole"), tiny, pretrained=False)


def test_an_interrupted_run_ends_in_the_same_bits(pendulum, tiny, whole, tmp_path, capsys, monkeypatch):
    """Saved after 20 of 40 updates, with dropout, in the middle of warming up."""
    with monkeypatch.context() as patch:
        at_update(lamo, patch, 27, stop)
        with pytest.raises(KeyboardInterrupt):
            run(pendulum, tmp_path, tiny, pretrained=False)
    resumed = run(pendulum, tmp_path, tiny, pretrained=False)
    assert "resumed at update 20" in capsys.readouterr().out
    for key in ("updates", "state", "rng"):
        assert equal(whole.state[key], resumed.state[key]), key
    pd.testing.assert_frame_equal(whole.evaluations, resumed.evaluations, check_exact=True)
    pd.testing.assert_frame_equal(whole.metrics.drop(columns=SPEED), resumed.metrics.drop(columns=SPEED))
    assert whole.info["score"] == resumed.info["score"]


def test_a_checkpoint_holds_what_is_trained_and_no_more(whole, tiny):
    """By names; safely read; and as large as three numbers for each weight that is trained."""
    state = torch.load(whole.place / "checkpoint.pt", weights_only=True)["state"]
    actor = plain(tiny, 3, 1, backbone_layers=1).actor
    trained = {name for name, weight in actor.named_parameters() if weight.requires_grad}
    assert state["actor"].keys() == trained | {"target", "frozen"}
    moments = sum(moment.numel() for entry in state["actor_optimizer"]["state"].values()
                  for moment in entry.values())
    kept = sum(state["actor"][name].numel() for name in trained)
    assert moments == 2 * kept + len(trained)  # and a count each


def test_a_finished_policy_plays_as_it_was_evaluated(pendulum, whole):
    policy, env = lamo.load(whole.place), gym.make("Pendulum-v1", max_episode_steps=100)
    final = whole.evaluations.query("phase == 'final'")
    seed = int(np.random.SeedSequence((0, 40, 1)).generate_state(22)[0])
    (observation, _), reward, over, total = env.reset(seed=seed), None, False, 0.0
    while not over:
        action = policy.act(observation, reward)
        observation, reward, _, over, _ = env.step(action)
        total += reward
    assert total == pytest.approx(final["return"].iloc[0], abs=0.05)


def test_learns_what_it_is_asked_for(mixed, tiny, tmp_path):  # noqa: F811
    """Half the data act well, half badly: asked for the best return it acts well, for the worst badly."""
    fields = {"actor_lr": 3e-3, "warmup_updates": 10, "return_scale": 8.0, "updates": 80, "dropout": 0.1}
    fields |= {"batch_size": 64, "log_every": 1000, "eval_every": 1000}
    assert run(mixed, tmp_path / "best", tiny, **fields).info["return_mean"] > 8 * 0.8 - 0.5
    worst = run(mixed, tmp_path / "worst", tiny, **fields, target_quantile=0.0)
    assert worst.info["return_mean"] < -8 * 0.8 + 0.5


# ------------------------------------------------- errors -------------------------------------------------


def call(monkeypatch, capsys, dataset: str, folder: Path, **fields) -> str:
    """Its one line on stderr; nothing is written."""
    arguments = [word for word in short(dataset, folder, **fields) if not word.startswith("--hidden_dim")]
    monkeypatch.setattr(sys, "argv", ["lamo.py", *arguments])
    with pytest.raises(SystemExit) as end:
        lamo.main(lamo.train)
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n"), error[:9]) == (2, 1, "lamo.py: "), error
    return error


def test_a_model_that_is_not_there(pendulum, tmp_path, monkeypatch, capsys):
    """A folder, or a name on a hub that cannot be asked."""
    for model in (f"{tmp_path}/nowhere", "nobody/nothing"):
        error = call(monkeypatch, capsys, pendulum, tmp_path / "runs", model=model)
        assert f"cannot load {model}" in error
        assert "make language" in error
    assert not (tmp_path / "runs").exists()


def test_without_the_package(pendulum, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = call(monkeypatch, capsys, pendulum, tmp_path / "runs", model=tiny)
    assert "make language" in error
    assert "transformers" in error
    assert not (tmp_path / "runs").exists()


def test_more_layers_than_the_model_has(pendulum, tiny, tmp_path, monkeypatch, capsys):
    error = call(monkeypatch, capsys, pendulum, tmp_path / "runs", model=tiny, backbone_layers=4)
    assert f"backbone_layers: {tiny} has {LAYERS} layers" in error
    assert not (tmp_path / "runs").exists()


def test_a_model_of_another_build(pendulum, tmp_path, monkeypatch, capsys):
    words = {"vocab_size": 11, "bos_token_id": 1, "eos_token_id": 2}
    shape = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, **words)
    transformers.GPT2LMHeadModel(shape).save_pretrained(tmp_path / "gpt2")
    fields = {"model": f"{tmp_path}/gpt2", "backbone_layers": 1}
    error = call(monkeypatch, capsys, pendulum, tmp_path / "runs", **fields)
    assert "is not built as Llama" in error
    assert not (tmp_path / "runs").exists()


def test_other_frozen_weights_than_those_of_the_run(pendulum, tiny, tmp_path, monkeypatch):
    """They are not in the checkpoint: a run neither goes on nor is loaded with others in the same place."""
    folder = tmp_path / "model"
    model = transformers.LlamaForCausalLM.from_pretrained(tiny)
    model.save_pretrained(folder)
    place = run(pendulum, tmp_path / "runs", str(folder), updates=2, final_eval_episodes=1).place
    lamo.load(place)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    model.save_pretrained(folder)
    with pytest.raises(lamo.UserError, match="not those that the run began with"):
        lamo.load(place)
