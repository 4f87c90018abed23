"""Replies that were paid for once: on disk as soon as they arrive, found again by what was asked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rlhf.infra.errors import UserError


@dataclass(frozen=True)
class ChatReply:
    """What a model replied; tokens as the server counted them. `finish_reason` is "length" for one that was cut off."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str = "stop"


_FIELDS = [field.name for field in fields(ChatReply)]


class ReplyCache:
    """One JSONL file of replies, one line each, synced before the next request of the same worker goes out.

    A line is whole or it is ignored, so a process that is killed loses at most what was on its way. Several processes
    may write to one file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._replies: dict[str, ChatReply] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"the reply cache '{path}' cannot be written: {error.strerror}") from None
        self._torn = self._read()

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> ChatReply | None:
        """The reply to what has this key, if it was ever given."""
        return self._replies.get(key)

    def put(self, key: str, reply: ChatReply) -> None:
        """Keep a reply; it is on the disk when this returns. Raises `UserError` when the disk takes no more."""
        line = json.dumps({"key": key} | asdict(reply), ensure_ascii=False) + "\n"
        try:
            # One write each, so that lines of two processes do not mix; what a killed one began stays a line.
            os.write(self._file, ("\n" + line if self._torn else line).encode())
            os.fsync(self._file)
        except OSError as error:
            raise UserError(f"the reply cache '{self.path}' cannot be written: {error.strerror}") from error
        self._torn = False
        self._replies[key] = reply

    def close(self) -> None:
        """Let go of the file; nothing can be put any more."""
        os.close(self._file)

    def _read(self) -> bool:
        """Take in what is there; tells whether the last line is torn."""
        content = self.path.read_bytes()
        for line in content.split(b"\n"):
            try:
                row = json.loads(line)
                key, reply = row["key"], ChatReply(**{name: row[name] for name in _FIELDS})
            except (ValueError, TypeError, KeyError):
                continue  # the last line of a process that was killed while writing it
            self._replies[key] = reply
        return bool(content) and not content.endswith(b"\n")


def content_key(asked: Mapping[str, Any]) -> str:
    """One text per request: equal content has an equal key, in whatever order its parts were named."""
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()
