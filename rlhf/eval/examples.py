"""Answers side by side: some prompts with every model's answer, and how each fared against the reference there."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf.eval.samples import Sample
from rlhf.eval.winrate import JUDGES

Outcome = Literal["win", "tie", "loss", "not judged"]
OUTCOMES: tuple[Outcome, ...] = ("win", "tie", "loss", "not judged")


@dataclass(frozen=True)
class Example:
    """One prompt with every model's answer; `outcomes` says of every model but the reference how it fared against it.

    Without a reference there are no outcomes.
    """

    prompt: str
    family: str
    kind: str
    outcomes: dict[str, Outcome]
    answers: dict[str, Sample]


def draw_examples(
    answers: Mapping[str, Sequence[Sample]], reference: str | None, judge: str | None, num: int, seed: int
) -> tuple[Example, ...]:
    """Draw prompts by seed in turn from each family, so that nobody picks what is shown; `answers` by model."""
    by_prompt: dict[str, dict[str, Sample]] = {}
    for model, samples in answers.items():
        for sample in samples:
            by_prompt.setdefault(sample.prompt_id, {}).setdefault(model, sample)
    most = max(len(of_prompt) for of_prompt in by_prompt.values())
    families: dict[str, list[str]] = {}
    for prompt_id, of_prompt in by_prompt.items():
        if len(of_prompt) == most:
            families.setdefault(next(iter(of_prompt.values())).family, []).append(prompt_id)
    rng = random.Random(seed)
    queues = [rng.sample(families[name], len(families[name])) for name in sorted(families)]
    chosen: list[str] = []
    while len(chosen) < num and any(queues):
        chosen += [queue.pop() for queue in queues if queue]
    return tuple(_example(by_prompt[prompt_id], reference, judge) for prompt_id in chosen[:num])


def _example(answers: dict[str, Sample], reference: str | None, judge: str | None) -> Example:
    any_answer = next(iter(answers.values()))
    outcomes = {
        name: _outcome(sample, answers.get(reference or ""), judge)
        for name, sample in answers.items()
        if reference is not None and name != reference
    }
    return Example(any_answer.prompt, any_answer.family, any_answer.kind, outcomes, answers)


def _outcome(sample: Sample, reference: Sample | None, judge: str | None) -> Outcome:
    if reference is None or judge is None:
        return "not judged"
    score, other = JUDGES[judge](sample), JUDGES[judge](reference)
    if score is None or other is None:
        return "not judged"
    gap = score - other
    return "tie" if abs(gap) <= 1e-9 else "win" if gap > 0 else "loss"
