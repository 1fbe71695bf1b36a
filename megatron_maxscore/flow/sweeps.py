"""A descent on the dual: price steps from counts of bids, until the overflow is small.

See :mod:`prices`, which reads rows and says where a descent begins.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_maxscore.flow.passes import price_step
from megatron_maxscore.flow.problem import BoolArray, IntArray, Problem

# Steps are long only where the overflow is at most this share of all units.
NEAR = 0.1
# By what factor successive steps are longer than plain ones. The last value is used from then on.
RELAXATION = (1.5, 1.75, 2.5, 1.5, 3.0, 1.5)
# The effect of a step that is this long is seen only after the next step.
VERY_LONG = 2.0
# A sweep that leaves more than this share of the overflow is not worth another.
STALLED = (4, 5)
EVERYTHING = 1 << 49
# How far a price may be off after a step: so many times its own step plus the mean of all steps.
WINDOW_OWN = 4
WINDOW_MEAN = 4
# Sweeps ignore slack of less than one in so many units.
LITTLE_SLACK = 100

# (B, E) int64 loads, and a function that returns the (B, E, U) counts of bids.
Reading = tuple[IntArray, Callable[[], np.ndarray]]


@dataclass
class Descent:
    """Where sweeps ended.

    Attributes:
        prices_BE: (B, E) int64.
        load_BE: (B, E) int64 at these prices.
    """

    prices_BE: IntArray
    load_BE: IntArray


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


def is_tight(problem: Problem) -> BoolArray:
    """Return (B,) bool, whether sweeps take the capacities as tight.

    Sweeps ignore very little slack, and let prices fall below 0. Otherwise the prices of unwanted
    experts would stay at 0, and those of all other experts would have to rise. Half a unit is
    ignored in any case, because a sample's capacities are not integers.
    """
    total_B, units_B = problem.capacity_BE.sum(1), problem.rows_B * problem.topk
    return np.asarray(LITTLE_SLACK * np.abs(total_B - units_B) < LITTLE_SLACK / 2 + units_B)


def _within_limits(prices_BE: IntArray, is_tight_B: BoolArray, score_bits: int) -> IntArray:
    """Keep prices where optimal ones can be found: >= 0 with slack, and not too far apart.

    Adding the same amount to all prices changes no choice. With slack it makes the bound worse, so
    the lowest price is brought to 0. An expert that only few rows may take may lack bids at any
    price, and its price would fall without end. It is kept within E - 1 ranges of the highest
    price, where optimal prices of problems without forbidden arcs lie.
    """
    widest = (prices_BE.shape[1] - 1) << score_bits
    low_BE: IntArray = np.maximum(prices_BE, prices_BE.max(1, keepdims=True) - widest)
    if is_tight_B.all():
        return low_BE
    positive_BE = np.maximum(low_BE, 0)
    positive_BE -= positive_BE.min(1, keepdims=True)
    return np.asarray(np.where(is_tight_B[:, None], low_BE, positive_BE))


def sweep(
    read: Callable[[IntArray, IntArray, BoolArray], Reading],
    problem: Problem,
    prices_BE: IntArray,
    window_BE: IntArray,
    active_B: BoolArray,
    max_passes: int,
    aim_B: np.ndarray,
    first: Reading | None = None,
) -> Descent:
    """Sweep until the overflow is at most ``aim_B``, no longer falls, or passes are up.

    The last call of ``read`` is made at the prices that are returned.

    Args:
        read: chooses at prices, in problems that are active; returns (B, E) int64 loads and a
            function that returns the (B, E, U) counts of bids within a window.
        problem: its capacities.
        prices_BE: (B, E) int64 to start from.
        window_BE: (B, E) int64, how far prices may be off.
        active_B: (B,) bool, problems to sweep.
        max_passes: calls of ``read`` at most.
        aim_B: (B,) units of overflow at which to stop.
        first: what ``read`` has returned for these prices, if it was called already.
    """
    num_problems = problem.num_problems
    is_tight_B = is_tight(problem)
    units_B = problem.rows_B * problem.topk
    near_B = NEAR * units_B
    load_BE = np.zeros(prices_BE.shape, np.int64)
    best_BE = last_BE = prices_BE
    best_B = np.full(num_problems, np.inf)
    step_BE = np.zeros_like(prices_BE)
    is_plain_B, was_long_B = np.zeros(num_problems, np.bool_), np.zeros(num_problems, np.bool_)
    was_short_B = np.zeros(num_problems, np.bool_)
    stalls_B = np.zeros(num_problems, np.int64)
    active_B = active_B.copy()
    relaxation_B, passes = np.ones(num_problems), 0

    def clipped(prices: np.ndarray) -> IntArray:
        return _within_limits(np.rint(prices).astype(np.int64), is_tight_B, problem.score_bits)

    while active_B.any():
        loads, count_bids = first or read(prices_BE, window_BE, active_B)
        first = None
        passes += 1
        load_BE = np.where(active_B[:, None], loads, load_BE)
        now_B = overflow(load_BE, prices_BE, problem, is_tight_B)
        is_best_B = now_B <= best_B
        is_near_B = now_B <= near_B
        # A long step that made things worse is taken back to its plain length.
        take_back_B = active_B & ~is_best_B & was_long_B
        is_plain_B |= take_back_B
        # Little progress does not count as long as windows limit steps, or after a very long step.
        says_B = active_B & is_near_B & ~was_short_B & (relaxation_B < VERY_LONG) & ~take_back_B
        stalls_B += says_B & (_exceeds(now_B, STALLED, best_B) | ~is_best_B)
        # The overflow is exactly as before: the rows form a plateau, which no price can divide.
        stalls_B += active_B & (now_B == best_B)
        best_BE = np.where((active_B & is_best_B)[:, None], prices_BE, best_BE)
        best_B = np.where(active_B & is_best_B, now_B, best_B)
        # One pass is kept in reserve, to read the best prices again if the latest are not the best.
        enough_B = (best_B <= aim_B) | (stalls_B >= 2) | (passes >= max_passes - 1)
        ends_B = active_B & enough_B & (is_best_B | (prices_BE == best_BE).all(1))
        active_B &= ~ends_B
        if not active_B.any():
            break
        fresh_BE = price_step(count_bids(), problem.capacity_BE, window_BE)
        relaxation = RELAXATION[min(passes, len(RELAXATION)) - 1]
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
    return Descent(prices_BE, load_BE)


def _exceeds(now_B: np.ndarray, ratio: tuple[int, int], before_B: np.ndarray) -> BoolArray:
    """Return whether a number of units is more than a ratio of what it was, exactly."""
    above, below = ratio
    return np.asarray(below * now_B > above * before_B)


def _next_window(step_BE: IntArray, window_BE: IntArray) -> IntArray:
    """Return how far prices may be off, from each expert's last step and the mean last step."""
    size_BE = np.abs(step_BE)
    next_BE = WINDOW_OWN * size_BE + WINDOW_MEAN * (size_BE.sum(1) // size_BE.shape[1])[:, None] + 4
    # The step ended at the edge of the window: it was too small.
    next_BE = np.where(2 * size_BE >= window_BE, 8 * window_BE, next_BE)
    return np.minimum(next_BE, EVERYTHING)
