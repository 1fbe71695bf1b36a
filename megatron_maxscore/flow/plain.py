"""Row kernels of the solver in torch and numpy, for machines without numba.

:mod:`fused` has the same functions; both make the same integer decisions and give the same bits.
Rows are taken in blocks, so that memory stays a small multiple of one block.

Shape letters: B problems, N rows of all problems, E experts, K experts per token, H buckets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_maxscore.flow import fill_plain
from megatron_maxscore.flow.buckets import (
    ALL_BUCKETS,
    NUM_LEVELS,
    bucket_of,
    gap_level_of,
    price_step,
    within_windows,
)
from megatron_maxscore.flow.conclude_plain import block_of, conclude
from megatron_maxscore.flow.contested import Contested
from megatron_maxscore.flow.exchange import Exchange
from megatron_maxscore.flow.finish_plain import augment
from megatron_maxscore.flow.problem import (
    ROUNDER,
    ROUNDER_BITS,
    BoolArray,
    FloatArray,
    IntArray,
    Problem,
)
from megatron_maxscore.flow.threads import run, spans

__all__ = [
    "NAME",
    "augment",
    "conclude",
    "contested",
    "fill",
    "price_pass",
    "price_step",
    "scan",
]

NAME = "torch"
# Entries of reduced scores that are kept from one use to the next.
_KEPT = 1 << 20
# Score of a forbidden arc: below all others at any price, and with room for the bits of a key.
_NEVER = -(1 << 50)

# Reduced scores below this belong to forbidden arcs.
_LEAST = _NEVER >> 1


def scan(scores_NE: Any) -> tuple[FloatArray, FloatArray, bool, bool]:
    """Return each row's lowest and highest allowed score, whether any is bad, any forbidden.

    Args:
        scores_NE: (N, E) float32 or float64. Bad are NaN and +inf; -inf is forbidden.

    Returns:
        (N,) float64 lowest, (N,) float64 highest, and two flags.
    """
    rows = scores_NE.shape[0]
    low_N, high_N = np.empty(rows), np.empty(rows)
    bad = forbidden = False
    size = block_of(scores_NE)
    for first in range(0, rows, size):
        block = torch.from_numpy(scores_NE[first : first + size])
        low, high = torch.aminmax(block, dim=1)
        # NaN spreads to both.
        if not bool((low.isfinite() & high.isfinite()).all()):
            is_forbidden = block == -torch.inf
            forbidden = forbidden or bool(is_forbidden.any())
            bad = bad or bool((block.isnan() | (block == torch.inf)).any())
            low = torch.where(is_forbidden, torch.inf, block).amin(1)
        low_N[first : first + size], high_N[first : first + size] = low, high
    return low_N, high_N, bad, forbidden


def _reduced(problem: Problem, prices: IntArray, rows: Any, owner: Any) -> IntArray:
    """Return (n, E) int64 reduced scores of rows, given by a slice or indices, of some problems."""
    low_N1 = problem.low_N[rows, None]
    factor = np.ldexp(1.0, problem.shift_B[owner])
    above = problem.scores_NE[rows].astype(np.float64)
    above -= low_N1
    above *= factor if problem.num_problems == 1 else factor[:, None]
    if problem.has_forbidden:
        np.maximum(above, _NEVER, out=above)
    above += ROUNDER
    q_NE: IntArray = above.view(np.int64)
    q_NE -= ROUNDER_BITS + prices[owner]
    return q_NE


def _active_blocks(problem: Problem, active_B: BoolArray) -> list[tuple[Any, Any]]:
    """Return blocks of rows of active problems, each with its problem or problems."""
    rows, size = int(problem.start_B[-1]), block_of(problem.scores_NE)
    if problem.num_problems == 1:
        return [(slice(a, min(a + size, rows)), 0) for a in range(0, rows, size)]
    problem_N = problem.problem_N
    wanted = np.flatnonzero(active_B[problem_N])
    parts = [wanted[a : a + size] for a in range(0, wanted.size, size)]
    return [(index, problem_N[index]) for index in parts]


def _for_each(function: Callable[..., Any], blocks: list[Any], rows: int) -> list[Any]:
    """Call a function for each block, on as many threads as the rows deserve."""
    parts = run(
        [
            lambda a=a, b=b: [function(*block) for block in blocks[a:b]]  # type: ignore[misc]
            for a, b in spans(len(blocks), rows)
        ]
    )
    return [result for part in parts for result in part]


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
        (B, E) int64 loads, (B, L + 1) int64 counts of gaps by their level, and a function that
        returns the (B, E, H) int32 counts of bids.
    """
    topk, num_experts = problem.topk, problem.num_experts
    load_BE = np.zeros((problem.num_problems, num_experts), np.int64)
    gaps_BL = np.zeros((problem.num_problems, NUM_LEVELS + 1), np.int64)
    # Reduced scores are kept for counting bids where that takes little memory.
    keeps = problem.scores_NE.size <= _KEPT
    lock = threading.Lock()

    def choose(index: Any, owner: Any) -> IntArray | None:
        r_NE = _reduced(problem, prices_BE, index, owner)
        # numpy's selection is vectorised; torch.topk takes more than twice as long.
        split_NE = np.partition(r_NE, num_experts - topk - 1, axis=1)
        next_N, kth_N = split_NE[:, -topk - 1], split_NE[:, -topk:].min(1)
        chosen_NE = r_NE > next_N[:, None]
        gap_N[index] = kth_N - next_N
        threshold_N[index] = np.where(next_N < _LEAST, kth_N - 1, (kth_N + next_N) >> 1)
        tied = np.flatnonzero(kth_N == next_N)
        if tied.size:
            position_N = _positions(index, owner, problem)[tied]
            chosen_NE[tied] = _with_ties(r_NE[tied], position_N, topk)
        x_NE[index] = chosen_NE
        with lock:
            np.add.at(gaps_BL, (owner, gap_level_of(gap_N[index])), 1)
            if problem.num_problems == 1:
                load_BE[0] += chosen_NE.view(np.uint8).sum(0, dtype=np.uint32)
            else:
                np.add.at(load_BE, owner, chosen_NE.astype(np.int64))
        return r_NE if keeps else None

    blocks, rows = _active_blocks(problem, active_B), int(problem.start_B[-1])
    kept = _for_each(choose, blocks, rows)

    def count_bids() -> np.ndarray:
        count_HS = np.zeros((ALL_BUCKETS, window_BE.size), np.int64)

        def count(index: Any, owner: Any, r_NE: IntArray | None) -> None:
            if r_NE is None:
                r_NE = _reduced(problem, prices_BE, index, owner)
            r_NE -= threshold_N[index, None]
            place = np.flatnonzero(r_NE > -window_BE[owner])
            slot = bucket_of(r_NE.ravel()[place])
            slot *= window_BE.size
            if problem.num_problems > 1:
                row, expert = np.divmod(place, num_experts)
                slot += owner[row] * num_experts + expert
            else:
                slot += place % num_experts
            counts = np.bincount(slot, minlength=count_HS.size).reshape(count_HS.shape)
            with lock:
                np.add(count_HS, counts, out=count_HS)

        _for_each(count, [(*block, r) for block, r in zip(blocks, kept, strict=True)], rows)
        return within_windows(count_HS, window_BE, num_buckets)

    return load_BE, gaps_BL, count_bids


