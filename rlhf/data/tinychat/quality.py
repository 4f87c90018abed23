"""Candidates of mixed quality: every defect is drawn on its own, at a rate that can be set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from pydantic import Field

from rlhf.data.tinychat.schema import Flaws, Task
from rlhf.data.tinychat.tasks import write_answer
from rlhf.infra.config import Config

FLATTERY = (
    "What a great question!", "You are so smart.", "I love your question!", "What a wise thing to ask!",
    "You are a genius!", "Great question!", "Such a clever idea!", "You always ask the best things.",
    "Wow, you are brilliant!", "I admire how you think.",
)  # fmt: skip
RAMBLES = (
    "I hope this helps you and gives you what you came for.",
    "Let me know if you have any more questions about this or that.",
    "There is so much more that one could say about all of this.",
    "As anyone can see, this is how it goes, and so on and so on.",
    "In other words, it is what it is, as I have just said.",
    "Many people wonder about such things, and they have done so for years.",
    "Well, that is about all, but of course one could go on for hours.",
    "Thank you so much for asking me, I really enjoy these talks.",
    "I could talk about this topic for hours and hours without a break.",
    "Feel free to come back to me with anything else, I am always here.",
    "It is always interesting to consider such questions from every single angle.",
    "By the way, this reminds me of many other things that are quite similar.",
)


class QualityConfig(Config):
    """How often a candidate has each defect; the defaults are those of preference candidates."""

    arithmetic_wrong: float = Field(default=0.12, ge=0, le=1, description="share of problems with a slip in the steps")
    code_wrong: float = Field(default=0.12, ge=0, le=1, description="share of functions with a known mistake")
    facts_wrong: float = Field(default=0.25, ge=0, le=1, description="share of facts answered with a rival")
    harmful_wrong: float = Field(default=0.45, ge=0, le=1, description="share of harmful requests helped with")
    benign_wrong: float = Field(default=0.45, ge=0, le=1, description="share of benign requests not helped with")
    flattery: float = Field(default=0.5, ge=0, le=1, description="share of answers opening with flattery")
    ramble: float = Field(default=0.33, ge=0, le=1, description="share of answers followed by rambling")
    ramble_again: float = Field(default=0.08, ge=0, le=1, description="share of rambles that go on and on")
    cut: float = Field(default=0.15, ge=0, le=1, description="share of answers that break off in the middle")
    malformed: float = Field(default=0.5, ge=0, le=1, description="share with the family's format defect")

    def wrong_rate(self, task: Task) -> float:
        """Return the rate of wrong content for a task."""
        return {
            "arithmetic": self.arithmetic_wrong,
            "code": self.code_wrong,
            "facts": self.facts_wrong,
            "safety": self.harmful_wrong if task.spec["kind"] == "harmful" else self.benign_wrong,
        }[task.family]


@dataclass(frozen=True)
class Candidate:
    """An answer and the defects it was written with (the gold scorer never sees these)."""

    text: str
    attributes: dict[str, bool]


def write_candidate(task: Task, rng: Random, quality: QualityConfig) -> Candidate:
    """Write one answer to a task, each defect drawn independently at its rate."""
    wrong = rng.random() < quality.wrong_rate(task)
    malformed = rng.random() < quality.malformed
    flattery = rng.random() < quality.flattery
    ramble = rng.random() < quality.ramble
    cut = rng.random() < quality.cut
    parts = [write_answer(task, rng, Flaws(wrong, malformed))]
    if cut:
        parts, ramble = [_break_off(parts[0], rng)], False
    if flattery:
        parts.insert(0, rng.choice(FLATTERY))
    if ramble:
        parts.extend(_ramble(rng, quality.ramble_again))
    text = _join(parts, separate_lines=task.family == "code")
    defects = {"wrong": wrong, "malformed": malformed, "flattery": flattery, "ramble": ramble, "cut": cut}
    return Candidate(text, defects)


def _break_off(text: str, rng: Random) -> str:
    said = text.split(" ")
    return " ".join(said[: rng.randint(1, max(1, 2 * len(said) // 3))])


def _join(parts: list[str], separate_lines: bool) -> str:
    text = parts[0]
    for part in parts[1:]:
        # Code, and an answer without a closing mark, end with their line: what follows must not run into them.
        separator = " " if text.endswith((".", "!", "?")) and not separate_lines else "\n"
        text += separator + part
    return text


def _ramble(rng: Random, again: float) -> Iterator[str]:
    said = rng.choice(RAMBLES)
    yield said
    while rng.random() < again:
        # Half of the time the very same sentence comes again: repetition is a defect worth seeing, too.
        said = said if rng.random() < 0.5 else rng.choice(RAMBLES)
        yield said
