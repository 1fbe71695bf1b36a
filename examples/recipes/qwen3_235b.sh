#!/usr/bin/env bash
# Qwen3-235B-A22B on 128 GPUs, with CUDA graphs of attention, router and dispatch preparation.
# Usage: DATA=data NNODES=16 NODE_RANK=... MASTER_ADDR=... qwen3_235b.sh [MORE MEGATRON ARGUMENTS]
set -euo pipefail
# shellcheck source=examples/recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

start \
  --num-layers 94 --hidden-size 4096 --ffn-hidden-size 12288 --num-attention-heads 64 \
  --group-query-attention --num-query-groups 4 --kv-channels 128 --qk-layernorm \
  --rotary-base 1000000 \
  --seq-length 4096 --max-position-embeddings 4096 --vocab-size 151936 \
  --num-experts 128 --moe-ffn-hidden-size 1536 --moe-router-topk 8 \
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3 \
  --expert-model-parallel-size 64 \
  --micro-batch-size 1 --global-batch-size 2048 \
  --cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router moe_preprocess "$@"
