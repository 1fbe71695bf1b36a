"""Row work of the kernels: reading a tile of scores, choosing each row's k best, counting.

Shape letters: R rows of a tile, E experts (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow import problem, spread
from megatron_maxscore.flow.device.kernels import layout
from megatron_maxscore.flow.device.kernels.integers import (
    LEVELS,
    NEVER,
    level_of,
    power_of_two,
    to_bits,
    to_integer,
)

_GAPS = layout.GAPS
_SPREAD_MASK = tl.constexpr(spread.NUM_CLASSES - 1)
_TABLE_BITS = tl.constexpr(spread.TABLE_BITS)
_LOWEST = tl.constexpr(-(1 << 31))
_TWO_RANGES = tl.constexpr(2 << problem.SCORE_BITS)


@triton.jit
def load_scores(scores_ptr, row_R, is_row_R, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load a tile as float64; what is not finite counts as 0."""
    expert = tl.arange(0, BLOCK_E)[None, :]
    inside = is_row_R[:, None] & (expert < NUM_EXPERTS)
    at = row_R.to(tl.int64)[:, None] * NUM_EXPERTS + expert
    scores = tl.load(scores_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(tl.abs(scores) < float("inf"), scores, 0.0).to(tl.float64)


@triton.jit
def lowest(scores, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return each row's lowest score."""
    expert = tl.arange(0, BLOCK_E)[None, :]
    return tl.min(tl.where(expert < NUM_EXPERTS, scores, float("inf")), 1)


@triton.jit
def reduced_tile(
    scores, shift, price_E, spread_ptr, width, index_R,
    NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Return reduced scores of a tile as int64; padding is below all others."""
    expert = tl.arange(0, BLOCK_E)[None, :]
    low_R = lowest(scores, NUM_EXPERTS, BLOCK_E)
    q = to_integer((scores - low_R[:, None]) * power_of_two(shift))
    r = q - price_E[None, :]
    if width != 0:
        at = (index_R & _SPREAD_MASK)[:, None] * NUM_EXPERTS + expert
        added = tl.load(spread_ptr + at, mask=expert < NUM_EXPERTS, other=0)
        r -= (added.to(tl.int64) * width) >> _TABLE_BITS
    return tl.where(expert < NUM_EXPERTS, r, NEVER)


@triton.jit
def coarseness(price_E):
    """Return by how many bits reduced scores are shifted so that they fit in 32."""
    bits = (to_bits(tl.max(tl.abs(price_E), 0) + _TWO_RANGES) >> 52) - 1022
    return tl.maximum(bits - 30, 0)


@triton.jit
def _choose_exactly(
    r, index_R, NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK_E: tl.constexpr,
    TIE_BITS: tl.constexpr,
):  # fmt: skip
    """Return which k are each row's best.

    Equal ones in cyclic order of the experts from a start that moves with the row: the order is in
    the low bits of a key, so no two are equal.
    """
    expert = tl.arange(0, BLOCK_E)[None, :]
    begin_R = index_R.to(tl.int64) * TOPK
    begin_R = (begin_R + begin_R // NUM_EXPERTS) % NUM_EXPERTS
    distance = expert - begin_R[:, None]
    order = tl.where(distance < 0, distance + NUM_EXPERTS, distance)
    key = tl.where(expert < NUM_EXPERTS, (r << TIE_BITS) + (NUM_EXPERTS - 1 - order), NEVER)
    left = key
    kth_R = tl.max(left, 1)
    for _ in range(TOPK - 1):
        left = tl.where(left == kth_R[:, None], NEVER, left)
        kth_R = tl.max(left, 1)
    return key >= kth_R[:, None]


@triton.jit
def choose(
    r, coarse, index_R, is_row_R, NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr,
    BLOCK_E: tl.constexpr, TIE_BITS: tl.constexpr,
):  # fmt: skip
    """Return which k are each row's best, and the k-th and (k+1)-th reduced score.

    By the upper 32 bits, which is less than half the work, and tells where it is not enough: where
    two are equal there, more than k remain.
    """
    is_expert = tl.arange(0, BLOCK_E)[None, :] < NUM_EXPERTS
    upper = tl.where(is_expert, (r >> coarse).to(tl.int32), _LOWEST)
    left = upper
    least_R = tl.max(left, 1)
    for _ in range(TOPK - 1):
        left = tl.where(left == least_R[:, None], _LOWEST, left)
        least_R = tl.max(left, 1)
    chosen = upper >= least_R[:, None]
    count_R = tl.sum(chosen.to(tl.int32), 1)
    if tl.max(tl.where(is_row_R & (count_R != TOPK), 1, 0), 0) > 0:
        chosen = _choose_exactly(r, index_R, NUM_EXPERTS, TOPK, BLOCK_E, TIE_BITS)
    kth_R = tl.min(tl.where(chosen, r, -NEVER), 1)
    next_R = tl.max(tl.where(chosen, NEVER, r), 1)
    return chosen, kth_R, next_R


@triton.jit
def choose_rows(
    scores_ptr, row_R, index_R, is_row_R, shift, price_E, spread_ptr, width, coarse,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK_E: tl.constexpr, TIE_BITS: tl.constexpr,
):  # fmt: skip
    """Return reduced scores of rows, and what :func:`choose` says of them.

    ``index_R`` are their indices in the problem. Without spread its pointer is None, its width 0.
    """
    scores = load_scores(scores_ptr, row_R, is_row_R, NUM_EXPERTS, BLOCK_E)
    r = reduced_tile(scores, shift, price_E, spread_ptr, width, index_R, NUM_EXPERTS, BLOCK_E)
    chosen, kth_R, next_R = choose(
        r, coarse, index_R, is_row_R, NUM_EXPERTS, TOPK, BLOCK_E, TIE_BITS
    )
    return r, chosen, kth_R, next_R


@triton.jit
def count_tile(
    r, chosen, kth_R, next_R, is_row_R, window_E, counts_ptr, load_E,
    NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Count gaps and bids of a tile; returns loads with those of the tile added."""
    expert = tl.arange(0, BLOCK_E)
    gap_R = kth_R - next_R
    level_R = tl.where(gap_R > 0, tl.minimum(level_of(tl.maximum(gap_R, 1)) + 1, LEVELS), 0)
    one_R = tl.full(level_R.shape, 1, tl.int32)
    tl.atomic_add(counts_ptr + NUM_EXPERTS + level_R, one_R, mask=is_row_R, sem="relaxed")
    threshold_R = (kth_R + next_R) >> 1
    bid = r - threshold_R[:, None]
    counts = is_row_R[:, None] & (expert < NUM_EXPERTS)[None, :] & (bid > -window_E[None, :])
    bid = tl.minimum(bid, window_E[None, :])
    half: tl.constexpr = BUCKETS // 2
    base_E = tl.maximum(level_of(window_E + 1) - (half - 1), 0)
    size = tl.maximum(tl.where(bid > 0, bid, 1 - bid), 1)
    size = tl.where(counts, size, 1)
    level = tl.maximum(tl.minimum(level_of(size) - base_E[None, :], half - 1), 1)
    level = tl.where(size > 1, level, 0)
    bucket = tl.where(bid > 0, half + level, half - 1 - level)
    at = counts_ptr + NUM_EXPERTS + _GAPS + expert[None, :] * BUCKETS + bucket
    tl.atomic_add(at, tl.full(bucket.shape, 1, tl.int32), mask=counts, sem="relaxed")
    return load_E + tl.sum((chosen & is_row_R[:, None]).to(tl.int32), 0)
