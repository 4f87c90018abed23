"""Benchmarks of the lm-evaluation-harness, read as suites: `lm-eval:TASK` wherever a suite may be named.

The harness asks and scores; the model is ours, so every run, adapter and 4-bit base is measured as it stands. What
comes back is kept item by item, which is what a paired interval needs. The extra `rlhf[lm-eval]` installs the harness.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from rlhf.data.chat import ChatEncoder
from rlhf.eval.suite_items import Suite
from rlhf.eval.suite_results import GUESSING, Answered
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.models.backbone import Backbone
from rlhf.models.decoding import GenerationConfig

if TYPE_CHECKING:
    from lm_eval.api.task import Task

PREFIX = "lm-eval:"
_SHOWN = 2_000


class HarnessConfig(Config):
    """How tasks of the lm-evaluation-harness are asked."""

    folder: Path | None = Field(None, description="folder with tasks of your own (YAML); null: those of the harness")
    num_shots: int | None = Field(
        None, ge=0, description="examples before each question; null: as each task says (tasks that say 0 keep it)"
    )
    chat_template: bool = Field(False, description="ask as a conversation, through the model's chat template")


@dataclass(frozen=True)
class Benchmark(Suite):
    """A task or group of the harness: `tasks` by name, and which of their items are asked."""

    tasks: Mapping[str, Task] = field(default_factory=dict)
    asked: Mapping[str, Sequence[int]] = field(default_factory=dict)


def is_benchmark(name: str) -> bool:
    """Whether a suite's name is one of the harness's tasks."""
    return name.startswith(PREFIX)


def load_benchmark(name: str, config: HarnessConfig, max_items: int | None = None) -> Benchmark:
    """Find the task or group behind `lm-eval:`, its data with it; `max_items` draws that many items, always the same.

    Raises:
        UserError: the harness is not installed, there is no such task, its data cannot be had, or it has no measure
            that is a number between 0 and 1 for each item.
    """
    try:
        from rlhf.eval.harness import load_tasks
    except ImportError as error:
        raise UserError(
            f"'{name}' needs the lm-evaluation-harness, which cannot be imported ({error}); install rlhf[lm-eval]"
        ) from None
    return load_tasks(name, config, max_items)


def answer_benchmark(
    benchmark: Benchmark,
    backbone: Backbone,
    adapter: str | None,
    encoder: ChatEncoder,
    config: HarnessConfig,
    generation: GenerationConfig,
) -> list[Answered]:
    """One model's answers to every item that is asked, scored by the harness."""
    from rlhf.eval.harness import HarnessModel, run_tasks

    samples = run_tasks(benchmark, HarnessModel(backbone, adapter, encoder, generation), config)
    return [answer for task, rows in samples.items() for answer in answers_of_task(task, rows)]


def answers_of_task(task: str, rows: Sequence[Mapping[str, Any]]) -> list[Answered]:
    """The harness's log of one task as answers; several filters of one item become one answer.

    The first measure of the first filter is the score; the others stand beside it. Raises UserError for a task none of
    whose measures is a number between 0 and 1 for each item (perplexity is not one).
    """
    by_item: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_item.setdefault(int(row["doc_id"]), []).append(row)
    return [_answer(task, number, found) for number, found in sorted(by_item.items())]


def _answer(task: str, number: int, rows: Sequence[Mapping[str, Any]]) -> Answered:
    measures = {
        metric if len(rows) == 1 else f"{metric} ({row['filter']})": float(row[metric])
        for row in rows
        for metric in row["metrics"]
        if _is_share(row[metric])
    }
    if not measures:
        raise UserError(
            f"the task '{task}' measures {', '.join(rows[0]['metrics'])}, none of which is a number between 0 and 1 "
            "for each item; name a task with an accuracy"
        )
    first, *others = measures
    taken = rows[0]["filtered_resps"]
    asked = rows[0]["arguments"]
    return Answered(
        item_id=f"{task}-{number}",
        group=task,
        prompt=str(asked[0][0])[-_SHOWN:],
        response=_response(taken, asked),
        extracted=json.dumps(taken, default=str),
        score=measures[first],
        parts={name: measures[name] for name in others} | ({} if len(taken) < 2 else {GUESSING: 1 / len(taken)}),
    )


def _is_share(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and 0 <= value <= 1


def _response(taken: Sequence[Any], asked: Sequence[Sequence[Any]]) -> str:
    """What was written, or the choice found likeliest."""
    if len(taken) == 1 and isinstance(taken[0], str):
        return taken[0]
    likelihoods = [float(one[0]) if isinstance(one, (list, tuple)) else float("nan") for one in taken]
    best = max(range(len(likelihoods)), key=lambda index: likelihoods[index])
    return str(asked[best][1]).strip()


def hash_of_questions(rows: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of what is asked and what is right, so that numbers of another wording do not compare."""
    lines = (json.dumps(row, sort_keys=True, ensure_ascii=False, default=str) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
