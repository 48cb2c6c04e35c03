#!/usr/bin/env bash
# Submits preprocess -> merge -> convert -> train -> export -> generate. Each starts when the one before is done; where
# one fails the rest is cancelled. Prints a line for each: the step and its job.
#   RUN=experiment scripts/slurm/chain.sh
#   RUN=experiment STEPS="train export generate" CLUSTER_ENV=cluster.env scripts/slurm/chain.sh
# RUN is a folder with preprocess.args, convert.args, train.args, export.args and generate.args, files of the tools'
# options; jobs run in the current folder. Data goes to RUN/data, training to RUN/train, unless DATA and SAVE say so.
# CLUSTER_ENV names a file to source, here and in each job: see cluster.env. OPTIONS_TRAIN in it are options of sbatch
# for train, and so on. TRAIN_SCRIPT=torchrun trains under torchrun.
set -euo pipefail
: "${RUN:?folder with the .args files of the steps}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
CLUSTER_ENV="$(realpath "${CLUSTER_ENV:-/dev/null}")"
set -a
# shellcheck source=/dev/null
source "$CLUSTER_ENV"
set +a
export CLUSTER_ENV PREFIX="${DATA:-$RUN/data}" SAVE="${SAVE:-$RUN/train}"

declare -A script=([preprocess]=preprocess [merge]=merge [convert]=convert [train]="${TRAIN_SCRIPT:-pretrain}"
    [export]=export [generate]=generate)
read -ra steps <<<"${STEPS:-preprocess merge convert train export generate}"
for step in "${steps[@]}"; do
    [ -n "${script[$step]:-}" ] || { echo "STEPS: no step $step; there are: ${!script[*]}" >&2; exit 2; }
    [ "$step" != merge ] || continue # it has no options
    [ -f "$RUN/$step.args" ] || { echo "$RUN/$step.args: no such file; step $step needs it" >&2; exit 2; }
done

before=""
for step in "${steps[@]}"; do
    options="OPTIONS_${step^^}" wait=()
    read -ra further <<<"${!options:-}"
    if [ -n "$before" ]; then wait=("--dependency=afterok:$before" --kill-on-invalid-dep=yes); fi
    before="$(ARGS="$RUN/$step.args" sbatch --parsable "${wait[@]}" "${further[@]}" "$here/${script[$step]}.sbatch")"
    before="${before%%;*}" # JOB;CLUSTER
    echo "$step $before"
done
