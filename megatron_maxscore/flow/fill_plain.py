"""The constructive fill in numpy; :mod:`kernels.fill` is the same with numba.

Overfull experts give up their lowest bids. Rows that then lack experts take, in order of their
index, the best ones that have room. Should all of these be theirs already, another row takes one
and gives, if it lacks none itself, one of its own that the row has not. With every arc allowed this
always ends in a feasible assignment: the other row holds more experts than the row does, so it has
one to give.

Shape letters: N rows, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_maxscore.flow.problem import BoolArray, IntArray

_NONE = -(1 << 62)


def fill(
    reduced: Callable[[IntArray], IntArray],
    threshold_N: IntArray,
    capacity_E: IntArray,
    load_E: IntArray,
    x_NE: BoolArray,
) -> int:
    """Make one problem's assignment feasible.

    Args:
        reduced: returns the (n, E) int64 reduced scores of rows given by their (n,) indices.
        threshold_N: (N,) int64, bids are reduced scores less these.
        capacity_E: (E,) int64.
        load_E: (E,) int64, changed in place.
        x_NE: (N, E) bool, k experts per row, changed in place.

    Returns:
        By how much the sum of reduced scores has fallen.
    """
    loss = 0
    missing_N = np.zeros(x_NE.shape[0], np.int64)
    over = np.flatnonzero(load_E > capacity_E)
    holders = np.flatnonzero(x_NE[:, over].any(1))
    r_HE = reduced(holders)
    for expert in over.tolist():
        has = x_NE[holders, expert]
        rows, values = holders[has], r_HE[has, expert]
        order = np.argsort(values - threshold_N[rows], kind="stable")
        drops = order[: int(load_E[expert] - capacity_E[expert])]
        x_NE[rows[drops], expert] = False
        missing_N[rows[drops]] += 1
        loss += sum(values[drops].tolist())
        load_E[expert] = capacity_E[expert]
    for row in np.flatnonzero(missing_N).tolist():
        r_E = reduced(np.array([row]))[0]
        while missing_N[row] > 0:
            room_E = (load_E < capacity_E) & ~x_NE[row]
            if room_E.any():
                best = int(np.where(room_E, r_E, _NONE).argmax())
                missing_N[row] -= 1
                x_NE[row, best] = True
                loss -= int(r_E[best])
            else:
                best = int((load_E < capacity_E).argmax())
                other = int((~x_NE[:, best]).argmax())
                r_other_E = reduced(np.array([other]))[0]
                if missing_N[other] > 0:
                    missing_N[other] -= 1
                else:
                    given = int((x_NE[other] & ~x_NE[row]).argmax())
                    x_NE[other, given] = False
                    loss += int(r_other_E[given])
                    load_E[given] -= 1
                x_NE[other, best] = True
                loss -= int(r_other_E[best])
            load_E[best] += 1
    return loss
