"""The last MLP at the positions that are read, and nowhere else.

Losses read the hidden states of answer tokens, a reward model reads one per row, and a prefill reads the last. All
layers but the last must run everywhere, since attention looks back at them; the last MLP, two thirds of its block, need
not. On eight layers and prompts longer than their answers this is a twentieth of a training step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Its rows are filled up to a multiple of this with others: on a CPU oneDNN compiles kernels for every number of rows
# that it meets and keeps them, half a megabyte each; GPUs like round numbers too.
ROWS = 64


class LastMLP:
    """Hooks on the MLP of a model's last block, asleep outside `only_at`; a model without such a part has none."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.wanted: Tensor | None = None  # flat positions, inside `only_at`
        self._shape = torch.Size()
        mlp = _find(model)
        if mlp is not None:
            mlp.register_forward_pre_hook(self._narrow)
            mlp.register_forward_hook(self._widen)

    def only_at(self, wanted_BT: Tensor) -> AbstractContextManager[None]:
        """Inside the block the last MLP runs where `wanted_BT` is True; hidden states elsewhere are of no use."""
        is_wanted = wanted_BT.flatten()
        # Counted where the mask lies: a number fetched from there would make a GPU wait once more.
        num_more = -is_wanted.sum() % ROWS
        is_filled = is_wanted | ((~is_wanted).cumsum(dim=0) <= num_more)
        return self.at(is_filled.nonzero().squeeze(-1))

    @contextmanager
    def at(self, wanted: Tensor | None) -> Iterator[None]:
        """The same with flat positions; None: everywhere."""
        former, self.wanted = self.wanted, wanted
        try:
            yield
        finally:
            self.wanted = former

    def _narrow(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.wanted is None:
            return None
        hidden, *others = arguments
        self._shape = hidden.shape
        return hidden.flatten(0, -2).index_select(0, self.wanted), *others

    def _widen(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.wanted is None:
            return None
        whole = output.new_zeros(self._shape.numel() // self._shape[-1], self._shape[-1])
        return whole.index_copy(0, self.wanted, output).view(self._shape)


def _find(model: PreTrainedModel) -> nn.Module | None:
    """The dense MLP of the last block; experts answer with more than one tensor and are left alone."""
    stacks = [module for module in model.base_model.children() if isinstance(module, nn.ModuleList) and len(module)]
    if len(stacks) != 1:
        return None
    mlp = dict(stacks[0][-1].named_children()).get("mlp")
    if mlp is None or any(isinstance(part, nn.ModuleList) for part in mlp.modules()):
        return None
    return None if "experts" in dict(mlp.named_children()) else mlp
