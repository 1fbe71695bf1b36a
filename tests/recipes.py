"""Megatron-LM's published MoE recipes, as command lines.

``recipes.json`` has their MoE, parallelism, precision, graph and recompute arguments; what else a
launch needs, and what is not told there, is added here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

DATA = json.loads((Path(__file__).parent / "recipes.json").read_text())
# A flag for benchmarks, which replaces the router's logits by random ones.
BENCHMARK = "moe_router_force_load_balancing"
# What the data leave out.
_OTHERS = (
    "--num-attention-heads 32 --bf16 --transformer-impl transformer_engine --lr 1e-4 "
    "--train-iters 10 --use-distributed-optimizer --tokenizer-type NullTokenizer "
    "--vocab-size 32000 --mock-data --position-embedding-type rope --normalization RMSNorm "
    "--swiglu --disable-bias-linear --no-check-for-nan-in-loss-and-grad "
    "--attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights"
).split()

_SPLIT = "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
# Where neither a layout nor a virtual pipeline is told, and layers do not divide.
_PIPELINES = {
    ("deepseek_v3", 16): "--decoder-last-pipeline-num-layers 1",
    ("qwen3_235b", 4): f"{_SPLIT} --num-virtual-stages-per-pipeline-rank 12",
    ("qwen3_235b", 8): f"{_SPLIT} --num-virtual-stages-per-pipeline-rank 4",
}
# Values that the branch ``dev`` alone knows; flags that it alone knows are skipped by ``check``.
DEV_ONLY = {"recompute_modules": {"mhc"}}

RECIPES = {recipe["name"]: recipe["args"] for recipe in DATA["recipes"]}


def ranks_of(name: str) -> int:
    """Return how many GPUs a recipe is for."""
    found = re.search(r"_(\d+)GPU", name)
    assert found is not None
    return int(found[1])


def command_of(name: str) -> list[str]:
    """Return a recipe's arguments, without the flag for benchmarks."""
    given = RECIPES[name]
    command: list[str] = []
    for key, value in given.items():
        if key == BENCHMARK or value is False:
            continue
        command.append("--" + key.replace("_", "-"))
        if value is True:
            continue
        if isinstance(value, str) and key in ("recompute_modules", "cuda_graph_scope"):
            value = value.split()
        if isinstance(value, list):
            value = [item for item in value if item not in DEV_ONLY.get(key, ())]
        command += map(str, value) if isinstance(value, list) else [str(value)]
    length = given["seq_length"]
    batch = 64 * ranks_of(name) * given["micro_batch_size"]
    pipeline = ""
    if "pipeline_model_parallel_layout" not in given:
        key = name.split("/")[0], given["pipeline_model_parallel_size"]
        pipeline = _PIPELINES.get(key, "")
    sizes = ["--max-position-embeddings", str(length), "--global-batch-size", str(batch)]
    return [*command, *_OTHERS, *pipeline.split(), *sizes]
