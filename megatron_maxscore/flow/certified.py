"""Bounded mode: solves on the device, by the engine of :mod:`device`, without a host sync.

Ranks that solve one problem together exchange counts for each expert, then their loads. Each rank
works out all ranks' quotas: how many of its rows a rank gives each expert. It then moves its own
units until it meets its quotas.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
import os
import sys
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_maxscore.flow import inputs, outliers, places
from megatron_maxscore.flow.agreement import ANY_UNIT, Own, agree
from megatron_maxscore.flow.exchange import Exchange
from megatron_maxscore.flow.rank_quotas import quotas_of
from megatron_maxscore.flow.solution import ROUNDING, FlowSolution

# Keys of offers have bits for fewer rows on a rank than MAX_ROWS and for MAX_EXPERTS experts. The
# last number is the most assignments on all ranks.
MAX_ROWS = 1 << 21
MAX_EXPERTS = 1 << 10
_MOST_UNITS = (1 << 31) - 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sweeps of ranks that solve one problem: as many launches and all-reduces.
GROUP_SWEEPS = 8


def _on_gpu(scores: Tensor) -> bool:
    return scores.is_cuda


def obstacle(scores: Tensor, mode: str, num_ranks: int, has_mask: bool, fill_padding: bool) -> str:
    """Return why a problem is solved exactly, on the host; "" if it is not.

    The answer does not depend on values in tensors, and is the same on all ranks of a group: since
    only some ranks may have a mask, it does not matter there whether this rank has one.

    Raises:
        ValueError: ``mode`` is "bounded" and the scores are on the CPU.
    """
    if mode == "exact":
        return "mode is exact, which runs on the host (auto runs on the GPU)"
    if not _on_gpu(scores):
        if mode == "auto":
            return "they are on the CPU"
        if not places.is_interpreted():
            raise ValueError(
                "mode='bounded' runs on a GPU, and the scores are on the CPU; use mode='auto', or "
                "set TRITON_INTERPRET=1 to try the GPU's kernel in Triton's interpreter"
            )
    tokens, some_without = scores.shape[-2], not fill_padding and (has_mask or num_ranks > 1)
    checks = (
        (not places.has_triton(), "Triton is not installed"),
        (scores.dtype not in _DTYPES, f"scores are {scores.dtype}"),
        (scores.shape[-1] > MAX_EXPERTS, f"{scores.shape[-1]} experts are too many"),
        (some_without, "padding gets no experts"),
        (scores.dim() == 3 and num_ranks > 1, "sequences are split over ranks"),
        (num_ranks == 1 and tokens >= MAX_ROWS, f"{tokens} tokens are too many"),
        (num_ranks == 1 and tokens == 0, "there are no tokens"),
    )  # fmt: skip
    return next((reason for applies, reason in checks if applies), "")


# Reasons for which a solve has left the device, each of which is told once.
_told: set[str] = set()


def tell_once(scores: Tensor, reason: str) -> None:
    """Say that scores on a GPU are solved on the host, and why; once for each reason."""
    if not _on_gpu(scores) or reason in _told:
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
    capacity: int | Tensor | None,
    capacity_factor: float,
    tokens: int,
    topk: int,
    num_experts: int,
    on: torch.device,
) -> Tensor:
    """Return the (E,) int64 capacities of a problem on the device.

    Capacities on the host are checked here, and each set of values is copied to the device once.
    Capacities on the device are checked there: if they hold less than the tokens demand, CUDA
    reports a device-side assertion.

    Raises:
        ValueError: they are out of range, or hold less than the tokens demand.
    """
    if isinstance(capacity, Tensor) and capacity.is_cuda:
        inputs.check_capacity(capacity, num_experts)
        capacity_E = capacity.to(on, torch.int64).contiguous()
        enough = capacity_E.clamp(max=tokens).sum() >= tokens * topk
        torch._assert_async(
            (capacity_E.amin() >= 0) & enough, "capacity holds less than the tokens demand"
        )
        return capacity_E
    if capacity is None:
        # More than all rows make no difference, and might not be an integer any more.
        capacity = math.ceil(min(tokens * topk * capacity_factor / num_experts, tokens))
    values_E = inputs.capacity_of(capacity, num_experts)
    assert values_E is not None
    supply, demand = int(np.minimum(values_E, tokens).sum()), tokens * topk
    if supply < demand:
        raise ValueError(
            f"capacities hold {supply} assignments but {tokens} tokens times topk={topk} need "
            f"{demand}; raise capacity or capacity_factor"
        )
    return _on_device(values_E.tobytes(), on)


@functools.cache  # a captured graph may go on reading what it has seen
def _on_device(values: bytes, on: torch.device) -> Tensor:
    return places.sent(torch.frombuffer(bytearray(values), dtype=torch.int64), on)


def solve(
    scores: Tensor,
    topk: int,
    capacity: int | Tensor | None,
    capacity_factor: float,
    prices: Tensor | None,
    valid: Tensor | None,
    exchange: Exchange,
) -> FlowSolution:
    """Solve in bounded mode; see :func:`megatron_maxscore.flow.solve`.

    Communicates nothing alone; with several ranks see :func:`_solve_together`.

    Args:
        scores: (T, E) this rank's, or (B, T, E) of one rank.
        topk: K.
        capacity: as for ``flow.solve``.
        capacity_factor: as for ``flow.solve``.
        prices: as for ``flow.solve``; values on the device are not checked.
        valid: (T,) or (B, T) bool, False = padding, which gets experts too.
        exchange: between the ranks.

    Raises:
        ValueError: an argument has another shape, capacities are out of range or too small, or
            arguments differ between ranks when they are compared.
    """
    batch = scores if scores.dim() == 3 else scores[None]
    problems, tokens, num_experts = batch.shape
    capacity_E: Any = None
    error = ""
    try:
        inputs.check_valid(valid, scores.shape[:-1])
        warm = _prices(prices, scores)
        if exchange.size == 1:
            capacity_E = capacity_of(
                capacity, capacity_factor, tokens, topk, num_experts, scores.device
            )
        elif capacity is not None:
            capacity_E = _tensor_of(capacity, num_experts, scores.device)
        if tokens >= MAX_ROWS:
            raise ValueError(f"{tokens} tokens on a rank are too many, at most {MAX_ROWS - 1}")
    except ValueError as wrong:
        if exchange.size == 1:
            raise
        error, warm = str(wrong), torch.zeros(num_experts, device=scores.device)
    if valid is not None and not error:
        batch = batch.masked_fill(~valid.to(scores.device).reshape(problems, tokens, 1), 0.0)
    engine = _launch().Solve(batch.contiguous(), topk, warm, exchange.rank)
    if exchange.size > 1:
        arguments = (
            topk, num_experts, 1, str(scores.dtype).removeprefix("torch."), _comparable(capacity),
            capacity_factor, "none" if prices is None else "some", True, "bounded",
        )  # fmt: skip
        _agree_once(exchange, arguments, tokens, error)
        return _solve_together(engine, exchange, capacity_E, capacity_factor, arguments, error)
    engine.run(capacity_E)
    is_batch = scores.dim() == 3
    found = engine.found(is_batch)
    return FlowSolution(
        experts=engine.experts if is_batch else engine.experts[0],
        prices=found.prices,
        objective=found.objective,
        bound=found.bound,
        gap=found.gap,
        converged=found.converged,
        loads=found.loads.unsqueeze(-2),
        rounds=0,
        bad=found.bad.sum() if is_batch else found.bad,
        scaled=found.scaled.sum() if is_batch else found.scaled,
        order=None if is_batch else engine.order[0],
    )


def _launch() -> Any:
    """Return the engine's module, which imports Triton."""
    return importlib.import_module("megatron_maxscore.flow.engine")


