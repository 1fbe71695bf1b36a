"""Decisions after the scan and after sweeps: prices, windows, perturbation, kind of the next phase.

They follow from integers alone, so every program takes the same ones and changes its own state.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow.device import layout as at
from megatron_maxscore.flow.device.rows import get, getf, put, vec

_INF, _MANY = tl.constexpr(float("inf")), tl.constexpr(0x7FFFFFFF)
# Perturbations in grains: at first; at most, on plateaus; at the start and at the end of annealing.
_EPS, _EPS_MOST, _HEAT, _COLD = (tl.constexpr(2.0**p) for p in (-12, -8, 0, -8))
# The most sweeps: in general; after annealing, or as long as an expert is far from its capacity.
_SWEEPS, _LONG = tl.constexpr(20), tl.constexpr(40)
# How many times longer steps are than plain ones.
_OMEGA = tl.constexpr(1.5)
# What a launch does after a sweep: go on to rounds when sweeps are over (GO_ON), repeat the last
# sweep instead (HOLD), or end sweeps now (END).
GO_ON, HOLD, END = (tl.constexpr(n) for n in range(3))


@triton.jit
def _typical(count):
    """Return the exponent next above that of all but a few rows, from the counts of each exponent.

    At most one row in 16, or one row if there are fewer, is left out as an outlier.
    """
    bins = tl.arange(0, 256)
    total = tl.sum(count, 0)
    above = total - (tl.cumsum(count, 0) - count)  # rows of an exponent and those above it
    ordinary = tl.sum((above > tl.maximum(total // 16, 1)).to(tl.int32), 0) - 1
    largest = tl.where(total > 0, tl.max(tl.where(count > 0, bins, 0), 0), 126)
    return tl.maximum(tl.where(ordinary >= 0, ordinary, largest) + 1, 1)


@triton.jit
def after_scan(header, state, warm_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Set the scales by the rows, prices to start from, windows and perturbation."""
    e, bins = tl.arange(0, BLOCK_E), tl.arange(0, 256)
    exponent = _typical(get(header + at.RANGES + bins))
    # Prices reach E ranges: where scores are near the end of float32, rows are scaled down.
    scale = (tl.minimum(exponent, 239) << 23).to(tl.float32, bitcast=True)
    limit = (tl.where(exponent > 239, 239, exponent + 14) << 23).to(tl.float32, bitcast=True)
    fine = tl.minimum(_typical(get(header + at.GRAINS + bins)), tl.minimum(exponent, 239))
    grain = (fine << 23).to(tl.float32, bitcast=True)
    warm = tl.load(warm_ptr + e, mask=e < E, other=_INF)
    b = warm - tl.min(tl.where(tl.abs(warm) < _INF, warm, _INF), 0)
    b = tl.where(tl.abs(warm) < _INF, tl.minimum(b, E * scale), 0.0)
    # All programs write the same.
    put(header + at.SCALE, scale)
    put(header + at.LIMIT, limit)
    put(header + at.GRAIN, grain)
    for vector in tl.static_range(at.VECTORS):
        tl.store(vec(state, vector, BLOCK_E), tl.zeros([BLOCK_E], tl.int32))
    number = tl.arange(0, at.SCALARS)
    is_many = (number == at.BEST) | (number == at.LAST)
    tl.store(state + number, tl.where(is_many, _MANY, 0))
    tl.debug_barrier()
    put(vec(state, at.PRICE, BLOCK_E), b)
    put(vec(state, at.WINDOW, BLOCK_E), tl.where(tl.max(b, 0) == 0, grain / 8, grain / 32) + 0 * b)
    put(state + at.EPS, grain * 0.0 + _EPS)


