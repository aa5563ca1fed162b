#!/usr/bin/env bash
# Lint, check formatting and types, then run the tests:  ./run_tests.sh [pytest arguments]
# With arguments only the tests they name run, so that `./run_tests.sh -m quick` serves while you work.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # as `sh run_tests.sh`
set -euo pipefail +o posix
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd -P) # the link may be to this file
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
