"""What failed, from the facts of a report: stages and their guards, signs of reward hacking, targets missed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf.eval.cautions import Check
from rlhf.eval.hacking import Verdict
from rlhf.eval.hacking_record import HackingRecord
from rlhf.eval.report_data import Report
from rlhf.eval.stage_facts import StageFacts

STAGES, SIGNS_SEEN, TARGETS = "Stages and guards", "Signs of reward hacking", "Targets missed"
_STOPPED = {
    "interrupted": "it was interrupted",
    "max_minutes": "its time budget was spent",
    "reward_hacking": "a sign of reward hacking ended it",
}


@dataclass(frozen=True)
class Failures:
    """Sentences on what failed by heading, and on what was looked at and did not fail."""

    failed: dict[str, tuple[str, ...]]
    passed: tuple[str, ...]

    @property
    def num(self) -> int:
        """How many things failed."""
        return sum(len(sentences) for sentences in self.failed.values())


def failures_of(report: Report, checks: Sequence[Check]) -> Failures:
    """Collect what failed; what nobody looked at is in neither list."""
    found = {
        STAGES: tuple(sentence for stage in report.stages for sentence in _stage(stage)),
        SIGNS_SEEN: tuple(_sign(record, verdict) for record in report.hacking for verdict in record.caught),
        TARGETS: tuple(check.sentence for check in checks if check.missed),
    }
    return Failures({title: sentences for title, sentences in found.items() if sentences}, tuple(_passed(report)))


def _stage(stage: StageFacts) -> Iterator[str]:
    if stage.status == "failed":
        yield f"{stage.name} failed: {stage.error or 'no reason was recorded'}."
    elif stage.status != "finished":
        yield f"{stage.name} was not finished when this report was made (status: {stage.status})."
    elif stage.stop_reason is not None:
        yield f"{stage.name} ended early: {_STOPPED.get(stage.stop_reason, stage.stop_reason)}."
    if stage.num_skipped:
        steps = f"{stage.num_skipped} optimizer {_plural('step', stage.num_skipped)}"
        yield f"{stage.name}: {steps} with a loss or gradient that was not finite never reached the weights."
    if stage.num_rejected:
        yield f"{stage.name}: {stage.num_rejected} {_plural('row', stage.num_rejected)} of data could not be read."
    if stage.num_resumed:
        times = f"{stage.num_resumed} {_plural('time', stage.num_resumed)}"
        yield f"{stage.name} was interrupted and taken up again {times}."


def _sign(record: HackingRecord, verdict: Verdict) -> str:
    at = "" if record.after_training else f", iteration {verdict.step}"
    return f"{record.title}{at}: {verdict.sentence} ({verdict.sign.replace('_', ' ')})."


def _passed(report: Report) -> Iterator[str]:
    ended_well = [stage.name for stage in report.stages if not any(_stage(stage))]
    if ended_well:
        yield f"Stages that finished with nothing skipped or refused: {', '.join(ended_well)}."
    for record in report.hacking:
        clean = [verdict.sign.replace("_", " ") for verdict in record.verdicts if not verdict.caught]
        if clean:
            yield f"No such sign in {record.title}: {', '.join(clean)}."


def _plural(word: str, num: int) -> str:
    return word if num == 1 else f"{word}s"
