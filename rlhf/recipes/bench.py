"""Two configurations on the same work, one after the other in fresh processes, pair by pair.

A machine that others use, or that grows warm, is not the same from one minute to the next. Both sides of a pair see the
same minutes, so the ratio of a pair says more than either of its times; what is reported is the median over the pairs.
Who goes first changes from pair to pair. Before anything is timed each side runs once with its matrix products counted,
which also shows whether both do the same work.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rlhf.infra.device import resolve_device, set_num_threads, torch_dtype
from rlhf.infra.durable import write_json
from rlhf.infra.errors import UserError
from rlhf.infra.logger import read_metrics
from rlhf.infra.matmul_rate import GIGA, measure_matmul_rate
from rlhf.infra.run_folder import RUN_INFO
from rlhf.recipes.bench_sides import SIDES, Side, differing_keys
from rlhf.recipes.bench_worker import Job

# Not the work of a step: how often they come is a matter of other settings.
LEFT_OUT = ("validate", "save", "profile")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of several runs or pairs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Measured:
    """One run: its work, and means per step over the steps behind the warm-up; amounts are seconds, or flops."""

    num_steps: int
    num_tokens: int
    per_step: float
    by_phase: Mapping[str, float]
    tokens_per_step: float
    losses: tuple[float, ...]
    peak_memory_mb: float


@dataclass(frozen=True)
class SideResult:
    """One side over all its runs; `gflops_per_step` are products alone, `share` is of the machine's rate in `dtype`."""

    seconds_per_step: Spread
    tokens_per_second: Spread
    peak_memory_mb: Spread
    seconds_by_phase: Mapping[str, float]
    gflops_per_step: float
    gflops_per_second: float
    share: float
    dtype: str
    last_loss: float
    runs: tuple[Measured, ...]


@dataclass(frozen=True)
class Comparison:
    """What was found; `ratio` is B's seconds per step over A's, pair by pair, and `per_token` the same per token."""

    recipe: str
    num_steps: int
    num_warmup: int
    num_pairs: int
    differing_keys: Mapping[str, tuple[Any, Any]]
    differing_work: tuple[str, ...]
    largest_loss_difference: float
    matmul_gflops_per_second: Mapping[str, float]
    num_threads: int
    sides: Mapping[str, SideResult]
    ratio: Spread
    per_token: Spread


def compare(
    recipe: str, sides: Mapping[str, Side], *, num_pairs: int, num_warmup: int, unequal_work: bool, say: Say
) -> Comparison:
    """Count, check, measure. `say` is told every pair as it ends.

    Raises:
        UserError: a run fails, is no longer than the warm-up, or the two do different work and may not.
    """
    rates = _machine_rates(sides.values())
    with tempfile.TemporaryDirectory(prefix="rlhf-bench-") as made:
        counted = {label: _run(recipe, side, "count", Path(made), num_warmup) for label, side in sides.items()}
        differing = _differing_work(counted)
        if differing and not unequal_work:
            raise UserError(
                f"A and B do not do the same work: {'; '.join(differing)}; make them equal with overrides, or compare "
                "them per token with --unequal-work"
            )
        runs: dict[str, list[Measured]] = {label: [] for label in sides}
        for pair in range(num_pairs):
            for label in SIDES if pair % 2 == 0 else SIDES[::-1]:
                runs[label].append(_run(recipe, sides[label], f"{pair + 1}", Path(made), num_warmup))
            a, b = runs["A"][-1], runs["B"][-1]
            say(
                f"pair {pair + 1} of {num_pairs}: A {a.per_step:.4g} s, B {b.per_step:.4g} s per step, "
                f"B / A {b.per_step / a.per_step:.3f}"
            )
    # Whatever else runs can only slow a product down, and it may have run at the start.
    rates = {name: max(rate, rates[name]) for name, rate in _machine_rates(sides.values()).items()}
    dtypes = {label: side.run.dtype for label, side in sides.items()}
    keys = differing_keys(sides["A"].config, sides["B"].config)
    return combined(recipe, counted, runs, num_warmup=num_warmup, dtypes=dtypes, rates=rates, keys=keys)


def combined(
    recipe: str,
    counted: Mapping[str, Measured],
    runs: Mapping[str, Sequence[Measured]],
    *,
    num_warmup: int,
    dtypes: Mapping[str, str],
    rates: Mapping[str, float],
    keys: Mapping[str, tuple[Any, Any]],
) -> Comparison:
    """What the counting runs and the timed ones say together; by side, timed runs in order of the pairs."""
    pairs = list(zip(runs["A"], runs["B"], strict=True))
    losses = [(x, y) for a, b in pairs for x, y in zip(a.losses, b.losses, strict=False)]
    return Comparison(
        recipe=recipe,
        num_steps=counted["A"].num_steps,
        num_warmup=num_warmup,
        num_pairs=len(pairs),
        differing_keys=keys,
        differing_work=_differing_work(counted),
        largest_loss_difference=max(abs(x - y) for x, y in losses),
        matmul_gflops_per_second=rates,
        num_threads=torch.get_num_threads(),
        sides={label: _side_result(dtypes[label], counted[label], runs[label], rates) for label in SIDES},
        ratio=Spread.of([b.per_step / a.per_step for a, b in pairs]),
        per_token=Spread.of([(b.per_step / b.tokens_per_step) / (a.per_step / a.tokens_per_step) for a, b in pairs]),
    )


