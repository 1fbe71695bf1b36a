"""Run row kernels on several threads, and split rows over them.

Kernels release the interpreter lock and add up integers only, so results do not depend on the
number of threads. torch's number is used: ``torch.set_num_threads`` or ``OMP_NUM_THREADS`` sets it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron_maxscore.flow.problem import IntArray

# Fewer rows than this are not worth waking a thread for.
_ROWS_PER_THREAD = 2048

_pool: tuple[int, int, ThreadPoolExecutor] | None = None


def run(tasks: list[Callable[[], Any]]) -> list[Any]:
    """Run tasks at the same time, the first in the calling thread, and return their results."""
    global _pool
    if len(tasks) == 1:
        return [tasks[0]()]
    # Threads do not survive a fork: a child makes its own.
    if _pool is None or _pool[0] != os.getpid() or _pool[1] < len(tasks) - 1:
        _pool = (os.getpid(), len(tasks) - 1, ThreadPoolExecutor(len(tasks) - 1, "maxscore"))
    futures = [_pool[2].submit(task) for task in tasks[1:]]
    try:
        first = tasks[0]()
    finally:
        # Worker threads must not keep writing into arrays after the caller has returned.
        rest = [future.result() for future in futures]
    return [first, *rest]


def spans(count: int, rows: int | None = None) -> list[tuple[int, int]]:
    """Split ``range(count)`` for the threads that ``rows`` (default ``count``) rows deserve."""
    pieces = _pieces(count if rows is None else rows)
    edges = [count * piece // pieces for piece in range(pieces + 1)]
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a] or [(0, 0)]


def row_spans(start_B: IntArray) -> list[tuple[int, int, IntArray, IntArray]]:
    """Split the rows of B problems: whole problems to a thread if there are enough of them.

    Returns:
        For each thread the first and last problem, and (B,) first and last row of each problem.
    """
    problems, rows = start_B.size - 1, int(start_B[-1])
    if problems >= _pieces(rows):
        return [(a, b, start_B[:-1], start_B[1:]) for a, b in spans(problems, rows)]
    pieces = _pieces(rows)
    rows_B = start_B[1:] - start_B[:-1]
    edges = [start_B[:-1] + rows_B * piece // pieces for piece in range(pieces + 1)]
    return [(0, problems, a, b) for a, b in itertools.pairwise(edges)]


def _pieces(rows: int) -> int:
    return max(1, min(torch.get_num_threads(), rows // _ROWS_PER_THREAD))
