"""Text that UTF-8 cannot represent. This module imports nothing of the project."""

from __future__ import annotations


def replace_surrogates(text: str) -> str:
    """Return `text` with every lone surrogate, which JSON can contain, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
