"""Runs inside a run: a pipeline's stages, the rounds of online DPO. Taken up again, what is finished is passed by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.infra.run_folder import RUN_INFO, read_run_info


@contextmanager
def chain(run: Run) -> Iterator[None]:
    """Hold a run open while others run inside it; seconds over all its lives are kept in `run.json`.

    Raises:
        Stopped: Ctrl-C in one of them; the command to go on is the outer run's.
    """
    with run:
        started = time.perf_counter()
        try:
            yield
        except Stopped:
            run.stop_reason = "interrupted"
        finally:
            cost = run.info.get("cost", {})
            run.info["cost"] = cost | {"seconds": cost.get("seconds", 0.0) + time.perf_counter() - started}
    if run.stop_reason == "interrupted":
        raise Stopped(run.resume_command)


def run_stage(name: str, start: Callable[[Path | None], Run], run: Run) -> None:
    """Start the run called `name` inside `run`, take it up where it was interrupted, or pass it by if it is finished.

    `start` gets the folder to resume, or None.
    """
    folder = run.folder / name
    status = read_run_info(folder)["status"] if (folder / RUN_INFO).is_file() else None
    if status == "finished":
        run.logger.info(f"stage {name} is finished already")
        return
    start(folder if status is not None else None)
