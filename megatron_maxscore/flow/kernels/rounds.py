"""The bounded finish, fused with numba; :mod:`megatron_maxscore.flow.rounds` describes it.

Shape letters: E experts, N nodes (the experts, and the sink as the last one), C classes of rows,
H hops, P candidates (one for each class and node), M contested rows.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow import hashing, rounds_plain
from megatron_maxscore.flow.kernels.compiler import jit
from megatron_maxscore.flow.kernels.rows import reduced_row
from megatron_maxscore.flow.rounds_plain import HELD, HOPS, NEAR, NO_ARC

_HUGE = 1 << 62

hashed = jit(hashing.hashed)
part_of = jit(hashing.part_of)
far_beyond = jit(rounds_plain.far_beyond)


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
def _tree(key_EE, price_E, potential_N, excess_N, slack_E, bits, distance_N, before_N, pred_N):
    """Write distances from the overfull nodes over at most ``HOPS`` arcs, and predecessors."""
    num_experts, nodes = key_EE.shape[0], distance_N.shape[0]
    sink = num_experts
    most_cost, far = (1 << bits) - 1, far_beyond(bits)
    for node in range(nodes):
        distance_N[node] = 0 if excess_N[node] > 0 else far
        pred_N[node] = -1
    for _ in range(HOPS):
        before_N[:] = distance_N
        for a in range(nodes):
            if before_N[a] >= far:
                continue
            for b in range(nodes):
                if a < num_experts and b < num_experts:
                    cost = key_EE[a, b] >> 32
                elif a == b or (b == sink and slack_E[a] <= 0):
                    continue
                elif a == sink:
                    cost = price_E[b] + potential_N[b] - potential_N[sink]
                else:
                    cost = potential_N[sink] - price_E[a] - potential_N[a]
                cost = max(cost, 0)
                if cost <= most_cost and before_N[a] + cost < distance_N[b]:
                    distance_N[b], pred_N[b] = before_N[a] + cost, a


@jit
def step(key_CEE, price_E, potential_N, excess_N, slack_E, bits, moves_P3):
    """Move units along shortest paths; returns how many, and how many moves of rows it wrote.

    See :func:`megatron_maxscore.flow.rounds_plain.step`; ``moves_P3`` takes the moves.
    """
    num_classes, num_experts, nodes = key_CEE.shape[0], key_CEE.shape[1], potential_N.shape[0]
    sink, far = num_experts, far_beyond(bits)
    distance_N, before_N = np.empty(nodes, np.int64), np.empty(nodes, np.int64)
    pred_N = np.empty(nodes, np.int64)
    nearest_N, is_target_N = np.full(nodes, far, np.int64), np.zeros(nodes, np.bool_)
    # What all classes start from.
    start_N, start_slack_E = excess_N.copy(), slack_E.copy()
    given_N, taken_by_N = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64)
    placed_E = np.zeros(num_experts, np.int64)
    row_N = np.empty(nodes, np.int64)
    total, moved = 0, 0
    for c in range(num_classes):
        key_EE = key_CEE[c]
        _tree(
            key_EE, price_E, potential_N, start_N, start_slack_E, bits, distance_N, before_N,
            pred_N,
        )  # fmt: skip
        key_N = np.full(nodes, NO_ARC, np.int64)
        for node in range(nodes):
            nearest_N[node] = min(nearest_N[node], distance_N[node])
            if start_N[node] < 0 and distance_N[node] < far:
                key_N[node] = distance_N[node] * nodes + node
        order_N = np.argsort(key_N, kind="mergesort")
        taken_N, rows = np.zeros(nodes, np.bool_), 0
        for target in order_N:
            if key_N[target] == NO_ARC:
                break
            branch, node = target, target
            while pred_N[node] >= 0:
                branch, node = node, pred_N[node]
            if taken_N[branch]:
                continue
            # Paths share a node if and only if they leave their source by the same arc.
            taken_N[branch] = True
            source = node
            stands, first_row, through = True, rows, -1
            node = target
            while node != source:
                a = pred_N[node]
                if node == sink:
                    through = a
                elif a != sink:
                    row_N[rows] = key_EE[a, node] & 0xFFFFFFFF
                    for other in range(first_row):
                        stands &= row_N[other] != row_N[rows]
                    rows += 1
                node = a
            # Paths that stand count against these limits whether they then move or not.
            wins = given_N[source] < start_N[source] and taken_by_N[target] < -start_N[target]
            given_N[source] += 1
            taken_by_N[target] += 1
            if through >= 0:
                wins = wins and placed_E[through] < start_slack_E[through]
                placed_E[through] += 1
            if not (stands and wins):
                continue
            total += 1
            excess_N[source] -= 1
            excess_N[target] += 1
            is_target_N[target] = True
            node = target
            while node != source:
                a = pred_N[node]
                if a == sink:
                    slack_E[node] += 1
                elif node == sink:
                    slack_E[a] -= 1
                else:
                    moves_P3[moved, 0] = key_EE[a, node] & 0xFFFFFFFF
                    moves_P3[moved, 1], moves_P3[moved, 2] = a, node
                    moved += 1
                node = a
    limit = np.int64(0)
    for node in range(nodes):
        if is_target_N[node]:
            limit = max(limit, nearest_N[node])
    for node in range(nodes):
        potential_N[node] += limit - min(nearest_N[node], limit)
    return total, moved


@jit
def move_near(
    index_M, expert_M4, value_M4, held_M4, price_E, potential_N, excess_N, slack_E, bits, limit,
    num_classes, max_rounds,
):  # fmt: skip
    """Move units among contested rows, round by round; returns how many rounds."""
    num_experts, nodes = price_E.shape[0], potential_N.shape[0]
    moves_P3 = np.empty((num_classes * nodes, 3), np.int64)
    classes = num_classes
    for done in range(max_rounds):
        if excess_N.max() <= 0 or potential_N.max() - potential_N.min() > limit:
            return done
        key_CEE = np.full((classes, num_experts, num_experts), NO_ARC, np.int64)
        for m in range(index_M.shape[0]):
            # Its cheapest swap, so that no two arcs are the same row's.
            least, most = np.int64(_HUGE), np.int64(-_HUGE)
            a, b = -1, -1
            for place in range(NEAR):
                expert = expert_M4[m, place]
                if expert >= 0:
                    value = value_M4[m, place] - potential_N[expert]
                    if held_M4[m, place] and value < least:
                        a, least = expert, value
                    if not held_M4[m, place] and value > most:
                        b, most = expert, value
            cost = max(least - most, 0)
            if a >= 0 and b >= 0 and cost >> bits == 0:
                c = part_of(hashed(index_M[m]), classes)
                key_CEE[c, a, b] = min(key_CEE[c, a, b], cost << 32 | index_M[m])
        total, moved = step(key_CEE, price_E, potential_N, excess_N, slack_E, bits, moves_P3)
        if total == 0:
            if classes == 1:
                return done
            classes = 1
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
    """Find, over all rows and experts, the cheapest row of each class that has a and not b.

    See :func:`megatron_maxscore.flow.rounds_plain.cheapest`.
    """
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
                key = cost << 32 | index ^ hashed(a * num_experts + b)
                key_CEE[c, a, b] = min(key_CEE[c, a, b], key)
