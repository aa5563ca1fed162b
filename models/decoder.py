"""The Llama decoder (Touvron et al. 2023, arXiv 2302.13971), and what other families change in it.

Each variant is a field of `LlamaShape` (presets.py) and a key of `Llama` (llama.py), which describes it; docs/models.md
has the sources. Those of attention are in attention.py.

It contains no code for devices, precision or parallelism, which refer to its modules by name:

    tok_embeddings
    layers.{i}.attention_norm   layers.{i}.attention.{wq,wk,wv,wg,wo,q_norm,k_norm}       layers.{i}.attention_post_norm
    layers.{i}.ffn_norm         layers.{i}.feed_forward.{w_gate,w_up,w_down}              layers.{i}.ffn_post_norm
    norm   output               with experts: layers.{i}.feed_forward.{router,w_gate_up,w_down}

B batch, T sequence, D model width, H query heads, K key-value heads, C head width, F feed-forward width, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import Attention, AttentionBackend, softcap
from models.attention_backends import attention_backends
from models.context_parallel import SequenceShards, whole_output
from models.document_attention import document_positions
from models.kv_cache import KeyValueCache
from models.lm_head import LMHead
from models.loss import working_bytes
from models.mkldnn_linear import use_mkldnn_linear
from models.moe import GATED, MoE
from models.norm import RMSNorm
from models.presets import Activation, LlamaShape
from models.random_weights import fill_normal
from models.recompute import recompute
from models.rope import Rope
from models.router_loss import RouterLoss, RouterLossConfig
from models.sharded_kv_cache import ShardedKeyValueCache
from models.z_loss import ZLoss

Cache = KeyValueCache | ShardedKeyValueCache


class Decoder(nn.Module):
    """Llama. `shape` and `vocab_size` define the function, `init_std` and `depth_scaled_init` the initial weights,
    `z_loss_coefficient` and, with experts, `router` the auxiliary losses.
    """

    def __init__(
        self,
        shape: LlamaShape,
        vocab_size: int,
        *,
        init_std: float = 0.02,
        depth_scaled_init: bool = True,
        z_loss_coefficient: float = 0.0,
        router: RouterLossConfig | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.vocab_size = shape, vocab_size
        self.init_std, self.depth_scaled_init = init_std, depth_scaled_init
        self.mup = shape.mup
        self.rope = Rope(shape.rotary_width, shape.rope_theta, shape.rope_scaling)
        self.local_rope = Rope(shape.rotary_width, shape.rope_local_theta) if shape.rope_local_theta else self.rope

        self.tok_embeddings = nn.Embedding(vocab_size, shape.dim)
        self.layers = nn.ModuleDict({str(i): Block(shape, i) for i in range(shape.layers)})
        self.norm = RMSNorm.of(shape)
        self.z_loss = ZLoss(z_loss_coefficient) if z_loss_coefficient else None
        self.output = LMHead(
            shape.dim, vocab_size, tied=shape.tied_embeddings, softcap=shape.logit_softcap, z_loss=self.z_loss
        )
        self.router_loss = RouterLoss(shape.experts, router or RouterLossConfig()) if shape.experts else None
        self.first_input: int | None = None
        self.sequence_shards: SequenceShards | None = None

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Return logits (B, T, V), or with labels the sum of the cross-entropies, () float32. Label -100 is ignored.

        In training, the gradient of that sum includes the z loss and the auxiliary losses of the routers; its value
        does not. With a cache, the tokens are appended to it, and the logits are those of the last token, (B, 1, V).
        """
        x_BTD = self.tok_embeddings(self._local(tokens_BT) if cache is None else cache.local(tokens_BT))
        if self.shape.scaled_embeddings:  # sqrt(D) is rounded to the dtype of the embedding, as in Gemma
            x_BTD = x_BTD * float(torch.tensor(math.sqrt(self.shape.dim), dtype=x_BTD.dtype, device="cpu"))
        elif self.mup is not None:
            x_BTD = x_BTD * self.mup.embedding_multiplier
        routing: list[Tensor] = []
        for layer, (rope, backend) in zip(self.layers.values(), self._layer_inputs(tokens_BT, cache), strict=True):
            x_BTD = layer(x_BTD, rope, backend)
            if self.router_loss is not None:
                x_BTD, layer_routing = x_BTD
                routing.append(layer_routing)
        if cache is not None:
            x_BTD = cache.last(x_BTD)
        x_BTD = self.norm(x_BTD)
        if self.mup is not None:  # scale x and not the logits, which are larger and never all exist in the chunked loss
            x_BTD = x_BTD / self.mup.width_multiple(self.shape.dim)
        tied_weight_VD = self.tok_embeddings.weight if self.shape.tied_embeddings else None
        local_labels_BT = None if labels_BT is None else self._local(labels_BT)
        logits_or_loss: Tensor = self.output(x_BTD, local_labels_BT, tied_weight_VD)
        if self.sequence_shards is not None and cache is None:
            logits_or_loss = whole_output(self.sequence_shards, logits_or_loss)
        if labels_BT is None and self.shape.logit_softcap:
            return softcap(logits_or_loss, self.shape.logit_softcap)
        if self.router_loss is not None and labels_BT is not None and self.training:
            aux_loss = self.router_loss(routing)
            # adds the gradient of aux_loss, and zero to the value
            logits_or_loss = logits_or_loss + (aux_loss - aux_loss.detach())
        return logits_or_loss

    def _layer_inputs(
        self, tokens_BT: Tensor, cache: Cache | None
    ) -> Iterator[tuple[Tensor | None, AttentionBackend | None]]:
        """Yield each layer's RoPE table of this rank's tokens, (2, T, 1, R) or (2, B or 1, T, 1, R), and its attention
        backend, for whole sequences.

        Generated text is a single document, so a cache needs no document masking.
        """
        length, device = tokens_BT.shape[1], tokens_BT.device
        backends: Sequence[AttentionBackend | None]
        if cache is not None:
            (rope, local_rope), backends = cache.extend(length), cache.layers
        else:
            starts_BT = None if self.first_input is None else tokens_BT == self.first_input
            ropes = self._rope_tables(length, device)
            if starts_BT is not None:
                positions_BT = document_positions(starts_BT)
                ropes = ropes[0][:, positions_BT], ropes[1][:, positions_BT]
            rope, local_rope = (self._local(table, -3) for table in ropes)
            backends = attention_backends(self.shape, starts_BT, length, device, self.sequence_shards)
        for layer, backend in enumerate(backends):
            table = local_rope if self.shape.window_of(layer) else rope
            yield table if self.shape.rotates(layer) else None, backend

    def _local(self, whole: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's part, with context parallelism, of a tensor with whole sequences along `dim`."""
        return whole if self.sequence_shards is None else self.sequence_shards.shard(whole, dim)

    def _rope_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the tables of the layers that attend to everything, and of those with a sliding window."""
        table = self.rope.table(length, device)
        return table, table if self.local_rope is self.rope else self.local_rope.table(length, device)

    def enable_document_masking(self, first_input: int) -> None:
        """Restrict attention to documents, which start at the token `first_input`, and count positions from there."""
        self.first_input = first_input

    def enable_context_parallelism(self, shards: SequenceShards) -> None:
        """Compute with this rank's part of every sequence; `forward` is still given whole sequences, and returns their
        logits or the sum of their losses. The gradient is this rank's summand."""
        self.sequence_shards = shards
        if self.router_loss is not None:
            self.router_loss.sequence_reduces.append(shards)

    def new_cache(self, padding: Sequence[int], capacity: int) -> Cache:
        """Return a key-value cache of `capacity` tokens per row; `padding` has each row's number of padding tokens.

        With context parallelism it is this rank's part, and a prompt has a length that can be cut.
        """
        weight, shards = self.tok_embeddings.weight, self.sequence_shards
        cache = KeyValueCache if shards is None else partial(ShardedKeyValueCache, shards=shards)
        return cache(
            self.shape,
            self._rope_tables(capacity, weight.device),
            padding=padding,
            capacity=capacity,
            device=weight.device,
            dtype=weight.dtype,
        )

    def use_mkldnn_linear(self) -> None:
        """Store the weights in oneDNN's layout, for fast generation on a CPU. They can then not be trained or saved."""
        use_mkldnn_linear(self, self.tok_embeddings.weight)

    def init_weights(self, seed: int) -> None:
        """Initialize every parameter from (seed, its name) alone; gains of norms start at 1, biases at 0."""
        for name, parameter in self.named_parameters():
            std = self.initial_std(name)
            if std is None:
                nn.init.constant_(parameter, 0.0 if self.shape.zero_centered_norm or name.endswith("bias") else 1.0)
            else:
                fill_normal(parameter, name=name, seed=seed, std=std)

    def initial_std(self, name: str) -> float | None:
        """Return the standard deviation of a parameter's initial values; None for those that are constants at first.

        The two matrices of a layer that write into the residual stream are scaled down with depth, so that the variance
        of the stream does not grow with the number of layers (GPT-2); CompleteP scales the residual branches instead.
        Under muP all matrices scale with width.
        """
        if "norm" in name or name.endswith("bias"):
            return None
        std = self.init_std if self.mup is None else self.init_std * self.mup.init_std_factor(name, self.shape.dim)
        depth_scaled = self.depth_scaled_init and (self.mup is None or self.mup.depth == "off")
        if depth_scaled and name.endswith((".wo.weight", ".w_down.weight")):
            return std / math.sqrt(2 * self.shape.layers)
        return std

    def lr_multiplier(self, name: str) -> float:
        """Return the factor on the learning rate of the parameter `name`."""
        return 1.0 if self.mup is None else self.mup.lr_factor(name, self.shape.dim)

    def muon_lr_multiplier(self, name: str, lr_scale: str, *, per_head: bool) -> float:
        """Return the factor on the learning rate of the matrix `name` under Muon, with updates of `lr_scale`."""
        if self.mup is None:
            return 1.0
        by_head = per_head and self._heads_of(name) is not None
        return self.mup.muon_lr_factor(name, self.shape.dim, lr_scale, by_head=by_head)

    def merged_matrices(self, name: str, *, per_head: bool) -> int:
        """Return the number of matrices that `name` concatenates: gate and up, or `per_head` heads of q or k."""
        if name.endswith("w_gate_up.weight"):
            return 2
        return (self._heads_of(name) if per_head else None) or 1

    def _heads_of(self, name: str) -> int | None:
        """Return the number of heads of a query or key projection; None for another parameter."""
        heads = {"wq.weight": self.shape.heads, "wk.weight": self.shape.kv_heads}
        return heads.get(name.rpartition("attention.")[2])

    def flops_per_token(self, sequence_length: int) -> float:
        """Return the FLOPs per token of forward and backward: 6 per matrix parameter, 12 H C T for a layer's attention.

        Counted as in PaLM (arXiv 2204.02311, appendix B): 2 per multiply-add, backward twice the forward, with the
        head, without the embedding lookup, and attention over the full T x T scores, without deducting the masked half;
        with a sliding window, over T x window of them.
        """
        head = self.vocab_size * self.shape.dim
        windows = [self.shape.window_of(layer) or sequence_length for layer in range(self.shape.layers)]
        keys = sum(min(window, sequence_length) for window in windows)
        return 6.0 * (self.active_parameters() + head) + 12.0 * self.shape.heads * self.shape.head_width * keys

    def active_parameters(self) -> int:
        """Return the number of matrix parameters in the layers that one token uses: of the experts, only top_k."""
        matrices = (p for layer in self.layers.values() for p in layer.parameters() if p.dim() > 1)
        return sum(p.numel() for p in matrices) - self.idle_parameters()

    def idle_parameters(self) -> int:
        """Return the number of parameters of the experts that a token is not routed to."""
        experts = sum(p.numel() for layer in self.layers.values() for p in layer.parameters() if p.dim() == 3)
        return experts // self.shape.experts * (self.shape.experts - self.shape.top_k) if experts else 0

    def pop_metric_sums(self) -> Tensor | None:
        """Return the sums of auxiliary losses since the last call, (n,) on the device, or None, and reset them."""
        sums = [loss.pop_sums() for loss in (self.z_loss, self.router_loss) if loss is not None]
        parts = [part for part in sums if part is not None]
        return torch.cat(parts) if parts else None

    def metrics_of(self, sums: Tensor) -> dict[str, float]:
        """Return metrics by name from `pop_metric_sums`, summed over all processes and on the CPU."""
        metrics: dict[str, float] = {}
        if self.z_loss is not None:
            metrics |= self.z_loss.metrics_of(sums[:2])
            sums = sums[2:]
        return metrics if self.router_loss is None else metrics | self.router_loss.metrics_of(sums)

    def key_value_bytes(self, tokens: int, *, element_bytes: int) -> int:
        """Return the bytes of the keys and values of one layer."""
        return 2 * tokens * self.shape.kv_heads * self.shape.head_width * element_bytes

    def loss_bytes(self, tokens: int, *, element_bytes: int, device_type: str, compiled: bool = False) -> int:
        """Return the bytes of memory that head and loss allocate for the `tokens` of a micro-batch."""
        return working_bytes(
            tokens,
            self.vocab_size,
            self.shape.dim,
            element_bytes=element_bytes,
            device_type=device_type,
            compiled=compiled,
            softcap=bool(self.shape.logit_softcap),
        )


class Block(nn.Module):
    def __init__(self, shape: LlamaShape, layer: int) -> None:
        super().__init__()
        pre, post = shape.norm_placement != "post", shape.norm_placement != "pre"
        self.attention_norm = RMSNorm.of(shape) if pre else nn.Identity()
        self.attention = Attention(shape, layer)
        self.attention_post_norm = RMSNorm.of(shape) if post else nn.Identity()
        self.ffn_norm = RMSNorm.of(shape) if pre else nn.Identity()
        self.feed_forward = feed_forward(shape)
        self.ffn_post_norm = RMSNorm.of(shape) if post else nn.Identity()
        self.residual_multiplier = shape.residual_multiplier

    def forward(
        self, x_BTD: Tensor, rope: Tensor | None, backend: AttentionBackend | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return (B, T, D); with experts also `models.moe.routing_sums`."""
        # alpha = 1 is free and exact, so the plain Llama needs no branch
        factor = self.residual_multiplier
        attention_BTD = self.attention(self.attention_norm(x_BTD), rope, backend)
        x_BTD = torch.add(x_BTD, self.attention_post_norm(attention_BTD), alpha=factor)
        output: Any = self.feed_forward(self.ffn_norm(x_BTD))
        output_BTD, routing = output if isinstance(output, tuple) else (output, None)
        x_BTD = torch.add(x_BTD, self.ffn_post_norm(output_BTD), alpha=factor)
        return x_BTD if routing is None else (x_BTD, routing)


def feed_forward(shape: LlamaShape) -> nn.Module:
    """Return the feed-forward of a block, (B, T, D) -> (B, T, D), with experts also -> `models.moe.routing_sums`."""
    if shape.experts:
        return MoE(shape.dim, shape.ffn_dim, shape.experts, shape.top_k, shape.activation)
    return FeedForward(shape.dim, shape.ffn_dim, shape.activation)


class FeedForward(nn.Module):
    """A gated feed-forward (Shazeer 2020, arXiv 2002.05202): SwiGLU or GeGLU."""

    def __init__(self, dim: int, ffn_dim: int, activation: Activation = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.w_gate = nn.Linear(dim, ffn_dim, bias=False)
        self.w_up = nn.Linear(dim, ffn_dim, bias=False)
        self.w_down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = recompute(GATED[self.activation], self.w_gate(x_BTD), self.w_up(x_BTD))
        out_BTD: Tensor = self.w_down(hidden_BTF)
        return out_BTD
