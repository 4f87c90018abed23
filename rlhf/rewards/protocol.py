"""What a reward is, and how several are put together.

A reward is a function `f(prompts, completions, **columns) -> list[float]`, the convention of the ecosystem: a user's
own function, a rule, a learned model, a verifier and a judge are interchangeable. `columns` holds one list per extra
column of the prompt set, and these, which every reward may use or ignore:

    prompt_ids, completion_ids   token ids as sampled (list[list[int]]), the stop token included
    finished                     whether each answer ended by itself (list[bool])
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from rlhf.data.rows import Prompt
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError

RewardFunction = Callable[..., Sequence[float]]


class RewardTermConfig(Config):
    """One reward and its weight."""

    name: str = Field(
        description="a rule or verifier, `model`, or a function as `module:function` or `file.py:function`"
    )
    weight: float = Field(1.0, description="what its value is multiplied with before all terms are added")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="settings of a rule or verifier, such as `text` of target_string"
    )

    @model_validator(mode="after")
    def _only_rules_take_arguments(self) -> RewardTermConfig:
        if self.arguments and (self.name == "model" or ":" in self.name):
            raise ValueError(
                f"the reward '{self.name}' takes no arguments, only rules and verifiers do; got {self.arguments}"
            )
        return self


@dataclass(frozen=True)
class RewardTerm:
    """A named reward function and its weight."""

    name: str
    function: RewardFunction
    weight: float = 1.0


@dataclass(frozen=True)
class Scores:
    """The weighted sum per answer, and each term's own values before weighting."""

    total: list[float]
    by_term: dict[str, list[float]]


class CombinedReward:
    """The weighted sum of reward terms; a second term of one name is called `name_2`."""

    def __init__(self, terms: Sequence[RewardTerm]) -> None:
        if not terms:
            raise UserError("no reward was given; name at least one under `rewards`, a rule or `model`")
        self.terms = list(terms)
        counts: Counter[str] = Counter()
        self.names: list[str] = []
        for term in self.terms:
            counts[term.name] += 1
            self.names.append(term.name if counts[term.name] == 1 else f"{term.name}_{counts[term.name]}")

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Scores:
        """Score every answer.

        Raises:
            UserError: a reward returned the wrong number of values, or one that is no finite number.
        """
        total = [0.0] * len(completions)
        by_term: dict[str, list[float]] = {}
        for name, term in zip(self.names, self.terms, strict=True):
            returned = list(term.function(prompts, completions, **columns))
            if len(returned) != len(completions):
                raise UserError(f"reward '{name}' returned {len(returned)} values for {len(completions)} completions")
            values = by_term[name] = [_finite(value, name, place) for place, value in enumerate(returned)]
            total = [t + term.weight * v for t, v in zip(total, values, strict=True)]
        return Scores(total, by_term)


def load_function(name: str, role: str = "reward") -> RewardFunction:
    """Import a user's function by `package.module:function` or `path/to/file.py:function`; `role` is what it serves as.

    Raises:
        UserError: nothing of that name is there, or it cannot take the prompt set's columns.
    """
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        path = Path(place)
        spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path) if path.is_file() else None
        if spec is None or spec.loader is None:
            raise UserError(f"no {role} '{name}': there is no file {place}")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their own module up; the prefix keeps the file from standing in for another module.
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except (SyntaxError, ImportError) as error:
            raise UserError(f"no {role} '{name}': {place} cannot be read: {error}") from error
    else:
        try:
            module = importlib.import_module(place)
        except (ImportError, ValueError) as error:  # ValueError: nothing stands before the colon
            raise UserError(f"no {role} '{name}': {error}") from error
    function = vars(module).get(attribute)
    if not callable(function):
        raise UserError(f"no {role} '{name}': {place} defines no function '{attribute}'")
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise UserError(f"{role} '{name}' must take **columns beside prompts and completions")
    result: RewardFunction = function
    return result


def _finite(value: Any, name: str, place: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        # One such value would stay in the running mean of the scores for good.
        raise UserError(f"reward '{name}' returned {value!r} for completion {place}; expected a finite number")
    return number
