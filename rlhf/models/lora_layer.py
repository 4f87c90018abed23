"""One linear layer with named low-rank updates (LoRA, arXiv:2106.09685).

The layer computes ``base(x) + scaling * B A x`` with ``A`` (r, in) random and ``B`` (out, r) zero, so a fresh adapter
is the identity. Any number of adapters lie side by side on one base weight; one of them, or none, is active at a time.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from rlhf.infra.errors import UserError
from rlhf.infra.products import product
from rlhf.models.dense import is_dense, use_fast_products

_QUANTIZED = frozenset({"Linear4bit", "Linear8bitLt"})
# torch's MultiheadAttention reads the weight of this layer instead of calling it: an adapter on it would never be seen.
_NEVER_CALLED = frozenset({"NonDynamicallyQuantizableLinear"})


@dataclass(frozen=True)
class AdapterSettings:
    """Rank, scaling and dropout of one adapter in one layer."""

    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"LoRA got r={self.r}, alpha={self.alpha}, dropout={self.dropout}; "
                "expected r of at least 1, alpha above 0 and dropout in [0, 1)."
            )

    @property
    def scaling(self) -> float:
        """Factor on ``B A x``: alpha / r, or alpha / sqrt(r) when rank-stabilised (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoRALinear(nn.Module):
    """A frozen linear layer with named low-rank updates.

    Takes ``nn.Linear``, GPT-2's ``Conv1D`` (weight stored (in, out)) and bitsandbytes' quantised linears. Adapter
    weights are fp32 whatever the base holds; under autocast the products run in autocast's dtype, otherwise in fp32. An
    active name that this layer does not carry leaves the base output as it is: adapters may cover different layers.
    """

    num_created: ClassVar[int] = 0  # lets a remembered walk over a model know that it may be out of date

    def __init__(
        self,
        base: nn.Module,
        r: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_name: str = "default",
    ) -> None:
        super().__init__()
        if not is_supported(base):
            raise UserError(f"LoRA got a {type(base).__name__}; expected nn.Linear, GPT-2's Conv1D or a 4-bit linear.")
        use_fast_products(base)  # with gradients or without, the same bits
        self.base = base.requires_grad_(False)
        self.training = base.training  # in a model in evaluation mode, dropout is off from the start
        self.in_features, self.out_features = linear_features(base)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.settings: dict[str, AdapterSettings] = {}
        self.merged: str | None = None
        self._unmerged_weight: nn.Parameter | None = None
        self._active: str | None = None
        self.add_adapter(adapter_name, r, alpha, dropout, use_rslora)
        self.active = adapter_name
        LoRALinear.num_created += 1

    @property
    def active(self) -> str | None:
        """Name of the adapter that ``forward`` adds; None is the plain base."""
        return self._active

    @active.setter
    def active(self, name: str | None) -> None:
        self.activate(name)

    def activate(self, name: str | None) -> None:
        """Set ``active``, without the cost of ``nn.Module``'s attribute hook; refused while another one is merged."""
        if self.merged is not None and name != self.merged:
            raise UserError(f"adapter '{self.merged}' is merged into the base; unmerge it before activating {name!r}.")
        object.__setattr__(self, "_active", name)

    @property
    def A(self) -> nn.Parameter:
        """Down projection (r, in) of the active adapter."""
        down: nn.Parameter = self.lora_A[self._existing(self._active)]
        return down

    @property
    def B(self) -> nn.Parameter:
        """Up projection (out, r) of the active adapter."""
        up: nn.Parameter = self.lora_B[self._existing(self._active)]
        return up

    @property
    def weight(self) -> Tensor:
        """Weight of the base layer, for code that asks a layer for its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base layer."""
        return self.base.bias

    def add_adapter(
        self, name: str, r: int = 16, alpha: float | None = None, dropout: float = 0.0, use_rslora: bool = False
    ) -> None:
        """Add an adapter that starts as the identity; ``alpha`` defaults to 2 r. It does not become active."""
        check_adapter_name(name)
        if name in self.settings:
            raise UserError(f"adapter '{name}' is already there; choose another name or delete it first.")
        self.settings[name] = AdapterSettings(r, 2.0 * r if alpha is None else alpha, dropout, use_rslora)
        device = self.base.weight.device
        bound = 1 / math.sqrt(self.in_features)  # what PEFT's kaiming_uniform_(a=sqrt(5)) comes to
        down = torch.empty(r, self.in_features, dtype=torch.float32, device=device).uniform_(-bound, bound)
        self.lora_A[name] = nn.Parameter(down)
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, r, dtype=torch.float32, device=device))

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; if it was active, the plain base is."""
        if self.merged == name:
            raise UserError(f"adapter '{name}' is merged into the base; unmerge it before deleting it.")
        del self.lora_A[self._existing(name)], self.lora_B[name], self.settings[name]
        if self._active == name:
            self._active = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        name = self._active
        if name is None or self.merged is not None or name not in self.settings:
            base_out: Tensor = self.base(x)
            return base_out
        settings, down, up = self.settings[name], self.lora_A[name], self.lora_B[name]
        autocast = torch.is_autocast_enabled(x.device.type)
        flat = x.reshape(-1, self.in_features)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else flat.dtype
        if torch.is_grad_enabled() and self._is_plain(dtype, autocast, settings.dropout):
            weight_OI = self.base.weight.t() if isinstance(self.base, Conv1D) else self.base.weight
            with torch.autocast(x.device.type, enabled=False):
                together: Tensor = _LowRankLinear.apply(
                    flat.to(dtype), weight_OI, self.base.bias, down.to(dtype), up.to(dtype), settings.scaling
                )
            return together.view(*x.shape[:-1], self.out_features)
        total: Tensor = self.base(flat)
        out_dtype = total.dtype
        if settings.dropout > 0 and self.training:
            flat = functional.dropout(flat, settings.dropout)
        if flat.dtype != down.dtype and not autocast:
            flat, total = flat.to(down.dtype), total.to(down.dtype)
        # Scale, second product and sum are one pass: at small widths an elementwise pass costs as much as a product.
        # Adding in place, cheaper still, is for generation only: autograd and autocast need a tensor of their own.
        if autocast or torch.is_grad_enabled():
            total = torch.addmm(total, functional.linear(flat, down), up.t(), alpha=settings.scaling)
        else:
            total.addmm_(product(flat, down), up.t(), alpha=settings.scaling)
        return total.to(out_dtype).view(*x.shape[:-1], self.out_features)

    def _is_plain(self, dtype: torch.dtype, autocast: bool, dropout: float) -> bool:
        """Whether base and adapter can be one autograd function: a frozen dense base held in the format of products.

        Without autocast a half-precision base adds its adapter in fp32, which is not one format.
        """
        weight = self.base.weight
        return (
            is_dense(self.base)
            and not weight.requires_grad
            and weight.dtype == dtype
            and (autocast or dtype == torch.float32)
            and not (dropout > 0 and self.training)
        )

    @torch.no_grad()
    def merged_weight(self, name: str) -> Tensor:
        """Base weight plus the scaled update, in the base's layout and dtype (a quantised base comes dequantised).

        Raises ``UserError`` when the result is not finite.
        """
        down, up = self.lora_A[self._existing(name)], self.lora_B[name]
        weight = _dense_weight(self.base)
        left, right = (down.t(), up.t()) if isinstance(self.base, Conv1D) else (up, down)
        merged: Tensor = torch.addmm(weight.to(torch.float32), left, right, alpha=self.settings[name].scaling)
        merged = merged.to(weight.dtype)
        if not math.isfinite(float(merged.sum())) and not torch.isfinite(merged).all():
            raise UserError(f"merging adapter '{name}' would give weights that are not finite in {weight.dtype}.")
        return merged

    def merge(self, name: str | None = None, weight: Tensor | None = None) -> None:
        """Add an adapter (the active one by default) to the base weight until ``unmerge``; keeps the old weight too.

        ``weight`` is what ``merged_weight`` gave, where that has been asked for already.
        """
        name = self._existing(self._active if name is None else name)
        self.check_unmerged()
        merged = nn.Parameter(self.merged_weight(name) if weight is None else weight, requires_grad=False)
        assert isinstance(self.base.weight, nn.Parameter)
        self._unmerged_weight, self.base.weight = self.base.weight, merged
        self.merged = self._active = name

    def check_unmerged(self) -> None:
        """Raise ``UserError`` when the base weight cannot take a merged adapter now."""
        if self.merged is not None:
            raise UserError(f"adapter '{self.merged}' is already merged into the base; unmerge it first.")
        if is_quantized(self.base):
            raise UserError("a quantised base cannot hold a merged adapter; use merge_lora_weights, which dequantises.")

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit; nothing happens when nothing is merged."""
        if self._unmerged_weight is None:
            return
        if self._unmerged_weight.device != self.base.weight.device:  # the model moved in between
            self._unmerged_weight.data = self._unmerged_weight.data.to(self.base.weight.device)
        self.base.weight, self._unmerged_weight, self.merged = self._unmerged_weight, None, None

    def plain_layer(self, name: str) -> nn.Module:
        """The layer that computes base plus adapter on its own; the base as it is where the adapter is absent.

        The base object is reused and changed; a quantised one gives a new ``nn.Linear`` in its compute dtype.
        """
        self.unmerge()
        if name not in self.settings:
            return self.base
        merged = nn.Parameter(self.merged_weight(name), requires_grad=False)
        if not is_quantized(self.base):
            self.base.weight = merged
            return self.base
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight, dense.bias = merged, self.base.bias
        return dense

    def extra_repr(self) -> str:
        """Adapters with their ranks, for ``print(model)``."""
        ranks = ", ".join(f"{name}: r={settings.r}" for name, settings in self.settings.items())
        return f"{ranks}, active={self._active}"

    def _existing(self, name: str | None) -> str:
        if name is None or name not in self.settings:
            raise UserError(f"no adapter {name!r} in this layer; it has {sorted(self.settings)}.")
        return name


