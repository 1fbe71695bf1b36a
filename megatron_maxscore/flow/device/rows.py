"""Row work of the phases. Each row is processed alone; rows influence others only by integers.

A program works on the tiles from ``first`` to before ``last``. ``rows_ptr`` holds each row's base
(T), range (T) and grain (T). The grain is the size of typical differences between a row's scores:
three times their mean distance from the lowest one, at most the range. The perturbation of a row is
proportional to it. The base is the lowest score plus the grain, which in most rows is the largest
score. Scores are compared by their differences from the base, because float32 numbers are most
precise near 0. In a row with one dominant softmax score, the differences of all other scores from
the largest one would round to the same number.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow.device import layout as at

_INF, INF_BITS = tl.constexpr(float("inf")), tl.constexpr(0x7F800000)
_LOWEST = tl.constexpr(-0x80000000)
# A row whose range or grain is below this share of a typical one is penalised and perturbed as if
# it had this share.
_LEAST = tl.constexpr(0.375)
_PARTS = tl.constexpr(65536.0)
# Rounds after which targets are chosen with ever more noise.
CALM = tl.constexpr(192)
# Keys of offers, from the highest bit on: cost, inverted (22), row, inverted (21), giver (10) and
# taker (10). The largest key of a slot wins there.
ROW_MASK, _COST_MASK = tl.constexpr((1 << 21) - 1), tl.constexpr((1 << 22) - 1)


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
def vec(state, VECTOR: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return pointers to a vector of the state."""
    return state + at.SCALARS + VECTOR * BLOCK_E + tl.arange(0, BLOCK_E)


@triton.jit
def mix(x):
    """Return well mixed bits of an integer (the finaliser of MurmurHash3)."""
    x = x.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _noise(row_Q, expert_E):
    """Return (Q, E) float32 in [-0.5, 0.5) that depend on row and expert alone."""
    h = (mix(row_Q + 1)[:, None] ^ (expert_E.to(tl.uint32) * 0x9E3779B1)[None, :]) * 0x2C1B3C6D
    h = (h ^ (h >> 15)) * 0x297A2D39
    return (0x3F800000 | (h >> 9).to(tl.int32)).to(tl.float32, bitcast=True) - 1.5


