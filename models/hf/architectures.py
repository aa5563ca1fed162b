"""The architectures of transformers that can be imported and exported, one row each.

To add one, write a row of ARCHITECTURES and its functions (parameter names are in weights.py, the conversion of
config.json in config.py); for a model that is not a Decoder, also a subclass of
`Architecture` that overrides its methods.
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
    """A class of transformers, and the Decoder shapes that it corresponds to."""

    model_type: str
    """Its `model_type` in `config.json`."""
    has_shape: Callable[[LlamaShape], bool]
    """Returns whether a decoder of this shape computes the same function."""
    hf_config: Callable[[Any], dict[str, Any]]
    """Returns the entries of `config.json` for a model."""
    config_from_hf: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Returns the keys of `[model]` for a `config.json`. Raises ValueError for unsupported entries."""
    use: str = "models.llama:Llama"
    """The `use` of `[model]`."""

    def matches(self, model: nn.Module) -> bool:
        """Return whether `model` computes the same function as this architecture."""
        return isinstance(model, Decoder) and self.has_shape(model.shape)

    def model_config(self, keys: Mapping[str, Any]) -> Any:
        """Return the model config with these keys of `[model]`."""
        tables: dict[str, Any] = {
            key: None if keys.get(key) is None else of(**keys[key])
            for key, of in (("rope_scaling", RopeScaling), ("mup", MuPConfig))
        }
        return Llama(**{**keys, **tables})

    def build(self, keys: Mapping[str, Any]) -> nn.Module:
        """Return the model with these keys of `[model]`, on the current device."""
        model: nn.Module = self.model_config(keys).build(vocab_size=keys["vocab_size"], sequence_length=1)
        return model

    def hf_names(self, model: Any) -> dict[str, str]:
        """Return our name -> Hugging Face name, for every parameter of a model."""
        return hf_names(model.shape)

    def stored_names(self, stored: Iterable[str], model: Any) -> dict[str, str]:
        """Return our name -> stored name. Raises ValueError for missing and unexpected names."""
        return stored_names(stored, model.shape)


def _config(model: Decoder) -> dict[str, Any]:
    entries = hf_config(model.shape, model.vocab_size)
    # The spelling of versions before 5 and of most other readers. Version 5 reads both.
    rope = dict(entries["rope_parameters"])
    entries["rope_theta"] = rope.pop("rope_theta")
    entries["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return {**entries, "initializer_range": model.init_std, "attention_dropout": 0.0, "use_cache": True}


def _llama_config(model: Decoder) -> dict[str, Any]:
    shape = model.shape
    if shape.dim % shape.heads:
        raise ValueError(
            f"dim = {shape.dim} is not a multiple of heads = {shape.heads}, which transformers requires of a Llama "
            "even with head_dim; this model cannot be exported"
        )
    return _config(model)


def _moe_config(model: Decoder) -> dict[str, Any]:
    losses = model.router_loss
    assert losses is not None
    # with a balanced load their loss is top_k and ours is 1; it is used only with output_router_logits
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
    """Return the name and the architecture of a model. Raises ValueError if transformers has no class for it."""
    for name, architecture in ARCHITECTURES.items():
        if architecture.matches(model):
            return name, architecture
    raise ValueError(
        f"{type(model).__name__} has no counterpart in transformers; supported are {', '.join(ARCHITECTURES)}"
    )


def architecture_from_config(config: Mapping[str, Any]) -> tuple[str, Architecture]:
    """Return the name and the architecture of a `config.json`. Raises ValueError for an unknown one."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if name is None:
        by_type = {architecture.model_type: name for name, architecture in ARCHITECTURES.items()}
        name = by_type.get(str(config.get("model_type")), config.get("model_type"))
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"architecture {str(name)[:80]!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return name, ARCHITECTURES[name]


def match_tensors(model: nn.Module, stored: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return our name -> stored name, for every parameter of `model`, from the stored names and shapes.

    Raises ValueError for missing and unexpected tensors, and for those with a wrong shape.
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
        raise ValueError(f"tensors do not have the shapes of the model: {'; '.join(wrong[:3])}{more}")
    return places
