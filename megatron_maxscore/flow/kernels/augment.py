"""The finish's augmentations; see :mod:`megatron_maxscore.flow.finish` for the method.

Decisions come in one order: nodes by index, rows by index.
The cost of moving from expert a to b is the top of a heap of swaps (:mod:`heaps`).

Shape letters: A arcs (an expert that a contested row has or could have), R contested rows, N nodes
(the experts, and the sink as the last one where capacities leave slack), E experts, M swaps.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow.kernels import heaps
from megatron_maxscore.flow.kernels.compiler import jit
from megatron_maxscore.flow.kernels.vectors import LANES, aligned, exceeding, next_bit, padded
from megatron_maxscore.flow.problem import FAR


@jit
def _all_swaps(first_R, expert_A, value_A, held_A, root_NN):
    """Put every possible swap of every row into the heap of its two experts."""
    count = 0
    for row in range(first_R.shape[0] - 1):
        held = 0
        for arc in range(first_R[row], first_R[row + 1]):
            held += np.int64(held_A[arc])
        count += held * (first_R[row + 1] - first_R[row] - held)
    cost_M, node_M5, used_1 = heaps.empty(count + count // 2 + 1024)
    for row in range(first_R.shape[0] - 1):
        for gives in range(first_R[row], first_R[row + 1]):
            if held_A[gives]:
                for takes in range(first_R[row], first_R[row + 1]):
                    if not held_A[takes]:
                        a, b = expert_A[gives], expert_A[takes]
                        cost = value_A[gives] - value_A[takes]
                        root_NN[a, b] = heaps.add(
                            cost_M, node_M5, used_1, root_NN[a, b], cost, row, gives, takes
                        )
    return cost_M, node_M5, used_1


@jit
def _move(
    gives, takes, row, first_R, expert_A, value_A, held_A, root_NN, cost_M, node_M5, used_1,
    changed_E,
):  # fmt: skip
    """Let a row give the expert of one arc and take that of another; add its new swaps.

    Pairs of the experts that are marked as changed may have lost or gained swaps.
    """
    a, b = expert_A[gives], expert_A[takes]
    held_A[gives], held_A[takes] = False, True
    for arc in range(first_R[row], first_R[row + 1]):
        expert = expert_A[arc]
        changed_E[expert] = True
        if held_A[arc]:
            cost = value_A[arc] - value_A[gives]
            root_NN[expert, a] = heaps.add(
                cost_M, node_M5, used_1, root_NN[expert, a], cost, row, arc, gives
            )
        elif arc != gives:
            cost = value_A[takes] - value_A[arc]
            root_NN[b, expert] = heaps.add(
                cost_M, node_M5, used_1, root_NN[b, expert], cost, row, takes, arc
            )


@jit
def _count_movers(a, b, most, loss, held_A, root_NN, cost_M, node_M5, taken_M):
    """Count rows, up to ``most``, that can move from a to b at exactly ``loss``."""
    root = heaps.cleaned(cost_M, node_M5, held_A, root_NN[a, b])
    root_NN[a, b] = root
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
    root_NN[a, b] = root
    return count


@jit
def _distances(cost_NP, potential_P, excess_N, hop_bits, key_N, free_N):
    """Dijkstra from all overfull nodes, on reduced costs, then on the number of arcs.

    Both are in one key, ``cost << hop_bits | arcs``. Returns the key up to which under-filled nodes
    have room for the whole excess, or that of the farthest one that can be reached; FAR if none
    can. Keys above it are not final. ``free_N`` is for keys of nodes that wait to be visited.
    """
    num_nodes = excess_N.shape[0]
    wanted = 0
    for node in range(num_nodes):
        key_N[node] = FAR
        if excess_N[node] > 0:
            key_N[node] = 0
            wanted += excess_N[node]
        free_N[node] = key_N[node]
    last = np.int64(FAR)
    while True:
        best = np.int64(FAR)
        for other in range(num_nodes):
            best = min(best, free_N[other])
        if best >= FAR or (wanted <= 0 and best > last):
            break
        node = 0
        while free_N[node] != best:
            node += 1
        free_N[node] = FAR
        if excess_N[node] < 0 and wanted > 0:
            last = best
            wanted += excess_N[node]
        offset, least = -potential_P[node], best + 1
        for other in range(num_nodes):
            cost = cost_NP[node, other]
            reduced = offset + cost + potential_P[other]
            through = least + (reduced << hop_bits) if cost < FAR else np.int64(FAR)
            is_less = through < key_N[other]
            key_N[other] = through if is_less else key_N[other]
            free_N[other] = through if is_less else free_N[other]
    return last


@jit
def _tight_arcs(cost_P, potential_P, potential, tight_W):
    """Write as bits which arcs of a node have reduced cost 0."""
    tight_W[:] = 0
    for place in range(0, cost_P.shape[0], LANES):
        # Reduced costs are not negative.
        costs = exceeding(cost_P, potential_P, place, potential)
        tight_W[place >> 6] |= (costs ^ ((1 << LANES) - 1)) << (place & 63)


@jit
def augment(first_R, expert_A, value_A, held_A, prices_E, excess_N, slack_E, reach, potential_N):
    """Move units along shortest paths until nothing is out of balance, within ``reach``.

    Returns 0 if done, 1 if the contested rows do not reach far enough.
    """
    num_experts, num_nodes = prices_E.shape[0], excess_N.shape[0]
    sink = num_experts if num_nodes > num_experts else -1
    root_NN = np.full((num_experts, num_experts), -1, np.int32)
    cost_M, node_M5, used_1 = _all_swaps(first_R, expert_A, value_A, held_A, root_NN)
    # Padded to whole vectors: nothing leads to what is beyond the last node.
    width = padded(num_nodes)
    cost_NP, potential_P = aligned(num_nodes * width).reshape(num_nodes, width), aligned(width)
    cost_NP[:], potential_P[:] = FAR, 0
    tight_NW = np.empty((num_nodes, (width + 63) // 64), np.int64)
    seen_N = np.full(num_nodes, -1, np.int64)
    hop_bits = 1
    while 1 << hop_bits <= num_nodes:
        hop_bits += 1
    hop_mask = (1 << hop_bits) - 1
    key_N, free_N = aligned(num_nodes), aligned(num_nodes)
    open_N = np.empty(num_nodes, np.bool_)
    changed_E = np.ones(num_experts, np.bool_)
    path_N = np.empty(num_nodes + 1, np.int64)
    next_N = np.zeros(num_nodes, np.int64)
    taken_M = np.empty(max(1, excess_N.max()), np.int32)
    phase = -1
    while excess_N.max() > 0:
        phase += 1
        for a in range(num_experts):
            if changed_E[a]:
                for b in range(num_experts):
                    if changed_E[b]:
                        root = heaps.cleaned(cost_M, node_M5, held_A, root_NN[a, b])
                        root_NN[a, b] = root
                        cost_NP[a, b] = cost_M[root] if root >= 0 else FAR
            if sink >= 0:
                cost_NP[sink, a] = prices_E[a]
                cost_NP[a, sink] = -prices_E[a] if slack_E[a] > 0 else FAR
        changed_E[:] = False
        last = _distances(cost_NP, potential_P, excess_N, hop_bits, key_N, free_N)
        if last >= FAR:
            return 1
        limit = last >> hop_bits
        highest, lowest = np.int64(-FAR), np.int64(FAR)
        for node in range(num_nodes):
            moved = potential_P[node] + limit - min(key_N[node] >> hop_bits, limit)
            highest, lowest = max(highest, moved), min(lowest, moved)
        # Arcs that were left out cost more than reach, so prices may differ by that much.
        if highest - lowest > reach:
            return 1
        for node in range(num_nodes):
            potential_P[node] += limit - min(key_N[node] >> hop_bits, limit)
            potential_N[node] = potential_P[node]
            open_N[node] = key_N[node] <= last
        for source in range(num_nodes):
            while excess_N[source] > 0 and open_N[source]:
                # Depth first over arcs of reduced cost 0, each a step farther from the sources; a
                # node that leads nowhere stays closed.
                length = 0
                path_N[0], next_N[source], open_N[source] = source, 0, False
                found = False
                while length >= 0 and not found:
                    a = path_N[length]
                    if excess_N[a] < 0:
                        found = True
                        break
                    if seen_N[a] != phase:
                        seen_N[a] = phase
                        _tight_arcs(cost_NP[a], potential_P, potential_P[a], tight_NW[a])
                    hops = (key_N[a] & hop_mask) + 1
                    b, step = next_bit(tight_NW[a], next_N[a]), -1
                    while b >= 0 and step < 0:
                        if open_N[b] and key_N[b] & hop_mask == hops:
                            if b == sink:
                                leads = slack_E[a] > 0
                            else:
                                leads = a == sink or _count_movers(
                                    a, b, 1, cost_NP[a, b], held_A, root_NN, cost_M, node_M5,
                                    taken_M,
                                )  # fmt: skip
                            if leads:
                                step = b
                        next_N[a] = b + 1
                        b = next_bit(tight_NW[a], b + 1)
                    if step >= 0:
                        length += 1
                        path_N[length], next_N[step], open_N[step] = step, 0, False
                    else:
                        length -= 1
                if not found:
                    break
                target = path_N[length]
                units = min(excess_N[source], -excess_N[target])
                for place in range(length):
                    a, b = path_N[place], path_N[place + 1]
                    if b == sink:
                        units = min(units, slack_E[a])
                    elif a != sink:
                        units = _count_movers(
                            a, b, units, cost_NP[a, b], held_A, root_NN, cost_M, node_M5, taken_M
                        )
                for place in range(length):
                    a, b = path_N[place], path_N[place + 1]
                    if a == sink:
                        slack_E[b] += units
                    elif b == sink:
                        slack_E[a] -= units
                    else:
                        for _ in range(units):
                            root = heaps.cleaned(cost_M, node_M5, held_A, root_NN[a, b])
                            root_NN[a, b] = heaps.pop(cost_M, node_M5, root)
                            row = node_M5[root, heaps.ROW]
                            arcs = first_R[row + 1] - first_R[row]
                            cost_M, node_M5 = heaps.grown(cost_M, node_M5, used_1[0], arcs)
                            _move(
                                node_M5[root, heaps.GIVES], node_M5[root, heaps.TAKES], row,
                                first_R, expert_A, value_A, held_A, root_NN,
                                cost_M, node_M5, used_1, changed_E,
                            )  # fmt: skip
                excess_N[source] -= units
                excess_N[target] += units
                for place in range(length + 1):
                    open_N[path_N[place]] = True
    return 0


@jit
def augment_problems(
    first_problem, last_problem, first_B, first_R, expert_A, value_A, held_A, prices_BE, excess_BN,
    slack_BE, has_sink_B, reach_B, potential_BN, status_B,
):  # fmt: skip
    """Run :func:`augment` on each problem that has a reach; the others keep their status."""
    num_experts = prices_BE.shape[1]
    for problem in range(first_problem, last_problem):
        if reach_B[problem] < 0:
            continue
        a, b = first_B[problem], first_B[problem + 1]
        arc_a, arc_b = first_R[a], first_R[b]
        nodes = num_experts + np.int64(has_sink_B[problem])
        status_B[problem] = augment(
            first_R[a : b + 1] - arc_a, expert_A[arc_a:arc_b], value_A[arc_a:arc_b],
            held_A[arc_a:arc_b], prices_BE[problem], excess_BN[problem, :nodes], slack_BE[problem],
            reach_B[problem], potential_BN[problem, :nodes],
        )  # fmt: skip
