"""Time a solve on a CUDA device against other routers' choice of experts.

    python tools/benchmark_gpu.py [--output runs/gpu] [--sizes 8192x64x8 131072x256x8]

Medians of CUDA-event times, in microseconds, with warm prices from another batch: our solve as a
CUDA graph, launch by launch, and from cold prices; torch.topk, Megatron's fused top-k (with
Transformer Engine), its sinkhorn and its quantile balancing. Each kernel's share by torch's
profiler. Then a Megatron MoE layer of one rank, bfloat16, forward and backward, with its top-k
router and with ours, in turn. Writes gpu.json.
"""

from __future__ import annotations

import argparse
import functools
import itertools
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
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_maxscore.flow import solve  # noqa: E402
from tests.one_rank_layer import make_layer, set_up, tear_down  # noqa: E402
from tools.rivals import quantile_balancing, sinkhorn  # noqa: E402
from tools.workloads import size_of, workload  # noqa: E402

SIZES = (
    "512x16x2", "4096x16x2", "8192x64x8", "4096x256x8", "16384x128x6", "65536x64x8", "131072x256x8",
)  # fmt: skip
FAMILIES = ("iid", "skewed, sigma 1", "peaked softmax")
# Microseconds after which a call is not repeated any more.
_LONG_ENOUGH = 5e5
# Of the layer: tokens, width, width of an expert.
_LAYER_SIZE = (8192, 2048, 1024)


def microseconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the median time of a call on the device, after a few to warm up.

    Of slow calls there are fewer, but three.
    """
    for _ in range(3):
        run()
    times: list[float] = []
    while len(times) < 3 or (len(times) < repeats and sum(times) < _LONG_ENOUGH):
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


def kernel_times(run: Callable[[], Any], repeats: int = 4) -> dict[str, float]:
    """Return microseconds of each kernel in a call, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / repeats for event in found.key_averages()}
    return {name: time for name, time in times.items() if time > 0}


def rivals(scores: Tensor, topk: int, capacity: Tensor, prices: Tensor) -> dict[str, Any]:
    """Return what to time, by name; None where it is not installed."""
    beta = torch.zeros(scores.shape[1], device=scores.device)
    ours = lambda: solve(scores, topk, capacity=capacity, prices=prices)  # noqa: E731
    return {
        "solve, graph": graphed(ours),
        "solve": ours,
        "solve, cold": lambda: solve(scores, topk, capacity=capacity),
        "torch.topk": lambda: scores.topk(topk, dim=1),
        "fused top-k": fused_topk(scores, topk),
        "sinkhorn": lambda: sinkhorn(scores, topk),
        "quantile balancing": lambda: quantile_balancing(scores, topk, beta),
    }


def layer_times(experts: int, topk: int, repeats: int) -> dict[str, float]:
    """Return microseconds of the layer and of its router alone, forward and backward, by router."""
    from megatron_maxscore.moe.step import average_prices

    tokens, hidden, expert_hidden = _LAYER_SIZE
    torch.cuda.set_device(0)
    set_up("nccl")
    layers = {
        name: make_layer(hidden, expert_hidden, experts, topk, name == "MaxScore", tokens)
        .cuda()
        .train()
        for name in ("top-k", "MaxScore")
    }
    layers["MaxScore"].experts = layers["top-k"].experts
    batches = [
        torch.randn(tokens, 1, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(8)
    ]
    turn = itertools.count()
    found: dict[str, list[float]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name, layer in layers.items():
        # Batches in turn, as in training: prices are those of other tokens.
        runs[f"layer, {name}"] = lambda layer=layer: (
            layer(batches[next(turn) % 8])[0].float().square().mean().backward()
        )
        runs[f"router, {name}"] = lambda layer=layer: (
            layer.router(batches[next(turn) % 8])[0].square().sum().backward()
        )
    for _ in range(5):
        for name, run in runs.items():
            found.setdefault(name, []).append(microseconds(run, repeats))
        average_prices([layers["MaxScore"].router])
    tear_down()
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> int:
    """Print the table; return 1 without a device."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes", nargs="+", type=size_of, default=SIZES, help="tokens x experts x k"
    )
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--layer", default="64x8", help="experts x k of the layer; '' for none")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device")
        return 1
    console = Console(width=None if sys.stdout.isatty() else 140)
    name = torch.cuda.get_device_name()
    versions = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = arguments.output / "gpu.json"
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {**versions, "rows": rows}
    table = None
    for size in arguments.sizes:
        tokens, experts, topk = map(int, size.split("x"))
        for family in arguments.families:
            work = workload(family, tokens, experts, topk)
            other = workload(family, tokens, experts, topk, batch=1)
            scores, capacity = work.scores.cuda(), work.capacity
            prices = solve(other.scores.cuda(), topk, capacity=capacity).prices
            solution = solve(scores, topk, capacity=capacity, prices=prices)
            times = {
                rival: None if run is None else microseconds(run, arguments.repeats)
                for rival, run in rivals(scores, topk, capacity, prices).items()
            }
            gap = solution.gap.item()
            kernels = kernel_times(
                functools.partial(solve, scores, topk, capacity=capacity, prices=prices)
            )
            rows.append({"size": size, "family": family, "gap": gap, **times, "kernels": kernels})
            # As they come: a solve that falls back to rounds over all rows can take seconds.
            report.write_text(json.dumps(found, indent=1))
            parts = ", ".join(f"{kernel} {time:.1f}" for kernel, time in kernels.items())
            print(
                f"{size} {family}: {times['solve, graph']:.1f} us as a graph; {parts}", flush=True
            )
            if table is None:
                table = Table(
                    "size", "family", "gap", *times,
                    title=f"{name}, torch {torch.__version__}, Triton {triton.__version__}, us",
                )  # fmt: skip
            cells = ["not installed" if t is None else f"{t:.1f}" for t in times.values()]
            table.add_row(size, family, f"{gap:.1e}", *cells)
    if table is not None:
        console.print(table)
    if arguments.layer:
        experts, topk = map(int, arguments.layer.split("x"))
        layer = layer_times(experts, topk, arguments.repeats)
        found["layer"] = layer
        report.write_text(json.dumps(found, indent=1))
        tokens, hidden, expert_hidden = _LAYER_SIZE
        table = Table(
            *layer, title=f"{tokens} tokens of {hidden}, {experts} experts of {expert_hidden}, "
            f"top-{topk}, bfloat16, forward and backward, us",
        )  # fmt: skip
        table.add_row(*(f"{time:.0f}" for time in layer.values()))
        console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
