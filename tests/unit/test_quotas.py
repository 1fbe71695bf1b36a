"""Quotas and capacities of scope local."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_maxscore.moe.config import MaxScoreConfig, check_transformer_config
from megatron_maxscore.moe.quotas import capacities, quotas


@given(st.integers(0, 500), st.integers(1, 8), st.integers(8, 64), st.integers(1, 16))
def test_quotas_are_even_on_each_rank_and_over_all(num_tokens, topk, num_experts, ranks):
    rows = [quotas(num_tokens, topk, num_experts, rank) for rank in range(ranks)]
    for row in rows:
        assert row.sum() == num_tokens * topk
        assert row.max() - row.min() <= 1
        assert row.max() <= num_tokens, "topk distinct experts per token can be met"
    total = sum(rows)
    assert total.max() - total.min() <= 1


def test_capacity_factor():
    assert capacities(100, 2, 16, 0, 1.0).sum() == 200
    assert capacities(100, 2, 16, 3, 1.25).tolist() == [16] * 16  # ceil(15.625)


def test_options_are_checked():
    for name, value in (
        ("scope", "world"),
        ("mode", "greedy"),
        ("capacity_factor", 0.99),
        ("temperature", 0.0),
        ("tolerance", -1.0),
        ("price_decay", 1.0),
        ("gate", "other"),
        ("objective", "other"),
        ("eval_routing", "other"),
    ):
        with pytest.raises(ValueError, match="--maxscore-" + name.replace("_", "-")):
            MaxScoreConfig(**{name: value})


def test_temperature_of_a_model():
    class Config:
        init_method_std = 0.01
        hidden_size = 400

    assert MaxScoreConfig().temperature_for(Config()) == pytest.approx(0.1)
    assert MaxScoreConfig(temperature=0.7).temperature_for(Config()) == 0.7


def test_a_model_without_experts_is_refused():
    class Config:
        num_moe_experts = None
        moe_router_topk = 2

    with pytest.raises(ValueError, match="add --num-experts"):
        check_transformer_config(Config(), MaxScoreConfig())
