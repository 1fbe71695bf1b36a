"""Ranks of a group, simulated on one device: the whole problem's bits, and no wait."""

from __future__ import annotations

import pytest
import torch

from megatron_maxscore.flow import solve
from tests.simulated_rank import Simulated
from tools.workloads import workload


@pytest.mark.parametrize("family", ["iid", "skewed, sigma 4", "40 repeated tokens"])
def test_ranks_of_a_group(family, no_waits):
    torch.cuda.set_sync_debug_mode("default")
    work = workload(family, 4096, 64, 8)
    whole = solve(work.scores, 8, mode="bounded")
    parts = list(work.scores.cuda().split(1024))
    for rank in range(4):
        arguments = dict(
            mode="bounded", group=Simulated(parts, rank), equal_rows=True, fill_padding=True
        )
        solve(parts[rank], 8, **arguments)  # arguments are compared, kernels compiled
        torch.cuda.set_sync_debug_mode("error")
        found = solve(parts[rank], 8, **arguments)
        torch.cuda.set_sync_debug_mode("default")
        own = slice(1024 * rank, 1024 * rank + 1024)
        assert torch.equal(found.experts.cpu(), whole.experts[own])
        assert torch.equal(found.prices.cpu(), whole.prices)
        assert found.loads.shape == (4, 64) and (found.loads.sum(1) == 8192).all()
