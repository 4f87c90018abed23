"""Rewards that are rules: plain functions of the text, enough to run PPO without any reward model.

Every factory here returns a reward `f(prompts, completions, **columns) -> list[float]`; `RULES` at the foot names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.data.rows import Prompt
from rlhf.infra.errors import UserError
from rlhf.rewards.protocol import RewardFunction

POSITIVE_WORDS = ("good", "great", "happy", "excellent", "wonderful", "love", "nice", "thank", "helpful", "glad")
NEGATIVE_WORDS = ("bad", "awful", "sad", "terrible", "horrible", "hate", "nasty", "useless", "angry", "sorry")


def target_string(text: str, ignore_case: bool = False) -> RewardFunction:
    """1 where the completion holds `text`, else 0."""
    wanted = text.lower() if ignore_case else text
    return _each(lambda answer: float(wanted in (answer.lower() if ignore_case else answer)))


def target_format(pattern: str) -> RewardFunction:
    """1 where the whole completion, stripped, matches the regular expression, else 0."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(
            f"target_format got the pattern {pattern!r}, which is no regular expression: {error}"
        ) from error
    return _each(lambda answer: float(compiled.fullmatch(answer.strip()) is not None))


def length_penalty(target_words: int, per_word: float = 0.05) -> RewardFunction:
    """-`per_word` for every word by which the completion is shorter or longer than the target; 0 at the target."""
    if target_words < 0 or per_word < 0:
        raise UserError(f"length_penalty got target_words={target_words}, per_word={per_word}; both must be 0 or more")
    return _each(lambda answer: -per_word * abs(len(answer.split()) - target_words))


def keyword_sentiment(
    positive: Sequence[str] = POSITIVE_WORDS, negative: Sequence[str] = NEGATIVE_WORDS
) -> RewardFunction:
    """(positive - negative) / (positive + negative) words of the completion, in [-1, 1]; 0 where it has neither."""
    liked, disliked = {w.lower() for w in positive}, {w.lower() for w in negative}

    def score(answer: str) -> float:
        words = re.findall(r"[a-z']+", answer.lower())
        plus, minus = sum(w in liked for w in words), sum(w in disliked for w in words)
        return (plus - minus) / (plus + minus) if plus + minus else 0.0

    return _each(score)


def phrase_endings(phrases: Sequence[str]) -> RewardFunction:
    """1 where the completion ends in one of the phrases (case and outer white space aside), else 0."""
    if isinstance(phrases, str) or not phrases:
        raise UserError(f"phrase_endings got {phrases!r}; give a list with at least one phrase")
    endings = tuple(phrase.strip().lower() for phrase in phrases)
    return _each(lambda answer: float(answer.strip().lower().endswith(endings)))


def make_rule(
    name: str, arguments: dict[str, Any], rules: Mapping[str, Callable[..., RewardFunction]] | None = None
) -> RewardFunction:
    """The rule of that name with these settings; `UserError` names what it takes when they do not fit.

    `rules`: other factories than those of this file, such as `rlhf.rewards.verifiers.VERIFIERS`.
    """
    try:
        return (RULES if rules is None else rules)[name](**arguments)
    except TypeError as error:
        raise UserError(f"reward '{name}' does not take {arguments}: {error}") from error


def _each(score: Callable[[str], float]) -> RewardFunction:
    def reward(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [score(completion) for completion in completions]

    return reward


RULES: dict[str, Callable[..., RewardFunction]] = {
    "target_string": target_string,
    "target_format": target_format,
    "length_penalty": length_penalty,
    "keyword_sentiment": keyword_sentiment,
    "phrase_endings": phrase_endings,
}
