"""``solve``: exchanges the arguments, runs prices and finish, and returns the certificate.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from megatron_maxscore.flow import certified, inputs, outliers, passes
from megatron_maxscore.flow import prices as price_sweeps
from megatron_maxscore.flow.agreement import ANY_UNIT, Own, agree
from megatron_maxscore.flow.exchange import Exchange, exchange_of
from megatron_maxscore.flow.finish import finish
from megatron_maxscore.flow.inputs import Options, Rows
from megatron_maxscore.flow.problem import (
    BoolArray,
    FloatArray,
    IntArray,
    Problem,
    check_supply,
    integer_prices,
    shifts,
)
from megatron_maxscore.flow.sample import gather_rows, sample_size
from megatron_maxscore.flow.solution import ROUNDING, FlowSolution


# torch.compile cannot trace this function. A compiled function calls it uncompiled.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def solve(
    scores: Tensor | ArrayLike,
    topk: int,
    capacity: int | Tensor | ArrayLike | None = None,
    capacity_factor: float = 1.0,
    prices: Tensor | ArrayLike | None = None,
    group: Any = None,
    valid: Tensor | ArrayLike | None = None,
    fill_padding: bool = False,
    mode: str = "auto",
) -> FlowSolution:
    """Assign every token exactly k distinct experts, no expert above capacity, best total score.

    Example:
        >>> sol = solve(torch.tensor([[1.0, 0.9], [0.8, 0.1]]), topk=1)
        >>> sol.experts.tolist(), sol.objective.item(), sol.gap.item()
        ([[1], [0]], 1.699999988079071, 0.0)

    Args:
        scores: (T, E) float, or (B, S, E) for B separate problems, on any device; E <= 4096.
            Problems with more than 1024 experts are solved on the host even if the scores are on a
            GPU. -inf forbids the arc. bfloat16 and float16 are converted to float32, which is
            exact. Rows whose range exceeds that of ordinary rows by a factor of 16,384 or more are
            scaled down (:mod:`outliers`), and the result is the optimum for the scaled scores.
            Arrays and nested lists are taken as tensors on the CPU, here and below.
        topk: k distinct experts per token, 1 <= k <= E.
        capacity: int, or (E,) int64; per problem.
        capacity_factor: used without ``capacity``: C = ceil(T * k * factor / E) for all experts.
        prices: (E,) or (B, E) warm start in score units, finite.
        group: process group over whose ranks the tokens are split, contiguously in group-rank
            order. All ranks must call. For capacities, T is then the number of tokens of all ranks.
            Every argument but scores and ``valid`` must be the same on every rank.
        valid: (T,) or (B, S) bool, False = padding.
        fill_padding: True: padding rows get k experts too, as rows of equal scores in the same
            flow. False: they get no expert and take no capacity.
        mode: "exact" solves on the CPU; scores on a GPU are copied there. "bounded" solves on the
            GPU (:mod:`device`), with a certified gap and without a host sync. "auto" is exact for
            scores on the CPU and bounded for scores on a GPU. In bounded mode, NaN and +inf count
            as 0 instead of raising, and a forbidden arc counts as one row range less than the row's
            lowest score. Ranks compare arguments in the first call with a group. In later calls the
            device compares a digest of them; it does not include the values of prices, which must
            be equal. Bounded mode needs ``fill_padding`` if there may be padding, and float32 or
            narrower scores. Other problems are solved exactly, and a message says so once.

    Returns:
        The assignment and its certificate, on the device of ``scores``.

    Raises:
        ValueError: an argument is out of range or differs between ranks, scores of valid rows are
            NaN or +inf, or no feasible assignment exists. Names the value and the rank; the same on
            every rank.
        LostRankError: another rank did not take part within the group's timeout.
    """
    exchange = exchange_of(group)
    with torch.no_grad():
        try:
            detached = inputs.tensor("scores", scores).detach()
            prices = None if prices is None else inputs.tensor("prices", prices)
            valid = None if valid is None else inputs.tensor("valid", valid)
            topk = inputs.count("topk", topk)
            inputs.check(detached, topk, capacity_factor, mode)
            capacity = inputs.capacity(capacity, detached.shape[-1])
            obstacle = certified.obstacle(
                detached, mode, exchange.size, valid is not None, fill_padding
            )
        except (ValueError, TypeError) as error:
            certified.refuse(exchange, scores, mode, valid is not None, fill_padding, str(error))
            raise  # not reached
        if not obstacle:
            return certified.solve(
                detached, topk, capacity, capacity_factor, prices, valid, exchange
            )
        certified.tell_once(detached, obstacle)
        try:
            rows = Rows.of(detached, valid, fill_padding)
            options = Options(
                topk,
                inputs.capacity_of(capacity, rows.num_experts),
                float(capacity_factor),
                inputs.warm_prices(prices, rows.counts_B.size, rows.num_experts, rows.is_batch),
                fill_padding,
            )
        except (ValueError, TypeError) as error:
            agree(exchange, Own.wrong(str(error)))
            raise  # not reached: agree() raises the same on all ranks
        return _Solve(exchange, rows, options).run(detached.dtype, detached.device)


class _Solve:
    """One call of :func:`solve`."""

    def __init__(self, exchange: Exchange, rows: Rows, options: Options) -> None:
        self.exchange, self.rows, self.options = exchange, rows, options

    def run(self, dtype: torch.dtype, device: torch.device) -> FlowSolution:
        """Exchange arguments and solve."""
        rows, options = self.rows, self.options
        unit_B = rows.units()
        scanned = rows.scan(unit_B)
        agreed = agree(
            self.exchange,
            Own(
                arguments=options.compared(rows, dtype),
                error="",
                bad=rows.wrong(scanned, options.topk),
                has_forbidden=scanned.has_forbidden,
                rows_B=rows.counts_B,
                largest_B=scanned.largest_B,
                unit_B=unit_B,
                classes_BX=outliers.classes(scanned.range_N, rows.start_B),
            ),
        )
        if ((agreed.unit_B != unit_B) & (unit_B != ANY_UNIT)).any():
            scanned = rows.scan(agreed.unit_B)
        scanned, num_scaled = rows.without_outliers(scanned, agreed.limit_B)
        rows_B = agreed.rows_RB.sum(0)
        problem = Problem(
            scores_NE=scanned.scores_NE,
            start_B=rows.start_B,
            rows_RB=agreed.rows_RB,
            rank=self.exchange.rank,
            topk=options.topk,
            capacity_BE=np.minimum(options.capacities(rows_B, rows.num_experts), rows_B[:, None]),
            low_N=scanned.low_N,
            shift_B=shifts(agreed.largest_B, rows.num_experts),
            has_forbidden=agreed.has_forbidden,
        )
        check_supply(problem)
        start_BE = np.zeros(problem.capacity_BE.shape, np.int64)
        if options.warm_BE is not None:
            with np.errstate(over="ignore"):
                # Subtract before scaling: an infinite difference is clipped, inf - inf is NaN.
                above_BE = options.warm_BE - options.warm_BE.min(1, keepdims=True)
                above_BE = np.ldexp(above_BE, agreed.unit_B[:, None])
            start_BE = integer_prices(above_BE, problem, agreed.largest_B)
        if self.exchange.size > 1 and (sample_size(problem) == rows_B).all():
            result = self._gathered(problem, start_BE)
        else:
            result = self._split(problem, scanned.range_N, start_BE)
        return self._solution(problem, result, agreed.unit_B, num_scaled, device)

    def _solution(
        self,
        problem: Problem,
        result: _Result,
        unit_B: IntArray,
        num_scaled: int,
        device: torch.device,
    ) -> FlowSolution:
        objective_B, difference_B, total_range_B = result.sums_3B
        difference_B = np.maximum(difference_B, 0.0)
        gap_B = np.zeros(unit_B.size)
        np.divide(difference_B, total_range_B, out=gap_B, where=total_range_B > 0)
        gap_B[(total_range_B == 0) & (difference_B > 0)] = np.inf
        with np.errstate(over="ignore"):  # sums near the end of float64 may be infinite
            objective_B = np.ldexp(objective_B, -unit_B)
            bound_B = objective_B + np.ldexp(difference_B, -unit_B)
        prices_BE = np.ldexp(result.exact_BE, -unit_B[:, None])

        def give(values: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(values)).to(device)
            return tensor if self.rows.is_batch else tensor[0]

        return FlowSolution(
            experts=give(self.rows.spread(result.experts_NK)),
            prices=give(_normalised(prices_BE, problem.tight_B)),
            objective=give(objective_B),
            bound=give(bound_B),
            gap=give(gap_B),
            converged=give(gap_B <= ROUNDING),
            loads=give(result.load_RBE.swapaxes(0, 1)),
            rounds=self.exchange.rounds,
            bad=torch.zeros((), dtype=torch.int64, device=device),
            scaled=torch.tensor(num_scaled, device=device),
        )

    def _split(
        self,
        problem: Problem,
        range_N: FloatArray,
        start_BE: IntArray,
    ) -> _Result:
        """Solve with every rank's rows where they are."""
        prices_BE, x_NE = _assign(self.exchange, problem, start_BE)
        own = _evaluate(problem, range_N, prices_BE, x_NE)
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

    def _gathered(self, problem: Problem, start_BE: IntArray) -> _Result:
        """Give every rank the rows of all ranks, which are few, and solve the whole on each."""
        rows_RB = problem.rows_RB
        scores_NE = gather_rows(self.exchange, problem.scores_NE, rows_RB)

        def solve_whole() -> _Result:
            low_N, high_N, *_ = passes.scan(scores_NE)
            whole = dataclasses.replace(
                problem,
                scores_NE=scores_NE,
                start_B=np.concatenate([[0], problem.rows_B.cumsum()]),
                rows_RB=problem.rows_B[None],
                rank=0,
                low_N=low_N,
            )
            prices_BE, x_NE = _assign(Exchange(), whole, start_BE)
            result = _evaluate(whole, high_N - low_N, prices_BE, x_NE)
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
    problem: Problem, range_N: FloatArray, prices_BE: IntArray, x_NE: BoolArray
) -> _Result:
    """Evaluate this rank's rows."""
    exact_BE = np.ldexp(prices_BE.astype(np.float64), -problem.shift_B[:, None])
    experts_NK, total_N, slack_N = passes.conclude(problem, exact_BE, x_NE)
    sums = [_sums(values_N, problem.start_B) for values_N in (total_N, slack_N, range_N)]
    return _Result(exact_BE, experts_NK, _loads(experts_NK, problem)[None], np.stack(sums))


def _assign(exchange: Exchange, problem: Problem, start_BE: IntArray) -> tuple[IntArray, BoolArray]:
    """Return (B, E) int64 prices and the (N, E) bool assignment of this rank's rows."""
    rows, num_experts = problem.scores_NE.shape
    if problem.rows_B.sum() == 0:
        return start_BE, np.zeros((0, num_experts), np.bool_)
    if problem.topk == num_experts:
        return np.zeros_like(start_BE), np.ones((rows, num_experts), np.bool_)
    state = price_sweeps.improve(exchange, problem, start_BE)
    prices_BE = finish(exchange, problem, state)
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


def _normalised(prices_BE: FloatArray, tight_B: BoolArray) -> np.ndarray:
    level_B = np.where(tight_B, prices_BE.mean(1), prices_BE.min(1))
    largest = float(np.finfo(np.float32).max)
    return np.clip(prices_BE - level_B[:, None], -largest, largest).astype(np.float32)
