"""``solve``: checks the arguments, runs prices and finish, and returns the certificate.

Shape letters: B problems, T tokens of a problem, E experts, K experts per token, R ranks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_maxscore.flow import certificate, prices
from megatron_maxscore.flow.finish import Finish
from megatron_maxscore.flow.problem import FloatArray, IntArray, build, integer_prices
from megatron_maxscore.flow.selection import order_by_score
from megatron_maxscore.flow.solution import FlowSolution

MODES = ("exact",)


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
        ([[1], [0]], 1.7000000476837158, 0.0)

    Args:
        scores: (T, E) float, or (B, S, E) for B separate problems. -inf forbids the arc. bfloat16
            and float16 are exact in float32. Any device; the solver itself runs on the CPU.
        topk: k distinct experts per token, 1 <= k <= E.
        capacity: int, or (E,) int64; per problem.
        capacity_factor: used without ``capacity``: C = ceil(T * k * factor / E) for all experts.
        prices: (E,) or (B, E) warm start in score units, finite.
        group: process group whose ranks hold the other tokens. Only groups of one rank for now.
        valid: (T,) or (B, S) bool, False = padding.
        fill_padding: True: padding rows get k experts too, as rows of equal scores in the same
            flow. False: they get no expert and take no capacity.
        tolerance: relative gap at which the solver may stop; 0 = exact optimum.
        mode: "exact".
        max_rounds: most collectives to use; one rank needs none.

    Returns:
        The assignment and its certificate, on the device of ``scores``.

    Raises:
        ValueError: an argument is out of range, scores of valid rows are NaN or +inf, or no
            feasible assignment exists. Names the value.
    """
    _check_arguments(scores, topk, capacity_factor, group, tolerance, mode, max_rounds)
    with torch.no_grad():
        if scores.dim() == 3:
            return _solve_batch(
                scores, topk, capacity, capacity_factor, prices, valid, fill_padding
            )
        return _solve_one(scores, topk, capacity, capacity_factor, prices, valid, fill_padding)


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


def _solve_batch(
    scores: Tensor,
    topk: int,
    capacity: int | Tensor | None,
    capacity_factor: float,
    prices: Tensor | None,
    valid: Tensor | None,
    fill_padding: bool,
) -> FlowSolution:
    parts = []
    for index in range(scores.shape[0]):
        warm = prices[index] if prices is not None and prices.dim() == 2 else prices
        mask = None if valid is None else valid[index]
        parts.append(
            _solve_one(scores[index], topk, capacity, capacity_factor, warm, mask, fill_padding)
        )
    if not parts:
        raise ValueError("scores hold no problem: the first dimension of (B, S, E) is 0")
    names = ("experts", "prices", "objective", "bound", "gap", "converged", "loads")
    return FlowSolution(
        **{name: torch.stack([getattr(part, name) for part in parts]) for name in names}, rounds=0
    )


def _solve_one(
    scores: Tensor,
    topk: int,
    capacity: int | Tensor | None,
    capacity_factor: float,
    warm: Tensor | None,
    valid: Tensor | None,
    fill_padding: bool,
) -> FlowSolution:
    num_tokens, num_experts = scores.shape
    wide = scores if scores.dtype == torch.float64 else scores.float()
    scores_TE = wide.detach().cpu().numpy()
    valid_T = np.ones(num_tokens, np.bool_)
    if valid is not None:
        if valid.shape != (num_tokens,) or valid.dtype != torch.bool:
            raise ValueError(
                f"valid must be ({num_tokens},) bool, got {tuple(valid.shape)} {valid.dtype}"
            )
        valid_T = valid.detach().cpu().numpy()
    bad_T = (np.isnan(scores_TE) | np.isposinf(scores_TE)).any(1) & valid_T
    if bad_T.any():
        raise ValueError(
            f"scores hold NaN or +inf in {int(bad_T.sum())} tokens, first in token "
            f"{int(np.flatnonzero(bad_T)[0])}"
        )
    if fill_padding and not valid_T.all():
        scores_TE = np.where(valid_T[:, None], scores_TE, scores_TE.dtype.type(0))
    takes_part_T = np.ones(num_tokens, np.bool_) if fill_padding else valid_T
    rows = np.flatnonzero(takes_part_T)
    rows_TE = scores_TE if rows.size == num_tokens else scores_TE[rows]
    capacity_E = _capacities(capacity, capacity_factor, rows.size, topk, num_experts)
    warm_E = _warm_prices(warm, num_experts)

    problem = build(rows_TE, topk, capacity_E)
    start_E = integer_prices(warm_E, problem)
    if rows.size == 0:
        x_TE, prices_E = np.zeros((0, num_experts), np.bool_), start_E
    elif topk == num_experts:
        x_TE, prices_E = np.ones((rows.size, num_experts), np.bool_), np.zeros_like(start_E)
    else:
        finish = Finish(problem, prices.improve(problem, start_E))
        prices_E = finish.run()
        x_TE = finish.x_TE
    exact_TE = rows_TE.astype(np.float64)
    experts_TK = order_by_score(x_TE, exact_TE, topk)
    exact_prices_E = np.ldexp(prices_E.astype(np.float64), -problem.shift)
    objective, bound, gap = certificate.evaluate(exact_TE, experts_TK, exact_prices_E, problem)

    all_experts_TK = np.full((num_tokens, topk), -1, np.int64)
    all_experts_TK[rows] = experts_TK
    return FlowSolution(
        experts=torch.from_numpy(all_experts_TK).to(scores.device),
        prices=_normalised(exact_prices_E, problem.is_tight).to(scores.device),
        objective=torch.tensor(objective, dtype=torch.float64, device=scores.device),
        bound=torch.tensor(bound, dtype=torch.float64, device=scores.device),
        gap=torch.tensor(gap, dtype=torch.float64, device=scores.device),
        converged=torch.tensor(True, device=scores.device),
        loads=torch.from_numpy(x_TE.sum(0, dtype=np.int64)[None]).to(scores.device),
        rounds=0,
    )


def _capacities(
    capacity: int | Tensor | None, factor: float, num_tokens: int, topk: int, num_experts: int
) -> IntArray:
    if capacity is None:
        each = math.ceil(num_tokens * topk * factor / num_experts)
        return np.full(num_experts, each, np.int64)
    if isinstance(capacity, Tensor):
        if capacity.shape != (num_experts,) or capacity.is_floating_point():
            raise ValueError(
                f"capacity must be an int or ({num_experts},) int64, got "
                f"{tuple(capacity.shape)} {capacity.dtype}"
            )
        capacity_E = capacity.detach().cpu().numpy().astype(np.int64)
    else:
        capacity_E = np.full(num_experts, capacity, np.int64)
    if (capacity_E < 0).any():
        raise ValueError(f"capacity must be at least 0, got {int(capacity_E.min())}")
    return capacity_E


def _warm_prices(warm: Tensor | None, num_experts: int) -> FloatArray:
    if warm is None:
        return np.zeros(num_experts, np.float64)
    if warm.shape != (num_experts,):
        raise ValueError(f"prices must be ({num_experts},), got shape {tuple(warm.shape)}")
    warm_E = warm.detach().cpu().numpy().astype(np.float64)
    if not np.isfinite(warm_E).all():
        raise ValueError("prices must be finite; start from zeros instead")
    return warm_E


def _normalised(prices_E: FloatArray, is_tight: bool) -> Tensor:
    level = prices_E.mean() if is_tight else prices_E.min()
    return torch.from_numpy((prices_E - level).astype(np.float32))
