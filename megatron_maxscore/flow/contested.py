"""Rows that the finish may have to change, with the few experts that matter to them.

Shape letters: B problems, N rows of all problems, R contested rows, A arcs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_maxscore.flow.problem import BoolArray, IntArray, Problem


@dataclass(frozen=True)
class Contested:
    """Contested rows in order of their index, and their arcs in order of the expert.

    Attributes:
        row_R: (R,) int64 row of the problem's scores.
        problem_R: (R,) int64 its problem.
        first_B: (B + 1,) int64, problem b has the contested rows ``first_B[b]`` and following.
        first_R: (R + 1,) int64, a row has the arcs ``first_R[r]`` and following.
        expert_A: (A,) int32.
        value_A: (A,) int64 reduced score.
        held_A: (A,) bool, whether the row has the expert.
    """

    row_R: IntArray
    problem_R: IntArray
    first_B: IntArray
    first_R: IntArray
    expert_A: np.ndarray
    value_A: IntArray
    held_A: BoolArray

    @classmethod
    def allocate(cls, count_N: IntArray, problem: Problem) -> Contested:
        """Make room for ``count_N`` arcs per row; rows without arcs are not contested."""
        row_R = np.flatnonzero(count_N)
        first_B = np.searchsorted(row_R, problem.start_B)
        first_R = np.zeros(row_R.size + 1, np.int64)
        count_N[row_R].cumsum(out=first_R[1:])
        arcs = int(first_R[-1])
        return cls(
            row_R,
            np.repeat(np.arange(problem.num_problems), np.diff(first_B)),
            first_B,
            first_R,
            np.empty(arcs, np.int32),
            np.empty(arcs, np.int64),
            np.empty(arcs, np.bool_),
        )

    def apply(self, x_NE: BoolArray) -> None:
        """Write what the rows have now into an assignment."""
        rows_A = np.repeat(self.row_R, np.diff(self.first_R))
        x_NE[rows_A, self.expert_A] = self.held_A
