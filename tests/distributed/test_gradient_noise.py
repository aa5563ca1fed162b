"""Gradient noise on every layout, against a separate float64 backward for each micro-batch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from components.batch import Constant
from components.data.sources.text_files import TextFiles
from components.gradient_noise import GradientMoments
from components.tokenizers import Bytes
from models.llama import Llama
from tests.conftest import TinyRun
from tests.distributed.layouts import LAYOUTS, run_cases

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SAMPLES, MICRO_BATCH, SEQUENCE, STEPS = 16, 2, 24, 2
BF16 = 5e-3
"""Relative tolerance: bf16 keeps 8 bits of every activation and gradient."""
EXACT = 1e-5
"""Relative tolerance of float32 sums of squares over about 14,000 weights against float64."""


@dataclass(frozen=True, kw_only=True)
class Notes(Constant):
    """A constant batch that records the measurements of every step, in a file for each process."""

    folder: Path

    def observe(self, progress, noise):
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank-{os.environ.get('RANK', '0')}").open("a") as file:
            moments = [noise.moments, *([noise.adam.moments] if noise.adam else [])]
            file.write(json.dumps([list(asdict(each).values()) for each in moments]) + "\n")


BOTH = {"local": ["--training.grad_sync=once_per_step"], "reduce": ["--training.grad_sync=every_micro_batch"]}
CASES: dict[str, tuple[str, list[str]]] = {
    f"{layout}, {mode}": (layout, arguments)
    for layout in LAYOUTS
    for mode, arguments in BOTH.items()
    # the hooks of CP ranks do the same in both, and with TP ranks the case with variants is enough
    if "CP" not in layout or (mode == "reduce" and "TP" not in layout)
}
VARIANTS = {
    "tied_embeddings": True, "norm_placement": "both", "qk_norm": "all_heads", "qkv_bias": True,
    "gated_attention": True, "sliding_window": 5, "attention_softcap": 3.0, "logit_softcap": 5.0,
}  # fmt: skip
CASES |= {
    f"{layout}, variants": (layout, [f"--model.{key}={str(value).lower()}" for key, value in VARIANTS.items()])
    for layout in LAYOUTS
    if layout in ("one process", "two shards") or "TP" in layout  # elsewhere the hooks see the same gradients
}
for what, arguments, layouts in (
    (
        "recomputed",
        "--training.activation_checkpoint=full",
        ("one process", "two replicas", "two shards of two TP ranks"),
    ),
    ("bf16", "--training.precision=bf16", ("one process", "two replicas", "two shards", "two shards of two TP ranks")),
    ("compiled", "--training.compile=true", ("two shards", "two TP ranks")),
):
    CASES |= {f"{layout}, {what}": (layout, [arguments, *BOTH["reduce"]]) for layout in layouts}


class Measured:
    """Run two steps of every case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tiny = TinyRun(folder)
        run_cases({name: layout for name, (layout, _) in CASES.items()}, self.command, folder)

    def command(self, name: str) -> list[str]:
        layout, arguments = CASES[name]
        plain = name.replace(" ", "-")
        return [
            str(self.tiny.recipe), "--model.kv_heads=2", "--validation=none", "--checkpoint.interval_steps=none",
            '--gradient_noise.norms=["l2","adam"]',
            "--batch.use=tests.distributed.test_gradient_noise:Notes", f"--batch.initial_size={SAMPLES}",
            f"--batch.folder={self.folder / 'moments' / plain}", f"--run.dir={self.folder / 'runs' / plain}",
            f"--training.total_tokens={STEPS * SAMPLES * SEQUENCE}",
            "--data.use=tests.distributed.layouts:RecordedText", f"--data.notes={self.folder / 'reads' / plain}",
            f"--data.path={self.folder / 'text' / '*.txt'}", *LAYOUTS[layout][1], *arguments,
        ]  # fmt: skip

    def moments(self, name: str) -> list[list[GradientMoments]]:
        """Return the measurements of both steps, which must be equal on all processes, in each norm."""
        reported = {path.read_text() for path in (self.folder / "moments" / name.replace(" ", "-")).iterdir()}
        assert len(reported) == 1
        return [[GradientMoments(*each) for each in json.loads(line)] for line in reported.pop().splitlines()]

    def read(self) -> torch.Tensor:
        """(groups, MICRO_BATCH): the first samples of the run, as one process read them."""
        lines = (self.folder / "reads" / "one-process,-reduce" / "rank-0").read_text().splitlines()
        return torch.tensor([json.loads(line) for line in lines[: SAMPLES // MICRO_BATCH]])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(tmp_path_factory.mktemp("moments"))


@pytest.fixture(scope="module")
def truth(measured: Measured) -> dict[bool, GradientMoments]:
    """With VARIANTS or not -> gradient noise of the first step in float64, one backward per micro-batch."""
    text = TextFiles(path=measured.folder / "text" / "*.txt").build(
        tokenizer=Bytes().build(), sequence_length=SEQUENCE, cache_dir=measured.folder / "cache", progress=print
    )
    groups = [torch.stack([text[int(index)] for index in group]) for group in measured.read()]
    return {False: brute_force(groups, {}), True: brute_force(groups, VARIANTS)}


def brute_force(groups: list[torch.Tensor], variants: dict) -> GradientMoments:
    model = Llama(size="debug", dim=16, layers=2, heads=2, kv_heads=2, head_dim=8, ffn_dim=32, **variants).build(
        vocab_size=257, sequence_length=SEQUENCE
    )
    model.init_weights(0)
    model.double()
    gradients = []
    for tokens in groups:
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        gradients.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))]))
    each = torch.stack(gradients)
    assert each.dtype == torch.float64
    mean = each.mean(0)
    return GradientMoments(len(groups), MICRO_BATCH, float(each.square().sum()), float(mean.square().sum()))


@pytest.mark.parametrize("name", CASES)
def test_the_noise_equals_that_of_separate_backwards_in_float64(measured, truth, name):
    expected = truth[name.endswith("variants")]
    [found], _ = measured.moments(name)  # in the first step Adam has no second moment
    assert (found.num_micro_batches, found.micro_batch_size) == (expected.num_micro_batches, expected.micro_batch_size)
    limit = BF16 if name.endswith("bf16") else EXACT
    for key in ("sum_micro_grad_sq_norms", "mean_grad_sq_norm", "grad_cov_trace", "grad_sq_norm"):
        assert getattr(found, key) == pytest.approx(getattr(expected, key), rel=limit), key


@pytest.mark.parametrize("name", CASES)
def test_the_second_step_is_measured_like_the_first(measured, name):
    alike = "one process, " + next((kind for kind in ("variants", "bf16") if name.endswith(kind)), "reduce")
    (found, in_adam), (expected, expected_in_adam) = measured.moments(name)[1], measured.moments(alike)[1]
    for key in ("sum_micro_grad_sq_norms", "mean_grad_sq_norm", "grad_cov_trace"):
        limit = BF16 if name.endswith("bf16") else EXACT
        assert getattr(found, key) == pytest.approx(getattr(expected, key), rel=limit), key
        limit = 10 * limit  # it divides by roots of gradients that differ by rounding
        assert getattr(in_adam, key) == pytest.approx(getattr(expected_in_adam, key), rel=limit), key
