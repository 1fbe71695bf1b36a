"""Check the certified gaps of bounded mode without a GPU, at any size.

    python -m tools.benchmarks.engine_gaps [--sizes 8192x64x8 512x16x2] [--families iid "all equal"]

Solves every family cold, and warm with prices of another batch, with capacity factors 1, 1.02 and
1.25, and prints gap, sweeps and rounds. Decisions are the kernel's own, in Triton's interpreter;
row work is a form in numba that gives the kernel's bits (tests/kernels/test_engine.py). Closes with
the bars: 1e-4 on generic scores from 1,024 tokens, 2e-4 below, 1e-2 on degenerate ones, 0 on equal
ones. Times here say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import math
import os
import sys

# Before Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from rich.console import Console
from rich.table import Table

from . import interpreted
from .engine_model import Model
from .workloads import FAMILIES, size_of, workload

SIZES = ("512x16x2", "512x64x6", "1024x48x4", "2048x64x4", "8192x64x8", "4096x256x8")
DEGENERATE = ("peaked", "two-hot", "repeated", "clusters", "31 tokens", "1/90", "sorted alike")
FACTORS = (1.0, 1.02, 1.25)


def bar_of(family: str, tokens: int) -> float:
    """Return the largest gap that is good enough."""
    if family == "all equal":
        return 0.0
    if any(name in family for name in DEGENERATE):
        return 1e-2
    return 1e-4 if tokens >= 1024 else 2e-4


def main() -> int:
    """Print the table; return 1 if a gap is above its bar."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=size_of, default=SIZES)
    families = [family for family in FAMILIES if family != "forbidden arcs"]
    parser.add_argument("--families", nargs="+", choices=families, default=families)
    arguments = parser.parse_args()
    interpreted.install()
    table = Table("size", "family", "factor", "start", "gap", "sweeps", "rounds", "")
    cases, missed = 0, 0
    for size in arguments.sizes:
        tokens, experts, topk = map(int, size.split("x"))
        for family in arguments.families:
            work = workload(family, tokens, experts, topk)
            other = workload(family, tokens, experts, topk, batch=1)
            for factor in FACTORS:
                capacity = work.capacity
                if factor > 1.0:
                    each = math.ceil(tokens * topk * factor / experts)
                    capacity = torch.full((experts,), min(each, tokens))
                warm = Model(other.scores, topk, capacity).run().prices
                for start, prices in (("cold", None), ("warm", warm)):
                    found = Model(work.scores, topk, capacity, prices).run()
                    assert (found.held.sum(1) == topk).all(), "not k experts"
                    assert (found.held.sum(0) <= capacity.numpy()).all(), "over capacity"
                    is_missed = found.gap > bar_of(family, tokens)
                    cases, missed = cases + 1, missed + is_missed
                    row = (
                        size, family, f"{factor:g}", start, f"{found.gap:.1e}",
                        str(found.sweeps), str(found.rounds), "MISSED" if is_missed else "",
                    )  # fmt: skip
                    table.add_row(*row)
                    print(*row, flush=True)
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    print(f"{cases} cases, all feasible; {missed} above their bar")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
