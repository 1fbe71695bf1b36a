"""What the formats have in common: which models they hold, and the names of weights.

A format is chosen by Megatron's arguments alone, so a dry run can name it before training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Need:
    """What an argument of Megatron's must be.

    Attributes:
        name: of the argument.
        values: what it may be. An argument that a release does not know is as its first value.
        fix: what mends it; "" leaves the flag out.
    """

    name: str
    values: tuple[Any, ...]
    fix: str = ""

    def unmet(self, args: Any) -> str | None:
        """Return what mends arguments that do not meet it, None if they do."""
        value = getattr(args, self.name, self.values[0])
        if value in self.values:
            return None
        shown = "" if isinstance(value, bool) else " ".join(map(str, _listed(value)))
        if self.fix:
            return f"{self.fix} (it is {shown})" if shown else self.fix
        return f"leave out --{self.name.replace('_', '-')} {shown}".strip()


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


@dataclass(frozen=True)
class Weight:
    """A weight in both models.

    Attributes:
        ours: its name in Megatron's model, with {layer} and {expert}.
        theirs: its names in the exported model.
        kind: how the two are related. same: equal. vocabulary: theirs lacks the rows that pad the
            vocabulary. halves: ours is their two weights, stacked. qkv: ours has, for each group of
            heads, the queries, one key and one value. bias: the router's bias, in float32 and in
            any shape.
    """

    ours: str
    theirs: tuple[str, ...]
    kind: Literal["same", "vocabulary", "halves", "qkv", "bias"] = "same"


@dataclass(frozen=True)
class Format:
    """An architecture of transformers.

    Attributes:
        name: its ``model_type``.
        title: for people.
        architecture: the class in transformers.
        needs: of Megatron's arguments.
        score: makes scores of (..., E) logits.
        further: returns what else would have to change.
        weights: their names.
        router_bias: the shape of the bias that is added to scores.
        is_rotary_interleaved: whether rotary embeddings rotate neighbours, or halves of a head.
        needs_shared_expert: whether every layer has one.
        config: makes the content of config.json out of Megatron's arguments.
        arguments: makes Megatron's arguments, besides the common ones, out of config.json.
    """

    name: str
    title: str
    architecture: str
    needs: tuple[Need, ...]
    score: Callable[[Tensor], Tensor]
    further: Callable[[Any], Iterator[str]]
    weights: tuple[Weight, ...]
    router_bias: tuple[int, ...]
    is_rotary_interleaved: bool
    needs_shared_expert: bool
    config: Callable[[Any], dict[str, Any]]
    arguments: Callable[[dict[str, Any]], list[str]]

    def reasons(self, args: Any) -> list[str]:
        """Return what would have to change for it to hold a model exactly; empty if it can.

        Args:
            args: Megatron's, as they are parsed or later.
        """
        if args.num_experts is None or not any(routed_layers(args)):
            return ["add --num-experts, and let --moe-layer-freq have layers with experts"]
        found = [need.unmet(args) for need in self.needs]
        return [reason for reason in found if reason] + list(self.further(args))


def common_reasons(args: Any) -> list[str]:
    """Return what would have to change for any format."""
    found = [need.unmet(args) for need in COMMON]
    return [
        *(reason for reason in found if reason), *_routing_reasons(args), *_shape_reasons(args)
    ]  # fmt: skip


# Of Megatron's arguments, for any format.
COMMON = (
    Need("normalization", ("RMSNorm",), "use --normalization RMSNorm"),
    Need("swiglu", (True,), "add --swiglu"),
    Need("add_bias_linear", (False,), "add --disable-bias-linear"),
    *(
        Need(name, values)
        for name, values in (
            ("multi_latent_attention", (False, None)),
            ("apply_layernorm_1p", (False, None)),
            ("use_rope_scaling", (False, None)),
            ("rotary_seq_len_interpolation_factor", (None, 1)),
            ("qk_l2_norm", (False, None)),
            ("moe_mlp_glu_interleave_size", (None,)),
            ("moe_shared_expert_glu_interleave_size", (None,)),
            ("no_rope_freq", (None,)),
            ("window_size", (None,)),
            ("attention_output_gate", (False, None)),
            ("softmax_type", ("vanilla", None)),
            ("experimental_attention_variant", (None,)),
            ("apply_residual_connection_post_layernorm", (False, None)),
            ("glu_linear_offset", (0.0, None)),
            ("activation_func_clamp_value", (None,)),
            ("use_mup", (False, None)),
            ("heterogeneous_layers_config_path", (None,)),
            ("heterogeneous_layers_config_encoded_json", (None,)),
            ("hybrid_layer_pattern", (None,)),
            ("hybrid_override_pattern", (None,)),
            ("moe_shared_expert_gate", (False, None)),
            ("moe_latent_size", (None,)),
            ("moe_n_hash_layers", (None, 0)),
            ("moe_apply_probs_on_input", (False, None)),
            ("moe_expert_capacity_factor", (None,)),
        )
    ),
)


def _routing_reasons(args: Any) -> Iterator[str]:
    """Say what would have to change for a served model to route by prices as this one does."""
    if getattr(args, "moe_router_type", "topk") == "topk":
        for name in _listed(getattr(args, "moe_router_load_balancing_type", None)):
            if name in ("sinkhorn", "quantile_balancing"):
                yield (
                    "use --moe-router-load-balancing-type none, or an auxiliary loss (it is "
                    f"{name})"
                )
        return
    # Not above: it imports Megatron, before which CPU mode must be there.
    from megatron_maxscore.moe.config import MaxScoreConfig

    options = MaxScoreConfig.from_transformer_config(args).resolved_for(args)
    found = [
        text
        for text, applies in (
            ("gates are SoftTopk", options.gate != "score"),
            ("prices are of logits", options.objective != "scores"),
        )
        if applies
    ]
    if found:
        yield f"add --maxscore-preset servable ({', '.join(found)})"


def _shape_reasons(args: Any) -> Iterator[str]:
    """Say what of positions and experts' sizes would have to change."""
    is_rotary = args.position_embedding_type == "rope"
    if not is_rotary and not getattr(args, "use_rotary_position_embeddings", False):
        yield f"use --position-embedding-type rope (it is {args.position_embedding_type})"
    shared = getattr(args, "moe_shared_expert_intermediate_size", None)
    if shared and shared % expert_size(args):
        yield (
            f"make --moe-shared-expert-intermediate-size {shared} a multiple of "
            f"--moe-ffn-hidden-size {expert_size(args)}"
        )


