"""Megatron's allgather and flex dispatchers behind our router."""

from __future__ import annotations

import pytest
from megatron.core.transformer import TransformerConfig

from tests.dist import dispatcher_cases as cases

ALLGATHER = dict(moe_token_dispatcher_type="allgather")
DEEPEP = dict(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="deepep")
HYBRIDEP = dict(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="hybridep")
ALL = {"allgather": ALLGATHER, "deepep": DEEPEP, "hybridep": HYBRIDEP}


@pytest.mark.parametrize("dispatcher", ALL)
@pytest.mark.parametrize("scope", ["local", "group"])
@pytest.mark.parametrize(
    ("size", "layout", "topk"),
    [(2, dict(ep=2), 3), (4, dict(ep=4), 3), (4, dict(tp=2, ep=2, etp=2), 2)],
    ids=str,
)
def test_training_steps_are_those_of_the_all_to_all(ranks, dispatcher, scope, size, layout, topk):
    differences = ranks(
        size, cases.trains_like_all_to_all, topk=topk, scope=scope, layout=layout,
        **ALL[dispatcher],
    )  # fmt: skip
    assert max(differences) <= 1e-6


@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
def test_chosen_gates_that_underflow_keep_their_experts(ranks, backend):
    for loads, smallest in ranks(2, cases.chosen_gates_of_zero, backend=backend):
        assert loads == [2 * 24 * 2 // 8] * 8
        assert smallest > 0


@pytest.mark.parametrize("dispatcher", ALL)
def test_longer_batches_than_the_shape_lose_nothing(ranks, dispatcher):
    found = ranks(2, cases.more_tokens_than_the_shape, dispatcher=ALL[dispatcher])
    assert found == [(0, True)] * 2
    with_ours = ranks(2, cases.more_tokens_than_the_shape, dispatcher={})
    assert with_ours == [(24, False)] * 2


@pytest.mark.skipif(
    "moe_expert_rank_capacity_factor" not in TransformerConfig.__dataclass_fields__,
    reason="from megatron-core 0.18",
)
@pytest.mark.parametrize("scope", ["local", "group"])
def test_a_budget_of_rows_is_met_in_training_and_cleared_in_evaluation(ranks, scope):
    assert ranks(2, cases.budget_of_rows, scope=scope) == [False] * 2


@pytest.mark.parametrize(
    ("tokens", "scope", "shape", "flex"),
    [
        (128, "local", True, False),  # quotas of 32
        (100, "local", True, False),  # of 25
        (128, "local", False, False),
        (128, "group", True, False),
        (100, "group", False, False),
        (100, "local", True, True),
    ],
)
def test_padding_for_quantisation(ranks, tokens, scope, shape, flex):
    is_known = tokens == 128 and scope == "local" and shape
    for gathers, rows, real in ranks(
        2, cases.padding, tokens=tokens, scope=scope, shape=shape, flex=flex
    ):
        assert all(number % 16 == 0 for number in rows)
        assert sum(real) == tokens * 2
        assert (rows == real) == (tokens == 128 and scope == "local")
        # What Megatron pads it counts and gathers.
        assert gathers == (0 if is_known else 1) or flex


@pytest.mark.parametrize("size", [2, 4])
def test_stand_ins_do_what_the_libraries_do(ranks, size):
    ranks(size, cases.stand_ins)


def test_a_missing_backend_is_named(ranks):
    said = ranks(1, cases.missing_backend)[0]
    # CPU mode has stand-ins.
    assert sorted(said) == [
        ("deepep", False), ("hybridep", False), ("ncclep", False), ("ncclep", True),
    ]  # fmt: skip
    for (backend, is_cpu), message in said.items():
        assert "\n" not in message
        assert f"--moe-flex-dispatcher-backend {backend}" in message
        assert "--moe-token-dispatcher-type alltoall" in message
        assert ("CPU mode" in message) == is_cpu
