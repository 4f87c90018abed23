"""What fits of the over-optimisation law say, in sentences, tables and files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.eval.intervals import Interval
from rlhf.eval.judge_report import as_json
from rlhf.eval.markdown import plain, table_text
from rlhf.eval.overoptimisation import START_KL, Curve, CurveFit, Fit
from rlhf.eval.overoptimisation_plot import overoptimisation_png
from rlhf.eval.tables import NONE, Cell, Table, cell
from rlhf.infra.durable import write_json, write_text

REPORT, NUMBERS, POINTS, PLOT = (
    "OVEROPTIMISATION.md",
    "overoptimisation.json",
    "points.jsonl",
    "overoptimisation.png",
)
_FORMAT = 1
_FEW_RUNS, _FEW_POINTS, _TIED, _POOR, _FAR_OFF, _LEANS = 5, 8, 0.05, 0.5, 3.0, 0.3
FORMS = {"rl": "d (alpha - beta log d)", "best_of_n": "d (alpha - beta d)"}
_WORDS = {"rl": "RL", "best_of_n": "best of n"}


def write_overoptimisation(
    folder: Path, title: str, fits: Sequence[CurveFit], notes: Mapping[str, str | int | float]
) -> Path:
    """Write report, numbers, points and figure; returns the report's path."""
    blocks = [
        f"# {plain(title)}",
        "Gold's gain over the start, fitted with d = sqrt(KL) (arXiv:2210.10760): R(d) = d (alpha - beta d) for best "
        "of n, R(d) = d (alpha - beta log d) for RL.",
        _bullets([f"{fit.curve.name}: {verdict(fit)}" for fit in fits]),
        f"![Gold and proxy against KL, with the fitted curves]({PLOT})",
        table_text(peaks_of(fits)),
        table_text(coefficients_of(fits)),
        table_text(by_run(fits)),
        "## What to be wary of",
        _bullets([f"{fit.curve.name}: {sentence}" for fit in fits for sentence in cautions(fit)])
        or "None of the questions asked of these fits gave a reason for caution.",
        "## How it was measured",
        _bullets([*(how_measured(fit) for fit in fits), *(f"{name}: {value}" for name, value in notes.items())]),
    ]
    write_text(folder / REPORT, "\n\n".join(block for block in blocks if block) + "\n")
    write_json(folder / NUMBERS, {"format": _FORMAT, "curves": [numbers(fit) for fit in fits]})
    write_text(folder / POINTS, "".join(json.dumps(point) + "\n" for fit in fits for point in points_of(fit.curve)))
    overoptimisation_png(fits, folder / PLOT)
    return folder / REPORT


def verdict(fit: CurveFit) -> str:
    """Whether gold turns within what was measured, and where: one sentence."""
    gold, furthest = fit.gold, fit.curve.max_kl
    peak = gold.peak_kl.estimate
    if peak < START_KL:
        return f"the fitted gold falls from the start on, by {_bracketed(gold.lost)} up to a KL of {furthest:.3g}"
    if peak <= furthest:
        return (
            f"gold is highest at a KL of {_bracketed(gold.peak_kl, 'KL')}, where the curve says {_bracketed(gold.best)}"
            f", and {_bracketed(gold.lost)} lower at the largest KL measured, {furthest:.3g}"
        )
    beyond = "the fitted curve has no maximum"
    if math.isfinite(peak):
        beyond = f"the curve would turn at {_bracketed(gold.peak_kl, 'KL')}, which lies beyond the data and is a guess"
    return f"no peak in the measured range, up to a KL of {furthest:.3g}; {beyond}"


