"""The bounded finish's rounds in numpy; :mod:`kernels.rounds` is the same with numba.

See :mod:`rounds` for the method. Both make the same decisions, in integers.

Shape letters: E experts, N nodes (the experts, and the sink as the last one), C classes of rows,
H hops, P candidates (one for each class and node), M contested rows, G swaps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_maxscore.flow.problem import BoolArray, IntArray

HOPS = 6
NO_ARC = 1 << 62
# Of each contested row two experts that it has, and as many that it has not.
HELD, NEAR = 2, 4
_HUGE = 1 << 62
# Farther than any path.
_FAR = 1 << 40
# The multiplier of Fibonacci hashing, 2**32 over the golden ratio.
_GOLDEN = 2654435769


def hashed(index_N: Any) -> Any:
    """Return 32 bits that depend on the index of each row."""
    return (index_N * _GOLDEN) & 0xFFFFFFFF


def part_of(hash_N: Any, parts: int) -> Any:
    """Return which of so many parts of 32 bits each falls in."""
    return (hash_N * parts) >> 32


def num_classes_for(units: int, num_experts: int, most: int) -> int:
    """Return how many units to move along each arc at a time, a power of two."""
    classes = 1
    while classes < most and classes * num_experts <= 4 * units:
        classes *= 2
    return classes


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
    has_sink: bool,
    bits: int,
) -> IntArray:
    """Move units along shortest paths; nothing but the sink's arcs is moved without rows.

    Args:
        key_CEE: (C, E, E) int64, ``cost << 32 | row`` of the cheapest row that has a and not b.
        price_E: (E,) int64 prices in the unit of costs, before ``potential_N``.
        potential_N: (N,) int64, changed in place.
        excess_N: (N,) int64, changed in place.
        slack_E: (E,) int64 units that the sink has placed, changed in place.
        has_sink: whether the sink takes part.
        bits: of costs.

    Returns:
        (G, 3) int64: row, the expert it gives, the expert it takes.
    """
    num_classes, num_experts = key_CEE.shape[:2]
    sink, nodes = num_experts, num_experts + int(has_sink)
    most_cost, far = (1 << bits) - 1, (1 << (bits + 3)) - 1
    cost_CNN = np.full((num_classes, nodes, nodes), _FAR, np.int64)
    cost_CNN[:, :num_experts, :num_experts] = np.where(key_CEE == NO_ARC, _FAR, key_CEE >> 32)
    if has_sink:
        rent_E = price_E + potential_N[:sink] - potential_N[sink]
        cost_CNN[:, sink, :sink] = np.maximum(rent_E, 0)
        cost_CNN[:, :sink, sink] = np.where(slack_E > 0, np.maximum(-rent_E, 0), _FAR)
    cost_CNN[cost_CNN > most_cost] = _FAR
    distance_CN = np.where(excess_N[:nodes] > 0, 0, far)[None].repeat(num_classes, 0)
    from_HCN = np.full((HOPS, num_classes, nodes), -1, np.int64)
    for hop in range(HOPS):
        through_CNN = np.where(distance_CN < far, distance_CN, _FAR)[:, :, None] + cost_CNN
        origin_CN = through_CNN.argmin(1)
        best_CN = np.take_along_axis(through_CNN, origin_CN[:, None], 1)[:, 0]
        is_less_CN = best_CN < distance_CN
        from_HCN[hop] = np.where(is_less_CN, origin_CN, -1)
        distance_CN = np.where(is_less_CN, best_CN, distance_CN)
    # The paths to nodes that have room, from their ends; candidates in order of their length.
    class_P, target_P = np.nonzero((distance_CN < far) & (excess_N[:nodes] < 0))
    order = distance_CN[class_P, target_P].argsort(kind="stable")
    class_P, target_P = class_P[order], target_P[order]
    rank_P = np.arange(order.size)
    node_P = target_P
    parts = []
    for hop in range(HOPS - 1, -1, -1):
        origin_P = from_HCN[hop, class_P, node_P]
        moves = np.flatnonzero(origin_P >= 0)
        a, b, c = origin_P[moves], node_P[moves], class_P[moves]
        is_row = (a != sink) & (b != sink)
        row = np.full(moves.size, -1)
        row[is_row] = key_CEE[c[is_row], a[is_row], b[is_row]] & 0xFFFFFFFF
        parts.append(np.stack([moves, a, b, c, row]))
        node_P = np.where(origin_P >= 0, origin_P, node_P)
    source_P = node_P
    path_A, a_A, b_A, c_A, row_A = np.concatenate(parts, 1)
    # A path stands back if a shorter one of its class shares a node, or a row, with it.
    first_CN = np.full(distance_CN.shape, order.size)
    np.minimum.at(first_CN, (c_A, b_A), path_A)
    rows_U, place_A = np.unique(row_A, return_inverse=True)
    first_U = np.full(rows_U.size, order.size)
    np.minimum.at(first_U, place_A, path_A)
    is_first_A = (first_CN[c_A, b_A] == path_A) & ((row_A < 0) | (first_U[place_A] == path_A))
    stands_P = np.ones(order.size, np.bool_)
    stands_P[path_A[~is_first_A]] = False
    # No more than sources have, targets take, and units that the sink has placed.
    through_P = np.full(order.size, -1)
    is_into_sink_A = b_A == sink
    through_P[path_A[is_into_sink_A]] = a_A[is_into_sink_A]
    standing = rank_P[stands_P]
    wins = _nth(source_P[standing]) < excess_N[source_P[standing]]
    wins &= _nth(target_P[standing]) < -excess_N[target_P[standing]]
    through = through_P[standing]
    wins &= (through < 0) | (_nth(through) < slack_E[through])
    winners = standing[wins]
    if winners.size == 0:
        return np.empty((0, 3), np.int64)
    np.subtract.at(excess_N, source_P[winners], 1)
    np.add.at(excess_N, target_P[winners], 1)
    is_winner_P = np.zeros(order.size, np.bool_)
    is_winner_P[winners] = True
    wins_A = is_winner_P[path_A]
    np.add.at(slack_E, b_A[wins_A & (a_A == sink)], 1)
    np.subtract.at(slack_E, a_A[wins_A & is_into_sink_A], 1)
    nearest_N = distance_CN.min(0)
    limit = nearest_N[target_P[winners]].max()
    potential_N[:nodes] += limit - np.minimum(nearest_N, limit)
    of_rows_A = wins_A & (row_A >= 0)
    return np.stack([row_A[of_rows_A], a_A[of_rows_A], b_A[of_rows_A]], 1)


def _nth(values: np.ndarray) -> np.ndarray:
    """Return how many equal values come before each."""
    order = values.argsort(kind="stable")
    ordered = values[order]
    nth = np.empty(values.size, np.int64)
    nth[order] = np.arange(values.size) - np.searchsorted(ordered, ordered)
    return nth


def move_near(
    index_M: IntArray,
    expert_M4: np.ndarray,
    value_M4: np.ndarray,
    held_M4: BoolArray,
    price_E: IntArray,
    potential_N: IntArray,
    excess_N: IntArray,
    slack_E: IntArray,
    has_sink: bool,
    bits: int,
    limit: int,
    most_classes: int,
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
        has_sink: whether capacities leave slack.
        bits: of costs.
        limit: by how much potentials may differ.
        most_classes: of rows.
        max_rounds: rounds at most.

    Returns:
        How many rounds there were.
    """
    num_experts = price_E.size
    nodes, most = num_experts + int(has_sink), most_classes
    expert_M4, value_M4 = expert_M4.astype(np.int64), value_M4.astype(np.int64)
    is_there_M4 = expert_M4 >= 0
    for done in range(max_rounds):
        units = int(np.maximum(excess_N[:nodes], 0).sum())
        if units == 0 or np.ptp(potential_N[:nodes]) > limit:
            return done
        classes = num_classes_for(units, num_experts, most)
        key_CEE = np.full((classes, num_experts, num_experts), NO_ARC, np.int64)
        reduced_M4 = value_M4 - potential_N[expert_M4]
        cost_M44 = np.maximum(reduced_M4[:, :, None] - reduced_M4[:, None], 0)
        gives_M4, takes_M4 = is_there_M4 & held_M4, is_there_M4 & ~held_M4
        is_swap_M44 = gives_M4[:, :, None] & takes_M4[:, None] & (cost_M44 >> bits == 0)
        m, i, j = np.nonzero(is_swap_M44)
        keys = cost_M44[m, i, j] << 32 | index_M[m]
        place = (part_of(hashed(index_M), classes)[m], expert_M4[m, i], expert_M4[m, j])
        np.minimum.at(key_CEE, place, keys)
        before = int(np.maximum(excess_N[:nodes], 0).sum())
        moves = step(key_CEE, price_E, potential_N, excess_N, slack_E, has_sink, bits)
        if int(np.maximum(excess_N[:nodes], 0).sum()) == before:
            if classes == 1:
                return done
            most = 1
        for row, gives, takes in moves.tolist():
            m = int(np.searchsorted(index_M, row))
            held_M4[m, expert_M4[m] == gives] = False
            held_M4[m, expert_M4[m] == takes] = True
    return max_rounds


def cheapest(
    r_NE: IntArray, x_NE: BoolArray, index_N: IntArray, shift: int, bits: int, key_CEE: IntArray
) -> None:
    """Find, over rows and experts, the cheapest row of each class that has a and not b.

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
        keys_ME = np.minimum(cost_ME, (1 << bits) - 1) << 32 | index_N[rows, None]
        keys_ME[x_NE[rows]] = NO_ARC
        np.minimum.at(key_CEE[:, a], class_N[rows], keys_ME)
