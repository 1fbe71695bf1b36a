#!/usr/bin/env bash
# Run the distributed tests over the GPUs of a Slurm allocation, one rank per GPU.
# Usage: sbatch --nodes 1 --gpus-per-node 4 examples/slurm/tests.sh [PYTEST ARGUMENTS]
# Cases fit 2, 4 or 8 ranks; those for other numbers are skipped. BACKEND=gloo runs them on CPUs,
# RANKS_PER_NODE of them on each node.
#SBATCH --job-name=maxscore-tests
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=00:30:00
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit with sbatch from the repository}"
source .venv/bin/activate
export OMP_NUM_THREADS=1
BACKEND="${BACKEND:-nccl}"
RANKS_PER_NODE="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"

# Every node runs one torchrun; they meet on the first node.
srun --kill-on-bad-exit=1 python -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$RANKS_PER_NODE" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
  -m pytest tests/dist --backend "$BACKEND" -q "$@"
