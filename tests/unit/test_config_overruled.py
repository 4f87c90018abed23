"""What of a file the command line overrules, and what contradicts itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.infra.config import explicit_keys, load_config, to_yaml
from rlhf.infra.errors import UserError
from rlhf.recipes.pipeline import PipelineConfig
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.sft import SFTConfig


def test_what_the_command_line_overrules_in_a_file_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("data: {name: someone/some-data, validation_split: test}\n")
    over = ["data.train_files=[a.jsonl]", "data.validation_files=[b.jsonl]"]
    config = load_config(SFTConfig, file, over)
    assert config.data.source == ("a.jsonl",) and config.data.validation_files == ("b.jsonl",)
    assert explicit_keys(config) >= {"data.train_files", "data.validation_files"}
    assert "data.name" not in explicit_keys(config)
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(SFTConfig, saved) == config
    with pytest.raises(UserError, match=r"data\.name"):  # both on the command line contradict each other
        load_config(SFTConfig, None, [*over, "data.name=someone/some-data"])
    file.write_text("kl: {horizon: 100}\n")
    with pytest.raises(UserError, match=r"kl\.horizon"):  # idle in the file already
        load_config(PPOConfig, file, ["ppo.num_iterations=3"])
    file.write_text("kl: {controller: adaptive, horizon: 100}\n")
    assert load_config(PPOConfig, file, ["kl.controller=fixed"]).kl.controller == "fixed"
    with pytest.raises(UserError, match=r"kl\.target"):
        load_config(PPOConfig, file, ["kl.controller=fixed", "kl.target=3"])


def test_the_real_data_recipe_takes_files_on_the_command_line() -> None:
    config = load_config(PipelineConfig, "hh_cpu.yaml", ["data.train_files=[a.gz]", "data.validation_files=[b.gz]"])
    assert config.data is not None and config.data.source == ("a.gz",)
