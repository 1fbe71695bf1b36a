"""The launch scripts of examples/recipes, as command lines."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parents[1] / "examples" / "recipes"
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.sh") if path.stem != "common")
RANKS = {
    "deepseek_v3": 1024, "glm_4_5": 512, "gpt_oss_120b": 64, "qwen3_235b": 128, "qwen3_30b": 16,
}  # fmt: skip
DATA = ["--tokenizer-type", "NullTokenizer", "--mock-data"]
# Flags that need a GPU, and how many values they have.
_GPU_ONLY = {
    "--bf16": 0, "--moe-grouped-gemm": 0, "--moe-permute-fusion": 0, "--cuda-graph-impl": 1,
    "--cuda-graph-modules": 3, "--multi-latent-attention": 0, "--qk-layernorm": 0,
    "--overlap-grad-reduce": 0, "--overlap-param-gather": 0, "--recompute-granularity": 1,
    "--recompute-modules": 2,
}  # fmt: skip
_SMALL = (
    "--hidden-size 64 --ffn-hidden-size 64 --moe-ffn-hidden-size 32 --num-attention-heads 8 "
    "--num-query-groups 4 --kv-channels 8 --seq-length 64 --max-position-embeddings 64 "
    "--vocab-size 127 --micro-batch-size 2 --global-batch-size 8 --num-workers 0 --seed 7 "
    "--lr 1e-2 --lr-warmup-iters 0 --lr-decay-style constant --train-iters 4 --log-interval 1 "
    "--eval-interval 1000 --eval-iters 2 --split 80,10,10 --distributed-timeout-minutes 2 "
    "--moe-shared-expert-intermediate-size 32 --expert-model-parallel-size 2 "
    "--pipeline-model-parallel-size 1"
).split()


def command_of(name: str) -> list[str]:
    """Return the arguments of a recipe's script."""
    done = subprocess.run(
        ["bash", DIRECTORY / f"{name}.sh", *DATA],
        env={**os.environ, "LAUNCH": "printf %s\\n"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()[1:]


def small_command_of(name: str) -> list[str]:
    """Return them scaled down: 2 layers, small sizes, the same MoE flags, for the CPU."""
    given = command_of(name)
    kept: list[str] = []
    place = 0
    while place < len(given):
        flag = given[place]
        if flag in _GPU_ONLY:
            place += 1 + _GPU_ONLY[flag]
            continue
        kept.append(flag)
        place += 1
    has = set(kept)
    small = list(_SMALL)
    for flag in ("--num-query-groups", "--kv-channels", "--moe-shared-expert-intermediate-size"):
        if flag not in has:
            at = small.index(flag)
            del small[at : at + 2]
    layers = ["--num-layers", "2"]
    for flag in ("--moe-layer-freq", "--decoder-last-pipeline-num-layers"):
        if flag in has:
            at = kept.index(flag)
            del kept[at : at + 2]
    for flag in ("--q-lora-rank", "--kv-lora-rank", "--qk-head-dim", "--qk-pos-emb-head-dim",
                 "--v-head-dim"):  # fmt: skip
        if flag in has:
            at = kept.index(flag)
            del kept[at : at + 2]
    return [*kept, *small, *layers]
