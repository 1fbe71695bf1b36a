"""Row work of the phases: every row for itself; between rows there are only integers.

A program works on the tiles from ``first`` to before ``last``. ``rows_ptr`` holds each row's
largest score (T) and its range (T).

Shape letters: T rows, R rows of a tile, E experts (padded to BLOCK_E), K experts per token, S
slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow.device import layout as at

_INF, INF_BITS = tl.constexpr(float("inf")), tl.constexpr(0x7F800000)
_LOWEST = tl.constexpr(-0x80000000)
# A row counts as at least so wide, in the scale: narrow rows need a perturbation, too.
_LEAST_WIDTH = tl.constexpr(0.375)
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
def _noise(row_R, expert_E):
    """Return (R, E) float32 in [-0.5, 0.5) that depend on row and expert alone."""
    h = (mix(row_R + 1)[:, None] ^ (expert_E.to(tl.uint32) * 0x9E3779B1)[None, :]) * 0x2C1B3C6D
    h = (h ^ (h >> 15)) * 0x297A2D39
    return (0x3F800000 | (h >> 9).to(tl.int32)).to(tl.float32, bitcast=True) - 1.5


@triton.jit
def _load(ptr, row_R, T, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return (R, E) float32 scores, 0 for those that are not finite, and which rows had such."""
    e = tl.arange(0, BLOCK_E)
    mask = (row_R < T)[:, None] & (e < E)[None, :]
    s = tl.load(ptr + row_R.to(tl.int64)[:, None] * E + e[None, :], mask=mask, other=0.0)
    s = s.to(tl.float32)
    is_bad = (s != s) | (s == _INF)
    return tl.where(is_bad, 0.0, s), tl.max(is_bad.to(tl.int32), 1)


