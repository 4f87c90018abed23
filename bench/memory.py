"""How good `rlhf plan` is: real runs of random models on this CPU, beside what was predicted for them.

    python bench/memory.py            # every setting, each in a process of its own: a quarter of an hour
    python bench/memory.py ppo_gpt2   # some of them

A setting is a shape, a recipe and overrides. The model is made and saved, `rlhf plan` predicts, the recipe runs two
steps on rows as long as the config allows, and the resident memory of that process is read at its highest, in each
phase and in all, above what the interpreter with its libraries held before. Weights are mapped from their file and
take memory as they are read; the embedding, of which two steps read few rows and a run most, is read once before.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MB = 10**6
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
NARROW = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 48000,
    "tie_word_embeddings": True,
}
WIDE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
PAIRS = (
    *("data.train_files=[{folder}/pairs.jsonl]", "data.validation_files=[{folder}/pairs.jsonl]"),
    *(
        "data.max_validation_samples=2",
        "data.overlong=truncate_prompt",
        "training.max_steps=2",
        "training.eval_steps=1",
    ),
)
PROMPTS = (
    *("data.train_files=[{folder}/prompts.jsonl]", "data.validation_fraction=0", "data.max_prompt_length=128"),
    *("rewards=[{{name: target_string, arguments: {{text: red}}}}]", "ppo.num_iterations=1", "ppo.num_ppo_epochs=1"),
)


@dataclass(frozen=True)
class Setting:
    """A shape, a recipe, what is set besides, and the tokens of a pair's sides."""

    shape: dict[str, Any]
    recipe: str
    overrides: tuple[str, ...]
    length: int = 512


def supervised(shape: dict[str, Any], recipe: str, tokens: int, length: int, *overrides: str) -> Setting:
    """A recipe on pairs, in rows of `length` tokens, `tokens` at once, two passes to an optimizer step."""
    source, sides = {"sft": ("model.name_or_path", 1), "rm": ("backbone", 2), "dpo": ("policy", 2)}[recipe]
    rows = 2 * tokens // (sides * length)
    sizes = (f"training.max_tokens_per_micro_batch={tokens}", f"data.max_length={length}")
    batch = (f"training.per_device_train_batch_size={rows}", f"data.max_samples={2 * rows}")
    return Setting(shape, recipe, (f"{source}={{folder}}/model", *PAIRS, *sizes, *batch, *overrides), length)


def online(shape: dict[str, Any], rollouts: int, answer: int, tokens: int, *overrides: str) -> Setting:
    """PPO with so many answers of so many tokens at once to prompts of 128."""
    sizes = (f"ppo.rollout_batch_size={rollouts}", f"generation.max_new_tokens={answer}")
    limit = f"ppo.max_tokens_per_micro_batch={tokens}"
    return Setting(shape, "ppo", ("policy={folder}/model", *PROMPTS, *sizes, limit, *overrides))


SETTINGS = {
    "sft_gpt2": supervised(GPT2, "sft", 1024, 256),
    "sft_gpt2_full": supervised(GPT2, "sft", 1024, 256, "model.train=full"),
    "sft_gpt2_full_bf16": supervised(GPT2, "sft", 1024, 256, "model.train=full", "run.dtype=bf16"),
    "sft_narrow_eager": supervised(NARROW, "sft", 2048, 512, "model.attn_implementation=eager"),
    "sft_wide_4bit_recomputed": supervised(
        WIDE, "sft", 1024, 256, "run.dtype=bf16", "model.load_in_4bit=true", "model.gradient_checkpointing=true"
    ),
    "rm_llama": supervised(LLAMA, "rm", 1024, 256),
    "dpo_gpt2_bf16": supervised(GPT2, "dpo", 2048, 256, "run.dtype=bf16"),
    "dpo_narrow": supervised(NARROW, "dpo", 2048, 256),
    "ppo_gpt2": online(GPT2, 16, 64, 1024),
    "ppo_narrow_value_adapter": online(NARROW, 16, 64, 1536, "ppo.value_adapter=true"),
    "ppo_narrow_many_rows": online(NARROW, 192, 16, 1024, "ppo.num_mini_batches=8"),
}


