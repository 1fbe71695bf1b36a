"""Kernels of the sweeps: a scan, passes over the scores, and those over a sample.

In each pass the program that is done last takes the decisions (:mod:`control`), so that nothing is
launched between passes, and passes that are not needed any more end at once.

Shape letters: E experts, G programs, H buckets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow import buckets, prices, rounds, sweeps
from megatron_maxscore.flow.device.kernels import layout
from megatron_maxscore.flow.device.kernels.control import (
    begin_sweep,
    capacity_of,
    clear,
    control,
    is_little_slack,
    overflow,
    set_vector,
    vector,
)
from megatron_maxscore.flow.device.kernels.integers import (
    cost_bits,
    gap_within,
    hashed,
    power_of_two,
    shift_for,
    to_integer,
)
from megatron_maxscore.flow.device.kernels.rows import (
    choose_rows,
    coarseness,
    count_tile,
    lowest,
)

_GAPS, _VECTORS = layout.GAPS, tl.constexpr(layout.VECTORS)
_NUMBERS = tl.constexpr(layout.NUMBERS)
PHASE, SHIFT, WIDTH, FINISHED = layout.PHASE, layout.SHIFT, layout.WIDTH, layout.FINISHED
PRICE, WINDOW, BAD = layout.PRICE, layout.WINDOW, layout.BAD
SWEEPS, SAMPLE, DONE = layout.SWEEPS, layout.SAMPLE, layout.DONE
UNITS, REACH = layout.UNITS, layout.REACH
STRIDE, COST_SHIFT = layout.STRIDE, layout.COST_SHIFT
MAX_PASSES = layout.MAX_PASSES
_EVERYTHING = tl.constexpr(sweeps.EVERYTHING)
_FIRST_WINDOW = tl.constexpr(prices.FIRST_WINDOW)
_SAMPLE_BUCKETS = tl.constexpr(buckets.ALL_BUCKETS)
_ROWS_PER_UNIT = tl.constexpr(rounds.ROWS_PER_UNIT)
_ROWS_PER_EXPERT = tl.constexpr(rounds.ROWS_PER_EXPERT)
_PLATEAU_ROWS_PER_UNIT = tl.constexpr(rounds.PLATEAU_ROWS_PER_UNIT)
_SPARE_BITS = tl.constexpr(rounds.SPARE_BITS)


@triton.jit
def scan(
    scores_ptr, partial_ptr, state_ptr, counts_ptr, num_rows, num_programs,
    NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, BUCKETS: tl.constexpr,
    NUM_STATE: tl.constexpr,
):  # fmt: skip
    """Find the largest range of a row and bad rows, and set state and counts to 0."""
    program = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)[None, :]
    largest_R = tl.zeros([ROWS], tl.float64)
    bad_R = tl.zeros([ROWS], tl.float64)
    for tile in range(program, tl.cdiv(num_rows, ROWS), num_programs):
        row_R = tile * ROWS + tl.arange(0, ROWS)
        is_row_R = row_R < num_rows
        inside = is_row_R[:, None] & (expert < NUM_EXPERTS)
        at = row_R.to(tl.int64)[:, None] * NUM_EXPERTS + expert
        given = tl.load(scores_ptr + at, mask=inside, other=0.0).to(tl.float32)
        is_bad = (tl.abs(given) < float("inf")) == 0
        bad_R += tl.max(is_bad.to(tl.int32), 1).to(tl.float64)
        scores = tl.where(is_bad, 0.0, given).to(tl.float64)
        low_R = lowest(scores, NUM_EXPERTS, BLOCK_E)
        high_R = tl.max(tl.where(expert < NUM_EXPERTS, scores, -float("inf")), 1)
        largest_R = tl.maximum(largest_R, tl.where(is_row_R, high_R - low_R, 0.0))
    tl.store(partial_ptr + program, tl.max(largest_R, 0))
    tl.store(partial_ptr + num_programs + program, tl.sum(bad_R, 0))
    size: tl.constexpr = NUM_EXPERTS + _GAPS + NUM_EXPERTS * BUCKETS
    for first in range(program * 1024, size, num_programs * 1024):
        at = first + tl.arange(0, 1024)
        tl.store(counts_ptr + at, tl.zeros([1024], tl.int32), mask=at < size)
    if program == 0:
        at = tl.arange(0, NUM_STATE)
        size_of_state: tl.constexpr = _NUMBERS + _VECTORS * NUM_EXPERTS
        tl.store(state_ptr + at, tl.zeros([NUM_STATE], tl.int64), mask=at < size_of_state)


@triton.jit
def _first_prices(
    warm_ptr, partial_ptr, num_programs,
    NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Return the shift, the integer prices to start from, and whether they are all equal."""
    program = tl.arange(0, BLOCK_G)
    largest_G = tl.load(partial_ptr + program, mask=program < num_programs, other=0.0)
    largest = tl.max(largest_G, 0)
    shift = shift_for(largest)
    expert = tl.arange(0, BLOCK_E)
    is_expert = expert < NUM_EXPERTS
    warm_E = tl.load(warm_ptr + expert, mask=is_expert, other=0.0)
    warm_E = tl.where(tl.abs(warm_E) < float("inf"), warm_E, 0.0).to(tl.float64)
    above_E = warm_E - tl.min(tl.where(is_expert, warm_E, float("inf")), 0)
    scale = power_of_two(shift)
    limit = (NUM_EXPERTS - 1) * to_integer(largest * scale).to(tl.float64)
    price_E = to_integer(tl.minimum(above_E * scale, limit))
    price_E = tl.where(is_expert, price_E, 0)
    return shift, price_E, tl.max(price_E, 0) == 0


