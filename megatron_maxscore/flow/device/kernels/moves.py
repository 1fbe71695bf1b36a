"""Kernels of the bounded finish, see :mod:`rounds`: contested rows, and the rounds of moves.

All rounds run in one program, which is why so much of it is in registers: distances, predecessors
and potentials are matrices of classes by nodes.

Shape letters: C classes, N nodes (experts, the sink after them, padded to a power of two), A nodes
that arcs leave in a chunk, R rows of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow.device.kernels import layout
from megatron_maxscore.flow.device.kernels.control import set_vector, vector
from megatron_maxscore.flow.device.kernels.integers import NEVER, bit_length, hashed
from megatron_maxscore.flow.device.kernels.rows import choose, coarseness, load_scores, reduced_tile

SHIFT, WIDTH, REACH, STRIDE = layout.SHIFT, layout.WIDTH, layout.REACH, layout.STRIDE
COST_SHIFT, NEAR_ROWS, UNITS = layout.COST_SHIFT, layout.NEAR_ROWS, layout.UNITS
PRICE, LOAD, ROUNDS, ALL_ROUNDS = layout.PRICE, layout.LOAD, layout.ROUNDS, layout.ALL_ROUNDS
_NO_ARC = tl.constexpr(1 << 62)
_NO_COST = tl.constexpr(1 << 30)
_HIGH = tl.constexpr(1 << 62)
_HOPS = tl.constexpr(5)
_MAX_ROUNDS = tl.constexpr(64)


@triton.jit
def _first(values, at_E, NUM_EXPERTS: tl.constexpr, LOWEST: tl.constexpr):
    """Return each row's lowest (or highest) value, its expert, and the values without it.

    ``at_E`` is the place of each expert in the row's order; the first of equal ones is taken.
    """
    expert = tl.arange(0, values.shape[1])[None, :]
    if LOWEST:
        best_R = tl.min(values, 1)
        none: tl.constexpr = _HIGH
    else:
        best_R = tl.max(values, 1)
        none: tl.constexpr = -_HIGH
    place = tl.where(values == best_R[:, None], at_E, values.shape[1])
    first_R = tl.min(place, 1)
    is_it = (at_E == first_R[:, None]) & (values == best_R[:, None])
    expert_R = tl.max(tl.where(is_it, expert, -1), 1)
    expert_R = tl.where(best_R == none, -1, expert_R)
    return best_R, expert_R, tl.where(is_it, none, values)


@triton.jit
def nearest(
    scores_ptr, spread_ptr, state_ptr, near_ptr, slot_ptr, x_ptr, claims_ptr, num_rows,
    num_programs,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    TIE_BITS: tl.constexpr,
):  # fmt: skip
    """Write the assignment at the prices, and of contested rows what the rounds need of them.

    A contested row has eleven int32: its index, which of its experts it has as bits, four experts,
    four values, and room for the arc that it offers.
    """
    program = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)[None, :]
    shift = tl.load(state_ptr + SHIFT)
    width = tl.load(state_ptr + WIDTH)
    reach = tl.load(state_ptr + REACH)
    stride = tl.load(state_ptr + STRIDE)
    cost_shift = tl.load(state_ptr + COST_SHIFT)
    price_E = vector(state_ptr, PRICE, NUM_EXPERTS, BLOCK_E)
    coarse = coarseness(price_E)
    for tile in range(program, tl.cdiv(num_rows, ROWS), num_programs):
        row_R = tile * ROWS + tl.arange(0, ROWS)
        is_row_R = row_R < num_rows
        scores = load_scores(scores_ptr, row_R, is_row_R, NUM_EXPERTS, BLOCK_E)
        r = reduced_tile(scores, shift, price_E, spread_ptr, width, row_R, NUM_EXPERTS, BLOCK_E)
        chosen, kth_R, next_R = choose(
            r, coarse, row_R, is_row_R, NUM_EXPERTS, TOPK, BLOCK_E, TIE_BITS
        )
        inside = is_row_R[:, None] & (expert < NUM_EXPERTS)
        at = row_R.to(tl.int64)[:, None] * NUM_EXPERTS + expert
        tl.store(x_ptr + at, chosen.to(tl.int8), mask=inside)
        tl.store(claims_ptr + row_R, tl.full([ROWS], 2147483647, tl.int32), mask=is_row_R)
        is_near_R = is_row_R & (kth_R - next_R <= reach) & (row_R % stride == 0)
        count = tl.sum(is_near_R.to(tl.int32), 0)
        if count > 0:
            place = tl.atomic_add(state_ptr + NEAR_ROWS, count.to(tl.int64), sem="relaxed")
            slot_R = place.to(tl.int32) + tl.cumsum(is_near_R.to(tl.int32), 0) - 1
            # Equal ones in cyclic order of the experts, from a start that moves with the row.
            start_R = ((hashed(row_R) * NUM_EXPERTS) >> 32).to(tl.int32)
            order = expert - start_R[:, None]
            order = tl.where(order < 0, order + NUM_EXPERTS, order)
            held = tl.where(chosen & (expert < NUM_EXPERTS), r, _HIGH)
            other = tl.where(chosen | (expert >= NUM_EXPERTS), -_HIGH, r)
            least_R, held0_R, held = _first(held, order, NUM_EXPERTS, True)
            second_R, held1_R, held = _first(held, order, NUM_EXPERTS, True)
            most_R, other0_R, other = _first(other, order, NUM_EXPERTS, False)
            third_R, other1_R, other = _first(other, order, NUM_EXPERTS, False)
            base = near_ptr + slot_R.to(tl.int64) * 11
            tl.store(slot_ptr + row_R, slot_R, mask=is_near_R)
            tl.store(base, row_R, mask=is_near_R)
            tl.store(base + 1, tl.full(row_R.shape, 3, tl.int32), mask=is_near_R)
            _write(
                base, 0, held0_R, least_R, least_R - most_R, most_R, reach, cost_shift, is_near_R
            )
            _write(
                base, 1, held1_R, second_R, second_R - most_R, most_R, reach, cost_shift, is_near_R
            )
            _write(
                base, 2, other0_R, most_R, least_R - most_R, most_R, reach, cost_shift, is_near_R
            )
            _write(
                base, 3, other1_R, third_R, least_R - third_R, most_R, reach, cost_shift, is_near_R
            )


@triton.jit
def _write(base, place: tl.constexpr, expert_R, value_R, loss_R, most_R, reach, cost_shift, mask):
    """Write one expert of contested rows and its value; none where it is out of reach."""
    is_there_R = (expert_R >= 0) & (loss_R <= reach)
    value_R = tl.where(is_there_R, (value_R - most_R) >> cost_shift, 0)
    tl.store(base + 2 + place, tl.where(is_there_R, expert_R, -1), mask=mask)
    tl.store(base + 6 + place, value_R.to(tl.int32), mask=mask)


@triton.jit
def _offer(key_ptr, c_R, a_R, b_R, cost_R, row_R, mask, NUM_EXPERTS: tl.constexpr):
    """Offer swaps: the arc from a to b of a class keeps the cheapest, then the first row."""
    at = (c_R.to(tl.int64) * NUM_EXPERTS + a_R) * NUM_EXPERTS + b_R
    key = (cost_R.to(tl.int64) << 32) | row_R.to(tl.int64)
    tl.atomic_min(key_ptr + at, key, mask=mask, sem="relaxed")


@triton.jit
def _forget(key_ptr, size: tl.constexpr):
    """Take all arcs away."""
    for first in range(0, size, 2048):
        at = first + tl.arange(0, 2048)
        tl.store(key_ptr + at, tl.full([2048], _NO_ARC, tl.int64), mask=at < size)


@triton.jit
def _costs(
    key_ptr, scratch_ptr, first, rent_N, has_sink,
    NUM_EXPERTS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_N: tl.constexpr,
    NODE_BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Return (C, A, N) uint32 costs of arcs that leave a chunk of nodes, above the node's number.

    Nearly 2**31 where there is none.
    """
    c = tl.arange(0, CLASSES)[:, None, None]
    a = (first + tl.arange(0, CHUNK))[None, :, None]
    b = tl.arange(0, BLOCK_N)[None, None, :]
    at = (c * NUM_EXPERTS + a) * NUM_EXPERTS + b
    inside = (a < NUM_EXPERTS) & (b < NUM_EXPERTS)
    key = tl.load(key_ptr + at, mask=inside, other=_NO_ARC, cache_modifier=".cg")
    cost = (key >> 32).to(tl.int32)
    # What the sink takes and gives, at price 0.
    slack_A = tl.load(scratch_ptr + a, cache_modifier=".cg")
    rent_A = tl.load(scratch_ptr + 2 * BLOCK_N + a, cache_modifier=".cg")
    from_sink = has_sink & (a == NUM_EXPERTS) & (b < NUM_EXPERTS)
    to_sink = has_sink & (b == NUM_EXPERTS) & (a < NUM_EXPERTS) & (slack_A > 0)
    cost = tl.where(from_sink, tl.maximum(rent_N[None, None, :], 0), cost)
    cost = tl.where(to_sink, tl.maximum(-rent_A, 0), cost)
    limit: tl.constexpr = 1 << (28 - bit_length(NUM_EXPERTS))
    return tl.where(cost < limit, (cost << NODE_BITS) | a, 2147483647).to(tl.uint32)


