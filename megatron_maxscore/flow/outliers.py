"""Rows whose scores exceed all others by orders of magnitude.

Scores become integers relative to the largest row range of the problem (:mod:`problem`), so one row
with exploded scores would leave the others no bits. Such rows are scaled down to a range that is
still far above the others': they keep their order of experts and come first wherever they compete
with ordinary rows.

To find the outliers, rows are counted by their range, in classes of a factor of 256. These counts
are part of the first exchange and are summed over the ranks, so the answer does not depend on how
rows are split. At most one row in 16, or one row if there are fewer, can be an outlier. Of the
ordinary rows, the largest keeps at least 14 bits of its range (11 with more than 2048 experts).

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from megatron_maxscore.flow.problem import FloatArray, IntArray

# Ranges in [2 ** (8 i), 2 ** (8 i + 8)) are a class. Those of float32 scores lie between 2**-149
# and 2**129; smaller and larger ones (float64) count in the first and the last class.
_BITS = 8
_FIRST = -19
CLASSES = 38
# A row is an outlier if its range is so many bits above the class of the largest ordinary row.
_MARGIN_BITS = 14
# At most one row in so many is an outlier.
_SHARE = 16
# An outlier so many bits above the limit is scaled to 1.5 times the limit.
_HALF_WAY_BITS = 16.0


def classes(range_N: FloatArray, start_B: IntArray) -> NDArray:
    """Return (B, X) uint32, how many rows of each problem have a range of each class.

    Args:
        range_N: (N,) float64; rows without a range, or a wrong one, do not count.
        start_B: (B + 1,) int64 where each problem's rows begin.
    """
    problems = start_B.size - 1
    counts = np.isfinite(range_N) & (range_N > 0)
    exponent_N = np.frexp(np.where(counts, range_N, 1.0))[1].astype(np.int64) - 1
    class_N = np.clip((exponent_N >> (_BITS.bit_length() - 1)) - _FIRST, 0, CLASSES - 1)
    problem_N = np.repeat(np.arange(problems), np.diff(start_B))
    slots = (problem_N * CLASSES + class_N)[counts]
    return np.bincount(slots, minlength=problems * CLASSES).reshape(-1, CLASSES).astype(np.uint32)


def limits(classes_BX: IntArray, largest_B: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return from which range on rows are outliers, and the largest range when they are scaled.

    Args:
        classes_BX: (B, X) int64 rows of all ranks by class.
        largest_B: (B,) float64 their largest ranges.

    Returns:
        (B,) float64, inf where no row is an outlier; (B,) float64.
    """
    total_B = classes_BX.sum(1)
    allowed_B = np.maximum(1, total_B // _SHARE)
    # Rows of a class and those above it.
    above_BX = classes_BX[:, ::-1].cumsum(1)[:, ::-1]
    # The class of the row that follows the rows that may be outliers; -1 if there is no such row.
    ordinary_B = (above_BX > allowed_B[:, None]).sum(1) - 1
    exponent_B = (ordinary_B + 1 + _FIRST) * _BITS + _MARGIN_BITS
    limit_B = np.where(ordinary_B >= 0, np.ldexp(1.0, exponent_B), np.inf)
    has_outliers_B = largest_B > limit_B
    limit_B = np.where(has_outliers_B, limit_B, np.inf)
    # Outliers stay below twice the limit.
    return limit_B, np.where(has_outliers_B, np.nextafter(2 * limit_B, 0.0), largest_B)


def scaled(range_O: FloatArray, limit_O: FloatArray) -> FloatArray:
    """Return (O,) the ranges that outliers get: larger ones larger, all below twice the limit."""
    bits_O = np.log2(range_O / limit_O)
    result: FloatArray = limit_O * (1.0 + bits_O / (bits_O + _HALF_WAY_BITS))
    return result
