"""The canonical rows every data set becomes, whatever its columns were called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, str]  # {"role": "system" | "user" | "assistant" | ..., "content": text}
Prompt = str | list[Message]  # raw text, or a conversation for the chat template
Columns = Mapping[str, Any]  # what else the row held: handed to reward functions by name


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt with a better and a worse answer; `margin` says by how much, where the data knows."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    columns: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class InstructionRow:
    """A prompt with the answer to imitate; earlier assistant turns stand in the prompt."""

    prompt: Prompt
    response: str
    columns: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class TextRow:
    """Plain text for language modelling."""

    text: str
    columns: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class PromptRow:
    """A prompt to answer, with the columns a reward function needs to judge the answer."""

    prompt: Prompt
    columns: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class LabelledRow:
    """One answer with a thumb up (True) or down (False)."""

    prompt: Prompt
    completion: str
    label: bool
    columns: Columns = field(default_factory=dict)


# What was said of a step: 1 right, 0 wrong, between them the share of completions that came to the right answer;
# "neutral" is neither right nor wrong (PRM800K), None is a step nobody judged.
StepLabel = float | Literal["neutral"] | None


@dataclass(frozen=True)
class StepRow:
    """A worked solution in steps with a label for each."""

    prompt: Prompt
    completions: list[str]
    labels: list[StepLabel]
    columns: Columns = field(default_factory=dict)


Row = PreferenceRow | InstructionRow | TextRow | PromptRow | LabelledRow | StepRow


def prompt_key(prompt: Prompt) -> str:
    """Return one text per prompt: equal prompts have equal keys, whatever surrounds them in white space."""
    if isinstance(prompt, str):
        return prompt.strip()
    return json.dumps([[turn["role"], turn["content"].strip()] for turn in prompt], ensure_ascii=False)
