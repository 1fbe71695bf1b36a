"""The solver against OR-tools, HiGHS and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_maxscore.flow import solve
from tools.benchmarks.oracles import check_assignment, highs_objective, ortools_objective


@st.composite
def instances(draw):
    """Small integer-valued problems: ties, repeated rows, forbidden arcs, uneven capacities."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    num_experts = draw(st.integers(1, 9))
    num_tokens = draw(st.integers(0, 24))
    topk = draw(st.integers(1, num_experts))
    scores = rng.integers(
        0, draw(st.sampled_from([1, 2, 4, 1000, 10**6])), (num_tokens, num_experts)
    )
    scores = scores.astype(np.float64) - draw(st.sampled_from([0, 3, 10**5]))
    if draw(st.booleans()) and num_tokens:
        scores = scores[rng.integers(0, draw(st.integers(1, num_tokens)), num_tokens)]
    if draw(st.integers(0, 3)) == 0:
        scores[rng.random(scores.shape) < 0.2] = -np.inf
    kind = draw(st.sampled_from(["tight", "loose", "uneven"]))
    even = -(-num_tokens * topk // num_experts)
    if kind == "uneven":
        capacity = rng.integers(0, num_tokens + 2, num_experts)
    else:
        capacity = np.full(num_experts, even + (kind == "loose"))
    warm = draw(st.sampled_from([None, 1.0, 1e6, 0.0]))
    prices = None if warm is None else torch.tensor(warm * rng.standard_normal(num_experts))
    return scores, topk, capacity, prices


@given(instances())
@settings(max_examples=1500, deadline=None)
def test_objective_equals_ortools_exactly(instance):
    scores, topk, capacity, prices = instance
    best = ortools_objective(scores, topk, capacity)
    arguments = dict(capacity=torch.tensor(capacity), prices=prices)
    if best is None:
        with pytest.raises(ValueError, match=r"capacit|allowed experts|no assignment"):
            solve(torch.tensor(scores), topk, **arguments)
        return
    solution = solve(torch.tensor(scores), topk, **arguments)
    assert check_assignment(solution.experts.numpy(), scores, topk, capacity) == best
    assert solution.objective.item() == best
    assert solution.gap.item() == 0.0
    assert solution.loads.sum().item() == scores.shape[0] * topk
    assert (solution.loads[0].numpy() <= capacity).all()


@pytest.mark.parametrize("family", ["iid", "skewed", "peaked", "bf16", "two_hot", "repeated"])
@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_float_scores_reach_the_linear_optimum(family, factor):
    rng = np.random.default_rng(5)
    z = torch.tensor(rng.standard_normal((300, 12)), dtype=torch.float32)
    if family == "skewed":
        z = z + 2 * torch.tensor(rng.standard_normal(12), dtype=torch.float32)
    elif family == "peaked":
        z = torch.softmax(8 * z, -1)
    elif family == "bf16":
        z = z.bfloat16()
    elif family == "two_hot":
        z = torch.softmax(200 * z, -1)
    elif family == "repeated":
        z = z[torch.arange(300) % 7]
    solution = solve(z, 3, capacity_factor=factor)
    capacity = np.full(12, math.ceil(300 * 3 * factor / 12))
    scores = z.double().numpy()
    total = check_assignment(solution.experts.numpy(), scores, 3, capacity)
    assert solution.gap.item() <= 1e-9
    # HiGHS stops at tolerances of its own, so it may end a little below the optimum.
    assert total == pytest.approx(highs_objective(scores, 3, capacity), rel=1e-8)
    assert solution.objective.item() == pytest.approx(total, rel=1e-12)
    assert solution.bound.item() >= solution.objective.item()


def test_warm_price_on_an_underfilled_expert_is_lowered():
    # Nobody is overfull at these prices, and yet the assignment they give is not optimal.
    solution = solve(torch.tensor([[1.0, 0.5]]), 1, capacity=1, prices=torch.tensor([0.8, 0.0]))
    assert solution.experts.tolist() == [[0]]
    assert solution.gap.item() == 0.0


def test_all_equal_scores_fill_every_expert():
    solution = solve(torch.zeros(96, 8), 2)
    assert solution.loads.tolist() == [[24] * 8]
    assert solution.objective.item() == 0.0 and solution.gap.item() == 0.0


def test_no_tokens():
    solution = solve(torch.zeros(0, 4), 2, prices=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert solution.experts.shape == (0, 2)
    assert solution.loads.tolist() == [[0, 0, 0, 0]]
    assert solution.objective.item() == 0.0 and solution.gap.item() == 0.0


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_padding_rows(fill, factor):
    scores = torch.randint(0, 50, (40, 6)).double()
    valid = torch.rand(40) > 0.3
    scores[~valid] = float("nan")  # what padding holds must not matter
    solution = solve(scores, 2, capacity_factor=factor, valid=valid, fill_padding=fill)
    counted = 40 if fill else int(valid.sum())
    capacity = np.full(6, math.ceil(counted * 2 * factor / 6))
    filled = torch.where(valid[:, None], scores, 0.0).numpy()
    if fill:
        check_assignment(solution.experts.numpy(), filled, 2, capacity)
        assert solution.objective.item() == ortools_objective(filled, 2, capacity)
        assert solution.loads.sum() == 80
    else:
        assert (solution.experts[~valid] == -1).all()
        own = scores[valid].numpy()
        check_assignment(solution.experts[valid].numpy(), own, 2, capacity)
        assert solution.objective.item() == ortools_objective(own, 2, capacity)


def test_batch_equals_separate_problems():
    scores = torch.randn(3, 64, 8)
    valid = torch.rand(3, 64) > 0.2
    batch = solve(scores, 2, valid=valid)
    for index in range(3):
        single = solve(scores[index], 2, valid=valid[index])
        assert torch.equal(batch.experts[index], single.experts)
        assert torch.equal(batch.prices[index], single.prices)
        assert batch.objective[index] == single.objective


def test_prices_are_normalised():
    assert solve(torch.randn(64, 8), 2).prices.mean().abs() < 1e-6
    assert solve(torch.randn(64, 8), 2, capacity_factor=1.25).prices.min() == 0.0


def test_prices_support_the_assignment():
    # Every token's experts are its k best by score minus price: the slackness the bound rests on.
    scores = torch.randn(128, 8).double()
    solution = solve(scores, 3)
    reduced = scores - solution.prices.double()
    chosen = reduced.gather(1, solution.experts).min(1).values
    others = reduced.scatter(1, solution.experts, -math.inf).max(1).values
    assert (chosen >= others - 1e-5).all()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_metamorphic(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 30, (32, 6)).astype(np.float64)
    capacity = np.full(6, 11)  # slack
    base = solve(torch.tensor(scores), 2, capacity=torch.tensor(capacity)).objective.item()

    def value(s, c=capacity):
        return solve(torch.tensor(s), 2, capacity=torch.tensor(c)).objective.item()

    order, names = rng.permutation(32), rng.permutation(6)
    assert value(scores[order]) == base
    assert value(scores[:, names]) == base
    shift = rng.integers(-9, 9, (32, 1))
    assert value(scores + shift) == base + 2 * shift.sum()
    tight = np.array([11, 11, 11, 11, 10, 10])
    bonus = rng.integers(-9, 9, 6)
    assert value(scores + bonus, tight) == value(scores, tight) + (bonus * tight).sum()
    more = capacity + rng.integers(0, 3, 6)
    assert value(scores, more) >= base


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_bound_is_the_dual_at_the_prices(factor):
    # min over prices of sum of the k largest of s - price, plus capacity times price; by loops.
    scores = torch.randn(60, 6).double()
    solution = solve(scores, 2, capacity_factor=factor)
    capacity, prices = math.ceil(60 * 2 * factor / 6), solution.prices.tolist()
    dual = capacity * sum(prices)
    for row in scores.tolist():
        dual += sum(sorted((s - p for s, p in zip(row, prices, strict=True)), reverse=True)[:2])
    assert solution.bound.item() == pytest.approx(dual, rel=1e-6)


def test_warm_and_cold_starts_agree():
    scores = torch.randn(256, 16)
    cold = solve(scores, 2)
    for prices in (
        cold.prices,
        solve(torch.randn(256, 16), 2).prices,
        torch.full((16,), 1e6),
        torch.linspace(-1e6, 1e6, 16),
    ):
        warm = solve(scores, 2, prices=prices)
        assert warm.gap.item() <= 1e-9
        assert warm.objective.item() == pytest.approx(cold.objective.item(), rel=1e-12)


def test_thread_count_does_not_matter():
    scores = torch.randn(2048, 32).bfloat16()
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            answers.append(solve(scores, 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(answers[0].experts, answers[1].experts)
    assert torch.equal(answers[0].prices, answers[1].prices)


def test_gap_is_not_flattered_by_offsets():
    scores = torch.randn(64, 8).double()
    shifted = scores + 1e6 * torch.randn(64, 1).double()
    solution = solve(shifted, 2)
    assert solution.gap.item() <= 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(topk=5), "topk must lie between 1 and the number of experts 4, got 5"),
        (dict(topk=0), "topk must lie between"),
        (dict(topk=2, capacity=1), "capacities hold 4 assignments but 6 tokens times topk=2"),
        (dict(topk=1, capacity=-1), "capacity must be at least 0"),
        (dict(topk=1, capacity=torch.ones(3)), r"capacity must be an int or \(4,\)"),
        (dict(topk=1, capacity_factor=0.0), "capacity_factor must be a positive number"),
        (dict(topk=1, capacity_factor=0.5), "raise capacity or capacity_factor"),
        (dict(topk=1, prices=torch.tensor([0.0, 1.0, math.inf, 0.0])), "prices must be finite"),
        (dict(topk=1, prices=torch.zeros(3)), r"prices must be \(4,\)"),
        (dict(topk=1, mode="greedy"), "mode must be one of auto, exact, bounded, got 'greedy'"),
        (dict(topk=1, valid=torch.ones(6)), r"valid must be \(6,\) bool"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve(torch.randn(6, 4), **arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_scores_are_named(bad):
    scores = torch.randn(6, 4)
    scores[3, 1] = bad
    with pytest.raises(ValueError, match="NaN or \\+inf in 1 tokens, first in token 3"):
        solve(scores, 1)


def test_row_with_too_few_experts_is_named():
    scores = torch.zeros(3, 4)
    scores[1, 1:] = -math.inf
    with pytest.raises(ValueError, match="token 1 has 1 allowed experts but needs topk=2"):
        solve(scores, 2)


def test_forbidden_arcs_without_assignment():
    # Two tokens may use only experts 0 and 1, which together have room for one of them.
    scores = torch.zeros(2, 3)
    scores[:, 2] = -math.inf
    with pytest.raises(ValueError, match="no assignment exists"):
        solve(scores, 1, capacity=torch.tensor([1, 0, 5]))


@pytest.mark.parametrize("num_experts,topk", [(1, 1), (2, 1), (64, 8), (300, 4)])
def test_quotas_that_do_not_divide(num_experts, topk):
    scores = torch.randn(101, num_experts)
    solution = solve(scores, topk)
    limit = math.ceil(101 * topk / num_experts)
    assert solution.loads.max() <= limit and solution.loads.sum() == 101 * topk
    assert solution.gap.item() <= 1e-9
