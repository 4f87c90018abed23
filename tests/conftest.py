"""Settings for the whole suite and the small models, tokenizers and data that many tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch and transformers are imported: no network, and no more threads than there are cores for the workers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import pytest
from tiny_models import make_gpt2, make_qwen2
from tiny_tokenizers import CHATML, byte_level
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen2ForCausalLM

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def no_syncing() -> Iterator[None]:
    """A third of a toy run's time is syncing, and no test's files must outlive a power cut.

    That and when we sync is seen by the tests that put something of their own in place of `os.fsync`, and by those that
    kill processes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


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
