"""The immutable result of a solve."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# The gap that rounding scores to integers may leave, relative to the ranges of the rows.
ROUNDING = 1e-9


@dataclass(frozen=True)
class FlowSolution:
    """An assignment with the certificate that it is the best one.

    For a batch of B problems every tensor has a leading dimension B. No attribute communicates.
    Shape letters: see :mod:`megatron_maxscore`.

    Attributes:
        experts: (T, K) int64, best score first, ties by expert index; -1 in padding rows unless
            they are filled.
        prices: (E,) float32 in score units, mean 0 when the capacities leave no slack, otherwise
            minimum 0. A warm start for the next solve.
        objective: 0-dim float64, total score of the assignment.
        bound: 0-dim float64, an upper bound on the total score of every assignment: the dual value
            at the prices before they are rounded to float32.
        gap: 0-dim float64, ``(bound - objective)`` over the sum of the rows' score ranges; 0 when
            the numerator is 0, inf when only the denominator is.
        converged: 0-dim bool, whether the gap is at most 1e-9, which rounding alone may leave. The
            assignment is feasible in any case.
        loads: (R, E) int64, every rank's count per expert exactly as dispatched.
        rounds: collectives used.
        bad: 0-dim int64, number of rows that had NaN or +inf. Bounded mode counts such scores as 0;
            exact mode raises an error instead.
        scaled: 0-dim int64, number of this rank's rows that were scaled down as outliers.
            Objective, bound and gap are those of the scaled scores. Otherwise the outliers would
            hide how good the assignment of the other rows is.
        order: (2, T * K) int64, the assignments sorted by expert, then by token. ``order[0]`` has
            the token of each, ``order[1]`` its index in a flat (T, E) matrix. None in exact mode
            and for batches.
    """

    experts: Tensor
    prices: Tensor
    objective: Tensor
    bound: Tensor
    gap: Tensor
    converged: Tensor
    loads: Tensor
    rounds: int
    bad: Tensor
    scaled: Tensor
    order: Tensor | None = None
