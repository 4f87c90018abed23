"""What evaluation looks at: one `Sample` per response, one `ModelResult` per model.

These are plain data. Models, reward models and gold scorers fill them in elsewhere, so everything in this folder runs
on numbers and text alone, and a folder of stored samples can be evaluated again without any model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.infra.errors import UserError

Mode = Literal["sampled", "greedy"]
_MODES = ("sampled", "greedy")
_NUMBERS = ("gold", "reward", "kl", "entropy")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Sample:
    """One response to one prompt, with everything that was measured on it.

    `prompt_id` pairs the same prompt across models. `split` is the prompt set ("heldout", "ood", "harmful", "benign" or
    a name of your own), `kind` a finer label within a family. `num_tokens` counts response tokens including the stop
    token; `finished` is True when the response ended with it. `kl` is in nats per response: the sum over its tokens of
    the k1 estimate against the reference. `entropy` is the mean over its tokens, in nats. None means not measured.
    `model` is the name under which the model was evaluated.
    """

    prompt_id: str
    prompt: str
    family: str
    split: str
    response: str
    num_tokens: int
    finished: bool
    kind: str = ""
    mode: Mode = "sampled"
    gold: float | None = None
    gold_parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    refused: bool = False
    reward: float | None = None
    kl: float | None = None
    entropy: float | None = None
    model: str = ""

    @property
    def intent(self) -> Literal["harmful", "benign"] | None:
        """Whether the prompt is a harmful request or a benign one that tests over-refusal; None for any other."""
        if "harmful" in (self.split, self.kind):
            return "harmful"
        if "benign" in (self.split, self.kind):
            return "benign"
        return None

    def to_json(self) -> dict[str, Any]:
        """Return a dict that `json.dumps(..., allow_nan=False)` accepts; non-finite numbers become their names."""
        row = dataclasses.asdict(dataclasses.replace(self, gold_parts=dict(self.gold_parts)))
        row["gold_parts"] = {name: _number_out(value) for name, value in self.gold_parts.items()}
        return row | {name: _number_out(row[name]) for name in _NUMBERS}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Sample:
        """Rebuild a sample from `to_json`; raises UserError naming missing, unknown or impossible fields."""
        fields = dataclasses.fields(cls)
        optional = set(_NUMBERS) | {"kind", "mode", "gold_parts", "refused", "model"}
        unknown = sorted(set(row) - {field.name for field in fields})
        missing = sorted({field.name for field in fields} - set(row) - optional)
        if unknown or missing:
            raise UserError(
                f"a stored sample lacks the fields {missing} and has the unknown fields {unknown}; it was probably "
                "written by another version: evaluate the model again"
            )
        if row.get("mode", "sampled") not in _MODES:
            raise UserError(f"a stored sample has mode {row['mode']!r}; expected one of {', '.join(_MODES)}")
        values = dict(row) | {name: _number_in(row.get(name)) for name in _NUMBERS}
        values["gold_parts"] = {name: _number_in(value) for name, value in (row.get("gold_parts") or {}).items()}
        return cls(**values)


@dataclass(frozen=True)
class Cost:
    """What a stage used: wall-clock seconds, tokens processed, peak memory in MB, optimizer steps; None if unknown."""

    seconds: float | None = None
    tokens: int | None = None
    peak_memory_mb: float | None = None
    optimizer_steps: int | None = None


@dataclass(frozen=True)
class ModelResult:
    """All samples of one model, under the name that tables and plots show, and what training it cost."""

    name: str
    samples: tuple[Sample, ...]
    cost: Cost | None = None

    def select(self, mode: Mode, *splits: str) -> tuple[Sample, ...]:
        """Return the samples of one decoding mode, of the named splits only when any are named."""
        return tuple(s for s in self.samples if s.mode == mode and (not splits or s.split in splits))


def write_samples(path: Path, samples: Iterable[Sample]) -> int:
    """Write one JSON object per line and return how many were written."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample.to_json(), ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read_samples(path: Path) -> tuple[Sample, ...]:
    """Read what `write_samples` wrote; UserError names the file and line that cannot be read."""
    if not path.is_file():
        raise UserError(f"no samples file at {path}; run the evaluation that writes it first")
    samples = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                samples.append(Sample.from_json(json.loads(line)))
            except (json.JSONDecodeError, UserError, TypeError) as error:
                raise UserError(f"{path}, line {number}: {error}") from error
    return tuple(samples)


def _number_out(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _number_in(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
