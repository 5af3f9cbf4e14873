"""algorithms/language/dpo.py: every equation in NumPy on a vocabulary of 16 words, lines of data, runs."""

import ast
import json
import math
import re
import runpy
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, load_script
from runs import SPEED, at_update, checkpoint, equal, record, sigint, stop  # noqa: F401

pytest.importorskip("transformers", reason="the package transformers is missing: make language")
import transformers
from words import WORDS, save_model, tiny_model, tiny_tokenizer

script = load_script("language/dpo.py")
TEXTS = [([3, 4, 7], [9, 11, 10]), ([3, 4, 7], [10]), ([5, 8], [12, 9]), ([5, 8], [14, 0])]
TEXTS += [([6], [15, 9, 9, 0]), ([6], [10, 13])]  # three pairs: tokens of x and of y, preferred first
LOG_PROBS = np.array([[-3.0, -4.0], [-2.5, -2.0], [-7.0, -6.0]])
REFERENCE = np.array([[-3.5, -3.0], [-3.0, -4.5], [-6.0, -6.0]])
RATIOS = LOG_PROBS - REFERENCE
H = RATIOS[:, 0] - RATIOS[:, 1]  # 1.5, -2, -1
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_learner(model=None, **fields):
    config = script.Config(**{"append_eos": False, "lora_rank": 2, "warmup_updates": 0} | fields)
    return script.DPO(config, model or tiny_model(), tiny_tokenizer(), torch.device("cpu"))


def three_pairs(learner) -> dict:
    reference = learner.log_probs(TEXTS, of_reference=True).view(3, 2)
    pairs = [TEXTS[0:2], TEXTS[2:4], TEXTS[4:6]]
    return script.gather(pairs, reference, torch.arange(3), torch.device("cpu"))


def disturb(learner, seed: int = 0) -> None:
    """Another policy than the reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in learner.trained:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)


def exact(model, x: list[int], y: list[int]) -> float:
    """log pi(y|x), word by word, each by a call of its own."""
    total = 0.0
    for t, word in enumerate(y):
        with torch.no_grad():
            logits = model(torch.tensor([x + y[:t]])).logits[0, -1].double().numpy()
        total += logits[word] - math.log(np.exp(logits).sum())
    return total


def sigma(x):
    return 1 / (1 + np.exp(-x))


def loss_of(h: float, **fields) -> float:
    zeros = torch.zeros(1, 2, dtype=torch.double)
    return float(make_learner(**fields).objective(torch.tensor([[h, 0.0]]).double(), zeros)[0])


# ------------------------------------------------ the losses ------------------------------------------------


@pytest.mark.equation(1)
def test_log_probabilities_of_responses_word_by_word():
    """Texts of different lengths side by side: padding counts for nothing."""
    learner = make_learner(micro_batch_size=2)  # four texts at a time, then two
    disturb(learner)
    found = learner.log_probs(TEXTS).numpy()
    np.testing.assert_allclose(found, [exact(learner.policy.model, x, y) for x, y in TEXTS], atol=1e-4)
    found = learner.log_probs(TEXTS, of_reference=True).numpy()
    np.testing.assert_allclose(found, [exact(tiny_model(), x, y) for x, y in TEXTS], atol=1e-4)


class Unigram(torch.nn.Module):
    """Words of fixed log-odds, whatever went before."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.as_tensor(logits, dtype=torch.float32))

    def forward(self, input_ids, use_cache):
        assert not use_cache
        return types.SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


@pytest.mark.equation(1)
def test_a_prompts_own_words_do_not_count_and_uniform_words_cost_the_log_of_their_number():
    learner = make_learner(Unigram(np.arange(5.0)), lora_rank=0)
    texts = [([1, 2, 3], [4, 0]), ([3, 0, 0], [4, 0]), ([2], [4, 0])]
    found = learner.log_probs(texts)
    assert torch.equal(found[:1].expand(3), found)
    uniform = make_learner(Unigram(np.zeros(5)), lora_rank=0)
    expected = [-2 * math.log(5)] * 3  # the sum over tokens, not their mean
    np.testing.assert_allclose(uniform.log_probs(texts), expected, rtol=1e-6)


