"""How far every family is from transformers: logits, loss, gradients and greedy text of drawn configurations.

    python -m benchmarks.parity                  # 40 configurations of each family, a few minutes
    python -m benchmarks.parity --draws 5 --families Qwen3ForCausalLM

Both models have the same random weights, in float32. The table has the worst difference of each family: of a logit, of
the loss relative to it, and of the gradient of a parameter relative to its norm.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from components.generation import Sampling, generate_tokens
from models.decoder import Decoder
from models.hf.architectures import ARCHITECTURES, architecture_from_model
from models.hf.weights import hf_parts
from models.mup import MuP
from models.presets import LlamaShape
from models.rope import RopeScaling
from models.router_loss import RouterLossConfig

Choose = Callable[[Sequence[Any]], Any]
"""Returns one of the options."""
VOCABULARY, ROWS, LENGTH, NEW_TOKENS = 97, 2, 40, 8


def draw_shape(family: str, choose: Choose) -> LlamaShape:
    """Return a small shape that `family`, a name of ARCHITECTURES, has in transformers."""
    kv_heads, groups = choose([1, 2, 3]), choose([1, 2, 4])
    heads, head_dim = kv_heads * groups, choose([8, 12, 16])
    keys: dict[str, Any] = {
        # some families require heads to divide dim
        "dim": heads * choose([4, 8, 12]) if heads < 6 else heads * 4,
        "layers": choose([2, 3, 4]),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn_dim": choose([24, 33, 48]),
        "norm_eps": choose([1e-6, 1e-5]),
        "rope_theta": choose([100.0, 10_000.0, 1e6]),
        "rope_scaling": choose([None, *SCALINGS]),
        "tied_embeddings": choose([False, True]),
        "max_sequence_length": 64,
    }
    return LlamaShape(**keys, **{key: draw(choose) for key, draw in _VARIANTS[family].items()})


SCALINGS = [
    RopeScaling(type="linear", factor=2.5),
    RopeScaling(type="dynamic", factor=4.0, original_max_position=16),
    RopeScaling(type="yarn", factor=4.0, original_max_position=16),
    RopeScaling(type="yarn", factor=8.0, beta_fast=4.0, beta_slow=0.5, attention_factor=1.3, original_max_position=24),
    RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=20),
]
Draws = dict[str, Callable[[Choose], Any]]
"""Field of LlamaShape -> function that draws a value."""
_WINDOWS: Draws = {
    # shorter and longer than the text
    "sliding_window": lambda choose: choose([3, 17, 100]),
    "global_attention_interval": lambda choose: choose([0, 2, 3]),
}
_GEMMA: Draws = {
    "activation": lambda choose: "gelu_tanh",
    "norm_placement": lambda choose: "both",
    "zero_centered_norm": lambda choose: True,
    "scaled_embeddings": lambda choose: True,
    "attention_scale": lambda choose: choose([0.0, 5**-0.5]),
    "logit_softcap": lambda choose: choose([0.0, 2.0]),
    **_WINDOWS,
}
_OLMO: Draws = {"norm_placement": lambda choose: "post", "qk_norm": lambda choose: "all_heads"}
_EXPERTS: Draws = {"experts": lambda choose: choose([3, 4, 6]), "top_k": lambda choose: choose([2, 3])}
_MUP: Draws = {
    "mup": lambda choose: MuP(
        base_width=choose([8, 32]),
        embedding_multiplier=choose([1.0, 5.0]),
        residual_multiplier=choose([0.3, 1.0]),
        depth=choose(["off", "completep"]),
    )
}
_PER_HEAD: Draws = {"qk_norm": lambda choose: "per_head"}
_LOCAL: Draws = {"rope_local_theta": lambda choose: choose([0.0, 50.0])}
_VARIANTS: dict[str, Draws] = {
    "LlamaForCausalLM": {},
    "GraniteForCausalLM": _MUP,
    "GraniteMoeForCausalLM": {**_MUP, **_EXPERTS},
    "MistralForCausalLM": {"sliding_window": _WINDOWS["sliding_window"]},
    "Qwen2ForCausalLM": {"qkv_bias": lambda choose: True, **_WINDOWS},
    "Qwen3ForCausalLM": {**_PER_HEAD, **_WINDOWS},
    "Qwen3MoeForCausalLM": {**_PER_HEAD, **_EXPERTS, "sliding_window": lambda choose: choose([0, 3, 100])},
    "Olmo2ForCausalLM": _OLMO,
    "Olmo3ForCausalLM": {**_OLMO, **_WINDOWS, **_LOCAL},
    "Gemma2ForCausalLM": {**_GEMMA, "attention_softcap": lambda choose: choose([0.0, 1.5])},
    "Gemma3ForCausalLM": {**_GEMMA, **_PER_HEAD, **_LOCAL},
}


@dataclass(frozen=True)
class Differences:
    """Between a decoder and the model of transformers with the same weights."""

    logits: float
    """The largest difference of a logit."""
    loss: float
    """Relative to the loss."""
    gradient: float
    """The largest of a parameter, in its norm."""
    same_text: bool
    """Whether the greedy continuations are equal."""

    def worse(self, other: Differences) -> Differences:
        """Return the worse of each."""
        return Differences(
            max(self.logits, other.logits),
            max(self.loss, other.loss),
            max(self.gradient, other.gradient),
            self.same_text and other.same_text,
        )


def build_pair(shape: LlamaShape, seed: int) -> tuple[str, Decoder, nn.Module]:
    """Return the architecture, our model and theirs with the same random weights. Logits spread over some units, and
    gains of norms and biases differ, so that any mix-up shows."""
    import transformers

    base_width = shape.dim if shape.mup is None else shape.mup.base_width
    off = RouterLossConfig(load_balancing_coefficient=0, z_loss_coefficient=0)
    ours = Decoder(shape, VOCABULARY, init_std=1.5 / base_width**0.5, depth_scaled_init=False, router=off)
    ours.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5, generator=generator))
    name, architecture = architecture_from_model(ours)
    config_class = getattr(transformers, name).config_class
    # a padding token would have no gradient in their embedding
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    implementations = {"attn_implementation": "eager", "experts_implementation": "eager"}
    config = config_class(**architecture.hf_config(ours), **ids, **implementations)
    theirs = getattr(transformers, name)(config).eval()
    load_weights(theirs, ours)
    return name, ours, theirs


def load_weights(theirs: nn.Module, ours: Decoder) -> None:
    """Copy the weights of `ours` into `theirs`, where experts are stacked."""
    weights = ours.state_dict()
    for name, tensor in stacked(ours.shape, weights).items():
        parameter = theirs.get_parameter(name)
        assert parameter.shape == tensor.shape, name
        parameter.data.copy_(tensor)
    assert len(list(theirs.parameters())) == len(weights), "a parameter of theirs was not set"


def stacked(shape: LlamaShape, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights by their names in the memory of transformers 5, which has one tensor for all experts of a
    layer, while the files of Qwen 3 have one for each."""
    renamed = {
        "block_sparse_moe.router.layer.weight": "block_sparse_moe.router.weight",
        "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
        "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj",
    }
    found: dict[str, Tensor] = {}
    for name, part in hf_parts(shape).items():
        if part.bounds:
            layer = name.split(".mlp.")[0]
            matrix = "gate_up_proj" if "gate_up" in part.name else "down_proj"
            found[f"{layer}.mlp.experts.{matrix}"] = weights[part.name]
            continue
        ending = next((end for end in renamed if name.endswith(end)), None)
        found[name if ending is None else name.removesuffix(ending) + renamed[ending]] = weights[part.name]
    return found


