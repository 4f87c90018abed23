"""The process in which untrusted code runs: started by `sandbox.py` as a plain script, it imports nothing of ours.

The worker reads one job after the other from standard input and forks for each. The child gives up its rights, sets
its limits, installs a system-call filter that lets through little more than memory, clocks and writing to descriptors
that are already open, and only then runs the code. It can reach one descriptor: the pipe to the worker, which relays
what comes out of it unread. So a job can spoil its own result at most; what the result should be is never told here.

Frames in both directions: four bytes of length (big endian) and that many bytes. A job is one JSON frame. A reply is a
JSON frame with how the child ended and a frame with what the child wrote.
"""

from __future__ import annotations

import array  # noqa: F401 - imported here, like those below, so that a job can import it once the files are closed
import bisect  # noqa: F401
import calendar  # noqa: F401
import cmath  # noqa: F401
import collections  # noqa: F401
import contextlib
import copy  # noqa: F401
import ctypes
import dataclasses  # noqa: F401
import datetime  # noqa: F401
import decimal  # noqa: F401
import enum  # noqa: F401
import errno
import fractions  # noqa: F401
import functools  # noqa: F401
import gc
import hashlib  # noqa: F401
import heapq  # noqa: F401
import itertools  # noqa: F401
import json
import math
import numbers  # noqa: F401
import operator  # noqa: F401
import os
import platform
import random  # noqa: F401
import re  # noqa: F401
import resource
import select
import signal
import statistics  # noqa: F401
import string  # noqa: F401
import struct
import sys
import textwrap  # noqa: F401
import time
import types
import typing

# System calls a job may make, by machine: (audit architecture, numbers of asm/unistd_64.h and asm-generic/unistd.h):
# read write writev close lseek fstat, mmap mprotect munmap mremap madvise brk, rt_sigaction rt_sigprocmask rt_sigreturn
# sigaltstack, nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getrusage, sched_yield futex
# set_robust_list membarrier rseq restart_syscall, getpid gettid getuid geteuid getrandom, exit exit_group.
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 20, 24, 25, 28, 35, 39, 60, 96, 98, 100, 102,
                            107, 131, 186, 201, 202, 219, 228, 229, 230, 231, 273, 318, 324, 334)),
    "aarch64": (0xC00000B7, (57, 62, 63, 64, 66, 80, 93, 94, 98, 99, 101, 113, 114, 115, 124, 128, 132, 134, 135, 139,
                             153, 165, 169, 172, 174, 175, 178, 214, 215, 216, 222, 226, 233, 278, 283, 293)),
}  # fmt: skip
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000
NOBODY = 65534

# Python's own audit events that are refused as well; where there is no system-call filter they are the only guard.
DENIED_EVENTS = (
    "open", "os.", "socket.", "subprocess.", "shutil.", "ctypes.", "tempfile.", "glob.", "pathlib.", "signal.",
    "resource.", "fcntl.", "mmap.", "pty.", "syslog.", "urllib.", "http.", "ftplib.", "smtplib.", "sqlite3.",
    "webbrowser.", "winreg.", "sys._current_frames", "sys.settrace", "sys.setprofile", "gc.get_objects",
    "gc.get_referrers", "_thread.start_new_thread",
)  # fmt: skip

Outcome = tuple[str, bytes]


class Filter(ctypes.Structure):
    """`struct sock_fprog` of linux/filter.h."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def filter_program() -> Filter | None:
    """Assemble the filter for this machine, or None where it is unknown: all but the listed calls fail with EPERM."""
    if sys.platform != "linux" or platform.machine() not in SYSTEM_CALLS:
        return None
    architecture, allowed = SYSTEM_CALLS[platform.machine()]
    load, jump_equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    kill_process, fail, allow = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
    code = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (jump_equal, 1, 0, architecture),
        (give, 0, 0, kill_process),
        (load, 0, 0, 0),  # seccomp_data.nr; x32 numbers carry a high bit and so match nothing below
    ]
    # A match jumps over the remaining comparisons and the "fail" that follows them.
    code += [(jump_equal, len(allowed) - index, 0, number) for index, number in enumerate(allowed)]
    code += [(give, 0, 0, fail), (give, 0, 0, allow)]
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
    return Filter(len(code), packed)


def install_filter(libc: ctypes.CDLL, program: Filter) -> bool:
    """Put this process under the filter for good; False when the kernel does not take it."""
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return int(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0)) == 0


def leave_network(libc: ctypes.CDLL) -> bool:
    """Move to a network namespace of its own, with nothing in it; False where that is not permitted."""
    if sys.platform != "linux":
        return False
    flags = CLONE_NEWNET | CLONE_NEWIPC
    return bool(libc.unshare(flags) == 0 or libc.unshare(CLONE_NEWUSER | flags) == 0)


def drop_rights(libc: ctypes.CDLL) -> None:
    """Stop being root, where the worker is, and die with the worker, where the system can do that."""
    if os.geteuid() == 0:
        # A container may not have the right to change users; the filter and the limits still hold there.
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def set_limits(limits: dict[str, float]) -> None:
    """Set the hard resource limits; each is best effort, as not every system has every one."""
    memory = int(limits["memory_mb"]) << 20
    seconds = max(1, math.ceil(limits["cpu_seconds"]))
    for name, value in (
        ("RLIMIT_CPU", seconds), ("RLIMIT_AS", memory), ("RLIMIT_DATA", memory), ("RLIMIT_FSIZE", 0),
        ("RLIMIT_NOFILE", 16), ("RLIMIT_NPROC", 0), ("RLIMIT_CORE", 0),
    ):  # fmt: skip
        number = vars(resource).get(name)
        if number is not None:
            with contextlib.suppress(OSError, ValueError):
                # One second between the two limits for the signal that tells why.
                resource.setrlimit(number, (value, value + 1 if name == "RLIMIT_CPU" else value))


def close_descriptors(keep: int) -> None:
    """Leave only `keep` open, with the standard streams on the null device."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(3, keep)
    os.closerange(keep + 1, 256)


