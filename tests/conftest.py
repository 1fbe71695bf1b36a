"""Fixtures for all tests."""

from __future__ import annotations

import os

# Before torch is imported: several ranks and workers share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)
