"""Scorer: log probabilities of requests under a model, on any layout.

W requests of a forward pass, T inputs of each, V vocabulary, n predicted tokens of the pass
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.evaluation_mode import evaluating
from components.interfaces import Comm
from components.tasks.encoding import EncodedRequest

MAX_LOGITS = 2**28
"""Elements of the logits of a forward pass, unless a single request has more: 0.5 GB in bf16."""
LENGTH_FACTORS = (4, 2)
"""Ratio of a length to the next shorter one: 4, so that there are few, and 2 for the last one."""


@dataclass(frozen=True)
class Scorer:
    """Computes the log probabilities of requests in forward passes of a few fixed shapes.

    A request is padded on the right to the shortest of `lengths` that holds it, with an id that begins no document.
    Attention is causal, so padding changes no result. Few shapes, because each is compiled once.
    """

    sequence_length: int
    pass_tokens: int
    """Tokens of a forward pass of one rank, as in training."""
    vocab_size: int
    first_input: int
    """The id with which documents begin, which document masking looks for."""
    multiple: int = 1
    """Inputs of a forward pass are a multiple of this, as sequence parallelism needs."""
    min_length: int = 64
    """Shorter requests are padded to about this many tokens."""

    @property
    def lengths(self) -> list[int]:
        """The tokens to which requests are padded, increasing: of 4096 they are 64, 256, 1024 and 4096."""
        lengths = [self.sequence_length]
        for factor in LENGTH_FACTORS:
            while lengths[0] % (factor * self.multiple) == 0 and lengths[0] // factor >= self.min_length:
                lengths.insert(0, lengths[0] // factor)
        return lengths

    def rows(self, length: int) -> int:
        """Return W, the requests of a forward pass that are padded to `length`."""
        return max(1, min(self.pass_tokens, MAX_LOGITS // self.vocab_size) // length)

    @torch.no_grad()
    def score(
        self,
        requests: Sequence[EncodedRequest],
        model: nn.Module,
        world: Comm,
        compute: Callable[[], AbstractContextManager[object]],
    ) -> list[tuple[float, bool]]:
        """Return for each request -log of its probability, and whether its tokens are the most probable ones.

        Call on every rank of `world`, the data-parallel ranks, with the same requests. The result is the same on all.
        """
        # of each request: nats, and the number of tokens that are not the most probable ones
        sums_R2 = torch.zeros(len(requests), 2, dtype=torch.float64, device=world.device)
        with evaluating(model), compute():
            for length, batch in self._batches(requests, world):
                collated = self._collate(requests, batch, length)
                if world.device.type == "cuda":  # a copy from pageable memory would synchronize
                    collated = [each.pin_memory() for each in collated]
                inputs_WT, places_n, labels_n, index_n = (each.to(world.device, non_blocking=True) for each in collated)
                logits_nV = model(inputs_WT).flatten(0, 1)[places_n].float()
                nats_n = torch.logsumexp(logits_nV, -1) - logits_nV.gather(-1, labels_n.unsqueeze(-1)).squeeze(-1)
                wrong_n = logits_nV.argmax(-1) != labels_n
                sums_R2.index_add_(0, index_n, torch.stack([nats_n, wrong_n], -1).to(sums_R2.dtype))
        sums = world.all_reduce_sum(sums_R2.cpu()).tolist()  # the only synchronization with the device
        return [(nats, wrong == 0) for nats, wrong in sums]

    def _batches(self, requests: Sequence[EncodedRequest], world: Comm) -> Iterator[tuple[int, list[int]]]:
        """Yield length and indices of this rank's requests of each forward pass, equally many passes on all ranks.

        A sharded model needs them, so that a rank may have a pass without requests.
        """
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_length[next(length for length in self.lengths if length >= len(request.inputs))].append(index)
        for length, indices in sorted(by_length.items()):
            rows = self.rows(length)
            for first in range(0, len(indices), rows * world.size):
                start = first + rows * world.rank
                yield length, indices[start : start + rows]

    def _collate(self, requests: Sequence[EncodedRequest], batch: Sequence[int], length: int) -> list[Tensor]:
        """Return inputs (W, T) of the requests with the indices `batch`, and for each predicted token its place among
        the W T inputs, its id and the index of its request."""
        # padding begins no document: each would otherwise be attended to on its own
        inputs_WT = torch.full((self.rows(length), length), 1 if self.first_input == 0 else 0)
        places, labels, indices = [], [], []
        for row, index in enumerate(batch):
            request = requests[index]
            end, count = len(request.inputs), len(request.targets)
            inputs_WT[row, :end] = torch.from_numpy(request.inputs)
            places.append(row * length + torch.arange(end - count, end))
            labels.append(torch.from_numpy(request.targets))
            indices.append(torch.full((count,), index))
        none = [torch.zeros(0, dtype=torch.int64)]
        return [inputs_WT, *(torch.cat(each or none) for each in (places, labels, indices))]
