"""What the ranks do in the router tests."""

from __future__ import annotations

import numpy as np
import torch

from megatron_maxscore.moe import MaxScoreConfig
from megatron_maxscore.moe.context import RUN
from tests.dist.cases import EXPERTS, HIDDEN, TOPK, make_layer, own_input
from tools.benchmarks.oracles import highs_objective

# The default: half of what logits of a normalised input start with; Megatron's init is 0.02.
TEMPERATURE = 0.5 * 0.02 * HIDDEN**0.5


def reference_gates(logits_TE, experts_TK, score_function, pre_softmax, gate):
    """Return the (T, K) gates by definition, in float64."""
    from megatron_maxscore.ops import soft_topk

    z_TE = logits_TE.double()
    if gate == "soft_topk":
        return soft_topk(z_TE, TOPK, TEMPERATURE).gather(1, experts_TK)
    if score_function == "softmax":
        if pre_softmax:
            return z_TE.softmax(-1).gather(1, experts_TK)
        return z_TE.gather(1, experts_TK).softmax(-1)
    score_TE = z_TE.sigmoid()
    if score_function == "sqrtsoftplus":
        score_TE = torch.nn.functional.softplus(z_TE).sqrt()
    chosen_TK = score_TE.gather(1, experts_TK)
    return chosen_TK / chosen_TK.sum(-1, keepdim=True)


def reference_objective(logits_TE, score_function, gate, objective):
    """Return the (T, E) matrix that the flow should maximise, in float64."""
    from megatron_maxscore.ops import soft_topk

    z_TE = logits_TE.double()
    if objective == "logits":
        return z_TE
    if gate == "soft_topk":
        return soft_topk(z_TE, TOPK, TEMPERATURE)
    return {
        "softmax": z_TE.softmax(-1),
        "sigmoid": z_TE.sigmoid(),
        "sqrtsoftplus": torch.nn.functional.softplus(z_TE).sqrt(),
    }[score_function]


def table_row(rank, size, score_function, pre_softmax, gate, objective, scaling=None):
    """Check one row of the table of gates: what is maximised and what reaches the experts."""
    from megatron_maxscore.moe import MaxScoreConfig

    layer = make_layer(
        ep=size,
        options=MaxScoreConfig(gate=gate, objective=objective),
        moe_router_score_function=score_function,
        moe_router_pre_softmax=pre_softmax,
        moe_router_topk_scaling_factor=scaling,
    )
    layer.train()
    hidden = own_input(rank, 20) * 5  # scores that differ
    probs, routing_map = layer.router(hidden)
    logits_TE = layer.router.gating(hidden).reshape(20, EXPERTS).detach()
    assert routing_map.sum(1).tolist() == [TOPK] * 20
    experts_TK = routing_map.nonzero()[:, 1].reshape(20, TOPK)
    gates_TK = reference_gates(logits_TE, experts_TK, score_function, pre_softmax, gate)
    expected = torch.zeros(20, EXPERTS, dtype=torch.float64).scatter(1, experts_TK, gates_TK)
    torch.testing.assert_close(probs.double(), expected * (scaling or 1.0), rtol=1e-5, atol=1e-6)
    matrix = reference_objective(logits_TE, score_function, gate, objective).numpy()
    total = float(np.take_along_axis(matrix, experts_TK.numpy(), 1).sum())
    best = highs_objective(matrix, TOPK, np.full(EXPERTS, 5))
    np.testing.assert_allclose(total, best, rtol=1e-6)
    return bool((gates_TK.sum(-1) - 1).abs().max() < 1e-6)


def first_logits(rank, size, std):
    """Return the standard deviation of a new router's logits over its temperature."""
    layer = make_layer(ep=size, experts=64, init_method_std=std)
    hidden = own_input(rank, 2000)
    hidden = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
    return float(layer.router.gating(hidden).std()) / layer.router.temperature


