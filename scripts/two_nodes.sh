#!/usr/bin/env bash
# Two nodes on one machine, one CPU process on each: a rehearsal of a launch on several nodes.
#   scripts/two_nodes.sh multi_node_zero3 [options of scripts/train.py]
# As root the nodes are two network namespaces joined by a veth pair, each with an address of its own, so that whatever
# needs the network shows; else they are two launches on loopback, and the script says so.
# $PYTHON runs it (default python), $SCRIPT is what the nodes run (default scripts/train.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=${1:?usage: scripts/two_nodes.sh ACCELERATE_CONFIG [options of scripts/train.py]}
shift
name=rlhf$$ # of this run, so that two of them do not meet

namespaces() { # makes them, or fails where it may not
  [ "$(id -u)" = 0 ] && command -v ip >/dev/null || return 1
  {
    ip netns add "$name-0" && ip netns add "$name-1" &&
      ip link add "${name}v0" netns "$name-0" type veth peer name "${name}v1" netns "$name-1" || return 1
    for rank in 0 1; do
      ip -n "$name-$rank" address add "10.77.0.$((rank + 1))/24" dev "${name}v$rank" &&
        ip -n "$name-$rank" link set "${name}v$rank" up && ip -n "$name-$rank" link set lo up || return 1
    done
  } 2>/dev/null
}
clean_up() {
  # shellcheck disable=SC2046
  kill $(jobs -p) 2>/dev/null || true
  wait
  for rank in 0 1; do ip netns del "$name-$rank" 2>/dev/null || true; done
}
trap clean_up EXIT

if namespaces; then
  first=10.77.0.1 port=29500
  echo "two nodes: network namespaces $name-0 (10.77.0.1) and $name-1 (10.77.0.2)" >&2
else
  first=127.0.0.1 port=$((20000 + $$ % 10000))
  echo "two nodes: no network namespaces here (they need root and iproute2), so two launches on loopback" >&2
fi

node() { # RANK COMMAND...: become the command, on a node
  local rank=$1
  shift
  if [ "$first" = 127.0.0.1 ]; then
    exec env GLOO_SOCKET_IFNAME=lo "$@"
  else
    exec ip netns exec "$name-$rank" env GLOO_SOCKET_IFNAME="${name}v$rank" "$@"
  fi
}

for rank in 0 1; do
  CUDA_VISIBLE_DEVICES= node "$rank" "${PYTHON:-python}" -m accelerate.commands.launch \
    --config_file "accelerate_configs/$config.yaml" --num_machines 2 --num_processes 2 --machine_rank "$rank" \
    --main_process_ip "$first" --main_process_port "$port" "${SCRIPT:-scripts/train.py}" "$@" &
done
# The first node that fails ends both.
wait -n
wait -n
