"""The bounded finish, fused with numba; :mod:`megatron_maxscore.flow.rounds` describes it.

Shape letters: E experts, N nodes (the experts, and the sink as the last one), C classes of rows,
H hops, P candidates (one for each class and node), M contested rows.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow import rounds_plain
from megatron_maxscore.flow.kernels.compiler import jit
from megatron_maxscore.flow.kernels.rows import reduced_row
from megatron_maxscore.flow.rounds_plain import HELD, HOPS, NEAR, NO_ARC

_HUGE = 1 << 62

hashed = jit(rounds_plain.hashed)
part_of = jit(rounds_plain.part_of)
num_classes_for = jit(rounds_plain.num_classes_for)


@jit
def nearest(
    scores_NE, low_N, factor_B, prices_BCE, x_NE, gap_N, reach_B, stride_B, shift_B, origin_B,
    first_problem, last_problem, first_row_B, last_row_B, is_near_N, expert_N4, value_N4,
):  # fmt: skip
    """Write down, for each contested row, the two lowest it has and the two highest it has not."""
    num_experts = scores_NE.shape[1]
    r_E = np.empty(num_experts, np.int64)
    best_4 = np.empty(NEAR, np.int64)
    for problem in range(first_problem, last_problem):
        reach, shift = reach_B[problem], shift_B[problem]
        class_mask = prices_BCE.shape[1] - 1
        for row in range(first_row_B[problem], last_row_B[problem]):
            index = row - origin_B[problem]
            is_near_N[row] = gap_N[row] <= reach and index % stride_B[problem] == 0
            if not is_near_N[row]:
                continue
            price_E = prices_BCE[problem, index & class_mask]
            reduced_row(scores_NE, low_N[row], factor_B[problem], price_E, row, r_E)
            # Equal ones in cyclic order of the experts, from a start that moves with the row.
            start = part_of(hashed(index), num_experts)
            best_4[:HELD], best_4[HELD:] = _HUGE, -_HUGE
            expert_N4[row] = -1
            for step in range(num_experts):
                expert = start + step - (num_experts if start + step >= num_experts else 0)
                value = r_E[expert]
                if x_NE[row, expert]:
                    if value < best_4[1]:
                        place = 0 if value < best_4[0] else 1
                        best_4[1], expert_N4[row, 1] = best_4[0], expert_N4[row, 0]
                        best_4[place], expert_N4[row, place] = value, expert
                elif value > best_4[3]:
                    place = 2 if value > best_4[2] else 3
                    best_4[3], expert_N4[row, 3] = best_4[2], expert_N4[row, 2]
                    best_4[place], expert_N4[row, place] = value, expert
            least, most = best_4[0], best_4[2]
            for place in range(NEAR):
                loss = best_4[place] - most if place < HELD else least - best_4[place]
                if loss > reach:
                    expert_N4[row, place] = -1
                    value_N4[row, place] = 0
                else:
                    value_N4[row, place] = (best_4[place] - most) >> shift


@jit
def step(
    key_CEE, price_E, potential_N, excess_N, slack_E, has_sink, bits, moves_P3
):  # fmt: skip
    """Move units along shortest paths; returns how many, and writes what rows do.

    Args:
        key_CEE: (C, E, E) int64 cost << 32 | row of the cheapest row that has a and not b.
        price_E: (E,) int64 prices in the unit of costs, before ``potential_N``.
        potential_N: (N,) int64, changed in place.
        excess_N: (N,) int64, changed in place.
        slack_E: (E,) int64, changed in place.
        has_sink: whether the sink takes part.
        bits: of costs.
        moves_P3: (?, 3) int64, out: row, expert it gives, expert it takes.

    Returns:
        Units moved and moves of rows.
    """
    num_classes, num_experts = key_CEE.shape[0], key_CEE.shape[1]
    sink, nodes = num_experts, num_experts + np.int64(has_sink)
    most_cost, far = (1 << bits) - 1, (1 << (bits + 3)) - 1
    count = num_classes * nodes
    distance_CN = np.empty((num_classes, nodes), np.int64)
    next_N, before_N = np.empty(nodes, np.int64), np.empty(nodes, np.int64)
    from_CHN = np.full((num_classes, HOPS, nodes), -1, np.int64)
    nearest_N = np.full(nodes, far, np.int64)
    for c in range(num_classes):
        for node in range(nodes):
            before_N[node] = 0 if excess_N[node] > 0 else far
        for hop in range(HOPS):
            for b in range(nodes):
                best, origin = before_N[b], -1
                for a in range(nodes):
                    if before_N[a] >= far:
                        continue
                    if a < num_experts and b < num_experts:
                        key = key_CEE[c, a, b]
                        if key == NO_ARC:
                            continue
                        cost = key >> 32
                    elif a == sink:
                        if b == sink:
                            continue
                        cost = price_E[b] + potential_N[b] - potential_N[sink]
                    else:
                        if slack_E[a] <= 0:
                            continue
                        cost = potential_N[sink] - price_E[a] - potential_N[a]
                    cost = max(cost, 0)
                    if cost > most_cost:
                        continue
                    if before_N[a] + cost < best:
                        best, origin = before_N[a] + cost, a
                next_N[b], from_CHN[c, hop, b] = best, origin
            before_N[:] = next_N
        distance_CN[c] = before_N
        for node in range(nodes):
            nearest_N[node] = min(nearest_N[node], before_N[node])
    # The path to each node that has room, from its end.
    path_PL = np.full((count, HOPS + 1), -1, np.int64)
    row_PL = np.full((count, HOPS), -1, np.int64)
    into_sink_P = np.full(count, -1, np.int64)
    source_P = np.empty(count, np.int64)
    key_P = np.full(count, NO_ARC, np.int64)
    for p in range(count):
        c, target = p // nodes, p % nodes
        if excess_N[target] >= 0 or distance_CN[c, target] >= far:
            continue
        key_P[p] = distance_CN[c, target] * count + p
        node, length = target, 0
        path_PL[p, 0] = target
        for hop in range(HOPS - 1, -1, -1):
            origin = from_CHN[c, hop, node]
            if origin >= 0:
                if node == sink:
                    into_sink_P[p] = origin
                elif origin != sink:
                    row_PL[p, length] = key_CEE[c, origin, node] & 0xFFFFFFFF
                node = origin
                length += 1
                path_PL[p, length] = node
        source_P[p] = node
    order_P = np.argsort(key_P, kind="mergesort")
    # A path stands back if a shorter one of its class shares a node, or a row, with it.
    rows_U = np.unique(row_PL)
    first_CN = np.full((num_classes, nodes), count, np.int64)
    first_U = np.full(rows_U.shape[0], count, np.int64)
    stands_P = np.ones(count, np.bool_)
    for check in range(2):
        for i in range(count):
            p = order_P[i]
            if key_P[p] == NO_ARC:
                break
            for place in range(HOPS):
                if path_PL[p, place + 1] < 0:
                    break
                c, node = p // nodes, path_PL[p, place]
                if check:
                    stands_P[p] &= first_CN[c, node] == i
                else:
                    first_CN[c, node] = min(first_CN[c, node], i)
                if row_PL[p, place] >= 0:
                    u = np.searchsorted(rows_U, row_PL[p, place])
                    if check:
                        stands_P[p] &= first_U[u] == i
                    else:
                        first_U[u] = min(first_U[u], i)
    moved, total, limit = 0, 0, 0
    gives_N, takes_N = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64)
    slacks_N = np.zeros(nodes, np.int64)
    wins_P = np.zeros(count, np.bool_)
    for i in range(count):
        p = order_P[i]
        if key_P[p] == NO_ARC:
            break
        if not stands_P[p]:
            continue
        source, target, through = source_P[p], p % nodes, into_sink_P[p]
        wins = gives_N[source] < excess_N[source] and takes_N[target] < -excess_N[target]
        if through >= 0:
            wins = wins and slacks_N[through] < slack_E[through]
            slacks_N[through] += 1
        gives_N[source] += 1
        takes_N[target] += 1
        wins_P[p] = wins
    for i in range(count):
        p = order_P[i]
        if key_P[p] == NO_ARC:
            break
        if not wins_P[p]:
            continue
        total += 1
        excess_N[source_P[p]] -= 1
        excess_N[p % nodes] += 1
        limit = max(limit, nearest_N[p % nodes])
        for place in range(HOPS):
            a, b = path_PL[p, place + 1], path_PL[p, place]
            if a < 0:
                break
            if a == sink:
                slack_E[b] += 1
            elif b == sink:
                slack_E[a] -= 1
            else:
                moves_P3[moved, 0], moves_P3[moved, 1], moves_P3[moved, 2] = row_PL[p, place], a, b
                moved += 1
    for node in range(nodes):
        potential_N[node] += limit - min(nearest_N[node], limit)
    return total, moved


@jit
def move_near(
    index_M, expert_M4, value_M4, held_M4, price_E, potential_N, excess_N, slack_E, has_sink,
    bits, limit, most_classes, max_rounds,
):  # fmt: skip
    """Move units among contested rows, round by round; returns how many rounds."""
    num_experts = price_E.shape[0]
    nodes = num_experts + np.int64(has_sink)
    moves_P3 = np.empty((most_classes * nodes * HOPS, 3), np.int64)
    most = most_classes
    for done in range(max_rounds):
        units = 0
        for node in range(nodes):
            units += max(excess_N[node], 0)
        if units == 0 or potential_N[:nodes].max() - potential_N[:nodes].min() > limit:
            return done
        classes = num_classes_for(units, num_experts, most)
        key_CEE = np.full((classes, num_experts, num_experts), NO_ARC, np.int64)
        for m in range(index_M.shape[0]):
            c = part_of(hashed(index_M[m]), classes)
            for i in range(NEAR):
                a = expert_M4[m, i]
                if a < 0 or not held_M4[m, i]:
                    continue
                for j in range(NEAR):
                    b = expert_M4[m, j]
                    if b < 0 or held_M4[m, j]:
                        continue
                    cost = value_M4[m, i] - potential_N[a] - value_M4[m, j] + potential_N[b]
                    cost = max(cost, 0)
                    if cost >> bits == 0:
                        key_CEE[c, a, b] = min(key_CEE[c, a, b], cost << 32 | index_M[m])
        total, moved = step(
            key_CEE, price_E, potential_N, excess_N, slack_E, has_sink, bits, moves_P3
        )
        if total == 0:
            if classes == 1:
                return done
            most = 1
        for i in range(moved):
            m = np.searchsorted(index_M, moves_P3[i, 0])
            for place in range(NEAR):
                if expert_M4[m, place] == moves_P3[i, 1]:
                    held_M4[m, place] = False
                elif expert_M4[m, place] == moves_P3[i, 2]:
                    held_M4[m, place] = True
    return max_rounds


@jit
def cheapest(
    scores_NE, low_N, factor, price_CE, x_NE, first_row, last_row, origin, shift, bits, key_CEE
):  # fmt: skip
    """Find, over all rows and experts, the cheapest row of each class that has a and not b."""
    num_experts, num_classes = scores_NE.shape[1], key_CEE.shape[0]
    r_E = np.empty(num_experts, np.int64)
    held_E, other_E = np.empty(num_experts + 1, np.int64), np.empty(num_experts + 1, np.int64)
    class_mask = price_CE.shape[0] - 1
    most_cost = (1 << bits) - 1
    for row in range(first_row, last_row):
        index = row - origin
        reduced_row(scores_NE, low_N[row], factor, price_CE[index & class_mask], row, r_E)
        c = part_of(hashed(index), num_classes)
        helds, others = 0, 0
        for expert in range(num_experts):
            held_E[helds], other_E[others] = expert, expert
            helds += np.int64(x_NE[row, expert])
            others += np.int64(not x_NE[row, expert])
        for i in range(helds):
            a = held_E[i]
            for j in range(others):
                b = other_E[j]
                cost = min(max(r_E[a] - r_E[b], 0) >> shift, most_cost)
                key_CEE[c, a, b] = min(key_CEE[c, a, b], cost << 32 | index)
