"""Calls the probes of a run around a step, and reduces the numbers of all of them once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from components.data.loader import MicroBatch
from components.distributed.context import DistributedContext
from components.distributed.parallel_dims import DataParallelGroup
from components.evaluation_mode import evaluating
from components.gradient_noise import named_backward_parameters
from components.probes import ProbedStep
from components.profiler_range import profiler_range
from components.train_step import StepSums, TrainStep
from recipes.errors import raised_in
from recipes.probes import Probe, defines_point


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
class ProbeRunner:
    """Calls the probes of a run. Without one that is due, every method returns at once."""

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
        self._observers = {
            name: probe for name, probe in self.probes.items() if defines_point(probe, "on_micro_gradient")
        }
        # in the order of the tensors that the noise hooks were given
        self._noise_names = [name for name, _ in named_backward_parameters(self.model)] if self._observers else []

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
                micro_batch_size=len(micro_batches[0].tokens),
            )
            for name in self._due
        }
        with self._stopwatch.measure(), profiler_range("probes"):
            watching = {name: each for name, each in self._due.items() if defines_point(each, "watch_forward")}
            # probes with a sample of the same size share its forward passes
            for sequences in sorted({probe.sequences for probe in watching.values()}):
                names = [name for name, probe in watching.items() if probe.sequences == sequences]
                self._forward(names, micro_batches, sequences)
        if self._observers.keys() & self._due.keys():
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
            sums, maxima = self._recorded("sums"), self._recorded("maxima")
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

    def _recorded(self, kind: str) -> dict[str, Tensor]:
        """Return the local sums or maxima of all probes by PROBE.NAME, in the same order on all ranks."""
        recorded = {
            f"{name}.{key}": each for name, step in self._steps.items() for key, each in vars(step)[kind].items()
        }
        return dict(sorted(recorded.items()))

    def _call(self, point: str) -> None:
        for name, probe in self._due.items():
            step = self._steps[name]
            with self._stopwatch.measure(), profiler_range("probes"), torch.no_grad(), raised_in(f"probes.{name}"):
                getattr(probe, point)(step)
                step.flush()

    def _on_micro_gradient(self, index: int, gradient: Tensor) -> None:
        for name in self._observers.keys() & self._due.keys():
            probe = self._due[name]
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
            # so that nothing is drawn at random, and no statistics of a step are counted twice
            cleanup.enter_context(evaluating(self.model))
            for micro_batch in micro_batches[: -(-sequences // unit)]:
                for step in steps:
                    step.sampled = int((micro_batch.sample_ids < first + sequences).sum())
                tokens, labels = (
                    each.to(self.world.device, non_blocking=True) for each in (micro_batch.tokens, micro_batch.labels)
                )
                with raised_in(f"probes.{names[0]}" if len(names) == 1 else "probes"):
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
