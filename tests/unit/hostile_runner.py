"""Runs hostile code in the sandbox while the sandbox itself is under resource limits; JSON in, JSON out.

A process of its own, so that what a failing sandbox lets through meets hard limits: memory, file size, processor time,
open files, and processes where the user is not root (who is exempt; the snippets bound themselves besides).
"""

from __future__ import annotations

import json
import resource
import sys

from rlhf.infra.sandbox import Sandbox, SandboxJob, SandboxLimits

CAPS = {
    resource.RLIMIT_AS: 3 << 30,
    resource.RLIMIT_FSIZE: 64 << 20,
    resource.RLIMIT_CPU: 120,
    resource.RLIMIT_NOFILE: 256,
    resource.RLIMIT_CORE: 0,
}


def main() -> None:
    for limit, value in CAPS.items():
        resource.setrlimit(limit, (value, value))
    job = json.load(sys.stdin)
    honest = SandboxJob("import math\ndef f(x): return math.isqrt(x) + x", "f", [[16]])
    report = {}
    with Sandbox(SandboxLimits(wall_seconds=0.3, memory_mb=128, output_bytes=20_000)) as sandbox:
        layers = list(sandbox.isolation)
        for name, code in job.items():
            result = sandbox.run([SandboxJob(code, "f", [[3]])])[0]
            # On a busy machine an honest job may run out of its time; it gets more of them then.
            after = next((r for _ in range(20) if (r := sandbox.run([honest])[0]).status != "timeout"), result)
            outputs = [{"value": output.value, "error": output.error} for output in result.outputs]
            report[name] = {
                "status": result.status,
                "detail": result.detail,
                "outputs": outputs,
                "honest": [output.value for output in after.outputs],
            }
        assert sandbox._worker is not None
        session = sandbox._worker._process.pid
        print(json.dumps({"layers": layers, "session": session, "results": report}))


if __name__ == "__main__":
    main()
