"""The last kernel: experts in order, and the certificate on unrounded scores.

Shape letters: R rows of a tile, E experts, G programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow.device.kernels import layout
from megatron_maxscore.flow.device.kernels.control import vector
from megatron_maxscore.flow.device.kernels.integers import NEVER, power_of_two
from megatron_maxscore.flow.device.kernels.rows import load_scores, lowest

SHIFT, FINISHED, PRICE, LOAD = layout.SHIFT, layout.FINISHED, layout.PRICE, layout.LOAD
OBJECTIVE, BOUND, GAP = layout.OBJECTIVE, layout.BOUND, layout.GAP
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def conclude(
    scores_ptr, capacity_ptr, state_ptr, x_ptr, partial_ptr, experts_ptr, prices_ptr, loads_ptr,
    value_ptr, converged_ptr, num_rows, num_programs, tolerance_bits,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Order each row's experts; sum up objective, gap and ranges."""
    program = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)[None, :]
    is_expert = expert < NUM_EXPERTS
    unscale = power_of_two(-tl.load(state_ptr + SHIFT))
    exact_E = vector(state_ptr, PRICE, NUM_EXPERTS, BLOCK_E).to(tl.float64) * unscale
    total = tl.zeros([ROWS], tl.float64)
    slack = tl.zeros([ROWS], tl.float64)
    ranges = tl.zeros([ROWS], tl.float64)
    for tile in range(program, tl.cdiv(num_rows, ROWS), num_programs):
        row_R = tile * ROWS + tl.arange(0, ROWS)
        is_row_R = row_R < num_rows
        inside = is_row_R[:, None] & is_expert
        scores = load_scores(scores_ptr, row_R, is_row_R, NUM_EXPERTS, BLOCK_E)
        at = row_R.to(tl.int64)[:, None] * NUM_EXPERTS + expert
        has = tl.load(x_ptr + at, mask=inside, other=0) != 0
        # Best score first, then by index: float32 bits in the order of their values, and the index.
        bits = (scores + 0.0).to(tl.float32).to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        left = tl.where(has, bits * BLOCK_E + (BLOCK_E - 1 - expert), NEVER)
        low_R = lowest(scores, NUM_EXPERTS, BLOCK_E)
        reduced = tl.where(is_expert, (scores - low_R[:, None]) - exact_E[None, :], -float("inf"))
        chosen_R = tl.zeros([ROWS], tl.float64)
        sum_R = tl.zeros([ROWS], tl.float64)
        for place in range(TOPK):
            best_R = tl.max(left, 1)
            is_it = has & (left == best_R[:, None])
            left = tl.where(is_it, NEVER, left)
            index_R = tl.max(tl.where(is_it, expert, 0), 1)
            out = experts_ptr + row_R.to(tl.int64) * TOPK + place
            tl.store(out, index_R.to(tl.int64), mask=is_row_R)
            sum_R += tl.sum(tl.where(is_it, scores, 0.0), 1)
            chosen_R += tl.sum(tl.where(is_it, reduced, 0.0), 1)
        least_R = tl.min(tl.where(has, reduced, float("inf")), 1)
        other_R = tl.max(tl.where(has, -float("inf"), reduced), 1)
        is_short_R = is_row_R & (other_R > least_R)
        if tl.max(is_short_R.to(tl.int32), 0) > 0:
            best_sum_R = tl.zeros([ROWS], tl.float64)
            rest = reduced
            for _ in range(TOPK):
                best_R = tl.max(rest, 1)
                first_R = tl.min(tl.where(rest == best_R[:, None], expert, BLOCK_E), 1)
                rest = tl.where(expert == first_R[:, None], -float("inf"), rest)
                best_sum_R += best_R
            slack += tl.where(is_short_R, tl.maximum(best_sum_R - chosen_R, 0.0), 0.0)
        high_R = tl.max(tl.where(is_expert, scores, -float("inf")), 1)
        total += tl.where(is_row_R, sum_R, 0.0)
        ranges += tl.where(is_row_R, high_R - low_R, 0.0)
    tl.store(partial_ptr + program, tl.sum(total, 0))
    tl.store(partial_ptr + num_programs + program, tl.sum(slack, 0))
    tl.store(partial_ptr + 2 * num_programs + program, tl.sum(ranges, 0))
    tl.debug_barrier()
    before = tl.atomic_add(state_ptr + FINISHED, 1, sem="acq_rel")
    if before == num_programs - 1:
        at = tl.arange(0, BLOCK_G)
        is_there = at < num_programs
        sums = partial_ptr + at
        objective = tl.sum(tl.load(sums, mask=is_there, other=0.0, cache_modifier=".cg"), 0)
        sums += num_programs
        difference = tl.sum(tl.load(sums, mask=is_there, other=0.0, cache_modifier=".cg"), 0)
        sums += num_programs
        all_ranges = tl.sum(tl.load(sums, mask=is_there, other=0.0, cache_modifier=".cg"), 0)
        one = tl.arange(0, BLOCK_E)
        capacity_E = tl.load(capacity_ptr + one, mask=one < NUM_EXPERTS, other=0)
        load_E = vector(state_ptr, LOAD, NUM_EXPERTS, BLOCK_E)
        idle_E = (capacity_E - load_E).to(tl.float64)
        difference = tl.maximum(difference + tl.sum(exact_E * idle_E, 0), 0.0)
        gap = tl.where(
            all_ranges > 0.0, difference / tl.where(all_ranges > 0.0, all_ranges, 1.0), 0.0
        )
        gap = tl.where((all_ranges == 0.0) & (difference > 0.0), float("inf"), gap)
        tl.store(value_ptr + OBJECTIVE, objective)
        tl.store(value_ptr + BOUND, objective + difference)
        tl.store(value_ptr + GAP, gap)
        tolerance = tolerance_bits.to(tl.int64).to(tl.float64, bitcast=True)
        tl.store(converged_ptr, (gap <= tolerance).to(tl.int8))
        is_one = one < NUM_EXPERTS
        is_tight = tl.sum(capacity_E, 0) == num_rows * TOPK
        mean = tl.sum(tl.where(is_one, exact_E, 0.0), 0) / (NUM_EXPERTS * 1.0)
        lowest_price = tl.min(tl.where(is_one, exact_E, float("inf")), 0)
        normal_E = exact_E - tl.where(is_tight, mean, lowest_price)
        normal_E = tl.minimum(tl.maximum(normal_E, -_LARGEST), _LARGEST)
        tl.store(prices_ptr + one, normal_E.to(tl.float32), mask=is_one)
        tl.store(loads_ptr + one, load_E, mask=is_one)
