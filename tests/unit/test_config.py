from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, model_validator

from rlhf.infra.config import (
    Config,
    explicit_keys,
    find_config_file,
    given_keys,
    idle_keys,
    load_config,
    refuse_idle_keys,
    to_yaml,
)
from rlhf.infra.errors import UserError


class KLConfig(Config):
    controller: Literal["fixed", "adaptive"] = Field("fixed", description="how the coefficient moves")
    horizon: int = Field(10_000, ge=1, description="steps in which the adaptive controller reacts")

    def idle_keys(self) -> Mapping[str, str]:
        return {} if self.controller == "adaptive" else {"horizon": "kl.controller is fixed"}


class QuantConfig(Config):
    bits: Literal[4, 8] = 4


class RewardConfig(Config):
    name: str = "length"
    weight: float = 1.0


class RecipeConfig(Config):
    learning_rate: float = Field(1e-4, gt=0, lt=1, description="peak of the schedule")
    num_rows: int = Field(8, ge=1)
    num_mini_batches: int = Field(2, ge=1)
    kl: KLConfig = KLConfig()
    quant: QuantConfig | None = None
    columns: dict[str, Any] = Field(default_factory=dict)
    rewards: list[RewardConfig] = Field(default_factory=list)
    steps: int | Literal["auto"] = "auto"
    folder: Path | None = None

    @model_validator(mode="after")
    def _mini_batches_fit(self) -> RecipeConfig:
        if self.num_mini_batches > self.num_rows:
            raise ValueError(f"num_mini_batches is {self.num_mini_batches}, more than the {self.num_rows} rows")
        return self


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path | None = None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(RecipeConfig, path, overrides)
    return str(caught.value)


def test_defaults_without_a_file() -> None:
    config = load_config(RecipeConfig)
    assert config == RecipeConfig()
    assert explicit_keys(config) == frozenset()


def test_command_line_beats_file_beats_extended_file_beats_default(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "learning_rate: 0.5\nnum_rows: 20\nkl: {controller: adaptive, horizon: 7}\n")
    path = write(tmp_path, "own.yaml", "extends: base.yaml\nnum_rows: 30\nkl: {horizon: 9}\n")
    config = load_config(RecipeConfig, path, ["kl.horizon=11"])
    assert (config.learning_rate, config.num_rows, config.num_mini_batches) == (0.5, 30, 2)
    assert (config.kl.controller, config.kl.horizon) == ("adaptive", 11)
    assert explicit_keys(config) == {"num_rows", "kl.horizon"}  # what was inherited was not set


def test_extends_is_one_level_deep(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "num_rows: 3\n")
    write(tmp_path, "b.yaml", "extends: a.yaml\n")
    assert "only one level" in error_of(write(tmp_path, "c.yaml", "extends: b.yaml\n"))
    assert "'gone.yaml'" in error_of(write(tmp_path, "d.yaml", "extends: gone.yaml\n"))


def test_values_on_the_command_line_are_yaml() -> None:
    texts = ["learning_rate=3e-4", "quant.bits=8", "columns.a=1e-5", "columns.b=no", "columns.c=[1, x]", "steps=12"]
    config = load_config(RecipeConfig, None, texts)
    assert config.learning_rate == 3e-4
    assert config.quant == QuantConfig(bits=8)
    assert config.columns == {
        "a": 1e-5,
        "b": "no",
        "c": [1, "x"],
    }  # no means the word; only true and false are booleans
    assert config.steps == 12
    assert load_config(RecipeConfig, None, ["quant=null"]).quant is None
    assert load_config(RecipeConfig, None, ["rewards=[{name: a}, {name: b}]", "rewards.1.weight=3"]).rewards == [
        RewardConfig(name="a"),
        RewardConfig(name="b", weight=3.0),
    ]


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("learning_rat=1", "learning_rate"),
        ("kl.horizn=5", "kl.horizon"),
        ("horizon=5", "kl.horizon"),
        ("ppo.learning_rate=0.1", "learning_rate"),
        ("quant.bit=4", "quant.bits"),
        ("rewards=[{wieght: 2}]", "rewards.0.weight"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, nearest: str) -> None:
    message = error_of(None, override)
    assert message.startswith("unknown config key '")
    assert message.endswith(f"the nearest known key is '{nearest}'")


