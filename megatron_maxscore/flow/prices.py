r"""The dual: sweeps that bring prices close to optimal.

The dual of the flow is

.. math::
    \min_{\beta} \sum_i \text{(sum of the k largest of } s_i - \beta) + \sum_j C_j \beta_j,
    \qquad \beta \ge 0 \text{ unless the capacities leave no slack}

A sweep sets each row's threshold midway between its k-th and (k+1)-th reduced score, and counts by
how much every score lies above its threshold. From the counts follows, per expert, the price step
that would leave C of its bids positive (:mod:`buckets`). When an expert's price moves, a row's
threshold follows half the way, so a step falls short by about a half where many experts compete:
steps are taken 1.5 to 3 times as long, shorter and longer ones in turn, until one makes things
worse.

Where there are many rows, the first sweeps of a cold start are over a sample of them, and so are
those of a warm one whose prices turn out to be worth less. Sweeps need not reach the optimum:
:mod:`~megatron_maxscore.flow.finish` does, from any prices.

Shape letters: B problems, N rows of all problems, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_maxscore.flow.buckets import ALL_BUCKETS, NUM_LEVELS, WINDOW_BUCKETS, gap_within
from megatron_maxscore.flow.exchange import Exchange
from megatron_maxscore.flow.problem import SCORE_BITS, BoolArray, FloatArray, IntArray, Problem
from megatron_maxscore.flow.sample import sample_size, take_sample
from megatron_maxscore.flow.spread import TABLE_BITS, spread_table

MAX_PASSES = 8
SAMPLE_PASSES = 10
# Overflow at which the finish is cheaper than another sweep: units per expert, or a share of all
# units, which is smaller beyond some units, since the cost of the finish is in units.
_UNITS_PER_EXPERT = 0.75
# In bounded mode rounds of moves cost the same for few units.
_UNITS_PER_EXPERT_BOUNDED, _LEAST_SHARE_BOUNDED = 0.25, 1 / 64
_SHARE_OF_UNITS = 1 / 800
_SHARE_BEYOND = 1 / 1600
_UNITS_BEYOND = 64
# The finish is the work of one thread, E^2 for every other unit: at most this over E units.
_MOST_UNITS = 1 << 16
# Overflow of the sample at which its prices are as good as a sample can tell.
SAMPLE_AIM = 0.015
# Overflow from which warm prices are worth less than those of a sample.
LOST = 0.1
# Steps are long only where the overflow is at most this share of all units.
NEAR = 0.1
# By how much longer than plain they are, one after the other; the last value stays.
_RELAXATION = (1.5, 1.75, 2.5, 1.5, 3.0, 1.5)
# From here on a step's own effect is seen only after the next one.
_VERY_LONG = 2.0
# A sweep that leaves more than this share of the overflow is not worth another.
_STALLED = (4, 5)
_EVERYTHING = 1 << 49
# How far prices are counted on to be off after a step, in steps of the expert, and of all.
_WINDOW_OWN = 4
_WINDOW_MEAN = 4
# Prices of a sample, and warm ones, are off by less than this.
_FIRST_WINDOW = 1 << (SCORE_BITS - 5)
# One over the share of the units up to which slack is too little for sweeps to see.
_LITTLE_SLACK = 100
# What moving a unit of overflow without a search costs at least, in ranges of a row.
_FILL_COST = 0.05
# Bounded mode: prices are spread where two sweeps have left more than this share of the overflow
# before them, and of all units.
_STUCK = (3, 4)
TOO_MUCH = 0.03


# (B, E) int64 loads, and a function that returns the (B, E, H) counts of bids.
Reading = tuple[IntArray, Callable[[], np.ndarray]]


@dataclass
class Descent:
    """Where sweeps ended.

    Attributes:
        prices_BE: (B, E) int64.
        load_BE: (B, E) int64 at these prices.
        window_BE: (B, E) int64, by how much prices may still be off.
        passes: how often rows were read.
    """

    prices_BE: IntArray
    load_BE: IntArray
    window_BE: IntArray
    passes: int


@dataclass
class PriceState:
    """Prices, and the assignment of every row's k best experts at them.

    Attributes:
        prices_BE: (B, E) int64, >= 0 unless the problem is tight.
        load_BE: (B, E) int64.
        gaps_BL: (B, L + 1) int64 counts of all ranks' gaps by their level.
        gap_N: (N,) int64 k-th less (k+1)-th reduced score.
        x_NE: (N, E) bool.
        threshold_N: (N,) int64 mean of the k-th and (k+1)-th reduced score.
        spread_BCE: (B, C, E) int64 what each class of rows adds to the prices, C = 1 for nothing;
            see :mod:`spread`.
        filled_B: (B,) bool, whether x is already feasible and within the tolerance.
        passes: how often the scores were read.
    """

    prices_BE: IntArray
    load_BE: IntArray
    gaps_BL: IntArray
    gap_N: IntArray
    x_NE: BoolArray
    threshold_N: IntArray
    spread_BCE: IntArray
    filled_B: BoolArray
    passes: int


def improve(
    backend: Any,
    exchange: Exchange,
    problem: Problem,
    prices_BE: IntArray,
    max_passes: int = MAX_PASSES,
    tolerance: float = 0.0,
    sum_ranges_B: FloatArray | None = None,
    may_spread: bool = False,
) -> PriceState:
    """Return prices with little overflow.

    Args:
        backend: :mod:`plain` or :mod:`fused`.
        exchange: between the ranks that hold the rows; one round per pass, one for a sample.
        problem: the problems.
        prices_BE: (B, E) int64 >= 0 to start from.
        max_passes: most passes over the scores.
        tolerance: relative gap at which a filled assignment will do; all arcs must be allowed.
        sum_ranges_B: (B,) float64 sum of all rows' ranges as integers; needed with a tolerance.
        may_spread: whether prices may be spread over classes of rows where sweeps over all rows
            stall; those over a sample do now and then, for it is small.
    """
    size_B = sample_size(problem)
    units_B = problem.rows_B * problem.topk
    aim_B = np.array(
        [aim_of(units, problem.num_experts, is_bounded=may_spread) for units in units_B.tolist()]
    )
    if (size_B == problem.rows_B).any():
        # Some problem is too small for a sample, so nothing is known of how far prices are off.
        num_buckets, window_BE = ALL_BUCKETS, np.full_like(prices_BE, _EVERYTHING)
    else:
        num_buckets, window_BE = WINDOW_BUCKETS, np.full_like(prices_BE, _FIRST_WINDOW)
    rows = _Rows(backend, exchange, problem, num_buckets, tolerance, sum_ranges_B)
    rows.may_spread = may_spread
    can_sample_B = size_B < problem.rows_B
    wants_B = can_sample_B & (prices_BE == prices_BE[:, :1]).all(1)
    first = None
    if can_sample_B.any() and not wants_B.any():
        first = rows.read(prices_BE, window_BE, problem.rows_B > 0)
        overflow_B = overflow(first[0], prices_BE, problem, _is_tight(problem))
        wants_B = can_sample_B & (overflow_B > LOST * units_B)
    if wants_B.any():
        first = None
        sample = take_sample(backend, exchange, problem, np.where(wants_B, size_B, 0))
        sampled = _Rows(backend, Exchange(), sample, ALL_BUCKETS)
        everything_BE = np.full_like(prices_BE, _EVERYTHING)
        aim_of_sample_B = SAMPLE_AIM * sample.rows_B * sample.topk

        found = exchange.same(
            lambda: sampled.sweep(prices_BE, everything_BE, SAMPLE_PASSES, aim_of_sample_B)
        )
        prices_BE = found.prices_BE
    found = rows.sweep(prices_BE, window_BE, max_passes + (first is not None), aim_B, first)
    # With a little slack the lowest may be anywhere; what is common to all changes no choice.
    level_B = np.where(problem.tight_B, 0, found.prices_BE.min(1))
    prices_BE = found.prices_BE - level_B[:, None]
    return PriceState(
        prices_BE, found.load_BE, rows.gaps_BL, rows.gap_N, rows.x_NE, rows.threshold_N,
        rows.spread_BCE, rows.filled_B, found.passes,
    )  # fmt: skip


def aim_of(units: int, num_experts: int, is_bounded: bool) -> float:
    """Return the overflow of so many units at which sweeps end."""
    aim = min(_SHARE_OF_UNITS * units, _UNITS_BEYOND + _SHARE_BEYOND * units)
    least = _UNITS_PER_EXPERT * num_experts
    if is_bounded:
        least = min(_UNITS_PER_EXPERT_BOUNDED * num_experts, _LEAST_SHARE_BOUNDED * units)
    return max(min(aim, _MOST_UNITS / num_experts), least)


class _Rows:
    """Passes over all rows of problems."""

    def __init__(
        self,
        backend: Any,
        exchange: Exchange,
        problem: Problem,
        num_buckets: int,
        tolerance: float = 0.0,
        sum_ranges_B: FloatArray | None = None,
    ) -> None:
        rows = problem.scores_NE.shape[0]
        self.backend, self.exchange, self.problem = backend, exchange, problem
        self.num_buckets = num_buckets
        self.threshold_N, self.gap_N = np.zeros(rows, np.int64), np.empty(rows, np.int64)
        self.gaps_BL = np.zeros((problem.num_problems, NUM_LEVELS + 1), np.int64)
        self.x_NE = np.empty(problem.scores_NE.shape, np.bool_)
        self.filled_B = np.zeros(problem.num_problems, np.bool_)
        self.tolerance, self.sum_ranges_B = tolerance, sum_ranges_B
        self.may_spread = False
        self.spread_BCE = np.zeros((problem.num_problems, 1, problem.num_experts), np.int64)
        self._knows_threshold = False

    def sweep(
        self,
        prices_BE: IntArray,
        window_BE: IntArray,
        max_passes: int,
        aim_B: np.ndarray,
        first: Reading | None = None,
    ) -> Descent:
        return sweep(
            self.read,
            self.backend.price_step,
            self.problem,
            prices_BE,
            window_BE,
            self.problem.rows_B > 0,
            max_passes,
            aim_B,
            first,
            accept=None if self.sum_ranges_B is None else self.accept,
            spread=self.spread if self.may_spread else None,
        )

    def read(self, prices_BE: IntArray, window_BE: IntArray, active_B: BoolArray) -> Reading:
        loads_BE, gaps_BL, count_bids = self.backend.price_pass(
            self.problem, prices_BE[:, None] + self.spread_BCE, window_BE, self.num_buckets,
            active_B, self.threshold_N, self._knows_threshold, self.gap_N, self.x_NE,
        )  # fmt: skip
        self._knows_threshold = True
        if self.exchange.size > 1:
            most = int(self.problem.rows_B.max()) + 1
            loads_BE, gaps_BL, bids_BEH = self.exchange.sum(
                [loads_BE, gaps_BL, count_bids()], below=most, phase="counts of bids"
            )
            count_bids = lambda: bids_BEH  # noqa: E731
        self.gaps_BL = np.where(active_B[:, None], gaps_BL, self.gaps_BL)
        return loads_BE, count_bids

    def spread(self, stuck_B: BoolArray) -> BoolArray:
        """Spread the prices of problems that are stuck; returns (B,) bool, which it was new to."""
        width_B = np.zeros(stuck_B.size, np.int64)
        for b in np.flatnonzero(stuck_B & ~self.spread_BCE.any((1, 2))).tolist():
            width_B[b] = gap_within(self.gaps_BL[b], int(self.problem.rows_B[b]) // 2)
        if width_B.any():
            table_CE = spread_table(self.problem.num_experts)
            self.spread_BCE = self.spread_BCE + (table_CE * width_B[:, None, None] >> TABLE_BITS)
        return width_B > 0

    def accept(
        self, prices_BE: IntArray, load_BE: IntArray, overflow_B: IntArray, active_B: BoolArray
    ) -> BoolArray:
        """Fill problems whose overflow is so small that this may keep within the tolerance."""
        assert self.sum_ranges_B is not None
        for b in np.flatnonzero(active_B & (overflow_B > 0)).tolist():
            total = float(self.sum_ranges_B[b])
            least = overflow_B[b] * _FILL_COST * total
            if least > self.tolerance * total * self.problem.rows_B[b]:
                continue  # hopeless
            self.filled_B[b] = _fills(
                self.backend, self.exchange, self.problem, b, self.tolerance * total, prices_BE,
                self.threshold_N, load_BE, self.x_NE,
            )  # fmt: skip
        return self.filled_B


def overflow(
    load_BE: IntArray, prices_BE: IntArray, problem: Problem, is_tight_B: BoolArray
) -> np.ndarray:
    """Return (B,) units above capacity, or missing at a positive price, whichever is more."""
    excess_BE = load_BE - problem.capacity_BE
    over_B: np.ndarray = np.maximum(excess_BE, 0).sum(1)
    if is_tight_B.all():
        return over_B
    idle_B = np.where(prices_BE > 0, np.maximum(-excess_BE, 0), 0).sum(1)
    return np.asarray(np.where(is_tight_B, over_B, np.maximum(over_B, idle_B)))


def _is_tight(problem: Problem) -> BoolArray:
    """Return (B,) bool, whether sweeps take the capacities as tight.

    So little slack that it does not matter to them must not keep prices from falling below 0: the
    experts that are not wanted would stay where they are, and all others had to rise. A sample's
    capacities are not integers.
    """
    total_B, units_B = problem.capacity_BE.sum(1), problem.rows_B * problem.topk
    return np.asarray(_LITTLE_SLACK * np.abs(total_B - units_B) < _LITTLE_SLACK / 2 + units_B)


def _within_limits(prices_BE: IntArray, is_tight_B: BoolArray) -> IntArray:
    """Keep prices where optimal ones can be found: >= 0 with slack, and not too far apart.

    Without slack a price common to all experts changes nothing; with it, it changes no choice and
    only costs. An expert that few rows may take can get no bid at any price, and would fall ever
    further; optimal prices of problems without forbidden arcs are within E - 1 ranges.
    """
    widest = (prices_BE.shape[1] - 1) << SCORE_BITS
    low_BE: IntArray = np.maximum(prices_BE, prices_BE.max(1, keepdims=True) - widest)
    if is_tight_B.all():
        return low_BE
    positive_BE = np.maximum(low_BE, 0)
    positive_BE -= positive_BE.min(1, keepdims=True)
    return np.asarray(np.where(is_tight_B[:, None], low_BE, positive_BE))


def sweep(
    read: Callable[[IntArray, IntArray, BoolArray], Reading],
    price_step: Callable[[np.ndarray, np.ndarray, IntArray], IntArray],
    problem: Problem,
    prices_BE: IntArray,
    window_BE: IntArray,
    active_B: BoolArray,
    max_passes: int,
    aim_B: np.ndarray,
    first: Reading | None = None,
    accept: Callable[[IntArray, IntArray, IntArray, BoolArray], BoolArray] | None = None,
    spread: Callable[[BoolArray], BoolArray] | None = None,
) -> Descent:
    """Sweep until the overflow is at most ``aim_B``, no longer falls, or passes are up.

    What ``read`` has chosen last belongs to the prices that are returned.

    Args:
        read: chooses at prices, in problems that are active; returns (B, E) int64 loads and a
            function that returns the (B, E, H) counts of bids within a window.
        price_step: see :func:`buckets.price_step`.
        problem: its capacities.
        prices_BE: (B, E) int64 to start from.
        window_BE: (B, E) int64, how far prices may be off.
        active_B: (B,) bool, problems to sweep.
        max_passes: calls of ``read`` at most.
        aim_B: (B,) units of overflow at which to stop.
        first: what ``read`` has returned for these prices, if it was called already.
        spread: where given, told which problems are stuck; returns which it has helped with other
            prices for each class of rows.
        accept: where given, told of prices, loads, overflow and active problems after each pass;
            returns (B,) bool, which problems are done.
    """
    num_problems = problem.num_problems
    is_tight_B = _is_tight(problem)
    units_B = problem.rows_B * problem.topk
    near_B = NEAR * units_B
    load_BE = np.zeros(prices_BE.shape, np.int64)
    best_BE = last_BE = prices_BE
    best_B = np.full(num_problems, np.inf)
    step_BE = np.zeros_like(prices_BE)
    is_plain_B, was_long_B = np.zeros(num_problems, np.bool_), np.zeros(num_problems, np.bool_)
    was_short_B = np.zeros(num_problems, np.bool_)
    stalls_B, stuck_B = np.zeros(num_problems, np.int64), np.zeros(num_problems, np.int64)
    active_B = active_B.copy()
    relaxation_B, passes = np.ones(num_problems), 0

    def clipped(prices: np.ndarray) -> IntArray:
        return _within_limits(np.rint(prices).astype(np.int64), is_tight_B)

    while active_B.any():
        loads, count_bids = first or read(prices_BE, window_BE, active_B)
        first = None
        passes += 1
        load_BE = np.where(active_B[:, None], loads, load_BE)
        now_B = overflow(load_BE, prices_BE, problem, is_tight_B)
        if accept is not None:
            active_B &= ~accept(prices_BE, load_BE, now_B, active_B)
        is_best_B = now_B <= best_B
        is_near_B = now_B <= near_B
        # A long step that made things worse is taken back to its plain length.
        take_back_B = active_B & ~is_best_B & was_long_B
        is_plain_B |= take_back_B
        # Little progress says nothing as long as windows limit steps, nor after a very long one.
        says_B = active_B & is_near_B & ~was_short_B & (relaxation_B < _VERY_LONG) & ~take_back_B
        stalls_B += says_B & (_exceeds(now_B, _STALLED, best_B) | ~is_best_B)
        # Exactly as before: a plateau, which no price can part.
        stalls_B += active_B & (now_B == best_B)
        stuck_B += active_B & (now_B > TOO_MUCH * units_B) & _exceeds(now_B, _STUCK, best_B)
        best_BE = np.where((active_B & is_best_B)[:, None], prices_BE, best_BE)
        best_B = np.where(active_B & is_best_B, now_B, best_B)
        if spread is not None:
            is_new_B = spread(active_B & (stuck_B >= 2))
            stalls_B = np.where(is_new_B, 0, stalls_B)
            best_B = np.where(is_new_B, np.inf, best_B)
        # The last pass is kept for the best prices, should the last ones not be these.
        enough_B = (best_B <= aim_B) | (stalls_B >= 2) | (passes >= max_passes - 1)
        ends_B = active_B & enough_B & (is_best_B | (prices_BE == best_BE).all(1))
        active_B &= ~ends_B
        if not active_B.any():
            break
        fresh_BE = price_step(count_bids(), problem.capacity_BE, window_BE)
        relaxation = _RELAXATION[min(passes, len(_RELAXATION)) - 1]
        relaxation_B = np.where(is_plain_B | ~is_near_B, 1.0, relaxation)
        was_long_B = ~take_back_B & (relaxation_B > 1.0)
        go_back_B1, enough_B1 = take_back_B[:, None], enough_B[:, None]
        onward_BE = prices_BE + relaxation_B[:, None] * fresh_BE
        moved_BE = np.where(go_back_B1, last_BE + step_BE, onward_BE)
        next_BE = np.where(enough_B1, best_BE, clipped(moved_BE))
        step_BE = np.where(go_back_B1, step_BE, fresh_BE)
        last_BE = np.where(go_back_B1, last_BE, prices_BE)
        prices_BE = np.where(active_B[:, None], next_BE, prices_BE)
        was_short_B = (2 * np.abs(step_BE) >= window_BE).any(1)
        window_BE = _next_window(step_BE, window_BE)
    return Descent(prices_BE, load_BE, window_BE, passes)


def _exceeds(now_B: np.ndarray, ratio: tuple[int, int], before_B: np.ndarray) -> BoolArray:
    """Return whether a number of units is more than a ratio of what it was, exactly."""
    above, below = ratio
    return np.asarray(below * now_B > above * before_B)


def _next_window(step_BE: IntArray, window_BE: IntArray) -> IntArray:
    """Return how far prices may be off after a step: each expert's own one, and all experts'."""
    size_BE = np.abs(step_BE)
    next_BE = (
        _WINDOW_OWN * size_BE + _WINDOW_MEAN * (size_BE.sum(1) // size_BE.shape[1])[:, None] + 4
    )
    # The step ended at the edge of the window: it was too small.
    next_BE = np.where(2 * size_BE >= window_BE, 8 * window_BE, next_BE)
    return np.minimum(next_BE, _EVERYTHING)


def _fills(
    backend: Any,
    exchange: Exchange,
    problem: Problem,
    b: int,
    allowance: float,
    prices_BE: IntArray,
    threshold_N: IntArray,
    load_BE: IntArray,
    x_NE: BoolArray,
) -> bool:
    """Make a problem feasible if that costs no more than the allowance; else change nothing."""
    rows = slice(int(problem.start_B[b]), int(problem.start_B[b + 1]))
    x_before, load_before = x_NE[rows].copy(), load_BE[b].copy()
    loss = backend.fill(problem, b, prices_BE, threshold_N, load_BE, x_NE, exchange)
    idle_E = problem.capacity_BE[b] - load_BE[b]
    rent = sum(
        price * idle for price, idle in zip(prices_BE[b].tolist(), idle_E.tolist(), strict=True)
    )
    if loss + rent <= allowance:
        return True
    x_NE[rows], load_BE[b] = x_before, load_before
    return False
