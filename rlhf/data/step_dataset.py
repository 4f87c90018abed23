"""Worked solutions as token ids, with a label at the last token of every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf.data.chat import ChatEncoder
from rlhf.data.data_config import StepDataConfig
from rlhf.data.loading import WorldRows
from rlhf.data.rows import Prompt, Row, StepLabel, StepRow
from rlhf.data.token_dataset import Dropped, Kept, TokenDataset
from rlhf.infra.errors import UserError


@dataclass(frozen=True)
class StepExample:
    """One tokenised solution: `input_ids` are prompt and steps, `ends[i]` the place of step i's last token in them.

    The first `prompt_length` ids are the prompt's. `labels[i]` is in [0, 1], or None where the step takes no part in
    loss and metrics.
    """

    input_ids: list[int]
    prompt_length: int
    ends: list[int]
    labels: list[float | None]
    row: StepRow

    @property
    def num_labels(self) -> int:
        """Steps that are judged."""
        return sum(label is not None for label in self.labels)


class StepDataset(TokenDataset[StepExample, StepDataConfig]):
    """Solutions with step labels, every step followed by `config.separator`; see `StepDataConfig` for the labels.

    A solution too long loses its last steps (counted as steps_cut): what comes later changes no label before it.
    """

    needs = "worked solutions with step labels (prompt, completions, labels)"
    world: WorldRows = "steps"

    def _encode(self, rows: Sequence[Row]) -> list[Kept[StepExample] | Dropped]:
        solutions = [_solution(row) for row in rows]
        encoded = encode_solutions(
            self.encoder,
            [row.prompt for row in solutions],
            [row.completions for row in solutions],
            self.config.separator,
        )
        return [self._outcome(row, *ids) for row, ids in zip(solutions, encoded, strict=True)]

    def _outcome(self, row: StepRow, prompt_ids: list[int], step_ids: list[list[int]]) -> Kept[StepExample] | Dropped:
        labels = [self._label(label) for label in row.labels]
        input_ids, ends = list(prompt_ids), []
        for ids in step_ids:
            if len(input_ids) + len(ids) > self.config.max_length:
                break
            input_ids += ids
            ends.append(len(input_ids) - 1)
        is_cut = len(ends) < len(step_ids)
        if not ends or (is_cut and self.config.overlong == "drop"):
            return Dropped("too_long")
        if all(label is None for label in labels[: len(ends)]):
            return Dropped("no_judged_step")
        kept = replace(row, completions=row.completions[: len(ends)], labels=row.labels[: len(ends)])
        return Kept(
            StepExample(input_ids, len(prompt_ids), ends, labels[: len(ends)], kept), "steps_cut" if is_cut else None
        )

    def _label(self, label: StepLabel) -> float | None:
        if label == "neutral":
            return {"right": 1.0, "wrong": 0.0, "ignore": None}[self.config.neutral]
        if label is None or self.config.soft_labels == "keep":
            return label
        return float(label > 0)

    def _prompt(self, example: StepExample) -> Prompt:
        return example.row.prompt

    def _ids(self, example: StepExample) -> Sequence[Sequence[int]]:
        return (example.input_ids, example.ends)


def encode_solutions(
    encoder: ChatEncoder, prompts: Sequence[Prompt], solutions: Sequence[Sequence[str]], separator: str
) -> list[tuple[list[int], list[list[int]]]]:
    """Return (prompt ids, ids of each step with its separator) of every solution, as training and scoring need them.

    Line ends around a step and white space behind it are left out: what lies between steps is the separator. A
    tokenizer without chat template reads a question as plain text that ends with the separator.

    Raises:
        UserError: the tokenizer makes no token of the separator.
    """
    if separator and not encoder.tokenizer(separator, add_special_tokens=False)["input_ids"]:
        raise UserError(
            f"the tokenizer '{encoder.tokenizer.name_or_path}' makes no token of the separator {separator!r}, so no "
            "token would end a step; set data.separator to one that it knows, such as its own separator token"
        )
    if not encoder.tokenizer.chat_template:
        prompts = [_plain(prompt, separator) for prompt in prompts]
    tidied = [[step.lstrip("\n").rstrip() for step in steps] for steps in solutions]
    steps = encoder.step_ids_batch(prompts, tidied, separator)
    return list(zip(encoder.prompt_ids_batch(prompts), steps, strict=True))


def _plain(prompt: Prompt, separator: str) -> Prompt:
    is_question = not isinstance(prompt, str) and [turn["role"] for turn in prompt] == ["user"]
    return str(prompt[0]["content"]) + separator if is_question else prompt  # type: ignore[index]


def _solution(row: Row) -> StepRow:
    if not isinstance(row, StepRow):
        raise UserError(
            f"the data holds rows of kind {type(row).__name__}, expected worked solutions with step labels "
            "(columns prompt, completions, labels, or another stepwise format)"
        )
    return row
