"""FSDP2 over a mesh of one process computes what that process does with its own bf16 copies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from components.distributed.fsdp import apply_fsdp
from components.precision import WorkingWeights
from models.decoder import Decoder
from models.parallel_plan import llama_parallel_plan
from models.presets import LlamaShape

SHAPE = LlamaShape(dim=24, layers=2, heads=4, kv_heads=2, ffn_dim=44)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def loss(model: Decoder) -> torch.Tensor:
    tokens = torch.arange(96).view(2, 48) * 7 % 53
    value: torch.Tensor = model(tokens, tokens.roll(-1, 1))
    value.backward()
    return value.detach()


def test_a_block_gets_a_float32_rotary_table_and_computes_bitwise_the_same_in_bf16(one_rank):
    alone, sharded = Decoder(SHAPE, 53), Decoder(SHAPE, 53)
    alone.init_weights(0)
    sharded.init_weights(0)
    apply_fsdp(sharded, llama_parallel_plan(SHAPE).fsdp_groups, init_device_mesh("cpu", (1,)), torch.bfloat16)
    dtypes: list[torch.dtype] = []
    attention = sharded.layers["0"].attention
    attention.register_forward_pre_hook(lambda part, inputs: dtypes.extend(each.dtype for each in inputs[:2]))
    found = loss(sharded)
    assert dtypes == [torch.bfloat16, torch.float32]
    with WorkingWeights(alone, torch.bfloat16)():
        assert torch.equal(loss(alone), found)
    for (name, expected), weight in zip(alone.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(expected.grad, weight.grad.to_local()), name
