"""The solver over a process group: the same bits as alone, few and small exchanges."""

from __future__ import annotations

import pytest
import torch

from megatron_maxscore.flow import solve
from tests.dist import flow_cases as cases
from tests.dist.pool import Pool, RankError
from tools.benchmarks.oracles import ortools_objective
from tools.benchmarks.workloads import FAMILIES

# Tokens of all ranks, experts, k: where every rank gets all rows, and where rows stay apart.
SMALL, LARGE = (384, 12, 3), (4608, 32, 4)
DEGENERATE = {"31 tokens, softmax", "31 tokens, softmax, noise"}


def together(results):
    """Check that ranks agree; return the experts of all tokens and what is common."""
    first = results[0]
    for result in results:
        assert torch.equal(result["prices"], first["prices"])
        assert torch.equal(result["loads"], first["loads"])
        assert result["rounds"] == first["rounds"]
        assert result["objective"] == first["objective"] and result["gap"] == first["gap"]
    return torch.cat([result["experts"] for result in results]), first


def check_loads(results, experts):
    """Row r of the loads counts what rank r has."""
    for rank, result in enumerate(results):
        own = torch.bincount(result["experts"].ravel(), minlength=experts)
        assert torch.equal(result["loads"][rank], own)


@pytest.mark.parametrize(("size", "how"), [(2, "random"), (4, "some empty"), (8, "even")])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_as_alone(ranks, family, size, how):
    scores, capacity = cases.problem(family, *LARGE, integers=True)
    warm = cases.warm_prices(family, *LARGE) if how != "random" else None
    results = ranks(
        size, cases.solve_family, family=family, tokens=LARGE[0], experts=LARGE[1], topk=LARGE[2],
        how=how, integers=True, warm=warm is not None,
    )  # fmt: skip
    experts, found = together(results)
    alone = solve(scores, LARGE[2], capacity=capacity, prices=warm)
    assert torch.equal(experts, alone.experts)
    assert torch.equal(found["prices"], alone.prices)
    assert torch.equal(found["loads"].sum(0), alone.loads[0])
    assert found["gap"] == 0.0 and found["rounds"] <= (40 if family in DEGENERATE else 20)
    best = ortools_objective(scores.double().numpy(), LARGE[2], capacity.numpy())
    assert found["objective"] == best
    check_loads(results, LARGE[1])


@pytest.mark.parametrize("size", [2, 4])
def test_few_rows_are_solved_by_every_rank(ranks, size):
    for family in ("iid", "forbidden arcs", "40 repeated tokens"):
        scores, capacity = cases.problem(family, *SMALL, integers=False)
        results = ranks(
            size, cases.solve_family, family=family, tokens=SMALL[0], experts=SMALL[1],
            topk=SMALL[2], how="random",
        )  # fmt: skip
        experts, found = together(results)
        alone = solve(scores, SMALL[2], capacity=capacity)
        assert torch.equal(experts, alone.experts) and torch.equal(found["prices"], alone.prices)
        assert found["objective"] == pytest.approx(float(alone.objective), rel=1e-12)
        assert found["rounds"] == 2
        check_loads(results, SMALL[1])


@pytest.mark.parametrize("split_rows", [True, False], ids=["rows apart", "rows gathered"])
@pytest.mark.parametrize("size", [2, 4])
def test_random_instances(ranks, size, split_rows):
    """Batches, padding, slack, forbidden arcs, ranks without tokens, hostile prices."""
    count = 150
    everyone = ranks(
        size, cases.solve_random, first=1000 * size, count=count, split_rows=split_rows
    )
    infeasible = 0
    for index in range(count):
        scores, valid, arguments = cases.random_instance(1000 * size + index)
        results = [of_rank[index] for of_rank in everyone]
        if split_rows:
            with cases.small_samples():
                alone = cases.outcome(scores, valid, arguments)
        else:
            alone = cases.outcome(scores, valid, arguments)
        if isinstance(alone, str):
            infeasible += 1
            assert len(set(results)) == 1, "the same error on every rank"
            continue
        experts = torch.cat([result["experts"] for result in results], -2)
        assert torch.equal(experts, alone["experts"])
        for rank, result in enumerate(results):
            assert torch.equal(result["prices"], alone["prices"])
            assert torch.equal(result["objective"], results[0]["objective"])
            torch.testing.assert_close(result["objective"], alone["objective"])
            loads = result["loads"]
            assert torch.equal(loads.sum(-2), alone["loads"].sum(-2))
            is_batch = result["experts"].dim() == 3
            own = result["experts"] if is_batch else result["experts"][None]
            for b, counts in enumerate((loads if is_batch else loads[None])[:, rank]):
                seen = own[b][own[b] >= 0]
                assert torch.equal(counts, torch.bincount(seen, minlength=counts.numel()))
    assert 0 < infeasible < count // 2


