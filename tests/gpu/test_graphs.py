"""Capture and replay of a routing call on a device, with its backward pass."""

from __future__ import annotations

import pytest
import torch

from megatron_maxscore.moe.context import RUN
from tests.graph_work import SETTINGS, compare, pair, work
from tools.benchmarks.one_rank_layer import build, tear_down

TOKENS = 2048


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    torch.cuda.set_device(0)
    yield build("nccl", TOKENS)
    tear_down()


@pytest.mark.parametrize("name", SETTINGS)
def test_replay_equals_eager(name, monkeypatch):
    monkeypatch.setattr(RUN, "is_logging", lambda: True)
    eager, graphed, hidden = pair(name, "cuda", tokens=TOKENS)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work(graphed, hidden)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work(graphed, hidden)
    compare(eager, graphed, hidden, outputs, graph.replay)
