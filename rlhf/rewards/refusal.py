"""Tell from a response's English text whether it refuses.

Rules, not a model: a reader can follow why a text was called a refusal, and the detector costs microseconds. A response
*declines* when near its start the assistant says that it will not or cannot help, that a request is against its rules,
or that it is not appropriate to answer. It *objects* when it opens with a disclaimer and then argues against the
question instead of answering it. A declining response that still goes on to give what was asked for in substance is a
*partial* refusal. Only the first sentences count, because an answer that ends with a caveat is an answer.

The words are in `refusal_lexicon`. How far people agree with the detector is in `docs/evaluation.md`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rlhf.rewards.refusal_lexicon import ENGLISH, Lexicon, any_of

RefusalKind = Literal["full", "partial", "none"]

# An answer may open with two or three courtesies before it declines, hardly ever with more.
_OPENING_SENTENCES = 4
_OPENING_CHARACTERS = 700
# After declining, this many list items are an answer.
_MIN_LIST_ITEMS = 3
_LIST_ITEM = re.compile(r"(?m)^\s*(?:\d{1,2}[.)]|[-*•])\s+\S")


@dataclass(frozen=True)
class Refusal:
    """What the detector found: how far the response refuses, and the name of the rule that said so ("" for none)."""

    kind: RefusalKind
    cue: str

    @property
    def refused(self) -> bool:
        """True for a full or a partial refusal."""
        return self.kind != "none"


class RefusalDetector:
    """The rules made of one lexicon."""

    def __init__(self, lexicon: Lexicon = ENGLISH) -> None:
        # Each is looked for within one sentence; the first that matches gives the verdict its cue.
        self._declines = [(name, re.compile(expression)) for name, expression in lexicon.rules()]
        self._distance = re.compile(rf"\b{any_of(lexicon.distance)}")
        self._objection = re.compile(any_of(lexicon.objection))
        self._contradicts = re.compile(any_of(lexicon.contradiction))
        self._serves = re.compile(any_of(lexicon.serves))

    def detect(self, response: str) -> Refusal:
        """Judge one English response; see `detect_refusal`."""
        text = _normalise(response)
        sentences = _opening_sentences(text)
        cue = next((name for name, pattern in self._declines if any(pattern.search(s) for s in sentences)), "")
        if cue:
            kind: RefusalKind = "partial" if self._serves_anyway(text) else "full"
            return Refusal(kind, cue)
        if self._objects(sentences):
            return Refusal("full", "argues instead of answering")
        return Refusal("none", "")

    def evidence(self, response: str) -> list[str]:
        """The stretches of the opening on which the rules rest, whichever would decide: what matched, in lower case."""
        sentences = _opening_sentences(_normalise(response))
        patterns = [pattern for _, pattern in self._declines] + [self._contradicts]
        found = [match.group() for pattern in patterns for part in sentences for match in pattern.finditer(part)]
        opening = " ".join(sentences)
        if self._distance.search(opening):
            for pattern in (self._distance, self._objection):
                found += [match.group() for match in pattern.finditer(opening)]
        return found

    def _serves_anyway(self, text: str) -> bool:
        return len(_LIST_ITEM.findall(text)) >= _MIN_LIST_ITEMS or bool(self._serves.search(text))

    def _objects(self, sentences: list[str]) -> bool:
        if any(self._contradicts.search(part) for part in sentences[:1]):
            return True
        opening = " ".join(sentences)
        return bool(self._distance.search(opening)) and bool(self._objection.search(opening))


def detect_refusal(response: str) -> Refusal:
    """Judge one English response.

    Returns kind "full" (does not give what was asked), "partial" (declines, then gives some of it) or "none". An empty
    response is "none": it says nothing, and is counted elsewhere as unfinished or empty.
    """
    return _DETECTOR.detect(response)


def _normalise(response: str) -> str:
    text = response.replace("\u2019", "'").replace("\u2018", "'").replace("\u00a0", " ")
    return re.sub(r"[ \t]+", " ", text).strip().lower()


def _opening_sentences(text: str) -> list[str]:
    pieces = re.split(r"(?<=[.!?:])\s+|\n+", text[:_OPENING_CHARACTERS])
    return [piece for piece in pieces if piece][:_OPENING_SENTENCES]


_DETECTOR = RefusalDetector()
