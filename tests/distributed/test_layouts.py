"""A recipe has the same samples and losses on every layout, and checkpoints move between layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import TinyRun
from tests.distributed.layouts import LAYOUTS, run_all
from tests.end_to_end.test_resume import tensors, timeless

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STEPS, SAVED_AT, SAMPLES, SEQUENCE = 5, 3, 8, 24
RECIPE = [
    "--batch.use=components.batch:Constant",
    f"--batch.initial_size={SAMPLES}",
    f"--training.total_tokens={STEPS * SAMPLES * SEQUENCE}",
    "--data.use=tests.distributed.layouts:RecordedText",
    "--model.kv_heads=2",
    f"--checkpoint.interval_steps={SAVED_AT}",
    "--validation.interval_steps=3",
    "--training.grad_sync=once_per_step",  # "auto" would estimate the memory of every run first
    "--average.ema.use=components.average:Exponential",
    "--average.ema.half_life_tokens=500",
    "--average.w.use=components.average:Window",
    f"--average.w.window_tokens={2 * SAVED_AT * SAMPLES * SEQUENCE}",
    f"--average.w.interval_tokens={SAVED_AT * SAMPLES * SEQUENCE}",  # one sample, at the step that is resumed
]
TASKS = [
    "--tasks.novel.use=components.tasks:MultipleChoice",
    f"--tasks.novel.path={Path(__file__).with_name('novel.jsonl')}",
    "--tasks.novel.interval_steps=3",
    "--tasks.shots.use=components.tasks:Cloze",
    f"--tasks.shots.path={Path(__file__).with_name('cloze.jsonl')}",
]
EQUAL = 1e-5
"""Relative tolerance: float32 sums in another order differ by 2e-7 here after ten steps of Adam."""


class Runs:
    """The run of every layout, made once: its directory and the sequences it read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tiny = TinyRun(folder)

    def directory(self, name: str) -> Path:
        return self.folder / "runs" / name.replace(" ", "-")

    def reads(self, name: str) -> Path:
        return self.folder / "reads" / name.replace(" ", "-")

    def launch(self, processes: int, runs: dict[str, tuple[str, list[str]]]) -> None:
        """Start those of `runs`, name -> (layout, arguments), that have this many processes, in the same processes."""
        commands = [
            [str(self.tiny.recipe), *RECIPE, *LAYOUTS[layout][1], *arguments,
             f"--run.dir={self.directory(name)}", f"--data.notes={self.reads(name)}",
             f"--data.path={self.folder / 'text' / '*.txt'}"]
            for name, (layout, arguments) in runs.items()
            if LAYOUTS[layout][0] == processes
        ]  # fmt: skip
        run_all(processes, commands, self.folder)

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.directory(name) / "metrics.jsonl").read_text().splitlines()]

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in self.rows(name) if "loss" in row]

    def checkpoint(self, name: str, step: int) -> Path:
        return self.directory(name) / "checkpoints" / f"step-{step:08d}"

    def read(self, name: str) -> dict[str, list[list[int]]]:
        """Return process -> the sequences of each micro-batch."""
        return {
            path.name: [json.loads(line) for line in path.read_text().splitlines()]
            for path in self.reads(name).iterdir()
        }


