"""Settings for the whole suite and the small models, tokenizers and data that many tests share."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch and transformers are imported: no network, and no more threads than there are cores for the workers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import pytest
import torch
from tiny_tokenizers import CHATML, byte_level
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def make_gpt2(vocab_size: int = 64) -> GPT2LMHeadModel:
    """A random GPT-2 of two layers, width 32, absolute positions, without dropout, in evaluation mode."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def make_qwen2(vocab_size: int = 64) -> Qwen2ForCausalLM:
    """A random Qwen2 of two layers, width 32, rotary positions, two heads of 16 that share one key-value head."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture
def tiny_gpt2() -> GPT2LMHeadModel:
    return make_gpt2()


@pytest.fixture
def tiny_qwen2() -> Qwen2ForCausalLM:
    return make_qwen2()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with its own padding token, `<|im_end|>` as EOS and a ChatML template."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(special, eos="<|im_end|>", template=CHATML)
    tokenizer.pad_token = "<|pad|>"
    return tokenizer


@pytest.fixture
def tiny_chat_model(tiny_tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A random Qwen2 with the vocabulary of `tiny_tokenizer`."""
    return make_qwen2(vocab_size=len(tiny_tokenizer))


@pytest.fixture
def shared_data() -> Path:
    """Folder of real data sets beside the repository; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder ../shared/data is not here")
    return SHARED_DATA