@triton.jit
def _pick(matrix_CN, at, scratch_ptr, CLASSES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return each class's entries at some nodes.

    Through registers as far as that is fast, else through memory.
    """
    if BLOCK_N <= 128:
        found = tl.gather(matrix_CN, at, 1)
    else:
        base = scratch_ptr + 3 * BLOCK_N + tl.arange(0, CLASSES)[:, None] * BLOCK_N
        tl.debug_barrier()
        tl.store(base + tl.arange(0, BLOCK_N)[None, :], matrix_CN)
        tl.debug_barrier()
        found = tl.load(base + at, cache_modifier=".cg")
    return found


@triton.jit
def _chunk(
    matrix_CN, first, scratch_ptr,
    CLASSES: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Return the columns of a chunk of nodes, (C, A)."""
    if CHUNK == BLOCK_N:
        columns = matrix_CN
    else:
        at = tl.broadcast_to((first + tl.arange(0, CHUNK))[None, :], [CLASSES, CHUNK])
        columns = _pick(matrix_CN, at, scratch_ptr, CLASSES, BLOCK_N)
    return columns


@triton.jit
def _walk_row(key_ptr, cur, p, NUM_EXPERTS: tl.constexpr, CLASSES: tl.constexpr, mask):
    """Return the rows of the arcs from p to cur, by class, where both are experts."""
    c = tl.arange(0, CLASSES)[:, None]
    at = (c * NUM_EXPERTS + p) * NUM_EXPERTS + cur
    key = tl.load(key_ptr + at, mask=mask, other=0, cache_modifier=".cg")
    return (key & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _step(
    key_ptr, near_ptr, slot_ptr, x_ptr, claims_ptr, scratch_ptr, price_N, potential_N, excess_N,
    has_sink,
    NUM_EXPERTS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_N: tl.constexpr,
    NODE_BITS: tl.constexpr, CHUNK: tl.constexpr, IS_NEAR: tl.constexpr,
):  # fmt: skip
    """Move units along shortest paths; see :func:`rounds_plain.step`.

    Returns potentials, excess, and how many units moved.
    """
    FAR: tl.constexpr = (1 << (31 - bit_length(NUM_EXPERTS))) - 1
    LAST: tl.constexpr = 2147483647
    BEYOND: tl.constexpr = 2147483648
    # Nodes at a time where all pairs are compared.
    PART: tl.constexpr = CHUNK if CHUNK < 16 else 16
    SINK: tl.constexpr = NUM_EXPERTS
    node = tl.arange(0, BLOCK_N)
    node_CN = tl.broadcast_to(node[None, :], [CLASSES, BLOCK_N])
    slack_N = tl.load(scratch_ptr + node, cache_modifier=".cg")
    sink_potential = tl.sum(tl.where(node == SINK, potential_N, 0), 0)
    rent_N = price_N + potential_N - sink_potential
    tl.store(scratch_ptr + 2 * BLOCK_N + node, rent_N)
    tl.debug_barrier()
    # Shortest paths: a forest whose roots are the overfull nodes.
    distance = tl.where(excess_N > 0, 0, FAR)[None, :] + tl.zeros([CLASSES, BLOCK_N], tl.int32)
    pred = tl.full([CLASSES, BLOCK_N], -1, tl.int32)
    if CHUNK == BLOCK_N:
        kept = _costs(
            key_ptr,
            scratch_ptr,
            0,
            rent_N,
            has_sink,
            NUM_EXPERTS,
            CLASSES,
            BLOCK_N,
            NODE_BITS,
            CHUNK,
        )
    for _ in range(_HOPS):
        best = tl.full([CLASSES, BLOCK_N], LAST, tl.uint32)
        for first in range(0, BLOCK_N, CHUNK):
            if CHUNK == BLOCK_N:
                cost = kept
            else:
                cost = _costs(
                    key_ptr, scratch_ptr, first, rent_N, has_sink, NUM_EXPERTS, CLASSES, BLOCK_N,
                    NODE_BITS, CHUNK,
                )  # fmt: skip
            # Sums with what cannot be reached, or by no arc, are nearly 2**31 or more.
            start = _chunk(distance, first, scratch_ptr, CLASSES, BLOCK_N, CHUNK)
            start = tl.where(start < FAR, (start << NODE_BITS).to(tl.uint32), BEYOND)
            best = tl.minimum(best, tl.min(start[:, :, None] + cost, 1))
        found = tl.where(best < LAST, best, LAST).to(tl.int32)
        is_less = (found < LAST) & ((found >> NODE_BITS) < distance)
        pred = tl.where(is_less, found & (BLOCK_N - 1), pred)
        distance = tl.where(is_less, found >> NODE_BITS, distance)
    nearest_N = tl.min(distance, 0)
    # Where the path to each node that has room comes from, and by which arc it leaves there.
    is_target = (excess_N < 0)[None, :] & (distance < FAR)
    cur, branch = node_CN, node_CN
    uses_sink = tl.zeros([CLASSES, BLOCK_N], tl.int32)
    p = _pick(pred, cur, scratch_ptr, CLASSES, BLOCK_N)
    going = is_target & (p >= 0)
    while tl.max(tl.max(going.to(tl.int32), 1), 0) > 0:
        uses_sink = tl.where(going & (cur == SINK), 1, uses_sink)
        branch = tl.where(going, cur, branch)
        cur = tl.where(going, p, cur)
        p = _pick(pred, cur, scratch_ptr, CLASSES, BLOCK_N)
        going = is_target & (p >= 0)
    source = cur
    order = tl.where(is_target, (distance << NODE_BITS) | node_CN, LAST)
    # Of paths that leave by the same arc, whose first node is their branch, the first stands.
    leading = tl.full([CLASSES, BLOCK_N], LAST, tl.int32)
    for first in range(0, BLOCK_N, PART):
        their_order = _chunk(order, first, scratch_ptr, CLASSES, BLOCK_N, PART)[:, :, None]
        their_branch = _chunk(branch, first, scratch_ptr, CLASSES, BLOCK_N, PART)[:, :, None]
        here = tl.where(their_branch == node[None, None, :], their_order, LAST)
        leading = tl.minimum(leading, tl.min(here, 1))
    stands = is_target & (_pick(leading, branch, scratch_ptr, CLASSES, BLOCK_N) == order)
    # How many paths that stand have the same source and come first, in this class and before.
    stands_order = tl.where(stands, order, LAST)
    rank = tl.zeros([CLASSES, BLOCK_N], tl.int32)
    given = tl.zeros([CLASSES, BLOCK_N], tl.int32)
    for first in range(0, BLOCK_N, PART):
        their_order = _chunk(stands_order, first, scratch_ptr, CLASSES, BLOCK_N, PART)[:, :, None]
        their_source = _chunk(source, first, scratch_ptr, CLASSES, BLOCK_N, PART)[:, :, None]
        same = (their_source == source[:, None, :]) & (their_order < order[:, None, :])
        rank += tl.sum(same.to(tl.int32), 1)
        gives = (their_source == node[None, None, :]) & (their_order < LAST)
        given += tl.sum(gives.to(tl.int32), 1)
    rank += _pick(tl.cumsum(given, 0) - given, source, scratch_ptr, CLASSES, BLOCK_N)
    stood = stands.to(tl.int32)
    taken = tl.cumsum(stood, 0) - stood
    excess_CN = excess_N[None, :] + tl.zeros([CLASSES, BLOCK_N], tl.int32)
    wins = (
        stands
        & (rank < _pick(excess_CN, source, scratch_ptr, CLASSES, BLOCK_N))
        & (taken < -excess_CN)
    )
    if SINK < BLOCK_N:
        # Units that the sink has placed, by class the one expert that gives it any.
        uses_C = tl.max(uses_sink * stood, 1)
        through_C = tl.sum(tl.where(node_CN == SINK, pred, 0), 1)
        through_CN = tl.maximum(through_C, 0)[:, None] + tl.zeros([CLASSES, BLOCK_N], tl.int32)
        placed = (through_CN == node_CN).to(tl.int32) * uses_C[:, None]
        placed = _pick(tl.cumsum(placed, 0) - placed, through_CN, scratch_ptr, CLASSES, BLOCK_N)
        slack_CN = slack_N[None, :] + tl.zeros([CLASSES, BLOCK_N], tl.int32)
        has_slack = placed < _pick(slack_CN, through_CN, scratch_ptr, CLASSES, BLOCK_N)
        wins = wins & ((uses_sink == 0) | has_slack)
    if IS_NEAR == 0:
        # A row offers several swaps here: the path that comes first has it.
        for check in tl.static_range(3):
            tl.debug_barrier()
            cur, p = node_CN, _pick(pred, node_CN, scratch_ptr, CLASSES, BLOCK_N)
            going = stands & (p >= 0)
            while tl.max(tl.max(going.to(tl.int32), 1), 0) > 0:
                row = _walk_row(key_ptr, cur, p, NUM_EXPERTS, CLASSES, going)
                if check == 0:
                    tl.atomic_min(claims_ptr + row, order, mask=going, sem="relaxed")
                elif check == 1:
                    claim = tl.load(claims_ptr + row, mask=going, other=0, cache_modifier=".cg")
                    wins = wins & ((going == 0) | (claim == order))
                else:
                    tl.store(claims_ptr + row, LAST, mask=going)
                cur = tl.where(going, p, cur)
                p = _pick(pred, cur, scratch_ptr, CLASSES, BLOCK_N)
                going = stands & (p >= 0)
    # The moves themselves.
    cur, p = node_CN, _pick(pred, node_CN, scratch_ptr, CLASSES, BLOCK_N)
    going = wins & (p >= 0)
    while tl.max(tl.max(going.to(tl.int32), 1), 0) > 0:
        of_row = going & (cur != SINK) & (p != SINK)
        row = _walk_row(key_ptr, cur, p, NUM_EXPERTS, CLASSES, of_row)
        at = row.to(tl.int64) * NUM_EXPERTS
        tl.store(x_ptr + at + p, tl.zeros([CLASSES, BLOCK_N], tl.int8), mask=of_row)
        tl.store(x_ptr + at + cur, tl.full([CLASSES, BLOCK_N], 1, tl.int8), mask=of_row)
        if IS_NEAR:
            slot = tl.load(slot_ptr + row, mask=of_row, other=0)
            base = near_ptr + slot.to(tl.int64) * 11
            held = tl.load(base + 1, mask=of_row, other=0, cache_modifier=".cg")
            for place in tl.static_range(4):
                expert = tl.load(base + 2 + place, mask=of_row, other=-1)
                held = tl.where(expert == p, held & (15 - (1 << place)), held)
                held = tl.where(expert == cur, held | (1 << place), held)
            tl.store(base + 1, held, mask=of_row)
        one = tl.full([CLASSES, BLOCK_N], 1, tl.int32)
        tl.atomic_add(scratch_ptr + cur, one, mask=going & (p == SINK), sem="relaxed")
        tl.atomic_add(scratch_ptr + p, -one, mask=going & (cur == SINK), sem="relaxed")
        cur = tl.where(going, p, cur)
        p = _pick(pred, cur, scratch_ptr, CLASSES, BLOCK_N)
        going = wins & (p >= 0)
    won = wins.to(tl.int32)
    excess_N += tl.sum(won, 0)
    for first in range(0, BLOCK_N, PART):
        their_won = _chunk(won, first, scratch_ptr, CLASSES, BLOCK_N, PART)[:, :, None]
        their_source = _chunk(source, first, scratch_ptr, CLASSES, BLOCK_N, PART)[:, :, None]
        left = tl.where(their_source == node[None, None, :], their_won, 0)
        excess_N -= tl.sum(tl.sum(left, 1), 0)
    limit = tl.max(tl.where(tl.max(won, 0) > 0, nearest_N, 0), 0)
    potential_N += limit - tl.minimum(nearest_N, limit)
    return potential_N, excess_N, tl.sum(tl.sum(won, 1), 0)


@triton.jit
def move(
    scores_ptr, capacity_ptr, spread_ptr, state_ptr, near_ptr, slot_ptr, x_ptr, claims_ptr,
    key_ptr, scratch_ptr, num_rows,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, NODE_BITS: tl.constexpr, CLASSES: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Make all rounds of moves: among contested rows, then, if units are left, over all rows."""
    node = tl.arange(0, BLOCK_N)
    is_expert = node < NUM_EXPERTS
    keys: tl.constexpr = CLASSES * NUM_EXPERTS * NUM_EXPERTS
    capacity_N = tl.load(capacity_ptr + node, mask=is_expert, other=0)
    price_N = vector(state_ptr, PRICE, NUM_EXPERTS, BLOCK_N)
    load_N = vector(state_ptr, LOAD, NUM_EXPERTS, BLOCK_N)
    is_tight = tl.sum(capacity_N, 0) == num_rows * TOPK
    is_loose = is_tight == 0
    if tl.load(state_ptr + UNITS) > 0:
        cost_shift = tl.load(state_ptr + COST_SHIFT)
        reach = (tl.load(state_ptr + REACH) >> cost_shift) * 3 // 2
        rows = tl.load(state_ptr + NEAR_ROWS).to(tl.int32)
        is_free_N = is_loose & is_expert & (price_N == 0)
        slack_N = tl.where(is_free_N, tl.maximum(capacity_N - load_N, 0), 0)
        excess_N = (load_N + slack_N - capacity_N).to(tl.int32)
        sink_excess = tl.where(is_loose, -tl.sum(excess_N, 0), 0)
        excess_N = tl.where(node == NUM_EXPERTS, sink_excess, excess_N)
        tl.store(scratch_ptr + node, slack_N.to(tl.int32))
        potential_N = tl.zeros([BLOCK_N], tl.int32)
        cost_price_N = tl.minimum(price_N >> cost_shift, 1 << 29).to(tl.int32)
        is_node = is_expert | (is_loose & (node == NUM_EXPERTS))
        classes = tl.full((), CLASSES, tl.int32)
        done = tl.full((), 0, tl.int32)
        going = tl.full((), 1, tl.int32)
        _forget(key_ptr, keys)
        while going != 0:
            tl.store(scratch_ptr + BLOCK_N + node, potential_N)
            tl.debug_barrier()
            for first in range(0, rows, TILE):
                m = first + tl.arange(0, TILE)
                is_row = m < rows
                base = near_ptr + m.to(tl.int64) * 11
                row = tl.load(base, mask=is_row, other=0)
                held = tl.load(base + 1, mask=is_row, other=0, cache_modifier=".cg")
                least = tl.full([TILE], _NO_COST, tl.int32)
                most = -least
                a = tl.full([TILE], -1, tl.int32)
                b = tl.full([TILE], -1, tl.int32)
                for place in tl.static_range(4):
                    expert = tl.load(base + 2 + place, mask=is_row, other=-1)
                    value = tl.load(base + 6 + place, mask=is_row, other=0)
                    value -= tl.load(
                        scratch_ptr + BLOCK_N + expert, mask=expert >= 0, other=0,
                        cache_modifier=".cg",
                    )  # fmt: skip
                    has = (held & (1 << place)) != 0
                    gives = (expert >= 0) & has & (value < least)
                    takes = (expert >= 0) & (has == 0) & (value > most)
                    a, least = tl.where(gives, expert, a), tl.where(gives, value, least)
                    b, most = tl.where(takes, expert, b), tl.where(takes, value, most)
                swaps = (a >= 0) & (b >= 0)
                cost = tl.where(swaps, tl.maximum(least - most, 0), 0)
                limit: tl.constexpr = 1 << (28 - bit_length(NUM_EXPERTS))
                c = ((hashed(row) * classes) >> 32).to(tl.int32)
                _offer(key_ptr, c, a, b, cost, row, swaps & (cost < limit), NUM_EXPERTS)
                arc = (c * NUM_EXPERTS + a) * NUM_EXPERTS + b
                tl.store(base + 10, tl.where(swaps, arc, -1), mask=is_row)
            tl.debug_barrier()
            potential_N, excess_N, total = _step(
                key_ptr, near_ptr, slot_ptr, x_ptr, claims_ptr, scratch_ptr, cost_price_N,
                potential_N, excess_N, is_loose, NUM_EXPERTS, CLASSES, BLOCK_N, NODE_BITS, CHUNK,
                True,
            )  # fmt: skip
            tl.debug_barrier()
            # Without a path: in one class, and after that no more.
            ends = (total == 0) & (classes == 1)
            done += tl.where(ends, 0, 1)
            classes = tl.where(total == 0, 1, classes)
            highest = tl.max(tl.where(is_node, potential_N, -_NO_COST), 0)
            lowest = tl.min(tl.where(is_node, potential_N, _NO_COST), 0)
            ends = ends | (tl.max(excess_N, 0) <= 0) | (highest - lowest > reach)
            going = tl.where(ends | (done >= _MAX_ROUNDS), 0, 1)
            # Take away the arcs that rows have offered, which are far fewer than all.
            for first in range(0, rows, TILE):
                m = first + tl.arange(0, TILE)
                arc = tl.load(near_ptr + m.to(tl.int64) * 11 + 10, mask=m < rows, other=-1)
                none = tl.full([TILE], _NO_ARC, tl.int64)
                tl.store(key_ptr + tl.maximum(arc, 0), none, mask=arc >= 0)
        slack_N = tl.load(scratch_ptr + node, cache_modifier=".cg").to(tl.int64)
        load_N = tl.where(is_expert, excess_N.to(tl.int64) - slack_N + capacity_N, 0)
        level = tl.sum(tl.where(node == NUM_EXPERTS, potential_N, 0), 0)
        raised_N = price_N + ((potential_N - level).to(tl.int64) << cost_shift)
        raised_N = tl.where(is_loose, tl.maximum(raised_N, 0), raised_N)
        price_N = tl.where(is_expert, raised_N, 0)
        tl.store(state_ptr + ROUNDS, done.to(tl.int64))
        tl.debug_barrier()
        set_vector(state_ptr, PRICE, price_N, NUM_EXPERTS, BLOCK_N)
        tl.debug_barrier()
        # Over all rows.
        excess_N = tl.where(is_expert, load_N - capacity_N, 0).to(tl.int32)
        shift = tl.load(state_ptr + SHIFT)
        width = tl.load(state_ptr + WIDTH)
        classes = tl.full((), CLASSES, tl.int32)
        done = tl.full((), 0, tl.int32)
        while tl.max(excess_N, 0) > 0:
            _forget(key_ptr, keys)
            tl.debug_barrier()
            price_E = vector(state_ptr, PRICE, NUM_EXPERTS, BLOCK_E)
            for tile in range(0, tl.cdiv(num_rows, ROWS)):
                _offer_all(
                    scores_ptr, spread_ptr, x_ptr, key_ptr, tile, num_rows, shift, price_E, width,
                    classes, NUM_EXPERTS, TOPK, BLOCK_E, ROWS,
                )  # fmt: skip
            tl.debug_barrier()
            moved_N, excess_N, total = _step(
                key_ptr, near_ptr, slot_ptr, x_ptr, claims_ptr, scratch_ptr,
                tl.zeros([BLOCK_N], tl.int32), tl.zeros([BLOCK_N], tl.int32), excess_N,
                is_loose & is_tight, NUM_EXPERTS, CLASSES, BLOCK_N, NODE_BITS, CHUNK, False,
            )  # fmt: skip
            done += 1
            classes = tl.where(total == 0, 1, CLASSES)
            far_shift: tl.constexpr = 9 + bit_length(NUM_EXPERTS)
            price_N += tl.where(is_expert, moved_N.to(tl.int64) << far_shift, 0)
            tl.debug_barrier()
            set_vector(state_ptr, PRICE, price_N, NUM_EXPERTS, BLOCK_N)
            tl.debug_barrier()
        load_N = tl.where(is_expert, excess_N.to(tl.int64) + capacity_N, 0)
        set_vector(state_ptr, LOAD, load_N, NUM_EXPERTS, BLOCK_N)
        tl.store(state_ptr + ALL_ROUNDS, done.to(tl.int64))


@triton.jit
def _offer_all(
    scores_ptr, spread_ptr, x_ptr, key_ptr, tile, num_rows, shift, price_E, width, classes,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Offer all swaps of a tile of rows."""
    row_R = tile * ROWS + tl.arange(0, ROWS)
    is_row_R = row_R < num_rows
    expert = tl.arange(0, BLOCK_E)[None, :]
    scores = load_scores(scores_ptr, row_R, is_row_R, NUM_EXPERTS, BLOCK_E)
    r = reduced_tile(scores, shift, price_E, spread_ptr, width, row_R, NUM_EXPERTS, BLOCK_E)
    inside = is_row_R[:, None] & (expert < NUM_EXPERTS)
    at = row_R.to(tl.int64)[:, None] * NUM_EXPERTS + expert
    has = tl.load(x_ptr + at, mask=inside, other=0, cache_modifier=".cg") != 0
    c_R = ((hashed(row_R) * classes) >> 32).to(tl.int32)
    bits: tl.constexpr = 28 - bit_length(NUM_EXPERTS)
    last = tl.full([ROWS], -1, tl.int32)
    for _ in range(TOPK):
        last = tl.min(tl.where(has & (expert > last[:, None]), expert, BLOCK_E), 1)
        value_R = tl.max(tl.where(expert == last[:, None], r, NEVER), 1)
        cost = tl.minimum(tl.maximum(value_R[:, None] - r, 0) >> (37 - bits), (1 << bits) - 1)
        mask = inside & (has == 0)
        _offer(
            key_ptr, c_R[:, None], last[:, None], expert, cost, row_R[:, None], mask, NUM_EXPERTS
        )