def test_bad_value_names_key_value_and_range() -> None:
    assert error_of(None, "learning_rate=2") == (
        "config key 'learning_rate': got 2, expected less than 1 (allowed: more than 0 and less than 1; "
        "peak of the schedule)"
    )
    assert "'fixed' or 'adaptive'" in error_of(None, "kl.controller=adaptve")
    assert "finite" in error_of(None, "learning_rate=.nan")
    both_branches = error_of(None, "steps=many")
    assert both_branches.startswith("config key 'steps': got 'many'") and "'auto'" in both_branches


def test_all_wrong_keys_are_told_at_once() -> None:
    message = error_of(None, "learning_rate=2", "num_rows=0")
    assert "'learning_rate'" in message and "'num_rows'" in message


def test_fields_that_do_not_fit_together() -> None:
    assert error_of(None, "num_mini_batches=9") == (
        "the config does not fit together: num_mini_batches is 9, more than the 8 rows"
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("num_rows: 1\nnum_rows: 2\n", "line 2 is not valid YAML: the key 'num_rows' stands twice"),
        ("num_rows: [1\n", "is not valid YAML"),
        ("- 1\n- 2\n", "must hold 'key: value' lines, got a list"),
        ("just words\n", "must hold 'key: value' lines, got a str"),
    ],
)
def test_files_that_are_not_configs(tmp_path: Path, text: str, part: str) -> None:
    message = error_of(write(tmp_path, "bad.yaml", text))
    assert "bad.yaml" in message and part in message


def test_empty_file_and_merge_keys_are_fine(tmp_path: Path) -> None:
    assert load_config(RecipeConfig, write(tmp_path, "empty.yaml", "# nothing\n")) == RecipeConfig()
    text = "columns:\n  base: &base {x: 1}\n  more: {<<: *base, y: 2}\n"
    assert load_config(RecipeConfig, write(tmp_path, "merge.yaml", text)).columns["more"] == {"x": 1, "y": 2}


@pytest.mark.parametrize("override", ["num_rows", "=3", "kl..horizon=3", ".num_rows=3"])
def test_malformed_override(override: str) -> None:
    assert "key.subkey=value" in error_of(None, override)


def test_override_below_a_single_value(tmp_path: Path) -> None:
    path = write(tmp_path, "own.yaml", "num_rows: 4\nrewards: [{name: a}]\n")
    assert "single value 4" in error_of(path, "num_rows.x=1")
    assert "list of 1" in error_of(path, "rewards.1.weight=2")


def test_a_key_without_effect_is_refused_only_when_the_user_set_it(tmp_path: Path) -> None:
    reason = "config key 'kl.horizon' has no effect here because kl.controller is fixed"
    assert error_of(None, "kl.horizon=5").startswith(reason)
    assert error_of(write(tmp_path, "own.yaml", "kl: {horizon: 5}\n")).startswith(reason)
    assert load_config(RecipeConfig, None, ["kl.horizon=5", "kl.controller=adaptive"]).kl.horizon == 5
    write(tmp_path, "base.yaml", "kl: {controller: adaptive, horizon: 5}\n")
    inherited = write(tmp_path, "heir.yaml", "extends: base.yaml\nkl: {controller: fixed}\n")
    assert load_config(RecipeConfig, inherited).kl.controller == "fixed"
    with pytest.raises(UserError, match=r"kl\.horizon"):
        refuse_idle_keys(RecipeConfig(kl=KLConfig(horizon=5)))


def test_resolved_yaml_loads_to_an_equal_config_and_remembers_what_was_set(tmp_path: Path) -> None:
    texts = ["learning_rate=1e-5", "quant.bits=8", "folder=some/where", "rewards=[{name: a}]"]
    config = load_config(RecipeConfig, None, texts)
    path = write(tmp_path, "config.yaml", to_yaml(config))
    again = load_config(RecipeConfig, path)
    assert again == config
    assert explicit_keys(again) == explicit_keys(config) == {"learning_rate", "quant.bits", "folder", "rewards"}
    assert "horizon: 10000" in path.read_text(encoding="utf-8")  # the resolved file holds idle defaults too


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RecipeConfig().num_rows = 3  # type: ignore[misc]


