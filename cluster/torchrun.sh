#!/usr/bin/env bash
# Train on all GPUs of one node, or of several: call it on each node, with the same MASTER_ADDR.
#
#   cluster/torchrun.sh --config configs/gpt2-124m.yaml
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a cluster/torchrun.sh --config configs/gpt2-124m.yaml   # on node-a
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a cluster/torchrun.sh --config configs/gpt2-124m.yaml   # on the other
#
# A process that dies takes the others with it, and torchrun starts all again, MAX_RESTARTS times, from the last
# checkpoint. checkpoints/ and logs/ are relative to the working directory: one that all nodes share. SIGTERM to this
# script stops all after a step and a save. Exit codes are lm's: 0, 2 for bad input, 143 for stopped.
set -euo pipefail
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
MAX_RESTARTS=${MAX_RESTARTS:-3}
PROCESSES=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}  # of this node: one a GPU
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}  # of a step and a save; torchrun's own: 30 s
LM_EXIT_CODE=$(mktemp)
export LM_EXIT_CODE

stopped=0
trap 'stopped=1; kill -TERM "$torchrun"' TERM INT USR1  # torchrun passes SIGTERM on
"$PYTHON" -m torch.distributed.run \
  --nnodes="$NNODES" --node-rank="$NODE_RANK" --nproc-per-node="$PROCESSES" \
  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts="$MAX_RESTARTS" \
  --module lm fit "$@" --ckpt_path auto --trainer.num_nodes "$NNODES" --trainer.devices "$PROCESSES" &
torchrun=$!
code=0
wait "$torchrun" || code=$?
[ "$stopped" -eq 0 ] || { code=0; wait "$torchrun" || code=$?; }  # the trap ended the first wait
[ "$code" -eq 0 ] || code=$(cat "$LM_EXIT_CODE" | grep . || echo "$code")
rm -f "$LM_EXIT_CODE"
exit "$code"
