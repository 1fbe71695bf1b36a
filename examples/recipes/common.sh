# Sourced by the recipes: starts Megatron's script with the flags of a recipe.
#
# LAUNCH    command before the script; by default torchrun on every node, with NNODES, NODE_RANK and
#           MASTER_ADDR as torchrun takes them
# SCRIPT    Megatron-LM's pretrain_gpt.py; by default the one that comes with the package
# DATA      directory that python -m megatron_maxscore prepare has written

# Of every recipe: precision, loss, data.
COMMON=(
  --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
  --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
  --lr 2e-4 --min-lr 2e-5 --lr-decay-style cosine --lr-warmup-iters 500 --train-iters 20000
  --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --log-interval 10
)

# The MoE layer: dispatch by HybridEP, and MaxScore in the router's place.
MOE=(
  --moe-router-type maxscore --moe-router-dtype fp32
  --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep
  --moe-grouped-gemm --moe-permute-fusion
)

start() {
  local data=("$@")
  if [[ -n "${DATA:-}" ]]; then
    data+=(
      --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DATA/tokenizer.model"
      --train-data-path "$DATA/train_text_document" --valid-data-path "$DATA/valid_text_document"
    )
  fi
  local torchrun="torchrun --nproc-per-node 8 --nnodes ${NNODES:-1} --node-rank ${NODE_RANK:-0}"
  torchrun+=" --master-addr ${MASTER_ADDR:-localhost} -m megatron_maxscore.launch"
  # shellcheck disable=SC2086
  exec ${LAUNCH:-$torchrun} "${SCRIPT:-pretrain_gpt}" "${COMMON[@]}" "${MOE[@]}" "${data[@]}"
}
