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
# Two files at a time with one thread each: small tensors do not gain from threads, which would compete for the cores.
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # compiling the tests and their assertions takes each of the two 10 s; keep it for the next run
exec "$PYTHON" -m pytest -n 2 --dist loadfile --rootdir "$root" -c "$root/pyproject.toml" "${@:-$root/tests}"
