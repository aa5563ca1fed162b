import json
import math

import pytest

from components.metrics.console import format_duration, format_step, format_validation, mean_tokens_per_second
from components.metrics.tensorboard import TensorBoard
from tests.run_info import open_jsonl, run_info

ROW = {
    "step": 1, "tokens": 4096, "samples": 16, "epoch": 0.01, "loss": 3.5, "lr": 1e-3, "grad_norm": 0.7,
    "global_batch_size": 16, "requested_batch_size": 16, "micro_batches": 2,
    "noise_scale": None, "noise_scale_over_batch": None,
    "tokens_per_second": 2048.0, "step_seconds": 2.0, "data_seconds": 0.01, "mfu": 0.5, "memory_bytes": 10**8,
}  # fmt: skip


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.quick
def test_a_resumed_file_has_neither_gaps_nor_duplicates(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = open_jsonl(path)
    for step in range(1, 8):
        writer.write({"step": step})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a write
    writer = open_jsonl(path, after_step=5)
    for step in range(6, 9):
        writer.write({"step": step})
    writer.close()
    assert steps(path) == list(range(1, 9))


@pytest.mark.quick
def test_an_incomplete_line_is_removed_even_within_the_resumed_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    writer = open_jsonl(path, after_step=5)
    writer.write({"step": 6})
    writer.close()
    assert steps(path) == [1, 6]


@pytest.mark.quick
def test_json_has_no_nan(tmp_path):
    writer = open_jsonl(tmp_path / "m")
    writer.write({"step": 1, "loss": math.nan, "lr": math.inf, "grad_norm": 1.0})
    writer.close()
    assert json.loads((tmp_path / "m").read_text()) == {"step": 1, "loss": None, "lr": None, "grad_norm": 1.0}


@pytest.mark.quick
def test_console_line():
    line = format_step(ROW, total_tokens=1_000_000)
    for part in ("step      1", "4.096K/1M", "loss  3.5000", "lr 1.00e-03", "batch   16", "2.048K tok/s", "mfu  50%"):
        assert part in line
    assert line.endswith("eta 8m06s")
    assert "mfu" not in format_step({**ROW, "mfu": None}, total_tokens=1_000_000)


@pytest.mark.quick
def test_the_line_of_a_validation_shows_the_loss_of_each_average():
    row = {"step": 50, "val_loss": 2.0, "val_perplexity": 7.389, "val_bits_per_byte": 1.1}
    line = "step     50  validation  loss 2.0000  perplexity 7.39  bits per byte 1.1000"
    assert format_validation(row) == line
    averages = {"val_loss_average_ema": 1.9, "val_perplexity_average_ema": 6.7, "val_loss_average_w": 1.95}
    assert format_validation(row | averages) == f"{line}  average ema 1.9000  average w 1.9500"


@pytest.mark.quick
def test_speed_on_the_console_is_that_of_all_steps_since_the_last_line():
    fast, slow = ({**ROW, "step_seconds": s, "tokens_per_second": 4096 / s} for s in (1.0, 3.0))
    assert mean_tokens_per_second([fast, slow]) == pytest.approx(2 * 4096 / 4.0)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3s"), (61, "1m01s"), (3725, "1h02m"), (200_000, "2d07h"), (math.inf, "?")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_tensorboard_holds_the_same_numbers_under_the_documented_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoard()
    first.open(run_info(tmp_path))
    for step in range(1, 6):
        first.write({**ROW, "step": step, "loss": float(step), "source_epochs": {"web": 0.5}, "my_metric": step})
    first.close()
    second = TensorBoard()
    second.open(run_info(tmp_path, after_step=3))  # killed at 5, resumed from a checkpoint of step 3
    for step in range(4, 7):
        second.write({**ROW, "step": step, "loss": float(step * 10)})
    second.write({"step": 6, "tokens": 1, "val_loss": 2.0, "val_perplexity": 7.4, "val_bits_per_byte": 1.1})
    second.write({"step": 6, "tokens": 1, "val_loss_average_ema": 1.9, "my_average_loss": 1.0})
    second.write({"step": 6, "tokens": 1, "goodput_gain": 0.1})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60),
    ]  # fmt: skip
    assert set(events.Tags()["scalars"]) == {
        "train/loss", "train/grad_norm", "train/epoch", "lr/lr",
        "batch/global_batch_size", "batch/requested_batch_size", "batch/micro_batches", "batch/goodput_gain",
        "throughput/tokens_per_second", "throughput/step_seconds", "throughput/data_seconds", "throughput/mfu",
        "throughput/memory_bytes", "train/source_epochs/web", "train/my_metric",
        "validation/val_loss", "validation/val_perplexity", "validation/val_bits_per_byte",
        "validation/val_loss_average_ema", "train/my_average_loss",
    }  # fmt: skip


def test_tensorboard_has_charts_the_recipe_and_hyperparameters_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.hparams import plugin_data_pb2

    for after_step in (0, 3):
        writer = TensorBoard()
        writer.open(run_info(tmp_path, after_step=after_step))
        writer.write({**ROW, "step": after_step + 1})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    (layout,) = (
        layout_pb2.Layout.FromString(e.tensor_proto.string_val[0]) for e in events.Tensors("custom_scalars__config__")
    )
    assert [category.title for category in layout.category] == ["loss", "batch", "throughput"]
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts["batch size and noise scale, in samples"] == ["batch/global_batch_size", "batch/noise_scale"]
    (recipe,) = events.Tensors("recipe/text_summary")
    assert b"dim = 64" in recipe.tensor_proto.string_val[0]
    (environment,) = events.Tensors("environment/text_summary")
    assert b"| git_dirty | True |" in environment.tensor_proto.string_val[0]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert started.hparams["model.dim"].number_value == 64
    assert started.hparams["batch.stages"].string_value == "[1, 2]"
    assert "_hparams_/session_end_info" in events.summary_metadata
