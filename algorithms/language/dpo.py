"""DPO: direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290), and its kin IPO and cDPO.

Offline RL on words. A language model is the policy: the prompt x is the state, the response y the action. The
data say which of two responses was preferred; nothing is drawn in training, no reward and no value is
learned. If a policy is the best for rewards r and a price beta on KL to a reference, r is beta times the log
ratio of the two, but for a term of x. Put into Bradley and Terry's model of preferences, one loss is left.

  (1)  log pi(y|x) = sum_t log pi(y_t | x, y_1, ..., y_{t-1})           over tokens of the response alone
  (2)  h = log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x)     w: preferred, l: not
  (3)  L_dpo = -mean log sigma(beta h)                                  gradient on h: -beta sigma(-beta h)
  (4)  L_cdpo = -mean (1 - e) log sigma(beta h) + e log sigma(-beta h)  e: share of labels that are wrong
  (5)  L_ipo = mean (h - 1 / (2 beta))^2                                (Azar et al., 2023, arXiv:2310.12036)
  (6)  L_sft = -mean log pi(y_w|x)                                      imitation, beside them
  (7)  r(x, y) = beta (log pi(y|x) - log pi_ref(y|x))                   implied reward; right if r_w > r_l
  (8)  W' x = W x + (alpha / r) B A x                                   A: [r, in], B: [out, r], 0 at first
  (9)  KL = mean log pi(y|x) - log pi_ref(y|x),  y ~ pi(. | x)          on prompts that are held out

Differences from the paper: Adam for RMSprop, which was to save memory; (8), updates of low rank (Hu et al.,
2021, arXiv:2106.09685) in the attention, where the paper trains all weights (`lora_rank 0`); the reference
is the model given, not first fitted to preferred responses; batches are drawn with replacement; of a pair too
long the prompt loses its beginning first. (4) is from a note of one of the authors. (5) takes sums over
tokens, as (2) does and the DPO authors' code; later libraries take means.

  python algorithms/language/dpo.py --config_path configs/language/dpo/sentiment/train-beta-0.2.yaml
"""

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import importlib.metadata
import inspect
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import NewType, Optional
from unittest import mock

import filelock
import huggingface_hub
import numpy as np
import pandas as pd
import pyrallis
import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

Count = NewType("Count", int)  # at least 1
Size = NewType("Size", float)  # at least 0
Positive = NewType("Positive", float)  # at least a millionth
Share = NewType("Share", float)  # from 0 to 1
Precision = NewType("Precision", str)
WandbMode = NewType("WandbMode", str)


@dataclasses.dataclass
class Config:
    """DPO. Write `null` for none and true or false for a switch."""

    dataset: str = "sentiment/train"  # data/<dataset>.jsonl, or a file: lines of prompt, chosen, rejected
    test_dataset: Optional[str] = "sentiment/test"  # the same of pairs held out; null: none
    prompts: Optional[str] = "sentiment/prompts"  # lines of prompt, to be continued for (9); null: none
    seed: int = 0  # of weights, batches and continuations
    variant: str = "default"  # names these settings in the run's folder and in the tables
    model: str = "models/smollm2-135m-instruct"  # folder or hub id of a causal language model: pi_ref
    loss: str = "dpo"  # dpo, cdpo, ipo or sft: (3) to (6)
    beta: Positive = 0.1  # price of KL in (3) to (5) and (7)
    label_smoothing: Share = 0.1  # e of (4)
    lora_rank: int = 16  # r of (8); 0: all weights are trained
    lora_alpha: Size = 32.0  # alpha of (8)
    lora_layers: str = "q_proj k_proj v_proj o_proj"  # names of the linear layers that get (8)
    updates: Count = 1000  # gradient updates
    batch_size: Count = 64  # pairs in an update
    micro_batch_size: Count = 16  # pairs in a forward pass: less takes less memory
    actor_lr: Size = 1e-4  # Adam's step size, once it is warm; the paper's for all weights: 5e-7
    warmup_updates: int = 150  # updates over which the step size rises from 0, along a line
    gradient_norm: Size = 10.0  # longer gradients are cut to this length
    max_length: Count = 512  # tokens of prompt and response; what is longer is cut
    append_eos: bool = True  # a response ends with the token of the end; false where it was cut
    eval_every: Count = 100  # updates between evaluations
    eval_samples: Count = 8  # continuations of each prompt
    new_tokens: Count = 24  # longest continuation
    log_every: Count = 10  # updates between rows of metrics.csv
    checkpoint_every: Count = 100  # updates between checkpoints
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    threads: int = 0  # CPU threads; 0: torch's choice
    precision: Precision = "auto"  # of float32 matrix products; medium: the model in bfloat16
    wandb_mode: WandbMode = "offline"  # mirror of the CSV files
    wandb_project: str = "reef"  # wandb project
    output_dir: str = "results/runs"  # where run folders go


# ---------------------------------------------- DPO ----------------------------------------------


