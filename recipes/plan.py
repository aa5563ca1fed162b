"""All that can be known of a run before it starts, without weights, data or a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from components import precision
from components.batch import BatchLayout, BatchPolicy
from components.data.document import ReadingLog
from components.data.mixture import Mixture
from components.data.sources.base import TextSource
from components.distributed.parallel_dims import Sizes
from components.errors import InputError, message_of
from components.throughput import Device, named_device
from recipes.batch_policy import build_batch_policy
from recipes.config import Config, ConfigError, Problem
from recipes.course import Course, play
from recipes.errors import blame
from recipes.language_model import build_model
from recipes.memory_estimate import Memory, accumulates_locally, estimate_run

MFU = 0.4
"""Model FLOPs utilisation where none is claimed: what good dense pre-training reaches on A100 and H100."""
SAMPLE_CHARACTERS = 1_000_000
"""Text that is tokenized to learn how many tokens the data holds."""


@dataclass(frozen=True)
class Claim:
    """What to reckon with: a device, if one is named, and how well it is used."""

    device: Device | None = None
    mfu: float = MFU

    @classmethod
    def parse(cls, text: str) -> Claim:
        """`H100`, `H100@45%` or `@0.45`. Raises ValueError."""
        name, at, share = text.partition("@")
        mfu = MFU
        if at:
            try:
                mfu = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
            except ValueError:
                mfu = 0
            if not 0 < mfu <= 1:
                raise ValueError(f"@{share} is no utilisation; write H100@45% or H100@0.45")
        return cls(named_device(name) if name else None, mfu)

    def shared_by(self, local_size: int) -> Claim:
        """The claim of one of the processes of a node: they have a GPU each, and share its processor."""
        if self.device is None or self.device.name != "cpu":
            return self
        flops, memory = self.device.flops / local_size, self.device.memory_bytes // local_size
        return replace(self, device=replace(self.device, flops=flops, memory_bytes=memory))


@dataclass(frozen=True)
class Plan:
    """A run, foreseen."""

    recipe: Any
    claim: Claim
    sizes: Sizes
    local_size: int
    """Processes of a node."""
    vocab_size: int
    """Ids of the tokenizer, or of the model where the tokenizer is not here."""
    tokenizer_missing: str
    """Why the tokenizer could not be opened; empty if it could."""
    model: nn.Module
    """On the meta device."""
    layout: BatchLayout
    policy: BatchPolicy
    """Before the first step."""
    course: Course
    dtype: torch.dtype
    """Of the matrix products."""
    memory: Memory | str
    """Or why there is no estimate."""
    epoch_tokens: int | None
    """Tokens of the data, estimated from its beginning; None where it is not here."""

    @property
    def world_size(self) -> int:
        replicas, shards, tp = self.sizes
        return replicas * shards * tp

    @property
    def flops_per_token(self) -> float:
        model: Any = self.model
        return float(model.flops_per_token(self.recipe.training.sequence_length))

    @property
    def flops(self) -> float:
        """Of the whole run; what checkpointing computes again is not counted, as in MFU."""
        return self.flops_per_token * self.course.tokens

    def accumulates_locally(self, memory: Memory, device: Device) -> bool:
        """Whether weights and gradient stay whole for a step."""
        return accumulates_locally(self.recipe.training.accumulation, memory.local_peak, device.memory_bytes)

    def peak_on(self, memory: Memory, device: Device) -> int:
        """Bytes a rank needs on `device`."""
        return memory.local_peak if self.accumulates_locally(memory, device) else memory.peak

    def seconds_on(self, device: Device) -> float:
        return self.flops / (device.flops * self.claim.mfu * self.world_size)


def make_plan(config: Config, world_size: int, claim: Claim, local_size: int | None = None) -> Plan:
    """A run of `world_size` processes, `local_size` on each node; without it all on one.

    Raises ConfigError with everything that leaves nothing to plan.
    """
    local_size = local_size or world_size
    claim = claim.shared_by(local_size)
    recipe, training = config.recipe, config.recipe.training
    problems: list[Problem] = []
    sizes, vocab_size, missing, tokenizer, model = Sizes(1, world_size, 1), 0, "", None, None
    with _collected(config, "parallel", problems):
        sizes = recipe.parallel.sizes(world_size, local_size)
    with _collected(config, "tokenizer", problems):
        try:
            tokenizer = recipe.tokenizer.build()
            vocab_size = tokenizer.vocab_size
        except FileNotFoundError as error:
            vocab_size, missing = getattr(recipe.model, "vocab_size", None) or 0, message_of(error)
            if not vocab_size:
                raise InputError(
                    getattr(error, "key", ""), f"{missing}; given model.vocab_size, a dry run does without it"
                ) from error
    if vocab_size:
        with _collected(config, "model", problems):
            model = build_model(config, vocab_size)
            model.flops_per_token(training.sequence_length)  # asked again where it is printed
    layout = BatchLayout(training.micro_batch_size, sizes.dp_size)
    course, policy = Course(), None
    with _collected(config, "batch", problems):
        policy = build_batch_policy(recipe)
        course = play(recipe, layout)
    if problems or model is None or policy is None:
        raise ConfigError(problems)
    device_type, dtype = _arithmetic(recipe, claim)
    return Plan(
        recipe=recipe,
        claim=claim,
        sizes=sizes,
        local_size=local_size,
        vocab_size=vocab_size,
        tokenizer_missing=missing,
        model=model,
        layout=layout,
        policy=policy,
        course=course,
        dtype=dtype,
        memory=estimate_run(recipe, model, sizes, device_type, dtype),
        epoch_tokens=epoch_tokens(recipe.data, tokenizer),
    )


def epoch_tokens(data: Any, tokenizer: Any) -> int | None:
    """Tokens of the data, from the tokens per stored byte of its first documents; None for data that is not here."""
    if isinstance(data, Mixture):
        parts = [epoch_tokens(source, tokenizer) for source in data.sources.values()]
        return None if None in parts else sum(filter(None, parts))
    if tokenizer is None or not isinstance(data, TextSource):
        return None
    log, tokens, characters = ReadingLog(), 0, 0
    try:
        size = data.size_bytes()
        if not size:  # unknown, and reading it may mean the network
            return None
        for document in data.documents(log):
            tokens += len(tokenizer.encode_batch([document.text])[0]) + document.complete
            characters += len(document.text)
            if characters > SAMPLE_CHARACTERS and log.source_bytes:
                return tokens * size // log.source_bytes
    except (OSError, ValueError):
        return None
    return tokens


@contextmanager
def _collected(config: Config, path: str, problems: list[Problem]) -> Iterator[None]:
    """What the block has to complain about, at `path`, joins `problems`."""
    try:
        with blame(config, path):
            yield
    except ConfigError as error:
        problems += error.problems


def _arithmetic(recipe: Any, claim: Claim) -> tuple[str, torch.dtype]:
    """Device type and precision. A GPU with bf16 is reckoned with unless the recipe or the claim says CPU."""
    if recipe.run.device == "cpu" or (claim.device is not None and claim.device.name == "cpu"):
        return "cpu", precision.dtype_of(precision.resolve(recipe.training.precision, torch.device("cpu")))
    return "cuda", torch.float32 if recipe.training.precision == "float32" else torch.bfloat16
