from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture
def tiny_random_llama() -> Path:
    """A checkpoint in the format of transformers 4.20: pickled, frequencies stored, no num_key_value_heads."""
    folder = SHARED / "checkpoints" / "tiny-random-llama"
    if not folder.is_dir():
        pytest.skip(f"needs the reference checkpoint in {folder}")
    return folder
