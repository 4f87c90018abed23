"""The sandbox against hostile code: every limit with the snippet that would break it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.infra import sandbox_worker
from rlhf.infra.pure_code import cannot_interfere
from rlhf.infra.sandbox import Sandbox, SandboxJob, SandboxLimits, SandboxResult

needs_filter = pytest.mark.skipif(sys.platform != "linux", reason="the system-call filter is a Linux one")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SandboxLimits(wall_seconds=0.5, memory_mb=128, output_bytes=10_000)) as box:
        yield box


def run(sandbox: Sandbox, code: str, argument: object = 1) -> SandboxResult:
    return sandbox.run([SandboxJob(code, "f", [[argument]])])[0]


def processes_of_session(session: int) -> list[int]:
    """Process ids whose session is the given one, from the fourth field after the name in /proc/<pid>/stat."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_gives_values_and_errors_per_call(sandbox: Sandbox) -> None:
    job = SandboxJob("def f(x, y): return [x // y, str(x)]", "f", [[7, 2], [1, 0], [9, 3]])
    result = sandbox.run([job])[0]
    assert result.status == "ok"
    assert [output.value for output in result.outputs] == [[3, "7"], None, [3, "9"]]
    assert result.outputs[1].error is not None and result.outputs[1].error.startswith("ZeroDivisionError")


def test_results_keep_the_order_of_jobs(sandbox: Sandbox) -> None:
    pure = [SandboxJob(f"def f(x): return x + {i}", "f", [[1]]) for i in range(120)]
    other = SandboxJob("import math\ndef f(x): return math.factorial(5)", "f", [[1]])
    results = sandbox.run([*pure[:60], other, *pure[60:]])
    assert [result.outputs[0].value for result in results] == [*range(1, 61), 120, *range(61, 121)]


@pytest.mark.parametrize(
    ("code", "begins"),
    [
        ("def f(x) return 1", "SyntaxError"),
        ("def g(x): return 1", "KeyError"),
        ("raise SystemExit(0)\ndef f(x): return 1", "SystemExit"),
        ("import socket\ndef f(x): return 1", "ModuleNotFoundError"),
    ],
)
def test_code_that_does_not_load_is_an_error(sandbox: Sandbox, code: str, begins: str) -> None:
    result = run(sandbox, code)
    assert result.status == "error" and result.detail.startswith(begins)


@pytest.mark.parametrize(
    "code",
    [
        "def f(x):\n  while True: pass",
        "def f(x):\n  while True:\n    try:\n      while True: pass\n    except BaseException: pass",
        "import time\ndef f(x): time.sleep(60)",
        "import signal\ndef f(x):\n  signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "  signal.signal(signal.SIGALRM, signal.SIG_IGN)\n  while True: pass",
        "import os\ndef f(x):\n  for fd in range(16):\n    try: os.close(fd)\n    except OSError: pass\n"
        "  while True: pass",
    ],
    ids=["loop", "catches all", "sleep", "ignores signals", "closes its pipe"],
)
def test_wall_time_ends_a_job(sandbox: Sandbox, code: str) -> None:
    started = time.monotonic()
    assert run(sandbox, code).status == "timeout"
    assert time.monotonic() - started < 3
    assert run(sandbox, "def f(x): return x").status == "ok"


@pytest.mark.slow
def test_processor_time_ends_a_job() -> None:
    with Sandbox(SandboxLimits(wall_seconds=120, cpu_seconds=1)) as box:
        started = time.monotonic()
        assert run(box, "def f(x):\n  while True: pass").status == "timeout"
        assert time.monotonic() - started < 100  # it was not the clock, however busy the machine


def test_a_slow_job_does_not_take_its_neighbours_along(sandbox: Sandbox) -> None:
    quick = SandboxJob("def f(x): return x * 2", "f", [[4]])
    slow = SandboxJob("def f(x): return 9 ** 9 ** 9", "f", [[4]])
    results = sandbox.run([quick, slow, quick])
    assert [result.status for result in results] == ["ok", "timeout", "ok"]
    assert results[0].outputs[0].value == 8


@pytest.mark.parametrize("code", ["def f(x): return len([0] * 10**10)", "def f(x): return len(bytearray(10**9))"])
def test_memory_is_bounded(sandbox: Sandbox, code: str) -> None:
    assert run(sandbox, code).status == "memory"


