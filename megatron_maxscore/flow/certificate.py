"""Primal value, dual bound and gap of a solution, on the unrounded scores.

Shape letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_maxscore.flow.problem import FloatArray, IntArray, Problem


def evaluate(
    scores_TE: FloatArray, experts_TK: IntArray, prices_E: FloatArray, problem: Problem
) -> tuple[float, float, float]:
    """Return objective, bound and relative gap.

    The bound is the dual at ``prices_E``. Rows enter with their own lowest score subtracted, in
    both sums, so a large constant per token does not drown the difference.

    Args:
        scores_TE: (T, E) float64, -inf at forbidden arcs.
        experts_TK: (T, K) int64.
        prices_E: (E,) float64 in score units; >= 0 unless the capacities leave no slack.
        problem: gives k, capacities and ranges.

    Returns:
        Objective and bound in score units, and their difference over the sum of row ranges (0 if
        the difference is 0, inf if only the sum is). A bound below the objective by rounding is
        raised to it.
    """
    num_tokens, num_experts = scores_TE.shape
    if num_tokens == 0:
        return 0.0, 0.0, 0.0
    base_T = np.where(np.isneginf(scores_TE), np.inf, scores_TE).min(1)
    above_TE = scores_TE - base_T[:, None]
    primal = math.fsum(np.take_along_axis(above_TE, experts_TK, 1).sum(1).tolist())
    reduced_TE = above_TE - prices_E
    split = num_experts - problem.topk
    best_TK = np.partition(reduced_TE, split, axis=1)[:, split:] if split else reduced_TE
    rent = float((problem.capacity_E * prices_E).sum())
    dual = math.fsum([*best_TK.sum(1).tolist(), rent])
    difference = max(0.0, dual - primal)
    ranges = math.fsum(problem.ranges_T.tolist())
    gap = 0.0 if difference == 0.0 else (difference / ranges if ranges > 0 else math.inf)
    objective = primal + problem.topk * math.fsum(base_T.tolist())
    return objective, objective + difference, gap
