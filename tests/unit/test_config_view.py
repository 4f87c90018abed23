"""`rlhf config show` and `rlhf config schema`, and the bundled configs seen through both."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import rlhf
from schema_check import mistakes

from rlhf.infra.config import explicit_keys, given_keys, load_config
from rlhf.infra.config_errors import known_keys
from rlhf.infra.config_view import json_schema, view
from rlhf.infra.errors import UserError
from rlhf.infra.yaml_tree import read_yaml_file
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.resume import CONFIGS, config_class

CONFIG_FILES = Path(__file__).parents[2] / "configs"


def recipe_of(path: Path) -> str:
    """The recipe a bundled file is for: that of the command in its header, or of its name, or a whole pipeline."""
    verbs = "|".join(name.replace("_", "-") for name in [*CONFIGS, "rm"])
    command = re.search(rf"^#.*\brlhf ({verbs}) ", path.read_text(encoding="utf-8"), re.MULTILINE)
    first = path.stem.partition("_")[0]
    return command[1] if command else first if first in CONFIGS else "pipeline"


RECIPES = {path.name: recipe_of(path) for path in sorted(CONFIG_FILES.glob("*.yaml"))}


def shown(config: Any, recipe: str) -> str:
    return "".join(f"{line.plain()}\n" for line in view(config, recipe))


@pytest.fixture
def heir(tmp_path: Path) -> Path:
    """A file that extends another."""
    (tmp_path / "base.yaml").write_text("kl: {controller: adaptive, horizon: 500}\nppo: {num_iterations: 7}\n")
    path = tmp_path / "heir.yaml"
    path.write_text("extends: base.yaml\nkl: {target: 3}\nrewards: [{name: 'x.py:f'}]\n")
    return path


def test_a_recipe_is_found_however_its_name_is_spelt() -> None:
    for name, cls in CONFIGS.items():
        assert cls is config_class(name) is config_class(name.replace("_", "-")) is config_class(name.replace("-", "_"))
    assert config_class("rm") is CONFIGS["reward"]
    with pytest.raises(UserError, match="no recipe 'rmm'; choose from pretrain, sft"):
        config_class("rmm")


# ---------------------------------------------------------------- show


def test_every_key_is_shown_with_its_description() -> None:
    for recipe, cls in CONFIGS.items():
        lines = [line for line in view(load_config(cls), recipe) if line.name]
        there = {
            key.rpartition(".")[2] for key in known_keys(cls) if not key.startswith(("data.", "pretrain.", "refresh."))
        }
        assert there - {"name", "weight", "arguments"} <= {line.name for line in lines}
        assert [line.name for line in lines if not line.description] == []


def test_marks_tell_what_was_set_inherited_and_idle(heir: Path) -> None:
    text = shown(load_config(PPOConfig, heir, ["run.seed=4"]), "ppo")
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert text.startswith("# rlhf ppo: 3 set, 3 inherited through extends, the rest at their defaults\n")
    assert re.search(r"seed: 4 +# \[set; default 0\] seed of everything", lines["seed"])
    assert re.search(r"horizon: 500\.0 +# \[inherited; default 10000\.0\] ", lines["horizon"])
    assert re.search(r"target: 3\.0 +# \[set; default 6\.0\] ", lines["target"])
    assert re.search(r"num_iterations: 7 +# \[inherited; default 100\] rollouts", lines["num_iterations"])
    assert re.search(r"gamma: 1\.0 +# discount per token", lines["gamma"])
    assert "[no effect: length_budget is null, so no token is beyond it]" in lines["length_penalty"]


def test_what_a_pipeline_fills_in_is_told() -> None:
    text = shown(load_config(CONFIGS["pipeline"]), "pipeline")
    assert re.search(r"backbone: tinychat +# \[taken as sft\] ", text)
    assert (
        shown(load_config(CONFIGS["pipeline"], None, ["dpo=null"]), "pipeline").count("[set; default a section]") == 1
    )


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_shown_loads_to_the_same(tmp_path: Path, name: str) -> None:
    cls = config_class(RECIPES[name])
    config = load_config(cls, CONFIG_FILES / name)
    saved = tmp_path / "shown.yaml"
    saved.write_text(shown(config, RECIPES[name]), encoding="utf-8")
    again = load_config(cls, saved)
    assert again == config
    assert explicit_keys(again) == explicit_keys(config)


def test_what_is_shown_of_odd_values_loads_to_the_same(tmp_path: Path, heir: Path) -> None:
    texts = [
        "rewards=[{name: target_string, arguments: {text: \"two\\nlines # 'and' more\"}}]",
        'data.system_prompt="Say: yes\\n\\ttab"',
        'generation.stop=["\\n\\n", "#", "a: b"]',
        "kl.coefficient=1e-7",
        'policy="12"',
    ]
    config = load_config(PPOConfig, heir, texts)
    saved = tmp_path / "shown.yaml"
    saved.write_text(shown(config, "ppo"), encoding="utf-8")
    again = load_config(PPOConfig, saved)
    assert again == config
    assert (explicit_keys(again), given_keys(again)) == (explicit_keys(config), given_keys(config))
    assert again.generation.stop == ["\n\n", "#", "a: b"] and again.policy == "12"


def test_on_a_terminal_what_was_set_stands_out(heir: Path) -> None:
    styles = {line.name: str(line.rich().spans) for line in view(load_config(PPOConfig, heir), "ppo")}
    assert "bold green" in styles["target"] and "magenta" in styles["horizon"]
    assert "dim strike" in styles["length_penalty"]
    assert {line.rich().plain for line in view(load_config(PPOConfig), "ppo")} >= {
        "kl:  # the price of leaving the reference"
    }


def test_show_prints_text_that_yaml_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf("config", "show", "rm", "--config", "rm.yaml", "run.seed=3") == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert yaml.safe_load(said)["run"]["seed"] == 3
    assert rlhf("config", "show", "ppo", "kl.horizon=5") == 2
    assert "config key 'kl.horizon' has no effect here because kl.controller is fixed" in capsys.readouterr().err


# ---------------------------------------------------------------- schema


def test_the_bundled_files_are_found() -> None:
    expected = {"demo": "pipeline", "hh_gpt2": "pipeline", "pretrain_tiny": "pretrain", "sft": "sft", "rm": "rm"}
    expected |= {"dpo": "dpo", "ppo": "ppo", "eval": "eval", "online_dpo": "online-dpo"}
    assert {name: RECIPES[f"{name}.yaml"] for name in expected} == expected


@pytest.mark.parametrize("name", RECIPES)
def test_bundled_files_load_and_fit_the_schema_of_their_recipe(name: str) -> None:
    load_config(config_class(RECIPES[name]), CONFIG_FILES / name)
    schema = json_schema(config_class(RECIPES[name]), RECIPES[name])
    tree = read_yaml_file(CONFIG_FILES / name).tree
    assert mistakes(tree, schema, schema) == []


@pytest.mark.parametrize("recipe", CONFIGS)
def test_resolved_files_of_runs_fit_too(recipe: str) -> None:
    schema = json_schema(CONFIGS[recipe], recipe)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == f"rlhf {recipe}"
    tree = yaml.safe_load(shown(load_config(CONFIGS[recipe], None, ["run.name=one"]), recipe))
    assert tree["set_by_user"] == ["run.name"]
    assert mistakes(tree | {"extends": "other.yaml"}, schema, schema) == []


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"kl": {"horizn": 5}}, [".kl.horizn: additionalProperties"]),
        ({"kl": {"controller": "adaptve"}}, [".kl.controller: enum"]),
        ({"ppo": {"clip_range": 1.5, "gamma": "one"}}, [".ppo.clip_range: exclusiveMaximum", ".ppo.gamma: type"]),
        ({"rewards": [{"weight": 2}]}, [".rewards.0.name: required"]),
        ({"run": {"seed": -1, "name": "../up"}}, [".run.seed: minimum", ".run.name: anyOf"]),
        ({"extends": 3}, [".extends: type"]),
        ({"data": {"train_files": "a.jsonl", "validation_files": ["b.jsonl"]}}, []),
        ({"ppo": {"target_kl": None}, "extends": "ppo.yaml"}, []),
    ],
)
def test_the_schema_finds_what_loading_would(tree: dict[str, Any], expected: list[str]) -> None:
    schema = json_schema(PPOConfig, "ppo")
    assert mistakes(tree, schema, schema) == expected


def test_every_key_of_the_schema_is_described() -> None:
    for recipe, cls in CONFIGS.items():
        schema = json_schema(cls, recipe)
        sections = {"the whole": schema, **schema["$defs"]}
        bare = [
            f"{s}.{n}"
            for s, part in sections.items()
            for n, one in part["properties"].items()
            if "description" not in one
        ]
        assert bare == []


def test_schema_is_printed_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf("config", "schema", "rm") == 0
    printed = json.loads(capsys.readouterr().out)
    path = tmp_path / "rm.json"
    assert rlhf("config", "schema", "rm", "--output", str(path)) == 0
    assert json.loads(path.read_text(encoding="utf-8")) == printed
    assert f"# yaml-language-server: $schema={path}" in capsys.readouterr().out
    assert rlhf("config", "schema", "rm", "--output", str(tmp_path / "no" / "rm.json")) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert rlhf("config", "schema", "a2c") == 2
