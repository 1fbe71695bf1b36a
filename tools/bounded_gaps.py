"""Solve every family in bounded mode, cold and warm, and check the certified gaps.

    python tools/bounded_gaps.py [--sizes 8192x64x8 512x16x2] [--families iid "all equal"]

For each case: relative gap, passes over the scores, units of overflow that they leave, rounds of
moves among contested rows and over all rows. Closes with the bars, PASS or MISSED: 1e-4 on generic
families and on scores recorded from training (tools/record_scores.py, if they are there), 1e-2 on
the others, 0 on equal scores, always feasible. Ends with 1 if one is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_maxscore.flow import FlowSolution, backend, solve  # noqa: E402
from tests.oracles import check_assignment  # noqa: E402
from tools.workloads import FAMILIES, GENERIC, size_of, workload  # noqa: E402

SIZES = ("8192x64x8", "512x16x2", "4096x16x2", "4096x256x8", "16384x128x6")
RECORDED = "recorded"


@dataclass
class Counts:
    """What a bounded solve did."""

    passes: int = 0
    units: int = 0
    near_rounds: int = 0
    all_rounds: int = 0


@dataclass
class Counted:
    """Counts what the solver's row functions are called for."""

    now: Counts = field(default_factory=Counts)
    rows: int = 0

    def watch(self) -> None:
        """Wrap the row functions of the implementation in use."""
        kernels = backend.backend()
        price_pass, move_near, cheapest = kernels.price_pass, kernels.move_near, kernels.cheapest

        def counted_pass(problem: Any, *arguments: Any) -> Any:
            self.now.passes += problem.scores_NE.shape[0] == self.rows
            return price_pass(problem, *arguments)

        def counted_near(*arguments: Any) -> int:
            excess_N = arguments[6]
            self.now.units = int(excess_N[excess_N > 0].sum())
            self.now.near_rounds = move_near(*arguments)
            return self.now.near_rounds

        def counted_all(*arguments: Any) -> Any:
            self.now.all_rounds += 1
            return cheapest(*arguments)

        kernels.price_pass, kernels.move_near = counted_pass, counted_near
        kernels.cheapest = counted_all

    def solve(
        self, scores: Tensor, topk: int, capacity: Tensor, prices: Tensor | None
    ) -> tuple[FlowSolution, Counts]:
        """Solve in bounded mode and return what it took."""
        self.now, self.rows = Counts(), scores.shape[0]
        return solve(scores, topk, capacity=capacity, prices=prices, mode="bounded"), self.now


def cases(
    sizes: list[str], families: list[str], recorded: Path
) -> Iterator[tuple[str, str, Tensor, int, Tensor, dict[str, Tensor | None]]]:
    """Yield size, family, scores, k, capacity, and prices to start from by name."""
    for file in sorted(recorded.glob("*.pt")):
        data = torch.load(file, weights_only=True)
        rows, experts = data["scores"].shape
        size = f"{rows}x{experts}x{data['topk']}"
        name = f"{RECORDED}, {file.stem.split('_rank')[0]}"
        starts = {"cold": None, "warm": data["prices"]}
        yield size, name, data["scores"], data["topk"], data["capacity"], starts
    for size in sizes:
        tokens, experts, topk = map(int, size.split("x"))
        for family in families:
            work = workload(family, tokens, experts, topk)
            other = workload(family, tokens, experts, topk, batch=1)
            warm = solve(other.scores, topk, capacity=other.capacity).prices
            yield size, family, work.scores, topk, work.capacity, {"cold": None, "warm": warm}


def bar_of(family: str) -> float:
    """Return the largest gap that will do."""
    if family == "all equal":
        return 0.0
    return 1e-4 if family in GENERIC or family.startswith(RECORDED) else 1e-2


def main() -> int:
    """Print the table; return 1 if a bar is missed."""
    allowed = [family for family in FAMILIES if family != "forbidden arcs"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes", nargs="+", type=size_of, default=SIZES, help="tokens x experts x k"
    )
    parser.add_argument("--families", nargs="+", default=allowed, choices=allowed)
    parser.add_argument("--recorded", type=Path, default=ROOT / "runs" / RECORDED)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    columns = ("size", "family", "start", "gap", "passes", "units", "rounds", "over all rows", "")
    table = Table(*columns, title="bounded mode")
    counted = Counted()
    counted.watch()
    largest: dict[str, float] = {}
    missed = 0
    for size, family, scores, topk, capacity, starts in cases(
        arguments.sizes, arguments.families, arguments.recorded
    ):
        for start, prices in starts.items():
            solution, counts = counted.solve(scores, topk, capacity, prices)
            check_assignment(
                solution.experts.numpy(), scores.double().numpy(), topk, capacity.numpy()
            )
            gap = solution.gap.item()
            is_missed = gap > bar_of(family)
            missed += is_missed
            kind = family.split(",")[0] if family.startswith(RECORDED) else family
            largest[kind] = max(largest.get(kind, 0.0), gap)
            table.add_row(
                size, family, start, f"{gap:.1e}", str(counts.passes), str(counts.units),
                str(counts.near_rounds), str(counts.all_rounds), "MISSED" if is_missed else "",
            )  # fmt: skip
    console.print(table)
    for kind, gap in largest.items():
        verdict = "PASS" if gap <= bar_of(kind) else "MISSED"
        console.print(f"{verdict}: {kind}: largest gap {gap:.1e}, bar {bar_of(kind):.0e}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