@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/passwd').read()",
        "open('/tmp/tinychat_big_file', 'wb').write(bytes(10**8))",
        "os.fork()",
        "os.kill(os.getppid(), 9)",
        "os.killpg(0, 9)",
        "os.system('true')",
        "os.execv('/bin/true', ['true'])",
        "os.unlink('/tmp/x')",
        "os.rename('/tmp/x', '/tmp/y')",
        "os.mkdir('/tmp/x')",
        "os.listdir('/')",
        "__import__('_socket').socket()",
        "__import__('subprocess').run(['true'])",
        "__import__('ctypes').CDLL(None)",
        "__import__('_thread').start_new_thread(print, ())",
    ],
)
def test_reaching_outside_is_refused(sandbox: Sandbox, attempt: str) -> None:
    result = run(sandbox, f"import os\ndef f(x): return {attempt}")
    error = result.outputs[0].error if result.status == "ok" else result.detail
    assert error is not None
    assert error.startswith(("PermissionError", "ModuleNotFoundError", "RuntimeError: can't start new thread")), result
    assert run(sandbox, "def f(x): return x").status == "ok"


@needs_filter
def test_the_filter_alone_refuses_what_matters(tmp_path: Path) -> None:
    """Without the audit hook, in a process of its own: the kernel says no to each attempt."""
    script = tmp_path / "attempts.py"
    script.write_text(
        f"""
import ctypes, importlib.util, os, socket, threading
spec = importlib.util.spec_from_file_location("worker", {sandbox_worker.__file__!r})
worker = importlib.util.module_from_spec(spec); spec.loader.exec_module(worker)
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace, libc.mount, libc.unshare, libc.prctl
assert worker.install_filter(libc, worker.filter_program())
attempts = [
    lambda: open("/etc/passwd"), lambda: open({str(tmp_path / "new")!r}, "w"),
    lambda: os.kill(os.getppid(), 0), os.fork,
    socket.socket, lambda: os.execv("/bin/true", ["true"]), lambda: os.unlink({str(script)!r}), lambda: os.mkdir("d"),
    lambda: os.listdir("."), lambda: os.rename("a", "b"), lambda: os.chmod(".", 0o777), lambda: os.setuid(0),
    lambda: os.stat("/"), os.pipe, lambda: os.link("a", "b"), lambda: os.symlink("a", "b"), lambda: os.chdir("/"),
]
denied = 0
for attempt in attempts:
    try:
        attempt()
    except PermissionError:
        denied += 1
try:
    threading.Thread(target=print).start()
except RuntimeError:
    denied += 1
for call in (libc.ptrace, libc.mount, libc.unshare, libc.prctl):
    denied += call(0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1
print(denied, "of", len(attempts) + 5)
"""
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.split() == ["22", "of", "22"], done.stderr


def test_a_network_connection_fails(sandbox: Sandbox) -> None:
    code = "import sys\ndef f(x): return sorted(m for m in sys.modules if 'socket' in m or 'ssl' in m)"
    assert run(sandbox, code).outputs[0].value == []


def test_deep_recursion_is_an_error_of_the_call(sandbox: Sandbox) -> None:
    error = run(sandbox, "def f(x): return f(x)").outputs[0].error
    assert error is not None and error.startswith("RecursionError")


def test_sys_exit_is_an_error_of_the_call(sandbox: Sandbox) -> None:
    result = run(sandbox, "import sys\ndef f(x): sys.exit(0)")
    assert result.status == "ok" and result.outputs[0].error == "SystemExit: 0"


def test_leaving_without_a_result_is_seen(sandbox: Sandbox) -> None:
    assert run(sandbox, "import os\ndef f(x): os._exit(0)").status == "killed"


@pytest.mark.parametrize(
    "code",
    [
        "def f(x): return 'a' * 10**6",
        "import os\ndef f(x):\n  for fd in range(3, 16):\n    try:\n      while True: os.write(fd, b'x' * 65536)\n"
        "    except OSError: pass",
    ],
    ids=["return value", "floods the pipe"],
)
def test_huge_output_is_an_error(sandbox: Sandbox, code: str) -> None:
    result = run(sandbox, code)
    assert result.status == "error" and "too large" in result.detail


def test_printing_goes_nowhere(sandbox: Sandbox) -> None:
    code = 'def f(x):\n  print(\'[{"status": "ok", "outputs": [{"value": 42}], "detail": ""}]\')\n  return x'
    assert run(sandbox, code, 3).outputs[0].value == 3


def test_a_forged_result_spoils_its_own_job_only(sandbox: Sandbox) -> None:
    forge = (
        "import os\ndef f(x):\n  for fd in range(64):\n    try: os.write(fd, b'[[[[ \"ok\"')\n"
        "    except OSError: pass\n  os._exit(0)"
    )
    results = sandbox.run([SandboxJob(forge, "f", [[1]]), SandboxJob("import re\ndef f(x): return x", "f", [[5]])])
    assert results[0].status == "killed"
    assert results[1].outputs[0].value == 5


def test_wrong_shapes_from_a_job_are_no_result(sandbox: Sandbox) -> None:
    forge = (
        "import os\ndef f(x):\n  for fd in range(3, 64):\n    try: os.write(fd, b'%s')\n    except OSError: pass\n"
        "  os._exit(0)"
    )
    shapes = ["{}", "[1]", "null", '[{"status": "ok", "outputs": [], "detail": ""}]', "[]", "[" * 5000]
    results = sandbox.run([SandboxJob(forge % shape, "f", [[1]]) for shape in shapes])
    assert {result.status for result in results} == {"killed"}


def test_values_that_are_not_json_are_errors_of_the_call(sandbox: Sandbox) -> None:
    error = run(sandbox, "def f(x): return {1, 2}").outputs[0].error
    assert error is not None and error.startswith("TypeError")


def test_jobs_do_not_see_each_other(sandbox: Sandbox) -> None:
    spoil = SandboxJob("import builtins\nbuiltins.abs = lambda x: 99\ndef f(x): return abs(x)", "f", [[-2]])
    honest = SandboxJob("def f(x): return abs(x)", "f", [[-2]])
    results = sandbox.run([spoil, honest])
    assert [result.outputs[0].value for result in results] == [99, 2]


def test_the_environment_and_folder_are_empty(sandbox: Sandbox) -> None:
    code = "import os\ndef f(x): return dict(os.environ)"
    value = run(sandbox, code).outputs[0].value
    assert set(value) <= {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"}  # Python and macOS put these there themselves


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_nothing_is_left_behind() -> None:
    box = Sandbox(SandboxLimits(wall_seconds=0.3))
    bomb = "import os\ndef f(x):\n  while True:\n    try: os.fork()\n    except OSError: pass"
    hostile = [bomb, "def f(x):\n  while True: pass"]
    for code in hostile:
        run(box, code)
    assert box._worker is not None
    worker = box._worker._process.pid
    assert processes_of_session(worker) == [worker]
    box.close()
    assert processes_of_session(worker) == []


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_the_worker_ends_with_its_parent() -> None:
    script = (
        "from rlhf.infra.sandbox import Sandbox, SandboxJob\nimport os\nbox = Sandbox()\n"
        "box.run([SandboxJob('def f(x): return x', 'f', [[1]])])\n"
        "print(box._worker._process.pid, flush=True)\nos._exit(0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    deadline = time.monotonic() + 5
    while processes_of_session(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_of_session(int(done.stdout)) == []


def test_a_lost_worker_is_replaced(sandbox: Sandbox) -> None:
    run(sandbox, "def f(x): return x")
    assert sandbox._worker is not None
    os.kill(sandbox._worker._process.pid, 9)
    sandbox._worker._process.wait()
    assert run(sandbox, "def f(x): return x", 6).outputs[0].value == 6


def test_says_how_it_isolates(sandbox: Sandbox) -> None:
    assert {"limits", "audit hook"} <= set(sandbox.isolation)
    if sys.platform == "linux":
        assert "system-call filter" in sandbox.isolation


def test_too_much_code_is_refused() -> None:
    with Sandbox(SandboxLimits(code_bytes=1000)) as box:
        assert run(box, "#" * 2000).status == "error"


@pytest.mark.parametrize(
    "code",
    [
        "def f(x): return x * 2",
        "def f(s): return s.upper()[:3] * 2",
        "def f(xs): return [i + 1 for i in xs if i % 2 == 0]",
        "def f(x, y):\n    return max(x, y) if x else -y",
        "f = lambda x: abs(x - 3)",
        "def f(x): return",
        "def f(x",
        "(" * 900,
    ],
)
def test_plain_expressions_cannot_interfere(code: str) -> None:
    assert cannot_interfere(code)


@pytest.mark.parametrize(
    "code",
    [
        "import os\ndef f(x): return 1",
        "def f(x=print()): return x",
        "def f(x: print()): return x",
        "@print\ndef f(x): return x",
        "def f(x): return x.append(1)",
        "def f(x): return x.__class__",
        "def f(x): return open(x)",
        "def f(x): return eval('1')",
        "def f(x): return (lambda: 1)()",
        "def f(x): return (y := x)",
        "def f(x): return print",
        "def f(x): return f(x)",
        "def f(x): return max(x, key=len)",
        "def f(x): return x[0](1)",
        "def f(x): return f'{x.y}'",
        "def f(x): return [i async for i in x]",
        "def f(x):\n  y = 1\n  return y",
        "def f(x): return 1\nprint(2)",
        "x = 1",
        "def f(x): return " + "x + " * 400 + "x",
    ],
)
def test_anything_else_might(code: str) -> None:
    assert not cannot_interfere(code)