@triton.jit
def _bids(counts, FIRST: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return how many bids lie within the window and its parts, float32."""
    at_E = counts + FIRST * BLOCK_E + tl.arange(0, BLOCK_E)
    a, b = get(at_E).to(tl.float32), get(at_E + BLOCK_E).to(tl.float32)
    return a, b, get(at_E + 2 * BLOCK_E).to(tl.float32), get(at_E + 3 * BLOCK_E).to(tl.float32)


@triton.jit
def _distance_of(n, c0, c1, c2, c3):
    """Return the distance within which ``n`` bids lie, in windows, at most 1.

    ``c0`` to ``c3`` bids lie within the window's parts; between two edges they are taken as evenly
    spread.
    """
    d = 1.0 / 8 + (n - c1) / tl.maximum(c0 - c1, 1.0) * (7.0 / 8)
    d = tl.where(n <= c1, 1.0 / 64 + (n - c2) / tl.maximum(c1 - c2, 1.0) * (7.0 / 64), d)
    d = tl.where(n <= c2, 1.0 / 512 + (n - c3) / tl.maximum(c2 - c3, 1.0) * (7.0 / 512), d)
    d = tl.where(n <= c3, n / tl.maximum(c3, 1.0) * (1.0 / 512), d)
    return tl.where(n > c0, 1.0, d)


@triton.jit
def _level(counts, load, capacity, slack, b, w, target, ok, BLOCK_E: tl.constexpr):
    """Return the price at which experts that would fall below it leave just the slack idle."""
    u0, u1, u2, u3 = _bids(counts, at.UP, BLOCK_E)
    d0, d1, d2, d3 = _bids(counts, at.DOWN, BLOCK_E)
    low = tl.min(tl.where(ok, target, _INF), 0)
    high = tl.max(tl.where(ok, target, -_INF), 0)
    for _ in range(20):
        p = 0.5 * (low + high)
        a, rises = tl.abs(p - b) / w, p > b
        c0, c1 = tl.where(rises, u0, d0), tl.where(rises, u1, d1)
        c2, c3 = tl.where(rises, u2, d2), tl.where(rises, u3, d3)
        # Bids within a distance; beyond the last edge they are as dense as before it.
        n = tl.minimum(a, 1.0 / 512) * 512 * c3
        n += tl.maximum(tl.minimum(a, 1.0 / 64) - 1.0 / 512, 0.0) * (512.0 / 7) * (c2 - c3)
        n += tl.maximum(tl.minimum(a, 1.0 / 8) - 1.0 / 64, 0.0) * (64.0 / 7) * (c1 - c2)
        n += tl.maximum(a - 1.0 / 8, 0.0) * (8.0 / 7) * (c0 - c1)
        idle = tl.maximum(capacity - tl.maximum(load + tl.where(rises, -n, n), 0.0), 0.0)
        too_low = tl.sum(tl.where(ok & (target < p), idle, 0.0), 0) < slack
        low, high = tl.where(too_low, p, low), tl.where(too_low, high, p)
    return 0.5 * (low + high)


@triton.jit
def _accelerated(state, b, f, depth, near, unit, BLOCK_E: tl.constexpr):
    """Return b + f by Anderson's combination of the last two differences."""
    f1, f2 = getf(vec(state, at.STEP_1, BLOCK_E)), getf(vec(state, at.STEP_2, BLOCK_E))
    b1, b2 = getf(vec(state, at.PRICE_1, BLOCK_E)), getf(vec(state, at.PRICE_2, BLOCK_E))
    df1, df2 = tl.where(depth >= 1, f - f1, 0.0), tl.where(depth >= 2, f1 - f2, 0.0)
    g1 = df1 + tl.where(depth >= 1, b - b1, 0.0)
    g2 = df2 + tl.where(depth >= 2, b1 - b2, 0.0)
    n1, n2, n = df1 / unit, df2 / unit, f / unit  # squares must be finite
    a11, a22, a12 = tl.sum(n1 * n1, 0), tl.sum(n2 * n2, 0), tl.sum(n1 * n2, 0)
    per = 1.0 / tl.maximum(a11 + a22, 1e-36)
    a11, a22, a12 = a11 * per + 1e-3, a22 * per + 1e-3, a12 * per
    c1, c2 = tl.sum(n1 * n, 0) * per, tl.sum(n2 * n, 0) * per
    det = a11 * a22 - a12 * a12
    y1, y2 = (c1 * a22 - c2 * a12) / det, (c2 * a11 - c1 * a12) / det
    return b + f - tl.where(near, y1 * g1 + y2 * g2, 0.0)


@triton.jit
def after_sweep(
    header, state, counts, capacity_ptr, quota_ptr, T, end, E: tl.constexpr, K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Set the next sweep's prices, windows and perturbation; return the kind of the next phase."""
    ok = tl.arange(0, BLOCK_E) < E
    e = tl.arange(0, BLOCK_E)
    b, w = getf(vec(state, at.PRICE, BLOCK_E)), getf(vec(state, at.WINDOW, BLOCK_E))
    eps, grain, rows = getf(state + at.EPS), getf(header + at.GRAIN), get(header + at.ROWS_IN)
    load = get(counts + e)
    capacity = tl.minimum(tl.load(capacity_ptr + e, mask=ok, other=0), rows).to(tl.int32)
    need, units = load - capacity, rows * K
    slack = tl.sum(capacity.to(tl.int64), 0) - units
    tight = slack == 0
    over = tl.sum(tl.maximum(need, 0), 0)
    idle = tl.sum(tl.where(b > 0, tl.maximum(-need, 0), 0), 0)
    now = tl.where(tight, over, tl.maximum(over, idle))
    share = now.to(tl.float32) / units.to(tl.float32)
    is_far = (tight | (need > 0) | (b > 0)) & (2 * tl.abs(need) > capacity)
    far = tl.sum(is_far.to(tl.int32), 0)
    hot, depth, last = get(state + at.HOT), get(state + at.DEPTH), get(state + at.LAST)
    n, went_back = get(state + at.SWEEPS) + 1, get(state + at.GOES_BACK) != 0
    falls_little = now.to(tl.float32) > 0.9 * last.to(tl.float32)
    # Annealing: if all rows rank the experts alike, load only passes from one expert to the next.
    # Prices start again from 0 with a perturbation as large as the grain, which is then lowered.
    anneals = (hot == 0) & (n >= 4) & (share * n > 1.6) & (went_back == 0) & (end != HOLD)
    is_hot = hot == 1
    at_level = get(state + at.AT_LEVEL) + 1
    cools = is_hot & ((share <= 0.03) | (at_level >= 8))
    plain = (hot != 1) & (anneals == 0)
    best, since = get(state + at.BEST), get(state + at.SINCE) + 1
    is_best = plain & (now < best)
    best, since = tl.where(is_best, now, best), tl.where(is_best, 0, since)
    best_b = tl.where(is_best, b, getf(vec(state, at.BEST_PRICE, BLOCK_E)))
    best_eps = tl.where(is_best, eps, getf(state + at.BEST_EPS))
    # Sweeps end when few enough units are left, or when they help no more. With slack, better
    # sweeps may follow one that helps little, and rounds cannot correct a wrong level of prices.
    enough = plain & (now <= tl.minimum(E // 2, units // 1024))
    patient = (since >= 2) | tight
    few = tl.where(tight, units // 256, units // 1024)
    helps_no_more = (best <= few) & falls_little & patient
    helps_no_more = helps_no_more | ((since >= 4) & (share <= 0.02))
    most = tl.where((hot == 2) | (far > 0), _LONG, _SWEEPS)
    ends = plain & ((helps_no_more & (far == 0)) | (n >= most))
    goes_back = ends & (enough == 0) & (since > 0) & (went_back == 0)
    finished = went_back | enough | (ends & (since == 0)) | (is_hot & (n >= _LONG)) | (end == END)
    # A plateau: rows that are alike change sides together. A larger perturbation tells them apart.
    missed = (far > 0) & (far <= tl.maximum(1, E // 16)) & (n <= 8)
    is_flat = (n > 4) & (share > 0.02) & (share <= 0.3)
    is_flat = is_flat & (now.to(tl.float32) > 0.8 * last.to(tl.float32))
    stalls = get(state + at.STALLS) + (plain & is_flat & (missed == 0)).to(tl.int32)
    parts = plain & (stalls >= 2) & (eps < _EPS_MOST) & (hot != 2)
    eps_next = tl.where(parts, tl.minimum(4 * eps, _EPS_MOST), tl.where(cools, 0.25 * eps, eps))
    w_open = tl.where(cools, tl.maximum(w, 0.5 * eps_next * grain), w)
    # The step.
    u0, u1, u2, u3 = _bids(counts, at.UP, BLOCK_E)
    d0, d1, d2, d3 = _bids(counts, at.DOWN, BLOCK_E)
    size = tl.abs(need).to(tl.float32)
    up, down = _distance_of(size, u0, u1, u2, u3), _distance_of(size, d0, d1, d2, d3)
    step = tl.where(need > 0, up, -down)
    f = tl.where(ok & (need != 0), _OMEGA * w_open * step, 0.0)
    # An expert that has overshot far goes back by less than it came.
    need_1 = get(vec(state, at.EXCESS_1, BLOCK_E))
    shot_over = is_far & (2 * tl.abs(need_1) > capacity) & ((need > 0) != (need_1 > 0))
    most_step = tl.where(shot_over, 0.75 * tl.abs(getf(vec(state, at.WENT, BLOCK_E))), _INF)
    f = tl.minimum(tl.maximum(f, -most_step), most_step)
    floor = 0.0 * grain
    if slack > 0:
        # Prices below the level rise to it, and it becomes the new 0.
        floor = _level(
            counts, load.to(tl.float32), capacity.to(tl.float32), slack.to(tl.float32), b,
            w_open * _OMEGA, b + f, ok, BLOCK_E,
        )  # fmt: skip
        f = tl.where(ok, tl.maximum(b + f, floor) - floor - b, 0.0)
    near = share < tl.where(hot > 0, 0.5, 0.1)
    depth = tl.where(cools | parts, 0, depth)
    b_next = _accelerated(state, b, f, depth, near, grain, BLOCK_E)
    clipped = tl.minimum(tl.maximum(b_next, b - most_step), b + most_step)
    b_next = tl.where(ok, tl.where(tight, clipped, tl.maximum(b_next, 0.0)), 0.0)
    reach = tl.abs(f) / _OMEGA
    w_next = tl.maximum(4 * reach, tl.maximum(2 * (tl.sum(reach, 0) / E), w_open / 64))
    w_next = tl.where(reach >= 0.99 * w_open, 4 * w_open, w_next)
    w_next = tl.maximum(w_next, eps_next * grain / 16)
    went = b_next - b + floor
    if anneals:
        eps_next, b_next, w_next = eps * 0.0 + _HEAT, b * 0.0, w * 0.0 + 0.5 * grain
        need = need * 0
    if goes_back:
        b_next, eps_next = best_b, best_eps
    if finished:
        level = tl.min(tl.where(ok, b, _INF), 0)
        b_next, eps_next = tl.where(ok & (slack > 0) & (end != HOLD), b - level, b), eps
        w_next = w
    quota = tl.minimum(tl.load(quota_ptr + e, mask=ok, other=0), T).to(tl.int32)
    excess = get(counts + at.OWN_LOAD * BLOCK_E + e) - quota
    b1, f1 = getf(vec(state, at.PRICE_1, BLOCK_E)), getf(vec(state, at.STEP_1, BLOCK_E))
    tl.debug_barrier()  # all is read
    put(vec(state, at.PRICE, BLOCK_E), b_next)
    put(vec(state, at.WINDOW, BLOCK_E), w_next)
    put(vec(state, at.BEST_PRICE, BLOCK_E), best_b)
    put(vec(state, at.PRICE_1, BLOCK_E), b)
    put(vec(state, at.PRICE_2, BLOCK_E), b1)
    put(vec(state, at.STEP_1, BLOCK_E), f)
    put(vec(state, at.STEP_2, BLOCK_E), f1)
    put(vec(state, at.WENT, BLOCK_E), went)
    put(vec(state, at.DISTANCE, BLOCK_E), b * 0.0 + _INF)
    tl.store(vec(state, at.EXCESS_1, BLOCK_E), need)
    tl.store(vec(state, at.EXCESS, BLOCK_E), excess)
    forgets = anneals | is_hot | parts
    tl.store(state + at.SWEEPS, n)
    tl.store(state + at.BEST, tl.where(forgets, _MANY, best))
    tl.store(state + at.LAST, tl.where(anneals | is_hot, _MANY, now))
    tl.store(state + at.SINCE, tl.where(forgets, 0, since))
    tl.store(state + at.STALLS, tl.where(parts, 0, stalls))
    tl.store(state + at.GOES_BACK, (goes_back | finished).to(tl.int32))
    cold = cools & (eps_next <= _COLD)
    tl.store(state + at.HOT, tl.where(anneals, 1, tl.where(cold, 2, hot)))
    tl.store(state + at.AT_LEVEL, tl.where(is_hot & (cools == 0), at_level, 0))
    tl.store(state + at.DEPTH, tl.where(anneals, 0, tl.minimum(depth + 1, 2)))
    tl.store(state + at.MOVED, 1)
    put(state + at.EPS, eps_next)
    put(state + at.BEST_EPS, best_eps)
    return tl.where(finished & (end != HOLD), at.ROUND, at.SWEEP).to(tl.int32)
