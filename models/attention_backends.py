"""The attention backend of each layer, for a micro-batch of whole sequences.

B batch, T sequence
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.attention import AttentionBackend
from models.context_parallel import SequenceShards, context_parallel_attention
from models.document_attention import PerDocumentAttention
from models.flex_attention import FlexAttention, has_flex_attention, sequence_attention
from models.presets import LlamaShape


def attention_backends(
    shape: LlamaShape, starts_BT: Tensor | None, length: int, device: torch.device, shards: SequenceShards | None
) -> list[AttentionBackend | None]:
    """Return the backend of each layer, None for one whole sequence without softcap and window: PyTorch's own causal
    kernel is the fastest there.

    `starts_BT` is true where a document starts, as in `document_positions`; None: each sequence is one document.
    `shards` are the context-parallel ranks.
    """
    windows = [shape.window_of(layer) for layer in range(shape.layers)]
    distinct, flex = frozenset(windows), has_flex_attention(device, shape.head_width)
    # cumsum: the number of each token's document within its row
    documents_BT = None if starts_BT is None else starts_BT.cumsum(-1)
    if shards is not None:
        return [context_parallel_attention(shards, documents_BT, length, device, distinct, flex=flex)] * shape.layers
    if documents_BT is not None:
        if flex:
            return [FlexAttention(documents_BT, length, device, distinct)] * shape.layers
        return [PerDocumentAttention(documents_BT)] * shape.layers
    plain = [not shape.attention_softcap and not 0 < window < length for window in windows]
    if all(plain) or not flex:
        return [None] * shape.layers
    whole = sequence_attention(length, device, distinct)
    return [None if is_plain else whole for is_plain in plain]
