"""Checks of a reward model: its score belongs to the answer alone, and its head comes back from disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from rlhf.data.chat import TokenExample
from rlhf.data.collate import pad_left, pad_right
from rlhf.eval.doctor.finding import REPEAT_BOUNDS, Bounds, Check, Finding, Gap
from rlhf.infra.errors import UserError
from rlhf.models.reward_model import AnyReward, ClassifierReward, RewardEnsemble, RewardModel

PLACE = Check("V8", "a score belongs to its answer alone", "rewards change with the batch, or are read off padding")
HEAD = Check("V9", "the reward head survives save and load", "PPO climbs the scores of a random head")

_EXTRA = 8  # columns of padding beyond what a batch needs

# Scores start with unit order of magnitude; in half precision their last digit is about a hundredth.
SCORE_BOUNDS: dict[str, Bounds] = {
    "fp32": Bounds(1e-4, 1e-3, of_mean=False),
    "bf16": Bounds(5e-2, 2e-1, of_mean=True),
    "fp16": Bounds(1e-2, 1e-1, of_mean=True),
}


@torch.no_grad()
def scores_ignore_the_batch(model: AnyReward, rows: Sequence[Sequence[int]], dtype_name: str) -> Finding:
    """V8: the same scores alone, in a batch, with wider padding, and (where the model promises it) padded on the left.

    Also that the last token of an answer counts: without it the score must be another one.
    """
    alone_B, pad = torch.cat([_scores(model, [row]) for row in rows]), model.tokenizer.pad_token_id
    ways = {"in a batch": _scores(model, rows), "with wide padding": _scores(model, rows, extra=_EXTRA)}
    if not isinstance(model, ClassifierReward):
        ways["padded on the left"] = _scores(model, rows, extra=_EXTRA, left=True)
        ways["padded with EOS"] = _scores(model, rows, pad=model.tokenizer.eos_token_id)
    gaps = {name: Gap.between(alone_B, scores_B) for name, scores_B in ways.items()}
    bounds = SCORE_BOUNDS[dtype_name]
    name = max(gaps, key=lambda one: bounds.measured(gaps[one]))
    finding = PLACE.graded(
        gaps[name],
        bounds,
        f"between {len(rows)} answers alone and {name} ({len(ways)} ways tried)",
        "read the score at the last attended token of each row, found by the attention mask",
    )
    if finding.level != "green":
        return finding
    without_last_B = torch.cat([_scores(model, [row[:-1]]) for row in rows])
    if Gap.between(alone_B, without_last_B).largest <= bounds.sound:
        role = "the pad token, which it passes over" if rows[0][-1] == pad else "not seen"
        return PLACE.yellow(
            f"the last token of an answer does not change its score: it is {role}",
            "give the reward model's tokenizer a pad token of its own",
        )
    return finding


@torch.no_grad()
def head_survives_saving(
    model: RewardModel | RewardEnsemble,
    rows: Sequence[Sequence[int]],
    load: Callable[[Path], RewardModel | RewardEnsemble],
    dtype_name: str,
) -> Finding:
    """V9 before training: saved and loaded again, adapter and head give identical scores.

    The trained weights are shaken first and put back afterwards: a fresh adapter is the identity, and one that was lost
    would not be missed.
    """
    parameters = model.trainable_parameters()
    former = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        shake(parameters.values())
        before_B = _scores(model, rows)
        with tempfile.TemporaryDirectory() as folder:
            model.save(Path(folder))
            torch.manual_seed(1)
            after_B = _scores(load(Path(folder)), rows)
    except UserError as error:
        return HEAD.red(f"what was saved cannot be loaded: {error}", "mend what the sentence names")
    finally:
        for name, parameter in parameters.items():
            parameter.copy_(former[name])
    seen = f"between {len(rows)} scores before and after"
    return HEAD.graded(Gap.between(before_B, after_B), SCORE_BOUNDS[dtype_name], seen, "save adapter and head together")


@torch.no_grad()
def shake(parameters: Iterable[Tensor]) -> None:
    """Add a tenth of its own deviation to every parameter, as noise; one that is 0 throughout gets N(0, 0.02^2)."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        spread = 0.1 * float(parameter.float().std(correction=0)) or 0.02
        parameter.add_(spread * torch.randn(parameter.shape, generator=generator).to(parameter))


@torch.no_grad()
def head_survives_loading(load: Callable[[], AnyReward], score: Callable[[AnyReward], Tensor]) -> Finding:
    """V9 before use: loaded twice under different random seeds, the model gives identical scores.

    A head that is not in the files is made up by whoever loads them, differently each time.
    """
    scores = []
    try:
        for seed in (1, 2):
            torch.manual_seed(seed)
            scores.append(score(load()))
    except UserError as error:
        return HEAD.red(str(error), "name a finished `rlhf rm` run, or a hub classifier with one label and its head")
    gap = Gap.between(*scores)
    if not gap.largest <= REPEAT_BOUNDS.broken:
        return HEAD.red(
            f"loaded twice, scores differ by up to {gap.largest:.1e}: the head is not in the files, but made up",
            "train the reward model again, and save adapter and head together (modules_to_save of a PEFT adapter)",
        )
    return HEAD.green(f"{len(scores[0])} scores are the same after loading twice")


def _scores(
    model: AnyReward, rows: Sequence[Sequence[int]], *, pad: int | None = None, extra: int = 0, left: bool = False
) -> Tensor:
    """Scores (B,) of rows padded with `extra` columns more than the longest needs."""
    fill = model.tokenizer.pad_token_id if pad is None else pad
    if left:
        prompts = pad_left(rows, fill)
        ids_BT, mask_BT = prompts.input_ids_BP, prompts.attention_mask_BP
    else:
        batch = pad_right([TokenExample(list(row), [False] * len(row)) for row in rows], fill)
        ids_BT, mask_BT = batch.input_ids_BT, batch.attention_mask_BT
    width = (extra, 0) if left else (0, extra)
    device = next(model.parameters()).device
    scores_B: Tensor = model(
        functional.pad(ids_BT, width, value=fill).to(device), functional.pad(mask_BT, width, value=False).to(device)
    )
    return scores_B
