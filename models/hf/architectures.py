"""The architectures of transformers that have a counterpart here: one row each.

A row says which sizes of the decoder it is, and what its `config.json` says. To add one, write those functions and the
row; for a model that is not a Decoder, a subclass that overrides the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from models.decoder import Decoder
from models.hf.config import granite_config_from_hf, granite_moe_config_from_hf, hf_config, llama_config_from_hf
from models.hf.weights import hf_names, stored_names
from models.llama import Llama
from models.mup import MuPConfig
from models.presets import LlamaShape
from models.rope import RopeScaling


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One class of transformers and what it is here: a Decoder of some sizes. A subclass may be of another model."""

    model_type: str
    """Its short name in `config.json`."""
    has_shape: Callable[[LlamaShape], bool]
    """Whether a decoder of this shape computes what this architecture does."""
    hf_config: Callable[[Any], dict[str, Any]]
    """The entries of `config.json` for a model."""
    config_from_hf: Callable[[Mapping[str, Any]], dict[str, Any]]
    """The keys of `[model]` for a `config.json`. Raises ValueError for what the model does not compute."""
    use: str = "models.llama:Llama"
    """What `[model]` has to use."""

    def matches(self, model: nn.Module) -> bool:
        """Return whether `model` computes what this architecture does."""
        return isinstance(model, Decoder) and self.has_shape(model.shape)

    def model_config(self, keys: Mapping[str, Any]) -> Any:
        """Return what `[model]` is with the keys that `keys` gives."""
        tables: dict[str, Any] = {
            key: None if keys.get(key) is None else of(**keys[key])
            for key, of in (("rope_scaling", RopeScaling), ("mup", MuPConfig))
        }
        return Llama(**{**keys, **tables})

    def build(self, keys: Mapping[str, Any]) -> nn.Module:
        """Return the model of these keys, on the current device."""
        model: nn.Module = self.model_config(keys).build(vocab_size=keys["vocab_size"], sequence_length=1)
        return model

    def hf_names(self, model: Any) -> dict[str, str]:
        """Return our name -> theirs, for every parameter of a model."""
        return hf_names(model.shape)

    def stored_names(self, stored: Iterable[str], model: Any) -> dict[str, str]:
        """Return the same for what is stored. Raises ValueError for missing and unexpected names."""
        return stored_names(stored, model.shape)


def _config(model: Decoder) -> dict[str, Any]:
    entries = hf_config(model.shape, model.vocab_size)
    # How versions before 5, and most other readers, spell it. Version 5 reads either, and both say the same.
    rope = dict(entries["rope_parameters"])
    entries["rope_theta"] = rope.pop("rope_theta")
    entries["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return {**entries, "initializer_range": model.init_std, "attention_dropout": 0.0, "use_cache": True}


def _llama_config(model: Decoder) -> dict[str, Any]:
    shape = model.shape
    if shape.dim % shape.heads:
        raise ValueError(
            f"transformers refuses a Llama whose dim = {shape.dim} is no multiple of heads = {shape.heads}, also with a "
            "head_dim of its own; such a model cannot be exported"
        )
    return _config(model)


def _moe_config(model: Decoder) -> dict[str, Any]:
    losses = model.router_loss
    assert losses is not None
    # theirs, of even loads, is top_k where ours is 1; it counts only with output_router_logits
    coefficient = losses.config.load_balancing_coefficient / model.shape.top_k
    return {**_config(model), "router_aux_loss_coef": coefficient}


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        model_type="llama",
        has_shape=lambda shape: shape.mup is None and not shape.experts,
        hf_config=_llama_config,
        config_from_hf=llama_config_from_hf,
    ),
    "GraniteForCausalLM": Architecture(
        model_type="granite",
        has_shape=lambda shape: shape.mup is not None and not shape.experts,
        hf_config=_config,
        config_from_hf=granite_config_from_hf,
    ),
    "GraniteMoeForCausalLM": Architecture(
        model_type="granitemoe",
        has_shape=lambda shape: bool(shape.experts),
        hf_config=_moe_config,
        config_from_hf=granite_moe_config_from_hf,
    ),
}


def architecture_from_model(model: nn.Module) -> tuple[str, Architecture]:
    """Raises ValueError for a model that transformers has no class for."""
    for name, architecture in ARCHITECTURES.items():
        if architecture.matches(model):
            return name, architecture
    raise ValueError(f"a {type(model).__name__} is none of {', '.join(ARCHITECTURES)}")


def architecture_from_config(config: Mapping[str, Any]) -> tuple[str, Architecture]:
    """The architecture that a `config.json` names. Raises ValueError for an unknown one."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if name is None:
        by_type = {architecture.model_type: name for name, architecture in ARCHITECTURES.items()}
        name = by_type.get(str(config.get("model_type")), config.get("model_type"))
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"architecture {str(name)[:80]!r} is unknown here; known are {', '.join(ARCHITECTURES)}")
    return name, ARCHITECTURES[name]


def match_tensors(model: nn.Module, stored: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Our name -> the stored name, of every parameter of `model`, given the names and shapes that are stored.

    Raises ValueError for missing and unexpected tensors, and for those of another shape.
    """
    _, architecture = architecture_from_model(model)
    places = architecture.stored_names(stored, model)
    wrong = [
        f"{places[name]} is {list(stored[places[name]])}, not {list(parameter.shape)}"
        for name, parameter in model.named_parameters()
        if tuple(parameter.shape) != tuple(stored[places[name]])
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"tensors have another shape than the model's: {'; '.join(wrong[:3])}{more}")
    return places
