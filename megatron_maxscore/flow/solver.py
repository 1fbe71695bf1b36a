"""``solve``: checks the arguments, runs prices and finish, and returns the certificate.

Shape letters: B problems, S rows of a problem, N rows that take part, E experts, K experts per
token, R ranks.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_maxscore.flow import prices as price_sweeps
from megatron_maxscore.flow.agreement import ARGUMENTS, Agreed, Own, agree
from megatron_maxscore.flow.backend import backend
from megatron_maxscore.flow.exchange import Exchange, exchange_of
from megatron_maxscore.flow.finish import finish
from megatron_maxscore.flow.problem import (
    SCORE_BITS,
    BoolArray,
    FloatArray,
    IntArray,
    Problem,
    check_supply,
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
    with torch.no_grad():
        return _Solve(exchange_of(group)).run(
            scores.detach(), topk, capacity, capacity_factor, prices, valid, fill_padding,
            tolerance, mode, max_rounds,
        )  # fmt: skip


def _check_arguments(
    scores: Tensor,
    topk: int,
    capacity_factor: float,
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


class _Solve:
    """One call of :func:`solve`."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.kernels = backend()

    def run(
        self,
        scores: Tensor,
        topk: int,
        capacity: int | Tensor | None,
        capacity_factor: float,
        warm: Tensor | None,
        valid: Tensor | None,
        fill_padding: bool,
        tolerance: float,
        mode: str,
        max_rounds: int | None,
    ) -> FlowSolution:
        own = capacity_E = warm_BE = None
        error = ""
        try:
            _check_arguments(scores, topk, capacity_factor, tolerance, mode, max_rounds)
            own = _Rows.of(scores, valid, fill_padding)
            capacity_E = _capacity(capacity, own.num_experts)
            warm_BE = _warm_prices(warm, own.counts_B.size, own.num_experts, own.is_batch)
        except ValueError as wrong:
            error = str(wrong)
        if own is None or error:
            nothing = np.zeros(0)
            said = Own(
                ("?",) * len(ARGUMENTS), error, "", False, nothing.astype(np.int64), nothing,
                nothing.astype(np.int64),
            )  # fmt: skip
            agree(self.exchange, said)
            raise AssertionError("agree() raises what is wrong")
        assert warm_BE is not None
        unit_B = own.units()
        scanned = own.scan(self.kernels, unit_B)
        arguments = (
            topk, own.num_experts, own.counts_B.size, str(scores.dtype).removeprefix("torch."),
            capacity_E if capacity_E is None or capacity_E.min() < capacity_E.max()
            else int(capacity_E[0]),
            capacity_factor, None if warm is None else warm_BE, fill_padding, float(tolerance),
            mode, max_rounds,
        )  # fmt: skip
        agreed = agree(
            self.exchange,
            Own(
                arguments, "", own.wrong(scanned, topk), scanned.has_forbidden, own.counts_B,
                scanned.largest_B, unit_B,
            ),
        )  # fmt: skip
        if (agreed.unit_B != unit_B).any():
            scanned = own.scan(self.kernels, agreed.unit_B)
        return self._solve(
            own, scanned, agreed, topk, capacity_E, capacity_factor, warm_BE, tolerance, mode,
            max_rounds, scores.device,
        )  # fmt: skip

    def _solve(
        self,
        own: _Rows,
        scanned: _Scanned,
        agreed: Agreed,
        topk: int,
        capacity_E: IntArray | None,
        capacity_factor: float,
        warm_BE: FloatArray,
        tolerance: float,
        mode: str,
        max_rounds: int | None,
        device: torch.device,
    ) -> FlowSolution:
        exchange, unit_B = self.exchange, agreed.unit_B
        rows_B = agreed.rows_RB.sum(0)
        if capacity_E is None:
            each = [
                math.ceil(count * topk * capacity_factor / own.num_experts)
                for count in rows_B.tolist()
            ]
            capacity_BE = np.repeat(np.array(each, np.int64)[:, None], own.num_experts, 1)
        else:
            capacity_BE = np.broadcast_to(capacity_E, (rows_B.size, own.num_experts))
        problem = Problem(
            scanned.scores_NE,
            own.start_B,
            agreed.rows_RB,
            exchange.rank,
            topk,
            np.minimum(capacity_BE, rows_B[:, None]),
            scanned.low_N,
            shifts(agreed.largest_B),
            agreed.has_forbidden,
        )
        if problem.has_forbidden and mode == "bounded":
            raise ValueError(
                "scores forbid arcs (-inf), which mode='bounded' cannot promise to respect; use "
                "mode='exact'"
            )
        check_supply(problem)
        with np.errstate(over="ignore"):
            # Differences first: an infinite one is clipped, that of two infinite prices is NaN.
            warm_BE = np.ldexp(warm_BE - warm_BE.min(1, keepdims=True), unit_B[:, None])
        start_BE = integer_prices(warm_BE, problem, agreed.largest_B)
        if exchange.size > 1 and (price_sweeps.sample_size(problem) == rows_B).all():
            result = self._gathered(problem, start_BE, tolerance, mode)
        else:
            result = self._split(problem, scanned.range_N, start_BE, tolerance, mode, max_rounds)
        objective_B, difference_B, total_range_B = result.sums_3B
        difference_B = np.maximum(difference_B, 0.0)
        gap_B = np.zeros(rows_B.size)
        np.divide(difference_B, total_range_B, out=gap_B, where=total_range_B > 0)
        gap_B[(total_range_B == 0) & (difference_B > 0)] = np.inf
        with np.errstate(over="ignore"):  # sums near the end of float64 may be infinite
            objective_B = np.ldexp(objective_B, -unit_B)
            bound_B = objective_B + np.ldexp(difference_B, -unit_B)
        prices_BE = np.ldexp(result.exact_BE, -unit_B[:, None])

        def give(values: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(values)).to(device)
            return tensor if own.is_batch else tensor[0]

        return FlowSolution(
            experts=give(own.spread(result.experts_NK)),
            prices=give(_normalised(prices_BE, problem.tight_B)),
            objective=give(objective_B),
            bound=give(bound_B),
            gap=give(gap_B),
            converged=give(gap_B <= max(tolerance, _ROUNDING)),
            loads=give(result.load_RBE.swapaxes(0, 1)),
            rounds=exchange.rounds,
        )

    def _split(
        self,
        problem: Problem,
        range_N: FloatArray,
        start_BE: IntArray,
        tolerance: float,
        mode: str,
        max_rounds: int | None,
    ) -> _Result:
        """Solve with every rank's rows where they are."""
        prices_BE, x_NE = _assign(
            self.kernels, self.exchange, problem, start_BE, range_N, tolerance, mode, max_rounds
        )
        own = _evaluate(self.kernels, problem, range_N, prices_BE, x_NE)
        if self.exchange.size == 1:
            return own.with_rent(problem)
        payload = own.sums_3B.tobytes() + own.load_RBE.tobytes()
        received = self.exchange.gather(payload, phase="the result")
        size = own.sums_3B.nbytes

        def of_all() -> tuple[FloatArray, IntArray]:
            sums = [np.frombuffer(data[:size]).reshape(3, -1) for data in received]
            loads = [
                np.frombuffer(data[size:], np.int64).reshape(own.load_RBE.shape[1:])
                for data in received
            ]
            return np.sum(sums, axis=0), np.stack(loads)

        sums_3B, load_RBE = self.exchange.same(of_all)
        return dataclasses.replace(own, sums_3B=sums_3B, load_RBE=load_RBE).with_rent(problem)

    def _gathered(
        self, problem: Problem, start_BE: IntArray, tolerance: float, mode: str
    ) -> _Result:
        """Give every rank all rows, which are few, and let it solve the whole."""
        rows_RB = problem.rows_RB
        scores_NE = price_sweeps.gather_rows(self.exchange, problem.scores_NE, rows_RB)

        def solve_whole() -> _Result:
            low_N, high_N, *_ = self.kernels.scan(scores_NE)
            whole = dataclasses.replace(
                problem,
                scores_NE=scores_NE,
                start_B=np.concatenate([[0], problem.rows_B.cumsum()]),
                rows_RB=problem.rows_B[None],
                rank=0,
                low_N=low_N,
            )
            prices_BE, x_NE = _assign(
                self.kernels, Exchange(), whole, start_BE, high_N - low_N, tolerance, mode, None
            )
            result = _evaluate(self.kernels, whole, high_N - low_N, prices_BE, x_NE)
            return result.with_rent(whole)

        whole = self.exchange.same(solve_whole)
        # Problem by problem in rank order.
        part_RB = np.repeat(np.arange(rows_RB.size), rows_RB.T.ravel())
        part_RB = part_RB.reshape(-1)
        shape = (rows_RB.shape[1], rows_RB.shape[0], problem.num_experts)
        slot_NK = part_RB[:, None] * problem.num_experts + whole.experts_NK
        load_BRE = np.bincount(slot_NK.ravel(), minlength=math.prod(shape)).reshape(shape)
        is_own_N = part_RB % rows_RB.shape[0] == self.exchange.rank
        return dataclasses.replace(
            whole, experts_NK=whole.experts_NK[is_own_N], load_RBE=load_BRE.swapaxes(0, 1)
        )