@pytest.mark.equation(2, 3, 4, 5, 6)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_every_loss_against_numpy(beta):
    e = 0.2
    expected = {
        "dpo": np.mean(-np.log(sigma(beta * H))),
        "cdpo": np.mean(-(1 - e) * np.log(sigma(beta * H)) - e * np.log(sigma(-beta * H))),
        "ipo": np.mean((H - 1 / (2 * beta)) ** 2),
        "sft": np.mean(-LOG_PROBS[:, 0]),
    }
    for name, value in expected.items():
        learner = make_learner(loss=name, beta=beta, label_smoothing=e)
        loss, metrics = learner.objective(torch.tensor(LOG_PROBS), torch.tensor(REFERENCE))
        assert float(loss) == pytest.approx(value, rel=1e-9)
        assert float(metrics["loss"]) == pytest.approx(value, rel=1e-9)


@pytest.mark.equation(7)
def test_implied_rewards_and_what_the_weighted_gradient_weighs():
    _, metrics = make_learner(beta=0.5).objective(torch.tensor(LOG_PROBS), torch.tensor(REFERENCE))
    expected = {
        "reward/chosen": 0.5 * RATIOS[:, 0].mean(),
        "reward/rejected": 0.5 * RATIOS[:, 1].mean(),
        "reward/margin": 0.5 * H.mean(),
        "reward/accuracy": 1 / 3,
        "policy/weight": sigma(-0.5 * H).mean(),
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-6), name
        assert not metrics[name].requires_grad


@pytest.mark.equation(3, 4, 5)
def test_known_numbers():
    assert loss_of(0.0) == pytest.approx(math.log(2))
    assert loss_of(10.0) == pytest.approx(0.313262, abs=1e-6)  # -log sigma(1)
    for e in (0.0, 0.3, 1.0):
        assert loss_of(0.0, loss="cdpo", label_smoothing=e) == pytest.approx(math.log(2))
    assert loss_of(0.0, loss="ipo") == pytest.approx(25)
    assert loss_of(5.0, loss="ipo") == pytest.approx(0)
    assert loss_of(3.0, loss="cdpo", label_smoothing=0.0) == pytest.approx(loss_of(3.0))


@pytest.mark.equation(3)
def test_the_gradient_on_log_probabilities():
    log_probs = torch.tensor(LOG_PROBS, requires_grad=True)
    loss, _ = make_learner(beta=0.5).objective(log_probs, torch.tensor(REFERENCE))
    loss.backward()
    weight = 0.5 * sigma(-0.5 * H) / 3
    np.testing.assert_allclose(log_probs.grad, np.stack([-weight, weight], 1), rtol=1e-9)


def test_the_reference_is_the_model_given_and_the_start_is_ln_2():
    learner = make_learner()
    loss, metrics = learner.preference_loss(three_pairs(learner))
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    for name in ("reward/chosen", "reward/rejected", "reward/margin"):
        assert float(metrics[name]) == pytest.approx(0, abs=1e-6)
    zero = torch.zeros(1, 2, requires_grad=True)
    loss, metrics = learner.objective(zero, torch.zeros(1, 2))
    loss.backward()
    assert zero.grad.tolist() == [[pytest.approx(-0.05), pytest.approx(0.05)]]
    assert float(metrics["reward/accuracy"]) == 0


def test_sft_looks_at_no_rejected_response():
    gradients = []
    for worse in ([10], [15, 15]):
        torch.manual_seed(0)
        learner = make_learner(loss="sft")
        batch = script.gather([[TEXTS[0], (TEXTS[0][0], worse)]], torch.zeros(1, 2), torch.arange(1), "cpu")
        learner.preference_loss(batch)[0].backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in learner.trained]))
    np.testing.assert_allclose(*gradients, atol=1e-6)


# ------------------------------------------------ LoRA ------------------------------------------------


@pytest.mark.equation(8)
def test_lora_by_hand_and_merged():
    torch.manual_seed(0)
    base = torch.nn.Linear(5, 3)
    layer, x = script.LoRALinear(base, 2, 6.0), torch.randn(4, 5)
    assert torch.equal(layer(x), base(x))  # exactly: B is 0
    with torch.no_grad():
        layer.lora_b.normal_()
    w, a, b = (part.detach().double().numpy() for part in (base.weight, layer.lora_a, layer.lora_b))
    expected = x.double().numpy() @ (w + 6 / 2 * b @ a).T + base.bias.detach().double().numpy()
    np.testing.assert_allclose(layer(x).detach(), expected, atol=1e-5)
    merged = script.merge_lora(torch.nn.Sequential(layer))
    assert merged[0] is base
    np.testing.assert_allclose(merged(x).detach(), expected, atol=1e-5)


