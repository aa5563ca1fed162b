"""The architectures of transformers that can be imported and exported, one row each.

To add one, write a row of ARCHITECTURES and its functions (parameter names are in weights.py, the conversion of
config.json in config.py); for a model that is not a Decoder, also a subclass of
`Architecture` that overrides its methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from models.decoder import Decoder
from models.hf import config as hf
from models.hf.weights import Part, hf_parts, stored_parts
from models.llama import Llama
from models.mup import MuPConfig
from models.presets import LlamaShape
from models.rope import RopeScaling

DIMENSIONS = {
    "dim", "layers", "heads", "kv_heads", "ffn_dim", "head_dim", "top_k", "norm_eps", "rope_theta", "rope_scaling",
    "tied_embeddings", "max_sequence_length",
}  # fmt: skip
"""Fields of LlamaShape that every architecture has; all others are variants."""
PLAIN = LlamaShape(dim=0, layers=0, heads=1, kv_heads=1, ffn_dim=0)
"""Its variants are those of a Llama."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A class of transformers, and the Decoder shapes that it corresponds to."""

    model_type: str
    """Its `model_type` in `config.json`."""
    keys: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Returns the keys of `[model]` for a `config.json`. Raises ValueError for unsupported entries."""
    entries: Callable[[LlamaShape, int], dict[str, Any]]
    """Returns the entries of `config.json` for a shape and a vocabulary size."""
    variants: Mapping[str, Any] = field(default_factory=dict)
    """Field of LlamaShape -> the value that it has here, or ANY; other variants are those of a Llama."""
    heads_divide_dim: bool = False
    """Whether transformers requires it, also with head_dim."""
    use: str = "models.llama:Llama"
    """The `use` of `[model]`."""

    def matches(self, model: nn.Module) -> bool:
        """Return whether `model` computes the same function as this architecture."""
        return isinstance(model, Decoder) and not self.differences(model.shape)

    def differences(self, shape: LlamaShape) -> list[str]:
        """Return the fields of `shape` whose values this architecture does not have."""
        wrong = []
        for name in (each.name for each in fields(LlamaShape) if each.name not in DIMENSIONS):
            expected, value = self.variants.get(name, getattr(PLAIN, name)), getattr(shape, name)
            if expected is not ANY and (value is None or not value if expected is SOME else value != expected):
                wrong.append(name)
        return wrong

    def config_from_hf(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of `[model]`, without "use". Raises ValueError for unsupported entries."""
        return self.keys(config)

    def hf_config(self, model: Any) -> dict[str, Any]:
        """Return the entries of `config.json`. Raises ValueError if the model cannot be exported."""
        shape = model.shape
        if self.heads_divide_dim and shape.dim % shape.heads:
            raise ValueError(
                f"dim = {shape.dim} is not a multiple of heads = {shape.heads}, which transformers requires of a "
                f"{self.model_type} model even with head_dim; this model cannot be exported"
            )
        entries = self.entries(shape, model.vocab_size)
        if model.router_loss is not None:
            # with a balanced load their loss is top_k and ours is 1; it is used only with output_router_logits
            entries["router_aux_loss_coef"] = model.router_loss.config.load_balancing_coefficient / shape.top_k
        return {**entries, "initializer_range": model.init_std, "attention_dropout": 0.0, "use_cache": True}

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

    def hf_parts(self, model: Any) -> dict[str, Part]:
        """Return Hugging Face name -> parameter or part of it, for every tensor of a model."""
        return hf_parts(model.shape)

    def stored_parts(self, stored: Iterable[str], model: Any) -> dict[str, Part]:
        """Return stored name -> parameter or part of it. Raises ValueError for missing and unexpected names."""
        return stored_parts(stored, model.shape)


