"""Files and folders that are either wholly there or not at all, whatever happens to the process or the machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlhf.infra.errors import UserError

# What a disk answers that takes no more: full, over quota, file too large, read-only, not ours, broken.
_DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: written beside it, synced, renamed. On an error the old content stays."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # where the folder is no folder, there is nothing to remove either
            aside.unlink()
        raise UserError(f"'{path}' could not be written: {error.strerror or error}") from error


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step (see `write_text`)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def written_aside(final: Path) -> Iterator[Path]:
    """Fill a folder that gets its name when it is whole: `with written_aside(run / "policy") as folder: ...`.

    A folder of that name is replaced. Raises `UserError` when the disk takes no more; then, and after any other error,
    what was there still is.
    """
    aside = final.with_name(f".{final.name}.partial")
    try:
        with disk_errors_named(f"'{final}' could not be written"):
            if aside.exists():  # left by a process that was killed
                shutil.rmtree(aside)
            aside.mkdir(parents=True)
            yield aside
            for path in sorted(aside.rglob("*")):
                sync_folder(path) if path.is_dir() else sync_file(path)
            sync_folder(aside)
            replace_folder(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def replace_folder(aside: Path, final: Path) -> None:
    """Give a finished folder its name. An older folder of that name is `.<name>.replaced` for the moment in between."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(aside, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def disk_errors_named(what: str, remedy: str = "") -> Iterator[None]:
    """Turn the refusal of a disk inside the block into a `UserError`: `<what>: No space left on device<remedy>`.

    Other errors of the system (a connection that breaks, a file that is not there) pass through as they are.
    """
    try:
        yield
    except Exception as error:
        reason = disk_refusal(error)
        if reason is None:
            raise
        raise UserError(f"{what}: {reason}{remedy}") from error


def disk_refusal(error: Exception) -> str | None:
    """Why the disk refused, or None where that is not what the error says."""
    number = error.errno if isinstance(error, OSError) else None
    # safetensors and tokenizers, which are written in Rust, have the system's number in their text only.
    if not isinstance(error, UserError) and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    return os.strerror(number) if number is not None and number in _DISK_ERRORS else None


def sync_file(path: Path) -> None:
    """Wait until the file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder (new files, renames) are on the disk; does nothing where that is unknown."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
