r"""The regular expressions that split text into pieces before byte-pair encoding, which merges within a piece.

Written without possessive quantifiers, so that tiktoken and the `tokenizers` library (Oniguruma, where `{1,3}+` means
something else) read them in the same way; tiktoken runs this form faster than its own, with the same ids.
"""

from __future__ import annotations

from components.errors import InputError

_LOWER, _UPPER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

PATTERNS = {
    # "Language models are unsupervised multitask learners" (Radford et al. 2019): GPT-2, r50k, p50k.
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # GPT-4: at most three digits per piece; punctuation includes the line ends after it; runs of spaces stay whole,
    # so that an indentation is one piece.
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # Llama 3 lists the contractions; it matches the same texts as cl100k.
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # GPT-4o: a word ends where lower case changes to upper; contractions belong to their word; a slash may follow.
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def resolve_pattern(pattern: str) -> str:
    """Return the regular expression of a name, or `pattern` itself if it is one.

    Raises InputError for a single word, probably a misspelled name: as a pattern it would match almost no text.
    """
    if pattern in PATTERNS:
        return PATTERNS[pattern]
    if pattern.isidentifier() or not pattern:
        raise InputError("pattern", f"{pattern!r} is not one of {', '.join(PATTERNS)} or a regular expression")
    return pattern
