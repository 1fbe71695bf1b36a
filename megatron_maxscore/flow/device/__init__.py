"""Bounded mode on the device: Triton kernels without a copy to the host.

Nothing here needs Triton to be imported; :mod:`solver` does.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from megatron_maxscore.flow import inputs
from megatron_maxscore.flow.solution import FlowSolution

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_device(scores: Tensor) -> bool:
    """Return whether kernels can read a tensor."""
    return scores.is_cuda and _has_triton()


def can_solve(
    scores: Tensor, topk: int, num_ranks: int, valid: Tensor | None, fill_padding: bool
) -> bool:
    """Return whether a bounded solve runs in the kernels, which depends on no value.

    Not float64, not several problems or ranks, not rows without experts, not all experts.
    """
    return (
        is_device(scores)
        and scores.dim() == 2
        and scores.dtype in _DTYPES
        and num_ranks == 1
        and scores.shape[0] > 0
        and topk < scores.shape[1]
        and (valid is None or fill_padding)
    )


def capacity_of(
    scores_TE: Tensor, topk: int, capacity: int | Tensor | None, capacity_factor: float
) -> tuple[Tensor, bool | None]:
    """Return the (E,) int64 capacities on the device, and whether they are tight if that is known.

    Those that are on the host are checked, and copied once for each set of values.

    Raises:
        ValueError: they are out of range, or hold less than the tokens demand.
    """
    tokens, num_experts = scores_TE.shape
    if isinstance(capacity, Tensor) and capacity.device == scores_TE.device:
        return capacity.to(torch.int64).clamp(max=tokens), None
    if capacity is None:
        capacity = math.ceil(tokens * topk * capacity_factor / num_experts)
    values_E = inputs.capacity_of(capacity, num_experts)
    assert values_E is not None
    values = tuple(min(value, tokens) for value in values_E.tolist())
    supply, demand = sum(values), tokens * topk
    if supply < demand:
        raise ValueError(
            f"capacities hold {supply} assignments but {tokens} tokens times topk={topk} need "
            f"{demand}; raise capacity or capacity_factor"
        )
    return _on_device(values, scores_TE.device), supply == demand


@functools.lru_cache(maxsize=256)
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def solve_bounded(
    scores_TE: Tensor,
    topk: int,
    capacity: tuple[Tensor, bool | None],
    prices: Tensor | None,
    tolerance: float,
) -> FlowSolution:
    """Solve in bounded mode; see :func:`solver.solve_bounded`.

    Raises:
        ValueError: ``prices`` has not one entry for each expert.
    """
    solver: Any = importlib.import_module("megatron_maxscore.flow.device.solver")
    num_experts = scores_TE.shape[1]
    if prices is None:
        prices = torch.zeros(num_experts, device=scores_TE.device)
    elif prices.shape != (num_experts,):
        raise ValueError(f"prices must be ({num_experts},), got shape {tuple(prices.shape)}")
    capacity_E, is_tight = capacity
    warm_E = prices.detach().to(scores_TE.device, torch.float32)
    solution: FlowSolution = solver.solve_bounded(
        scores_TE.contiguous(), topk, capacity_E, warm_E, is_tight, tolerance
    )
    return solution
