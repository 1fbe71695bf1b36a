r"""The dual: sweeps that bring prices close to optimal.

The dual of the flow is

.. math::
    \min_{\beta} \sum_i \text{(sum of the k largest of } s_i - \beta) + \sum_j C_j \beta_j,
    \qquad \beta \ge 0 \text{ unless the capacities leave no slack}

A sweep sets each row's threshold midway between its k-th and (k+1)-th reduced score. A bid is a
reduced score minus this threshold. From counts of bids (:mod:`buckets`) the sweep computes, for
each expert, the price step that would leave C of its bids positive. When an expert's price moves,
a row's threshold follows half the way. Where many experts compete, a plain step therefore goes only
about half as far as it should. Steps are made 1.5 to 3 times as long, shorter and longer ones in
turn, until one of them raises the overflow. From then on they are plain.

If there are many rows, a cold start first sweeps over a sample of them. A warm start does so only
if its prices turn out to be worse than those of a sample. Sweeps need not reach the optimum:
:mod:`~megatron_maxscore.flow.finish` does, from any prices.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_maxscore.flow import passes
from megatron_maxscore.flow.buckets import ALL_BUCKETS, MANTISSA_BITS, NUM_LEVELS, WINDOW_BUCKETS
from megatron_maxscore.flow.exchange import Exchange
from megatron_maxscore.flow.problem import BoolArray, IntArray, Problem
from megatron_maxscore.flow.sample import sample_size, take_sample
from megatron_maxscore.flow.sweeps import EVERYTHING, Descent, Reading, is_tight, overflow, sweep

MAX_PASSES = 24
SAMPLE_PASSES = 10
# Overflow at which the finish is cheaper than another sweep: at least so many units per expert, or
# a share of all units. With many units it is _UNITS_BEYOND plus a smaller share, since the finish
# takes time for every unit.
_UNITS_PER_EXPERT = 0.75
_SHARE_OF_UNITS = 1 / 800
_SHARE_BEYOND = 1 / 1600
_UNITS_BEYOND = 64
# The finish runs on one thread and takes about E^2 steps for every second unit. It gets at most
# this number divided by E units.
_MOST_UNITS = 1 << 16
# Overflow of the sample at which its prices are as good as a sample can tell.
SAMPLE_AIM = 0.015
# If warm prices leave a larger share of overflow than this, prices of a sample are better.
LOST = 0.1
# Prices from a sample or an earlier solve are assumed to be off by less than the largest row range
# divided by 2 to this power.
_FIRST_WINDOW_BITS = 5
# If one row in _FINE has a gap more than _WINDOW_OCTAVES octaves below the first window, small
# price differences matter, and all buckets are counted.
_FINE, _WINDOW_OCTAVES = 8, 13


@dataclass
class PriceState:
    """Prices, and the assignment of every row's k best experts at them.

    Attributes:
        prices_BE: (B, E) int64, >= 0 unless the problem is tight.
        load_BE: (B, E) int64.
        gaps_BD: (B, D + 1) int64 counts of all ranks' gaps by their level.
        gap_N: (N,) int64 k-th less (k+1)-th reduced score.
        x_NE: (N, E) bool.
    """

    prices_BE: IntArray
    load_BE: IntArray
    gaps_BD: IntArray
    gap_N: IntArray
    x_NE: BoolArray

    def part(self, problem: Problem, first: int, last: int) -> PriceState:
        """Return the state of the problems ``first`` to before ``last``; nothing is copied."""
        start_B = problem.start_B[first : last + 1]
        rows = slice(int(start_B[0]), int(start_B[-1]))
        return PriceState(
            self.prices_BE[first:last], self.load_BE[first:last], self.gaps_BD[first:last],
            self.gap_N[rows], self.x_NE[rows],
        )  # fmt: skip


def improve(exchange: Exchange, problem: Problem, prices_BE: IntArray) -> PriceState:
    """Return prices with little overflow.

    Args:
        exchange: between the ranks that hold the rows; one round per pass, one for a sample.
        problem: the problems.
        prices_BE: (B, E) int64 >= 0 to start from.
    """
    size_B = sample_size(problem)
    units_B = problem.rows_B * problem.topk
    aim_B = np.array([aim_of(units, problem.num_experts) for units in units_B.tolist()])
    if (size_B == problem.rows_B).any():
        # Some problem is too small for a sample, so nothing is known of how far prices are off.
        num_buckets, window_BE = ALL_BUCKETS, np.full_like(prices_BE, EVERYTHING)
    else:
        num_buckets = WINDOW_BUCKETS
        window_BE = np.full_like(prices_BE, 1 << (problem.score_bits - _FIRST_WINDOW_BITS))
    rows = _Choices(exchange, problem, num_buckets)
    can_sample_B = size_B < problem.rows_B
    wants_B = can_sample_B & (prices_BE == prices_BE[:, :1]).all(1)
    first = None
    if can_sample_B.any() and not wants_B.any():
        first = rows.read(prices_BE, window_BE, problem.rows_B > 0)
        overflow_B = overflow(first[0], prices_BE, problem, is_tight(problem))
        wants_B = can_sample_B & (overflow_B > LOST * units_B)
    if wants_B.any():
        first = None
        sample = take_sample(exchange, problem, np.where(wants_B, size_B, 0))
        sampled = _Choices(Exchange(), sample, ALL_BUCKETS)
        everything_BE = np.full_like(prices_BE, EVERYTHING)
        aim_of_sample_B = SAMPLE_AIM * sample.rows_B * sample.topk

        def of_sample() -> tuple[IntArray, bool]:
            found = sampled.sweep(prices_BE, everything_BE, SAMPLE_PASSES, aim_of_sample_B)
            return found.prices_BE, _are_fine(sampled.gaps_BD, problem.score_bits)

        prices_BE, are_fine = exchange.same(of_sample)
        if are_fine:
            rows.num_buckets = ALL_BUCKETS
    found = rows.sweep(prices_BE, window_BE, MAX_PASSES + (first is not None), aim_B, first)
    # With a little slack the lowest price may have any value. Subtracting it changes no choice.
    level_B = np.where(problem.tight_B, 0, found.prices_BE.min(1))
    prices_BE = found.prices_BE - level_B[:, None]
    return PriceState(prices_BE, found.load_BE, rows.gaps_BD, rows.gap_N, rows.x_NE)


def aim_of(units: int, num_experts: int) -> float:
    """Return the overflow of so many units at which sweeps end."""
    aim = min(_SHARE_OF_UNITS * units, _UNITS_BEYOND + _SHARE_BEYOND * units)
    return max(min(aim, _MOST_UNITS / num_experts), _UNITS_PER_EXPERT * num_experts)


def _are_fine(gaps_BD: IntArray, score_bits: int) -> bool:
    """Return whether many rows have gaps that the buckets of the first window do not tell apart."""
    level = (score_bits - _FIRST_WINDOW_BITS - _WINDOW_OCTAVES) << MANTISSA_BITS
    return bool((_FINE * gaps_BD[:, :level].sum(1) > gaps_BD.sum(1)).any())


class _Choices:
    """What all rows choose, pass by pass."""

    def __init__(self, exchange: Exchange, problem: Problem, num_buckets: int) -> None:
        rows = problem.scores_NE.shape[0]
        self.exchange, self.problem = exchange, problem
        self.num_buckets = num_buckets
        self.threshold_N, self.gap_N = np.zeros(rows, np.int64), np.empty(rows, np.int64)
        self.gaps_BD = np.zeros((problem.num_problems, NUM_LEVELS + 1), np.int64)
        self.x_NE = np.empty(problem.scores_NE.shape, np.bool_)
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
            self.problem,
            prices_BE,
            window_BE,
            self.problem.rows_B > 0,
            max_passes,
            aim_B,
            first,
        )

    def read(self, prices_BE: IntArray, window_BE: IntArray, active_B: BoolArray) -> Reading:
        loads_BE, gaps_BD, count_bids = passes.price_pass(
            self.problem, prices_BE, window_BE, self.num_buckets,
            active_B, self.threshold_N, self._knows_threshold, self.gap_N, self.x_NE,
        )  # fmt: skip
        self._knows_threshold = True
        if self.exchange.size > 1:
            most = int(self.problem.rows_B.max()) + 1
            loads_BE, gaps_BD, bids_BEU = self.exchange.sum(
                [loads_BE, gaps_BD, count_bids()], below=most, phase="counts of bids"
            )
            count_bids = lambda: bids_BEU  # noqa: E731
        self.gaps_BD = np.where(active_B[:, None], gaps_BD, self.gaps_BD)
        if self.num_buckets < ALL_BUCKETS and _are_fine(gaps_BD, self.problem.score_bits):
            self.num_buckets = ALL_BUCKETS
        return loads_BE, count_bids
