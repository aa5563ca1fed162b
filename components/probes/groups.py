"""The groups of parameters of which probes report one number each."""

from __future__ import annotations

from torch import nn

from components.errors import InputError


def group_of(name: str, *, by_module: bool = False) -> str:
    """Return the end of a metric's name for the parameter `name`.

    `layers.3.attention.wq.weight` is in `layer_3`, or with `by_module` in `attention_layer_3`. A parameter outside of
    the layers is in the group of its outermost module: `output.weight` in `output`.
    """
    first, *rest = name.split(".")
    if first != "layers" or len(rest) < 2:
        return first
    layer, module, *_ = rest
    return f"{module}_layer_{layer}" if by_module else f"layer_{layer}"


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of `model` by the end of a metric's name. Raises InputError at `use` if there are none."""
    layers = getattr(model, "layers", None)
    blocks = dict(layers.named_children()) if isinstance(layers, nn.Module) else {}
    if not blocks:
        raise InputError(
            "use",
            f"reads blocks in a container named `layers`, and {type(model).__name__} has none; remove this probe, or "
            "use Norms or LayerNoise, which need no blocks",
        )
    return {f"layer_{name}": block for name, block in blocks.items()}
