"""Hostile code in the sandbox: each snippet of `hostile_code.py` is contained, and honest code runs on after it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hostile_code import HOSTILE, SECRET, Hostile
from test_sandbox import processes_of_session

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system-call filter is a Linux one")
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """What became of all snippets, and of what they were after."""

    results: dict[str, Any]
    layers: list[str]
    session: int
    canary: Path
    folder: Path
    rights: int
    listener: socket.socket


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    folder = tmp_path_factory.mktemp("outside")
    canary = folder.parent / "canary.txt"
    canary.write_text(SECRET)
    folder.chmod(0o777)
    canary.chmod(0o666)
    # Test folders are closed to others; what is refused must be refused by the sandbox, not by these.
    for above in folder.parents:
        if any(part.startswith("pytest-of-") for part in above.parts):
            above.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.0)
        port = str(listener.getsockname()[1])
        code = {
            one.name: one.code.replace("CANARY", str(canary)).replace("FOLDER", str(folder)).replace("PORT", port)
            for one in HOSTILE
        }
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("hostile_runner.py"))],
            input=json.dumps(code),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        rights = canary.stat().st_mode & 0o777 if canary.exists() else 0
        yield Outcome(said["results"], said["layers"], said["session"], canary, folder, rights, listener)


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda one: one.name)
def test_is_contained(outcome: Outcome, hostile: Hostile) -> None:
    found = outcome.results[hostile.name]
    # Where the machine is busy the clock may come first; contained is contained.
    assert found["status"] in (*hostile.ends, "timeout"), found
    # A call that went through gave no secret and no forged value; the runner asked for f(3).
    for output in found["outputs"]:
        assert output["error"] is not None or output["value"] in (None, False, True, 1, 3, []), found
    assert "5821" not in json.dumps(found)
    assert found["honest"] == [20], "honest code gave something else after it"


def test_nothing_outside_has_changed(outcome: Outcome) -> None:
    assert outcome.canary.read_text() == SECRET
    assert outcome.rights == 0o666
    assert list(outcome.folder.iterdir()) == []
    with pytest.raises(BlockingIOError):
        outcome.listener.accept()


def test_nothing_is_left_running(outcome: Outcome) -> None:
    assert processes_of_session(outcome.session) == []


def test_every_layer_was_there(outcome: Outcome) -> None:
    assert {"system-call filter", "limits", "audit hook"} <= set(outcome.layers)


def test_the_snippets_would_do_harm_outside(outcome: Outcome) -> None:
    """The places they are after can be reached: what stops them is the sandbox."""
    with socket.create_connection(outcome.listener.getsockname()):
        pass
    assert os.access(outcome.canary, os.R_OK | os.W_OK) and os.access(outcome.folder, os.W_OK)
    assert all(above.stat().st_mode & 0o005 == 0o005 for above in outcome.canary.parents)
