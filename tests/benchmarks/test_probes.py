"""The table of the cost of probes."""

from __future__ import annotations

import pytest

from benchmarks.probes import CASES, PROBES, report
from components import probes

pytestmark = pytest.mark.quick


def test_the_time_of_probes_is_compared_with_the_rest_of_their_step():
    rows = [
        {"step_seconds": 1.2, "probe_seconds": 0.2},
        {"step_seconds": 1.0},
        {"step_seconds": 2.2, "probe_seconds": 0.2},
    ]
    line = report("Norms", rows, 110.0, 100.0)
    assert line == "| Norms | 1 (1 to 1) | 0.2 (0.2 to 0.2) | 15.0% (10.0% to 20.0%) | 0.15% | +10 |"
    assert report("none", rows[1:2], 100.0, 100.0) == "| none | 1 (1 to 1) | | | | |"


def test_every_probe_is_measured():
    assert {*PROBES} == {*probes.__all__} - {"ProbedStep"}
    assert CASES["all four"] == PROBES
