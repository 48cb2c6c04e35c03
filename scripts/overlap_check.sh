#!/usr/bin/env bash
# Shows that communication runs beside computation: two processes in network namespaces of their own, a link between
# them that tc tbf holds to 1 Gbit/s and 500 Mbit/s, computation emulated by sleeps. Prints seconds per step and scaling
# efficiency, serial and overlapped. Needs root (or CAP_NET_ADMIN and CAP_SYS_ADMIN), ip and tc; else it says so and
# leaves with 0. Further arguments go to tests/bench/overlap.py (--help names them).
#   RATES="1000 500" scripts/overlap_check.sh --steps 8
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

worker="$MEGAPATCH_ROOT/tests/bench/overlap.py"
for word in "$@"; do
    [ "$word" != --help ] || { use_env && exec python "$worker" --help; }
done
names=("mp-overlap-$$-0" "mp-overlap-$$-1") links=("mpv$$a" "mpv$$b") started=()
skip() { echo "overlap_check.sh: skipped: $*" >&2; exit 0; }
clean() {
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    for name in "${names[@]}"; do ip netns del "$name" 2>/dev/null || true; done
}
for tool in ip tc; do command -v "$tool" >/dev/null || skip "no $tool; install iproute2"; done
trap clean EXIT
for name in "${names[@]}"; do
    ip netns add "$name" 2>/dev/null || skip "this user may not make network namespaces"
done
ip link add "${links[0]}" netns "${names[0]}" type veth peer name "${links[1]}" netns "${names[1]}" 2>/dev/null ||
    skip "no virtual links (veth) here"
for rank in 0 1; do
    ip -n "${names[$rank]}" addr add "10.213.7.$((rank + 1))/24" dev "${links[$rank]}"
    ip -n "${names[$rank]}" link set "${links[$rank]}" up
    ip -n "${names[$rank]}" link set lo up
done
use_env

echo "link         way                                     s/step  efficiency"
for rate in ${RATES:-1000 500}; do
    for rank in 0 1; do
        ip netns exec "${names[$rank]}" tc qdisc replace dev "${links[$rank]}" root \
            tbf rate "${rate}mbit" burst 256kb latency 50ms 2>/dev/null || skip "tc cannot limit a link here (tbf)"
    done
    started=()
    for rank in 0 1; do
        MASTER_ADDR=10.213.7.1 MASTER_PORT=29711 WORLD_SIZE=2 RANK="$rank" OMP_NUM_THREADS=1 \
            GLOO_SOCKET_IFNAME="${links[$rank]}" ip netns exec "${names[$rank]}" \
            python "$worker" --label "$rate Mbit/s" "$@" &
        started+=("$!")
    done
    for pid in "${started[@]}"; do wait "$pid"; done
    started=()
done
