"""How the stages behind a report ended, and what their guards did: facts from the run folders, no judgement."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.infra.errors import UserError
from rlhf.infra.run_folder import read_run_info

_LOG = Path("logs") / "train.jsonl"
_SKIPPED = "train/skipped_steps"


@dataclass(frozen=True)
class StageFacts:
    """One run: its status and why it stopped, as in `run.json`, how often it was taken up again, and what was refused.

    `num_skipped` counts optimizer steps that were not finite and never reached the weights, `num_rejected` rows of data
    that could not be read.
    """

    name: str
    status: str
    stop_reason: str | None = None
    error: str | None = None
    num_resumed: int = 0
    num_skipped: int = 0
    num_rejected: int = 0


def read_stage(folder: Path, name: str) -> StageFacts:
    """Gather the facts of the run in `folder`. Raises UserError where it is not one."""
    info = read_run_info(folder)
    rejected = folder.glob("rejected_rows*.jsonl")
    return StageFacts(
        name,
        status=str(info.get("status")),
        stop_reason=info.get("stop_reason"),
        error=info.get("error"),
        num_resumed=len(info.get("resumed", ())),
        num_skipped=int(_last_line(folder / _LOG).get(_SKIPPED, 0)),
        num_rejected=sum(len(path.read_text(encoding="utf-8").splitlines()) for path in rejected),
    )


def _last_line(log: Path) -> dict[str, Any]:
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    if not lines:
        return {}
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except json.JSONDecodeError as error:
        raise UserError(f"{log}, line {len(lines)} is not JSON: {error.msg}") from error
    return found
