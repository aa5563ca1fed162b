"""The batch policies that are compared, and the schedules they are compared under."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks import text_runs

SEQUENCE_LENGTH = 128
MICRO_BATCH = 4
SMALL, MEDIUM, LARGE = 8, 24, 64
"""Constant batches, in samples; adaptive ones start from the small."""
MAX_SIZE = 64
"""The largest adaptive batch, equal to the largest constant one. The gradient shrinks as the learning rate decays, so
an unbounded test asks for about three times the batch in the last quarter. At eta 1.6 and a learning rate of 2e-3,
bounds of 256, 64 and 48 ended at 4.041 in 672 steps, 4.031 in 705 and 4.025 in 766 (3M tokens, one seed)."""
SMOOTHING = 2000
"""In samples. A batch that never shrinks follows every upward swing of an estimate that is smoothed too little."""
WARMUP_STEPS = 60
"""In steps of the first batch of every method: with equal tokens a batch of 64 would have an eighth of the steps of a
batch of 8. Ten steps are too few: the best learning rates then ruin the start of a batch of 8."""

SHARED = {
    "training.sequence_length": SEQUENCE_LENGTH, "training.micro_batch_size": MICRO_BATCH,
    "gradient_noise.smoothing_samples": SMOOTHING,
}  # fmt: skip
SIZES = {
    "0.7M": {"model.dim": "128", "model.layers": "2", "model.heads": "4", "model.kv_heads": "4",
             "model.ffn_dim": "384"},
    "5M": text_runs.SIZES["5M"],
}  # fmt: skip
"""The model by its number of parameters, with 2048 tied embeddings; the first has several tokens per parameter."""

DECAY_FRACTION = 0.3
"""Of the tokens, under WSD and Power."""
LONG_DECAY = 0.4
"""Of the tokens. Under WSD, eta 1.6 reaches 64 samples with 33 to 52 % of the tokens left (in the stored runs), so this
decay begins at about that batch."""
_VARIANTS = "benchmarks.adaptive_batch.variants"
REFERENCE = {"lr_schedule.batch_scaling": "sqrt", "lr_schedule.reference_batch_tokens": SMALL * SEQUENCE_LENGTH}

BOTH_NORMS: dict[str, object] = {"gradient_noise.norms": '["l2", "adam"]'}


def constant(samples: int) -> dict[str, object]:
    return {"batch.use": "components.batch:Constant", "batch.initial_size": samples}


def stages(fractions: Mapping[float, int], initial: int) -> dict[str, object]:
    table = ", ".join(
        f"{{ from_fraction = {fraction}, samples = {samples} }}" for fraction, samples in fractions.items()
    )
    return {"batch.use": "components.batch:Ramp", "batch.initial_size": initial, "batch.stages": f"[{table}]"}


def adaptive(kind: str, **keys: object) -> dict[str, object]:
    settings = {"initial_size": SMALL, "max_size": MAX_SIZE, "multiple_of": MICRO_BATCH, **keys}
    return {"batch.use": f"components.batch:{kind}", **{f"batch.{key}": value for key, value in settings.items()}}


def norm_test(eta: float, **keys: object) -> dict[str, object]:
    delay = WARMUP_STEPS * SMALL * SEQUENCE_LENGTH
    return adaptive("NormTest", eta=eta, max_growth=2, delay_tokens=delay, **keys)


def closed_form(mean: int, decay: float, stages_at: int = 20) -> dict[str, object]:
    """Return the batch of arXiv 2607.27731 for WSD: proportional to lr(t) / sqrt(integral of lr from t to the end).

    Taken from a summary of the paper, which was not read.

    `mean`: the mean of the batch over the tokens, in samples; the form says nothing about it. The learning rate is
    constant, then decays as 1 - sqrt(x) over the last `decay` of the tokens; the warm-up is ignored.
    """

    def size(t: float) -> float:
        x = max(0.0, (t - (1 - decay)) / decay)
        rest = max(0.0, 1 - decay - t) + decay * (1 / 3 - x + 2 / 3 * x**1.5)
        return float((1 - math.sqrt(x)) / math.sqrt(rest))

    points = {number / stages_at: size((number + 0.5) / stages_at) for number in range(stages_at)}
    scale = mean / (sum(points.values()) / stages_at)
    sizes = {t: round(scale * each / MICRO_BATCH) * MICRO_BATCH for t, each in points.items()}
    return stages({t: each for t, each in sizes.items() if t}, sizes[0.0])


def doubling(*fractions: float) -> dict[str, object]:
    """Return a ramp from the small batch, doubled at each of four fractions of the tokens."""
    return stages({fraction: SMALL * 2 ** (number + 1) for number, fraction in enumerate(fractions)}, SMALL)


@dataclass(frozen=True)
class Method:
    """A batch policy."""

    settings: dict[str, object]
    first: int = SMALL
    """The first batch, in samples; the warm-up is a number of steps of it."""
    scales_lr: bool = True
    """Whether the learning rate scales with the square root of the batch under WSD and cosine; Power has its rule."""
    decay: str = "wsd"
    """The schedule that the method is run under."""
    power: bool = True
    """Whether it is also run under Power."""
    wsd: Mapping[str, object] = field(default_factory=dict)
    """Keys of its own under WSD."""


VARIANTS = ("doubling, early", "doubling, evenly", "doubling, late")
"""Variants of a ramp; the best one, with its tuned learning rate, is compared."""

METHODS: dict[str, Method] = {
    **{f"constant {size}": Method(constant(size), first=size, scales_lr=False) for size in (SMALL, MEDIUM, LARGE)},
    "stages of the paper": Method(
        stages({0.025: LARGE // 2, 0.05: LARGE}, LARGE // 4), first=LARGE // 4, scales_lr=False
    ),
    "doubling, early": Method(doubling(0.05, 0.1, 0.2, 0.4)),
    "doubling, evenly": Method(doubling(0.2, 0.4, 0.6, 0.8)),
    "doubling, late": Method(doubling(0.35, 0.55, 0.7, 0.85)),
    "a quarter, a half, all (nanochat)": Method(
        stages({0.05: LARGE // 2, 0.1: LARGE}, LARGE // 4), first=LARGE // 4
    ),
    "doubling by branches (Merrill)": Method(stages({0.015: 16, 0.12: 32, 0.21: 64}, SMALL)),
    "one switch at 75 %": Method(stages({0.75: LARGE}, SMALL)),
    "closed form of 2607.27731": Method(closed_form(MEDIUM, DECAY_FRACTION), first=MEDIUM, scales_lr=False),
    **{f"norm test, eta {eta}": Method(norm_test(eta)) for eta in (1.6, 2.0, 2.8)},
    "norm test, eta 1.3, at most 96": Method(norm_test(1.3, max_size=96)),
    "norm test, eta 1.6, lr of at most 32": Method(
        norm_test(1.6),
        power=False,
        wsd={"lr_schedule.use": f"{_VARIANTS}:LimitedWSD", "lr_schedule.scaled_up_to_tokens": 32 * SEQUENCE_LENGTH},
    ),
    "decay of 40%, norm test, eta 1.6": Method(
        norm_test(1.6), power=False, wsd={"lr_schedule.decay_fraction": LONG_DECAY}
    ),
    "decay of 40%, constant 8": Method(
        constant(SMALL), scales_lr=False, power=False, wsd={"lr_schedule.decay_fraction": LONG_DECAY}
    ),
    **{
        f"norm test, eta {eta} that follows the schedule": Method(
            norm_test(eta, max_size=256) | {"batch.use": f"{_VARIANTS}:FollowingNormTest"}, power=False
        )
        for eta in (1.3, 1.8)
    },
    **{
        f"norm test in Adam's norm, eta {eta}": Method(norm_test(eta, norm="adam") | BOTH_NORMS) for eta in (1.6, 2.0)
    },
    "norm test of the paper, eta 0.15": Method(
        adaptive("NormTest", eta=0.15, estimator="paper", workers=4), scales_lr=False
    ),
    "noise scale, a fifth": Method(
        adaptive("NoiseScale", coefficient=0.2, shrink="true", max_growth=2,
                 delay_tokens=WARMUP_STEPS * SMALL * SEQUENCE_LENGTH)
    ),
    "Seesaw": Method(adaptive("Seesaw"), decay="cosine", power=False),
}  # fmt: skip


def method_of(name: str) -> Method:
    """Return the method of a name; constant batches of other sizes occur in results only."""
    if name in METHODS:
        return METHODS[name]
    size = int(name.removeprefix("constant "))
    return Method(constant(size), first=size, scales_lr=False)


_PEAK_LRS = (0.7e-3, 1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3, 5.6e-3, 8e-3, 11e-3)
LRS: Mapping[str, Sequence[float]] = {
    "wsd": _PEAK_LRS,
    "cosine": _PEAK_LRS,
    "power": (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 16.0, 23.0, 32.0),
}
"""Schedule -> values to try, about a factor sqrt(2) apart: the peak learning rate, or the amplitude a of Power."""
FIRST: Mapping[str, Sequence[float]] = {
    "wsd": (1.4e-3, 2e-3, 2.8e-3),
    "cosine": (1.4e-3, 2e-3, 2.8e-3),
    "power": (1.4, 2.0, 2.8),
}
"""The values to try first. Tuning continues with their neighbors while the best one is at the edge.

Under Power they are low: with a constant batch of 8 the loss has its minimum at 2.8 (4.733 after 1M tokens) and a
second, worse one at 8 (5.131, 5.054, 4.992 and 5.301 at 4, 5.6, 8 and 11)."""


def schedule(name: str, lr: float, method: Method) -> dict[str, object]:
    """Return the keys of a schedule at one value of its tuned learning rate (for Power, its amplitude)."""
    warmup = {"lr_schedule.warmup_tokens": WARMUP_STEPS * method.first * SEQUENCE_LENGTH}
    end = {"lr_schedule.decay": "1-sqrt", "lr_schedule.decay_fraction": DECAY_FRACTION, "lr_schedule.min_lr_ratio": 0.0}
    if name == "power":
        return {"lr_schedule.use": "components.lr_schedules:Power", "lr_schedule.a": lr, **warmup, **end}
    scaling = REFERENCE if method.scales_lr else {}
    if name == "cosine":
        return {"lr_schedule.use": "components.lr_schedules:Cosine", "lr_schedule.max_lr": lr, **warmup, **scaling}
    wsd = {"lr_schedule.use": "components.lr_schedules:WSD", "lr_schedule.max_lr": lr, **warmup, **end, **scaling}
    return {**wsd, **method.wsd}
