"""From a data config to canonical rows: read, convert, count what is unusable, hold back a validation split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlhf.data.data_config import PromptDataConfig, SourceConfig
from rlhf.data.dialogue import is_hh_prompt, parse_hh_dialogue
from rlhf.data.fields import MalformedRowError, UnusableRowError
from rlhf.data.formats import Format, detect_format
from rlhf.data.reading import RawRow, RawRows, read_rows
from rlhf.data.rows import Prompt, Row, TextRow, prompt_key
from rlhf.infra.errors import UserError

WorldRows = Literal["pairs", "prompts", "steps"]
# How much of the built-in world is written when max_samples does not say.
_TINYCHAT_ROWS, _TINYCHAT_VALIDATION_ROWS = 4_000, 400


@dataclass(frozen=True)
class LoadedRows:
    """Canonical rows of one split; `num_malformed` rows were set aside, `skipped` counts unusable ones by reason."""

    rows: list[Row]
    num_malformed: int
    skipped: dict[str, int]


def load_splits(
    config: SourceConfig, rejected_rows: Path | None = None, world: WorldRows = "pairs"
) -> tuple[LoadedRows, LoadedRows | None]:
    """Return training and validation rows; None for validation when the config asks for none.

    Validation comes from named files or a named split, else from the training rows by prompt: no prompt stands on both
    sides. Malformed rows go to `rejected_rows`; where one source is cut in two its counts stand on the training side.
    `world` says which of its rows the built-in world writes, where that is the source.
    """
    if config.is_tinychat:
        train = _tinychat(config, "train", config.max_samples or _TINYCHAT_ROWS, world)
    else:
        train = load_rows(config, config.source, config.split, rejected_rows)
    if config.validation_files or config.validation_split is not None:
        source = config.validation_files or config.source
        aside = rejected_rows.with_name(f"{rejected_rows.stem}_validation.jsonl") if rejected_rows else None
        return train, load_rows(config, source, config.validation_split or "validation", aside)
    if config.validation_fraction == 0.0:
        return train, None
    if config.is_tinychat:
        num = config.max_validation_samples or _TINYCHAT_VALIDATION_ROWS
        return train, _tinychat(config, "validation", num, world)
    prompts = [row.text if isinstance(row, TextRow) else row.prompt for row in train.rows]
    kept, held = split_by_prompt(prompts, config.validation_fraction, config.split_seed)
    return (
        LoadedRows([train.rows[index] for index in kept], train.num_malformed, train.skipped),
        LoadedRows([train.rows[index] for index in held], 0, {}),
    )


def load_rows(config: SourceConfig, source: Sequence[str], split: str, rejected_rows: Path | None = None) -> LoadedRows:
    """Read a source and convert its rows; each file is in one format, and files may differ in theirs."""
    return _converted(read_rows(source, split, config.data_dir, rejected_rows), config)


def rows_from_memory(rows: Iterable[Mapping[str, Any]], config: SourceConfig, name: str = "rows") -> LoadedRows:
    """Convert rows that are already in memory, in any of the known formats; `name` stands for them in errors."""
    raw = RawRows()
    raw.rows = [RawRow(fields, name, index, "index") for index, fields in enumerate(rows)]
    return _converted(raw, config)


def _converted(raw: RawRows, config: SourceConfig) -> LoadedRows:
    num_rows = len(raw.rows) + len(raw.rejected)
    rows: list[Row] = []
    skipped: Counter[str] = Counter()
    wanted = _wanted(_renamed(raw.rows, config.columns), config.where)
    if len(wanted) < len(raw.rows):
        skipped["where"] = len(raw.rows) - len(wanted)
    for part in _by_file(wanted):
        kind = _format_of(part)
        if kind.over_file is not None:
            settled = kind.over_file([one.fields for one in part])
            part = [one._replace(fields=fields) for one, fields in zip(part, settled, strict=True)]
        for one in part:
            try:
                converted = kind.convert(one.fields)
                rows += [_hh_as_messages(row) for row in converted] if config.hh_as_messages else converted
            except UnusableRowError as error:
                skipped[error.reason] += 1
            except MalformedRowError as error:
                raw.reject(one, str(error))
    raw.check(num_rows)
    return LoadedRows(rows, len(raw.rejected), dict(skipped))


def _tinychat(config: SourceConfig, split: str, num: int, world: WorldRows) -> LoadedRows:
    from rlhf.data import tinychat  # here, because its judge brings a sandbox along

    seed = config.split_seed
    if world == "pairs":
        rows = tinychat.preference_pairs(split, num, seed)
    elif world == "prompts":
        families = config.families if isinstance(config, PromptDataConfig) else ()
        rows = tinychat.prompt_rows(split, num, seed, families or None)
    else:
        rows = tinychat.step_rows(split, num, seed)
    return rows_from_memory(rows, config, name="tinychat")


def split_by_prompt(prompts: Sequence[Prompt], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return (training, validation) indices so that no prompt stands on both sides.

    Dialogues that share their first human turn stay together too: later turns of one conversation contain the earlier
    ones. Which side a prompt falls on depends on its text and the seed alone, so every stage of a pipeline holds back
    the same prompts whatever rows it dropped. `fraction` is therefore met on average; each side gets at least one.
    """
    keys = [_opening(prompt) for prompt in prompts]
    draws = {key: _draw(key, seed) for key in set(keys)}
    if len(draws) < 2:
        raise UserError(
            "all rows share one prompt, so no validation split can be cut off by prompt; "
            "name data.validation_files or set data.validation_fraction=0"
        )
    ranked = sorted(draws, key=lambda key: draws[key])
    held = {key for key in ranked if draws[key] < fraction} or {ranked[0]}
    if len(held) == len(ranked):
        held.remove(ranked[-1])
    train = [index for index, key in enumerate(keys) if key not in held]
    return train, [index for index, key in enumerate(keys) if key in held]