@pytest.mark.equation(8)
def test_lora_changes_nothing_at_first_trains_few_and_freezes_the_rest():
    learner, tokens = make_learner(), torch.tensor([[3, 4, 7, 9]])
    assert torch.equal(learner.policy.model(tokens).logits, tiny_model()(tokens).logits)
    of_layers = [(16, 16), (16, 8), (16, 8), (16, 16)]  # in, out of q, k, v, o
    assert sum(weight.numel() for weight in learner.trained) == 2 * sum(2 * (i + o) for i, o in of_layers)
    batch = three_pairs(learner)
    before = {name: weight.clone() for name, weight in learner.policy.named_parameters()}
    for _ in range(3):
        learner.update(batch)
    for name, weight in learner.policy.named_parameters():
        trained = "lora_" in name
        assert weight.requires_grad is trained
        assert trained or weight.grad is None
        assert torch.equal(weight, before[name]) is not trained, name
    assert torch.equal(learner.policy.reference(tokens).logits, tiny_model()(tokens).logits)
    assert not torch.equal(learner.policy.model(tokens).logits, tiny_model()(tokens).logits)
    found = learner.policy.model(tokens).logits
    np.testing.assert_allclose(
        script.merge_lora(learner.policy.model)(tokens).logits.detach(), found.detach(), atol=1e-5)


def test_lora_counts_of_known_models():
    """GPT-2's joint layer of q, k and v at rank 16, and SmolLM2's attention."""
    with torch.device("meta"):
        layer = script.LoRALinear(torch.nn.Linear(768, 2304), 16, 32.0)
        config = transformers.LlamaConfig(
            vocab_size=8, hidden_size=576, intermediate_size=8, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3)
        model = transformers.LlamaForCausalLM(config)
        script.add_lora(model, [*LAYERS], 16, 32.0)
    assert sum(part.numel() for part in layer.parameters() if part.requires_grad) == 49_152
    found = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert found == 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192)) == 1_843_200


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_with_rank_0_and_a_reference_that_stays(tied):
    learner = make_learner(tiny_model(tied=tied), lora_rank=0)
    wanted = sum(weight.numel() for weight in tiny_model(tied=tied).parameters())
    assert sum(weight.numel() for weight in learner.trained) == wanted
    learner.update(three_pairs(learner))
    tokens = torch.tensor([[3, 4, 7, 9]])
    was = tiny_model(tied=tied)(tokens).logits
    assert torch.equal(learner.policy.reference(tokens).logits, was)
    assert not torch.equal(learner.policy.model(tokens).logits, was)
    state = {name: value.clone() for name, value in learner.policy.state_dict().items()}
    assert not any("reference" in name for name in state)
    again = make_learner(tiny_model(tied=tied), lora_rank=0)
    again.policy.load_state_dict(state)
    assert torch.equal(again.policy.model(tokens).logits, learner.policy.model(tokens).logits)
    assert torch.equal(again.policy.reference(tokens).logits, was)


def test_an_unknown_layer_is_named():
    with pytest.raises(script.UserError, match=r"no linear layer qkv: .*down_proj.*q_proj"):
        make_learner(lora_layers="q_proj qkv")


# ------------------------------------------------ the update ------------------------------------------------


def test_parts_of_a_batch_add_up():
    weights = []
    for size in (16, 2, 1):
        torch.manual_seed(0)
        learner = make_learner(micro_batch_size=size, actor_lr=0.01)
        disturb(learner)
        batch = three_pairs(learner)
        metrics = torch.stack([value.detach() for value in learner.update(batch).values()])
        weights.append((torch.cat([weight.detach().flatten() for weight in learner.trained]), metrics))
    for one, other in (weights[:2], weights[::2]):
        np.testing.assert_allclose(one[0], other[0], atol=2e-4)
        np.testing.assert_allclose(one[1], other[1], atol=1e-4)


