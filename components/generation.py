"""Generation: extends a batch of token sequences, sampling each next token from its logits.

B rows, T tokens, N new tokens, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from components.errors import InputError


class HasKVCache(Protocol):
    """A model with a key-value cache."""

    def new_cache(self, padding: Sequence[int], capacity: int) -> Any:
        """Return an empty cache of `capacity` tokens per row; `padding` is the number of unused slots before each."""
        ...

    def __call__(self, tokens_BT: Tensor, *, cache: Any) -> Tensor:
        """Append `tokens_BT` to `cache`; return the logits (B, 1, V) after the last of them."""
        ...


@torch.inference_mode()
def generate_tokens(
    model: HasKVCache,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    uniform_BN: Tensor,
    *,
    end: int | None,
    vocab_size: int,
    device: torch.device,
    multiple: int = 1,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next id of each prompt, step by step; None for prompts that have ended with the id `end`.

    There are at most N steps; row b is sampled with row b of `uniform_BN`, float64 in [0, 1), and does not depend on
    the other rows. Ids from `vocab_size` on, which pad an embedding, are never sampled. No prompt may be empty. Prompts
    are padded to a multiple of `multiple` tokens, as context parallelism needs; `agree` returns the ids of one rank on
    all of them.
    """
    longest, steps = -(-max(map(len, prompts)) // multiple) * multiple, uniform_BN.shape[1]
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = [[0] * missing + list(prompt) for missing, prompt in zip(padding, prompts, strict=True)]
    tokens_BT = torch.tensor(tokens, device=device)
    uniform_NB = uniform_BN.T.contiguous().to(device)
    running = [True] * len(prompts)
    cache = model.new_cache(padding, longest + steps - 1)
    for uniform_B in uniform_NB:
        logits_BV = model(tokens_BT, cache=cache)[:, -1, :vocab_size]
        chosen_B = sampling.choose(logits_BV, uniform_B)
        chosen_B = chosen_B if agree is None else agree(chosen_B)
        ids = chosen_B.tolist()
        running = [still and id != end for still, id in zip(running, ids, strict=True)]
        if not any(running):
            return
        yield [id if still else None for still, id in zip(running, ids, strict=True)]
        tokens_BT = chosen_B.unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Applies the temperature, then `top_k`, then `top_p`, in the order of `transformers`.

    With `temperature` 0 the most probable token is chosen.
    """

    temperature: float = 1.0
    """Divides the logits."""
    top_k: int | None = None
    """Sample from this many most probable tokens."""
    top_p: float | None = None
    """Sample from the most probable tokens with at least this total probability (arXiv 1904.09751)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError("temperature", f"{self.temperature}; expected a number >= 0")
        if self.top_k is not None and self.top_k < 1:
            raise InputError("top_k", f"{self.top_k}; expected an integer >= 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError("top_p", f"{self.top_p}; expected 0 < top_p <= 1")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def choose(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """Return (B,) ids: the inverse of the cumulative distribution at `uniform_B`, float64 in [0, 1).

        The same numbers give the same tokens on any device and in any batch. Greedy sampling does not use them.
        """
        if self.is_greedy:
            return logits_BV.argmax(-1)
        exact = logits_BV.double()
        # relative to the maximum: with a tiny temperature, quotients may be -inf, but never +inf
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
        # The first token whose cumulative probability exceeds the point; it has a probability above zero.
        place_B1 = torch.searchsorted(summed_BV, uniform_B.unsqueeze(-1) * total_B1, right=True)
        place_B1 = place_B1.clamp(max=summed_BV.shape[-1] - 1)
        return (place_B1 if ids_BV is None else ids_BV.gather(-1, place_B1)).squeeze(-1)


def uniform_numbers(seed: int, count: int) -> Tensor:
    """Return (count,) float64 in [0, 1) for sampling one text."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
