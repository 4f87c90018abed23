from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.infra.config import Config, load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run, RunConfig
from rlhf.infra.interrupt import InterruptFlag
from rlhf.infra.run_folder import FolderLock, find_run, git_commit, read_run_info


class RecipeConfig(Config):
    learning_rate: float = 1e-4
    run: RunConfig = RunConfig()


def create(output_dir: Path, recipe: str = "sft", **settings: Any) -> Run:
    config = RecipeConfig(run=RunConfig(output_dir=output_dir, device="cpu", **settings))
    return Run.create(recipe, config, config.run)


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------- what is on disk, and when


def test_the_record_is_on_disk_before_the_first_step(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_bytes(b"hello\n")
    config = load_config(
        RecipeConfig, None, ["learning_rate=0.5", f"run.output_dir={tmp_path}", "run.seed=7", "run.device=cpu"]
    )
    run = Run.create("ppo", config, config.run, lineage={"sft": "runs/sft-1"}, data_files=[data])
    assert run.folder.parent == tmp_path and run.folder.name.startswith("ppo-20")
    assert contents(run.folder) >= {"config.yaml", "run.json", "logs", "tb"}
    assert load_config(RecipeConfig, run.folder / "config.yaml") == config
    info = json.loads((run.folder / "run.json").read_text())
    assert (info["recipe"], info["status"], info["seed"], info["device"]) == ("ppo", "running", 7, "cpu")
    assert info["lineage"] == {"sft": "runs/sft-1"}
    # sha256sum of "hello\n"
    sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    assert info["data"] == {str(data): {"bytes": 6, "sha256": sha256}}
    assert info["num_threads"] == torch.get_num_threads()
    assert info["versions"]["torch"] == torch.__version__
    assert info["ended"] is None
    assert torch.initial_seed() == 7
    run.finish()
    ended = read_run_info(run.folder)
    assert ended["status"] == "finished" and ended["ended"] >= ended["started"]


def test_names_are_new_each_time_unless_given(tmp_path: Path) -> None:
    folders = [create(tmp_path).folder.name for _ in range(3)]
    assert len(set(folders)) == 3
    assert create(tmp_path, name="mine").folder == tmp_path / "mine"
    with pytest.raises(ValueError, match="name"):
        RunConfig(name="../escape")


def test_a_taken_folder_is_refused_unless_overwritten(tmp_path: Path) -> None:
    with create(tmp_path, name="a") as run:
        run.logger.log(1, {"x": 1.0})
        (run.folder / "artifact.txt").write_text("precious")
    with pytest.raises(UserError, match=r"already exists; choose another run\.name"):
        create(tmp_path, name="a")
    assert (tmp_path / "a" / "artifact.txt").read_text() == "precious"
    with create(tmp_path, name="a", overwrite=True) as again:
        assert not (again.folder / "artifact.txt").exists()
        assert (again.folder / "logs" / "train.jsonl").read_text() == ""


def test_overwrite_spares_what_is_no_run(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not a run folder"):
        create(tmp_path, name="home", overwrite=True)
    assert contents(home) == {"thesis.tex"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        create(tmp_path, name="file", overwrite=True)


@pytest.mark.parametrize("mistake", ["device", "data", "wandb"])
def test_bad_input_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = RunConfig(
        output_dir=tmp_path / "runs", device="cuda" if mistake == "device" else "cpu", wandb=mistake == "wandb"
    )
    files = [tmp_path / "gone.jsonl"] if mistake == "data" else []
    with pytest.raises(UserError, match={"device": "cuda", "data": r"gone\.jsonl", "wandb": "wandb"}[mistake]):
        Run.create("sft", RecipeConfig(run=config), config, data_files=files)
    assert contents(tmp_path) == set()


def test_an_output_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be made"):
        create(tmp_path / "file")


@contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """The folder cannot be written by this process, even where it belongs to root."""
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="rights of this kind exist on Unix only")
def test_a_folder_without_rights_is_refused_and_left_as_it_is() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders hide from other users
        folder = Path(name)
        folder.chmod(0o755)
        with create(folder, name="a") as run:
            (run.folder / "artifact.txt").write_text("precious")
        (folder / "a").chmod(0o555)
        with without_rights(folder):
            with pytest.raises(UserError, match=r"run folder '.*/b' cannot be made: Permission denied"):
                create(folder, name="b")
            with pytest.raises(UserError, match=r"run folder '.*/a' cannot be written: Permission denied"):
                Run.open(folder / "a")
            with pytest.raises(UserError, match=r"run folder '.*/a' cannot be written: Permission denied"):
                create(folder, name="a", overwrite=True)
        assert contents(folder) == {"a"} and (folder / "a" / "artifact.txt").read_text() == "precious"
        assert read_run_info(folder / "a")["status"] == "finished"
        (folder / "a").chmod(0o755)


def test_a_start_that_was_killed_is_not_in_the_way(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for name in (".lock", "config.yaml", ".run.json.partial"):
        (folder / name).write_text("half")
    with create(tmp_path, name="a") as run:
        assert read_run_info(run.folder)["name"] == "a"


def test_a_config_of_the_users_own_is_not_taken_for_a_killed_start(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        create(tmp_path, name="a")
    assert contents(tmp_path / "a") == {"config.yaml"} and (tmp_path / "a" / "config.yaml").read_text() == "mine"


def test_an_overwriting_that_was_killed_can_be_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with create(tmp_path, name="a") as run:
        run.checkpoints.save(1, {}, {})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            create(tmp_path, name="a", overwrite=True)
    assert not (tmp_path / "a" / "run.json").exists()  # never taken for a run that is whole
    with create(tmp_path, name="a", overwrite=True) as run:
        assert contents(run.folder) == {".lock", "config.yaml", "run.json", "logs", "tb"}


def test_a_full_disk_at_the_start_and_at_the_end_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"config\.yaml' could not be written: No space left on device"):
            create(tmp_path, name="a")
    run = create(tmp_path, name="a")  # nothing is in the way now
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"run\.json' could not be written"), run:
            pass
    assert read_run_info(run.folder)["status"] == "running"
    again = Run.open(run.folder)  # the lock was let go of
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the first error"), again:
        patch.setattr(os, "fsync", full)
        raise RuntimeError("the first error")
    Run.open(run.folder).finish()


def test_a_checkpoint_waits_for_the_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    with create(tmp_path, name="a") as run:
        run.logger.log(1, {"x": 1.0})
        synced.clear()
        run.save(1, {"w": {"a": torch.ones(1)}}, {"n": 1})
    names = [Path(name).name for name in synced]
    assert names[:2] == ["train.jsonl", "train.log"] and names[2].startswith("events.out.tfevents.")
    assert names.index("state.json") > 2
    found = run.checkpoints.latest()
    assert found is not None and found.state["n"] == 1


def test_when_a_checkpoint_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with create(tmp_path, save_every_steps=3) as run:
        now[0] += 10_000
        assert [run.checkpoint_due(step) for step in (1, 2, 3, 4, 6)] == [False, False, True, False, True]
    with create(tmp_path) as run:  # by the clock: every five minutes
        now[0] += 299
        assert not run.checkpoint_due(3)
        now[0] += 2
        assert run.checkpoint_due(4)
        run.save(4, {}, {})
        assert not run.checkpoint_due(5)


# ------------------------------------------------------------------------------------------------- one at a time


def test_a_second_holder_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    with create(tmp_path, name="a") as run:
        (run.folder / "artifact.txt").write_text("precious")
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            Run.open(run.folder)
        with pytest.raises(UserError, match="in use by process"):
            create(tmp_path, name="a", overwrite=True)
        assert (run.folder / "artifact.txt").read_text() == "precious"
        assert read_run_info(run.folder)["status"] == "running"
    Run.open(run.folder).finish()


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file.fileno(), fcntl.LOCK_EX)
file.write("12345"); file.flush()
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_holds_the_folder_until_it_dies(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="locks of this kind exist on Unix only")
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="in use by process 12345"):
            FolderLock(tmp_path)
        holder.kill()
    FolderLock(tmp_path).release()


