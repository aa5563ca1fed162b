#!/usr/bin/env bash
# Pre-train from a recipe; --help lists the options.
#   ./run_train.sh [CONFIG.toml] [--section.key=value]... [--resume[=PATH]] [--print-config] [--dry-run[=DEVICE[@MFU]]]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # as `sh run_train.sh`
set -euo pipefail +o posix
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd -P) # resolves a symbolic link to this file
source "$root/tools/environment.sh"
use_environment "$root"
exec "$PYTHON" "$root/recipes/__main__.py" "$@"
