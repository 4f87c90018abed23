"""`rlhf overoptimize`: the published law fitted to gold against KL, and where gold turns.

Nothing trains and nothing is sampled: the points are in the logs of runs, in pools of best of n, or in files. Every
curve is fitted with the form that holds for its way of climbing, gold and proxy alike; what the fit is worth stands
beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator

from rlhf.data.data_config import Names
from rlhf.eval.judge import distinct_names
from rlhf.eval.overoptimisation import START_KL, Curve, CurveFit, LawName, Start, fit_curve, refuse_unfittable
from rlhf.eval.overoptimisation_report import write_overoptimisation
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run, RunConfig
from rlhf.recipes.launch import launch
from rlhf.recipes.overoptimize_sources import Columns, Found, find_points

NO_CURVE = (
    "curves names nothing to fit; give for example 'curves=[{name: ppo, sources: [ppo_0, ppo_1]}, {sources: best}]'"
)


class CurveConfig(Config):
    """Points that are fitted together: runs that differ in nothing but their seed, or one pool or file."""

    sources: Names = Field(
        description="runs of PPO, GRPO or best of n that differ in their seed, or files with columns kl, gold, proxy"
    )
    name: str | None = Field(None, description="what tables call it; null: its first source's name")
    law: LawName | None = Field(None, description="the form that is fitted; null: by who made the runs; files must say")
    kl: str | None = Field(None, description="key of the log or column of the file; null: kl/mean, kl")
    gold: str | None = Field(None, description="the same, or a term's name; null: the term of weight 0, gold")
    proxy: str | None = Field(None, description="the same; null: reward/mean, proxy")
    start: Start | None = Field(
        None, description="gains count from a level that is fitted along, or measured at KL 0; null: fitted for rl"
    )
    max_kl: float | None = Field(None, gt=0, description="leave out points beyond so many nats; null: none")

    @field_validator("sources", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("sources")
    @classmethod
    def _is_not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("a curve has no points without a source; name a run or a file")
        return value


class OveroptimizeConfig(Config):
    """`rlhf overoptimize`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed of the resampling")
    curves: list[CurveConfig] = Field(default=[], description="what is fitted, each curve by itself")
    num_resamples: int = Field(2_000, ge=200, description="resamples behind every interval")
    title: str = Field("Over-optimisation", description="heading of the report")

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        names = ["max_minutes", "save_every_steps", "keep_checkpoints", "profile", "profile_steps", "dtype"]
        return dict.fromkeys([f"run.{name}" for name in names], "nothing runs but a fit to points that are there")


def run_overoptimize(config: OveroptimizeConfig) -> tuple[Run, list[CurveFit]]:
    """Fit every curve; report, numbers, points and figure lie in the run folder.

    Raises:
        UserError: a source is not there or lacks KL, gold or proxy, or there are too few points.
        Stopped: Ctrl-C.
    """
    if not config.curves:
        raise UserError(NO_CURVE)
    fitted: list[CurveFit] = []
    files: list[Path] = []

    def prepare(settings: OveroptimizeConfig, device: torch.device, rejected_rows: Path) -> list[Curve]:
        curves, read = read_curves(settings)
        files.extend(dict.fromkeys(read))  # `launch` takes their checksums after this
        return curves

    def fit(settings: OveroptimizeConfig, run: Run, parts: Sequence[Curve]) -> tuple[int, int]:
        for curve in parts:
            if run.should_stop():
                return 0, 0
            fitted.append(fit_curve(curve, settings.run.seed, settings.num_resamples))
        write_overoptimisation(run.folder, settings.title, fitted, notes(settings, run))
        return 0, 0

    return launch("overoptimize", config, prepare, fit, settings=config.run, data_files=files), fitted


def read_curves(config: OveroptimizeConfig) -> tuple[list[Curve], list[Path]]:
    """The points of every curve, found able to be fitted, and the files that they are from."""
    found = [
        [find_points(s, Columns(c.kl, c.gold, c.proxy), c.max_kl, config.run.output_dir) for s in c.sources]
        for c in config.curves
    ]
    names = distinct_names([c.name or Path(c.sources[0]).stem for c in config.curves])
    curves = [_curve(*one) for one in zip(names, config.curves, found, strict=True)]
    for curve in curves:
        refuse_unfittable(curve)
    return curves, [file for of_curve in found for one in of_curve for file in one.files]


def _curve(name: str, config: CurveConfig, found: Sequence[Found]) -> Curve:
    """One way of climbing: its law by what the sources are, or as the settings say."""
    laws: set[LawName] = {one.law for one in found if one.law is not None}
    if len(laws) > 1:
        raise UserError(
            f"curve '{name}' joins runs that train with pools of best of n, and one form holds for each; make two of it"
        )
    law = config.law or next(iter(laws), None)
    if law is None:
        raise UserError(f"curve '{name}' comes from files, which do not say how KL was spent; say law: rl or best_of_n")
    if laws and law not in laws:
        raise UserError(
            f"curve '{name}' has law: {law}, but its runs are {next(iter(laws))}; leave law out, or give the points as "
            "a file"
        )
    tracks = tuple(track for one in found for track in one.tracks)
    started = all(bool((track.kl_M <= START_KL).any()) for track in tracks)
    start: Start = config.start or ("measured" if law == "best_of_n" and started else "fitted")
    return Curve(name, law, start, tracks)


def notes(config: OveroptimizeConfig, run: Run) -> dict[str, str]:
    """How it was measured."""
    shown = {curve.name or Path(curve.sources[0]).stem: ", ".join(curve.sources) for curve in config.curves}
    return {
        **{f"sources of {name}": sources for name, sources in shown.items()},
        "intervals": f"95 %, percentiles of {config.num_resamples} resamples, seed {config.run.seed}",
        "versions": ", ".join(f"{name} {version}" for name, version in run.info["versions"].items()),
    }
