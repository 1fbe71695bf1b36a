"""The finish's augmentations in Python and numpy; :mod:`kernels.augment` is the same with numba.

See :mod:`finish` for the method. Both keep one order of decisions: nodes by index, rows by index.

Shape letters: B problems, R contested rows, A arcs, N nodes (the experts, and the sink as the last
one where capacities leave slack), E experts.
"""

from __future__ import annotations

import itertools

import numpy as np

from megatron_maxscore.flow.contested import Contested
from megatron_maxscore.flow.problem import FAR, FORBIDDEN, BoolArray, IntArray

_NO_ROWS = np.zeros(0, np.int64)


def augment(
    found: Contested,
    prices_BE: IntArray,
    excess_BN: IntArray,
    slack_BE: IntArray,
    has_sink_B: BoolArray,
    reach_B: IntArray,
) -> tuple[IntArray, IntArray]:
    """Move units along shortest paths until nothing is out of balance, within reach.

    Args:
        found: contested rows; ``held_A`` is changed in place.
        prices_BE: (B, E) int64 prices at which they were collected.
        excess_BN: (B, E + 1) int64 units above capacity, the sink last; changed in place.
        slack_BE: (B, E) int64 unused units that the sink has placed; changed in place.
        has_sink_B: (B,) bool, whether capacities leave slack.
        reach_B: (B,) int64 with which rows were collected, negative for problems to leave alone.

    Returns:
        (B, E + 1) int64 by how much prices rise, and (B,) int64: 0 done, 1 the contested rows do
        not reach far enough.
    """
    potential_BN = np.zeros_like(excess_BN)
    status_B = np.zeros(prices_BE.shape[0], np.int64)
    for b in np.flatnonzero(reach_B >= 0).tolist():
        state = _Augmentation(
            found, b, prices_BE[b], excess_BN[b], slack_BE[b], bool(has_sink_B[b])
        )
        status_B[b] = state.run(int(reach_B[b]))
        potential_BN[b, : state.potential_N.size] = state.potential_N
        state.write_back()
    return potential_BN, status_B


