"""Probes on every layout, against float64 computations without hooks on one process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from components.data.sources.text_files import TextFiles
from components.probes import Activations
from components.tokenizers import Bytes
from models.llama import Llama
from models.rope import apply_rope
from tests.conftest import TinyRun
from tests.distributed.layouts import LAYOUTS, run_cases
from tests.end_to_end.test_resume import tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SAMPLES, MICRO_BATCH, SEQUENCE, STEPS = 8, 2, 24, 2
SEQUENCES, QUERIES = 3, 7
"""Of the sample: not a multiple of the micro-batch, and fewer than the ranks have."""
EXACT = 2e-5
"""Relative tolerance of float32 against float64."""


@dataclass(frozen=True, kw_only=True)
class UnitDigest(Activations):
    """The sums of the magnitudes and gates of the hidden units of each layer, each weighted with its index."""

    def finish(self, step, values):
        vectors = {name: each for name, each in values.items() if isinstance(each, torch.Tensor)}
        return {name: float((each * torch.arange(1, len(each) + 1)).sum()) for name, each in vectors.items()}


SAMPLE = f"sequences={SEQUENCES}"
PROBES = {
    "norms": ("components.probes:Norms", "interval_steps=1"),
    "modules": ("components.probes:Norms", "interval_steps=1", "by_module=true"),
    "act": ("components.probes:Activations", "interval_steps=1", SAMPLE),
    "units": ("tests.distributed.test_probes:UnitDigest", "interval_steps=1", SAMPLE),
    "attn": ("components.probes:AttentionLogits", "interval_steps=1", SAMPLE, f"queries={QUERIES}"),
    "noise": ("components.probes:LayerNoise", "interval_steps=1"),
}
ARGUMENTS = [
    f"--probes.{name}.{key}" for name, (use, *keys) in PROBES.items() for key in (f"use={use}", *keys)
]  # fmt: skip
BOTH = {"local": "--training.grad_sync=once_per_step", "reduce": "--training.grad_sync=every_micro_batch"}
MUON = "--optimizer.use=components.optimizers:Muon"
CASES: dict[str, tuple[str, list[str]]] = {layout: (layout, [BOTH["local"]]) for layout in LAYOUTS}
for what, argument, layouts in (
    ("reduce", BOTH["reduce"], ("two shards of two TP ranks",)),
    ("recomputed", "--training.activation_checkpoint=full", ("two shards",)),
    ("bf16", "--training.precision=bf16", ("one process", "two shards")),
    ("tied", "--model.tied_embeddings=true", ("one process", "two shards")),
    ("Muon", MUON, ("one process", "two shards")),
    ("experts", "--model.experts=4", ("one process", "two TP ranks")),
):
    CASES |= {f"{layout}, {what}": (layout, [argument, BOTH["local"]]) for layout in layouts}


class Probed:
    """Run two steps of every case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tiny = TinyRun(folder)
        run_cases({name: layout for name, (layout, _) in CASES.items()}, self.command, folder)

    def directory(self, name: str) -> Path:
        return self.folder / "runs" / name.replace(" ", "-")

    def command(self, name: str) -> list[str]:
        layout, arguments = CASES[name]
        more = ["--model.top_k=2"] if name.endswith("experts") else []
        return [
            str(self.tiny.recipe), "--model.kv_heads=2", "--validation=none",
            "--checkpoint.interval_steps=" + ("1" if name == "one process" else "none"),
            "--batch.use=components.batch:Constant", f"--batch.initial_size={SAMPLES}",
            f"--run.dir={self.directory(name)}", f"--training.total_tokens={STEPS * SAMPLES * SEQUENCE}",
            "--training.max_grad_norm=0.1", "--lr_schedule.warmup_tokens=0",
            "--data.use=tests.distributed.layouts:RecordedText", f"--data.notes={self.folder / 'reads' / name}",
            f"--data.path={self.folder / 'text' / '*.txt'}", *ARGUMENTS, *LAYOUTS[layout][1], *arguments, *more,
        ]  # fmt: skip

    def probed(self, name: str, step: int) -> dict[str, float]:
        """Return the numbers of the probes in the row of a step, except the time."""
        rows = [json.loads(line) for line in (self.directory(name) / "metrics.jsonl").read_text().splitlines()]
        (row,) = [row for row in rows if row["step"] == step and "loss" in row]
        return {key.removeprefix("probe_"): row[key] for key in row if key.startswith("probe_")}


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    return Probed(tmp_path_factory.mktemp("probes"))


