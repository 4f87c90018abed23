"""Make the bundled base model: `python scripts/pretrain_tiny.py [OUT]`; seeded, in two passes.

The first pass reads texts whose answers are often wrong, the second texts with fewer wrong answers but with as much
flattery, rambling and bad form: what is left to learn from preferences.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from rlhf.data.tinychat.corpus import CORPUS_QUALITY, LATE_CORPUS_QUALITY, pretraining_texts
from rlhf.data.tinychat.quality import QualityConfig
from rlhf.infra.config import load_config
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.recipes.pretrain import PretrainConfig, run_pretrain
from rlhf.recipes.sft import SFTConfig, run_sft
from rlhf.recipes.stages import POLICY, save_policy


def write_corpus(num: int, seed: int, quality: QualityConfig) -> str:
    path = Path("runs") / f"tinychat_corpus_{seed}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in pretraining_texts(num, seed, quality))
    return f"data.train_files=[{path}]"


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "rlhf/data/tinychat/model")
    first = [write_corpus(120_000, 0, CORPUS_QUALITY)]
    early = run_pretrain(load_config(PretrainConfig, "configs/pretrain_tiny.yaml", first)).folder / POLICY
    second = [write_corpus(126_000, 1, LATE_CORPUS_QUALITY), f"model.name_or_path={early}"]
    late = run_sft(load_config(SFTConfig, "configs/pretrain_tiny_late.yaml", second)).folder / POLICY
    backbone = Backbone.load(ModelConfig(name_or_path=str(late)))
    backbone.model.to(torch.bfloat16)
    save_policy(backbone, None, out)


if __name__ == "__main__":
    main()
