"""Where the memory of a computation goes, for one that runs and for one that could not: of any model, on any machine.

`Ledger` follows every tensor's memory from its allocation to its release while real code runs. `Shadow` does the same
for code whose numbers are imagined: floating-point tensors have shapes but no memory (PyTorch's fake tensors), while
token ids and masks are real, so that code which looks at lengths and counts takes the way it would take. What such a
run costs is the time of its Python, whatever the size of the model.

What neither sees is scratch memory inside a kernel; `_scratch_bytes` knows the kernels where that is of the order of
their inputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
# Integers and booleans computed from imagined numbers are made up, and real, up to this many of them.
MAX_REAL_NUMBERS = 2**20
_INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}


@dataclass
class Allocation:
    """A block of memory: its size, what it is for, and between which operations it lives."""

    num_bytes: int
    label: str
    born: int
    died: float = inf


@dataclass
class Peak:
    """The moment of most memory inside a `phase`: bytes by label. Filled in when the phase ends."""

    by_label: dict[str, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(self.by_label.values())


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the memory of all tensors that are made while it is active (`with ledger: ...`), and of those it is told.

    `label_of` says what a new block is for; `relabel` says it again when more is known. A label holds for the whole
    life of a block, so what became a gradient or a cache counts as such from its first byte.
    """

    def __init__(self, label_of: Callable[[Tensor], str] = lambda tensor: "activations") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.label_of = label_of
        self.num_operations = 0
        self._live: dict[int, Allocation] = {}
        self._num_bytes = 0
        self._phase: _OpenPhase | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes allocated now."""
        return self._num_bytes

    def relabel(self, tensors: Iterable[Tensor], label: str) -> None:
        """Say what the memory of these tensors is for; memory that was not followed before is from now on."""
        for tensor in tensors:
            self._follow(tensor)
            allocation = self._live.get(tensor.untyped_storage()._cdata)
            if allocation is not None:
                allocation.label = label

    @contextmanager
    def phase(self) -> Iterator[Peak]:
        """Find the peak of what happens inside the block, with everything that lives at that moment."""
        if self._phase is not None:
            raise ValueError("a phase is under way already; they do not nest")
        peak = Peak()
        self._phase = _OpenPhase(list(self._live.values()), self._num_bytes, self.num_operations)
        try:
            yield peak
        finally:
            peak.by_label = self._phase.by_label()
            self._phase = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._followed(func, args, func(*args, **(kwargs or {})))

    def _followed(self, func: Any, args: tuple[Any, ...], out: Any) -> Any:
        self.num_operations += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        scratch = _scratch_bytes(func, args)
        if scratch:
            block = self._allocated(scratch, "activations")
            self._released(block)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or storage.nbytes() == 0:
            return
        self._live[key] = self._allocated(storage.nbytes(), self.label_of(tensor))
        # The key of a storage may be used again; a storage that dies takes its own entry away first.
        weakref.finalize(storage, self._forget, key)

    def _allocated(self, num_bytes: int, label: str) -> Allocation:
        allocation = Allocation(num_bytes, label, self.num_operations)
        self._num_bytes += num_bytes
        if self._phase is not None:
            self._phase.add(allocation, self._num_bytes)
        return allocation

    def _released(self, allocation: Allocation) -> None:
        self.num_operations += 1
        allocation.died = self.num_operations
        self._num_bytes -= allocation.num_bytes

    def _forget(self, key: int) -> None:
        self._released(self._live.pop(key))


class Shadow(Ledger):  # type: ignore[no-untyped-call]
    """A ledger under which floating-point numbers are imagined. Tensors made inside must not be used outside.

    Made-up results: a number read from an imagined tensor is 1, a comparison of imagined numbers is True, an integer
    computed from them (such as a drawn token) is 0.

    Example:
        >>> shadow = Shadow()
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(1000, 1000)
        >>> shadow.imagine_module(model, "weights")
        >>> with shadow, shadow.phase() as peak:
        ...     loss = model(torch.zeros(8, 1000)).sum()
        >>> peak.by_label["weights"]
        4004000
    """

    def __init__(self, label_of: Callable[[Tensor], str] = lambda tensor: "activations") -> None:
        super().__init__(label_of)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def imagine_module(self, module: torch.nn.Module, label: str) -> None:
        """Turn parameters and buffers of a module on the meta device into imagined ones on the CPU, in place."""
        made: dict[int, Tensor] = {}  # tied weights stay tied
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                if id(parameter) not in made:
                    imagined = self.imagine(parameter.detach())
                    made[id(parameter)] = torch.nn.Parameter(imagined, requires_grad=parameter.requires_grad)
                part._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
            for name, buffer in list(part.named_buffers(recurse=False)):
                part._buffers[name] = made.setdefault(id(buffer), self.imagine(buffer))
        self.relabel(made.values(), label)

    def imagine(self, tensor: Tensor) -> Tensor:
        """An imagined tensor like this one, on the CPU; imagined ones are returned as they are."""
        if isinstance(tensor, FakeTensor):
            return tensor
        with self._fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not given:
            return self._followed(func, args, self._made(func, args, kwargs))
        if not any(isinstance(tensor, FakeTensor) for tensor in given):
            # Whole numbers are computed for real; what becomes a floating-point number of them is imagined.
            out = func(*args, **kwargs)
            return self._followed(func, args, tree_map_only(Tensor, self._unreal, out))
        if func in (aten._local_scalar_dense.default, aten.equal.default):
            return _made_up_number(given[0].dtype, func)
        if func in _INDEXING:
            args = (args[0], _places(args[1]), *args[2:])
        originals: dict[int, Tensor] = {}

        def imagined(tensor: Tensor) -> Tensor:
            other = self.imagine(tensor)
            originals[id(other)] = tensor
            return other

        fake_args, fake_kwargs = tree_map_only(Tensor, imagined, (args, kwargs))
        with self._fake:
            out = func(*fake_args, **fake_kwargs)

        def returned(tensor: Tensor) -> Tensor:
            # What an operation in place returns is its own argument.
            return originals[id(tensor)] if id(tensor) in originals else _made_up(tensor)

        return self._followed(func, args, tree_map_only(Tensor, returned, out))

    def _made(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a factory gives: whole numbers for real unless there are very many of them."""
        with self._fake:
            out = func(*args, **kwargs)
        is_real = isinstance(out, Tensor) and not out.is_floating_point() and out.numel() <= MAX_REAL_NUMBERS
        return func(*args, **kwargs) if is_real else out

    def _unreal(self, tensor: Tensor) -> Tensor:
        return self.imagine(tensor) if tensor.is_floating_point() else tensor


