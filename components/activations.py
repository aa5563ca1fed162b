"""What a forward pass leaves for backward, counted without storage.

The model runs once on fake tensors, which have shapes and no data, and everything autograd keeps is added up. So the
count holds for any model, also for one this project has never seen, and cannot drift from the code. It is that of the
CPU's kernels; CUDA's differ in the norms alone, by a few percent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from components.costly_operations import is_costly

Checkpointing = Literal["none", "full", "selective"] | int

FUSIBLE = {"_to_copy", "add", "addcmul", "div", "exp", "mul", "neg", "pow", "rsqrt", "sigmoid", "silu", "sub"}
"""Operations whose results a compiled block computes again in backward, inside the kernel that needs them, unless a
product reads them too."""


@dataclass(frozen=True)
class BlockActivations:
    """Bytes of one block, for one micro-batch."""

    kept: int
    """All that autograd keeps, its input included."""
    input: int
    """Its input, all that full checkpointing keeps."""
    products: int
    """Results of its matrix products and its attention, which selective checkpointing keeps besides."""
    fused: int = 0
    """What of `kept` a compiled block does not keep."""
    last_product: int = 0
    """What of `products` a compiled block does not keep: its last product joins the residual stream, and nothing in the
    backward of the block reads it."""

    def under(self, checkpointing: Checkpointing, index: int) -> int:
        """Bytes kept until backward comes to this block, the `index`-th."""
        if checkpointing == "none" or (isinstance(checkpointing, int) and (index + 1) % checkpointing):
            return self.kept
        return min(self.kept, self.input + (self.products if checkpointing == "selective" else 0))

    def compiled(self) -> BlockActivations:
        """The same block under torch.compile."""
        kept, products = self.kept - self.fused, self.products - self.last_product
        return replace(self, kept=kept, products=products, fused=0, last_product=0)

    def sliced(self, tp: int) -> BlockActivations:
        """On each of `tp` ranks: all is sliced, by heads, features or sequence, but for two gathered copies of the
        input that its first products need."""
        gathered = min(self.kept, 2 * self.input)
        kept = (self.kept - gathered) // tp + gathered
        return BlockActivations(kept, self.input // tp, self.products // tp, self.fused // tp, self.last_product // tp)


@dataclass(frozen=True)
class Activations:
    """Bytes a forward pass leaves for backward, weights not counted."""

    blocks: tuple[BlockActivations, ...]
    elsewhere: int
    """Outside of the blocks; what the loss needs while it is computed is not in it."""

    def peak(self, checkpointing: Checkpointing, tp: int = 1, *, compiled: bool = False) -> int:
        """The most that is kept at once: all blocks, and the one that is being computed again."""
        blocks = [(block.compiled() if compiled else block).sliced(tp) for block in self.blocks]
        kept = [block.under(checkpointing, index) for index, block in enumerate(blocks)]
        again = [block.kept - held for block, held in zip(blocks, kept, strict=True)]
        return self.elsewhere // tp + sum(kept) + max(again, default=0)


def count(
    model: nn.Module,
    blocks: Sequence[str],
    *,
    micro_batch_size: int,
    sequence_length: int,
    compute_dtype: torch.dtype,
) -> Activations:
    """Of `model(tokens, labels)`, on the meta device or any other; `blocks` names those of its modules.

    The weights that a model computes with are in `compute_dtype`, as FSDP2 gathers them or as copies.
    Raises whatever the model raises; one whose shapes depend on data cannot run without any.
    """
    with torch.device("meta"):
        model = copy.deepcopy(model).to(device="meta", dtype=compute_dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        tokens = torch.zeros(micro_batch_size, sequence_length, dtype=torch.int64)
        ledger = _Ledger(model)
        with ledger.watch({name: model.get_submodule(name) for name in blocks}):
            model(tokens, tokens)
    return ledger.total(blocks)


class _Ledger(TorchDispatchMode):
    """Who keeps which storage. A storage that several operations keep is counted once, for the first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters = {_storage(parameter) for parameter in model.parameters()}
        self._kept: dict[int, tuple[str, Tensor]] = {}
        self._products: dict[int, tuple[str, Tensor]] = {}
        self._inputs: dict[str, int] = {}
        self._made_by: dict[int, str] = {}
        self._read_by_products: set[int] = set()
        self._entered: set[int] = set()
        self._block = ""

    @contextmanager
    def watch(self, blocks: dict[str, nn.Module]) -> Iterator[None]:
        """Count what happens inside."""
        for name, block in blocks.items():
            block.register_forward_pre_hook(lambda _module, arguments, name=name: self._enter(name, arguments))
            block.register_forward_hook(lambda *_: self._leave())
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor), self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) and result else result
        if isinstance(first, Tensor):
            name = func._opname
            read = [_storage(argument) for argument in args if isinstance(argument, Tensor)]
            if _storage(first) not in read:  # a view, or a result in place, is no new tensor
                self._made_by[_storage(first)] = name
                self._read_by_products.discard(_storage(first))
            if is_costly(func):
                self._products[_storage(first)] = (self._block, first)
                self._read_by_products.update(read)
        return result

    def total(self, blocks: Sequence[str]) -> Activations:
        def of(entries: dict[int, tuple[str, Tensor]], name: str) -> int:
            return sum(_nbytes(tensor) for block, tensor in entries.values() if block == name)

        fused = {
            storage: entry
            for storage, entry in self._kept.items()
            if self._made_by.get(storage) in FUSIBLE and storage not in self._read_by_products | self._entered
        }
        return Activations(
            tuple(
                BlockActivations(
                    of(self._kept, name),
                    self._inputs.get(name, 0),
                    of(self._products, name),
                    of(fused, name),
                    next((_nbytes(t) for block, t in reversed(self._products.values()) if block == name), 0),
                )
                for name in blocks
            ),
            of(self._kept, ""),
        )

    def _enter(self, name: str, arguments: tuple[Any, ...]) -> None:
        self._block = name
        tensors = (tensor for tensor in arguments if isinstance(tensor, Tensor))
        inputs = [tensor for tensor in tensors if tensor.requires_grad]
        self._inputs[name] = sum(map(_nbytes, inputs))
        self._entered.update(map(_storage, inputs))

    def _leave(self) -> None:
        self._block = ""

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self._parameters:
            self._kept.setdefault(storage, (self._block, tensor))  # holding it keeps its address from being given again
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _nbytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
