"""Averages of the weights against a brute-force mean in float64, over batches that change."""

from __future__ import annotations

import pytest
import torch

from components.average import Exponential, Window
from components.errors import InputError

pytestmark = pytest.mark.quick

BATCHES = [64] * 20 + [192] * 15 + [48] * 30 + [512] * 6
"""Tokens of each step."""


def steps(dtype=torch.float32):
    """Yield (weights, tokens after the step, tokens of the step)."""
    generator, tokens = torch.Generator().manual_seed(0), 0
    weights = [torch.randn(3, 4, generator=generator).to(dtype), torch.randn((), generator=generator).to(dtype)]
    for batch in BATCHES:
        tokens += batch
        weights = [weight + 0.1 * torch.randn(weight.shape, generator=generator).to(dtype) for weight in weights]
        yield weights, tokens, batch


def build(config, dtype=torch.float32):
    copies = [[torch.zeros(3, 4), torch.zeros(())] for _ in range(config.num_copies)]
    return config.build(copies=copies), copies


def value(average) -> torch.Tensor:
    found = [torch.full((3, 4), torch.nan), torch.tensor(torch.nan)]
    average.copy_to(found)
    return torch.cat([each.reshape(-1) for each in found])


def mean(samples) -> torch.Tensor:
    """Return the mean of (weights, factor) in float64."""
    total = sum(factor for _, factor in samples)
    flat = [torch.cat([each.reshape(-1).double() for each in weights]) * factor / total for weights, factor in samples]
    return torch.stack(flat).sum(0)


@pytest.mark.parametrize("half_life", [50, 700, 10**6, 2**61])
@pytest.mark.parametrize("start", [0, 1280])
def test_the_weights_of_a_step_count_half_after_a_half_life_whatever_the_batch(half_life, start):
    average, _ = build(Exponential(half_life_tokens=half_life, start_tokens=start))
    seen = []
    for weights, tokens, batch in steps():
        average.update(weights, tokens=tokens, step_tokens=batch)
        assert average.has_started == (tokens > start)
        if tokens <= start:
            continue
        seen.append((weights, tokens, batch))
        if len(seen) % 12 > 1:
            continue
        # 2**(-t / half_life) integrated over the tokens of each step
        rate = half_life if half_life < 2**60 else 2**40  # the same to float64: every step counts by its tokens
        factors = [(each, 2 ** ((end - tokens) / rate) * (1 - 2 ** (-size / rate))) for each, end, size in seen]
        torch.testing.assert_close(value(average).double(), mean(factors), rtol=0, atol=1e-6)
    assert len(seen) > 40


@pytest.mark.parametrize("batches", [[100] * 6, [300] * 2, [200, 400]])
def test_a_batch_that_changes_forgets_the_start_equally(batches):
    average, (copy,) = build(Exponential(half_life_tokens=600))
    one = [torch.ones(3, 4), torch.ones(())]
    average.update(one, tokens=10**9, step_tokens=10**9)
    for batch in batches:
        average.update([torch.zeros_like(each) for each in one], tokens=10**9, step_tokens=batch)
    assert float(copy[1]) == pytest.approx(0.5, rel=1e-6), "one half-life"


@pytest.mark.parametrize(
    ("window", "interval", "blocks"),
    [(1200, None, 2), (1200, None, 5), (1000, 250, 4), (3000, 300, 3), (300, None, 3), (10**6, None, 2)],
)
def test_a_window_is_the_mean_of_its_samples_in_the_last_blocks(window, interval, blocks):
    average, _ = build(Window(window_tokens=window, interval_tokens=interval, blocks=blocks))
    samples: list = []
    for weights, tokens, batch in steps():
        average.update(weights, tokens=tokens, step_tokens=batch)
        if interval is None or tokens // interval > (tokens - batch) // interval:
            samples.append((weights, tokens, tokens - (samples[-1][1] if samples else 0)))
        assert average.has_started == bool(samples)
        if not samples or len(samples) % 8 > 1:
            continue
        newest = -(-samples[-1][1] * blocks // window)  # blocks up to and including that of the last sample
        start = (newest - blocks) * window / blocks
        kept = [(each, counted) for each, at, counted in samples if at > start]
        torch.testing.assert_close(value(average).double(), mean(kept), rtol=0, atol=1e-6)
        first = next(at for _, at, _ in samples if at > start)
        assert samples[-1][1] - first < window


def test_as_many_blocks_as_samples_keep_each_sample():
    average, copies = build(Window(window_tokens=1024, interval_tokens=256, blocks=4))
    samples = []
    for number in range(16):
        weights = [torch.full((3, 4), float(number)), torch.tensor(float(number))]
        average.update(weights, tokens=64 * (number + 1), step_tokens=64)
        samples += [float(number)] if number % 4 == 3 else []
    assert sorted(float(copy[1]) for copy in copies) == samples == [3, 7, 11, 15]


@pytest.mark.parametrize(
    "config",
    [Exponential(half_life_tokens=500), Window(window_tokens=900, interval_tokens=100, blocks=3)],
    ids=["exponential", "window"],
)
def test_a_restored_average_continues_bitwise(config):
    whole, _ = build(config)
    for number, (weights, tokens, batch) in enumerate(steps()):
        if number == 30:
            restored, copies = build(config)
            for copy, tensors in zip(copies, [whole._mean] if config.num_copies == 1 else whole._means, strict=True):
                for target, source in zip(copy, tensors, strict=True):
                    target.copy_(source)
            restored.load_state_dict(whole.state_dict())
        whole.update(weights, tokens=tokens, step_tokens=batch)
        if number >= 30:
            restored.update(weights, tokens=tokens, step_tokens=batch)
    assert torch.equal(value(restored), value(whole))


def test_weights_of_another_dtype_are_averaged_in_float32():
    average, (copy,) = build(Exponential(half_life_tokens=300))
    seen = []
    for weights, tokens, batch in steps(torch.bfloat16):
        average.update(weights, tokens=tokens, step_tokens=batch)
        seen.append((weights, tokens, batch))
    factors = [(each, 2 ** ((end - tokens) / 300) * (1 - 2 ** (-size / 300))) for each, end, size in seen]
    found = torch.cat([each.reshape(-1) for each in copy])
    torch.testing.assert_close(found.double(), mean(factors), rtol=0, atol=1e-6)


def test_an_interval_longer_than_a_block_is_refused():
    with pytest.raises(InputError, match="interval_tokens: 600 is longer than a block, window_tokens / blocks = 500"):
        Window(window_tokens=1000, interval_tokens=600)
