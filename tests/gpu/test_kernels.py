"""The kernels on a device: the CPU's bits, graphs, and no waits."""

from __future__ import annotations

import pytest
import torch

from megatron_maxscore.flow import solve
from megatron_maxscore.ops import soft_topk
from tools.workloads import FAMILIES, workload

ALLOWED = [family for family in FAMILIES if family != "forbidden arcs"]
SIZES = [(512, 16, 2), (8192, 64, 8), (4096, 256, 8), (1000, 100, 7), (2048, 512, 16)]


def assert_same(scores, topk, **arguments):
    expected = solve(scores, topk, mode="bounded", **arguments)
    moved = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    found = solve(scores.cuda(), topk, mode="bounded", **moved)
    for name in ("experts", "prices", "loads"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    for name in ("objective", "bound", "gap"):
        one, other = getattr(found, name).cpu(), getattr(expected, name)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("family", ALLOWED)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bounded_mode_has_the_same_bits(family, size):
    tokens, experts, topk = size
    work = workload(family, tokens, experts, topk)
    other = workload(family, tokens, experts, topk, batch=1)
    warm = solve(other.scores, topk, capacity=other.capacity).prices
    for prices in (None, warm):
        assert_same(work.scores, topk, capacity=work.capacity, prices=prices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    work = workload("skewed, sigma 1", 8192, 64, 8)
    assert_same(work.scores.to(dtype), 8)


def test_more_entries_than_32_bits_count():
    # 2**31 entries and some: offsets must be 64 bits wide.
    tokens, experts = 2**22 + 64, 512
    scores = torch.randn(tokens, experts, device="cuda", dtype=torch.bfloat16)
    found = solve(scores, 2, mode="bounded")
    assert found.gap < 1e-3
    capacity = -(-tokens * 2 // experts)
    assert int(found.loads.sum()) == 2 * tokens and int(found.loads.max()) <= capacity
    assert bool((found.experts[:, 0] != found.experts[:, 1]).all())


def test_a_solve_waits_for_nothing(no_waits):
    work = workload("iid", 8192, 64, 8)
    torch.cuda.set_sync_debug_mode("default")
    scores, prices = work.scores.cuda(), torch.zeros(64, device="cuda")
    solve(scores, 8, capacity=work.capacity, prices=prices, mode="bounded")
    torch.cuda.set_sync_debug_mode("error")
    solve(scores, 8, capacity=work.capacity, prices=prices, mode="bounded")


def test_a_graph_replays_a_solve_on_other_scores():
    first, second = (workload("skewed, sigma 1", 8192, 64, 8, batch=batch) for batch in (0, 1))
    scores, prices = first.scores.cuda(), torch.zeros(64, device="cuda")
    solve(scores, 8, capacity=first.capacity, prices=prices, mode="bounded")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = solve(scores, 8, capacity=first.capacity, prices=prices, mode="bounded")
    for work in (first, second, first):
        scores.copy_(work.scores)
        graph.replay()
        expected = solve(work.scores, 8, capacity=work.capacity, mode="bounded")
        assert torch.equal(found.experts.cpu(), expected.experts)
        assert torch.equal(found.prices.cpu(), expected.prices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "topk"), [(8, 2), (64, 8), (100, 7), (512, 16)])
def test_soft_topk_and_its_gradient(dtype, experts, topk):
    logits = torch.randn(4096, experts).to(dtype)
    grad = torch.randn(4096, experts).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        leaf = logits.detach().to(device, copy=True).requires_grad_()
        value = soft_topk(leaf, topk)
        value.backward(grad.to(device))
        results.append((value.detach().cpu(), leaf.grad.cpu()))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
