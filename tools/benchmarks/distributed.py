"""Measure what solving over all ranks gains, and what it costs, on gloo ranks of this machine.

    python -m tools.benchmarks.distributed [--ranks 2 4 8] [--tokens 8192] [--output DIRECTORY]

For each number of ranks, torchrun starts that many. Every workload is solved on each rank alone
(scope local) and by all ranks together (scope group). The tables show the score of scope local over
that of scope group, the score of scope group over OR-tools' optimum, and rounds and bytes sent per
rank. They compare times with two other ways: Megatron's quantile balancing, which gathers all
logits, and solving on one rank. Then the whole MoE layer is timed, forward and backward, beside
stock dropless top-k. Writes distributed.csv, layer.csv and distributed.png.

The workloads follow those of Megatron-LM #7488. In three more (skew), the ranks prefer different
experts.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_maxscore.flow import FlowSolution, exchange, solve, solver

from .layer_times import layer_rows
from .oracles import ortools_objective
from .rivals import quantile_balancing
from .workloads import as_integers

ROOT = Path(__file__).resolve().parents[2]

WORKLOADS = (
    "uniform", "hot expert", "hot rank", "ragged source", "zero load", "rotating hot spot",
    "burst", "skew sigma 0.5", "skew sigma 1", "skew sigma 2",
)  # fmt: skip
# How much of their logits' scale hot experts gain.
HOT = 3.0


def scores_of(name: str, rank: int, size: int, tokens: int, experts: int, step: int) -> Tensor:
    """Return the (T, E) float32 scores of a rank in a step of a workload."""
    fresh = torch.Generator().manual_seed(1000 * step + rank)
    fixed = torch.Generator().manual_seed(77 + rank)
    if name == "ragged source":
        tokens = 2 * tokens * (rank + 1) // (size + 1)
    z = torch.randn(tokens, experts, generator=fresh)
    if name == "hot expert":
        z[:, 0] += HOT
    elif name == "hot rank":
        z[:, : experts // size] += HOT
    elif name == "zero load":
        z[:, -experts // 4 :] -= 2 * HOT
    elif name == "rotating hot spot":
        z[:, step * 5 % experts] += HOT
    elif name == "burst" and rank == 0:
        # A tenth of all tokens are alike and want the same experts.
        alike = min(tokens, size * tokens // 10)
        z[:alike] = 0.1 * z[:alike] + torch.randn(experts, generator=fixed)
    elif name.startswith("skew"):
        z += float(name.split()[-1]) * torch.randn(experts, generator=fixed)
    return z


@contextlib.contextmanager
def noted() -> Iterator[list[exchange.Exchange]]:
    """Collect the exchanges that solves make."""
    made: list[exchange.Exchange] = []

    def making(group: Any) -> exchange.Exchange:
        made.append(exchange.exchange_of(group))
        return made[-1]

    with mock.patch.object(solver, "exchange_of", making):
        yield made


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Return the median ms, between barriers, of the slowest rank, and the last result."""
    times = []
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        result = call()
        times.append(1e3 * (time.perf_counter() - started))
    slowest = torch.tensor(times)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist()), result


def gathered(scores: Tensor, sizes: list[int]) -> Tensor:
    """Return all ranks' scores on every rank."""
    longest = max(sizes)
    own = torch.zeros(longest, scores.shape[1])
    own[: scores.shape[0]] = scores
    parts = [torch.empty_like(own) for _ in sizes]
    dist.all_gather(parts, own)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def on_one_rank(scores: Tensor, sizes: list[int], topk: int, prices: Tensor) -> Tensor:
    """Gather all scores to rank 0, solve there, send each rank its experts."""
    rank, longest = dist.get_rank(), max(sizes)
    own = torch.zeros(longest, scores.shape[1])
    own[: scores.shape[0]] = scores
    parts = [torch.empty_like(own) for _ in sizes] if rank == 0 else None
    dist.gather(own, parts)
    experts = torch.empty(longest, topk, dtype=torch.int64)
    if parts is not None:
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        found = solve(whole, topk, prices=prices).experts.split(sizes)
        padded = [torch.zeros(longest, topk, dtype=torch.int64) for _ in sizes]
        for target, part in zip(padded, found, strict=True):
            target[: part.shape[0]] = part
        dist.scatter(experts, padded)
    else:
        dist.scatter(experts)
    return experts[: scores.shape[0]]