VARIANTS = {
    "gradients reduced every time": ["--training.grad_sync=every_micro_batch"],
    "all blocks recomputed": ["--training.activation_checkpoint=full"],
    "every second block recomputed": ["--training.activation_checkpoint=2"],
    "cheap operations recomputed": ["--training.activation_checkpoint=selective"],
}
COMPARED = 3
SHORT = ["--validation=none", "--checkpoint.interval_steps=none"]
SHORT += [f"--training.total_tokens={COMPARED * SAMPLES * SEQUENCE}", "--lr_schedule.decay_fraction=0"]
"""The first steps of the long run, whose learning rate does not decay until the last."""
VARIED = {
    f"{layout}, {what}": (layout, [*VARIANTS[what], *SHORT])
    for layout, numbers in {
        "two shards": (0, 2),
        "two replicas of two shards": (0,),
        "two shards of two TP ranks": (1, 3),
    }.items()
    for what in [list(VARIANTS)[number] for number in numbers]
}
RING = {
    f"{source} to {target}": (source, target)
    for source, target in zip(LAYOUTS, [*LAYOUTS][1:] + [*LAYOUTS][:1], strict=True)
}
"""Each layout to the next one in the list."""
MOVES = {f"{layout} to {layout}": (layout, layout) for layout in LAYOUTS} | RING
"""Every layout saves for another one, and reads the checkpoint of another."""
ROUNDED = {
    f"{layout}, bf16": (layout, ["--training.precision=bf16", *SHORT])
    for layout in ("one process", "two shards", "two shards of two TP ranks")
}
MUP = ["--model.mup.base_width=8", "--model.mup.embedding_multiplier=3", "--model.mup.residual_multiplier=0.4"]
WITH_MUP = {
    f"{layout}, muP": (layout, [*MUP, *SHORT])
    for layout in ("one process", "two shards", "two TP ranks", "two shards of two TP ranks")
}
MUON = ["--optimizer.use=components.optimizers:Muon", "--optimizer.variant=normuon"]
MUON += ["--optimizer.momentum_half_life_tokens=2000", "--optimizer.reference_batch_tokens=400"]
SAVED_BY_MUON = 2
MUON += [f"--training.total_tokens={2 * SAVED_BY_MUON * SAMPLES * SEQUENCE}"]
"""Two steps after the save: the loss of the second depends on the restored momentum."""
MUON_LAYOUTS = [layout for layout in LAYOUTS if "CP" not in layout]  # CP ranks are shards to an optimizer
WITH_MUON = {
    f"{layout}, Muon": (layout, [*SHORT, *MUON, f"--checkpoint.interval_steps={SAVED_BY_MUON}"])
    for layout in MUON_LAYOUTS
} | {
    f"{layout}, Muon, gradients reduced every time": (layout, [*SHORT, *MUON, "--training.grad_sync=every_micro_batch"])
    for layout in ("two shards", "two replicas of two shards", "two shards of two TP ranks")
}
MUON_MOVES = {
    f"{source} to {target}, Muon": (source, target)
    for source, target in [
        *zip(MUON_LAYOUTS, MUON_LAYOUTS[1:] + MUON_LAYOUTS[:1], strict=True),
        *((layout, layout) for layout in ("one process", "two shards", "two shards of two TP ranks")),
    ]
}
"""Each layout to the next one in the list, and some to themselves."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every layout, every variant, every move. A move needs its source first, so two processes are started twice."""
    made = Runs(tmp_path_factory.mktemp("layouts"))
    whole: dict[str, tuple[str, list[str]]] = {layout: (layout, TASKS) for layout in LAYOUTS}

    def moves(*sources: int) -> dict[str, tuple[str, list[str]]]:
        """Return the moves from layouts with this many processes."""
        return {
            name: (target, [f"--resume={made.checkpoint(source, SAVED_AT)}", "--validation=none",
                            "--checkpoint.interval_steps=none"])
            for name, (source, target) in MOVES.items()
            if LAYOUTS[source][0] in sources
        } | {
            name: (target, [f"--resume={made.checkpoint(f'{source}, Muon', SAVED_BY_MUON)}", *SHORT, *MUON])
            for name, (source, target) in MUON_MOVES.items()
            if LAYOUTS[source][0] in sources
        }  # fmt: skip

    made.launch(1, whole | ROUNDED | WITH_MUP | WITH_MUON)
    made.launch(2, whole | VARIED | ROUNDED | WITH_MUP | WITH_MUON | moves(1, 2))
    made.launch(4, whole | VARIED | ROUNDED | WITH_MUP | WITH_MUON | moves(1, 2, 4))
    made.launch(2, moves(4))
    made.launch(1, moves(1, 2, 4))
    return made


OTHERS = [layout for layout in LAYOUTS if layout != "one process"]