@dataclass(frozen=True)
class _Scanned:
    """Scores brought to where they can be computed with, and their ranges."""

    scores_NE: np.ndarray
    low_N: FloatArray
    range_N: FloatArray
    largest_B: FloatArray
    has_bad: bool
    has_forbidden: bool


@dataclass(frozen=True)
class _Rows:
    """This rank's rows that take part, and where they were."""

    scores_NE: np.ndarray
    start_B: IntArray
    rows: IntArray | None
    size: int
    is_batch: bool

    @classmethod
    def of(cls, scores: Tensor, valid: Tensor | None, fill_padding: bool) -> _Rows:
        is_batch = scores.dim() == 3
        batch = scores if is_batch else scores[None]
        num_problems, size, num_experts = batch.shape
        wide = batch if batch.dtype == torch.float64 else batch.float()
        scores_NE = wide.cpu().contiguous().numpy().reshape(-1, num_experts)
        valid_N = _valid_rows(valid, batch.shape[:2] if is_batch else batch.shape[1:2])
        rows: IntArray | None = None
        counts_B = np.full(num_problems, size, np.int64)
        if valid_N is not None and not valid_N.all():
            if fill_padding:
                scores_NE = np.where(valid_N[:, None], scores_NE, scores_NE.dtype.type(0))
            else:
                rows = np.flatnonzero(valid_N)
                counts_B = valid_N.reshape(num_problems, size).sum(1)
                scores_NE = scores_NE[rows]
        return cls(scores_NE, np.concatenate([[0], counts_B.cumsum()]), rows, size, is_batch)

    @property
    def num_experts(self) -> int:
        return int(self.scores_NE.shape[1])

    @property
    def counts_B(self) -> IntArray:
        return np.diff(self.start_B)

    def units(self) -> IntArray:
        """Return (B,) exponents that bring float64 scores away from the ends of their range."""
        unit_B = np.zeros(self.start_B.size - 1, np.int64)
        if self.scores_NE.dtype != np.float64 or self.scores_NE.size == 0:
            return unit_B
        size_NE = np.where(np.isfinite(self.scores_NE), np.abs(self.scores_NE), 0.0)
        exponent_B = np.frexp(maxima(size_NE.max(1), self.start_B))[1].astype(np.int64)
        return np.where(np.abs(exponent_B) > 900, -exponent_B, 0)

    def scan(self, kernels: Any, unit_B: IntArray) -> _Scanned:
        scores_NE = self.scores_NE
        if unit_B.any():
            scores_NE = np.ldexp(scores_NE, np.repeat(unit_B, self.counts_B)[:, None])
        low_N, high_N, has_bad, has_forbidden = kernels.scan(scores_NE)
        with np.errstate(invalid="ignore"):  # a row without allowed experts is refused
            range_N = high_N - low_N
        largest_B = maxima(np.where(range_N > 0, range_N, 0.0), self.start_B)
        return _Scanned(scores_NE, low_N, range_N, largest_B, has_bad, has_forbidden)

    def wrong(self, scanned: _Scanned, topk: int) -> str:
        """Return what is wrong with the scores, "" if nothing is."""
        if scanned.has_bad:
            is_bad_NE = np.isnan(self.scores_NE) | np.isposinf(self.scores_NE)
            bad = np.flatnonzero(is_bad_NE.any(1))
            return f"scores hold NaN or +inf in {bad.size} tokens, first in {self._name(bad[0])}"
        if scanned.has_forbidden:
            degree_N = (self.scores_NE != -np.inf).sum(1)
            short = np.flatnonzero(degree_N < topk)
            if short.size:
                return (
                    f"{self._name(short[0])} has {int(degree_N[short[0]])} allowed experts but "
                    f"needs topk={topk} ({short.size} such tokens); allow more experts for it"
                )
        return ""

    def _name(self, row: int) -> str:
        index = int(row if self.rows is None else self.rows[row])
        problem = f" of problem {index // self.size}" if self.is_batch else ""
        return f"token {index % self.size}{problem}"

    def spread(self, experts_NK: IntArray) -> IntArray:
        """Return (B, S, K) experts, -1 in rows that do not take part."""
        all_NK = experts_NK
        problems, topk = self.start_B.size - 1, experts_NK.shape[1]
        if self.rows is not None:
            all_NK = np.full((problems * self.size, topk), -1, np.int64)
            all_NK[self.rows] = experts_NK
        return all_NK.reshape(problems, self.size, topk)


