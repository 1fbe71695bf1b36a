"""Where the phases of a solve keep what they tell each other; all of it stays on the device.

A problem's int32 words: a header, two copies of the state (a phase reads one and writes the other),
three sets of counts in turn (a phase fills one, reads the last one's and clears the next one's).
Its int64 words are the keys of offers, in three sets as well. All of them begin as zero.
"""

from __future__ import annotations

from triton.language import constexpr

# Kinds of phases.
SCAN, SWEEP, ROUND, CONCLUDE, DONE = (constexpr(kind) for kind in range(5))

# The header: a barrier's count, programs that have concluded, rows with scores that are not finite,
# rows, rows with forbidden arcs, rows scaled down, what ranks compare; then, from EXPONENTS on, how
# many rows have a range of each exponent.
BARRIER, TICKET, BAD, ROWS_IN, FORBIDDEN, SCALED, MARK = (constexpr(word) for word in range(7))
EXPONENTS = constexpr(16)
HEADER = constexpr(EXPONENTS.value + 256)

# Numbers of the state. BEST: least overflow since the perturbation last changed; LAST: that of the
# last sweep; SINCE: sweeps since the best one; STALLS: sweeps that have met a plateau; GOES_BACK:
# the sweep under way repeats the best prices; HOT: 0 never annealed, 1 annealing, 2 annealed;
# AT_LEVEL: sweeps at this perturbation while annealing; DEPTH: earlier steps for acceleration;
# AGE: rounds since distances were forgotten, CYCLES: how often they were; MOVED: units in the round
# before; MEASURES: whether the round only measures distances.
(
    KIND, SWEEPS, BEST, LAST, SINCE, STALLS, GOES_BACK, HOT, AT_LEVEL, DEPTH, ROUNDS, AGE, CYCLES,
    MOVED, MEASURES,
) = (constexpr(number) for number in range(15))  # fmt: skip
# float32 by their bits: the perturbation in widths of a row, the one at the best prices, about the
# largest row range (a power of two), and the range to which larger ones are scaled down.
EPS, BEST_EPS, SCALE, LIMIT = (constexpr(number) for number in range(15, 19))
SCALARS = constexpr(32)
# Vectors of BLOCK_E after them: prices, windows, the best prices, prices and steps of one and two
# sweeps ago, the excess then, by how much prices went, loads less capacities, what it costs to
# bring a unit to an expert with room, units to give and to take in the round.
(
    PRICE, WINDOW, BEST_PRICE, PRICE_1, PRICE_2, STEP_1, STEP_2, EXCESS_1, WENT, EXCESS, DISTANCE,
    GIVE, TAKE,
) = (constexpr(vector) for vector in range(13))  # fmt: skip
VECTORS = constexpr(13)

# Counts: loads, bids within the window and its parts above 0, the same below 0, cheapest swaps.
UP, DOWN, LEAST, OWN_LOAD = constexpr(1), constexpr(5), constexpr(9), constexpr(10)
COUNTS = constexpr(11)


def problem_words(block_e: int) -> int:
    """Return the int32 words of a problem, an even number."""
    state = SCALARS.value + VECTORS.value * block_e
    return HEADER.value + 2 * state + 3 * COUNTS.value * block_e
