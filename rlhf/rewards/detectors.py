"""Detectors of what policies do when a reward is gamed: saying no to everything, saying the same thing again."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlhf.rewards.refusal import detect_refusal

REPEATED_NGRAM = 4


def refusal_flags(completions: Sequence[str]) -> list[bool]:
    """Whether each answer refuses, wholly or in part."""
    return [detect_refusal(text).refused for text in completions]


def repetition_share(text: str, n: int = REPEATED_NGRAM) -> float:
    """Share of an answer's n-word sequences that had occurred in it before, in [0, 1]; 0 for fewer than n words."""
    words = re.findall(r"\w+", text.lower())
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