def _prices(prices: Tensor | None, scores: Tensor) -> Tensor:
    """Return the (E,) or (B, E) float32 prices to start from, on the device of the scores."""
    shape, num_experts = scores.shape, scores.shape[-1]
    if prices is None:
        return torch.zeros(num_experts, device=scores.device)
    if prices.shape != (num_experts,) and prices.shape != (*shape[:-2], num_experts):
        either = f" or {(shape[0], num_experts)}" if scores.dim() == 3 else ""
        raise ValueError(
            f"prices must be ({num_experts},){either}, got shape {tuple(prices.shape)}"
        )
    return prices.detach().to(scores.device, torch.float32).contiguous()


def _tensor_of(capacity: int | Tensor, num_experts: int, on: torch.device) -> Tensor:
    if isinstance(capacity, Tensor) and capacity.is_cuda:
        inputs.check_capacity(capacity, num_experts)
        return capacity.to(on, torch.int64)
    values_E = inputs.capacity_of(capacity, num_experts)
    assert values_E is not None
    return _on_device(values_E.tobytes(), on)


# ---- several ranks


def _comparable(capacity: int | Tensor | None) -> Any:
    if not isinstance(capacity, Tensor):
        return capacity
    # Values on a device are not read.
    return "on the device" if capacity.is_cuda else tuple(capacity.tolist())


# Groups whose ranks have compared their arguments.
_agreed: weakref.WeakSet[Any] = weakref.WeakSet()


def _agree_once(exchange: Exchange, arguments: tuple, tokens: int, error: str) -> None:
    """Compare arguments between the ranks in the first call with a group; all ranks must make it.

    Raises:
        ValueError: on every rank: arguments are wrong on a rank, differ, or there are too many
            assignments.
    """
    group = getattr(exchange, "group", exchange)
    if group in _agreed:
        return
    none_1, any_1 = np.zeros(1), np.full(1, ANY_UNIT)
    classes_1C = np.zeros((1, outliers.CLASSES), np.uint32)
    own = Own(arguments, error, "", False, np.array([tokens]), none_1, any_1, classes_1C)
    rows = int(agree(exchange, own).rows_RB.sum())
    if rows * arguments[0] > _MOST_UNITS:
        raise ValueError(
            f"{rows} tokens times topk={arguments[0]} are 2^31 assignments or more, which bounded "
            "mode cannot count; use mode='exact'"
        )
    _agreed.add(group)


