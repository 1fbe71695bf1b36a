"""Swaps of contested rows: what a row gives, what it takes, and what that costs.

A swap lets a row give the expert of one of its arcs and take that of another. For each ordered pair
of experts (a, b) a heap (:mod:`heaps`) holds the swaps that give a and take b, the cheapest on top,
as far as they cost less than the pair's bound.

Shape letters: see :mod:`megatron_maxscore`. Arguments that all functions share:

``first_C`` (C + 1,) int64, row r has the arcs from ``first_C[r]`` to before ``first_C[r + 1]``;
``expert_A`` (A,) int32, ``value_A`` (A,) int64 reduced score, ``held_A`` (A,) bool, whether the row
has the expert; ``root_EE`` (E, E) int32 tops of heaps, -1 where a heap is empty; ``cost_M`` (M,)
int64, ``node_M5`` (M, 5) int32 and ``used_1`` (1,) int64, the heaps' arrays; ``bound_EP`` (E, P)
int64. All are C-contiguous.

Example: a row has experts 0 and 1 at reduced scores 9 and 7, and could have expert 2 at 6. It has
the swaps (0, 2) of cost 3 and (1, 2) of cost 1. After it has moved from 1 to 2, it has (0, 1) of
cost 2, and (2, 1) of cost -1, which undoes the move.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow.kernels import heaps
from megatron_maxscore.flow.kernels.compiler import jit


@jit
def level_out(first_C, expert_A, value_A, held_A, excess_J):
    """Let each row in turn give experts above capacity for equal ones that miss the most.

    ``excess_J`` (J,) int64 units above capacity is changed in place.
    """
    for row in range(first_C.shape[0] - 1):
        for gives in range(first_C[row], first_C[row + 1]):
            a = expert_A[gives]
            if not held_A[gives] or excess_J[a] <= 0:
                continue
            best, least = -1, np.int64(0)
            for takes in range(first_C[row], first_C[row + 1]):
                is_equal = value_A[takes] == value_A[gives] and not held_A[takes]
                if is_equal and excess_J[expert_A[takes]] < least:
                    best, least = takes, excess_J[expert_A[takes]]
            if best >= 0:
                held_A[gives], held_A[best] = False, True
                excess_J[a] -= 1
                excess_J[expert_A[best]] += 1


@jit
def fill(first_C, expert_A, value_A, held_A, wanted_EE, limit_EP, bound_EP, root_EE):
    """Put swaps that cost no more than their limit into the heaps of their two experts.

    ``wanted_EE`` (E, E) int32 is how many swaps each pair should have. Each time a pair has got so
    many more, its bound becomes the cost of the dearest of them, and its limit one less. Swaps that
    are left out cost no less than the bound. Both are written. Returns the heaps' arrays.
    """
    cost_M, node_M5, used_1 = heaps.empty(4 * expert_A.shape[0] + 1024)
    room_EE, most_EE = wanted_EE.copy(), np.zeros(wanted_EE.shape, np.int64)
    for row in range(first_C.shape[0] - 1):
        arcs = first_C[row + 1] - first_C[row]
        cost_M, node_M5 = heaps.grown(cost_M, node_M5, used_1[0], arcs * arcs // 4)
        for gives in range(first_C[row], first_C[row + 1]):
            if held_A[gives]:
                a, value = expert_A[gives], value_A[gives]
                for takes in range(first_C[row], first_C[row + 1]):
                    b, cost = expert_A[takes], value - value_A[takes]
                    if cost > limit_EP[a, b] or held_A[takes]:
                        continue
                    root_EE[a, b] = heaps.add(
                        cost_M, node_M5, used_1, root_EE[a, b], cost, row, gives, takes
                    )
                    most_EE[a, b] = max(most_EE[a, b], cost)
                    room_EE[a, b] -= 1
                    if room_EE[a, b] == 0:
                        bound_EP[a, b], limit_EP[a, b] = most_EE[a, b], most_EE[a, b] - 1
                        most_EE[a, b] = 0
                        room_EE[a, b] = wanted_EE[a, b]
    return cost_M, node_M5, used_1


@jit
def move(
    gives, takes, row, first_C, expert_A, value_A, held_A, bound_EP, root_EE, cost_M, node_M5,
    used_1, has_moved_E, is_near_E,
):  # fmt: skip
    """Let a row give the expert of one arc and take that of another; add its new swaps.

    The two experts have moved, and all experts of the row's arcs are near. A pair of an expert that
    has moved and one that is near may lose or gain swaps. Both (E,) bool are written.
    """
    a, b = expert_A[gives], expert_A[takes]
    held_A[gives], held_A[takes] = False, True
    has_moved_E[a] = has_moved_E[b] = True
    for arc in range(first_C[row], first_C[row + 1]):
        expert = expert_A[arc]
        is_near_E[expert] = True
        if held_A[arc]:
            cost = value_A[arc] - value_A[gives]
            if cost <= bound_EP[expert, a]:
                root_EE[expert, a] = heaps.add(
                    cost_M, node_M5, used_1, root_EE[expert, a], cost, row, arc, gives
                )
        elif arc != gives:
            cost = value_A[takes] - value_A[arc]
            if cost <= bound_EP[b, expert]:
                root_EE[b, expert] = heaps.add(
                    cost_M, node_M5, used_1, root_EE[b, expert], cost, row, takes, arc
                )


@jit
def count_movers(a, b, most, loss, held_A, root_EE, cost_M, node_M5, taken_M):
    """Count rows, up to ``most``, that can move from a to b at exactly ``loss``.

    ``taken_M`` int32 has room for ``most`` swaps.
    """
    root = heaps.cleaned(cost_M, node_M5, held_A, root_EE[a, b])
    root_EE[a, b] = root
    if root < 0 or cost_M[root] != loss:
        return 0
    if most == 1:
        return 1
    count, taken = 0, 0
    last = np.int32(-1)
    while root >= 0 and cost_M[root] == loss and count < most:
        # A row that gave and regained an expert can be there twice.
        if node_M5[root, heaps.ROW] != last:
            last = node_M5[root, heaps.ROW]
            taken_M[taken] = root
            taken += 1
            count += 1
        root = heaps.cleaned(cost_M, node_M5, held_A, heaps.pop(cost_M, node_M5, root))
    for index in range(taken):
        root = heaps.push(cost_M, node_M5, root, taken_M[index])
    root_EE[a, b] = root
    return count
