"""What a reward is, and how several are put together.

A reward is a function `f(prompts, completions, **columns) -> list[float]`, the convention of the ecosystem: a user's
own function, a rule, a learned model, a verifier and a judge are interchangeable. `columns` holds one list per extra
column of the prompt set, and these, which every reward may use or ignore:

    prompt_ids, completion_ids   token ids as sampled (list[list[int]]), the stop token included
    finished                     whether each answer ended by itself (list[bool])

A `StepwiseReward` gives a value to every step of an answer, which PPO and GRPO pay where the step ends.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import Field, model_validator

from rlhf.data.rows import Prompt
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.models.ensemble import EnsembleRuleName
from rlhf.rewards.combination import CombinationConfig, combine

RewardFunction = Callable[..., Sequence[float]]
# Where a step ends, in characters of the answer's text, and what it is worth.
StepValue = tuple[int, float]


@runtime_checkable
class DetailedReward(Protocol):
    """A reward that has more to say of an answer than its value, for the log: `detailed` gives both."""

    def detailed(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Values, and further numbers of every answer by name."""


class RewardTermConfig(Config):
    """One reward and its weight."""

    name: str = Field(
        description="a rule or verifier, `model`, `process`, or a function as `module:function` or `file.py:function`; "
        "where `model` is given, any name"
    )
    model: str | None = Field(
        None,
        description="run, folder or hub name of the model behind this term; null: `reward_model` or `process_model`",
    )
    weight: float = Field(1.0, description="what its value is multiplied with before all terms are added")
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of a rule, a verifier or `process`, such as `text` of target_string",
    )
    rule: EnsembleRuleName | None = Field(
        None, description="how an ensemble's members become one score here; null: as it was saved"
    )
    penalty: float | None = Field(
        None, ge=0, description="weight of the variance where that rule is penalised; null: as it was saved"
    )

    @property
    def is_learned(self) -> bool:
        """Whether a reward model is behind it that gives an answer one score."""
        return self.name == "model" or (self.model is not None and self.name != "process")

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> RewardTermConfig:
        if self.arguments and (self.is_learned or ":" in self.name):
            raise ValueError(
                f"the reward '{self.name}' takes no arguments, only rules, verifiers and `process` do; got "
                f"{self.arguments}"
            )
        if self.model is not None and ":" in self.name:
            raise ValueError(f"the reward '{self.name}' is a function, and model={self.model} names another; use one")
        if not self.is_learned and (self.rule is not None or self.penalty is not None):
            raise ValueError(f"the reward '{self.name}' has no members; rule and penalty are about ensembles")
        if self.penalty is not None and self.rule not in (None, "penalised"):
            raise ValueError(f"the reward '{self.name}' has a penalty, but its rule is {self.rule}; use penalised")
        return self


