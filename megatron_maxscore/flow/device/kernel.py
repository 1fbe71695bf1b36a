"""The whole solve in one kernel: phases with a barrier among a problem's programs between them.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow.device import layout as at
from megatron_maxscore.flow.device import rounds, rows, sweeps
from megatron_maxscore.flow.device.rows import get, vec


@triton.jit
def _wait_for_all(ptr, target):
    """Return when so many programs have come here, and what they wrote can be read.

    All threads of the program must have passed a barrier before.
    """
    tl.atomic_add(ptr, 1, sem="acq_rel")
    while tl.load(ptr, volatile=True) < target:
        pass
    tl.atomic_add(ptr, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit(
    do_not_specialize=[
        "B", "T", "tiles", "words", "seed", "first", "last", "members", "end", "mark",
        "warm_stride", "capacity_stride",
    ],
    # All others are aligned, see :class:`~megatron_maxscore.flow.engine.Solve`.
    do_not_specialize_on_alignment=["warm_ptr", "capacity_ptr", "quota_ptr"],
)  # fmt: skip
def solve_kernel(
    scores_ptr, warm_ptr, capacity_ptr, quota_ptr, experts_ptr, order_ptr, results_ptr, rows_ptr,
    bits_ptr, partial_ptr, work_ptr, keys_ptr, B, T, tiles, words, seed, first,
    last, members, end, mark, warm_stride, capacity_stride, E: tl.constexpr, K: tl.constexpr,
    BLOCK_E: tl.constexpr, ROWS: tl.constexpr, S: tl.constexpr, RESULTS: tl.constexpr,
):  # fmt: skip
    """Make phases ``first`` to ``last`` of every problem, each by ``members`` programs.

    The grid has ``members`` programs for each problem, or for each of several problems in turn.
    Programs of a problem divide its tiles of ROWS rows. Where a launch makes more than one phase
    and ``members`` is above 1, all programs must run at once, since they wait for each other.

    Args:
        scores_ptr: (B, T, E) float32, bfloat16 or float16.
        warm_ptr: (E,) or (B, E) float32 prices to start from.
        capacity_ptr: (E,) or (B, E) int64 of all ranks' rows.
        quota_ptr: the same of this rank's rows; the capacities where no other rank takes part.
        experts_ptr: (B, T, K) int64, written.
        order_ptr: (B, 2, T * K) int64, written: row, and row * E + expert, of each assignment by
            expert and then by row.
        results_ptr: (B, RESULTS) float64, written: objective, bound, relative gap, their
            difference and the rows' ranges; as int64 bad rows, rows scaled down, whether the gap
            is rounding alone, and E loads; as float32 E prices.
        rows_ptr: (B, 3, T) float32, see :mod:`rows`.
        bits_ptr: (B, T, BLOCK_E / 32) int32, each row's experts as bits.
        partial_ptr: (B, 3, FINE * tiles) float64 sums of parts of tiles.
        work_ptr: (B, words) int32, see :mod:`layout`; of the header all is 0 at first.
        keys_ptr: (B, 3, 2, BLOCK_E, S) int64 keys of offers by expert and slot, of three phases in
            turn, of givers and of takers.
        B: problems.
        T: rows of a problem.
        tiles: of a problem's rows.
        words: of a problem in ``work_ptr``.
        seed: of the perturbation; ranks that solve one problem have different ones.
        first: number of the first phase, 0 for the scan.
        last: number of the phase after the last; a solve that is complete stops by itself.
        members: programs of a problem.
        end: GO_ON, HOLD or END of :mod:`sweeps`: what follows a sweep.
        mark: an integer that is written into the header, for ranks to compare.
        warm_stride: between the problems' prices, 0 where they share them.
        capacity_stride: the same of capacities and quotas.
        E: experts.
        K: experts per token.
        BLOCK_E: E rounded up to a power of two, at least 16.
        ROWS: rows of a tile.
        S: slots of an expert.
        RESULTS: words of a problem's results.

    Example: with 4 rows, 2 experts, k = 1 and capacities of 2, rows that prefer expert 0 by 1, 2, 3
    and 4: the scan finds ranges 1 to 4, the first sweep a load of 4 and 0. Sweeps raise the price
    of expert 0 until rows 0 and 1 take expert 1. Rounds then have nothing to move.
    """
    e = tl.arange(0, BLOCK_E)
    COUNTS: tl.constexpr = at.COUNTS * BLOCK_E
    KEYS: tl.constexpr = 2 * BLOCK_E * S
    STATE: tl.constexpr = at.SCALARS + at.VECTORS * BLOCK_E
    WORDS: tl.constexpr = (BLOCK_E + 31) // 32
    FINE: tl.constexpr = 4 if ROWS >= 4 else 2
    member = tl.program_id(0) % members
    lane, lanes = tl.program_id(0) // members, tl.num_programs(0) // members
    # Tiles of every program, one after the other.
    per = tl.maximum((tiles + members - 1) // members, 1)
    start, stop = tl.minimum(member * per, tiles), tl.minimum((member + 1) * per, tiles)
    for problem in range(lane, B, lanes):
        # In int64: problems times rows may exceed int32.
        wide = tl.full((), 0, tl.int64) + problem
        header = work_ptr + wide * words
        counters, states = header + at.HEADER, header + at.HEADER + 3 * COUNTS
        state = states + member * STATE
        scores, warm = scores_ptr + wide * T * E, warm_ptr + problem * warm_stride
        capacities = capacity_ptr + problem * capacity_stride
        quotas, experts = quota_ptr + problem * capacity_stride, experts_ptr + wide * T * K
        row_data, bits = rows_ptr + wide * 3 * T, bits_ptr + wide * T * WORDS
        partial, results = partial_ptr + wide * 3 * FINE * tiles, results_ptr + wide * RESULTS
        keys_3 = keys_ptr + wide * 3 * KEYS
        n = first
        going = n < last
        while going:
            counts, before = counters + (n % 3) * COUNTS, counters + ((n + 2) % 3) * COUNTS
            keys, keys_before = keys_3 + (n % 3) * KEYS, keys_3 + ((n + 2) % 3) * KEYS
            # Every program works out what to do from what the phase before has left.
            kind = tl.full((), at.SCAN, tl.int32)
            if n > 0:
                kind = get(state + at.KIND)
                if kind == at.SCAN:
                    sweeps.after_scan(header, state, warm, E, BLOCK_E)
                    kind = tl.full((), at.SWEEP, tl.int32)
                elif kind == at.SWEEP:
                    kind = sweeps.after_sweep(
                        header, state, before, capacities, quotas, T, end, E, K, BLOCK_E
                    )
                elif kind == at.ROUND:
                    rounds.after_round(
                        state, before, keys_before, bits, T, member, members, per * ROWS, K,
                        BLOCK_E, S,
                    )  # fmt: skip
                else:
                    kind = kind + 1
                tl.debug_barrier()
                if kind == at.ROUND:
                    kind = rounds.plan(state, quotas, T, E, K, BLOCK_E, S)
                    tl.debug_barrier()
                if kind == at.CONCLUDE:
                    rounds.final_prices(header, state, capacities, E, K, BLOCK_E)
            tl.store(state + at.KIND, kind)
            # What the next phase fills.
            clear, clear_keys = counters + ((n + 1) % 3) * COUNTS, keys_3 + ((n + 1) % 3) * KEYS
            for part in range(member * BLOCK_E, COUNTS, members * BLOCK_E):
                tl.store(clear + part + e, tl.zeros([BLOCK_E], tl.int32))
            for part in range(member * BLOCK_E, KEYS, members * BLOCK_E):
                tl.store(clear_keys + part + e, tl.zeros([BLOCK_E], tl.int64))
            tl.debug_barrier()
            if kind == at.SCAN:
                if member == 0:
                    tl.store(header + at.ROWS_IN, T)
                    tl.store(header + at.MARK, mark)
                rows.scan(scores, row_data, header, T, start, stop, E, BLOCK_E, ROWS)
            elif kind == at.SWEEP:
                rows.sweep(
                    scores, row_data, bits, header, state, counts, T, seed, start, stop, E, K,
                    BLOCK_E, ROWS,
                )  # fmt: skip
            elif kind == at.ROUND:
                rows.offer(
                    scores, row_data, bits, header, state, counts, keys, T, seed, start, stop, E,
                    BLOCK_E, ROWS, S,
                )  # fmt: skip
            elif kind == at.CONCLUDE:
                rows.conclude(
                    scores, row_data, bits, header, state, experts, partial, T, start, stop, tiles,
                    E, K, BLOCK_E, ROWS // FINE, FINE,
                )  # fmt: skip
            elif kind == at.ORDER:
                quota = tl.minimum(tl.load(quotas + e, mask=e < E, other=0), T).to(tl.int32)
                rows.order(
                    bits, states, order_ptr + wide * 2 * T * K,
                    get(vec(state, at.EXCESS, BLOCK_E)) + quota, T, member, start, stop, E, K,
                    BLOCK_E, ROWS,
                )  # fmt: skip
                if member == 0:
                    rounds.sum_up(
                        header, state, quotas, partial, results, FINE * tiles, T, E,
                        BLOCK_E,
                    )  # fmt: skip
            n += 1
            going = (n < last) & (kind < at.ORDER)
            # The next phase reads what any thread of this program has counted.
            tl.debug_barrier()
            if going & (members > 1):
                _wait_for_all(header + at.BARRIER, members * (n - first))
