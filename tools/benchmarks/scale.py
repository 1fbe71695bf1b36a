"""The solver on many ranks, simulated in one process, and what it would cost on a cluster.

    python -m tools.benchmarks.scale [--ranks 8 32 128 512] [--experts 64 256] [--output DIRECTORY]

Every rank is a thread that runs ``flow.solve`` on scores of its own; only the collectives are
replaced. Rounds, bytes and assignment are therefore those of real ranks. What is the same on all
ranks is computed once. Times are estimates: for each round, the time that the slowest rank computes
on one core of this machine, plus the time of the collective in an alpha-beta model. A larger
cluster consists of independent expert-parallel groups; the slowest group counts.

Writes scale.csv and scale.png.
"""

from __future__ import annotations

import argparse
import csv
import math
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_maxscore.flow import MAX_EXPERTS, FlowSolution, solve
from megatron_maxscore.flow.exchange import Exchange, pack

ROOT = Path(__file__).resolve().parents[2]

TOKENS = 4096
TOPK = 8
# The alpha-beta model. A collective takes one stage per doubling of the ranks, within a node of
# eight GPUs over NVLink, beyond over InfiniBand; its bytes then pass the slowest link once
# (all-gather: all ranks' bytes; all-reduce: twice its own).
RANKS_PER_NODE = 8
NVLINK_LATENCY, NVLINK_BANDWIDTH = 3e-6, 300e9
INFINIBAND_LATENCY, INFINIBAND_BANDWIDTH = 8e-6, 45e9
# A layer of the stated model: hidden 4096, attention 4 h^2, k experts of 3 x h x 1536 weights, six
# operations per weight and token forward and backward, at 400 Tflop/s per GPU.
HIDDEN, EXPERT_WIDTH, FLOPS = 4096, 1536, 400e12


def layer_seconds() -> float:
    """Return the time of one layer of the stated model on one GPU, forward and backward."""
    weights = 4 * HIDDEN**2 + TOPK * 3 * HIDDEN * EXPERT_WIDTH
    return 6 * weights * TOKENS / FLOPS


def collective_seconds(kind: str, ranks: int, sent: int) -> float:
    """Return the modelled time of one collective in which each rank contributes ``sent`` bytes."""
    near = min(ranks, RANKS_PER_NODE)
    nodes = math.ceil(ranks / RANKS_PER_NODE)
    stages = math.log2(max(near, 1)) * NVLINK_LATENCY
    stages += math.log2(max(nodes, 1)) * INFINIBAND_LATENCY
    moved = sent * (ranks if kind == "gather" else 2)
    if kind == "sum":
        stages *= 2
    return stages + moved / (INFINIBAND_BANDWIDTH if nodes > 1 else NVLINK_BANDWIDTH)


@dataclass
class Cluster:
    """What simulated ranks share."""

    size: int
    slots: list[Any] = field(default_factory=list)
    outcome: Any = None
    computing: float = 0.0
    rounds: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = [None] * self.size
        self.barrier = threading.Barrier(self.size)


