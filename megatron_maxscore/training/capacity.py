"""How many tokens a launch routes, and the buffer that it needs for what a rank receives."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization

from megatron_maxscore.moe.budgets import least_rank_factor, most_rows_of_an_expert
from megatron_maxscore.moe.capture import holds_router
from megatron_maxscore.moe.config import VARIABLE_LENGTHS, MaxScoreConfig
from megatron_maxscore.releases import pads_for_operators

# Options with which the number of tokens of a microbatch is not known in advance.
_VARYING = (*VARIABLE_LENGTHS, "sft", "perform_rl_step", "rl_use_sequence_packing")


def fixed_shape(args: Any) -> list[int]:
    """Return what every rank routes in every microbatch, as Megatron's own loaders make them.

    A script may cut batches shorter; the dispatcher then adds rows of zeros.
    """
    varies = any(getattr(args, name, False) for name in _VARYING)
    # Scripts with a loader of their own, and layers that are given a part of the tokens at a time.
    varies = varies or getattr(args, "dataloader_type", None) == "external"
    varies = varies or (getattr(args, "mlp_chunks_for_training", None) or 1) > 1
    if varies or args.seq_length is None or args.micro_batch_size is None:
        return [0, 0]
    return shape_on_a_rank(args, args.seq_length, args.micro_batch_size)


def shape_on_a_rank(config: Any, length: int, batch: int) -> list[int]:
    """Return the positions and the number of sequences that each rank has of a microbatch.

    Args:
        config: a TransformerConfig, or Megatron's parsed arguments.
        length: of a whole sequence.
        batch: sequences.
    """
    split = config.context_parallel_size
    if config.sequence_parallel:
        split *= config.tensor_model_parallel_size
    return [length // split, batch]


def check_rank_capacity(args: Any, options: MaxScoreConfig) -> None:
    """Refuse a budget of rows in which a step's rows do not fit."""
    factor = getattr(args, "moe_expert_rank_capacity_factor", None)
    if factor is None:
        return
    backend = args.moe_flex_dispatcher_backend
    least = least_factor(args, options)
    if least is not None and factor < least:
        raise ValueError(
            f"--moe-expert-rank-capacity-factor {factor} is too small for what a rank receives; "
            f"make it at least {shown_factor(least)}"
        )
    local = args.num_experts // args.expert_model_parallel_size
    # All tokens may go to the experts of one rank.
    worst = _tp_ep_ranks(args) * min(1.0, local / args.moe_router_topk)
    if backend == "ncclep" and options.eval_routing != "flow" and factor < worst:
        raise ValueError(
            f"--moe-expert-rank-capacity-factor {factor} bounds what a rank receives, and "
            f"--maxscore-eval-routing {options.eval_routing} routes by prices, which do not; use "
            "--maxscore-eval-routing flow, or --moe-flex-dispatcher-backend hybridep"
        )


def shown_factor(factor: float) -> str:
    """Return a least factor as it is told: with four digits, rounded up."""
    return f"{math.ceil(factor * 1e4) / 1e4:g}"


def _tp_ep_ranks(args: Any) -> int:
    """Return how many ranks share one set of experts."""
    expert_tensor = args.expert_tensor_parallel_size
    if expert_tensor is None:
        expert_tensor = args.tensor_model_parallel_size
    return int(args.expert_model_parallel_size * expert_tensor)


def least_factor(args: Any, options: MaxScoreConfig) -> float | None:
    """Return the least safe ``--moe-expert-rank-capacity-factor`` of a launch, None if unknown.

    Args:
        args: parsed arguments.
        options: MaxScore's own options.
    """
    shape = args.maxscore_fixed_shape or fixed_shape(args)
    if not math.prod(shape):
        return None
    num_tokens = math.prod(shape)
    # NCCL EP's budget also applies in evaluation by the flow. There each rank's scores decide where
    # its remainder starts, so remainders do not rotate over the ranks.
    evaluates_in_budget = args.moe_flex_dispatcher_backend == "ncclep"
    most = most_rows_of_an_expert(
        options,
        num_tokens,
        args.seq_length,
        args.moe_router_topk,
        args.num_experts,
        _tp_ep_ranks(args),
        rotates=not holds_router(args) and not evaluates_in_budget,
    )
    is_quantised = getattr(args, "fp8", None) or getattr(args, "fp4", None)
    align = 0
    if is_quantised or pads_for_operators() or args.moe_flex_dispatcher_backend == "ncclep":
        align = get_align_size_for_quantization(args)
    local = args.num_experts // args.expert_model_parallel_size
    return least_rank_factor(most, local, align, num_tokens * args.moe_router_topk)