class _LowRankLinear(torch.autograd.Function):
    """Frozen product and low-rank update as one node: y = x W' + b + s (x A') B'.

    Left to autograd, the update costs two passes over wide tensors on its own: a copy of y to add to, and the sum of
    the two gradients of x. Here both are accumulated in place, and the frozen W gets no gradient.
    Suffixes: N rows, I in, O out, r rank.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_rI: Tensor, up_Or: Tensor, scaling: float
    ) -> Tensor:
        hidden_Nr = product(x_NI, down_rI)
        y_NO = product(x_NI, weight_OI, bias_O).addmm_(hidden_Nr, up_Or.t(), alpha=scaling)
        ctx.save_for_backward(x_NI, hidden_Nr, weight_OI, down_rI, up_Or)
        ctx.scaling = scaling
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, hidden_Nr, weight_OI, down_rI, up_Or = ctx.saved_tensors
        # How a skinny product is written decides its speed: these forms take a third of the obvious ones' time in fp32.
        grad_hidden_Nr = product(grad_NO, up_Or.t().contiguous()).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad_NO, weight_OI.t()).addmm_(grad_hidden_Nr, down_rI)
        grad_bias = grad_NO.sum(dim=0) if ctx.needs_input_grad[2] else None
        grad_down = product(grad_hidden_Nr.t(), x_NI.t()) if ctx.needs_input_grad[3] else None
        grad_up = product(hidden_Nr.t(), grad_NO.t()).mul_(ctx.scaling).t() if ctx.needs_input_grad[4] else None
        return grad_x, None, grad_bias, grad_down, grad_up, None


def is_supported(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether an adapter can be put on this layer."""
    return isinstance(module, (nn.Linear, Conv1D)) and type(module).__name__ not in _NEVER_CALLED


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a bitsandbytes linear; told by class name, so that the library is not imported to ask."""
    return any(parent.__name__ in _QUANTIZED for parent in type(module).__mro__)


def linear_features(module: nn.Linear | Conv1D | LoRALinear) -> tuple[int, int]:
    """(in, out) of a layer; not read off its weight, which has another shape when packed in 4 bits."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def check_adapter_name(name: str) -> None:
    """Refuse names that cannot name a parameter."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in dir(nn.ParameterDict()):
        raise UserError(f"adapter name {name!r} cannot be used; choose letters, digits, '_' and '-', such as 'policy'.")


def _dense_weight(base: nn.Linear | Conv1D) -> Tensor:
    if not is_quantized(base):
        return base.weight.detach()
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    packed: Any = base.weight  # one of the library's own parameter classes
    dense: Tensor
    if packed.dtype == torch.int8:
        dense = int8_vectorwise_dequant(packed.data, packed.SCB)
    else:
        dense = dequantize_4bit(packed.data, packed.quant_state)
    return dense
