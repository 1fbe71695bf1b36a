"""Print what a bounded solve should cost on a GPU, from its work and stated constants.

    python tools/performance_model.py [--size 8192x64x8] [--family iid | --recorded FILE]
    python tools/performance_model.py --size 4096x64x8 --ranks 8          # scope group

With ranks the size is that of each; all scores are gathered and every rank solves the whole. The
solver runs on the CPU to count passes and rounds, which are the same on a device. Everything
else is arithmetic: a model, not a measurement, and without rounds over all rows.
tools/benchmark_gpu.py measures.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_maxscore.flow import solve  # noqa: E402
from megatron_maxscore.flow.device.solver import Shape  # noqa: E402
from megatron_maxscore.flow.rounds_plain import HOPS  # noqa: E402
from tools.bounded_gaps import Counted, Counts  # noqa: E402
from tools.workloads import FAMILIES, workload  # noqa: E402


@dataclass(frozen=True)
class Gpu:
    """Constants of a device.

    Attributes:
        bandwidth: of its memory, bytes per microsecond (vendor's data sheet).
        multiprocessors: how many (data sheet).
        clock: cycles per microsecond (boost clock, data sheet).
        l2: cycles of a dependent access to the second-level cache (published microbenchmarks of
            Ampere and Hopper: 200 to 270; assumed for Blackwell).
        link: NVLink in one direction, bytes per microsecond (data sheet).
    """

    bandwidth: float
    multiprocessors: int
    clock: float
    l2: float
    link: float


GPUS = {
    "A100": Gpu(2.0e6, 108, 1410, 260, 3.0e5),
    "H100": Gpu(3.35e6, 132, 1755, 265, 4.5e5),
    "B200": Gpu(8.0e6, 148, 1850, 300, 9.0e5),
}
# Microseconds of an all-gather of nothing within a node, and the share of the link that one gets.
GATHER, LINK_SHARE = 12.0, 0.7
# Of the peak bandwidth, and of the four instructions that a multiprocessor can issue in a cycle.
BANDWIDTH_SHARE, ISSUED = 0.8, 2.0
# Microseconds from the end of a kernel to the start of the next one in a CUDA graph, and what a
# kernel takes that has nothing to do.
LAUNCH, IDLE = 1.0, 0.6
# Schedulers of a multiprocessor, each an instruction in a cycle where all data is at hand.
SCHEDULERS = 4
# Cycles of a barrier, and of a reduction over a warp or over the warps of a program.
BARRIER, REDUCTION = 40, 120
# Warp instructions for a row of 64 experts: its own, and for each time its largest is taken out.
ROW, ROW_PER_CHOICE = 200, 9


@dataclass(frozen=True)
class Work:
    """One kernel's work.

    Attributes:
        name: of the kernel.
        times: how often it does this work.
        idle: how often it is launched and ends at once.
        bytes: read and written.
        necessary: bytes that cannot be avoided: one read of the scores.
        instructions: of all warps.
        cycles: of the serial part, at 0 cycles for an access to memory.
        accesses: dependent accesses to memory in the serial part.
    """

    name: str
    times: int
    idle: int
    bytes: float
    necessary: float
    instructions: float
    cycles: float
    accesses: float

    def microseconds(self, gpu: Gpu) -> float:
        """Return the modelled time of all launches."""
        read = self.bytes / (gpu.bandwidth * BANDWIDTH_SHARE)
        issue = self.instructions / (gpu.multiprocessors * ISSUED * gpu.clock)
        serial = (self.cycles + self.accesses * gpu.l2) / gpu.clock
        return self.times * (LAUNCH + max(read, issue) + serial) + self.idle * (LAUNCH + IDLE)


def works(shape: Shape, counts: Counts, itemsize: int) -> list[Work]:
    """Return the kernels of a warm solve, in order."""
    rows, experts = shape.tokens, shape.experts
    scores = rows * experts * itemsize
    wide = experts / 64
    row = wide * (ROW + ROW_PER_CHOICE * shape.topk)
    counters = 4 * (experts + 208 + experts * shape.buckets)
    chunks = -(-experts // shape.steps(shape.buckets)["CHUNK"])
    # State, scores, counts, the counter; then loads, counts by chunks fetched ahead, state.
    tiles = -(-rows // (shape.rows * shape.programs))
    passes = counts.passes
    # The last one sets how far contested rows reach instead of prices.
    steps = chunks * 2.5 * REDUCTION * (passes - 1) / passes
    decide = 9 * REDUCTION + steps + 5 * BARRIER
    moves = shape.moves()
    classes, nodes = moves["CLASSES"], moves["BLOCK_N"]
    # Contested rows; the matrix of costs by way of the cache, 64 bytes in a cycle; in each hop
    # an addition and a minimum over it; 14 operations where all pairs are compared.
    contested = min(rows // 2, 32 * counts.units + 4 * experts)
    operation = classes * nodes * nodes / (32 * SCHEDULERS)
    per_round = (
        contested / moves["TILE"] * 4 * REDUCTION
        + 8 * classes * experts * experts / 64
        + HOPS * (2 * operation + 2 * REDUCTION)
        + 14 * operation
        + 14 * REDUCTION
        + 12 * BARRIER
    )
    accesses = 3 + 3 + 4 + 5
    contested_bytes = 44 * contested
    return [
        Work("scan", 1, 0, scores + counters, scores, rows * wide * 40, 4 * REDUCTION, 2),
        Work(
            "price passes", passes, shape.passes - passes, scores + 3 * counters, scores,
            rows * row, decide, 4 + tiles + 6,
        ),
        *(
            [Work("sample", 0, 1, 0.0, 0.0, 0.0, 0.0, 0.0)]
            if shape.sample
            else []
        ),
        Work(
            "contested rows", 1, 0, scores + rows * experts + contested_bytes, scores,
            rows * row + contested * wide * 200, 8 * REDUCTION, 4 + tiles,
        ),
        Work(
            "rounds of moves", 1, 0, contested_bytes, 0.0, 0.0,
            counts.near_rounds * per_round, counts.near_rounds * accesses + 8,
        ),
        Work("rounds over all rows", 0, 1, 0.0, 0.0, 0.0, 0.0, 0.0),
        Work(
            "results", 1, 0, scores + rows * experts + rows * shape.topk * 8, scores,
            rows * row, 8 * REDUCTION, 4 + tiles,
        ),
    ]  # fmt: skip


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="8192x64x8", help="tokens x experts x k")
    parser.add_argument("--family", default="iid", choices=FAMILIES)
    parser.add_argument("--ranks", type=int, default=1, help="of a group in one node (default: 1)")
    parser.add_argument("--recorded", type=Path, help="a file of tools/record_scores.py instead")
    arguments = parser.parse_args()
    if arguments.recorded:
        data = torch.load(arguments.recorded, weights_only=True)
        scores, topk, capacity, warm = (
            data[name] for name in ("scores", "topk", "capacity", "prices")
        )
        name = arguments.recorded.stem
    else:
        tokens, experts, topk = map(int, arguments.size.split("x"))
        tokens *= arguments.ranks
        work = workload(arguments.family, tokens, experts, topk)
        other = workload(arguments.family, tokens, experts, topk, batch=1)
        scores, capacity = work.scores, work.capacity
        warm = solve(other.scores, topk, capacity=other.capacity).prices
        name = arguments.family
    counted = Counted()
    counted.watch()
    solution, counts = counted.solve(scores, topk, capacity, warm)
    tokens, experts = scores.shape
    shape = Shape(tokens, experts, topk, int(capacity.sum()) != tokens * topk)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(
        f"{tokens}x{experts}x{topk}, {name}, warm: {counts.passes} passes, {counts.units} units of "
        f"overflow, {counts.near_rounds} rounds, {counts.all_rounds} over all rows, gap "
        f"{solution.gap.item():.1e}; Triton {triton.__version__}; model, nothing is measured"
    )
    table = Table("kernel", "launches", "KB", "KB / necessary", *(f"{gpu}, us" for gpu in GPUS))
    kernels = works(shape, counts, scores.element_size())
    for kernel in kernels:
        ratio = f"{kernel.bytes / kernel.necessary:.2f}" if kernel.necessary else ""
        table.add_row(
            kernel.name, str(kernel.times + kernel.idle), f"{kernel.bytes / 1e3:.0f}", ratio,
            *(f"{kernel.microseconds(gpu):.1f}" for gpu in GPUS.values()),
        )  # fmt: skip
    launches = sum(kernel.times + kernel.idle for kernel in kernels)
    totals = [sum(k.microseconds(gpu) for k in kernels) for gpu in GPUS.values()]
    if arguments.ranks > 1:
        received = scores.numel() * scores.element_size() * (1 - 1 / arguments.ranks)
        gather = [GATHER + received / (gpu.link * LINK_SHARE) for gpu in GPUS.values()]
        table.add_row(
            "all-gather of scores", "1", f"{received / 1e3:.0f}", "",
            *(f"{each:.1f}" for each in gather),
        )  # fmt: skip
        launches += 1
        totals = [total + each for total, each in zip(totals, gather, strict=True)]
    table.add_row("all", str(launches), "", "", *(f"{total:.0f}" for total in totals))
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
