"""The bounded finish's rounds in numpy; :mod:`kernels.rounds` is the same with numba.

See :mod:`rounds` for the method. Both make the same decisions, in integers.

Shape letters: E experts, N nodes (the experts, and the sink as the last one), C classes of rows,
H hops, P candidates (one for each class and node), M contested rows, G swaps.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow.hashing import hashed, part_of
from megatron_maxscore.flow.problem import BoolArray, IntArray

HOPS = 5
NO_ARC = 1 << 62
# Of each contested row two experts that it has, and as many that it has not.
HELD, NEAR = 2, 4
_HUGE = 1 << 62
# Farther than any path.
_FAR = 1 << 40


def far_beyond(bits: int) -> int:
    """Return a distance longer than that of any path, for costs of so many bits."""
    return (1 << (bits + 3)) - 1


def nearest(
    r_ME: IntArray, x_ME: BoolArray, index_M: IntArray, reach: int, shift: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find, for each contested row, the two lowest it has and the two highest it has not.

    Equal ones in cyclic order of the experts, from a start that moves with the row.

    Args:
        r_ME: (M, E) int64 reduced scores.
        x_ME: (M, E) bool.
        index_M: (M,) int64 index of each row in its problem.
        reach: what costs more in a swap with the nearest one is left out.
        shift: values are in units of ``2**shift``.

    Returns:
        (M, 4) int32 experts, -1 for none, and (M, 4) int32 values, above the highest that the row
        has not; 0 for none.
    """
    rows, num_experts = r_ME.shape
    start_M = part_of(hashed(index_M), num_experts)
    expert_ME = (start_M[:, None] + np.arange(num_experts)) % num_experts
    r_ME = np.take_along_axis(r_ME, expert_ME, 1)
    x_ME = np.take_along_axis(x_ME, expert_ME, 1)
    expert_M4 = np.full((rows, NEAR), -1, np.int32)
    value_M4 = np.zeros((rows, NEAR), np.int64)
    is_there_M4 = np.zeros((rows, NEAR), np.bool_)
    for first, keys_ME in (
        (0, np.where(x_ME, r_ME, _HUGE)),
        (HELD, np.where(x_ME, _HUGE, -r_ME)),
    ):
        for place in range(first, first + HELD):
            best_M1 = keys_ME.argmin(1)[:, None]
            is_there_M4[:, place] = np.take_along_axis(keys_ME, best_M1, 1)[:, 0] < _HUGE
            value_M4[:, place] = np.take_along_axis(r_ME, best_M1, 1)[:, 0]
            expert_M4[:, place] = np.take_along_axis(expert_ME, best_M1, 1)[:, 0]
            np.put_along_axis(keys_ME, best_M1, _HUGE, 1)
    least_M1, most_M1 = value_M4[:, :1], value_M4[:, HELD : HELD + 1]
    loss_M4 = np.concatenate([value_M4[:, :HELD] - most_M1, least_M1 - value_M4[:, HELD:]], 1)
    is_there_M4 &= loss_M4 <= reach
    value_M4 = np.where(is_there_M4, (value_M4 - most_M1) >> shift, 0)
    return np.where(is_there_M4, expert_M4, -1).astype(np.int32), value_M4.astype(np.int32)


