"""Checks of ends and masks, on rows of the user's own data and on samples: T2, T3 and T4.

Whatever makes the tokens is handed in (`encode`, `collate`, examples), so that a check sees what the recipe would see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from rlhf.data.chat import TokenExample
from rlhf.data.collate import Batch
from rlhf.data.rows import Prompt
from rlhf.eval.doctor.finding import Check, Finding, counted
from rlhf.rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[Prompt, str], TokenExample]

PADDING = Check("T2", "masks keep the real end when EOS pads", "the end of an answer is never learnt or scored")
STOP = Check("T3", "answers end where generation stops", "the model never learns to stop, and every sample is cut off")
PROMPT_END = Check("T4", "EOS inside a prompt changes no mask", "the answer behind it is not trained or scored")

PROBE = "answerprobe"  # an answer that no template writes by itself
# A token that was never a target is far less likely than one in the vocabulary's size.
_NEVER_LEARNT = 0.1


def answers_end_at_a_stop(
    examples: Sequence[TokenExample], stop_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, chat: bool
) -> Finding:
    """T3: the last trained token is one at which generation stops, and none stands earlier in the answer.

    `chat`: the examples came through the chat template, which should then write an end of turn itself.
    """
    stops, names = set(stop_ids), _names(tokenizer, stop_ids)
    runs = [_runs(example) for example in examples]
    open_ended = sum(not run or run[-1][-1] not in stops for run in runs)
    if open_ended:
        return STOP.red(
            f"{counted(open_ended, len(examples), 'answers')} do not end in {names}",
            "let the loss mask cover the stop token behind every answer",
        )
    if chat and not _template_ends_turns(tokenizer, stops):
        return _endless_template(tokenizer, stop_ids)
    early = sum(any(token in stops for part in run for token in part[:-1]) for run in runs)
    if early:
        return STOP.yellow(
            f"{counted(early, len(examples), 'answers')} hold {names} before their end, where generation would stop",
            "remove special tokens from the text of the answers",
        )
    return STOP.green(f"{len(examples)} of {len(examples)} answers end in {names}")


def samples_end_at_a_stop(
    trajectory: Trajectory,
    stop_ids: Sequence[int],
    stop_probability: float,
    vocab_size: int,
    template: PreTrainedTokenizerBase | None = None,
) -> Finding:
    """T3 for rollouts: an answer is finished exactly where a stop token stands, which is its last.

    Yellow where none ended and `stop_probability`, that of a stop token next, says that the policy never learnt to, and
    where the chat template of the tokenizer `template` (None: prompts are raw text) writes no end.
    """
    stops, wrong = set(stop_ids), 0
    for response, finished in zip(trajectory.responses(), trajectory.finished_B.tolist(), strict=True):
        early = any(token in stops for token in response[:-1])
        wrong += early or (response[-1] in stops and not finished)
    seen = f"{int(trajectory.finished_B.sum())} of {len(trajectory)} samples ended by themselves"
    if wrong:
        return STOP.red(f"{counted(wrong, len(trajectory), 'samples')} go on behind a stop token", "report it as a bug")
    if not trajectory.finished_B.any() and stop_probability < _NEVER_LEARNT / vocab_size:
        return STOP.yellow(
            f"{seen}, and the policy gives a stop token a probability of {stop_probability:.0e}",
            "start from an SFT policy that has learnt to stop",
        )
    if template is not None and not _template_ends_turns(template, stops):
        return _endless_template(template, stop_ids)
    return STOP.green(seen)


def masks_survive_padding(
    rows: Sequence[TokenExample], collate: Callable[[int], Batch], stop_ids: Sequence[int], pad_token_id: int
) -> Finding:
    """T2: with EOS as the pad token each row keeps its real tokens and its trained end, as with another pad token.

    `rows` are finished answers; `collate(pad)` makes the batch that holds just these, padded with that token.
    """
    eos = stop_ids[-1]
    other = next(token for token in (pad_token_id, *range(len(stop_ids) + 1)) if token not in stop_ids)
    with_eos, with_other = collate(eos), collate(other)
    lost = 0
    for place, row in enumerate(rows):
        trained = with_eos.input_ids_BT[place][with_eos.loss_mask_BT[place]].tolist()
        attended = None if with_eos.attention_mask_BT is None else int(with_eos.attention_mask_BT[place].sum())
        kept = trained == trained_ids(row) and trained[-1:] and trained[-1] in stop_ids
        lost += not kept or attended not in (None, len(row.input_ids))
    same = torch.equal(with_eos.loss_mask_BT, with_other.loss_mask_BT)
    role = "EOS is the pad token" if pad_token_id == eos else "the pad token is not EOS; padded with EOS for the test"
    if lost or not same:
        return PADDING.red(
            f"{role}: {counted(max(lost, 1), len(rows), 'rows')} lose or gain a token",
            "make masks from lengths, never from `ids != pad`",
        )
    return PADDING.green(f"{role}, and {len(rows)} of {len(rows)} rows keep every token and one end")


def end_in_prompt_changes_no_mask(encode: Encode, pairs: Sequence[tuple[Prompt, str]], eos: str) -> Finding:
    """T4 where answers are given: EOS put into the prompt leaves the trained tokens as they were."""
    changed = sum(
        trained_ids(encode(prompt, answer)) != trained_ids(encode(_with_text(prompt, eos), answer))
        for prompt, answer in pairs
    )
    if changed:
        return PROMPT_END.red(
            f"'{eos}' in the prompt changes what is trained in {counted(changed, len(pairs), 'answers')}",
            "let the mask begin where the prompt ends, not behind the first EOS",
        )
    return PROMPT_END.green(f"'{eos}' put into {len(pairs)} prompts leaves every answer's mask alone")


def end_in_prompt_changes_no_rollout(
    sample: Callable[[Sequence[Sequence[int]]], Trajectory], prompts: Sequence[Sequence[int]], stop_ids: Sequence[int]
) -> Finding:
    """T4 for rollouts: behind a prompt with EOS inside an answer is sampled and masked up to its own end."""
    planted = [[*prompt[:-1], stop_ids[-1], *prompt[-1:]] for prompt in prompts]
    trajectory = sample(planted)
    wrong = 0
    for place, prompt in enumerate(planted):
        row, mask = trajectory.response_ids_BR[place].tolist(), trajectory.response_mask_BR[place].tolist()
        ends = [at + 1 for at, token in enumerate(row) if token in stop_ids and mask[at]]
        length = ends[0] if ends else sum(mask)
        whole = length > 0 and mask == [at < length for at in range(len(mask))]
        wrong += not whole or trajectory.prompts()[place] != prompt
    if wrong:
        return PROMPT_END.red(
            f"with EOS in the prompt the mask of {counted(wrong, len(planted), 'samples')} is wrong",
            "end a response at the first stop token behind the prompt, not in it",
        )
    return PROMPT_END.green(f"EOS put into {len(planted)} prompts: each is answered, and masked up to its own end")


def trained_ids(example: TokenExample) -> list[int]:
    """Trained tokens; the first of a row has nothing before it and never counts."""
    pairs = list(zip(example.input_ids, example.loss_mask, strict=True))
    return [token for token, counts in pairs[1:] if counts]


def _runs(example: TokenExample) -> list[list[int]]:
    """Trained tokens, one list per unbroken stretch: the assistant's turns."""
    runs: list[list[int]] = []
    before = False
    for token, counts in zip(example.input_ids, example.loss_mask, strict=True):
        if counts:
            if not before:
                runs.append([])
            runs[-1].append(token)
        before = counts
    return runs


def answered_text(tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))


def _template_ends_turns(tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> bool:
    behind = answered_text(tokenizer).rpartition(PROBE)[2]
    return any(token in stops for token in tokenizer(behind, add_special_tokens=False)["input_ids"])


def _endless_template(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> Finding:
    return STOP.yellow(
        f"the chat template writes no stop token behind an answer; {_names(tokenizer, stop_ids)} is added here, but by "
        "no other program",
        "let the template end the assistant's turn with eos_token or an end-of-turn token",
    )


def _names(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return " or ".join(f"'{name}'" for name in tokenizer.convert_ids_to_tokens(list(ids)))


def _with_text(prompt: Prompt, text: str) -> Prompt:
    """The prompt with the text put before the last thing that was said."""
    if isinstance(prompt, str):
        return f"{text} {prompt}"
    return [*prompt[:-1], {**prompt[-1], "content": f"{text} {prompt[-1]['content']}"}]
