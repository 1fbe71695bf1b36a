"""What follows a pass over the scores: the sweep's decisions, by one program.

The same as :func:`sweeps.sweep`, whose comments say why; every number is an integer, or a float64
that is computed as there.

Shape letters: E experts (padded to a power of two), X experts of a chunk, H buckets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow import problem, sweeps
from megatron_maxscore.flow.device.kernels import layout
from megatron_maxscore.flow.device.kernels.integers import (
    edge_of,
    gap_within,
    level_of,
    to_integer,
)

_NUMBERS = tl.constexpr(layout.NUMBERS)
_GAPS = layout.GAPS
PASSES, BEST = layout.PASSES, layout.BEST
STALLS, STUCK, IS_PLAIN = layout.STALLS, layout.STUCK, layout.IS_PLAIN
WAS_LONG, WAS_SHORT, RELAXATION = layout.WAS_LONG, layout.WAS_SHORT, layout.RELAXATION
WIDTH = layout.WIDTH
PRICE, BEST_PRICE, LAST_PRICE = layout.PRICE, layout.BEST_PRICE, layout.LAST_PRICE
STEP, WINDOW, LOAD = layout.STEP, layout.WINDOW, layout.LOAD
_EVERYTHING = tl.constexpr(sweeps.EVERYTHING)
_RANGE = tl.constexpr(1 << problem.SCORE_BITS)
_LITTLE_SLACK = tl.constexpr(float(sweeps.LITTLE_SLACK))
_STALLED_ABOVE, _STALLED_BELOW = (tl.constexpr(float(part)) for part in sweeps.STALLED)
_STUCK_ABOVE, _STUCK_BELOW = (tl.constexpr(float(part)) for part in sweeps.STUCK)
_WINDOW_OWN = tl.constexpr(sweeps.WINDOW_OWN)
_WINDOW_MEAN = tl.constexpr(sweeps.WINDOW_MEAN)
# Steps of a sweep, relative to plain ones, in quarters: one after the other, the last one stays.
_FIRST, _SECOND, _THIRD, _FOURTH, _FIFTH, _LATER = (
    tl.constexpr(int(4 * relaxation)) for relaxation in sweeps.RELAXATION
)
# No overflow yet; a plain step in quarters.
NO_BEST = tl.constexpr(1 << 50)
_NO_BEST_UNITS = tl.constexpr(float(1 << 40))
_PLAIN = tl.constexpr(4)
_VERY_LONG = tl.constexpr(int(4 * sweeps.VERY_LONG))


@triton.jit
def vector(state_ptr, which, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return a vector of the state."""
    expert = tl.arange(0, BLOCK_E)
    at = state_ptr + _NUMBERS + which * NUM_EXPERTS + expert
    return tl.load(at, mask=expert < NUM_EXPERTS, other=0, cache_modifier=".cg")


