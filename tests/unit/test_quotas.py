"""Quotas and capacities of scope local."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_maxscore.moe.checks import check_transformer_config
from megatron_maxscore.moe.config import MaxScoreConfig
from megatron_maxscore.moe.quotas import capacities, own_quotas, quotas, turns_until_repeat
from megatron_maxscore.moe.scopes import Scope


@given(st.integers(0, 500), st.integers(1, 8), st.integers(8, 64), st.integers(1, 16))
def test_quotas_are_even_on_each_rank_and_over_all(num_tokens, topk, num_experts, ranks):
    rows = [quotas(num_tokens, topk, num_experts, rank) for rank in range(ranks)]
    for row in rows:
        assert row.sum() == num_tokens * topk
        assert row.max() - row.min() <= 1
        assert row.max() <= num_tokens, "topk distinct experts per token can be met"
    total = sum(rows)
    assert total.max() - total.min() <= 1


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 500), st.integers(1, 8), st.integers(8, 24), st.integers(1, 16))
def test_quotas_turn(num_tokens, topk, num_experts, ranks):
    """After E turns every expert has got the same, and every rank has served every expert."""
    total = torch.zeros(num_experts, dtype=torch.int64)
    for turn in range(num_experts):
        rows = [quotas(num_tokens, topk, num_experts, r, ranks, turn) for r in range(ranks)]
        group = sum(rows)
        assert group.max() - group.min() <= 1, "balanced in every turn"
        total += group
    rest = num_tokens * topk % num_experts
    assert total.max() == total.min(), "even after E turns"
    if rest:
        extra = [
            quotas(num_tokens, topk, num_experts, 0, ranks, turn) > num_tokens * topk // num_experts
            for turn in range(num_experts * num_experts)
        ]
        assert torch.stack(extra).any(0).all(), "no expert of a rank is always left out"


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 500), st.integers(1, 8), st.integers(2, 24), st.integers(1, 8))
def test_quotas_repeat(num_tokens, topk, num_experts, ranks):
    turns = turns_until_repeat(num_tokens, topk, num_experts, ranks)

    def rows(turn):
        of = [quotas(num_tokens, topk, num_experts, r, ranks, turn) for r in range(ranks)]
        return torch.stack(of)

    for turn in (0, 1, 5, turns - 1):
        assert torch.equal(rows(turn), rows(turn + turns))
    assert (turns == 1) == (num_tokens * topk % num_experts == 0)


@pytest.mark.parametrize(("shape", "most"), [([64, 2], 1), ([5, 3], 32)])
def test_equal_loads_have_equal_names(shape, most):
    """The dispatcher works splits out once for each name."""
    scope = Scope(MaxScoreConfig(fixed_shape=shape), None, False, knows_splits=True)
    names = {scope._static(2, 8, turn) for turn in range(1000)}
    assert None not in names and len(names) == most


def test_own_quotas_follow_from_the_scores():
    torch.manual_seed(0)
    starts = set()
    for _ in range(200):
        scores = torch.randn(130, 256)
        row = own_quotas(8, scores)
        assert row.sum() == 1040 and row.max() - row.min() == 1
        assert torch.equal(row, own_quotas(8, scores.clone()))
        extra = (row == 5).nonzero().flatten().tolist()
        starts.add(extra[0] if extra[-1] - extra[0] == 15 else extra[8])
    assert len(starts) > 100
    assert own_quotas(2, torch.zeros(0, 8)).tolist() == [0] * 8


def test_capacity_factor():
    assert capacities(100, 2, 16, 0, 1.0).sum() == 200
    assert capacities(8, 2, 64, 0, 1.0).tolist() == [1] * 64, "few tokens choose freely"
    assert capacities(100, 2, 16, 3, 1.25).tolist() == [16] * 16  # ceil(15.625)


def test_options_are_checked():
    for name, value in (
        ("scope", "world"),
        ("mode", "greedy"),
        ("capacity_factor", 0.99),
        ("temperature", 0.0),
        ("price_decay", 1.0),
        ("gate", "other"),
        ("objective", "other"),
        ("eval_routing", "other"),
        ("fixed_shape", [64]),
        ("fixed_shape", [64, -1]),
        ("fixed_shape", [True, 2]),
        ("fixed_shape", 64),
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
