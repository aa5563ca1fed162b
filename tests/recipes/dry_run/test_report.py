"""The report of a dry run, and the findings of its checks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from components.parallel.layout import Sizes
from components.throughput import named_device
from recipes import launch
from recipes.config import Config, Override, load
from recipes.dry_run.memory import Memory
from recipes.dry_run.plan import HardwareTarget, RunPlan, make_plan
from recipes.dry_run.preflight import preflight_checks

pytestmark = pytest.mark.quick

TINY_PARAMETERS = 2 * 257 * 16 + 16 + 2 * (2 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 3 * 32 * 16)
GPU = "--run.device=auto"


def config_of(tiny, *arguments: str) -> Config:
    pairs = (argument.removeprefix("--").split("=", 1) for argument in arguments)
    return load(tiny.recipe, [Override(key, value) for key, value in pairs])


def plan_of(tiny, *arguments: str, processes: int = 1, claim: str = "") -> RunPlan:
    return make_plan(config_of(tiny, *arguments), processes, HardwareTarget.parse(claim))


def memory_of(tiny, *arguments: str, processes: int = 1) -> Memory:
    memory = plan_of(tiny, *arguments, processes=processes).memory
    assert isinstance(memory, Memory)
    return memory


def told(tiny, *arguments: str, processes: int = 1, claim: str = "") -> dict[str, tuple[str, str]]:
    """Key -> (level, message) of what is foreseen, the gravest of each key."""
    found: dict[str, tuple[str, str]] = {}
    for item in preflight_checks(plan_of(tiny, *arguments, processes=processes, claim=claim)):
        found.setdefault(item.key, (item.level, item.message))
    return found


def test_one_process_holds_everything_once(tiny):
    memory = memory_of(tiny)
    assert memory.parameters == TINY_PARAMETERS
    parts = {name: size for name, (size, _) in memory.parts.items()}
    assert parts["parameters"] == parts["gradients"] == 4 * TINY_PARAMETERS
    assert parts["optimizer state"] == 8 * TINY_PARAMETERS
    assert parts["weights in use"] == 0
    assert memory.local_peak == memory.peak, "nothing to gather"
    assert memory.state_bytes == 12 * TINY_PARAMETERS


def test_shards_divide_what_is_held_and_replicas_do_not(tiny):
    held = {
        layout: memory_of(tiny, *(f"--parallel.{key}" for key in layout), processes=4).parts["parameters"][0]
        for layout in [("dp_shard=4",), ("dp_replicate=2", "dp_shard=2"), ("dp_replicate=4", "dp_shard=1")]
    }
    # 257 rows of the embedding and of the head make 65 and 129 at the most
    assert held["dp_shard=4",] == 4 * ((TINY_PARAMETERS - 2 * 257 * 16) // 4 + 2 * 65 * 16)
    assert held["dp_replicate=2", "dp_shard=2"] == 4 * ((TINY_PARAMETERS - 2 * 257 * 16) // 2 + 2 * 129 * 16)
    assert held["dp_replicate=4", "dp_shard=1"] == 4 * TINY_PARAMETERS


def test_tensor_parallelism_slices_matrices_and_the_batch_is_that_of_the_data_parallel_ranks(tiny):
    plan = plan_of(tiny, "--parallel.tp=2", "--model.kv_heads=2", processes=4)
    assert plan.mesh_shape == Sizes(1, 2, 2)
    assert plan.batch_rounding.dp_size == 2
    assert isinstance(plan.memory, Memory)


EXPERTS = ("--model.experts=5", "--model.top_k=2", "--model.ffn_dim=16", "--model.kv_heads=2")


def test_experts_are_cut_evenly_and_whole_on_tensor_parallel_ranks(tiny, capsys):
    held = {
        layout: memory_of(tiny, *EXPERTS, *layout, processes=4).parts["parameters"][0] // 4
        for layout in (("--parallel.dp_shard=4",), ("--parallel.tp=4", "--model.kv_heads=4", "--model.heads=4"))
    }
    experts = 2 * 5 * 3 * 16 * 16  # layers x experts x matrices of 16 x 16
    router_and_rest = held["--parallel.dp_shard=4",] - experts // 4
    alone = memory_of(tiny, *EXPERTS).parameters
    assert router_and_rest == pytest.approx((alone - experts) / 4, rel=0.02)  # 5 rows of a router, 257 of an embedding
    sliced = memory_of(tiny, *EXPERTS, "--model.kv_heads=4", "--model.heads=4").parameters
    assert held["--parallel.tp=4", "--model.kv_heads=4", "--model.heads=4"] - experts == pytest.approx(
        (sliced - experts) / 4, rel=0.02
    )
    assert tiny.launch(*EXPERTS, "--dry-run") == 0
    met = 2 * (2 * 16 * 16 + 2 * 16 * 16 + 2 * 3 * 16 * 16 + 5 * 16)
    assert f"experts        {experts:,} of the parameters; one token uses {met:,} in the layers" in (
        capsys.readouterr().out
    )


def test_checkpointing_saves_activations(tiny):
    kept = {
        how: memory_of(tiny, f"--training.activation_checkpoint={how}", "--model.layers=6").parts["activations"][0]
        for how in ("none", "selective", "full", "2")
    }
    assert kept["full"] < kept["2"] < kept["none"]
    assert kept["full"] < kept["selective"] < kept["none"]


@pytest.mark.parametrize(
    ("keys", "foreseen"),
    [
        (["initial=2"], {"batch.initial": "error"}),
        (["initial=2", "shrink=true", "minimum=2"], {"batch.initial": "error"}),
        (["initial=8", "shrink=true", "minimum=2"], {"batch.minimum": "warning"}),
        (["initial=8", "minimum=2"], {}),
        (["initial=4", "shrink=true"], {}),
    ],
)
def test_a_batch_whose_noise_could_not_be_measured_is_foreseen(tiny, keys, foreseen):
    """Micro-batches of 2 on one process: a batch of 2 is one group. On two processes it is one group each.

    A run that starts there is refused, so it is an error; one that may come there stays.
    """
    policy = ["--batch.use=components.batch.noise_scale:NoiseScale", "--batch.maximum=64"]
    policy += [f"--batch.{each}" for each in keys]
    found = told(tiny, *policy)
    assert {name: level for name, (level, message) in found.items() if "one micro-batch" in message} == foreseen
    assert not any("one micro-batch" in message for _, message in told(tiny, *policy, processes=2).values())


@pytest.mark.parametrize(
    ("keys", "key", "level", "said"),
    [
        (["maximum=63"], "batch.maximum", "warning", "63 samples become 64: a multiple of 2 = 1 ranks x 2 a micro"),
        (["maximum=64", "quantum=1"], "batch.quantum", "note", "1 is not a multiple of 2 = 1 ranks x 2 a micro-batch"),
        (["maximum=60", "quantum=4"], "batch.quantum", None, None),
        (["maximum=50", "quantum=2"], "batch.maximum", None, None),
        (["maximum=90", "quantum=2"], "batch.maximum", "warning", "a step of 90 would use some more than once"),
        (["maximum=75", "minimum=4", "shrink=true"], "batch", "note", "not known: 2 to 38 steps"),
        (["maximum=75"], "batch", "note", "what NoiseScale will measure is not known: 2 to 19 steps"),
    ],
)
def test_sizes_that_an_adaptive_batch_may_come_to_are_foreseen(tiny, keys, key, level, said):
    """150 samples: 2 steps of 76, or 19 of 8."""
    policy = ["--batch.use=components.batch.noise_scale:NoiseScale", "--batch.initial=8"]
    found = told(tiny, *policy, *(f"--batch.{each}" for each in keys))
    assert found.get(key, (None, None))[0] == level
    assert said is None or said in found[key][1]


def test_the_schedule_preview_is_that_of_the_run(tiny):
    preview = plan_of(tiny).schedule
    assert tiny.launch() == 0
    steps = [row for row in tiny.rows() if "loss" in row]
    assert (preview.num_steps, preview.tokens) == (steps[-1]["step"], steps[-1]["tokens"])
    rates = {row["step"]: row["lr"] for row in steps}
    shown = [mark.step for mark in preview.milestones]
    assert {step.number: step.lr for step in shown} == {step.number: rates[step.number] for step in shown}
    whys = ", ".join(mark.reasons for mark in preview.milestones)
    assert all(why in whys for why in ("first", "warmed up", "highest lr", "batch", "50 %", "last"))


def test_time_is_flops_over_what_the_devices_reach(tiny):
    plan = plan_of(tiny, GPU, processes=8, claim="A100@50%")
    assert plan.target.device is not None
    assert plan.seconds_on(plan.target.device) == pytest.approx(plan.flops / (8 * 312e12 * 0.5))
    assert plan.flops == plan.flops_per_token * plan.schedule.tokens


@pytest.mark.parametrize(("text", "mfu"), [("", 0.4), ("H100@45%", 0.45), ("@0.5", 0.5)])
def test_claims(text, mfu):
    assert HardwareTarget.parse(text).mfu == mfu


@pytest.mark.parametrize(("text", "said"), [("TPU", "one of B200"), ("H100@x", "@x is not"), ("H100@140%", "@140% is")])
def test_claims_that_make_no_sense(tiny, capsys, text, said):
    assert tiny.launch(f"--dry-run={text}") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "gigabytes"), [("h100", 80), ("A100-40GB", 40), ("a100", 80), ("RTX_4090", 24)])
def test_devices_by_name(name, gigabytes):
    assert named_device(name).memory_bytes == gigabytes * 10**9


@pytest.mark.parametrize(
    ("arguments", "key", "level", "said"),
    [
        (["--batch.initial=9"], "batch", "warning", "9 samples become 10: a multiple of 1 ranks x 2"),
        (["--batch.initial=1000", "--batch.stages=[]"], "batch", "warning", "step of 1,000 would use some more"),
        (["--data.path=nowhere/*.txt"], "data.path", "warning", "nowhere"),
        (["--validation.data.path=nowhere.txt"], "validation.data.path", "warning", "nowhere"),
        (["--lr_schedule.warmup_tokens=1800"], "lr_schedule.warmup_tokens", "warning", "50% of the run"),
        (["--lr_schedule.warmup_tokens=24"], "lr_schedule.warmup_tokens", "warning", "over in 1 steps"),
        (["--lr_schedule.decay_tokens=3500"], "lr_schedule.decay_tokens", "warning", "overlap"),
        (["--checkpoint.interval_steps=500"], "checkpoint.interval_steps", "warning", "not below the 14 steps"),
        (["--checkpoint.interval_steps=none"], "checkpoint.interval_steps", "warning", "nothing is saved"),
        (["--validation.interval_steps=14"], "validation.interval_steps", "warning", "one validation"),
        (["--model.vocab_size=300"], "model.vocab_size", "note", "43 of 300 rows"),
        ([], "training.total_tokens", "note", "epochs"),
    ],
)
def test_what_is_foreseen(tiny, arguments, key, level, said):
    found = told(tiny, *arguments)
    assert found[key][0] == level
    assert said in found[key][1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--model.kv_heads=2", "--training.sequence_length=25"],
            "training.sequence_length = 25 cannot be divided by 2",
        ),
        ([], "kv_heads: 1 cannot be divided among parallel.tp = 2"),
        (["--model.kv_heads=2", "--model.ffn_dim=33"], "ffn_dim: 33 cannot be divided"),
    ],
)
def test_tensor_parallelism_that_divides_nothing_is_an_error(tiny, capsys, arguments, said):
    assert tiny.launch("--parallel.tp=2", *arguments, "--dry-run") == 2
    assert said in capsys.readouterr().err


def test_too_large_for_a_device_says_what_helps(tiny):
    size = ["--model.dim=8192", "--model.head_dim=64", "--model.ffn_dim=32768"]
    level, message = told(tiny, GPU, *size, claim="RTX 3090")["training.micro_batch_size"]
    assert level == "error"
    assert "RTX 3090 has 24 GB; shard over more processes" in message
    assert "training.micro_batch_size" not in told(tiny, GPU, *size, claim="H200")


def test_a_schedule_that_ends_too_early(tiny):
    (tiny.folder / "early.py").write_text(
        "from dataclasses import dataclass\n@dataclass(kw_only=True)\nclass Early:\n    sign: float = 1.0\n"
        "    def lr(self, tokens, batch_tokens, total_tokens):\n"
        "        return self.sign * max(0.0, 1 - 2 * tokens / total_tokens)\n"
    )
    found = told(tiny, "--lr_schedule.use=early:Early")
    assert found["lr_schedule"][0] == "warning"
    assert "have a learning rate of zero" in found["lr_schedule"][1]
    assert told(tiny, "--lr_schedule.use=early:Early", "--lr_schedule.sign=-1.0")["lr_schedule"][0] == "error"


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


def test_a_directory_in_use(tiny):
    assert tiny.launch("--training.total_tokens=300") == 0
    assert told(tiny)["run.name"][0] == "warning"
    assert told(tiny, "--run.if_exists=replace")["run.name"][0] == "note"


TIKTOKEN = ["--tokenizer.use=components.tokenizers:TiktokenFile", "--tokenizer.path=absent", "--tokenizer.pattern=gpt2"]


def test_a_tokenizer_that_is_elsewhere_is_no_obstacle_given_the_vocabulary(tiny, capsys):
    assert tiny.launch("--dry-run", *TIKTOKEN, "--model.vocab_size=1000") == 0
    printed = capsys.readouterr().out
    assert "vocabulary 1,000" in printed
    assert "absent does not exist" in printed
    assert tiny.launch("--dry-run", *TIKTOKEN) == 2
    assert "a dry run does without it if model.vocab_size is set" in capsys.readouterr().out


def test_errors_come_together_and_end_with_status_2(tiny, capsys, monkeypatch):
    monkeypatch.setenv("NPROC", "4")
    assert tiny.launch("--dry-run", "--parallel.dp_shard=3", "--training.sequence_length=4000") == 2
    printed = capsys.readouterr().out
    assert "is not the 4 processes of this run" in printed
    assert "max_sequence_length" in printed


def test_problems_come_last_with_their_place(tiny, capsys):
    assert tiny.launch("--dry-run=H100@45%", "--batch.initial=9") == 0
    printed = capsys.readouterr().out
    assert "at 45% MFU" in printed
    assert "9 samples become 10" in printed.split("\nproblems\n")[1]
    assert f"{tiny.recipe.name}:" in printed.split("\nproblems\n")[1]
    assert not tiny.directory.exists()


def test_a_model_that_needs_data_to_run_is_planned_without_its_activations(tiny, capsys):
    (tiny.folder / "peeking.py").write_text(
        "from models.llama import Llama\nclass Peeking(Llama):\n    def build(self, **sizes):\n"
        "        model = super().build(**sizes)\n        forward = model.forward\n"
        "        model.layers['0'].register_forward_hook(lambda *args: int(args[2].argmax()) and None)\n"
        "        return model\n"
    )
    keys = ["size=debug", "dim=16", "layers=2", "heads=2", "kv_heads=1", "head_dim=8"]
    assert tiny.launch("--dry-run", "--model.use=peeking:Peeking", *(f"--model.{key}" for key in keys)) == 0
    assert "the model does not run without data" in capsys.readouterr().out


def test_the_claimed_processes_need_not_exist(tiny, capsys, monkeypatch):
    monkeypatch.setenv("NPROC", "8")
    monkeypatch.setenv("NNODES", "128")
    assert launch.main([str(Path(tiny.recipe)), "--dry-run"]) == 0
    assert "1024 = 128 (dp_replicate) x 8 (dp_shard)" in capsys.readouterr().out
    assert launch.main([str(Path(tiny.recipe)), "--dry-run", "--parallel.dp_shard=1024"]) == 0
    assert "1024 = 1 (dp_replicate) x 1024 (dp_shard)" in capsys.readouterr().out


def test_too_large_for_a_node_says_that_nodes_can_share_it(tiny):
    size = ["--model.dim=8192", "--model.head_dim=64", "--model.ffn_dim=32768"]
    plan = make_plan(config_of(tiny, GPU, *size), 4, HardwareTarget.parse("RTX 3090"), local_size=1)
    (message,) = [item.message for item in preflight_checks(plan) if item.key == "training.micro_batch_size"]
    assert "set parallel.dp_shard = 4, or parallel.tp" in message


def test_gradients_that_need_not_be_whole_are_named_as_the_remedy(tiny):
    size = ["--model.dim=4096", "--model.head_dim=64", "--model.ffn_dim=16384", "--training.accumulation=local"]
    plan = make_plan(config_of(tiny, GPU, *size), 8, HardwareTarget.parse("RTX 3090"))
    assert isinstance(plan.memory, Memory)
    device = plan.target.device
    assert device is not None
    tight = replace(plan, target=HardwareTarget(replace(device, memory_bytes=plan.memory.local_peak - 1)))
    (message,) = [item.message for item in preflight_checks(tight) if item.key == "training.micro_batch_size"]
    assert 'set training.accumulation = "auto"' in message


def test_processes_of_a_node_share_its_processor():
    device = named_device("cpu")
    shared = HardwareTarget(device).per_process(4).device
    assert shared is not None
    assert (shared.memory_bytes, shared.flops) == (device.memory_bytes // 4, device.flops / 4)
    assert HardwareTarget(named_device("H100")).per_process(4).device == named_device("H100")
