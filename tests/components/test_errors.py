"""Errors of bad input keep their key and message wherever they go."""

import pickle
import sys

import pytest

from components.distributed.collectives import raise_on_all_ranks
from components.errors import InputError, MissingFileError, extra_required, message_of

pytestmark = pytest.mark.quick


def test_the_key_is_a_field_and_part_of_the_text():
    error = InputError("stages", "do not increase")
    assert (error.key, error.message, str(error)) == ("stages", "do not increase", "stages: do not increase")
    assert str(InputError("", "too large")) == "too large"


@pytest.mark.parametrize("kind", [InputError, MissingFileError])
def test_it_crosses_processes(kind):
    error = pickle.loads(pickle.dumps(kind("path", "x is not there")))
    assert (type(error), error.key, error.message) == (kind, "path", "x is not there")


def test_an_error_below_a_key_keeps_its_own_key():
    assert str(InputError.below("sources.a", InputError("path", "gone"))) == "sources.a.path: gone"
    assert str(InputError.below("sources.a", OSError("gone: for good"))) == "sources.a: gone: for good"
    assert isinstance(InputError.below("sources.a", MissingFileError("path", "gone")), FileNotFoundError)
    assert message_of(OSError("a: b")) == "a: b"


@pytest.mark.parametrize(
    ("failure", "kind", "key", "message"),
    [
        (InputError("path", "gone"), InputError, "path", "gone (rank 1)"),
        (OSError("disk: full"), InputError, "", "disk: full (rank 1)"),
    ],
)
def test_another_rank_raises_it_with_its_key(failure, kind, key, message):
    sent = []
    with pytest.raises(type(failure)):
        raise_on_all_ranks(failure, lambda text: sent.append(text) or [text])
    with pytest.raises(kind) as raised:
        raise_on_all_ranks(None, lambda text: [text, *sent])
    assert (raised.value.key, raised.value.message) == (key, message)


def test_on_several_nodes_it_names_the_node(monkeypatch):
    monkeypatch.setenv("POWERTRAIN_NODE", "node7")
    sent = []
    with pytest.raises(OSError, match="full"):
        raise_on_all_ranks(OSError("full"), lambda text: sent.append(text) or [text])
    monkeypatch.setenv("POWERTRAIN_NODE", "node0")
    with pytest.raises(InputError, match=r"^full \(rank 1 on node7\)$"):
        raise_on_all_ranks(None, lambda text: ["", *sent])


def test_another_rank_raises_what_is_not_bad_input_as_a_runtime_error():
    sent = []
    with pytest.raises(KeyError):
        raise_on_all_ranks(KeyError("x"), lambda text: sent.append(text) or [text])
    with pytest.raises(RuntimeError, match=r"^KeyError\('x'\) \(rank 1\)$"):
        raise_on_all_ranks(None, lambda text: [text, *sent])


def test_a_missing_library_is_an_error_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with (
        pytest.raises(ValueError, match=r"a\.zst needs the `zstandard` library: pip install -e '\.\[data\]'"),
        extra_required("a.zst", "zstandard", "data"),
    ):
        import zstandard  # noqa: F401