def refuse(
    exchange: Exchange, scores: Any, mode: str, has_mask: bool, fill_padding: bool, error: str
) -> None:
    """Raise a ValueError for arguments that are wrong, so that no rank of the group waits in vain.

    In bounded mode, once the group has compared its arguments, the other ranks wait in the sum that
    the device checks. Otherwise they wait in that comparison. This rank takes part before it
    raises.

    Args:
        exchange: between the ranks.
        scores: as they were given; they may be what is wrong.
        mode: as for ``flow.solve``.
        has_mask: whether there is a mask of padding.
        fill_padding: as for ``flow.solve``.
        error: what is wrong.
    """
    is_known = getattr(exchange, "group", exchange) in _agreed
    if exchange.size > 1 and is_known:
        try:
            matrix = inputs.tensor("scores", scores)
            if matrix.dim() not in (2, 3):  # the other ranks' scores may be well shaped
                matrix = matrix.new_empty(0, 1)
            is_bounded = not obstacle(matrix, mode, exchange.size, has_mask, fill_padding)
        except (ValueError, TypeError):
            is_bounded = False
        if is_bounded:
            exchange.sum_tensor(
                torch.ones(_launch().HEADER_WORDS, dtype=torch.int32, device=matrix.device),
                phase="",
            )
            raise ValueError(error)
    agree(exchange, Own.wrong(error))


def _fingerprint(arguments: tuple) -> int:
    digest = hashlib.blake2b(repr(arguments).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 2


def _solve_together(
    engine: Any,
    exchange: Exchange,
    capacity_E: Tensor,
    capacity_factor: float,
    arguments: tuple,
    error: str,
) -> FlowSolution:
    """Solve one problem over the ranks of a group; every rank must call it.

    Ranks exchange, on the device's stream: counts of rows by their ranges and grains (2 KB), in
    each sweep 9 counts for each expert, then every rank's loads, and three sums of the result.
    """
    ranks, shape, launch = exchange.size, engine.shape, _launch()
    topk, num_experts = shape.topk, shape.experts
    mark = _fingerprint(arguments) // ranks
    engine.launch(0, 1, mark=mark ^ (1 if error else 0))
    exchange.sum_tensor(engine.header, phase="ranges of rows")
    if error:
        raise ValueError(error)
    rows = engine.word("ROWS_IN").long()
    torch._assert_async(
        engine.word("MARK") == mark * ranks,
        "arguments of flow.solve differ between the ranks of its group, or are wrong on one",
    )
    if arguments[4] is None:
        # As for one rank, in float64.
        each = torch.ceil((rows * topk).double() * capacity_factor / num_experts)
        capacity_E = torch.minimum(each, rows.double()).long().expand(num_experts)
    capacity_E = torch.minimum(capacity_E, rows).clamp(min=0).contiguous()
    torch._assert_async(
        capacity_E.sum() >= rows * topk, "capacity holds less than the tokens demand"
    )
    for sweep in range(GROUP_SWEEPS):
        engine.launch(1 + sweep, 2 + sweep, capacity_E, end=launch.HOLD)
        exchange.sum_tensor(engine.counts(1 + sweep), phase="counts of bids")
    own = torch.cat([engine.own_loads(GROUP_SWEEPS), rows.new_full((1,), shape.tokens)])
    everyone = exchange.gather_tensor(own, phase="loads").reshape(ranks, -1)
    prices_E = engine.sweep_prices
    quota_RE = quotas_of(everyone[:, :-1], capacity_E, everyone[:, -1], topk, prices_E)
    quota_E = quota_RE[exchange.rank].contiguous()
    engine.run(capacity_E, quota_E, first=1 + GROUP_SWEEPS, end=launch.END)
    found = engine.found(is_batch=False)
    prices_E, own = found.prices, torch.stack([found.objective, found.difference, found.ranges])
    sums = exchange.gather_tensor(own, phase="the result").reshape(ranks, -1).sum(0)
    objective, difference, ranges = sums.unbind()
    idle_E = capacity_E - quota_RE.sum(0)
    difference = difference + (prices_E.double() * idle_E).sum().clamp(min=0)
    gap = torch.where(ranges > 0, difference / ranges, torch.where(difference > 0, math.inf, 0.0))
    return FlowSolution(
        experts=engine.experts[0],
        prices=prices_E,
        objective=objective,
        bound=objective + difference,
        gap=gap,
        converged=gap <= ROUNDING,
        loads=quota_RE,
        rounds=exchange.rounds,
        bad=found.bad,
        scaled=found.scaled,
        order=engine.order[0],
    )
