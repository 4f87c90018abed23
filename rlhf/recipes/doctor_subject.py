"""What the doctor looks at before any model is loaded: tokenizer, encoder, and a few hundred of the user's own rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from rlhf.data.chat import ChatEncoder, prepare_tokenizer
from rlhf.data.data_config import SourceConfig
from rlhf.data.formats import as_instruction, as_prompt
from rlhf.data.loading import WorldRows, load_splits
from rlhf.data.order import epoch_order
from rlhf.data.rows import InstructionRow, Prompt, Row
from rlhf.data.token_dataset import TokenDataset
from rlhf.eval.doctor import row_checks
from rlhf.eval.doctor.finding import Finding
from rlhf.infra.errors import UserError
from rlhf.models.backbone import Backbone, ModelConfig, resolve_model
from rlhf.models.lora import delete_adapter
from rlhf.recipes.stages import ADAPTER_CONFIG, POLICY, base_of, locate

NUM_ROWS, NUM_PAIRS, NUM_PASSES = 400, 50, 6
UNLIMITED = 10**9
# Rows of the forward passes leave this much of the context free and are no longer than that.
_SPARE, _LONGEST_PASS = 32, 512

DataT = TypeVar("DataT", bound=SourceConfig)
ItemT = TypeVar("ItemT")


class CannotGoOnError(Exception):
    """A fault behind which nothing else can be looked at; `finding` tells it."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.seen)
        self.finding = finding


@dataclass(frozen=True)
class Subject:
    """Tokenizer, encoder and rows of a stage.

    `num_rows` is how many there are in all, `context` how many positions the model has (None: it does not say).
    """

    tokenizer: PreTrainedTokenizerBase
    encoder: ChatEncoder
    rows: list[Row]
    num_rows: int
    context: int | None

    @classmethod
    def open(
        cls,
        source: str,
        model: ModelConfig,
        data: SourceConfig,
        output_dir: Path,
        scratch: Path,
        world: WorldRows = "pairs",
    ) -> Subject:
        """Read tokenizer and rows as a recipe does that starts from `source`.

        Raises:
            CannotGoOnError: the chat template leaves nothing to train on.
            UserError: model or data cannot be read.
        """
        tokenizer, context = _look_up(source, model, output_dir)
        template = row_checks.template_shows_answers(tokenizer)
        if template.level == "red":
            raise CannotGoOnError(template)
        loaded, _ = load_splits(sampled(data) if data.is_tinychat else data, scratch / "rejected.jsonl", world)
        chosen = epoch_order(len(loaded.rows), data.split_seed, epoch=0)[:NUM_ROWS]
        rows, num_rows = [loaded.rows[place] for place in chosen], data.max_samples or len(loaded.rows)
        return cls(tokenizer, ChatEncoder(tokenizer, data.system_prompt), rows, num_rows, context)

    @property
    def prompts(self) -> list[Prompt]:
        found = (as_prompt(row) for row in self.rows)
        return [row.prompt for row in found if row is not None]

    @property
    def pairs(self) -> list[tuple[Prompt, str]]:
        """A few prompts with an answer that is not empty."""
        found = (as_instruction(row) for row in self.rows)
        answered = [row for row in found if isinstance(row, InstructionRow) and row.response.strip()]
        return [(row.prompt, row.response) for row in answered[:NUM_PAIRS]]

    @property
    def is_chat(self) -> bool:
        return any(not isinstance(prompt, str) for prompt in self.prompts)

    def bos(self, recipe: str, rows: Sequence[Sequence[int]]) -> Finding:
        """T6 over every way in which rows become ids, `rows` being the recipe's own."""
        paths = {
            recipe: rows,
            "rollout": self.encoder.prompt_ids_batch(self.prompts),
            "plain text": self.encoder.text_ids([answer for _, answer in self.pairs]),
        }
        return self.bos_of(self.encoder, {name: ids for name, ids in paths.items() if ids})

    def bos_of(self, encoder: ChatEncoder, paths: Mapping[str, Sequence[Sequence[int]]]) -> Finding:
        """T6 over the paths of any encoder, such as that of a reward model with a tokenizer of its own."""
        tokenizer = encoder.tokenizer
        rendered = [tokenizer(encoder.render(prompt))["input_ids"] for prompt in self.prompts[:NUM_PAIRS]]
        bos_id = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return row_checks.one_bos_at_most(paths, rendered, bos_id, encoder.stop_token_ids)

    def within_length(
        self,
        kind: type[TokenDataset[ItemT, DataT]],
        data: DataT,
        length: Callable[[ItemT], int],
        key: str = "max_length",
        behind: int = 0,
    ) -> tuple[list[ItemT], Finding]:
        """The examples that the length limit leaves, and T10; `behind` tokens more will be generated behind each.

        Raises:
            CannotGoOnError: it leaves none, or some that the model has no positions for.
        """
        limit = int(data.model_dump()[key])
        every = kind.from_rows(self.rows, self.encoder, data.model_copy(update={key: UNLIMITED, "max_samples": None}))
        lengths = [length(example) for example in every.examples]
        try:
            kept = kind.from_rows(self.rows, self.encoder, data.model_copy(update={"max_samples": None}))
        except UserError as error:
            raise CannotGoOnError(row_checks.no_row_is_left(str(error), lengths, limit, f"data.{key}")) from None
        longest = max(length(example) for example in kept.examples) + behind
        finding = row_checks.long_rows_are_counted(lengths, kept.report, limit, longest, self.context, f"data.{key}")
        if finding.level == "red":
            raise CannotGoOnError(finding)
        return kept.examples, finding

    def spread(self, examples: Sequence[ItemT], length: Callable[[ItemT], int], count: int = NUM_PASSES) -> list[ItemT]:
        """A few examples of different lengths, short enough for a forward pass.

        Raises:
            UserError: every one is too long for the model.
        """
        longest = min(_LONGEST_PASS, self.context - _SPARE) if self.context is not None else _LONGEST_PASS
        short = sorted((one for one in examples if length(one) <= longest), key=length)
        if not short:
            raise UserError(f"no row has {longest} tokens or fewer, so none could be tried on the model")
        step = max(1, (len(short) - 1) // max(1, count - 1))
        return short[::step][:count]


def sampled(data: DataT) -> DataT:
    """The same data, a few hundred rows of it."""
    limits = {"max_samples": NUM_ROWS, "max_validation_samples": NUM_PAIRS}
    given = data.model_dump()
    return data.model_copy(update={key: min(given[key] or limit, limit) for key, limit in limits.items()})


def _look_up(source: str, model: ModelConfig, output_dir: Path) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Tokenizer and number of positions of the model behind a source, by the rules of `load_policy`."""
    folder = locate(source, output_dir, POLICY)
    has_adapter = (Path(folder) / ADAPTER_CONFIG).is_file()
    base = base_of(folder) if has_adapter else folder
    brings_tokenizer = has_adapter and (Path(folder) / "tokenizer_config.json").is_file()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(folder if brings_tokenizer else model.tokenizer or base)
        )
        shape = AutoConfig.from_pretrained(resolve_model(base)).to_dict()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{base} holds no model and tokenizer that can be loaded: {str(error).splitlines()[0]}"
        ) from None
    prepare_tokenizer(tokenizer)
    return tokenizer, shape.get("max_position_embeddings", shape.get("n_positions"))


def drop_adapters(backbone: Backbone, name: str) -> None:
    """Take a loaded model's adapter off its base, or those of all members of an ensemble."""
    for adapter in backbone.adapter_names:
        if adapter == name or adapter.startswith(f"{name}_"):
            delete_adapter(backbone.model, adapter)