def expert_size(args: Any) -> int:
    """Return the hidden size of an expert, also before Megatron fills in what is not given."""
    given = getattr(args, "moe_ffn_hidden_size", None) or args.ffn_hidden_size
    return int(given or args.hidden_size * 4 * 2 // 3 // 64 * 64)


def head_size(args: Any) -> int:
    """Return the channels of an attention head."""
    return int(args.kv_channels or args.hidden_size // args.num_attention_heads)


def query_groups(args: Any) -> int:
    """Return how many heads have keys of their own."""
    grouped = getattr(args, "group_query_attention", False)
    return int(args.num_query_groups if grouped else args.num_attention_heads)


def routed_layers(args: Any) -> list[bool]:
    """Return for each layer whether it has experts."""
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(args.num_layers)]
    return [bool(is_routed) for is_routed in frequency]


def common_config(args: Any) -> dict[str, Any]:
    """Return what config.json says in every format.

    The rotary base and the dtype are there in two spellings: that of transformers 5, and that of
    transformers 4, which is also the one of servers that read its files.
    """
    dtype = str(args.params_dtype).removeprefix("torch.")
    return {
        "dtype": dtype,
        "torch_dtype": dtype,
        "head_dim": head_size(args),
        "hidden_act": "silu",
        "hidden_size": args.hidden_size,
        "initializer_range": args.init_method_std,
        "intermediate_size": args.ffn_hidden_size,
        "max_position_embeddings": args.max_position_embeddings,
        "moe_intermediate_size": expert_size(args),
        "num_attention_heads": args.num_attention_heads,
        "num_hidden_layers": args.num_layers,
        "num_key_value_heads": query_groups(args),
        "rms_norm_eps": args.layernorm_epsilon,
        "rope_parameters": {"rope_theta": float(args.rotary_base), "rope_type": "default"},
        "rope_theta": float(args.rotary_base),
        "use_cache": True,
    }


def common_arguments(config: dict[str, Any]) -> list[str]:
    """Return Megatron's arguments for what config.json says in every format.

    Raises:
        ValueError: Megatron's layers have no place for something; names it.
    """
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default" or config.get("rope_scaling"):
        raise ValueError(f"rope_parameters of type {kind}: only default ones can be imported")
    if config.get("hidden_act") != "silu":
        raise ValueError(f"hidden_act {config.get('hidden_act')}: only silu can be imported")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    pairs = {
        "num-layers": config["num_hidden_layers"],
        "hidden-size": config["hidden_size"],
        "ffn-hidden-size": config["intermediate_size"],
        "moe-ffn-hidden-size": config["moe_intermediate_size"],
        "num-attention-heads": config["num_attention_heads"],
        "kv-channels": config.get("head_dim")
        or config["hidden_size"] // config["num_attention_heads"],
        "max-position-embeddings": config["max_position_embeddings"],
        "norm-epsilon": config["rms_norm_eps"],
        "init-method-std": config.get("initializer_range", 0.02),
        "rotary-base": int(rope.get("rope_theta") or config.get("rope_theta") or 10000),
        "position-embedding-type": "rope",
        "normalization": "RMSNorm",
    }
    flags = [text for name, value in pairs.items() for text in (f"--{name}", str(value))]
    flags += ["--swiglu", "--disable-bias-linear"]
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    if groups and groups != heads:
        flags += ["--group-query-attention", "--num-query-groups", str(groups)]
    if not config.get("tie_word_embeddings", False):
        flags.append("--untie-embeddings-and-output-weights")
    if dtype in ("bfloat16", "float16"):
        # Served models compute the router's scores in float32.
        flags += ["--bf16" if dtype == "bfloat16" else "--fp16", "--moe-router-dtype", "fp32"]
    return flags


def layer_arguments(routed: list[bool]) -> list[str]:
    """Return Megatron's arguments for which layers have experts."""
    # Where all have them the flag is left out: with it checkpoints name every layer.
    return (
        [] if all(routed) else ["--moe-layer-freq", str([int(r) for r in routed]).replace(" ", "")]
    )


# Names of a layer's weights begin so, in Megatron's model and in the exported one.
OURS, THEIRS = "decoder.layers.{layer}.", "model.layers.{layer}."
_QKV = ("q", "k", "v")


def feed_forward(ours: str, theirs: str) -> tuple[Weight, Weight]:
    """Return the weights of a gated feed-forward network."""
    ours, theirs = OURS + ours, THEIRS + theirs
    first = (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")
    return (
        Weight(f"{ours}.linear_fc1.weight", first, "halves"),
        Weight(f"{ours}.linear_fc2.weight", (f"{theirs}.down_proj.weight",)),
    )


# Of a decoder like Llama's, with experts.
WEIGHTS = (
    Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"),
    Weight("output_layer.weight", ("lm_head.weight",), "vocabulary"),
    Weight("decoder.final_layernorm.weight", ("model.norm.weight",)),
    *(
        Weight(OURS + ours, (THEIRS + theirs,))
        for ours, theirs in (
            ("input_layernorm.weight", "input_layernorm.weight"),
            ("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
            ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
            ("mlp.router.weight", "mlp.gate.weight"),
        )
    ),
    *(
        Weight(
            f"{OURS}self_attention.linear_qkv.{part}",
            tuple(f"{THEIRS}self_attn.{name}_proj.{part}" for name in _QKV),
            "qkv",
        )
        for part in ("weight", "bias")
    ),
    *feed_forward("mlp", "mlp"),
    *feed_forward("mlp.shared_experts", "mlp.shared_experts"),
    *feed_forward("mlp.experts.local_experts.{expert}", "mlp.experts.{expert}"),
)
# The name that :mod:`weights` gives to what a router adds to its scores.
BIAS = f"{OURS}mlp.router.bias"
