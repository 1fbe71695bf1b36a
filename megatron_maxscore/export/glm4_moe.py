"""GLM-4-MoE: sigmoid scores plus a bias choose, the scores normalised and scaled are the gates.

Source: transformers, ``models/glm4_moe/modeling_glm4_moe.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_maxscore.export.formats import (
    BIAS,
    OURS,
    THEIRS,
    WEIGHTS,
    Format,
    Need,
    Weight,
    common_config,
    expert_size,
    layer_arguments,
    routed_layers,
)

# Groups are ranked by the sum of so many scores, where Megatron takes k / --moe-router-group-topk.
_GROUP_SCORES = 2


def _further(args: Any) -> Iterator[str]:
    groups, topk = getattr(args, "moe_router_group_topk", None), args.moe_router_topk
    if groups and topk // groups != _GROUP_SCORES:
        yield (
            f"make --moe-router-group-topk {groups} half of --moe-router-topk {topk}, or leave it "
            "out"
        )
    routed = routed_layers(args)
    if routed != sorted(routed):
        yield "let layers without experts come first in --moe-layer-freq"


def _config(args: Any) -> dict[str, Any]:
    config = common_config(args)
    config["rope_parameters"]["partial_rotary_factor"] = args.rotary_percent
    shared = getattr(args, "moe_shared_expert_intermediate_size", None) or expert_size(args)
    groups = getattr(args, "moe_router_group_topk", None)
    return config | {
        "attention_bias": bool(args.add_qkv_bias),
        "attention_dropout": 0.0,
        "first_k_dense_replace": routed_layers(args).count(False),
        "n_group": args.moe_router_num_groups if groups else 1,
        "n_routed_experts": args.num_experts,
        "n_shared_experts": shared // expert_size(args),
        "norm_topk_prob": args.moe_router_topk > 1,
        "num_experts_per_tok": args.moe_router_topk,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": args.rotary_percent,
        "routed_scaling_factor": args.moe_router_topk_scaling_factor or 1.0,
        # Servers of this architecture never tie them.
        "tie_word_embeddings": False,
        "topk_group": groups or 1,
        "use_qk_norm": bool(args.qk_layernorm),
    }


def _arguments(config: dict[str, Any]) -> list[str]:
    rope = config.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    topk = config["num_experts_per_tok"]
    flags = [
        *("--num-experts", str(config["n_routed_experts"]), "--moe-router-topk", str(topk)),
        *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
        *("--moe-router-topk-scaling-factor", str(config["routed_scaling_factor"])),
        *("--rotary-percent", str(share)),
        *layer_arguments([layer >= dense for layer in range(layers)]),
    ]
    if config["norm_topk_prob"] != (topk > 1):
        raise ValueError("norm_topk_prob: Megatron normalises the gates if there are several")
    if config.get("n_group", 1) > 1:
        flags += ["--moe-router-num-groups", str(config["n_group"])]
        flags += ["--moe-router-group-topk", str(config["topk_group"])]
    if config["n_shared_experts"]:
        size = config["n_shared_experts"] * config["moe_intermediate_size"]
        flags += ["--moe-shared-expert-intermediate-size", str(size)]
    flags += ["--add-qkv-bias"] * config["attention_bias"]
    return flags + ["--qk-layernorm"] * config["use_qk_norm"]


GLM4_MOE = Format(
    name="glm4_moe",
    title="GLM-4-MoE",
    architecture="Glm4MoeForCausalLM",
    needs=(
        Need("moe_router_score_function", ("sigmoid",), "use --moe-router-score-function sigmoid"),
        Need("rotary_interleaved", (False, None)),
    ),
    score=torch.sigmoid,
    further=_further,
    weights=(
        *WEIGHTS,
        Weight(BIAS, (THEIRS + "mlp.gate.e_score_correction_bias",), "bias"),
        Weight(OURS + "self_attention.q_layernorm.weight", (THEIRS + "self_attn.q_norm.weight",)),
        Weight(OURS + "self_attention.k_layernorm.weight", (THEIRS + "self_attn.k_norm.weight",)),
    ),
    router_bias=(-1,),
    is_rotary_interleaved=False,
    needs_shared_expert=True,
    config=_config,
    arguments=_arguments,
)
