"""The constructive fill in numpy, alone or over ranks; :mod:`kernels.fill` is the same with numba.

Overfull experts give up their lowest bids. Rows that then lack experts take, in order of their
index, the best ones that have room. Should all of these be theirs already, another row takes one
and gives, if it lacks none itself, one of its own that the row has not. With every arc allowed this
always ends in a feasible assignment: the other row holds more experts than the row does, so it has
one to give.

Over ranks the lowest bids of overfull experts travel, then the rows that lack experts; every rank
fills them alike.

Shape letters: N rows of this rank, E experts, M rows that lack experts, A assignments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_maxscore.flow.exchange import Exchange
from megatron_maxscore.flow.problem import BoolArray, IntArray

_NONE = -(1 << 62)


@dataclass
class Rows:
    """One problem's rows of this rank.

    Attributes:
        reduced: returns the (n, E) int64 reduced scores of rows given by their (n,) indices.
        threshold_N: (N,) int64, bids are reduced scores less these.
        x_NE: (N, E) bool, k experts per row, changed in place.
        rows_R: (R,) int64 how many rows every rank has.
        exchange: between the ranks.
    """

    reduced: Callable[[IntArray], IntArray]
    threshold_N: IntArray
    x_NE: BoolArray
    rows_R: IntArray
    exchange: Exchange

    @property
    def offset(self) -> int:
        """Rows on the ranks before this one."""
        return int(self.rows_R[: self.exchange.rank].sum())

    def owners(self, rows: IntArray) -> IntArray:
        """Return the rank of each row, given by its index in the whole problem."""
        return np.asarray(np.searchsorted(self.rows_R.cumsum(), rows, side="right"))


def fill(rows: Rows, capacity_E: IntArray, load_E: IntArray) -> int:
    """Make one problem's assignment feasible.

    Three rounds over several ranks, and one for each time that another row has to help.

    Args:
        rows: of this rank; its assignment is changed in place.
        capacity_E: (E,) int64.
        load_E: (E,) int64 of all ranks, changed in place.

    Returns:
        By how much the sum of reduced scores has fallen, on all ranks.
    """
    row_A, loss = _dropped(rows, capacity_E, load_E)
    np.minimum(load_E, capacity_E, out=load_E)
    lacking = _Lacking.gather(rows, row_A)
    while (place := lacking.next_row()) >= 0:
        r_E, x_E = lacking.r_ME[place], lacking.x_ME[place]
        has_room_E = load_E < capacity_E
        if (has_room_E & ~x_E).any():
            best = int(np.where(has_room_E & ~x_E, r_E, _NONE).argmax())
            lacking.missing_M[place] -= 1
            x_E[best] = True
            loss -= int(r_E[best])
            load_E[best] += 1
            continue
        best = int(has_room_E.argmax())
        lacking.write_back(rows)
        other, r_other_E, x_other_E = _first_without(rows, best)
        place_other = lacking.place_of(other)
        if place_other >= 0 and lacking.missing_M[place_other] > 0:
            lacking.missing_M[place_other] -= 1
        else:
            given = int((x_other_E & ~x_E).argmax())
            x_other_E[given] = False
            loss += int(r_other_E[given])
            load_E[given] -= 1
        x_other_E[best] = True
        loss -= int(r_other_E[best])
        load_E[best] += 1
        if place_other >= 0:
            lacking.x_ME[place_other] = x_other_E
        own = other - rows.offset
        if 0 <= own < rows.x_NE.shape[0]:
            rows.x_NE[own] = x_other_E
    lacking.write_back(rows)
    return loss


def _dropped(rows: Rows, capacity_E: IntArray, load_E: IntArray) -> tuple[IntArray, int]:
    """Take the lowest bids from overfull experts; return their rows, and what they sum up to."""
    over = np.flatnonzero(load_E > capacity_E)
    holders = np.flatnonzero(rows.x_NE[:, over].any(1))
    r_HE = rows.reduced(holders)
    own = []
    for expert in over.tolist():
        has = rows.x_NE[holders, expert]
        index, values = holders[has], r_HE[has, expert]
        bids = values - rows.threshold_N[index]
        lowest = np.argsort(bids, kind="stable")[: int(load_E[expert] - capacity_E[expert])]
        experts = np.full(lowest.size, expert)
        own.append(np.stack([experts, bids[lowest], index[lowest] + rows.offset, values[lowest]]))
    found_4A = np.concatenate([*own, np.zeros((4, 0), np.int64)], 1)
    found_4A = np.concatenate(_gather_columns(rows.exchange, found_4A), 1)
    # By expert, then bid, then row: each expert's first ones are given up.
    found_4A = found_4A[:, np.lexsort(found_4A[2::-1])]
    begin_A = np.searchsorted(found_4A[0], found_4A[0])
    rank_A = np.arange(found_4A.shape[1]) - begin_A
    expert_A, _, row_A, value_A = found_4A[:, rank_A < (load_E - capacity_E)[found_4A[0]]]
    own_A = (row_A >= rows.offset) & (row_A < rows.offset + rows.x_NE.shape[0])
    rows.x_NE[row_A[own_A] - rows.offset, expert_A[own_A]] = False
    return row_A, sum(value_A.tolist())


def _gather_columns(exchange: Exchange, columns: IntArray) -> list[IntArray]:
    """Return every rank's (n, A) int64 columns; two rounds."""
    height = columns.shape[0]
    counts = exchange.gather(columns.shape[1].to_bytes(8, "little"), phase="numbers of lowest bids")
    sizes = [8 * height * int.from_bytes(data, "little") for data in counts]
    received = exchange.gather(np.ascontiguousarray(columns).tobytes(), sizes, phase="lowest bids")
    return [np.frombuffer(data, np.int64).reshape(height, -1) for data in received]