@dataclass(frozen=True)
class _Result:
    """An assignment evaluated on unrounded scores.

    Attributes:
        exact_BE: (B, E) float64 prices.
        experts_NK: (N, K) int64.
        load_RBE: (R, B, E) int64.
        sums_3B: (3, B) float64 objective, its distance from the bound, sum of the rows' ranges.
    """

    exact_BE: FloatArray
    experts_NK: IntArray
    load_RBE: IntArray
    sums_3B: FloatArray

    def with_rent(self, problem: Problem) -> _Result:
        """Add what prices of unused capacity contribute to the distance from the bound."""
        idle_BE = problem.capacity_BE - self.load_RBE.sum(0)
        sums_3B = self.sums_3B.copy()
        sums_3B[1] += (self.exact_BE * idle_BE).sum(1)
        return dataclasses.replace(self, sums_3B=sums_3B)


def _evaluate(
    kernels: Any, problem: Problem, range_N: FloatArray, prices_BE: IntArray, x_NE: BoolArray
) -> _Result:
    """Evaluate this rank's rows."""
    exact_BE = np.ldexp(prices_BE.astype(np.float64), -problem.shift_B[:, None])
    experts_NK, total_N, slack_N = kernels.conclude(problem, exact_BE, x_NE)
    sums = [_sums(values_N, problem.start_B) for values_N in (total_N, slack_N, range_N)]
    return _Result(exact_BE, experts_NK, _loads(experts_NK, problem)[None], np.stack(sums))