class StepwiseReward:
    """A reward that is paid step by step."""

    def by_step(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[list[StepValue]]:
        """Every answer's steps, in the order of the text; an answer may have none."""
        raise NotImplementedError


@dataclass(frozen=True)
class RewardTerm:
    """A named reward function and its weight."""

    name: str
    function: RewardFunction | StepwiseReward
    weight: float = 1.0


@dataclass(frozen=True)
class Scores:
    """What answers are worth.

    `total` is the combined score of the terms that are paid once per answer; `by_term` holds each term's own values
    before weighting, for a term paid step by step the sum over the steps. `details` are further numbers, by
    `<term>/<name>`: what members of an ensemble say, or whether a gate was closed. `by_step` are the weighted values of
    the terms that are paid step by step, empty where there is no such term.
    """

    total: list[float]
    by_term: dict[str, list[float]]
    details: dict[str, list[float]] = field(default_factory=dict)
    by_step: list[list[StepValue]] = field(default_factory=list)

    @property
    def returns(self) -> list[float]:
        """All that is paid for each answer, at its end and on the way."""
        if not self.by_step:
            return self.total
        return [end + sum(value for _, value in steps) for end, steps in zip(self.total, self.by_step, strict=True)]

    def select(self, rows: Sequence[int]) -> Scores:
        """Those of some answers, in this order."""
        return Scores(
            [self.total[row] for row in rows],
            _rows_of(self.by_term, rows),
            _rows_of(self.details, rows),
            [self.by_step[row] for row in rows if self.by_step],
        )


def joined_scores(parts: Sequence[Scores]) -> Scores:
    """Those of several batches behind each other, by the same terms."""
    return Scores(
        [value for part in parts for value in part.total],
        {name: [value for part in parts for value in part.by_term[name]] for name in parts[0].by_term},
        {name: [value for part in parts for value in part.details[name]] for name in parts[0].details},
        [steps for part in parts for steps in part.by_step],
    )


class CombinedReward:
    """Reward terms made into one by a rule, by default their weighted sum; a second of one name is called `name_2`."""

    def __init__(self, terms: Sequence[RewardTerm], combination: CombinationConfig | None = None) -> None:
        if not terms:
            raise UserError("no reward was given; name at least one under `rewards`, a rule or `model`")
        self.terms, self.names = list(terms), term_names(terms)
        self.combination = combination or CombinationConfig()
        # Terms that are paid step by step are paid besides; a rule joins those of whole answers.
        self._weights = {
            name: term.weight
            for name, term in zip(self.names, terms, strict=True)
            if not isinstance(term.function, StepwiseReward)
        }
        self.combination.refuse_strangers(self._weights)

    @property
    def is_stepwise(self) -> bool:
        """Whether a term is paid step by step."""
        return any(isinstance(term.function, StepwiseReward) for term in self.terms)

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Scores:
        """Score every answer.

        Raises:
            UserError: a reward returned the wrong number of values, or one that is no finite number.
        """
        by_term: dict[str, list[float]] = {}
        details: dict[str, list[float]] = {}
        by_step: list[list[StepValue]] = [[] for _ in completions] if self.is_stepwise else []
        for name, term in zip(self.names, self.terms, strict=True):
            if isinstance(term.function, StepwiseReward):
                of_answers = term.function.by_step(prompts, completions, **columns)
                _as_many(of_answers, completions, name)
                for place, steps in enumerate(of_answers):
                    by_step[place] += [(end, term.weight * _finite(value, name, place)) for end, value in steps]
                by_term[name] = [sum(value for _, value in steps) for steps in of_answers]
                continue
            if isinstance(term.function, DetailedReward):
                returned, more = term.function.detailed(prompts, completions, **columns)
                details |= {f"{name}/{key}": values for key, values in more.items()}
            else:
                returned = list(term.function(prompts, completions, **columns))
            _as_many(returned, completions, name)
            by_term[name] = [_finite(value, name, place) for place, value in enumerate(returned)]
        once = {name: by_term[name] for name in self._weights}
        total, done = combine(once, list(self._weights.values()), self.combination, columns)
        return Scores(total or [0.0] * len(completions), by_term, details | done, by_step)


def reward_sources(
    terms: Sequence[RewardTermConfig], reward_model: str | None, process_model: str | None
) -> dict[str, str]:
    """The models behind a recipe's rewards, by role: its own, and those that terms name."""
    asked = {"reward_model": reward_model, "process_model": process_model}
    for name, term in zip(term_names(terms), terms, strict=True):
        kind = "process_model" if term.name == "process" else "reward_model"
        asked[f"{kind}_{name}"] = term.model
    return {role: source for role, source in asked.items() if source is not None}


def term_names(terms: Sequence[RewardTerm | RewardTermConfig]) -> list[str]:
    """What the terms are called in the log: a second one of the same name gets its number behind it."""
    counts: Counter[str] = Counter()
    names: list[str] = []
    for term in terms:
        counts[term.name] += 1
        names.append(term.name if counts[term.name] == 1 else f"{term.name}_{counts[term.name]}")
    return names


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


def _rows_of(columns: Mapping[str, Sequence[float]], rows: Sequence[int]) -> dict[str, list[float]]:
    return {name: [values[row] for row in rows] for name, values in columns.items()}


def _as_many(returned: Sequence[Any], completions: Sequence[str], name: str) -> None:
    if len(returned) != len(completions):
        raise UserError(f"reward '{name}' returned {len(returned)} values for {len(completions)} completions")


def _finite(value: Any, name: str, place: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        # One such value would stay in the running mean of the scores for good.
        raise UserError(f"reward '{name}' returned {value!r} for completion {place}; expected a finite number")
    return number