class DPO:
    """The policy beside its reference, and the update that trains it on pairs.

    A batch is a dict of tokens and response [B, 2, T], preferred first, and reference [B, 2]: log pi_ref.
    """

    def __init__(self, config: Config, model: nn.Module, tokenizer: Callable, device: torch.device):
        self.config, self.tokenizer, self.device, self.updates = config, tokenizer, device, 0
        self.policy = Policy(model, config).to(device)
        self.trained = [weight for weight in self.policy.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, config.actor_lr, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda update: min((update + 1) / (config.warmup_updates + 1), 1))

    def objective(self, log_probs: Tensor, reference: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probabilities of the responses [B, 2] under policy and reference -> the loss of these pairs."""
        c, ratios = self.config, log_probs - reference  # [B, 2]
        h = ratios[:, 0] - ratios[:, 1]  # (2) [B]
        if c.loss == "dpo":
            losses = -nn.functional.logsigmoid(c.beta * h)  # (3)
        elif c.loss == "cdpo":
            right, wrong = nn.functional.logsigmoid(c.beta * h), nn.functional.logsigmoid(-c.beta * h)
            losses = -(1 - c.label_smoothing) * right - c.label_smoothing * wrong  # (4)
        elif c.loss == "ipo":
            losses = (h - 1 / (2 * c.beta)).square()  # (5)
        else:
            losses = -log_probs[:, 0]  # (6)
        loss, rewards, h = losses.mean(), c.beta * ratios.detach(), h.detach()  # (7)
        metrics = {"loss": loss.detach(), "reward/chosen": rewards[:, 0].mean()}
        metrics |= {"reward/rejected": rewards[:, 1].mean(), "reward/margin": c.beta * h.mean()}
        metrics |= {"reward/accuracy": (h > 0).float().mean()}
        return loss, metrics | {"policy/weight": (-c.beta * h).sigmoid().mean()}

    def preference_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, response = batch["tokens"].flatten(0, 1), batch["response"].flatten(0, 1)  # [2 B, T]
        return self.objective(self.policy(tokens, response).view(-1, 2), batch["reference"])

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.updates += 1
        metrics = self.learn(batch)
        self.schedule.step()
        return metrics

    def learn(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every step of an update; gradients of its parts are added up."""
        size, sums = len(batch["tokens"]), {}
        self.optimizer.zero_grad()
        for first in range(0, size, self.config.micro_batch_size):
            part = {name: rows[first : first + self.config.micro_batch_size] for name, rows in batch.items()}
            loss, metrics = self.preference_loss(part)
            share = len(part["tokens"]) / size
            (share * loss).backward()
            sums = {name: sums.get(name, 0) + share * value for name, value in metrics.items()}
        norm = nn.utils.clip_grad_norm_(self.trained, self.config.gradient_norm)
        self.optimizer.step()
        return sums | {"policy/gradient_norm": norm}

    @torch.inference_mode()
    def log_probs(self, texts: list[tuple], of_reference: bool = False) -> Tensor:
        """log pi(y|x) [N] of N texts, each of tokens of x and of y; or that of the reference."""
        size, parts = 2 * self.config.micro_batch_size, []
        for first in range(0, len(texts), size):
            tokens, response = stack_texts(texts[first : first + size], self.device)
            parts.append(self.policy(tokens, response, of_reference))
        return torch.cat(parts)

    def draw(self, prompts: list[list[int]], seed: tuple) -> list[list[int]]:
        """A continuation of each prompt, as tokens."""
        c, end = self.config, self.tokenizer.eos_token_id
        with self.policy.autocast():
            return continue_prompts(
                self.policy.model, prompts, c.new_tokens, end, 4 * c.micro_batch_size, seed)

    def act(self, prompts: list[str], seed: int = 0) -> list[str]:
        """A continuation of each prompt, drawn by `seed`."""
        drawn = self.draw([encode_prompt(prompt, self.tokenizer) for prompt in prompts], (seed,))
        return [self.tokenizer.decode(response, skip_special_tokens=True) for response in drawn]


# -------------------------------------------- Networks --------------------------------------------


class Policy(nn.Module):
    """A causal language model that learns, beside what it was: its reference."""

    def __init__(self, model: nn.Module, config: Config):
        super().__init__()
        self.bfloat16 = config.precision == "medium"
        shared = {}  # with (8) the weights stay as they are, and serve both
        if config.lora_rank:
            shared = {id(weight): weight for weight in model.parameters()}
        self.reference = copy.deepcopy(model, shared).requires_grad_(False).eval()
        self.model = model.eval()  # without dropout, in training too
        if config.lora_rank:
            add_lora(model, config.lora_layers.split(), config.lora_rank, config.lora_alpha)

    def autocast(self) -> torch.autocast:
        return torch.autocast(next(self.parameters()).device.type, torch.bfloat16, enabled=self.bfloat16)

    def forward(self, tokens: Tensor, response: Tensor, of_reference: bool = False) -> Tensor:
        """tokens [B, T], response [B, T]: 1 at tokens of y -> log pi(y|x) [B]. Padding is on the right."""
        model = self.reference if of_reference else self.model
        with self.autocast():
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]  # [B, T - 1, V] of the next
        following = tokens[:, 1:]
        surprise = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), following.flatten(), reduction="none")
        return -(surprise.view(following.shape) * response[:, 1:]).sum(1)  # (1)

    def state_dict(self, *arguments, **options) -> dict[str, Tensor]:
        """Of what is trained alone: the rest is in the model's folder."""
        trained = {name for name, weight in self.named_parameters() if weight.requires_grad}
        state = super().state_dict(*arguments, **options)
        return {name: value for name, value in state.items() if name in trained}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(super().state_dict() | state)


