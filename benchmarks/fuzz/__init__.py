"""Fuzzing of everything that is read from a disk or a socket; `python -m benchmarks.fuzz` describes it.

__main__.py   the command: child processes with limits, findings and their counts
corpus.py     the valid files that are mutated
mutator.py    random edits of bytes, text and JSON
targets.py    the readers, and one execution of a reader on a mutation
"""
