"""The most rows that an expert gets, and the budgets that follow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_maxscore.moe import MaxScoreConfig
from megatron_maxscore.moe.budgets import least_rank_factor, most_rows_of_an_expert
from megatron_maxscore.moe.quotas import capacities
from megatron_maxscore.training.capacity import least_factor


@pytest.mark.parametrize("factor", [1.0, 1.02, 1.5])
@pytest.mark.parametrize(("tokens", "topk", "experts"), [(24, 2, 8), (21, 2, 8), (3, 2, 16)])
@pytest.mark.parametrize("ranks", [1, 4])
def test_scope_local_fills_what_its_capacities_allow(factor, tokens, topk, experts, ranks):
    options = MaxScoreConfig(capacity_factor=factor)
    most = most_rows_of_an_expert(options, tokens, tokens, topk, experts, ranks)
    each = [capacities(tokens, topk, experts, rank, factor, ranks) for rank in range(ranks)]
    assert most == int(sum(each).max())


def test_other_scopes():
    group = MaxScoreConfig(scope="group")
    assert most_rows_of_an_expert(group, 21, 21, 2, 8, 4) == 21
    sequence = MaxScoreConfig(scope="sequence")
    # Two ranks with two sequences of ten each: 3 rows of each sequence, where 2.5 would be even.
    assert most_rows_of_an_expert(sequence, 20, 10, 2, 8, 2) == 12


def test_remainders_that_do_not_rotate():
    options = MaxScoreConfig()
    assert most_rows_of_an_expert(options, 21, 21, 2, 8, 4) == 21
    assert most_rows_of_an_expert(options, 21, 21, 2, 8, 4, rotates=False) == 24


def test_rows_are_padded_for_each_expert():
    assert least_rank_factor(100, 4, 0, 400) == 1.0
    assert least_rank_factor(100, 4, 32, 400) == 4 * 128 / 400


def _args(**values):
    defaults = dict(
        moe_expert_rank_capacity_factor=1.0, moe_flex_dispatcher_backend="hybridep",
        maxscore_fixed_shape=[4096, 1], seq_length=4096, moe_router_topk=8, num_experts=128,
        expert_model_parallel_size=64, tensor_model_parallel_size=1,
        expert_tensor_parallel_size=None, fp8=None, fp4=None, fp8_recipe="mxfp8",
        use_transformer_engine_op_fuser=True,
    )  # fmt: skip
    return SimpleNamespace(**{**defaults, **values})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 1.0),  # Qwen3-235B on 64 ranks: 16,384 rows for each of 2 experts
        (dict(fp8="e4m3"), 1.0),
        # 1,000 tokens: 4,000 rows for each of 2 experts, padded to 4,096.
        (dict(maxscore_fixed_shape=[1000, 1], fp8="e4m3"), 2 * 4096 / 8000),
        (dict(expert_tensor_parallel_size=2, expert_model_parallel_size=32), 2.0),
        (dict(maxscore_fixed_shape=[0, 0], dataloader_type="external"), None),
    ],
)
def test_least_factor_of_a_launch(values, expected):
    assert least_factor(_args(**values), MaxScoreConfig()) == expected


def test_a_budget_that_is_too_small_is_refused():
    from megatron_maxscore.training import capacity

    options = MaxScoreConfig()
    capacity.check_rank_capacity(_args(), options)
    with pytest.raises(ValueError, match=r"factor 0\.9 is too small .* at least 1$"):
        capacity.check_rank_capacity(_args(moe_expert_rank_capacity_factor=0.9), options)
    with pytest.raises(ValueError, match=r"factor 1\.02 .* at least 1\.024$"):
        capacity.check_rank_capacity(
            _args(maxscore_fixed_shape=[1000, 1], fp8="e4m3", moe_expert_rank_capacity_factor=1.02),
            options,
        )
    # Prices bound nothing, and NCCL EP stops where a buffer does not do.
    nccl = _args(moe_flex_dispatcher_backend="ncclep")
    with pytest.raises(ValueError, match="--maxscore-eval-routing flow, or --moe-flex-dispatcher"):
        capacity.check_rank_capacity(nccl, options)
    capacity.check_rank_capacity(nccl, MaxScoreConfig(eval_routing="flow"))
    nccl.moe_expert_rank_capacity_factor = 64 * 2 / 8  # all tokens to one rank's two experts
    capacity.check_rank_capacity(nccl, options)
