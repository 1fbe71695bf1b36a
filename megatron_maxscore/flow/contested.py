"""Rows that the finish may have to change, with the few experts that matter to them.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_maxscore.flow.exchange import Exchange
from megatron_maxscore.flow.problem import BoolArray, IntArray, Problem

_HUGE = 1 << 62


@dataclass(frozen=True)
class Contested:
    """Contested rows in order of their index, and their arcs in order of the expert.

    Attributes:
        row_C: (C,) int64 row of the problem's scores.
        problem_C: (C,) int64 its problem.
        first_B: (B + 1,) int64, problem b has the contested rows ``first_B[b]`` and following.
        first_C: (C + 1,) int64, a row has the arcs ``first_C[r]`` and following.
        expert_A: (A,) int32.
        value_A: (A,) int64 reduced score.
        held_A: (A,) bool, whether the row has the expert.
    """

    row_C: IntArray
    problem_C: IntArray
    first_B: IntArray
    first_C: IntArray
    expert_A: np.ndarray
    value_A: IntArray
    held_A: BoolArray

    @classmethod
    def allocate(cls, count_N: IntArray, problem: Problem) -> Contested:
        """Make room for ``count_N`` arcs per row; rows without arcs are not contested."""
        row_C = np.flatnonzero(count_N)
        first_B = np.searchsorted(row_C, problem.start_B)
        first_C = np.zeros(row_C.size + 1, np.int64)
        count_N[row_C].cumsum(out=first_C[1:])
        arcs = int(first_C[-1])
        return cls(
            row_C,
            np.repeat(np.arange(problem.num_problems), np.diff(first_B)),
            first_B,
            first_C,
            np.empty(arcs, np.int32),
            np.empty(arcs, np.int64),
            np.empty(arcs, np.bool_),
        )

    def of_all_ranks(
        self, exchange: Exchange, problem: Problem
    ) -> tuple[Contested, IntArray | None]:
        """Return the contested rows of all ranks, by problem and index, and which arcs are own.

        Two rounds: first the sizes, then for each row the number of its arcs, their experts, which
        of them it holds, and reduced scores. A row's reduced scores are sent relative to the best
        expert that it does not hold. Only differences within a row decide anything, and they mostly
        fit into four bytes.
        """
        if exchange.size == 1:
            return self, None
        payload = self._packed(problem.num_experts)
        sizes = [
            int.from_bytes(data, "little")
            for data in exchange.gather(
                len(payload).to_bytes(8, "little"), phase="sizes of contested rows"
            )
        ]
        received = exchange.gather(payload, sizes, phase="contested rows")
        merged, arcs_RB = exchange.same(lambda: _merged(received, problem))
        # Where in the merged order the arcs of each problem of this rank begin.
        total_B = arcs_RB.sum(0)
        begin_B = total_B.cumsum() - total_B + arcs_RB[: exchange.rank].sum(0)
        parts = zip(begin_B.tolist(), arcs_RB[exchange.rank].tolist(), strict=True)
        return merged, np.concatenate([np.arange(a, a + n) for a, n in parts])

    def _packed(self, num_experts: int) -> bytes:
        most_C = np.zeros(self.row_C.size, np.int64)
        if self.row_C.size:
            others_A = np.where(self.held_A, -_HUGE, self.value_A)
            most_C = np.maximum.reduceat(others_A, self.first_C[:-1])
        arcs_C = np.diff(self.first_C)
        above_A = self.value_A - np.repeat(most_C, arcs_C)
        is_wide = bool((np.abs(above_A) > np.iinfo(np.int32).max).any())
        return b"".join(
            [
                bytes([is_wide]),
                np.diff(self.first_B).astype(np.int32).tobytes(),
                np.array([above_A.size], np.int32).tobytes(),
                (arcs_C - 1).astype(_index_type(num_experts)).tobytes(),
                self.expert_A.astype(_index_type(num_experts)).tobytes(),
                np.packbits(self.held_A).tobytes(),
                above_A.astype(np.int64 if is_wide else np.int32).tobytes(),
            ]
        )


def _index_type(num_experts: int) -> type:
    return np.uint8 if num_experts <= 256 else np.uint16


def _merged(received: list[bytes], problem: Problem) -> tuple[Contested, IntArray]:
    """Put the rows of all ranks in order: by problem, then by rank; and count (R, B) arcs."""
    parts = [_unpacked(data, problem) for data in received]
    rows_RB = np.stack([rows_B for rows_B, *_ in parts])
    arcs_C = _by_problem([arcs_C for _, arcs_C, *_ in parts], rows_RB)
    arcs_RB = np.stack([_arcs_of(rows_B, arcs_C) for rows_B, arcs_C, *_ in parts])
    columns = [_by_problem([part[i] for part in parts], arcs_RB) for i in (2, 3, 4)]
    first_C = np.zeros(arcs_C.size + 1, np.int64)
    arcs_C.cumsum(out=first_C[1:])
    rows_B = rows_RB.sum(0)
    merged = Contested(
        np.arange(arcs_C.size),
        np.repeat(np.arange(rows_B.size), rows_B),
        np.concatenate([[0], rows_B.cumsum()]),
        first_C,
        columns[0].astype(np.int32),
        columns[1].astype(np.int64),
        columns[2],
    )
    return merged, arcs_RB


def _arcs_of(rows_B: IntArray, arcs_C: IntArray) -> IntArray:
    """Return (B,) int64 arcs of each problem."""
    ends_C = np.concatenate([[0], arcs_C.cumsum()])
    return np.asarray(np.diff(ends_C[np.concatenate([[0], rows_B.cumsum()])]))


def _by_problem(columns: list[np.ndarray], count_RB: IntArray) -> np.ndarray:
    """Concatenate columns of the ranks, problem by problem."""
    parts = [
        np.split(column, count_B.cumsum()[:-1])
        for column, count_B in zip(columns, count_RB, strict=True)
    ]
    return np.concatenate([part for parts_R in zip(*parts, strict=True) for part in parts_R])


def _unpacked(
    data: bytes, problem: Problem
) -> tuple[IntArray, IntArray, np.ndarray, np.ndarray, np.ndarray]:
    """Return rows per problem, and arcs per row, experts, reduced scores, and which are held."""
    place = 1

    def take(dtype: Any, count: int) -> np.ndarray:
        nonlocal place
        part = np.frombuffer(data, dtype, count, place)
        place += part.nbytes
        return part

    small = _index_type(problem.num_experts)
    rows_B = take(np.int32, problem.num_problems).astype(np.int64)
    arcs = int(take(np.int32, 1)[0])
    arcs_C = take(small, int(rows_B.sum())).astype(np.int64) + 1
    experts = take(small, arcs)
    held = np.unpackbits(take(np.uint8, -(-arcs // 8)), count=arcs).astype(np.bool_)
    return rows_B, arcs_C, experts, take(np.int64 if data[0] else np.int32, arcs), held
