"""Rows from files or the hub, with malformed rows told by file, place and reason instead of a traceback.

JSONL, JSON, Parquet, CSV and TSV, each gzipped or not; a file, several, a glob, a folder, or a hub name. The standard
library reads the text formats because an error has to name its line; Parquet goes through pyarrow, the hub through
`datasets`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.infra.errors import UserError

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
MAX_BAD_SHARE = 0.05
_RAW_SHOWN = 2_000
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# How published folders name their splits; other file names belong to every split.
_SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation", "dev": "validation", "test": "test"}
# Columns that are lists or objects in every format, so a CSV cell of them is JSON text.
_NESTED_COLUMNS = {"messages", "conversations", "completions", "labels", "steps", "instances"}


class RawRow(NamedTuple):
    """One row as read, and where it stood: line number, array index or row number, all counted from 1 but the index."""

    fields: Mapping[str, Any]
    file: str
    place: int
    unit: str


class RejectedRow(NamedTuple):
    """A malformed row: where it stood, what is wrong with it and its text, cut."""

    file: str
    place: int
    unit: str
    reason: str
    raw: str


class RawRows:
    """The rows of one source and the malformed ones among them.

    `reject` sets a row aside, also later, when converting finds it malformed; `check` writes what was set aside to
    `rejected_file` and raises UserError when it is more than 5 % of all rows.
    """

    def __init__(self, rejected_file: Path | None = None) -> None:
        self.rows: list[RawRow] = []
        self.rejected: list[RejectedRow] = []
        self.files: list[Path] = []
        self._rejected_file = rejected_file

    def reject(self, row: RawRow, reason: str) -> None:
        """Set aside a row that was read but cannot be converted."""
        raw = json.dumps(row.fields, ensure_ascii=False, default=str)
        self.rejected.append(RejectedRow(row.file, row.place, row.unit, reason, raw[:_RAW_SHOWN]))

    def check(self, num_rows: int) -> None:
        """Write the rejected rows and raise UserError when they are more than 5 % of `num_rows` rows read."""
        if not self.rejected:
            return
        if self._rejected_file is not None:
            self._write(self._rejected_file)
        if len(self.rejected) > MAX_BAD_SHARE * num_rows:
            first = self.rejected[0]
            aside = f"; all of them are in '{self._rejected_file}'" if self._rejected_file else ""
            raise UserError(
                f"{len(self.rejected)} of {num_rows} rows are malformed, more than the {MAX_BAD_SHARE:.0%} allowed; "
                f"the first is '{first.file}' {first.unit} {first.place}: {first.reason}{aside}; mend or remove them"
            )

    def _write(self, path: Path) -> None:
        lines = (
            json.dumps(
                {"file": row.file, "line": row.place, "unit": row.unit, "reason": row.reason, "raw": row.raw},
                ensure_ascii=False,
            )
            for row in self.rejected
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        except OSError as error:
            raise UserError(f"'{path}' cannot be written ({error.strerror}); choose another folder") from error


def read_rows(
    source: str | Path | Sequence[str | Path],
    split: str = "train",
    data_dir: str | None = None,
    rejected_rows: Path | None = None,
) -> RawRows:
    """Read every row of a file, several files, a glob, a folder or a hub name ("owner/name").

    `split` chooses among a folder's files (train*, validation*, test*) and on the hub, where `data_dir` is the
    repository's folder. Raises UserError for what is missing or unreadable and when over 5 % of the rows are malformed.
    """
    raw = RawRows(rejected_rows)
    for one in [source] if isinstance(source, (str, Path)) else source:
        files = data_files(one, split)
        raw.files += files
        if files:
            for file in files:
                _read_file(file, raw)
        else:
            raw.rows += _read_hub(str(one), split, data_dir)
    if not raw.rows and not raw.rejected:
        raise UserError(f"'{source}' holds no rows; expected at least one")
    raw.check(len(raw.rows) + len(raw.rejected))
    return raw


def data_files(source: str | Path, split: str = "train") -> list[Path]:
    """Return the files a source stands for, sorted; none for a hub name. Raises UserError when nothing is there."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_of_split(path, split)
    if has_magic(str(source)):
        found = sorted(Path(name) for name in glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise UserError(f"no file matches '{source}'; check the pattern and the folder you run in")
        return found
    if _suffix(path) in DATA_SUFFIXES or not _HUB_NAME.fullmatch(str(source)):
        raise UserError(
            f"the data file '{source}' does not exist; give a file, a folder, a glob or a hub name 'owner/name'"
        )
    return []


def _files_of_split(folder: Path, split: str) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _suffix(file) in DATA_SUFFIXES)
    if not files:
        raise UserError(f"the folder '{folder}' holds no data file; expected one of {', '.join(DATA_SUFFIXES)}")
    splits = {file: _SPLIT_NAMES.get(re.split(r"[^a-z]", file.name.lower())[0]) for file in files}
    chosen = [file for file in files if splits[file] == _SPLIT_NAMES.get(split, split)]
    if chosen:
        return chosen
    unnamed = [file for file in files if splits[file] is None]
    if not unnamed:
        raise UserError(
            f"the folder '{folder}' has no files of split '{split}', only {sorted({str(s) for s in splits.values()})}; "
            "name the split that is there or the files themselves"
        )
    return unnamed


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _read_file(path: Path, raw: RawRows) -> None:
    suffix = _suffix(path)
    if suffix not in DATA_SUFFIXES:
        raise UserError(f"'{path}' is not a data file this reads; expected one of {', '.join(DATA_SUFFIXES)} (or .gz)")
    content = _bytes_of(path)
    if suffix == ".parquet":
        raw.rows += _parquet_rows(path, content)
    elif suffix in (".csv", ".tsv"):
        _read_csv(path, _decoded(path, content), "\t" if suffix == ".tsv" else ",", raw)
    elif suffix == ".json" and not _is_json_lines(content):
        _read_json(path, _decoded(path, content), raw)
    else:
        _read_json_lines(path, content, raw)


