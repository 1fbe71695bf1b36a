"""Histograms of bids and price steps in numpy, slowly: what the kernels are compared with.

Shape letters: B problems, E experts, H buckets, L levels.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow.buckets import (
    EDGE_L,
    MANTISSA_BITS,
    NUM_LEVELS,
    base_of,
    level_of,
)
from megatron_maxscore.flow.problem import IntArray


def bucket_of(bids: IntArray) -> IntArray:
    """Return the bucket, among all levels, of int64 bids of at most 2**49 in size; lowest first."""
    # Bids from 0 down become -1 and below, so that the bits of the float have sign and level.
    levels = (bids - (bids <= 0)).astype(np.float64).view(np.int64)
    levels >>= 52 - MANTISSA_BITS
    return _BUCKET_OF_BITS[levels]


def _bucket_of_bits() -> IntArray:
    """Return the bucket by sign, exponent and leading bits of the mantissa of a float64.

    A negative float has negative bits, which count from the end of the table.
    """
    zero = 1023 << MANTISSA_BITS
    level = np.clip(np.arange(1 << (11 + MANTISSA_BITS)) - zero, 0, NUM_LEVELS - 1)
    return np.concatenate([NUM_LEVELS + level, NUM_LEVELS - 1 - level])


_BUCKET_OF_BITS = _bucket_of_bits()


def within_windows(count_US: np.ndarray, window_BE: IntArray, num_buckets: int) -> np.ndarray:
    """Return counts by each expert's own buckets from counts by all levels.

    Args:
        count_US: (ALL_BUCKETS, B * E) of bids above minus the window.
        window_BE: (B, E) int64; bids above it count as equal to it.
        num_buckets: H.

    Returns:
        (B, E, U) int32.
    """
    half = num_buckets // 2
    window_S, base_S = window_BE.ravel(), base_of(window_BE, num_buckets).ravel()
    level_DS = np.minimum(np.arange(NUM_LEVELS)[:, None], level_of(window_S))
    # Only the innermost buckets hold bids of size 1, which are those of level 0.
    step_DS = np.where(level_DS > 0, np.clip(level_DS - base_S, 1, half - 1), 0)
    bucket_US = np.concatenate([(half - 1 - step_DS)[::-1], half + step_DS])
    bucket_US += np.arange(window_S.size) * num_buckets
    used = np.flatnonzero(count_US)
    bids_U = np.bincount(
        bucket_US.ravel()[used], count_US.ravel()[used], window_S.size * num_buckets
    )
    return bids_U.astype(np.int32).reshape(*window_BE.shape, num_buckets)


def _edges_of(
    bucket_BE: IntArray, base_BE: IntArray, num_buckets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper edge of a bucket for each expert, both float64."""
    half = num_buckets // 2
    is_positive_BE = bucket_BE >= half
    step_BE = np.where(is_positive_BE, bucket_BE - half, half - 1 - bucket_BE)
    # The innermost holds size 1 alone, the next one all between that and its own level.
    near_BE = np.where(step_BE > 1, EDGE_L[base_BE + step_BE], 1.0 + step_BE)
    far_BE = np.where(step_BE > 0, EDGE_L[base_BE + step_BE + 1], 2.0)
    return (
        np.where(is_positive_BE, near_BE, 1.0 - far_BE),
        np.where(is_positive_BE, far_BE, 1.0 - near_BE),
    )


def price_step(bids_BEU: np.ndarray, capacity_BE: np.ndarray, window_BE: IntArray) -> IntArray:
    """Return (B, E) int64 by how much each price must rise for loads to become the capacities.

    Args:
        bids_BEU: (B, E, U) counts of bids by bucket.
        capacity_BE: (B, E) capacities, int64 or float64.
        window_BE: (B, E) int64; bids at or below minus this were not counted.

    Example:
        A price rises until the bid that is one too many is not positive any more:

        >>> bids, window = np.zeros((1, 1, 2 * NUM_LEVELS), np.int32), np.array([[1 << 49]])
        >>> for bid in (3, 5, 9):
        ...     bids[0, 0, bucket_of(np.array([bid]))] += 1
        >>> price_step(bids, np.array([[2]]), window)
        array([[3]])
    """
    num_buckets = bids_BEU.shape[-1]
    base_BE = base_of(window_BE, num_buckets)
    # Bids in this bucket and in those above it.
    reach_BEU = bids_BEU[..., ::-1].cumsum(-1, dtype=np.int64)[..., ::-1]
    has_too_many_BE = reach_BEU[..., 0] > capacity_BE
    # The highest bucket whose bids and all above are more than C.
    exceeds_BEU = reach_BEU > capacity_BE[..., None]
    bucket_BE = np.where(has_too_many_BE, exceeds_BEU.sum(-1) - 1, 0)
    inside_BE = np.take_along_axis(bids_BEU, bucket_BE[..., None], -1)[..., 0]
    above_BE = np.take_along_axis(reach_BEU, bucket_BE[..., None], -1)[..., 0] - inside_BE
    low_BE, high_BE = _edges_of(bucket_BE, base_BE, num_buckets)
    share_BE = (capacity_BE - above_BE) / np.maximum(inside_BE, 1)
    step_BE = np.floor(high_BE - (high_BE - low_BE) * share_BE)
    # All bids counted may stay: lower the price until the lowest of them is barely positive.
    any_BE = reach_BEU[..., 0] > 0
    lowest_BE = _edges_of((bids_BEU > 0).argmax(-1), base_BE, num_buckets)[0]
    lowest_BE = np.where(any_BE, lowest_BE, -window_BE.astype(np.float64))
    return np.where(has_too_many_BE, step_BE, lowest_BE).astype(np.int64)


def gap_level_of(gaps: IntArray) -> IntArray:
    """Return 0 for a gap of 0, else its level + 1; the last level holds all larger ones too."""
    level = level_of(np.clip(gaps, 1, 1 << 49)) + 1
    return np.where(gaps > 0, np.minimum(level, NUM_LEVELS), 0)
