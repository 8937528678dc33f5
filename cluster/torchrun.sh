#!/usr/bin/env bash
# Train on all GPUs of one node, or of several: call it on each node, with the same MASTER_ADDR.
#
#   cluster/torchrun.sh --config configs/gpt2-124m.yaml
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a cluster/torchrun.sh --config configs/gpt2-124m.yaml   # on node-a
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a cluster/torchrun.sh --config configs/gpt2-124m.yaml   # on the other
#
# A process that dies takes the others with it, and torchrun starts all again, MAX_RESTARTS times, from the last
# checkpoint. checkpoints/ and logs/ are relative to the working directory: one that all nodes share.
set -euo pipefail
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
MAX_RESTARTS=${MAX_RESTARTS:-3}
PROCESSES=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}  # of this node: one a GPU
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# exec: signals go to torchrun itself, which passes them on; lm saves and exits 143
exec "$PYTHON" -m torch.distributed.run \
  --nnodes="$NNODES" --node-rank="$NODE_RANK" --nproc-per-node="$PROCESSES" \
  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts="$MAX_RESTARTS" \
  --module lm fit "$@" --ckpt_path auto --trainer.num_nodes "$NNODES" --trainer.devices "$PROCESSES"
