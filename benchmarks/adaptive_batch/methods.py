"""The batch policies that are compared, and the schedules they are compared under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SEQUENCE = 128
MICRO_BATCH = 4
SMALL, MEDIUM, LARGE = 8, 24, 64
"""Constant batches, in samples; adaptive ones start from the small."""
MAXIMUM = 64
"""Of adaptive batches, the large constant. The gradient dies with the rate, so a test left alone asks for some three
times the batch in the last quarter. At eta 1.6 and 2e-3 a bound of 256, 64 and 48 came to 4.041 in 672 steps, 4.031 in
705 and 4.025 in 766 (3M tokens, one seed)."""
SMOOTHING = 2000
"""Samples. A batch that never shrinks follows the upward swings of what is not smoothed enough."""
WARMUP_STEPS = 60
"""At the first batch of every method: in tokens, a batch of 64 would have an eighth of the steps of one of 8. Ten steps
are too few: the rates that are best here then ruin the start of a batch of 8."""

SIZE = {
    "model.dim": 128, "model.layers": 2, "model.heads": 4, "model.kv_heads": 4, "model.ffn_dim": 384,
    "training.sequence_length": SEQUENCE, "training.micro_batch_size": MICRO_BATCH,
    "gradient_noise.smoothing_samples": SMOOTHING,
}  # fmt: skip
"""0.7M parameters with 2048 tied embeddings: small, so that a run sees some four tokens for each."""

REFERENCE = {"lr_schedule.batch_scaling": "sqrt", "lr_schedule.reference_batch_tokens": SMALL * SEQUENCE}


def constant(samples: int) -> dict[str, object]:
    return {"batch.use": "components.batch:Constant", "batch.initial_size": samples}


def stages(shares: Mapping[float, int], initial: int) -> dict[str, object]:
    table = ", ".join(f"{{ from_fraction = {share}, samples = {samples} }}" for share, samples in shares.items())
    return {"batch.use": "components.batch:Ramp", "batch.initial_size": initial, "batch.stages": f"[{table}]"}


def adaptive(kind: str, **keys: object) -> dict[str, object]:
    settings = {"initial_size": SMALL, "max_size": MAXIMUM, "multiple_of": MICRO_BATCH, **keys}
    return {"batch.use": f"components.batch:{kind}", **{f"batch.{key}": value for key, value in settings.items()}}


def norm_test(eta: float) -> dict[str, object]:
    delay = WARMUP_STEPS * SMALL * SEQUENCE
    return adaptive("NormTest", eta=eta, max_growth=2, delay_tokens=delay)


def doubling(*shares: float) -> dict[str, object]:
    """From the small batch, doubled at each of four shares of the tokens."""
    return stages({share: SMALL * 2 ** (number + 1) for number, share in enumerate(shares)}, SMALL)


@dataclass(frozen=True)
class Method:
    """A batch policy."""

    settings: dict[str, object]
    first: int = SMALL
    """The batch it starts from, in samples: warm-up is counted in it."""
    rule: bool = True
    """The rate follows the batch: as its root under WSD and cosine. Power has its own rule, always."""
    decay: str = "wsd"
    """The schedule beside Power."""


VARIANTS = ("doubling, early", "doubling, evenly", "doubling, late")
"""Of a tuned ramp: the one that is best with a tuned rate is compared."""

METHODS: dict[str, Method] = {
    **{f"constant {size}": Method(constant(size), first=size, rule=False) for size in (SMALL, MEDIUM, LARGE)},
    "stages of the paper": Method(
        stages({0.025: LARGE // 2, 0.05: LARGE}, LARGE // 4), first=LARGE // 4, rule=False
    ),
    "doubling, early": Method(doubling(0.05, 0.1, 0.2, 0.4)),
    "doubling, evenly": Method(doubling(0.2, 0.4, 0.6, 0.8)),
    "doubling, late": Method(doubling(0.35, 0.55, 0.7, 0.85)),
    **{f"norm test, eta {eta}": Method(norm_test(eta)) for eta in (1.6, 2.0, 2.8)},
    "norm test of the paper, eta 0.15": Method(
        adaptive("NormTest", eta=0.15, estimator="paper", workers=4), rule=False
    ),
    "noise scale, a fifth": Method(
        adaptive("NoiseScale", coefficient=0.2, shrink="true", max_growth=2,
                 delay_tokens=WARMUP_STEPS * SMALL * SEQUENCE)
    ),
    "Seesaw": Method(adaptive("Seesaw"), decay="cosine"),
}  # fmt: skip


def method_of(name: str) -> Method:
    """Also of a constant batch that only a result told."""
    if name in METHODS:
        return METHODS[name]
    size = int(name.removeprefix("constant "))
    return Method(constant(size), first=size, rule=False)


_HIGHEST = (0.7e-3, 1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3, 5.6e-3, 8e-3, 11e-3)
RATES = {"wsd": _HIGHEST, "cosine": _HIGHEST, "power": (2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 16.0, 23.0, 32.0)}
"""Values to try, each some root of two above the one before: of the highest rate, under Power of its amplitude a."""
FIRST = slice(2, 5)
"""Those to try first. Tuning goes on to their neighbours while the best is at the edge."""


def schedule(name: str, rate: float, method: Method) -> dict[str, object]:
    """The keys of a schedule at one value of what is tuned."""
    warmup = {"lr_schedule.warmup_tokens": WARMUP_STEPS * method.first * SEQUENCE}
    end = {"lr_schedule.decay": "1-sqrt", "lr_schedule.decay_fraction": 0.3, "lr_schedule.min_lr_ratio": 0.0}
    if name == "power":
        return {"lr_schedule.use": "components.lr_schedules:Power", "lr_schedule.a": rate, **warmup, **end}
    rule = REFERENCE if method.rule else {}
    if name == "cosine":
        return {"lr_schedule.use": "components.lr_schedules:Cosine", "lr_schedule.max_lr": rate, **warmup, **rule}
    return {"lr_schedule.use": "components.lr_schedules:WSD", "lr_schedule.max_lr": rate, **warmup, **end, **rule}
