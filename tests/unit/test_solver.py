"""The solver on every family of the benchmark."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_maxscore.flow import buckets, passes, solve
from megatron_maxscore.flow.problem import Problem, shifts
from tests import reference
from tests.solving import SAMPLED, SMALL, check
from tools.benchmarks.oracles import check_assignment, highs_objective, ortools_objective
from tools.benchmarks.workloads import FAMILIES, as_integers, workload


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [SMALL, SAMPLED], ids=["small", "sampled"])
def test_optimum_on_every_family_cold_and_warm(family, size):
    work = workload(family, *size)
    integers = as_integers(work.scores)
    best = ortools_objective(integers.double().numpy(), work.topk, work.capacity.numpy())
    other = workload(family, *size, batch=1)
    warm = solve(other.scores, other.topk, capacity=other.capacity).prices
    for prices in (None, warm, 1e6 * torch.randn(size[1])):
        solution = solve(work.scores, work.topk, capacity=work.capacity, prices=prices)
        total = check(work, solution)
        assert 0.0 <= solution.gap.item() <= 1e-9 and bool(solution.converged)
        assert solution.bound.item() >= solution.objective.item()
        on_integers = solve(integers, work.topk, capacity=work.capacity, prices=prices)
        assert on_integers.objective.item() == best and on_integers.gap.item() == 0.0
    if size == SMALL and family != "forbidden arcs":
        scores = work.scores.double().numpy()
        linear = highs_objective(scores, work.topk, work.capacity.numpy())
        assert total == pytest.approx(linear, rel=1e-7)


@pytest.mark.parametrize("family", ["skewed, sigma 1", "40 repeated tokens"])
@pytest.mark.parametrize("slack", [1, 7])
def test_a_little_slack(family, slack):
    # So little that a sample's share of it is below one unit.
    work = workload(family, *SAMPLED)
    capacity = work.capacity.clone()
    capacity[:slack] += 1
    integers = as_integers(work.scores)
    best = ortools_objective(integers.double().numpy(), work.topk, capacity.numpy())
    for prices in (None, torch.randn(SAMPLED[1]) * 2**18):
        solution = solve(integers, work.topk, capacity=capacity, prices=prices)
        assert solution.objective.item() == best and solution.gap.item() == 0.0
        assert solution.prices.min() == 0.0
        assert (solution.loads[0] <= capacity).all()


@pytest.mark.parametrize("family", ["iid", "bf16-rounded", "40 repeated tokens", "all equal"])
def test_threads_change_no_bit(family):
    work = workload(family, *SAMPLED)
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(solve(work.scores, work.topk, capacity=work.capacity))
    finally:
        torch.set_num_threads(before)
    for other in answers[1:]:
        for field in ("experts", "prices", "objective", "gap"):
            assert torch.equal(getattr(answers[0], field), getattr(other, field)), field


def problem_of(scores, topk, capacity):
    """Return the Problem of one (T, E) array."""
    low = scores.min(1)
    largest = np.array([(scores.max(1) - low).max()])
    rows = np.array([0, scores.shape[0]])
    count = np.array([[scores.shape[0]]])
    return Problem(
        scores, rows, count, 0, topk, capacity[None], low, shifts(largest, scores.shape[1]), False
    )


def test_gap_of_a_worse_assignment():
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 100, (60, 6)).astype(np.float64)
    capacity = np.full(6, 20)
    best = solve(torch.tensor(scores), 2, capacity=20)
    prices = best.prices.double().numpy()[None]
    x = np.zeros(scores.shape, bool)
    x[np.arange(60), np.arange(60) % 6] = x[np.arange(60), (np.arange(60) + 1) % 6] = True
    experts, total, slack = passes.conclude(problem_of(scores, 2, capacity), prices, x)
    check_assignment(experts, scores, 2, capacity)
    assert total.sum() == scores[x].sum()
    # Duality: what the rows lose at the prices is what the assignment lacks to the optimum.
    optimum = ortools_objective(scores, 2, capacity)
    assert slack.sum() == pytest.approx(optimum - total.sum(), abs=1e-3) and slack.sum() > 100


@pytest.mark.parametrize("family", ["iid", "two-hot, underflow", "40 repeated tokens"])
def test_batch_equals_separate_problems(family, rows_read):
    batch = torch.stack([workload(family, 300, 16, 2, batch=b).scores for b in range(5)])
    valid = torch.rand(5, 300, generator=torch.Generator().manual_seed(1)) > 0.1
    valid[3] = False
    prices = torch.randn(5, 16)
    rows_read.clear()
    together = solve(batch, 2, valid=valid, prices=prices)
    in_batch = len(rows_read)
    rows_read.clear()
    for index in range(5):
        single = solve(batch[index], 2, valid=valid[index], prices=prices[index])
        for field in ("experts", "prices", "loads"):
            assert torch.equal(getattr(together, field)[index], getattr(single, field)), field
        assert together.objective[index] == single.objective
        assert together.gap[index] == single.gap
    assert in_batch < len(rows_read), "problems share their passes"


def test_large_batch_samples_each_problem():
    batch = torch.stack([workload("iid", 2560, 16, 2, batch=b).scores for b in range(3)])
    together = solve(batch, 2)
    for index in range(3):
        assert torch.equal(together.experts[index], solve(batch[index], 2).experts)


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e300, 1e308])
def test_scores_near_the_ends_of_float64(scale):
    grid = torch.randint(0, 9, (96, 8)).double()
    best = ortools_objective(grid.numpy(), 2, np.full(8, 24))
    solution = solve(grid * (scale / 16), 2)
    assert solution.objective.item() == pytest.approx(best * (scale / 16), rel=1e-9, abs=1e-322)
    assert solution.gap.item() <= 1e-9
    total = grid.gather(1, solution.experts).sum().item()
    assert total == pytest.approx(best, rel=0.01 if scale < 1e-310 else 0)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_price_pass_equals_a_loop(seed):
    rng = np.random.default_rng(seed)
    num_experts = int(rng.integers(2, 20))
    topk = int(rng.integers(1, num_experts))
    num_tokens = int(rng.integers(1, 20))
    scores = rng.integers(0, rng.choice([1, 3, 50]), (num_tokens, num_experts)).astype(float)
    problem = problem_of(scores, topk, np.full(num_experts, num_tokens))
    factor = int(problem.factor_B[0])
    prices = rng.integers(0, 3, (1, num_experts)) * factor
    q = (scores - scores.min(1)[:, None]).astype(np.int64) * factor - prices
    guess = rng.integers(-3 * factor, 3 * factor, num_tokens)
    window = rng.integers(1, 3 * factor, (1, num_experts))
    for knows in (False, True):
        threshold, gap = guess.copy(), np.empty(num_tokens, np.int64)
        x = np.empty(scores.shape, bool)
        load, gaps, count = passes.price_pass(
            problem,
            prices,
            window,
            buckets.ALL_BUCKETS,
            np.array([True]),
            threshold,
            knows,
            gap,
            x,
        )
        bids = count()
        for row in range(num_tokens):
            ranked = sorted(q[row].tolist(), reverse=True)
            assert gap[row] == ranked[topk - 1] - ranked[topk]
            assert threshold[row] == (ranked[topk - 1] + ranked[topk]) // 2
            # Ties at the k-th place in cyclic order from a start that moves with the row.
            start = (row * topk + row * topk // num_experts) % num_experts
            cyclic = sorted(
                range(num_experts), key=lambda e: (-q[row, e], (e - start) % num_experts)
            )
            assert set(np.flatnonzero(x[row])) == set(cyclic[:topk])
        assert (load[0] == x.sum(0)).all()
        levels = reference.gap_level_of(gap)
        assert (gaps[0] == np.bincount(levels, minlength=gaps.shape[1])).all()
        positive = (q - threshold[:, None] > 0).sum(0)
        half = bids.shape[-1] // 2
        assert (bids[0, :, half:].sum(-1) == positive).all()
        # Each expert counts bids within its own window, larger ones as equal to it.
        assert (bids[0].sum(-1) == (q - threshold[:, None] > -window).sum(0)).all()
        for expert, most in enumerate(reference.bucket_of(window[0])):
            assert not bids[0, expert, most + 1 :].any()


def test_score_precision_of_half_types():
    z = torch.randn(256, 8).bfloat16()
    assert torch.equal(solve(z, 2).experts, solve(z.float(), 2).experts)
    assert math.isclose(solve(z, 2).objective, solve(z.double(), 2).objective, rel_tol=1e-12)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("slack", [0, 1])
def test_an_expert_that_nobody_may_take(sampled, slack):
    # It gets no bid at any price; its price must not run away and drag the others along.
    tokens = 8193 if sampled else 301
    scores = torch.randn(tokens, 8) + torch.linspace(-1, 1, 8)
    scores[:, 3] = -math.inf
    scores = as_integers(scores)
    capacity = torch.full((8,), -(-tokens * 2 // 7))
    capacity[3] = 0
    capacity[0] -= int(capacity.sum()) - 2 * tokens - slack
    solution = solve(scores, 2, capacity=capacity)
    best = ortools_objective(scores.double().numpy(), 2, capacity.numpy())
    assert solution.objective.item() == best and solution.gap.item() == 0.0
    live = solution.prices[torch.arange(8) != 3]
    assert live.max() - live.min() < 8 * 2**20, "prices are of the size of the scores"
    assert solution.prices.abs().max() <= 16 * 2**20
    again = solve(scores, 2, capacity=capacity, prices=solution.prices)
    assert again.objective.item() == best


def test_an_expert_that_few_may_take():
    scores = torch.randn(4096, 4)
    scores[2:, 0] = -math.inf
    scores = as_integers(scores)
    capacity = torch.tensor([2, 1365, 1365, 1365])
    solution = solve(scores, 1, capacity=capacity)
    best = ortools_objective(scores.double().numpy(), 1, capacity.numpy())
    assert solution.objective.item() == best


@pytest.mark.parametrize(
    ("scores", "prices"),
    [
        ([[1.0, 1.0], [0.0, 1e-300], [0.0, 2e-300]], None),
        ([[0.0, 1e-310], [0.0, 2e-310]], [1.0, 1.0]),
        ([[0.0, 1e-310], [0.0, 2e-310]], [1.0, 3.0]),
        ([[0.0, 1e308], [-1e308, 1e308]], [-1e300, 1e300]),
    ],
)
def test_ranges_and_prices_of_extreme_sizes(scores, prices):
    scores = torch.tensor(scores, dtype=torch.float64)
    warm = None if prices is None else torch.tensor(prices, dtype=torch.float64)
    capacity = -(-scores.shape[0] // 2)
    solution = solve(scores, 1, capacity=capacity, prices=warm)
    check_assignment(solution.experts.numpy(), scores.numpy(), 1, np.full(2, capacity))
    assert solution.experts[-1].item() == 1, "the row with the larger gain"


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(120, 1500, 20), (60, 4096, 3)])
def test_many_experts(tokens, experts, topk):
    generator = torch.Generator().manual_seed(experts)
    scores = torch.randn(tokens, experts, generator=generator)
    scores += 2.0 * torch.randn(experts, generator=generator)
    capacity = torch.full((experts,), -(-tokens * topk // experts))
    integers = as_integers(scores)
    best = ortools_objective(integers.double().numpy(), topk, capacity.numpy())
    warm = torch.randn(experts, generator=generator)
    for prices in (None, warm):
        solution = solve(integers, topk, capacity=capacity, prices=prices)
        assert solution.objective.item() == best and solution.gap.item() == 0.0
        assert (solution.loads[0] <= capacity).all()
        on_floats = solve(scores, topk, capacity=capacity, prices=prices)
        assert on_floats.gap.item() <= 1e-9 and bool(on_floats.converged)


def test_limits_are_named():
    with pytest.raises(ValueError, match="at most 4096 experts, got 4097"):
        solve(torch.zeros(2, 4097), 1)
    with pytest.raises(ValueError, match=r"capacity must be an int or \(4,\) int64, got 2.5"):
        solve(torch.zeros(4, 4), 1, capacity=2.5)
