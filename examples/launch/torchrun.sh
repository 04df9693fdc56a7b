#!/usr/bin/env bash
# Start one node of a multi-node run. Run it on every node with the same arguments:
#
#   NODES=4 HEAD=node0.cluster:29500 examples/launch/torchrun.sh RECIPE.py [--section.field value ...]
#
# NODES          nodes of the run (default 1)
# HEAD           host:port of one of them, on which the nodes meet (default localhost, any free port: one node only)
# RUN_ID         name that keeps runs on the same head apart (default megavl)
# GPUS_PER_NODE  processes per node (default: one per GPU, one without GPUs)
# PYTHON         the interpreter of the environment (default python)
#
# The same command again continues from the newest complete checkpoint. On SIGTERM or Ctrl-C every rank finishes the step,
# saves and exits 0 (torchrun itself then reports the signal and exits 1); torchrun waits
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds for that before it kills.
set -euo pipefail

if [ $# -lt 1 ]; then
    sed -n '2,15p' "$0" >&2
    exit 2
fi

nodes=${NODES:-1}
if [ "$nodes" -gt 1 ] && [ -z "${HEAD:-}" ]; then
    echo "torchrun.sh: NODES is $nodes, so HEAD=host:port must say where they meet" >&2
    exit 2
fi

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
per_node=${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 1))}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# One hardware queue: communication starts in the order of its launch, before the computation that is to hide it.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$nodes" \
    --nproc-per-node "$per_node" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:-localhost:0}" \
    --rdzv-id "${RUN_ID:-megavl}" \
    --max-restarts 0 \
    -m megavl.train "$@"
