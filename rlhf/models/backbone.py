"""The one language model that everything else hangs on: frozen weights held once, adapters by name.

Policy, reference, value and reward are the same `Backbone` seen through different adapters, so memory is one model and
a few small ones. Legend: B sequences, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation
from transformers.utils.logging import disable_progress_bar

from rlhf.data.chat import prepare_tokenizer
from rlhf.data.forest import Forest, plant
from rlhf.infra.allocator import return_freed_memory
from rlhf.infra.config import Config
from rlhf.infra.device import autocast, torch_dtype
from rlhf.infra.errors import UserError
from rlhf.models.adapter_files import TaskType, check_task_type, load_adapter
from rlhf.models.attention import SHORT_ROWS, prefer_short_rows
from rlhf.models.dense import use_fast_products
from rlhf.models.last_mlp import LastMLP
from rlhf.models.lora import (
    LoRAConfig,
    adapter_names,
    apply_lora_to_model,
    copy_adapter,
    get_lora_parameters,
    lora_layers,
    merge_adapter,
    set_active_adapter,
    unmerge_adapter,
)
from rlhf.models.quantized import (
    QuantType,
    describe_quantised,
    keep_codes_as_loaded,
    quantised_layers,
    quantization_config,
)
from rlhf.models.recompute import enable_recomputation, recomputing

BUNDLED_MODEL = "tinychat"


class ModelConfig(Config):
    """Which base model, and how it is trained."""

    name_or_path: str = Field(BUNDLED_MODEL, description="`tinychat` (bundled), a folder, or a hub name")
    tokenizer: str | None = Field(None, description="folder or hub name of the tokenizer; null: the model's own")
    random_init: bool = Field(False, description="start from the configuration alone, with random weights")
    train: Literal["lora", "full"] = Field("lora", description="adapters on a frozen base, or every weight")
    lora: LoRAConfig = Field(default_factory=LoRAConfig, description="shape and place of the adapters")
    attn_implementation: str | None = Field(
        None, description="as in transformers; null: its default (on a CPU `short_rows`)"
    )
    load_in_4bit: bool = Field(False, description="hold the frozen base in 4 bits (bitsandbytes), under adapters")
    bnb_4bit_quant_type: QuantType = Field("nf4", description="code of 4-bit weights: for normal ones, or 4-bit floats")
    bnb_4bit_use_double_quant: bool = Field(True, description="the scales of 4-bit weights in 8 bits too")
    gradient_checkpointing: bool = Field(
        False, description="compute each block again in the backward pass instead of keeping what it computed"
    )

    @model_validator(mode="after")
    def _quantised_weights_do_not_train(self) -> ModelConfig:
        if self.load_in_4bit and self.train == "full":
            raise ValueError(
                "load_in_4bit=true with train=full would train weights that are 4-bit codes; use train=lora, or "
                "load_in_4bit=false"
            )
        if self.load_in_4bit and self.random_init:
            raise ValueError(
                "load_in_4bit=true with random_init=true would put adapters on random weights that are never saved; "
                "use one of the two"
            )
        return self

    @property
    def quantisation(self) -> dict[str, Any]:
        """The settings that say how the base is coded; empty where it is not. Equal settings mean equal codes."""
        if not self.load_in_4bit:
            return {}
        names = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        return {name: value for name, value in self if name in names}

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = {"lora": "every weight trains, so there is no adapter"} if self.train == "full" else {}
        if not self.load_in_4bit:
            names = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
            idle |= dict.fromkeys(names, "load_in_4bit is false")
        return idle


class Backbone(nn.Module):
    """A causal language model (or an encoder) with its tokenizer; `hidden` is the trunk, `logits` the head."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, dtype_name: str = "fp32"
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.name, self.dtype_name = model, tokenizer, name, dtype_name
        self.notes = prepare_tokenizer(tokenizer)
        self.num_tokens_through = 0  # tokens that went through the trunk so far, padding included
        self.num_tokens_read = 0  # tokens without padding, of the passes over answers that are learnt from
        self._in_use: str | None = None
        fuse_activations(self.model)
        use_fast_products(self.model)
        # Dropout stays off in every stage: with it on, the ratio of the first PPO step is not 1 and the reference is
        # not one distribution (checklist P2). `train()` is therefore never passed on to the model.
        self.model.eval()
        self.model.requires_grad_(False)
        keep_codes_as_loaded(model)
        self.is_quantised = bool(quantised_layers(model))
        self.quantisation: dict[str, Any] = {}
        if self.is_quantised:
            self.notes.append(describe_quantised(model))
        self._recomputed: list[nn.Module] = []
        self._last_mlp = LastMLP(self.model)

    @classmethod
    def load(cls, config: ModelConfig, dtype_name: str = "fp32", device: torch.device | None = None) -> Backbone:
        """Load tokenizer and weights. A frozen base is held in the compute dtype, one that is trained in fp32.

        Raises:
            UserError: the folder or name does not hold a model, or the tokenizer cannot serve.
        """
        if not sys.stderr.isatty():
            disable_progress_bar()  # a bar in a log file is noise
        source = resolve_model(config.name_or_path)
        dtype = torch_dtype(dtype_name) if config.train == "lora" else torch.float32
        try:
            tokenizer = AutoTokenizer.from_pretrained(resolve_model(config.tokenizer or config.name_or_path))
            model_config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise _unreadable(config.name_or_path, error) from error
        extra: dict[str, Any] = (
            {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
        )
        if config.load_in_4bit:
            place = device or torch.device("cpu")
            double, code = config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_type
            extra |= {"quantization_config": quantization_config(code, double, dtype, place), "device_map": {"": place}}
        kind = AutoModelForCausalLM if type(model_config) in AutoModelForCausalLM._model_mapping else AutoModel
        try:
            if config.random_init:
                model = kind.from_config(model_config, dtype=dtype, **extra)
            else:
                model = kind.from_pretrained(source, dtype=dtype, **extra)
        except (OSError, ValueError) as error:
            raise _unreadable(config.name_or_path, error) from error
        if device is None or device.type == "cpu":
            return_freed_memory(sum(parameter.nbytes for parameter in model.parameters()))
        backbone = cls.around(model, tokenizer, config, dtype_name, on_cpu=device is None or device.type == "cpu")
        return backbone if device is None else backbone.to(device)

    @classmethod
    def around(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: ModelConfig,
        dtype_name: str,
        *,
        on_cpu: bool,
    ) -> Backbone:
        """A model that is there already, set up as the config says; it may lack its weights (see `models.hollow`).

        Raises:
            UserError: the model cannot be trained or recomputed as asked.
        """
        if on_cpu and config.attn_implementation is None:
            prefer_short_rows(model)
        backbone = cls(model, tokenizer, config.name_or_path, dtype_name)
        backbone.quantisation = config.quantisation
        if config.train == "full" and backbone.is_quantised:
            raise UserError(
                f"model.train=full would train every weight, but those of {config.name_or_path} are stored as codes of "
                "fewer bits; use train=lora, or name the model that it was quantised from"
            )
        if config.gradient_checkpointing:
            backbone.recompute_in_backward()
        return backbone

    def recompute_in_backward(self) -> None:
        """Keep only the input of each block in a forward with gradients: less memory for a second forward's time.

        Raises:
            UserError: the architecture has no blocks of which transformers says that they can be computed again.
        """
        # In the backward pass another adapter may be in use than in the forward before it, and other positions wanted.
        self._recomputed = enable_recomputation(
            self.model, lambda: partial(self._as_it_was, self._in_use, self._last_mlp.wanted)
        )
        self.notes.append(f"gradient checkpointing: {len(self._recomputed)} blocks are computed again in each backward")

    @contextmanager
    def _as_it_was(self, adapter: str | None, wanted: Tensor | None) -> Iterator[None]:
        with self.using(adapter), self._last_mlp.at(wanted):
            yield

    def add_adapter(self, name: str, config: LoRAConfig) -> None:
        """Put a fresh adapter (the identity until it is trained) beside those that are there."""
        apply_lora_to_model(
            self.model,
            r=config.r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.target_modules,
            adapter_name=name,
            use_rslora=config.use_rslora,
        )
        set_active_adapter(self.model, self._in_use)

    def load_adapter(self, folder: str | Path, name: str, task_type: TaskType = "CAUSAL_LM") -> None:
        """Put the adapter saved in a folder beside those that are there, frozen; what is in use stays in use.

        Raises:
            UserError: the folder holds no adapter for this base, one trained for another task, or the name is taken.
        """
        check_task_type(folder, task_type)
        load_adapter(self.model, folder, name)
        set_active_adapter(self.model, self._in_use)

    def copy_adapter(self, source: str, target: str) -> None:
        """Start an adapter from the weights of another; it is frozen until `train_only` names it."""
        copy_adapter(self.model, source, target)

    def train_only(self, adapters: Sequence[str]) -> None:
        """Let exactly these adapters take gradients, and no other weight of the model."""
        self.model.requires_grad_(False)
        for name in adapters:
            for parameter in get_lora_parameters(self.model, name):
                parameter.requires_grad_(True)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Run the base through this adapter inside the block; free of cost where it is the one in use already."""
        if adapter == self._in_use:
            yield
            return
        former, self._in_use = self._in_use, adapter
        set_active_adapter(self.model, adapter)
        try:
            yield
        finally:
            self._in_use = former
            set_active_adapter(self.model, former)

    @contextmanager
    def merged(self, adapter: str | None) -> Iterator[None]:
        """Like `using`, with the adapter folded into the weights: a third of the products, equal up to fp32 rounding.

        The weights concerned are copied meanwhile and put back bit for bit. 4-bit codes hold no sum: a quantised base
        is only used.
        """
        with self.using(adapter):
            if adapter is None or self.is_quantised:
                yield
                return
            merge_adapter(self.model, adapter)
            try:
                yield
            finally:
                unmerge_adapter(self.model)

    def hidden(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        *,
        adapter: str | None = None,
        cache: Cache | None = None,
        wanted_BT: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states (B, T, D) under an adapter (None: the bare base).

        `wanted_BT` is True where they will be read; elsewhere they are then of no use, and cheaper. Positions default
        to the count of attended tokens before each, so that padding on either side changes nothing, for learned
        positions as for rotary ones. Packed rows come with their own positions and no mask.
        """
        self.num_tokens_through += input_ids_BT.numel()
        if position_ids_BT is None and attention_mask_BT is not None:
            position_ids_BT = positions_from_mask(attention_mask_BT)
        trunk = self.model.base_model
        arguments = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT}
        if not self.is_encoder:
            arguments |= {"position_ids": position_ids_BT}
            if cache is not None:
                arguments |= {"past_key_values": cache, "use_cache": True}
            else:
                arguments |= {"use_cache": False}
        trains = cache is None and torch.is_grad_enabled()
        again = recomputing(self._recomputed) if trains else nullcontext()
        narrowed = nullcontext() if wanted_BT is None else self._last_mlp.only_at(wanted_BT)
        with self.using(adapter), again, autocast(input_ids_BT.device, self.dtype_name), narrowed:
            hidden_BTD: Tensor = trunk(**arguments).last_hidden_state
        return hidden_BTD

    def logits(self, hidden: Tensor, *, adapter: str | None = None) -> Tensor:
        """Vocabulary logits (..., V) of hidden states (..., D), with the architecture's cap where it has one.

        The adapter must be named here too: it may stand on the head.
        """
        with self.using(adapter), autocast(hidden.device, self.dtype_name):
            # Asked for each time: an adapter on the head puts another layer in its place.
            logits: Tensor = self.model.get_output_embeddings()(hidden)
        cap = self.model.config.to_dict().get("final_logit_softcapping")
        return logits if not cap else torch.tanh(logits / cap) * cap

    def hidden_of(self, forest: Forest, *, adapter: str | None, wanted_BT: Tensor) -> Tensor:
        """Last hidden states (B, T, D) of rows whose branches do not see each other, good where `wanted_BT` is True."""
        mask = forest.attention_mask(self.model.dtype)
        return self.hidden(forest.input_ids_BT, mask, forest.position_ids_BT, adapter=adapter, wanted_BT=wanted_BT)

    @cached_property
    def takes_forests(self) -> bool:
        """Whether answers to one prompt may share a row: the model must take a mask of our own and see all positions.

        Tried on two short answers against the same answers in rows of their own, since no setting says it.
        """
        if self.is_encoder or self.model.config._attn_implementation not in ("eager", "sdpa", SHORT_ROWS):
            return False
        settings = self.model.config.to_dict()
        has_window = bool(settings.get("sliding_window")) and settings.get("use_sliding_window", True)
        kinds = settings.get("layer_types") or ["sliding_attention" if has_window else "full_attention"]
        if set(kinds) != {"full_attention"}:
            return False
        return self._forest_equals_rows()

    @torch.no_grad()
    def _forest_equals_rows(self) -> bool:
        ids = [token % self.vocab_size for token in (5, 7, 11, 13, 17, 19, 23)]
        prompt, answers = ids[:3], [ids[3:5], ids[5:]]
        forest = plant([prompt], [answers], pad_token_id=0).to(self.device)
        rows = torch.tensor([[*prompt, *answer] for answer in answers], device=self.device)
        ends_BT = forest.branch_ends()
        together = self.hidden_of(forest, adapter=None, wanted_BT=ends_BT)[ends_BT].float()
        alone = self.hidden(rows, torch.ones_like(rows, dtype=torch.bool))[:, -1].float()
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 5e-2
        return bool((together - alone).norm() <= tolerance * alone.norm())

    @property
    def adapter_names(self) -> list[str]:
        return adapter_names(self.model)

    @property
    def base_is_frozen(self) -> bool:
        """Whether no weight outside the adapters takes gradients."""
        return not any(p.requires_grad for name, p in self.model.named_parameters() if ".lora_" not in name)

    @property
    def is_encoder(self) -> bool:
        return self.model.get_output_embeddings() is None

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def context(self) -> int | None:
        """Tokens that the model can read at once, by its configuration; None where that does not say."""
        config = self.model.config
        return int(config.max_position_embeddings) if hasattr(config, "max_position_embeddings") else None

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def train(self, mode: bool = True) -> Backbone:
        """Keep the model in evaluation mode whatever is asked (see `__init__`); only the flag of this module moves."""
        self.training = mode
        return self

    @contextmanager
    def adapter_dropout(self, probability: float) -> Iterator[None]:
        """LoRA's own dropout on inside the block where it is above 0, the model's still off: for supervised stages."""
        if probability == 0:
            yield
            return
        layers = list(lora_layers(self.model).values())
        for layer in layers:
            layer.train()
        try:
            yield
        finally:
            for layer in layers:
                layer.eval()


def positions_from_mask(attention_mask_BT: Tensor) -> Tensor:
    """Position of each token among the attended ones of its row; 0 on padding."""
    return (attention_mask_BT.long().cumsum(dim=-1) - 1).clamp(min=0)


def fuse_activations(model: nn.Module) -> None:
    """Compute GPT-2's GELU in one pass where the architecture spells it out in eight: the same formula, fused by torch.

    At small widths the spelt-out form costs as much as a fifth of a training step, and keeps five wide tensors.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in (NewGELUActivation, FastGELUActivation):
                setattr(module, name, GELUTanh())


def resolve_model(name_or_path: str) -> str:
    """The bundled model's folder for its name; otherwise the name or path as given."""
    if name_or_path == BUNDLED_MODEL:
        return str(files("rlhf.data.tinychat") / "model")
    return name_or_path


def _unreadable(name: str, error: Exception) -> UserError:
    folder = Path(name)
    if folder.is_dir():
        return UserError(f"{name} holds no model and tokenizer that transformers can load: {_first_line(error)}")
    return UserError(
        f"no model {name}: it is neither a folder here nor a hub name that can be reached; give a folder written by "
        f"save_pretrained, a cached or reachable hub name, or `{BUNDLED_MODEL}`"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
