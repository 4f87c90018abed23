"""Prompts to roll out from, with the columns that rewards need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.chat import ChatEncoder
from rlhf.data.data_config import PromptDataConfig
from rlhf.data.formats import as_prompt
from rlhf.data.loading import LoadedRows, WorldRows
from rlhf.data.rows import Columns, Prompt, Row, prompt_key
from rlhf.data.token_dataset import Dropped, Kept, TokenDataset

__all__ = ["PromptDataConfig", "PromptDataset", "PromptExample", "gather_columns"]


@dataclass(frozen=True)
class PromptExample:
    """One tokenised prompt; `columns` is what else the row held (reference answers, test cases, tasks, ...)."""

    prompt_ids: list[int]
    prompt: Prompt
    columns: Columns


class PromptDataset(TokenDataset[PromptExample, PromptDataConfig]):
    """The distinct prompts of a data set, at most `max_prompt_length` tokens long; any format but plain text serves.

    A repeated prompt is counted as duplicate_prompt and keeps the columns of its first row.
    """

    needs = "prompts"
    world: WorldRows = "prompts"

    def __init__(self, rows: Sequence[Row] | LoadedRows, encoder: ChatEncoder, config: PromptDataConfig) -> None:
        self._seen: set[str] = set()
        super().__init__(rows, encoder, config)

    def __getitem__(self, index: int) -> PromptExample:
        return self.examples[index]

    def columns(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        """Return the columns of these prompts as lists, None where a row lacks one: `reward(..., **columns)`."""
        return gather_columns([self.examples[index] for index in indices])

    def _encode(self, rows: Sequence[Row]) -> list[Kept[PromptExample] | Dropped]:
        prompts = [as_prompt(row) for row in rows]
        ids = iter(self.encoder.prompt_ids_batch([row.prompt for row in prompts if row is not None]))
        outcomes: list[Kept[PromptExample] | Dropped] = []
        for row in prompts:
            prompt_ids = next(ids) if row is not None else []
            if row is None:
                outcomes.append(Dropped("no_prompt"))
            elif not prompt_ids or not prompt_key(row.prompt):
                outcomes.append(Dropped("empty_prompt"))
            elif prompt_key(row.prompt) in self._seen:
                outcomes.append(Dropped("duplicate_prompt"))
            elif len(prompt_ids) > self.config.max_prompt_length:
                outcomes.append(Dropped("prompt_too_long"))
            else:
                self._seen.add(prompt_key(row.prompt))
                outcomes.append(Kept(PromptExample(prompt_ids, row.prompt, row.columns)))
        return outcomes

    def _prompt(self, example: PromptExample) -> Prompt:
        return example.prompt

    def _ids(self, example: PromptExample) -> Sequence[Sequence[int]]:
        return (example.prompt_ids,)


def gather_columns(examples: Sequence[PromptExample]) -> dict[str, list[Any]]:
    """Return every column any of the examples has as a list over the examples, None where one lacks it."""
    names = dict.fromkeys(name for example in examples for name in example.columns)
    return {name: [example.columns.get(name) for example in examples] for name in names}
