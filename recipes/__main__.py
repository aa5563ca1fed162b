"""Start the launcher of this checkout. `python -m` would first look in the working directory for its packages."""

import gc
import logging
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from components.standard_streams import run_command  # noqa: E402
from recipes.cli import main  # noqa: E402
from recipes.launch import is_worker  # noqa: E402

if __name__ == "__main__":  # worker processes that tokenize data import this file again, under another name
    gc.disable()  # until the parts of the recipe are imported, see components.garbage_collection
    status = run_command(lambda: main(sys.argv[1:]))
    if is_worker():
        # Everything is saved and closed. Interpreter shutdown sometimes aborts in a thread of a process group, and a
        # finished run would then count as failed.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
