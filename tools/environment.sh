# Sourced by run_train.sh and run_tests.sh. `use_environment ROOT [EXTRA]` sets $PYTHON to an interpreter with all
# dependencies of pyproject.toml: the active one if it has them, else that of ROOT/.venv, which is created once.

use_environment() {
  local root=$1 extra=${2:-} venv="$1/.venv" base="" name
  local names=(python3 python python3.13 python3.12 python3.11 python3.10)
  [ -z "${PYTHON:-}" ] || names=("$PYTHON")
  export PYTHON PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  if [ -z "${PYTHON:-}" ]; then # each start of an interpreter delays every launch; the usual case needs two of them
    for PYTHON in "$(command -v python3)" "$venv/bin/python"; do ! _is_complete || return 0; done
  fi
  PYTHON=""
  for name in "${names[@]}"; do
    if _is_supported "$name"; then base=$(command -v "$name") && break; fi
  done
  [ -n "$base" ] || _fail "Powertrain needs Python 3.10 to 3.13; not found as: ${names[*]}. Set PYTHON=/path/to/python3."
  PYTHON=$base
  ! _is_complete || return 0
  PYTHON="$venv/bin/python"
  ! _is_complete || return 0
  echo "Setting up Powertrain${extra:+ (with $extra)} in $venv; this happens once." >&2
  # One process at a time: a second launch waits here and then finds the environment complete.
  if command -v flock >/dev/null; then exec 9>"$root/.setup.lock" && flock 9; fi
  _is_complete || _make_venv
  if command -v flock >/dev/null; then exec 9>&-; fi
}

_is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

_is_complete() { [ -x "$PYTHON" ] && "$PYTHON" "$root/tools/check_requirements.py" "$extra" >/dev/null 2>&1; }

_make_venv() {
  local install=("$PYTHON" -m pip install --disable-pip-version-check) make=("$base" -m venv --clear)
  if command -v uv >/dev/null; then
    install=(uv pip install --python "$PYTHON") make=(env UV_VENV_CLEAR=1 uv venv --seed --python "$base")
  fi
  _is_supported "$PYTHON" || "${make[@]}" "$venv" ||
    _fail "Could not make $venv with $base; on Debian and Ubuntu: apt-get install python3-venv."
  "${install[@]}" --quiet -c "$root/constraints.txt" -e "$root${extra:+[$extra]}" ||
    _fail "The set-up failed; the cause is above. Run the same command again to continue."
}

_fail() {
  echo "$1" >&2
  exit 2
}
