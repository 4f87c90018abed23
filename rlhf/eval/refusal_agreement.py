"""How far the refusal detector agrees with people: XSTest's human labels, with the lexicon cross-validated by prompt.

Whoever wrote the lexicon had seen answers of this kind, so its plain agreement flatters it. Cross-validated, an entry
counts for a prompt only if the answers to *other* prompts support it: what these answers alone would have suggested is
left out. Prompts are split, not answers, so that two models' answers to one prompt never teach each other.
"""

from __future__ import annotations

import csv
import gzip
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.eval.intervals import Interval, mean_interval, paired_ratio
from rlhf.infra.errors import UserError
from rlhf.rewards.refusal import RefusalDetector, RefusalKind
from rlhf.rewards.refusal_lexicon import ENGLISH, Lexicon

_KINDS: dict[str, RefusalKind] = {"1": "none", "2": "full", "3": "partial"}
_JUDGES = ("annotation_1", "annotation_2", "strmatch_label", "gpt4_label")


@dataclass(frozen=True)
class LabelledAnswer:
    """One answer with the label people settled on, and what others (annotators, a string match, a model) said of it."""

    prompt: str
    answer: str
    human: RefusalKind
    others: dict[str, RefusalKind] = field(default_factory=dict)


@dataclass(frozen=True)
class Agreement:
    """Agreement with the human labels, each number with a 95 % bootstrap interval over prompts.

    `agreement`, `precision` and `recall` are about refusing at all, wholly or in part; `three_way` is agreement in
    none, partial and full. `recall_full` and `recall_partial` are the shares of fully and of partly refusing answers
    that were given exactly that label, `precision_partial` the share of answers called partial that are.
    """

    num_answers: int
    agreement: Interval
    precision: Interval
    recall: Interval
    three_way: Interval
    recall_full: Interval
    recall_partial: Interval
    precision_partial: Interval | None


def read_xstest(path: Path) -> list[LabelledAnswer]:
    """Read a file of completions in XSTest's form (csv, gzipped or not).

    Raises:
        UserError: a column is missing or a label is none of XSTest's three.
    """
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8")
    rows = list(csv.DictReader(text.splitlines(keepends=True)))
    missing = {"prompt", "completion", "final_label"} - set(rows[0] if rows else ())
    if missing:
        raise UserError(f"'{path}' has no column {', '.join(sorted(missing))}; expected XSTest's labelled completions")
    return [
        LabelledAnswer(
            row["prompt"],
            row["completion"],
            _kind(row["final_label"], path),
            {name: _kind(row[name], path) for name in _JUDGES if row.get(name)},
        )
        for row in rows
    ]


def agreement(rows: Sequence[LabelledAnswer], kinds: Sequence[RefusalKind], seed: int = 0) -> Agreement:
    """Compare verdicts, one per answer in the same order, with the human labels."""
    human, said = [row.human for row in rows], list(kinds)

    def share(hits: Sequence[bool], among: Sequence[bool]) -> Interval:
        found = _share(rows, hits, among, seed)
        assert found is not None, "no answer is of that kind"
        return found

    def of_kind(labels: Sequence[RefusalKind], kind: RefusalKind) -> list[bool]:
        return [label == kind for label in labels]

    refused, flagged = [label != "none" for label in human], [label != "none" for label in said]
    same = [a == b for a, b in zip(human, said, strict=True)]
    everything = [True] * len(rows)
    return Agreement(
        num_answers=len(rows),
        agreement=share([a == b for a, b in zip(refused, flagged, strict=True)], everything),
        precision=share(refused, flagged),
        recall=share(flagged, refused),
        three_way=share(same, everything),
        recall_full=share(same, of_kind(human, "full")),
        recall_partial=share(same, of_kind(human, "partial")),
        precision_partial=_share(rows, same, of_kind(said, "partial"), seed),
    )


def agreement_gap(
    rows: Sequence[LabelledAnswer], first: Sequence[RefusalKind], second: Sequence[RefusalKind], seed: int = 0
) -> Interval:
    """Agreement (refused or not) of the first verdicts minus that of the second, with its interval over prompts."""
    by_prompt: dict[str, list[float]] = {}
    for row, one, two in zip(rows, first, second, strict=True):
        truth = row.human != "none"
        gap = float((one != "none") == truth) - float((two != "none") == truth)
        by_prompt.setdefault(row.prompt, []).append(gap)
    return mean_interval([sum(gaps) / len(gaps) for gaps in by_prompt.values()], seed)


def cross_validated(
    rows: Sequence[LabelledAnswer], num_folds: int = 10, seed: int = 0, lexicon: Lexicon = ENGLISH
) -> list[RefusalKind]:
    """Verdicts on each answer by the lexicon that the other folds' prompts support."""
    prompts = sorted({row.prompt for row in rows})
    random.Random(seed).shuffle(prompts)
    fold_of = {prompt: index % num_folds for index, prompt in enumerate(prompts)}
    full = RefusalDetector(lexicon)
    evidence = [full.evidence(row.answer) for row in rows]
    verdicts: list[RefusalKind] = ["none"] * len(rows)
    for fold in range(num_folds):
        training = [i for i, row in enumerate(rows) if fold_of[row.prompt] != fold]
        detector = RefusalDetector(_supported(lexicon, [rows[i] for i in training], [evidence[i] for i in training]))
        for i, row in enumerate(rows):
            if fold_of[row.prompt] == fold:
                verdicts[i] = detector.detect(row.answer).kind
    return verdicts


def _supported(lexicon: Lexicon, rows: Sequence[LabelledAnswer], evidence: Sequence[Sequence[str]]) -> Lexicon:
    """Entries that stand in more answers that people called refusals than in others."""

    def keep(entry: str) -> bool:
        pattern = re.compile(entry)
        votes = [
            row.human != "none"
            for row, stretches in zip(rows, evidence, strict=True)
            if any(pattern.search(stretch) for stretch in stretches)
        ]
        return 2 * sum(votes) > len(votes)

    return lexicon.filtered(keep)


def _share(rows: Sequence[LabelledAnswer], hits: Sequence[bool], among: Sequence[bool], seed: int) -> Interval | None:
    """Share of hits among the chosen answers; resampled are prompts, with all their answers."""
    counts: dict[str, list[float]] = {}
    for row, hit, chosen in zip(rows, hits, among, strict=True):
        of_prompt = counts.setdefault(row.prompt, [0.0, 0.0])
        of_prompt[0] += hit and chosen
        of_prompt[1] += chosen
    num = int(sum(chosen for _, chosen in counts.values()))
    if not num:
        return None
    ratio = paired_ratio([hit for hit, _ in counts.values()], [chosen for _, chosen in counts.values()], seed)
    return Interval(ratio.estimate + 1, ratio.low + 1, ratio.high + 1, num)


def _kind(label: str, path: Path) -> RefusalKind:
    if label[:1] not in _KINDS:
        raise UserError(f"'{path}' has the label '{label}'; expected 1_full_compliance, 2_full_refusal, ...")
    return _KINDS[label[:1]]
