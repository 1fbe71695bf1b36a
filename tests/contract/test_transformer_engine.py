"""Transformer Engine's layers take our router, and are else as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import permute

from megatron_maxscore.moe.permutation import order_of, permute_known
from tools.maintenance import releases


@releases.on_every_release
def test_specs_keep_all_but_the_router(release):
    environment = {**os.environ, **releases.in_front(releases.wheel(release))}
    command = [sys.executable, "-W", "ignore", "-m", "tests.contract.te_probe"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for found in json.loads(done.stdout.splitlines()[-1]).values():
        assert found["has_te"] and found["is_ours"] and found["uses_te"], found
        assert found["changed"] == ["router"], found


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(1, 2, 1), (24, 8, 2), (50, 7, 3)])
def test_known_experts_are_permuted_as_megatron_permutes_a_map(tokens, experts, topk):
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, experts, generator=generator).topk(topk).indices
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, chosen, True)
    hidden = torch.randn(tokens, 5, generator=generator)
    gates = torch.rand(tokens, experts, generator=generator)
    results = []
    for ours in (True, False):
        leaves = [hidden.clone().requires_grad_(), gates.clone().requires_grad_()]
        if ours:
            permuted = permute_known(*leaves, order_of(chosen, leaves[1].shape[1]))
        else:
            permuted = permute(
                leaves[0], routing_map, probs=leaves[1], num_out_tokens=tokens * topk
            )[:3]
        weight = torch.arange(tokens * topk).float()
        (permuted[0].sum(1) * weight + permuted[1] * weight).sum().backward()
        results.append([*permuted, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
