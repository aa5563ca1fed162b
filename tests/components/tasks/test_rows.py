"""Rows of tasks: both formats, few-shot examples, and one clear message for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.errors import InputError, MissingFileError
from components.tasks import Cloze, MultipleChoice, Question, Request, check_questions
from components.tasks.row_tasks import EXAMPLE_SEPARATOR

pytestmark = pytest.mark.quick

ROWS = [
    {"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1},
    {"query": "The sky is", "choices": ["blue", "green", "a fish"], "gold": 0},
    {"context": "A whale is a", "choices": ["fish", "mammal"], "answer": "mammal"},
    {"context": "", "choices": ["yes", "no"], "answer": 0},
]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def test_rows_become_questions(file):
    questions = MultipleChoice(path=file).questions()
    assert [len(question.requests) for question in questions] == [2, 3, 2, 2]
    assert [question.answer for question in questions] == [1, 0, 1, 0]
    assert questions[1].requests[2] == Request("The sky is", "a fish", " ")
    assert questions[1].requests[2].continuation == " a fish"
    assert questions[1].source == f"{file}:3"


def test_a_cloze_row_has_one_request(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"context": "Call me", "answer": "Ishmael"}])
    assert Cloze(path=file, target_delimiter="_").questions()[0].requests == [Request("Call me", "Ishmael", "_")]


def exported(*, doc: int, pairs: list, target: str, filter: str = "none") -> dict:
    arguments = {f"gen_args_{i}": {"arg_0": a, "arg_1": b} for i, (a, b) in enumerate(pairs)}
    return {"doc_id": doc, "doc": {"any": 1}, "target": target, "arguments": arguments, "filter": filter}


def test_samples_of_lm_evaluation_harness_are_read(tmp_path):
    sky = [("The sky is", " blue"), ("The sky is", " green")]
    rows = [
        exported(doc=0, pairs=sky, target="1"),
        exported(doc=1, pairs=sky, target="blue"),
        exported(doc=0, pairs=sky, target="1", filter="again"),
        {**exported(doc=2, pairs=[], target="0"), "arguments": [["x", "y"], ["x", " z"]]},  # of an older version
    ]
    file = write(tmp_path / "samples_sky.jsonl", rows)
    questions = MultipleChoice(path=file).questions()
    assert [question.answer for question in questions] == [1, 0, 0]
    assert questions[0].requests == [Request("The sky is", "blue", " "), Request("The sky is", "green", " ")]
    assert questions[2].requests == [Request("x", "y", ""), Request("x", "z", " ")]
    with pytest.raises(InputError, match="contain their examples already"):
        MultipleChoice(path=file, num_fewshot=1).questions()
    file = write(tmp_path / "samples_cloze.jsonl", [exported(doc=0, pairs=[("Call me", " Ishmael")], target="7")])
    assert Cloze(path=file).questions()[0].requests == [Request("Call me", "Ishmael", " ")]


BAD = {
    "not JSON": ("{", "rows.jsonl:1: not JSON"),
    "an array": ("[1]", "rows.jsonl:1: expected a JSON object, found b'[1]"),
    "not UTF-8": (b'{"context": "\xff"}', "rows.jsonl:1: not JSON"),
    "nested too deeply": ("[" * 100_000, "rows.jsonl:1: not JSON"),
    "no context": ('{"choices": ["a", "b"], "answer": 0}', "rows.jsonl:1: it has no key `context`; its keys: choices"),
    "a context that is a number": ('{"context": 1, "choices": ["a", "b"], "answer": 0}', "expected text in `context`"),
    "no choices": ('{"context": "x", "answer": 0}', "expected `choices`, a list of texts, found null"),
    "one choice": ('{"context": "x", "choices": ["a"], "answer": 0}', "only one choice; use components.tasks:Cloze"),
    "an empty choice": ('{"context": "x", "choices": ["a", ""], "answer": 0}', "`choices` has an empty text"),
    "no answer": ('{"context": "x", "choices": ["a", "b"]}', "it has no key `answer`"),
    "an answer beyond": ('{"context": "x", "choices": ["a", "b"], "answer": 2}', "`answer` is 2; expected one of its"),
    "another answer": ('{"context": "x", "choices": ["a", "b"], "answer": "c"}', 'an index from 0 to 1'),
    "a negative answer": ('{"context": "x", "choices": ["a", "b"], "answer": -1}', "`answer` is -1"),
    "a boolean": ('{"context": "x", "choices": ["a", "b"], "answer": true}', "`answer` is true"),
    "arguments of generation": ('{"arguments": {"gen_args_0": {"arg_0": "x", "arg_1": {}}}}', "are not those of"),
    "a target of too many digits": (
        json.dumps(exported(doc=0, pairs=[("x", " a"), ("x", " b")], target="9" * 5000)),
        "rows.jsonl:1: Exceeds the limit",
    ),
    "nothing": ("\n", "rows.jsonl has no rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named(tmp_path, name):
    text, message = BAD[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as raised:
        MultipleChoice(path=file).questions()
    assert message in str(raised.value) and raised.value.key == "path"


def test_other_mistakes_are_named(file, tmp_path):
    with pytest.raises(MissingFileError, match="nowhere does not exist"):
        MultipleChoice(path=tmp_path / "nowhere").questions()
    with pytest.raises(InputError, match=r"it has choices; use .*:MultipleChoice"):
        Cloze(path=file).questions()
    with pytest.raises(InputError, match="4 is more than the 3 other rows"):
        MultipleChoice(path=file, num_fewshot=4).questions()
    with pytest.raises(MissingFileError, match="fewshot_path: "):
        MultipleChoice(path=file, num_fewshot=1, fewshot_path=tmp_path / "nowhere").questions()
    for questions, message in (
        ([], "it has no questions"),
        ([("a", "b")], "question 1: tuple is not a components.tasks:Question"),
        ([Question([Request("a", "b")], answer=1)], "question 1: answer = 1, but it has 1 requests"),
        ([Question([Request("a", "")])], "question 1: it has an empty choice"),
    ):
        with pytest.raises(InputError, match=message):
            check_questions(questions)


def test_few_shot_examples_are_fixed_by_the_seed_and_the_row(file, tmp_path):
    def contexts(path: Path, seed: int) -> dict[str, str]:
        """Return the context with examples of each row."""
        questions = MultipleChoice(path=path, num_fewshot=2, fewshot_seed=seed).questions()
        return {question.requests[question.answer].choice: question.requests[0].context for question in questions}

    solved = ["2 + 2 = 4", "The sky is blue", "A whale is a mammal", " yes"]
    first = contexts(file, 0)
    for answer, context in first.items():
        *examples, own = context.split(EXAMPLE_SEPARATOR)
        assert len(set(examples)) == 2 and set(examples) <= set(solved)
        assert f"{own} {answer}" in solved and f"{own} {answer}" not in examples
    assert contexts(write(tmp_path / "reversed.jsonl", ROWS[::-1]), 0) == first
    assert any(contexts(file, seed) != first for seed in range(1, 4))


def test_max_rows_are_spread_over_the_file(file):
    questions = MultipleChoice(path=file, max_rows=2).questions()
    assert [question.requests[0].context for question in questions] == ["2 + 2 =", "A whale is a"]
    assert len(MultipleChoice(path=file, max_rows=9).questions()) == 4
