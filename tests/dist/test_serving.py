"""A trained model in inference."""

from __future__ import annotations

from tests.dist import serving_cases as cases


def test_kv_cache(ranks):
    assert ranks(2, cases.with_cache) == [True, True]


def test_static_engine(ranks):
    (answers,) = ranks(1, cases.in_engine)
    assert [len(tokens) for tokens in answers] == [8, 8]
    assert len({token for tokens in answers for token in tokens}) > 4