@pytest.mark.parametrize("layout", OTHERS)
def test_every_step_and_parameter_equals_that_of_one_process(runs, layout):
    averages = ("val_loss_average_ema", "val_loss_average_w")
    for key in ("loss", "grad_norm", "val_loss", "val_bits_per_byte", *averages):
        expected, found = ([row[key] for row in runs.rows(name) if key in row] for name in ("one process", layout))
        assert found == pytest.approx(expected, rel=EQUAL), key
        assert found
    assert len(runs.losses(layout)) == STEPS
    alone, together = (tensors(runs.checkpoint(name, STEPS)) for name in ("one process", layout))
    assert {name for name in alone if not name.startswith("random")} == {
        name for name in together if not name.startswith("random")
    }
    for name, tensor in alone.items():
        if name.startswith(("model.", "average.")):
            assert (tensor - together[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("layout", OTHERS)
def test_tasks_have_the_scores_of_one_process(runs, layout):
    for key, times in (
        ("task_novel_acc", 2),
        ("task_novel_acc_norm", 2),
        ("task_novel_bits_per_byte", 2),
        ("task_shots_bits_per_byte", 1),
    ):
        expected, found = ([row[key] for row in runs.rows(name) if key in row] for name in ("one process", layout))
        assert len(found) == times, "after the third and the last step"
        assert found == pytest.approx(expected, rel=EQUAL), key


@pytest.mark.parametrize("layout", OTHERS)
def test_every_step_reads_the_same_samples(runs, layout):
    processes, arguments = LAYOUTS[layout]
    same = 2 ** sum(argument in ("--parallel.tp=2", "--parallel.cp=2") for argument in arguments)  # ranks of a sample
    (alone,) = runs.read("one process").values()
    read = runs.read(layout)
    assert len(read) == processes
    micro_batches = len(alone) // (processes // same) // STEPS
    for step in range(STEPS):
        expected = [sample for micro_batch in alone[step * 4 : step * 4 + 4] for sample in micro_batch]
        found: list[int] = []
        for micro_batch in range(step * micro_batches, (step + 1) * micro_batches):
            for rank in range(0, processes, same):
                found += read[f"rank-{rank}"][micro_batch]
                assert all(
                    read[f"rank-{rank + i}"][micro_batch] == read[f"rank-{rank}"][micro_batch] for i in range(same)
                )
        assert found == expected, f"step {step + 1}"


@pytest.mark.parametrize("name", MOVES)
def test_a_checkpoint_of_one_layout_continues_on_another(runs, name):
    source, target = MOVES[name]
    assert runs.losses(name) == pytest.approx(runs.losses("one process")[SAVED_AT:], rel=EQUAL)
    if source == target:
        whole, moved = ([row for row in timeless(runs.rows(run)) if "loss" in row] for run in (source, name))
        assert moved == whole[SAVED_AT:], "not bitwise"


@pytest.mark.parametrize("name", RING)
def test_an_average_moves_bitwise(runs, name):
    source, _ = MOVES[name]
    before, after = tensors(runs.checkpoint(source, SAVED_AT)), tensors(runs.checkpoint(name, STEPS))
    averages = [key for key in before if key.startswith("average.w.")]
    assert averages
    assert all(torch.equal(before[key], after[key]) for key in averages), "no step after the save is a sample"


@pytest.mark.parametrize("name", VARIED)
def test_gradient_sync_and_activation_checkpointing_change_nothing(runs, name):
    layout, _ = VARIED[name]
    assert runs.losses(name) == pytest.approx(runs.losses(layout)[:COMPARED], rel=1e-6)


BF16 = 1e-3
"""Relative tolerance of a loss against float32: bf16 keeps 8 bits; the mean over 192 tokens rounds less."""


@pytest.mark.parametrize("name", ROUNDED)
def test_bf16_changes_nothing_beyond_rounding(runs, name):
    found, expected = runs.losses(name), runs.losses("one process")[:COMPARED]
    assert found == pytest.approx(expected, rel=BF16)
    assert found != expected


@pytest.mark.parametrize("name", [name for name in WITH_MUP if name != "one process, muP"])
def test_mup_finds_its_parameters_on_every_layout(runs, name):
    for key in ("loss", "grad_norm"):
        expected, found = ([row[key] for row in runs.rows(run) if key in row] for run in ("one process, muP", name))
        assert found == pytest.approx(expected, rel=EQUAL), key
    assert runs.losses(name)[-1] != pytest.approx(runs.losses("one process")[-1], rel=1e-3), "a test that can fail"


@pytest.mark.parametrize("name", [name for name in WITH_MUON if name != "one process, Muon"])
def test_muon_trains_equally_on_every_layout(runs, name):
    for key in ("loss", "grad_norm"):
        expected, found = ([row[key] for row in runs.rows(run) if key in row] for run in ("one process, Muon", name))
        assert found == pytest.approx(expected, rel=EQUAL), key
    assert runs.losses(name)[-1] != pytest.approx(runs.losses("one process")[-1], rel=1e-3), "a test that can fail"


@pytest.mark.parametrize("name", MUON_MOVES)
def test_a_checkpoint_of_muon_continues_on_another_layout(runs, name):
    source, target = MUON_MOVES[name]
    whole = runs.losses(f"{target}, Muon")[SAVED_BY_MUON:]
    if source == target:
        assert runs.losses(name) == whole, "not bitwise"
    assert runs.losses(name) == pytest.approx(whole, rel=EQUAL)
