"""Tests that need a CUDA device: ``python -m pytest -m gpu tests/gpu``, or tools/gpu_check.sh."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu" in str(item.path):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def needs_a_device():
    """Fail rather than skip where there is none: these tests are only run on purpose."""
    assert torch.cuda.is_available(), "tests/gpu needs a CUDA device"


@pytest.fixture
def no_waits():
    """Raise wherever the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
