"""Files and folders that are whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rlhf.infra.durable import disk_errors_named, write_text, written_aside
from rlhf.infra.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with written_aside(tmp_path / "deep" / "policy") as folder:
        (folder / "weights").write_text("new")
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not (tmp_path / "deep" / "policy").exists()
    assert names(tmp_path / "deep") == ["policy"] and names(tmp_path / "deep" / "policy") == ["sub", "weights"]


def test_a_folder_replaces_the_one_before_as_a_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with written_aside(tmp_path / "policy") as folder:
            (folder / content).write_text(content)
    assert names(tmp_path) == ["policy"] and names(tmp_path / "policy") == ["new"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_error_leaves_what_was_there(tmp_path: Path, kind: type[BaseException]) -> None:
    with written_aside(tmp_path / "policy") as folder:
        (folder / "old").write_text("old")
    with pytest.raises(kind), written_aside(tmp_path / "policy") as folder:
        (folder / "half").write_text("half")
        raise kind
    assert names(tmp_path) == ["policy"] and names(tmp_path / "policy") == ["old"]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    sentence = r"policy' could not be written: No space left on device$"
    with pytest.raises(UserError, match=sentence), written_aside(tmp_path / "policy"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_leftovers_of_a_killed_process_are_no_part_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / ".policy.partial").mkdir()
    (tmp_path / ".policy.partial" / "half").write_text("half")
    with written_aside(tmp_path / "policy") as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["policy"] and names(tmp_path / "policy") == ["new"]


def test_what_disks_refuse_is_told_and_other_errors_pass() -> None:
    with pytest.raises(UserError, match=r"^it: Read-only file system; mend it$"), disk_errors_named("it", "; mend it"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    with pytest.raises(UserError, match=r"^it: No space left on device$"), disk_errors_named("it"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(UserError, match=r"^it: File too large$"), disk_errors_named("it"):
        raise Exception("File too large (os error 27)")  # what tokenizers raise
    for error in (FileNotFoundError(2, "gone"), ConnectionResetError(104, "reset"), SafetensorError("HeaderTooLarge")):
        with pytest.raises(type(error)), disk_errors_named("it"):
            raise error


def test_text_in_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"could not be written: Not a directory"):
        write_text(tmp_path / "file" / "text", "x")
    assert (tmp_path / "file").read_text() == "in the way"
