#!/usr/bin/env bash
# Pre-train from a recipe; --help says more.
#   ./run_train.sh [CONFIG.toml] [--section.key=value]... [--resume[=PATH]] [--print-config] [--dry-run[=DEVICE[@MFU]]]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
source "$root/tools/environment.sh"
use_environment "$root"
exec "$PYTHON" "$root/recipes/__main__.py" "$@"
