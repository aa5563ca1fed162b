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
# two files at a time, one thread each: small tensors gain nothing from threads, which would spin for each other's core
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -n 2 --dist loadfile --rootdir "$root" -c "$root/pyproject.toml" "${@:-$root/tests}"
