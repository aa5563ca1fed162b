"""The Llama decoder (Touvron et al. 2023, arXiv 2302.13971).

`Attention`, `FeedForward` and `RMSNorm` are here; a new number of a shape is a field of `LlamaShape` (presets.py) and a
key of `Llama` (llama.py). `Decoder.initial_std` sets the scale of each initial weight.

It contains no code for devices, precision or parallelism, which refer to its modules by name:

    tok_embeddings
    layers.{i}.attention_norm   layers.{i}.attention.{wq,wk,wv,wo}
    layers.{i}.ffn_norm         layers.{i}.feed_forward.{w_gate,w_up,w_down}, with experts {router,w_gate_up,w_down}
    norm   output

B batch, T sequence, D model width, H query heads, K key-value heads, C head width, F feed-forward width, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.document_attention import document_attention, document_positions
from models.kv_cache import KeyValueCache
from models.loss import VocabReduce, chunked_cross_entropy, working_bytes
from models.mkldnn_linear import use_mkldnn_linear
from models.moe import MoE
from models.presets import LlamaShape
from models.random_weights import fill_normal
from models.rope import RopeFrequencies, apply_rope, rope_frequencies, rope_table
from models.router_loss import RouterLoss, RouterLossConfig


class Decoder(nn.Module):
    """Llama. `shape` and `vocab_size` define the function, `init_std` and `depth_scaled_init` the initial weights, and
    `router` the auxiliary losses of the routers, if there are experts.
    """

    def __init__(
        self,
        shape: LlamaShape,
        vocab_size: int,
        *,
        init_std: float = 0.02,
        depth_scaled_init: bool = True,
        router: RouterLossConfig | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.vocab_size = shape, vocab_size
        self.init_std, self.depth_scaled_init = init_std, depth_scaled_init
        self.mup = shape.mup
        self.rope_frequencies = RopeFrequencies(
            rope_frequencies(shape.head_width, shape.rope_theta, shape.rope_scaling)
        )

        self.tok_embeddings = nn.Embedding(vocab_size, shape.dim)
        self.layers = nn.ModuleDict({str(i): Block(shape) for i in range(shape.layers)})
        self.norm = RMSNorm(shape.dim, shape.norm_eps)
        self.output = LMHead(shape.dim, vocab_size, tied=shape.tied_embeddings)
        self.router_loss = RouterLoss(shape.experts, router or RouterLossConfig()) if shape.experts else None
        self.first_input: int | None = None

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Return logits (B, T, V), or with labels the sum of the cross-entropies, () float32. Label -100 is ignored.

        With experts, in training, the gradient of that sum includes the auxiliary losses of the routers; its value does
        not. With a cache, the tokens are appended to it, and the logits are those of the last token, (B, 1, V).
        """
        x_BTD = self.tok_embeddings(tokens_BT)
        if self.mup is not None:
            x_BTD = x_BTD * self.mup.embedding_multiplier
        rope, backends = self._attention_backends(tokens_BT, cache)
        routing: list[Tensor] = []
        for layer, backend in zip(self.layers.values(), backends, strict=True):
            x_BTD = layer(x_BTD, rope, backend)
            if self.router_loss is not None:
                x_BTD, layer_routing = x_BTD
                routing.append(layer_routing)
        if cache is not None:
            x_BTD = x_BTD[:, -1:]
        x_BTD = self.norm(x_BTD)
        if self.mup is not None:  # scale x and not the logits, which are larger and never all exist in the chunked loss
            x_BTD = x_BTD / self.mup.width_multiple(self.shape.dim)
        tied_weight_VD = self.tok_embeddings.weight if self.shape.tied_embeddings else None
        logits_or_loss: Tensor = self.output(x_BTD, labels_BT, tied_weight_VD)
        if self.router_loss is not None and labels_BT is not None and self.training:
            aux_loss = self.router_loss(routing)
            # adds the gradient of aux_loss, and zero to the value
            logits_or_loss = logits_or_loss + (aux_loss - aux_loss.detach())
        return logits_or_loss

    def _attention_backends(
        self, tokens_BT: Tensor, cache: KeyValueCache | None
    ) -> tuple[Tensor, Sequence[AttentionBackend | None]]:
        """Return the RoPE table of the tokens' positions, (2, T, 1, C) or (2, B or 1, T, 1, C), and each layer's
        backend.

        None is plain causal attention. Generated text is a single document, so a cache needs no document masking.
        """
        length = tokens_BT.shape[1]
        if cache is not None:
            return cache.extend(length), cache.layers
        rope = rope_table(length, self.rope_frequencies.on(tokens_BT.device))
        if self.first_input is None:
            return rope, [None] * len(self.layers)
        starts_BT = tokens_BT == self.first_input
        return rope[:, document_positions(starts_BT)], [document_attention(starts_BT, self.shape.head_width)] * len(
            self.layers
        )

    def enable_document_masking(self, first_input: int) -> None:
        """Restrict attention to documents, which start at the token `first_input`, and count positions from there."""
        self.first_input = first_input

    def new_cache(self, padding: Sequence[int], capacity: int) -> KeyValueCache:
        """Return a key-value cache of `capacity` tokens per row; `padding` has each row's number of padding tokens."""
        weight = self.tok_embeddings.weight
        return KeyValueCache(
            self.shape,
            self.rope_frequencies.on(weight.device),
            padding=padding,
            capacity=capacity,
            device=weight.device,
            dtype=weight.dtype,
        )

    def use_mkldnn_linear(self) -> None:
        """Replace the weights by oneDNN's layout for fast generation on a CPU. The model can then not be trained or
        saved."""
        use_mkldnn_linear(self, self.tok_embeddings.weight)

    def init_weights(self, seed: int) -> None:
        """Initialize every parameter from (seed, its name) alone; norm gains are set to 1."""
        for name, parameter in self.named_parameters():
            std = self.initial_std(name)
            if std is None:
                nn.init.ones_(parameter)
            else:
                fill_normal(parameter, name=name, seed=seed, std=std)

    def initial_std(self, name: str) -> float | None:
        """Return the standard deviation of a parameter's initial values; None for norm gains, which start at 1.

        The two matrices of a layer that write into the residual stream are scaled down with depth, so that the variance
        of the stream does not grow with the number of layers (GPT-2). Under muP all matrices scale with width.
        """
        if "norm" in name:
            return None
        std = self.init_std if self.mup is None else self.init_std * self.mup.init_std_factor(name, self.shape.dim)
        if self.depth_scaled_init and name.endswith((".wo.weight", ".w_down.weight")):
            return std / math.sqrt(2 * self.shape.layers)
        return std

    def lr_multiplier(self, name: str) -> float:
        """Return the factor on the learning rate of the parameter `name`."""
        return 1.0 if self.mup is None else self.mup.lr_factor(name, self.shape.dim)

    def muon_lr_multiplier(self, name: str, lr_scale: str) -> float:
        """Return the factor on the learning rate of the matrix `name` if Muon updates it, with updates of
        `lr_scale`."""
        return 1.0 if self.mup is None else self.mup.muon_lr_factor(name, self.shape.dim, lr_scale)

    def merged_matrices(self, name: str, *, per_head: bool) -> int:
        """Return the number of matrices that `name` concatenates: gate and up of experts, and `per_head` q or k
        heads."""
        if name.endswith("w_gate_up.weight"):
            return 2
        heads = {"wq.weight": self.shape.heads, "wk.weight": self.shape.kv_heads}
        return heads.get(name.rpartition("attention.")[2], 1) if per_head else 1

    def flops_per_token(self, sequence_length: int) -> float:
        """Return the FLOPs per token of forward and backward: 6 per matrix parameter, and 12 L H C T for attention.

        Counted as in PaLM (arXiv 2204.02311, appendix B): 2 per multiply-add, backward twice the forward, with the
        head, without the embedding lookup, and attention over the full T x T scores, without deducting the masked half.
        """
        head = self.vocab_size * self.shape.dim
        attention = self.shape.layers * self.shape.heads * self.shape.head_width * sequence_length
        return 6.0 * (self.active_parameters() + head) + 12.0 * attention

    def active_parameters(self) -> int:
        """Return the number of matrix parameters in the layers that one token uses: of the experts, only top_k."""
        matrices = [p for layer in self.layers.values() for p in layer.parameters() if p.dim() > 1]
        experts = sum(p.numel() for p in matrices if p.dim() == 3)
        idle = experts // self.shape.experts * (self.shape.experts - self.shape.top_k) if experts else 0
        return sum(p.numel() for p in matrices) - idle

    def pop_metric_sums(self) -> Tensor | None:
        """Return the routing statistics since the last call, (n,) on the device, and reset them; None without
        experts."""
        return None if self.router_loss is None else self.router_loss.pop_sums()

    def metrics_of(self, sums: Tensor) -> dict[str, float]:
        """Return metrics by name from `pop_metric_sums`, summed over all processes and on the CPU."""
        return {} if self.router_loss is None else self.router_loss.metrics_of(sums)

    def loss_bytes(self, tokens: int, *, element_bytes: int, device_type: str, compiled: bool = False) -> int:
        """Return the bytes of memory that head and loss allocate for the `tokens` of a micro-batch."""
        return working_bytes(
            tokens,
            self.vocab_size,
            self.shape.dim,
            element_bytes=element_bytes,
            device_type=device_type,
            compiled=compiled,
        )


