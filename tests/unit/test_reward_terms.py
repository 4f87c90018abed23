"""Rewards with different aims: each is logged, a rule makes them one, and their models learn from rows of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.data_config import DataConfig, PromptDataConfig
from rlhf.data.loading import load_splits, rows_from_memory
from rlhf.data.rows import PreferenceRow, PromptRow
from rlhf.infra.errors import UserError
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.rewards.combination import CombinationConfig
from rlhf.rewards.protocol import CombinedReward, RewardTerm, Scores


def constant(*values: float) -> Any:
    return lambda prompts, completions, **columns: list(values)


# Helpful and harmless answers: neither, only one, only the other, both.
HELPFUL, HARMLESS = (-1.0, 2.0, -1.0, 2.0), (-2.0, -2.0, 1.0, 1.0)


def scored(weights: Sequence[float] = (1.0, 1.0), columns: dict[str, list[Any]] | None = None, **rule: Any) -> Scores:
    terms = [
        RewardTerm("helpful", constant(*HELPFUL), weights[0]),
        RewardTerm("harmless", constant(*HARMLESS), weights[1]),
    ]
    return CombinedReward(terms, CombinationConfig(**rule))(["p"] * 4, ["a"] * 4, columns or {})


def test_without_a_rule_the_weighted_sum_is_the_score_and_each_term_is_kept() -> None:
    found = scored((0.75, 0.25))
    assert found.total == [-1.25, 1.0, -0.5, 1.75]
    assert found.by_term == {"helpful": list(HELPFUL), "harmless": list(HARMLESS)}
    assert found.details == {}


def test_the_lowest_counts_and_which_it_was_is_told() -> None:
    found = scored((1.0, 2.0), rule="lowest")
    assert found.total == [-4.0, -4.0, -1.0, 2.0]
    assert found.details == {"helpful/lowest": [0.0, 0.0, 1.0, 1.0], "harmless/lowest": [1.0, 1.0, 0.0, 0.0]}


def test_a_term_without_weight_is_looked_at_and_never_the_lowest() -> None:
    terms = [RewardTerm("a", constant(2.0)), RewardTerm("b", constant(3.0)), RewardTerm("seen", constant(-9.0), 0.0)]
    found = CombinedReward(terms, CombinationConfig(rule="lowest"))(["p"], ["a"], {})
    assert found.total == [2.0] and found.by_term["seen"] == [-9.0]
    assert set(found.details) == {"a/lowest", "b/lowest"}


def test_an_unsafe_answer_earns_its_safety_alone() -> None:
    found = scored((2.0, 1.0), rule="gate", gate="harmless")
    assert found.total == [-2.0, -2.0, -2.0, 4.0]  # of the safe ones what they are worth as help
    assert found.details == {"harmless/closed": [1.0, 1.0, 0.0, 0.0]}
    assert scored((2.0, 1.0), rule="gate", gate="harmless", threshold=-2.5).total == [-2.0, 4.0, -2.0, 4.0]


def test_some_prompts_are_always_judged_by_the_gate() -> None:
    always = {"subset": "harmless"}
    columns = {"subset": ["helpful", "helpful", "helpful", "harmless"]}
    found = scored(columns=columns, rule="gate", gate="harmless", always=always)
    assert found.total == [-2.0, -2.0, -1.0, 1.0]
    assert found.details == {"harmless/closed": [1.0, 1.0, 0.0, 1.0]}
    numbers = scored(columns={"unsafe": [0, 1, 1, 0]}, rule="gate", gate="harmless", threshold=-9, always={"unsafe": 1})
    assert numbers.total == [-1.0, -2.0, 1.0, 2.0]
    with pytest.raises(UserError, match="asks for the column 'subset', but the prompts have family"):
        scored(columns={"family": ["a"] * 4}, rule="gate", gate="harmless", always=always)


@pytest.mark.parametrize(
    ("rewards", "rule", "words"),
    [
        ([{"name": "model"}], {"rule": "lowest"}, "needs several rewards with a weight, but there is model"),
        ([{"name": "a:b"}, {"name": "model", "weight": 0}], {"rule": "lowest"}, "but there is a:b"),
        (
            [{"name": "model"}, {"name": "a:b"}],
            {"rule": "gate"},
            "needs combination.gate, one of the rewards model, a:b",
        ),
        ([{"name": "model"}, {"name": "model"}], {"rule": "gate", "gate": "safe"}, "are called model, model_2"),
    ],
)
def test_a_rule_that_does_not_fit_the_rewards_is_refused(
    rewards: list[dict[str, Any]], rule: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        PPOConfig(rewards=rewards, combination=rule)


def test_every_model_among_the_rewards_is_in_the_lineage() -> None:
    terms = [{"name": "model"}, {"name": "helpful", "model": "one"}, {"name": "harmless", "model": "two"}]
    config = PPOConfig(policy="sft", reward_model="judges", rewards=terms)
    assert config.lineage == {
        "policy": "sft",
        "reward_model": "judges",
        "reward_model_helpful": "one",
        "reward_model_harmless": "two",
    }


# ---------------------------------------------------------------- rows of a subset


ROWS = [
    {"prompt": f"q{i}", "chosen": "good", "rejected": "bad", "subset": subset, "level": i}
    for i, subset in enumerate(["helpful-base", "harmless-base", "helpful-online", "harmless-base"])
]


def prompts_where(**where: Any) -> list[str]:
    loaded = rows_from_memory(ROWS, DataConfig(where=where))
    assert loaded.skipped == ({"where": 4 - len(loaded.rows)} if len(loaded.rows) < 4 else {})
    return [str(row.prompt) for row in loaded.rows if isinstance(row, PreferenceRow)]


def test_rows_are_taken_by_the_values_of_their_columns() -> None:
    assert prompts_where() == ["q0", "q1", "q2", "q3"]
    assert prompts_where(subset="harmless-base") == ["q1", "q3"]
    assert prompts_where(subset=["helpful-base", "helpful-online"]) == ["q0", "q2"]
    assert prompts_where(subset="harmless-base", level=[0, 3]) == ["q3"]


def test_a_column_or_value_that_is_not_there_is_told_with_what_is() -> None:
    with pytest.raises(UserError, match=r"subset in \['harmless'\], but 'rows' has harmless-base, helpful-"):
        prompts_where(subset="harmless")
    with pytest.raises(UserError, match=r"asks for kind in \['a'\], but 'rows' has no value at all"):
        prompts_where(kind="a")


def test_the_built_in_world_has_both_subsets() -> None:
    def split(subset: str) -> list[PromptRow]:
        loaded, _ = load_splits(PromptDataConfig(max_samples=60, where={"subset": subset}), world="prompts")
        return [row for row in loaded.rows if isinstance(row, PromptRow)]

    harmless, helpful = split("harmless"), split("helpful")
    assert len(harmless) + len(helpful) == 60 and len(harmless) > 3
    assert {row.columns["task"]["spec"]["kind"] for row in harmless} == {"harmful"}
    assert {"arithmetic", "code", "facts", "safety"} == {row.columns["family"] for row in helpful}


def test_hh_rows_come_apart_by_their_subset() -> None:
    file = Path(__file__).parents[3] / "shared" / "data" / "hh_rlhf" / "val.jsonl.gz"
    if not file.is_file():
        pytest.skip("shared/data is not here")
    sizes = []
    for subset in ("helpful-base", "harmless-base"):
        config = DataConfig(train_files=(str(file),), where={"subset": subset}, validation_fraction=0)
        rows, _ = load_splits(config)
        assert {row.columns["subset"] for row in rows.rows} == {subset}  # type: ignore[union-attr]
        sizes.append(len(rows.rows))
    assert sizes == [201, 213]