def step(
    key_CEE: IntArray,
    price_E: IntArray,
    potential_N: IntArray,
    excess_N: IntArray,
    slack_E: IntArray,
    bits: int,
) -> IntArray:
    """Move units along shortest paths; nothing but the sink's arcs is moved without rows.

    N is E + 1 where the sink takes part, else E.

    Args:
        key_CEE: (C, E, E) int64, ``cost << 32 | row`` of the cheapest row that has a and not b.
        price_E: (E,) int64 prices in the unit of costs, before ``potential_N``.
        potential_N: (N,) int64, changed in place.
        excess_N: (N,) int64, changed in place.
        slack_E: (E,) int64 units that the sink has placed, changed in place.
        bits: of costs.

    Returns:
        (G, 3) int64: row, the expert it gives, the expert it takes.
    """
    num_classes, sink, nodes = key_CEE.shape[0], key_CEE.shape[1], potential_N.size
    most_cost, far = (1 << bits) - 1, far_beyond(bits)
    nearest_N, is_target_N = np.full(nodes, far), np.zeros(nodes, np.bool_)
    sources = excess_N > 0
    targets = np.flatnonzero(excess_N < 0)
    moves = []
    # What all classes start from.
    start_N, start_slack_E = excess_N.copy(), slack_E.copy()
    given_N, taken_by_N = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64)
    placed_E = np.zeros(sink, np.int64)
    for c in range(num_classes):
        cost_NN = np.full((nodes, nodes), _FAR, np.int64)
        cost_NN[:sink, :sink] = key_CEE[c] >> 32
        if nodes > sink:
            rent_E = price_E + potential_N[:sink] - potential_N[sink]
            cost_NN[sink, :sink] = np.maximum(rent_E, 0)
            cost_NN[:sink, sink] = np.where(start_slack_E > 0, np.maximum(-rent_E, 0), _FAR)
        cost_NN[cost_NN > most_cost] = _FAR
        distance_N, pred_N = np.where(sources, 0, far), np.full(nodes, -1)
        for _ in range(HOPS):
            through_NN = np.where(distance_N < far, distance_N, _FAR)[:, None] + cost_NN
            best_N = through_NN.min(0)
            pred_N = np.where(best_N < distance_N, through_NN.argmin(0), pred_N)
            distance_N = np.minimum(best_N, distance_N)
        nearest_N = np.minimum(nearest_N, distance_N)
        reached = targets[distance_N[targets] < far]
        taken: set[int] = set()
        rows: set[int] = set()
        for target in reached[distance_N[reached].argsort(kind="stable")].tolist():
            path = [target]
            # Predecessors may have come nearer since, so there can be more arcs than hops.
            while pred_N[path[-1]] >= 0:
                path.append(int(pred_N[path[-1]]))
            # Paths share a node if and only if they leave their source by the same arc.
            if path[-2] in taken:
                continue
            taken.add(path[-2])
            source = path[-1]
            arcs = list(zip(path[1:], path, strict=False))
            swaps = [
                (int(key_CEE[c, a, b]) & 0xFFFFFFFF, a, b) for a, b in arcs if sink not in (a, b)
            ]
            own = [row for row, _, _ in swaps]
            stands = rows.isdisjoint(own)
            rows.update(own)
            # Paths that stand count against these limits whether they then move or not.
            wins = given_N[source] < start_N[source] and taken_by_N[target] < -start_N[target]
            given_N[source] += 1
            taken_by_N[target] += 1
            for a in [a for a, b in arcs if b == sink]:
                wins = wins and placed_E[a] < start_slack_E[a]
                placed_E[a] += 1
            if not (stands and wins):
                continue
            excess_N[source] -= 1
            excess_N[target] += 1
            is_target_N[target] = True
            moves += swaps
            for a, b in arcs:
                if a == sink:
                    slack_E[b] += 1
                elif b == sink:
                    slack_E[a] -= 1
    limit = nearest_N[is_target_N].max(initial=0)
    potential_N += limit - np.minimum(nearest_N, limit)
    return np.array(moves, np.int64).reshape(-1, 3)


