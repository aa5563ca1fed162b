from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def tiny_random_llama(reference: Callable[[str], Path]) -> Path:
    """A checkpoint in the format of transformers 4.20: pickled, frequencies stored, no num_key_value_heads."""
    return reference("checkpoints/tiny-random-llama")
