"""The whole solve in one kernel: phases with a barrier among a problem's programs between them.

Shape letters: B problems, T rows of each, E experts (padded to BLOCK_E), K experts per token,
P programs, S slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow.device import decisions, rows
from megatron_maxscore.flow.device import layout as at
from megatron_maxscore.flow.device.decisions import get, getf


@triton.jit
def _wait_for_all(ptr, target):
    """Return when so many programs have come here, and what they wrote can be read."""
    tl.debug_barrier()
    tl.atomic_add(ptr, 1, sem="acq_rel")
    while tl.load(ptr, volatile=True) < target:
        pass
    tl.atomic_add(ptr, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _sum_up(
    header, partial_ptr, values_ptr, b, excess, tolerance_bits, tiles, E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Add up the tiles' sums in their order; write objective, bound and gap."""
    e, i = tl.arange(0, BLOCK_E), tl.arange(0, 256)
    score = tl.zeros([256], tl.float64)
    slack, span = score, score
    for start in range(0, tiles, 256):
        here = partial_ptr + start + i
        inside = start + i < tiles
        score += tl.load(here, mask=inside, other=0.0, cache_modifier=".cg")
        slack += tl.load(here + tiles, mask=inside, other=0.0, cache_modifier=".cg")
        span += tl.load(here + 2 * tiles, mask=inside, other=0.0, cache_modifier=".cg")
    idle = tl.where(e < E, -excess.to(tl.float64) * b.to(tl.float64), 0.0)
    objective, difference = tl.sum(score, 0), tl.maximum(tl.sum(slack, 0) + tl.sum(idle, 0), 0.0)
    spans = tl.sum(span, 0)
    gap = tl.where(difference > 0, float("inf"), 0.0).to(tl.float64)
    gap = tl.where(spans > 0, difference / tl.where(spans > 0, spans, 1.0), gap)
    tl.store(values_ptr, objective)
    tl.store(values_ptr + 1, objective + difference)
    tl.store(values_ptr + 2, gap)
    tl.store(values_ptr + 3, difference)
    tl.store(values_ptr + 4, spans)
    tolerance = tolerance_bits.to(tl.float64, bitcast=True)
    bad = get(header + at.BAD).to(tl.int64)
    integers = (values_ptr + 5).to(tl.pointer_type(tl.int64))
    tl.store(integers, bad)
    tl.store(integers + 1, get(header + at.SCALED).to(tl.int64))
    tl.store(integers + 2, (gap <= tolerance).to(tl.int64))