def main(names: list[str]) -> None:
    print("| setting | parameters | phase | predicted MB | measured MB | off |\n|---|---|---|---|---|---|")
    for name in names or list(SETTINGS):
        with tempfile.TemporaryDirectory(prefix="rlhf-memory-") as folder:
            for line in compared(name, SETTINGS[name], Path(folder)):
                print(line, flush=True)


def compared(name: str, setting: Setting, folder: Path) -> Iterator[str]:
    """Rows of the table: every phase, and the whole run."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.plan_sources import planned_stages
    from rlhf.recipes.resume import config_class

    write_model(setting.shape, folder / "model")
    write_rows(folder, setting.length)
    overrides = [text.format(folder=folder) for text in setting.overrides]
    (stage,) = planned_stages(load_config(config_class(setting.recipe), None, [*overrides, "run.device=cpu"]))
    phases, _ = stage.phases(on_cpu=True)
    predicted = {phase.name: phase.num_bytes for phase in phases}
    command = [sys.executable, __file__, "--measure", setting.recipe, str(folder), *overrides]
    measured = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    )
    size = f"{stage.start.shape.num_parameters / MB:.0f} M"
    for phase in predicted:
        if phase in measured:
            yield row(name, size, phase, predicted[phase], measured[phase])
    yield row(f"**{name}**", size, "whole run", max(predicted.values()), max(measured.values()))


def output_of(arguments: list[str]) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def row(name: str, size: str, phase: str, predicted: int, measured: int) -> str:
    off = predicted / measured - 1
    return f"| {name} | {size} | {phase} | {predicted / MB:,.0f} | {measured / MB:,.0f} | {off:+.1%} |"


def write_model(shape: dict[str, Any], folder: Path) -> None:
    """A model of this shape with random weights, beside the bundled tokenizer (its ids are the vocabulary's first)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from rlhf.models.backbone import BUNDLED_MODEL, resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(BUNDLED_MODEL))
    named = dict(shape)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(named.pop("model_type"), **named, **special)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)


def write_rows(folder: Path, length: int) -> None:
    """Pairs of sides so long, nearly all answer, and prompts of 128 tokens; every digit is a token of its own."""
    source = random.Random(0)

    def digits(count: int) -> str:
        return "".join(source.choice("0123456789") for _ in range(count))

    pairs = [{"prompt": digits(8), "chosen": digits(length - 9), "rejected": digits(length - 10)} for _ in range(64)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    prompts = [{"prompt": digits(128)} for _ in range(512)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")


def measure(recipe: str, folder: Path, overrides: list[str]) -> None:
    """Run the recipe here and print the highest resident memory of each phase above the start, in bytes."""
    from rlhf.infra import profiling
    from rlhf.infra.config import load_config
    from rlhf.models.backbone import Backbone
    from rlhf.recipes.dpo import run_dpo
    from rlhf.recipes.ppo import run_ppo
    from rlhf.recipes.resume import config_class
    from rlhf.recipes.reward import run_reward
    from rlhf.recipes.sft import run_sft

    run = {"sft": run_sft, "rm": run_reward, "dpo": run_dpo, "ppo": run_ppo}[recipe]
    start, peaks, now = resident("VmRSS"), dict[str, int](), ["load"]
    former, load = profiling.PhaseTimer.__call__, Backbone.load

    def note() -> None:
        peaks[now[0]] = max(peaks.get(now[0], 0), resident("VmHWM") - start)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here

    @contextmanager
    def watched(timer: profiling.PhaseTimer, phase: str) -> Iterator[None]:
        note()
        outside, now[0] = now[0], phase
        with former(timer, phase):
            yield
        note()
        now[0] = outside if outside != "load" else "between phases"

    def loaded(*given: Any) -> Backbone:
        backbone = load(*given)
        backbone.model.get_input_embeddings().weight.sum()
        return backbone

    profiling.PhaseTimer.__call__, Backbone.load = watched, loaded  # type: ignore[method-assign]
    began = time.perf_counter()
    own = [f"run.output_dir={folder / 'runs'}", "run.name=measured", "run.device=cpu"]
    run(load_config(config_class(recipe), None, [*overrides, *own]))
    note()
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    print(json.dumps(peaks))


def resident(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    else:
        main(sys.argv[1:])
