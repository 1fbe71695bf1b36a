"""Router and dispatcher of one rank on a device, in scope local."""

from __future__ import annotations

import pytest
import torch

from tools.benchmarks.one_rank_layer import EXPERTS, HIDDEN, TOPK, build, routed, tear_down

TOKENS = 2048


@pytest.fixture(scope="module")
def layer():
    torch.cuda.set_device(0)
    yield build("nccl", TOKENS).cuda()
    tear_down()


def test_routing_and_dispatch_wait_for_nothing(layer, no_waits, monkeypatch):
    torch.cuda.set_sync_debug_mode("default")
    hidden = torch.randn(TOKENS, 1, HIDDEN, device="cuda", dtype=torch.bfloat16)
    routed(layer, hidden)
    torch.cuda.set_sync_debug_mode("error")
    # Also in later iterations, and with splits that go to the device for Megatron's fused permute.
    monkeypatch.setattr(layer.token_dispatcher, "permute_idx_device", torch.device("cuda"))
    for iteration in (1, 2, 3):
        monkeypatch.setattr(layer.router, "_iteration", lambda now=iteration: now)
        layer.token_dispatcher._known.clear()
        routed(layer, hidden)


def test_routing_and_dispatch_in_a_graph(layer):
    hidden = torch.randn(TOKENS, 1, HIDDEN, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        routed(layer, hidden)
        prices = layer.router.price_sum.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens, probs = routed(layer, hidden)
        for seed in range(3):
            torch.manual_seed(seed)
            hidden.copy_(torch.randn_like(hidden))
            graph.replay()
            layer.router.price_sum.copy_(prices)
            expected_tokens, expected_probs = routed(layer, hidden)
            assert torch.equal(tokens, expected_tokens) and torch.equal(probs, expected_probs)


def test_every_expert_gets_its_quota(layer):
    hidden = torch.randn(TOKENS, 1, HIDDEN, device="cuda", dtype=torch.bfloat16)
    _, routing_map = layer.router(hidden)
    assert (routing_map.sum(1) == TOPK).all()
    assert (routing_map.sum(0) == TOKENS * TOPK // EXPERTS).all()
