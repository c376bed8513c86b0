#!/bin/bash
# Train Gemma 2 27b on two machines of eight GPUs each, with Slurm:
#
#     MODEL=google/gemma-2-27b DATA=texts.jsonl OUT=runs/27b \
#         sbatch examples/slurm-train.sh --rows 128 --length 8192 --steps 2000 --optimizer muon
#
# OUT has to be on a disk that all machines share. What follows the script's name goes to `cabochon train pretrain`.
# A run that ended for whatever reason goes on when the same line is given again; Slurm does that itself after a
# machine has failed (--requeue).
#SBATCH --job-name=cabochon
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# 90 s before the time is over: each process then ends its step, saves and leaves. torchrun gives it 30 s.
#SBATCH --signal=TERM@90
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:29500" \
    -m cabochon train pretrain "$MODEL" \
    --data "$DATA" \
    --out "$OUT" \
    --micro-rows 1 \
    --recompute \
    --save-every 100 \
    --sharded-checkpoints \
    "$@"
