"""float8 matrix products in the blocks of a model, by torchao (the extra `float8`).

The three products of a linear layer and its gradients are computed from float8 values and scales, which are computed
again in every pass (Micikevicius et al., arXiv 2209.05433). Weights stay as they are, so parameters, checkpoints and
the optimizer are not affected. Embedding, head, norms, experts and routers keep the precision of the run.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from components.errors import InputError

Float8 = Literal["off", "rowwise", "tensorwise"]
"""Scales of float8 values: one for each row, or for a whole tensor, which is faster and less exact."""

_MULTIPLE = 16
"""The sizes of a float8 product must be multiples of this."""
_CAPABILITY = (8, 9)
"""The first compute capability with float8 products."""

log = logging.getLogger("powertrain")


def convert_to_float8(blocks: Mapping[str, nn.Module], kind: Float8, device: torch.device, *, tp: int = 1) -> None:
    """Let the linear layers of `blocks` compute in float8, in place; their parameters keep their names.

    Layers whose sizes, divided among `tp` ranks, are not multiples of 16 are left as they are. On a CPU float8 is
    emulated: slower, with the same rounding. Raises InputError without torchao, the hardware, or a layer that fits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # kernels that it does not find
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise InputError("float8", "needs the `torchao` library: pip install -e '.[float8]'") from None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise InputError("float8", f'{name} has no float8 products, which an H100 has; set it to "off"')
    config = replace(Float8LinearConfig.from_recipe_name(kind), emulate=device.type != "cuda")
    converted: list[str] = []

    def is_converted(module: nn.Module, name: str) -> bool:
        if type(module) is not nn.Linear or name.endswith("router"):
            return False
        fits = module.in_features % (_MULTIPLE * tp) == module.out_features % (_MULTIPLE * tp) == 0
        if fits:
            converted.append(name)
        return fits

    for block in blocks.values():
        convert_to_float8_training(block, config=config, module_filter_fn=is_converted)
    if not converted:
        sizes = f"{_MULTIPLE} x {tp} (tp)" if tp > 1 else str(_MULTIPLE)
        raise InputError("float8", f"no linear layer in a block has sizes that are multiples of {sizes}")
    emulated = ", emulated on this device" if device.type != "cuda" else ""
    log.info(f"float8, {kind}{emulated}: {len(converted)} linear layers; MFU stays relative to the bf16 peak")
