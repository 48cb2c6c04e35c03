#!/usr/bin/env bash
# The Python environment of this checkout, for other scripts: `source scripts/env.sh` makes .venv once and puts it
# first on PATH; an active environment in which this checkout is installed is used instead. Run by itself it makes
# the environment and says how to enter it. An interrupted run is made good by the next one.
set -euo pipefail
MEGAPATCH_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_python() { # prints the first Python that is 3.11 or newer
    local name
    for name in "${PYTHON:-python3.11}" python3.12 python3.13 python3; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "env.sh: no Python 3.11 or newer with venv; install python3.11 and python3.11-venv, or set PYTHON" >&2
    return 1
}

make_env() { # make_env FOLDER PIP-ARGUMENTS...: an environment, made anew unless complete and from the same inputs
    local folder="$1" ready="$1/.megapatch" python wanted start=$SECONDS pip=(-m pip --disable-pip-version-check install)
    shift
    if [ ! -t 2 ]; then pip+=(--quiet); fi # progress bars for a person only
    python="$(find_python)"
    wanted="$({ "$python" -VV && echo "$@" && cat "$MEGAPATCH_ROOT"/{constraints/cpu.txt,pyproject.toml}; } | cksum)"
    [ "$(cat "$ready" 2>/dev/null)" != "$wanted" ] || return 0
    if [ ! -e "$ready" ] && [ -n "$(ls -A "$folder" 2>/dev/null)" ]; then
        echo "env.sh: $folder was not made by this script; remove it, or activate an environment of yours" >&2
        return 1
    fi
    mkdir -p "$folder"
    exec 9<"$folder" # one maker at a time
    if command -v flock >/dev/null; then flock 9; fi
    if [ "$(cat "$ready" 2>/dev/null)" != "$wanted" ]; then
        echo "env.sh: making $folder with $("$python" -V): 1.5 GB, a few minutes, once" >&2
        echo unfinished >"$ready"
        find "$folder" -mindepth 1 -maxdepth 1 ! -name .megapatch -exec rm -rf {} +
        "$python" -m venv "$folder"
        "$folder/bin/python" "${pip[@]}" -c "$MEGAPATCH_ROOT/constraints/cpu.txt" "$@" >&2
        echo "$wanted" >"$ready"
        echo "env.sh: $folder is ready, $((SECONDS - start)) s" >&2
    fi
    exec 9<&-
}

use_env() { # the active environment if this checkout is installed in it, else .venv
    local found
    found="$(cd / && python -c 'import megapatch.models as m; print(*m.__path__)' 2>/dev/null)" || found=""
    [ ! "$found" -ef "$MEGAPATCH_ROOT/models" ] || return 0
    make_env "$MEGAPATCH_ROOT/.venv" -e "${MEGAPATCH_ROOT}[data,fast,dev]"
    export VIRTUAL_ENV="$MEGAPATCH_ROOT/.venv" PATH="$MEGAPATCH_ROOT/.venv/bin:$PATH"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    use_env
    echo "enter the environment with: source \"${VIRTUAL_ENV:-$(dirname "$(dirname "$(command -v python)")")}/bin/activate\""
fi
