"""Texts to imitate as token ids with a mask of what is trained: SFT and pretraining."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.data.chat import TokenExample, join
from rlhf.data.data_config import InstructionDataConfig
from rlhf.data.formats import as_instruction
from rlhf.data.rows import InstructionRow, Prompt, Row, TextRow
from rlhf.data.token_dataset import Dropped, Kept, TokenDataset, fit_length

__all__ = ["InstructionDataConfig", "InstructionDataset", "TokenExample"]


class InstructionDataset(TokenDataset[TokenExample, InstructionDataConfig]):
    """Any format as text to imitate: the chosen side of pairs, approved answers, messages, instructions, plain text.

    `config.train_on` marks every assistant turn ("all"), the last one ("last"), or every token ("every_token", with
    texts longer than max_length cut into pieces instead of dropped). A raw-text prompt has no marked turns inside, so
    only its answer is trained; `hh_as_messages` gives HH transcripts turns.
    """

    needs = "answers to imitate"

    def __getitem__(self, index: int) -> TokenExample:
        return self.examples[index]

    def _encode(self, rows: Sequence[Row]) -> list[Kept[TokenExample] | Dropped]:
        found = [as_instruction(row) for row in rows]
        answered = [row for row in found if isinstance(row, InstructionRow)]
        texts = [row.text for row in found if isinstance(row, TextRow)]
        encoded, text_ids = iter(self._encode_answers(answered)), iter(self.encoder.text_ids(texts))
        outcomes: list[Kept[TokenExample] | Dropped] = []
        for row in found:
            if row is None:
                outcomes.append(Dropped("no_answer_to_imitate"))
            elif isinstance(row, TextRow):
                outcomes += self._pieces(row.text, next(text_ids))
            else:
                outcomes += next(encoded)
        return outcomes

    def _encode_answers(self, rows: Sequence[InstructionRow]) -> list[list[Kept[TokenExample] | Dropped]]:
        prompt_ids, (response_ids,) = self.encoder.answered_ids_batch(
            [row.prompt for row in rows], [row.response for row in rows]
        )
        return [self._outcomes(*parts) for parts in zip(rows, prompt_ids, response_ids, strict=True)]

    def _outcomes(
        self, row: InstructionRow, prompt_ids: list[int], response_ids: list[int]
    ) -> list[Kept[TokenExample] | Dropped]:
        if not row.response.strip():
            return [Dropped("empty_response")]
        if self.config.train_on == "every_token":
            return self._pieces(row.response, [*prompt_ids, *response_ids])
        fitted = fit_length(prompt_ids, (response_ids,), self.encoder, self.config)
        if isinstance(fitted, Dropped):
            return [fitted]
        prompt, note = fitted
        # A shortened prompt may begin in the middle of a turn, so only the answer behind it is trained.
        if note is None and self.config.train_on == "all" and _has_earlier_answers(row.prompt):
            messages = [*row.prompt, {"role": "assistant", "content": row.response}]
            return [self._whole(self.encoder.conversation(messages, "all"))]
        return [Kept(join(prompt, response_ids), note)]

    def _whole(self, example: TokenExample) -> Kept[TokenExample] | Dropped:
        # Tokenised turn by turn a conversation can come out a token or two longer than its prompt in one piece.
        return Kept(example) if len(example.input_ids) <= self.config.max_length else Dropped("too_long")

    def _pieces(self, text: str, ids: list[int]) -> list[Kept[TokenExample] | Dropped]:
        """Cut a text trained on every token into pieces of at most max_length, so that none of it is lost."""
        if not text.strip():
            return [Dropped("empty_text")]
        if len(ids) < self.config.min_length:
            return [Dropped("too_short")]
        step = self.config.max_length
        pieces = [ids[start : start + step] for start in range(0, len(ids), step)]
        note = "cut_into_pieces" if len(pieces) > 1 else None
        # A piece of one token has nothing to predict.
        return [Kept(TokenExample(piece, [True] * len(piece)), note) for piece in pieces if len(piece) > 1]

    def _prompt(self, example: TokenExample) -> Prompt:
        untrained = example.loss_mask.index(True)
        return str(self.encoder.tokenizer.decode(example.input_ids[: untrained or None]))

    def _ids(self, example: TokenExample) -> Sequence[Sequence[int]]:
        return (example.input_ids,)

    def _content(self, example: TokenExample) -> Sequence[Sequence[int]]:
        # The same tokens trained differently are different data.
        return (example.input_ids, example.loss_mask)


def _has_earlier_answers(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and any(message["role"] == "assistant" for message in prompt)
