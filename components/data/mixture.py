"""Mixture: several sources mixed in exact proportion to weights, which may change during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from components.data.mixing_schedule import StagedMixingSchedule, integer_weights
from components.data.order import SampleOrder
from components.errors import InputError
from components.interfaces import DataConfig, PackedDataset, Tokenizer
from components.units import Tokens


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Weights from a given point of training on."""

    from_tokens: Tokens
    """The stage starts at the first sample that begins at or after this many trained tokens."""
    weights: dict[str, float]
    """Weights of the sources in this stage, as `weights` of the mixture."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Sources mixed sample by sample: the first n samples contain n times the fraction of each, within one sample.

    Each source has separate epochs, with an order that does not depend on the other sources and the weights.
    """

    sources: dict[str, DataConfig]
    """Sources by name: [data.sources.books] use = "components.data:TextFiles", ..."""
    weights: dict[str, float]
    """Relative number of samples of each source: { books = 3, web = 7 }. A source that is not listed has weight 0."""
    stages: list[Stage] = field(default_factory=list)
    """Other weights later in training, in increasing order of tokens, such as a second phase of pre-training."""

    def __post_init__(self) -> None:
        for name, source in self.sources.items():
            if isinstance(source, Mixture):  # its order and stages would be ignored
                raise InputError(
                    f"sources.{name}", "a mixture cannot contain a mixture; list the sources of both in one"
                )
        for weights in self._weights():
            if unknown := [name for name in weights if name not in self.sources]:
                raise InputError(
                    "weights", f"{unknown[0]} is not a source; expected {', '.join(self.sources) or 'none'}"
                )
            integer_weights(weights)
        starts = [0, *(stage.from_tokens for stage in self.stages)]
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise InputError("stages", f"from_tokens = {starts[1:]}; expected increasing numbers above 0")
        for name in self.sources:
            if not any(weights.get(name) for weights in self._weights()):
                raise InputError(
                    "weights", f"{name} has weight 0 in all stages; give it a weight, or remove the source"
                )

    def build(
        self, *, tokenizer: Tokenizer, sequence_length: int, cache_dir: Path, progress: Callable[[str], None]
    ) -> MixedDataset:
        """Prepare and open every source. Raises InputError or OSError at the key of the source."""
        opened: dict[str, PackedDataset] = {}
        for name, source in self.sources.items():
            try:
                opened[name] = source.build(
                    tokenizer=tokenizer, sequence_length=sequence_length, cache_dir=cache_dir, progress=progress
                )
            except (ValueError, OSError) as error:
                raise InputError.below(f"sources.{name}", error) from error
        # in samples, rounded up: a stage starts at the first sample that begins at or after from_tokens
        starts = [0, *(-(-stage.from_tokens // sequence_length) for stage in self.stages)]
        whole = [integer_weights(weights) for weights in self._weights()]
        stages = [
            (start, [weights.get(name, 0) for name in self.sources])
            for start, weights, end in zip(starts, whole, [*starts[1:], None], strict=True)
            if start != end  # of two stages that start within one sample, the later one is used
        ]
        return MixedDataset(opened, StagedMixingSchedule(stages))

    def _weights(self) -> list[dict[str, float]]:
        return [self.weights, *(stage.weights for stage in self.stages)]


def sources_in(section: str, data: object) -> dict[str, object]:
    """Return key -> source of a [data] section: the source itself, or those of a mixture."""
    if isinstance(data, Mixture):
        return {f"{section}.sources.{name}": source for name, source in data.sources.items()}
    return {section: data}


class MixedDataset:
    """The sequences of all sources, one source after the other; `order` is the training order."""

    def __init__(self, sources: Mapping[str, PackedDataset], schedule: StagedMixingSchedule):
        self.sources = dict(sources)
        self.schedule = schedule
        self._starts = [0, *accumulate(map(len, self.sources.values()))]

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the text of all sources; None if one of them has none."""
        each = {name: getattr(source, "fingerprint", None) for name, source in self.sources.items()}
        return None if None in each.values() else " ".join(f"{name}={content}" for name, content in each.items())

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Tensor:
        """Return (T+1,) int64 token ids."""
        return self.__getitems__((index,))[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Return (n, T+1) int64 token ids: the sequences of `indices`, in their order."""
        if outside := [index for index in indices if not 0 <= index < len(self)]:
            raise IndexError(f"index {outside[0]} is out of range for {len(self)} sequences")
        wanted = np.asarray(indices, dtype=np.int64)
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        rows: list[Tensor] = [torch.empty(0)] * len(wanted)
        for number, source in enumerate(self.sources.values()):
            places = np.flatnonzero(owners == number)
            if len(places):
                within = (wanted[places] - self._starts[number]).tolist()
                found = source.__getitems__(within) if hasattr(source, "__getitems__") else [source[i] for i in within]
                for place, row in zip(places, found, strict=True):
                    rows[place] = row
        return torch.stack(rows)

    def order(self, *, seed: int) -> MixedOrder:
        lengths = [len(source) for source in self.sources.values()]
        return MixedOrder(self.schedule, lengths, seed=seed)

    def source_epochs(self, samples: int) -> dict[str, float]:
        """Return the epochs of each source among the first `samples` of the global order."""
        counts = self.schedule.counts(samples).tolist()
        return {name: count / len(source) for (name, source), count in zip(self.sources.items(), counts, strict=True)}

    def describe(self, index: int) -> str:
        """Return where sequence `index` comes from, for display."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        name, source = list(self.sources.items())[number]
        describe = getattr(source, "describe", "sequence {}".format)
        return f"{name}: {describe(index - self._starts[number])}"


class MixedOrder:
    """Maps global sample numbers to (epoch of the source, index among all sequences), as `SampleOrder`."""

    def __init__(self, schedule: StagedMixingSchedule, lengths: Sequence[int], *, seed: int):
        self._schedule = schedule
        self._orders = [SampleOrder(length, seed=seed) for length in lengths]
        self._starts = [0, *accumulate(lengths)]

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map (n,) global sample numbers from 0 to (n,) epochs and (n,) indices, both int64."""
        sources, numbers = self._schedule(np.asarray(samples, dtype=np.int64))
        epochs, indices = np.empty_like(numbers), np.empty_like(numbers)
        for source, order in enumerate(self._orders):
            here = sources == source
            epochs[here], within = order(numbers[here])
            indices[here] = within + self._starts[source]
        return epochs, indices
