"""From hidden states to tokens in order of dispatch: what is launched, and that nothing waits."""

from __future__ import annotations

import itertools

import pytest
import torch

import megatron_maxscore.cpu
from megatron_maxscore.moe import router as router_module
from megatron_maxscore.moe.step import average_prices
from tests.kernels.our_kernels import count_as_a_device
from tests.kernels.watching import Watch
from tools.benchmarks.one_rank_layer import (
    EXPERTS,
    HIDDEN,
    TOPK,
    build,
    make_layer,
    routed,
    tear_down,
)

TOKENS = 96

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def layer():
    megatron_maxscore.cpu.enable()
    yield build("gloo", TOKENS, "bounded")
    tear_down()


@pytest.fixture
def as_on_a_device(monkeypatch):
    count_as_a_device(monkeypatch)


def test_routing_and_dispatch_wait_for_nothing(layer, as_on_a_device, monkeypatch):
    hidden = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16)
    routed(layer, hidden)
    with Watch().kernels(monkeypatch) as watch:
        tokens, _ = routed(layer, hidden)
    probs, routing_map = layer.router(hidden)
    loss = probs.sum()
    with Watch():
        loss.backward()
    assert watch.operations["solve_kernel"] == 1 and tokens.shape == (TOKENS * TOPK, HIDDEN)
    assert (routing_map.sum(0) == TOKENS * TOPK // EXPERTS).all()
    assert layer.router.statistics.solves == 1 == int(layer.router.price_count)
    assert layer.router.statistics.bad_tokens == 0
    assert torch.is_tensor(layer.router.statistics.largest_gap)


def counted(layer, monkeypatch):
    hidden = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16)
    routed(layer, hidden)
    with Watch().kernels(monkeypatch) as watch:
        routed(layer, hidden)
    return watch


def test_what_a_forward_pass_launches(layer, as_on_a_device, monkeypatch):
    layer.router.raises_bad_scores = True  # as in a training step
    ours = counted(layer, monkeypatch)
    layer.router.raises_bad_scores = False
    stock = counted(make_layer(is_ours=False), monkeypatch)
    # Megatron's permutation is among stock's, and ours among ours. Three of the tensors are the
    # solve's: its scratch, the assignment, and its results, which outlive the assignment.
    assert ours.by_whom["ours"].total() <= 6, ours.by_whom["ours"]
    assert ours.made["ours"] <= 9, ours.made
    assert stock.by_whom["ours"].total() == 0 < stock.by_whom["megatron"].total()


def test_groups_and_an_expert_bias_wait_for_nothing(layer, as_on_a_device, monkeypatch):
    limited = make_layer(
        tokens=TOKENS, mode="bounded", moe_router_num_groups=4, moe_router_group_topk=2,
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
    )  # fmt: skip
    inside = []
    find = limited.router._inside
    limited.router._inside = lambda *args: inside.append(find(*args)) or inside[-1]
    hidden = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16)
    routed(limited, hidden)
    with Watch().kernels(monkeypatch) as watch:
        routed(limited, hidden)
    # One solve for the groups, one for the experts.
    assert watch.operations["solve_kernel"] == 2
    _, routing_map = limited.router(hidden)
    assert (routing_map.sum(0) == TOKENS * TOPK // EXPERTS).all()
    groups = inside[-1].reshape(TOKENS, 4, -1)
    assert (groups.any(2) == groups.all(2)).all()
    # The engine may leave a few assignments less than optimal.
    assert (routing_map & ~inside[-1]).sum() <= 0.02 * TOKENS * TOPK
    assert groups.any(2).sum(0).tolist() == [TOKENS * 2 // 4] * 4


def test_a_router_without_prices_solves_again(as_on_a_device, monkeypatch):
    """As after a stock checkpoint: from the prices that it has found, until a batch has ended."""
    layer = make_layer(tokens=TOKENS, mode="bounded")
    layer.router.is_cold = True
    starts = []
    solve = layer.router.scope.solve

    def noting(scores, batch, topk, prices, *rest):
        plan, solution = solve(scores, batch, topk, prices, *rest)
        starts.append((prices.clone(), solution.prices.clone()))
        return plan, solution

    layer.router.scope.solve = noting
    hidden = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16)
    probs, _ = layer.router(hidden)
    assert len(starts) == router_module.COLD_SOLVES and not starts[0][0].any()
    for before, after in itertools.pairwise(starts):
        assert torch.equal(after[0], before[1])
    probs.sum().backward()
    assert layer.router.price_count == 1 and torch.equal(layer.router.price_sum, starts[-1][1])
    layer.router.end_batch(has_stepped=False)
    assert layer.router.is_cold, "a skipped step has left no prices"
    average_prices([layer.router])
    starts.clear()
    layer.router(hidden)
    assert len(starts) == 1 and torch.equal(starts[0][0], layer.router.prices)
    # A checkpoint with prices is a start, one without is none.
    saved = {name: value.clone() for name, value in layer.router.state_dict().items()}
    fresh = make_layer(tokens=TOKENS, mode="bounded").router
    fresh.load_state_dict(saved)
    assert not fresh.is_cold
    fresh.load_state_dict({"weight": saved["weight"]})
    assert fresh.is_cold


def test_parts_are_named_for_the_profiler(layer, as_on_a_device, monkeypatch):
    from megatron_maxscore.moe import ranges

    open_parts, seen = [], []
    monkeypatch.setattr(ranges, "nvtx_range_push", open_parts.append)
    monkeypatch.setattr(
        ranges, "nvtx_range_pop", lambda message: seen.append((open_parts.pop(), message))
    )
    routed(layer, torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16))
    assert open_parts == [] and all(pushed == popped for pushed, popped in seen)
    names = [name for name, _ in seen]
    assert names == [f"maxscore {part}" for part in ("scores", "solve", "gates", "dispatch")]