ANY = object()
"""Any value of a variant."""
SOME = object()
"""Any value but zero and None."""
_WINDOWS = {"sliding_window": ANY, "global_attention_interval": ANY}
_GEMMA = {
    "activation": "gelu_tanh", "norm_placement": "both", "zero_centered_norm": True, "scaled_embeddings": True,
    "attention_scale": ANY, "logit_softcap": ANY,
}  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        model_type="llama", keys=hf.llama_keys, entries=hf.llama_entries, heads_divide_dim=True
    ),
    "GraniteForCausalLM": Architecture(
        model_type="granite", keys=hf.granite_keys, entries=hf.granite_entries, variants={"mup": SOME}
    ),
    "GraniteMoeForCausalLM": Architecture(
        model_type="granitemoe",
        keys=hf.granite_moe_keys,
        entries=hf.granite_moe_entries,
        variants={"mup": ANY, "experts": SOME},
    ),
    "MistralForCausalLM": Architecture(
        model_type="mistral", keys=hf.mistral_keys, entries=hf.mistral_entries, variants={"sliding_window": ANY}
    ),
    "Qwen2ForCausalLM": Architecture(
        model_type="qwen2", keys=hf.qwen2_keys, entries=hf.qwen2_entries, variants={"qkv_bias": True, **_WINDOWS}
    ),
    "Qwen3ForCausalLM": Architecture(
        model_type="qwen3", keys=hf.qwen3_keys, entries=hf.qwen2_entries, variants={"qk_norm": "per_head", **_WINDOWS}
    ),
    "Qwen3MoeForCausalLM": Architecture(
        model_type="qwen3_moe",
        keys=hf.qwen3_moe_keys,
        entries=hf.qwen3_moe_entries,
        variants={"qk_norm": "per_head", "experts": SOME, "sliding_window": ANY},
    ),
    "Olmo2ForCausalLM": Architecture(
        model_type="olmo2",
        keys=hf.olmo2_keys,
        entries=hf.common_entries,
        variants={"norm_placement": "post", "qk_norm": "all_heads"},
    ),
    "Olmo3ForCausalLM": Architecture(
        model_type="olmo3",
        keys=hf.olmo3_keys,
        entries=hf.olmo3_entries,
        variants={"norm_placement": "post", "qk_norm": "all_heads", "rope_local_theta": ANY, **_WINDOWS},
    ),
    "Gemma2ForCausalLM": Architecture(
        model_type="gemma2",
        keys=hf.gemma2_keys,
        entries=hf.gemma2_entries,
        variants={**_GEMMA, "attention_softcap": ANY, **_WINDOWS},
        heads_divide_dim=True,
    ),
    "Gemma3ForCausalLM": Architecture(
        model_type="gemma3_text",
        keys=hf.gemma3_keys,
        entries=hf.gemma3_entries,
        variants={**_GEMMA, "qk_norm": "per_head", "rope_local_theta": ANY, **_WINDOWS},
        heads_divide_dim=True,
    ),
}


def architecture_from_model(model: nn.Module) -> tuple[str, Architecture]:
    """Return the name and the architecture of a model. Raises ValueError if transformers has no class for it."""
    for name, architecture in ARCHITECTURES.items():
        if architecture.matches(model):
            return name, architecture
    if not isinstance(model, Decoder):
        raise ValueError(
            f"{type(model).__name__} has no counterpart in transformers; supported are {', '.join(ARCHITECTURES)}"
        )
    shape = model.shape
    name, closest = min(ARCHITECTURES.items(), key=lambda item: len(item[1].differences(shape)))
    wrong = [f"{key} = {getattr(shape, key)!r}" for key in closest.differences(shape)]
    raise ValueError(
        f"this combination of variants has no counterpart in transformers; the closest of {len(ARCHITECTURES)} "
        f"supported architectures is {name}, which does not have {', '.join(wrong)}"
    )


def architecture_from_config(config: Mapping[str, Any]) -> tuple[str, Architecture]:
    """Return the name and the architecture of a `config.json`. Raises ValueError for an unknown one."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if name is None:
        by_type = {architecture.model_type: name for name, architecture in ARCHITECTURES.items()}
        name = by_type.get(str(config.get("model_type")), config.get("model_type"))
    if not isinstance(name, str) or name not in ARCHITECTURES:
        text = " (of Gemma 3, only its text model)" if "Gemma3" in str(name) else ""
        raise ValueError(
            f"architecture {str(name)[:80]!r} is not supported{text}; supported are {', '.join(ARCHITECTURES)}"
        )
    return name, ARCHITECTURES[name]


def match_tensors(model: nn.Module, stored: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """Return stored name -> the parameter of `model`, or its part, from the stored names and shapes.

    Raises ValueError for missing and unexpected tensors, and for those with a wrong shape.
    """
    _, architecture = architecture_from_model(model)
    places = architecture.stored_parts(stored, model)
    shapes = part_shapes(model, places)
    wrong = [
        f"{name} is {list(stored[name])}, not {list(shapes[name])}"
        for name in places
        if shapes[name] != tuple(stored[name])
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"tensors do not have the shapes of the model: {'; '.join(wrong[:3])}{more}")
    return places


def part_shapes(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each part of the parameters of `model`, sharded or not."""
    whole = {name: torch.empty(parameter.shape, device="meta") for name, parameter in model.named_parameters()}
    return {name: tuple(part.of(whole[part.name]).shape) for name, part in parts.items()}
