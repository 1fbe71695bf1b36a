"""The solver's row functions, fused with numba. :mod:`plain` has the same ones in torch.

Both make the same integer decisions, so they give the same bits. Kernels run on as many threads as
torch uses (see :mod:`threads`).

Shape letters: B problems, N rows of all problems, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_maxscore.flow import plain
from megatron_maxscore.flow.buckets import EDGE_L, NUM_LEVELS, base_of
from megatron_maxscore.flow.contested import Contested
from megatron_maxscore.flow.exchange import Exchange
from megatron_maxscore.flow.kernels import fill as kernels
from megatron_maxscore.flow.kernels import rows
from megatron_maxscore.flow.kernels.augment import augment_problems
from megatron_maxscore.flow.problem import BoolArray, FloatArray, IntArray, Problem
from megatron_maxscore.flow.threads import run, spans

NAME = "numba"


def scan(scores_NE: Any) -> tuple[FloatArray, FloatArray, bool, bool]:
    """See :func:`megatron_maxscore.flow.plain.scan`."""
    count = scores_NE.shape[0]
    low_N, high_N = np.empty(count), np.empty(count)
    flags = run(
        [
            lambda a=a, b=b: rows.scan(scores_NE, a, b, low_N, high_N)  # type: ignore[misc]
            for a, b in spans(count)
        ]
    )
    return low_N, high_N, any(f[0] for f in flags), any(f[1] for f in flags)


def price_pass(
    problem: Problem,
    prices_BE: IntArray,
    window_BE: IntArray,
    num_buckets: int,
    active_B: BoolArray,
    threshold_N: IntArray,
    knows_threshold: bool,
    gap_N: IntArray,
    x_NE: BoolArray,
) -> tuple[IntArray, IntArray, Callable[[], np.ndarray]]:
    """See :func:`megatron_maxscore.flow.plain.price_pass`."""
    pieces = problem.pieces
    # Threads that work on different problems share the counters.
    own = len(pieces) if pieces[0][1] == problem.num_problems else 1
    loads = np.zeros((own, *window_BE.shape), np.int64)
    gaps = np.zeros((own, problem.num_problems, NUM_LEVELS + 1), np.int64)
    bids = np.zeros((own, *window_BE.shape, num_buckets), np.int32)
    base_BE = base_of(window_BE, num_buckets)

    def task(index: int, first: int, last: int, first_row_B: IntArray, last_row_B: IntArray) -> Any:
        slot = index if own > 1 else 0
        stop_B = np.where(active_B, last_row_B, first_row_B)
        return lambda: rows.price_pass(
            problem.scores_NE, problem.low_N, problem.factor_B, prices_BE, problem.topk, window_BE,
            base_BE, knows_threshold, first, last, first_row_B, stop_B, problem.origin_B,
            threshold_N, gap_N, x_NE, loads[slot], gaps[slot], bids[slot],
        )  # fmt: skip

    run([task(index, *piece) for index, piece in enumerate(pieces)])
    count = lambda: bids[0] if own == 1 else bids.sum(0, dtype=np.int32)  # noqa: E731
    return loads.sum(0), gaps.sum(0), count


def price_step(bids_BEH: np.ndarray, capacity_BE: np.ndarray, window_BE: IntArray) -> IntArray:
    """See :func:`megatron_maxscore.flow.buckets.price_step`."""
    step_BE = np.empty(capacity_BE.shape, np.int64)
    base_BE = base_of(window_BE, bids_BEH.shape[-1])
    rows.price_step(bids_BEH, capacity_BE, window_BE, base_BE, EDGE_L, step_BE)
    return step_BE


def contested(
    problem: Problem,
    prices_BE: IntArray,
    x_NE: BoolArray,
    reach_B: IntArray,
    stride_B: IntArray,
    gap_N: IntArray,
    drift_B: IntArray,
) -> Contested:
    """See :func:`megatron_maxscore.flow.plain.contested`."""
    num_words = -(-problem.num_experts // 64)
    count_N = np.empty(x_NE.shape[0], np.int64)
    arcs_NW = np.empty((x_NE.shape[0], num_words), np.int64)
    scores = (problem.scores_NE, problem.low_N, problem.factor_B, prices_BE, x_NE)
    run(
        [
            lambda piece=piece: rows.find_contested(  # type: ignore[misc]
                *scores,
                reach_B,
                stride_B,
                gap_N,
                drift_B,
                problem.origin_B,
                *piece,
                count_N,
                arcs_NW,
            )
            for piece in problem.pieces
        ]
    )
    found = Contested.allocate(count_N, problem)
    run(
        [
            lambda a=a, b=b: rows.extract(  # type: ignore[misc]
                *scores,
                arcs_NW,
                found.problem_R,
                found.row_R,
                found.first_R,
                a,
                b,
                found.expert_A,
                found.value_A,
                found.held_A,
            )
            for a, b in spans(found.row_R.size)
        ]
    )
    return found


def augment(
    found: Contested,
    prices_BE: IntArray,
    excess_BN: IntArray,
    slack_BE: IntArray,
    has_sink_B: BoolArray,
    reach_B: IntArray,
) -> tuple[IntArray, IntArray]:
    """See :func:`megatron_maxscore.flow.finish_plain.augment`."""
    potential_BN = np.zeros_like(excess_BN)
    status_B = np.zeros(prices_BE.shape[0], np.int64)
    run(
        [
            lambda a=a, b=b: augment_problems(  # type: ignore[misc]
                a,
                b,
                found.first_B,
                found.first_R,
                found.expert_A,
                found.value_A,
                found.held_A,
                prices_BE,
                excess_BN,
                slack_BE,
                has_sink_B,
                reach_B,
                potential_BN,
                status_B,
            )
            for a, b in spans(prices_BE.shape[0], found.row_R.size)
        ]
    )
    return potential_BN, status_B


def fill(
    problem: Problem,
    b: int,
    prices_BE: IntArray,
    threshold_N: IntArray,
    load_BE: IntArray,
    x_NE: BoolArray,
    exchange: Exchange,
) -> int:
    """See :func:`megatron_maxscore.flow.plain.fill`, which runs over several ranks."""
    if exchange.size > 1:
        return plain.fill(problem, b, prices_BE, threshold_N, load_BE, x_NE, exchange)
    loss_2 = np.zeros(2, np.int64)
    kernels.fill(
        problem.scores_NE, problem.low_N, problem.factor_B, prices_BE, threshold_N, b,
        problem.start_B[b], problem.start_B[b + 1], problem.capacity_BE[b], load_BE[b], x_NE,
        loss_2,
    )  # fmt: skip
    return (int(loss_2[0]) << kernels.LOW_BITS) + int(loss_2[1])


def conclude(
    problem: Problem, prices_BE: FloatArray, x_NE: BoolArray
) -> tuple[IntArray, FloatArray, FloatArray]:
    """See :func:`megatron_maxscore.flow.plain.conclude`."""
    count = x_NE.shape[0]
    experts_NK = np.empty((count, problem.topk), np.int64)
    total_N, slack_N = np.empty(count), np.empty(count)
    run(
        [
            lambda piece=piece: rows.conclude(  # type: ignore[misc]
                problem.scores_NE,
                problem.low_N,
                prices_BE,
                x_NE,
                problem.topk,
                *piece,
                experts_NK,
                total_N,
                slack_N,
            )
            for piece in problem.pieces
        ]
    )
    return experts_NK, total_N, slack_N
