"""Row kernels of the solver; :mod:`megatron_maxscore.flow.passes` says what each of them does.

Scores are scaled to integers on the fly (see :mod:`problem`), so that a pass is one read of the
score matrix and writes little.

Arguments that kernels share: ``scores_NE`` (N, E) float32 or float64; ``low_N`` (N,) float64 lowest
allowed score; ``factor_B`` (B,) float64 powers of two that make scores integers; ``prices_BE``
(B, E) int64, in ``conclude`` float64 in score units; ``window_BE`` (B, E) int64; ``base_BE`` (B, E)
int64 level of the innermost bucket; ``first_problem``, ``last_problem`` and ``first_row_B``,
``last_row_B`` (B,) int64, the part of one thread; ``origin_B`` (B,) int64, a row less this is its
index in the whole problem. Written are ``threshold_N`` and ``gap_N`` (N,) int64, ``x_NE`` (N, E)
bool, ``load_BE`` (B, E) int64, ``gaps_BD`` (B, D + 1) int64 and ``bids_BEU`` (B, E, U) int32.

Example: a row has the reduced scores 9, 7, 4 and 1, and k = 2. It takes experts 0 and 1; its gap is
7 - 4 = 3 and its threshold 5, between the two. Its bids are 4, 2, -1 and -4. At this threshold the
row gives expert 1 up once the price of expert 1 has risen by 2, and takes expert 2 once the price
of expert 2 has fallen by more than 1.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow.buckets import MANTISSA_BITS, NUM_LEVELS
from megatron_maxscore.flow.kernels.compiler import jit
from megatron_maxscore.flow.kernels.vectors import (
    LANES,
    aligned,
    bits,
    exceeding,
    lowest_bit,
    padded,
)
from megatron_maxscore.flow.problem import FORBIDDEN, ROUNDER, ROUNDER_BITS

_HUGE = 1 << 62


@jit
def integer(score, low, factor):
    """Return a score as an integer; see :mod:`problem`."""
    return bits((np.float64(score) - low) * factor + ROUNDER) - ROUNDER_BITS


@jit
def reduced_row(scores_NE, low, factor, price_E, row, out_E):
    """Write a row's integer scores minus prices."""
    for expert in range(out_E.shape[0]):
        out_E[expert] = integer(scores_NE[row, expert], low, factor) - price_E[expert]


@jit
def _kth_and_next(r_E, topk, guess, spacing):
    """Return the k-th and (k+1)-th largest, k < E, by counting what lies above a moving guess.

    The guess moves by ``spacing`` for each entry too many, then by what the last two counts say.
    """
    above_lo = -_HUGE  # more than k entries lie above this
    below_hi = _HUGE  # fewer than k entries lie above this
    from_min, from_max = False, False
    last_guess, last_count = guess, np.int64(-1)
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
        if last_count >= 0 and count != last_count:
            spacing = abs(guess - last_guess) // abs(count - last_count)
        last_guess, last_count = guess, count
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
def _mean(r_E):
    """Return the mean of a row's allowed entries."""
    total, count = np.int64(0), np.int64(0)
    for expert in range(r_E.shape[0]):
        is_allowed = r_E[expert] > FORBIDDEN
        total += r_E[expert] if is_allowed else np.int64(0)
        count += np.int64(is_allowed)
    return total // count


