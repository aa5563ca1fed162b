"""Interfaces that several components need, each stated once.

A component asks for what it needs of another by one of these protocols and never imports it. This module imports
nothing of the project, so that every component may import it, and torch and NumPy only for the type checker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch import Tensor


class Comm(Protocol):
    """A group of processes, as one of them sees it. Of a single process every collective is the identity."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return `tensor` added over all processes, in place."""
        ...


class WorldComm(Comm, Protocol):
    """All processes of a run."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and logs."""
        ...

    @property
    def long_timeout_group(self) -> dist.ProcessGroup | None:
        """A second group, for collectives of other threads than the training loop's."""
        ...

    def gather(self, text: str) -> list[str]:
        """Return `text` of every process, by rank."""
        ...


class Tokenizer(Protocol):
    """A tokenizer ready to use, V being its vocabulary size."""

    @property
    def vocab_size(self) -> int:
        """Number of ids: every id is below it."""
        ...

    @property
    def end_of_document(self) -> int:
        """The id written after every document."""
        ...

    @property
    def byte_lengths(self) -> np.ndarray:
        """(V,) int64: UTF-8 bytes each id stands for, 0 for special tokens. Makes bits per byte exact."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the ids of some text could change; part of the key of prepared data."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, without end_of_document. Special-token text in `texts` is ordinary text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        ...


class PackedDataset(Protocol):
    """A map-style dataset of packed sequences, in a fixed order that has nothing to do with shuffling.

    Optional are `HasOrder`, `__getitems__(indices) -> (n, T+1)`, which reads many sequences at once, and `fingerprint`:
    a string that changes with the content, compared between processes and with that of a resumed run.
    """

    def __len__(self) -> int:
        """Return the sequences in one epoch."""
        ...

    def __getitem__(self, index: int) -> Tensor:
        """Return (sequence_length + 1,) int64 token ids: inputs are [:-1], targets are [1:]."""
        ...


Order = Callable[["np.ndarray"], tuple["np.ndarray", "np.ndarray"]]
"""(n,) global sample numbers -> (n,) epochs, (n,) indices into a dataset: a pure function."""


@runtime_checkable
class HasOrder(Protocol):
    """A dataset that says itself in which order it is read, as mixtures do."""

    def order(self, *, seed: int, shuffle: bool) -> Order: ...


@runtime_checkable
class DataConfig(Protocol):
    """A [data] section: prepares itself on first use and opens as sequences of `sequence_length + 1` tokens."""

    def build(
        self, *, tokenizer: Any, sequence_length: int, cache_dir: Path, progress: Callable[[str], None]
    ) -> PackedDataset:
        """`progress` takes lines to display. Raises ValueError or OSError, with a clear message, for bad input."""
        ...
