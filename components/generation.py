"""Generation: continue several token sequences at once, and choose each next token from its logits.

B rows, T tokens, N new tokens, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from components.errors import InputError


class HasKVCache(Protocol):
    """A model that can keep what it computed of earlier tokens."""

    def new_cache(self, padding: Sequence[int], capacity: int) -> Any:
        """Room for `capacity` tokens of each row; `padding`: how many slots to leave before the first of each."""
        ...

    def __call__(self, tokens_BT: Tensor, *, cache: Any) -> Tensor:
        """Logits (B, 1, V) of the last of `tokens_BT`, which follow what `cache` holds and join it."""
        ...


class Sampler(Protocol):
    def choose(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """(B,) ids."""
        ...


@torch.inference_mode()
def generate_tokens(
    model: HasKVCache,
    prompts: Sequence[Sequence[int]],
    sampling: Sampler,
    uniform_BN: Tensor,
    *,
    end: int | None,
    vocab_size: int,
    device: torch.device,
) -> Iterator[list[int | None]]:
    """The next id of each prompt, step by step; None for those that have ended, by `end`, which is not given out.

    At most as many steps as `uniform_BN` (B, N), float64 in [0, 1), has numbers; row b is chosen by row b of it alone.
    Ids from `vocab_size` on, which pad an embedding, are never chosen. No prompt may be empty.
    """
    longest, steps = max(map(len, prompts)), uniform_BN.shape[1]
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = [[0] * missing + list(prompt) for missing, prompt in zip(padding, prompts, strict=True)]
    tokens_BT = torch.tensor(tokens, device=device)
    uniform_NB = uniform_BN.T.contiguous().to(device)
    running = [True] * len(prompts)
    cache = model.new_cache(padding, longest + steps - 1)
    for uniform_B in uniform_NB:
        logits_BV = model(tokens_BT, cache=cache)[:, -1, :vocab_size]
        chosen_B = sampling.choose(logits_BV, uniform_B)
        ids = chosen_B.tolist()
        running = [still and id != end for still, id in zip(running, ids, strict=True)]
        if not any(running):
            return
        yield [id if still else None for still, id in zip(running, ids, strict=True)]
        tokens_BT = chosen_B.unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature first, then the `top_k` most probable, then the fewest of those that make up `top_p`.

    The order is that of `transformers`. `temperature` 0 takes the most probable token.
    """

    temperature: float = 1.0
    """Divides the logits."""
    top_k: int | None = None
    """Choose among this many."""
    top_p: float | None = None
    """Choose among the most probable that together have at least this probability (arXiv 1904.09751)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError("temperature", f"{self.temperature} is no number from 0 on")
        if self.top_k is not None and self.top_k < 1:
            raise InputError("top_k", f"{self.top_k} leaves nothing to choose from; use 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError("top_p", f"{self.top_p} is no probability above 0")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def choose(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """(B,) ids, by inverting the distribution function at `uniform_B`, float64 in [0, 1).

        The same numbers choose the same tokens on any device, in any batch. Greedy, they are not looked at.
        """
        if self.is_greedy:
            return logits_BV.argmax(-1)
        exact = logits_BV.double()
        # from the largest on: a quotient by next to nothing may be - infinity, and not + infinity
        exact = (exact - exact.amax(-1, keepdim=True)) / self.temperature
        ids_BV: Tensor | None = None
        if self.top_k is not None and self.top_k < exact.shape[-1]:
            exact, ids_BV = exact.topk(self.top_k)
        elif self.top_p is not None:
            exact, ids_BV = exact.sort(descending=True, stable=True)
        summed_BV = exact.softmax(-1, dtype=torch.float64).cumsum(-1)
        total_B1 = summed_BV[:, -1:]
        if self.top_p is not None:
            last_B1 = (summed_BV < self.top_p).sum(-1, keepdim=True).clamp(max=summed_BV.shape[-1] - 1)
            total_B1 = summed_BV.gather(-1, last_B1)
        # The first whose sum is above the point: never one of probability zero.
        place_B1 = torch.searchsorted(summed_BV, uniform_B.unsqueeze(-1) * total_B1, right=True)
        place_B1 = place_B1.clamp(max=summed_BV.shape[-1] - 1)
        return (place_B1 if ids_BV is None else ids_BV.gather(-1, place_B1)).squeeze(-1)


def uniform_numbers(seed: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1): what one text draws from."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
