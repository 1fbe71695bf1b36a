"""A trained model in inference."""

from __future__ import annotations

import pytest
import torch

from tests.dist import rl_cases
from tests.dist import serving_cases as cases


def test_kv_cache(ranks):
    """Decoding token by token gives what a pass over all tokens gives, in ours and in stock's."""
    for (ours, stock), (our_decoded, stock_decoded) in ranks(2, cases.with_cache):
        assert torch.equal(ours, stock) and torch.equal(our_decoded, stock_decoded)
        last = ours[:, -our_decoded.shape[1] :]
        torch.testing.assert_close(our_decoded, last, rtol=1e-4, atol=1e-5)


def test_static_engine(ranks):
    (answers,) = ranks(1, cases.in_engine)
    assert [len(tokens) for tokens in answers] == [8, 8]
    assert len({token for tokens in answers for token in tokens}) > 4


@pytest.mark.parametrize(
    "settings",
    [{}, dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)],
    ids=["softmax", "expert bias"],
)
def test_recorded_rollouts_are_replayed_in_training(ranks, settings):
    """Training routes by the flow, rollouts by prices; replay makes them one, and is no solve."""
    found = ranks(2, rl_cases.rollouts, **settings)
    # docs/rl.md has these, printed by pytest -rP.
    print(f"nats apart by flow and by prices: {found[0][0]:.3f}; with replay {found[0][1]:.3f}")
    for by_flow, replayed, loss in found:
        assert loss < 2.5 and by_flow > 1e-3
        assert replayed <= 1e-6
