"""``solve``: checks the arguments, runs prices and finish, and returns the certificate.

Shape letters: B problems, S rows of a problem, N rows that take part, E experts, K experts per
token, R ranks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_maxscore.flow import prices as price_sweeps
from megatron_maxscore.flow.backend import backend
from megatron_maxscore.flow.finish import finish
from megatron_maxscore.flow.problem import (
    BoolArray,
    FloatArray,
    IntArray,
    Problem,
    check_feasible,
    integer_prices,
    maxima,
    shifts,
)
from megatron_maxscore.flow.solution import FlowSolution

MODES = ("exact", "bounded")
# Prices reach E - 1 score ranges, and 63 bits have to hold them, path lengths and counts of arcs.
MAX_EXPERTS = 1024


def solve(
    scores: Tensor,
    topk: int,
    capacity: int | Tensor | None = None,
    capacity_factor: float = 1.0,
    prices: Tensor | None = None,
    group: Any = None,
    valid: Tensor | None = None,
    fill_padding: bool = False,
    tolerance: float = 0.0,
    mode: str = "exact",
    max_rounds: int | None = None,
) -> FlowSolution:
    """Assign every token exactly k distinct experts, no expert above capacity, best total score.

    Example:
        >>> sol = solve(torch.tensor([[1.0, 0.9], [0.8, 0.1]]), topk=1)
        >>> sol.experts.tolist(), sol.objective.item(), sol.gap.item()
        ([[1], [0]], 1.699999988079071, 0.0)

    Args:
        scores: (T, E) float, or (B, S, E) for B separate problems; E <= 1024. -inf forbids the arc.
            bfloat16 and float16 are exact in float32. Any device; the solver itself runs on the
            CPU.
        topk: k distinct experts per token, 1 <= k <= E.
        capacity: int, or (E,) int64; per problem.
        capacity_factor: used without ``capacity``: C = ceil(T * k * factor / E) for all experts.
        prices: (E,) or (B, E) warm start in score units, finite.
        group: process group whose ranks hold the other tokens. Only groups of one rank for now.
        valid: (T,) or (B, S) bool, False = padding.
        fill_padding: True: padding rows get k experts too, as rows of equal scores in the same
            flow. False: they get no expert and take no capacity.
        tolerance: relative gap at which the solver may stop; 0 = exact optimum.
        mode: "exact", or "bounded": a fixed number of passes and moves, feasible with a certified
            gap. Bounded mode needs every arc allowed.
        max_rounds: most collectives to use; one rank needs none.

    Returns:
        The assignment and its certificate, on the device of ``scores``.

    Raises:
        ValueError: an argument is out of range, scores of valid rows are NaN or +inf, or no
            feasible assignment exists. Names the value.
    """
    _check_arguments(scores, topk, capacity_factor, group, tolerance, mode, max_rounds)
    with torch.no_grad():
        batch = scores.detach() if scores.dim() == 3 else scores.detach()[None]
        return _solve(
            batch, scores.dim() == 3, topk, capacity, capacity_factor, prices, valid,
            fill_padding, tolerance, mode,
        )  # fmt: skip


def _check_arguments(
    scores: Tensor,
    topk: int,
    capacity_factor: float,
    group: Any,
    tolerance: float,
    mode: str,
    max_rounds: int | None,
) -> None:
    if scores.dim() not in (2, 3):
        raise ValueError(f"scores must be (T, E) or (B, S, E), got shape {tuple(scores.shape)}")
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
    if not 1 <= topk <= scores.shape[-1]:
        raise ValueError(
            f"topk must lie between 1 and the number of experts {scores.shape[-1]}, got {topk}"
        )
    if scores.shape[-1] > MAX_EXPERTS:
        raise ValueError(f"scores may have at most {MAX_EXPERTS} experts, got {scores.shape[-1]}")
    if scores.dim() == 3 and scores.shape[0] == 0:
        raise ValueError("scores hold no problem: the first dimension of (B, S, E) is 0")
    if not (capacity_factor > 0 and math.isfinite(capacity_factor)):
        raise ValueError(f"capacity_factor must be a positive number, got {capacity_factor}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if max_rounds is not None and max_rounds < 0:
        raise ValueError(f"max_rounds must be at least 0, got {max_rounds}")
    if group is not None and group.size() > 1:
        raise ValueError(
            f"group has {group.size()} ranks; solving over several ranks does not exist yet, "
            "solve each rank's tokens with group=None"
        )


def _solve(
    scores: Tensor,
    is_batch: bool,
    topk: int,
    capacity: int | Tensor | None,
    capacity_factor: float,
    warm: Tensor | None,
    valid: Tensor | None,
    fill_padding: bool,
    tolerance: float,
    mode: str,
) -> FlowSolution:
    num_problems, size, num_experts = scores.shape
    wide = scores if scores.dtype == torch.float64 else scores.float()
    scores_NE = wide.cpu().contiguous().numpy().reshape(-1, num_experts)
    valid_N = _valid_rows(valid, scores.shape[:2] if is_batch else scores.shape[1:2])
    rows: IntArray | None = None
    counts_B = np.full(num_problems, size, np.int64)
    if valid_N is not None and not valid_N.all():
        if fill_padding:
            scores_NE = np.where(valid_N[:, None], scores_NE, scores_NE.dtype.type(0))
        else:
            rows = np.flatnonzero(valid_N)
            counts_B = valid_N.reshape(num_problems, size).sum(1)
            scores_NE = scores_NE[rows]
    start_B = np.concatenate([[0], counts_B.cumsum()])
    capacity_BE = _capacities(capacity, capacity_factor, counts_B, topk, num_experts)
    warm_BE = _warm_prices(warm, num_problems, num_experts, is_batch)

    kernels = backend()
    scores_NE, unit_B = _representable(scores_NE, start_B)
    low_N, high_N, has_bad, has_forbidden = kernels.scan(scores_NE)
    if has_bad:
        raise ValueError(_where_bad(scores_NE, rows, size, is_batch))
    with np.errstate(invalid="ignore"):  # a row without allowed experts is refused below
        range_N = high_N - low_N
    largest_B = maxima(np.where(range_N > 0, range_N, 0.0), start_B)
    problem = Problem(
        scores_NE,
        start_B,
        topk,
        np.minimum(capacity_BE, counts_B[:, None]),
        low_N,
        shifts(largest_B),
        has_forbidden,
    )
    if has_forbidden and mode == "bounded":
        raise ValueError(
            "scores forbid arcs (-inf), which mode='bounded' cannot promise to respect; use "
            "mode='exact'"
        )
    check_feasible(problem)
    with np.errstate(over="ignore"):
        # Differences first: an infinite one is clipped, that of two infinite prices is NaN.
        warm_BE = np.ldexp(warm_BE - warm_BE.min(1, keepdims=True), unit_B[:, None])
    start_BE = integer_prices(warm_BE, problem, largest_B)
    prices_BE, x_NE = _assign(kernels, problem, start_BE, range_N, tolerance, mode)

    exact_BE = np.ldexp(prices_BE.astype(np.float64), -problem.shift_B[:, None])
    experts_NK, total_N, slack_N = kernels.conclude(problem, exact_BE, x_NE)
    load_BE = _loads(experts_NK, problem)
    rent_B = (exact_BE * (problem.capacity_BE - load_BE)).sum(1)
    difference_B = np.maximum(_sums(slack_N, start_B) + rent_B, 0.0)
    total_range_B = _sums(range_N, start_B)
    gap_B = np.zeros(num_problems)
    np.divide(difference_B, total_range_B, out=gap_B, where=total_range_B > 0)
    gap_B[(total_range_B == 0) & (difference_B > 0)] = np.inf
    with np.errstate(over="ignore"):  # sums near the end of float64 may be infinite
        objective_B = np.ldexp(_sums(total_N, start_B), -unit_B)
        bound_B = objective_B + np.ldexp(difference_B, -unit_B)

    all_NK = experts_NK
    if rows is not None:
        all_NK = np.full((num_problems * size, topk), -1, np.int64)
        all_NK[rows] = experts_NK

    def give(values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values)).to(scores.device)
        return tensor if is_batch else tensor[0]

    return FlowSolution(
        experts=give(all_NK.reshape(num_problems, size, topk)),
        prices=give(_normalised(np.ldexp(exact_BE, -unit_B[:, None]), problem.tight_B)),
        objective=give(objective_B),
        bound=give(bound_B),
        gap=give(gap_B),
        converged=give(gap_B <= max(tolerance, _ROUNDING)),
        loads=give(load_BE[:, None]),
        rounds=0,
    )


# Bounded mode: passes over the scores, besides those over a sample, and phases of each attempt of
# the finish.
_BOUNDED_PASSES = 6
_BOUNDED_PHASES = 32
# The gap that rounding scores to integers may leave, relative to the ranges of the rows.
_ROUNDING = 1e-9


def _assign(
    kernels: Any,
    problem: Problem,
    start_BE: IntArray,
    range_N: FloatArray,
    tolerance: float,
    mode: str,
) -> tuple[IntArray, BoolArray]:
    """Return (B, E) int64 prices and the (N, E) bool assignment."""
    rows, num_experts = problem.scores_NE.shape
    if rows == 0:
        return start_BE, np.zeros((0, num_experts), np.bool_)
    if problem.topk == num_experts:
        return np.zeros_like(start_BE), np.ones((rows, num_experts), np.bool_)
    if mode == "bounded":
        state = price_sweeps.improve(kernels, problem, start_BE, _BOUNDED_PASSES)
        max_phases = _BOUNDED_PHASES
    else:
        sum_ranges_B = None
        if tolerance > 0.0 and not problem.has_forbidden:
            sum_ranges_B = np.ldexp(_sums(range_N, problem.start_B), problem.shift_B)
        state = price_sweeps.improve(
            kernels, problem, start_BE, tolerance=tolerance, sum_ranges_B=sum_ranges_B
        )
        max_phases = None
    prices_BE = finish(
        kernels,
        problem,
        state.prices_BE,
        state.gap_N,
        state.x_NE,
        state.load_BE,
        state.filled_B,
        max_phases,
    )
    if mode == "bounded":
        load_BE = _loads(np.nonzero(state.x_NE)[1].reshape(rows, problem.topk), problem)
        for b in np.flatnonzero((load_BE > problem.capacity_BE).any(1)).tolist():
            kernels.fill(problem, b, prices_BE, state.threshold_N, load_BE, state.x_NE)
    return prices_BE, state.x_NE


def _loads(experts_NK: IntArray, problem: Problem) -> IntArray:
    """Return (B, E) int64 loads."""
    shape = problem.num_problems, problem.num_experts
    slots_NK = experts_NK + problem.problem_N[:, None] * shape[1] if shape[0] > 1 else experts_NK
    return np.bincount(slots_NK.ravel(), minlength=shape[0] * shape[1]).reshape(shape)


def _sums(values_N: FloatArray, start_B: IntArray) -> FloatArray:
    """Return (B,) sums of each problem's rows."""
    parts = zip(start_B[:-1].tolist(), start_B[1:].tolist(), strict=True)
    return np.array([values_N[a:b].sum() for a, b in parts])


