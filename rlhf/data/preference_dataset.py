"""Preference pairs as token ids: a prompt with a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import Self

from rlhf.data.chat import ChatEncoder
from rlhf.data.data_config import HH_NAME, DataConfig
from rlhf.data.dialogue import split_hh_text
from rlhf.data.loading import LoadedRows, load_rows
from rlhf.data.rows import PreferenceRow, Prompt, Row
from rlhf.data.token_dataset import Dropped, Kept, TokenDataset, fit_length
from rlhf.infra.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreferenceExample:
    """One tokenised pair; the answers end with their stop token and follow `prompt_ids` as they are."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float | None
    row: PreferenceRow

    @property
    def prompt(self) -> Prompt:
        """The prompt as text or messages."""
        return self.row.prompt

    @property
    def chosen(self) -> str:
        """The better answer as text."""
        return self.row.chosen

    @property
    def rejected(self) -> str:
        """The worse answer as text."""
        return self.row.rejected


class PreferenceDataset(TokenDataset[PreferenceExample, DataConfig]):
    """Preference pairs filtered by token length; HH-RLHF from the hub when nothing else is named.

    Both answers behind the prompt must have min_length to max_length tokens. Pairs with an empty answer or two equal
    answers are dropped and counted. `PreferenceDataset(tokenizer, split="train", max_samples=100)` reads HH-RLHF;
    `config` names other data, `rows` brings it along.
    """

    needs = "preference pairs (prompt, chosen, rejected)"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | ChatEncoder,
        split: str | None = None,
        max_samples: int | None = None,
        config: DataConfig | None = None,
        rows: Sequence[Row] | LoadedRows | None = None,
    ) -> None:
        config = config or DataConfig(name=HH_NAME)
        if max_samples is not None:
            config = config.model_copy(update={"max_samples": max_samples})
        if not isinstance(tokenizer, ChatEncoder):
            tokenizer = ChatEncoder(tokenizer, config.system_prompt)
        if rows is None:
            rows = load_rows(config, config.source, split or config.split)
        super().__init__(rows, tokenizer, config)

    @classmethod
    def from_rows(cls, rows: Sequence[Row] | LoadedRows, encoder: ChatEncoder, config: DataConfig) -> Self:
        """Encode rows that are already in memory."""
        return cls(encoder, config=config, rows=rows)

    @staticmethod
    def _extract_prompt_and_response(text: str) -> tuple[str, str]:
        """Split an HH dialogue at the last "Assistant:" into (prompt with that mark, answer)."""
        return split_hh_text(text)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one pair padded on the right to `max_length`, so that the default DataLoader can stack it.

        Keys: chosen_input_ids, chosen_attention_mask, rejected_input_ids, rejected_attention_mask (max_length,) and
        prompt_length (). Training uses `collate.pair_batch` instead, which pads only to the longest row.
        """
        example = self.examples[index]
        item = {"prompt_length": torch.tensor(len(example.prompt_ids))}
        tokenizer = self.encoder.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        for side, answer in (("chosen", example.chosen_ids), ("rejected", example.rejected_ids)):
            ids = [*example.prompt_ids, *answer]
            row = torch.full((self.config.max_length,), pad)
            row[: len(ids)] = torch.tensor(ids)
            item[f"{side}_input_ids"] = row
            item[f"{side}_attention_mask"] = torch.arange(self.config.max_length) < len(ids)
        return item

    def _encode(self, rows: Sequence[Row]) -> list[Kept[PreferenceExample] | Dropped]:
        pairs = [_pair(row) for row in rows]
        prompts = [pair.prompt for pair in pairs]
        prompt_ids, (chosen, rejected) = self.encoder.answered_ids_batch(
            prompts, [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
        )
        return [self._outcome(*parts) for parts in zip(pairs, prompt_ids, chosen, rejected, strict=True)]

    def _outcome(
        self, pair: PreferenceRow, prompt_ids: list[int], chosen: list[int], rejected: list[int]
    ) -> Kept[PreferenceExample] | Dropped:
        if not pair.chosen.strip() or not pair.rejected.strip():
            return Dropped("empty_response")
        if pair.chosen.strip() == pair.rejected.strip() or chosen == rejected:
            return Dropped("identical_pair")
        fitted = fit_length(prompt_ids, (chosen, rejected), self.encoder, self.config)
        if isinstance(fitted, Dropped):
            return fitted
        return Kept(PreferenceExample(fitted[0], chosen, rejected, pair.margin, pair), fitted[1])

    def _prompt(self, example: PreferenceExample) -> Prompt:
        return example.row.prompt

    def _ids(self, example: PreferenceExample) -> Sequence[Sequence[int]]:
        return (example.prompt_ids, example.chosen_ids, example.rejected_ids)


def _pair(row: Row) -> PreferenceRow:
    if not isinstance(row, PreferenceRow):
        raise UserError(
            f"the data holds rows of kind {type(row).__name__}, expected preference pairs "
            "(columns prompt, chosen, rejected, or another pair format)"
        )
    return row
