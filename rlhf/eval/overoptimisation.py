"""Fits of the over-optimisation law to measured curves, with intervals: `rlhf.algo.overoptimisation` is the formula.

A curve is one way of climbing a proxy, measured once or by several runs: its tracks. Each track may start at a level of
its own (its policy's gold before training), which is fitted along or measured at KL 0; alpha and beta are those of all
tracks together. Intervals are bootstrapped over whole tracks and the prompts of a pool, and over blocks of residuals
where one run is all there is.

Legend: M points of a track, L = 2 coefficients (alpha, beta), K prompts, S tracks, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from rlhf.algo.overoptimisation import LAWS, Law, least_squares
from rlhf.eval.intervals import FloatArray, Interval
from rlhf.infra.errors import UserError

Start = Literal["fitted", "measured"]
Resampled = Literal["runs", "prompts", "runs and prompts", "blocks of residuals"]
LawName = Literal["rl", "best_of_n"]

START_KL = 1e-4  # nats; nearer than that is the start itself
MIN_POINTS = 5  # beyond the start, of a curve; two coefficients and a level leave something to be wrong by
_GRID = 200


@dataclass(frozen=True)
class Track:
    """Points of one run or pool in their order; of a pool also each prompt's own (K, M), whose mean the points are.

    `kl_M` is in nats, `num_left_out` counts rows with a value that is no number, `kl_by_ties` is what equal scores take
    off a pool's largest KL.
    """

    name: str
    kl_M: FloatArray
    gold_M: FloatArray
    proxy_M: FloatArray
    gold_KM: FloatArray | None = None
    proxy_KM: FloatArray | None = None
    num_left_out: int = 0
    kl_by_ties: float | None = None

    @property
    def distances_M(self) -> FloatArray:
        """sqrt(KL); an estimate below 0 is noise around 0."""
        return np.sqrt(np.maximum(self.kl_M, 0.0))


@dataclass(frozen=True)
class Curve:
    """A name, the form that holds for this way of climbing, where gains count from, and the tracks."""

    name: str
    law: LawName
    start: Start
    tracks: tuple[Track, ...]

    @property
    def max_kl(self) -> float:
        """The largest KL that was measured."""
        return max(float(track.kl_M.max()) for track in self.tracks)


@dataclass(frozen=True)
class Fit:
    """The law fitted to gold or to the proxy.

    `peak_kl` is where the fitted curve is highest, in nats: infinite where it has no maximum, 0 where it only falls; so
    may its bounds be. `best` is the highest value of the curve within the measured range, `lost` how far the curve is
    below that at the largest measured KL. `share_inside` of the resamples have their peak within the range.
    `residual_std` has the degrees of freedom taken off; `other_residual_std` is that of the other law on the same
    points. `tracks` are the fits of each track alone, None where it has too few points.
    """

    alpha: Interval
    beta: Interval
    start: Interval
    peak_kl: Interval
    best: Interval
    lost: Interval
    share_inside: float
    r_squared: float
    residual_std: float
    other_residual_std: float
    misfit: Misfit
    leverage: Leverage
    tracks: tuple[Alone | None, ...]
    resampled: Resampled
    levels_S: FloatArray
    grid_kl: FloatArray
    grid: FloatArray
    grid_low: FloatArray
    grid_high: FloatArray


@dataclass(frozen=True)
class Misfit:
    """Where points lie off the curve by most, in standard errors of their mean: positive is above it."""

    kl: float
    residual: float
    errors: float


@dataclass(frozen=True)
class Leverage:
    """The point that the fit leans on most: the share of it that its own value decides, and that of a point on average.

    Source: the diagonal of the hat matrix, Hoaglin and Welsch 1978.
    """

    kl: float
    share: float
    mean: float


@dataclass(frozen=True)
class Alone:
    """The fit of one track by itself; `peak_kl` as in `Fit`."""

    alpha: float
    beta: float
    peak_kl: float


@dataclass(frozen=True)
class CurveFit:
    """A curve with what was fitted to it."""

    curve: Curve
    gold: Fit
    proxy: Fit


def fit_curve(curve: Curve, seed: int = 0, num_resamples: int = 2000) -> CurveFit:
    """Fit gold and proxy. UserError says why a curve cannot be fitted: too few points, KL that is nowhere above 0."""
    refuse_unfittable(curve)
    return CurveFit(curve, _fit(curve, "gold", seed, num_resamples), _fit(curve, "proxy", seed, num_resamples))


class _Centred:
    """One track with its level taken away, from terms and values alike, so that only alpha and beta are left."""

    def __init__(self, track: Track, law: str, start: Start, what: Literal["gold", "proxy"]) -> None:
        self.values_M = track.gold_M if what == "gold" else track.proxy_M
        self.values_KM = track.gold_KM if what == "gold" else track.proxy_KM
        self.kl_M, num = track.kl_M, len(track.kl_M)
        terms_ML = LAWS[law].terms(torch.from_numpy(track.distances_M)).numpy()
        # The level is the weighted mean of the values less that of the terms: of all points, or of those at the start.
        counted_M = np.ones(num) if start == "fitted" else (track.kl_M <= START_KL).astype(np.float64)
        self.weights_M = counted_M / counted_M.sum()
        self.level_terms_L = self.weights_M @ terms_ML if start == "fitted" else np.zeros(terms_ML.shape[1])
        self.terms_ML = terms_ML - self.level_terms_L
        self.gram_LL = self.terms_ML.T @ self.terms_ML

    def moments(self, values_RM: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Products with the terms (R, L), and levels before the terms are taken off (R,)."""
        level_R = values_RM @ self.weights_M
        return (values_RM - level_R[:, None]) @ self.terms_ML, level_R

    @property
    def centred_M(self) -> FloatArray:
        return self.values_M - self.weights_M @ self.values_M

    def level(self, level_R: FloatArray, coefficients_RL: FloatArray) -> FloatArray:
        return level_R - coefficients_RL @ self.level_terms_L


