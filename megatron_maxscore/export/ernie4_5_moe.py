"""ERNIE 4.5: softmax scores plus a bias choose, the scores normalised over the chosen are gates.

Source: transformers, ``models/ernie4_5_moe/modeling_ernie4_5_moe.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_maxscore.export.formats import (
    BIAS,
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


def _further(args: Any) -> Iterator[str]:
    first, interval, last = _pattern(args)
    places = range(args.num_layers)
    held = [(i + 1) % interval == 0 and first <= i <= last for i in places]
    if held != routed_layers(args):
        yield (
            "give layers with experts one distance in --moe-layer-freq; if it is n, the number of "
            "the first of them, counted from 1, must be a multiple of n"
        )


def _pattern(args: Any) -> tuple[int, int, int]:
    """Return the first layer with experts, their distance, and the last one."""
    routed = [i for i, is_routed in enumerate(routed_layers(args)) if is_routed]
    interval = routed[1] - routed[0] if len(routed) > 1 else 1
    return routed[0], interval, routed[-1]


def _config(args: Any) -> dict[str, Any]:
    first, interval, last = _pattern(args)
    shared = getattr(args, "moe_shared_expert_intermediate_size", None) or 0
    return common_config(args) | {
        "moe_k": args.moe_router_topk,
        "moe_layer_end_index": last,
        "moe_layer_interval": interval,
        "moe_layer_start_index": first,
        "moe_norm_min": 1e-12,
        "moe_num_experts": args.num_experts,
        "moe_num_shared_experts": shared // expert_size(args),
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "use_bias": False,
    }


def _arguments(config: dict[str, Any]) -> list[str]:
    if config.get("use_bias"):
        raise ValueError("use_bias: biases of all projections have no place in Megatron's layers")
    first, interval, last = (
        config[f"moe_layer_{name}"] for name in ("start_index", "interval", "end_index")
    )
    layers = config["num_hidden_layers"]
    last = layers - 1 if last == -1 else last
    routed = [(i + 1) % interval == 0 and first <= i <= last for i in range(layers)]
    flags = [
        *("--num-experts", str(config["moe_num_experts"])),
        *("--moe-router-topk", str(config["moe_k"]), "--moe-router-score-function", "softmax"),
        *layer_arguments(routed),
    ]
    if config["moe_num_shared_experts"]:
        size = config["moe_num_shared_experts"] * config["moe_intermediate_size"]
        flags += ["--moe-shared-expert-intermediate-size", str(size)]
    return flags


ERNIE4_5_MOE = Format(
    name="ernie4_5_moe",
    title="ERNIE 4.5",
    architecture="Ernie4_5_MoeForCausalLM",
    needs=(
        Need("moe_router_score_function", ("softmax",), "use --moe-router-score-function softmax"),
        Need("moe_router_pre_softmax", (False, None)),
        Need("moe_router_topk_scaling_factor", (None, 1.0)),
        Need("moe_router_group_topk", (None,)),
        Need("add_qkv_bias", (False, None)),
        Need("qk_layernorm", (False, None)),
        Need("rotary_percent", (1.0,), "use --rotary-percent 1.0"),
    ),
    score=lambda logits: logits.softmax(-1),
    further=_further,
    weights=(
        *WEIGHTS,
        Weight(BIAS, (THEIRS + "mlp.moe_statics.e_score_correction_bias",), "bias"),
    ),
    router_bias=(1, -1),
    is_rotary_interleaved=True,
    needs_shared_expert=False,
    config=_config,
    arguments=_arguments,
)
