"""The kernels on a device: properties, the same bits on every way, graphs, and no waits."""

from __future__ import annotations

import pytest
import torch

from megatron_maxscore.flow import engine, solve
from megatron_maxscore.ops import soft_topk
from tools.benchmarks.workloads import FAMILIES, workload

ALLOWED = [family for family in FAMILIES if family != "forbidden arcs"]
DEGENERATE = ("peaked", "two-hot", "repeated", "clusters", "equal")
SIZES = [(512, 16, 2), (8192, 64, 8), (4096, 256, 8), (1000, 100, 7), (2048, 512, 16)]


def assert_sound(scores, topk, capacity, found):
    """Assert that a solution is feasible and its certificate that of the host."""
    experts, s = found.experts.cpu(), scores.double().cpu()
    x = torch.zeros_like(s).scatter_(1, experts, 1.0)
    capacity = capacity.cpu().clamp(max=len(s))
    assert (x.sum(1) == topk).all() and (x.sum(0) <= capacity).all()
    assert torch.equal(found.loads[0].cpu(), x.sum(0).long())
    prices = found.prices.cpu().double()
    r = s - prices
    slack = (r.topk(topk, 1).values.sum(1) - (r * x).sum(1)).sum()
    difference = float(slack + (prices * (capacity - x.sum(0))).sum())
    spans = float((s.amax(1) - s.amin(1)).sum())
    gap = difference / spans if spans else difference
    assert found.gap.item() == pytest.approx(gap, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("family", ALLOWED)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_families(family, size):
    tokens, experts, topk = size
    work = workload(family, tokens, experts, topk)
    other = workload(family, tokens, experts, topk, batch=1)
    warm = solve(other.scores.cuda(), topk, capacity=other.capacity).prices
    for prices in (None, warm):
        found = solve(work.scores.cuda(), topk, capacity=work.capacity, prices=prices)
        assert_sound(work.scores, topk, work.capacity, found)
        bar = 1e-2 if any(name in family for name in DEGENERATE) else 2e-4
        assert found.gap <= bar
        again = solve(work.scores.cuda(), topk, capacity=work.capacity, prices=prices)
        assert torch.equal(found.experts, again.experts)
        assert torch.equal(found.prices, again.prices)


@pytest.mark.parametrize("family", ["iid", "40 repeated tokens", "capacity factor 1.25"])
def test_same_bits_in_one_launch_and_phase_by_phase(family):
    work = workload(family, 4096, 64, 8)
    scores, capacity = work.scores.cuda()[None], work.capacity.cuda()
    assert engine.is_cooperative(scores.device)
    results = []
    for programs in (None, 128, 7, 1):
        made = engine.Solve(scores, 8, torch.zeros(64, device="cuda"), 0, programs)
        made.run(capacity)
        results.append((made.experts, made.results))
    made = engine.Solve(scores, 8, torch.zeros(64, device="cuda"))
    for phase in range(400):
        made.launch(phase, phase + 1, capacity)
    results.append((made.experts, made.results))
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


def test_a_hundred_thousand_random_problems():
    generator = torch.Generator("cuda").manual_seed(0)
    for number in range(100):
        experts = 2 + number % 15
        topk, tokens = 1 + number % (experts - 1), 1 + number % 40
        kinds = (1, 3, 1000)[number % 3]
        shape = (1000, tokens, experts)
        scores = torch.randint(kinds, shape, generator=generator, device="cuda").float()
        factor = (1.0, 1.02, 1.25)[number % 3]
        prices = (0.0, 1.0, 1e6)[number // 3 % 3] * torch.randn(1000, experts, device="cuda")
        found = solve(scores, topk, capacity_factor=factor, prices=prices)
        capacity = min(tokens, int(-(-tokens * topk * factor // experts)))
        x = torch.zeros_like(scores).scatter_(2, found.experts, 1.0)
        assert (x.sum(2) == topk).all() and (x.sum(1) <= capacity).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    work = workload("skewed, sigma 1", 8192, 64, 8)
    scores = work.scores.to(dtype)
    found, same = solve(scores.cuda(), 8), solve(scores.float().cuda(), 8)
    assert torch.equal(found.experts, same.experts)
    assert_sound(scores, 8, work.capacity, found)


def test_more_entries_than_32_bits_count():
    # 2**31 entries and some: offsets must be 64 bits wide.
    tokens, experts = 2**21 - 64, 1024
    scores = torch.randn(tokens, experts, device="cuda", dtype=torch.bfloat16)
    found = solve(scores, 2)
    capacity = -(-tokens * 2 // experts)
    assert int(found.loads.sum()) == 2 * tokens and int(found.loads.max()) <= capacity
    assert bool((found.experts[:, 0] != found.experts[:, 1]).all())


def test_a_solve_waits_for_nothing(no_waits):
    work = workload("iid", 8192, 64, 8)
    torch.cuda.set_sync_debug_mode("default")
    scores, prices = work.scores.cuda(), torch.zeros(64, device="cuda")
    solve(scores, 8, capacity=work.capacity, prices=prices)
    torch.cuda.set_sync_debug_mode("error")
    solve(scores, 8, capacity=work.capacity, prices=prices)


def test_a_graph_replays_a_solve_on_other_scores():
    first, second = (workload("skewed, sigma 1", 8192, 64, 8, batch=batch) for batch in (0, 1))
    scores, prices = first.scores.cuda(), torch.zeros(64, device="cuda")
    solve(scores, 8, capacity=first.capacity, prices=prices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = solve(scores, 8, capacity=first.capacity, prices=prices)
    for work in (first, second, first):
        scores.copy_(work.scores)
        graph.replay()
        expected = solve(work.scores.cuda(), 8, capacity=work.capacity)
        assert torch.equal(found.experts, expected.experts)
        assert torch.equal(found.prices, expected.prices)


def test_beside_a_kernel_that_keeps_multiprocessors_busy():
    # A launch whose programs wait for each other must not start before all of them can run.
    work = workload("iid", 8192, 64, 8)
    scores = work.scores.cuda()
    expected = solve(scores, 8, capacity=work.capacity)
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        torch.cuda._sleep(100_000_000)
    found = solve(scores, 8, capacity=work.capacity)
    torch.cuda.synchronize()
    assert torch.equal(found.experts, expected.experts)


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
