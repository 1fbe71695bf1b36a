"""Prices that differ a little from class to class of rows, for bounded mode.

Where many rows are equal, they all change their experts at the same price, and sweeps, which give
every row its best experts, can do no better than to leave whole groups of them on the wrong side.
Rows are therefore dealt into classes by their index, and each class sees prices of its own, about
half of a typical gap above or below the common ones: equal rows part. What that loses is second
order in the width, and is part of the certified gap.

Shape letters: C classes, E experts.
"""

from __future__ import annotations

import functools

import numpy as np

from megatron_maxscore.flow.problem import IntArray

# A power of two; a row is in the class of its index modulo this.
NUM_CLASSES = 64
# The table spans -0.5 to 0.5 with so many bits.
TABLE_BITS = 16


@functools.cache
def spread_table(num_experts: int) -> IntArray:
    """Return (C, E) int64 from -2**15 to 2**15; each expert's are evenly spaced, in mixed order."""
    index = np.arange(NUM_CLASSES * num_experts, dtype=np.uint64).reshape(NUM_CLASSES, -1)
    # The finaliser of splitmix64.
    mixed = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    order_CE = mixed.argsort(0).argsort(0)
    table_CE = ((2 * order_CE + 1 - NUM_CLASSES) << (TABLE_BITS - 1)) // NUM_CLASSES
    table_CE.flags.writeable = False
    return np.asarray(table_CE)