@triton.jit
def scan(
    scores_ptr, rows_ptr, header, T, first, last,
    E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Keep each row's largest allowed score and range; count bad rows, and ranges by exponent."""
    bins = tl.arange(0, 256)
    count = tl.zeros([256], tl.int32)
    bad = tl.zeros((), tl.int32)
    forbidden = tl.zeros((), tl.int32)
    for tile in range(first, last):
        row_R = tile * ROWS + tl.arange(0, ROWS)
        s, bad_R = _load(scores_ptr, row_R, T, E, BLOCK_E)
        is_allowed = (tl.arange(0, BLOCK_E) < E)[None, :] & (s > -_INF)
        high_R = tl.max(tl.where(is_allowed, s, -_INF), 1)
        low_R = tl.min(tl.where(is_allowed, s, _INF), 1)
        base_R = tl.where(high_R > -_INF, high_R, 0.0)
        # Finite, also where the difference of two scores is not.
        span_R = tl.minimum(tl.where(high_R > -_INF, high_R - low_R, 0.0), 3.0e38)
        tl.store(rows_ptr + row_R, base_R, mask=row_R < T)
        tl.store(rows_ptr + T + row_R, span_R, mask=row_R < T)
        exponent_R = tl.where(
            (row_R < T) & (span_R > 0), span_R.to(tl.int32, bitcast=True) >> 23, -1
        )
        count += tl.sum((exponent_R[:, None] == bins[None, :]).to(tl.int32), 0)
        bad += tl.sum(bad_R, 0)
        forbidden += tl.sum(tl.max((s == -_INF).to(tl.int32), 1), 0)
    tl.atomic_add(header + at.EXPONENTS + bins, count, mask=count > 0, sem="relaxed")
    tl.atomic_add(header + at.BAD, bad, sem="relaxed")
    tl.atomic_add(header + at.FORBIDDEN, forbidden, sem="relaxed")


@triton.jit
def _relative(scores_ptr, rows_ptr, header, row_R, T, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return (R, E) scores less the row's largest, and each row's width, range and factor.

    Rows whose range is above the limit are scaled down to it. A forbidden arc is worth one width
    less than the worst allowed one.
    """
    s, _ = _load(scores_ptr, row_R, T, E, BLOCK_E)
    base_R = tl.load(rows_ptr + row_R, mask=row_R < T, other=0.0, cache_modifier=".cg")
    span_R = tl.load(rows_ptr + T + row_R, mask=row_R < T, other=0.0, cache_modifier=".cg")
    limit = getf(header + at.LIMIT)
    factor_R = tl.where(span_R > limit, limit / tl.maximum(span_R, limit), 1.0)
    span_R = tl.minimum(span_R, limit)
    width_R = tl.maximum(span_R, getf(header + at.SCALE) * _LEAST_WIDTH)
    v = tl.maximum(s - base_R[:, None], -3.0e38) * factor_R[:, None]
    return tl.where(s == -_INF, -(span_R + width_R)[:, None], v), width_R, span_R, factor_R


@triton.jit
def _reduced(
    scores_ptr, rows_ptr, header, state, row_R, T, seed, E: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Return (R, E) perturbed scores less prices, and each row's width."""
    v, width_R, _, _ = _relative(scores_ptr, rows_ptr, header, row_R, T, E, BLOCK_E)
    part_R = getf(state + at.EPS) * width_R
    noise = _noise(row_R + seed, tl.arange(0, BLOCK_E))
    return (v - getf(vec(state, at.PRICE, BLOCK_E))[None, :]) + part_R[:, None] * noise, width_R


@triton.jit
def _best(r, E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return which K are each row's best, and the K-th and next value, cut to distinct keys."""
    e = tl.arange(0, BLOCK_E)[None, :]
    i = r.to(tl.int32, bitcast=True)
    i = i ^ ((i >> 31) & 0x7FFFFFFF)
    # The lowest bits say which expert: no two keys of a row are equal.
    key = tl.where(e < E, (i & (-BLOCK_E)) | (BLOCK_E - 1 - e), _LOWEST)
    left = key
    kth_R = tl.max(left, 1)
    for _ in tl.static_range(K - 1):
        left = tl.where(left == kth_R[:, None], _LOWEST, left)
        kth_R = tl.max(left, 1)
    has = key >= kth_R[:, None]
    next_R = tl.max(tl.where(has, _LOWEST, key), 1)
    a, c = kth_R & (-BLOCK_E), next_R & (-BLOCK_E)
    a = (a ^ ((a >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    c = (c ^ ((c >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return has, a, tl.where(next_R == _LOWEST, -_INF, c)  # with K = E there is no next


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
        row_R = tile * ROWS + tl.arange(0, ROWS)
        r, _ = _reduced(scores_ptr, rows_ptr, header, state, row_R, T, seed, E, BLOCK_E)
        has, kth_R, next_R = _best(r, E, K, BLOCK_E)
        inside = (row_R < T)[:, None] & (e < E)[None, :]
        a = tl.abs(r - (0.5 * (kth_R + next_R))[:, None])
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
        word_at = row_R.to(tl.int64)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        tl.store(bits_ptr + word_at, word, mask=(row_R < T)[:, None])
    place, inside = counts + part * BLOCK_E + e[None, :], (e < E)[None, :] & (part < 5)
    tl.atomic_add(place, up_counts, mask=inside, sem="relaxed")
    down_at, own_at = place + (at.DOWN - 1) * BLOCK_E, place + at.OWN_LOAD * BLOCK_E
    tl.atomic_add(down_at, down_counts, mask=inside & (part > 0), sem="relaxed")
    tl.atomic_add(own_at, up_counts, mask=inside & (part == 0), sem="relaxed")


@triton.jit
def _held(bits_ptr, row_R, T, BLOCK_E: tl.constexpr):
    """Return (R, E) bool, each row's experts."""
    WORDS: tl.constexpr = (BLOCK_E + 31) // 32
    e = tl.arange(0, BLOCK_E)
    word_at = row_R.to(tl.int64)[:, None] * WORDS + (e >> 5)[None, :]
    word = tl.load(bits_ptr + word_at, mask=(row_R < T)[:, None], other=0, cache_modifier=".cg")
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
    """Let every row offer its cheapest swap, and learn what passing a unit on costs.

    The cheapest swap of any row that has an expert is kept by its inverted bits, 0 for none.
    """
    e = tl.arange(0, BLOCK_E)
    give_E, take_E = get(vec(state, at.GIVE, BLOCK_E)), get(vec(state, at.TAKE, BLOCK_E))
    cost_E, moves = getf(vec(state, at.COST, BLOCK_E)), get(state + at.MEASURES) == 0
    rounds = get(state + at.ROUNDS)
    late = (rounds - CALM).to(tl.float32)
    jitter = tl.minimum(tl.exp2(tl.minimum(late / 2, 30.0)) * getf(state + at.EPS), 1.0)
    least = tl.zeros([BLOCK_E], tl.int32)
    for tile in range(first, last):
        row_R = tile * ROWS + tl.arange(0, ROWS)
        r, width_R = _reduced(scores_ptr, rows_ptr, header, state, row_R, T, seed, E, BLOCK_E)
        has = _held(bits_ptr, row_R, T, BLOCK_E)
        room = r - cost_E[None, :]
        if late >= 0:
            room += (jitter * width_R)[:, None] * _noise(row_R + 7919 * rounds, e)
        room = tl.where((has == 0) & (take_E > 0)[None, :], room, -_INF)
        m_R, t_R = tl.max(room, 1, return_indices=True)
        some_R = (m_R > -_INF) & (row_R < T)
        mine = tl.where(has & (give_E > 0)[None, :], r, _INF)
        low_R, a_R = tl.min(mine, 1, return_indices=True)
        swap = tl.where(has & some_R[:, None], tl.maximum(r - m_R[:, None], 0.0), _INF)
        least = tl.maximum(least, -tl.min(swap, 0).to(tl.int32, bitcast=True) + INF_BITS)
        offers_R = some_R & (low_R < _INF) & moves
        cost_R = tl.where(offers_R, tl.maximum(low_R - m_R, 0.0), 0.0).to(tl.int32, bitcast=True)
        key_R = (((cost_R >> 9) ^ _COST_MASK).to(tl.int64) << 41) | (a_R.to(tl.int64) << 10)
        key_R = key_R | ((row_R ^ ROW_MASK).to(tl.int64) << 20) | t_R.to(tl.int64)
        given_R = tl.sum(tl.where(e[None, :] == a_R[:, None], give_E[None, :], 0), 1)
        taken_R = tl.sum(tl.where(e[None, :] == t_R[:, None], take_E[None, :], 0), 1)
        at_a = keys + a_R * S + slot_of(row_R, given_R, S, 4)
        at_t = keys + (BLOCK_E + t_R) * S + slot_of(row_R, taken_R, S, 16)
        tl.atomic_max(at_a, key_R, mask=offers_R, sem="relaxed")
        tl.atomic_max(at_t, key_R, mask=offers_R, sem="relaxed")
    tl.atomic_max(counts + at.LEAST * BLOCK_E + e, least, sem="relaxed")


@triton.jit
def conclude(
    scores_ptr, rows_ptr, bits_ptr, header, state, experts_ptr, partial_ptr, T, first, last, tiles,
    E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    FINE: tl.constexpr,
):  # fmt: skip
    """Write each row's experts, best first, sums of score, slack and range, and own loads.

    By FINE parts of a tile each, of ROWS rows, since float64 takes more room.
    """
    e = tl.arange(0, BLOCK_E)[None, :]
    none = float("-inf")
    b_E = getf(vec(state, at.PRICE, BLOCK_E)).to(tl.float64)
    scaled = tl.zeros((), tl.int32)
    own_E = tl.zeros([BLOCK_E], tl.int32)
    for tile in range(first * FINE, last * FINE):
        row_R = tile * ROWS + tl.arange(0, ROWS)
        inside_R = row_R < T
        v, _, span_R, factor_R = _relative(scores_ptr, rows_ptr, header, row_R, T, E, BLOCK_E)
        s, _ = _load(scores_ptr, row_R, T, E, BLOCK_E)
        has = _held(bits_ptr, row_R, T, BLOCK_E)
        # In float64, and of the scores as they are: what was taken off them is not.
        wide_R = factor_R.to(tl.float64)
        base_R = tl.load(rows_ptr + row_R, mask=inside_R, other=0.0, cache_modifier=".cg")
        exact = s.to(tl.float64) * wide_R[:, None]
        penalised = base_R.to(tl.float64)[:, None] * wide_R[:, None] + v.to(tl.float64)
        exact = tl.where(s == -_INF, penalised, exact)
        r = exact - b_E[None, :]
        left = tl.where(e < E, r, none)
        order = tl.where(has, tl.maximum(s, -3.0e38), -_INF)
        top_R = tl.zeros([ROWS], tl.float64)
        for k in tl.static_range(K):
            best_R, i_R = tl.max(left, 1, return_indices=True)
            left = tl.where(e == i_R[:, None], none, left)
            top_R += best_R
            _, j_R = tl.max(order, 1, return_indices=True)
            order = tl.where(e == j_R[:, None], -_INF, order)
            place = experts_ptr + row_R.to(tl.int64) * K + k
            tl.store(place, j_R.to(tl.int64), mask=inside_R)
        slack_R = tl.maximum(top_R - tl.sum(tl.where(has, r, 0.0), 1), 0.0)
        got_R = tl.sum(tl.where(has, exact, 0.0), 1)
        tl.store(partial_ptr + tile, tl.sum(tl.where(inside_R, got_R, 0.0), 0))
        tl.store(partial_ptr + FINE * tiles + tile, tl.sum(tl.where(inside_R, slack_R, 0.0), 0))
        spans_R = tl.where(inside_R, span_R, 0.0).to(tl.float64)
        tl.store(partial_ptr + 2 * FINE * tiles + tile, tl.sum(spans_R, 0))
        scaled += tl.sum((inside_R & (factor_R < 1.0)).to(tl.int32), 0)
        own_E += tl.sum((has & inside_R[:, None]).to(tl.int32), 0)
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
        before_R = start + tl.arange(0, ROWS)
        own = states + before_R[:, None] * STATE + at.SCALARS + at.OWN * BLOCK_E + e[None, :]
        mask = (before_R < member)[:, None]
        at_E += tl.sum(tl.load(own, mask=mask, other=0, cache_modifier=".cg"), 0)
    for tile in range(first, last):
        row_R = tile * ROWS + tl.arange(0, ROWS)
        has = _held(bits_ptr, row_R, T, BLOCK_E)
        number = tl.cumsum(has.to(tl.int32), 0)
        place = order_ptr + at_E[None, :] + number - 1
        row = row_R.to(tl.int64)[:, None] + 0 * number
        tl.store(place, row, mask=has)
        tl.store(place + T.to(tl.int64) * K, row * E + e[None, :], mask=has)
        at_E += tl.sum(has.to(tl.int32), 0)
