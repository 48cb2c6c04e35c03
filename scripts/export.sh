#!/usr/bin/env bash
# The newest checkpoint of a run to a Hugging Face folder, whose weights are then compared with the checkpoint's.
#   SAVE=run TARGET=exported scripts/export.sh
# ARGS may name a file of further mp-convert options, such as --dtype bf16.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
: "${SAVE:?folder of the run}" "${TARGET:?Hugging Face folder to write}"
use_env
exec mp-convert --source "$SAVE" --target "$TARGET" --to hf --verify ${ARGS:+"@$ARGS"}
