"""The kernel of the rounds over all rows, see :mod:`rounds`, for units that contested rows left.

The program that comes first leads: it opens a round, finds the paths in what all have offered, and
moves. All programs offer the swaps of tiles that they take from one counter, whose upper half is
the number of the round. So the leader never waits for a program that has not started: what nobody
else takes it takes itself, and in Triton's interpreter, where programs run one after the other,
that is all.

Shape letters: N nodes (experts, padded to a power of two), R rows of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow import rounds_plain
from megatron_maxscore.flow.device.kernels import layout
from megatron_maxscore.flow.device.kernels.control import set_vector, vector
from megatron_maxscore.flow.device.kernels.forest import step
from megatron_maxscore.flow.device.kernels.integers import NEVER, SCORE_BITS, cost_bits, hashed
from megatron_maxscore.flow.device.kernels.moves import forget, offer
from megatron_maxscore.flow.device.kernels.rows import load_scores, reduced_tile

SHIFT, WIDTH, PRICE, LOAD = layout.SHIFT, layout.WIDTH, layout.PRICE, layout.LOAD
ALL_ROUNDS, NEXT_TILE = layout.ALL_ROUNDS, layout.NEXT_TILE
TILES_DONE, CLASSES_NOW, LEADER = layout.TILES_DONE, layout.CLASSES_NOW, layout.LEADER
_NO_ARC = tl.constexpr(rounds_plain.NO_ARC)
# Tiles that a program takes at a time.
_TAKEN = tl.constexpr(8)
# The number of the round when there are no more.
_OVER = tl.constexpr((1 << 31) - 1)
_LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _offer_tile(
    scores_ptr, spread_ptr, x_ptr, key_ptr, tile, num_rows, shift, price_E, width, classes,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Offer all swaps of a tile of rows; see :func:`rounds_plain.cheapest`."""
    row_R = tile * ROWS + tl.arange(0, ROWS)
    is_row_R = row_R < num_rows
    expert = tl.arange(0, BLOCK_E)[None, :]
    scores = load_scores(scores_ptr, row_R, is_row_R, NUM_EXPERTS, BLOCK_E)
    r = reduced_tile(scores, shift, price_E, spread_ptr, width, row_R, NUM_EXPERTS, BLOCK_E)
    inside = is_row_R[:, None] & (expert < NUM_EXPERTS)
    at = row_R.to(tl.int64)[:, None] * NUM_EXPERTS + expert
    has = tl.load(x_ptr + at, mask=inside, other=0, cache_modifier=".cg") != 0
    c_R = ((hashed(row_R) * classes) >> 32).to(tl.int32)
    bits: tl.constexpr = cost_bits(NUM_EXPERTS)
    last = tl.full([ROWS], -1, tl.int32)
    for _ in range(TOPK):
        last = tl.min(tl.where(has & (expert > last[:, None]), expert, BLOCK_E), 1)
        value_R = tl.max(tl.where(expert == last[:, None], r, NEVER), 1)
        cost = tl.minimum(
            tl.maximum(value_R[:, None] - r, 0) >> (SCORE_BITS + 1 - bits), (1 << bits) - 1
        )
        mask = inside & (has == 0)
        low = row_R[:, None].to(tl.int64) ^ hashed(last[:, None] * NUM_EXPERTS + expert)
        offer(key_ptr, c_R[:, None], last[:, None], expert, cost, low, mask, NUM_EXPERTS)