def cautions(fit: CurveFit) -> list[str]:
    """What in these points or this fit is a reason not to lean on it."""
    curve, gold, found = fit.curve, fit.gold, list[str]()
    num_points, num = sum(int((t.kl_M > START_KL).sum()) for t in curve.tracks), len(curve.tracks)
    if num_points < _FEW_POINTS:
        found.append(f"only {num_points} points beyond the start")
    if 1 < num < _FEW_RUNS:
        found.append(f"{num} runs are few to draw anew: the intervals can be too narrow; see each run's own fit")
    if gold.resampled == "blocks of residuals":
        found.append("one run: the intervals tell of the scatter along it, not of what another seed would do")
    if gold.r_squared < _POOR:
        found.append(f"the law explains little of gold: R^2 is {gold.r_squared:.2f}")
    if abs(gold.misfit.errors) > _FAR_OFF:
        side = "above" if gold.misfit.residual > 0 else "below"
        found.append(
            f"the law misses gold by more than chance: around a KL of {gold.misfit.kl:.2g} it lies "
            f"{abs(gold.misfit.residual):.3f} {side} the curve, {abs(gold.misfit.errors):.1f} standard errors"
        )
    if gold.other_residual_std < 0.9 * gold.residual_std:
        found.append(
            f"the other form fits better (residuals {gold.other_residual_std:.3f} instead of {gold.residual_std:.3f})"
        )
    elif gold.other_residual_std < 1.1 * gold.residual_std:
        found.append(
            f"these points do not tell the two forms apart: residuals {gold.residual_std:.3f}, by the other form "
            f"{gold.other_residual_std:.3f}"
        )
    if gold.beta.low <= 0 <= gold.beta.high:
        found.append("the interval of beta holds 0, so these points do not show that gold turns")
    if gold.leverage.share > max(_LEANS, 5 * gold.leverage.mean):
        found.append(
            f"the point at a KL of {gold.leverage.kl:.3g} alone holds much of the fit (leverage "
            f"{gold.leverage.share:.2f}); see what is left of it with max_kl below that"
        )
    if START_KL < gold.peak_kl.estimate <= curve.max_kl < gold.peak_kl.high:
        found.append("the interval of the peak reaches beyond the measured range")
    if (negative := sum(int((track.kl_M < -START_KL).sum()) for track in curve.tracks)) > 0:
        found.append(f"{negative} estimates of KL lie below 0, which is noise, and count as 0")
    found += [sentence for track in curve.tracks for sentence in _of_track(curve, track.name)]
    return found


def _of_track(curve: Curve, name: str) -> list[str]:
    found = []
    track = next(one for one in curve.tracks if one.name == name)
    if track.num_left_out:
        found.append(f"{track.num_left_out} rows of '{name}' hold a value that is no finite number and were left out")
    if track.kl_by_ties is not None and track.kl_by_ties > _TIED * curve.max_kl:
        found.append(
            f"answers in '{name}' have equal scores, which takes about {track.kl_by_ties:.2f} nats off its largest KL: "
            "log n - (n - 1) / n is too much there, and the curve lies further left than drawn"
        )
    return found


def how_measured(fit: CurveFit) -> str:
    """One line on a curve's points and how its intervals were made."""
    curve = fit.curve
    counted = f"{sum(len(track.kl_M) for track in curve.tracks)} points of {', '.join(t.name for t in curve.tracks)}"
    level = {
        "fitted": "the level that each starts from is fitted along with alpha and beta",
        "measured": "gains are over what was measured at KL 0",
    }[curve.start]
    return f"{curve.name}: {counted}; {FORMS[curve.law]}; {level}; drawn anew: {fit.gold.resampled}"


def peaks_of(fits: Sequence[CurveFit]) -> Table:
    """Where gold is highest, one row per curve."""
    columns = ("", "Form", "d at the peak", "KL at the peak", "Gold at its best", "Lost by the end", "Largest KL")
    rows = []
    for fit in fits:
        gold, furthest = fit.gold, fit.curve.max_kl
        peak = gold.peak_kl
        inside = peak.estimate <= furthest
        place = [_scaled_cell(_root(peak)), _scaled_cell(peak)]
        if not inside:
            place = [
                Cell("none in range"),
                Cell(f"guess: {peak.estimate:.3g}" if math.isfinite(peak.estimate) else NONE),
            ]
        rows.append(
            (
                fit.curve.name,
                (Cell(_WORDS[fit.curve.law]), *place, cell(gold.best, 3), cell(gold.lost, 3), cell(furthest, 2)),
            )
        )
    caption = (
        "Of the fitted curve within the measured range, 95 % intervals; without a peak in it, the best is at its end."
    )
    return Table("Where gold turns", columns, tuple(rows), caption, one_line=True)


