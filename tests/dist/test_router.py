"""The router beside definitions, stock Megatron and HiGHS."""

from __future__ import annotations

import inspect

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from tests.dist import bias_cases, config_cases
from tests.dist import router_cases as cases
from tests.dist.cases import HIDDEN

# docs/routing.md has this table: score function, softmax before selection, gate, flow objective,
# and whether what reaches the experts sums to 1 per token.
TABLE = [
    ("softmax", False, "soft_topk", "logits", False),
    ("softmax", False, "soft_topk", "scores", False),
    ("softmax", True, "soft_topk", "logits", False),
    ("softmax", False, "score", "logits", True),
    ("softmax", False, "score", "scores", True),
    ("softmax", True, "score", "logits", False),
    ("softmax", True, "score", "scores", False),
    ("sigmoid", False, "score", "logits", True),
    ("sigmoid", False, "score", "scores", True),
    ("sqrtsoftplus", False, "score", "logits", True),
    ("sqrtsoftplus", False, "score", "scores", True),
]
# From 0.18.
if "sqrtsoftplus" not in inspect.getsource(moe_utils):
    TABLE = [row for row in TABLE if row[0] != "sqrtsoftplus"]
FUNCTIONS = sorted({row[0] for row in TABLE} - {"softmax"})


@pytest.mark.parametrize(("function", "pre_softmax", "gate", "objective", "renormalised"), TABLE)
def test_table_of_gates(ranks, function, pre_softmax, gate, objective, renormalised):
    results = ranks(
        2,
        cases.table_row,
        score_function=function,
        pre_softmax=pre_softmax,
        gate=gate,
        objective=objective,
    )
    assert results == [renormalised] * 2


@pytest.mark.parametrize("gate", ["soft_topk", "score"])
def test_scaling_factor(ranks, gate):
    ranks(
        2, cases.table_row, score_function="softmax", pre_softmax=False, gate=gate,
        objective="logits", scaling=2.5,
    )  # fmt: skip


@pytest.mark.parametrize("std", [0.02, 0.006])
def test_default_temperature_is_half_of_what_logits_start_with(ranks, std):
    assert ranks(2, cases.first_logits, std=std) == pytest.approx([2.0, 2.0], rel=0.1)


def test_shaped_gates(ranks):
    for found in ranks(2, cases.shaped_gates):
        assert len(found) == 8
        for probs, expected in found:
            torch.testing.assert_close(probs, expected, rtol=1e-5, atol=1e-6)


def test_annealed_gates_of_passes_that_overlap(ranks):
    assert ranks(2, cases.forward_twice) == [[True] * 3] * 2


@pytest.mark.parametrize("balancing", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
@pytest.mark.parametrize("per_token", [False, True])
def test_auxiliary_losses_are_stocks(ranks, balancing, per_token):
    names = ranks(2, cases.losses_like_stock, balancing=balancing, per_token=per_token)
    assert names[0] == names[1] and len(names[0]) == 1


def test_router_fusion_changes_nothing(ranks):
    """Transformer Engine's fused routing, which is not even installed here, is not used."""
    plain = ranks(2, cases.routed_with)
    for found, expected in zip(
        ranks(2, cases.routed_with, moe_router_fusion=True), plain, strict=True
    ):
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_z_loss_is_stocks(ranks):
    names = ranks(2, cases.losses_like_stock, balancing="none", z_loss=0.1)
    assert names == [["z_loss"]] * 2


def test_padding_mask(ranks):
    assert ranks(2, cases.padding) == [[2], [2]]


def test_price_routing_in_evaluation(ranks):
    for loads in ranks(2, cases.price_routing):
        assert sum(loads) == 32 and loads[0] > loads[-1], "dear experts are taken less"


def test_half_precision_models_keep_float32_prices(ranks):
    names = ["mlp.router.expert_prices", "mlp.router.weight"]
    assert ranks(2, cases.half_precision) == [names, names]


def test_router_replay(ranks):
    assert ranks(2, cases.replay) == [(16, 2), (16, 2)]


def test_specs(ranks):
    stock, layer, block = ranks(2, config_cases.specs)[0]
    # A layer spec has a MoE layer everywhere; the block spec follows moe_layer_freq [1, 0].
    assert stock == 0 and layer == 3 and block == 2


def test_layers_that_route_by_hash_stay_stock(ranks):
    ours = ("MaxScoreRouter", "MaxScoreTokenDispatcher")
    for found in ranks(2, config_cases.hashed_layers):
        assert found == [("TopKRouter", "MoEAlltoAllTokenDispatcher"), ours, ours]


def test_arguments(ranks):
    for messages in ranks(2, config_cases.arguments):
        assert messages.keys() == config_cases.REFUSED.keys()
        for flags, words in config_cases.REFUSED.items():
            for word in words:
                assert word in messages[flags], (flags, messages[flags])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_expert_bias_is_what_stock_routes_by(ranks, function):
    for names, bias, prices, (ours, stock, plain) in ranks(
        2, bias_cases.expert_bias, score_function=function
    ):
        assert names == ["expert_bias", "weight"]
        assert bias.dtype == torch.float32 and torch.equal(bias, prices.max() - prices)
        assert torch.equal(ours[0], stock[0]) and torch.equal(ours[1], stock[1])
        assert not torch.equal(ours[1], plain[1]), "the bias changes nothing"


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("frozen", [False, True])
def test_expert_bias_holds_the_prices(ranks, function, frozen):
    results = ranks(2, bias_cases.expert_bias_in_training, score_function=function, frozen=frozen)
    for biases, expected in results:
        for step, (bias, wanted) in enumerate(zip(biases, expected, strict=True)):
            assert torch.equal(bias, results[0][0][step]), "replicas are equal"
            torch.testing.assert_close(bias, biases[0] if frozen else wanted)
            assert bias.min() == 0.0
        assert frozen or not torch.equal(biases[-1], biases[0])


@pytest.mark.parametrize(
    ("function", "bias"), [("softmax", False)] + [(f, b) for f in FUNCTIONS for b in (False, True)]
)
def test_group_limited_routing(ranks, function, bias):
    for outside, (ours, stock) in ranks(2, bias_cases.group_limited, function=function, bias=bias):
        assert outside <= 0.01
        # By prices it is stock's rule: with the bias, and without prices.
        assert torch.equal(ours[1], stock[1])
        torch.testing.assert_close(ours[0], stock[0])


def test_router_sees_changes_of_the_config(ranks):
    """What is changed in the layer's config later counts; only softmax before selection is ours."""
    for config, seen, copies, gradient in ranks(2, config_cases.config_is_shared):
        assert config == (False, HIDDEN) and seen == (True, HIDDEN)
        assert copies == [(True, HIDDEN)] * 2
        assert gradient > 0.0, "the z-loss that was switched on later has no gradient"


def test_gates_in_double_precision(ranks):
    assert ranks(2, cases.double_gates) == ["torch.float64"] * 2