def check_writable(path: Path) -> None:
    """Raise `UserError` where a result could not be written: better before an hour of measuring than after."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"'{path}' cannot be written; name a file in a folder that is there")


def write_comparison(found: Comparison, path: Path) -> None:
    """All numbers, those of every run among them, as one JSON object."""
    write_json(path, asdict(found))


def _machine_rates(sides: Iterable[Side]) -> dict[str, float]:
    """GFLOP/s of matrix products in fp32, bf16 and whatever the sides use, with their threads and on their device."""
    settings = [side.run for side in sides]
    device = resolve_device(settings[0].device)
    set_num_threads(settings[0].num_threads)
    names = dict.fromkeys(["fp32", "bf16", *(run.dtype for run in settings)])
    return {name: measure_matmul_rate(torch_dtype(name), device) for name in names}


def _run(recipe: str, side: Side, name: str, folder: Path, num_warmup: int) -> Measured:
    """One run in a process of its own; its folder is read and removed."""
    run_name = f"bench-{os.getpid()}-{side.label}-{name}"
    place = side.run.output_dir / run_name
    job = folder / f"{side.label}-{name}.json"
    Job(recipe, side.path, [*side.overrides, f"run.name={run_name}"], count_flops=name == "count").write(job)
    try:
        _wait_for_worker(side, job, job.with_suffix(".txt"))
        return measured(place, num_warmup)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _wait_for_worker(side: Side, job: Path, output: Path) -> None:
    with output.open("w", encoding="utf-8") as file:
        # A session of its own: Ctrl-C is for this process, which then ends the worker.
        worker = subprocess.Popen(
            [sys.executable, "-m", "rlhf.recipes.bench_worker", str(job)],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = worker.wait()
        except BaseException:
            worker.kill()
            worker.wait()
            raise
    if code != 0:
        told = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = told[-1].removeprefix("rlhf: ") if told else f"exit code {code}"
        raise UserError(f"the run of {side.label} ({side.path}) failed: {last}")


def measured(folder: Path, num_warmup: int) -> Measured:
    """What a finished run logged."""
    lines = read_metrics(folder / "logs" / "train.jsonl")
    if len(lines) <= num_warmup:
        raise UserError(
            f"a run of {len(lines)} steps cannot be measured when the first {num_warmup} are left out as warm-up; "
            "raise the number of steps or lower --warmup"
        )
    cost = json.loads((folder / RUN_INFO).read_text(encoding="utf-8"))["cost"]
    kept = lines[num_warmup:]
    phases = dict.fromkeys(name for line in kept for name in line if name.startswith("time/"))
    by_phase = {name.removeprefix("time/"): sum(line.get(name, 0.0) for line in kept) / len(kept) for name in phases}
    tokens_before = lines[num_warmup - 1]["train/tokens"] if num_warmup else 0.0
    return Measured(
        num_steps=cost["optimizer_steps"],
        num_tokens=cost["tokens"],
        per_step=sum(amount for phase, amount in by_phase.items() if phase not in LEFT_OUT),
        by_phase=by_phase,
        tokens_per_step=(lines[-1]["train/tokens"] - tokens_before) / len(kept),
        losses=tuple(line["train/loss"] for line in lines),
        peak_memory_mb=cost["peak_memory_mb"],
    )


def _differing_work(counted: Mapping[str, Measured]) -> tuple[str, ...]:
    first, second = counted["A"], counted["B"]
    amounts = {
        "optimizer steps": (first.num_steps, second.num_steps),
        "tokens": (first.num_tokens, second.num_tokens),
        "lines of the log": (len(first.losses), len(second.losses)),
    }
    return tuple(f"{name}: A {a:,}, B {b:,}" for name, (a, b) in amounts.items() if a != b)


def _side_result(dtype: str, counted: Measured, runs: Sequence[Measured], rates: Mapping[str, float]) -> SideResult:
    seconds = Spread.of([run.per_step for run in runs])
    rate = counted.per_step / seconds.median / GIGA
    return SideResult(
        seconds_per_step=seconds,
        tokens_per_second=Spread.of([run.tokens_per_step / run.per_step for run in runs]),
        peak_memory_mb=Spread.of([run.peak_memory_mb for run in runs]),
        seconds_by_phase={phase: median(run.by_phase.get(phase, 0.0) for run in runs) for phase in runs[0].by_phase},
        gflops_per_step=counted.per_step / GIGA,
        gflops_per_second=rate,
        share=rate / rates[dtype],
        dtype=dtype,
        last_loss=runs[-1].losses[-1],
        runs=tuple(runs),
    )
