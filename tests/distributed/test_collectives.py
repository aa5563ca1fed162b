"""The collectives of a step, counted on every layout, in both modes, with and without gradient noise."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from components.distributed.parallel_dims import MeshShape
from recipes.config import Override, load
from recipes.dry_run.plan import HardwareTarget, make_plan
from recipes.dry_run.step_time import cp_collectives, fsdp_collectives, tp_collectives
from tests.conftest import TinyRun
from tests.distributed.layouts import LAYOUTS, run_cases
from tests.end_to_end.test_resume import timeless

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MICRO_BATCHES, MICRO_BATCH, SEQUENCE, STEPS, LAYERS = 3, 2, 24, 3, 2
SMALL = 1024
"""In bytes. Smaller collectives are not gradients, but a few numbers that all processes agree on."""
MESHES = {
    "two replicas": MeshShape(2, 1, 1, 1),
    "two shards": MeshShape(1, 2, 1, 1),
    "two TP ranks": MeshShape(1, 1, 1, 2),
    "two CP ranks": MeshShape(1, 1, 2, 1),
    "two replicas of two shards": MeshShape(2, 2, 1, 1),
    "two shards of two TP ranks": MeshShape(1, 2, 1, 2),
}
MODES = ("every_micro_batch", "once_per_step")
SIX = ["--model.layers=6"]
CASES: dict[str, tuple[str, str, list[str]]] = {
    f"{layout}, {mode}": (layout, mode, []) for layout in MESHES for mode in MODES
}
CASES |= {f"tied, {mode}": ("two shards", mode, ["--model.tied_embeddings=true"]) for mode in MODES}
CASES |= {f"six layers, {mode}": ("two shards", mode, SIX) for mode in MODES}
CASES |= {f"plain FSDP2, {mode}": ("two shards", mode, [*SIX, "--optimizer.plain=true"]) for mode in MODES}
"""Name -> (layout, mode, arguments)."""
AVERAGES = ["--average.ema.use=components.average:Exponential", "--average.ema.half_life_tokens=500"]
AVERAGES += ["--average.w.use=components.average:Window", "--average.w.window_tokens=800"]
AVERAGES += ["--average.w.interval_tokens=200"]
MUON = {f"{layout}, Muon, averages": (layout, MODES[1], AVERAGES) for layout in ("two shards", [*MESHES][-1])}
"""Further cases whose collectives are not counted."""


class Runs:
    """Three steps of every case; the noise is measured in the first and the third."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tiny = TinyRun(folder)
        run_cases({name: layout for name, (layout, _, _) in (CASES | MUON).items()}, self.command, folder)

    def directory(self, name: str) -> Path:
        return self.folder / "runs" / name.replace(" ", "-")

    def command(self, name: str) -> list[str]:
        layout, mode, arguments = (CASES | MUON)[name]
        optimizer = ["--optimizer.use=components.optimizers:Muon", "--optimizer.variant=normuon"]
        if name in CASES:
            optimizer = ["--optimizer.use=tests.distributed.collectives:CountingAdamW"]
            optimizer += [f"--optimizer.notes={self.directory(name)}.json"]
        samples = MICRO_BATCHES * MICRO_BATCH * MESHES[layout].dp_size
        return [
            str(self.tiny.recipe), "--model.kv_heads=2", "--validation=none", "--checkpoint.interval_steps=none",
            "--batch.use=components.batch:Constant", f"--batch.initial_size={samples}",
            f"--training.total_tokens={STEPS * samples * SEQUENCE}", "--gradient_noise.interval_steps=2",
            "--hooks.waits.use=tests.waiting:CountWaits", f"--hooks.waits.notes={self.directory(name)}-waits.json",
            *optimizer, f"--training.grad_sync={mode}",
            f"--run.dir={self.directory(name)}", f"--data.path={self.folder / 'text' / '*.txt'}",
            *LAYOUTS[layout][1], *arguments,
        ]  # fmt: skip

    def steps(self, name: str) -> list[list[tuple[str, int, int]]]:
        """(kind, processes, bytes) of the collectives of the second step, which is not measured, and of the third."""
        lines = Path(f"{self.directory(name)}.json").read_text().splitlines()
        return [[(kind, ranks, size) for kind, ranks, size in json.loads(line)] for line in lines]

    def count(self, name: str) -> list[dict[str, int]]:
        """Return kind -> collectives of both steps, with small ones separate."""
        kinds = [
            [f"small {kind}" if size < SMALL and kind == "reduce" else kind for kind, _, size in step]
            for step in self.steps(name)
        ]
        return [dict(Counter(step)) for step in kinds]

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.directory(name) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("collectives"))