def _representable(scores_NE: np.ndarray, start_B: IntArray) -> tuple[np.ndarray, IntArray]:
    """Bring float64 scores near the ends of its exponents to where they can be computed with.

    Returns:
        The scores, multiplied by ``2.0 ** unit``, and (B,) unit.
    """
    unit_B = np.zeros(start_B.size - 1, np.int64)
    if scores_NE.dtype != np.float64 or scores_NE.size == 0:
        return scores_NE, unit_B
    size_NE = np.where(np.isfinite(scores_NE), np.abs(scores_NE), 0.0)
    exponent_B = np.frexp(maxima(size_NE.max(1), start_B))[1].astype(np.int64)
    unit_B = np.where(np.abs(exponent_B) > 900, -exponent_B, 0)
    if unit_B.any():
        scores_NE = np.ldexp(scores_NE, np.repeat(unit_B, np.diff(start_B))[:, None])
    return scores_NE, unit_B


def _valid_rows(valid: Tensor | None, shape: torch.Size) -> BoolArray | None:
    if valid is None:
        return None
    if valid.shape != shape or valid.dtype != torch.bool:
        raise ValueError(
            f"valid must be {tuple(shape)} bool, got {tuple(valid.shape)} {valid.dtype}"
        )
    return valid.detach().cpu().numpy().reshape(-1)


