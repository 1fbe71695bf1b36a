"""Decisions before and after a round, and the end of a solve.

They follow from integers alone, so every program takes the same ones and changes its own state.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow.device import layout as at
from megatron_maxscore.flow.device.rows import INF_BITS, ROW_MASK, get, getf, put, slot_of, vec
from megatron_maxscore.flow.solution import ROUNDING

_INF = tl.constexpr(float("inf"))
# Problems of at most _FEW units alternate between _RELAX rounds that only measure how far experts
# are from one with room and _MOVE rounds that move units, for _CYCLES cycles at most.
_FEW, _RELAX, _MOVE, _CYCLES = (tl.constexpr(n) for n in (8192, 3, 3, 10))
# Rounds of filling idle experts at most.
_FILLS = tl.constexpr(512)
# A gap that counts as none.
_ROUNDING = tl.constexpr(ROUNDING)


@triton.jit
def plan(
    state, quota_ptr, T, E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Set what a round does; return the kind of the phase, a round or the conclusion.

    Overfull experts give units, and experts with room take them. A full expert whose distance from
    room is known takes one unit, too, which it will pass on. If no expert is overfull, experts of
    price 0 give units to experts that have a positive price and room.
    """
    e = tl.arange(0, BLOCK_E)
    quota = tl.minimum(tl.load(quota_ptr + e, mask=e < E, other=0), T).to(tl.int32)
    excess, distance = get(vec(state, at.EXCESS, BLOCK_E)), getf(vec(state, at.DISTANCE, BLOCK_E))
    units, age, cycles = T * K, get(state + at.AGE), get(state + at.CYCLES)
    tight = tl.sum(quota.to(tl.int64), 0) == units
    free = (tight == 0) & (getf(vec(state, at.PRICE, BLOCK_E)) <= 0)
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
    ends = fills & ((get(state + at.MOVED) == 0) | (get(state + at.ROUNDS) >= _FILLS))
    tl.store(vec(state, at.GIVE, BLOCK_E), give)
    tl.store(vec(state, at.TAKE, BLOCK_E), take)
    put(vec(state, at.COST, BLOCK_E), tl.where(fills, 0.0, cost))
    tl.store(state + at.MEASURES, measures.to(tl.int32))
    return tl.where((over + idle == 0) | ends, at.CONCLUDE, at.ROUND).to(tl.int32)


@triton.jit
def _at_other_end(keys, units_ptr, key, ROLE: tl.constexpr, BLOCK_E: tl.constexpr, S: tl.constexpr):
    """Return which winners at one expert also won at the other: the taker (ROLE 1), giver (0)."""
    won = key > 0
    row = (((key >> 20) & ROW_MASK) ^ ROW_MASK).to(tl.int32)
    other = ((key >> (10 - 10 * ROLE)) & 1023).to(tl.int32)
    units = tl.load(units_ptr + other, mask=won, other=0, cache_modifier=".cg")
    slot = slot_of(row, units, S, 4 + 12 * ROLE)
    place = keys + (BLOCK_E * ROLE + other) * S + slot
    is_made = won & (tl.load(place, mask=won, other=0, cache_modifier=".cg") == key)
    return is_made, row, other


