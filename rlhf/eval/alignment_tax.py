"""Alignment tax: what training for preferences costs in knowledge, on the same questions before and after.

A benchmark is a ranked suite; the likeliest choice counts. The change is paired on its items, so that a small loss
shows on few questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.eval.intervals import Interval
from rlhf.eval.suite_results import GUESSING, SuiteResult, compare_results


@dataclass(frozen=True)
class Tax:
    """One model's accuracy on one benchmark; `change` is against the reference on the same questions (None for itself
    and for models before it in training). `guessing` is what a coin would get, where that is known."""

    model: str
    benchmark: str
    accuracy: Interval
    change: Interval | None
    guessing: float | None = None

    @property
    def is_guessing(self) -> bool:
        """Whether the accuracy cannot be told from guessing: there is nothing to lose, and a change says little."""
        return self.guessing is not None and self.accuracy.low <= self.guessing


def taxes(results: Sequence[SuiteResult], models: Sequence[str], reference: str | None) -> tuple[Tax, ...]:
    """Accuracy and change of every model, benchmark by benchmark; `models` are in order of training."""
    by_name = {(result.suite, result.model): result for result in results}
    found = []
    for suite in dict.fromkeys(result.suite for result in results):
        before = by_name.get((suite, reference or ""))
        for model in models:
            result = by_name.get((suite, model))
            if result is None or result.score is None:
                continue
            later = reference is not None and models.index(model) > models.index(reference)
            compared = compare_results(result, before) if before is not None and later else None
            guessing = result.parts.get(GUESSING)
            found.append(
                Tax(
                    model,
                    result.label,
                    result.score,
                    None if compared is None else compared.change,
                    None if guessing is None else guessing.estimate,
                )
            )
    return tuple(found)
