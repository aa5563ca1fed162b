r"""The regular expressions that cut text into pieces before byte-pair encoding merges inside each piece.

Written without possessive quantifiers, so that tiktoken and the `tokenizers` library (Oniguruma, where `{1,3}+` means
something else) read them alike; tiktoken runs this form faster than its own, and gives the same ids.
"""

from __future__ import annotations

from components.errors import InputError

_LOWER, _UPPER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

PATTERNS = {
    # "Language models are unsupervised multitask learners" (Radford et al. 2019): GPT-2, r50k, p50k.
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # GPT-4: at most three digits a piece; punctuation takes the line ends after it; runs of spaces stay whole,
    # which keeps an indentation in one piece.
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # Llama 3 writes the contractions out; the language is that of cl100k.
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # GPT-4o: a word ends where lower case turns to upper, contractions stay with their word, and a slash may follow.
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def resolve_pattern(pattern: str) -> str:
    """The regular expression behind a name, or `pattern` itself when it is one already.

    Raises ValueError for what looks like a misspelt name: a lone word would match almost nothing of any text.
    """
    if pattern in PATTERNS:
        return PATTERNS[pattern]
    if pattern.isidentifier() or not pattern:
        raise InputError("pattern", f"{pattern!r} is none of {', '.join(PATTERNS)}, and no regular expression for text")
    return pattern
