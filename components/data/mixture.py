"""Several sources as one: samples of each in exact proportion to weights, which may change as training goes on."""

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
    """Weights from some point of the training on."""

    from_tokens: Tokens
    """The stage holds from the first sample that starts at or after this many trained tokens."""
    weights: dict[str, float]
    """As `weights` of the mixture."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Sources mixed sample by sample. Every prefix of n samples holds n times its share of each, to less than one.

    Each source has epochs of its own, and its own order within them, which the others and their weights do not touch.
    """

    sources: dict[str, DataConfig]
    """Names and sources: [data.sources.books] use = "components.data:TextFiles", ..."""
    weights: dict[str, float]
    """Share of each source in the samples, in any unit: { books = 3, web = 7 }. A source left out has none."""
    stages: list[Stage] = field(default_factory=list)
    """Other weights later in the training, in order of tokens: the second phase of a two-phase pre-training."""

    def __post_init__(self) -> None:
        for name, source in self.sources.items():
            if isinstance(source, Mixture):  # its order and stages would be lost
                raise InputError(f"sources.{name}", "a mixture of mixtures; list the sources of both in one")
        for weights in self._weights():
            if strange := [name for name in weights if name not in self.sources]:
                raise InputError("weights", f"{strange[0]} is none of the sources: {', '.join(self.sources) or 'none'}")
            integer_weights(weights)
        starts = [0, *(stage.from_tokens for stage in self.stages)]
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise InputError("stages", f"from_tokens = {starts[1:]} do not increase from above 0")
        for name in self.sources:
            if not any(weights.get(name) for weights in self._weights()):
                raise InputError("weights", f"{name} has no weight in any stage; give it one, or leave the source out")

    def build(
        self, *, tokenizer: Tokenizer, sequence_length: int, cache_dir: Path, progress: Callable[[str], None]
    ) -> MixedDataset:
        """Every source prepares itself as it would alone. Raises ValueError or OSError, naming the source."""
        opened: dict[str, PackedDataset] = {}
        for name, source in self.sources.items():
            try:
                opened[name] = source.build(
                    tokenizer=tokenizer, sequence_length=sequence_length, cache_dir=cache_dir, progress=progress
                )
            except (ValueError, OSError) as error:
                raise InputError.below(f"sources.{name}", error) from error
        starts = [0, *(-(-stage.from_tokens // sequence_length) for stage in self.stages)]
        whole = [integer_weights(weights) for weights in self._weights()]
        stages = [
            (start, [weights.get(name, 0) for name in self.sources])
            for start, weights, end in zip(starts, whole, [*starts[1:], None], strict=True)
            if start != end  # two stages may start within one sample: the later one holds
        ]
        return MixedDataset(opened, StagedMixingSchedule(stages))

    def _weights(self) -> list[dict[str, float]]:
        return [self.weights, *(stage.weights for stage in self.stages)]


def sources_in(section: str, data: object) -> dict[str, object]:
    """Key -> source, of all that the section holds: itself, or those of a mixture."""
    if isinstance(data, Mixture):
        return {f"{section}.sources.{name}": source for name, source in data.sources.items()}
    return {section: data}


class MixedDataset:
    """Sequences of all sources, one source after the other; `order` says in which order they are trained on."""

    def __init__(self, sources: Mapping[str, PackedDataset], schedule: StagedMixingSchedule):
        self.sources = dict(sources)
        self.schedule = schedule
        self._starts = [0, *accumulate(map(len, self.sources.values()))]

    @property
    def fingerprint(self) -> str | None:
        """Of the text of all sources; None where one of them does not know its own."""
        each = {name: getattr(source, "fingerprint", None) for name, source in self.sources.items()}
        return None if None in each.values() else " ".join(f"{name}={content}" for name, content in each.items())

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Tensor:
        """(T+1,) int64"""
        return self.__getitems__((index,))[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """(n, T+1) int64: the sequences of `indices`, in their order."""
        if outside := [index for index in indices if not 0 <= index < len(self)]:
            raise IndexError(f"sequence {outside[0]} of {len(self)}")
        wanted = np.asarray(indices, dtype=np.int64)
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        rows: list[Tensor] = [torch.empty(0)] * len(wanted)
        for number, source in enumerate(self.sources.values()):
            places = np.flatnonzero(owners == number)
            if len(places):
                own = (wanted[places] - self._starts[number]).tolist()
                found = source.__getitems__(own) if hasattr(source, "__getitems__") else [source[i] for i in own]
                for place, row in zip(places, found, strict=True):
                    rows[place] = row
        return torch.stack(rows)

    def order(self, *, seed: int, shuffle: bool) -> MixedOrder:
        """The order that a loader follows."""
        lengths = [len(source) for source in self.sources.values()]
        return MixedOrder(self.schedule, lengths, seed=seed, shuffle=shuffle)

    def source_epochs(self, samples: int) -> dict[str, float]:
        """Epochs of each source among the first `samples` of the global order."""
        counts = self.schedule.counts(samples).tolist()
        return {name: count / len(source) for (name, source), count in zip(self.sources.items(), counts, strict=True)}

    def describe(self, index: int) -> str:
        """Where sequence `index` comes from, for people."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        name, source = list(self.sources.items())[number]
        describe = getattr(source, "describe", "sequence {}".format)
        return f"{name}: {describe(index - self._starts[number])}"


class MixedOrder:
    """Global sample number -> (epoch of its source, index among all sequences): as pure a function as `SampleOrder`."""

    def __init__(self, schedule: StagedMixingSchedule, lengths: Sequence[int], *, seed: int, shuffle: bool):
        self._schedule = schedule
        self._orders = [SampleOrder(length, seed=seed, shuffle=shuffle) for length in lengths]
        self._starts = [0, *accumulate(lengths)]

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) global sample numbers from 0 -> (n,) epochs, (n,) indices; both int64."""
        sources, numbers = self._schedule(np.asarray(samples, dtype=np.int64))
        epochs, indices = np.empty_like(numbers), np.empty_like(numbers)
        for source, order in enumerate(self._orders):
            here = sources == source
            epochs[here], within = order(numbers[here])
            indices[here] = within + self._starts[source]
        return epochs, indices