@triton.jit
def set_vector(state_ptr, which, values, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Write a vector of the state."""
    expert = tl.arange(0, BLOCK_E)
    at = state_ptr + _NUMBERS + which * NUM_EXPERTS + expert
    tl.store(at, values, mask=expert < NUM_EXPERTS)


@triton.jit
def begin_sweep(state_ptr, price_E, window, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Reset what a sweep keeps, and start it from these prices."""
    for number in tl.static_range(8):
        tl.store(state_ptr + PASSES + number, 0)
    tl.store(state_ptr + BEST, NO_BEST)
    tl.store(state_ptr + RELAXATION, _PLAIN)
    zero_E = tl.zeros([BLOCK_E], tl.int64)
    set_vector(state_ptr, PRICE, price_E, NUM_EXPERTS, BLOCK_E)
    set_vector(state_ptr, BEST_PRICE, price_E, NUM_EXPERTS, BLOCK_E)
    set_vector(state_ptr, LAST_PRICE, price_E, NUM_EXPERTS, BLOCK_E)
    set_vector(state_ptr, STEP, zero_E, NUM_EXPERTS, BLOCK_E)
    set_vector(state_ptr, WINDOW, zero_E + window, NUM_EXPERTS, BLOCK_E)


@triton.jit
def is_little_slack(capacity_E, units):
    """Return whether sweeps take capacities, float64, as tight."""
    slack = tl.abs(tl.sum(capacity_E, 0) - units.to(tl.float64))
    return slack * _LITTLE_SLACK < units.to(tl.float64) + _LITTLE_SLACK / 2


@triton.jit
def overflow(load_E, price_E, capacity_E, is_tight):
    """Return units above capacity, or missing at a positive price, as float64."""
    excess_E = load_E.to(tl.float64) - capacity_E
    over = tl.sum(tl.maximum(excess_E, 0.0), 0)
    idle = tl.sum(tl.where(price_E > 0, tl.maximum(-excess_E, 0.0), 0.0), 0)
    return tl.where(is_tight, over, tl.maximum(over, idle))


@triton.jit
def within_limits(price_E, is_tight, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Keep prices where optimal ones can be found."""
    is_expert = tl.arange(0, BLOCK_E) < NUM_EXPERTS
    highest = tl.max(tl.where(is_expert, price_E, -_EVERYTHING), 0)
    low_E = tl.maximum(price_E, highest - _RANGE * (NUM_EXPERTS - 1))
    positive_E = tl.maximum(low_E, 0)
    positive_E -= tl.min(tl.where(is_expert, positive_E, _EVERYTHING), 0)
    return tl.where(is_expert, tl.where(is_tight, low_E, positive_E), 0)


@triton.jit
def _edges(bucket, base, HALF: tl.constexpr):
    """Return the lower and upper edge of a bucket, float64."""
    is_positive = bucket >= HALF
    step = tl.where(is_positive, bucket - HALF, HALF - 1 - bucket)
    near = tl.where(step > 1, edge_of(base + step), 1.0 + step.to(tl.float64))
    far = tl.where(step > 0, edge_of(base + step + 1), 2.0)
    return tl.where(is_positive, near, 1.0 - far), tl.where(is_positive, far, 1.0 - near)


@triton.jit
def _bids(
    counts_ptr, capacity_ptr, scale, window_ptr, first,
    NUM_EXPERTS: tl.constexpr, BUCKETS: tl.constexpr, BLOCK_H: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Load counts from the highest bucket down, capacities and windows of a chunk of experts."""
    expert_X = first + tl.arange(0, CHUNK)
    is_expert_X = expert_X < NUM_EXPERTS
    h = tl.arange(0, BLOCK_H)[None, :]
    at = counts_ptr + NUM_EXPERTS + _GAPS + expert_X[:, None] * BUCKETS + (BUCKETS - 1 - h)
    inside = is_expert_X[:, None] & (h < BUCKETS)
    bids = tl.load(at, mask=inside, other=0, cache_modifier=".cg")
    window_X = tl.load(window_ptr + expert_X, mask=is_expert_X, other=1, cache_modifier=".cg")
    return bids, capacity_of(capacity_ptr, expert_X, is_expert_X, scale), window_X


@triton.jit
def price_steps(
    counts_ptr, capacity_ptr, scale, steps_ptr, window_ptr,
    NUM_EXPERTS: tl.constexpr, BUCKETS: tl.constexpr, BLOCK_H: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the price steps that the counts of bids call for; see :func:`buckets.price_step`."""
    HALF: tl.constexpr = BUCKETS // 2
    h = tl.arange(0, BLOCK_H)[None, :]
    next_bids, next_capacity_X, next_window_X = _bids(
        counts_ptr, capacity_ptr, scale, window_ptr, 0, NUM_EXPERTS, BUCKETS, BLOCK_H, CHUNK
    )
    for first in range(0, NUM_EXPERTS, CHUNK):
        bids, capacity_X, window_X = next_bids, next_capacity_X, next_window_X
        # On their way while this chunk is worked on.
        next_bids, next_capacity_X, next_window_X = _bids(
            counts_ptr, capacity_ptr, scale, window_ptr, first + CHUNK, NUM_EXPERTS, BUCKETS,
            BLOCK_H, CHUNK,
        )  # fmt: skip
        expert_X = first + tl.arange(0, CHUNK)
        is_expert_X = expert_X < NUM_EXPERTS
        base_X = tl.maximum(level_of(window_X + 1) - (HALF - 1), 0)
        bucket = BUCKETS - 1 - h
        inside = is_expert_X[:, None] & (h < BUCKETS)
        reach = tl.cumsum(bids, 1)
        # As integers: counts are more than a capacity if they are more than its whole part.
        whole_X = tl.floor(capacity_X).to(tl.int32)
        fits = inside & (reach <= whole_X[:, None])
        all_X = tl.max(reach, 1)
        has_too_many_X = all_X > whole_X
        # Buckets that fit, from the highest down, leave the one that does not.
        bucket_X = BUCKETS - 1 - tl.sum(fits.to(tl.int32), 1)
        bucket_X = tl.where(has_too_many_X, bucket_X, 0)
        above_X = tl.max(tl.where(fits, reach, 0), 1)
        until_X = tl.min(tl.where(fits, all_X[:, None], reach), 1)
        inside_X = until_X - above_X
        low_X, high_X = _edges(bucket_X, base_X, HALF)
        share_X = (capacity_X - above_X.to(tl.float64)) / tl.maximum(inside_X, 1).to(tl.float64)
        step_X = tl.floor(high_X - (high_X - low_X) * share_X)
        lowest_X = tl.min(tl.where(bids > 0, bucket, BUCKETS), 1)
        lowest_X = tl.where(all_X > 0, lowest_X, 0)
        barely_X, _ = _edges(lowest_X, base_X, HALF)
        barely_X = tl.where(all_X > 0, barely_X, -window_X.to(tl.float64))
        step_X = tl.where(has_too_many_X, step_X, barely_X).to(tl.int64)
        tl.store(steps_ptr + expert_X, step_X, mask=is_expert_X)


@triton.jit
def capacity_of(capacity_ptr, expert, is_expert, scale):
    """Return capacities as float64; those of a sample, which is this share of the rows."""
    capacity = tl.load(capacity_ptr + expert, mask=is_expert, other=0).to(tl.float64)
    in_sample = to_integer(capacity * scale * 1024.0).to(tl.float64) / 1024.0
    return tl.where(scale == 1.0, capacity, in_sample)


@triton.jit
def clear(counts_ptr, NUM_EXPERTS: tl.constexpr, BUCKETS: tl.constexpr):
    """Set the counts to 0 for the next pass."""
    size: tl.constexpr = NUM_EXPERTS + _GAPS + NUM_EXPERTS * BUCKETS
    for first in range(0, size, 1024):
        at = first + tl.arange(0, 1024)
        tl.store(counts_ptr + at, tl.zeros([1024], tl.int32), mask=at < size)


@triton.jit
def control(
    state_ptr, counts_ptr, capacity_ptr, scale, rows, units, aim, near, too_much, max_passes,
    NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK_H: tl.constexpr, CHUNK: tl.constexpr, MAY_SPREAD: tl.constexpr,
):  # fmt: skip
    """Take in what a pass has counted, and set prices and window for the next, or end the sweep.

    Units of overflow to compare with are given in 1/1024. Returns whether the sweep has ended.
    """
    expert = tl.arange(0, BLOCK_E)
    is_expert = expert < NUM_EXPERTS
    load_E = tl.load(counts_ptr + expert, mask=is_expert, other=0, cache_modifier=".cg")
    load_E = load_E.to(tl.int64)
    capacity_E = capacity_of(capacity_ptr, expert, is_expert, scale)
    price_E = vector(state_ptr, PRICE, NUM_EXPERTS, BLOCK_E)
    best_price_E = vector(state_ptr, BEST_PRICE, NUM_EXPERTS, BLOCK_E)
    window_E = vector(state_ptr, WINDOW, NUM_EXPERTS, BLOCK_E)
    passes = tl.load(state_ptr + PASSES) + 1
    best = tl.load(state_ptr + BEST).to(tl.float64) / 1024.0
    stalls = tl.load(state_ptr + STALLS)
    stuck = tl.load(state_ptr + STUCK)
    is_plain = tl.load(state_ptr + IS_PLAIN) != 0
    was_long = tl.load(state_ptr + WAS_LONG) != 0
    was_short = tl.load(state_ptr + WAS_SHORT) != 0
    last_relaxation = tl.load(state_ptr + RELAXATION)
    width = tl.load(state_ptr + WIDTH)
    is_tight = is_little_slack(capacity_E, units)
    now = overflow(load_E, price_E, capacity_E, is_tight)

    is_best = now <= best
    is_near = now <= near.to(tl.float64) / 1024.0
    take_back = (is_best == 0) & was_long
    is_plain = is_plain | take_back
    is_stalled = now * _STALLED_BELOW > best * _STALLED_ABOVE
    is_stuck = now * _STUCK_BELOW > best * _STUCK_ABOVE
    is_much = now > too_much.to(tl.float64) / 1024.0
    says = is_near & (was_short == 0) & (last_relaxation < _VERY_LONG) & (take_back == 0)
    stalls += (says & (is_stalled | (is_best == 0))).to(tl.int64)
    stalls += (now == best).to(tl.int64)
    stuck += (is_much & is_stuck).to(tl.int64)
    best_price_E = tl.where(is_best, price_E, best_price_E)
    best = tl.where(is_best, now, best)
    if MAY_SPREAD:
        if (stuck >= 2) & (width == 0) & (passes < max_passes - 1):
            width = gap_within(counts_ptr + NUM_EXPERTS, rows // 2, 256)
            tl.store(state_ptr + WIDTH, width)
            stalls = tl.where(width > 0, 0, stalls)
            best = tl.where(width > 0, _NO_BEST_UNITS, best)
    enough = (best <= aim.to(tl.float64) / 1024.0) | (stalls >= 2) | (passes >= max_passes - 1)
    is_same = tl.sum((is_expert & (price_E != best_price_E)).to(tl.int32), 0) == 0
    ends = enough & (is_best | is_same)
    tl.store(state_ptr + PASSES, passes)
    set_vector(state_ptr, LOAD, load_E, NUM_EXPERTS, BLOCK_E)
    if ends == 0:
        steps_ptr = state_ptr + _NUMBERS + STEP * NUM_EXPERTS
        window_ptr = state_ptr + _NUMBERS + WINDOW * NUM_EXPERTS
        last_step_E = vector(state_ptr, STEP, NUM_EXPERTS, BLOCK_E)
        last_price_E = vector(state_ptr, LAST_PRICE, NUM_EXPERTS, BLOCK_E)
        tl.debug_barrier()
        price_steps(
            counts_ptr, capacity_ptr, scale, steps_ptr, window_ptr, NUM_EXPERTS, BUCKETS, BLOCK_H,
            CHUNK,
        )  # fmt: skip
        tl.debug_barrier()
        fresh_E = vector(state_ptr, STEP, NUM_EXPERTS, BLOCK_E)
        relaxation = tl.where(passes == 1, _FIRST, _LATER)
        relaxation = tl.where(passes == 2, _SECOND, relaxation)
        relaxation = tl.where(passes == 3, _THIRD, relaxation)
        relaxation = tl.where(passes == 4, _FOURTH, relaxation)
        relaxation = tl.where(passes == 5, _FIFTH, relaxation)
        relaxation = tl.where(is_plain | (is_near == 0), _PLAIN, relaxation)
        was_long = (take_back == 0) & (relaxation > _PLAIN)
        factor = relaxation.to(tl.float64) / 4.0
        onward_E = to_integer(price_E.to(tl.float64) + factor * fresh_E.to(tl.float64))
        moved_E = tl.where(take_back, last_price_E + last_step_E, onward_E)
        moved_E = within_limits(moved_E, is_tight, NUM_EXPERTS, BLOCK_E)
        next_E = tl.where(enough, best_price_E, moved_E)
        step_E = tl.where(take_back, last_step_E, fresh_E)
        step_E = tl.where(is_expert, step_E, 0)
        last_price_E = tl.where(take_back, last_price_E, price_E)
        size_E = tl.abs(step_E)
        hits_edge_E = is_expert & (2 * size_E >= window_E)
        was_short = tl.sum(hits_edge_E.to(tl.int32), 0) > 0
        mean = tl.sum(size_E, 0) // NUM_EXPERTS
        next_window_E = size_E * _WINDOW_OWN + mean * _WINDOW_MEAN + 4
        next_window_E = tl.where(hits_edge_E, 8 * window_E, next_window_E)
        tl.store(state_ptr + BEST, (best * 1024.0).to(tl.int64))
        tl.store(state_ptr + STALLS, stalls)
        tl.store(state_ptr + STUCK, stuck)
        tl.store(state_ptr + IS_PLAIN, is_plain.to(tl.int64))
        tl.store(state_ptr + WAS_LONG, was_long.to(tl.int64))
        tl.store(state_ptr + WAS_SHORT, was_short.to(tl.int64))
        tl.store(state_ptr + RELAXATION, relaxation.to(tl.int64))
        set_vector(state_ptr, PRICE, next_E, NUM_EXPERTS, BLOCK_E)
        set_vector(state_ptr, BEST_PRICE, best_price_E, NUM_EXPERTS, BLOCK_E)
        set_vector(state_ptr, LAST_PRICE, last_price_E, NUM_EXPERTS, BLOCK_E)
        set_vector(state_ptr, STEP, step_E, NUM_EXPERTS, BLOCK_E)
        next_window_E = tl.minimum(next_window_E, _EVERYTHING)
        set_vector(state_ptr, WINDOW, next_window_E, NUM_EXPERTS, BLOCK_E)
    return ends
