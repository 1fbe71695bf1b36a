"""What the exact solver does with rows: passes over all of them, and over contested ones.

Kernels (:mod:`kernels`) are compiled with numba and run on as many threads as torch uses (see
:mod:`threads`). Their decisions are integers, so threads change no bit.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_maxscore.flow.buckets import EDGE_L, NUM_LEVELS, base_of
from megatron_maxscore.flow.contested import Contested
from megatron_maxscore.flow.kernels import augment as augmenting
from megatron_maxscore.flow.kernels import contested as rows_of_finish
from megatron_maxscore.flow.kernels import rows
from megatron_maxscore.flow.problem import FAR, BoolArray, FloatArray, IntArray, Problem
from megatron_maxscore.flow.threads import run, spans


def scan(scores_NE: Any) -> tuple[FloatArray, FloatArray, bool, bool]:
    """Return each row's lowest and highest allowed score, whether any is bad, any forbidden.

    Args:
        scores_NE: (N, E) float32 or float64. Bad are NaN and +inf; -inf is forbidden.

    Returns:
        (N,) float64 lowest, (N,) float64 highest, and two flags.
    """
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
    """Choose every row's k best experts at the prices, and count loads, gaps and bids.

    Equal reduced scores at the k-th place are taken in cyclic order of the experts, from a start
    that moves with the row, so that plateaus spread over the experts.

    Args:
        problem: the problems.
        prices_BE: (B, E) int64.
        window_BE: (B, E) int64; bids at or below minus this are not counted, those above it count
            as equal to it.
        num_buckets: H, see :mod:`buckets`.
        active_B: (B,) bool, problems whose rows are to be looked at.
        threshold_N: (N,) int64, out: the mean of the k-th and (k+1)-th reduced score.
        knows_threshold: whether it holds those of similar prices, a hint that saves time.
        gap_N: (N,) int64, out: k-th less (k+1)-th.
        x_NE: (N, E) bool, out: the choice.

    Returns:
        (B, E) int64 loads, (B, D + 1) int64 counts of gaps by their level, and a function that
        returns the (B, E, U) int32 counts of bids.
    """
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


def price_step(bids_BEU: np.ndarray, capacity_BE: np.ndarray, window_BE: IntArray) -> IntArray:
    """Return (B, E) int64 by how much each price must rise for loads to become the capacities.

    A price rises until the bid that is one too many is not positive any more.

    Args:
        bids_BEU: (B, E, U) int32 counts of bids by bucket.
        capacity_BE: (B, E) capacities, int64 or float64.
        window_BE: (B, E) int64; bids at or below minus this were not counted.
    """
    step_BE = np.empty(capacity_BE.shape, np.int64)
    base_BE = base_of(window_BE, bids_BEU.shape[-1])
    rows.price_step(bids_BEU, capacity_BE, window_BE, base_BE, EDGE_L, step_BE)
    return step_BE


def cheapest(
    problem: Problem, prices_BE: IntArray, x_NE: BoolArray, slot_B: IntArray, groups: int
) -> IntArray:
    """Return the cost of the cheapest swap from each expert to each other, in groups of rows.

    A row's group is its index in the problem modulo ``groups``.

    Args:
        problem: the problems.
        prices_BE: (B, E) int64.
        x_NE: (N, E) bool, each row's experts.
        slot_B: (B,) int64 place of each problem in the result, -1 for those to leave out.
        groups: G.

    Returns:
        (F, G, E, E) int64; FAR or more where there is no swap.
    """
    num_experts = problem.num_experts
    shape = int(slot_B.max()) + 1, groups, num_experts, num_experts
    # Threads that work on different problems share the array; others have room for their own.
    pieces = problem.pieces
    own = len(pieces) if pieces[0][1] == problem.num_problems else 1
    least = np.full((own, *shape), FAR)
    run(
        [
            lambda i=i, piece=piece: rows_of_finish.cheapest(  # type: ignore[misc]
                problem.scores_NE, problem.low_N, problem.factor_B, prices_BE, x_NE, slot_B,
                problem.origin_B, *piece, least[i if own > 1 else 0],
            )
            for i, piece in enumerate(pieces)
        ]
    )  # fmt: skip
    return least[0] if own == 1 else least.min(0)


def nearest(
    least_FEE: IntArray,
    prices_BE: IntArray,
    excess_BJ: IntArray,
    slack_BE: IntArray,
    has_sink_B: BoolArray,
    slot_B: IntArray,
) -> IntArray:
    """Return (F,) int64 distance within which there is room for all excess, FAR if there is none.

    Args:
        least_FEE: (F, E, E) int64 cost of the cheapest swap of each pair.
        prices_BE: (B, E) int64.
        excess_BJ: (B, J) int64 units above capacity, the sink last.
        slack_BE: (B, E) int64 unused units that the sink has placed.
        has_sink_B: (B,) bool, whether capacities leave slack.
        slot_B: (B,) int64 place of each problem in ``least``, -1 for those to leave out.
    """
    found_F = np.empty(least_FEE.shape[0], np.int64)
    for b in np.flatnonzero(slot_B >= 0).tolist():
        nodes = prices_BE.shape[1] + int(has_sink_B[b])
        found_F[slot_B[b]] = augmenting.nearest(
            least_FEE[slot_B[b]], prices_BE[b], excess_BJ[b, :nodes], slack_BE[b]
        )
    return found_F


def contested(
    problem: Problem,
    prices_BE: IntArray,
    x_NE: BoolArray,
    slot_B: IntArray,
    limit_FEP: IntArray,
    gap_N: IntArray,
    gap_limit_B: IntArray,
    stride_B: IntArray,
) -> Contested:
    """Collect the rows that have a swap within its limit, and the arcs of such swaps.

    Args:
        problem: the problems.
        prices_BE: (B, E) int64.
        x_NE: (N, E) bool, each row's experts, top-k at the prices.
        slot_B: (B,) int64 place of each problem in ``limit``, -1 for those to leave out.
        limit_FEP: (F, E, P) int64 largest cost of a swap from each expert to each other; P is E
            padded to whole vectors.
        gap_N: (N,) int64.
        gap_limit_B: (B,) int64; rows with a larger gap are not looked at.
        stride_B: (B,) int64; rows whose index in the problem is no multiple of it have only swaps
            below the limits, none at exactly a limit.
    """
    num_words = -(-problem.num_experts // 64)
    count_N = np.empty(x_NE.shape[0], np.int64)
    arcs_NW = np.empty((x_NE.shape[0], num_words), np.int64)
    scores = (problem.scores_NE, problem.low_N, problem.factor_B, prices_BE, x_NE)
    widest_FE = limit_FEP[:, :, : problem.num_experts].max(2)
    run(
        [
            lambda piece=piece: rows_of_finish.find_contested(  # type: ignore[misc]
                *scores,
                slot_B,
                limit_FEP,
                widest_FE,
                gap_N,
                gap_limit_B,
                stride_B,
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
            lambda a=a, b=b: rows_of_finish.extract(  # type: ignore[misc]
                *scores, arcs_NW, found.problem_C, found.row_C, found.first_C, a, b,
                found.expert_A, found.value_A, found.held_A,
            )
            for a, b in spans(found.row_C.size)
        ]
    )  # fmt: skip
    return found


def count_swaps(found: Contested) -> IntArray:
    """Return (B,) int64, how many swaps the contested rows of each problem have."""
    return np.asarray(rows_of_finish.count_swaps(found.first_B, found.first_C, found.held_A))


def apply(found: Contested, x_NE: BoolArray) -> None:
    """Write what contested rows have now into an assignment, (N, E) bool."""
    run(
        [
            lambda a=a, b=b: rows_of_finish.apply(  # type: ignore[misc]
                found.row_C, found.first_C, found.expert_A, found.held_A, a, b, x_NE
            )
            for a, b in spans(found.row_C.size)
        ]
    )


def level_out(found: Contested, excess_BJ: IntArray) -> None:
    """Let rows give experts above capacity for equal ones below, one row after the other.

    Args:
        found: contested rows; ``held_A`` is changed in place.
        excess_BJ: (B, J) int64 units above capacity; changed in place.
    """
    augmenting.level_out_problems(
        0, excess_BJ.shape[0], found.first_B, found.first_C, found.expert_A, found.value_A,
        found.held_A, excess_BJ,
    )  # fmt: skip


def augment(
    found: Contested,
    prices_BE: IntArray,
    slot_B: IntArray,
    limit_FEP: IntArray,
    stride_B: IntArray,
    wanted_FEE: NDArray,
    excess_BJ: IntArray,
    slack_BE: IntArray,
    has_sink_B: BoolArray,
) -> tuple[IntArray, BoolArray]:
    """Move units along shortest paths until nothing is out of balance, within the limits.

    Args:
        found: contested rows; ``held_A`` is changed in place.
        prices_BE: (B, E) int64 prices at which they were collected.
        slot_B: (B,) int64 place of each problem in ``limit``, -1 for those to leave alone.
        limit_FEP: (F, E, P) int64 with which rows were collected.
        stride_B: (B,) int64 with which rows were collected.
        wanted_FEE: (F, E, E) int32, about how many of the cheapest swaps within the limits take
            part.
        excess_BJ: (B, J) int64 units above capacity, the sink last; changed in place.
        slack_BE: (B, E) int64 unused units that the sink has placed; changed in place.
        has_sink_B: (B,) bool, whether capacities leave slack.

    Returns:
        (B, J) int64 by how much prices rise, and (F, E, E) bool, which pairs of experts had
        too few swaps to go on.
    """
    potential_BJ = np.zeros_like(excess_BJ)
    lacks_FEE = np.zeros(wanted_FEE.shape, np.bool_)
    run(
        [
            lambda a=a, b=b: augmenting.augment_problems(  # type: ignore[misc]
                a, b, found.first_B, found.first_C, found.expert_A, found.value_A, found.held_A,
                prices_BE, slot_B, limit_FEP, stride_B, wanted_FEE, excess_BJ, slack_BE,
                has_sink_B, potential_BJ, lacks_FEE,
            )
            for a, b in spans(prices_BE.shape[0], found.row_C.size)
        ]
    )  # fmt: skip
    return potential_BJ, lacks_FEE


def conclude(
    problem: Problem, prices_BE: FloatArray, x_NE: BoolArray
) -> tuple[IntArray, FloatArray, FloatArray]:
    """Order the chosen experts, and evaluate objective and gap on the unrounded scores.

    Args:
        problem: the problems.
        prices_BE: (B, E) float64 in score units.
        x_NE: (N, E) bool, k experts per row.

    Returns:
        (N, K) int64 experts, best score first, ties by index; (N,) float64 total score of each
        row; (N,) float64 by how much the k largest of score minus price exceed those chosen.
    """
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
