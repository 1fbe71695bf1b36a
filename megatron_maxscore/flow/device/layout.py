"""Where the phases of a solve keep what they tell each other; all of it stays on the device.

A problem's int32 words: a header, which begins as zero; three sets of counts in turn (a phase fills
one, reads the last one's and clears the next one's); and a state for each program. Programs derive
their states from the same integers, so they are alike but for OWN. The keys of offers, int64, have
three sets as well. float32 are kept by their bits.
"""

from __future__ import annotations

from triton.language import constexpr

# Kinds of phases, in the order in which they come.
SCAN, SWEEP, ROUND, CONCLUDE, ORDER = (constexpr(kind) for kind in range(5))

# The header: a barrier's count, about the largest row range (float32, a power of two), the range
# to which larger ones are scaled down and about the largest grain of a row (float32, powers of
# two); rows with scores that are not finite, rows, rows with forbidden arcs, rows scaled down, what
# ranks compare; then how many rows have a range, and how many have a grain, of each exponent.
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
# Vectors of BLOCK_E after them: prices, windows, the best prices, prices and steps of one and two
# sweeps ago, the excess then, by how much prices went, loads less capacities, what it costs to
# bring a unit to an expert with room, units to give and to take in the round and what taking
# costs, loads of the program's own rows.
(
    PRICE, WINDOW, BEST_PRICE, PRICE_1, PRICE_2, STEP_1, STEP_2, EXCESS_1, WENT, EXCESS, DISTANCE,
    GIVE, TAKE, COST, OWN,
) = map(constexpr, range(15))  # fmt: skip
VECTORS = constexpr(15)

# Counts: loads, bids within the window and its parts above 0, the same below 0, cheapest swaps,
# loads again, of this rank alone.
UP, DOWN, LEAST, OWN_LOAD, COUNTS = map(constexpr, (1, 5, 9, 10, 11))
