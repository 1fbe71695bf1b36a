"""The exact finish: shortest augmenting paths on a residual graph of E + 1 nodes.

Let x be top-k of q - prices. The row that loses least by giving expert a and taking expert b
defines the arc a -> b, so the residual graph of the whole flow contracts to the experts and, when
capacities leave slack, a sink of price 0 that stands for the unused units. All reduced costs are
>= 0 for such an x, whatever the prices. Each phase (primal-dual, after Ford and Fulkerson):

1. Dijkstra from all overfull nodes; potentials rise so that every shortest path costs 0.
2. Units move along paths of cost 0, depth first. An arc carries as many units at once as it has
   rows at the same cost, so equal rows and plateaus move together.

x stays optimal for its own loads. When no imbalance is left, x and the prices satisfy complementary
slackness, hence both are optimal.

Only contested rows take part: those whose best swap costs at most ``reach``, and of them the
experts within it. Arcs that were left out cost more than reach, so their reduced costs stay
positive while prices differ from those at the start by less. Where that does not suffice, rows are
contested again at the new prices, with a longer reach. On a plateau, where more rows than needed
swap at no cost, a first attempt makes do with such swaps of some of the rows.

Shape letters: B problems, N rows (as an axis of prices: N nodes), E experts.
"""

from __future__ import annotations

import functools

import numpy as np

from megatron_maxscore.flow import passes
from megatron_maxscore.flow.buckets import gap_within
from megatron_maxscore.flow.contested import Contested
from megatron_maxscore.flow.exchange import Exchange
from megatron_maxscore.flow.prices import PriceState
from megatron_maxscore.flow.problem import BoolArray, IntArray, Problem

# Contested rows for each unit out of balance, and at least; at most half of all to begin with.
_ROWS_PER_UNIT = 32
_MIN_ROWS = 64
# The same on a plateau, where every row offers many swaps at no cost.
_PLATEAU_ROWS_PER_UNIT = 2
# The next reach relative to one that did not suffice, and to one that left most units as they were.
_LONGER, _MUCH_LONGER = 2, 4
_MOST_LEFT = 0.9
# Where contested rows have to be sent, they are contested within this times the reach that seems
# enough, so that it can grow. That changes what is sent, and nothing that is decided.
_SPARE = 2
# Longer than any path, so that every allowed arc takes part; shorter than to a forbidden one.
_WHOLE = 1 << 49


def finish(
    exchange: Exchange,
    problem: Problem,
    state: PriceState,
) -> IntArray:
    """Move units until nothing is out of balance.

    Args:
        exchange: between the ranks that hold the rows; two rounds each time rows are contested.
        problem: the problems.
        state: prices and the assignment at them; ``x_NE`` is changed in place.

    Returns:
        (B, E) int64 prices, which are optimal.

    Raises:
        ValueError: forbidden arcs leave units that no expert can take; says how many.
    """
    has_sink_B = ~problem.tight_B
    prices_BE = state.prices_BE
    excess_BN, slack_BE = imbalance(problem, prices_BE, state.load_BE)
    reach_B, stride_B, beyond_B = _first_reach(problem, state.gaps_BL, excess_BN)
    drift_B = np.zeros_like(reach_B)
    while (reach_B >= 0).any():
        room_B = reach_B.copy()
        if exchange.size > 1:
            room_B = np.where(reach_B > 0, np.minimum(_SPARE * reach_B, _WHOLE), reach_B)
        own = passes.contested(
            problem, prices_BE, state.x_NE, room_B, stride_B, state.gap_N, drift_B
        )
        found, own_A = own.of_all_ranks(exchange, problem)
        status_B = np.where(reach_B < 0, 0, 1)
        tries_B = reach_B >= 0
        while tries_B.any():
            units_B = np.maximum(excess_BN, 0).sum(1)
            # Ranks have the same rows now, and move the same units.
            found, excess_BN, slack_BE, moved_BE, spread_B, now_B = exchange.same(
                functools.partial(
                    _augment, found, prices_BE, excess_BN, slack_BE, has_sink_B,
                    np.where(tries_B, reach_B, -1), (reach_B == room_B).all(),
                )
            )  # fmt: skip
            status_B = np.where(tries_B, now_B, status_B)
            prices_BE = prices_BE + moved_BE
            drift_B = drift_B + spread_B
            room_B = room_B - spread_B
            stuck_B = tries_B & (reach_B >= _WHOLE) & (status_B == 1)
            if stuck_B.any():
                left = int(np.maximum(excess_BN, 0).sum(1)[stuck_B][0])
                raise ValueError(
                    f"no assignment exists: forbidden arcs leave {left} assignments without an "
                    "expert that has room; allow more experts or raise the capacities"
                )
            left_B = np.maximum(excess_BN, 0).sum(1)
            factor_B = np.where(left_B > _MOST_LEFT * units_B, _MUCH_LONGER, _LONGER)
            longer_B = np.minimum(np.where(reach_B > 0, factor_B * reach_B, beyond_B), _WHOLE)
            # Problems that wait for rows to be contested again keep theirs.
            reach_B = np.where(tries_B & (status_B == 1), longer_B, reach_B)
            tries_B &= (status_B == 1) & (reach_B <= room_B)
        if own_A is not None:
            own.held_A[:] = found.held_A[own_A]
        own.apply(state.x_NE)
        reach_B = np.where(status_B == 0, -1, reach_B)
        stride_B = np.ones_like(reach_B)
    return prices_BE


