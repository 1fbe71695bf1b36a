"""The certificate in torch and numpy; :mod:`kernels.rows` is the same with numba.

Shape letters: B problems, N rows of all problems, E experts, K experts per token.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_maxscore.flow.problem import BoolArray, FloatArray, IntArray, Problem

# Entries of the score matrix that are taken at a time.
_BLOCK = 1 << 18


def block_of(matrix_NE: np.ndarray) -> int:
    """Return how many rows to take at a time."""
    return max(1, _BLOCK // int(matrix_NE.shape[1]))


def conclude(
    problem: Problem, prices_BE: FloatArray, x_NE: BoolArray
) -> tuple[IntArray, FloatArray, FloatArray]:
    """Order the chosen experts, and evaluate objective and gap on the unrounded scores.

    Args:
        problem: the problems.
        prices_BE: (B, E) float64 in score units.
        x_NE: (N, E) bool, k experts per row.

    Returns:
        (N, K) int64 experts, best score first, ties by index; (N,) float64 total score of each
        row; (N,) float64 by how much the k largest of score minus price exceed those chosen.
    """
    rows, num_experts = x_NE.shape
    topk = problem.topk
    experts_NK = np.empty((rows, topk), np.int64)
    total_N, slack_N = np.empty(rows), np.zeros(rows)
    problem_N = problem.problem_N
    size = block_of(x_NE)
    for first in range(0, rows, size):
        part = slice(first, min(first + size, rows))
        scores_NE, held_NE = problem.scores_NE[part], x_NE[part]
        place = np.flatnonzero(held_NE)
        scores_NK = torch.from_numpy(scores_NE.reshape(-1)[place].reshape(-1, topk))
        ordered = scores_NK.sort(dim=1, descending=True, stable=True)
        index_NK = torch.from_numpy((place % num_experts).reshape(-1, topk))
        chosen = index_NK.gather(1, ordered.indices)
        experts_NK[part] = chosen
        total_N[part] = _row_sums(ordered.values.double().numpy())
        prices = prices_BE[0] if problem.num_problems == 1 else prices_BE[problem_N[part]]
        reduced_NE = scores_NE.astype(np.float64)
        reduced_NE -= problem.low_N[part, None]
        reduced_NE -= prices
        reduced = torch.from_numpy(reduced_NE)
        reduced_NK = reduced.gather(1, chosen)
        others = reduced.masked_fill(torch.from_numpy(held_NE), -torch.inf).amax(1)
        short = np.flatnonzero((others > reduced_NK.amin(1)).numpy())
        if short.size:
            best = -np.sort(-reduced_NE[short], axis=1)[:, :topk]
            excess = _row_sums(best) - _row_sums(reduced_NK.numpy()[short])
            slack_N[first + short] = np.maximum(excess, 0.0)
    return experts_NK, total_N, slack_N


def _row_sums(values_NK: FloatArray) -> FloatArray:
    """Sum over the last axis from left to right, as a loop does."""
    total_N = np.zeros(values_NK.shape[0])
    for column in range(values_NK.shape[1]):
        total_N += values_NK[:, column]
    return total_N
