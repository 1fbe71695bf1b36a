"""What the tests of CUDA graphs capture, and what they compare."""

from __future__ import annotations

from megatron_maxscore.moe import metrics

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
    values = router.last_statistics.values_M.clone()
    values[metrics.NAMES.index(metrics.PREFIX + "solve_ms")] = 0.0
    return [
        router.prices.clone(), router.last_statistics.solves.clone(),
        router.last_statistics.largest_gap.clone(), router.last_statistics.bad_tokens.clone(),
        values,
    ]  # fmt: skip
