"""The finish's augmentations, fused with numba; :mod:`finish_plain` is the same in Python.

See :mod:`finish` for the method. Both keep one order of decisions: nodes by index, rows by index.

Shape letters: A arcs (an expert that a contested row has or could have), R contested rows, N nodes
(the experts, and the sink as the last one where capacities leave slack), E experts.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow.kernels.compiler import jit
from megatron_maxscore.flow.problem import FAR


@jit
def _by_expert(first_R, expert_A, num_experts):
    """Return arcs ordered by expert, then row: offsets per expert, arc and row of each place."""
    first_E = np.zeros(num_experts + 1, np.int64)
    for arc in range(expert_A.shape[0]):
        first_E[expert_A[arc] + 1] += 1
    for expert in range(num_experts):
        first_E[expert + 1] += first_E[expert]
    fill_E = first_E[:-1].copy()
    arc_A = np.empty(expert_A.shape[0], np.int32)
    row_A = np.empty(expert_A.shape[0], np.int32)
    for row in range(first_R.shape[0] - 1):
        for arc in range(first_R[row], first_R[row + 1]):
            place = fill_E[expert_A[arc]]
            fill_E[expert_A[arc]] += 1
            arc_A[place], row_A[place] = arc, row
    return first_E, arc_A, row_A


@jit
def _relax_row(row, first_R, expert_A, value_A, held_A, cost_NN):
    """Lower the costs of all arcs a -> b that the row offers."""
    for arc in range(first_R[row], first_R[row + 1]):
        if held_A[arc]:
            a, value = expert_A[arc], value_A[arc]
            for other in range(first_R[row], first_R[row + 1]):
                if not held_A[other]:
                    loss = value - value_A[other]
                    if loss < cost_NN[a, expert_A[other]]:
                        cost_NN[a, expert_A[other]] = loss


@jit
def _refresh(a, num_experts, first_R, expert_A, value_A, held_A, first_E, arc_A, row_A, cost_NN):
    """Recompute the costs of all arcs that leave expert a."""
    for b in range(num_experts):
        cost_NN[a, b] = FAR
    for place in range(first_E[a], first_E[a + 1]):
        arc = arc_A[place]
        if held_A[arc]:
            value, row = value_A[arc], row_A[place]
            for other in range(first_R[row], first_R[row + 1]):
                if not held_A[other]:
                    loss = value - value_A[other]
                    if loss < cost_NN[a, expert_A[other]]:
                        cost_NN[a, expert_A[other]] = loss


@jit
def _movers(a, b, most, loss, value_A, held_A, first_E, arc_A, row_A, from_M, to_M):
    """Find up to ``most`` rows, by index, that can move from a to b at exactly ``loss``."""
    count = 0
    here, there = first_E[a], first_E[b]
    while here < first_E[a + 1] and there < first_E[b + 1]:
        row, other = row_A[here], row_A[there]
        if row < other:
            here += 1
        elif row > other:
            there += 1
        else:
            arc, target = arc_A[here], arc_A[there]
            if held_A[arc] and not held_A[target] and value_A[arc] - value_A[target] == loss:
                from_M[count], to_M[count] = arc, target
                count += 1
                if count == most:
                    break
            here += 1
            there += 1
    return count


@jit
def _move(arc, target, rows_A, first_R, expert_A, value_A, held_A, cost_NN, dirty_N):
    """Let a row give the expert of one arc and take that of another; update costs.

    Costs that may have risen are left, too low, and their expert is marked dirty.
    """
    a, b = expert_A[arc], expert_A[target]
    row = rows_A[arc]
    held_A[arc], held_A[target] = False, True
    gives, takes = value_A[arc], value_A[target]
    for other in range(first_R[row], first_R[row + 1]):
        expert, value = expert_A[other], value_A[other]
        if held_A[other]:
            if other != target and value - takes == cost_NN[expert, b]:
                dirty_N[expert] = True
            if value - gives < cost_NN[expert, a]:
                cost_NN[expert, a] = value - gives
        else:
            if other != arc and gives - value == cost_NN[a, expert]:
                dirty_N[a] = True
            if takes - value < cost_NN[b, expert]:
                cost_NN[b, expert] = takes - value
    if gives - takes == cost_NN[a, b]:
        dirty_N[a] = True


@jit
def _distances(cost_NN, potential_N, excess_N, hop_bits, key_N, open_N):
    """Dijkstra from all overfull nodes, on reduced costs, then on the number of arcs.

    Both are in one key, ``cost << hop_bits | arcs``. Returns the key up to which under-filled nodes
    have room for the whole excess, or that of the farthest one that can be reached; FAR if none
    can. Keys above it are not final.
    """
    num_nodes = excess_N.shape[0]
    wanted = 0
    for node in range(num_nodes):
        key_N[node] = FAR
        open_N[node] = True
        if excess_N[node] > 0:
            key_N[node] = 0
            wanted += excess_N[node]
    last = np.int64(FAR)
    while True:
        node, best = -1, np.int64(FAR)
        for other in range(num_nodes):
            if open_N[other] and key_N[other] < best:
                node, best = other, key_N[other]
        if node < 0 or (wanted <= 0 and best > last):
            break
        open_N[node] = False
        if excess_N[node] < 0 and wanted > 0:
            last = best
            wanted += excess_N[node]
        offset = -potential_N[node]
        for other in range(num_nodes):
            if cost_NN[node, other] < FAR:
                reduced = offset + cost_NN[node, other] + potential_N[other]
                through = best + (reduced << hop_bits) + 1
                if through < key_N[other]:
                    key_N[other] = through
    return last


@jit
def augment(
    first_R, expert_A, value_A, held_A, prices_E, excess_N, slack_E, reach, max_phases, potential_N
):
    """Move units along shortest paths until nothing is out of balance, within ``reach``.

    Returns 0 if done, 1 if the contested rows do not reach far enough, 2 if ``max_phases`` is up.
    """
    num_experts, num_nodes = prices_E.shape[0], excess_N.shape[0]
    sink = num_experts if num_nodes > num_experts else -1
    first_E, arc_A, row_A = _by_expert(first_R, expert_A, num_experts)
    rows_A = np.empty(expert_A.shape[0], np.int32)
    rows_A[arc_A] = row_A
    cost_NN = np.full((num_nodes, num_nodes), FAR, np.int64)
    for row in range(first_R.shape[0] - 1):
        _relax_row(row, first_R, expert_A, value_A, held_A, cost_NN)
    if sink >= 0:
        for expert in range(num_experts):
            cost_NN[sink, expert] = prices_E[expert]
            if slack_E[expert] > 0:
                cost_NN[expert, sink] = -prices_E[expert]
    hop_bits = 1
    while 1 << hop_bits <= num_nodes:
        hop_bits += 1
    hop_mask = (1 << hop_bits) - 1
    key_N = np.empty(num_nodes, np.int64)
    open_N = np.empty(num_nodes, np.bool_)
    leads_NN = np.empty((num_nodes, num_nodes), np.bool_)
    dirty_N = np.zeros(num_nodes, np.bool_)
    path_N = np.empty(num_nodes + 1, np.int64)
    next_N = np.zeros(num_nodes, np.int64)
    most = 1
    for expert in range(num_experts):
        most = max(most, first_E[expert + 1] - first_E[expert])
    from_M, to_M = np.empty(most, np.int64), np.empty(most, np.int64)
    for phase in range(max_phases + 1):
        if excess_N.max() <= 0:
            return 0
        if phase == max_phases:
            return 2
        last = _distances(cost_NN, potential_N, excess_N, hop_bits, key_N, open_N)
        if last >= FAR:
            return 1
        limit = last >> hop_bits
        highest, lowest = np.int64(-FAR), np.int64(FAR)
        for node in range(num_nodes):
            moved = potential_N[node] + limit - min(key_N[node] >> hop_bits, limit)
            highest, lowest = max(highest, moved), min(lowest, moved)
        # Arcs that were left out cost more than reach, so prices may differ by that much.
        if highest - lowest > reach:
            return 1
        for node in range(num_nodes):
            potential_N[node] += limit - min(key_N[node] >> hop_bits, limit)
            open_N[node] = key_N[node] <= last
        for a in range(num_nodes):
            hops = (key_N[a] & hop_mask) + 1
            for b in range(num_nodes):
                leads_NN[a, b] = (
                    cost_NN[a, b] == potential_N[a] - potential_N[b] and key_N[b] & hop_mask == hops
                )
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
                    b = next_N[a]
                    step = -1
                    while b < num_nodes and step < 0:
                        if open_N[b] and leads_NN[a, b]:
                            if a == sink or (b == sink and slack_E[a] > 0):
                                step = b
                            elif b == sink:
                                pass  # its slack has gone in this phase
                            elif _movers(
                                a, b, 1, cost_NN[a, b], value_A, held_A,
                                first_E, arc_A, row_A, from_M, to_M,
                            ):  # fmt: skip
                                step = b
                            else:
                                dirty_N[a] = True  # its row has moved in this phase
                        b += 1
                    next_N[a] = b
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
                        units = _movers(
                            a, b, units, cost_NN[a, b], value_A, held_A,
                            first_E, arc_A, row_A, from_M, to_M,
                        )  # fmt: skip
                for place in range(length):
                    a, b = path_N[place], path_N[place + 1]
                    if a == sink:
                        slack_E[b] += units
                        cost_NN[b, sink] = -prices_E[b]
                    elif b == sink:
                        slack_E[a] -= units
                        if slack_E[a] == 0:
                            cost_NN[a, sink] = FAR
                    else:
                        _movers(
                            a, b, units, cost_NN[a, b], value_A, held_A,
                            first_E, arc_A, row_A, from_M, to_M,
                        )  # fmt: skip
                        for mover in range(units):
                            _move(
                                from_M[mover], to_M[mover], rows_A, first_R, expert_A, value_A,
                                held_A, cost_NN, dirty_N,
                            )  # fmt: skip
                excess_N[source] -= units
                excess_N[target] += units
                for place in range(length + 1):
                    open_N[path_N[place]] = True
        for expert in range(num_experts):
            if dirty_N[expert]:
                dirty_N[expert] = False
                _refresh(
                    expert, num_experts, first_R, expert_A, value_A, held_A,
                    first_E, arc_A, row_A, cost_NN,
                )  # fmt: skip
    return 2


@jit
def augment_problems(
    first_problem, last_problem, first_B, first_R, expert_A, value_A, held_A, prices_BE, excess_BN,
    slack_BE, has_sink_B, reach_B, max_phases, potential_BN, status_B,
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
            reach_B[problem], max_phases, potential_BN[problem, :nodes],
        )  # fmt: skip
