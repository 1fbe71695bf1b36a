"""Where kernels keep what they tell each other; all of it stays on the device.

``state`` is int64: the numbers below, then vectors of E. ``counts`` is int32: loads (E), gaps by
level (:data:`GAPS`), bids by expert and bucket (E x H). ``partial`` is float64, numbers of every
program.
"""

from __future__ import annotations

import triton.language as tl

from megatron_maxscore.flow.buckets import NUM_LEVELS

# Numbers in the state.
PHASE = tl.constexpr(0)
SHIFT = tl.constexpr(1)
PASSES = tl.constexpr(2)
BEST = tl.constexpr(3)
STALLS = tl.constexpr(4)
STUCK = tl.constexpr(5)
IS_PLAIN = tl.constexpr(6)
WAS_LONG = tl.constexpr(7)
WAS_SHORT = tl.constexpr(8)
RELAXATION = tl.constexpr(9)
WIDTH = tl.constexpr(10)
FINISHED = tl.constexpr(11)
REACH = tl.constexpr(12)
STRIDE = tl.constexpr(13)
COST_SHIFT = tl.constexpr(14)
NEAR_ROWS = tl.constexpr(15)
BAD = tl.constexpr(16)
ROUNDS = tl.constexpr(17)
ALL_ROUNDS = tl.constexpr(18)
UNITS = tl.constexpr(19)
MAX_PASSES = tl.constexpr(20)
NEXT_TILE = tl.constexpr(21)
TILES_DONE = tl.constexpr(22)
CLASSES_NOW = tl.constexpr(23)
LEADER = tl.constexpr(24)
NUMBERS = 32

# Vectors of E after them.
PRICE = tl.constexpr(0)
BEST_PRICE = tl.constexpr(1)
LAST_PRICE = tl.constexpr(2)
STEP = tl.constexpr(3)
WINDOW = tl.constexpr(4)
LOAD = tl.constexpr(5)
VECTORS = 6

# What there is to do: sweeps, a sample first, nothing more.
SWEEPS = tl.constexpr(0)
SAMPLE = tl.constexpr(1)
DONE = tl.constexpr(2)

# Room for counts of gaps by level.
GAPS = tl.constexpr(NUM_LEVELS + 8)

# int32 of a contested row: its index, which of its experts it has as bits, four experts, four
# values, and the arc that it offers.
NEAR_SIZE = tl.constexpr(11)

# Numbers in the output of a solve, float64: objective, bound, gap, then the prices.
OBJECTIVE = tl.constexpr(0)
BOUND = tl.constexpr(1)
GAP = tl.constexpr(2)


def state_size(num_experts: int) -> int:
    """Return how many int64 the state has."""
    return NUMBERS + VECTORS * num_experts
