"""A routing call that is recorded and replayed does what eager calls do."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

import megatron_maxscore.cpu
from megatron_maxscore.moe import router as router_module
from megatron_maxscore.moe import seam
from megatron_maxscore.moe.context import RUN
from megatron_maxscore.moe.step import average_prices, begin_batch
from megatron_maxscore.ops.kernels import finite, soft_topk
from tests.graph_work import GRAPH, SETTINGS, state, work
from tests.kernels.recording import Recording
from tests.one_rank_layer import HIDDEN, build, make_layer, tear_down

TOKENS, BATCHES, MICROBATCHES = 48, 3, 2

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    megatron_maxscore.cpu.enable()
    yield build("gloo", TOKENS, "bounded")
    tear_down()


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    """Let tensors on the CPU, where the interpreter works, count as a device's."""
    for module in (router_module, seam):
        monkeypatch.setattr(module, "is_device", lambda tensor: True)
    for name, kernels in (("soft_topk", soft_topk), ("finite", finite)):
        module = sys.modules[f"megatron_maxscore.ops.{name}"]
        monkeypatch.setattr(module, "_kernels", lambda matrix, kernels=kernels: kernels)
    monkeypatch.setattr(RUN, "is_logging", lambda: True)


@pytest.mark.parametrize("name", SETTINGS)
def test_recorded_replay_equals_eager(name, monkeypatch):
    settings = copy.deepcopy(SETTINGS[name])
    options = settings.pop("options", {})
    layers = []
    for graph in ({}, GRAPH):
        torch.manual_seed(3)
        layers.append(make_layer(
            tokens=TOKENS, mode="bounded", options=options, **settings, **graph
        ).train())  # fmt: skip
    eager, graphed = layers
    with torch.no_grad():
        eager.router.weight *= 5
        graphed.router.weight.copy_(eager.router.weight)
    for layer in layers:
        layer.router.raises_bad_scores = True
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16).requires_grad_()
    hidden.grad = torch.zeros_like(hidden)
    graphed.router.weight.grad = torch.zeros_like(graphed.router.weight)
    # A warm-up, and the capture, on sample data: they must leave nothing.
    work(graphed, hidden)
    recording = Recording()
    with recording.capture(monkeypatch):
        outputs = work(graphed, hidden)
    seen = []
    for batch in range(BATCHES):
        begin_batch([graphed.router])
        for _ in range(MICROBATCHES):
            fresh = torch.randn(TOKENS, 1, HIDDEN, generator=generator).bfloat16()
            if batch == 1:
                fresh[7] = float("nan")
            own = fresh.clone().requires_grad_()
            eager.router.weight.grad = None
            expected = work(eager, own)
            with torch.no_grad():
                hidden.copy_(fresh)
                hidden.grad.zero_()
                graphed.router.weight.grad.zero_()
            # Python's state may say anything.
            RUN.microbatch = 77
            recording.replay()
            RUN.microbatch = 0
            for a, b in zip(expected, outputs, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            seen.append(expected[0].clone())
        for layer in layers:
            average_prices([layer.router])
        for a, b in zip(state(eager), state(graphed), strict=True):
            assert torch.equal(a, b), batch
        assert int(graphed.router.last_statistics.solves) == MICROBATCHES
        assert int(graphed.router.last_statistics.bad_tokens) == MICROBATCHES * (batch == 1)
    assert not torch.equal(seen[0], seen[1]) and eager.router.prices.any()


def test_the_recorder_sees_what_waits(monkeypatch):
    x = torch.randn(4)
    with pytest.raises(AssertionError, match="waits"), Recording().capture(monkeypatch):
        float(x.sum())
    recording, y = Recording(), torch.zeros(4)
    with recording.capture(monkeypatch):
        y += (2 * x).relu()
    x.fill_(1.0)
    y.zero_()
    recording.replay()
    assert y.tolist() == [2.0] * 4


def test_a_replay_without_preparation_knows_its_splits(monkeypatch):
    """Evaluation in between prepares a dispatch of its own, which must not be left behind."""
    layer = make_layer(
        tokens=TOKENS, mode="bounded", cuda_graph_impl="transformer_engine",
        cuda_graph_modules=["moe_router", "moe_preprocess"],
    ).train()  # fmt: skip
    dispatcher = layer.token_dispatcher
    assert "input_splits" not in dispatcher.cudagraph_attrs
    hidden = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16)
    recording = Recording()
    with recording.capture(monkeypatch), torch.no_grad():
        probs, routing_map = layer.router(hidden)
        rows, gates = dispatcher.dispatch_preprocess(hidden, routing_map, probs)
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(40, 1, HIDDEN, dtype=torch.bfloat16))
    assert dispatcher.hidden_shape[0] == 40
    layer.train()
    recording.replay()
    dispatcher.routing_map = routing_map
    dispatched, gates = dispatcher.token_dispatch(rows, gates)
    assert dispatcher.hidden_shape[0] == TOKENS
    _, counts, _ = dispatcher.dispatch_postprocess(dispatched, gates)
    assert counts.tolist() == [TOKENS * 2 // 16] * 16
