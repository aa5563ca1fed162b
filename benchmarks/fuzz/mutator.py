"""The mutator of the fuzzer: random edits of bytes, of numbers and lines of text, and of JSON values."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from random import Random
from typing import Any

_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_STRING = re.compile(rb'"[^"\\\n]{0,60}"')
_INTEGERS = [0, 1, -1, 2, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1]
_NUMBERS = [str(number) for number in _INTEGERS]
_NUMBERS += ["-7", "0.5", "1e-320", "1e308", "1e999", "-1e999", "nan", "NaN", "Infinity", str(2**64), "9" * 400]
_NUMBERS += ["9" * 5000, "0x10", "1_000", "", "true", "null", '"7"', "[]", "{}"]
_TEXTS = ["", " ", "x", "none", "true", "0", "..", "../x", "a/b", "\0", "\n", "é", "\ud800", "\U0001f600", "a" * 300]
_TEXTS += ["components.data:TextFiles", "os:system", "<|endoftext|>", "1e9", "*" * 9, "%s", "~nobody/x", "b" * 5000]
_TOKENS = [b"\0", b"\n", b"\r\n", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"=", b"#", b"\xff\xfe", b"PAR1"]
_TOKENS += [b"[" * 3000, b'{"a":' * 3000, b"\xed\xa0\x80", b"\xf0\x9f", b"\xef\xbb\xbf", b"\x28\xb5\x2f\xfd"]
_LENGTHS = [1, 1, 2, 4, 8, 64, 10**6]
Edit = Callable[[bytes, Random], bytes]


def mutate(content: bytes, random: Random) -> bytes:
    """Return `content` after one to four random edits."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        content = random.choice(_EDITS)(content, random)
    return content


def _flip_bit(content: bytes, random: Random) -> bytes:
    if not content:
        return bytes([random.randrange(256)])
    changed = bytearray(content)
    changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _overwrite_integer(content: bytes, random: Random) -> bytes:
    """Write a number with an extreme value over 1 to 8 bytes, in either byte order."""
    width, order = random.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q"))), random.choice("<>")
    value = struct.pack(f"{order}{width[1]}", random.choice(_INTEGERS) % 256 ** width[0])
    at = random.randrange(len(content) + 1)
    return content[:at] + value + content[at + len(value) :]


def _insert_bytes(content: bytes, random: Random) -> bytes:
    added = random.choice([random.choice(_TOKENS), random.randbytes(random.randint(1, 9))])
    at = random.randrange(len(content) + 1)
    return content[:at] + added + content[at:]


def _remove_bytes(content: bytes, random: Random) -> bytes:
    at = random.randrange(len(content) + 1)
    return content[:at] + content[at + random.choice(_LENGTHS) :]


def _copy_bytes(content: bytes, random: Random) -> bytes:
    """Copy a piece of the content to another place in it."""
    start, at = random.randrange(len(content) + 1), random.randrange(len(content) + 1)
    return content[:at] + content[start : start + min(random.choice(_LENGTHS), 4096)] + content[at:]


def _change_lines(content: bytes, random: Random) -> bytes:
    """Remove, repeat or swap lines."""
    lines = content.splitlines(keepends=True)
    if len(lines) < 2:
        return _copy_bytes(content, random)
    one, other = random.randrange(len(lines)), random.randrange(len(lines))
    lines[one : one + 1] = random.choice(([], [lines[one]] * 2, [lines[other]], [lines[one], lines[other]]))
    return b"".join(lines)


def _replace_match(pattern: re.Pattern[bytes], replacements: list[bytes]) -> Edit:
    def replace(content: bytes, random: Random) -> bytes:
        found = list(pattern.finditer(content[:100_000]))
        if not found:
            return _flip_bit(content, random)
        match = random.choice(found)
        return content[: match.start()] + random.choice(replacements) + content[match.end() :]

    return replace


def _change_json(content: bytes, random: Random) -> bytes:
    """Change one value of a JSON document, or of one line of a file of JSON lines."""
    lines = content.splitlines(keepends=True)
    number = random.randrange(len(lines)) if lines else 0
    for start, end in ((0, len(lines)), (number, number + 1)):
        try:
            document = json.loads(b"".join(lines[start:end]))
        except (ValueError, RecursionError):
            continue
        if isinstance(document, (dict, list)):
            changed = json.dumps(_change_value(document, random)).encode()
            return b"".join([*lines[:start], changed, b"\n", *lines[end:]])
    return random.choice((_flip_bit, _insert_bytes))(content, random)


def _change_value(document: Any, random: Random) -> Any:
    """Replace, remove, rename or copy one value of `document`, which is changed in place."""
    places = list(_places(document))
    if not places:
        return random.choice(_VALUES)
    container, key = random.choice(places)
    match random.randrange(6):
        case 0:
            del container[key]
        case 1:
            other, other_key = random.choice(places)
            container[key] = json.loads(json.dumps(other[other_key]))
        case 2 if isinstance(container, dict):
            container[random.choice(_TEXTS)] = container.pop(key)
        case _:
            container[key] = random.choice(_VALUES)
    return document


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value below `document`."""
    found, waiting = [], [document]
    while waiting:
        container = waiting.pop()
        for key in list(container) if isinstance(container, dict) else range(len(container)):
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                waiting.append(container[key])
    return found


_VALUES: list[Any] = [
    None,
    True,
    False,
    *_INTEGERS,
    2**64,
    10**400,
    -7,
    0.5,
    1e308,
    float("inf"),
    float("nan"),
    *_TEXTS,
]
_VALUES += [[], {}, [[]], [None], {"a": 1}, [1, 2], ["x"], {"": {}}]
_EDITS: list[Edit] = [
    _flip_bit,
    _overwrite_integer,
    _insert_bytes,
    _remove_bytes,
    _copy_bytes,
    _change_lines,
    _replace_match(_NUMBER, [number.encode() for number in _NUMBERS]),
    _replace_match(_STRING, [json.dumps(text).encode() for text in _TEXTS]),
    _change_json,
    _change_json,
]
