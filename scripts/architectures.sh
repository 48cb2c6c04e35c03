#!/usr/bin/env bash
# The table of architectures in README.md, from the families and from what is measured on their tiny models (minutes).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env
measured="$(mktemp)"
trap 'rm -f "$measured"' EXIT
cd "$MEGAPATCH_ROOT"
OMP_NUM_THREADS=1 python tests/bench/architectures.py >"$measured"
mp-families --measured "$measured" --update README.md
