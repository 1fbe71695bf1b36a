"""The solver with both implementations, which must agree to the bit."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch

from megatron_maxscore.flow import backend, fused, plain, solve
from tests.oracles import check_assignment

KERNELS = {"numba": fused, "torch": plain}
# Tokens, experts, k: below and above the size from which a cold start takes a sample.
SMALL, SAMPLED = (384, 12, 3), (4608, 32, 4)


@contextlib.contextmanager
def using(name):
    before = os.environ.get(backend.ENVIRONMENT)
    os.environ[backend.ENVIRONMENT] = name
    try:
        yield
    finally:
        os.environ.pop(backend.ENVIRONMENT)
        if before is not None:
            os.environ[backend.ENVIRONMENT] = before


def solve_with_both(*args, **kwargs):
    """Solve with numba and with torch, assert the same bits, return the solution."""
    solutions = []
    for name in KERNELS:
        with using(name):
            solutions.append(solve(*args, **kwargs))
    first, second = solutions
    for field in ("experts", "prices", "loads", "converged"):
        assert torch.equal(getattr(first, field), getattr(second, field)), field
    torch.testing.assert_close(first.objective, second.objective, rtol=1e-14, atol=0)
    torch.testing.assert_close(first.gap, second.gap, rtol=1e-6, atol=1e-15)
    return first


def check(work, solution):
    """Feasible by a plain loop; the objective is what the loop sums up; returns it."""
    total = check_assignment(
        solution.experts.numpy(), work.scores.double().numpy(), work.topk, work.capacity.numpy()
    )
    assert solution.objective.item() == pytest.approx(total, rel=1e-12)
    assert solution.loads.sum() == solution.experts.numel()
    return total
