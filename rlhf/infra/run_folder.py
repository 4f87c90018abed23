"""What lies in a run's folder besides logs and checkpoints: who made it, from what, and who is using it now."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlhf.infra.durable import sha256_file
from rlhf.infra.errors import UserError

RUN_INFO = "run.json"
CONFIG = "config.yaml"
LOCK = ".lock"
OVERWRITTEN = ".overwritten.json"

# All that a start leaves which was killed before run.json was there.
_HALF_STARTED = {LOCK, CONFIG, f".{CONFIG}.partial", f".{RUN_INFO}.partial"}
_PACKAGES = ("rlhf", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "pydantic")


class FolderLock:
    """Holds a run folder for this process; the operating system lets go of it when the process dies.

    Raises `UserError` when another holder, even in the same process, has it.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._file = (folder / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"run folder '{folder}' cannot be written: {error.strerror}") from None
        if not _lock(self._file.fileno()):
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise UserError(f"run folder '{folder}' is in use by process {holder}; wait for it or stop it first")
        try:
            self._file.truncate(0)
            self._file.write(str(os.getpid()))
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # closing tries to write once more
                self._file.close()
            raise UserError(f"run folder '{folder}' cannot be written: {error.strerror}") from None

    def release(self) -> None:
        """Let go; twice is harmless."""
        self._file.close()


def refuse_taken(folder: Path, overwrite: bool) -> None:
    """Raise `UserError` where a new run in this folder would cost what is there and `overwrite` does not ask for it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"'{folder}' is a file, but the run needs a folder there; choose another run.name")
    content = {path.name for path in folder.iterdir()}
    if content <= {LOCK} or (LOCK in content and content <= _HALF_STARTED):
        return
    if not overwrite:
        raise UserError(f"run folder '{folder}' already exists; choose another run.name, resume it, or overwrite it")
    if not content & {RUN_INFO, OVERWRITTEN}:
        raise UserError(f"'{folder}' is not a run folder (it has no {RUN_INFO}), so it is not overwritten")


def clear_run(folder: Path) -> None:
    """Remove the earlier run; the lock, which is ours by now, stays.

    Its `run.json` gets another name first and goes last, by the caller's hand: killed in between, the folder is neither
    taken for a whole run nor for somebody's files.
    """
    if (folder / RUN_INFO).exists():
        os.replace(folder / RUN_INFO, folder / OVERWRITTEN)
    for path in folder.iterdir():
        if path.name in (LOCK, OVERWRITTEN):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _lock(descriptor: int) -> bool:
    """Take the lock if it is free; always succeeds where the system has no such locks (Windows)."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def read_run_info(folder: str | Path) -> dict[str, Any]:
    """The content of a run's `run.json`. Raises `UserError` when the folder is not a run's."""
    path = Path(folder) / RUN_INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{folder}' is not a run folder: it has no {RUN_INFO}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from None
    if not isinstance(info, dict):
        raise UserError(f"'{path}' must hold a JSON object, got a {type(info).__name__}")
    return info


def find_run(name_or_path: str | Path, output_dir: str | Path = "runs", recipe: str | None = None) -> Path:
    """The folder of a run given by its path or by its name under `output_dir`.

    Raises `UserError`, listing the runs that are there, when there is none or when it was made by another recipe.
    """
    for folder in (Path(name_or_path), Path(output_dir) / name_or_path):
        if not (folder / RUN_INFO).is_file():
            continue
        made_by = read_run_info(folder).get("recipe")
        if recipe is not None and made_by != recipe:
            raise UserError(
                f"run '{name_or_path}' was made by '{made_by}', but one made by '{recipe}' is needed; "
                f"{_runs_there(output_dir, recipe)}"
            )
        return folder
    raise UserError(f"there is no run '{name_or_path}'; {_runs_there(output_dir, recipe)}")


def _runs_there(output_dir: str | Path, recipe: str | None) -> str:
    found = []
    for path in sorted(Path(output_dir).glob(f"*/{RUN_INFO}")) + sorted(Path(output_dir).glob(f"*/*/{RUN_INFO}")):
        info = read_run_info(path.parent)
        if recipe in (None, info.get("recipe")):
            found.append(f"{path.parent.relative_to(output_dir)} ({info.get('recipe')}, {info.get('status')})")
    kind = f"{recipe} runs" if recipe else "runs"
    return f"{kind} in '{output_dir}': {', '.join(found) or 'none'}"


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes; absent ones are left out."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> dict[str, Any] | None:
    """Commit of the source checkout that is running and whether files differ from it; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # never the repository that an installed package happens to lie in
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changed)}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def data_hashes(files: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each data file, by its path as given. Raises `UserError` for one that cannot be read."""
    hashes: dict[str, dict[str, Any]] = {}
    for file in map(Path, files):
        try:
            hashes[str(file)] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        except OSError as error:
            raise UserError(f"data file '{file}' cannot be read: {error.strerror}") from None
    return hashes


def utc_now() -> str:
    """The moment in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
