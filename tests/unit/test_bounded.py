"""Bounded mode: feasible, certified, and the rounds in which it ends."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_maxscore.flow import fused, rounds, solve
from tests.both_solvers import SAMPLED, SMALL, check, solve_with_both, using
from tests.draws import unequal_capacities
from tests.oracles import check_assignment, ortools_objective
from tools.workloads import FAMILIES, workload


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "forbidden arcs"])
@pytest.mark.parametrize("slack", [0, 5])
def test_bounded_mode_is_feasible_and_certified(family, slack, passes):
    work = workload(family, *SAMPLED)
    capacity = work.capacity.clone()
    capacity[:slack] += 1
    work = dataclasses.replace(work, capacity=capacity)
    exact = solve(work.scores, work.topk, capacity=work.capacity)
    for prices in (None, exact.prices, 1e6 * torch.randn(SAMPLED[1])):
        passes.clear()
        solution = solve_with_both(
            work.scores, work.topk, capacity=work.capacity, prices=prices, mode="bounded"
        )
        # For each implementation: sweeps over the scores, and over a sample.
        assert len(passes) <= 2 * (7 + 11)
        total = check(work, solution)
        some = 1e-9 * abs(exact.objective.item()) + 1e-9
        assert total <= exact.objective.item() + some
        assert exact.objective.item() <= solution.bound.item() + some
        assert solution.gap.item() <= (1e-2 if "repeated" in family or "hot, " in family else 1e-4)


def test_bounded_mode_ends_in_balance_where_equal_rows_stall_sweeps():
    # Groups of equal rows change sides together, so sweeps alone leave a tenth of the units over.
    work = workload("40 repeated tokens", 4096, 64, 4)
    solution = solve_with_both(work.scores, 4, capacity=work.capacity, mode="bounded")
    check(work, solution)
    assert solution.gap.item() <= 1e-2


def test_equally_cheap_rows_are_shared_out_among_arcs(monkeypatch):
    # Were they taken in order, each round over all rows would move a few units: 155 rounds here.
    calls = []
    cheapest = fused.cheapest
    monkeypatch.setattr(fused, "cheapest", lambda *a: (calls.append(1), cheapest(*a)))
    work = workload("peaked softmax", 8192, 64, 8)
    other = workload("peaked softmax", 8192, 64, 8, batch=1)
    prices = solve(other.scores, 8, capacity=other.capacity, mode="bounded").prices
    with using("numba"):
        solution = solve(work.scores, 8, capacity=work.capacity, prices=prices, mode="bounded")
    check(work, solution)
    assert 0 < len(calls) <= 50
    # Many units move among contested rows, which costs little, before all rows are looked at.
    calls.clear()
    work = workload("peaked softmax", 16384, 64, 8)
    check(work, solve(work.scores, 8, capacity=work.capacity, mode="bounded"))
    assert not calls


def test_bounded_mode_refuses_forbidden_arcs():
    work = workload("forbidden arcs", *SMALL)
    with pytest.raises(ValueError, match="forbid arcs"):
        solve(work.scores, work.topk, capacity=work.capacity, mode="bounded")


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_bounded_mode_is_feasible_on_any_capacities(seed):
    rng = np.random.default_rng(seed)
    num_experts = int(rng.integers(2, 9))
    topk = int(rng.integers(1, num_experts + 1))
    num_tokens = int(rng.integers(1, 30))
    scores = rng.integers(0, rng.choice([1, 3, 1000]), (num_tokens, num_experts)).astype(float)
    capacity = np.full(num_experts, num_tokens)
    while capacity.sum() > num_tokens * topk:
        expert = rng.integers(num_experts)
        capacity[expert] -= capacity[expert] > 0
    prices = torch.tensor(rng.choice([0.0, 1.0, 1e6]) * rng.standard_normal(num_experts))
    solution = solve_with_both(
        torch.tensor(scores), topk, capacity=torch.tensor(capacity), prices=prices, mode="bounded"
    )
    total = check_assignment(solution.experts.numpy(), scores, topk, capacity)
    assert total <= ortools_objective(scores, topk, capacity) <= solution.bound.item() + 1e-6


def test_a_problem_that_is_stuck_changes_no_other_of_its_batch(monkeypatch):
    # All moves in rounds over all rows, of several classes, in some of which there is no path.
    monkeypatch.setattr(rounds, "MAX_ROUNDS", 0)
    monkeypatch.setattr(rounds, "_UNITS_PER_CLASS", 1)
    generator = torch.Generator().manual_seed(1)
    for draw in range(200):
        batch = torch.randn(6, 12, 5, generator=generator)
        capacity = unequal_capacities(12, 5, 2, draw % 2, generator)
        together = solve(batch, 2, capacity=capacity, mode="bounded")
        for index in range(6):
            single = solve(batch[index], 2, capacity=capacity, mode="bounded")
            for field in ("experts", "prices", "loads"):
                assert torch.equal(getattr(together, field)[index], getattr(single, field)), field
