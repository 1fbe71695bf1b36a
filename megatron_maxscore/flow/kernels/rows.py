"""Row kernels of the solver; :mod:`plain` documents what each of them does.

Scores are scaled to integers on the fly (see :mod:`problem`), so that a pass is one read of the
score matrix and writes little.

Shape letters: B problems, N rows of all problems, E experts, K experts per token, H buckets,
R contested rows, A arcs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from megatron_maxscore.flow.buckets import MANTISSA_BITS, NUM_LEVELS
from megatron_maxscore.flow.kernels.compiler import jit
from megatron_maxscore.flow.problem import FORBIDDEN

# Adding it to a float64 below 2**51 in size rounds that to an integer, half to even, which is then
# the difference of the bit patterns.
_MAGIC = 1.5 * 2.0**52
_MAGIC_BITS = int(np.float64(_MAGIC).view(np.int64))
_HUGE = 1 << 62


@intrinsic
def _bits(typing_context: Any, value: Any) -> Any:
    """Return the bit pattern of a float64 as int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), generate


@jit
def reduced_row(scores_NE, low, factor, prices_BE, problem, row, out_E):
    """Write a row's integer scores minus prices."""
    for expert in range(out_E.shape[0]):
        above = np.float64(scores_NE[row, expert]) - low
        out_E[expert] = (_bits(above * factor + _MAGIC) - _MAGIC_BITS) - prices_BE[problem, expert]


@jit
def _kth_and_next(r_E, topk, guess, spacing):
    """Return the k-th and (k+1)-th largest, k < E, by counting what lies above a moving guess."""
    above_lo = -_HUGE  # more than k entries lie above this
    below_hi = _HUGE  # fewer than k entries lie above this
    from_min, from_max = False, False
    while True:
        count = 0
        low, high = np.int64(_HUGE), np.int64(-_HUGE)  # least above, greatest not above
        for expert in range(r_E.shape[0]):
            value = r_E[expert]
            is_above = value > guess
            count += np.int64(is_above)
            low = min(low, value if is_above else np.int64(_HUGE))
            high = max(high, np.int64(-_HUGE) if is_above else value)
        if count == topk:
            return low, high
        if count > topk:
            if from_max:  # fewer than k above `high` before, more than k with it: a tie
                return low, low
            above_lo = guess
            step = guess + (count - topk) * spacing - (spacing >> 1)
            if count > topk + 1 and low < step < below_hi:
                guess, from_min, from_max = step, False, False
            else:
                guess, from_min, from_max = low, True, False
        else:
            if from_min:
                return guess, guess
            below_hi = guess
            step = guess - (topk - count) * spacing + (spacing >> 1)
            if count < topk - 1 and above_lo < step < high - 1:
                guess, from_min, from_max = step, False, False
            else:
                guess, from_min, from_max = high - 1, False, True


@jit
def _level(size):
    """Return the level of a size >= 1; see :mod:`buckets`."""
    return (_bits(np.float64(size)) >> (52 - MANTISSA_BITS)) - (1023 << MANTISSA_BITS)


@jit
def _bucket(bid, base, half):
    """Return the histogram bucket of a bid; see :mod:`buckets`."""
    size = bid if bid > 0 else 1 - bid
    level = max(min(_level(size) - base, half - 1), 1) if size > 1 else 0
    return half + level if bid > 0 else half - 1 - level


@jit
def scan(scores_NE, first_row, last_row, low_N, high_N):
    """Lowest finite and highest score per row; returns whether any is bad, any is -inf."""
    bad, forbidden = False, False
    for row in range(first_row, last_row):
        low = high = scores_NE[row, 0]
        is_odd = False
        for expert in range(scores_NE.shape[1]):
            value = scores_NE[row, expert]
            is_odd |= not (abs(value) < np.inf)
            low = min(low, value)
            high = max(high, value)
        if is_odd:
            low, high = np.inf, -np.inf
            for expert in range(scores_NE.shape[1]):
                value = scores_NE[row, expert]
                if value == -np.inf:
                    forbidden = True
                elif value < np.inf:
                    low = min(low, value)
                    high = max(high, value)
                else:
                    bad = True
        low_N[row] = low
        high_N[row] = high
    return bad, forbidden


