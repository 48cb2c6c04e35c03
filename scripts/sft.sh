#!/usr/bin/env bash
# mp-sft on this machine, RANKS processes (1): it goes on from the newest checkpoint in SAVE, as often as it is started.
#   ARGS=train.args SAVE=run RANKS=8 scripts/sft.sh
# ARGS is a file of options; MAX_RESTARTS: how often all processes start anew when one dies (0). On Slurm: scripts/slurm.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
: "${ARGS:?file of mp-sft options}" "${SAVE:?folder for checkpoints and the log}"
use_env
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec torchrun --standalone --nproc-per-node "${RANKS:-1}" --max-restarts "${MAX_RESTARTS:-0}" --no-python \
    mp-sft "@$ARGS" --save "$SAVE"
