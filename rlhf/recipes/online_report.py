"""The metrics of an iteration of PPO or GRPO; means are over responses or response tokens, padding never counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.algo.kl import clamped_share
from rlhf.algo.trainer import StepReport, Trainer, mean_loss, mean_reports, taken
from rlhf.infra.experiment import Run
from rlhf.infra.profiling import PhaseTimer, memory_metrics, per_second
from rlhf.recipes.online_state import Progress, Rollout
from rlhf.rollout.trajectory import Experience


class OnlineReport:
    """Turns what an iteration produced into one line of the log; `last` is the line before."""

    def __init__(self, run: Run, timer: PhaseTimer) -> None:
        self.run, self.timer, self.last = run, timer, dict[str, float]()

    def log(self, progress: Progress, rollout: Rollout, updates: Sequence[StepReport], trainer: Trainer) -> None:
        experience = rollout.experience
        line = reward_metrics(rollout) | rollout.shaped.metrics | text_metrics(experience, progress)
        line |= advantage_metrics(experience) | value_metrics(experience) | rollout.metrics | mean_reports(updates)
        line |= {
            "kl/coefficient": progress.kl.coefficient,
            # The first update is made by the policy that sampled: its ratio is 1 but for rounding.
            "policy/logprob_gap": updates[0].metrics["policy/ratio_deviation"],
            "policy/logprob_gap_max": updates[0].maxima["policy/ratio_deviation_max"],
            "train/optimizer_steps": trainer.step_count,
            "train/updates_this_iteration": len(updates),
            "train/skipped_steps": trainer.skipped_count,
            "train/learning_rate": updates[-1].learning_rate,
            "train/grad_norm": sum(u.grad_norm for u in taken(updates)) / len(taken(updates)),
            "train/loss": mean_loss(updates),
            "train/tokens": progress.tokens,
        }
        line |= self._speed(rollout.sampled_tokens)
        self.last = line
        self.run.logger.log(progress.step, line)

    def _speed(self, tokens: int) -> dict[str, float]:
        seconds = self.timer.lap()
        line = {f"time/{phase}": value for phase, value in seconds.items()}
        line["rate/tokens_per_second"] = per_second(tokens, sum(seconds.values()))
        line["rate/generated_tokens_per_second"] = per_second(tokens, seconds.get("generate", 0.0))
        return line | memory_metrics(self.run.device)


def reward_metrics(rollout: Rollout) -> dict[str, float]:
    """Scores as the rewards gave them and after shaping, each term and what it is made of, and the KL per response."""
    experience, scores, shaped = rollout.experience, rollout.scores, rollout.shaped
    kl_B = experience.kl_B.float()
    line = {
        "reward/mean": _mean(experience.scores_B),
        "reward/std": _std(experience.scores_B),
        "reward/min": float(experience.scores_B.min()),
        "reward/max": float(experience.scores_B.max()),
        "reward/shaped_mean": _mean(shaped.scores_B),
        "reward/return_mean": _mean(experience.rewards_BR.sum(dim=1)),
        "kl/mean": _mean(kl_B),
        "kl/p95": float(kl_B.quantile(0.95)),
        "kl/clamped_share": float(
            clamped_share(
                experience.trajectory.logprobs_BR - experience.reference_logprobs_BR,
                experience.trajectory.response_mask_BR,
            )
        ),
    }
    if scores.by_step:
        values = [value for steps in scores.by_step for _, value in steps]
        line |= {
            "reward/steps": len(values) / len(scores.by_step),
            "reward/step_mean": sum(values) / max(1, len(values)),
        }
    line |= {f"reward/term/{name}": sum(values) / len(values) for name, values in scores.by_term.items()}
    return line | {f"reward/detail/{name}": sum(values) / len(values) for name, values in scores.details.items()}


def text_metrics(experience: Experience, progress: Progress) -> dict[str, float]:
    """Length and its drift since the first iteration, finished answers, entropy of the distributions sampled from."""
    trajectory = experience.trajectory
    length = _mean(trajectory.lengths_B.float())
    return {
        "length/mean": length,
        "length/max": float(trajectory.lengths_B.max()),
        "length/drift": length / (progress.first_length or length) - 1,
        "length/finished_share": _mean(trajectory.finished_B.float()),
        "entropy/mean": _mean(trajectory.entropy_BR[trajectory.response_mask_BR]),
        "policy/truncated_mass": trajectory.truncated_mass,
        "padding/generation_share": trajectory.num_padding / max(1, trajectory.num_through),
    }


def advantage_metrics(experience: Experience) -> dict[str, float]:
    """Advantages over response tokens: before whitening (return minus value) where there is a critic."""
    mask_BR = experience.trajectory.response_mask_BR
    raw_M = experience.advantages_BR[mask_BR]
    if experience.values_BR is not None and experience.returns_BR is not None:
        raw_M = experience.returns_BR[mask_BR] - experience.values_BR[mask_BR]
    return {
        "advantage/mean": _mean(raw_M),
        "advantage/std": _std(raw_M),
        "advantage/min": float(raw_M.min()),
        "advantage/max": float(raw_M.max()),
    }


def value_metrics(experience: Experience) -> dict[str, float]:
    """Values, returns, and how much of the returns values explain; nothing where there is no critic."""
    if experience.values_BR is None or experience.returns_BR is None:
        return {}
    mask_BR = experience.trajectory.response_mask_BR
    returns_M, values_M = experience.returns_BR[mask_BR], experience.values_BR[mask_BR]
    error_M = returns_M - values_M
    variance = float(returns_M.var()) if returns_M.numel() > 1 else 0.0
    error = float(error_M.var()) if error_M.numel() > 1 else 0.0
    return {
        "value/mean": _mean(values_M),
        "value/return_mean": _mean(returns_M),
        "value/explained_variance": 1 - error / variance if variance > 0 else 0.0,
    }


def _mean(values: Tensor) -> float:
    return float(values.float().mean())


def _std(values: Tensor) -> float:
    return float(values.float().std()) if values.numel() > 1 else float(torch.zeros(()))