def numbers(probed: Probed, name: str, step: int) -> dict[str, float]:
    found = probed.probed(name, step)
    assert found.pop("seconds") > 0
    return found


@pytest.mark.parametrize("name", [name for name, (layout, _) in CASES.items() if layout != "one process"])
def test_every_number_equals_that_of_one_process(probed, name):
    kind = name.partition(", ")[2]
    alone = f"one process, {kind}" if f"one process, {kind}" in CASES else "one process"
    limits = {"bf16": 3e-2, "Muon": 1e-3}
    for step in (1, 2):
        expected, found = numbers(probed, alone, step), numbers(probed, name, step)
        assert found.keys() == expected.keys()
        if kind == "bf16":  # differences of nearly equal norms are rounding errors
            expected, found = (
                {k: v for k, v in each.items() if not k.startswith("noise")} for each in (expected, found)
            )
        for key in expected:
            assert found[key] == pytest.approx(expected[key], rel=limits.get(kind, 1e-4), abs=1e-9), key


class Reference:
    """The first step in float64, without hooks."""

    def __init__(self, probed: Probed) -> None:
        text = TextFiles(path=probed.folder / "text" / "*.txt").build(
            tokenizer=Bytes().build(), sequence_length=SEQUENCE, cache_dir=probed.folder / "cache", progress=print
        )
        read = (probed.folder / "reads" / "one process" / "rank-0").read_text().splitlines()
        indices = [index for line in read[: SAMPLES // MICRO_BATCH] for index in json.loads(line)]
        self.sequences = torch.stack([text[index] for index in indices])
        self.model = Llama(size="debug", dim=16, layers=2, heads=2, kv_heads=2, head_dim=8, ffn_dim=32).build(
            vocab_size=257, sequence_length=SEQUENCE
        )
        self.model.init_weights(0)
        self.model.double()
        self.rope = self.model.rope.table(SEQUENCE, torch.device("cpu"))

    def gradients(self, sequences: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the gradient of the mean loss over the tokens of `sequences`, by parameter."""
        loss = F.cross_entropy(self.model(sequences[:, :-1]).flatten(0, 1), sequences[:, 1:].flatten())
        return dict(zip(self.parameters(), torch.autograd.grad(loss, list(self.model.parameters())), strict=True))

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: each.detach() for name, each in self.model.named_parameters()}

    @torch.no_grad()
    def blocks(self):
        """Yield (input of attention, its output, input of the feed-forward, its output, output) of every layer."""
        x = self.model.tok_embeddings(self.sequences[:SEQUENCES, :-1])
        for block in self.model.layers.values():
            attention_input = block.attention_norm(x)
            attention = block.attention(attention_input, self.rope)
            x = x + attention
            ffn_input = block.ffn_norm(x)
            ffn = block.feed_forward(ffn_input)
            x = x + ffn
            yield block, attention_input, attention, ffn_input, ffn, x


@pytest.fixture(scope="module")
def reference(probed: Probed) -> Reference:
    return Reference(probed)


def norm(tensors: dict[str, torch.Tensor], prefix: str) -> float:
    return float(
        torch.cat([each.flatten() for name, each in tensors.items() if name.startswith(prefix)]).double().norm()
    )


GROUPS = {
    "norms": {"layer_0": "layers.0.", "layer_1": "layers.1.", "output": "output.", "norm": "norm."},
    "modules": {"attention_layer_1": "layers.1.attention.", "feed_forward_layer_0": "layers.0.feed_forward.",
                "ffn_norm_layer_1": "layers.1.ffn_norm.", "tok_embeddings": "tok_embeddings."},
}  # fmt: skip


@pytest.mark.parametrize("probe", GROUPS)
def test_norms(probed, reference, probe):
    found, gradients = numbers(probed, "one process", 1), reference.gradients(reference.sequences)
    assert norm(gradients, "") > 0.2, "far above max_grad_norm, and not clipped"
    saved = {
        name.removeprefix("model."): each
        for name, each in tensors(probed.directory("one process") / "checkpoints" / "step-00000001").items()
        if name.startswith("model.")
    }
    before = reference.parameters()
    update = {name: saved[name].double() - before[name].float().double() for name in before}
    for group, prefix in GROUPS[probe].items():
        assert found[f"{probe}_grad_norm_{group}"] == pytest.approx(norm(gradients, prefix), rel=EXACT)
        assert found[f"{probe}_param_norm_{group}"] == pytest.approx(norm(before, prefix), rel=EXACT)
        assert found[f"{probe}_update_norm_{group}"] == pytest.approx(norm(update, prefix), rel=EXACT)
        ratio = norm(update, prefix) / norm(before, prefix)
        assert found[f"{probe}_update_ratio_{group}"] == pytest.approx(ratio, rel=EXACT)


def test_activations(probed, reference):
    found = numbers(probed, "one process", 1)
    for layer, (block, _, attention, ffn_input, ffn, output) in enumerate(reference.blocks()):
        for name, x in (("attention", attention), ("feed_forward", ffn), ("residual", output)):
            assert found[f"act_{name}_rms_layer_{layer}"] == pytest.approx(float(x.square().mean().sqrt()), rel=EXACT)
            assert found[f"act_{name}_max_layer_{layer}"] == pytest.approx(float(x.abs().max()), rel=EXACT)
        with torch.no_grad():
            gate = block.feed_forward.w_gate(ffn_input)
            hidden = F.silu(gate) * block.feed_forward.w_up(ffn_input)
        index = torch.arange(1, 33)
        magnitudes, gates = hidden.abs().flatten(0, 1).amax(0), (-gate).flatten(0, 1).amax(0)
        assert found[f"units_unit_magnitudes_layer_{layer}"] == pytest.approx(
            float((magnitudes * index).sum()), rel=EXACT
        )
        assert found[f"units_unit_gates_layer_{layer}"] == pytest.approx(float((gates * index).sum()), rel=EXACT)


@torch.no_grad()
def test_attention_logits(probed, reference):
    found = numbers(probed, "one process", 1)
    for layer, (block, x, *_) in enumerate(reference.blocks()):
        q, k = (
            apply_rope(part(x).unflatten(-1, (2, 8)), reference.rope)
            for part in (block.attention.wq, block.attention.wk)
        )
        logits, entropies = [], []
        for sequence in range(SEQUENCES):
            for head in range(2):
                for number in range(QUERIES):
                    at = SEQUENCE * (number + 1) // QUERIES - 1
                    row = k[sequence, : at + 1, head] @ q[sequence, at, head] / 8**0.5
                    logits.append(float(row.max()))
                    entropies.append(float(torch.distributions.Categorical(logits=row).entropy()))
        assert found[f"attn_logit_max_layer_{layer}"] == pytest.approx(max(logits), rel=EXACT)
        assert found[f"attn_entropy_layer_{layer}"] == pytest.approx(sum(entropies) / len(entropies), rel=EXACT)


def test_noise_by_layer(probed, reference):
    found = numbers(probed, "one process", 1)
    each = [reference.gradients(part) for part in reference.sequences.split(MICRO_BATCH)]
    for group, prefix in GROUPS["norms"].items():
        vectors = torch.stack(
            [torch.cat([g.flatten() for name, g in gradient.items() if name.startswith(prefix)]) for gradient in each]
        )
        trace = MICRO_BATCH * float(vectors.var(0).sum())
        square = float(vectors.mean(0).square().sum()) - trace / SAMPLES
        assert found[f"noise_grad_cov_trace_{group}"] == pytest.approx(trace, rel=EXACT)
        assert found[f"noise_grad_sq_norm_{group}"] == pytest.approx(square, rel=EXACT, abs=1e-6)
        if square > 0:
            assert found[f"noise_noise_scale_{group}"] == pytest.approx(trace / square, rel=1e-3)


def test_the_experts_are_probed_as_a_whole(probed):
    found = numbers(probed, "one process, experts", 1)
    assert found["act_feed_forward_rms_layer_1"] > 0
    assert not [name for name in found if "units" in name]


def test_the_reference_is_float64(reference):
    assert isinstance(reference.model, nn.Module)
    assert {each.dtype for each in reference.parameters().values()} == {torch.float64}
