"""A reward model's report for readers: `RM_REPORT.md` with every table, `MODEL_CARD.md` with what its user must know.

Every sentence of the card is made of measured numbers; what was not measured is not claimed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.eval.markdown import plain, table_text
from rlhf.eval.plots import reward_charts
from rlhf.eval.reward_biases import PlantedBias, ScoredPair
from rlhf.eval.reward_report import RewardReport, percent, points, sentence, worries
from rlhf.eval.tables import Cell, Table, cell, reward_families_of, reward_model_of

REPORT_FILE, CARD_FILE, NUMBERS_FILE, PLOTS = "RM_REPORT.md", "MODEL_CARD.md", "rm_report.json", "plots"
_SHOWN = 400


def write_reward_report(folder: Path, report: RewardReport) -> list[Path]:
    """Write report, card, numbers and plots into the folder; returns the paths of the first three."""
    charts = reward_charts(report.accuracy, report.margins)
    (folder / PLOTS).mkdir(exist_ok=True)
    for chart in charts:
        (folder / PLOTS / f"{chart.name}.svg").write_text(chart.svg, encoding="utf-8")
    images = "\n".join(f"![{chart.title}]({PLOTS}/{chart.name}.svg)" for chart in charts)
    texts = {
        REPORT_FILE: render_report(report, images),
        CARD_FILE: render_card(report),
        NUMBERS_FILE: json.dumps(report.numbers(), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def render_report(report: RewardReport, images: str = "") -> str:
    """The whole report as Markdown."""
    found = worries(report)
    blocks = [
        f"# Reward model {plain(report.name)}",
        "## What to be wary of",
        _bullets(found) if found else "None of the questions asked of these numbers gave a reason for caution.",
        "## On held-out pairs",
        table_text(reward_model_of(report.accuracy), heading=False),
        table_text(reward_families_of(report.accuracy)) if len(report.accuracy.by_family) > 1 else "",
        images,
        "## Confidence",
        table_text(confidence_of(report), heading=False),
        "## What it pays for",
        table_text(planted_of(report)),
        table_text(planted_by_group(report)),
        table_text(features_of(report)),
        "## Obviously bad answers",
        table_text(bad_of(report), heading=False),
        "## Scores",
        table_text(distributions_table(report), heading=False),
        _padding(report),
        *_disagreements(report.disagreements),
        "## How it was measured",
        _listed(report.notes),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def render_card(report: RewardReport) -> str:
    """The model card as Markdown."""
    accuracy, fit = report.accuracy, report.temperature
    found = worries(report)
    by_family = [f"{plain(name)}: {percent(rate)} of {rate.num}" for name, rate in accuracy.by_family.items()]
    lines = [
        f"On {accuracy.num_pairs} held-out pairs it orders {percent(accuracy.accuracy)} as labelled "
        f"({points(accuracy.lead)} points above choosing by length).",
    ]
    if accuracy.against_gold is not None:
        lines.append(
            f"Against the true order it is right in {percent(accuracy.against_gold)}; the labels themselves are in "
            f"{percent(accuracy.labels_against_gold)}."
        )
    blocks = [
        f"# Model card: reward model {plain(report.name)}",
        "A scalar score of an answer to a prompt. Only differences of scores of answers to the same prompt mean "
        "anything: sigmoid(score a - score b) is the stated probability that a is preferred to b.",
        "## Model",
        _listed(report.model),
        "## Training",
        _listed(report.training) or "Its training run is not at hand.",
        "## Accuracy",
        *lines,
        _bullets(by_family) if len(by_family) > 1 else "",
        "## Confidence",
        _confidence_sentence(report) if fit is not None else "Too few pairs to say.",
        "## Measured biases",
        "Share of answers of which the edited form is preferred (an unbiased model: 50 %), and the mean shift of the "
        "score in standard deviations:",
        _bullets([_edit_sentence(edit) for edit in report.planted if edit.group == "all"]),
        "## Bad answers",
        _bullets([f"A good answer beats {bad.kind} in {percent(bad.good_wins)}." for bad in report.bad]),
        "## Limits",
        _bullets([*found, *_always(report)]),
        "## How it was measured",
        _listed(report.notes),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def confidence_of(report: RewardReport) -> Table:
    """Calibration before and after the fitted temperature, on pairs that had no part in the fit."""
    fit = report.temperature
    if fit is None:
        return Table("Confidence", ("", "As it is", "Divided by T"), ())
    rows = (
        ("Temperature T", (Cell("1"), Cell(f"{fit.temperature:.3f}"))),
        ("Calibration error (ECE)", (cell(fit.ece_before, 3), cell(fit.ece_after, 3))),
        ("ECE of an honest model by chance", (Cell(), cell(fit.chance_ece, 3))),
        ("Brier score", (cell(fit.brier_before, 4), cell(fit.brier_after, 4))),
        ("Log-loss", (cell(fit.log_loss_before, 4), cell(fit.log_loss_after, 4))),
        ("Log-loss, change", (Cell(), cell(fit.log_loss_change, 4, sign=True))),
        ("Pairs", (cell(float(fit.num_held_out), 0), cell(float(fit.num_held_out), 0))),
    )
    caption = f"T was fitted on {fit.num_fitted} other pairs; no prompt stands on both sides."
    return Table("Confidence", ("", "As it is", "Divided by T"), rows, caption, one_line=True)


def planted_of(report: RewardReport) -> Table:
    """The same answer with one edit."""
    rows = tuple(
        (edit.edit, (cell(edit.preferred, 1, 100), cell(edit.shift, 2, sign=True), Cell(str(edit.num))))
        for edit in report.planted
        if edit.group == "all"
    )
    caption = "The labelled-better answer against the same with one edit; an unbiased model has 50 % and a shift of 0."
    return Table(
        "Planted pairs", ("", "Edited preferred, %", "Shift, std of scores", "Answers"), rows, caption, one_line=True
    )


def planted_by_group(report: RewardReport) -> Table:
    """How often the edited form is preferred, by family or subset."""
    groups = [group for group in dict.fromkeys(edit.group for edit in report.planted) if group != "all"]
    found = {(edit.edit, edit.group): edit for edit in report.planted}
    rows = []
    for name in dict.fromkeys(edit.edit for edit in report.planted) if groups else []:
        edits = [found.get((name, group)) for group in groups]
        rows.append((name, tuple(cell(edit.preferred if edit else None, 1, 100) for edit in edits)))
    return Table("Edited preferred by group, %", ("", *groups), tuple(rows))


def features_of(report: RewardReport) -> Table:
    """Features of answers as they come, in the model's preferences and in the labels."""
    rows = tuple(
        (
            found.feature,
            (
                cell(found.spearman, 2, sign=True),
                cell(found.model, 1, 100),
                cell(found.labels, 1, 100),
                cell(found.excess, 1, 100, sign=True),
                Cell(str(found.num)),
            ),
        )
        for found in report.features
    )
    columns = ("", "Rank correlation", "Model prefers more, %", "Labels prefer more, %", "Excess, points", "Pairs")
    caption = "Of the pairs whose answers differ in the feature. Excess: model minus labels, paired bootstrap."
    return Table("Features of the labelled answers", columns, rows, caption, one_line=True)


