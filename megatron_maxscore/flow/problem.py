r"""The routing flow as integer problems.

.. math::
    \max \sum_{ij} x_{ij} s_{ij}, \quad \sum_j x_{ij} = k, \quad \sum_i x_{ij} \le C_j,
    \quad x_{ij} \in \{0, 1\}

Scores become integers so that every comparison that decides something is exact and does not depend
on the order of summation: ``q = round((s - lowest allowed score of the row) * 2**shift)``. A power
of two keeps integer-valued scores exact; subtracting a constant per row changes no decision. The
integers are made anew in every pass over the scores, which is cheaper than keeping them.

The rows of a problem may be spread over ranks, contiguously in rank order; a rank then holds its
own rows, and knows how many every rank has.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_maxscore.flow.threads import row_spans

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

# Most experts, and bits of the largest row range after scaling up to so many. Prices reach (E - 1)
# times a range, and lengths of paths twice that, beside the number of their arcs: together less
# than 60 bits. All these integers are exact in float64 as well.
MAX_EXPERTS = 4096
_SCORE_BITS = {1024: 36, 2048: 35, MAX_EXPERTS: 33}
# Adding this to a float64 below 2**51 in size rounds the float64 to an integer, half to even. The
# integer is then the difference of the two bit patterns.
ROUNDER = 1.5 * 2.0**52
ROUNDER_BITS = int(np.float64(ROUNDER).view(np.int64))
# Reduced scores below this belong to forbidden arcs.
FORBIDDEN = -(1 << 61)
# No arc, and farther than any path.
FAR = 1 << 60
# Longer than any path over allowed arcs, shorter than to a forbidden one.
WHOLE = 1 << 49


@dataclass(frozen=True)
class Problem:
    """B integer flow problems with the same k and E, over the rows that take part.

    Attributes:
        scores_NE: (N, E) float32 or float64, C-contiguous, -inf at forbidden arcs.
        start_B: (B + 1,) int64, problem b has the rows ``start_B[b]`` to ``start_B[b + 1]``.
        rows_RB: (R, B) int64, how many rows of each problem every rank has.
        rank: this rank among them.
        topk: experts per token, smaller than E.
        capacity_BE: (B, E) int64, cut to at most the problem's rows; float64 in a sample.
        low_N: (N,) float64, each row's lowest allowed score.
        shift_B: (B,) int64, scores are multiplied by ``2.0 ** shift``.
        has_forbidden: whether any arc is forbidden.
    """

    scores_NE: NDArray
    start_B: IntArray
    rows_RB: IntArray
    rank: int
    topk: int
    capacity_BE: NDArray
    low_N: FloatArray
    shift_B: IntArray
    has_forbidden: bool

    @property
    def num_problems(self) -> int:
        """B."""
        return self.start_B.size - 1

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.scores_NE.shape[1])

    @property
    def score_bits(self) -> int:
        """Bits of the largest row range after scaling."""
        return score_bits(self.num_experts)

    @functools.cached_property
    def rows_B(self) -> IntArray:
        """(B,) int64 rows of each problem on all ranks."""
        return self.rows_RB.sum(0)

    @functools.cached_property
    def offset_B(self) -> IntArray:
        """(B,) int64 rows of each problem on the ranks before this one."""
        return self.rows_RB[: self.rank].sum(0)

    @functools.cached_property
    def pieces(self) -> list[tuple[int, int, IntArray, IntArray]]:
        """How rows are split over threads, see :func:`threads.row_spans`."""
        return row_spans(self.start_B)

    @functools.cached_property
    def origin_B(self) -> IntArray:
        """(B,) int64; a local row number minus this is the row's index in the whole problem."""
        return self.start_B[:-1] - self.offset_B

    @functools.cached_property
    def factor_B(self) -> FloatArray:
        """(B,) float64 powers of two that scale scores to integers."""
        return np.ldexp(1.0, self.shift_B)

    @functools.cached_property
    def tight_B(self) -> BoolArray:
        """(B,) bool, whether the capacities sum to exactly what the tokens demand."""
        return np.asarray(self.capacity_BE.sum(1) == self.rows_B * self.topk)

    def part(self, first: int, last: int) -> Problem:
        """Return the problems from ``first`` to before ``last`` alone; nothing is copied."""
        start_B = self.start_B[first : last + 1]
        rows = slice(int(start_B[0]), int(start_B[-1]))
        return dataclasses.replace(
            self,
            scores_NE=self.scores_NE[rows],
            start_B=start_B - start_B[0],
            rows_RB=self.rows_RB[:, first:last],
            capacity_BE=self.capacity_BE[first:last],
            low_N=self.low_N[rows],
            shift_B=self.shift_B[first:last],
        )

    @property
    def problem_N(self) -> IntArray:
        """(N,) int64, the problem of each row."""
        return np.repeat(np.arange(self.num_problems), np.diff(self.start_B))


def maxima(values_N: FloatArray, start_B: IntArray) -> FloatArray:
    """Return (B,) the largest value of each problem's rows, 0 where it has none."""
    largest_B = np.zeros(start_B.size - 1)
    some_B = start_B[1:] > start_B[:-1]
    if some_B.any():
        largest_B[some_B] = np.maximum.reduceat(values_N, start_B[:-1][some_B])
    return largest_B


def score_bits(num_experts: int) -> int:
    """Return to how many bits the largest row range is scaled."""
    return next(bits for most, bits in _SCORE_BITS.items() if num_experts <= most)


def shifts(largest_B: FloatArray, num_experts: int) -> IntArray:
    """Return (B,) int64 shifts for the largest row range of each problem."""
    exponent_B = np.frexp(largest_B)[1].astype(np.int64)
    # Where scores are tiny against the range of float64 itself, fewer bits have to do.
    return np.asarray(
        np.where(largest_B == 0.0, 0, np.minimum(score_bits(num_experts) - exponent_B, 1000))
    )


def check_supply(problem: Problem) -> None:
    """Check that the capacities hold what the tokens demand.

    Raises:
        ValueError: they do not; names the numbers.
    """
    supply_B, demand_B = problem.capacity_BE.sum(1), problem.rows_B * problem.topk
    for b in np.flatnonzero(supply_B < demand_B)[:1].tolist():
        where = f" of problem {b}" if problem.num_problems > 1 else ""
        raise ValueError(
            f"capacities hold {int(supply_B[b])} assignments but {int(problem.rows_B[b])} tokens"
            f"{where} times topk={problem.topk} need {int(demand_B[b])}; raise capacity or "
            "capacity_factor"
        )


def integer_prices(prices_BE: FloatArray, problem: Problem, largest_B: FloatArray) -> IntArray:
    """Turn warm-start prices in score units into integers the solver can start from.

    Prices are shifted so that the lowest is 0, and clipped at ``(E - 1)`` times the largest scaled
    range. A problem without forbidden arcs always has optimal prices within this limit.

    Args:
        prices_BE: (B, E) float64, finite.
        problem: the problems to solve.
        largest_B: (B,) float64 largest row ranges.

    Returns:
        (B, E) int64, all >= 0.
    """
    limit_B = (problem.num_experts - 1) * np.rint(np.ldexp(largest_B, problem.shift_B))
    # A float64 difference of huge prices is inf at worst, which the clip takes.
    with np.errstate(over="ignore"):
        above_BE = prices_BE - prices_BE.min(1, keepdims=True)
        scaled_BE = np.ldexp(above_BE, problem.shift_B[:, None])
    clipped_BE: FloatArray = np.rint(np.minimum(scaled_BE, limit_B[:, None]))
    return clipped_BE.astype(np.int64)
