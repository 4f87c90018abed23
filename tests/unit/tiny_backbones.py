"""Backbones small enough to be made in a test, with a tokenizer of thirty whole words."""

from __future__ import annotations

from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf.models.backbone import Backbone
from rlhf.models.lora import LoRAConfig, get_lora_parameters

WORDS = [
    "red",
    "green",
    "blue",
    "black",
    "white",
    "cat",
    "dog",
    "bird",
    "fish",
    "horse",
    "one",
    "two",
    "three",
    "four",
    "five",
    "good",
    "bad",
    "big",
    "small",
    "the",
    "a",
    "is",
    "not",
    "very",
]
PAD, END, UNKNOWN = "<pad>", "<end>", "<unknown>"
Family = Literal["gpt2", "qwen2", "llama"]


def word_tokenizer(*, separate_pad: bool = True) -> PreTrainedTokenizerFast:
    """One token per word of WORDS, with padding of its own or, as GPT-2's, none."""
    special = [PAD, END, UNKNOWN] if separate_pad else [END, UNKNOWN]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": END, "unk_token": UNKNOWN} | ({"pad_token": PAD} if separate_pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def tiny_model(family: Family, vocab_size: int, *, dropout: float = 0.0, spread: float = 0.02) -> PreTrainedModel:
    """Two layers, width 32, random weights of the given standard deviation (larger: more decided distributions).

    Models that go to disk are of the `llama` family: beside a Qwen2 transformers loads no tokenizer but Qwen2's own.
    """
    torch.manual_seed(0)
    if family == "gpt2":
        gpt2 = GPT2Config(
            vocab_size=vocab_size,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            initializer_range=spread,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPT2LMHeadModel(gpt2)
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": spread,
        "attention_dropout": dropout,
    }
    return Qwen2ForCausalLM(Qwen2Config(**shape)) if family == "qwen2" else LlamaForCausalLM(LlamaConfig(**shape))


def tiny_backbone(
    family: Family = "qwen2", *, separate_pad: bool = True, dropout: float = 0.0, spread: float = 0.3
) -> Backbone:
    tokenizer = word_tokenizer(separate_pad=separate_pad)
    model = tiny_model(family, len(tokenizer), dropout=dropout, spread=spread)
    return Backbone(model, tokenizer, f"tiny-{family}")


def add_trained_adapter(backbone: Backbone, name: str, seed: int = 0, lora_alpha: float | None = None) -> None:
    """An adapter with weights that matter, as training would leave it; frozen."""
    backbone.add_adapter(name, LoRAConfig(r=4, lora_alpha=lora_alpha))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in get_lora_parameters(backbone.model, name):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    backbone.train_only([])


def random_prompts(count: int, longest: int = 7, seed: int = 0) -> list[list[int]]:
    """Prompts of one to `longest` words, as ids; special tokens do not occur."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, 26, (length,), generator=generator).tolist() for length in lengths]