def compare(shape: LlamaShape, seed: int) -> Differences:
    """Return the differences on random tokens."""
    _, ours, theirs = build_pair(shape, seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    tokens, labels = drawn[:, :-1], drawn[:, 1:]
    loss = ours(tokens, labels)
    logits = theirs(tokens).logits
    reference = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    reference.backward()
    ours_grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    gradient = max(
        float((grad - theirs_grad).norm() / theirs_grad.norm())
        for name, grad in stacked(shape, ours_grads).items()  # type: ignore[arg-type]
        if (theirs_grad := theirs.get_parameter(name).grad) is not None
    )
    with torch.no_grad():
        difference = float((ours(tokens) - logits).abs().max())
    dynamic = shape.rope_scaling is not None and shape.rope_scaling.type == "dynamic"
    return Differences(
        difference,
        float(((loss - reference).abs() / reference).detach()),
        gradient,
        # their cache keeps keys that were rotated for a shorter text
        dynamic or greedy(ours, tokens[:1]) == greedy_of_transformers(theirs, tokens[:1]),
    )


def greedy(model: Decoder, prompt: Tensor) -> list[int]:
    """Return the greedy continuation of `prompt` (1, T), with a key-value cache."""
    uniform = torch.zeros(1, NEW_TOKENS, dtype=torch.float64)
    steps = generate_tokens(
        model.eval(),
        prompt.tolist(),
        Sampling(temperature=0),
        uniform,
        end=None,
        vocab_size=VOCABULARY,
        device=prompt.device,
    )
    return [ids[0] for ids in steps if ids[0] is not None]


def greedy_of_transformers(model: Any, prompt: Tensor) -> list[int]:
    """Return the same from transformers."""
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(prompt)
    out = model.generate(
        prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, use_cache=True
    )
    ids: list[int] = out[0, prompt.shape[1] :].tolist()
    return ids


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=40, help="configurations of each family (default: 40)")
    parser.add_argument("--families", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    options = parser.parse_args(arguments)
    print("| architecture | configurations | logit | loss, relative | gradient, relative | greedy text |")
    print("|---|---|---|---|---|---|")
    for family in options.families:
        worst = Differences(0.0, 0.0, 0.0, True)
        for seed in range(options.draws):
            worst = worst.worse(compare(draw_shape(family, random.Random(f"{family} {seed}").choice), seed))
        text = "equal" if worst.same_text else "differs"
        print(
            f"| `{family}` | {options.draws} | {worst.logits:.1e} | {worst.loss:.1e} | {worst.gradient:.1e} | {text} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
