"""The kernel that finds contested rows, see :mod:`rounds`, and writes the assignment.

Shape letters: R rows of a tile, E experts (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow.device.kernels import layout
from megatron_maxscore.flow.device.kernels.control import vector
from megatron_maxscore.flow.device.kernels.integers import hashed
from megatron_maxscore.flow.device.kernels.rows import choose_rows, coarseness

SHIFT, WIDTH, REACH, STRIDE = layout.SHIFT, layout.WIDTH, layout.REACH, layout.STRIDE
COST_SHIFT, NEAR_ROWS, PRICE = layout.COST_SHIFT, layout.NEAR_ROWS, layout.PRICE
NEAR_SIZE = layout.NEAR_SIZE
_HIGH = tl.constexpr(1 << 62)


@triton.jit
def _first(values, at_E, LOWEST: tl.constexpr):
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

    A contested row has :data:`layout.NEAR_SIZE` int32.
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
        r, chosen, kth_R, next_R = choose_rows(
            scores_ptr, row_R, row_R, is_row_R, shift, price_E, spread_ptr, width, coarse,
            NUM_EXPERTS, TOPK, BLOCK_E, TIE_BITS,
        )  # fmt: skip
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
            least_R, held0_R, held = _first(held, order, True)
            second_R, held1_R, held = _first(held, order, True)
            most_R, other0_R, other = _first(other, order, False)
            third_R, other1_R, other = _first(other, order, False)
            base = near_ptr + slot_R.to(tl.int64) * NEAR_SIZE
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
