"""A run that is taken up again must find what it started from: models and data by checksum (checklist P10)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run, RunConfig
from rlhf.recipes import lineage
from rlhf.recipes.lineage import fingerprints, refuse_changed


def make_base(folder: Path, content: bytes = b"base") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    return folder


def make_sft(output_dir: Path, base: Path, content: bytes = b"adapter") -> Path:
    """A finished run as far as files tell: an adapter on a base."""
    policy = output_dir / "sft" / "policy"
    policy.mkdir(parents=True, exist_ok=True)
    (output_dir / "sft" / "run.json").write_text("{}")
    (policy / "adapter_model.safetensors").write_bytes(content)
    (policy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    return policy


def test_a_fingerprint_covers_the_adapter_its_base_and_the_tokenizer(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    policy = make_sft(tmp_path, base)

    def fingerprint() -> str:
        return fingerprints({"policy": "sft"}, tmp_path)["policy"]

    seen = {fingerprint()}
    assert fingerprint() in seen
    (policy / "README.md").write_text("words")
    assert fingerprint() in seen
    for path, content in [
        (policy / "adapter_model.safetensors", "other"),
        (base / "model.safetensors", "other base"),
        (policy / "tokenizer.json", "new"),
    ]:
        path.write_text(content)
        assert fingerprint() not in seen
        seen.add(fingerprint())


def test_of_a_large_file_size_and_samples_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "_WHOLE_BYTES", 100)
    monkeypatch.setattr(lineage, "_SAMPLE_BYTES", 10)
    content = bytearray(range(200))
    seen = set()
    for place in (None, 0, 105, 199):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        make_base(tmp_path / "base", bytes(changed))
        seen.add(fingerprints({"base": str(tmp_path / "base")}, tmp_path)["base"])
    make_base(tmp_path / "base", bytes(content) + b"x")
    seen.add(fingerprints({"base": str(tmp_path / "base")}, tmp_path)["base"])
    assert len(seen) == 5


def test_a_hub_model_is_its_revision_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = {"owner/name": str(tmp_path / "snapshots" / "abc123" / "config.json")}
    monkeypatch.setattr(lineage, "try_to_load_from_cache", lambda name, file: cached.get(name))
    assert fingerprints({"base": "owner/name"}, tmp_path) == {"base": "abc123"}
    assert fingerprints({"base": "owner/other"}, tmp_path) == {"base": "unknown"}


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A run on an SFT run and a data file, stopped."""
    make_sft(tmp_path, make_base(tmp_path / "base"))
    data = tmp_path / "rows.jsonl"
    data.write_text("one\n")
    settings = RunConfig(output_dir=tmp_path, name="ppo", device="cpu")
    found = fingerprints({"policy": "sft"}, tmp_path)
    with Run.create("ppo", Config(), settings, {"policy": "sft"}, [data], found) as run:
        pass
    return run.folder


def check(folder: Path) -> None:
    refuse_changed(folder, fingerprints({"policy": "sft"}, folder.parent), [folder.parent / "rows.jsonl"])


def test_what_is_unchanged_passes(started: Path) -> None:
    check(started)


def test_p10_a_reference_that_was_trained_again_is_refused(started: Path) -> None:
    make_sft(started.parent, started.parent / "base", b"trained again")
    with pytest.raises(UserError, match=r"cannot go on: the policy 'sft' that it started from has changed since"):
        check(started)


def test_data_that_changed_are_refused(started: Path) -> None:
    (started.parent / "rows.jsonl").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"cannot go on: its data file '.*rows\.jsonl' has changed since it started"):
        check(started)


def test_a_run_from_before_fingerprints_were_kept_can_be_resumed(started: Path) -> None:
    info = json.loads((started / "run.json").read_text())
    del info["fingerprints"]
    (started / "run.json").write_text(json.dumps(info))
    make_sft(started.parent, started.parent / "base", b"trained again")
    check(started)
