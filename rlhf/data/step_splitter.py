"""Where the steps of a free answer are: in its text, and in the tokens it was sampled as."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

from rlhf.infra.errors import UserError

LINES = r"\n+"
Decode = Callable[[Sequence[int]], str]


class StepSplitter:
    """Cuts an answer into steps at every match of a regular expression, by default at line ends."""

    def __init__(self, pattern: str = LINES) -> None:
        try:
            self._between = re.compile(pattern)
        except re.error as error:
            raise UserError(f"steps are to be split at {pattern!r}, which is no regular expression: {error}") from error

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return (start, end) of every step in the text, without white space around it; what is empty is no step."""
        bounds = [0, *(place for match in self._between.finditer(text) for place in match.span()), len(text)]
        found = []
        for start, end in zip(bounds[::2], bounds[1::2], strict=True):
            step = text[start:end]
            if step.strip():
                found.append((start + len(step) - len(step.lstrip()), start + len(step.rstrip())))
        return found

    def steps(self, text: str) -> list[str]:
        """Return the steps themselves."""
        return [text[start:end] for start, end in self.spans(text)]


def tokens_until(decode: Decode, ids: Sequence[int], num_characters: int) -> int:
    """Return how many of the first tokens it takes to write so many characters; all where they write fewer."""
    found = bisect_left(range(len(ids)), num_characters, key=lambda count: len(decode(ids[:count])))
    return min(found, len(ids))


def tokens_within(decode: Decode, ids: Sequence[int], num_characters: int) -> int:
    """Return how many of the first tokens write at most so many characters."""
    return bisect_right(range(len(ids) + 1), num_characters, key=lambda count: len(decode(ids[:count]))) - 1
