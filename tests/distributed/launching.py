"""Runs of several processes for the tests of this folder: started as by a user, with failures on request."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import TinyRun
from tests.processes import start_process

ROOT = Path(__file__).resolve().parents[2]

SABOTAGE = '''
"""A Llama that fails in one forward pass: SABOTAGE_<restart> = "kill:1:10" or "raise:1:10", the 10th of rank 1.

A kill waits for the file or directory KILL_AFTER in the memory of the node, if that is set.
PACE=0.1 makes every pass take that many seconds longer, with PACED_WHILE as long as that file exists.
"""

import os
import signal
import time

from models.llama import Llama


class Sabotaged(Llama):
    def build(self, **sizes):
        model = super().build(**sizes)
        forward, passes = model.forward, [0]
        order = os.environ.get(f"SABOTAGE_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", "::")
        what, rank, when = order.split(":")

        def sabotaged(*args, **kwargs):
            passes[0] += model.training
            if os.path.exists(os.environ.get("PACED_WHILE", "/")):
                time.sleep(float(os.environ.get("PACE", "0")))
            if os.environ.get("RANK") == rank and passes[0] == int(when):
                if what == "kill":
                    if awaited := os.environ.get("KILL_AFTER"):
                        while not os.path.exists(os.path.join(os.environ["POWERTRAIN_HOST_MEMORY"], awaited)):
                            time.sleep(0.01)
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ArithmeticError("sabotage")
            return forward(*args, **kwargs)

        model.forward = sabotaged
        return model
'''

SABOTAGED = ["--model.use=sabotage:Sabotaged", "--model.size=debug", "--model.dim=16", "--model.layers=2"]
SABOTAGED += ["--model.heads=2", "--model.kv_heads=1", "--model.head_dim=8", "--model.ffn_dim=32"]
SHORT = ["--batch.use=components.batch:Constant", "--batch.initial_size=8", "--training.total_tokens=1500"]
SHORT += ["--validation.interval_steps=none", "--training.grad_sync=once_per_step"]
"""Eight steps of eight samples: two micro-batches of two on each of two processes."""


def start(
    tiny: TinyRun,
    *arguments: str,
    sabotage: dict[int, str] | None = None,
    prefix: Sequence[str] = (),
    **environment: str,
):
    """Start a launcher in another process; `sabotage` by restart count, environment such as NPROC="2".

    `prefix` is a command that runs another one.
    """
    (tiny.folder / "sabotage.py").write_text(SABOTAGE)
    orders = {f"SABOTAGE_{restart}": order for restart, order in (sabotage or {}).items()}
    return start_process(
        [*prefix, sys.executable, ROOT / "recipes", str(tiny.recipe), *SHORT, *SABOTAGED, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **orders, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit status and all output; print it if pytest ends the wait."""
    said: list[str] = []
    try:
        for line in process.stdout:
            said.append(line)
        return process.wait(), "".join(said)
    except BaseException:
        process.kill()
        print("".join(said))
        raise


def steps(tiny: TinyRun) -> list[int]:
    return [row["step"] for row in tiny.rows() if "loss" in row]


def final_loss(tiny: TinyRun) -> float:
    return [row["loss"] for row in tiny.rows() if "loss" in row][-1]
