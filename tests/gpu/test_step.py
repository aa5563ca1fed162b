"""A run on a GPU does not synchronize, computes what the CPU does, and resumes bitwise."""

from __future__ import annotations

import pytest
import torch

from tests.end_to_end.test_metrics_delay import assert_same_tensors
from tests.end_to_end.test_resume import timeless

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]

CUDA = ["--run.device=cuda", "--validation=none", "--checkpoint.interval_steps=none"]
WIDE = ["--model.dim=64", "--model.heads=2", "--model.kv_heads=1", "--model.head_dim=32", "--model.ffn_dim=96"]
EXPERTS = [*WIDE, "--model.experts=4", "--model.top_k=2"]
ADAPTIVE = ["--batch.use=components.batch:NormTest", "--batch.initial_size=4", "--batch.max_size=40"]
ADAPTIVE += ["--batch.multiple_of=2", "--batch.eta=0.5", "--gradient_noise.smoothing_samples=50"]
MUON = ["--optimizer.use=components.optimizers:Muon", "--optimizer.variant=normuon"]
CASES = {
    "dense": [*WIDE, "--training.precision=bf16"],
    "dense, eager": [*WIDE, "--training.precision=bf16", "--training.compile=false"],
    "experts": [*EXPERTS, "--training.precision=bf16"],
    "experts, eager": [*EXPERTS, "--training.precision=bf16", "--training.compile=false"],
    "documents": [*WIDE, "--training.precision=bf16", "--training.document_masking=true"],
    "momentum in bf16": [*WIDE, "--optimizer.state_dtype=bf16", "--training.precision=bf16"],
    "muon": [*WIDE, *MUON, "--training.precision=bf16"],
    "muon, experts": [*EXPERTS, *MUON, "--training.precision=bf16"],
    "adaptive": [*WIDE, *ADAPTIVE, "--training.precision=bf16"],
}


@pytest.mark.parametrize("name", CASES)
def test_no_step_waits_for_the_device(tiny, monkeypatch, name):
    """From the third step on, torch raises at every synchronization while a step is launched."""
    from recipes.pretrain import Trainer

    launch = Trainer.launch
    launched = []

    def watched(run, batch):
        torch.cuda.set_sync_debug_mode("error" if run.clock.step >= 2 else "default")
        try:
            launch(run, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        launched.append(run.clock.step)

    monkeypatch.setattr(Trainer, "launch", watched)
    assert tiny.launch(*CUDA, *CASES[name]) == 0
    assert len(launched) >= 5


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_float32_equals_the_cpu(new_tiny, name):
    rows = {}
    for device in ("cpu", "cuda"):
        run = new_tiny(device)
        keys = [*CASES[name], "--training.precision=float32", "--training.compile=false", f"--run.device={device}"]
        assert run.launch(*CUDA, *keys) == 0
        rows[device] = [row["loss"] for row in run.rows()]
    # rounding in another order, accumulated over 14 steps
    assert rows["cuda"] == pytest.approx(rows["cpu"], rel=2e-4)


@pytest.mark.parametrize("name", ["dense", "experts", "muon", "adaptive"])
def test_bf16_learns_as_float32_does(new_tiny, name):
    rows = {}
    for precision in ("float32", "bf16"):
        run = new_tiny(precision)
        assert run.launch(*CUDA, *CASES[name], f"--training.precision={precision}") == 0
        rows[precision] = [row["loss"] for row in run.rows()]
    assert rows["bf16"][:5] == pytest.approx(rows["float32"][:5], rel=0.01)
    assert rows["bf16"][-1] == pytest.approx(rows["float32"][-1], rel=0.05)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tiny):
    keys = [*CUDA, *CASES["adaptive"], "--run.deterministic=true", "--checkpoint.interval_steps=1"]
    assert tiny.launch(*keys) == 0
    rows = timeless(tiny.rows())
    last = rows[-1]["step"]
    resumed = [f"--resume={tiny.checkpoint(last // 2)}", f"--run.dir={tiny.folder / 'resumed'}"]
    assert tiny.launch(*keys, *resumed) == 0
    assert_same_tensors(tiny.checkpoint(last), tiny.folder / "resumed" / "checkpoints" / f"step-{last:08d}")


def test_a_step_that_is_not_finite_is_skipped_on_the_device(tiny, monkeypatch):
    from tests.end_to_end.test_bad_steps import BAD, SMALL
    from tests.end_to_end.test_resume import tensors

    (tiny.folder / "bad.py").write_text(BAD)
    monkeypatch.setenv("BAD", "5:nan")
    assert tiny.launch(*SMALL, "--run.device=cuda", "--guard.on_nonfinite=skip", "--training.compile=false") == 0
    newest = max((tiny.directory / "checkpoints").iterdir())
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(newest).values() if tensor.is_floating_point())


@pytest.mark.parametrize("vocab_size", [512, 70_000])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_and_its_gradients_in_bf16(vocab_size, compiled):
    from models.loss import chunked_cross_entropy

    torch.manual_seed(0)
    x = torch.randn(5000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab_size, 64, device="cuda") * 0.1).bfloat16().requires_grad_()
    labels = torch.randint(vocab_size, (5000,), device="cuda")
    labels[::7] = -100
    loss = chunked_cross_entropy(x, weight, labels, compiled=compiled)
    loss.backward()
    x64, w64 = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    expected = torch.nn.functional.cross_entropy(x64 @ w64.T, labels, reduction="sum")
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)  # logits are rounded to bf16
    for found, exact in ((x.grad, x64.grad), (weight.grad, w64.grad)):
        assert float((found.double() - exact).norm() / exact.norm()) < 0.01