def test_adam_warm_up_and_no_dropout():
    """Adam's first step is as long as its rate, whatever the gradient; rates rise to it along a line."""
    learner = make_learner(lora_rank=0, warmup_updates=3, actor_lr=0.01)
    batch, rates = three_pairs(learner), []
    before = [weight.clone() for weight in learner.trained]
    for update in range(5):
        rates.append(learner.optimizer.param_groups[0]["lr"])
        learner.update(batch)
        if update == 0:
            steps = torch.cat([(w - b).abs().flatten() for w, b in zip(learner.trained, before)])
            moved = steps[steps > 0]
            assert float(moved.median()) == pytest.approx(0.01 / 4, rel=1e-3)
    assert rates == [pytest.approx(0.01 * share) for share in (0.25, 0.5, 0.75, 1, 1)]
    assert not any(module.training for module in learner.policy.model.modules())


def test_long_gradients_are_cut():
    learner = make_learner(lora_rank=0, gradient_norm=0.01, loss="ipo")
    norm = learner.update(three_pairs(learner))["policy/gradient_norm"]
    assert float(norm) > 1  # before it was cut
    cut = torch.stack([weight.grad.norm() for weight in learner.trained]).norm()
    assert float(cut) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "ipo", "sft"])
def test_learns_what_it_is_told(loss):
    learner = make_learner(loss=loss, actor_lr=0.02)
    batch, chosen = three_pairs(learner), TEXTS[::2]
    before = learner.log_probs(chosen).mean()
    for _ in range(40):
        metrics = learner.update(batch)
    if loss == "sft":
        assert float(learner.log_probs(chosen).mean()) > float(before) + 1
    else:
        assert float(metrics["reward/accuracy"]) == 1
    if loss == "ipo":  # whose gap has an aim: 1 / (2 beta)
        assert float(metrics["reward/margin"]) == pytest.approx(0.5, abs=0.15)


# ------------------------------------------------ data ------------------------------------------------


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


PAIRS = [
    {"prompt": "the film was", "chosen": " good", "rejected": " very bad"},
    {"prompt": "the food is", "chosen": " very great", "rejected": " awful"},
    {"prompt": "the hotel was", "chosen": " great", "rejected": " not good"},
]


def encoded(rows: list[dict], **fields) -> list:
    config = script.Config(**{"append_eos": False} | fields)
    return script.encode_pairs([row | {"where": "file, line 1"} for row in rows], tiny_tokenizer(), config)


def test_texts_become_tokens_and_the_end_is_appended_if_wanted():
    (pair,) = encoded(PAIRS[:1])
    assert pair == [([3, 4, 7], [9]), ([3, 4, 7], [11, 10])]
    (pair,) = encoded(PAIRS[:1], append_eos=True)
    assert pair == [([3, 4, 7], [9, 0]), ([3, 4, 7], [11, 10, 0])]


def test_messages_go_through_the_models_template():
    said, asked = [{"role": "assistant", "content": "good"}], [{"role": "user", "content": "film"}]
    expected = [([3, 4, 8], [9]), ([3, 4, 8], [11, 10])]  # the template puts "the" before, "is" behind
    worse = [{"role": "assistant", "content": "very bad"}]
    assert encoded([{"prompt": asked, "chosen": said, "rejected": worse}]) == [expected]
    assert encoded([{"prompt": "film", "chosen": asked + said, "rejected": asked + worse}]) == [expected]
    with pytest.raises(script.UserError, match="line 1 is no prompt with two responses"):
        encoded([{"prompt": asked, "chosen": [{"role": "assistant"}], "rejected": worse}])


def test_of_a_pair_too_long_the_prompt_loses_its_beginning_first(capsys):
    row = {"prompt": "the film was very very good", "chosen": " good", "rejected": " not very good"}
    (pair,) = encoded([row], max_length=7)
    assert pair == [([7, 11, 11, 9], [9]), ([7, 11, 11, 9], [12, 11, 9])]
    assert "1 pairs, 1 cut to 7 tokens" in capsys.readouterr().out
    (pair,) = encoded([row], max_length=4)
    assert pair == [([11, 9], [9]), ([11, 9], [12, 11])]
    encoded([row], max_length=9)
    assert "1 pairs, 0 cut" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is no object"),
        ('{"prompt": "a", "chosen": "b"}', "line 2: rejected is missing or empty"),
        ('{"prompt": "a", "chosen": " ", "rejected": "c"}', "line 2: chosen is missing or empty"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', "line 2: rejected is missing or empty"),
        ('{"prompt": [], "chosen": "b", "rejected": "c"}', "line 2: prompt is missing or empty"),
    ],
)
def test_a_line_at_fault_is_named(tmp_path, line, message):
    file = write_rows(tmp_path / "a.jsonl", PAIRS[:1])
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(script.UserError, match=message):
        script.read_rows(file, script.PAIR)


