"""Capacities of a rank's own problem in scope ``local``.

With capacity factor 1 the T·k assignments of a rank are spread evenly: every expert gets
``T k // E``, and the remainder goes to consecutive experts, starting where the previous rank's
remainder ended. Every rank knows every rank's quotas without communication, and over the ranks of
a group the loads differ by at most one.

Shape letters: E experts, R ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def quotas(num_tokens: int, topk: int, num_experts: int, rank: int) -> Tensor:
    """Return the (E,) int64 quotas of one rank; they sum to ``num_tokens * topk``.

    Example:
        >>> [quotas(3, 2, 4, rank).tolist() for rank in range(2)]
        [[2, 2, 1, 1], [1, 1, 2, 2]]

    Args:
        num_tokens: tokens of each rank, the same on all.
        topk: experts per token.
        num_experts: E.
        rank: rank in the group that shares the experts.
    """
    share, rest = divmod(num_tokens * topk, num_experts)
    result_E = torch.full((num_experts,), share, dtype=torch.int64)
    first = rank * rest % num_experts
    result_E[(first + torch.arange(rest)) % num_experts] += 1
    return result_E


def capacities(
    num_tokens: int, topk: int, num_experts: int, rank: int, capacity_factor: float
) -> Tensor:
    """Return the (E,) int64 capacities of one rank's problem for any capacity factor >= 1."""
    if capacity_factor == 1.0:
        return quotas(num_tokens, topk, num_experts, rank)
    each = math.ceil(num_tokens * topk * capacity_factor / num_experts)
    return torch.full((num_experts,), each, dtype=torch.int64)