@triton.jit
def _load(ptr, row_Q, T, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return (Q, E) float32 scores with 0 for NaN and +inf, and which rows had such scores."""
    e = tl.arange(0, BLOCK_E)
    mask = (row_Q < T)[:, None] & (e < E)[None, :]
    s = tl.load(ptr + row_Q.to(tl.int64)[:, None] * E + e[None, :], mask=mask, other=0.0)
    s = s.to(tl.float32)
    is_bad = (s != s) | (s == _INF)
    return tl.where(is_bad, 0.0, s), tl.max(is_bad.to(tl.int32), 1)


@triton.jit
def _exponents(x_Q, inside_Q):
    """Return (256,) int32, how many positive float32 have each exponent."""
    exponent_Q = tl.where(inside_Q & (x_Q > 0), x_Q.to(tl.int32, bitcast=True) >> 23, -1)
    return tl.sum((exponent_Q[:, None] == tl.arange(0, 256)[None, :]).to(tl.int32), 0)


@triton.jit
def scan(
    scores_ptr, rows_ptr, header, T, first, last,
    E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Keep each row's base, range and grain; count bad rows, and ranges and grains by exponent."""
    ranges = tl.zeros([256], tl.int32)
    grains = tl.zeros([256], tl.int32)
    bad = tl.zeros((), tl.int32)
    forbidden = tl.zeros((), tl.int32)
    for tile in range(first, last):
        row_Q = tile * ROWS + tl.arange(0, ROWS)
        s, bad_Q = _load(scores_ptr, row_Q, T, E, BLOCK_E)
        is_allowed = (tl.arange(0, BLOCK_E) < E)[None, :] & (s > -_INF)
        high_Q = tl.max(tl.where(is_allowed, s, -_INF), 1)
        low_Q = tl.min(tl.where(is_allowed, s, _INF), 1)
        is_some_Q = high_Q > -_INF
        # Finite, also where the difference of two scores is not.
        span_Q = tl.minimum(tl.where(is_some_Q, high_Q - low_Q, 0.0), 3.0e38)
        above = tl.minimum(tl.where(is_allowed, s - low_Q[:, None], 0.0), span_Q[:, None])
        entries_Q = tl.maximum(tl.sum(is_allowed.to(tl.int32), 1), 1).to(tl.float32)
        # The mean in parts of the range: an integer sum, which depends on no order.
        parts = (above / tl.maximum(span_Q, 1e-37)[:, None] * _PARTS).to(tl.int32)
        share_Q = tl.sum(parts, 1).to(tl.float32) / (entries_Q * _PARTS)
        grain_Q = span_Q * tl.minimum(3 * share_Q, 1.0)
        base_Q = tl.where(grain_Q < span_Q, low_Q + grain_Q, high_Q)
        tl.store(rows_ptr + row_Q, tl.where(is_some_Q, base_Q, 0.0), mask=row_Q < T)
        tl.store(rows_ptr + T + row_Q, span_Q, mask=row_Q < T)
        tl.store(rows_ptr + 2 * T + row_Q, grain_Q, mask=row_Q < T)
        ranges += _exponents(span_Q, row_Q < T)
        grains += _exponents(grain_Q, row_Q < T)
        bad += tl.sum(bad_Q, 0)
        forbidden += tl.sum(tl.max((s == -_INF).to(tl.int32), 1), 0)
    bins = tl.arange(0, 256)
    tl.atomic_add(header + at.RANGES + bins, ranges, mask=ranges > 0, sem="relaxed")
    tl.atomic_add(header + at.GRAINS + bins, grains, mask=grains > 0, sem="relaxed")
    tl.atomic_add(header + at.BAD, bad, sem="relaxed")
    tl.atomic_add(header + at.FORBIDDEN, forbidden, sem="relaxed")


@triton.jit
def _relative(scores_ptr, rows_ptr, header, row_Q, T, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return (Q, E) scores less the row's base, and each row's grain, range and factor.

    Rows whose range is above the limit are scaled down to it. A forbidden arc is worth one width
    less than the worst allowed one.
    """
    s, _ = _load(scores_ptr, row_Q, T, E, BLOCK_E)
    base_Q = tl.load(rows_ptr + row_Q, mask=row_Q < T, other=0.0, cache_modifier=".cg")
    span_Q = tl.load(rows_ptr + T + row_Q, mask=row_Q < T, other=0.0, cache_modifier=".cg")
    grain_Q = tl.load(rows_ptr + 2 * T + row_Q, mask=row_Q < T, other=0.0, cache_modifier=".cg")
    limit = getf(header + at.LIMIT)
    factor_Q = tl.where(span_Q > limit, limit / tl.maximum(span_Q, limit), 1.0)
    span_Q = tl.minimum(span_Q, limit)
    width_Q = tl.maximum(span_Q, getf(header + at.SCALE) * _LEAST)
    v = tl.minimum(tl.maximum(s - base_Q[:, None], -3.0e38), 3.0e38) * factor_Q[:, None]
    v = tl.where(s == -_INF, -(grain_Q * factor_Q + width_Q)[:, None], v)
    grain_Q = tl.maximum(grain_Q * factor_Q, getf(header + at.GRAIN) * _LEAST)
    return v, grain_Q, span_Q, factor_Q


@triton.jit
def _reduced(
    scores_ptr, rows_ptr, header, state, row_Q, T, seed, E: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Return (Q, E) perturbed scores less prices, and each row's grain."""
    v, grain_Q, _, _ = _relative(scores_ptr, rows_ptr, header, row_Q, T, E, BLOCK_E)
    part_Q = getf(state + at.EPS) * grain_Q
    noise = _noise(row_Q + seed, tl.arange(0, BLOCK_E))
    return (v - getf(vec(state, at.PRICE, BLOCK_E))[None, :]) + part_Q[:, None] * noise, grain_Q


@triton.jit
def _best(r, E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return each row's K best experts, and its K-th and next value without their lowest bits."""
    e = tl.arange(0, BLOCK_E)[None, :]
    i = r.to(tl.int32, bitcast=True)
    i = i ^ ((i >> 31) & 0x7FFFFFFF)
    # The lowest bits say which expert: no two keys of a row are equal.
    key = tl.where(e < E, (i & (-BLOCK_E)) | (BLOCK_E - 1 - e), _LOWEST)
    left = key
    kth_Q = tl.max(left, 1)
    for _ in tl.static_range(K - 1):
        left = tl.where(left == kth_Q[:, None], _LOWEST, left)
        kth_Q = tl.max(left, 1)
    has = key >= kth_Q[:, None]
    next_Q = tl.max(tl.where(has, _LOWEST, key), 1)
    a, c = kth_Q & (-BLOCK_E), next_Q & (-BLOCK_E)
    a = (a ^ ((a >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    c = (c ^ ((c >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return has, a, tl.where(next_Q == _LOWEST, -_INF, c)  # with K = E there is no next


@triton.jit
def sweep(
    scores_ptr, rows_ptr, bits_ptr, header, state, counts, T, seed, first, last,
    E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Give every row its K best; count loads, and bids within the windows."""
    WORDS: tl.constexpr = (BLOCK_E + 31) // 32
    e, part = tl.arange(0, BLOCK_E), tl.arange(0, 8)[:, None]
    w_E = getf(vec(state, at.WINDOW, BLOCK_E))
    up_counts = tl.zeros([8, BLOCK_E], tl.int32)
    down_counts = up_counts
    for tile in range(first, last):
        row_Q = tile * ROWS + tl.arange(0, ROWS)
        r, _ = _reduced(scores_ptr, rows_ptr, header, state, row_Q, T, seed, E, BLOCK_E)
        has, kth_Q, next_Q = _best(r, E, K, BLOCK_E)
        inside = (row_Q < T)[:, None] & (e < E)[None, :]
        a = tl.abs(r - (0.5 * (kth_Q + next_Q))[:, None])
        # Five counts of a tile at once, 6 bits each: all, and those within the window's parts.
        code = 1 + tl.where(a <= w_E[None, :], 1 << 6, 0)
        code += tl.where(a <= w_E[None, :] / 8.0, 1 << 12, 0)
        code += tl.where(a <= w_E[None, :] / 64.0, 1 << 18, 0)
        code += tl.where(a <= w_E[None, :] / 512.0, 1 << 24, 0)
        up = tl.sum(tl.where(inside & has, code, 0), 0)
        down = tl.sum(tl.where(inside & (has == 0), code, 0), 0)
        up_counts += tl.where(part < 5, (up[None, :] >> (6 * part)) & 63, 0)
        down_counts += tl.where(part < 5, (down[None, :] >> (6 * part)) & 63, 0)
        bit = tl.where(inside & has, 1 << (e & 31)[None, :], 0)
        word = tl.sum(tl.reshape(bit, (ROWS, WORDS, BLOCK_E // WORDS)), 2)
        word_at = row_Q.to(tl.int64)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        tl.store(bits_ptr + word_at, word, mask=(row_Q < T)[:, None])
    place, inside = counts + part * BLOCK_E + e[None, :], (e < E)[None, :] & (part < 5)
    tl.atomic_add(place, up_counts, mask=inside, sem="relaxed")
    down_at, own_at = place + (at.DOWN - 1) * BLOCK_E, place + at.OWN_LOAD * BLOCK_E
    tl.atomic_add(down_at, down_counts, mask=inside & (part > 0), sem="relaxed")
    tl.atomic_add(own_at, up_counts, mask=inside & (part == 0), sem="relaxed")


@triton.jit
def _held(bits_ptr, row_Q, T, BLOCK_E: tl.constexpr):
    """Return (Q, E) bool, each row's experts."""
    WORDS: tl.constexpr = (BLOCK_E + 31) // 32
    e = tl.arange(0, BLOCK_E)
    word_at = row_Q.to(tl.int64)[:, None] * WORDS + (e >> 5)[None, :]
    word = tl.load(bits_ptr + word_at, mask=(row_Q < T)[:, None], other=0, cache_modifier=".cg")
    return ((word >> (e & 31)[None, :]) & 1) != 0


@triton.jit
def slot_of(row, count, S: tl.constexpr, SHIFT: tl.constexpr):
    """Return the slot in which a row competes at an expert that moves so many units."""
    return ((mix(row) >> SHIFT) % tl.minimum(tl.maximum(count, 1), S).to(tl.uint32)).to(tl.int32)


@triton.jit
def offer(
    scores_ptr, rows_ptr, bits_ptr, header, state, counts, keys, T, seed, first, last,
    E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Let every row offer its cheapest swap, and find out what passing a unit on costs.

    For each expert, the cost of the cheapest swap of any row that has it is stored as inverted
    bits, so that the largest number wins. 0 means that there is none.
    """
    e = tl.arange(0, BLOCK_E)
    give_E, take_E = get(vec(state, at.GIVE, BLOCK_E)), get(vec(state, at.TAKE, BLOCK_E))
    cost_E, moves = getf(vec(state, at.COST, BLOCK_E)), get(state + at.MEASURES) == 0
    rounds = get(state + at.ROUNDS)
    late = (rounds - CALM).to(tl.float32)
    jitter = tl.minimum(tl.exp2(tl.minimum(late / 2, 30.0)) * getf(state + at.EPS), 1.0)
    least = tl.zeros([BLOCK_E], tl.int32)
    for tile in range(first, last):
        row_Q = tile * ROWS + tl.arange(0, ROWS)
        r, grain_Q = _reduced(scores_ptr, rows_ptr, header, state, row_Q, T, seed, E, BLOCK_E)
        has = _held(bits_ptr, row_Q, T, BLOCK_E)
        room = r - cost_E[None, :]
        if late >= 0:
            room += (jitter * grain_Q)[:, None] * _noise(row_Q + 7919 * rounds, e)
        room = tl.where((has == 0) & (take_E > 0)[None, :], room, -_INF)
        m_Q, t_Q = tl.max(room, 1, return_indices=True)
        some_Q = (m_Q > -_INF) & (row_Q < T)
        mine = tl.where(has & (give_E > 0)[None, :], r, _INF)
        low_Q, a_Q = tl.min(mine, 1, return_indices=True)
        swap = tl.where(has & some_Q[:, None], tl.maximum(r - m_Q[:, None], 0.0), _INF)
        least = tl.maximum(least, -tl.min(swap, 0).to(tl.int32, bitcast=True) + INF_BITS)
        offers_Q = some_Q & (low_Q < _INF) & moves
        cost_Q = tl.where(offers_Q, tl.maximum(low_Q - m_Q, 0.0), 0.0).to(tl.int32, bitcast=True)
        key_Q = (((cost_Q >> 9) ^ _COST_MASK).to(tl.int64) << 41) | (a_Q.to(tl.int64) << 10)
        key_Q = key_Q | ((row_Q ^ ROW_MASK).to(tl.int64) << 20) | t_Q.to(tl.int64)
        given_Q = tl.sum(tl.where(e[None, :] == a_Q[:, None], give_E[None, :], 0), 1)
        taken_Q = tl.sum(tl.where(e[None, :] == t_Q[:, None], take_E[None, :], 0), 1)
        at_a = keys + a_Q * S + slot_of(row_Q, given_Q, S, 4)
        at_t = keys + (BLOCK_E + t_Q) * S + slot_of(row_Q, taken_Q, S, 16)
        tl.atomic_max(at_a, key_Q, mask=offers_Q, sem="relaxed")
        tl.atomic_max(at_t, key_Q, mask=offers_Q, sem="relaxed")
    tl.atomic_max(counts + at.LEAST * BLOCK_E + e, least, sem="relaxed")


@triton.jit
def conclude(
    scores_ptr, rows_ptr, bits_ptr, header, state, experts_ptr, partial_ptr, T, first, last, tiles,
    E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    FINE: tl.constexpr,
):  # fmt: skip
    """Write each row's experts, best first, sums of score, slack and range, and own loads.

    A tile is processed in FINE parts of ROWS rows each, since float64 takes more room.
    """
    e = tl.arange(0, BLOCK_E)[None, :]
    none = float("-inf")
    b_E = getf(vec(state, at.PRICE, BLOCK_E)).to(tl.float64)
    scaled = tl.zeros((), tl.int32)
    own_E = tl.zeros([BLOCK_E], tl.int32)
    for tile in range(first * FINE, last * FINE):
        row_Q = tile * ROWS + tl.arange(0, ROWS)
        inside_Q = row_Q < T
        v, _, span_Q, factor_Q = _relative(scores_ptr, rows_ptr, header, row_Q, T, E, BLOCK_E)
        s, _ = _load(scores_ptr, row_Q, T, E, BLOCK_E)
        has = _held(bits_ptr, row_Q, T, BLOCK_E)
        # In float64, from the scores themselves: float32 differences from the base are rounded.
        wide_Q = factor_Q.to(tl.float64)
        base_Q = tl.load(rows_ptr + row_Q, mask=inside_Q, other=0.0, cache_modifier=".cg")
        exact = s.to(tl.float64) * wide_Q[:, None]
        penalised = base_Q.to(tl.float64)[:, None] * wide_Q[:, None] + v.to(tl.float64)
        exact = tl.where(s == -_INF, penalised, exact)
        r = exact - b_E[None, :]
        left = tl.where(e < E, r, none)
        order = tl.where(has, tl.maximum(s, -3.0e38), -_INF)
        top_Q = tl.zeros([ROWS], tl.float64)
        for k in tl.static_range(K):
            best_Q, i_Q = tl.max(left, 1, return_indices=True)
            left = tl.where(e == i_Q[:, None], none, left)
            top_Q += best_Q
            _, j_Q = tl.max(order, 1, return_indices=True)
            order = tl.where(e == j_Q[:, None], -_INF, order)
            place = experts_ptr + row_Q.to(tl.int64) * K + k
            tl.store(place, j_Q.to(tl.int64), mask=inside_Q)
        slack_Q = tl.maximum(top_Q - tl.sum(tl.where(has, r, 0.0), 1), 0.0)
        got_Q = tl.sum(tl.where(has, exact, 0.0), 1)
        tl.store(partial_ptr + tile, tl.sum(tl.where(inside_Q, got_Q, 0.0), 0))
        tl.store(partial_ptr + FINE * tiles + tile, tl.sum(tl.where(inside_Q, slack_Q, 0.0), 0))
        spans_Q = tl.where(inside_Q, span_Q, 0.0).to(tl.float64)
        tl.store(partial_ptr + 2 * FINE * tiles + tile, tl.sum(spans_Q, 0))
        scaled += tl.sum((inside_Q & (factor_Q < 1.0)).to(tl.int32), 0)
        own_E += tl.sum((has & inside_Q[:, None]).to(tl.int32), 0)
    tl.atomic_add(header + at.SCALED, scaled, sem="relaxed")
    tl.store(vec(state, at.OWN, BLOCK_E), own_E)


@triton.jit
def order(
    bits_ptr, states, order_ptr, load_E, T, member, first, last, E: tl.constexpr,
    K: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Number assignments by expert, then by row; write which row each is, and its (T, E) place."""
    STATE: tl.constexpr = at.SCALARS + at.VECTORS * BLOCK_E
    e = tl.arange(0, BLOCK_E)
    at_E = (tl.cumsum(load_E, 0) - load_E).to(tl.int64)
    for start in range(0, member, ROWS):
        before_Q = start + tl.arange(0, ROWS)
        own = states + before_Q[:, None] * STATE + at.SCALARS + at.OWN * BLOCK_E + e[None, :]
        mask = (before_Q < member)[:, None]
        at_E += tl.sum(tl.load(own, mask=mask, other=0, cache_modifier=".cg"), 0)
    for tile in range(first, last):
        row_Q = tile * ROWS + tl.arange(0, ROWS)
        has = _held(bits_ptr, row_Q, T, BLOCK_E)
        number = tl.cumsum(has.to(tl.int32), 0)
        place = order_ptr + at_E[None, :] + number - 1
        row = row_Q.to(tl.int64)[:, None] + 0 * number
        tl.store(place, row, mask=has)
        tl.store(place + T.to(tl.int64) * K, row * E + e[None, :], mask=has)
        at_E += tl.sum(has.to(tl.int32), 0)
