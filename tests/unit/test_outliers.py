"""One row with exploded scores must not cost the others theirs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_maxscore.flow import outliers, solve
from tools.benchmarks.oracles import highs_objective

SIZES = (1e3, 1e6, 1e9, 1e10, 1e12, 1e15, 1e20, 1e30, 1e37)


def lost(scores, base, topk, number):
    """Return the share of their best score that ordinary rows lose.

    They are compared with the optimum, by HiGHS, when the outliers' experts are given.
    """
    rows, experts = scores.shape
    solution = solve(scores, topk)
    assert solution.loads.sum(0).tolist() == [rows * topk // experts] * experts
    taken = np.bincount(solution.experts[:number].flatten().numpy(), minlength=experts)
    matrix = base[number:].double().numpy()
    best = highs_objective(matrix, topk, rows * topk // experts - taken)
    got = float(base[number:].double().gather(1, solution.experts[number:]).sum())
    return (best - got) / best, solution


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("number", [1, 12])
def test_ordinary_rows_are_served(size, number):
    torch.manual_seed(0)
    base = torch.randn(256, 8)
    scores = base.clone()
    scores[:number] *= size
    share, solution = lost(scores, base, 2, number)
    assert share < 1e-6
    if size != 1e6:  # may be either
        assert solution.scaled == (number if size > 1e6 else 0)
    # The outliers have their own best experts: nobody else's wish weighs as much.
    if number == 1:
        assert set(solution.experts[0].tolist()) == set(base[0].topk(2).indices.tolist())
    assert float(solution.gap) < 1e-9 and bool(solution.converged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e12, 1e30])
def test_the_certificate_is_that_of_the_scaled_scores(dtype, size):
    torch.manual_seed(1)
    scores = torch.randn(64, 8, dtype=dtype)
    scores[5] *= size
    solution = solve(scores, 2)
    assert solution.scaled == 1
    # The ordinary rows' ranges sum to about 64 * 3, the outlier's is at most 2 ** 23 times theirs.
    assert float(solution.bound) < 2.0**33
    assert float(solution.gap) >= 0


def test_a_few_rows_of_different_scale_are_left_alone():
    torch.manual_seed(2)
    scores = torch.randn(64, 8) * torch.logspace(-2, 2, 64)[:, None]
    solution = solve(scores, 2)
    assert solution.scaled == 0
    best = highs_objective(scores.double().numpy(), 2, np.full(8, 16))
    assert float(solution.objective) == pytest.approx(best, rel=1e-9)


@given(st.lists(st.floats(-140, 120), min_size=1, max_size=60))
def test_limits(exponents):
    """Few rows are outliers, far above the others, and keep their order."""
    range_N = np.exp2(np.array(exponents))
    start_B = np.array([0, range_N.size])
    classes_BX = outliers.classes(range_N, start_B).astype(np.int64)
    assert classes_BX.sum() == range_N.size
    limit_B, largest_B = outliers.limits(classes_BX, np.array([range_N.max()]))
    is_outlier_N = range_N > limit_B[0]
    assert is_outlier_N.sum() <= max(1, range_N.size // 16)
    if not is_outlier_N.any():
        assert largest_B[0] == range_N.max()
        return
    others = range_N[~is_outlier_N]
    # The largest row that cannot be an outlier is at most 22 bits below.
    following = np.sort(range_N)[::-1][max(1, range_N.size // 16)]
    assert 2.0**14 <= limit_B[0] / following <= 2.0**22
    scaled_O = outliers.scaled(range_N[is_outlier_N], limit_B[0])
    assert (scaled_O >= limit_B[0]).all() and (scaled_O < largest_B[0]).all()
    order = np.argsort(range_N[is_outlier_N])
    assert (np.diff(scaled_O[order]) >= 0).all() and scaled_O.min() >= others.max()
