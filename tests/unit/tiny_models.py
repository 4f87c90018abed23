"""Small random models for tests that need more than one, or another vocabulary than the fixtures'."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM


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
