#!/usr/bin/env bash
# Qwen3-30B-A3B on 16 GPUs.
# Usage: DATA=data NNODES=2 NODE_RANK=... MASTER_ADDR=... qwen3_30b.sh [MORE MEGATRON ARGUMENTS]
set -euo pipefail
# shellcheck source=examples/recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

start \
  --num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 32 \
  --group-query-attention --num-query-groups 4 --kv-channels 128 --qk-layernorm \
  --rotary-base 1000000 \
  --seq-length 4096 --max-position-embeddings 4096 --vocab-size 151936 \
  --num-experts 128 --moe-ffn-hidden-size 768 --moe-router-topk 8 \
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3 \
  --expert-model-parallel-size 16 \
  --micro-batch-size 4 --global-batch-size 1024 "$@"
