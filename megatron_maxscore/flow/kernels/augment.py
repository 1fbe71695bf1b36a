"""The finish's augmentations; see :mod:`megatron_maxscore.flow.finish` for the method.

Decisions come in one order: nodes by index, rows by index.

Shape letters: see :mod:`megatron_maxscore`. Arguments that functions share, besides those of
:mod:`swaps`, which describes what contested rows and heaps are (padded nodes are P, too):

``excess_J`` (J,) int64 units above capacity, the sink last; ``slack_E`` (E,) int64 unused units
that the sink has placed; ``prices_E`` (E,) int64; ``potential_P`` (P,) int64 by how much prices
have risen, 0 where padded; ``cost_JP`` (J, P) int64 cost of moving a unit from one node to another:
the cost of the cheapest swap, or the bound if no known swap costs less, or FAR if there is no arc;
``is_swap_JW`` (J, W) int64, bits that say whether the cost is that of a swap; ``distance_J``,
``level_J`` (J,) int64; ``open_J`` (J,) bool, nodes that a path may lead to; ``path_J`` (J + 1,)
int64.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow.kernels import heaps, swaps
from megatron_maxscore.flow.kernels.compiler import jit
from megatron_maxscore.flow.kernels.vectors import (
    LANES,
    aligned,
    exceeding,
    lowest_bit,
    next_bit,
    padded,
)
from megatron_maxscore.flow.problem import FAR, WHOLE


@jit
def _distances(cost_JP, potential_P, excess_J, distance_J, free_J):
    """Dijkstra from all overfull nodes, on reduced costs.

    Returns the distance within which under-filled nodes have room for the whole excess, or that of
    the farthest one that can be reached; FAR if none can. Distances above it are not final.
    ``distance_J`` is written; ``free_J`` (J,) int64 is for those of nodes that wait to be visited.
    """
    num_nodes = excess_J.shape[0]
    wanted = 0
    for node in range(num_nodes):
        distance_J[node] = FAR
        if excess_J[node] > 0:
            distance_J[node] = 0
            wanted += excess_J[node]
        free_J[node] = distance_J[node]
    last = np.int64(FAR)
    while True:
        best = np.int64(FAR)
        for other in range(num_nodes):
            best = min(best, free_J[other])
        if best >= FAR or (wanted <= 0 and best > last):
            break
        node = 0
        while free_J[node] != best:
            node += 1
        free_J[node] = FAR
        if excess_J[node] < 0 and wanted > 0:
            last = best
            wanted += excess_J[node]
        offset = best - potential_P[node]
        for other in range(num_nodes):
            cost = cost_JP[node, other]
            through = offset + cost + potential_P[other] if cost < FAR else np.int64(FAR)
            is_less = through < distance_J[other]
            distance_J[other] = through if is_less else distance_J[other]
            free_J[other] = through if is_less else free_J[other]
    return last


@jit
def _add_sink(cost_JP, prices_E, slack_E):
    """Write the costs from and to the sink, the last node if there is one more than experts."""
    sink = prices_E.shape[0]
    if cost_JP.shape[0] > sink:
        for expert in range(sink):
            cost_JP[sink, expert] = prices_E[expert]
            cost_JP[expert, sink] = -prices_E[expert] if slack_E[expert] > 0 else FAR


@jit
def nearest(least_EE, prices_E, excess_J, slack_E):
    """Return within which distance there is room for the whole excess, FAR if there is none.

    Args are those of :func:`augment`; ``least_EE`` the cost of the cheapest swap of each pair.
    """
    num_experts, num_nodes = prices_E.shape[0], excess_J.shape[0]
    cost_JP = np.full((num_nodes, num_nodes), FAR)
    for a in range(num_experts):
        for b in range(num_experts):
            cost_JP[a, b] = min(least_EE[a, b], FAR)
    _add_sink(cost_JP, prices_E, slack_E)
    distance_J, free_J = np.empty(num_nodes, np.int64), np.empty(num_nodes, np.int64)
    return _distances(cost_JP, np.zeros(num_nodes, np.int64), excess_J, distance_J, free_J)


@jit
def _refresh(
    has_moved_E, is_near_E, held_A, root_EE, cost_M, node_M5, bound_EP, cost_JP, is_swap_JW
):
    """Write the costs of pairs of an expert that has moved and one that is near."""
    num_experts = root_EE.shape[0]
    for a in range(num_experts):
        if not is_near_E[a]:
            continue
        for b in range(num_experts):
            if not is_near_E[b] or not (has_moved_E[a] or has_moved_E[b]):
                continue
            root = root_EE[a, b]
            if root >= 0:
                root = heaps.cleaned(cost_M, node_M5, held_A, root)
                root_EE[a, b] = root
            bound, bit = bound_EP[a, b], np.int64(1) << (b & 63)
            if root >= 0 and cost_M[root] <= bound:
                cost_JP[a, b] = cost_M[root]
                is_swap_JW[a, b >> 6] |= bit
            else:
                cost_JP[a, b] = bound if bound < WHOLE else FAR
                is_swap_JW[a, b >> 6] &= ~bit
    has_moved_E[:], is_near_E[:] = False, False


@jit
def _find_levels(cost_JP, potential_P, excess_J, is_swap_JW, within_J, tight_JW, level_J, queue_J):
    """Write which arcs are tight, as bits, and the level of each node.

    An arc is tight if its reduced cost is 0 and it is a swap, not a limit. A node's level is the
    number of tight arcs that lead to it from an overfull node, -1 if none do.
    """
    first, last = 0, 0
    for node in range(excess_J.shape[0]):
        level_J[node] = 0 if excess_J[node] > 0 else -1
        if excess_J[node] > 0:
            queue_J[last] = node
            last += 1
    while first < last:
        node = queue_J[first]
        first += 1
        tight_W, cost_P = tight_JW[node], cost_JP[node]
        tight_W[:] = 0
        for place in range(0, cost_P.shape[0], LANES):
            # Reduced costs are not negative.
            costs = exceeding(cost_P, potential_P, place, potential_P[node])
            tight_W[place >> 6] |= (costs ^ ((1 << LANES) - 1)) << (place & 63)
        for word in range(tight_W.shape[0]):
            tight_W[word] &= is_swap_JW[node, word]
            found = tight_W[word]
            while found:
                other = 64 * word + lowest_bit(found)
                found &= found - 1
                if level_J[other] < 0 and within_J[other]:
                    level_J[other] = level_J[node] + 1
                    queue_J[last] = other
                    last += 1


@jit
def _find_path(
    source, excess_J, slack_E, cost_JP, tight_JW, level_J, held_A, root_EE, cost_M, node_M5,
    taken_M, open_J, next_J, path_J,
):  # fmt: skip
    """Look for a path to a node that lacks units; each arc is tight and leads one level farther.

    Depth first; a node that leads nowhere is closed. Returns the number of arcs, -1 if there is no
    path. ``next_J`` (J,) int64 is the next node to try from each node.
    """
    num_experts = root_EE.shape[0]
    length = 0
    path_J[0], next_J[source], open_J[source] = source, 0, False
    while length >= 0:
        a = path_J[length]
        if excess_J[a] < 0:
            return length
        b, step = next_bit(tight_JW[a], next_J[a]), -1
        while b >= 0 and step < 0:
            if open_J[b] and level_J[b] == level_J[a] + 1:
                if b == num_experts:
                    leads = slack_E[a] > 0
                else:
                    leads = a == num_experts or swaps.count_movers(
                        a, b, 1, cost_JP[a, b], held_A, root_EE, cost_M, node_M5, taken_M
                    )
                if leads:
                    step = b
            next_J[a] = b + 1
            b = next_bit(tight_JW[a], b + 1)
        if step >= 0:
            length += 1
            path_J[length], next_J[step], open_J[step] = step, 0, False
        else:
            length -= 1
    return -1


@jit
def _send(
    length, path_J, excess_J, slack_E, cost_JP, first_C, expert_A, value_A, held_A, bound_EP,
    root_EE, cost_M, node_M5, used_1, taken_M, has_moved_E, is_near_E,
):  # fmt: skip
    """Move as many units along a path as it carries; returns the heaps' arrays."""
    sink = root_EE.shape[0]
    source, target = path_J[0], path_J[length]
    units = min(excess_J[source], -excess_J[target])
    for place in range(length):
        a, b = path_J[place], path_J[place + 1]
        if b == sink:
            units = min(units, slack_E[a])
        elif a != sink:
            units = swaps.count_movers(
                a, b, units, cost_JP[a, b], held_A, root_EE, cost_M, node_M5, taken_M
            )
    for place in range(length):
        a, b = path_J[place], path_J[place + 1]
        if a == sink:
            slack_E[b] += units
        elif b == sink:
            slack_E[a] -= units
        else:
            for _ in range(units):
                root = heaps.cleaned(cost_M, node_M5, held_A, root_EE[a, b])
                root_EE[a, b] = heaps.pop(cost_M, node_M5, root)
                row = node_M5[root, heaps.ROW]
                arcs = first_C[row + 1] - first_C[row]
                cost_M, node_M5 = heaps.grown(cost_M, node_M5, used_1[0], arcs)
                swaps.move(
                    node_M5[root, heaps.GIVES], node_M5[root, heaps.TAKES], row, first_C, expert_A,
                    value_A, held_A, bound_EP, root_EE, cost_M, node_M5, used_1, has_moved_E,
                    is_near_E,
                )  # fmt: skip
    excess_J[source] -= units
    excess_J[target] += units
    return cost_M, node_M5