@triton.jit
def price_pass(
    scores_ptr, warm_ptr, capacity_ptr, spread_ptr, partial_ptr, state_ptr, counts_ptr, num_rows,
    aim, near, too_much, lost, max_passes, num_programs,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    TIE_BITS: tl.constexpr, BUCKETS: tl.constexpr, BLOCK_H: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr, IS_FIRST: tl.constexpr, CAN_SAMPLE: tl.constexpr,
):  # fmt: skip
    """Make one pass: choose, count, and, in the program that is done last, decide."""
    program = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    if IS_FIRST:
        shift, price_E, is_cold = _first_prices(
            warm_ptr, partial_ptr, num_programs, NUM_EXPERTS, BLOCK_E, BLOCK_G
        )
        window_E = tl.full([BLOCK_E], _FIRST_WINDOW if CAN_SAMPLE else _EVERYTHING, tl.int64)
        width = shift * 0
        works = (is_cold == 0) if CAN_SAMPLE else (is_cold == is_cold)
    else:
        shift = tl.load(state_ptr + SHIFT)
        price_E = vector(state_ptr, PRICE, NUM_EXPERTS, BLOCK_E)
        window_E = vector(state_ptr, WINDOW, NUM_EXPERTS, BLOCK_E)
        width = tl.load(state_ptr + WIDTH)
        works = tl.load(state_ptr + PHASE) == SWEEPS
        is_cold = works == 0
    load_E = tl.zeros([BLOCK_E], tl.int32)
    coarse = coarseness(price_E)
    if works:
        for tile in range(program, tl.cdiv(num_rows, ROWS), num_programs):
            row_R = tile * ROWS + tl.arange(0, ROWS)
            is_row_R = row_R < num_rows
            r, chosen, kth_R, next_R = choose_rows(
                scores_ptr, row_R, row_R, is_row_R, shift, price_E, spread_ptr, width, coarse,
                NUM_EXPERTS, TOPK, BLOCK_E, TIE_BITS,
            )  # fmt: skip
            load_E = count_tile(
                r, chosen, kth_R, next_R, is_row_R, window_E, counts_ptr, load_E, NUM_EXPERTS,
                BLOCK_E, BUCKETS,
            )  # fmt: skip
        tl.atomic_add(counts_ptr + expert, load_E, mask=expert < NUM_EXPERTS, sem="relaxed")
    if IS_FIRST | works:
        # Everything above is done before the counter says so.
        tl.debug_barrier()
        before = tl.atomic_add(state_ptr + FINISHED, 1, sem="acq_rel")
        if before == num_programs - 1:
            tl.store(state_ptr + FINISHED, 0)
            units = num_rows * TOPK
            needs_sample = is_cold & (IS_FIRST & CAN_SAMPLE)
            if IS_FIRST:
                at = tl.arange(0, BLOCK_G)
                bad_G = tl.load(partial_ptr + num_programs + at, mask=at < num_programs, other=0.0)
                tl.store(state_ptr + BAD, tl.sum(bad_G, 0).to(tl.int64))
                tl.store(state_ptr + SHIFT, shift)
                tl.store(state_ptr + MAX_PASSES, max_passes)
                begin_sweep(
                    state_ptr, price_E, _FIRST_WINDOW if CAN_SAMPLE else _EVERYTHING, NUM_EXPERTS,
                    BLOCK_E,
                )  # fmt: skip
                if CAN_SAMPLE:
                    loads = tl.load(
                        counts_ptr + expert, mask=expert < NUM_EXPERTS, other=0,
                        cache_modifier=".cg",
                    )  # fmt: skip
                    capacity_E = capacity_of(capacity_ptr, expert, expert < NUM_EXPERTS, 1.0)
                    over = overflow(loads, price_E, capacity_E, is_little_slack(capacity_E, units))
                    needs_sample = needs_sample | (over > lost.to(tl.float64))
                tl.debug_barrier()
            if needs_sample:
                tl.store(state_ptr + PHASE, SAMPLE)
            else:
                ends = control(
                    state_ptr, counts_ptr, capacity_ptr, 1.0, num_rows, units, aim, near, too_much,
                    tl.load(state_ptr + MAX_PASSES), NUM_EXPERTS, BLOCK_E, BUCKETS, BLOCK_H, CHUNK,
                    True,
                )  # fmt: skip
                if ends:
                    tl.store(state_ptr + PHASE, DONE)
                    _prepare_finish(
                        state_ptr, counts_ptr, capacity_ptr, num_rows, units, NUM_EXPERTS, BLOCK_E
                    )
            tl.debug_barrier()
            clear(counts_ptr, NUM_EXPERTS, BUCKETS)


