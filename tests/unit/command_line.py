"""The command as a user gives it, and the code it leaves with."""

from __future__ import annotations

import sys

import pytest

from rlhf.cli import main


def rlhf(*arguments: str) -> int:
    """Run the command in this process (importing torch again for each call would take longer than the call)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rlhf", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
    return int(leaving.value.code or 0)
