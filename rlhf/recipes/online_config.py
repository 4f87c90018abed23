"""Settings of recipes that learn from answers of their own: what is sampled, what it is worth, how steps are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field, model_validator

from rlhf.algo.trainer import OptimizerConfig
from rlhf.data.data_config import PromptDataConfig
from rlhf.eval.hacking import HackingConfig
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import RunConfig
from rlhf.models.backbone import ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.rewards.combination import CombinationConfig
from rlhf.rewards.process import process_term_config
from rlhf.rewards.protocol import RewardTermConfig, reward_sources, term_names
from rlhf.rewards.shaping import ShapingConfig


class UpdateSettings(Config):
    """The learning half of an iteration, whatever made the advantages."""

    num_iterations: int = Field(100, ge=1, description="rollouts, each followed by an update")
    num_mini_batches: int = Field(1, ge=1, description="optimizer steps per pass")
    max_tokens_per_micro_batch: int = Field(16_384, ge=1, description="tokens of one forward and backward pass")
    clip_range: float = Field(0.2, gt=0, lt=1, description="the ratio new / old is clipped to 1 - this ... 1 + this")
    clip_range_high: float | None = Field(None, gt=0, description="another upper bound of the ratio; null: the same")
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    target_kl: float | None = Field(
        0.02, gt=0, description="mean k3 of KL(old, new) that ends the inner epochs; null: never"
    )
    recompute_logprobs: bool = Field(False, description="old log-probs from a forward pass instead of from generation")
    save_every_updates: int | None = Field(
        None, ge=1, description="optimizer steps between checkpoints inside an iteration; null: at its end only"
    )

    @property
    def num_updates(self) -> int:
        """Optimizer steps made from one rollout, unless an early stop leaves some out."""
        raise NotImplementedError


class SamplingConfig(Config):
    """A policy, prompts to answer, and what an answer is worth."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device")
    policy: str = Field(
        "tinychat", description="what the policy starts from and is held near: a run, a folder or a hub name"
    )
    model: ModelConfig = Field(
        default_factory=ModelConfig, description="adapters, where the policy brings none; dtype of weights"
    )
    reward_model: str | None = Field(None, description="run or folder behind the reward `model`, or a hub classifier")
    process_model: str | None = Field(None, description="run or folder of a process reward model, for `process`")
    rewards: list[RewardTermConfig] = Field(
        default_factory=lambda: [RewardTermConfig(name="model")], description="what an answer is worth: weighted terms"
    )
    combination: CombinationConfig = Field(
        default_factory=CombinationConfig, description="how several rewards become one score"
    )
    data: PromptDataConfig = Field(default_factory=PromptDataConfig, description="the prompts")
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="how answers are drawn")

    @model_validator(mode="after")
    def _policy_has_weights(self) -> SamplingConfig:
        if self.model.random_init:
            raise ValueError("model.random_init: the policy must have learnt to answer already; train it first")
        return self

    @model_validator(mode="after")
    def _steps_can_be_paid(self) -> SamplingConfig:
        try:
            for term in self.rewards:
                if term.name == "process":
                    process_term_config(term.arguments)
        except UserError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def pays_once(self) -> bool:
        """Whether a term of the reward is paid once per answer, and not step by step."""
        return any(self._once)

    @property
    def _once(self) -> list[bool]:
        return [not (term.name == "process" and term.arguments.get("per_step")) for term in self.rewards]

    @model_validator(mode="after")
    def _rewards_fit_their_combination(self) -> SamplingConfig:
        terms = zip(term_names(self.rewards), self.rewards, self._once, strict=True)
        self.combination.refuse_strangers({name: term.weight for name, term, is_paid_once in terms if is_paid_once})
        return self

    @property
    def lineage(self) -> dict[str, str]:
        """The runs and models that this one starts from or asks, by role."""
        return {"policy": self.policy} | reward_sources(self.rewards, self.reward_model, self.process_model)

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = {
            "model.name_or_path": "`policy` names the model",
            "data.max_validation_samples": "nothing is validated on; prompts held back are left out",
        }
        if self.model.lora.lora_dropout > 0:
            idle["model.lora.lora_dropout"] = "dropout acts in SFT and reward modelling only"
        if not any(term.is_learned and term.model is None for term in self.rewards):
            idle["reward_model"] = "no term of `rewards` is called model, or each names a model of its own"
        if not any(term.name == "process" and term.model is None for term in self.rewards):
            idle["process_model"] = "no term of `rewards` is called process, or each names a model of its own"
        if self.model.train == "full":
            idle["generation.merge_adapter"] = "model.train is full, so there is no adapter"
        if self.run.dtype != "fp32":
            idle["generation.merge_adapter"] = f"run.dtype is {self.run.dtype}, and only fp32 weights are merged"
        if self.model.load_in_4bit:
            idle["generation.merge_adapter"] = "model.load_in_4bit is true, and 4-bit weights take no adapter in"
        return idle


