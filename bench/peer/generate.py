"""The peer's generation: python bench/peer/generate.py FOLDER REPEATS [--bf16].

Sampling with `generate` of transformers from the same model with the same LoRA adapter (PEFT), 64 prompts, 48 tokens,
as TRL's trainers do it on one machine. The last line printed is one JSON object.
"""

import argparse
import contextlib
import json
import resource
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS, NEW_TOKENS = 64, 48


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("repeats", type=int)
    parser.add_argument("--bf16", action="store_true")
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.folder / "policy", padding_side="left")
    lines = (asked.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    batch = tokenizer([json.loads(line)["prompt"] for line in lines], return_tensors="pt")
    batch.pop("token_type_ids", None)
    base = AutoModelForCausalLM.from_pretrained(asked.folder / "policy", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, asked.folder / "start").eval()
    format_ = torch.autocast("cpu", dtype=torch.bfloat16) if asked.bf16 else contextlib.nullcontext()
    tokens, started = 0, time.perf_counter()
    for _ in range(asked.repeats):
        with torch.no_grad(), format_:
            out = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        tokens += out[:, batch["input_ids"].shape[1] :].numel()
    seconds = time.perf_counter() - started
    print(
        json.dumps(
            {
                "seconds": seconds,
                "steps": asked.repeats,
                "optimizer_steps": 0,
                "s_per_step": seconds / asked.repeats,
                "tokens": tokens,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
