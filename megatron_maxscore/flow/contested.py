"""Rows that the finish may have to change, with the few experts that matter to them.

Shape letters: B problems, N rows of all problems, R contested rows, A arcs.
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
        row_R: (R,) int64 row of the problem's scores.
        problem_R: (R,) int64 its problem.
        first_B: (B + 1,) int64, problem b has the contested rows ``first_B[b]`` and following.
        first_R: (R + 1,) int64, a row has the arcs ``first_R[r]`` and following.
        expert_A: (A,) int32.
        value_A: (A,) int64 reduced score.
        held_A: (A,) bool, whether the row has the expert.
    """

    row_R: IntArray
    problem_R: IntArray
    first_B: IntArray
    first_R: IntArray
    expert_A: np.ndarray
    value_A: IntArray
    held_A: BoolArray

    @classmethod
    def allocate(cls, count_N: IntArray, problem: Problem) -> Contested:
        """Make room for ``count_N`` arcs per row; rows without arcs are not contested."""
        row_R = np.flatnonzero(count_N)
        first_B = np.searchsorted(row_R, problem.start_B)
        first_R = np.zeros(row_R.size + 1, np.int64)
        count_N[row_R].cumsum(out=first_R[1:])
        arcs = int(first_R[-1])
        return cls(
            row_R,
            np.repeat(np.arange(problem.num_problems), np.diff(first_B)),
            first_B,
            first_R,
            np.empty(arcs, np.int32),
            np.empty(arcs, np.int64),
            np.empty(arcs, np.bool_),
        )

    def of_all_ranks(
        self, exchange: Exchange, problem: Problem
    ) -> tuple[Contested, IntArray | None]:
        """Return the contested rows of all ranks, by problem and index, and which arcs are own.

        Two rounds: the sizes, then (how many arcs, experts, which of them are held, reduced scores)
        of each row. Reduced scores are given above the best that the row has not, which all that
        is decided from them allows, and which takes four bytes.
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
        most_R = np.zeros(self.row_R.size, np.int64)
        if self.row_R.size:
            others_A = np.where(self.held_A, -_HUGE, self.value_A)
            most_R = np.maximum.reduceat(others_A, self.first_R[:-1])
        arcs_R = np.diff(self.first_R)
        above_A = self.value_A - np.repeat(most_R, arcs_R)
        is_wide = bool((np.abs(above_A) > np.iinfo(np.int32).max).any())
        return b"".join(
            [
                bytes([is_wide]),
                np.diff(self.first_B).astype(np.int32).tobytes(),
                np.array([above_A.size], np.int32).tobytes(),
                (arcs_R - 1).astype(_index_type(num_experts)).tobytes(),
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
    arcs_R = _by_problem([arcs_R for _, arcs_R, *_ in parts], rows_RB)
    arcs_RB = np.stack([_arcs_of(rows_B, arcs_R) for rows_B, arcs_R, *_ in parts])
    columns = [_by_problem([part[i] for part in parts], arcs_RB) for i in (2, 3, 4)]
    first_R = np.zeros(arcs_R.size + 1, np.int64)
    arcs_R.cumsum(out=first_R[1:])
    rows_B = rows_RB.sum(0)
    merged = Contested(
        np.arange(arcs_R.size),
        np.repeat(np.arange(rows_B.size), rows_B),
        np.concatenate([[0], rows_B.cumsum()]),
        first_R,
        columns[0].astype(np.int32),
        columns[1].astype(np.int64),
        columns[2],
    )
    return merged, arcs_RB


def _arcs_of(rows_B: IntArray, arcs_R: IntArray) -> IntArray:
    """Return (B,) int64 arcs of each problem."""
    ends_R = np.concatenate([[0], arcs_R.cumsum()])
    return np.asarray(np.diff(ends_R[np.concatenate([[0], rows_B.cumsum()])]))


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
    arcs_R = take(small, int(rows_B.sum())).astype(np.int64) + 1
    experts = take(small, arcs)
    held = np.unpackbits(take(np.uint8, -(-arcs // 8)), count=arcs).astype(np.bool_)
    return rows_B, arcs_R, experts, take(np.int64 if data[0] else np.int32, arcs), held
