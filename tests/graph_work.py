"""What the tests of CUDA graphs capture, and what they compare."""

from __future__ import annotations

import copy

import torch

from megatron_maxscore.moe import metrics
from megatron_maxscore.moe.context import RUN
from megatron_maxscore.moe.step import average_prices, begin_batch
from tools.benchmarks.one_rank_layer import HIDDEN, make_layer

BATCHES, MICROBATCHES = 3, 2
GRAPH = dict(cuda_graph_impl="full_iteration", cuda_graph_modules=[])
SETTINGS = {
    "softmax": {},
    "annealed": dict(options=dict(variant="softmax", anneal_steps=4, normalize_gates=True)),
    "expert bias": dict(
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
        moe_z_loss_coeff=1e-2,
    ),
    "groups": dict(moe_router_num_groups=4, moe_router_group_topk=2),
}  # fmt: skip


def work(layer, hidden):
    """Route, permute, and go back; return what a graph would leave."""
    probs, routing_map = layer.router(hidden)
    rows, gates = layer.token_dispatcher.dispatch_preprocess(hidden, routing_map, probs)
    (rows.float() * gates[:, None].float()).square().sum().backward()
    return routing_map, probs.detach(), rows.detach(), hidden.grad, layer.router.weight.grad


def state(layer):
    """Return prices, statistics and metrics after a batch."""
    router = layer.router
    values = router.last_statistics.values_I.clone()
    values[metrics.NAMES.index(metrics.PREFIX + "solve_ms")] = 0.0
    return [
        router.prices.clone(), router.last_statistics.solves.clone(),
        router.last_statistics.largest_gap.clone(), router.last_statistics.bad_tokens.clone(),
        values,
    ]  # fmt: skip


def pair(name, device, **settings):
    """Return a layer that is called, one alike that is captured, and the latter's input."""
    settings = {**copy.deepcopy(SETTINGS[name]), **settings}
    layers = []
    for graph in ({}, GRAPH):
        torch.manual_seed(3)
        layer = make_layer(**settings, **graph).to(device).train()
        layer.router.raises_bad_scores = True
        layers.append(layer)
    eager, graphed = layers
    with torch.no_grad():
        eager.router.weight *= 5
        graphed.router.weight.copy_(eager.router.weight)
    graphed.router.weight.grad = torch.zeros_like(graphed.router.weight)
    hidden = torch.randn(settings["tokens"], 1, HIDDEN, device=device, dtype=torch.bfloat16)
    hidden.requires_grad_().grad = torch.zeros_like(hidden)
    return eager, graphed, hidden


def compare(eager, graphed, hidden, outputs, replay, **tolerance):
    """Check that ``replay()``, which sets ``outputs``, does in each batch what calls do.

    The second batch has scores that are no numbers. Tolerances are those of ``assert_close``, for
    all but the assignment.
    """
    seen = []
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
            # Python's state may say anything.
            RUN.microbatch = 77
            replay()
            RUN.microbatch = 0
            for a, b in zip(expected, outputs, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True, **tolerance)
            assert torch.equal(expected[0], outputs[0]), "the assignment"
            seen.append(expected[0].clone())
        for layer in (eager, graphed):
            average_prices([layer.router])
        for a, b in zip(state(eager), state(graphed), strict=True):
            torch.testing.assert_close(a, b, **tolerance)
        assert int(graphed.router.last_statistics.solves) == MICROBATCHES
        assert int(graphed.router.last_statistics.bad_tokens) == MICROBATCHES * (batch == 1)
    assert not torch.equal(seen[0], seen[1]) and eager.router.prices.any()
