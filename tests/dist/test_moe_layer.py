"""The MoE layer on several ranks: round trip, reference, collectives, agreement."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_maxscore.moe import MaxScoreConfig
from tests.dist import cases, feature_cases
from tests.dist.pool import Pool, RankError
from tools.benchmarks.oracles import highs_objective

LAYOUTS = [
    (2, dict(ep=2)),
    (4, dict(ep=4)),
    (4, dict(tp=2, ep=2, etp=1)),
    (4, dict(tp=2, ep=2, etp=2)),
    (4, dict(tp=4, ep=2, etp=1)),
]


# Megatron's own, behind our router.
ALLGATHER = dict(moe_token_dispatcher_type="allgather")


def total_loads(results, experts=cases.EXPERTS):
    loads = [0] * experts
    for result in results:
        if result["etp_rank"] == 0:
            for offset, load in enumerate(result["loads"]):
                loads[result["first"] + offset] += load
    return loads


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
@pytest.mark.parametrize("num_tokens", [24, 21])  # 21 * 2 is not divisible by 8 experts
def test_round_trip_restores_input_and_gradient(ranks, size, layout, num_tokens):
    results = ranks(size, cases.round_trip, num_tokens=num_tokens, shape=(num_tokens, 1), **layout)
    for result in results:
        assert result["static"] and result["per_token"] == [cases.TOPK] * num_tokens
        assert max(result["own"]) - min(result["own"]) <= 1, "a rank's own loads are its quotas"
    loads = total_loads(results)
    assert sum(loads) == size * num_tokens * cases.TOPK, "nothing is dropped"
    shares = size // (layout["ep"] * layout.get("etp", 1))
    assert max(loads) - min(loads) <= shares, "remainders rotate over the ranks of a group"


@pytest.mark.parametrize(("size", "layout"), LAYOUTS[:4])
@pytest.mark.parametrize("kind", ["evaluation", "slack", "undeclared"])
def test_round_trip_where_loads_are_not_static(ranks, size, layout, kind):
    settings = dict(layout)
    if kind == "evaluation":
        settings["training"] = False
    elif kind == "slack":
        settings["options"] = MaxScoreConfig(capacity_factor=1.5)
    if kind != "undeclared":
        settings["shape"] = (24, 1)
    results = ranks(size, cases.round_trip, num_tokens=24, **settings)
    assert not any(result["static"] for result in results)
    assert sum(total_loads(results)) == size * 24 * cases.TOPK
    if kind == "slack":
        assert max(max(result["own"]) for result in results) <= 9  # ceil(24 * 2 * 1.5 / 8)


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (2, dict(ep=2)),
        (4, dict(tp=2, ep=2, etp=1, num_tokens=21)),  # 42 assignments over 8 experts
        (4, dict(tp=2, ep=2, etp=2, num_tokens=21)),
        (4, dict(ep=4, options=MaxScoreConfig(gate="score"))),
        (4, dict(ep=4, moe_router_dtype="fp64")),
        (4, dict(tp=2, ep=2, etp=2, **ALLGATHER)),
        (4, dict(ep=4, options=MaxScoreConfig(scope="group"), **ALLGATHER)),
    ],
)
def test_layer_equals_a_loop_over_tokens(ranks, size, settings):
    totals = ranks(size, cases.layer_equals_reference, **settings)
    assert len(set(totals)) > 1, "inputs differ by rank"


@pytest.mark.parametrize(("size", "layout"), [(2, dict(ep=2)), (4, dict(tp=2, ep=2, etp=2))])
def test_collectives_are_stocks_minus_the_metadata_gather(ranks, size, layout):
    stock = ranks(size, cases.count_collectives, router="topk", **layout)
    ours = ranks(size, cases.count_collectives, **layout)
    for (stock_counts, stock_sync), (our_counts, our_sync) in zip(stock, ours, strict=True):
        assert stock_sync == "before_ep_alltoall" and our_sync == "no_sync"
        if layout.get("etp", 1) == 1:
            expected = dict(stock_counts)
            expected["all_gather"] -= 1
            assert our_counts == {name: n for name, n in expected.items() if n}
        else:
            # The gather over expert-tensor-parallel ranks is an equal one with known splits.
            assert our_counts["all_to_all_single"] <= stock_counts["all_to_all_single"]
            assert sum(our_counts.values()) < sum(stock_counts.values())
    slack = ranks(
        size, cases.count_collectives, options=MaxScoreConfig(capacity_factor=2.0), **layout
    )
    assert [counts for counts, _ in slack] == [counts for counts, _ in stock]


def test_prices_are_the_running_average_on_every_rank(ranks):
    histories = ranks(4, cases.prices_after_batches, tp=2, ep=2, etp=1)
    expected = torch.zeros(cases.EXPERTS)
    for batch in range(3):
        sums = sum(history[batch][0][0] for history in histories)
        count = sum(history[batch][0][1] for history in histories)
        assert count == 8
        mean = sums / count
        expected = mean if batch == 0 else 0.9 * expected + 0.1 * mean
        for history in histories:
            assert torch.equal(history[batch][1], histories[0][batch][1]), "replicas are equal"
            torch.testing.assert_close(history[batch][1], expected)


def test_bad_scores_raise_one_error_on_every_rank(ranks):
    messages = ranks(4, cases.bad_scores)
    assert len(set(messages)) == 1
    assert "iteration 6" in messages[0] and "layer 1 on rank 1: 3 tokens" in messages[0]


@pytest.mark.parametrize("scope", ["local", "group"])
@pytest.mark.parametrize("settings", [dict(how="full"), dict(how="selective")])
def test_recompute_reuses_the_assignment(ranks, settings, scope):
    options = MaxScoreConfig(scope=scope)
    plain = ranks(2, cases.recompute, how="none", ep=2, options=options, shape=(24, 1))
    extra = dict(options=options, shape=(24, 1))
    if settings["how"] == "selective":
        extra |= dict(recompute_granularity="selective", recompute_modules=["moe"])
    again = ranks(2, cases.recompute, ep=2, **settings, **extra)
    for a, b in zip(plain, again, strict=True):
        assert all(map(torch.equal, a["outputs"], b["outputs"]))
        assert all(map(torch.equal, a["grads"], b["grads"]))
        assert a["solves"] == b["solves"] == 2
        assert a["price_count"] == b["price_count"] == 2
        assert a["gathers"] == b["gathers"] == 0
        # Only the dispatch is repeated: the exchanges of the solve are not.
        assert a["solver_rounds"] == b["solver_rounds"] == (4 if scope == "group" else 0)


@pytest.mark.parametrize("scope", ["local", "group", "sequence"])
@pytest.mark.parametrize(
    ("size", "tp", "ep"), [(2, 2, 1), (2, 2, 2), (4, 2, 4), (4, 4, 2)], ids=lambda n: str(n)
)
def test_tensor_parallel_copies_agree_in_evaluation(ranks, scope, size, tp, ep):
    results = ranks(size, cases.same_experts_on_tensor_parallel_copies, scope=scope, tp=tp, ep=ep)
    for first in range(0, size, tp):
        for other in results[first : first + tp]:
            assert all(map(torch.equal, results[first], other))
    loads = sum(results[first][1].sum(0) for first in range(0, size, tp))
    assert loads.max() <= sum(16 * cases.TOPK // cases.EXPERTS for _ in range(0, size, tp))


@pytest.mark.parametrize(("size", "layout"), [*LAYOUTS, (2, dict(cp=2, ep=2))])
@pytest.mark.parametrize("scope", ["group", "sequence"])
def test_round_trip_in_scopes_across_ranks(ranks, size, layout, scope):
    options = MaxScoreConfig(scope=scope)
    # Token counts that differ between ranks are fine in scope group.
    ragged = scope == "group"
    results = ranks(size, cases.round_trip, options=options, ragged=ragged, **layout)
    tokens = sum(len(result["per_token"]) for result in results)
    loads = total_loads(results)
    assert sum(loads) == tokens * cases.TOPK, "nothing is dropped"
    if scope == "group" and layout["ep"] * layout.get("etp", 1) == size:
        assert max(loads) <= -(-tokens * cases.TOPK // cases.EXPERTS)


@pytest.mark.parametrize("scope", ["group", "sequence"])
@pytest.mark.parametrize(
    ("size", "layout", "shared"),
    [
        # The table of docs/routing.md: ranks that share a problem in scope group, and sequence.
        (4, dict(ep=4), ([[0, 1, 2, 3]], [[0], [1], [2], [3]])),
        (4, dict(ep=2), ([[0, 1], [2, 3]], [[0], [1], [2], [3]])),
        (4, dict(tp=2, ep=2, etp=1), ([[0, 1], [2, 3]], [[0, 1], [2, 3]])),
        (4, dict(tp=2, ep=2, etp=2), ([[0, 1, 2, 3]], [[0, 1], [2, 3]])),
        (4, dict(tp=4, ep=2, etp=1), ([[0, 1], [2, 3]], [[0, 1, 2, 3]])),
        (4, dict(cp=2, ep=4), ([[0, 1, 2, 3]], [[0, 1], [2, 3]])),
        (4, dict(tp=2, cp=2, ep=4, etp=1), ([[0, 1, 2, 3]], [[0, 1, 2, 3]])),
    ],
)
def test_scopes_are_optimal_over_their_ranks(ranks, size, layout, shared, scope):
    results = ranks(size, cases.scope_problems, scope=scope, **layout)
    members = shared[scope == "sequence"]
    for rank, result in enumerate(results):
        assert result["ranks"] == next(m for m in members if rank in m)
    for member in members:
        logits = torch.cat([results[rank]["logits"] for rank in member]).double().numpy()
        chosen = torch.cat([results[rank]["chosen"] for rank in member]).numpy()
        batches = range(logits.shape[1]) if scope == "sequence" else [slice(None)]
        for b in batches:
            matrix = logits[:, b].reshape(-1, cases.EXPERTS)
            own = chosen[:, b].reshape(-1, cases.EXPERTS)
            capacity = -(-matrix.shape[0] * cases.TOPK // cases.EXPERTS)
            assert (own.sum(1) == cases.TOPK).all() and own.sum(0).max() <= capacity
            best = highs_objective(matrix, cases.TOPK, np.full(cases.EXPERTS, capacity))
            assert matrix[own].sum() == pytest.approx(best, rel=1e-6)
    for result in results:
        if result["loads"] is not None:
            for place, other in enumerate(result["tp_ep"]):
                counts = results[other]["chosen"].reshape(-1, cases.EXPERTS).sum(0)
                assert torch.equal(result["loads"][place], counts)
        # Loads are known wherever the ranks of the dispatch took part in the same solve.
        knows = set(result["tp_ep"]) <= set(result["ranks"]) and len(result["ranks"]) > 1
        assert (result["loads"] is not None) == knows
        assert result["static"] == (scope == "sequence" and len(result["ranks"]) == 1)


@pytest.mark.parametrize(
    ("size", "layout"),
    [(2, dict(ep=2)), (4, dict(tp=2, ep=2, etp=1)), (4, dict(tp=2, ep=2, etp=2))],
)
def test_scope_group_adds_the_rounds_of_its_solve(ranks, size, layout):
    stock = ranks(size, cases.count_collectives, router="topk", **layout)
    options = MaxScoreConfig(scope="group")
    ours = ranks(size, cases.count_with_rounds, options=options, **layout)
    for (stock_counts, _), (our_counts, sync, rounds) in zip(stock, ours, strict=True):
        assert sync == "no_sync" and len(rounds) == 1
        total = sum(stock_counts.values()) - 1 + rounds[0]
        if layout.get("etp", 1) == 1:
            assert sum(our_counts.values()) == total
        else:
            # With known splits the gathers over expert-tensor-parallel ranks may be equal ones.
            assert sum(our_counts.values()) <= total


@pytest.mark.parametrize("size", [2, 4])
def test_uneven_collectives_of_cpu_mode(ranks, size):
    for found, expected in ranks(size, cases.uneven_collectives):
        assert all(map(torch.equal, found, expected))


def test_pool_reports_errors_and_hangs():
    pool = Pool(2)
    with pytest.raises(RankError, match=r"rank 0 failed:[\s\S]*as intended"):
        pool.run(cases.raise_on_one_rank)
    assert pool.is_alive
    with pytest.raises(RankError) as caught:
        pool.run(cases.sleep_on_one_rank, timeout=3.0)
    text = str(caught.value)
    assert "rank 0 hung" in text and "rank 1 hung" in text and "sleep_on_one_rank" in text
    assert not pool.is_alive


@pytest.mark.parametrize("scope", ["local", "group"])
def test_permute_fusion_changes_nothing(ranks, scope):
    options = MaxScoreConfig(scope=scope)
    for without, fused in ranks(
        4, feature_cases.permute_fusion, tp=2, ep=2, etp=1, options=options
    ):
        for calls, is_fused in ((without[2], False), (fused[2], True)):
            assert {name for name, _ in calls} >= {"permute", "unpermute"}
            assert {asked for _, asked in calls} == {is_fused}
        assert torch.equal(without[0], fused[0]) and torch.equal(without[1], fused[1])


@pytest.mark.parametrize("scope", ["local", "group"])
def test_upcycled_model_begins_as_the_dense_one(ranks, scope):
    """A dense model's weights make a MoE model of the same output, its gates summing to 1."""
    for (dense, moe), prices, solves in ranks(2, feature_cases.upcycling, scope=scope):
        torch.testing.assert_close(moe, dense, rtol=1e-5, atol=1e-5)
        assert not prices.any() and solves == 1