@triton.jit
def _take_part(
    scores_ptr, spread_ptr, state_ptr, x_ptr, key_ptr, num_rows, shift, width, tiles,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Take tiles of the round that is open, until none is left."""
    taken = tl.atomic_add(state_ptr + NEXT_TILE, _TAKEN, sem="acq_rel")
    # Prices stay as they are until what was taken is done.
    while ((taken & _LOW) < tiles) & ((taken >> 32) != _OVER):
        first = (taken & _LOW).to(tl.int32)
        last = tl.minimum(first + _TAKEN, tiles)
        price_E = vector(state_ptr, PRICE, NUM_EXPERTS, BLOCK_E)
        classes = tl.load(state_ptr + CLASSES_NOW, cache_modifier=".cg").to(tl.int32)
        for tile in range(first, last):
            _offer_tile(
                scores_ptr, spread_ptr, x_ptr, key_ptr, tile, num_rows, shift, price_E, width,
                classes, NUM_EXPERTS, TOPK, BLOCK_E, ROWS,
            )  # fmt: skip
        tl.debug_barrier()
        tl.atomic_add(state_ptr + TILES_DONE, (last - first).to(tl.int64), sem="acq_rel")
        taken = tl.atomic_add(state_ptr + NEXT_TILE, _TAKEN, sem="acq_rel")


@triton.jit
def _with_rows(key_ptr, CLASSES: tl.constexpr, NUM_EXPERTS: tl.constexpr):
    """Put the rows' indices into the keys of :func:`_offer_tile`."""
    arcs: tl.constexpr = NUM_EXPERTS * NUM_EXPERTS
    for first in range(0, CLASSES * arcs, 2048):
        at = first + tl.arange(0, 2048)
        inside = at < CLASSES * arcs
        key = tl.load(key_ptr + at, mask=inside, other=_NO_ARC, cache_modifier=".cg")
        tl.store(key_ptr + at, key ^ hashed(at % arcs), mask=inside & (key != _NO_ARC))


@triton.jit
def move_all(
    scores_ptr, capacity_ptr, spread_ptr, state_ptr, near_ptr, slot_ptr, x_ptr, claims_ptr,
    key_ptr, scratch_ptr, num_rows,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, NODE_BITS: tl.constexpr, CLASSES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Make rounds over all rows until no expert is overfull; mostly there is nothing to do."""
    node = tl.arange(0, BLOCK_N)
    is_expert = node < NUM_EXPERTS
    capacity_N = tl.load(capacity_ptr + node, mask=is_expert, other=0)
    load_N = vector(state_ptr, LOAD, NUM_EXPERTS, BLOCK_N)
    excess_N = tl.where(is_expert, load_N - capacity_N, 0).to(tl.int32)
    # Whoever starts late may find the loads that the leader has left, and nothing to do.
    if tl.max(excess_N, 0) > 0:
        shift = tl.load(state_ptr + SHIFT)
        width = tl.load(state_ptr + WIDTH)
        tiles = tl.cdiv(num_rows, ROWS)
        if tl.atomic_add(state_ptr + LEADER, 1, sem="acq_rel") > 0:
            seen = tl.full((), 0, tl.int64)
            while seen != _OVER:
                now = tl.atomic_add(state_ptr + NEXT_TILE, 0, sem="acquire") >> 32
                if (now != seen) & (now != _OVER):
                    _take_part(
                        scores_ptr, spread_ptr, state_ptr, x_ptr, key_ptr, num_rows, shift, width,
                        tiles, NUM_EXPERTS, TOPK, BLOCK_E, ROWS,
                    )  # fmt: skip
                seen = now
        else:
            keys: tl.constexpr = CLASSES * NUM_EXPERTS * NUM_EXPERTS
            far_shift: tl.constexpr = SCORE_BITS + 1 - cost_bits(NUM_EXPERTS)
            price_N = vector(state_ptr, PRICE, NUM_EXPERTS, BLOCK_N)
            zero_N = tl.zeros([BLOCK_N], tl.int32)
            has_no_sink = tl.full((), 0, tl.int1)
            classes = tl.full((), CLASSES, tl.int64)
            done = tl.full((), 0, tl.int64)
            going = tl.full((), 1, tl.int1)
            while going:
                forget(key_ptr, keys)
                tl.store(state_ptr + CLASSES_NOW, classes)
                tl.store(state_ptr + TILES_DONE, 0)
                tl.debug_barrier()
                done += 1
                tl.atomic_xchg(state_ptr + NEXT_TILE, done << 32, sem="acq_rel")
                _take_part(
                    scores_ptr, spread_ptr, state_ptr, x_ptr, key_ptr, num_rows, shift, width,
                    tiles, NUM_EXPERTS, TOPK, BLOCK_E, ROWS,
                )  # fmt: skip
                while tl.atomic_add(state_ptr + TILES_DONE, 0, sem="acquire") < tiles:
                    pass
                tl.debug_barrier()
                _with_rows(key_ptr, CLASSES, NUM_EXPERTS)
                tl.debug_barrier()
                moved_N, excess_N, total = step(
                    key_ptr, near_ptr, slot_ptr, x_ptr, claims_ptr, scratch_ptr, zero_N, zero_N,
                    excess_N, has_no_sink, NUM_EXPERTS, CLASSES, BLOCK_N, NODE_BITS, CHUNK, False,
                )  # fmt: skip
                # Without a path in one class capacities hold too little, whoever let that pass.
                going = (tl.max(excess_N, 0) > 0) & ((total > 0) | (classes > 1))
                classes = tl.where(total == 0, 1, CLASSES).to(tl.int64)
                price_N += tl.where(is_expert, moved_N.to(tl.int64) << far_shift, 0)
                tl.debug_barrier()
                set_vector(state_ptr, PRICE, price_N, NUM_EXPERTS, BLOCK_N)
                tl.debug_barrier()
            last: tl.constexpr = _OVER << 32
            tl.atomic_xchg(state_ptr + NEXT_TILE, tl.full((), last, tl.int64), sem="acq_rel")
            load_N = tl.where(is_expert, excess_N.to(tl.int64) + capacity_N, 0)
            set_vector(state_ptr, LOAD, load_N, NUM_EXPERTS, BLOCK_N)
            tl.store(state_ptr + ALL_ROUNDS, done)
