"""Asking a model behind an OpenAI-compatible API, with patience and without losing or paying for anything twice.

What is waited for: a free place (`concurrency`), the next slot (`requests_per_minute`), the moment a server named
(Retry-After), and, after a failure, a time that doubles and is spread by chance so that clients do not return all at
once. What is not: a reply beyond `timeout_seconds`, and more than `max_retries` failures of one request.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Literal

import httpx2
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from rlhf.infra.chat_budget import Budget, BudgetConfig
from rlhf.infra.config import Config
from rlhf.infra.config_errors import SECRET
from rlhf.infra.errors import UserError
from rlhf.infra.reply_cache import ChatReply, ReplyCache, content_key

Messages = Sequence[Mapping[str, str]]

_LONGEST_BACKOFF = 60.0
_LONGEST_PAUSE = 900.0
_MOST_PAUSES = 30  # of one request: being told to wait is no failure, but it must end some time
_NAP = 0.1
_SHOWN = 200
_CHARACTERS_PER_TOKEN = 3  # an estimate on the high side for English, used until the server has counted
_FATAL = {401: "does not accept", 402: "wants to be paid before it accepts", 403: "does not accept"}


class ChatApiConfig(Config):
    """Which server and model, how they are asked, and how patiently."""

    base_url: str = Field(description="where the API is, such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1")
    model: str = Field(min_length=1, description="the model's name on that server")
    api_key_env: str | None = Field(
        "OPENAI_API_KEY", description="environment variable that holds the key; unset or null: none is sent"
    )
    temperature: float | None = Field(0.0, ge=0, le=2, description="of sampling; null: the server's own")
    max_tokens: int = Field(1_024, ge=1, description="longest reply in tokens")
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what the server calls that; newer OpenAI models want the second name"
    )
    extra_body: dict[str, Any] = Field({}, description="further fields of every request, such as seed or top_p")
    concurrency: int = Field(8, ge=1, le=256, description="requests under way at the same time")
    requests_per_minute: float | None = Field(None, gt=0, description="most requests a minute; null: no limit")
    timeout_seconds: float = Field(120.0, gt=0, description="longest wait for one reply")
    max_retries: int = Field(6, ge=0, description="how often a request that failed is sent again")
    backoff_seconds: float = Field(1.0, gt=0, description="wait after the first failure; it doubles with each")
    budget: BudgetConfig = Field(default_factory=BudgetConfig, description="what may be spent in one go")

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        try:
            url = httpx2.URL(value)
        except httpx2.InvalidURL as error:
            raise ValueError(f"expected an address like http://127.0.0.1:8000/v1 ({error})") from None
        if url.userinfo or url.query:
            raise PydanticCustomError(
                SECRET, "expected an address without user, password or query: the key belongs into $api_key_env"
            )
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("expected an address like http://127.0.0.1:8000/v1")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not (value.isidentifier() and value == value.upper()):
            raise PydanticCustomError(SECRET, "expected the NAME of an environment variable, never the key itself")
        return value


class RequestRefusedError(Exception):
    """The server will never answer this request (too long, malformed); other requests may fare better."""


class AskingStopped(Exception):  # noqa: N818 - not an error: it was asked for
    """The client was told to stop, or another of its requests has failed for good."""


@dataclass(frozen=True)
class _Failure:
    """Why a request got no reply; `paused` where the server said how long to wait."""

    reason: str
    paused: bool = False


class ChatClient:
    """Asks one model. `async with ChatClient(config, cache) as client: await client.ask(messages)`, many at once.

    A reply in `cache` is returned without a request; a new one is put there before it is returned. `should_stop` is
    looked at before every request and while waiting.
    """

    def __init__(
        self, config: ChatApiConfig, cache: ReplyCache | None = None, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self.config, self.cache, self.should_stop = config, cache, should_stop
        self.budget = Budget(config.budget)
        self._key = _key_from_environment(config.api_key_env)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._under_way: dict[str, asyncio.Task[ChatReply]] = {}
        self._chance = random.Random()
        self._not_before = self._next_slot = 0.0
        self._given_up = False
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        # The time limit is on the whole request: a server that sends a byte a minute would never break one per read.
        limits = httpx2.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        self._http = httpx2.AsyncClient(headers=headers, timeout=None, limits=limits)

    async def __aenter__(self) -> ChatClient:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def ask(self, messages: Messages) -> ChatReply:
        """The model's reply.

        Raises:
            RequestRefusedError: the server will not answer this request.
            AskingStopped: `should_stop` says so, or another request ended the whole.
            UserError: the server cannot be reached, does not accept the key, or the budget is spent.
        """
        body = self._body(messages)
        key = content_key({"base_url": self.config.base_url} | body)
        found = self.cache.get(key) if self.cache is not None else None
        if found is not None:
            self.budget.count_cached()
            return found
        # The same question twice at once is one request.
        if key not in self._under_way:
            self._under_way[key] = asyncio.ensure_future(self._fetch(key, body))
        return await self._under_way[key]

    def _body(self, messages: Messages) -> dict[str, Any]:
        config = self.config
        body: dict[str, Any] = {"model": config.model, "messages": [dict(message) for message in messages]}
        if config.temperature is not None:
            body["temperature"] = config.temperature
        return body | {config.max_tokens_key: config.max_tokens} | config.extra_body

    async def _fetch(self, key: str, body: dict[str, Any]) -> ChatReply:
        try:
            reply = await self._with_retries(body)
            if self.cache is not None:
                self.cache.put(key, reply)
        except UserError:
            self._given_up = True  # whoever is waiting need not try
            raise
        return reply

    async def _with_retries(self, body: dict[str, Any]) -> ChatReply:
        characters = sum(len(message["content"]) for message in body["messages"])
        estimate = (characters // _CHARACTERS_PER_TOKEN + 16, self.config.max_tokens)
        failures = pauses = 0
        # The place is kept while backing off: a server that is down hears from `concurrency` requests, not from all.
        async with self._slots:
            while True:
                await self._turn()
                while not self.budget.reserve(*estimate):
                    await asyncio.sleep(_NAP)
                    self._refuse_to_go_on()
                outcome = await self._send(body, estimate)
                if isinstance(outcome, ChatReply):
                    return outcome
                failures, pauses = failures + (not outcome.paused), pauses + outcome.paused
                if failures > self.config.max_retries or pauses > _MOST_PAUSES:
                    raise UserError(
                        f"{self.config.base_url} failed {failures + pauses} times in a row with one request, at last: "
                        f"{outcome.reason}; see that the server runs, or be more patient with max_retries, "
                        "backoff_seconds or timeout_seconds"
                    )
                await self._back_off(0 if outcome.paused else failures)

    async def _send(self, body: dict[str, Any], estimate: tuple[int, int]) -> ChatReply | _Failure:
        """One request: the reply, or why it failed where trying again makes sense."""
        used = (0, 0)
        try:
            sending = self._http.post(f"{self.config.base_url}/chat/completions", json=body)
            response = await asyncio.wait_for(sending, self.config.timeout_seconds)
            if response.status_code != 200:
                return self._failure(response)
            reply = _reply_in(response, estimate)
            if isinstance(reply, str):
                return _Failure(self._without_key(reply))
            used = (reply.prompt_tokens, reply.completion_tokens)
            return ChatReply(self._without_key(reply.text), *used, reply.finish_reason)
        except asyncio.TimeoutError:
            used = estimate  # the server may well have done the work, and charge for it
            return _Failure(f"no reply within {self.config.timeout_seconds:g} s")
        except httpx2.TransportError as error:
            return _Failure(self._without_key(f"{type(error).__name__}: {error}"[:_SHOWN]))
        finally:
            self.budget.settle(estimate, used)

    def _failure(self, response: httpx2.Response) -> _Failure:
        """Why a response is no reply, where trying again makes sense; raises where it does not."""
        config, status = self.config, response.status_code
        said = self._without_key(f"{status} {_message_in(response)}".strip()[:_SHOWN])
        if status in _FATAL:
            what = f"the key in ${config.api_key_env}" if self._key else "a request without a key (see api_key_env)"
            raise UserError(f"{config.base_url} {_FATAL[status]} {what}: {said}")
        if status == 404 or status in range(300, 400):
            raise UserError(f"{config.base_url} has no chat completions for the model '{config.model}': {said}")
        if status == 429 and "insufficient_quota" in response.text:
            raise UserError(f"the quota at {config.base_url} is used up: {said}")
        if status in (408, 409, 425, 429) or status >= 500:
            return _Failure(said, self._pause(_retry_after(response.headers)))
        raise RequestRefusedError(said)

    def _pause(self, seconds: float | None) -> bool:
        """Hold every request back for the time that the server asked for; tells whether it did."""
        if seconds is None:
            return False
        if seconds > _LONGEST_PAUSE:
            raise UserError(f"{self.config.base_url} asks to come back in {seconds:.0f} s; run the same command then")
        self._not_before = max(self._not_before, time.monotonic() + seconds)
        return True

    async def _back_off(self, failures: int) -> None:
        """Wait between half and all of a time that doubles with every failure; after a pause, any part of the first."""
        longest = min(_LONGEST_BACKOFF, self.config.backoff_seconds * 2 ** max(0, failures - 1))
        until = time.monotonic() + longest * self._chance.uniform(0.5 if failures else 0.0, 1.0)
        while (left := until - time.monotonic()) > 0:
            self._refuse_to_go_on()
            await asyncio.sleep(min(left, _NAP))

    async def _turn(self) -> None:
        """Wait for the server's pause to end and for the next slot of the rate limit."""
        while True:
            self._refuse_to_go_on()
            now = time.monotonic()
            start = max(self._not_before, self._next_slot)
            if now >= start:
                if self.config.requests_per_minute is not None:
                    self._next_slot = now + 60 / self.config.requests_per_minute
                return
            await asyncio.sleep(min(start - now, _NAP))

    def _refuse_to_go_on(self) -> None:
        if self._given_up or self.should_stop():
            raise AskingStopped

    def _without_key(self, text: str) -> str:
        """A text from the server: some repeat the key that they were sent."""
        return text if self._key is None else text.replace(self._key, "[key]")


