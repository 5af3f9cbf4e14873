"""Preference pairs about sentiment, made without people (Rafailov et al., 2023, arXiv:2305.18290, section 6).

A language model continues given openings of reviews, twice for a pair. A lexicon (VADER, Hutto and Gilbert,
2014) scores both texts from -1 to 1, and the score decides by lot which one is preferred:

  (1)  y_1, y_2 ~ pi(. | x)                                         token by token, temperature 1
  (2)  s_i = score of x y_i                                         VADER's compound
  (3)  P(y_1 preferred) = sigma(scale (s_1 - s_2))                  Bradley and Terry, 1952

So the truth behind the labels is known: what algorithms/language/dpo.py has learned from them can be scored.

A folder gets train.jsonl and test.jsonl, lines of prompt, chosen, rejected and the two scores, and
prompts.jsonl with the test's prompts: whole subjects are held out. Pairs with equal scores are left out.

Differences from the paper: the judge is a lexicon (a classifier), its labels are drawn (the better score's
text is preferred), and the model is taken as it is (fine-tuned on reviews of films before).

  python algorithms/collect/sentiment.py
"""

import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NewType, Optional
from unittest import mock

import huggingface_hub
import numpy as np
import pyrallis
import torch
from torch import nn
from tqdm import tqdm

Count = NewType("Count", int)  # at least 1
Size = NewType("Size", float)  # at least 0
Positive = NewType("Positive", float)  # at least a millionth
Share = NewType("Share", float)  # from 0 to 1
Precision = NewType("Precision", str)
WandbMode = NewType("WandbMode", str)

SUBJECTS = """the film; the sequel; the documentary; the TV series; the novel; the album; the concert; the
play; the museum; the restaurant; the pizza; the coffee; the breakfast buffet; the new cafe; the hotel; the
beach; the city; the flight; the train ride; the cruise; the phone; the laptop; the camera; the watch; the
car; the bicycle; the vacuum cleaner; the game; the school; the course; the gym; the haircut; the
neighbourhood; the customer service; the delivery; the website"""
OPENINGS = """{} was; {} made me feel; Honestly, {} is; We all agreed that {} was; What I remember of {} is"""


@dataclasses.dataclass
class Config:
    """Preference pairs."""

    folder: str = "data/sentiment"  # where the files go; what is there is left alone
    model: str = "models/smollm2-135m-instruct"  # folder or hub id of a causal language model
    prompts: Optional[str] = None  # text file of your own, an opening a line; null: 180 of ours
    seed: int = 0  # of continuations, labels and what is held out
    samples: Count = 20  # continuations of each opening: half as many pairs
    new_tokens: Count = 24  # longest continuation
    scale: Size = 4.0  # of (3): how surely the better text is preferred
    held_out: Share = 0.2  # of the subjects (the lines of a file of your own), for the test
    batch_size: Count = 100  # texts that are continued at a time
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    threads: int = 0  # CPU threads; 0: torch's choice
    precision: Precision = "auto"  # of float32 matrix products; medium: bfloat16


# ------------------------------------------------- Pairs -------------------------------------------------


