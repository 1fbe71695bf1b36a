"""Time a bounded solve on a CUDA device against other routers' choice of experts.

    python tools/benchmark_gpu.py [--output runs/gpu] [--sizes 8192x64x8 131072x256x8]

Medians of CUDA-event times, in microseconds, with warm prices from another batch: our solve launch
by launch and as a CUDA graph, torch.topk, Megatron's fused top-k (with Transformer Engine), its
sinkhorn and its quantile balancing. Beside them the model of tools/performance_model.py is what
these figures replace. Writes gpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_maxscore.flow import solve  # noqa: E402
from tools.rivals import quantile_balancing, sinkhorn  # noqa: E402
from tools.workloads import workload  # noqa: E402

SIZES = (
    "512x16x2", "4096x16x2", "8192x64x8", "4096x256x8", "16384x128x6", "65536x64x8", "131072x256x8",
)  # fmt: skip
FAMILIES = ("iid", "skewed, sigma 1", "peaked softmax")


def microseconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the median time of a call on the device, after a few to warm up."""
    for _ in range(5):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def graphed(run: Callable[[], Any]) -> Callable[[], None]:
    """Return the replay of a call captured in a CUDA graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def fused_topk(scores: Tensor, topk: int) -> Callable[[], Any] | None:
    """Return Megatron's fused top-k, None without Transformer Engine."""
    from megatron.core.transformer.moe import moe_utils

    fused = getattr(moe_utils, "fused_topk_with_score_function", None)
    if not moe_utils.HAVE_TE or fused is None:
        return None
    return lambda: moe_utils.topk_routing_with_score_function(scores, topk, fused=True)


def rivals(scores: Tensor, topk: int, capacity: Tensor, prices: Tensor) -> dict[str, Any]:
    """Return what to time, by name; None where it is not installed."""
    beta = torch.zeros(scores.shape[1], device=scores.device)
    ours = lambda: solve(scores, topk, capacity=capacity, prices=prices, mode="bounded")  # noqa: E731
    return {
        "solve, graph": graphed(ours),
        "solve": ours,
        "torch.topk": lambda: scores.topk(topk, dim=1),
        "fused top-k": fused_topk(scores, topk),
        "sinkhorn": lambda: sinkhorn(scores, topk),
        "quantile balancing": lambda: quantile_balancing(scores, topk, beta),
    }


def main() -> int:
    """Print the table; return 1 without a device."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="tokens x experts x k")
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device; tools/performance_model.py needs none")
        return 1
    console = Console(width=None if sys.stdout.isatty() else 140)
    name = torch.cuda.get_device_name()
    rows = []
    table = None
    for size in arguments.sizes:
        tokens, experts, topk = map(int, size.split("x"))
        for family in arguments.families:
            work = workload(family, tokens, experts, topk)
            other = workload(family, tokens, experts, topk, batch=1)
            scores, capacity = work.scores.cuda(), work.capacity
            prices = solve(other.scores.cuda(), topk, capacity=capacity, mode="bounded").prices
            solution = solve(scores, topk, capacity=capacity, prices=prices, mode="bounded")
            times = {
                rival: None if run is None else microseconds(run, arguments.repeats)
                for rival, run in rivals(scores, topk, capacity, prices).items()
            }
            rows.append({"size": size, "family": family, "gap": solution.gap.item(), **times})
            if table is None:
                table = Table(
                    "size", "family", "gap", *times,
                    title=f"{name}, torch {torch.__version__}, Triton {triton.__version__}, us",
                )  # fmt: skip
            cells = ["not installed" if t is None else f"{t:.1f}" for t in times.values()]
            table.add_row(size, family, f"{solution.gap.item():.1e}", *cells)
    if table is not None:
        console.print(table)
    arguments.output.mkdir(parents=True, exist_ok=True)
    versions = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
    (arguments.output / "gpu.json").write_text(json.dumps({**versions, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
