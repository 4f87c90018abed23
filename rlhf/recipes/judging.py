"""Judges by name: what a configuration says of them, and the judges it means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator

from rlhf.data.rows import Prompt
from rlhf.eval.judge import Judge, PairFunctionJudge, ScoreJudge, column_score, distinct_names, longer, shorter
from rlhf.eval.judge_prompt import INSTRUCTIONS, MARKS
from rlhf.eval.llm_judge import LLMJudge
from rlhf.infra.chat_api import ChatApiConfig
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.models.reward_model import AnyReward, ClassifierReward, load_reward_model
from rlhf.recipes.stages import REWARD_MODEL, locate
from rlhf.rewards.learned import LearnedReward
from rlhf.rewards.protocol import load_function

PLACE = "{prompt}"
REPLIES = "judge_replies"  # folder in the cache beside the runs


class NamedJudge(Config):
    """What every judge has."""

    name: str | None = Field(None, min_length=1, description="what tables call it; null: made of what it is")


class LengthJudgeConfig(NamedJudge):
    """The baseline that looks at nothing but the number of characters."""

    kind: Literal["length"] = Field("length", description="judges by length, as a baseline")
    prefer: Literal["longer", "shorter"] = Field("longer", description="which answer wins")


class ColumnJudgeConfig(NamedJudge):
    """A score that the answers bring along."""

    kind: Literal["column"] = Field("column", description="judges by a number in the rows")
    column: str = Field(min_length=1, description="its name, such as gold or reward in an evaluation's samples")


class GoldJudgeConfig(NamedJudge):
    """The built-in world's truth, for prompts that come with their task."""

    kind: Literal["gold"] = Field("gold", description="judges by the gold scorer; the rows need the column task")


class RewardModelJudgeConfig(NamedJudge):
    """A reward model, trained here or a sequence classifier of the hub's form."""

    kind: Literal["reward_model"] = Field("reward_model", description="judges by a reward model's score")
    source: str = Field(min_length=1, description="run, folder or hub name of the reward model")
    prompt_template: str | None = Field(
        None, description="text form of a question, in which {prompt} stands for it; null: the model's chat template"
    )

    @field_validator("prompt_template")
    @classmethod
    def _holds_the_prompt(cls, value: str | None) -> str | None:
        if value is not None and PLACE not in value:
            raise ValueError(f"the question has no place in it; write {PLACE} where it is to stand")
        return value


class FunctionJudgeConfig(NamedJudge):
    """A user's score of one answer."""

    kind: Literal["function"] = Field("function", description="judges by a score f(prompts, completions, **columns)")
    function: str = Field(description="the function as module:function or file.py:function")


class PairFunctionJudgeConfig(NamedJudge):
    """A user's comparison of two answers."""

    kind: Literal["pair_function"] = Field(
        "pair_function", description="judges by f(prompts, firsts, seconds, **columns): 1 first better, 0 second"
    )
    function: str = Field(description="the function as module:function or file.py:function")