def _positions(index: Any, owner: Any, problem: Problem) -> IntArray:
    """Return the index of rows within their problems."""
    rows = np.arange(index.start, index.stop) if isinstance(index, slice) else index
    return np.asarray(rows - problem.origin_B[owner])


def _with_ties(r_NE: IntArray, index_N: IntArray, topk: int) -> BoolArray:
    """Return the choice of rows whose k-th and (k+1)-th are equal, given their indices."""
    num_experts = r_NE.shape[1]
    begin_N = index_N * topk
    begin_N = (begin_N + begin_N // num_experts) % num_experts
    # Each row's cyclic order of the experts, the first one highest, as the low bits of a key.
    expert = np.arange(num_experts)
    rank_EE = num_experts - 1 - (expert - expert[:, None]) % num_experts
    keys_NE = r_NE << (num_experts - 1).bit_length()
    keys_NE += rank_EE[begin_N]
    least_N = torch.from_numpy(keys_NE).topk(topk, dim=1).values.numpy()[:, -1:]
    return np.asarray(keys_NE >= least_N)


def contested(
    problem: Problem,
    prices_BE: IntArray,
    x_NE: BoolArray,
    reach_B: IntArray,
    stride_B: IntArray,
    gap_N: IntArray,
    drift_B: IntArray,
) -> Contested:
    """Collect the rows whose cheapest swap costs at most ``reach``, and their arcs within it.

    Args:
        problem: the problems.
        prices_BE: (B, E) int64.
        x_NE: (N, E) bool, each row's experts, top-k at the prices.
        reach_B: (B,) int64; problems with a negative reach are left out.
        stride_B: (B,) int64; only rows whose index in the problem divides by it are looked at.
        gap_N: (N,) int64 cost of each row's cheapest swap at earlier prices.
        drift_B: (B,) int64 by how much these costs may have fallen since then.
    """
    problem_N = problem.problem_N
    limit_B = np.where(reach_B >= 0, reach_B + drift_B, -1)
    maybe_N = gap_N <= limit_B[problem_N]
    if (stride_B > 1).any():
        index_N = np.arange(gap_N.size) - problem.origin_B[problem_N]
        maybe_N &= index_N % stride_B[problem_N] == 0
    maybe = np.flatnonzero(maybe_N)
    count_N = np.zeros(x_NE.shape[0], np.int64)
    parts = []
    size = block_of(x_NE)
    for first in range(0, maybe.size, size):
        rows = maybe[first : first + size]
        owner = 0 if problem.num_problems == 1 else problem_N[rows]
        r_NE, held_NE = _reduced(problem, prices_BE, rows, owner), x_NE[rows]
        r, held = torch.from_numpy(r_NE), torch.from_numpy(held_NE)
        least_N = r.masked_fill(~held, -_NEVER).amin(1).numpy()
        most_N = r.masked_fill(held, _NEVER).amax(1).numpy()
        reach_N = np.broadcast_to(reach_B[owner], least_N.shape)
        near = np.flatnonzero(least_N - most_N <= reach_N)
        r_RE, held_RE = r_NE[near], held_NE[near]
        least_R1, most_R1 = least_N[near, None], most_N[near, None]
        reach_R1 = reach_N[near, None]
        is_arc_RE = np.where(held_RE, r_RE <= most_R1 + reach_R1, r_RE >= least_R1 - reach_R1)
        count_N[rows[near]] = is_arc_RE.sum(1)
        place = np.flatnonzero(is_arc_RE)
        parts.append((place % problem.num_experts, r_RE.ravel()[place], held_RE.ravel()[place]))
    found = Contested.allocate(count_N, problem)
    for target, column in zip(
        (found.expert_A, found.value_A, found.held_A), zip(*parts, strict=True), strict=False
    ):
        np.concatenate(column, out=target, casting="same_kind")
    return found


def fill(
    problem: Problem,
    b: int,
    prices_BE: IntArray,
    threshold_N: IntArray,
    load_BE: IntArray,
    x_NE: BoolArray,
    exchange: Exchange,
) -> int:
    """Make problem b's assignment feasible; every arc must be allowed.

    Args:
        problem: the problems.
        b: which one.
        prices_BE: (B, E) int64.
        threshold_N: (N,) int64, bids are reduced scores less these.
        load_BE: (B, E) int64 of all ranks, changed in place.
        x_NE: (N, E) bool, changed in place.
        exchange: between the ranks that hold the rows.

    Returns:
        By how much the sum of reduced scores has fallen, on all ranks.
    """
    first, last = int(problem.start_B[b]), int(problem.start_B[b + 1])
    owner: Any = 0 if problem.num_problems == 1 else np.array([b])
    rows = fill_plain.Rows(
        lambda index: _reduced(problem, prices_BE, first + index, owner),
        threshold_N[first:last],
        x_NE[first:last],
        problem.rows_RB[:, b],
        exchange,
    )
    return fill_plain.fill(rows, problem.capacity_BE[b], load_BE[b])
