"""Families of router scores for benchmarks and tests, from easy to degenerate.

A family has a structure (expert offsets, cluster centres, capacities), which stays the same from
batch to batch, and draws rows from it. Sources of the degenerate ones: scores that underflow, that
are rounded to bfloat16, or that repeat, all of which real routers produce.

Shape letters: T tokens, E experts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_maxscore.flow import MAX_EXPERTS

CLUSTERS = 40
TYPES = 8


@dataclass(frozen=True)
class Workload:
    """One problem: (T, E) float32 scores, k, and (E,) int64 capacities."""

    scores: Tensor
    topk: int
    capacity: Tensor


def _skewed(sigma: float) -> Callable[..., Tensor]:
    def make(z: Tensor, fixed: torch.Generator, fresh: torch.Generator, topk: int) -> Tensor:
        return z + sigma * torch.randn(z.shape[1], generator=fixed)

    return make


def _centred(count: int, noise: float, in_order: bool = False) -> Callable[..., Tensor]:
    def make(z: Tensor, fixed: torch.Generator, fresh: torch.Generator, topk: int) -> Tensor:
        centres = torch.randn(count, z.shape[1], generator=fixed)
        kind = torch.randint(count, (z.shape[0],), generator=fresh)
        return centres[kind.sort().values if in_order else kind] + noise * z

    return make


def _hot(z: Tensor, fixed: torch.Generator, fresh: torch.Generator, topk: int) -> Tensor:
    z = z.clone()
    z[:, 0] += 10.0
    return z


def _forbidden(z: Tensor, fixed: torch.Generator, fresh: torch.Generator, topk: int) -> Tensor:
    is_forbidden = torch.rand(z.shape, generator=fresh) < 0.2
    # k experts of every row stay allowed.
    is_forbidden.scatter_(1, torch.rand(z.shape, generator=fresh).topk(topk).indices, False)
    return z.masked_fill(is_forbidden, -math.inf)


def _softmax(scale: float, sigma: float) -> Callable[..., Tensor]:
    logits = _skewed(sigma)

    def make(z: Tensor, fixed: torch.Generator, fresh: torch.Generator, topk: int) -> Tensor:
        return torch.softmax(scale * logits(z, fixed, fresh, topk), -1)

    return make


def _repeated_softmax(noise: float) -> Callable[..., Tensor]:
    def make(z: Tensor, fixed: torch.Generator, fresh: torch.Generator, topk: int) -> Tensor:
        tokens = torch.randn(31, z.shape[1], generator=fixed)
        tokens += torch.randn(z.shape[1], generator=fixed)
        kind = torch.randint(31, (z.shape[0],), generator=fresh)
        return torch.softmax(tokens, -1)[kind] + noise * z

    return make


def _hot_softmax(z: Tensor, fixed: torch.Generator, fresh: torch.Generator, topk: int) -> Tensor:
    z = z.clone()
    z[:, 0] += 12.0
    return torch.softmax(z, -1)


def _low_rank_softmax(
    z: Tensor, fixed: torch.Generator, fresh: torch.Generator, topk: int
) -> Tensor:
    embedding = torch.randn(4, z.shape[1], generator=fixed)
    return torch.softmax(2.0 * (torch.randn(z.shape[0], 4, generator=fresh) @ embedding), -1)


def _scaled_rows(z: Tensor, fixed: torch.Generator, fresh: torch.Generator, topk: int) -> Tensor:
    return z * torch.exp(2.0 * torch.randn(z.shape[0], 1, generator=fresh))


def _sorted_alike(z: Tensor, fixed: torch.Generator, fresh: torch.Generator, topk: int) -> Tensor:
    return z.sort(0).values


FAMILIES: dict[str, Callable[..., Tensor]] = {
    "iid": lambda z, *_: z,
    "skewed, sigma 1": _skewed(1.0),
    "skewed, sigma 4": _skewed(4.0),
    "sigmoid": lambda z, *_: torch.sigmoid(z),
    "bf16-rounded": lambda z, *_: z.bfloat16().float(),
    "peaked softmax": lambda z, *_: torch.softmax(8.0 * z, -1),
    "two-hot, underflow": lambda z, *_: torch.softmax(200.0 * z, -1),
    "40 clusters": _centred(CLUSTERS, 0.05),
    "40 repeated tokens": _centred(CLUSTERS, 0.0),
    "all equal": lambda z, *_: torch.zeros_like(z),
    "sorted by type": _centred(TYPES, 0.5, in_order=True),
    "one hot expert": _hot,
    "capacity factor 1.25": lambda z, *_: z,
    "unequal capacities": lambda z, *_: z,
    "forbidden arcs": _forbidden,
    "softmax, offsets 1": _softmax(1.0, 1.0),
    "softmax, offsets 4": _softmax(1.0, 4.0),
    "softmax at 1/6": _softmax(6.0, 1.0),
    "softmax at 1/90": _softmax(90.0, 1.0),
    "31 tokens, softmax": _repeated_softmax(0.0),
    "31 tokens, softmax, noise": _repeated_softmax(1e-6),
    "softmax, hot expert": _hot_softmax,
    "softmax, low rank": _low_rank_softmax,
    "rows of many scales": _scaled_rows,
    "columns sorted alike": _sorted_alike,
}
GENERIC = ("iid", "skewed, sigma 1", "skewed, sigma 4", "sigmoid", "bf16-rounded")
# Softmax-ed logits, whose rows care at very different scales.
PROBABILITIES = tuple(name for name in FAMILIES if "softmax" in name and "peaked" not in name)
PLATEAUS = ("two-hot, underflow", "40 repeated tokens", "all equal")


def workload(family: str, tokens: int, experts: int, topk: int, batch: int = 0) -> Workload:
    """Return batch number ``batch`` of a family; batches differ in their rows only."""
    fixed = torch.Generator().manual_seed(97)
    fresh = torch.Generator().manual_seed(1000 + batch)
    z = torch.randn(tokens, experts, generator=fresh)
    scores = FAMILIES[family](z, fixed, fresh, topk).contiguous()
    factor = 1.25 if family == "capacity factor 1.25" else 1.0
    each = math.ceil(tokens * topk * factor / experts)
    capacity = torch.full((experts,), each, dtype=torch.int64)
    if family == "unequal capacities":
        capacity = _unequal(tokens, experts, topk, fixed)
    return Workload(scores, topk, capacity)


def _unequal(tokens: int, experts: int, topk: int, generator: torch.Generator) -> Tensor:
    """Capacities between 0.44 and 1.56 times the mean that sum to exactly the demand."""
    weight = torch.rand(experts, generator=generator, dtype=torch.float64) + 0.4
    capacity = (weight / weight.sum() * tokens * topk).long().clamp(max=tokens)
    expert = 0
    while int(capacity.sum()) < tokens * topk:
        capacity[expert % experts] += int(capacity[expert % experts] < tokens)
        expert += 1
    return capacity


def as_integers(scores: Tensor, bits: int = 20) -> Tensor:
    """Return the scores on an integer grid of 2**bits steps, exact in float32."""
    finite = scores[torch.isfinite(scores)]
    low, high = float(finite.min()), float(finite.max())
    scale = 2.0**bits / (high - low) if high > low else 1.0
    return torch.round((scores.double() - low) * scale).float()


def size_of(text: str) -> str:
    """Return a size like 8192x64x8, tokens x experts x k, as it is; for command lines.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected tokens x experts x k like 8192x64x8, got {text}"
        )
    tokens, experts, topk = map(int, parts)
    if tokens < 1 or not 1 <= topk <= experts <= MAX_EXPERTS:
        raise argparse.ArgumentTypeError(
            f"needs a token, 1 <= k <= experts, and at most {MAX_EXPERTS} experts, got {text}"
        )
    return text
