#!/usr/bin/env bash
# The shape of gpt-oss-120b on 64 GPUs; its attention has windows and sinks besides.
# Usage: DATA=data NNODES=8 NODE_RANK=... MASTER_ADDR=... gpt_oss_120b.sh [MORE MEGATRON ARGUMENTS]
set -euo pipefail
# shellcheck source=examples/recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

start \
  --num-layers 36 --hidden-size 2880 --num-attention-heads 64 \
  --group-query-attention --num-query-groups 8 --kv-channels 64 --rotary-base 150000 \
  --seq-length 4096 --max-position-embeddings 4096 --vocab-size 201088 \
  --num-experts 128 --moe-ffn-hidden-size 2880 --moe-router-topk 4 \
  --expert-model-parallel-size 32 \
  --micro-batch-size 1 --global-batch-size 1024 "$@"