@dataclass
class _Lacking:
    """Rows of all ranks that lack experts, in order of their index."""

    row_M: IntArray
    missing_M: IntArray
    r_ME: IntArray
    x_ME: BoolArray

    @classmethod
    def gather(cls, rows: Rows, row_A: IntArray) -> _Lacking:
        """Get them from all ranks, given the row of each assignment given up."""
        row_M, missing_M = np.unique(row_A, return_counts=True)
        owner_M = rows.owners(row_M)
        own = row_M[owner_M == rows.exchange.rank] - rows.offset
        r_ME, x_ME = rows.reduced(own), rows.x_NE[own]
        counts = np.bincount(owner_M, minlength=rows.rows_R.size).tolist()
        num_experts = rows.x_NE.shape[1]
        data = rows.exchange.gather(
            np.ascontiguousarray(r_ME).tobytes() + x_ME.tobytes(),
            [9 * num_experts * count for count in counts],
            phase="rows that lack experts",
        )
        values, held = [], []
        for part, count in zip(data, counts, strict=True):
            size = 8 * count * num_experts
            values.append(np.frombuffer(part[:size], np.int64).reshape(count, num_experts))
            held.append(np.frombuffer(part[size:], np.bool_).reshape(count, num_experts))
        return cls(row_M, missing_M, np.concatenate(values), np.concatenate(held))

    def next_row(self) -> int:
        """Return the place of the first row that still lacks an expert, -1 if none does."""
        left = self.missing_M > 0
        return int(left.argmax()) if left.any() else -1

    def place_of(self, row: int) -> int:
        """Return a row's place, -1 if it never lacked any."""
        place = int(np.searchsorted(self.row_M, row))
        return place if place < self.row_M.size and self.row_M[place] == row else -1

    def write_back(self, rows: Rows) -> None:
        """Write this rank's rows into its assignment."""
        own_M = rows.owners(self.row_M) == rows.exchange.rank
        rows.x_NE[self.row_M[own_M] - rows.offset] = self.x_ME[own_M]


def _first_without(rows: Rows, expert: int) -> tuple[int, IntArray, BoolArray]:
    """Return the first row of all ranks that has not the expert: index, reduced scores, experts."""
    num_experts = rows.x_NE.shape[1]
    without = ~rows.x_NE[:, expert]
    own = int(without.argmax()) if without.any() else -1
    r_E, x_E = np.zeros(num_experts, np.int64), np.zeros(num_experts, np.bool_)
    if own >= 0:
        r_E, x_E = rows.reduced(np.array([own]))[0], rows.x_NE[own].copy()
    index = own + rows.offset if own >= 0 else -1
    payload = index.to_bytes(8, "little", signed=True) + r_E.tobytes() + x_E.tobytes()
    for data in rows.exchange.gather(payload, phase="a row that can help"):
        index = int.from_bytes(data[:8], "little", signed=True)
        if index >= 0:
            r_E = np.frombuffer(data[8 : 8 + 8 * num_experts], np.int64)
            x_E = np.frombuffer(data[8 + 8 * num_experts :], np.bool_).copy()
            return index, r_E, x_E
    raise AssertionError("every row has the expert, so it has no room")
