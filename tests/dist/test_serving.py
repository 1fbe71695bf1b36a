"""A trained model in inference."""

from __future__ import annotations

import torch

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
