"""The GPT-2 recipe on real dialogues: two short steps of every stage, with random weights of GPT-2's shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import rlhf
from tiny_tokenizers import byte_level
from transformers import GPT2Config, GPT2LMHeadModel

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's shape to the letter (124 M weights, 50,257 tokens); its tokenizer, which is not here, is stood in for."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(bos_token_id=50_256, eos_token_id=50_256)
    assert (config.n_embd, config.n_layer, config.n_head, config.vocab_size) == (768, 12, 12, 50_257)
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_level([END], eos=END).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_every_stage_of_the_gpt2_recipe_runs(tmp_path: Path, gpt2: Path, shared_data: Path) -> None:
    few = ["max_samples=24", "max_validation_samples=8", "max_length=160"]
    steps = ["max_steps=2", "eval_steps=2", "per_device_train_batch_size=2"]
    settings = [f"{stage}.data.{key}" for stage in ("sft", "reward", "dpo") for key in few]
    settings += [f"{stage}.training.{key}" for stage in ("sft", "reward", "dpo") for key in steps]
    settings += ["ppo.ppo.num_iterations=2", "ppo.ppo.rollout_batch_size=4", "ppo.generation.max_new_tokens=8"]
    settings += ["ppo.data.max_samples=16", "ppo.data.max_prompt_length=96", "ppo.ppo.num_mini_batches=1"]
    settings += ["evaluate.suite.num_heldout=4", "evaluate.generation.max_new_tokens=8", "evaluate.num_reward_pairs=4"]
    settings += ["evaluate.data.max_prompt_length=96"]
    data = [f"data.train_files=[{shared_data}/hh_rlhf/train.jsonl.gz]"]
    data += [f"data.validation_files=[{shared_data}/hh_rlhf/val.jsonl.gz]"]
    data += [f"data.{key}=null" for key in ("name", "data_dir", "validation_split")]
    model = [f"sft.model.name_or_path={gpt2}", f"run.output_dir={tmp_path}"]
    assert rlhf("pipeline", "--config", "hh_gpt2.yaml", *data, *model, *settings) == 0
    run = tmp_path / "hh_gpt2"
    adapter = json.loads((run / "sft" / "policy" / "adapter_config.json").read_text())
    assert adapter["r"] == 8 and sorted(adapter["target_modules"]) == ["c_attn", "c_proj"]
    head = json.loads((run / "reward" / "reward_model" / "reward_config.json").read_text())
    assert head["pooling"] == "mean"
    for stage in ("sft", "reward", "dpo", "ppo"):
        assert json.loads((run / stage / "run.json").read_text())["status"] == "finished", stage
    assert (run / "eval" / "report.html").is_file()
