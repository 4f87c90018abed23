"""What a disk, a folder or another process refuses is told in one sentence, and the run goes on from what was there."""

from __future__ import annotations

import errno
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from killed_runs import Ended, Workshop, assert_same_run, chosen, command, newest_checkpoint, status
from safetensors.torch import load_file, save_file

from rlhf.infra.logger import RunLogger
from rlhf.infra.run_folder import FolderLock

pytestmark = pytest.mark.skipif(os.name != "posix", reason="fork and limits of this kind exist on Unix only")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("disk"))


def full_from(place: str) -> None:
    """Let the disk be full, for this process, from the first time that a file of such a name is synced or renamed."""
    is_full = False

    def refusing(function: Callable[..., None], name: Callable[..., str]) -> Callable[..., None]:
        def refused(*arguments: object) -> None:
            nonlocal is_full
            is_full = is_full or place in name(*arguments)
            if is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            function(*arguments)

        return refused

    os.fsync = refusing(os.fsync, lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))  # type: ignore[assignment]
    os.replace = refusing(os.replace, lambda source, target: str(target))


def no_longer_logs(limit: int) -> None:
    """Let the system refuse files above the size that the log has after some lines, by a real limit."""
    import resource

    log, count = RunLogger.log, 0

    def limited(logger: RunLogger, step: int, metrics: dict[str, float]) -> None:
        nonlocal count
        count += 1
        if count == limit:
            size = (logger.folder / "logs" / "train.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
        log(logger, step, metrics)

    RunLogger.log = limited  # type: ignore[method-assign, assignment]


def is_one_sentence(ended: Ended, *parts: str) -> bool:
    last = ended.output.splitlines()[-1]
    assert "Traceback" not in ended.output and ended.output.count("rlhf: ") == 1, ended.output
    assert last.startswith("rlhf: ") and all(part in last for part in parts), ended.output
    return True


def refused(workshop: Workshop, recipe: str, name: str, prepare: Callable[[], None]) -> tuple[Path, Ended]:
    ended = command(workshop.folder / f"{name}-made", recipe, *workshop.settings(recipe, name), prepare=prepare)
    assert ended.code == 2, ended.output
    return workshop.folder / name, ended


def goes_on(workshop: Workshop, recipe: str, folder: Path) -> None:
    again = workshop.resumed(folder)
    assert again.code == 0, again.output
    assert status(folder) == "finished"
    assert_same_run(folder, workshop.uninterrupted(recipe)[0])


@pytest.mark.parametrize(
    ("place", "sentence", "kept"),
    [
        (".step_000004.partial/optimizer", "the checkpoint of step 4 could not be written", "step_000003"),
        ("policy", "policy' could not be written", "step_000006"),
    ],
    ids=["checkpoint", "product"],
)
def test_a_full_disk_while_saving(workshop: Workshop, place: str, sentence: str, kept: str) -> None:
    folder, ended = refused(workshop, "sft", f"full-{kept}", functools.partial(full_from, f"/{place}"))
    assert is_one_sentence(ended, sentence, "No space left on device")
    assert newest_checkpoint(folder).name == kept
    goes_on(workshop, "sft", folder)


def test_a_log_that_the_system_refuses(workshop: Workshop) -> None:
    folder, ended = refused(workshop, "rm", "long-log", functools.partial(no_longer_logs, 3))
    assert is_one_sentence(ended, "the logs in", "could not be written: File too large", "resume the run")
    goes_on(workshop, "rm", folder)


def test_a_second_process_is_refused_and_nothing_is_lost(workshop: Workshop) -> None:
    straight, _ = workshop.uninterrupted("sft")
    before = contents(straight)
    lock = FolderLock(straight)
    try:
        settings = [*workshop.settings("sft", straight.name), "run.overwrite=true"]
        ended = command(workshop.folder / "second-made", "sft", *settings)
    finally:
        lock.release()
    assert ended.code == 2 and is_one_sentence(ended, f"is in use by process {os.getpid()}")
    assert contents(straight) == before


@pytest.mark.slow
def test_p10_a_reference_that_was_trained_again_meanwhile_is_refused(workshop: Workshop) -> None:
    straight, made = workshop.uninterrupted("ppo")
    (moment,) = chosen(made.moments, "gradients 6")
    shutil.copytree(workshop.folder / "source", workshop.folder / "moving")
    settings = [*workshop.settings("ppo", "anchored"), "policy=moving"]
    command(workshop.folder / "anchored-made", "ppo", *settings, kill_at=moment)
    folder, weights = workshop.folder / "anchored", workshop.folder / "moving" / "policy" / "adapter_model.safetensors"
    before, original = contents(folder), weights.read_bytes()
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    ended = workshop.resumed(folder)
    assert ended.code == 2 and is_one_sentence(ended, "the policy 'moving' that it started from has changed since")
    assert contents(folder) == before  # refused before anything was touched
    weights.write_bytes(original)
    again = workshop.resumed(folder)
    assert again.code == 0, again.output
    assert_same_run(folder, straight)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ppo", "dpo"])
def test_a_full_disk_at_any_sync(workshop: Workshop, recipe: str) -> None:
    """From any file on: one sentence, and the run goes on from the newest checkpoint, or can be started again."""
    moments = workshop.uninterrupted(recipe)[1].moments
    seen = dict.fromkeys(name.partition(f"/{recipe}/")[2] for name in moments if f"/{recipe}/" in name)
    places = [place for place in seen if "tfevents" not in place]
    assert len(places) > 20
    for number, place in enumerate(places[::2]):
        name = f"{recipe}-full-{number}"
        folder, ended = refused(workshop, recipe, name, functools.partial(full_from, f"/{name}/{place}"))
        assert is_one_sentence(ended, "No space left on device"), place
        if (folder / "run.json").is_file():
            goes_on(workshop, recipe, folder)
        shutil.rmtree(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file with what is in it; who holds the folder is no part of it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
