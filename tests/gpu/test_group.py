"""Scope group on a device, which simulated ranks share."""

from __future__ import annotations

import torch

from tools.benchmarks.scale import solve_together

TOKENS, EXPERTS, TOPK, RANKS = (2048, 1024, 3000, 100), 64, 8, 4


def parts(batch):
    generator = torch.Generator("cuda").manual_seed(batch)
    lead = torch.Generator("cuda").manual_seed(7)
    return [
        torch.randn(count, EXPERTS, generator=generator, device="cuda")
        + torch.randn(EXPERTS, generator=lead, device="cuda")
        for count in TOKENS
    ]


def test_ranks_of_a_group():
    prices = None
    for batch in range(3):
        solutions, cluster, _ = solve_together(
            RANKS, parts(batch).__getitem__, TOPK, prices=prices, fill_padding=True
        )
        prices = solutions[0].prices
    loads = solutions[0].loads
    assert int(loads.sum(0).max()) <= -(-sum(TOKENS) * TOPK // EXPERTS)
    for rank, found in enumerate(solutions):
        assert torch.equal(found.experts.flatten().bincount(minlength=EXPERTS), loads[rank])
        assert torch.equal(found.loads, loads) and torch.equal(found.prices, prices)
        assert found.gap == solutions[0].gap <= 2e-4
    assert sum(sent for _, sent in cluster.rounds) < 3 * 64 * 1024