def _augment(
    found: Contested,
    prices_BE: IntArray,
    excess_BN: IntArray,
    slack_BE: IntArray,
    has_sink_B: BoolArray,
    reach_B: IntArray,
    is_whole: bool,
) -> tuple[Contested, IntArray, IntArray, IntArray, IntArray, IntArray]:
    """Move units among contested rows; returns what changes, and the status of each problem."""
    num_experts = prices_BE.shape[1]
    excess_BN, slack_BE = excess_BN.copy(), slack_BE.copy()
    near, arc_A = (found, slice(None)) if is_whole else found.within(reach_B)
    potential_BN, status_B = passes.augment(
        near, prices_BE, excess_BN, slack_BE, has_sink_B, reach_B
    )
    level_B = np.where(has_sink_B, potential_BN[:, num_experts], 0)
    moved_BE = potential_BN[:, :num_experts] - level_B[:, None]
    found.held_A[arc_A] = near.held_A
    found.reprice(moved_BE)
    # Without a sink its potential is 0, which only makes this bound looser.
    spread_B = potential_BN.max(1) - potential_BN.min(1)
    return found, excess_BN, slack_BE, moved_BE, spread_B, status_B


def imbalance(
    problem: Problem, prices_BE: IntArray, load_BE: IntArray
) -> tuple[IntArray, IntArray]:
    """Return (B, E + 1) units above capacity, the sink last, and (B, E) units that it has placed.

    Unused units of an expert count as filled by the sink only where its price is 0: elsewhere an
    under-filled expert violates complementary slackness.
    """
    has_sink_B = ~problem.tight_B
    is_free_BE = has_sink_B[:, None] & (prices_BE == 0)
    slack_BE = np.where(is_free_BE, np.maximum(problem.capacity_BE - load_BE, 0), 0)
    excess_BE = load_BE + slack_BE - problem.capacity_BE
    sink_B = np.where(has_sink_B, -excess_BE.sum(1), 0)
    return np.concatenate([excess_BE, sink_B[:, None]], 1), slack_BE


def _first_reach(
    problem: Problem, gaps_BL: IntArray, excess_BN: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Return (B,) int64 reach, -1 for problems in balance, stride of rows, and a reach beyond 0.

    A reach of 0 admits only moves at no cost, which stay right when rows are left out.
    """
    units_B = np.maximum(excess_BN, 0).sum(1)
    reach_B = np.full(units_B.size, -1, np.int64)
    stride_B, beyond_B = np.ones_like(reach_B), np.ones_like(reach_B)
    for b in np.flatnonzero(units_B).tolist():
        ties = int(gaps_BL[b, 0])
        rank = _ROWS_PER_UNIT * int(units_B[b]) + _MIN_ROWS
        reach_B[b] = gap_within(gaps_BL[b], min(int(problem.rows_B[b]) // 2, rank))
        if reach_B[b] == 0:
            enough = _PLATEAU_ROWS_PER_UNIT * int(units_B[b]) + 4 * problem.num_experts
            stride_B[b] = max(1, ties // enough)
            rest = int(problem.rows_B[b]) - ties
            beyond_B[b] = max(1, gap_within(gaps_BL[b], ties + min(rest // 2, rank)))
    return reach_B, stride_B, beyond_B