@jit
def _level(size):
    """Return the level of a size >= 1; see :mod:`buckets`."""
    return (bits(np.float64(size)) >> (52 - MANTISSA_BITS)) - (1023 << MANTISSA_BITS)


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
    threshold_N, gap_N, x_NE, load_BE, gaps_BD, bids_BEU,
):  # fmt: skip
    """Choose each row's k best experts; count loads, gaps and bids."""
    half = bids_BEU.shape[2] // 2
    num_experts = scores_NE.shape[1]
    width = padded(num_experts)
    # What is read and written for every row, copied to where vectors are loaded as a whole.
    r_P, window_P = aligned(width), aligned(width)
    r_P[:], window_P[:] = 2 * FORBIDDEN, 0
    r_E, load_E = r_P[:num_experts], aligned(num_experts)
    price_E = aligned(num_experts)
    for problem in range(first_problem, last_problem):
        window_P[:num_experts] = window_BE[problem]
        price_E[:], load_E[:] = prices_BE[problem], 0
        mean, above_mean, spacing = np.int64(0), np.int64(0), np.int64(0)
        for row in range(first_row_B[problem], last_row_B[problem]):
            reduced_row(scores_NE, low_N[row], factor_B[problem], price_E, row, r_E)
            if knows_threshold:
                guess = threshold_N[row]
            else:
                mean = _mean(r_E)
                guess = mean + above_mean
            kth, following = _kth_and_next(r_E, topk, guess, spacing)
            gap = kth - following
            gap_N[row] = gap
            level = min(_level(gap) + 1, NUM_LEVELS) if gap > 0 else 0
            gaps_BD[problem, level] += 1
            threshold = (kth + following) >> 1
            if following < FORBIDDEN:  # only forbidden arcs are left: any price keeps this k
                threshold = kth - 1
            else:
                spacing += (gap - spacing) >> 3
                above_mean += (threshold - mean - above_mean) >> 2
            threshold_N[row] = threshold
            if gap > 0:
                for expert in range(num_experts):
                    chosen = r_E[expert] > following
                    x_NE[row, expert] = chosen
                    load_E[expert] += chosen
            else:
                missing = topk
                for expert in range(num_experts):
                    chosen = r_E[expert] > kth
                    x_NE[row, expert] = chosen
                    load_E[expert] += chosen
                    missing -= np.int64(chosen)
                index = (row - origin_B[problem]) * topk
                expert = (index + index // num_experts) % num_experts
                while missing > 0:
                    if r_E[expert] == kth:
                        x_NE[row, expert] = True
                        load_E[expert] += 1
                        missing -= 1
                    expert = expert + 1 if expert + 1 < num_experts else 0
            for first in range(0, num_experts, 64):
                inside = np.int64(0)
                for place in range(first, min(first + 64, num_experts), LANES):
                    inside |= exceeding(r_P, window_P, place, threshold) << (place - first)
                while inside:
                    expert = first + lowest_bit(inside)
                    inside &= inside - 1
                    bid = min(r_E[expert] - threshold, window_P[expert])
                    bids_BEU[problem, expert, _bucket(bid, base_BE[problem, expert], half)] += 1
        load_BE[problem] += load_E


@jit
def price_step(bids_BEU, capacity_BE, window_BE, base_BE, edge_D, step_BE):
    """Read the price steps off the counts of bids."""
    half = bids_BEU.shape[2] // 2
    for problem in range(step_BE.shape[0]):
        for expert in range(step_BE.shape[1]):
            capacity, base = capacity_BE[problem, expert], base_BE[problem, expert]
            above = 0
            bucket = 2 * half - 1
            lowest = -1
            while bucket >= 0:
                inside = bids_BEU[problem, expert, bucket]
                if above + inside > capacity:
                    break
                above += inside
                if inside > 0:
                    lowest = bucket
                bucket -= 1
            if bucket >= 0:
                low, high = _edges(bucket, base, half, edge_D)
                share = (capacity - above) / inside
                step_BE[problem, expert] = np.int64(np.floor(high - (high - low) * share))
            elif lowest >= 0:
                step_BE[problem, expert] = np.int64(_edges(lowest, base, half, edge_D)[0])
            else:
                step_BE[problem, expert] = -window_BE[problem, expert]


@jit
def _edges(bucket, base, half, edge_D):
    """Return the lower and upper edge of a bucket."""
    step = bucket - half if bucket >= half else half - 1 - bucket
    near = edge_D[base + step] if step > 1 else 1.0 + step
    far = edge_D[base + step + 1] if step > 0 else 2.0
    return (near, far) if bucket >= half else (1.0 - far, 1.0 - near)


@jit
def conclude(
    scores_NE, low_N, prices_BE, x_NE, topk, first_problem, last_problem, first_row_B, last_row_B,
    experts_NK, total_N, slack_N,
):  # fmt: skip
    """Order the chosen experts, and evaluate the row's share of objective and gap in float64."""
    num_experts = scores_NE.shape[1]
    reduced_E = aligned(num_experts).view(np.float64)
    price_E = aligned(num_experts).view(np.float64)
    best_K, score_K = np.empty(topk, np.float64), np.empty(topk, np.float64)
    chosen_E = np.empty(num_experts + 1, np.int64)
    for problem in range(first_problem, last_problem):
        price_E[:] = prices_BE[problem]
        for row in range(first_row_B[problem], last_row_B[problem]):
            low = low_N[row]
            count = 0
            for expert in range(num_experts):
                chosen_E[count] = expert
                count += np.int64(x_NE[row, expert])
            for place in range(topk):
                score_K[place] = scores_NE[row, chosen_E[place]]
            for index in range(topk):
                # How many come before it: greater ones, and equal ones of a lower index.
                score, before = score_K[index], 0
                for place in range(topk):
                    before += np.int64(score_K[place] > score)
                for place in range(index):
                    before += np.int64(score_K[place] == score)
                experts_NK[row, before] = chosen_E[index]
            for expert in range(num_experts):
                value = np.float64(scores_NE[row, expert]) - low
                reduced_E[expert] = value - price_E[expert]
            total, least = 0.0, np.inf
            for place in range(topk):
                expert = experts_NK[row, place]
                total += np.float64(scores_NE[row, expert])
                least = min(least, reduced_E[expert])
            better = 0
            for expert in range(num_experts):
                better += np.int64(reduced_E[expert] > least)
            for place in range(topk):
                better -= np.int64(reduced_E[experts_NK[row, place]] > least)
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
                total_chosen = 0.0
                for place in range(topk):
                    total_chosen += reduced_E[experts_NK[row, place]]
                best = 0.0
                for place in range(topk):
                    best += best_K[place]
                slack = max(0.0, best - total_chosen)
            slack_N[row] = slack
