"""Single answers with a thumb up or down as token ids; preference pairs are taken apart into two of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.data.chat import ChatEncoder, TokenExample, join
from rlhf.data.data_config import DataConfig
from rlhf.data.formats import as_labelled
from rlhf.data.loading import LoadedRows
from rlhf.data.rows import LabelledRow, PreferenceRow, Prompt, Row
from rlhf.data.token_dataset import Dropped, Kept, TokenDataset, fit_length
from rlhf.infra.errors import UserError

Mismatch = tuple[int, int]  # (row whose prompt it is, row whose answer stands behind it)


@dataclass(frozen=True)
class UnpairedExample:
    """One tokenised answer, ending with its stop token; `desirable` is the thumb."""

    prompt_ids: list[int]
    answer_ids: list[int]
    desirable: bool
    row: LabelledRow

    @property
    def tokens(self) -> TokenExample:
        """Prompt and answer as one example in which the answer is trained."""
        return join(self.prompt_ids, self.answer_ids)


class UnpairedDataset(TokenDataset[UnpairedExample, DataConfig]):
    """Labelled answers filtered by token length; of a preference pair each side is a row of its own.

    Prompt and answer together must have min_length to max_length tokens. Empty answers, and pairs whose two answers are
    equal, are dropped and counted; max_samples counts answers.
    """

    needs = "labelled answers (prompt, completion, label) or preference pairs"

    def __init__(self, rows: Sequence[Row] | LoadedRows, encoder: ChatEncoder, config: DataConfig) -> None:
        loaded = rows if isinstance(rows, LoadedRows) else LoadedRows(list(rows), 0, {})
        super().__init__(_taken_apart(loaded), encoder, config)

    @property
    def num_desirable(self) -> int:
        """How many examples have the thumb up."""
        return sum(example.desirable for example in self.examples)

    def mismatches(self, rows: Sequence[int]) -> list[Mismatch]:
        """For each of these rows the next one, going round, whose answer can stand behind its prompt as a stranger's.

        Strangers have another prompt, and prompt and answer fit into max_length. A row without such another is left
        out. Rows in random order give answers of both kinds; sides of a pair that lie side by side would not.
        """
        found = []
        for place, row in enumerate(rows):
            prompt_ids = self.examples[row].prompt_ids
            room = self.config.max_length - len(prompt_ids)
            for step in range(1, len(rows)):
                other = rows[(place + step) % len(rows)]
                stranger = self.examples[other]
                if len(stranger.answer_ids) <= room and stranger.prompt_ids != prompt_ids:
                    found.append((row, other))
                    break
        return found

    def mismatched(self, pair: Mismatch) -> TokenExample:
        """The prompt of one row with the answer of another."""
        prompt, answer = pair
        return join(self.examples[prompt].prompt_ids, self.examples[answer].answer_ids)

    def _encode(self, rows: Sequence[Row]) -> list[Kept[UnpairedExample] | Dropped]:
        labelled = [row for row in rows if isinstance(row, LabelledRow)]
        assert len(labelled) == len(rows)
        prompt_ids, (answers,) = self.encoder.answered_ids_batch(
            [row.prompt for row in labelled], [row.completion for row in labelled]
        )
        return [self._outcome(*parts) for parts in zip(labelled, prompt_ids, answers, strict=True)]

    def _outcome(
        self, row: LabelledRow, prompt_ids: list[int], answer_ids: list[int]
    ) -> Kept[UnpairedExample] | Dropped:
        if not row.completion.strip():
            return Dropped("empty_response")
        fitted = fit_length(prompt_ids, (answer_ids,), self.encoder, self.config)
        if isinstance(fitted, Dropped):
            return fitted
        return Kept(UnpairedExample(fitted[0], answer_ids, row.label, row), fitted[1])

    def _prompt(self, example: UnpairedExample) -> Prompt:
        return example.row.prompt

    def _ids(self, example: UnpairedExample) -> Sequence[Sequence[int]]:
        return (example.prompt_ids, example.answer_ids)


def _taken_apart(loaded: LoadedRows) -> LoadedRows:
    rows: list[Row] = []
    skipped = Counter(loaded.skipped)
    for row in loaded.rows:
        if isinstance(row, PreferenceRow) and row.chosen.strip() == row.rejected.strip():
            skipped["identical_pair"] += 2
            continue
        labelled = as_labelled(row)
        if not labelled:
            raise UserError(
                f"the data holds rows of kind {type(row).__name__}, expected answers with a label (columns prompt, "
                "completion, label, or another labelled format) or preference pairs"
            )
        rows += labelled
    return LoadedRows(rows, loaded.num_malformed, dict(skipped))
