"""What the phases decide, from integers alone: every program works it out alike.

Shape letters: E experts (padded to BLOCK_E), S slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow.device import layout as at
from megatron_maxscore.flow.device.rows import ROW_MASK, slot_of

_INF, _INF_BITS = tl.constexpr(float("inf")), tl.constexpr(0x7F800000)
_MANY = tl.constexpr(0x7FFFFFFF)
# Perturbations: at first, on plateaus at most; while annealing at first and at last.
_EPS, _EPS_MOST, _HEAT, _COLD = (tl.constexpr(2.0**p) for p in (-12, -7, 0, -8))
# Sweeps at most; after annealing, or as long as an expert is far from its capacity.
_SWEEPS, _LONG = tl.constexpr(20), tl.constexpr(40)
# By how much steps are longer than plain ones.
_OMEGA = tl.constexpr(1.5)
# With so few units each of them counts: rounds that only measure distances and rounds that move
# units by them alternate, so many cycles at most.
_FEW, _RELAX, _MOVE, _CYCLES = (tl.constexpr(n) for n in (8192, 3, 3, 6))
# Rounds after which targets are chosen with ever more noise, and of filling idle experts at most.
CALM, FILLS = tl.constexpr(192), tl.constexpr(512)
# What a launch does when sweeps are over: go on to rounds, repeat the last sweep, or end them.
GO_ON, HOLD, END = (tl.constexpr(n) for n in range(3))


@triton.jit
def get(ptr):
    """Read int32 that another program may have written."""
    return tl.load(ptr, cache_modifier=".cg")


@triton.jit
def getf(ptr):
    """Read float32 by their bits."""
    return tl.load(ptr, cache_modifier=".cg").to(tl.float32, bitcast=True)


@triton.jit
def put(ptr, value):
    """Write float32 by their bits."""
    tl.store(ptr, value.to(tl.int32, bitcast=True))


@triton.jit
def after_scan(header, new, warm_ptr, leads, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Set the scale by the ranges of rows; return prices to start from, windows, perturbation."""
    e, bins = tl.arange(0, BLOCK_E), tl.arange(0, 256)
    count = get(header + at.EXPONENTS + bins)
    total = tl.sum(count, 0)
    above = total - (tl.cumsum(count, 0) - count)  # rows of an exponent and those above it
    # One row in 16 may be an outlier, or one if there are fewer: the next one sets the scale.
    ordinary = tl.sum((above > tl.maximum(total // 16, 1)).to(tl.int32), 0) - 1
    largest = tl.where(total > 0, tl.max(tl.where(count > 0, bins, 0), 0), 126)
    exponent = tl.maximum(tl.where(ordinary >= 0, ordinary, largest) + 1, 1)
    # Prices reach E scales: where scores are near the end of float32, rows are scaled down.
    scale = (tl.minimum(exponent, 239) << 23).to(tl.float32, bitcast=True)
    limit = (tl.where(exponent > 239, 239, exponent + 14) << 23).to(tl.float32, bitcast=True)
    warm = tl.load(warm_ptr + e, mask=e < E, other=_INF)
    b = warm - tl.min(tl.where(tl.abs(warm) < _INF, warm, _INF), 0)
    b = tl.where(tl.abs(warm) < _INF, tl.minimum(b, E * scale), 0.0)
    w = tl.zeros([BLOCK_E], tl.float32) + tl.where(tl.max(b, 0) == 0, scale / 8, scale / 32)
    eps = scale * 0.0 + _EPS
    if leads:
        put(new + at.SCALARS + at.PRICE * BLOCK_E + e, b)
        put(new + at.SCALARS + at.WINDOW * BLOCK_E + e, w)
        put(new + at.EPS, eps)
        put(new + at.SCALE, scale)
        put(new + at.LIMIT, limit)
        tl.store(new + at.BEST, _MANY)
        tl.store(new + at.LAST, _MANY)
    return b, w, eps, scale, limit


@triton.jit
def _units_at(a, c0, c1, c2, c3):
    """Return how many bids lie within a distance, in windows, by counts within the window's parts.

    Between two edges they are spread evenly, and beyond the last one as between the last two.
    """
    n = tl.minimum(a, 1.0 / 512) * 512 * c3
    n += tl.maximum(tl.minimum(a, 1.0 / 64) - 1.0 / 512, 0.0) * (512.0 / 7) * (c2 - c3)
    n += tl.maximum(tl.minimum(a, 1.0 / 8) - 1.0 / 64, 0.0) * (64.0 / 7) * (c1 - c2)
    return n + tl.maximum(a - 1.0 / 8, 0.0) * (8.0 / 7) * (c0 - c1)


@triton.jit
def _distance_of(n, c0, c1, c2, c3):
    """Return at which distance so many bids lie, in windows, at most 1; see ``_units_at``."""
    d = 1.0 / 8 + (n - c1) / tl.maximum(c0 - c1, 1.0) * (7.0 / 8)
    d = tl.where(n <= c1, 1.0 / 64 + (n - c2) / tl.maximum(c1 - c2, 1.0) * (7.0 / 64), d)
    d = tl.where(n <= c2, 1.0 / 512 + (n - c3) / tl.maximum(c2 - c3, 1.0) * (7.0 / 512), d)
    d = tl.where(n <= c3, n / tl.maximum(c3, 1.0) * (1.0 / 512), d)
    return tl.where(n > c0, 1.0, d)


@triton.jit
def _level(
    load, capacity, slack, b, w, target, ok, u0, u1, u2, u3, d0, d1, d2, d3
):  # fmt: skip
    """Return the price at which experts that would fall below it leave just the slack idle."""
    low = tl.min(tl.where(ok, target, _INF), 0)
    high = tl.max(tl.where(ok, target, -_INF), 0)
    for _ in range(20):
        p = 0.5 * (low + high)
        a = tl.abs(p - b) / w
        rises = p > b
        n = tl.where(rises, -_units_at(a, u0, u1, u2, u3), _units_at(a, d0, d1, d2, d3))
        idle = tl.maximum(capacity - tl.maximum(load + n, 0.0), 0.0)
        too_low = tl.sum(tl.where(ok & (target < p), idle, 0.0), 0) < slack
        low, high = tl.where(too_low, p, low), tl.where(too_low, high, p)
    return 0.5 * (low + high)


@triton.jit
def _accelerated(vec, b, f, depth, near, scale, BLOCK_E: tl.constexpr):
    """Return b + f by Anderson's combination of the last two differences."""
    e = tl.arange(0, BLOCK_E)
    b1, b2 = getf(vec + at.PRICE_1 * BLOCK_E + e), getf(vec + at.PRICE_2 * BLOCK_E + e)
    f1, f2 = getf(vec + at.STEP_1 * BLOCK_E + e), getf(vec + at.STEP_2 * BLOCK_E + e)
    df1, df2 = tl.where(depth >= 1, f - f1, 0.0), tl.where(depth >= 2, f1 - f2, 0.0)
    g1 = df1 + tl.where(depth >= 1, b - b1, 0.0)
    g2 = df2 + tl.where(depth >= 2, b1 - b2, 0.0)
    n1, n2, n = df1 / scale, df2 / scale, f / scale  # squares must be finite
    a11, a22, a12 = tl.sum(n1 * n1, 0), tl.sum(n2 * n2, 0), tl.sum(n1 * n2, 0)
    per = 1.0 / tl.maximum(a11 + a22, 1e-36)
    a11, a22, a12 = a11 * per + 1e-3, a22 * per + 1e-3, a12 * per
    c1, c2 = tl.sum(n1 * n, 0) * per, tl.sum(n2 * n, 0) * per
    det = a11 * a22 - a12 * a12
    y1, y2 = (c1 * a22 - c2 * a12) / det, (c2 * a11 - c1 * a12) / det
    return b + f - tl.where(near, y1 * g1 + y2 * g2, 0.0)


@triton.jit
def after_sweep(
    state, new, counts, capacity_ptr, quota_ptr, leads, rows, T, end, E: tl.constexpr,
    K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Return the next phase, its prices, windows, perturbation, and excess in rounds."""
    e = tl.arange(0, BLOCK_E)
    ok = e < E
    vec = state + at.SCALARS
    b, w = getf(vec + at.PRICE * BLOCK_E + e), getf(vec + at.WINDOW * BLOCK_E + e)
    eps, scale = getf(state + at.EPS), getf(state + at.SCALE)
    load = get(counts + e)
    capacity = tl.minimum(tl.load(capacity_ptr + e, mask=ok, other=0), rows).to(tl.int32)
    need = load - capacity
    units = rows * K
    slack = tl.sum(capacity.to(tl.int64), 0) - units
    tight = slack == 0
    over = tl.sum(tl.maximum(need, 0), 0)
    idle = tl.sum(tl.where(b > 0, tl.maximum(-need, 0), 0), 0)
    now = tl.where(tight, over, tl.maximum(over, idle))
    share = now.to(tl.float32) / units.to(tl.float32)
    counts_here = tight | (need > 0) | (b > 0)
    is_far = counts_here & (2 * tl.abs(need) > capacity)
    far = tl.sum(is_far.to(tl.int32), 0)
    hot, depth = get(state + at.HOT), get(state + at.DEPTH)
    last = get(state + at.LAST).to(tl.float32)
    n = get(state + at.SWEEPS) + 1
    went_back = get(state + at.GOES_BACK) != 0
    # Rows that rank the experts alike: load only passes from neighbour to neighbour. Prices start
    # again from 0 with a perturbation as large as the rows, which then cools.
    anneals = (hot == 0) & (n >= 4) & (share * n > 1.6) & (went_back == 0) & (end != HOLD)
    is_hot = hot == 1
    at_level = get(state + at.AT_LEVEL) + 1
    cools = is_hot & ((share <= 0.03) | (at_level >= 8))
    plain = (hot != 1) & (anneals == 0)
    best = get(state + at.BEST)
    is_best = plain & (now < best)
    since = tl.where(is_best, 0, get(state + at.SINCE) + 1)
    best = tl.where(is_best, now, best)
    best_b = tl.where(is_best, b, getf(vec + at.BEST_PRICE * BLOCK_E + e))
    best_eps = tl.where(is_best, eps, getf(state + at.BEST_EPS))
    # Ends: few enough are left, or sweeps help no more.
    enough = plain & (now <= tl.minimum(E // 2, units // 1024))
    helps_no_more = (best <= units // 256) & (now.to(tl.float32) > 0.9 * last)
    helps_no_more = helps_no_more | ((since >= 4) & (share <= 0.02))
    most = tl.where((hot == 2) | (far > 0), _LONG, _SWEEPS)
    ends = plain & ((helps_no_more & (far == 0)) | (n >= most))
    over_hot = is_hot & (n >= _LONG)
    goes_back = ends & (enough == 0) & (since > 0) & (went_back == 0)
    finished = went_back | enough | (ends & (since == 0)) | over_hot | (end == END)
    # A plateau: rows that are alike change sides together; part them by more.
    stalls = get(state + at.STALLS)
    missed = (far > 0) & (far <= tl.maximum(1, E // 16)) & (n <= 8)
    is_flat = (share > 0.02) & (share <= 0.3) & (now.to(tl.float32) > 0.8 * last)
    stalls += (plain & is_flat & (missed == 0)).to(tl.int32)
    parts = plain & (stalls >= 2) & (eps < _EPS_MOST) & (hot != 2)
    eps_next = tl.where(parts, tl.minimum(4 * eps, _EPS_MOST), tl.where(cools, 0.25 * eps, eps))
    anew = cools | parts
    w_open = tl.where(cools, tl.maximum(w, 0.5 * eps_next * scale), w)
    # The step.
    u = counts + at.UP * BLOCK_E + e
    d = counts + at.DOWN * BLOCK_E + e
    u0, u1 = get(u).to(tl.float32), get(u + BLOCK_E).to(tl.float32)
    u2, u3 = get(u + 2 * BLOCK_E).to(tl.float32), get(u + 3 * BLOCK_E).to(tl.float32)
    d0, d1 = get(d).to(tl.float32), get(d + BLOCK_E).to(tl.float32)
    d2, d3 = get(d + 2 * BLOCK_E).to(tl.float32), get(d + 3 * BLOCK_E).to(tl.float32)
    size = tl.abs(need).to(tl.float32)
    step = tl.where(
        need > 0, _distance_of(size, u0, u1, u2, u3), -_distance_of(size, d0, d1, d2, d3)
    )
    f = tl.where(ok & (need != 0), _OMEGA * w_open * step, 0.0)
    # An expert that has overshot far goes back by less than it came.
    need_1 = get(vec + at.EXCESS_1 * BLOCK_E + e)
    shot_over = is_far & (2 * tl.abs(need_1) > capacity) & ((need > 0) != (need_1 > 0))
    most_step = tl.where(shot_over, 0.75 * tl.abs(getf(vec + at.WENT * BLOCK_E + e)), _INF)
    f = tl.minimum(tl.maximum(f, -most_step), most_step)
    floor = 0.0 * scale
    if slack > 0:
        # Prices below the level rise to it, and it becomes the new 0.
        floor = _level(
            load.to(tl.float32), capacity.to(tl.float32), slack.to(tl.float32), b,
            w_open * _OMEGA, b + f, ok, u0, u1, u2, u3, d0, d1, d2, d3,
        )  # fmt: skip
        f = tl.where(ok, tl.maximum(b + f, floor) - floor - b, 0.0)
    near = share < tl.where(hot > 0, 0.5, 0.1)
    depth = tl.where(anew, 0, depth)
    b_next = _accelerated(vec, b, f, depth, near, scale, BLOCK_E)
    clipped = tl.minimum(tl.maximum(b_next, b - most_step), b + most_step)
    b_next = tl.where(ok, tl.where(tight, clipped, tl.maximum(b_next, 0.0)), 0.0)
    reach = tl.abs(f) / _OMEGA
    mean = tl.sum(reach, 0) / E
    w_next = tl.maximum(4 * reach, tl.maximum(2 * mean, w_open / 64))
    w_next = tl.where(reach >= 0.99 * w_open, 4 * w_open, w_next)
    w_next = tl.maximum(w_next, eps_next * scale / 16)
    went = b_next - b + floor
    if anneals:
        eps_next, b_next, w_next = eps * 0.0 + _HEAT, b * 0.0, w * 0.0 + 0.5 * scale
        need = need * 0
    if goes_back:
        b_next, eps_next = best_b, best_eps
    if finished:
        level = tl.min(tl.where(ok, b, _INF), 0)
        b_next, eps_next = tl.where(ok & (slack > 0) & (end != HOLD), b - level, b), eps
        w_next = w
    excess = get(counts + at.OWN_LOAD * BLOCK_E + e)
    excess -= tl.minimum(tl.load(quota_ptr + e, mask=ok, other=0), T).to(tl.int32)
    if leads:
        out = new + at.SCALARS
        put(out + at.PRICE * BLOCK_E + e, b_next)
        put(out + at.WINDOW * BLOCK_E + e, w_next)
        put(out + at.BEST_PRICE * BLOCK_E + e, best_b)
        put(out + at.PRICE_1 * BLOCK_E + e, b)
        put(out + at.PRICE_2 * BLOCK_E + e, getf(vec + at.PRICE_1 * BLOCK_E + e))
        put(out + at.STEP_1 * BLOCK_E + e, f)
        put(out + at.STEP_2 * BLOCK_E + e, getf(vec + at.STEP_1 * BLOCK_E + e))
        tl.store(out + at.EXCESS_1 * BLOCK_E + e, need)
        put(out + at.WENT * BLOCK_E + e, went)
        tl.store(out + at.EXCESS * BLOCK_E + e, excess)
        put(out + at.DISTANCE * BLOCK_E + e, b * 0.0 + _INF)
        forgets = anneals | is_hot | parts
        tl.store(new + at.SWEEPS, n)
        tl.store(new + at.BEST, tl.where(forgets, _MANY, best))
        tl.store(new + at.LAST, tl.where(anneals | is_hot, _MANY, now))
        tl.store(new + at.SINCE, tl.where(forgets, 0, since))
        tl.store(new + at.STALLS, tl.where(parts, 0, stalls))
        tl.store(new + at.GOES_BACK, (goes_back | finished).to(tl.int32))
        cold = cools & (eps_next <= _COLD)
        tl.store(new + at.HOT, tl.where(anneals, 1, tl.where(cold, 2, hot)))
        tl.store(new + at.AT_LEVEL, tl.where(is_hot & (cools == 0), at_level, 0))
        tl.store(new + at.DEPTH, tl.where(anneals, 0, tl.minimum(depth + 1, 2)))
        tl.store(new + at.ROUNDS, 0)
        tl.store(new + at.AGE, 0)
        tl.store(new + at.CYCLES, 0)
        tl.store(new + at.MOVED, 1)
        put(new + at.EPS, eps_next)
        put(new + at.BEST_EPS, best_eps)
        put(new + at.SCALE, scale)
        put(new + at.LIMIT, getf(state + at.LIMIT))
    kind = tl.where(finished & (end != HOLD), at.ROUND, at.SWEEP).to(tl.int32)
    return kind, b_next, w_next, eps_next, excess


@triton.jit
def plan(
    excess, b, distance, age, cycles, quota, units, E: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Return what a round does: units that experts give, and take, what taking costs, and more.

    The rest: whether only distances are measured, and units out of balance.
    Overfull experts give. Experts with room take; so do full ones whose distance is known, one
    unit, which they will pass on. Where nothing is overfull, experts at price 0 give to experts
    that are idle at a positive price.
    """
    tight = tl.sum(quota.to(tl.int64), 0) == units
    free = (tight == 0) & (b <= 0)
    over = tl.sum(tl.maximum(excess, 0), 0)
    idle = tl.sum(tl.where(tight | free, 0, tl.maximum(-excess, 0)), 0)
    measures = (over > 0) & (age < _RELAX) & (units <= _FEW) & (cycles < _CYCLES)
    known = distance < _INF
    passes_on = known & (measures | (excess == 0))
    give = tl.maximum(excess, 0)
    take = tl.where(excess < 0, -excess, tl.where(passes_on, 1, 0))
    cost = tl.where((excess >= 0) & known, distance, 0.0)
    fills = over == 0
    give = tl.where(fills, tl.where(free & (excess <= 0), tl.minimum(excess + quota, S), 0), give)
    take = tl.where(fills, tl.where(free, 0, tl.maximum(-excess, 0)), take)
    return give, take, tl.where(fills, 0.0, cost), measures, over, idle


@triton.jit
def after_round(
    state, new, counts, keys, bits_ptr, leads, member, members, units, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, S: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Make the swaps that have won their slots at both ends; return the excess and more.

    The rest: distances, age, cycles, rounds, and units moved.
    """
    e, slot = tl.arange(0, BLOCK_E), tl.arange(0, S)
    vec = state + at.SCALARS
    excess, b = get(vec + at.EXCESS * BLOCK_E + e), getf(vec + at.PRICE * BLOCK_E + e)
    distance = getf(vec + at.DISTANCE * BLOCK_E + e)
    age, cycles = get(state + at.AGE), get(state + at.CYCLES)
    at_a = e[:, None] * S + slot[None, :]
    key = tl.load(keys + at_a, cache_modifier=".cg")
    won = key > 0
    row, t = (((key >> 20) & ROW_MASK) ^ ROW_MASK).to(tl.int32), (key & 1023).to(tl.int32)
    takes = tl.load(vec + at.TAKE * BLOCK_E + t, mask=won, other=0, cache_modifier=".cg")
    at_t = (BLOCK_E + t) * S + slot_of(row, takes, S, 16)
    made = won & (tl.load(keys + at_t, mask=won, other=0, cache_modifier=".cg") == key)
    gave = tl.sum(made.to(tl.int32), 1)
    # The same from the other end.
    key_t = tl.load(keys + BLOCK_E * S + at_a, cache_modifier=".cg")
    won_t = key_t > 0
    row_t = (((key_t >> 20) & ROW_MASK) ^ ROW_MASK).to(tl.int32)
    a = ((key_t >> 10) & 1023).to(tl.int32)
    gives = tl.load(vec + at.GIVE * BLOCK_E + a, mask=won_t, other=0, cache_modifier=".cg")
    at_a = a * S + slot_of(row_t, gives, S, 4)
    other = tl.load(keys + at_a, mask=won_t, other=0, cache_modifier=".cg")
    took = tl.sum((won_t & (other == key_t)).to(tl.int32), 1)
    # Every program moves the rows that it owns.
    own = made & ((row // ROWS) % members == member)
    given = e[:, None] + row * 0
    word = bits_ptr + row.to(tl.int64) * WORDS
    tl.atomic_xor(word + (given >> 5), 1 << (given & 31), mask=own, sem="relaxed")
    tl.atomic_xor(word + (t >> 5), 1 << (t & 31), mask=own, sem="relaxed")
    tl.debug_barrier()
    moved = tl.sum(gave, 0)
    least = get(counts + at.LEAST * BLOCK_E + e)
    least = tl.where(least > 0, (-least + _INF_BITS).to(tl.float32, bitcast=True), _INF)
    in_cycles = (units <= _FEW) & (cycles < _CYCLES)
    distance = tl.where(in_cycles, tl.minimum(distance, least), least)
    age += 1
    forgets = age >= tl.where(in_cycles, _RELAX + _MOVE, 2)
    measured = get(state + at.MEASURES) != 0
    forgets = forgets | (in_cycles & (measured == 0) & (moved == 0))
    distance = tl.where(forgets, _INF, distance)
    age, cycles = tl.where(forgets, 0, age), cycles + forgets.to(tl.int32)
    excess += took - gave
    rounds = get(state + at.ROUNDS) + 1
    if leads:
        out = new + at.SCALARS
        put(out + at.PRICE * BLOCK_E + e, b)
        put(out + at.DISTANCE * BLOCK_E + e, distance)
        tl.store(out + at.EXCESS * BLOCK_E + e, excess)
        tl.store(new + at.AGE, age)
        tl.store(new + at.CYCLES, cycles)
        tl.store(new + at.ROUNDS, rounds)
        tl.store(new + at.MOVED, moved)
        tl.store(new + at.SWEEPS, get(state + at.SWEEPS))
        put(new + at.EPS, getf(state + at.EPS))
        put(new + at.SCALE, getf(state + at.SCALE))
        put(new + at.LIMIT, getf(state + at.LIMIT))
    return excess, distance, age, cycles, rounds, moved, b