@triton.jit(
    do_not_specialize=[
        "B", "T", "tiles", "seed", "first", "last", "members", "end", "mark", "warm_stride",
        "capacity_stride",
    ]
)  # fmt: skip
def solve_kernel(
    scores_ptr, warm_ptr, capacity_ptr, quota_ptr, experts_ptr, results_ptr, rows_ptr, bits_ptr,
    partial_ptr, work_ptr, keys_ptr, tolerance_bits, B, T, tiles, seed, first, last, members, end,
    mark, warm_stride, capacity_stride, E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, S: tl.constexpr, WORDS: tl.constexpr, RESULTS: tl.constexpr,
):  # fmt: skip
    """Make phases ``first`` to ``last`` of every problem, each by ``members`` programs."""
    e = tl.arange(0, BLOCK_E)
    ok = e < E
    STATE: tl.constexpr = at.SCALARS + at.VECTORS * BLOCK_E
    COUNTS: tl.constexpr = at.COUNTS * BLOCK_E
    KEYS: tl.constexpr = 2 * BLOCK_E * S
    FINE: tl.constexpr = 4 if ROWS >= 4 else 2
    member, leads = tl.program_id(0) % members, tl.program_id(0) % members == 0
    lane, lanes = tl.program_id(0) // members, tl.num_programs(0) // members
    for problem in range(lane, B, lanes):
        header = work_ptr + problem * (at.HEADER + 2 * STATE + 3 * COUNTS)
        states, counters = header + at.HEADER, header + at.HEADER + 2 * STATE
        wide = tl.full((), 0, tl.int64) + problem
        scores = scores_ptr + wide * T * E
        warm, capacities = (
            warm_ptr + problem * warm_stride,
            capacity_ptr + problem * capacity_stride,
        )
        quotas, experts = quota_ptr + problem * capacity_stride, experts_ptr + wide * T * K
        row_data, bits = rows_ptr + problem * 2 * T, bits_ptr + wide * T * WORDS
        partial, results = partial_ptr + problem * 3 * FINE * tiles, results_ptr + problem * RESULTS
        n = first
        going = n < last
        while going:
            state, new = states + (n & 1) * STATE, states + ((n + 1) & 1) * STATE
            counts, before = counters + (n % 3) * COUNTS, counters + ((n + 2) % 3) * COUNTS
            keys_3 = keys_ptr + problem * 3 * KEYS
            keys, keys_before = keys_3 + (n % 3) * KEYS, keys_3 + ((n + 2) % 3) * KEYS
            # What this phase is to do, worked out by every program from what the last one has left.
            kind = tl.full((), at.SCAN, tl.int32)
            b = tl.zeros([BLOCK_E], tl.float32)
            w, distance = b, b
            excess = tl.zeros([BLOCK_E], tl.int32)
            eps = tl.full((), 0.0, tl.float32)
            age = tl.full((), 0, tl.int32)
            cycles, rounds, moved = age, age, age + 1
            scale, limit = eps, eps
            if n > 0:
                kind = get(state + at.KIND)
                scale, limit = getf(state + at.SCALE), getf(state + at.LIMIT)
                if kind == at.SCAN:
                    b, w, eps, scale, limit = decisions.after_scan(
                        header, new, warm, leads, E, BLOCK_E
                    )
                    kind = tl.full((), at.SWEEP, tl.int32)
                elif kind == at.SWEEP:
                    kind, b, w, eps, excess = decisions.after_sweep(
                        state, new, before, capacities, quotas, leads, get(header + at.ROWS_IN), T,
                        end, E, K, BLOCK_E,
                    )  # fmt: skip
                    distance += float("inf")
                elif kind == at.ROUND:
                    excess, distance, age, cycles, rounds, moved, b = decisions.after_round(
                        state, new, before, keys_before, bits, leads, member, members, T * K,
                        BLOCK_E, ROWS, S, WORDS,
                    )  # fmt: skip
                    eps = getf(state + at.EPS)
                else:
                    kind = tl.full((), at.DONE, tl.int32)
            quota = tl.minimum(tl.load(quotas + e, mask=ok, other=0), T).to(tl.int32)
            give, take, cost, measures, over, idle = decisions.plan(
                excess, b, distance, age, cycles, quota, T * K, E, S
            )
            fails = (over == 0) & ((moved == 0) | (rounds >= decisions.FILLS))
            if (kind == at.ROUND) & ((over + idle == 0) | fails):
                kind = tl.full((), at.CONCLUDE, tl.int32)
            if leads:
                tl.store(new + at.KIND, kind)
                tl.store(new + at.MEASURES, measures.to(tl.int32))
                tl.store(new + at.SCALARS + at.GIVE * BLOCK_E + e, give)
                tl.store(new + at.SCALARS + at.TAKE * BLOCK_E + e, take)
            # What the next phase fills.
            clear, clear_keys = counters + ((n + 1) % 3) * COUNTS, keys_3 + ((n + 1) % 3) * KEYS
            for start in range(member * BLOCK_E, COUNTS, members * BLOCK_E):
                tl.store(clear + start + e, tl.zeros([BLOCK_E], tl.int32))
            for start in range(member * BLOCK_E, KEYS, members * BLOCK_E):
                tl.store(clear_keys + start + e, tl.zeros([BLOCK_E], tl.int64))
            if kind == at.SCAN:
                if leads:
                    tl.store(header + at.ROWS_IN, T)
                    tl.store(header + at.MARK, mark)
                rows.scan(scores, row_data, header, T, member, members, tiles, E, BLOCK_E, ROWS)
            elif kind == at.SWEEP:
                rows.sweep(
                    scores, row_data, bits, counts, b, w, eps, scale, limit, T, seed, member,
                    members, tiles, E, K, BLOCK_E, ROWS, WORDS,
                )  # fmt: skip
            elif kind == at.ROUND:
                late = (rounds - decisions.CALM).to(tl.float32)
                jitter = tl.minimum(tl.exp2(tl.minimum(late / 2, 30.0)) * eps, 1.0)
                jitter = tl.where(late >= 0, jitter, 0.0)
                rows.offer(
                    scores, row_data, bits, counts, keys, b, give, take, cost, jitter, eps, scale,
                    limit, T, seed, 7919 * rounds, measures, member, members, tiles, E, BLOCK_E,
                    ROWS, S, WORDS,
                )  # fmt: skip
            elif kind == at.CONCLUDE:
                # All rows level: any choice is as good, at any price. Tiles of float64 are smaller.
                ranges = tl.sum(get(header + at.EXPONENTS + tl.arange(0, 256)), 0)
                b = tl.where(ranges + get(header + at.FORBIDDEN) == 0, 0.0, b)
                # Without slack a price common to all experts changes nothing: their mean is 0.
                all_rows = get(header + at.ROWS_IN)
                room = tl.minimum(tl.load(capacities + e, mask=ok, other=0), all_rows)
                tight = tl.sum(room.to(tl.int64), 0) == all_rows * K
                b = tl.where(ok & tight, b - tl.sum(b, 0) / E, b)
                rows.conclude(
                    scores, row_data, bits, experts, partial, header, b, scale, limit, T, member,
                    members, tiles, E, K, BLOCK_E, ROWS // FINE, FINE, WORDS,
                )  # fmt: skip
                tl.debug_barrier()
                if tl.atomic_add(header + at.TICKET, 1, sem="acq_rel") == members - 1:
                    _sum_up(
                        header,
                        partial,
                        results,
                        b,
                        excess,
                        tolerance_bits,
                        FINE * tiles,
                        E,
                        BLOCK_E,
                    )
                    tl.store(
                        results.to(tl.pointer_type(tl.int64)) + 8 + e,
                        (excess + quota).to(tl.int64),
                        mask=ok,
                    )
                    tl.store(results.to(tl.pointer_type(tl.float32)) + 16 + 2 * E + e, b, mask=ok)
            n += 1
            going = (n < last) & (kind < at.CONCLUDE)
            if going & (members > 1):
                _wait_for_all(header + at.BARRIER, members * (n - first))
