"""From prompts to scored answers: what every recipe that samples does before anything is learnt.

`Answers` draws them by the current policy and asks the rewards and the reference about them; `Rollouts`, of PPO and
GRPO, has the quantities that an update needs besides, and shapes the scores.
What is drawn is a function of weights, seed, step and prompts, so nothing here needs to be in a checkpoint.
Legend: B sequences, R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rlhf.data.chat import ChatEncoder
from rlhf.data.order import epoch_order
from rlhf.data.prompt_dataset import PromptDataset, PromptExample, gather_columns
from rlhf.infra.determinism import derive_seed, seed_everything
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.infra.profiling import PhaseTimer
from rlhf.models.decoding import text_before_stop
from rlhf.models.policy import Policy
from rlhf.models.reference import Reference
from rlhf.recipes.online_config import OnlineConfig, SamplingConfig
from rlhf.recipes.sft import announce
from rlhf.recipes.stages import build_reward, start_policy
from rlhf.rewards.detectors import refusal_flags, repetition_share
from rlhf.rewards.learned import SCORING_TOKENS
from rlhf.rewards.process import StepRewards, step_rewards
from rlhf.rewards.protocol import CombinedReward, Scores
from rlhf.rewards.shaping import RunningMoments, ShapedScores, shape_scores
from rlhf.rewards.verifiers import check_columns
from rlhf.rollout.passes import passes
from rlhf.rollout.sampler import Sampler
from rlhf.rollout.trajectory import Trajectory


@dataclass(frozen=True)
class OnlineParts:
    """Models, reward and prompts, loaded and found usable; `report` says which rows became prompts.

    `reward` is None where a judge compares the answers instead.
    `held_out` are prompts that are never learnt from.
    """

    policy: Policy
    reference: Reference
    reward: CombinedReward | None
    prompts: Sequence[PromptExample]
    encoder: ChatEncoder
    report: str = ""
    held_out: Sequence[PromptExample] = ()


def prepare_online(
    config: SamplingConfig,
    device: torch.device,
    rejected_rows: Path,
    value_head: Literal["linear", "mlp"] | None = None,
    value_adapter: bool = False,
    reference: str | None = None,
) -> OnlineParts:
    """Policy, reference and (where asked for) critic on one base, the rewards, and the prompts."""
    start = start_policy(config.policy, config.model, config.run, device, value_head, value_adapter, reference)
    backbone = start.policy.backbone
    encoder = ChatEncoder(backbone.tokenizer, config.data.system_prompt)
    prompts, held_out = PromptDataset.load(config.data, encoder, rejected_rows)
    reward, notes = None, []
    if config.rewards:
        reward = build_reward(
            config.rewards,
            config.reward_model,
            config.run.output_dir,
            backbone,
            config.data.system_prompt,
            config.process_model,
            config.combination,
        )
        notes = check_columns(reward.terms, [prompt.columns for prompt in prompts.examples])
    # Loading a reward adapter onto the shared base must not leave it trainable.
    if start.policy.adapter is not None:
        backbone.train_only(
            [start.policy.adapter, *([start.policy.value_adapter] if start.policy.value_adapter else [])]
        )
    report = "; ".join([str(prompts.report), *notes])
    return OnlineParts(
        start.policy, start.reference, reward, prompts.examples, encoder, report, held_out.examples if held_out else ()
    )


def announce_online(config: SamplingConfig, run: Run, parts: OnlineParts) -> None:
    """Say what was loaded, and warn where samples are not drawn from the distribution that they are scored with."""
    announce(run, parts.policy.backbone, parts.report)
    if config.generation.top_p < 1 or config.generation.top_k:
        run.logger.info(
            "top_p or top_k cuts the distribution that answers are drawn from, but they are scored with the whole one: "
            "the ratios are biased by policy/truncated_mass"
        )


class Answers:
    """Answers by a policy to an endless stream of prompts, and what rewards and reference say of them."""

    def __init__(
        self, config: SamplingConfig, run: Run, parts: OnlineParts, timer: PhaseTimer, max_tokens: int = SCORING_TOKENS
    ) -> None:
        """`max_tokens`: of one pass without gradients."""
        if not parts.prompts:
            raise UserError("there is no prompt to sample answers for; give a prompt set with at least one row")
        self.run, self.parts, self.timer, self.max_tokens = run, parts, timer, max_tokens
        self.generation = config.generation
        self.sampler = Sampler(parts.policy, config.generation, parts.encoder.stop_token_ids)

    def prompts(self, start: int, count: int) -> list[PromptExample]:
        """Prompts number `start` and following: epochs over the set, each in an order that only the seed decides."""
        prompts, wanted = self.parts.prompts, []
        for position in range(start, start + count):
            epoch, place = divmod(position, len(prompts))
            wanted.append(prompts[epoch_order(len(prompts), self.run.config.seed, epoch)[place]])
        return wanted

    def draw(self, batch: Sequence[PromptExample], *names: int) -> Trajectory:
        """Answers with the log-probabilities of the forward that drew them; `names` tell this draw from others."""
        seed = self.run.config.seed
        seed_everything(derive_seed(seed, self.run.info["recipe"], *names))
        with self.timer("generate"):
            return self.sampler.sample([example.prompt_ids for example in batch], derive_seed(seed, "rollout", *names))

    def score(self, batch: Sequence[PromptExample], trajectory: Trajectory) -> Scores:
        """What the rewards say of every answer."""
        assert self.parts.reward is not None
        with self.timer("score"):
            columns = gather_columns(batch) | {
                "prompt_ids": trajectory.prompts(),
                "completion_ids": trajectory.responses(),
                "finished": trajectory.finished_B.tolist(),
            }
            return self.parts.reward([example.prompt for example in batch], self.texts(trajectory), columns)

    def step_rewards(self, trajectory: Trajectory, scores: Scores) -> StepRewards | None:
        """What the rewards pay where steps end; None where all of them are paid once per answer."""
        if not self.parts.reward.is_stepwise:
            return None
        return step_rewards(scores.by_step, trajectory, self.parts.encoder.decode)

    def texts(self, trajectory: Trajectory) -> list[str]:
        """The answers as rewards and people read them: without special tokens and stop strings."""
        texts = self.parts.encoder.decode_batch(trajectory.responses())
        return [text_before_stop(text, self.generation.stop) for text in texts]

    def reference_logprobs(self, trajectory: Trajectory) -> Tensor:
        """Log-probabilities (B, R) of the answers under the reference."""

        def of_part(part: Trajectory) -> Tensor:
            return self.parts.reference.logprobs(
                part.input_ids_BT, part.attention_mask_BT, part.response_mask_BR, part.temperature, part.trees
            )

        with self.timer("reference"):
            backbone = self.parts.reference.backbone
            return trajectory.in_passes(passes(trajectory, backbone, self.max_tokens), of_part)


class Rollouts(Answers):
    """Answers by the policy as it learns, their scores shaped."""

    def __init__(self, config: OnlineConfig, run: Run, parts: OnlineParts, timer: PhaseTimer) -> None:
        # Passes without gradients take twice the tokens.
        super().__init__(config, run, parts, timer, 2 * config.updates.max_tokens_per_micro_batch)
        self.shaping = config.shaping

    def sample(self, batch: Sequence[PromptExample], step: int, *, recompute: bool, part: int = 0) -> Trajectory:
        """Answers with log-probabilities and values from the forward that drew them, or from one of the trainer's.

        A prompt that stands in the batch several times gets as many different answers. `part` numbers the batches of
        one step: the same prompt in another part gets others again.
        """
        self.sampler.weights_version = step
        trajectory = self.draw(batch, *([step, part] if part else [step]))
        lacks_values = self.parts.policy.value_head is not None and trajectory.values_BR is None
        if recompute or lacks_values:
            with self.timer("generate"):
                trajectory = self.recomputed(trajectory, logprobs=recompute)
        return trajectory

    def shape(self, trajectory: Trajectory, scores: Scores, moments: RunningMoments) -> ShapedScores:
        """Normalise and clip the scores, subtract the penalties; `moments` take the scores in."""
        device = trajectory.response_ids_BR.device
        with self.timer("score"):
            completions = self.texts(trajectory)
            return shape_scores(
                torch.tensor(scores.total, device=device),
                trajectory,
                self.shaping,
                moments,
                torch.tensor([repetition_share(text) for text in completions], device=device),
                torch.tensor(refusal_flags(completions), device=device),
                self.generation.max_new_tokens,
            )

    @torch.no_grad()
    def recomputed(self, trajectory: Trajectory, *, logprobs: bool) -> Trajectory:
        """Values, and with `logprobs` the old log-probabilities too, from one forward of the trainer."""

        def statistics(part: Trajectory) -> Tensor:
            now = self.parts.policy.response_statistics(
                part.input_ids_BT, part.attention_mask_BT, part.response_mask_BR, part.temperature, part.trees
            )
            return torch.stack([now.logprobs_BR] if now.values_BR is None else [now.logprobs_BR, now.values_BR])

        found = trajectory.in_passes(passes(trajectory, self.parts.policy.backbone, self.max_tokens), statistics)
        return replace(
            trajectory,
            logprobs_BR=found[0] if logprobs else trajectory.logprobs_BR,
            values_BR=found[1] if len(found) > 1 else None,
        )
