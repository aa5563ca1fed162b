"""A tiny PowerMoE on every kind of layout has the same losses, router metrics, gradient noise and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from components.checkpoint import load_tensors
from components.checkpoint.metadata_unpickler import read_index
from components.gradient_noise import GradientMoments
from models.llama import Llama
from models.mup import MuPConfig
from models.router_loss import RouterLossConfig
from tests.conftest import TinyRun
from tests.distributed.layouts import run_all

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STEPS, SAMPLES, MICRO_BATCH, SEQUENCE = 20, 8, 2, 24
EXPERTS, TOP_K = 6, 2
MODEL = {
    "kv_heads": 2, "ffn_dim": 16, "experts": EXPERTS, "top_k": TOP_K, "tied_embeddings": "true", "init_std": 0.1,
    "router.load_balancing_coefficient": 0.05, "router.z_loss_coefficient": 0.01,
    "mup.base_width": 8, "mup.embedding_multiplier": 12, "mup.residual_multiplier": 0.22,
}  # fmt: skip
RECIPE = [
    *(f"--model.{key}={value}" for key, value in MODEL.items()),
    "--batch.use=tests.distributed.test_gradient_noise:Notes",
    f"--batch.initial_size={SAMPLES}",
    f"--training.total_tokens={STEPS * SAMPLES * SEQUENCE}",
    "--validation.interval_steps=10",
    f"--checkpoint.interval_steps={STEPS}",
    "--data.use=tests.distributed.layouts:RecordedText",
]
SHORT = [f"--training.total_tokens={3 * SAMPLES * SEQUENCE}", "--validation=none", "--lr_schedule.decay_fraction=0"]
UNEVEN = ["--model.experts=5"]
RUNS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "two shards": (2, []),
    "two TP ranks": (2, ["--parallel.tp=2"]),
    "two replicas": (2, ["--parallel.dp_replicate=2", *SHORT]),
    "one process, five experts": (1, [*UNEVEN, *SHORT]),
    "two shards, five experts": (2, [*UNEVEN, *SHORT, "--training.grad_sync=every_micro_batch"]),
    "one process, all recomputed": (1, ["--training.activation_checkpoint=full", *SHORT]),
    "two shards, cheap ones recomputed": (2, ["--training.activation_checkpoint=selective", *SHORT]),
    "two shards, bf16": (2, ["--training.precision=bf16", *SHORT]),
}
"""Name -> processes, arguments. Two ranks split each of five experts, or have three of six experts each."""
LONG = ("two shards", "two TP ranks")
NUMBERS = ("load_balancing_loss", "router_z_loss", "router_entropy", "expert_load_max", "expert_load_min")
EQUAL, BF16 = 1e-5, 5e-3
"""Relative tolerances: float32 sums in another order; bf16 with 8 bits of every activation and gradient."""


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder, self.tiny = folder, TinyRun(folder)
        for processes in (1, 2):
            commands = [self.command(name) for name, (needed, _) in RUNS.items() if needed == processes]
            run_all(processes, commands, folder)

    def command(self, name: str) -> list[str]:
        places = {"run.dir": "runs", "batch.folder": "moments", "data.notes": "reads"}
        return [
            str(self.tiny.recipe), *RECIPE, f"--data.path={self.folder / 'text' / '*.txt'}", *RUNS[name][1],
            *(f"--{key}={self.folder / place / name}" for key, place in places.items()),
        ]  # fmt: skip

    def rows(self, name: str) -> list[dict]:
        """Return the metrics of every step."""
        lines = (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "loss" in row]

    def model(self, name: str) -> dict[str, torch.Tensor]:
        """Return the parameters of the last checkpoint."""
        checkpoint = max((self.folder / "runs" / name / "checkpoints").iterdir())
        with torch.device("meta"):
            shapes = {key: p.shape for key, p in built(EXPERTS).named_parameters()}
        assert {f"model.{key}" for key in shapes} <= read_index(checkpoint).entries.keys()
        tensors = {key: torch.empty(shape) for key, shape in shapes.items()}
        load_tensors(checkpoint, {"model": tensors}, no_dist=True)
        return tensors

    def moments(self, name: str) -> list[GradientMoments]:
        """Return the measurement of every step in the Euclidean norm, which must be equal on all processes."""
        reported = {path.read_text() for path in (self.folder / "moments" / name).iterdir()}
        assert len(reported) == 1
        return [GradientMoments(*json.loads(line)[0]) for line in reported.pop().splitlines()]


def built(experts: int) -> torch.nn.Module:
    return Llama(
        size="debug", dim=16, layers=2, heads=2, kv_heads=2, head_dim=8, ffn_dim=16, experts=experts, top_k=TOP_K,
        tied_embeddings=True, init_std=0.1,
        router=RouterLossConfig(load_balancing_coefficient=0.05, z_loss_coefficient=0.01),
        mup=MuPConfig(base_width=8, embedding_multiplier=12, residual_multiplier=0.22),
    ).build(vocab_size=257, sequence_length=SEQUENCE)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("experts"))


def like(name: str) -> str:
    return "one process, five experts" if name.endswith("five experts") else "one process"


@pytest.mark.parametrize("name", [name for name in RUNS if name != like(name)])
def test_every_step_is_that_of_one_process(runs, name):
    limit = BF16 if name.endswith("bf16") else EQUAL
    found, expected = runs.rows(name), runs.rows(like(name))[: len(runs.rows(name))]
    assert len(found) == (STEPS if name in LONG else 3)
    for key in ("loss", "grad_norm", *NUMBERS[:3]):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=limit), key
    if limit == EQUAL:  # every token is routed to the same expert
        for key in NUMBERS[3:]:
            assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=1e-12), key


@pytest.mark.parametrize("name", LONG)
def test_every_parameter_ends_as_on_one_process(runs, name):
    alone, together = runs.model("one process"), runs.model(name)
    assert all((together[key] - weight).abs().max() < 1e-4 for key, weight in alone.items())


def test_the_router_learns_to_balance(runs):
    rows = runs.rows("one process")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert 1 <= rows[-1]["load_balancing_loss"] < rows[0]["load_balancing_loss"]
    assert all(0 <= row["expert_load_min"] < 1 < row["expert_load_max"] <= EXPERTS / TOP_K for row in rows)


@pytest.fixture(scope="module")
def truth(runs: Runs) -> dict[int, GradientMoments]:
    """Number of experts -> gradient noise of the first step in float64, with a separate backward per micro-batch."""
    text = (runs.folder / "reads" / "one process" / "rank-0").read_text().splitlines()
    groups = [json.loads(line) for line in text[: SAMPLES // MICRO_BATCH]]
    return {experts: brute_force(runs, groups, experts) for experts in (5, EXPERTS)}


def brute_force(runs: Runs, groups: list[list[int]], experts: int) -> GradientMoments:
    from components.data.sources.text_files import TextFiles
    from components.tokenizers import Bytes

    text = TextFiles(path=runs.folder / "text" / "*.txt").build(
        tokenizer=Bytes().build(), sequence_length=SEQUENCE, cache_dir=runs.folder / "cache", progress=print
    )
    model = built(experts)
    model.init_weights(0)
    model.double()
    gradients = []
    for group in groups:
        tokens = torch.stack([text[index] for index in group])
        loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        gradients.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))]))
    each = torch.stack(gradients)
    assert each.dtype == torch.float64
    return GradientMoments(len(groups), MICRO_BATCH, float(each.square().sum()), float(each.mean(0).square().sum()))


@pytest.mark.parametrize("name", RUNS)
def test_the_noise_equals_that_of_separate_backwards_in_float64(runs, truth, name):
    found, expected = runs.moments(name)[0], truth[5 if name.endswith("five experts") else EXPERTS]
    limit = BF16 if name.endswith("bf16") else EQUAL
    for key in ("sum_micro_grad_sq_norms", "mean_grad_sq_norm", "grad_cov_trace", "grad_sq_norm"):
        assert getattr(found, key) == pytest.approx(getattr(expected, key), rel=limit), key
