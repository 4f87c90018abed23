"""Checks of token ids and masks, on rows of the user's own data: what is trained, where answers end, what is cut.

Whatever makes the tokens is handed in (`encode`, `collate`, examples), so that a check sees what the recipe would see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from rlhf.data.chat import TokenExample
from rlhf.data.collate import Batch
from rlhf.data.rows import Prompt
from rlhf.data.token_dataset import FilterReport
from rlhf.eval.doctor.finding import Check, Finding, counted
from rlhf.rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[Prompt, str], TokenExample]

PADDING = Check("T2", "masks keep the real end when EOS pads", "the end of an answer is never learnt or scored")
STOP = Check("T3", "answers end where generation stops", "the model never learns to stop, and every sample is cut off")
PROMPT_END = Check("T4", "EOS inside a prompt changes no mask", "the answer behind it is not trained or scored")
BOS = Check("T6", "at most one beginning-of-sequence", "the model reads an opening that it has never seen")
TRAINED = Check("T8", "answers are trained", "training runs on nothing, and the loss falls all the same")
LENGTH = Check("T10", "over-long rows are counted", "answers lose their end, or pairs go missing without a word")

_PROBE = "answerprobe"
# Rows lost to the length limit up to this share are worth a number, not a warning.
_LOST_SHARE = 0.01
# A token that was never a target is far less likely than one in the vocabulary's size.
_NEVER_LEARNT = 0.1


def template_shows_answers(tokenizer: PreTrainedTokenizerBase) -> Finding:
    """T8, before anything is encoded: the template writes down what the assistant says."""
    if not tokenizer.chat_template:
        return TRAINED.green("no chat template: prompts are raw text and the answer behind them is trained")
    try:
        text = _answered(tokenizer)
    except TemplateError as error:
        return TRAINED.red(f"the chat template refuses a plain question and answer: {error}", "mend the chat template")
    if _PROBE not in text:
        return TRAINED.red(
            "the chat template leaves out what the assistant says, so its mask is empty",
            "let the template write message['content'] for the role 'assistant'",
        )
    return TRAINED.green("the chat template writes the assistant's turn")


def answers_are_trained(
    encode: Encode, pairs: Sequence[tuple[Prompt, str]], tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> Finding:
    """T8: what the loss mask covers holds the answer's text, and more than a stop token."""
    stops, empty, changed = set(stop_ids), 0, 0
    for prompt, answer in pairs:
        trained = [token for token in _trained(encode(prompt, answer)) if token not in stops]
        if not trained and _letters(answer):
            empty += 1
        # Through the tokenizer, because some of them lose case or letters on the way in.
        elif _letters(_readable(tokenizer, tokenizer(answer)["input_ids"])) not in _letters(
            _readable(tokenizer, trained)
        ):
            changed += 1
    if empty:
        return TRAINED.red(
            f"{counted(empty, len(pairs), 'answers')} have no trained token but the stop token",
            "let the chat template write the assistant's turn behind the prompt it opened",
        )
    if changed:
        return TRAINED.yellow(
            f"{counted(changed, len(pairs), 'answers')} are trained with another text than the data has",
            "see with `apply_chat_template` what the template does to an answer",
        )
    return TRAINED.green(f"the loss mask covers {len(pairs)} of {len(pairs)} answers word for word")


def answers_end_at_a_stop(
    examples: Sequence[TokenExample], stop_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, chat: bool
) -> Finding:
    """T3: the last trained token is one at which generation stops, and none stands earlier in the answer.

    `chat`: the examples came through the chat template, which should then write an end of turn itself.
    """
    stops, names = set(stop_ids), " or ".join(f"'{name}'" for name in tokenizer.convert_ids_to_tokens(list(stop_ids)))
    runs = [_runs(example) for example in examples]
    open_ended = sum(not run or run[-1][-1] not in stops for run in runs)
    if open_ended:
        return STOP.red(
            f"{counted(open_ended, len(examples), 'answers')} do not end in {names}",
            "let the loss mask cover the stop token behind every answer",
        )
    if chat and not _template_ends_turns(tokenizer, stops):
        return STOP.yellow(
            f"the chat template writes no stop token behind an answer; {names} is added here, but by no other program",
            "let the template end the assistant's turn with eos_token or an end-of-turn token",
        )
    early = sum(any(token in stops for part in run for token in part[:-1]) for run in runs)
    if early:
        return STOP.yellow(
            f"{counted(early, len(examples), 'answers')} hold {names} before their end, where generation would stop",
            "remove special tokens from the text of the answers",
        )
    return STOP.green(f"{len(examples)} of {len(examples)} answers end in {names}")


