"""What MaxScore routing cannot be combined with."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization

from megatron_maxscore.flow import MAX_EXPERTS
from megatron_maxscore.flow.certified import MAX_EXPERTS as MAX_DEVICE_EXPERTS
from megatron_maxscore.moe.capture import holds_dispatch, holds_router
from megatron_maxscore.moe.config import VARIABLE_LENGTHS, MaxScoreConfig
from megatron_maxscore.moe.recording import parse_numbers
from megatron_maxscore.releases import graph_of


def check_transformer_config(config: Any, options: MaxScoreConfig) -> None:
    """Refuse combinations that cannot work.

    Args:
        config: a TransformerConfig, or Megatron's parsed arguments.
        options: MaxScore's own options.

    Raises:
        ValueError: names both flags and the nearest supported choice.
    """

    def get(*names: str) -> Any:
        return next(
            (getattr(config, n) for n in names if getattr(config, n, None) is not None), None
        )

    options = options.resolved_for(config)
    num_experts, topk = get("num_moe_experts", "num_experts"), get("moe_router_topk")
    who = "--moe-router-type maxscore"
    if num_experts is None:
        raise ValueError(f"{who} needs experts; add --num-experts")
    if topk is None or not 1 <= topk <= num_experts:
        raise ValueError(
            f"--moe-router-topk {topk} must lie between 1 and --num-experts {num_experts}: a token "
            "takes so many distinct experts"
        )
    if num_experts > MAX_EXPERTS:
        raise ValueError(
            f"{who} takes at most {MAX_EXPERTS} experts, --num-experts is {num_experts}; lower it, "
            "or use --moe-router-type topk"
        )
    balancing = get("moe_router_load_balancing_type")
    for name in [balancing] if isinstance(balancing, str) else balancing or []:
        if name in ("sinkhorn", "quantile_balancing"):
            raise ValueError(
                f"{who} cannot be combined with --moe-router-load-balancing-type {name}, which "
                "routes by itself; use none or an auxiliary loss"
            )
    if get("moe_expert_capacity_factor") is not None:
        raise ValueError(
            f"{who} cannot be combined with --moe-expert-capacity-factor, which drops tokens; "
            "use --maxscore-capacity-factor"
        )
    refused = (
        ("moe_pad_expert_input_to_capacity", "splits are static already, leave it out"),
        ("batch_invariant_mode", "leave it out"),
        ("use_megatron_fsdp", "use --use-distributed-optimizer"),
        ("use_torch_fsdp2", "use --use-distributed-optimizer"),
    )
    for name, fix in refused:
        if get(name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{who} cannot be combined with {flag}; {fix}")
    _check_groups(topk, num_experts, get)
    if (get("context_parallel_size") or 1) > 1 and get("transformer_impl") == "local":
        raise ValueError(
            f"{who} cannot be combined with --context-parallel-size {get('context_parallel_size')} "
            "and --transformer-impl local, whose attention Megatron does not split; use "
            "--transformer-impl transformer_engine"
        )
    for name in (*VARIABLE_LENGTHS, "sft"):
        if options.scope == "sequence" and get(name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"--maxscore-scope sequence cannot be combined with {flag}, which packs sequences; "
                "use --maxscore-scope group or local"
            )
    score_function = get("moe_router_score_function")
    _check_gates_can_learn(topk, num_experts, score_function, get, options)
    if options.record_layers is not None:
        layers = (get("num_layers") or 0) + (get("mtp_num_layers") or 0)
        numbers = [n for part in parse_numbers(options.record_layers) for n in (part[0], part[-1])]
        if max(numbers) > layers:
            raise ValueError(
                f"--maxscore-record-layers {options.record_layers} names layer {max(numbers)}, but "
                f"the model has {layers} layers, numbered from 1"
            )
    if get("transformer_impl") == "inference_optimized":
        raise ValueError(
            f"{who} cannot be combined with --transformer-impl inference_optimized; use "
            "transformer_engine or local"
        )
    _check_graphs(config, topk, num_experts, get, options)


def why_on_host(args: Any, options: MaxScoreConfig) -> str | None:
    """Return why a launch on GPUs is solved on the CPU, None if it is not.

    Args:
        args: Megatron's parsed arguments.
        options: MaxScore's own.
    """
    is_split = args.context_parallel_size > 1 or args.tensor_model_parallel_size > 1
    reasons = (
        (options.mode == "exact", "--maxscore-mode exact"),
        (args.moe_router_dtype == "fp64", "--moe-router-dtype fp64"),
        (args.num_experts > MAX_DEVICE_EXPERTS, f"more than {MAX_DEVICE_EXPERTS} experts"),
        (options.scope == "sequence" and is_split, "sequences are split over ranks"),
    )
    return next((text for applies, text in reasons if applies), None)


def _check_graphs(
    config: Any, topk: int, num_experts: int, get: Any, options: MaxScoreConfig
) -> None:
    """Refuse CUDA graphs of what cannot be captured."""
    graph = graph_of(config)
    if graph.implementation == "none":
        return
    who = "--moe-router-type maxscore cannot be combined with"
    if graph.implementation != "full_iteration" and (not graph.modules or "moe" in graph.modules):
        raise ValueError(
            f"{who} CUDA graphs of whole layers or of moe (--cuda-graph-impl "
            f"{graph.implementation}); use --cuda-graph-modules attn moe_router moe_preprocess "
            "(before megatron-core 0.18 --cuda-graph-scope), or graphs of the full iteration"
        )
    if not holds_router(config):
        return
    refused = (
        (options.mode == "exact", "--maxscore-mode exact, which solves on the host; leave it out"),
        (
            options.scope != "local",
            f"--maxscore-scope {options.scope}, whose ranks exchange counts; use "
            "--maxscore-scope local",
        ),
        (
            get("moe_router_dtype") == "fp64",
            "--moe-router-dtype fp64, which is solved on the host; use fp32",
        ),
        (
            num_experts > MAX_DEVICE_EXPERTS,
            f"--num-experts {num_experts}, which are solved on the host beyond "
            f"{MAX_DEVICE_EXPERTS}; lower it",
        ),
        (options.record_dir is not None, "--maxscore-record-dir, which writes files; leave it out"),
        (
            options.stats_file is not None and graph.implementation == "full_iteration",
            "--maxscore-stats-file, which copies counts to the host; leave it out",
        ),
    )
    for applies, text in refused:
        if applies:
            raise ValueError(f"CUDA graphs of the router cannot be combined with {text}")
    if graph.implementation == "full_iteration":
        _check_full_iteration(get)
    if get("moe_token_dispatcher_type") == "alltoall" and holds_dispatch(config):
        assignments = math.prod(options.fixed_shape or (0, 0)) * topk
        align = 1
        if get("moe_router_padding_for_quantization") or get("moe_router_padding_for_fp8"):
            align = max(get_align_size_for_quantization(config), 1)
        if not assignments or assignments % num_experts or options.capacity_factor != 1.0:
            raise ValueError(
                "CUDA graphs of the dispatch need splits that are known in advance and never "
                f"change, with --moe-token-dispatcher-type alltoall: {assignments} assignments of "
                f"each rank over --num-experts {num_experts}; change --micro-batch-size or "
                "--seq-length until they divide, or use --moe-token-dispatcher-type flex "
                "--moe-flex-dispatcher-backend hybridep"
            )
        if assignments % (num_experts * align):
            raise ValueError(
                "CUDA graphs of the dispatch cannot be combined with "
                "--moe-router-padding-for-quantization where rows have to be padded: each "
                f"expert's share of a rank is {assignments // num_experts}; use "
                "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep"
            )


def _check_full_iteration(get: Any) -> None:
    """Refuse dispatchers that copy counts to the host, which a graph cannot hold."""
    dispatcher, backend = get("moe_token_dispatcher_type"), get("moe_flex_dispatcher_backend")
    if get("moe_enable_deepep"):
        backend = "deepep"
    fix = "use --moe-token-dispatcher-type alltoall, or flex with hybridep and "
    fix += "--moe-expert-rank-capacity-factor"
    is_flex = dispatcher == "flex"
    if dispatcher in (None, "allgather") or (is_flex and backend == "deepep"):
        name = "deepep" if is_flex else "allgather"
        raise ValueError(
            f"CUDA graphs of the full iteration cannot hold the dispatcher {name}, which copies "
            f"counts to the host; {fix}"
        )
    if is_flex and backend == "hybridep" and get("moe_expert_rank_capacity_factor") is None:
        raise ValueError(
            "CUDA graphs of the full iteration need --moe-expert-rank-capacity-factor with "
            "--moe-flex-dispatcher-backend hybridep, which otherwise asks the device how many rows "
            "there are; add it (1.0 does where quotas are even)"
        )
    if is_flex and backend == "ncclep" and not get("moe_ncclep_static_shape"):
        raise ValueError(
            "CUDA graphs of the full iteration need --moe-ncclep-static-shape with "
            "--moe-flex-dispatcher-backend ncclep; add it"
        )


def _check_groups(topk: int, num_experts: int, get: Any) -> None:
    """Refuse groups of experts that cannot be."""
    groups, chosen = get("moe_router_num_groups"), get("moe_router_group_topk")
    if not chosen:
        return
    if not groups or num_experts % groups:
        raise ValueError(
            f"--moe-router-group-topk {chosen} needs --moe-router-num-groups, a number that "
            f"--num-experts {num_experts} is a multiple of; it is {groups}"
        )
    if topk > chosen * (num_experts // groups):
        raise ValueError(
            f"--moe-router-group-topk {chosen} of --moe-router-num-groups {groups} hold "
            f"{chosen * (num_experts // groups)} experts, fewer than --moe-router-topk {topk}; "
            "raise --moe-router-group-topk"
        )
    if not 1 <= chosen <= min(groups, topk):
        raise ValueError(
            f"--moe-router-group-topk {chosen} must be at most --moe-router-num-groups {groups} "
            f"and at most --moe-router-topk {topk}; change one of them"
        )


def _check_gates_can_learn(
    topk: int, num_experts: int, score_function: Any, get: Any, options: MaxScoreConfig
) -> None:
    """Refuse gates that are always 1: the router's weight would get no gradient."""
    if options.normalize_gates and topk == 1:
        raise ValueError(
            "--maxscore-normalize-gates cannot be combined with --moe-router-topk 1: a token's "
            "only gate over itself is always 1, and the router learns nothing; leave it out"
        )
    is_softmax = score_function in (None, "softmax")
    if options.gate == "score" and is_softmax and topk == 1 and not get("moe_router_pre_softmax"):
        raise ValueError(
            "--maxscore-gate score cannot be combined with --moe-router-topk 1 and a softmax over "
            "the chosen expert, which is always 1; use --moe-router-score-function sigmoid, add "
            "--moe-router-pre-softmax, or use --maxscore-gate soft_topk"
        )
    is_plain = options.gate == "soft_topk" and options.variant == "bientropic"
    if is_plain and topk == num_experts:
        raise ValueError(
            f"--moe-router-topk {topk} takes all --num-experts {num_experts} experts, for which "
            "--maxscore-variant bientropic makes every gate 1, and the router learns nothing; "
            "lower --moe-router-topk, or use --maxscore-gate score"
        )
