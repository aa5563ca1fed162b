"""Interfaces that several components need, each stated once.

A component declares what it needs of another one by these protocols, and does not import it. This module imports
nothing of the project, so that every component can import it, and torch and NumPy only for type checking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch import Tensor


T = TypeVar("T")


class Comm(Protocol):
    """A group of processes that this one belongs to. For a single process every collective is the identity."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all processes, in place, and return it."""
        ...


class WorldComm(Comm, Protocol):
    """All processes of a run."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and logs."""
        ...

    @property
    def local_size(self) -> int:
        """Number of processes on this node."""
        ...

    @property
    def long_timeout_group(self) -> dist.ProcessGroup | None:
        """A second group, for collectives of the checkpoint thread; None for a single process."""
        ...

    def all_reduce_max(self, value: int) -> int:
        """Return the largest `value` of all processes."""
        ...

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every process, in order of rank."""
        ...


class Tokenizer(Protocol):
    """A tokenizer with a vocabulary of V ids.

    Optional are `start_of_document`, the id that begins every document and every prompt, or None; and
    `leave_out_special(rows)`, called if a model has only so many rows: limits the ids to those below if it can.
    """

    @property
    def vocab_size(self) -> int:
        """V: all ids are below it."""
        ...

    @property
    def end_of_document(self) -> int:
        """The id that ends every document."""
        ...

    @property
    def byte_lengths(self) -> np.ndarray:
        """(V,) int64: number of UTF-8 bytes of each id, 0 for special tokens. Used for bits per byte."""
        ...

    @property
    def fingerprint(self) -> str:
        """A string that changes whenever the ids of any text could change; part of the key of prepared data."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, without start and end token. Special-token text in `texts` is ordinary text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        ...


class PackedDataset(Protocol):
    """A map-style dataset of packed sequences, in a fixed order, independent of shuffling.

    Optional are `HasOrder`, `__getitems__(indices) -> (n, T+1)`, which reads many sequences at once, and `fingerprint`:
    a string that changes with the content, compared between processes and with that of a resumed run.
    """

    def __len__(self) -> int:
        """Return the number of sequences in one epoch."""
        ...

    def __getitem__(self, index: int) -> Tensor:
        """Return (sequence_length + 1,) int64 token ids: inputs are [:-1], targets are [1:]."""
        ...


class UpdateCost(NamedTuple):
    """What an optimizer step of a whole model takes beyond element-wise operations."""

    flops: float
    """FLOPs of matrix products, in equal parts on all processes."""
    elements: int
    """Elements of the matrices that processes exchange: as shards to the one that updates a matrix, and back."""


Order = Callable[["np.ndarray"], tuple["np.ndarray", "np.ndarray"]]
"""A pure function from (n,) global sample numbers to (n,) epochs and (n,) dataset indices."""


@runtime_checkable
class HasOrder(Protocol):
    """A dataset that defines the order in which it is read, such as a mixture."""

    def order(self, *, seed: int) -> Order: ...


@runtime_checkable
class DataConfig(Protocol):
    """A [data] section: `build` prepares the data on first use, and returns sequences of sequence_length + 1 tokens."""

    def build(
        self, *, tokenizer: Any, sequence_length: int, cache_dir: Path, progress: Callable[[str], None]
    ) -> PackedDataset:
        """Return the dataset; `progress` receives lines to display. Raises ValueError or OSError for bad input."""
        ...
