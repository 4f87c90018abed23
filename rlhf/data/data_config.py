"""Which data a recipe reads, which of its rows it keeps and how they are cut to length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from rlhf.data.reading import DATA_SUFFIXES, data_files
from rlhf.infra.config import Config

TINYCHAT = "tinychat"
HH_NAME = "Anthropic/hh-rlhf"


# One name may stand without brackets; the schema that editors check with has to know.
Names = Annotated[
    tuple[str, ...],
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


# Values of a column as text: one, or several.
Values = Names


def as_values(wanted: Any) -> Any:
    """A mapping from columns to one value or several, with every value as the tuple of texts that it stands for."""
    if not isinstance(wanted, Mapping):
        return wanted
    listed = {name: one if isinstance(one, list | tuple) else [one] for name, one in wanted.items()}
    return {name: tuple(str(value) for value in values) for name, values in listed.items()}


class SourceConfig(Config):
    """Where rows come from and which of them are held back for validation: the part every data config shares."""

    name: str = Field(
        default=TINYCHAT, description="tinychat (the built-in world) or a hub name; read when train_files is empty"
    )
    train_files: Names = Field(default=(), description="files, globs, folders or hub names to train on")
    validation_files: Names = Field(
        default=(), description="the same for validation; empty: validation_split or validation_fraction decides"
    )
    split: str = Field(default="train", description="split of the hub data set or folder to train on")
    validation_split: str | None = Field(
        default=None, description="split of the same source to validate on, such as test"
    )
    data_dir: str | None = Field(default=None, description="folder inside the hub repository, such as helpful-base")
    columns: dict[str, str] = Field(default={}, description="renamed columns, {name expected: name in the data}")
    where: dict[str, Values] = Field(
        default={}, description="only rows with these values: {column: value or list}, such as {subset: helpful-base}"
    )
    validation_fraction: float = Field(
        default=0.05, ge=0.0, lt=1.0, description="share of the prompts held back for validation; 0: none"
    )
    split_seed: int = Field(
        default=0, ge=0, description="chooses those prompts; keep it the same in every stage of a pipeline"
    )
    max_samples: int | None = Field(
        default=None, ge=1, description="at most this many training examples, drawn at random"
    )
    max_validation_samples: int | None = Field(default=None, ge=1, description="the same for validation")
    system_prompt: str | None = Field(default=None, description="put before prompts that bring no system message")
    hh_as_messages: bool = Field(default=False, description="turn Human:/Assistant: transcripts into messages")

    @field_validator("train_files", "validation_files", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("where", mode="before")
    @classmethod
    def _values_are_texts(cls, value: Any) -> Any:
        return as_values(value)

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle: dict[str, str] = {}
        if self.train_files:
            idle["name"] = "train_files names the training data"
        if self.validation_files:
            idle["validation_fraction"] = "validation_files names the validation data"
            if _are_files(self.validation_files):
                idle["validation_split"] = "validation_files names single files"
        elif self.validation_split is not None:
            idle["validation_fraction"] = "validation_split names the validation data"
        if not self.has_validation:
            idle["max_validation_samples"] = "no validation data are asked for"
        if self.is_tinychat:
            reason = "the built-in world tinychat has none; name data.train_files or data.name"
            idle |= dict.fromkeys(["split", "validation_split", "data_dir", "columns", "hh_as_messages"], reason)
            if self.validation_fraction > 0:
                reason = "the built-in world has validation rows of its own (0 leaves them out)"
                idle = {"validation_fraction": reason} | idle
            return idle
        if _are_files(self.source):
            idle["split"] = "train_files names single files"
            if _are_files(self.validation_files):
                idle["data_dir"] = "nothing is read from a hub"
        cuts = self.validation_fraction > 0 and "validation_fraction" not in idle
        if not cuts and self.max_samples is None and (self.max_validation_samples is None or not self.has_validation):
            idle["split_seed"] = "no rows are held back or drawn"
        return idle

    @property
    def has_validation(self) -> bool:
        """Whether there are rows to validate on."""
        return bool(self.validation_files) or self.validation_split is not None or self.validation_fraction > 0

    @property
    def is_tinychat(self) -> bool:
        """Whether training rows come from the built-in world."""
        return self.source == (TINYCHAT,)

    @property
    def source(self) -> tuple[str, ...]:
        """What is trained on: files, folders, globs or hub names."""
        return self.train_files or (self.name,)

    def files(self) -> list[Path]:
        """Return every file on disk this config reads (none for hub names), for the hashes in a run's record."""
        named: list[Path] = []
        if not self.is_tinychat:
            named += [file for one in self.source for file in data_files(one, self.split)]
            if self.validation_split is not None and not self.validation_files:
                named += [file for one in self.source for file in data_files(one, self.validation_split)]
        for one in self.validation_files:
            named += data_files(one, self.validation_split or "validation")
        return list(dict.fromkeys(named))


class DataConfig(SourceConfig):
    """A source whose rows are prompts with answers, filtered by their length in tokens."""

    min_length: int = Field(default=10, ge=1, description="shortest prompt + answer kept, in tokens")
    max_length: int = Field(default=512, ge=2, description="longest prompt + answer kept, in tokens")
    overlong: Literal["drop", "truncate_prompt"] = Field(
        default="drop", description="what happens above max_length: drop the row, or cut the prompt's beginning off"
    )

    @model_validator(mode="after")
    def _some_length_is_kept(self) -> DataConfig:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} is more than max_length {self.max_length}: no row is kept")
        return self


class InstructionDataConfig(DataConfig):
    """Rows to imitate, and which of their tokens are trained."""

    train_on: Literal["all", "last", "every_token"] = Field(
        default="all", description="every assistant turn, the last one, or every token (pretraining)"
    )

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = dict(super().idle_keys())
        if self.train_on == "every_token":
            idle["overlong"] = "train_on is every_token, which cuts long texts into pieces"
        return idle


class StepDataConfig(SourceConfig):
    """A source whose rows are worked solutions with a label for every step."""

    max_length: int = Field(default=512, ge=2, description="longest prompt + solution kept, in tokens")
    overlong: Literal["cut_steps", "drop"] = Field(
        default="cut_steps", description="above max_length: leave out the last steps, or the whole row"
    )
    separator: str = Field(
        default="\n", description="written behind every step; its last token is where the step is scored"
    )
    neutral: Literal["right", "wrong", "ignore"] = Field(
        default="right", description="what a neutral step counts as (PRM800K's 0); ignore leaves it out of the loss"
    )
    soft_labels: Literal["keep", "harden"] = Field(
        default="keep",
        description="labels between 0 and 1 (shares of right completions): as they are, or 1 where above 0",
    )


class PromptDataConfig(SourceConfig):
    """Rows whose prompts are answered by the policy."""

    max_prompt_length: int = Field(default=256, ge=1, description="longest prompt kept, in tokens")
    families: Names = Field(
        default=(), description="of the built-in world: some of arithmetic, safety, code, facts; empty: all four"
    )

    @field_validator("families", mode="before")
    @classmethod
    def _one_family_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = dict(super().idle_keys())
        if not self.is_tinychat and self.families:
            idle["families"] = "only the built-in world has families"
        return idle


def _are_files(names: tuple[str, ...]) -> bool:
    """Whether every name is that of a data file or a pattern for such, and none that of a folder or a hub."""
    return all(Path(name.removesuffix(".gz")).suffix.lower() in DATA_SUFFIXES for name in names)
