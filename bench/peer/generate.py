"""The peer's generation: python bench/peer/generate.py FOLDER REPEATS [--bf16] [--device cuda] [--static].

Sampling with `generate` of transformers from the same model with the same LoRA adapter (PEFT), 64 prompts, 48 tokens,
as TRL's trainers do it on one machine. `--static`: with a cache of fixed size, for which transformers compiles a step
on a GPU (CUDA graphs). Two runs beforehand are not timed then, and one is not on any GPU. The last line printed is one
JSON object.
"""

import contextlib
import json
import time

import torch
from measured import arguments, tell
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS, NEW_TOKENS = 64, 48


def main() -> None:
    asked = arguments(steps="repeats", flags=("--static",))
    tokenizer = AutoTokenizer.from_pretrained(asked.folder / "policy", padding_side="left")
    lines = (asked.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    batch = tokenizer([json.loads(line)["prompt"] for line in lines], return_tensors="pt")
    batch.pop("token_type_ids", None)
    batch = batch.to(asked.device)
    base = AutoModelForCausalLM.from_pretrained(asked.folder / "policy", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, asked.folder / "start").eval().to(asked.device)
    format_ = torch.autocast(asked.device, dtype=torch.bfloat16) if asked.bf16 else contextlib.nullcontext()
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    if asked.static:
        settings["cache_implementation"] = "static"
    tokens, started = 0, time.perf_counter()
    num_warm = 2 if asked.static else 1 if asked.device == "cuda" else 0
    for repeat in range(-num_warm, asked.steps):
        if repeat == 0:
            wait(asked.device)
            tokens, started = 0, time.perf_counter()
        with torch.no_grad(), format_:
            out = model.generate(**batch, **settings)
        tokens += out[:, batch["input_ids"].shape[1] :].numel()
    wait(asked.device)
    tell(asked, time.perf_counter() - started, optimizer_steps=0, tokens=tokens)


def wait(device: str) -> None:
    """Until the device has done what it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
