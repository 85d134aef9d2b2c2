#!/usr/bin/env bash
# Try `parity rank` across "machines" that are network namespaces of this one (needs root).
#
#   sudo recipes/two_namespaces.sh CASE... [OPTION...]
#
# Two namespaces joined by a pair of virtual interfaces, two ranks in each, Gloo between them: no
# loopback, no shared localhost, as on two nodes. What follows is handed to `parity rank`.
set -euo pipefail

python=${PYTHON:-python}
name=parity$$
one=${name}a two=${name}b
cleanup() {
    ip netns delete "$one" 2>/dev/null || true
    ip netns delete "$two" 2>/dev/null || true
}
trap cleanup EXIT

ip netns add "$one"
ip netns add "$two"
ip link add link0 netns "$one" type veth peer name link0 netns "$two"
ip -n "$one" address add 10.77.0.1/24 dev link0
ip -n "$two" address add 10.77.0.2/24 dev link0
for namespace in "$one" "$two"; do
    ip -n "$namespace" link set link0 up
    ip -n "$namespace" link set lo up
done

node() {
    local namespace=$1 rank=$2
    shift 2
    ip netns exec "$namespace" env GLOO_SOCKET_IFNAME=link0 OMP_NUM_THREADS=1 \
        "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node 2 --node-rank "$rank" \
        --master-addr 10.77.0.1 --master-port 29500 -m parity rank "$@"
}

node "$two" 1 "$@" &
second=$!
status=0
node "$one" 0 "$@" || status=$?
wait "$second" || true
exit "$status"
