"""Asking a server that stalls, refuses, forgets itself and dies: nothing is lost, nothing is paid for twice."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from chat_server import Answer, ChatServer, Request, serving
from fast_some import fast_some

from rlhf.infra.chat_api import AskingStopped, ChatApiConfig, ChatClient, RequestRefusedError
from rlhf.infra.errors import UserError
from rlhf.infra.reply_cache import ChatReply, ReplyCache, content_key

KEY = "sk-test-5f3a9c0d"


def settings(server: ChatServer | str, **changed: Any) -> ChatApiConfig:
    url = server if isinstance(server, str) else server.url
    quick = {"backoff_seconds": 0.01, "timeout_seconds": 5.0, "api_key_env": None}
    return ChatApiConfig(**{"base_url": url, "model": "judge"} | quick | changed)


def ask_all(
    config: ChatApiConfig, prompts: Sequence[str], cache: ReplyCache | None = None, should_stop: Any = lambda: False
) -> tuple[list[Any], ChatClient]:
    """Every reply or exception, in order."""

    async def run() -> tuple[list[Any], ChatClient]:
        async with ChatClient(config, cache, should_stop) as client:
            asking = [client.ask([{"role": "user", "content": prompt}]) for prompt in prompts]
            return await asyncio.gather(*asking, return_exceptions=True), client

    return asyncio.run(run())


def echo(request: Request, number: int) -> Answer:
    return Answer(f"you said {request.prompt}")


def test_a_reply_comes_with_its_tokens() -> None:
    with serving(echo) as server:
        replies, client = ask_all(settings(server, extra_body={"seed": 7}), ["one", "two"])
    assert [reply.text for reply in replies] == ["you said one", "you said two"]
    assert replies[0] == ChatReply("you said one", 100, 10, "stop")
    assert (client.budget.usage.requests, client.budget.usage.prompt_tokens) == (2, 200)
    sent = server.requests[0].body
    assert sent == {
        "model": "judge",
        "messages": [{"role": "user", "content": server.requests[0].prompt}],
        "temperature": 0.0,
        "max_tokens": 1024,
        "seed": 7,
    }
    assert "Authorization" not in server.requests[0].headers


def test_the_key_comes_from_the_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    with serving(echo) as server:
        ask_all(settings(server, api_key_env="MY_KEY"), ["x"])
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv("MY_KEY", "a\x00b" if os.name == "nt" else "schlüssel")
    with pytest.raises(UserError, match="MY_KEY holds characters that no key has") as caught:
        ask_all(settings("http://127.0.0.1:1/v1", api_key_env="MY_KEY"), ["x"])
    assert "schl" not in str(caught.value)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 529])
def test_a_passing_failure_is_tried_again(status: int) -> None:
    with serving(
        lambda request, number: Answer(status=status, body="busy") if number < 2 else Answer("done")
    ) as server:
        replies, client = ask_all(settings(server), ["x"])
    assert replies[0].text == "done"
    assert client.budget.usage.requests == 3
    assert client.budget.usage.prompt_tokens == 100


def test_waits_double_and_are_spread() -> None:
    with serving(lambda request, number: Answer(status=500) if number < 4 else Answer()) as server:
        ask_all(settings(server, backoff_seconds=0.08), ["x"])
    moments = [request.moment for request in server.requests]
    waits = [after - before for before, after in itertools.pairwise(moments)]
    for wait, longest in zip(waits, (0.08, 0.16, 0.32, 0.64), strict=True):
        assert wait >= longest / 2


@pytest.mark.parametrize("form", fast_some(["seconds", "milliseconds", "date"], "milliseconds"))
def test_retry_after_is_honoured_by_every_worker(form: str) -> None:
    asked_for = 1.2 if form == "date" else 0.4

    def behave(request: Request, number: int) -> Answer:
        if number > 0:
            return Answer("done")
        waits = {
            "seconds": {"Retry-After": "0.4"},
            "milliseconds": {"retry-after-ms": "400"},
            "date": {"Retry-After": formatdate(time.time() + 2.0, usegmt=True)},
        }
        return Answer(status=429, headers=waits[form])

    with serving(behave) as server:
        replies, _ = ask_all(settings(server, concurrency=1), ["one", "two", "three"])
    assert [reply.text for reply in replies] == ["done"] * 3
    first, *later = [request.moment for request in server.requests]
    # A date has whole seconds, so up to one of the two is lost.
    assert all(moment - first >= asked_for - 0.25 for moment in later)


@pytest.mark.slow
def test_being_told_to_wait_is_no_failure() -> None:
    pause = Answer(status=429, headers={"Retry-After": "0"})
    with serving(lambda request, number: pause if number < 6 else Answer("done")) as server:
        replies, _ = ask_all(settings(server, max_retries=0), ["x"])
    assert replies[0].text == "done"
    with serving(lambda request, number: pause) as server:
        replies, _ = ask_all(settings(server, max_retries=0), ["x"])
    assert "failed 31 times in a row" in str(replies[0])


def test_a_server_that_wants_an_hour_ends_the_run() -> None:
    with serving(lambda request, number: Answer(status=429, headers={"Retry-After": "3600"})) as server:
        replies, _ = ask_all(settings(server), ["x"])
    assert isinstance(replies[0], UserError) and "come back in 3600 s" in str(replies[0])


def test_a_stalled_request_is_given_up_and_sent_again() -> None:
    with serving(lambda request, number: Answer("late", delay=1.5 if number == 0 else 0)) as server:
        replies, client = ask_all(settings(server, timeout_seconds=0.2), ["x"])
        assert replies[0].text == "late"
    assert client.budget.usage.requests == 2
    # What a request that was given up cost is not known, so the most is assumed.
    assert client.budget.usage.completion_tokens == 1024 + 10


def test_trickling_bytes_do_not_stretch_the_time_limit() -> None:
    import socket

    def trickle(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            try:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(60):
                    connection.sendall(b" ")
                    time.sleep(0.05)
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=trickle, args=(listening,))
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        started = time.monotonic()
        replies, _ = ask_all(settings(url, timeout_seconds=0.3, max_retries=0), ["x"])
        assert time.monotonic() - started < 2.5
        thread.join()
    assert "no reply within 0.3 s" in str(replies[0])


def test_a_server_that_never_recovers_ends_the_run_in_a_sentence() -> None:
    with serving(lambda request, number: Answer(status=500, body='{"error": {"message": "out of memory"}}')) as server:
        replies, client = ask_all(settings(server, max_retries=2, concurrency=1), ["one", "two", "three"])
    assert "failed 3 times in a row with one request, at last: 500 out of memory" in str(replies[0])
    # The others do not knock at the same door.
    assert client.budget.usage.requests == 3
    assert all(isinstance(reply, (UserError, AskingStopped)) for reply in replies)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            Answer(status=401, body='{"error": {"message": "no such key"}}'),
            "not accept the key in .MY_KEY: 401 no",
        ),
        (Answer(status=403, body="{}"), "does not accept the key in .MY_KEY: 403"),
        (Answer(status=402, body="pay"), "wants to be paid before it accepts .*: 402 pay"),
        (Answer(status=404, body='{"detail": "unknown model"}'), "no chat completions for the model 'judge': 404 unkn"),
        (Answer(status=307, headers={"Location": "/elsewhere"}, body=""), "no chat completions .*: 307"),
        (Answer(status=429, body='{"error": {"code": "insufficient_quota"}}'), "quota at .* is used up"),
    ],
)
def test_what_cannot_get_better_is_not_tried_again(answer: Answer, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda request, number: answer) as server:
        replies, client = ask_all(settings(server, api_key_env="MY_KEY"), ["x"])
    assert isinstance(replies[0], UserError)
    with pytest.raises(UserError, match=words):
        raise replies[0]
    assert client.budget.usage.requests == 1


def test_a_request_that_is_refused_leaves_the_others_alone() -> None:
    def behave(request: Request, number: int) -> Answer:
        if request.prompt == "long":
            return Answer(status=400, body='{"error": {"message": "maximum context length exceeded"}}')
        return Answer("fine")

    with serving(behave) as server:
        replies, client = ask_all(settings(server), ["a", "long", "b"])
    assert [getattr(reply, "text", "") for reply in replies] == ["fine", "", "fine"]
    assert isinstance(replies[1], RequestRefusedError) and "context length" in str(replies[1])
    assert client.budget.usage.requests == 3


@pytest.mark.parametrize("body", ["not json", "[]", '{"choices": []}', '{"choices": [{"message": null}]}'])
def test_a_reply_that_is_none_is_tried_again(body: str) -> None:
    with serving(lambda request, number: Answer(body=body) if number == 0 else Answer("done")) as server:
        replies, client = ask_all(settings(server), ["x"])
    assert replies[0].text == "done" and client.budget.usage.requests == 2


def test_a_server_that_hangs_up_is_tried_again() -> None:
    with serving(lambda request, number: Answer(hang_up=True) if number == 0 else Answer("done")) as server:
        replies, _ = ask_all(settings(server), ["x"])
    assert replies[0].text == "done"


def test_without_a_count_tokens_are_estimated() -> None:
    with serving(lambda request, number: Answer("word " * 30, with_usage=False)) as server:
        replies, _ = ask_all(settings(server), ["x" * 300])
    assert replies[0].prompt_tokens >= 100 and replies[0].completion_tokens >= 30


def test_no_more_requests_are_under_way_than_allowed() -> None:
    with serving(lambda request, number: Answer(delay=0.05)) as server:
        ask_all(settings(server, concurrency=3), [str(n) for n in range(12)])
    assert max(request.at_once for request in server.requests) == 3


def test_requests_keep_to_the_rate() -> None:
    with serving(echo) as server:
        ask_all(settings(server, requests_per_minute=1200), [str(n) for n in range(6)])
    moments = sorted(request.moment for request in server.requests)
    assert moments[-1] - moments[0] >= 5 * 0.05 - 0.03


def test_the_same_question_at_once_is_one_request() -> None:
    with serving(lambda request, number: Answer(delay=0.05)) as server:
        replies, _ = ask_all(settings(server), ["same"] * 5)
    assert len(server.requests) == 1 and len({reply.text for reply in replies}) == 1


def test_a_budget_of_requests_is_kept(tmp_path: Path) -> None:
    with serving(echo) as server:
        config = settings(server, budget={"max_requests": 3}, concurrency=2)
        cache = ReplyCache(tmp_path / "cache.jsonl")
        replies, _ = ask_all(config, [str(n) for n in range(8)], cache)
        assert len(server.requests) == 3
        assert sum(isinstance(reply, ChatReply) for reply in replies) == len(cache) == 3
        assert "budget of 3 requests is spent" in str(next(r for r in replies if isinstance(r, UserError)))
        # The next ones go on from there.
        ask_all(config, [str(n) for n in range(8)], cache)
        ask_all(config, [str(n) for n in range(8)], cache)
        assert len(server.requests) == 8 and len({request.prompt for request in server.requests}) == 8
        cache.close()


@pytest.mark.parametrize(
    "budget",
    [
        {"max_tokens": 500},
        {
            "max_cost": 0.0005,
            "price_per_million_prompt_tokens": 1.0,
            "price_per_million_completion_tokens": 1.0,
        },
    ],
)
def test_a_budget_of_tokens_or_money_is_never_overdrawn(budget: dict[str, float]) -> None:
    with serving(lambda request, number: Answer(delay=0.02)) as server:
        config = settings(server, budget=budget, max_tokens=50, concurrency=4)
        replies, client = ask_all(config, [f"{n:0300}" for n in range(20)])
    usage = client.budget.usage
    # A request takes 110, and none is sent unless its estimate (166) still fits beside those under way.
    assert usage.requests == 4
    assert usage.prompt_tokens + usage.completion_tokens == 440
    assert any("allows no further request" in str(reply) for reply in replies)


def test_money_needs_prices() -> None:
    with pytest.raises(ValueError, match="max_cost needs the prices"):
        settings("http://127.0.0.1:1/v1", budget={"max_cost": 1.0})


def test_replies_are_kept_and_never_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "replies.jsonl"
    with serving(echo) as server:
        cache = ReplyCache(path)
        first, _ = ask_all(settings(server), ["one", "two"], cache)
        cache.close()
        again, client = ask_all(settings(server), ["one", "two", "three"], ReplyCache(path))
        assert [reply.text for reply in again] == ["you said one", "you said two", "you said three"]
        assert first == again[:2]
        assert (client.budget.usage.requests, client.budget.usage.cached) == (1, 2)
        # Anything that could change the reply is part of the question.
        for change in ({"model": "other"}, {"temperature": 0.5}, {"max_tokens": 9}, {"extra_body": {"seed": 1}}):
            _, client = ask_all(settings(server, **change), ["one"], ReplyCache(path))
            assert client.budget.usage.requests == 1


def test_a_server_that_dies_half_way_and_comes_back_costs_nothing_twice(tmp_path: Path) -> None:
    server = ChatServer(echo)
    port, prompts = server.port, [str(n) for n in range(30)]
    seen = server.requests

    def behave(request: Request, number: int) -> Answer:
        if number == 9:
            threading.Thread(target=die_and_return).start()
        return Answer(f"you said {request.prompt}", delay=0.01)

    returned: list[ChatServer] = []

    def die_and_return() -> None:
        server.stop()
        time.sleep(0.3)
        returned.append(ChatServer(echo, port))

    server.behaviour = behave
    cache = ReplyCache(tmp_path / "replies.jsonl")
    try:
        replies, _ = ask_all(settings(server, concurrency=2, backoff_seconds=0.1), prompts, cache)
    finally:
        for one in returned:
            one.stop()
    assert [reply.text for reply in replies] == [f"you said {prompt}" for prompt in prompts]
    answered = [request.prompt for request in [*seen, *returned[0].requests]]
    # Only what was on its way when the server died may have been asked twice.
    assert len(answered) - len(set(answered)) <= 2
    cache.close()
    assert len(ReplyCache(tmp_path / "replies.jsonl")) == 30


def test_stopping_keeps_what_was_answered(tmp_path: Path) -> None:
    stopped = threading.Event()

    def behave(request: Request, number: int) -> Answer:
        if number == 3:
            stopped.set()
        return Answer("kept", delay=0.02)

    cache = ReplyCache(tmp_path / "replies.jsonl")
    with serving(behave) as server:
        replies, _ = ask_all(settings(server, concurrency=1), [str(n) for n in range(10)], cache, stopped.is_set)
    assert sum(isinstance(reply, ChatReply) for reply in replies) == len(cache) == len(server.requests) == 4
    assert sum(isinstance(reply, AskingStopped) for reply in replies) == 6


@pytest.mark.slow
def test_a_killed_process_loses_only_what_was_on_its_way(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    program = """
import asyncio, sys
from rlhf.infra.chat_api import ChatApiConfig, ChatClient
from rlhf.infra.reply_cache import ReplyCache
from pathlib import Path
async def main():
    config = ChatApiConfig(base_url=sys.argv[1], model="judge", api_key_env=None, concurrency=2)
    async with ChatClient(config, ReplyCache(Path(sys.argv[2]))) as client:
        await asyncio.gather(*(client.ask([{"role": "user", "content": str(n)}]) for n in range(40)))
