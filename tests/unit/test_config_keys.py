"""Every key of every recipe is accounted for, and one that cannot have an effect is refused (checklist C9).

That changing the others changes what a run leaves behind is shown by `integration/test_config_keys_observed.py`.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
from config_keys import CASES, IDLE, IN_ONE_RECIPE, Refused, keys_of, overrides, stage_keys

from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.recipes.resume import CONFIGS

KEYS = list(stage_keys())
STAGES = [recipe for recipe in CONFIGS if recipe != "pipeline"]
NAMES = (
    "runs",
    "elsewhere",
    "base",
    "other",
    "tokenizer",
    "refuser",
    "policy",
    "reward",
    "other_reward",
    "measured",
    "ensemble",
    "process",
    "other_process",
)
DATA = ("pairs", "more", "renamed", "hh", "chats", "steps", "more_steps", "renamed_steps", "hh_steps")
PLACES = {name: f"somewhere/{name}" for name in NAMES} | {name: f"{name}.jsonl" for name in DATA}
PLACES |= {name: f"{name}.jsonl" for name in ("answers", "other_answers", "labelled", "more_labelled")}
PLACES |= {"server": "http://127.0.0.1:1/v1", "key_variable": "A_KEY", "functions": "mine.py"}
PLACES |= {"points": "points.csv", "more_points": "more_points.csv"}
PLACES |= {"absent_device": "cuda", "splits": "some/splits", "step_splits": "some/steps"}


def test_C9_no_key_is_without_an_entry() -> None:
    assert [f"{recipe}: {key}" for recipe, key, found in KEYS if not found] == []
    assert len(KEYS) > 350


def test_C9_no_entry_is_without_a_key() -> None:
    fields = defaultdict(set)
    for cls in CONFIGS.values():
        for _, owner, name in keys_of(cls):
            for above in owner.__mro__:
                fields[above].add(name)
    assert [(cls.__name__, name) for cls, entries in CASES.items() for name in entries if name not in fields[cls]] == []
    known = {recipe: {key for key, _, _ in keys_of(CONFIGS[recipe])} for recipe in IN_ONE_RECIPE}
    assert [(r, key) for r, entries in IN_ONE_RECIPE.items() for key in entries if key not in known[r]] == []


def refusals(recipe: str) -> list[tuple[str, Refused]]:
    return [(key, case) for name, key, found in KEYS if name == recipe for case in found if isinstance(case, Refused)]


@pytest.mark.parametrize("recipe", STAGES)
def test_C9_a_key_that_cannot_act_is_refused(recipe: str) -> None:
    wrong = []
    for key, case in refusals(recipe):
        load_config(CONFIGS[recipe], overrides=overrides(recipe, case, PLACES))  # what stands around is sound
        expected = f"config key '{key}' {IDLE}" if case.words == IDLE else case.words
        try:
            load_config(CONFIGS[recipe], overrides=overrides(recipe, case, PLACES, key))
        except UserError as error:
            wrong += [] if expected in str(error) else [(key, case, str(error))]
        else:
            wrong.append((key, case, "it was let pass"))
    assert wrong == []
