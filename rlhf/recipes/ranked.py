"""Ranked suites and benchmarks: how likely a model finds each choice, what it takes, and what that is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rlhf.data.chat import ChatEncoder
from rlhf.data.rows import Prompt
from rlhf.eval.benchmarks import Benchmark, answer_benchmark, is_benchmark, load_benchmark
from rlhf.eval.ranking import RANKERS
from rlhf.eval.scorers import SCORERS, ItemScore
from rlhf.eval.suite_items import Item, Suite
from rlhf.eval.suite_library import load_suite
from rlhf.eval.suite_results import GUESSING, Answered
from rlhf.infra.errors import UserError
from rlhf.models.choices import choice_logprobs
from rlhf.recipes.answers import askable
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.stages import LoadedPolicy

# Items between two looks at Ctrl-C.
_PORTION = 128


def named_suite(name: str, config: EvaluateConfig, max_items: int | None) -> Suite:
    """A suite of ours, of a file, or of the lm-evaluation-harness, by its name."""
    return load_benchmark(name, config.harness, max_items) if is_benchmark(name) else load_suite(name, max_items)


def measured_answers(
    suite: Suite,
    loaded: LoadedPolicy,
    encoder: ChatEncoder,
    config: EvaluateConfig,
    between: Callable[[], None] = lambda: None,
) -> list[Answered]:
    """What a model takes of the choices of a ranked suite, or does in a benchmark of the harness.

    `between` is called between portions of the items, and ends the whole by an exception; a benchmark is one portion.
    """
    if isinstance(suite, Benchmark):
        return answer_benchmark(suite, loaded.backbone, loaded.adapter, encoder, config.harness, config.generation)
    answered = []
    for start in range(0, len(suite.items), _PORTION):
        between()
        portion = replace(suite, items=suite.items[start : start + _PORTION])
        answered += ranked_answers(portion, loaded, encoder)
    return answered


def ranked_answers(suite: Suite, loaded: LoadedPolicy, encoder: ChatEncoder) -> list[Answered]:
    """The choice each item's model finds likeliest; as a part, what the other way to rank would have taken."""
    prompts, choices, num_shots = ranked_ids(suite.items, loaded, encoder)
    sums = choice_logprobs(loaded.backbone, loaded.adapter, prompts, choices)
    lengths = [[len(ids) for ids in of_item] for of_item in choices]
    extracted = {
        name: [",".join(map(str, rank(*pair))) for pair in zip(sums, lengths, strict=True)]
        for name, rank in RANKERS.items()
    }
    scores = {name: score_items(suite, answers) for name, answers in extracted.items()}
    answered = []
    for index, item in enumerate(suite.items):
        parts = {name: found[index].value or 0.0 for name, found in scores.items() if name != suite.extractor}
        parts[GUESSING] = 1 / len(item.choices)
        taken = extracted[suite.extractor][index]
        shown = item.prompt if isinstance(item.prompt, str) else str(item.prompt[-1]["content"])
        answered.append(
            Answered(
                item.item_id,
                item.group,
                shown.strip() or item.turns[-1],
                item.choices[int(taken.split(",")[0])].strip(),
                taken,
                scores[suite.extractor][index].value,
                parts | ({"all_shots": float(num_shots[index] == len(item.shots))} if item.shots else {}),
            )
        )
    return answered


def ranked_ids(
    items: Sequence[Item], loaded: LoadedPolicy, encoder: ChatEncoder
) -> tuple[list[list[int]], list[list[list[int]]], list[int]]:
    """Prompts, choices and the number of examples before each, as token ids.

    Examples that do not fit the model's context are left out, the first ones first. Choices that continue a
    conversation end with its stop token; the letters of a questionnaire are the letters and nothing else.
    """
    prompts, choices, num_shots = [], [], []
    for item in items:
        if item.spec.get("continues"):
            prompt: Prompt = item.prompt or [{"role": "user", "content": item.turns[-1]}]
            prompt = askable(prompt, encoder)
            of_item = encoder.response_ids_batch([prompt] * len(item.choices), list(item.choices))
            room = room_for(max(map(len, of_item)), loaded, f"a choice of {item.item_id}")
            ids, kept = last_ids(encoder.prompt_ids(prompt), room, encoder), 0
        else:
            of_item = encoder.continuation_ids_batch(list(item.choices))
            ids, kept = _with_shots(item, encoder, room_for(max(map(len, of_item)), loaded, "a choice"))
        prompts.append(ids)
        choices.append(of_item)
        num_shots.append(kept)
    return prompts, choices, num_shots


def _with_shots(item: Item, encoder: ChatEncoder, room: int | None) -> tuple[list[int], int]:
    for first in range(len(item.shots) + 1):
        text = f"{item.spec.get('header', '')}{''.join(item.shots[first:])}{item.prompt}"
        ids = encoder.prompt_ids(text)
        if room is None or len(ids) <= room:
            return ids, len(item.shots) - first
    return last_ids(ids, room, encoder), 0


def room_for(num_tokens: int, loaded: LoadedPolicy, what: str) -> int | None:
    """Tokens that a prompt may have before so many more; None without a limit. Raises UserError where none are left."""
    context = loaded.backbone.context
    if context is not None and num_tokens >= context:
        raise UserError(
            f"{what} takes {num_tokens} tokens, but '{loaded.backbone.name}' reads {context} at once and needs room "
            "for the question; shorten it or name a model with a longer context"
        )
    return None if context is None else context - num_tokens


def last_ids(ids: list[int], room: int | None, encoder: ChatEncoder) -> list[int]:
    """The end of a prompt that has more tokens than there is room for."""
    return ids if room is None else encoder.shorten_prompt(ids, room)


def score_items(suite: Suite, extracted: Sequence[str | None]) -> list[ItemScore]:
    """Judge the answers, all of one scorer at once; an item may name a scorer of its own."""
    scores: dict[int, ItemScore] = {}
    by_scorer: dict[str, list[int]] = {}
    for index, item in enumerate(suite.items):
        by_scorer.setdefault(item.scorer or suite.scorer, []).append(index)
    for name, indices in by_scorer.items():
        found = SCORERS[name]([extracted[i] for i in indices], [suite.items[i] for i in indices])
        scores.update(zip(indices, found, strict=True))
    return [scores[index] for index in range(len(suite.items))]
