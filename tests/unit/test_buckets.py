"""Histograms of bids against exact counting."""

from __future__ import annotations

import doctest

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_maxscore.flow import buckets, fused


def test_example():
    assert doctest.testmod(buckets).failed == 0


@given(st.lists(st.integers(-(2**49), 2**49), min_size=1, max_size=40))
@settings(deadline=None)
def test_buckets_are_in_order_and_signs_do_not_mix(values):
    bids = np.array(sorted(values))
    for num_buckets, base in ((buckets.ALL_BUCKETS, 0), (buckets.WINDOW_BUCKETS, 30)):
        index = buckets.bucket_of(bids, np.array(base), num_buckets)
        assert (np.diff(index) >= 0).all()
        assert ((index >= num_buckets // 2) == (bids > 0)).all()
        assert index.min() >= 0 and index.max() < num_buckets


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 60),
    st.floats(0.1, 40),
    st.sampled_from([buckets.ALL_BUCKETS, buckets.WINDOW_BUCKETS]),
)
@settings(max_examples=200, deadline=None)
def test_step_comes_close_to_the_exact_one(seed, capacity, bits, num_buckets):
    rng = np.random.default_rng(seed)
    bids = np.sort(np.rint(rng.standard_normal(60) * 2.0**bits).astype(np.int64))[::-1]
    window = np.array([[int(np.abs(bids).max()) + 1]])
    base = buckets.base_of(window, num_buckets)
    counts = np.zeros((1, 1, num_buckets), np.int32)
    np.add.at(counts, (0, 0, buckets.bucket_of(bids, base[0, 0], num_buckets)), 1)
    step = int(buckets.price_step(counts, np.array([[capacity]]), window)[0, 0])
    assert fused.price_step(counts, np.array([[capacity]]), window).tolist() == [[step]]
    # Buckets are a quarter of an octave wide, the innermost ones a thousandth of the window.
    innermost = float(window[0, 0]) / 2**9 if num_buckets == buckets.WINDOW_BUCKETS else 0.0
    if capacity >= bids.size:
        assert step <= max(bids[-1], 1), "all of them may stay"
        return
    # Anything from the (C+1)-th bid to below the C-th leaves exactly C positive.
    low, high = int(bids[capacity]), int(bids[capacity - 1])
    slack = 2 + 0.3 * max(abs(low), abs(high)) + innermost
    assert low - slack <= step <= high + slack


def test_nothing_counted_moves_by_the_window():
    counts = np.zeros((1, 2, buckets.ALL_BUCKETS), np.int32)
    step = buckets.price_step(counts, np.array([[3, 0]]), np.array([[500, 500]]))
    assert step.tolist() == [[-500, -500]]


@given(st.lists(st.integers(0, 2**52), min_size=1, max_size=40), st.data())
@settings(deadline=None)
def test_enough_rows_have_a_gap_within(gaps, data):
    rank = data.draw(st.integers(0, len(gaps) - 1))
    counts = np.bincount(buckets.gap_level_of(np.array(gaps)), minlength=buckets.NUM_LEVELS + 1)
    within = buckets.gap_within(counts, rank)
    exact = sorted(gaps)[rank]
    assert (within == 0) == (exact == 0)
    if exact < 2**49:
        assert exact <= within <= 1.26 * exact + 1