def _draw(key: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _opening(prompt: Prompt) -> str:
    """Return what conversations are grouped by: the first thing the human said, or the whole prompt."""
    if is_hh_prompt(prompt):
        prompt = parse_hh_dialogue(str(prompt))
    if isinstance(prompt, str):
        return prompt_key(prompt)
    return next((turn["content"].strip() for turn in prompt if turn["role"] == "user"), prompt_key(prompt))


def _renamed(rows: Sequence[RawRow], columns: Mapping[str, str]) -> list[RawRow]:
    if not columns:
        return list(rows)
    names = {theirs: ours for ours, theirs in columns.items()}
    return [row._replace(fields={names.get(name, name): value for name, value in row.fields.items()}) for row in rows]


def _wanted(rows: Sequence[RawRow], where: Mapping[str, Sequence[str]]) -> list[RawRow]:
    """The rows whose columns have the wanted values.

    Raises:
        UserError: no row has such a column, or none such a value.
    """
    kept = list(rows)
    for name, values in where.items():
        there = Counter(str(row.fields[name]) for row in kept if name in row.fields)
        kept = [row for row in kept if name in row.fields and str(row.fields[name]) in values]
        if rows and not kept:
            seen = ", ".join(value for value, _ in there.most_common(8)) if there else "no value at all"
            raise UserError(f"data.where asks for {name} in {list(values)}, but '{rows[0].file}' has {seen}")
    return kept


def _by_file(rows: Sequence[RawRow]) -> list[list[RawRow]]:
    parts: dict[str, list[RawRow]] = {}
    for row in rows:
        parts.setdefault(row.file, []).append(row)
    return list(parts.values())


def _format_of(rows: Sequence[RawRow]) -> Format:
    """Return the format of the columns most rows have; the odd row without one of them is then malformed."""
    common = Counter(frozenset(row.fields) for row in rows).most_common(1)[0][0]
    try:
        return detect_format(common)
    except UserError as error:
        raise UserError(f"'{rows[0].file}': {error}") from None


def _hh_as_messages(row: Row) -> Row:
    if isinstance(row, TextRow) or not is_hh_prompt(row.prompt):
        return row
    messages = parse_hh_dialogue(str(row.prompt))
    if messages[-1]["role"] != "user":
        raise UnusableRowError("answers_itself")
    return replace(row, prompt=messages)
