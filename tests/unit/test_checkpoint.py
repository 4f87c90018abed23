from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf.infra import checkpoint as checkpoint_module
from rlhf.infra.checkpoint import CheckpointStore, optimizer_tensors, restore_optimizer
from rlhf.infra.errors import UserError


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, {"weights": {"w": torch.full((3,), float(step))}}, {"step": step})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.latest() is None
    shared = torch.arange(6.0)
    weights = {
        "a": shared,
        "tied": shared,
        "transposed": torch.arange(6.0).view(2, 3).T,
        "half": torch.ones(2).bfloat16(),
    }
    state = {"best": float("inf"), "name": "ä", "list": [1, 2.5, None, True], "third": 1 / 3}
    folder = store.save(10, {"weights": weights, "empty": {}}, state)
    assert folder == tmp_path / "checkpoints" / "step_000010"
    assert names(folder) == ["empty.safetensors", "manifest.json", "state.json", "weights.safetensors"]
    found = store.latest()
    assert found is not None
    assert (found.step, found.state, found.names) == (10, state, ["empty", "weights"])
    loaded = found.tensors("weights")
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {n: t.dtype for n, t in weights.items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert found.tensors("empty") == {}
    with pytest.raises(UserError, match="holds no 'critic'; it holds empty, weights"):
        found.tensors("critic")


def test_the_newest_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        save(store, step)
    assert names(tmp_path) == ["step_000003", "step_000010"]
    assert store.steps() == [3, 10]
    with pytest.raises(UserError, match="at least 1"):
        CheckpointStore(tmp_path, keep=0)


def test_a_step_saved_again_replaces_the_old_one_and_later_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(store, step)
    store.save(2, {}, {"second": True})
    assert store.steps() == [1, 2]
    found = store.latest()
    assert found is not None and found.state == {"second": True}


def test_parts_of_a_step_lie_between_it_and_the_next(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step, part in [(1, 0), (1, 1), (1, 2), (1, 11)]:
        store.save(step, {}, {"at": [step, part]}, part)
    assert names(tmp_path) == ["step_000001.001", "step_000001.002", "step_000001.011"]
    found = store.latest()
    assert found is not None and (found.step, found.part, found.state) == (1, 11, {"at": [1, 11]})
    assert found.place == "step 1 and 11 part(s) of the next"
    store.save(2, {}, {"at": [2, 0]})
    found = store.latest()
    assert found is not None and (found.step, found.part, found.place) == (2, 0, "step 2")
    # Taken up before them, later parts belong to a past that was abandoned.
    store.save(1, {}, {"again": True}, 2)
    assert names(tmp_path) == ["step_000001.002"]
    (tmp_path / "step_000001.002").rename(tmp_path / ".step_000001.002.replaced")
    found = store.latest()
    assert found is not None and (found.step, found.part, found.state) == (1, 2, {"again": True})


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no_manifest", "bad_manifest", "state"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    folder = save(store, 2)
    weights, manifest = folder / "weights.safetensors", folder / "manifest.json"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[:-5])
    elif damage == "flipped":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    elif damage == "no_manifest":
        manifest.unlink()
    elif damage == "bad_manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        (folder / "state.json").write_text("{")
    file = {"no_manifest": "manifest.json", "bad_manifest": "manifest.json", "state": "state.json"}.get(
        damage, weights.name
    )
    with pytest.warns(UserWarning, match=rf"step_000002' is damaged and is not used: .*{file}"):
        found = store.latest()
    assert found is not None and found.step == 1
    assert torch.equal(found.tensors("weights")["w"], torch.full((3,), 1.0))


def test_none_is_left_when_all_are_damaged(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (save(store, 1) / "state.json").unlink()
    with pytest.warns(UserWarning, match=r"state\.json is missing"):
        assert store.latest() is None


@pytest.mark.parametrize("written_before_the_disk_is_full", [0, 1])
def test_a_full_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_before_the_disk_is_full: int
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)
    written: list[str] = []

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        if len(written) == written_before_the_disk_is_full:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path.name)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    groups = {"weights": {"w": torch.zeros(3)}, "optimizer": {"w": torch.zeros(3)}}
    with pytest.raises(UserError, match=r"step 2 could not be written .*No space left on device.*untouched"):
        store.save(2, groups, {})
    assert names(tmp_path) == ["step_000001"]
    found = store.latest()
    assert found is not None and found.state == {"step": 1}


def test_a_file_size_limit_of_the_system_is_an_error_too(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits of this kind exist on Unix only")
    store = CheckpointStore(tmp_path)
    save(store, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match="could not be written"):
            store.save(2, {"weights": {"w": torch.zeros(100_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == ["step_000001"]


def test_an_unusable_folder_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="could not be written"):
        save(CheckpointStore(tmp_path / "file"), 1)
    assert (tmp_path / "file").read_text() == "in the way"


def test_leftovers_of_a_killed_process_are_ignored_and_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (tmp_path / ".step_000002.partial").mkdir()
    (tmp_path / ".step_000002.partial" / "weights.safetensors").write_bytes(b"half")
    assert store.steps() == [1]
    save(store, 3)
    assert names(tmp_path) == ["step_000001", "step_000003"]


def test_a_kill_between_the_two_renames_of_a_replacement_keeps_the_old_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 4).rename(tmp_path / ".step_000004.replaced")
    found = store.latest()
    assert found is not None and (found.step, found.state) == (4, {"step": 4})
    save(store, 4)
    assert names(tmp_path) == ["step_000004"]


KILLED = """
import os, signal, sys
import torch
from rlhf.infra.checkpoint import CheckpointStore
store = CheckpointStore(sys.argv[1])
store.save(1, {"weights": {"w": torch.ones(1000)}}, {})
calls = 0
fsync = os.fsync
def dying_fsync(descriptor):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = dying_fsync
store.save(2, {"weights": {"w": torch.zeros(1000)}}, {})
"""


@pytest.mark.slow
@pytest.mark.parametrize("fsync_call", [1, 2, 3, 4, 5])
def test_sigkill_while_saving(tmp_path: Path, fsync_call: int) -> None:
    """Calls 1 to 4 sync the files and the new folder before it gets its name, call 5 the name."""
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(fsync_call)], check=False)
    assert result.returncode == -signal.SIGKILL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = CheckpointStore(tmp_path).latest()
    assert found is not None and found.step == (1 if fsync_call < 5 else 2)


# ------------------------------------------------------------------------------------------------ optimizer state


def model_and_inputs() -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), torch.randn(5, 4)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> None:
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
        (torch.optim.SGD, {"lr": 0.01}),
        (torch.optim.Adafactor, {"lr": 0.1}),
        (torch.optim.RMSprop, {"lr": 0.01}),
    ],
)
def test_a_restored_optimizer_goes_on_bit_for_bit(
    tmp_path: Path, kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    model, inputs = model_and_inputs()
    optimizer = kind(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1 / (1 + count))
    for _ in range(2):
        step(model, optimizer, inputs)
        schedule.step()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    store = CheckpointStore(tmp_path)
    store.save(2, {"optimizer": optimizer_tensors(optimizer)}, {})
    for _ in range(3):
        step(model, optimizer, inputs)

    other, _ = model_and_inputs()
    other.load_state_dict(weights)
    resumed = kind(other.parameters(), **options)
    found = store.latest()
    assert found is not None
    restore_optimizer(resumed, found.tensors("optimizer"))
    assert resumed.param_groups[0]["lr"] == pytest.approx(options["lr"] / 3)
    for _ in range(3):
        step(other, resumed, inputs)
    for expected, got in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(expected, got)


def test_moments_of_bf16_weights_are_not_rounded() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    moments = {"0.step": torch.tensor(3.0), "0.exp_avg": torch.tensor([1 / 3, 0.1]), "0.exp_avg_sq": torch.ones(2)}
    restore_optimizer(optimizer, moments)
    assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.tensor([1 / 3, 0.1]))


def test_plain_numbers_come_back_as_plain_numbers() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    optimizer.state[parameter] = {"step": 7, "factor": 0.1, "nothing": None}
    tensors = optimizer_tensors(optimizer)
    other = torch.optim.SGD([parameter], lr=0.25)
    restore_optimizer(other, tensors)
    assert other.state[parameter] == {"step": 7, "factor": 0.1}
    assert type(other.state[parameter]["step"]) is int
    assert other.param_groups[0]["lr"] == 0.5


def test_state_of_another_model_is_refused() -> None:
    model, inputs = model_and_inputs()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, inputs)
    tensors = optimizer_tensors(optimizer)
    smaller = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3, 4))])
    with pytest.raises(UserError, match="another model"):
        restore_optimizer(smaller, tensors)
    other_shapes = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(7)) for _ in range(4)])
    with pytest.raises(UserError, match=r"has shape \(3, 4\), its parameter \(7,\)"):
        restore_optimizer(other_shapes, tensors)


def test_no_pickle_anywhere(tmp_path: Path) -> None:
    folder = save(CheckpointStore(tmp_path), 1)
    for path in folder.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            header_length = int.from_bytes(path.read_bytes()[:8], "little")
            json.loads(path.read_bytes()[8 : 8 + header_length])
