"""Bounded mode on the device: Triton kernels without a copy to the host.

Ranks that solve one problem gather all scores, in one collective whose size is fixed, and each
solves the whole: the device has done so sooner than the exchanges of the CPU's solver, which wait
for the host, could be started.

Nothing here needs Triton to be imported; :mod:`solver` does.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import sys
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_maxscore.flow import inputs, outliers
from megatron_maxscore.flow.agreement import ANY_UNIT, Own, agree
from megatron_maxscore.flow.exchange import Exchange
from megatron_maxscore.flow.solution import FlowSolution

# Assignments, which kernels count in 32 bits, and rows of a tile beyond the last.
_MOST_UNITS = (1 << 31) - 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_device(scores: Tensor) -> bool:
    """Return whether kernels can read a tensor."""
    return scores.is_cuda and _has_triton()


def obstacle(
    scores: Tensor,
    topk: int,
    num_ranks: int,
    equal_rows: bool,
    has_mask: bool,
    fill_padding: bool,
) -> str:
    """Return why a bounded solve does not run in the kernels, "" if it does.

    That depends on no value. Ranks of a group decide alike: what only some of them may have, a
    mask, does not count there.
    """
    rows_differ = num_ranks > 1 and not equal_rows
    some_without = not fill_padding and (has_mask or num_ranks > 1)
    checks = (
        (not is_device(scores), "Triton is not installed" if scores.is_cuda else "on the CPU"),
        (scores.dim() != 2, "scores are several problems (scope sequence)"),
        (scores.dtype not in _DTYPES, f"scores are {scores.dtype}"),
        (rows_differ, "ranks may have different numbers of tokens"),
        (scores.dim() == 2 and scores.shape[0] == 0, "there are no tokens"),
        (topk >= scores.shape[-1], "every token takes all experts"),
        (num_ranks * scores.numel() // max(scores.shape[-1], 1) * topk >= _MOST_UNITS,
         "there are 2^31 assignments or more"),
        (some_without, "padding gets no experts"),
    )  # fmt: skip
    return next((reason for applies, reason in checks if applies), "")


# Reasons for which a solve has left the device, each of which is told once.
_told: set[str] = set()


def tell_once(reason: str) -> None:
    """Say that scores on a device are solved on the host, and why; once for each reason."""
    if reason in _told:
        return
    _told.add(reason)
    if os.environ.get("RANK", "0") == "0":
        print(
            "megatron_maxscore: scores are copied from the GPU to the host in every solve, because "
            f"{reason}",
            file=sys.stderr,
            flush=True,
        )


def capacity_of(
    scores_TE: Tensor,
    topk: int,
    capacity: int | Tensor | None,
    capacity_factor: float,
    num_ranks: int,
) -> tuple[Tensor, bool | None]:
    """Return the (E,) int64 capacities on the device, and whether they are tight if that is known.

    Those that are on the host are checked, and copied once for each set of values. Those on the
    device are checked there: should they hold too little, CUDA reports a device-side assertion.

    Raises:
        ValueError: they are out of range, or hold less than the tokens demand.
    """
    tokens, num_experts = scores_TE.shape
    tokens *= num_ranks
    if isinstance(capacity, Tensor) and is_device(capacity):
        inputs.check_capacity(capacity, num_experts)
        capacity_E = capacity.to(scores_TE.device, torch.int64).clamp(max=tokens)
        enough = (capacity_E.amin() >= 0) & (capacity_E.sum() >= tokens * topk)
        torch._assert_async(enough, "capacity holds less than the tokens demand")
        return capacity_E.contiguous(), None
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


@functools.cache  # a captured graph may go on reading what it has seen
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def solve_bounded(
    scores_TE: Tensor,
    topk: int,
    capacity: int | Tensor | None,
    capacity_factor: float,
    prices: Tensor | None,
    tolerance: float,
    valid_T: Tensor | None,
    exchange: Exchange,
) -> FlowSolution:
    """Solve in bounded mode; see :func:`solver.solve_bounded`.

    Communicates, with several ranks, one all-gather of the scores; and the first time that ranks
    come with these arguments, one round in which they compare them. From then on ranks take each
    other's arguments for granted: one that comes with others alone makes the collectives differ.

    Args:
        scores_TE: (T, E) this rank's; with several ranks all have T rows.
        topk: K.
        capacity: as for ``solve``.
        capacity_factor: as for ``solve``.
        prices: as for ``solve``; the same on every rank, which is not checked here.
        tolerance: as for ``solve``.
        valid_T: (T,) bool, False = padding, which gets experts too.
        exchange: between the ranks.

    Raises:
        ValueError: ``prices`` or ``valid`` have another shape, capacities are out of range or too
            small, or arguments differ between ranks when they are compared.
    """
    tokens, num_experts = scores_TE.shape
    try:
        capacity_E, is_tight = capacity_of(
            scores_TE, topk, capacity, capacity_factor, exchange.size
        )
        if prices is not None and prices.shape != (num_experts,):
            raise ValueError(f"prices must be ({num_experts},), got shape {tuple(prices.shape)}")
        inputs.check_valid(valid_T, scores_TE.shape[:1])
    except ValueError as error:
        agree(exchange, Own.wrong(str(error)))
        raise  # not reached: agree() raises the same on all ranks
    if exchange.size > 1:
        has_prices = "none" if prices is None else "some"
        dtype = str(scores_TE.dtype).removeprefix("torch.")
        arguments = (topk, num_experts, 1, dtype, _comparable(capacity), capacity_factor)
        _agree_once(exchange, tokens, (*arguments, has_prices, True, tolerance))
    if valid_T is not None:
        scores_TE = scores_TE.masked_fill(~valid_T.to(scores_TE.device)[:, None], 0.0)
    solver: Any = importlib.import_module("megatron_maxscore.flow.device.solver")
    if prices is None:
        prices = torch.zeros(num_experts, device=scores_TE.device)
    warm_E = prices.detach().to(scores_TE.device, torch.float32).contiguous()
    everyone_NE = exchange.gather_tensor(scores_TE.contiguous(), phase="scores")
    solution: FlowSolution = solver.solve_bounded(
        everyone_NE, topk, capacity_E, warm_E, is_tight, tolerance
    )
    return solution if exchange.size == 1 else _part_of(solution, exchange, tokens)


def _part_of(solution: FlowSolution, exchange: Exchange, tokens: int) -> FlowSolution:
    """Return this rank's experts and every rank's loads of what was solved as a whole."""
    num_experts = solution.prices.numel()
    # Counted slot by slot: bincount would ask the device how many there are.
    slots = solution.experts.reshape(exchange.size, -1)
    slots = slots + num_experts * torch.arange(exchange.size, device=slots.device)[:, None]
    loads = torch.zeros(exchange.size * num_experts, dtype=torch.int64, device=slots.device)
    loads.scatter_add_(0, slots.reshape(-1), torch.ones_like(slots).reshape(-1))
    first = exchange.rank * tokens
    return dataclasses.replace(
        solution,
        # A copy: a view would keep all ranks' experts for the backward pass.
        experts=solution.experts[first : first + tokens].clone(),
        loads=loads.reshape(exchange.size, num_experts),
        rounds=exchange.rounds,
    )


def _comparable(capacity: int | Tensor | None) -> Any:
    if not isinstance(capacity, Tensor):
        return capacity
    # Values on a device are not read.
    return "on the device" if is_device(capacity) else tuple(capacity.tolist())


# What the ranks of a group have found to be the same on all of them.
_agreed: weakref.WeakKeyDictionary[Any, set] = weakref.WeakKeyDictionary()


def _agree_once(exchange: Exchange, tokens: int, arguments: tuple) -> None:
    """Compare arguments between the ranks when they come with these for the first time.

    All ranks come with new ones together: what is compared is what would make them differ.
    """
    known = _agreed.setdefault(getattr(exchange, "group", exchange), set())
    if (tokens, arguments) in known:
        return
    none_1, any_1 = np.zeros(1), np.full(1, ANY_UNIT)
    classes_1C = np.zeros((1, outliers.CLASSES), np.uint32)
    own = Own(
        (*arguments, "bounded", None), "", "", False, np.array([tokens]), none_1, any_1, classes_1C
    )
    rows_R = agree(exchange, own).rows_RB[:, 0].tolist()
    if len(set(rows_R)) > 1:
        raise ValueError(
            f"equal_rows=True, but the ranks of the group have {rows_R} rows; pass the same number "
            "on every rank, or equal_rows=False"
        )
    known.add((tokens, arguments))