def _key_from_environment(variable: str | None) -> str | None:
    key = os.environ.get(variable, "").strip() if variable else ""
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the environment variable {variable} holds characters that no key has; set it again")
    return key or None


def _reply_in(response: httpx2.Response, estimate: tuple[int, int]) -> ChatReply | str:
    """The reply in a chat completion, or what is wrong with it."""
    try:
        data = response.json()
        choice = data["choices"][0]
        text = choice["message"]["content"] or ""
    except (ValueError, LookupError, TypeError):
        return f"no chat completion but: {response.text.strip()[:_SHOWN]}"
    if not isinstance(text, str):
        return f"a reply that is no text but a {type(text).__name__}"
    counted = data.get("usage") or {}
    prompt, completion = counted.get("prompt_tokens"), counted.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int):
        prompt, completion = estimate[0], len(text) // _CHARACTERS_PER_TOKEN + 1
    return ChatReply(text, prompt, completion, str(choice.get("finish_reason") or "stop"))


def _message_in(response: httpx2.Response) -> str:
    """What a server says in an error, in whichever of the usual forms."""
    try:
        data = response.json()
    except ValueError:
        return response.text.strip()
    error = data.get("error", data) if isinstance(data, dict) else data
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return " ".join(str(error).split())


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: `retry-after-ms`, or Retry-After as seconds or as a date."""
    milliseconds, value = headers.get("retry-after-ms", ""), headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(milliseconds) / 1000) if milliseconds else max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