@triton.jit
def after_round(
    state, counts, keys, bits_ptr, T, member, members, of_member, K: tl.constexpr,
    BLOCK_E: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Make the swaps that have won their slots at both ends; set excess and distances.

    Each program makes the swaps of its own rows; ``of_member`` is how many rows a program has.
    """
    WORDS: tl.constexpr = (BLOCK_E + 31) // 32
    e, slot = tl.arange(0, BLOCK_E), tl.arange(0, S)
    excess, distance = get(vec(state, at.EXCESS, BLOCK_E)), getf(vec(state, at.DISTANCE, BLOCK_E))
    age, cycles, units = get(state + at.AGE) + 1, get(state + at.CYCLES), T * K
    vectors = state + at.SCALARS
    place = keys + e[:, None] * S + slot[None, :]
    key = tl.load(place, cache_modifier=".cg")
    made, row, t = _at_other_end(keys, vectors + at.TAKE * BLOCK_E, key, 1, BLOCK_E, S)
    key_t = tl.load(place + BLOCK_E * S, cache_modifier=".cg")
    made_t, _, _ = _at_other_end(keys, vectors + at.GIVE * BLOCK_E, key_t, 0, BLOCK_E, S)
    gave, took = tl.sum(made.to(tl.int32), 1), tl.sum(made_t.to(tl.int32), 1)
    own = made & (tl.minimum(row // of_member, members - 1) == member)
    given = e[:, None] + row * 0
    word = bits_ptr + row.to(tl.int64) * WORDS
    tl.atomic_xor(word + (given >> 5), 1 << (given & 31), mask=own, sem="relaxed")
    tl.atomic_xor(word + (t >> 5), 1 << (t & 31), mask=own, sem="relaxed")
    moved = tl.sum(gave, 0)
    least = get(counts + at.LEAST * BLOCK_E + e)
    least = tl.where(least > 0, (-least + INF_BITS).to(tl.float32, bitcast=True), _INF)
    in_cycles = (units <= _FEW) & (cycles < _CYCLES)
    distance = tl.where(in_cycles, tl.minimum(distance, least), least)
    forgets = age >= tl.where(in_cycles, _RELAX + _MOVE, 2)
    forgets = forgets | (in_cycles & (get(state + at.MEASURES) == 0) & (moved == 0))
    rounds = get(state + at.ROUNDS) + 1
    tl.debug_barrier()  # all is read
    put(vec(state, at.DISTANCE, BLOCK_E), tl.where(forgets, _INF, distance))
    tl.store(vec(state, at.EXCESS, BLOCK_E), excess + took - gave)
    tl.store(state + at.AGE, tl.where(forgets, 0, age))
    tl.store(state + at.CYCLES, cycles + forgets.to(tl.int32))
    tl.store(state + at.ROUNDS, rounds)
    tl.store(state + at.MOVED, moved)
    tl.debug_barrier()


@triton.jit
def final_prices(
    header, state, capacity_ptr, E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Bring prices to the level at which they are returned."""
    e = tl.arange(0, BLOCK_E)
    b, rows = getf(vec(state, at.PRICE, BLOCK_E)), get(header + at.ROWS_IN)
    # If every row has equal scores, any choice is optimal, and prices can be 0.
    ranges = tl.sum(get(header + at.RANGES + tl.arange(0, 256)), 0)
    b = tl.where(ranges + get(header + at.FORBIDDEN) == 0, 0.0, b)
    # Without slack, adding the same amount to all prices changes nothing, so the mean is set to 0.
    # The lowest price is subtracted first: the mean of large, similar prices would be inexact.
    room = tl.minimum(tl.load(capacity_ptr + e, mask=e < E, other=0), rows)
    tight = tl.sum(room.to(tl.int64), 0) == rows * K
    level = tl.where(e < E, b - tl.min(tl.where(e < E, b, _INF), 0), 0.0)
    tl.debug_barrier()
    put(vec(state, at.PRICE, BLOCK_E), tl.where((e < E) & tight, level - tl.sum(level, 0) / E, b))


@triton.jit
def sum_up(
    header, state, quota_ptr, partial_ptr, results_ptr, tiles, T, E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Add up the tiles' sums in their order; write objective, bound, gap, loads and prices."""
    e, i = tl.arange(0, BLOCK_E), tl.arange(0, 256)
    ok = e < E
    b, excess = getf(vec(state, at.PRICE, BLOCK_E)), get(vec(state, at.EXCESS, BLOCK_E))
    quota = tl.minimum(tl.load(quota_ptr + e, mask=ok, other=0), T)
    score = tl.zeros([256], tl.float64)
    slack, span = score, score
    for start in range(0, tiles, 256):
        here, inside = partial_ptr + start + i, start + i < tiles
        score += tl.load(here, mask=inside, other=0.0, cache_modifier=".cg")
        slack += tl.load(here + tiles, mask=inside, other=0.0, cache_modifier=".cg")
        span += tl.load(here + 2 * tiles, mask=inside, other=0.0, cache_modifier=".cg")
    idle = tl.sum(tl.where(ok, -excess.to(tl.float64) * b.to(tl.float64), 0.0), 0)
    objective, spans = tl.sum(score, 0), tl.sum(span, 0)
    difference = tl.maximum(tl.sum(slack, 0) + idle, 0.0)
    gap = tl.where(difference > 0, float("inf"), 0.0).to(tl.float64)
    gap = tl.where(spans > 0, difference / tl.where(spans > 0, spans, 1.0), gap)
    tl.store(results_ptr, objective)
    tl.store(results_ptr + 1, objective + difference)
    tl.store(results_ptr + 2, gap)
    tl.store(results_ptr + 3, difference)
    tl.store(results_ptr + 4, spans)
    integers = results_ptr.to(tl.pointer_type(tl.int64))
    tl.store(integers + 5, get(header + at.BAD).to(tl.int64))
    tl.store(integers + 6, get(header + at.SCALED).to(tl.int64))
    tl.store(integers + 7, (gap <= _ROUNDING).to(tl.int64))
    tl.store(integers + 8 + e, excess + quota, mask=ok)
    tl.store(results_ptr.to(tl.pointer_type(tl.float32)) + 16 + 2 * E + e, b, mask=ok)
