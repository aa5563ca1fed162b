"""[probes.NAME]: the probes of a run, called around a step; one reduction for the numbers of all of them.

The probes that are shipped are in components/probes/. A custom one is a class with some of the methods of `Probe`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from components.data.loader import MicroBatch
from components.distributed.context import DistributedContext
from components.distributed.parallel_dims import DataParallelGroup
from components.errors import InputError
from components.gradient_noise import named_backward_parameters
from components.probes import ProbedStep
from components.profiler_range import profiler_range
from components.protocol_defaults import with_defaults
from components.train_step import StepSums, TrainStep
from recipes.config import Config
from recipes.errors import config_errors_at, raised_in


class Probe:
    """The methods of [probes.NAME]; each does nothing by default. A custom class need not derive from this one.

    They are called on every rank, in this order, for step 1 and every `interval_steps` later.
    """

    interval_steps: int = 1
    """Steps between two measurements."""
    sequences: int = 8
    """The first sequences of the batch, on all ranks together, that `watch_forward` samples."""

    def check_model(self, model: nn.Module) -> None:
        """Raise InputError if `model` lacks what the probe needs. Called before the run; `model` may be on the meta
        device."""

    def watch_forward(self, step: ProbedStep) -> Iterator[RemovableHandle]:
        """Register hooks on modules of `step.model` and yield their handles, which are removed after the sample.

        A probe with this method has an additional forward pass over the sample, without gradient and not compiled.
        The hooks see all sequences of a micro-batch; `step.sample(tensor)` returns those that count.
        """
        yield from ()

    def on_micro_gradient(self, step: ProbedStep, name: str, gradient: Tensor) -> None:
        """Called with the gradient of the parameter `name` for every micro-batch, at steps that measure the gradient
        noise. Must not keep the gradient."""

    def on_gradients(self, step: ProbedStep) -> None:
        """Called when the gradients of all micro-batches are reduced over ranks, before they are clipped."""

    def on_update(self, step: ProbedStep) -> None:
        """Called after the optimizer has updated the parameters. There are no gradients any more."""

    def finish(self, step: ProbedStep, values: Mapping[str, Any]) -> Mapping[str, float]:
        """Return metrics by name from the recorded values, which are reduced over all ranks. Called on the host."""
        return values


POINTS = ("watch_forward", "on_micro_gradient", "on_gradients", "on_update")
"""The methods at which a probe can record; it has at least one of them."""


def complete_probe(probe: Any) -> Probe:
    """Return `probe` with defaults for what its class lacks. Raises InputError if it is not a probe."""
    if not any(_defines(probe, point) for point in POINTS):
        raise InputError("use", f"{type(probe).__name__} is not a probe: it has none of {', '.join(POINTS)}")
    complete = with_defaults(probe, Probe)
    for key in ("interval_steps", "sequences"):
        value = getattr(complete, key)
        if not isinstance(value, int) or value < 1:
            raise InputError(key, f"{value!r}: expected a whole number >= 1")
    return complete


def check_probes(recipe: Any) -> Iterator[tuple[str, str]]:
    """Yield problems between [probes] and other sections, as (dotted path, message)."""
    noise_interval = recipe.gradient_noise.interval_steps
    for name, probe in recipe.probes.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            yield "probes", f"{name!r}: the name must consist of letters, digits, _ and -"
        if not _defines(probe, "on_micro_gradient"):
            continue
        interval = getattr(probe, "interval_steps", Probe.interval_steps)
        if noise_interval is None:
            yield (
                f"probes.{name}",
                'needs the gradient noise, and gradient_noise.interval_steps = "none" never measures it',
            )
        elif interval % noise_interval:
            yield (
                f"probes.{name}.interval_steps",
                f"{interval} must be a multiple of gradient_noise.interval_steps = {noise_interval}: the probe reads "
                "gradients at steps that measure the noise",
            )


def build_probes(config: Config, model: nn.Module) -> dict[str, Probe]:
    """Return the probes of `config` by name. Raises ConfigError at one that does not fit `model`."""
    probes = {}
    for name, probe in config.recipe.probes.items():
        with config_errors_at(config, f"probes.{name}"):
            probes[name] = complete_probe(probe)
            probes[name].check_model(model)
    return probes


class Stopwatch:
    """Adds up the seconds that the device, or on a CPU the host, spends in parts of a step. Does not synchronize."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Add the time of this context."""
        if self._on_device:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    def read(self) -> float:
        """Return the seconds, after waiting until the device has reached the last part."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000


@dataclass(frozen=True)
class ProbeResults:
    """The numbers of all probes of a step, which the device may not have computed yet."""

    probes: Mapping[str, Probe]
    steps: Mapping[str, ProbedStep]
    sums: StepSums | None
    maxima: StepSums | None
    stopwatch: Stopwatch

    def read(self) -> dict[str, float]:
        """Return the metrics by their names in metrics.jsonl, after waiting for the device."""
        sums, maxima = ({} if each is None else each.read() for each in (self.sums, self.maxima))
        row: dict[str, float] = {}
        for name, probe in self.probes.items():
            step, prefix = self.steps[name], f"{name}."
            mine = ({key[len(prefix) :]: each for key, each in part.items() if key.startswith(prefix)}
                    for part in (sums, maxima))  # fmt: skip
            with raised_in(f"probes.{name}"):
                metrics = probe.finish(step, step.values(*mine))
                row |= {f"probe_{name}_{key}": float(value) for key, value in metrics.items()}
        return {**row, "probe_seconds": self.stopwatch.read()}


@dataclass
class Probes:
    """The probes of a run. Without one that is due, every method returns at once."""

    step: TrainStep
    """The train step of the run, which has not run yet."""
    probes: Mapping[str, Probe]
    world: DistributedContext
    dp: DataParallelGroup
    _due: dict[str, Probe] = field(default_factory=dict, init=False)
    _steps: dict[str, ProbedStep] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.model = self.step.model
        # FSDP2 replaces the parameters of the modules while they are gathered; these are the shards
        self._parameters = dict(self.model.named_parameters()) if self.probes else {}
        self._observes = any(_defines(probe, "on_micro_gradient") for probe in self.probes.values())
        # in the order of the tensors that the noise hooks were given
        self._noise_names = [name for name, _ in named_backward_parameters(self.model)] if self._observes else []

    def before_step(self, number: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Start the probes that are due at step `number`, and run the forward pass over their samples.

        `micro_batches` are those of this rank. What a skipped step has left is dropped.
        """
        self._due = {name: each for name, each in self.probes.items() if (number - 1) % each.interval_steps == 0}
        self._steps.clear()
        if not self._due:
            return
        self._stopwatch = Stopwatch(self.world.device)
        self._steps = {
            name: ProbedStep(
                number=number,
                model=self.model,
                parameters=self._parameters,
                device=self.world.device,
                micro_batches=len(micro_batches) * self.dp.size,
                dp_size=self.dp.size,
                micro_batch_size=len(micro_batches[0].tokens),
            )
            for name in self._due
        }
        with self._stopwatch.measure(), profiler_range("probes"):
            watching = {name: each for name, each in self._due.items() if _defines(each, "watch_forward")}
            # probes with a sample of the same size share its forward passes
            for sequences in sorted({probe.sequences for probe in watching.values()}):
                names = [name for name, probe in watching.items() if probe.sequences == sequences]
                self._forward(names, micro_batches, sequences)
        if self._observes:
            self.step.noise_hooks.observer = self._on_micro_gradient

    def on_gradients(self) -> None:
        """Call after the last backward of the step, before gradients are clipped."""
        self.step.noise_hooks.observer = None
        self._call("on_gradients")

    def after_update(self) -> ProbeResults | None:
        """Call after the update. Returns the numbers of the probes of this step, reduced over all ranks."""
        if not self._due:
            return None
        self._call("on_update")
        with self._stopwatch.measure():
            sums, maxima = (
                {
                    f"{name}.{key}": each
                    for name, step in self._steps.items()
                    for key, each in getattr(step, kind).items()
                }
                for kind in ("sums", "maxima")
            )
            results = ProbeResults(
                self._due,
                dict(self._steps),
                StepSums(sums, self.world.all_reduce_sum) if sums else None,
                StepSums(maxima, self.world.all_reduce_maxima) if maxima else None,
                self._stopwatch,
            )
        self._due = {}
        self._steps.clear()
        return results

    def _call(self, point: str) -> None:
        for name, probe in self._due.items():
            step = self._steps[name]
            with self._stopwatch.measure(), profiler_range("probes"), torch.no_grad(), raised_in(f"probes.{name}"):
                getattr(probe, point)(step)
                step.flush()

    def _on_micro_gradient(self, index: int, gradient: Tensor) -> None:
        for name, probe in self._due.items():
            with self._stopwatch.measure(), torch.no_grad(), raised_in(f"probes.{name}"):
                probe.on_micro_gradient(self._steps[name], self._noise_names[index], gradient)

    @torch.no_grad()
    def _forward(self, names: Sequence[str], micro_batches: Sequence[MicroBatch], sequences: int) -> None:
        """Run the forward pass over the first `sequences` of the batch, with the hooks of the probes `names`.

        The sample is the same on any number of ranks. A rank runs whole micro-batches, which other ranks may count and
        it does not: FSDP2 gathers weights on all ranks, and kernels are compiled for this shape.
        """
        first = int(micro_batches[0].sample_ids[0]) - self.dp.rank * len(micro_batches[0].sample_ids)
        unit = len(micro_batches[0].sample_ids) * self.dp.size
        steps = [self._steps[name] for name in names]
        with ExitStack() as cleanup:
            for name, step in zip(names, steps, strict=True):
                with raised_in(f"probes.{name}"):
                    for handle in self._due[name].watch_forward(step):
                        cleanup.callback(handle.remove)
            cleanup.enter_context(self.step.compute_context())
            cleanup.enter_context(_eager_blocks(self.model))
            training = self.model.training
            self.model.eval()  # so that nothing is drawn at random, and no statistics of a step are counted twice
            cleanup.callback(self.model.train, training)
            for micro_batch in micro_batches[: -(-sequences // unit)]:
                for step in steps:
                    step.sampled = int((micro_batch.sample_ids < first + sequences).sum())
                tokens, labels = (
                    each.to(self.world.device, non_blocking=True) for each in (micro_batch.tokens, micro_batch.labels)
                )
                self.model(tokens, labels)
        for step in steps:
            step.flush()


@contextmanager
def _eager_blocks(model: nn.Module) -> Iterator[None]:
    """Call compiled modules without their compiled code in this context: it was compiled without the hooks."""
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def _defines(probe: Any, point: str) -> bool:
    """Return whether the class of `probe` has the method `point` itself, and not as a default of `Probe`."""
    method = getattr(probe, point, None)
    return callable(method) and getattr(method, "__func__", None) is not vars(Probe)[point]
