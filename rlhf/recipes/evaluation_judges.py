"""Further judges of an evaluation: the sampled answers to held-out prompts, model against model."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.eval.judge import Judge, Pair
from rlhf.eval.judge_figures import JudgedModels
from rlhf.eval.report_data import compared_models, reference_among
from rlhf.eval.samples import ModelResult, Sample
from rlhf.eval.suites import EvalPrompt
from rlhf.infra.experiment import Run
from rlhf.recipes.judge_pairs import judge_all


def judge_models(
    results: Sequence[ModelResult],
    prompts: Sequence[EvalPrompt],
    judges: Sequence[Judge],
    reference: str | None,
    run: Run,
) -> list[JudgedModels]:
    """What every judge says of every comparison that the report makes; empty without judges or a second model.

    Raises:
        UserError: a judge cannot judge.
        JudgingStopped: Ctrl-C.
    """
    names = [result.name for result in results]
    against = reference_among(names, reference)
    if not judges or against is None:
        return []
    by_name = {result.name: result.select("sampled", "heldout") for result in results}
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    found = []
    for first, second in compared_models(names, against):
        pairs = pairs_of(by_name[first], by_name[second], by_id)
        found.append(JudgedModels(first, second, judge_all(judges, pairs, run, f"{first} against {second}")))
    return found


def pairs_of(first: Sequence[Sample], second: Sequence[Sample], prompts: dict[str, EvalPrompt]) -> list[Pair]:
    """Both models' answers to each prompt, with the scores that were measured on them."""
    others = {sample.prompt_id: sample for sample in second}
    return [
        Pair(
            prompt_id=sample.prompt_id,
            prompt=prompts[sample.prompt_id].prompt,
            first=sample.response,
            second=others[sample.prompt_id].response,
            group=sample.family,
            columns=_columns(prompts[sample.prompt_id]),
            first_columns=_measured(sample),
            second_columns=_measured(others[sample.prompt_id]),
        )
        for sample in first
        if sample.prompt_id in others
    ]


def _columns(prompt: EvalPrompt) -> dict[str, object]:
    task = {} if prompt.task is None else {"task": prompt.task.to_row()}
    return {**prompt.columns, **task}


def _measured(sample: Sample) -> dict[str, object]:
    return {"gold": sample.gold, "reward": sample.reward, "finished": sample.finished, "refused": sample.refused}
