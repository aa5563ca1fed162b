"""Streamed text consists of whole characters, and joined it equals the decoded ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.tokenizers import Bytes, TiktokenFile
from components.tokenizers.detokenizer import IncrementalDetokenizer

pytestmark = pytest.mark.quick

RANKS = Path(__file__).resolve().parents[3] / "assets" / "tokenizers" / "stdlib-4096.tiktoken"
ENCODERS = {"bytes": Bytes().build(), "ranks": TiktokenFile(path=RANKS, pattern="cl100k").build()}
encoders = pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)


def pieces(encoder, ids, before=()) -> list[str]:
    stream = IncrementalDetokenizer(encoder.decode, before)
    return [*(stream.add(id) for id in ids), stream.finish()]


@encoders
@pytest.mark.parametrize("text", ["plain text, ok\n", "Ça 鯨 🐋🏽 — ½", "🐋" * 20, "\ufffd replaced \ufffd", ""])
def test_whole_characters_and_nothing_lost(encoder, text):
    ids = encoder.encode_batch([text])[0].tolist()
    found = pieces(encoder, ids)
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(found)


def test_a_character_comes_with_its_last_byte():
    assert pieces(ENCODERS["bytes"], "a🐋b".encode()) == ["a", "", "", "", "🐋", "b", ""]


def byte_fallback(ids):
    """Decodes as SentencePiece in `tokenizers`: each byte of a run that is not valid text becomes U+FFFD."""
    try:
        return bytes(ids).decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(ids)


@pytest.mark.parametrize("before", ["", "so ", "🐋"])
def test_a_decoder_that_breaks_every_byte_of_an_unfinished_run(before):
    stream = IncrementalDetokenizer(byte_fallback, before.encode())
    found = [stream.add(id) for id in "🐋鯨aé🐋".encode()]
    assert found == ["", "", "", "🐋", "", "", "鯨", "a", "", "é", "", "", "", "🐋"]
    assert stream.finish() == ""


@pytest.mark.parametrize(
    "data", [b"\xf0\x9f", b"\x80\x80\x80", b"a\xf0\x9fb", b"\xe9\xe9\xa8", b"\xff\xf0\x9f\x90\x8b\xc3"]
)
def test_broken_bytes_are_shown_as_such_once(data):
    found = pieces(ENCODERS["bytes"], data)
    assert "".join(found) == data.decode(errors="replace")


def test_the_text_before_is_not_repeated():
    encoder = ENCODERS["bytes"]
    assert "".join(pieces(encoder, b"lo", before=b"hel")) == "lo"
    assert "".join(pieces(encoder, "🐋".encode()[2:], before="🐋".encode()[:2])) != ""


def test_a_tokenizer_that_drops_the_space_of_a_first_token_does_not_drop_it_here():
    def decode(ids):
        return "".join(f" {id}" for id in ids)[1:]

    stream = IncrementalDetokenizer(decode, [1, 2])
    assert [stream.add(3), stream.add(4), stream.finish()] == [" 3", " 4", ""]


def test_an_id_without_a_token_is_a_replacement_character():
    def decode(ids):
        if 9 in ids:
            raise ValueError("a hole")
        return bytes(ids).decode()

    stream = IncrementalDetokenizer(decode)
    assert "".join([stream.add(65), stream.add(9), stream.add(66), stream.finish()]) == "A\ufffdB"
