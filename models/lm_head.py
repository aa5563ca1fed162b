"""The output projection, and the loss that is computed inside it.

B batch, T sequence, D model width, V vocabulary
"""

from __future__ import annotations

from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from models.loss import VocabReduce, chunked_cross_entropy
from models.z_loss import ZLoss


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

    def __init__(
        self, dim: int, vocab_size: int, *, tied: bool, softcap: float = 0.0, z_loss: ZLoss | None = None
    ) -> None:
        """The loss is that of logits bounded by `softcap`; those that are returned are not bounded yet."""
        super().__init__(dim, vocab_size, bias=False)
        self.softcap, self.z_loss = softcap, z_loss
        if tied:
            self.register_parameter("weight", None)
        self.vocab_shard: VocabularyShard | None = None
        self._compiled_loss = False
        self.chunk_tokens: int | None = None
        """Tokens per chunk of the loss; None: `default_chunk`."""

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
            chunk_tokens=self.chunk_tokens,
            vocab_start=vocab_start,
            vocab_reduce=self.vocab_shard,
            compiled=self._compiled_loss,
            softcap=self.softcap,
            z_loss=self.z_loss if self.training else None,
        )