# ------------------------------------------------------------------------------------------------ how a run ends


def test_an_error_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), create(tmp_path, name="a"):
        raise RuntimeError("out of luck")
    info = read_run_info(tmp_path / "a")
    assert (info["status"], info["error"]) == ("failed", "RuntimeError: out of luck")


def test_a_status_set_by_the_recipe_stays(tmp_path: Path) -> None:
    with create(tmp_path, name="a") as run:
        run.finish("failed", error="no rows left")
    assert read_run_info(tmp_path / "a")["error"] == "no rows left"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with create(tmp_path, name="a") as run:
        assert not run.should_stop()
        signal.raise_signal(number)
        assert run.should_stop() and run.stop_reason == "interrupted"
    assert "after the current step" in capfd.readouterr().err
    assert read_run_info(run.folder)["status"] == "interrupted"
    assert run.resume_command == f"rlhf resume {tmp_path / 'a'}"
    with pytest.raises(KeyboardInterrupt), create(tmp_path, name="b") as other:
        signal.raise_signal(number)
        signal.raise_signal(number)
    assert read_run_info(other.folder)["status"] == "interrupted"
    assert signal.getsignal(number) is before


def test_an_interrupted_stage_stops_its_pipeline(tmp_path: Path) -> None:
    with create(tmp_path, "pipeline", name="all") as pipeline:
        with create(pipeline.folder, name="sft") as stage:
            signal.raise_signal(signal.SIGINT)
            assert stage.should_stop()
        assert pipeline.should_stop()
        with create(pipeline.folder, name="rm") as next_stage:
            assert next_stage.should_stop()


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGINT)
    inside: list[Any] = []

    def work() -> None:
        with InterruptFlag() as flag:
            inside.append((signal.getsignal(signal.SIGINT), flag.seen))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [(before, False)]


