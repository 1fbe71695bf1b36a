"""Where bounded mode can run."""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def is_device(tensor: Tensor) -> bool:
    """Return whether a tensor is where the engine runs, and the host would wait to read it."""
    return tensor.is_cuda and has_triton()


def is_interpreted() -> bool:
    """Return whether Triton's interpreter lets the engine run on tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and has_triton()
