"""Time a solve on a CUDA device against other routers' choice of experts.

    python -m tools.benchmarks.gpu [--output runs/gpu] [--sizes 8192x64x8] [--seconds 240]

Prints medians of CUDA-event times in microseconds. Our solve starts from prices of another batch
and runs as a CUDA graph and launch by launch; it also runs from cold prices. It is compared with
torch.topk and with Megatron's fused top-k (with Transformer Engine), sinkhorn and quantile
balancing. Sweeps and rounds are counted, and each kind of phase is timed. After the first four
problems, a Megatron MoE layer of one rank is timed in bfloat16, forward and backward: with forced
balance, with top-k and with MaxScore, in turn. The most telling cases come first. gpu.json is
written as results come, and no new case begins after ``--seconds``. ``--recorded DIRECTORY`` also
times scores that tools/benchmarks/record_scores.py has recorded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_maxscore.flow import engine, solve

from .one_rank_layer import make_layer, set_up, tear_down
from .rivals import quantile_balancing, sinkhorn
from .workloads import size_of, workload

ROOT = Path(__file__).resolve().parents[2]

SIZES = (
    "8192x64x8", "4096x256x8", "16384x128x6", "65536x64x8", "131072x256x8", "4096x128x8",
    "16384x128x8", "2048x256x8", "4096x256x6", "4096x384x6", "4096x128x4", "512x16x2",
)  # fmt: skip
FAMILIES = ("iid", "skewed, sigma 1", "peaked softmax")
# Experts and k of the layers.
LAYERS = ((64, 8), (256, 8))
# Microseconds after which a call is not repeated any more.
_LONG_ENOUGH = 5e5
# Of the layer: tokens, width, width of an expert.
_LAYER_SIZE = (8192, 2048, 1024)


def microseconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the median time of a call on the device, after a few to warm up.

    Slow calls are repeated less often, but at least three times.
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


def phases(scores: Tensor, topk: int, capacity: Tensor, prices: Tensor) -> dict[str, Any]:
    """Return how many sweeps and rounds a solve makes, and the time of each kind of phase."""
    made = engine.Solve(scores[None], topk, prices)
    made.run(capacity)
    sweeps, rounds = (int(made.state(name)) for name in ("SWEEPS", "ROUNDS"))
    if not engine.is_cooperative(scores.device):
        return {"sweeps": sweeps, "rounds": rounds}

    def until(last: int) -> float:
        def run() -> None:
            part = engine.Solve(scores[None], topk, prices)
            part.launch(0, last, capacity, launch_cooperative_grid=True)

        return microseconds(run, 20)

    last = 1 + sweeps + rounds
    ends = [1, 2, 1 + sweeps, last, last + 1, last + 2]
    scan, first, swept, rounded, concluded, ordered = (until(end) for end in ends)
    return {
        "sweeps": sweeps,
        "rounds": rounds,
        "scan_us": scan,
        "sweep_us": (swept - first) / max(sweeps - 1, 1),
        "round_us": (rounded - swept) / max(rounds, 1),
        "conclusion_us": concluded - rounded,
        "order_us": ordered - concluded,
    }


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
        name: make_layer(
            hidden, expert_hidden, experts, topk, name == "MaxScore", tokens,
            is_forced=name == "forced balance",
        )
        .cuda()
        .train()
        for name in ("forced balance", "top-k", "MaxScore")
    }  # fmt: skip
    for name in ("top-k", "MaxScore"):
        layers[name].experts = layers["forced balance"].experts
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
    for _ in range(3):
        for name, run in runs.items():
            found.setdefault(name, []).append(microseconds(run, repeats))
        average_prices([layers["MaxScore"].router])
    tear_down()
    return {name: statistics.median(times) for name, times in found.items()}


def problems(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield names of problems, and functions that return scores, k, capacity and prices."""
    for family in arguments.families:
        for size in arguments.sizes:
            tokens, experts, topk = map(int, size.split("x"))

            def make(family=family, tokens=tokens, experts=experts, topk=topk) -> Any:  # type: ignore[no-untyped-def]
                work = workload(family, tokens, experts, topk)
                other = workload(family, tokens, experts, topk, batch=1).scores.cuda()
                prices = solve(other, topk, capacity=work.capacity).prices
                return work.scores.cuda(), topk, work.capacity.cuda(), prices

            yield f"{size} {family}", make
        for file in sorted(arguments.recorded.glob("*.pt")) if arguments.recorded else ():

            def load(file=file) -> Any:  # type: ignore[no-untyped-def]
                data = torch.load(file, weights_only=True)
                scores, prices = data["scores"].float().cuda(), data["prices"].cuda()
                return scores, data["topk"], data["capacity"].cuda(), prices

            if family == arguments.families[0]:
                yield file.stem, load


def main() -> int:
    """Print the table; return 1 without a device."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes", nargs="+", type=size_of, default=SIZES, help="tokens x experts x k"
    )
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--recorded", type=Path, help="directory of recorded scores")
    parser.add_argument("--seconds", type=float, default=240.0, help="start nothing new after this")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device")
        return 1
    started = time.monotonic()
    name = torch.cuda.get_device_name()
    found: dict[str, Any] = {
        "device": name, "torch": torch.__version__, "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"), "rows": [], "layers": {},
    }  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = arguments.output / "gpu.json"
    table = None
    for number, (label, make) in enumerate(problems(arguments)):
        if time.monotonic() - started > arguments.seconds:
            print(f"stopped after {arguments.seconds:.0f} s, before {label}")
            break
        if number == 4:
            for experts, topk in LAYERS:
                found["layers"][f"{experts}x{topk}"] = times = layer_times(experts, topk, 10)
                report.write_text(json.dumps(found, indent=1))
                parts = ", ".join(f"{run} {time:.0f}" for run, time in times.items())
                print(f"layer, {experts} experts, top-{topk}, us: {parts}", flush=True)
        scores, topk, capacity, prices = make()
        gap = solve(scores, topk, capacity=capacity, prices=prices).gap.item()
        counted = phases(scores, topk, capacity, prices)
        times = {
            rival: None if run is None else microseconds(run, arguments.repeats)
            for rival, run in rivals(scores, topk, capacity, prices).items()
        }
        found["rows"].append({"problem": label, "gap": gap, **counted, **times})
        report.write_text(json.dumps(found, indent=1))
        print(f"{label}: {times['solve, graph']:.1f} us as a graph; {counted}", flush=True)
        if table is None:
            title = f"{name}, torch {torch.__version__}, Triton {triton.__version__}, us"
            table = Table("problem", "gap", "sweeps + rounds", *times, title=title)
        cells = ["not installed" if t is None else f"{t:.1f}" for t in times.values()]
        table.add_row(label, f"{gap:.1e}", f"{counted['sweeps']} + {counted['rounds']}", *cells)
    if table is not None:
        Console(width=None if sys.stdout.isatty() else 150).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