@triton.jit
def _prepare_finish(
    state_ptr, counts_ptr, capacity_ptr, num_rows, units,
    NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Bring prices to their level, and set how far contested rows reach; see :mod:`rounds`."""
    expert = tl.arange(0, BLOCK_E)
    is_expert = expert < NUM_EXPERTS
    capacity_E = tl.load(capacity_ptr + expert, mask=is_expert, other=0)
    price_E = vector(state_ptr, PRICE, NUM_EXPERTS, BLOCK_E)
    is_tight = tl.sum(capacity_E, 0) == units
    level = tl.min(tl.where(is_expert, price_E, _EVERYTHING), 0)
    price_E = tl.where(is_tight, price_E, price_E - level)
    set_vector(state_ptr, PRICE, price_E, NUM_EXPERTS, BLOCK_E)
    load_E = tl.load(counts_ptr + expert, mask=is_expert, other=0, cache_modifier=".cg")
    load_E = load_E.to(tl.int64)
    is_free_E = (is_tight == 0) & (price_E == 0)
    slack_E = tl.where(is_free_E, tl.maximum(capacity_E - load_E, 0), 0)
    excess_E = load_E + slack_E - capacity_E
    sink = tl.where(is_tight, 0, -tl.sum(excess_E, 0))
    over = tl.sum(tl.maximum(excess_E, 0), 0) + tl.maximum(sink, 0)
    rank = tl.minimum(num_rows // 2, over * _ROWS_PER_UNIT + _ROWS_PER_EXPERT * NUM_EXPERTS)
    reach = gap_within(counts_ptr + NUM_EXPERTS, rank, 256)
    ties = tl.load(counts_ptr + NUM_EXPERTS, cache_modifier=".cg").to(tl.int64)
    enough = over * _PLATEAU_ROWS_PER_UNIT + _ROWS_PER_EXPERT * NUM_EXPERTS
    stride = tl.maximum(ties // enough, 1)
    stride = tl.where(reach == 0, stride, 1)
    bits: tl.constexpr = cost_bits(NUM_EXPERTS) - _SPARE_BITS
    cost_shift = tl.full((), 0, tl.int64)
    while (reach >> cost_shift) >> bits != 0:
        cost_shift += 1
    tl.store(state_ptr + REACH, tl.where(over > 0, reach, -1))
    tl.store(state_ptr + STRIDE, stride)
    tl.store(state_ptr + COST_SHIFT, cost_shift)
    tl.store(state_ptr + UNITS, over)


@triton.jit
def sample_sweeps(
    scores_ptr, capacity_ptr, state_ptr, counts_ptr, num_rows, size, aim,
    near, too_much, max_passes, passes_after,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    TIE_BITS: tl.constexpr, BLOCK_H: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Make all sweeps over a sample in one program, if they are needed."""
    if tl.load(state_ptr + PHASE) == SAMPLE:
        expert = tl.arange(0, BLOCK_E)
        shift = tl.load(state_ptr + SHIFT)
        # The share of the rows, as float64.
        scale = size.to(tl.float64) / num_rows.to(tl.float64)
        begin_sweep(
            state_ptr, vector(state_ptr, PRICE, NUM_EXPERTS, BLOCK_E), _EVERYTHING, NUM_EXPERTS,
            BLOCK_E,
        )  # fmt: skip
        clear(counts_ptr, NUM_EXPERTS, _SAMPLE_BUCKETS)
        tl.debug_barrier()
        going = tl.full((), 1, tl.int32)
        while going != 0:
            price_E = vector(state_ptr, PRICE, NUM_EXPERTS, BLOCK_E)
            window_E = vector(state_ptr, WINDOW, NUM_EXPERTS, BLOCK_E)
            load_E = tl.zeros([BLOCK_E], tl.int32)
            coarse = coarseness(price_E)
            for tile in range(0, tl.cdiv(size, ROWS)):
                index_R = tile * ROWS + tl.arange(0, ROWS)
                is_row_R = index_R < size
                part_R = index_R.to(tl.int64)
                place_R = (hashed(part_R) * num_rows) >> 32
                row_R = (part_R * num_rows + place_R) // size
                r, chosen, kth_R, next_R = choose_rows(
                    scores_ptr, row_R, index_R, is_row_R, shift, price_E, None, 0, coarse,
                    NUM_EXPERTS, TOPK, BLOCK_E, TIE_BITS,
                )  # fmt: skip
                load_E = count_tile(
                    r, chosen, kth_R, next_R, is_row_R, window_E, counts_ptr, load_E, NUM_EXPERTS,
                    BLOCK_E, _SAMPLE_BUCKETS,
                )  # fmt: skip
            tl.atomic_add(counts_ptr + expert, load_E, mask=expert < NUM_EXPERTS, sem="relaxed")
            tl.debug_barrier()
            ends = control(
                state_ptr, counts_ptr, capacity_ptr, scale, size, size * TOPK, aim, near, too_much,
                max_passes, NUM_EXPERTS, BLOCK_E, _SAMPLE_BUCKETS, BLOCK_H, CHUNK,
                False,
            )  # fmt: skip
            going = tl.where(ends, 0, 1)
            tl.debug_barrier()
            clear(counts_ptr, NUM_EXPERTS, _SAMPLE_BUCKETS)
            tl.debug_barrier()
        price_E = vector(state_ptr, PRICE, NUM_EXPERTS, BLOCK_E)
        tl.debug_barrier()
        begin_sweep(state_ptr, price_E, _FIRST_WINDOW, NUM_EXPERTS, BLOCK_E)
        tl.store(state_ptr + MAX_PASSES, passes_after)
        tl.store(state_ptr + PHASE, SWEEPS)
