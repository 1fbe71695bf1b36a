"""Print what routers make of the imbalance workloads that Megatron's users ask for, step by step.

    python -m tools.benchmarks.imbalance [--steps 12] [--tokens 1024] [--experts 64] [--ranks 8]

The workloads W0 to W7 are those of Megatron-LM's pull request 7488, as router scores: what top-k
makes of them is the imbalance that the workload is named for.

- W0 balanced: no expert is preferred.
- W1 hot experts: an eighth of the experts, side by side, is preferred.
- W2 hot rank: all experts of one rank are preferred.
- W3 spread hot experts: as many as in W1, spread over the ranks.
- W4 ragged source: ranks have different numbers of tokens, and a taste of their own.
- W5 zero load: nobody wants the experts of one rank, and single ones elsewhere.
- W6 rotating hot spot: the preferred experts are others in every step.
- W7 burst: balanced, but for strong preferences in every fourth step.

Routers: Megatron's top-k, its quantile balancing and its expert bias (sigmoid), each with its own
update rule, and MaxScore in scope local. With a capacity of 1.0, an expert drops the tokens of a
rank that exceed its share of them, as with ``--moe-expert-capacity-factor 1``. Each cell shows the
dropped share, then the load of the hottest expert and of the hottest rank, each divided by the mean
load, after dropping.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_maxscore.flow import solve
from megatron_maxscore.moe.quotas import capacities

# How much a hot expert is preferred, in standard deviations of the scores.
HEAT = 3.0
BURST_EVERY = 4


@dataclass(frozen=True)
class Layout:
    """Sizes: tokens of each rank, experts, experts per token, ranks."""

    tokens: int
    experts: int
    topk: int
    ranks: int


def _hot(layout: Layout, chosen: Tensor, heat: float = HEAT) -> Tensor:
    bias = torch.zeros(layout.experts)
    bias[chosen % layout.experts] = heat
    return bias


def _plain(layout: Layout, step: int, bias: Tensor, generator: torch.Generator) -> list[Tensor]:
    shape = (layout.tokens, layout.experts)
    return [torch.randn(shape, generator=generator) + bias for _ in range(layout.ranks)]


def w0_balanced(layout: Layout, step: int, generator: torch.Generator) -> list[Tensor]:
    """No expert is preferred."""
    return _plain(layout, step, torch.zeros(layout.experts), generator)


def w1_hot_experts(layout: Layout, step: int, generator: torch.Generator) -> list[Tensor]:
    """An eighth of the experts, from the middle of a rank on, is preferred."""
    first = layout.experts // layout.ranks // 2
    hot = first + torch.arange(max(1, layout.experts // 8))
    return _plain(layout, step, _hot(layout, hot), generator)


def w2_hot_rank(layout: Layout, step: int, generator: torch.Generator) -> list[Tensor]:
    """All experts of one rank are preferred."""
    local = layout.experts // layout.ranks
    return _plain(layout, step, _hot(layout, local + torch.arange(local)), generator)


def w3_spread_hot_experts(layout: Layout, step: int, generator: torch.Generator) -> list[Tensor]:
    """Every eighth expert is preferred."""
    return _plain(layout, step, _hot(layout, torch.arange(0, layout.experts, 8)), generator)


def w4_ragged_source(layout: Layout, step: int, generator: torch.Generator) -> list[Tensor]:
    """Ranks have from half to one and a half of the tokens, and prefer experts of their own."""
    # Megatron's quantile balancing takes no remainders.
    unit = layout.experts // math.gcd(layout.experts, layout.topk)
    found = []
    for rank in range(layout.ranks):
        tokens = layout.tokens // 2 + layout.tokens * rank // max(1, layout.ranks - 1)
        tokens = max(unit, tokens // unit * unit)
        taste = HEAT / 2 * torch.randn(layout.experts, generator=generator)
        found.append(torch.randn(tokens, layout.experts, generator=generator) + taste)
    return found


def w5_zero_load(layout: Layout, step: int, generator: torch.Generator) -> list[Tensor]:
    """Nobody wants the experts of the last rank, nor every seventh one."""
    local = layout.experts // layout.ranks
    bias = torch.zeros(layout.experts)
    bias[-local:] = -4 * HEAT
    bias[::7] = -4 * HEAT
    return _plain(layout, step, bias, generator)


def w6_rotating_hot_spot(layout: Layout, step: int, generator: torch.Generator) -> list[Tensor]:
    """An eighth of the experts is preferred, others in every step."""
    size = max(1, layout.experts // 8)
    return _plain(layout, step, _hot(layout, step * size + torch.arange(size)), generator)


def w7_burst(layout: Layout, step: int, generator: torch.Generator) -> list[Tensor]:
    """Balanced, but for strong preferences in every fourth step."""
    size = max(1, layout.experts // 8)
    heat = 2 * HEAT if (step + 1) % BURST_EVERY == 0 else 0.0
    return _plain(layout, step, _hot(layout, step * size + torch.arange(size), heat), generator)


WORKLOADS: dict[str, Callable[[Layout, int, torch.Generator], list[Tensor]]] = {
    "W0 balanced": w0_balanced,
    "W1 hot experts": w1_hot_experts,
    "W2 hot rank": w2_hot_rank,
    "W3 spread hot experts": w3_spread_hot_experts,
    "W4 ragged source": w4_ragged_source,
    "W5 zero load": w5_zero_load,
    "W6 rotating hot spot": w6_rotating_hot_spot,
    "W7 burst": w7_burst,
}


class Router:
    """Assigns the tokens of all ranks in a step, and learns from it for the next one."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.bias = torch.zeros(layout.experts)

    def step(self, scores: list[Tensor]) -> list[Tensor]:
        """Return (T, K) experts of each rank's tokens."""
        return [each.topk(self.layout.topk, dim=1).indices for each in scores]


