"""Proximal policy optimisation against a reward, read from top to bottom:

    sample -> score -> shape rewards -> estimate advantages -> update -> report -> checkpoint

One frozen base carries policy, reference, value and reward (see `rlhf.models.backbone`). Log-probabilities and values
of the samples are kept from generation; the reference is asked once per rollout; the update makes several epochs of
mini-batches over the experience and ends early when the policy has moved far enough. A run can be taken up between any
two of them (see `rlhf.recipes.online_state`). How answers are drawn and scored is in `rlhf.recipes.rollouts`, how
optimizer steps are made of experience in `rlhf.recipes.updates`; both serve GRPO as well.

Left out on purpose: a pre-training loss mixed in (PPO-ptx), an exponential average of the weights, critic warm-up.
Legend: B sequences, R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf.algo.advantages import gae
from rlhf.algo.kl import KLController
from rlhf.algo.masked import masked_whiten
from rlhf.algo.ppo_loss import entropy_loss, policy_loss, value_loss
from rlhf.algo.trainer import LossOutput
from rlhf.data.prompt_dataset import PromptExample
from rlhf.infra.experiment import Run
from rlhf.recipes.launch import launch
from rlhf.recipes.online_report import OnlineReport
from rlhf.recipes.online_state import Progress, Rollout
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.rollouts import OnlineParts, Rollouts, announce_online, prepare_online
from rlhf.recipes.stages import POLICY, save_policy
from rlhf.recipes.updates import Updates, ratio_metrics
from rlhf.recipes.watch import Watch
from rlhf.rewards.protocol import Scores
from rlhf.rewards.shaping import RunningMoments, ShapedScores, token_rewards
from rlhf.rollout.passes import passes
from rlhf.rollout.trajectory import Experience, Trajectory


class PPO:
    """The algorithm over its parts; `train` is the whole of it."""

    def __init__(self, config: PPOConfig, run: Run, parts: OnlineParts) -> None:
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
        total = self.config.ppo.num_iterations
        with self.run.logger.progress("PPO", total) as advance:
            advance(self.progress.step)
            while self.progress.step < total:
                with self.run.profiler(self.progress.step + 1):
                    if self.progress.rollout is None:  # it is there when the run was stopped inside its inner epochs
                        batch = self.next_prompts()
                        trajectory = self.sample(batch)
                        scores = self.rollouts.score(batch, trajectory)
                        shaped = self.rollouts.shape(trajectory, scores, self.progress.moments)
                        experience = self.estimate_advantages(trajectory, scores, shaped)
                        self.progress.rollout = Rollout(experience, scores, shaped)
                        self.watch.look(self.progress, self.progress.rollout)
                    rollout, made = self.progress.rollout, self.progress.updates
                    self.update(rollout.experience)
                    self.updates.finish_iteration(rollout)
                    self.report.log(self.progress, rollout, made, self.updates.trainer)
                advance(1, reward=self.report.last["reward/mean"], kl=self.report.last["kl/mean"])
                if self.updates.stops():
                    break
        return self.progress

    def next_prompts(self) -> list[PromptExample]:
        """The prompts of this iteration: epochs over the set in an order that only seed and step decide."""
        size = self.config.ppo.rollout_batch_size
        return self.rollouts.prompts(self.progress.step * size, size)

    def sample(self, batch: Sequence[PromptExample]) -> Trajectory:
        """Answers by the current policy, with log-probabilities and values from the forward that drew them."""
        return self.rollouts.sample(batch, self.progress.step, recompute=self.updates.recomputes)

    def estimate_advantages(self, trajectory: Trajectory, scores: Scores, shaped: ShapedScores) -> Experience:
        """KL against the reference into the reward, then GAE, and whitening over the whole batch."""
        reference_BR = self.rollouts.reference_logprobs(trajectory)
        with self.timer("advantage"):
            settings, mask_BR = self.config.ppo, trajectory.response_mask_BR
            steps = self.rollouts.step_rewards(trajectory, scores)
            rewards_BR = token_rewards(
                trajectory,
                shaped.scores_B,
                reference_BR,
                self.progress.kl.coefficient,
                self.config.kl.estimator,
                None if steps is None else steps.rewards_BR,
            )
            if settings.whiten_rewards:
                rewards_BR = masked_whiten(rewards_BR, mask_BR, subtract_mean=False)
            values_BR = trajectory.values_BR
            assert values_BR is not None
            bootstrap_B = self._values_after_end(trajectory) if settings.bootstrap_truncated else None
            estimated = gae(
                rewards_BR, values_BR, mask_BR, gamma=settings.gamma, lam=settings.lam, bootstrap_values_B=bootstrap_B
            )
            advantages_BR = estimated.advantages_BR
            if settings.whiten_advantages:
                advantages_BR = masked_whiten(advantages_BR, mask_BR)
            return Experience(
                trajectory,
                reference_BR,
                rewards_BR,
                advantages_BR,
                torch.tensor(scores.returns, device=mask_BR.device),
                (trajectory.logprobs_BR - reference_BR).sum(dim=1),
                values_BR,
                estimated.returns_BR,
            )

    def update(self, experience: Experience) -> None:
        """Epochs of mini-batches by `Updates.make`."""
        self.updates.make(experience, self.config.ppo.num_ppo_epochs, self.loss)

    def loss(self, part: Experience) -> Callable[[Experience], LossOutput]:
        """The objective of a mini-batch: a function of its micro-batches that knows how many tokens they are in all."""
        num_tokens = part.trajectory.response_mask_BR.sum()
        settings = self.config.ppo

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
            assert now.values_BR is not None and micro.values_BR is not None and micro.returns_BR is not None
            log_ratio_BR = now.logprobs_BR - trajectory.logprobs_BR
            policy_term = policy_loss(
                log_ratio_BR,
                micro.advantages_BR,
                mask_BR,
                num_tokens,
                clip_low=settings.clip_range,
                clip_high=settings.clip_range_high or settings.clip_range,
            )
            value_term = value_loss(
                now.values_BR, micro.values_BR, micro.returns_BR, mask_BR, num_tokens, settings.clip_range_value
            )
            entropy_term = entropy_loss(now.entropy_BR, mask_BR, num_tokens)
            total = policy_term.loss + settings.vf_coef * value_term.loss + settings.entropy_coef * entropy_term
            sums, maxima = ratio_metrics(log_ratio_BR, mask_BR, num_tokens)
            metrics = {
                "policy/loss": policy_term.loss.detach(),
                "policy/clip_fraction": policy_term.clip_fraction,
                "policy/entropy_in_update": -entropy_term.detach(),
                "value/loss": value_term.loss.detach(),
                "value/clip_fraction": value_term.clip_fraction,
            }
            return LossOutput(total, metrics | sums, maxima)

        return of_micro_batch

    @torch.no_grad()
    def _values_after_end(self, trajectory: Trajectory) -> Tensor:
        """V of the state after the last token (B,), 0 for answers that ended by themselves."""

        def after(part: Trajectory) -> Tensor:
            last_B = part.prompt_ids_BP.shape[1] + part.lengths_B - 1
            return self.policy.values_after(part.input_ids_BT, part.attention_mask_BT, last_B).unsqueeze(1)

        together = passes(trajectory, self.policy.backbone, self.rollouts.max_tokens, share_prompts=False)
        return torch.where(trajectory.finished_B, 0.0, trajectory.in_passes(together, after)[:, 0])


def run_ppo(config: PPOConfig, resume: Path | None = None) -> Run:
    """Optimise a policy against rewards; it is in `<run>/policy`."""
    return launch(
        "ppo",
        config,
        prepare,
        train,
        settings=config.run,
        lineage=config.lineage,
        data_files=config.data.files(),
        resume=resume,
    )


def prepare(config: PPOConfig, device: torch.device, rejected_rows: Path) -> OnlineParts:
    """Policy, reference and critic on one base, the rewards, and the prompts."""
    return prepare_online(config, device, rejected_rows, config.ppo.value_head, config.ppo.value_adapter)


def train(config: PPOConfig, run: Run, parts: OnlineParts) -> tuple[int, int]:
    """The algorithm, then the policy with its tokenizer into the run folder."""
    announce_online(config, run, parts)
    ppo = PPO(config, run, parts)
    progress = ppo.train()
    if run.stop_reason != "interrupted":
        ppo.watch.conclude(progress)
        with run.timer("save"):
            save_policy(parts.policy.backbone, parts.policy.adapter, run.folder / POLICY)
    return ppo.updates.trainer.step_count, progress.tokens