def move_near(
    index_M: IntArray,
    expert_M4: np.ndarray,
    value_M4: np.ndarray,
    held_M4: BoolArray,
    price_E: IntArray,
    potential_N: IntArray,
    excess_N: IntArray,
    slack_E: IntArray,
    bits: int,
    limit: int,
    num_classes: int,
    max_rounds: int,
) -> int:
    """Move units among one problem's contested rows, round by round.

    Args:
        index_M: (M,) int64 index of each row, ascending.
        expert_M4: (M, 4) int32, see :func:`nearest`.
        value_M4: (M, 4) int32.
        held_M4: (M, 4) bool, whether the row has the expert; changed in place.
        price_E: (E,) int64 in the unit of costs.
        potential_N: (N,) int64, changed in place.
        excess_N: (N,) int64, changed in place.
        slack_E: (E,) int64, changed in place.
        bits: of costs.
        limit: by how much potentials may differ.
        num_classes: into which rows are dealt to begin with, see :mod:`rounds`.
        max_rounds: rounds at most.

    Returns:
        How many rounds there were.
    """
    num_experts = price_E.size
    expert_M4, value_M4 = expert_M4.astype(np.int64), value_M4.astype(np.int64)
    is_there_M4, every_M = expert_M4 >= 0, np.arange(index_M.size)
    classes = num_classes
    for done in range(max_rounds):
        if excess_N.max() <= 0 or np.ptp(potential_N) > limit:
            return done
        key_CEE = np.full((classes, num_experts, num_experts), NO_ARC, np.int64)
        # The cheapest swap of each row, so that no two arcs are the same row's.
        reduced_M4 = value_M4 - potential_N[expert_M4]
        held_value_M4 = np.where(is_there_M4 & held_M4, reduced_M4, _HUGE)
        other_value_M4 = np.where(is_there_M4 & ~held_M4, reduced_M4, -_HUGE)
        gives_M, takes_M = held_value_M4.argmin(1), other_value_M4.argmax(1)
        least_M, most_M = held_value_M4[every_M, gives_M], other_value_M4[every_M, takes_M]
        m = np.flatnonzero((least_M < _HUGE) & (most_M > -_HUGE))
        cost_M = np.maximum(least_M[m] - most_M[m], 0)
        m, cost_M = m[cost_M >> bits == 0], cost_M[cost_M >> bits == 0]
        place = (
            part_of(hashed(index_M[m]), classes),
            expert_M4[m, gives_M[m]],
            expert_M4[m, takes_M[m]],
        )
        np.minimum.at(key_CEE, place, cost_M << 32 | index_M[m])
        before = excess_N.copy()
        moves = step(key_CEE, price_E, potential_N, excess_N, slack_E, bits)
        if (excess_N == before).all():
            if classes == 1:
                return done
            classes = 1
        for row, gives, takes in moves.tolist():
            at = int(np.searchsorted(index_M, row))
            held_M4[at, expert_M4[at] == gives] = False
            held_M4[at, expert_M4[at] == takes] = True
    return max_rounds


def cheapest(
    r_NE: IntArray, x_NE: BoolArray, index_N: IntArray, shift: int, bits: int, key_CEE: IntArray
) -> None:
    """Find, over rows and experts, the cheapest row of each class that has a and not b.

    The keys' low bits are the row's index, exclusive or a hash of the arc, so each arc takes the
    first of equally cheap rows in another order. In one order a row would be first for many arcs,
    and only one path a round could have it. :func:`with_rows` takes the hash away again.

    Args:
        r_NE: (N, E) int64 reduced scores.
        x_NE: (N, E) bool.
        index_N: (N,) int64.
        shift: costs are in units of ``2**shift``.
        bits: costs of more are taken as the highest.
        key_CEE: (C, E, E) int64, lowered in place; see :func:`step`.
    """
    class_N = part_of(hashed(index_N), key_CEE.shape[0])
    for a in range(r_NE.shape[1]):
        rows = np.flatnonzero(x_NE[:, a])
        cost_ME = np.maximum(r_NE[rows, a, None] - r_NE[rows], 0) >> shift
        arc_E = a * r_NE.shape[1] + np.arange(r_NE.shape[1])
        low_ME = index_N[rows, None] ^ hashed(arc_E)
        keys_ME = np.minimum(cost_ME, (1 << bits) - 1) << 32 | low_ME
        keys_ME[x_NE[rows]] = NO_ARC
        np.minimum.at(key_CEE[:, a], class_N[rows], keys_ME)


def with_rows(key_CEE: IntArray) -> IntArray:
    """Return keys of :func:`cheapest`, the least of all ranks, with the rows' indices in them."""
    arc_EE = np.arange(key_CEE[0].size).reshape(key_CEE.shape[1:])
    return np.where(key_CEE == NO_ARC, NO_ARC, key_CEE ^ hashed(arc_EE))
