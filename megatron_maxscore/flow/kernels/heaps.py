"""Pairing heaps of possible swaps, one for each pair of experts, in common arrays.

A swap (row, arc it would give, arc it would take) is ordered by its cost, then its row. Swaps that
have become impossible are dropped when they come to the top.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow.kernels.compiler import jit

# Columns of a node.
ROW, GIVES, TAKES, CHILD, NEXT = 0, 1, 2, 3, 4
_COLUMNS = 5


@jit
def empty(capacity):
    """Return (M,) int64 costs, (M, 5) int32 nodes, and (1,) int64 the number of nodes in use."""
    return (
        np.empty(capacity, np.int64),
        np.empty((capacity, _COLUMNS), np.int32),
        np.zeros(1, np.int64),
    )


@jit
def grown(cost_M, node_M5, used, room):
    """Return the arrays with room for so many more nodes."""
    if used + room <= cost_M.shape[0]:
        return cost_M, node_M5
    capacity = 2 * (used + room)
    costs, nodes = np.empty(capacity, np.int64), np.empty((capacity, _COLUMNS), np.int32)
    costs[:used], nodes[:used] = cost_M[:used], node_M5[:used]
    return costs, nodes


@jit
def merge(cost_M, node_M5, first, second):
    """Join two heaps, neither of them empty; return the root."""
    is_less = cost_M[first] < cost_M[second] or (
        cost_M[first] == cost_M[second] and node_M5[first, ROW] <= node_M5[second, ROW]
    )
    top, other = (first, second) if is_less else (second, first)
    node_M5[other, NEXT] = node_M5[top, CHILD]
    node_M5[top, CHILD] = other
    return top


@jit
def push(cost_M, node_M5, root, node):
    """Add a node to a heap, -1 if it is empty; return the root."""
    node_M5[node, CHILD], node_M5[node, NEXT] = -1, -1
    return node if root < 0 else merge(cost_M, node_M5, root, node)


@jit
def add(cost_M, node_M5, used_1, root, cost, row, gives, takes):
    """Add a swap to a heap; return the root."""
    node = used_1[0]
    used_1[0] += 1
    cost_M[node] = cost
    node_M5[node, ROW], node_M5[node, GIVES], node_M5[node, TAKES] = row, gives, takes
    return push(cost_M, node_M5, root, np.int32(node))


@jit
def pop(cost_M, node_M5, root):
    """Remove the top of a heap; return the new root, -1 if none is left."""
    # Pair the children from left to right, then join the pairs from right to left.
    child = node_M5[root, CHILD]
    pairs = np.int32(-1)
    while child >= 0:
        following = node_M5[child, NEXT]
        if following < 0:
            pair, rest = child, following
        else:
            rest = node_M5[following, NEXT]
            pair = merge(cost_M, node_M5, child, following)
        node_M5[pair, NEXT] = pairs
        pairs, child = pair, rest
    result = pairs
    if pairs >= 0:
        pairs = node_M5[pairs, NEXT]
        node_M5[result, NEXT] = -1
        while pairs >= 0:
            following = node_M5[pairs, NEXT]
            result = merge(cost_M, node_M5, result, pairs)
            pairs = following
    return result


@jit
def cleaned(cost_M, node_M5, held_A, root):
    """Drop impossible swaps from the top of a heap; return the root."""
    while root >= 0 and (not held_A[node_M5[root, GIVES]] or held_A[node_M5[root, TAKES]]):
        root = pop(cost_M, node_M5, root)
    return root