def samples_end_at_a_stop(
    trajectory: Trajectory, stop_ids: Sequence[int], stop_probability: float, vocab_size: int
) -> Finding:
    """T3 for rollouts: an answer is finished exactly where a stop token stands, which is its last.

    Yellow where none ended and `stop_probability`, that of a stop token next, says that the policy never learnt to.
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
        kept = trained == _trained(row) and trained[-1:] and trained[-1] in stop_ids
        lost += not kept or attended not in (None, len(row.input_ids))
    same = bool((with_eos.loss_mask_BT == with_other.loss_mask_BT).all())
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
        _trained(encode(prompt, answer)) != _trained(encode(_with_text(prompt, eos), answer))
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


def one_bos_at_most(
    paths: Mapping[str, Sequence[Sequence[int]]],
    retokenised: Sequence[Sequence[int]],
    bos_id: int | None,
    stop_ids: Sequence[int],
) -> Finding:
    """T6: every path puts at most one BOS in front; `retokenised` is what other programs make of the rendered prompts.

    Where BOS ends answers too (GPT-2), only those at the start of a row are counted.
    """
    if bos_id is None:
        return BOS.green("the tokenizer has no beginning-of-sequence token")
    for name, rows in paths.items():
        doubled = sum(_num_bos(row, bos_id, at_start=bos_id in stop_ids) > 1 for row in rows)
        if doubled:
            return BOS.red(
                f"{counted(doubled, len(rows), 'rows')} of the path '{name}' have it more than once",
                "let either the chat template or the tokenizer write it, and take it out of the data",
            )
    doubled = sum(_num_bos(row, bos_id, at_start=True) > 1 for row in retokenised)
    if doubled:
        return BOS.yellow(
            "template and tokenizer together write it twice; one is taken out here, but a program that tokenises the "
            "rendered text keeps both",
            "take it out of the template, or serve with add_special_tokens=False",
        )
    return BOS.green(f"at most one in {sum(map(len, paths.values()))} rows of {len(paths)} paths ({', '.join(paths)})")


def long_rows_are_counted(
    lengths: Sequence[int], report: FilterReport, limit: int, longest_kept: int, context: int | None, key: str
) -> Finding:
    """T10: rows over the limit are all in the report, and what is kept fits into the model.

    `lengths` are those of the same rows without a limit; `longest_kept` is that of a kept row with all that will be
    generated behind it; `key` is the setting that holds the limit.
    """
    over = sum(length > limit for length in lengths)
    reasons = report.dropped | report.notes
    told = sum(reasons.get(name, 0) for name in ("too_long", "prompt_too_long", "prompt_shortened", "cut_into_pieces"))
    lost = sum(report.dropped.get(name, 0) for name in ("too_long", "prompt_too_long"))
    seen = f"{counted(over, len(lengths), 'rows')} are longer than {key}={limit} ({report})"
    fits = f"longest row {max(lengths, default=0)} tokens, 95 % within {_quantile(lengths, 0.95)}"
    if told < over:
        return LENGTH.red(f"{seen}: only {told} of them are accounted for", "report it as a bug")
    if context is not None and longest_kept > context:
        return LENGTH.red(
            f"kept rows reach {longest_kept} tokens, but the model has {context} positions",
            f"lower {key} so that rows, with what is generated, stay within {context} tokens",
        )
    if lost > _LOST_SHARE * len(lengths):
        return LENGTH.yellow(f"{seen}; {fits}", f"raise {key}, or set data.overlong=truncate_prompt, or live with it")
    return LENGTH.green(f"{seen}; {fits}")


def no_row_is_left(error: str, lengths: Sequence[int], limit: int, key: str) -> Finding:
    """T10 where the length filter took every row."""
    return LENGTH.red(
        f"{error}; {key}={limit}, but the shortest row has {min(lengths, default=0)} tokens and 95 % are within "
        f"{_quantile(lengths, 0.95)}",
        f"raise {key}",
    )


def _trained(example: TokenExample) -> list[int]:
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


def _answered(tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))


def _template_ends_turns(tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> bool:
    behind = _answered(tokenizer).rpartition(_PROBE)[2]
    return any(token in stops for token in tokenizer(behind, add_special_tokens=False)["input_ids"])


def _num_bos(row: Sequence[int], bos_id: int, *, at_start: bool) -> int:
    if not at_start:
        return list(row).count(bos_id)
    return next((place for place, token in enumerate(row) if token != bos_id), len(row))


def _with_text(prompt: Prompt, text: str) -> Prompt:
    """The prompt with the text put before the last thing that was said."""
    if isinstance(prompt, str):
        return f"{text} {prompt}"
    return [*prompt[:-1], {**prompt[-1], "content": f"{text} {prompt[-1]['content']}"}]


def _readable(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _letters(text: str) -> str:
    return "".join(text.split())


def _quantile(lengths: Sequence[int], share: float) -> int:
    ordered = sorted(lengths)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0
