"""Gather rows from all ranks: a sample to find first prices, or all rows of a small problem.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow import passes
from megatron_maxscore.flow.exchange import Exchange
from megatron_maxscore.flow.hashing import hashed, part_of
from megatron_maxscore.flow.problem import IntArray, Problem

# Sampled assignments per expert, so that its load is known to about 12 %.
_SAMPLE_LOAD = 64
_MIN_SAMPLE = 512


def wanted_sample(num_experts: int, topk: int) -> int:
    """Return the size of a sample; it is used if there are at least four times as many rows."""
    return max(_MIN_SAMPLE, -(-_SAMPLE_LOAD * num_experts // topk))


def sample_size(problem: Problem) -> IntArray:
    """Return (B,) int64 the size of each problem's sample, which is all rows if it has few."""
    wanted = wanted_sample(problem.num_experts, problem.topk)
    return np.asarray(np.where(problem.rows_B >= 4 * wanted, wanted, problem.rows_B))


def take_sample(exchange: Exchange, problem: Problem, size_B: IntArray) -> Problem:
    """Return the problem over a sample of all ranks' rows, with capacities scaled to match.

    One round; every rank gets the whole sample.
    """
    offset_RB = problem.rows_RB.cumsum(0) - problem.rows_RB
    # Which rows of each problem, by their index in it, and how many of them every rank has.
    chosen = [
        _spread(size, count)
        for size, count in zip(size_B.tolist(), problem.rows_B.tolist(), strict=True)
    ]
    ends_RB = offset_RB + problem.rows_RB
    count_RB = np.stack(
        [
            np.searchsorted(index, ends_RB[:, b]) - np.searchsorted(index, offset_RB[:, b])
            for b, index in enumerate(chosen)
        ],
        axis=1,
    )
    origin_B, offset_B, end_B = problem.origin_B, problem.offset_B, ends_RB[problem.rank]
    own = [
        origin_B[b] + index[(index >= offset_B[b]) & (index < end_B[b])]
        for b, index in enumerate(chosen)
    ]
    scores_NE = gather_rows(exchange, problem.scores_NE[np.concatenate(own)], count_RB)
    low_N = exchange.same(lambda: passes.scan(scores_NE)[0])
    share_B = size_B / np.maximum(problem.rows_B, 1)
    # Capacities are rounded to 1/1024, so that their sums are exact in any order.
    capacity_BE = np.rint(problem.capacity_BE * share_B[:, None] * 1024.0) / 1024.0
    return Problem(
        scores_NE,
        np.concatenate([[0], size_B.cumsum()]),
        size_B[None],
        0,
        problem.topk,
        capacity_BE,
        low_N,
        problem.shift_B,
        problem.has_forbidden,
    )


def gather_rows(exchange: Exchange, rows_NE: np.ndarray, count_RB: IntArray) -> np.ndarray:
    """Return every rank's rows, problem by problem in rank order.

    Args:
        exchange: one round.
        rows_NE: (N, E) this rank's rows, problem by problem.
        count_RB: (R, B) how many rows of each problem every rank has.
    """
    if exchange.size == 1:
        return np.ascontiguousarray(rows_NE)
    bytes_per_row = rows_NE.shape[1] * rows_NE.itemsize
    sizes = (count_RB.sum(1) * bytes_per_row).tolist()
    received = exchange.gather(
        np.ascontiguousarray(rows_NE).tobytes(), sizes, phase="rows of scores"
    )

    def in_order() -> np.ndarray:
        parts = [
            np.split(
                np.frombuffer(data, rows_NE.dtype).reshape(-1, rows_NE.shape[1]),
                count_B.cumsum()[:-1],
            )
            for data, count_B in zip(received, count_RB, strict=True)
        ]
        return np.concatenate([part for parts_R in zip(*parts, strict=True) for part in parts_R])

    return exchange.same(in_order)


def _spread(size: int, count: int) -> IntArray:
    """Return the indices of ``size`` of ``count`` rows, one from each of ``size`` equal parts.

    The place within a part changes from part to part. Equal steps would not do: with B sequences
    side by side, every B-th row belongs to the same sequence.
    """
    part = np.arange(size, dtype=np.int64)
    return np.asarray((part * count + part_of(hashed(part), count)) // max(size, 1))
