"""FSDP2 over NCCL, on a mesh of one GPU, computes what the GPU does alone, and does not synchronize."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from components.distributed.fsdp import GradSync, apply_fsdp
from components.precision import WorkingWeights
from models.decoder import Decoder
from models.parallel_plan import llama_parallel_plan
from models.presets import LlamaShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]

V, PASSES = 512, 3
SHAPE = LlamaShape(dim=64, layers=3, heads=2, kv_heads=1, ffn_dim=96)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1, device_id=device
    )
    yield
    dist.destroy_process_group()


def built(*, compiled: bool) -> Decoder:
    model = Decoder(SHAPE, V).cuda()
    model.init_weights(0)
    if compiled:
        for layer in model.layers.values():
            layer.compile()
    return model


@pytest.mark.parametrize("once_per_step", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_mesh_of_one_computes_what_the_gpu_alone_does_without_waiting(one_rank, compiled, once_per_step):
    tokens = torch.randint(V, (PASSES, 2, 64), generator=torch.Generator().manual_seed(0)).cuda()
    alone, sharded = built(compiled=compiled), built(compiled=compiled)
    apply_fsdp(sharded, llama_parallel_plan(SHAPE).fsdp_groups, init_device_mesh("cuda", (1,)), torch.bfloat16)
    sync = GradSync(sharded, once_per_step=once_per_step)
    found, expected = [], []
    try:
        for number, batch in enumerate(tokens, 1):
            torch.cuda.set_sync_debug_mode("error" if number == PASSES else "default")  # the first fill caches
            loss = sharded(batch, batch.roll(-1, 1))
            sync.prepare_backward(last=number == PASSES)
            loss.backward()
            found.append(loss.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with WorkingWeights(alone, torch.bfloat16)():
        for batch in tokens:
            loss = alone(batch, batch.roll(-1, 1))
            loss.backward()
            expected.append(loss.detach())
    # equal up to kernels that are chosen by alignment, and the order of sums in backward
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=0)
    for (name, weight), shard in zip(alone.named_parameters(), sharded.parameters(), strict=True):
        assert (shard.grad.to_local() - weight.grad).norm() < 0.01 * weight.grad.norm(), name
