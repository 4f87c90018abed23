"""Taking dialogues apart: HH transcripts, lists of messages, and where a prompt ends and an answer begins."""

from __future__ import annotations

import re
from typing import Any

from rlhf.data.fields import MalformedRowError, UnusableRowError, messages_of
from rlhf.data.rows import Message, Prompt

ASSISTANT = "\n\nAssistant:"


def split_hh_text(text: str) -> tuple[str, str]:
    """Split an HH dialogue at the last "Assistant:": (prompt ending with that mark, answer without outer space)."""
    head, mark, answer = text.rpartition(ASSISTANT)
    if not mark:
        raise MalformedRowError("the dialogue has no 'Assistant:' turn to split at")
    return head + mark, answer.strip()


def is_hh_prompt(prompt: Prompt) -> bool:
    """Say whether a raw prompt is an HH transcript that waits for the assistant."""
    return isinstance(prompt, str) and prompt.lstrip().startswith("Human:") and prompt.rstrip().endswith(ASSISTANT)


def parse_hh_dialogue(text: str) -> list[Message]:
    """Return an HH transcript as messages; a last "Assistant:" with nothing behind it is a turn still to come.

    Two turns of one speaker in a row (people do write twice) become one message: chat templates want alternation.
    """
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text.strip().removesuffix(ASSISTANT))
    if parts[0].strip() or len(parts) < 3:
        raise MalformedRowError("the dialogue does not begin with 'Human:' or 'Assistant:'")
    messages: list[Message] = []
    for speaker, said in zip(parts[1::2], parts[2::2], strict=True):
        role, content = ("user" if speaker == "Human" else "assistant"), said.strip()
        if messages and messages[-1]["role"] == role:
            both = (messages[-1]["content"], content)
            messages[-1] = {"role": role, "content": "\n\n".join(turn for turn in both if turn)}
        else:
            messages.append({"role": role, "content": content})
    return messages


def common_prefix_split(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return (prompt, chosen answer, rejected answer) of two texts that hold their prompt.

    HH transcripts are split at the last "Assistant:" and must agree before it (else UnusableRowError). Other texts are
    split where they begin to differ, before the white space in front of that word.
    """
    if ASSISTANT in chosen and ASSISTANT in rejected:
        (prompt, better), (other, worse) = split_hh_text(chosen), split_hh_text(rejected)
        if prompt != other:
            raise UnusableRowError("prompts_differ")
        return prompt, better, worse
    if chosen == rejected:
        raise UnusableRowError("identical_pair")
    end = next(
        (place for place, (one, two) in enumerate(zip(chosen, rejected, strict=False)) if one != two),
        min(len(chosen), len(rejected)),
    )
    while end > 0 and not chosen[end - 1].isspace():  # back to the start of the word
        end -= 1
    end = len(chosen[:end].rstrip())
    return chosen[:end], chosen[end:], rejected[end:]


def answer_and_prefix(value: Any, prompt: Prompt, name: str) -> tuple[str, list[Message]]:
    """Return (answer, conversation before it) of an answer given as messages.

    The messages may be the answer alone, or the whole conversation that begins with the prompt; a text prompt in front
    of messages is the first user turn.
    """
    messages = messages_of(value, name)
    if messages[-1]["role"] != "assistant":
        raise MalformedRowError(f"{name} does not end with an assistant turn")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    rest = messages[:-1]
    if rest[: len(before)] == before:
        return messages[-1]["content"], rest
    spoken = [turn for turn in rest if turn["role"] != "system"]
    if spoken[: len(before)] == before:  # the conversation adds a system turn the prompt column leaves out
        return messages[-1]["content"], rest
    if isinstance(prompt, str) and any(turn["role"] == "user" for turn in rest):
        return messages[-1]["content"], rest  # the prompt column repeats another turn; the conversation is complete
    return messages[-1]["content"], [*before, *rest]
