"""The study's script that routes by average prices in training too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import torch
from megatron_maxscore import cpu
cpu.enable()
sys.path.insert(0, "tools")
import study_prices
from megatron_maxscore.moe.plan import plan_of
from tests.one_rank_layer import EXPERTS, HIDDEN, TOPK, build, tear_down

router = build("gloo").router.train()
hidden = torch.randn(64, 1, HIDDEN, dtype=torch.bfloat16)
prices = torch.linspace(-0.2, 0.2, EXPERTS)
router.expert_prices.copy_(prices)
probs, routing_map = router(hidden)
probs.sum().backward()
logits = router.gating(hidden).reshape(-1, EXPERTS).float()
for token, row in enumerate(logits.tolist()):
    order = sorted(range(EXPERTS), key=lambda e: row[e] - float(prices[e]), reverse=True)
    assert set(order[:TOPK]) == set(routing_map[token].nonzero().flatten().tolist()), token
loads = routing_map.sum(0)
assert loads.max() > 64 * TOPK / EXPERTS, "no capacity"
assert router.price_count == 1 and router.price_sum.abs().max() > 0, "prices of the flow"
plan = plan_of(routing_map)
assert plan.static is None and plan.loads_RE is None
tear_down()
print("routed by prices")
"""


def test_routes_by_prices_and_averages_those_of_the_flow():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.stdout.endswith("routed by prices\n"), result.stderr[-3000:]
