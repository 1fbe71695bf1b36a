"""Capture and replay of a routing call on a device, with its backward pass."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_maxscore.moe.context import RUN
from megatron_maxscore.moe.step import average_prices, begin_batch
from tests.graph_work import GRAPH, SETTINGS, state, work
from tests.one_rank_layer import HIDDEN, build, make_layer, tear_down

TOKENS, BATCHES, MICROBATCHES = 2048, 3, 2


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    torch.cuda.set_device(0)
    yield build("nccl", TOKENS)
    tear_down()


@pytest.mark.parametrize("name", SETTINGS)
def test_replay_equals_eager(name, monkeypatch):
    monkeypatch.setattr(RUN, "is_logging", lambda: True)
    settings = copy.deepcopy(SETTINGS[name])
    options = settings.pop("options", {})
    layers = []
    for graph in ({}, GRAPH):
        torch.manual_seed(3)
        layer = make_layer(tokens=TOKENS, options=options, **settings, **graph).cuda().train()
        layer.router.raises_bad_scores = True
        layers.append(layer)
    eager, graphed = layers
    with torch.no_grad():
        eager.router.weight *= 5
        graphed.router.weight.copy_(eager.router.weight)
    hidden = torch.randn(TOKENS, 1, HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    hidden.grad = torch.zeros_like(hidden)
    graphed.router.weight.grad = torch.zeros_like(graphed.router.weight)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work(graphed, hidden)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work(graphed, hidden)
    for batch in range(BATCHES):
        begin_batch([graphed.router])
        for _ in range(MICROBATCHES):
            fresh = torch.randn_like(hidden)
            if batch == 1:
                fresh[7] = float("nan")
            own = fresh.detach().clone().requires_grad_()
            eager.router.weight.grad = None
            expected = work(eager, own)
            with torch.no_grad():
                hidden.copy_(fresh)
                hidden.grad.zero_()
                graphed.router.weight.grad.zero_()
            graph.replay()
            for a, b in zip(expected, outputs, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)
            assert torch.equal(expected[0], outputs[0]), "the assignment"
        for layer in layers:
            average_prices([layer.router])
        for a, b in zip(state(eager), state(graphed), strict=True):
            torch.testing.assert_close(a, b)