def shaped_gates(rank, size):
    """Return gates of the softmax variant, annealed and normalised, and those by definition."""

    found = []
    for step, normalise in ((1, False), (51, True), (151, False), (400, True)):
        layer = make_layer(
            ep=size,
            options=MaxScoreConfig(
                variant="softmax", temperature=0.7, anneal_steps=150, normalize_gates=normalise
            ),
        )
        hidden = own_input(rank, 20) * 5
        for training in (True, False):
            layer.train(training)
            source, RUN.iteration = RUN.iteration, lambda s=step: s
            try:
                probs, routing_map = layer.router(hidden)
            finally:
                RUN.iteration = source
            experts_TK = routing_map.nonzero()[:, 1].reshape(20, TOPK)
            z_TE = layer.router.gating(hidden).reshape(20, EXPERTS).detach().double() / 0.7
            gates_TK = TOPK * z_TE.softmax(-1).gather(1, experts_TK)
            factor = {1: 4.0, 51: 3.0, 151: 1.0, 400: 1.0}[step]
            for row in gates_TK:
                first = int(row.argmax())
                row[torch.arange(TOPK) != first] *= factor
            if normalise:
                gates_TK = gates_TK / gates_TK.sum(1, keepdim=True)
            expected = torch.zeros(20, EXPERTS, dtype=torch.float64)
            expected.scatter_(1, experts_TK, gates_TK)
            found.append((probs.detach().double(), expected))
    return found


def forward_twice(rank, size):
    """Two forward passes before the first backward pass, as pipelines have them."""
    layer = make_layer(
        ep=size, options=MaxScoreConfig(variant="softmax", temperature=0.7, anneal_steps=100)
    ).train()
    source, found = RUN.iteration, []
    try:
        for step in (1, 1, 50):
            RUN.iteration = lambda step=step: step
            hidden = own_input(rank, 20)
            found.append((hidden, layer.router(hidden)[0]))
    finally:
        RUN.iteration = source
    for _, probs in found:
        probs.sum().backward()
    assert torch.equal(found[0][0].grad, found[1][0].grad)
    return [bool(hidden.grad.any()) for hidden, _ in found]


def _metrics():
    """Return functions that clear and read the tracker of the installed release."""
    from megatron_maxscore.releases import has_metrics_tracker

    if has_metrics_tracker():
        from megatron.core.transformer.moe import moe_logging

        return moe_logging.destroy_moe_metrics_tracker, lambda: {
            name: entry.values.clone()
            for name, entry in moe_logging.get_moe_metrics_tracker().metrics.items()
        }
    from megatron.core.transformer.moe import moe_utils

    tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    return tracker.clear, lambda: {n: entry["values"].clone() for n, entry in tracker.items()}


def losses_like_stock(rank, size, balancing, z_loss=None, per_token=False):
    """Compare the gradients and metrics of the router's losses with stock's.

    Gates are multiplied by 0, so only the losses reach the router's weight.
    """
    clear, read = _metrics()
    found = {}
    for router in ("topk", "maxscore"):
        clear()
        layer = make_layer(
            ep=size,
            router=router,
            moe_router_load_balancing_type=balancing,
            moe_aux_loss_coeff=0.0 if balancing == "none" else 0.3,
            moe_z_loss_coeff=z_loss,
            calculate_per_token_loss=per_token,
        )
        layer.train()
        mask = torch.zeros(20, 1, dtype=torch.bool)
        mask[15:] = True
        probs, _ = layer.router(own_input(rank, 20), mask)
        (probs.sum() * 0.0).backward()
        found[router] = layer.router.weight.grad.clone(), read()
    (stock_grad, stock), (our_grad, ours) = found["topk"], found["maxscore"]
    assert stock_grad.abs().max() > 0 and stock
    torch.testing.assert_close(our_grad, stock_grad, rtol=1e-5, atol=1e-7)
    assert stock.keys() == ours.keys()
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name])
    return sorted(stock)


def routed_with(rank, size, **settings):
    """Return probs and map of a layer, and the gradient of its router's weight with a loss."""
    layer = make_layer(
        ep=size, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.3, **settings
    )
    layer.train()
    probs, routing_map = layer.router(own_input(rank, 20))
    probs.square().sum().backward()
    return probs.detach(), routing_map, layer.router.weight.grad


def padding(rank, size):
    """Valid tokens get the best assignment that leaves padding its room."""
    from tools.benchmarks.oracles import check_assignment

    layer = make_layer(ep=size)
    layer.train()
    hidden = own_input(rank, 24).detach()
    mask = torch.zeros(24, 1, dtype=torch.bool)
    mask[10:14] = True
    hidden[mask] *= 1e3  # padding may hold anything
    hidden[13] = float("nan")
    probs, routing_map = layer.router(hidden, mask)
    assert torch.isfinite(probs).all() and layer.router.statistics.bad_tokens == 0
    logits = layer.router.gating(hidden.nan_to_num()).reshape(24, EXPERTS).detach()
    logits[mask.flatten()] = 0.0
    matrix = logits.double().numpy()
    experts = routing_map.nonzero()[:, 1].reshape(24, TOPK).numpy()
    order = np.take_along_axis(-matrix, experts, 1).argsort(1, kind="stable")
    experts = np.take_along_axis(experts, order, 1)
    total = check_assignment(experts, matrix, TOPK, np.full(EXPERTS, 6))
    np.testing.assert_allclose(total, highs_objective(matrix, TOPK, np.full(EXPERTS, 6)), rtol=1e-6)
    # Later pipeline stages get the mask of the whole sequence.
    return routing_map.sum(1).unique().tolist()


