"""Checks of rows as they become tokens: BOS on every path (T6), answers under the mask (T8), the length limit (T10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from rlhf.data.rows import Prompt
from rlhf.data.token_dataset import FilterReport
from rlhf.eval.doctor.finding import Check, Finding, counted
from rlhf.eval.doctor.token_checks import PROBE, Encode, answered_text, trained_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS = Check("T6", "at most one beginning-of-sequence", "the model reads an opening that it has never seen")
TRAINED = Check("T8", "answers are trained", "training runs on nothing, and the loss falls all the same")
LENGTH = Check("T10", "over-long rows are counted", "answers lose their end, or pairs go missing without a word")

# Rows lost to the length limit up to this share are worth a number, not a warning.
_LOST_SHARE = 0.01


def template_shows_answers(tokenizer: PreTrainedTokenizerBase) -> Finding:
    """T8, before anything is encoded: the template writes down what the assistant says."""
    if not tokenizer.chat_template:
        return TRAINED.green("no chat template: prompts are raw text and the answer behind them is trained")
    try:
        text = answered_text(tokenizer)
    except TemplateError as error:
        return TRAINED.red(f"the chat template refuses a plain question and answer: {error}", "mend the chat template")
    if PROBE not in text:
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
        trained = [token for token in trained_ids(encode(prompt, answer)) if token not in stops]
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
        # Prompts alone are never cut, and where prompts are cut already it was the answers that are too long.
        cut = "" if {"prompt_too_long", "prompt_shortened"} & set(reasons) else " or set data.overlong=truncate_prompt,"
        return LENGTH.yellow(f"{seen}; {fits}", f"raise {key},{cut} or live with it")
    return LENGTH.green(f"{seen}; {fits}")


def no_row_is_left(error: str, lengths: Sequence[int], limit: int, key: str) -> Finding:
    """T10 where the length filter took every row."""
    return LENGTH.red(
        f"{error}; {key}={limit}, but the shortest row has {min(lengths, default=0)} tokens and 95 % are within "
        f"{_quantile(lengths, 0.95)}",
        f"raise {key}",
    )


def _num_bos(row: Sequence[int], bos_id: int, *, at_start: bool) -> int:
    if not at_start:
        return list(row).count(bos_id)
    return next((place for place, token in enumerate(row) if token != bos_id), len(row))


def _readable(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _letters(text: str) -> str:
    return "".join(text.split())


def _quantile(lengths: Sequence[int], share: float) -> int:
    ordered = sorted(lengths)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0