def _fit(curve: Curve, what: Literal["gold", "proxy"], seed: int, num_resamples: int) -> Fit:
    tracks = [_Centred(track, curve.law, curve.start, what) for track in curve.tracks]
    coefficients_L, residuals = _solved(tracks)
    rng = np.random.default_rng(seed)
    coefficients_RL, start_R, resampled = _resampled(tracks, coefficients_L, rng, num_resamples)
    levels_S = np.array([float(t.level(t.weights_M @ t.values_M, coefficients_L[None])[0]) for t in tracks])
    law, furthest, num = LAWS[curve.law], float(np.sqrt(curve.max_kl)), len(tracks)
    all_RL = np.concatenate((coefficients_L[None], coefficients_RL))
    start_all = np.concatenate((levels_S.mean()[None], start_R))
    peak = law.peak(torch.from_numpy(all_RL[:, 0]), torch.from_numpy(all_RL[:, 1])).numpy()

    def gains(distances: FloatArray) -> FloatArray:
        terms_RL = law.terms(torch.from_numpy(distances)).numpy()
        return (terms_RL * all_RL).sum(axis=1)

    best = np.maximum(gains(np.minimum(peak, furthest)), 0.0)
    grid_d = np.linspace(0.0, furthest, _GRID)
    grid_RG = start_all[:, None] + all_RL @ law.terms(torch.from_numpy(grid_d)).numpy().T
    low, high = np.quantile(grid_RG[1:], (0.025, 0.975), axis=0)
    stacked = np.concatenate(residuals)
    centred = np.concatenate([track.centred_M for track in tracks])
    freedom = len(stacked) - 2 - num  # alpha, beta and a level for each track, fitted or measured
    other = "rl" if curve.law == "best_of_n" else "best_of_n"
    other_residuals = _solved([_Centred(track, other, curve.start, what) for track in curve.tracks])[1]
    return Fit(
        alpha=_interval(all_RL[:, 0], num),
        beta=_interval(all_RL[:, 1], num),
        start=_interval(start_all, num),
        peak_kl=_interval(peak**2, num),
        best=_interval(start_all + best, num),
        lost=_interval(best - gains(np.full(len(peak), furthest)), num),
        share_inside=float((peak[1:] <= furthest).mean()),
        r_squared=1 - float((stacked**2).sum() / max(((centred - centred.mean()) ** 2).sum(), 1e-300)),
        residual_std=float(np.sqrt((stacked**2).sum() / freedom)),
        other_residual_std=float(np.sqrt((np.concatenate(other_residuals) ** 2).sum() / freedom)),
        misfit=_misfit(tracks, residuals, coefficients_L),
        leverage=_leverage(tracks, curve.start),
        tracks=tuple(_alone(track, law) for track in tracks),
        resampled=resampled,
        levels_S=levels_S,
        grid_kl=grid_d**2,
        grid=grid_RG[0],
        grid_low=low,
        grid_high=high,
    )


