from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"


@pytest.fixture
def rank_files() -> Path:
    """tiktoken's own rank files."""
    folder = SHARED / "tokenizers" / "tiktoken"
    if not folder.is_dir():
        pytest.skip(f"needs the reference rank files in {folder}")
    return folder
