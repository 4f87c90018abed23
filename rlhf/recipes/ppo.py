"""Proximal policy optimisation against a reward, read from top to bottom:

    sample -> score -> shape rewards -> estimate advantages -> update -> report -> checkpoint

One frozen base carries policy, reference, value and reward (see `rlhf.models.backbone`). Log-probabilities and values
of the samples are kept from generation; the reference is asked once per rollout; the update makes several epochs of
mini-batches over the experience and ends early when the policy has moved far enough. A run can be taken up between any
two of them (see `rlhf.recipes.ppo_state`).

Left out on purpose: a pre-training loss mixed in (PPO-ptx), an exponential average of the weights, critic warm-up.
Legend: B sequences, R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from rlhf.algo.advantages import gae
from rlhf.algo.kl import MAX_LOG_RATIO, KLController
from rlhf.algo.masked import masked_sum, masked_whiten
from rlhf.algo.ppo_loss import entropy_loss, kl_from_old, policy_loss, value_loss
from rlhf.algo.trainer import LossOutput, Trainer
from rlhf.data.chat import ChatEncoder
from rlhf.data.collate import batches_by_tokens
from rlhf.data.order import epoch_order
from rlhf.data.prompt_dataset import PromptDataset, PromptExample, gather_columns
from rlhf.infra.determinism import derive_seed, seed_everything
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.infra.profiling import PhaseTimer
from rlhf.models.decoding import text_before_stop
from rlhf.models.policy import Policy
from rlhf.models.reference import Reference
from rlhf.recipes.launch import launch
from rlhf.recipes.nonfinite import NonFiniteGuard
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.ppo_report import PPOReport
from rlhf.recipes.ppo_state import Progress, Rollout, load_state, save_state
from rlhf.recipes.sft import announce
from rlhf.recipes.stages import POLICY, build_reward, save_policy, start_policy
from rlhf.rewards.detectors import refusal_flags, repetition_share
from rlhf.rewards.protocol import CombinedReward, Scores
from rlhf.rewards.shaping import RunningMoments, ShapedScores, shape_scores, token_rewards
from rlhf.rollout.sampler import Sampler
from rlhf.rollout.trajectory import Experience, Trajectory

# Mean abs(ratio - 1) before the first update above which generation's log-probs are no longer taken for the trainer's.
# Rounding alone stays far below it: 1e-6 in fp32, a few thousandths in bf16 (checklist P1).
MAX_LOGPROB_GAP = 0.02


class PPO:
    """The algorithm over its parts; `train` is the whole of it."""

    def __init__(
        self,
        config: PPOConfig,
        run: Run,
        policy: Policy,
        reference: Reference,
        reward: CombinedReward,
        prompts: Sequence[PromptExample],
        encoder: ChatEncoder,
    ) -> None:
        if not prompts:
            raise UserError("there is no prompt to sample answers for; give a prompt set with at least one row")
        self.config, self.run, self.policy, self.reference = config, run, policy, reference
        self.reward, self.prompts, self.encoder = reward, prompts, encoder
        self.sampler = Sampler(policy, config.generation, encoder.stop_token_ids)
        self.trainer = Trainer(
            policy.trainable_parameters(),
            config.optimizer,
            config.num_optimizer_steps,
            scale_loss=config.run.dtype == "fp16",
        )
        self.progress = Progress(0, KLController.from_config(config.kl), RunningMoments())
        self.timer = PhaseTimer(run.device)
        self.report = PPOReport(run, self.timer)
        self.guard = NonFiniteGuard(run, self.trainer)
        if run.resumed_from is not None:
            load_state(run.resumed_from, self.trainer, self.progress, policy.backbone.device)

    def train(self) -> Progress:
        """Iterate to the end or to a stop request.

        Raises:
            NonFiniteError: too many updates in a row were not finite; the last good weights are in a checkpoint.
        """
        total = self.config.ppo.num_iterations
        with self.run.logger.progress("PPO", total) as advance:
            advance(self.progress.step)
            while self.progress.step < total:
                if self.progress.rollout is None:  # it is there when the run was stopped inside its inner epochs
                    batch = self.next_prompts()
                    trajectory = self.sample(batch)
                    scores = self.score(batch, trajectory)
                    shaped = self.shape(batch, trajectory, scores)
                    experience = self.estimate_advantages(trajectory, scores, shaped)
                    self.progress.rollout = Rollout(experience, scores, shaped)
                rollout, updates = self.progress.rollout, self.progress.updates
                self.update(rollout.experience)
                self.progress = self.advanced(rollout.experience)
                self.report.log(self.progress, rollout, updates, self.trainer)
                advance(1, reward=self.report.last["reward/mean"], kl=self.report.last["kl/mean"])
                stopping = self.run.should_stop()
                if stopping or self.run.checkpoint_due(self.progress.step) or self.progress.step == total:
                    self.save()
                if stopping:
                    break
        return self.progress

    def next_prompts(self) -> list[PromptExample]:
        """The prompts of this iteration: epochs over the set in an order that only seed and step decide."""
        size, wanted = self.config.ppo.rollout_batch_size, []
        for position in range(self.progress.step * size, (self.progress.step + 1) * size):
            epoch, place = divmod(position, len(self.prompts))
            wanted.append(self.prompts[epoch_order(len(self.prompts), self.run.config.seed, epoch)[place]])
        return wanted

    def sample(self, batch: Sequence[PromptExample]) -> Trajectory:
        """Answers by the current policy, with log-probabilities and values from the forward that drew them."""
        seed_everything(derive_seed(self.run.config.seed, "ppo", self.progress.step))
        with self.timer("generate"):
            self.sampler.weights_version = self.progress.step
            prompt_ids = [example.prompt_ids for example in batch]
            trajectory = self.sampler.sample(
                prompt_ids, derive_seed(self.run.config.seed, "rollout", self.progress.step)
            )
            if self.recomputes or trajectory.values_BR is None:
                trajectory = self.recomputed(trajectory)
        return trajectory

    @property
    def recomputes(self) -> bool:
        """Whether old log-probs come from the trainer's forward: when asked for, or once generation's were far off."""
        return self.config.ppo.recompute_logprobs or self.progress.recompute

    def score(self, batch: Sequence[PromptExample], trajectory: Trajectory) -> Scores:
        """What the rewards say of every answer."""
        with self.timer("score"):
            columns = gather_columns(batch) | {
                "prompt_ids": trajectory.prompts(),
                "completion_ids": trajectory.responses(),
                "finished": trajectory.finished_B.tolist(),
            }
            return self.reward([example.prompt for example in batch], self.texts(trajectory), columns)

    def texts(self, trajectory: Trajectory) -> list[str]:
        """The answers as rewards and people read them: without special tokens and stop strings."""
        stop = self.config.generation.stop
        return [text_before_stop(text, stop) for text in self.encoder.decode_batch(trajectory.responses())]

    def shape(self, batch: Sequence[PromptExample], trajectory: Trajectory, scores: Scores) -> ShapedScores:
        """Normalise and clip the scores, subtract the penalties."""
        completions = self.texts(trajectory)
        device = trajectory.response_ids_BR.device
        return shape_scores(
            torch.tensor(scores.total, device=device),
            trajectory,
            self.config.shaping,
            self.progress.moments,
            torch.tensor([repetition_share(text) for text in completions], device=device),
            torch.tensor(refusal_flags(completions), device=device),
        )

    def estimate_advantages(self, trajectory: Trajectory, scores: Scores, shaped: ShapedScores) -> Experience:
        """KL against the reference into the reward, then GAE, and whitening over the whole batch."""
        with self.timer("reference"):
            reference_BR = self._in_micro_batches(trajectory, self._reference_logprobs)
        with self.timer("advantage"):
            settings, mask_BR = self.config.ppo, trajectory.response_mask_BR
            rewards_BR = token_rewards(
                trajectory, shaped.scores_B, reference_BR, self.progress.kl.coefficient, self.config.kl.estimator
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
                values_BR,
                advantages_BR,
                estimated.returns_BR,
                torch.tensor(scores.total, device=mask_BR.device),
                (trajectory.logprobs_BR - reference_BR).sum(dim=1),
            )

    def update(self, experience: Experience) -> None:
        """Epochs of mini-batches; the rest is left out once the mean k3 estimate of KL(old, new) passes the bound.

        Those that were done before the run was interrupted are in `progress.updates` and are not done again.
        """
        bound, every, done = self.config.ppo.target_kl, self.config.ppo.save_every_updates, self.progress.updates
        mini_batches = self._mini_batches(len(experience))
        for mini in mini_batches[len(done) :]:
            part = experience.select(mini)
            with self.timer("update"):
                micro_batches, loss = self._micro_batches(part), self._loss(part)
                done.append(self.trainer.step(micro_batches, loss))
            if done[-1].skipped:
                self.guard.examine(done[-1], micro_batches, loss)
            if self.trainer.exhausted:
                self.save()
            self.guard.stop_if_exhausted()
            if bound is not None and done[-1].metrics["policy/kl_old_new"] > bound:
                return
            if every is not None and len(done) % every == 0 and len(done) < len(mini_batches):
                self.save()

    def _mini_batches(self, num_rows: int) -> list[Tensor]:
        """Row numbers of every update of an iteration, in order."""
        settings, device = self.config.ppo, self.policy.backbone.device
        seed = derive_seed(self.run.config.seed, "mini", self.progress.step)
        orders = [epoch_order(num_rows, seed, epoch) for epoch in range(settings.num_ppo_epochs)]
        return [
            mini
            for order in orders
            for mini in torch.tensor(order, device=device).tensor_split(settings.num_mini_batches)
        ]

    def _loss(self, part: Experience) -> Callable[[Experience], LossOutput]:
        num_tokens = part.trajectory.response_mask_BR.sum()
        settings = self.config.ppo

        def loss(micro: Experience) -> LossOutput:
            trajectory, mask_BR = micro.trajectory, micro.trajectory.response_mask_BR
            now = self.policy.response_statistics(
                trajectory.input_ids_BT,
                trajectory.attention_mask_BT,
                mask_BR,
                trajectory.temperature,
                entropy_gradient=settings.entropy_coef > 0,
            )
            assert now.values_BR is not None
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
            apart_BR = log_ratio_BR.detach()
            deviation_BR = (apart_BR.exp() - 1).abs().where(mask_BR, 0.0)
            total = policy_term.loss + settings.vf_coef * value_term.loss + settings.entropy_coef * entropy_term
            metrics = {
                "policy/loss": policy_term.loss.detach(),
                "policy/clip_fraction": policy_term.clip_fraction,
                "policy/kl_old_new": kl_from_old(log_ratio_BR, mask_BR, num_tokens),
                "policy/ratio_deviation": deviation_BR.sum() / num_tokens,
                "policy/clamped_share": masked_sum((apart_BR.abs() > MAX_LOG_RATIO).float(), mask_BR) / num_tokens,
                "policy/entropy_in_update": -entropy_term.detach(),
                "value/loss": value_term.loss.detach(),
                "value/clip_fraction": value_term.clip_fraction,
            }
            return LossOutput(total, metrics, {"policy/ratio_deviation_max": deviation_BR.max()})

        return loss

    def _micro_batches(self, part: Experience) -> list[Experience]:
        lengths = part.trajectory.attention_mask_BT.sum(dim=1).tolist()
        groups = batches_by_tokens(lengths, self.config.ppo.max_tokens_per_micro_batch)
        return [part.select(torch.tensor(group, device=part.scores_B.device)) for group in groups]

    def advanced(self, experience: Experience) -> Progress:
        """The state after this iteration: the KL coefficient follows the batch just measured, where that has a KL."""
        mean_kl, tokens = float(experience.kl_B.mean()), int(experience.trajectory.response_mask_BR.sum())
        gap = self.progress.updates[0].metrics["policy/ratio_deviation"]
        if gap > MAX_LOGPROB_GAP and not self.recomputes:
            self.run.logger.info(
                f"log-probs of generation and training differ: before the first update abs(ratio - 1) was {gap:.3f} in "
                f"the mean, above {MAX_LOGPROB_GAP}; from here on they are recomputed, which costs a forward pass"
            )
        return replace(
            self.progress,
            step=self.progress.step + 1,
            kl=self.progress.kl.updated(mean_kl, len(experience)) if isfinite(mean_kl) else self.progress.kl,
            tokens=self.progress.tokens + tokens,
            first_length=self.progress.first_length or float(experience.trajectory.lengths_B.float().mean()),
            recompute=self.progress.recompute or gap > MAX_LOGPROB_GAP,
            rollout=None,
            updates=[],
        )

    def save(self) -> None:
        """A checkpoint of this very place."""
        with self.timer("save"):
            save_state(self.run, self.trainer, self.progress)

    @torch.no_grad()
    def recomputed(self, trajectory: Trajectory) -> Trajectory:
        """Old log-probabilities and values from one forward of the trainer instead of generation's."""

        def statistics(part: Trajectory) -> Tensor:
            now = self.policy.response_statistics(
                part.input_ids_BT, part.attention_mask_BT, part.response_mask_BR, part.temperature
            )
            assert now.values_BR is not None
            return torch.stack([now.logprobs_BR, now.values_BR])

        logprobs_BR, values_BR = self._in_micro_batches(trajectory, statistics)
        if not self.recomputes:
            logprobs_BR = trajectory.logprobs_BR
        return replace(trajectory, logprobs_BR=logprobs_BR, values_BR=values_BR)

    def _reference_logprobs(self, part: Trajectory) -> Tensor:
        return self.reference.logprobs(
            part.input_ids_BT, part.attention_mask_BT, part.response_mask_BR, part.temperature
        )

    @torch.no_grad()
    def _values_after_end(self, trajectory: Trajectory) -> Tensor:
        """V of the state after the last token (B,), 0 for answers that ended by themselves."""

        def after(part: Trajectory) -> Tensor:
            last_B = part.prompt_ids_BP.shape[1] + part.lengths_B - 1
            return self.policy.values_after(part.input_ids_BT, part.attention_mask_BT, last_B).unsqueeze(1)

        return torch.where(trajectory.finished_B, 0.0, self._in_micro_batches(trajectory, after)[:, 0])

    def _in_micro_batches(self, trajectory: Trajectory, function: Callable[[Trajectory], Tensor]) -> Tensor:
        """Of passes without gradients, which take twice the tokens."""
        return trajectory.in_parts(2 * self.config.ppo.max_tokens_per_micro_batch, function)


