#!/usr/bin/env bash
# bash train_scripts/train.sh CONFIG.yaml [--np=N] [--section.key=value ...]
# One process per GPU, or --np processes of one thread each on a CPU (default 1).
set -euo pipefail
cd "$(dirname "$0")/.."
np="$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')"
arguments=()
for argument in "$@"; do
  case "$argument" in
    --np=*) np="${argument#--np=}" ;;
    *) arguments+=("$argument") ;;
  esac
done
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec torchrun --standalone --nproc_per_node="$np" train_scripts/train.py "${arguments[@]}"
