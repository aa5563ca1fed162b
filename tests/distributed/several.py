"""Several runs, one after the other, in the same processes: saves starting them for each.

    run_ranks(2, [sys.executable, "-m", "tests.distributed.several", "COMMANDS.json"], folder)

COMMANDS.json holds a list of argument lists for the launcher. The first that does not end with 0 ends them all.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from recipes import cli


def main(commands: Path) -> int:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = os.environ["RENDEZVOUS"]
    dist.init_process_group(
        "gloo", init_method=place, rank=rank, world_size=world_size
    )  # once: neither a mesh nor DTensor's caches survive their process group
    for arguments in json.loads(commands.read_text()):
        gc.freeze()  # a run collects garbage after its first step; skip the imported objects
        status = cli.main(arguments)
        if status:
            print(f"rank {os.environ['RANK']}: status {status} of {arguments}", file=sys.stderr)
            return status
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
