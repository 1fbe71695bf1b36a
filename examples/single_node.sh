#!/usr/bin/env bash
# Pretrain a mixture-of-experts model on one node of 8 GPUs with MaxScore routing.
# Usage: examples/single_node.sh DATA_DIRECTORY [MORE MEGATRON ARGUMENTS]
# The directory is what megatron_maxscore prepare writes. With a Megatron-LM checkout, put its
# pretrain_gpt.py in place of examples/pretrain_gpt.py.
set -euo pipefail
DATA="${1:?usage: $0 DATA_DIRECTORY [MEGATRON ARGUMENTS]}"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CUDA_DEVICE_MAX_CONNECTIONS=1

torchrun --nproc-per-node "${GPUS:-8}" -m megatron_maxscore.launch examples/pretrain_gpt.py \
  --moe-router-type maxscore \
  --maxscore-scope local \
  --moe-token-dispatcher-type alltoall \
  --tensor-model-parallel-size 2 --sequence-parallel \
  --expert-model-parallel-size 8 --expert-tensor-parallel-size 1 \
  --num-layers 12 --hidden-size 768 --num-attention-heads 12 \
  --num-experts 16 --moe-router-topk 2 --moe-ffn-hidden-size 1536 --moe-router-dtype fp32 \
  --seq-length 2048 --max-position-embeddings 2048 --position-embedding-type rope \
  --normalization RMSNorm --swiglu --disable-bias-linear \
  --micro-batch-size 4 --global-batch-size 256 --train-iters 10000 --bf16 \
  --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 200 \
  --weight-decay 0.1 --clip-grad 1.0 --attention-dropout 0 --hidden-dropout 0 \
  --use-distributed-optimizer \
  --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DATA/tokenizer.model" \
  --train-data-path "$DATA/train_text_document" --valid-data-path "$DATA/valid_text_document" \
  --log-interval 10 --eval-interval 500 --eval-iters 20 "$@"
