"""One round of moves: shortest paths as a forest, which of them stand, and what they move.

Matrices of classes by nodes are in registers; what rows and the sink change is in memory. See
:func:`rounds_plain.step`, whose decisions these are.

Shape letters: C classes, N nodes (experts, the sink after them, padded to a power of two), A nodes
that arcs leave in a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow import rounds_plain
from megatron_maxscore.flow.device.kernels import layout
from megatron_maxscore.flow.device.kernels.integers import cost_bits

NEAR_SIZE = layout.NEAR_SIZE
_NO_ARC = tl.constexpr(rounds_plain.NO_ARC)
_HOPS = tl.constexpr(rounds_plain.HOPS)


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
    limit: tl.constexpr = 1 << cost_bits(NUM_EXPERTS)
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
def step(
    key_ptr, near_ptr, slot_ptr, x_ptr, claims_ptr, scratch_ptr, price_N, potential_N, excess_N,
    has_sink,
    NUM_EXPERTS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_N: tl.constexpr,
    NODE_BITS: tl.constexpr, CHUNK: tl.constexpr, IS_NEAR: tl.constexpr,
):  # fmt: skip
    """Move units along shortest paths; see :func:`rounds_plain.step`.

    Returns potentials, excess, and how many units moved.
    """
    FAR: tl.constexpr = (1 << (cost_bits(NUM_EXPERTS) + 3)) - 1
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
            key_ptr, scratch_ptr, 0, rent_N, has_sink, NUM_EXPERTS, CLASSES, BLOCK_N, NODE_BITS,
            CHUNK,
        )  # fmt: skip
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
            base = near_ptr + slot.to(tl.int64) * NEAR_SIZE
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