class LoRALinear(nn.Module):
    """A frozen linear layer [..., in] -> [..., out] and what is learned beside it, of rank r: 0 at first."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as torch makes a linear layer's

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.lora_a.T @ self.lora_b.T)  # (8)


def add_lora(model: nn.Module, names: list[str], rank: int, alpha: float) -> None:
    """Puts a LoRALinear for each linear layer with one of these names; the model's own weights are frozen."""
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    known = {name.rpartition(".")[2] for name in linear}
    for name in names:
        if name not in known:
            raise UserError(f"lora_layers: the model has no linear layer {name}: {', '.join(sorted(known))}")
    model.requires_grad_(False)
    for path, layer in linear.items():
        parent, _, name = path.rpartition(".")
        if name in names:
            setattr(model.get_submodule(parent), name, LoRALinear(layer, rank, alpha))


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """The model with (8) written into its weights: an ordinary one, which `save_pretrained` can write."""
    for path, layer in [*model.named_modules()]:
        if isinstance(layer, LoRALinear):
            layer.base.weight += layer.scale * layer.lora_b @ layer.lora_a
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.base)
    return model


# ------------------------------------ From the dataset to the score ------------------------------------


def train(config: Config) -> None:
    """All that this script does, in order; what the run's folder already holds is not done again."""
    check_settings(config)
    file = find_file(config.dataset)
    run = Run(config, "/".join(file.with_suffix("").parts[-2:]))
    if run.info.get("status") == "finished":
        print(f"{run.folder} is finished: {run.info['result']}")
        return

    device = set_up_torch(config)
    rows = read_rows(file, PAIR)
    held = read_rows(find_file(config.test_dataset), PAIR) if config.test_dataset else []
    prompts = read_rows(find_file(config.prompts), PAIR[:1]) if config.prompts else []
    model, tokenizer = load_language_model(config.model)
    pairs, held = encode_pairs(rows, tokenizer, config), encode_pairs(held, tokenizer, config)
    prompts = [encode_prompt(row["prompt"], tokenizer)[-config.max_length :] for row in prompts]
    facts = provenance(device) | {"model_hash": weights_hash(model)}
    facts["versions"]["transformers"] = importlib.metadata.version("transformers")
    facts["dataset_hash"] = hashlib.sha256(file.read_bytes()).hexdigest()

    learner = DPO(config, model, tokenizer, device)
    with run.start(learner, **facts):
        reference = reference_of(pairs + held, learner, run, facts["model_hash"])
        of_pairs, of_held = reference[: len(pairs)], reference[len(pairs) :]
        if learner.updates == 0:  # what there is to compare with
            run.log(0, evaluate_words(learner, held, of_held, prompts, run))
        numbers = {"rows": torch.arange(len(pairs))}
        batches = draw_batches(numbers, config.batch_size, config.seed, learner.updates)
        numbers = range(learner.updates + 1, config.updates + 1)
        for update in tqdm(numbers, initial=learner.updates, total=config.updates, disable=None):
            metrics = learner.update(gather(pairs, of_pairs, next(batches)["rows"], device))
            if run.is_due(update, config.log_every):
                run.log(update, metrics)
            if run.is_due(update, config.eval_every):
                run.log(update, evaluate_words(learner, held, of_held, prompts, run))
            run.save_when_due(learner)
        end_run(run)


def load(folder: str, device: str = "cpu") -> DPO:
    """The policy of a run: `load(folder).act(["The film was"])` continues prompts."""
    config = parse_config([f"--config_path={folder}/config.yaml"])
    learner = DPO(config, *load_language_model(config.model), torch.device(device))
    restore(learner, read_saved(Path(folder, "checkpoint.pt")))
    return learner


# ----------------------------------- Data: from lines to batches -----------------------------------


PAIR = ("prompt", "chosen", "rejected")


def check_settings(config: Config) -> None:
    """What the fields' types do not say."""
    if config.loss not in ("dpo", "cdpo", "ipo", "sft"):
        raise UserError(f"loss: {config.loss} is not dpo, cdpo, ipo or sft")
    if config.max_length < 2:
        raise UserError("max_length: a prompt and a response take at least 2 tokens")


def find_file(name: str) -> Path:
    """The file of this name, else data/<name>.jsonl."""
    file = Path(name)
    return file if file.suffix == ".jsonl" else Path("data", f"{name}.jsonl")