def _solved(tracks: Sequence[_Centred]) -> tuple[FloatArray, list[FloatArray]]:
    """Coefficients (L,) of all tracks together, and each track's residuals."""
    terms = torch.from_numpy(np.concatenate([track.terms_ML for track in tracks]))
    values = torch.from_numpy(np.concatenate([track.centred_M for track in tracks]))
    found_L = least_squares(terms, values).numpy()
    return found_L, [track.centred_M - track.terms_ML @ found_L for track in tracks]


def _alone(track: _Centred, law: Law) -> Alone | None:
    if len(np.unique(np.round(track.kl_M[track.kl_M > START_KL], 9))) < MIN_POINTS:
        return None
    alpha, beta = torch.from_numpy(_solved([track])[0])
    return Alone(float(alpha), float(beta), float(law.peak(alpha, beta)) ** 2)


def _resampled(
    tracks: Sequence[_Centred], coefficients_L: FloatArray, rng: np.random.Generator, num: int
) -> tuple[FloatArray, FloatArray, Resampled]:
    """Coefficients (R, L) and mean levels (R,) of resamples, and what was drawn anew."""
    if len(tracks) == 1 and tracks[0].values_KM is None:
        return *_by_blocks(tracks[0], coefficients_L, rng, num), "blocks of residuals"
    size, of_slot_RS = len(tracks), rng.integers(0, len(tracks), size=(num, len(tracks)))
    gram_RLL = np.stack([track.gram_LL for track in tracks])[of_slot_RS].sum(axis=1)
    products_RSL, levels_RS = np.zeros((num, size, 2)), np.zeros((num, size))
    for place, track in enumerate(tracks):
        at = np.nonzero(of_slot_RS == place)
        products_RSL[at], levels_RS[at] = track.moments(_drawn_values(track, rng, len(at[0])))
    found_RL = (np.linalg.pinv(gram_RLL) @ products_RSL.sum(axis=1)[:, :, None])[:, :, 0]
    level_terms_RSL = np.stack([track.level_terms_L for track in tracks])[of_slot_RS]
    start_R = (levels_RS - (level_terms_RSL * found_RL[:, None]).sum(axis=2)).mean(axis=1)
    with_prompts = any(track.values_KM is not None for track in tracks)
    return found_RL, start_R, "prompts" if size == 1 else "runs and prompts" if with_prompts else "runs"


def _drawn_values(track: _Centred, rng: np.random.Generator, num: int) -> FloatArray:
    """A track's points (num, M), of a pool those of prompts that are drawn anew each time."""
    if track.values_KM is None:
        return np.broadcast_to(track.values_M, (num, len(track.values_M)))
    size = len(track.values_KM)
    return rng.multinomial(size, np.full(size, 1 / size), size=num) @ track.values_KM / size


