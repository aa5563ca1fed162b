"""[probes.NAME] in a run: training stays the same, mistakes are reported before it, and a probe may come and go."""

from __future__ import annotations

import json

import pytest
import torch

from components.metrics.tensorboard import scalars
from tests.conftest import TinyRun
from tests.end_to_end.test_other_models import MODEL
from tests.end_to_end.test_resume import tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHORT = ["--training.total_tokens=1500", "--checkpoint.interval_steps=none"]
"""Seven steps, of 8 and then of 12 samples."""
STEPS = 7
SHIPPED = [
    argument
    for name in ("Norms", "Activations", "AttentionLogits", "LayerNoise")
    for argument in (f"--probes.{name}.use=components.probes:{name}", f"--probes.{name}.interval_steps=3")
]

CUSTOM = '''
class Gains:
    """The largest gain of the norms, and which of the points were called with gradients."""

    def __init__(self, *, interval_steps: int = 3, fail_at: int = 0):
        self.interval_steps, self.fail_at = interval_steps, fail_at

    def on_gradients(self, step):
        for name, parameter in step.parameters.items():
            step.record_max(f"gradients_{step.number}", parameter.grad.abs())
        if step.number == self.fail_at:
            raise ArithmeticError("by hand")

    def on_update(self, step):
        for name, parameter in step.parameters.items():
            assert parameter.grad is None
            if "norm" in name:
                step.record_max("gain", parameter)


class NoPoint:
    """Not a probe."""
'''


@pytest.fixture
def probed(tiny: TinyRun, clean_imports) -> TinyRun:
    (tiny.folder / "mine_probes.py").write_text(CUSTOM)
    (tiny.folder / "mine_tagger.py").write_text(MODEL)
    return tiny


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_training_is_bitwise_the_same_with_probes(probed, precision):
    plain = probed.folder / "plain"
    common = [*SHORT, f"--training.precision={precision}", "--training.max_grad_norm=0.1"]
    assert probed.launch(*common, *SHIPPED, "--probes.mine.use=mine_probes:Gains") == 0
    assert probed.launch(*common, f"--run.dir={plain}") == 0
    one, other = tensors(probed.checkpoint(STEPS)), tensors(plain / f"checkpoints/step-{STEPS:08d}")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = {row["step"]: row for row in probed.rows() if "loss" in row}
    measured = [step for step, row in rows.items() if "probe_seconds" in row]
    assert measured == [1, 4, 7]
    assert not [key for step in (2, 3, 5, 6) for key in rows[step] if key.startswith("probe")]
    without = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    assert not [key for row in without for key in row if key.startswith("probe")]
    first = rows[1]
    assert first["probe_mine_gain"] == pytest.approx(1.0, abs=0.02)
    squares = sum(value**2 for key, value in first.items() if key.startswith("probe_Norms_grad_norm"))
    assert squares**0.5 == pytest.approx(first["grad_norm"], rel=1e-5)
    assert first["probe_mine_gradients_1"] <= first["grad_norm"]
    traces = sum(value for key, value in first.items() if key.startswith("probe_LayerNoise_grad_cov_trace"))
    assert traces == pytest.approx(first["grad_cov_trace"], rel=1e-4)
    tags = dict(scalars(first))
    assert "probes/probe_Norms_grad_norm_layer_0" in tags
    assert "probes/probe_seconds" in tags


def test_a_resumed_run_may_change_its_probes(probed, capsys):
    assert probed.launch("--training.total_tokens=700") == 0
    assert probed.launch("--training.total_tokens=1500", "--resume", *SHIPPED[:2]) == 0
    assert "was unset" in capsys.readouterr().out
    assert [row["step"] for row in probed.rows() if "probe_seconds" in row] == [7]


BLOCKLESS = ["--model.use=mine_tagger:Model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SHIPPED[:1], "--probes.Norms.by_modul=true"], "did you mean by_module"),
        ([*SHIPPED[:1], "--probes.Norms.interval_steps=0"], "probes.Norms.interval_steps = 0"),
        (["--probes.a.use=components.probes:Norm"], "components.probes has no Norm; did you mean Norms?"),
        (["--probes.a.use=mine_probes:NoPoint"], "NoPoint is not a probe: it has none of watch_forward"),
        ([*SHIPPED[4:5], *BLOCKLESS], "reads blocks in a container named `layers`, and Tagger has none"),
        ([*SHIPPED[2:3], *BLOCKLESS], "reads blocks in a container named `layers`, and Tagger has none"),
        ([*SHIPPED[6:7], "--gradient_noise.interval_steps=none"], "LayerNoise\n    needs the gradient noise"),
        ([*SHIPPED[6:8], "--gradient_noise.interval_steps=2"], "3 must be a multiple of gradient_noise.interval_steps"),
        (['--probes."a b".use=components.probes:Norms'], "the name must consist of letters"),
    ],
)
def test_a_mistake_is_one_message_before_the_run(probed, capsys, arguments, message):
    for dry_run in ([], ["--dry-run=cpu"]):
        assert probed.launch(*SHORT, *arguments, *dry_run) == 2
        said = capsys.readouterr()
        assert (said.out + said.err).count(message) == 1
    assert not (probed.directory / "metrics.jsonl").exists()


def test_norms_of_a_model_without_blocks(probed):
    arguments = [*SHORT, *BLOCKLESS, *SHIPPED[:2], *SHIPPED[6:]]
    assert probed.launch(*arguments) == 0
    row = next(row for row in probed.rows() if "probe_seconds" in row)
    assert row["probe_Norms_grad_norm_embedding"] > 0
    assert row["probe_LayerNoise_grad_cov_trace_embedding"] == pytest.approx(row["grad_cov_trace"], rel=1e-5)


def test_an_error_of_a_probe_names_its_table(probed, capsys):
    with pytest.raises(ArithmeticError, match="by hand"):
        probed.launch(*SHORT, "--probes.mine.use=mine_probes:Gains", "--probes.mine.fail_at=4")
    assert "crashed in [probes.mine]" in capsys.readouterr().out
