#!/usr/bin/env bash
# Two hosts on one machine: network namespaces joined by a veth cable, with nothing else in common but the disk and the
# processors. Usage: unshare -rnmpf --mount-proc --kill-child two_hosts.sh FOLDER COMMAND...
# Runs COMMAND on both, as srun does, and ends with the larger of their exit codes; FOLDER/host-{0,1}.log is what they said.
set -euo pipefail
folder=$1
shift
unshare -n sleep infinity &
second=$!
until [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.01; done
ip link set lo up
ip link add cable0 type veth peer name cable1 netns "$second"
ip addr add 10.77.0.1/24 dev cable0
ip link set cable0 up
nsenter -t "$second" -n sh -c 'ip link set lo up; ip addr add 10.77.0.2/24 dev cable1; ip link set cable1 up'
# the name of this machine leads to the loopback device, which does not reach the other host
SLURM_NODEID=0 GLOO_SOCKET_IFNAME=cable0 "$@" >"$folder/host-0.log" 2>&1 &
first=$!
SLURM_NODEID=1 GLOO_SOCKET_IFNAME=cable1 nsenter -t "$second" -n "$@" >"$folder/host-1.log" 2>&1 &
other=$!
codes=()
for host in $first $other; do
  code=0
  wait "$host" || code=$?
  codes+=("$code")
done
echo "exit codes ${codes[*]}"
exit $((codes[0] > codes[1] ? codes[0] : codes[1]))