class AttentionBackend(Protocol):
    """Attention other than plain causal attention over the sequence."""

    def attend(self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, scale: float | None) -> Tensor:
        """Return the attention output, (B, H, T, C)."""
        ...


class Block(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.dim, shape.norm_eps)
        self.attention = Attention(shape)
        self.ffn_norm = RMSNorm(shape.dim, shape.norm_eps)
        self.feed_forward = feed_forward(shape)
        self.residual_multiplier = shape.mup.residual_multiplier if shape.mup is not None else 1.0

    def forward(
        self, x_BTD: Tensor, rope: Tensor, backend: AttentionBackend | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return (B, T, D); with experts also `models.moe.routing_sums`."""
        # alpha = 1 is free and exact, so the plain Llama needs no branch
        factor = self.residual_multiplier
        x_BTD = torch.add(x_BTD, self.attention(self.attention_norm(x_BTD), rope, backend), alpha=factor)
        output: Any = self.feed_forward(self.ffn_norm(x_BTD))
        if isinstance(output, tuple):
            output_BTD, routing = output
            return torch.add(x_BTD, output_BTD, alpha=factor), routing
        return torch.add(x_BTD, output, alpha=factor)


class Attention(nn.Module):
    """Causal self-attention in which H / K query heads share a key-value head (GQA, arXiv 2305.13245)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.head_width = shape.head_width
        self.grouped = shape.kv_heads != shape.heads
        # None is 1 / sqrt(C). muP uses 1 / C: trained q and k correlate, so q.k grows like C, not like sqrt(C).
        self.scale = None if shape.mup is None else 1 / shape.head_width
        self.wq = nn.Linear(shape.dim, shape.heads * shape.head_width, bias=False)
        self.wk = nn.Linear(shape.dim, shape.kv_heads * shape.head_width, bias=False)
        self.wv = nn.Linear(shape.dim, shape.kv_heads * shape.head_width, bias=False)
        self.wo = nn.Linear(shape.heads * shape.head_width, shape.dim, bias=False)

    def queries_and_keys(self, x_BTD: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries (B, T, H, C) and keys (B, T, K, C), rotated to their positions."""
        # -1: the number of heads is read from the tensor, because a TP rank holds only some of them
        q_BTHC = apply_rope(self.wq(x_BTD).unflatten(-1, (-1, self.head_width)), rope)
        k_BTKC = apply_rope(self.wk(x_BTD).unflatten(-1, (-1, self.head_width)), rope)
        return q_BTHC, k_BTKC

    def forward(self, x_BTD: Tensor, rope: Tensor, backend: AttentionBackend | None = None) -> Tensor:
        q_BTHC, k_BTKC = self.queries_and_keys(x_BTD, rope)
        v_BTKC = self.wv(x_BTD).unflatten(-1, (-1, self.head_width))
        if backend is None:
            out_BHTC = F.scaled_dot_product_attention(
                q_BTHC.transpose(1, 2),
                k_BTKC.transpose(1, 2),
                v_BTKC.transpose(1, 2),
                is_causal=True,
                scale=self.scale,
                enable_gqa=self.grouped,
            )
        else:
            out_BHTC = backend.attend(q_BTHC, k_BTKC, v_BTKC, self.scale)
        out_BTD: Tensor = self.wo(out_BHTC.transpose(1, 2).flatten(2))
        return out_BTD


def feed_forward(shape: LlamaShape) -> nn.Module:
    """Return the feed-forward of a block, (B, T, D) -> (B, T, D), with experts also -> `models.moe.routing_sums`."""
    if shape.experts:
        return MoE(shape.dim, shape.ffn_dim, shape.experts, shape.top_k)
    return FeedForward(shape.dim, shape.ffn_dim)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w_gate = nn.Linear(dim, ffn_dim, bias=False)
        self.w_up = nn.Linear(dim, ffn_dim, bias=False)
        self.w_down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = F.silu(self.w_gate(x_BTD)) * self.w_up(x_BTD)
        out_BTD: Tensor = self.w_down(hidden_BTF)
        return out_BTD


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.rms_norm(x_BTD, (self.dim,), self.weight, self.eps)


class VocabularyShard(VocabReduce, Protocol):
    """The shard of the vocabulary that this process holds; tensor parallelism sets it on the head."""

    def local(self, x_BTD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return both as plain tensors, the weight with this process's rows only, and the index of its first row."""
        ...


class LMHead(nn.Linear):
    """The output projection, which returns logits or, given labels, the loss.

    The loss is computed inside this module, so that FSDP2, which gathers weights for a module's forward, covers it. A
    tied head has no parameter, so that the shared matrix has a single name.
    """

    def __init__(self, dim: int, vocab_size: int, *, tied: bool) -> None:
        super().__init__(dim, vocab_size, bias=False)
        if tied:
            self.register_parameter("weight", None)
        self.vocab_shard: VocabularyShard | None = None
        self._compiled_loss = False

    def compile(self, *_: Any, **__: Any) -> None:
        """Compile the loss only. The matrix products around it, and logits, are single kernels already."""
        self._compiled_loss = True

    def forward(self, x_BTD: Tensor, labels_BT: Tensor | None = None, tied_weight_VD: Tensor | None = None) -> Tensor:
        weight_VD = self.weight if tied_weight_VD is None else tied_weight_VD
        if labels_BT is None:
            return F.linear(x_BTD, weight_VD)
        vocab_start = 0
        if self.vocab_shard is not None:
            x_BTD, weight_VD, vocab_start = self.vocab_shard.local(x_BTD, weight_VD)
        return chunked_cross_entropy(
            x_BTD.flatten(0, 1),
            weight_VD,
            labels_BT.flatten(),
            vocab_start=vocab_start,
            vocab_reduce=self.vocab_shard,
            compiled=self._compiled_loss,
        )
