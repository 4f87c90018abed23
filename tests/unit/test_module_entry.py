"""`python -m rlhf` is the command."""

from __future__ import annotations

import runpy
import sys

import pytest


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["rlhf", "resume", "nowhere"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("rlhf", run_name="__main__")
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("rlhf: ")
