"""The constructive fill; :mod:`fill_plain` documents it and is the same in numpy."""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow.kernels.compiler import jit
from megatron_maxscore.flow.kernels.rows import reduced_row

_NONE = -(1 << 62)
LOW_BITS = 30


@jit
def fill(
    scores_NE, low_N, factor_B, prices_BE, threshold_N, problem, first_row, last_row, capacity_E,
    load_E, x_NE, loss_2,
):  # fmt: skip
    """Make one problem's assignment feasible."""
    num_experts = load_E.shape[0]
    missing_N = _drop(
        scores_NE, low_N, factor_B, prices_BE, threshold_N, problem, first_row, last_row,
        capacity_E, load_E, x_NE, loss_2,
    )  # fmt: skip
    r_E = np.empty(num_experts, np.int64)
    for row in range(first_row, last_row):
        while missing_N[row - first_row] > 0:
            reduced_row(scores_NE, low_N[row], factor_B[problem], prices_BE[problem], row, r_E)
            best, value = -1, np.int64(_NONE)
            for expert in range(num_experts):
                has_room = load_E[expert] < capacity_E[expert] and not x_NE[row, expert]
                if has_room and r_E[expert] > value:
                    best, value = expert, r_E[expert]
            if best >= 0:
                missing_N[row - first_row] -= 1
            else:
                # Whatever has room, the row has already: another row takes it instead.
                best = 0
                while load_E[best] >= capacity_E[best]:
                    best += 1
                other = first_row
                while x_NE[other, best]:
                    other += 1
                reduced_row(
                    scores_NE, low_N[other], factor_B[problem], prices_BE[problem], other, r_E
                )
                value = r_E[best]
                if missing_N[other - first_row] > 0:
                    missing_N[other - first_row] -= 1
                else:
                    given = 0
                    while not x_NE[other, given] or x_NE[row, given]:
                        given += 1
                    x_NE[other, given] = False
                    _add(loss_2, r_E[given])
                    load_E[given] -= 1
                x_NE[other, best] = True
                load_E[best] += 1
                _add(loss_2, -value)
                continue
            x_NE[row, best] = True
            load_E[best] += 1
            _add(loss_2, -value)


@jit
def _add(loss_2, value):
    """Add to a sum that is kept in two parts, since it may need more than 63 bits."""
    loss_2[0] += value >> LOW_BITS
    loss_2[1] += value & ((1 << LOW_BITS) - 1)


@jit
def _drop(
    scores_NE, low_N, factor_B, prices_BE, threshold_N, problem, first_row, last_row, capacity_E,
    load_E, x_NE, loss_2,
):  # fmt: skip
    """Take the lowest bids from overfull experts; return how many experts each row then lacks."""
    num_experts = load_E.shape[0]
    missing_N = np.zeros(last_row - first_row, np.int64)
    r_E = np.empty(num_experts, np.int64)
    over_E = load_E - capacity_E
    first_E = np.zeros(num_experts + 1, np.int64)
    for expert in range(num_experts):
        first_E[expert + 1] = first_E[expert] + (load_E[expert] if over_E[expert] > 0 else 0)
    bid_A = np.empty(first_E[-1], np.int64)
    row_A = np.empty(first_E[-1], np.int64)
    value_A = np.empty(first_E[-1], np.int64)
    fill_E = first_E[:-1].copy()
    for row in range(first_row, last_row):
        holds = False
        for expert in range(num_experts):
            holds |= x_NE[row, expert] and over_E[expert] > 0
        if not holds:
            continue
        reduced_row(scores_NE, low_N[row], factor_B[problem], prices_BE[problem], row, r_E)
        for expert in range(num_experts):
            if over_E[expert] > 0 and x_NE[row, expert]:
                place = fill_E[expert]
                fill_E[expert] += 1
                bid_A[place] = r_E[expert] - threshold_N[row]
                value_A[place] = r_E[expert]
                row_A[place] = row
    for expert in range(num_experts):
        surplus = over_E[expert]
        if surplus <= 0:
            continue
        bids = bid_A[first_E[expert] : first_E[expert + 1]]
        limit = np.partition(bids, surplus - 1)[surplus - 1]
        at_limit = surplus - np.sum(bids < limit)
        for place in range(first_E[expert], first_E[expert + 1]):
            if bid_A[place] > limit:
                continue
            if bid_A[place] == limit:
                if at_limit == 0:
                    continue
                at_limit -= 1
            row = row_A[place]
            x_NE[row, expert] = False
            missing_N[row - first_row] += 1
            _add(loss_2, value_A[place])
        load_E[expert] = capacity_E[expert]
    return missing_N