def workload_row(name: str, tokens: int, experts: int, topk: int, repeats: int) -> dict[str, Any]:
    """Solve one workload in all ways."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = dist.group.WORLD
    before = scores_of(name, rank, size, tokens, experts, 0)
    scores = scores_of(name, rank, size, tokens, experts, 1)
    counts: list[Any] = [None] * size
    dist.all_gather_object(counts, scores.shape[0])
    prices = solve(before, topk, group=world).prices

    def group(start: Tensor | None) -> FlowSolution:
        return solve(scores, topk, group=world, prices=start)

    with noted() as made:
        cold = group(None)
        warm = group(prices)
    cold_exchange, warm_exchange = made
    group_ms, _ = timed(lambda: group(prices), repeats)
    local_prices = solve(before, topk).prices
    local_ms, local = timed(lambda: solve(scores, topk, prices=local_prices), repeats)
    one_ms, _ = timed(lambda: on_one_rank(scores, counts, topk, prices), repeats)
    beta = torch.zeros(experts)
    whole = gathered(scores, counts)
    quantile_ms: float | None = None
    if sum(counts) * topk % experts == 0:
        # As its users run it: on all ranks' logits, with the bias of the step before.
        beta = quantile_balancing(gathered(before, counts), topk, beta)[1]
        quantile_ms, _ = timed(
            lambda: quantile_balancing(gathered(scores, counts), topk, beta), repeats
        )
    total = local.objective.clone()
    dist.all_reduce(total)
    # On integers, the optimum is OR-tools' exactly.
    integers = as_integers(whole)
    own = integers.split(counts)[rank].contiguous()
    together = solve(own, topk, group=world, prices=None)
    optimum = 0
    if rank == 0:
        capacity = np.full(experts, -(-sum(counts) * topk // experts))
        optimum = ortools_objective(integers.double().numpy(), topk, capacity) or 0
    mean = sum(counts) * topk / experts
    return {
        "ranks": size,
        "workload": name,
        "tokens": sum(counts),
        "local / group": float(total / warm.objective),
        "group / optimum": float(together.objective) / optimum if rank == 0 else 0.0,
        "maxvio": float(warm.loads.sum(0).max()) / mean - 1,
        "gap": float(warm.gap),
        "rounds cold": cold.rounds,
        "rounds warm": warm.rounds,
        "KB sent cold": cold_exchange.sent / 1e3,
        "KB sent warm": warm_exchange.sent / 1e3,
        "group ms": group_ms,
        "local ms": local_ms,
        "one rank ms": one_ms,
        "quantile balancing ms": quantile_ms,
    }


def work(arguments: argparse.Namespace) -> None:
    """Run on one rank; rank 0 writes the rows."""
    from megatron_maxscore import cpu

    cpu.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, list[dict[str, Any]]] = {"workloads": [], "layer": []}
    for name in arguments.workloads:
        found["workloads"].append(
            workload_row(
                name, arguments.tokens, arguments.experts, arguments.topk, arguments.repeats
            )
        )
    if not arguments.no_layer:
        # Two cores show the time of two ranks; beyond that only the share of the work counts.
        few = 3 * arguments.repeats if dist.get_world_size() == 2 else 1
        found["layer"] = layer_rows([0.0, 1.0, 2.0, 4.0, 8.0], arguments.layer_tokens, 512, few)
    if dist.get_rank() == 0:
        Path(arguments.worker).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def launch(size: int, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run :func:`work` on so many ranks of this machine."""
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory) / "found.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(size), "-m", "tools.benchmarks.distributed", "--worker", str(found), "--tokens",
            str(arguments.tokens), "--experts", str(arguments.experts), "--topk",
            str(arguments.topk), "--repeats", str(arguments.repeats), "--layer-tokens",
            str(arguments.layer_tokens), "--workloads", *arguments.workloads,
        ]  # fmt: skip
        if arguments.no_layer:
            command.append("--no-layer")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
        subprocess.run(command, check=True, env=environment)
        result: dict[str, list[dict[str, Any]]] = json.loads(found.read_text())
        return result


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "workload" else "right")
    for row in rows:
        table.add_row(*(cell(name, value) for name, value in row.items()))
    Console(width=200).print(table)


def cell(name: str, value: Any) -> str:
    """Format a value by its column."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if name == "gap":
        return f"{value:.1e}"
    if " / optimum" in name:
        return f"{value:.9g}"
    return f"{value:.3f}" if "/" in name or "share" in name or name == "maxvio" else f"{value:.1f}"


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw what the local scope leaves, and times, for each workload and number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = sorted({row["ranks"] for row in rows})
    names = list(dict.fromkeys(row["workload"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5))
    place = np.arange(len(names))
    for number, size in enumerate(sizes):
        own = {row["workload"]: row for row in rows if row["ranks"] == size}
        width = 0.8 / len(sizes)
        offset = place + (number - (len(sizes) - 1) / 2) * width
        axes[0].bar(offset, [own[n]["local / group"] for n in names], width, label=f"{size} ranks")
    axes[0].set_xticks(place, names, rotation=40, ha="right")
    axes[0].set(title="Score of scope local / score of scope group", ylim=(0.4, 1.02))
    axes[0].axhline(1.0, color="k", linewidth=0.8)
    axes[0].legend()
    for column, marker in (
        ("group ms", "o"), ("one rank ms", "s"), ("quantile balancing ms", "^"), ("local ms", "x"),
    ):  # fmt: skip
        middle = []
        for size in sizes:
            times = [r[column] for r in rows if r["ranks"] == size and r[column] is not None]
            middle.append(statistics.median(times))
        axes[1].plot(sizes, middle, marker=marker, label=column.removesuffix(" ms"))
    axes[1].set(
        title="Time, median over the workloads (two cores for all ranks)", xlabel="ranks",
        ylabel="ms", xscale="log", yscale="log",
    )  # fmt: skip
    axes[1].set_xticks(sizes, [str(size) for size in sizes])
    axes[1].xaxis.minorticks_off()
    axes[1].grid(alpha=0.3, which="both")
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Parse the options; start ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, default=8192, help="of each rank")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layer-tokens", type=int, default=4096)
    parser.add_argument("--no-layer", action="store_true", help="leave out the MoE layer")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "distributed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    results = [launch(size, arguments) for size in arguments.ranks]
    rows = [row for result in results for row in result["workloads"]]
    layer = [row for result in results for row in result["layer"]]
    arguments.output.mkdir(parents=True, exist_ok=True)
    show(
        f"{arguments.tokens} tokens per rank, {arguments.experts} experts, top-{arguments.topk}",
        rows,
    )
    write(arguments.output / "distributed.csv", rows)
    picture(rows, arguments.output / "distributed.png")
    if layer:
        show(f"MoE layer, {arguments.layer_tokens} tokens per rank, forward and backward", layer)
        write(arguments.output / "layer.csv", layer)
    print(f"CSV and picture are in {arguments.output}")


if __name__ == "__main__":
    main()
