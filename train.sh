#!/usr/bin/env bash
# Train one stage:  bash train.sh --stage S --config C [key=value ...]
# Without --config the mini model learns from the lists that stand in conf/data_tmp.yaml (conf/finetune_mini.yaml).
#
# Without anything set: one process for each accelerator of this machine, one process on the CPU. With torchrun's own variables set
# (NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, or RDZV_ENDPOINT and RDZV_ID) it starts what they say. docs/training.md has a
# SLURM example. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-$( [ -x .venv/bin/python ] && echo .venv/bin/python || echo python3 )}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

case " $* " in
    *" --config"* | *" -h "* | *" --help "*) ;;
    *) set -- --config conf/finetune_mini.yaml "$@" ;;
esac

processes=${NPROC_PER_NODE:-$("$PYTHON" -c 'from osum_echat import device; print(device.count())')}
nodes=${NNODES:-1}
if [ "$processes" -le 1 ] && [ "$nodes" = 1 ]; then
    exec "$PYTHON" -m osum_echat.training "$@"
fi
rendezvous=()
if [ -n "${RDZV_ENDPOINT:-}" ]; then
    rendezvous=(--rdzv-backend "${RDZV_BACKEND:-c10d}" --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-osum-echat}")
elif [ "$nodes" = 1 ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--node-rank "${NODE_RANK:?set NODE_RANK}" --master-addr "${MASTER_ADDR:?set MASTER_ADDR}" --master-port "${MASTER_PORT:-29500}")
fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes" "${rendezvous[@]}" -m osum_echat.training "$@"
