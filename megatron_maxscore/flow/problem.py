r"""The routing flow as an integer problem.

.. math::
    \max \sum_{ij} x_{ij} s_{ij}, \quad \sum_j x_{ij} = k, \quad \sum_i x_{ij} \le C_j,
    \quad x_{ij} \in \{0, 1\}

Scores become integers so that every comparison that decides something is exact and does not depend
on the order of summation: ``q = round((s - lowest allowed score of the row) * 2**shift)``. A power
of two keeps integer-valued scores exact; subtracting a constant per row changes no decision.

Shape letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

# Bits of the largest row range after scaling. Prices reach (E - 1) times that, so 36 + 10 bits
# leave room for sums of a few of them, and everything stays exact in float64 as well.
SCORE_BITS = 36


@dataclass(frozen=True)
class Problem:
    """One integer flow problem over the rows that take part.

    Attributes:
        q_TE: (T, E) int64 scaled scores, 0 at each row's lowest allowed score and at forbidden
            arcs.
        allowed_TE: (T, E) bool, or None when every arc is allowed.
        topk: experts per token.
        capacity_E: (E,) int64, cut to at most T.
        shift: scores were multiplied by ``2.0 ** shift``.
        ranges_T: (T,) float64, each row's score range over allowed arcs, in score units.
    """

    q_TE: IntArray
    allowed_TE: BoolArray | None
    topk: int
    capacity_E: IntArray
    shift: int
    ranges_T: FloatArray

    @property
    def is_tight(self) -> bool:
        """Whether the capacities sum to exactly what the tokens demand."""
        return bool(self.capacity_E.sum() == self.q_TE.shape[0] * self.topk)


def build(scores_TE: NDArray, topk: int, capacity_E: IntArray) -> Problem:
    """Scale scores to integers and check that the demand can be met.

    Args:
        scores_TE: (T, E) float32 or float64, rows that take part only; -inf forbids the arc.
        topk: experts per token.
        capacity_E: (E,) int64.

    Returns:
        The integer problem.

    Raises:
        ValueError: a row has fewer than ``topk`` allowed experts, or the capacities hold fewer
            units than the tokens demand; names the numbers.
    """
    num_tokens, num_experts = scores_TE.shape
    allowed_TE: BoolArray | None = scores_TE != -np.inf
    assert allowed_TE is not None
    if allowed_TE.all():
        allowed_TE = None
    else:
        degree_T = allowed_TE.sum(1)
        short = np.flatnonzero(degree_T < topk)
        if short.size:
            row = int(short[0])
            raise ValueError(
                f"token {row} has {int(degree_T[row])} allowed experts but needs topk={topk} "
                f"({short.size} such tokens); allow more experts for it"
            )
    capacity_E = np.minimum(capacity_E, num_tokens)
    supply, demand = int(capacity_E.sum()), num_tokens * topk
    if supply < demand:
        raise ValueError(
            f"capacities hold {supply} assignments but {num_tokens} tokens times topk={topk} "
            f"need {demand}; raise capacity or capacity_factor"
        )
    s_TE = scores_TE.astype(np.float64)
    if num_tokens == 0:
        empty = np.zeros((0, num_experts), np.int64)
        return Problem(empty, None, topk, capacity_E, 0, np.zeros(0))
    if allowed_TE is None:
        low_T, high_T = s_TE.min(1), s_TE.max(1)
    else:
        low_T = np.where(allowed_TE, s_TE, np.inf).min(1)
        high_T = s_TE.max(1)
    ranges_T = high_T - low_T
    largest = float(ranges_T.max())
    shift = 0 if largest == 0.0 else SCORE_BITS - math.frexp(largest)[1]
    # ldexp instead of a product: the factor itself may not be representable.
    scaled_TE = np.ldexp(s_TE - low_T[:, None], shift)
    if allowed_TE is not None:
        scaled_TE = np.where(allowed_TE, scaled_TE, 0.0)
    q_TE = np.rint(scaled_TE).astype(np.int64)
    return Problem(q_TE, allowed_TE, topk, capacity_E, shift, ranges_T)


def integer_prices(prices_E: FloatArray, problem: Problem) -> IntArray:
    """Turn warm-start prices in score units into integers the solver can start from.

    They are shifted to minimum 0 and clipped at ``(E - 1)`` times the largest scaled range, within
    which an optimal dual of a problem without forbidden arcs always lies.

    Args:
        prices_E: (E,) float64, finite.
        problem: the problem to solve.

    Returns:
        (E,) int64, all >= 0.
    """
    num_experts = prices_E.shape[0]
    limit = (num_experts - 1) * (int(problem.q_TE.max()) if problem.q_TE.size else 0)
    # A float64 difference of huge prices is inf at worst, which the clip takes.
    with np.errstate(over="ignore"):
        scaled_E = np.ldexp(prices_E - prices_E.min(), problem.shift)
    return np.rint(np.minimum(scaled_E, float(limit))).astype(np.int64)