def audit_hook() -> typing.Callable[[str, tuple[object, ...]], None]:
    """Return a hook that raises on everything that reaches outside the process.

    The interpreter keeps the only reference to it, so code cannot take the list of events out of its hands.
    """
    denied = tuple(DENIED_EVENTS)

    def refuse(event: str, _arguments: tuple[object, ...]) -> None:
        if event.startswith(denied):
            raise PermissionError(f"{event} is not allowed in the sandbox")

    return refuse


def run_code(code: str, entry: str, calls: list[list[object]]) -> dict[str, object]:
    """Run the code, then call `entry` with each list of arguments; every call has its own value or error."""
    module = types.ModuleType("job")
    try:
        exec(compile(code, "<job>", "exec"), module.__dict__)
        function = module.__dict__[entry]
    except MemoryError:
        return {"status": "memory", "outputs": [], "detail": "MemoryError"}
    except BaseException as error:  # whatever the code raises, SystemExit too, is the job's result
        return {"status": "error", "outputs": [], "detail": describe(error)}
    outputs: list[dict[str, object]] = []
    for arguments in calls:
        try:
            outputs.append({"value": json.loads(json.dumps(function(*arguments)))})
        except MemoryError:
            return {"status": "memory", "outputs": [], "detail": "MemoryError"}
        except BaseException as error:
            outputs.append({"error": describe(error)})
    return {"status": "ok", "outputs": outputs, "detail": ""}


def describe(error: BaseException) -> str:
    """Return the kind and the beginning of the message of an exception, without trusting its methods."""
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except BaseException:
        return type(error).__name__


def child(job: dict[str, typing.Any], pipe: int, libc: ctypes.CDLL, program: Filter | None) -> None:
    """Run one job in this freshly forked process and end it without ever returning."""
    try:
        close_descriptors(pipe)
        drop_rights(libc)
        set_limits(job["limits"])
        sys.addaudithook(audit_hook())
        if program is not None and not install_filter(libc, program):
            os._exit(70)
        data = json.dumps([run_code(*function) for function in job["functions"]]).encode()
        if len(data) > job["limits"]["output_bytes"]:
            data = json.dumps([{"status": "error", "outputs": [], "detail": "the output is too large"}]).encode()
        while data:
            data = data[os.write(pipe, data) :]
    except MemoryError:
        os.write(pipe, b'[{"status": "memory", "outputs": [], "detail": "MemoryError"}]')
    finally:
        os._exit(0)


def watch(pid: int, pipe: int, seconds: float, max_bytes: int) -> Outcome:
    """Wait for the child to write and to end, kill it at the deadline, and say how it ended."""
    deadline = time.monotonic() + seconds
    data, ending = b"", ""
    while not ending:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(pipe, 65536) if ready else b""
        data += chunk
        if not ready:
            ending = "timeout"
        elif len(data) > max_bytes:
            ending = "flood"
        elif not chunk:
            break
    while not ending:
        # The pipe is closed: an honest child is gone in a moment, another one may have closed it to outlive the job.
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return ended(status), data
        if time.monotonic() > deadline:
            ending = "timeout"
        time.sleep(0.0002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return ending, data


def ended(status: int) -> str:
    """Name the way a child ended from its wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "timeout" if number == signal.SIGXCPU else f"signal {number}"
    return f"exit {os.WEXITSTATUS(status)}"


def run_job(job: dict[str, typing.Any], libc: ctypes.CDLL, program: Filter | None) -> Outcome:
    """Fork, run one job in the child, and return how it ended and what it wrote."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(job, write_end, libc, program)
    os.close(write_end)
    try:
        return watch(pid, read_end, job["limits"]["wall_seconds"], int(job["limits"]["output_bytes"]))
    finally:
        os.close(read_end)


def probe(libc: ctypes.CDLL, program: Filter) -> bool:
    """Tell whether the filter takes hold here, by trying it on a child."""
    pid = os.fork()
    if pid == 0:
        held = install_filter(libc, program)
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except PermissionError:
            os._exit(0 if held else 1)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def read_frame() -> bytes | None:
    """Read one frame from standard input; None at its end."""
    header = sys.stdin.buffer.read(4)
    return sys.stdin.buffer.read(int.from_bytes(header, "big")) if len(header) == 4 else None


def write_frame(data: bytes) -> None:
    """Write one frame to standard output."""
    sys.stdout.buffer.write(len(data).to_bytes(4, "big") + data)


def main() -> None:
    """Say how well jobs are isolated here, then serve jobs until standard input ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = filter_program()
    if program is not None and not probe(libc, program):
        program = None
    gc.collect()
    gc.disable()
    gc.freeze()
    layers = ["limits", "audit hook"]
    if program is not None:
        layers.insert(0, "system-call filter")
    if leave_network(libc):
        layers.append("no network")
    write_frame(json.dumps(layers).encode())
    sys.stdout.buffer.flush()
    while (frame := read_frame()) is not None:
        ending, data = run_job(json.loads(frame), libc, program)
        write_frame(ending.encode())
        write_frame(data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
