"""The work that both sides of the benchmark do: one small random model, one adapter to start from, rows of HH-RLHF.

    python bench/workload.py FOLDER DATA

FOLDER gets `policy/` (a GPT-2-shaped model of 17.5 M parameters with its tokenizer), `start/` and `reward_start/` (LoRA
adapters in PEFT's format, the identity until they are trained), `reward/` (the same trunk as a classifier, for the side
that needs a model of its own) and JSONL files of rows in the standard columns. Nothing is downloaded. `build_large`
makes the same for a model of any shape, without what only the other side needs.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import rlhf  # noqa: F401  # isort: skip  before transformers: it keeps a library's warning to itself
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf.models.adapter_files import save_adapter
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.lora import LoRAConfig
from rlhf.models.quantized import write_quantisation
from rlhf.models.reward_model import RewardModel

VOCABULARY, MAX_LENGTH, PROMPT_TOKENS = 8192, 256, 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "n_embd": 384,
    "n_layer": 8,
    "n_head": 8,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    # Where one side trains with dropout and the other without, losses cannot be compared.
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
LORA = LoRAConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"])
NUM_ROWS = 512
# GRPO's answers are held against this many words.
TARGET_WORDS = 30


def build(folder: Path, data: Path) -> None:
    """Write models, adapters and rows; the same bytes of data give the same workload."""
    rows = list(_rows(data))
    tokenizer = train_tokenizer(rows)
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(GPT2Config(**SHAPE))
    classifier = GPT2ForSequenceClassification(GPT2Config(**SHAPE, num_labels=1))
    classifier.transformer.load_state_dict(policy.transformer.state_dict())
    reward = write_models(folder, policy, tokenizer, LORA)
    classifier.score.weight.data.copy_(reward.head.weight.data)
    classifier.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    write_rows(folder, rows, tokenizer)


def build_large(folder: Path, data: Path, shape: LlamaConfig, lora: LoRAConfig, device: torch.device) -> None:
    """The same for a model of that shape, made in bf16 on the device; its words are those of the small tokenizer."""
    rows = list(_rows(data))
    tokenizer = train_tokenizer(rows)
    torch.manual_seed(0)
    with device:
        policy = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    # Policy and reward model of QLoRA share a base only where both are known to stand on its 4-bit form.
    write_models(folder, policy, tokenizer, lora, ModelConfig(load_in_4bit=True).quantisation)
    write_rows(folder, rows, tokenizer)


def write_models(
    folder: Path,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    lora: LoRAConfig,
    quantisation: Mapping[str, Any] | None = None,
) -> RewardModel:
    """The policy with its tokenizer, and the adapters that policy and reward model start from.

    `quantisation` is how the base of the two adapters is held (`ModelConfig.quantisation`).
    """
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    backbone = Backbone(policy, tokenizer, str(folder / "policy"))
    backbone.quantisation = dict(quantisation or {})
    backbone.add_adapter("start", lora)
    save_adapter(backbone.model, "start", folder / "start", backbone.name, task_type="CAUSAL_LM")
    write_quantisation(folder / "start", backbone.quantisation)
    tokenizer.save_pretrained(folder / "start")
    backbone.copy_adapter("start", "reward")
    reward = RewardModel(backbone, "reward")
    reward.save(folder / "reward_start")
    return reward


def write_rows(folder: Path, rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> None:
    """Pairs, answers and prompts that fit, in an order that is always the same."""
    random.Random(0).shuffle(rows)
    pairs = [row for row in rows if _fits(row, tokenizer)][:NUM_ROWS]
    _write(folder / "pairs.jsonl", [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs])
    _write(folder / "answers.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs])
    _write(folder / "labelled.jsonl", list(_labelled(pairs, tokenizer)))
    _write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in _prompts(rows, tokenizer)][:NUM_ROWS])


def train_tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 8,192 entries, from the rows themselves."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = (row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


def _rows(data: Path) -> Iterator[dict[str, str]]:
    with gzip.open(data, "rt", encoding="utf-8") if data.suffix == ".gz" else data.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["chosen"].strip() and row["rejected"].strip() and row["chosen"].strip() != row["rejected"].strip():
                answers = {side: " " + row[side].strip() for side in ("chosen", "rejected")}
                yield {"prompt": row["prompt"].rstrip(), **answers}


def _fits(row: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> bool:
    # One place for the end of the answer.
    texts = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
    return all(len(ids) < MAX_LENGTH for ids in tokenizer(texts)["input_ids"])


def _labelled(pairs: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, Any]]:
    """Of every pair one side with its label, good and bad in turn, so short that it fits behind any other's prompt."""
    good = True
    for row in pairs:
        completion = row["chosen" if good else "rejected"]
        prompt_tokens, answer_tokens = (len(ids) for ids in tokenizer([row["prompt"], completion])["input_ids"])
        if prompt_tokens <= MAX_LENGTH // 2 and answer_tokens < MAX_LENGTH // 2:
            yield {"prompt": row["prompt"], "completion": completion, "label": good}
            good = not good


def _prompts(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Ends of prompts that are exactly `PROMPT_TOKENS` long, also when they are read again from text."""
    for row in rows:
        text = tokenizer.decode(tokenizer(row["prompt"])["input_ids"][-PROMPT_TOKENS:])
        if len(tokenizer(text)["input_ids"]) == PROMPT_TOKENS:
            yield text


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
