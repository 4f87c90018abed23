"""What PPO and GRPO carry from one optimizer step to the next, and how a checkpoint holds it.

A checkpoint between iterations holds no experience. One inside an iteration holds the experience that is being learnt
from, what the iteration's line of the log needs besides, and how many of its updates are done.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.algo.kl import KLController
from rlhf.algo.trainer import StepReport, Trainer
from rlhf.eval.hacking import Look
from rlhf.infra.checkpoint import Checkpoint
from rlhf.infra.determinism import restore_rng_state, rng_state
from rlhf.infra.experiment import Run
from rlhf.rewards.protocol import Scores
from rlhf.rewards.shaping import RunningMoments, ShapedScores
from rlhf.rollout.trajectory import Experience, Trajectory


@dataclass(frozen=True)
class Rollout:
    """What an iteration sampled and made of it: to learn from, and to report.

    `metrics` are those of the iteration's line of the log that only the recipe knows of, `dropped_tokens` what was
    sampled and is not learnt from.
    """

    experience: Experience
    scores: Scores
    shaped: ShapedScores
    metrics: dict[str, float] = field(default_factory=dict)
    dropped_tokens: int = 0

    @property
    def sampled_tokens(self) -> int:
        """Response tokens that the iteration sampled."""
        return int(self.experience.trajectory.response_mask_BR.sum()) + self.dropped_tokens


@dataclass
class Progress:
    """What changes besides weights and optimizer; all of it is in a checkpoint.

    `step` counts finished iterations, `prompts` the prompts drawn so far where an iteration draws as many as it needs
    (PPO's number is fixed: the step stands for it). `rollout` is what the inner epochs under way learn from, None
    between iterations, and `updates` are the optimizer steps made from it so far. `recompute`: log-probs of generation
    were found far off. `looks`: what was seen so far of signs that the reward is gamed.
    """

    step: int
    kl: KLController
    moments: RunningMoments
    tokens: int = 0
    prompts: int = 0
    first_length: float | None = None
    recompute: bool = False
    looks: list[Look] = field(default_factory=list)
    rollout: Rollout | None = None
    updates: list[StepReport] = field(default_factory=list)


def save_state(run: Run, trainer: Trainer, progress: Progress) -> Path:
    """Write weights, critic, optimizer, schedule, KL coefficient, running moments, counters, generators and rollout.

    Prompt order and sampling noise are functions of seed, step and prompts drawn, so numbers stand for them.
    """
    optimizer, plain = trainer.state()
    tensors = {"weights": {name: p.detach() for name, p in trainer.parameters.items()}, "optimizer": optimizer}
    state: dict[str, Any] = {
        "trainer": plain,
        "rng": rng_state(),
        "kl_coefficient": progress.kl.coefficient,
        "moments": asdict(progress.moments),
        "tokens": progress.tokens,
        "prompts": progress.prompts,
        "first_length": progress.first_length,
        "recompute": progress.recompute,
        "looks": [look.to_json() for look in progress.looks],
    }
    if progress.rollout is not None:
        tensors["rollout"], state["rollout"] = _taken_apart(progress.rollout)
        state["updates"] = [asdict(report) for report in progress.updates]
    return run.save(progress.step, tensors, state, part=len(progress.updates))


@torch.no_grad()
def load_state(checkpoint: Checkpoint, trainer: Trainer, progress: Progress, device: torch.device) -> None:
    """Put everything back where `save_state` found it."""
    tensors, state = checkpoint.tensors("weights"), checkpoint.state
    for name, parameter in trainer.parameters.items():
        parameter.copy_(tensors[name])
    trainer.restore(checkpoint.tensors("optimizer"), state["trainer"])
    progress.step = checkpoint.step
    progress.kl = replace(progress.kl, coefficient=state["kl_coefficient"])
    progress.moments = RunningMoments(**state["moments"])
    progress.tokens, progress.first_length = state["tokens"], state["first_length"]
    progress.prompts = state.get("prompts", 0)  # of a PPO run that was begun before these were counted
    progress.recompute = state["recompute"]
    progress.looks = [Look.from_json(look) for look in state.get("looks", [])]
    if "rollout" in state:
        on_device = {name: tensor.to(device) for name, tensor in checkpoint.tensors("rollout").items()}
        progress.rollout = _put_together(on_device, state["rollout"])
        progress.updates = [StepReport(**report) for report in state["updates"]]
    restore_rng_state(state["rng"])


def _taken_apart(rollout: Rollout) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a rollout by name, and everything else in it."""
    experience, trajectory = vars(rollout.experience), vars(rollout.experience.trajectory)
    tensors = {f"trajectory.{name}": value for name, value in trajectory.items() if isinstance(value, Tensor)}
    tensors |= {f"experience.{name}": value for name, value in experience.items() if isinstance(value, Tensor)}
    tensors["shaped_scores_B"] = rollout.shaped.scores_B
    plain = {
        "trajectory": {name: value for name, value in trajectory.items() if not isinstance(value, Tensor)},
        "scores": asdict(rollout.scores),
        "shaping_metrics": rollout.shaped.metrics,
        "metrics": rollout.metrics,
        "dropped_tokens": rollout.dropped_tokens,
    }
    return tensors, plain


def _put_together(tensors: dict[str, Tensor], plain: dict[str, Any]) -> Rollout:
    def below(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    trajectory = Trajectory(**below("trajectory."), **plain["trajectory"])
    return Rollout(
        Experience(trajectory, **below("experience.")),
        Scores(**plain["scores"]),
        ShapedScores(tensors["shaped_scores_B"], plain["shaping_metrics"]),
        plain.get("metrics", {}),
        plain.get("dropped_tokens", 0),
    )
