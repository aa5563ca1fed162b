"""Start the launcher of this checkout, whatever the working directory holds: `python -m` would look there first."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from recipes.launch import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
