#!/usr/bin/env bash
# sbatch configs/accelerate/slurm.sh configs/llava-1.5-7b/stage2.yaml [section.key=value ...]
#SBATCH --job-name=mmllm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
# Five minutes before the end the run gets SIGTERM, saves its state and ends; requeued, it goes on from there.
set -euo pipefail
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FSDP_VERSION=2 ACCELERATE_USE_FSDP=true # leave both out for DDP

srun --kill-on-bad-exit=1 .venv/bin/torchrun \
    --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_backend c10d --rdzv_endpoint "$head_node:29500" --rdzv_id "$SLURM_JOB_ID" \
    train/stage2.py "$@" &
run=$!
trap 'kill -TERM "$run"; wait "$run"; scontrol requeue "$SLURM_JOB_ID"' TERM
wait "$run"