@jit
def augment(
    first_C, expert_A, value_A, held_A, prices_E, limit_EP, stride, wanted_EE, excess_J, slack_E,
    potential_J, lacks_EE,
):  # fmt: skip
    """Move units along shortest paths, as long as these consist of swaps within their limits.

    ``limit_EP`` (E, P) int64: swaps that are not among the arcs cost more, or as much if ``stride``
    is not 1. It is changed. ``wanted_EE`` (E, E) int32: about how many swaps of each pair take
    part. Written are ``potential_J`` (J,) int64, by how much prices have risen, and ``lacks_EE``
    (E, E) bool, where another swap was needed to go on.
    """
    num_experts, num_nodes = prices_E.shape[0], excess_J.shape[0]
    root_EE = np.full((num_experts, num_experts), -1, np.int32)
    # What is left out costs no less.
    bound_EP = limit_EP + np.int64(stride == 1)
    cost_M, node_M5, used_1 = swaps.fill(
        first_C, expert_A, value_A, held_A, wanted_EE, limit_EP, bound_EP, root_EE
    )
    # Padded to whole vectors: nothing leads to what is beyond the last node.
    width = padded(num_nodes)
    cost_JP, potential_P = aligned(num_nodes * width).reshape(num_nodes, width), aligned(width)
    cost_JP[:], potential_P[:] = FAR, 0
    is_swap_JW = np.zeros((num_nodes, (width + 63) // 64), np.int64)
    if num_nodes > num_experts:
        is_swap_JW[num_experts] = -1
        is_swap_JW[:, num_experts >> 6] |= np.int64(1) << (num_experts & 63)
    tight_JW = np.empty_like(is_swap_JW)
    distance_J, free_J = aligned(num_nodes), aligned(num_nodes)
    level_J, queue_J = np.empty(num_nodes, np.int64), np.empty(num_nodes, np.int64)
    open_J = np.empty(num_nodes, np.bool_)
    has_moved_E, is_near_E = np.ones(num_experts, np.bool_), np.ones(num_experts, np.bool_)
    path_J, next_J = np.empty(num_nodes + 1, np.int64), np.zeros(num_nodes, np.int64)
    taken_M = np.empty(max(1, excess_J.max()), np.int32)
    while excess_J.max() > 0:
        _refresh(
            has_moved_E, is_near_E, held_A, root_EE, cost_M, node_M5, bound_EP, cost_JP, is_swap_JW
        )
        _add_sink(cost_JP, prices_E, slack_E)
        last = _distances(cost_JP, potential_P, excess_J, distance_J, free_J)
        if last >= FAR:
            break
        for node in range(num_nodes):
            open_J[node] = distance_J[node] <= last
            potential_P[node] += last - min(distance_J[node], last)
            potential_J[node] = potential_P[node]
        _find_levels(cost_JP, potential_P, excess_J, is_swap_JW, open_J, tight_JW, level_J, queue_J)
        has_sent = False
        for source in range(num_nodes):
            while excess_J[source] > 0 and open_J[source]:
                length = _find_path(
                    source, excess_J, slack_E, cost_JP, tight_JW, level_J, held_A, root_EE, cost_M,
                    node_M5, taken_M, open_J, next_J, path_J,
                )  # fmt: skip
                if length < 0:
                    break
                cost_M, node_M5 = _send(
                    length, path_J, excess_J, slack_E, cost_JP, first_C, expert_A, value_A, held_A,
                    bound_EP, root_EE, cost_M, node_M5, used_1, taken_M, has_moved_E, is_near_E,
                )  # fmt: skip
                has_sent = True
                for place in range(length + 1):
                    open_J[path_J[place]] = True
        if not has_sent:
            # From here on, only arcs that stand for bounds lead farther.
            for a in range(num_experts):
                for b in range(num_experts):
                    is_tight = cost_JP[a, b] + potential_P[b] == potential_P[a]
                    lacks_EE[a, b] = is_tight and level_J[a] >= 0 and level_J[b] < 0
            break


@jit
def level_out_problems(
    first_problem, last_problem, first_B, first_C, expert_A, value_A, held_A, excess_BJ
):
    """Run :func:`level_out` on each problem."""
    for problem in range(first_problem, last_problem):
        a, b = first_B[problem], first_B[problem + 1]
        swaps.level_out(first_C[a : b + 1], expert_A, value_A, held_A, excess_BJ[problem])


@jit
def augment_problems(
    first_problem, last_problem, first_B, first_C, expert_A, value_A, held_A, prices_BE,
    slot_B, limit_FEP, stride_B, wanted_FEE, excess_BJ, slack_BE, has_sink_B, potential_BJ,
    lacks_FEE,
):  # fmt: skip
    """Run :func:`augment` on each problem that has a slot."""
    num_experts = prices_BE.shape[1]
    for problem in range(first_problem, last_problem):
        slot = slot_B[problem]
        if slot < 0:
            continue
        a, b = first_B[problem], first_B[problem + 1]
        arc_a, arc_b = first_C[a], first_C[b]
        nodes = num_experts + np.int64(has_sink_B[problem])
        augment(
            first_C[a : b + 1] - arc_a, expert_A[arc_a:arc_b], value_A[arc_a:arc_b],
            held_A[arc_a:arc_b], prices_BE[problem], limit_FEP[slot].copy(), stride_B[problem],
            wanted_FEE[slot], excess_BJ[problem, :nodes], slack_BE[problem],
            potential_BJ[problem, :nodes], lacks_FEE[slot],
        )  # fmt: skip