def read_rows(file: Path, keys: tuple[str, ...]) -> list[dict]:
    """The JSON objects of a file, one a line, each checked; `where` is their place, for errors."""
    advice = "algorithms/collect/sentiment.py makes data/sentiment; or name a file that ends in .jsonl"
    with explain(f"cannot read {file}", advice):
        lines = file.read_text(encoding="utf-8").split("\n")  # within JSON there are other ends of lines
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        with explain(f"{where} is not JSON", "write an object a line"):
            row = json.loads(line)
        if not isinstance(row, dict):
            raise UserError(f"{where} is no object: write {', '.join(keys)} with their names")
        for key in keys:
            value = row.get(key)
            if not isinstance(value, (str, list)) or not value or not f"{value}".strip():
                raise UserError(f"{where}: {key} is missing or empty; give a text, or messages")
        rows.append(row | {"where": where})
    if not rows:
        raise UserError(f"{file} is empty: write {', '.join(keys)} a line")
    return rows


def encode_prompt(prompt: str | list, tokenizer: Callable) -> list[int]:
    """Tokens of a text, or of messages (a list of role and content) by the model's own template."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)


def encode_pairs(rows: list[dict], tokenizer: Callable, config: Config) -> list[list[tuple]]:
    """Each row as two texts, the preferred one first, each the tokens of x and of y, cut to `max_length`."""
    pairs, too_long, end = [], 0, [tokenizer.eos_token_id] * config.append_eos
    for row in rows:
        prompt, responses = row["prompt"], [row["chosen"], row["rejected"]]
        with explain(f"{row['where']} is no prompt with two responses", "give texts, or messages"):
            if isinstance(prompt, str) and isinstance(responses[0], list):
                prompt = [{"role": "user", "content": prompt}]
            texts = [text if isinstance(text, str) else text[-1]["content"] for text in responses]
            x = encode_prompt(prompt, tokenizer)
            ys = [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in texts]
        if not x or not all(ys):
            raise UserError(f"{row['where']}: prompt or response has no tokens; give a text")
        longest = max(map(len, ys))
        too_long += len(x) + longest > config.max_length
        x = x[-max(config.max_length - longest, config.max_length // 2) :]
        pairs.append([(x, y[: config.max_length - len(x)]) for y in ys])
    if rows:
        file = rows[0]["where"].rpartition(",")[0]
        print(f"{file}: {len(rows):,} pairs, {too_long:,} cut to {config.max_length} tokens")
    return pairs


def stack_texts(texts: list[tuple], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [N, T] of N texts, padded on the right, and 1 at those of y."""
    length = max(len(x) + len(y) for x, y in texts)
    tokens = [[*x, *y] + [0] * (length - len(x) - len(y)) for x, y in texts]
    response = [[0] * len(x) + [1] * len(y) + [0] * (length - len(x) - len(y)) for x, y in texts]
    return torch.tensor(tokens).to(device), torch.tensor(response).to(device)


def gather(pairs: list[list[tuple]], reference: Tensor, rows: Tensor, device: torch.device) -> dict:
    """The batch of these rows [B]."""
    tokens, response = stack_texts([text for row in rows.tolist() for text in pairs[row]], device)
    batch = {"tokens": tokens.view(len(rows), 2, -1), "response": response.view(len(rows), 2, -1)}
    return batch | {"reference": reference[rows.to(device)]}


def weights_hash(model: nn.Module) -> str:
    """By which a model's weights are known again."""
    digest = hashlib.sha256()
    for weight in model.parameters():
        digest.update(weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def reference_of(pairs: list[list[tuple]], learner: DPO, run: "Run", model_hash: str) -> Tensor:
    """log pi_ref(y|x) [N, 2] of the pairs: calculated once, and kept in the run's folder."""
    file, told = run.folder / "reference.pt", json.dumps([pairs, model_hash, learner.config.precision])
    key = hashlib.sha256(told.encode()).hexdigest()
    if file.exists():
        with explain(f"cannot read {file}", "remove it, and it is made anew"):
            saved = torch.load(file, map_location=learner.device, weights_only=True)
        if saved["key"] == key:
            return saved["log_probs"]
    log_probs = learner.log_probs([text for pair in pairs for text in pair], of_reference=True).view(-1, 2)
    buffer = io.BytesIO()
    torch.save({"key": key, "log_probs": log_probs}, buffer)
    run.write("reference.pt", buffer.getvalue())
    return log_probs


# --------------------------- Evaluation: held-out pairs and continuations ---------------------------


def evaluate_words(learner: DPO, held: list, reference: Tensor, prompts: list, run: "Run") -> dict:
    """Loss and accuracy on held-out pairs, and KL on prompts; their continuations go into the folder."""
    metrics, config = {}, learner.config
    if held:
        log_probs = learner.log_probs([text for pair in held for text in pair]).view(-1, 2)
        loss, found = learner.objective(log_probs, reference)
        metrics = {"eval/loss": loss, "eval/accuracy": found["reward/accuracy"]}
        metrics |= {"eval/margin": found["reward/margin"]}
    if prompts:
        asked = [prompt for prompt in prompts for _ in range(config.eval_samples)]
        drawn = learner.draw(asked, (config.seed, learner.updates, 0))
        texts = list(zip(asked, drawn))
        ratios = learner.log_probs(texts) - learner.log_probs(texts, of_reference=True)
        metrics |= {"eval/kl": ratios.mean()}  # (9)
        lines = []
        for (prompt, response), ratio in zip(texts, ratios.tolist()):
            words = [learner.tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, response)]
            lines.append(json.dumps({"prompt": words[0], "response": words[1], "log_ratio": ratio}) + "\n")
        run.write(f"samples-{learner.updates:06}.jsonl", "".join(lines).encode())
    return metrics


