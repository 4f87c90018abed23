"""From experience to optimizer steps: what PPO and GRPO do in an iteration once the advantages are there.

`Updates` makes several passes of mini-batches over an experience, ends early when the policy has moved far enough, and
goes on inside an iteration where a run was interrupted. A recipe brings the loss and nothing else.
Legend: B sequences, R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from rlhf.algo.kl import MAX_LOG_RATIO
from rlhf.algo.masked import masked_sum
from rlhf.algo.ppo_loss import kl_from_old
from rlhf.algo.trainer import LossOutput, Trainer
from rlhf.data.order import epoch_order
from rlhf.infra.determinism import derive_seed
from rlhf.infra.experiment import Run
from rlhf.infra.profiling import PhaseTimer, padding_share
from rlhf.models.policy import Policy
from rlhf.recipes.nonfinite import NonFiniteGuard
from rlhf.recipes.online_config import OnlineConfig
from rlhf.recipes.online_state import Progress, Rollout, load_state, save_state
from rlhf.rollout.passes import passes
from rlhf.rollout.trajectory import Experience

# From a mini-batch, whose counts it may need, to the loss of one of its micro-batches.
LossOf = Callable[[Experience], Callable[[Experience], LossOutput]]

# Mean abs(ratio - 1) before the first update above which generation's log-probs are no longer taken for the trainer's.
# Rounding alone stays far below it: 1e-6 in fp32, a few thousandths in bf16 (checklist P1).
MAX_LOGPROB_GAP = 0.02


class Updates:
    """Owns the optimizer of a run, and its place: `progress` is what a checkpoint holds besides weights."""

    def __init__(self, config: OnlineConfig, run: Run, policy: Policy, timer: PhaseTimer, progress: Progress) -> None:
        self.config, self.run, self.timer, self.progress = config, run, timer, progress
        self.policy, self.device = policy, policy.backbone.device
        self.trainer = Trainer(
            policy.trainable_parameters(),
            config.optimizer,
            config.num_optimizer_steps,
            scale_loss=config.run.dtype == "fp16",
        )
        self.guard = NonFiniteGuard(run, self.trainer)
        if run.resumed_from is not None:
            load_state(run.resumed_from, self.trainer, progress, self.device)

    @property
    def recomputes(self) -> bool:
        """Whether old log-probs come from the trainer's forward: when asked for, or once generation's were far off."""
        return self.config.updates.recompute_logprobs or self.progress.recompute

    def make(self, experience: Experience, num_epochs: int, loss_of: LossOf) -> None:
        """Passes of mini-batches; the rest is left out once the mean k3 estimate of KL(old, new) passes the bound.

        Those that were made before the run was interrupted are in `progress.updates` and are not made again.

        Raises:
            NonFiniteError: too many in a row were not finite; the last good weights are in a checkpoint.
        """
        bound, every = self.config.updates.target_kl, self.config.updates.save_every_updates
        done, mini_batches = self.progress.updates, self.mini_batches(len(experience), num_epochs)
        for mini in mini_batches[len(done) :]:
            part = experience.select(mini)
            with self.timer("update"):
                micro_batches, loss = self.micro_batches(part), loss_of(part)
                backbone = self.policy.backbone
                read, through = backbone.num_tokens_read, backbone.num_tokens_through
                report = self.trainer.step(micro_batches, loss)
                padding = padding_share(backbone.num_tokens_read - read, backbone.num_tokens_through - through)
                done.append(replace(report, metrics={**report.metrics, "padding/train_share": padding}))
            if done[-1].skipped:
                self.guard.examine(done[-1], micro_batches, loss)
            if self.trainer.exhausted:
                self.save()
            self.guard.stop_if_exhausted()
            if bound is not None and done[-1].metrics["policy/kl_old_new"] > bound:
                return
            if every is not None and len(done) % every == 0 and len(done) < len(mini_batches):
                self.save()

    def mini_batches(self, num_rows: int, num_epochs: int) -> list[Tensor]:
        """Row numbers of every update of an iteration, in order."""
        seed = derive_seed(self.run.config.seed, "mini", self.progress.step)
        orders = [epoch_order(num_rows, seed, epoch) for epoch in range(num_epochs)]
        return [
            mini
            for order in orders
            for mini in torch.tensor(order, device=self.device).tensor_split(self.config.updates.num_mini_batches)
        ]

    def micro_batches(self, part: Experience) -> list[Experience]:
        """Rows as they go through the model together, no more tokens at once than the settings allow."""
        limit = self.config.updates.max_tokens_per_micro_batch
        return [part.of_pass(trees) for trees in passes(part.trajectory, self.policy.backbone, limit)]

    def finish_iteration(self, rollout: Rollout) -> None:
        """Step on to the next iteration: the KL coefficient follows the batch just measured, where that has a KL."""
        former, updates, experience = self.progress, self.progress.updates, rollout.experience
        mean_kl = float(experience.kl_B.mean())
        gap = updates[0].metrics["policy/ratio_deviation"]
        if gap > MAX_LOGPROB_GAP and not self.recomputes:
            self.run.logger.info(
                f"log-probs of generation and training differ: before the first update abs(ratio - 1) was {gap:.3f} in "
                f"the mean, above {MAX_LOGPROB_GAP}; from here on they are recomputed, which costs a forward pass"
            )
        self.progress = replace(
            former,
            step=former.step + 1,
            kl=former.kl.updated(mean_kl, len(experience)) if isfinite(mean_kl) else former.kl,
            tokens=former.tokens + rollout.sampled_tokens,
            first_length=former.first_length or float(experience.trajectory.lengths_B.float().mean()),
            recompute=former.recompute or gap > MAX_LOGPROB_GAP,
            rollout=None,
            updates=[],
        )

    def stops(self) -> bool:
        """Write the checkpoint that is due behind an iteration; whether the run is to end here."""
        stopping = self.run.should_stop()
        at_end = self.progress.step == self.config.updates.num_iterations
        if stopping or self.run.checkpoint_due(self.progress.step) or at_end:
            self.save()
        return stopping

    def save(self) -> None:
        """A checkpoint of this very place."""
        with self.timer("save"):
            save_state(self.run, self.trainer, self.progress)


def ratio_metrics(
    log_ratio_BR: Tensor, mask_BR: Tensor, num_tokens: int | Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """How far the policy is from the one that sampled: what adds up over micro-batches, and what has a largest."""
    apart_BR = log_ratio_BR.detach()
    deviation_BR = (apart_BR.exp() - 1).abs().where(mask_BR, 0.0)
    sums = {
        "policy/kl_old_new": kl_from_old(log_ratio_BR, mask_BR, num_tokens),
        "policy/ratio_deviation": deviation_BR.sum() / num_tokens,
        "policy/clamped_share": masked_sum((apart_BR.abs() > MAX_LOG_RATIO).float(), mask_BR) / num_tokens,
    }
    return sums, {"policy/ratio_deviation_max": deviation_BR.max()}
