#!/usr/bin/env bash
# For scripts that chain tools: a line and a log per step, checks, and the report at the end. Source it.
set -euo pipefail

begin_steps() { # begin_steps FOLDER: start anew in it
    out="$1" number=0 unverified=0 started=$SECONDS
    if [ -e "$out" ] && [ ! -e "$out/steps.jsonl" ]; then
        echo "$out exists and was not made by this script; remove it, or choose another --output" >&2
        return 1
    fi
    trap 'exit 130' INT # also where the step that runs takes the Ctrl-C itself
    rm -rf "$out" && mkdir -p "$out/logs" && touch "$out/steps.jsonl" "$out/checks.jsonl"
}

quoted() { # quoted TEXT...: as a JSON string
    local text="${*//\\/\\\\}"
    printf '"%s"' "${text//\"/\\\"}"
}

step() { # step NAME COMMAND...: run it; its output goes to a log, a failure shows its end
    local name="$1" start=$EPOCHREALTIME log seconds
    shift && number=$((number + 1))
    log="$out/logs/$(printf %02d "$number").log"
    printf '%2d  %-40s ' "$number" "$name" >&2
    "$@" >"$log" 2>&1 || { printf 'FAILED, log %s: %.300s\n' "$log" "$*" >&2; tail -n 20 "$log" >&2; return 1; }
    seconds=$(awk "BEGIN {printf \"%.1f\", $EPOCHREALTIME - $start}")
    printf '%6s s\n' "$seconds" >&2
    printf '{"step": %s, "seconds": %s, "command": %s}\n' "$(quoted "$name")" "$seconds" "$(quoted "$*")" >>"$out/steps.jsonl"
}

killed_after() { # killed_after STEP LOG torchrun ...: kill -9 torchrun and its workers once LOG has STEP
    local at="$1" log="$2" pid workers
    (trap - INT && exec "${@:3}") & # without the trap a job of a script is deaf to Ctrl-C
    pid=$!
    until grep -qs "\"step\": $at," "$log"; do
        kill -0 "$pid" 2>/dev/null || { echo "ended before step $at"; return 1; }
        sleep 0.05
    done
    mapfile -t workers < <(pgrep -P "$pid")
    kill -9 "$pid" "${workers[@]}"
    wait "$pid" 2>/dev/null || true
}

verify() { # verify COMMAND...: its JSON line goes into the table of checks; a failed one is told, and fails at the end
    local result=holds
    "$@" >"$out/logs/check.json" 2>"$out/logs/check.log" || result=FAILED
    [ -s "$out/logs/check.json" ] || echo "{\"check\": $(quoted "$*"), \"ok\": false}" >"$out/logs/check.json"
    cat "$out/logs/check.json" >>"$out/checks.jsonl"
    printf '    %-6s %s\n' "$result" "$(sed -n 's/^{"check": "\([^"]*\)".*/\1/p' "$out/logs/check.json")" >&2
    [ $result = holds ] || { unverified=$((unverified + 1)) && cat "$out"/logs/check.{json,log} >&2; }
}

finish_steps() { # finish_steps LABEL=LOG...: the report; fails when a check did not hold
    local arguments=() log
    for log in "$@"; do arguments+=(--log "$log"); done
    mp-report "${arguments[@]}" --title "megapatch quickstart" --checks "$out/checks.jsonl" --steps "$out/steps.jsonl" \
        --output "$out/report.html" >"$out/logs/report.log" 2>&1 || [ "$unverified" -gt 0 ] || cat "$out/logs/report.log" >&2
    printf '%s s in all; everything lies in %s, the report is report.html\n' "$((SECONDS - started))" "$out" >&2
    [ "$unverified" = 0 ] && [ -s "$out/report.html" ]
}
