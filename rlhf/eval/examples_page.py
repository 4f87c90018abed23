"""Answers side by side as HTML, with what it takes to search and filter them; all text from data is escaped here.

The script of `report_template.html` works on what is written here: an `.example` for each prompt with a `data-family`,
in it an `.answer` for each policy with a `data-policy`, and an `.outcome` for each policy but the reference, with
`data-policy` and `data-outcome`. Without a script everything is shown, and the controls are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from rlhf.eval.examples import OUTCOMES, Example
from rlhf.eval.report_data import Report
from rlhf.eval.samples import Sample
from rlhf.eval.wording import outcome_words

_LABELS = {"win": "better", "tie": "alike", "loss": "worse", "not judged": "not judged"}


def examples_of(report: Report) -> str:
    """The section's body; "" without examples."""
    if not report.examples:
        return ""
    reference = escape(report.reference or "")
    intro = (
        f"<p>{len(report.examples)} prompts drawn by seed {report.seed}, in turn from each family; "
        f"{escape(report.main_view.title.lower())}.</p>"
    )
    shown = "".join(_example(report, example) for example in report.examples)
    none = '<p id="no-match" hidden>No example has all of this. Search for less, or press Clear.</p>'
    return (
        f'{intro}{_controls(report)}<div id="example-list" data-reference="{reference}" '
        f'data-candidate="{escape(report.candidate or "")}">{shown}</div>{none}'
    )


def _controls(report: Report) -> str:
    families = sorted({example.family for example in report.examples})
    controls = (
        '<label for="search">Search prompts and answers</label>'
        '<input type="search" id="search" autocomplete="off" spellcheck="false">'
    )
    controls = f"<div>{controls}</div>" + _select("family", "Category", [(name, name) for name in families])
    if len(report.models) > 1:
        controls += _select("policy", "Policy", [(name, name) for name in report.models])
    met = {outcome for example in report.examples for outcome in example.outcomes.values()}
    if met:
        label = f"Who won, against {report.reference}"
        controls += _select("outcome", label, [(name, _LABELS[name]) for name in OUTCOMES if name in met])
    return (
        f'<form class="controls" id="controls" role="search" aria-label="Examples" hidden>{controls}'
        '<button type="reset" id="clear">Clear</button><output class="count" id="count" role="status"></output></form>'
    )


def _select(name: str, label: str, options: Iterable[tuple[str, str]]) -> str:
    listed = "".join(f'<option value="{escape(value)}">{escape(shown)}</option>' for value, shown in options)
    return (
        f'<div><label for="{name}">{escape(label)}</label>'
        f'<select id="{name}"><option value="">all</option>{listed}</select></div>'
    )


def _example(report: Report, example: Example) -> str:
    kind = f", {escape(example.kind)}" if example.kind else ""
    outcomes = "".join(_outcome(report, name, outcome) for name, outcome in example.outcomes.items())
    answers = "".join(_answer(name, example.answers[name]) for name in report.models if name in example.answers)
    return (
        f'<article class="example" data-family="{escape(example.family)}"><h3><b>{escape(example.family)}</b>{kind}'
        f'{outcomes}</h3><p class="text prompt">{escape(example.prompt.strip())}</p>'
        f'<div class="answers">{answers}</div></article>'
    )


def _outcome(report: Report, name: str, outcome: str) -> str:
    words = outcome_words(report, name, outcome)
    hidden = "" if name == report.candidate else " hidden"
    kind, of = outcome.split()[0], escape(name)
    return (
        f'<b class="outcome {kind}" data-policy="{of}" data-outcome="{escape(outcome)}"{hidden}>'
        f" \u00b7 {escape(words)}</b>"
    )


def _answer(name: str, sample: Sample) -> str:
    facts = [f"gold {sample.gold:.2f}"] if sample.gold is not None else []
    facts += [f"reward {sample.reward:.2f}"] if sample.reward is not None else []
    facts.append(f"{sample.num_tokens} tokens")
    facts += ["refuses"] if sample.refused else []
    facts += [] if sample.finished else ["cut off"]
    parts = ", ".join(f"{part.replace('_', ' ')} {value:.2f}" for part, value in sample.gold_parts.items())
    below = f'<p class="parts">{escape(parts)}</p>' if parts else ""
    response = escape(sample.response.strip()) or '<span class="muted">(empty)</span>'
    said = escape(" \u00b7 ".join(facts))
    return (
        f'<div class="answer" data-policy="{escape(name)}"><h4>{escape(name)}<span>{said}</span></h4>'
        f'<p class="text">{response}</p>{below}</div>'
    )
