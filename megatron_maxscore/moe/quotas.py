"""Capacities of a rank's own problem in scope ``local``.

With capacity factor 1 the T·k assignments of a rank are spread evenly: every expert gets
``T k // E``, and the remainder goes to consecutive experts, starting where the previous rank's
remainder ended. Every rank knows every rank's quotas without communication, and over the ranks of
a group the loads differ by at most one. The remainder starts at another expert in each turn
(iteration plus microbatch), so that in the long run every expert gets the same.

With fewer assignments than experts, quotas of 0 and 1 would leave the flow nearly no choice. Every
expert then takes at most one of the rank's tokens, and the flow chooses which experts take any.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def quotas(
    num_tokens: int, topk: int, num_experts: int, rank: int, ranks: int = 1, turn: int = 0
) -> Tensor:
    """Return the (E,) int64 quotas of one rank; they sum to ``num_tokens * topk``.

    Example:
        >>> [quotas(3, 2, 4, rank, ranks=2).tolist() for rank in range(2)]
        [[2, 2, 1, 1], [1, 1, 2, 2]]

    Args:
        num_tokens: tokens of each rank, the same on all.
        topk: experts per token.
        num_experts: E.
        rank: rank in the group that shares the experts.
        ranks: R, the size of that group.
        turn: number of the microbatch, the same on all ranks.
    """
    rest = num_tokens * topk % num_experts
    # step: sum of all ranks' remainders in one turn. After each cycle remainders start one expert
    # later. Otherwise the remainder of a rank might always go to the same experts.
    step = ranks * rest
    first = turn * step + turn // _cycle(step, num_experts) + rank * rest
    return _known_quotas(num_tokens * topk, num_experts, first % num_experts)


def turns_until_repeat(num_tokens: int, topk: int, num_experts: int, ranks: int = 1) -> int:
    """Return after how many turns the :func:`quotas` of all ranks are the same again."""
    rest = num_tokens * topk % num_experts
    return num_experts * _cycle(ranks * rest, num_experts) if rest else 1


def _cycle(step: int, num_experts: int) -> int:
    """Return after how many turns every expert has got the same number of remainders."""
    return num_experts // math.gcd(step, num_experts)


def own_quotas(topk: int, scores_TE: Tensor) -> Tensor:
    """Return quotas that no other rank has to know; (E,) int64 on the device of the scores.

    The remainder starts at an expert that follows from the scores: it turns from microbatch to
    microbatch, and a microbatch that is repeated gets the same quotas.

    Args:
        topk: experts per token.
        scores_TE: (T, E) float.
    """
    num_tokens, num_experts = scores_TE.shape
    bits = scores_TE.sum(dtype=torch.float64).view(torch.int64)
    # The product's upper bits depend on all bits of the sum (Knuth's multiplicative hashing).
    first = ((bits * 0x9E3779B97F4A7C1) >> 20) % num_experts
    return _quotas(num_tokens * topk, num_experts, first)


@functools.lru_cache(maxsize=4096)  # the same ones come again every few microbatches
def _known_quotas(assignments: int, num_experts: int, first: int) -> Tensor:
    return _quotas(assignments, num_experts, first)


def _quotas(assignments: int, num_experts: int, first: int | Tensor) -> Tensor:
    share, rest = divmod(assignments, num_experts)
    device = first.device if isinstance(first, Tensor) else None
    place_E = (torch.arange(num_experts, device=device) - first) % num_experts
    return share + (place_E < rest).long()


def capacities(
    num_tokens: int,
    topk: int,
    num_experts: int,
    rank: int,
    capacity_factor: float,
    ranks: int = 1,
    turn: int = 0,
) -> Tensor:
    """Return the (E,) int64 capacities of one rank's problem for any capacity factor >= 1.

    The arguments are those of :func:`quotas`.
    """
    if capacity_factor == 1.0 and has_quotas(num_tokens, topk, num_experts):
        return quotas(num_tokens, topk, num_experts, rank, ranks, turn)
    each = math.ceil(num_tokens * topk * capacity_factor / num_experts)
    return torch.full((num_experts,), each, dtype=torch.int64)


def has_quotas(num_tokens: int, topk: int, num_experts: int) -> bool:
    """Return whether a rank has enough assignments for quotas: one for each expert at least."""
    return num_tokens * topk >= num_experts