class Simulated(Exchange):
    """One simulated rank's side of the collectives."""

    def __init__(self, cluster: Cluster, rank: int) -> None:
        self.cluster, self.rank, self.size = cluster, rank, cluster.size
        self._since = time.thread_time()

    def _meet(self, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """Give a value; return what rank 0 makes of all of them."""
        cluster = self.cluster
        cluster.slots[self.rank] = value, time.thread_time() - self._since
        cluster.barrier.wait()
        if self.rank == 0:
            # Ranks compute at the same time: the slowest one counts.
            cluster.computing += max(seconds for _, seconds in cluster.slots)
            cluster.outcome = combine([given for given, _ in cluster.slots])
        cluster.barrier.wait()
        outcome = cluster.outcome
        cluster.barrier.wait()
        self._since = time.thread_time()
        return outcome

    def _note(self, kind: str, sent: int) -> None:
        self.rounds += 1
        self.sent += sent
        if self.rank == 0:
            self.cluster.rounds.append((kind, sent))

    def gather(self, payload: bytes, sizes: list[int] | None = None, *, phase: str) -> list[bytes]:
        """See the base class."""
        self._note("gather", len(payload) if sizes is None else max(sizes))
        result: list[bytes] = self._meet(payload, lambda given: given)
        return result

    def sum(self, counts: list[np.ndarray], below: int, *, phase: str) -> list[np.ndarray]:
        """See the base class."""
        flat = np.concatenate([part.ravel() for part in counts])
        self._note("sum", pack(flat, below).nbytes)
        result: list[np.ndarray] = self._meet(
            counts, lambda given: [np.sum(parts, axis=0) for parts in zip(*given, strict=True)]
        )
        return result

    def sum_tensor(self, counts: torch.Tensor, *, phase: str) -> torch.Tensor:
        """See the base class."""
        self._note("sum", counts.nbytes)
        total = self._meet(counts.clone(), lambda given: sum(part for part in given))
        return counts.copy_(total)

    def gather_tensor(self, own: torch.Tensor, *, phase: str) -> torch.Tensor:
        """See the base class."""
        self._note("gather", own.nbytes)
        everyone: torch.Tensor = self._meet(own, torch.cat)
        return everyone

    def same(self, compute: Callable[[], Any]) -> Any:
        """See the base class; rank 0 computes, and its time is part of every rank's."""

        def once(given: list[Any]) -> Any:
            started = time.thread_time()
            try:
                return compute(), None
            except ValueError as error:
                return None, error
            finally:
                self.cluster.computing += time.thread_time() - started

        result, error = self._meet(None, once)
        if error is not None:
            raise error
        return result


def solve_together(
    size: int, scores: Callable[[int], torch.Tensor], topk: int, **arguments: Any
) -> tuple[list[FlowSolution], Cluster, list[Exchange]]:
    """Solve one problem on ``size`` simulated ranks.

    Args:
        size: ranks.
        scores: returns the (T, E) scores of a rank.
        topk: experts per token.
        **arguments: of ``flow.solve``.
    """
    cluster = Cluster(size)
    exchanges: list[Exchange] = [Simulated(cluster, rank) for rank in range(size)]
    solutions: list[Any] = [None] * size

    def rank_main(rank: int) -> None:
        own = scores(rank)
        exchanges[rank]._since = time.thread_time()  # type: ignore[attr-defined]
        try:
            solutions[rank] = solve(own, topk, group=exchanges[rank], **arguments)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            solutions[rank] = error
            cluster.barrier.abort()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for solution in solutions:
        if isinstance(solution, BaseException):
            raise solution
    return solutions, cluster, exchanges


def batch(experts: int, seed: int, skew: float = 0.5) -> Callable[[int], torch.Tensor]:
    """Return scores of ranks: independent logits, offsets of experts that differ by rank."""

    def scores(rank: int) -> torch.Tensor:
        offsets = torch.randn(experts, generator=torch.Generator().manual_seed(rank))
        fresh = torch.Generator().manual_seed(100_003 * seed + rank)
        return torch.randn(TOKENS, experts, generator=fresh) + skew * offsets

    return scores


def run(ranks: int, experts: int, groups: int = 1) -> dict[str, Any]:
    """Simulate groups of ranks, warm from another batch's prices; the slowest group counts."""
    worst: dict[str, Any] = {}
    for group in range(groups):
        before, _, _ = solve_together(ranks, batch(experts, 2 * group), TOPK)
        prices = before[0].prices
        del before
        solutions, cluster, exchanges = solve_together(
            ranks, batch(experts, 2 * group + 1), TOPK, prices=prices
        )
        first = solutions[0]
        loads = first.loads.sum(0)
        assert float(first.gap) <= 1e-9 and int(loads.max()) <= -(-ranks * TOKENS * TOPK // experts)
        wire = sum(collective_seconds(kind, ranks, sent) for kind, sent in cluster.rounds)
        row = {
            "ranks": ranks * groups,
            "groups": groups,
            "experts": experts,
            "tokens": ranks * groups * TOKENS,
            "rounds": first.rounds,
            "KB sent per rank": exchanges[0].sent / 1e3,
            "collectives ms": 1e3 * wire,
            "computing ms": 1e3 * cluster.computing,
            "collectives / layer": wire / layer_seconds(),
            "(computing + collectives) / layer": (wire + cluster.computing) / layer_seconds(),
        }
        if not worst or row["collectives ms"] > worst["collectives ms"]:
            worst = row
    worst["peak GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return worst


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw rounds, bytes and times against ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5))
    for number, experts in enumerate(sorted({row["experts"] for row in rows})):
        own = [row for row in rows if row["experts"] == experts and row["groups"] == 1]
        x = [row["ranks"] for row in own]
        style = dict(marker="o", color=f"C{number}")
        axes[0].semilogx(x, [r["rounds"] for r in own], label=f"{experts} experts", **style)
        axes[1].loglog(x, [r["KB sent per rank"] for r in own], label=f"{experts} experts", **style)
        axes[2].loglog(
            x, [r["collectives ms"] for r in own], label=f"collectives, {experts} experts", **style
        )
        axes[2].loglog(
            x,
            [r["computing ms"] for r in own],
            "--",
            label=f"computing, {experts} experts",
            **style,
        )
    axes[2].axhline(1e3 * layer_seconds(), color="k", linewidth=0.8, label="the model's layer")
    for axis, title in zip(
        axes, ("rounds", "KB sent per rank", "ms (model; one CPU core)"), strict=True
    ):
        ticks = sorted({row["ranks"] for row in rows if row["groups"] == 1})
        axis.set(title=title, xlabel=f"ranks of {TOKENS} tokens each")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Parse the options, simulate, report."""
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 32, 128, 512])
    parser.add_argument("--experts", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument(
        "--groups", nargs="+", type=int, default=[16], help="larger clusters, in groups of 64 ranks"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "scale")
    arguments = parser.parse_args()
    for name, most in (("ranks", 1 << 16), ("experts", MAX_EXPERTS), ("groups", 1 << 16)):
        for value in getattr(arguments, name):
            if not 1 <= value <= most:
                parser.error(f"--{name} must lie between 1 and {most}, got {value}")
    torch.set_num_threads(1)
    cases = [(ranks, experts, 1) for experts in arguments.experts for ranks in arguments.ranks]
    cases += [(64, experts, groups) for experts in arguments.experts for groups in arguments.groups]
    rows = [run(*case) for case in tqdm(cases, desc="ranks x experts")]
    table = Table(
        title=f"{TOKENS} tokens per rank, top-{TOPK}, warm; model: see tools/benchmarks/scale.py"
    )
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=180).print(table)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "scale.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture(rows, arguments.output / "scale.png")
    print(f"CSV and picture are in {arguments.output}")


if __name__ == "__main__":
    main()
