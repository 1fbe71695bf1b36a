"""The bounded finish: rounds in which many units move at once along shortest paths.

As in the exact finish (:mod:`finish`) the residual graph has the experts as nodes, the row that
loses least by giving a and taking b is the arc a -> b, and potentials rise by what paths cost, so
that what has moved stays right. What makes it short is that one round does much at once, and
nothing in it depends on the order in which it is computed:

1. Rows are dealt into classes, which have arcs of their own: with C classes an arc carries C units.
2. In each class, shortest paths of at most five arcs from all overfull experts at once: a forest.
3. Of paths that leave their source by the same arc, which are those that share an expert, the
   shortest stands; each source gives no more than its excess, and each target takes no more than
   its room.
4. All of them move, and potentials rise by the longest.

First among contested rows, each with the two lowest experts it has and the two highest it has not,
of which it offers the cheapest swap. Should units be left when no path is, or after the last round,
further ones look at all rows and all experts, in one class in the end, where a path of two arcs
always exists: were all rows that have an overfull expert a to have some b that has room, another
row lacks b, hence has an expert c that one of the rows with a lacks. So the assignment is feasible
in the end.

Costs are kept in about 20 bits (:func:`cost_bits`), which decides nothing but which of nearly equal
paths is taken; the certificate is evaluated on the scores.

Shape letters: B problems, C classes, E experts, N nodes, M contested rows, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_maxscore.flow.buckets import gap_within
from megatron_maxscore.flow.exchange import Exchange
from megatron_maxscore.flow.finish import imbalance
from megatron_maxscore.flow.prices import PriceState
from megatron_maxscore.flow.problem import SCORE_BITS, BoolArray, IntArray, Problem
from megatron_maxscore.flow.rounds_plain import HELD, NO_ARC, with_rows

# Passes over the scores after those over a sample, or after the first with warm prices.
SAMPLED_PASSES = 6
# Rounds among contested rows at most.
MAX_ROUNDS = 512
# Classes at most, and how many units of each expert are in each at least: fewer have no cheap swaps
# to offer.
_MOST_CLASSES = 4
_UNITS_PER_CLASS = 256
# Contested rows for each unit out of balance, and for each expert.
ROWS_PER_UNIT = 32
ROWS_PER_EXPERT = 4
# The same on a plateau, where every row offers swaps at no cost.
PLATEAU_ROWS_PER_UNIT = 4
# Bits of a cost and the number of a node: in 31, with those that adding up a path takes.
KEY_BITS = 28
# Bits of costs that a first reach takes, so that potentials can grow.
SPARE_BITS = 2
# By how much potentials may differ, in reaches: arcs that were left out cost more than one, and
# half as much again does not hurt yet.
BEYOND_REACH = (3, 2)


@dataclass
class Near:
    """Contested rows of all ranks, problem by problem, in order of their index.

    Attributes:
        index_M: (M,) int64 index in the problem.
        expert_M4: (M, 4) int32, two that the row has and two that it has not; -1 for none.
        value_M4: (M, 4) int32 reduced score above the highest that the row has not, in the unit of
            costs.
        first_B: (B + 1,) int64, problem b has the rows ``first_B[b]`` and following.
    """

    index_M: IntArray
    expert_M4: np.ndarray
    value_M4: np.ndarray
    first_B: IntArray

    @classmethod
    def of_rows(
        cls, problem: Problem, is_near_N: BoolArray, expert_N4: np.ndarray, value_N4: np.ndarray
    ) -> Near:
        """Take the rows of this rank that are contested."""
        rows = np.flatnonzero(is_near_N)
        return cls(
            rows - problem.origin_B[problem.problem_N[rows]],
            expert_N4[rows],
            value_N4[rows],
            np.searchsorted(rows, problem.start_B),
        )


def finish(
    backend: Any, exchange: Exchange, problem: Problem, state: PriceState
) -> tuple[IntArray, IntArray]:
    """Move units until no expert is overfull.

    Args:
        backend: :mod:`plain` or :mod:`fused`.
        exchange: between the ranks; two rounds if anything is out of balance, and one for each of
            the rounds over all rows.
        problem: the problems; every arc is allowed.
        state: prices and the assignment at them; ``x_NE`` is changed in place.

    Returns:
        (B, E) int64 prices and (B, E) int64 loads of all ranks.
    """
    excess_BN, slack_BE = imbalance(problem, state.prices_BE, state.load_BE)
    prices_BE, load_BE = state.prices_BE.copy(), state.load_BE.copy()
    if (excess_BN > 0).any():
        prices_BE, load_BE = _among_contested(
            backend, exchange, problem, state, excess_BN, slack_BE
        )
    while (over_B := (load_BE > problem.capacity_BE).any(1)).any():
        _among_all(backend, exchange, problem, state, prices_BE, load_BE, np.flatnonzero(over_B))
    return prices_BE, load_BE


def cost_bits(num_experts: int) -> int:
    """Return how many bits a cost may have, so that those of a path and a node fit in 31."""
    return KEY_BITS - num_experts.bit_length()


def num_classes(problem: Problem, b: int) -> int:
    """Return into how many classes the rows of a problem are dealt, a power of two."""
    return num_classes_of(int(problem.rows_B[b]) * problem.topk, problem.num_experts)


def num_classes_of(units: int, num_experts: int) -> int:
    """Return the same for a problem of so many assignments."""
    wanted = min(_MOST_CLASSES, units // num_experts // _UNITS_PER_CLASS)
    return 1 << max(0, wanted.bit_length() - 1)


def _reach(
    problem: Problem, gaps_BL: IntArray, excess_BN: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Return (B,) int64 reach (-1 for none), stride of rows, and shift from scores to costs."""
    units_B = np.maximum(excess_BN, 0).sum(1)
    reach_B, stride_B = np.full(units_B.size, -1, np.int64), np.ones(units_B.size, np.int64)
    shift_B = np.zeros(units_B.size, np.int64)
    for b in np.flatnonzero(units_B).tolist():
        units, rows = int(units_B[b]), int(problem.rows_B[b])
        rank = ROWS_PER_UNIT * units + ROWS_PER_EXPERT * problem.num_experts
        reach = gap_within(gaps_BL[b], min(rows // 2, rank))
        if reach == 0:
            enough = PLATEAU_ROWS_PER_UNIT * units + ROWS_PER_EXPERT * problem.num_experts
            stride_B[b] = max(1, int(gaps_BL[b, 0]) // enough)
        reach_B[b] = reach
        bits = cost_bits(problem.num_experts) - SPARE_BITS
        shift_B[b] = max(0, reach.bit_length() - bits)
    return reach_B, stride_B, shift_B


def _among_contested(
    backend: Any,
    exchange: Exchange,
    problem: Problem,
    state: PriceState,
    excess_BN: IntArray,
    slack_BE: IntArray,
) -> tuple[IntArray, IntArray]:
    """Move units among contested rows; returns prices and loads."""
    has_sink_B = ~problem.tight_B
    reach_B, stride_B, shift_B = _reach(problem, state.gaps_BL, excess_BN)
    prices_BCE = state.prices_BE[:, None] + state.spread_BCE
    near = backend.nearest(problem, prices_BCE, state.x_NE, state.gap_N, reach_B, stride_B, shift_B)
    near = _of_all_ranks(exchange, problem, near)
    price_BE = state.prices_BE >> shift_B[:, None]
    limit_B = (reach_B >> shift_B) * BEYOND_REACH[0] // BEYOND_REACH[1]
    bits = cost_bits(problem.num_experts)

    def move() -> tuple[BoolArray, IntArray, IntArray, IntArray]:
        held_M4 = near.expert_M4 >= 0
        held_M4[:, HELD:] = False
        potential_BN = np.zeros_like(excess_BN)
        moved_BN, placed_BE = excess_BN.copy(), slack_BE.copy()
        for b in np.flatnonzero(reach_B >= 0).tolist():
            rows = slice(near.first_B[b], near.first_B[b + 1])
            nodes = problem.num_experts + int(has_sink_B[b])
            backend.move_near(
                near.index_M[rows], near.expert_M4[rows], near.value_M4[rows], held_M4[rows],
                price_BE[b], potential_BN[b, :nodes], moved_BN[b, :nodes], placed_BE[b], bits,
                int(limit_B[b]), num_classes(problem, b), MAX_ROUNDS,
            )  # fmt: skip
        return held_M4, potential_BN, moved_BN, placed_BE

    held_M4, potential_BN, excess_BN, slack_BE = exchange.same(move)
    first_B, offset_B = problem.start_B[:-1], problem.offset_B
    for b in np.flatnonzero(reach_B >= 0).tolist():
        rows = slice(near.first_B[b], near.first_B[b + 1])
        own_M = near.index_M[rows] - offset_B[b]
        is_own_M = (own_M >= 0) & (own_M < problem.start_B[b + 1] - first_B[b])
        row_M = (own_M + first_B[b])[is_own_M]
        expert_M4, held = near.expert_M4[rows][is_own_M], held_M4[rows][is_own_M]
        for place in range(expert_M4.shape[1]):
            some_M = expert_M4[:, place] >= 0
            state.x_NE[row_M[some_M], expert_M4[some_M, place]] = held[some_M, place]
    load_BE = excess_BN[:, :-1] - slack_BE + problem.capacity_BE
    return _raised(problem, state.prices_BE, potential_BN, shift_B), load_BE


def _raised(
    problem: Problem, prices_BE: IntArray, potential_BN: IntArray, shift_B: IntArray
) -> IntArray:
    """Return prices raised by potentials, relative to that of the sink where there is one."""
    has_sink_B = ~problem.tight_B
    level_B = np.where(has_sink_B, potential_BN[:, -1], 0)
    moved_BE = (potential_BN[:, :-1] - level_B[:, None]) << shift_B[:, None]
    raised_BE = prices_BE + moved_BE
    return np.where(has_sink_B[:, None], np.maximum(raised_BE, 0), raised_BE)


def _of_all_ranks(exchange: Exchange, problem: Problem, own: Near) -> Near:
    """Return the contested rows of all ranks; two rounds."""
    if exchange.size == 1:
        return own
    count_B = np.diff(own.first_B)
    counts = exchange.gather(count_B.tobytes(), phase="numbers of contested rows")
    count_RB = np.stack([np.frombuffer(data, np.int64) for data in counts])
    columns = (own.index_M, own.expert_M4.astype(np.int16), own.value_M4)
    payload = b"".join(np.ascontiguousarray(column).tobytes() for column in columns)
    sizes = [int(count) * (8 + 4 * 2 + 4 * 4) for count in count_RB.sum(1)]
    received = exchange.gather(payload, sizes, phase="contested rows")

    def merge() -> Near:
        parts = []
        for data, count in zip(received, count_RB.sum(1).tolist(), strict=True):
            index = np.frombuffer(data, np.int64, count)
            expert = np.frombuffer(data, np.int16, 4 * count, 8 * count).reshape(-1, 4)
            value = np.frombuffer(data, np.int32, 4 * count, 16 * count).reshape(-1, 4)
            parts.append((index, expert.astype(np.int32), value))
        ends_RB = count_RB.cumsum(1)
        merged = [
            np.concatenate(
                [
                    parts[r][column][ends_RB[r, b] - count_RB[r, b] : ends_RB[r, b]]
                    for b in range(problem.num_problems)
                    for r in range(exchange.size)
                ]
            )
            for column in range(3)
        ]
        first_B = np.concatenate([[0], count_RB.sum(0).cumsum()])
        return Near(merged[0], merged[1], merged[2], first_B)

    return exchange.same(merge)


def _among_all(
    backend: Any,
    exchange: Exchange,
    problem: Problem,
    state: PriceState,
    prices_BE: IntArray,
    load_BE: IntArray,
    wanted: np.ndarray,
) -> None:
    """Make one round over all rows and experts for problems with overfull experts.

    Prices, loads and the assignment are changed in place.
    """
    num_experts = problem.num_experts
    bits = cost_bits(num_experts)
    shift = SCORE_BITS + 1 - bits
    excess_BE = load_BE - problem.capacity_BE
    classes_B = [num_classes(problem, b) for b in wanted]
    none_E = np.zeros(num_experts, np.int64)
    while True:
        # Anew: of a problem that has moved while another was stuck they have risen.
        prices_BCE = prices_BE[:, None] + state.spread_BCE
        tables = [np.full((c, num_experts, num_experts), NO_ARC) for c in classes_B]
        for b, key_CEE in zip(wanted.tolist(), tables, strict=True):
            backend.cheapest(problem, b, prices_BCE, state.x_NE, shift, bits, key_CEE)
        if exchange.size > 1:
            flat = np.concatenate([table.ravel() for table in tables])
            received = exchange.gather(flat.tobytes(), phase="cheapest swaps")
            least = np.minimum.reduce([np.frombuffer(data, np.int64) for data in received])
            ends = np.cumsum([table.size for table in tables])[:-1]
            parts = np.split(least, ends)
            tables = [part.reshape(t.shape) for part, t in zip(parts, tables, strict=True)]
        tables = [with_rows(table) for table in tables]
        stuck = False
        for place, b in enumerate(wanted.tolist()):
            potential_N = np.zeros(num_experts, np.int64)
            excess_E = excess_BE[b].copy()
            # Without a sink.
            moves_P3 = backend.step(tables[place], none_E, potential_N, excess_E, none_E, bits)
            if moves_P3.shape[0] == 0:
                assert classes_B[place] > 1
                classes_B[place], stuck = 1, True
                continue
            load_BE[b] = excess_E + problem.capacity_BE[b]
            excess_BE[b] = excess_E
            prices_BE[b] += potential_N << shift
            own_P = moves_P3[:, 0] - problem.offset_B[b]
            first, last = problem.start_B[b], problem.start_B[b + 1]
            is_own_P = (own_P >= 0) & (own_P < last - first)
            rows = own_P[is_own_P] + first
            state.x_NE[rows, moves_P3[is_own_P, 1]] = False
            state.x_NE[rows, moves_P3[is_own_P, 2]] = True
        if not stuck:
            return
        keep = [i for i, b in enumerate(wanted.tolist()) if (excess_BE[b] > 0).any()]
        wanted, classes_B = wanted[keep], [classes_B[i] for i in keep]
