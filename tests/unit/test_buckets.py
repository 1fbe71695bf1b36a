"""Histograms of bids against exact counting."""

from __future__ import annotations

import doctest

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_maxscore.flow import buckets


def test_example():
    assert doctest.testmod(buckets).failed == 0


@given(st.lists(st.integers(-(2**49), 2**49), min_size=1, max_size=40))
@settings(deadline=None)
def test_buckets_are_in_order_and_signs_do_not_mix(values):
    bids = np.array(sorted(values))
    index = buckets.bucket_of(bids)
    assert (np.diff(index) >= 0).all()
    assert ((index >= buckets.BUCKETS_PER_SIGN) == (bids > 0)).all()
    assert index.min() >= 0 and index.max() < buckets.NUM_BUCKETS


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.floats(0.1, 40))
@settings(max_examples=200, deadline=None)
def test_step_comes_close_to_the_exact_one(seed, capacity, bits):
    rng = np.random.default_rng(seed)
    bids = np.sort(np.rint(rng.standard_normal(60) * 2.0**bits).astype(np.int64))[::-1]
    counts = np.zeros((1, 1, buckets.NUM_BUCKETS), np.int32)
    np.add.at(counts, (0, 0, buckets.bucket_of(bids)), 1)
    step = int(buckets.price_step(counts, np.array([[capacity]]), np.array([[1 << 49]]))[0, 0])
    if capacity >= bids.size:
        assert step <= bids[-1], "all of them may stay"
        return
    # Anything from the (C+1)-th bid to below the C-th leaves exactly C positive; buckets are a
    # quarter of an octave wide.
    low, high = int(bids[capacity]), int(bids[capacity - 1])
    slack = 2 + 0.3 * max(abs(low), abs(high))
    assert low - slack <= step <= high + slack


def test_nothing_counted_moves_by_the_window():
    counts = np.zeros((1, 2, buckets.NUM_BUCKETS), np.int32)
    step = buckets.price_step(counts, np.array([[3, 0]]), np.array([[500, 500]]))
    assert step.tolist() == [[-500, -500]]