def _bytes_of(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"'{path}' cannot be read: {error}; check that the file is whole and readable") from error


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"'{path}' line {line} is not UTF-8 text; save the file as UTF-8") from error


def _is_json_lines(content: bytes) -> bool:
    """Say whether a `.json` file holds one object per line, which some publishers do."""
    first, _, rest = content.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")
    if not first.startswith(b"{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _read_json_lines(path: Path, content: bytes, raw: RawRows) -> None:
    # Split at b"\n" only: JSON strings may hold other characters that str.splitlines() takes for line ends.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value, reason = json.loads(line), ""
        except UnicodeDecodeError:
            value, reason = None, "not UTF-8 text"
        except (json.JSONDecodeError, RecursionError) as error:
            value, reason = None, f"not valid JSON ({error})"
        if isinstance(value, dict):
            raw.rows.append(RawRow(value, str(path), number, "line"))
        else:
            text = line.decode("utf-8", errors="replace")
            reason = reason or f"a {type(value).__name__} instead of an object"
            raw.rejected.append(RejectedRow(str(path), number, "line", reason, text[:_RAW_SHOWN]))


def _read_json(path: Path, text: str, raw: RawRows) -> None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}' line {error.lineno} is not valid JSON: {error.msg}; mend the file") from error
    if isinstance(value, dict):  # {"data": [...]} and the like
        lists = [entry for entry in value.values() if isinstance(entry, list) and entry and isinstance(entry[0], dict)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise UserError(f"'{path}' holds a {type(value).__name__}, expected an array of objects")
    for index, entry in enumerate(value):
        if isinstance(entry, dict):
            raw.rows.append(RawRow(entry, str(path), index, "array index"))
        else:
            reason = f"a {type(entry).__name__} instead of an object"
            raw.rejected.append(RejectedRow(str(path), index, "array index", reason, json.dumps(entry)[:_RAW_SHOWN]))


def _read_csv(path: Path, text: str, delimiter: str, raw: RawRows) -> None:
    limit = csv.field_size_limit(len(text) + 1)  # the default of 128 KiB is less than a long dialogue
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        for line, cells, reason in _csv_lines(reader):
            if header is None and not reason:
                header = cells
            elif header is not None and not reason and len(cells) == len(header):
                fields = {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True)}
                raw.rows.append(RawRow(fields, str(path), line, "line"))
            elif cells or reason:
                reason = reason or f"{len(cells)} cells under {len(header or [])} column names"
                raw.rejected.append(RejectedRow(str(path), line, "line", reason, ",".join(cells)[:_RAW_SHOWN]))
    finally:
        csv.field_size_limit(limit)


def _csv_lines(reader: Any) -> Iterator[tuple[int, list[str], str]]:
    """Yield (first line number, cells, reason it is malformed or "") of every row: a cell may span lines."""
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader), ""
        except StopIteration:
            return
        except csv.Error as error:
            yield line, [], f"not valid CSV ({error})"


def _cell(name: str, text: str) -> Any:
    if name in _NESTED_COLUMNS or (name in ("prompt", "chosen", "rejected", "completion") and text.startswith("[{")):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    return text


def _parquet_rows(path: Path, content: bytes) -> list[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"'{path}' is not readable as Parquet: {error}; check that the file is whole") from error
    return [
        RawRow(_without_nulls(fields), str(path), number, "row")
        for number, fields in enumerate(table.to_pylist(), start=1)
    ]


def _read_hub(name: str, split: str, data_dir: str | None) -> list[RawRow]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, data_dir=data_dir)
    except (OSError, ValueError) as error:  # unreachable, unknown name, unknown split
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{name}' is neither a file or folder here nor a data set that could be loaded from the hub "
            f"(split '{split}'): {first_line}; check the name and the network, or download it and give its files"
        ) from error
    return [RawRow(_without_nulls(fields), name, number, "row") for number, fields in enumerate(rows, start=1)]


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Drop empty columns: a typed table has every column in every row, and None there means "not in this row"."""
    return {name: value for name, value in fields.items() if value is not None}