def _where_bad(scores_NE: np.ndarray, rows: IntArray | None, size: int, is_batch: bool) -> str:
    bad = np.flatnonzero((np.isnan(scores_NE) | np.isposinf(scores_NE)).any(1))
    first = int(bad[0] if rows is None else rows[bad[0]])
    where = f"token {first % size}" + (f" of problem {first // size}" if is_batch else "")
    return f"scores hold NaN or +inf in {bad.size} tokens, first in {where}"


def _capacities(
    capacity: int | Tensor | None, factor: float, counts_B: IntArray, topk: int, num_experts: int
) -> IntArray:
    shape = (counts_B.size, num_experts)
    if capacity is None:
        each = [math.ceil(count * topk * factor / num_experts) for count in counts_B.tolist()]
        return np.broadcast_to(np.array(each, np.int64)[:, None], shape)
    if isinstance(capacity, Tensor):
        if capacity.shape != (num_experts,) or capacity.is_floating_point():
            raise ValueError(
                f"capacity must be an int or ({num_experts},) int64, got "
                f"{tuple(capacity.shape)} {capacity.dtype}"
            )
        capacity_E = capacity.detach().cpu().numpy().astype(np.int64)
    elif not isinstance(capacity, (int, np.integer)):
        raise ValueError(f"capacity must be an int or ({num_experts},) int64, got {capacity}")
    else:
        capacity_E = np.full(num_experts, capacity, np.int64)
    if (capacity_E < 0).any():
        raise ValueError(f"capacity must be at least 0, got {int(capacity_E.min())}")
    return np.broadcast_to(capacity_E, shape)


def _warm_prices(
    warm: Tensor | None, num_problems: int, num_experts: int, is_batch: bool
) -> FloatArray:
    shape = (num_problems, num_experts)
    if warm is None:
        return np.zeros(shape)
    if warm.shape != shape[1:] and not (is_batch and warm.shape == shape):
        either = f" or {shape}" if is_batch else ""
        raise ValueError(f"prices must be {shape[1:]}{either}, got shape {tuple(warm.shape)}")
    warm_BE = warm.detach().cpu().numpy().astype(np.float64)
    if not np.isfinite(warm_BE).all():
        raise ValueError("prices must be finite; start from zeros instead")
    return np.array(np.broadcast_to(warm_BE, shape))


def _normalised(prices_BE: FloatArray, tight_B: BoolArray) -> np.ndarray:
    level_B = np.where(tight_B, prices_BE.mean(1), prices_BE.min(1))
    largest = float(np.finfo(np.float32).max)
    return np.clip(prices_BE - level_B[:, None], -largest, largest).astype(np.float32)
