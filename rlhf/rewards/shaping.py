"""From one score per answer to one reward per token: normalise, clip, penalise, charge the KL.

Legend: B sequences, R response tokens. The score is paid on the last response token (checklist V1).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor

from rlhf.algo.kl import KL_ESTIMATORS
from rlhf.infra.config import Config
from rlhf.rollout.trajectory import Trajectory


class ShapingConfig(Config):
    """What happens to a score before it becomes a reward, in this order."""

    normalise: bool = Field(
        True, description="subtract the running mean of all scores so far and divide by their deviation"
    )
    clip: float | None = Field(5.0, gt=0, description="clip the (normalised) score to +- this; null: no clip")
    missing_eos_penalty: float = Field(1.0, ge=0, description="subtracted where an answer was cut off")
    length_budget: int | None = Field(None, ge=1, description="tokens that are free; null: no length penalty")
    length_penalty: float = Field(0.01, ge=0, description="subtracted per token beyond the budget")
    overlong_buffer: int | None = Field(
        None, ge=1, description="last tokens before generation.max_new_tokens, over which a penalty rises; null: none"
    )
    overlong_penalty: float = Field(1.0, ge=0, description="what it rises to at generation.max_new_tokens")
    repetition_penalty: float = Field(0.0, ge=0, description="subtracted, times the share of repeated 4-grams")
    refusal_penalty: float = Field(0.0, ge=0, description="subtracted where the refusal detector fires")

    def idle_keys(self) -> dict[str, str]:
        """See `Config.idle_keys`."""
        idle: dict[str, str] = {}
        if self.length_budget is None and self.length_penalty > 0:
            idle["length_penalty"] = "length_budget is null, so no token is beyond it"
        elif self.length_penalty == 0:
            idle["length_budget"] = "length_penalty is 0"
        if self.overlong_buffer is None and self.overlong_penalty > 0:
            idle["overlong_penalty"] = "overlong_buffer is null, so no answer is in it"
        elif self.overlong_penalty == 0:
            idle["overlong_buffer"] = "overlong_penalty is 0"
        return idle


@dataclass
class RunningMoments:
    """Mean and variance of all scores seen so far, by the parallel update of Chan et al. (1979); checkpointed."""

    count: float = 0.0
    mean: float = 0.0
    sum_of_squares: float = 0.0

    def update(self, scores_B: Tensor) -> None:
        number, mean = scores_B.numel(), float(scores_B.double().mean())
        squares = float((scores_B.double() - mean).square().sum())
        delta, total = mean - self.mean, self.count + number
        self.sum_of_squares += squares + delta * delta * self.count * number / total
        self.mean += delta * number / total
        self.count = total

    @property
    def std(self) -> float:
        """Deviation with Bessel's correction; 1 before two scores were seen or while all are equal."""
        if self.count < 2 or self.sum_of_squares == 0:
            return 1.0
        return float((self.sum_of_squares / (self.count - 1)) ** 0.5)


@dataclass(frozen=True)
class ShapedScores:
    """Scores after shaping (B,), and metrics of what shaping did."""

    scores_B: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


def shape_scores(
    scores_B: Tensor,
    trajectory: Trajectory,
    config: ShapingConfig,
    moments: RunningMoments,
    repetition_B: Tensor,
    refused_B: Tensor,
    max_length: int,
) -> ShapedScores:
    """Apply `ShapingConfig` in its order. `moments` takes in this batch first, so its own scores are normalised by it.

    `repetition_B` is the share of repeated n-grams in [0, 1], `refused_B` bool, `max_length` the length in tokens at
    which an answer is cut off.
    """
    shaped = scores_B.float()
    moments.update(shaped)
    if config.normalise:
        shaped = (shaped - moments.mean) / moments.std
    metrics = {
        "reward/outlier_share": float(((scores_B - moments.mean).abs() > 5 * moments.std).float().mean()),
        "refusal/rate": float(refused_B.float().mean()),
        "repetition/mean": float(repetition_B.mean()),
    }
    if config.clip is not None:
        metrics["reward/clipped_share"] = float((shaped.abs() > config.clip).float().mean())
        shaped = shaped.clamp(-config.clip, config.clip)
    shaped = shaped - config.missing_eos_penalty * (~trajectory.finished_B).float()
    if config.length_budget is not None:
        shaped = shaped - config.length_penalty * (trajectory.lengths_B - config.length_budget).clamp(min=0)
    if config.overlong_buffer is not None:
        soft_B = soft_overlong_penalty(trajectory.lengths_B, max_length, config.overlong_buffer)
        shaped = shaped + config.overlong_penalty * soft_B
        metrics["length/overlong_share"] = float((soft_B < 0).float().mean())
    shaped = shaped - config.repetition_penalty * repetition_B - config.refusal_penalty * refused_B.float()
    return ShapedScores(shaped, metrics)


def soft_overlong_penalty(lengths_B: Tensor, max_length: int, buffer: int) -> Tensor:
    """0 up to `max_length - buffer` tokens, falling in a straight line to -1 at `max_length` and beyond; (B,).

    DAPO's soft punishment of overlong answers (arXiv:2503.14476 section 3.4): being cut off is no sudden loss.
    """
    return ((max_length - buffer - lengths_B) / buffer).clamp(-1.0, 0.0)


def token_rewards(
    trajectory: Trajectory,
    scores_B: Tensor,
    reference_logprobs_BR: Tensor,
    kl_coefficient: float,
    estimator: str,
    steps_BR: Tensor | None = None,
) -> Tensor:
    """-beta * kl_t on every response token, plus the score on the last one; (B, R), 0 where the mask is False.

    `steps_BR` is what is paid where steps end, beside the score.
    """
    log_ratio_BR = trajectory.logprobs_BR - reference_logprobs_BR
    rewards_BR = -kl_coefficient * KL_ESTIMATORS[estimator](log_ratio_BR)
    rewards_BR = torch.where(trajectory.last_token_BR, rewards_BR + scores_B.unsqueeze(1), rewards_BR)
    if steps_BR is not None:
        rewards_BR = rewards_BR + steps_BR
    return torch.where(trajectory.response_mask_BR, rewards_BR, torch.zeros_like(rewards_BR))