def test_a_missing_file_lists_the_bundled_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'no/such\.yaml' does not exist; the bundled ones are: "):
        find_config_file("no/such.yaml")
    monkeypatch.chdir(tmp_path)
    bundled = sorted(path.name for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"))
    for name in bundled:
        assert find_config_file(f"configs/{name}").name == name  # found from any working directory


def test_what_was_inherited_is_given_but_not_set(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "num_rows: 20\nkl: {controller: adaptive, horizon: 7}\ncolumns: {a: 1}\nsteps: 3\n")
    path = write(tmp_path, "own.yaml", "extends: base.yaml\nkl: {horizon: 9}\n")
    config = load_config(RecipeConfig, path, ["steps=4"])
    assert explicit_keys(config) == {"kl.horizon", "steps"}
    assert given_keys(config) == {"kl.horizon", "steps", "num_rows", "kl.controller", "columns"}
    again = load_config(RecipeConfig, write(tmp_path, "run.yaml", to_yaml(config)))
    assert again == config
    assert (explicit_keys(again), given_keys(again)) == (explicit_keys(config), given_keys(config))
    assert given_keys(RecipeConfig(num_rows=9)) == explicit_keys(RecipeConfig(num_rows=9)) == {"num_rows"}


def test_null_on_the_command_line_takes_a_key_of_the_file_back(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "num_rows: 20\nfolder: there\n")
    path = write(tmp_path, "own.yaml", "extends: base.yaml\nkl: {horizon: 9}\nlearning_rate: 0.5\nquant: {bits: 8}\n")
    error = error_of(path)
    assert "'kl.horizon'" in error and "KEY=null takes it back" in error
    for text in ("kl.horizon=null", "kl=null"):
        config = load_config(RecipeConfig, path, [text, "num_rows=null"])
        assert (config.kl, config.num_rows, config.learning_rate) == (KLConfig(), 8, 0.5)
        assert given_keys(config) == {"learning_rate", "quant.bits", "folder"}
    # Where null is a value of the key, it is that value.
    config = load_config(RecipeConfig, path, ["kl=null", "quant=null", "folder=null"])
    assert config.quant is None and config.folder is None
    assert explicit_keys(config) == {"learning_rate", "quant", "folder"}
    assert "got None" in error_of(
        write(tmp_path, "bad.yaml", "num_rows: null\n")
    )  # in a file there is a line to remove
    assert load_config(RecipeConfig, None, ["num_rows=null", "kl.horizon=null"]) == RecipeConfig()


class NestedConfig(Config):
    size: int | None = 3
    recipe: RecipeConfig = RecipeConfig()

    def in_effect(self) -> NestedConfig:
        kl = self.recipe.kl.model_copy(update={"controller": "adaptive"})
        return self.model_copy(update={"recipe": self.recipe.model_copy(update={"kl": kl})})

    def idle_keys(self) -> Mapping[str, str]:
        return {"recipe.quant": "there is nothing to quantise", "size": "size is of no account", "recipe.steps": "no"}


def test_idle_keys_are_those_of_the_config_as_it_is_used() -> None:
    assert load_config(NestedConfig, None, ["recipe.kl.horizon=5"]).recipe.kl.controller == "fixed"
    assert set(idle_keys(NestedConfig())) == {"recipe.quant", "size", "recipe.steps"}
    with pytest.raises(UserError) as caught:
        load_config(NestedConfig, None, ["recipe.quant.bits=8", "size=2", "recipe.steps=2"])
    assert str(caught.value) == (
        "config key 'recipe.quant.bits' has no effect here because there is nothing to quantise; "
        "config key 'recipe.steps' has no effect here because no; "
        "config key 'size' has no effect here because size is of no account; "
        "remove the key (KEY=null takes it back) or change that"
    )
    load_config(NestedConfig, None, ["size=null", "recipe.quant=null"])  # null says nothing


def test_what_a_program_fills_in_does_not_count_as_set() -> None:
    config = load_config(RecipeConfig, None, ["num_rows=5"])
    filled = config.model_copy(update={"kl": config.kl.model_copy(update={"horizon": 3}), "steps": 2})
    assert (filled.kl.horizon, filled.steps) == (3, 2)
    assert explicit_keys(filled) == {"num_rows"}
    refuse_idle_keys(filled)