class _OpenPhase:
    """All blocks that live in a phase, and when the most bytes were in use."""

    def __init__(self, live: list[Allocation], num_bytes: int, now: int) -> None:
        self.allocations, self.most_bytes, self.at = live, num_bytes, now
        self.start = now

    def add(self, allocation: Allocation, num_bytes: int) -> None:
        self.allocations.append(allocation)
        if num_bytes > self.most_bytes:
            self.most_bytes, self.at = num_bytes, allocation.born

    def by_label(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for block in self.allocations:
            if block.born <= self.at < block.died:
                found[block.label] = found.get(block.label, 0) + block.num_bytes
        return found


def _made_up_number(dtype: torch.dtype, func: Any) -> float | int | bool:
    if dtype == torch.bool or func is aten.equal.default:
        return True
    return 1.0 if dtype.is_floating_point else 0


def _made_up(tensor: Tensor) -> Tensor:
    """Real whole numbers in the place of a few imagined ones; True for booleans, so that what is checked is sound."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.numel() > MAX_REAL_NUMBERS:
        return tensor
    return torch.full(tensor.shape, tensor.dtype == torch.bool, dtype=tensor.dtype)


def _places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Indices with every mask turned into the places where it is True: their number decides the result's shape."""
    places: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            places.append(index)
        else:
            places.extend(index.nonzero(as_tuple=True))
    return places


def _scratch_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Memory that a kernel takes for itself while it runs, where that is of the order of its inputs."""
    if func is aten.logsumexp.default:  # exp(x - max), before it is summed
        return int(args[0].numel() * args[0].element_size())
    return 0
