"""What a PPO checkpoint holds, and how a run takes it up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf.algo.trainer import Trainer
from rlhf.infra.checkpoint import Checkpoint, CheckpointStore
from rlhf.infra.determinism import restore_rng_state
from rlhf.models.policy import Policy
from rlhf.rewards.shaping import RunningMoments

if TYPE_CHECKING:
    from rlhf.recipes.ppo import Progress


def save_state(
    store: CheckpointStore, policy: Policy, trainer: Trainer, progress: Progress, rng: Mapping[str, Any]
) -> Path:
    """Write weights, critic, optimizer, schedule, KL coefficient, running moments, counters and generators.

    Prompt order and sampling noise are functions of seed and step, so the step number stands for them.
    """
    optimizer, plain = trainer.state()
    weights = {name: p.detach() for name, p in trainer.parameters.items()}
    state = {
        "trainer": plain,
        "rng": dict(rng),
        "kl_coefficient": progress.kl.coefficient,
        "moments": asdict(progress.moments),
        "tokens": progress.tokens,
        "first_length": progress.first_length,
    }
    return store.save(progress.step, {"weights": weights, "optimizer": optimizer}, state)


@torch.no_grad()
def load_state(checkpoint: Checkpoint, policy: Policy, trainer: Trainer, progress: Progress) -> None:
    """Put everything back where `save_state` found it."""
    tensors, state = checkpoint.tensors("weights"), checkpoint.state
    for name, parameter in trainer.parameters.items():
        parameter.copy_(tensors[name])
    trainer.restore(checkpoint.tensors("optimizer"), state["trainer"])
    progress.step = checkpoint.step
    progress.kl = replace(progress.kl, coefficient=state["kl_coefficient"])
    progress.moments = RunningMoments(**state["moments"])
    progress.tokens, progress.first_length = state["tokens"], state["first_length"]
    restore_rng_state(state["rng"])
