"""What the ranks do in the router tests of expert biases and of groups of experts."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import torch

from megatron_maxscore.moe import MaxScoreConfig
from tests.dist.cases import EXPERTS, TOPK, make_layer, own_input
from tests.dist.router_cases import reference_gates, reference_objective
from tools.benchmarks.oracles import highs_objective


def expert_bias(rank, size, score_function, objective="auto"):
    """Route with an expert bias by ours, by stock, and without a bias, in evaluation.

    Returns the saved state's names, the bias, the prices, and (probs, map) of each.
    """
    settings = dict(ep=size, moe_router_score_function=score_function)
    options = MaxScoreConfig(objective=objective)
    ours = make_layer(options=options, moe_router_enable_expert_bias=True, **settings)
    prices = torch.linspace(-0.2, 0.2, EXPERTS)
    ours.router.set_prices(prices)
    saved = {name: value.clone() for name, value in ours.router.state_dict().items()}
    ours.router.load_state_dict(saved)
    stock = make_layer(router="topk", moe_router_enable_expert_bias=True, **settings)
    stock.router.load_state_dict(saved)
    # Prices of a run without the bias are of logits, and no bias.
    for others in ({}, {"expert_prices": prices.clone()}):
        ours.router.load_state_dict({"weight": saved["weight"], **others})
        assert not ours.router.expert_bias.any() and ours.router.is_cold
    # Nor is a bias the prices of a run without.
    without = make_layer(options=options, **settings).router
    without.load_state_dict({**saved, "weight": saved["weight"]})
    assert not without.expert_prices.any() and without.is_cold
    ours.router.load_state_dict(saved)
    assert not ours.router.is_cold
    hidden = own_input(rank, 64).detach()
    found = []
    plain = make_layer(router="topk", **settings)
    plain.router.load_state_dict({"weight": saved["weight"]})
    for layer in (ours, stock, plain):
        layer.eval()
        with torch.no_grad():
            found.append(layer.router(hidden))
    if score_function == "sigmoid":
        _check_inference_router(stock, saved, hidden, *found[0])
    return sorted(saved), saved["expert_bias"], prices, found


def _check_inference_router(layer, saved, hidden, probs, routing_map):
    """Compare Megatron's router for inference with what ours has returned."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router import InferenceTopKRouter

    collection = ProcessGroupCollection.use_mpu_process_groups()
    router = InferenceTopKRouter(layer.config, collection).eval()
    router.load_state_dict(saved)
    with torch.no_grad():
        gates_TK, experts_TK = router._forward(hidden)
    dense = torch.zeros_like(probs).scatter(1, experts_TK, gates_TK)
    assert torch.equal(dense, probs) and torch.equal(dense > 0, routing_map)


def expert_bias_in_training(rank, size, score_function, frozen=False):
    """Train with an expert bias through Megatron's own end of a step.

    Checks gates and the optimum of every step. Returns the biases of all steps, and what they
    should be by the prices of the solves.
    """
    from megatron_maxscore.moe.step import end_attempt, end_batch

    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    layer = make_layer(
        ep=size, moe_router_score_function=score_function, moe_router_enable_expert_bias=True
    ).train()
    router = layer.router
    router.frozen_expert_bias = frozen
    router.set_prices(torch.linspace(0.0, 0.01, EXPERTS))
    biases, expected = [router.expert_bias.clone()], [router.expert_bias.clone()]
    for step in range(3):
        hidden = own_input(rank + 10 * step, 21)  # 42 assignments over 8 experts
        mask = torch.zeros(1, 21, dtype=torch.bool)
        mask[:, 17:] = True
        probs, routing_map = router(hidden, padding_mask=mask)
        logits_TE = router.gating(hidden).reshape(21, EXPERTS).detach()
        experts_TK = routing_map.nonzero()[:, 1].reshape(21, TOPK)
        gates_TK = reference_gates(logits_TE, experts_TK, score_function, False, "score")
        torch.testing.assert_close(probs.gather(1, experts_TK).double(), gates_TK)
        matrix = reference_objective(logits_TE, score_function, "score", "scores").numpy()
        own = routing_map.numpy()
        valid = ~mask.reshape(-1).numpy()
        taken = own[~valid].sum(0)
        capacity = own.sum(0) - taken
        assert own.sum(0).max() - own.sum(0).min() <= 1
        best = highs_objective(matrix[valid], TOPK, capacity)
        np.testing.assert_allclose(matrix[valid][own[valid]].sum(), best, rtol=1e-6)
        probs.sum().backward()
        assert not router.local_tokens_per_expert.any()
        before = router.expert_bias.clone()
        prices = router.prices
        mean = torch.cat([router.price_sum, router.price_count.reshape(1)])
        torch.distributed.all_reduce(mean)
        end_attempt([router])
        update = finalize._update_router_expert_bias
        # Releases before 0.18 know their groups themselves.
        takes_group = "tp_dp_cp_group" in inspect.signature(update).parameters
        group = {"tp_dp_cp_group": router.tp_dp_cp_group} if takes_group else {}
        update([layer], layer.config, **group)
        assert torch.equal(router.expert_bias, before), "stock's rule moved the bias"
        end_batch([router])
        averaged = 0.9 * prices + 0.1 * mean[:-1] / mean[-1]
        biases.append(router.expert_bias.clone())
        expected.append(averaged.max() - averaged)
    assert router.expert_prices is None and not router.local_tokens_per_expert.any()
    return biases, expected


