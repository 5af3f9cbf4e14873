"""A language model of a few weights and words, for the tests of algorithms/language."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WORDS = ["<end>", "<pad>", "?", "▁the", "▁film", "▁food", "▁hotel", "▁was", "▁is", "▁good", "▁bad", "▁very"]
WORDS += ["▁not", "▁there", "▁awful", "▁great"]
END = 0
ROLE = "{{ 'the ' if m.role == 'user' else 'was ' }}"
CHAT = "{% for m in messages %}" + ROLE + "{{ m.content }} {% endfor %}is"


def tiny_model(seed: int = 0, tied: bool = True) -> torch.nn.Module:
    """A Llama of two layers, 16 wide, whose random weights make some words likelier than others."""
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.4,
        bos_token_id=END, eos_token_id=END)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).eval()


def tiny_gpt2() -> torch.nn.Module:
    """The same size with learned positions, so that it matters where a text begins."""
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4,
        bos_token_id=END, eos_token_id=END)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).eval()


def tiny_tokenizer():
    """One token a word, with the blank before it."""
    numbers = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="?", chat_template=CHAT)


def save_model(folder: Path, **options) -> Path:
    """A folder as transformers writes it."""
    tiny_model(**options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