def bad_of(report: RewardReport) -> Table:
    """Good answers against bad ones in their place."""
    rows = tuple(
        (bad.kind, (cell(bad.good_wins, 1, 100), cell(bad.gap, 2, sign=True), Cell(str(bad.num)))) for bad in report.bad
    )
    return Table("Bad answers", ("", "Good one wins, %", "Gap, std of scores", "Answers"), rows, one_line=True)


def distributions_table(report: RewardReport) -> Table:
    """Where the scores lie."""
    rows = tuple(
        (
            found.group,
            (
                cell(found.mean, 2),
                cell(found.std, 2),
                *(cell(value, 2) for value in found.quantiles),
                Cell(str(found.num)),
            ),
        )
        for found in report.distributions
    )
    columns = ("", "Mean", "Std", "1 %", "25 %", "50 %", "75 %", "99 %", "Answers")
    return Table("Scores", columns, rows)


def _edit_sentence(edit: PlantedBias) -> str:
    return f"{sentence(edit.edit)}: {percent(edit.preferred)}, {edit.shift.estimate:+.2f}"


def _confidence_sentence(report: RewardReport) -> str:
    fit = report.temperature
    assert fit is not None
    measured = (
        f"Expected calibration error {fit.ece_before:.3f}, Brier score {fit.brier_before:.3f} on {fit.num_held_out} "
        f"pairs, of which an honest model would show {fit.chance_ece:.3f} by chance."
    )
    if fit.log_loss_change.high < 0:
        return (
            f"{measured} Divide margins by {fit.temperature:.2f} to read them as probabilities (fitted on "
            f"{fit.num_fitted} other pairs): then {fit.ece_after:.3f}, Brier score {fit.brier_after:.3f}."
        )
    return (
        f"{measured} Dividing margins by a temperature fitted on {fit.num_fitted} other pairs ({fit.temperature:.2f}) "
        "does not improve them beyond chance; read them as they are."
    )


def _always(report: RewardReport) -> list[str]:
    families = ", ".join(plain(name) for name in report.accuracy.by_family)
    return [
        f"Measured on these pairs alone ({families}); nothing is known of other prompts, languages and lengths.",
        "A policy that is optimised against it will find answers that none of these numbers foresee; watch the gap to "
        "other judges while training.",
    ]


def _padding(report: RewardReport) -> str:
    check = report.padding
    left = "not tried (an encoder counts positions from the left)" if check.left is None else f"{check.left:.1e}"
    return (
        f"Padding: {check.num} answers scored alone and in padded batches differ by at most {check.right:.1e} standard "
        f"deviations with padding on the right, on the left {left}."
    )


def _disagreements(pairs: Sequence[ScoredPair]) -> list[str]:
    if not pairs:
        return []
    blocks = ["## Worst disagreements", "Pairs that it orders against the label with the largest margin."]
    for number, pair in enumerate(pairs, start=1):
        rows = [("prompt", pair.prompt[-_SHOWN:]), ("labelled better", pair.chosen), ("labelled worse", pair.rejected)]
        scores = ["", f" ({pair.chosen_score:.2f})", f" ({pair.rejected_score:.2f})"]
        lines = [f"- {name}{score}: {plain(text[:_SHOWN])}" for (name, text), score in zip(rows, scores, strict=True)]
        blocks.append("\n".join([f"### {number}. {plain(pair.group)}", "", *lines]))
    return blocks


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _listed(notes: Mapping[str, str]) -> str:
    return _bullets([f"{plain(name)}: {plain(value)}" for name, value in notes.items()])