# Bounded mode: passes over the scores, besides those over a sample, and phases of each attempt of
# the finish.
_BOUNDED_PASSES = 6
_BOUNDED_PHASES = 32
# Rounds besides those of price passes: a sample, contested rows once, the result.
_OTHER_ROUNDS = 4
# The gap that rounding scores to integers may leave, relative to the ranges of the rows.
_ROUNDING = 1e-9


def _assign(
    kernels: Any,
    exchange: Exchange,
    problem: Problem,
    start_BE: IntArray,
    range_N: FloatArray,
    tolerance: float,
    mode: str,
    max_rounds: int | None,
) -> tuple[IntArray, BoolArray]:
    """Return (B, E) int64 prices and the (N, E) bool assignment of this rank's rows."""
    rows, num_experts = problem.scores_NE.shape
    if problem.rows_B.sum() == 0:
        return start_BE, np.zeros((0, num_experts), np.bool_)
    if problem.topk == num_experts:
        return np.zeros_like(start_BE), np.ones((rows, num_experts), np.bool_)
    max_passes = price_sweeps.MAX_PASSES if mode == "exact" else _BOUNDED_PASSES
    if max_rounds is not None and exchange.size > 1:
        max_passes = max(2, min(max_passes, max_rounds - exchange.rounds - _OTHER_ROUNDS))
    sum_ranges_B = None
    if mode == "exact" and tolerance > 0.0 and not problem.has_forbidden:
        sum_ranges_B = _sum_ranges(exchange, problem, range_N)
    state = price_sweeps.improve(
        kernels, exchange, problem, start_BE, max_passes, tolerance, sum_ranges_B
    )
    prices_BE, load_BE = finish(
        kernels, exchange, problem, state, None if mode == "exact" else _BOUNDED_PHASES
    )
    if mode == "bounded":
        for b in np.flatnonzero((load_BE > problem.capacity_BE).any(1)).tolist():
            kernels.fill(problem, b, prices_BE, state.threshold_N, load_BE, state.x_NE, exchange)
    return prices_BE, state.x_NE