def end_run(run: "Run") -> None:
    """Notes what the run came to: its last evaluation."""
    table = pd.DataFrame(run.metrics.values())
    known = {name: value for name, value in run.metrics[run.config.updates].items() if "eval/" in name}
    result = ", ".join(f"{name} {value:.3f}" for name, value in known.items()) or "not evaluated"
    speed = table.get("time/updates_per_second", pd.Series([math.nan])).median()
    seconds = time.perf_counter() - run.began
    run.note(status="finished", result=result, wall_seconds=seconds, updates_per_second=speed)
    print(f"{run.folder}: {result}")


# -------------------- Toolbox: the same in every script that has it, word for word --------------------


def load_language_model(name: str) -> tuple[nn.Module, Callable]:
    """A causal language model in float32 and its tokenizer, from a folder or the hub."""
    advice = "make language brings transformers and models/smollm2-135m-instruct"
    with explain(f"model: cannot load {name}", advice):
        import transformers  # takes seconds, and not everyone has it

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        cached = partial(huggingface_hub.try_to_load_from_cache, name, "config.json")
        if not Path(name).is_dir() and not cached():  # ask once: its client would for half a minute
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=4)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    return model, tokenizer


@torch.inference_mode()
def continue_prompts(
    model: nn.Module, prompts: list[list[int]], new_tokens: int, end: int, batch_size: int, seed: tuple
) -> list[list[int]]:
    """A continuation of each prompt, both as tokens: drawn from the model's probabilities, up to `end`."""
    device = next(model.parameters()).device
    number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    generator, drawn = torch.Generator(device).manual_seed(number), []
    for first in tqdm(range(0, len(prompts), batch_size), disable=None, leave=False):
        batch = prompts[first : first + batch_size]
        width = max(map(len, batch))
        padding = [[0] * (width - len(prompt)) for prompt in batch]  # on the left
        tokens = torch.tensor([left + prompt for left, prompt in zip(padding, batch)], device=device)
        mask = torch.tensor([left + [1] * len(prompt) for left, prompt in zip(padding, batch)], device=device)
        rows, memory = [], None  # of the tokens before: keys and values
        for _ in range(new_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            output = model(input_ids=tokens, attention_mask=mask, position_ids=positions,
                           cache=memory, use_cache=True)
            memory = output.cache
            probabilities = output.logits[:, -1].float().softmax(-1)  # [B, V]
            tokens = torch.multinomial(probabilities, 1, generator=generator)  # [B, 1]
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            rows.append(tokens)
        drawn += [row[: row.index(end) + 1] if end in row else row for row in torch.cat(rows, 1).tolist()]
    return drawn


def set_up_torch(config: Config) -> torch.device:
    """Seeds torch, sets its threads and precision, and finds the device."""
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.set_flush_denormal(True)  # Adam's moments of idle weights end in denormals: slow to compute with
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    cpu = torch.cpu.get_capabilities()  # medium is oneDNN's products there; AMX alone rounds them
    best = "medium" if auto == "cpu" and cpu.get("avx512_bw") and not cpu.get("amx_bf16") else "highest"
    torch.set_float32_matmul_precision(best if config.precision == "auto" else config.precision)
    with explain(f"device: cannot use {config.device}", "see --device"):
        return torch.zeros(1, device=auto if config.device == "auto" else config.device).device


def leaves(tree) -> list:
    """The entries of a Dict in the order of its sorted keys, however deep; anything else is its own leaf."""
    if isinstance(tree, Mapping):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [tree]


def draw_batches(data: dict[str, Tensor], batch_size: int, seed: int, update: int) -> Iterator[dict]:
    """Batches `update`, `update` + 1, ...: rows drawn with replacement, by seed and batch number alone."""
    first = next(iter(data.values()))
    while True:
        block, start = divmod(update, 1000)  # the rows of 1000 batches are drawn at a time
        rows = np.random.default_rng((seed, block)).integers(len(first), size=(1000, batch_size))
        for batch_rows in torch.as_tensor(rows, device=first.device)[start:]:
            yield {name: column.index_select(0, batch_rows) for name, column in data.items()}
        update += 1000 - start


# ------------------------- The run: its folder, its record and its checkpoint -------------------------


class Run:
    """The folder of one run, its lock, record and checkpoint (docs/runs.md)."""

    # These do not change the outcome: a run goes on although they differ.
    FREE = ("device", "threads", "log_every", "checkpoint_every", "wandb_mode", "wandb_project", "output_dir")

    def __init__(self, config: Config, source: str):
        script = Path(__file__).resolve()
        self.config, self.group = config, f"{script.stem}/{source}/{config.variant}"
        if ".." in Path(self.group).parts or "/" in config.variant or config.variant in ("", "."):
            raise UserError(f"{self.group} would lead out of its folder: mend the variant or the dataset")
        self.folder = Path(config.output_dir, script.parent.name, self.group, f"seed-{config.seed}")
        self.lock = filelock.FileLock(self.folder / "lock", timeout=0)
        self.metrics, self.evaluations = {}, []  # rows of the CSV files, those of metrics by their update
        self.wandb, self.interrupted = None, False
        self.info = self.read_info()

    def read_info(self) -> dict:
        """run.json of earlier starts, if this run may go on from them; empty before the first."""
        if not (self.folder / "run.json").exists():
            return {}
        info, new = read_saved(self.folder / "run.json"), dataclasses.asdict(self.config)
        old = info["config"]
        changed = [name for name in new if name not in self.FREE and old.get(name) != new[name]]
        if changed:
            fields = ", ".join(f"{name} {old.get(name)} -> {new[name]}" for name in changed)
            raise UserError(f"{self.folder} is a run of another config: {fields}; take another --variant")
        if info["status"] == "diverged":
            raise Diverged(f"{self.folder} has {info['result']}, under another --variant")
        return info

    @contextlib.contextmanager
    def start(self, learner, **facts):
        """Around the training loop: what was saved is restored first, and how it ended is noted."""
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise UserError(f"another process is at work in {self.folder}") from None
        self.info, seconds = self.read_info(), 0.0
        if (self.folder / "checkpoint.pt").exists():
            saved = read_saved(self.folder / "checkpoint.pt")
            restore(learner, saved)
            self.metrics, self.evaluations, seconds = map(saved.get, ("metrics", "evaluations", "seconds"))
            torch.set_rng_state(saved["rng"])
            torch.cuda.set_rng_state_all(saved["cuda_rng"])
            if self.info.get("dataset_hash") != facts.get("dataset_hash"):
                raise UserError(f"{self.folder} learned from other data of this name: take another --variant")
            print(f"resumed at update {learner.updates:,}")
            for key in [key for key in facts if self.info.get(key) != facts[key]]:
                print(f"resumed with {key} {facts[key]}, begun with {self.info.get(key)}: maybe other bits")
            facts["commit"] = " ".join(dict.fromkeys([*self.info.get("commit", "").split(), facts["commit"]]))
        self.saved = self.printed = self.mark = time.perf_counter()
        self.began, self.marked = self.mark - seconds, learner.updates
        config = dataclasses.asdict(self.config)
        identity = json.dumps({name: value for name, value in config.items() if name not in self.FREE})
        facts["config_hash"] = hashlib.sha256(identity.encode()).hexdigest()
        self.write("config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
        self.note(status="running", result="not finished", config=config, **facts)
        self.write_tables()
        handler = signal.signal(signal.SIGINT, self.interrupt)
        try:
            yield
        except Exception as error:  # after Ctrl-C the status is still running
            self.note(status="diverged" if isinstance(error, Diverged) else "failed", result=f"{error}"[:300])
            raise
        finally:
            signal.signal(signal.SIGINT, handler)
            self.lock.release()

    def interrupt(self, *_) -> None:
        """Ctrl-C: the run ends when the update under way is done and saved; a second one ends it at once."""
        print("\nends after the update under way (online: the episode), which is saved", flush=True)
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def write(self, name: str, content: bytes) -> None:
        """All of it or nothing, whenever the process is killed or the disk is full."""
        new = self.folder / f"{name}.new"
        try:
            new.write_bytes(content)
            new.replace(self.folder / name)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise UserError(f"cannot write {new}: {error.strerror}; mend it and run the same again") from None

    def note(self, **info) -> None:
        """Writes into run.json what is known of the run."""
        self.info |= info
        self.write("run.json", json.dumps(self.info, indent=1).encode())

    def write_tables(self) -> None:
        """metrics.csv, a row an update, and evaluations.csv, a row an episode."""
        for name, rows in {"metrics": [*self.metrics.values()], "evaluations": self.evaluations}.items():
            table = pd.DataFrame(rows, columns=None if rows else ["update"])
            self.write(f"{name}.csv", table.to_csv(index=False).encode())

    def is_due(self, update: int, every: int) -> bool:
        return update % every == 0 or update == self.config.updates

    def log(self, update: int, metrics: Mapping[str, Tensor | float]) -> None:
        """More of this update's row in metrics.csv; where a value is not finite, the run ends."""
        row = {"update": update, **{name: float(value) for name, value in metrics.items()}}
        lost = ", ".join(name for name, value in row.items() if not math.isfinite(value))
        if lost:
            raise Diverged(f"diverged by update {update}: {lost} not finite; lower a learning rate")
        now = time.perf_counter()
        if now - self.printed > 60 and not sys.stderr.isatty():  # there is no progress bar
            print(f"update {update:,}", flush=True)
            self.printed = now
        if update > self.marked:  # evaluations do not count
            row["time/updates_per_second"] = (update - self.marked) / (now - self.mark)
        row["time/wall_seconds"] = now - self.began
        self.metrics[update] = self.metrics.get(update, {}) | row
        self.write_tables()
        self.mirror(row)
        self.mark, self.marked = time.perf_counter(), update

    def log_episodes(self, update: int, phase: str, episodes: pd.DataFrame, references: tuple) -> None:
        """An evaluation; `references` are the returns that score 0 and 100, None where unknown."""
        table = episodes.reset_index(names="episode").assign(update=update, phase=phase)
        self.evaluations += table[["update", "phase", "episode", *episodes]].to_dict("records")
        (low, high), mean = references, episodes.mean().tolist()
        score = math.nan if None in references else 100 * (mean[0] - low) / (high - low)
        result = {"score": score, "return_mean": mean[0], "return_std": episodes["return"].std(ddof=0)}
        result |= {"length_mean": mean[1], "success": mean[2]}
        known = {name: float(value) for name, value in result.items() if not math.isnan(value)}
        shown = ", ".join(f"{name} {value:.2f}" for name, value in known.items())
        tqdm.write(f"update {update:,}, {phase} evaluation: {shown}")
        if phase == "final":
            self.info |= dict.fromkeys(result) | known  # null where unknown
            self.write_tables()
            self.mirror({"update": update, **{f"final/{name}": value for name, value in known.items()}})
        else:
            self.log(update, {f"eval/{name}": value for name, value in known.items()})

    def mirror(self, row: dict) -> None:
        """To wandb, which is no record: where it fails, the run goes on without it."""
        if self.config.wandb_mode == "disabled":
            return
        try:
            import wandb  # takes seconds

            if self.wandb is None:
                self.note(wandb_id=self.info.get("wandb_id", os.urandom(4).hex()))
                self.wandb = wandb.init(
                    project=self.config.wandb_project, group=self.group, name=f"seed-{self.config.seed}",
                    config=self.info["config"], mode=self.config.wandb_mode, dir=self.folder,
                    id=self.info["wandb_id"], resume="allow", settings=wandb.Settings(silent=True))
            self.wandb.log(row, step=row["update"])
        except Exception as error:
            print(f"wandb failed, and the run goes on without it: {error!r:.200}", file=sys.stderr)
            self.config.wandb_mode = "disabled"

    def save_when_due(self, learner) -> None:
        """A checkpoint every `checkpoint_every` updates, every ten minutes and before Ctrl-C ends the run."""
        late = time.perf_counter() - self.saved > 600
        if self.is_due(learner.updates, self.config.checkpoint_every) or late or self.interrupted:
            self.save(learner)
        if self.interrupted:
            raise KeyboardInterrupt

    def save(self, learner) -> None:
        """Everything from which the run goes on to the same bits, if it is finite."""
        parts = {name: part for name, part in vars(learner).items() if hasattr(part, "state_dict")}
        state = {name: part.state_dict() for name, part in parts.items()}
        if not all(leaf.isfinite().all() for leaf in leaves(state) if isinstance(leaf, Tensor)):
            raise Diverged("diverged: weights not finite; lower a learning rate")
        self.saved = time.perf_counter()
        rng = {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
        tables = {"metrics": self.metrics, "evaluations": self.evaluations}
        checkpoint = {"updates": learner.updates, "state": state, "seconds": self.saved - self.began}
        buffer = io.BytesIO()
        torch.save(checkpoint | rng | tables, buffer)
        self.write("checkpoint.pt", buffer.getvalue())

    def finish(self) -> None:
        """Notes what the run came to: its final evaluation, if there was one, and the best on the way."""
        table, result = pd.DataFrame(self.metrics.values()), "not evaluated"
        if "score" in self.info:
            kind = "return_mean" if self.info["score"] is None else "score"
            best = table[f"eval/{kind}"].max()
            self.info["best_score"] = best if kind == "score" else None
            result = f"{kind} {self.info[kind]:.1f} (best on the way, chosen with the simulator: {best:.1f})"
        speed, seconds = table["time/updates_per_second"].median(), time.perf_counter() - self.began
        self.note(status="finished", result=result, wall_seconds=seconds, updates_per_second=speed)
        print(f"{self.folder}: {result}")


def read_saved(file: Path) -> dict:
    """run.json or checkpoint.pt of a run; an error where it is damaged."""
    with explain(f"cannot read {file}", f"remove {file.parent} to start anew"):
        if file.suffix == ".json":
            saved, kinds = json.loads(file.read_text()), {"config": dict, "status": str, "result": str}
        else:
            damaged = zipfile.ZipFile(file).testzip()  # torch.load does not look at the sums
            if damaged:
                raise ValueError(f"{damaged} is damaged")
            saved = torch.load(file, map_location="cpu", weights_only=True)
            kinds = {"updates": int, "state": dict, "metrics": dict, "evaluations": list, "seconds": float}
        wrong = [name for name, kind in kinds.items() if not isinstance(saved.get(name), kind)]
        if wrong:
            raise ValueError(f"no {' and no '.join(wrong)}")
    return saved


def restore(learner, checkpoint: dict) -> None:
    """Puts the states of a checkpoint into the parts of `learner` that they are named for."""
    with explain("the checkpoint does not fit this script", "take the commit that run.json names"):
        for name, state in checkpoint["state"].items():
            vars(learner)[name].load_state_dict(state)
        learner.updates = checkpoint["updates"]


def provenance(device: torch.device) -> dict:
    """Commit (with a + where files differ from it), versions and hardware, as far as they are known here."""
    here, commit = Path(__file__).resolve().parent, ""
    if shutil.which("git"):
        query = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        commit = subprocess.run(query, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    names = ("torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari")
    versions = {"python": sys.version.partition(" ")[0]}
    versions |= {each.name: each.version for each in importlib.metadata.distributions() if each.name in names}
    cpu = torch.cpu.get_capabilities().get("cpu_name", "")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    facts = {"commit": commit, "device": f"{device.type}: {hardware}", "versions": versions}
    return facts | {"threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision()}


# ------------------------------ The command line and its errors ------------------------------


class UserError(Exception):
    """What the user can mend: `main` prints it in one line."""


class Diverged(UserError):
    """A loss or weight that is not finite any more."""


@contextlib.contextmanager
def explain(problem: str, advice: str) -> Iterator[None]:
    """Whatever is raised inside becomes an error of one line: the problem, what was raised, what to do."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{problem}: {error!r:.200}; {advice}") from None


def parse_config(arguments: list[str]) -> Config:
    """Config from the YAML file of `--config_path`, then from `--field value`: pyrallis reads both."""
    register = pyrallis.decode.register
    register(int, partial(number, int, 0, 2**32 - 1))
    register(Count, partial(number, int, 1, math.inf))
    register(float, partial(number, float, -math.inf, math.inf))
    register(Size, partial(number, float, 0, math.inf))
    register(Positive, partial(number, float, 1e-6, math.inf))
    register(Share, partial(number, float, 0, 1))
    register(bool, partial(choice, (True, False)))
    register(Precision, partial(choice, ("highest", "high", "medium", "auto")))
    register(WandbMode, partial(choice, ("offline", "online", "disabled")))
    register(str, text)
    register(Config, decode_config)
    with mock.patch("inspect.getsource", cache(inspect.getsource)):  # pyrallis asks field by field
        parser = pyrallis.argparsing.ArgumentParser(Config, allow_abbrev=False, exit_on_error=False)
    try:
        config, unknown = parser.parse_known_args(arguments)
        decode_config({word[2:].partition("=")[0] if word[:2] == "--" else word: None for word in unknown})
    except UserError:
        raise
    except Exception as error:  # argparse, yaml and the disk have no error in common
        raise UserError(f"cannot read the config, {' '.join(arguments)}: {error}; see --help") from None
    return config


def decode_config(values: dict) -> Config:
    """A Config of what pyrallis has read; an error that names the field, or the nearest one."""
    kinds, decoded = {field.name: field.type for field in dataclasses.fields(Config)}, {}
    for name, value in values.items():
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, 1)
            advice = f"did you mean {near[0]}?" if near else "see --help"
            raise UserError(f"unknown field {name}: {advice}")
        try:
            decoded[name] = pyrallis.decode(kinds[name], value)
        except Exception as error:
            raise UserError(f"{name}: {error}") from None
    return Config(**decoded)


def number(kind: type, low: float, high: float, value) -> int | float:
    """`value` as an int or a float within limits: 1e6 is an int, 2.5 and true are none."""
    found = math.nan if isinstance(value, bool) else float(value)
    if not (math.isfinite(found) and low <= found <= high) or found != kind(found):
        raise ValueError(f"{value!r} is not {kind.__name__} in [{low}, {high}]")
    return kind(found)


def text(value) -> str:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not text")
    return str(value)


def choice(choices: tuple, value):
    if type(value) is not type(choices[0]) or value not in choices:
        raise ValueError(f"{value!r} is not {' or '.join(map(str, choices))}")
    return value


def main(action: Callable[[Config], None]) -> None:
    """The command line of `action`: what the user can mend ends in one line on stderr."""
    try:
        return action(parse_config(sys.argv[1:]))
    except (UserError, OSError) as error:
        message, status = f"{error}", 3 if isinstance(error, Diverged) else 2
    except KeyboardInterrupt:
        message, status = "interrupted; the same command goes on from what is saved, or begins anew", 130
    print(f"{Path(__file__).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main(train)