def coefficients_of(fits: Sequence[CurveFit]) -> Table:
    """alpha and beta of gold and of the proxy, with what the fit leaves over."""
    columns = ("", "alpha", "beta", "Start", "R^2", "Residuals", "By the other form")
    rows = []
    for fit in fits:
        for what, one in (("gold", fit.gold), ("proxy", fit.proxy)):
            cells = (
                cell(one.alpha, 3), cell(one.beta, 3), cell(one.start, 3), cell(one.r_squared, 3),
                cell(one.residual_std, 3), cell(one.other_residual_std, 3),
            )  # fmt: skip
            rows.append((f"{fit.curve.name}, {what}", cells))
    caption = "Residuals: standard deviation of the points around the curve, in the unit of the score."
    return Table("The fit", columns, tuple(rows), caption, one_line=True)


def by_run(fits: Sequence[CurveFit]) -> Table:
    """Each run's own alpha, beta and peak, for curves of several runs."""
    rows = []
    for fit in fits:
        for track, level, alone in zip(fit.curve.tracks, fit.gold.levels_S, fit.gold.tracks, strict=True):
            if len(fit.curve.tracks) == 1:
                continue
            name, furthest = f"{fit.curve.name}: {track.name}", float(track.kl_M.max())
            if alone is None:
                rows.append((name, (Cell(), Cell(), Cell("too few points"), cell(furthest, 2), cell(level, 3))))
                continue
            peak = Cell(f"{alone.peak_kl:.2f}" if alone.peak_kl <= furthest else "none in range")
            rows.append((name, (cell(alone.alpha, 3), cell(alone.beta, 3), peak, cell(furthest, 2), cell(level, 3))))
    columns = ("", "alpha", "beta", "KL at the peak", "Largest KL", "Start in the joint fit")
    return Table("Gold, run by run", columns, tuple(rows), "Each run fitted alone.")


def numbers(fit: CurveFit) -> dict[str, Any]:
    """Everything about one curve as JSON types; infinite and absent numbers are null."""
    curve = fit.curve
    found: dict[str, Any] = {
        "name": curve.name,
        "law": curve.law,
        "form": FORMS[curve.law],
        "start": curve.start,
        "sources": [
            {"name": t.name, "points": len(t.kl_M), "left_out": t.num_left_out, "kl_by_ties": t.kl_by_ties}
            for t in curve.tracks
        ],
        "max_kl": curve.max_kl,
        "verdict": verdict(fit),
        "cautions": cautions(fit),
    }
    return found | {what: as_json(_fit_numbers(one, curve)) for what, one in (("gold", fit.gold), ("proxy", fit.proxy))}


def points_of(curve: Curve) -> list[dict[str, Any]]:
    """The points that were fitted, as rows."""
    return [
        {"curve": curve.name, "run": track.name, "kl": float(kl), "gold": float(gold), "proxy": float(proxy)}
        for track in curve.tracks
        for kl, gold, proxy in zip(track.kl_M, track.gold_M, track.proxy_M, strict=True)
    ]


def _fit_numbers(fit: Fit, curve: Curve) -> dict[str, Any]:
    return {
        "alpha": fit.alpha,
        "beta": fit.beta,
        "start": fit.start,
        "peak_in_range": fit.peak_kl.estimate <= curve.max_kl,
        "peak_kl": fit.peak_kl,
        "peak_d": _root(fit.peak_kl),
        "share_of_resamples_with_peak_in_range": fit.share_inside,
        "best": fit.best,
        "lost_at_max_kl": fit.lost,
        "r_squared": fit.r_squared,
        "residual_std": fit.residual_std,
        "residual_std_of_the_other_form": fit.other_residual_std,
        "largest_misfit": fit.misfit,
        "largest_leverage": fit.leverage,
        "resampled": fit.resampled,
        "runs": [{"name": t.name, "fit": one} for t, one in zip(curve.tracks, fit.tracks, strict=True)],
    }


def _root(value: Interval) -> Interval:
    return Interval(math.sqrt(value.estimate), math.sqrt(value.low), math.sqrt(value.high), value.num)


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "none"


def _scaled_cell(value: Interval) -> Cell:
    return Cell(_number(value.estimate), f"[{_number(value.low)}, {_number(value.high)}]")


def _bracketed(value: Interval, unit: str = "") -> str:
    if unit == "KL":
        return f"{_number(value.estimate)} [{_number(value.low)}, {_number(value.high)}]"
    return f"{value.estimate:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {plain(sentence)}" for sentence in sentences)
