"""Which checks PPO and GRPO get: on prompts, on a real rollout, on policy against reference, on the reward model.

The policy is checked even where the reward model cannot be loaded: it is then prepared with a rule in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from rlhf.data.chat import TokenExample, join
from rlhf.data.collate import Batch
from rlhf.data.prompt_dataset import PromptDataset, PromptExample
from rlhf.eval.doctor import model_checks, reward_checks, token_checks
from rlhf.eval.doctor.finding import Finding
from rlhf.infra.determinism import derive_seed
from rlhf.models.backbone import positions_from_mask
from rlhf.models.reward_model import AnyReward
from rlhf.recipes.doctor_stages import START
from rlhf.recipes.doctor_subject import NUM_PASSES, Subject, drop_adapters, sampled
from rlhf.recipes.grpo import prepare as prepare_grpo
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.online_config import OnlineConfig
from rlhf.recipes.ppo import prepare as prepare_ppo
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.rollouts import OnlineParts
from rlhf.recipes.stages import load_term_model
from rlhf.rewards.learned import LearnedReward
from rlhf.rewards.protocol import RewardTermConfig
from rlhf.rollout.sampler import Sampler
from rlhf.rollout.trajectory import Trajectory

OnlineConfigT = TypeVar("OnlineConfigT", bound=OnlineConfig)
REWARD = "reward"  # the adapter name under which a reward model is loaded
_NUM_PROMPTS, _MAX_NEW_TOKENS = 16, 64


def examine_ppo(config: PPOConfig, device: torch.device, scratch: Path, stand_in: bool = False) -> Iterator[Finding]:
    """Prompts, rollout, ratio, reference, reward model and learning rate of PPO.

    `stand_in`: the policy has not learnt yet what it will know when the run starts, such as to stop.
    """
    yield from _examine("PPO", config, lambda small, rows: prepare_ppo(small, device, rows), scratch, stand_in)


def examine_grpo(config: GRPOConfig, device: torch.device, scratch: Path) -> Iterator[Finding]:
    """The same of GRPO, which has no critic."""
    yield from _examine("GRPO", config, lambda small, rows: prepare_grpo(small, device, rows), scratch)


def _examine(
    name: str,
    config: OnlineConfigT,
    prepare: Callable[[OnlineConfigT, Path], OnlineParts],
    scratch: Path,
    stand_in: bool = False,
) -> Iterator[Finding]:
    subject = Subject.open(config.policy, config.model, config.data, config.run.output_dir, scratch, "prompts")
    prompts, finding = subject.within_length(
        PromptDataset, config.data, _num_ids, "max_prompt_length", config.generation.max_new_tokens
    )
    yield finding
    yield subject.bos(name, [prompt.prompt_ids for prompt in prompts])
    parts = prepare(_without_reward_model(config), scratch / "rejected.jsonl")
    yield START.green(f"{parts.policy.backbone.name}; {parts.report}")
    rollout = Rollout(config, parts, subject)
    yield from rollout.findings(stand_in)
    if any(term.is_learned for term in config.rewards):
        yield from rollout.reward_findings()
    yield model_checks.learning_rate_moves_weights(
        parts.policy.trainable_parameters(), config.optimizer, config.num_optimizer_steps, config.run.dtype
    )


class Rollout:
    """A small rollout by the recipe's own sampler, and what can be said of it."""

    def __init__(self, config: OnlineConfig, parts: OnlineParts, subject: Subject) -> None:
        self.config, self.parts, self.subject = config, parts, subject
        self.stops = parts.encoder.stop_token_ids
        self.batch = subject.spread(parts.prompts, _num_ids, _NUM_PROMPTS)
        self.prompts = [prompt.prompt_ids for prompt in self.batch]
        self.trajectory = self.sample(self.prompts)

    def sample(self, prompts: Sequence[Sequence[int]], stops: Sequence[int] | None = None) -> Trajectory:
        """Answers as the recipe draws them, of a length that takes no time; `stops` end them in place of its own."""
        settings = self.config.generation
        short = settings.model_copy(update={"max_new_tokens": min(settings.max_new_tokens, _MAX_NEW_TOKENS)})
        sampler = Sampler(self.parts.policy, short, stops or self.stops)
        return sampler.sample(prompts, derive_seed(self.config.run.seed, "doctor"))

    def findings(self, stand_in: bool) -> Iterator[Finding]:
        """Everything about policy and reference; see `examine_ppo` for `stand_in`."""
        policy, reference, trajectory = self.parts.policy, self.parts.reference, self.trajectory
        knows = 1.0 if stand_in else model_checks.stop_probability(policy, trajectory, self.stops)
        template = self.subject.tokenizer if self.subject.is_chat else None
        yield token_checks.samples_end_at_a_stop(trajectory, self.stops, knows, policy.backbone.vocab_size, template)
        yield token_checks.end_in_prompt_changes_no_rollout(self.sample, self.prompts, self.stops)
        yield self.padding()
        rows = _as_examples(trajectory)
        yield model_checks.left_padding_changes_nothing(policy.backbone, policy.adapter, rows[:NUM_PASSES])
        yield model_checks.no_dropout(self._forward, policy)
        yield model_checks.ratio_starts_at_one(policy, trajectory, recomputes=self.config.updates.recompute_logprobs)
        yield model_checks.rollout_starts_at_reference(
            policy,
            lambda part: reference.logprobs(
                part.input_ids_BT, part.attention_mask_BT, part.response_mask_BR, part.temperature
            ),
            trajectory,
        )

    def padding(self) -> Finding:
        """T2 on finished samples; where none ended by itself, the third token of the first is taken for an end."""
        ended = bool(self.trajectory.finished_B.any())
        stops = self.stops if ended else [*self.stops, int(self.trajectory.response_ids_BR[0, :3][-1])]
        drawn = self.sample(self.prompts, stops)
        places = drawn.finished_B.nonzero().flatten().tolist()[:NUM_PASSES]
        rows = [_as_examples(drawn)[place] for place in places]
        pad = self.subject.tokenizer.pad_token_id
        return token_checks.masks_survive_padding(rows, lambda one: self._padded(one, stops, places), stops, pad)

    def reward_findings(self) -> Iterator[Finding]:
        """V9 and V8 of every reward model among the rewards, loaded and asked as in training."""
        for term in self.config.rewards:
            if term.is_learned:
                yield from self._findings_of(term)

    def _findings_of(self, term: RewardTermConfig) -> Iterator[Finding]:
        if term.model is None and self.config.reward_model is None:
            yield reward_checks.HEAD.red(
                "the reward `model` is asked for, but no reward_model is named",
                "set reward_model=<run, folder or hub name>, or name rules under `rewards`",
            )
            return
        loaded: list[AnyReward] = []

        def load() -> AnyReward:
            loaded.append(self._load(term))
            return loaded[-1]

        finding = reward_checks.head_survives_loading(load, self._score)
        yield finding
        if finding.level != "red":
            learned = self._learned(loaded[-1])
            rows = [[*start, *answer] for start, answer in self._rows_for(learned)]
            if not learned.by_ids:
                yield self.subject.bos_of(learned.encoder, {"reward model": rows})
            yield reward_checks.scores_ignore_the_batch(loaded[-1], rows[:NUM_PASSES], self.config.run.dtype)

    def _load(self, term: RewardTermConfig) -> AnyReward:
        backbone = self.parts.policy.backbone
        drop_adapters(backbone, REWARD)
        return load_term_model(term, self.config.reward_model, self.config.run.output_dir, backbone, REWARD)

    def _learned(self, model: AnyReward) -> LearnedReward:
        return LearnedReward(model, self.subject.tokenizer, self.config.data.system_prompt, standardise=False)

    def _score(self, model: AnyReward) -> Tensor:
        learned = self._learned(model)
        return learned.score_ids([[*start, *answer] for start, answer in self._rows_for(learned)])

    def _rows_for(self, learned: LearnedReward) -> list[tuple[list[int], list[int]]]:
        """Prompts and samples as ids of the reward model's tokenizer."""
        if learned.by_ids:
            return list(zip(self.trajectory.prompts(), self.trajectory.responses(), strict=True))
        prompts = [prompt.prompt for prompt in self.batch]
        texts = self.parts.encoder.decode_batch(self.trajectory.responses())
        starts = learned.encoder.prompt_ids_batch(prompts)
        return list(zip(starts, learned.encoder.response_ids_batch(prompts, texts), strict=True))

    def _padded(self, pad: int, stops: Sequence[int], places: Sequence[int]) -> Batch:
        """The same samples drawn once more, with another token to pad."""
        tokenizer = self.parts.policy.backbone.tokenizer
        former, tokenizer.pad_token_id = tokenizer.pad_token_id, pad
        try:
            drawn = self.sample(self.prompts, stops)
        finally:
            tokenizer.pad_token_id = former
        trajectory = drawn.select(torch.tensor(list(places), device=drawn.response_ids_BR.device))
        prompts_BP = torch.zeros_like(trajectory.prompt_mask_BP)
        actions_BT = torch.cat([prompts_BP, trajectory.response_mask_BR], dim=1)
        attended_BT = trajectory.attention_mask_BT
        return Batch(trajectory.input_ids_BT, attended_BT, actions_BT, positions_from_mask(attended_BT))

    def _forward(self) -> Tensor:
        trajectory = self.trajectory
        return self.parts.policy.response_statistics(
            trajectory.input_ids_BT, trajectory.attention_mask_BT, trajectory.response_mask_BR, trajectory.temperature
        ).logprobs_BR


def _as_examples(trajectory: Trajectory) -> list[TokenExample]:
    return [join(*both) for both in zip(trajectory.prompts(), trajectory.responses(), strict=True)]


def _without_reward_model(config: OnlineConfigT) -> OnlineConfigT:
    rules = [term for term in config.rewards if not term.is_learned and term.name != "process"]
    stand_in = rules or [RewardTermConfig(name="keyword_sentiment")]
    return config.model_copy(update={"data": sampled(config.data), "rewards": stand_in})


def _num_ids(prompt: PromptExample) -> int:
    return len(prompt.prompt_ids)
