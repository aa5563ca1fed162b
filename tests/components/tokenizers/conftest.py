from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def rank_files(reference: Callable[[str], Path]) -> Path:
    """tiktoken's own rank files."""
    return reference("tokenizers/tiktoken")