class LLMJudgeConfig(NamedJudge, ChatApiConfig):
    """A model behind an OpenAI-compatible API."""

    kind: Literal["llm"] = Field("llm", description="judges by asking a model")
    unparsable_retries: int = Field(1, ge=0, le=10, description="how often a reply without a verdict is asked about")
    instructions: Path | None = Field(None, description="text file in place of the built-in instructions to the judge")
    use_cache: bool = Field(True, description="keep replies under <output_dir>/cache and never ask the same again")

    @field_validator("instructions")
    @classmethod
    def _names_every_verdict(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        if not value.is_file():
            raise ValueError("there is no such file")
        missing = [mark for mark in MARKS if mark not in value.read_text(encoding="utf-8")]
        if missing:
            raise ValueError(f"the judge is never told to write {', '.join(missing)}; name all of {', '.join(MARKS)}")
        return value


_CONFIGS = (
    LengthJudgeConfig,
    ColumnJudgeConfig,
    GoldJudgeConfig,
    RewardModelJudgeConfig,
    FunctionJudgeConfig,
    PairFunctionJudgeConfig,
    LLMJudgeConfig,
)
KINDS = tuple(str(cls.model_fields["kind"].default) for cls in _CONFIGS)


def _has_a_kind(value: Any) -> Any:
    if isinstance(value, dict) and value.get("kind") not in KINDS:
        said = f"got kind {value['kind']!r}" if "kind" in value else "no kind is given"
        raise ValueError(f"a judge needs a kind: {said}, expected one of {', '.join(KINDS)}")
    return value


JudgeConfig = Annotated[
    Annotated[
        LengthJudgeConfig
        | ColumnJudgeConfig
        | GoldJudgeConfig
        | RewardModelJudgeConfig
        | FunctionJudgeConfig
        | PairFunctionJudgeConfig
        | LLMJudgeConfig,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_has_a_kind),
]
Judges = tuple[JudgeConfig, ...]
NO_JUDGE = (
    "no judge is named; for example judges='[{kind: length}]' or "
    "judges='[{kind: llm, base_url: http://127.0.0.1:8000/v1, model: NAME}]'"
)


def build_judges(configs: Judges, output_dir: Path, device: torch.device, dtype: str = "fp32") -> list[Judge]:
    """The judges in order, under distinct names. Raises `UserError` where one cannot be had."""
    names = distinct_names(config.name or _default_name(config) for config in configs)
    return [_build(config, name, output_dir, device, dtype) for config, name in zip(configs, names, strict=True)]


def _default_name(config: JudgeConfig) -> str:
    if isinstance(config, LengthJudgeConfig):
        return config.prefer
    if isinstance(config, ColumnJudgeConfig):
        return config.column
    if isinstance(config, GoldJudgeConfig):
        return "gold"
    if isinstance(config, RewardModelJudgeConfig):
        return config.source
    if isinstance(config, LLMJudgeConfig):
        return config.model
    return config.function.rpartition(":")[2]


def _build(config: JudgeConfig, name: str, output_dir: Path, device: torch.device, dtype: str) -> Judge:
    if isinstance(config, LengthJudgeConfig):
        return ScoreJudge(name, longer if config.prefer == "longer" else shorter)
    if isinstance(config, ColumnJudgeConfig):
        return ScoreJudge(name, column_score(config.column))
    if isinstance(config, GoldJudgeConfig):
        return ScoreJudge(name, _gold_of_tasks)
    if isinstance(config, RewardModelJudgeConfig):
        model = load_reward_model(locate(config.source, output_dir, REWARD_MODEL), None, dtype)
        return ScoreJudge(name, RewardWithinContext(name, model.to(device), config.prompt_template))
    if isinstance(config, FunctionJudgeConfig):
        return ScoreJudge(name, load_function(config.function, "judge"))
    if isinstance(config, PairFunctionJudgeConfig):
        return PairFunctionJudge(name, load_function(config.function, "judge"))
    folder = output_dir / "cache" / REPLIES if config.use_cache else None
    instructions = INSTRUCTIONS if config.instructions is None else config.instructions.read_text(encoding="utf-8")
    return LLMJudge(name, config, folder, config.unparsable_retries, instructions)


class RewardWithinContext:
    """Scores by a reward model; an answer beyond the model's context has no score instead of a wrong one."""

    def __init__(self, name: str, model: AnyReward, prompt_template: str | None) -> None:
        self.name, self.prompt_template = name, prompt_template
        self.learned = LearnedReward(model)
        inner = model.model if isinstance(model, ClassifierReward) else model.backbone.model
        self.limit: int | None = vars(inner.config).get("max_position_embeddings")
        self.extra = 0 if isinstance(model, ClassifierReward) else len(model.tokenizer(model.suffix)["input_ids"])

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        encoder = self.learned.encoder
        asked = [self._asked(prompt) for prompt in prompts]
        starts, answers = encoder.prompt_ids_batch(asked), encoder.response_ids_batch(asked, completions)
        finished = columns.get("finished", [True] * len(answers))
        # The encoder ends every answer; one that was cut off has not said that it is over.
        rows = [[*s, *(a if done else a[:-1])] for s, a, done in zip(starts, answers, finished, strict=True)]
        fits = [i for i, row in enumerate(rows) if self.limit is None or len(row) + self.extra <= self.limit]
        scores: list[float | None] = [None] * len(rows)
        if fits:
            for i, score in zip(fits, self.learned.score_ids([rows[i] for i in fits]).tolist(), strict=True):
                scores[i] = score
        return scores

    def _asked(self, prompt: Prompt) -> Prompt:
        """The question as the model is to read it."""
        if self.prompt_template is None:
            if isinstance(prompt, str) or self.learned.encoder.tokenizer.chat_template:
                return prompt
            raise UserError(
                f"judge '{self.name}' has no chat template; say what a question looks like to it, for example with "
                r"prompt_template: '\n\nHuman: {prompt}\n\nAssistant:' in double quotes"
            )
        if not isinstance(prompt, str) and [turn["role"] for turn in prompt] != ["user"]:
            raise UserError(
                f"judge '{self.name}' has a prompt_template for one question, but a prompt here is a conversation of "
                f"{len(prompt)} turns; leave prompt_template out and take a model with a chat template"
            )
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        return self.prompt_template.replace(PLACE, text)


def _gold_of_tasks(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    from rlhf.data.tinychat import gold_reward

    tasks = columns.get("task", [None])
    if any(task is None for task in tasks):
        raise UserError(
            "the gold scorer judges prompts of the built-in world only, whose rows have the column 'task'; take "
            "another judge, or {kind: column, column: gold} where the answers have been scored already"
        )
    return gold_reward(prompts, completions, tasks)
