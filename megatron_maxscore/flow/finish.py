"""The exact finish: shortest augmenting paths on a residual graph of E + 1 nodes.

Let x be top-k of q - prices. The token that loses least by giving expert a and taking expert b
defines the arc a -> b, so the residual graph of the whole flow contracts to the experts and, when
capacities leave slack, a sink of price 0 that stands for the unused units. All reduced costs are
>= 0 for such an x, whatever the prices: Dijkstra's algorithm finds the cheapest way to move a unit
from an overfull to an under-filled node, the potentials follow (successive shortest paths), and x
stays optimal for its own loads. When no imbalance is left, x and the prices satisfy complementary
slackness, hence both are optimal.

A path carries as many units as its arcs have tokens at the same cost: equal rows move together.

Shape letters: T tokens, E experts, N = E or E + 1 nodes.
"""

from __future__ import annotations

import itertools

import numpy as np

from megatron_maxscore.flow.problem import BoolArray, IntArray, Problem
from megatron_maxscore.flow.selection import as_mask, largest, reduced_scores

# No arc. Far above any path length, and sums of a few do not overflow int64.
_INF = np.int64(1) << 58


class Finish:
    """State of the finish: an assignment, its loads and the residual graph.

    Args:
        problem: integer problem with at least one token.
        prices_E: (E,) int64 to start from, any.
    """

    def __init__(self, problem: Problem, prices_E: IntArray) -> None:
        self.problem = problem
        num_experts = prices_E.shape[0]
        self.sink = None if problem.is_tight else num_experts
        nodes = num_experts if self.sink is None else num_experts + 1
        if self.sink is not None:
            prices_E = np.maximum(prices_E, 0)
        self.potential_N = np.zeros(nodes, np.int64)
        self.potential_N[:num_experts] = prices_E
        _, experts_TK = largest(reduced_scores(problem, prices_E), problem.topk)
        self.x_TE: BoolArray = as_mask(experts_TK, num_experts)
        load_E = self.x_TE.sum(0)
        # Unused units of an expert count as filled by the sink only where its price is 0:
        # elsewhere an under-filled expert violates complementary slackness.
        self.slack_E = np.zeros(num_experts, np.int64)
        if self.sink is not None:
            free = prices_E == 0
            self.slack_E[free] = np.maximum(problem.capacity_E - load_E, 0)[free]
        self.excess_N = np.zeros(nodes, np.int64)
        self.excess_N[:num_experts] = load_E + self.slack_E - problem.capacity_E
        if self.sink is not None:
            self.excess_N[self.sink] = -self.excess_N[:num_experts].sum()
        # Cheapest loss in q for moving one unit along each arc, and nothing to do with prices.
        self.loss_NN = np.full((nodes, nodes), _INF, np.int64)
        for expert in range(num_experts):
            self._refresh(expert)
        if self.sink is not None:
            self.loss_NN[self.sink, :num_experts] = 0
            self._refresh_sink()

    def run(self) -> IntArray:
        """Move units until nothing is out of balance.

        Returns:
            (E,) int64 optimal prices.

        Raises:
            ValueError: forbidden arcs leave units that no expert can take; says how many.
        """
        while self.excess_N.max() > 0:
            self._augment()
        num_experts = self.x_TE.shape[1]
        level = 0 if self.sink is None else self.potential_N[self.sink]
        return np.asarray(self.potential_N[:num_experts] - level)

    def _augment(self) -> None:
        cost_NN = self.loss_NN - self.potential_N[:, None] + self.potential_N[None, :]
        distance_N, parent_N, target = self._shortest_path(cost_NN)
        reach = distance_N[target]
        self.potential_N += reach - np.minimum(distance_N, reach)
        path = [target]
        while parent_N[path[-1]] >= 0:
            path.append(int(parent_N[path[-1]]))
        path.reverse()
        units = int(min(self.excess_N[path[0]], -self.excess_N[target]))
        arcs = list(itertools.pairwise(path))
        tokens = {}
        for a, b in arcs:
            if a == self.sink:
                continue
            if b == self.sink:
                units = min(units, int(self.slack_E[a]))
            else:
                tokens[a, b] = self._movers(a, b)
                units = min(units, tokens[a, b].size)
        for (a, b), movers in tokens.items():
            # Tails and heads of a path are distinct experts, so no move undoes another, and a
            # token that is in two lists can make both moves.
            self.x_TE[movers[:units], a] = False
            self.x_TE[movers[:units], b] = True
        for a, b in arcs:
            if a == self.sink:
                self.slack_E[b] += units
            elif b == self.sink:
                self.slack_E[a] -= units
        self.excess_N[path[0]] -= units
        self.excess_N[target] += units
        for node in path:
            if node != self.sink:
                self._refresh(node)
        if self.sink is not None:
            self._refresh_sink()

    def _shortest_path(self, cost_NN: IntArray) -> tuple[IntArray, IntArray, int]:
        """Dijkstra from all overfull nodes to the nearest under-filled one; ties by index."""
        nodes = cost_NN.shape[0]
        distance_N = np.where(self.excess_N > 0, 0, _INF)
        parent_N = np.full(nodes, -1, np.int64)
        open_N = np.ones(nodes, np.bool_)
        while True:
            waiting_N = np.where(open_N, distance_N, _INF)
            node = int(waiting_N.argmin())
            if waiting_N[node] >= _INF // 2:
                stuck = int(self.excess_N[self.excess_N > 0].sum())
                raise ValueError(
                    f"no assignment exists: forbidden arcs leave {stuck} assignments without an "
                    "expert that has room; allow more experts or raise the capacities"
                )
            if self.excess_N[node] < 0:
                return distance_N, parent_N, node
            open_N[node] = False
            through_N = distance_N[node] + cost_NN[node]
            closer_N = open_N & (through_N < distance_N) & (self.loss_NN[node] < _INF)
            distance_N[closer_N] = through_N[closer_N]
            parent_N[closer_N] = node

    def _refresh(self, expert: int) -> None:
        """Recompute the arcs that leave an expert from the tokens it has."""
        rows = np.flatnonzero(self.x_TE[:, expert])
        num_experts = self.x_TE.shape[1]
        if rows.size == 0:
            self.loss_NN[expert, :num_experts] = _INF
            return
        q_RE = self.problem.q_TE[rows]
        loss_RE = q_RE[:, expert, None] - q_RE
        blocked_RE = self.x_TE[rows]
        if self.problem.allowed_TE is not None:
            blocked_RE = blocked_RE | ~self.problem.allowed_TE[rows]
        loss_RE[blocked_RE] = _INF
        self.loss_NN[expert, :num_experts] = loss_RE.min(0)

    def _refresh_sink(self) -> None:
        assert self.sink is not None
        self.loss_NN[: self.sink, self.sink] = np.where(self.slack_E > 0, 0, _INF)

    def _movers(self, a: int, b: int) -> IntArray:
        """Return the tokens that can move from a to b at the arc's cost, lowest index first."""
        q_TE = self.problem.q_TE
        can_T = self.x_TE[:, a] & ~self.x_TE[:, b]
        can_T &= q_TE[:, a] - q_TE[:, b] == self.loss_NN[a, b]
        if self.problem.allowed_TE is not None:
            can_T &= self.problem.allowed_TE[:, b]
        return np.flatnonzero(can_T)
