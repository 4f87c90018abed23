"""Where gold-against-KL points come from: logs of PPO and GRPO, pools of best of n, and files of columns.

A log has one point per iteration: KL from the reference, the reward that was climbed, and gold where something was
logged that knows better, as a term of weight 0 or by the watch for reward hacking. A pool has one per n, from all its
answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.algo.best_of_n import best_of_n_kl, expected_best, kl_by_ties
from rlhf.data.reading import DATA_SUFFIXES, data_files, read_rows
from rlhf.eval.intervals import FloatArray
from rlhf.eval.overoptimisation import LawName, Track
from rlhf.eval.panels import read_history
from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.infra.run_folder import CONFIG, RUN_INFO, find_run, read_run_info
from rlhf.recipes.best_of_n import POOL, read_pool
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.watch import FILE as LOOKS
from rlhf.rewards.protocol import term_names

LOG = Path("logs") / "train.jsonl"
_CONFIGS = {"ppo": PPOConfig, "grpo": GRPOConfig}
_KL, _PROXY, _TERM = "kl/mean", "reward/mean", "reward/term/"
_RUN_COLUMNS = ("run", "seed")
_CELLS = 2**22
HOW_TO_LOG_GOLD = (
    "log it as a term that pays nothing, such as rewards=[{name: model}, {name: 'gold.py:score', weight: 0}], or name "
    "its column with gold=..."
)


@dataclass(frozen=True)
class Columns:
    """What the points are called in logs and files; None: as they are called by default."""

    kl: str | None = None
    gold: str | None = None
    proxy: str | None = None


@dataclass(frozen=True)
class Found:
    """The tracks of one source, the law that holds for them where the source says it, and the files read."""

    tracks: list[Track]
    law: LawName | None
    files: list[Path]


def find_points(source: str, columns: Columns, max_kl: float | None, output_dir: Path) -> Found:
    """The points of a run, by name or path, or of a data file.

    Raises:
        UserError: there is no such source, or it lacks KL, gold or the proxy.
    """
    folder = next((p for p in (Path(source), output_dir / source) if (p / RUN_INFO).is_file()), None)
    if folder is None and (Path(source).is_file() or Path(source).suffix in DATA_SUFFIXES):
        found = _of_file(source, columns)
    else:
        folder = folder or find_run(source, output_dir)
        source = folder.name
        made_by = read_run_info(folder)["recipe"]
        if made_by == "best_of_n":
            found = _of_pool(source, folder, columns)
        elif made_by in _CONFIGS:
            found = _of_log(source, folder, made_by, columns)
        else:
            raise UserError(
                f"run '{source}' was made by '{made_by}', of which no curve can be had; name runs of ppo, grpo or "
                "best-of-n, or a file with the columns kl, gold and proxy"
            )
    return Found([_up_to(track, max_kl) for track in found.tracks], found.law, found.files)


def _of_log(source: str, folder: Path, recipe: str, columns: Columns) -> Found:
    path = folder / LOG
    rows: Sequence[Mapping[str, float]] = read_history(path)
    gold = _gold_key(folder, recipe, rows, columns.gold)
    if gold is None:
        path = folder / LOOKS
        looks = _looks(path) if columns.kl is None and columns.proxy is None else []
        if not looks:
            raise UserError(
                f"run '{source}' has no gold beside its reward, so there is nothing to fit: {HOW_TO_LOG_GOLD}"
            )
        return Found([_track(source, looks, ("kl", "gold", "reward"))], "rl", [path])
    names = (columns.kl or _KL, gold, columns.proxy or _PROXY)
    for key, name in zip(names, ("kl", "gold", "proxy"), strict=True):
        if not any(key in row for row in rows):
            there = sorted({one for row in rows for one in row if one.startswith(("kl/", "reward/"))})
            raise UserError(
                f"the log of run '{source}' has no '{key}' to take the {name} from; it has "
                f"{', '.join(there) or 'no rows'}"
            )
    return Found([_track(source, rows, names)], "rl", [path])


def _gold_key(folder: Path, recipe: str, rows: Iterable[Mapping[str, float]], asked: str | None) -> str | None:
    """The log's key of gold: what was asked for, by key or by the term's name, or else the one term of weight 0."""
    if asked is not None:
        return asked if any(asked in row for row in rows) else f"{_TERM}{asked}"
    config = load_config(_CONFIGS[recipe], folder / CONFIG)
    assert isinstance(config, PPOConfig | GRPOConfig)
    named = zip(term_names(config.rewards), config.rewards, strict=True)
    unpaid = [name for name, term in named if term.weight == 0]
    if len(unpaid) > 1:
        raise UserError(
            f"run '{folder.name}' has several terms of weight 0, {', '.join(unpaid)}; say gold=<one of them>"
        )
    return f"{_TERM}{unpaid[0]}" if unpaid else None


def _looks(path: Path) -> list[dict[str, float]]:
    """KL, reward and gold of every look of the watch for reward hacking that has all three."""
    if not path.is_file():
        return []
    looks = json.loads(path.read_text(encoding="utf-8"))["looks"]
    rows = [{name: figure["mean"] for name, figure in look["figures"].items()} for look in looks]
    return [row for row in rows if {"kl", "gold", "reward"} <= row.keys()]


def _of_pool(source: str, folder: Path, columns: Columns) -> Found:
    if (columns.kl, columns.gold, columns.proxy) != (None, None, None):
        raise UserError(
            f"'{source}' is a pool of best of n, whose points follow from n, `scores` and `worths`; leave kl, gold and "
            "proxy out for it"
        )
    if not (folder / POOL).is_file():
        raise UserError(f"run '{source}' has no finished pool; go on with: rlhf resume {folder}")
    rows = list(read_pool(folder))
    if "worths" not in rows[0]:
        raise UserError(
            f"the pool of run '{source}' was measured by nothing but the reward that chose; make it with "
            "measured_by=[{name: 'gold.py:score'}]"
        )
    return Found(
        [pool_track(source, [row["scores"] for row in rows], [row["worths"] for row in rows])],
        "best_of_n",
        [folder / POOL],
    )


def pool_track(name: str, scores: Sequence[Sequence[float]], worths: Sequence[Sequence[float]]) -> Track:
    """Points of a pool of N answers to each of K prompts, for n = 1, 2, 3, 4, 6, 8, 12, ... N: evenly apart in d.

    Raises:
        UserError: prompts have different numbers of answers, or a score is no finite number.
    """
    sizes = {len(row) for row in [*scores, *worths]}
    if len(sizes) != 1:
        raise UserError(f"the pool '{name}' has different numbers of answers to its prompts: {sorted(sizes)}")
    scores_KN, worths_KN = (torch.tensor(rows, dtype=torch.float64) for rows in (scores, worths))
    if not bool(scores_KN.isfinite().all() and worths_KN.isfinite().all()):
        raise UserError(f"the pool '{name}' has scores that are no finite numbers; score it again before it is fitted")
    num = sizes.pop()
    ns = sorted({n for power in range(num.bit_length()) for n in (2**power, 3 * 2**power) if n <= num} | {num})
    gold_KM, proxy_KM = _best_by_n(scores_KN, worths_KN, ns), _best_by_n(scores_KN, scores_KN, ns)
    ties = float(torch.cat([kl_by_ties(some_KN, num) for some_KN in scores_KN.split(_at_once(num))]).mean())
    kl_M = np.array([best_of_n_kl(n) for n in ns])
    return Track(name, kl_M, gold_KM.mean(axis=0), proxy_KM.mean(axis=0), gold_KM, proxy_KM, kl_by_ties=ties)


def _best_by_n(scores_KN: Tensor, worths_KN: Tensor, ns: Sequence[int]) -> FloatArray:
    """Worth of the best of n for every prompt and n (K, M), of a few prompts at a time: ties are looked for N by N."""
    at_once = _at_once(scores_KN.shape[1])
    parts = zip(scores_KN.split(at_once), worths_KN.split(at_once), strict=True)
    found: FloatArray = torch.cat(
        [torch.stack([expected_best(some_KN, of_KN, n) for n in ns], dim=1) for some_KN, of_KN in parts]
    ).numpy()
    return found


def _at_once(num_answers: int) -> int:
    return max(1, _CELLS // num_answers**2)


def _of_file(source: str, columns: Columns) -> Found:
    files = data_files(source)
    rows = [row.fields for row in read_rows(source).rows]
    names = (columns.kl or "kl", columns.gold or "gold", columns.proxy or "proxy")
    there = list(dict.fromkeys(name for row in rows for name in row))
    for name, key in zip(names, ("kl", "gold", "proxy"), strict=True):
        if name not in there:
            raise UserError(
                f"'{source}' has no column '{name}'; it has {', '.join(there)}: say which of them it is with {key}=..."
            )
    of_run: dict[str, list[Mapping[str, Any]]] = {}
    split_by = next((name for name in _RUN_COLUMNS if name in there), None)
    for row in rows:
        key = Path(source).stem if split_by is None else f"{split_by} {row.get(split_by)}"
        of_run.setdefault(key, []).append(row)
    return Found([_track(key, some, names) for key, some in of_run.items()], None, files)


def _track(name: str, rows: Sequence[Mapping[str, Any]], columns: tuple[str, str, str]) -> Track:
    """Rows as points; those with a value that is missing or no finite number are left out and counted."""
    points = [[_number(name, row.get(column), column) for column in columns] for row in rows]
    kept = [values for values in points if all(math.isfinite(value) for value in values)]
    if not kept:
        raise UserError(f"'{name}' has no row in which {', '.join(columns)} are all finite numbers")
    kl_M, gold_M, proxy_M = np.array(kept, dtype=np.float64).T
    return Track(name, kl_M, gold_M, proxy_M, num_left_out=len(points) - len(kept))


def _number(name: str, value: object, column: str) -> float:
    if value is None:
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"'{name}' holds {value!r} in the column '{column}', where a number is expected") from None


def _up_to(track: Track, max_kl: float | None) -> Track:
    if max_kl is None:
        return track
    kept_M = track.kl_M <= max_kl
    if not kept_M.any():
        raise UserError(
            f"'{track.name}' has no point up to max_kl={max_kl:g}; its smallest KL is {track.kl_M.min():.3g}"
        )

    def cut(values: FloatArray | None) -> FloatArray | None:
        return None if values is None else values[..., kept_M]

    return Track(
        track.name,
        track.kl_M[kept_M],
        track.gold_M[kept_M],
        track.proxy_M[kept_M],
        cut(track.gold_KM),
        cut(track.proxy_KM),
        track.num_left_out,
        track.kl_by_ties,
    )
