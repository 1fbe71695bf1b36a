"""The kernel of the rounds among contested rows, see :mod:`rounds`, in one program.

Shape letters: N nodes (experts, the sink after them, padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow import rounds, rounds_plain
from megatron_maxscore.flow.device.kernels import layout
from megatron_maxscore.flow.device.kernels.control import set_vector, vector
from megatron_maxscore.flow.device.kernels.forest import step
from megatron_maxscore.flow.device.kernels.integers import cost_bits, hashed

REACH, PRICE = layout.REACH, layout.PRICE
COST_SHIFT, NEAR_ROWS, UNITS = layout.COST_SHIFT, layout.NEAR_ROWS, layout.UNITS
LOAD, ROUNDS = layout.LOAD, layout.ROUNDS
NEAR_SIZE = layout.NEAR_SIZE
_NO_ARC = tl.constexpr(rounds_plain.NO_ARC)
_NO_COST = tl.constexpr(1 << 30)
_MAX_ROUNDS = tl.constexpr(rounds.MAX_ROUNDS)
_BEYOND_REACH, _REACHES = (tl.constexpr(part) for part in rounds.BEYOND_REACH)


@triton.jit
def offer(key_ptr, c_R, a_R, b_R, cost_R, low_R, mask, NUM_EXPERTS: tl.constexpr):
    """Offer swaps: the arc from a to b of a class keeps the cheapest, then that of the least low.

    The low bits are the row's index, or tell it in an order of the arc's own.
    """
    at = (c_R.to(tl.int64) * NUM_EXPERTS + a_R) * NUM_EXPERTS + b_R
    key = (cost_R.to(tl.int64) << 32) | low_R.to(tl.int64)
    tl.atomic_min(key_ptr + at, key, mask=mask, sem="relaxed")


@triton.jit
def forget(key_ptr, size: tl.constexpr):
    """Take all arcs away."""
    for first in range(0, size, 2048):
        at = first + tl.arange(0, 2048)
        tl.store(key_ptr + at, tl.full([2048], _NO_ARC, tl.int64), mask=at < size)


@triton.jit
def move(
    capacity_ptr, state_ptr, near_ptr, slot_ptr, x_ptr, claims_ptr, key_ptr, scratch_ptr, num_rows,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr,
    BLOCK_N: tl.constexpr, NODE_BITS: tl.constexpr, CLASSES: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Make the rounds of moves among contested rows."""
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
        reach = (tl.load(state_ptr + REACH) >> cost_shift) * _BEYOND_REACH // _REACHES
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
        forget(key_ptr, keys)
        while going != 0:
            tl.store(scratch_ptr + BLOCK_N + node, potential_N)
            tl.debug_barrier()
            for first in range(0, rows, TILE):
                m = first + tl.arange(0, TILE)
                is_row = m < rows
                base = near_ptr + m.to(tl.int64) * NEAR_SIZE
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
                limit: tl.constexpr = 1 << cost_bits(NUM_EXPERTS)
                c = ((hashed(row) * classes) >> 32).to(tl.int32)
                offer(key_ptr, c, a, b, cost, row, swaps & (cost < limit), NUM_EXPERTS)
                arc = (c * NUM_EXPERTS + a) * NUM_EXPERTS + b
                tl.store(base + 10, tl.where(swaps, arc, -1), mask=is_row)
            tl.debug_barrier()
            potential_N, excess_N, total = step(
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
                arc = tl.load(near_ptr + m.to(tl.int64) * NEAR_SIZE + 10, mask=m < rows, other=-1)
                none = tl.full([TILE], _NO_ARC, tl.int64)
                tl.store(key_ptr + tl.maximum(arc, 0), none, mask=arc >= 0)
        slack_N = tl.load(scratch_ptr + node, cache_modifier=".cg").to(tl.int64)
        load_N = tl.where(is_expert, excess_N.to(tl.int64) - slack_N + capacity_N, 0)
        level = tl.sum(tl.where(node == NUM_EXPERTS, potential_N, 0), 0)
        raised_N = price_N + ((potential_N - level).to(tl.int64) << cost_shift)
        raised_N = tl.where(is_loose, tl.maximum(raised_N, 0), raised_N)
        price_N = tl.where(is_expert, raised_N, 0)
        tl.store(state_ptr + ROUNDS, done.to(tl.int64))
        set_vector(state_ptr, PRICE, price_N, NUM_EXPERTS, BLOCK_N)
        set_vector(state_ptr, LOAD, load_N, NUM_EXPERTS, BLOCK_N)
