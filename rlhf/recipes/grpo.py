"""Reinforcement learning without a critic, read from top to bottom:

    sample groups of answers -> score -> shape -> compare within groups -> update -> report -> checkpoint

Every prompt is answered several times, and what an answer is better than the others of its group is the advantage of
all its tokens. GRPO, RLOO, Dr. GRPO and DAPO are the same order of events; they differ in how an answer is compared
(`rlhf.algo.advantages`), in the mean that the loss is (`rlhf.algo.loss_weights`), in where the KL against the reference
is paid, in the clip's upper bound, and in whether groups that tell nothing are replaced (`rlhf.recipes.groups`). Where
a process reward model pays steps, these are compared with all steps of the group, and that is added to the advantage.
Everything else is PPO's: the loss, the way answers are drawn and scored (`rlhf.recipes.rollouts`), optimizer steps and
resuming between any two of them (`rlhf.recipes.updates`).

Left out on purpose: ratios of whole sequences (GSPO), a correction for an outside sampling engine.
Legend: B sequences, R response tokens, N prompts, G answers to each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rlhf.algo.advantages import GROUP_ADVANTAGES, process_advantages
from rlhf.algo.kl import KL_ESTIMATORS, KLController
from rlhf.algo.loss_weights import LOSS_WEIGHTS
from rlhf.algo.ppo_loss import entropy_loss, policy_loss, reference_kl_loss
from rlhf.algo.trainer import LossOutput
from rlhf.infra.experiment import Run
from rlhf.recipes.groups import DrawnGroups, ScoredGroups, draw_until_they_differ
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.launch import launch
from rlhf.recipes.online_report import OnlineReport
from rlhf.recipes.online_state import Progress, Rollout
from rlhf.recipes.rollouts import OnlineParts, Rollouts, announce_online, prepare_online
from rlhf.recipes.stages import POLICY, save_policy
from rlhf.recipes.updates import Updates, ratio_metrics
from rlhf.recipes.watch import Watch
from rlhf.rewards.shaping import RunningMoments, token_rewards
from rlhf.rollout.trajectory import Experience


class GRPO:
    """The algorithm over its parts; `train` is the whole of it."""

    def __init__(self, config: GRPOConfig, run: Run, parts: OnlineParts) -> None:
        self.config, self.run, self.policy = config, run, parts.policy
        self.timer = run.timer
        self.rollouts = Rollouts(config, run, parts, self.timer)
        start = Progress(0, KLController.from_config(config.kl), RunningMoments())
        self.updates = Updates(config, run, parts.policy, self.timer, start)
        self.watch = Watch(config, run, parts, self.rollouts)
        self.report = OnlineReport(run, self.timer)

    @property
    def progress(self) -> Progress:
        """Where the run is; see `rlhf.recipes.online_state`."""
        return self.updates.progress

    def train(self) -> Progress:
        """Iterate to the end or to a stop request.

        Raises:
            NonFiniteError: too many updates in a row were not finite; the last good weights are in a checkpoint.
        """
        total = self.config.grpo.num_iterations
        with self.run.logger.progress("GRPO", total) as advance:
            advance(self.progress.step)
            while self.progress.step < total:
                with self.run.profiler(self.progress.step + 1):
                    if self.progress.rollout is None:  # it is there when the run was stopped inside its inner epochs
                        drawn = self.draw()
                        experience = self.compare(drawn.groups)
                        self.progress.rollout = Rollout(
                            experience, drawn.groups.scores, drawn.groups.shaped, drawn.counts, drawn.dropped_tokens
                        )
                        self.watch.look(self.progress, self.progress.rollout)
                    rollout, made = self.progress.rollout, self.progress.updates
                    self.updates.make(rollout.experience, self.config.grpo.num_epochs, self.loss)
                    self.updates.finish_iteration(rollout)
                    self.report.log(self.progress, rollout, made, self.updates.trainer)
                advance(1, reward=self.report.last["reward/mean"], kl=self.report.last["kl/mean"])
                if self.updates.stops():
                    break
        return self.progress

    def draw(self) -> DrawnGroups:
        """The groups of this iteration; later prompts of the endless stream replace those that tell nothing."""
        settings, pad = self.config.grpo, self.policy.backbone.tokenizer.pad_token_id
        return draw_until_they_differ(self.sample_groups, settings.num_prompts, settings.max_sampling_rounds, pad)

    def sample_groups(self, num_prompts: int, part: int) -> ScoredGroups:
        """The next prompts, answered by the current policy `num_generations` times each, scored and shaped."""
        size = self.config.grpo.num_generations
        prompts = self.rollouts.prompts(self.progress.prompts, num_prompts)
        self.progress.prompts += num_prompts
        batch = [prompt for prompt in prompts for _ in range(size)]
        trajectory = self.rollouts.sample(batch, self.progress.step, recompute=self.updates.recomputes, part=part)
        scores = self.rollouts.score(batch, trajectory)
        return ScoredGroups(trajectory, scores, self.rollouts.shape(trajectory, scores, self.progress.moments), size)

    def compare(self, groups: ScoredGroups) -> Experience:
        """The advantage of every answer against its group, the KL paid before where it is paid in the reward."""
        trajectory, kl = groups.trajectory, self.config.kl
        reference_BR = self.rollouts.reference_logprobs(trajectory)
        with self.timer("advantage"):
            in_reward = self.progress.kl.coefficient if kl.place == "reward" else 0.0
            rewards_BR = token_rewards(trajectory, groups.shaped.scores_B, reference_BR, in_reward, kl.estimator_name)
            returns_NG = rewards_BR.sum(dim=1).view(-1, groups.group_size)
            advantages_B1 = GROUP_ADVANTAGES[self.config.grpo.advantage](returns_NG).view(-1, 1)
            mask_BR = trajectory.response_mask_BR
            advantages_BR = torch.where(mask_BR, advantages_B1, torch.zeros_like(rewards_BR))
            steps = self.rollouts.step_rewards(trajectory, groups.scores)
            if steps is not None:
                rewards_BR = rewards_BR + steps.rewards_BR
                advantages_BR = advantages_BR + process_advantages(steps.rewards_BR, steps.ends_BR, groups.group_size)
            return Experience(
                trajectory,
                reference_BR,
                rewards_BR,
                advantages_BR,
                torch.tensor(groups.scores.returns, device=mask_BR.device),
                (trajectory.logprobs_BR - reference_BR).sum(dim=1),
            )

    def loss(self, part: Experience) -> Callable[[Experience], LossOutput]:
        """The objective of a mini-batch: a function of its micro-batches that knows the counts of all of them."""
        num_tokens, num_sequences = part.trajectory.response_mask_BR.sum(), len(part)
        settings, kl = self.config.grpo, self.config.kl
        kl_coefficient = self.progress.kl.coefficient if kl.place == "loss" else 0.0

        def weights_B1(lengths_B: Tensor) -> Tensor:
            weigh, longest = LOSS_WEIGHTS[settings.loss_mean], self.config.generation.max_new_tokens
            return weigh(lengths_B, num_tokens, num_sequences, longest).unsqueeze(1)

        def of_micro_batch(micro: Experience) -> LossOutput:
            trajectory, mask_BR = micro.trajectory, micro.trajectory.response_mask_BR
            now = self.policy.response_statistics(
                trajectory.input_ids_BT,
                trajectory.attention_mask_BT,
                mask_BR,
                trajectory.temperature,
                trajectory.trees,
                entropy_gradient=settings.entropy_coef > 0,
            )
            weights = weights_B1(trajectory.lengths_B)
            log_ratio_BR = now.logprobs_BR - trajectory.logprobs_BR
            policy_term = policy_loss(
                log_ratio_BR,
                micro.advantages_BR,
                mask_BR,
                num_tokens,
                clip_low=settings.clip_range,
                clip_high=settings.clip_range_high or settings.clip_range,
                weights_B1=weights,
            )
            entropy_term = entropy_loss(now.entropy_BR, mask_BR, num_tokens, weights)
            total = policy_term.loss + settings.entropy_coef * entropy_term
            metrics = {
                "policy/loss": policy_term.loss.detach(),
                "policy/clip_fraction": policy_term.clip_fraction,
                "policy/entropy_in_update": -entropy_loss(now.entropy_BR, mask_BR, num_tokens).detach(),
            }
            if kl_coefficient > 0:
                to_reference_BR, estimator = now.logprobs_BR - micro.reference_logprobs_BR, kl.estimator_name
                kl_term = reference_kl_loss(to_reference_BR, mask_BR, num_tokens, KL_ESTIMATORS[estimator], weights)
                total = total + kl_coefficient * kl_term
                metrics["policy/kl_to_reference"] = kl_term.detach()
            sums, maxima = ratio_metrics(log_ratio_BR, mask_BR, num_tokens)
            return LossOutput(total, metrics | sums, maxima)

        return of_micro_batch


def run_grpo(config: GRPOConfig, resume: Path | None = None) -> Run:
    """Optimise a policy by comparing its answers with each other; it is in `<run>/policy`."""
    return launch(
        "grpo",
        config,
        prepare,
        train,
        settings=config.run,
        lineage=config.lineage,
        data_files=config.data.files(),
        resume=resume,
    )


def prepare(config: GRPOConfig, device: torch.device, rejected_rows: Path) -> OnlineParts:
    """Policy and reference on one base, the rewards, and the prompts."""
    return prepare_online(config, device, rejected_rows)


def train(config: GRPOConfig, run: Run, parts: OnlineParts) -> tuple[int, int]:
    """The algorithm, then the policy with its tokenizer into the run folder."""
    announce_online(config, run, parts)
    grpo = GRPO(config, run, parts)
    progress = grpo.train()
    if run.stop_reason != "interrupted":
        grpo.watch.conclude(progress)
        with run.timer("save"):
            save_policy(parts.policy.backbone, parts.policy.adapter, run.folder / POLICY)
    return grpo.updates.trainer.step_count, progress.tokens
