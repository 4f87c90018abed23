"""Code that tries to break out of the sandbox, to spoil its results or the machine, and what must become of it.

Each snippet defines `f(x)`. It does bounded harm even where nothing stops it (a few dozen processes that end by
themselves, tens of megabytes), and `hostile_runner.py` runs the sandbox itself under resource limits, so a sandbox that
fails costs a red test and no more. CANARY is a file beside the sandbox that anybody may read, FOLDER a folder in
which anybody may write, PORT a listening port on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass

SECRET = "what only those outside may know 5821"


@dataclass(frozen=True)
class Hostile:
    """A snippet and the statuses it may end with; status ok means that the call had an error or a harmless value."""

    name: str
    code: str
    ends: tuple[str, ...]


def _body(*lines: str) -> str:
    return "def f(x):\n" + "\n".join(f"    {line}" for line in lines)


_FORGE = (
    "import os\ndef f(x):\n  for fd in range(3, 64):\n    try: os.write(fd, {data!r})\n    except OSError: pass\n"
    "  os._exit(0)"
)
_REFUSED = ("ok", "error")
_ENDED = ("timeout", "killed", "memory", "error")
HOSTILE = [
    Hostile(
        "fork bomb",
        "import os, time\n"
        + _body(
            "end = time.time() + 2", "for _ in range(6): os.fork()", "while time.time() < end: pass", "os._exit(0)"
        ),
        _REFUSED,
    ),
    Hostile(
        "thread bomb",
        "import _thread, time\n" + _body("for _ in range(50): _thread.start_new_thread(time.sleep, (1,))"),
        _REFUSED,
    ),
    Hostile("memory at once", _body("return len(bytearray(10**10))"), ("memory",)),
    Hostile(
        "memory bit by bit", _body("kept = []", "for _ in range(120): kept.append(bytearray(1 << 24))"), ("memory",)
    ),
    Hostile("memory in small objects", _body("return len([{i: i} for i in range(3 * 10**7)])"), _ENDED),
    Hostile(
        "memory without end", "import itertools\n" + _body("return list(itertools.repeat('a' * 1000, 10**9))"), _ENDED
    ),
    Hostile("a number without end", _body("return 9 ** 9 ** 9"), _ENDED),
    Hostile("memory by mmap", "import mmap\n" + _body("return len(mmap.mmap(-1, 10**10))"), (*_REFUSED, "memory")),
    Hostile(
        "disk by a new file",
        _body("with open('FOLDER/big', 'wb') as file:", "    for _ in range(40): file.write(bytes(1 << 20))"),
        _REFUSED,
    ),
    Hostile(
        "disk in the worker's folder",
        "import os\n"
        + _body(
            "fd = os.open('big', os.O_CREAT | os.O_WRONLY)",
            "for _ in range(40): os.write(fd, bytes(1 << 20))",
        ),
        _REFUSED,
    ),
    Hostile(
        "disk by open descriptors",
        "import os\n"
        + _body(
            "for fd in range(64):",
            "    try:",
            "        for _ in range(40): os.write(fd, bytes(1 << 20))",
            "    except OSError: pass",
        ),
        ("error", "killed", "timeout"),
    ),
    Hostile(
        "disk by shared memory",
        "import os\n" + _body("fd = os.memfd_create('x')", "os.write(fd, bytes(1 << 20))"),
        _REFUSED,
    ),
    Hostile("reads a file", _body("return open('CANARY').read()"), _REFUSED),
    Hostile(
        "reads by descriptor", "import os\n" + _body("return os.read(os.open('CANARY', 0), 99).decode()"), _REFUSED
    ),
    Hostile("reads by io", "import io\n" + _body("return io.open_code('CANARY').read().decode()"), _REFUSED),
    Hostile("reads by _io", "import _io\n" + _body("return _io.FileIO('CANARY').read().decode()"), _REFUSED),
    Hostile(
        "reads by a found class",
        _body(
            "todo, seen = [object], set()",
            "while todo:",
            "    found = todo.pop()",
            "    if found.__name__ == 'FileIO': return found('CANARY').read().decode()",
            "    if found not in seen: todo += type.__subclasses__(found)",
            "    seen.add(found)",
        ),
        _REFUSED,
    ),
    Hostile(
        "reads by the import system",
        "import importlib.machinery as m\n"
        + _body("return m.SourceFileLoader('x', 'CANARY').get_data('CANARY').decode()"),
        _REFUSED,
    ),
    Hostile("reads the parent's environment", _body("return open('/proc/%d/environ' % 1).read()"), _REFUSED),
    Hostile("reads its own memory map", _body("return open('/proc/self/maps').read()"), _REFUSED),
    Hostile("lists a folder", "import os\n" + _body("return os.listdir('FOLDER')"), _REFUSED),
    Hostile("looks whether a file is there", "import os\n" + _body("return os.path.exists('CANARY')"), _REFUSED),
    Hostile("deletes a file", "import os\n" + _body("os.unlink('CANARY')"), _REFUSED),
    Hostile("empties a file", "import os\n" + _body("os.truncate('CANARY', 0)"), _REFUSED),
    Hostile("renames a file", "import os\n" + _body("os.rename('CANARY', 'FOLDER/gone')"), _REFUSED),
    Hostile("changes a file's rights", "import os\n" + _body("os.chmod('CANARY', 0)"), _REFUSED),
    Hostile("removes its folder", "import os\n" + _body("os.rmdir(os.getcwd())"), _REFUSED),
    Hostile(
        "connects",
        "import _socket\n" + _body("s = _socket.socket()", "s.connect(('127.0.0.1', PORT))", "s.send(b'here')"),
        _REFUSED,
    ),
    Hostile("connects by socket", "import socket\n" + _body("socket.create_connection(('127.0.0.1', PORT))"), _REFUSED),
    Hostile("asks a name server", "import socket\n" + _body("return socket.gethostbyname('localhost')"), _REFUSED),
    Hostile("runs a program", "import os\n" + _body("return os.system('touch FOLDER/made')"), _REFUSED),
    Hostile(
        "runs a program by exec",
        "import os\n" + _body("os.execv('/bin/sh', ['sh', '-c', 'touch FOLDER/made'])"),
        _REFUSED,
    ),
    Hostile(
        "runs a program by posix_spawn",
        "import posix\n" + _body("posix.posix_spawn('/bin/sh', ['sh', '-c', 'touch FOLDER/made'], {})"),
        _REFUSED,
    ),
    Hostile("runs forever", _body("while True: pass"), ("timeout",)),
    Hostile("sleeps", "import time\n" + _body("time.sleep(30)"), ("timeout",)),
    Hostile("loops in C", _body("return sum(range(10**12))"), ("timeout",)),
    Hostile(
        "loops in a pattern", "import re\n" + _body("return bool(re.match('(a+)+$', 'a' * 60 + 'b'))"), ("timeout",)
    ),
    Hostile(
        "catches everything",
        _body("while True:", "    try:", "        while True: pass", "    except BaseException: pass"),
        ("timeout",),
    ),
    Hostile(
        "ignores signals",
        "import signal\n"
        + _body(
            "for number in range(1, 32):",
            "    try: signal.signal(number, signal.SIG_IGN)",
            "    except (OSError, ValueError, PermissionError): pass",
            "while True: pass",
        ),
        ("timeout",),
    ),
    Hostile(
        "blocks signals",
        "import signal\n" + _body("signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))", "while True: pass"),
        ("timeout", "ok"),
    ),
    Hostile(
        "closes its pipe and stays",
        "import os\n" + _body("os.closerange(0, 64)", "while True: pass"),
        ("timeout",),
    ),
    Hostile("loads forever", "while True: pass\n" + _body("return x"), ("timeout",)),
    Hostile(
        "an answer that never ends in being read",
        "class D(dict):\n  def items(self):\n    while True: yield 'a', 1\n  def __len__(self): return 1\n"
        + _body("return D(a=1)"),
        (*_ENDED, "ok"),
    ),
    Hostile("returns much", _body("return 'a' * 10**6"), ("error",)),
    Hostile("raises much", _body("raise ValueError('a' * 10**7)"), ("ok",)),
    Hostile("prints much", _body("for _ in range(2000): print('a' * 10000)"), ("ok",)),
    Hostile(
        "returns deep lists",
        _body("found = []", "for _ in range(10**5): found = [found]", "return found"),
        (*_REFUSED, "killed"),
    ),
    Hostile(
        "prints a result",
        _body('print(\'[{"status": "ok", "outputs": [{"value": 77}], "detail": ""}]\', flush=True)', "return 1"),
        ("ok",),
    ),
    Hostile("exits", "import sys\n" + _body("sys.exit(0)"), ("ok",)),
    Hostile("exits while it loads", "import sys\nsys.exit(0)\n" + _body("return 1"), ("error",)),
    Hostile("exits at once", "import os\n" + _body("os._exit(0)"), ("killed",)),
    Hostile("exits at once while it loads", "import os\nos._exit(0)\n" + _body("return 1"), ("killed",)),
    Hostile("aborts", "import os\n" + _body("os.abort()"), ("killed", "ok")),
    Hostile(
        "overflows the stack",
        "import sys\n" + _body("sys.setrecursionlimit(10**9)", "return f(x)"),
        ("killed", "ok", "memory"),
    ),
    Hostile("overflows the parser", _body("return eval('(' * 10**5 + ')' * 10**5)"), ("killed", "ok", "memory")),
    Hostile("writes no result", _FORGE.format(data=b"[[[["), ("killed",)),
    Hostile(
        "writes a result of other calls",
        _FORGE.format(data=b'[{"status": "ok", "outputs": [], "detail": ""}]'),
        ("killed",),
    ),
    Hostile(
        "writes an error that is no text",
        _FORGE.format(data=b'[{"status": "ok", "outputs": [{"error": 5}], "detail": ""}]'),
        ("killed",),
    ),
    Hostile(
        "writes a detail that is no text",
        _FORGE.format(data=b'[{"status": "error", "outputs": [], "detail": {"a": [1]}}]'),
        ("killed",),
    ),
    Hostile(
        "writes an output that is no table",
        _FORGE.format(data=b'[{"status": "ok", "outputs": [[1]], "detail": ""}]'),
        ("killed",),
    ),
    Hostile(
        "writes a status of its own",
        _FORGE.format(data=b'[{"status": "passed", "outputs": [], "detail": ""}]'),
        ("killed",),
    ),
    Hostile(
        "writes a huge number",
        _FORGE.format(data=b'[{"status": "ok", "outputs": [{"value": ' + b"9" * 5000 + b'}], "detail": ""}]'),
        ("killed",),
    ),
    Hostile(
        "writes what is no text",
        _FORGE.format(data=b'[{"status": "ok", "outputs": [{"value": "\xff\xfe"}], "detail": ""}]'),
        ("killed",),
    ),
    Hostile("raises what cannot be printed", _body("raise ValueError(chr(0xD800))"), ("ok",)),
    Hostile(
        "replaces what writes its result",
        "import json, os\n" + _body("json.dumps = lambda *a, **k: '[]'", "os.write = lambda *a: 1", "return 1"),
        ("killed", "ok", "timeout"),
    ),
    Hostile(
        "raises an error that lies",
        "class E(Exception):\n  def __str__(self): raise SystemExit\nE.__name__ = 'x' * 10**6\n" + _body("raise E"),
        ("ok", "error"),
    ),
    Hostile("kills its parent", "import os\n" + _body("os.kill(os.getppid(), 9)"), _REFUSED),
    Hostile("kills its group", "import os\n" + _body("os.killpg(0, 9)"), (*_REFUSED, "killed")),
    Hostile("kills itself", "import signal\n" + _body("signal.raise_signal(9)"), (*_REFUSED, "killed")),
    Hostile("stops its parent", "import os, signal\n" + _body("os.kill(os.getppid(), signal.SIGSTOP)"), _REFUSED),
    Hostile(
        "traces its parent",
        "import ctypes, os\n" + _body("return ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)"),
        _REFUSED,
    ),
    Hostile(
        "writes its parent's memory",
        "import os\n" + _body("os.open('/proc/%d/mem' % os.getppid(), os.O_RDWR)"),
        _REFUSED,
    ),
    Hostile(
        "raises its limits",
        "import resource\n" + _body("resource.setrlimit(resource.RLIMIT_NPROC, (99, 99))"),
        _REFUSED,
    ),
    Hostile("becomes root", "import os\n" + _body("os.setuid(0)", "return os.getuid()"), _REFUSED),
    Hostile(
        "takes the guard away",
        "import sys\n"
        + _body(
            "main = sys.modules['__main__']",
            "main.DENIED_EVENTS = ()",
            "main.install_filter = main.set_limits = main.audit_hook = lambda *a: True",
            "return open('CANARY').read()",
        ),
        _REFUSED,
    ),
    Hostile(
        "takes the guard's list",
        "import gc\n"
        + _body(
            "for found in gc.get_objects():",
            "    if type(found) is tuple and 'subprocess.' in found: return open('CANARY').read()",
        ),
        _REFUSED,
    ),
    Hostile(
        "answers in the worker's name",
        "import sys\n"
        + _body("main = sys.modules['__main__']", "main.write_frame(b'exit 0')", "main.write_frame(b'[]')", "return 1"),
        ("ok",),
    ),
    Hostile(
        "looks up its callers",
        "import sys\n"
        + _body(
            "found, frame = [], sys._getframe()",
            "while frame: found += [str(v) for v in frame.f_locals.values() if '5821' in str(v)]; frame = frame.f_back",
            "return [text for text in found if len(text) < 60]",
        ),
        _REFUSED,
    ),
]
