"""Recomputed passes reuse their own assignment, and passes count when their backward pass runs."""

from __future__ import annotations

import pytest
import torch

from tests.dist import recompute_cases as cases

# Relative to the largest entry; recomputation may round differently, but here it does not.
TOLERANCE = 1e-6


def assert_close(got, want):
    assert len(got) == len(want) and len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max())


@pytest.mark.parametrize("scope", ["local", "group"])
@pytest.mark.parametrize("way", cases.WAYS)
def test_gradients_are_those_without_recomputation(ranks, way, scope):
    plain = ranks(2, cases.gradients, way=way, recompute="none", scope=scope)
    for recompute in ("selective", "full"):
        again = ranks(2, cases.gradients, way=way, recompute=recompute, scope=scope)
        for a, b in zip(again, plain, strict=True):
            assert_close(a["grads"], b["grads"])
            assert a["counts"] == b["counts"] == [cases.COUNTED[way]] * 2
            assert a["solves"] == b["solves"] == [cases.COUNTED[way]] * 2
            for one, other in zip(a["sums"], b["sums"], strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("way", ["one backward", "reverse"])
def test_gradients_with_multi_token_prediction(ranks, way):
    plain = ranks(2, cases.gradients, way=way, recompute="none", mtp=True)
    again = ranks(2, cases.gradients, way=way, recompute="full", mtp=True)
    for a, b in zip(again, plain, strict=True):
        assert len(a["counts"]) == 4
        assert_close(a["grads"], b["grads"])
        assert a["counts"] == b["counts"]


@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_that_occurs_twice_in_a_checkpoint(ranks, nested):
    plain = ranks(2, cases.shared_layer, checkpointed=False)
    again = ranks(2, cases.shared_layer, checkpointed=True, nested=nested)
    for a, b in zip(again, plain, strict=True):
        assert_close(a["grads"], b["grads"])
        assert a["count"] == b["count"] == 4


def test_checkpoint_without_output(ranks):
    for plain, again in ranks(2, cases.without_output):
        assert_close(again, plain)


def test_transformer_engines_checkpoint(ranks):
    plain = ranks(2, cases.quantised_checkpoint, checkpointed=False)
    again = ranks(2, cases.quantised_checkpoint, checkpointed=True)
    for a, b in zip(again, plain, strict=True):
        assert_close(a["grads"], b["grads"])
        assert a["count"] == b["count"] == 2


def test_nothing_is_kept_of_passes_without_a_backward_pass(ranks):
    assert ranks(2, cases.memory_is_bounded) == [0, 0]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_scored_and_skipped_passes_change_nothing(ranks, recompute):
    for plain, disturbed in ranks(2, cases.passes_that_do_not_count, recompute=recompute):
        assert disturbed["losses"] == plain["losses"]
        assert all(map(torch.equal, disturbed["prices"], plain["prices"]))
        assert disturbed["statistics"] == plain["statistics"]
        assert any(prices.any() for prices in plain["prices"])