def price_routing(rank, size):
    """In evaluation tokens choose alone, by score minus price; gates carry no price."""
    from megatron_maxscore.moe.evaluation import evaluation_routing
    from megatron_maxscore.ops import soft_topk

    layer = make_layer(ep=size)
    router = layer.router
    router.expert_prices.copy_(torch.linspace(-1.0, 1.0, EXPERTS))
    layer.eval()
    hidden = own_input(rank, 16).detach()
    probs, routing_map = router(hidden)
    logits = router.gating(hidden).reshape(16, EXPERTS).detach()
    chosen = (logits - router.expert_prices).topk(TOPK, dim=1).indices
    expected = torch.zeros_like(logits).scatter(
        1, chosen, soft_topk(logits, TOPK, TEMPERATURE).gather(1, chosen)
    )
    torch.testing.assert_close(probs, expected)
    alone = [router(hidden[t : t + 1])[1] for t in range(16)]
    assert torch.equal(torch.cat(alone), routing_map), "a token's experts depend on it alone"
    with evaluation_routing("flow"):
        _, flow_map = router(hidden)
    assert flow_map.sum(0).tolist() == [4] * EXPERTS
    assert router.statistics.solves == 0 and router.price_count == 0, "nothing is learned"
    return routing_map.sum(0).tolist()


def half_precision(rank, size):
    """A bfloat16 model keeps prices in float32, also through its state dict."""
    layer = make_layer(ep=size, params_dtype=torch.bfloat16, bf16=True)
    router = layer.router
    router.bfloat16()
    layer.train()
    probs, _ = router(own_input(rank, 16).bfloat16())
    assert probs.dtype == torch.bfloat16
    assert router.expert_prices.dtype == router.price_sum.dtype == torch.float32
    exact = torch.linspace(-1, 1, EXPERTS) + 1e-5
    router.expert_prices.copy_(exact)
    saved = {name: value.clone() for name, value in router.state_dict().items()}
    assert torch.equal(saved["expert_prices"], exact) and "price_sum" not in saved
    router.expert_prices.zero_()
    router.load_state_dict(saved)
    assert torch.equal(router.expert_prices, exact)
    sharded = router.sharded_state_dict(prefix="mlp.router.")
    return sorted(sharded)


def replay(rank, size):
    """Record an assignment and replay it on other inputs."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    from megatron_maxscore.moe.plan import plan_of

    RouterReplay.global_router_replay_instances.clear()
    layer = make_layer(ep=size, moe_enable_routing_replay=True, shape=(16, 1))
    layer.train()
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    _, first = layer.router(own_input(rank, 16))
    assert plan_of(first).static is not None
    recorded = RouterReplay.get_recorded_data()
    RouterReplay.set_replay_data([index.clone() for index in recorded])
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    hidden = own_input(rank + 50, 16)
    probs, second = layer.router(hidden)
    assert torch.equal(first, second)
    assert plan_of(second).static is None, "replayed loads need not be the quotas"
    probs.sum().backward()
    RouterReplay.clear_global_router_replay_action()
    _, third = layer.router(hidden)
    assert not torch.equal(third, first)
    RouterReplay.global_router_replay_instances.clear()
    return recorded[0].shape


def double_gates(rank, size):
    """With a router in float64 gates are SoftTopk's in float64, not rounded on the way."""
    from megatron_maxscore.ops import soft_topk

    layer = make_layer(ep=size, moe_router_dtype="fp64")
    layer.train()
    hidden = own_input(rank, 16).detach()
    probs, routing_map = layer.router(hidden)
    gates = soft_topk(layer.router.gating(hidden).reshape(16, EXPERTS).double(), TOPK, TEMPERATURE)
    torch.testing.assert_close(probs[routing_map], gates[routing_map], rtol=1e-12, atol=0.0)
    return str(probs.dtype)
