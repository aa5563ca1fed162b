"""The memory estimate of a dry run."""

from __future__ import annotations

import pytest

from components.distributed.parallel_dims import MeshShape
from recipes.dry_run.memory import Memory
from tests.recipes.dry_run.plans import memory_of, plan_of

pytestmark = pytest.mark.quick

TINY_PARAMETERS = 2 * 257 * 16 + 16 + 2 * (2 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 3 * 32 * 16)


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


def test_the_norm_of_adam_has_factors_of_the_whole_model_on_every_rank(tiny):
    norms = '--gradient_noise.norms=["l2", "adam"]'
    alone, sharded = memory_of(tiny, norms), memory_of(tiny, norms, processes=4)
    assert alone.parts["norm of Adam"][0] == 2 * TINY_PARAMETERS
    assert sharded.parts["norm of Adam"][0] == 2 * TINY_PARAMETERS + sharded.parts["parameters"][0] // 2
    for measured, plain in ((alone, memory_of(tiny)), (sharded, memory_of(tiny, processes=4))):
        more = measured.parts["norm of Adam"][0]
        assert (measured.peak - plain.peak, measured.local_peak - plain.local_peak) == (more, more)


def test_tensor_parallelism_slices_matrices_and_the_batch_is_that_of_the_data_parallel_ranks(tiny):
    plan = plan_of(tiny, "--parallel.tp=2", "--model.kv_heads=2", processes=4)
    assert plan.mesh_shape == MeshShape(1, 2, 1, 2)
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


@pytest.mark.slow
def test_checkpointing_saves_activations(tiny):
    kept = {
        how: memory_of(tiny, f"--training.activation_checkpoint={how}", "--model.layers=6").parts["activations"][0]
        for how in ("none", "selective", "full", "2")
    }
    assert kept["full"] < kept["2"] < kept["none"]
    assert kept["full"] < kept["selective"] < kept["none"]


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
