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

Only some swaps take part: for each pair of experts, those that cost at most a limit. A swap that is
left out costs at least the limit. Shortest paths therefore contain an arc of that cost in its
place, but no unit can move along this arc. The stage ends when all shortest paths contain such
arcs. If units are left, limits are set anew at the prices that have been reached.

The first limit, the reach, is the same for all pairs. It is read off the counts of gaps that the
sweeps have made, so that there are enough rows within it. Most problems need no other limit. If too
many swaps are within the reach, or few units are left, each pair gets a limit of its own. One pass
over all rows finds the cheapest swaps of each pair of experts. Paths over these swaps tell how far
the units that are left have to go. Each pair then has only its few cheapest swaps, up to a multiple
of that distance. So each stage moves units, and no stage builds large heaps to move the last ones.

On a plateau many rows offer a swap at the same cost, which is then the pair's limit. As long as
this moves most units, only every eighth row makes swaps at exactly the limit. Swaps that are left
out still cost at least the limit.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from megatron_maxscore.flow import passes
from megatron_maxscore.flow.buckets import gap_within
from megatron_maxscore.flow.contested import Contested
from megatron_maxscore.flow.exchange import Exchange
from megatron_maxscore.flow.kernels.vectors import padded
from megatron_maxscore.flow.prices import PriceState
from megatron_maxscore.flow.problem import FAR, WHOLE, BoolArray, IntArray, Problem

# The first limit aims at so many contested rows for each unit out of balance, plus a minimum, but
# at most half of all rows.
_ROWS_PER_UNIT = 32
_MIN_ROWS = 64
# The same on a plateau, where every row offers many swaps at no cost.
_PLATEAU_ROWS_PER_UNIT = 2
# All swaps take part where an expert has so few rows, and there are so few altogether.
_ROWS_PER_EXPERT, _ALL_SWAPS = 16, 1 << 22
# How many times longer the next reach is than one that did not suffice: if there are many swaps
# within it already; in general. Then the further factor if most units are left, or all of them.
_LITTLE_LONGER, _LONGER = 2, 4
_MORE_FOR_MOST, _MORE_FOR_ALL = 2, 8
_MOST_LEFT = 0.9
# All pairs of experts share one limit as long as it admits no more swaps than this for each
# assignment, or for each pair, whichever is more.
_SWAPS_PER_ASSIGNMENT, _SWAPS_PER_PAIR = 4, 64
# With at most so many units left, it must also admit no more swaps than this for each pair.
_FEW_UNITS, _FEW_SWAPS = 64, 2
# Limits of pairs: about how many swaps a pair should have, and how many more for each unit that one
# of its experts has too many or too few. A pair that had too few swaps gets _MORE times as many,
# but at most _MOST_WANTED.
_SWAPS, _SWAPS_PER_UNIT = 16, 0.5
_MORE, _MOST_WANTED = 4, 1 << 20
# The cheapest swap of each pair is found in so many groups of rows. _EXPECTED is how many swaps of
# the pair, on average, cost no more than the dearest of these.
_GROUPS = 8
# Plateaus stay thinned out as long as stages leave no more than this share of the units.
_THIN_LEFT = 0.25
_EXPECTED = _GROUPS * sum(1 / (1 + group) for group in range(_GROUPS))
# The longest limit relative to the way that units have to go; the reach if that is longer.
_FARTHEST = 64
# Pairs of experts of the problems that go through stages together.
_PAIRS_AT_ONCE = 1 << 20


