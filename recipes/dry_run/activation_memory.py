"""The memory of activations: the bytes that a forward pass keeps for the backward pass, counted without allocation.

The model runs once on fake tensors, which have shapes but no data, and the tensors that autograd saves are added up. So
the count is correct for any model, also a custom one. It is that of the CPU kernels; CUDA kernels differ only in the
norms, by a few percent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from components.activation_checkpointing import ACMode, is_saved_op
from models.attention import AttentionRule
from models.lm_head import LMHead

FUSIBLE = {"_to_copy", "add", "addcmul", "div", "exp", "mul", "neg", "pow", "rsqrt", "sigmoid", "silu", "sub"}
"""Operations whose results a compiled block recomputes in the backward pass, inside the kernel that reads them, unless
one of `OPS_TO_SAVE` reads them too."""


@dataclass(frozen=True)
class BlockActivations:
    """Bytes that one block keeps for one micro-batch."""

    kept: int
    """All tensors that autograd keeps, including the block's input."""
    input: int
    """The block's input, all that full checkpointing keeps."""
    saved_ops: int
    """Results of `OPS_TO_SAVE` and attention, which selective checkpointing also keeps."""
    fused: int = 0
    """The part of `kept` that a compiled block does not keep, less what it keeps to recompute it from."""
    last_saved_op: int = 0
    """The part of `saved_ops` that a compiled block does not keep: its last product is added to the residual stream,
    and the backward pass of the block does not read it."""

    def kept_with(self, mode: ACMode, index: int) -> int:
        """Return the bytes kept until the backward pass reaches this block, the `index`-th."""
        if mode == "none" or (isinstance(mode, int) and (index + 1) % mode):
            return self.kept
        return min(self.kept, self.input + (self.saved_ops if mode == "selective" else 0))

    def compiled(self) -> BlockActivations:
        """Return the same block under torch.compile."""
        kept, saved_ops = self.kept - self.fused, self.saved_ops - self.last_saved_op
        return replace(self, kept=kept, saved_ops=saved_ops, fused=0, last_saved_op=0)

    def per_tp_rank(self, tp: int) -> BlockActivations:
        """Return what each of `tp` tensor-parallel ranks keeps.

        Every tensor is split, by heads, features or sequence, except two gathered copies of the input, which the first
        matrix products need.
        """
        gathered = min(self.kept, 2 * self.input)  # not divided by tp
        kept = (self.kept - gathered) // tp + gathered
        rest = (self.input, self.saved_ops, self.fused, self.last_saved_op)
        return BlockActivations(kept, *(size // tp for size in rest))


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for the backward pass, without the weights."""

    blocks: tuple[BlockActivations, ...]
    outside_blocks: int
    """Kept outside of the blocks, without what the loss needs while it is computed."""

    def peak(self, mode: ACMode, tp: int = 1, *, compiled: bool = False) -> int:
        """Return the most that is kept at once: all blocks, and the one that is being recomputed."""
        blocks = [(block.compiled() if compiled else block).per_tp_rank(tp) for block in self.blocks]
        kept = [block.kept_with(mode, index) for index, block in enumerate(blocks)]
        # during its backward pass, a checkpointed block holds everything again
        recomputed = [block.kept - resident for block, resident in zip(blocks, kept, strict=True)]
        return self.outside_blocks // tp + sum(kept) + max(recomputed, default=0)


def count_activations(
    model: nn.Module,
    blocks: Sequence[str],
    *,
    micro_batch_size: int,
    sequence_length: int,
    compute_dtype: torch.dtype,
    device_type: str = "cpu",
) -> Activations:
    """Return the activations of `model(tokens, labels)`; `blocks` are names of modules. It may be on the meta device.

    On a GPU, attention with a window or softcap is one kernel, which keeps what plain attention does.

    The weights that a model computes with are in `compute_dtype`, as FSDP2 gathers them or as copies.
    Raises whatever the model raises: a model whose shapes depend on data cannot run on fake tensors.
    """
    with torch.device("meta"):
        model = copy.deepcopy(model).to(device="meta", dtype=compute_dtype)
    for module in model.modules():
        if isinstance(module, LMHead):  # the loss keeps nothing of its chunks, and one takes a hundredth of the time
            module.chunk_tokens = micro_batch_size * sequence_length
        if device_type == "cuda" and isinstance(rule := getattr(module, "rule", None), AttentionRule):
            module.rule = replace(rule, window=0, softcap=0.0)  # type: ignore[assignment]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        tokens = torch.zeros(micro_batch_size, sequence_length, dtype=torch.int64)
        recorder = _SavedTensorRecorder(model)
        with recorder.watch({name: model.get_submodule(name) for name in blocks}):
            model(tokens, tokens)
    return recorder.total(blocks)


class _Result(NamedTuple):
    """A tensor that an operation made. A reference to each is held: freed storages give their addresses to others."""

    tensor: Tensor
    operation: str
    read: list[int]
    """The storages that the operation read."""


class _SavedTensorRecorder(TorchDispatchMode):
    """Records which block saves which storage. A storage saved by several operations is counted once, for the first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters = {_storage(parameter) for parameter in model.parameters()}
        self._kept: dict[int, tuple[str, Tensor]] = {}
        self._saved_ops: dict[int, tuple[str, Tensor]] = {}
        self._inputs: dict[str, int] = {}
        self._made: dict[int, _Result] = {}
        self._read_by_saved_ops: set[int] = set()
        self._entered: set[int] = set()
        self._block = ""

    @contextmanager
    def watch(self, blocks: dict[str, nn.Module]) -> Iterator[None]:
        """Record the operations and saved tensors of the block of this `with`."""
        for name, block in blocks.items():
            block.register_forward_pre_hook(lambda _module, arguments, name=name: self._enter(name, arguments))
            block.register_forward_hook(lambda *_: self._leave())
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor), self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) and result else result
        if isinstance(first, Tensor):
            read = [_storage(argument) for argument in args if isinstance(argument, Tensor)]
            # a view or an in-place result has the storage of an argument: it is not a new tensor
            if _storage(first) not in read:
                self._made[_storage(first)] = _Result(first, func._opname, read)
            if is_saved_op(func):
                # kept by selective checkpointing; what it reads can then not be recomputed inside a fused kernel
                self._saved_ops[_storage(first)] = (self._block, first)
                self._read_by_saved_ops.update(read)
        return result

    def total(self, blocks: Sequence[str]) -> Activations:
        """Return the recorded bytes, those of each block and the rest."""

        def of(entries: dict[int, tuple[str, Tensor]], name: str) -> int:
            return sum(_nbytes(tensor) for block, tensor in entries.values() if block == name)

        fused = {storage: entry for storage, entry in self._kept.items() if self._is_recomputed(storage)}
        # what they are recomputed from, unless it is kept anyway: the residual stream in bf16 for its copy in float32
        sources: dict[int, tuple[str, Tensor]] = {}
        for storage, (block, _) in fused.items():
            for source in self._sources(storage) - self._kept.keys():
                sources.setdefault(source, (block, self._made[source].tensor))
        return Activations(
            tuple(
                BlockActivations(
                    of(self._kept, name),
                    self._inputs.get(name, 0),
                    of(self._saved_ops, name),
                    of(fused, name) - of(sources, name),
                    next((_nbytes(t) for block, t in reversed(self._saved_ops.values()) if block == name), 0),
                )
                for name in blocks
            ),
            of(self._kept, ""),
        )

    def _is_recomputed(self, storage: int) -> bool:
        """Return whether it is an element-wise result that no saved operation reads and no block receives as input."""
        result = self._made.get(storage)
        read = storage in self._read_by_saved_ops or storage in self._entered
        return result is not None and result.operation in FUSIBLE and not read

    def _sources(self, storage: int) -> set[int]:
        """Return the results from which a compiled block recomputes `storage`."""
        found: set[int] = set()
        waiting = [storage]
        while waiting:
            result = self._made.get(waiting.pop())
            for source in result.read if result else ():
                if self._is_recomputed(source):
                    waiting.append(source)
                elif source in self._made:
                    found.add(source)
        return found

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
            self._kept.setdefault(storage, (self._block, tensor))
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _nbytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
