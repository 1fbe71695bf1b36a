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

from typing import Any

import numpy as np

from megatron_maxscore.flow.problem import BoolArray, IntArray, Problem

# Contested rows for each unit out of balance, and at least; at most half of all to begin with.
_ROWS_PER_UNIT = 16
_MIN_ROWS = 64
# The same on a plateau, where every row offers many swaps at no cost.
_PLATEAU_ROWS_PER_UNIT = 2
_LONGER = 2
# Longer than any path, so that every allowed arc takes part; shorter than to a forbidden one.
_WHOLE = 1 << 49
_ALL_PHASES = 1 << 40
# Attempts, with ever longer reach, where the number of phases is bounded.
_BOUNDED_ATTEMPTS = 3


def finish(
    backend: Any,
    problem: Problem,
    prices_BE: IntArray,
    gap_N: IntArray,
    x_NE: BoolArray,
    load_BE: IntArray,
    skip_B: BoolArray,
    max_phases: int | None = None,
) -> IntArray:
    """Move units until nothing is out of balance.

    Args:
        backend: :mod:`plain` or :mod:`fused`.
        problem: the problems.
        prices_BE: (B, E) int64; >= 0 where the capacities leave slack.
        gap_N: (N,) int64 difference between what a row has and has not at best.
        x_NE: (N, E) bool, top-k at the prices; changed in place.
        load_BE: (B, E) int64 loads of x.
        skip_B: (B,) bool, problems to leave as they are.
        max_phases: make three attempts of so many phases at most; None = optimum.

    Returns:
        (B, E) int64 prices; optimal unless ``max_phases`` ended it.

    Raises:
        ValueError: forbidden arcs leave units that no expert can take; says how many.
    """
    num_experts = problem.num_experts
    has_sink_B = ~problem.tight_B
    prices_BE = prices_BE.copy()
    slack_BE = np.zeros_like(load_BE)
    # Unused units of an expert count as filled by the sink only where its price is 0:
    # elsewhere an under-filled expert violates complementary slackness.
    free_BE = has_sink_B[:, None] & (prices_BE == 0)
    slack_BE[free_BE] = np.maximum(problem.capacity_BE - load_BE, 0)[free_BE]
    excess_BN = np.zeros((prices_BE.shape[0], num_experts + 1), np.int64)
    excess_BN[:, :num_experts] = load_BE + slack_BE - problem.capacity_BE
    excess_BN[:, num_experts] = np.where(has_sink_B, -excess_BN.sum(1), 0)
    excess_BN[skip_B] = 0
    reach_B, stride_B = _first_reach(problem, gap_N, excess_BN)
    drift_B = np.zeros_like(reach_B)
    attempts = 0
    while (reach_B >= 0).any():
        attempts += 1
        found = backend.contested(problem, prices_BE, x_NE, reach_B, stride_B, gap_N, drift_B)
        potential_BN, status_B = backend.augment(
            found,
            prices_BE,
            excess_BN,
            slack_BE,
            has_sink_B,
            reach_B,
            _ALL_PHASES if max_phases is None else max_phases,
        )
        found.apply(x_NE)
        level_B = np.where(has_sink_B, potential_BN[:, num_experts], 0)
        prices_BE += potential_BN[:, :num_experts] - level_B[:, None]
        # Without a sink its potential is 0, which only makes this bound looser.
        drift_B += potential_BN.max(1) - potential_BN.min(1)
        if max_phases is not None and attempts == _BOUNDED_ATTEMPTS:
            break
        stuck_B = (reach_B >= _WHOLE) & (status_B == 1)
        if stuck_B.any():
            left = int(np.maximum(excess_BN, 0).sum(1)[stuck_B][0])
            raise ValueError(
                f"no assignment exists: forbidden arcs leave {left} assignments without an "
                "expert that has room; allow more experts or raise the capacities"
            )
        longer_B = np.clip(reach_B * _LONGER, 1, _WHOLE)
        reach_B = np.where(status_B == 0, -1, np.where(status_B == 1, longer_B, reach_B))
        stride_B = np.ones_like(reach_B)
    return prices_BE


def _first_reach(
    problem: Problem, gap_N: IntArray, excess_BN: IntArray
) -> tuple[IntArray, IntArray]:
    """Return (B,) int64 reach, -1 for problems in balance, and (B,) int64 stride of rows.

    A reach of 0 admits only moves at no cost, which stay right when rows are left out.
    """
    units_B = np.maximum(excess_BN, 0).sum(1)
    reach_B = np.full(units_B.size, -1, np.int64)
    stride_B = np.ones_like(reach_B)
    for b in np.flatnonzero(units_B).tolist():
        gaps = gap_N[problem.start_B[b] : problem.start_B[b + 1]]
        rank = min(gaps.size // 2, _ROWS_PER_UNIT * int(units_B[b]) + _MIN_ROWS)
        reach_B[b] = min(int(np.partition(gaps, rank)[rank]), _WHOLE)
        if reach_B[b] == 0:
            enough = _PLATEAU_ROWS_PER_UNIT * int(units_B[b]) + 4 * problem.num_experts
            stride_B[b] = max(1, int((gaps == 0).sum()) // enough)
    return reach_B, stride_B
