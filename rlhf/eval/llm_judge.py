"""A judge behind an OpenAI-compatible API: asked about every pair in both orders, each reply kept and paid for once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf.eval.judge import Judgement, JudgingStopped, Pair, Watch
from rlhf.eval.judge_prompt import INSTRUCTIONS, asked_again, judge_messages, parse_verdict
from rlhf.infra.chat_api import AskingStopped, ChatApiConfig, ChatClient, RequestRefusedError
from rlhf.infra.chat_budget import Usage
from rlhf.infra.errors import UserError
from rlhf.infra.reply_cache import ReplyCache, content_key

Result = TypeVar("Result")
REFERENCE = "reference"


@dataclass(frozen=True)
class LLMCounts:
    """What came of the questions: orders without a readable verdict, of these refused by the server and cut off."""

    asked: int
    unparsable: int
    refused: int
    cut_off: int
    first_refusal: str = ""


class LLMJudge:
    """Asks a model which of two answers is better, in the pairwise form of `judge_prompt`.

    A reply without a verdict is asked about up to `unparsable_retries` times; then the order has no verdict, and so has
    the pair. Two answers with the same text are alike without asking. Replies are kept under `cache_folder`, so a run
    that was stopped or failed goes on where it was; None keeps none. `usage` and `counts` tell of the last call.
    """

    sees_order = True

    def __init__(
        self,
        name: str,
        config: ChatApiConfig,
        cache_folder: Path | None = None,
        unparsable_retries: int = 1,
        instructions: str = INSTRUCTIONS,
    ) -> None:
        self.name, self.config = name, config
        self.unparsable_retries, self.instructions = unparsable_retries, instructions
        self.cache_path = None
        if cache_folder is not None:
            self.cache_path = cache_folder / f"{content_key({'url': config.base_url, 'model': config.model})}.jsonl"
        self.usage = Usage()
        self.counts = LLMCounts(0, 0, 0, 0)

    def __call__(self, pairs: Sequence[Pair], watch: Watch = Watch()) -> list[Judgement]:  # noqa: B008 - frozen
        """Judge every pair, or none: `UserError` and `JudgingStopped` leave what was answered in the cache.

        Raises:
            UserError: the server cannot be asked, gave up, refused every question, or the budget is spent.
            JudgingStopped: `watch.should_stop` said so.
        """
        cache = None if self.cache_path is None else ReplyCache(self.cache_path)
        try:
            return _run(self._judge_all(pairs, watch, cache))
        except AskingStopped:
            raise JudgingStopped from None
        finally:
            if cache is not None:
                cache.close()

    async def _judge_all(self, pairs: Sequence[Pair], watch: Watch, cache: ReplyCache | None) -> list[Judgement]:
        async with ChatClient(self.config, cache, watch.should_stop) as client:
            judging = [self._judge(client, pair, watch) for pair in pairs]
            outcomes = await asyncio.gather(*judging, return_exceptions=True)
            self.usage = client.budget.usage
        failure = _worst(outcomes)
        if isinstance(failure, UserError):
            kept = "" if cache is None else "; what was answered is kept, and the same command goes on from there"
            done = sum(not isinstance(outcome, BaseException) for outcome in outcomes)
            raise UserError(
                f"judge '{self.name}' stopped at {done} of {len(pairs)} pairs: {failure}{kept}"
            ) from failure
        if failure is not None:
            raise failure
        found = [outcome for outcome in outcomes if isinstance(outcome, _Asked)]
        self._count(found)
        return [asked.judgement for asked in found]

    async def _judge(self, client: ChatClient, pair: Pair, watch: Watch) -> _Asked:
        if pair.first.strip() == pair.second.strip():
            watch.advance(1)
            return _Asked(Judgement(0.5, 0.5, is_asked=False), ())
        orders = await asyncio.gather(
            self._verdict(client, pair, pair.first, pair.second),
            self._verdict(client, pair, pair.second, pair.first),
            return_exceptions=True,
        )
        failure = _worst(orders)
        if failure is not None:
            raise failure
        front, back = (order for order in orders if isinstance(order, _Order))
        watch.advance(1)
        behind = None if back.preference is None else 1 - back.preference
        return _Asked(Judgement(front.preference, behind, (front.reply, back.reply)), (front, back))

    async def _verdict(self, client: ChatClient, pair: Pair, answer_a: str, answer_b: str) -> _Order:
        reference = pair.columns.get(REFERENCE)
        shown = reference if isinstance(reference, str) else None
        messages = judge_messages(pair.prompt, answer_a, answer_b, shown, self.instructions)
        said: list[str] = []
        cut_off = False
        try:
            for _ in range(self.unparsable_retries + 1):
                reply = await client.ask(messages)
                said.append(reply.text)
                cut_off = reply.finish_reason == "length"
                preference = parse_verdict(reply.text)
                if preference is not None:
                    return _Order(preference, "\n\n".join(said))
                messages = asked_again(messages, reply.text)
        except RequestRefusedError as refusal:
            return _Order(None, "\n\n".join(said), refusal=str(refusal))
        return _Order(None, "\n\n".join(said), cut_off=cut_off)

    def _count(self, found: Sequence[_Asked]) -> None:
        orders = [order for asked in found for order in asked.orders]
        refusals = [order.refusal for order in orders if order.refusal]
        if refusals and len(refusals) == len(orders):
            raise UserError(f"{self.config.base_url} refuses every question of judge '{self.name}': {refusals[0]}")
        self.counts = LLMCounts(
            asked=len(orders),
            unparsable=sum(order.preference is None for order in orders),
            refused=len(refusals),
            cut_off=sum(order.cut_off for order in orders),
            first_refusal=refusals[0] if refusals else "",
        )


@dataclass(frozen=True)
class _Order:
    """One order of one pair: the preference for the answer in front, the judge's words, and why there is no verdict."""

    preference: float | None
    reply: str
    refusal: str = ""
    cut_off: bool = False


@dataclass(frozen=True)
class _Asked:
    judgement: Judgement
    orders: tuple[_Order, ...]


def _worst(outcomes: Sequence[object]) -> BaseException | None:
    """The exception that says most: a failure before being stopped, which is often its consequence."""
    raised = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    return next((error for error in raised if not isinstance(error, AskingStopped)), raised[0] if raised else None)


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end, in a thread of its own where this one already runs a loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(work))
        except BaseException as error:  # handed on to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