def _sum_ranges(exchange: Exchange, problem: Problem, range_N: FloatArray) -> FloatArray:
    """Return (B,) sums of all ranks' integer row ranges, whatever the split; one round."""
    q_N = np.rint(np.ldexp(range_N, problem.shift_B[problem.problem_N])).astype(np.int64)
    # In two parts, each of which stays within 63 bits.
    low_bits = SCORE_BITS // 2
    parts_2B = np.stack(
        [
            np.add.reduceat(np.append(part_N, 0), problem.start_B[:-1])
            * (np.diff(problem.start_B) > 0)
            for part_N in (q_N >> low_bits, q_N & ((1 << low_bits) - 1))
        ]
    )
    total_2B = sum(
        np.frombuffer(data, np.int64).reshape(2, -1)
        for data in exchange.gather(parts_2B.tobytes(), phase="ranges of scores")
    )
    return np.array(
        [float((high << low_bits) + low) for high, low in np.asarray(total_2B).T.tolist()]
    )


def _loads(experts_NK: IntArray, problem: Problem) -> IntArray:
    """Return (B, E) int64 loads."""
    shape = problem.num_problems, problem.num_experts
    slots_NK = experts_NK + problem.problem_N[:, None] * shape[1] if shape[0] > 1 else experts_NK
    return np.bincount(slots_NK.ravel(), minlength=shape[0] * shape[1]).reshape(shape)


def _sums(values_N: FloatArray, start_B: IntArray) -> FloatArray:
    """Return (B,) sums of each problem's rows."""
    parts = zip(start_B[:-1].tolist(), start_B[1:].tolist(), strict=True)
    return np.array([values_N[a:b].sum() for a, b in parts])


def _valid_rows(valid: Tensor | None, shape: torch.Size) -> BoolArray | None:
    if valid is None:
        return None
    if valid.shape != shape or valid.dtype != torch.bool:
        raise ValueError(
            f"valid must be {tuple(shape)} bool, got {tuple(valid.shape)} {valid.dtype}"
        )
    return valid.detach().cpu().numpy().reshape(-1)


def _capacity(capacity: int | Tensor | None, num_experts: int) -> IntArray | None:
    """Return the (E,) int64 capacities, None where a factor gives them."""
    if capacity is None:
        return None
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
    return capacity_E


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
