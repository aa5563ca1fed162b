"""Host the rendezvous of an elastic run on a machine that does not train: the run then survives the loss of any node.

    python -m tools.rendezvous --port 29500        # on a login node, for MASTER_ADDR=LOGIN_NODE MASTER_PORT=29500

It stores which nodes take part, not data or weights, and ends with Ctrl-C. Exit status: 0, or 2 if the port is in use.
"""

from __future__ import annotations

import argparse
import sys
import threading
from contextlib import suppress

from torch.distributed import TCPStore

from components.standard_streams import run_command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.rendezvous", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--port",
        type=int,
        choices=range(2**16),
        metavar="PORT",
        default=29500,
        help="port to listen on; 0: any free one (default: 29500)",
    )
    options = parser.parse_args(arguments)
    try:
        store = TCPStore("localhost", options.port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        print(f"port {options.port} cannot be used: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    with suppress(SystemExit):  # its output is full or nobody reads it: the rendezvous works all the same
        print(f"the rendezvous is at port {store.port}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("closed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
