r"""The dual: alternating sweeps that bring prices close to optimal.

The dual of the flow is

.. math::
    \min_{\beta} \sum_i \text{(sum of the k largest of } s_i - \beta) + \sum_j C_j \beta_j,
    \qquad \beta \ge 0 \text{ unless the capacities leave no slack}

A sweep sets each token's threshold midway between its k-th and (k+1)-th reduced score, then each
expert's price midway between the C-th and (C+1)-th of its scores minus the thresholds. Midpoints,
because the neighbouring values themselves leave the boundary token undecided. Sweeps need not
reach the optimum: :mod:`~megatron_maxscore.flow.finish` does, from any prices.

Shape letters: T tokens, E experts.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow.problem import IntArray, Problem
from megatron_maxscore.flow.selection import largest, reduced_scores

MAX_SWEEPS = 16
# A sweep that leaves more than this share of the overflow is not worth another.
_STALLED = 0.8


def improve(problem: Problem, prices_E: IntArray, max_sweeps: int = MAX_SWEEPS) -> IntArray:
    """Return prices with little overflow, starting from ``prices_E``.

    Stops when the overflow (units above capacity at top-k of score minus price) is at most one
    per expert, no longer falls, or after ``max_sweeps``; returns the best prices seen.

    Args:
        problem: integer problem, 1 <= topk < E.
        prices_E: (E,) int64, all >= 0.
        max_sweeps: most sweeps to make.

    Returns:
        (E,) int64; all >= 0 unless the problem is tight, where prices are free.
    """
    num_experts = prices_E.shape[0]
    best_E, best_overflow = prices_E, None
    stalls = 0
    for sweep in range(max_sweeps + 1):
        values_TK, experts_TK = largest(reduced_scores(problem, prices_E), problem.topk + 1)
        load_E = np.bincount(experts_TK[:, :-1].ravel(), minlength=num_experts)
        overflow = _violation(load_E, prices_E, problem)
        if best_overflow is None or overflow < best_overflow:
            stalls = stalls + 1 if best_overflow and overflow > _STALLED * best_overflow else 0
            best_E, best_overflow = prices_E, overflow
        else:
            stalls += 1
        if overflow <= num_experts // 2 or stalls >= 3 or sweep == max_sweeps:
            break
        # Floor division of negative sums is fine: any value between the two serves.
        threshold_T = (values_TK[:, -2] + values_TK[:, -1]) // 2
        if problem.allowed_TE is not None:
            # Tokens whose (k+1)-th expert is forbidden keep what they have at any price.
            no_choice = values_TK[:, -1] < -(1 << 49)
            threshold_T = np.where(no_choice, values_TK[:, -2] - 1, threshold_T)
        prices_E = _expert_prices(problem, threshold_T)
    return best_E


def _violation(load_E: IntArray, prices_E: IntArray, problem: Problem) -> int:
    over = int(np.maximum(load_E - problem.capacity_E, 0).sum())
    if problem.is_tight:
        return over
    idle_E = np.where(prices_E > 0, np.maximum(problem.capacity_E - load_E, 0), 0)
    return max(over, int(idle_E.sum()))


def _expert_prices(problem: Problem, threshold_T: IntArray) -> IntArray:
    num_tokens, num_experts = problem.q_TE.shape
    bids_TE = problem.q_TE - threshold_T[:, None]
    lowest = int(bids_TE.min()) - 1
    if problem.allowed_TE is not None:
        bids_TE[~problem.allowed_TE] = lowest
    bids_ET = np.ascontiguousarray(bids_TE.T)
    prices_E = np.empty(num_experts, np.int64)
    for expert, capacity in enumerate(problem.capacity_E.tolist()):
        bids_T = bids_ET[expert]
        if capacity >= num_tokens:
            # Never full. Tight problems have free prices, and this one is the lowest of all.
            prices_E[expert] = lowest if problem.is_tight else 0
            continue
        if capacity == 0:
            prices_E[expert] = int(bids_T.max()) + 1
        else:
            split = num_tokens - capacity
            part_T = np.partition(bids_T, (split - 1, split))
            prices_E[expert] = (int(part_T[split - 1]) + int(part_T[split])) // 2
    return prices_E if problem.is_tight else np.maximum(prices_E, 0)