def test_the_time_budget_ends_a_run_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with create(tmp_path, name="a", max_minutes=2.0) as run:
        now[0] += 119
        assert not run.should_stop()
        now[0] += 2
        assert run.should_stop() and run.stop_reason == "max_minutes"
    info = read_run_info(run.folder)
    assert (info["status"], info["stop_reason"]) == ("finished", "max_minutes")


# -------------------------------------------------------------------------------------------------------- resume


def test_opening_goes_on_at_the_newest_checkpoint(tmp_path: Path) -> None:
    with create(tmp_path, name="a", seed=3, keep_checkpoints=2) as run:
        assert run.resumed_from is None
        for step in (1, 2, 3):
            run.logger.log(step, {"x": float(step)})
            if step < 3:
                run.checkpoints.save(step, {"w": {"a": torch.full((2,), float(step))}}, {"n": step})
    with Run.open(tmp_path / "a") as again:
        assert again.resumed_from is not None and again.resumed_from.step == 2
        assert again.config.seed == 3 and torch.initial_seed() == 3
        again.logger.log(3, {"x": 33.0})
    rows = (tmp_path / "a" / "logs" / "train.jsonl").read_text().splitlines()
    assert rows == ['{"step": 1, "x": 1.0}', '{"step": 2, "x": 2.0}', '{"step": 3, "x": 33.0}']
    info = read_run_info(tmp_path / "a")
    assert info["status"] == "finished" and [entry["step"] for entry in info["resumed"]] == [2]


def test_a_checkpoint_may_count_other_steps_than_the_log(tmp_path: Path) -> None:
    with create(tmp_path, name="a") as run:
        for step in (1, 2):
            run.logger.log(step, {"x": float(step)})
        run.checkpoints.save(57, {}, {"logged_step": 1})
    with Run.open(run.folder) as again:
        assert again.logger.last_step == 1
    assert (run.folder / "logs" / "train.jsonl").read_text() == '{"step": 1, "x": 1.0}\n'


def test_opening_names_damaged_checkpoints_in_the_log(tmp_path: Path) -> None:
    with create(tmp_path, name="a") as run:
        run.checkpoints.save(1, {}, {})
        (run.checkpoints.save(2, {}, {}) / "state.json").write_text("")
    with Run.open(run.folder) as again:
        assert again.resumed_from is not None and again.resumed_from.step == 1
    assert "step_000002' is damaged" in (run.folder / "logs" / "train.log").read_text()


def test_opening_without_a_checkpoint_starts_over(tmp_path: Path) -> None:
    with create(tmp_path, name="a") as run:
        run.logger.log(1, {"x": 1.0})
    with Run.open(run.folder) as again:
        assert again.resumed_from is None
    assert (run.folder / "logs" / "train.jsonl").read_text() == ""


def test_the_thread_count_of_the_run_is_kept(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        with create(tmp_path, name="a", num_threads=1) as run:
            assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        with Run.open(run.folder):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# -------------------------------------------------------------------------------------------------- finding runs


def test_runs_are_found_by_name_or_path(tmp_path: Path) -> None:
    create(tmp_path, "sft", name="sft-1").finish()
    create(tmp_path / "demo", "rm", name="rm").finish()
    assert find_run("sft-1", tmp_path) == tmp_path / "sft-1"
    assert find_run(tmp_path / "sft-1", "elsewhere", recipe="sft") == tmp_path / "sft-1"
    assert find_run("demo/rm", tmp_path, recipe="rm") == tmp_path / "demo" / "rm"
    with pytest.raises(
        UserError, match=r"no run 'sft-2'; runs in .*: sft-1 \(sft, finished\), demo/rm \(rm, finished\)$"
    ):
        find_run("sft-2", tmp_path)
    with pytest.raises(UserError, match=r"made by 'sft'.*'rm' is needed; rm runs in .*: demo/rm \(rm, finished\)$"):
        find_run("sft-1", tmp_path, recipe="rm")
    with pytest.raises(UserError, match=r": none$"):
        find_run("x", tmp_path / "empty")
    with pytest.raises(UserError, match=r"not a run folder: it has no run\.json"):
        read_run_info(tmp_path)


def test_the_commit_is_that_of_this_checkout() -> None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        assert git_commit() is None
        return
    said = git_commit()
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert (said is None) == (head.returncode != 0)
    if said is not None:
        assert said["commit"] == head.stdout.strip()


def test_data_hashes_are_those_of_hashlib(tmp_path: Path) -> None:
    from rlhf.infra.run_folder import data_hashes

    content = os.urandom(3 * 2**20 + 17)  # more than one block
    (tmp_path / "big").write_bytes(content)
    expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert data_hashes([tmp_path / "big"]) == {str(tmp_path / "big"): expected}
