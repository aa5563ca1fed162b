#!/usr/bin/env bash
# Lint, check formatting and types, then run the tests:  ./run_tests.sh [pytest arguments]
# With arguments only the tests they name run, so that `./run_tests.sh -m quick` serves while you work.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
source "$root/tools/environment.sh"
use_environment "$root" dev
if [ $# -eq 0 ]; then
  cd "$root"
  "$PYTHON" -m ruff check .
  "$PYTHON" -m ruff format --check .
  "$PYTHON" -m mypy
fi
# two files at a time: much of the suite is processes that start
exec "$PYTHON" -m pytest -n 2 --dist loadfile --rootdir "$root" -c "$root/pyproject.toml" "${@:-$root/tests}"
