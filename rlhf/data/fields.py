"""Single cells of a raw row, checked: the right type is returned, the wrong one told by column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.data.rows import Message, Prompt

Fields = Mapping[str, Any]

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
_FLAGS = {"true": True, "1": True, "+": True, "false": False, "0": False, "-": False, "-1": False}


class MalformedRowError(ValueError):
    """A row that does not hold what its format promises; it is set aside and counts against the limit."""


class UnusableRowError(ValueError):
    """A well-formed row that cannot be used; counted under `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def text_of(fields: Fields, name: str) -> str:
    """Return a column that must hold text."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise MalformedRowError(f"{name} is {shown(value)}, expected text")
    return value


def prompt_of(value: Any, name: str) -> Prompt:
    """Return a prompt: text as it is, or a list of messages."""
    return value if isinstance(value, str) else messages_of(value, name)


def flag_of(value: Any, name: str) -> bool:
    """Return a yes or no however it is spelt: true, 1, "+", ... against false, 0, -1, "-"."""
    text = str(value).strip().lower().removesuffix(".0")  # a float where a table mixed it with empty cells
    if text not in _FLAGS:
        raise MalformedRowError(f"{name} is {shown(value)}, expected true or false")
    return _FLAGS[text]


def messages_of(value: Any, name: str) -> list[Message]:
    """Return a list of messages made of role/content or from/value objects."""
    if not isinstance(value, list) or not value:
        raise MalformedRowError(f"{name} is not a list of messages")
    return [_message(turn, f"{name}[{index}]") for index, turn in enumerate(value)]


def _message(turn: Any, name: str) -> Message:
    if not isinstance(turn, Mapping):
        raise MalformedRowError(f"{name} is not a message with a role and content")
    speaker, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(content, str):
        raise MalformedRowError(f"{name} has no text under 'content' or 'value'")
    role = _ROLES.get(str(speaker))
    if role is None:
        raise MalformedRowError(f"{name} has the role {speaker!r}; known are {', '.join(_ROLES)}")
    return {"role": role, "content": content}


def shown(value: Any) -> str:
    """Return a wrong value as an error message shows it."""
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
