"""KTO and IPO on published preferences: a few steps each, from the bundled model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from command_line import rlhf

FILES = {
    "hh": "hh_rlhf/train.jsonl.gz",  # pairs of dialogues
    "dpo_demo": "preference_demos/dpo_en_demo.json.gz",  # pairs in ShareGPT's form
    "kto_demo": "preference_demos/kto_en_demo.json.gz",  # messages with a label
    "kto_mix": "preference_demos/kto-mix-test.json.gz",  # Alpaca's form with a tag
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "data"),
    [*(("kto", name) for name in FILES), *(("dpo", name) for name in ("hh", "dpo_demo"))],
)
def test_a_few_steps_on_real_data(tmp_path: Path, shared_data: Path, recipe: str, data: str) -> None:
    settings = [f"run.output_dir={tmp_path}", "run.name=run", "run.num_threads=1", "optimizer.learning_rate=0.001"]
    settings += [f"data.train_files=[{shared_data / FILES[data]}]", "data.max_length=256", "data.max_samples=80"]
    settings += ["data.overlong=truncate_prompt", "data.max_validation_samples=16"]
    settings += ["training.per_device_train_batch_size=16", "training.num_train_epochs=4", "training.max_steps=5"]
    settings += ["training.eval_steps=5"]
    assert rlhf(recipe, *settings, *(["loss=ipo"] if recipe == "dpo" else [])) == 0
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "logs" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 5 and lines[-1]["train/skipped_steps"] == 0
    assert all(math.isfinite(value) for line in lines for value in line.values())
    start = 0.5 if recipe == "kto" else 25.0  # IPO: the square of the margin per token that beta 0.1 asks for
    assert lines[0]["train/loss"] == pytest.approx(start, rel=1e-4)
    assert lines[0]["train/tokens"] > 16 * 20
    assert lines[-1]["validation/loss"] > 0
    if recipe == "kto":
        assert lines[0]["train/kl"] == pytest.approx(0, abs=1e-3)
        assert lines[-1]["train/kl"] >= 0 and lines[-1]["train/num_mismatched"] > 8
    assert (run / "policy" / "adapter_model.safetensors").is_file()
