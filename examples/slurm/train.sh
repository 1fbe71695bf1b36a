#!/usr/bin/env bash
# Pretrain a mixture-of-experts model on a Slurm allocation with MaxScore routing.
# Usage: sbatch --nodes 4 examples/slurm/train.sh DATA_DIRECTORY CHECKPOINT_DIRECTORY [MORE ARGUMENTS]
# The data directory is what megatron_maxscore prepare writes. With a Megatron-LM checkout, set
# SCRIPT=/path/to/its/pretrain_gpt.py.
#SBATCH --job-name=maxscore-train
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
DATA="${1:?usage: sbatch $0 DATA_DIRECTORY CHECKPOINT_DIRECTORY [MEGATRON ARGUMENTS]}"
CHECKPOINTS="${2:?usage: sbatch $0 DATA_DIRECTORY CHECKPOINT_DIRECTORY [MEGATRON ARGUMENTS]}"
shift 2
cd "${SLURM_SUBMIT_DIR:?submit with sbatch from the repository}"
source .venv/bin/activate
export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
RANKS_PER_NODE="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"

# If a rank dies, torchrun ends its node, srun the others; a rank that hangs ends after
# --distributed-timeout-minutes, and the log says in which phase the others waited for it.
srun --kill-on-bad-exit=1 python -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$RANKS_PER_NODE" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
  -m megatron_maxscore.launch "${SCRIPT:-examples/pretrain_gpt.py}" \
  --moe-router-type maxscore \
  --maxscore-scope local \
  --moe-token-dispatcher-type alltoall \
  --tensor-model-parallel-size 2 --sequence-parallel \
  --expert-model-parallel-size 8 --expert-tensor-parallel-size 1 \
  --num-layers 24 --hidden-size 2048 --num-attention-heads 16 \
  --num-experts 64 --moe-router-topk 8 --moe-ffn-hidden-size 1024 --moe-router-dtype fp32 \
  --seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope \
  --normalization RMSNorm --swiglu --disable-bias-linear \
  --micro-batch-size 1 --global-batch-size 256 --train-iters 20000 --bf16 \
  --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 500 \
  --weight-decay 0.1 --clip-grad 1.0 --attention-dropout 0 --hidden-dropout 0 \
  --use-distributed-optimizer --distributed-timeout-minutes 10 \
  --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DATA/tokenizer.model" \
  --train-data-path "$DATA/train_text_document" --valid-data-path "$DATA/valid_text_document" \
  --save "$CHECKPOINTS" --load "$CHECKPOINTS" --save-interval 500 --ckpt-format torch_dist \
  --log-interval 10 --eval-interval 500 --eval-iters 20 "$@"
