"""The findings of the checks before a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recipes.dry_run.memory import Memory
from recipes.dry_run.plan import HardwareTarget, make_plan
from recipes.dry_run.preflight import preflight_checks
from tests.recipes.dry_run.plans import GPU, config_of, findings_of

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["initial_size=2"], {"batch.initial_size": "error"}),
        (["initial_size=2", "shrink=true", "min_size=2"], {"batch.initial_size": "error"}),
        (["initial_size=8", "shrink=true", "min_size=2"], {"batch.min_size": "warning"}),
        (["initial_size=8", "min_size=2"], {}),
        (["initial_size=4", "shrink=true"], {}),
    ],
)
def test_a_batch_whose_noise_cannot_be_measured_is_a_finding_of_the_dry_run(tiny, keys, expected):
    """Micro-batches of 2 on one process: a batch of 2 is one group. On two processes it is one group each.

    A run that starts there is refused, so it is an error; one that may come there stays.
    """
    policy = ["--batch.use=components.batch.noise_scale:NoiseScale", "--batch.max_size=64"]
    policy += [f"--batch.{each}" for each in keys]
    found = findings_of(tiny, *policy)
    assert {name: level for name, (level, message) in found.items() if "2 micro-batches" in message} == expected
    assert not any("2 micro-batches" in message for _, message in findings_of(tiny, *policy, processes=2).values())


@pytest.mark.parametrize(
    ("keys", "key", "level", "said"),
    [
        (["max_size=63"], "batch.max_size", "warning", "63 samples become 64: a multiple of 2 = 1 ranks x 2 per"),
        (
            ["max_size=64", "multiple_of=1"],
            "batch.multiple_of",
            "note",
            "1 is not a multiple of 2 = 1 ranks x 2 per micro-batch",
        ),
        (["max_size=60", "multiple_of=4"], "batch.multiple_of", None, None),
        (["max_size=50", "multiple_of=2"], "batch.max_size", None, None),
        (
            ["max_size=90", "multiple_of=2"],
            "batch.max_size",
            "warning",
            "a step of 90 would use some of them more than once",
        ),
        (["max_size=75", "min_size=4", "shrink=true"], "batch", "note", "unknown before training: 2 to 38 steps"),
        (["max_size=75"], "batch", "note", "which is unknown before training: 2 to 19 steps"),
    ],
)
def test_sizes_that_an_adaptive_batch_may_reach_are_findings_of_the_dry_run(tiny, keys, key, level, said):
    """150 samples: 2 steps of 76, or 19 of 8."""
    policy = ["--batch.use=components.batch.noise_scale:NoiseScale", "--batch.initial_size=8"]
    found = findings_of(tiny, *policy, *(f"--batch.{each}" for each in keys))
    assert found.get(key, (None, None))[0] == level
    assert said is None or said in found[key][1]


@pytest.mark.parametrize(
    ("arguments", "key", "level", "said"),
    [
        (["--batch.initial_size=9"], "batch", "warning", "9 samples become 10: a multiple of 2 = 1 ranks x 2"),
        (
            ["--batch.initial_size=1000", "--batch.stages=[]"],
            "batch",
            "warning",
            "step of 1,000 would use some of them more",
        ),
        (["--data.path=nowhere/*.txt"], "data.path", "warning", "nowhere"),
        (["--validation.data.path=nowhere.txt"], "validation.data.path", "warning", "nowhere"),
        (["--lr_schedule.warmup_tokens=1800"], "lr_schedule.warmup_tokens", "warning", "50% of the run"),
        (["--lr_schedule.warmup_tokens=24"], "lr_schedule.warmup_tokens", "warning", "takes only 1 steps"),
        (["--lr_schedule.decay_tokens=3500"], "lr_schedule.decay_tokens", "warning", "overlap"),
        (["--checkpoint.interval_steps=500"], "checkpoint.interval_steps", "warning", "not below the 14 steps"),
        (["--checkpoint.interval_steps=none"], "checkpoint.interval_steps", "warning", "nothing is saved"),
        (["--validation.interval_steps=14"], "validation.interval_steps", "warning", "one validation"),
        (["--model.vocab_size=300"], "model.vocab_size", "note", "43 of 300 rows"),
        ([], "training.total_tokens", "note", "epochs"),
    ],
)
def test_findings_of_the_dry_run(tiny, arguments, key, level, said):
    found = findings_of(tiny, *arguments)
    assert found[key][0] == level
    assert said in found[key][1]


def test_too_large_for_a_device_says_what_helps(tiny):
    size = ["--model.dim=8192", "--model.head_dim=64", "--model.ffn_dim=32768"]
    level, message = findings_of(tiny, GPU, *size, claim="RTX 3090")["training.micro_batch_size"]
    assert level == "error"
    assert "RTX 3090 has 24 GB; shard over more processes" in message
    assert "training.micro_batch_size" not in findings_of(tiny, GPU, *size, claim="H200")


def test_too_large_for_a_node_says_that_nodes_can_share_it(tiny):
    size = ["--model.dim=8192", "--model.head_dim=64", "--model.ffn_dim=32768"]
    plan = make_plan(config_of(tiny, GPU, *size), 4, HardwareTarget.parse("RTX 3090"), local_size=1)
    (message,) = [item.message for item in preflight_checks(plan) if item.key == "training.micro_batch_size"]
    assert "set parallel.dp_shard = 4, or parallel.tp" in message


def test_gradients_that_need_not_be_whole_are_named_as_the_remedy(tiny):
    size = ["--model.dim=4096", "--model.head_dim=64", "--model.ffn_dim=16384", "--training.grad_sync=once_per_step"]
    plan = make_plan(config_of(tiny, GPU, *size), 8, HardwareTarget.parse("RTX 3090"))
    assert isinstance(plan.memory, Memory)
    device = plan.target.device
    assert device is not None
    tight = replace(plan, target=HardwareTarget(replace(device, memory_bytes=plan.memory.local_peak - 1)))
    (message,) = [item.message for item in preflight_checks(tight) if item.key == "training.micro_batch_size"]
    assert 'set training.grad_sync = "auto"' in message


def test_a_schedule_that_ends_too_early(tiny):
    (tiny.folder / "early.py").write_text(
        "from dataclasses import dataclass\n@dataclass(kw_only=True)\nclass Early:\n    sign: float = 1.0\n"
        "    def lr(self, tokens, batch_tokens, total_tokens):\n"
        "        return self.sign * max(0.0, 1 - 2 * tokens / total_tokens)\n"
    )
    found = findings_of(tiny, "--lr_schedule.use=early:Early")
    assert found["lr_schedule"][0] == "warning"
    assert "tokens is zero" in found["lr_schedule"][1]
    assert findings_of(tiny, "--lr_schedule.use=early:Early", "--lr_schedule.sign=-1.0")["lr_schedule"][0] == "error"


def test_a_directory_in_use(tiny):
    assert tiny.launch("--training.total_tokens=300") == 0
    assert findings_of(tiny)["run.name"][0] == "warning"
    assert findings_of(tiny, "--run.if_exists=replace")["run.name"][0] == "note"
