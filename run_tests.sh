#!/usr/bin/env bash
# Lint, check formatting and types, then run the tests:  ./run_tests.sh [pytest arguments]
# With arguments only pytest runs, for example `./run_tests.sh -m quick` while you work.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # as `sh run_tests.sh`
set -euo pipefail +o posix
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd -P) # resolves a symbolic link to this file
source "$root/tools/environment.sh"
use_environment "$root" dev
if [ $# -eq 0 ]; then
  cd "$root"
  "$PYTHON" -m ruff check .
  "$PYTHON" -m ruff format --check .
  "$PYTHON" -m mypy
fi
# Three files at a time, because many tests wait, for a timeout or a network; one thread each, because small tensors do
# not gain from more. In the order of their names: the longest are in tests/distributed, and should not be the last.
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # compiling the tests and their assertions takes 10 s; keep it for the next run
exec "$PYTHON" -m pytest -n 3 --dist loadfile --no-loadscope-reorder --rootdir "$root" -c "$root/pyproject.toml" \
  "${@:-$root/tests}"
