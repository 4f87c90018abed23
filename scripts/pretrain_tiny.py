"""Make the bundled base model: `python scripts/pretrain_tiny.py [OUT]`; seeded, about half an hour on two cores."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from rlhf.data.tinychat.corpus import pretraining_texts
from rlhf.infra.config import load_config
from rlhf.recipes.pretrain import PretrainConfig, run_pretrain
from rlhf.recipes.stages import POLICY

NUM_TEXTS, SEED = 160_000, 0


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "rlhf/data/tinychat/model")
    corpus = Path("runs/tinychat_corpus.jsonl")
    corpus.parent.mkdir(exist_ok=True)
    with corpus.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in pretraining_texts(NUM_TEXTS, SEED))
    config = load_config(PretrainConfig, "configs/pretrain_tiny.yaml", [f"data.train_files=[{corpus}]"])
    run = run_pretrain(config)
    backbone_folder = run.folder / POLICY
    shutil.copytree(backbone_folder, out, dirs_exist_ok=True)
    shrink(out)


def shrink(folder: Path) -> None:
    """Store the weights in bf16: half the size, and what a bf16 run would load anyway."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    main()
