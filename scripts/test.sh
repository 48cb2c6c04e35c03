#!/usr/bin/env bash
# Runs the tests: all but the slow and the GPU ones, or with --all the slow ones too (GPU tests where there is a GPU).
# Further arguments go to pytest, which then runs in one process: scripts/test.sh tests/test_cli.py -k help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
use_env

marks="not slow and not gpu"
if [ "${1:-}" = --all ]; then
    marks=""
    shift
fi
if ! python -c 'import pytest, pytest_timeout, hypothesis, xdist' 2>/dev/null; then
    echo "test.sh: the active environment lacks the test tools: pip install -c constraints/cpu.txt -e '.[data,fast,dev]'" >&2
    exit 1
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
free="$(df --output=avail /dev/shm 2>/dev/null | tail -n 1)" # in KiB
if [ -z "${TMPDIR:-}" ] && [ "${free:-0}" -gt 8000000 ]; then
    export TMPDIR=/dev/shm # many tests make files durable: a busy disk would decide how long they take
fi
options=(-q -m "$marks" -o tmp_path_retention_policy=failed -o tmp_path_retention_count=1)
if [ $# = 0 ]; then
    cores="$(env -u OMP_NUM_THREADS nproc)" # which follows that variable
    options+=(-n "$((cores < 4 ? cores : 4))" --dist loadfile)
fi
exec python -m pytest "${options[@]}" "$@"
