#!/usr/bin/env bash
# Pretrain one of the MaxScore paper's models with one of its routers, on one node or several.
# Usage: examples/paper/train.sh SIZE ROUTER DATA_DIRECTORY CHECKPOINT_DIRECTORY [MEGATRON ARGUMENTS]
#   SIZE    162M, 317M, 599M or 1205M
#   ROUTER  maxscore, authors, gshard, dropless or deepseek
# The data directory is what megatron_maxscore prepare --vocab-size 32000 writes. On several nodes start it
# on each with NNODES, NODE_RANK and MASTER_ADDR set; examples/paper/slurm.sh does so. GPUS (8),
# EXPERT_PARALLEL (as many), MICRO_BATCH (16), GLOBAL_BATCH (512, a multiple of MICRO_BATCH times all
# GPUs) and STEPS (30000, more than 2,048 of warm-up) may be set, and
# SCRIPT=/path/to/your/pretrain_gpt.py for a Megatron-LM checkout.
set -euo pipefail
USAGE="usage: $0 SIZE ROUTER DATA_DIRECTORY CHECKPOINT_DIRECTORY [MEGATRON ARGUMENTS]"
SIZE="${1:?$USAGE}" ROUTER="${2:?$USAGE}" DATA="${3:?$USAGE}" CHECKPOINTS="${4:?$USAGE}"
shift 4
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=examples/paper/flags.sh
source examples/paper/flags.sh
MODEL="$(paper_model "$SIZE")"
CHOICE="$(paper_router "$ROUTER")"
export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
GPUS="${GPUS:-8}"

# shellcheck disable=SC2086 # flags are words
python -m torch.distributed.run --nproc-per-node "$GPUS" --nnodes "${NNODES:-1}" \
  --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-localhost}" \
  --master-port "${MASTER_PORT:-29500}" \
  -m megatron_maxscore.launch "${SCRIPT:-examples/pretrain_gpt.py}" $MODEL $CHOICE \
  --expert-model-parallel-size "${EXPERT_PARALLEL:-$GPUS}" --use-distributed-optimizer \
  --micro-batch-size "${MICRO_BATCH:-16}" --global-batch-size "${GLOBAL_BATCH:-512}" \
  --train-iters "${STEPS:-30000}" \
  --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DATA/tokenizer.model" \
  --train-data-path "$DATA/train_text_document" --valid-data-path "$DATA/valid_text_document" \
  --save "$CHECKPOINTS" --load "$CHECKPOINTS" --save-interval 1000 --ckpt-format torch_dist \
  --distributed-timeout-minutes 10 --log-interval 10 --eval-interval 1000 --eval-iters 20 "$@"
