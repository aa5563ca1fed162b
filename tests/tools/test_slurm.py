"""The SLURM script, with a cluster faked by two shell scripts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "slurm.sbatch"

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "$1" >> srun.log; shift; done
worst=0
for node in 0 1; do
  SLURM_NODEID=$node "$@"
  status=$?
  [ $status -gt $worst ] && worst=$status
done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
  show) printf 'node07\\nnode08\\n' ;;
  requeue) echo "$2" >> requeued ;;
esac
"""
RUN_TRAIN = """#!/usr/bin/env bash
if [[ "${*: -1}" == --print-config ]]; then exit "${CHECK_STATUS:-0}"; fi
echo "$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT as $POWERTRAIN_LAUNCH: $(printf '[%s]' "$@")" >> runs.log
exit "${RUN_STATUS:-0}"
"""


def submit(folder: Path, *arguments: str, **environment: str) -> int:
    programs = folder / "bin"
    programs.mkdir()
    fakes = {programs / "srun": SRUN, programs / "scontrol": SCONTROL, folder / "run_train.sh": RUN_TRAIN}
    for path, text in fakes.items():
        path.write_text(text)
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": "40123", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[07-08]"}
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(folder), **job, **environment},
        cwd="/",
    ).returncode


def test_its_syntax_is_valid():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0


def test_every_node_starts_with_what_it_needs_to_find_the_others(tmp_path):
    assert submit(tmp_path, "my.toml", "--run.name=a b") == 0
    assert (tmp_path / "runs.log").read_text().splitlines() == [
        f"{node} of 2 at node07:20123 as slurm-40123: [my.toml][--run.name=a b]" for node in (0, 1)
    ]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("status", "requeued"), [(143, True), (130, False), (1, False), (2, False)])
def test_only_a_run_that_was_stopped_by_a_limit_is_queued_again(tmp_path, status, requeued):
    """130 is the status of a stop file, after which the run must stay stopped."""
    assert submit(tmp_path, RUN_STATUS=str(status)) == status
    assert (tmp_path / "requeued").exists() == requeued


def test_an_invalid_recipe_reaches_no_node(tmp_path):
    assert submit(tmp_path, CHECK_STATUS="2") == 2
    assert not (tmp_path / "runs.log").exists()