def test_empty_files_blank_lines_and_ends_of_lines_within(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [PAIRS[0] | {"chosen": "good\u2028very"}])
    file.write_text(file.read_text() + "\n")
    assert [row["chosen"] for row in script.read_rows(file, script.PAIR)] == ["good\u2028very"]
    file.write_text("\n")
    with pytest.raises(script.UserError, match="is empty"):
        script.read_rows(file, script.PAIR)
    with pytest.raises(script.UserError, match=r"cannot read .*sentiment\.py makes data/sentiment"):
        script.read_rows(tmp_path / "b.jsonl", script.PAIR)


# ------------------------------------------------ runs ------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    save_model(folder / "model")
    for name in ("train", "test"):
        write_rows(folder / f"{name}.jsonl", PAIRS)
    write_rows(folder / "prompts.jsonl", [{"prompt": "the film was"}, {"prompt": "the good hotel is"}])
    return folder


def options(place, **fields) -> list[str]:
    files = {"dataset": place / "train.jsonl", "test_dataset": place / "test.jsonl", "model": place / "model"}
    files |= {"prompts": place / "prompts.jsonl", "output_dir": place / "runs"}
    rhythm = {"updates": 6, "eval_every": 3, "log_every": 2, "checkpoint_every": 2, "warmup_updates": 2}
    sizes = {"batch_size": 4, "micro_batch_size": 3, "eval_samples": 5, "new_tokens": 3, "actor_lr": 0.01}
    plain = {"device": "cpu", "threads": 1, "precision": "highest", "wandb_mode": "disabled", "lora_rank": 2}
    return [f"--{name}={value}" for name, value in (files | rhythm | sizes | plain | fields).items()]


def go(place, **fields):
    script.train(script.parse_config(options(place, **fields)))
    torch.set_flush_denormal(False)
    return place / "runs/language/dpo" / place.name / "train" / fields.get("variant", "default") / "seed-0"


@pytest.fixture(scope="module")
def finished(place):
    torch.set_num_threads(1)
    return go(place)


