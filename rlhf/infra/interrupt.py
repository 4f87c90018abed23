"""Stopping between steps: Ctrl-C asks a run to end cleanly, a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, ClassVar

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTICE = b"\nStopping after the current step. Press Ctrl-C again to stop at once.\n"


class InterruptFlag:
    """`with flag:` turns the first Ctrl-C or SIGTERM into `flag.seen`, and a second one into `KeyboardInterrupt`.

    Flags may nest: a signal raises all that are up, and one put up after it is raised from the start, so that a
    pipeline stops with the stage that was interrupted. Signals can only be caught in the main thread; a flag in
    another thread never rises.
    """

    _up: ClassVar[list[InterruptFlag]] = []
    _replaced: ClassVar[dict[int, Any]] = {}

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> InterruptFlag:
        if threading.current_thread() is threading.main_thread():
            self.seen = any(flag.seen for flag in self._up)
            if not self._up:
                self._replaced.update({number: signal.signal(number, _on_signal) for number in _STOP_SIGNALS})
            self._up.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self not in self._up:
            return
        self._up.remove(self)
        if not self._up:
            for number, handler in self._replaced.items():
                signal.signal(number, handler)
            self._replaced.clear()


def _on_signal(number: int, frame: FrameType | None) -> None:
    flags = InterruptFlag._up
    if any(flag.seen for flag in flags):
        raise KeyboardInterrupt
    for flag in flags:
        flag.seen = True
    os.write(2, _NOTICE)  # print() is not safe here: the signal may have come in the middle of one


class Stopped(Exception):  # noqa: N818 - not an error: it was asked for
    """A run was asked to end before it was done and has written a checkpoint; the message says how to go on."""

    def __init__(self, resume_command: str) -> None:
        super().__init__(f"interrupted; go on with: {resume_command}")