def counted(layout: str, mode: str, layers: int = LAYERS, *, tied: bool = False) -> dict[str, int]:
    """Return the collectives that a step should need.

    Untied there is a unit for each block, one for the embedding and one for norm and head. For backward all blocks are
    gathered again. Tied, what is outside of the blocks is gathered once and the last block is kept.
    """
    sizes, passes = MESHES[layout], 1 if mode == "once_per_step" else MICRO_BATCHES
    units = layers + (1 if tied else 2)
    expected = {}
    if sizes.fsdp_size > 1:
        again = layers - 1 if tied else layers
        expected |= {
            "gather": units if mode == "once_per_step" else passes * (units + again),
            "scatter": passes * units,
        }
    if sizes.dp_replicate > 1:
        expected["reduce"] = units
    if sizes.cp > 1:  # keys and values, together
        expected |= {"tp gather": MICRO_BATCHES * layers, "tp scatter": MICRO_BATCHES * layers}
    if sizes.tp > 1:  # two each way in a block, one around the embedding, one around the head
        exchanges = MICRO_BATCHES * (4 * layers + 2)
        expected |= {"tp gather": exchanges, "tp scatter": exchanges}
    return expected


@pytest.mark.parametrize("name", [f"{layout}, {mode}" for layout in MESHES for mode in MODES])
def test_every_layout_communicates_the_minimum_and_measuring_noise_adds_nothing(runs, name):
    unmeasured, measured = runs.count(name)
    layout, mode, _ = CASES[name]
    tp, cp = MESHES[layout].tp > 1, MESHES[layout].cp > 1
    if cp:  # the summands of the gradient of a micro-batch, in one bucket
        measured["scatter"] -= MICRO_BATCHES
    for found in (unmeasured, measured):
        # whether a rank has bad samples; loss, norms, noise and requests; in every micro-batch three of a
        # vocabulary-parallel loss, and the loss of the other tokens
        assert found.pop("small reduce") == 2 + MICRO_BATCHES * (3 * tp + cp)
        # the gradient of a norm: a sum over the TP shards, when it is reduced, or before it is squared
        norms = 2 * LAYERS + 1
        assert found.pop("tp reduce", 0) == tp * norms * (
            1 if found is unmeasured and mode == "once_per_step" else MICRO_BATCHES
        )
        found.pop("_wrap_tensor_autograd", None)  # communicates nothing
        assert found == counted(layout, mode)


@pytest.mark.parametrize("mode", MODES)
def test_parameters_outside_of_the_blocks_of_a_tied_model_are_gathered_once(runs, mode):
    for found in runs.count(f"tied, {mode}"):
        del found["small reduce"]
        assert found == counted("two shards", mode, tied=True)


def test_a_step_over_eight_units_gathers_8_times_or_42_where_fsdp2_by_itself_gathers_46_times(runs):
    gathers = {name: runs.count(name)[1]["gather"] for name in CASES if name.startswith(("six", "plain"))}
    assert gathers == {
        "plain FSDP2, every_micro_batch": 46,
        "plain FSDP2, once_per_step": 46,
        "six layers, every_micro_batch": 42,
        "six layers, once_per_step": 8,
    }


@pytest.mark.parametrize("mode", MODES)
def test_gathering_less_changes_no_bit_of_loss_norm_and_noise(runs, mode):
    ours, plain = (timeless(runs.rows(f"{name}, {mode}")) for name in ("six layers", "plain FSDP2"))
    assert any(row["grad_cov_trace"] for row in ours)
    assert ours == plain


@pytest.mark.parametrize("name", CASES | MUON)
def test_no_step_waits_for_the_device(runs, name):
    launches, waits = json.loads(Path(f"{runs.directory(name)}-waits.json").read_text())
    assert launches >= 2 * (STEPS - 1)
    assert waits == {}


@pytest.mark.parametrize("name", [name for name in CASES if "plain" not in name])
def test_a_dry_run_predicts_the_bytes(runs, name):
    layout, mode, _ = CASES[name]
    file, *arguments = runs.command(name)
    pairs = (argument.removeprefix("--").split("=", 1) for argument in arguments)
    config = load(Path(file), [Override(key, value) for key, value in pairs])
    plan = make_plan(config, LAYOUTS[layout][0], HardwareTarget())
    assert plan.mesh_shape == MESHES[layout]
    kinds = ("gather", "scatter", "reduce")
    expected = {
        kind: exchange.size
        for kind, exchange in zip(
            kinds, fsdp_collectives(plan, MICRO_BATCHES, local=mode == "once_per_step"), strict=True
        )
        if exchange.ranks > 1
    }
    (activations,) = tp_collectives(plan, MICRO_BATCHES, 0)
    if activations.ranks > 1:
        expected["tp"] = activations.size
    keys, noise = cp_collectives(plan, MICRO_BATCHES, 0)
    if keys.ranks > 1:  # noise: the third step is measured, and every second one on average
        expected["tp"] = keys.size
        expected["scatter"] += 2 * noise.size
    found: Counter[str] = Counter()
    for kind, _, size in runs.steps(name)[1]:
        if kind in kinds and size >= SMALL:
            found[kind] += size
        elif kind in ("tp gather", "tp scatter"):
            found["tp"] += size
    # the odd row of a vocabulary of 257, cut twice, is counted as half a row
    assert found == (pytest.approx(expected, rel=5e-3) if plan.mesh_shape.tp > 1 else expected)
