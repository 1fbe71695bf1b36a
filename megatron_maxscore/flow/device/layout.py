"""The memory through which the phases of a solve communicate; all of it stays on the device.

The int32 words of a problem are a header, which begins as zero, three sets of counts, and a state
for each program. Phases use the three sets in turn: each phase fills one set, reads the set of the
phase before and clears the set of the next one. The int64 keys of offers have three sets as well.
Programs derive their states from the same integers, so states differ only in OWN. float32 numbers
are stored as their bits.
"""

from __future__ import annotations

from triton.language import constexpr

# Kinds of phases, in the order in which they come.
SCAN, SWEEP, ROUND, CONCLUDE, ORDER = (constexpr(kind) for kind in range(5))

# The header. BARRIER: a barrier's count. SCALE: about the largest row range; LIMIT: the range to
# which larger ones are scaled down; GRAIN: about the largest grain of a row (all three float32
# powers of two). Numbers of rows: BAD, with NaN or +inf; ROWS_IN, all; FORBIDDEN, with forbidden
# arcs; SCALED, scaled down. MARK: what ranks compare. RANGES and GRAINS: how many rows have a
# range, and how many have a grain, of each exponent.
BARRIER, SCALE, LIMIT, GRAIN, BAD, ROWS_IN, FORBIDDEN, SCALED, MARK = map(constexpr, range(9))
RANGES, GRAINS, HEADER = constexpr(16), constexpr(16 + 256), constexpr(16 + 2 * 256)

# Numbers of the state. BEST: least overflow since the perturbation last changed; LAST: that of the
# last sweep; SINCE: sweeps since the best one; STALLS: sweeps that have met a plateau; GOES_BACK:
# the sweep under way repeats the best prices; HOT: 0 never annealed, 1 annealing, 2 annealed;
# AT_LEVEL: sweeps at this perturbation while annealing; DEPTH: earlier steps for acceleration;
# AGE: rounds since distances were forgotten, CYCLES: how often they were; MOVED: units in the round
# before; MEASURES: whether the round only measures distances; EPS: the perturbation in grains of a
# row (float32), BEST_EPS: the one at the best prices.
(
    KIND, SWEEPS, BEST, LAST, SINCE, STALLS, GOES_BACK, HOT, AT_LEVEL, DEPTH, ROUNDS, AGE, CYCLES,
    MOVED, MEASURES, EPS, BEST_EPS,
) = map(constexpr, range(17))  # fmt: skip
SCALARS = constexpr(32)
# Vectors of BLOCK_E after the numbers. PRICE_1, PRICE_2, STEP_1, STEP_2: prices and steps of one
# and two sweeps ago; EXCESS_1: the excess one sweep ago; WENT: by how much prices moved; EXCESS:
# loads minus capacities; DISTANCE: what it costs to bring a unit to an expert with room; GIVE,
# TAKE: units to give and to take in this round; COST: what taking costs; OWN: loads of the
# program's own rows.
(
    PRICE, WINDOW, BEST_PRICE, PRICE_1, PRICE_2, STEP_1, STEP_2, EXCESS_1, WENT, EXCESS, DISTANCE,
    GIVE, TAKE, COST, OWN,
) = map(constexpr, range(15))  # fmt: skip
VECTORS = constexpr(15)

# Vectors of a set of counts. First the loads; from UP on, bids above 0 within the window and its
# parts; from DOWN on, the same below 0; LEAST: cheapest swaps; OWN_LOAD: loads on this rank alone.
UP, DOWN, LEAST, OWN_LOAD, COUNTS = map(constexpr, (1, 5, 9, 10, 11))
