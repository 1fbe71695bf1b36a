"""Histograms of bids on a logarithmic scale, from which price steps are read.

A bid is a token's reduced score minus its threshold. A sweep needs, for each expert, the price step
that leaves exactly C bids positive. With four buckets per octave, the histogram gives this step
with an error of about a tenth of its size, whatever the scale of the scores. The counts are
integers, which can be added up in any order and over ranks.

The window of an expert says how far its price may be off. If it is known, only some octaves below
the window have buckets of their own, and bids nearer to zero share one bucket for each sign. Bids
of 0 and 1 always have the two innermost buckets to themselves, because many bids of 0 form a
plateau, which no price step may cross.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow.problem import IntArray

# The level of a size is its exponent and the leading bits of its mantissa as a float64.
MANTISSA_BITS = 2
NUM_LEVELS = 50 << MANTISSA_BITS
# Buckets for both signs: all levels, and the 18 octaves below a window.
ALL_BUCKETS = 2 * NUM_LEVELS
WINDOW_BUCKETS = 2 * (18 << MANTISSA_BITS)


def _edges() -> np.ndarray:
    step = np.arange(NUM_LEVELS + 1)
    per_octave = 1 << MANTISSA_BITS
    return np.ldexp(1.0 + (step % per_octave) / per_octave, step // per_octave)


# Level l holds sizes from EDGE_L[l] to below EDGE_L[l + 1].
EDGE_L = _edges()


def level_of(sizes: IntArray) -> IntArray:
    """Return the level of each int64 size, from 1 to 2**50."""
    bits = np.asarray(sizes).astype(np.float64).view(np.int64)
    return np.asarray((bits >> (52 - MANTISSA_BITS)) - (1023 << MANTISSA_BITS))


def base_of(window_BE: IntArray, num_buckets: int) -> IntArray:
    """Return (B, E) int64 the level of the innermost buckets; the outermost hold the window."""
    return np.asarray(np.maximum(level_of(window_BE + 1) - (num_buckets // 2 - 1), 0))


def gap_within(gaps_D: IntArray, rank: int) -> int:
    """Return a number such that the gaps of more than ``rank`` rows are not above it.

    It is read off the counts of gaps by level: the upper edge of a level, as an integer.
    """
    level = int(np.searchsorted(gaps_D.cumsum(), rank, side="right"))
    return 0 if level == 0 else int(EDGE_L[min(level, NUM_LEVELS)])
