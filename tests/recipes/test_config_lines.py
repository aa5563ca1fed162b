"""The line of every key, in every form that TOML allows."""

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from recipes.config.toml import KeyPath, join_key, line_index, quote_key, split_key, write_value

pytestmark = pytest.mark.quick

CASES: list[tuple[str, dict[KeyPath, int]]] = [
    ("a = 1\n\n# c = 2\nb = 2 # d = 3", {("a",): 1, ("b",): 4}),
    ("[a]\nb = 1\n[c.d]\ne = 1", {("a",): 1, ("a", "b"): 2, ("c",): 3, ("c", "d"): 3, ("c", "d", "e"): 4}),
    ("[a.b]\n[a]\nc = 1", {("a",): 2, ("a", "b"): 1, ("a", "c"): 3}),
    ("a.b.c = 1\na.d = 2", {("a",): 1, ("a", "b"): 1, ("a", "b", "c"): 1, ("a", "d"): 2}),
    ("'a.b' = 1\n\"c = d\" . e = 2", {("a.b",): 1, ("c = d", "e"): 2}),
    ('[ \'a\' . "b\\"]" ]\nc = 1', {("a", 'b"]', "c"): 2}),
    (
        "[[a]]\nb = 1\n[[a]]\nb = 2\n[a.c]\nd = 3",
        {("a",): 1, ("a", 0, "b"): 2, ("a", 1, "b"): 4, ("a", 1, "c", "d"): 6},
    ),
    (
        "[[a]]\n[[a.b]]\nc = 1\n[[a.b]]\nc = 2\n[[a]]\n[[a.b]]\nc = 3",
        {("a", 0, "b", 1, "c"): 5, ("a", 1, "b", 0, "c"): 8},
    ),
    ('a = """\nb = 1\n""""\nc = 2', {("a",): 1, ("c",): 4}),
    ("a = '''\nb = 1'''''\nc = 2", {("a",): 1, ("c",): 3}),
    ('a = "\\"#"\nb = "\\\\" # "\nc = \'\\\'\nd = 1', {("b",): 2, ("c",): 3, ("d",): 4}),
    ('a = [\n  1, # ]\n  "]",\n]\nb = 1', {("a", 1): 3, ("b",): 5}),
    ("a = [\n  { b = 1, c = [2] },\n  { b = 2 }\n]", {("a", 0, "b"): 2, ("a", 0, "c"): 2, ("a", 1, "b"): 3}),
    ("a = { b = { c.d = 1 }, e = {} }\nf = 1979-05-27 07:32:00\ng=1", {("a", "b", "c", "d"): 1, ("f",): 2, ("g",): 3}),
    ("", {(): 1}),
]


@pytest.mark.parametrize("text, expected", CASES)
def test_keys_are_found_on_their_lines(text: str, expected: dict[KeyPath, int]) -> None:
    tomli.loads(text)
    found = line_index(text)
    assert {path: found[path] for path in expected} == expected


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
leaves = st.one_of(st.integers(), st.booleans(), texts, st.floats(allow_nan=False), st.lists(st.integers(), max_size=3))
tables = st.recursive(
    st.dictionaries(texts, leaves, max_size=4),
    lambda inner: st.dictionaries(texts, st.one_of(leaves, inner, st.lists(inner, max_size=3)), max_size=4),
    max_leaves=12,
)


@given(tables)
def test_every_key_of_any_document_has_a_line(document: dict) -> None:
    text = "\n\n".join(f"{quote_key(key)} = {write_value(value)}" for key, value in document.items())
    assert tomli.loads(text) == document
    found = line_index(text)
    for number, (key, value) in enumerate(document.items()):
        assert {found[path] for path in _paths(value, (key,))} == {2 * number + 1}


def _paths(value: object, path: KeyPath) -> list[KeyPath]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(below for key, item in items for below in _paths(item, (*path, key)))]


@given(st.lists(texts, min_size=1, max_size=4))
def test_a_joined_key_splits_into_its_parts(keys: list[str]) -> None:
    assert split_key(join_key(keys)) == tuple(keys)


@pytest.mark.parametrize("text", ["", "a..b", "a.", "a b", "a = 1\nb", '"a', "a=b"])
def test_text_that_is_not_a_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        split_key(text)
