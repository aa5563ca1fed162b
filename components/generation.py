"""Continuing token sequences, several at a time, one token of each a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# B rows, T tokens, V vocabulary


class Generates(Protocol):
    """A model that can keep what it computed of earlier tokens."""

    def new_cache(self, padding: Sequence[int], capacity: int) -> Any:
        """Room for `capacity` tokens of each row; `padding`: how many slots to leave before the first of each."""
        ...

    def __call__(self, tokens_BT: Tensor, *, cache: Any) -> Tensor:
        """Logits (B, 1, V) of the last of `tokens_BT`, which follow what `cache` holds and join it."""
        ...


class Chooses(Protocol):
    def choose(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """(B,) ids."""
        ...


@torch.inference_mode()
def continue_texts(
    model: Generates,
    prompts: Sequence[Sequence[int]],
    sampling: Chooses,
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
