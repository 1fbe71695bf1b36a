"""Scope group on the engine, over real ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_maxscore.flow.rank_quotas import quotas_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "ranks", [2, *(pytest.param(ranks, marks=pytest.mark.full) for ranks in (4, 8))]
)
def test_ranks_solve_one_problem(ranks):
    command = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}"
    command += " -m tests.kernels.group_probe"
    result = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0 and "OK" in result.stdout, result.stderr[-4000:]


@pytest.mark.parametrize("seed", range(200))
def test_quotas_can_be_kept(seed):
    generator = torch.Generator().manual_seed(seed)
    ranks, experts = (int(torch.randint(low, 9, (), generator=generator)) for low in (1, 2))
    topk = int(torch.randint(1, experts, (), generator=generator))
    rows_R = torch.randint(0, 12, (ranks,), generator=generator)
    # Ranks whose rows all want the same few experts leave no room near their loads.
    scores = [
        torch.rand(int(rows), experts, generator=generator)
        + 3.0 * torch.rand(experts, generator=generator)
        for rows in rows_R
    ]
    loads_RE = torch.stack(
        [s.topk(topk, 1).indices.flatten().bincount(minlength=experts) for s in scores]
    )
    rows, capacity_E = int(rows_R.sum()), torch.zeros(experts, dtype=torch.long)
    while capacity_E.clamp(max=rows).sum() < rows * topk:
        capacity_E[int(torch.randint(experts, (), generator=generator))] += 1
    prices_E = torch.randint(0, 2, (experts,), generator=generator).float()
    found = quotas_of(loads_RE, capacity_E.clamp(max=rows), rows_R, topk, prices_E)
    assert torch.equal(found.sum(1), rows_R * topk)
    assert (found.sum(0) <= capacity_E).all() and (found >= 0).all()
    assert (found <= rows_R[:, None]).all()
