"""Sizes of problems, and what holds of every solution."""

from __future__ import annotations

import pytest

from tools.benchmarks.oracles import check_assignment

# Tokens, experts, k: below and above the size from which a cold start takes a sample.
SMALL, SAMPLED = (384, 12, 3), (4608, 32, 4)


def check(work, solution):
    """Feasible by a plain loop; the objective is what the loop sums up; returns it."""
    total = check_assignment(
        solution.experts.numpy(), work.scores.double().numpy(), work.topk, work.capacity.numpy()
    )
    assert solution.objective.item() == pytest.approx(total, rel=1e-12)
    assert solution.loads.sum() == solution.experts.numel()
    return total
