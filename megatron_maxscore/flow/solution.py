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
        bound: 0-dim float64, the dual value at the prices before they are rounded to float32: no
            assignment scores more.
        gap: 0-dim float64, ``(bound - objective)`` over the sum of the rows' score ranges; 0 when
            the numerator is 0, inf when only the denominator is.
        converged: 0-dim bool, whether the gap is at most 1e-9, which rounding may leave; feasible
            either way.
        loads: (R, E) int64, every rank's count per expert exactly as dispatched.
        rounds: collectives used.
        bad: 0-dim int64, rows with scores that were not finite and counted as 0; only bounded mode
            goes on with such, exact mode raises.
        scaled: 0-dim int64, rows of this rank that were scaled down as outliers. Objective, bound
            and gap are those of the scaled scores, so that the others' certificate is not lost
            beside them.
        order: (2, T * K) int64, assignments in order of their expert, then of their token: the
            token of each, and its place in a flat (T, E) matrix. None from exact mode, and for
            batches.
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
