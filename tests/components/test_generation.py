"""The generation loop: where texts end, which random numbers are used, and which ids can be sampled."""

from __future__ import annotations

import pytest
import torch

from components.generation import Sampling, generate_tokens

pytestmark = pytest.mark.quick

END, VOCAB, PADDED = 6, 7, 10


class Counts:
    """After id i comes i + 1; ids that only pad the vocabulary would be more probable still."""

    def new_cache(self, padding, capacity):
        self.padding, self.room = list(padding), capacity
        return self

    def __call__(self, tokens, *, cache):
        cache.room -= tokens.shape[1]
        assert cache.room >= 0, "more tokens than its capacity"
        logits = torch.zeros(len(tokens), 1, PADDED)
        logits[..., VOCAB:] = 50.0
        logits.scatter_(-1, (tokens[:, -1:, None] + 1).clamp(max=END), 20.0)
        return logits


def written(prompts, steps, sampling=None, numbers=None):
    numbers = torch.zeros(len(prompts), steps, dtype=torch.float64) if numbers is None else numbers
    sampling = sampling or Sampling(temperature=0.0)
    cpu = torch.device("cpu")
    return list(generate_tokens(Counts(), prompts, sampling, numbers, end=END, vocab_size=VOCAB, device=cpu))


def test_rows_end_by_themselves_and_all_end_with_the_last():
    assert written([[0, 3], [1]], 9) == [[4, 2], [5, 3], [None, 4], [None, 5]]
    assert written([[5]], 9) == []


def test_at_most_the_requested_tokens_are_generated():
    assert written([[0], [2]], 2) == [[1, 3], [2, 4]]


def test_each_row_is_chosen_by_its_own_numbers():
    numbers = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prompts, hot = [[0], [1], [0, 1]], Sampling(temperature=15.0)
    together = written(prompts, 4, hot, numbers)
    for row in range(3):
        alone = [ids[0] for ids in written([prompts[row]], 4, hot, numbers[row : row + 1])]
        assert [ids[row] for ids in together if ids[row] is not None] == alone


def test_inference_mode_does_not_leak_out_of_a_loop_that_is_left():
    steps = generate_tokens(
        Counts(), [[0]], Sampling(temperature=0.0), torch.zeros(1, 3, dtype=torch.float64),
        end=None, vocab_size=VOCAB, device=torch.device("cpu"),
    )  # fmt: skip
    next(steps)
    assert not torch.is_inference_mode_enabled()