@dataclass(frozen=True)
class PPOParts:
    """Models, reward and prompts, loaded and found usable."""

    policy: Policy
    reference: Reference
    reward: CombinedReward
    prompts: PromptDataset
    encoder: ChatEncoder


def run_ppo(config: PPOConfig, resume: Path | None = None) -> Run:
    """Optimise a policy against rewards; it is in `<run>/policy`."""
    lineage = {"policy": config.policy} | ({"reward_model": config.reward_model} if config.reward_model else {})
    return launch(
        "ppo",
        config,
        prepare,
        train,
        settings=config.run,
        lineage=lineage,
        data_files=config.data.files(),
        resume=resume,
    )


def prepare(config: PPOConfig, device: torch.device, rejected_rows: Path) -> PPOParts:
    """Policy, reference and critic on one base, the rewards, and the prompts."""
    start = start_policy(
        config.policy, config.model, config.run, device, config.ppo.value_head, config.ppo.value_adapter
    )
    backbone = start.policy.backbone
    encoder = ChatEncoder(backbone.tokenizer, config.data.system_prompt)
    prompts, _ = PromptDataset.load(config.data, encoder, rejected_rows)
    reward = build_reward(
        config.rewards, config.reward_model, config.run.output_dir, backbone, config.data.system_prompt
    )
    # Loading a reward adapter onto the shared base must not leave it trainable.
    if start.policy.adapter is not None:
        backbone.train_only(
            [start.policy.adapter, *([start.policy.value_adapter] if start.policy.value_adapter else [])]
        )
    return PPOParts(start.policy, start.reference, reward, prompts, encoder)


def train(config: PPOConfig, run: Run, parts: PPOParts) -> tuple[int, int]:
    """The algorithm, then the policy with its tokenizer into the run folder."""
    announce(run, parts.policy.backbone, str(parts.prompts.report))
    if config.generation.top_p < 1 or config.generation.top_k:
        run.logger.info(
            "top_p or top_k cuts the distribution that answers are drawn from, but they are scored with the whole one: "
            "the ratios are biased by policy/truncated_mass"
        )
    ppo = PPO(config, run, parts.policy, parts.reference, parts.reward, parts.prompts.examples, parts.encoder)
    progress = ppo.train()
    if run.stop_reason != "interrupted":
        save_policy(parts.policy.backbone, parts.policy.adapter, run.folder / POLICY)
    return ppo.trainer.step_count, progress.tokens
