"""What choosing the best of n answers by a score is worth: from a pool of N answers to each of many prompts.

For every n up to N the mean over all ways of drawing n of the N, without bias (`rlhf.algo.best_of_n`); intervals are
bootstrapped by prompt. Beside it stands the most that choosing can have cost in KL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.algo.best_of_n import best_of_n_kl, expected_best
from rlhf.eval.intervals import Interval, mean_interval
from rlhf.infra.errors import UserError


@dataclass(frozen=True)
class BestOf:
    """One n: `kl_at_most` in nats, the score by which was chosen and its gain over one answer, and the same of worths.

    `ceiling_gain` is the gain in worth where the worths themselves had chosen: what a better score could add.
    """

    n: int
    kl_at_most: float
    score: Interval
    score_gain: Interval
    worth: Interval | None = None
    worth_gain: Interval | None = None
    ceiling_gain: Interval | None = None


@dataclass(frozen=True)
class BestOfNReport:
    """All n that are powers of two, and N."""

    num_prompts: int
    num_answers: int
    finished: float
    by_n: list[BestOf]


def best_of_n_report(rows: Sequence[Mapping[str, Any]]) -> BestOfNReport:
    """Measure a pool: rows with `scores`, `finished` and, where they were measured, `worths`, all equally many.

    Raises:
        UserError: there is no row, or rows have different numbers of answers.
    """
    sizes = {len(row["scores"]) for row in rows}
    if len(sizes) != 1:
        raise UserError(f"a pool has the same number of answers to every prompt, and a prompt; got {sorted(sizes)}")
    scores_KN, worths_KN = _table(rows, "scores"), _table(rows, "worths") if "worths" in rows[0] else None
    num = sizes.pop()
    finished = [one for row in rows for one in row["finished"]]
    by_n = [_best_of(n, scores_KN, worths_KN) for n in _ladder(num)]
    return BestOfNReport(len(rows), num, sum(finished) / len(finished), by_n)


def shown(report: BestOfNReport) -> list[str]:
    """The report as lines of text."""
    lines = [
        f"best of n over {report.num_prompts} prompts, from {report.num_answers} answers to each "
        f"({report.finished:.3f} finished)"
    ]
    for one in report.by_n:
        line = f"  n = {one.n}: KL at most {one.kl_at_most:.2f} nats"
        line += f"; score {_text(one.score)}" + (f", gain {_text(one.score_gain)}" if one.n > 1 else "")
        if one.worth is not None and one.worth_gain is not None and one.ceiling_gain is not None:
            line += f"; worth {_text(one.worth)}"
            if one.n > 1:
                line += f", gain {_text(one.worth_gain)} of at most {one.ceiling_gain.estimate:.3f}"
        lines.append(line)
    return lines


def _best_of(n: int, scores_KN: Tensor, worths_KN: Tensor | None) -> BestOf:
    def gain(by_KN: Tensor, of_KN: Tensor) -> Interval:
        return mean_interval((expected_best(by_KN, of_KN, n) - of_KN.mean(dim=1)).numpy())

    score = mean_interval(expected_best(scores_KN, scores_KN, n).numpy())
    if worths_KN is None:
        return BestOf(n, best_of_n_kl(n), score, gain(scores_KN, scores_KN))
    worth = mean_interval(expected_best(scores_KN, worths_KN, n).numpy())
    gains = gain(scores_KN, scores_KN), worth, gain(scores_KN, worths_KN), gain(worths_KN, worths_KN)
    return BestOf(n, best_of_n_kl(n), score, *gains)


def _ladder(num: int) -> list[int]:
    powers = [2**power for power in range(num.bit_length()) if 2**power < num]
    return [*powers, num]


def _table(rows: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


def _text(value: Interval) -> str:
    return f"{value.estimate:.3f} [{value.low:.3f}, {value.high:.3f}]"