class OnlineConfig(SamplingConfig):
    """What PPO and GRPO have besides: from scores to rewards, and how steps are made."""

    shaping: ShapingConfig = Field(default_factory=ShapingConfig, description="from score to reward")
    hacking: HackingConfig = Field(default_factory=HackingConfig, description="signs that the reward is gamed")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW and its schedule")

    @model_validator(mode="after")
    def _answers_reach_the_buffer(self) -> OnlineConfig:
        buffer, longest = self.shaping.overlong_buffer, self.generation.max_new_tokens
        if buffer is not None and buffer > longest:
            raise ValueError(
                f"shaping.overlong_buffer is {buffer}, but no answer is longer than generation.max_new_tokens, "
                f"{longest}; use at most that many"
            )
        return self

    @property
    def updates(self) -> UpdateSettings:
        """The recipe's own section, as far as every recipe has it."""
        raise NotImplementedError

    @property
    def num_optimizer_steps(self) -> int:
        """Over the whole run: what the learning-rate schedule is stretched over."""
        return self.updates.num_iterations * self.updates.num_updates

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = dict(super().idle_keys())
        if not self.pays_once:
            reason = "every reward is paid step by step, and only scores of whole answers are normalised and clipped"
            idle |= {"shaping.normalise": reason, "shaping.clip": reason}
        longest, budget = self.generation.max_new_tokens, self.shaping.length_budget
        if budget is not None and budget >= longest:
            reason = f"no answer is longer than generation.max_new_tokens, {longest}"
            idle |= dict.fromkeys(["shaping.length_budget", "shaping.length_penalty"], reason)
        return idle

    def idle_in_updates(self, section: str, bounds: Sequence[str]) -> dict[str, str]:
        """What one update per rollout leaves without effect; `bounds` are the keys that limit how far it may move."""
        settings, num_updates = self.updates, self.updates.num_updates
        every, saved = settings.save_every_updates, dict[str, str]()
        if every is not None and every >= num_updates:
            reason = f"an iteration has {num_updates} update(s): no place inside it is reached"
            saved[f"{section}.save_every_updates"] = reason
        if num_updates > 1:
            return saved
        reason = "there is one update per rollout, at which nothing has moved yet since the answers were sampled"
        # In half precision the rounding of training differs from that of sampling, and clipping sees it.
        is_exact = self.run.dtype == "fp32" or settings.recompute_logprobs
        names = ["target_kl", *(bounds if is_exact else [])]
        return saved | dict.fromkeys([f"{section}.{name}" for name in names], reason)


def refuse_empty_mini_batches(section: str, num_mini_batches: int, num_rows: int) -> None:
    """Raise `ValueError` where a rollout cannot be cut into so many parts."""
    if num_mini_batches > num_rows:
        raise ValueError(
            f"{section}.num_mini_batches is {num_mini_batches}, but a rollout has only {num_rows} rows; "
            "use at most that many"
        )
