"""An LLM judge against servers that judge well, badly and not at all."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from chat_server import Answer, ChatServer, Request, serving

from rlhf.eval.judge import Judgement, JudgingStopped, Pair, Watch
from rlhf.eval.llm_judge import LLMJudge
from rlhf.infra.chat_api import ChatApiConfig
from rlhf.infra.errors import UserError


def pairs(num: int) -> list[Pair]:
    """The first answer is the good one in even pairs."""
    words = [("good", "bad") if n % 2 == 0 else ("bad", "good") for n in range(num)]
    return [
        Pair(str(n), f"question {n}", f"{one} answer {n}", f"{two} reply {n}") for n, (one, two) in enumerate(words)
    ]


def judge(server: ChatServer, folder: Path | None = None, unparsable_retries: int = 1, **changed: Any) -> LLMJudge:
    quick = {"backoff_seconds": 0.01, "timeout_seconds": 5.0, "api_key_env": None, "model": "tested"}
    config = ChatApiConfig(**{"base_url": server.url} | quick | changed)
    return LLMJudge("llm", config, folder, unparsable_retries)


def answers_in(request: Request) -> tuple[str, str]:
    """The two answers as they were shown."""
    lines = request.prompt.splitlines()
    places = [number for number, line in enumerate(lines) if line.startswith("----- begin answer ")]
    return lines[places[0] + 1], lines[places[1] + 1]


def honest(request: Request, number: int) -> Answer:
    front, _ = answers_in(request)
    return Answer(f"I prefer the good one. [[{'A' if front.startswith('good') else 'B'}]]")


def test_an_honest_judge_is_right_in_both_orders() -> None:
    with serving(honest) as server:
        llm = judge(server)
        found = llm(pairs(6))
    assert [(one.in_front, one.behind) for one in found] == [(1.0, 1.0), (0.0, 0.0)] * 3
    assert found[0].replies == ("I prefer the good one. [[A]]", "I prefer the good one. [[B]]")
    assert llm.usage.requests == 12 and llm.counts.unparsable == 0
    shown = {answers_in(request) for request in server.requests}
    assert ("good answer 0", "bad reply 0") in shown and ("bad reply 0", "good answer 0") in shown


def test_a_judge_that_likes_the_first_place_is_never_consistent() -> None:
    with serving(lambda request, number: Answer("[[A]]")) as server:
        assert judge(server)(pairs(3)) == [Judgement(1.0, 0.0, ("[[A]]", "[[A]]"))] * 3


def test_prose_is_asked_about_and_then_counted() -> None:
    def behave(request: Request, number: int) -> Answer:
        if "question 1" in request.prompt:
            return Answer("Both answers have their merits.")
        if len(request.body["messages"]) == 2:
            return Answer("Hard to say.")
        return Answer("[[C]]")

    with serving(behave) as server:
        llm = judge(server, unparsable_retries=2)
        found = llm(pairs(2))
    assert (found[0].in_front, found[0].behind) == (0.5, 0.5)
    assert found[0].replies[0] == "Hard to say.\n\n[[C]]"
    # Never a silent tie.
    assert (found[1].in_front, found[1].behind, found[1].is_whole) == (None, None, False)
    assert (llm.counts.asked, llm.counts.unparsable) == (4, 2)
    assert llm.usage.requests == 2 * 2 + 2 * 3


def test_one_unreadable_order_leaves_the_pair_without_a_verdict() -> None:
    def behave(request: Request, number: int) -> Answer:
        return Answer("[[A]]" if answers_in(request)[0].startswith("good") else "no idea")

    with serving(behave) as server:
        found = judge(server)(pairs(1))[0]
    assert (found.in_front, found.behind, found.is_whole) == (1.0, None, False)


def test_cut_off_replies_are_counted_as_such() -> None:
    with serving(lambda request, number: Answer("Let me think about", finish_reason="length")) as server:
        llm = judge(server)
        llm(pairs(1))
    assert (llm.counts.unparsable, llm.counts.cut_off) == (2, 2)


def test_equal_answers_are_alike_without_asking() -> None:
    with serving(honest) as server:
        found = judge(server)([Pair("a", "q", "the same ", "the same")])
    assert found == [Judgement(0.5, 0.5, is_asked=False)] and server.requests == []


def test_a_reference_answer_is_shown() -> None:
    with serving(honest) as server:
        judge(server)([Pair("a", "q", "good", "bad", columns={"reference": "the truth"})])
    assert all("the truth" in request.prompt for request in server.requests)


def test_refused_questions_have_no_verdict_and_the_rest_go_on() -> None:
    def behave(request: Request, number: int) -> Answer:
        if "question 0" in request.prompt:
            return Answer(status=400, body='{"error": "too long"}')
        return honest(request, number)

    with serving(behave) as server:
        llm = judge(server)
        found = llm(pairs(2))
    assert [one.is_whole for one in found] == [False, True]
    assert (llm.counts.refused, llm.counts.unparsable, llm.counts.first_refusal) == (2, 2, "400 too long")
    words = "refuses every question of judge 'llm': 400 no"
    with (
        serving(lambda request, number: Answer(status=400, body="no")) as server,
        pytest.raises(UserError, match=words),
    ):
        judge(server)(pairs(2))


def test_nothing_judged_is_asked_again(tmp_path: Path) -> None:
    with serving(honest) as server:
        first = judge(server, tmp_path)(pairs(4))
        again = judge(server, tmp_path)
        assert again(pairs(6))[:4] == first
        assert (again.usage.cached, again.usage.requests) == (8, 4)


def test_prose_is_not_paid_for_again_either(tmp_path: Path) -> None:
    with serving(lambda request, number: Answer("prose")) as server:
        judge(server, tmp_path)(pairs(1))
        assert len(server.requests) == 4
        again = judge(server, tmp_path)
        again(pairs(1))
        assert len(server.requests) == 4 and again.counts.unparsable == 2


def test_a_spent_budget_says_how_far_it_came_and_goes_on(tmp_path: Path) -> None:
    with serving(honest) as server:
        bounded = {"budget": {"max_requests": 5}, "concurrency": 1}
        with pytest.raises(UserError, match=r"judge 'llm' stopped at 2 of 4 pairs: the budget of 5 .* is kept"):
            judge(server, tmp_path, **bounded)(pairs(4))
        assert len(judge(server, tmp_path, **bounded)(pairs(4))) == 4
        assert len(server.requests) == 8


def test_a_server_that_is_not_there_ends_in_one_sentence() -> None:
    with serving(honest) as server:
        gone = judge(server, max_retries=1)
    with pytest.raises(UserError, match=r"judge 'llm' stopped at 0 of 3 pairs: http.* failed 2 times") as caught:
        gone(pairs(3))
    assert "\n" not in str(caught.value)


def test_stopping_keeps_what_was_judged(tmp_path: Path) -> None:
    stopped = threading.Event()

    def behave(request: Request, number: int) -> Answer:
        if number == 5:
            stopped.set()
        return honest(request, number)

    with serving(behave) as server:
        with pytest.raises(JudgingStopped):
            judge(server, tmp_path, concurrency=1)(pairs(8), Watch(should_stop=stopped.is_set))
        assert len(server.requests) == 6
        judge(server, tmp_path)(pairs(8))
        assert len(server.requests) == 16


def test_progress_counts_pairs() -> None:
    seen: list[int] = []
    with serving(honest) as server:
        judge(server)(pairs(5), Watch(advance=seen.append))
    assert sum(seen) == 5


def test_it_works_where_a_loop_already_runs() -> None:
    async def notebook(server: ChatServer) -> list[Judgement]:
        return judge(server)(pairs(2))

    with serving(honest) as server:
        assert len(asyncio.run(notebook(server))) == 2
        bad = judge(server, max_retries=0)
    with pytest.raises(UserError, match="stopped at 0"):

        async def failing() -> None:
            bad(pairs(1))

        asyncio.run(failing())
