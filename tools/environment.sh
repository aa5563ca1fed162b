# Sourced by run_train.sh and run_tests.sh. `use_environment ROOT [EXTRA]` leaves in $PYTHON an interpreter that has
# everything the project needs: the active one if it does, else ROOT/.venv, which it makes once.

use_environment() {
  local root=$1 extra=${2:-} base=${PYTHON:-} venv="$1/.venv"
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  if [ -z "$base" ]; then
    base=$(_supported_python) || {
      echo "Powertrain needs Python 3.10 to 3.13; none is on the PATH. Name one with PYTHON=/path/to/python3." >&2
      exit 2
    }
  elif ! _is_supported "$base"; then
    echo "PYTHON=$base is no Python 3.10 to 3.13." >&2
    exit 2
  fi
  if _satisfies "$base" "$root" "$extra"; then
    PYTHON=$base
  elif _satisfies "$venv/bin/python" "$root" "$extra"; then
    PYTHON="$venv/bin/python"
  else
    _make_venv "$base" "$root" "$extra" "$venv"
    PYTHON="$venv/bin/python"
  fi
  export PYTHON
}

_is_supported() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

_supported_python() {
  local name
  for name in python3 python python3.13 python3.12 python3.11 python3.10; do
    if _is_supported "$name"; then
      command -v "$name"
      return
    fi
  done
  return 1
}

_satisfies() { [ -x "$(command -v "$1")" ] && "$1" "$2/tools/requirements.py" check "$3" >/dev/null 2>&1; }

_make_venv() {
  local base=$1 root=$2 extra=$3 venv=$4
  echo "Setting up Powertrain${extra:+ (with $extra)} in $venv; this happens once." >&2
  # One at a time: a second launch waits here and then finds the work done.
  if command -v flock >/dev/null; then
    exec 9>"$root/.setup.lock"
    flock 9
  fi
  if ! _satisfies "$venv/bin/python" "$root" "$extra"; then
    _is_supported "$venv/bin/python" || "$base" -m venv --clear "$venv" || {
      echo "Could not make $venv with $base; on Debian and Ubuntu: apt-get install python3-venv." >&2
      exit 2
    }
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" \
      -r <("$base" "$root/tools/requirements.py" list "$extra") || {
      echo "Setting up failed; what pip said is above. Run the same command again to continue." >&2
      exit 2
    }
  fi
  if command -v flock >/dev/null; then exec 9>&-; fi
}
