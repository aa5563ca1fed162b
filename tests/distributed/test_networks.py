"""Some cases of benchmarks/torture/networks.py: nodes in network namespaces of this machine, whose network or shared
directory fails.

Needs root, /dev/net/tun and iproute2 (`apt-get install iproute2`).
"""

from __future__ import annotations

import pytest

from benchmarks.torture.networks import CASES, run_on_a_network, run_undisturbed_briefly
from benchmarks.torture.nodes import largest_difference
from benchmarks.torture.virtual_network import why_impossible

IMPOSSIBLE = why_impossible()
pytestmark = pytest.mark.skipif(IMPOSSIBLE is not None, reason=str(IMPOSSIBLE))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The recipe, and the rows of metrics of its run on one process."""
    return run_undisturbed_briefly(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("case", ["unplugged", "read-only-b"])
def test_a_disturbed_run_ends_like_an_undisturbed_one(tmp_path, undisturbed, case):
    recipe, expected = undisturbed
    with run_on_a_network(recipe, tmp_path / "run", node_timeout=10) as run:
        CASES[case](run)
        assert largest_difference(run.rows(), expected) <= 1e-5
