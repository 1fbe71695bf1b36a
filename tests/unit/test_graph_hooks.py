"""What surrounds a CUDA graph of the whole iteration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import pytest

from megatron_maxscore.moe import capture
from megatron_maxscore.moe.step import BadScoresError
from megatron_maxscore.releases import graph_of
from megatron_maxscore.training import steps


class Wrapper:
    """As Megatron's: one graph of training and one of validation."""

    cuda_graph: ClassVar = {"training": None, "validation": None}

    def __init__(self):
        self.calls = []

    def forward_backward_func(self, **kwargs):
        self.calls.append("eager")
        return "losses"


def graphed(wrapper, **kwargs):
    wrapper.calls.append("graph")
    return "replayed"


@pytest.fixture
def asked(monkeypatch):
    asked = []
    monkeypatch.setattr(steps, "uses_maxscore", lambda: True)
    monkeypatch.setattr(steps, "maxscore_routers", lambda model: list(model))
    monkeypatch.setattr(
        steps, "_meets_bad_scores", lambda routers, has_ended: asked.append((routers, has_ended))
    )
    return asked


def test_validation_is_never_in_a_graph(asked):
    wrapper = Wrapper()
    call = steps._graphed(graphed)
    assert call(wrapper, model=["chunk"], forward_only=True) == "losses"
    assert wrapper.calls == ["eager"] and asked == []


def test_bad_scores_are_asked_for_after_a_replay(asked, monkeypatch):
    wrapper = Wrapper()
    call = steps._graphed(graphed)
    # A warm-up asks at the end of its gradients.
    assert call(wrapper, model=["chunk"], forward_only=False) == "replayed"
    assert asked == []
    monkeypatch.setitem(Wrapper.cuda_graph, "training", object())
    call(wrapper, model="chunk", forward_only=False)
    assert asked == [(["chunk"], True)] and wrapper.calls == ["graph", "graph"]


def test_bad_scores_of_a_replay_raise(monkeypatch):
    def bad(*args):
        raise BadScoresError("router scores were NaN")

    monkeypatch.setattr(steps, "uses_maxscore", lambda: True)
    monkeypatch.setattr(steps, "maxscore_routers", lambda model: [])
    monkeypatch.setattr(steps, "raise_on_bad_scores", bad)
    monkeypatch.setattr(steps, "_iteration", lambda: 7)
    monkeypatch.setattr(steps, "_has_dynamic_loss_scale", lambda: False)
    monkeypatch.setitem(Wrapper.cuda_graph, "training", object())
    with pytest.raises(BadScoresError):
        steps._graphed(graphed)(Wrapper(), model=["chunk"], forward_only=False)


@pytest.mark.parametrize(
    ("values", "implementation", "modules", "router", "dispatch"),
    [
        ({}, "none", set(), False, False),
        (dict(cuda_graph_impl="full_iteration", cuda_graph_modules=[]), "full_iteration", set(),
         True, True),
        # As recipes say it.
        (dict(cuda_graph_impl="local", cuda_graph_scope="full_iteration"), "full_iteration", set(),
         True, True),
        (dict(cuda_graph_impl="local", cuda_graph_scope_deprecated=["full_iteration"],
              cuda_graph_modules="full"), "full_iteration", set(), True, True),
        (dict(cuda_graph_impl="transformer_engine", cuda_graph_modules=["attn", "moe_router"]),
         "transformer_engine", {"attn", "moe_router"}, True, False),
        (dict(cuda_graph_impl="local", cuda_graph_modules=["moe_router"]), "local", {"moe_router"},
         True, True),
        (dict(external_cuda_graph=True, cuda_graph_scope=["moe_router", "moe_preprocess"]),
         "transformer_engine", {"moe_router", "moe_preprocess"}, True, True),
        (dict(cuda_graph_impl="transformer_engine", cuda_graph_scope="attn,moe_router"),
         "transformer_engine", {"attn", "moe_router"}, True, False),
        (dict(cuda_graph_impl="local", cuda_graph_modules="full"), "local", set(), False, False),
    ],
)  # fmt: skip
def test_what_graphs_hold(values, implementation, modules, router, dispatch):
    config = SimpleNamespace(**values)
    graph = graph_of(config)
    assert (graph.implementation, graph.modules) == (implementation, modules)
    assert capture.holds_router(config) == router
    assert capture.holds_dispatch(config) == dispatch
