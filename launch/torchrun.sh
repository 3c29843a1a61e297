#!/usr/bin/env bash
# One node's share of a run under plain torchrun; start it once per node. Arguments go to launch/compress.py.
#
#   launch/torchrun.sh --model M --pattern 2:4 --output OUT                            one node, all its GPUs, DDP
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 SHARDING=fsdp2 launch/torchrun.sh --model M ...   first of two nodes, FSDP2
#
# NPROC processes per node (default: its GPUs, or 2 without one), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: where they
# are unset, what Kubeflow puts in PET_* is taken. SHARDING: ddp (default), fsdp2, zero1, zero2 or zero3.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
nproc=${NPROC:-${PET_NPROC_PER_NODE:-$((gpus > 0 ? gpus : 2))}}
nnodes=${NNODES:-${PET_NNODES:-1}}
node_rank=${NODE_RANK:-${PET_NODE_RANK:-0}}
address=${MASTER_ADDR:-${PET_MASTER_ADDR:-127.0.0.1}}
port=${MASTER_PORT:-${PET_MASTER_PORT:-29400}}
# these describe processes, which torchrun is about to start; left behind by an operator they describe pods
unset WORLD_SIZE RANK LOCAL_RANK

case ${SHARDING:-ddp} in
  ddp) ;;
  fsdp2)
    export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP
    export FSDP_RESHARD_AFTER_FORWARD=true FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT
    export FSDP_CPU_RAM_EFFICIENT_LOADING=false FSDP_OFFLOAD_PARAMS=false
    ;;
  zero1 | zero2 | zero3)
    export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE="$root/configs/deepspeed/$SHARDING.json"
    export ACCELERATE_DEEPSPEED_ZERO3_INIT=false
    ;;
  *)
    echo "torchrun.sh: SHARDING is $SHARDING, accepted: ddp, fsdp2, zero1, zero2, zero3" >&2
    exit 2
    ;;
esac

exec torchrun --nnodes "$nnodes" --node_rank "$node_rank" --nproc_per_node "$nproc" --max_restarts 0 \
  --master_addr "$address" --master_port "$port" "$here/compress.py" "$@"
