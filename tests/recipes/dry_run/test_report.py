"""The report of a dry run."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.quick


def test_errors_come_together_and_end_with_status_2(tiny, capsys, monkeypatch):
    monkeypatch.setenv("NPROC", "4")
    assert tiny.launch("--dry-run", "--parallel.dp_shard=3", "--training.sequence_length=4000") == 2
    printed = capsys.readouterr().out
    assert "is not the 4 processes of this run" in printed
    assert "max_sequence_length" in printed


def test_problems_come_last_with_their_place(tiny, capsys):
    assert tiny.launch("--dry-run=H100@45%", "--batch.initial_size=9") == 0
    printed = capsys.readouterr().out
    assert "at 45% MFU" in printed
    assert "9 samples become 10" in printed.split("\nproblems\n")[1]
    assert f"{tiny.recipe.name}:" in printed.split("\nproblems\n")[1]
    assert not tiny.directory.exists()
