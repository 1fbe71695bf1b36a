#!/usr/bin/env bash
# examples/paper/train.sh on every node of a Slurm allocation.
# Usage: sbatch --nodes 4 examples/paper/slurm.sh SIZE ROUTER DATA_DIRECTORY CHECKPOINT_DIRECTORY [...]
#SBATCH --job-name=maxscore-paper
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit with sbatch from the repository}"
source .venv/bin/activate
NNODES="$SLURM_NNODES"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
GPUS="${GPUS:-${SLURM_GPUS_ON_NODE:-8}}"
export NNODES MASTER_ADDR GPUS
# NODE_RANK differs from node to node.
srun --kill-on-bad-exit=1 \
  bash -c 'NODE_RANK="$SLURM_NODEID" exec bash examples/paper/train.sh "$@"' train.sh "$@"
