#!/usr/bin/env bash
# GLM-4.5 (355B) on 512 GPUs: sigmoid gates, expert bias, one shared expert, one MTP layer.
# Usage: DATA=data NNODES=64 NODE_RANK=... MASTER_ADDR=... glm_4_5.sh [MORE MEGATRON ARGUMENTS]
set -euo pipefail
# shellcheck source=examples/recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

start \
  --num-layers 92 --hidden-size 5120 --ffn-hidden-size 12288 --num-attention-heads 96 \
  --group-query-attention --num-query-groups 8 --kv-channels 128 --qk-layernorm --add-qkv-bias \
  --rotary-base 1000000 --rotary-percent 0.5 \
  --seq-length 4096 --max-position-embeddings 4096 --vocab-size 151552 \
  --num-experts 160 --moe-layer-freq '([0]*3+[1]*89)' --moe-ffn-hidden-size 1536 \
  --moe-shared-expert-intermediate-size 1536 --moe-router-topk 8 \
  --moe-router-score-function sigmoid --moe-router-enable-expert-bias \
  --moe-router-topk-scaling-factor 2.5 \
  --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4 \
  --mtp-num-layers 1 --mtp-loss-scaling-factor 0.3 \
  --pipeline-model-parallel-size 4 --expert-model-parallel-size 32 \
  --micro-batch-size 1 --global-batch-size 4096 \
  --recompute-granularity selective --recompute-modules moe_act layernorm "$@"