def group_limited(rank, size, function, bias=False, tokens=64, experts=16, topk=4):
    """Route to groups of experts, in training, by prices, and by stock.

    Checks both optima in training against HiGHS. Returns the share of assignments outside of the
    chosen groups, and (probs, map) in evaluation of ours and stock's.
    """
    settings = dict(
        ep=size, experts=experts, moe_router_topk=topk, moe_router_score_function=function,
        moe_router_num_groups=4, moe_router_group_topk=2, moe_router_enable_expert_bias=bias,
        moe_router_pre_softmax=function == "softmax",
    )  # fmt: skip
    layer = make_layer(options=MaxScoreConfig(gate="score", objective="scores"), **settings)
    prices = torch.linspace(0.0, 0.05, experts)
    layer.router.set_prices(prices)
    hidden = own_input(rank, tokens).detach() * 5
    noted = []
    find = layer.router._inside
    layer.router._inside = lambda *args: noted.append(find(*args)) or noted[0]
    _, routing_map = layer.train().router(hidden)
    del layer.router._inside
    inside = noted[0].numpy()
    logits_TE = layer.router.gating(hidden).reshape(tokens, experts).detach()
    matrix = reference_objective(logits_TE, function, "score", "scores").numpy()
    # Groups: each is chosen as often as any other, and their scores are as large as can be.
    chosen = inside.reshape(tokens, 4, 4)
    assert (chosen.any(2) == chosen.all(2)).all()
    chosen = chosen.any(2)
    assert chosen.sum(1).tolist() == [2] * tokens and chosen.sum(0).tolist() == [tokens // 2] * 4
    of_group = np.sort((matrix - prices.double().numpy()).reshape(tokens, 4, 4), axis=2)
    of_group = of_group[..., -2:].sum(2)
    best = highs_objective(of_group, 2, chosen.sum(0))
    np.testing.assert_allclose(of_group[chosen].sum(), best, rtol=1e-5)
    # Experts: those of other groups cost a row range.
    ranges = matrix.max(1, keepdims=True) - matrix.min(1, keepdims=True)
    preferred = matrix - ranges * ~inside
    own = routing_map.numpy()
    assert (own.sum(1) == topk).all()
    loads = own.sum(0)
    assert loads.max() - loads.min() <= 1
    best = highs_objective(preferred, topk, loads)
    np.testing.assert_allclose(preferred[own].sum(), best, rtol=1e-6)
    outside = float((own & ~inside).sum() / own.sum())
    stock = make_layer(router="topk", **settings)
    state = dict(layer.router.state_dict())
    state.pop("expert_prices", None)
    stock.router.load_state_dict(state)
    if not bias:
        layer.router.set_prices(torch.zeros(experts))
    found = []
    for other in (layer, stock):
        with torch.no_grad():
            found.append(other.eval().router(hidden))
    return outside, found
