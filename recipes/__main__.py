"""Start the launcher of this checkout, whatever the working directory holds: `python -m` would look there first."""

import logging
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from components.standard_streams import run_command  # noqa: E402
from recipes.cli import is_worker, main  # noqa: E402

if __name__ == "__main__":  # processes that prepare data import this file again, by another name
    status = run_command(lambda: main(sys.argv[1:]))
    if is_worker():
        # All is saved and closed. What the interpreter would still take down, threads of process groups that something
        # refers to, now and then aborts there, and a run that was done would count as failed.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
