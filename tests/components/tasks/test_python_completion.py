"""Questions made from the standard library."""

from __future__ import annotations

from collections import Counter

import pytest

from components.python_library import library_files
from components.tasks import PythonCompletion, check_questions
from components.tasks.python_completion import _make_questions

pytestmark = pytest.mark.quick


@pytest.mark.slow
def test_they_are_the_same_each_time_and_of_every_kind():
    questions = check_questions(PythonCompletion(rows=60).questions())
    _make_questions.cache_clear()
    assert questions == list(PythonCompletion(rows=60).questions())
    assert Counter(question.source.split()[0] for question in questions) == {"call": 20, "name": 20, "import": 20}
    assert {question.source.split()[2] for question in questions} <= library_files("test").keys()
    assert Counter(question.answer for question in questions).keys() == {0, 1, 2, 3}


def test_the_right_choice_is_what_the_file_says():
    files = {name: path.read_text(encoding="utf-8", errors="replace") for name, path in library_files("test").items()}
    for question in PythonCompletion(rows=60, context_chars=100).questions():
        text = files[question.source.split()[2]]
        assert len({request.choice for request in question.requests}) == 4
        right = question.requests[question.answer]
        assert right.context + right.continuation in text
        assert len(right.context) <= 100
        assert right.choice.endswith("(") == question.source.startswith("call")


def test_other_kinds_take_the_place_of_one_with_too_few_rows():
    questions = PythonCompletion(rows=900).questions()
    kinds = Counter(question.source.split()[0] for question in questions)
    assert kinds["import"] < 300 < kinds["call"] <= kinds["name"]
    assert len(questions) == 900