def _by_blocks(
    track: _Centred, coefficients_L: FloatArray, rng: np.random.Generator, num: int
) -> tuple[FloatArray, FloatArray]:
    """Residuals drawn anew in circular blocks of about the cube root of their number: neighbours share what is off."""
    size = len(track.values_M)
    length = max(1, round(size ** (1 / 3)))
    residuals_M = track.centred_M - track.terms_ML @ coefficients_L
    level = float(track.weights_M @ track.values_M)
    fitted_M = level + track.terms_ML @ coefficients_L
    starts = rng.integers(0, size, size=(num, -(-size // length)))
    places_RM = ((starts[:, :, None] + np.arange(length)) % size).reshape(num, -1)[:, :size]
    products_RL, levels_R = track.moments(fitted_M + (residuals_M - residuals_M.mean())[places_RM])
    found_RL = products_RL @ np.linalg.pinv(track.gram_LL)
    return found_RL, track.level(levels_R, found_RL)


def _misfit(tracks: Sequence[_Centred], residuals: Sequence[FloatArray], coefficients_L: FloatArray) -> Misfit:
    """The point of a pool, or the third of all runs' points by KL, whose mean is off the curve by most errors."""
    if len(tracks) == 1 and tracks[0].values_KM is not None and len(tracks[0].values_KM) > 1:
        track = tracks[0]
        levels_K = track.values_KM @ track.weights_M
        off_KM = track.values_KM - levels_K[:, None] - track.terms_ML @ coefficients_L
        errors_M = off_KM.std(axis=0, ddof=1) / np.sqrt(len(off_KM))
        ratios_M = residuals[0] / np.where(errors_M > 1e-12, errors_M, np.inf)
        place = int(np.abs(ratios_M).argmax())
        return Misfit(float(track.kl_M[place]), float(residuals[0][place]), float(ratios_M[place]))
    kl, off = np.concatenate([track.kl_M for track in tracks]), np.concatenate(residuals)
    found = Misfit(0.0, 0.0, 0.0)
    for part in np.array_split(np.argsort(kl, kind="stable"), 3):
        if len(part) > 1 and off[part].std() > 0:
            mean = float(off[part].mean())
            errors = mean / float(off[part].std(ddof=1) / np.sqrt(len(part)))
            if abs(errors) > abs(found.errors):
                found = Misfit(float(np.median(kl[part])), mean, errors)
    return found


def _leverage(tracks: Sequence[_Centred], start: Start) -> Leverage:
    terms_ML, kl_M = (np.concatenate(p) for p in ([t.terms_ML for t in tracks], [t.kl_M for t in tracks]))
    shares_M = np.einsum("ml,lk,mk->m", terms_ML, np.linalg.pinv(terms_ML.T @ terms_ML), terms_ML)
    if start == "fitted":  # the level of its own run is decided by each point of the run alike
        shares_M = shares_M + np.concatenate([np.full(len(track.kl_M), 1 / len(track.kl_M)) for track in tracks])
    place = int(shares_M.argmax())
    return Leverage(float(kl_M[place]), float(shares_M[place]), float(shares_M.mean()))


def _interval(values: FloatArray, num: int) -> Interval:
    """The first value with the 95 % of the others; of values that may be infinite, so never between two of them."""
    low, high = np.quantile(values[1:], (0.025, 0.975), method="inverted_cdf")
    return Interval(float(values[0]), float(low), float(high), num)


def refuse_unfittable(curve: Curve) -> None:
    """Raise `UserError` where a curve has too few points, or no KL to speak of."""
    beyond = np.concatenate([track.kl_M[track.kl_M > START_KL] for track in curve.tracks])
    if not len(beyond):
        raise UserError(
            f"curve '{curve.name}': KL is 0 at every one of {sum(len(t.kl_M) for t in curve.tracks)} points, so nothing"
            " moved away from the start, or the log has no reference to measure from; there is no curve to fit"
        )
    different = len(np.unique(np.round(beyond, 9)))
    if different < MIN_POINTS:
        raise UserError(
            f"curve '{curve.name}': got {different} points at different KLs above 0, expected at least {MIN_POINTS}; "
            "log more iterations, draw more answers to a prompt, or name more runs"
        )
    for track in curve.tracks:
        if len(track.kl_M) < 2:
            raise UserError(f"curve '{curve.name}': '{track.name}' has {len(track.kl_M)} points; expected at least 2")
        if curve.start == "measured" and not (track.kl_M <= START_KL).any():
            raise UserError(
                f"curve '{curve.name}': '{track.name}' has no point at KL 0 (the smallest is {track.kl_M.min():.3g}), "
                "so what it started from was not measured; use start: fitted"
            )