def finish(exchange: Exchange, problem: Problem, state: PriceState) -> IntArray:
    """Move units until nothing is out of balance.

    Args:
        exchange: between the ranks that hold the rows; two rounds for each stage, three where
            limits differ.
        problem: the problems.
        state: prices and the assignment at them; ``x_NE`` is changed in place.

    Returns:
        (B, E) int64 prices, which are optimal.

    Raises:
        ValueError: forbidden arcs leave units that no expert can take; says how many.
    """
    at_once = max(1, _PAIRS_AT_ONCE // problem.num_experts**2)
    prices = [
        _Finish(
            exchange,
            problem.part(first, first + at_once),
            state.part(problem, first, first + at_once),
        ).run()
        for first in range(0, problem.num_problems, at_once)
    ]
    return np.concatenate(prices)


class _Finish:
    """The finish of problems that go through its stages together.

    Attributes:
        prices_BE: (B, E) int64.
        excess_BJ: (B, J) int64 units above capacity, the sink last.
        slack_BE: (B, E) int64 unused units that the sink has placed.
        left_B: (B,) int64 units that are left to be moved.
        reach_B: (B,) int64 the limit of all swaps; not used where pairs have their own limits.
        differs_B: (B,) bool, whether each pair of experts has a limit of its own.
        thins_B: (B,) bool, whether plateaus are thinned out where limits differ.
    """

    def __init__(self, exchange: Exchange, problem: Problem, state: PriceState) -> None:
        self.exchange, self.problem, self.state = exchange, problem, state
        self.has_sink_B = ~problem.tight_B
        self.prices_BE = state.prices_BE
        self.excess_BJ, self.slack_BE = imbalance(problem, self.prices_BE, state.load_BE)
        self.left_B = np.maximum(self.excess_BJ, 0).sum(1)
        self.differs_B = np.zeros(self.left_B.size, np.bool_)
        self.thins_B = np.ones(self.left_B.size, np.bool_)
        # By how much gaps may have fallen since the rows were read.
        self.drift_B = np.zeros_like(self.left_B)
        # How many times more swaps pairs should have, of problems whose limits differ.
        self.more: dict[int, NDArray] = {}

    def run(self) -> IntArray:
        """Return (B, E) int64 optimal prices."""
        if ((self.left_B > 0) & (self.state.gaps_BD[:, 0] > 0)).any():
            self.reach_B = np.zeros_like(self.left_B)
            self._level_out()
        self.reach_B = _first_reach(self.problem, self.state.gaps_BD, self.left_B)
        # One reach would admit all swaps of the plateaus.
        are_tied_B = 2 * self.state.gaps_BD[:, 0] > self.problem.rows_B
        is_few_B = (self.left_B > 0) & (self.left_B <= _FEW_UNITS)
        self.differs_B = are_tied_B & is_few_B & (self.reach_B < WHOLE)
        while self.left_B.any():
            self._stage()
        return self.prices_BE

    def _level_out(self) -> None:
        """Let rows swap experts above capacity for equally good ones below capacity."""
        ties_B, units_B = self.state.gaps_BD[:, 0], self.left_B
        slot_B = _slots((ties_B > 0) & (units_B > 0))
        enough_B = _PLATEAU_ROWS_PER_UNIT * units_B + 4 * self.problem.num_experts
        limit_FEP = self._even_limits(np.zeros(int(slot_B.max()) + 1, np.int64))
        stride_B = np.maximum(1, ties_B // enough_B)
        found, own, own_A = self._contested(slot_B, limit_FEP, stride_B)

        def level() -> tuple[BoolArray, IntArray]:
            excess_BJ = self.excess_BJ.copy()
            passes.level_out(found, excess_BJ)
            return found.held_A, excess_BJ

        held_A, self.excess_BJ = self.exchange.same(level)
        self._apply(own, own_A, held_A)
        self.left_B = np.maximum(self.excess_BJ, 0).sum(1)

    def _stage(self) -> None:
        """Set limits, move units within them, and raise prices."""
        active_B, differs_B = self.left_B > 0, self.differs_B
        slot_B = _slots(active_B)
        limit_FEP = self._even_limits(self.reach_B[active_B])
        if differs_B.any():
            limit_FEP[slot_B[differs_B], :, : self.problem.num_experts] = self._limits()
        stride_B = np.where(differs_B & self.thins_B, _GROUPS, 1)
        found, own, own_A = self._contested(slot_B, limit_FEP, stride_B)
        units_B = self.problem.rows_B * self.problem.topk
        most_B = np.maximum(
            _SWAPS_PER_ASSIGNMENT * units_B, _SWAPS_PER_PAIR * self.problem.num_experts**2
        )
        swaps_B = passes.count_swaps(found)
        differs_B = active_B & (differs_B | (swaps_B > most_B))
        wanted_FEE = np.full(
            limit_FEP.shape[:2] + limit_FEP.shape[1:2], np.iinfo(np.int32).max, np.int32
        )
        for b in np.flatnonzero(differs_B).tolist():
            wanted_FEE[slot_B[b]] = self._wanted_swaps(b)

        # Ranks have the same rows now, and move the same units.
        held_A, self.excess_BJ, self.slack_BE, potential_BJ, lacks_FEE = self.exchange.same(
            functools.partial(self._augment, found, slot_B, limit_FEP, stride_B, wanted_FEE)
        )
        for b in np.flatnonzero(differs_B).tolist():
            self.more[b] = more_wanted(self.more.get(b, 1), lacks_FEE[slot_B[b]])
        self._apply(own, own_A, held_A)
        level_B = np.where(self.has_sink_B, potential_BJ[:, -1], 0)
        self.prices_BE = self.prices_BE + potential_BJ[:, :-1] - level_B[:, None]
        # Without a sink its potential is 0, which only makes this bound looser.
        self.drift_B += potential_BJ.max(1) - potential_BJ.min(1)
        before_B, self.left_B = self.left_B, np.maximum(self.excess_BJ, 0).sum(1)
        self.thins_B &= ~differs_B | (self.left_B <= _THIN_LEFT * before_B)
        has_many_B = swaps_B > _FEW_SWAPS * self.problem.num_experts**2
        differs_B |= (self.left_B <= _FEW_UNITS) & has_many_B | (self.reach_B >= WHOLE)
        self.differs_B = differs_B & (self.left_B > 0)
        factor_B = np.where(8 * swaps_B > most_B, _LITTLE_LONGER, _LONGER)
        factor_B *= np.where(self.left_B > _MOST_LEFT * before_B, _MORE_FOR_MOST, 1)
        factor_B *= np.where(self.left_B == before_B, _MORE_FOR_ALL // _MORE_FOR_MOST, 1)
        self.reach_B = np.minimum(factor_B * self.reach_B, WHOLE)

    def _contested(
        self, slot_B: IntArray, limit_FEP: IntArray, stride_B: IntArray
    ) -> tuple[Contested, Contested, IntArray | None]:
        """Return the contested rows of all ranks, those of this rank, and which arcs are own."""
        own = passes.contested(
            self.problem, self.prices_BE, self.state.x_NE, slot_B, limit_FEP, self.state.gap_N,
            np.where(self.differs_B, FAR, self.reach_B + self.drift_B), stride_B,
        )  # fmt: skip
        found, own_A = own.of_all_ranks(self.exchange, self.problem)
        return found, own, own_A

    def _apply(self, own: Contested, own_A: IntArray | None, held_A: BoolArray) -> None:
        """Write what rows have now into the assignment."""
        own.held_A[:] = held_A if own_A is None else held_A[own_A]
        passes.apply(own, self.state.x_NE)

    def _augment(
        self,
        found: Contested,
        slot_B: IntArray,
        limit_FEP: IntArray,
        stride_B: IntArray,
        wanted_FEE: NDArray,
    ) -> tuple[BoolArray, IntArray, IntArray, IntArray, BoolArray]:
        """Move units among contested rows; return which arcs they hold now, and other changes.

        These are excess, slack, (B, J) potentials, and which pairs of experts had too few swaps.
        """
        excess_BJ, slack_BE = self.excess_BJ.copy(), self.slack_BE.copy()
        potential_BJ, lacks_FEE = passes.augment(
            found, self.prices_BE, slot_B, limit_FEP, stride_B, wanted_FEE, excess_BJ, slack_BE,
            self.has_sink_B,
        )  # fmt: skip
        return found.held_A, excess_BJ, slack_BE, potential_BJ, lacks_FEE

    def _even_limits(self, reach_F: IntArray) -> IntArray:
        """Return (F, E, P) int64 limits that are the same for all pairs of experts."""
        num_experts = self.problem.num_experts
        limit_FEP = np.empty((reach_F.size, num_experts, padded(num_experts)), np.int64)
        limit_FEP[:] = reach_F[:, None, None]
        return limit_FEP

    def _limits(self) -> IntArray:
        """Return (F, E, E) int64 limits of problems whose limits differ.

        One round.

        Raises:
            ValueError: units that are left cannot be moved at all.
        """
        far_B = _slots(self.differs_B)
        least_FGEE = passes.cheapest(self.problem, self.prices_BE, self.state.x_NE, far_B, _GROUPS)
        received = self.exchange.gather(least_FGEE.tobytes(), phase="cheapest swaps")

        def limits() -> IntArray:
            parts = [np.frombuffer(data, np.int64).reshape(least_FGEE.shape) for data in received]
            return self._limits_of(functools.reduce(np.minimum, parts), far_B)

        return self.exchange.same(limits)

    def _limits_of(self, least_FGEE: IntArray, far_B: IntArray) -> IntArray:
        least_FEE = least_FGEE.min(1)
        last_F = passes.nearest(
            least_FEE, self.prices_BE, self.excess_BJ, self.slack_BE, self.has_sink_B, far_B
        )
        far = np.flatnonzero(far_B >= 0)
        if (last_F >= FAR).any():
            left = self.left_B[far[(last_F >= FAR).argmax()]]
            raise ValueError(
                f"no assignment exists: forbidden arcs leave {left} assignments without an expert "
                "that has room; allow more experts or raise the capacities"
            )
        wanted_FEE = np.stack([self._wanted_swaps(b) for b in far.tolist()])
        dearest_FEE = np.where(least_FGEE < WHOLE, least_FGEE, -1).max(1)
        dearer_FEE = np.maximum(dearest_FEE - least_FEE, 0) * (wanted_FEE / _EXPECTED)
        limit_FEE = least_FEE + np.minimum(dearer_FEE, WHOLE).astype(np.int64)
        # Only on a plateau, where all groups have the same cheapest swap, is the limit its cost.
        limit_FEE += (least_FGEE != least_FEE[:, None]).any(1)
        limit_FEE = np.where(dearest_FEE < 0, WHOLE, limit_FEE)
        farthest_F = np.maximum(_FARTHEST * last_F, self.reach_B[far])
        return np.minimum(limit_FEE, farthest_F[:, None, None] + 1)

    def _wanted_swaps(self, b: int) -> NDArray:
        """Return (E, E) int32 about how many swaps each pair of experts should have."""
        excess_E = self.excess_BJ[b, :-1]
        gives_E, takes_E = np.maximum(excess_E, 0), np.maximum(-excess_E, 0)
        few = min(_SWAPS, 4 + int(gives_E.sum()))
        wanted_EE = few + _SWAPS_PER_UNIT * np.maximum(gives_E[:, None], takes_E)
        return np.minimum(wanted_EE * self.more.get(b, 1), _MOST_WANTED).astype(np.int32)


def more_wanted(more_EE: int | NDArray, lacks_EE: BoolArray) -> NDArray:
    """Return (E, E) int64 factors on the number of swaps of pairs, raised for pairs in need.

    The factor is capped, so that it stays within int32 after any number of stages.

    Args:
        more_EE: what it was before, (E, E) int64 or 1.
        lacks_EE: (E, E) bool, which pairs had too few swaps.
    """
    return np.asarray(np.minimum(np.where(lacks_EE, _MORE, 1) * more_EE, _MOST_WANTED))


def _slots(is_in_B: BoolArray) -> IntArray:
    """Return (B,) int64 the place of each problem among those that take part, -1 for others."""
    return np.asarray(np.where(is_in_B, is_in_B.cumsum() - 1, -1))


def imbalance(
    problem: Problem, prices_BE: IntArray, load_BE: IntArray
) -> tuple[IntArray, IntArray]:
    """Return (B, E + 1) units above capacity, the sink last, and (B, E) units that it has placed.

    The sink fills an expert's unused units only if the expert's price is 0. An under-filled expert
    with a price above 0 violates complementary slackness.
    """
    has_sink_B = ~problem.tight_B
    is_free_BE = has_sink_B[:, None] & (prices_BE == 0)
    slack_BE = np.where(is_free_BE, np.maximum(problem.capacity_BE - load_BE, 0), 0)
    excess_BE = load_BE + slack_BE - problem.capacity_BE
    sink_B = np.where(has_sink_B, -excess_BE.sum(1), 0)
    return np.concatenate([excess_BE, sink_B[:, None]], 1), slack_BE


def _first_reach(problem: Problem, gaps_BD: IntArray, left_B: IntArray) -> IntArray:
    """Return (B,) int64 a first limit for all swaps, > 0."""
    reach_B = np.ones_like(left_B)
    for b in np.flatnonzero(left_B).tolist():
        rows, ties = int(problem.rows_B[b]), int(gaps_BD[b, 0])
        if rows * problem.topk <= _ROWS_PER_EXPERT * problem.num_experts and (
            rows * problem.topk * problem.num_experts <= _ALL_SWAPS
        ):
            reach_B[b] = WHOLE
            continue
        rank = _ROWS_PER_UNIT * int(left_B[b]) + _MIN_ROWS
        reach = gap_within(gaps_BD[b], min(rows // 2, rank))
        if reach == 0:
            reach = gap_within(gaps_BD[b], ties + min((rows - ties) // 2, rank))
        reach_B[b] = max(reach, 1)
    return reach_B
