"""From prompts and answers to token ids, and which of those tokens are trained.

Three rules hold on every path (SFT, reward model, DPO, rollouts, serving), because breaking them is silent:

- A prompt is tokenised once and an answer is tokenised by itself behind it, so the prompt ids of training are exactly
  the prompt ids of generation; text is never tokenised again across the boundary.
- The last trained token of an answer is the token at which generation stops: the end-of-turn token of the chat
  template (`<|im_end|>`, `<|eot_id|>`, ...), or EOS for raw text and for templates that write none.
- Beginning-of-sequence stands at most once at the start, whoever adds it, template or tokenizer.

A `str` prompt is raw text and is tokenised as it is. A list of messages goes through the tokenizer's chat template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2.exceptions import TemplateError

from rlhf.data.rows import Message, Prompt
from rlhf.infra.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["all", "last"]

# Names under which model families ship a token that no training text ever used, best first.
_RESERVED_NAMES = (
    r"<pad>|\[PAD\]|<\|pad\|>|<\|padding\|>",
    r"<\|finetune_right_pad_id\|>",
    r"<\|reserved_special_token_\d+\|>|<\|reserved_\d+\|>|<reserved_?\d+>",
    r"<unused_?\d+>|\[unused\d+\]|<\|unused_?\d+\|>",
)
_PROBE = "answerprobe"


@dataclass(frozen=True, slots=True)
class TokenExample:
    """One tokenised text: `loss_mask[t]` is True where token t is trained on (both lists have the same length)."""

    input_ids: list[int]
    loss_mask: list[bool]


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Give the tokenizer a pad token if it has none and return the sentences that say what was chosen.

    A reserved token that no text uses is preferred; otherwise EOS pads, which is safe here because every mask is made
    from lengths and never from `ids != pad`. Encoder tokenizers (BERT) end a text with [SEP], which becomes their EOS.
    Raises UserError when there is no EOS at all: nothing could end an answer.
    """
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' has no end-of-sequence token, so an answer could never end; "
            "set tokenizer.eos_token to one of its special tokens and save it again"
        )
    if tokenizer.pad_token_id is not None:
        return []
    reserved = _reserved_token(tokenizer)
    if reserved is not None:
        tokenizer.pad_token = reserved
        return [f"The tokenizer has no pad token: its reserved token '{reserved}' is used to pad."]
    tokenizer.pad_token = tokenizer.eos_token
    return [
        f"The tokenizer has no pad token: end-of-sequence '{tokenizer.eos_token}' is used to pad, "
        "with masks made from lengths so that real ends of answers stay trained."
    ]


def _reserved_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    template = _template_text(tokenizer)
    names = sorted(tokenizer.get_vocab(), key=lambda name: (len(name), name))
    for pattern in _RESERVED_NAMES:
        for name in names:
            if re.fullmatch(pattern, name) and name not in taken and name not in template:
                return name
    return None


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return "\n".join(str(text) for text in template.values())
    return template or ""


