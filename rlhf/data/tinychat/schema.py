"""What a tinychat task is, and which split an instance belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rlhf.infra.errors import UserError

FAMILIES = ("arithmetic", "safety", "code", "facts")
SPLITS = ("train", "validation", "heldout", "ood")

# Of every ten buckets of instances, seven are for training, one for validation, two are held out.
_BUCKET_SPLITS = ("train",) * 7 + ("validation",) + ("heldout",) * 2

Spec = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One prompt with everything needed to judge an answer to it.

    `spec` holds JSON values only, so a task survives a dataset row; `spec["kind"]` names the variety inside the family
    (harmful or benign, open or choice, the operations of a word problem, the shape of a function).
    """

    id: str
    family: str
    prompt: str
    split: str
    spec: Spec = field(hash=False)

    def to_row(self) -> dict[str, Any]:
        """Return the task as JSON values, for the `task` column of a dataset."""
        return {"id": self.id, "family": self.family, "prompt": self.prompt, "split": self.split, "spec": self.spec}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Task:
        """Rebuild a task from `to_row` output, or from a dataset row that holds it under `task`."""
        source = row.get("task", row)
        missing = [name for name in ("id", "family", "prompt", "split", "spec") if name not in source]
        if missing:
            raise UserError(
                f"This row is no tinychat task: it lacks {', '.join(missing)}; "
                "take rows from rlhf.data.tinychat.prompt_rows or preference_pairs."
            )
        return cls(source["id"], source["family"], source["prompt"], source["split"], dict(source["spec"]))


def is_task_of(value: Any, prompt: str | list[dict[str, str]]) -> bool:
    """Whether the `task` column of a row holds the tinychat task that the row's prompt asks, so that gold is known.

    Other data may have a column of that name for something else.
    """
    if not isinstance(value, Mapping) or set(value) != {"id", "family", "prompt", "split", "spec"}:
        return False
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return value["family"] in FAMILIES and value["split"] in SPLITS and value["prompt"] == asked


class Draft(NamedTuple):
    """A drawn instance before it has a split; equal prompts always have equal keys."""

    key: str
    prompt: str
    spec: Spec


class Flaws(NamedTuple):
    """Which content defects a written answer shall have."""

    wrong: bool
    malformed: bool


def split_of(key: str) -> str:
    """Return the split of an instance: a pure function of its key, the same on every machine."""
    digest = hashlib.sha1(key.encode(), usedforsecurity=False).digest()
    return _BUCKET_SPLITS[int.from_bytes(digest[:4], "big") % len(_BUCKET_SPLITS)]


def sentence(text: str) -> str:
    """Return the text with its first letter raised."""
    return text[:1].upper() + text[1:]
