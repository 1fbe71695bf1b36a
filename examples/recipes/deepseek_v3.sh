#!/usr/bin/env bash
# DeepSeek-V3 (671B) on 1,024 GPUs: sigmoid gates, expert bias, groups of experts, one MTP layer.
# Usage: DATA=data NNODES=128 NODE_RANK=... MASTER_ADDR=... deepseek_v3.sh [MORE MEGATRON ARGUMENTS]
set -euo pipefail
# shellcheck source=examples/recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

start \
  --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 \
  --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 \
  --qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm \
  --seq-length 4096 --max-position-embeddings 4096 --vocab-size 129280 \
  --num-experts 256 --moe-layer-freq '([0]*3+[1]*58)' --moe-ffn-hidden-size 2048 \
  --moe-shared-expert-intermediate-size 2048 --moe-router-topk 8 \
  --moe-router-score-function sigmoid --moe-router-enable-expert-bias \
  --moe-router-num-groups 8 --moe-router-group-topk 4 --moe-router-topk-scaling-factor 2.5 \
  --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4 \
  --mtp-num-layers 1 --mtp-loss-scaling-factor 0.1 \
  --pipeline-model-parallel-size 16 --decoder-last-pipeline-num-layers 1 \
  --expert-model-parallel-size 64 \
  --micro-batch-size 1 --global-batch-size 8192 \
  --recompute-granularity selective --recompute-modules mla_up_proj mlp "$@"
