"""What a dry run knows of a run: its schedule, time, data and processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.hardware import device_spec
from recipes import cli
from recipes.dry_run.plan import HardwareTarget
from tests.recipes.dry_run.plans import GPU, plan_of

pytestmark = pytest.mark.quick


@pytest.mark.slow
def test_the_schedule_preview_is_that_of_the_run(tiny):
    preview = plan_of(tiny).schedule
    assert tiny.launch() == 0
    steps = [row for row in tiny.rows() if "loss" in row]
    assert (preview.num_steps, preview.tokens) == (steps[-1]["step"], steps[-1]["tokens"])
    rates = {row["step"]: row["lr"] for row in steps}
    shown = [mark.step for mark in preview.milestones]
    assert {step.number: step.lr for step in shown} == {step.number: rates[step.number] for step in shown}
    whys = {reason for mark in preview.milestones for reason in mark.reasons}
    assert all(why in whys for why in ("first", "warmed up", "highest lr", "batch", "50 %", "last"))


def test_time_is_flops_over_what_the_devices_reach(tiny):
    plan = plan_of(tiny, GPU, processes=8, claim="A100@50%")
    assert plan.target.device is not None
    assert plan.seconds_on(plan.target.device) == pytest.approx(plan.flops / (8 * 312e12 * 0.5))
    assert plan.flops == plan.flops_per_token * plan.schedule.tokens


@pytest.mark.parametrize(("text", "mfu"), [("", 0.4), ("H100@45%", 0.45), ("@0.5", 0.5)])
def test_hardware_targets(text, mfu):
    assert HardwareTarget.parse(text).mfu == mfu


@pytest.mark.parametrize(("text", "said"), [("TPU", "one of B200"), ("H100@x", "@x is not"), ("H100@140%", "@140% is")])
def test_invalid_hardware_targets_are_refused(tiny, capsys, text, said):
    assert tiny.launch(f"--dry-run={text}") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "gigabytes"), [("h100", 80), ("A100-40GB", 40), ("a100", 80), ("RTX_4090", 24)])
def test_devices_by_name(name, gigabytes):
    assert device_spec(name).memory_bytes == gigabytes * 10**9


def test_the_tokens_of_data_are_estimated_of_any_kind_and_unknown_of_the_network(tiny):
    """A Parquet file counts what was read after 256 rows; those of books are more than what is looked at."""
    pa = pytest.importorskip("pyarrow", reason="needs the [data] extra")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the [data] extra")
    rows = ["It was the best of times. " * 400] * 300
    file = tiny.folder / "books.parquet"
    parquet.write_table(pa.table({"text": rows}), file, compression="none", use_dictionary=False)
    found = plan_of(tiny, f"--data.path={file}").epoch_tokens
    assert found == pytest.approx(sum(len(row) + 1 for row in rows), rel=0.2)
    hub = ["--data.use=components.data:HuggingFaceDataset", "--data.path=hf://some/where/train"]
    assert plan_of(tiny, *hub).epoch_tokens is None


TIKTOKEN = ["--tokenizer.use=components.tokenizers:TiktokenFile", "--tokenizer.path=absent", "--tokenizer.pattern=gpt2"]


def test_a_tokenizer_that_is_elsewhere_is_no_obstacle_given_the_vocabulary(tiny, capsys):
    assert tiny.launch("--dry-run", *TIKTOKEN, "--model.vocab_size=1000") == 0
    printed = capsys.readouterr().out
    assert "vocabulary 1,000" in printed
    assert "absent does not exist" in printed
    assert tiny.launch("--dry-run", *TIKTOKEN) == 2
    assert "set model.vocab_size for a dry run without it" in capsys.readouterr().out


def test_the_planned_processes_need_not_exist(tiny, capsys, monkeypatch):
    monkeypatch.setenv("NPROC", "8")
    monkeypatch.setenv("NNODES", "128")
    assert cli.main([str(Path(tiny.recipe)), "--dry-run"]) == 0
    assert "1024 = 128 (dp_replicate) x 8 (dp_shard)" in capsys.readouterr().out
    assert cli.main([str(Path(tiny.recipe)), "--dry-run", "--parallel.dp_shard=1024"]) == 0
    assert "1024 = 1 (dp_replicate) x 1024 (dp_shard)" in capsys.readouterr().out


def test_processes_of_a_node_share_its_processor():
    device = device_spec("cpu")
    shared = HardwareTarget(device).per_process(4).device
    assert shared is not None
    assert (shared.memory_bytes, shared.flops) == (device.memory_bytes // 4, device.flops / 4)
    assert HardwareTarget(device_spec("H100")).per_process(4).device == device_spec("H100")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--model.kv_heads=2", "--training.sequence_length=25"],
            "training.sequence_length = 25\n    25 is not divisible by parallel.tp = 2",
        ),
        ([], "kv_heads: 1 cannot be divided among parallel.tp = 2"),
        (["--model.kv_heads=2", "--model.ffn_dim=33"], "ffn_dim: 33 cannot be divided"),
    ],
)
def test_tensor_parallelism_that_divides_nothing_is_an_error(tiny, capsys, arguments, said):
    assert tiny.launch("--parallel.tp=2", *arguments, "--dry-run") == 2
    assert said in capsys.readouterr().err
