import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from components.units import Count, PositiveCount, format_count, parse_count

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("text", "count"),
    [("20M", 20_000_000), ("4b", 4 * 10**9), ("1.5K", 1500), ("20_000", 20_000), (" 7 ", 7), ("0.1M", 100_000)],
)
def test_counts_with_suffixes_and_separators(text, count):
    assert TypeAdapter(Count).validate_python(text) == count


@pytest.mark.parametrize("text", ["", "M", "twenty", "-3", "1.2345K", "1e6", "20MB", "0x10"])
def test_text_that_is_not_a_count_is_refused(text):
    with pytest.raises(ValueError, match=r"whole number|a count such as"):
        parse_count(text)


@given(st.integers(0, 10**18))
def test_integers_pass_unchanged(count):
    assert parse_count(count) == count == parse_count(str(count))


def test_positive_means_positive():
    with pytest.raises(ValidationError):
        TypeAdapter(PositiveCount).validate_python(0)


def test_short_form():
    assert [format_count(n) for n in (5, 1234, 12_345_678, 4e9)] == ["5", "1.234K", "12.35M", "4B"]