def test_a_run_and_what_it_leaves(finished, place, capsys):
    table = pd.read_csv(finished / "metrics.csv").set_index("update")
    assert [*table.index] == [0, 2, 3, 4, 6]
    assert table["eval/loss"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert table["eval/kl"][0] == pytest.approx(0, abs=1e-5)
    assert record(finished)["status"] == "finished"
    assert "eval/accuracy" in record(finished)["result"]
    assert "transformers" in record(finished)["versions"]
    assert (finished / "checkpoint.pt").stat().st_size < 60_000  # the model's own weights are not in it
    go(place)
    assert "is finished: eval/loss" in capsys.readouterr().out


@pytest.mark.equation(9)
def test_kl_is_the_mean_log_ratio_of_the_continuations(finished):
    policy, file = script.load(finished), finished / "samples-000006.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 10
    tokens = [[tiny_tokenizer()(row[name])["input_ids"] for name in ("prompt", "response")] for row in rows]
    whole = [number for number, (_, y) in enumerate(tokens) if len(y) == 3]  # no end or padding in them
    assert whole
    for number in whole:
        x, y = tokens[number]
        expected = exact(policy.policy.model, x, y) - exact(tiny_model(), x, y)
        assert rows[number]["log_ratio"] == pytest.approx(expected, abs=1e-4)
    table = pd.read_csv(finished / "metrics.csv").set_index("update")
    assert table["eval/kl"][6] == pytest.approx(np.mean([row["log_ratio"] for row in rows]), abs=1e-5)


@pytest.mark.equation(9)
def test_kl_is_the_exact_one_of_one_word():
    learner, x = make_learner(new_tokens=1, micro_batch_size=500), [3, 4, 7]
    disturb(learner)
    drawn = learner.draw([x] * 4000, (0,))
    ratios = learner.log_probs([(x, y) for y in drawn]) - learner.log_probs([(x, y) for y in drawn], True)
    p = np.exp([exact(learner.policy.model, x, [word]) for word in range(len(WORDS))])
    q = np.exp([exact(tiny_model(), x, [word]) for word in range(len(WORDS))])
    kl = (p * np.log(p / q)).sum()
    assert kl > 0.05
    assert float(ratios.mean()) == pytest.approx(kl, abs=4 * float(ratios.std()) / 4000**0.5)


@pytest.mark.parametrize("rank", [2, 0])
def test_stopped_and_resumed_it_is_the_same_run(place, monkeypatch, sigint, rank):  # noqa: F811
    whole = go(place, variant=f"whole-{rank}", lora_rank=rank)
    with monkeypatch.context() as patch:
        at_update(script, patch, 3, stop)
        with pytest.raises(KeyboardInterrupt):
            go(place, variant=f"parts-{rank}", lora_rank=rank)
    assert record(whole.parents[1] / f"parts-{rank}/seed-0")["status"] == "running"
    parts = go(place, variant=f"parts-{rank}", lora_rank=rank)
    assert equal(checkpoint(whole), checkpoint(parts))
    tables = [pd.read_csv(folder / "metrics.csv").drop(columns=SPEED) for folder in (whole, parts)]
    pd.testing.assert_frame_equal(*tables)
    names = {file.name for file in whole.glob("samples-*")}
    assert names == {"samples-000000.jsonl", "samples-000003.jsonl", "samples-000006.jsonl"}
    for name in (*names, "reference.pt"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_the_reference_is_calculated_once(place, monkeypatch):
    asked = []
    of_reference = script.DPO.log_probs

    def counted(learner, texts, of_reference_=False, **named):
        asked.append(named.get("of_reference", of_reference_))
        return of_reference(learner, texts, asked[-1])

    monkeypatch.setattr(script.DPO, "log_probs", counted)
    learner = make_learner()
    run = types.SimpleNamespace(folder=place, write=lambda name, content: (place / name).write_bytes(content))
    pairs = [TEXTS[0:2], TEXTS[2:4]]
    first = script.reference_of(pairs, learner, run, "a")
    assert torch.equal(script.reference_of(pairs, learner, run, "a"), first)
    assert asked == [True]
    assert script.reference_of(pairs[:1], learner, run, "a").shape == (1, 2)  # other pairs
    script.reference_of(pairs[:1], learner, run, "b")  # another model
    assert asked == [True] * 3


def test_load_continues_prompts(finished):
    policy = script.load(finished)
    assert policy.updates == 6
    texts = policy.act(["the film was", "the food is"], seed=3)
    assert len(texts) == 2
    assert texts == policy.act(["the film was", "the food is"], seed=3)
    assert any(policy.act(["the film was"] * 20, seed=4)[n] != texts[0] for n in range(20))


def test_runs_without_held_out_pairs_or_prompts(place):
    folder = go(place, variant="bare", test_dataset="null", prompts="null")
    assert record(folder)["result"] == "not evaluated"
    assert not list(folder.glob("samples-*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "ppo"}, "loss: ppo is not dpo, cdpo, ipo or sft"),
        ({"max_length": 1}, "max_length"),
        ({"dataset": "nowhere"}, "cannot read data/nowhere.jsonl"),
        ({"model": "models/nowhere"}, "make language brings"),
        ({"lora_layers": "qkv"}, "no linear layer qkv"),
    ],
)
def test_errors_are_one_line(place, monkeypatch, capsys, fields, message):
    monkeypatch.setattr(sys, "argv", ["dpo.py", *options(place, variant="wrong", **fields)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        script.main(script.train)
    torch.set_flush_denormal(False)
    err = capsys.readouterr().err
    assert (end.value.code, err.count("\n")) == (2, 1)
    assert message in err
    assert not list((place / "runs").rglob("wrong/*/*"))


def test_a_missing_package_is_one_line(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(script.UserError, match="make language brings transformers"):
        go(place, variant="wrong")


def test_the_pages_block_continues_prompts_and_saves_a_model(finished, tmp_path, monkeypatch, capsys):
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/language.md").read_text(), re.DOTALL)
    text, count = re.subn(r'load\("results/runs/.+?"\)', f"load({str(finished)!r})", text)
    assert count == 1
    (tmp_path / "algorithms").symlink_to(ROOT / "algorithms")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "block.py").write_text(text)
    runpy.run_path("block.py")
    assert len(ast.literal_eval(capsys.readouterr().out)) == 2
    assert transformers.AutoModelForCausalLM.from_pretrained("models/cheerful").config.vocab_size == 16
