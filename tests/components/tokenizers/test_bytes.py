import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.tokenizers import Bytes

pytestmark = pytest.mark.quick


@given(st.text())
def test_ids_are_the_bytes(text):
    (ids,) = Bytes().build().encode_batch([text])
    assert ids.tolist() == list(text.encode())
    assert Bytes().build().decode(ids) == text


def test_the_end_of_a_document_is_not_a_byte():
    encoder = Bytes().build()
    assert encoder.vocab_size == 257
    assert encoder.end_of_document == 256
    assert encoder.byte_lengths.tolist() == [1] * 256 + [0]
    assert encoder.byte_lengths.dtype == np.int64
    assert encoder.decode([104, 105, 256]) == "hi<|endoftext|>"


def test_invalid_text_is_replaced_and_invalid_ids_are_refused():
    encoder = Bytes().build()
    assert encoder.decode([0xFF]) == "\ufffd"
    assert encoder.decode(encoder.encode_batch(["a\ud800b"])[0]) == "a\ufffdb"
    with pytest.raises(ValueError, match="257"):
        encoder.decode([257])


def test_survives_pickling():
    assert pickle.loads(pickle.dumps(Bytes().build())).fingerprint == Bytes().build().fingerprint