class QuantileBalancing(Router):
    """Megatron's quantile balancing: its rule on each rank's tokens, averaged once per step."""

    def step(self, scores: list[Tensor]) -> list[Tensor]:
        """Choose with the bias of the steps before."""
        from megatron.core.transformer.moe.moe_utils import qb_dual_update

        found = [qb_dual_update(each, self.layout.topk, self.bias) for each in scores]
        self.bias = torch.stack([beta for _, beta in found]).mean(0)
        self.bias = self.bias - self.bias.mean()
        return [indices for indices, _ in found]


class ExpertBias(Router):
    """Megatron's expert bias: sigmoid scores, and the bias moves by the sign of the offset."""

    RATE = 1e-3

    def step(self, scores: list[Tensor]) -> list[Tensor]:
        """Choose with the bias of the steps before."""
        found = [
            (each.sigmoid() + self.bias).topk(self.layout.topk, dim=1).indices for each in scores
        ]
        loads = torch.cat(found).flatten().bincount(minlength=self.layout.experts).float()
        self.bias = self.bias + self.RATE * (loads.mean() - loads).sign()
        return found


class MaxScore(Router):
    """MaxScore in scope local, warm from the prices of the step before."""

    def step(self, scores: list[Tensor]) -> list[Tensor]:
        """Solve each rank's flow within its quotas."""
        layout, found, prices = self.layout, [], []
        for rank, each in enumerate(scores):
            capacity = capacities(len(each), layout.topk, layout.experts, rank, 1.0, layout.ranks)
            solution = solve(each, layout.topk, capacity=capacity, prices=self.bias)
            found.append(solution.experts)
            prices.append(solution.prices)
        self.bias = torch.stack(prices).mean(0)
        return found


ROUTERS: dict[str, tuple[type[Router], bool]] = {
    "top-k, capacity 1.0": (Router, True),
    "quantile balancing, capacity 1.0": (QuantileBalancing, True),
    "quantile balancing": (QuantileBalancing, False),
    "expert bias": (ExpertBias, False),
    "MaxScore": (MaxScore, False),
}


@dataclass(frozen=True)
class Outcome:
    """Of one step.

    Attributes:
        dropped: share of all assignments.
        expert: load of the hottest expert over the mean of all assignments.
        rank: the same of ranks.
        over_quota: most assignments of a rank to one expert beyond its share, before dropping.
    """

    dropped: float
    expert: float
    rank: float
    over_quota: int


def outcome(layout: Layout, experts: list[Tensor], has_capacity: bool) -> Outcome:
    """Return what becomes of each rank's (T, K) experts."""
    wanted = torch.stack([e.flatten().bincount(minlength=layout.experts) for e in experts])
    kept = wanted
    shares = [math.ceil(len(e) * layout.topk / layout.experts) for e in experts]
    if has_capacity:
        kept = wanted.minimum(torch.tensor(shares)[:, None])
    total = int(wanted.sum())
    loads = kept.sum(0).double()
    ranks = loads.reshape(layout.ranks, -1).sum(1)
    return Outcome(
        dropped=1 - float(kept.sum()) / total,
        expert=float(loads.max()) * layout.experts / total,
        rank=float(ranks.max()) * layout.ranks / total,
        over_quota=int((wanted - torch.tensor(shares)[:, None]).max()),
    )


def run(layout: Layout, workload: str, steps: int, seed: int = 0) -> dict[str, list[Outcome]]:
    """Return every router's outcome of every step; all see the same scores."""
    generator = torch.Generator().manual_seed(seed)
    routers = {name: kind(layout) for name, (kind, _) in ROUTERS.items()}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in ROUTERS}
    for step in range(steps):
        scores = WORKLOADS[workload](layout, step, generator)
        for name, router in routers.items():
            outcomes[name].append(outcome(layout, router.step(scores), ROUTERS[name][1]))
    return outcomes


def main() -> None:
    """Print a table for each workload."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1024, help="of each rank")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    layout = Layout(options.tokens, options.experts, options.topk, options.ranks)
    console = Console(width=110)
    shown = sorted({0, 4, options.steps - 1} & set(range(options.steps)))
    for workload in WORKLOADS:
        table = Table(title=f"{workload}: dropped, hottest expert, hottest rank over the mean")
        table.add_column("router")
        for step in shown:
            table.add_column(f"step {step + 1}", justify="right")
        table.add_column("worst from step 2 on", justify="right")
        for name, outcomes in run(layout, workload, options.steps, options.seed).items():
            # In the first step nothing has been learnt yet.
            later = outcomes[1:] or outcomes
            worst = Outcome(
                max(o.dropped for o in later), max(o.expert for o in later),
                max(o.rank for o in later), max(o.over_quota for o in later),
            )  # fmt: skip
            cells = [outcomes[step] for step in shown] + [worst]
            table.add_row(name, *(f"{o.dropped:.1%}  {o.expert:.2f}  {o.rank:.2f}" for o in cells))
        console.print(table)


if __name__ == "__main__":
    main()
