"""The exact finish where its limits are tight, so that small problems go through many stages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_maxscore.flow import finish, passes, solve
from tests.dist.flow_cases import small_samples
from tools.benchmarks.oracles import check_assignment, ortools_objective
from tools.benchmarks.scale import solve_together
from tools.benchmarks.workloads import as_integers, workload


def draw(seed):
    """Return scores of a kind, k, capacities, warm prices, and tight settings of the finish."""
    rng = np.random.default_rng(seed)
    tokens, experts = int(rng.integers(1, 70)), int(rng.integers(2, 30))
    topk = int(rng.integers(1, experts))
    kind = rng.choice(["few values", "many values", "repeated", "scales"])
    scores = rng.integers(0, 5 if kind == "few values" else 1 << 20, (tokens, experts))
    if kind == "repeated":
        scores = scores[rng.integers(0, 4, tokens) % tokens]
    if kind == "scales":
        scores = np.floor(scores * np.exp(-3.0 * rng.random((tokens, 1)) ** 2))
    scores = scores.astype(np.float64)
    if rng.random() < 0.3:
        # Where k arcs of each row are not enough, no assignment may exist.
        is_forbidden = rng.random(scores.shape) < 0.8 * rng.random()
        allowed = rng.random(scores.shape).argsort(1)[:, :topk]
        np.put_along_axis(is_forbidden, allowed, False, 1)
        scores[is_forbidden] = -np.inf
    factor = rng.choice([1.0, 1.02, 1.25, 2.0])
    capacity = np.full(experts, min(tokens, -int(-tokens * topk * factor // experts)))
    prices = rng.standard_normal(experts) * rng.choice([1.0, 1e6]) if rng.random() < 0.5 else None
    tight = {
        "_ROWS_PER_EXPERT": 0,
        "_ROWS_PER_UNIT": int(rng.integers(8)),
        "_MIN_ROWS": 1,
        "_FEW_UNITS": int(rng.choice([0, 1000])),
        "_FEW_SWAPS": 0,
        "_SWAPS": int(rng.integers(1, 8)),
        "_SWAPS_PER_ASSIGNMENT": int(rng.integers(3)),
        "_SWAPS_PER_PAIR": 0,
        "_FARTHEST": int(rng.integers(1, 8)),
        "_GROUPS": int(rng.integers(1, 9)),
        "_THIN_LEFT": float(rng.choice([0.0, 0.25])),
        "_PAIRS_AT_ONCE": 1,
    }
    return scores, topk, capacity, prices, tight


def with_settings(tight, call):
    """Call with settings of the finish replaced."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in tight.items():
            patch.setattr(finish, name, value)
        return call()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_any_stages_lead_to_the_optimum(seed):
    scores, topk, capacity, prices, tight = draw(seed)
    warm = None if prices is None else torch.from_numpy(prices)
    best = ortools_objective(scores, topk, capacity)

    def run():
        return solve(torch.from_numpy(scores), topk, capacity=capacity, prices=warm)

    if best is None:
        with pytest.raises(ValueError, match="no assignment exists: forbidden arcs leave"):
            with_settings(tight, run)
        return
    solution = with_settings(tight, run)
    check_assignment(solution.experts.numpy(), scores, topk, capacity)
    assert solution.objective.item() == best and solution.gap.item() == 0.0


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_ranks_go_through_the_same_stages(seed):
    scores, topk, capacity, prices, tight = draw(seed)
    if ortools_objective(scores, topk, capacity) is None:
        return
    arguments = {"capacity": torch.from_numpy(capacity)}
    if prices is not None:
        arguments["prices"] = torch.from_numpy(prices)
    rows = torch.from_numpy(scores)
    cut = seed % (len(rows) + 1)
    parts = rows[:cut], rows[cut:cut], rows[cut:]

    def run():
        with small_samples():  # else every rank solves the whole of small problems
            alone = solve(rows, topk, **arguments)
            return alone, solve_together(3, lambda rank: parts[rank], topk, **arguments)[0]

    alone, solutions = with_settings(tight, run)
    assert torch.equal(torch.cat([part.experts for part in solutions]), alone.experts)
    assert torch.equal(solutions[0].prices, alone.prices)


def test_wishes_for_more_swaps_end():
    more = 1
    for _ in range(100):
        more = finish.more_wanted(more, np.eye(2, dtype=np.bool_))
    assert more.tolist() == [[1 << 20, 1], [1, 1 << 20]]


def test_problems_in_parts_are_solved_as_together():
    generator = torch.Generator().manual_seed(3)
    scores = torch.softmax(6.0 * torch.randn(5, 300, 12, generator=generator), -1)
    together = solve(scores, 3)
    parts = with_settings({"_PAIRS_AT_ONCE": 2 * 12 * 12}, lambda: solve(scores, 3))
    assert torch.equal(parts.experts, together.experts)
    assert torch.equal(parts.prices, together.prices)


@pytest.mark.parametrize("tokens", [12, 400])
def test_many_units_that_no_expert_can_take(tokens):
    """However many they are, it is said, and nothing is tried for ever."""
    scores = torch.rand(tokens, 6, generator=torch.Generator().manual_seed(4))
    scores[:, 2:] = -torch.inf
    left = 2 * tokens - 2 * -(-2 * tokens // 6)
    with pytest.raises(ValueError, match=f"forbidden arcs leave {left} assignments"):
        solve(scores, 2)


def test_few_units_on_plateaus_need_few_rows(monkeypatch):
    tokens, experts, topk = 2048, 32, 4
    first, second = (workload("softmax at 1/90", tokens, experts, topk, batch=b) for b in (0, 1))
    scores = as_integers(first.scores)
    prices = solve(as_integers(second.scores), topk, capacity=second.capacity).prices
    arcs, plain = [], passes.augment

    def watched(found, *more):
        arcs.append(found.expert_A.size)
        return plain(found, *more)

    monkeypatch.setattr(passes, "augment", watched)
    solution = solve(scores, topk, capacity=first.capacity, prices=prices)
    best = ortools_objective(scores.numpy(), topk, first.capacity.numpy())
    assert solution.objective.item() == best
    # Nearly all scores of a row are tied.
    assert arcs and max(arcs) < tokens * experts / 4
