"""From scored answers to what a suite says of a model: rates with intervals, changes, and what got worse."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.eval.intervals import Interval, mean_interval, newcombe_paired, paired_difference, wilson
from rlhf.eval.suite_items import Suite
from rlhf.infra.errors import UserError

RESULTS_FILE = "suites.json"
# The part of a ranked answer that says how often a coin would have been right.
GUESSING = "by_guessing"
_FORMAT = 1
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Answered:
    """One item with a model's answer to it.

    `score` is None where nobody can judge the answer. `num_tokens` and `finished` are None for ranked items, where
    nothing is written.
    """

    item_id: str
    group: str
    prompt: str
    response: str
    extracted: str | None
    score: float | None
    parts: Mapping[str, float]
    detail: str = ""
    num_tokens: int | None = None
    finished: bool | None = None


@dataclass(frozen=True)
class SuiteResult:
    """One model on one suite.

    `score` is the mean over items, with Wilson's interval where every item is right or wrong and a bootstrap where
    scores lie between; `groups` the same by group, `parts` other measures of the answers. `extracted` is the share of
    answers in which the extractor found one, `finished` the share that was not cut off.
    """

    model: str
    suite: str
    version: str
    sha256: str
    num: int
    score: Interval | None
    groups: dict[str, Interval]
    parts: dict[str, Interval]
    extracted: Interval
    finished: Interval | None
    mean_tokens: float | None
    scores: dict[str, float]

    @property
    def label(self) -> str:
        """Suite, version and hash: what the number must be quoted with."""
        return f"{self.suite} {self.version} ({self.sha256[:8]})"


@dataclass(frozen=True)
class Worse:
    """An item of a guard whose score fell."""

    item_id: str
    prompt: str
    before: float
    after: float
    answer_before: str
    answer_after: str


@dataclass(frozen=True)
class Comparison:
    """A model against the reference on the items both have: mean score of the model minus that of the reference.

    `wins` and `losses` count items whose score rose and fell. `worse` holds the items of a guard that fell.
    """

    model: str
    reference: str
    suite: str
    change: Interval
    wins: int
    losses: int
    worse: tuple[Worse, ...] = ()


def suite_result(model: str, suite: Suite, answers: Sequence[Answered], seed: int = 0) -> SuiteResult:
    """Summarise one model's answers to a suite's items."""
    scores = {answer.item_id: answer.score for answer in answers if answer.score is not None}
    groups: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {}
    for answer in answers:
        if answer.score is not None:
            groups.setdefault(answer.group, []).append(answer.score)
        for name, value in answer.parts.items():
            parts.setdefault(name, []).append(value)
    finished = [answer.finished for answer in answers if answer.finished is not None]
    lengths = [answer.num_tokens for answer in answers if answer.num_tokens is not None]
    return SuiteResult(
        model=model,
        suite=suite.name,
        version=suite.version,
        sha256=suite.sha256,
        num=len(answers),
        score=rate(list(scores.values()), seed) if scores else None,
        groups={name: rate(found, seed) for name, found in sorted(groups.items())} if len(groups) > 1 else {},
        parts={name: rate(found, seed) for name, found in sorted(parts.items())},
        extracted=wilson(sum(answer.extracted is not None for answer in answers), len(answers)),
        finished=wilson(sum(finished), len(finished)) if finished else None,
        mean_tokens=sum(lengths) / len(lengths) if lengths else None,
        scores=scores,
    )


def rate(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean of scores in [0, 1]: Wilson's interval where they are 0, 1 or ties at one half, else a bootstrap."""
    if all(value in (0.0, 0.5, 1.0) for value in values):
        return wilson(sum(values), len(values))
    return mean_interval(values, seed)


def compare_results(
    result: SuiteResult,
    reference: SuiteResult,
    answers: Mapping[str, Answered] | None = None,
    before: Mapping[str, Answered] | None = None,
    guard: bool = False,
    seed: int = 0,
) -> Comparison | None:
    """Compare two results of one suite item by item; None where they share no scored item.

    The interval is Newcombe's for paired rates where every item is right or wrong, else a paired bootstrap. Raises
    UserError when the suite was another one then: numbers of different versions do not compare.
    """
    if result.sha256 != reference.sha256:
        raise UserError(
            f"the suite '{result.suite}' was {reference.label} when '{reference.model}' was measured and is "
            f"{result.label} now; measure both with one version"
        )
    shared = [item for item in result.scores if item in reference.scores]
    if not shared:
        return None
    after, former = [result.scores[i] for i in shared], [reference.scores[i] for i in shared]
    fell = [i for i, a, b in zip(shared, after, former, strict=True) if a < b - _TOLERANCE]
    return Comparison(
        model=result.model,
        reference=reference.model,
        suite=result.suite,
        change=_change(after, former, seed),
        wins=sum(a > b + _TOLERANCE for a, b in zip(after, former, strict=True)),
        losses=len(fell),
        worse=tuple(_worse(i, result, reference, answers or {}, before or {}) for i in fell) if guard else (),
    )


def write_results(folder: Path, results: Sequence[SuiteResult], comparisons: Sequence[Comparison]) -> Path:
    """Write every number as `suites.json`; returns its path."""
    path = folder / RESULTS_FILE
    content = {
        "format": _FORMAT,
        "results": [asdict(result) for result in results],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    path.write_text(
        json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    return path


def read_results(folder: Path) -> list[SuiteResult]:
    """Read the results of an earlier evaluation. Raises UserError where there are none that can be read."""
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise UserError(f"'{folder}' holds no {RESULTS_FILE}; name the folder of an `rlhf eval suites=[...]` run")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [_from_json(row) for row in content["results"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is no result of suites ({type(error).__name__}: {error}); run it again") from None


def _change(after: Sequence[float], before: Sequence[float], seed: int) -> Interval:
    if all(value in (0.0, 1.0) for value in [*after, *before]):
        return newcombe_paired([value == 1.0 for value in after], [value == 1.0 for value in before])
    return paired_difference(after, before, seed)


def _worse(
    item: str,
    result: SuiteResult,
    reference: SuiteResult,
    answers: Mapping[str, Answered],
    before: Mapping[str, Answered],
) -> Worse:
    now, then = answers.get(item), before.get(item)
    return Worse(
        item,
        now.prompt if now is not None else "",
        reference.scores[item],
        result.scores[item],
        then.response if then is not None else "",
        now.response if now is not None else "",
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def _from_json(row: dict[str, Any]) -> SuiteResult:
    def interval(found: dict[str, Any] | None) -> Interval | None:
        if found is None:
            return None
        low, high = (float("nan") if found[name] is None else found[name] for name in ("low", "high"))
        return Interval(found["estimate"], low, high, found["num"])

    single = {name: interval(row[name]) for name in ("score", "extracted", "finished")}
    several = {name: {key: interval(value) for key, value in row[name].items()} for name in ("groups", "parts")}
    return SuiteResult(**(row | single | several))