def make_pairs(config: Config) -> None:
    """All that this script does, in order."""
    folder = Path(config.folder)
    if folder.exists():
        print(f"{folder} is there; to make it anew, remove it")
        return
    if config.samples % 2:
        raise UserError(f"samples: {config.samples} do not make pairs; take an even number")
    device = set_up_torch(config)
    score = load_judge()
    model, tokenizer = load_language_model(config.model)
    groups = our_prompts() if config.prompts is None else read_prompts(Path(config.prompts))
    train, test = hold_out(groups, config.held_out, config.seed)

    texts = [prompt for prompt in train + test for _ in range(config.samples)]
    tokens = [tokenizer(prompt)["input_ids"] for prompt in texts]
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "medium"):
        drawn = continue_prompts(
            model.to(device).eval(), tokens, config.new_tokens, tokenizer.eos_token_id, config.batch_size,
            (config.seed, 0))  # (1)
    responses = [tokenizer.decode(response, skip_special_tokens=True) for response in drawn]
    scores = [score(prompt + response) for prompt, response in zip(texts, responses)]  # (2)

    rng, parts = np.random.default_rng((config.seed, 1)), {"train": [], "test": []}
    for first in range(0, len(texts), 2):
        two = slice(first, first + 2)
        pair = label_pair(responses[two], scores[two], config.scale, rng)
        if pair:
            name = "train" if first < len(train) * config.samples else "test"
            parts[name].append({"prompt": texts[first]} | pair)
    for name, rows in parts.items():
        print(summary(name, rows))
    if not parts["train"]:
        raise UserError("no pair has two scores: take more samples or new_tokens")
    write_folder(folder, parts | {"prompts": [{"prompt": prompt} for prompt in test]})
    print(f"{folder}: written; all {len(scores):,} texts score {np.mean(scores):.3f} on average")


def label_pair(responses: list[str], scores: list[float], scale: float, rng: np.random.Generator) -> dict:
    """Two continuations as a pair; an empty dict where the scores are equal."""
    uniform = rng.random()  # drawn for every pair, so that one does not change the labels of the rest
    if scores[0] == scores[1] or not all(response.strip() for response in responses):
        return {}
    first = uniform < 1 / (1 + math.exp(-scale * (scores[0] - scores[1])))  # (3)
    better, worse = (0, 1) if first else (1, 0)
    return {"chosen": responses[better], "rejected": responses[worse],
            "chosen_score": scores[better], "rejected_score": scores[worse]}


def our_prompts() -> list[list[str]]:
    """Openings of reviews, those of a subject together."""
    subjects = [" ".join(subject.split()) for subject in SUBJECTS.split(";")]
    openings, groups = [opening.strip() for opening in OPENINGS.split(";")], []
    for subject in subjects:
        texts = [opening.format(subject) for opening in openings]
        groups.append([text[0].upper() + text[1:] for text in texts])
    return groups


def read_prompts(file: Path) -> list[list[str]]:
    """A file's lines, each for itself."""
    with explain(f"cannot read {file}", "give a text file with an opening a line"):
        lines = [line.strip() for line in file.read_text().splitlines()]
    prompts = list(dict.fromkeys(line for line in lines if line))
    if not prompts:
        raise UserError(f"{file} is empty: give an opening a line")
    return [[prompt] for prompt in prompts]


def hold_out(groups: list[list[str]], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Openings to learn from and to test on, no group in both."""
    order = np.random.default_rng((seed, 2)).permutation(len(groups))
    held = set(order[: round(share * len(groups))].tolist())
    train = [prompt for number, group in enumerate(groups) for prompt in group if number not in held]
    test = [prompt for number in sorted(held) for prompt in groups[number]]
    return train, test


def summary(name: str, rows: list[dict]) -> str:
    """What is worth knowing of these pairs, in a line."""
    if not rows:
        return f"{name}: no pairs"
    chosen = np.array([row["chosen_score"] for row in rows])
    rejected = np.array([row["rejected_score"] for row in rows])
    agree = f"the label agrees with the score in {(chosen > rejected).mean():.1%}"
    return f"{name}: {len(rows):,} pairs, chosen {chosen.mean():.3f}, rejected {rejected.mean():.3f}; {agree}"


def write_folder(folder: Path, parts: dict[str, list[dict]]) -> None:
    """All files or none: they are made under another name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        new = Path(made, folder.name)
        new.mkdir()
        for name, rows in parts.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            Path(new, f"{name}.jsonl").write_text("".join(lines))
        new.rename(folder)


def load_judge() -> Callable[[str], float]:
    """VADER's compound score of a text, from -1 to 1."""
    with explain("no lexicon of sentiment", "make language brings vaderSentiment"):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    polarity = SentimentIntensityAnalyzer().polarity_scores
    return lambda text: polarity(text)["compound"]


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
    main(make_pairs)
