"""A small OpenAI-compatible server on loopback that behaves as badly as a test asks it to."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What the server does with one request: a reply, or a status with a body; `hang_up` closes without a word."""

    text: str = "Both are fine. [[C]]"
    status: int = 200
    body: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    hang_up: bool = False
    finish_reason: str = "stop"
    with_usage: bool = True


@dataclass(frozen=True)
class Request:
    """What arrived: the parsed body, the headers, the moment, and how many were being answered with it."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    moment: float
    at_once: int

    @property
    def prompt(self) -> str:
        """The first thing the user said."""
        return next(m["content"] for m in self.body["messages"] if m["role"] == "user")


Behaviour = Callable[[Request, int], Answer]


class ChatServer:
    """Answers by `behaviour(request, number of requests before it)` and keeps what it was asked."""

    def __init__(self, behaviour: Behaviour, port: int = 0) -> None:
        self.behaviour = behaviour
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._active = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stop(self) -> None:
        """Stop listening; a new server may take the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server._active += 1
                    asked = Request(self.path, body, dict(self.headers.items()), time.monotonic(), server._active)
                    number = len(server.requests)
                    server.requests.append(asked)
                try:
                    answer = server.behaviour(asked, number)
                    time.sleep(answer.delay)
                finally:
                    with server._lock:
                        server._active -= 1
                try:
                    self._send(answer)
                except OSError:
                    self.close_connection = True  # the client did not wait

            def _send(self, answer: Answer) -> None:
                if answer.hang_up:
                    self.close_connection = True
                    return
                content = (answer.body if answer.body is not None else completion(answer)).encode()
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def completion(answer: Answer) -> str:
    """A chat completion as OpenAI's API words it."""
    message = {"role": "assistant", "content": answer.text}
    reply: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "tested",
        "choices": [{"index": 0, "message": message, "finish_reason": answer.finish_reason}],
    }
    if answer.with_usage:
        reply["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return json.dumps(reply)


class TellTale:
    """A judge whose words tell how it was asked: by its settings, or by the clock, as the model's name says."""

    def __init__(self) -> None:
        self._failed: dict[str, float] = {}
        self._last = 0.0

    def __call__(self, request: Request, number: int) -> Answer:
        model, messages = request.body["model"], request.body["messages"]
        asked = json.dumps([request.path, request.body, request.headers.get("Authorization")], sort_keys=True)
        verdict = "[[A]]" if len(request.prompt) % 2 else "[[B]]"
        if model == "slow":
            return Answer(verdict, delay=0.3)
        if model == "crowd":
            return Answer(f"{'alone' if request.at_once == 1 else 'in a crowd'} {verdict}", delay=0.05)
        if model == "flaky":
            return Answer(verdict) if number % 2 else Answer(status=500)
        if model == "prose" and len(messages) == 2:
            return Answer("Hard to say.")
        if model == "clock":
            quick, self._last = request.moment - self._last < 0.05, request.moment
            return Answer(f"{'quick' if quick else 'slow'} {verdict}")
        if model == "patience":
            failed = self._failed.pop(asked, None)
            if failed is None:
                self._failed[asked] = request.moment
                return Answer(status=500)
            return Answer(f"{'hasty' if request.moment - failed < 1 else 'patient'} {verdict}")
        return Answer(f"{hashlib.sha256(asked.encode()).hexdigest()} {verdict}")


@contextmanager
def serving(behaviour: Behaviour, port: int = 0) -> Iterator[ChatServer]:
    """A server for the time of a test."""
    server = ChatServer(behaviour, port)
    try:
        yield server
    finally:
        server.stop()
