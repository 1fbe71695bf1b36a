"""A routing call that is recorded and replayed does what eager calls do."""

from __future__ import annotations

import pytest
import torch

import megatron_maxscore.cpu
from megatron_maxscore.moe.context import RUN
from tests.graph_work import SETTINGS, compare, pair, work
from tests.kernels.our_kernels import count_as_a_device
from tests.kernels.recording import Recording
from tools.benchmarks.one_rank_layer import HIDDEN, build, make_layer, tear_down

TOKENS = 48

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    megatron_maxscore.cpu.enable()
    yield build("gloo", TOKENS, "bounded")
    tear_down()


@pytest.fixture(autouse=True)
def on_a_device(monkeypatch):
    count_as_a_device(monkeypatch)
    monkeypatch.setattr(RUN, "is_logging", lambda: True)


@pytest.mark.parametrize("name", SETTINGS)
def test_recorded_replay_equals_eager(name, monkeypatch):
    eager, graphed, hidden = pair(name, "cpu", tokens=TOKENS, mode="bounded")
    # A warm-up, and the capture, on sample data: they must leave nothing.
    work(graphed, hidden)
    recording = Recording()
    with recording.capture(monkeypatch):
        outputs = work(graphed, hidden)
    compare(eager, graphed, hidden, outputs, recording.replay, rtol=0, atol=0)


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
