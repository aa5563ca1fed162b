"""[tasks.NAME]: multiple choice and cloze by log probability, during training and of a trained model.

question.py           what a task asks, and its metrics
rows.py               reads rows from a JSONL file
row_tasks.py          MultipleChoice and Cloze: such rows, with few-shot examples
python_completion.py  PythonCompletion: questions made from the Python standard library
encoding.py           token ids of context and continuation
scorer.py             log probabilities under a model, on any layout
"""

from components.tasks.encoding import EncodedRequest, encode_questions
from components.tasks.python_completion import PythonCompletion
from components.tasks.question import Answer, Question, Request, accuracy_metrics, check_questions
from components.tasks.row_tasks import Cloze, MultipleChoice
from components.tasks.scorer import Scorer

__all__ = [
    "Answer",
    "Cloze",
    "EncodedRequest",
    "MultipleChoice",
    "PythonCompletion",
    "Question",
    "Request",
    "Scorer",
    "accuracy_metrics",
    "check_questions",
    "encode_questions",
]
