"""Several runs, one after the other, in the processes that torchrun starts: saves starting Python for each.

    torchrun --nproc-per-node 2 -m tests.distributed.several COMMANDS.json

COMMANDS.json holds a list of argument lists for the launcher. The first that does not end with 0 ends them all.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from recipes import cli


def main(commands: Path) -> int:
    dist.init_process_group("gloo")  # once: a mesh does not survive its process group, nor do DTensor's caches
    for arguments in json.loads(commands.read_text()):
        status = cli.main(arguments)
        if status:
            print(f"rank {os.environ['RANK']}: status {status} of {arguments}", file=sys.stderr)
            return status
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