@jit
def price_pass(
    scores_NE, low_N, factor_B, prices_BE, topk, window_BE, base_BE, knows_threshold,
    first_problem, last_problem, first_row_B, last_row_B, origin_B,
    threshold_N, gap_N, x_NE, load_BE, gaps_BL, bids_BEH,
):  # fmt: skip
    """Choose each row's k best experts; count loads, gaps and bids."""
    half = bids_BEH.shape[2] // 2
    num_experts = scores_NE.shape[1]
    r_E = np.empty(num_experts, np.int64)
    inside_E = np.empty(num_experts + 1, np.int64)
    for problem in range(first_problem, last_problem):
        previous, spacing = np.int64(0), np.int64(0)
        for row in range(first_row_B[problem], last_row_B[problem]):
            reduced_row(scores_NE, low_N[row], factor_B[problem], prices_BE, problem, row, r_E)
            guess = threshold_N[row] if knows_threshold else previous
            kth, following = _kth_and_next(r_E, topk, guess, spacing)
            gap = kth - following
            gap_N[row] = gap
            level = min(_level(gap) + 1, NUM_LEVELS) if gap > 0 else 0
            gaps_BL[problem, level] += 1
            threshold = (kth + following) >> 1
            if following < FORBIDDEN:  # only forbidden arcs are left: any price keeps this k
                threshold = kth - 1
            else:
                spacing += (gap - spacing) >> 3
            threshold_N[row] = threshold
            previous += (threshold - previous) >> 2
            if gap > 0:
                for expert in range(num_experts):
                    chosen = r_E[expert] > following
                    x_NE[row, expert] = chosen
                    load_BE[problem, expert] += chosen
            else:
                missing = topk
                for expert in range(num_experts):
                    chosen = r_E[expert] > kth
                    x_NE[row, expert] = chosen
                    load_BE[problem, expert] += chosen
                    missing -= np.int64(chosen)
                index = (row - origin_B[problem]) * topk
                expert = (index + index // num_experts) % num_experts
                while missing > 0:
                    if r_E[expert] == kth:
                        x_NE[row, expert] = True
                        load_BE[problem, expert] += 1
                        missing -= 1
                    expert = expert + 1 if expert + 1 < num_experts else 0
            count = 0
            for expert in range(num_experts):
                inside_E[count] = expert
                count += np.int64(r_E[expert] + window_BE[problem, expert] > threshold)
            for position in range(count):
                expert = inside_E[position]
                bid = min(r_E[expert] - threshold, window_BE[problem, expert])
                bids_BEH[problem, expert, _bucket(bid, base_BE[problem, expert], half)] += 1


@jit
def price_step(bids_BEH, capacity_BE, window_BE, base_BE, edge_L, step_BE):
    """Read the price steps off the counts of bids."""
    half = bids_BEH.shape[2] // 2
    for problem in range(step_BE.shape[0]):
        for expert in range(step_BE.shape[1]):
            capacity, base = capacity_BE[problem, expert], base_BE[problem, expert]
            above = 0
            bucket = 2 * half - 1
            lowest = -1
            while bucket >= 0:
                inside = bids_BEH[problem, expert, bucket]
                if above + inside > capacity:
                    break
                above += inside
                if inside > 0:
                    lowest = bucket
                bucket -= 1
            if bucket >= 0:
                low, high = _edges(bucket, base, half, edge_L)
                share = (capacity - above) / inside
                step_BE[problem, expert] = np.int64(np.floor(high - (high - low) * share))
            elif lowest >= 0:
                step_BE[problem, expert] = np.int64(_edges(lowest, base, half, edge_L)[0])
            else:
                step_BE[problem, expert] = -window_BE[problem, expert]


@jit
def _edges(bucket, base, half, edge_L):
    """Return the lower and upper edge of a bucket."""
    step = bucket - half if bucket >= half else half - 1 - bucket
    near = edge_L[base + step] if step > 1 else 1.0 + step
    far = edge_L[base + step + 1] if step > 0 else 2.0
    return (near, far) if bucket >= half else (1.0 - far, 1.0 - near)


@jit
def count_contested(
    scores_NE, low_N, factor_B, prices_BE, x_NE, reach_B, stride_B, gap_N, drift_B, origin_B,
    first_problem, last_problem, first_row_B, last_row_B, count_N,
):  # fmt: skip
    """Count the entries of each contested row: those whose loss in a swap is within reach."""
    num_experts = scores_NE.shape[1]
    r_E = np.empty(num_experts, np.int64)
    for problem in range(first_problem, last_problem):
        reach, stride = reach_B[problem], stride_B[problem]
        limit = reach + drift_B[problem]
        for row in range(first_row_B[problem], last_row_B[problem]):
            count_N[row] = 0
            if reach < 0 or gap_N[row] > limit or (row - origin_B[problem]) % stride:
                continue
            reduced_row(scores_NE, low_N[row], factor_B[problem], prices_BE, problem, row, r_E)
            least, most = _held_and_other(r_E, x_NE, row)
            if least - most > reach:
                continue
            count = 0
            for expert in range(num_experts):
                value = r_E[expert]
                count += np.int64(
                    value <= most + reach if x_NE[row, expert] else value >= least - reach
                )
            count_N[row] = count


@jit
def _held_and_other(r_E, x_NE, row):
    """Return the least reduced score that the row has, and the greatest that it has not."""
    least, most = np.int64(_HUGE), np.int64(-_HUGE)
    for expert in range(r_E.shape[0]):
        has = x_NE[row, expert]
        least = min(least, r_E[expert] if has else np.int64(_HUGE))
        most = max(most, np.int64(-_HUGE) if has else r_E[expert])
    return least, most


@jit
def extract(
    scores_NE, low_N, factor_B, prices_BE, x_NE, reach_B, problem_R, row_R, first_R,
    first, last, expert_A, value_A, held_A,
):  # fmt: skip
    """Write down the arcs of contested rows."""
    num_experts = scores_NE.shape[1]
    r_E = np.empty(num_experts, np.int64)
    for index in range(first, last):
        row, problem = row_R[index], problem_R[index]
        reach = reach_B[problem]
        reduced_row(scores_NE, low_N[row], factor_B[problem], prices_BE, problem, row, r_E)
        least, most = _held_and_other(r_E, x_NE, row)
        arc = first_R[index]
        for expert in range(num_experts):
            value, has = r_E[expert], x_NE[row, expert]
            if value <= most + reach if has else value >= least - reach:
                expert_A[arc] = expert
                value_A[arc] = value
                held_A[arc] = has
                arc += 1


@jit
def conclude(
    scores_NE, low_N, prices_BE, x_NE, topk, first_problem, last_problem, first_row_B, last_row_B,
    experts_NK, total_N, slack_N,
):  # fmt: skip
    """Order the chosen experts, and evaluate the row's share of objective and gap in float64."""
    num_experts = scores_NE.shape[1]
    reduced_E = np.empty(num_experts, np.float64)
    best_K = np.empty(topk, np.float64)
    chosen_E = np.empty(num_experts + 1, np.int64)
    for problem in range(first_problem, last_problem):
        for row in range(first_row_B[problem], last_row_B[problem]):
            low = low_N[row]
            count = 0
            for expert in range(num_experts):
                chosen_E[count] = expert
                count += np.int64(x_NE[row, expert])
            for index in range(topk):
                expert = chosen_E[index]
                value = scores_NE[row, expert]
                place = index
                while place > 0 and scores_NE[row, experts_NK[row, place - 1]] < value:
                    experts_NK[row, place] = experts_NK[row, place - 1]
                    place -= 1
                experts_NK[row, place] = expert
            for expert in range(num_experts):
                value = np.float64(scores_NE[row, expert]) - low
                reduced_E[expert] = value - prices_BE[problem, expert]
            total, least = 0.0, np.inf
            for place in range(topk):
                expert = experts_NK[row, place]
                total += np.float64(scores_NE[row, expert])
                least = min(least, reduced_E[expert])
            better = 0
            for expert in range(num_experts):
                better += np.int64((reduced_E[expert] > least) & (not x_NE[row, expert]))
            total_N[row] = total
            slack = 0.0
            if better:
                # Rounding to integers, or an assignment that is not optimal: the k largest.
                for place in range(topk):
                    best_K[place] = -np.inf
                for expert in range(num_experts):
                    value = reduced_E[expert]
                    if value > best_K[topk - 1]:
                        place = topk - 1
                        while place > 0 and best_K[place - 1] < value:
                            best_K[place] = best_K[place - 1]
                            place -= 1
                        best_K[place] = value
                # Paired in order, so that what both have cancels exactly.
                chosen = 0.0
                for place in range(topk):
                    chosen += reduced_E[experts_NK[row, place]]
                best = 0.0
                for place in range(topk):
                    best += best_K[place]
                slack = max(0.0, best - chosen)
            slack_N[row] = slack
