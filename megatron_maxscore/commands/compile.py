"""Compile the solver's kernels ahead of time, for a container image or a shared installation.

    python -m megatron_maxscore compile
    NUMBA_CACHE_DIR=/opt/maxscore-kernels python -m megatron_maxscore compile

Solves small problems of every kind (float32 and float64, with forbidden arcs, several at once,
alone and over two ranks). The kernels are then in numba's cache, and a process
that finds them there starts in a second instead of half a minute. The cache lies beside the
package, or in the user's cache directory where the package cannot be written.
``NUMBA_CACHE_DIR`` names another place, for this command and for training.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from megatron_maxscore.commands.parsing import parser_of


def solves(group: Any = None) -> int:
    """Solve a small problem of every kind; return how many."""
    from megatron_maxscore.flow import solve

    generator = torch.Generator().manual_seed(0)
    kinds: list[dict[str, Any]] = [
        {},
        {"capacity_factor": 1.25},
        {"prices": torch.linspace(0.0, 1.0, 16)},
    ]
    count = 0
    for dtype in (torch.float32, torch.float64):
        # Few rows are solved as a whole; of many a sample comes first.
        for rows in (64, 4096):
            scores = torch.randn(rows, 16, generator=generator).to(dtype)
            scores[:, 0] += 2.0
            for kind in kinds:
                solve(scores, 2, group=group, **kind)
                solve(scores.reshape(4, -1, 16), 2, group=group, **kind)
                count += 2
            solve(scores.round(), 2, group=group)
            forbidden = scores.clone()
            forbidden[:, 3] = -torch.inf
            solve(forbidden, 2, capacity_factor=1.25, group=group)
            count += 2
    return count


def _on_rank(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    solves(dist.group.WORLD)
    dist.destroy_process_group()


def main(command: list[str] | None = None) -> int:
    """Compile what is not in the cache yet."""
    parser = parser_of("compile", __doc__)
    parser.parse_args(command)
    started = time.perf_counter()
    count = solves()
    with tempfile.TemporaryDirectory() as directory:
        spawn(_on_rank, (str(Path(directory) / "store"),), nprocs=2)
    print(f"{2 * count} kinds of solves are ready, after {time.perf_counter() - started:.0f} s")
    return 0
