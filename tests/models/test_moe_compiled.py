"""A compiled block with experts. Not among the quick tests: compiling takes half a minute."""

from __future__ import annotations

from dataclasses import replace

import torch

from models.decoder import Decoder
from tests.models.test_moe import KEYS, SIZE, V, tokens


def test_compiled_in_one_graph_they_are_the_same():
    results = []
    for compiled in (False, True):
        model = Decoder(replace(SIZE, layers=1), V, init_std=0.25, router=KEYS)
        model.init_weights(0)
        if compiled:
            model.layers["0"].compile(fullgraph=True)
        loss = model(*tokens())
        results.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm()
