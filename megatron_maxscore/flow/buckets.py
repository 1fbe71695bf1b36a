"""Histograms of bids on a logarithmic scale, and the price step read off them.

A bid is what a token's reduced score has above its threshold. A sweep needs, for each expert, the
price at which exactly C bids stay positive. Counting bids in buckets of four per octave gives it to
about the tenth of its own distance from zero, whatever the scale of the scores, from integers that
can be added up in any order and over ranks.

Shape letters: B problems, E experts, H buckets.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow.problem import IntArray

# A bid's bucket is its exponent and the leading bits of its mantissa as a float64.
MANTISSA_BITS = 2
_OCTAVES = 50
BUCKETS_PER_SIGN = _OCTAVES << MANTISSA_BITS
NUM_BUCKETS = 2 * BUCKETS_PER_SIGN


def _edges() -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper edge of every bucket, lowest bids first, both float64."""
    step = np.arange(BUCKETS_PER_SIGN + 1)
    per_octave = 1 << MANTISSA_BITS
    size = np.ldexp(1.0 + (step % per_octave) / per_octave, step // per_octave)
    # Positive bids b by b, others by 1 - b >= 1.
    low_H = np.concatenate([1.0 - size[:0:-1], size[:-1]])
    high_H = np.concatenate([1.0 - size[-2::-1], size[1:]])
    return low_H, high_H


LOW_H, HIGH_H = _edges()


def bucket_of(bids: IntArray) -> IntArray:
    """Return the bucket of each int64 bid, at most 2**49 in size."""
    size = np.where(bids > 0, bids, 1 - bids).astype(np.float64)
    level = (size.view(np.int64) >> (52 - MANTISSA_BITS)) - (1023 << MANTISSA_BITS)
    return np.where(bids > 0, BUCKETS_PER_SIGN + level, BUCKETS_PER_SIGN - 1 - level)


def price_step(bids_BEH: np.ndarray, capacity_BE: np.ndarray, window_BE: IntArray) -> IntArray:
    """Return (B, E) int64 by how much each price must rise for C of its bids to stay positive.

    Args:
        bids_BEH: (B, E, H) counts of bids by bucket.
        capacity_BE: (B, E) capacities, int64 or float64.
        window_BE: (B, E) int64; bids at or below minus this were not counted.

    Example:
        A price rises until the bid that is one too many is not positive any more:

        >>> bids = np.zeros((1, 1, NUM_BUCKETS), np.int32)
        >>> for bid in (3, 5, 9):
        ...     bids[0, 0, bucket_of(np.array(bid))] += 1
        >>> price_step(bids, np.array([[2]]), np.array([[100]]))
        array([[3]])
    """
    # Bids in this bucket and in those above it.
    reach_BEH = bids_BEH[..., ::-1].cumsum(-1, dtype=np.int64)[..., ::-1]
    has_too_many_BE = reach_BEH[..., 0] > capacity_BE
    # The highest bucket whose bids and all above are more than C.
    exceeds_BEH = reach_BEH > capacity_BE[..., None]
    bucket_BE = np.where(has_too_many_BE, exceeds_BEH.sum(-1) - 1, 0)
    inside_BE = np.take_along_axis(bids_BEH, bucket_BE[..., None], -1)[..., 0]
    above_BE = np.take_along_axis(reach_BEH, bucket_BE[..., None], -1)[..., 0] - inside_BE
    low_BE, high_BE = LOW_H[bucket_BE], HIGH_H[bucket_BE]
    share_BE = (capacity_BE - above_BE) / np.maximum(inside_BE, 1)
    step_BE = np.floor(high_BE - (high_BE - low_BE) * share_BE)
    # All bids counted may stay: lower the price until the lowest of them is barely positive.
    any_BE = reach_BEH[..., 0] > 0
    lowest_BE = np.where(any_BE, LOW_H[(bids_BEH > 0).argmax(-1)], 0.0)
    lowest_BE = np.where(any_BE, lowest_BE, -window_BE.astype(np.float64))
    return np.where(has_too_many_BE, step_BE, lowest_BE).astype(np.int64)
