"""Prompt sets that models are compared on: the built-in world's, or the prompts of any data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from rlhf.data.prompt_dataset import PromptExample
from rlhf.data.rows import Prompt, prompt_key
from rlhf.data.tinychat import GoldScore, GoldScorer, Task, make_tasks
from rlhf.infra.config import Config


class SuiteConfig(Config):
    """How many prompts of each kind are asked."""

    num_heldout: int = Field(400, ge=4, description="held-out prompts, an equal share per family")
    num_ood: int = Field(200, ge=0, description="prompts with unseen templates, names and numbers")
    num_probes: int = Field(300, ge=0, description="harmful requests, and as many benign look-alikes")
    seed: int = Field(1_000, ge=0, description="chooses the prompts; not the seed of any training")


@dataclass(frozen=True)
class EvalPrompt:
    """One question; `split` is heldout, ood, harmful or benign. `task` is there where gold can judge the answer."""

    prompt_id: str
    prompt: Prompt
    family: str
    split: str
    kind: str = ""
    task: Task | None = None
    columns: dict[str, Any] = field(default_factory=dict)


def tinychat_suite(config: SuiteConfig) -> list[EvalPrompt]:
    """Held-out prompts of all families, out-of-distribution prompts, harmful probes and benign ones."""
    parts = [
        ("heldout", make_tasks("heldout", config.num_heldout, config.seed)),
        ("ood", make_tasks("ood", config.num_ood, config.seed + 1)),
        ("harmful", make_tasks("heldout", config.num_probes, config.seed + 2, ["safety/harmful"])),
        ("benign", make_tasks("heldout", config.num_probes, config.seed + 3, ["safety/benign"])),
    ]
    return [_from_task(task, split) for split, tasks in parts for task in tasks]


def prompt_suite(examples: Sequence[PromptExample], num: int) -> list[EvalPrompt]:
    """The first `num` prompts of a data set as held-out ones, by subset where the rows name one."""
    return [
        EvalPrompt(
            f"prompt-{index}",
            example.prompt,
            str(example.columns.get("subset", "all")),
            "heldout",
            columns=dict(example.columns),
        )
        for index, example in enumerate(examples[:num])
    ]


def gold_scores(prompts: Sequence[EvalPrompt], responses: Sequence[str], scorer: GoldScorer) -> list[GoldScore | None]:
    """The gold score of every answer whose prompt comes with a task, None for the others."""
    judged = [index for index, prompt in enumerate(prompts) if prompt.task is not None]
    tasks = [task for prompt in prompts if (task := prompt.task) is not None]
    scores: list[GoldScore | None] = [None] * len(prompts)
    if judged:
        for index, score in zip(judged, scorer.score(tasks, [responses[i] for i in judged]), strict=True):
            scores[index] = score
    return scores


def shown(prompt: Prompt) -> str:
    """The prompt as a reader should see it: the text, or the user's last turn."""
    return prompt.strip() if isinstance(prompt, str) else str(prompt[-1]["content"])


def _from_task(task: Task, split: str) -> EvalPrompt:
    prompt: Prompt = [{"role": "user", "content": task.prompt}]
    return EvalPrompt(f"{split}-{prompt_key(task.prompt)}", prompt, task.family, split, str(task.spec["kind"]), task)
