"""Histograms of bids against exact counting."""

from __future__ import annotations

import doctest

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_maxscore.flow import buckets, passes
from tests import reference
from tools.benchmarks.oracles import bucket_of


def test_example():
    assert doctest.testmod(reference).failed == 0


def counted(bids, window, num_buckets):
    """Count bids of one expert that are above minus its window."""
    bids = bids[bids > -window]
    counts = np.bincount(reference.bucket_of(bids), minlength=buckets.ALL_BUCKETS)
    return reference.within_windows(counts[:, None], np.array([[window]]), num_buckets)


@given(
    st.lists(st.integers(-(2**49), 2**49), min_size=1, max_size=40),
    st.one_of(st.integers(1, 40), st.integers(1, 2**49)),
    st.sampled_from([buckets.ALL_BUCKETS, buckets.WINDOW_BUCKETS]),
)
@settings(deadline=None)
def test_counts_are_those_of_a_loop(values, window, num_buckets):
    # Sizes near the window and near 0 too.
    values = [*values, *(value % (2 * window) - window for value in values), window, 0, 1]
    expected = np.zeros(num_buckets, np.int64)
    for bid in values:
        if bid > -window:
            expected[bucket_of(bid, window, num_buckets)] += 1
    assert counted(np.array(values), window, num_buckets)[0, 0].tolist() == expected.tolist()


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
    counts = counted(bids, int(window[0, 0]), num_buckets)
    step = int(reference.price_step(counts, np.array([[capacity]]), window)[0, 0])
    assert passes.price_step(counts, np.array([[capacity]]), window).tolist() == [[step]]
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
    step = reference.price_step(counts, np.array([[3, 0]]), np.array([[500, 500]]))
    assert step.tolist() == [[-500, -500]]


@given(st.lists(st.integers(0, 2**52), min_size=1, max_size=40), st.data())
@settings(deadline=None)
def test_enough_rows_have_a_gap_within(gaps, data):
    rank = data.draw(st.integers(0, len(gaps) - 1))
    counts = np.bincount(reference.gap_level_of(np.array(gaps)), minlength=buckets.NUM_LEVELS + 1)
    within = buckets.gap_within(counts, rank)
    exact = sorted(gaps)[rank]
    assert (within == 0) == (exact == 0)
    if exact < 2**49:
        assert exact <= within <= 1.26 * exact + 1
