#!/usr/bin/env bash
# bash train_scripts/train.sh CONFIG.yaml [--np=N] [--section.key=value ...]
# One process per GPU, or --np processes on a CPU (default 1). On several machines start it on each of them with
# NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT) set; asset/docs/training.md has a Slurm example.
set -euo pipefail
cd "$(dirname "$0")/.."
np=""
arguments=()
for argument in "$@"; do
  case "$argument" in
    --np=*) np="${argument#--np=}" ;;
    *) arguments+=("$argument") ;;
  esac
done
[ -n "$np" ] || np="$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')"
nodes="${NNODES:-1}"
if [ "$np" = 1 ] && [ "$nodes" = 1 ]; then
  exec python train_scripts/train.py "${arguments[@]}"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "$nodes" = 1 ]; then
  where=(--standalone)
else
  where=(--nnodes="$nodes" --node_rank="${NODE_RANK:?set NODE_RANK to 0, 1, ...}" --master_addr="${MASTER_ADDR:?}" --master_port="${MASTER_PORT:-29500}")
fi
exec torchrun "${where[@]}" --nproc_per_node="$np" train_scripts/train.py "${arguments[@]}"
