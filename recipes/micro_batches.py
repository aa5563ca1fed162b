"""What the data gives, held against what the model takes: a component of one's own may give anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from components.data.loader import MicroBatch
from recipes.errors import blame

if TYPE_CHECKING:
    from recipes.pretrain import TrainingRun


def checked(run: TrainingRun, micro_batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """The same micro-batches. Raises ConfigError at [data] for what cannot be read, and for ids that are none.

    They are on the CPU still, where looking costs little; on a GPU such an id ends the process without a word.
    """
    with blame(run.config, "data", started=True):
        for micro_batch in micro_batches:
            length = micro_batch.tokens.shape[-1]
            if length != run.sequence_length:
                raise ValueError(
                    f"the dataset gives {length + 1} token ids a sample; a sequence_length of {run.sequence_length} "
                    f"takes {run.sequence_length + 1}"
                )
            for part in (micro_batch.tokens, micro_batch.labels):
                if part.is_floating_point():
                    raise ValueError(f"the dataset gives {part.dtype}, not token ids")
                low, high = (int(bound) for bound in part.aminmax())
                if low < 0 or high >= run.vocab_size:
                    ids = micro_batch.sample_ids
                    raise ValueError(
                        f"samples {int(ids[0])} to {int(ids[-1])} hold the token id {low if low < 0 else high}, which "
                        f"is outside the vocabulary of {run.vocab_size}"
                    )
            yield micro_batch