@pytest.mark.parametrize(
    "family", ["iid", "skewed, sigma 1", "skewed, sigma 4", "sigmoid", "bf16-rounded"]
)
def test_exchanges_are_few_and_small(ranks, family):
    for warm in (False, True):
        results = ranks(
            4, cases.solve_family, family=family, tokens=4 * 8192, experts=64, topk=8, how="even",
            warm=warm,
        )  # fmt: skip
        _, found = together(results)
        assert found["gap"] <= 1e-9
        for result in results:
            assert result["rounds"] <= (8 if warm else 20)
            assert not warm or result["sent"] <= 105_000


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("topk", ["topk differs", "2 on rank 0", "3 on rank 1"]),
        ("capacity", ["capacity differs", "other values on rank 1"]),
        ("capacity_factor", ["capacity_factor differs", "1.5 on rank 0", "2.0 on rank 1"]),
        ("mode", ["mode='bounded' runs on a GPU", "on rank 1"]),
        ("prices", ["prices differs"]),
        ("fill_padding", ["fill_padding differs", "True on rank 1"]),
        ("dtype", ["dtype differs", "float32 on rank 0", "float64 on rank 1"]),
        ("number of experts", ["number of experts differs", "4 on rank 0", "3 on rank 1"]),
        ("number of problems", ["number of problems differs", "1 on rank 0", "2 on rank 1"]),
        ("bad argument", ["topk must lie between 1 and", "got 9", "on rank 1"]),
        ("nan", ["NaN or +inf in 1 tokens", "first in token 5", "on rank 1"]),
        ("few allowed", ["token 7 has 1 allowed experts", "topk=2", "on rank 1"]),
        ("too little capacity", ["capacities hold 12 assignments", "64 tokens", "need 128"]),
    ],
)
def test_one_error_on_every_rank(ranks, what, words):
    messages = ranks(4, cases.wrong_on_one_rank, what=what)
    assert len(set(messages)) == 1 and messages[0] is not None
    for word in words:
        assert word in messages[0]


def test_scores_near_the_ends_of_float64_on_one_rank(ranks):
    for results in ranks(2, cases.extreme_scales):
        assert len(results) == 5
        for exponents, together, alone in results:
            assert torch.equal(together, alone), exponents


@pytest.mark.parametrize("how", ["is stuck", "dies"])
def test_a_lost_rank_ends_the_others_with_the_phase(how):
    pool = Pool(3)
    try:
        results = pool.run(cases.lost_rank, how=how)
    except RankError as error:
        # The pool reports the dead rank, and that the others have answered.
        assert how == "dies" and str(error) == "rank 1 failed:\nthe process died"
        return
    finally:
        pool.close()
    assert how == "is stuck" and results[1] is None
    for rank in (0, 2):
        message, seconds = results[rank]
        assert "lost contact with another rank while exchanging arguments" in message
        assert f"round 1 of flow.solve, rank {rank} of 3" in message
        assert seconds < 10.0


@pytest.mark.parametrize("sizes", [[40, 24], [1, 63], [0, 64], [16, 16, 16, 16]])
def test_outliers_do_not_depend_on_the_split(ranks, sizes):
    results = ranks(len(sizes), cases.outliers_in_parts, sizes=sizes)
    for problem in range(2):
        assert sum(result[problem][1] for result in results) == 2
        for is_same, _, scaled, has_same_gap, has_same_prices in (r[problem] for r in results):
            assert is_same and scaled == 2 and has_same_gap and has_same_prices
