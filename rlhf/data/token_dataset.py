"""What every tokenised data set shares: examples, a report of what was dropped and why, splits, a content hash."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from typing_extensions import Self

from rlhf.data.chat import ChatEncoder
from rlhf.data.data_config import DataConfig, SourceConfig
from rlhf.data.loading import LoadedRows, WorldRows, load_splits, split_by_prompt
from rlhf.data.order import epoch_order
from rlhf.data.rows import Prompt, Row
from rlhf.infra.errors import UserError

ExampleT = TypeVar("ExampleT")
ConfigT = TypeVar("ConfigT", bound=SourceConfig)
_CHUNK = 2_048  # rows per tokenizer call: enough to keep its threads busy, few enough to stop early at max_samples


@dataclass(frozen=True)
class Kept(Generic[ExampleT]):
    """An example that passed the filters; `note` counts what was done to it, such as "prompt_shortened"."""

    example: ExampleT
    note: str | None = None


@dataclass(frozen=True)
class Dropped:
    """A row that did not, and why: too_short, too_long, empty_response, identical_pair, ..."""

    reason: str


@dataclass(frozen=True)
class FilterReport:
    """What became of the rows: `num_rows` seen, `num_kept` examples, counts of the rest by reason.

    `dropped` rows were well-formed but unusable, `num_malformed` were set aside while reading, `notes` count kept
    examples that were changed.
    """

    num_rows: int
    num_kept: int
    num_malformed: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = {**self.dropped, **({"malformed": self.num_malformed} if self.num_malformed else {})}
        lost = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()))
        changed = ", ".join(f"{number} {note}" for note, number in sorted(self.notes.items()))
        text = f"{self.num_kept} examples of {self.num_rows} rows"
        return text + (f"; dropped: {lost}" if lost else "") + (f"; changed: {changed}" if changed else "")


class TokenDataset(ABC, Generic[ExampleT, ConfigT]):
    """Rows encoded once, in batches, into `examples`; `report` says what was dropped.

    A subclass says how rows become examples (`_encode`), which prompt an example has, and which ids it is made of.
    """

    needs = "rows"  # what the rows are used as, for errors
    world: WorldRows = "pairs"  # which rows the built-in world writes for it

    def __init__(self, rows: Sequence[Row] | LoadedRows, encoder: ChatEncoder, config: ConfigT) -> None:
        loaded = rows if isinstance(rows, LoadedRows) else LoadedRows(list(rows), 0, {})
        self.encoder = encoder
        self.config = config
        self.examples: list[ExampleT] = []
        self.report = self._fill(loaded)
        if not self.examples:
            raise UserError(f"no usable {self.needs} are left ({self.report}); change the data or the filters")

    @classmethod
    def from_rows(cls, rows: Sequence[Row] | LoadedRows, encoder: ChatEncoder, config: ConfigT) -> Self:
        """Encode rows that are already in memory."""
        return cls(rows, encoder, config)

    @classmethod
    def load(cls, config: ConfigT, encoder: ChatEncoder, rejected_rows: Path | None = None) -> tuple[Self, Self | None]:
        """Read the config's data and return (training, validation); None when no validation is asked for."""
        train, validation = load_splits(config, rejected_rows, cls.world)
        # Training first: its errors are the ones to hear about.
        training = cls.from_rows(train, encoder, config)
        if validation is None:
            return training, None
        held_config = config.model_copy(update={"max_samples": config.max_validation_samples})
        return training, cls.from_rows(validation, encoder, held_config)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of every example, for batches by tokens."""
        return [sum(len(ids) for ids in self._ids(example)) for example in self.examples]

    def subset(self, indices: Iterable[int]) -> Self:
        """Return the data set with these examples only, sharing everything else."""
        other = copy.copy(self)
        other.examples = [self.examples[index] for index in indices]
        return other

    def split_by_prompt(self, fraction: float, seed: int) -> tuple[Self, Self]:
        """Return (training, validation) with no prompt on both sides; see `loading.split_by_prompt`."""
        train, held = split_by_prompt([self._prompt(example) for example in self.examples], fraction, seed)
        return self.subset(train), self.subset(held)

    def content_hash(self) -> str:
        """Return the SHA-256 of all examples in order: the key under which reference log-probs are cached."""
        digest = hashlib.sha256()
        for example in self.examples:
            for ids in self._content(example):
                digest.update(array("q", [len(ids), *ids]).tobytes())
        return digest.hexdigest()

    @abstractmethod
    def _encode(self, rows: Sequence[Row]) -> list[Kept[ExampleT] | Dropped]:
        """Return the outcomes of a chunk of rows, in order."""

    @abstractmethod
    def _prompt(self, example: ExampleT) -> Prompt:
        """Return what examples are kept together by when splitting."""

    @abstractmethod
    def _ids(self, example: ExampleT) -> Sequence[Sequence[int]]:
        """Return the lists of ids an example consists of."""

    def _content(self, example: ExampleT) -> Sequence[Sequence[int]]:
        """Return the lists of numbers that the content hash covers."""
        return self._ids(example)

    def _fill(self, loaded: LoadedRows) -> FilterReport:
        rows, limit = loaded.rows, self.config.max_samples
        order: Sequence[int] = range(len(rows))
        if limit is not None and limit < len(rows):
            # Published files are often sorted by source, so their first rows would be no sample.
            order = epoch_order(len(rows), self.config.split_seed, epoch=0)
        dropped, notes = Counter(loaded.skipped), Counter[str]()
        seen = 0
        while seen < len(order) and (limit is None or len(self.examples) < limit):
            chunk = order[seen : seen + _CHUNK]
            seen += len(chunk)
            for outcome in self._encode([rows[index] for index in chunk]):
                if isinstance(outcome, Dropped):
                    dropped[outcome.reason] += 1
                elif limit is None or len(self.examples) < limit:
                    self.examples.append(outcome.example)
                    notes.update([outcome.note] if outcome.note else [])
        num_rows = seen + sum(loaded.skipped.values()) + loaded.num_malformed
        return FilterReport(num_rows, len(self.examples), loaded.num_malformed, dict(dropped), dict(notes))


def fit_length(
    prompt_ids: list[int], answers: Sequence[Sequence[int]], encoder: ChatEncoder, config: DataConfig
) -> tuple[list[int], str | None] | Dropped:
    """Apply the length filter to a prompt with its answers: (prompt ids, note), or why the row is dropped.

    An answer is never cut: one that lost its end would teach the model not to end.
    """
    shortest, longest = min(map(len, answers)), max(map(len, answers))
    if not prompt_ids:
        return Dropped("empty_prompt")
    if len(prompt_ids) + shortest < config.min_length:
        return Dropped("too_short")
    if len(prompt_ids) + longest <= config.max_length:
        return prompt_ids, None
    room = config.max_length - longest
    if config.overlong == "drop" or room < 1:
        return Dropped("too_long")
    return encoder.shorten_prompt(prompt_ids, room), "prompt_shortened"
