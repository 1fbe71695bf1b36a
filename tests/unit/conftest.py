"""Fixtures of several unit tests."""

from __future__ import annotations

import pytest

from megatron_maxscore.flow import passes


@pytest.fixture
def rows_read(monkeypatch):
    """Rows of every pass over scores so far."""
    counted: list[int] = []
    original = passes.price_pass

    def price_pass(problem, *args):
        counted.append(problem.scores_NE.shape[0])
        return original(problem, *args)

    monkeypatch.setattr(passes, "price_pass", price_pass)
    return counted
