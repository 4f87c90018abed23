"""Make the bundled base model: `python scripts/pretrain_tiny.py [OUT]`; seeded, bf16, about 25 minutes on two cores."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from rlhf.data.tinychat.corpus import pretraining_texts
from rlhf.infra.config import load_config
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.recipes.pretrain import PretrainConfig, run_pretrain
from rlhf.recipes.stages import POLICY

NUM_TEXTS = 440_000


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "rlhf/data/tinychat/model")
    corpus = Path("runs") / "tinychat_corpus.jsonl"
    corpus.parent.mkdir(exist_ok=True)
    with corpus.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in pretraining_texts(NUM_TEXTS, seed=0))
    config = load_config(PretrainConfig, "configs/pretrain_tiny.yaml", [f"data.train_files=[{corpus}]"])
    trained = run_pretrain(config).folder / POLICY
    backbone = Backbone.load(ModelConfig(name_or_path=str(trained)))
    backbone.model.to(torch.bfloat16)
    backbone.model.save_pretrained(out)
    backbone.tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