class ChatEncoder:
    """Encodes prompts, answers and whole conversations for one tokenizer.

    `system_prompt` is put in front of every prompt that does not bring its own. `stop_token_ids` are the ids at which
    generation ends an answer: the template's end-of-turn token first, then EOS (once when they are the same).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-sequence token; call prepare_tokenizer to see the remedy")
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self._eos_id = int(tokenizer.eos_token_id)
        self._bos_id: int | None = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        # Asked of the tokenizer rather than read from its settings: families spell the setting differently.
        self._adds_bos = self._bos_id is not None and tokenizer("a")["input_ids"][:1] == [self._bos_id]
        self._adds_space = self._tokenizer_adds_space()
        self._tail, self._end_text, self._end_id = "", None, self._eos_id
        if tokenizer.chat_template:
            self._tail, self._end_text, self._end_id = self._end_of_turn()
        self.stop_token_ids: list[int] = list(dict.fromkeys([self._end_id, self._eos_id]))

    # ------------------------------------------------------------------ one at a time

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids generation starts from; messages get the template's generation prompt behind them."""
        return self.prompt_ids_batch([prompt])[0]

    def response_ids(self, prompt: Prompt, response: str) -> list[int]:
        """Return the ids of `response` as an answer to `prompt`, ending with exactly one stop token.

        Behind a raw prompt that does not end in white space one space is put before the answer, because HH dialogues
        read "Assistant: text" while prompts end at the colon; an answer that brings its own white space keeps it.
        """
        return self.response_ids_batch([prompt], [response])[0]

    def conversation(self, messages: Sequence[Message], train_on: TrainOn = "all") -> TokenExample:
        """Tokenise a conversation and mark the assistant's turns ("all") or only the last one ("last") as trained.

        Turns are found by prefix difference: the text the template writes up to a turn against the text including it,
        so templates without generation marks work too; where a template writes no end-of-turn token, only the last turn
        gets EOS. Turns behind the last answer are left out. Raises UserError when no token would be trained.
        """
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise UserError("a conversation has no assistant turn, so it would be trained on nothing; remove the row")
        messages = list(messages[: turns[-1] + 1])
        if train_on == "last" or len(turns) == 1:
            prompt, response = messages[:-1], messages[-1]["content"]
            return join(self.prompt_ids(prompt), self.response_ids(prompt, response))
        return self._every_turn(self._with_system(messages))

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of whole texts (BOS if the tokenizer uses it, then the text, then EOS), for pretraining."""
        return [_ended(self._with_bos(ids, self._adds_bos), self._eos_id) for ids in self._encode(texts)]

    def shorten_prompt(self, prompt_ids: list[int], room: int) -> list[int]:
        """Return the last `room` ids of a prompt; beginning-of-sequence stays in front if it was there."""
        if len(prompt_ids) <= room:
            return prompt_ids
        if prompt_ids[0] == self._bos_id and room > 1:
            return [prompt_ids[0], *prompt_ids[len(prompt_ids) - room + 1 :]]
        return prompt_ids[len(prompt_ids) - room :]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens and outer white space."""
        return self.decode_batch([ids])[0]

    # ------------------------------------------------------------------ in batches (one tokenizer call each)

    def prompt_ids_batch(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return `prompt_ids` of every prompt."""
        return self._prompt_ids(prompts, self._starts(prompts))

    def response_ids_batch(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[list[int]]:
        """Return `response_ids` of every (prompt, response) pair."""
        return self._response_ids(prompts, self._starts(prompts), responses)

    def answered_ids_batch(
        self, prompts: Sequence[Prompt], *answers: Sequence[str]
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Return (prompt ids, ids of each list of answers): the same as the two above, prompts rendered only once."""
        starts = self._starts(prompts)
        return self._prompt_ids(prompts, starts), [self._response_ids(prompts, starts, one) for one in answers]

    def step_ids_batch(
        self, prompts: Sequence[Prompt], solutions: Sequence[Sequence[str]], separator: str
    ) -> list[list[list[int]]]:
        """Return, for every solution, the ids of each of its steps, each ending with the ids of the separator.

        Steps and separator are tokenised apart, so that the last token of a step is the same whatever the step says.
        No stop token follows the last step: the step is over with its separator.
        """
        starts = self._starts(prompts)
        texts = [
            _spaced(start, step) if place == 0 else step
            for start, steps in zip(starts, solutions, strict=True)
            for place, step in enumerate(steps)
        ]
        ending = self._encode_continuation([separator])[0] if separator else []
        encoded = iter(self._encode_continuation(texts))
        return [[[*next(encoded), *ending] for _ in steps] for steps in solutions]

    def continuation_ids_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts that stand behind other text as they are: nothing is added at either end."""
        return self._encode_continuation(texts)

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Return `decode` of every row."""
        stops = set(self.stop_token_ids)  # an end-of-turn token need not be flagged as special
        kept = [[token for token in ids if token not in stops] for ids in batch]
        texts = self.tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    def render(self, prompt: Prompt) -> str:
        """Return the text `prompt_ids` tokenises, for people to look at."""
        return self._starts([prompt])[0]

    # ------------------------------------------------------------------ templates

    def _render(self, conversations: Sequence[Sequence[Message]], generation_prompt: bool) -> list[str]:
        if not conversations:
            return []
        if not self.tokenizer.chat_template:
            raise UserError(
                f"the rows hold messages but the tokenizer '{self.tokenizer.name_or_path}' has no chat template; "
                "use an instruction-tuned tokenizer, set tokenizer.chat_template, or give prompts as plain text"
            )
        try:
            texts: Any = self.tokenizer.apply_chat_template(
                [list(conversation) for conversation in conversations],
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except TemplateError as error:
            raise UserError(
                f"the chat template of '{self.tokenizer.name_or_path}' refused a conversation: {error}; "
                "change the roles or the system prompt to what the template accepts"
            ) from error
        return list(texts)

    def _end_of_turn(self) -> tuple[str, str | None, int]:
        """Return what the template writes behind an answer, and the first special token in it (text, id)."""
        text = self._render(
            [[{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]], generation_prompt=False
        )[0]
        if _PROBE not in text:
            raise UserError(
                f"the chat template of '{self.tokenizer.name_or_path}' does not write an assistant's answer as it is, "
                "so its tokens could not be found and nothing would be trained; set tokenizer.chat_template to one "
                "that writes message['content'] of every turn"
            )
        tail = text[text.rindex(_PROBE) + len(_PROBE) :]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        for token in self._encode([tail])[0]:
            if token in special:
                return tail, str(self.tokenizer.convert_ids_to_tokens(token)), token
        return tail, None, self._eos_id

    def _starts(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the text each prompt is tokenised from."""
        chats = iter(self._render([self._with_system(p) for p in prompts if not isinstance(p, str)], True))
        return [self._with_system_text(p) if isinstance(p, str) else next(chats) for p in prompts]

    def _prompt_ids(self, prompts: Sequence[Prompt], starts: Sequence[str]) -> list[list[int]]:
        # A template writes BOS itself where the model wants it, so it is added to raw text only.
        adds_bos = [self._adds_bos and isinstance(prompt, str) for prompt in prompts]
        return [self._with_bos(ids, add) for ids, add in zip(self._encode(starts), adds_bos, strict=True)]

    def _response_ids(
        self, prompts: Sequence[Prompt], starts: Sequence[str], responses: Sequence[str]
    ) -> list[list[int]]:
        responses = [self._without_stop(response) for response in responses]
        texts = [_spaced(start, response) for start, response in zip(starts, responses, strict=True)]
        chats = [index for index, prompt in enumerate(prompts) if not isinstance(prompt, str)]
        answered = [
            [*self._with_system(prompts[index]), {"role": "assistant", "content": responses[index]}] for index in chats
        ]
        for index, whole in zip(chats, self._render(answered, False), strict=True):
            # A generation prompt may open more than the finished turn shows ("<think>"): then the answer stands alone.
            follows = whole.startswith(starts[index])
            turn = whole[len(starts[index]) :] if follows else responses[index] + self._tail
            texts[index] = self._cut_at_end(turn)
        ends = [self._eos_id if isinstance(prompt, str) else self._end_id for prompt in prompts]
        return [_ended(ids, end) for ids, end in zip(self._encode_continuation(texts), ends, strict=True)]

    def _cut_at_end(self, turn: str) -> str:
        if self._end_text is None:
            return turn.removesuffix(self._tail)
        end = turn.rfind(self._end_text)
        return turn if end < 0 else turn[: end + len(self._end_text)]

    def _every_turn(self, messages: list[Message]) -> TokenExample:
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        whole, *ends = self._render([messages, *(messages[: i + 1] for i in turns)], generation_prompt=False)
        starts = self._render([messages[:i] for i in turns], generation_prompt=True)
        pieces: list[str] = []
        cursor = 0
        for index, start, end in zip(turns, starts, ends, strict=True):
            turn = self._turn_inside(whole, start, end, messages[index]["content"])
            pieces += [whole[cursor : len(start)], turn]
            cursor = len(start) + len(turn)
        encoded = [*self._encode(pieces[:1]), *self._encode_continuation(pieces[1:])]
        encoded[0] = self._with_bos(encoded[0], add=False)
        encoded[-1] = _ended(encoded[-1], self._end_id)
        input_ids = [token for piece in encoded for token in piece]
        loss_mask = [number % 2 == 1 for number, piece in enumerate(encoded) for _ in piece]
        return TokenExample(input_ids, loss_mask)

    def _turn_inside(self, whole: str, start: str, end: str, content: str) -> str:
        """Return the assistant turn that begins at `len(start)` of the whole conversation's text."""
        if whole.startswith(start) and whole.startswith(end):
            return self._cut_at_end(whole[len(start) : len(end)])
        # Reasoning templates write a turn differently once another follows; the plain answer must then stand there.
        plain = content.strip() + (self._end_text or "")
        if whole.startswith(start) and whole.startswith(plain, len(start)):
            return plain
        raise UserError(
            "the chat template rewrites earlier turns when later ones follow, so the tokens of every assistant turn "
            "cannot be told apart; train on the last turn only (train_on: last)"
        )

    def _with_system(self, prompt: Prompt) -> list[Message]:
        messages = list(prompt) if not isinstance(prompt, str) else [{"role": "user", "content": prompt}]
        if self.system_prompt and not (messages and messages[0]["role"] == "system"):
            return [{"role": "system", "content": self.system_prompt}, *messages]
        return messages

    def _with_system_text(self, prompt: str) -> str:
        if not self.system_prompt:
            return prompt
        return self.system_prompt + ("" if prompt[:1].isspace() else "\n\n") + prompt

    # ------------------------------------------------------------------ tokens

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: the length warning is wrong here, over-long rows are counted and handled by the datasets.
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def _encode_continuation(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts that stand behind other text: no space may be added in front of them."""
        if not self._adds_space:
            return self._encode(texts)
        anchor = self._encode(["\n"])[0]
        anchored, plain = self._encode(["\n" + text for text in texts]), self._encode(texts)
        pairs = zip(anchored, plain, strict=True)
        return [ids[len(anchor) :] if ids[: len(anchor)] == anchor else alone for ids, alone in pairs]

    def _tokenizer_adds_space(self) -> bool:
        """Say whether the tokenizer puts a space before a text's first word, as SentencePiece families do."""
        newline, behind, alone = self._encode(["\n", "\na", "a"])
        return behind[: len(newline)] == newline and behind[len(newline) :] != alone

    def _with_bos(self, ids: list[int], add: bool) -> list[int]:
        """Return the ids with one beginning-of-sequence in front when `add` says so, and never with two."""
        if self._bos_id is None:
            return ids
        ids = [self._bos_id, *ids] if add else ids
        while len(ids) > 1 and ids[0] == ids[1] == self._bos_id:
            ids = ids[1:]
        return ids

    def _without_stop(self, response: str) -> str:
        """Drop stop tokens spelt out at the end of an answer; published rows carry them now and then."""
        names = [str(name) for name in self.tokenizer.convert_ids_to_tokens(self.stop_token_ids)]
        while any(response.rstrip().endswith(name) for name in names):
            response = response.rstrip()
            for name in names:
                response = response.removesuffix(name)
        return response


def join(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> TokenExample:
    """Return prompt and answer as one example in which exactly the answer is trained."""
    return TokenExample([*prompt_ids, *response_ids], [False] * len(prompt_ids) + [True] * len(response_ids))


def _spaced(prompt: str, response: str) -> str:
    bare = not prompt or prompt[-1].isspace() or not response or response[0].isspace()
    return response if bare else " " + response


def _ended(ids: list[int], end_id: int) -> list[int]:
    return ids if ids and ids[-1] == end_id else [*ids, end_id]
