# Sourced by the scripts beside it: flags of the MaxScore paper's model sizes and of its routers.
# Shapes and optimiser settings are those of the code that the paper's authors released (16 experts,
# top-2, sequences of 512 tokens, 32,000 pieces of vocabulary, AdamW, constant learning rate). Ours
# are the number of attention heads, the shape of 317M, the batch, and the number of steps.

# paper_model SIZE: 162M, 317M, 599M or 1205M parameters that a token uses.
paper_model() {
  local layers hidden heads
  case "$1" in
    162M) layers=12 hidden=768 heads=12 ;;
    317M) layers=12 hidden=1128 heads=12 ;;
    599M) layers=12 hidden=1608 heads=12 ;;
    1205M) layers=16 hidden=2048 heads=16 ;;
    *) echo "error: unknown size $1; use 162M, 317M, 599M or 1205M" >&2; return 2 ;;
  esac
  echo "--num-layers $layers --hidden-size $hidden --num-attention-heads $heads" \
    "--moe-ffn-hidden-size $((2 * hidden)) --num-experts 16 --moe-router-topk 2" \
    "--moe-router-dtype fp32 --moe-token-dispatcher-type alltoall" \
    "--seq-length 512 --max-position-embeddings 512 --position-embedding-type rope" \
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights" \
    "--attention-dropout 0 --hidden-dropout 0 --bf16" \
    "--lr 3e-5 --lr-decay-style constant --lr-warmup-iters 2048" \
    "--adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0"
}

# paper_router ROUTER: maxscore, authors, gshard, dropless or deepseek.
paper_router() {
  local maxscore="--moe-router-type maxscore"
  case "$1" in
    # Our defaults.
    maxscore) echo "$maxscore --maxscore-scope local" ;;
    # Near the released code: a problem for each sequence, softmax (k softmax times 1/2), the smaller
    # gate annealed over 30,000 steps, an aux loss; but with the optimal assignment instead of
    # greedy, then Hungarian, and with the loss over both choices instead of the first.
    authors) echo "$maxscore --maxscore-scope sequence --maxscore-variant softmax" \
      "--maxscore-temperature 1 --maxscore-anneal-steps 30000 --moe-router-topk-scaling-factor 0.5" \
      "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2" ;;
    gshard) echo "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2" \
      "--moe-expert-capacity-factor 1.0" ;;
    dropless) echo "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2" ;;
    # DeepSeek-V3: sigmoid scores, a bias for each expert, a weak loss for each sequence.
    deepseek) echo "--moe-router-score-function sigmoid --moe-router-enable-expert-bias" \
      "--moe-router-bias-update-rate 1e-3" \
      "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4" ;;
    *)
      echo "error: unknown router $1; use maxscore, authors, gshard, dropless or deepseek" >&2
      return 2
      ;;
  esac
}