class _Augmentation:
    """One problem's contested rows as dense matrices."""

    def __init__(
        self,
        found: Contested,
        b: int,
        prices_E: IntArray,
        excess_E1: IntArray,
        slack_E: IntArray,
        has_sink: bool,
    ) -> None:
        num_experts = prices_E.size
        self.prices_E, self.slack_E = prices_E, slack_E
        self.sink = num_experts if has_sink else -1
        nodes = num_experts + has_sink
        self.excess_N = excess_E1[:nodes]
        self.potential_N = np.zeros(nodes, np.int64)
        self.hop_bits = nodes.bit_length()
        rows = slice(int(found.first_B[b]), int(found.first_B[b + 1]))
        first_R = found.first_R[rows.start : rows.stop + 1]
        arcs = slice(int(first_R[0]), int(first_R[-1]))
        self._row_A = np.repeat(np.arange(rows.stop - rows.start), np.diff(first_R))
        self._expert_A = found.expert_A[arcs]
        self._held_A = found.held_A[arcs]
        shape = (rows.stop - rows.start, num_experts)
        # Where there is no arc, so far below every reduced score that swaps cost more than FAR.
        self.value_RE = np.full(shape, FORBIDDEN, np.int64)
        self.value_RE[self._row_A, self._expert_A] = found.value_A[arcs]
        self.held_ER = np.zeros(shape[::-1], np.bool_)
        self.held_ER[self._expert_A, self._row_A] = self._held_A
        self.other_RE = np.where(self.held_ER.T, FORBIDDEN, self.value_RE)
        self.cost_NN = np.full((nodes, nodes), FAR, np.int64)
        for expert in range(num_experts):
            self._refresh(expert)
        if has_sink:
            self.cost_NN[self.sink, :num_experts] = prices_E
            self.cost_NN[:num_experts, self.sink] = np.where(slack_E > 0, -prices_E, FAR)
        self.dirty_N = np.zeros(nodes, np.bool_)

    def write_back(self) -> None:
        self._held_A[:] = self.held_ER[self._expert_A, self._row_A]

    def run(self, reach: int) -> int:
        while self.excess_N.max() > 0:
            last = self._distances()
            if last >= FAR:
                return 1
            limit = last >> self.hop_bits
            moved_N = self.potential_N + limit - np.minimum(self.key_N >> self.hop_bits, limit)
            # Arcs that were left out cost more than reach, so prices may differ by that much.
            if moved_N.max() - moved_N.min() > reach:
                return 1
            self.potential_N[:] = moved_N
            self._move_units(self.key_N <= last)
            for expert in np.flatnonzero(self.dirty_N).tolist():
                self._refresh(expert)
            self.dirty_N[:] = False
        return 0

    def _refresh(self, a: int) -> None:
        """Recompute the costs of all arcs that leave expert a."""
        rows = self.held_ER[a].nonzero()[0]
        num_experts = self.held_ER.shape[0]
        if rows.size == 0:
            self.cost_NN[a, :num_experts] = FAR
            return
        loss_RE = self.value_RE[rows, a, None] - self.other_RE[rows]
        self.cost_NN[a, :num_experts] = np.minimum(loss_RE.min(0), FAR)

    def _distances(self) -> int:
        """Shortest paths from all overfull nodes on reduced costs, then on the number of arcs.

        Both are in one key, ``cost << hop_bits | arcs``, found by repeated relaxation. Returns the
        key up to which under-filled nodes have room for the whole excess, or that of the farthest
        one that can be reached; FAR if none can.
        """
        reduced_NN = self.cost_NN - self.potential_N[:, None] + self.potential_N
        step_NN = np.where(self.cost_NN < FAR, (reduced_NN << self.hop_bits) + 1, FAR)
        key_N = np.where(self.excess_N > 0, 0, FAR)
        while True:
            shorter_N = np.minimum(key_N, (key_N[:, None] + step_NN).min(0))
            if np.array_equal(shorter_N, key_N):
                break
            key_N = shorter_N
        self.key_N = key_N
        room = np.flatnonzero((self.excess_N < 0) & (key_N < FAR))
        if room.size == 0:
            return FAR
        order = room[np.argsort(key_N[room], kind="stable")]
        wanted = int(self.excess_N[self.excess_N > 0].sum())
        enough = np.flatnonzero((-self.excess_N[order]).cumsum() >= wanted)
        return int(key_N[order[enough[0]] if enough.size else order[-1]])

    def _movers(self, a: int, b: int) -> IntArray:
        """Rows, by index, that can move from a to b at exactly the arc's cost."""
        rows = self.held_ER[a].nonzero()[0]
        loss_R = self.value_RE[rows, a] - self.other_RE[rows, b]
        return np.asarray(rows[loss_R == self.cost_NN[a, b]])

    def _move_units(self, open_N: BoolArray) -> None:
        """One phase: depth first over arcs of reduced cost 0, each a step farther from the sources.

        Sources and arcs by index; a node that leads nowhere stays closed.
        """
        is_open = open_N.tolist()
        hop_N = self.key_N & ((1 << self.hop_bits) - 1)
        leads_NN = self.cost_NN == self.potential_N[:, None] - self.potential_N
        leads_NN &= (hop_N[:, None] + 1 == hop_N) & open_N[:, None] & open_N
        steps: list[list[int]] = [[] for _ in is_open]
        for a, b in zip(*(side.tolist() for side in np.nonzero(leads_NN)), strict=True):
            steps[a].append(b)
        for source in np.flatnonzero(self.excess_N > 0).tolist():
            while self.excess_N[source] > 0 and is_open[source]:
                path = self._find_path(source, steps, is_open)
                if not path:
                    break
                self._push(path)
                for node in path:
                    is_open[node] = True

    def _find_path(self, source: int, steps: list[list[int]], is_open: list[bool]) -> list[int]:
        """Return the nodes of a path to an under-filled node, none if there is no path."""
        path = [source]
        choices = [iter(steps[source])]
        is_open[source] = False
        while path:
            a = path[-1]
            if self.excess_N[a] < 0:
                return path
            for b in choices[-1]:
                if not is_open[b]:
                    continue
                if a == self.sink or b == self.sink:
                    leads = a == self.sink or self.slack_E[a] > 0
                else:
                    # As long as none of its rows has moved, what its costs say holds.
                    leads = not self.dirty_N[a] or self._movers(a, b).size > 0
                if leads:
                    path.append(b)
                    choices.append(iter(steps[b]))
                    is_open[b] = False
                    break
                if b != self.sink:
                    self.dirty_N[a] = True  # its row has moved in this phase
            else:
                path.pop()
                choices.pop()
        return []

    def _push(self, path: list[int]) -> None:
        target = path[-1]
        arcs = list(itertools.pairwise(path))
        units = int(min(self.excess_N[path[0]], -self.excess_N[target]))
        rows = _NO_ROWS
        for a, b in arcs:
            if b == self.sink:
                units = min(units, int(self.slack_E[a]))
            elif a != self.sink:
                rows = self._movers(a, b)
                units = min(units, rows.size)
        for a, b in arcs:
            if a == self.sink:
                self.slack_E[b] += units
                self.cost_NN[b, self.sink] = -self.prices_E[b]
            elif b == self.sink:
                self.slack_E[a] -= units
                if self.slack_E[a] == 0:
                    self.cost_NN[a, self.sink] = FAR
            else:
                # Looked for anew: a row that has just moved to a may go on from there.
                rows = rows if len(arcs) == 1 else self._movers(a, b)
                self._move(a, b, rows[:units])
        self.excess_N[path[0]] -= units
        self.excess_N[target] += units

    def _move(self, a: int, b: int, rows: IntArray) -> None:
        """Let rows give expert a and take expert b; update costs.

        Costs that may have risen are left, too low, and their expert is marked dirty.
        """
        num_experts = self.held_ER.shape[0]
        value_RE = self.value_RE[rows]
        gives, takes = value_RE[:, a], value_RE[:, b]
        self.held_ER[a, rows], self.held_ER[b, rows] = False, True
        self.other_RE[rows, a], self.other_RE[rows, b] = gives, FORBIDDEN
        held_RE, other_RE = self.held_ER[:, rows].T, self.other_RE[rows]
        costs = self.cost_NN[:num_experts]
        loses = held_RE & (value_RE - takes[:, None] == costs[:, b])
        loses[:, b] = False
        self.dirty_N[:num_experts] |= loses.any(0)
        self.dirty_N[a] = True
        back = np.where(held_RE, value_RE - gives[:, None], FAR).min(0)
        costs[:, a] = np.minimum(costs[:, a], back)
        onward = np.minimum((takes[:, None] - other_RE).min(0), FAR)
        costs[b, :num_experts] = np.minimum(costs[b, :num_experts], onward)