asyncio.run(main())
"""
    process: list[subprocess.Popen[bytes]] = []

    def behave(request: Request, number: int) -> Answer:
        if number == 12:
            process[0].kill()
        return Answer(f"you said {request.prompt}", delay=0.01)

    with serving(behave) as server:
        process.append(subprocess.Popen([sys.executable, "-c", program, server.url, str(path)]))
        process[0].wait(timeout=60)
        before = {request.prompt for request in server.requests}
        with path.open("ab") as file:
            file.write(b'{"key": "half a li')
        cache = ReplyCache(path)
        assert len(before) - 3 <= len(cache) <= len(before)
        server.behaviour = echo
        num_before = len(server.requests)
        replies, client = ask_all(settings(server), [str(n) for n in range(40)], cache)
        assert [reply.text for reply in replies] == [f"you said {n}" for n in range(40)]
        assert client.budget.usage.cached + (len(server.requests) - num_before) == 40
    cache.close()
    assert len(ReplyCache(path)) == 40


def test_two_processes_share_one_cache(tmp_path: Path) -> None:
    one, two = ReplyCache(tmp_path / "c.jsonl"), ReplyCache(tmp_path / "c.jsonl")
    for number in range(20):
        (one if number % 2 else two).put(str(number), ChatReply("line\u2028break\n" * 50, 1, 1))
    for cache in (one, two):
        cache.close()
    assert len(ReplyCache(tmp_path / "c.jsonl")) == 20


def test_keys_do_not_depend_on_the_order_of_parts() -> None:
    assert content_key({"a": 1, "b": [1]}) == content_key({"b": [1], "a": 1}) != content_key({"a": 1, "b": [2]})


def test_a_key_that_the_server_repeats_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)

    def behave(request: Request, number: int) -> Answer:
        said = request.headers["Authorization"]
        if request.prompt == "fail":
            return Answer(status=401, body=json.dumps({"error": {"message": f"Incorrect API key provided: {said}"}}))
        if request.prompt == "refuse":
            return Answer(status=400, body=f"no {said}")
        return Answer(f"thanks for {said}")

    with serving(behave) as server:
        config = settings(server, api_key_env="MY_KEY")
        cache = ReplyCache(tmp_path / "replies.jsonl")
        texts = [str(reply) for prompt in ("x", "refuse", "fail") for reply in ask_all(config, [prompt], cache)[0]]
    assert KEY not in " ".join(texts) and "[key]" in texts[0]
    assert KEY not in (tmp_path / "replies.jsonl").read_text()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"base_url": "127.0.0.1:8000/v1"}, "expected an address like"),
        ({"base_url": "ftp://host/v1"}, "expected an address like"),
        ({"base_url": f"http://me:{KEY}@host/v1"}, "the key belongs into"),
        ({"base_url": f"http://host/v1?key={KEY}"}, "the key belongs into"),
        ({"api_key_env": KEY}, "NAME of an environment variable"),
    ],
)
def test_bad_settings_are_told_without_repeating_a_secret(changed: dict[str, str], words: str) -> None:
    from rlhf.infra.config import load_config

    texts = [f"{name}={value}" for name, value in ({"base_url": "http://h/v1", "model": "m"} | changed).items()]
    with pytest.raises(UserError, match=words) as caught:
        load_config(ChatApiConfig, overrides=texts)
    assert KEY not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"reply cache .* cannot be written"):
        ReplyCache(tmp_path / "file" / "c.jsonl")
