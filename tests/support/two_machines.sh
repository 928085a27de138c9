#!/usr/bin/env bash
# Two machines on one: two network namespaces joined by a virtual cable, one rank in each, gloo between them. The greedy
# ids must be those of one process.
#
#   sudo tests/support/two_machines.sh [CKPT_DIR]      needs Linux, root and iproute2; without CKPT_DIR, makes a tiny checkpoint
#
# PYTHON names the interpreter (python3 if not set). Exit status: 0 the same ids, 2 wrong arguments, 77 not run, for want
# of root or of a tool; any other, different ids or a failure.
set -euo pipefail

PYTHON=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)

skip() {
  echo "two_machines.sh: $1" >&2
  exit 77
}

if [ $# -gt 1 ] || { [ $# -eq 1 ] && [ ! -d "$1" ]; }; then
  echo "two_machines.sh: give one folder with a checkpoint, or nothing." >&2
  exit 2
fi
[ "$(uname -s)" = Linux ] || skip "needs Linux, for its network namespaces."
[ "$(id -u)" -eq 0 ] || skip "needs root, to make network namespaces; run it with sudo."
command -v ip >/dev/null || skip "needs the ip command; install iproute2."

first=llama-a-$$ second=llama-b-$$
work=$(mktemp -d)
other=""

clean_up() {
  status=$?
  trap - EXIT
  [ -z "$other" ] || kill "$other" 2>/dev/null || true
  for name in "$first" "$second"; do
    if ip netns list 2>/dev/null | grep -qw -- "$name"; then
      ip netns pids "$name" | xargs -r kill 2>/dev/null || true
      ip netns delete "$name" || true # its end of the cable goes with it
    fi
  done
  rm -rf "$work"
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

ip netns add "$first" 2>"$work/refusal" || skip "network namespaces are not allowed here ($(cat "$work/refusal"))."
ip netns add "$second"
ip link add va netns "$first" type veth peer name vb netns "$second"
ip -n "$first" address add 10.77.0.1/24 dev va
ip -n "$second" address add 10.77.0.2/24 dev vb
for end in "$first va" "$second vb"; do
  read -r name cable <<<"$end"
  ip -n "$name" link set lo up
  ip -n "$name" link set "$cable" up
done

ckpt_dir=${1:-$work/checkpoint}
[ $# -eq 1 ] || "$PYTHON" "$here/two_machines.py" make "$ckpt_dir"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# machine NAMESPACE CABLE RANK: the command one types on that machine
machine() {
  ip netns exec "$1" env GLOO_SOCKET_IFNAME="$2" "$PYTHON" -m torch.distributed.run --nnodes 2 --nproc_per_node 1 \
    --node_rank "$3" --master_addr 10.77.0.1 --master_port 29500 "$here/two_machines.py" ids "$ckpt_dir"
}

"$PYTHON" "$here/two_machines.py" ids "$ckpt_dir" >"$work/one"
machine "$second" vb 1 >"$work/second" &
other=$!
machine "$first" va 0 >"$work/two"
wait "$other"
other=""

if [ ! -s "$work/one" ] || ! diff "$work/one" "$work/two" || [ -s "$work/second" ]; then
  echo "two_machines.sh: two machines gave other ids than one process, or the second machine printed." >&2
  exit 1
fi
echo "two_machines.sh: the same $(tr -cd , <"$work/one" | wc -c) ids on two machines as in one process."
