"""Fixtures of several unit tests."""

from __future__ import annotations

import pytest

from tests.both_solvers import KERNELS


@pytest.fixture
def passes(monkeypatch):
    """Rows of every pass over scores so far."""
    counted: list[int] = []
    for kernels in KERNELS.values():
        original = kernels.price_pass

        def price_pass(problem, *args, _original=original):
            counted.append(problem.scores_NE.shape[0])
            return _original(problem, *args)

        monkeypatch.setattr(kernels, "price_pass", price_pass)
    return counted
